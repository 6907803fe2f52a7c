"""Every command and example in README.md and docs/ runs here, or is listed below with the reason why it cannot.

A page is run from top to bottom in a folder where files lie under the names that pages use (MODEL, wiki.test.raw, ...):
commands as they stand, Python in one namespace, so that what a block makes the next may use. Of what is not run every
option and every imported name must exist. A new block is run unless it is listed; a listed one that is gone fails, too.
"""

import ast
import importlib
import importlib.util
import pydoc
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import foreign
import pytest
import torch
import typer
from tiny_models import build
from transformers import AutoTokenizer

from flute.cli import app, main
from flute.integrations.folders import embedded

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LINKING = {**PAGES, **{name: ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}}
SIZES = {"vocab_size": 4096, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "intermediate_size": 128,
         "num_hidden_layers": 1, "max_position_embeddings": 2048}  # fmt: skip
TEXTS = ("wiki.train.raw", "wiki.test.raw", "valid.txt", "book.md")
GONE = {  # named as what is no more, or never was here
    "flute.NUM_SMS", "flute.qgemm_simple", "flute.TEMPLATE_CONFIGS", "flute.packbits_utils",
    "flute.utils.get_template_config", "flute.integrations.base.FluteLinear", "benchmarks/quality_smollm.py",
    "benchmarks/kernel_speed.py",
}  # fmt: skip
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

INSTALLS = "changes what is installed"
WHOLE = "CI's own commands: .ci/run"
GPU = "needs a GPU"
HUB = "downloads from the hub"
VLLM = "needs vLLM; tests/test_vllm.py starts servers"
EXCERPT = "goes on with a model of the reader's; the whole stands in docs/migration.md"
OWNER = "needs bitsandbytes, which is not among the packages of the tests; is run where it is installed"
HOURS = "quantizes some thirty times, each in a process of its own; tests/test_quality.py makes single rows"

NOT_RUN: dict[str, dict[str, str]] = {
    "README.md": {
        "python3 dev.py demo": WHOLE,
        "python3 dev.py test": WHOLE,
        "pip install bitsandbytes humming-kernels gemlite": INSTALLS,
        "flute bench kernel -o kernel.csv --plot": GPU,
        "flute bench model -o model.csv --plot": GPU,
        "pip install .": INSTALLS,
        "pip install '.[cuda]'": INSTALLS,
        "flute tune OUT": GPU,
        "flute bench kernel": GPU,
        "flute bench quality MODEL --text wiki.test.raw --plot": HOURS,
    },
    "docs/choosing.md": {
        "flute bench quality MODEL --text wiki.test.raw --calibration valid.txt -o quality.csv --plot": HOURS,
    },
    "docs/convert.md": {
        "from flute.integrations.huggingface import from_pretrained": HUB,
        "from flute.integrations.base import prepare_model_flute": EXCERPT,
    },
    "docs/flatquant.md": {
        "python -m benchmarks.flatquant_accuracy SMOLLM2 --calibration valid.txt --text wiki.test.raw --device cuda "
        "--amp": GPU,
        "flute bench model --methods dense,flatquant,flatquant-w4a8kv4 --batch 1,16,64 --prompts 1,2048": GPU,
        "python -m benchmarks.flatquant_calibration --layers 3 --amp --device cuda -o flatquant_calibration.csv": GPU,
    },
    "docs/migration.md": {"from transformers import BitsAndBytesConfig": OWNER},
    "docs/quality.md": {
        "flute bench quality MODEL --text wiki.test.raw --second-text book.md --calibration valid.txt --device cuda "
        "-o quality.csv --plot": GPU,
    },
    "docs/quickstart.md": {"pip install .": INSTALLS, "vllm serve OUT": VLLM, "pip install '.[peft]'": INSTALLS},
    "docs/serving.md": {
        "vllm serve DIR": VLLM,
        "vllm serve DIR --tensor-parallel-size 2": VLLM,
        "flute flatquant MODEL -o FLAT --calibration wiki.train.raw --preset w4a8kv4": "is run in docs/flatquant.md",
        "vllm serve FLAT": VLLM,
    },
    "docs/transformers-higgs.md": {"from transformers import AutoModelForCausalLM, HiggsConfig": GPU},
    "docs/tuning.md": {
        "flute tune MODEL": GPU,
        "flute tune --shapes 4096x4096,14336x4096 --bits 4,3 -m 1,8,64": GPU,
    },
}


