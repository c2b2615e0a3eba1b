"""`kernels/cuda/bn.cu` itself, run on the CPU by `tests/cuda/emulator.h`, against the formulas in extended precision.

Every launch is checked for bounds and alignment of each access, writes outside the elements, deadlocks and barriers
that don't match; shared memory and workspaces start as NaN. `tests/test_mutations.py` shows that the checks find bugs.
"""

import ctypes
import itertools
import mmap

import numpy as np
import pytest
from emulator import Array, Truth, epsilon, error_in_eps, execute, library, number_epsilon, planner, view_of

BLOCK, CLUSTER, GRID, SPLIT = planner.BLOCK, planner.CLUSTER, planner.GRID, planner.SPLIT
RUNS, WINDOWS, COLUMNS = planner.RUNS, planner.WINDOWS, planner.COLUMNS

# (way, ranks): 5 and 3 leave ragged ranks, 8 leaves empty ones
WAYS = [(BLOCK, 1), (CLUSTER, 8), (GRID, 5), (SPLIT, 3)]
SCHEDULES = (0, 1, 2, 3)  # in order, in reverse, at random, block after block

NO_GAPS = ((0, 0), (0, 0), (0, 0))
CASES = {  # name: shape, order of axes in memory, gaps, offset; float32's layout and width; types; the reason
    "runs": ((4, 6, 64), "OCI", NO_GAPS, 0, (RUNS, 4), "fdeE", "whole vectors"),
    "long runs": ((2, 3, 1096), "OCI", NO_GAPS, 0, (RUNS, 4), "fdeE", "several batches a thread, the last one ragged"),
    "channel slice": ((3, 4, 64), "OCI", ((0, 0), (1, 2), (0, 0)), 0, (RUNS, 4), "fde", "rows with gaps"),
    "cropped": ((3, 4, 72), "OCI", ((0, 0), (0, 0), (8, 16)), 0, (RUNS, 4), "fde", "channels with gaps"),
    "(C, N)": ((600, 5, 1), "CIO", NO_GAPS, 0, (RUNS, 4), "fdeE", "one run a channel"),
    "channels first of all": ((4, 5, 96), "COI", NO_GAPS, 0, (RUNS, 4), "fde", "rows of a channel merge to one"),
    "pairs": ((4, 3, 66), "OCI", ((0, 0), (0, 0), (0, 2)), 2, (WINDOWS, 4), "f", "start in the middle of a vector"),
    "odd runs": ((3, 5, 131), "OCI", NO_GAPS, 0, (WINDOWS, 4), "fdeE", "every run starts elsewhere in its vector"),
    "27x27": ((2, 3, 729), "OCI", NO_GAPS, 0, (WINDOWS, 4), "fde", "of ResNet-like nets"),
    "odd slice": ((3, 4, 75), "OCI", ((0, 1), (1, 3), (0, 0)), 3, (WINDOWS, 4), "fde", "the same with gaps"),
    "misaligned": ((3, 4, 64), "OCI", NO_GAPS, 1, (WINDOWS, 4), "fdeE", "whole runs one element off"),
    "short odd": ((7, 3, 70), "OCI", ((0, 0), (0, 0), (0, 1)), 0, (WINDOWS, 4), "fde", "the last window may be empty"),
    "columns": ((300, 24, 1), "OIC", NO_GAPS, 0, (COLUMNS, 4), "fdeE", "channels last, a tile wider than the rows"),
    "tiles": ((29, 72, 1), "OIC", NO_GAPS, 0, (COLUMNS, 4), "fdeE", "several tiles, the last one ragged"),
    "columns slice": ((45, 40, 1), "OIC", ((0, 0), (0, 0), (8, 16)), 0, (COLUMNS, 4), "fde", "rows with gaps"),
    "RGB": ((64, 3, 1), "OIC", NO_GAPS, 0, (COLUMNS, 4), "fdeE", "rows too short for a vector: folded"),
    "folded": ((48, 10, 1), "OIC", NO_GAPS, 0, (COLUMNS, 4), "fde", "two rows (of half types four) seen as one"),
    "odd columns": ((33, 13, 1), "OIC", NO_GAPS, 0, (COLUMNS, 1), "fde", "nothing to fold: element by element"),
    "pair columns": ((33, 14, 1), "OIC", NO_GAPS, 0, (COLUMNS, 2), "fd", "eight bytes at once"),
    "7x7": ((16, 8, 49), "OCI", NO_GAPS, 0, (COLUMNS, 4), "fdeE", "runs too short to be walked one by one"),
    "2x2": ((9, 12, 4), "OCI", NO_GAPS, 0, (COLUMNS, 4), "fde", "four columns a channel"),
    "1 run": ((1, 8, 16), "OCI", NO_GAPS, 0, (COLUMNS, 4), "fde", "one row of columns"),
    "one channel": ((9, 1, 121), "OCI", NO_GAPS, 0, (WINDOWS, 4), "fde", "C = 1"),
    "two values": ((2, 8, 1), "OIC", NO_GAPS, 0, (COLUMNS, 4), "fde", "the fewest that have a variance"),
}


