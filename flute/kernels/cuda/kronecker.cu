// Codes of tokens: norm, or rotary embedding of heads, left^T X right, range, scale, codes, one token of n = N1 N2 at a time (flute/kernels/tokens.py says
// what is rounded where).
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
// Host macros: BF16, RANGES, N1, N2, LEFT, RIGHT, NORM, TURN (whether there is one), ROWS, COLUMNS, ROOM, BLOCKS (that an SM
// is to hold), BITS_OUT (0: z itself, rounded), SYMMETRIC.

constexpr int P1 = (N1 + 15) / 16 * 16, P2 = (N2 + 15) / 16 * 16, TILES1 = P1 / 16, TILES2 = P2 / 16;
constexpr int ACROSS = (TILES2 + COLUMNS - 1) / COLUMNS, WARPS = (TILES1 + ROWS - 1) / ROWS * ACROSS, THREADS = 32 * WARPS;
constexpr int PITCH1 = P1 + 8, PITCH2 = P2 + 8, SIZE = N1 * N2, X_BYTES = P1 * PITCH2 * 2, RUN = N2 % 8 == 0 ? 8 : 1;
constexpr int LEFT_AT = 0, RIGHT_AT = LEFT_AT + LEFT * P1 * PITCH1 * 2, X_AT = RIGHT_AT + RIGHT * P2 * PITCH2 * 2;
constexpr int WEIGHT_AT = X_AT + (ROOM == 1 ? 2 : 1) * X_BYTES, END = WEIGHT_AT + NORM * X_BYTES;
constexpr int Y_AT = ROOM == 2 ? END : X_AT, Z_AT = ROOM == 0 ? RIGHT_AT : Y_AT;
constexpr int REDUCE_AT = END + (ROOM == 2 ? 2 * X_BYTES : 0);

static_assert(ROOM > 0 || (RIGHT && P2 >= P1), "z lies over right and x");

// A run of neighbours in a row of a token: RUN where rows are whole runs, else one by one.
template <class T>
struct __align__(sizeof(T) * RUN < 16 ? sizeof(T) * RUN : 16) Run {
  T values[RUN];
};

__device__ __forceinline__ int run_at(int i) { return i / (N2 / RUN) * PITCH2 + i % (N2 / RUN) * RUN; }

