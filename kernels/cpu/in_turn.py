"""Rows of a tile mapped in the loop that sums those of the next one: memory reads and writes at once."""

from numba import types

from .cut import PAST
from .lanes import LANES
from .maps import joined_numbers, map_one, map_part, numbers_of, shift_all, sizes_of
from .memory import before_line
from .parts import by_type, nothing_of, part, unless_none
from .rows import at, at_all, block, lanes_of, lens, pivots_of, repeated
from .sums import AHEAD, CHAIN, add_chains, fetch_step, no_chains, step_of, with_rest, with_step


@unless_none(0, lambda *args: None)
def _weights_of(w, o, i0, n, channels, scratch):  # type: ignore[no-untyped-def]
    """Of a run; as by `repeated` where another one follows it."""
    return repeated(w, o, i0, n, scratch) if channels > 1 else at(w, o, 0, i0)


@part()
def _row_two(
    sources, target, beside, m, n, past, how, numbers, like, summed, r, w, runs, count, then, pivots, lenses, sums
):  # type: ignore[no-untyped-def]  # fmt: skip
    """A map of m elements, runs of n, as `map_runs`, and sums of `runs` runs of other channels as `run_sums`.

    To the same bits. Memory reads and writes at once, and nothing is read twice into L2: forward takes 1.1 copies, one
    after the other 1.3 with what comes next fetched meanwhile, and 1.5 without; backward 2.0, 2.7 and 2.3.
    """
    p, c, i, end, size = numbers_of(how, beside, numbers, 0), 0, 0, min(m, n), runs * count
    step = step_of(pivots)
    reach = min(AHEAD, size // step * step)
    if past:
        i = min(m, before_line(target))
    if i > 0:
        map_part(sources, target, beside, 0, 0, i, how, like, p)
    for k in range(max(runs, (m + n - 1) // n)):
        if k < runs:
            near, own, lanes, start = pivots_of(pivots, k), lens(lenses, k), lanes_of(sums, 0, k), k * count
            held = no_chains(near)
            j, to = start, start + count
            while j < to:
                stop = min(to, j + CHAIN * step)
                while j + step <= stop:
                    after = summed if j + reach < size else then
                    fetch_step(after, j + reach, near)
                    held = with_step(held, summed, r, w, j, j - start, how, near, own)
                    j += step
                    if i + step <= end:
                        for _ in range(step // LANES):
                            map_one(sources, target, beside, i, i - end + n, past, how, like, p)
                            i += LANES
                while j < stop:
                    held = with_rest(held, summed, r, w, j, j - start, stop - j, how, near, own)
                    j += LANES
                if j < to:
                    add_chains(w, lanes, sums.strides[0], held)
                    held = no_chains(near)
            add_chains(w, lanes, sums.strides[0], held)
        while i + LANES <= end:
            map_one(sources, target, beside, i, i - end + n, past, how, like, p)
            i += LANES
        if i + LANES <= m:
            c += 1
            q = numbers_of(how, beside, numbers, c)
            if i < end:
                map_one(sources, target, beside, i, i - end + n, past, how, like, joined_numbers(end - i, p, q))
                i += LANES
            p = q
            end += n
    if i < m:
        map_part(sources, target, beside, i, i - end + n, m - i, how, like, p)


@by_type
def rows_two(
    sources, target, beside, k, c0, w, pivots, lenses, sums, plan, cm, numbers, how, like, scratch
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Sums of block k of the channels from c0 on, and the map of those from cm on, of the block as far from the last
    one: as by `rows_sums` with weights w and by `rows_map`, backwards; in x's type."""
    alike = (pivots[0].dtype == types.float64) == (sources[-1].dtype == types.float64)
    return _rows_two if alike else nothing_of


def _rows_two(
    sources, target, beside, k, c0, w, pivots, lenses, sums, plan, cm, numbers, how, like, scratch
):  # type: ignore[no-untyped-def]  # fmt: skip
    shape, past, (r, seen, dr) = target.shape, plan.flags & PAST != 0, beside
    o0, o1, i0, n = block(k, shape, plan)
    a0, a1, j0, m = block(plan.blocks - 1 - k, shape, plan)
    g, channels = pivots[0].size, min(plan.tile, shape[1] - cm)
    for i in range(max(o1 - o0, a1 - a0)):
        o, a, then = min(o0 + i, o1 - 1), max(a1 - 1 - i, a0), min(o0 + i + 1, shape[0] - 1)
        mine = at(r, a, cm, j0), _weights_of(seen, a, j0, m, channels, scratch), at(dr, a, cm, j0)
        _row_two(
            at_all(sources, a, cm, j0), at(target, a, cm, j0), mine, channels * m if i < a1 - a0 else 0, m, past, how,
            numbers, like, at_all(sources, o, c0, i0), at(r, o, c0, i0), at(w, o, 0, i0), g if i < o1 - o0 else 0, n,
            shift_all(at_all(sources, then, c0, i0), sizes_of(sources), -g * n), pivots, lenses, sums,
        )  # fmt: skip
