// x on its way into the decode kernel's shared memory: as it is, or through an RMSNorm. The host defines NORM.

// x slice (m, width) -> shared memory, rows `pitch` bytes apart, zeros beyond k.
__device__ __forceinline__ void stage_x(u8* shared_x, const u16* x, int m, int k, int first_k, int width, int pitch) {
  for (int token = 0; token < m; ++token, x += k, shared_x += pitch) {
    if (k % 8 == 0) {
      for (int at = threadIdx.x * 8; at < width; at += blockDim.x * 8) {
        const bool inside = first_k + at < k;
        copy_async_or_zero(shared_address(shared_x + at * 2), x + (inside ? first_k + at : 0), inside);
      }
    } else {
      for (int at = threadIdx.x; at < width; at += blockDim.x) {
        *(u16*)(shared_x + at * 2) = first_k + at < k ? x[first_k + at] : 0;
      }
    }
  }
}

#if NORM

// x / sqrt(mean(x^2) + eps), rounded, times gain, rounded: every block of a cluster reads all of a token, for its sum of
// squares, and keeps its slice. PARTS warps share a token; they leave their sums behind its row, in the 16 bytes by which
// rows are apart. Rows are whole vectors of 8.
struct NormedStage {
  static constexpr int PARTS = 4, HELD = 4;
  u8* shared_x;
  const u16 *x, *gain;
  float eps;
  int m, k, first_k, width, pitch, warp, warps, lane;
  uint4 held[HELD], gains;

  __device__ __forceinline__ uint4 gain_of(int at) const {
    return at < width && first_k + at < k ? *(const uint4*)(gain + first_k + at) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ int vector(int item, int j) const { return (j * PARTS + item % PARTS) * 32 + lane; }
  __device__ __forceinline__ uint4 load(int item, int j) const {
    const int v = vector(item, j);
    return item < m * PARTS && v < k / 8 ? __ldcg((const uint4*)(x + (u64)(item / PARTS) * k) + v) : make_uint4(0, 0, 0, 0);
  }

  // Does not depend on the kernel before this one.
  __device__ __forceinline__ void begin() { gains = gain_of(threadIdx.x * 8); }

  // Asks for x.
  __device__ __forceinline__ void ask(int item) {
#pragma unroll
    for (int j = 0; j < HELD; ++j) held[j] = load(item, j);
  }

  // Keeps one vector as it is, and gives the sum of its squares.
  __device__ __forceinline__ float keep(int item, int j, uint4 values) const {
    const int at = vector(item, j) * 8 - first_k;
    if (at >= 0 && at < width && at + first_k < k) *(uint4*)(shared_x + item / PARTS * pitch + at * 2) = values;
    const u32 words[4] = {values.x, values.y, values.z, values.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = wide((u16)(words[i / 2] >> i % 2 * 16));
      sum += value * value;
    }
    return sum;
  }

  // What was asked for, and all the rest, into shared memory; ends with a barrier.
  __device__ __forceinline__ void take() {
    for (int item = warp; item < m * PARTS; item += warps) {
      if (item != warp) ask(item);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < HELD; ++j) sum += keep(item, j, held[j]);
      for (int j = HELD; vector(item, j) - lane < k / 8; ++j) sum += keep(item, j, load(item, j));
#pragma unroll
      for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
      if (lane == 0) *(float*)(shared_x + item / PARTS * pitch + pitch - 16 + item % PARTS * 4) = sum;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void norm() const {
    u8* row = shared_x;
    for (int token = 0; token < m; ++token, row += pitch) {
      const float4 parts = *(const float4*)(row + pitch - 16);
      const float mean = __fdiv_rn(parts.x + parts.y + (parts.z + parts.w), (float)k);
      float factor;
      asm("rsqrt.approx.f32 %0, %1;" : "=f"(factor) : "f"(mean + eps));
#pragma unroll 1
      for (int at = threadIdx.x * 8; at < width; at += blockDim.x * 8) {
        const uint4 weights = at == threadIdx.x * 8 ? gains : gain_of(at);
        uint4 values = first_k + at < k ? *(const uint4*)(row + at * 2) : make_uint4(0, 0, 0, 0);
        u32* words = (u32*)&values;
        const u32 by[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const u16 low = narrow(wide((u16)by[e]) * wide(narrow(wide((u16)words[e]) * factor)));
          const u16 high = narrow(wide((u16)(by[e] >> 16)) * wide(narrow(wide((u16)(words[e] >> 16)) * factor)));
          words[e] = (u32)low | (u32)high << 16;
        }
        *(uint4*)(row + at * 2) = values;
      }
    }
  }
};

#endif
