// Attention of few queries over an int4 cache (flute/kernels/attention.py), split along the cache.
//
// A block takes one key head of one sequence, 8 rows of queries (query heads of the group times tokens), and one of
// `splits` parts of the cache; its warps take steps of positions in turn, and ask for the next ones as soon as registers
// are free. Codes are the operand with 16 rows of the tensor core, queries the one with 8, so scores are positions x
// queries and sums are columns of V x queries:
//
//     s = scale_k (q . u - zero_k sum(q))    p = 2^(s - m)    o = sum p scale_v u - sum p scale_v zero_v
//
// kv_rows.cuh says how codes become numbers u. Queries, in float16 whatever the model's dtype, are scaled by a power of
// two that leaves room for 1/16 of those that meet a high nibble; products may take their k in any order that both
// operands share, here that of the masks. m is the running maximum of s + log2(scale_v), so p scale_v, the other 16-bit
// operand, is at most 1. parts.cuh says how warps, and then parts of the cache, are added.
//
// Host macros: BF16, RANGES, WARPS, and those of kv_rows.cuh.

__device__ __forceinline__ u32 pack_halves(float low, float high) {
  u32 result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

__device__ __forceinline__ float log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ void half_step(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Queries as B fragments in the order of low_pair() and high_pair(), scaled; a lane has words of query g, and the sums of
// queries 2 t and 2 t + 1.
struct Queries {
  u32 low[OWN][2], high[OWN][2];
  float sum[2], inverse;  // of the power of two, and of 2^-24

  __device__ __forceinline__ void load(const u16* query, int rows, int lane) {
    const int g = lane >> 2, t = lane & 3;
    float values[OWN][8], most = 0.0f, all = 0.0f;
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      const bool there = g < rows && t * OWN + j < WORDS;
      const uint4 eight = there ? *(const uint4*)(query + g * KEY_DIM + 8 * (t * OWN + j)) : make_uint4(0, 0, 0, 0);
      const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        values[j][e] = wide((u16)(words[e / 2] >> 16 * (e % 2)));
        most = fmaxf(most, fabsf(values[j][e]));
      }
    }
    const int exponent = min(max((int)(__float_as_uint(reduce_warp<true>(most)) >> 23) - 127, -80), 117);
    const float factor = __uint_as_float((u32)(127 + 14 - exponent) << 23);  // the largest becomes 2^14 to 2^15
    inverse = __uint_as_float((u32)(127 + 10 + exponent) << 23);
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* v = values[j] + 2 * half;
        low[j][half] = pack_halves(v[0] * factor, v[4] * factor);
        high[j][half] = pack_halves(v[1] * factor * 0.0625f, v[5] * factor * 0.0625f);
        all += half_to_float((u16)low[j][half]) + half_to_float((u16)(low[j][half] >> 16));
        all += 16.0f * (half_to_float((u16)high[j][half]) + half_to_float((u16)(high[j][half] >> 16)));
      }
    }
    all += __shfl_xor_sync(~0u, all, 1), all += __shfl_xor_sync(~0u, all, 2);
    sum[0] = __shfl_sync(~0u, all, 8 * t) * 5.9604644775390625e-8f;  // 2^-24, as products have it
    sum[1] = __shfl_sync(~0u, all, 8 * t + 4) * 5.9604644775390625e-8f;
  }
};

// What a warp has summed; a lane has queries 2 t and 2 t + 1, of the totals what its positions gave.
struct Running {
  float most[2], total[2], zeros[2], sums[4 * TURNS][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int query = 0; query < 2; ++query) most[query] = NOTHING, total[query] = 0.0f, zeros[query] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * TURNS; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
  }

  // A new maximum; what was summed under the old one shrinks.
  __device__ __forceinline__ void raise(const float (&next)[2]) {
    if (!__any_sync(~0u, next[0] > most[0] || next[1] > most[1])) return;
#pragma unroll
    for (int query = 0; query < 2; ++query) {
      const float shrink = exp2(most[query] - next[query]);
      most[query] = next[query], total[query] *= shrink, zeros[query] *= shrink;
#pragma unroll
      for (int i = 0; i < 4 * TURNS; ++i) sums[i][query] *= shrink, sums[i][2 + query] *= shrink;
    }
  }

  // s: [tile][position g of RUN, next to it][query], scores; they become p scale_v as B fragments of the second product.
  __device__ __forceinline__ void weigh(u32 (&p)[TILES][2], const float (&s)[TILES][4], const Values& values) {
    float next[2] = {most[0], most[1]};
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      const float weight = log2(half_to_float(values.scale.at(i)));
#pragma unroll
      for (int query = 0; query < 2; ++query) next[query] = fmaxf(next[query], s[i / 2][i % 2 * 2 + query] + weight);
    }
#pragma unroll
    for (int apart = 4; apart < 32; apart *= 2) {
#pragma unroll
      for (int query = 0; query < 2; ++query) next[query] = fmaxf(next[query], __shfl_xor_sync(~0u, next[query], apart));
    }
    raise(next);
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      const float scale = half_to_float(values.scale.at(i)), zero = values.zero_of(i);
      float weighted[2];
