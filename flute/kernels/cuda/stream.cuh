// The decode kernel's stream of codes: how a lane fetches its part of row tiles, chunk by chunk, and what a warp does with a
// chunk. Host macros: see decode.cu.

#ifndef GATED
#define GATED 0
#endif

constexpr int SCALE_SETS = CHUNK_K / GROUP_BLOCK;  // groups a chunk may touch, 8 words of scales each
constexpr int PART_BYTES = CHUNK_BYTES + 128;
constexpr int SLOT_BYTES = ROW_TILES * PART_BYTES;

// What one lane fetches of every chunk: 16 bytes of codes, those that remain, and half a row of one group's scales,
// along one unit after the other.
struct Stream {
  const u8* weight;   // (tiles, chunks, CHUNK_BYTES)
  const u16* scales;  // (tiles, groups, TILE_ROWS)
  int tiles, chunks, groups, units, stride, first, count, lane;
  u32 magic;
  const u8* codes;  // this lane's next piece of the current unit
  const u16* rows;  // its half of the scales of group 0 of the unit
  u32 code_step, scale_step;  // from one row tile of the unit to the next
  int unit, left, block;

  __device__ __forceinline__ void enter() {
    left = 0;
    if (unit >= units) return;
    const int tile = GATED ? unit : unit * ROW_TILES;
    const bool whole = tile + ROW_TILES <= tiles;  // the last unit may be one tile short: it reads its last tile twice
    code_step = GATED ? tiles / 2 * chunks * CHUNK_BYTES : whole ? chunks * CHUNK_BYTES : 0;
    scale_step = GATED ? tiles / 2 * groups * TILE_ROWS : whole ? groups * TILE_ROWS : 0;
    codes = weight + ((u64)tile * chunks + first) * CHUNK_BYTES + lane * 16;
    rows = scales + (u64)tile * groups * TILE_ROWS + lane % 2 * 8;
    block = first * (CHUNK_K / BLOCK_K) + lane / 2 * (GROUP_BLOCK / BLOCK_K);
    left = count;
  }

  // slot: where in shared memory this lane's first piece of the chunk belongs.
  __device__ __forceinline__ void fetch(u32 slot) {
    constexpr int REST = 4 * LANE_WORDS - 16;
    if (left > 0) {
      const u16* from = rows + (u32)(group_of(block, magic, groups) * TILE_ROWS);
#pragma unroll
      for (int part = 0; part < ROW_TILES; ++part) {
        const u32 to = slot + part * PART_BYTES;
        copy_async<16>(to, codes + part * code_step);
        if (REST > 0) copy_async<REST == 0 ? 4 : REST>(to + 512 - lane * (16 - REST), codes + 512 - lane * (16 - REST) + part * code_step);
        if (lane < 2 * SCALE_SETS) copy_async<16>(to + CHUNK_BYTES, from + part * scale_step);
      }
      codes += CHUNK_BYTES, block += CHUNK_K / BLOCK_K;
      if (--left == 0) unit += stride, enter();
    }
    commit_copies();  // also when there is nothing left: waiting counts groups
  }
};

// One chunk of ROW_TILES tiles against all tokens; `slot` and `scales` are where this lane's lie.
__device__ __forceinline__ void multiply_chunk(float (&acc)[ROW_TILES][TOKEN_TILES][4], const u8* slot, const u8* scales,
                                               const u32 (&x_lane)[TOKEN_TILES], u32 x_offset, const u8* table,
                                               int lane) {
  u32 words[ROW_TILES][LOOKUP_WORDS];
  const u32 copy = lane_copy(lane);
#pragma unroll
  for (int part = 0; part < ROW_TILES; ++part) load_words(words[part], slot + part * PART_BYTES, lane);
#pragma unroll
  for (int set = 0; set < SCALE_SETS; ++set) {
    float sum[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll
    for (int block = 0; block < GROUP_BLOCK / BLOCK_K; ++block) {
      int at = set * (GROUP_BLOCK / BLOCK_K) + block;
      uint4 b[TOKEN_TILES];
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n) load_tokens(b[n], x_lane[n] + x_offset + at * BLOCK_K * 2);
#pragma unroll
      for (int part = 0; part < ROW_TILES; ++part) {
        u32 a[2][4];
        load_weights(a[0], words[part], 2 * at, table, copy);
        load_weights(a[1], words[part], 2 * at + 1, table, copy);
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) tensor_step(sum[part][n], a[0], b[n].x, b[n].y);
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) tensor_step(sum[part][n], a[1], b[n].z, b[n].w);
      }
    }
#pragma unroll
    for (int part = 0; part < ROW_TILES; ++part) {
      u32 pair = *(const u32*)(scales + part * PART_BYTES + set * 32);
      float low = wide((u16)pair), high = wide((u16)(pair >> 16));  // rows 2 g and 2 g + 1
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n) {
        acc[part][n][0] += low * sum[part][n][0];
        acc[part][n][1] += low * sum[part][n][1];
        acc[part][n][2] += high * sum[part][n][2];
        acc[part][n][3] += high * sum[part][n][3];
      }
    }
  }
}
