"""Run stages: in this process, or several at once in processes that share the machine.

Snakemake's `gpu` resource says how many stages compute at a time. Torch is imported where stages run and when
the first one does, so that whoever only plans need not wait for it.
"""

import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class WorkerError(ValueError):
    """The process of a stage ended before the stage did."""


def run_stage(name: str, status_files: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Run a stage in this process and thread.

    Args:
        name: Of a function of `aasvd.stages`.
        status_files: Where it says how far it is.
        arguments: Its keyword arguments.
    """
    stage = getattr(importlib.import_module("aasvd.stages"), name)
    with importlib.import_module("aasvd.progress").watched_by(status_files):
        stage(**arguments)


class Workers:
    """Processes that run stages side by side, each with its share of the threads and its own accelerator.

    Where there are fewer accelerators, processes share them. A process lives as long as this one.
    """

    def __init__(self, count: int) -> None:
        """Prepare processes; each starts with the first stage that finds no other idle."""
        self._count = count
        self._replacing = threading.Lock()
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        # Spawned, not forked: threads and an initialised accelerator do not survive a fork.
        context = multiprocessing.get_context("spawn")
        numbers = self._count, context.Value("i", 0)
        return ProcessPoolExecutor(self._count, mp_context=context, initializer=_prepare, initargs=numbers)

    def run_stage(self, name: str, status_files: Sequence[str], arguments: Mapping[str, Any]) -> None:
        """Run a stage in one of the processes and wait for it; arguments as in the function of this name.

        Raises:
            WorkerError: If the process was killed, or one beside it; later stages run in new ones.
            RuntimeError: With the traceback of what a stage raised that was no ValueError.
        """
        pool = self._pool
        try:
            pool.submit(_run_stage, name, status_files, arguments).result()
        except BrokenProcessPool as error:
            with self._replacing:
                if self._pool is pool:
                    self._pool = self._start()
            raise WorkerError(
                f"the process of stage {name}, or one beside it, was stopped or killed, as where memory does "
                "not suffice; fewer stages at a time need less (--resources gpu=1). What is finished stays. "
                f"({error.__cause__ or error})"
            ) from None


def _run_stage(name: str, status_files: Sequence[str], arguments: Mapping[str, Any]) -> None:
    try:
        run_stage(name, status_files, arguments)
    except ValueError as error:
        # Errors of other libraries may not survive the way between processes; a message does.
        raise ValueError(str(error)) from None
    except Exception as error:
        raise RuntimeError("".join(traceback.format_exception(error))) from None


def _prepare(count: int, arrived: Any) -> None:
    with arrived.get_lock():
        number = arrived.value
        arrived.value += 1
    # Ctrl-C goes to the whole group: Snakemake answers it, and waits for the stages that run.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TQDM_POSITION"] = str(number)  # a line of the terminal for each
    torch = importlib.import_module("torch")
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    if devices := torch.accelerator.device_count():
        torch.accelerator.set_device_index(number % devices)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
