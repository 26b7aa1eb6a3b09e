"""The tables and figures under results/paper/, from results/runs.parquet and what runs publish.

Every function writes files and is called by one rule of workflow/rules/paper.smk. Runs are what
runs.parquet holds: those that a target needs are made before, any other finished run is shown too.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aasvd import figures
from aasvd.artifacts import read_json, read_table
from aasvd.figures import Series
from aasvd.layers import OUTPUT
from aasvd.params import DEFAULT
from aasvd.tables import Table, counted, number, percent

# What attention and the MLP end with, in the architectures that the pipeline knows.
_ATTENTION = ("o_proj", "out_proj", "dense")
_MLP = ("down_proj", "fc2", "dense_4h_to_h")


_DROP = "Drop: share of the dense model's average accuracy over the same tasks that is lost, in %."


class Run(NamedTuple):
    """One run of runs.parquet: what identifies it, and its metrics by name."""

    facts: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]

    @property
    def label(self) -> str:
        """Method, and the variant where there is one; a run may be named after its method too."""
        method, parts = self.facts["method"], self.facts["variant"].split("_")
        variant = "_".join(parts[1:] if parts[0] == method else parts)
        return method + (f" ({variant})" if variant else "")

    @property
    def ratio(self) -> float:
        """Retained-parameter ratio that was asked for."""
        return float(self.facts["ratio"])

    def value(self, metric: str, side: str = "value") -> float | None:
        """Return a metric, of the compressed model or of the `dense` one; None where it was not measured."""
        found = self.metrics.get(metric, {}).get(side)
        return None if found is None else float(found)


def read_runs(file: str) -> list[Run]:
    """Return the finished runs, without `default` where it repeats another run.

    That is one of the same artifacts, or of the same model and ratio under its plain name: if the two differ,
    one of them was made from other parameters than today's, and a table would show two rows of one name.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in read_table(Path(file)).to_pylist():
        by_name.setdefault(row["run"], []).append(row)
    runs = [Run(rows[0], {row["metric"]: row for row in rows}) for rows in by_name.values()]
    named = [run for run in runs if run.facts["run"] != DEFAULT]
    same = {(run.facts["model"], run.facts["compression_key"]) for run in named}
    plain = {(run.facts["model"], run.ratio) for run in named if not run.facts["variant"]}

    def repeats(run: Run) -> bool:
        model = run.facts["model"]
        return (model, run.facts["compression_key"]) in same or (model, run.ratio) in plain

    return [run for run in runs if run.facts["run"] != DEFAULT or not repeats(run)]


def of(runs: Iterable[Run], *, models: Sequence[str], ratios: Sequence[float]) -> list[Run]:
    """Return runs of these models and ratios: models in their order, large ratios first, then by label."""
    found = [run for run in runs if run.facts["model"] in models and run.ratio in ratios]
    return sorted(found, key=lambda run: (models.index(run.facts["model"]), -run.ratio, run.label))


def _names(runs: Iterable[Run], kind: str) -> list[str]:
    """Return the texts or tasks that any of the runs measured, in the order in which they come."""
    names = [
        metric.partition(" ")[2] for run in runs for metric in run.metrics if metric.startswith(f"{kind} ")
    ]
    return [name for name in dict.fromkeys(names) if name != "average"]


def _cells(run: Run, texts: Sequence[str], tasks: Sequence[str], *, side: str) -> list[str]:
    """Return perplexities, accuracies, their average and its drop against the dense model."""
    mean, dense = run.value("acc average", side), run.value("acc average", "dense")
    # Nothing right in a few examples is no number to compare with.
    drop = None if mean is None or not dense or side == "dense" else (dense - mean) / dense
    return [
        *(number(run.value(f"perplexity {text}", side)) for text in texts),
        *(percent(run.value(f"acc {task}", side)) for task in tasks),
        _average(run, tasks, side=side),
        percent(drop),
    ]


