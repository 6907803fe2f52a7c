// y (M, N) = x (M, K) . W^T (+ bias) on Hopper's tensor cores: codes become fragments of W in registers, x comes from
// shared memory, and every decoded weight is used for TOKENS tokens at once.
//
// A block owns a tile of 64 ROWS rows of W (or a few less, so that all blocks together fit the GPU) times TOKENS tokens.
// COPY_WARPS + 1 warps only copy: codes and scales, and x.
// ROWS x WAYS groups of four warps compute: wgmma.m64nTOKENSk16 takes 64 rows of W as its A operand, 16 per warp, in
// just the fragments that packing prepared; each pair of weights is looked up, multiplied by its scales (one rounding to
// 16 bits, as a dense checkpoint of these weights would have) and used. Fragments are double-buffered in registers, so
// decoding runs while the tensor core works on the steps before.
//
//     codes ring   CODE_STAGES slots of one chunk: row tiles x [CHUNK_BYTES], then row tiles x scale sets x [32]
//     x ring       X_BOXES boxes of 64 k x TOKENS, 128 bytes a token, in the 128-byte swizzle wgmma reads
//
// Each slot has two barriers, "full" (bytes have arrived) and "empty" (its readers are done). A wait knows only whether a
// slot's use is odd or even, and boxes may arrive out of order: a way that has not waited for one use would take its
// absence for the presence of the next. So a slot of x serves the boxes of one way only (X_BOXES is a multiple of 2 WAYS;
// tests/test_rings.py tries all orders). Codes arrive in order: a thread's arrival stands for all its copies so far.
//
// K is shared in two ways: among WAYS groups of warps (chunk after chunk in turn) and among the `split` blocks of a
// cluster (contiguous slices). Then partial sums meet in shared memory, which the rings have left free, and are added
// in the order of blocks and ways, never of arrival: the same bits on every run. With neither, blocks are persistent
// and the copying warps run ahead into the next tile while the last one is written. There may be blocks without a tile:
// they stay until the launch before is over, and so keep the next one's blocks evenly spread.
//
// CUT, the last tiles are shared evenly by all blocks, cut along K (work.cuh). What a block has of a tile that another has
// begun it leaves in a workspace; whoever has the first chunk adds it up. The copy engine brings it into x's ring.
//
// GROUPED, there is a stack of matrices W, and rows of x are sorted by the one (the expert) they belong to (work.cuh). A
// box of x may run into the next expert's rows: what comes of those is not stored. Blocks are always persistent, and
// partial sums of ways have room of their own.
//
// Host macros: BITS, BF16, GROUP_BLOCK, TOKENS, ROWS, WAYS, COPY_WARPS, BLOCKS, X_BOXES, CODE_STAGES, GROUPED, CUT; in front of this text
// lie work.cuh and wgmma() (flute/kernels/wgmma.py).

constexpr int SCALE_SETS = CHUNK_K / GROUP_BLOCK;
constexpr int BOX_K = 64, BOX_BYTES = TOKENS * BOX_K * 2, STEPS = CHUNK_K / 16;
constexpr int TILES = 4 * ROWS, CODE_BYTES = TILES * (CHUNK_BYTES + 32 * SCALE_SETS);
constexpr int GROUPS = ROWS * WAYS, MATH_THREADS = 128 * GROUPS;
// Registers a thread: where accumulators are many, the copying warps give away what they do not need.
constexpr bool GIVE = CUT || GROUPS == 2 && TOKENS == 256;
constexpr int MATH_REGISTERS = GROUPS == 2 ? 216 : 144, COPY_REGISTERS = GROUPS == 2 ? 72 : 80;
constexpr int THREADS = MATH_THREADS + 32 * (COPY_WARPS + 1);
static_assert(!GIVE || COPY_WARPS == 3, "registers are handed over by whole groups of four warps");
constexpr int FULL_X = 0, EMPTY_X = X_BOXES, FULL_CODES = 2 * X_BOXES, EMPTY_CODES = FULL_CODES + CODE_STAGES;
constexpr int BARRIERS = EMPTY_CODES + CODE_STAGES;
constexpr int RINGS = TABLE_BYTES, CODES = RINGS + X_BOXES * BOX_BYTES;
constexpr int BARRIERS_AT = CODES + CODE_STAGES * CODE_BYTES;
// Partial sums: where the rings were, or behind the barriers, and then two numbers for each expert.
constexpr int SUMS = GROUPED ? BARRIERS_AT + (8 * BARRIERS + 15) / 16 * 16 : RINGS;
constexpr int EXPERTS_AT = SUMS + (WAYS > 1 ? GROUPS * TOKENS * 256 : 0);

