"""The kernels, one module per kind of array, and the contract that all of them keep.

A kernel sees three-dimensional views (O, C, I): outer, channels, inner, with any strides. It does all that is
proportional to the data, and the arithmetic on C numbers that goes with it; what is asked of it, and on which
arrays, is in `fastbn/batchnorm.py`. A backend has two functions:

``forward(x, y, table, given, eps, more=None)``
    x (O, C, I) read; y (O, C, I) written, or None; table (6, C) float64 written: mean as an unevaluated pair hi + lo,
    biased variance, invstd, gamma, beta. given = (gamma, beta, mean, var), each None or a contiguous (C,) array of
    float32 or float64; gamma None is 1, and beta None is 0. With mean and var (both or none) the statistics are these,
    hi = mean and lo = 0; else they are computed from x. Of NumPy arrays table may be None where mean and var are given
    and `more` isn't: y alone is wanted. Then

    ``invstd = 1 / sqrt(var + eps)``, ``y = gamma invstd ((x - hi) - lo) + beta``.

``backward(dy, x, dx, table, dgamma, dbeta, frozen, more=None)``
    dy, x (O, C, I) and table (6, C) read; dx (O, C, I) written, or None; dgamma, dbeta (C,) written, or None,
    contiguous, of float64 for float64 x and else of float32. Where x doesn't count (dgamma is None, and dx too unless
    `frozen`), it may be dy. With sums and means over the O I values of a channel,

    ``dbeta = sum dy``, ``dgamma = invstd sum dy ((x - hi) - lo)``,
    ``dx = a (dy - mean dy) + b ((x - hi) - lo)``, ``a = gamma invstd``, ``b = -a invstd^2 cov(dy, x)``;
    `frozen`, statistics are constants: ``dx = a dy``.

For statistics of more than one array, in main memory, backward comes in two steps as well:
``gradient_sums(dy, x, table, more=None)`` gives sum dy and sum dy ((x - hi) - lo), (2, C) float64, and
``gradient_map(dy, x, dx, table, sums, count, more=None)`` writes dx by such sums over `count` values of all arrays, and
the gradient of a residual; with weights, `mass` has the sum of those of all arrays.

`more`, a `fastbn.extras.Extras`, is what a call asks for beyond that (None: nothing). All of it composes.

- `starts` (G + 1,), `order` (O,) or None: the outer indices order[starts[g]:starts[g + 1]] (without order, these
  indices themselves) are set g of G, with statistics of its own. table is (6, G C) then, set by set, and so are given
  mean and var, dgamma and dbeta; gamma and beta stay (C,). A set may be empty; its table is 0 but for gamma and beta.
- `weights` w (O, 1, I) and their sum `mass` W (G,) by set: ``mean = sum w x / W``, ``var = sum w (x - mean)^2 / W``, in
  which x counts as absent where w is 0, NaN or not. Where W is 0, mean, var and invstd are 0. On a GPU `mass` is
  written by forward, if the statistics are its own, and read by backward. In backward

  ``dx = a g + w (b ((x - hi) - lo) - a sum g / W)``, ``b = -a invstd^2 sum g ((x - hi) - lo) / W``.
- `residual` r and `activation` f: ``y = f(gamma invstd (x - mean) + beta + r)``. backward takes ``g = dy f'(that)`` in
  place of dy, computed from x as forward did, and writes g to `dresidual` if that is given.
- `masked` "zero" or "keep": where w is 0, y is 0 or x. In backward g is 0 there, and dx is 0 or dy.
- `inverse`, in backward: x holds forward's y, and ``f^-1(y)``, gamma xhat + beta, stands for x. The table is x's still;
  kernels make the other one, by which the mean is beta, and 1 / std is 1 / gamma. It is not asked of `gradient_sums`
  and `gradient_map`.
- `lost` (n,), ascending, and `kept` (O, n, I) of x's type, of NumPy arrays alone: channels that can't be had back so.
  forward writes their x to `kept`, before y; with `inverse` backward reads it there.

Second order and forward mode are `second`, apart from these two: ``second(u, g, x, r, z, table, tangents, frozen,
need_gamma, more=None)`` in `fastbn.kernels.cpu.second`, which has the formulas, and in `fastbn.kernels.reference`. For
arrays on a GPU, CuPy's and PyTorch's too, it is in `fastbn.kernels.numba_cuda.second`, and takes C numbers as forward
and backward do: `tangents` a pair, each None or (C,) of float32 or float64, and in place of `need_gamma` an array
(G C,) to be written, or None; `mass` isn't read.

Both formulas are those of Ioffe & Szegedy (2015), algorithm 1 and section 3, with dy centred before it is
scaled: a constant dy then gives dx = 0 exactly, at any offset. y may be x, and dx may be dy or x; otherwise
outputs overlap nothing. O, C and I are at least 1; the stride of an axis of size 1 means nothing. All arrays are of
one kind and on one device. float16 comes as uint16 bits and bfloat16 as int16 bits where `element_view` says so. Whole
numbers (uint8, int8, uint16, int16) may be x, on the CPU and by numba.cuda; then y, dy and residuals are float32. On
the CPU `element_view` has dtypes for them; numba.cuda is told by `whole=True`, as int16 is bfloat16 otherwise. The same
arguments give the same bits, whatever the number of threads.

**In your own kernels.** The CPU backend's building blocks are plain `@njit` functions on contiguous runs, for
use in other `@njit` code (fused pipelines, other reductions):

>>> import numpy as np
>>> from numba import njit
>>> from fastbn.kernels.cpu import block_moments, block_normalize, merge_moments
>>> @njit
... def standardize(rows, out):
...     n = hi = lo = m2 = 0.0
...     for r in range(rows.shape[0]):
...         n, hi, lo, m2 = merge_moments(n, hi, lo, m2, float(rows.shape[1]), *block_moments(rows[r]))
...     for r in range(rows.shape[0]):
...         block_normalize(rows[r], out[r], hi, lo, 1.0 / (m2 / n) ** 0.5, 0.0)
>>> data = np.float32(1e6) + np.arange(8, dtype=np.float32).reshape(2, 4)
>>> out = np.empty_like(data)
>>> standardize(data, out)
>>> [round(float(v), 3) for v in out.reshape(-1)]
[-1.528, -1.091, -0.655, -0.218, 0.218, 0.655, 1.091, 1.528]
"""
