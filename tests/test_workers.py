"""Stages in processes of their own."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aasvd.artifacts import read_table
from aasvd.workers import WorkerError, Workers, run_stage


@pytest.fixture
def workers() -> Iterator[Workers]:
    before = set(multiprocessing.active_children())
    yield Workers(2)
    for process in set(multiprocessing.active_children()) - before:
        process.kill()


def fetching(folder: Path, *, text: str = "some words\n") -> dict[str, Any]:
    """Return the arguments of a stage that fetches a text, or one that is missing if it is empty."""
    if text:
        (folder / "notes.txt").write_text(text)
    return {
        "source": {"path": str(folder / "notes.txt")},
        "name": "notes",
        "split": "train",
        "data_dir": "",
        "output": str(folder / "text.parquet"),
        "cache": str(folder),
        "log": str(folder / "log"),
    }


def test_a_stage_does_the_same_in_a_process_of_its_own(tmp_path: Path, workers: Workers) -> None:
    for name, run in (("here", run_stage), ("there", workers.run_stage)):
        (tmp_path / name).mkdir()
        run("fetch_text", [str(tmp_path / name / "progress.json")], fetching(tmp_path / name))
    here, there = (read_table(tmp_path / name / "text.parquet") for name in ("here", "there"))
    assert here.equals(there)
    told = json.loads((tmp_path / "there" / "progress.json").read_text())
    assert told["stage"] == "fetch text notes"
    assert "start" in (tmp_path / "there" / "log").read_text()


def test_errors_come_back_as_they_are(tmp_path: Path, workers: Workers) -> None:
    with pytest.raises(ValueError, match=r"fetch text notes: .*notes\.txt"):
        workers.run_stage("fetch_text", [], fetching(tmp_path, text=""))
    workers.run_stage("fetch_text", [], fetching(tmp_path))  # one that failed has not harmed the others


def test_errors_that_cannot_be_sent_come_back_as_their_traceback(tmp_path: Path, workers: Workers) -> None:
    with pytest.raises(RuntimeError, match=r"unexpected keyword argument 'nonsense'"):
        workers.run_stage("fetch_text", [], {**fetching(tmp_path), "nonsense": 1})


def test_a_killed_process_is_one_message(tmp_path: Path, workers: Workers) -> None:
    before = set(multiprocessing.active_children())
    workers.run_stage("fetch_text", [], fetching(tmp_path))
    for process in set(multiprocessing.active_children()) - before:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with pytest.raises(WorkerError, match=r"fetch_text.*gpu=1"):
        workers.run_stage("fetch_text", [], fetching(tmp_path))
    workers.run_stage("fetch_text", [], fetching(tmp_path))  # in a new one
