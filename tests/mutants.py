"""Bugs to be planted in bn.cu. What finds each is written beside it: a wrong value, bits that differ between schedules,
or what the emulator itself complains of.
"""

from typing import NamedTuple

from emulator import planner


class Mutant(NamedTuple):
    name: str
    old: str
    new: str
    layout: str
    backward: bool
    ways: tuple[tuple[str, int], ...]
    finds: str  # part of what is found
    more: str = ""  # "relu": of a sum; "sets": ragged ones; "normalize", "zero" or "keep": by weights


BLOCK, CLUSTER, GRID, SPLIT = (
    ((planner.BLOCK, 1),),
    ((planner.CLUSTER, 4),),
    ((planner.GRID, 3),),
    ((planner.SPLIT, 3),),
)
MUTANTS = [
    Mutant(
        "no barrier before rows are read",
        "        __syncthreads();\n        const int S =",
        "        const int S =",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "no barrier before sums are concluded",
        "    __syncthreads();\n    if (WAY == CLUSTER) cluster_arrive();",
        "    if (WAY == CLUSTER) cluster_arrive();",
        "COLUMNS", True, BLOCK, "wrong",
    ),
    Mutant(
        "no barrier behind the coefficients",
        "    __syncthreads();\n\n    // ---- second pass",
        "\n    // ---- second pass",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "rows' means without their counts",
        "n += k[u], mean = fma(k[u], d, mean);",
        "n += k[u], mean += d;",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "rows' products about another mean",
        "total.c = fma(-mean * one_of, BACKWARD ? e : mean, products);",
        "total.c = products;",
        "COLUMNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "a block leaves its cluster early",
        "    if (WAY == CLUSTER) cluster_wait();",
        "",
        "RUNS", False, CLUSTER, "wrong",
    ),
    Mutant(
        "a cluster that doesn't meet",
        "if (WAY == CLUSTER) { cluster_arrive(); cluster_wait(); }",
        "if (WAY == CLUSTER) __syncthreads();",
        "RUNS", False, CLUSTER, "wrong",
    ),
    Mutant(
        "a grid that doesn't wait",
        "while (((old ^ poll(word)) & 0x80000000u) == 0) {}",
        "poll(word);",
        "RUNS", False, GRID, "wrong",
    ),
    Mutant(
        "one set of partial sums for all rounds",
        "round * groups + group",
        "group",
        "RUNS", False, GRID, "wrong",
    ),
    Mutant(
        "a barrier word that doesn't flip",
        "0x80000000u - (u32)(K - 1)",
        "0x80000000u - (u32)K",
        "RUNS", False, GRID, "spins for ever",
    ),
    Mutant(
        "a barrier in one warp alone",
        "if (g == 0) part_count->all = n;",
        "if (g == 0) { __syncthreads(); part_count->all = n; }",
        "RUNS", False, BLOCK, "meets line",
    ),
    Mutant(
        "a shuffle in half a warp",
        "  else sum_lanes(lanes, n, mean, products);",
        "  else if (threadIdx.x % 32 < 16) sum_lanes(lanes, n, mean, products);",
        "RUNS", False, SPLIT, "deadlock",
    ),
    Mutant(
        "one vector too many",
        "const i64 most = left + p.apart.by - 1;",
        "const i64 most = left + p.apart.by;",
        "RUNS", False, BLOCK, "outside every array",
    ),
    Mutant(
        "one row too many",
        "const i64 most = left + p.apart.by - 1;",
        "const i64 most = left + p.apart.by;",
        "COLUMNS", False, BLOCK, "outside every array",
    ),
    Mutant(
        "a misaligned vector",
        "fly<sizeof(Vec)>(x + slot, share.vector(q.x, q));",
        "fly<sizeof(Vec)>(x + slot, share.vector(q.x, q) + 1);",
        "RUNS", False, BLOCK, "isn't aligned",
    ),
    Mutant(
        "gamma and beta are read before they have landed",
        "landed<AHEAD>();  // what",
        "// what",
        "RUNS", False, SPLIT, "wrong",
    ),
    Mutant(
        "the first stretch is read before it has landed",
        "  landed_but(flying);\n  if (!BY_WEIGHT)",
        "  if (!BY_WEIGHT)",
        "RUNS", True, BLOCK, "wrong",
    ),
    Mutant(
        "batches of what flies at once aren't waited for",
        "else landed_but(i < FIRST ? flying : --flying);",
        "else landed_but(flying);",
        "RUNS", False, BLOCK, "has landed",
    ),
    Mutant(
        "a neighbour's kept vector",
        "load_shared(a.raw, ring.x + slot);",
        "load_shared(a.raw, ring.x + slot + (t & 1 ? -1 : 1));",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "dy kept over x",
        "ring.x = ring.dy + (!BACKWARD || (WAY == APPLY && !wants_x) ? 0 : p.slots * threads);",
        "ring.x = ring.dy;",
        "RUNS", True, BLOCK, "wrong",
    ),
    Mutant(
        "a neighbour's column",
        "p.fold == 1 ? g * cells + c :",
        "p.fold == 1 ? g * cells + (c ^ 1) :",
        "COLUMNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "folded rows on the wrong channels",
        "if (p.fold > 1) return c % (p.C * (int)p.S) / (int)p.S;",
        "",
        "COLUMNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "lanes before the run count",
        "(1u << share.end_of(here)) - (1u << share.begin_of(here));",
        "(1u << share.end_of(here)) - 1;",
        "WINDOWS", False, BLOCK, "wrong",
    ),
    Mutant(
        "lanes behind the run are written",
        "if (begin_of(q) == 0 && end_of(q) == V) return",
        "if (begin_of(q) == 0) return",
        "WINDOWS", False, BLOCK, "wrong",
    ),
    Mutant(
        "windows past the run are read",
        "return LAYOUT != WINDOWS || begin_of(q) < end_of(q);",
        "return true;",
        "WINDOWS", False, BLOCK, "outside every array",
    ),
    Mutant(
        "the second pass begins one late",
        "auto q = share.at(share.n - 1), back",
        "auto q = share.at(share.n - 2), back",
        "RUNS", False, SPLIT, "has landed",
    ),
    Mutant(
        "a batch is summed before it has landed",
        "if (!all) landed<STAGES - 1>();",
        "if (!all) landed<STAGES>();",
        "COLUMNS", False, SPLIT, "has landed",
    ),
    Mutant(
        "a vector is mapped before it has landed",
        "landed<AHEAD - 1>();",
        "landed<AHEAD>();",
        "RUNS", True, SPLIT, "has landed",
    ),
    Mutant(
        "what flies in again is one beside",
        "back = q, share.template move<-AHEAD>(back);",
        "back = q, share.template move<1 - AHEAD>(back);",
        "COLUMNS", False, SPLIT, "has landed",
    ),
    Mutant(
        "what flies in again is of the run beside",
        "back = share.at(share.n - 1 - AHEAD);",
        "back = share.at(share.n - AHEAD);",
        "RUNS", False, SPLIT, "has landed",
    ),
    Mutant(
        "vectors fly one slot beside",
        "ring.send(share, there, ring.slot(there.i), true);",
        "ring.send(share, there, ring.slot(there.i + 1), true);",
        "RUNS", False, GRID, "outside shared memory",
    ),
    Mutant(
        "runs that follow each other without their gap",
        "if (beyond) at = far(at, BY * row);",
        "",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "ranks of a whole size",
        "return (left < 0 ? 0 : left < p.per ? left : p.per) * V;",
        "return p.per * V;",
        "RUNS", False, GRID, "wrong",
    ),
    Mutant(
        "stretches merged as if equal",
        "have == b ? (A)0.5 : (A)(b / (have + b))",
        "(A)0.5",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "the means of stretches count nothing",
        "product[j] += multiply_add(step * w, second_step, own[j]);",
        "product[j] += own[j];",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "a stretch that isn't emptied",
        "for (int l = 0; l < LANES; l++) s[l] = e[l] = q[l] = 0;\n    more = 0;",
        "more = 0;",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "half of the stretch's lanes",
        "for (int l = 1; l < LANES / N; l++) s[0] += s[l], q[0]",
        "for (int l = 2; l < LANES / N; l++) s[0] += s[l], q[0]",
        "RUNS", True, BLOCK, "wrong",
    ),
    Mutant(
        "a pivot that doesn't move",
        "      pivot[j] = moved;\n",
        "",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "lanes merged as if equal",
        "const A f = k == n ? (A)0.5 : (A)(k / (n + k));",
        "const A f = n > 0 ? (A)0.5 : (A)1;",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "ranks' means without their counts",
        "n += k[u], mean = fma(k[u], d, mean);",
        "n += k[u], mean += d;",
        "RUNS", False, SPLIT, "wrong",
    ),
    Mutant(
        "no lo in forward",
        "multiply_add(k.a, deviation(k, x), k.beta)",
        "multiply_add(k.a, up(x) - k.hi, k.beta)",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "no lo of dy",
        "g = (g - k.ghi) - k.glo;",
        "g = g - k.ghi;",
        "RUNS", True, BLOCK, "wrong",
    ),
    Mutant(
        "no covariance",
        "if (wants_x) g = multiply_add",
        "if (false) g = multiply_add",
        "RUNS", True, BLOCK, "wrong",
    ),
    Mutant(
        "lo left in the mean of x - hi",
        "sums[j].e -= off[j];",
        "sums[j].e -= 0;",
        "RUNS", True, BLOCK, "wrong", "normalize",
    ),
    Mutant(
        "gamma forgotten",
        "k.a = (A)(gamma * invstd), k.beta",
        "k.a = (A)invstd, k.beta",
        "RUNS", False, BLOCK, "wrong",
    ),
    Mutant(
        "rows of y by x's stride",
        "go(q.y, p.y_step, p.y_row);",
        "go(q.y, p.y_step, p.x_row);",
        "RUNS", False, BLOCK, "outside every array",
    ),
]  # fmt: skip

