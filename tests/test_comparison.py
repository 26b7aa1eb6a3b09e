import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from aasvd import comparison, report, results

PUBLISHED = json.loads((Path(__file__).parent.parent / "workflow" / "published.json").read_text())
ACCURACY = {"piqa": {"dense": 0.6, "compressed": 0.5}, "sciq": {"dense": 0.8, "compressed": 0.55}}
RESULT: dict[str, Any] = {
    "refined": True,
    "ratio": {"target": 0.6, "achieved": 0.5995},
    "parameters": {"dense": 200, "compressed": 150},
    "perplexity": {"a_b": {"dense": 20.0, "compressed": 50.0}},
    "accuracy": ACCURACY,
    "average": results.average(ACCURACY),
    "seconds": {"solve": 3.0, "capture": 4.0, "perplexity": 100.0, "accuracy piqa": 100.0},
    "peak_memory_mb": 123.0,
}


def rows() -> list[comparison.Row]:
    return [
        comparison.dense_row(RESULT),
        comparison.run_row(RESULT, method="ours & theirs", variant="refine"),
    ]


def test_a_row_is_what_the_run_measured() -> None:
    dense, run = rows()
    assert run["kept_linears"] == 0.5995 and run["kept_model"] == 0.75 and run["seconds"] == 7.0
    assert run["refined"] is True and "refined" not in dense
    assert run["perplexity a_b"] == 50.0 and dense["perplexity a_b"] == 20.0
    assert run["accuracy average"] == pytest.approx(0.525)
    assert run["drop"] == pytest.approx(1 - 0.525 / 0.7)


def test_what_failed_is_a_dash_and_the_average_is_over_what_both_models_have(tmp_path: Path) -> None:
    accuracy = ACCURACY | {"sciq": {"dense": 0.8, "compressed": None}}
    texts = {"a_b": {"dense": 20.0, "compressed": None}}
    result = RESULT | {
        "perplexity": texts,
        "accuracy": accuracy,
        "average": results.average(accuracy),
    }
    found = [
        comparison.dense_row(result),
        comparison.run_row(result, method="mine", variant=""),
        # As where every task failed.
        comparison.run_row(result | {"average": {"tasks": 0, "of": 2}}, method="none", variant=""),
    ]
    assert [row.get("accuracy average") for row in found] == [0.6, 0.5, None]
    assert [row.get("drop") for row in found] == [None, pytest.approx(1 / 6), None]
    report.write_curves(found, output=tmp_path / "x.svg", title="t")
    files = {name: tmp_path / f"x.{name}" for name in ("page", "markdown", "latex", "parquet")}
    comparison.write({"Measured": found}, notes=[""], figure=tmp_path / "x.svg", **files)
    lines = files["markdown"].read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    (mine,) = [dict(zip(cells[0], row, strict=True)) for row in cells if row[0] == "mine"]
    assert (mine["perplexity a_b"], mine["accuracy piqa"], mine["accuracy sciq"]) == ("–", "50.0 %", "–")
    assert (mine["accuracy average"], mine["drop"]) == ("50.0 %", "16.7 %")
    assert pq.read_table(files["parquet"]).to_pylist()[1]["perplexity a_b"] is None


def test_reported_numbers_are_marked_and_have_known_sources() -> None:
    found = comparison.reported_rows(PUBLISHED, [0.8, 0.4])
    assert {row["ratio"] for row in found} == {1.0, 0.8, 0.4}
    assert all(row["source"].startswith("reported: ") for row in found)
    (ours,) = [row for row in found if row["method"] == "AA-SVD" and row["ratio"] == 0.8]
    assert (ours["perplexity wikitext2"], ours["perplexity ptb"], ours["perplexity c4"]) == (
        6.89,
        12.3,
        12.04,
    )
    assert all(entry["source"] in PUBLISHED["sources"] for entry in PUBLISHED["rows"])


def test_all_formats_hold_the_rows(tmp_path: Path) -> None:
    tables = {"Measured": rows(), "Reported": comparison.reported_rows(PUBLISHED, [0.6])}
    report.write_curves(rows(), output=tmp_path / "x.svg", title="t")
    files = {name: tmp_path / f"x.{name}" for name in ("page", "markdown", "latex", "parquet")}
    comparison.write(tables, notes=["a <note>", "b"], figure=tmp_path / "x.svg", **files)
    table = pq.read_table(files["parquet"]).to_pylist()
    assert len(table) == sum(map(len, tables.values()))
    assert table[1]["perplexity a_b"] == 50.0 and table[1]["drop"] == pytest.approx(0.25)
    page = files["page"].read_text()
    assert "ours &amp; theirs" in page and "a &lt;note&gt;" in page and "<svg" in page
    assert "<?xml" not in page
    latex = files["latex"].read_text()
    assert r"ours \& theirs" in latex and r"perplexity a\_b" in latex and "52.5 \\%" in latex
    assert "| ours & theirs | refine | measured | yes |" in files["markdown"].read_text()
    first = (tmp_path / "x.svg").read_bytes()
    report.write_curves(rows(), output=tmp_path / "x.svg", title="t")
    assert (tmp_path / "x.svg").read_bytes() == first
