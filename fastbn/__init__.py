"""Batch normalization for arrays, forward and backward (Ioffe & Szegedy 2015).

y, saved = fastbn.forward(x, gamma, beta)         # training
dx, dgamma, dbeta = fastbn.backward(dy, saved)
running.update(saved.moments)                     # when you say so
y = fastbn.infer(x, running.mean, running.var, gamma, beta)
"""

from . import reference
from .batchnorm import OneValueWarning, backward, forward, infer, moments, normalize
from .diagnose import Diagnosis, diagnose
from .dispatch import get_backend, set_backend
from .distributed import Ranks, RanksError
from .fold import affine, fold
from .layer import BatchNorm
from .moments import Moments
from .recalibrate import recalibrate
from .running import RunningStats
from .saved import Saved
from .second import backward_backward, jvp

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "Diagnosis",
    "Moments",
    "OneValueWarning",
    "Ranks",
    "RanksError",
    "RunningStats",
    "Saved",
    "affine",
    "backward",
    "backward_backward",
    "diagnose",
    "fold",
    "forward",
    "get_backend",
    "infer",
    "jvp",
    "moments",
    "normalize",
    "recalibrate",
    "reference",
    "set_backend",
]
