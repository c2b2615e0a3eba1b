// What a thread has of an item: where its vectors lie, how they fly in, its own sums. Included by bn.cu.
namespace fastbn {

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
    const i64 left = height() * p.inner.by - rank * p.per;
    return (left < 0 ? 0 : left < p.per ? left : p.per) * V;
  }
  // How many of a thread's there are where so many are left from its first one on.
  FASTBN_DEVICE int steps(i64 left) const {
    if (left <= 0) return 0;
    const i64 most = left + p.apart.by - 1;
    return most >> 32 ? (int)(most / p.apart.by) : (int)p.apart.of((u32)most);
  }
  FASTBN_DEVICE Share(const Params &params, int item, int rank) : p(params) {
    const int t = threadIdx.x;
    set = SETS ? item / p.tiles : 0, tile = SETS ? item % p.tiles : item;
    if (SETS) begin = set * p.M, end = begin + p.M;
    if (SETS && p.starts) begin = p.starts[set] * p.rows, end = p.starts[set + 1] * p.rows;
    const i64 skipped = (i64)rank * p.per;
    if (LAYOUT == COLUMNS) {
      const int tx = p.across.by, down = p.across.of(t);
      across = t - down * tx;
      const i64 column = ((i64)tile * tx + across) * V, left = rows(rank) - down;
      n = down < p.ty && column < (i64)p.fold * p.C * p.S ? steps(left) : 0;
      first = skipped + down;
      x = (const T *)p.x + column, dy = (const T *)p.dy + column, y = (T *)p.y + column;
      if (RESIDUAL) r = (const T *)p.r + column;
      if (DRESIDUAL) dr = (T *)p.dr + column;
    } else {
      across = 0;
      i64 left = height() * p.inner.by - skipped;
      left = left < p.per ? left : p.per;
      n = steps(left - t);
      first = skipped + t;
      x = far((const T *)p.x, tile * p.x_channel), dy = far((const T *)p.dy, tile * p.dy_channel);
      y = far((T *)p.y, tile * p.y_channel);
      if (RESIDUAL) r = far((const T *)p.r, tile * p.r_channel);
      if (DRESIDUAL) dr = far((T *)p.dr, tile * p.dr_channel);
    }
  }
  FASTBN_DEVICE i64 height() const { return SETS ? end - begin : p.M; }
  FASTBN_DEVICE double count() const { return SETS ? (double)height() * p.fold * p.S : p.count; }
  FASTBN_DEVICE double one_of() const { return SETS ? 1 / count() : p.one_of; }
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
      const u32 j = (u32)first + (u32)i * blockDim.x, run = p.inner.of(j);
      q.j = j - run * p.inner.by, line = run;
    }
    line = SETS && (i < 0 || i >= n) ? 0 : row(line);
    q.x = far(x, line * p.x_row), q.dy = far(dy, line * p.dy_row), q.y = far(y, line * p.y_row);
    if (RESIDUAL) q.r = far(r, line * p.r_row);
    if (DRESIDUAL) q.dr = far(dr, line * p.dr_row);
    if (WEIGHTED) q.w = far((const Number<T> *)p.w, line * p.w_row);
    return q;
  }
  static constexpr bool STRAIGHT = LAYOUT == COLUMNS && !SETS;  // any step is as easy
  template <int BY> FASTBN_DEVICE void move(Place &q) const {   // BY: 1 or -1, where STRAIGHT any
    q.i += BY;
    if (SETS) {  // their rows may lie anywhere
      if (q.i >= 0 && q.i < n) q = at(q.i);
      return;
    }
    bool beyond = false;  // the run: the next one begins
    if (LAYOUT != COLUMNS) {
      q.j += BY * p.rest, beyond = q.j >= p.inner.by;  // below 0, too
      if (beyond) q.j -= BY * p.inner.by;
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
    if (p.fold > 1) return c % (p.C * (int)p.S) / (int)p.S;
    return (int)p.inner.of(c);
  }
};

