// Batch normalization, forward and backward, for arrays (O, C, I). One source for NVRTC, nvcc and, in the tests, g++.
// No includes on the device: <cooperative_groups.h> alone costs NVRTC 1.6 s.
//
//   forward    y  = a ((x - hi) - lo) + beta                                       a = gamma invstd, hi + lo = mean x
//   backward   dx = a (((dy - ghi) - glo) - (((x - hi) - lo) invstd) invstd cov)   cov of dy and x, ghi + glo = mean dy
//
// and, by options of the compiler, with a residual r and an activation f
//
//   forward    y  = f(z)     z = a ((x - hi) - lo) + beta + r
//   backward   dy f'(z) in place of dy, which is what dr is, too; z from x again, by the same roundings
//
// and for sets of rows, each with statistics of its own, and by weights w of the sum W, the same for all channels,
//
//   forward    mean = sum w x / W, var = sum w (x - mean)^2 / W, in which x is absent where w is 0
//   backward   dx = a (g - w (sum g / W + ((x - mean) invstd) invstd sum g (x - mean) / W))
//
// One kernel template. Each item, a channel or a tile of columns, is read by K blocks, its ranks. Twice: for sums, and
// for the map. What a thread reads flies into shared memory, past the registers, and stays there as far as there is room
// (`keep`): one read and one write forward, two reads and one write backward. The rest is read again, last first, because
// that is the likeliest to be in L2 still. Loops over vectors step pointers: on an H100 the addresses, by a division and
// products of 64 bits, took as long as the memory.
//
// Sums are right at any offset. A thread sums deviations from a pivot, and their squares, over a stretch of its
// elements; the stretch joins what came before by Chan, Golub & LeVeque (1983), and the pivot moves to the mean so far.
// The first stretch is one batch about its own mean, and no other is longer than all before it: a pivot that is D off
// costs a stretch's squares a few eps D^2 for each of its elements, but as many elements lie D off from the others, so
// the variance has D^2 for each of them, too. By weights that doesn't follow: each batch is summed about its own mean,
// found from its heaviest element on, and of two means that merge the heavier one counts as exact. Threads of a warp
// merge in the elements' own arithmetic, rows, blocks and ranks in float64, each in a fixed tree; sums that go beyond
// float32 are done again in float64. There are no float atomics, and every contraction is spelled out as fma (compile
// with -fmad=false): the same arguments, ranks, threads and tile give the same bits on every way.
#ifdef FASTBN_EMULATOR
#include "emulator.h"
#else
#define FASTBN_DEVICE __device__ __forceinline__
#define FASTBN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
#ifdef FASTBN_CLUSTER  // CLUSTER instances are compiled once for each size: then any launch call will do
#define FASTBN_DIMS __cluster_dims__(FASTBN_CLUSTER, 1, 1)
#else
#define FASTBN_DIMS
#endif
#ifndef FASTBN_ACTIVATION  // what a call asks for beyond batch norm; other code for each, plan.py's `options`
#define FASTBN_ACTIVATION LINEAR
#endif
#ifndef FASTBN_RESIDUAL  // 1: r is read
#define FASTBN_RESIDUAL 0
#endif
#ifndef FASTBN_DRESIDUAL  // 1: dr is written
#define FASTBN_DRESIDUAL 0
#endif
#ifndef FASTBN_SETS  // 1: sets of rows
#define FASTBN_SETS 0
#endif
#ifndef FASTBN_WEIGHTS  // NORMALIZE, ZERO or KEEP: by weights; and what is done where one is 0
#define FASTBN_WEIGHTS ABSENT
#endif

namespace fastbn {

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct f16 { u16 bits; };
struct bf16 { u16 bits; };

enum Layout {
  RUNS,     // an item is a channel: M runs of S elements, in whole vectors
  WINDOWS,  // the same where a run may start and end inside a vector: lanes outside the run are masked
  COLUMNS   // an item is a tile of columns of M rows; S columns a channel, `fold` times over
};
enum Way {
  BLOCK,    // K = 1: nothing to agree on
  CLUSTER,  // hardware cluster, distributed shared memory (sm_90 on)
  GRID,     // barriers in global memory, cooperative launch, any K
  STATS,    // the split path's first launch: partial sums to global memory
  APPLY     // and its second: from there on; alone, with frozen statistics
};
enum Activation { LINEAR, RELU, LEAKY_RELU, RELU6, ELU, SILU, GELU, SIGMOID, TANH, HARDSWISH };
enum Weights { ABSENT, NORMALIZE, ZERO, KEEP };
constexpr Activation ACTIVATION = FASTBN_ACTIVATION;
constexpr Weights WEIGHTS = FASTBN_WEIGHTS;
constexpr bool WEIGHTED = WEIGHTS != ABSENT, MASKED = WEIGHTS == ZERO || WEIGHTS == KEEP;
constexpr bool RESIDUAL = FASTBN_RESIDUAL, DRESIDUAL = FASTBN_DRESIDUAL, SETS = FASTBN_SETS;

struct Params {                    // packed by plan.py; 8-byte fields first, so that there is no padding
  const void *x, *dy;              // dy: backward. x may be null where only dx = a dy is wanted
  void *y;                         // y, or dx; null: sums only
  const void *r;                   // residual
  void *dr;                        // its gradient, or null
  double *table;                   // (6, C), of sets (6, sets C): hi, lo, var, invstd, gamma, beta. Written forward, read backward
  const void *gamma, *beta;        // (C,) or null; float64 if `wide`, else float32, as are
  const void *mean, *var;          // (C,), of sets (sets, C): given statistics, forward with `frozen`
  void *dgamma, *dbeta;            // the same of the number type, or null
  void *partials;                  // (slots, G, K) Partial, then (slots, K) counts
  u32 *barriers;                   // GRID: a word a group, zero before first use
  const i64 *starts, *order;       // sets: samples order[starts[s]] to order[starts[s + 1]], of `rows` rows each; without
                                   // order these themselves, without starts M rows each
  const void *w;                   // weights, S of a row, of the number type; 16-byte aligned. COLUMNS: S = fold = 1
  double *mass;                    // their sums, of sets (sets,). Written forward, read backward; null: frozen
  double eps, parameter;           // of the activation
  u64 wide;
  i64 x_row, x_step, x_channel, dy_row, dy_step, dy_channel;  // strides in bytes: of a row, of a thread's next vector as
  i64 y_row, y_step, y_channel, r_row, r_step, r_channel;     // far as it is whole rows (the rest: `rest`), of a channel
  i64 dr_row, dr_step, dr_channel, w_row, w_step;
  double count;                    // O I
  i64 M, S, per, rows;             // M: of the largest set; per: vectors, or rows of COLUMNS, of a rank
  int sets, tiles;                 // tiles: items of a set
  int C, items, K, slots;          // slots: vectors of an array that a thread has room for in shared memory
  int tx, ty, G, fold;             // COLUMNS: threads across and down; channels of an item; rows seen as one
  u32 vectors, multiplier, shift;  // RUNS, WINDOWS: vectors of a run, and how to divide by that
  u32 rest;                        // threads, modulo that
  u32 frozen, delay;               // delay: clock cycles by which the last group begins later than the first
};

// ---------------------------------------------------------------------------------------------------- number types

template <class T> struct NumberOf { typedef float type; };
template <> struct NumberOf<double> { typedef double type; };
template <class T> using Number = typename NumberOf<T>::type;  // elements are computed with in float32 or float64

#ifndef FASTBN_EMULATOR
FASTBN_DEVICE float up(f16 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits)); return r; }
FASTBN_DEVICE void down(f16 &d, float v) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d.bits) : "f"(v)); }
FASTBN_DEVICE u32 bits(float v) { return __float_as_uint(v); }
FASTBN_DEVICE float from_bits(u32 u) { return __uint_as_float(u); }
#else
FASTBN_DEVICE float up(f16 v) { return emulator::half_to_float(v.bits); }
FASTBN_DEVICE void down(f16 &d, float v) { d.bits = emulator::float_to_half(v); }
FASTBN_DEVICE u32 bits(float v) { return emulator::bits(v); }
FASTBN_DEVICE float from_bits(u32 u) { return emulator::from_bits(u); }
#endif
FASTBN_DEVICE float up(bf16 v) { return from_bits((u32)v.bits << 16); }
FASTBN_DEVICE float up(float v) { return v; }
FASTBN_DEVICE double up(double v) { return v; }
FASTBN_DEVICE void down(bf16 &d, float v) {  // to nearest, ties to even; a NaN stays one
  const u32 u = bits(v), rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  d.bits = (u16)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40 : rounded);
}
FASTBN_DEVICE void down(float &d, float v) { d = v; }
FASTBN_DEVICE void down(double &d, double v) { d = v; }
FASTBN_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTBN_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// --------------------------------------------------------------------------------------------------- memory access

