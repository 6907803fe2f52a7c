// y (M, N) = x (M, K) . W^T (+ bias) for many tokens with the tensor cores that every GPU from sm_80 on has: codes become
// fragments of W in registers, x comes from shared memory, and a decoded weight is used for all TOKENS tokens of a tile.
//
// A block owns tiles of y, 16 TILES rows of W times TOKENS tokens, one after the other. ROW_WARPS warps share its rows,
// ROW_TILES row tiles each, and TOKEN_WARPS its tokens (then a weight is decoded that often). All warps copy and all
// compute: cp.async fills two rings, copy by copy between tensor-core steps (a row of copies would hold up the loads behind
// it). A slot of x has two barriers, "full" (all copies have arrived) and "empty" (all warps are done), so that warps need
// not go in step.
//
//     x ring       STAGES slots of 64 k x TOKENS: 128 bytes a token, 16-byte pieces where (piece ^ token % 8) says
//     codes ring   CODE_SLOTS slots of one chunk: row tiles x [CHUNK_BYTES], then row tiles x scale sets x [32]
//
// Fragments of W are decoded one step of 16 k ahead of the tensor core, also into the next tile, whose copies are on their
// way while the last one is written. So that codes are there in time they travel one slot of x earlier than the x they
// meet. Each pair of weights is looked up, multiplied by its scales (one rounding to 16 bits, as
// in a dense checkpoint of these weights) and used.
//
// Where tiles of y are too few, K is cut into `split` slices, whose sums go to a float32 workspace that lut_reduce
// (decode.cu) adds up in order: the same bits on every run.
//
// Host macros: BITS, BF16, GROUP_BLOCK, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, STAGES.

constexpr int WARPS = ROW_WARPS * TOKEN_WARPS, THREADS = 32 * WARPS;
constexpr int TILES = ROW_WARPS * ROW_TILES, TOKENS = 8 * TOKEN_WARPS * TOKEN_TILES;
constexpr int SCALE_SETS = CHUNK_K / GROUP_BLOCK, STEPS = CHUNK_K / 16;
constexpr int SLOT_K = 64, X_BYTES = TOKENS * SLOT_K * 2, CODE_BYTES = TILES * (CHUNK_BYTES + 32 * SCALE_SETS);
constexpr int CODE_SLOTS = (STAGES + 1) / 2;
constexpr int X_RING = TABLE_BYTES, CODE_RING = X_RING + STAGES * X_BYTES;

// 16 bytes of x a thread and slot; and codes of a chunk: a row tile in one or two parts, then scales
constexpr int COPIES = TOKENS * 8 / THREADS, PIECES = TILES * SCALE_SETS * 2;
constexpr int REST = 4 * LANE_WORDS - 16, PARTS = REST > 0 ? 2 : 1, CODE_COPIES = TILES / WARPS * PARTS;
constexpr int BARRIERS = CODE_RING + CODE_SLOTS * CODE_BYTES;  // one "full" and one "empty" a slot of x
constexpr int FULL = 0, EMPTY = STAGES;
constexpr int GROUPS = TOKEN_TILES / 2, ALL = GROUPS * SLOT_K / 16;  // loads of x: two token tiles, one step of 16 k each
constexpr int AHEAD = BITS == 2 && TOKEN_TILES == 16 ? 2 : 3;  // such loads on their way; a third would spill on sm_100

static_assert(TILES % WARPS == 0 && TILES <= 2 * WARPS && TOKENS * 8 % THREADS == 0 && PIECES <= THREADS,
              "all warps share the copies");

struct Problem {
  const u8* weight;   // (tiles, chunks, CHUNK_BYTES)
  const u16* scales;  // (tiles, groups, 16)
  const u16* x;       // (m, k)
  int m, n, k, chunks, tiles, groups, units, token_tiles, split;
  u32 magic;
};

// One slice of K of one tile of y.
struct Item {
  int unit, token, slice, first, count;
  __device__ __forceinline__ Item(const Problem& p, int at) {
    const u32 area = p.units * p.token_tiles;
    slice = (u32)at / area;
    locate_tile(at - slice * area, p.units, p.token_tiles, unit, token);
    token *= TOKENS;
    first = (u32)(slice * p.chunks) / (u32)p.split, count = (u32)((slice + 1) * p.chunks) / (u32)p.split - first;
  }
};

