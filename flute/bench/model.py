"""Tokens per second of a whole model in transformers: dense, quantized by this library, and by bitsandbytes.

The model has a real config and random weights, which cost the same time as real ones. It is quantized the way users do
it, by ``from_pretrained(quantization_config=...)``, from weights in memory; FlatQuant's, which calibrates, has random
integers instead (`flat`), and where it rounds keys and values to 4 bits its cache holds codes.

*Decode* is one greedy step of ``batch`` sequences that have ``prompt`` tokens behind them: a static cache, the whole
step in one CUDA graph, the next token fed back inside it. Decoder layers are compiled by torch (``compiled=True``) as
one function that all of them share, so norms, rotations and activations are fused alike for every method and only the
linear layers differ. Keys and values of the prompt are random: their values do not change the time.

*Prefill* is one pass over ``prompt`` tokens of each sequence, logits of the last one only, also in a CUDA graph.

Without a GPU the same steps run one by one and are timed by the clock; that is for tests.
"""

from __future__ import annotations

import gc
import importlib.util
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FluteError
from ..spec import NAMED_TABLES
from .caches import empty_cache, nbytes, set_length
from .decoder import Decoder, share_layer_step
from .flat import FLATQUANT, flat_model, flat_spec
from .peers import first_line
from .shapes import MODELS
from .timing import captured

DENSE, BITSANDBYTES = "dense", "bitsandbytes"
HEAD = "+head"  # behind a table: the output head is quantized too
ATTENTION = "+attention"  # behind a method: decode steps attend by `flute.kernels.decode_attention`, not by torch
_PREFILL_REPLAYS = 3


@dataclass(frozen=True)
class ModelRow:
    """One method at one batch size and prompt length; None where it was not measured, ``note`` says why.

    ``weight_gb`` counts every parameter and buffer, ``cache_gb`` keys and values of the decode step, ``peak_gb`` all
    that torch allocated for it.
    """

    model: str
    method: str
    group_size: int
    batch: int
    prompt: int
    decode_ms: float | None = None
    decode_tokens_per_s: float | None = None
    decode_speedup: float | None = None
    prefill_ms: float | None = None
    prefill_tokens_per_s: float | None = None
    prefill_speedup: float | None = None
    weight_gb: float | None = None
    peak_gb: float | None = None
    note: str = ""
    cache_gb: float | None = None


