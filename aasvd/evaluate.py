"""Measure a model: token perplexity over fixed windows, and zero-shot accuracy through lm-eval."""

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from aasvd.artifacts import verify
from aasvd.calibration import token_ids
from aasvd.likelihood import token_losses
from aasvd.progress import Bar
from aasvd.sources import TaskDefinition, task_definition

# Elements of the logits that exist at one time; many, since every call of the head has a fixed cost.
_CHUNK_ELEMENTS = 2**26
_MAX_LENGTH = 2048


class MeasurementError(ValueError):
    """A text or task cannot be measured; the message says why. Other measurements are not concerned."""


class NonFiniteLossError(MeasurementError):
    """The model's loss is infinite or not a number; the message counts the windows and names the first."""


def windows(text: str, tokenizer: Any, *, window: int, windows: int) -> Tensor:
    """Cut a text, tokenized whole, into its first non-overlapping windows; the tail is dropped.

    Args:
        text: The whole text.
        tokenizer: A transformers tokenizer.
        window: Tokens per window, at least 2.
        windows: Largest number of windows, 0 for all there are.

    Returns:
        The windows, int64, shape (windows, window).

    Raises:
        MeasurementError: If the text is shorter than one window.
        ValueError: If an argument is out of range.
    """
    if window < 2 or windows < 0:
        raise ValueError(f"window {window} and windows {windows}: expected at least 2 and at least 0")
    ids = token_ids(text, tokenizer)
    count = len(ids) // window
    if not count:
        raise MeasurementError(f"the text has {len(ids)} tokens, less than one window of {window}")
    count = min(count, windows or count)
    return ids[: count * window].view(count, window)


