"""A loaded compressed model under what people run models with: compilers, autocast, adapters and so on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_checkpoint import Written, load, tokens
from test_pruned import Written as Pruned
from torch import Tensor, nn
from transformers import PreTrainedModel

from aasvd.export import merge
from aasvd.formats import FORMATS
from aasvd.fusion import fuse, unfuse
from aasvd.latents import LatentCache


@pytest.fixture(scope="module", params=list(FORMATS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("llama"), "llama", storage=request.param)


@pytest.fixture(scope="module")
def expected(written: Written) -> Tensor:
    model = load(written.folder)
    unfuse(model)
    with torch.no_grad():
        return model(tokens()).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    # The same sums in another order, through two layers.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("written", "gradients"),
    [*((storage, False) for storage in FORMATS), ("factors", True), ("pivoted", True)],
    indirect=["written"],
)
def test_compiles_as_one_graph(written: Written, expected: Tensor, gradients: bool) -> None:
    model = load(written.folder)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(gradients):
        assert_close(compiled(tokens(), use_cache=False).logits.detach(), expected)
        # One token takes the matrix-vector product outside compilers.
        assert_close(compiled(tokens()[:1, :1], use_cache=False).logits.detach(), expected[:1, :1])


def test_exports(written: Written, expected: Tensor) -> None:
    model = load(written.folder)
    program = torch.export.export(model, (tokens(),), {"use_cache": False})
    assert_close(program.module()(tokens(), use_cache=False).logits.detach(), expected)


@pytest.mark.parametrize("prompt", [tokens(), tokens()[:1, :1]], ids=["many tokens", "one token"])
def test_autocast(written: Written, prompt: Tensor) -> None:
    model = load(written.folder)
    with torch.no_grad():
        exact = model(prompt).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(prompt).logits
    assert found.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    # A dozen roundings of numbers below about 4 in a row, of which none is lost.
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=20 * torch.finfo(torch.bfloat16).eps)


def test_gradient_checkpointing(written: Written) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(written.folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


PARTLY_ON_DISK = {
    **dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    ),
    "model.layers.1": "disk",
}


@pytest.mark.parametrize("storage", list(FORMATS))
def test_buffers_are_offloaded_when_asked(storage: str, tmp_path: Path) -> None:
    written = Written(tmp_path, "llama", storage=storage)
    with torch.no_grad():
        expected = load(written.folder)(tokens()).logits
        for buffers in (False, True):
            model = load(
                written.folder,
                device_map=PARTLY_ON_DISK,
                offload_folder=tmp_path / "offload",
                offload_buffers=buffers,
            )
            block = model.model.layers[1].mlp.up_proj
            assert all(parameter.is_meta for parameter in block.parameters())
            assert all(buffer.is_meta == buffers for buffer in block.buffers())
            assert_close(model(tokens()).logits, expected)


@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, PARTLY_ON_DISK],
    ids=["auto", "cpu", "partly on disk"],
)
def test_device_map(written: Written, expected: Tensor, device_map: object, tmp_path: Path) -> None:
    model = load(written.folder, device_map=device_map, offload_folder=tmp_path)
    with torch.no_grad():
        assert_close(model(tokens().to(model.device)).logits.cpu(), expected)
        if device_map is PARTLY_ON_DISK:
            # Those that lie on disk between calls are left alone, also when asked.
            fuse(model)
            assert_close(model(tokens()).logits, expected)


# Codes are not offloaded unless asked.
@pytest.mark.parametrize("written", ["factors", "pivoted"], indirect=True)
def test_latent_cache_of_offloaded_weights(written: Written, tmp_path: Path) -> None:
    model = load(written.folder, device_map=PARTLY_ON_DISK, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="weights of attention layer 1 of LlamaForCausalLM are offloaded"):
        LatentCache(model)


TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(model: PreTrainedModel, **changes: Any) -> peft.PeftModel:
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **changes}))


def train(model: nn.Module) -> list[float]:
    """Train what a model says is to be trained for 20 steps, and return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(20):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.filterwarnings("error:Unsupported layer type")
@pytest.mark.parametrize("storage", [*FORMATS, "pruned"])
def test_lora_adapter_trains(storage: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pruned = storage == "pruned"
    written = Pruned(tmp_path, "llama") if pruned else Written(tmp_path, "llama", storage=storage)
    with torch.no_grad():
        expected = load(written.folder)(tokens()).logits
    model = adapted(load(written.folder))
    codes = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        assert_close(model(tokens()).logits, expected)  # the adapter begins as nothing
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if "lora_" in name}
    # Beside linears that are gone, such as keys to a query, an adapter has no effect.
    assert changed <= adapters if pruned else changed == adapters
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers())
    assert len(adapters) == 2 * 3 * 2  # A and B, three linears, two blocks
    trained = model(tokens()).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    for again in (
        peft.PeftModel.from_pretrained(load(written.folder), tmp_path / "adapter"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),  # opens the base model itself
    ):
        assert torch.equal(again(tokens()).logits.detach(), trained)
    with model.disable_adapter():
        assert_close(model(tokens()).logits.detach(), expected)
    assert_close(model.unload()(tokens()).logits.detach(), expected)


@pytest.mark.parametrize("storage", ["factors", "pivoted", "factors-int8", "pruned"])
def test_lora_of_all_linears(storage: str, tmp_path: Path) -> None:
    """One linear is left dense; neither the output layer nor what an adapter is made of is adapted."""
    pruned = storage == "pruned"
    arguments = {} if pruned else {"storage": storage, "keep_dense": 1}
    written = (Pruned if pruned else Written)(tmp_path, "llama", **arguments)
    model = adapted(load(written.folder), target_modules="all-linear")
    # A second adapter meets the first one's layers.
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
    for adapter in ("default", "second"):
        layers = {
            name.removeprefix("base_model.model.")
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer) and adapter in module.lora_A
        }
        assert layers == set(written.linears)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_lora_that_looks_at_the_weight_is_refused(written: Written, option: dict[str, Any]) -> None:
    message = "there is no weight to look at"
    with pytest.raises(ValueError, match=message):
        adapted(load(written.folder), **option)
    model = adapted(load(written.folder), init_lora_weights="gaussian")
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", peft.LoraConfig(target_modules=TARGETS, **option))


def test_lora_by_transformers_own_call(written: Written) -> None:
    model = load(written.folder)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS))
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]


def test_lora_is_merged_into_the_dense_model_only(written: Written, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(load(written.folder), init_lora_weights=False)
    expected = model(tokens()).logits.detach()
    with pytest.raises(ValueError, match=r"cannot be merged .*make the model dense first"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    merge(written.folder, tmp_path / "dense")
    dense = peft.PeftModel.from_pretrained(load(tmp_path / "dense"), tmp_path / "adapter").merge_and_unload()
    assert_close(dense(tokens()).logits.detach(), expected)


@pytest.mark.parametrize("first", ["import aasvd, peft", "import peft, aasvd"])
def test_lora_knows_compressed_linears_in_any_order(first: str) -> None:
    check = (
        "from peft import LoraConfig, inject_adapter_in_model\n"
        "from torch import nn\n"
        "from aasvd.lowrank import LowRankLinear\n"
        "model = nn.Sequential(LowRankLinear(6, 5, 2, bias=False))\n"
        "inject_adapter_in_model(LoraConfig(target_modules='all-linear'), model)\n"
        "assert type(model[0]).__name__ == 'CompressedLoraLinear', model\n"
    )
    done = subprocess.run([sys.executable, "-c", f"{first}\n{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
