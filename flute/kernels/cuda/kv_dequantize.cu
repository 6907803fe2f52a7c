// Keys or values back from their codes (flute/kernels/store.py): scale (code - zero) in float32, rounded once. A thread
// makes eight neighbours.
//
// Host macros: BF16, SYMMETRIC.

extern "C" __global__ void __launch_bounds__(256)
    kv_dequantize(const u32* codes, const u16* scales, const short* zeros, uint4* out, u64 pieces, u32 pieces_a_row) {
  const u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
  if (i >= pieces) return;
  const u64 row = i / pieces_a_row;
  const u32 word = codes[i];
  const float zero = SYMMETRIC ? 0.0f : (float)zeros[row];
  const float scale = half_to_float(scales[row]);
  u32 made[4];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const float low = (float)((int)(word << 28 - 8 * pair) >> 28), high = (float)((int)(word << 24 - 8 * pair) >> 28);
    made[pair] = (u32)narrow((low - zero) * scale) | (u32)narrow((high - zero) * scale) << 16;
  }
  out[i] = make_uint4(made[0], made[1], made[2], made[3]);
}
