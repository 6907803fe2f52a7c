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
// Host macros: BITS, BF16, GROUP_BLOCK, TOKEN_TILES, ROW_TILES, STAGES, MAX_THREADS.

constexpr int SCALE_SETS = CHUNK_K / GROUP_BLOCK;  // groups a chunk may touch, 8 words of scales each
constexpr int PART_BYTES = CHUNK_BYTES + 128;
constexpr int SLOT_BYTES = ROW_TILES * PART_BYTES;
constexpr int FRAGMENTS = ROW_TILES * TOKEN_TILES;

struct Problem {
  const u16* bias;  // (n) or null
  u16* y;           // (m, n)
  float* partial;   // (split, m, n), only without clusters
  int m, n;         // m: tokens of this pass
  u64 slice;        // elements of one slice of partial
};

__device__ __forceinline__ void store(const Problem& p, int row, int token, float value) {
  if (row < p.n && token < p.m) p.y[(u64)token * p.n + row] = narrow(p.bias ? value + wide(p.bias[row]) : value);
}

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
    const int tile = unit * ROW_TILES;
    const bool whole = tile + ROW_TILES <= tiles;  // the last unit may be one tile short: it reads its last tile twice
    code_step = whole ? chunks * CHUNK_BYTES : 0;
    scale_step = whole ? groups * TILE_ROWS : 0;
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

// x slice (m, width) -> shared memory, rows `pitch` bytes apart, zeros beyond k.
__device__ __forceinline__ void stage_x(u8* shared_x, const u16* x, int m, int k, int first_k, int width, int pitch) {
  if (k % 8 == 0) {
    int vectors = width / 8;
    for (int i = threadIdx.x; i < m * vectors; i += blockDim.x) {
      int token = i / vectors, at = (i - token * vectors) * 8;
      bool inside = first_k + at < k;
      copy_async_or_zero(shared_address(shared_x + token * pitch + at * 2),
                         x + (u64)token * k + (inside ? first_k + at : 0), inside);
    }
  } else {
    for (int i = threadIdx.x; i < m * width; i += blockDim.x) {
      int token = i / width, at = i - token * width;
      *(u16*)(shared_x + token * pitch + at * 2) = first_k + at < k ? x[(u64)token * k + first_k + at] : 0;
    }
  }
}

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

// Element e of a lane's fragment: row 2 g + e / 2, token 2 t + e % 2.
__device__ __forceinline__ int fragment_row(int unit, int fragment, int lane, int e) {
  return (unit * ROW_TILES + fragment / TOKEN_TILES) * TILE_ROWS + 2 * (lane >> 2) + (e >> 1);
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
  int participants, me, ways, row, warp, warps, lane;

  __device__ __forceinline__ u32 sums_of(int buffer, int owner_warp) const {
    return sums + (buffer * warps + owner_warp) * FRAGMENTS * 512;
  }

  // Lanes give their fragments to whoever owns them: participant o owns lanes o * 32 / participants and up.
  __device__ __forceinline__ int owner() const { return lane / (32 / participants); }
  __device__ __forceinline__ int owner_warp() const { return row * ways + owner() % ways; }
  __device__ __forceinline__ u32 place(int round) const {
    int share = 32 / participants;
    return sums_of(round & 1, owner_warp()) + (me * FRAGMENTS * share + lane % share) * 16;
  }

  // Among the warps of one block: store, and meet the others of this row at a barrier of theirs. That no two rounds use
  // one buffer lets a fast warp store the next round while a slow one still reads this one.
  __device__ __forceinline__ void meet(const float (&acc)[ROW_TILES][TOKEN_TILES][4], int round) const {
    u32 to = place(round), step = 32 / participants * 16;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      const float (&v)[4] = acc[f / TOKEN_TILES][f % TOKEN_TILES];
      asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to + f * step), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                   "f"(v[3])
                   : "memory");
    }
    asm volatile("bar.sync %0, %1;" ::"r"(row + 1), "r"(ways * 32) : "memory");
  }

  // Across a cluster: send, and go on at once; the owner's barrier counts the bytes.
  __device__ __forceinline__ void send(const float (&acc)[ROW_TILES][TOKEN_TILES][4], int round) const {
    u32 to = place(round), step = 32 / participants * 16, barrier = arrived + (owner_warp() * 2 + (round & 1)) * 8;
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(to) : "r"(owner() / ways));
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(barrier) : "r"(owner() / ways));
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

  // Add this warp's share of a round in the order of participants and write y.
  __device__ __forceinline__ void add(const Problem& p, int unit, int round) const {
    int share = 32 / participants;
    for (int i = lane; i < FRAGMENTS * share; i += 32) {
      int fragment = i / share, from = me * share + i % share;  // the fragment's lane whose sums these are
      u32 at = sums_of(round & 1, warp) + i * 16;
      float total[4] = {};
      for (int source = 0; source < participants; ++source, at += FRAGMENTS * share * 16) {
        float v[4];
        asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                     : "r"(at)
                     : "memory");
#pragma unroll
        for (int e = 0; e < 4; ++e) total[e] += v[e];
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
        store(p, fragment_row(unit, fragment, from, e), fragment_token(fragment, from, e), total[e]);
    }
    __syncwarp();  // every lane has read this buffer before the next send tells the others so
  }
};

