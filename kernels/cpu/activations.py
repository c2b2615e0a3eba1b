"""What is done to lanes beyond batch norm: activations and their slopes, residuals, masks.

`How` says which, as a type: every combination is compiled on its own, and the plain one costs nothing. Its value is the
activation's parameter.

exp, log and erfc are polynomials on reduced arguments, for sixteen lanes at a time. The coefficients are Chebyshev
interpolants computed in 40 digits by `mpmath`; errors are in the tests.
"""

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model, unbox

from .formulas import called, formula, full, intrinsic
from .lanes import DOUBLE, LANES, SINGLE, fma, negative, nothing, where_at_most, where_less, where_nonzero, wide
from .memory import load, load_apart, load_part, save, save_part
from .parts import part


class How(types.Type):  # type: ignore[misc]
    """Which activation, whether x holds y, whether anything beyond batch norm is done at all, and whether results are
    of 16 bits: their own rounding is 2^13 times that of float32 coefficients, or 2^16 times.

    Its value is three numbers: the activation's parameter; 1 where masked positions are normalized like all others, and
    where statistics are constants: what costs nothing beside the rest is no type, as every type is compiled on its own.
    """

    def __init__(self, activation: str, inverse: bool, simple: bool, short: bool = False) -> None:
        self.activation, self.inverse, self.simple, self.short = activation, inverse, simple, short
        super().__init__(name=f"How({activation}, {inverse}, {simple}, {short})")


PLAIN = How("", False, True)
_VALUE = types.UniTuple(types.float64, 4)


@register_model(How)
class _HowModel(models.UniTupleModel):  # type: ignore[misc]
    def __init__(self, manager: Any, _how: How) -> None:
        super().__init__(manager, _VALUE)


@unbox(How)  # type: ignore[untyped-decorator]
def _unbox(_how: Any, value: Any, c: Any) -> Any:
    return c.unbox(_VALUE, value)


def always(how: How) -> Any:
    """A function of no arguments for compiled code: this one, without parameters and masks."""

    @intrinsic
    def constant(_typing: Any) -> Any:
        kind = ir.ArrayType(ir.DoubleType(), 4)
        return how(), lambda _context, _builder, _signature, _args: ir.Constant(kind, [0.0, 1.0, 0.0, 0.0])

    return constant


plain = always(PLAIN)


def _number(i: int) -> Any:
    @intrinsic
    def number(_typing: Any, how: Any) -> Any:
        return types.float64(how), lambda _context, builder, _signature, args: builder.extract_value(args[0], i)

    return number


# The activation's parameter; 1 or 0: masked positions are normalized, or else keep x; statistics are constants.
parameter, all_normalized, kept, is_frozen = _number(0), _number(1), _number(2), _number(3)


@intrinsic
def onwards(_typing: Any, how: Any) -> Any:
    """The same where x holds x itself."""
    return How(how.activation, False, False, how.short)(how), lambda _context, _builder, _signature, args: args[0]


@intrinsic
def alike(_typing: Any, lanes: Any, like: Any) -> Any:
    """The same numbers in the lanes' type of `like`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if lanes == like:
            return args[0]
        if like == DOUBLE:
            return builder.fpext(args[0], ir.VectorType(ir.DoubleType(), LANES))
        return builder.fptrunc(args[0], ir.VectorType(ir.FloatType(), LANES))

    return like(lanes, like), codegen


def _format(lanes: Any) -> tuple[Any, Any, int, int]:
    """Vector of numbers, vector of their bits, bits of the fraction, bias of the exponent."""
    if lanes == SINGLE:
        return ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES), 23, 127
    return ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(ir.IntType(64), LANES), 52, 1023


@intrinsic
def scaled(_typing: Any, lanes: Any, power: Any) -> Any:
    """lanes 2^power, for whole powers within the exponent's range."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind, bits, fraction, bias = _format(lanes)
        whole = builder.fptosi(args[1], _WHOLE)  # to 64 bits there is no conversion before AVX-512
        whole = builder.add(whole, ir.Constant(_WHOLE, [bias] * LANES))
        whole = whole if bits == _WHOLE else builder.zext(whole, bits)
        two = builder.bitcast(builder.shl(whole, ir.Constant(bits, [fraction] * LANES)), kind)
        return builder.fmul(args[0], two)

    return lanes(lanes, lanes), codegen


