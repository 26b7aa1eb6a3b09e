import functools
from collections.abc import Callable

import pytest
from architectures import tiny_model
from stored import Stored, store


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    """Return the tiny model of an architecture, written to disk once; not to be changed by a test."""
    return functools.cache(lambda name: store(tiny_model(name), tmp_path_factory.mktemp(name)))
