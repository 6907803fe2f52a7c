"""transformers' own HIGGS on this package, in a process of its own: quantize while loading, run, save, load.

    python tests/higgs_scenario.py --device cpu|cuda [--hidden 256] [--cases 4/2/float16/Llama ...]

A case is bits / p / dtype / family. Whatever transformers comes first on PYTHONPATH is used unmodified; only its
refusal of CPUs is taken out for ``--device cpu``. A case prints one line; the exit code is 1 if a check of any fails.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HiggsConfig
from transformers.quantizers.quantizer_higgs import HiggsHfQuantizer

import flute  # noqa: F401  (registers, where the package is not installed)

GROUP, HADAMARD = 64, 128
# error of a weight relative to its root mean square: of the optimal quantizers of a normal variable, and of a pair
DISTORTION = {(2, 1): 0.1175, (3, 1): 0.0345, (4, 1): 0.0095, (2, 2): 0.1068, (3, 2): 0.0300, (4, 2): 0.0079}


def dense_model(folder: Path, family: str, hidden: int, dtype: torch.dtype) -> None:
    """A random model; with a size that HADAMARD does not divide for families other than Llama."""
    torch.manual_seed(0)
    width = hidden + (0 if family == "Llama" else HADAMARD // 2)
    heads = width // 64
    config = getattr(transformers, f"{family}Config")(
        vocab_size=256, hidden_size=width, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), width**-0.5)
    model.save_pretrained(folder)


def load(folder: Path, device: str, dtype: torch.dtype, **config: Any) -> Any:
    """What a user writes."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, dtype=dtype, **config).eval()


@torch.no_grad()
def answers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a batch and tokens that follow a prompt."""
    prompt = torch.arange(3, 19, device=model.device).view(2, 8)
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    return model(prompt).logits, model.generate(prompt, **asked)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@torch.no_grad()
def distortion(dense: Any, model: Any) -> float:
    """Mean squared error of the weights of linear layers, relative to their mean square."""
    errors = squares = 0.0
    for name, module in dense.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            other = model.model.layers.get_submodule(name)
            errors += float((module.weight - other.weight).float().square().sum())
            squares += float(module.weight.float().square().sum())
            if module.bias is not None:
                assert torch.equal(module.bias, other.bias), name
    return errors / squares


def case(folder: Path, device: str, hidden: int, bits: int, p: int, dtype: torch.dtype, family: str) -> list[str]:
    """Names of the checks that fail."""
    dense_model(folder / "dense", family, hidden, dtype)
    config = HiggsConfig(bits=bits, p=p, group_size=GROUP, hadamard_size=HADAMARD)
    model = load(folder / "dense", device, dtype, quantization_config=config)
    logits, tokens = answers(model)
    model.save_pretrained(folder / "saved")
    again = load(folder / "saved", device, dtype)
    again_logits, again_tokens = answers(again)
    again.save_pretrained(folder / "twice")
    stored = load_file(folder / "saved" / "model.safetensors")
    # float64 would be the exact answer of the dequantized weights; 16 bits on both sides agree to their rounding
    plain = again.dequantize()
    close = float((answers(plain)[0] - logits).float().norm() / logits.float().norm())
    relative = distortion(load(folder / "dense", device, dtype), plain)
    checks = {
        "codes": any(tensor.dtype == torch.int16 for tensor in stored.values()),
        "same logits": torch.equal(logits, again_logits),
        "same tokens": torch.equal(tokens, again_tokens),
        "card": "higgs" in (folder / "twice" / "README.md").read_text(),
        "same files": equal(stored, load_file(folder / "twice" / "model.safetensors")),
        "distortion": abs(relative / DISTORTION[bits, p] - 1) < 0.05,
        "dequantized": close < (0.01 if dtype == torch.float16 else 0.06),
    }
    print(f"{relative:10.4f} {close:10.5f}", end="  ")
    return [name for name, good in checks.items() if not good]


def main() -> int:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    every = [f"{b}/{p}/{d}/Llama" for b, p, d in itertools.product((4, 3, 2), (1, 2), ("float16", "bfloat16"))]
    parser.add_argument("--cases", nargs="*", default=[*every, "4/2/float16/Qwen2", "3/1/bfloat16/Qwen2"])
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if given.device == "cpu":
        torch.set_num_threads(1)
        HiggsHfQuantizer.validate_environment = lambda *args, **kwargs: None
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {given.device}")
    print("case                     distortion  to dense  seconds  failed")
    failed = 0
    for text in given.cases:
        bits, p, dtype, family = text.split("/")
        started = time.perf_counter()
        print(f"{text:24s}", end=" ")
        with tempfile.TemporaryDirectory() as folder:
            wrong = case(Path(folder), given.device, given.hidden, int(bits), int(p), getattr(torch, dtype), family)
        print(f"{time.perf_counter() - started:6.1f}  {', '.join(wrong) or '-'}", flush=True)
        failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
