"""Tokens per second of vLLM with dense fp16, Machete W4A16 (g128), our nf4 and nf3 (g64) and FlatQuant, in one run.

    python benchmarks/vllm_speed.py --output benchmarks/results/vllm_h100.csv

Llama-3.1-8B's config with random weights (``--load-format dummy``; ours draw random codes, too). Each contestant is a
process of its own, since vLLM keeps a GPU to itself; torch.compile and CUDA graphs are on, prefix caching is off.

* decode: ``batch`` sequences of 32 random tokens. The time from the 17th token to the 144th of all, over 128 steps.
* prefill: one sequence of 2048 random tokens, until the first token.

The least of ``--repeats`` after a warm-up. ``over_fp16`` and ``over_machete`` are ratios of times: above 1 is faster.
A contestant that cannot run is left out, and the last lines of what it said are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flute.bench.machine import describe
from flute.bench.results import write_rows
from flute.config import ModelSpec
from flute.flatquant.spec import FlatSpec
from flute.spec import QuantSpec

BATCHES = (1, 8, 32, 64, 128)
PROMPT, FIRST, LAST, PREFILL = 32, 16, 144, 2048
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
MACHETE: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
        }
    },
}  # fmt: skip
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    "fp16": None,
    "nf4_g64": ModelSpec(QuantSpec(4, 64, "nf4"), modules_to_not_convert=("lm_head",)).to_dict(),
    "machete_w4a16_g128": MACHETE,
    "nf3_g64": ModelSpec(QuantSpec(3, 64, "nf3"), modules_to_not_convert=("lm_head",)).to_dict(),
    "flatquant_w4a8": FlatSpec(a_bits=8).to_dict(),  # W4A4 is the same kernels
    "flatquant_w4a16": FlatSpec(a_bits=16).to_dict(),
}


@dataclass(frozen=True)
class Row:
    """One figure. ``tokens`` of decode is a step's: the batch."""

    contestant: str
    phase: str
    batch: int
    milliseconds: float
    tokens_per_s: float
    over_fp16: float | None
    over_machete: float | None


def measure(contestant: str, layers: int, repeats: int) -> dict[str, float]:
    """Milliseconds of one decode step by batch, and of the prefill; the process is good for nothing else afterwards."""
    from vllm import LLM, SamplingParams

    config = {**LLAMA_8B, "num_hidden_layers": layers}
    if CONTESTANTS[contestant] is not None:
        config["quantization_config"] = CONTESTANTS[contestant]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, dtype="float16", max_model_len=4096,
            max_num_seqs=max(BATCHES), enable_prefix_caching=False,
            compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        )  # fmt: skip
    draw = random.Random(0)

    def run(batch: int, length: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": draw.choices(range(1000, 100000), k=length)} for _ in range(batch)]
        options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, options, use_tqdm=False)
        return 1e3 * (time.perf_counter() - start)

    found = {}
    for batch in BATCHES:
        run(batch, PROMPT, FIRST)
        times = [run(batch, PROMPT, LAST) - run(batch, PROMPT, FIRST) for _ in range(repeats)]
        found[f"decode {batch}"] = min(times) / (LAST - FIRST)
    run(1, PREFILL, 1)
    found["prefill 1"] = min(run(1, PREFILL, 1) for _ in range(3 * repeats))
    return found


def measured_apart(contestant: str, layers: int, repeats: int) -> dict[str, float]:
    """`measure` in a process of its own; nothing if it fails."""
    command = [sys.executable, __file__, "--only", contestant, "--layers", str(layers), "--repeats", str(repeats)]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("MEASURED "):
            return dict(json.loads(line.removeprefix("MEASURED ")))
    print(f"{contestant} did not run:", *(done.stdout + done.stderr).splitlines()[-15:], sep="\n  ", flush=True)
    return {}


def rows(found: dict[str, dict[str, float]]) -> list[Row]:
    """All figures beside dense and Machete."""
    made = []
    for contestant, times in found.items():
        for what, milliseconds in times.items():
            phase, batch = what.split()[0], int(what.split()[1])
            tokens = PREFILL if phase == "prefill" else batch
            others = [found.get(other, {}).get(what) for other in ("fp16", "machete_w4a16_g128")]
            ratios = [None if other is None else other / milliseconds for other in others]
            made.append(Row(contestant, phase, batch, milliseconds, 1e3 * tokens / milliseconds, *ratios))
    return made


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"], help="fewer for a quick look")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    parser.add_argument("--only", choices=CONTESTANTS, help="one contestant, in this process, nothing written")
    given = parser.parse_args()
    if given.only:
        print("MEASURED", json.dumps(measure(given.only, given.layers, given.repeats)), flush=True)
        return
    found: dict[str, dict[str, float]] = {}
    origin = f"{describe()}; vllm {version('vllm')}; {given.layers} layers, fp16; {' '.join(sys.argv)}"
    for contestant in given.contestants:
        found[contestant] = measured_apart(contestant, given.layers, given.repeats)
        figures = (f"{what} {milliseconds:.3f}" for what, milliseconds in found[contestant].items())
        print(f"{contestant}: ms by batch: {', '.join(figures)}", flush=True)
        if given.output and any(found.values()):
            write_rows(given.output, origin, rows(found))


if __name__ == "__main__":
    main()
