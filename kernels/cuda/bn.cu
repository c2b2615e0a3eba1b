// Batch normalization, forward and backward, for arrays (O, C, I). One source for NVRTC, nvcc and, in the tests, g++.
// No includes on the device: <cooperative_groups.h> alone costs NVRTC 1.6 s.
//
//   forward    y  = a ((x - hi) - lo) + beta                                       a = gamma invstd, hi + lo = mean x
//   backward   dx = a (((dy - ghi) - glo) - (((x - hi) - lo) invstd) invstd cov)   cov of dy and x, ghi + glo = mean dy
//
// and, by options of the compiler, with a residual r and an activation f
//
//   forward    y  = f(z)     z = a ((x - hi) - lo) + beta + r
//   backward   dy f'(z) in place of dy, which is what dr is, too; z from x again, by the same roundings, or from y
//
// and for sets of rows, each with statistics of its own, and by weights w of the sum W, the same for all channels,
//
//   forward    mean = sum w x / W, var = sum w (x - mean)^2 / W, in which x is absent where w is 0
//   backward   dx = a (g - w (sum g / W + ((x - mean) invstd) invstd sum g (x - mean) / W))
//
// One kernel template, whose parts are in memory.cuh, sums.cuh, maps.cuh and share.cuh. Each item, a channel or a tile
// of columns, is read by K blocks, its ranks. Twice: for sums, and for the map. What a thread reads flies into shared
// memory, past the registers, and stays there as far as there is room (`keep`): one read and one write forward, two
// reads and one write backward. The rest is read again, last first, because that is the likeliest to be in L2 still.
// Loops over vectors step pointers: on an H100 the addresses, by a division and products of 64 bits, took as long as
// the memory.
//
// Sums are right at any offset. A thread sums deviations from a pivot, and their squares, over a stretch of its
// elements; the stretch joins what came before by Chan, Golub & LeVeque (1983), and the pivot moves to the mean so far.
// The first stretch is about its own mean, and no other is longer than three times all before it: a pivot that is D off
// costs a stretch's squares a few eps D^2 for each of its elements, but a third as many lie D off from the others, so
// the variance has D^2 for each of those, too. By weights that doesn't follow: each batch is summed about its own mean,
// found from its heaviest element on, and of two means that merge the heavier one counts as exact. Threads of a warp
// merge in the elements' own arithmetic, rows, blocks and ranks in float64, each in a fixed tree; sums that go beyond
// float32 are done again in float64. There are no float atomics, and every contraction is spelled out as fma (compile
// with -fmad=false): the same arguments, ranks, threads and tile give the same bits on every way.
#include "memory.cuh"
#include "sums.cuh"
#include "maps.cuh"
#include "share.cuh"

namespace fastbn {

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
  const int K = p.ranks.by, group = p.ranks.of(blockIdx.x), groups = p.ranks.of(gridDim.x), G = p.G;
  const int rank = blockIdx.x - group * K, tx = p.across.by;

  // Shared memory: part (G), count (1), coefficients (G), early (G, EARLY), row counts (rows), row sums (rows, pitch),
  // rings of dy and x.
  // A row is a warp where the warp's threads of a column meet in shuffles first, else a row of threads.
  FASTBN_SHARED(shared);
  const bool by_warp = LAYOUT != COLUMNS || (tx <= 32 && (tx & (tx - 1)) == 0);
  const int rows = by_warp ? warps : p.ty;
  const int pitch = LAYOUT == COLUMNS ? tx * V + 1 : 1;  // a row's; the odd one keeps rows in other banks
  const int lanes = 1 << p.lanes, own_lane = t & (lanes - 1);  // threads that merge the sums of one channel
  Part *part = (Part *)shared;
  Count *part_count = (Count *)(part + G);
  Coef *coefficients = (Coef *)(part_count + 1);
  double *early = (double *)(coefficients + G);
  Amount *row_count = (Amount *)(early + G * EARLY<BACKWARD>);
  unsigned char *row_parts = (unsigned char *)row_count + (rows * sizeof(Amount) + 15) / 16 * 16;
  Ring<T, V, BACKWARD> ring;
  ring.dy = (Vec *)(row_parts + rows * pitch * sizeof(Part));
  const bool centred = !p.frozen, wants_x = !BACKWARD || SLOPED || centred;  // in the second pass
  // Of two equal places x is read, but not used, where it isn't wanted: a read on a condition keeps what was read before.
  ring.x = ring.dy + (!BACKWARD || (WAY == APPLY && !wants_x) ? 0 : p.slots * threads);
  ring.kept = p.slots - AHEAD;

