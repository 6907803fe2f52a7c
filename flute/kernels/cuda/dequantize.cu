// W (N, K) from kernel order, each value dtype(table * scale): the dense path of large M, and of gradients.
// One warp takes one chunk; a lane writes runs of eight neighbours along K, 16 bytes where K allows it.

extern "C" __global__ void __launch_bounds__(256)
    lut_dequantize(const u8* weight, const u16* scales, const u16* table, u64 vectors, u16* out, u64 n, u64 k,
                   u64 groups, u64 magic) {
  __shared__ __align__(16) u32 pairs[1 << 2 * BITS];
  for (int i = threadIdx.x; i < 1 << 2 * BITS; i += blockDim.x) pairs[i] = pair_value(table, vectors != 0, i);
  __syncthreads();
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int chunks = ((int)k + CHUNK_K - 1) / CHUNK_K, tiles = ((int)n + TILE_ROWS - 1) / TILE_ROWS;
  const u64 warp = ((u64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (warp >= (u64)tiles * chunks) return;
  const int tile = (int)(warp / chunks), chunk = (int)(warp % chunks);
  u32 words[LANE_WORDS];
  load_words(words, weight + warp * CHUNK_BYTES, lane);
#pragma unroll
  for (int block = 0; block < CHUNK_K / BLOCK_K; ++block) {
    const int at = chunk * CHUNK_K + block * BLOCK_K + t * 8;
    const int group = group_of(chunk * (CHUNK_K / BLOCK_K) + block, (u32)magic, (int)groups);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = tile * TILE_ROWS + g + 8 * h;
      const float scale = wide(scales[((u64)tile * groups + group) * TILE_ROWS + 2 * g + h]);
      u16 run[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // pair j: step j / 2, rh = j % 2
        const int step = 2 * block + j / 2;
#if BITS == 2
        u32 index = lookup_offset(words, 2 * step + h) >> 7 + 4 * (j % 2) & 15;
#else
        u32 index = lookup_offset(words, 4 * step + 2 * (j % 2) + h) >> 7;
#endif
        u32 pair = pairs[index];
        run[2 * j] = narrow(wide((u16)pair) * scale);
        run[2 * j + 1] = narrow(wide((u16)(pair >> 16)) * scale);
      }
      if (row >= (int)n || at >= (int)k) continue;
      u16* to = out + (u64)row * k + at;
      if (k % 8 == 0) {
        *(uint4*)to = make_uint4(run[0] | (u32)run[1] << 16, run[2] | (u32)run[3] << 16, run[4] | (u32)run[5] << 16,
                                 run[6] | (u32)run[7] << 16);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (at + j < (int)k) to[j] = run[j];
      }
    }
  }
}
