// y = x . H for consecutive blocks of n = FACTOR 2^(TOP + LOG) elements: read once, float32 throughout, rounded once.
//
// A race against memory again (an H100 reads and writes 3.2 elements per clock and SM), so what counts is traffic of the
// shared memory pipe: 10 wavefronts per 32 elements are to be had in that time. A butterfly by shuffle costs one, an
// exchange of everything two. Hence no shuffles: three phases that each hold all they need in registers, and two
// exchanges between them.
//
//     1. columns    element (i, j), i < RADIX: a thread reads the RADIX words (two neighbours) of a column, transforms
//                   along i by Paley's matrix and butterflies, and writes to shared memory; lanes are neighbours
//     2. runs       a thread takes 32 neighbours: the low five bits of j, in place
//     3. columns    of runs: the other bits of j, from shared memory to y; lanes are neighbours
//
// Shared memory holds pairs of floats. Pair p of run r (16 pairs) lies at place p ^ r % 16 of its run: lanes that read
// neighbours and lanes that read the same pair of sixteen runs both meet every bank once.
//
// While a block computes it asks for no memory of its own, so it fetches a chunk that comes later into the L2 cache.
//
// With SPLIT > 1 the thread blocks of a cluster share one transform: each reads a share of the columns in phase 1 and
// hands the results to the owners of the rows i through distributed shared memory; phases 2 and 3 stay at home.
//
// With VECTORS > 0 a warp has whole transforms of 8 to 1024 elements to itself, in registers: a lane holds 8 neighbours
// VECTORS times, 256 apart. Five of the butterflies are shuffles, which fits the budget, and nobody waits for anybody.
//
// Host macros: FACTOR (1, 12, 20, 28), TOP, LOG >= 1, BATCH transforms of a chunk, THREADS, SPLIT, VECTORS, SCALE (bits
// of 1 / sqrt(n)), BF16, FP32.

#if VECTORS == 0
constexpr int RADIX = FACTOR << TOP;
constexpr int ROWS = RADIX / SPLIT;                          // of one transform that this block owns
constexpr int PAIRS = (BATCH * ROWS << LOG) / 2;             // that this block holds
constexpr int COLUMNS = 1 << LOG - 1;                        // pairs of a row
constexpr int HIGH = LOG > 5 ? 1 << LOG - 5 : 1;             // runs of a row, which phase 3 transforms
constexpr int LOW = LOG > 5 ? 16 : COLUMNS;                  // pairs of a run that belong together
constexpr int FIRST_ITEMS = BATCH * COLUMNS / SPLIT, FIRST_GROUP = RADIX < 16 ? 16 / RADIX : 1;
constexpr int LAST_ITEMS = PAIRS / HIGH, LAST_GROUP = HIGH < 16 ? 16 / HIGH : 1;
static_assert(PAIRS % 16 == 0 && RADIX % SPLIT == 0 && (SPLIT == 1 || BATCH == 1), "whole runs, whole rows");
#endif

#if FP32
typedef float2 Word;
__device__ __forceinline__ float2 widen(Word word) { return word; }
__device__ __forceinline__ Word round_once(float low, float high) { return make_float2(low, high); }
#else
typedef u32 Word;
__device__ __forceinline__ float2 widen(Word word) { return make_float2(wide((u16)word), wide((u16)(word >> 16))); }
__device__ __forceinline__ Word round_once(float low, float high) {
  Word word;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }

// Sylvester's matrix on every SPAN neighbours of v.
template <int SPAN, int COUNT>
__device__ __forceinline__ void butterflies(float2 (&v)[COUNT]) {
#pragma unroll
  for (int step = 1; step < SPAN; step *= 2) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (i & step) continue;
      float2 a = v[i], b = v[i + step];
      v[i] = a + b, v[i + step] = a - b;
    }
  }
}

__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  // The next launch comes in when the one before is over: sooner, and its blocks would gather where that left room.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if VECTORS

constexpr int SIZE = FACTOR << TOP + LOG;
struct __align__(16) Neighbours {
  Word words[4];
};

