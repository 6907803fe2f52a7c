// Attention of few queries over keys and values in 16 bits (flute/kernels/decode_attention.py), split along the positions.
//
// A block takes one key head of one sequence, 8 rows of queries (query heads of the group times tokens), and one of
// `splits` parts of the positions. Steps of STEP positions go round all warps of all parts, so that whatever the mask
// hides, and however long the cache is, those have the same to do. A warp looks through the mask of 32 of its steps at
// once and never reads keys of one in which nobody sees anything.
//
// Positions are the operand with 16 rows of the tensor core, queries the one with 8: scores are positions x queries, sums
// are columns of V x queries. Rows go from memory to registers, 16 bytes a lane. A product may take its k in any order
// that both operands share: of keys, pieces of eight neighbours; of values, whose rows are k, positions as scores leave
// them, so two rows are interleaved by one instruction a word. The next keys are asked for as soon as these are scored,
// the next values as soon as these are added. parts.cuh says how warps, and then parts, are added.
//
// Host macros: BF16, KEY_DIM, VALUE_DIM (multiples of 8), WARPS, TILES (of 16 positions, in a step).

static_assert(TILES <= 2, "a lane looks at one position of a step");

constexpr int STEP = 16 * TILES, PIECES = KEY_DIM / 8, OWN = (PIECES + 3) / 4;  // pieces of a key; a lane's
constexpr int VALUE_PIECES = VALUE_DIM / 8, TURNS = (VALUE_PIECES + 7) / 8;     // of a value; a lane's

// Rows of one head of one sequence: neighbours along the last dimension, `apart` elements from row to row.
struct Rows {
  const u16* first;
  u64 apart;

  __device__ __forceinline__ uint4 piece(int row, int number, int all) const {
    return number < all ? *(const uint4*)(first + row * apart + 8 * number) : make_uint4(0, 0, 0, 0);
  }
};

// What the queries of this block may see: byte [token][position], or everything where there are none.
struct Mask {
  const u8* bytes;
  u64 apart;
  int tokens, positions;

  __device__ __forceinline__ bool shows(int token, int position) const {
    return position < positions && (!bytes || bytes[token * apart + position]);
  }

  // Whether somebody sees something of a step; for a whole warp.
  __device__ __forceinline__ bool shows_any(int step, int lane) const {
    bool seen = false;
#pragma unroll 1
    for (int token = 0; token < (bytes ? tokens : 1); ++token) seen |= lane < STEP && shows(token, step * STEP + lane);
    return __any_sync(~0u, seen);
  }
};

// This warp's steps: `first`, and every `stride`-th behind it; those in which somebody sees something.
struct Steps {
  int first, stride;
  u32 found = 0;  // of the 32 that were looked through last

  __device__ __forceinline__ int next(const Mask& mask, int lane) {
    while (!found) {
      if (first * STEP >= mask.positions) return -1;
#pragma unroll 4
      for (int i = 0; i < 32; ++i) {
        if ((first + i * stride) * STEP >= mask.positions) break;
        found |= (u32)mask.shows_any(first + i * stride, lane) << i;
      }
      first += 32 * stride;
    }
    const int number = __ffs(found) - 1;
    found &= found - 1;
    return first + (number - 32) * stride;
  }
};

// Keys of positions g and g + 8 of each tile, every fourth piece, and which of them queries 2 t and 2 t + 1 see.
struct Keys {
  uint4 pieces[2 * TILES][OWN];
  bool seen[2 * TILES][2];  // [position][query]

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      seen[i][0] = seen[i][1] = false;
#pragma unroll
      for (int j = 0; j < OWN; ++j) pieces[i][j] = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void load(const Rows& rows, const Mask& mask, int step, const int (&tokens)[2], int lane) {
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      const int position = step * STEP + (lane >> 2) + 8 * i;
#pragma unroll
      for (int j = 0; j < OWN; ++j) pieces[i][j] = rows.piece(min(position, mask.positions - 1), (lane & 3) + 4 * j, PIECES);
#pragma unroll
      for (int query = 0; query < 2; ++query) seen[i][query] = mask.shows(tokens[query], position);
    }
  }
};

// Values of positions 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of each tile, every eighth piece.
struct Values {
  uint4 pieces[4 * TILES][TURNS];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4 * TILES * TURNS; ++i) pieces[i / TURNS][i % TURNS] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void load(const Rows& rows, int step, int last, int lane) {
#pragma unroll
    for (int i = 0; i < 4 * TILES; ++i) {
      const int position = min(step * STEP + (lane & 3) * 2 + i % 2 + i / 2 * 8, last);
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) pieces[i][turn] = rows.piece(position, (lane >> 2) + 8 * turn, VALUE_PIECES);
    }
  }
};

__device__ __forceinline__ u32 word(const uint4& four, int i) { return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w; }

// What a warp has summed; a lane has queries 2 t and 2 t + 1, of the totals what its positions gave.
struct Running {
  float most[2], total[2], sums[4 * TURNS][4];

  __device__ __forceinline__ void clear() {
    most[0] = most[1] = NOTHING, total[0] = total[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < 16 * TURNS; ++i) sums[i / 4][i % 4] = 0.0f;
  }

