#!/usr/bin/env python3
"""Fine-tune a quantized model with LoRA (QLoRA) on a text, look at what it gained, and merge.

    python examples/qlora.py                                     the small model of this package, on the CPU, a minute
    python examples/qlora.py --model OUT --text mine.txt --device cuda --out merged

The base model stays in codes and is never trained; gradients go through the operator to the adapters. Layers are
checkpointed (torch recomputes activations), so memory is the codes, the adapters, and one layer's activations.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flute import FluteConfig
from flute.integrations.folders import embedded
from flute.integrations.peft import merge_and_unload, prepare_model_for_kbit_training


def main() -> None:
    """Train, report, merge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded()), help="a folder or hub id; a dense one is quantized to nf4")
    parser.add_argument("--text", type=Path, default=Path(__file__).resolve(), help="UTF-8; default: this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--window", type=int, default=128, help="tokens a step")
    parser.add_argument("--out", type=Path, help="folder for the merged checkpoint")
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    keywords = {"dtype": torch.bfloat16 if options.device == "cuda" else torch.float32}
    if getattr(AutoConfig.from_pretrained(options.model), "quantization_config", None) is None:
        keywords["quantization_config"] = FluteConfig(bits=4, group_size=64)
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map={"": options.device}, **keywords)
    model = peft.get_peft_model(
        prepare_model_for_kbit_training(model),
        peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.print_trainable_parameters()

    tokens = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    window = min(options.window, len(tokens))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.train()
    losses = []
    for step in range(options.steps):
        start = random.randrange(len(tokens) - window + 1)
        ids = tokens[start : start + window].view(1, -1).to(options.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    fifth = max(1, len(losses) // 5)
    print(f"mean loss of the first {fifth} steps {sum(losses[:fifth]) / fifth:.3f}, "
          f"of the last {sum(losses[-fifth:]) / fifth:.3f}")  # fmt: skip

    merged = merge_and_unload(model.eval())
    if options.out:
        merged.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        print(f"merged, quantized again: {options.out}")


if __name__ == "__main__":
    main()