@pytest.fixture(scope="module")
def lib():
    return library()


class Problem:
    """Random arrays of a case, with channels of different mean and spread, and what is right for them."""

    def __init__(self, rng, shape, letter, order="OCI", gaps=NO_GAPS, offset=0, mean=2.0, eps=1e-5, values=None):
        C = shape[1]
        spread, middle = rng.uniform(0.5, 2, (1, C, 1)), mean * rng.standard_normal((1, C, 1))
        values = middle + spread * rng.standard_normal(shape) if values is None else values
        self.how = (letter, order, gaps, offset)
        self.x = Array(values, *self.how)
        self.dy = Array(rng.standard_normal(shape) + rng.standard_normal((1, C, 1)), *self.how)
        self.letter, self.shape, self.eps = letter, shape, eps
        self.gamma = (rng.uniform(0.5, 1.5, C) * rng.choice([-1, 1], C)).astype(np.float32)
        self.beta = rng.standard_normal(C).astype(np.float32)
        self.truth = Truth(self.x.values, eps, self.gamma, self.beta)

    def empty(self):
        return Array(np.full(self.shape, -77.0), *self.how)

    def plan(self, backward, way, K, threads=64, **how):
        walk = planner.walk(view_of(self.x, self.x, self.dy if backward else None))
        return planner.build(walk, self.letter, backward, planner.HOPPER, way, K, threads=threads, **how)

    def forward(self, lib, plan, **how):
        how.setdefault("given", (self.gamma, self.beta, None, None))
        return execute(lib, plan, self.x, None, how.pop("y", self.empty()), eps=self.eps, **how)

    def backward(self, lib, plan, **how):
        table = self.truth.saved(self.letter)
        return execute(lib, plan, self.x, self.dy, how.pop("dx", self.empty()), table=table, **how)


# A result is relative to what is added up in it. float32: each of a, x - hi, - lo and the sum rounds by half an eps,
# and the variance's own error adds half of it: 4 eps are promised. float64's invstd is rounded in its own arithmetic:
# half of a sum's half eps, a root's and a quotient's are 1.25 more. A half type rounds once, by half an eps, and
# float32's eps are 2^-13 of float16's: 0.51.
Y_TOLERANCE = {"f": 4, "d": 5.25, "e": 0.51, "E": 0.51}
# Backward has three sums more, and the mean of dy is off by an eps of what dy varies by.
DX_TOLERANCE = {"f": 6, "d": 6, "e": 0.51, "E": 0.51}
# Statistics and dgamma, dbeta are sums of float32's (float64's) partial sums, whatever the elements: a
# few eps.
SUM_TOLERANCE = 4


def check_forward(problem, result, truth=None, tolerance=SUM_TOLERANCE):
    truth = truth or problem.truth
    assert result.error == ""
    if result.y is not None:
        scale = np.maximum(1, abs(truth.a * truth.e) + abs(truth.beta))
        assert error_in_eps(result.y, truth.y(), scale, epsilon(problem.letter)) <= Y_TOLERANCE[problem.letter]
    var, invstd, gamma, beta = (a[0, :, 0] for a in (truth.var, truth.invstd, truth.gamma, truth.beta))
    eps = number_epsilon(problem.letter)
    assert error_in_eps(truth.mean_error(result.table), np.zeros_like(var), np.sqrt(var), eps) <= tolerance
    assert error_in_eps(result.table[2], var, var, eps) <= tolerance
    assert error_in_eps(result.table[3], invstd, invstd, eps) <= tolerance
    assert (result.table[4] == gamma).all()
    assert (result.table[5] == beta).all()


