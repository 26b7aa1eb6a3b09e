"""Block refinement: fit a compressed block's factors, norms and biases to the original block's outputs.

AA-SVD (arXiv 2604.02119), section on block-level refinement; the recipe of its official code is the
variant `paper` of params.yaml. The weights that are trained are float32; the block itself computes in the
pipeline's float type, so that small updates are not lost and the loss is that of the weights as they will
be used.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aasvd.artifacts import Activations
from aasvd.device import one_thread_each
from aasvd.muon import Muon

WARM_UP = 0.1  # share of the steps with a rising learning rate
FLOOR = 0.1  # final learning rate, relative to its peak
_SMALLEST = 1e-12  # what a squared norm counts as at least, where it is divided by
_MOMENTUM = 0.9  # of Muon; its default of 0.95 looks back over half of a short refinement


class Recipe(NamedTuple):
    """How a block is refined; the keys of `refinement:` in params.yaml.

    Attributes:
        epochs: Passes over the calibration sequences.
        steps: Most steps taken, however many the epochs have; 0 for no limit. With more sequences than these
            steps visit, later epochs are left out: other text teaches more than the same text again.
        batch: Sequences per step.
        optimizer: `adamw` for all parameters (the paper's), or `muon`: Muon for factors and other matrices,
            AdamW for norms and biases.
        learning_rate: Peak learning rate; Muon's updates are scaled to the size of AdamW's.
        weight_decay: Decoupled weight decay.
        clip: Largest global gradient norm.
        shuffle: Whether each epoch visits the sequences in a new order.
        loss: `mse`, the mean squared error over all elements (the paper's), or `relative`, the mean over
            tokens of each token's squared error relative to its target's squared norm.
    """

    epochs: int
    steps: int
    batch: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    clip: float
    shuffle: bool
    loss: str

    def step_count(self, sequences: int) -> int:
        """Return how many steps the refinement takes, given so many sequences."""
        steps = self.epochs * math.ceil(sequences / self.batch)
        return min(steps, self.steps) if self.steps else steps

    def visits(self, sequences: int) -> int:
        """Return how many sequences those steps visit, each as often as it is visited."""
        epochs, rest = divmod(self.step_count(sequences), math.ceil(sequences / self.batch))
        return epochs * sequences + rest * self.batch


def schedule(step: int, steps: int) -> float:
    """Return the learning rate of a step relative to its peak: linear warm-up, then cosine to a floor."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def refine(
    block: nn.Module,
    *,
    inputs: Activations,
    targets: Activations,
    arguments: Mapping[str, Any],
    recipe: Recipe,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[int, int, float], None],
) -> list[float]:
    """Train all parameters of a block, in place, to map shifted inputs to original outputs.

    Paper: the loss is the mean squared error over all elements. Here: `recipe.loss` says.
    Paper: warm-up starts at exactly 0, so its first step does nothing. Here: it starts at the first step's
    share of the peak.

    Args:
        block: A compressed block on `device`, float32.
        inputs: Shifted inputs, (sequences, tokens, width).
        targets: The original block's outputs on the original inputs, same shape.
        arguments: The block's keyword arguments.
        recipe: Settings.
        generator: Source of the order of sequences, where they are shuffled.
        device: Where the block is.
        dtype: Float type of the forward and backward passes.
        on_step: Called with (step, steps, loss) after each step.

    Returns:
        Mean loss of each epoch, the last one's over the steps it had.

    Raises:
        ValueError: If the loss is not finite.
    """
    # Linears that are gone have parameters without numbers.
    masters = [parameter.requires_grad_(True) for parameter in block.parameters() if parameter.numel()]
    # At float32 the block is its own working copy.
    working_block = block if dtype == torch.float32 else copy.deepcopy(block).to(dtype)
    working = [parameter for parameter in working_block.parameters() if parameter.numel()]
    per_epoch = math.ceil(len(inputs) / recipe.batch)
    steps = recipe.step_count(len(inputs))
    trace: list[float] = []
    with one_thread_each(device) as each:
        optimizers = _optimizers(masters, recipe, each)
        for start in range(0, steps, per_epoch):
            order = _order(len(inputs), shuffle=recipe.shuffle, generator=generator)
            total, seen = 0.0, 0
            for step in range(start, min(start + per_epoch, steps)):
                place = (step - start) * recipe.batch
                sequences = order[place : place + recipe.batch]
                output = working_block(inputs.read(sequences).to(device, dtype), **arguments)
                loss = _loss(output.float(), targets.read(sequences).to(device).float(), recipe.loss)
                rate = recipe.learning_rate * schedule(step, steps)
                _descend(loss, working, masters, optimizers, rate=rate, clip=recipe.clip)
                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(
                        f"the refinement's loss became {value} at step {step + 1} of {steps}; "
                        "lower refinement.learning_rate"
                    )
                total += value * len(sequences)
                seen += len(sequences)
                on_step(step + 1, steps, value)
            trace.append(total / seen)
    block.requires_grad_(False)
    return trace


