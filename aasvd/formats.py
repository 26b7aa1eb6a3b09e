"""The storage formats of a compressed linear: one class each, by the name that a checkpoint gives it.

What a format costs is in `aasvd.rank`, under the same names; everything else is in its class: the layout of
its tensors, how factors are packed into them, and the forward pass. Linears of which rows and columns were
left out are stored in one way only (`aasvd.pruned`), whatever the format of the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from aasvd.lowrank import CompressedLinear, LowRankLinear
from aasvd.pivoted import PivotedLinear
from aasvd.pruned import PrunedLinear
from aasvd.quantized import Int8LowRankLinear, Int8PivotedLinear, RemappedLinear

FORMATS: dict[str, type[CompressedLinear]] = {
    "factors": LowRankLinear,
    "pivoted": PivotedLinear,
    "remapped": RemappedLinear,
    "factors-int8": Int8LowRankLinear,
    "pivoted-int8": Int8PivotedLinear,
}

# An empty tensor beside those of each compressed linear in a checkpoint, named like a dense weight: who does
# not know the format, or was told by a changed config.json that the model is dense, finds a weight of
# the wrong shape there and stops, instead of only noting that one is absent and starting it at random.
MARKER = "weight"


def format_name(storage: str, precision: str) -> str:
    """Return the format of `compression.storage` and `compression.precision` in params.yaml."""
    if storage == "pruned":
        return "factors"  # of no linear: nothing is factorized
    return f"{storage}-int8" if precision == "int8" else storage


def replace_linears(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    storage: str,
    kept: Mapping[str, Sequence[int]] | None = None,
    marked: bool = False,
) -> None:
    """Put an empty compressed layer in the place of each named linear of a model, in its type and device.

    Args:
        model: Changed in place.
        ranks: Rank of each linear to factorize, by module name.
        storage: One of FORMATS.
        kept: Rows and columns that stay of each linear to prune, by module name.
        marked: Give each layer its MARKER, as checkpoints have it.

    Raises:
        ValueError: If a name is not that of a linear of the model, its weight is tied to another module's,
            or a rank or what is kept exceeds the sizes of its linear.
    """
    modules = dict(model.named_modules())
    tied = getattr(model, "all_tied_weights_keys", {})
    sizes: dict[str, int | Sequence[int]] = {**ranks, **(kept or {})}
    for name, size in sizes.items():
        field = "ranks" if name in ranks else "kept"
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "does not have" if linear is None else f"has as {type(linear).__name__}, not as nn.Linear"
            raise ValueError(f"{field} names the module {name!r}, which {type(model).__name__} {found}")
        if f"{name}.weight" in tied or f"{name}.weight" in tied.values():
            raise ValueError(f"{field} names the module {name!r}, whose weight is tied to another module's")
        if isinstance(size, int) and size > min(linear.in_features, linear.out_features):
            raise ValueError(
                f"rank {size} of {name!r} exceeds the smaller side of its weight "
                f"{linear.out_features} x {linear.in_features}"
            )
        if not isinstance(size, int) and not PrunedLinear.fits(linear.in_features, linear.out_features, size):
            raise ValueError(
                f"{size[0]} rows and {size[1]} columns of {name!r} cannot be kept of its weight "
                f"{linear.out_features} x {linear.in_features}"
            )
        common: dict[str, Any] = {
            "bias": linear.bias is not None,
            "device": linear.weight.device,
            "dtype": linear.weight.dtype,
        }
        layer = (
            FORMATS[storage](linear.in_features, linear.out_features, size, **common)
            if isinstance(size, int)
            else PrunedLinear(linear.in_features, linear.out_features, size, **common)
        )
        if marked:
            layer.register_buffer(
                MARKER, torch.empty(0, device=linear.weight.device, dtype=linear.weight.dtype)
            )
            layer.register_load_state_dict_pre_hook(_with_marker)  # type: ignore[no-untyped-call]
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, layer)


def _with_marker(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the marker to a state without it: savers may take all empty tensors for one shared tensor."""
    state.setdefault(f"{prefix}{MARKER}", getattr(layer, MARKER))
