"""Say where a run is: a bar on the terminal, and the same as a small JSON file that other programs can watch.

Stages know artifacts, not runs. Whoever starts a stage names the files (`watched_by`), and everything the
stage does in that thread reports into them.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from aasvd.artifacts import replacing

_SECONDS_BETWEEN_WRITES = 1.0


class _Status:
    """What is known of the stage that runs, and where to write it."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.facts: dict[str, Any] = {}
        self.started = _now()
        self.written = -float("inf")

    def write(self) -> None:
        """Replace the files, but for those in which a stage beside this one has failed."""
        text = json.dumps({**self.facts, "updated": _now()}, indent=2, sort_keys=True) + "\n"
        for file in self.files:
            told = json.loads(file.read_text()) if file.exists() else {}
            if told.get("state") == "failed" and told["updated"] > self.started:
                continue
            # A hundred runs share a stage: waiting for the disk each time would take longer than some stages.
            with replacing(file, flush=False) as temporary:
                temporary.write_text(text)
        self.written = time.monotonic()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


_watched: ContextVar[_Status | None] = ContextVar("status", default=None)


@contextlib.contextmanager
def watched_by(files: Sequence[str]) -> Iterator[None]:
    """Let what happens in this thread be reported in these files."""
    token = _watched.set(_Status([Path(file) for file in files]))
    try:
        yield
    finally:
        _watched.reset(token)


def start(stage: str) -> None:
    """Report that a stage starts."""
    if status := _watched.get():
        status.facts = {"stage": stage, "state": "running"}
        status.write()


def report(*, now: bool = False, **facts: Any) -> None:
    """Add facts to what is reported; written about once a second, or `now`."""
    if status := _watched.get():
        status.facts |= facts
        if now or time.monotonic() - status.written >= _SECONDS_BETWEEN_WRITES:
            status.write()


class Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar that also reports what is done and how many seconds are left of it."""

    def update(self, n: float | None = 1) -> bool | None:
        """Advance the bar."""
        shown = super().update(n)
        if self.disable:  # tqdm then keeps neither count nor times
            return shown
        rate = self.format_dict["rate"] or self._average_rate()
        left = round((self.total - self.n) / rate, 1) if rate and self.total else None
        report(doing=self.desc.rpartition(": ")[2], done=self.n, of=self.total, stage_seconds_left=left)
        return shown

    def _average_rate(self) -> float:
        elapsed = self.format_dict["elapsed"]
        return self.n / elapsed if elapsed else 0.0


@contextlib.contextmanager
def training(label: str) -> Iterator[Callable[[int, int, float], None]]:
    """Show how far training is: yield what is called with (step, steps, loss) after each step."""
    with Bar(desc=label, unit="step", leave=False, dynamic_ncols=True) as bar:

        def on_step(step: int, steps: int, loss: float) -> None:
            bar.total = steps
            bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            report(loss=loss, step=step, steps=steps)
            bar.update(step - bar.n)

        yield on_step
