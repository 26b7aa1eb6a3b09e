import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aasvd import bench_inference
from aasvd.bench_inference import (
    Setting,
    Shape,
    bars,
    build,
    limits,
    linears,
    measure,
    resident_bytes,
    settings,
    smollm2,
    variants_of,
)
from aasvd.formats import FORMATS
from aasvd.rank import uniform_rank


def test_quick_run_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "bench.json"
    bench_inference.main(["--quick", "--repeats", "2", "--output", str(output)])
    result = json.loads(output.read_text())
    (setting,) = result["settings"]
    assert (setting["model"], setting["batch"], setting["tokens"]) == ("tiny", 2, 16)
    rows = {row["variant"]: row for row in setting["rows"]}
    low = [f"{storage} {ratio}" for storage in FORMATS for ratio in (0.8, 0.6, 0.4)]
    assert list(rows) == ["dense", *low]
    for name, row in rows.items():
        assert {len(seconds) for seconds in row["seconds"].values()} == {2}
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "linears_tokens_per_second"):
            assert row[key] > 0
            assert row["ratios"][key] == pytest.approx(row[key] / rows["dense"][key])
        assert row["peak_bytes"] >= row["resident_bytes"]
        if name.endswith("0.4"):
            assert row["resident_bytes"] < rows["dense"]["resident_bytes"]
    printed = capsys.readouterr().out
    assert "tiny, float32, batch 2 x 16 tokens" in printed
    assert "factors 0.6" in printed and "(1.00)" in printed
    # The bare products of codes are none: those linears make their matrices first.
    own = {name: set(row["linears_milliseconds"]) for name, row in rows.items()}
    assert own["dense"] == own["pivoted 0.6"] == {"linears", "products", "step linears", "step products"}
    assert own["remapped 0.6"] == {"linears", "step linears"}
    assert "decode step" in printed


def test_a_part_that_there_is_not_is_refused_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bench.json"
    output.write_text("earlier")
    with pytest.raises(SystemExit):
        bench_inference.main(["--quick", "--only", "nothing_like_this", "--output", str(output)])
    message = (
        "--only 'nothing_like_this' is in no setting's name; there are tiny, float32, batch 2 x 16 tokens"
    )
    assert message in capsys.readouterr().err
    assert output.read_text() == "earlier"


def test_bars_compare_the_default_format_with_the_stock_dense_model() -> None:
    def rows(prefill: float, weights: float) -> list[dict[str, Any]]:
        ratios = {"prefill_tokens_per_second": prefill, "resident_bytes": weights}
        return [
            {"variant": "dense", "ratios": dict.fromkeys(ratios, 1.0)},
            {"variant": "pivoted 0.6", "ratios": ratios},
        ]

    shape = Shape(8, 512, 8)
    assert [bar["met"] for bar in bars("SmolLM2-135M", shape, rows(1.3, 0.7))] == [True, True]
    assert [bar["met"] for bar in bars("SmolLM2-135M", shape, rows(1.29, 0.71))] == [False, False]
    assert bars("llama", shape, rows(1.3, 0.7)) == []


def test_roofline_is_amdahls_law() -> None:
    # Of 10 s, 4 are linears: they would take 2.4, or none.
    assert limits([{"linears_share": 0.4}]) == pytest.approx({"multiplications": 10 / 8.4, "free": 10 / 6})


def test_long_passes_are_repeated_only_where_a_bar_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_inference, "_ENOUGH", 0.0)
    with torch.no_grad():
        setting = Setting("tiny", bench_inference.tiny(), torch.float32, ())
        device = torch.device("cpu")
        variants = variants_of(setting, formats=["factors", "pivoted"], device=device, compiled=False)
        rows = measure(variants, Shape(1, 8, 1), vocabulary=64, device=device, repeats=3)
    taken = {row["variant"]: len(row["seconds"]["prefill"]) for row in rows}
    assert {name for name, count in taken.items() if count == 3} == {"dense", "pivoted 0.6"}
    assert {count for name, count in taken.items() if name not in ("dense", "pivoted 0.6")} == {1}


def test_the_peak_holds_the_cache_where_freed_memory_is_left() -> None:
    # 200 MB of the heap, all freed but the last, which keeps the heap from shrinking.
    pieces = [torch.ones(16_000) for _ in range(3_000)]
    top = pieces.pop()
    del pieces
    config = bench_inference.tiny()
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 256, 4, 4
    config.head_dim, config.max_position_embeddings = 64, 512
    model = build(config, ratio=None, storage="factors", dtype=torch.float32)
    cache = 8 * 512 * config.num_hidden_layers * 2 * 256 * 4
    with torch.no_grad():
        (row,) = measure(
            {"dense": model}, Shape(8, 512, 0), vocabulary=64, device=torch.device("cpu"), repeats=2
        )
    assert row["peak_bytes"] - row["resident_bytes"] >= cache
    del top


@pytest.mark.parametrize("storage", list(FORMATS))
def test_models_have_the_parameters_of_their_ratio(storage: str) -> None:
    low = build(bench_inference.tiny(), ratio=0.6, storage=storage, dtype=torch.float32)
    for layer in linears(low):
        assert type(layer) is FORMATS[storage]
        full = layer.in_features, layer.out_features
        assert layer.rank == uniform_rank(full[1], full[0], parameter_ratio=0.6, storage=storage)
    assert torch.isfinite(low(torch.tensor([[1, 2, 3]])).logits).all()


def test_tied_embeddings_are_resident_once() -> None:
    config = smollm2()
    config.num_hidden_layers = 1
    model = build(config, ratio=None, storage="factors", dtype=torch.bfloat16)
    assert resident_bytes(model) == 2 * sum(p.numel() for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_full_run_covers_what_it_says() -> None:
    found = settings(config=None, quick=False)
    assert {(s.name, s.dtype, shape.batch) for s in found for shape in s.shapes} == {
        (name, dtype, batch)
        for dtype in (torch.float32, torch.bfloat16)
        for name, batch in [("SmolLM2-135M", 1), ("SmolLM2-135M", 8), ("LLaMA-7B block", 1)]
    }