@intrinsic
def truncated(_typing: Any, lanes: Any) -> Any:
    """Without what is behind the point, for numbers below 2^31."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.sitofp(builder.fptosi(args[0], _WHOLE), args[0].type)

    return lanes(lanes), codegen


@intrinsic
def exponent(_typing: Any, lanes: Any) -> Any:
    """The whole number e with 2^e <= lanes < 2^(e + 1), for normal numbers above 0."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind, bits, fraction, bias = _format(lanes)
        raw = builder.lshr(builder.bitcast(args[0], bits), ir.Constant(bits, [fraction] * LANES))
        raw = raw if bits == _WHOLE else builder.trunc(raw, _WHOLE)
        return builder.sitofp(builder.sub(raw, ir.Constant(_WHOLE, [bias] * LANES)), kind)

    return lanes(lanes), codegen


_WHOLE = ir.VectorType(ir.IntType(32), LANES)


# Polynomials: highest power first.


def _polynomial(x, name):  # type: ignore[no-untyped-def]
    """By Horner's rule, with the coefficients for the type of x."""
    first, *others = _COEFFICIENTS[name, x.kind == SINGLE]
    value = full(x, first)
    for c in others:
        value = fma(value, x, full(x, c))
    return value


# exp(r) for |r| <= ln 2 / 2; log m = s P(s^2), s = (m - 1) / (m + 1), m from 1 / sqrt 2 to sqrt 2;
# erfc(x) = exp(-x^2) P(t) / (1 + 2 x), t = (x - 3) / (x + 3), x from 0 to 10 (float32) or 28.
_COEFFICIENTS: dict[tuple[str, bool], tuple[float, ...]] = {
    ("exp", True): (
        0.00139411085,
        0.00837512594,
        0.0416663513,
        0.166664153,
        0.5,
        1,
        1,
    ),
    ("exp", False): (
        2.0921579964950299e-09,
        2.5114869528657765e-08,
        2.7557251904174915e-07,
        2.7557224958392624e-06,
        2.4801587350110797e-05,
        0.000198412699092171,
        0.0013888888888871889,
        0.0083333333333095276,
        0.041666666666666692,
        0.16666666666666702,
        0.5,
        1,
        1,
    ),
    ("log", True): (
        0.236163586,
        0.285350502,
        0.40000385,
        0.666666627,
        2,
    ),
    ("log", False): (
        0.12043118385439859,
        0.11667379243291706,
        0.13336746217544351,
        0.15384543439179688,
        0.18181819117998452,
        0.22222222214817811,
        0.28571428571462171,
        0.39999999999999925,
        0.66666666666666663,
        2,
    ),
    ("erfc", True): (
        -0.000164071549,
        0.0022360275,
        0.00222593313,
        -0.0240183827,
        0.0683549419,
        -0.1192213,
        0.129642785,
        -0.0475658737,
        -0.135621071,
        1.25300813,
    ),
    ("erfc", False): (
        6.8100187697670204e-10,
        2.3552000078386435e-08,
        6.0622117377351894e-08,
        -1.2682983287177219e-07,
        -5.5933784781753561e-07,
        3.5560443974134763e-07,
        3.4264997190127335e-06,
        -7.3775931831865207e-07,
        -2.0077652703152137e-05,
        4.9543998351052039e-06,
        0.00012509204114843491,
        -0.00010516160868371944,
        -0.0007798307921069393,
        0.0018886907272464507,
        0.0025293916335189441,
        -0.023770514959693387,
        0.06830802735655056,
        -0.1192736634130472,
        0.12964515870235635,
        -0.047562294353498159,
        -0.13562110612457726,
        1.2530080582697298,
    ),
}


