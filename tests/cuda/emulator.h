// Runs CUDA C++ kernels on the CPU, one fiber a CUDA thread, so that a .cu can be tested where there is no GPU.
//
// Threads switch only where CUDA threads talk: __syncthreads, shuffles, atomics, polling, cluster barriers. Who runs
// next is a policy: 0 in order, 1 in reverse, other even numbers at random, odd ones block after block in a random
// order, so that the last block starves; the number is the seed. Shared memory is full of NaN at a block's start and
// again when it has left. So a missing barrier shows as a wrong value, as a NaN, or as bits that depend on the policy.
//
// Not emulated: PTX, a weak memory model (fences do nothing here), contraction (bn.cu spells its fma out), time.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define FASTBN_DEVICE inline
#define FASTBN_SHARED(name) unsigned char *name = emulator::current->block->shared

namespace emulator {

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct Meeting { int want = 0, have = 0, round = 0, line = 0; };  // threads wait here for each other
struct Warp { Meeting meeting; uint64_t value[2][32]; };
struct Block {
  dim3 index;
  Meeting meeting, *cluster;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char *shared;
  size_t bytes;
  int votes[3];  // of __syncthreads_or, in turns
  Block *leader;  // rank 0 of its cluster
};
struct Copy { void *to; const void *from; int bytes; };  // on its way to shared memory
struct Thread {
  std::vector<Copy> group;  // begun since the last one was closed
  std::vector<std::vector<Copy>> flying;
  Block *block;
  Warp *warp;
  dim3 index;
  ucontext_t context;
  jmp_buf here;
  int shuffles, votes, round, cluster_round;
  Meeting *at;
  bool started, done;
};

inline Thread *current;
inline dim3 grid_size, block_size;
inline jmp_buf home;
inline std::string error;
inline std::function<void()> kernel;
inline long spins;
inline std::vector<std::pair<uintptr_t, size_t>> readable, writable;  // what vector accesses may touch
inline uint64_t state;
inline uint64_t random() { state ^= state << 13; state ^= state >> 7; return state ^= state << 17; }

inline void fail(const std::string &what) {
  if (!error.empty()) return;
  const unsigned block = current->block->index.x, thread = current->index.x;
  error = "block " + std::to_string(block) + " thread " + std::to_string(thread) + ": " + what;
}

// swapcontext makes system calls, 1.7 us; jumping between stacks takes 0.2 us.
inline void go(Thread *t) {
  current = t;
  if (_setjmp(home)) return;
  if (t->started) _longjmp(t->here, 1);
  t->started = true;
  setcontext(&t->context);
}
inline void yield() { if (!_setjmp(current->here)) _longjmp(home, 1); }

// ---- meetings: __syncthreads, shuffles, cluster barriers

inline void pass(Meeting &m) { m.have = 0; m.round++; }
inline int arrive(Meeting &m, int line, const char *what) {  // -> the round to wait past
  if (m.have && m.line != line)
    fail(std::string(what) + " at line " + std::to_string(line) + " meets line " + std::to_string(m.line));
  m.line = line;
  const int round = m.round;
  if (++m.have >= m.want) pass(m);
  return round;
}
inline void wait(Meeting &m, int round) {
  if (m.round > round) return;
  current->at = &m, current->round = round;
  yield();
  current->at = nullptr;
}
inline void sync(int line) { Meeting &m = current->block->meeting; wait(m, arrive(m, line, "__syncthreads")); }
inline int sync_or(int vote, int line) {
  Block &b = *current->block;
  const int turn = current->votes++ % 3;
  b.votes[(turn + 1) % 3] = 0;  // nobody reads the last but one any more, and nobody writes the next one yet
  b.votes[turn] |= vote != 0;
  sync(line);
  return b.votes[turn];
}
inline void cluster_arrive() { current->cluster_round = arrive(*current->block->cluster, 0, "cluster barrier"); }
inline void cluster_wait() { wait(*current->block->cluster, current->cluster_round); }
template <class T> inline T shuffle_down(T v, int step, int line) {
  Warp &w = *current->warp;
  const int lane = current->index.x & 31, turn = current->shuffles++ & 1;
  memcpy(&w.value[turn][lane], &v, sizeof v);
  wait(w.meeting, arrive(w.meeting, line, "shuffle"));
  if (lane + step < 32) memcpy(&v, &w.value[turn][lane + step], sizeof v);
  return v;
}

template <class T> inline T shuffle_xor(T v, int step, int line) {
  Warp &w = *current->warp;
  const int lane = current->index.x & 31, turn = current->shuffles++ & 1;
  memcpy(&w.value[turn][lane], &v, sizeof v);
  wait(w.meeting, arrive(w.meeting, line, "shuffle"));
  memcpy(&v, &w.value[turn][lane ^ step], sizeof v);
  return v;
}

// ---- memory

inline bool inside(const std::vector<std::pair<uintptr_t, size_t>> &arrays, uintptr_t a, int n) {
  for (auto &r : arrays) if (a >= r.first && a + n <= r.first + r.second) return true;
  return false;
}
inline bool check(const std::vector<std::pair<uintptr_t, size_t>> &arrays, const void *p, int n, const char *what) {
  if ((uintptr_t)p % n) fail(std::string(what) + " isn't aligned");
  else if (!inside(arrays, (uintptr_t)p, n)) fail(std::string(what) + " outside every array");
  return error.empty();
}
inline bool check_shared(const void *p, int n) {
  const size_t at = (const unsigned char *)p - current->block->shared;
  if ((uintptr_t)p % n) fail("shared access isn't aligned");
  else if (at + n > current->block->bytes) fail("access outside shared memory");
  return error.empty();
}
inline void load(void *to, const void *p, int n) { if (check(readable, p, n, "load")) memcpy(to, p, n); }
inline void load_fresh(void *to, const void *p, int n) { load(to, p, n); }
inline void store(void *p, const void *from, int n) { if (check(writable, p, n, "store")) memcpy(p, from, n); }
inline void load_shared(void *to, const void *p, int n) { if (check_shared(p, n)) memcpy(to, p, n); }
inline void store_shared(void *p, const void *from, int n) { if (check_shared(p, n)) memcpy(p, from, n); }
inline void load_peer(void *to, const void *p, int n, int rank) {
  const size_t at = (const unsigned char *)p - current->block->shared;
  if (check_shared(p, n)) memcpy(to, current->block->leader[rank].shared + at, n);
}
// Lands as late as it may: what is read before is NaN, and what is overwritten meanwhile is lost.
inline void fly(void *to, const void *from, int n) {
  if (!check(readable, from, n, "load") || !check_shared(to, n)) return;
  memset(to, 0xff, n);
  current->group.push_back({to, from, n});
}
inline void take_off() { current->flying.push_back(std::move(current->group)), current->group.clear(); }
inline void landed(size_t left) {
  auto &flying = current->flying;
  size_t down = flying.size() > left ? flying.size() - left : 0;
  for (size_t i = 0; i < down; i++)
    for (Copy &c : flying[i]) memcpy(c.to, c.from, c.bytes);
  flying.erase(flying.begin(), flying.begin() + down);
}
inline unsigned poll(const unsigned *p) { spins++; yield(); return *p; }
inline unsigned add(unsigned *p, unsigned v) { yield(); const unsigned old = *p; *p += v; return old; }

inline uint32_t bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline float half_to_float(uint16_t u) { _Float16 h; memcpy(&h, &u, 2); return (float)h; }
inline uint16_t float_to_half(float f) { _Float16 h = (_Float16)f; uint16_t u; memcpy(&u, &h, 2); return u; }

// ---- running

inline void entry() {
  kernel();
  Block *b = current->block;
  for (auto &group : current->flying) if (!group.empty()) fail("leaves before what it asked for has landed");
  if (!current->group.empty()) fail("leaves before what it asked for has taken off");
  current->done = true;
  if (b->meeting.want == 1) memset(b->shared, 0xff, b->bytes);  // the last to leave takes the shared memory along
  for (Meeting *m : {&b->meeting, &current->warp->meeting, b->cluster})  // a thread that left isn't waited for
    if (--m->want && m->have >= m->want) pass(*m);
  _longjmp(home, 1);
}
inline void *stack(size_t i) {  // kept between launches
  static std::vector<void *> stacks;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  while (stacks.size() <= i) stacks.push_back(mmap(nullptr, 1 << 16, PROT_READ | PROT_WRITE, flags, -1, 0));
  return stacks[i];
}

inline void run(unsigned first, unsigned count, int cluster, size_t bytes, int policy) {  // these blocks at once
  const unsigned size = block_size.x;
  std::vector<Block> blocks(count);
  std::vector<Meeting> clusters(count / cluster);
  std::vector<Thread> threads((size_t)count * size);
  std::vector<Thread *> live;
  for (unsigned b = 0; b < count; b++) {
    Block &B = blocks[b];
    B.index = {first + b, 0, 0}, B.meeting.want = size, B.warps.resize((size + 31) / 32), B.bytes = bytes;
    B.leader = &blocks[b / cluster * cluster], B.cluster = &clusters[b / cluster], B.cluster->want += size;
    B.memory.reset(new unsigned char[bytes + 16]);
    memset(B.memory.get(), 0xff, bytes + 16);
    B.shared = (unsigned char *)(((uintptr_t)B.memory.get() + 15) & ~(uintptr_t)15);
    for (unsigned t = 0; t < size; t++) {
      Thread &T = threads[live.size()];
      T = Thread();
      T.block = &B, T.warp = &B.warps[t / 32], T.warp->meeting.want++, T.index = {t, 0, 0};
      getcontext(&T.context);
      T.context.uc_stack.ss_sp = stack(live.size()), T.context.uc_stack.ss_size = 1 << 16;
      makecontext(&T.context, entry, 0);
      live.push_back(&T);
    }
  }
  auto waits = [](Thread *t) { return t->at && t->at->round <= t->round; };
  const bool strict = policy > 2 && policy % 2;
  if (strict) {
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; i++) std::swap(order[i] = i, order[random() % (i + 1)]);
    const bool flip = random() & 1;
    for (size_t i = 0; i < live.size(); i++)
      live[i] = &threads[(size_t)order[i / size] * size + (flip ? size - 1 - i % size : i % size)];
  }
  while (!live.empty() && error.empty()) {
    size_t m = live.size(), k = 0;
    bool moved = false;
    if (strict) {
      while (k < m && waits(live[k])) k++;
      if ((moved = k < m)) {
        Thread *t = live[k];
        go(t);
        if (t->done || !waits(t)) {  // one that polls gives way
          live.erase(live.begin() + k);
          if (!t->done) live.push_back(t);
        }
      }
    } else {
      for (size_t i = 0; i < m && error.empty(); i++) {
        Thread *t = live[policy == 0 ? i : policy == 1 ? m - 1 - i : random() % m];
        if (!t->done && !waits(t)) go(t), moved = true;
      }
      for (Thread *t : live) {
        if (!t->done) live[k++] = t;
        if (!waits(t)) moved = true;
      }
      live.resize(k);
    }
    if (!live.empty() && (!moved || spins > 1000000)) current = live[0], fail(moved ? "spins for ever" : "deadlock");
  }
}

