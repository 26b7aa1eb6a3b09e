"""What passes run on, in which float type, and how much memory the process takes."""

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


def compute_device() -> torch.device:
    """Return this process's accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    # With its number: what loads files takes a device without one for the first.
    return (
        torch.device(found.type, torch.accelerator.current_device_index()) if found else torch.device("cpu")
    )


def release_memory() -> None:
    """Give back to the system what dropped models held.

    A transformers model is part of reference cycles, which wait for the garbage collector; and glibc keeps
    freed memory for each thread that ever allocated, which added up to gigabytes over a run's stages.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the float type of forward passes: what `calibration.dtype` says.

    `auto` is bfloat16 on accelerators and on CPUs with bfloat16 matrix units, where it is several times
    faster than float32, and float32 elsewhere.
    """
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    fast = device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def one_thread_each(device: torch.device) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a `map` that, on a CPU with several threads, computes as many items at once, one thread each.

    For thousands of small operations, for which threads that share each of them wait longer than they work.
    Whoever opens it still computes on all threads.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield map
        return
    ready = threading.Barrier(threads)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # from here on this thread keeps its own number, whatever others set
        ready.wait()

    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(start, range(threads)))
        torch.set_num_threads(threads)
        yield workers.map


def process_memory(key: str) -> int | None:
    """Return a size in bytes that Linux keeps of this process (VmRSS, VmHWM); None on other systems."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak_memory() -> bool:
    """Let this process's peak (VmHWM) start anew, and say whether that is possible here: only on Linux."""
    clear = Path("/proc/self/clear_refs")
    possible = os.access(clear, os.W_OK)
    if possible:
        clear.write_text("5")
    return possible
