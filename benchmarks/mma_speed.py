"""Time of the mma kernel, forced where the planner prefers another, beside dense matmul and dequantize-then-matmul.

    python benchmarks/mma_speed.py --output benchmarks/results/mma_speed_h100.csv

fp16, group 64, any table; weights rotate through copies beyond three times the L2 cache; CUDA graphs replayed in turns;
medians. ``peak_share`` is 2 M N K / time over what a loop of nothing but ``mma.sync`` on random operands reaches on the
same GPU in the same run: that share, not the ratio to a library with faster instructions (Hopper's ``wgmma``), is what
GPUs without those can expect.
"""

from __future__ import annotations

import argparse
import csv
import sys
from functools import partial

import torch
import torch.nn.functional as F

from flute.bench.machine import describe
from flute.bench.timing import compare, copies_beyond_l2, microseconds, rotating_weights
from flute.kernels import choice, cuda, jit, mma, ops, plan
from flute.spec import QuantSpec

SHAPES = [(4096, 4096), (28672, 4096), (4096, 14336)]
TOKENS = [48, 64, 128, 256, 512, 1024, 4096]
HEAD = "n,k,bits,m,rows,tokens,split,dense_us,dequantize_us,decode_us,mma_us,peak_share"
_LOOPS, _CHAINS, _WARPS = 1 << 12, 16, 8
_PEAK = """
extern "C" __global__ void __launch_bounds__(256) peak(const unsigned* from, float* to) {
  unsigned a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = from[threadIdx.x + 256 * i];
  for (int i = 0; i < 2; ++i) b[i] = from[threadIdx.x + 256 * (4 + i)];
  float d[CHAINS][4] = {};
#pragma unroll 1
  for (int loop = 0; loop < LOOPS; ++loop) {
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0] ^ i), "r"(b[1]));
    }
  }
  float sum = 0;
  for (int i = 0; i < CHAINS; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  to[blockIdx.x * 256 + threadIdx.x] = sum;
}
"""


def peak() -> float:
    """FLOP/s of mma.sync.m16n8k16 with float32 sums on random operands, all SMs busy."""
    core, _ = jit._import_core()
    text = f"#define CHAINS {_CHAINS}\n#define LOOPS {_LOOPS}\n{_PEAK}"
    kernel = core.ObjectCode.from_cubin(jit.compile_cubin(text, cuda.gpu(0).arch)).get_kernel("peak")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    operands = torch.randn(2 * 256 * 6, device="cuda").half()
    sums = torch.empty(sms * 256, device="cuda")
    config = core.LaunchConfig(grid=sms, block=32 * _WARPS)

    def run() -> None:
        cuda._launch(operands.get_device(), config, kernel, operands.data_ptr(), sums.data_ptr())

    return 2 * 2048 * _CHAINS * _LOOPS * _WARPS * sms / (1e-6 * microseconds([run] * 4))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    head = f"{describe()}; float16, group 64, mma.sync peak {peak() / 1e12:.0f} TFLOP/s"
    with open(arguments.output, "w", newline="") as file:
        writer = csv.writer(file)
        rows = [(n, k, bits, m) for n, k in SHAPES for bits in arguments.bits for m in TOKENS]
        results = [(*row, *measure(*row)) for row in rows]
        best = peak()  # again, now that the GPU is as warm as it was for the others
        head += f", after the run {best / 1e12:.0f}"
        print(head)
        file.write(f"# {head}\n# python {' '.join(sys.argv)}\n")
        file.write(HEAD + "\n")
        for n, k, bits, m, tiling, times in results:
            share = 2 * m * n * k / (1e-6 * times[-1]) / best
            shown = ["" if time is None else f"{time:.2f}" for time in times]
            writer.writerow([n, k, bits, m, tiling.rows, tiling.tokens, tiling.split, *shown, f"{share:.2f}"])


def measure(n: int, k: int, bits: int, m: int) -> tuple[mma.Tiling, list[float | None]]:
    """Microseconds: dense matmul, dequantize and matmul, the decode kernel up to 64 tokens, the mma kernel."""
    x = torch.randn(m, k, device="cuda").half()
    spec = QuantSpec(bits, 64, "custom")
    dense = [torch.randn(n, k, device="cuda").half() for _ in range(copies_beyond_l2(2 * n * k))]
    copies, table = rotating_weights(n, k, spec, torch.float16)
    gpu = cuda.gpu(0)
    tiling = min(mma.candidates(gpu, m, n, k, bits, 64), key=lambda one: one.cycles)

    def forced(launch: mma.Tiling | plan.Plan) -> list[partial]:
        return [partial(cuda.lut_linear, x, *copy, table, None, n, bits, 64, forced=launch) for copy in copies]

    contestants = [
        [partial(F.linear, x, weight) for weight in dense],
        [partial(ops._dense_path, x, *copy, table, None, n, bits, 64) for copy in copies],
        forced(tiling),
    ]
    decode = plan.make(gpu, m, n, k, bits, 64) if m <= choice.DECODE_TOKENS else None
    if decode is not None:
        contestants.append(forced(decode))
    dense_us, dequantize_us, ours, *rest = compare(*contestants, replays=20 if m <= 256 else 6)
    print(f"{n}x{k} {bits}bit M={m}: {dense_us:.1f} {dequantize_us:.1f} mma {ours:.1f} {rest}", flush=True)
    return tiling, [dense_us, dequantize_us, rest[0] if rest else None, ours]


if __name__ == "__main__":
    main()
