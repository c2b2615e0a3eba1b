"""What is refused, with what words, and that a refused call has written nothing.

A table of (call, exception, the telling part of its message). Every call gets the same fresh arrays, and after
the error all of them, buffers for results among them, must hold what they held. Arguments are checked before
any kernel runs, so one backend speaks for all; the reference needs no compiling.
"""

import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.exceptions import AxisError
from numpy.lib.stride_tricks import as_strided

import fastbn

SHAPE, CHANNELS = (6, 4, 5), 4


@pytest.fixture
def a():
    """Arguments that are right, a place for each result, and buffers that overlap in wrong ways."""
    rng = np.random.default_rng(11)
    args = SimpleNamespace()
    # One more row than x needs, so that a view may begin one element late.
    args.memory = rng.normal(3, 2, (7, 4, 5)).astype(np.float32)
    args.x, args.late = args.memory[:6], args.memory.reshape(-1)[1:121].reshape(SHAPE)
    args.dy_memory = rng.normal(1, 2, (7, 4, 5)).astype(np.float32)
    args.dy, args.dy_late = args.dy_memory[:6], args.dy_memory.reshape(-1)[1:121].reshape(SHAPE)
    args.gamma, args.beta = rng.normal(1, 0.5, CHANNELS), rng.normal(size=CHANNELS)
    args.mean, args.var = rng.normal(3, 1, CHANNELS), rng.uniform(1, 4, CHANNELS)
    args.out = np.full(SHAPE, 7, np.float32)
    args.dgamma, args.dbeta = np.full(CHANNELS, 7, np.float32), np.full(CHANNELS, 7, np.float32)
    args.read_only = np.full(SHAPE, 7, np.float32)
    args.read_only.flags.writeable = False
    args.few = np.full(SHAPE[1:], 7, np.float32)  # memory of 20 elements, for a view of 120 on it
    args.itself = as_strided(args.few, SHAPE, (0, *args.few.strides))
    with fastbn.set_backend("reference"):
        args.saved = fastbn.forward(args.x, args.gamma, args.beta)[1]
        own = args.x.copy()
        args.without_x = fastbn.forward(own, args.gamma, args.beta, out=own)[1]
        yield args


def case(name, call, error, match):
    return pytest.param(call, error, match, id=name)


# The functions that take x, each with all else right.
TAKE_X = {
    "forward": lambda a, x, **more: fastbn.forward(x, **({"gamma": a.gamma, "beta": a.beta, "out": a.out} | more)),
    "infer": lambda a, x, **more: fastbn.infer(x, a.mean, a.var, **({"gamma": a.gamma, "out": a.out} | more)),
    "moments": lambda _, x, **more: fastbn.moments(x, **more),
}

WRONG_X = {
    # what x becomes, the error, what it says: the type that came, and the advice
    "a list": (lambda x: x.tolist(), TypeError, r"x is a builtins\.list; expected a NumPy array.*np\.asarray"),
    "none": (lambda _: None, TypeError, r"x is a builtins\.NoneType"),
    "a number": (lambda _: 3.0, TypeError, r"x is a builtins\.float"),
    "a NumPy scalar": (lambda _: np.float32(3), TypeError, r"x is a numpy\.float32"),
    "a memoryview": (
        lambda x: memoryview(x.copy()),
        TypeError,
        r"x is a builtins\.memoryview.*np\.asarray.* for lists and buffers",
    ),
    "masked": (lambda x: np.ma.masked_greater(x, 3), TypeError, r"mask would be ignored.*x\.filled"),
    "masked, no mask": (lambda x: np.ma.asarray(x), TypeError, r"x is a masked array"),
    "int64": (lambda x: x.astype(np.int64), TypeError, r"int64 array of shape \(6, 4, 5\).*x\.astype\(np\.float32\)"),
    "int32": (lambda x: x.astype(np.int32), TypeError, r"int32 array.*x\.astype\(np\.float32\)"),
    "bool": (lambda x: x > 3, TypeError, r"bool array.*x\.astype\(np\.float32\)"),
    "complex64": (lambda x: x.astype(np.complex64), TypeError, r"complex64 array.*x\.real and x\.imag"),
    "object": (lambda x: x.astype(object), TypeError, r"object array.*x\.astype\(np\.float64\)"),
    "longdouble": (lambda x: x.astype(np.longdouble), TypeError, r"(long|float)\w+ array.*x\.astype\(np\.float64\)"),
    "text": (lambda x: x.astype(str), TypeError, r"<U\d+ array.*expected float16, bfloat16, float32 or float64"),
    "0-D": (lambda x: x[0, 0, 0, ...], ValueError, r"x has shape \(\); expected at least two axes"),
    "1-D": (lambda x: x[0, 0], ValueError, r"x has shape \(5,\).*x\.reshape\(1, -1\) with axis=0"),
}

