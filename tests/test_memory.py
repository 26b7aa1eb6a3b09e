import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import TINY, linears, tiny_model
from safetensors.torch import load_file, save_file
from stored import Stored, store
from workflow_copy import ROOT

from aasvd import params, sources
from aasvd.artifacts import write_json
from aasvd.evaluate import MeasurementError
from aasvd.memory import Estimate, estimate, measure, plan


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


def test_masks_in_the_files_are_no_weights(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    model.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    masks = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}
    save_file({**load_file(file), **masks}, file, metadata={"format": "pt"})
    config = params.load(ROOT / "params.yaml")
    config["models"]["mine"] = {"path": str(tmp_path / "dense")}
    source, outline = tmp_path / "source.json", tmp_path / "outline.json"
    sources.fetch_model(config["models"]["mine"], output=source, cache=tmp_path)
    write_json(outline, {"linears": {name: list(m.weight.shape) for name, m in linears(model).items()}})
    (entry,) = plan(config, model="mine", source=source, outline=outline, budgets=[1e9], context=8)
    assert entry["linears"] + entry["rest"] == 2 * sum(p.numel() for p in model.parameters())


def test_what_is_measured_is_what_is_estimated(stored: Callable[[str], Stored]) -> None:
    """Whatever float type the calibration has, and the checkpoint."""
    model, folder = tiny_model("llama"), stored("llama").record.parent / "dense"
    found = measure(folder, context=12)
    needs = estimate(folder, linears=0, parameters=sum(p.numel() for p in model.parameters()), context=12)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert needs.rest <= found["weights"] <= needs.rest + buffers
    assert found["cache"] == needs.cache * 13 // 12  # with the token that was generated
    assert found["dtype"] == "bfloat16" and found["peak"] > 0


@pytest.mark.parametrize(
    ("end", "reason"),
    [("kill -9 $$", "killed by signal 9, as where memory does not suffice"), ("exit 3", "Loading weights")],
)
def test_a_killed_process_is_said_to_be_killed(
    end: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho 'Loading weights: 40%' >&2\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(MeasurementError, match=f"does not run with 7 tokens: {reason}"):
        measure(tmp_path, context=7)
