"""The paper's tables from made-up runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_results import COMPRESSED, DENSE, result

from aasvd import paper, results
from aasvd.artifacts import write_json, write_table

Maker = Callable[..., dict[str, Any]]


@pytest.fixture
def made() -> Maker:
    """A function that makes up a run's eval.json."""

    def made(name: str, ratio: float, **changes: Any) -> dict[str, Any]:
        keys = {
            "calibration": changes.pop("calibration", "c"),
            "compression": f"r{ratio:g}-{changes.pop('key', name)}",
        }
        made_from = {"target": ratio, "achieved": ratio - 0.001}
        return result(name, ratio=made_from, provenance={"keys": keys}) | changes

    return made


@pytest.fixture
def stored_runs(tmp_path: Path) -> Callable[..., str]:
    """A function that writes the file of finished runs."""

    def write(*everything: dict[str, Any]) -> str:
        rows = [row for run in everything for row in results.rows(run)]
        write_table(tmp_path / "runs.parquet", pa.Table.from_pylist(rows, schema=results.COLUMNS))
        return str(tmp_path / "runs.parquet")

    return write


@pytest.fixture
def runs(made: Maker, stored_runs: Callable[..., str]) -> str:
    """Runs at two ratios, of three methods, one of them twice under two names."""
    return stored_runs(
        made("m_r0.6", 0.6, key="same"),
        made("default", 0.6, key="same"),
        made("m_r0.6_norefine", 0.6, refined=False),
        made("m_r0.6_slice", 0.6, method="SliceGPT", storage="pruned"),
        made("m_r0.8", 0.8),
        made("other_r0.8", 0.8, model="other"),
    )


