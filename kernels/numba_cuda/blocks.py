"""Device functions: moments and how they merge, in a thread and in a block; one value of y and of dx.

Your own kernels may call them. They compute in float64, but `normalize` and `gradient` in the type of their arguments.
"""

from numba import float64

from .target import cuda

MOST_THREADS = (
    256  # of a block; shared arrays have this size, each on a line of its own: the simulator tells them by it
)


@cuda.jit(device=True)
def two_sum(a, b):  # type: ignore[no-untyped-def]
    """a + b as a rounded sum and what the rounding lost."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


@cuda.jit(device=True)
def merge_moments(n, hi, lo, m2, nb, hib, lob, m2b):  # type: ignore[no-untyped-def]
    """Chan's formula: (count, mean_hi, mean_lo, M2) of two sets of values -> those of their union; all float64."""
    if n == 0.0:
        return nb, hib, lob, m2b
    if nb == 0.0:
        return n, hi, lo, m2
    total = n + nb
    delta = (hib - hi) + (lob - lo)
    share = nb / total
    moved, lost = two_sum(hi, delta * share)
    return total, moved, lo + lost, m2 + m2b + delta * delta * (n * share)


@cuda.jit(device=True)
def merge_comoments(n, hi, lo, t, p, nb, hib, lob, tb, pb):  # type: ignore[no-untyped-def]
    """Chan's formula for (count, mean of dy as hi and lo, mean of x, co-moment) of two sets of pairs."""
    if n == 0.0:
        return nb, hib, lob, tb, pb
    if nb == 0.0:
        return n, hi, lo, t, p
    total = n + nb
    delta = (hib - hi) + (lob - lo)
    step = tb - t
    share = nb / total
    moved, lost = two_sum(hi, delta * share)
    return total, moved, lo + lost, t + step * share, p + pb + delta * step * (n * share)


@cuda.jit(device=True)
def block_moments(n, hi, lo, m2, lanes):  # type: ignore[no-untyped-def]
    """Merges the moments of all threads of a block whose index leaves the same rest by `lanes`, a power of two.

    Every thread must come here; each gets the moments of its own rest. lanes=1: one set, the whole block.
    """
    ns = cuda.shared.array(MOST_THREADS, float64)
    his = cuda.shared.array(MOST_THREADS, float64)
    los = cuda.shared.array(MOST_THREADS, float64)
    m2s = cuda.shared.array(MOST_THREADS, float64)
    t = cuda.threadIdx.x
    ns[t], his[t], los[t], m2s[t] = n, hi, lo, m2
    cuda.syncthreads()
    half = cuda.blockDim.x >> 1
    while half >= lanes:
        if t < half:
            u = t + half
            ns[t], his[t], los[t], m2s[t] = merge_moments(
                ns[t], his[t], los[t], m2s[t], ns[u], his[u], los[u], m2s[u]
            )  # fmt: skip
        cuda.syncthreads()
        half >>= 1
    u = t & (lanes - 1)
    merged = ns[u], his[u], los[u], m2s[u]
    cuda.syncthreads()  # the next call may overwrite the arrays
    return merged


@cuda.jit(device=True)
def block_comoments(n, hi, lo, mean, co, lanes):  # type: ignore[no-untyped-def]
    """The same for (count, mean of dy as hi and lo, mean of x, co-moment)."""
    ns = cuda.shared.array(MOST_THREADS, float64)
    his = cuda.shared.array(MOST_THREADS, float64)
    los = cuda.shared.array(MOST_THREADS, float64)
    means = cuda.shared.array(MOST_THREADS, float64)
    cos = cuda.shared.array(MOST_THREADS, float64)
    t = cuda.threadIdx.x
    ns[t], his[t], los[t], means[t], cos[t] = n, hi, lo, mean, co
    cuda.syncthreads()
    half = cuda.blockDim.x >> 1
    while half >= lanes:
        if t < half:
            u = t + half
            ns[t], his[t], los[t], means[t], cos[t] = merge_comoments(
                ns[t], his[t], los[t], means[t], cos[t], ns[u], his[u], los[u], means[u], cos[u]
            )
        cuda.syncthreads()
        half >>= 1
    u = t & (lanes - 1)
    merged = ns[u], his[u], los[u], means[u], cos[u]
    cuda.syncthreads()
    return merged


@cuda.jit(device=True)
def normalize(x, hi, lo, scale, beta):  # type: ignore[no-untyped-def]
    """scale ((x - hi) - lo) + beta, in the type of the arguments."""
    return scale * ((x - hi) - lo) + beta


@cuda.jit(device=True)
def gradient(dy, x, ghi, glo, hi, lo, a, b):  # type: ignore[no-untyped-def]
    """a ((dy - ghi) - glo) + b ((x - hi) - lo), in the type of the arguments."""
    return a * ((dy - ghi) - glo) + b * ((x - hi) - lo)


@cuda.jit(device=True)
def weighted_gradient(g, x, w, ghi, glo, hi, lo, a, b):  # type: ignore[no-untyped-def]
    """a ((g - w ghi) - w glo) + w (b ((x - hi) - lo)), in the type of the arguments; x is absent where w is 0."""
    if w == 0.0:
        return a * g
    return a * ((g - w * ghi) - w * glo) + w * (b * ((x - hi) - lo))
