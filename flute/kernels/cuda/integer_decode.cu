// y (M, N) of int8 codes and int4 or int8 weights for few tokens, where reading W is all the work: mma.m16n8k32 on every
// GPU from sm_80 on.
//
// A block owns 16 ROW_TILES rows of W times 8 TOKEN_TILES tokens. Its warps take pieces of W in turn, DEPTH at once,
// straight from memory into registers in the tensor core's order; the first are asked for before the kernel in front of
// this one is over. Codes of x are small and come from the caches. Sums of all warps meet in shared memory; they are
// integers, so in any order they are the same.
//
// Host macros: CODE_BITS, BF16, WARPS, ROW_TILES, TOKEN_TILES, DEPTH.

constexpr int SUMS = ROW_TILES * TOKEN_TILES * 4;
constexpr int BLOCKS = ROW_TILES > 1 ? 1 : WARPS == 8 && DEPTH <= 4 ? 3 : 2;  // that an SM is to hold

static_assert(ROW_TILES <= 2, "row_scales is read without an index");

__device__ __forceinline__ void integer_step(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct Pieces {
  const u8* from;  // of this lane, in row tile 0
  u64 pitch;       // bytes from one row tile to the next
  int pieces, tiles;  // tiles: from this block's first on
  uint4 held[DEPTH][ROW_TILES];

  __device__ __forceinline__ void load(int first) {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      const int at = first + i * WARPS;
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        held[i][r] = make_uint4(0, 0, 0, 0);
        if (at < pieces && (ROW_TILES == 1 || r < tiles)) held[i][r] = __ldcs((const uint4*)(from + r * pitch + (u64)at * PIECE_BYTES));
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    int_decode(const u8* weight, const signed char* x, const float* scale, const float* weight_scale, const u16* bias,
               const int* zero, const int* row_sum, const u16* residual, u16* y, u64 m, u64 n, u64 k, u64 pieces) {
  extern __shared__ __align__(16) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int tile = blockIdx.x * ROW_TILES, token = blockIdx.y * 8 * TOKEN_TILES;
  let_next_begin();
  Pieces codes{weight + (u64)tile * pieces * PIECE_BYTES + lane * 16, pieces * PIECE_BYTES, (int)pieces,
               ((int)n + 15) / 16 - tile};
  codes.load(warp);
  const Output output{y, scale, weight_scale, bias, zero, row_sum, residual, (int)m, (int)n};
  float2 row_scales[ROW_TILES];
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) row_scales[r] = output.scales_of((tile + r) * 16 + 2 * g);
  wait_for_last();

  int acc[ROW_TILES][TOKEN_TILES][4] = {};
  for (int first = warp; first < (int)pieces; first += DEPTH * WARPS) {
    Pieces now = codes;
    if (first + DEPTH * WARPS < (int)pieces) codes.load(first + DEPTH * WARPS);
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      const int begin = (first + i * WARPS) * PIECE_K + 4 * t;
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j) {
        const signed char* row = x + (u64)(token + 8 * j + g) * k;
        u32 b[2 * PIECE_STEPS];
#pragma unroll
        for (int part = 0; part < 2 * PIECE_STEPS; ++part) {
          const int at = begin + 16 * part;
          b[part] = token + 8 * j + g < (int)m && at < (int)k ? *(const u32*)(row + at) : 0;
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
          for (int step = 0; step < PIECE_STEPS; ++step) {
            u32 a[4];
            fragment(a, now.held[i][r], step);
            integer_step(acc[r][j], a, b[2 * step], b[2 * step + 1]);
          }
        }
      }
    }
  }

  constexpr int ROUNDS = (SUMS / 2 + WARPS - 1) / WARPS;  // sums e and e + 2 of four are two rows of one token
  const auto token_of = [&](int i) { return token + 8 * (i / 2 % TOKEN_TILES) + 2 * t + i % 2; };
  const auto row_of = [&](int i) { return (tile + i / (2 * TOKEN_TILES)) * 16 + 2 * g; };
  float token_scales[ROUNDS];
  u32 more[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {  // asked for while sums meet
    const int i = warp + round * WARPS;
    token_scales[round] = i < SUMS / 2 && token_of(i) < (int)m ? scale[token_of(i)] : 0.0f;
    more[round] = i < SUMS / 2 ? output.residual_of(token_of(i), row_of(i)) : 0;
  }
  int* sums = (int*)memory;  // [warp][sum][lane]
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[(warp * SUMS + i) * 32 + lane] = acc[i / (4 * TOKEN_TILES)][i / 4 % TOKEN_TILES][i % 4];
  __syncthreads();
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int i = warp + round * WARPS, first = i / 2 * 4 + i % 2;
    if (i >= SUMS / 2) break;
    int low = 0, high = 0;
#pragma unroll
    for (int from = 0; from < WARPS; ++from) {
      low += sums[(from * SUMS + first) * 32 + lane];
      high += sums[(from * SUMS + first + 2) * 32 + lane];
    }
    const float2 scales = i < 2 * TOKEN_TILES ? row_scales[0] : row_scales[ROW_TILES - 1];
    output.store(token_of(i), row_of(i), low, high, token_scales[round], scales, more[round]);
  }
}
