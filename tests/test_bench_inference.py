import json
from pathlib import Path

import pytest
import torch

from aasvd import bench_inference
from aasvd.bench_inference import build, linears, resident_bytes, settings, smollm2
from aasvd.formats import FORMATS
from aasvd.rank import uniform_rank


def test_quick_run_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "bench.json"
    bench_inference.main(["--quick", "--repeats", "2", "--output", str(output)])
    result = json.loads(output.read_text())
    assert [(s["model"], s["storage"]) for s in result["settings"]] == [("tiny", name) for name in FORMATS]
    rows = result["settings"][0]["rows"]
    assert [row["variant"] for row in rows] == ["dense", "factors 0.8", "factors 0.6", "factors 0.4"]
    for setting in result["settings"]:
        assert setting["rows"][3]["resident_bytes"] < setting["rows"][0]["resident_bytes"]
    for row in rows:
        assert {len(seconds) for seconds in row["seconds"].values()} == {2}
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "linears_tokens_per_second"):
            assert row[key] > 0
            assert row["ratios"][key] == pytest.approx(row[key] / rows[0][key])
        assert row["peak_bytes"] >= row["resident_bytes"]
    printed = capsys.readouterr().out
    assert "tiny, float32, batch 2 x 16 tokens" in printed
    assert "factors 0.6" in printed and "(1.00)" in printed


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
    found = settings(config=None, quick=False, formats=list(FORMATS))
    assert {s.storage for s in found} == set(FORMATS)
    covered = {(s.name, str(s.dtype), s.batch) for s in found}
    assert covered == {
        (name, dtype, batch)
        for dtype in ("torch.float32", "torch.bfloat16")
        for name, batch in [("SmolLM2-135M", 1), ("SmolLM2-135M", 8), ("LLaMA-7B block", 1)]
    }
