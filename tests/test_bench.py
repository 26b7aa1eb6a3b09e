import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from shipped import Config

from aasvd import bench


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """The configurations that a benchmark ran the workflow with, of which nothing runs."""
    found: list[Mapping[str, Any]] = []

    def run(folder: Path, config: Mapping[str, Any], targets: list[str]) -> float:
        found.append(config)
        for target in targets:
            if target.endswith("eval.json"):
                (folder / target).parent.mkdir(parents=True)
                result = {"parameters": {"linears": {"compressed": 1}}, "perplexity": {}, "ratio": {}}
                (folder / target).write_text(json.dumps(result))
        return 1.0

    record = {"stage": "refine block 1", "seconds": 1.0, "peak_memory_mb": 1.0}
    monkeypatch.setattr(bench, "run_workflow", run)
    monkeypatch.setattr(bench, "records", lambda folder: [record])
    monkeypatch.setattr(bench, "REPOSITORY", tmp_path)
    monkeypatch.setattr(bench, "PEER", tmp_path / "peer")
    return found


def test_without_the_text_of_the_comparison_a_benchmark_says_what_it_takes(
    config: Config, ran: list[Mapping[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.benchmark(config, "default")["text"] == "enwiki100"
    assert not ran[-1]["evaluation"]["texts"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("peer is no folder; calibrates on enwiki100 and measures no perplexity")
    (tmp_path / "peer").mkdir()
    assert bench.benchmark(config, "default")["text"] == "peer"
    assert ran[-1]["evaluation"]["texts"] == [ran[-1]["calibration"]["text"]] == ["peer"]
    assert capsys.readouterr().out == ""
