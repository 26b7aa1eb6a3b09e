import threading
from collections.abc import Iterator

import pytest
import torch

from aasvd.device import one_thread_each


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_workers_compute_on_one_thread_and_as_many_side_by_side() -> None:
    # Passed only by three workers that are there at the same time.
    together = threading.Barrier(3, timeout=60)

    def work(number: int) -> tuple[int, int]:
        together.wait()
        return number, torch.get_num_threads()

    with one_thread_each(torch.device("cpu")) as each:
        assert torch.get_num_threads() == 3  # whoever opens them still has all
        assert list(each(work, range(3))) == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_an_error_of_a_worker_is_raised_and_threads_come_back() -> None:
    def fail(number: int) -> None:
        raise ValueError(f"worker {number}")

    with pytest.raises(ValueError, match="worker 0"), one_thread_each(torch.device("cpu")) as each:
        list(each(fail, range(2)))
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_an_accelerator_is_not_shared_among_threads() -> None:
    here = threading.get_ident()
    with one_thread_each(torch.device("meta")) as each:
        assert set(each(lambda _: threading.get_ident(), range(4))) == {here}