template <int BYTES> struct Raw;  // what one access moves
template <> struct __align__(16) Raw<16> { u32 a, b, c, d; };
template <> struct __align__(8) Raw<8> { u32 a, b; };
template <> struct Raw<4> { u32 a; };
template <> struct Raw<2> { u16 a; };
template <class T, int V> union Vector {
  Raw<sizeof(T) * V> raw;
  T lane[V];
  FASTBN_DEVICE Vector() {}
};

#ifndef FASTBN_EMULATOR
// In asm, because the compiler takes vector accesses apart where it sees lanes. What is read once needn't fill L1.
FASTBN_DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
FASTBN_DEVICE void load(Raw<16> &r, const void *p) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.a), "=r"(r.b), "=r"(r.c), "=r"(r.d) : "l"(p));
}
FASTBN_DEVICE void load(Raw<8> &r, const void *p) {
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.a), "=r"(r.b) : "l"(p));
}
FASTBN_DEVICE void load(Raw<4> &r, const void *p) { asm volatile("ld.global.u32 %0, [%1];" : "=r"(r.a) : "l"(p)); }
FASTBN_DEVICE void load(Raw<2> &r, const void *p) { asm volatile("ld.global.u16 %0, [%1];" : "=h"(r.a) : "l"(p)); }
FASTBN_DEVICE void load(float &v, const float *p) { asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p)); }
FASTBN_DEVICE void load(double &v, const double *p) { asm volatile("ld.global.f64 %0, [%1];" : "=d"(v) : "l"(p)); }
// Results leave L2 first: what is read twice stays. 3 to 10 % of the time on an H100.
FASTBN_DEVICE void store(void *p, const Raw<16> &r) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(r.a), "r"(r.b), "r"(r.c), "r"(r.d) : "memory");
}
FASTBN_DEVICE void store(void *p, const Raw<8> &r) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(r.a), "r"(r.b) : "memory");
}
FASTBN_DEVICE void store(void *p, const Raw<4> &r) {
  asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(p), "r"(r.a) : "memory");
}
FASTBN_DEVICE void store(void *p, const Raw<2> &r) {
  asm volatile("st.global.cs.u16 [%0], %1;" ::"l"(p), "h"(r.a) : "memory");
}
FASTBN_DEVICE void load_shared(Raw<16> &r, const void *p) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.a), "=r"(r.b), "=r"(r.c), "=r"(r.d) : "r"(shared_address(p)));
}
FASTBN_DEVICE void store_shared(void *p, const Raw<16> &r) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};"
               ::"r"(shared_address(p)), "r"(r.a), "r"(r.b), "r"(r.c), "r"(r.d) : "memory");
}
template <int B> FASTBN_DEVICE void load_shared(Raw<B> &r, const void *p) { r = *(const Raw<B> *)p; }
template <int B> FASTBN_DEVICE void store_shared(void *p, const Raw<B> &r) { *(Raw<B> *)p = r; }
// Past the registers to shared memory, where it has landed when `landed` says so: all but the last LEFT groups.
template <int B> FASTBN_DEVICE void fly(void *to, const void *p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (B == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(p) : "memory");
  else if constexpr (B >= 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(p), "n"(B) : "memory");
  else
#endif
  {
    Raw<B> r;
    load(r, p);
    store_shared(to, r);
  }
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
FASTBN_DEVICE void take_off() { asm volatile("cp.async.commit_group;" ::: "memory"); }  // closes a group
template <int LEFT> FASTBN_DEVICE void landed() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
#else
FASTBN_DEVICE void take_off() {}
template <int LEFT> FASTBN_DEVICE void landed() {}
#endif
// Written by other blocks during this launch, hence not from L1.
FASTBN_DEVICE void load_fresh(Raw<16> &r, const void *p) {
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.a), "=r"(r.b), "=r"(r.c), "=r"(r.d) : "l"(p) : "memory");
}
// What the block wrote before is seen by who sees the arrival; what others wrote before theirs, by who polled it.
FASTBN_DEVICE u32 arrive(u32 *p, u32 v) {
  u32 old;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
FASTBN_DEVICE u32 poll(const u32 *p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FASTBN_DEVICE void hold(u32 cycles) {
  const i64 begin = clock64();
  while (clock64() - begin < cycles) asm volatile("nanosleep.u32 100;");
}
FASTBN_DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
FASTBN_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
FASTBN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
FASTBN_DEVICE void load_peer(Raw<16> &r, const void *p, int rank) {  // the same place in another block's shared memory
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.a), "=r"(r.b), "=r"(r.c), "=r"(r.d) : "r"(there) : "memory");
}
#else
FASTBN_DEVICE void cluster_arrive() {}
FASTBN_DEVICE void cluster_wait() {}
FASTBN_DEVICE void load_peer(Raw<16> &, const void *, int) {}
#endif
#else
template <int B> FASTBN_DEVICE void load(Raw<B> &r, const void *p) { emulator::load(&r, p, B); }
template <class A> FASTBN_DEVICE void load(A &v, const A *p) { emulator::load(&v, p, sizeof v); }
template <int B> FASTBN_DEVICE void store(void *p, const Raw<B> &r) { emulator::store(p, &r, B); }
template <int B> FASTBN_DEVICE void load_shared(Raw<B> &r, const void *p) { emulator::load_shared(&r, p, B); }
template <int B> FASTBN_DEVICE void store_shared(void *p, const Raw<B> &r) { emulator::store_shared(p, &r, B); }
template <int B> FASTBN_DEVICE void fly(void *to, const void *p) { emulator::fly(to, p, B); }
FASTBN_DEVICE void take_off() { emulator::take_off(); }
template <int LEFT> FASTBN_DEVICE void landed() { emulator::landed(LEFT); }
FASTBN_DEVICE void load_fresh(Raw<16> &r, const void *p) { emulator::load_fresh(&r, p, 16); }
FASTBN_DEVICE void load_peer(Raw<16> &r, const void *p, int rank) { emulator::load_peer(&r, p, 16, rank); }
FASTBN_DEVICE u32 arrive(u32 *p, u32 v) { return emulator::add(p, v); }
FASTBN_DEVICE u32 poll(const u32 *p) { return emulator::poll(p); }
FASTBN_DEVICE void hold(u32) {}
FASTBN_DEVICE void prefetch(const void *) {}
FASTBN_DEVICE void cluster_arrive() { emulator::cluster_arrive(); }
FASTBN_DEVICE void cluster_wait() { emulator::cluster_wait(); }
#endif