def _average(run: Run, tasks: Sequence[str], *, side: str, metric: str = "acc average") -> str:
    """Return the average accuracy, with the number of its tasks where that is not all of these."""
    mean = run.value(metric, side)
    return percent(mean) + (
        f" ({_averaged(run)})" if mean is not None and _averaged(run) != len(tasks) else ""
    )


def _averaged(run: Run) -> int:
    """Return over how many tasks a run's average accuracy is."""
    return int(run.metrics.get("acc average", {}).get("count") or 0)


def _measured_on(runs: Sequence[Run], texts: Sequence[str], tasks: Sequence[str]) -> str:
    """Return a sentence that says on how much was measured; runs that differ in it do not compare."""

    def counts(kind: str, names: Sequence[str]) -> str:
        metrics = [(name, f"{kind} {name}") for name in names]
        return counted((n, run.metrics[m]["count"]) for n, m in metrics for run in runs if m in run.metrics)

    windows, examples = counts("perplexity", texts), counts("acc", tasks)
    fewer = {_averaged(run) for run in runs} - {0, len(tasks)}
    averages = f"An average with a number behind it is over that many of the {len(tasks)} tasks only."
    sentences = [
        f"Perplexity per token (lower is better); windows: {windows}." if texts else "",
        f"Zero-shot accuracy in % (higher is better); examples: {examples}." if tasks else "",
        averages if fewer else "",
        _calibrated_on(runs),
    ]
    return " ".join(filter(None, sentences))


def _calibrated_on(runs: Iterable[Run]) -> str:
    """Return a sentence that names runs of one model with different calibrations, "" where there are none."""
    names: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        keys = names.setdefault(run.facts["model"], {})
        keys.setdefault(run.facts["calibration_key"], []).append(run.facts["run"])
    apart = ["; ".join(map(", ".join, keys.values())) for keys in names.values() if len(keys) > 1]
    return f"Calibrated differently: {' | '.join(apart)}." if apart else ""


def _outputs(outputs: Sequence[str]) -> list[Path]:
    return [Path(output) for output in outputs]


# --- tables ----------------------------------------------------------------------------------------------


def main(*, runs: str, model: str, ratios: Sequence[float], outputs: Sequence[str]) -> None:
    """Write a model's main table: all finished runs at the ratios, below the dense model."""
    found = of(read_runs(runs), models=[model], ratios=ratios)
    note = "Ratio: share of the blocks' linear parameters that is kept."
    _comparison(found, title=f"{model}: compressed models", notes=[note]).write(*_outputs(outputs))


def pruning(*, runs: str, model: str, ratios: Sequence[float], outputs: Sequence[str]) -> None:
    """Write the comparison with structured pruning: the runs of default settings and of pruning methods."""
    found = of(read_runs(runs), models=[model], ratios=ratios)
    pruned = [run for run in found if run.facts["storage"] == "pruned"]
    notes = ["Ratio: share of the blocks' linear parameters that is kept."]
    if not pruned:
        notes.append("No run of a structured pruning method is finished at these ratios.")
    ours = [run for run in found if not run.facts["variant"] and run not in pruned]
    shown = [run for run in found if run in ours or run in pruned]
    _comparison(shown, title=f"{model}: low rank and structured pruning", notes=notes).write(
        *_outputs(outputs)
    )


def ablation(
    *, runs: str, model: str, ratios: Sequence[float], variants: Sequence[str], outputs: Sequence[str]
) -> None:
    """Write the ablation: default settings, and variants that change objective, ranks or refinement."""
    found = [
        run
        for run in of(read_runs(runs), models=[model], ratios=ratios)
        if run.facts["variant"] in ("", *variants)
    ]
    texts, tasks = _names(found, "perplexity"), _names(found, "acc")
    rows = [
        [
            run.facts["variant"] or "default",
            run.facts["objective"],
            run.facts["allocation"] or "uniform",
            "yes" if run.facts["refined"] else "no",
            f"{run.ratio:g}",
            f"{run.facts['achieved_ratio']:.4f}",
            *_cells(run, texts, tasks, side="value"),
            number(run.value("seconds"), 0),
        ]
        for run in found
    ]
    head = [
        "variant",
        "objective",
        "ranks",
        "refined",
        "ratio",
        "achieved",
        *texts,
        *tasks,
        "average",
        "drop",
        "s",
    ]
    notes = [
        _measured_on(found, texts, tasks),
        f"{_DROP} s: seconds of all stages, the dense model's included.",
    ]
    Table(f"{model}: objective, ranks and refinement", head, rows, notes, _groups(found)).write(
        *_outputs(outputs)
    )


