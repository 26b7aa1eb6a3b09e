"""Dobi-SVD's truncation positions: how many directions of its outputs each linear keeps, found by training.

One number per linear is trained by the loss of the whole model, whose weights stay as they are, plus a
penalty for missing the parameter budget (Wang et al., Dobi-SVD, ICLR 2025, section 3.1). The outputs of a
linear for one sequence, A = X Wᵀ = U diag(σ) Vᵀ, become U diag(σ t) Vᵀ, where t falls smoothly from 1 to 0
at the position. So gradients pass through an SVD per linear, whose backward pass is kept finite.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aasvd.rank import COSTS, uniform_rank

# Directions that are computed beyond the position, and iterations of the randomized SVD.
_MARGIN, _ITERATIONS = 5, 2
# Smallest singular value; relative difference at which two are close; largest order of the Taylor expansion
# then; what takes its place where both are smallest.
_FLOOR, _CLOSE, _ORDER, _CAP = 1e-10, 1e-6, 10, 1e2
# The learning rate is in directions of sequences of this length, and falls to this share of itself.
_DIRECTIONS, _FINAL = 2048, 0.8


class StableSVD(torch.autograd.Function):
    """Leading singular triplets u (n, k), s (k,), v (m, k) of a matrix, with a backward pass kept finite.

    What lies behind them counts as zero in the backward pass, as in Dobi-SVD's code.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute them by a randomized SVD with torch's own generator."""
        u, s, v = torch.svd_lowrank(matrix, q=rank, niter=_ITERATIONS)
        ctx.save_for_backward(u, s, v)
        return u, s, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the matrix (Townsend 2016), with `_inverse_differences` in it."""
        u, s, v = ctx.saved_tensors
        of_u, of_s, of_v = gradients
        inverse = _inverse_differences(s)
        turned = u.mT @ of_u, v.mT @ of_v
        first, second = (inverse * (some - some.mT) for some in turned)
        core = first * s + s[:, None] * second + torch.diag(of_s)
        above, beside = of_u / s.clamp_min(_FLOOR), of_v / s.clamp_min(_FLOOR)
        left = u @ core + above - u @ (u.mT @ above)
        return left @ v.mT + u @ (beside - v @ (v.mT @ beside)).mT, None


def _inverse_differences(s: Tensor) -> Tensor:
    """Return 1 / (σ_j² − σ_i²) at (i, j), with bounded values where the two are close.

    With q the quotient of the smaller and the larger one it is 1 / (larger² (1 − q²)); where they are close,
    the geometric series 1 + q² + ... + q²⁰ takes the place of 1 / (1 − q²), and where both are as good as
    zero the whole is 100. Code: close are values within 1e-10, which in float32 only equal ones of any size
    are. Here: relative to the larger one.
    """
    s = s.clamp_min(_FLOOR)
    larger, smaller = torch.maximum(s[:, None], s), torch.minimum(s[:, None], s)
    square = (smaller / larger).square()
    series = sum(square**order for order in range(_ORDER + 1)) / larger.square()
    close = larger - smaller <= _CLOSE * larger
    exact = 1 / ((larger - smaller) * (larger + smaller)).where(~close, torch.ones_like(larger))
    found = torch.where(close, series, exact).where(larger > _FLOOR, torch.full_like(larger, _CAP))
    # Singular values fall, so the later of a pair is the smaller; of one with itself there is no difference.
    return found.tril(-1) - found.triu(1)


def truncate(matrix: Tensor, position: Tensor, *, beta: float) -> Tensor:
    """Scale the singular value i = 1, 2, ... of a matrix by ½ tanh(β (γ − i)) + ½.

    Args:
        matrix: The outputs A of a linear for one sequence, (tokens, out).
        position: γ, a scalar; outside of what is there it counts as the nearest that is.
        beta: How steeply the scale falls at the position.
    """
    rank = max(1, min(*matrix.shape, int(position) + _MARGIN))
    u, s, v = StableSVD.apply(matrix, rank)  # type: ignore[no-untyped-call]
    numbers = torch.arange(1, rank + 1, device=s.device)
    scale = 0.5 * torch.tanh(beta * (position.clamp(1, rank) - numbers)) + 0.5
    kept: Tensor = (u * (s * scale)) @ v.mT
    return kept


class Recipe(NamedTuple):
    """How positions are trained; the keys of `compression.dobi` in params.yaml.

    Attributes:
        epochs: Passes over the sequences.
        batch: Sequences per step, one after the other.
        learning_rate: Of Adam, in directions of 2048; falls by a fifth along a cosine.
        beta: Steepness of the truncation.
        penalty: Weight λ of the distance from the parameter budget.
    """

    epochs: int
    batch: int
    learning_rate: float
    beta: float
    penalty: float


class Step(NamedTuple):
    """What a step saw before it changed the positions.

    Attributes:
        loss: What is minimised.
        perplexity: Mean over its sequences.
        kept: Share of the linears' parameters that the positions keep.
    """

    loss: float
    perplexity: float
    kept: float


class Trained(NamedTuple):
    """What training found.

    Attributes:
        shares: By linear, the share of its parameters that its position keeps.
        best: Index of the step whose positions these are.
        steps: What every step saw.
    """

    shares: dict[str, float]
    best: int
    steps: list[Step]