def check_backward(problem, result, truth=None):
    truth = truth or problem.truth
    assert result.error == ""
    (dx, dgamma, dbeta), (dx_scale, dgamma_scale, dbeta_scale) = truth.gradients(problem.dy.values)
    eps = number_epsilon(problem.letter)
    if result.y is not None:
        dx_scale = dx_scale + abs(truth.a) * np.std(problem.dy.values, (0, 2), keepdims=True)
        assert error_in_eps(result.y, dx, dx_scale, epsilon(problem.letter)) <= DX_TOLERANCE[problem.letter]
    if result.dgamma is not None:
        assert error_in_eps(result.dgamma, dgamma, dgamma_scale, eps) <= SUM_TOLERANCE
    if result.dbeta is not None:
        assert error_in_eps(result.dbeta, dbeta, dbeta_scale, eps) <= SUM_TOLERANCE


@pytest.mark.parametrize(
    ("name", "letter"), [(name, letter) for name, case in CASES.items() for letter in case[5]], ids=lambda v: v
)
def test_every_way(lib, rng, name, letter):
    """Each case on every way, kept whole and but for one vector, on four schedules: right, and the same bits."""
    shape, order, gaps, offset, expected, _, _ = CASES[name]
    problem = Problem(rng, shape, letter, order, gaps, offset)
    for (way, K), backward in itertools.product(WAYS, (False, True)):
        plan = problem.plan(backward, way, K)
        assert letter != "f" or (plan.walk.layout, plan.walk.V) == expected
        run, check = (problem.backward, check_backward) if backward else (problem.forward, check_forward)
        bits = set()
        for policy in SCHEDULES if letter == "f" else (0, 3):  # the schedule doesn't depend on the type
            keep = None if policy % 2 or way == SPLIT else 1
            result = run(lib, problem.plan(backward, way, K, keep=keep), policy=policy, resident=policy + 1)
            if policy == 0:
                check(problem, result)
            assert result.error == ""
            bits.add(result.bits)
        assert len(bits) == 1, (way, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["long runs", "27x27", "tiles", "7x7", "RGB"])
def test_ways_agree_to_the_bit(lib, rng, name, backward):
    """CLUSTER, GRID and SPLIT at equal ranks, threads and tile; a plan's own split path, too."""
    shape, order, gaps, offset, *_ = CASES[name]
    for letter in "fd":
        problem = Problem(rng, shape, letter, order, gaps, offset)
        run = problem.backward if backward else problem.forward
        for K in (2, 7):
            plans = [problem.plan(backward, way, K, threads=96) for way in (CLUSTER, GRID, SPLIT)]
            plans.append(plans[1].split())
            assert len({run(lib, plan, policy=2).bits for plan in plans}) == 1


def test_grid_meets_again_without_a_reset(lib, rng):
    """Several rounds of groups in a launch, and launches on the words that the last one left."""
    problem = Problem(rng, (5, 7, 200), "f")
    plan = problem.plan(False, GRID, 4)
    few = planner.Device(sms=2)  # 8 blocks at once: 2 groups of 4 ranks, 4 rounds
    plan = planner.build(plan.walk, "f", False, few, GRID, 4, threads=64)
    assert plan.grid == 8
    words = np.zeros(plan.barriers, np.uint32)
    expected = problem.forward(lib, problem.plan(False, SPLIT, 4)).bits
    for policy in range(10):
        result = problem.forward(lib, plan, policy=policy, barriers=words, rounds=1 + policy % 2)
        assert result.error == ""
        assert result.bits == expected
        assert set(words & 0x7FFFFFFF) == {0}


