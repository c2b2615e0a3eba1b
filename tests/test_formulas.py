"""Formulas, which plain Python writes while Numba compiles, and the views that parts hand on: against NumPy."""

from __future__ import annotations

import operator
import re

import numpy as np
import pytest
from fastbn.kernels.cpu import formulas, views
from fastbn.kernels.cpu.formulas import either, formula, full, intrinsic
from fastbn.kernels.cpu.lanes import LANES, fma, keep_whole, nothing, spread, where_less
from fastbn.kernels.cpu.memory import load, pointer, save
from fastbn.kernels.cpu.parts import part
from numba import njit, types
from numba.core.errors import NumbaError

SYMBOLS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def on_lanes(function, *arrays):
    """What compiled code makes of sixteen numbers at a time."""

    @njit(error_model="numpy")
    def run(a, b, out):
        for i in range(0, out.size, LANES):
            like = spread(out[0])
            save(pointer(out, 0), i, function(load(pointer(a, 0), i, like), load(pointer(b, 0), i, like)))

    out = np.full_like(arrays[0], np.nan)
    run(*arrays, out)
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("symbol", SYMBOLS)
def test_operators(symbol, dtype, rng):
    f, number = SYMBOLS[symbol], float(rng.normal(2, 1))
    a, b = rng.normal(3, 2, (2, 4 * LANES)).astype(dtype)
    np.testing.assert_array_equal(on_lanes(formula(lambda x, y: f(x, y)), a, b), f(a, b))
    np.testing.assert_array_equal(on_lanes(formula(lambda x, _: f(x, number)), a, b), f(a, dtype(number)))
    np.testing.assert_array_equal(on_lanes(formula(lambda x, _: f(number, x)), a, b), f(dtype(number), a))
    np.testing.assert_array_equal(on_lanes(formula(lambda x, _: f(x, 3)), a, b), f(a, dtype(3)))  # a whole number too


def test_numbers_of_numba(rng):
    """A number that Numba hands to a formula: alone, and beside lanes."""

    @formula
    def line(n, i, x):
        return n * 2 - 1, i * 3 + 2, x * n, n / 3.0

    @njit
    def run(n, i, a, out):
        m, j, lanes, third = line(n, i, load(pointer(a, 0), 0, spread(a[0])))
        save(pointer(out, 0), 0, lanes)
        return m, j, third

    n, i, a = float(rng.normal(3, 1)), int(rng.integers(5, 90)), rng.normal(2, 1, LANES).astype(np.float32)
    out = np.empty_like(a)
    assert run(n, i, a, out) == (n * 2 - 1, i * 3 + 2, n / 3.0)
    np.testing.assert_array_equal(out, a * np.float32(n))


def test_decides_by_type_and_unrolls():
    @formula
    def added(x, r, others):
        x = x if r is None else x + r
        for o in others:
            x = x + o
        return x, len(others), r is None

    @njit
    def run(x, r, others):
        return added(x, r, others)

    assert run(1.5, None, (2.0, 3.0)) == (6.5, 2, True)
    assert run(1.5, 10.0, (2.0,)) == (13.5, 1, False)
    assert run(1.5, 10.0, ()) == (11.5, 0, False)


def test_formulas_call_formulas_and_give_tuples_and_nothing():
    @formula
    def both(x, y):
        return x + y, (x - y, None)

    @formula
    def product(x, y):
        s, (d, nobody) = both(x, y)
        assert nobody is None
        return s * d

    @formula
    def stored(out, i, x):
        save(pointer(out, 0), i, x)

    @njit
    def run(x, y, out):
        return product(x, y), both(x, y)[1][0], stored(out, 0, spread(x))

    out = np.empty(LANES)
    assert run(7.0, 3.0, out) == (40.0, 4.0, None)
    assert (out == 7).all()


def test_either():
    @formula
    def chosen(flag, out):
        either(
            flag,
            lambda: save(pointer(out, 0), 0, spread(1.0)),
            lambda: save(pointer(out, 0), 0, spread(2.0)),
        )

    @njit
    def run(flag, out):
        chosen(flag, out)

    for flag in (True, False):
        out = np.empty(LANES)
        run(flag, out)
        assert (out == (1 if flag else 2)).all()


def test_full_is_of_the_kind_of_what_it_is_like(rng):
    a, b = rng.normal(0, 1, (2, LANES)).astype(np.float32)
    capped = formula(lambda x, y: where_less(x, full(x, 0.25), x, fma(y, full(x, 0.0), full(y, 0.25))))
    np.testing.assert_array_equal(on_lanes(capped, a, b), np.minimum(a, np.float32(0.25)))


def test_only_compiled_code_calls_them():
    with pytest.raises(NotImplementedError, match="for compiled code"):
        nothing(1.0)
    with pytest.raises(NotImplementedError, match="for compiled code"):
        formula(lambda x: x)(1.0)


def test_what_no_formula_can_hand_on():
    @njit
    def run(x):
        return formula_of_text(x)

    formula_of_text = formula(lambda _: "text")
    with pytest.raises((NumbaError, TypeError), match="can't hand on 'text'"):
        run(1.0)
    assert formulas._writers == []  # nor is anything left behind


def test_intrinsics_take_what_numba_casts():
    @intrinsic
    def doubled(_typing, x):
        return types.float64(types.float64), lambda _c, builder, _s, args: builder.fadd(args[0], args[0])

    @formula
    def called(i):
        return doubled(i)

    @njit
    def run(i):
        return called(i)

    assert run(21) == 42.0


# ---- parts


