"""Batch normalization for arrays, forward and backward (Ioffe & Szegedy 2015).

y, saved = fastbn.forward(x, gamma, beta)         # training
dx, dgamma, dbeta = fastbn.backward(dy, saved)
running.update(saved.moments)                     # when you say so
y = fastbn.infer(x, running.mean, running.var, gamma, beta)
"""

from . import reference
from .batchnorm import OneValueWarning, Saved, backward, forward, infer, moments
from .diagnose import Diagnosis, diagnose
from .dispatch import get_backend, set_backend
from .fold import affine, fold
from .layer import BatchNorm
from .moments import Moments
from .recalibrate import recalibrate
from .running import RunningStats

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "Diagnosis",
    "Moments",
    "OneValueWarning",
    "RunningStats",
    "Saved",
    "affine",
    "backward",
    "diagnose",
    "fold",
    "forward",
    "get_backend",
    "infer",
    "moments",
    "recalibrate",
    "reference",
    "set_backend",
]
