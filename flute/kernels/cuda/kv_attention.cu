// Attention of few queries over an int4 cache (flute/kernels/attention.py), split along the cache.
//
// A block takes one key head of one sequence, 16 rows of queries (query heads of the group times tokens), and one of
// `splits` parts of the cache; its warps take blocks of 16 positions in turn. Codes go from memory to registers and become
// 16-bit integers there, exactly. No column of K or V is moved: a product may take its k in any order that both operands
// share, and a lane's word of eight codes gives four pairs (0 4) (1 5) (2 6) (3 7), so queries are read in that order. For
// values, words of two neighbouring positions are interleaved to pairs of positions.
//
//     s = scale_k (q . code - zero_k sum(q))    p = 2^(s - m)    o = sum p scale_v code - sum p scale_v zero_v
//
// m is the running maximum of s + log2(scale_v): what becomes a 16-bit operand, p scale_v, is then at most 1. Warps, and
// then the parts of the cache (kv_merge), are added in order: the same bits on every run.
//
// Host macros: BF16, RANGES, KEY_DIM, VALUE_DIM (multiples of 8), KEY_SYMMETRIC, VALUE_SYMMETRIC.

constexpr int WARPS = 4, BLOCK = 16;
constexpr int WORDS = KEY_DIM / 8, OWN = (WORDS + 3) / 4;               // of a key; a lane's
constexpr int VALUE_WORDS = VALUE_DIM / 8, TURNS = (VALUE_WORDS + 7) / 8;  // of a value; words a lane has of each
constexpr int PARTIAL = VALUE_DIM + 2;                                  // sums, maximum, denominator
constexpr int AHEAD = KEY_DIM + VALUE_DIM <= 256;  // whether registers are left for the next block of positions
constexpr float NOTHING = -1e30f;  // a maximum over no position; finite, so that differences stay numbers

// Pair number i (0 to 3) of a word of codes: (i, i + 4) as 16-bit floats.
__device__ __forceinline__ u32 pair_of(u32 word, int i) {
  u32 biased, result;
#if BF16
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43084308, 0x6a;" : "=r"(biased) : "r"(word >> 4 * i));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(biased), "r"(0x3f803f80u), "r"(0xc308c308u));
#else
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64086408, 0x6a;" : "=r"(biased) : "r"(word >> 4 * i));
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(biased), "r"(0x64086408u));
#endif
  return result;
}

__device__ __forceinline__ float half_to_float(u16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
}

__device__ __forceinline__ float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

struct Store {
  const u8* codes;
  const u16* scale;
  const short* zero;
};

// A lane's share of 16 positions: K words of positions g and g + 8; V words of 2 t, 2 t + 1, 2 t + 8, 2 t + 9, and scales
// and zeros of these.
struct Loaded {
  u32 key[2][OWN], value[4][TURNS];
  u16 key_scale[4], value_scale[4];
  short key_zero[4], value_zero[4];

  __device__ __forceinline__ void load(const Store& keys, const Store& values, u64 slot, int left, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32* from = (const u32*)(keys.codes + (slot + g + 8 * half) * (KEY_DIM / 2)) + t * OWN;
      const bool there = g + 8 * half < left;
      if (OWN % 4 == 0 && WORDS % 4 == 0) {
#pragma unroll
        for (int j = 0; j < OWN; j += 4) {
          const uint4 four = there ? *(const uint4*)(from + j) : make_uint4(0, 0, 0, 0);
          key[half][j] = four.x, key[half][j + 1] = four.y, key[half][j + 2] = four.z, key[half][j + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int j = 0; j < OWN; ++j) key[half][j] = there && t * OWN + j < WORDS ? from[j] : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = 2 * t + i % 2 + i / 2 * 8;
      const bool there = position < left;
      const u32* from = (const u32*)(values.codes + (slot + position) * (VALUE_DIM / 2));
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) value[i][turn] = there && g + 8 * turn < VALUE_WORDS ? from[g + 8 * turn] : 0;
      key_scale[i] = there ? keys.scale[slot + position] : (u16)0, value_scale[i] = there ? values.scale[slot + position] : (u16)0;
      if (!KEY_SYMMETRIC) key_zero[i] = there ? keys.zero[slot + position] : (short)0;
      if (!VALUE_SYMMETRIC) value_zero[i] = there ? values.zero[slot + position] : (short)0;
    }
  }
};

// Queries as A fragments, in the order of pair_of(); rows beyond the last are zeros.
struct Queries {
  u32 a[OWN][2][4];
  float sum[2];

