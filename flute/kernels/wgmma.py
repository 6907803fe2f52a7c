"""Text of Hopper's asynchronous tensor-core step, whose accumulator list is too long to write by hand.

``wgmma.mma_async.m64nNk16``: four warps multiply 64 rows of A (registers, the same fragments as ``mma.m16n8k16``, 16
rows a warp) by N columns of B (shared memory, named by a 64-bit descriptor) into N / 2 float32 registers a thread. It
runs on its own; ``wait_steps<P>`` returns when all but the last P committed groups are over, and names the accumulators
so that the compiler moves no use of them in front (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions").
"""


def device_header(tokens: int, bf16: bool) -> str:
    """CUDA C++ for N = ``tokens`` (a multiple of 8 up to 256): wgmma, begin_steps, commit_steps, wait_steps."""
    kind = "bf16.bf16" if bf16 else "f16.f16"
    return _text(tokens, f"k16.f32.{kind}", "float", "f", "1, 1, 1, 0")


def integer_header(tokens: int) -> str:
    """The same for steps of 32 k of int8 times int8, whose sums are int32; N = 8, 16, 24, or a multiple of 16."""
    return _text(tokens, "k32.s32.s8.s8", "int", "r", "1")


def _text(tokens: int, kind: str, number: str, register: str, flags: str) -> str:
    count = tokens // 2
    name = f"wgmma.mma_async.sync.aligned.m64n{tokens}{kind}"
    slots = ", ".join(f"%{i}" for i in range(count))
    fragment = ", ".join(f"%{count + i}" for i in range(4))
    accumulators = ", ".join(f'"+{register}"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void wgmma({number} (&d)[{count}], const unsigned (&a)[4], unsigned long long b) {{
  asm volatile("{name} {{{slots}}}, {{{fragment}}}, %{count + 4}, {flags};"
               : {accumulators}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
__device__ __forceinline__ void begin_steps() {{ asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }}
__device__ __forceinline__ void commit_steps() {{ asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }}
template <int PENDING>
__device__ __forceinline__ void wait_steps({number} (&d)[{count}]) {{
  asm volatile("wgmma.wait_group.sync.aligned %{count};" : {accumulators} : "n"(PENDING) : "memory");
}}
"""