@pytest.mark.parametrize("name", ["runs", "odd runs", "columns"])
def test_statistics_alone_and_gradients_alone(lib, rng, name):
    shape, order, gaps, offset, *_ = CASES[name]
    problem = Problem(rng, shape, "f", order, gaps, offset)
    for way, K in WAYS:
        whole = problem.forward(lib, problem.plan(False, way, K))
        walk = planner.walk(view_of(problem.x, None, None))
        plan = planner.build(walk, "f", False, planner.HOPPER, way, K, threads=64)
        assert plan.slots <= planner.ahead("f", walk.V, False)
        assert plan.reread == 0
        alone = problem.forward(lib, plan, y=None)
        check_forward(problem, alone)
        assert alone.table.tobytes() == whole.table.tobytes()
        whole = problem.backward(lib, problem.plan(True, way, K))
        walk = planner.walk(view_of(problem.x, None, problem.dy))
        plan = planner.build(walk, "f", True, planner.HOPPER, way, K, threads=64)
        for grads in ((True, False), (False, True), (True, True)):
            alone = problem.backward(lib, plan, dx=None, grads=grads)
            check_backward(problem, alone)
            assert [a is not None for a in (alone.dgamma, alone.dbeta)] == list(grads)


@pytest.mark.parametrize("number", [np.float32, np.float64])
@pytest.mark.parametrize("letter", list("fdeE"))
@pytest.mark.parametrize("name", ["runs", "odd runs", "columns", "7x7"])
def test_frozen(lib, rng, name, letter, number):
    """Given statistics: the data's own don't count; backward is a dy, x isn't read for dx."""
    shape, order, gaps, offset, *_ = CASES[name]
    problem = Problem(rng, shape, letter, order, gaps, offset)
    C = shape[1]
    gamma, beta, mean, var = (rng.standard_normal(C).astype(number) for _ in range(4))
    truth = Truth(problem.x.values, problem.eps, gamma, beta, given=(mean, abs(var)))
    view = view_of(problem.x, problem.x, None)
    plan = planner.plan(view, letter, False, frozen=True)
    assert plan.way == planner.MAP
    result = problem.forward(lib, plan, given=(gamma, beta, mean, abs(var)), policy=2)
    check_forward(problem, result, truth)
    assert (result.table[0] == mean).all()
    assert (result.table[1] == 0).all()
    assert (result.table[2] == abs(var)).all()

    table = truth.saved(letter)
    problem.x.view[0, 0, 0] = np.inf  # finite dx all the same
    plan = planner.plan(view_of(None, problem.x, problem.dy), letter, True, frozen=True)
    result = execute(lib, plan, None, problem.dy, problem.empty(), table=table, grads=(False, False), policy=2)
    check_backward(problem, result, truth)
    problem.x.view[0, 0, 0] = truth.x[0, 0, 0]
    for way, K in WAYS:
        plan = problem.plan(True, way, K, frozen=True)
        result = execute(lib, plan, problem.x, problem.dy, problem.empty(), table=table, policy=2)
        check_backward(problem, result, truth)


def test_gamma_and_beta_may_be_absent(lib, rng):
    problem = Problem(rng, (4, 6, 64), "f")
    for number, present in itertools.product((np.float32, np.float64), [(0, 0), (0, 1), (1, 0), (1, 1)]):
        gamma = problem.gamma.astype(number) if present[0] else None
        beta = problem.beta.astype(number) if present[1] else None
        ones, zeros = np.ones(6), np.zeros(6)
        truth = Truth(problem.x.values, problem.eps, ones if gamma is None else gamma, zeros if beta is None else beta)
        result = problem.forward(lib, problem.plan(False, GRID, 2), given=(gamma, beta, None, None))
        check_forward(problem, result, truth)


@pytest.mark.parametrize("name", ["long runs", "27x27", "odd slice", "tiles", "7x7"])
def test_in_place(lib, rng, name):
    """y is x; dx is dy, or x: the bits of separate arrays, whoever is first."""
    shape, order, gaps, offset, *_ = CASES[name]
    for (way, K), policy in itertools.product(WAYS, (0, 3)):
        problem = Problem(np.random.default_rng(5), shape, "f", order, gaps, offset)
        keep = 1 if policy % 2 else None
        expected = problem.forward(lib, problem.plan(False, way, K, keep=keep), policy=policy)
        result = problem.forward(lib, problem.plan(False, way, K, keep=keep), policy=policy, resident=3, y=problem.x)
        assert result.error == ""
        assert result.bits == expected.bits
        for target in ("dy", "x"):
            problem = Problem(np.random.default_rng(6), shape, "f", order, gaps, offset)
            plan = problem.plan(True, way, K, keep=keep)
            expected = problem.backward(lib, plan, policy=policy)
            result = problem.backward(lib, plan, policy=policy, resident=3, dx=getattr(problem, target))
            assert result.error == ""
            assert result.bits == expected.bits