  // Groups that read, agree and write at the same time leave memory idle while they all agree: 0.82 to 1.04 of the time
  // where they begin apart, on an H100.
  if (WAY == GRID && p.delay) {
    if (t == 0) hold((u32)((u64)p.delay * group / groups));
    __syncthreads();
  }
  for (int item = group, round = 0; item < p.items; item += groups, round ^= 1) {
    const Share<T, V, BACKWARD, LAYOUT> share(p, item, rank);
    const int keep = WAY == STATS || WAY == APPLY ? 0 : share.n <= p.slots ? share.n : ring.kept;
    for (int g = t; WAY != STATS && g < G && share.parameter(g) < p.C; g += threads)
      foresee<BACKWARD>(share, g, early + g * EARLY<BACKWARD>);
    take_off();

    // Ranks' sums. GRID: two sets of them, because those of a round are still read while the next round's are written.
    const i64 slot = WAY == GRID ? round * groups + group : item;
    const i64 slots = WAY == GRID ? 2 * groups : p.items;
    Part *partials = (Part *)p.partials + slot * G * K;
    Amount *counts = (Amount *)((Part *)p.partials + slots * G * K) + slot * K;
    auto finish = [&](int g, const Sum<A, BACKWARD> &s, double n) {  // in the place of what will be made of it
      shut(*(Part *)(coefficients + g), s);
      if (g == 0) part_count->all = n;
    };

    // The second pass goes from the last vector to the first, because the last ones are the likeliest to be in L2 still.
    // What isn't kept flies in again, in two launches the first of it while sums are merged.
    const bool maps = p.y || (DRESIDUAL && p.dr);
    if (WAY == APPLY) {
      auto q = share.at(share.n - 1);
#pragma unroll 1
      for (int i = 0; i < AHEAD; i++) {
        if (maps && q.i >= 0) ring.send(share, q, ring.shared(q.i), wants_x);
        take_off(), share.template move<-1>(q);
      }
    }

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

      // ---- the block's: warps by shuffles, then a channel's rows and columns, by `lanes` threads each
      auto block = [&](auto &s) {
        typedef decltype(s[0].m) M;
        typedef Partial<A, BACKWARD, M> Row;
        Row *row_part = (Row *)row_parts;
        const int last = LAYOUT == COLUMNS ? tx : 1;
        if (by_warp) merge_lanes(s, n, last);
        const int row = by_warp ? warp : p.across.of(t);
        if (by_warp ? lane < last : row < p.ty) {
          if (share.across == 0) row_count[row] = n;
#pragma unroll
          for (int j = 0; j < N; j++) shut(row_part[row * pitch + share.across * N + j], s[j]);
        }
        __syncthreads();
        const int S = (int)p.S, cells = LAYOUT == COLUMNS ? p.inner.by : 1, width = p.C * S;  // columns of a channel
        int some = 0;  // a row that has elements if any has: the first, by weights the heaviest
        for (int r = 1; BY_WEIGHT && r < rows; r++)
          if (row_count[r] > row_count[some]) some = r;
        bool beyond = false;
#pragma unroll 1
        for (int g = t >> p.lanes; g - (lane >> p.lanes) < G; g += threads >> p.lanes) {
          auto at = [&](int r, int c) -> const Row & {
            return row_part[r * pitch + (p.fold == 1 ? g * cells + c : c / S * width + g * S + c % S)];
          };
          Sum<A, BACKWARD, M> first;
          if (g < G) open(first, at(some, 0));
          Sum<A, BACKWARD> total;
          auto read = [&](int i, Sum<A, BACKWARD, M> &s) {
            const int r = cells > 1 ? p.inner.of(i) : i;
            open(s, at(r, i - r * cells));
            return (double)row_count[r];
          };
          const double n = gather<1>(total, first, g < G ? rows * cells : 0, own_lane, lanes, read);
          if (g >= G || own_lane) continue;
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
          if (WAY == CLUSTER && g == 0) part_count->n = n;
          if ((WAY == STATS || WAY == GRID) && g == 0) counts[rank] = (Amount)n;
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
    // ---- all ranks: every block adds up the same partials in the same order
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
      for (int g = t >> p.lanes; g - (lane >> p.lanes) < G; g += threads >> p.lanes) {
        const bool here = given && g < G;
        auto read = [&](int r, Sum<A, BACKWARD> &s) {
          Bytes<Part> of;
          part_of(of, g, r), open(s, of.value);
          return (double)count_of(r);
        };
        Sum<A, BACKWARD> first, total;
        if (here) read(some, first);
        const double n = gather<RANKS>(total, first, here ? K : 0, own_lane, lanes, read);
        if (g >= G || own_lane) continue;
        finish(g, total, n);
      }
    }
    __syncthreads();
    if (WAY == CLUSTER) cluster_arrive();  // this block has read its peers
    landed<AHEAD>();  // what this thread will read of `early`
    for (int g = t; g < G && share.parameter(g) < p.C; g += threads) {  // by warps full of channels: it is long
      Sum<A, BACKWARD> s;
      open(s, *(const Part *)(coefficients + g));
      conclude(share, g, s, early + g * EARLY<BACKWARD>, part_count->all, rank == 0, coefficients[g]);
    }
    __syncthreads();

    // ---- second pass: the map
    if (maps) {
      Coef k[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        const int g = share.channel(share.across * V + j);
        k[j] = coefficients[g < G ? g : 0];
      }
      auto emit = [&](const typename Share<T, V, BACKWARD, LAYOUT>::Place &q, int slot, auto kept, bool summed) {
        constexpr bool KEPT = decltype(kept)::value;
        if (!share.any(q)) return;
        const bool done = !SLOPED || (IN_PLACE<T> && (KEPT || summed));  // dy f'(z) is in place of dy
        Vec a, d, r, to, dr;
        A weight[W];
        if (READS_R && !(BACKWARD && IN_PLACE<T> && KEPT)) load(r.raw, share.vector(q.r, q));
        if (READS_W) share.read_w(weight, q);
        load_shared(a.raw, ring.x + slot);
        if (BACKWARD) load_shared(d.raw, ring.dy + slot);
#pragma unroll
        for (int v = 0; v < V; v++) {
          const Coef &own = k[N == 1 ? 0 : v];
          const A h = READS_W ? weight[W == 1 ? 0 : v] : (A)1;
          const bool absent = MASKED && h == 0;
          if constexpr (BACKWARD) {
            A g = done ? up(d.lane[v]) : by_z(own, a.lane[v], d.lane[v], r.lane[v], (A)p.parameter);
            if (absent) g = 0;
            down(to.lane[v], by_x(own, meant(a.lane[v], (A)p.parameter), g, centred, h));
            down(dr.lane[v], g);
            if (absent && WEIGHTS == KEEP) to.lane[v] = d.lane[v];
          } else {
            const A y = activate(linear(own, up(a.lane[v]), r.lane[v]), (A)p.parameter);
            down(to.lane[v], absent ? (A)0 : y);
            if (absent && WEIGHTS == KEEP) to.lane[v] = a.lane[v];
          }
        }
        if (!DRESIDUAL || p.y) share.write(q.y, to, q);
        if (DRESIDUAL && p.dr) share.write(q.dr, dr, q);
      };
      auto q = share.at(share.n - 1), back = q;
      if (!share.STRAIGHT) back = share.at(share.n - 1 - AHEAD);
#pragma unroll 1
      while (q.i >= keep) {
        const int slot = ring.shared(q.i);
        landed<AHEAD - 1>();
        emit(q, slot, Flag<false>(), WAY != APPLY && q.i >= share.n - AHEAD);
        if (share.STRAIGHT) back = q, share.template move<-AHEAD>(back);
        if (back.i >= keep) ring.send(share, back, slot, wants_x);
        take_off(), share.template move<-1>(q);
        if (!share.STRAIGHT) share.template move<-1>(back);
      }
#pragma unroll 1
      for (; q.i >= 0; share.template move<-1>(q)) emit(q, ring.own(q.i), Flag<true>(), true);
    }
    if (WAY == CLUSTER) cluster_wait();  // its peers have read it: it may leave
  }
}

}  // namespace fastbn