def cells(file: Path) -> list[list[str]]:
    lines = [line for line in file.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_main_table_has_dense_then_every_run_by_ratio(runs: str, tmp_path: Path) -> None:
    output = tmp_path / "main.md"
    paper.main(runs=runs, model="m", ratios=[0.8, 0.6], outputs=[str(output)])
    head, *rows = cells(output)
    assert head == ["method", "ratio", "achieved", "piqa", "winogrande", "average", "drop"]
    assert [(row[0], row[1]) for row in rows] == [
        ("dense", "1"), ("aasvd", "0.8"),
        ("SliceGPT (slice)", "0.6"), ("aasvd", "0.6"), ("aasvd (norefine)", "0.6"),
    ]  # fmt: skip
    assert rows[0][3:] == ["80.0", "60.0", "70.0", "–"]
    assert rows[1][2:] == ["0.7990", "60.0", "50.0", "55.0", "21.4"]


@pytest.mark.parametrize(
    ("method", "variant", "label"),
    [
        ("aasvd", "", "aasvd"), ("aasvd", "norefine", "aasvd (norefine)"), ("svd", "svd", "svd"),
        ("svd", "svd_refine", "svd (refine)"), ("svd", "svd-like_few", "svd (svd-like_few)"),
    ],
)  # fmt: skip
def test_a_label_says_the_method_once(method: str, variant: str, label: str) -> None:
    assert paper.Run({"method": method, "variant": variant}, {}).label == label


def test_default_beside_the_same_run_of_other_parameters_is_left_out(
    made: Maker, stored_runs: Callable[..., str]
) -> None:
    def names(*everything: dict[str, Any]) -> list[str]:
        return [run.facts["run"] for run in paper.read_runs(stored_runs(*everything))]

    other = made("default", 0.6, key="other")
    assert names(made("m_r0.6", 0.6), other) == ["m_r0.6"]
    assert names(made("m_r0.6_norefine", 0.6), other) == ["m_r0.6_norefine", "default"]
    assert names(made("m_r0.8", 0.8), other) == ["m_r0.8", "default"]
    assert names(made("o_r0.6", 0.6, model="o"), other) == ["o_r0.6", "default"]


def test_the_dense_row_has_what_any_run_knows(
    made: Maker, stored_runs: Callable[..., str], tmp_path: Path
) -> None:
    """Two runs measured on one task each: neither has the other's dense number."""
    first, second = (results.side_by_side([DENSE[i]], [COMPRESSED[i]]) for i in (1, 2))
    runs = stored_runs(made("m_r0.6", 0.6, **first), made("m_r0.8", 0.8, **second))
    output = tmp_path / "main.md"
    paper.main(runs=runs, model="m", ratios=[0.8, 0.6], outputs=[str(output)])
    head, dense, *rows = cells(output)
    assert len(head[3:-2]) == 2 and dense[0] == "dense"
    assert "–" not in dense[3:5]
    assert ["–" in row[3:5] for row in rows] == [True, True]


def test_averages_over_other_tasks_say_so_and_so_do_other_calibrations(
    made: Maker, stored_runs: Callable[..., str], tmp_path: Path
) -> None:
    """One run measured one task of two: its drop is against the dense model on that one."""
    less = results.side_by_side(DENSE[:2], COMPRESSED[:2])
    runs = stored_runs(
        made("m_r0.6", 0.6), made("m_r0.6_few", 0.6, calibration="d", **less), made("m_r0.6_no", 0.6)
    )
    output = tmp_path / "main.md"
    paper.main(runs=runs, model="m", ratios=[0.6], outputs=[str(output)])
    rows = {row[0]: row[-2:] for row in cells(output)}
    assert rows["dense"] == ["70.0", "–"] and rows["aasvd"] == ["55.0", "21.4"]
    assert rows["aasvd (few)"] == ["60.0 (1)", "25.0"]  # 0.8 to 0.6
    text = output.read_text()
    assert "over that many of the 2 tasks only" in text
    assert "Calibrated differently: m_r0.6, m_r0.6_no; m_r0.6_few." in text
    paper.breakdown(runs=runs, model="m", ratios=[0.6], outputs=[str(output)])
    found = {row[0]: row[1:] for row in cells(output)}
    assert found["acc average"] == ["70.0", "55.0", "60.0 (1)", "55.0"]
    assert found["acc_norm average"][2] == "80.0 (1)"


def test_a_table_of_equal_tasks_and_calibrations_says_nothing_of_them(runs: str, tmp_path: Path) -> None:
    output = tmp_path / "main.md"
    paper.main(runs=runs, model="m", ratios=[0.6], outputs=[str(output)])
    assert "tasks only" not in output.read_text() and "Calibrated" not in output.read_text()


def test_the_sweep_draws_averages_over_the_same_tasks_only(
    made: Maker, stored_runs: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(paper.figures, "sweep", lambda *lines, **named: drawn.extend([*lines, named]))
    less = results.side_by_side(DENSE[:2], COMPRESSED[:2])
    runs = stored_runs(made("m_r0.6_a", 0.6), made("m_r0.6_b", 0.6, **less), made("m_r0.6_c", 0.6))
    sequences = {"a": 16, "b": 32, "c": 64}
    paper.calibration(runs=runs, model="m", ratio=0.6, sequences=sequences, outputs=["x.png"])
    assert list(drawn[1].x) == [16, 64] and drawn[2]["tasks"] == "2 tasks"


def test_pruning_table_leaves_out_variants_of_our_own(runs: str, tmp_path: Path) -> None:
    output = tmp_path / "pruning.md"
    paper.pruning(runs=runs, model="m", ratios=[0.6], outputs=[str(output)])
    assert [row[0] for row in cells(output)[1:]] == ["dense", "SliceGPT (slice)", "aasvd"]
    paper.pruning(runs=runs, model="m", ratios=[0.8], outputs=[str(output)])
    assert "No run of a structured pruning method is finished" in output.read_text()


def test_ablation_shows_its_variants_only(runs: str, tmp_path: Path) -> None:
    output = tmp_path / "ablation.md"
    paper.ablation(runs=runs, model="m", ratios=[0.6], variants=["norefine"], outputs=[str(output)])
    rows = cells(output)[1:]
    assert [(row[0], row[3]) for row in rows] == [("default", "yes"), ("norefine", "no")]
    assert {row[1] for row in rows} == {"anchored"}


def test_models_table_puts_each_model_below_its_dense_self(runs: str, tmp_path: Path) -> None:
    output = tmp_path / "models.md"
    paper.models(runs=runs, models=["other", "m"], ratios=[0.8, 0.6], outputs=[str(output)])
    rows = [tuple(row[:3]) for row in cells(output)[1:]]
    assert rows[:3] == [("other", "dense", "1"), ("other", "aasvd", "0.8"), ("m", "dense", "1")]
    assert rows[3:] == [("m", "aasvd", "0.8"), ("m", "aasvd", "0.6")]


def test_breakdown_has_a_row_per_metric_and_a_column_per_run(runs: str, tmp_path: Path) -> None:
    output = tmp_path / "breakdown.md"
    paper.breakdown(runs=runs, model="m", ratios=[0.6], outputs=[str(output)])
    head, *rows = cells(output)
    assert head == ["", "dense", "0.6 SliceGPT (slice)", "0.6 aasvd", "0.6 aasvd (norefine)"]
    found = {row[0]: row[1:] for row in rows}
    assert found["acc piqa"] == ["80.0", *["60.0 ± 1.0"] * 3]
    assert found["acc_norm piqa"][1] == "80.0 ± 2.0"
    assert found["parameters of linears"] == ["100", "60", "60", "60"]
    assert found["seconds, s"] == ["–", "3.50", "3.50", "3.50"]


def test_a_table_of_runs_that_do_not_exist_is_empty(runs: str, tmp_path: Path) -> None:
    for name in ("main", "pruning", "breakdown"):
        output = tmp_path / f"{name}.html"
        getattr(paper, name)(runs=runs, model="m", ratios=[0.1], outputs=[str(output)])
        assert output.exists()


def test_depth_shows_what_was_published_or_measured_after_and_every_run_by_its_own_number(
    runs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of two runs that are called alike."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(paper.figures, "depth", lambda *lines, **_: drawn.update(lines=lines))
    monkeypatch.chdir(tmp_path)
    for run, cosine in {"m_r0.6": [0.1, 0.2], "m_r0.6_norefine": [], "m_r0.6_slice": []}.items():
        folder = tmp_path / "results" / run
        folder.mkdir(parents=True)
        blocks = [{"block": number, "cosine": value} for number, value in enumerate(cosine, start=1)]
        (folder / "blocks.json").write_text(json.dumps(blocks))
    files = [str(tmp_path / f"layers_{number:03d}.json") for number in range(2)]
    for file, value in zip(files, (0.3, 0.4), strict=True):
        write_json(Path(file), {"layers": {"q": {"cosine": 9.0}, "output": {"cosine": value}}})
    paper.depth(runs=runs, model="m", ratio=0.6, layers={"m_r0.6_norefine": files}, outputs=["depth.png"])
    found = {line.label: (list(line.x), list(line.y)) for line in drawn["lines"][0]}
    assert found["aasvd"] == ([1, 2], [0.1, 0.2])
    assert found["aasvd (norefine)"] == ([1, 2], [0.3, 0.4])
    assert found["SliceGPT (slice)"] == ([], [])
    assert len(drawn["lines"][1]) == 3


def test_a_dense_model_with_nothing_right_has_no_drop() -> None:
    """As a few examples may have it."""
    run = paper.Run({}, {"acc average": {"value": 0.25, "dense": 0.0, "count": 0}})
    assert paper._cells(run, [], [], side="value")[-1] == "–"