// resident: how many blocks run at once (0: the whole grid, as in a cooperative launch)
inline const char *launch(std::function<void()> f, unsigned grid, unsigned block, size_t bytes, int cluster,
                          unsigned resident, int policy) {
  kernel = f, grid_size.x = grid, block_size.x = block, error.clear(), spins = 0;
  state = 0x9e3779b97f4a7c15ull * (policy + 1);
  if (!resident || resident > grid) resident = grid;
  if (grid % cluster || resident % cluster) return "grid and resident blocks must be multiples of the cluster";
  std::vector<unsigned> order;
  for (unsigned b = 0; b < grid; b += resident) order.push_back(b);
  for (size_t i = 0, n = order.size(); i < n; i++)
    std::swap(order[i], order[policy == 0 ? i : policy == 1 ? (i < n / 2 ? n - 1 - i : i) : i + random() % (n - i)]);
  for (unsigned b : order)
    if (error.empty()) run(b, b + resident > grid ? grid - b : resident, cluster, bytes, policy);
  return error.c_str();
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define __syncthreads() emulator::sync(__LINE__)
#define __syncthreads_or(v) emulator::sync_or(v, __LINE__)
#define __shfl_down_sync(mask, v, step) emulator::shuffle_down(v, step, __LINE__)
#define __shfl_xor_sync(mask, v, step) emulator::shuffle_xor(v, step, __LINE__)
inline double rsqrt(double v) { return 1 / sqrt(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
