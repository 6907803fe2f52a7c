// What the kernels that decode weights share: asynchronous copies, tensor-core step, and the pair table in shared memory.
// The host defines BITS and puts types.cuh, the layout's constants and left_over_words() (flute/kernels/layout.py) in front
// of this text.

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

__device__ __forceinline__ void tensor_step(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// B fragments: four 8 x 8 matrices of x, eight tokens times 8 k each. Lane l names the 16 bytes of token l % 8 of matrix
// l / 8; four along K are two steps of eight tokens, two along K and two along tokens one step of sixteen.
__device__ __forceinline__ void load_tokens(uint4& b, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w)
               : "r"(address));
}

// Group that a block of 32 k belongs to: block / (group size / 32) by multiplication, magic = ceil(2^31 / divisor).
__device__ __forceinline__ int group_of(int block, u32 magic, int groups) {
  return min((int)__umulhi(2 * block, magic), groups - 1);  // there may be blocks of padding beyond K
}

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  if (BYTES == 16) asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

template <int BYTES = 16>
__device__ __forceinline__ void copy_async_or_zero(u32 to, const void* from, bool inside) {
  const int size = inside ? BYTES : 0;
  if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(size) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Barriers in shared memory, for the slots of rings.
#if __CUDA_ARCH__ >= 900
#define WAIT "try_wait"  // sleeps a while
#else
#define WAIT "test_wait"
#endif

__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void wait_phase(u32 barrier, u32 phase) {
  u32 done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier." WAIT ".parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(phase)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and `bytes` of copies must have come as well until the barrier's phase is over.
__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// By the copy engine (sm_90 and up): 16-byte aligned, counted by the barrier.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Arrives for this thread once all its copies so far are there.
__device__ __forceinline__ void arrive_with_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// A slot of a ring and the parity of its current use; both sides of a ring walk it alike.
template <int SLOTS>
struct Cursor {
  int slot;
  u32 phase = 0;
  __device__ __forceinline__ void advance(int by) {
    slot += by;
    if (slot >= SLOTS) slot -= SLOTS, phase ^= 1;
  }
  __device__ __forceinline__ void rewind(int by) {
    slot -= by;
    if (slot < 0) slot += SLOTS, phase ^= 1;
    else if (slot >= SLOTS) slot -= SLOTS, phase ^= 1;
  }
};

constexpr int TOKEN_BAND = 16;  // token tiles that are walked together, so that x and W both stay in the L2 cache

// Unit (rows) and token tile of tile number `at`: bands of tokens, and within a band the tokens fastest.
__device__ __forceinline__ void locate_tile(int at, int units, int token_tiles, int& unit, int& token_tile) {
  unit = at, token_tile = 0;
  if (token_tiles == 1) return;
  const u32 area = TOKEN_BAND * units, band = at / area, rest = at - band * area;
  const u32 width = min(TOKEN_BAND, token_tiles - (int)band * TOKEN_BAND);
  unit = rest / width, token_tile = band * TOKEN_BAND + rest % width;
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

__device__ __forceinline__ u32 narrow_pair(float low, float high) {
  u32 result;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
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
