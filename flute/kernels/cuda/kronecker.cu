// Codes of tokens: norm, or gate, or rotary embedding of heads, left^T X right, range, scale, codes, one token of n = N1 N2
// at a time (flute/kernels/tokens.py and heads.py say what is rounded where).
//
//     left [P1][P1 + 8]    right [P2][P2 + 8]    x [P1][P2 + 8]    norm's weight, as x    y = round(X right), as x
//     z in float32, [P1][P2 + 8]
//
// P1, P2 are N1, N2 padded to 16 with zeros. A warp makes ROWS x COLUMNS tiles of 16 x 16 of a product. Matrices are read
// once a block, before the kernel in front is over; blocks go on from token to token. ROOM says what shared memory holds:
// 2: all of it (y lies where z will), and the next token is on its way as soon as x is no longer needed; 1: y and z lie
// where x was; 0: z lies over right and x, and right is read again.
//
// A CLUSTER of blocks shares one token where there are fewer tokens than SMs: each has all of x (or, where no step needs
// the rest, its columns) and makes PART columns, of both products, since columns do not meet before the range. Each gates
// its share of x for all of them.
//
// For one token a launch runs its code once, and what counts is how little of it there is. SHORT: blocks have about one
// token, so few loops are unrolled, no token is fetched early, and a warp that has one tile makes codes of the sums that
// it holds.
//
// Host macros: BF16, RANGES, N1, N2, LEFT, RIGHT, NORM, GATED, TURN (whether there is one), CLUSTER, ROWS, COLUMNS, ROOM,
// BLOCKS (that an SM is to hold), SHORT, BITS_OUT (0: z itself, rounded), SYMMETRIC.

constexpr int P1 = (N1 + 15) / 16 * 16, P2 = (N2 + 15) / 16 * 16, TILES1 = P1 / 16, TILES2 = P2 / 16 / CLUSTER;
constexpr int ACROSS = (TILES2 + COLUMNS - 1) / COLUMNS, WARPS = (TILES1 + ROWS - 1) / ROWS * ACROSS, THREADS = 32 * WARPS;
constexpr int PITCH1 = P1 + 8, PITCH2 = P2 + 8, SIZE = N1 * N2, RUN = N2 % 8 == 0 ? 8 : 1;
constexpr int PART = CLUSTER == 1 ? N2 : N2 / CLUSTER, PITCH = P2 / CLUSTER + 8;  // of right, y and z in a block
constexpr bool WHOLE = CLUSTER == 1 || RIGHT || NORM || GATED;                    // whether a block needs all of x
constexpr int X_PITCH = WHOLE ? PITCH2 : PITCH, X_BYTES = P1 * X_PITCH * 2, Y_BYTES = P1 * PITCH * 2;
constexpr int LEFT_AT = 0, RIGHT_AT = LEFT_AT + LEFT * P1 * PITCH1 * 2, X_AT = RIGHT_AT + RIGHT * P2 * PITCH * 2;
constexpr int WEIGHT_AT = X_AT + X_BYTES + (ROOM == 1) * Y_BYTES, END = WEIGHT_AT + NORM * X_BYTES;
constexpr int Y_AT = ROOM == 2 ? END : X_AT, Z_AT = ROOM == 0 ? RIGHT_AT : Y_AT;
constexpr int ANGLES_AT = END + (ROOM == 2) * 2 * Y_BYTES, RANGES_AT = ANGLES_AT + TURN * 4 * PITCH2;
constexpr int REDUCE_AT = RANGES_AT + 8 * CLUSTER * WARPS;
constexpr bool AHEAD = !SHORT && ROOM == 2 && CLUSTER == 1;           // whether the next token is fetched early
constexpr bool DIRECT = SHORT && ROWS * COLUMNS == 1 && N2 % 2 == 0;  // whether z stays in registers

static_assert(ROOM > 0 || (RIGHT && P2 >= P1), "z lies over right and x");
static_assert(CLUSTER == 1 || (N2 % (16 * CLUSTER) == 0 && ROOM > 0), "each block has whole tiles");

#if SHORT
#define SHORT_LOOP _Pragma("unroll 1")
#else
#define SHORT_LOOP  // as the compiler likes
#endif

// A run of neighbours in a row of a token: RUN where rows are whole runs, else one by one.
template <class T>
struct __align__(sizeof(T) * RUN < 16 ? sizeof(T) * RUN : 16) Run {
  T values[RUN];
};