def _comparison(runs: Sequence[Run], *, title: str, notes: Sequence[str]) -> Table:
    """Return a table of runs of one model, the dense model first, a group per ratio."""
    texts, tasks = _names(runs, "perplexity"), _names(runs, "acc")
    rows = [["dense", "1", "1", *_cells(_dense(runs), texts, tasks, side="dense")]] if runs else []
    rows += [
        [
            run.label,
            f"{run.ratio:g}",
            f"{run.facts['achieved_ratio']:.4f}",
            *_cells(run, texts, tasks, side="value"),
        ]
        for run in runs
    ]
    head = ["method", "ratio", "achieved", *texts, *tasks, "average", "drop"]
    groups = [place + 1 for place in _groups(runs)]
    return Table(title, head, rows, [*notes, _measured_on(runs, texts, tasks), _DROP], groups)


def _best_known(runs: Sequence[Run]) -> Run:
    """Return the run with most metrics."""
    return max(runs, key=lambda run: len(run.metrics))


def _dense(runs: Sequence[Run]) -> Run:
    """Return a run whose dense side stands for the dense model: every metric of the best known that has it.

    Runs may be measured on other texts and tasks, and a measurement may fail in one alone.
    """
    metrics: dict[str, Mapping[str, Any]] = {}
    for run in sorted(runs, key=lambda run: len(run.metrics), reverse=True):
        for metric, row in run.metrics.items():
            if metrics.get(metric, {}).get("dense") is None:
                metrics[metric] = row
    return Run(_best_known(runs).facts, metrics)


def _groups(runs: Sequence[Run]) -> list[int]:
    """Return the places where another model or ratio begins."""
    keys = [(run.facts["model"], run.ratio) for run in runs]
    return [place for place, key in enumerate(keys) if not place or key != keys[place - 1]]


def models(*, runs: str, models: Sequence[str], ratios: Sequence[float], outputs: Sequence[str]) -> None:
    """Write the table of several models: each dense, then at every ratio."""
    found = [run for run in of(read_runs(runs), models=models, ratios=ratios) if not run.facts["variant"]]
    texts, tasks = _names(found, "perplexity"), _names(found, "acc")
    rows: list[list[str]] = []
    groups: list[int] = []
    for model in models:
        own = [run for run in found if run.facts["model"] == model]
        groups.append(len(rows))
        if own:
            rows.append([model, "dense", "1", *_cells(_dense(own), texts, tasks, side="dense")])
        rows += [
            [model, run.label, f"{run.ratio:g}", *_cells(run, texts, tasks, side="value")] for run in own
        ]
    head = ["model", "method", "ratio", *texts, *tasks, "average", "drop"]
    notes = [_measured_on(found, texts, tasks), _DROP]
    Table("Models side by side", head, rows, notes, groups).write(*_outputs(outputs))


