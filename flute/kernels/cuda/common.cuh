// What the kernels that decode weights share: the pair table in shared memory. The host defines BITS and puts types.cuh,
// pipeline.cuh, the layout's constants and left_over_words() (flute/kernels/layout.py) in front of this text.

// The pair table in shared memory: 128 bytes an entry, a copy for every bank. An entry is found by one byte of codes.
// Entries are 256 bytes apart where that fits: then one instruction makes an address of a byte, else it takes two.
constexpr int TABLE_PITCH = WIDE_TABLE ? 256 : 128, PAIR_MASK = BITS == 3 ? 63 : 255;
constexpr int TABLE_ENTRIES = WIDE_TABLE ? 256 : PAIR_MASK + 1;
[[maybe_unused]] constexpr int TABLE_BYTES = TABLE_ENTRIES * TABLE_PITCH;

// The 32-bit pair for pair index i: two scalars side by side, or one entry of a codebook of pairs.
__device__ __forceinline__ u32 pair_value(const u16* table, bool vectors, u32 index) {
  if (vectors) return ((const u32*)table)[index];
  return (u32)table[index & ((1 << BITS) - 1)] | (u32)table[index >> BITS] << 16;
}

constexpr int SCALARS = 1 << BITS;

// A lane's scalar of the table, to be asked for long before fill_table() needs it.
__device__ __forceinline__ u32 table_value(const u16* table, bool vectors, int thread) {
  return vectors ? 0 : table[thread & (SCALARS - 1)];
}

// Fill 128 bytes per entry: lane l later reads only from its own bank (32 copies of 4 bytes, or 16 copies of 8 at 2
// bits), so no two lanes ever collide whatever the codes are. An entry is one pair, or at 2 bits the two pairs that
// share a byte. A scalar table is read from global memory once, by one load a lane, and passed between lanes.
__device__ __forceinline__ void fill_table(u8* shared_table, const u16* table, bool vectors, u32 mine, int thread,
                                           int threads) {
#pragma unroll 4
  for (int i = thread; i < TABLE_ENTRIES * 8; i += threads) {  // whole warps: the trip count is the same for all lanes
    const u32 e = i >> 3 & PAIR_MASK;
    u32 low, high;
    if (vectors) {
#if BITS == 2
      low = ((const u32*)table)[e & 15], high = ((const u32*)table)[e >> 4];
#else
      low = high = ((const u32*)table)[e];
#endif
    } else {
      low = __shfl_sync(~0u, mine, e & (SCALARS - 1)) | __shfl_sync(~0u, mine, e >> BITS & (SCALARS - 1)) << 16;
#if BITS == 2
      high = __shfl_sync(~0u, mine, e >> 4 & 3) | __shfl_sync(~0u, mine, e >> 6) << 16;
#else
      high = low;
#endif
    }
    *(uint4*)(shared_table + (i >> 3) * TABLE_PITCH + i % 8 * 16) = make_uint4(low, high, low, high);
  }
}

// One chunk of packed codes of a lane: 16 bytes, and the rest behind all lanes' first 16.
__device__ __forceinline__ void load_words(u32 (&words)[LOOKUP_WORDS], const u8* chunk, int lane) {
  uint4 head = *(const uint4*)(chunk + lane * 16);
  words[0] = head.x, words[1] = head.y, words[2] = head.z, words[3] = head.w;
#if BITS == 4
  uint4 tail = *(const uint4*)(chunk + 512 + lane * 16);
  words[4] = tail.x, words[5] = tail.y, words[6] = tail.z, words[7] = tail.w;
#elif BITS == 3
  uint2 tail = *(const uint2*)(chunk + 512 + lane * 8);
  words[4] = tail.x, words[5] = tail.y;
  left_over_words(words);
#endif
}

// Where a lane's copy of every entry begins.
__device__ __forceinline__ u32 lane_copy(int lane) { return BITS == 2 ? (lane & 15) * 8 : lane * 4; }

// Offset in the table of what lookup number `i` of a lane's chunk wants.
__device__ __forceinline__ u32 lookup_offset(const u32 (&words)[LOOKUP_WORDS], int i, u32 copy) {
  const u32 word = words[i / 4];
  const int byte = i % 4;
#if WIDE_TABLE
  return __byte_perm(word, copy, 0x5504 | byte << 4);
#else
  return (byte == 0 ? word << 7 : word >> 8 * byte - 7) & PAIR_MASK << 7 | copy;
#endif
}

// The A fragment of tensor-core step `step` of a lane's chunk: four pairs, by one (4, 3 bit) or half (2 bit) a lookup
// each.
__device__ __forceinline__ void load_weights(u32 (&a)[4], const u32 (&words)[LOOKUP_WORDS], int step,
                                             const u8* shared_table, u32 copy) {
#if BITS == 2
#pragma unroll
  for (int rh = 0; rh < 2; ++rh) {
    const uint2 both = *(const uint2*)(shared_table + lookup_offset(words, 2 * step + rh, copy));
    a[2 * rh] = both.x, a[2 * rh + 1] = both.y;
  }
#else
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = *(const u32*)(shared_table + lookup_offset(words, 4 * step + r, copy));
#endif
}

// Group that a block of 32 k belongs to: block / (group size / 32) by multiplication, magic = ceil(2^31 / divisor).
__device__ __forceinline__ int group_of(int block, u32 magic, int groups) {
  return min((int)__umulhi(2 * block, magic), groups - 1);  // there may be blocks of padding beyond K
}

// A pair of weights times a pair of scales, each rounded once.
__device__ __forceinline__ u32 scaled(u32 pair, u32 scale) {
  u32 result;
#if BF16  // sm_80 has no product of bf16 pairs; adding -0 changes no bit of it
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(scale), "r"(0x80008000u));
#else
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(scale));
#endif
  return result;
}

// y of rows (row, row + 1) and tokens (token, token + 1), as tensor cores leave them: {r t, r t+1, r+1 t, r+1 t+1}.
__device__ __forceinline__ void store(u16* y, const u16* bias, int m, int n, int row, int token, float4 v) {
  if (row >= n) return;
  const bool both = row + 1 < n;
  const float low = bias ? wide(bias[row]) : 0.0f, high = bias && both ? wide(bias[row + 1]) : 0.0f;
  const u32 pairs[2] = {narrow_pair(v.x + low, v.z + high), narrow_pair(v.y + low, v.w + high)};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (token + i >= m) break;
    u16* to = y + (u64)(token + i) * n + row;
    if (n % 2 == 0) {
      *(u32*)to = pairs[i];
    } else {
      to[0] = (u16)pairs[i];
      if (both) to[1] = (u16)(pairs[i] >> 16);
    }
  }
}