# Of exp: the smallest and the largest argument; ln 2 as a float of few bits, and the rest; of erfc the largest.
_LIMITS = {
    True: (-87.0, 88.5, 0.693359375, -2.12194440e-4, 10.0),
    False: (-708.0, 709.5, 0.6931471803691238, 1.9082149292705877e-10, 28.0),
}


def lanes_exp(x):  # type: ignore[no-untyped-def]
    low, high, ln2, rest, _ = _LIMITS[x.kind == SINGLE]
    least, most, zero, half = full(x, low), full(x, high), full(x, 0.0), full(x, 0.5)
    bounded = where_at_most(x, most, where_less(x, least, least, x), most)  # NaN to `most`: it can't be made whole
    n = truncated(fma(bounded, full(x, 1.4426950408889634), where_less(x, zero, zero - half, half)))
    r = fma(zero - n, full(x, rest), fma(zero - n, full(x, ln2), x))
    value = scaled(_polynomial(r, "exp"), n - 1.0) * 2.0  # 2^1024 is infinite
    return where_less(most, x, full(x, math.inf), where_less(x, least, zero, value))


def lanes_log(x):  # type: ignore[no-untyped-def]
    """For normal numbers above 0."""
    one, zero = full(x, 1.0), full(x, 0.0)
    e = exponent(x)
    m = scaled(x, zero - e)
    big = where_less(full(x, 1.4142135623730951), m, one, zero)
    m, e = where_nonzero(big, m * 0.5, m), e + big
    s = (m - 1.0) / (m + 1.0)
    return fma(s, _polynomial(s * s, "log"), e * 0.6931471805599453)


def _tail(z):  # type: ignore[no-untyped-def]
    """Half of erfc(|z| / sqrt 2): the normal distribution beyond |z|."""
    zero, top = full(z, 0.0), full(z, _LIMITS[z.kind == SINGLE][4])
    x = where_less(z, zero, zero - z, z) * 0.7071067811865476
    x = where_less(top, x, top, x)
    p = _polynomial((x - 3.0) / (x + 3.0), "erfc")
    return 0.5 * lanes_exp(zero - x * x) * p / fma(x, full(z, 2.0), full(z, 1.0))


def _normal(z):  # type: ignore[no-untyped-def]
    tail = _tail(z)
    return where_less(z, full(z, 0.0), tail, 1.0 - tail)


def _sigmoid(z):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + lanes_exp(0.0 - z))


def _tanh(z):  # type: ignore[no-untyped-def]
    return 1.0 - 2.0 / (1.0 + lanes_exp(z + z))


def _clip(z):  # type: ignore[no-untyped-def]
    """To 0 to 6; NaN stays."""
    zero, six = full(z, 0.0), full(z, 6.0)
    return where_less(six, z, six, where_less(z, zero, zero, z))


def _beyond(z, above, below):  # type: ignore[no-untyped-def]
    """One or the other, as z is above 0 or not."""
    return where_at_most(z, full(z, 0.0), full(z, below), full(z, above))


# f(z), f'(z) and f^-1(y), with the activation's parameter a.


def _silu_slope(z, a):  # type: ignore[no-untyped-def]
    s = _sigmoid(z)
    return fma(z * s, _sigmoid(0.0 - z), s)  # 1 - s would lose digits that z brings forward


def _gelu_slope(z, a):  # type: ignore[no-untyped-def]
    return fma(z, 0.3989422804014327 * lanes_exp(-0.5 * z * z), _normal(z))


def _sigmoid_slope(z, a):  # type: ignore[no-untyped-def]
    s = _sigmoid(z)
    return s * (1.0 - s)


def _tanh_slope(z, a):  # type: ignore[no-untyped-def]
    t = _tanh(z)
    return 1.0 - t * t


