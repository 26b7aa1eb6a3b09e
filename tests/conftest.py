import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from architectures import tiny_model
from stored import Stored, store
from workflow_copy import Copy


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    """Return the tiny model of an architecture, written to disk once; not to be changed by a test."""
    return functools.cache(lambda name: store(tiny_model(name), tmp_path_factory.mktemp(name)))


@pytest.fixture
def another(finished_copy: Copy, tmp_path: Path) -> Copy:
    """A copy of the finished run of a test's module, with its artifacts, to be changed."""
    return finished_copy.duplicate(tmp_path / "another")
