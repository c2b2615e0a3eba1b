// Options of the compiler, the argument, number types, access to memory, barriers of blocks. Included by bn.cu.
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
#ifndef FASTBN_ACTIVATION  // what a call asks for beyond batch norm; other code for each, walk.py's `options`
#define FASTBN_ACTIVATION LINEAR
#endif
#ifndef FASTBN_RESIDUAL  // 1: r is read
#define FASTBN_RESIDUAL 0
#endif
#ifndef FASTBN_DRESIDUAL  // 1: dr is written
#define FASTBN_DRESIDUAL 0
#endif
#ifndef FASTBN_INVERSE  // 1: backward has y in place of x; its table is of what the activation is of
#define FASTBN_INVERSE 0
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
constexpr bool INVERSE = FASTBN_INVERSE;

struct Divisor {  // of any 32-bit number: Granlund & Montgomery (1994). The compiler's own takes 25 instructions
  u32 by, multiplier, shift;
  FASTBN_DEVICE u32 of(u32 n) const { return (u32)(((u64)__umulhi(n, multiplier) + n) >> shift); }
};

struct Params {                    // packed by launches.py; 8-byte fields first, so that there is no padding
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
  double count, one_of;            // O I, and 1 / that
  i64 M, S, per, rows;             // M: of the largest set; per: vectors, or rows of COLUMNS, of a rank
  int sets, tiles;                 // tiles: items of a set
  int C, items, slots, ty;         // slots: vectors of an array that a thread has room for in shared memory; ty: COLUMNS:
  int G, fold;                     // threads down; G: channels of an item; fold: rows seen as one
  u32 lanes, rest;                 // lanes: threads that merge the sums of a channel, as a power of 2; rest: of `move`
  u32 frozen, delay;               // delay: clock cycles by which the last group begins later than the first
  Divisor ranks, across;           // K; COLUMNS: threads across
  Divisor apart, inner;            // rows, or vectors, from one of a thread's to its next; columns of a channel (fold S),
                                   // or vectors of a run
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
FASTBN_DEVICE void cluster_arrive() { emulator::cluster_arrive(); }
FASTBN_DEVICE void cluster_wait() { emulator::cluster_wait(); }
#endif

// All but the last `left` groups, or more of them.
FASTBN_DEVICE void landed_but(int left) {
  switch (left) {
    case 0: return landed<0>();
    case 1: return landed<1>();
    case 2: return landed<2>();
    case 3: return landed<3>();
    case 4: return landed<4>();
    case 5: return landed<5>();
    case 6: return landed<6>();
    default: return landed<7>();
  }
}

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

}  // namespace fastbn
