// Codes of tokens: norm, or gate, or rotary embedding of heads, left^T X right, range, scale, codes, one token of n = N1 N2
// at a time (flute/kernels/tokens.py and heads.py say what is rounded where).
//
//     left [P1][P1 + 8]    right [P2][P2 + 8]    x [P1][P2 + 8]    norm's weight, as x    y = round(X right), as x
//     z in float32, [P1][P2 + 8]
//
// P1, P2 are N1, N2 padded to 16 with zeros. A warp makes ROWS x COLUMNS tiles of 16 x 16 of a product. Matrices are read
// once a block, before the kernel in front is over; blocks go on from token to token. ROOM says what shared memory holds:
// 2: all of it (y lies where z will), and the next token is on its way as soon as x is no longer needed; 1: y and z lie
// where x was; 0: z lies over right and x, and right is read again. For one token a launch runs its code once, so what
// counts is how little of it there is: z goes through shared memory to be quantized in a short loop.
//
// A CLUSTER of blocks shares one token where there are fewer tokens than SMs: each has all of x and makes PART columns, of
// both products, since columns do not meet before the range. Each gates its share of x for all of them.
//
// Host macros: BF16, RANGES, N1, N2, LEFT, RIGHT, NORM, GATED, TURN (whether there is one), CLUSTER, ROWS, COLUMNS, ROOM,
// BLOCKS (that an SM is to hold), BITS_OUT (0: z itself, rounded), SYMMETRIC.

constexpr int P1 = (N1 + 15) / 16 * 16, P2 = (N2 + 15) / 16 * 16, TILES1 = P1 / 16, TILES2 = P2 / 16 / CLUSTER;
constexpr int ACROSS = (TILES2 + COLUMNS - 1) / COLUMNS, WARPS = (TILES1 + ROWS - 1) / ROWS * ACROSS, THREADS = 32 * WARPS;
constexpr int PITCH1 = P1 + 8, PITCH2 = P2 + 8, SIZE = N1 * N2, X_BYTES = P1 * PITCH2 * 2, RUN = N2 % 8 == 0 ? 8 : 1;
constexpr int PART = CLUSTER == 1 ? N2 : N2 / CLUSTER, PITCH = P2 / CLUSTER + 8;  // of right, y and z in a block
constexpr int LEFT_AT = 0, RIGHT_AT = LEFT_AT + LEFT * P1 * PITCH1 * 2, X_AT = RIGHT_AT + RIGHT * P2 * PITCH2 * 2;
constexpr int WEIGHT_AT = X_AT + (ROOM == 1 ? 2 : 1) * X_BYTES, END = WEIGHT_AT + NORM * X_BYTES;
constexpr int Y_AT = ROOM == 2 ? END : X_AT, Z_AT = ROOM == 0 ? RIGHT_AT : Y_AT;
constexpr int RANGES_AT = END + (ROOM == 2 ? 2 * X_BYTES : 0), REDUCE_AT = RANGES_AT + (CLUSTER > 1 ? 8 * CLUSTER : 0);

static_assert(ROOM > 0 || (RIGHT && P2 >= P1), "z lies over right and x");
static_assert(CLUSTER == 1 || (N2 % (16 * CLUSTER) == 0 && ROOM > 0), "each block has whole tiles");

// A run of neighbours in a row of a token: RUN where rows are whole runs, else one by one.
template <class T>
struct __align__(sizeof(T) * RUN < 16 ? sizeof(T) * RUN : 16) Run {
  T values[RUN];
};

__device__ __forceinline__ int run_at(int i) { return i / (N2 / RUN) * PITCH2 + i % (N2 / RUN) * RUN; }

// rows x columns in memory, `apart` from row to row -> padded rows of `pitch` in shared memory.
__device__ __forceinline__ void copy_matrix(u8* to, const u16* from, int rows, int columns, int padded_rows, int pitch, int apart) {
  if (columns % 8 == 0) {
    const int pieces = (pitch - 8) / 8;
    for (int i = threadIdx.x; i < padded_rows * pieces; i += THREADS) {
      const int row = i / pieces, piece = i % pieces;
      const bool inside = row < rows && piece * 8 < columns;
      copy_async_or_zero(shared_address(to) + (row * pitch + piece * 8) * 2, inside ? from + row * apart + piece * 8 : from, inside);
    }
  } else {
    for (int i = threadIdx.x; i < padded_rows * (pitch - 8); i += THREADS) {
      const int row = i / (pitch - 8), column = i % (pitch - 8);
      ((u16*)to)[row * pitch + column] = row < rows && column < columns ? from[row * apart + column] : (u16)0;
    }
  }
}