def breakdown(*, runs: str, model: str, ratios: Sequence[float], outputs: Sequence[str]) -> None:
    """Write everything measured for one model, a row per metric and a column per run."""
    found = of(read_runs(runs), models=[model], ratios=ratios)
    metrics = list(dict.fromkeys(metric for run in found for metric in run.metrics))
    best = _dense(found) if found else None
    texts, tasks = _names(found, "perplexity"), _names(found, "acc")

    def cell(run: Run, metric: str, side: str) -> str:
        value = run.value(metric, side)
        if metric.endswith(" average"):
            return _average(run, tasks, side=side, metric=metric)
        if metric.startswith("acc"):
            return percent(value, run.value(metric, "stderr") if side == "value" else None)
        if metric.startswith(("parameters", "stored")):
            return "–" if value is None else f"{value:,.0f}"
        return number(value)

    units = {name: row["unit"] for run in found for name, row in run.metrics.items()}
    head = ["", "dense", *(f"{run.ratio:g} {run.label}" for run in found)]
    rows = [["ratio achieved", "1", *(f"{run.facts['achieved_ratio']:.4f}" for run in found)]]
    for metric in metrics:
        name = f"{metric}, {units[metric]}" if units[metric] in ("s", "MB", "bytes") else metric
        dense = cell(best, metric, "dense") if best else "–"
        rows.append([name, dense, *(cell(run, metric, "value") for run in found)])
    notes = [
        _measured_on(found, texts, tasks),
        "acc_norm: answers compared by log likelihood per character; ±: standard error.",
    ]
    Table(f"{model}: every measurement", head, rows, notes).write(*_outputs(outputs))


def budget(
    *, runs: str, model: str, context: int, plan: Sequence[Mapping[str, Any]], outputs: Sequence[str]
) -> None:
    """Write the table of memory budgets.

    Args:
        runs: File of finished runs.
        model: The model.
        context: Tokens of the context that has to fit.
        plan: Per budget: `budget` in bytes, `ratio` (1 for dense, None where nothing fits), `run`, estimated
            `linears`, `rest`, `cache`, `activations`, and `measured`, the file of the measurement.
        outputs: Files to write.
    """
    known = read_runs(runs)
    by_name = {run.facts["run"]: run for run in known}
    own = [by_name[entry["run"]] for entry in plan if entry["run"] in by_name]
    texts, tasks = _names(own, "perplexity"), _names(own, "acc")
    rows = []
    for entry in plan:
        gigabytes = f"{entry['budget'] / 1e9:g}"
        ratio = entry["ratio"]
        if ratio is None:
            rows.append([gigabytes, "does not fit", *["–"] * (8 + len(texts))])
            continue
        weights = entry["linears"] * ratio + entry["rest"]
        total = weights + entry["cache"] + entry["activations"]
        measured = read_json(Path(entry["measured"]))
        found = measured.get("measurement", {})
        run, side = by_name.get(entry["run"]), "dense" if ratio == 1 else "value"
        fits = "not run" if not found else "yes" if found["peak"] <= entry["budget"] else "no"
        rows.append(
            [
                gigabytes,
                "dense" if ratio == 1 else f"{ratio:g}",
                *(
                    _gigabytes(entry_bytes)
                    for entry_bytes in (weights, entry["cache"], entry["activations"], total)
                ),
                *(_gigabytes(found.get(name)) for name in ("weights", "peak")),
                fits,
                *(number(run.value(f"perplexity {text}", side) if run else None) for text in texts),
                _average(run, tasks, side=side) if run else percent(None),
            ]
        )
    head = [
        "budget",
        "ratio",
        "weights",
        "cache",
        "pass",
        "together",
        "weights, measured",
        "peak, measured",
        "fits",
    ]
    notes = [
        f"GB of 10^9 bytes, batch 1, a context of {context} tokens. The ratio is the largest, in hundredths, "
        "whose weights, key-value cache and activations of one pass fit by estimate in bfloat16.",
        "Measured: what a process of its own needed beyond Python and its libraries to read the context into "
        "the cache and generate one token, in bfloat16 too.",
        _measured_on(own, texts, tasks),
    ]
    Table(f"{model}: memory budgets", [*head, *texts, "average"], rows, notes).write(*_outputs(outputs))


def _gigabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e9:.3f}"


# --- figures ---------------------------------------------------------------------------------------------


