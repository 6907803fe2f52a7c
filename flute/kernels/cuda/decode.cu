// y (M, N) = x (M, K) . W^T (+ bias) for few tokens: a race against memory, so everything serves the stream of codes.
//
// K is cut into `split` slices, one per block of a cluster (sm_90 and up) or of the grid (sm_80, sm_86, sm_89), and a
// slice again among `ways` warps of a block (sm_90 and up). A block keeps its slice of x in shared memory for the whole
// kernel while its warps stream row tiles: every warp owns a private ring of STAGES slots in shared memory, filled by
// its own asynchronous copies, so no barrier stands in the main loop.
//
//     slot = ROW_TILES x [ codes of one chunk, CHUNK_BYTES | scales of the chunk's groups, 128 bytes ]
//
// Units of ROW_TILES tiles go round robin over clusters first, then over the rows of warps, so that every SM streams
// the same number of bytes. Weights are the A operand of mma.m16n8k16 (16 rows of W), tokens the columns: TOKEN_TILES x
// 8 of them. A group's products are summed in float32 by the tensor core and scaled once per GROUP_BLOCK (32, 64 or
// 128) positions, which costs less than scaling weights and rounds less.
//
// The `split * ways` warps that share a unit are its participants. Each owns 32 / participants lanes of the unit's
// fragments; all give their partial sums to the owners, and an owner adds them in the order of participants, never of
// arrival: results are the same bits on every run. Within one block the warps of a row meet at a named barrier. Across
// a cluster nobody waits for a whole block: st.async counts bytes on a barrier of the receiving warp, and two buffers
// suffice, since a warp sends round j only after it has finished round j - 1, for which it needed everybody's sums of
// j - 1, which they sent after finishing round j - 2, the last user of this buffer. On older GPUs (ways = 1) slices go
// to a float32 workspace that `lut_reduce` adds up.
//
// More tokens than TOKEN_TILES x 8 (or than x has room for) are taken by rows of the grid, `pass` tokens each, side by
// side: their blocks stream the same weights at the same time, out of the L2 cache.
//
// A kernel among others finds its code in no cache, and a loop of 3 KB that runs a few times is fetched while everybody
// waits. So where registers allow the main loop is rehearsed on the table before x is there, and its sums are forgotten.
// What runs once is kept short: sizes that are powers of two come as logarithms, loops are not unrolled.
//
// A decoder block's small steps can be done here, too (flute/kernels/fused.py): an RMSNorm of x on its way into shared
// memory (NORM, see stage.cuh), silu(gate) * up of the two halves of W's rows (GATED: a unit is a tile of each, ROW_TILES is
// 2), and adding to a residual.
//
// Host macros: BITS, BF16, GROUP_BLOCK, TOKEN_TILES, ROW_TILES, STAGES, MAX_THREADS; NORM and GATED, or neither where
// nothing is fused.

#ifdef NORM
constexpr bool FUSED = true;
#else
#define NORM 0
constexpr bool FUSED = false;
#endif

#if __CUDA_ARCH__ == 900
constexpr bool HOPPER = true;
#else
constexpr bool HOPPER = false;
#endif

constexpr int FRAGMENTS = ROW_TILES * TOKEN_TILES;
constexpr bool REHEARSES = HOPPER && ROW_TILES == 2 && TOKEN_TILES == 1 && GROUP_BLOCK > 32;
constexpr int STORED = GATED ? TOKEN_TILES : FRAGMENTS;  // fragments of a unit that are written

static_assert(!GATED || ROW_TILES == 2, "a tile of gates and a tile of what they open");

struct Problem {
  const u16* bias;      // (n) or null
  const u16* residual;  // as y, or null
  u16* y;               // (m, n), or (m, n / 2) if GATED
  float* partial;       // (split, m, n), only without clusters
  int first, m, n;      // first token and tokens of this pass; n: of y
  u64 slice;            // elements of one slice of partial
};

__device__ __forceinline__ u16 rounded(const Problem& p, int row, float value) {
  return narrow(p.bias ? value + wide(p.bias[row]) : value);
}

