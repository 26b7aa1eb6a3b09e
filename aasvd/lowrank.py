"""A linear layer stored as two factors."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankLinear(nn.Module):
    """Linear layer of rank k: y = (x vᵀ) uᵀ + bias, with u (out, k) and v (k, in).

    It costs k (in + out) multiplications a token instead of in × out. The class is not an `nn.Linear`
    and holds no `weight`, so nothing that initialises or rewrites linears by type touches its factors.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the factors; their values are undefined until they are loaded.

        Raises:
            ValueError: If the rank is not in 1..min(in_features, out_features).
        """
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank {rank} of a linear from {in_features} to {out_features} features: "
                f"expected 1 to {min(in_features, out_features)}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.u = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_factors(cls, u: Tensor, v: Tensor, bias: Tensor | None = None) -> Self:
        """Wrap factors u (out, rank), v (rank, in) and bias (out,); the layer shares their memory.

        Raises:
            ValueError: If the shapes do not fit together, or the rank exceeds min(out, in).
        """
        if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0]:
            raise ValueError(
                f"factors of shapes {tuple(u.shape)} and {tuple(v.shape)}: "
                "expected (out, rank) and (rank, in)"
            )
        if bias is not None and bias.shape != u.shape[:1]:
            raise ValueError(f"bias of shape {tuple(bias.shape)}: expected ({u.shape[0]},)")
        layer = cls(v.shape[1], u.shape[0], u.shape[1], bias=bias is not None, device="meta", dtype=u.dtype)
        layer.u = nn.Parameter(u)
        layer.v = nn.Parameter(v)
        layer.bias = None if bias is None else nn.Parameter(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        return F.linear(F.linear(x, self.v), self.u, self.bias)

    def dense(self) -> Tensor:
        """Return the weight (out, in) that the factors stand for."""
        return self.u @ self.v

    def extra_repr(self) -> str:
        """Describe the layer inside its model's repr."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
