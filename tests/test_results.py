import json
from pathlib import Path
from typing import Any

import pytest

from aasvd import results
from aasvd.artifacts import write_json
from aasvd.results import Measurement


def accuracy(name: str, acc: float, norm: float | None = None) -> Measurement:
    numbers: dict[str, Any] = {"acc": acc, "stderr": 0.01, "count": 10}
    if norm is not None:
        numbers |= {"acc_norm": norm, "acc_norm_stderr": 0.02}
    return Measurement("accuracy", name, numbers, None)


def failed(kind: str, name: str) -> Measurement:
    return Measurement(kind, name, {}, "no network")


DENSE = [
    Measurement("perplexity", "ptb", {"perplexity": 8.0, "windows": 5}, None),
    accuracy("piqa", 0.8, 0.9),
    accuracy("winogrande", 0.6),
    accuracy("mathqa", 0.3, 0.3),
]
COMPRESSED = [
    failed("perplexity", "ptb"),
    accuracy("piqa", 0.6, 0.8),
    accuracy("winogrande", 0.5),
    failed("accuracy", "mathqa"),
]


def test_failures_stay_alone_and_are_named() -> None:
    found = results.side_by_side(DENSE, COMPRESSED)
    assert found["perplexity"] == {"ptb": {"dense": 8.0, "compressed": None, "windows": 5}}
    assert found["accuracy"]["mathqa"]["dense"] == 0.3
    assert found["accuracy"]["mathqa"]["compressed"] is None
    assert found["errors"] == {
        "perplexity ptb": {"compressed": "no network"},
        "accuracy mathqa": {"compressed": "no network"},
    }


def test_measurements_in_different_float_types_are_not_compared() -> None:
    """As `auto` takes them on different machines; those without their type count as equal."""

    def measured(dtype: str | None) -> list[Measurement]:
        own = {} if dtype is None else {"dtype": dtype}
        return [
            Measurement(kind, name, {metric: 0.5, **own}, None, f"results/{dtype}/{kind}_{name}.json")
            for kind, name, metric in [("perplexity", "ptb", "perplexity"), ("accuracy", "piqa", "acc")]
        ]

    for pair in [("bfloat16", "bfloat16"), (None, "float32"), ("float32", None), (None, None)]:
        found = results.side_by_side(*map(measured, pair))
        assert not found["errors"] and found["average"]["tasks"] == 1
    found = results.side_by_side(measured("bfloat16"), measured("float32"))
    assert found["perplexity"]["ptb"] == {"dense": 0.5, "compressed": None, "windows": None}
    assert found["average"] == {"tasks": 0, "of": 1}
    for name, file in {
        "perplexity ptb": "perplexity_ptb.json",
        "accuracy piqa": "accuracy_piqa.json",
    }.items():
        why = found["errors"][name]["compressed"]
        assert why.startswith("measured in float32, but the dense model in bfloat16")
        assert f"--force results/float32/{file}`" in why and f"results/bfloat16/{file}" in why
        assert "calibration.dtype: auto" in why


def test_average_is_over_the_tasks_that_both_models_have() -> None:
    found = results.side_by_side(DENSE, COMPRESSED)["average"]
    assert (found["tasks"], found["of"]) == (2, 3)
    assert found["acc"] == pytest.approx(
        {"dense": 0.7, "compressed": 0.55, "drop": 0.15, "relative_drop": 0.15 / 0.7}
    )
    # winogrande has no acc_norm and enters with its acc.
    assert found["acc_norm"]["dense"] == pytest.approx((0.9 + 0.6) / 2)
    assert found["acc_norm"]["compressed"] == pytest.approx((0.8 + 0.5) / 2)
    assert results.average({}) == {"tasks": 0, "of": 0}


def test_peak_memory_is_that_of_compression() -> None:
    """Not of conversion, nor of the dense model's evaluation, which holds the whole model."""
    records = [
        {
            "stage": stage,
            "peak_memory_mb": host,
            "added_memory_mb": host / 10,
            "peak_device_memory_mb": device,
        }
        for stage, host, device in [
            ("fetch model", 9000.0, 0.0),
            ("capture block 0", 300.0, 70.0),
            ("refine block 0", 400.0, 60.0),
            ("perplexity wikitext2", 5000.0, 900.0),
            ("accuracy piqa", 5000.0, 900.0),
        ]
    ]
    assert results.peaks(records) == {
        "peak_memory_mb": 400.0,
        "added_memory_mb": 40.0,
        "peak_device_memory_mb": 70.0,
    }


def result(run: str, **changes: Any) -> dict[str, Any]:
    return {
        "run": run, "model": "m", "method": "aasvd", "objective": "anchored", "refined": True,
        "ratio": {"target": 0.6, "achieved": 0.599},
        "parameters": {"dense": 200, "compressed": 150, "linears": {"dense": 100, "compressed": 60}},
        "provenance": {"keys": {"calibration": "0123456789", "compression": "r0.6-0123456789"}},
        "storage": "factors", "precision": "model", "bytes": {"dense": 400, "compressed": 300},
        "seconds": {"solve": 1.0, "refine": 2.5}, "peak_memory_mb": 10.0,
        **results.side_by_side(DENSE, COMPRESSED),
    } | changes  # fmt: skip


def test_table_has_a_row_per_run_and_metric(tmp_path: Path) -> None:
    for run in ("m_r0.6", "m_r0.6_norefine"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "eval.json").write_text(json.dumps(result(run)))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "eval.json").write_text('{"run": "old"}')  # of an earlier version
    table = results.table(tmp_path)
    rows = table.to_pylist()
    assert len({(row["run"], row["metric"]) for row in rows}) == len(rows)
    assert {row["variant"] for row in rows} == {"", "norefine"}
    metrics = {row["metric"]: row for row in rows if row["variant"] == ""}
    assert metrics["acc piqa"]["value"] == 0.6 and metrics["acc piqa"]["dense"] == 0.8
    assert metrics["acc piqa"]["count"] == 10 and metrics["acc_norm piqa"]["stderr"] == 0.02
    assert metrics["acc average"]["value"] == pytest.approx(0.55)
    assert metrics["seconds"]["value"] == 3.5
    assert "acc mathqa" not in metrics and "perplexity ptb" not in metrics  # they failed


@pytest.mark.parametrize(
    ("run", "variant"),
    [
        ("tiny_random_r0.6", ""), ("llama_raw_r0.6_refine", "refine"),
        ("deepseek_r1-distill_r0.6_svd_refine", "svd_refine"), ("a_r0.5_r0.6", ""), ("default", ""),
    ],
)  # fmt: skip
def test_a_variant_is_what_stands_behind_the_ratio_whatever_the_model_is_called(
    run: str, variant: str
) -> None:
    assert {row["variant"] for row in results.rows(result(run))} == {variant}


def test_no_runs_give_an_empty_table(tmp_path: Path) -> None:
    assert results.table(tmp_path).num_rows == 0
    assert results.table(tmp_path).schema == results.COLUMNS


def test_a_measurement_is_read_from_its_artifact(tmp_path: Path) -> None:
    file = tmp_path / "accuracy_arc_easy-0123456789.json"
    write_json(file, {"error": "no network", "seconds": 1.0})
    assert results.read_measurement(str(file)) == failed("accuracy", "arc_easy")._replace(file=str(file))