#pragma unroll
      for (int query = 0; query < 2; ++query) {
        const float likely = exp2(s[i / 2][i % 2 * 2 + query] - most[query]);
        total[query] += likely, weighted[query] = likely * scale;
      }
      const u32 pair = pack_halves(weighted[0], weighted[1]);
      zeros[0] = __fmaf_rn(half_to_float((u16)pair), zero, zeros[0]);
      zeros[1] = __fmaf_rn(half_to_float((u16)(pair >> 16)), zero, zeros[1]);
      p[i / 2][i % 2] = transposed(pair);
    }
  }

  // Rows g and g + 8 of a product are columns 8 word + 2 i and the next of V, from words of two positions each.
  __device__ __forceinline__ void add(const u32 (&p)[TILES][2], const Values& values) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          u32 a[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const u32 one = values.words[2 * tile + half][turn], other = values.words[RUN + 2 * tile + half][turn];
            const u32 both = __byte_perm(one, other, i < 2 ? 0x5410 : 0x7632) >> 8 * (i % 2);
            a[2 * half] = low_pair(both), a[2 * half + 1] = high_pair(both);
          }
          half_step(sums[4 * turn + i], a, p[tile]);
        }
      }
    }
  }
};

// Scores of a step; scaling: of all queries, with their inverse.
__device__ __forceinline__ void score(float (&s)[TILES][4], const Queries& queries, const Keys& keys, float scaling) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    s[tile][0] = s[tile][1] = s[tile][2] = s[tile][3] = 0.0f;
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      const u32 one = keys.words[2 * tile][j], other = keys.words[2 * tile + 1][j];
      const u32 low[4] = {low_pair(one), low_pair(other), low_pair(one >> 8), low_pair(other >> 8)};
      const u32 high[4] = {high_pair(one), high_pair(other), high_pair(one >> 8), high_pair(other >> 8)};
      half_step(s[tile], low, queries.low[j]);
      half_step(s[tile], high, queries.high[j]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = half_to_float(keys.scale.at(2 * tile + half)) * scaling, zero = keys.zero_of(2 * tile + half);
#pragma unroll
      for (int query = 0; query < 2; ++query) {
        float& mine = s[tile][2 * half + query];
        mine = __fmaf_rn(-zero, queries.sum[query], mine) * scale;
      }
    }
  }
}

// A warp's sums to shared memory: [row][PARTIAL].
__device__ __forceinline__ void leave(float* to, Running& running, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int query = 0; query < 2; ++query) {
    float total = running.total[query], zeros = running.zeros[query];
#pragma unroll
    for (int apart = 4; apart < 32; apart *= 2) {
      total += __shfl_xor_sync(~0u, total, apart), zeros += __shfl_xor_sync(~0u, zeros, apart);
    }
    float* mine = to + (2 * t + query) * PARTIAL;
    if (g == 0) mine[VALUE_DIM] = running.most[query], mine[VALUE_DIM + 1] = total;
#pragma unroll
    for (int i = 0; i < 4 * TURNS; ++i) {
      const int column = 8 * (g * TURNS + i / 4) + 2 * (i % 4);
      if (column >= VALUE_DIM) continue;
      mine[column] = running.sums[i][query] * 16777216.0f - zeros;
      mine[column + 1] = running.sums[i][2 + query] * 1048576.0f - zeros;
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
    kv_attention(const u16* query, const u8* key_codes, const u16* key_scale, const short* key_zero, const u8* value_codes,
                 const u16* value_scale, const short* value_zero, const int* lengths, const int* starts, const int* table,
                 u16* out, float* partial, u64 heads, u64 group, u64 tokens, u64 slots, u64 pages, u64 splits, float scaling) {
  extern __shared__ __align__(16) float sums[];  // [warp][row][PARTIAL], and once more for their sum
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3;
  const int split = blockIdx.x % (u32)splits, row0 = blockIdx.x / (u32)splits * ROWS, all_rows = (int)(group * tokens);
  const int rows = min(ROWS, all_rows - row0), sequence = blockIdx.y / (u32)heads;
  const u64 first_row = (u64)blockIdx.y * all_rows + row0;
  let_next_begin();
  wait_for_last();
  const int length = min(lengths[sequence], (int)(slots * pages)), start = starts ? max(starts[sequence], 0) : 0;
  const Work work{{key_codes, key_scale, key_zero}, {value_codes, value_scale, value_zero}, table, heads, slots, pages,
                  sequence, (int)(blockIdx.y % (u32)heads), lane, length, slots % RUN == 0};
  const int lowest = start / STEP, steps = max((length + STEP - 1) / STEP - lowest, 0);
  const int first = lowest + steps * split / (int)splits + warp, end = lowest + steps * (split + 1) / (int)splits;

  Keys keys;
  Values values;
  if (first < end) work.load_keys(keys, first), work.load_values(values, first);
  Queries queries;
  queries.load(query + first_row * KEY_DIM, rows, lane);
  scaling *= queries.inverse;
  Running running;
  running.clear();
  for (int step = first; step < end; step += WARPS) {
    float s[TILES][4];
    u32 p[TILES][2];
    score(s, queries, keys, scaling);
    if (step + WARPS < end) work.load_keys(keys, step + WARPS);
    if (step * STEP < start || work.left(step) - (int)tokens + 1 < STEP) {  // not all of it is seen by all
#pragma unroll
      for (int i = 0; i < 2 * RUN; ++i) {
        const int position = step * STEP + (lane >> 2) * RUN + i / 2, token = (row0 + 2 * t + i % 2) % (int)tokens;
        if (position < start || position > length - (int)tokens + token) s[i / 4][i % 4] = HIDDEN;
      }
    }
    running.weigh(p, s, values);
    running.add(p, values);
    if (step + WARPS < end) work.load_values(values, step + WARPS);
  }

  leave(sums + warp * ROWS * PARTIAL, running, lane);
  merge_block(sums, out, partial, rows, split, (int)splits, [&](int row) { return first_row + row; });
}
