// y (M, N) of int8 codes and int4 or int8 weights on Hopper's tensor cores: wgmma.m64nCOLUMNSk32 takes 64 rows of W from
// registers, 16 a warp, in just the fragments that packing prepared, and the tokens' codes from shared memory.
//
// A block owns 64 ROWS rows of W times COLUMNS tokens. COPY_WARPS warps copy W, one the tokens (the tensor copy engine,
// 128-byte swizzle), 4 ROWS warps compute. One ring of STAGES slots, each 128 k of both:
//
//     codes of x    COLUMNS x 128 bytes        pieces of W    4 ROWS row tiles x [TILE_BYTES]
//
// Fragments are double-buffered in registers, so unpacking runs beside the tensor core. K may be cut among the blocks of a
// cluster, whose sums, integers, meet in shared memory. Without that, blocks are persistent and the copying warps run
// ahead into the next tile while the last one is written.
//
// Host macros: CODE_BITS, BF16, COLUMNS, ROWS, STAGES; integers.cuh and wgmma() (flute/kernels/wgmma.py) come first.

constexpr int BOX_K = 128, TILES = 4 * ROWS, TILE_BYTES = BOX_K / PIECE_K * PIECE_BYTES;
constexpr int X_BYTES = COLUMNS * BOX_K, SLOT_BYTES = X_BYTES + TILES * TILE_BYTES;
// Registers a thread: where accumulators are many, the copying warps give away what they do not need.
constexpr bool GIVE = ROWS * COLUMNS >= 512;
constexpr int MATH_REGISTERS = ROWS == 2 ? 216 : ROWS == 3 ? 152 : 112, COPY_REGISTERS = ROWS == 2 ? 72 : ROWS == 3 ? 56 : 32;
constexpr int COPY_WARPS = GIVE ? 3 : ROWS, MATH_WARPS = 4 * ROWS, THREADS = 32 * (MATH_WARPS + COPY_WARPS + 1);
constexpr int BARRIERS = STAGES * SLOT_BYTES, FULL = 0, EMPTY = STAGES;

static_assert(MATH_WARPS * COLUMNS * 64 <= STAGES * SLOT_BYTES, "partial sums must fit where the ring was");

struct __align__(64) TensorMap {
  u64 opaque[16];
};

struct Work {
  int units, pitch, token_tiles, tiles, boxes, first, count, begin, stride;
  __device__ __forceinline__ int total() const { return units * token_tiles; }
  __device__ __forceinline__ void locate(int at, int& unit, int& token) const {
    locate_tile(at, units, token_tiles, unit, token);
    token *= COLUMNS;
  }
};

__device__ __forceinline__ void copy_weight(const Work& work, const u8* weight, u32 shared, int warp, int lane) {
  Cursor<STAGES> cursor{0};
  for (int at = work.begin; at < work.total(); at += work.stride) {
    int unit, token;
    work.locate(at, unit, token);
    for (int box = work.first; box < work.first + work.count; ++box, cursor.advance(1)) {
      wait_phase(shared + BARRIERS + 8 * (EMPTY + cursor.slot), cursor.phase ^ 1);
      const u32 slot = shared + cursor.slot * SLOT_BYTES + X_BYTES;
#pragma unroll
      for (int tile = warp; tile < TILES; tile += COPY_WARPS) {
        if (tile >= work.pitch) break;
        const int row_tile = min(unit * work.pitch + tile, work.tiles - 1);
        const u8* from = weight + ((u64)row_tile * work.boxes + box) * TILE_BYTES + lane * 16;
#pragma unroll
        for (int part = 0; part < TILE_BYTES; part += PIECE_BYTES) {
          copy_async<16>(slot + tile * TILE_BYTES + part + lane * 16, from + part);
        }
      }
      arrive_with_copies(shared + BARRIERS + 8 * (FULL + cursor.slot));
    }
  }
}

__device__ __forceinline__ void copy_x(const Work& work, const TensorMap& map, u32 shared) {
  Cursor<STAGES> cursor{0};
  for (int at = work.begin; at < work.total(); at += work.stride) {
    int unit, token;
    work.locate(at, unit, token);
    for (int box = work.first; box < work.first + work.count; ++box, cursor.advance(1)) {
      const u32 full = shared + BARRIERS + 8 * (FULL + cursor.slot);
      wait_phase(shared + BARRIERS + 8 * (EMPTY + cursor.slot), cursor.phase ^ 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(X_BYTES) : "memory");
      asm volatile(  // the map counts pairs of codes
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
              shared + cursor.slot * SLOT_BYTES),
          "l"(&map), "r"(box * BOX_K / 2), "r"(token), "r"(full)
          : "memory");
    }
  }
}