  // s: [tile][position, query], scores; they become B fragments of the second product.
  __device__ __forceinline__ void weigh(u32 (&p)[TILES][2], const float (&s)[TILES][4]) {
#pragma unroll
    for (int query = 0; query < 2; ++query) {
      float next = most[query];
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) next = fmaxf(next, s[i / 2][i % 2 * 2 + query]);
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2) next = fmaxf(next, __shfl_xor_sync(~0u, next, apart));
      const float shrink = exp2(most[query] - next);
      most[query] = next, total[query] *= shrink;
#pragma unroll
      for (int i = 0; i < 4 * TURNS; ++i) sums[i][query] *= shrink, sums[i][2 + query] *= shrink;
    }
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      const float first = exp2(s[i / 2][i % 2 * 2] - most[0]), second = exp2(s[i / 2][i % 2 * 2 + 1] - most[1]);
      total[0] += first, total[1] += second;
      p[i / 2][i % 2] = transposed(narrow_pair(first, second));
    }
  }

  // Rows g and g + 8 of a product are columns 8 piece + 2 i and the next of V.
  __device__ __forceinline__ void add(const u32 (&p)[TILES][2], const Values& values) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 4 * TURNS; ++i) {
        u32 a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32 one = word(values.pieces[4 * tile + 2 * half][i / 4], i % 4);
          const u32 other = word(values.pieces[4 * tile + 2 * half + 1][i / 4], i % 4);
          a[2 * half] = __byte_perm(one, other, 0x5410), a[2 * half + 1] = __byte_perm(one, other, 0x7632);
        }
        tensor_step(sums[i], a, p[tile][0], p[tile][1]);
      }
    }
  }

  // To shared memory: [row][PARTIAL].
  __device__ __forceinline__ void leave(float* to, int lane) const {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int query = 0; query < 2; ++query) {
      float all = total[query];
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2) all += __shfl_xor_sync(~0u, all, apart);
      float* mine = to + (2 * t + query) * PARTIAL;
      if (g == 0) mine[VALUE_DIM] = most[query], mine[VALUE_DIM + 1] = all;
#pragma unroll
      for (int i = 0; i < 4 * TURNS; ++i) {
        const int column = 8 * (g + i / 4 * 8) + 2 * (i % 4);
        if (column < VALUE_DIM) *(float2*)(mine + column) = make_float2(sums[i][query], sums[i][2 + query]);
      }
    }
  }
};

// Scores of a step: [tile]{position g queries 2 t, 2 t + 1, position g + 8 the same}.
__device__ __forceinline__ void score(float (&s)[TILES][4], const uint4 (&query)[OWN], const Keys& keys, float scaling) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    float(&mine)[4] = s[tile];
    mine[0] = mine[1] = mine[2] = mine[3] = 0.0f;
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      const uint4 &one = keys.pieces[2 * tile][j], &other = keys.pieces[2 * tile + 1][j];
      const u32 low[4] = {one.x, other.x, one.y, other.y}, high[4] = {one.z, other.z, one.w, other.w};
      tensor_step(mine, low, query[j].x, query[j].y);
      tensor_step(mine, high, query[j].z, query[j].w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) mine[i] = keys.seen[2 * tile + i / 2][i % 2] ? mine[i] * scaling : HIDDEN;
  }
}

// _b, _h, _t: strides in elements of sequence, head, and token or position; out: [sequence][token][head][VALUE_DIM].
extern "C" __global__ void __launch_bounds__(32 * WARPS, 8 / WARPS)
    decode_attention(const u16* query, u64 query_b, u64 query_h, u64 query_t, const u16* key, u64 key_b, u64 key_h, u64 key_t,
                     const u16* value, u64 value_b, u64 value_h, u64 value_t, const u8* mask_bytes, u64 mask_b, u64 mask_t,
                     u16* out, float* partial, u32 heads, u32 group, u32 tokens, u32 positions, u32 splits, float scaling) {
  extern __shared__ __align__(16) float sums[];  // [warp][row][PARTIAL], and once more for their sum
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 split = blockIdx.x % splits, row0 = blockIdx.x / splits * ROWS, sequence = blockIdx.y / heads, head = blockIdx.y % heads;
  const int rows = min(ROWS, (int)(group * tokens - row0));
  const Rows keys_at{key + sequence * key_b + head * key_h, key_t}, values_at{value + sequence * value_b + head * value_h, value_t};
  const Mask mask{mask_bytes ? mask_bytes + sequence * mask_b : nullptr, mask_t, (int)tokens, (int)positions};
  const u32 row = row0 + min(lane >> 2, rows - 1);
  const Rows query_at{query + sequence * query_b + (head * group + row / tokens) * query_h, query_t};
  const int seen_by[2] = {(int)((row0 + (lane & 3) * 2) % tokens), (int)((row0 + (lane & 3) * 2 + 1) % tokens)};
  Steps steps{(int)(split * WARPS + warp), (int)(splits * WARPS)};
  let_next_begin();
  wait_for_last();
  int next = steps.next(mask, lane);
  Keys keys;
  Values values;
  keys.clear(), values.clear();  // nobody sees what is not loaded
  if (next >= 0) {
    keys.load(keys_at, mask, next, seen_by, lane), values.load(values_at, next, positions - 1, lane);
    next = steps.next(mask, lane);
  }
  uint4 own[OWN];
#pragma unroll
  for (int j = 0; j < OWN; ++j) own[j] = query_at.piece(row % tokens, (lane & 3) + 4 * j, PIECES);
  Running running;
  running.clear();
#pragma unroll 1
  for (;;) {
    float s[TILES][4];
    u32 p[TILES][2];
    score(s, own, keys, scaling);
    if (next >= 0) keys.load(keys_at, mask, next, seen_by, lane);
    running.weigh(p, s);
    running.add(p, values);
    if (next < 0) break;
    values.load(values_at, next, positions - 1, lane);
    next = steps.next(mask, lane);
  }
  running.leave(sums + warp * ROWS * PARTIAL, lane);
  merge_block(sums, out, partial, rows, split, splits, [&](int at) {
    const u32 of = row0 + at;
    return ((u64)sequence * tokens + of % tokens) * heads * group + head * group + of / tokens;
  });
}
