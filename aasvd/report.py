"""Numbers as people read them: tables and figures. The only module that imports matplotlib."""

import html
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aasvd.artifacts import replacing

# Okabe and Ito's palette: distinct in greyscale and to colour-blind readers.
BLUE, VERMILION = "#0072B2", "#D55E00"


def _rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table of a run as (what, dense, compressed)."""
    rows = [
        (f"perplexity {text}", f"{pair['dense']:.2f}", f"{pair['compressed']:.2f}")
        for text, pair in result["perplexity"].items()
    ]
    for task, pair in result["accuracy"].items():
        dense = f"{100 * pair['dense']:.1f} ± {100 * pair['stderr_dense']:.1f} %"
        rows.append(
            (f"accuracy {task}", dense, f"{100 * pair['compressed']:.1f} ± {100 * pair['stderr']:.1f} %")
        )
    counts = result["parameters"]
    rows.append(("parameters", f"{counts['dense']:,}", f"{counts['compressed']:,}"))
    linears = counts["linears"]
    rows.append(("of these in the blocks' linears", f"{linears['dense']:,}", f"{linears['compressed']:,}"))
    return rows


def summary(result: Mapping[str, Any], *, model: str) -> str:
    """Return a run's table as text for a terminal."""
    header = (f"{result['run']}", "dense", "compressed")
    rows = [header, *_rows(result)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    lines.insert(1, "-" * len(lines[0]))
    ratio = result["ratio"]
    lines.append(
        f"kept {ratio['achieved']:.4f} of the linears' parameters (asked: {ratio['target']:g}) in "
        f"{sum(result['seconds'].values()):.0f} s of stages, with at most {result['peak_memory_mb']:.0f} MB"
    )
    lines.append(f"the compressed model lies in {model}")
    return "\n".join(lines)


def write_table(result: Mapping[str, Any], *, output: Path) -> None:
    """Write a run's table as an HTML page of its own."""
    cells = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(result)
    )
    style = (
        "body{font:15px/1.5 sans-serif;margin:2em}"
        "td,th{padding:.3em 1em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}"
    )
    title = html.escape(result["run"])
    ratio = result["ratio"]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1><p>{html.escape(result['method'])}, "
        f"objective {html.escape(result['objective'])}; kept "
        f"{ratio['achieved']:.4f} of the linears' parameters (asked: {ratio['target']:g}).</p>"
        f"<table><tr><th></th><th>dense</th><th>compressed</th></tr>\n{cells}\n</table></html>\n"
    )
    with replacing(output) as temporary:
        temporary.write_text(page)


def model_card(
    result: Mapping[str, Any],
    *,
    base: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    ranks: Mapping[str, int],
    path: str,
) -> str:
    """Return the README.md of a checkpoint: what it is, what it scores, how to load it.

    Holds nothing that changes between two runs of the same parameters, such as times.

    Args:
        result: A run's eval.json.
        base: The base model's source in params.yaml.
        shapes: (out, in) of each linear of the blocks, by module name.
        ranks: Rank of each compressed one, by module name.
        path: Module name of the list of blocks.
    """
    kinds: dict[tuple[str, str], list[int | None]] = {}
    for name, (rows, columns) in shapes.items():
        kind = name.removeprefix(f"{path}.").partition(".")[2]
        kinds.setdefault((kind, f"{rows} x {columns}"), []).append(ranks.get(name))
    table = "\n".join(
        f"| {kind} | {shape} | {_span(found)} | {len(found)} |" for (kind, shape), found in kinds.items()
    )
    scores = "\n".join(f"| {what} | {dense} | {compressed} |" for what, dense, compressed in _rows(result))
    source = ", ".join(f"{key} {value}" for key, value in base.items())
    ratio = result["ratio"]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [aasvd, low-rank]
---

# {result["run"]}

Base model: {result["model"]} ({source}), whose licence applies. Compressed by {result["method"]}:
objective {result["objective"]}, storage {result["storage"]}, precision {result["precision"]}; kept
{ratio["achieved"]:.4f} of the linears' parameters (asked: {ratio["target"]:g}).

| | dense | compressed |
| --- | --- | --- |
{scores}
| bytes of weights | {result["bytes"]["dense"]:,} | {result["bytes"]["compressed"]:,} |

## Load