  __device__ __forceinline__ void load(const u16* query, int rows, int lane) {
    const int g = lane >> 2, t = lane & 3;
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half, word = t * OWN + j;
        const bool there = row < rows && word < WORDS;
        const uint4 eight = there ? *(const uint4*)(query + (u64)row * KEY_DIM + 8 * word) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const u32 low = pair < 2 ? eight.x : eight.y, high = pair < 2 ? eight.z : eight.w;
          const u32 both = __byte_perm(low, high, pair % 2 ? 0x7632 : 0x5410);
          a[j][pair / 2][pair % 2 * 2 + half] = both;
          if (!KEY_SYMMETRIC) sum[half] += wide((u16)both) + wide((u16)(both >> 16));
        }
      }
    }
    if (!KEY_SYMMETRIC) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        sum[row] += __shfl_xor_sync(~0u, sum[row], 1);
        sum[row] += __shfl_xor_sync(~0u, sum[row], 2);
      }
    }
  }
};

// What a warp has summed of its 16 rows; a lane has rows g and g + 8.
struct Running {
  float most[2], total[2], zeros[2], sums[8 * TURNS][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int row = 0; row < 2; ++row) most[row] = NOTHING, total[row] = 0.0f, zeros[row] = 0.0f;
#pragma unroll
    for (int i = 0; i < 8 * TURNS; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
  }

  // `first`, `last`: positions that row g (and g + 8) may see, counted from this block's first.
  __device__ __forceinline__ void add(const Queries& queries, const Loaded& now, float scaling, int first,
                                      const int (&last)[2], int lane) {
    const int t = lane & 3;
    float s[2][4] = {};
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          tensor_step(s[half], queries.a[j][step], pair_of(now.key[half][j], 2 * step), pair_of(now.key[half][j], 2 * step + 1));
        }
      }
    }
    float value_scale[4], next[2] = {most[0], most[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // position 2 t + i % 2 + 8 (i / 2)
      const int position = 2 * t + i % 2 + i / 2 * 8;
      const float key_scale = half_to_float(now.key_scale[i]) * scaling;
      value_scale[i] = half_to_float(now.value_scale[i]);
      const float weight = __log2f(value_scale[i]);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& score = s[i / 2][2 * row + i % 2];
        if (!KEY_SYMMETRIC) score -= (float)now.key_zero[i] * queries.sum[row];
        score *= key_scale;
        if (position < first || position > last[row]) score = NOTHING;
        else next[row] = fmaxf(next[row], score + weight);
      }
    }
    u32 p[4];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      next[row] = fmaxf(next[row], __shfl_xor_sync(~0u, next[row], 1));
      next[row] = fmaxf(next[row], __shfl_xor_sync(~0u, next[row], 2));
      const float shrink = exp2(most[row] - next[row]);
      most[row] = next[row], total[row] *= shrink, zeros[row] *= shrink;
#pragma unroll
      for (int i = 0; i < 8 * TURNS; ++i) sums[i][2 * row] *= shrink, sums[i][2 * row + 1] *= shrink;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float weighted[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float score = s[half][2 * row + e], likely = score == NOTHING ? 0.0f : exp2(score - next[row]);
          total[row] += likely;
          weighted[e] = likely * value_scale[2 * half + e];
        }
        const u32 pair = narrow_pair(weighted[0], weighted[1]);
        p[2 * half + row] = pair;
        if (!VALUE_SYMMETRIC) {
          zeros[row] += wide((u16)pair) * (float)now.value_zero[2 * half];
          zeros[row] += wide((u16)(pair >> 16)) * (float)now.value_zero[2 * half + 1];
        }
      }
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const u32 near = __byte_perm(now.value[0][turn], now.value[1][turn], high ? 0x7632 : 0x5410);
        const u32 far = __byte_perm(now.value[2][turn], now.value[3][turn], high ? 0x7632 : 0x5410);
