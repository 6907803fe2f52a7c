"""Memory and time of a LoRA step on a quantized model, beside bitsandbytes, in one run.

    python benchmarks/qlora.py --output benchmarks/results/qlora_h100.csv

A Llama-3.1-8B (random weights, bf16), LoRA of rank 16 on every linear layer of the decoder, layers checkpointed, AdamW,
one sequence of 512 or 2048 tokens a step. ``peak_gb`` is the most that torch allocated during the steps.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
from dataclasses import dataclass
from pathlib import Path

import peft
import torch

from flute.bench.machine import describe
from flute.bench.model import BITSANDBYTES, Plan, build, weight_bytes
from flute.bench.results import write_rows

TOKENS = (512, 2048)
STEPS = 6


@dataclass(frozen=True)
class Row:
    """One method at one length; ``step_ms``: median, forward, backward and optimizer."""

    method: str
    tokens: int
    step_ms: float
    peak_gb: float
    weight_gb: float
    trainable: int
    loss: float


def measure(config: str, method: str, tokens: tuple[int, ...]) -> list[Row]:
    """A model, adapted, and some steps of each length."""
    model = build(Plan(config), method)
    weights = weight_bytes(model) / 1e9
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rows = []
    for length in tokens:
        torch.cuda.reset_peak_memory_stats()
        taken, loss = [], torch.zeros(())
        for _ in range(STEPS):
            ids = torch.randint(0, model.config.vocab_size, (1, length), device="cuda")
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        peak = torch.cuda.max_memory_allocated() / 1e9
        count = sum(parameter.numel() for parameter in trained)
        rows.append(Row(method, length, statistics.median(taken[2:]), peak, weights, count, loss.item()))
    return rows


def main() -> None:
    """Every method, a table, a CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="llama-3.1-8b")
    parser.add_argument("--methods", default=f"nf4,nf3,{BITSANDBYTES}")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows: list[Row] = []
    for method in options.methods.split(","):
        if method == BITSANDBYTES and importlib.util.find_spec(BITSANDBYTES) is None:
            print("bitsandbytes is not installed; left out")
            continue
        rows += measure(options.config, method, TOKENS)
        gc.collect()
        torch.cuda.empty_cache()
        for row in rows[-len(TOKENS) :]:
            print(f"{row.method:>14} {row.tokens:5} tokens: {row.step_ms:8.1f} ms, peak {row.peak_gb:6.2f} GB, "
                  f"weights {row.weight_gb:.2f} GB, loss {row.loss:.2f}", flush=True)  # fmt: skip
    write_rows(options.output, f"{describe()}; {options.config}, bf16, LoRA r=16, checkpointed", rows)


if __name__ == "__main__":
    main()
