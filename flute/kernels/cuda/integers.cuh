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
  int m, n;

  __device__ __forceinline__ float value(int sum, int token, int row, float token_scale) const {
    float wide_sum = (float)(sum >> SHIFT);
    if (zero) wide_sum = __ll2float_rn((long long)(sum >> SHIFT) - (long long)zero[token] * row_sum[row]);
    const float scaled = __fmul_rn(wide_sum, __fmul_rn(token_scale, weight_scale[row]));
    return bias ? __fadd_rn(scaled, wide(bias[row])) : scaled;
  }

  // Rows (row, row + 1) of one token.
  __device__ __forceinline__ void store(int token, int row, int low, int high) const {
    if (token >= m || row >= n) return;
    u16* to = y + (u64)token * n + row;
    const float token_scale = scale[token], first = value(low, token, row, token_scale);
    const float second = row + 1 < n ? value(high, token, row + 1, token_scale) : 0.0f;
    if (n % 2 == 0) {
      *(u32*)to = narrow_pair(first, second);
    } else {
      to[0] = narrow(first);
      if (row + 1 < n) to[1] = narrow(second);
    }
  }
};