WRONG_AXIS = {
    "3": (3, AxisError, r"axis=3 is out of range for x of shape \(6, 4, 5\); expected -3 to 2"),
    "-4": (-4, AxisError, r"axis=-4 is out of range"),
    "one of two": ((1, 5), AxisError, r"axis=\(1, 5\) is out of range"),
    "twice": ((1, 1), ValueError, r"axis=\(1, 1\) names an axis twice"),
    "twice, from both ends": ((1, -2), ValueError, r"axis=\(1, -2\) names an axis twice"),
    "empty": ((), ValueError, r"axis=\(\) names no axis"),
    "a float": (1.0, TypeError, r"axis is float 1\.0; expected an int or a tuple of ints"),
    "none": (None, TypeError, r"axis is NoneType None"),
    "text": ("1", TypeError, r"axis is str '1'"),
    "a float in a tuple": ((1, 2.0), TypeError, r"axis is tuple \(1, 2\.0\)"),
}

WRONG_EPS = {
    "zero": (0, r"eps is int 0; expected a finite number above 0"),
    "negative": (-1e-5, r"eps is float -1e-05"),
    "inf": (np.inf, r"eps is float inf"),
    "nan": (np.nan, r"eps is float nan"),
    "NumPy nan": (np.float32("nan"), r"eps is float32 np\.float32\(nan\)"),
    "text": ("1e-5", r"eps is str '1e-5'"),
    "none": (None, r"eps is NoneType None"),
    "an array": (np.array([1e-5]), r"eps is float64 array of shape \(1,\)"),
    "beyond floats": (10**400, r"eps is int 1000"),
}

# What is wrong for any of gamma, beta, mean and var; {} is its name.
WRONG_NUMBERS = {
    "too many": (np.ones(5), ValueError, r"{} has shape \(5,\); expected \(4,\).*Is axis the channel axis\?"),
    "a scalar": (1.5, ValueError, r"{} has shape \(\); expected \(4,\)"),
    "two axes": (np.ones((1, 4)), ValueError, r"{} has shape \(1, 4\)"),
    "complex": (np.ones(4, complex), TypeError, r"{} is a complex128 array of shape \(4,\); expected real numbers"),
    "bool": (np.ones(4, bool), TypeError, r"{} is a bool array"),
    "text": (["a", "b", "c", "d"], TypeError, r"{} is a <U1 array"),
    "masked": (np.ma.masked_less(np.arange(4.0), 2), TypeError, r"{} is a masked array.*{}\.filled\(value\)"),
    "ragged": ([[1], [1, 2], 3, 4], ValueError, r"{} is"),
}

# Places for y and dx; {} is the name.
WRONG_OUT = {
    "a number": (lambda _: 7.0, TypeError, r"{} is a builtins\.float"),
    "masked": (lambda a: np.ma.asarray(a.out), TypeError, r"{} is a masked array"),
    "too small": (
        lambda a: a.out[:5],
        ValueError,
        r"{} is a float32 array of shape \(5, 4, 5\); .*np\.empty\(\(6, 4, 5\)",
    ),
    "flat": (lambda a: a.out.reshape(-1), ValueError, r"{} is a float32 array of shape \(120,\)"),
    "float64": (lambda a: a.out.astype(np.float64), ValueError, r"{} is a float64 array.*; expected float32"),
    "read-only": (lambda a: a.read_only, ValueError, r"{} is read-only"),
    "on itself": (lambda a: a.itself, ValueError, r"{} of shape .* has strides \(0, 20, 4\).*elements share memory"),
    "one element into x": (lambda a: a.late, ValueError, r"{} overlaps x in memory without being x"),
    "x in another order": (lambda a: a.x[::-1], ValueError, r"{} overlaps x in memory"),
}

