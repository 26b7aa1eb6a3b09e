"""Figures: style shared by all of them, and those of results/paper/. The only module that imports matplotlib.

Series differ by colour, marker and dash at once, so that they stay apart in greyscale and for
colour-blind readers. Files have no date and fixed ids: the same numbers give the same bytes.
"""

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from aasvd.artifacts import replacing

# Okabe and Ito's palette without its yellow, which is lost on white; dark and light in turn.
BLUE, VERMILION = "#0072B2", "#D55E00"
PALETTE = (BLUE, "#E69F00", "#000000", "#CC79A7", VERMILION, "#56B4E9", "#009E73")
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", "-.", ":")
# Where many methods stand beside each other: how many times the dense model's perplexity is still shown.
_HIGHEST = 100
_AS_DECLARED = "as declared"  # a method without a variant


class Series(NamedTuple):
    """One line of a figure.

    Attributes:
        label: Its name in the legend.
        x: Where its points are.
        y: Their values.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]


def style(number: int) -> dict[str, Any]:
    """Return how the series of this number is drawn: no two of the first 28 are alike."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.4,
        "markersize": 4,
    }


@contextlib.contextmanager
def drawing(*outputs: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of a size in inches, and save it as .png and .svg files."""
    with mpl.rc_context({"svg.hashsalt": "aasvd", "font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for output in outputs:
            kind = output.suffix.removeprefix(".")
            dated = {"Date": None} if kind == "svg" else {"Software": None}
            with replacing(output) as temporary:
                figure.savefig(temporary, format=kind, metadata=dated, dpi=150)


def blocks_axis(axes: Any) -> None:
    """Let the horizontal axis count blocks."""
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, which="major", alpha=0.3)


def _plot(axes: Any, series: Sequence[Series], *, log: bool) -> None:
    for number, line in enumerate(series):
        if len(line.y):  # else its name would stand in the legend for nothing
            axes.plot(line.x, line.y, label=line.label, **style(number))
    values = [value for line in series for value in line.y]
    if log and values and min(values) > 0:
        axes.set_yscale("log")


def _legend_below(figure: Figure, axes: Any) -> None:
    """Name the series below the panels, where the legend covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)


def _dense_line(axes: Any, value: float, label: str, colour: str) -> None:
    """Draw the dense model's number as a line across, with its name on it."""
    axes.axhline(value, color=colour, linestyle=":", linewidth=1)
    axes.annotate(
        label, (0.99, value), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
        ha="right", va="bottom", fontsize=8,
    )  # fmt: skip


