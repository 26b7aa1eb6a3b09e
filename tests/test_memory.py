from pathlib import Path

import pytest
import torch
from architectures import TINY, linears, tiny_model
from stored import store

from aasvd.memory import Estimate, estimate


@pytest.mark.parametrize("name", TINY)
def test_weights_and_cache_are_those_of_the_model(tmp_path: Path, name: str) -> None:
    model = tiny_model(name, dtype=torch.bfloat16)
    store(tiny_model(name), tmp_path)
    inside = sum(module.weight.numel() for module in linears(model).values())
    every = sum(parameter.numel() for parameter in model.parameters())
    needs = estimate(tmp_path / "dense", linears=inside, parameters=every, context=12)
    assert needs.linears + needs.rest == sum(p.numel() * p.element_size() for p in model.parameters())
    cache = model(torch.arange(3, 15)[None], use_cache=True).past_key_values
    if not getattr(model.config, "sliding_window", None):  # those keep less than the whole context
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert needs.cache == held


def test_ratio_is_the_largest_that_fits() -> None:
    needs = Estimate(linears=1000, rest=100, cache=50, activations=50)
    assert needs.ratio(806) == 0.6
    assert needs.total(0.6) <= 806 < needs.total(0.61)
    assert needs.ratio(1200) == needs.ratio(10**9) == 1.0
    assert needs.ratio(1199) == 0.99
    assert needs.ratio(249) is None and needs.ratio(0) is None