# Places for dgamma and dbeta.
WRONG_CHANNEL_OUT = {
    "a list": (lambda _: [7.0] * 4, TypeError, r"builtins\.list; expected a NumPy array"),
    "too long": (
        lambda _: np.zeros(5, np.float32),
        ValueError,
        r"float32 array of shape \(5,\); expected float32 of shape",
    ),
    "one column": (lambda a: a.dgamma[:, None], ValueError, r"shape \(4, 1\); expected float32 of shape \(4,\)"),
    "float64": (lambda _: np.zeros(4), ValueError, r"float64 array.*expected float32"),
    "read-only": (lambda a: a.read_only[0, :, 0], ValueError, r"is read-only"),
    "on itself": (lambda a: as_strided(a.dgamma, (4,), (0,)), ValueError, r"elements share memory"),
    "in x": (lambda a: a.x[0, :, 0], ValueError, r"overlaps x"),
    "in dy": (lambda a: a.dy[0, :, 0], ValueError, r"overlaps dy"),
    "in dx": (lambda a: a.out[0, :, 0], ValueError, r"overlaps"),
}


def cases():
    for name, call in TAKE_X.items():
        where = rf"^fastbn\.{name}: .*"
        for what, (make, error, match) in WRONG_X.items():
            # a result of any kind to write to would be wrong too, but x is looked at first
            yield case(f"{name}, x {what}", lambda a, c=call, m=make: c(a, m(a.x)), error, where + match)
        for what, (axis, error, match) in WRONG_AXIS.items():
            yield case(f"{name}, axis {what}", lambda a, c=call, v=axis: c(a, a.x, axis=v), error, where + match)
    for name in ("forward", "infer"):
        where, call = rf"^fastbn\.{name}: .*", TAKE_X[name]
        for what, (eps, match) in WRONG_EPS.items():
            yield case(f"{name}, eps {what}", lambda a, c=call, v=eps: c(a, a.x, eps=v), ValueError, where + match)
        for what, (value, error, match) in WRONG_NUMBERS.items():
            for which in ("gamma", "beta"):
                yield case(
                    f"{name}, {which} {what}",
                    lambda a, c=call, w=which, v=value: c(a, a.x, **{w: v}),
                    error,
                    where + match.format(which, which),
                )
        for what, (make, error, match) in WRONG_OUT.items():
            yield case(
                f"{name}, out {what}", lambda a, c=call, m=make: c(a, a.x, out=m(a)), error, where + match.format("out")
            )
    for what, (value, error, match) in WRONG_NUMBERS.items():
        for which, pair in {"mean": lambda a, v: (v, a.var), "var": lambda a, v: (a.mean, v)}.items():
            yield case(
                f"forward, frozen {which} {what}",
                lambda a, p=pair, v=value: fastbn.forward(a.x, frozen=p(a, v), out=a.out),
                error,
                r"^fastbn\.forward: " + match.format(which, which),
            )
            yield case(
                f"infer, {which} {what}",
                lambda a, p=pair, v=value: fastbn.infer(a.x, *p(a, v), out=a.out),
                error,
                r"^fastbn\.infer: " + match.format(which, which),
            )
    for what, (make, error, match) in WRONG_OUT.items():
        yield case(
            f"backward, dx {what}",
            lambda a, m=make: fastbn.backward(a.dy, a.saved, out=m(a)),
            error,
            r"^fastbn\.backward: " + match.format(r"out \(dx\)"),
        )
    for what, (make, error, match) in WRONG_CHANNEL_OUT.items():
        for which, place in {
            "dgamma": lambda a, v: (a.out, v, a.dbeta),
            "dbeta": lambda a, v: (a.out, a.dgamma if not np.may_share_memory(a.dgamma, v) else None, v),
        }.items():
            yield case(
                f"backward, {which} {what}",
                lambda a, p=place, m=make: fastbn.backward(a.dy, a.saved, out=p(a, m(a))),
                error,
                rf"^fastbn\.backward: out \({which}\) .*" + match,
            )


