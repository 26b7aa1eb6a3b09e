import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import workflow_copy
from architectures import tiny_model
from shipped import Config, shipped
from stored import Stored, store
from workflow_copy import Copy


@pytest.fixture
def config() -> Config:
    return copy.deepcopy(shipped())


@pytest.fixture
def local(config: Config, tmp_path: Path) -> Config:
    """The shipped settings with a model, a text and a task that lie in local files."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "notes.txt").write_text("some words")
    (tmp_path / "piqa.jsonl").write_text("{}\n")
    config["models"]["mine"] = {"path": str(tmp_path / "model")}
    config["texts"]["notes"] = {"path": str(tmp_path / "notes.txt")}
    config["calibration"]["text"] = "notes"
    config["evaluation"] |= {"texts": ["notes"], "tasks": ["piqa"]}
    config["data_dir"] = str(tmp_path)
    return config


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    """Return the tiny model of an architecture, written to disk once; not to be changed by a test."""
    return functools.cache(lambda name: store(tiny_model(name), tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def finished_copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """One uninterrupted run, made by a plain `snakemake` and committed; not to be changed by a test."""
    copy = workflow_copy.create(tmp_path_factory.mktemp("workflow") / "finished")
    copy.path("log").write_text(copy.make())
    workflow_copy.commit(copy, "Results")
    return copy


@pytest.fixture
def another(finished_copy: Copy, tmp_path: Path) -> Copy:
    """A copy of the finished run of a test's module, with its artifacts, to be changed."""
    return finished_copy.duplicate(tmp_path / "another")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes minutes, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
