"""All methods at several ratios in one table, with the numbers that papers report beside them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aasvd import tables
from aasvd.artifacts import replacing
from aasvd.results import compresses
from aasvd.tables import Table, counted, number, percent

Row = dict[str, Any]

_AVERAGE = "accuracy average"
_NAMES = ("method", "variant", "source", "refined")


def dense_row(results: Iterable[Mapping[str, Any]]) -> Row:
    """Return the table's row of the dense model, from all runs' eval.json: where one failed, another may not.

    Its average is over all tasks that any has.
    """
    known: Row = {}
    for result in results:
        for name, value in _measured(result, "dense").items():
            if name != _AVERAGE and known.get(name) is None:
                known[name] = value
    tasks = [value for name, value in known.items() if name.startswith("accuracy ") and value is not None]
    return {
        "method": "dense",
        "variant": "",
        "source": "measured",
        "ratio": 1.0,
        "kept_linears": 1.0,
        "kept_model": 1.0,
        **known,
        **({_AVERAGE: sum(tasks) / len(tasks)} if tasks else {}),
    }


def run_row(result: Mapping[str, Any], *, method: str, variant: str) -> Row:
    """Return the table's row of a run, from its eval.json."""
    counts, average = result["parameters"], result["average"].get("acc")
    return {
        "method": method,
        "variant": variant,
        "source": "measured",
        "refined": result["refined"],
        "ratio": result["ratio"]["target"],
        "kept_linears": result["ratio"]["achieved"],
        "kept_model": counts["compressed"] / counts["dense"],
        **_measured(result, "compressed"),
        # As in the papers: the share of the dense model's average that is lost.
        **({"drop": average["relative_drop"]} if average else {}),
        "seconds": sum(seconds for stage, seconds in result["seconds"].items() if compresses(stage)),
        "peak_memory_mb": result["peak_memory_mb"],
        "added_memory_mb": result["added_memory_mb"],
        "peak_device_memory_mb": result["peak_device_memory_mb"],
    }


def measured_note(
    runs: Mapping[tuple[str, str, str], Mapping[str, Any]], left_out: Mapping[tuple[str, str], str]
) -> str:
    """Return what is to be said above the measured rows.

    Args:
        runs: Their eval.json, by method, variant and ratio.
        left_out: By method and variant, why there is no such row.
    """
    results = list(runs.values())
    sizes = sorted({result["evaluation"]["window"] for result in results})
    windows = counted((text, pair["windows"]) for r in results for text, pair in r["perplexity"].items())
    examples = counted((task, pair["count"]) for r in results for task, pair in r["accuracy"].items())
    return (
        "Without a variant, a method is as params.yaml declares it; a variant that changes nothing of a "
        "method has no row. Ratios are shares kept of the blocks' linears (kept_linears) and of all "
        "parameters (kept_model). "
        f"Perplexity is per token; windows of {' or '.join(map(str, sizes))} tokens: {windows}. "
        + (f"Accuracy is zero-shot; examples: {examples}. " if examples else "")
        + "Seconds are the sum and peak memory (host, device) the "
        "maximum over the stages that made a checkpoint, those that runs share too, without fetching and "
        "measuring. A process that makes many runs holds what earlier ones left: added memory is what a "
        "stage took beyond that. Seconds depend on what ran beside. Averages of accuracy are over the tasks "
        "measured on both models; drop is the share of the dense one that is lost. A measurement that failed "
        "is –."
        + _fewer_tasks(runs)
        + _updated(runs)
        + "".join(f" Left out: {method} {variant}: {why}." for (method, variant), why in left_out.items())
    )