FROZEN = r"^fastbn\.forward: frozen is "
OTHERS = [
    case("frozen: one array", lambda a: fastbn.forward(a.x, frozen=a.mean, out=a.out), TypeError,
         FROZEN + r"float64 array of shape \(4,\); expected a pair \(mean, var\)"),
    case("frozen: one array of two rows", lambda a: fastbn.forward(a.x, frozen=np.ones((2, 4)), out=a.out), TypeError,
         FROZEN + r"float64 array of shape \(2, 4\)"),
    case("frozen: three", lambda a: fastbn.forward(a.x, frozen=(a.mean, a.var, a.var), out=a.out), TypeError,
         FROZEN + r"tuple "),
    case("frozen: True", lambda a: fastbn.forward(a.x, frozen=True, out=a.out), TypeError, FROZEN + r"bool True"),
    case("frozen: running of 3 channels", lambda a: fastbn.forward(a.x, frozen=fastbn.RunningStats(3), out=a.out),
         ValueError, r"mean has shape \(3,\); expected \(4,\)"),
    case("frozen: negative variance", lambda a: fastbn.forward(a.x, frozen=(a.mean, [1, 2, -0.5, 3]), out=a.out),
         ValueError, r"^fastbn\.forward: var has a negative value \(-0\.5\); expected 0 or more"),
    case("frozen: negative beside NaN", lambda a: fastbn.forward(a.x, frozen=(a.mean, [np.nan, 2, -0.5, 3]), out=a.out),
         ValueError, r"var has a negative value \(-0\.5\)"),
    case("infer: negative variance", lambda a: fastbn.infer(a.x, a.mean, -a.var, out=a.out),
         ValueError, r"^fastbn\.infer: var has a negative value"),
    case("saved: none", lambda a: fastbn.backward(a.dy, None, out=a.out), TypeError,
         r"saved is NoneType None; expected the second result of fastbn\.forward"),
    case("saved: an array", lambda a: fastbn.backward(a.dy, a.x, out=a.out), TypeError, r"saved is float32 array"),
    case("saved: the pair", lambda a: fastbn.backward(a.dy, (a.out, a.saved)), TypeError, r"saved is tuple"),
    case("dy: a list", lambda a: fastbn.backward(a.dy.tolist(), a.saved, out=a.out), TypeError,
         r"dy is a builtins\.list"),
    case("dy: masked", lambda a: fastbn.backward(np.ma.asarray(a.dy), a.saved, out=a.out), TypeError,
         r"dy is a masked array"),
    case("dy: int", lambda a: fastbn.backward(a.dy.astype(int), a.saved, out=a.out), TypeError, r"dy is a int64 array"),
    case("dy: float64", lambda a: fastbn.backward(a.dy.astype(float), a.saved, out=a.out), ValueError,
         r"dy is a float64 array .*; expected float32 .*dy\.astype\(y\.dtype\)"),
    case("dy: too few rows", lambda a: fastbn.backward(a.dy[:5], a.saved, out=a.out), ValueError,
         r"dy is a float32 array of shape \(5, 4, 5\); expected float32 of shape \(6, 4, 5\), like y\. Is it for"),
    case("dy: one row, which would broadcast", lambda a: fastbn.backward(a.dy[:1], a.saved, out=a.out), ValueError,
         r"shape \(1, 4, 5\); expected float32 of shape \(6, 4, 5\)"),
    case("need: two", lambda a: fastbn.backward(a.dy, a.saved, need=(True, True), out=a.out), TypeError,
         r"need is tuple \(True, True\); expected three bools, for dx, dgamma and dbeta"),
    case("need: a bool", lambda a: fastbn.backward(a.dy, a.saved, need=True, out=a.out), TypeError,
         r"need is bool True"),
    case("need: text", lambda a: fastbn.backward(a.dy, a.saved, need="dx!", out=a.out), TypeError,
         r"need is str 'dx!'"),
    case("out: two of three", lambda a: fastbn.backward(a.dy, a.saved, out=(a.out, a.dgamma)), ValueError,
         r"out has 2 entries; expected three: dx, dgamma and dbeta"),
    case("out: one element into dy", lambda a: fastbn.backward(a.dy, a.saved, out=a.dy_late), ValueError,
         r"out \(dx\) overlaps dy in memory without being dy"),
    case("out: dx right, dgamma wrong", lambda a: fastbn.backward(a.dy, a.saved, out=(a.out, a.dgamma[:3], a.dbeta)),
         ValueError, r"out \(dgamma\) is a float32 array of shape \(3,\)"),
    case("out: dx and dgamma right, dbeta wrong", lambda a: fastbn.backward(
        a.dy, a.saved, out=(a.out, a.dgamma, a.dbeta[:3])), ValueError, r"out \(dbeta\) .* of shape \(3,\)"),
    case("out: one array for dgamma and dbeta", lambda a: fastbn.backward(
        a.dy, a.saved, out=(a.out, a.dgamma, a.dgamma)), ValueError, r"out \(dbeta\) overlaps dgamma in memory"),
    case("x overwritten: all", lambda a: fastbn.backward(a.dy, a.without_x, out=a.out), ValueError,
         r"saved has no x, which `out` overwrote"),
    case("x overwritten: dx", lambda a: fastbn.backward(a.dy, a.without_x, need=(True, False, False), out=a.out),
         ValueError, r"expected x for dgamma, and for dx in training"),
    case("x overwritten: dgamma", lambda a: fastbn.backward(
        a.dy, a.without_x, need=(False, True, True), out=(None, a.dgamma, a.dbeta)), ValueError, r"saved has no x"),
]  # fmt: skip


