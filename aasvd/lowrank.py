"""Linear layers stored in less than a full matrix, and the plainest of them: two factors."""

from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shape, and the type of integers or None for the model's float type.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


class SharedInput(Protocol):
    """What computes the latents of several layers that read the same tensor; see `aasvd.fusion`."""

    def latents(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the latents (..., rank) of one of the layers for x (..., in)."""
        ...


def is_vector(x: Tensor, weight: Tensor) -> bool:
    """Tell whether x holds one token on a CPU that a matrix-vector product with a weight can take.

    F.linear repacks the weight for a matrix product; a matrix-vector product reads it once. Compilers see
    F.linear only, and autocast knows no other.
    """
    return (
        # First: a compiler may not know how many tokens there are.
        not torch.compiler.is_compiling()
        and x.numel() == x.shape[-1]
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias for x (..., in) and weight (out, in): `F.linear`, but fast for one token."""
    if is_vector(x, weight):
        y = torch.mv(weight, x.view(-1))
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class CompressedLinear(nn.Module):
    """What every storage of a low-rank linear layer has in common.

    The class is not an `nn.Linear` and holds no `weight` but a checkpoint's empty one (`formats.MARKER`), so
    nothing that initialises or rewrites linears by type touches its tensors.

    Attributes:
        OVERHEAD: Stored tensors that are no numbers of the matrix: they cost bytes, but are no parameters.
        DOWN: Name of the parameter (rank, in) that `down` multiplies with; None where it is made from codes.
        shared: Set by `aasvd.fusion` where other layers read the same input.
    """

    OVERHEAD: ClassVar[tuple[str, ...]] = ()
    DOWN: ClassVar[str | None] = None
    bias: nn.Parameter | None
    shared: SharedInput | None = None

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
        """Allocate the tensors; their values are undefined until they are loaded.

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
        for name, (shape, integers) in self.layout(in_features, out_features, rank).items():
            if integers is None:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            else:
                self.register_buffer(name, torch.empty(shape, device=device, dtype=integers))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @staticmethod
    def layout(in_features: int, out_features: int, rank: int) -> Layout:
        """Return the shape of each stored tensor but the bias, and its type if it holds integers."""
        raise NotImplementedError

    @staticmethod
    def pack(u: Tensor, v: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the stored tensors but the bias of factors u (out, rank), v (rank, in) in a float type."""
        raise NotImplementedError

    @staticmethod
    def problem(name: str, value: Tensor) -> str | None:
        """Say what is wrong with a stored tensor of OVERHEAD, if it holds what no packing gives."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        return self.up(self.down(x))

    def down(self, x: Tensor) -> Tensor:
        """Map x (..., in) to its latents (..., rank), from which `up` makes the output."""
        raise NotImplementedError

    def up(self, latents: Tensor) -> Tensor:
        """Map latents (..., rank) to (..., out)."""
        raise NotImplementedError

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return u (out, rank) and v (rank, in), the product of which is the layer's weight.

        Args:
            dtype: Float type to expand codes to; parameters come in their own.
        """
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the weight (out, in) that the layer stands for, multiplied out in float32 at least."""
        u, v = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.factors())
        return u @ v

    def extra_repr(self) -> str:
        """Describe the layer inside its model's repr."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class LowRankLinear(CompressedLinear):
    """Linear layer of rank k: y = (x vᵀ) uᵀ + bias, with u (out, k) and v (k, in).

    It costs k (in + out) multiplications a token instead of in × out.
    """

    DOWN: ClassVar[str | None] = "v"
    u: nn.Parameter
    v: nn.Parameter

    @staticmethod
    def layout(in_features: int, out_features: int, rank: int) -> Layout:
        """Return the shapes of the two factors."""
        return {"u": ((out_features, rank), None), "v": ((rank, in_features), None)}

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

    def down(self, x: Tensor) -> Tensor:
        """Map x (..., in) to its latents (..., rank)."""
        return product(x, self.v) if self.shared is None else self.shared.latents(self, x)

    def up(self, latents: Tensor) -> Tensor:
        """Map latents (..., rank) to (..., out)."""
        return product(latents, self.u, self.bias)

    @staticmethod
    def pack(u: Tensor, v: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the factors themselves."""
        return {"u": u.to(dtype), "v": v.to(dtype)}

    def factors(self, _dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the factors themselves."""
        return self.u, self.v