MORE = [
    Mutant(
        "no residual in forward",
        "return RESIDUAL ? z + up(r) : z;",
        "return z;",
        "RUNS", False, BLOCK, "wrong", "relu",
    ),
    Mutant(
        "the residual is read by x's stride",
        "go(q.r, p.r_step, p.r_row);",
        "go(q.r, p.r_step, p.x_row);",
        "RUNS", False, BLOCK, "wrong", "relu",
    ),
    Mutant(
        "a neighbour's residual beside kept vectors",
        "KEPT)) load(r.raw, share.vector(q.r, q));",
        "KEPT)) load(r.raw, share.vector(q.r, q) - V);",
        "RUNS", False, BLOCK, "outside every array", "relu",
    ),
    Mutant(
        "no activation",
        "case RELU: return z <= 0 ? (A)0 : z;",
        "case RELU: return z;",
        "COLUMNS", False, CLUSTER, "wrong", "relu",
    ),
    Mutant(
        "sums of dy in place of g",
        "if (!APART && !absent(u, v)) down(d[u].lane[v], g[u][v]);",
        "",
        "RUNS", True, SPLIT, "wrong", "relu",
    ),
    Mutant(
        "the slope counts twice where g was kept",
        "const bool done = !SLOPED || (IN_PLACE<T> && (KEPT || summed));",
        "const bool done = !SLOPED;",
        "RUNS", True, BLOCK, "wrong", "leaky_relu",
    ),
    Mutant(
        "the slope counts twice where g still was in the ring",
        "emit(q, slot, Flag<false>(), WAY != APPLY && q.i >= share.n - AHEAD);",
        "emit(q, slot, Flag<false>(), false);",
        "RUNS", True, BLOCK, "wrong", "leaky_relu",
    ),
    Mutant(
        "g taken for dy where it wasn't kept",
        "const bool done = !SLOPED || (IN_PLACE<T> && (KEPT || summed));",
        "const bool done = true;",
        "COLUMNS", True, SPLIT, "wrong", "relu",
    ),
    Mutant(
        "dr without the slope",
        "down(dr.lane[v], g);",
        "down(dr.lane[v], up(d.lane[v]));",
        "RUNS", True, SPLIT, "wrong", "relu",
    ),
    Mutant(
        "rows of the first set for all",
        "    i += begin;\n",
        "",
        "RUNS", False, BLOCK, "wrong", "sets",
    ),
    Mutant(
        "every set as high as the largest",
        "end = p.starts[set + 1] * p.rows;",
        "end = begin + p.M;",
        "COLUMNS", False, SPLIT, "", "sets",
    ),
    Mutant(
        "an order that is ignored",
        "if (!p.order) return i;",
        "return i;",
        "COLUMNS", True, BLOCK, "wrong", "sets",
    ),
    Mutant(
        "a table of the first set",
        "SETS ? (i64)set * p.C + parameter(c) : parameter(c)",
        "parameter(c)",
        "RUNS", False, GRID, "wrong", "sets",
    ),
    Mutant(
        "a count of all rows",
        "SETS ? (double)height() * p.fold * p.S : p.count",
        "p.count",
        "RUNS", False, CLUSTER, "wrong", "sets",
    ),
    Mutant(
        "an empty set of NaN",
        "if (SETS && share.height() == 0 && !p.frozen)",
        "if (false)",
        "RUNS", False, BLOCK, "wrong", "sets",
    ),
    Mutant(
        "one weight for a vector",
        "h = BY_WEIGHT ? weight[u][W == 1 ? 0 : v] : (A)1;",
        "h = BY_WEIGHT ? weight[u][0] : (A)1;",
        "RUNS", False, BLOCK, "wrong", "normalize",
    ),
    Mutant(
        "weights that don't weigh",
        "mean[j] = multiply_add(h, first - centre[j], mean[j]);",
        "mean[j] += first - centre[j];",
        "WINDOWS", False, SPLIT, "wrong", "normalize",
    ),
    Mutant(
        "squares without weights",
        "own[j] = multiply_add(h * from, from, own[j]);",
        "own[j] = multiply_add(from, from, own[j]);",
        "COLUMNS", False, BLOCK, "wrong", "normalize",
    ),
    Mutant(
        "a batch without weight isn't kept",
        "    if (LAYOUT == WINDOWS && size == 0) return;\n",
        "    if (BY_WEIGHT && weight[0][0] == 0) return;\n",
        "COLUMNS", False, BLOCK, "wrong", "normalize",
    ),
    Mutant(
        "weights in their columns' number",
        "part_count->n = n;",
        "part_count->n = (double)share.rows(rank);",
        "COLUMNS", False, CLUSTER, "wrong", "normalize",
    ),
    Mutant(
        "the variance over a count",
        "var = s.c * (WEIGHTED ? 1 / mass : share.one_of());",
        "var = s.c * share.one_of();",
        "RUNS", False, GRID, "wrong", "normalize",
    ),
    Mutant(
        "a mass of the first set",
        "p.mass[share.set] = mass;",
        "p.mass[0] = mass;",
        "RUNS", False, BLOCK, "wrong", "normalize",
    ),
    Mutant(
        "no statistics of no weight",
        "if (WEIGHTED && mass == 0 && !p.frozen)",
        "if (false)",
        "RUNS", False, BLOCK, "wrong", "normalize",
    ),
    Mutant(
        "weights by x's rows",
        "q.w = far((const Number<T> *)p.w, line * p.w_row);",
        "q.w = far((const Number<T> *)p.w, line * p.x_row);",
        "WINDOWS", False, BLOCK, "outside every array", "zero",
    ),
    Mutant(
        "sums over the count",
        "part = mass > 0 ? count / mass : 0;",
        "part = 1;",
        "RUNS", True, BLOCK, "wrong", "normalize",
    ),
    Mutant(
        "the mean of x - mean is taken for 0",
        "part * fma(mean, (double)s.e, s.c * share.one_of())",
        "part * (s.c * share.one_of())",
        "RUNS", True, SPLIT, "wrong", "normalize",
    ),
    Mutant(
        "the gradient of statistics without weights",
        "g = multiply_add(w * (deviation(k, x) * k.invstd), k.slope, g);",
        "g = multiply_add(deviation(k, x) * k.invstd, k.slope, g);",
        "COLUMNS", True, BLOCK, "wrong", "normalize",
    ),
    Mutant(
        "what is masked has a gradient",
        "if (BACKWARD && absent(u, v)) f(l, j, (A)0, (A)0, h);",
        "if (false) ;",
        "RUNS", True, BLOCK, "wrong", "zero",
    ),
    Mutant(
        "y in place of x where it is masked",
        "if (absent && WEIGHTS == KEEP) to.lane[v] = a.lane[v];",
        "",
        "WINDOWS", False, SPLIT, "wrong", "keep",
    ),
    Mutant(
        "0 in place of dy where it is masked",
        "if (absent && WEIGHTS == KEEP) to.lane[v] = d.lane[v];",
        "",
        "COLUMNS", True, BLOCK, "wrong", "keep",
    ),
]  # fmt: skip
MUTANTS += MORE
