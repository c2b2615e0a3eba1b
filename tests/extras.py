"""What tests of weights, groups, residuals and activations share: shapes, arguments, one check by the reference."""

from __future__ import annotations

import numpy as np
from cases import TOLERANCE, eps

import fastbn

SHAPES = {
    "nchw": ((6, 5, 7, 9), 1),
    "nchw long": ((3, 2, 40, 50), 1),
    "nhwc": ((6, 7, 9, 20), -1),
    "nhwc narrow": ((6, 37, 3), -1),
    "nc": ((37, 20), 1),
    "cn": ((5, 200), 0),
    "short runs": ((40, 6, 7), 1),
    "across channels": ((8, 40, 7, 7), 1),
    "instance": ((6, 5, 30), (0, 1)),
}
NARROW = {  # weights are laid out by column, where rows are folded or a channel has more than a column: several times
    "points": ((3001, 3), 1),
    "narrow": ((700, 20), 1),
    "folded runs": ((301, 3, 5), 1),
    "wide runs": ((60, 200, 7), 1),
    "deep runs": ((401, 3, 21), 1),
    "deep and wide": ((90, 40, 19), 1),
    "sequences": ((5, 400, 4), -1),
    "wide enough": ((9, 70, 64), -1),
}
WEIGHTS = "none", "mask", "samples", "positions"
GROUPS = "none", "int", "sizes", "ids"


def weights_for(kind, rng, shape, axis):
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    full = [1 if a in axes else n for a, n in enumerate(shape)]
    samples = next(a for a in range(len(shape)) if a not in axes)
    if kind == "none":
        return None
    if kind == "mask":
        return rng.random(full) < 0.6
    if kind == "samples":
        return rng.integers(0, 3, shape[samples]).astype(np.float64)
    w = rng.gamma(1.0, 1.0, full)
    w[rng.random(full) < 0.2] = 0
    return w.astype(np.float32)


def groups_for(kind, rng, shape, axis):
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    n = shape[next(a for a in range(len(shape)) if a not in axes)]
    if kind == "none":
        return None
    if kind == "int":
        return 4 if n > 4 else 2
    if kind == "sizes":
        return [1, 0, n - 2, 1]
    ids = rng.integers(0, 3, n)
    ids[0] = 4  # and group 3 is empty
    return ids


def compare(name, got, exact, dtype, times=1.0, terms=0.0):
    unit = TOLERANCE[dtype.name] * eps(dtype) * times
    error = np.abs(got.astype(np.float64) - exact) / np.maximum(np.maximum(1, terms), np.abs(exact))
    assert got.shape == exact.shape
    assert error.max(initial=0) <= unit, f"{name}: {error.max() / unit:.2f} of what is allowed, at {error.argmax()}"


def run_both(rng, shape, axis, dtype, *, frozen=False, residual=False, offset=3.0, **more):
    x = (rng.normal(offset, 1.5, shape) + rng.normal(0, 2, shape[-1])).astype(dtype)
    axes = tuple(sorted(a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))))
    channels = tuple(shape[a] for a in axes)
    gamma, beta = rng.normal(1, 0.5, channels).astype(np.float32), rng.normal(0, 1, channels).astype(np.float32)
    more = {k: v for k, v in more.items() if v is not None}
    if residual:
        given = rng.normal(0, 1, shape if residual is True else residual).astype(dtype)
        more["residual"] = np.broadcast_to(given, shape)
    if frozen:
        groups = more.get("groups")
        sets = (
            ()
            if groups is None
            else (
                groups
                if isinstance(groups, int)
                else len(groups)
                if isinstance(groups, list)
                else int(groups.max()) + 1,
            )
        )
        more["frozen"] = rng.normal(offset, 1, (*sets, *channels)), rng.gamma(2, 1, (*sets, *channels))
    exact, kept = fastbn.reference.forward(x, gamma, beta, axis=axis, **more)
    y, saved = fastbn.forward(x, gamma, beta, axis=axis, **more)
    dy = rng.normal(0.1, 1, shape).astype(dtype)
    return x, y, saved, exact, kept, dy


def as_frozen(kept):
    return kept._replace(moments=None, groups=tuple((rows, as_frozen(part)) for rows, part in kept.groups))


def check(rng, shape, axis, dtype, **more):
    x, y, saved, exact, kept, dy = run_both(rng, shape, axis, dtype, **more)
    assert y.dtype == dtype
    times = 2.0 if more.get("activation") in ("silu", "gelu", "hardswish", "tanh", "elu") else 1.0
    compare("y", y, exact, dtype, times)
    got, want = fastbn.backward(dy, saved), fastbn.reference.backward(dy, kept)
    # dx is the difference of a dy and two sums. A set of one or two values has an a of 300 and a dx of 0.
    scaled = np.abs(fastbn.reference.backward(dy, as_frozen(kept))[0])
    assert len(got) == len(want)
    for name, a, b in zip(("dx", "dgamma", "dbeta", "dresidual"), got, want, strict=False):
        n = x.size // a.size
        numbers = np.dtype(np.float32) if dtype.itemsize < 8 else dtype
        if n > 1:  # sums: relative to what is added up
            assert np.abs(a - b).max() <= 8 * eps(numbers) * max(1.0, np.abs(b).max()) * n**0.5, name
        else:
            compare(name, a, b, dtype, 2 * times, scaled)
