"""From what a user calls a model to a folder, its architecture, and a loaded model, by way of transformers.

MODEL is a folder, a hub id, a ``.gguf`` file (or a folder that holds one), or the word ``tiny``: the model in this
package. Code that a model brings along (``auto_map``) is never run.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import nn

from ..checkpoint.architecture import Architecture, tensor_names
from ..checkpoint.files import CONFIG, inside, read_json
from ..checkpoint.validate import Report, check, read_record
from ..config import ModelSpec
from ..errors import CheckpointError, FluteError, IntegrationError
from ..flatquant.spec import QUANT_METHOD as FLATQUANT
from . import mixtures
from .modules import check_patterns, choose

EMBEDDED = "tiny"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FROM_HUB = ["model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*"]
_MAX_LAYERS = 1024
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.masked_bias$", r"\.attn\.bias$")  # on disk in old checkpoints, never read


class Found(NamedTuple):
    """Where a model lies: its folder, and the name of the GGUF file in it if it is one."""

    folder: Path
    gguf: str | None = None


def embedded() -> Path:
    """Folder of the small model that comes with the package."""
    return Path(__file__).resolve().parent.parent / "data" / EMBEDDED


def is_hub_id(model: str) -> bool:
    """Whether ``model`` has the form of a hub id and is nothing on this disk."""
    return bool(_HUB_ID.fullmatch(model)) and not Path(model).expanduser().exists()


def find(model: str, **hub: Any) -> Found:
    """The folder of MODEL; a hub id is downloaded (safetensors, JSON and tokenizer only) or taken from the hub's cache.

    ``hub``: options of the hub's client, such as ``revision`` and ``token``.

    Raises:
        CheckpointError: there is nothing of that name. IntegrationError: the hub refuses or cannot be reached.
    """
    if model == EMBEDDED:
        return Found(embedded())
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Found(path.parent, path.name)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.gguf"))
        if (path / CONFIG).exists() or not files:
            return Found(path)
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {len(files)} GGUF files; name one of {', '.join(files)}")
        return Found(path, files[0])
    if path.exists():
        raise CheckpointError(f"{path} is not a model; give a folder, a .gguf file, a hub id, or the word {EMBEDDED!r}")
    if not is_hub_id(model):
        raise CheckpointError(
            f"{model!r} does not exist; give a folder, a .gguf file, a hub id (name/model), or the word {EMBEDDED!r}"
        )
    return Found(_download(model, hub))


def _download(model: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_FROM_HUB, ignore_patterns=["*/*"], **hub))
    except Exception as error:  # the hub's client, its HTTP client and its cache each have their own errors
        raise IntegrationError(f"{model!r} is no folder here, and the hub did not give it: {_line(error)}") from error


def architecture(folder: Path, record: ModelSpec, *, check_names: bool = False, stored: bool = False) -> Architecture:
    """The layers and tensors of the model in ``folder``, from its config.json alone: nothing is allocated.

    Args:
        folder: holds config.json; weights are not looked at.
        record: says which layers are quantized, and how.
        check_names: refuse a pattern in ``record`` that names no layer.
        stored: ``record`` is what the folder holds, see `modules.choose`.

    Raises:
        CheckpointError, IntegrationError: config.json is damaged, or transformers does not know the model.
        SpecError: ``record`` does not fit the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = skeleton(folder)
    if check_names:
        check_patterns(model, record)
    choice = choose(model, record, stored=stored)
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mapping = get_model_conversion_mapping(cast(Any, model))
    mapping += mixtures.scale_converters(mapping)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", "")
    ignored = [*_OLD_BUFFERS, *_texts(getattr(model, "_keys_to_ignore_on_load_unexpected", None))]
    shapes = {name: tensors[name if name in choice.experts else f"{name}.weight"] for name in choice.specs}
    # names of scales and tables are not the dense model's; they go where their weight goes
    known = dict(tensors)
    known |= {part: () for name, shape in shapes.items() for part in tensor_names(name, shape)[1:]}

    def rename(name: str) -> tuple[str, bool]:
        if name in known:
            return name, False
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        return renamed, pattern is not None

    return Architecture(
        linears=shapes,
        specs=choice.specs,
        dense_linears=choice.dense,
        tensors=tensors,
        tied=dict(getattr(model, "all_tied_weights_keys", {})),
        rename=rename,
        ignored=lambda name: any(re.search(pattern, name) for pattern in ignored),
        left=choice.left,
    )


