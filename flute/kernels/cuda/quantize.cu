// Codes of tokens without a transform: a block finds the range of a row of n numbers, then reads it again from the cache.
//
// Host macros: BF16, RANGES, BITS_OUT, SYMMETRIC.

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    quantize(const u16* x, const float* clip, u8* codes, float* scale, int* zero, u64 n) {
  __shared__ float scratch[2 * WARPS];
  let_next_begin();
  const Ratios ratios(clip);
  wait_for_last();
  const u64 token = blockIdx.x;
  x += token * n, codes += token * n;
  float low = __uint_as_float(0x7f800000u), high = -low;
  for (int i = threadIdx.x; i < (int)n; i += 32 * WARPS) {
    const float value = wide(x[i]);
    low = fminf(low, value), high = fmaxf(high, value);
  }
  high = reduce_block<WARPS, true>(high, scratch);
  low = -reduce_block<WARPS, true>(-low, scratch + WARPS);
  const Range range = make_range<BITS_OUT, SYMMETRIC, false>(low, high, ratios);
  if (threadIdx.x == 0) {
    scale[token] = range.scale;
    if (!SYMMETRIC) zero[token] = (int)range.zero;
  }
  for (int i = threadIdx.x; i < (int)n; i += 32 * WARPS) {
    const float value[1] = {wide(x[i])};
    u8 code[1];
    make_codes<BITS_OUT>(code, value, range);
    codes[i] = code[0];
  }
}
