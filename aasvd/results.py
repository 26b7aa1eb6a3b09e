"""What runs measured: a run's numbers side by side with the dense model's, and all runs as one table."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from aasvd.artifacts import read_json, remake_command
from aasvd.params import RUN

_logger = logging.getLogger(__name__)

COLUMNS = pa.schema(
    [
        ("run", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),
        ("variant", pa.string()),
        ("objective", pa.string()),
        ("allocation", pa.string()),
        ("refined", pa.bool_()),
        ("storage", pa.string()),
        ("precision", pa.string()),
        ("ratio", pa.float64()),
        ("achieved_ratio", pa.float64()),
        ("calibration_key", pa.string()),
        ("compression_key", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("dense", pa.float64()),
        ("stderr", pa.float64()),
        ("count", pa.int64()),
        ("unit", pa.string()),
    ]
)


class Measurement(NamedTuple):
    """One text's or task's measurement of one model.

    Attributes:
        kind: `perplexity` or `accuracy`.
        name: Text or task.
        numbers: What was measured; empty where the measurement failed.
        error: Why it failed, or None.
        file: The artifact that it was read from.
    """

    kind: str
    name: str
    numbers: Mapping[str, Any]
    error: str | None
    file: str = ""


def read_measurement(file: str) -> Measurement:
    """Read a measurement's artifact, whose file name says what it measures."""
    kind, _, rest = Path(file).stem.partition("_")
    record = read_json(Path(file))
    name, numbers = rest.rpartition("-")[0], record.get("measurement", {})
    return Measurement(kind, name, numbers, record.get("error"), file)


def side_by_side(dense: Iterable[Measurement], compressed: Iterable[Measurement]) -> dict[str, Any]:
    """Return the measured part of eval.json.

    Args:
        dense: Measurements of the dense model.
        compressed: The same measurements of the compressed model, in the same order.

    Returns:
        `perplexity` and `accuracy` per text and task (null where a measurement failed), `average` over the
        tasks that both models have, and `errors`: per failed measurement and model, why. A measurement in
        another float type than the dense model's counts as failed.
    """
    perplexity: dict[str, Any] = {}
    accuracy: dict[str, Any] = {}
    errors: dict[str, dict[str, str]] = {}
    for before, measured in zip(dense, compressed, strict=True):
        after = _comparable(before, measured)
        failed = {"dense": before.error, "compressed": after.error}
        if any(failed.values()):
            errors[f"{before.kind} {before.name}"] = {side: why for side, why in failed.items() if why}
        metric = "perplexity" if before.kind == "perplexity" else "acc"
        pair = _pair(before, after, metric)
        if before.kind == "perplexity":
            perplexity[before.name] = pair | {"windows": _either(before, after, "windows")}
            continue
        accuracy[before.name] = pair | {
            "stderr": after.numbers.get("stderr"),
            "stderr_dense": before.numbers.get("stderr"),
            "count": _either(before, after, "count"),
        }
        if _either(before, after, "acc_norm") is not None:
            accuracy[before.name]["acc_norm"] = _pair(before, after, "acc_norm") | {
                "stderr": after.numbers.get("acc_norm_stderr"),
                "stderr_dense": before.numbers.get("acc_norm_stderr"),
            }
    return {
        "perplexity": perplexity,
        "accuracy": accuracy,
        "average": average(accuracy),
        "errors": errors,
    }


def _comparable(before: Measurement, after: Measurement) -> Measurement:
    """Return a compressed model's measurement, failed if the dense model's is known to be of another type."""
    types = [measured.numbers.get("dtype") for measured in (before, after)]
    if None in types or len({*types}) == 1:
        return after
    why = (
        f"measured in {types[1]}, but the dense model in {types[0]}, as `calibration.dtype: auto` had it on "
        f"two machines: set it to bfloat16 or float32, or remake the one of the type that you do not want, "
        f"with `{remake_command(Path(after.file))}` or with {before.file} instead"
    )
    return after._replace(numbers={}, error=why)


def _pair(before: Measurement, after: Measurement, metric: str) -> dict[str, float | None]:
    return {"dense": before.numbers.get(metric), "compressed": after.numbers.get(metric)}


def _either(before: Measurement, after: Measurement, name: str) -> Any:
    return after.numbers.get(name, before.numbers.get(name))


