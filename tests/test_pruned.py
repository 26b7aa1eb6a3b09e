"""Layers and checkpoints of which rows, columns or everything was left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TINY, linears, tiny_model
from safetensors.torch import load_file, save_file
from stored import random_tokens
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from aasvd import checkpoint
from aasvd.export import merge
from aasvd.formats import replace_linears
from aasvd.pruned import PrunedLinear, prune, removed


def some(count: int, seed: int) -> Tensor:
    """Return which of some rows or columns stay: about half of them, at least one."""
    kept = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[seed % count] = True
    return kept


def made_up(out_features: int, in_features: int, *, bias: bool) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(linear.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (2, 7)])
def test_a_pruned_layer_is_a_dense_one_with_zeros(
    bias: bool, rows: bool, columns: bool, shape: tuple[int, ...]
) -> None:
    linear = made_up(9, 5, bias=bias)
    kept = some(9, 1) if rows else torch.ones(9, dtype=torch.bool)
    read = some(5, 2) if columns else torch.ones(5, dtype=torch.bool)
    layer = prune(linear, rows=kept if rows else None, columns=read if columns else None)
    assert layer.kept.shape == (int(kept.sum()), int(read.sum()))
    weight = linear.weight.detach().clone()
    weight[~kept] = 0
    weight[:, ~read] = 0
    torch.testing.assert_close(layer.dense(), weight, rtol=0, atol=0)
    x = torch.randn(*shape, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = x @ weight.mT + (torch.where(kept, linear.bias.detach(), 0) if bias else 0)
    torch.testing.assert_close(layer(x).detach(), expected)
    assert (layer(x)[..., ~kept] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_removed_layer_returns_zeros_and_stores_no_number(dtype: torch.dtype) -> None:
    linear = made_up(9, 5, bias=True).to(dtype)
    layer = removed(linear)
    assert layer.kept.shape == (0, 0)
    for shape in ((5,), (1, 1, 5), (2, 3, 5)):
        assert torch.equal(layer(torch.ones(shape, dtype=dtype)), torch.zeros(*shape[:-1], 9, dtype=dtype))
    assert prune(linear, columns=torch.zeros(5, dtype=torch.bool)).kept.shape == (0, 0)


@pytest.mark.parametrize("rows", [True, False])
def test_autocast_computes_in_bfloat16(rows: bool) -> None:
    layer = prune(made_up(9, 5, bias=True).float(), rows=some(9, 1) if rows else None)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0, atol=0.1)


@pytest.mark.parametrize("size", [(10, 2), (2, 6), (0, 3), (3, 0), (-1, 2)])
def test_impossible_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"rows and .* columns of a linear from 5 to 9"):
        PrunedLinear(5, 9, size, bias=False)


def test_a_linear_that_is_not_there_is_named_with_its_field() -> None:
    model = tiny_model("llama")
    for field, arguments in (("ranks", {"ranks": {"other": 2}}), ("kept", {"kept": {"other": [1, 1]}})):
        with pytest.raises(ValueError, match=f"{field} names the module 'other', which LlamaForCausalLM"):
            replace_linears(model, storage="factors", **{"ranks": {}, **arguments})


class Written:
    """A checkpoint with pruned and removed linears, beside the dense model with zeros that it stands for."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.model = tiny_model(architecture)
        self.model.save_pretrained(folder / "dense")
        layers = linears(self.model)
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.kept: dict[str, list[int]] = {}
        # One stays dense; of the others every third is gone.
        for number, (name, linear) in enumerate(list(layers.items())[1:]):
            rows, columns = some(linear.out_features, number), some(linear.in_features, number + 1)
            gone = number % 3 == 0
            layer = removed(linear) if gone else prune(linear, rows=rows, columns=columns)
            with torch.no_grad():
                linear.weight[~rows] = 0
                linear.weight[:, ~columns] = 0
                linear.weight *= not gone
                if linear.bias is not None:
                    linear.bias[~rows] = 0
                    linear.bias *= not gone
            self.kept[name] = list(layer.kept.shape)
            for part in ("weight", "bias"):
                state.pop(f"{name}.{part}", None)
            state |= {f"{name}.{part}": tensor for part, tensor in layer.state_dict().items()}
        self.state = state
        self.folder = folder / "model"
        self.linears = list(layers)
        checkpoint.write(
            dense=folder / "dense",
            output=self.folder,
            ranks={},
            storage="factors",
            kept=self.kept,
            details={},
            tensor=lambda name: state[name],
            dtype=torch.float32,
        )


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.fixture(scope="module", params=TINY)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp(request.param), request.param)


