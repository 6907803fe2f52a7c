"""``save_pretrained`` and ``push_to_hub`` of a quantized model write its card, too.

transformers has no hook for that: saving writes no README.md, and pushing puts a template over whatever lies there. So
two methods of its models are wrapped: the one that saves, and the one through which every upload goes. For models that
`attach` has not marked they are what they were. (Methods bound to the one model would leave a cycle: after ``del
model`` its memory would wait for the garbage collector.) Whose README.md it is decides what becomes of it:

    in the folder   nobody's or ours: written anew; somebody's own: left as it is, and uploaded if the hub has none
    on the hub      nobody's or ours: written anew; somebody's own: stays, gets tags as transformers does

Nobody's is transformers' template, too, while nobody has filled it in. Figures of quality belong to the weights, which
may have changed since they were measured: they are on the card if `describe` was told them for this model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..errors import IntegrationError
from . import card
from .described import of_model

_THEIRS: ContextVar[bytes | None] = ContextVar("README.md of its owner's, in the folder that is saved to", default=None)
_GENERATED = "automatically generated"  # what the template says, and nobody says of a text of his own


def attach(model: Any, tags: Sequence[str], *, dense: bool = False) -> None:
    """Let ``model`` write its card whenever it is saved or pushed.

    Args:
        model: quantized, of transformers.
        tags: for the hub.
        dense: it was loaded from the dense model, whose hub id is thus the base.
    """
    model.add_model_tags(list(tags))
    origin = str(getattr(model.config, "_name_or_path", ""))
    model.flute_card = {"base": origin if dense else _told_base(origin)}


def detach(model: Any, tags: Sequence[str]) -> None:
    """Undo `attach`: the model is dense now."""
    model.__dict__.pop("flute_card", None)
    model.model_tags = [tag for tag in model.model_tags or () if tag not in tags]


def describe(
    model: Any, *, base: str | None = None, quality: Sequence[Mapping[str, Any]] = (), name: str | None = None
) -> None:
    """What the card of a model in memory shall say that the model does not know.

    Args:
        model: quantized, of transformers.
        base, quality: see `card.write`; None or nothing: as it was.
        name: of the checkpoint; default the folder's, or the hub id.

    Raises:
        IntegrationError: the model is not quantized. CheckpointError: quality is not what ``flute eval --json`` prints.
    """
    if not hasattr(model, "flute_card"):
        raise IntegrationError(f"this {type(model).__name__} was not quantized by flute; it gets no card of flute's")
    card.quality_table(quality)
    said = {"base": base, "quality": list(quality), "name": name}
    model.flute_card = model.flute_card | {key: value for key, value in said.items() if value}


def _told_base(origin: str) -> str | None:
    """Hub id of the dense model, by the card in the folder of a quantized one."""
    base = card.metadata(card.content(Path(origin) / card.FILE)).get("base_model")
    return base if isinstance(base, str) else None


_SAVE = PreTrainedModel.save_pretrained
_UPLOAD: Any = getattr(PreTrainedModel, "_upload_modified_files", None)


@wraps(_SAVE)
def _save(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    if "flute_card" not in model.__dict__:
        return _SAVE(model, save_directory, *args, **kwargs)
    given = signature(_SAVE).bind(model, save_directory, *args, **kwargs).arguments
    writes = given.get("is_main_process", True) and _first_process()
    path = Path(save_directory) / card.FILE
    theirs = None if _replaceable(path) else path.read_bytes()
    token = _THEIRS.set(theirs)
    try:
        _SAVE(model, save_directory, *args, **kwargs)
    finally:
        _THEIRS.reset(token)
        if writes and theirs is not None and path.read_bytes() != theirs:
            card.put(path, theirs)
    adapters_only = getattr(model, "_hf_peft_config_loaded", False)
    made = writes and not adapters_only and any(path.parent.glob("*.safetensors"))
    if made and theirs is None and not given.get("push_to_hub", False):
        _write(model, path, path.parent.resolve().name)


def _upload_modified_files(model: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    path = Path(working_dir) / card.FILE
    theirs = _THEIRS.get()
    if "flute_card" in model.__dict__ and _replaceable(path):  # what the hub has, or transformers' template
        card.put(path, theirs) if theirs is not None else _write(model, path, repo_id)
    return _UPLOAD(model, working_dir, repo_id, *args, **kwargs)


def _first_process() -> bool:
    """Whether this is the process of several that writes."""
    parallel = torch.distributed
    return not (parallel.is_available() and parallel.is_initialized()) or parallel.get_rank() == 0


def _write(model: Any, path: Path, name: str) -> None:
    said = dict(model.flute_card)
    name = said.pop("name", None) or name
    card.put(path, card.text(of_model(model, path.parent), name, replaced=card.content(path), **said).encode())


def _replaceable(path: Path) -> bool:
    return card.is_ours(path) or _is_template(card.content(path))


def _is_template(content: str) -> bool:
    """Whether this is the card that transformers makes, with nothing filled in."""
    if _GENERATED not in content:
        return False
    empty = ModelCard.from_template(ModelCardData(), model_description="\0").text.strip()
    before, _, after = empty.partition("\0")
    body = card.without_metadata(content).strip()
    line = body[len(before) : len(body) - len(after)]
    return body.startswith(before) and body.endswith(after) and "\n" not in line


_MODELS: Any = PreTrainedModel
_MODELS.save_pretrained = _save
if _UPLOAD is not None:  # a private name: without it pushing adds tags only
    _MODELS._upload_modified_files = _upload_modified_files