// x and y: `words` pairs of neighbours, 16-byte aligned, whole transforms.
extern "C" __global__ void __launch_bounds__(THREADS)
    hadamard(const Neighbours* x, Neighbours* y, u64 words, u64) {
  const int lane = threadIdx.x & 31;
  const u64 at = ((u64)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5)) * (VECTORS * 32) + lane;
  wait_for_launch_before();
  Neighbours raw[VECTORS];
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) raw[c] = at + c * 32 < words / 4 ? x[at + c * 32] : Neighbours{};
  float2 v[4][VECTORS];
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) {
    float2 here[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen(raw[c].words[i]);
      here[i] = make_float2(pair.x + pair.y, pair.x - pair.y);
    }
    butterflies<4>(here);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i][c] = here[i];
  }
#pragma unroll
  for (int step = 1; step < 32 && step < SIZE / 8; step *= 2) {
    const float sign = lane & step ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < VECTORS; ++c) {
        v[i][c].x = fmaf(sign, v[i][c].x, __shfl_xor_sync(~0u, v[i][c].x, step));
        v[i][c].y = fmaf(sign, v[i][c].y, __shfl_xor_sync(~0u, v[i][c].y, step));
      }
    }
  }
  const float scale = __uint_as_float(SCALE);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    butterflies<(SIZE > 256 ? SIZE / 256 : 1)>(v[i]);
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) raw[c].words[i] = round_once(v[i][c].x * scale, v[i][c].y * scale);
  }
#pragma unroll
  for (int c = 0; c < VECTORS; ++c)
    if (at + c * 32 < words / 4) y[at + c * 32] = raw[c];
}

#else

// C v: as C is 0 on its diagonal and +-1 elsewhere, row i is (sum of all) - v_i - 2 (sum of those with a minus), which are
// fewer than half.
template <typename Emit>
__device__ __forceinline__ void conference_rows(const float2 (&v)[HALF + 1], Emit emit) {
  float2 all = v[0];
#pragma unroll
  for (int j = 1; j < HALF; ++j) all = all + v[j];
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    float2 minus = make_float2(0.f, 0.f);
    bool none = true;
#pragma unroll
    for (int j = 0; j < HALF; ++j)
      if (negative(i) >> j & 1) minus = none ? v[j] : minus + v[j], none = false;
    float2 rest = all - v[i];
    emit(i, make_float2(fmaf(-2.f, minus.x, rest.x), fmaf(-2.f, minus.y, rest.y)));
  }
}

// The transform along i of one column; emit(i, value) takes each result as it comes, so none needs a register.
template <typename Emit>
__device__ __forceinline__ void transform_column(float2 (&v)[RADIX], Emit emit) {
  butterflies<(1 << TOP)>(v);
#if FACTOR == 1
#pragma unroll
  for (int i = 0; i < RADIX; ++i) emit(i, v[i]);
#else
#pragma unroll
  for (int t = 0; t < 1 << TOP; ++t) {
    float2 s[HALF + 1], d[HALF + 1];
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      float2 a = v[i << TOP | t], b = v[i + HALF << TOP | t];
      s[i] = a + b, d[i] = a - b;
    }
    conference_rows(s, [&](int i, float2 value) { emit(i << TOP | t, value + d[i]); });
    conference_rows(d, [&](int i, float2 value) { emit(i + HALF << TOP | t, value - s[i]); });
  }
#endif
}

// Where the pair `column` of a row lies in shared memory.
__device__ __forceinline__ int place(int row, int column) {
#if LOG >= 5
  return row * COLUMNS + (column ^ ((row << LOG - 5 | column >> 4) & 15));
#else
  int pair = row * COLUMNS + column;
  return pair ^ (pair >> 4 & 15);
#endif
}

extern __shared__ __align__(16) float2 values[];  // (PAIRS)

// A pair of row i of a column, to whoever owns the row.
__device__ __forceinline__ void hand_over(int batch, int i, int column, float2 value) {
#if SPLIT == 1
  values[place(batch * RADIX + i, column)] = value;
#else
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(shared_address(values + place(i % ROWS, column))), "r"(i / ROWS));
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(value.x), "f"(value.y) : "memory");
#endif
}

