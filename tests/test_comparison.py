import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from aasvd import comparison, figures, results

PUBLISHED = json.loads((Path(__file__).parent.parent / "workflow" / "published.json").read_text())
ACCURACY = {
    "piqa": {"dense": 0.6, "compressed": 0.5, "count": 32},
    "sciq": {"dense": 0.8, "compressed": 0.55, "count": 32},
}
RESULT: dict[str, Any] = {
    "method": "ours",
    "post": {"epochs": 0},
    "refined": True,
    "ratio": {"target": 0.6, "achieved": 0.5995},
    "parameters": {"dense": 200, "compressed": 150},
    "perplexity": {"a_b": {"dense": 20.0, "compressed": 50.0, "windows": 3}},
    "accuracy": ACCURACY,
    "average": results.average(ACCURACY),
    "evaluation": {"window": 2048},
    "seconds": {
        "fetch model": 50.0,
        "solve": 3.0,
        "capture": 4.0,
        "perplexity": 100.0,
        "accuracy piqa": 100.0,
    },
    "peak_memory_mb": 123.0,
    "added_memory_mb": 12.0,
    "peak_device_memory_mb": 45.0,
}


# As the papers have them: at 0.8/0.6/0.4, perplexity and average accuracy; dense last.
TABLE = """
| SVD | 20061/52489/105474 | – | 18800/47774/106976 | .03/.03/.01 | SVD-LLM v5 |
| FWSVD | 1727/18156/32194 | – | 1511/12847/29292 | .08/.04/.02 | SVD-LLM v5 |
| ASVD | 11.14/1407/57057 | 16.55/3292/45218 | 15.93/1109/43036 | .43/.30/.29 | AA-SVD |
| SVD-LLM (W) | 7.94/13.11/53.74 | 16.22/63.75/438.58 | 15.84/49.83/383.07 | .44/.37/.31 | AA-SVD |
| SVD-LLM | 7.73/9.27/15.00 | – | 12.23/15.63/26.26 | .55/.50/.30 | SVD-LLM v5 |
| SVD-LLM V2 | 7.12/–/– | – | 10.47 | .54 | SVD-LLM V2 |
| Dip-SVD | 7.95/12.76/– | 15.60/46.95 | 14.07/34.35 | .47/.41 | AA-SVD |
| Dobi-SVD | 8.54/13.54/46.18 | 14.83/46.38/238.91 | 10.01/23.54/190.62 | .46/.38/.32 | AA-SVD |
| Swift-SVD (dynamic) | 7.84/13.29/62.32 | – | 11.15/21.92/137.77 | .51/.44/.34 | Swift-SVD |
| SAES-SVD | 7.17/10.42/22.01 | 15.16/45.13/116.83 | 13.77/32.79/93.97 | .49/.41/.33 | AA-SVD |
| AA-SVD | 6.89/8.35/13.67 | 12.30/24.94/74.64 | 12.04/18.97/46.14 | .50/.44/.37 | AA-SVD |
| Dobi-SVD, remapped | 6.08/8.12/9.95 | 15.39/43.85/67.62 | 7.83/12.63/17.94 | .51/.47/.40 | AA-SVD |
| AA-SVD, remapped | 6.01/7.09/8.61 | 8.97/11.07/24.44 | 8.37/11.25/19.69 | .53/.50/.44 | AA-SVD |
| ASVD | 8.60/3839.83 | – | 11.04 | – | LowRankArena |
| SVD-LLM | 7.88/13.74 | – | 16.42/55.03 | – | LowRankArena |
| Dobi-SVD | 9.23/15.24 | – | 19.01/48.37 | – | LowRankArena |
| Basis Sharing | 7.74/12.42 | – | 15.51/41.13 | – | LowRankArena |
| MoDeGPT | 6.92/12.43 | – | 10.87/23.40 | – | LowRankArena |
| dense | 5.68 | 8.34 | 7.34 | .55 | AA-SVD |
| dense | 5.67 | – | 7.20 | – | LowRankArena |
"""


def published_table() -> set[tuple[Any, ...]]:
    """Return the cells of the table above: system, source, ratio, column and number."""
    found = set()
    for line in TABLE.strip().splitlines():
        system, *columns, source = [cell.strip() for cell in line.strip("|").split("|")]
        for column, numbers in zip(("wikitext2", "ptb", "c4", "accuracy"), columns, strict=True):
            ratios = (1.0,) if system == "dense" else (0.8, 0.6, 0.4)
            for ratio, number in zip(ratios, numbers.split("/"), strict=False):
                if number != "–":
                    found.add((system, source, ratio, column, float(number)))
    return found


def rows() -> list[comparison.Row]:
    return [
        comparison.dense_row([RESULT]),
        comparison.run_row(RESULT, method="ours & theirs", variant="refine"),
    ]


