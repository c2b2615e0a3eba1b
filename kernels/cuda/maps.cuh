// What sums make of a channel: coefficients, and maps by them. Included by bn.cu.
namespace fastbn {

// What maps need of a channel, in shared memory.
template <class A, bool BACKWARD> struct __align__(16) Coefficients { A hi, lo, a, beta; };
template <class A> struct __align__(16) Coefficients<A, true> { A hi, lo, a, beta, ghi, glo, invstd, slope; };

template <class A, bool B> FASTBN_DEVICE A deviation(const Coefficients<A, B> &k, A x) { return (x - k.hi) - k.lo; }
// What the activation is of. One function: backward sees the very sign that forward saw.
template <class T, bool B> FASTBN_DEVICE Number<T> linear(const Coefficients<Number<T>, B> &k, Number<T> x, T r) {
  const Number<T> z = multiply_add(k.a, deviation(k, x), k.beta);
  return RESIDUAL ? z + up(r) : z;
}

template <class A> FASTBN_DEVICE A sigmoid(A z) { return 1 / (1 + exp(-z)); }
template <class A> FASTBN_DEVICE A bell(A z) { const A e = exp(z < 0 ? z : -z); return e / ((1 + e) * (1 + e)); }
template <class A> FASTBN_DEVICE A six(A z) { return z <= 0 ? (A)0 : z >= 6 ? (A)6 : z; }  // a NaN stays one, as in all
template <class A> FASTBN_DEVICE A activate(A z, A p) {
  switch (ACTIVATION) {
    case LINEAR: return z;
    case RELU: return z <= 0 ? (A)0 : z;
    case LEAKY_RELU: return z <= 0 ? p * z : z;
    case RELU6: return six(z);
    case ELU: return z <= 0 ? p * expm1(z) : z;
    case SILU: return z / (1 + exp(-z));
    case GELU: return (A)0.5 * z * (1 + erf(z * (A)0.70710678118654752));
    case SIGMOID: return sigmoid(z);
    case TANH: return tanh(z);
    case HARDSWISH: return z * (six(z + 3) * (A)(1.0 / 6));
  }
}
// Its slope; at a kink that of the left side.
template <class A> FASTBN_DEVICE A slope(A z, A p) {
  switch (ACTIVATION) {
    case LINEAR: return 1;
    case RELU: return z <= 0 ? 0 : 1;
    case LEAKY_RELU: return z <= 0 ? p : (A)1;
    case RELU6: return z <= 0 || z >= 6 ? 0 : 1;
    case ELU: return z <= 0 ? p * exp(z) : (A)1;
    case SILU: { const A s = sigmoid(z); return s * multiply_add(z, 1 - s, (A)1); }
    case GELU: {
      const A density = (A)0.3989422804014327 * exp((A)-0.5 * z * z);
      return multiply_add(z, density, (A)0.5 * (1 + erf(z * (A)0.70710678118654752)));
    }
    case SIGMOID: return bell(z);  // s (1 - s) and 1 - y^2 would lose their digits far from 0
    case TANH: return 4 * bell(2 * z);
    case HARDSWISH: return z <= -3 ? (A)0 : z < 3 ? multiply_add(z, (A)(1.0 / 3), (A)0.5) : (A)1;
  }
}
// The number that x stands for: itself, or with INVERSE what the activation is of, had back from its y.
template <class T> FASTBN_DEVICE Number<T> meant(T x, Number<T> p) {
  typedef Number<T> A;
  const A y = up(x);
  if (!INVERSE || !(y <= 0)) return y;
  if (ACTIVATION == LEAKY_RELU) return y / p;
  const A u = y / p;
  return u > -1 ? log1p(u) : (A)-69;  // elu's y that was rounded to its limit: z is low enough by this
}
// The gradient by z, and whether it is a number of the elements' type wherever dy is one: then it is kept in dy's place.
template <class T, bool B>
FASTBN_DEVICE Number<T> by_z(const Coefficients<Number<T>, B> &k, T x, T dy, T r, Number<T> parameter) {
  if (ACTIVATION == LINEAR) return up(dy);
  const Number<T> value = meant(x, parameter);
  return up(dy) * slope(INVERSE ? value : linear(k, value, r), parameter);
}
template <class T> constexpr bool IN_PLACE =
    ACTIVATION != LINEAR && (sizeof(T) == sizeof(Number<T>) || ACTIVATION == RELU || ACTIVATION == RELU6);

// The gradient by x. Frozen it is a g: it doesn't want x. By weights x is absent where w is 0.
template <class A> FASTBN_DEVICE A by_x(const Coefficients<A, true> &k, A x, A g, bool wants_x, A w) {
  if (WEIGHTED) {
    if (wants_x && w != 0) {
      g = multiply_add(-w, k.glo, multiply_add(-w, k.ghi, g));
      g = multiply_add(w * (deviation(k, x) * k.invstd), k.slope, g);
    }
    return k.a * g;
  }
  g = (g - k.ghi) - k.glo;
  if (wants_x) g = multiply_add(deviation(k, x) * k.invstd, k.slope, g);
  return k.a * g;
}

FASTBN_DEVICE double parameter(const void *values, u64 wide, i64 c, double absent) {
  if (!values) return absent;
  return wide ? ((const double *)values)[c] : (double)((const float *)values)[c];
}
// From numbers of the table.
template <class A, bool B>
FASTBN_DEVICE void centre(Coefficients<A, B> &k, double hi, double lo, double invstd, double gamma, double beta) {
  k.hi = (A)hi, k.lo = (A)((hi - (double)k.hi) + lo), k.a = (A)(gamma * invstd), k.beta = (A)beta;
}
template <class A, bool B> FASTBN_DEVICE void centre(Coefficients<A, B> &k, const double *table, i64 width) {
  centre(k, table[0], table[width], table[3 * width], table[4 * width], table[5 * width]);
}

// From sums of channel c of the share to its coefficients; the rank that reports writes the table, or dgamma and dbeta.
// early: what `foresee` had fly there. mass: forward, of the set's weights.
template <class S, class A>
FASTBN_DEVICE void conclude(const S &share, int c, const Sum<A, false> &s, const double *early, double mass,
                            bool report, Coefficients<A, false> &k) {
  const Params &p = share.p;
  const i64 own = share.statistic(c);
  const double gamma = parameter(p.gamma ? early : nullptr, p.wide, 0, 1);
  const double beta = parameter(p.beta ? early + 1 : nullptr, p.wide, 0, 0);
  double hi, lo = 0, var;
  if (p.frozen) {
    hi = parameter(p.mean, p.wide, own, 0), var = parameter(p.var, p.wide, own, 1);
  } else {
    hi = (double)(A)(s.m + s.lo), lo = (s.m - hi) + s.lo, var = s.c * (WEIGHTED ? 1 / mass : share.one_of());
  }
  double invstd = rsqrt(var + p.eps);
  if (SETS && share.height() == 0 && !p.frozen) hi = lo = var = invstd = 0;
  if (WEIGHTED && mass == 0 && !p.frozen) hi = lo = var = invstd = 0;
  centre(k, hi, lo, invstd, gamma, beta);
  if (report) {
    const double row[6] = {hi, lo, var, invstd, gamma, beta};
#pragma unroll
    for (int i = 0; i < 6; i++) p.table[i * share.statistics() + own] = row[i];
    if (WEIGHTED && p.mass && share.parameter(c) == 0) p.mass[share.set] = mass;
  }
}
template <class S, class A>
FASTBN_DEVICE void conclude(const S &share, int c, const Sum<A, true> &s, const double *early, double, bool report,
                            Coefficients<A, true> &k) {
  const Params &p = share.p;
  const i64 own = share.statistic(c);
  const double invstd = early[3], mean = s.m + s.lo, count = share.count();
  centre(k, early, 1);
  k.invstd = (A)invstd;
  k.ghi = p.frozen ? (A)0 : (A)mean;
  k.glo = p.frozen ? (A)0 : (A)((s.m - (double)k.ghi) + s.lo);
  k.slope = p.frozen ? (A)0 : (A)(-invstd * (s.c * share.one_of()));
  if (WEIGHTED && !p.frozen) {  // the mean of x - mean, by which c is less than the sum of products, isn't 0 here
    const double mass = p.mass[share.set], part = mass > 0 ? count / mass : 0;
    k.ghi = (A)(mean * part);
    k.glo = (A)((s.m * part - (double)k.ghi) + s.lo * part);
    k.slope = (A)(-invstd * (part * fma(mean, (double)s.e, s.c * share.one_of())));
  }
  if (report) {
    // In training x - mean adds up to 0 without weights: what rounding left, e, by the sum of dy was an error of 3e-3
    // where dy is 1 + 0.001 noise.
    const double rest = p.frozen || WEIGHTED ? count * mean * (double)s.e : 0;
    if (p.dgamma) ((A *)p.dgamma)[own] = (A)(invstd * (s.c + rest));
    if (p.dbeta) ((A *)p.dbeta)[own] = (A)(count * mean);
  }
}

// What `conclude` will read of channel c flies to `early`, of EARLY numbers: it comes from L2 at best, in 700 cycles.
template <bool BACKWARD> constexpr int EARLY = BACKWARD ? 6 : 2;  // launches.py's `early`
template <bool BACKWARD, class S> FASTBN_DEVICE void foresee(const S &share, int c, double *early) {
  const Params &p = share.p;
  if (BACKWARD) {
    for (int i = 0; i < 6; i++)
      if (i != 2) fly<8>(early + i, p.table + i * share.statistics() + share.statistic(c));  // all but var
  } else {
    for (int i = 0; i < 2; i++) {
      const void *from = i == 0 ? p.gamma : p.beta;
      if (from && p.wide) fly<8>(early + i, (const double *)from + share.parameter(c));
      if (from && !p.wide) fly<4>(early + i, (const float *)from + share.parameter(c));
    }
  }
}

}  // namespace fastbn
