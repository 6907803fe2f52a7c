// A stand-in, written from the description, for the published design that benchmarks/hadamard_speed.py compares with:
// one transform a thread block, the whole of it in registers as CHUNKS vectors of EACH neighbours a thread. Butterflies
// within a vector, by shuffle among the lanes of a warp, by an exchange through at most 32 KB of shared memory (so in
// several rounds) and shuffles among warps, back by a second exchange, and among a thread's vectors: there stands the
// factor 12, 20 or 28, as a matrix of additions.
//
// Host macros: FACTOR, EACH, CHUNKS, THREADS, SCALE, BF16.

constexpr int WARPS = THREADS / 32;
constexpr int FITTING = 32768 / (THREADS * EACH * 4);
constexpr int ROUND = CHUNKS % 2 ? CHUNKS : FITTING >= CHUNKS ? CHUNKS : CHUNKS % FITTING == 0 ? FITTING : CHUNKS / 4;

template <int COUNT>
__device__ __forceinline__ void butterflies(float (&v)[COUNT]) {
#pragma unroll
  for (int step = 1; step < COUNT; step *= 2) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (i & step) continue;
      float a = v[i], b = v[i + step];
      v[i] = a + b, v[i + step] = a - b;
    }
  }
}

__device__ __forceinline__ void across_lanes(float (&v)[CHUNKS][EACH], int lanes, int lane) {
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) {
    const float sign = lane & step ? -1.f : 1.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int e = 0; e < EACH; ++e) v[c][e] = fmaf(sign, v[c][e], __shfl_xor_sync(~0u, v[c][e], step));
  }
}

extern __shared__ __align__(16) float4 exchange[];

// Every thread's vectors to the thread whose own vectors lie at `from`; `to` is where this thread puts its own.
__device__ __forceinline__ void swap(float (&v)[CHUNKS][EACH], int to, int from) {
  constexpr int PARTS = EACH / 4;
#pragma unroll
  for (int first = 0; first < CHUNKS; first += ROUND) {
    __syncthreads();
#pragma unroll
    for (int c = 0; c < ROUND; ++c)
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const float* e = v[first + c] + 4 * part;
        exchange[(c * PARTS + part) * THREADS + to] = make_float4(e[0], e[1], e[2], e[3]);
      }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < ROUND; ++c)
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        float4 four = exchange[(c * PARTS + part) * THREADS + from];
        float* e = v[first + c] + 4 * part;
        e[0] = four.x, e[1] = four.y, e[2] = four.z, e[3] = four.w;
      }
  }
}

#if EACH == 8
typedef uint4 Vector;
#else
typedef uint2 Vector;
#endif

extern "C" __global__ void __launch_bounds__(THREADS) hadamard_published(const Vector* x, Vector* y) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  x += (u64)blockIdx.x * (THREADS * CHUNKS), y += (u64)blockIdx.x * (THREADS * CHUNKS);
  Vector raw[CHUNKS];
  float v[CHUNKS][EACH];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) raw[c] = x[c * THREADS + threadIdx.x];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const u32* words = (const u32*)&raw[c];
#pragma unroll
    for (int e = 0; e < EACH; ++e) v[c][e] = wide((u16)(words[e / 2] >> 16 * (e % 2)));
    butterflies(v[c]);
  }
  across_lanes(v, 32, lane);
  if (WARPS > 1) {
    const int other_warp = lane % WARPS, other_lane = warp * (32 / WARPS) + lane / WARPS;
    const int own = warp * 32 + (lane ^ warp), other = other_warp * 32 + (other_lane ^ other_warp);
    swap(v, own, other);
    across_lanes(v, WARPS, lane);
    swap(v, other, own);
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    float column[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) column[c] = v[c][e];
#if FACTOR == 1
    butterflies(column);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) v[c][e] = column[c];
#else
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) sum = minus(i) >> c & 1 ? sum - column[c] : sum + column[c];
      v[i][e] = sum;
    }
#endif
  }
  const float scale = __uint_as_float(SCALE);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    u32* words = (u32*)&raw[c];
#pragma unroll
    for (int e = 0; e < EACH; e += 2)
      words[e / 2] = narrow(v[c][e] * scale) | (u32)narrow(v[c][e + 1] * scale) << 16;
    y[c * THREADS + threadIdx.x] = raw[c];
  }
}
