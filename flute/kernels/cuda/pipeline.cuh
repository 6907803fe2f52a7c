// What kernels with rings of slots in shared memory share: asynchronous copies, barriers, a ring's cursor, the order of
// tiles; and the tensor-core step of 16-bit floats with its fragments. types.cuh comes first.

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

// The same, each matrix transposed: lane l names 16 bytes of row l % 8.
__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}

__device__ __forceinline__ u32 narrow_pair(float low, float high) {
  u32 result;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// Launches that overlap: the next one may begin, up to its own wait; and all that the launches before wrote is there.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// All threads of a cluster; what its blocks wrote before is there behind it.
__device__ __forceinline__ void meet_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
