"""Muon, which trains the matrices of a block: momentum, made equally large in all its directions.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with polynomials chosen as in Polar Express
(Amsel et al. 2025, arXiv 2505.16932): four of them do what takes five of Jordan's. torch.optim.Muon takes one
matrix after the other; these products are too small for threads to share, so every thread takes a matrix.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from aasvd.device import compute_dtype

# Rounding may lift a singular value above what the next polynomial was made for, behind which it grows.
_SAFETY = 1.01
# a x + b x³ + c x⁵, one after the other: of all such polynomials, each brings the singular values that those
# before it left nearest to 1. What lies between 0.005 and 1 ends between 0.92 and 1.08, but for _SAFETY.
_POLYNOMIALS = tuple(
    (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)
    for a, b, c in (
        (8.2987, -24.4305, 18.0903),
        (3.9152, -2.9211, 0.5592),
        (3.1746, -2.3804, 0.4978),
        (2.1895, -1.5672, 0.4079),
    )
)
# Size of AdamW's updates (root mean square), which Muon's are scaled to: Liu et al. 2025, arXiv 2502.16982.
_ADAMW_SIZE = 0.2


class Muon(torch.optim.Optimizer):
    """Nesterov's momentum, orthogonalized and scaled to the size of AdamW's updates, with decoupled decay."""

    def __init__(
        self,
        matrices: Iterable[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        each: Callable[..., Iterable[None]] = map,
    ) -> None:
        """Start without momentum.

        Args:
            matrices: What to train, each (rows, columns).
            lr: Learning rate.
            momentum: Share of the momentum that stays in each step.
            weight_decay: Share of the weights that a step takes away, relative to the learning rate.
            each: What maps a function over matrices, like `aasvd.device.one_thread_each`.
        """
        # The largest first, so that no thread is left with one when the others are done.
        ordered = sorted(matrices, key=Tensor.numel, reverse=True)
        super().__init__(ordered, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._each = each

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all matrices that have a gradient."""
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            for _ in self._each(functools.partial(self._move, group), matrices):
                pass

    @torch.no_grad()  # here, since it holds for a thread
    def _move(self, group: Mapping[str, float], matrix: Tensor) -> None:
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalized(gradient.lerp(momentum, group["momentum"]))
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update, alpha=-group["lr"] * _ADAMW_SIZE * math.sqrt(max(matrix.shape)))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors and singular values near 1, in what is fast here.

    bfloat16 is precise enough, but a CPU without units for it multiplies it hundreds of times slower.
    Those below 0.005 of the matrix's norm stay smaller; 0 stays 0.

    Args:
        matrix: (rows, columns).
    """
    tall = matrix.shape[0] > matrix.shape[1]
    # Near 1 before anything is squared: the norm of numbers below 1e-23 is 0 in float32.
    x = matrix / matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)
    x = (x.T if tall else x).to(compute_dtype("auto", matrix.device))
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    for a, b, c in _POLYNOMIALS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
