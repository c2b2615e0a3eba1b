"""Device functions of second order: means and co-moments of (u, g, d), by thread, by block and by piece, and by weights
those of (u, d), for which `blocks` has the trees.
"""

from numba import float64

from .blocks import MOST_THREADS, merge_comoments, two_sum
from .target import cuda

MOMENTS = 9  # of (u, g, d) in a piece; by weights, `COMOMENTS` of (u, d) follow
COMOMENTS = 5


@cuda.jit(device=True)
def merge_triples(a, b):  # type: ignore[no-untyped-def]
    """Chan's formula for count, means of u and of g as hi and lo, mean of d, and co-moments u d, g d, g u."""
    n, uh, ul, gh, gl, d, ud, gd, gu = a
    nb, uhb, ulb, ghb, glb, db, udb, gdb, gub = b
    if n == 0.0:
        return b
    if nb == 0.0:
        return a
    total = n + nb
    share = nb / total
    both = n * share
    step_u, step_g, step_d = (uhb - uh) + (ulb - ul), (ghb - gh) + (glb - gl), db - d
    moved_u, lost_u = two_sum(uh, step_u * share)
    moved_g, lost_g = two_sum(gh, step_g * share)
    return (
        total, moved_u, ul + lost_u, moved_g, gl + lost_g, d + step_d * share,
        ud + udb + step_u * step_d * both, gd + gdb + step_g * step_d * both, gu + gub + step_g * step_u * both,
    )  # fmt: skip


@cuda.jit(device=True)
def put_triple(kept, t, a):  # type: ignore[no-untyped-def]
    kept[0, t], kept[1, t], kept[2, t], kept[3, t], kept[4, t] = a[0], a[1], a[2], a[3], a[4]
    kept[5, t], kept[6, t], kept[7, t], kept[8, t] = a[5], a[6], a[7], a[8]


@cuda.jit(device=True)
def triple_at(kept, t):  # type: ignore[no-untyped-def]
    return (
        kept[0, t], kept[1, t], kept[2, t], kept[3, t], kept[4, t], kept[5, t], kept[6, t], kept[7, t], kept[8, t],
    )  # fmt: skip


@cuda.jit(device=True)
def block_triples(a, lanes):  # type: ignore[no-untyped-def]
    """As `blocks.block_moments`."""
    kept = cuda.shared.array((MOMENTS, MOST_THREADS), float64)
    t = cuda.threadIdx.x
    put_triple(kept, t, a)
    cuda.syncthreads()
    half = cuda.blockDim.x >> 1
    while half >= lanes:
        if t < half:
            put_triple(kept, t, merge_triples(triple_at(kept, t), triple_at(kept, t + half)))
        cuda.syncthreads()
        half >>= 1
    merged = triple_at(kept, t & (lanes - 1))
    cuda.syncthreads()  # the next call may overwrite the array
    return merged


@cuda.jit(device=True)
def added(t, u, g, d):  # type: ignore[no-untyped-def]
    """Count, pivots of u and g, and sums of u, g, d, u d, g d, g u about these, with a value more of each."""
    n, pu, pg, su, sg, sd, sud, sgd, sgu = t
    if n == 0.0:
        pu, pg = u, g
    u -= pu
    g -= pg
    return n + 1.0, pu, pg, su + u, sg + g, sd + d, sud + u * d, sgd + g * d, sgu + g * u


@cuda.jit(device=True)
def weighed(t, u, d, w):  # type: ignore[no-untyped-def]
    """Sum of weights, pivot of u, and sums by weights of u, d and u d about it. What has none is absent, NaN or not."""
    n, pu, su, sd, sud = t
    if w == 0.0:
        return t
    if n == 0.0:
        pu = u
    u -= pu
    return n + w, pu, su + w * u, sd + w * d, sud + w * u * d


@cuda.jit(device=True)
def triple_of(t):  # type: ignore[no-untyped-def]
    """Sums of a thread as means and co-moments."""
    n, pu, pg, su, sg, sd, sud, sgd, sgu = t
    if n == 0.0:
        return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    u, g, d = su / n, sg / n, sd / n
    uh, ul = two_sum(pu, u)
    gh, gl = two_sum(pg, g)
    return n, uh, ul, gh, gl, d, sud - su * d, sgd - sg * d, sgu - sg * u


@cuda.jit(device=True)
def pair_of(t):  # type: ignore[no-untyped-def]
    n, pu, su, sd, sud = t
    if n == 0.0:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    uh, ul = two_sum(pu, su / n)
    return n, uh, ul, sd / n, sud - su * (sd / n)


@cuda.jit(device=True)
def triple_in(part, k, c):  # type: ignore[no-untyped-def]
    return (
        part[0, k, c], part[1, k, c], part[2, k, c], part[3, k, c], part[4, k, c], part[5, k, c], part[6, k, c],
        part[7, k, c], part[8, k, c],
    )  # fmt: skip


@cuda.jit(device=True)
def with_weighted(v, part, k, c):  # type: ignore[no-untyped-def]
    return merge_comoments(
        v[0], v[1], v[2], v[3], v[4], part[9, k, c], part[10, k, c], part[11, k, c], part[12, k, c], part[13, k, c]
    )  # fmt: skip