def perplexity(model: Any, tokens: Tensor, *, progress: str) -> dict[str, float | int]:
    """Return the token perplexity of a causal model over separate windows.

    Every window stands alone and its first token is only context: exp of the mean cross entropy over
    windows x (window - 1) targets. The cross entropy is computed in float32 whatever the model's type,
    for a limited number of positions at a time.

    Args:
        model: A transformers causal model, on any device and in any type; left as it was.
        tokens: Windows of ids, shape (windows, window).
        progress: Label of the progress bar.

    Returns:
        `perplexity`, `nll` (mean, in nats), `windows` and `tokens` (targets counted).

    Raises:
        NonFiniteLossError: If losses of windows are not finite (published code skips such windows, so that
            a broken model scores better), or the perplexity exceeds the largest float.
        ValueError: If there is no window, or a window has no target.
    """
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise ValueError(f"windows of shape {tuple(tokens.shape)}: expected (windows, at least 2 tokens)")
    total, broken = 0.0, []
    with torch.inference_mode(), _evaluating(model):
        for number, window in enumerate(Bar(tokens, desc=progress, unit="window")):
            loss = _window_loss(model, window.to(model.device))
            if not math.isfinite(loss):
                broken.append(number)
            total += loss
    if broken:
        raise NonFiniteLossError(
            f"{len(broken)} of {len(tokens)} windows have a loss that is not finite, first window {broken[0]}"
        )
    targets = len(tokens) * (tokens.shape[1] - 1)
    nll = total / targets
    if nll > math.log(torch.finfo(torch.float64).max):
        raise NonFiniteLossError(
            f"the mean loss over {len(tokens)} windows is {nll}: no perplexity that large"
        )
    return {"perplexity": math.exp(nll), "nll": nll, "windows": len(tokens), "tokens": targets}


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _window_loss(model: Any, ids: Tensor) -> float:
    """Return the summed negative log likelihood of a window's ids after the first.

    A window's logits would be the largest thing in memory by far (1.2 GB in float32 for 2,048 positions
    of a vocabulary of 150,000). So the decoder runs once, and the model's own forward is then repeated
    for a few positions at a time with the decoder's output held: the head, and whatever the
    architecture does after it (such as Gemma's soft cap), stay the model's own code.
    """
    positions = max(1, _CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
    targets = ids[1:]
    total = 0.0
    with _holding_output(model) as hold:
        start = 0
        while start < len(targets):
            hold.positions = slice(start, min(start + positions, len(targets)))
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            if (
                not hold.used
            ):  # an architecture whose forward does not call its decoder: all positions at once
                logits = logits[: len(targets)]
            losses = token_losses(logits, targets[start : start + len(logits)].to(logits.device))
            total += float(losses.sum(dtype=torch.float64))
            start += len(logits)
    return total


class _HeldOutput:
    """A decoder's forward that runs once and then returns the chosen positions of that run's output."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._output: Any = None
        self.positions = slice(None)

    @property
    def used(self) -> bool:
        """Whether the model called its decoder."""
        return self._output is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._output is None:
            self._output = self._forward(*args, **kwargs)
        hidden = self._output.last_hidden_state[:, self.positions]
        return dataclasses.replace(self._output, last_hidden_state=hidden)


@contextlib.contextmanager
def _holding_output(model: Any) -> Iterator[_HeldOutput]:
    """Let a model's decoder answer from one run for a while."""
    decoder = model.get_decoder()
    held = _HeldOutput(decoder.forward)
    if decoder is model:  # transformers' way of saying that it found none
        yield held
        return
    # accelerate's hooks replace `forward` on the instance: put back what was there, or nothing.
    before = vars(decoder).get("forward")
    decoder.forward = held
    try:
        yield held
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before


def accuracy(
    model: Any, tokenizer: Any, *, task: str, rows: Path | None, limit: int, batch_size: int
) -> dict[str, Any]:
    """Return a model's zero-shot accuracy on one stock lm-eval task.

    Prompts, choices and metrics are the stock task's; with `rows`, only where its data comes from is
    changed, and nothing asks the network.

    Args:
        model: A transformers causal model, on any device and in any type.
        tokenizer: Its tokenizer.
        task: Name of a stock lm-eval task.
        rows: Parquet artifact of the scored rows, as `fetch_task` writes it; None lets lm-eval fetch them.
        limit: Number of rows scored, from the first on; 0 for all.
        batch_size: Requests per forward pass.

    Returns:
        `acc`, `stderr` (of acc; None for a single row), `count`, `lm_eval_version`, `task_version`, and where
        the task has it `acc_norm` (by length in characters) and `acc_norm_stderr`.

    Raises:
        SourceError: If the task is unknown.
        MeasurementError: If the task has no accuracy, lm-eval cannot run it or would misread its rows, or
            the model's likelihoods are not finite.
        ValueError: If an argument is out of range.
        DamagedArtifactError: If `rows` is missing or damaged.
    """
    if limit < 0 or batch_size < 1:
        raise ValueError(f"limit {limit} and batch_size {batch_size}: expected at least 0 and at least 1")
    # Imported here: it takes four seconds, and only evaluation needs it.
    import lm_eval
    from lm_eval.tasks import TaskManager

    from aasvd.harness import SharedPrefixLM

    definition = task_definition(task)
    if rows is not None:
        verify(rows)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", _MAX_LENGTH)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), _evaluating(model):
        path = definition.path if rows is None else _local_task(definition, rows, folder=Path(folder))
        # A copy, because lm-eval gives a tokenizer without padding token one.
        wrapped = SharedPrefixLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=min(_MAX_LENGTH, longest),
        )
        # One definition by its path: lm-eval's index of all tasks takes thirteen seconds.
        manager = TaskManager(include_defaults=False)
        try:
            loaded = _loaded_task(path, task_manager=manager)
            for scored in loaded["tasks"].values():
                _check_task(scored, limit=limit)
            results = lm_eval.evaluate(lm=wrapped, task_dict=loaded, limit=limit or None, log_samples=False)
        except MeasurementError:
            raise
        # What a task's own code and templates raise where its rows have other columns, or it lacks a package.
        except (
            ValueError, LookupError, TypeError, AttributeError, OSError, ImportError, TemplateError,
        ) as error:  # fmt: skip
            raise MeasurementError(
                f"lm-eval cannot run task {task}: {type(error).__name__}: {error}"
            ) from error
    return _accuracy_record(results, task=task)


