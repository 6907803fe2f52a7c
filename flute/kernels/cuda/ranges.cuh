// From the smallest and largest value of a row to its scale, zero and codes; what flute/kernels/tokens.py defines, division
// for division. types.cuh comes first.

struct Range {
  float scale, zero, inverse, doubt;  // doubt: how near to a half a product with the inverse may err, see make_codes
};

// What a row's largest and smallest number are multiplied with. No launch writes it: to be read before the one ahead is over.
struct Ratios {
  float of_high, of_low;
  __device__ __forceinline__ explicit Ratios(const float* clip) : of_high(clip ? clip[0] : 1.0f), of_low(clip ? clip[1] : 1.0f) {}
};

// HalfScale: the scale is rounded to float16 before it divides (the KV cache's).
template <int Bits, bool Symmetric, bool HalfScale>
__device__ __forceinline__ Range make_range(float low, float high, const Ratios& ratios) {
  constexpr int HALF = 1 << (Bits - 1);
  low = __fmul_rn(low, ratios.of_low), high = __fmul_rn(high, ratios.of_high);
  const float width = Symmetric ? fmaxf(fabsf(low), high) : __fsub_rn(high, low);
  float scale = __fdiv_rn(width, (float)(Symmetric ? HALF - 1 : 2 * HALF - 1));
  if (HalfScale) scale = half_to_float(float_to_half(scale));
  if (!(scale > 0.0f)) scale = 1.0f;
  const float zero = Symmetric ? 0.0f : rintf(__fdiv_rn(-low, scale)) - HALF;
  const bool usable = scale > 1e-30f;  // else its inverse may be none: divide always
  return {scale, zero, usable ? __fdiv_rn(1.0f, scale) : 0.0f, usable ? (fabsf(zero) + 4.0f * HALF) * 4.8e-7f : 1.0f};
}

// The codes that division gives. A quotient made with the inverse is at most 1.5 ulp off, which matters next to halves only;
// and one so large that it errs more than `doubt` is clamped either way. Rounding is an addition: 1.5 * 2^23.
template <int Bits, int Count>
__device__ __forceinline__ void make_codes(u8 (&codes)[Count], const float (&values)[Count], const Range& range) {
  constexpr int HALF = 1 << (Bits - 1);
  constexpr float ROUND = 12582912.0f, MOST = 1048576.0f;
  float nearest[Count];
  bool doubtful = false;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const float quotient = fminf(fmaxf(__fmul_rn(values[i], range.inverse), -MOST), MOST);
    nearest[i] = __fadd_rn(__fadd_rn(quotient, ROUND), -ROUND);
    doubtful |= !(fabsf(quotient - nearest[i]) < 0.5f - range.doubt);
  }
  if (doubtful) {  // seldom: one division in a loop, through which the values are turned
    float turned[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) turned[i] = values[i];
#pragma unroll 1
    for (int turn = 0; turn < Count; ++turn) {
      const float made = rintf(__fdiv_rn(turned[0], range.scale));
#pragma unroll
      for (int i = 1; i < Count; ++i) turned[i - 1] = turned[i], nearest[i - 1] = nearest[i];
      nearest[Count - 1] = made;
    }
  }
#pragma unroll
  for (int i = 0; i < Count; ++i) {  // the last bits of a code and 1.5 * 2^23 are the code
    codes[i] = (u8)__float_as_uint(fminf(fmaxf(nearest[i] + range.zero, (float)-HALF), (float)(HALF - 1)) + ROUND);
  }
}

template <bool Maximum>
__device__ __forceinline__ float reduce_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(~0u, value, step);
    value = Maximum ? fmaxf(value, other) : value + other;
  }
  return value;
}

// The largest, or smallest, of a warp's numbers, none of them NaN: as integers of the same order.
template <bool Maximum>
__device__ __forceinline__ float extreme_of_warp(float value) {
  const int bits = __float_as_int(value);
  int found = bits ^ (bits >> 31 & 0x7fffffff);
  found = Maximum ? __reduce_max_sync(~0u, found) : __reduce_min_sync(~0u, found);
  return __int_as_float(found ^ (found >> 31 & 0x7fffffff));
}

// The sum, or the maximum, of all threads of all Warps warps; scratch holds a float each.
template <int Warps, bool Maximum>
__device__ __forceinline__ float reduce_block(float value, float* scratch) {
  value = reduce_warp<Maximum>(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int i = 1; i < Warps; ++i) value = Maximum ? fmaxf(value, scratch[i]) : value + scratch[i];
  return value;
}
