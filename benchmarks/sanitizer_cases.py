"""Small problems through every path of the CUDA kernels, to be run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitizer_cases.py
    compute-sanitizer --tool racecheck python benchmarks/sanitizer_cases.py --quick

cuda-bindings probes the driver for functions it may lack, which memcheck reports: add --report-api-errors no.
Without torch's caching allocator every tensor is an allocation of its own: a read past its end is seen. Plans are
forced, one of every kind: alone, sharing K among warps, among blocks of a cluster, both, and several passes. At 130
tokens only the matmul and mma kernels have plans. ``--grouped`` runs stacks of experts instead, empty ones among them,
with more tiles than blocks. ``--cut`` runs tiles cut along K only, ``--attention`` attention alone, ``--fused``
only the decode kernel with a norm, gates and a residual around the product, whose rehearsed loop goes several rounds in
some of its plans.

Slots of the rings of the matmul and mma kernels are freed by one lane's arrival behind ``__syncwarp``, an order that
racecheck does not follow: it calls every later copy into the slot a hazard. ``--all-arrive`` compiles the same kernels
with an arrival of every lane. Hazards that are then gone were that blind spot, hazards that stay are races.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

from flute.bench.correctness import Case, Problem, relative
from flute.hadamard import transform
from flute.kernels import choice, cuda, fused_cuda, jit, mma, plan, stacked, tiles
from flute.kernels.decode_attention import decode_attention
from flute.kernels.hadamard import hadamard
from flute.kernels.layout import TILE_ROWS, pack_scales, pack_weight
from flute.kernels.tokens import gate, rms_norm
from flute.spec import QuantSpec

SHAPES = [(40, 640), (333, 777), (1, 64), (100, 1100)]
TOKENS = [1, 9, 40, 130]
# N, K and tokens of products with more around them: of the second K the norm asks for a part ahead only, and its last
# chunk is not full; the third N has units for several rounds
FUSED = [(96, 640, 4), (96, 4360, 3), (16480, 512, 1)]
AROUND = [(True, False, False), (False, False, True), (True, True, False), (False, True, True)]  # norm, gates, residual
EPS = 1e-5


def kinds(m: int, n: int, k: int, bits: int, group: int, only_mma: bool) -> list[choice.Launch]:
    """The best plan of every kind, of all kernels."""
    gpu, best = cuda.gpu(0), {}
    for one in sorted(mma.candidates(gpu, m, n, k, bits, plan.group_block(group, k)), key=lambda one: one.cycles):
        best.setdefault(("mma", one.split > 1, one.row_tiles), one)
    if only_mma:
        return list(best.values())
    for one in plan.candidates(gpu, m, n, k, bits, group):
        best.setdefault((one.ways > 1, one.split > 1, one.row_tiles, one.per_sm), one)
    if gpu.has_wgmma:
        for tile in sorted(
            tiles.candidates(gpu, m, n, k, bits, plan.group_block(group, k)), key=lambda tile: tile.cycles
        ):
            best.setdefault(("tile", tile.ways > 1, tile.split > 1, tile.per_sm), tile)
    return list(best.values())


def rotations() -> int:
    """The Hadamard kernel: several transforms a chunk, one, and clusters of two and four. Returns the launches."""
    cases = [(4, 9), (24, 11), (64, 7), (96, 7), (512, 5), (1024, 3), (4096, 3), (5120, 2), (14336, 2), (14336, 40)]
    cases += [(24576, 2), (28672, 2), (28672, 40)]
    for size, m in cases:
        x = torch.randint(-3, 4, (m, size), device="cuda").half()
        assert torch.equal(hadamard(x, size), transform(x, size)), (size, m)
    return len(cases)


def grouped() -> int:
    """A stack of five weights, with every width of tile and K whole and shared; returns the launches."""
    n, k, experts, launches = 1100, 640, 5, 0
    for bits, group in ((4, 64), (3, 32), (2, -1)):
        spec = QuantSpec(bits, group, "custom")
        parts = [Problem(Case(n, k, spec, torch.float16, seed=seed)) for seed in range(experts)]
        given = [torch.stack([part.given[i] for part in parts]) for i in (0, 1)]
        for ends in ([0, 3, 3, 8, 9], [70, 71, 71, 130, 130]):
            x, table = torch.randn(ends[-1], k, device="cuda").half(), parts[0].table
            offsets, best = torch.tensor(ends, dtype=torch.int32, device="cuda"), {}
            found = tiles.candidates_grouped(cuda.gpu(0), ends[-1], experts, n, k, bits, spec.group(k))
            for one in sorted(found, key=lambda one: one.cycles):
                best.setdefault((one.tokens, one.ways > 1), one)
            for forced in best.values():
                y = stacked.lut_grouped_linear(x, *given, table, None, offsets, n, bits, group, forced=forced)
                assert y is not None
                for part, begin, end in zip(parts, [0, *ends], ends, strict=False):
                    part.table = table
                    assert begin == end or relative(y[begin:end], part.exact(x[begin:end])) < 1e-3, forced
                launches += 1
    return launches


def cut() -> int:
    """Tiles cut along K: two and three blocks meet in one; returns the launches."""
    if not cuda.gpu(0).has_wgmma:
        return 0
    n, k, found = 13001, 1096, []
    for bits, group, m in ((4, 64, 128), (3, 32, 190), (2, -1, 250)):
        problem = Problem(Case(n, k, QuantSpec(bits, group, "custom"), torch.float16))
        x, block = torch.randn(m, k, device="cuda").half(), plan.group_block(problem.spec.group(k), k)
        made = [one for one in tiles.candidates(cuda.gpu(0), m, n, k, bits, block) if one.cut]
        for forced in made:
            y = cuda.lut_linear(x, *problem.given, problem.table, None, n, bits, group, forced=forced)
            assert y is not None and relative(y, problem.exact(x)) < 1e-3, forced
        assert made
        found += made
    return len(found)


def fused_kinds(m: int, n: int, k: int, spec: QuantSpec, norm: bool, gated: bool) -> list[plan.Plan]:
    """The best plan of every kind that `fused_cuda` may ask for, with few rounds and with more than two."""
    best: dict[tuple[bool, ...], plan.Plan] = {}
    for one in plan.candidates(cuda.gpu(0), m, n, k, spec.bits, spec.group(k)):
        units = -(-n // (TILE_ROWS * one.row_tiles))
        if one.row_tiles == 2 or (norm and not gated):
            kind = (one.ways > 1, one.split > 1, one.row_tiles > 1, one.per_sm > 1)
            best.setdefault((*kind, units > 2 * one.clusters * one.rows), one)
    return list(best.values())


def fused() -> int:
    """The decode kernel with what a decoder block does around a product; returns the launches."""
    if not cuda.gpu(0).has_clusters:
        return 0
    launches = 0
    for (rows, k, m), (bits, group) in product(FUSED, ((4, 64), (3, 32), (2, -1))):
        dtype, spec = torch.bfloat16 if group == 64 else torch.float16, QuantSpec(bits, group, "custom")
        for norm, gated, add in AROUND:
            n = rows if gated else rows - 9  # without gates the last tile may be a part of one
            problem = Problem(Case(n, k, spec, dtype))
            x, bias = (torch.randn(*size, device="cuda").to(dtype) / 8 for size in ((m, k), (n,)))
            gain = torch.rand(k, device="cuda").to(dtype) if norm else None
            residual = torch.randn(m, n // 2 if gated else n, device="cuda").to(dtype) if add else None
            right = problem.exact(x if gain is None else rms_norm(x, gain, EPS), bias).to(dtype)
            right = gate(right) if gated else right
            right = right if residual is None else residual + right
            for forced in fused_kinds(m, n, k, spec, norm, gated):
                macros = (("NORM", int(norm)), ("GATED", int(gated)))
                launch = cuda._prepare_decode((0, m, n, k, bits, spec.group(k), group == 64), forced, macros)
                y = fused_cuda.run(launch, x, *problem.given, problem.table, bias, gain, EPS, gated, residual)
                bound = 2e-3 if dtype == torch.float16 else 1.2e-2  # a few roundings, as in tests/test_fused.py
                assert relative(y, right.double()) < bound, (forced, norm, gated, add, relative(y, right.double()))
                launches += 1
    return launches


def attention() -> int:
    """Decode attention: alone, parts in a cluster, parts in memory; masks that hide whole steps, and all."""
    launches = 0
    for positions, tokens, dim in ((77, 3, 128), (77, 1, 40), (1101, 1, 64), (1101, 8, 192), (16777, 1, 64)):
        query = torch.randn(2, 6, tokens, dim, device="cuda").half()
        key, value = torch.randn(2, 2, 2, positions, dim, device="cuda").half()
        for share in (None, 0.9, 0.01, 0.0):
            mask = None if share is None else torch.rand(2, 1, tokens, positions, device="cuda") < share
            y = decode_attention(query, key, value, mask, 0.1)
            wanted = decode_attention(query.float(), key.float(), value.float(), mask, 0.1)
            assert (y - wanted).abs().max() < 0.01, (positions, tokens, dim, share)
            launches += 1
    return launches


def all_arrive() -> None:
    """From now on, kernels are compiled in which every lane of a reading warp frees a slot of a ring.

    Raises:
        RuntimeError: a kernel's text is not what this was written for.
    """
    made = jit.source
    changes = {
        "matmul.cu": [
            ("if (lane == 0) arrive(barriers + 8 * (EMPTY_CODES", "arrive(barriers + 8 * (EMPTY_CODES", 1),
            ("if ((thread & 31) == 0) arrive(barriers + 8 * (EMPTY_X", "arrive(barriers + 8 * (EMPTY_X", 1),
            ("last != 0 && lane == 0) arrive(last)", "last != 0) arrive(last)", 2),
            ("full_codes ? 32 * COPY_WARPS : 4 * ROWS", "full_codes ? 32 * COPY_WARPS : 128 * ROWS", 1),
        ],
        "mma.cu": [
            ("if (lane == 0) arrive(barriers + 8 * (EMPTY", "arrive(barriers + 8 * (EMPTY", 1),
            ("i < EMPTY ? THREADS : WARPS", "i < EMPTY ? THREADS : THREADS", 1),
        ],
    }

    def changed(file: str, macros: dict[str, int]) -> str:
        text = made(file, macros)
        for before, after, times in changes.get(file, ()):
            if text.count(before) != times:
                raise RuntimeError(f"{file} has {text.count(before)} times {before!r}, not {times}; adapt all_arrive")
            text = text.replace(before, after)
        return text

    jit.source = changed


def main() -> None:
    """Run all cases and check their answers too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape only: racecheck is slow")
    parser.add_argument("--grouped", action="store_true", help="stacks of experts only")
    parser.add_argument("--mma", action="store_true", help="the mma kernel alone")
    parser.add_argument("--cut", action="store_true", help="tiles cut along K only")
    parser.add_argument("--fused", action="store_true", help="the decode kernel with norm, gates and residual only")
    parser.add_argument("--attention", action="store_true", help="attention of decode steps only")
    parser.add_argument("--all-arrive", action="store_true", help="for racecheck: every lane frees slots")
    arguments = parser.parse_args()
    if arguments.all_arrive:
        all_arrive()
    only = [run for run in (grouped, cut, fused, attention) if getattr(arguments, run.__name__)]
    shapes = [] if only else SHAPES[:1] if arguments.quick else SHAPES
    launches = sum(run() for run in only or (rotations, cut, fused, attention))
    for n, k in shapes:
        for bits in (2, 3, 4):
            for group, vector in ((32, 1), (64, 1), (128, 2 if k % 2 == 0 else 1), (-1, 1)):
                dtype = torch.bfloat16 if group == 64 else torch.float16
                spec = QuantSpec(bits, group, "custom", vector)
                problem = Problem(Case(n, k, spec, dtype))
                given = (pack_weight(problem.weight, bits, k), pack_scales(problem.scales))
                assert torch.equal(problem.dequantized(), problem.dense)
                for m in TOKENS:
                    x = torch.randn(m, k, device="cuda").to(dtype)
                    exact = problem.exact(x)
                    size = (x.double().abs() @ problem.decoded(torch.float64).abs().T).norm()
                    for forced in kinds(m, n, k, bits, spec.group(k), arguments.mma):
                        y = cuda.lut_linear(x, *given, problem.table, None, n, bits, group, forced=forced)
                        assert y is not None and (y.double() - exact).norm() / size < 1e-3, (forced, relative(y, exact))
                        launches += 1
    torch.cuda.synchronize()
    print(f"{launches} launches, all answers right")


if __name__ == "__main__":
    main()
