"""``save_pretrained`` and ``push_to_hub`` write the card, and nobody's own README.md is lost; the hub is a stand-in."""

import copy
import gc
import pickle
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flat_models import save
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from tiny_models import build, load, saved

from flute import FluteConfig, LutLinear
from flute.errors import CheckpointError, IntegrationError
from flute.flatquant.matrices import Matrices
from flute.flatquant.spec import FlatSpec
from flute.integrations import card, described, saving

QUALITY = {"text": "wiki", "perplexity": 12.34567, "windows": 3, "seq_len": 128, "dtype": "float32"}
REPO = "someone/small"
MINE = "---\nlicense: mit\n---\n# My model\n\nText of mine.\n"
HUBS = MINE + "of the hub"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("dense") / "model")


def quantized(dense: str, **options: Any) -> Any:
    return load(dense, quantization_config=FluteConfig(group_size=24, **options))


class Hub:
    """What the hub's client would upload; ``readme`` is what the repository has already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, readme: str | None = None) -> None:
        self.files: dict[str, bytes] = {}

        def load_card(source: Any, **keywords: Any) -> ModelCard:
            if readme is None:
                raise EntryNotFoundError("no README.md")
            return ModelCard(readme)

        def commit(api: HfApi, *, repo_id: str, operations: list[Any], **keywords: Any) -> str:
            assert repo_id == REPO
            self.files = {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}
            return "committed"

        monkeypatch.setattr(ModelCard, "load", load_card)
        monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **keywords: SimpleNamespace(repo_id=REPO))
        monkeypatch.setattr(HfApi, "create_commit", commit)

    @property
    def readme(self) -> str:
        return self.files["README.md"].decode()


def test_saving_writes_the_card_of_the_folder(dense: str, tmp_path: Path) -> None:
    for name, options in {
        "plain": {"overrides": {"*.down_proj": {"bits": 3}}},
        "custom": {"table": "custom", "table_values": [-1 + i / 8 for i in range(16)]},
    }.items():
        quantized(dense, **options).save_pretrained(tmp_path / name)
        written = (tmp_path / name / "README.md").read_text()
        assert written == card.text(described.of_folder(tmp_path / name), name)  # memory and headers say the same
        assert f"vllm serve {name}" in written and f'from_pretrained("{name}"' in written


def test_experts_are_counted_as_on_disk(tmp_path: Path) -> None:
    model = load(
        saved(tmp_path / "dense", "Mixtral", num_local_experts=3), quantization_config=FluteConfig(group_size=24)
    )
    model.save_pretrained(tmp_path / "small")
    found = described.of_model(model, tmp_path / "small")
    assert found == described.of_folder(tmp_path / "small")


def test_nobodys_readme_is_lost_in_a_folder(dense: str, tmp_path: Path) -> None:
    model, readme = quantized(dense), tmp_path / "README.md"
    readme.write_text(MINE)
    model.save_pretrained(tmp_path)
    assert readme.read_text() == MINE
    readme.unlink()
    model.save_pretrained(tmp_path)
    first = readme.read_text()
    model.save_pretrained(tmp_path)
    assert readme.read_text() == first
    edited = first.replace("How to run it", "How I run it")
    readme.write_text(edited)
    model.save_pretrained(tmp_path)
    assert readme.read_text() == edited


def test_pushing_uploads_the_card(dense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, model = Hub(monkeypatch), quantized(dense)
    saving.describe(model, base="someone/dense", quality=[QUALITY])
    assert model.push_to_hub(REPO, tags=["mine"]) == "committed"
    assert {"README.md", "config.json", "model.safetensors"} <= hub.files.keys()
    found = ModelCard(hub.readme)
    assert found.data.tags == ["flute", "4-bit", "quantized", "mine"]
    assert (found.data.base_model, found.data.library_name) == ("someone/dense", "transformers")
    assert "| wiki | 12.3457 | 3 x 128 | float32 |" in found.text and f'from_pretrained("{REPO}"' in found.text
    assert "More Information Needed" not in found.text


def test_bits_are_those_of_most_weights(dense: str, tmp_path: Path) -> None:
    # the spec that nothing uses has 4
    quantized(dense, overrides={"*_proj": {"bits": 3}}).save_pretrained(tmp_path)
    assert "3-bit" in described.of_folder(tmp_path).tags
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["flute", "3-bit", "quantized"]


def test_a_card_of_another_model_leaves_no_bits_behind(dense: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    quantized(dense).save_pretrained(tmp_path)
    readme.write_text(readme.read_text().replace("tags:", "tags:\n- mine"))
    quantized(dense, bits=3, table="nf3").save_pretrained(tmp_path)
    assert ModelCard.load(readme).data.tags == ["mine", "flute", "quantized", "3-bit"]


@pytest.mark.parametrize("metadata", ["foo: [1", "- a", "1: a", "model-index: 3"])
def test_metadata_that_cannot_be_kept_stay(metadata: str, dense: str, tmp_path: Path) -> None:
    model, readme = quantized(dense), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    ours = readme.read_text().replace("---\n", f"---\n{metadata}\n", 1)
    for owners in (f"---\n{metadata}\n---\nNot automatically generated.\n", ours):
        readme.write_text(owners)
        model.save_pretrained(tmp_path)
        assert readme.read_text() == owners


def test_what_the_hub_has_is_replaced_if_it_is_ours(dense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, model = Hub(monkeypatch), quantized(dense)
    model.push_to_hub(REPO)
    ours = hub.readme.replace("tags:", "license: mit\ntags:")
    hub = Hub(monkeypatch, ours)
    quantized(dense, overrides={"*": {"bits": 3}}).push_to_hub(REPO)
    assert ModelCard(hub.readme).data.license == "mit" and "| 14 | 3 |" in hub.readme
    hub = Hub(monkeypatch, MINE)
    model.push_to_hub(REPO)
    found = ModelCard(hub.readme)
    assert found.text == ModelCard(MINE).text and found.data.tags == ["flute", "4-bit", "quantized"]


@pytest.mark.parametrize(("there", "on_hub", "wanted"), [
    (None, None, "ours"), (MINE, None, "mine"), (None, HUBS, "the hub's"), (MINE, HUBS, "the hub's"),
])  # fmt: skip
def test_saving_and_pushing_at_once(
    there: str | None, on_hub: str | None, wanted: str, dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, model, readme = Hub(monkeypatch, on_hub), quantized(dense), tmp_path / "README.md"
    if there:
        readme.write_text(there)
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id=REPO)
    if wanted == "ours":
        assert f"# {REPO}" in hub.readme and readme.read_text() == hub.readme
    else:
        assert ("of the hub" in hub.readme) == (wanted == "the hub's") and "Text of mine" in hub.readme
        assert there is None or readme.read_text() == there


def test_a_template_that_was_filled_in_is_its_owners(dense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, plain = Hub(monkeypatch), build()
    plain.push_to_hub(REPO)  # a dense model: transformers' own card
    template = hub.readme
    assert "automatically generated" in template
    for there, stays in ((template, False), (template.replace("[More Information Needed]", "Me.", 1), True)):
        hub = Hub(monkeypatch, there)
        quantized(dense).push_to_hub(REPO)
        assert ("automatically generated" in hub.readme) == stays


def test_the_base_is_known_where_it_can_be(dense: str, tmp_path: Path) -> None:
    model = quantized(dense)
    model.save_pretrained(tmp_path / "small")
    card.write(described.of_folder(tmp_path / "small"), base="someone/dense", quality=[QUALITY])
    load(tmp_path / "small").save_pretrained(tmp_path / "again")
    again = ModelCard.load(tmp_path / "again" / "README.md")
    assert again.data.base_model == "someone/dense"
    assert "## Quality" not in again.text  # weights may have changed since: only what describe was told


def test_copies_pickles_and_dense_models(dense: str, tmp_path: Path) -> None:
    model = quantized(dense)
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.q_proj.scales.data.zero_()
    twin.save_pretrained(tmp_path / "twin")
    layer = load(tmp_path / "twin").model.layers[0].self_attn.q_proj
    assert isinstance(layer, LutLinear) and not layer.scales.any()  # it saved itself, not the first
    assert (tmp_path / "twin" / "README.md").exists()
    pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path / "pickled")
    assert (tmp_path / "pickled" / "README.md").exists()
    copy.copy(twin).save_pretrained(tmp_path / "shallow")
    assert (tmp_path / "shallow" / "README.md").exists()
    model.dequantize().save_pretrained(tmp_path / "dequantized")
    assert not (tmp_path / "dequantized" / "README.md").exists() and model.model_tags == []
    with pytest.raises(IntegrationError, match="was not quantized by flute"):
        saving.describe(model, base="someone/dense")
    with pytest.raises(CheckpointError, match="not what flute eval --json prints"):
        saving.describe(quantized(dense), quality=[{"perplexity": "good"}])


def test_a_deleted_model_is_free_at_once(dense: str) -> None:
    model = quantized(dense)
    held = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert held() is None
    finally:
        gc.enable()


def test_flatquant_has_a_card(tmp_path: Path) -> None:
    model, spec = build(), FlatSpec(down_bits=8)
    save(tmp_path / "flat", model, spec, [Matrices(), Matrices()])
    written = (tmp_path / "flat" / "README.md").read_text()
    assert ModelCard(written).data.tags == ["flute", "flatquant", "4-bit", "quantized"]
    assert "| 4 | 4 | 4 | 4 | 8 (weights and activations) |" in written and "vllm serve flat " in written
    size = (tmp_path / "flat" / "model.safetensors").stat().st_size
    assert f"{size / 1e6:,.1f} MB in all" in written
    again = load(tmp_path / "flat")
    again.save_pretrained(tmp_path / "flat2")
    second = (tmp_path / "flat2" / "README.md").read_text()
    assert re.sub(r"flat2|[0-9a-f]{16}", "", second) == re.sub(r"flat\b(?!q)|[0-9a-f]{16}", "", written)
