from pathlib import Path

import pytest
from pages import cells

from aasvd.tables import Table, number, percent

TABLE = Table(
    "50 % of a_b & more", ("run", "a|b", "±"), [("x_1", "1", "2"), ("<y>", "3", "4")], ["A note."], groups=[1]
)


def test_every_format_holds_every_cell(tmp_path: Path) -> None:
    files = [tmp_path / f"table.{ending}" for ending in ("html", "md", "tex", "txt")]
    TABLE.write(*files)
    assert cells(files[0].read_text()) == [list(TABLE.columns), *map(list, TABLE.rows)]
    markdown = files[1].read_text().splitlines()
    assert markdown[-4:] == [
        "| run | a\\|b | ± |",
        "| --- | ---: | ---: |",
        "| x_1 | 1 | 2 |",
        "| <y> | 3 | 4 |",
    ]
    tex = files[2].read_text()
    assert r"x\_1 & 1 & 2 \\" in tex and r"\textless{}y\textgreater{} & 3 & 4 \\" in tex
    assert r"run & a\textbar{}b & $\pm$ \\" in tex
    assert r"\caption{50 \% of a\_b \& more. A note.}" in tex
    assert tex.count(r"\midrule") == 2
    assert files[3].read_text().splitlines()[2].split() == ["x_1", "1", "2"]


def test_a_table_longer_than_a_page_is_no_float() -> None:
    tex = TABLE._replace(rows=[("x_1", "1", "2")] * 41).latex()
    assert tex.count(r"x\_1 & 1 & 2 \\") == 41
    assert tex.count(r"\begin{longtable}{lrr}") == tex.count(r"\end{longtable}") == 1
    assert r"\caption{50 \% of a\_b \& more. A note.} \\" in tex
    assert r"\endhead" in tex and "tabular" not in tex


def test_a_table_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"can be written as \.html"):
        TABLE.write(tmp_path / "table.doc")
    with pytest.raises(ValueError, match="does not have 3 cells"):
        TABLE._replace(rows=[("a", "b")]).write(tmp_path / "table.md")


def test_numbers_are_short_and_a_missing_one_is_a_dash() -> None:
    assert [number(value) for value in (21.239, 105474.0, None)] == ["21.24", "1.05e5", "–"]
    assert [percent(0.5), percent(0.684, 0.011), percent(None)] == ["50.0", "68.4 ± 1.1", "–"]