// What this thread copies of x: the same 16 bytes of every (THREADS / 8)th token, 64 k after 64 k, item after item.
struct FeedX {
  const Problem& p;
  int at, total, row, piece;  // row: among the tile's tokens
  const u16* from;
  int left, k, inside;  // slots left of this item; bit i of inside: the i-th token exists

  __device__ __forceinline__ void enter() {
    left = 1 << 30, inside = 0;  // behind the last item: zeros that nobody reads
    if (at >= total) return;
    const Item item(p, at);
    const int token = item.token + row;
    left = item.count * (CHUNK_K / SLOT_K), k = item.first * CHUNK_K + piece * 8;
    from = p.x + (u64)token * p.k + k;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) inside |= (int)(token + i * (THREADS / 8) < p.m) << i;
  }

  __device__ __forceinline__ void copy(u32 slot, int i) const {
    const u32 to = slot + row * 128 + ((piece ^ (row & 7)) * 16) + i * THREADS * 16;
    copy_async_or_zero(to, from + (u64)i * (THREADS / 8) * p.k, k < p.k && inside >> i & 1);
  }

  __device__ __forceinline__ void advance() {
    from += SLOT_K, k += SLOT_K;
    if (--left == 0) at += gridDim.x, enter();
  }
};

// What this thread copies of codes and scales. Row tiles go round the warps; beyond the last it is copied again.
struct FeedCodes {
  const Problem& p;
  int at, total, thread;
  const u8* from;
  const u16* scales;  // of group 0 of the row tile that this thread's 16 bytes belong to
  int left, block, other;  // block of 32 k of those scales; bytes from one row tile of this warp to the next

  __device__ __forceinline__ int tile(const Item& item, int i) const { return min(item.unit * TILES + i, p.tiles - 1); }

  __device__ __forceinline__ void enter() {
    left = 0;
    if (at >= total) return;
    const Item item(p, at);
    const int warp = thread >> 5, first = tile(item, warp), piece = thread % PIECES;
    left = item.count;
    from = p.weight + ((u64)first * p.chunks + item.first) * CHUNK_BYTES;
    other = (tile(item, warp + WARPS) - first) * p.chunks * CHUNK_BYTES;
    scales = p.scales + (u64)tile(item, piece / (2 * SCALE_SETS)) * p.groups * TILE_ROWS + piece % 2 * 8;
    block = item.first * (CHUNK_K / BLOCK_K) + piece / 2 % SCALE_SETS * (GROUP_BLOCK / BLOCK_K);
  }

  __device__ __forceinline__ void copy(u32 slot, int i) const {
    const int lane = thread & 31, warp = thread >> 5;
    if (i < CODE_COPIES) {
      const u8* here = i < PARTS ? from : from + other;
      const u32 to = slot + (i / PARTS * WARPS + warp) * CHUNK_BYTES;
      if (i % PARTS == 0) copy_async_or_zero<16>(to + lane * 16, here + lane * 16, left > 0);
      else copy_async_or_zero<REST == 0 ? 16 : REST>(to + 512 + lane * REST, here + 512 + lane * REST, left > 0);
    } else if (thread < PIECES) {
      const u64 group = group_of(block, p.magic, p.groups);
      copy_async_or_zero(slot + TILES * CHUNK_BYTES + thread * 16, scales + group * TILE_ROWS, left > 0);
    }
  }

  __device__ __forceinline__ void advance() {
    from += CHUNK_BYTES, block += CHUNK_K / BLOCK_K;
    if (--left == 0) at += gridDim.x, enter();
  }
};

// A warp's codes of one chunk, and the scales of its rows 2 g and 2 g + 1.
struct Codes {
  u32 words[ROW_TILES][LOOKUP_WORDS], scales[ROW_TILES][SCALE_SETS];

