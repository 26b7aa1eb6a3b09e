import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from architectures import TINY
from safetensors.torch import load_model, save_model
from test_checkpoint import Written, files, load, tokens
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aasvd.formats import FORMATS
from aasvd.fusion import Stacked, fuse, unfuse
from aasvd.latents import LatentCache
from aasvd.lowrank import CompressedLinear, LowRankLinear

# What each architecture's blocks share, nothing where projections are fused already.
SHARED = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"]],
    "phi3": [],
    # Attention and feed-forward read the outputs of different norms.
    "gpt_neox": [],
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("llama"), "llama")


def layers(model: PreTrainedModel) -> dict[str, CompressedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


@pytest.mark.parametrize("architecture", list(TINY))
def test_groups_are_found_in_every_model(architecture: str, tmp_path: Path) -> None:
    model = load(Written(tmp_path, architecture).folder)
    found = [[name.rpartition(".")[2] for name in names] for names in fuse(model)]
    assert found == SHARED.get(architecture, SHARED["llama"]) * model.config.num_hidden_layers
    fused = logits(model), logits(model, tokens()[:1, :1])
    unfuse(model)
    # The same sums in another order.
    torch.testing.assert_close(fused, (logits(model), logits(model, tokens()[:1, :1])), rtol=0, atol=2e-5)


def test_loading_fuses_and_saving_gives_the_same_bytes(llama: Written, tmp_path: Path) -> None:
    model = load(llama.folder)
    shared = {name.rpartition(".")[2] for name, layer in layers(model).items() if layer.shared is not None}
    assert shared == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == files(llama.folder)
    # Nothing is stored twice: what the parameters need is what their memory holds.
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())


def refused(*_arguments: object, **_keywords: object) -> None:
    raise RuntimeError("only on accelerators")


@pytest.mark.parametrize("storage", list(FORMATS))
def test_training_states_are_whole(storage: str, tmp_path: Path) -> None:
    """Savers that keep one of several tensors in one storage lose none, and load again."""
    written = Written(tmp_path / "written", "llama", storage=storage)
    model = load(written.folder)
    expected = logits(model)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    save_model(model, str(tmp_path / "model.safetensors"))
    for restore in (
        lambda: accelerator.load_state(str(tmp_path / "state")),
        lambda: load_model(model, tmp_path / "model.safetensors"),
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        assert not torch.equal(logits(model), expected)
        restore()
        assert torch.equal(logits(model), expected)
    # A missing tensor with numbers is as bad as ever.
    state = model.state_dict()
    del state[next(name for name, tensor in state.items() if "q_proj" in name and tensor.numel())]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


@pytest.mark.parametrize("storage", ["factors", "pivoted-int8"])
def test_loading_needs_no_kernel_of_attention(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with flash attention on a CPU: the model is opened there and moved before it is called."""
    written = Written(tmp_path, "llama", storage=storage)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "refusing", refused)
    model = load(written.folder, attn_implementation="refusing")
    assert model.config._attn_implementation == "refusing"
    assert len(fuse(model)) == (4 if storage == "factors" else 0)
    with pytest.raises(RuntimeError, match="only on accelerators"):
        logits(model)
    model.set_attn_implementation("eager")
    assert torch.isfinite(logits(model)).all()


def pair() -> tuple[LowRankLinear, LowRankLinear, Stacked]:
    generator = torch.Generator().manual_seed(0)
    made = [
        LowRankLinear.from_factors(
            torch.randn(6, rank, generator=generator), torch.randn(rank, 8, generator=generator)
        )
        for rank in (3, 2)
    ]
    return *made, Stacked(made)


@torch.no_grad()
def test_one_product_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = pair()
    calls = []
    product = torch.nn.functional.linear
    monkeypatch.setattr("aasvd.fusion.product", lambda x, w: calls.append(w.shape) or product(x, w))
    x = torch.randn(4, 8)
    torch.testing.assert_close(first(x), x @ first.dense().T)
    torch.testing.assert_close(second(x), x @ second.dense().T)
    assert calls == [(5, 8)]


@torch.no_grad()
def test_what_is_remembered_is_never_stale() -> None:
    first, second, _ = pair()
    x = torch.randn(4, 8)
    first(x)
    x.mul_(2)
    torch.testing.assert_close(second(x), x @ second.dense().T)
    first(x)
    torch.testing.assert_close(second(x + 1), (x + 1) @ second.dense().T)
    for layer in (first, second):
        first(x)
        # The stack is the same memory, but its latents were computed before.
        layer.v.mul_(3)
        torch.testing.assert_close(layer(x), x @ layer.dense().T)
    with torch.inference_mode():
        first(x)
        second.v.mul_(3)
        torch.testing.assert_close(second(x), x @ second.dense().T)


@torch.inference_mode()
def test_layers_made_in_inference_mode_compute_their_own() -> None:
    first, _, _ = pair()
    x = torch.randn(4, 8)
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()
        for _ in range(2):
            torch.testing.assert_close(first(x), x @ first.dense().T)
            with torch.inference_mode():
                first.v.mul_(3)  # of which its version says nothing


@torch.no_grad()
def test_activations_are_let_go() -> None:
    first, second, stacked = pair()
    x = torch.randn(4, 8)
    first(x)
    assert stacked._latest is not None
    second(x)
    assert stacked._latest is None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "v", torch.nn.Parameter(2 * layer.v.detach())),
        lambda layer: setattr(layer.v, "data", 2 * layer.v.data),
        lambda layer: layer.to(torch.float64),
        lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}, assign=True),
    ],
)
def test_replaced_parameters_are_used(change) -> None:
    first, second, _ = pair()
    change(second)
    with torch.no_grad():
        for layer in (first, second):
            x = torch.randn(4, 8, dtype=layer.v.dtype)
            first(x.to(first.v.dtype))
            torch.testing.assert_close(layer(x), x @ layer.dense().T)
    assert second.shared is None or first.shared is None


def test_gradients_reach_every_factor(llama: Written) -> None:
    model = load(llama.folder)
    reference = load(llama.folder)
    unfuse(reference)
    for each in (model, reference):
        each(tokens(), labels=tokens()).loss.backward()
    for (name, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name


def test_inference_mode_and_copies(llama: Written) -> None:
    model = load(llama.folder)
    expected = logits(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(copy.deepcopy(model)), expected, rtol=0, atol=2e-5)


def test_casting_then_fusing_again(llama: Written) -> None:
    model = load(llama.folder).to(torch.float64)
    logits(model)
    assert all(layer.shared is None for name, layer in layers(model).items())
    assert len(fuse(model)) == 4
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("storage", list(FORMATS))
def test_every_format_fuses_or_stays_as_it_is(storage: str, tmp_path: Path) -> None:
    written = Written(tmp_path, "llama", storage=storage)
    model = load(written.folder)
    assert len(fuse(model)) == (4 if FORMATS[storage].DOWN else 0)
    fused = logits(model)
    unfuse(model)
    torch.testing.assert_close(fused, logits(model), rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == files(written.folder)
    expected = model.generate(tokens(), max_new_tokens=32, min_new_tokens=32)
    cached = model.generate(
        tokens(), max_new_tokens=32, min_new_tokens=32, past_key_values=LatentCache(model)
    )
    assert torch.equal(cached, expected)
