"""A loaded compressed model under what people run models with: compilers, autocast, adapters and so on."""

from pathlib import Path

import peft
import pytest
import torch
from test_checkpoint import Written, load, tokens
from test_pruned import Written as Pruned
from torch import Tensor

from aasvd.formats import FORMATS
from aasvd.fusion import fuse, unfuse
from aasvd.latents import LatentCache
from aasvd.pruned import PrunedLinear


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def expected(written: Written) -> Tensor:
    model = load(written.folder)
    unfuse(model)
    with torch.no_grad():
        return model(tokens()).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    # The same sums in another order, through two layers.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("gradients", [False, True])
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
    assert model.model.layers[0].mlp.up_proj.v.dtype == torch.float32
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


def test_latent_cache_of_offloaded_weights(written: Written, tmp_path: Path) -> None:
    model = load(written.folder, device_map=PARTLY_ON_DISK, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="weights of attention layer 1 of LlamaForCausalLM are offloaded"):
        LatentCache(model)


def lora() -> peft.LoraConfig:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=True)
    compressed = [*FORMATS.values(), PrunedLinear]
    config._register_custom_module({layer: peft.tuners.lora.Linear for layer in compressed})
    return config


@pytest.mark.parametrize("storage", [*FORMATS, "pruned"])
def test_lora_adapter_trains(storage: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pruned = storage == "pruned"
    written = Pruned(tmp_path, "llama") if pruned else Written(tmp_path, "llama", storage=storage)
    with torch.no_grad():
        expected = load(written.folder)(tokens()).logits
    model = peft.get_peft_model(load(written.folder), lora())
    codes = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        assert_close(model(tokens()).logits, expected)  # the adapter begins as nothing
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(20):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if "lora_" in name}
    # Beside linears that are gone, such as keys to a query, an adapter has no effect.
    assert changed <= adapters if pruned else changed == adapters
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers())
    assert len(adapters) == 2 * 3 * 2  # A and B, three linears, two blocks
    trained = model.eval()(tokens()).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(written.folder), tmp_path / "adapter", config=lora())
    assert_close(again(tokens()).logits.detach(), trained)