def test_arrays_of_different_strides(lib, rng):
    """x a channel slice, dy a batch slice, y dense: each has its own strides, and windows where they agree."""
    for shape, layout in [((3, 4, 64), RUNS), ((3, 4, 67), WINDOWS), ((30, 20, 1), COLUMNS)]:
        order = "OIC" if layout == COLUMNS else "OCI"
        problem = Problem(rng, shape, "f", order)
        wide = ((0, 0), (0, 0), (4, 8)) if layout == COLUMNS else ((0, 0), (4, 4), (0, 0))
        problem.x = Array(problem.x.values, "f", order, wide)
        problem.dy = Array(problem.dy.values, "f", order, ((1, 2), (0, 0), (0, 0)) if layout != WINDOWS else wide)
        for (way, K), policy in itertools.product(WAYS, (0, 3)):
            for backward in (False, True):
                walk = planner.walk(view_of(problem.x, problem.empty(), problem.dy if backward else None))
                assert (walk.layout, walk.V) == (layout, 4)
                plan = planner.build(walk, "f", backward, planner.HOPPER, way, K, threads=64)
                if backward:
                    check_backward(problem, problem.backward(lib, plan, policy=policy))
                else:
                    check_forward(problem, problem.forward(lib, plan, policy=policy))


def test_arrays_that_disagree_modulo_16(lib, rng):
    """Windows of x and y would not coincide: element by element."""
    problem = Problem(rng, (3, 4, 67), "f", gaps=((0, 0), (0, 1), (0, 0)))
    y = Array(np.zeros((3, 4, 67)), "f")
    walk = planner.walk(view_of(problem.x, y, None))
    assert (walk.layout, walk.V) == (RUNS, 1)
    plan = planner.build(walk, "f", False, planner.HOPPER, GRID, 3, threads=64)
    check_forward(problem, problem.forward(lib, plan, y=y, policy=2))


# ------------------------------------------------------------------------------------------------------------ accuracy

ACCURATE = [("long runs", (BLOCK, 1)), ("27x27", (SPLIT, 3)), ("tiles", (GRID, 5)), ("7x7", (CLUSTER, 4))]


@pytest.mark.parametrize("exponent", [0, 2, 4, 5])
@pytest.mark.parametrize(("name", "way"), ACCURATE, ids=lambda v: v if isinstance(v, str) else v[0])
def test_right_at_any_offset(lib, rng, name, way, exponent):
    """|mean| up to 1e5 standard deviations, of x and of dy; in float64 up to 1e14 eps^-1."""
    shape, order, gaps, offset, *_ = CASES[name]
    for letter, mean in (("f", 10.0**exponent), ("d", 10.0 ** (2.5 * exponent))):
        problem = Problem(rng, shape, letter, order, gaps, offset, mean=mean)
        problem.dy = Array(problem.dy.values + mean, *problem.how)
        check_forward(problem, problem.forward(lib, problem.plan(False, *way), policy=2))
        check_backward(problem, problem.backward(lib, problem.plan(True, *way), policy=2))


