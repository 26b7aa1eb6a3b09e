import json
from pathlib import Path

import pytest
import torch
from architectures import TINY, tiny_model
from safetensors.torch import load_file
from test_checkpoint import Written, load, tokens
from torch import nn

from aasvd import export
from aasvd.formats import FORMATS
from aasvd.lowrank import CompressedLinear, LowRankLinear


@pytest.mark.parametrize(
    ("architecture", "storage"),
    [*((name, "factors") for name in TINY), *(("llama", name) for name in FORMATS if name != "factors")],
)
def test_merged_model_computes_the_same(architecture: str, storage: str, tmp_path: Path) -> None:
    written = Written(tmp_path, architecture, keep_dense=1, storage=storage)
    export.merge(written.folder, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert type(merged) is type(written.model)
    assert not any(isinstance(module, CompressedLinear) for module in merged.modules())
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in written.model.parameters())
    with torch.no_grad():
        # float32 weights rounded once, and the same sums in another order.
        torch.testing.assert_close(
            merged(tokens()).logits, load(written.folder)(tokens()).logits, rtol=0, atol=2e-5
        )


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    written = Written(tmp_path, "llama", dtype=torch.bfloat16)
    export.merge(written.folder, tmp_path / "merged")
    merged, compressed = load(tmp_path / "merged"), load(written.folder)
    name = written.linears[0]
    layer = compressed.get_submodule(name)
    expected = (layer.u.double() @ layer.v.double()).to(torch.bfloat16)
    found = merged.get_submodule(name).weight
    assert found.dtype == torch.bfloat16
    # Summed in float32 before the only rounding: at most an ulp apart, rarely.
    assert (found != expected).float().mean() < 0.01
    torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_folder_is_an_ordinary_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = Written(tmp_path, "qwen2")
    output = tmp_path / "merged"
    export.main([str(written.folder), str(output)])
    assert "as large as the model before compression" in capsys.readouterr().out
    merged, dense = (json.loads((folder / "config.json").read_text()) for folder in (output, written.dense))
    assert merged == dense
    assert {n: t.shape for n, t in load_file(output / "model.safetensors").items()} == {
        n: t.shape for n, t in load_file(written.dense / "model.safetensors").items()
    }
    assert (output / "tokenizer_config.json").exists()
    assert not (output / "run_me.py").exists()


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="dense is not compressed by aasvd"):
        export.merge(tmp_path / "dense", tmp_path / "merged")
    with pytest.raises(ValueError, match=r"nothing has no config\.json"):
        export.merge(tmp_path / "nothing", tmp_path / "merged")
    written = Written(tmp_path / "other", "llama")
    with pytest.raises(ValueError, match="dense exists and is not empty"):
        export.merge(written.folder, tmp_path / "dense")
    assert not (tmp_path / "merged").exists()


def test_the_command_says_in_one_line_what_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        export.main([str(tmp_path / "nothing"), str(tmp_path / "merged")])
    assert (
        raised.value.code
        == f"{tmp_path}/nothing has no config.json: expected the folder of a compressed checkpoint"
    )


def test_overflow_is_an_error() -> None:
    layer = LowRankLinear.from_factors(
        torch.full((4, 1), 300.0).to(torch.float16), torch.full((1, 4), 300.0).to(torch.float16)
    )
    with pytest.raises(ValueError, match=r"x\.y: the merged weight is not finite in torch\.float16"):
        export._dense("x.y", layer, torch.float16)
    assert isinstance(export._dense("x.y", layer, torch.bfloat16), nn.Linear)