static_assert(WAYS == 1 || X_BOXES % (2 * WAYS) == 0, "each slot of x belongs to one way");
static_assert(GROUPED || GROUPS * TOKENS * 256 <= BARRIERS_AT - RINGS, "partial sums must fit where the rings were");

struct __align__(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int k, int token, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(&map), "r"(k), "r"(token), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void meet_math() { asm volatile("bar.sync 1, %0;" ::"n"(MATH_THREADS) : "memory"); }

// ---- parts of tiles that are cut -----------------------------------------------------------------------------------------

#if CUT
static_assert(WAYS == 1 && !GROUPED, "a block's sums of a part of a tile are those of its groups");

// What a block has of a tile whose first chunk is another's lies in the workspace, behind a flag for each block: planes of 8
// tokens, 16 bytes a thread, of which two boxes' bytes are one group's.
__device__ __forceinline__ u8* part_of(u32* workspace, int block) {
  const int flags = (gridDim.x + 31) / 32 * 32;
  return (u8*)(workspace + flags) + (u64)block * (2 * GROUPS * BOX_BYTES);
}

__device__ __forceinline__ void leave_part(const float (&acc)[TOKENS / 2], u32* workspace, int thread) {
  float4* part = (float4*)(part_of(workspace, blockIdx.x) + (thread >> 7) * (2 * BOX_BYTES)) + (thread & 127);
#pragma unroll
  for (int i = 0; i < TOKENS / 8; ++i) {
    __stcg(part + i * 128, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  }
  meet_math();
  if (thread == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(workspace + blockIdx.x) : "memory");
}

// Whether block `block` has a part of tile number `at`, of which this one has the first chunk: those in front of it, in turn.
__device__ __forceinline__ bool has_part(const Work& work, int at, int block) {
  return block >= 0 && work.part(block) < (at - work.whole() + 1) * work.chunks;
}

// All other parts follow x's boxes in their ring, in the order of k: they arrive while the tensor cores are at work. It is
// the last that a block does, so cursors are copies: what the loop over chunks counts stays uniform for the compiler.
__device__ __forceinline__ void copy_parts(const Work& work, int at, u32* workspace, u32 shared, u32 barriers,
                                           Cursor<X_BOXES> cursor) {
  for (int block = (int)blockIdx.x - 1; has_part(work, at, block); --block) {
    u32 left = 0;
    while (!left) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(left) : "l"(workspace + block) : "memory");
    asm volatile("fence.proxy.async;" ::: "memory");  // written by stores, read by the copy engine
    for (int i = 0; i < 2 * GROUPS; ++i, cursor.advance(1)) {
      const u32 full = barriers + 8 * (FULL_X + cursor.slot);
      wait_phase(barriers + 8 * (EMPTY_X + cursor.slot), cursor.phase ^ 1);
      expect_bytes(full, BOX_BYTES);
      copy_bulk(shared + RINGS + cursor.slot * BOX_BYTES, part_of(workspace, block) + i * BOX_BYTES, BOX_BYTES, full);
    }
  }
}

__device__ __forceinline__ void add_parts(float (&acc)[TOKENS / 2], const Work& work, int at, const u8* memory,
                                          u32 barriers, int thread, Cursor<X_BOXES> box) {
  int parts = 0;
  while (has_part(work, at, (int)blockIdx.x - 1 - parts)) ++parts;
  for (int i = 0; i < parts * GROUPS; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half, box.advance(1)) {
      wait_phase(barriers + 8 * (FULL_X + box.slot), box.phase);
      if (i % GROUPS == thread >> 7) {
        const float4* part = (const float4*)(memory + RINGS + box.slot * BOX_BYTES) + (thread & 127);
        float* to = acc + half * (TOKENS / 4);
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j, to += 4) {
          const float4 v = part[j * 128];
          to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
        }
      }
      __syncwarp();
      if ((thread & 31) == 0) arrive(barriers + 8 * (EMPTY_X + box.slot));
    }
  }
}

// The launch in front of the kernel. What used the workspace before is over when it writes.
extern "C" __global__ void clear_flags(u32* flags, u64 count) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int i = threadIdx.x; i < count; i += blockDim.x) flags[i] = 0;
}
#endif

// ---- copying, and storing ---------------------------------------------------------------------------------------------