// A whole P from there, 16 bytes by 16.
template <class P> union Bytes {
  P value;
  Raw<16> raw[sizeof(P) / 16];
  FASTBN_DEVICE Bytes() {}
};
template <class P> FASTBN_DEVICE void fetch(Bytes<P> &to, const P *from) {
#pragma unroll
  for (int i = 0; i < (int)(sizeof(P) / 16); i++) load_fresh(to.raw[i], (const Raw<16> *)from + i);
}
template <class P> FASTBN_DEVICE void fetch_peer(Bytes<P> &to, const P *from, int rank) {
#pragma unroll
  for (int i = 0; i < (int)(sizeof(P) / 16); i++) load_peer(to.raw[i], (const Raw<16> *)from + i, rank);
}

// The K blocks of a group meet; all of them must be resident (cooperative launch). Rank 0 adds what makes the K
// arrivals flip the word's top bit and leave the rest as it was, so nothing is reset between rounds or launches.
FASTBN_DEVICE void group_barrier(u32 *word, int K, int rank) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const u32 old = arrive(word, rank == 0 ? 0x80000000u - (u32)(K - 1) : 1u);
    while (((old ^ poll(word)) & 0x80000000u) == 0) {}
  }
  __syncthreads();
}

// ------------------------------------------------------------------------------------------------------------ sums

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
// The sum over each `lanes` lanes that lie side by side, for all of them: the same bits, as addition commutes.
template <class M> FASTBN_DEVICE M sum_lanes(M v, int lanes) {
#pragma unroll 1
  for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// -------------------------------------------------------------------------------- the coefficients, and maps by them

// What maps need of a channel, in shared memory.
template <class A, bool BACKWARD> struct __align__(16) Coefficients { A hi, lo, a, beta; };
template <class A> struct __align__(16) Coefficients<A, true> { A hi, lo, a, beta, ghi, glo, invstd, slope; };

template <class T, bool B> FASTBN_DEVICE Number<T> deviation(const Coefficients<Number<T>, B> &k, T x) {
  return (up(x) - k.hi) - k.lo;
}
// What the activation is of. One function: backward sees the very sign that forward saw.
template <class T, bool B> FASTBN_DEVICE Number<T> linear(const Coefficients<Number<T>, B> &k, T x, T r) {
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
    case HARDSWISH: return z * six(z + 3) * (A)(1.0 / 6);
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
// The gradient by z, and whether it is a number of the elements' type wherever dy is one: then it is kept in dy's place.
template <class T, bool B>
FASTBN_DEVICE Number<T> by_z(const Coefficients<Number<T>, B> &k, T x, T dy, T r, Number<T> parameter) {
  return ACTIVATION == LINEAR ? up(dy) : up(dy) * slope(linear(k, x, r), parameter);
}
template <class T> constexpr bool IN_PLACE =
    ACTIVATION != LINEAR && (sizeof(T) == sizeof(Number<T>) || ACTIVATION == RELU || ACTIVATION == RELU6);

// The gradient by x. Frozen it is a g: it doesn't want x. By weights x is absent where w is 0.
template <class T, class A> FASTBN_DEVICE A by_x(const Coefficients<A, true> &k, T x, A g, bool wants_x, A w) {
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
// mass: forward, of the set's weights.
template <class S, class A>
FASTBN_DEVICE void conclude(const S &share, int c, const Sum<A, false> &s, double mass, bool report,
                            Coefficients<A, false> &k) {
  const Params &p = share.p;
  const i64 own = share.statistic(c);
  const double gamma = parameter(p.gamma, p.wide, share.parameter(c), 1);
  const double beta = parameter(p.beta, p.wide, share.parameter(c), 0);
  double hi, lo = 0, var;
  if (p.frozen) {
    hi = parameter(p.mean, p.wide, own, 0), var = parameter(p.var, p.wide, own, 1);
  } else {
    hi = (double)(A)(s.m + s.lo), lo = (s.m - hi) + s.lo, var = s.c / (WEIGHTED ? mass : share.count());
  }
  double invstd = 1 / sqrt(var + p.eps);
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
FASTBN_DEVICE void conclude(const S &share, int c, const Sum<A, true> &s, double, bool report,
                            Coefficients<A, true> &k) {
  const Params &p = share.p;
  const i64 own = share.statistic(c);  // a width kept in a register for all rows of the table spills others
  const double invstd = p.table[3 * share.statistics() + own], mean = s.m + s.lo, count = share.count();
  centre(k, p.table + own, share.statistics());
  k.invstd = (A)invstd;
  k.ghi = p.frozen ? (A)0 : (A)mean;
  k.glo = p.frozen ? (A)0 : (A)((s.m - (double)k.ghi) + s.lo);
  k.slope = p.frozen ? (A)0 : (A)(-invstd * (s.c / count));
  if (WEIGHTED && !p.frozen) {  // the mean of x - mean, by which c is less than the sum of products, isn't 0 here
    const double mass = p.mass[share.set], part = mass > 0 ? count / mass : 0;
    k.ghi = (A)(mean * part);
    k.glo = (A)((s.m * part - (double)k.ghi) + s.lo * part);
    k.slope = (A)(-invstd * (part * fma(mean, (double)s.e, s.c / count)));
  }
  if (report) {
    if (p.dgamma) ((A *)p.dgamma)[own] = (A)(invstd * fma(count * mean, (double)s.e, s.c));
    if (p.dbeta) ((A *)p.dbeta)[own] = (A)(count * mean);
  }
}

// What `conclude` will read of channel c comes into the cache.
template <bool BACKWARD, class S> FASTBN_DEVICE void foresee(const S &share, int c) {
  const Params &p = share.p;
  const i64 own = share.parameter(c) << (p.wide ? 3 : 2);
  if (!BACKWARD && p.gamma) prefetch((const char *)p.gamma + own);
  if (!BACKWARD && p.beta) prefetch((const char *)p.beta + own);
  if (BACKWARD)
    for (int i = 3; i < 6; i++) prefetch(p.table + i * share.statistics() + share.statistic(c));
}

// ---------------------------------------------------------------------------------------- what a thread has of an item

template <class P> FASTBN_DEVICE P *far(P *p, i64 bytes) { return (P *)((size_t)p + bytes); }

template <class T, int V, bool BACKWARD, int LAYOUT> struct Share {
  const Params &p;
  const T *x, *dy, *r;  // row 0 of the array, at the item's channel or this thread's columns
  T *y, *dr;
  int set, tile;    // the item's
  i64 begin, end;   // rows of the set
  i64 first;        // of this thread: vector of the channel, or row of COLUMNS
  int n;            // vectors of this thread
  int across;       // COLUMNS: this thread's place in the tile's rows

  // One of its vectors: where its run begins in each array, or in COLUMNS where it lies itself. Walked step by step: a
  // division and a product of 64 bits for each vector are as many instructions as its sums.
  struct Place {
    const T *x, *dy, *r;
    T *y, *dr;
    const Number<T> *w;
    u32 j;  // vector of the run
    int i;  // vector of the thread
  };

  // COLUMNS: rows of a rank.
  FASTBN_DEVICE i64 rows(int rank) const {
    const i64 left = height() - rank * p.per;
    return left < 0 ? 0 : left < p.per ? left : p.per;
  }
  FASTBN_DEVICE i64 elements(int rank) const {  // of a channel in a rank, where no lane is masked
    if (LAYOUT == COLUMNS) return rows(rank) * p.fold * p.S;
    const i64 left = height() * p.vectors - rank * p.per;
    return (left < 0 ? 0 : left < p.per ? left : p.per) * V;
  }
  FASTBN_DEVICE Share(const Params &params, int item, int rank) : p(params) {
    const int t = threadIdx.x, threads = blockDim.x;
    set = SETS ? item / p.tiles : 0, tile = SETS ? item % p.tiles : item;
    if (SETS) begin = set * p.M, end = begin + p.M;
    if (SETS && p.starts) begin = p.starts[set] * p.rows, end = p.starts[set + 1] * p.rows;
    const i64 skipped = (i64)rank * p.per;
    if (LAYOUT == COLUMNS) {
      across = t % p.tx;
      const int down = t / p.tx;
      const i64 column = ((i64)tile * p.tx + across) * V, left = rows(rank) - down;
      n = down < p.ty && left > 0 && column < (i64)p.fold * p.C * p.S ? (int)((left + p.ty - 1) / p.ty) : 0;
      first = skipped + down;
      x = (const T *)p.x + column, dy = (const T *)p.dy + column, y = (T *)p.y + column;
      if (RESIDUAL) r = (const T *)p.r + column;
      if (DRESIDUAL) dr = (T *)p.dr + column;
    } else {
      across = 0;
      i64 left = height() * p.vectors - skipped;
      left = left < p.per ? left : p.per;
      n = left > t ? (int)((left - t + threads - 1) / threads) : 0;
      first = skipped + t;
      x = far((const T *)p.x, tile * p.x_channel), dy = far((const T *)p.dy, tile * p.dy_channel);
      y = far((T *)p.y, tile * p.y_channel);
      if (RESIDUAL) r = far((const T *)p.r, tile * p.r_channel);
      if (DRESIDUAL) dr = far((T *)p.dr, tile * p.dr_channel);
    }
  }
  FASTBN_DEVICE i64 height() const { return SETS ? end - begin : p.M; }
  FASTBN_DEVICE double count() const { return SETS ? (double)height() * p.fold * p.S : p.count; }
  // Where channel c of the tile has its numbers: in gamma and beta, and in all else.
  FASTBN_DEVICE i64 parameter(int c) const { return (i64)tile * p.G + c; }
  FASTBN_DEVICE i64 statistic(int c) const { return SETS ? (i64)set * p.C + parameter(c) : parameter(c); }
  FASTBN_DEVICE i64 statistics() const { return SETS ? (i64)p.sets * p.C : p.C; }

  // The array's row that is row i of the set.
  FASTBN_DEVICE i64 row(i64 i) const {
    if (!SETS) return i;
    i += begin;
    if (!p.order) return i;
    if (p.rows == 1) return p.order[i];
    const i64 sample = i / p.rows;
    return p.order[sample] * p.rows + (i - sample * p.rows);
  }

  FASTBN_DEVICE Place at(int i) const {
    Place q;
    q.i = i, q.j = 0;
    i64 line = first + (i64)i * p.ty;  // of the set
    if (LAYOUT != COLUMNS) {
      const u32 j = (u32)first + (u32)i * blockDim.x, run = (u32)(((u64)__umulhi(j, p.multiplier) + j) >> p.shift);
      q.j = j - run * p.vectors, line = run;
    }
    line = SETS && (i < 0 || i >= n) ? 0 : row(line);
    q.x = far(x, line * p.x_row), q.dy = far(dy, line * p.dy_row), q.y = far(y, line * p.y_row);
    if (RESIDUAL) q.r = far(r, line * p.r_row);
    if (DRESIDUAL) q.dr = far(dr, line * p.dr_row);
    if (WEIGHTED) q.w = far((const Number<T> *)p.w, line * p.w_row);
    return q;
  }
  template <int BY> FASTBN_DEVICE void move(Place &q) const {  // BY: 1 or -1
    q.i += BY;
    if (SETS) {  // their rows may lie anywhere
      if (q.i >= 0 && q.i < n) q = at(q.i);
      return;
    }
    bool beyond = false;  // the run: the next one begins
    if (LAYOUT != COLUMNS) {
      q.j += BY * p.rest, beyond = q.j >= p.vectors;  // below 0, too
      if (beyond) q.j -= BY * p.vectors;
    }
    auto go = [&](auto &at, i64 step, i64 row) {
      at = far(at, BY * step);
      if (beyond) at = far(at, BY * row);
    };
    go(q.x, p.x_step, p.x_row), go(q.dy, p.dy_step, p.dy_row), go(q.y, p.y_step, p.y_row);
    if (RESIDUAL) go(q.r, p.r_step, p.r_row);
    if (DRESIDUAL) go(q.dr, p.dr_step, p.dr_row);
    if (WEIGHTED) go(q.w, p.w_step, p.w_row);
  }
  // Lanes that belong to the run. A window is read whole: it lies inside 16 aligned bytes, one of which is the run's.
  // One past the run isn't read.
  FASTBN_DEVICE int before(const Place &q) const { return (int)((size_t)(BACKWARD ? q.dy : q.x) % 16 / sizeof(T)); }
  FASTBN_DEVICE int begin_of(const Place &q) const { return LAYOUT == WINDOWS && q.j == 0 ? before(q) : 0; }
  FASTBN_DEVICE int end_of(const Place &q) const {
    if (LAYOUT != WINDOWS) return V;
    const i64 left = p.S + before(q) - (i64)q.j * V;
    return left < V ? (int)left : V;
  }
  FASTBN_DEVICE bool any(const Place &q) const { return LAYOUT != WINDOWS || begin_of(q) < end_of(q); }
  FASTBN_DEVICE bool has(const Place &q, int lane) const {
    return LAYOUT != WINDOWS || (lane >= begin_of(q) && lane < end_of(q));
  }
  template <class P> FASTBN_DEVICE P *vector(P *run, const Place &q) const {
    if (LAYOUT == COLUMNS) return run;
    return (LAYOUT == WINDOWS ? (P *)((size_t)run & ~(size_t)15) : run) + (i64)q.j * V;
  }
  // Weights of a vector, of which COLUMNS have one; 0 outside the run.
  template <int W> FASTBN_DEVICE void read_w(Number<T> (&w)[W], const Place &q) const {
    typedef Number<T> A;
    const A *from = q.w + (LAYOUT == WINDOWS ? (i64)q.j * V - before(q) : LAYOUT == RUNS ? (i64)q.j * V : 0);
    if constexpr (LAYOUT == RUNS) {
      constexpr int PART = sizeof(A) * V < 16 ? V : 16 / sizeof(A);
#pragma unroll
      for (int i = 0; i < V; i += PART) {
        Vector<A, PART> some;
        load(some.raw, from + i);
#pragma unroll
        for (int v = 0; v < PART; v++) w[i + v] = some.lane[v];
      }
    } else {
#pragma unroll
      for (int v = 0; v < W; v++) {
        w[v] = 0;
        if (has(q, v)) load(w[v], from + v);
      }
    }
  }
  FASTBN_DEVICE void write(T *run, const Vector<T, V> &a, const Place &q) const {
    T *to = vector(run, q);
    if (begin_of(q) == 0 && end_of(q) == V) return store(to, a.raw);
    if constexpr (LAYOUT == WINDOWS) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        if (!has(q, v)) continue;
        Vector<T, 1> one;
        one.lane[0] = a.lane[v];
        store(to + v, one.raw);
      }
    }
  }
  // The channel, within the item, of column c of the tile.
  FASTBN_DEVICE int channel(int c) const {
    if (LAYOUT != COLUMNS) return 0;
    if (p.fold > 1) c %= p.C * (int)p.S;
    return p.S == 1 ? c : c / (int)p.S;
  }
};

// A thread's vectors in shared memory, which no other thread reads or writes: AHEAD of them fly in past the registers
// while others are summed or mapped. An item's first `keep` stay for the second pass; those that don't take turns in the
// last AHEAD slots.
template <class T, int V, bool BACKWARD> struct Ring {
  typedef Vector<T, V> Vec;
  static constexpr int MOST = 64 / (int)sizeof(Vec) / (BACKWARD ? 2 : 1);
  static constexpr int AHEAD = MOST < 8 ? MOST : 8;  // plan.py's `ahead`
  Vec *x, *dy;          // slot 0
  int step, end, turn;  // from a slot to the next; behind the last one; where those begin that are taken in turns

  FASTBN_DEVICE int next(int slot) const { return slot + step < end ? slot + step : turn; }
  template <class S> FASTBN_DEVICE void send(const S &share, const typename S::Place &q, int slot, bool wants_x) const {
    if (!share.any(q)) return;
    if (wants_x) fly<sizeof(Vec)>(x + slot, share.vector(q.x, q));
    if (BACKWARD) fly<sizeof(Vec)>(dy + slot, share.vector(q.dy, q));
  }
};

template <bool B> struct Flag { static constexpr bool value = B; };

// Sums of the thread's vectors by stretches: forward of x, backward of g (dy, or by z) and of x - hi. N channels at
// once, n elements of each. In the ring, dy is g then where IN_PLACE, and not MASKED. By weights n is their sum; but
// backward adds up without them, with 0 for what is MASKED. `centre_of(k)` fills in hi, and what z needs: it is called
// when vectors fly already.
template <int BATCH, int N, class A, class T, int V, bool BACKWARD, int LAYOUT, class Centre>
FASTBN_DEVICE void sum_up(const Share<T, V, BACKWARD, LAYOUT> &share, const Ring<T, V, BACKWARD> &ring,
                          Sum<A, BACKWARD, A> (&sums)[N], Size<A, BACKWARD> &n, Centre centre_of) {
  constexpr bool SLOPED = BACKWARD && ACTIVATION != LINEAR, APART = SLOPED && !IN_PLACE<T>;
  constexpr bool BY_WEIGHT = WEIGHTED && !BACKWARD, READS_W = BACKWARD ? MASKED : WEIGHTED;
  constexpr int W = LAYOUT == COLUMNS ? 1 : V;
  constexpr int ABREAST = BACKWARD && LAYOUT == WINDOWS ? 2 : 4;  // as many as registers are left for
  constexpr int LANES = N > 1 ? N : V < ABREAST ? V : ABREAST;    // sums side by side: of N channels, or parts of one's
  constexpr int FULL = BATCH * V / N;                             // elements of a channel in a full batch
  constexpr int BATCHES = FULL < 32 ? 32 / FULL : 1;              // of a stretch, at most
  constexpr int STAGES = Ring<T, V, BACKWARD>::AHEAD / BATCH;     // batches in flight
  typedef Size<A, BACKWARD> Amount;
  Coefficients<A, false> k[N];
  A pivot[N], rest[N], other[N], product[N];  // of all before: mean = pivot + rest, that of x - hi, sum of products
  A s[LANES], e[LANES], q[LANES];             // of the stretch: sums of d = first - pivot, of second, of d second
  Amount have = 0, more = 0;                  // elements of each channel: before, in the stretch
#pragma unroll
  for (int j = 0; j < N; j++) pivot[j] = rest[j] = other[j] = product[j] = 0;
#pragma unroll
  for (int l = 0; l < LANES; l++) s[l] = e[l] = q[l] = 0;

  // b elements join what came before: their mean is centre + mean, `own` their products about it.
  auto take = [&](Amount b, const A (&centre)[N], const A (&mean)[N], const A (&second)[N], const A (&own)[N]) {
    const A f = have == 0 ? (A)1 : have == b ? (A)0.5 : (A)(b / (have + b)), w = (A)(have * f);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const A step = (centre[j] - pivot[j]) + (mean[j] - rest[j]), second_step = BACKWARD ? second[j] - other[j] : step;
      product[j] += multiply_add(step * w, second_step, own[j]);
      if (BACKWARD) other[j] = multiply_add(second_step, f, other[j]);
      if (BY_WEIGHT && b > have) {
        pivot[j] = centre[j], rest[j] = multiply_add(-step, (A)(have / (have + b)), mean[j]);
      } else {
        rest[j] = multiply_add(step, f, rest[j]);
      }
      const A moved = pivot[j] + rest[j], way = moved - pivot[j];  // by Knuth's two-sum: pivot + rest is as before
      rest[j] = (pivot[j] - (moved - way)) + (rest[j] - way);
      pivot[j] = moved;
    }
    have += b;
  };
  auto join = [&]() {  // the stretch joins what came before
    if (BY_WEIGHT || more == 0) return;
    const A inverse = 1 / (A)more;
    A mean[N], second[N], own[N], centre[N];
#pragma unroll
    for (int l = 1; l < LANES / N; l++) s[0] += s[l], q[0] += q[l], e[0] += e[l];
#pragma unroll
    for (int j = 0; j < N; j++) {
      centre[j] = pivot[j], mean[j] = s[j] * inverse, second[j] = BACKWARD ? e[j] * inverse : mean[j];
      own[j] = multiply_add(-s[j], second[j], q[j]);
    }
    take(more, centre, mean, second, own);
#pragma unroll
    for (int l = 0; l < LANES; l++) s[l] = e[l] = q[l] = 0;
    more = 0;
  };
  // The batch at hand; whole: of BATCH vectors, else of those that are left.
  typename Share<T, V, BACKWARD, LAYOUT>::Place here = share.at(0);
  int slot = 0;
  auto batch = [&](int i, auto whole, bool first_of_all) {
    constexpr bool WHOLE = decltype(whole)::value;
    Vector<T, V> a[BATCH], d[BATCH], r[BATCH];
    A g[BATCH][V], weight[BATCH][W];
    u32 lanes[BATCH];  // WINDOWS: bits of those that count
    int slots[BATCH];
    auto there = [&](int u) { return WHOLE || i + u < share.n; };
    int size = 0;  // elements of a channel in this batch
#pragma unroll
    for (int u = 0; u < BATCH; u++) {
      lanes[u] = 0;
      if (!there(u)) continue;
      slots[u] = slot, slot = ring.next(slot);
      if (share.any(here)) {
        lanes[u] = (1u << share.end_of(here)) - (1u << share.begin_of(here));
        size += LAYOUT == COLUMNS ? 1 : share.end_of(here) - share.begin_of(here);
        if (SLOPED && RESIDUAL) load(r[u].raw, share.vector(here.r, here));
        if (READS_W) share.read_w(weight[u], here);
      }
      share.template move<1>(here);
    }
    auto has = [&](int u, int v) { return LAYOUT != WINDOWS || (lanes[u] >> v & 1); };
    landed<STAGES - 1>();
#pragma unroll
    for (int u = 0; u < BATCH; u++) {
      if (!there(u)) continue;
      load_shared(a[u].raw, ring.x + slots[u]);
      if (BACKWARD) load_shared(d[u].raw, ring.dy + slots[u]);
    }
    auto absent = [&](int u, int v) { return MASKED && weight[u][W == 1 ? 0 : v] == 0; };
    if (LAYOUT == WINDOWS && size == 0) return;
    if constexpr (SLOPED) {
#pragma unroll
      for (int u = 0; u < BATCH; u++) {
        if (!there(u)) continue;
#pragma unroll
        for (int v = 0; v < V; v++) {
          g[u][v] = by_z(k[N == 1 ? 0 : v], a[u].lane[v], d[u].lane[v], r[u].lane[v], (A)share.p.parameter);
          if (!APART && !absent(u, v)) down(d[u].lane[v], g[u][v]);
        }
        if (!APART) store_shared(ring.dy + slots[u], d[u].raw);
      }
    }

    // f(lane, channel, first, second, weight) for every element: (x, unused), or (g, x - hi)
    auto each = [&](auto f) {
#pragma unroll
      for (int u = 0; u < BATCH; u++) {
        if (!there(u)) continue;
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (!has(u, v)) continue;
          const int l = v % LANES, j = N == 1 ? 0 : v;
          const A value = up(a[u].lane[v]), h = BY_WEIGHT ? weight[u][W == 1 ? 0 : v] : (A)1;
          if (BY_WEIGHT && h == 0) continue;
          if (BACKWARD && absent(u, v)) f(l, j, (A)0, (A)0, h);
          else if (BACKWARD) f(l, j, APART ? g[u][v] : up(d[u].lane[v]), value - k[j].hi, h);
          else f(l, j, value, (A)0, h);
        }
      }
    };
    if constexpr (BY_WEIGHT) {
      Amount b = 0;
#pragma unroll
      for (int u = 0; u < BATCH; u++) {
        if (!there(u) || (LAYOUT == WINDOWS && lanes[u] == 0)) continue;
        A of = 0;
#pragma unroll
        for (int v = 0; v < W; v++) of += weight[u][v];
        b += of;
      }
      if (b == 0) return;
      A heaviest[N], centre[N], mean[N], own[N];
#pragma unroll
      for (int j = 0; j < N; j++) heaviest[j] = centre[j] = mean[j] = own[j] = 0;
      each([&](int, int j, A first, A, A h) {
        if (h > heaviest[j]) heaviest[j] = h, centre[j] = first;
      });
      each([&](int, int j, A first, A, A h) { mean[j] = multiply_add(h, first - centre[j], mean[j]); });
#pragma unroll
      for (int j = 0; j < N; j++) mean[j] = mean[j] / (A)b;
      each([&](int, int j, A first, A, A h) {
        const A from = (first - centre[j]) - mean[j];
        own[j] = multiply_add(h * from, from, own[j]);
      });
      take(b, centre, mean, mean, own);
    } else {
      more += (A)(WHOLE && LAYOUT != WINDOWS ? FULL : size);
      if (first_of_all) {  // about the mean of this batch, from some element on: a constant is its own mean
        each([&](int, int j, A first, A, A) { pivot[j] = first; });
        each([&](int l, int j, A first, A, A) { s[l] += first - pivot[j]; });
#pragma unroll
        for (int l = 1; l < LANES / N; l++) s[0] += s[l], s[l] = 0;
#pragma unroll
        for (int j = 0; j < N; j++) pivot[j] += s[j] / (A)more, s[j] = 0;
      }
      each([&](int l, int j, A first, A second, A) {
        const A from = first - pivot[j];
        s[l] += from;
        if (BACKWARD) e[l] += second;
        q[l] = multiply_add(from, BACKWARD ? second : from, q[l]);
      });
    }
  };
  // A group of vectors flies for each batch, STAGES of them before the first is summed: then a batch's group isn't among
  // the last STAGES - 1. What else there is room for flies in one more.
  typename Share<T, V, BACKWARD, LAYOUT>::Place there = share.at(0);
  int to = 0, wanted = share.n;
  auto send = [&]() {
#pragma unroll
    for (int u = 0; u < BATCH; u++) {
      if (wanted <= 0) continue;
      ring.send(share, there, to, true);
      share.template move<1>(there), to = ring.next(to), wanted--;
    }
  };
#pragma unroll 1
  for (int stage = 0; stage < STAGES; stage++) send(), take_off();
  if (share.n * ring.step <= ring.end) {
#pragma unroll 1
    while (wanted > 0) send();
    take_off();
  }
  centre_of(k);
  int left = 1, length = 1;  // batches until the stretch is over, and of the next one
#pragma unroll 1
  for (int i = 0; i < share.n; i += BATCH) {
    if (i + BATCH <= share.n) {
      batch(i, Flag<true>(), have == 0 && more == 0);
      if (--left == 0) {
        join();
        left = length, length = 2 * length < BATCHES ? 2 * length : BATCHES;
      }
    } else {
      batch(i, Flag<false>(), have == 0 && more == 0);
    }
    send(), take_off();
  }
  join();
  n = have;
#pragma unroll
  for (int j = 0; j < N; j++) {
    sums[j].m = pivot[j], sums[j].lo = rest[j];
    sums[j].e = other[j], sums[j].c = product[j];
  }
}

