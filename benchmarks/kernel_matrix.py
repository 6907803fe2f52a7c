"""The operator's answers over shapes x bits x group sizes x dtypes x tokens, as one CSV.

    python benchmarks/kernel_matrix.py --output benchmarks/results/kernel_matrix_h100.csv [--quick] [--workers 12]

Every row of the CSV is one (shape, spec, dtype) with the worst error over all numbers of tokens, beside torch's own,
and the number of failed checks (decoding, integers and error bounds of flute/bench/correctness.py). Exit code 1 if any.

``--part 1/2`` takes every other case from the first on, ``2/2`` the others. A run that is stopped leaves its rows.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import time

import torch

from flute.bench.correctness import Case, Problem, check_decoding, check_errors, check_integers, specs
from flute.bench.machine import describe

TOKENS = [*range(1, 18), 32, 64, 65, 128, 1024]
GROUPS = (32, 64, 128, 256, -1)
SHAPES = {
    "Llama-3.2-1B": [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
    "Llama-3.2-3B": [(3072, 3072), (1024, 3072), (8192, 3072), (3072, 8192)],
    "Llama-3.1-8B": [(4096, 4096), (6144, 4096), (1024, 4096), (14336, 4096), (28672, 4096), (4096, 14336)],
    "Llama-3.1-70B": [(8192, 8192), (10240, 8192), (28672, 8192), (8192, 28672)],
    "Llama-3.1-70B tp": [
        (2560, 8192),
        (1280, 8192),
        (8192, 4096),
        (8192, 2048),
        (8192, 1024),
        (8192, 3584),
        (3584, 8192),
    ],
    "Gemma-2-9B": [(4096, 3584), (2048, 3584), (3584, 4096), (14336, 3584), (3584, 14336)],
    "Gemma-2-2B": [(2304, 2048), (9216, 2304), (2304, 9216)],
    "Qwen2.5-7B": [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)],
    "Qwen2.5-0.5B": [(896, 896), (128, 896), (4864, 896), (896, 4864)],
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "odd": [(333, 777), (1, 64), (1, 1), (17, 31), (100, 130), (2000, 1000), (63, 4104), (5001, 100)],
}


def cases(quick: bool) -> list[tuple[str, Case]]:
    """Every case; ``quick`` keeps one shape of each model."""
    return [
        (model, Case(n, k, spec, dtype))
        for model, shapes in SHAPES.items()
        for n, k in (shapes[:1] if quick else shapes)
        for bits in (2, 3, 4)
        for spec in specs(bits, GROUPS, vectors=k % 2 == 0)
        for dtype in (torch.float16, torch.bfloat16)
    ]


def part(text: str) -> slice:
    """``"1/2"`` -> every second case from the first on.

    Raises:
        ValueError: no such part.
    """
    which, _, count = text.partition("/")
    if not 1 <= int(which) <= int(count):
        raise ValueError(text)
    return slice(int(which) - 1, None, int(count))


def run(named: tuple[str, Case]) -> dict[str, object]:
    """All checks of one case."""
    model, case = named
    problem = Problem(case)
    reasons = [check_decoding(problem, tokens) for tokens in (1, 16, 64)]
    # sums of larger K leave the exact range of float32 with the larger scales; a slice of K is as good a test
    reasons += [check_integers(case, tokens) for tokens in (1, 11, 32)] if case.k <= 16384 else []
    answers = check_errors(problem, TOKENS)
    reasons += [f"m={answer.m}: {answer.reason}" for answer in answers if answer.reason]
    reasons = [reason for reason in reasons if reason]
    return {
        "model": model,
        "n": case.n,
        "k": case.k,
        "bits": case.spec.bits,
        "group_size": case.spec.group_size,
        "vector_size": case.spec.vector_size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "checks": len(answers) + (6 if case.k <= 16384 else 3),
        "failures": len(reasons),
        "worst_error": f"{max(answer.error for answer in answers):.3e}",
        "torch_error_there": f"{max(answers, key=lambda answer: answer.error).torch_error:.3e}",
        "reason": "; ".join(reasons),
    }


def main() -> int:
    """Run, write, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; most of the time goes into compiling kernels"
    )
    parser.add_argument("--part", type=part, default="1/1", help="which of how many parts of all cases")
    arguments = parser.parse_args()
    todo, failures, checks, begun = cases(arguments.quick)[arguments.part], 0, 0, time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(arguments.workers) as pool, open(arguments.output, "w", newline="", buffering=1) as file:
        file.write(f"# {describe()}\n")
        writer: csv.DictWriter | None = None
        for number, row in enumerate(pool.imap(run, todo)):
            writer = writer or csv.DictWriter(file, row)
            if number == 0:
                writer.writeheader()
            writer.writerow(row)
            failures, checks = failures + int(str(row["failures"])), checks + int(str(row["checks"]))
            if row["failures"]:
                print(row, flush=True)
    print(f"{describe()}\n{len(todo)} cases, {checks} checks, {failures} failures, {time.monotonic() - begun:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