def _hardswish_slope(z, a):  # type: ignore[no-untyped-def]
    between = fma(z, full(z, 1.0 / 3.0), full(z, 0.5))
    return where_at_most(z, full(z, -3.0), full(z, 0.0), where_less(z, full(z, 3.0), between, full(z, 1.0)))


def _relu6_slope(z, a):  # type: ignore[no-untyped-def]
    return where_at_most(full(z, 6.0), z, full(z, 0.0), _beyond(z, 1.0, 0.0))


def _elu_inverse(z, a):  # type: ignore[no-untyped-def]
    zero = full(z, 0.0)
    u = where_at_most(z, zero, z / a, zero)
    w, least = 1.0 + u, full(z, 1e-30)
    left = where_less(w, least, least, w)  # y was rounded to its limit: z is low enough by this
    lost = w - 1.0  # log(1 + u) is log(w) u / (w - 1), where 1 + u was rounded to w
    return where_at_most(z, zero, where_nonzero(lost, lanes_log(left) * (u / lost), u), z)


_FUNCTIONS = {
    "": (lambda z, a: z, lambda z, a: z, lambda z, a: z),
    "relu": (
        lambda z, a: _beyond(z, z, 0.0),
        lambda z, a: _beyond(z, 1.0, 0.0),
        None,
    ),
    "leaky_relu": (
        lambda z, a: _beyond(z, z, z * a),
        lambda z, a: _beyond(z, 1.0, a),
        lambda z, a: _beyond(z, z, z * (1.0 / a)),
    ),
    "relu6": (lambda z, a: _clip(z), _relu6_slope, None),
    "elu": (
        lambda z, a: _beyond(z, z, a * (lanes_exp(z) - 1.0)),
        lambda z, a: _beyond(z, 1.0, a * lanes_exp(z)),
        _elu_inverse,
    ),
    "silu": (lambda z, a: z * _sigmoid(z), _silu_slope, None),
    "gelu": (lambda z, a: z * _normal(z), _gelu_slope, None),
    "sigmoid": (lambda z, a: _sigmoid(z), _sigmoid_slope, None),
    "tanh": (lambda z, a: _tanh(z), _tanh_slope, None),
    "hardswish": (lambda z, a: z * (_clip(z + 3.0) * (1.0 / 6.0)), _hardswish_slope, None),
}


@formula
def bend(how, z):  # type: ignore[no-untyped-def]
    """f(z)."""
    return _FUNCTIONS[how.activation][0](z, parameter(how))


@formula
def slope(how, z):  # type: ignore[no-untyped-def]
    """f'(z)."""
    return _FUNCTIONS[how.activation][1](z, parameter(how))


@formula
def straighten(how, z):  # type: ignore[no-untyped-def]
    """f^-1(z)."""
    return _FUNCTIONS[how.activation][2](z, parameter(how))


# What the schedules call. What isn't there is None: residuals, weights, a place for their gradients.


@formula
def loaded(p, i, like):  # type: ignore[no-untyped-def]
    """As `load`."""
    return None if p is None else load(p, i, like)


@formula
def loaded_part(p, i, n, like):  # type: ignore[no-untyped-def]
    return None if p is None else load_part(p, i, n, nothing(like))


@formula
def put(p, i, lanes):  # type: ignore[no-untyped-def]
    """As `save`."""
    if p is not None:
        save(p, i, lanes)


@formula
def put_part(p, i, n, lanes):  # type: ignore[no-untyped-def]
    if p is not None:
        save_part(p, i, n, lanes)


@formula
def finished(how, z, v, r, w):  # type: ignore[no-untyped-def]
    """Lanes of y, for lanes z of gamma xhat + beta (float64), v of x, r of the residual and w of weights."""
    y = bend(how, alike(z if r is None else z + wide(r), v))
    return y if w is None else _unless_masked(how, v, y, w)