// Forward once more, element by element in float64.
template <int N, class A, class T, int V, int LAYOUT>
FASTBN_DEVICE void sum_up_wide(const Share<T, V, false, LAYOUT> &share, Sum<A, false> (&sums)[N], Size<A, false> &n) {
  constexpr int W = LAYOUT == COLUMNS ? 1 : V;
  n = 0;
#pragma unroll 1
  for (int i = 0; i < share.n; i++) {
    const auto q = share.at(i);
    if (!share.any(q)) continue;
    Vector<T, V> a;
    A weight[W], h = 1;
    load(a.raw, share.vector(q.x, q));
    if (WEIGHTED) share.read_w(weight, q);
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (!share.has(q, v)) continue;
      if (WEIGHTED) h = weight[W == 1 ? 0 : v];
      if (WEIGHTED && h == 0) continue;
      Sum<A, false> one;
      one.m = up(a.lane[v]);
      merge(sums[N > 1 ? v : 0], n, one, h);
      if (N == 1 || v == N - 1) n += h;
    }
  }
}

// ------------------------------------------------------------------------------------------------------- the kernel

template <class T, int V, bool BACKWARD, int LAYOUT, int WAY>
__global__ void FASTBN_DIMS __launch_bounds__(sizeof(T) == 8 ? 512 : 1024, 1) bn(const __grid_constant__ Params p) {
  typedef Number<T> A;
  typedef Vector<T, V> Vec;
  typedef Partial<A, BACKWARD> Part;
  typedef Coefficients<A, BACKWARD> Coef;
  typedef Size<A, BACKWARD> Amount;
  constexpr int N = LAYOUT == COLUMNS ? V : 1;  // channels that a thread sees at once
  // Vectors of each array that a thread sums at once, as many as 64 registers hold (128 of float64).
  constexpr bool WIDE = sizeof(T) == 8;
  constexpr bool SLOPED = BACKWARD && ACTIVATION != LINEAR, READS_R = RESIDUAL && (!BACKWARD || SLOPED);
  constexpr bool READS_W = WEIGHTED && (BACKWARD || MASKED);  // in the second pass
  constexpr int W = LAYOUT == COLUMNS ? 1 : V;                // weights of a vector
  constexpr int FEWER = (BACKWARD ? 2 : 1) * (SLOPED || (LAYOUT == COLUMNS) != WEIGHTED ? 2 : 1);
  constexpr int AHEAD = Ring<T, V, BACKWARD>::AHEAD, MOST = 32 / (int)sizeof(Vec) / FEWER;
  constexpr int BATCH = MOST < 1 ? 1 : MOST < AHEAD ? MOST : AHEAD;
  constexpr int RANKS = WIDE ? 1 : WEIGHTED ? 2 : 4;  // other ranks' sums that a thread loads at once
  constexpr bool AGAIN_WIDE = !BACKWARD && !WIDE, BY_WEIGHT = WEIGHTED && !BACKWARD;
  const int t = threadIdx.x, threads = blockDim.x, lane = t & 31, warp = t >> 5, warps = threads >> 5;
  const int K = p.K, rank = blockIdx.x % K, group = blockIdx.x / K, groups = gridDim.x / K, G = p.G;

  // Shared memory: part (G), count (1), coefficients (G), row counts (rows), row sums (rows, pitch), rings of dy and x.
  // A row is a warp where the warp's threads of a column meet in shuffles first, else a row of threads.
  FASTBN_SHARED(shared);
  const bool by_warp = LAYOUT != COLUMNS || 32 % p.tx == 0;
  const int rows = by_warp ? warps : p.ty;
  const int pitch = LAYOUT == COLUMNS ? p.tx * V + 1 : 1;  // a row's; the odd one keeps rows in other banks
  int lanes = 32;  // threads that merge the sums of one channel
  while (lanes > 1 && lanes * G > threads) lanes /= 2;
  Part *part = (Part *)shared;
  Count *part_count = (Count *)(part + G);
  Coef *coefficients = (Coef *)(part_count + 1);
  Amount *row_count = (Amount *)(coefficients + G);
  unsigned char *row_parts = (unsigned char *)row_count + (rows * sizeof(Amount) + 15) / 16 * 16;
  Ring<T, V, BACKWARD> ring;
  ring.dy = (Vec *)(row_parts + rows * pitch * sizeof(Part)) + t;
  ring.x = ring.dy + (BACKWARD ? p.slots * threads : 0);
  ring.step = threads, ring.end = p.slots * threads;
  const bool centred = !p.frozen, wants_x = !BACKWARD || SLOPED || centred;  // in the second pass

  // Groups that read, agree and write at the same time leave memory idle while they all agree: 0.82 to 1.04 of the time
  // where they begin apart, on an H100.
  if (WAY == GRID && p.delay) {
    if (t == 0) hold((u32)((u64)p.delay * group / groups));
    __syncthreads();
  }
  for (int item = group, round = 0; item < p.items; item += groups, round ^= 1) {
    const Share<T, V, BACKWARD, LAYOUT> share(p, item, rank);
    const bool fits = share.n <= p.slots;
    const int keep = WAY == STATS || WAY == APPLY ? 0 : fits ? share.n : p.slots - AHEAD;
    ring.turn = fits ? 0 : keep * threads;
    for (int g = t; g < G && share.parameter(g) < p.C; g += threads) foresee<BACKWARD>(share, g);

    // Ranks' sums. GRID: two sets of them, because those of a round are still read while the next round's are written.
    const i64 slot = WAY == GRID ? round * groups + group : item;
    const i64 slots = WAY == GRID ? 2 * groups : p.items;
    Part *partials = (Part *)p.partials + slot * G * K;
    Amount *counts = (Amount *)((Part *)p.partials + slots * G * K) + slot * K;
    auto finish = [&](int g, const Sum<A, BACKWARD> &s, Amount n) {  // in the place of what will be made of it
      shut(*(Part *)(coefficients + g), s);
      if (g == 0) part_count->all = (double)n;
    };

    // The second pass goes from the last vector to the first, because the last ones are the likeliest to be in L2 still.
    // What isn't kept flies in again, the first of it while sums are merged.
    const int again = WAY != STATS && (p.y || (DRESIDUAL && p.dr)) ? share.n - keep : 0;
    auto look_back = [&]() {
      auto q = share.at(share.n - 1);
      int slot = keep * threads;
#pragma unroll 1
      for (int i = 0; i < AHEAD && again > 0; i++) {
        if (i < again) ring.send(share, q, slot, wants_x);
        take_off(), slot = ring.next(slot), share.template move<-1>(q);
      }
    };
    if (WAY == APPLY) look_back();

    if (WAY != APPLY) {
      // ---- first pass: this thread's sums
      // Backward sums x - hi; that its mean is lo's, too, counts once, behind the loop.
      auto numbers = [&](int j) { return p.table + share.statistic(share.channel(share.across * V + j)); };
      Amount n;
      Sum<A, BACKWARD, A> sums[N];
      A off[N];
      sum_up<BATCH>(share, ring, sums, n, [&](auto &k) {
#pragma unroll
        for (int j = 0; j < N; j++) {
          k[j].hi = off[j] = 0;
          if (!BACKWARD || !share.n) continue;
          const double hi = *numbers(j), lo = numbers(j)[share.statistics()];
          k[j].hi = (A)hi, off[j] = (A)((hi - (double)k[j].hi) + lo);
          if (SLOPED) centre(k[j], numbers(j), share.statistics());
        }
      });
#pragma unroll
      for (int j = 0; j < N; j++) sums[j].e -= off[j];
      look_back();

      // ---- the block's: warps by shuffles, then a channel's rows and columns, by `lanes` threads each
      auto block = [&](auto &s) {
        typedef decltype(s[0].m) M;
        typedef Partial<A, BACKWARD, M> Row;
        Row *row_part = (Row *)row_parts;
        const int last = LAYOUT == COLUMNS ? p.tx : 1;
        if (by_warp) merge_lanes(s, n, last);
        const int row = by_warp ? warp : t / p.tx;
        if (by_warp ? lane < last : row < p.ty) {
          if (share.across == 0) row_count[row] = n;
#pragma unroll
          for (int j = 0; j < N; j++) shut(row_part[row * pitch + share.across * N + j], s[j]);
        }
        __syncthreads();
        const int cells = LAYOUT == COLUMNS ? p.fold * (int)p.S : 1, width = p.C * (int)p.S;  // columns of a channel
        const int down = cells > 1 ? lanes / cells : lanes, across = cells > 1 ? lanes % cells : 0;
        int some = 0;  // a row that has elements if any has: the first, by weights the heaviest
        for (int r = 1; BY_WEIGHT && r < rows; r++)
          if (row_count[r] > row_count[some]) some = r;
        bool beyond = false;
#pragma unroll 1
        for (int g = t / lanes; g - lane / lanes < G; g += threads / lanes) {
          auto at = [&](int r, int c) -> const Row & {
            const int S = (int)p.S;
            return row_part[r * pitch + (p.fold == 1 ? g * cells + c : c / S * width + g * S + c % S)];
          };
          auto each = [&](auto f) {
            int r = t % lanes, c = 0;
            if (cells > 1) c = r % cells, r /= cells;
#pragma unroll 1
            while (g < G && r < rows) {
              Sum<A, BACKWARD, M> s;
              open(s, at(r, c));
              f(row_count[r], s);
              r += down, c += across;
              if (c >= cells) c -= cells, r++;
            }
          };
          // Two rounds: means, relative to one of them, then products about the mean. In float64: these are few.
          const M from = g < G ? at(some, 0).m : (M)0;
          Amount n = 0;
          double mean = 0, products = 0, e = 0;
          each([&](Amount k, const Sum<A, BACKWARD, M> &s) {
            n += k;
            mean = fma((double)k, ((double)s.m - (double)from) + (double)s.lo, mean);
            if (BACKWARD) e = fma((double)k, (double)s.e, e);
          });
          n = sum_lanes(n, lanes);
          const double one_of = n > 0 ? 1 / (double)n : 0;
          mean = sum_lanes(mean, lanes) * one_of;
          if (BACKWARD) e = sum_lanes(e, lanes) * one_of;
          each([&](Amount k, const Sum<A, BACKWARD, M> &s) {
            const double d = (((double)s.m - (double)from) + (double)s.lo) - mean;
            products += fma((double)k * d, BACKWARD ? (double)s.e - e : d, (double)s.c);
          });
          products = sum_lanes(products, lanes);
          if (g >= G || t % lanes) continue;
          Sum<A, BACKWARD> total;
          total.m = sizeof(A) == 8 ? (double)from : (double)from + mean;
          total.lo = sizeof(A) == 8 ? mean : 0;
          total.e = (A)e, total.c = products;
          if constexpr (AGAIN_WIDE) {
            Part &found = *(Part *)(coefficients + g);  // until there are any
            Sum<A, BACKWARD> narrow;
            if (sizeof(M) > sizeof(A)) open(narrow, found);
            if (sizeof(M) > sizeof(A) && finite(narrow)) continue;
            shut(found, total);
            beyond |= !finite(total);
          }
          if (WAY == BLOCK) finish(g, total, n);
          if (WAY == CLUSTER) shut(part[g], total);
          if (WAY == STATS || WAY == GRID) shut(partials[(i64)g * K + rank], total);
          if (WAY == CLUSTER && g == 0) part_count->n = (double)n;
          if ((WAY == STATS || WAY == GRID) && g == 0) counts[rank] = n;
        }
        return beyond;
      };
      if constexpr (AGAIN_WIDE) {
        if (__syncthreads_or(block(sums))) {
          Sum<A, BACKWARD> wide[N];
          sum_up_wide(share, wide, n);
          block(wide);
        }
      } else {
        block(sums);
      }
    }
    if (WAY == STATS) continue;
    if (WAY == CLUSTER) { cluster_arrive(); cluster_wait(); }
    if (WAY == GRID) group_barrier(p.barriers + group, K, rank);
    // ---- all ranks: every block adds up the same partials in the same order, relative to the mean of one of them, in
    // float64: what the difference at the end cancels is less than the number of ranks
    if (WAY != BLOCK) {
      auto count_of = [&](int r) {
        if (!WEIGHTED && LAYOUT != WINDOWS) return (Amount)share.elements(r);
        if (WAY != CLUSTER) return ((const volatile Amount *)counts)[r];
        Bytes<Count> of;
        fetch_peer(of, part_count, r);
        return (Amount)of.value.n;
      };
      auto part_of = [&](Bytes<Part> &of, int g, int r) {
        if (WAY == CLUSTER) fetch_peer(of, part + g, r);
        else fetch(of, partials + (i64)g * K + r);
      };
      const bool given = WAY != APPLY || p.partials;  // without: frozen, and no sums are wanted
      int some = 0;                                   // a rank that has elements if any has, as above
      if (BY_WEIGHT && given) {
        Amount most = 0;
        for (int r = 0; r < K; r++)
          if (const Amount k = count_of(r); k > most) most = k, some = r;
      }
#pragma unroll 1
      for (int g = t / lanes; g - lane / lanes < G; g += threads / lanes) {
        Sum<A, BACKWARD> first, total;
        double n = 0, mean = 0, products = 0, e = 0;
        if (given && g < G) {
          Bytes<Part> from;
          part_of(from, g, some), open(first, from.value);
#pragma unroll 1
          for (int r = t % lanes; r < K; r += lanes * RANKS) {
            Bytes<Part> parts[RANKS];
            Amount k[RANKS];
#pragma unroll
            for (int u = 0; u < RANKS; u++) {
              k[u] = 0;
              if (u > 0 && r + lanes * u >= K) continue;
              part_of(parts[u], g, r + lanes * u);
              k[u] = count_of(r + lanes * u);
            }
#pragma unroll
            for (int u = 0; u < RANKS; u++) {
              if (k[u] == 0) continue;
              Sum<A, BACKWARD> s;
              open(s, parts[u].value);
              const double d = (s.m - first.m) + (s.lo - first.lo), w = (double)k[u];
              n += w, mean = fma(w, d, mean);
              if (BACKWARD) e = fma(w, (double)s.e, e);
              products += fma(w * d, BACKWARD ? (double)s.e : d, (double)s.c);
            }
          }
        }
        n = sum_lanes(n, lanes), mean = sum_lanes(mean, lanes), products = sum_lanes(products, lanes);
        if (BACKWARD) e = sum_lanes(e, lanes);
        if (g >= G || t % lanes) continue;
        const double one_of = n > 0 ? 1 / n : 0;
        total.c = fma(-mean * one_of, BACKWARD ? e : mean, products);
        total.e = (A)(e * one_of), mean *= one_of;
        total.m = sizeof(A) == 8 ? first.m : first.m + mean;
        total.lo = sizeof(A) == 8 ? first.lo + mean : 0;
        finish(g, total, (Amount)n);
      }
    }
    __syncthreads();
    if (WAY == CLUSTER) cluster_arrive();  // this block has read its peers
    for (int g = t; g < G && share.parameter(g) < p.C; g += threads) {  // by warps full of channels: it is long
      Sum<A, BACKWARD> s;
      open(s, *(const Part *)(coefficients + g));
      conclude(share, g, s, part_count->all, rank == 0, coefficients[g]);
    }
    __syncthreads();

    // ---- second pass: the map
    if (p.y || (DRESIDUAL && p.dr)) {
      Coef k[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        const int g = share.channel(share.across * V + j);
        k[j] = coefficients[g < G ? g : 0];
      }
      auto emit = [&](const typename Share<T, V, BACKWARD, LAYOUT>::Place &q, int slot, auto is_kept) {
        constexpr bool KEPT = decltype(is_kept)::value;
        if (!share.any(q)) return;
        Vec a, d, r, to, dr;
        A weight[W];
        if (READS_R && !(BACKWARD && IN_PLACE<T> && KEPT)) load(r.raw, share.vector(q.r, q));
        if (READS_W) share.read_w(weight, q);
        if (!KEPT) landed<AHEAD - 1>();
        if (wants_x) load_shared(a.raw, ring.x + slot);
        if (BACKWARD) load_shared(d.raw, ring.dy + slot);
#pragma unroll
        for (int v = 0; v < V; v++) {
          const Coef &own = k[N == 1 ? 0 : v];
          const A h = READS_W ? weight[W == 1 ? 0 : v] : (A)1;
          const bool absent = MASKED && h == 0;
          if constexpr (BACKWARD) {
            constexpr bool DONE = !SLOPED || (KEPT && IN_PLACE<T>);
            A g = DONE ? up(d.lane[v]) : by_z(own, a.lane[v], d.lane[v], r.lane[v], (A)p.parameter);
            if (absent) g = 0;
            down(to.lane[v], by_x(own, a.lane[v], g, centred, h));
            down(dr.lane[v], g);
            if (absent && WEIGHTS == KEEP) to.lane[v] = d.lane[v];
          } else {
            const A y = activate(linear(own, a.lane[v], r.lane[v]), (A)p.parameter);
            down(to.lane[v], absent ? (A)0 : y);
            if (absent && WEIGHTS == KEEP) to.lane[v] = a.lane[v];
          }
        }
        if (!DRESIDUAL || p.y) share.write(q.y, to, q);
        if (DRESIDUAL && p.dr) share.write(q.dr, dr, q);
      };
      auto q = share.at(share.n - 1), back = share.at(share.n - 1 - AHEAD);
#pragma unroll 1
      for (int i = 0, slot = keep * threads; i < again; i++) {
        emit(q, slot, Flag<false>());
        if (i + AHEAD < again) ring.send(share, back, slot, wants_x);
        take_off(), slot = ring.next(slot), share.template move<-1>(q), share.template move<-1>(back);
      }
#pragma unroll 1
      for (int slot = (keep - 1) * threads; slot >= 0; slot -= threads) {
        emit(q, slot, Flag<true>());
        share.template move<-1>(q);
      }
    }
    if (WAY == CLUSTER) cluster_wait();  // its peers have read it: it may leave
  }
}

}  // namespace fastbn