#if CLUSTER > 1
__device__ __forceinline__ u32 in_block(u32 address, u32 block) {
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
  return address;
}

__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif

// silu(gate) * up, each rounded as torch rounds it, into padded rows; gate and up are neighbours. In a cluster each block
// does every CLUSTER-th run and stores it in all blocks; they must have begun, and must meet before x is read.
__device__ __forceinline__ void gate(u16* x, const u16* gates, u32 rank) {
  for (int i = threadIdx.x * CLUSTER + rank; i < P1 * P2 / RUN; i += THREADS * CLUSTER) {
    const int row = i / (P2 / RUN), column = i % (P2 / RUN) * RUN;
    Run<u16> made = {};
    if (row < N1 && column < N2) {
      const Run<u16> first = *(const Run<u16>*)(gates + row * N2 + column);
      const Run<u16> second = *(const Run<u16>*)(gates + SIZE + row * N2 + column);
#pragma unroll
      for (int e = 0; e < RUN; ++e) {
        made.values[e] = silu_times(first.values[e], second.values[e]);
      }
    }
#if CLUSTER > 1
    const uint4 words = *(const uint4*)&made;
#pragma unroll
    for (int block = 0; block < CLUSTER; ++block) {
      asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(in_block(shared_address(x + row * PITCH2 + column), block)),
                   "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                   : "memory");
    }
#else
    *(Run<u16>*)(x + row * PITCH2 + column) = made;
#endif
  }
}

// x / sqrt(mean(x^2) + eps), rounded, times the weight, rounded.
__device__ __forceinline__ void normalize(u16* x, const u16* weight, float eps, float* scratch) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < SIZE / RUN; i += THREADS) {
    const Run<u16> run = *(const Run<u16>*)(x + run_at(i));
#pragma unroll
    for (int e = 0; e < RUN; ++e) sum = __fmaf_rn(wide(run.values[e]), wide(run.values[e]), sum);
  }
  sum = reduce_block<WARPS, false>(sum, scratch);
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)SIZE), eps)));
  for (int i = threadIdx.x; i < SIZE / RUN; i += THREADS) {
    Run<u16> run = *(const Run<u16>*)(x + run_at(i));
    const Run<u16> weights = *(const Run<u16>*)(weight + run_at(i));
#pragma unroll
    for (int e = 0; e < RUN; ++e) {
      run.values[e] = narrow(wide(weights.values[e]) * wide(narrow(__fmul_rn(wide(run.values[e]), factor))));
    }
    *(Run<u16>*)(x + run_at(i)) = run;
  }
  __syncthreads();
}

// Rotary embedding of every row, a head of N2 numbers, rounded as transformers rounds it.
__device__ __forceinline__ void turn(u16* x, const u16* cos, const u16* sin) {
  constexpr int HALF = N2 / 2;
  for (int i = threadIdx.x; i < SIZE / 2; i += THREADS) {
    const int column = i % HALF;
    u16 &low = x[i / HALF * PITCH2 + column], &high = x[i / HALF * PITCH2 + column + HALF];
    const float first = wide(low), second = wide(high);
    const auto sum = [](float a, float b) { return narrow(wide(narrow(a)) + wide(narrow(b))); };
    low = sum(__fmul_rn(first, wide(cos[column])), __fmul_rn(-second, wide(sin[column])));
    high = sum(__fmul_rn(second, wide(cos[column + HALF])), __fmul_rn(first, wide(sin[column + HALF])));
  }
  __syncthreads();
}

typedef float Sums[ROWS][COLUMNS][2][4];