@pytest.mark.parametrize(("name", "way"), ACCURATE, ids=lambda v: v if isinstance(v, str) else v[0])
def test_outliers(lib, rng, name, way):
    """One value of 1e10 among values of 1, wherever it lies: no pivot is ruined by it."""
    shape, order, gaps, offset, *_ = CASES[name]
    places = [(0, 0, 0), (-1, -1, -1), (shape[0] // 2, 1, shape[2] // 2)]
    values = 3 + rng.standard_normal(shape)
    for place in places:
        values[place] = 1e10
    problem = Problem(rng, shape, "f", order, gaps, offset, values=values)
    # The variance is one term, whose ten roundings nothing averages.
    check_forward(problem, problem.forward(lib, problem.plan(False, *way), policy=2), tolerance=10)
    check_backward(problem, problem.backward(lib, problem.plan(True, *way), policy=2))


@pytest.mark.parametrize(("name", "way"), ACCURATE, ids=lambda v: v if isinstance(v, str) else v[0])
def test_dgamma_where_dy_is_nearly_one_number(lib, rng, name, way):
    """x less its mean adds up to 0; by what rounding left of that, times the sum of dy, dgamma was off by 3e-3."""
    shape, order, gaps, offset, *_ = CASES[name]
    problem = Problem(rng, shape, "f", order, gaps, offset)
    problem.dy = Array(rng.normal(0, 3) + 1e-3 * rng.standard_normal(shape), *problem.how)
    result = problem.backward(lib, problem.plan(True, *way), policy=2)
    dgamma = problem.truth.gradients(problem.dy.values)[0][1]
    assert error_in_eps(result.dgamma, dgamma, abs(dgamma).max(), number_epsilon("f")) <= 2 * SUM_TOLERANCE


@pytest.mark.parametrize("far", [3, 10, 1e3, 1e6])
@pytest.mark.parametrize(("shape", "order"), [((296, 32, 1), "OIC"), ((1, 4, 5120), "OCI"), ((3, 4, 769), "OCI")])
def test_first_values_far_from_the_rest(lib, rng, shape, order, far):
    """What each thread, or the first ones, begin with: a pivot that is no longer near costs no digits."""
    first = np.zeros(shape, bool)
    first[:32] = shape[2] == 1
    first[0, :, : 64 * 4] = True
    problem = Problem(rng, shape, "f", order, values=rng.standard_normal(shape) + far * first)
    problem.dy = Array(problem.dy.values + far * first, *problem.how)
    for way, K in ((BLOCK, 1), (GRID, 2)):
        check_forward(problem, problem.forward(lib, problem.plan(False, way, K)))
        check_backward(problem, problem.backward(lib, problem.plan(True, way, K)))


@pytest.mark.parametrize("value", [1.8e19, 2e19, -1e30, 3e38])
@pytest.mark.parametrize(
    ("shape", "order"), [((1, 3, 8), "OCI"), ((3, 2, 769), "OCI"), ((5, 8, 1), "OIC"), ((4, 4, 49), "OCI")]
)
def test_large_constants(lib, rng, shape, order, value):
    """Threads without elements don't count, even where the square of a difference to theirs is infinite."""
    for letter in "fE":
        problem = Problem(rng, shape, letter, order, values=np.full(shape, value))
        for way, K in ((BLOCK, 1), (CLUSTER, 4), (GRID, 2)):
            result = problem.forward(lib, problem.plan(False, way, K, threads=128))
            assert result.error == ""
            assert (result.table[2] == 0).all()
            np.testing.assert_array_equal(
                result.y, np.broadcast_to(problem.beta[:, None], shape).astype(result.y.dtype)
            )


@pytest.mark.parametrize(("name", "way"), ACCURATE, ids=lambda v: v if isinstance(v, str) else v[0])
def test_squares_beyond_float32(lib, rng, name, way):
    shape, order, gaps, offset, *_ = CASES[name]
    values = 1e20 * (1 + rng.standard_normal(shape))
    problem = Problem(rng, shape, "f", order, gaps, offset, values=values)
    check_forward(problem, problem.forward(lib, problem.plan(False, *way), policy=2))
    check_backward(problem, problem.backward(lib, problem.plan(True, *way), policy=2))


@pytest.mark.parametrize("letter", list("fde"))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "way"), ACCURATE, ids=lambda v: v if isinstance(v, str) else v[0])
def test_what_is_not_finite_stays_in_its_channel(lib, rng, name, way, bad, letter):
    shape, order, gaps, offset, *_ = CASES[name]
    clean = Problem(rng, shape, letter, order, gaps, offset)
    table = clean.truth.saved(letter)
    expected = clean.forward(lib, clean.plan(False, *way))
    grads = clean.backward(lib, clean.plan(True, *way))
    clean.x.view[1, 1, shape[2] - 1] = bad
    got = clean.forward(lib, clean.plan(False, *way))
    others = np.arange(shape[1]) != 1
    assert got.error == ""
    assert got.y[:, others].tobytes() == expected.y[:, others].tobytes()
    assert got.table[:, others].tobytes() == expected.table[:, others].tobytes()
    assert not np.isfinite(got.y[:, 1].astype(np.float64)).any()
    back = execute(lib, clean.plan(True, *way), clean.x, clean.dy, clean.empty(), table=table)
    assert back.y[:, others].tobytes() == grads.y[:, others].tobytes()
    assert not np.isfinite(back.y[:, 1].astype(np.float64)).any()