def depth(
    *,
    runs: str,
    model: str,
    ratio: float,
    layers: Mapping[str, Sequence[str]],
    outputs: Sequence[str],
) -> None:
    """Draw the distortion of block outputs over depth, per finished run, and perplexity beside it.

    Args:
        runs: File of finished runs.
        model: The model.
        ratio: The ratio.
        layers: Per run through whose blocks nothing went as it was made, the files of every block's errors.
        outputs: Files to write.
    """
    found = of(read_runs(runs), models=[model], ratios=[ratio])
    texts = _names(found, "perplexity")
    text = texts[0] if texts else ""
    apart = ", not all calibrated alike" if _calibrated_on(found) else ""
    figures.depth(
        [_distortion(run, layers.get(run.facts["run"], ())) for run in found],
        [run.value(f"perplexity {text}") for run in found],
        dense=found[0].value(f"perplexity {text}", "dense") if found else None,
        text=text,
        title=f"{model} at ratio {ratio:g}{apart}",
        outputs=_outputs(outputs),
    )


def _distortion(run: Run, files: Sequence[str]) -> Series:
    """Return the cosine distance of a run's block outputs: as measured afterwards, else as published."""
    published = Path("results") / run.facts["run"] / "blocks.json"
    if files:
        cosine = [read_json(Path(file))["layers"][OUTPUT]["cosine"] for file in files]
    else:
        cosine = [entry["cosine"] for entry in json.loads(published.read_text())]
    return Series(run.label, range(1, len(cosine) + 1), cosine)


def calibration(
    *, runs: str, model: str, ratio: float, sequences: Mapping[str, int], outputs: Sequence[str]
) -> None:
    """Draw perplexity and accuracy against the number of calibration sequences.

    Args:
        runs: File of finished runs.
        model: The model.
        ratio: The ratio.
        sequences: Number of sequences of each variant.
        outputs: Files to write.
    """
    found = [
        run
        for run in of(read_runs(runs), models=[model], ratios=[ratio])
        if run.facts["variant"] in sequences
    ]
    if not found:
        raise ValueError(f"no finished run of {model} at ratio {ratio:g} belongs to the sweep of sequences")
    found.sort(key=lambda run: sequences[run.facts["variant"]])
    texts, best = _names(found, "perplexity"), _best_known(found)

    def series(metric: str, label: str, factor: float = 1.0) -> Series:
        # Averages over other tasks have no place on the same axis.
        comparable = [
            run for run in found if metric != "acc average" or _names([run], "acc") == _names([best], "acc")
        ]
        points = [(sequences[run.facts["variant"]], run.value(metric)) for run in comparable]
        known = [(count, factor * value) for count, value in points if value is not None]
        return Series(label, [count for count, _ in known], [value for _, value in known])

    accuracy = series("acc average", "compressed", 100.0)
    dense_accuracy = best.value("acc average", "dense")
    dense = {text: best.value(f"perplexity {text}", "dense") for text in texts}
    figures.sweep(
        [series(f"perplexity {text}", text) for text in texts],
        accuracy if accuracy.x else None,
        dense={text: value for text, value in dense.items() if value is not None},
        dense_accuracy=None if dense_accuracy is None else 100 * dense_accuracy,
        title=f"{model} at ratio {ratio:g}: size of the calibration set",
        tasks=f"{_averaged(best)} tasks",
        outputs=_outputs(outputs),
    )


def layers(*, files: Sequence[str], run: str, outputs: Sequence[str]) -> None:
    """Draw a run's errors of attention's and the MLP's last linear and of block outputs over depth."""
    found = [read_json(Path(file))["layers"] for file in files]
    names = [
        (_ending(found[0], _ATTENTION), "attention"),
        (_ending(found[0], _MLP), "MLP"),
        (OUTPUT, "block"),
    ]
    shown = [(name, f"{name.rpartition('.')[2]} ({part})") for name, part in names if name]

    def series(metric: str) -> list[Series]:
        return [
            Series(label, range(1, len(found) + 1), [entry[name][metric] for entry in found])
            for name, label in shown
        ]

    figures.layers(
        series("mse"), series("cosine"), title=f"Errors of outputs, {run}", outputs=_outputs(outputs)
    )


def _ending(layers: Mapping[str, Any], endings: Sequence[str]) -> str | None:
    """Return the linear whose name ends so, if there is one."""
    matches = [name for ending in endings for name in layers if name.rpartition(".")[2] == ending]
    return matches[0] if matches else None
