"""Stages that measure a finished model; one that fails does not stop the others."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from aasvd import evaluate, layers, memory, sources
from aasvd.artifacts import Activations, mark_failure, read_table, read_tensors
from aasvd.calibration import check_vocabulary
from aasvd.device import release_memory
from aasvd.stages.loading import Block, load_model, model_folder, too_long
from aasvd.stages.stage import PASSES, report_failure, stage


def evaluate_perplexity(
    *,
    model: str,
    text: str,
    output: str,
    settings: Mapping[str, Any],
    calibration: Mapping[str, Any],
    log: str,
) -> None:
    """Measure a model's perplexity on one text."""
    name = Path(text).parts[-3]

    def measure() -> dict[str, Any]:
        joined = sources.document_text(_evaluated_table(text))
        network, tokenizer = load_model(model_folder(model), calibration)
        tokens = evaluate.windows(joined, tokenizer, window=settings["window"], windows=settings["windows"])
        try:
            vocabulary = network.config.get_text_config().vocab_size
            check_vocabulary(tokens, tokenizer, vocabulary=vocabulary)
        except ValueError as error:
            raise evaluate.MeasurementError(str(error)) from error
        if reason := too_long(settings["window"], network.config, setting="evaluation.window"):
            raise evaluate.MeasurementError(reason)
        return _typed(network, evaluate.perplexity(network, tokens, progress=f"perplexity {name}"))

    _measure(f"perplexity {name}", measure, output=output, advice="lower evaluation.window", log=log)


def evaluate_accuracy(
    *,
    model: str,
    rows: str,
    task: str,
    output: str,
    settings: Mapping[str, Any],
    calibration: Mapping[str, Any],
    log: str,
) -> None:
    """Measure a model's zero-shot accuracy on one task."""

    def measure() -> dict[str, Any]:
        _evaluated_table(rows)
        network, tokenizer = load_model(model_folder(model), calibration)
        found = evaluate.accuracy(
            network,
            tokenizer,
            task=task,
            rows=Path(rows),
            limit=settings["limit"],
            batch_size=settings["batch"],
        )
        return _typed(network, found)

    _measure(f"accuracy {task}", measure, output=output, advice="lower evaluation.batch", log=log)


def _typed(network: PreTrainedModel, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a measurement with the float type that the model computed in, which `auto` does not tell."""
    return {**found, "dtype": str(network.dtype).removeprefix("torch.")}


def _evaluated_table(file: str) -> pa.Table:
    """Read what a measurement needs.

    Raises:
        MeasurementError: If it could not be fetched.
    """
    table = read_table(Path(file))
    if error := sources.failure(table):
        raise evaluate.MeasurementError(error)
    return table


def _measure(
    name: str, measure: Callable[[], Mapping[str, Any]], *, output: str, advice: str, log: str
) -> None:
    """Write a measurement, or why it failed: others go on, and the next run tries this one again."""
    with stage(name, log=Path(log), record=Path(output), advice=advice) as measured:
        # A whole model comes into memory here: what earlier stages left behind must not add to it.
        release_memory()
        try:
            measured["measurement"] = measure()
        except (sources.SourceError, evaluate.MeasurementError) as error:
            measured["error"] = str(error)
        except torch.OutOfMemoryError:
            measured["error"] = f"the device ran out of memory; {advice}"
        if "error" in measured:
            report_failure(name, measured["error"])
    mark_failure(Path(output), measured.get("error"))


def measure_layers(
    *,
    source: str,
    original: str,
    shifted: str,
    factors: str,
    output: str,
    index: int,
    calibration: Mapping[str, Any],
    log: str,
) -> None:
    """Measure how far every linear of a finished block is from the original's."""
    with stage(f"layers of block {index}", log=Path(log), record=Path(output), advice=PASSES) as measured:
        x, x_shifted = Activations(Path(original)), Activations(Path(shifted))
        around = Block(source, index, calibration, record=output, like=x)
        call = around.arguments(x)
        measured["layers"] = layers.layer_errors(
            around.original(),
            around.compressed(read_tensors(Path(factors), device=around.device), around.dtype),
            [name for group in around.groups(x, call) for name in group],
            inputs=x,
            shifted=x_shifted,
            arguments=call,
            batch=around.batch,
            device=around.device,
        )


def measure_memory(*, model: str, context: int, output: str, log: str) -> None:
    """Measure the memory that a model needs to read a context and to generate."""

    def measure() -> dict[str, Any]:
        return memory.measure(model_folder(model), context=context)

    _measure(
        f"memory at {context} tokens", measure, output=output, advice="choose a shorter context", log=log
    )
