// Softmax in parts: what each warp of a block has summed becomes the block's sum, and the sums of the parts of a cache one
// row of the answer; always in the same order, so the same bits on every run.
//
// A part is VALUE_DIM sums of e^(score - maximum) value, the maximum (of scores times log2(e)) and the denominator. Parts
// meet in a cluster's shared memory, or, where there are more than a cluster holds, in kv_merge.
//
// Host macros: BF16, VALUE_DIM, WARPS (of a block).

constexpr int ROWS = 8, MOST_TOGETHER = 8;  // rows of queries in a block; parts in a cluster
constexpr int PARTIAL = VALUE_DIM + 2;
constexpr float NOTHING = -1e30f, HIDDEN = -2e30f;  // a maximum over no position; the score of one that is not seen

__device__ __forceinline__ float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 8 x 8 16-bit numbers over the lanes, transposed.
__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Sum, maximum and denominator of one column: of COUNT places, in their order.
struct Merged {
  float sum = 0.0f, most = NOTHING, total = 0.0f;

  template <int COUNT, class Place>
  __device__ __forceinline__ void add(int count, int column, Place place) {
    float sums[COUNT], mosts[COUNT], totals[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {  // all on their way before the first is needed
      const float* there = place(min(i, count - 1));
      sums[i] = there[column], mosts[i] = there[VALUE_DIM], totals[i] = there[VALUE_DIM + 1];
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) most = fmaxf(most, mosts[i]);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float share = i < count ? exp2(mosts[i] - most) : 0.0f;
      sum += share * sums[i], total += share * totals[i];
    }
  }

  __device__ __forceinline__ u16 mean() const { return narrow(total > 0.0f ? sum / total : 0.0f); }
};

// Address of the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ const float* in_block(const float* mine, int block) {
#if __CUDA_ARCH__ >= 900
  u64 there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(block));
  return (const float*)there;
#else
  return mine;
#endif
}

// No block's memory goes before all have read it; nothing was written that others are to see.
__device__ __forceinline__ void leave_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Merges what all warps left in `sums` ([warp][ROWS][PARTIAL], and room for one more) and writes row `to(row)` of the answer
// (VALUE_DIM each) or of `partial` ([row][splits][PARTIAL]), which is null where parts meet in a cluster.
template <class To>
__device__ __forceinline__ void merge_block(float* sums, u16* out, float* partial, int rows, int split, int splits, To to) {
  __syncthreads();
  const bool together = splits > 1 && !partial;
  float* block_sums = sums + WARPS * ROWS * PARTIAL;
  for (int i = threadIdx.x; i < rows * VALUE_DIM; i += 32 * WARPS) {
    const int row = i / VALUE_DIM, column = i % VALUE_DIM;
    Merged merged;
    merged.add<WARPS>(WARPS, column, [&](int from) { return sums + (from * ROWS + row) * PARTIAL; });
    if (splits == 1) {
      out[to(row) * VALUE_DIM + column] = merged.mean();
    } else {
      float* mine = together ? block_sums + row * PARTIAL : partial + (to(row) * splits + split) * PARTIAL;
      mine[column] = merged.sum;
      if (column == 0) mine[VALUE_DIM] = merged.most, mine[VALUE_DIM + 1] = merged.total;
    }
  }
  if (together) {
    meet_cluster();
    for (int i = threadIdx.x + split * 32 * WARPS; i < rows * VALUE_DIM; i += splits * 32 * WARPS) {
      const int row = i / VALUE_DIM, column = i % VALUE_DIM;
      Merged merged;
      merged.add<MOST_TOGETHER>(splits, column, [&](int block) { return in_block(block_sums + row * PARTIAL, block); });
      out[to(row) * VALUE_DIM + column] = merged.mean();
    }
    leave_cluster();
  }
}

// The parts of one row of queries, in order.
extern "C" __global__ void __launch_bounds__(128) kv_merge(const float* partial, u16* out, u64 splits) {
  let_next_begin();
  wait_for_last();
  const float* from = partial + (u64)blockIdx.x * splits * PARTIAL;
  float most = NOTHING;
#pragma unroll 8
  for (int i = 0; i < (int)splits; ++i) most = fmaxf(most, from[i * PARTIAL + VALUE_DIM]);
  for (int column = threadIdx.x; column < VALUE_DIM; column += 128) {
    float total = 0.0f, sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < (int)splits; ++i) {
      const float share = exp2(from[i * PARTIAL + VALUE_DIM] - most);
      sum += share * from[i * PARTIAL + column], total += share * from[i * PARTIAL + VALUE_DIM + 1];
    }
    out[(u64)blockIdx.x * VALUE_DIM + column] = narrow(total > 0.0f ? sum / total : 0.0f);
  }
}