// One element of y; other: of what a gate opens.
__device__ __forceinline__ void store(const Problem& p, int row, int token, float value, float other) {
  if (row >= p.n || token >= p.m) return;
  const u64 at = (u64)(p.first + token) * p.n + row;
  u16 y = rounded(p, row, value);
  if (GATED) y = silu_times(y, rounded(p, row + p.n, other));
  if (FUSED && p.residual) y = narrow(wide(p.residual[at]) + wide(y));
  p.y[at] = y;
}

// Element e of a lane's fragment: row 2 g + e / 2, token 2 t + e % 2.
__device__ __forceinline__ int fragment_row(int unit, int fragment, int lane, int e) {
  return (GATED ? unit : unit * ROW_TILES + fragment / TOKEN_TILES) * TILE_ROWS + 2 * (lane >> 2) + (e >> 1);
}

__device__ __forceinline__ int fragment_token(int fragment, int lane, int e) {
  return fragment % TOKEN_TILES * 8 + 2 * (lane & 3) + (e & 1);
}

#if __CUDA_ARCH__ >= 900

// Partial sums between the participants of a unit.
//     sums[buffer][owner warp][source participant][fragment][lane of the owner's share], float4
//     arrived[owner warp][buffer], one barrier each, used across a cluster
struct Exchange {
  u32 sums, arrived;  // shared-memory addresses in every block
  int me, ways_log, share_log, row, warp, warps, lane;  // a participant's share: 2^share_log lanes

  __device__ __forceinline__ u32 sums_of(int buffer, int owner_warp) const {
    return sums + (buffer * warps + owner_warp) * FRAGMENTS * 512;
  }

  // Lanes give their fragments to whoever owns them: participant o owns lanes o * 32 / participants and up.
  __device__ __forceinline__ int owner() const { return lane >> share_log; }
  __device__ __forceinline__ int owner_warp() const { return (row << ways_log) + (owner() & (1 << ways_log) - 1); }
  __device__ __forceinline__ u32 place(int round) const {
    return sums_of(round & 1, owner_warp()) + ((me * FRAGMENTS << share_log) + (lane & (1 << share_log) - 1)) * 16;
  }

  // Among the warps of one block: store, and meet the others of this row at a barrier of theirs. That no two rounds use
  // one buffer lets a fast warp store the next round while a slow one still reads this one.
  __device__ __forceinline__ void meet(const float (&acc)[ROW_TILES][TOKEN_TILES][4], int round) const {
    const u32 to = place(round), step = 16 << share_log;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      const float (&v)[4] = acc[f / TOKEN_TILES][f % TOKEN_TILES];
      asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to + f * step), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                   "f"(v[3])
                   : "memory");
    }
    asm volatile("bar.sync %0, %1;" ::"r"(row + 1), "r"(32 << ways_log) : "memory");
  }

  // Across a cluster: send, and go on at once; the owner's barrier counts the bytes.
  __device__ __forceinline__ void send(const float (&acc)[ROW_TILES][TOKEN_TILES][4], int round) const {
    u32 to = place(round), step = 16 << share_log, barrier = arrived + (owner_warp() * 2 + (round & 1)) * 8;
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(to) : "r"(owner() >> ways_log));
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(barrier) : "r"(owner() >> ways_log));
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      const float (&v)[4] = acc[f / TOKEN_TILES][f % TOKEN_TILES];
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                       to + f * step),
                   "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
                   : "memory");
    }
  }

  // Wait until everybody's sums of a round have come to this warp.
  __device__ __forceinline__ void receive(int round) const {
    u32 barrier = arrived + (warp * 2 + (round & 1)) * 8, parity = round >> 1 & 1, done;
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(FRAGMENTS * 512)
                   : "memory");
    }
    __syncwarp();
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
          "}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    } while (!done);
  }

  // Place i of this warp's share of a round, in the order of participants.
  __device__ __forceinline__ float4 total(int i, int round) const {
    u32 at = sums_of(round & 1, warp) + i * 16;
    float4 sum = {};
    for (int source = 0; source < 32 >> share_log; ++source, at += FRAGMENTS * 16 << share_log) {
      float4 v;
      asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "r"(at)
                   : "memory");
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
  }

  // Add this warp's share of a round and write y.
  __device__ __forceinline__ void add(const Problem& p, int unit, int round) const {
    for (int i = lane; i < STORED << share_log; i += 32) {
      const int fragment = i >> share_log, from = (me << share_log) + (i & (1 << share_log) - 1);  // whose sums these are
      const float4 sum = total(i, round), other = GATED ? total(i + (STORED << share_log), round) : sum;
      const float values[4] = {sum.x, sum.y, sum.z, sum.w}, others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
      for (int e = 0; e < 4; ++e)
        store(p, fragment_row(unit, fragment, from, e), fragment_token(fragment, from, e), values[e], others[e]);
    }
    __syncwarp();  // every lane has read this buffer before the next send tells the others so
  }
};

