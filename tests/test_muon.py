import pytest
import torch
from torch import Tensor

from aasvd.device import one_thread_each
from aasvd.muon import Muon, orthogonalized

SHAPES = [(96, 40), (40, 96), (64, 64), (300, 5), (17, 1), (1, 17), (1, 1)]


def matrix(rows: int, columns: int, singular_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a float64 matrix with these singular values, and its singular vectors."""
    generator = torch.Generator().manual_seed(rows + columns)
    draw = [torch.randn(size, len(singular_values), generator=generator).double() for size in (rows, columns)]
    left, right = (torch.linalg.qr(vectors).Q for vectors in draw)
    return left * singular_values @ right.T, left, right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", SHAPES)
def test_directions_stay_and_their_sizes_become_one(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], scale: float, dtype: torch.dtype
) -> None:
    """The polar factor, from singular values over two orders of magnitude, to bfloat16's rounding."""
    monkeypatch.setattr("aasvd.muon.compute_dtype", lambda _name, _device: dtype)
    values = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    values /= values.norm()
    values = values[values > 0.006]
    made, left, right = matrix(*shape, values * scale)
    found = orthogonalized(made.float())
    assert found.dtype == dtype and found.shape == shape
    sizes = left.T @ found.double() @ right
    assert ((sizes.diagonal() - 1).abs() < 0.16).all()
    # Rounding to bfloat16 makes directions of its own, which grow like the others.
    assert torch.linalg.matrix_norm(found.double() - left @ right.T, 2) < 0.35


@pytest.mark.parametrize("shape", [(96, 40), (40, 96)])
def test_directions_without_gradient_get_none(shape: tuple[int, int]) -> None:
    made, _, _ = matrix(*shape, torch.tensor([3.0, 2.0, 1.0]).double())
    sizes = torch.linalg.svdvals(orthogonalized(made.float()).double())
    assert sizes[:3].sub(1).abs().max() < 0.16 and sizes[3:].max() < 0.35  # the rest is rounding
    assert orthogonalized(torch.zeros(shape)).count_nonzero() == 0


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-6, 1e6, 1e30])
def test_the_scale_of_a_gradient_is_of_no_matter(scale: float) -> None:
    """Squares of the smallest are 0 in float32, of the largest infinite."""
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    sizes = torch.linalg.svdvals(orthogonalized(matrix * scale).float())
    assert (sizes > 0.85).all() and (sizes < 1.15).all()


def test_products_are_of_the_type_that_is_fast_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without units for bfloat16, its products made a step take ten times as long."""
    for amx, avx512 in ((False, False), (False, True), (True, False)):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        fast = torch.bfloat16 if amx or avx512 else torch.float32
        assert orthogonalized(torch.ones(3, 2)).dtype == fast


def test_a_step_is_momentum_decay_and_a_direction_of_the_size_of_adamws() -> None:
    """Two steps against Nesterov's formula, on orthogonal gradients, whose polar factor is known."""
    first = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)).double()).Q
    start = torch.ones(48, 48)
    moved = torch.nn.Parameter(start.clone())
    optimizer = Muon([moved], lr=0.1, momentum=0.5, weight_decay=0.2)
    size, expected = 0.1 * 0.2 * 48**0.5, start.double()
    for gradient in (first, -first):  # momentum is first / 2, then -first / 4: what is followed changes sign
        moved.grad = (7 * gradient).float()
        optimizer.step()
        expected = expected * (1 - 0.1 * 0.2) - size * gradient
        assert (moved.detach() - expected).norm() < 0.16 * size * 48**0.5
        expected = moved.detach().double()


def test_matrices_without_gradient_stay() -> None:
    idle = torch.nn.Parameter(torch.ones(3, 2))
    Muon([idle], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert torch.equal(idle, torch.ones(3, 2))


def test_the_number_of_threads_changes_no_byte() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(*shape, generator=generator) for shape in SHAPES * 3]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with one_thread_each(torch.device("cpu")) as each:
                assert torch.get_num_threads() == count
                assert set(each(lambda _: torch.get_num_threads(), gradients)) == {1}
                found.append(list(each(orthogonalized, gradients)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for matrices in zip(*found, strict=True):
        assert torch.equal(matrices[0], matrices[1]) and torch.equal(matrices[0], matrices[2])