// This warp's tiles of A . B over K; both lie in rows, B with k along rows, A so if it is to be TRANSPOSED.
template <int K, bool Transposed>
__device__ __forceinline__ void multiply(Sums& sums, u32 a_at, int a_pitch, u32 b_at, int b_pitch, int row_tile, int column_tile, int lane) {
  const int row = lane & 7, low = (lane >> 3 & 1) * 8, high = (lane >> 4) * 8;
  const u32 a_lane = a_at + (Transposed ? (row + high) * a_pitch + low : (row + low) * a_pitch + high) * 2;
  const u32 b_lane = b_at + ((row + low) * b_pitch + 16 * column_tile + high) * 2;
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS * 8; ++i) sums[i / (COLUMNS * 8)][i / 8 % COLUMNS][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll 2
  for (int k = 0; k < K; k += 16) {
    u32 b[COLUMNS][4];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      if (TILES2 % COLUMNS == 0 || column_tile + j < TILES2) load_transposed(b[j], b_lane + (k * b_pitch + 16 * j) * 2);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      if (TILES1 % ROWS != 0 && row_tile + i >= TILES1) break;
      u32 a[4];
      if (Transposed) {
        load_transposed(a, a_lane + (k * a_pitch + 16 * (row_tile + i)) * 2);
      } else {
        uint4 four;
        load_tokens(four, a_lane + (16 * (row_tile + i) * a_pitch + k) * 2);
        a[0] = four.x, a[1] = four.y, a[2] = four.z, a[3] = four.w;
      }
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        tensor_step(sums[i][j][0], a, b[j][0], b[j][1]);
        tensor_step(sums[i][j][1], a, b[j][2], b[j][3]);
      }
    }
  }
}

// The numbers of one thread, padding too, two neighbours at a time: visit(pair, row, column).
template <class Visit>
__device__ __forceinline__ void each(Sums& sums, int row_tile, int column_tile, int lane, Visit visit) {
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS * 4; ++i) {
    const int r = i / (4 * COLUMNS), c = i / 4 % COLUMNS, n = i / 2 % 2, half = i % 2;
    const int row = 16 * (row_tile + r) + (lane >> 2) + 8 * half, column = 16 * (column_tile + c) + 8 * n + 2 * (lane & 3);
    if (row_tile + r < TILES1 && column_tile + c < TILES2) {
      visit(make_float2(sums[r][c][n][2 * half], sums[r][c][n][2 * half + 1]), row, column);
    }
  }
}

// One launch: tokens x (`apart` from one to the next), in `units` of N1 rows each; where they go, `out`.
struct Work {
  const u16 *x, *left, *right, *weight;
  const float* clip;
  const u16 *cos, *sin;
  u8* out;
  float* scale;
  int* zero;
  u64 m, apart;
  u32 units, angles;
  float eps;
};