@formula
def _unless_masked(how, instead, result, w):  # type: ignore[no-untyped-def]
    """y or dx, but what is wanted at masked positions: 0, or where they are kept, x or dy."""
    instead = where_nonzero(full(result, kept(how)), instead, nothing(result))
    return where_nonzero(full(result, all_normalized(how)), result, where_nonzero(w, result, instead))


# Activations of two straight lines. Without a residual, which of them x is on is one comparison: z grows or falls with
# x, in steps, so there is an `edge`. Computing z in float64 took backward 2.1 times as long.
_LINES = "relu", "leaky_relu"
CURVES = "elu", "silu", "gelu", "sigmoid", "tanh"  # a vector of these takes longer than its memory


@formula
def fast_numbers(how, r, w, singles):  # type: ignore[no-untyped-def]
    """Coefficients by which a map may compute in the elements' type; None where z must be float64.

    It must where an activation's kink is sought by backward in another way, and where z isn't the end of the sum.
    """
    edge = has_edge(how, r) and w is None and singles.dtype == types.float32
    return singles if how.simple or edge else None


# Of a `Value` how or the type itself, and of r what it is or its type.


def _is_none(value: Any) -> bool:
    return value is None or isinstance(value, types.NoneType)


def keeps(how: Any, r: Any) -> bool:
    """Whether x is had back from y, and r is no residual: it holds x of the channels that can't be had back."""
    return not _is_none(how) and how.inverse and not _is_none(r)


def looks(how: Any, r: Any) -> bool:
    """Whether `bent` looks at z at all."""
    return bool(how.activation) and (not how.inverse or keeps(how, r))


def has_edge(how: Any, r: Any) -> bool:
    """Whether the lens that `bent` takes is an edge: s and t in the places of h and a."""
    return looks(how, r) and how.activation in _LINES and (_is_none(r) or how.inverse)


def needs_z(how: Any, r: Any) -> bool:
    """Whether `bent` computes z, for its slope."""
    return looks(how, r) and not has_edge(how, r)


@formula
def residual_of(how, r):  # type: ignore[no-untyped-def]
    """r, if it is a residual."""
    return None if keeps(how, r) else r


@formula
def bent(how, g, v, h, a, b, r):  # type: ignore[no-untyped-def]
    """dy f'(z) and x, for lanes g of dy, v of x (or of y) and r of the residual; z = a (x - h) + b + r in float64.

    Of y, r may be what `kept` takes.
    """
    if keeps(how, r):
        return called(_had_back_or_kept, how, g, v, h, a, b, *r)
    if not how.activation:
        return g, v
    if how.inverse:
        z = straighten(how, v)
        if how.activation in _LINES:  # y has z's sign: one comparison serves both
            return where_at_most(v, nothing(v), g * slope(how, nothing(g)), g), z
        return g * alike(slope(how, z), g), z
    if has_edge(how, r):
        # Above its kink the slope is 1. A product there too, with one of two slopes, was an instruction more.
        return where_at_most(v * alike(h, v), alike(a, v), g * slope(how, nothing(g)), g), v
    z = fma(wide(v) - h, a, b)
    return g * alike(slope(how, alike(z if r is None else z + wide(r), v)), g), v


@part()
def _had_back_or_kept(how, g, v, h, a, b, place, i, n, flags):  # type: ignore[no-untyped-def]
    """`bent` of y, and of x where a flag is not 0: these stand at `place[i]`, one behind the other. None if i < 0."""
    bowed, x = bent(how, g, v, h, a, b, None)
    if i >= 0:
        own = load_apart(place, i, n, flags, v)
        instead, _ = bent(onwards(how), g, own, h, a, b, None)
        bowed, x = where_nonzero(flags, instead, bowed), where_nonzero(flags, own, x)
    return bowed, x


@formula
def counted(how, lanes, w):  # type: ignore[no-untyped-def]
    """0 at masked positions, unless they are normalized like all others."""
    if w is None:
        return lanes
    return where_nonzero(full(lanes, all_normalized(how)), lanes, where_nonzero(w, lanes, nothing(lanes)))