_NOT_MEASURED = ModelRow("", DENSE, 0, 0, 0)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        config: a name of `shapes.MODELS`, the word tiny, or a folder or file with a config.json.
        methods: "dense", "bitsandbytes" (NF4), a named table such as "nf4", or "nf4+head" to quantize the output head
            too; "flatquant" (W4A4KV4) or "flatquant-" with another preset, such as "flatquant-w4a8kv4"; any of them
            with "+attention" behind it to decode with this library's attention. Those behind "dense" are compared
            with it.
        batches, prompts: every pair is measured.
        steps: decode steps that are timed together.
        prefill_tokens: most tokens of a prefill (batch x prompt); larger ones are left out.
    """

    config: str
    methods: Sequence[str] = (DENSE, "nf4")
    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (128,)
    group_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    compiled: bool = True
    steps: int = 32
    prefill_tokens: int = 8192


# ---- models ----------------------------------------------------------------------------------------------------------


def load_config(name: str) -> Any:
    """A transformers config by name or path.

    Raises:
        FluteError: neither a model known by name nor a config.json.
    """
    from transformers import AutoConfig

    from ..integrations import folders

    if name in MODELS:
        values = asdict(MODELS[name])
        rope = {"rope_theta": values.pop("rope_theta"), **dict(values.pop("rope"))}
        return AutoConfig.for_model(**values, rope_parameters={"rope_type": "default", **rope})
    path = folders.embedded() if name == "tiny" else Path(name)
    if not path.exists():
        raise FluteError(f"--config {name}: give {', '.join(MODELS)}, tiny, or a folder with a config.json")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise FluteError(f"--config {name} cannot be read: {str(error).splitlines()[0]}") from None


def check_method(name: str) -> str:
    """Why a method cannot be measured here; nothing if it can.

    Raises:
        FluteError: no such method.
    """
    name = name.removesuffix(ATTENTION)
    if name == BITSANDBYTES:
        absent = importlib.util.find_spec(BITSANDBYTES) is None
        return f"not installed; pip install {BITSANDBYTES}" if absent else ""
    if name.startswith(FLATQUANT):
        flat_spec(name)
    elif name != DENSE and name.removesuffix(HEAD) not in NAMED_TABLES:
        raise FluteError(
            f"--methods {name!r}: use {DENSE}, {BITSANDBYTES}, or a table ({', '.join(NAMED_TABLES)}), with {HEAD} "
            f"behind it to quantize the output head too, or {FLATQUANT}; {ATTENTION} last for flute's attention"
        )
    return ""


def build(plan: Plan, method: str) -> Any:
    """The model of ``plan`` with random weights, on its device, ready for inference."""
    from transformers import AutoModelForCausalLM

    config, method = load_config(plan.config), method.removesuffix(ATTENTION)
    torch.manual_seed(0)
    if method.startswith(FLATQUANT):
        return flat_model(config, flat_spec(method), plan.dtype, plan.device)
    with torch.device(plan.device):
        model = AutoModelForCausalLM.from_config(config, dtype=plan.dtype)
    if method != DENSE:
        state, kind = model.state_dict(), type(model)
        del model
        model = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=plan.dtype, device_map={"": plan.device},
            quantization_config=_quantization(plan, method),
        )  # fmt: skip
        del state
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    return model.eval()


def _quantization(plan: Plan, method: str) -> Any:
    if method == BITSANDBYTES:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=plan.dtype
        )  # blocks of 64; its output head stays dense
    from ..integrations.huggingface import FluteConfig

    table = method.removesuffix(HEAD)
    return FluteConfig(int(table[-1]), plan.group_size, table, lm_head=method.endswith(HEAD))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


# ---- time ------------------------------------------------------------------------------------------------------------


def _replay(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` as a replayed CUDA graph; as it is where there is no GPU."""
    if not torch.cuda.is_available():
        run()
        return run
    return captured([run], warm_ups=2).replay


