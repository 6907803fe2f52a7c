"""The README.md of a checkpoint: what it is, what it costs in quality where somebody measured that, how to run it.

`write` puts it into a folder; ``flute quantize`` does so for every checkpoint that it makes. A model that transformers
saves or pushes itself gets only its tags (`tags`): transformers writes that card, from a template of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoint.atomic import whole_file
from ..checkpoint.files import CONFIG, inside, read_json
from ..checkpoint.validate import Report
from ..errors import CheckpointError
from ..spec import QuantSpec
from . import folders

FILE = "README.md"
_MARK = "<!-- written by flute -->"
_RUN = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # after: pip install flute-engine

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("The lookup table", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
```

```sh
flute generate {name} --prompt "The lookup table"
flute inspect {name}        # layer by layer
```
"""


def tags(spec: QuantSpec) -> list[str]:
    """What a hub lists a checkpoint under."""
    return ["flute", f"{spec.bits}-bit", "quantized"]


def write(
    report: Report, *, base: str | None = None, quality: Sequence[Mapping[str, Any]] = (), force: bool = False
) -> Path:
    """Write README.md into a checkpoint. Returns its path.

    Args:
        report: of the checkpoint, from `folders.validate`.
        base: the hub id (name/model) of the dense model; anything else, such as a path, is not told.
        quality: what ``flute eval --json`` printed for it, one for each text; the key "text" names the text.
        force: replace a README.md that was not written here.

    Raises:
        CheckpointError: somebody else's README.md is there; quality is no such thing.
    """
    path = report.folder / FILE
    if path.exists() and not force and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise CheckpointError(f"{path} was not written by flute; keep it, or replace it with --force")
    made = card(report, base=base, quality=quality)
    with whole_file(path) as file:
        file.write(made.encode())
    return path


def card(report: Report, *, base: str | None = None, quality: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text: metadata for the hub, then what people read."""
    base = base if base and folders.is_hub_id(base) else None
    config = read_json(inside(report.folder, CONFIG))
    causal = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
    relation: dict[str, Any] = {"base_model_relation": "quantized"} if base else {}
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation" if causal else None,
        tags=tags(report.record.spec),
        **relation,
    )
    name = report.folder.resolve().name
    parts = [
        f"# {name}\n\n{_MARK}\n",
        _what(report, base),
        _quality(quality) if quality else "",
        "## How to run it\n",
        _RUN.format(name=name),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(part for part in parts if part)))


def _what(report: Report, base: str | None) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base else "A language model"
    specs = Counter(layer.spec for layer in report.layers)
    rows = [
        f"| {count} | {spec.bits} | {'row' if spec.group_size < 0 else spec.group_size} | {spec.table} "
        f"| {spec.vector_size} | {spec.hadamard_size or 'none'} |"
        for spec, count in specs.most_common()
    ]
    return "\n".join(
        [
            f"{of} with the weights of its linear layers stored as codes, a lookup table and scales "
            f"(`W ~ table[codes] * scale`): {report.bits_per_weight:.3f} bits per quantized weight, scales and tables "
            f"included, {report.nbytes / 1e6:,.1f} MB in all.\n",
            "| layers | bits | weights per scale | table | weights per code | rotated in blocks of |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _quality(measured: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for found in measured:
        try:
            rows.append(
                f"| {found.get('text', 'unnamed')} | {float(found['perplexity']):.4f} "
                f"| {int(found['windows'])} x {int(found['seq_len'])} | {found['dtype']} |"
            )
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"quality {dict(found)!r} is not what flute eval --json prints: it needs perplexity, windows, seq_len "
                "and dtype"
            ) from None
    head = "| text | perplexity | windows x tokens | computed in |\n|---|---|---|---|"
    return "\n".join(["## Quality\n", head, *rows, ""])
