from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from stored import CPU, activations, store

from aasvd import blocks
from aasvd.layers import OUTPUT, layer_errors


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_errors_are_those_of_each_layers_outputs(tmp_path: Path, name: str) -> None:
    stored = store(tiny_model(name), tmp_path)
    original, changed = stored.block(), stored.block()
    names = list(blocks.linears(original))
    hidden = stored.hidden(5)
    shifted = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for module in blocks.linears(changed).values():
            module.weight.mul_(1.1)
    seen: dict[tuple[bool, str], torch.Tensor] = {}
    for side, block in ((False, original), (True, changed)):
        for linear in names:
            block.get_submodule(linear).register_forward_hook(
                lambda module, args, output, key=(side, linear): seen.update({key: output})
            )
        with torch.no_grad():
            seen[side, OUTPUT] = block(shifted if side else hidden, **stored.arguments()[0])
    whole = dict(seen)
    found = layer_errors(
        original,
        changed,
        names,
        inputs=activations(tmp_path / "x.safetensors", hidden),
        shifted=activations(tmp_path / "shifted.safetensors", shifted),
        arguments=stored.arguments()[0],
        batch=2,
        device=CPU,
    )
    assert set(found) == {*names, OUTPUT}
    for linear, errors in found.items():
        a, b = (whole[side, linear].double().flatten(0, -2) for side in (False, True))
        assert errors["mse"] == pytest.approx(float((a - b).square().mean()), rel=1e-4)
        relative = (a - b).square().sum(-1) / a.square().sum(-1)
        assert errors["relative"] == pytest.approx(float(relative.mean()), rel=1e-4)
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        assert errors["cosine"] == pytest.approx(float(1 - cosine.mean()), rel=1e-3, abs=1e-6)