#endif

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    lut_decode(const u8* weight, const u16* scales, const u16* table, u64 vectors, const u16* x, const u16* bias,
               u16* y, float* partial, u64 m, u64 n, u64 k, u64 groups, u64 magic, u64 split_log, u64 ways_log, u64 pitch,
               u64 pass, const u16* residual, const u16* gain, float eps) {
  extern __shared__ __align__(1024) u8 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int chunks = ((int)k + CHUNK_K - 1) / CHUNK_K, tiles = ((int)n + TILE_ROWS - 1) / TILE_ROWS;
  const int units = (tiles + ROW_TILES - 1) / ROW_TILES, out = GATED ? (int)n / 2 : (int)n;
  const u64 token = blockIdx.y * pass;
  x += token * k;
  const Problem p{bias, residual, y, partial, (int)token, (int)min(pass, m - token), out, m * n};
  const int by = (int)(split_log + ways_log), split = 1 << split_log;
  [[maybe_unused]] const int participants = 1 << by;
  const int rank = blockIdx.x & split - 1, cluster = blockIdx.x >> split_log, clusters = gridDim.x >> split_log;
  const int me = (rank << ways_log) + (warp & (1 << ways_log) - 1);
  const int row = warp >> ways_log, rows = warps >> ways_log, stride = rows * clusters;
  const int block_first = rank * chunks >> split_log, block_count = ((rank + 1) * chunks >> split_log) - block_first;
  const int first = me * chunks >> by, count = ((me + 1) * chunks >> by) - first;

  // shared memory: table | rings | [sums, barriers] | x
  const u8* slots = shared + TABLE_BYTES + warp * STAGES * SLOT_BYTES;
  const u32 to = shared_address(slots) + lane * 16;  // where this lane's pieces go
  const u8* lane_scales = slots + CHUNK_BYTES + (lane >> 2) * 4;
  u8* shared_x = shared + TABLE_BYTES + warps * STAGES * SLOT_BYTES;
  int unit = row * clusters + cluster;
  Stream stream{weight, scales, tiles, chunks, (int)groups, units, stride, first, count, lane, (u32)magic};
  stream.unit = unit;
  stream.enter();
#if __CUDA_ARCH__ >= 900
  const Exchange exchange{shared_address(shared_x),
                          shared_address(shared_x) + 2 * warps * FRAGMENTS * 512,
                          me,
                          (int)ways_log,
                          5 - by,
                          row,
                          warp,
                          warps,
                          lane};
  if (participants > 1) shared_x += 2 * warps * FRAGMENTS * 512 + 256;
  if (split > 1) {
    if (lane < 2) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(exchange.arrived + (warp * 2 + lane) * 8) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  }
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif

  // Weights and table never depend on the kernel before this one: all that needs neither it nor x comes before the wait.
  const u32 mine = table_value(table, vectors != 0, threadIdx.x);
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) stream.fetch(to + stage * SLOT_BYTES);
#if NORM
  NormedStage staged{shared_x, x, gain, eps, p.m, (int)k, block_first * CHUNK_K, block_count * CHUNK_K, (int)pitch, warp, warps, lane};
  staged.begin();
