"""What every stage does around its work: wait for its turn, log, measure, record, say what went wrong."""

import contextlib
import logging
import platform
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from aasvd import progress
from aasvd.artifacts import write_json
from aasvd.device import compute_device, process_memory, reset_peak_memory
from aasvd.provenance import code_digest, versions

_logger = logging.getLogger(__name__)

# What to do where a pass over the calibration sequences needs too much memory.
PASSES = "lower calibration.batch in params.yaml (it changes no result's identity)"
# Where it is one sequence at a time already.
SEQUENCES = "set fewer calibration.tokens in params.yaml (each pass is over one sequence)"


class StageError(ValueError):
    """A stage cannot finish; the message names it and what to do, and its log holds the traceback."""


# Snakemake runs stages as threads, and building a model without weights changes, for a moment, what every
# thread's modules do with their parameters. Stages that are to run together have processes (`aasvd.workers`).
_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def stage(name: str, *, log: Path, record: Path | None, advice: str) -> Iterator[dict[str, Any]]:
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
    held = _reset_peak_memory()
    try:
        _logger.info("%s: start", name)
        progress.start(name)
        yield measured
        measured |= {
            "stage": name,
            "seconds": time.perf_counter() - start,
            "peak_memory_mb": peak_memory_mb(),
            "added_memory_mb": peak_memory_mb() - held,
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
            f"{name}: the device ran out of memory; {advice}, or let fewer stages share it (--resources "
            "gpu=1). What is finished stays."
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


def _reset_peak_memory() -> float:
    """Let peaks start anew, so that a record holds its own stage's; return what the process holds, in MB.

    Whatever earlier stages left: processes live as long as Snakemake's.
    """
    reset_peak_memory()
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    return peak_memory_mb()


def peak_memory_mb() -> float:
    """Return the most memory that this process took in MB: since the stage began, where that is known."""
    if (peak := process_memory("VmHWM")) is not None:
        return peak / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if platform.system() == "Darwin" else used / 1024


def _peak_device_memory_mb() -> float:
    return torch.accelerator.max_memory_allocated() / 2**20 if torch.accelerator.is_available() else 0.0


def report_failure(what: str, error: str) -> None:
    """Say on the terminal and in the log what failed alone: the stage goes on."""
    _logger.warning("%s failed: %s", what, error)
    tqdm.write(f"{what}: {error}\n    (only this failed; the next run tries it again)")