class Unit(NamedTuple):
    """One command, or one block of Python, and where it begins."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return self.text.splitlines()[0].rstrip(" \\")

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text.replace("\\\n", " "))

    def check(self) -> None:
        """What can be said without running it."""
        if self.language == "python":
            check_imports(self.text)
        else:
            check_words(self.words)


def units(page: str) -> Iterator[Unit]:
    """What is to be run on a page, in order."""
    text = PAGES[page].read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    assert text.count("```") == 2 * len(blocks), f"{page}: a block begins at a line's start and names its language"
    for block in blocks:
        line, (language, body) = text.count("\n", 0, block.start()) + 2, block.groups()
        assert language in ("sh", "python", "json", "text"), f"{page}:{line}: {language} is not run; name sh or python"
        if language == "python":
            yield Unit(page, line, language, body)
        for command in re.finditer(r"^((?:.*\\\n)*.*)$", body, re.MULTILINE) if language == "sh" else ():
            told = re.sub(r"(^|\s+)# .*", "", command[0])
            if told.strip():
                yield Unit(page, line + body.count("\n", 0, command.start()), language, told)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages name: a random model with the embedded one's tokenizer, a text, a GPTQ checkpoint."""
    place = tmp_path_factory.mktemp("docs")
    build("Llama", torch.float16, **SIZES).save_pretrained(place / "MODEL")
    AutoTokenizer.from_pretrained(embedded()).save_pretrained(place / "MODEL")
    text = (embedded() / "heldout.txt").read_text(encoding="utf-8")
    for name in TEXTS:
        (place / name).write_text(text[:9000], encoding="utf-8")

    def layer(name: str, linear: torch.nn.Linear) -> foreign.Parts:
        q, z, s, _ = foreign.integers(*linear.weight.shape, 64, 4, [8])
        return foreign.gptq(q, z, s, 4)

    foreign.checkpoint(place / "SOURCE", layer, {"quant_method": "gptq", "bits": 4, "group_size": 64})
    (place / "examples").symlink_to(ROOT / "examples")
    (place / "quality.csv").symlink_to(ROOT / "benchmarks/results/quality_tiny_cpu.csv")
    return place


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": page}
    for unit in units(page):
        where = f"{page}:{unit.line}: {unit.name}"
        print(where)
        reason = NOT_RUN.get(page, {}).get(unit.name)
        if reason and not (reason is OWNER and importlib.util.find_spec("bitsandbytes")):
            unit.check()
        elif unit.language == "python":
            exec(compile("\n" * (unit.line - 1) + unit.text, PAGES[page], "exec"), namespace)
        else:
            assert run(unit.words, monkeypatch) in (None, 0), where


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code of a command, run in this process."""
    try:
        if words[0] == "flute":
            main(words[1:])
        assert words[0] == "python", f"{words[0]} is not run here: list it with the reason"
        monkeypatch.setattr(sys, "argv", words[2:] if words[1] == "-m" else words[1:])
        run_python = runpy.run_module if words[1] == "-m" else runpy.run_path
        run_python(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code


def check_words(words: list[str]) -> None:
    """A command that is not run: each option of ours is one, each of our scripts is there."""
    if words[0] == "flute":
        command, rest = command_of(words[1:])
        command.make_context("flute", rest)
    scripts = [word for word in words if word.endswith(".py")]
    if words[:2] == ["python", "-m"]:
        scripts.append(words[2].replace(".", "/") + ".py")
    assert all((ROOT / script).exists() for script in scripts), words


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words begin with, and the words behind it."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"flute has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check_imports(text: str) -> None:
    """A block that is not run: it is Python, and what it imports of packages that are here exists."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and importlib.util.find_spec(node.module.split(".")[0]):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", NOT_RUN)
def test_what_is_listed_is_on_the_page(page: str) -> None:
    found = [unit.name for unit in units(page)]
    assert {name: found.count(name) for name in NOT_RUN[page]} == dict.fromkeys(NOT_RUN[page], 1)


@pytest.mark.parametrize("page", LINKING)
def test_what_a_page_names_exists(page: str) -> None:
    """Relative links; in running text our commands with their options, names in Python, files."""
    text = LINKING[page].read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        path = LINKING[page].parent / target if target else LINKING[page]
        assert path.exists(), target
        assert not anchor or anchor in headings(path), f"{target}#{anchor}"
    for span in re.findall(r"`flute\s+([a-z][^`]*)`", text):
        parameters = command_of(span.split())[0].params
        options = {option for parameter in parameters for option in parameter.opts + parameter.secondary_opts}
        unknown = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", span)) - options
        assert not unknown, f"flute {span}: {unknown}"
    names = set(re.findall(r"`(flute(?:\.\w+)+)[`(]", text))
    files = set(re.findall(r"`((?:flute|benchmarks|docs|examples|tests|training)/[\w./-]+\.\w+)`", text))
    absent = {name for name in names if pydoc.locate(name) is None} | {f for f in files if not (ROOT / f).exists()}
    assert absent <= GONE, absent - GONE


def headings(path: Path) -> set[str]:
    """Names by which links reach the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/index.md"].read_text(encoding="utf-8")))
    assert {path.name for path in PAGES.values()} - linked == {"README.md", "index.md"}
