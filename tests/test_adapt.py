from typing import Any

import pytest
import torch
from architectures import linears, tiny_model
from stored import assert_updated, random_tokens
from torch import Tensor

from aasvd.adapt import Recipe, adapt
from aasvd.lowrank import LowRankLinear

RECIPE = Recipe(epochs=3, rank=2, alpha=4.0, batch=2, learning_rate=1e-2)


def compressed() -> Any:
    model = tiny_model("llama")
    for name, linear in linears(model).items():
        left, singular, right = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        u, v = left[:, :6] * singular[:6].sqrt(), singular[:6, None].sqrt() * right[:6]
        model.set_submodule(name, LowRankLinear.from_factors(u.clone(), v.clone()))
    return model


def run(model: Any, recipe: Recipe = RECIPE) -> tuple[dict[str, list[float]], list[tuple[int, int, float]]]:
    steps: list[tuple[int, int, float]] = []
    adapted = adapt(
        model,
        random_tokens(5),
        recipe=recipe,
        generator=torch.Generator().manual_seed(0),
        on_step=lambda *step: steps.append(step),
    )
    return adapted.losses, steps


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_factor_gets_an_update_of_low_rank_and_nothing_else_changes() -> None:
    model = compressed()
    before = state(model)
    losses, steps = run(model)
    after = state(model)
    assert_updated(before, after, rank=RECIPE.rank, least=1e-4)
    assert all(isinstance(m, LowRankLinear) for m in linears_of(model))
    assert [step for step, _, _ in steps] == list(range(1, 2 * 3 * 3 + 1))
    assert {total for _, total, _ in steps} == {18}
    assert losses["v"][-1] < losses["u"][0]


def linears_of(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("_proj")]


def test_v_starts_from_the_updated_u() -> None:
    """The first loss of the second round is that of a model whose U are updated, and V as they were."""
    only_u, model = compressed(), compressed()
    run(model)
    original = state(only_u)
    only_u.load_state_dict(
        {name: tensor if name.endswith(".u") else original[name] for name, tensor in state(model).items()}
    )
    _, steps = run(compressed())
    first = next(loss for step, _, loss in steps if step == 10)
    tokens = random_tokens(5)
    with torch.no_grad():
        rows = [
            torch.nn.functional.cross_entropy(only_u(row[None]).logits[0, :-1], row[1:]) for row in tokens
        ]
    pairs = [float(rows[a] + rows[b]) / 2 for a in range(5) for b in range(a)]
    assert min(abs(first - pair) for pair in pairs) < 1e-5


def test_it_is_deterministic() -> None:
    first, second = compressed(), compressed()
    run(first)
    torch.manual_seed(7)
    run(second)
    assert all(torch.equal(tensor, state(second)[name]) for name, tensor in state(first).items())


def test_a_dense_model_and_a_diverging_loss_are_errors() -> None:
    with pytest.raises(ValueError, match="no linear is stored as such"):
        run(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"loss became (nan|inf); lower post\.learning_rate"):
        run(compressed(), RECIPE._replace(learning_rate=1e25))
