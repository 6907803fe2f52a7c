// W (N, K) from kernel order, each value dtype(table * scale): the dense path of what no other kernel takes, and of
// gradients. One warp takes one chunk: lanes decode their pairs into a tile of rows in shared memory, from which half a
// warp at a time writes 256 neighbouring bytes of one row.

constexpr int ROW_PITCH = CHUNK_K * 2 + 16;  // bytes; rows begin in other banks

extern "C" __global__ void __launch_bounds__(256)
    lut_dequantize(const u8* weight, const u16* scales, const u16* table, u64 vectors, u16* out, u64 n, u64 k,
                   u64 groups, u64 magic) {
  __shared__ __align__(16) u32 pairs[1 << 2 * BITS];
  __shared__ __align__(16) u8 rows[8][TILE_ROWS * ROW_PITCH];
  for (int i = threadIdx.x; i < 1 << 2 * BITS; i += blockDim.x) pairs[i] = pair_value(table, vectors != 0, i);
  __syncthreads();
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int chunks = ((int)k + CHUNK_K - 1) / CHUNK_K, tiles = ((int)n + TILE_ROWS - 1) / TILE_ROWS;
  const u64 warp = ((u64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (warp >= (u64)tiles * chunks) return;
  const int tile = (int)(warp / chunks), chunk = (int)(warp % chunks);
  u8* mine = rows[threadIdx.x >> 5];
  u32 words[LOOKUP_WORDS];
  load_words(words, weight + warp * CHUNK_BYTES, lane);
#pragma unroll
  for (int block = 0; block < CHUNK_K / BLOCK_K; ++block) {
    const int group = group_of(chunk * (CHUNK_K / BLOCK_K) + block, (u32)magic, (int)groups);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float scale = wide(scales[((u64)tile * groups + group) * TILE_ROWS + 2 * g + h]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int step = 2 * block + j / 2, rh = j % 2;
        const int q = 4 * step + 2 * rh + h;
#if BITS == 2
        const u32 index = words[q / 8] >> q % 8 * 4 & 15;
#else
        const u32 index = words[q / 4] >> q % 4 * 8 & PAIR_MASK;
#endif
        const u32 pair = pairs[index];
        *(u32*)(mine + (2 * g + h) * ROW_PITCH + (16 * step + 8 * rh + 2 * t) * 2) =
            narrow(wide((u16)pair) * scale) | (u32)narrow(wide((u16)(pair >> 16)) * scale) << 16;
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < TILE_ROWS / 2; ++i) {
    const int in_tile = 2 * i + (lane >> 4), row = tile * TILE_ROWS + in_tile;
    const int in_chunk = (lane & 15) * 8, at = chunk * CHUNK_K + in_chunk;
    if (row >= (int)n || at >= (int)k) continue;
    const uint4 run = *(const uint4*)(mine + in_tile * ROW_PITCH + in_chunk * 2);
    u16* to = out + (u64)row * k + at;
    if (k % 8 == 0) {
      *(uint4*)to = run;
    } else {
      const u32 part[4] = {run.x, run.y, run.z, run.w};
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (at + j < (int)k) to[j] = (u16)(part[j / 2] >> 16 * (j % 2));
    }
  }
}