def test_logits_are_those_of_the_dense_model_with_zeros(written: Written) -> None:
    model = load(written.folder, dtype=torch.float64)
    assert type(model) is type(written.model)
    found = {
        name: list(module.kept.shape)
        for name, module in model.named_modules()
        if isinstance(module, PrunedLinear)
    }
    assert found == written.kept
    expected = written.model.double()
    with torch.no_grad():
        logits = model(random_tokens(2)).logits
        torch.testing.assert_close(logits, expected(random_tokens(2)).logits, rtol=1e-6, atol=1e-6)
    written.model.float()


def test_backbones_are_saved_and_opened_again(tmp_path: Path) -> None:
    written = Written(tmp_path, "llama")
    AutoModel.from_pretrained(written.folder).save_pretrained(tmp_path / "backbone")
    backbone = AutoModel.from_pretrained(tmp_path / "backbone")
    kept = {name.removeprefix("model."): size for name, size in written.kept.items()}
    assert backbone.config.quantization_config.kept == kept
    tokens = random_tokens(2)
    with torch.no_grad():
        expected = load(written.folder).model(tokens).last_hidden_state
        assert torch.equal(backbone(tokens).last_hidden_state, expected)


def test_generation_with_the_cache_equals_generation_without(written: Written) -> None:
    model = load(written.folder)
    arguments = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    cached, plain = (model.generate(random_tokens(2), use_cache=use, **arguments) for use in (True, False))
    assert cached.shape == (2, 26)
    assert torch.equal(cached, plain)


def test_save_pretrained_gives_the_same_bytes(written: Written, tmp_path: Path) -> None:
    load(written.folder).save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (written.folder / name).read_bytes()


def test_what_is_counted_is_what_was_kept(written: Written) -> None:
    counts = checkpoint.counts(written.folder, written.linears)
    dense = written.model.get_submodule(written.linears[0]).weight.numel()
    assert counts["linears"] == dense + sum(rows * columns for rows, columns in written.kept.values())
    parent = checkpoint.counts(written.folder.parent / "dense", written.linears)
    assert counts["model"] - counts["linears"] == parent["model"] - parent["linears"]
    # What is gone is gone from the disk; places of rows and columns take four bytes each.
    places = 4 * sum(map(sum, written.kept.values()))
    gone = 4 * (parent["linears"] - counts["linears"]) - places
    headers = 400 * len(written.kept)
    assert abs((parent["bytes"] - counts["bytes"]) - gone) < headers


def test_merging_gives_a_dense_folder_of_the_same_model(written: Written, tmp_path: Path) -> None:
    merge(written.folder, tmp_path / "merged")
    model = load(tmp_path / "merged")
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in written.linears)
    with torch.no_grad():
        expected = written.model(random_tokens(2)).logits
        torch.testing.assert_close(model(random_tokens(2)).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "kept is .*expected an object"),
        ({"model.layers.0.mlp.up_proj": [3]}, "expected how many rows and columns"),
        ({"model.layers.0.mlp.up_proj": [3, 2.0]}, "expected how many rows and columns"),
        ({"model.layers.0.mlp.up_proj": [90, 3]}, "90 rows and 3 columns of .* cannot be kept"),
        ({"model.layers.0.mlp.other": [3, 3]}, "does not have"),
    ],
)
def test_sizes_that_cannot_be_are_named(tmp_path: Path, kept: Any, message: str) -> None:
    made = Written(tmp_path, "llama")
    config = json.loads((made.folder / "config.json").read_text())
    config["quantization_config"]["kept"] = kept
    (made.folder / "config.json").write_text(json.dumps(config))
    (made.folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=message):
        load(made.folder)


@pytest.mark.parametrize("change", ["unordered", "outside"])
def test_places_that_no_pruning_gives_are_named(tmp_path: Path, change: str) -> None:
    made = Written(tmp_path, "llama")
    name = next(name for name, size in made.kept.items() if size[0] > 1)
    tensors = load_file(made.folder / "model.safetensors")
    places = tensors[f"{name}.kept_rows"]
    places[:2] = places[:2].flip(0) if change == "unordered" else torch.tensor([-1, 0])
    save_file(tensors, made.folder / "model.safetensors", metadata={"format": "pt"})
    (made.folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=rf"{name}\.kept_rows, which is not a list of ascending numbers"):
        load(made.folder)