#pragma unroll
        for (int i = 0; i < 4; ++i) tensor_step(sums[8 * turn + 4 * high + i], p, pair_of(near, i), pair_of(far, i));
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    kv_attention(const u16* query, const u8* key_codes, const u16* key_scale, const short* key_zero, const u8* value_codes,
                 const u16* value_scale, const short* value_zero, const int* lengths, const int* starts, const int* table,
                 u16* out, float* partial, u64 heads, u64 group, u64 tokens, u64 slots, u64 pages, float scaling) {
  extern __shared__ __align__(16) u8 memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int split = blockIdx.x, splits = gridDim.x, sequence = blockIdx.y / (int)heads, head = blockIdx.y % (int)heads;
  const int all_rows = (int)(group * tokens), row0 = blockIdx.z * 16, rows = min(16, all_rows - row0);
  let_next_begin();
  wait_for_last();
  const Store keys{key_codes, key_scale, key_zero}, values{value_codes, value_scale, value_zero};
  const int length = min(lengths[sequence], (int)(slots * pages)), start = starts ? max(starts[sequence], 0) : 0;
  const u64 first_row = (u64)blockIdx.y * all_rows + row0;
  Queries queries;
  queries.load(query + first_row * KEY_DIM, rows, lane);
  int last[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) last[row] = length - (int)tokens + (row0 + g + 8 * row) % (int)tokens;

  const int lowest = start / BLOCK, blocks = max((length + BLOCK - 1) / BLOCK - lowest, 0);
  const int begin = lowest + blocks * split / splits, end = lowest + blocks * (split + 1) / splits;
  const auto slot_of = [&](int block) {
    const int position = block * BLOCK;
    const u64 page = table ? table[(u64)sequence * pages + position / (int)slots] : sequence;
    return (page * heads + head) * slots + position % (int)slots;
  };
  Running running;
  running.clear();
  Loaded next;
  if (AHEAD && begin + warp < end) next.load(keys, values, slot_of(begin + warp), length - (begin + warp) * BLOCK, lane);
  for (int block = begin + warp; block < end; block += WARPS) {
    const Loaded now = next;
    const int after = block + AHEAD * WARPS;
    if (after < end) next.load(keys, values, slot_of(after), length - after * BLOCK, lane);
    const int seen[2] = {last[0] - block * BLOCK, last[1] - block * BLOCK};
    running.add(queries, AHEAD ? now : next, scaling, start - block * BLOCK, seen, lane);
  }

  // [warp][row][PARTIAL]; a lane's columns are those of its words
  float* sums = (float*)memory;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float total = running.total[row], zeros = running.zeros[row];
    total += __shfl_xor_sync(~0u, total, 1), zeros += __shfl_xor_sync(~0u, zeros, 1);
    total += __shfl_xor_sync(~0u, total, 2), zeros += __shfl_xor_sync(~0u, zeros, 2);
    float* mine = sums + (warp * 16 + g + 8 * row) * PARTIAL;
    if (t == 0) mine[VALUE_DIM] = running.most[row], mine[VALUE_DIM + 1] = total;
#pragma unroll
    for (int i = 0; i < 8 * TURNS; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * (2 * t + e + i / 8 * 8) + i % 8;
        if (column < VALUE_DIM) mine[column] = running.sums[i][2 * row + e] - zeros;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * VALUE_DIM; i += 32 * WARPS) {
    const int row = i / VALUE_DIM, column = i % VALUE_DIM;
    float most = NOTHING, total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int from = 0; from < WARPS; ++from) most = fmaxf(most, sums[(from * 16 + row) * PARTIAL + VALUE_DIM]);
#pragma unroll
    for (int from = 0; from < WARPS; ++from) {
      const float* theirs = sums + (from * 16 + row) * PARTIAL;
      const float share = exp2(theirs[VALUE_DIM] - most);
      sum += share * theirs[column], total += share * theirs[VALUE_DIM + 1];
    }
    if (splits == 1) {
      out[(first_row + row) * VALUE_DIM + column] = narrow(total > 0.0f ? sum / total : 0.0f);
    } else {
      float* to = partial + ((first_row + row) * splits + split) * PARTIAL;
      to[column] = sum;
      if (column == 0) to[VALUE_DIM] = most, to[VALUE_DIM + 1] = total;
    }
  }
}

// The parts of one row of queries, in order; shares: a float a part in shared memory.
extern "C" __global__ void __launch_bounds__(128) kv_merge(const float* partial, u16* out, u64 splits) {
  extern __shared__ __align__(16) float shares[];
  __shared__ float scratch[8];
  let_next_begin();
  wait_for_last();
  const float* from = partial + (u64)blockIdx.x * splits * PARTIAL;
  float most = NOTHING, total = 0.0f;
  for (int i = threadIdx.x; i < (int)splits; i += 128) most = fmaxf(most, from[i * PARTIAL + VALUE_DIM]);
  most = reduce_block<4, true>(most, scratch);
  for (int i = threadIdx.x; i < (int)splits; i += 128) {
    shares[i] = exp2(from[i * PARTIAL + VALUE_DIM] - most);
    total += shares[i] * from[i * PARTIAL + VALUE_DIM + 1];
  }
  total = reduce_block<4, false>(total, scratch + 4);
  for (int column = threadIdx.x; column < VALUE_DIM; column += 128) {
    float sum = 0.0f;
#pragma unroll 16
    for (int i = 0; i < (int)splits; ++i) sum += shares[i] * from[i * PARTIAL + column];
    out[(u64)blockIdx.x * VALUE_DIM + column] = narrow(total > 0.0f ? sum / total : 0.0f);
  }
}