__device__ __forceinline__ void run(const Work& work) {
  extern __shared__ __align__(128) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row_tile = warp / ACROSS * ROWS, column_tile = warp % ACROSS * COLUMNS;
  const u32 shared = shared_address(memory), rank = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER, first_column = rank * PART;
  float *scratch = (float*)(memory + REDUCE_AT), *z = (float*)(memory + Z_AT);
  const auto fetch = [&](u64 token) {
    const u16* from = TURN ? work.x + token / work.units * work.apart + token % work.units * SIZE : work.x + token * work.apart;
    if (token < work.m && GATED) gate((u16*)(memory + X_AT), from, rank);
    if (token < work.m && !GATED) copy_matrix(memory + X_AT, from, N1, N2, P1, PITCH2, N2);
    commit_copies();
  };
  const auto fetch_right = [&] { copy_matrix(memory + RIGHT_AT, work.right + first_column, N2, PART, P2, PITCH, N2); };
  let_next_begin();
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  if (LEFT) copy_matrix(memory + LEFT_AT, work.left, N1, N1, P1, PITCH1, N1);
  if (RIGHT) fetch_right();
  if (NORM) copy_matrix(memory + WEIGHT_AT, work.weight, N1, N2, P1, PITCH2, N2);
#if CLUSTER > 1
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all blocks of the cluster have begun
#endif
  [[maybe_unused]] const Ratios ratios(work.clip);
  wait_for_last();
  fetch(blockIdx.x / CLUSTER);
  for (u64 token = blockIdx.x / CLUSTER; token < work.m; token += gridDim.x / CLUSTER) {
    wait_copies<0>();
#if CLUSTER > 1 && GATED
    meet_cluster();
#else
    __syncthreads();
#endif
    if (NORM) normalize((u16*)(memory + X_AT), (const u16*)(memory + WEIGHT_AT), work.eps, scratch + 2 * WARPS);
    if (TURN) {
      const u64 angle = (u32)(token / work.units) % work.angles * N2;
      turn((u16*)(memory + X_AT), work.cos + angle, work.sin + angle);
    }
    Sums sums;
    if (RIGHT) multiply<P2, false>(sums, shared + X_AT, PITCH2, shared + RIGHT_AT, PITCH, row_tile, column_tile, lane);
    if (RIGHT && LEFT) {
      if (ROOM < 2) __syncthreads();
      each(sums, row_tile, column_tile, lane, [&](float2 pair, int row, int column) {
        *(u32*)(memory + Y_AT + (row * PITCH + column) * 2) = narrow_pair(pair.x, pair.y);
      });
      __syncthreads();
      if (ROOM == 2 && CLUSTER == 1) fetch(token + gridDim.x);
    }
    if (LEFT && RIGHT) multiply<P1, true>(sums, shared + LEFT_AT, PITCH1, shared + Y_AT, PITCH, row_tile, column_tile, lane);
    if (LEFT && !RIGHT) {
      multiply<P1, true>(sums, shared + LEFT_AT, PITCH1, shared + X_AT + first_column * 2, PITCH2, row_tile, column_tile, lane);
    }
    float low = __uint_as_float(0x7f800000u), high = -low;
    each(sums, row_tile, column_tile, lane, [&](float2 pair, int row, int column) {
      if ((P1 == N1 || row < N1) && (P2 == N2 || column < N2)) low = fminf(low, pair.x), high = fmaxf(high, pair.x);
      if ((P1 == N1 || row < N1) && (P2 == N2 || column + 1 < N2)) low = fminf(low, pair.y), high = fmaxf(high, pair.y);
    });
    high = reduce_block<WARPS, true>(high, scratch);  // all are done with x and y, too
    if (ROOM == 2 && CLUSTER == 1 && !(RIGHT && LEFT)) fetch(token + gridDim.x);
    each(sums, row_tile, column_tile, lane, [&](float2 pair, int row, int column) { *(float2*)(z + row * PITCH + column) = pair; });
    low = -reduce_block<WARPS, true>(-low, scratch + WARPS);
#if CLUSTER > 1
    if (threadIdx.x < CLUSTER) {
      asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(in_block(shared + RANGES_AT + 8 * rank, threadIdx.x)), "f"(low), "f"(high)
                   : "memory");
    }
    __syncwarp();
    meet_cluster();
#pragma unroll
    for (int block = 0; block < CLUSTER; ++block) {
      const float2 range = ((const float2*)(memory + RANGES_AT))[block];
      low = fminf(low, range.x), high = fmaxf(high, range.y);
    }
#endif
#if BITS_OUT
    const Range range = make_range<BITS_OUT, SYMMETRIC, false>(low, high, ratios);
    if (threadIdx.x == 0 && rank == 0) {
      work.scale[token] = range.scale;
      if (!SYMMETRIC) work.zero[token] = (int)range.zero;
    }
    Run<u8>* to = (Run<u8>*)(work.out + token * SIZE);
#else
    Run<u16>* to = (Run<u16>*)(work.out + token * SIZE * 2);
#endif
#pragma unroll 1
    for (int i = threadIdx.x; i < N1 * PART / RUN; i += THREADS) {
      const int row = i / (PART / RUN), piece = i % (PART / RUN);
      const Run<float> run = *(const Run<float>*)(z + row * PITCH + piece * RUN);
#if BITS_OUT
      Run<u8> made;
      make_codes<BITS_OUT>(made.values, run.values, range);
#else
      Run<u16> made;
#pragma unroll
      for (int e = 0; e < RUN; ++e) made.values[e] = narrow(run.values[e]);
#endif
      to[CLUSTER == 1 ? i : row * (N2 / RUN) + first_column / RUN + piece] = made;
    }
    if (ROOM < 2 && CLUSTER == 1) {
      __syncthreads();
      if (ROOM == 0) fetch_right();
      fetch(token + gridDim.x);
    }
  }
}

#if TURN
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    turn_heads(const u16* q, const u16* k, const u16* query, const u16* key, const u16* cos, const u16* sin, u8* q_out, u8* k_out,
               u64 m, u64 q_apart, u64 k_apart, u32 q_units, u32 k_units, u32 angles) {
  const bool of_keys = blockIdx.y == 1;  // one copy of the code for both
  const u32 units = of_keys ? k_units : q_units;
  run({of_keys ? k : q, nullptr, of_keys ? key : query, nullptr, nullptr, cos, sin, of_keys ? k_out : q_out, nullptr, nullptr,
       m * units, of_keys ? k_apart : q_apart, units, angles, 0.0f});
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    kronecker(const u16* x, const u16* left, const u16* right, const u16* weight, const float* clip, u8* out, float* scale, int* zero,
              u64 m, float eps) {
  run({x, left, right, weight, clip, nullptr, nullptr, out, scale, zero, m, (GATED ? 2 : 1) * SIZE, 1, 1, eps});
}
#endif