// A thread's vectors in shared memory, which no other thread reads or writes: AHEAD of them fly in past the registers
// while others are summed or mapped. An item's first `kept` stay for the second pass; the others take turns in the last
// AHEAD slots, where the last of them still are when the second pass begins.
template <class T, int V, bool BACKWARD> struct Ring {
  typedef Vector<T, V> Vec;
  static constexpr int MOST = 64 / (int)sizeof(Vec) / (BACKWARD ? 2 : 1);
  static constexpr int AHEAD = MOST < 8 ? MOST : 8;  // launches.py's `ahead`
  Vec *x, *dy;  // slot 0 of thread 0
  int kept;     // below 0 where a thread has fewer than AHEAD

  FASTBN_DEVICE int own(int i) const { return i * blockDim.x + threadIdx.x; }  // of what stays
  FASTBN_DEVICE int shared(int i) const { return own(kept + ((i - kept) & (AHEAD - 1))); }
  FASTBN_DEVICE int slot(int i) const { return i < kept ? own(i) : shared(i); }
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
  constexpr int AHEAD = Ring<T, V, BACKWARD>::AHEAD, STAGES = AHEAD / BATCH;  // batches in flight
  constexpr int FIRST = N > 1 ? AHEAD : BATCH;  // vectors of the first stretch: it takes long for four channels to join
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
      const A apart = mean[j] - rest[j], step = BY_WEIGHT ? (centre[j] - pivot[j]) + apart : apart;
      const A second_step = BACKWARD ? second[j] - other[j] : step;
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
  auto batch = [&](int i, auto whole) {
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
      slots[u] = ring.slot(i + u);
      if (share.any(here)) {
        lanes[u] = (1u << share.end_of(here)) - (1u << share.begin_of(here));
        size += LAYOUT == COLUMNS ? 1 : share.end_of(here) - share.begin_of(here);
        if (SLOPED && RESIDUAL) load(r[u].raw, share.vector(here.r, here));
        if (READS_W) share.read_w(weight[u], here);
      }
      share.template move<1>(here);
    }
    auto has = [&](int u, int v) { return LAYOUT != WINDOWS || (lanes[u] >> v & 1); };
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
          const A value = meant(a[u].lane[v], (A)share.p.parameter), h = BY_WEIGHT ? weight[u][W == 1 ? 0 : v] : (A)1;
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
      each([&](int l, int j, A first, A second, A) {
        const A from = first - pivot[j];
        s[l] += from;
        if (BACKWARD) e[l] += second;
        q[l] = multiply_add(from, BACKWARD ? second : from, q[l]);
      });
    }
  };
  // The mean of the first stretch, from some element on: a constant is its own mean.
  auto settle = [&]() {
    auto q = here;
    A size = 0;
#pragma unroll 1
    for (; q.i < FIRST && q.i < share.n; share.template move<1>(q)) {
      if (!share.any(q)) continue;
      const int at = ring.slot(q.i);
      Vector<T, V> a, d, r;
      A weight[W], value[V];
      if (!BACKWARD || SLOPED) load_shared(a.raw, ring.x + at);
      if (BACKWARD) load_shared(d.raw, ring.dy + at);
      if (SLOPED && RESIDUAL) load(r.raw, share.vector(q.r, q));
      if (READS_W) share.read_w(weight, q);
#pragma unroll
      for (int v = 0; v < V; v++) {
        if (!share.has(q, v)) continue;
        const int j = N == 1 ? 0 : v;
        value[v] = BACKWARD ? by_z(k[j], a.lane[v], d.lane[v], r.lane[v], (A)share.p.parameter) : up(a.lane[v]);
        if (MASKED && BACKWARD && weight[W == 1 ? 0 : v] == 0) value[v] = 0;
        if (size == 0) pivot[j] = value[v];
      }
#pragma unroll
      for (int v = 0; v < V; v++)
        if (share.has(q, v)) s[v % LANES] += value[v] - pivot[N == 1 ? 0 : v];
      size += (A)(LAYOUT == COLUMNS ? 1 : share.end_of(q) - share.begin_of(q));
    }
#pragma unroll
    for (int l = 1; l < LANES / N; l++) s[0] += s[l], s[l] = 0;
#pragma unroll
    for (int j = 0; j < N; j++) {
      if (size > 0) pivot[j] += s[j] / size;
      s[j] = 0;
    }
  };

  // The first stretch flies as one group, then each batch as another: all of them where the ring has room, else AHEAD
  // vectors, and the next batch whenever one has been read.
  typename Share<T, V, BACKWARD, LAYOUT>::Place there = share.at(0);
  auto send = [&](int vectors) {
#pragma unroll 1
    for (int u = 0; u < vectors && there.i < share.n; u++) {
      ring.send(share, there, ring.slot(there.i), true);
      share.template move<1>(there);
    }
    take_off();
  };
  send(FIRST);
  const bool all = share.n <= ring.kept + AHEAD;
  int flying = 0;  // groups behind the one that is waited for
#pragma unroll 1
  while (there.i < share.n && (all || flying < (AHEAD - FIRST) / BATCH)) send(BATCH), flying++;
  centre_of(k);
  landed_but(flying);
  if (!BY_WEIGHT) settle();
  int left = FIRST / BATCH, length = 3 * left;  // batches until the stretch is over, and of the next one
#pragma unroll 1
  for (int i = 0; i < share.n; i += BATCH) {
    if (!all) landed<STAGES - 1>();
    else landed_but(i < FIRST ? flying : --flying);
    if (i + BATCH <= share.n) {
      batch(i, Flag<true>());
      if (--left == 0) {
        join();
        left = length < BATCHES ? length : BATCHES, length = 4 * left;
      }
    } else {
      batch(i, Flag<false>());
    }
    if (!all) send(BATCH);
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

}  // namespace fastbn