def average(accuracy: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the plain mean over tasks of `acc`, as the papers take it, and of `acc_norm` beside it.

    Only tasks measured on both models count. A task without `acc_norm` enters that mean with its `acc`.
    `drop` is dense minus compressed; `relative_drop` is its share of dense.
    """
    whole = [pair for pair in accuracy.values() if None not in (pair["dense"], pair["compressed"])]
    found: dict[str, Any] = {"tasks": len(whole), "of": len(accuracy)}
    if not whole:
        return found
    for metric, pairs in (("acc", whole), ("acc_norm", [pair.get("acc_norm", pair) for pair in whole])):
        dense, compressed = (
            sum(pair[side] for pair in pairs) / len(pairs) for side in ("dense", "compressed")
        )
        drop = dense - compressed
        found[metric] = {
            "dense": dense,
            "compressed": compressed,
            "drop": drop,
            "relative_drop": drop / dense if dense else None,
        }
    return found


def compresses(stage: str) -> bool:
    """Return whether a stage counts as compressing a model, by its name: not fetching nor measuring one."""
    return not stage.startswith(("fetch", "perplexity", "accuracy"))


def peaks(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the most memory in MB that any stage which compresses took, of the host and of the device.

    `added_memory_mb` is what a stage took of the host's beyond what its process held when it began, which is
    the part that runs made by the same processes can be compared by.

    Args:
        records: Records of all stages that made a checkpoint; conversion of what was fetched is left out.
    """
    counted = [record for record in records if compresses(record["stage"])]
    names = ("peak_memory_mb", "added_memory_mb", "peak_device_memory_mb")
    return {name: max(record[name] for record in counted) for name in names}


def blocks(records: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the distortion of every block's output: solved, where refinement followed, and as it ended up.

    `sequences_solved` says of how many sequences the former is; the latter is of all.

    Args:
        records: Records of all stages; those of refinement hold `before`, of propagation `after`.
    """
    found = list(records)
    before = [record["before"] for record in found if "before" in record]
    after = [record["after"] for record in found if "after" in record]
    return [
        {
            "block": number,
            **end,
            **({f"{metric}_solved": value for metric, value in start.items()} if before else {}),
        }
        for number, (start, end) in enumerate(zip(before or after, after, strict=True), start=1)
    ]


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per metric of a run's eval.json; metrics that failed have none."""
    # Of a published name the part behind the ratio, whatever the model is called; the default run has none.
    named = RUN.fullmatch(result["run"])
    variant = named["parts"].removeprefix("_") if named else ""
    common = {
        "run": result["run"],
        "model": result["model"],
        "method": result["method"],
        "variant": variant,
        "objective": result["objective"],
        "allocation": result.get("allocation"),
        "refined": result["refined"],
        "storage": result["storage"],
        "precision": result["precision"],
        "ratio": result["ratio"]["target"],
        "achieved_ratio": result["ratio"]["achieved"],
        "calibration_key": result["provenance"]["keys"]["calibration"],
        "compression_key": result["provenance"]["keys"]["compression"],
    }
    counts = result["parameters"]
    # value, dense, standard error, count, unit
    metrics: dict[str, tuple[Any, Any, Any, Any, str]] = {}
    for text, pair in result["perplexity"].items():
        metrics[f"perplexity {text}"] = (pair["compressed"], pair["dense"], None, pair["windows"], "windows")
    for task, pair in result["accuracy"].items():
        metrics[f"acc {task}"] = (
            pair["compressed"], pair["dense"], pair["stderr"], pair["count"], "examples",
        )  # fmt: skip
        if norm := pair.get("acc_norm"):
            metrics[f"acc_norm {task}"] = (
                norm["compressed"], norm["dense"], norm["stderr"], pair["count"], "examples",
            )  # fmt: skip
    for metric in ("acc", "acc_norm"):
        if mean := result["average"].get(metric):
            tasks = result["average"]["tasks"]
            metrics[f"{metric} average"] = (mean["compressed"], mean["dense"], None, tasks, "tasks")
    linears = counts["linears"]
    metrics["parameters"] = (counts["compressed"], counts["dense"], None, None, "")
    metrics["parameters of linears"] = (linears["compressed"], linears["dense"], None, None, "")
    stored = result["bytes"]
    metrics["stored size"] = (stored["compressed"], stored["dense"], None, None, "bytes")
    metrics["seconds"] = (sum(result["seconds"].values()), None, None, None, "s")
    metrics["peak memory"] = (result["peak_memory_mb"], None, None, None, "MB")
    return [
        common
        | {"metric": name, "value": value, "dense": dense, "stderr": stderr, "count": count, "unit": unit}
        for name, (value, dense, stderr, count, unit) in metrics.items()
        if value is not None
    ]


def table(folder: Path = Path("results")) -> pa.Table:
    """Return all runs published in a folder as one table, a row per run and metric."""
    found = []
    for file in sorted(folder.glob("*/eval.json")):
        result = json.loads(file.read_text())
        if "average" in result:
            found += rows(result)
        else:
            _logger.warning("%s was written by an earlier version and is left out", file)
    return pa.Table.from_pylist(found, schema=COLUMNS)
