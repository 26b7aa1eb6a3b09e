"""What allocations of ranks look at, measured block by block on the original model.

spectra             eigenvalues of W XXᵀ Wᵀ: what each direction of the outputs holds; no pass
influence           what dropping each direction costs the loss, to second order; no pass, but gradients
relative_gradients  ‖∂loss/∂W‖ / ‖W‖ (DipSVD); no pass, but gradients
profile             cosine of a block's input and output, singular values of its outputs; no pass
sensitivity         perplexity with one linear compressed (ASVD); passes through all later blocks
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aasvd.artifacts import Activations
from aasvd.covariance import Gram
from aasvd.objectives import Statistics, loss_metric
from aasvd.solve import Target, factorize, prepare, spectrum

Groups = Mapping[tuple[str, ...], Statistics]


def spectra(weights: Mapping[str, Tensor], groups: Groups) -> dict[str, Tensor]:
    """Return the eigenvalues of W XXᵀ Wᵀ of every linear, descending, (min(m, n),) float64.

    Args:
        weights: Weight of every linear.
        groups: Statistics of every group of linears.
    """
    return {
        name: spectrum(weights[name], target)
        for names, known in groups.items()
        for target in [_target(known, [weights[name] for name in names])]
        for name in names
    }


def influence(weights: Mapping[str, Tensor], groups: Groups, *, objective: str) -> dict[str, Tensor]:
    """Return what dropping each direction of every linear costs, in nats per token, (min(m, n),).

    To second order an error e = (W − W') x of a linear's output changes the loss by (gᵀe)² / 2 on average,
    g the loss's gradient there (Fisher's approximation of the Hessian). With g and x taken as independent
    (K-FAC, Martens & Grosse 2015), direction u_i of the solution costs λ_i u_iᵀ G u_i / 2, with λ_i what
    it holds of W XXᵀ Wᵀ and G = E[g gᵀ], both per token. Costs of several directions and linears add up.
    The directions of `loss_aware` are orthogonal in G, and its eigenvalues are these costs.

    Args:
        weights: Weight of every linear.
        groups: Statistics of every group of linears, gradients with them.
        objective: Whose directions are dropped: `loss_aware`'s own, else those of `input_aware`.
    """
    found = {}
    for names, known in groups.items():
        target = _target(known, [weights[name] for name in names])
        for name in names:
            weight, outer = weights[name].to(torch.float64), known.outer[name]
            if objective == "loss_aware":
                root, scale = loss_metric(outer)
                costs = scale * spectrum(root.mT @ weight, target)
            else:
                factors = factorize(weight, target, rank=min(weight.shape))
                # What direction i adds to W' X, as u_i v_i X: in the metric of G.
                inner = ((factors.v @ known.gram) * factors.v).sum(1)
                costs = (((outer @ factors.u) * factors.u).sum(0) * inner).clamp_min(0)
            found[name] = costs / (2 * known.token_count)
    return found


def _target(known: Statistics, weights: Sequence[Tensor]) -> Target:
    """Prepare the input-aware problem for the linears of one group."""
    tall = any(weight.shape[0] > weight.shape[1] for weight in weights)
    return prepare(
        known.gram, cross_gram=None, blend=0.0, ridge=0.0, need_root=tall, token_count=known.token_count
    )


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
        total += float(F.cosine_similarity(x, y, dim=-1).sum(dtype=torch.float64))
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