@part()
def _lanes_of(a, out):
    keep_whole()
    save(pointer(out, 0), 0, load(pointer(a, 0), 0, spread(out[0])))


def test_parts_have_vectors_on_the_stack_in_line(rng):
    """Where they lie across lines or pages, a loop took up to ten times as long, in one process of six."""

    @njit
    def run(a, out):
        _lanes_of(views.borrowed(a), views.borrowed(out))

    a, out = rng.normal(3, 2, LANES), np.full(LANES, np.nan)
    run(a, out)
    np.testing.assert_array_equal(out, a)
    code = next(iter(run.inspect_llvm().values()))
    (group,) = re.findall(r"^define .*_lanes_of.* (#\d+) \{$", code, re.MULTILINE)
    assert re.search(rf"^attributes {group} = .*\balignstack=64\b", code, re.MULTILINE)


# ---- views


@part()
def _seen(view, out):
    """What a part has of a view that it was handed."""
    for i in range(view.shape[0]):
        for c in range(view.shape[1]):
            out[i, c] = view[i, c]
    return view.size, view.itemsize, view.strides


@part()
def _row_of(view, out):
    for c in range(view.size):
        out[0, c] = view[c]
    return view.size, view.itemsize


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_views_of_matrices(dtype, rng):
    @njit
    def corners(a, i, m, n, out):
        held = views.borrowed(a)
        seen = _seen(views.corner(held, i, m, n), views.borrowed(out))
        views.hold(a)
        return seen

    @njit
    def rests(a, i, out):
        seen = _seen(views.rest(views.borrowed(a), i), views.borrowed(out))
        views.hold(a)
        return seen

    @njit
    def rows(a, i, n, out):
        held = views.borrowed(a)
        whole = _row_of(views.place(held, i), views.borrowed(out))
        part_of_it = _row_of(views.row(held, i, n), views.borrowed(out))
        views.hold(a)
        return whole, part_of_it

    a = rng.normal(0, 100, (9, 40)).astype(dtype)[::2, 3:33]  # no part of it is contiguous
    out = np.zeros((9, 40), dtype)
    size, item, strides = corners(a, 1, 3, 17, out)
    assert (size, item, strides) == (51, a.itemsize, a.strides)
    np.testing.assert_array_equal(out[:3, :17], a[1:4, :17])
    assert not out[3:].any()
    assert not out[:, 17:].any()
    assert rests(a, 2, out)[1:] == (a.itemsize, a.strides)
    np.testing.assert_array_equal(out[:3, :30], a[2:])
    assert rows(a, 3, 11, out) == ((30, a.itemsize), (11, a.itemsize))
    np.testing.assert_array_equal(out[0, :30], a[3])


def test_views_know_their_sizes():
    """Where nothing hands them on, which would count anew."""

    @njit
    def run(a):
        held = views.borrowed(a)
        corner, row, whole = views.corner(held, 1, 3, 4), views.row(held, 2, 5), views.place(held, 0)
        views.hold(a)
        return corner.size, row.size, whole.size, views.carved(held, 0, 2, 3, 0.0)[0].size

    assert run(np.zeros((5, 10))) == (12, 5, 10, 6)


def test_slices_of_views_are_views():
    is_view = formula(lambda a: isinstance(a.kind, views.View))

    @njit
    def run(a, out):
        held = views.borrowed(a)
        seen = _seen(held[1:3, ::2], views.borrowed(out))
        views.hold(a)
        return seen[0], is_view(held[1:3, ::2]), is_view(held[0]), is_view(a)

    a, out = np.arange(50.0).reshape(5, 10), np.zeros((5, 10))
    assert run(a, out) == (10, True, True, False)
    np.testing.assert_array_equal(out[:2, :5], a[1:3, ::2])


def test_memory_is_carved_without_overlaps(rng):
    """Matrices of several types in one array, each at the start of a line of its own."""
    single = np.zeros(1, np.float32)

    @njit
    def run(memory, shapes, single, out):
        held, at = views.borrowed(memory), 0
        for i in range(shapes.shape[0]):
            m, n = shapes[i]
            if i % 2:
                a, at = views.carved(held, at, m, n, single)
                a[:] = i + 1
            else:
                b, at = views.carved(held, at, m, n, 0.0)
                b[:] = i + 1
            out[i] = at
        views.hold(memory)

    shapes = rng.integers(0, 12, (7, 2))
    memory, out = np.zeros((1, 4096)), np.zeros(7, np.int64)
    run(memory, shapes, single, out)
    start = 0
    for i, (m, n) in enumerate(shapes):
        dtype = np.float32 if i % 2 else np.float64
        size = m * n * np.dtype(dtype).itemsize
        values = memory.view(np.uint8)[0, start : start + size].view(dtype)
        assert (values == i + 1).all()
        assert out[i] == start + -(-size // 64) * 64
        start = out[i]
    assert not memory.view(np.uint8)[0, start:].any()


def test_what_only_the_running_code_knows_decides_nothing():
    """`if x:` and `x == 0` of a value would be true or false whatever it is."""
    asked = {
        "if": lambda x: 1.0 if x else 2.0,
        "==": lambda x: 1.0 if x == 0 else 2.0,
        "!=": lambda x: 1.0 if x != 0 else 2.0,
        "<": lambda x: 1.0 if x < 0 else 2.0,
    }
    for name, function in asked.items():
        question = formula(function)

        @njit
        def run(x, question=question):
            return question(x)

        with pytest.raises((NumbaError, TypeError), match="decides by type"):
            run(1.0)
        assert formulas._writers == [], name