@pytest.mark.parametrize("letter", list("fdeE"))
@pytest.mark.parametrize("name", ["runs", "long runs", "27x27", "tiles", "7x7", "RGB"])
def test_constant_channels(lib, rng, name, letter):
    """A constant channel gives beta, a constant dy gives dx = 0 and dgamma = 0; exactly, at any value."""
    shape, order, gaps, offset, *_ = CASES[name]
    largest = 1e4 if letter == "e" else 1e10
    values = np.broadcast_to((largest * rng.standard_normal(shape[1]))[None, :, None], shape)
    constant = Problem(rng, shape, letter, order, gaps, offset, values=values)
    varied = Problem(rng, shape, letter, order, gaps, offset)
    varied.dy = Array(values, *varied.how)
    beta = np.broadcast_to(constant.beta[None, :, None], shape).astype(constant.x.view.dtype)
    for way, K in WAYS:
        result = constant.forward(lib, constant.plan(False, way, K), policy=2)
        assert result.error == ""
        assert (result.table[2] == 0).all()
        assert (result.table[0] == constant.x.values[0, :, 0]).all()
        assert (result.y == beta).all()
        result = varied.backward(lib, varied.plan(True, way, K), policy=2)
        assert result.error == ""
        assert (result.y == 0).all()


# ------------------------------------------------------------------------------------------------------------- extremes


def sparse(count, dtype):
    """Zeros in address space that nothing backs until it is touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve), dtype)


@pytest.mark.parametrize("layout", [RUNS, WINDOWS, COLUMNS])
def test_offsets_beyond_32_bits(lib, rng, layout):
    """Two rows 2^32 elements apart, and (RUNS) two channels 2^31 apart."""
    inner = 61 if layout == WINDOWS else 64
    shape = (2, inner, 1) if layout == COLUMNS else (2, 2, inner)
    row, channel = 1 << 32, 1 if layout == COLUMNS else 1 << 31
    arrays = []
    for _ in range(2):
        buffer = sparse(row + (1 << 31) + 128, np.float32)
        strides = (4 * row, 4 * channel, 4)
        arrays.append(np.lib.stride_tricks.as_strided(buffer, shape, strides, writeable=True))
    x, y = arrays
    values = rng.standard_normal(shape).astype(np.float32)
    x[...] = values
    walk = planner.walk(planner.View(shape, x.strides, y.strides, None, 4, (x.ctypes.data, y.ctypes.data, 0)))
    assert (walk.layout, walk.V) == (layout, 4)
    plan = planner.build(walk, "f", False, planner.HOPPER, BLOCK, threads=64)
    C = shape[1]
    table = np.full((6, C), np.nan)
    pointers = planner.Pointers(x=x.ctypes.data, y=y.ctypes.data, table=table.ctypes.data)
    span = (ctypes.c_uint64 * 4)(*(n for a in arrays for n in (a.ctypes.data // 16 * 16, 4 * (row + (1 << 31) + 128))))
    instance = (ctypes.c_int * 5)(0, 4, 0, [RUNS, WINDOWS, COLUMNS].index(layout), 0)
    bytes_ = planner.pack(plan, pointers, 1e-5)
    launch = plan.launches[0]
    error = lib.fastbn_launch(
        instance, bytes_, launch.grid, launch.threads, launch.shared, 1, 1, 0, span, 2, span, 2
    )  # fmt: skip
    assert error == b""
    truth = Truth(values, 1e-5, np.ones(C), np.zeros(C))
    assert error_in_eps(y, truth.y(), np.maximum(1, abs(truth.y())), epsilon("f")) <= Y_TOLERANCE["f"]


@pytest.mark.parametrize("shape", [(70001, 4, 1), (3, 100000, 1), (1, 20000, 4), (66000, 1, 4), (1, 1, 1), (1, 8, 1)])
def test_sizes_at_the_edge(lib, rng, shape):
    """More rows than a grid's y has, 100,000 channels, one element: as the planner plans them."""
    problem = Problem(rng, shape, "f", "OIC" if shape[2] == 1 else "OCI")
    for backward in (False, True):
        view = view_of(problem.x, problem.x, problem.dy if backward else None)
        plan = planner.plan(view, "f", backward, planner.Device(sms=4), way=None if shape[0] > 3 else BLOCK)
        run, check = (problem.backward, check_backward) if backward else (problem.forward, check_forward)
        check(problem, run(lib, plan, policy=0))


