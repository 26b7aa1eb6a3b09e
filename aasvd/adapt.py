"""SVD-LLM's two-stage update of a compressed model: low-rank updates of every U, then of every V."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aasvd.fusion import unfuse
from aasvd.likelihood import token_losses
from aasvd.lowrank import LowRankLinear

_WARM_UP = 0.1  # share of the steps with a rising learning rate, at most the paper's 100 steps
_LONGEST_WARM_UP = 100


class Recipe(NamedTuple):
    """How a model is updated; the keys of `post:` in params.yaml.

    Attributes:
        epochs: Passes over the sequences in each of the two rounds.
        rank: Rank of the updates.
        alpha: Scale of the updates, times their rank.
        batch: Sequences per step.
        learning_rate: Peak learning rate of AdamW.
    """

    epochs: int
    rank: int
    alpha: float
    batch: int
    learning_rate: float


class Update(nn.Module):
    """A factor plus a low-rank update that starts at zero (LoRA)."""

    def __init__(self, factor: Tensor, recipe: Recipe, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = factor.shape
        # Drawn on the host, so that the start is the same on every device.
        start = torch.randn(recipe.rank, columns, generator=generator) / math.sqrt(columns)
        self.a = nn.Parameter(start.to(factor.device))
        self.b = nn.Parameter(torch.zeros(rows, recipe.rank, device=factor.device))
        self.scale = recipe.alpha / recipe.rank

    def forward(self, factor: Tensor) -> Tensor:
        """Return an updated factor in its own type."""
        return self.merged(factor).to(factor.dtype)

    def merged(self, factor: Tensor) -> Tensor:
        """Return an updated factor in float32."""
        return factor.to(self.a.device, torch.float32) + self.scale * (self.b @ self.a)


class Adapted(NamedTuple):
    """What a post-step gives.

    Attributes:
        losses: Mean loss of each epoch, for `u` and for `v`.
        updates: The update of each factor by its name in the model's state. The model's own factors have the
            digits of the type that it computes in; those of a checkpoint may have more.
    """

    losses: dict[str, list[float]]
    updates: dict[str, Update]


def adapt(
    model: Any,
    tokens: Tensor,
    *,
    recipe: Recipe,
    generator: torch.Generator,
    on_step: Callable[[int, int, float], None],
) -> Adapted:
    """Update all factors of a compressed model in place: every U with V fixed, then every V with U fixed.

    Paper (SVD-LLM, ICLR version): alpaca-cleaned, 50k instructions of up to 256 tokens, dropout 0.05 on the
    updates, a batch of 64. Here: the calibration text and `recipe`, and no dropout, since the update is
    merged into the factor before it is used. Its code leaves the rest to a trainer that lets the rate fall to
    0, decays no weights and clips gradients at 1. Here the rate stays at its peak, since a calibration set
    gives dozens of steps and not thousands, AdamW decays the updates by 0.01, and nothing is clipped.

    Args:
        model: A causal model whose compressed linears are `LowRankLinear`; all else stays as it is.
        tokens: Sequences to train on, (sequences, tokens).
        recipe: Settings.
        generator: Source of the updates' start and of the order of sequences.
        on_step: Called with (step, steps of both rounds, loss) after each step.

    Raises:
        ValueError: If no linear is stored as two factors, or the loss is not finite.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, LowRankLinear)}
    if not layers:
        raise ValueError("the post-step updates factors u and v, and no linear is stored as such")
    model.requires_grad_(False)
    # While it is trained, a factor is a function of parameters, not one itself.
    unfuse(model)
    per_round = recipe.epochs * math.ceil(len(tokens) / recipe.batch)
    adapted = Adapted({}, {})
    for number, factor in enumerate(("u", "v")):
        updates = {name: Update(getattr(layer, factor), recipe, generator) for name, layer in layers.items()}
        for name, update in updates.items():
            parametrize.register_parametrization(layers[name], factor, update)

        def report(step: int, loss: float, done: int = number * per_round) -> None:
            on_step(done + step, 2 * per_round, loss)

        trained = [p for update in updates.values() for p in update.parameters()]
        losses = _train(model, tokens, trained, recipe=recipe, generator=generator, on_step=report)
        adapted.losses[factor] = losses
        for name, update in updates.items():
            parametrize.remove_parametrizations(layers[name], factor, leave_parametrized=True)
            adapted.updates[f"{name}.{factor}"] = update.requires_grad_(False)
        model.requires_grad_(False)
    return adapted


def _train(
    model: Any,
    tokens: Tensor,
    parameters: list[nn.Parameter],
    *,
    recipe: Recipe,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate)
    steps = recipe.epochs * math.ceil(len(tokens) / recipe.batch)
    warm_up = max(1, min(_LONGEST_WARM_UP, round(_WARM_UP * steps)))
    step, trace = 0, []
    for _ in range(recipe.epochs):
        total = 0.0
        for sequences in torch.split(torch.randperm(len(tokens), generator=generator), recipe.batch):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * min(1.0, step / warm_up)
            ids = tokens[sequences].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = token_losses(logits.flatten(0, 1), ids[:, 1:].flatten()).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"the post-step's loss became {value}; lower post.learning_rate")
            total += value * len(sequences)
            on_step(step, value)
        trace.append(total / len(tokens))
    return trace