// Codes and scales go by the threads' own asynchronous copies: a bulk copy of a kilobyte costs its issuer 70 cycles.
__device__ __forceinline__ void copy_codes(const Work& work, const u8* weight, const u16* scales, int chunks, int groups,
                                           u32 magic, u32 shared, u32 barriers, int warp, int lane) {
  constexpr int PARTS = (TILES + COPY_WARPS - 1) / COPY_WARPS;
  constexpr int REST = 4 * LANE_WORDS - 16, PIECES = TILES * SCALE_SETS * 2, COPY_LANES = 32 * COPY_WARPS;
  Cursor<CODE_STAGES> cursor{0};
  for (Turn turn = work.first_turn(); turn.at < work.total(); work.next(turn)) {
    Tile tile;
    work.locate(turn.at, tile);
    const u8* from = weight + ((u64)tile.unit * work.span * chunks + turn.first) * CHUNK_BYTES;
    const u16* scales_from = scales + (u64)tile.unit * work.span * groups * TILE_ROWS;
    if (GROUPED) from += (u64)tile.expert * work.tiles * chunks * CHUNK_BYTES;
    if (GROUPED) scales_from += (u64)tile.expert * work.tiles * groups * TILE_ROWS;
    const int here = min(work.span, work.tiles - tile.unit * work.span);  // warps of other rows work on what lies in the ring
    u32 offset[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) offset[i] = (i * COPY_WARPS + warp) * chunks * CHUNK_BYTES + lane * 16;
    for (int chunk = turn.first; chunk < turn.first + turn.count; ++chunk, cursor.advance(1), from += CHUNK_BYTES) {
      wait_phase(barriers + 8 * (EMPTY_CODES + cursor.slot), cursor.phase ^ 1);
      const u32 slot = shared + CODES + cursor.slot * CODE_BYTES;
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        if (i * COPY_WARPS + warp >= here) break;
        const u32 to = slot + (i * COPY_WARPS + warp) * CHUNK_BYTES;
        copy_async<16>(to + lane * 16, from + offset[i]);
        if (REST > 0) copy_async<REST == 0 ? 4 : REST>(to + 512 + lane * REST, from + 512 + (offset[i] - lane * (16 - REST)));
      }
#pragma unroll
      for (int i = 0; i < (PIECES + COPY_LANES - 1) / COPY_LANES; ++i) {
        const int piece = i * COPY_LANES + warp * 32 + lane, row_tile = piece / (2 * SCALE_SETS);
        if (row_tile >= here) break;
        const int block = chunk * (CHUNK_K / BLOCK_K) + piece / 2 % SCALE_SETS * (GROUP_BLOCK / BLOCK_K);
        const u32 group = row_tile * groups + group_of(block, magic, groups);
        copy_async<16>(slot + TILES * CHUNK_BYTES + piece * 16, scales_from + group * TILE_ROWS + piece % 2 * 8);
      }
      arrive_with_copies(barriers + 8 * (FULL_CODES + cursor.slot));
    }
  }
}

__device__ __forceinline__ void copy_x(const Work& work, const TensorMap& map, u32* workspace, u32 shared,
                                       u32 barriers) {
  Cursor<X_BOXES> cursor{0};
  for (Turn turn = work.first_turn(); turn.at < work.total(); work.next(turn)) {
    Tile tile;
    work.locate(turn.at, tile);
    for (int box = 2 * turn.first; box < 2 * (turn.first + turn.count); ++box, cursor.advance(1)) {
      const u32 full = barriers + 8 * (FULL_X + cursor.slot);
      wait_phase(barriers + 8 * (EMPTY_X + cursor.slot), cursor.phase ^ 1);
      expect_bytes(full, BOX_BYTES);
      copy_box(shared + RINGS + cursor.slot * BOX_BYTES, map, box * BOX_K, tile.token, full);
    }
#if CUT
    if (turn.first == 0 && turn.count < work.chunks) copy_parts(work, turn.at, workspace, shared, barriers, cursor);
#endif
  }
}

__device__ __forceinline__ void release_registers() {
  if (GIVE) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
}

__device__ __forceinline__ void take_registers() {
  if (GIVE) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MATH_REGISTERS));
}

// Partial sums lie as planes: 8 tokens of one group's 64 rows, 16 bytes a thread. Planes go round the groups of all
// blocks, and each is added up in the order of blocks and ways.
__device__ __forceinline__ void add_partial_sums(const Work& work, u16* y, const u16* bias, u32 shared, int rank,
                                                 int split, int at, int thread) {
  const int lane = thread & 31, warp = thread >> 5;
  Tile made;
  work.locate(at, made);
  if (GROUPED && bias) bias += (u64)made.expert * work.n;
  for (int plane = rank * GROUPS + (warp >> 2); plane < ROWS * (TOKENS / 8); plane += GROUPS * split) {
    const int group = plane / (TOKENS / 8), i = plane % (TOKENS / 8);
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int block = 0; block < split; ++block) {
#pragma unroll
      for (int way = 0; way < WAYS; ++way) {
        const u32 here = shared + SUMS + ((((way * ROWS + group) * (TOKENS / 8) + i) * 128) + (thread & 127)) * 16;
        u32 there;
        float4 v;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                     : "r"(there)
                     : "memory");
        total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
      }
    }
    const int tile = group * 4 + (warp & 3), row = (made.unit * work.span + tile) * TILE_ROWS + 2 * (lane >> 2);
    if (tile < work.span) store(y, bias, made.end, work.n, row, made.token + 8 * i + 2 * (lane & 3), total);
  }
}


