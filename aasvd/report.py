"""One run as people read it: its table and its figure."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aasvd import figures
from aasvd.figures import BLUE, VERMILION
from aasvd.tables import Table, number, percent


def _table(result: Mapping[str, Any]) -> Table:
    """Return the table of a run: what was measured, dense and compressed."""
    window = result["evaluation"]["window"]
    rows = [
        (
            f"perplexity {text}{_amount(pair['windows'], f'windows of {window}')}",
            _or_failed(number(pair["dense"])),
            _or_failed(number(pair["compressed"])),
        )
        for text, pair in result["perplexity"].items()
    ]
    for task, pair in result["accuracy"].items():
        rows.append((f"accuracy {task}{_amount(pair['count'], 'examples')}", *_accuracies(pair)))
        if norm := pair.get("acc_norm"):
            rows.append((f"  by length (acc_norm) {task}", *_accuracies(norm)))
    mean = result["average"]
    for metric, label in (("acc", "accuracy, average"), ("acc_norm", "  by length (acc_norm), average")):
        if metric in mean:
            pair = mean[metric]
            rows.append(
                (
                    f"{label} over {_count(mean)}",
                    f"{percent(pair['dense'])} %",
                    f"{percent(pair['compressed'])} % (drop {percent(pair['drop'])})",
                )
            )
    counts = result["parameters"]
    rows.append(("parameters", f"{counts['dense']:,}", f"{counts['compressed']:,}"))
    linears = counts["linears"]
    rows.append(("of these in the blocks' linears", f"{linears['dense']:,}", f"{linears['compressed']:,}"))
    ratio = result["ratio"]
    note = (
        f"{result['method']}, objective {result['objective']}; kept {ratio['achieved']:.4f} of the linears' "
        f"parameters (asked: {ratio['target']:g})."
    )
    failures = [
        f"{what} failed ({side}): {why}"
        for what, sides in result["errors"].items()
        for side, why in sides.items()
    ]
    return Table(result["run"], ("", "dense", "compressed"), rows, [note, *failures])


def _amount(count: int | None, unit: str) -> str:
    """Return on how much was measured, as an addition to a label; nothing where no model was."""
    return "" if count is None else f" ({count} {unit})"


def _count(mean: Mapping[str, Any]) -> str:
    whole = mean["tasks"] == mean["of"]
    return f"{mean['tasks']} tasks" if whole else f"{mean['tasks']} of {mean['of']} tasks"


def _or_failed(cell: str) -> str:
    return "failed" if cell == "–" else cell


def _accuracies(pair: Mapping[str, Any]) -> tuple[str, str]:
    dense = _or_failed(percent(pair["dense"], pair["stderr_dense"]))
    compressed = _or_failed(percent(pair["compressed"], pair["stderr"]))
    return tuple(cell if cell == "failed" else f"{cell} %" for cell in (dense, compressed))  # type: ignore[return-value]


def summary(result: Mapping[str, Any], *, model: str) -> str:
    """Return a run's table as text for a terminal."""
    table = _table(result)
    ratio = result["ratio"]
    lines = [
        table._replace(columns=(result["run"], *table.columns[1:])).text(),
        f"kept {ratio['achieved']:.4f} of the linears' parameters (asked: {ratio['target']:g}) in "
        f"{sum(result['seconds'].values()):.0f} s of stages; compressing took at most "
        f"{result['peak_memory_mb']:.0f} MB",
        *table.notes[1:],
        f"the compressed model lies in {model}",
    ]
    return "\n".join(lines)


def write_table(result: Mapping[str, Any], *, output: Path) -> None:
    """Write a run's table as an HTML page of its own."""
    _table(result).write(output)


