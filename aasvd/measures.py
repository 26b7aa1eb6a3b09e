"""What allocations of ranks look at, measured block by block on the original model.

spectra             eigenvalues of W XXᵀ Wᵀ: what each direction of the outputs holds; no pass
influence           what each direction is worth to the loss, to second order; one backward pass
relative_gradients  ‖∂loss/∂W‖ / ‖W‖ (DipSVD); no pass, but gradients
profile             cosine of a block's input and output, singular values of its outputs; no pass
sensitivity         perplexity with one linear compressed (ASVD); passes through all later blocks
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aasvd.artifacts import Activations
from aasvd.covariance import Gram
from aasvd.objectives import Options, Statistics, solver
from aasvd.solve import prepare, spectrum

Groups = Mapping[tuple[str, ...], Statistics]


def spectra(weights: Mapping[str, Tensor], groups: Groups) -> dict[str, Tensor]:
    """Return the eigenvalues of W XXᵀ Wᵀ of every linear, descending, (min(m, n),) float64.

    Args:
        weights: Weight of every linear.
        groups: Statistics of every group of linears.
    """
    found: dict[str, Tensor] = {}
    for names, known in groups.items():
        tall = any(weights[name].shape[0] > weights[name].shape[1] for name in names)
        target = prepare(
            known.gram, cross_gram=None, blend=0.0, ridge=0.0, need_root=tall, token_count=known.token_count
        )
        found |= {name: spectrum(weights[name], target) for name in names}
    return found


def directions(
    weights: Mapping[str, Tensor], groups: Groups, *, objective: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return all directions of every linear, u (m, r) and v (r, n) with r = min(m, n), in float32.

    The solution of a smaller rank is the first of them. Of all, u v X = W X; where X has full rank, u v = W.

    Args:
        weights: Weight of every linear.
        groups: Statistics of every group of linears, gradients with them where the objective needs them.
        objective: Whose directions: `loss_aware` or `input_aware`.
    """
    found = {}
    for names, known in groups.items():
        solve = solver(objective, known, options=Options(blend=0.0, ridge=0.0))
        for name in names:
            factors = solve(name, weights[name], min(weights[name].shape)).factors
            found[name] = factors.u.float(), factors.v.float()
    return found


def influence(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what each direction of every linear is worth to the loss, in nats per token, (r,).

    Args:
        losses: By linear, what the loss gains where only the first k directions are kept, k = 0, ..., r − 1
            (`gradients.truncation_losses`). What all are worth together is the first; a direction's worth is
            what the loss falls by with it, after those before it, and may be negative.
    """
    return {name: some - functional.pad(some[1:], (0, 1)) for name, some in losses.items()}


def relative_gradients(weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ‖∂loss/∂W‖ / ‖W‖ of every linear, (1,) float64; 0 where W is.

    Args:
        weights: Weight of every linear.
        norms: `norm:<linear>`, the norm of its gradient.
    """
    return {
        name: (norms[f"norm:{name}"].double() / weight.double().norm()).nan_to_num(0, posinf=0).reshape(1)
        for name, weight in weights.items()
    }


def profile(inputs: Activations, outputs: Activations, *, device: torch.device) -> dict[str, Tensor]:
    """Return `cosine`, the mean over tokens of cos(input, output), and `singular` values of the outputs."""
    gram, total, tokens = Gram(outputs.shape[2], device=device), 0.0, 0
    for before, after in zip(inputs.batches(1), outputs.batches(1), strict=True):
        x, y = before.to(device).float(), after.to(device).float()
        gram.add(y)
        total += float(functional.cosine_similarity(x, y, dim=-1).sum(dtype=torch.float64))
        tokens += x.shape[0] * x.shape[1]
    values = torch.linalg.eigvalsh(gram.matrix()).flip(0).clamp_min(0)
    return {"cosine": torch.tensor([total / tokens], dtype=torch.float64), "singular": values.sqrt()}


def sensitivity(
    blocks: Sequence[Callable[[], nn.Module]],
    arguments: Sequence[Mapping[str, Any]],
    trials: Mapping[str, Sequence[Tensor]],
    *,
    hidden: Tensor,
    loss: Callable[[Tensor], float],
) -> dict[str, Tensor]:
    """Return the perplexity of the model with each linear of a block replaced in turn.

    Later blocks are loaded one at a time, and all trials go through each before the next is loaded.

    Args:
        blocks: Load the block and all that follow it.
        arguments: Their keyword arguments.
        trials: By linear, the weights that are tried, (m, n) each.
        hidden: Inputs of the block, (sequences, tokens, width).
        loss: The mean loss per token as a function of what leaves the last block.
    """
    names = [(name, number) for name, some in trials.items() for number in range(len(some))]
    # Not inference mode: the weights that are tried are ordinary tensors.
    with torch.no_grad():
        block = blocks[0]()
        states = []
        for name, number in names:
            module = block.get_submodule(name)
            assert isinstance(module, nn.Linear)
            dense = module.weight.data
            module.weight.data = trials[name][number].to(dense)
            states.append(_through(block, hidden, arguments[0]))
            module.weight.data = dense
        for load, own in zip(blocks[1:], arguments[1:], strict=True):
            block = load()
            for trial in range(len(states)):  # one at a time: all of them take tens of gigabytes
                states[trial] = _through(block, states[trial], own)
        values = {name: float(torch.tensor(loss(s)).exp()) for name, s in zip(names, states, strict=True)}
    return {
        name: torch.tensor([values[name, number] for number in range(len(some))], dtype=torch.float64)
        for name, some in trials.items()
    }


def _through(block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Run a block on sequences one at a time; what waits is kept on the host."""
    parameter = next(block.parameters())
    return torch.cat(
        [
            block(row.to(parameter.device, parameter.dtype), **arguments).cpu()
            for row in torch.split(hidden, 1)
        ]
    )