def depth(
    series: Sequence[Series], perplexity: Sequence[float | None], *, dense: float | None, text: str,
    title: str, outputs: Sequence[Path],
) -> None:  # fmt: skip
    """Draw the cosine distance of block outputs over depth, and each run's perplexity beside it.

    Args:
        series: Per run, the mean of 1 - cosine similarity of every block; empty where it is not known.
        perplexity: Perplexity of the same runs; drawn in the style of `series`.
        dense: The dense model's perplexity.
        text: What perplexity was taken on.
        title: Title of the figure.
        outputs: Files to write.
    """
    with drawing(*outputs, width=10, height=max(3.8, 1.6 + 0.32 * len(series))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _plot(left, series, log=True)
        blocks_axis(left)
        left.set_ylabel("mean of 1 - cosine similarity")
        left.set_title("distortion of block outputs", fontsize=10)
        shown = [
            (number, line.label, value)
            for number, (line, value) in enumerate(zip(series, perplexity, strict=True))
            if value is not None
        ]
        for place, (number, _, value) in enumerate(shown):
            drawn = style(number)
            right.plot([value], [place], color=drawn["color"], marker=drawn["marker"], markersize=8)
            right.annotate(
                f"{value:.4g}", (value, place), xytext=(9, 0), textcoords="offset points", va="center"
            )
        if dense is not None:
            right.axvline(dense, color="0.4", linestyle=":", label=f"dense {dense:.4g}")
            right.legend(loc="best")
        right.set_yticks(range(len(shown)), [label for _, label, _ in shown])
        right.set_ylim(max(len(shown), 1) - 0.5, -0.5)
        _log_axis_of_few_values(right, [*(value for _, _, value in shown), dense])
        right.set_xlabel(f"perplexity per token on {text}")
        right.set_title("of the whole model", fontsize=10)
        _legend_below(figure, left)
        figure.suptitle(title)


def _log_axis_of_few_values(axes: Any, values: Sequence[float | None]) -> None:
    """Give a logarithmic axis whole-number labels and room for the numbers beside the points."""
    known = [value for value in values if value is not None]
    if not known:
        return
    axes.set_xscale("log")
    low, high = min(known), max(known)
    span = max(high / low, 1.5)
    axes.set_xlim(low / span**0.1, high * span**0.45)
    steps = [m * 10.0**e for e in range(-1, 9) for m in (1, 2, 5)]
    inside = [step for step in steps if low / span**0.1 <= step <= high * span**0.45]
    ticks = inside if len(inside) <= 5 else inside[:: -(-len(inside) // 5)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, axis="x", alpha=0.3)


def sweep(
    perplexity: Sequence[Series], accuracy: Series | None, *, dense: Mapping[str, float],
    dense_accuracy: float | None, title: str, tasks: str, outputs: Sequence[Path],
) -> None:  # fmt: skip
    """Draw perplexity per text and average accuracy against the number of calibration sequences.

    Args:
        perplexity: Per text, perplexity at each number of sequences.
        accuracy: Average accuracy in percent at each number of sequences.
        dense: The dense model's perplexity per text.
        dense_accuracy: The dense model's average accuracy in percent.
        title: Title of the figure.
        tasks: Over what accuracy is averaged.
        outputs: Files to write.
    """
    with drawing(*outputs, width=9, height=3.8) as figure:
        left, right = figure.subplots(1, 2)
        _plot(left, perplexity, log=True)
        for number, line in enumerate(perplexity):
            if line.label in dense:
                _dense_line(left, dense[line.label], f"{line.label}, dense", style(number)["color"])
        left.set_ylabel("perplexity per token")
        if left.get_yscale() == "log":
            # Names for all ticks between powers of ten would lie on one another.
            left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            left.yaxis.set_minor_formatter(NullFormatter())
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if accuracy is not None:
            _plot(right, [accuracy], log=False)
        if dense_accuracy is not None:
            _dense_line(right, dense_accuracy, "dense", BLUE)
        right.margins(y=0.12)  # room for the name of the dense line
        right.set_ylabel(f"accuracy, average over {tasks}, %")
        counts = sorted({x for line in perplexity for x in line.x} | set(accuracy.x if accuracy else ()))
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(counts))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("calibration sequences")
            axes.grid(visible=True, which="major", alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        figure.suptitle(title)


def layers(mse: Sequence[Series], cosine: Sequence[Series], *, title: str, outputs: Sequence[Path]) -> None:
    """Draw the error of some layers' outputs and of block outputs over depth: squared error and cosine."""
    with drawing(*outputs, width=9, height=3.8) as figure:
        for axes, series, label in zip(
            figure.subplots(1, 2), (mse, cosine), ("mean squared error", "mean of 1 - cosine similarity"),
            strict=True,
        ):  # fmt: skip
            _plot(axes, series, log=True)
            blocks_axis(axes)
            axes.set_ylabel(label)
        _legend_below(figure, axes)
        figure.suptitle(title)


def _cut(panels: Sequence[Any], top: float) -> None:
    """End a row of panels at a height, and name in each what lies above it."""
    highest = [
        {line.get_label(): max(line.get_ydata(), default=0.0) for line in axes.lines} for axes in panels
    ]
    if max(max(some.values()) for some in highest) <= top:
        return
    panels[0].set_ylim(top=top)
    for axes, some in zip(panels, highest, strict=True):
        if above := [name for name, value in some.items() if value > top]:
            text = textwrap.fill(f"also above {top:.0f}: {', '.join(above)}", 60)
            behind = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
            axes.annotate(text, (0.01, 0.99), xycoords="axes fraction", va="top", fontsize=6, bbox=behind)


def write_curves(rows: Sequence[Mapping[str, Any]], *, output: Path, title: str) -> None:
    """Draw perplexity against ratio, one line per method (SVG).

    A row of panels per text, and a panel per variant; where there are more variants than methods, the other
    way round. What fails goes off the top, lest all others fall into one line, and is named there.

    Args:
        rows: Rows with `method`, `variant`, `ratio` and `perplexity <text>`; the dense model's has ratio 1.
        output: The file to write.
        title: Title of the figure.
    """
    texts = list(
        dict.fromkeys(
            name
            for row in rows
            for name, value in row.items()
            if name.startswith("perplexity ") and value is not None
        )
    )
    compressed = [row for row in rows if row["ratio"] < 1]
    methods, variants = (list(dict.fromkeys(row[key] for row in compressed)) for key in ("method", "variant"))
    line, panel = ("method", "variant") if len(methods) >= len(variants) else ("variant", "method")
    lines, panels = (methods, variants) if line == "method" else (variants, methods)
    columns, height = max(1, len(panels)), 3.6 * max(1, len(texts)) + 0.8
    with drawing(output, width=5 * columns + 2, height=max(height, 0.2 * len(lines))) as figure:
        grid = figure.subplots(max(1, len(texts)), columns, squeeze=False, sharex=True, sharey="row")
        for text, some in zip(texts, grid, strict=False):
            dense = [row[text] for row in rows if row["ratio"] == 1 and row.get(text) is not None]
            for name, axes in zip(panels, some, strict=False):
                for number, one in enumerate(lines):
                    points = sorted(
                        (row["ratio"], row[text])
                        for row in compressed
                        if (row[line], row[panel]) == (one, name) and row.get(text) is not None
                    )
                    axes.plot(
                        [ratio for ratio, _ in points],
                        [value for _, value in points],
                        label=one or _AS_DECLARED,
                        **style(number),
                    )
                for value in dense:
                    axes.axhline(value, color="black", linewidth=0.8, label="dense")
                axes.set_yscale("log")
                axes.grid(visible=True, which="major", alpha=0.3)
                axes.set_title(name or _AS_DECLARED, fontsize=9)
            some[0].set_ylabel(text)
            if dense:
                _cut(some, _HIGHEST * max(dense))
        for axes in grid[-1]:
            axes.set_xlabel("retained-parameter ratio")
        if texts and compressed:
            figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
        figure.suptitle(title)
