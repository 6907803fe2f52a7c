"""Train the embedded default model: a byte-level BPE tokenizer and a Llama of a few million parameters.

The corpus (``training.corpus``) is about three megabytes, which this model can learn by heart in minutes, so most of
what is here works against that: dropout on everything that enters the residual stream, strong weight decay, windows
at random offsets, and the checkpoint with the best validation loss. The held-out text is read once, at the end.

    python -m training.corpus --out .corpus
    python -m training.train_tiny --corpus .corpus --out flute/data/tiny
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training import corpus

VOCABULARY = 4096
CONTEXT = 1024
HELDOUT_WINDOW = 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens and comes back from them unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents in one row of tokens, each between ``<s>`` and ``</s>``."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eos_token_id]
    return torch.tensor(ids)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Seven million parameters; 704 is no power of two, so that nothing downstream can rely on one."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop parts of everything that enters the residual stream; Llama itself has no such dropout."""

    def drop(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, probability, module.training)

    entrances: list[nn.Module] = [model.model.embed_tokens]
    for layer in model.model.layers:
        entrances += [layer.self_attn.o_proj, layer.mlp.down_proj]
    for module in entrances:
        module.register_forward_hook(drop)


def optimizer_for(model: nn.Module, rate: float, decay: float, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)


def schedule(steps: int, warmup: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def random_windows(stream: Tensor, count: int, length: int) -> Tensor:
    """Windows at random offsets, so that no two epochs cut the text alike."""
    starts = torch.randint(len(stream) - length, (count, 1))
    return stream[(starts + torch.arange(length)).to(stream.device)]


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: Tensor, length: int, batch: int = 8) -> float:
    """Nats per token over consecutive windows; the remainder at the end is left out."""
    model.eval()
    windows = stream[: len(stream) // length * length].view(-1, length)
    if not len(windows):
        raise ValueError(f"the text has {len(stream)} tokens and one window needs {length}: use a longer text")
    total = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(batch))
    return total / len(windows)


def fit(args: argparse.Namespace, model: LlamaForCausalLM, train: Tensor, validation: Tensor) -> float:
    """Train in place and leave the model at its best validation loss, which is returned."""
    device = train.device
    cuda = device.type == "cuda"
    optimizer = optimizer_for(model, args.lr, args.weight_decay, fused=cuda)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(args.steps, min(args.warmup, args.steps // 10)))
    best, best_state, stale, began = math.inf, model.state_dict(), 0, time.monotonic()
    for step in range(1, args.steps + 1):
        model.train()
        windows = random_windows(train, args.batch, args.window)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if step % args.evaluate_every and step != args.steps:
            continue
        held = mean_loss(model, validation, args.window)
        stale += 1
        if held < best:
            best, stale = held, 0
            best_state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        seconds = time.monotonic() - began
        print(f"step {step}  loss {loss.item():.4f}  validation {held:.4f}  {seconds:.0f} s", flush=True)
        if stale >= args.patience:
            print(f"stopped: no better validation loss in {args.patience} evaluations", flush=True)
            break
    model.load_state_dict(best_state)
    return best


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The folder ``transformers`` loads, weights in float16."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows as well as 5
    path.write_text(json.dumps(settings, indent=2) + "\n")


def report(out: Path, text: str, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> dict[str, float]:
    """Held-out figures of the model as saved: rounded to float16, computed in float32."""
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
    ids = torch.tensor(tokenizer.encode(text), device=device)
    loss = mean_loss(model, ids, HELDOUT_WINDOW)
    bits = loss * len(ids) / math.log(2) / len(text.encode())
    return {"heldout_perplexity": math.exp(loss), "heldout_bits_per_byte": bits, "heldout_tokens": len(ids)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded default model on the corpus of training.corpus.")
    parser.add_argument("--corpus", type=Path, default=Path(".corpus"), help="folder that training.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--window", type=int, default=CONTEXT, help="tokens in a window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps, at most a tenth of all")
    parser.add_argument("--weight-decay", type=float, default=2.0)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--patience", type=int, default=10, help="evaluations without a better one before stopping")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    texts = {split: corpus.read(args.corpus, split) for split in corpus.SPLITS}
    tokenizer = train_tokenizer(texts["train"])
    train, validation = (token_stream(tokenizer, texts[split]).to(device) for split in ("train", "validation"))
    model = new_model(tokenizer)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
    add_dropout(model, args.dropout)
    print(f"{model.num_parameters():,} parameters, {len(train):,} tokens to train on", flush=True)
    best = fit(args, model, train, validation)
    save(model, tokenizer, args.out)
    shutil.copyfile(args.corpus / "heldout.txt", args.out / "heldout.txt")
    heldout = (args.out / "heldout.txt").read_text(encoding="utf-8")
    figures = {"validation_loss": best, **report(args.out, heldout, tokenizer, device)}
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