// Phase 1: x -> shared memory. Word numbers count from the chunk's first; beyond `left` there are zeros.
__device__ __forceinline__ void first_columns(const Word* x, int left, int rank) {
#pragma unroll 1
  for (int n = threadIdx.x; n < FIRST_ITEMS; n += THREADS * FIRST_GROUP) {
    Word words[FIRST_GROUP][RADIX];
#pragma unroll
    for (int g = 0; g < FIRST_GROUP; ++g) {
      const int item = n + g * THREADS, column = item % COLUMNS + rank * FIRST_ITEMS;
      if (FIRST_ITEMS % (THREADS * FIRST_GROUP) && item >= FIRST_ITEMS) break;
#pragma unroll
      for (int i = 0; i < RADIX; ++i) {
        const int word = (item / COLUMNS * RADIX + i) * COLUMNS + column;
        words[g][i] = BATCH == 1 || word < left ? x[word] : Word{};
      }
    }
#pragma unroll
    for (int g = 0; g < FIRST_GROUP; ++g) {
      const int item = n + g * THREADS, column = item % COLUMNS + rank * FIRST_ITEMS;
      if (FIRST_ITEMS % (THREADS * FIRST_GROUP) && item >= FIRST_ITEMS) break;
      float2 v[RADIX];
#pragma unroll
      for (int i = 0; i < RADIX; ++i) v[i] = widen(words[g][i]);
      transform_column(v, [&](int i, float2 value) { hand_over(item / COLUMNS, i, column, value); });
    }
  }
}

// Phase 2: runs in place.
__device__ __forceinline__ void runs() {
#pragma unroll 1
  for (int run = threadIdx.x; run < PAIRS / 16; run += THREADS) {
    const int at = run * 16 | run & 15;
    float2 v[16];
#pragma unroll
    for (int p = 0; p < 16; ++p) {
      float2 pair = values[at ^ p];
      v[p] = make_float2(pair.x + pair.y, pair.x - pair.y);
    }
    butterflies<LOW>(v);
#pragma unroll
    for (int p = 0; p < 16; ++p) values[at ^ p] = v[p];
  }
}

// Phase 3: shared memory -> y.
__device__ __forceinline__ void last_columns(Word* y, int left) {
  const float scale = __uint_as_float(SCALE);
#pragma unroll 1
  for (int n = threadIdx.x; n < LAST_ITEMS; n += THREADS * LAST_GROUP) {
    float2 v[LAST_GROUP][HIGH];
#pragma unroll
    for (int g = 0; g < LAST_GROUP; ++g) {
      const int item = n + g * THREADS, p = item & 15, first = (item >> 4) * HIGH;
      if (LAST_ITEMS % (THREADS * LAST_GROUP) && item >= LAST_ITEMS) break;
#pragma unroll
      for (int h = 0; h < HIGH; ++h) v[g][h] = values[(first + h) * 16 + (p ^ (first + h & 15))];
      butterflies<HIGH>(v[g]);
    }
#pragma unroll
    for (int g = 0; g < LAST_GROUP; ++g) {
      const int item = n + g * THREADS, word = (item >> 4) * HIGH * 16 + (item & 15);
      if (LAST_ITEMS % (THREADS * LAST_GROUP) && item >= LAST_ITEMS) break;
#pragma unroll
      for (int h = 0; h < HIGH; ++h) {
        const Word rounded = round_once(v[g][h].x * scale, v[g][h].y * scale);
        if (BATCH == 1 || word + h * 16 < left) y[word + h * 16] = rounded;
      }
    }
  }
}

// This block's share of a chunk, into the L2 cache: memory works on while this block computes.
__device__ __forceinline__ void fetch_ahead(const Word* share) {
  constexpr int LINE = 128 / sizeof(Word);
#pragma unroll 1
  for (int word = threadIdx.x * LINE; word < PAIRS; word += THREADS * LINE)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(share + word));
}

// x and y: `words` pairs of neighbours, 16-byte aligned, whole transforms. `ahead`: how many chunks later one is fetched.
extern "C" __global__ void __launch_bounds__(THREADS)
    hadamard(const Word* x, Word* y, u64 words, u64 ahead) {
  int rank = 0;
#if SPLIT > 1
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  const u64 first = (u64)(blockIdx.x / SPLIT) * (PAIRS * SPLIT);
  const int left = words - first < PAIRS ? (int)(words - first) : PAIRS;  // asked for only where SPLIT is 1
  wait_for_launch_before();
#if SPLIT > 1
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all blocks of the cluster have begun
#endif
  first_columns(x + first, left, rank);
  const u64 later = first + ahead * (PAIRS * SPLIT);
  if (later + PAIRS * SPLIT <= words) fetch_ahead(x + later + rank * PAIRS);
#if SPLIT > 1
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
  runs();
  __syncthreads();
  last_columns(y + first + rank * PAIRS, left);
}
#endif
