"""The pipeline's stages: functions of paths and plain parameters, one per Snakemake rule.

Each stage reads verified artifacts, writes its own whole, and writes a record beside them: seconds, peak
memory, device, versions and what the stage measured. Records are apart from the tensors, so that tensors
are the same bytes whenever the inputs and parameters are the same.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from aasvd import (
    adapt,
    allocation,
    blocks,
    calibration,
    checkpoint,
    comparison,
    compress,
    evaluate,
    gradients,
    layers,
    measures,
    memory,
    methods,
    objectives,
    paper,
    params,
    progress,
    refine,
    report,
    results,
    sources,
)
from aasvd.artifacts import (
    Activations,
    mark_failure,
    read_json,
    read_table,
    read_tensors,
    replacing,
    write_json,
    write_table,
    write_tensors,
    writing_activations,
)
from aasvd.covariance import pack, unpack
from aasvd.device import compute_device, compute_dtype, process_memory, reset_peak_memory
from aasvd.formats import FORMATS, format_name
from aasvd.rank import uniform_rank
from aasvd.weights import stored_tensors

_DISTRIBUTIONS = ("aasvd", "torch", "transformers", "safetensors", "datasets", "lm_eval", "snakemake", "dvc")
_logger = logging.getLogger(__name__)


class StageError(ValueError):
    """A stage cannot finish; the message names it and what to do, and its log holds the traceback."""


# Snakemake runs stages as threads, and building a model without weights changes, for a moment, what every
# thread's modules do with their parameters. Stages on an accelerator or on all cores gain nothing together.
_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def _stage(name: str, *, log: Path, record: Path | None, advice: str) -> Iterator[dict[str, Any]]:
    """Run a stage by itself, logged and measured."""
    with _ONE_AT_A_TIME, _measured(name, log=log, record=record, advice=advice) as measured:
        yield measured


@contextlib.contextmanager
def _measured(name: str, *, log: Path, record: Path | None, advice: str) -> Iterator[dict[str, Any]]:
    """Log a stage, measure it, and write its record; say which setting helps where memory runs out."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log, mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    here = threading.get_ident()
    handler.addFilter(lambda entry: entry.thread == here)
    package = logging.getLogger("aasvd")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    measured: dict[str, Any] = {}
    start = time.perf_counter()
    _reset_peak_memory()
    try:
        _logger.info("%s: start", name)
        progress.start(name)
        yield measured
        measured |= {
            "stage": name,
            "seconds": time.perf_counter() - start,
            "peak_memory_mb": _peak_memory_mb(),
            "peak_device_memory_mb": _peak_device_memory_mb(),
            "device": str(compute_device()),
            "code": code_digest(),
            "versions": versions(),
        }
        if record is not None:
            write_json(record, measured)
        _logger.info("%s: done in %.1f s", name, measured["seconds"])
    except torch.OutOfMemoryError as error:
        _failed(name, error)
        raise StageError(
            f"{name}: the device ran out of memory; {advice}. What is finished stays."
        ) from error
    except (ValueError, OSError) as error:
        _failed(name, error)
        raise StageError(f"{name}: {error}") from error
    except Exception as error:
        _failed(name, error)
        raise
    finally:
        package.removeHandler(handler)
        handler.close()


def _failed(name: str, error: Exception) -> None:
    _logger.exception("%s failed", name)
    progress.report(now=True, state="failed", error=str(error))


_PASSES = "lower calibration.batch in params.yaml (it changes no result's identity)"
_STEPS = "lower refinement.batch in params.yaml"


def _reset_peak_memory() -> None:
    # Only so that a record holds its own stage's peak and not that of an earlier one.
    reset_peak_memory()
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()


def _peak_memory_mb() -> float:
    if (peak := process_memory("VmHWM")) is not None:
        return peak / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if platform.system() == "Darwin" else used / 1024


def _peak_device_memory_mb() -> float:
    return torch.accelerator.max_memory_allocated() / 2**20 if torch.accelerator.is_available() else 0.0


def versions() -> dict[str, str]:
    """Return the versions of what an artifact was made with."""
    found = {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}
    return {"python": platform.python_version(), **found}


def code_digest() -> str:
    """Return a digest of this package's source files."""
    summary = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        summary.update(file.read_bytes())
    return summary.hexdigest()[:12]