def snapshot(a):
    return {name: value.tobytes() for name, value in vars(a).items() if isinstance(value, np.ndarray)}


@pytest.mark.parametrize(("call", "error", "match"), [*cases(), *OTHERS])
def test_refused_and_nothing_written(a, call, error, match):
    before = snapshot(a)
    with pytest.raises(error, match=re.compile(match, re.DOTALL)) as caught:
        call(a)
    assert type(caught.value) is error  # not a subclass: AxisError where axis is out of range, and there only
    assert "\n" not in str(caught.value)
    assert snapshot(a) == before


@pytest.mark.parametrize("call", TAKE_X.values(), ids=TAKE_X)
def test_the_arguments_of_the_table_are_right(a, call):
    """Each table changes one thing; without the change there is no error, so it is that which is refused."""
    call(a, a.x)
    dx, dgamma, dbeta = fastbn.backward(a.dy, a.saved, out=(a.out, a.dgamma, a.dbeta))
    assert dx is a.out
    assert dgamma is a.dgamma
    assert dbeta is a.dbeta
    assert (a.out != 7).all()


def test_a_warning_made_an_error_writes_nothing(a):
    """OneValueWarning comes before the work, for those who turn warnings into errors."""
    one, out = a.x[:1, :, :1], np.full((1, 4, 1), 7, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(fastbn.OneValueWarning, match=r"one value per channel \(x of shape \(1, 4, 1\)"):
            fastbn.forward(one, a.gamma, a.beta, out=out)
    assert (out == 7).all()


def test_what_is_left_after_x_was_overwritten(a):
    """`out=x` costs the gradients that need x, and no others: dbeta in training, dx too with frozen statistics."""
    _, _, dbeta = fastbn.backward(a.dy, a.without_x, need=(False, False, True))
    np.testing.assert_allclose(dbeta, a.dy.sum((0, 2), dtype=np.float64), rtol=0, atol=1e-4)
    own = a.x.copy()
    _, saved = fastbn.forward(own, a.gamma, a.beta, frozen=(a.mean, a.var), out=own)
    dx, _, _ = fastbn.backward(a.dy, saved, need=(True, False, True))
    expected = a.dy * (a.gamma / np.sqrt(a.var + 1e-5))[:, None]
    np.testing.assert_allclose(dx, expected, rtol=2e-7, atol=0)  # one multiplication and one rounding


def test_dx_on_x_ends_saved(a):
    """`out` of backward may be x; nothing is left for another backward then, and it says so."""
    expected, _, _ = fastbn.backward(a.dy, a.saved)
    dx, _, _ = fastbn.backward(a.dy, a.saved, out=a.x)
    assert dx is a.x
    np.testing.assert_array_equal(dx, expected)
    with pytest.raises(ValueError, match=r"saved has no x"):
        fastbn.backward(a.dy, a.saved)