// ---- the kernel --------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    lut_matmul(const __grid_constant__ TensorMap x, const u8* weight, const u16* scales, const u16* table, u64 vectors,
               const u16* bias, u16* y, u32* workspace, u64 m, u64 n, u64 k, u64 groups, u64 magic, u64 split,
               u64 share, u64 span, const int* offsets, u64 experts) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 shared = shared_address(memory), barriers = shared + BARRIERS_AT;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  // Division by the size of a cluster, as a multiplication: 2^32 / size is exact enough for 65535 blocks.
  const int begin = (int)(blockIdx.x * share >> 32), stride = (int)(gridDim.x * share >> 32);
  const int rank = (int)blockIdx.x - begin * (int)split;
  const int chunks = ((int)k + CHUNK_K - 1) / CHUNK_K, tiles = ((int)n + TILE_ROWS - 1) / TILE_ROWS;
  const int first = (int)(rank * chunks * share >> 32), count = (int)((rank + 1) * chunks * share >> 32) - first;
  int* ends = (int*)(memory + EXPERTS_AT);
  const int filled = CUT ? TILES : (int)span;  // a constant where it can be: one division less
  const Work work{(int)m, (int)n, tiles, filled, (tiles + filled - 1) / filled, ((int)m + TOKENS - 1) / TOKENS, chunks,
                  first,  count,  begin, stride, (int)experts, ends};

  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  for (int i = warp; i < BARRIERS; i += THREADS / 32) {  // lane by lane a warp would need a microsecond
    const bool full_x = i < EMPTY_X, full_codes = i >= FULL_CODES && i < EMPTY_CODES;
    if (lane == 0) init_barrier(barriers + 8 * i, full_x ? 1 : full_codes ? 32 * COPY_WARPS : 4 * ROWS);
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  const u32 mine = table_value(table, vectors != 0, thread);
  if (GROUPED && warp == THREADS / 32 - 1) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    count_tiles(ends, offsets, (int)experts, (int)m, work.units, lane);
  }
  __syncthreads();

  if (warp >= 4 * GROUPS) {
    release_registers();
    if (warp > 4 * GROUPS) {
      copy_codes(work, weight, scales, chunks, (int)groups, (u32)magic, shared, barriers, warp - 4 * GROUPS - 1, lane);
    } else if (lane == 0) {
      asm volatile("griddepcontrol.wait;" ::: "memory");  // weights never depend on the kernel before this one, x does
      copy_x(work, x, workspace, shared, barriers);
    }
    __syncwarp();
    if (split > 1) meet_cluster(), meet_cluster();
  } else {
    take_registers();
    fill_table(memory, table, vectors != 0, mine, thread, MATH_THREADS);
    meet_math();
    const u32 copy = lane_copy(lane);
    const int way = WAYS == 1 ? 0 : warp / (4 * ROWS), tile = warp % (4 * ROWS);  // a group's four warps take neighbouring tiles
    Cursor<CODE_STAGES> codes{way};
    Cursor<X_BOXES> box{2 * way};
    for (Turn turn = work.first_turn(); turn.at < work.total(); work.next(turn)) {
      float acc[TOKENS / 2];
#pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0.0f;
      u32 a[2][2][4], pairs[2][4];  // fragments of two steps, twice; what the table gave for the two steps after them
      u32 last = 0;  // barrier of the box that is released when its last step is surely over
      for (int chunk = way; chunk < turn.count; chunk += WAYS, codes.advance(WAYS), box.advance(2 * WAYS)) {
        const u8* slot = memory + CODES + codes.slot * CODE_BYTES;
        wait_phase(barriers + 8 * (FULL_CODES + codes.slot), codes.phase);
        u32 words[LOOKUP_WORDS], both[SCALE_SETS];
        load_words(words, slot + tile * CHUNK_BYTES, lane);
#pragma unroll
        for (int set = 0; set < SCALE_SETS; ++set) {
          both[set] = *(const u32*)(slot + TILES * CHUNK_BYTES + (tile * SCALE_SETS + set) * 32 + (lane >> 2) * 4);
        }
        __syncwarp();
        if (lane == 0) arrive(barriers + 8 * (EMPTY_CODES + codes.slot));
        const auto look_up = [&](int two) {
#pragma unroll
          for (int i = 0; i < 2; ++i) load_weights(pairs[i], words, 2 * two + i, memory, copy);
        };
        look_up(0);
        Cursor<X_BOXES> second = box;
        second.advance(1);
#pragma unroll
        for (int two = 0; two < STEPS / 2; ++two) {
          const Cursor<X_BOXES>& half = two < 2 ? box : second;
          u32(&now)[2][4] = a[two & 1];
          wait_steps<1>(acc);  // the steps before the last two are over: their registers and their box are free
          if (two % 2 == 1 && last != 0 && lane == 0) arrive(last);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const u32 scale = both[(2 * two + i) * 16 / GROUP_BLOCK];
            const u32 low = __byte_perm(scale, 0, 0x1010), high = __byte_perm(scale, 0, 0x3232);
#pragma unroll
            for (int r = 0; r < 4; ++r) now[i][r] = scaled(pairs[i][r], r % 2 == 0 ? low : high);
          }
          if (two % 2 == 0) wait_phase(barriers + 8 * (FULL_X + half.slot), half.phase);
          // K-major, 128-byte swizzle: 8 tokens are 1024 bytes; a step of 16 k is 32 bytes further
          const u64 b = (u64)((shared + RINGS + half.slot * BOX_BYTES) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
          begin_steps();
          wgmma(acc, now[0], b + 4 * (two & 1));
          wgmma(acc, now[1], b + 4 * (two & 1) + 2);
          commit_steps();
          if (two + 1 < STEPS / 2) look_up(two + 1);  // on their way while the tensor cores are at work
          if (two % 2 == 1) last = barriers + 8 * (EMPTY_X + half.slot);
        }
      }
      wait_steps<0>(acc);
      if (last != 0 && lane == 0) arrive(last);
      if (GROUPED && WAYS > 1) {  // the next tile's chunks follow this one's in the rings, whatever way took the last
        const int over = (count - way + WAYS - 1) / WAYS * WAYS - count;
        codes.rewind(over), box.rewind(2 * over);
      }

#if CUT
      if (turn.count < chunks) {
        if (turn.first > 0) {
          leave_part(acc, workspace, thread);
          continue;
        }
        add_parts(acc, work, turn.at, memory, barriers, thread, box);
      }
#endif

      Tile done;
      work.locate(turn.at, done);
      const u16* addend = GROUPED && bias ? bias + (u64)done.expert * work.n : bias;
      const int row = (done.unit * work.span + tile) * TILE_ROWS + 2 * (lane >> 2);
      const int token = done.token + 2 * (lane & 3);
      if (WAYS == 1 && split == 1) {
        if (tile >= work.span) continue;
        if (work.n % 2 == 0 && row + 1 < work.n && token + TOKENS <= done.end + 2 * (lane & 3)) {  // all there is of it
          u16* to = y + (u64)token * work.n + row;
          const float low = addend ? wide(addend[row]) : 0.0f, high = addend ? wide(addend[row + 1]) : 0.0f;
#pragma unroll
          for (int i = 0; i < TOKENS / 8; ++i, to += 8ull * work.n) {
            *(u32*)to = narrow_pair(acc[4 * i] + low, acc[4 * i + 2] + high);
            *(u32*)(to + work.n) = narrow_pair(acc[4 * i + 1] + low, acc[4 * i + 3] + high);
          }
        } else {
#pragma unroll
          for (int i = 0; i < TOKENS / 8; ++i) {
            const float4 v = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
            store(y, addend, done.end, work.n, row, token + 8 * i, v);
          }
        }
      } else {  // at most one tile: the rings are free once every group is here; grouped, the sums of the tile before
        meet_math();
        float4* sums = (float4*)(memory + SUMS) + (warp >> 2) * (TOKENS / 8) * 128 + (thread & 127);
#pragma unroll
        for (int i = 0; i < TOKENS / 8; ++i) {
          sums[i * 128] = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
        }
        if (GROUPED) meet_math(), add_partial_sums(work, y, bias, shared, 0, 1, turn.at, thread);
      }
    }
    if (!GROUPED && (WAYS > 1 || split > 1)) {
      if (split > 1) meet_cluster();
      else meet_math();
      if (begin < work.total()) add_partial_sums(work, y, bias, shared, rank, (int)split, begin, thread);
      if (split > 1) meet_cluster();  // others may still be reading
    }
  }
}
