"""The storage formats of a compressed linear: one class each, by the name that a checkpoint gives it.

What a format costs is in `aasvd.rank`, under the same names; everything else is in its class: the layout of
its tensors, how factors are packed into them, and the forward pass.
"""

from collections.abc import Mapping

from torch import nn

from aasvd.lowrank import CompressedLinear, LowRankLinear
from aasvd.pivoted import PivotedLinear
from aasvd.quantized import Int8LowRankLinear, Int8PivotedLinear, RemappedLinear

FORMATS: dict[str, type[CompressedLinear]] = {
    "factors": LowRankLinear,
    "pivoted": PivotedLinear,
    "remapped": RemappedLinear,
    "factors-int8": Int8LowRankLinear,
    "pivoted-int8": Int8PivotedLinear,
}


def format_name(storage: str, precision: str) -> str:
    """Return the format of `compression.storage` and `compression.precision` in params.yaml."""
    return f"{storage}-int8" if precision == "int8" else storage


def replace_linears(model: nn.Module, ranks: Mapping[str, int], *, storage: str) -> None:
    """Put an empty compressed layer in the place of each named linear of a model, in its type and device.

    Args:
        model: Changed in place.
        ranks: Rank of each linear to replace, by module name.
        storage: One of FORMATS.

    Raises:
        ValueError: If a name is not that of a linear of the model, its weight is tied to another module's,
            or a rank exceeds the sizes of its linear.
    """
    modules = dict(model.named_modules())
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, rank in ranks.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "does not have" if linear is None else f"has as {type(linear).__name__}, not as nn.Linear"
            raise ValueError(f"ranks name the module {name!r}, which {type(model).__name__} {found}")
        if f"{name}.weight" in tied or f"{name}.weight" in tied.values():
            raise ValueError(f"ranks name the module {name!r}, whose weight is tied to another module's")
        if rank > min(linear.in_features, linear.out_features):
            raise ValueError(
                f"rank {rank} of {name!r} exceeds the smaller side of its weight "
                f"{linear.out_features} x {linear.in_features}"
            )
        layer = FORMATS[storage](
            linear.in_features,
            linear.out_features,
            rank,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, layer)