@pytest.mark.parametrize("seed", range(60))
def test_planned_for_random_devices(lib, seed):
    """What the planner picks for random arrays and small devices is right, whatever way that is."""
    rng = np.random.default_rng(seed)
    device = planner.Device(
        sms=int(rng.choice([1, 2, 3, 5])),
        smem_block=int(rng.choice([48, 64])) << 10,
        smem_sm=int(rng.choice([64, 100])) << 10,
        cluster=int(rng.choice([1, 2, 4, 8])),
        cooperative=bool(rng.random() < 0.7),
    )
    letter = rng.choice(["f", "e", "d"])
    V = 16 // np.dtype({"f": "f4", "e": "f2", "d": "f8"}[letter]).itemsize
    if rng.random() < 0.6:
        inner = int(rng.choice([64, 200, 49, 100, 129, 9, 256, 2048]))
        shape, order = (int(rng.integers(1, 30)), V * int(rng.integers(1, 4)), inner), "OCI"
    else:
        shape, order = (int(rng.integers(1, 3000)), V * int(rng.integers(1, 9)), 1), "OIC"
    backward, stable = bool(rng.random() < 0.5), bool(rng.random() < 0.3)
    problem = Problem(rng, shape, letter, order)
    view = view_of(problem.x, problem.x, problem.dy if backward else None)
    plan = planner.plan(view, letter, backward, device, stable=stable)
    if shape[0] * shape[2] == 1:  # one element a channel: dx is 0, y is beta
        return
    run, check = (problem.backward, check_backward) if backward else (problem.forward, check_forward)
    check(problem, run(lib, plan, policy=seed % 10))


ROOMS = {  # shape, order: many items for few blocks, of one to a dozen vectors a thread
    "runs": ((3, 11, 2048), "OCI"),
    "few vectors": ((3, 11, 64), "OCI"),
    "odd runs": ((3, 11, 1029), "OCI"),
    "columns": ((120, 100, 1), "OIC"),
}


@pytest.mark.parametrize("room", [64, 24, 14, 11, 8])
@pytest.mark.parametrize("letter", "fde")
@pytest.mark.parametrize("name", ROOMS)
def test_room_and_blocks_do_not_count(lib, rng, name, letter, room):
    """However much of an item stays in shared memory (KiB), and however few groups take turns: the same bits."""
    shape, order = ROOMS[name]
    problem = Problem(rng, shape, letter, order)
    few = planner.Device(sms=1, smem_block=room << 10, smem_sm=4 * (room + 1) << 10)
    for way, K, threads in [(BLOCK, 1, 256), (GRID, 2, 64), (CLUSTER, 2, 256), (SPLIT, 2, 64)]:
        for backward in (False, True):
            run = problem.backward if backward else problem.forward
            walk = planner.walk(view_of(problem.x, problem.x, problem.dy if backward else None))
            plan = planner.build(walk, letter, backward, few, way, K, threads=threads, tile=32)
            whole = planner.build(walk, letter, backward, planner.HOPPER, way, K, threads=threads, tile=32)
            assert (plan.grid < whole.grid) == (way == GRID)
            assert (plan.delay > 0) == (way == GRID)
            results = [run(lib, plan, policy=policy, resident=2) for policy in SCHEDULES]
            (check_backward if backward else check_forward)(problem, results[0])
            assert {result.bits for result in results} == {run(lib, whole).bits}