def model_card(
    result: Mapping[str, Any],
    *,
    base: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    ranks: Mapping[str, int],
    kept: Mapping[str, Sequence[int]],
    path: str,
) -> str:
    """Return the README.md of a checkpoint: what it is, what it scores, how to load it.

    Holds nothing that changes between two runs of the same parameters, such as times.

    Args:
        result: A run's eval.json.
        base: The base model's source in params.yaml.
        shapes: (out, in) of each linear of the blocks, by module name.
        ranks: Rank of each factorized one, by module name.
        kept: Rows and columns that stay of each pruned one, by module name.
        path: Module name of the list of blocks.
    """
    stays = {**ranks, **{name: math.prod(size) for name, size in kept.items()}}
    kinds: dict[tuple[str, str], list[int | None]] = {}
    blocks: dict[int, dict[str, int | None]] = {}
    for name, (rows, columns) in shapes.items():
        block, _, kind = name.removeprefix(f"{path}.").partition(".")
        kinds.setdefault((kind, f"{rows} x {columns}"), []).append(stays.get(name))
        blocks.setdefault(int(block), {})[kind] = stays.get(name)
    table = "\n".join(
        f"| {kind} | {shape} | {_span(found)} | {len(found)} |" for (kind, shape), found in kinds.items()
    )
    scores = "\n".join(
        f"| {what} | {dense} | {compressed} |" for what, dense, compressed in _table(result).rows
    )
    source = ", ".join(f"{key} {value}" for key, value in base.items())
    on_hub = f"\nbase_model: {base['hub']}" if "hub" in base else ""
    ratio = result["ratio"]
    return f"""---
library_name: transformers{on_hub}
pipeline_tag: text-generation
tags: [aasvd, {"pruned" if kept else "low-rank"}]
---

# {result["run"]}

Base model: {result["model"]} ({source}), whose licence applies. Compressed by {result["method"]}:
objective {result["objective"]}, allocation {result["allocation"]}, storage {result["storage"]},
precision {result["precision"]}; kept {ratio["achieved"]:.4f} of the linears' parameters
(asked: {ratio["target"]:g}).
{_made(result)}

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

## Key-value cache

{_cache(result["cache_bytes_per_token"])}

## {"What stays" if kept else "Ranks"}

| linear | shape | {"numbers that stay" if kept else "rank"} | blocks |
| --- | --- | --- | --- |
{table}

<details>
<summary>Of every block</summary>

{_by_block(blocks)}

</details>
"""


def _made(result: Mapping[str, Any]) -> str:
    """Say what a model was calibrated on, how its blocks were refined and what was trained after all."""
    text, refinement, post = (result[name] for name in ("calibration", "refinement", "post"))
    windows = f"{text['sequences']} {text['sampling']} windows of {text['tokens']} tokens"
    sentences = [f"Calibrated on {windows} of {text['text']}."]
    if refinement["epochs"]:
        most = f", at most {refinement['steps']} steps a block" if refinement["steps"] else ""
        sentences.append(
            f"Each block was refined against the original one's output: {refinement['optimizer']}, rate "
            f"{refinement['learning_rate']:g}, {refinement['epochs']} epochs{most}, {refinement['batch']} "
            "sequences a step."
        )
    else:
        sentences.append("Blocks are as they were solved.")
    if post["epochs"]:
        sentences.append(
            f"Then all factors were updated by LoRA of rank {post['rank']}: {post['epochs']} epochs for "
            "every U, and as many for every V."
        )
    return " ".join(sentences)


def _by_block(blocks: Mapping[int, Mapping[str, int | None]]) -> str:
    """Return a table of what each kind of linear keeps in each block."""
    kinds = list(dict.fromkeys(kind for found in blocks.values() for kind in found))

    def cell(found: Mapping[str, int | None], kind: str) -> str:
        return "–" if kind not in found else "dense" if found[kind] is None else str(found[kind])

    rows = [
        ["block", *kinds],
        ["---"] * (len(kinds) + 1),
        *([str(block), *(cell(found, kind) for kind in kinds)] for block, found in sorted(blocks.items())),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cache(counts: Mapping[str, Any]) -> str:
    """Say what the cache of a token takes, and what one of latents would or why it cannot be."""
    ordinary = counts["ordinary"]
    said = (
        ""
        if ordinary is None
        else f"A token of one sequence takes {ordinary:,} bytes in the ordinary cache. "
    )
    if counts["reason"]:
        return f"{said}No cache of latents: {counts['reason']}."
    return (
        f"{said}`aasvd.latents.LatentCache(model)`, given to `generate` as `past_key_values`, takes "
        f"{counts['latents']:,} and more time; it is not used unless asked for."
    )


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
    with figures.drawing(output, width=9, height=3.6) as figure:
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
            figures.blocks_axis(axes)
            if not after:
                # Each block was solved by itself, from the original inputs alone.
                axes.text(0.5, 0.5, "nothing went through the blocks", ha="center", transform=axes.transAxes)
            axes.set_ylabel(label)
            if after:
                axes.set_yscale("log")
                axes.legend()
        figure.suptitle(f"Distortion of block outputs, {run}")


def _line(axes: Any, values: Sequence[float], *, colour: str, marker: str, label: str) -> None:
    blocks = range(1, len(values) + 1)
    axes.plot(blocks, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        sys.stdout.write(summary(json.loads(path.read_text()), model=str(path.parent / "model")) + "\n")
