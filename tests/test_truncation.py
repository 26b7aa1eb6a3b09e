"""Dobi-SVD's trained truncation positions: the SVD's backward pass, the truncation, and the training."""

from typing import Any

import pytest
import torch
from architectures import linears, tiny_model
from stored import TOKENS, random_tokens
from torch import Tensor

from aasvd.truncation import Recipe, StableSVD, Trained, _inverse_differences, train, truncate

RECIPE = Recipe(epochs=2, batch=1, learning_rate=60.0, beta=10.0, penalty=200.0)
F64 = torch.float64


def matrix_of(singular: list[float], rows: int, columns: int, dtype: torch.dtype = F64) -> Tensor:
    """Return a matrix of given singular values and random directions."""
    chance = torch.Generator().manual_seed(rows)
    u = torch.linalg.qr(torch.randn(rows, len(singular), generator=chance, dtype=F64)).Q
    v = torch.linalg.qr(torch.randn(columns, len(singular), generator=chance, dtype=F64)).Q
    return ((u * torch.tensor(singular, dtype=F64)) @ v.mT).to(dtype)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the randomized SVD take all directions there are, so that its draws do not matter."""
    monkeypatch.setattr("aasvd.truncation._MARGIN", 100)


def plainly(matrix: Tensor, position: Tensor, beta: float) -> Tensor:
    """Truncate by torch's exact SVD and its own backward pass."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    numbers = torch.arange(1, len(s) + 1)
    return (u * (s * (0.5 * torch.tanh(beta * (position - numbers)) + 0.5))) @ vh


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("position", [1.1, 3.0, 4.7])
def test_gradients_are_those_of_an_exact_svd(exact: None, shape: tuple[int, int], position: float) -> None:
    """Where singular values are apart, against torch's own backward pass, and finite differences."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    found, expected = [], []
    for function, into in ((truncate, found), (plainly, expected)):
        inputs = matrix.clone().requires_grad_(True), torch.tensor(position, dtype=F64, requires_grad=True)
        output = function(*inputs, beta=2.0)
        into += [output, *torch.autograd.grad((output * weights).sum(), inputs)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    inputs = matrix.requires_grad_(True), torch.tensor(position, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda some, place: truncate(some, place, beta=2.0), inputs, nondet_tol=1e-9
    )


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_every_triplet_has_its_gradient(shape: tuple[int, int]) -> None:
    """For a function of u, s and v that no sign of a triplet changes."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=F64).requires_grad_(True)
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(6), dtype=F64)

    def of(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        return (weights * torch.stack([u[0] * v[1], s, u[2] * u[3] + v[0] * v[2]])[:, :4]).sum()

    (ours,) = torch.autograd.grad(of(*StableSVD.apply(matrix, 8)), matrix)  # type: ignore[no-untyped-call]
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    (theirs,) = torch.autograd.grad(of(u, s, vh.mT), matrix)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_a_randomized_svd_is_exact_up_to_what_it_leaves_out() -> None:
    """Of a matrix of rank 4, with 4 of 4 directions and their margin beyond."""
    matrix = matrix_of([9.0, 5.0, 2.0, 1.0], 40, 30)
    truncated = truncate(matrix, torch.tensor(2.5, dtype=F64), beta=100.0)
    torch.testing.assert_close(truncated, matrix_of([9.0, 5.0, 0.0, 0.0], 40, 30), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "singular",
    [
        [3.0, 3.0, 3.0, 3.0],
        [5.0, 1.0, 1.0 - 1e-8, 1e-3],
        [1e4, 1.0, 1e-5, 1e-12],
        [2.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ],
)
def test_gradients_stay_finite_and_bounded(singular: list[float], dtype: torch.dtype) -> None:
    """With repeated, close and zero singular values, wherever the position lies among them."""
    for rows, columns in ((9, 4), (4, 9), (6, 6)):
        for position in (0.5, 1.0, 2.5, 3.0, 4.0):
            matrix = matrix_of(singular, rows, columns, dtype).requires_grad_(True)
            place = torch.tensor(position, dtype=dtype, requires_grad=True)
            output = truncate(matrix, place, beta=10.0)
            output.sum().backward()  # type: ignore[no-untyped-call]
            assert matrix.grad is not None and place.grad is not None
            assert torch.isfinite(output).all()
            assert torch.isfinite(place.grad)
            # Two values within 1e-6 of each other are at worst 1e6 times as sensitive as one.
            assert float(matrix.grad.abs().max()) < 1e8
    (u, s, v) = StableSVD.apply(matrix, 4)  # type: ignore[no-untyped-call]
    (gradient,) = torch.autograd.grad((u.sum() + v.sum() + s.sum()), matrix)
    assert torch.isfinite(gradient).all()


def test_a_zero_matrix_without_the_bounds_has_no_gradient() -> None:
    """What the bounds are for: torch's own backward pass divides zero by zero here."""
    matrix = torch.zeros(6, 4, dtype=F64, requires_grad=True)
    (plain,) = torch.autograd.grad(plainly(matrix, torch.tensor(2.5), 10.0).sum(), matrix)
    assert not torch.isfinite(plain).all()
    (ours,) = torch.autograd.grad(truncate(matrix, torch.tensor(2.5), beta=10.0).sum(), matrix)
    assert torch.isfinite(ours).all()


def test_differences_are_exact_apart_a_series_when_close_and_capped_at_zero() -> None:
    s = torch.tensor([4.0, 2.0, 2.0 - 1e-7, 2.0 - 1e-7, 1e-11, 0.0], dtype=F64)
    found = _inverse_differences(s)
    torch.testing.assert_close(found, -found.mT)
    assert not found.diagonal().any()
    for i, j in ((1, 0), (2, 0), (4, 0), (5, 2)):
        low, high = float(s[i].clamp_min(1e-10)), float(s[j])
        assert float(found[i, j]) == pytest.approx(1 / (high**2 - low**2), rel=1e-12)
    assert float(found[2, 1]) == pytest.approx(11 / 4, rel=1e-5)
    assert float(found[3, 2]) == pytest.approx(11 / (2 - 1e-7) ** 2, rel=1e-12)
    assert float(found[5, 4]) == 100.0


def test_the_scale_of_singular_values_is_the_papers() -> None:
    found = torch.linalg.svdvals(truncate(matrix_of([8.0, 4.0, 2.0, 1.0], 9, 7), torch.tensor(2.1), beta=10))
    expected = [
        s * 0.5 * (1 + float(torch.tanh(torch.tensor(10 * (2.1 - i)))))
        for i, s in enumerate([8, 4, 2, 1], start=1)
    ]
    assert found[:4].tolist() == pytest.approx(expected, rel=1e-6)


# --- training ---------------------------------------------------------------------------------------------


def trained(
    recipe: Recipe = RECIPE,
    *,
    name: str = "llama",
    storage: str = "factors",
    ratio: float = 0.5,
    **other: Any,
) -> Trained:
    model = other.get("model") or tiny_model(name)
    return train(
        model,
        {name: (m.weight.shape[0], m.weight.shape[1]) for name, m in linears(model).items()},
        other.get("tokens", random_tokens(4)),
        ratio=ratio,
        storage=storage,
        recipe=recipe,
        seed=other.get("seed", 0),
        on_step=other.get("on_step", lambda *_: None),
    )


def perplexity(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp())


@pytest.mark.parametrize("name", ["llama", "opt", "qwen2"])
def test_the_first_loss_is_that_of_outputs_truncated_at_uniform_ranks(exact: None, name: str) -> None:
    """Biases stay whole; against exact SVDs of every linear's outputs, put in place by hand."""
    model = tiny_model(name)
    first = trained(RECIPE._replace(epochs=1), name=name).steps[0]
    for linear in linears(model).values():
        m, n = linear.weight.shape
        rank = int(0.5 * m * n / (m + n))
        # γ counts the directions of 20 tokens.
        gamma = rank / min(m, n) * min(m, n, TOKENS)

        def hook(own: Any, _inputs: Any, output: Tensor, *, gamma: float = gamma) -> Tensor:
            bias = 0 if own.bias is None else own.bias
            rows = output.flatten(0, -2) - bias
            return (plainly(rows, torch.tensor(gamma), 10.0) + bias).view_as(output)

        linear.register_forward_hook(hook)
    each = [perplexity(model, ids[None]) for ids in random_tokens(4)]
    assert min(abs(first.perplexity / value - 1) for value in each) < 1e-3
    budget = sum(linear.weight.numel() for linear in linears(model).values())
    kept = sum(
        int(0.5 * m * n / (m + n)) * (m + n) for m, n in (x.weight.shape for x in linears(model).values())
    )
    assert first.kept == pytest.approx(kept / budget, rel=1e-5)
    assert first.loss == pytest.approx(first.perplexity + 200 * (0.5 - first.kept), rel=1e-5)


def sure_model() -> tuple[Any, Tensor]:
    """Return a model that is sure of what comes next, and text that it wrote: truncation hurts there."""
    model: Any = tiny_model("llama")
    model.get_submodule("lm_head").weight.data *= 4
    ids, chance = random_tokens(4)[:, :1], torch.Generator().manual_seed(0)
    for _ in range(TOKENS):
        with torch.no_grad():
            chances = model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=chance)], 1)
    return model, ids