def _loaded_task(path: Path, *, task_manager: Any) -> Any:
    """Load a task for zero shots as lm-eval's `simple_evaluate` does.

    That function itself would also ask pip, compilers, drivers and the hub what there is, at every call.
    """
    # Its seeds: some tasks shuffle their choices as they are loaded.
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002 (what tasks use)
    loaded = task_manager.load([str(path)])
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _check_task(task: Any, *, limit: int) -> None:
    """Refuse a loaded task that has no accuracy, or that would misread its rows without a word.

    A task that generates would take hours before that shows. And lm-eval takes the name of a column that is
    not there for a text, and a right answer that is none of the choices, such as -1 where labels are hidden,
    for one that no model finds.

    Args:
        task: lm-eval's task.
        limit: Number of rows scored, from the first on; 0 for all.

    Raises:
        MeasurementError: Names the metrics or the column, or counts the rows.
    """
    name, metrics = task.task_name, sorted(task.aggregation())
    if "acc" not in metrics:
        raise MeasurementError(f"lm-eval task {name} measures {', '.join(metrics)}, not accuracy")
    for key in ("doc_to_text", "doc_to_target"):
        column = task.get_config(key)
        if isinstance(column, str) and column.isidentifier() and column not in task.features:
            raise MeasurementError(
                f"lm-eval task {name} reads column {column}, but its rows have {', '.join(task.features)}"
            )
    if task.OUTPUT_TYPE != "multiple_choice":
        return  # the right answer is then what has to follow, whatever it is
    answer = task.doc_to_text if task.multiple_input else task.doc_to_target
    rows = list(task.doc_iterator(limit=limit))
    wrong = [number for number, row in rows if not _is_choice(answer(row), task.doc_to_choice(row))]
    if wrong:
        raise MeasurementError(
            f"lm-eval task {name}: the right answer is none of the choices in {len(wrong)} of {len(rows)} "
            f"rows, first {answer(rows[wrong[0]][1])!r} in row {wrong[0]}"
        )


def _is_choice(answer: Any, choices: Sequence[Any]) -> bool:
    """Return whether an answer as lm-eval takes it, an index or a text or several, is among the choices."""
    if isinstance(answer, list):
        return any(_is_choice(one, choices) for one in answer)
    if isinstance(answer, str):
        return answer in choices
    return isinstance(answer, int | float) and 0 <= answer < len(choices)


def _local_task(definition: TaskDefinition, rows: Path, *, folder: Path) -> Path:
    """Write a task that is the stock one except for where its rows come from, and return its path."""
    split = definition.split
    settings = {
        "include": str(definition.path),
        "dataset_path": "parquet",  # a builder inside the datasets library, which never asks the hub
        "dataset_name": None,
        # Without a cache folder of its own the builder would fill the user's.
        "dataset_kwargs": {"data_files": {split: str(rows.absolute())}, "cache_dir": str(folder / "cache")},
        # lm-eval builds a few-shot sampler even for zero shots, from splits that are not there.
        "training_split": None,
        "fewshot_split": None,
        "validation_split": None,
        "test_split": None,
    }
    settings["test_split" if definition.settings.get("test_split") else "validation_split"] = split
    path = folder / "task.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def _accuracy_record(results: Mapping[str, Any], *, task: str) -> dict[str, Any]:
    """Pick one task's numbers from lm-eval's results."""
    found = results["results"][task]
    if "acc,none" not in found:
        metrics = sorted(key for key in found if "," in key and "stderr" not in key)
        raise MeasurementError(f"lm-eval task {task} gave {' and '.join(metrics)}, not acc,none")
    record = {
        "acc": float(found["acc,none"]),
        "stderr": _standard_error(found["acc_stderr,none"]),
        "count": int(results["n-samples"][task]["effective"]),
        "lm_eval_version": importlib.metadata.version("lm_eval"),
        "task_version": results["versions"].get(task),
    }
    if "acc_norm,none" in found:
        record["acc_norm"] = float(found["acc_norm,none"])
        record["acc_norm_stderr"] = _standard_error(found["acc_norm_stderr,none"])
    return record


def _standard_error(value: float | str) -> float | None:
    """Return a standard error; None where lm-eval has none, as for a single row."""
    return None if isinstance(value, str) else float(value)