def git_state() -> str:
    """Return the commit this runs from, marked where the tree differs from it; "" outside a repository."""
    git = shutil.which("git")
    if git is None:
        return ""
    described = subprocess.run(
        [git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip()


# --- sources ---------------------------------------------------------------------------------------------


def fetch_model(
    *, source: Mapping[str, Any], output: str, outline: str, record: str, cache: str, log: str
) -> None:
    """Fetch a dense model and describe its blocks: their number, and which linears each has."""
    with _stage("fetch model", log=Path(log), record=Path(record), advice=_PASSES):
        sources.fetch_model(source, output=Path(output), cache=Path(cache))
        model = blocks.Source(Path(output))
        parts = blocks.skeleton(model.folder)
        write_json(
            Path(outline),
            {
                "architecture": type(parts.model).__name__,
                "path": parts.path,
                "blocks": len(parts.blocks),
                "linears": {
                    f"{parts.path}.{index}.{name}": list(module.weight.shape)
                    for index, block in enumerate(parts.blocks)
                    for name, module in blocks.linears(block).items()
                },
            },
        )


def fetch_text(
    *, source: Mapping[str, Any], name: str, split: str, data_dir: str, output: str, cache: str, log: str
) -> None:
    """Fetch one split of a text."""
    with _stage(f"fetch text {name}", log=Path(log), record=None, advice=_PASSES):
        fetch = functools.partial(
            sources.fetch_text, source, name=name, split=split, data_dir=data_dir, cache=Path(cache)
        )
        # Calibration cannot do without its text; a text that only perplexity is taken on fails alone.
        if split == "test":
            _fetch(f"text {name}", Path(output), fetch)
        else:
            fetch(output=Path(output))


def fetch_task(*, task: str, data_dir: str, output: str, cache: str, log: str) -> None:
    """Fetch the rows of a zero-shot task."""
    with _stage(f"fetch task {task}", log=Path(log), record=None, advice=_PASSES):
        fetch = functools.partial(sources.fetch_task, task, data_dir=data_dir, cache=Path(cache))
        _fetch(f"task {task}", Path(output), fetch)


def _fetch(name: str, output: Path, fetch: Callable[..., None]) -> None:
    """Fetch what one measurement reads, or write down why that failed: other measurements go on."""
    error = None
    try:
        fetch(output=output)
    except sources.SourceError as reason:
        error = str(reason)
        _report_failure(f"fetch {name}", error)
        sources.write_failure(output, error)
    mark_failure(output, error)


def _report_failure(what: str, error: str) -> None:
    _logger.warning("%s failed: %s", what, error)
    tqdm.write(f"{what}: {error}\n    (only this failed; the next run tries it again)")


# --- original side ---------------------------------------------------------------------------------------


def sample_calibration(
    *, source: str, text: str, output: str, settings: Mapping[str, Any], seed: int, log: str
) -> None:
    """Sample calibration tokens from a text."""
    with _stage("sample calibration", log=Path(log), record=None, advice=_PASSES):
        folder = blocks.Source(Path(source)).folder
        tokens = calibration.sample(
            read_table(Path(text)),
            AutoTokenizer.from_pretrained(folder),
            sequences=settings["sequences"],
            tokens=settings["tokens"],
            sampling=settings["sampling"],
            seed=seed,
            vocabulary=AutoConfig.from_pretrained(folder).get_text_config().vocab_size,
        )
        calibration.write_tokens(Path(output), tokens)


def embed(
    *, source: str, tokens: str, output: str, record: str, settings: Mapping[str, Any], log: str
) -> None:
    """Write what reaches the first block for the calibration tokens."""
    with _stage("embed", log=Path(log), record=Path(record), advice=_PASSES):
        model = blocks.Source(Path(source))
        parts = blocks.skeleton(model.folder)
        ids = calibration.read_tokens(Path(tokens))
        dtype = compute_dtype(settings["dtype"], compute_device())
        batches = list(torch.split(ids, settings["batch"]))
        width = parts.model.config.get_text_config().hidden_size
        with writing_activations(Path(output), shape=(*ids.shape, width), dtype=dtype) as append:
            for hidden in blocks.embed(model, parts, batches, dtype=dtype):
                append(hidden)


class _Block:
    """One block's surroundings: model, arguments, groups, device and float type, for one stage."""

    def __init__(self, source: str, index: int, settings: Mapping[str, Any], *, record: str) -> None:
        self.source, self.index, self.batch = blocks.Source(Path(source)), index, settings["batch"]
        self.parts = blocks.skeleton(self.source.folder)
        self.device = compute_device()
        self.dtype = compute_dtype(settings["dtype"], self.device)
        self.count = len(self.parts.blocks)
        self.label = f"block {index + 1} of {self.count}"
        # Of this phase, capture or compression: the records of both lie in a folder per block.
        self.folder = Path(record).parent
        left = _seconds_left(self.folder.parent, done=index, count=self.count)
        progress.report(now=True, block=index + 1, blocks=self.count, blocks_seconds_left=left)

    def arguments(self, hidden: Activations) -> dict[str, Any]:
        """Return the block's keyword arguments for sequences as long as these."""
        tokens = hidden.shape[1]
        return blocks.forward_arguments(self.parts, tokens=tokens, device=self.device, dtype=self.dtype)[
            self.index
        ]

    def groups(self, hidden: Activations, arguments: Mapping[str, Any]) -> list[list[str]]:
        """Return the names of the block's linears, grouped by shared input, in the order they are called."""
        _, tokens, width = hidden.shape
        return blocks.groups(self.parts, self.index, arguments=arguments, width=width, tokens=tokens)

    def original(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Load the original block."""
        return blocks.load_block(
            self.source, self.parts, self.index, device=self.device, dtype=dtype or self.dtype
        ).requires_grad_(False)

    def compressed(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
        """Load the original block and put factors, and other refined parameters, in their places."""
        block = self.original(dtype)
        weights = dict(blocks.linears(block))
        for name in factored(tensors):
            u, v = tensors[f"{name}.u"], tensors[f"{name}.v"]
            compress.put(block, name, u, v, bias=weights[name].bias, like=weights[name].weight)
        block.load_state_dict(dict(tensors), strict=False)
        return block

    def bar(self, label: str, total: int) -> progress.Bar:
        """Return a progress bar with time left for this block."""
        return progress.Bar(
            total=total, desc=f"{self.label}: {label}", unit="seq", leave=False, dynamic_ncols=True
        )


def factored(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the linears of which a block's tensors hold factors."""
    return [name.removesuffix(".u") for name in tensors if name.endswith(".u")]


def capture_block(
    *,
    source: str,
    inputs: str,
    outputs: str,
    covariances: str,
    record: str,
    index: int,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Run one original block: its outputs, and a covariance per group of linears that share an input."""
    with _stage(f"capture block {index}", log=Path(log), record=Path(record), advice=_PASSES):
        hidden = Activations(Path(inputs))
        around = _Block(source, index, settings, record=record)
        arguments = around.arguments(hidden)
        groups = around.groups(hidden, arguments)
        bar = around.bar("capture originals", len(hidden))
        with bar, writing_activations(Path(outputs), shape=hidden.shape, dtype=around.dtype) as append:

            def on_output(batch: Tensor) -> None:
                append(batch)
                bar.update(len(batch))

            captured = compress.capture_block(
                around.original(),
                groups,
                inputs=hidden,
                arguments=arguments,
                batch=around.batch,
                device=around.device,
                on_output=on_output,
            )
        tensors = {"token_count": torch.tensor(hidden.shape[0] * hidden.shape[1])}
        for group, found in zip(groups, captured, strict=True):
            tensors[f"gram:{'+'.join(group)}"] = pack(found.gram)
            tensors[f"absolute:{'+'.join(group)}"] = found.absolute
        write_tensors(Path(covariances), tensors)


def differentiate_head(
    *,
    source: str,
    tokens: str,
    hidden: str,
    gradient: str,
    record: str,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Differentiate the dense model's loss with respect to what leaves its last block."""
    with _stage("differentiate head", log=Path(log), record=Path(record), advice=_PASSES) as measured:
        x = Activations(Path(hidden))
        around = _Block(source, 0, settings, record=record)
        head = blocks.Head(around.source, around.parts, device=around.device, dtype=around.dtype)
        ids = calibration.read_tokens(Path(tokens))[: settings["gradients"] or None]
        # float32: a gradient is a sum of many small terms, and this file lives as long as one stage.
        with writing_activations(
            Path(gradient), shape=(len(ids), *x.shape[1:]), dtype=torch.float32
        ) as append:
            measured["loss"] = gradients.head_gradient(head, x, ids, on_gradient=append)


def differentiate_block(
    *,
    source: str,
    inputs: str,
    upstream: str,
    gradient: str,
    statistics: str,
    record: str,
    index: int,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Run one original block forward and backward: its linears' gradients, and that of its input."""
    with _stage(f"differentiate block {index}", log=Path(log), record=Path(record), advice=_PASSES):
        x, above = Activations(Path(inputs)), Activations(Path(upstream))
        around = _Block(source, index, settings, record=record)
        arguments = around.arguments(x)
        bar = around.bar("gradients", len(above))
        with bar, writing_activations(Path(gradient), shape=above.shape, dtype=torch.float32) as append:

            def on_gradient(batch: Tensor) -> None:
                append(batch)
                bar.update(len(batch))

            found = gradients.block_gradients(
                around.original(),
                around.groups(x, arguments),
                inputs=x,
                upstream=above,
                arguments=arguments,
                device=around.device,
                on_gradient=on_gradient,
            )
        tensors: dict[str, Tensor] = {}
        for name, some in found.items():
            tensors |= {f"squared:{name}": some.squared, f"norm:{name}": some.norm}
            tensors[f"outer:{name}"] = pack(some.outer)
        write_tensors(Path(statistics), tensors)


def average_block(
    *,
    source: str,
    inputs: str,
    output: str,
    record: str,
    index: int,
    buckets: int,
    seed: int,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Run one original block for the covariances of inputs averaged over buckets of sequences (AdaSVD)."""
    with _stage(f"average block {index}", log=Path(log), record=Path(record), advice=_PASSES):
        x = Activations(Path(inputs))
        around = _Block(source, index, settings, record=record)
        arguments = around.arguments(x)
        groups = around.groups(x, arguments)
        # The same buckets in every block.
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        grams = compress.bucket_grams(
            around.original(),
            groups,
            inputs=x,
            buckets=[some.tolist() for some in order.chunk(buckets)],
            arguments=arguments,
            device=around.device,
        )
        write_tensors(
            Path(output),
            {f"gram:{'+'.join(group)}": pack(gram) for group, gram in zip(groups, grams, strict=True)},
        )


def _statistics(
    covariances: str, *, gradients: str | None, buckets: str | None, device: torch.device
) -> dict[tuple[str, ...], objectives.Statistics]:
    """Read what is known of a block's groups on the original side."""
    captured = read_tensors(Path(covariances), device=device)
    averaged = read_tensors(Path(buckets), device=device) if buckets else {}
    differentiated = read_tensors(Path(gradients), device=device) if gradients else {}
    found = {}
    for key in captured:
        if not key.startswith("gram:"):
            continue
        group = tuple(key.removeprefix("gram:").split("+"))
        joined = "+".join(group)
        found[group] = objectives.Statistics(
            gram=unpack(captured[key]),
            absolute=captured[f"absolute:{joined}"],
            token_count=int(captured["token_count"]),
            buckets=unpack(averaged[key]) if averaged else None,
            squared={name: differentiated[f"squared:{name}"] for name in group} if differentiated else {},
            outer={name: unpack(differentiated[f"outer:{name}"]) for name in group} if differentiated else {},
        )
    return found


def measure_block(
    *,
    source: str,
    covariances: str,
    gradients: str | None,
    tokens: str | None,
    inputs: str | None,
    outputs: str | None,
    output: str,
    record: str,
    index: int,
    measure: str,
    settings: Mapping[str, Any],
    log: str,
) -> None:
    """Measure what an allocation of ranks looks at, on one original block."""
    with _stage(f"measure block {index}", log=Path(log), record=Path(record), advice=_PASSES):
        around = _Block(source, index, settings, record=record)
        kind, _, number = measure.partition("-")
        if kind == "profile":
            assert inputs and outputs
            found = measures.profile(
                Activations(Path(inputs)), Activations(Path(outputs)), device=around.device
            )
            return write_tensors(Path(output), found)
        groups = _statistics(covariances, gradients=gradients, buckets=None, device=around.device)
        statistics = {name: known for group, known in groups.items() for name in group}
        linears = blocks.linears(around.original())
        weights = {name: linears[name].weight for name in statistics}
        if kind == "spectra":
            found = measures.spectra(weights, groups)
        elif kind == "influence":
            found = measures.influence(weights, groups, objective=number)
        elif kind == "relative_gradients":
            norms = read_tensors(Path(gradients or ""), device=around.device)
            found = {
                name: (norms[f"norm:{name}"] / weight.double().norm())[None]
                for name, weight in weights.items()
            }
        else:
            assert inputs and tokens
            found = _sensitivity(around, weights, statistics, Path(inputs), Path(tokens), int(number))
        write_tensors(Path(output), found)


def _sensitivity(
    around: _Block,
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, objectives.Statistics],
    inputs: Path,
    tokens: Path,
    sequences: int,
) -> dict[str, Tensor]:
    """Try ASVD's truncation of every linear at every candidate ratio."""
    x = Activations(inputs)
    ids = calibration.read_tokens(tokens)[:sequences]
    trials: dict[str, list[Tensor]] = {}
    options = objectives.Options(blend=0.0, ridge=0.0)
    for name, weight in weights.items():
        solve = objectives.solver("asvd", statistics[name], options=options)
        trials[name] = []
        for ratio in allocation.CANDIDATES:
            rank = uniform_rank(*weight.shape, parameter_ratio=ratio, storage="factors")
            factors = None if rank is None else solve(name, weight, rank).factors
            trials[name].append(weight if factors is None else factors.u @ factors.v)
    later = range(around.index, len(around.parts.blocks))
    loaded = [
        functools.partial(
            blocks.load_block, around.source, around.parts, block, device=around.device, dtype=around.dtype
        )
        for block in later
    ]
    arguments = blocks.forward_arguments(
        around.parts, tokens=x.shape[1], device=around.device, dtype=around.dtype
    )
    head = blocks.Head(around.source, around.parts, device=around.device, dtype=around.dtype)
    return measures.sensitivity(
        loaded,
        arguments[around.index :],
        trials,
        hidden=x.read(list(range(len(ids)))),
        loss=lambda hidden: float(head.loss(hidden, ids).sum()) / (len(ids) * (ids.shape[1] - 1)),
    )


# --- compression -----------------------------------------------------------------------------------------


def allocate(
    *,
    outline: str,
    measured: Mapping[str, Sequence[str]],
    output: str,
    record: str,
    parameter_ratio: float,
    compression: Mapping[str, Any],
    log: str,
) -> None:
    """Choose the rank of every linear at the parameter budget; `measured` are files by measure and block."""
    with _stage("allocate", log=Path(log), record=Path(record), advice=_PASSES) as described:
        model = read_json(Path(outline))
        layers = []
        for name, shape in model["linears"].items():
            index, _, inner = name.removeprefix(f"{model['path']}.").partition(".")
            layers.append(allocation.Layer(int(index), inner, tuple(shape)))
        host = torch.device("cpu")
        problem = allocation.Problem(
            layers,
            parameter_ratio,
            {
                measure.partition("-")[0]: [read_tensors(Path(file), device=host) for file in files]
                for measure, files in measured.items()
            },
            compression,
        )
        ranks, notes = allocation.allocate(compression["allocation"], problem)
        stored = problem.stored(ranks)
        achieved = stored / sum(layer.size for layer in layers)
        described |= {"budget": problem.budget, "stored": stored, "achieved": achieved, **notes}
        named = {f"{layer.block}.{layer.name}": rank for layer, rank in zip(layers, ranks, strict=True)}
        write_json(Path(output), {"ranks": named})
        dense = sum(rank is None for rank in ranks)
        tqdm.write(f"allocated ranks to {len(layers)} linears, {dense} dense: {achieved:.4f} kept")


def solve_block(
    *,
    source: str,
    covariances: str,
    ranks: str,
    original: str | None,
    shifted: str | None,
    gradients: str | None,
    buckets: str | None,
    output: str,
    record: str,
    index: int,
    calibration: Mapping[str, Any],
    compression: Mapping[str, Any],
    log: str,
) -> None:
    """Solve one block's factors; files of statistics that the objective does not need are None."""
    with _stage(f"solve block {index}", log=Path(log), record=Path(record), advice=_PASSES) as measured:
        around = _Block(source, index, calibration, record=record)
        known = _statistics(covariances, gradients=gradients, buckets=buckets, device=around.device)
        stream, groups = None, [list(group) for group in known]
        if "shifted" in methods.OBJECTIVES[compression["objective"]].needs:
            x, x_shifted = Activations(Path(original or "")), Activations(Path(shifted or ""))
            arguments = around.arguments(x)
            # Only here does it matter which group comes first.
            groups = around.groups(x, arguments)
            stream = compress.Stream(x, x_shifted, arguments, around.batch, around.device, around.dtype)
        unrefined = around.original()
        chosen = read_json(Path(ranks))["ranks"]
        solution = compress.solve_block(
            unrefined,
            copy.deepcopy(unrefined),
            groups,
            objective=compression["objective"],
            options=objectives.options_of(compression),
            ranks={name: chosen[f"{index}.{name}"] for group in groups for name in group},
            statistics=[known[tuple(group)] for group in groups],
            stream=stream,
        )
        measured["linears"] = solution.report
        for name, numbers in solution.report.items():
            if numbers.get("directions_dropped"):
                _logger.warning("%s of block %d: singular covariance, %s", name, index, numbers)
        write_tensors(Path(output), solution.tensors)


# Sequences on which refinement compares a block with what it was.
_MEASURED = 32


def refine_block(
    *,
    source: str,
    shifted: str,
    target: str,
    solved: str,
    output: str,
    record: str,
    index: int,
    seed: int,
    calibration: Mapping[str, Any],
    refinement: Mapping[str, Any],
    log: str,
) -> None:
    """Refine one solved block, factors and norms together, against the original block's outputs."""
    with _stage(f"refine block {index}", log=Path(log), record=Path(record), advice=_STEPS) as measured:
        x, y = Activations(Path(shifted)), Activations(Path(target))
        around = _Block(source, index, calibration, record=record)
        factors = read_tensors(Path(solved), device=around.device)
        streams: dict[str, Any] = {
            "inputs": x,
            "targets": y,
            "arguments": around.arguments(x),
            "device": around.device,
        }
        solved_block = around.compressed(factors, around.dtype)
        # On some sequences: a pass over all of them would take as long as many steps.
        some: dict[str, Any] = {"batch": around.batch, "batches": math.ceil(_MEASURED / around.batch)}
        measured["before"] = refine.distortion(solved_block, **streams, **some)
        block = around.compressed(factors, torch.float32)
        visits = refinement["epochs"] * len(x)
        if refinement["steps"]:
            visits = min(visits, refinement["steps"] * refinement["batch"])
        with around.bar("refine", visits) as bar:

            def on_step(step: int, steps: int, loss: float) -> None:
                bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
                progress.report(loss=loss, step=step, steps=steps)
                bar.update(round(visits * step / steps) - bar.n)

            measured["losses"] = refine.refine(
                block,
                **streams,
                recipe=refine.Recipe(**refinement),
                dtype=around.dtype,
                # A generator per block: a resumed run continues as an uninterrupted one would.
                generator=torch.Generator().manual_seed(seed * 1_000_003 + index),
                on_step=on_step,
            )
        measured["refined"] = refine.distortion(copy.deepcopy(block).to(around.dtype), **streams, **some)
        kind = refinement["loss"]
        if measured["refined"][kind] >= measured["before"][kind]:
            # Too few steps for the learning rate: better the start than a block that training made worse.
            _logger.warning("refinement did not bring block %d closer, so its solved factors stay", index)
            block = around.compressed(factors, torch.float32)
        write_tensors(Path(output), block.state_dict())


def propagate(
    *,
    source: str,
    shifted: str,
    target: str,
    factors: str,
    output: str,
    record: str,
    index: int,
    calibration: Mapping[str, Any],
    log: str,
) -> None:
    """Push shifted activations through one compressed block and measure its distortion."""
    with _stage(f"propagate block {index}", log=Path(log), record=Path(record), advice=_PASSES) as measured:
        start = time.perf_counter()
        x, y = Activations(Path(shifted)), Activations(Path(target))
        around = _Block(source, index, calibration, record=record)
        block = around.compressed(read_tensors(Path(factors), device=around.device), around.dtype)
        with writing_activations(Path(output), shape=x.shape, dtype=around.dtype) as append:
            measured["after"] = refine.distortion(
                block,
                inputs=x,
                targets=y,
                arguments=around.arguments(x),
                batch=around.batch,
                device=around.device,
                on_output=append,
            )
        seconds = time.perf_counter() - start
        tqdm.write(_block_line(around, measured["after"], seconds=seconds))


def _block_line(around: _Block, after: Mapping[str, float], *, seconds: float) -> str:
    """Return what a finished block's records say, on one line."""
    files = [around.folder / f"{stage}.json" for stage in ("solve", "refine")]
    made = [read_json(file) for file in files if file.exists()]
    errors = " ".join(
        f"{name.rpartition('.')[2]} {numbers['relative_error']:.3f}"
        for record in made
        for name, numbers in record.get("linears", {}).items()
        if "relative_error" in numbers
    )
    before = next((record["before"] for record in made if "before" in record), None)
    distortion = ", ".join(
        f"{metric} " + (f"{before[metric]:.4g} → " if before else "") + f"{after[metric]:.4g}"
        for metric in ("mse", "cosine")
    )
    seconds += sum(record["seconds"] for record in made)
    peak = max([_peak_memory_mb(), *(record["peak_memory_mb"] for record in made)])
    left = _seconds_left(around.folder.parent, done=around.index + 1, count=around.count) or 0.0
    return (
        f"{around.label}: relative errors {errors}; distortion {distortion}; {seconds:.1f} s, "
        f"{peak:.0f} MB; about {left / 60:.1f} min left for the other blocks"
    )


def _seconds_left(folder: Path, *, done: int, count: int) -> float | None:
    """Estimate the time that the blocks which are not done take, from the records of those that are."""
    records = [file for block in range(done) for file in (folder / f"block_{block:03d}").glob("*.json")]
    if not records:
        return None
    return round(sum(read_json(file)["seconds"] for file in records) / done * (count - done), 1)


def assemble(
    *,
    source: str,
    outline: str,
    factors: Sequence[str],
    checksums: str,
    record: str,
    storage: str,
    precision: str,
    details: Mapping[str, Any],
    log: str,
) -> None:
    """Assemble the compressed blocks and the dense rest into a Hugging Face checkpoint."""
    with _stage("assemble", log=Path(log), record=Path(record), advice=_PASSES) as measured:
        dense = blocks.Source(Path(source))
        parts = blocks.skeleton(dense.folder)
        path, folder = read_json(Path(outline))["path"], Path(checksums).parent
        dtype = torch.bfloat16 if precision == "bfloat16" else parts.model.config.dtype or torch.float32
        storage = format_name(storage, precision)
        ranks: dict[str, int] = {}
        # Snakemake removes the list of checksums before it runs this again; what is left is no checkpoint.
        shutil.rmtree(folder, ignore_errors=True)
        with _scratch(folder.with_name(".packed")) as packed:
            for index, file in enumerate(tqdm(factors, desc="Packing blocks", unit="block")):
                tensors = read_tensors(Path(file), device=compute_device())
                names = factored(tensors)
                ranks |= {f"{path}.{index}.{name}": tensors[f"{name}.u"].shape[1] for name in names}
                write_tensors(packed / str(index), _packed(tensors, names, storage=storage, dtype=dtype))

            # The checkpoint wants its tensors by type, then name: block by block, once for each type.
            @functools.lru_cache(maxsize=1)
            def block(index: int) -> dict[str, Tensor]:
                return read_tensors(packed / str(index), device=torch.device("cpu"))

            def tensor(name: str) -> Tensor:
                if name.startswith(f"{path}."):
                    index, _, inner = name.removeprefix(f"{path}.").partition(".")
                    compressed = block(int(index))
                    if inner in compressed:
                        return compressed[inner]
                return blocks.read(dense, parts, name)

            checkpoint.write(
                dense=dense.folder,
                output=folder,
                ranks=ranks,
                storage=storage,
                details=details,
                tensor=tensor,
                dtype=dtype,
            )
        measured["ranks"] = ranks


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that is gone when the block ends."""
    # One fixed name, so that what a killed stage left is cleared by the next one.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _packed(
    tensors: Mapping[str, Tensor], names: Sequence[str], *, storage: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a block's tensors as a checkpoint stores them: the factors of the named linears packed."""
    factors = {f"{name}.{factor}" for name in names for factor in ("u", "v")}
    rest = {key: tensor for key, tensor in tensors.items() if key not in factors}
    return rest | {
        f"{name}.{part}": tensor
        for name in names
        for part, tensor in FORMATS[storage].pack(tensors[f"{name}.u"], tensors[f"{name}.v"], dtype).items()
    }


def adapt_model(
    *,
    source: str,
    tokens: str,
    checksums: str,
    adapted: str,
    record: str,
    details: Mapping[str, Any],
    seed: int,
    calibration_settings: Mapping[str, Any],
    post: Mapping[str, Any],
    log: str,
) -> None:
    """Update a checkpoint's factors on the calibration tokens, and write it as another checkpoint."""
    with _stage("adapt", log=Path(log), record=Path(record), advice="lower post.batch") as measured:
        ids = calibration.read_tokens(Path(tokens))
        model, _ = _evaluated_model(_model_folder(checksums), calibration_settings)
        with tqdm(desc="post-step", unit="step", leave=False, dynamic_ncols=True) as bar:

            def on_step(step: int, steps: int, loss: float) -> None:
                bar.total = steps
                bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
                bar.update(step - bar.n)

            measured["losses"] = adapt.adapt(
                model,
                ids,
                recipe=adapt.Recipe(**post),
                generator=torch.Generator().manual_seed(seed),
                on_step=on_step,
            )
        state = model.state_dict()
        described = json.loads((Path(checksums).parent / "config.json").read_text())
        stored_type = getattr(torch, described["dtype"])
        dense = blocks.Source(Path(source))
        # What is not updated comes from the checkpoint in its own type, not in that of the passes.
        before = {
            name: tensor.file
            for name, tensor in stored_tensors(sorted(Path(checksums).parent.glob("*.safetensors"))).items()
        }

        def tensor(name: str) -> Tensor:
            if name.endswith((".u", ".v")):
                return state[name]
            with safe_open(before[name], framework="pt") as file:
                return file.get_tensor(name)

        shutil.rmtree(Path(adapted).parent, ignore_errors=True)
        checkpoint.write(
            dense=dense.folder,
            output=Path(adapted).parent,
            ranks=model.config.quantization_config.ranks,
            storage=model.config.quantization_config.storage,
            details=details,
            tensor=tensor,
            dtype=stored_type,
        )


# --- evaluation ------------------------------------------------------------------------------------------


def _evaluated_model(folder: Path, settings: Mapping[str, Any]) -> tuple[PreTrainedModel, Any]:
    device = compute_device()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype(settings["dtype"], device)).to(
        device
    )
    return model, AutoTokenizer.from_pretrained(folder)


def _model_folder(model: str) -> Path:
    """Return the verified folder of a dense source.json or of a checkpoint's SHA256SUMS."""
    path = Path(model)
    if path.name == checkpoint.CHECKSUMS:
        checkpoint.verify(path.parent)
        return path.parent
    source = blocks.Source(path)
    for name in source.tensors:
        source.read(name)
    return source.folder


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

    def measure() -> dict[str, float | int]:
        network, tokenizer = _evaluated_model(_model_folder(model), calibration)
        joined = sources.document_text(_evaluated_table(text))
        tokens = evaluate.windows(joined, tokenizer, window=settings["window"], windows=settings["windows"])
        return evaluate.perplexity(network, tokens, progress=f"perplexity {name}")

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
        network, tokenizer = _evaluated_model(_model_folder(model), calibration)
        return evaluate.accuracy(
            network,
            tokenizer,
            task=task,
            rows=Path(rows),
            limit=settings["limit"],
            batch_size=settings["batch"],
        )

    _measure(f"accuracy {task}", measure, output=output, advice="lower evaluation.batch", log=log)


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
    with _stage(name, log=Path(log), record=Path(output), advice=advice) as measured:
        try:
            measured["measurement"] = measure()
        except (sources.SourceError, evaluate.MeasurementError) as error:
            measured["error"] = str(error)
        except torch.OutOfMemoryError:
            measured["error"] = f"the device ran out of memory; {advice}"
        if "error" in measured:
            _report_failure(name, measured["error"])
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
    with _stage(f"layers of block {index}", log=Path(log), record=Path(output), advice=_PASSES) as measured:
        x, x_shifted = Activations(Path(original)), Activations(Path(shifted))
        around = _Block(source, index, calibration, record=output)
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


def measure_memory(
    *, model: str, context: int, output: str, calibration: Mapping[str, Any], log: str
) -> None:
    """Measure the memory that a model needs to read a context and to generate."""
    dtype = str(compute_dtype(calibration["dtype"], compute_device())).removeprefix("torch.")

    def measure() -> dict[str, Any]:
        return memory.measure(_model_folder(model), context=context, dtype=dtype)

    _measure(
        f"memory at {context} tokens", measure, output=output, advice="choose a shorter context", log=log
    )


# --- what people look at ---------------------------------------------------------------------------------


def write_key(*, ingredients: Mapping[str, Any], output: str) -> None:
    """Write down what a key was made from."""
    write_json(Path(output), ingredients)


def publish(
    *,
    source: str,
    outline: str,
    checksums: str,
    records: Sequence[str],
    dense: Sequence[str],
    compressed: Sequence[str],
    outdated: str | None,
    evaluation: str,
    model: str,
    table: str,
    figure: str,
    blocks_file: str,
    run: params.Run,
    base: Mapping[str, Any],
    keys: Mapping[str, Any],
    log: str,
) -> None:
    """Gather a run's numbers and put them, its checkpoint and its figure under results/<run>/."""
    with _stage(f"publish {run.name}", log=Path(log), record=None, advice=_PASSES):
        folder = Path(checksums).parent
        checkpoint.verify(folder)
        described = read_json(Path(outline))
        shapes = described["linears"]
        stored = checkpoint.counts(folder, list(shapes))
        before = sum(rows * columns for rows, columns in shapes.values())
        made = [read_json(Path(record)) for record in records]
        measured = map(results.read_measurement, dense), map(results.read_measurement, compressed)
        everything = [*made, *(read_json(Path(file)) for file in [*dense, *compressed])]
        result = {
            "run": run.name,
            "model": run.model,
            "method": run.settings["compression"]["method"],
            "objective": run.settings["compression"]["objective"],
            "allocation": run.settings["compression"]["allocation"],
            "storage": run.settings["compression"]["storage"],
            "precision": run.settings["compression"]["precision"],
            "refined": run.settings["refinement"]["epochs"] > 0,
            "ratio": {"target": run.ratio, "achieved": stored["linears"] / before},
            "parameters": {
                "dense": blocks.Source(Path(source)).parameter_count(),
                "compressed": stored["model"],
                "linears": {"dense": before, "compressed": stored["linears"]},
            },
            "bytes": {"dense": blocks.Source(Path(source)).byte_count(), "compressed": stored["bytes"]},
            **results.side_by_side(*measured),
            "evaluation": run.settings["evaluation"],
            "seconds": _seconds(everything),
            "peak_memory_mb": max(entry["peak_memory_mb"] for entry in everything),
            "peak_device_memory_mb": max(entry["peak_device_memory_mb"] for entry in everything),
            "provenance": {
                "versions": versions(),
                "keys": keys,
                "git": git_state(),
                "code": code_digest(),
                "made_by_other_code": sorted(
                    {entry["stage"] for entry in everything if entry["code"] != code_digest()}
                ),
            },
        }
        report.write_distortion(made, output=Path(figure), run=run.name)
        with replacing(Path(blocks_file)) as temporary:
            temporary.write_text(json.dumps(results.blocks(made), indent=2, allow_nan=False) + "\n")
        report.write_table(result, output=Path(table))
        _link_folder(folder, Path(model))
        ranks = json.loads((folder / "config.json").read_text())["quantization_config"]["ranks"]
        card = report.model_card(result, base=base, shapes=shapes, ranks=ranks, path=described["path"])
        checkpoint.add_file(Path(model), "README.md", card)
        # Last and whole, because its keys say whether all of the above is up to date.
        with replacing(Path(evaluation)) as temporary:
            temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        if outdated:
            Path(outdated).unlink()
        progress.report(now=True, state="finished")
        tqdm.write(report.summary(result, model=model))


def collect(*, output: str, log: str) -> None:
    """Gather all finished runs in one table."""
    with _stage("collect runs", log=Path(log), record=None, advice=_PASSES):
        write_table(Path(output), results.table())


def compare(
    *,
    evaluations: Sequence[str],
    published: str,
    page: str,
    markdown: str,
    latex: str,
    parquet: str,
    figure: str,
    compared: params.Comparison,
    log: str,
) -> None:
    """Put all runs of a comparison into one table, in four formats, and a figure."""
    with _stage(f"compare {compared.model}", log=Path(log), record=None, advice=_PASSES):
        found = [json.loads(Path(file).read_text()) for file in evaluations]
        rows = [
            comparison.dense_row(found[0]),
            *(
                comparison.run_row(result, method=method, variant=variant)
                for (method, variant, _), result in zip(compared.runs, found, strict=True)
            ),
        ]
        theirs = json.loads(Path(published).read_text())
        report.write_curves(rows, output=Path(figure), title=f"Perplexity of {compared.model}")
        comparison.write(
            {
                f"Measured on {compared.model}": rows,
                f"Reported for {theirs['model']}, not measured here": comparison.reported_rows(
                    theirs, compared.ratios
                ),
            },
            notes=[
                "Ratios are shares kept of the blocks' linears (kept_linears) and of all parameters "
                "(kept_model). Seconds are those of all stages that a run uses, shared ones too, "
                "measurements left out. Drop is the share of the dense average accuracy that is lost.",
                theirs["note"],
            ],
            figure=Path(figure),
            page=Path(page),
            markdown=Path(markdown),
            latex=Path(latex),
            parquet=Path(parquet),
        )
        tqdm.write(f"the comparison of {len(found)} runs lies in {page}")


def present(*, name: str, log: str, **arguments: Any) -> None:
    """Write one of the paper's tables or figures: the function of this name in `aasvd.paper`."""
    with _stage(f"paper {name}", log=Path(log), record=None, advice=_PASSES):
        if "runs" in arguments:
            write_table(Path(arguments["runs"]), results.table())
        getattr(paper, name)(**arguments)


def _seconds(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for record in records:
        stage = record["stage"].split(" block", 1)[0]
        totals[stage] = totals.get(stage, 0.0) + record["seconds"]
    return totals


def _link_folder(source: Path, target: Path) -> None:
    """Make a folder of hard links, so that no byte is stored twice; copies where links are not possible."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = target / file.name
        link.unlink(missing_ok=True)
        if source.stat().st_dev == target.stat().st_dev:
            link.hardlink_to(file)
        else:
            shutil.copyfile(file, link)