def test_training_lowers_the_perplexity_at_the_budget() -> None:
    model, ids = sure_model()
    recipe = RECIPE._replace(epochs=20, batch=4, learning_rate=60.0)
    found = trained(recipe, model=model, tokens=ids, ratio=0.4)
    first, best = found.steps[0], found.steps[found.best]
    assert best.loss == min(step.loss for step in found.steps)
    assert abs(best.kept - 0.4) < 0.01
    # Uniform ranks keep a little less, since they are whole.
    assert 0.36 < first.kept < 0.4
    assert best.perplexity < 0.7 * first.perplexity
    # What the shares keep is what the best step said.
    sizes = {name: linear.weight.numel() for name, linear in linears(model).items()}
    kept = sum(share * sizes[name] for name, share in found.shares.items()) / sum(sizes.values())
    assert kept == pytest.approx(best.kept, rel=1e-5)


def test_a_position_moves_only_where_it_changes_the_loss() -> None:
    """An attention that adds nothing to the stream has nothing to gain from any of its directions."""
    model, ids = sure_model()
    model.get_submodule("model.layers.1.self_attn.o_proj").weight.data.zero_()
    recipe = RECIPE._replace(epochs=4, batch=4, penalty=0.0)
    before = trained(recipe._replace(learning_rate=1e-9), model=model, tokens=ids).shares
    found = trained(recipe, model=model, tokens=ids)
    assert found.best > 0
    after = found.shares
    for name in after:
        assert (abs(after[name] - before[name]) < 1e-5) == ("1.self_attn" in name), name


