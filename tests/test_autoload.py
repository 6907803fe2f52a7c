"""A program that never imports flute loads flute's checkpoints; a broken flute does not break `import torch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import load, saved

from flute import FluteConfig, __version__

ROOT = Path(__file__).resolve().parent.parent

LOAD = """
import sys, torch
print(sorted(name for name in sys.modules if name.split(".")[0] in ("flute", "transformers")))
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(torch.arange(3, 10)[None]).logits
print(type(model.model.layers[0].mlp.up_proj).__name__, float(logits.detach().double().sum()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("autoload")
    model = load(saved(base / "dense"), quantization_config=FluteConfig(group_size=32))
    model.save_pretrained(base / "quantized")
    return base / "quantized"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installation leaves in site-packages besides the code: metadata with the entry point."""
    site = tmp_path_factory.mktemp("site")
    info = site / f"flute_engine-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flute-engine\nVersion: {__version__}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nflute = flute._autoload:register\n")
    (info / "top_level.txt").write_text("flute\n")
    return site


def python(code: str, *arguments: object, paths: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FLUTE_NO")}
    path = os.pathsep.join(map(str, paths))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**inherited, "PYTHONPATH": os.pathsep.join([path, inherited.get("PYTHONPATH", "")]), **environment},
        cwd=paths[0],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_fresh_process_without_import(folder: Path, installed: Path) -> None:
    import torch

    found = python(LOAD, folder, paths=[installed, ROOT])
    assert found.returncode == 0, found.stderr
    modules, answer = found.stdout.splitlines()
    light = ["", "._autoload", ".errors", ".integrations", ".integrations.distribution", ".settings"]
    assert modules == str([f"flute{name}" for name in light])  # nothing heavy is imported by the hook
    kind, total = answer.split()
    assert kind == "LutLinear"
    expected = load(folder)(torch.arange(3, 10)[None]).logits.detach().double().sum()
    assert float(total) == pytest.approx(float(expected))


def test_off_switch(folder: Path, installed: Path) -> None:
    code = (
        "import torch, transformers.quantizers.auto as auto; import flute; "
        "print('flute' in auto.AUTO_QUANTIZER_MAPPING); import flute.integrations.huggingface; "
        "print('flute' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    switched_off = python(code, paths=[installed, ROOT], FLUTE_NO_AUTOREGISTER="1")
    assert switched_off.stdout.split() == ["False", "True"], switched_off.stderr  # an explicit import is explicit


ORDERS = {
    # torch, and with it the hook, comes while transformers.quantizers is half imported
    "transformers first": "import transformers.quantizers, torch, transformers.modeling_utils",
    "twice": "import torch, flute._autoload as a; a.register(); a.register(); import transformers.quantizers, flute",
    "integration first": "import flute.integrations.huggingface",
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports(order: str, installed: Path) -> None:
    check = """
import json, sys
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
import transformers.quantizers as q
print(json.dumps([AUTO_QUANTIZER_MAPPING["flute"].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING["flute"].__name__,
    type(q.__loader__).__name__, type(q.__spec__.loader).__name__,
    sum(type(finder).__module__ == "flute._autoload" for finder in sys.meta_path)]))
"""
    found = python(f"{ORDERS[order]}\n{check}", paths=[installed, ROOT])
    assert found.returncode == 0, found.stderr
    *names, loader, spec_loader, finders = json.loads(found.stdout.splitlines()[-1])
    assert names == ["FluteHfQuantizer", "FluteConfig"]
    assert "_Loader" not in (loader, spec_loader) and finders <= 1
    assert "could not register" not in found.stderr


def test_a_broken_flute_does_not_break_torch(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "flute").mkdir()
    (tmp_path / "flute" / "__init__.py").write_text("")
    (tmp_path / "flute" / "settings.py").write_text("raise RuntimeError('broken')\n")
    (tmp_path / "flute" / "_autoload.py").write_text((ROOT / "flute" / "_autoload.py").read_text())
    found = python("import torch, transformers.quantizers; print('fine')", paths=[tmp_path, installed])
    assert found.stdout.strip() == "fine" and "flute could not register" in found.stderr


def test_lm_eval_command_line(folder: Path, installed: Path, tmp_path: Path) -> None:
    """The command line of another project, unaided, on a task of our own that needs no network."""
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(96)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=" ", pad_token=" ").save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the quick brown fox\njumps over the lazy dog\n")
    (tmp_path / "ours.yaml").write_text(f"""\
task: ours
dataset_path: text
dataset_kwargs:
  data_files:
    test: {tmp_path}/text.txt
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
""")
    code = (  # lm-eval's own fourteen thousand tasks take it 15 seconds to read
        "from functools import partial; from lm_eval import tasks; "
        "tasks.TaskManager = partial(tasks.TaskManager, include_defaults=False); "
        "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    found = python(
        code, "--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", "ours", "--include_path", tmp_path,
        "--device", "cpu", "--batch_size", "2", "--output_path", tmp_path / "out",
        paths=[installed, ROOT], HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(report.read_text())["results"]["ours"]["word_perplexity,none"] > 1
