// The emulated library: every instance of bn.cu that the tests launch, by the numbers of its template's arguments.
#include FASTBN_SOURCE

using namespace fastbn;

template <class T, int V, bool BACKWARD, int LAYOUT> static std::function<void()> pick(int way, const Params &p) {
  switch (way) {
    case BLOCK: return [&p] { bn<T, V, BACKWARD, LAYOUT, BLOCK>(p); };
    case CLUSTER: return [&p] { bn<T, V, BACKWARD, LAYOUT, CLUSTER>(p); };
    case GRID: return [&p] { bn<T, V, BACKWARD, LAYOUT, GRID>(p); };
    case STATS: return [&p] { bn<T, V, BACKWARD, LAYOUT, STATS>(p); };
    case APPLY: return [&p] { bn<T, V, BACKWARD, LAYOUT, APPLY>(p); };
  }
  return nullptr;
}

typedef std::vector<std::pair<uintptr_t, size_t>> Arrays;
static Arrays arrays(const uint64_t *pairs, int count) {
  Arrays result;
  for (int i = 0; i < count; i++) result.push_back({pairs[2 * i], pairs[2 * i + 1]});
  return result;
}

// instance: type (0 float, 1 f16, 2 bf16, 3 double), V, backward, layout, way. Returns "" or what went wrong.
extern "C" const char *fastbn_launch(const int *instance, const Params *p, unsigned grid, unsigned block,
                                     unsigned shared, int cluster, unsigned resident, int policy,
                                     const uint64_t *readable, int readables, const uint64_t *writable, int writables) {
  const Params params = *p;
  const int *i = instance, way = i[4];
  std::function<void()> f;
#define INSTANCE(TYPE, T, WIDTH, LAYOUT)                                            \
  if (i[0] == TYPE && i[1] == WIDTH && i[3] == LAYOUT)                              \
    f = i[2] ? pick<T, WIDTH, true, LAYOUT>(way, params) : pick<T, WIDTH, false, LAYOUT>(way, params);
#define ONE(TYPE, T, WIDTH, BACKWARD, LAYOUT, WAY)                                                 \
  if (i[0] == TYPE && i[1] == WIDTH && (i[2] != 0) == BACKWARD && i[3] == LAYOUT && way == WAY)   \
    f = [&params] { bn<T, WIDTH, BACKWARD, LAYOUT, WAY>(params); };
#define WIDEST(TYPE, T, WIDTH) \
  INSTANCE(TYPE, T, WIDTH, RUNS) INSTANCE(TYPE, T, WIDTH, WINDOWS) INSTANCE(TYPE, T, WIDTH, COLUMNS)
#define NARROWER(TYPE, T, WIDTH) INSTANCE(TYPE, T, WIDTH, RUNS) INSTANCE(TYPE, T, WIDTH, COLUMNS)
  FASTBN_INSTANCES
  if (!f) return "no such instance";
  emulator::readable = arrays(readable, readables);
  emulator::writable = arrays(writable, writables);
  return emulator::launch(f, grid, block, shared, cluster, resident, policy);
}
extern "C" int fastbn_params_size() { return sizeof(Params); }