def _optimizers(
    masters: list[Tensor], recipe: Recipe, each: Callable[..., Iterable[None]]
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a recipe, which share its parameters among them; `each` maps over matrices.

    Muon moves a matrix equally in all its directions instead of equally in all its entries. With few
    calibration tokens that generalizes better (docs/refinement.md).
    """
    muon = [master for master in masters if recipe.optimizer == "muon" and master.ndim == 2]
    adamw = [master for master in masters if recipe.optimizer != "muon" or master.ndim != 2]
    common: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(Muon(muon, momentum=_MOMENTUM, each=each, **common))
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, fused=True, **common))
    return optimizers


def _loss(output: Tensor, target: Tensor, kind: str) -> Tensor:
    return F.mse_loss(output, target) if kind == "mse" else _relative(output, target).mean()


def _relative(output: Tensor, target: Tensor) -> Tensor:
    """Return each token's squared error relative to its target's squared norm.

    The first token of a sequence can be a thousand times as large as the others (an attention sink); by
    squared error alone a block would be fitted to little else.
    """
    return (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(_SMALLEST)


def _order(count: int, *, shuffle: bool, generator: torch.Generator) -> list[int]:
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    return [int(index) for index in order]


def _descend(
    loss: Tensor,
    working: list[nn.Parameter],
    masters: list[Tensor],
    optimizers: list[torch.optim.Optimizer],
    *,
    rate: float,
    clip: float,
) -> None:
    """Move the masters one step down the gradient of the loss, and the working copies after them."""
    loss.backward()  # type: ignore[no-untyped-call]
    for parameter, master in zip(working, masters, strict=True):
        if master is not parameter and parameter.grad is not None:
            master.grad, parameter.grad = parameter.grad.float(), None
    nn.utils.clip_grad_norm_(masters, clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter, master in zip(working, masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


class Distance:
    """How far outputs lie from the wanted ones, summed over batches of them."""

    def __init__(self) -> None:
        """Start with no outputs."""
        self._squared, self._relative, self._cosine = 0.0, 0.0, 0.0
        self._tokens, self._elements = 0, 0

    def add(self, found: Tensor, wanted: Tensor) -> None:
        """Add outputs, (..., width)."""
        found, wanted = found.float(), wanted.float()
        error = found - wanted
        squared, own, reference, common = (
            torch.linalg.vecdot(a, b).double()
            for a, b in ((error, error), (found, found), (wanted, wanted), (found, wanted))
        )
        self._squared += float(squared.sum())
        self._relative += float((squared / reference.clamp_min(_SMALLEST)).sum())
        self._cosine += float((1 - common / (own * reference).sqrt().clamp_min(_SMALLEST)).sum())
        self._tokens += found.shape[:-1].numel()
        self._elements += found.numel()

    def means(self) -> dict[str, float]:
        """Return the means over all outputs.

        `mse` is the mean over elements; `relative` the mean over tokens of the squared error relative to the
        wanted output's squared norm; `cosine` the mean over tokens of 1 - cosine similarity.
        """
        return {
            "mse": self._squared / self._elements,
            "relative": self._relative / self._tokens,
            "cosine": self._cosine / self._tokens,
        }


@torch.inference_mode()
def distortion(
    block: nn.Module,
    *,
    inputs: Activations,
    targets: Activations,
    arguments: Mapping[str, Any],
    batch: int,
    device: torch.device,
    first: int | None = None,
    on_output: Callable[[Tensor], None] = lambda _output: None,
) -> dict[str, float]:
    """Measure how far a block's outputs lie from the original block's, over all sequences or the first.

    Args:
        block: A block on `device`.
        inputs: Shifted inputs, (sequences, tokens, width).
        targets: The original block's outputs, same shape.
        arguments: The block's keyword arguments.
        batch: Sequences per forward pass.
        device: Where the block is.
        first: Number of sequences to measure on, from the first; all if None or if there are fewer.
        on_output: Called with each batch of outputs.

    Returns:
        The means of `Distance`.

    Raises:
        ValueError: If an output is not finite.
    """
    dtype = next(block.parameters()).dtype
    distance = Distance()
    pairs = zip(inputs.batches(batch, first=first), targets.batches(batch, first=first), strict=True)
    for shifted, original in pairs:
        output = block(shifted.to(device, dtype), **arguments)
        if not torch.isfinite(output).all():
            raise ValueError("the block's output is not finite")
        on_output(output)
        distance.add(output, original.to(device))
    return distance.means()