// rows x columns in memory -> padded rows of `pitch` in shared memory.
__device__ __forceinline__ void copy_matrix(u8* to, const u16* from, int rows, int columns, int padded_rows, int pitch) {
  if (columns % 8 == 0) {
    const int pieces = (pitch - 8) / 8;
    for (int i = threadIdx.x; i < padded_rows * pieces; i += THREADS) {
      const int row = i / pieces, piece = i % pieces;
      const bool inside = row < rows && piece * 8 < columns;
      copy_async_or_zero(shared_address(to) + (row * pitch + piece * 8) * 2, inside ? from + row * columns + piece * 8 : from, inside);
    }
  } else {
    for (int i = threadIdx.x; i < padded_rows * (pitch - 8); i += THREADS) {
      const int row = i / (pitch - 8), column = i % (pitch - 8);
      ((u16*)to)[row * pitch + column] = row < rows && column < columns ? from[row * columns + column] : (u16)0;
    }
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
__device__ __forceinline__ void multiply(Sums& sums, u32 a_at, int a_pitch, u32 b_at, int row_tile, int column_tile, int lane) {
  const int row = lane & 7, low = (lane >> 3 & 1) * 8, high = (lane >> 4) * 8;
  const u32 a_lane = a_at + (Transposed ? (row + high) * a_pitch + low : (row + low) * a_pitch + high) * 2;
  const u32 b_lane = b_at + ((row + low) * PITCH2 + 16 * column_tile + high) * 2;
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS * 8; ++i) sums[i / (COLUMNS * 8)][i / 8 % COLUMNS][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll 2
  for (int k = 0; k < K; k += 16) {
    u32 b[COLUMNS][4];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      if (TILES2 % COLUMNS == 0 || column_tile + j < TILES2) load_transposed(b[j], b_lane + (k * PITCH2 + 16 * j) * 2);
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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    kronecker(const u16* x, const u16* left, const u16* right, const u16* weight, const float* clip, const u16* cos,
              const u16* sin, u8* out, float* scale, int* zero, u64 m, float eps) {
  extern __shared__ __align__(128) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row_tile = warp / ACROSS * ROWS, column_tile = warp % ACROSS * COLUMNS;
  const u32 shared = shared_address(memory);
  float *scratch = (float*)(memory + REDUCE_AT), *z = (float*)(memory + Z_AT);
  const auto fetch = [&](u64 token) {
    if (token < m) copy_matrix(memory + X_AT, x + token * SIZE, N1, N2, P1, PITCH2);
    commit_copies();
  };
  let_next_begin();
  if (LEFT) copy_matrix(memory + LEFT_AT, left, N1, N1, P1, PITCH1);
  if (RIGHT) copy_matrix(memory + RIGHT_AT, right, N2, N2, P2, PITCH2);
  if (NORM) copy_matrix(memory + WEIGHT_AT, weight, N1, N2, P1, PITCH2);
  wait_for_last();
  fetch(blockIdx.x);
  for (u64 token = blockIdx.x; token < m; token += gridDim.x) {
    wait_copies<0>();
    __syncthreads();
    if (NORM) normalize((u16*)(memory + X_AT), (const u16*)(memory + WEIGHT_AT), eps, scratch + 2 * WARPS);
    if (TURN) turn((u16*)(memory + X_AT), cos + token * N2, sin + token * N2);
    Sums sums;
    if (RIGHT) multiply<P2, false>(sums, shared + X_AT, PITCH2, shared + RIGHT_AT, row_tile, column_tile, lane);
    if (RIGHT && LEFT) {
      if (ROOM < 2) __syncthreads();
      each(sums, row_tile, column_tile, lane, [&](float2 pair, int row, int column) {
        *(u32*)(memory + Y_AT + (row * PITCH2 + column) * 2) = narrow_pair(pair.x, pair.y);
      });
      __syncthreads();
      if (ROOM == 2) fetch(token + gridDim.x);
    }
    if (LEFT) multiply<P1, true>(sums, shared + LEFT_AT, PITCH1, shared + (RIGHT ? Y_AT : X_AT), row_tile, column_tile, lane);
    float low = __uint_as_float(0x7f800000u), high = -low;
    each(sums, row_tile, column_tile, lane, [&](float2 pair, int row, int column) {
      if ((P1 == N1 || row < N1) && (P2 == N2 || column < N2)) low = fminf(low, pair.x), high = fmaxf(high, pair.x);
      if ((P1 == N1 || row < N1) && (P2 == N2 || column + 1 < N2)) low = fminf(low, pair.y), high = fmaxf(high, pair.y);
    });
    high = reduce_block<WARPS, true>(high, scratch);  // all are done with x and y, too
    if (ROOM == 2 && !(RIGHT && LEFT)) fetch(token + gridDim.x);
    each(sums, row_tile, column_tile, lane, [&](float2 pair, int row, int column) { *(float2*)(z + row * PITCH2 + column) = pair; });
    low = -reduce_block<WARPS, true>(-low, scratch + WARPS);
#if BITS_OUT
    const Range range = make_range<BITS_OUT, SYMMETRIC, false>(low, high, clip);
    if (threadIdx.x == 0) {
      scale[token] = range.scale;
      if (!SYMMETRIC) zero[token] = (int)range.zero;
    }
    Run<u8>* to = (Run<u8>*)(out + token * SIZE);
#else
    Run<u16>* to = (Run<u16>*)(out + token * SIZE * 2);
#endif
#pragma unroll 1
    for (int i = threadIdx.x; i < SIZE / RUN; i += THREADS) {
      const Run<float> run = *(const Run<float>*)(z + run_at(i));
#if BITS_OUT
      Run<u8> made;
      make_codes<BITS_OUT>(made.values, run.values, range);
#else
      Run<u16> made;
#pragma unroll
      for (int e = 0; e < RUN; ++e) made.values[e] = narrow(run.values[e]);
#endif
      to[i] = made;
    }
    if (ROOM < 2) {
      __syncthreads();
      if (ROOM == 0) copy_matrix(memory + RIGHT_AT, right, N2, N2, P2, PITCH2);
      fetch(token + gridDim.x);
    }
  }
}
