"""A linear layer that keeps some rows and columns of its weight, dense, and nothing of the others.

Outputs of rows that are gone are zero and inputs of columns that are gone are not read, so model code around
the layer stays what it is: whole heads, neurons, attention or MLP branches and blocks can go, and the result
is exactly that of a dense weight with zeros in these places. What is saved is numbers, and the products with
them; the shapes in between, and the cache of keys and values, stay those of the dense model.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class PrunedLinear(nn.Module):
    """Linear layer with weight W[kept_rows, kept_columns] = kept, and zeros elsewhere.

    Attributes:
        OVERHEAD: Stored tensors that are no numbers of the matrix.
        kept: (rows kept, columns kept); both are 0 for a layer that is gone.
        kept_rows: Their places among all rows, ascending.
        kept_columns: Their places among all columns, ascending.
    """

    OVERHEAD: ClassVar[tuple[str, ...]] = ("kept_rows", "kept_columns")

    kept: nn.Parameter
    kept_rows: Tensor
    kept_columns: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: Sequence[int],
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the tensors; their values are undefined until they are loaded.

        Args:
            in_features: Columns of the dense weight.
            out_features: Rows of the dense weight.
            size: Rows and columns that are kept.
            bias: Whether there is a bias, of all outputs.
            device: Where the tensors go.
            dtype: Float type.

        Raises:
            ValueError: If there are more rows or columns to keep than there are, or only one of both is 0.
        """
        super().__init__()
        rows, columns = size
        if not self.fits(in_features, out_features, size):
            raise ValueError(
                f"{rows} rows and {columns} columns of a linear from {in_features} to {out_features}: "
                f"expected 1 to {out_features} and 1 to {in_features}, or 0 and 0"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.kept = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
        for name, count in zip(self.OVERHEAD, (rows, columns), strict=True):
            self.register_buffer(name, torch.empty(count, device=device, dtype=torch.int32))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @staticmethod
    def fits(in_features: int, out_features: int, size: Sequence[int]) -> bool:
        """Tell whether that many rows and columns can stay of a linear: both some, or both none."""
        rows, columns = size
        return 0 <= rows <= out_features and 0 <= columns <= in_features and (rows == 0) == (columns == 0)

    def problem(self, name: str, value: Tensor) -> str | None:
        """Say what is wrong with stored places of rows or columns, if anything is."""
        end = self.out_features if name == "kept_rows" else self.in_features
        ordered = bool((value[1:] > value[:-1]).all())
        inside = not len(value) or bool(value[0] >= 0 and value[-1] < end)
        return None if ordered and inside else f"is not a list of ascending numbers from 0 to {end - 1}"

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        rows, columns = self.kept.shape
        if columns < self.in_features:
            x = x.index_select(-1, self.kept_columns)
        y = functional.linear(x, self.kept)
        if rows < self.out_features:
            y = y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.kept_rows.long(), y)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self) -> Tensor:
        """Return the weight (out, in) that the layer stands for."""
        weight = self.kept.new_zeros(self.out_features, self.in_features)
        weight[self.kept_rows.long()[:, None], self.kept_columns.long()] = self.kept
        return weight

    def extra_repr(self) -> str:
        """Describe the layer inside its model's repr."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"kept={tuple(self.kept.shape)}, bias={self.bias is not None}"
        )


def prune(linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> PrunedLinear:
    """Return the layer that keeps some rows and columns of a linear, on its device and in its type.

    The bias of a row that goes, goes too: it becomes zero.

    Args:
        linear: A dense linear.
        rows: Which rows stay, (out,) bool; all by default.
        columns: Which columns stay, (in,) bool; all by default.
    """
    weight = linear.weight.detach()
    keep = [
        torch.ones(count, dtype=torch.bool, device=weight.device) if some is None else some.to(weight.device)
        for some, count in zip((rows, columns), weight.shape, strict=True)
    ]
    if not all(some.any() for some in keep):
        keep = [torch.zeros_like(some) for some in keep]
    places = [some.nonzero()[:, 0] for some in keep]
    layer = PrunedLinear(
        linear.in_features,
        linear.out_features,
        [len(some) for some in places],
        bias=linear.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    layer.kept = nn.Parameter(weight[places[0]][:, places[1]], requires_grad=False)
    layer.kept_rows, layer.kept_columns = (some.to(torch.int32) for some in places)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach() * keep[0], requires_grad=False)
    return layer


def removed(linear: nn.Linear) -> PrunedLinear:
    """Return the layer that nothing of a linear is left in: its output is zero."""
    return prune(linear, rows=torch.zeros(linear.out_features, dtype=torch.bool))
