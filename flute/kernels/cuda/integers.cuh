// What the two integer products share: codes of W as operands of the tensor core, and sums to y. The host defines CODE_BITS
// (4 or 8), BF16; types.cuh and pipeline.cuh come first.
//
// A tile is 16 rows of W (row 2 g at the fragment's row g, row 2 g + 1 at g + 8), a piece of it 512 bytes, 16 a lane: the
// four registers of one fragment of 32 k, and at 4 bits in the high nibbles those of the next. A nibble becomes the int8
// 16 q, by a shift or a mask; sums are then 16 times as large, and are shifted back exactly.

constexpr int PIECE_STEPS = CODE_BITS == 4 ? 2 : 1, PIECE_K = 32 * PIECE_STEPS, PIECE_BYTES = 512;
constexpr int SHIFT = CODE_BITS == 4 ? 4 : 0;

// The fragment of step `step` of a piece. volatile: moved behind wgmma's fence, it would make one step wait for the other.
__device__ __forceinline__ void fragment(u32 (&a)[4], const uint4& piece, int step) {
  const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const u32 word = CODE_BITS == 4 && step == 0 ? words[r] << 4 : words[r];
    asm volatile("and.b32 %0, %1, %2;" : "=r"(a[r]) : "r"(word), "r"(CODE_BITS == 4 ? 0xf0f0f0f0u : ~0u));
  }
}

// How sums become y: see flute/kernels/integer.py. No step may be fused with another, for the same bits everywhere.
struct Output {
  u16* y;
  const float *scale, *weight_scale;
  const u16* bias;
  const int *zero, *row_sum;
  const u16* residual;
  int m, n;

  // Scales of rows (row, row + 1); no launch writes them, so they may be asked for before the one ahead is over.
  __device__ __forceinline__ float2 scales_of(int row) const {
    return make_float2(row < n ? weight_scale[row] : 0.0f, row + 1 < n ? weight_scale[row + 1] : 0.0f);
  }

  // What rows (row, row + 1) of one token are added to.
  __device__ __forceinline__ u32 residual_of(int token, int row) const {
    if (!residual || token >= m || row >= n) return 0;
    const u16* from = residual + (u64)token * n + row;
    return n % 2 == 0 ? *(const u32*)from : (u32)from[0] | (row + 1 < n ? (u32)from[1] << 16 : 0);
  }

  __device__ __forceinline__ float value(int sum, int token, int row, float token_scale, float row_scale) const {
    float wide_sum = (float)(sum >> SHIFT);
    if (zero) wide_sum = __ll2float_rn((long long)(sum >> SHIFT) - (long long)zero[token] * row_sum[row]);
    const float scaled = __fmul_rn(wide_sum, __fmul_rn(token_scale, row_scale));
    return bias ? __fadd_rn(scaled, wide(bias[row])) : scaled;
  }

  // Rows (row, row + 1) of one token.
  __device__ __forceinline__ void store(int token, int row, int low, int high, float token_scale, float2 row_scales,
                                        u32 more) const {
    if (token >= m || row >= n) return;
    u16* to = y + (u64)token * n + row;
    const float first = value(low, token, row, token_scale, row_scales.x);
    const float second = row + 1 < n ? value(high, token, row + 1, token_scale, row_scales.y) : 0.0f;
    u32 pair = narrow_pair(first, second);
    if (residual) pair = narrow_pair(wide((u16)pair) + wide((u16)more), wide((u16)(pair >> 16)) + wide((u16)(more >> 16)));
    if (n % 2 == 0) {
      *(u32*)to = pair;
    } else {
      to[0] = (u16)pair;
      if (row + 1 < n) to[1] = (u16)(pair >> 16);
    }
  }

  __device__ __forceinline__ void store(int token, int row, int low, int high, float2 row_scales) const {
    store(token, row, low, high, token < m ? scale[token] : 0.0f, row_scales, residual_of(token, row));
  }
};