#endif

extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    lut_decode(const u8* weight, const u16* scales, const u16* table, u64 vectors, const u16* x, const u16* bias,
               u16* y, float* partial, u64 m, u64 n, u64 k, u64 groups, u64 magic, u64 split, u64 ways, u64 pitch,
               u64 pass) {
  extern __shared__ __align__(1024) u8 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int chunks = ((int)k + CHUNK_K - 1) / CHUNK_K, tiles = ((int)n + TILE_ROWS - 1) / TILE_ROWS;
  const int units = (tiles + ROW_TILES - 1) / ROW_TILES;
  const u64 token = blockIdx.y * pass;
  x += token * k;
  const Problem p{bias,   y + token * n, partial == nullptr ? nullptr : partial + token * n, (int)min(pass, m - token),
                  (int)n, m * n};
  const int rank = blockIdx.x % (int)split, cluster = blockIdx.x / (int)split, clusters = gridDim.x / (int)split;
  const int participants = (int)(split * ways), me = rank * (int)ways + warp % (int)ways;
  const int row = warp / (int)ways, rows = warps / (int)ways, stride = rows * clusters;
  const int block_first = rank * chunks / (int)split, block_count = (rank + 1) * chunks / (int)split - block_first;
  const int first = me * chunks / participants, count = (me + 1) * chunks / participants - first;

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
                          participants,
                          me,
                          (int)ways,
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

  // Weights and table never depend on the kernel before this one: ask for them first, then wait for x.
  const u32 mine = table_value(table, vectors != 0, threadIdx.x);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) stream.fetch(to + stage * SLOT_BYTES);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  stage_x(shared_x, x, p.m, (int)k, block_first * CHUNK_K, block_count * CHUNK_K, (int)pitch);
  commit_copies();
  fill_table(shared, table, vectors != 0, mine, threadIdx.x, blockDim.x);  // while x is on its way
  wait_copies<0>();
#if __CUDA_ARCH__ >= 900
  if (split > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");  // everybody's barriers are ready
#endif
  __syncthreads();

  u32 x_lane[TOKEN_TILES];  // a token beyond m reads the last one's row; its column of y is never stored
#pragma unroll
  for (int i = 0; i < TOKEN_TILES; ++i) {
    x_lane[i] = shared_address(shared_x) + min(i * 8 + (lane & 7), p.m - 1) * (int)pitch + (lane >> 3) * 16 +
                (first - block_first) * CHUNK_K * 2;
  }

  int take = 0, fill = (STAGES - 1) * SLOT_BYTES;  // slots read and refilled next
  int round = 0;
  for (; unit < units; unit += stride, ++round) {
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    for (int chunk = 0; chunk < count; ++chunk) {
      wait_copies<STAGES - 2>();
      __syncwarp();  // scales were copied by other lanes; and all lanes are done with the slot that is refilled now
      stream.fetch(to + fill);
      multiply_chunk(acc, slots + take, lane_scales + take, x_lane, chunk * CHUNK_K * 2, shared, lane);
      fill = take;
      take = take + SLOT_BYTES == STAGES * SLOT_BYTES ? 0 : take + SLOT_BYTES;
    }
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
    for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int at = fragment_row(unit, f, lane, e), token = fragment_token(f, lane, e);
        float value = acc[f / TOKEN_TILES][f % TOKEN_TILES][e];
        if (p.partial == nullptr) store(p, at, token, value);
        else if (at < p.n && token < p.m) p.partial[rank * p.slice + (u64)token * p.n + at] = value;
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
