"""Stock PEFT on quantized models: training, saving adapters, merging."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load, prompt, saved

from flute import FluteConfig, LutLinear, QuantSpec
from flute.errors import IntegrationError
from flute.zero_points import lut_linear

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("peft")
    load(saved(base / "dense"), quantization_config=FluteConfig(group_size=32)).save_pretrained(base / "quantized")
    return base / "quantized"


def adapted(folder: Path, *, mergeable: bool = False, **keywords: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **keywords)
    if mergeable:
        from flute.integrations.peft import mergeable as made_mergeable

        config = made_mergeable(config)
    return peft.get_peft_model(load(folder), config)


def train(model: Any, steps: int = 8, autocast: bool = False) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(prompt(), labels=prompt()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_lora_trains_saves_and_loads(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    base = model.get_base_model()
    codes = base.model.layers[0].mlp.up_proj.base_layer.weight.clone()
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(base.model.layers[0].mlp.up_proj.base_layer.weight, codes)
    assert all("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    assert torch.equal(again(prompt()).logits, model.eval()(prompt()).logits)


def test_the_usual_preparation_and_autocast(folder: Path) -> None:
    model = peft.prepare_model_for_kbit_training(load(folder, dtype=torch.bfloat16), use_gradient_checkpointing=False)
    assert model.model.layers[0].mlp.up_proj.scales.dtype == torch.float32
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    losses = train(model, steps=4, autocast=True)
    assert losses[-1] < 0.8 * losses[0]
    assert train(model, steps=1)[0] < losses[-1]  # float32 throughout


@pytest.mark.parametrize("reentrant", [None, True])
def test_our_preparation(reentrant: bool | None, folder: Path) -> None:
    """16 bits without autocast, recomputed activations, every linear layer: loss falls, gradients are the same."""
    from flute.integrations.peft import prepare_model_for_kbit_training

    settings = None if reentrant is None else {"use_reentrant": reentrant}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    models = []
    for checkpointing in (True, False):
        torch.manual_seed(0)
        base = prepare_model_for_kbit_training(load(folder, dtype=torch.bfloat16), checkpointing, settings)
        assert base.is_gradient_checkpointing == checkpointing
        assert base.model.layers[0].mlp.up_proj.scales.dtype == torch.bfloat16
        models.append(peft.get_peft_model(base, config).train())
        models[-1](prompt(), labels=prompt()).loss.backward()
    first, second = ([p.grad for p in model.parameters() if p.requires_grad] for model in models)
    assert len(first) == len(second) == 2 * 14
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    losses = train(models[0])
    assert losses[-1] < 0.5 * losses[0]


def test_other_kinds_of_adapter(folder: Path) -> None:
    from flute.integrations.peft import mergeable

    for keywords in ({"use_rslora": True}, {"init_lora_weights": "gaussian"}):
        losses = train(adapted(folder, **keywords))
        assert losses[-1] < 0.8 * losses[0]
    ada = peft.AdaLoraConfig(target_modules=TARGETS, total_step=50, task_type="CAUSAL_LM")
    losses = train(peft.get_peft_model(load(folder), ada))  # adds to the layer's output in place
    assert losses[-1] < losses[0]
    dora = peft.LoraConfig(target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(IntegrationError, match="needs the dense weight in every step"):
        peft.get_peft_model(load(folder), mergeable(dora))
    trained = train(peft.get_peft_model(load(folder).dequantize(), dora))
    assert trained[-1] < 0.8 * trained[0]


def test_gradients_are_those_of_the_dense_model(folder: Path) -> None:
    gradients = []
    for model in (load(folder), load(folder).dequantize()):
        embedded = model.get_input_embeddings()(prompt()).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=prompt()).loss.backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:merging quantizes")
@pytest.mark.parametrize(("own_class", "rslora"), [(False, False), (True, True)])
def test_merge(own_class: bool, rslora: bool, folder: Path, tmp_path: Path) -> None:
    from flute.integrations.peft import merge_and_unload

    model = adapted(folder, mergeable=own_class, use_rslora=rslora)
    train(model)
    before = load(folder)(prompt()).logits
    wanted = model.eval()(prompt()).logits
    merged = model.merge_and_unload() if own_class else merge_and_unload(model)
    assert isinstance(merged.model.layers[0].mlp.up_proj, LutLinear)
    assert not any("lora" in name for name, _ in merged.named_modules())
    found = merged(prompt()).logits
    assert (found - wanted).norm() < 0.5 * (before - wanted).norm()  # rounded again, but much nearer than without
    merged.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(prompt()).logits, found)


@pytest.mark.filterwarnings("ignore:merging quantizes")
def test_what_cannot_be_merged_is_refused(folder: Path) -> None:
    from flute.integrations.peft import merge_and_unload

    model = adapted(folder, lora_bias=True)
    with pytest.raises(IntegrationError, match="not plain LoRA"):
        merge_and_unload(model)
    stock = adapted(folder)
    codes = stock.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = codes.clone()
    with pytest.raises(RuntimeError):  # torch's own words: this is PEFT's code, before ours is asked
        stock.merge_and_unload()
    assert torch.equal(codes, before)
    other = peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(IntegrationError, match=r"q_proj': ia3 is no LoRA, which alone is merged"):
        merge_and_unload(peft.get_peft_model(load(folder), other))
    layer = adapted(folder, mergeable=True).base_model.model.model.layers[0].mlp.up_proj
    with pytest.raises(IntegrationError, match="cannot be unmerged"):
        layer.unmerge()


@pytest.mark.filterwarnings("ignore:merging quantizes")
@pytest.mark.parametrize("own_class", [False, True])
def test_layers_with_zero_points_take_no_adapters(own_class: bool, folder: Path) -> None:
    from flute.integrations.peft import merge_and_unload

    model = adapted(folder, mergeable=own_class)
    lora = model.base_model.model.model.layers[0].self_attn.q_proj
    spec = QuantSpec(4, 32, "int4", zero_points=True)
    lora.base_layer = lut_linear(lora.base_layer.in_features, lora.base_layer.out_features, spec)
    with pytest.raises(IntegrationError, match=r"has zero points.*keep the adapter apart"):
        model.merge_and_unload() if own_class else merge_and_unload(model)