#endif
  fill_table(shared, table, vectors != 0, mine, threadIdx.x, blockDim.x);

  u32 x_lane[TOKEN_TILES];  // where this lane's rows of x begin
  int take, fill = (STAGES - 1) * SLOT_BYTES;  // slots read and refilled next
  const auto take_x = [&] {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#if NORM
    staged.ask(warp);
    staged.take();
    staged.norm();
#else
    stage_x(shared_x, x, p.m, (int)k, block_first * CHUNK_K, block_count * CHUNK_K, (int)pitch);
    commit_copies();
    wait_copies<0>();
#endif
#if __CUDA_ARCH__ >= 900
    if (split > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");  // everybody's barriers are ready
#endif
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {  // a token beyond m reads the last one's row; its column of y is never stored
      x_lane[i] = shared_address(shared_x) + min(i * 8 + (lane & 7), p.m - 1) * (int)pitch + (lane >> 3) * 16 +
                  (first - block_first) * CHUNK_K * 2;
    }
    take = 0;
  };
  if (REHEARSES) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) x_lane[i] = shared_address(shared) + (lane >> 3) * 16;
    take = (int)(shared - slots);
  } else {
    take_x();
  }

  int round = 0;
  for (bool ready = !REHEARSES; unit < units || !ready; unit += stride, ++round) {
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    for (int chunk = ready ? 0 : -1; chunk < (!REHEARSES || unit < units ? count : 0); ++chunk) {
      if (ready) {
        wait_copies<STAGES - 2>();
        __syncwarp();  // scales were copied by other lanes; and all lanes are done with the slot that is refilled now
        stream.fetch(to + fill);
      }
      multiply_chunk(acc, slots + take, lane_scales + take, x_lane, max(chunk, 0) * CHUNK_K * 2, shared, lane);
      if (ready) {
        fill = take;
        take = take + SLOT_BYTES == STAGES * SLOT_BYTES ? 0 : take + SLOT_BYTES;
      } else {
        take_x();
        ready = true;
#pragma unroll
        for (int i = 0; i < FRAGMENTS * 4; ++i) acc[i / 4 / TOKEN_TILES][i / 4 % TOKEN_TILES][i % 4] = 0;
      }
    }
    if (REHEARSES && unit >= units) break;
#if __CUDA_ARCH__ >= 900
    if (participants > 1) {
      if (split == 1) {
        exchange.meet(acc, round);
        exchange.add(p, unit, round);
      } else {
        if (round > 0) exchange.receive(round - 1), exchange.add(p, unit - stride, round - 1);
        exchange.send(acc, round);
      }
      continue;
    }
#endif
#pragma unroll
    for (int f = 0; f < STORED; ++f) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int at = fragment_row(unit, f, lane, e), token = fragment_token(f, lane, e);
        float value = acc[f / TOKEN_TILES][f % TOKEN_TILES][e], other = acc[ROW_TILES - 1][f % TOKEN_TILES][e];
        if (p.partial == nullptr) store(p, at, token, value, other);
        else if (at < p.n && token < p.m) p.partial[rank * p.slice + (u64)(p.first + token) * p.n + at] = value;
      }
    }
  }
#if __CUDA_ARCH__ >= 900
  if (split > 1 && round > 0) exchange.receive(round - 1), exchange.add(p, unit - stride, round - 1);
#endif
}

// Adds the slices that blocks of an older GPU left in the workspace, in the order of their rank.
extern "C" __global__ void __launch_bounds__(256)
    lut_reduce(const float* partial, const u16* bias, u16* y, u64 m, u64 n, u64 split) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= m * n) return;
  float total = 0;
  for (u64 slice = 0; slice < split; ++slice) total += partial[slice * m * n + i];
  y[i] = narrow(bias ? total + wide(bias[i % n]) : total);
}