def test_a_row_is_what_the_run_measured() -> None:
    dense, run = rows()
    assert run["kept_linears"] == 0.5995 and run["kept_model"] == 0.75 and run["seconds"] == 7.0
    assert run["refined"] is True and "refined" not in dense
    assert (run["peak_memory_mb"], run["added_memory_mb"], run["peak_device_memory_mb"]) == (
        123.0,
        12.0,
        45.0,
    )
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
        comparison.dense_row([result]),
        comparison.run_row(result, method="mine", variant=""),
        # As where every task failed.
        comparison.run_row(result | {"average": {"tasks": 0, "of": 2}}, method="none", variant=""),
    ]
    assert [row.get("accuracy average") for row in found] == [pytest.approx(0.7), 0.5, None]
    assert [row.get("drop") for row in found] == [None, pytest.approx(1 / 6), None]
    figures.write_curves(found, output=tmp_path / "x.svg", title="t")
    files = {name: tmp_path / f"x.{name}" for name in ("page", "markdown", "latex", "parquet")}
    comparison.write({"Measured": found}, notes=[""], figure=tmp_path / "x.svg", **files)
    lines = files["markdown"].read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    (mine,) = [dict(zip(cells[0], row, strict=True)) for row in cells if row[0] == "mine"]
    assert (mine["perplexity a_b"], mine["accuracy piqa"], mine["accuracy sciq"]) == ("–", "50.0 %", "–")
    assert (mine["accuracy average"], mine["drop"]) == ("50.0 %", "16.7 %")
    assert pq.read_table(files["parquet"]).to_pylist()[1]["perplexity a_b"] is None


def test_what_failed_in_one_run_is_known_of_the_dense_model_by_another() -> None:
    failed = RESULT | {
        "accuracy": {"piqa": {"dense": None}, "sciq": {"dense": None}},
        "perplexity": {"a_b": {"dense": None}, "c": {"dense": 7.0}},
        "average": {"tasks": 0, "of": 2},
    }
    row = comparison.dense_row([failed, RESULT])
    assert (row["perplexity a_b"], row["perplexity c"], row["accuracy sciq"]) == (20.0, 7.0, 0.8)
    assert row["accuracy average"] == pytest.approx(0.7)
    assert "accuracy average" not in comparison.dense_row([failed])


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


def test_every_published_number_is_that_of_the_sources() -> None:
    found = {
        (row["system"], row["source"], row["ratio"], column, row[column])
        for row in PUBLISHED["rows"]
        for column in ("wikitext2", "ptb", "c4", "accuracy")
        if column in row
    }
    expected = published_table()
    assert len(expected) == 131 + 19 + 6
    assert found == expected
    assert "SVD's averages of .03 and .01 are as printed, below chance" in PUBLISHED["note"]


def test_a_source_may_leave_numbers_out() -> None:
    found = comparison.reported_rows(PUBLISHED, [0.6])
    (arena,) = [row for row in found if row["method"] == "ASVD" and "LowRankArena" in row["source"]]
    assert {name: value for name, value in arena.items() if name != "source"} == {
        "method": "ASVD", "variant": "", "ratio": 0.6, "perplexity wikitext2": 3839.83,
    }  # fmt: skip
    assert len([row for row in found if row["method"] == "dense"]) == 2


def test_all_formats_hold_the_rows(tmp_path: Path) -> None:
    tables = {"Measured": rows(), "Reported": comparison.reported_rows(PUBLISHED, [0.6])}
    figures.write_curves(rows(), output=tmp_path / "x.svg", title="t")
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
    figures.write_curves(rows(), output=tmp_path / "x.svg", title="t")
    assert (tmp_path / "x.svg").read_bytes() == first


def test_note_says_on_how_much_was_measured() -> None:
    more = {**RESULT, "perplexity": {"a_b": {"windows": 6}, "c": {"windows": None}}, "accuracy": {}}
    names = [("svd", "", "0.6"), ("svd-llm", "short", "0.6"), ("svd-llm", "short", "0.4")]
    note = comparison.measured_note(
        dict(zip(names, [RESULT, more], strict=False)), {("svd", "optimal"): "it cannot be"}
    )
    assert "windows of 2048 tokens: a_b 3 or 6, c 0." in note
    assert "examples: piqa 32, sciq 32." in note
    assert note.endswith("Left out: svd optimal: it cannot be.")
    assert "updated" not in note and "fewer" not in note
    trained = {**RESULT, "post": {"epochs": 1}, "average": {"tasks": 1, "of": 2}}
    note = comparison.measured_note(dict(zip(names, [RESULT, trained, trained], strict=True)), {})
    assert "Averages of fewer tasks: svd-llm short 0.6 (1 of 2), svd-llm short 0.4 (1 of 2)." in note
    assert note.endswith(" svd-llm short is updated after all, 1 epoch of each factor.")
    assert note.count("updated") == 1


def test_note_of_reported_numbers_says_what_the_sources_are() -> None:
    note = comparison.reported_note(PUBLISHED)
    assert note.startswith(PUBLISHED["note"]) and note.count("arXiv") == 4
    assert "SVD-LLM v5: table of SVD-LLM, arXiv 2403.07378 version 5; " in note
