"""All methods at several ratios in one table, with the numbers that papers report beside them."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aasvd.artifacts import replacing

Row = dict[str, Any]

_MEASURING = ("perplexity", "accuracy")


def dense_row(result: Mapping[str, Any]) -> Row:
    """Return the table's row of the dense model, from any run's eval.json."""
    return {
        "method": "dense",
        "variant": "",
        "source": "measured",
        "ratio": 1.0,
        "kept_linears": 1.0,
        "kept_model": 1.0,
        **_measured(result, "dense"),
    }


def run_row(result: Mapping[str, Any], *, method: str, variant: str) -> Row:
    """Return the table's row of a run, from its eval.json."""
    counts = result["parameters"]
    compressing = [s for stage, s in result["seconds"].items() if not stage.startswith(_MEASURING)]
    row = {
        "method": method,
        "variant": variant,
        "source": "measured",
        "ratio": result["ratio"]["target"],
        "kept_linears": result["ratio"]["achieved"],
        "kept_model": counts["compressed"] / counts["dense"],
        **_measured(result, "compressed"),
        "seconds": sum(compressing),
        "peak_memory_mb": result["peak_memory_mb"],
    }
    dense = _measured(result, "dense").get("accuracy average")
    if dense:
        # As in the papers: the share of the dense model's average that is lost.
        row["drop"] = 1 - row["accuracy average"] / dense
    return row


def _measured(result: Mapping[str, Any], side: str) -> Row:
    texts = {f"perplexity {text}": pair[side] for text, pair in result["perplexity"].items()}
    tasks = {f"accuracy {task}": pair[side] for task, pair in result["accuracy"].items()}
    average = {"accuracy average": sum(tasks.values()) / len(tasks)} if tasks else {}
    return {**texts, **tasks, **average}


def reported_rows(published: Mapping[str, Any], ratios: Sequence[float]) -> list[Row]:
    """Return the rows of numbers that others report, marked as such, dense first."""
    dense = {"system": "dense", "ratio": 1.0, **published["dense"]}
    rows = []
    for entry in [dense, *published["rows"]]:
        if entry["ratio"] in (1.0, *ratios):
            texts = {
                f"perplexity {text}": entry[text] for text in ("wikitext2", "ptb", "c4") if text in entry
            }
            rows.append(
                {
                    "method": entry["system"],
                    "variant": "",
                    "source": f"reported: {published['sources'][entry['source']]}",
                    "ratio": entry["ratio"],
                    **texts,
                    "accuracy average": entry["accuracy"],
                }
            )
    return rows


def columns(rows: Iterable[Row]) -> list[str]:
    """Return the columns that any row has, in the order of the fullest ones."""
    longest = sorted(rows, key=len, reverse=True)
    return list(dict.fromkeys(name for row in longest for name in row))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if name.startswith("accuracy") or name == "drop":
        return f"{100 * value:.1f} %"
    if name.startswith("kept"):
        return f"{value:.4f}"
    if name.startswith(("seconds", "peak")):
        return f"{value:.0f}"
    return f"{value:g}" if name == "ratio" else f"{value:.2f}"


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    names = columns(rows)
    return names, [[_cell(name, row.get(name)) for name in names] for row in rows]


def as_markdown(tables: Mapping[str, Sequence[Row]], *, notes: Sequence[str]) -> str:
    """Return titled tables in Markdown."""
    parts = []
    for title, rows in tables.items():
        head, body = _cells(rows)
        lines = [head, ["---"] * len(head), *body]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join([*parts, *notes]) + "\n"


def as_html(tables: Mapping[str, Sequence[Row]], *, notes: Sequence[str], figure: str) -> str:
    """Return titled tables and a figure (SVG markup) as a page of its own."""
    parts = []
    for title, rows in tables.items():
        head, body = _cells(rows)
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in body]
        parts.append(
            f"<h2>{html.escape(title)}</h2>\n<table><thead><tr>"
            + "".join(f"<th>{html.escape(name)}</th>" for name in head)
            + "</tr></thead>\n<tbody>\n"
            + "\n".join(f"<tr>{line}</tr>" for line in lines)
            + "\n</tbody></table>"
        )
    style = (
        "body{font:14px/1.5 sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child,td:nth-child(-n+3){text-align:left}"
    )
    # The figure's XML declaration and document type have no place inside a page.
    drawing = figure[figure.index("<svg") :]
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{style}</style>{''.join(parts[:1])}{paragraphs}{drawing}{''.join(parts[1:])}</html>\n"
    )


_TEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "–": "--"}


def as_latex(tables: Mapping[str, Sequence[Row]]) -> str:
    """Return the tables as LaTeX tabulars (booktabs)."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_TEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

    parts = []
    for title, rows in tables.items():
        head, body = _cells(rows)
        parts += [f"% {title}", r"\begin{tabular}{lll" + "r" * (len(head) - 3) + "}", r"\toprule"]
        parts += [line(head), r"\midrule", *(line(cells) for cells in body), r"\bottomrule", r"\end{tabular}"]
    return "\n".join(parts) + "\n"


def write(
    tables: Mapping[str, Sequence[Row]],
    *,
    notes: Sequence[str],
    figure: Path,
    page: Path,
    markdown: Path,
    latex: Path,
    parquet: Path,
) -> None:
    """Write the comparison in every format; the Parquet file holds the rows of all tables, unrounded."""
    rows = [row for table in tables.values() for row in table]
    names = columns(rows)
    whole = pa.table({name: [row.get(name) for row in rows] for name in names})
    texts: dict[Path, Callable[[], str]] = {
        page: lambda: as_html(tables, notes=notes, figure=figure.read_text()),
        markdown: lambda: as_markdown(tables, notes=notes),
        latex: lambda: as_latex(tables),
    }
    with replacing(parquet) as temporary:
        pq.write_table(whole, temporary)
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text())
