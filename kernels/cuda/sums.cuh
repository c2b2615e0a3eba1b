// Sums of deviations, and how they merge. Included by bn.cu.
namespace fastbn {

// Of n elements of a channel. Forward: mean m and c = sum (x - m)^2. Backward: mean m of dy, mean e of x - mean x, and
// c = sum (dy - m) ((x - mean x) - e). M is what they are merged in: the elements' own A within a warp, where float64
// arithmetic would take longer than the memory, else float64. If it is A, the mean is a pair m + lo; else lo is unused.
template <class A, bool BACKWARD, class M = double> struct Sum {
  static constexpr bool PAIR = sizeof(M) == sizeof(A);
  M m = 0, lo = 0, c = 0;
  A e = 0;
};

// The same in memory, in whole 16 bytes; n lies elsewhere, because the channels of a tile share it.
template <class A, bool BACKWARD, class M = double> struct __align__(16) Partial { M m, lo, e, c; };
template <> struct __align__(16) Partial<float, false> { double m, c; };
template <> struct __align__(16) Partial<float, true> { double m; float e, c; };

struct __align__(16) Count { double n, all; };  // the same for all channels: of a block, of all ranks

// n: how many elements, or forward by weights the sum of those.
template <class A, bool BACKWARD, bool W = WEIGHTED> struct SizeOf { typedef A type; };
template <class A> struct SizeOf<A, false, true> { typedef double type; };
template <class A, bool BACKWARD> using Size = typename SizeOf<A, BACKWARD>::type;

template <class A, bool B, class M> FASTBN_DEVICE void shut(Partial<A, B, M> &p, const Sum<A, B, M> &s) {
  p.m = s.m; p.lo = s.lo; p.e = s.e; p.c = s.c;
}
FASTBN_DEVICE void shut(Partial<float, false> &p, const Sum<float, false> &s) { p.m = s.m; p.c = s.c; }
FASTBN_DEVICE void shut(Partial<float, true> &p, const Sum<float, true> &s) { p.m = s.m; p.e = s.e; p.c = s.c; }
template <class A, bool B, class M> FASTBN_DEVICE void open(Sum<A, B, M> &s, const Partial<A, B, M> &p) {
  s.m = p.m; s.lo = p.lo; s.e = p.e; s.c = p.c;
}
FASTBN_DEVICE void open(Sum<float, false> &s, const Partial<float, false> &p) { s.m = p.m; s.c = p.c; }
FASTBN_DEVICE void open(Sum<float, true> &s, const Partial<float, true> &p) { s.m = p.m; s.e = p.e; s.c = p.c; }
template <class A> FASTBN_DEVICE bool finite(const Sum<A, false> &s) { return s.m - s.m == 0 && s.c - s.c == 0; }

// a, of n elements, takes in b, of k more: Chan, Golub & LeVeque (1983).
template <class A, bool BACKWARD, class M>
FASTBN_DEVICE void merge(Sum<A, BACKWARD, M> &a, Size<A, BACKWARD> n, const Sum<A, BACKWARD, M> &b,
                         Size<A, BACKWARD> k) {
  constexpr bool PAIR = Sum<A, BACKWARD, M>::PAIR;
  if (k == 0) return;  // and not 0 times a square that may be too large
  if (PAIR && n == 0) { a = b; return; }
  const A f = k == n ? (A)0.5 : (A)(k / (n + k));  // no division where both are of one size
  const M w = (M)n * (M)f;
  M d = b.m - a.m;
  if (PAIR) d += b.lo - a.lo;
  const A de = b.e - a.e;
  if (WEIGHTED && !BACKWARD && k > n) {  // from the heavier one on: d may be large beside what is left of it
    const M back = (M)(n / (n + k));
    if (PAIR) a.m = b.m, a.lo = multiply_add(-d, back, b.lo);
    else a.m = multiply_add(-d, back, b.m);
  } else {
    if (PAIR) a.lo = multiply_add(d, (M)f, a.lo);
    else a.m = multiply_add(d, (M)f, a.m);
  }
  if (BACKWARD) a.e = multiply_add(de, f, a.e);
  a.c += multiply_add(d * w, BACKWARD ? (M)de : d, b.c);
}

// Lane i takes in lane i + step, for step = 16 down to `last`: N sums of n elements each.
template <int N, class A, bool BACKWARD, class M>
FASTBN_DEVICE void merge_lanes(Sum<A, BACKWARD, M> (&s)[N], Size<A, BACKWARD> &n, int last) {
#pragma unroll 1
  for (int step = 16; step >= last; step >>= 1) {
    const Size<A, BACKWARD> k = __shfl_down_sync(0xffffffffu, n, step);
#pragma unroll
    for (int j = 0; j < N; j++) {
      Sum<A, BACKWARD, M> other;
      other.m = __shfl_down_sync(0xffffffffu, s[j].m, step);
      if (Sum<A, BACKWARD, M>::PAIR) other.lo = __shfl_down_sync(0xffffffffu, s[j].lo, step);
      if (BACKWARD) other.e = __shfl_down_sync(0xffffffffu, s[j].e, step);
      other.c = __shfl_down_sync(0xffffffffu, s[j].c, step);
      merge(s[j], n, other, k);
    }
    n += k;
  }
}
// Sums over each `lanes` lanes that lie side by side, for all of them: the same bits, as addition commutes.
template <class... M> FASTBN_DEVICE void sum_lanes(int lanes, M &...v) {
#pragma unroll 1
  for (int step = lanes / 2; step > 0; step /= 2) ((v += __shfl_xor_sync(0xffffffffu, v, step)), ...);
}

// Merges `parts` sums of one channel, by `lanes` threads that lie side by side, of which this is number `lane`; all of
// them have the counts and the first one the total. In float64, relative to the mean of `first`, one of them that has
// elements: what the difference at the end cancels is less than the number of parts then. `read(i, s)` fetches part i
// and gives its count; AT_ONCE of them are on their way at a time.
template <int AT_ONCE, class A, bool BACKWARD, class M, class Read>
FASTBN_DEVICE double gather(Sum<A, BACKWARD> &total, const Sum<A, BACKWARD, M> &first, int parts, int lane, int lanes,
                            Read read) {
  double n = 0, mean = 0, products = 0, e = 0;
#pragma unroll 1
  for (int i = lane; i < parts; i += lanes * AT_ONCE) {
    Sum<A, BACKWARD, M> s[AT_ONCE];
    double k[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      k[u] = 0;
      if (u == 0 || i + lanes * u < parts) k[u] = read(i + lanes * u, s[u]);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      if (k[u] == 0) continue;
      const double d = ((double)s[u].m - (double)first.m) + ((double)s[u].lo - (double)first.lo);
      n += k[u], mean = fma(k[u], d, mean);
      if (BACKWARD) e = fma(k[u], (double)s[u].e, e);
      products += fma(k[u] * d, BACKWARD ? (double)s[u].e : d, (double)s[u].c);
    }
  }
  if (BACKWARD) sum_lanes(lanes, n, mean, products, e);
  else sum_lanes(lanes, n, mean, products);
  const double one_of = n > 0 ? 1 / n : 0;
  total.c = fma(-mean * one_of, BACKWARD ? e : mean, products);
  total.e = (A)(e * one_of), mean *= one_of;
  total.m = sizeof(A) == 8 ? (double)first.m : ((double)first.m + (double)first.lo) + mean;
  total.lo = sizeof(A) == 8 ? (double)first.lo + mean : 0;
  return n;
}

}  // namespace fastbn