def _fewer_tasks(runs: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    """Name the runs whose average leaves out tasks that failed."""
    averages = {" ".join(filter(None, names)): result["average"] for names, result in runs.items()}
    fewer = [
        f"{name} ({own['tasks']} of {own['of']})"
        for name, own in averages.items()
        if 0 < own["tasks"] < own["of"]
    ]
    return f" Averages of fewer tasks: {', '.join(fewer)}." if fewer else ""


def _updated(runs: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    """Say for how long the post-step trained, which is no refinement but training all the same."""
    epochs = {
        (" ".join(filter(None, (method, variant))), result["post"]["epochs"])
        for (method, variant, _), result in runs.items()
        if result["post"]["epochs"]
    }
    return "".join(
        f" {name} is updated after all, {count} epoch{'s' if count > 1 else ''} of each factor."
        for name, count in sorted(epochs)
    )


def _measured(result: Mapping[str, Any], side: str) -> Row:
    texts = {f"perplexity {text}": pair[side] for text, pair in result["perplexity"].items()}
    tasks = {f"accuracy {task}": pair[side] for task, pair in result["accuracy"].items()}
    average = result["average"].get("acc")
    return {**texts, **tasks, **({_AVERAGE: average[side]} if average else {})}


def reported_rows(published: Mapping[str, Any], ratios: Sequence[float]) -> list[Row]:
    """Return the rows of numbers that others report, marked as such, with what their sources give."""
    measured = {
        **{f"perplexity {text}": text for text in ("wikitext2", "ptb", "c4")},
        _AVERAGE: "accuracy",
    }
    return [
        {
            "method": entry["system"],
            "variant": "",
            "source": f"reported: {entry['source']}",
            "ratio": entry["ratio"],
            **{column: entry[name] for column, name in measured.items() if name in entry},
        }
        for entry in published["rows"]
        if entry["ratio"] in (1.0, *ratios)
    ]


def reported_note(published: Mapping[str, Any]) -> str:
    """Return what is to be said above the reported rows."""
    sources = "; ".join(f"{name}: {source}" for name, source in published["sources"].items())
    return f"{published['note']} Sources: {sources}."


def columns(rows: Iterable[Row]) -> list[str]:
    """Return the columns that any row has, in the order of the fullest ones."""
    longest = sorted(rows, key=len, reverse=True)
    return list(dict.fromkeys(name for row in longest for name in row))


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.startswith("accuracy") or name == "drop":
        return percent(value) + ("" if value is None else " %")
    if name == "ratio":
        return f"{value:g}"
    return number(
        value, 4 if name.startswith("kept") else 0 if name == "seconds" or name.endswith("_mb") else 2
    )


def _table(title: str, rows: Sequence[Row], note: str) -> Table:
    names = columns(rows)
    cells = [[_cell(name, row.get(name)) for name in names] for row in rows]
    return Table(title, names, cells, [note], names=sum(name in _NAMES for name in names))


def write(
    rows: Mapping[str, Sequence[Row]],
    *,
    notes: Sequence[str],
    figure: Path,
    page: Path,
    markdown: Path,
    latex: Path,
    parquet: Path,
) -> None:
    """Write the comparison in every format.

    Args:
        rows: The rows of each table, by its title.
        notes: What is to be said above each.
        figure: An SVG file that the page shows after the first table.
        page: The HTML page.
        markdown: The tables in Markdown.
        latex: The tables in LaTeX.
        parquet: The rows of all tables, unrounded.
    """
    made = [_table(title, some, note) for (title, some), note in zip(rows.items(), notes, strict=True)]
    first, *others = [table.section() for table in made]
    # The figure's XML declaration and document type have no place inside a page.
    drawing = "<svg" + figure.read_text().partition("<svg")[2]
    texts = {
        page: tables.page("Comparison", first, drawing, *others),
        markdown: "\n".join(table.markdown() for table in made),
        latex: "\n".join(table.latex() for table in made),
    }
    everything = [row for some in rows.values() for row in some]
    whole = pa.table({name: [row.get(name) for row in everything] for name in columns(everything)})
    with replacing(parquet) as temporary:
        pq.write_table(whole, temporary)
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text)
