import json
from pathlib import Path
from typing import Any

import pytest

from aasvd import progress


def read(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_every_run_that_watches_gets_the_same_facts(tmp_path: Path, clock: list[float]) -> None:
    files = [tmp_path / run / "progress.json" for run in ("a", "b")]
    with progress.watched_by([str(file) for file in files]):
        progress.start("refine block 2")
        progress.report(now=True, block=3, blocks=30)
    first, second = map(read, files)
    assert first == second
    assert (first["stage"], first["state"], first["block"]) == ("refine block 2", "running", 3)
    assert [file.name for file in files[0].parent.iterdir()] == ["progress.json"]  # nothing half written


def test_reports_are_written_once_a_second_and_none_is_lost(tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "progress.json"
    with progress.watched_by([str(file)]):
        progress.start("refine")
        progress.report(loss=3.0)
        progress.report(step=1)
        assert "loss" not in read(file)
        clock[0] = 1.5
        progress.report(step=2)
        assert (read(file)["loss"], read(file)["step"]) == (3.0, 2)
        progress.start("propagate")
        assert "loss" not in read(file)  # of another stage


def test_a_stage_that_runs_beside_one_that_failed_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of stages side by side the one that speaks last is shown; the next stage, or call, starts anew."""
    now = iter(f"2026-01-01T00:00:{second:02}.000+00:00" for second in range(60))
    monkeypatch.setattr(progress, "_now", lambda: next(now))
    file = tmp_path / "progress.json"
    with progress.watched_by([str(file)]):
        progress.start("perplexity")
        with progress.watched_by([str(file)]):
            progress.start("accuracy")
            assert read(file)["stage"] == "accuracy"
            progress.report(now=True, state="failed", error="no rows")
        progress.report(now=True, done=3)
    assert (read(file)["state"], read(file)["error"]) == ("failed", "no rows")
    with progress.watched_by([str(file)]):
        progress.start("accuracy")
    assert read(file)["state"] == "running"


def test_nobody_watches_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    progress.start("refine")
    progress.report(now=True, loss=1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("disable", [False, True])
def test_a_bar_reports_what_is_done_and_what_is_left(
    tmp_path: Path, clock: list[float], disable: bool
) -> None:
    file = tmp_path / "progress.json"
    with progress.watched_by([str(file)]):
        progress.start("refine block 2")
        with progress.Bar(total=10, desc="block 3 of 30: refine", disable=disable) as bar:
            for _ in range(4):
                clock[0] += 2
                bar.update(2)
    if not disable:
        found = read(file)
        assert (found["doing"], found["done"], found["of"]) == ("refine", 8, 10)
        assert found["stage_seconds_left"] >= 0