__device__ __forceinline__ int run_at(int i) { return i / (N2 / RUN) * PITCH2 + i % (N2 / RUN) * RUN; }

// rows x columns in memory, `apart` from row to row -> padded rows of `pitch` in shared memory.
__device__ __forceinline__ void copy_matrix(u8* to, const u16* from, int rows, int columns, int padded_rows, int pitch,
                                            int apart) {
  if (columns % 8 == 0) {
    const int pieces = (pitch - 8) / 8;
    SHORT_LOOP
    for (int i = threadIdx.x; i < padded_rows * pieces; i += THREADS) {
      const int row = i / pieces, piece = i % pieces;
      const bool inside = row < rows && piece * 8 < columns;
      const u16* piece_at = inside ? from + row * apart + piece * 8 : from;
      copy_async_or_zero(shared_address(to) + (row * pitch + piece * 8) * 2, piece_at, inside);
    }
  } else {
    SHORT_LOOP
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
#endif

// All threads of a cluster, or of a block.
__device__ __forceinline__ void meet() {
  if (CLUSTER > 1) meet_cluster();
  else __syncthreads();
}

// silu(gate) * up of eight, each rounded as torch rounds it; in a loop of two pairs, through which the words are turned.
__device__ __forceinline__ uint4 gated(uint4 gate, uint4 up) {
#pragma unroll SHORT ? 2 : 4
  for (int i = 0; i < 4; ++i) {
    const u16 low = silu_times((u16)gate.x, (u16)up.x), high = silu_times((u16)(gate.x >> 16), (u16)(up.x >> 16));
    gate = make_uint4(gate.y, gate.z, gate.w, (u32)low | (u32)high << 16);
    up = make_uint4(up.y, up.z, up.w, 0);
  }
  return gate;
}

// The same of a token, into padded rows; gate and up are neighbours. In a cluster each block does every CLUSTER-th run and
// stores it in all blocks; they must have begun, and must meet before x is read.
__device__ __forceinline__ void gate(u16* x, const u16* gates, u32 rank) {
  SHORT_LOOP
  for (int i = threadIdx.x * CLUSTER + rank; i < P1 * P2 / RUN; i += THREADS * CLUSTER) {
    const int row = i / (P2 / RUN), column = i % (P2 / RUN) * RUN;
    Run<u16> first = {}, second = {};
    if (row < N1 && column < N2) {
      first = *(const Run<u16>*)(gates + row * N2 + column);
      second = *(const Run<u16>*)(gates + SIZE + row * N2 + column);
    }
#if N2 % 8 == 0
    const uint4 made = gated(*(const uint4*)&first, *(const uint4*)&second);
#else
    const Run<u16> made = {silu_times(first.values[0], second.values[0])};
#endif
#if CLUSTER > 1
#pragma unroll
    for (int block = 0; block < CLUSTER; ++block) {
      const u32 to = in_block(shared_address(x + row * PITCH2 + column), block);
      asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(made.x), "r"(made.y), "r"(made.z), "r"(made.w)
                   : "memory");
    }
#else
    *(Run<u16>*)(x + row * PITCH2 + column) = *(const Run<u16>*)&made;
#endif
  }
}

// x / sqrt(mean(x^2) + eps), rounded, times the weight, rounded.
__device__ __forceinline__ void normalize(u16* x, const u16* weight, float eps, float* scratch) {
  float sum = 0.0f;
  SHORT_LOOP
  for (int i = threadIdx.x; i < SIZE / RUN; i += THREADS) {
    const Run<u16> run = *(const Run<u16>*)(x + run_at(i));
#pragma unroll
    for (int e = 0; e < RUN; ++e) sum = __fmaf_rn(wide(run.values[e]), wide(run.values[e]), sum);
  }
  sum = reduce_block<WARPS, false>(sum, scratch);
  const float mean = SIZE & (SIZE - 1) ? __fdiv_rn(sum, (float)SIZE) : __fmul_rn(sum, 1.0f / SIZE);
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
  SHORT_LOOP
  for (int i = threadIdx.x; i < SIZE / RUN; i += THREADS) {
    Run<u16> run = *(const Run<u16>*)(x + run_at(i));
    const Run<u16> weights = *(const Run<u16>*)(weight + run_at(i));
#if N2 % 8 == 0
    u32* words = (u32*)&run;
#pragma unroll
    for (int e = 0; e < 4; ++e) {  // narrowed two at a time
      const u32 by = ((const u32*)&weights)[e];
      words[e] = narrow_pair(__fmul_rn(wide((u16)words[e]), factor), __fmul_rn(wide((u16)(words[e] >> 16)), factor));
      words[e] = narrow_pair(wide((u16)by) * wide((u16)words[e]), wide((u16)(by >> 16)) * wide((u16)(words[e] >> 16)));
    }
#else
    run.values[0] = narrow(wide(weights.values[0]) * wide(narrow(__fmul_rn(wide(run.values[0]), factor))));
#endif
    *(Run<u16>*)(x + run_at(i)) = run;
  }
  __syncthreads();
}

// Rotary embedding of every row, a head of N2 numbers, rounded as transformers rounds it.
__device__ __forceinline__ void turn(u16* x, const u16* cos, const u16* sin) {
  constexpr int HALF = N2 / 2;
  SHORT_LOOP
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
__device__ __forceinline__ void multiply(Sums& sums, u32 a_at, int a_pitch, u32 b_at, int b_pitch, int row_tile,
                                         int column_tile, int lane) {
  constexpr int AT_ONCE = DIRECT && K <= 128 ? K / 16 : 2;  // all of a few steps: their operands come together
  const int row = lane & 7, low = (lane >> 3 & 1) * 8, high = (lane >> 4) * 8;
  const u32 a_lane = a_at + (Transposed ? (row + high) * a_pitch + low : (row + low) * a_pitch + high) * 2;
  const u32 b_lane = b_at + ((row + low) * b_pitch + 16 * column_tile + high) * 2;
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS * 8; ++i) sums[i / (COLUMNS * 8)][i / 8 % COLUMNS][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll AT_ONCE
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
  u64 apart;
  u32 m, units, angles;
  float eps;
};

__device__ __forceinline__ void run(const Work& work) {
  extern __shared__ __align__(128) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row_tile = warp / ACROSS * ROWS, column_tile = warp % ACROSS * COLUMNS;
  const u32 shared = shared_address(memory), rank = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER, first_column = rank * PART;
  float *scratch = (float*)(memory + REDUCE_AT), *z = (float*)(memory + Z_AT);
  u16 *x = (u16*)(memory + X_AT), *cos = (u16*)(memory + ANGLES_AT), *sin = cos + PITCH2;
  const auto fetch = [&](u32 token) {
    const u32 place = TURN ? token / work.units : token;
    const u16* from = work.x + place * work.apart + (WHOLE ? 0 : first_column);
    if (TURN) {
      const u64 angle = (u64)(place % work.angles) * N2;
      copy_matrix((u8*)cos, work.cos + angle, 1, N2, 1, PITCH2, N2);
      copy_matrix((u8*)sin, work.sin + angle, 1, N2, 1, PITCH2, N2);
      from += (token - place * work.units) * SIZE;
    }
    if (GATED) gate(x, from, rank);
    else copy_matrix((u8*)x, from, N1, WHOLE ? N2 : PART, P1, X_PITCH, N2);
    commit_copies();
  };
  const auto fetch_right = [&] { copy_matrix(memory + RIGHT_AT, work.right + first_column, N2, PART, P2, PITCH, N2); };
  const u32 stride = gridDim.x / CLUSTER;
  u32 token = blockIdx.x / CLUSTER;
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
  if (AHEAD && token < work.m) fetch(token);
  while (token < work.m) {
    if (!AHEAD) fetch(token);
    wait_copies<0>();
#if GATED
    meet();
#else
    __syncthreads();
#endif
    if (NORM) normalize(x, (const u16*)(memory + WEIGHT_AT), work.eps, scratch);
    if (TURN) turn(x, cos, sin);
    Sums sums;
    if (RIGHT) multiply<P2, false>(sums, shared + X_AT, PITCH2, shared + RIGHT_AT, PITCH, row_tile, column_tile, lane);
    if (RIGHT && LEFT) {
      if (ROOM < 2) __syncthreads();
      each(sums, row_tile, column_tile, lane, [&](float2 pair, int row, int column) {
        *(u32*)(memory + Y_AT + (row * PITCH + column) * 2) = narrow_pair(pair.x, pair.y);
      });
      __syncthreads();
      if (AHEAD && token + stride < work.m) fetch(token + stride);
    }
    if (LEFT && RIGHT) multiply<P1, true>(sums, shared + LEFT_AT, PITCH1, shared + Y_AT, PITCH, row_tile, column_tile, lane);
    if (LEFT && !RIGHT) {
      multiply<P1, true>(sums, shared + LEFT_AT, PITCH1, shared + X_AT + (WHOLE ? first_column * 2 : 0), X_PITCH, row_tile,
                         column_tile, lane);
    }
#if BITS_OUT
    // ranges of warps meet in every block of the cluster
    float low = __uint_as_float(0x7f800000u), high = -low;
    each(sums, row_tile, column_tile, lane, [&](float2 pair, int row, int column) {
      if ((P1 == N1 || row < N1) && (P2 == N2 || column < N2)) low = fminf(low, pair.x), high = fmaxf(high, pair.x);
      if ((P1 == N1 || row < N1) && (P2 == N2 || column + 1 < N2)) low = fminf(low, pair.y), high = fmaxf(high, pair.y);
    });
    low = extreme_of_warp<false>(low), high = extreme_of_warp<true>(high);
    const float2* ranges = (const float2*)(memory + RANGES_AT);
    if (lane < CLUSTER) {
#if CLUSTER > 1
      const u32 to = in_block(shared_address(ranges + rank * WARPS + warp), lane);
      asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
#else
      *(float2*)(ranges + warp) = make_float2(low, high);
#endif
    }
    __syncwarp();
#endif
    if (!DIRECT) {
      __syncthreads();  // all are done with x and y
      if (AHEAD && !(RIGHT && LEFT) && token + stride < work.m) fetch(token + stride);
      each(sums, row_tile, column_tile, lane, [&](float2 pair, int row, int column) {
        *(float2*)(z + row * PITCH + column) = pair;
      });
    }
    if (BITS_OUT || CLUSTER > 1 || !DIRECT) meet();
#if BITS_OUT
    low = __uint_as_float(0x7f800000u), high = -low;
#pragma unroll
    for (int i = 0; i < CLUSTER * WARPS; i += 32) {
      const float2 one = ranges[min(i + lane, CLUSTER * WARPS - 1)];
      low = fminf(low, one.x), high = fmaxf(high, one.y);
    }
    low = extreme_of_warp<false>(low), high = extreme_of_warp<true>(high);
    const Range range = make_range<BITS_OUT, SYMMETRIC, false>(low, high, ratios);
    if (threadIdx.x == 0 && rank == 0) {
      work.scale[token] = range.scale;
      if (!SYMMETRIC) work.zero[token] = (int)range.zero;
    }
    Run<u8>* to = (Run<u8>*)(work.out + (u64)token * SIZE);
#else
    Run<u16>* to = (Run<u16>*)(work.out + (u64)token * SIZE * 2);
#endif
    if (DIRECT) {
#if BITS_OUT
      u8 codes[8];
      make_codes<BITS_OUT>(codes, (const float(&)[8])sums, range);
#endif
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * row_tile + (lane >> 2) + i % 2 * 8, column = 16 * column_tile + i / 2 * 8 + 2 * (lane & 3);
        const u32 at = (row * N2 + first_column + column) / 2;
        if ((P1 != N1 && row >= N1) || (P2 != N2 && column >= N2)) continue;
#if BITS_OUT
        ((u16*)to)[at] = codes[2 * i] | codes[2 * i + 1] << 8;
#else
        ((u32*)to)[at] = narrow_pair(sums[0][0][i / 2][i % 2 * 2], sums[0][0][i / 2][i % 2 * 2 + 1]);
#endif
      }
    } else {
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
    }
    token += stride;
    if (!AHEAD && token < work.m) {
      __syncthreads();
      if (ROOM == 0) fetch_right();
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
       of_keys ? k_apart : q_apart, (u32)m * units, units, angles, 0.0f});
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    kronecker(const u16* x, const u16* left, const u16* right, const u16* weight, const float* clip, u8* out, float* scale, int* zero,
              u64 m, float eps) {
  run({x, left, right, weight, clip, nullptr, nullptr, out, scale, zero, (GATED ? 2 : 1) * SIZE, (u32)m, 1, 1, eps});
}
#endif