@pytest.mark.parametrize("storage", ["factors", "pivoted", "remapped"])
def test_a_large_penalty_meets_the_budget_of_every_storage(storage: str) -> None:
    recipe = Recipe(epochs=3, batch=1, learning_rate=10.0, beta=10.0, penalty=1e6)
    found = trained(recipe, storage=storage, ratio=0.4)
    assert abs(found.steps[found.best].kept - 0.4) < 5e-3
    assert abs(found.steps[0].kept - 0.4) > abs(found.steps[found.best].kept - 0.4)


def test_training_is_deterministic_and_leaves_the_model_and_the_generator_alone() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps: list[tuple[int, int, float]] = []
    torch.manual_seed(5)
    first = trained(model=model, on_step=lambda *step: steps.append(step))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(7)
    assert trained() == first
    assert trained(seed=1) != first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert [step[:2] for step in steps] == [(number, 8) for number in range(1, 9)]
    assert [step[2] for step in steps] == [step.loss for step in first.steps]


def test_a_step_is_the_mean_over_its_batch() -> None:
    """In one epoch with nothing learnt, the steps of every batch size see the same sequences."""
    still = RECIPE._replace(epochs=1, learning_rate=1e-9)
    single, pairs = (trained(still._replace(batch=batch)).steps for batch in (1, 2))
    assert len(single) == 4 and len(pairs) == 2
    for pair, members in zip(pairs, (single[:2], single[2:]), strict=True):
        assert pair.perplexity == pytest.approx(sum(step.perplexity for step in members) / 2, rel=1e-3)


def test_what_is_not_finite_is_named() -> None:
    model = tiny_model("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"outputs of model\.layers\.1\.mlp\.up_proj are not finite"):
        trained(model=model)
    assert all(not module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"became (nan|inf); lower compression\.dobi\.learning_rate"):
        trained(RECIPE._replace(penalty=float("inf")))