def train(
    model: Any,
    shapes: Mapping[str, tuple[int, int]],
    tokens: Tensor,
    *,
    ratio: float,
    storage: str,
    recipe: Recipe,
    seed: int,
    on_step: Callable[[int, int, float], None],
) -> Trained:
    """Train the truncation position of every linear.

    Minimised is exp(cross entropy) + λ |kept − ratio| + Σ (γ below 0)² + Σ (γ above all directions)², and the
    positions of the best step are taken, a step's loss being that of its own sequences. The loss is the
    perplexity itself, not its logarithm. As in the paper's code, the whole model is in memory, with all that
    the backward pass of one sequence needs.

    Paper: sequences of 2048 tokens and linears with at least as many inputs and outputs, so a linear has 2048
    directions, γ counts those, and the rank is k = γ min(m, n) / 2048. Here: a linear has min(tokens, m, n)
    directions, and γ = s min(tokens, m, n), k = s min(m, n) with s trained in place of γ, which for the
    paper's sizes is the same. Code: the learning rate's cosine goes up and down every other epoch; here it
    falls once. Code: the bias is truncated in training and not afterwards; here never.

    Args:
        model: A dense causal model; its parameters are made not to require gradients.
        shapes: Shape (m, n) of every linear that is to be truncated, by its name in the model.
        tokens: Sequences to train on, (sequences, tokens).
        ratio: Share of the linears' parameters that is to be kept; training starts at its uniform ranks.
        storage: How a low-rank matrix is stored, which decides what a rank costs.
        recipe: Settings.
        seed: Of the order of sequences and of the randomized SVDs.
        on_step: Called with (step, steps, loss) after each step.

    Raises:
        ValueError: If the loss is not finite.
    """
    model.requires_grad_(False)
    full = [min(shape) for shape in shapes.values()]
    directions = torch.tensor([min(rank, tokens.shape[1]) for rank in full], device=model.device)
    start = [uniform_rank(*shape, parameter_ratio=ratio, storage=storage) for shape in shapes.values()]
    relative = torch.tensor(
        [1.0 if rank is None else rank / most for rank, most in zip(start, full, strict=True)],
        device=model.device,
        requires_grad=True,
    )
    sizes = torch.tensor([m * n for m, n in shapes.values()], device=model.device)
    rate = recipe.learning_rate / _DIRECTIONS
    optimizer = torch.optim.Adam([relative], lr=rate)
    count = recipe.epochs * math.ceil(len(tokens) / recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=count, eta_min=_FINAL * rate)
    steps: list[Step] = []
    best, found = 0, relative.detach().clone()

    def position(index: int) -> Tensor:
        return relative[index] * directions[index]

    # The randomized SVD draws from the global generator; whatever else does is not disturbed.
    with torch.random.fork_rng(devices=[]), _truncating(model, list(shapes), position, beta=recipe.beta):
        torch.manual_seed(seed)
        for _ in range(recipe.epochs):
            for sequences in torch.split(torch.randperm(len(tokens)), recipe.batch):
                perplexity = 0.0
                for ids in torch.split(tokens[sequences].to(model.device), 1):
                    own = model(input_ids=ids, labels=ids, use_cache=False).loss.exp() / len(sequences)
                    own.backward()
                    perplexity += own.item()
                kept = (_shares(relative, shapes, storage=storage) * sizes).sum() / sizes.sum()
                outside = (-relative).relu() + (relative - 1).relu()
                rest = recipe.penalty * (kept - ratio).abs() + (outside * directions).square().sum()
                rest.backward()  # type: ignore[no-untyped-call]
                steps.append(Step(perplexity + rest.item(), perplexity, kept.item()))
                if not math.isfinite(steps[-1].loss):
                    raise ValueError(
                        f"the loss of truncated outputs became {steps[-1].loss}; "
                        "lower compression.dobi.learning_rate, or set calibration.dtype to float32"
                    )
                if steps[-1].loss < steps[best].loss or len(steps) == 1:
                    best, found = len(steps) - 1, relative.detach().clone()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                on_step(len(steps), count, steps[-1].loss)
    # A position beyond an end says no more than the end.
    shares = _shares(found.clamp(0, 1), shapes, storage=storage)
    return Trained(dict(zip(shapes, shares.tolist(), strict=True)), best, steps)


def _shares(relative: Tensor, shapes: Mapping[str, tuple[int, int]], *, storage: str) -> Tensor:
    """Return the share of its parameters that each linear keeps at a rank relative to its full one."""
    # A polynomial in the rank, which takes a tensor as well.
    numbers: Any = COSTS[storage].numbers
    stored = [
        numbers(m, n, part * min(m, n)) / (m * n)
        for part, (m, n) in zip(relative.unbind(), shapes.values(), strict=True)
    ]
    return torch.stack(stored).clamp(max=1)


@contextmanager
def _truncating(
    model: nn.Module, names: list[str], position: Callable[[int], Tensor], *, beta: float
) -> Iterator[None]:
    """Truncate the outputs of linears, one sequence at a time, in float32; biases are added afterwards."""

    def hook_of(index: int) -> Callable[..., Tensor]:
        def hook(linear: nn.Linear, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            bias = 0 if linear.bias is None else linear.bias.float()
            rows = output.flatten(0, -2).float() - bias
            if not torch.isfinite(rows).all():
                raise ValueError(
                    f"outputs of {names[index]} are not finite; set calibration.dtype to float32"
                )
            kept = truncate(rows, position(index), beta=beta) + bias
            return kept.to(output.dtype).view_as(output)

        return hook

    linears = [model.get_submodule(name) for name in names]
    handles = [linear.register_forward_hook(hook_of(index)) for index, linear in enumerate(linears)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