def skeleton(folder: Path) -> nn.Module:
    """The dense model of a folder on the meta device: all its modules, no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = read_json(inside(folder, CONFIG))
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        layers = part.get("num_hidden_layers", 1)
        if type(layers) is not int or not 0 <= layers <= _MAX_LAYERS:
            raise CheckpointError(
                f"{folder / CONFIG}: num_hidden_layers={layers!r} is not a number up to {_MAX_LAYERS}"
            )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except FluteError:
        raise
    except Exception as error:  # whatever a config.json of unknown origin makes transformers do
        raise IntegrationError(f"{folder / CONFIG}: transformers cannot build this model: {_line(error)}") from error


def validate(folder: Path) -> Report:
    """Check a checkpoint of flute strictly, from its headers, before anything is allocated.

    Raises:
        CheckpointError: one line with everything that is missing, superfluous, or of the wrong shape or dtype.
    """
    record = read_record(folder)
    return check(folder, record, architecture(folder, record, stored=True))


def is_quantized(folder: Path) -> bool:
    """Whether config.json has a quantization_config, of whatever method."""
    return read_json(inside(folder, CONFIG)).get("quantization_config") is not None


def is_flat(folder: Path) -> bool:
    """Whether it is a checkpoint of FlatQuant, which the loader itself checks strictly."""
    values = read_json(inside(folder, CONFIG)).get("quantization_config")
    return isinstance(values, dict) and values.get("quant_method") == FLATQUANT


def load(found: Found, *, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Model (in eval mode) and tokenizer; a checkpoint of flute is validated first.

    Args:
        found: from `find`.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the activations; None: the checkpoint's own.

    Raises:
        FluteError: the checkpoint is damaged, or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": dtype or "auto", "device_map": {"": device}}
    if found.gguf is not None:
        options |= {**_gguf_options(found), "dtype": dtype or torch.float16}
    elif is_quantized(found.folder) and not is_flat(found.folder):
        validate(found.folder)
    gguf = {} if found.gguf is None else {"gguf_file": found.gguf}
    try:
        # transformers' bar for unpacking GGUF knows no switch
        with redirect_stderr(io.StringIO()) if gguf else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(found.folder, trust_remote_code=False, **options)
        tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False, **gguf)
    except FluteError:
        raise
    except Exception as error:  # see skeleton
        raise IntegrationError(f"{found.folder}: transformers cannot load this model: {_line(error)}") from error
    return model.eval(), tokenizer


@contextmanager
def dense_folder(found: Found, beside: Path) -> Iterator[Path]:
    """A folder of safetensors for a dense model: the model's own, or one made from its GGUF file for the time being.

    A GGUF model is unpacked to float16 as a whole, in memory.

    Args:
        found: from `find`.
        beside: where a temporary folder may be made, on a disk with room for the float16 model.
    """
    if found.gguf is None:
        yield found.folder
        return
    model, tokenizer = load(found)
    vars(model).pop("_weight_conversions", None)  # those of GGUF; without them names on disk are the model's own
    with TemporaryDirectory(prefix=".from-gguf-", dir=beside) as folder:
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{folder} cannot be written: {why}; make room") from error
        del model, tokenizer
        yield Path(folder)


def _gguf_options(found: Found) -> dict[str, Any]:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise IntegrationError(f"{found.gguf}: reading GGUF needs one more package; run: pip install gguf") from None
    options: dict[str, Any] = {"gguf_file": found.gguf}
    try:
        from transformers import GgufConfig
    except ImportError:  # older transformers always unpack
        return options
    return {**options, "quantization_config": GgufConfig(dequantize=True)}


def _texts(patterns: Iterable[str] | None) -> list[str]:
    return [str(pattern) for pattern in patterns or ()]


def _line(error: Exception) -> str:
    """The first lines of another library's error as one short line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