// Partial sums lie as planes: 8 tokens of one group's 64 rows, 16 bytes a thread. Planes go round the groups of all blocks.
__device__ __forceinline__ void add_partial_sums(const Output& output, const Work& work, u32 shared, int rank, int split, int unit,
                                                 int token, int thread) {
  const int lane = thread & 31, warp = thread >> 5;
  for (int plane = rank * ROWS + (warp >> 2); plane < ROWS * (COLUMNS / 8); plane += ROWS * split) {
    const int tile = plane / (COLUMNS / 8) * 4 + (warp & 3);
    if (tile >= work.pitch) continue;
    const u32 here = shared + (plane * 128 + (thread & 127)) * 16;
    int total[4] = {};
    for (int block = 0; block < split; ++block) {
      u32 there;
      int v[4];
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
      asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                   : "r"(there)
                   : "memory");
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += v[e];
    }
    const int row = (unit * work.pitch + tile) * 16 + 2 * (lane >> 2);
    const int column = token + plane % (COLUMNS / 8) * 8 + 2 * (lane & 3);
    const float2 scales = output.scales_of(row);
    output.store(column, row, total[0], total[2], scales);
    output.store(column + 1, row, total[1], total[3], scales);
  }
}

// All K of one tile, or this block's share of it.
__device__ __forceinline__ void multiply(int (&acc)[COLUMNS / 2], const Work& work, Cursor<STAGES>& slot, const u8* memory,
                                         u32 shared, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) acc[i] = 0;
  u32 a[2][2][4], last = 0;  // fragments of two steps, twice; the barrier of the slot whose last step is not yet over
  for (int box = 0; box < work.count; ++box, slot.advance(1)) {
    wait_phase(shared + BARRIERS + 8 * (FULL + slot.slot), slot.phase);
    const u8* own = memory + slot.slot * SLOT_BYTES + X_BYTES + warp * TILE_BYTES + lane * 16;
    // K-major, 128-byte swizzle: 8 tokens are 1024 bytes; a step of 32 k is 32 bytes further
    const u64 b = (u64)((shared + slot.slot * SLOT_BYTES) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
#pragma unroll
    for (int two = 0; two < 2; ++two) {
      wait_steps<1>(acc);  // the steps before the last two are over: their registers, and by the second their slot, are free
      if (two == 1 && last != 0 && lane == 0) arrive(last);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // not read earlier: the tensor core may still be reading the registers
        const uint4 piece = *(const uint4*)(own + (2 * two + i) / PIECE_STEPS * PIECE_BYTES);
        fragment(a[two][i], piece, (2 * two + i) % PIECE_STEPS);
      }
      begin_steps();
      wgmma(acc, a[two][0], b + 4 * two);
      wgmma(acc, a[two][1], b + 4 * two + 2);
      commit_steps();
    }
    last = shared + BARRIERS + 8 * (EMPTY + slot.slot);
  }
  wait_steps<0>(acc);
  if (last != 0 && lane == 0) arrive(last);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    int_matmul(const __grid_constant__ TensorMap x, const u8* weight, const float* scale, const float* weight_scale,
               const u16* bias, const int* zero, const int* row_sum, const u16* residual, u16* y, u64 m, u64 n, u64 boxes, u64 split, u64 pitch) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 shared = shared_address(memory);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int tiles = ((int)n + 15) / 16, rank = blockIdx.x % (u32)split, first = rank * (int)boxes / (int)split;
  const Work work{(tiles + (int)pitch - 1) / (int)pitch, (int)pitch, ((int)m + COLUMNS - 1) / COLUMNS, tiles, (int)boxes, first,
                  (rank + 1) * (int)boxes / (int)split - first, (int)(blockIdx.x / (u32)split), (int)(gridDim.x / (u32)split)};
  let_next_begin();
  for (int i = warp; i < 2 * STAGES; i += THREADS / 32) {
    if (lane == 0) init_barrier(shared + BARRIERS + 8 * i, i < EMPTY ? 32 * COPY_WARPS + 1 : MATH_WARPS);
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();

  if (warp >= MATH_WARPS) {
    if (GIVE) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
    if (warp > MATH_WARPS) {
      copy_weight(work, weight, shared, warp - MATH_WARPS - 1, lane);
    } else if (lane == 0) {
      wait_for_last();  // weights never depend on the kernel before this one, x does
      copy_x(work, x, shared);
    }
    __syncwarp();
    if (split > 1) meet_cluster(), meet_cluster();
  } else {
    if (GIVE) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MATH_REGISTERS));
    wait_for_last();  // the tokens' scales
    const Output output{y, scale, weight_scale, bias, zero, row_sum, residual, (int)m, (int)n};
    Cursor<STAGES> slot{0};
    for (int at = work.begin; at < work.total(); at += work.stride) {
      int acc[COLUMNS / 2], unit, token;
      multiply(acc, work, slot, memory, shared, warp, lane);
      work.locate(at, unit, token);
      if (split > 1) {  // then there is but one tile, and the ring is free once every group is here
        asm volatile("bar.sync 1, %0;" ::"n"(32 * MATH_WARPS) : "memory");
        int4* sums = (int4*)memory + (warp >> 2) * (COLUMNS / 8) * 128 + (thread & 127);
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i += 4) sums[i * 32] = make_int4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
        meet_cluster();
        add_partial_sums(output, work, shared, rank, (int)split, unit, token, thread);
        meet_cluster();  // others may still be reading
      } else {
        if (warp >= work.pitch) continue;
        const int row = (unit * work.pitch + warp) * 16 + 2 * (lane >> 2);
        const float2 scales = output.scales_of(row);
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i += 4) {
          const int column = token + 2 * i + 2 * (lane & 3);
          output.store(column, row, acc[i], acc[i + 2], scales);
          output.store(column + 1, row, acc[i + 1], acc[i + 3], scales);
        }
      }
    }
  }
}