@formula
def trained(how, v, hi):  # type: ignore[no-untyped-def]
    """x, or its mean where statistics are constants: it may be NaN, and dx has nothing of it."""
    return v if how.simple else where_nonzero(full(v, is_frozen(how)), hi, v)


@formula
def line(how, raw, bowed, v, p, w):  # type: ignore[no-untyped-def]
    """dx = a g + (b d + c), its second term by weight, for lanes of dy, of dy f'(z) and of x; p: the numbers."""
    if w is None:
        return (_line_in_singles if len(p) == 7 else _line_in_doubles)(how, bowed, v, p)
    dx = (_line_by_weight if len(p) == 7 else _line_by_weight_in_doubles)(how, bowed, v, p, w)
    return _unless_masked(how, alike(raw, dx), dx, w)


def _line_in_doubles(how, g, v, p):  # type: ignore[no-untyped-def]
    ghi, hi, a, b, c = p
    return fma(alike(g, ghi) - ghi, a, fma(trained(how, alike(v, hi), hi) - hi, b, c))


def _line_by_weight_in_doubles(how, g, v, p, w):  # type: ignore[no-untyped-def]
    _, hi, a, b, c = p
    g, d = alike(g, hi), trained(how, alike(v, hi), hi) - hi
    return fma(g, a, where_nonzero(w, alike(w, g) * fma(d, b, c), nothing(g)))


def _line_in_singles(how, bowed, v, p):  # type: ignore[no-untyped-def]
    # Where the terms cancel, the rounding of g, d and b d is all that is left: 7 eps if dy follows x. It is added.
    ghi, hi, a, b, c, al, bl = p
    v = trained(how, v, hi)
    g, d = bowed - ghi, v - hi
    more_g, more_d = (bowed - g) - ghi, (v - d) - hi
    second = d * b
    lost = fma(d, b, negative(second)) + fma(more_d, b, fma(more_g, a, fma(g, al, fma(d, bl, c))))
    return fma(g, a, second) + lost


def _line_by_weight(how, g, v, p, w):  # type: ignore[no-untyped-def]
    # Of c, which has the mean of dy here, the first number has what rounding takes away.
    more_c, hi, a, b, c, al, bl = p
    v = trained(how, v, hi)
    d = v - hi
    more_d = (v - d) - hi
    line = fma(d, b, c)
    second = w * line
    lost = fma(d, b, c - line) + fma(d, bl, fma(more_d, b, more_c))
    lost = fma(w, lost, fma(w, line, negative(second)))
    return fma(g, a, where_nonzero(w, second, nothing(g))) + fma(g, al, where_nonzero(w, lost, nothing(g)))


def in_singles(how: Any, r: Any, singles: Any) -> bool:
    """Whether backward's map of float32 data is computed in float32, by seven numbers: where f' needs no z."""
    return not how.short and not needs_z(how, r) and bool(singles.dtype == types.float32)


@formula
def used_of(how, r, x, doubles, singles):  # type: ignore[no-untyped-def]
    """The coefficients of backward's map: float32 ones (8, G) where it may be computed by them, else float64 ones.

    Half types always take float32, by the first five of them.
    """
    return singles if isinstance(x.dtype, types.Integer) or in_singles(how, r, singles) else doubles


@formula
def read_as(how, r, narrow, used):  # type: ignore[no-untyped-def]
    """Lanes as which backward's map reads: its own (`used`) where f' is computed, else those that x comes in."""
    return used if needs_z(how, r) else narrow


@formula
def is_plain(how):  # type: ignore[no-untyped-def]
    """Whether nothing beyond batch norm is done, as a constant."""
    return how.simple


@formula
def is_kept(how, r):  # type: ignore[no-untyped-def]
    """`keeps`, as a constant."""
    return keeps(how, r)


@formula
def absent(value):  # type: ignore[no-untyped-def]
    """Whether it is None, as a constant."""
    return value is None