def _milliseconds(run: Callable[[], object], times: int) -> float:
    """Milliseconds of one of ``times`` runs in a row."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        for _ in range(times):
            run()
        return 1e3 * (time.perf_counter() - begun) / times
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


@torch.no_grad()  # not inference_mode, in which layers of one x are launched apart
def decode_milliseconds(
    model: Any, batch: int, prompt: int, steps: int, rounds: int = 3, *, compiled: bool = False
) -> tuple[float, int]:
    """Median over ``rounds`` of the milliseconds of one of ``steps`` decode steps in a row; bytes of the cache."""
    decoder = Decoder(model, batch, prompt, room=max(steps, 4), compiled=compiled)
    replay = _replay(decoder.step)
    taken = []
    for _ in range(rounds):
        decoder.rewind()
        taken.append(_milliseconds(replay, steps))
    return statistics.median(taken), nbytes(decoder.cache)


@torch.no_grad()  # not inference_mode, in which layers of one x are launched apart
def prefill_milliseconds(model: Any, batch: int, prompt: int) -> float:
    """Median milliseconds of one pass over ``batch`` prompts, into an empty static cache."""
    cache = empty_cache(model, batch, prompt)
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)

    def run() -> None:
        set_length(cache, 0)
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    replay = _replay(run)
    return statistics.median(_milliseconds(replay, 1) for _ in range(_PREFILL_REPLAYS))


# ---- the sweep -------------------------------------------------------------------------------------------------------


def measure(plan: Plan, done: Callable[[list[ModelRow]], None] = lambda rows: None) -> list[ModelRow]:
    """Every row of ``plan``; ``done`` is called with the rows of each method as soon as they are there."""
    rows: list[ModelRow] = []
    for method in plan.methods:
        reason = check_method(method)
        try:
            made = [_absent(plan, method, reason)] if reason else _measure_method(plan, method, rows)
        except (torch.OutOfMemoryError, ImportError) as error:  # the model does not fit, or transformers wants another
            made = [_absent(plan, method, first_line(error))]  # version of a peer; the other methods go on
        rows += made
        done(made)
    return rows


def _absent(plan: Plan, method: str, reason: str) -> ModelRow:
    return ModelRow(plan.config, method, 0, 0, 0, note=reason)


def _measure_method(plan: Plan, method: str, before: Sequence[ModelRow]) -> list[ModelRow]:
    model = build(plan, method)
    share_layer_step(model, compiled=plan.compiled, attention=method.endswith(ATTENTION))
    torch._dynamo.reset()  # a method's shapes are compiled anew, not as exceptions to those of the last one
    base = method.removesuffix(ATTENTION)
    whole = base == DENSE or base.startswith(FLATQUANT)  # a scale a row, where there are any
    group = 0 if whole else 64 if base == BITSANDBYTES else plan.group_size
    dense = {(row.batch, row.prompt): row for row in before if row.method == DENSE}
    rows = []
    for batch in plan.batches:
        for prompt in plan.prompts:
            decode, prefill, cached, peak, note = _measure_case(plan, model, batch, prompt)
            other = dense.get((batch, prompt), _NOT_MEASURED)
            rows.append(
                ModelRow(
                    plan.config, method, group, batch, prompt,
                    decode, _rate(batch, decode), _ratio(other.decode_ms, decode),
                    prefill, _rate(batch * prompt, prefill), _ratio(other.prefill_ms, prefill),
                    weight_bytes(model) / 1e9, peak, note, cached,
                )
            )  # fmt: skip
    return rows


def _measure_case(
    plan: Plan, model: Any, batch: int, prompt: int
) -> tuple[float | None, float | None, float | None, float | None, str]:
    """Milliseconds of a decode step and of a prefill; GB of the former's cache and peak; and why one is missing."""
    decode = prefill = cached = peak = None
    note = ""
    gpu = plan.device == "cuda"
    try:
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        decode, cache_bytes = decode_milliseconds(model, batch, prompt, plan.steps, compiled=plan.compiled)
        cached = cache_bytes / 1e9
        peak = torch.cuda.max_memory_allocated() / 1e9 if gpu else None
        if batch * prompt <= plan.prefill_tokens:
            prefill = prefill_milliseconds(model, batch, prompt)
        else:
            note = f"prefill of more than {plan.prefill_tokens} tokens left out"
    except torch.OutOfMemoryError as error:
        note = re.split(r"(?<=\.) ", str(error))[0]
    return decode, prefill, cached, peak, note


def _rate(tokens: int, milliseconds: float | None) -> float | None:
    return 1e3 * tokens / milliseconds if milliseconds else None


def _ratio(dense: float | None, milliseconds: float | None) -> float | None:
    return dense / milliseconds if dense and milliseconds else None


def table(rows: Sequence[ModelRow]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the figures."""
    header = ["method", "batch", "prompt", "decode ms", "tokens/s", "x dense", "prefill ms", "tokens/s", "x dense",
              "weights GB", "cache GB", "peak GB"]  # fmt: skip

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        [
            row.method, str(row.batch), str(row.prompt),
            cell(row.decode_ms, ".2f"), cell(row.decode_tokens_per_s, ".0f"), cell(row.decode_speedup, ".2f"),
            cell(row.prefill_ms, ".2f"), cell(row.prefill_tokens_per_s, ".0f"), cell(row.prefill_speedup, ".2f"),
            cell(row.weight_gb, ".2f"), cell(row.cache_gb, ".3f"), cell(row.peak_gb, ".2f"),
        ]
        for row in rows
        if row.batch
    ]  # fmt: skip
    return header, lines
