#!/usr/bin/env python3
"""Learn the scales of a quantized model (NFL) from a text, and see what that is worth on another one.

    python examples/learned_scales.py                                   the small model of this package, some minutes
    python examples/learned_scales.py --model M --calibration a.txt --text b.txt --bits 3 --device cuda

Three models are measured on the same windows: dense, rounded to nearest, and with learned scales. The last is made in
the two steps that upstream FLUTE documents; ``flute quantize --method nfl`` does the same and writes a checkpoint.
"""

from __future__ import annotations

import argparse
import pydoc
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flute import FluteConfig
from flute.evaluate.perplexity import context_length, encode, perplexity
from flute.integrations.base import prepare_model_flute
from flute.integrations.folders import embedded
from flute.integrations.learnable import learn_scales

MODULES = ("argparse", "asyncio", "collections", "decimal", "email", "json", "logging", "pathlib", "random", "tarfile")


def standard_library() -> str:
    """Documentation of some of Python's modules, which is what the small model can read."""
    return "\n\n".join(pydoc.plaintext.document(__import__(name)) for name in MODULES)


def main() -> None:
    """Measure, learn, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded()))
    parser.add_argument("--calibration", type=Path, help="UTF-8 text; default: documentation of Python modules")
    parser.add_argument("--text", type=Path, default=embedded() / "heldout.txt", help="what is measured")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, help="of the measured text; default: all")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = encode(tokenizer, options.text.read_text(encoding="utf-8"))

    def load(**keywords: Any) -> Any:
        place: dict[str, Any] = {"dtype": torch.float32, "device_map": {"": options.device}}
        return AutoModelForCausalLM.from_pretrained(options.model, **place, **keywords)

    def measure(name: str, model: Any) -> None:
        length = context_length(model, 512)
        found = perplexity(model.eval(), tokens, seq_len=length, max_windows=options.windows)
        print(f"{name:>15}: perplexity {found.perplexity:.3f} ({found.windows} windows of {length})", flush=True)

    measure("dense", load())
    measure(f"nf{options.bits} rounded", load(quantization_config=FluteConfig(bits=options.bits, group_size=64)))
    text = options.calibration.read_text(encoding="utf-8") if options.calibration else standard_library()
    model = learn_scales(
        model=load(), tokenizer=tokenizer, num_bits=options.bits, group_size=64, custom_corpora=[text],
        samples=options.samples, window=options.window, logging=sys.stderr.isatty(),
        epochs=2, lr=5e-3, relative=True, objective="kl", scale="mse",  # mse: learning starts from searched scales
    )  # fmt: skip
    prepare_model_flute("model.layers", model.model.layers, num_bits=options.bits, group_size=64)
    measure(f"nf{options.bits} learned", model)


if __name__ == "__main__":
    main()