```python
import aasvd  # registers the checkpoint format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Nothing in the folder is executed. `sha256sum -c SHA256SUMS` checks it; loading checks model and config.

## Ranks

| linear | shape | rank | blocks |
| --- | --- | --- | --- |
{table}
"""


def _span(ranks: Sequence[int | None]) -> str:
    found = [rank for rank in ranks if rank is not None]
    if not found:
        return "dense"
    span = f"{min(found)}" if min(found) == max(found) else f"{min(found)} to {max(found)}"
    return span if len(found) == len(ranks) else f"{span}, {len(ranks) - len(found)} dense"


def write_distortion(records: Iterable[Mapping[str, Any]], *, output: Path, run: str) -> None:
    """Draw the distortion of every block's output before and after refinement (SVG).

    Args:
        records: Records of all stages; those of refinement hold `before`, of propagation `after`.
        output: The file to write.
        run: Name in the title.
    """
    found = list(records)
    before = [record["before"] for record in found if "before" in record]
    after = [record["after"] for record in found if "after" in record]
    # No date and fixed ids: the same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "aasvd", "font.size": 10}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, metric, label in zip(
            figure.subplots(1, 2),
            ("mse", "cosine"),
            ("mean squared error", "mean of 1 - cosine similarity"),
            strict=True,
        ):
            if before:
                _line(axes, [entry[metric] for entry in before], colour=VERMILION, marker="o", label="solved")
            finished = "refined" if before else "solved"
            _line(axes, [entry[metric] for entry in after], colour=BLUE, marker="s", label=finished)
            if not after:
                # Each block was solved by itself, from the original inputs alone.
                axes.text(0.5, 0.5, "nothing went through the blocks", ha="center", transform=axes.transAxes)
            axes.set_xlabel("block")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylabel(label)
            axes.grid(visible=True, which="major", alpha=0.3)
            if after:
                axes.set_yscale("log")
                axes.legend()
        figure.suptitle(f"Distortion of block outputs, {run}")
        with replacing(output) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def write_curves(rows: Sequence[Mapping[str, Any]], *, output: Path, title: str) -> None:
    """Draw perplexity against ratio, one line per method, one panel per text (SVG).

    Args:
        rows: Rows with `method`, `variant`, `ratio` and `perplexity <text>`; the dense model's has ratio 1.
        output: The file to write.
        title: Title of the figure.
    """
    texts = list(dict.fromkeys(name for row in rows for name in row if name.startswith("perplexity ")))
    lines = list(dict.fromkeys((row["method"], row["variant"]) for row in rows if row["ratio"] < 1))
    methods = list(dict.fromkeys(method for method, _ in lines))
    variants = list(dict.fromkeys(variant for _, variant in lines))
    colours = mpl.colormaps["turbo"].resampled(max(2, len(methods)))
    with mpl.rc_context({"svg.hashsalt": "aasvd", "font.size": 9}):
        figure = Figure(figsize=(5.5 * max(1, len(texts)) + 2.5, 5), layout="constrained")
        panels = figure.subplots(1, max(1, len(texts)), squeeze=False)[0]
        for axes, text in zip(panels, texts, strict=False):
            for method, variant in lines:
                own = [r for r in rows if (r["method"], r["variant"]) == (method, variant) and text in r]
                points = sorted((row["ratio"], row[text]) for row in own)
                axes.plot(
                    [ratio for ratio, _ in points],
                    [value for _, value in points],
                    color=colours(methods.index(method)),
                    linestyle=("-", "--", ":", "-.")[variants.index(variant) % 4],
                    marker="osv^Dx*"[methods.index(method) % 7],
                    markersize=4,
                    linewidth=1.3,
                    label=" ".join(filter(None, (method, variant))),
                )
            for row in rows:
                if row["ratio"] == 1 and text in row:
                    axes.axhline(row[text], color="black", linewidth=0.8, label="dense")
            axes.set_xlabel("retained-parameter ratio")
            axes.set_ylabel(text)
            axes.set_yscale("log")
            axes.grid(visible=True, which="major", alpha=0.3)
        if texts:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
        figure.suptitle(title)
        with replacing(output) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _line(axes: Any, values: Sequence[float], *, colour: str, marker: str, label: str) -> None:
    blocks = range(1, len(values) + 1)
    axes.plot(blocks, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        sys.stdout.write(summary(json.loads(path.read_text()), model=str(path.parent / "model")) + "\n")