  __device__ __forceinline__ void load(const u8* slot, int row_warp, int r, int lane) {
    const int tile = row_warp * ROW_TILES + r;
    load_words(words[r], slot + tile * CHUNK_BYTES, lane);
#pragma unroll
    for (int set = 0; set < SCALE_SETS; ++set) {
      scales[r][set] = *(const u32*)(slot + TILES * CHUNK_BYTES + (tile * SCALE_SETS + set) * 32 + (lane >> 2) * 4);
    }
  }

  // Fragment of row tile r at a step of 16 k.
  __device__ __forceinline__ void decode(u32 (&a)[4], int r, int step, const u8* table, u32 copy) const {
    load_weights(a, words[r], step, table, copy);
    const u32 both = scales[r][step * 16 / GROUP_BLOCK];
    const u32 low = __byte_perm(both, 0, 0x1010), high = __byte_perm(both, 0, 0x3232);
    a[0] = scaled(a[0], low), a[2] = scaled(a[2], low);
    a[1] = scaled(a[1], high), a[3] = scaled(a[3], high);
  }
};

typedef float Sums[ROW_TILES][TOKEN_TILES][4];

__device__ __forceinline__ void write_sums(const Problem& p, const Item& item, const Sums& acc, u16* y, const u16* bias,
                                           float* partial, int row_warp, int token_warp, int lane) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    const int row = (item.unit * TILES + row_warp * ROW_TILES + r) * TILE_ROWS + 2 * (lane >> 2);
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
      const int token = item.token + (token_warp * TOKEN_TILES + i) * 8 + 2 * (lane & 3);
      const float(&v)[4] = acc[r][i];
      if (partial == nullptr) {
        store(y, bias, p.m, p.n, row, token, make_float4(v[0], v[1], v[2], v[3]));
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (row + e / 2 >= p.n || token + e % 2 >= p.m) continue;
          partial[((u64)item.slice * p.m + token + e % 2) * p.n + row + e / 2] = v[e];
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lut_mma(const u8* weight, const u16* scales, const u16* table, u64 vectors, const u16* x, const u16* bias, u16* y,
            float* partial, u64 m, u64 n, u64 k, u64 groups, u64 magic, u64 split) {
  extern __shared__ __align__(1024) u8 memory[];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int row_warp = warp / TOKEN_WARPS, token_warp = warp % TOKEN_WARPS;
  const u32 shared = shared_address(memory);
  const int chunks = ((int)k + CHUNK_K - 1) / CHUNK_K, tiles = ((int)n + TILE_ROWS - 1) / TILE_ROWS;
  const Problem p{weight, scales, x, (int)m, (int)n, (int)k, chunks, tiles, (int)groups,
                  (tiles + TILES - 1) / TILES, ((int)m + TOKENS - 1) / TOKENS, (int)split, (u32)magic};
  const int total = p.units * p.token_tiles * p.split;

  const u32 barriers = shared + BARRIERS;
  if (warp == 0) {
    for (int i = lane; i < 2 * STAGES; i += 32) init_barrier(barriers + 8 * i, i < EMPTY ? THREADS : WARPS);
  }
  const u32 mine = table_value(table, vectors != 0, thread);
  __syncthreads();

  FeedX feed_x{p, (int)blockIdx.x, total, thread / 8, thread % 8};
  FeedCodes feed_codes{p, (int)blockIdx.x, total, thread};
  feed_x.enter(), feed_codes.enter();
  Cursor<STAGES> fill{0}, take{0};
  Cursor<CODE_SLOTS> code_fill{0}, code_take{0};
  // Copy number i of a slot of x, and with every second one of the codes of the next chunk.
  auto copy = [&](int i, bool codes_too) {
    if (i < COPIES) feed_x.copy(shared + X_RING + fill.slot * X_BYTES, i);
    else if (codes_too) feed_codes.copy(shared + CODE_RING + code_fill.slot * CODE_BYTES, i - COPIES);
  };
  auto finish = [&](bool codes_too) {
    arrive_with_copies(barriers + 8 * (FULL + fill.slot));
    fill.advance(1), feed_x.advance();
    if (codes_too) code_fill.advance(1), feed_codes.advance();
  };
#pragma unroll
  for (int i = 0; i <= CODE_COPIES; ++i) feed_codes.copy(shared + CODE_RING, i);
  code_fill.advance(1), feed_codes.advance();
#pragma unroll
  for (int slot = 0; slot < STAGES - 1; ++slot) {
#pragma unroll
    for (int i = 0; i <= COPIES + CODE_COPIES; ++i) copy(i, slot % 2 == 1);
    finish(slot % 2 == 1);
  }
  fill_table(memory, table, vectors != 0, mine, thread, THREADS);
  __syncthreads();

  // Lane l of a warp names the 16 bytes of token l % 8 + 8 (l / 16) at 8 (l / 8 % 2) k of a step.
  const int own = token_warp * TOKEN_TILES * 8 + (lane & 7) + (lane >> 4) * 8;
  const u32 x_lane = shared + X_RING + own * 128, swizzle = ((lane >> 3 & 1) ^ (lane & 7)) * 16;
  const u32 own_copy = lane_copy(lane);
  Codes codes;
  u32 a[2][ROW_TILES][4];
  wait_phase(barriers + 8 * FULL, 0);
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    codes.load(memory + CODE_RING, row_warp, r, lane);
    codes.decode(a[0][r], r, 0, memory, own_copy);
  }
  code_take.advance(1);
  __syncthreads();  // the first codes' slot may be filled again at once, and no "empty" stands for this first reading

  for (int at = blockIdx.x; at < total; at += gridDim.x) {
    const Item item(p, at);
    Sums acc = {};
    for (int chunk = 0; chunk < item.count; ++chunk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool codes_too = (half + STAGES - 1) % 2 == 1;
        wait_phase(barriers + 8 * (FULL + take.slot), take.phase);
        const u32 from = x_lane + take.slot * X_BYTES;
        uint4 b[AHEAD + 1];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) load_tokens(b[j], from + (swizzle ^ (j / GROUPS * 32)) + j % GROUPS * 2048);
#pragma unroll
        for (int j = 0; j < ALL; ++j) {
          const int ahead = j + AHEAD, step = half * (STEPS / 2) + j / GROUPS, i = j % GROUPS;
          if (ahead < ALL) {
            load_tokens(b[ahead % (AHEAD + 1)], from + (swizzle ^ (ahead / GROUPS * 32)) + ahead % GROUPS * 2048);
          }
#pragma unroll
          for (int r = 0; r < ROW_TILES; ++r) {  // one step ahead, row tile by row tile; then the next chunk's codes
            if (i == r * GROUPS / ROW_TILES) codes.decode(a[(step + 1) & 1][r], r, (step + 1) % STEPS, memory, own_copy);
            if (step == STEPS - 2 && i == r * GROUPS / ROW_TILES + 1) {
              codes.load(memory + CODE_RING + code_take.slot * CODE_BYTES, row_warp, r, lane);
            }
          }
          const uint4 now = b[j % (AHEAD + 1)];
#pragma unroll
          for (int t = 0; t < 2 * ROW_TILES; ++t) {  // back and forth: each shares a fragment with the one before
            const int second = t / ROW_TILES, r = second ? 2 * ROW_TILES - 1 - t : t;
            tensor_step(acc[r][2 * i + second], a[step & 1][r], second ? now.z : now.x, second ? now.w : now.y);
          }
          // The slot read before this one is filled again.
          if (j == 1) wait_phase(barriers + 8 * (EMPTY + fill.slot), fill.phase ^ 1);
#pragma unroll
          for (int c = 0; c <= COPIES + CODE_COPIES; ++c) {
            if (j == 2 + c * (ALL - 4) / (COPIES + CODE_COPIES + 1)) copy(c, codes_too);
          }
        }
        __syncwarp();
        if (lane == 0) arrive(barriers + 8 * (EMPTY + take.slot));
        take.advance(1);
        finish(codes_too);
      }
      code_take.advance(1);
    }
    write_sums(p, item, acc, y, bias, partial, row_warp, token_warp, lane);
  }
  wait_copies<0>();
}
