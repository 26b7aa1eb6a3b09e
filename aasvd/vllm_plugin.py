"""Serve compressed checkpoints with vLLM: a plugin that registers the quantization method `aasvd`.

vLLM finds it through the entry point `vllm.general_plugins` of this package, and calls `register` in each of
its processes. Its fused linears (qkv_proj, gate_up_proj) get one stacked `v` and the `u` of each part.

Not run with vLLM itself: it could not be installed where this was written. The tests load weights and compare
outputs with stand-ins for the classes below, written after vLLM's sources as of 2026. Storage `factors` on
one device only: with tensor parallelism, or where only some parts of a fused linear are factored, there is
an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aasvd.checkpoint import METHOD, AasvdConfig
from aasvd.formats import MARKER

STORAGE = "factors"
# Names that vLLM's loaders give the parts of fused linears, in their order.
_SHARDS: tuple[Any, ...] = ("q", "k", "v")


def part_ranks(prefix: str, *, ranks: Mapping[str, int], packed: Mapping[str, Sequence[str]]) -> list[int]:
    """Return the rank of each part of one of vLLM's linears; none where it is dense.

    Args:
        prefix: The linear's name in the model, such as `model.layers.0.self_attn.qkv_proj`.
        ranks: Rank of each factored linear of the checkpoint.
        packed: Names of the parts of each fused linear (vLLM's `packed_modules_mapping`).

    Raises:
        ValueError: If only some of the parts are factored.
    """
    parent, _, leaf = prefix.rpartition(".")
    # A model may have the linear already fused in its checkpoint.
    parts = [leaf] if prefix in ranks else packed.get(leaf, [leaf])
    names = [f"{parent}.{part}" if parent else part for part in parts]
    found = [ranks[name] for name in names if name in ranks]
    if found and len(found) < len(names):
        dense = next(name for name in names if name not in ranks)
        raise ValueError(
            f"{prefix} fuses factored linears with {dense}, which is dense; vLLM can serve such a checkpoint "
            "only merged: python -m aasvd.export"
        )
    return found


class Factors:
    """The weights of one of vLLM's linears: a stacked `v` (Σ ranks, in) and a flat `u` with every part's own.

    `u` is flat since its parts (out, rank) share neither side.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        """Remember the rank of each part."""
        self._ranks = list(ranks)
        self._outputs: list[int] = []
        self._missing: set[tuple[str, int]] = set()

    def create(self, layer: nn.Module, *, inputs: int, outputs: Sequence[int], dtype: torch.dtype) -> None:
        """Give a layer its empty parameters, each with the loader that vLLM will call.

        Raises:
            ValueError: If the layer has not as many parts as there are ranks.
        """
        if len(outputs) != len(self._ranks):
            raise ValueError(
                f"a linear of vLLM has {len(outputs)} parts but the checkpoint ranks for {len(self._ranks)}"
            )
        self._outputs = list(outputs)
        sizes = {
            "v": (sum(self._ranks), inputs),
            "u": (sum(rank * rows for rank, rows in zip(self._ranks, outputs, strict=True)),),
        }
        for name, size in sizes.items():
            parameter = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
            # vLLM calls param.weight_loader(param, tensor[, part]).
            setattr(parameter, "weight_loader", self._loader(layer, name))  # noqa: B010 (nn.Parameter has none)
            layer.register_parameter(name, parameter)
            self._missing |= {(name, index) for index in range(len(outputs))}
        # vLLM's loaders look up a parameter for every tensor of the checkpoint.
        marker = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        setattr(marker, "weight_loader", _load_marker)  # noqa: B010
        layer.register_parameter(MARKER, marker)

    def _loader(self, layer: nn.Module, name: str) -> Any:
        def load(parameter: nn.Parameter, stored: Tensor, part: Any = None) -> None:
            index = 0 if part is None else _SHARDS.index(part) if part in _SHARDS else int(part)
            if index >= len(self._ranks) or (part is None and len(self._ranks) > 1):
                raise ValueError(f"{name} of shape {tuple(stored.shape)}: there is no part {part!r} to load")
            target = (self._views(parameter) if name == "u" else list(torch.split(parameter, self._ranks)))[
                index
            ]
            if target.shape != stored.shape:
                raise ValueError(
                    f"{name} of part {index} has shape {tuple(stored.shape)}: expected {tuple(target.shape)}"
                )
            target.data.copy_(stored)
            self._missing.discard((name, index))

        return load

    def _views(self, u: Tensor) -> list[Tensor]:
        sizes = [rank * rows for rank, rows in zip(self._ranks, self._outputs, strict=True)]
        parts = zip(torch.split(u, sizes), self._outputs, self._ranks, strict=True)
        return [flat.view(rows, rank) for flat, rows, rank in parts]

    def check(self) -> None:
        """Raise ValueError unless every part was loaded."""
        if self._missing:
            name, index = min(self._missing)
            raise ValueError(f"the checkpoint holds no {name} for part {index} of a linear")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map x (..., in) to the outputs of all parts (..., Σ out)."""
        latents = torch.split(F.linear(x, layer.v), self._ranks, dim=-1)
        outputs = [F.linear(part, u) for part, u in zip(latents, self._views(layer.u), strict=True)]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias


def _load_marker(_parameter: nn.Parameter, stored: Tensor, _part: Any = None) -> None:
    """Take a factored linear's empty weight, and no other."""
    if stored.shape != (0,):
        raise ValueError(
            f"the checkpoint holds a weight of shape {tuple(stored.shape)} for a factored linear: "
            "expected an empty one"
        )


def register() -> None:
    """Register the quantization method with vLLM; calling it again changes nothing."""
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if METHOD in QUANTIZATION_METHODS:
        return

    class AasvdLinearMethod(LinearMethodBase):
        """How vLLM makes, loads and applies one factored linear."""

        def __init__(self, ranks: Sequence[int]) -> None:
            self._factors = Factors(ranks)

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **extra_weight_attrs: object,
        ) -> None:
            if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
                raise ValueError("the aasvd plugin does not support tensor parallelism: use one device")
            self._factors.create(layer, inputs=input_size, outputs=output_partition_sizes, dtype=params_dtype)

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            self._factors.check()

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return self._factors.apply(layer, x, bias)

    @register_quantization_config(METHOD)
    class AasvdVllmConfig(QuantizationConfig):
        """vLLM's view of a checkpoint's quantization_config."""

        def __init__(self, config: AasvdConfig) -> None:
            super().__init__()
            self.ranks = config.ranks

        def get_name(self) -> str:
            return METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0  # no kernels of its own

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []  # everything is in config.json

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "AasvdVllmConfig":
            checked = AasvdConfig(**config)
            if checked.storage != STORAGE:
                raise ValueError(
                    f"quantization_config.storage is {checked.storage!r}: the vLLM plugin reads {STORAGE!r}; "
                    "merge the checkpoint with python -m aasvd.export"
                )
            if checked.kept:
                raise ValueError(
                    "the vLLM plugin reads no pruned linears (quantization_config.kept); "
                    "merge the checkpoint with python -m aasvd.export"
                )
            return cls(checked)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if not isinstance(layer, LinearBase):
                return None
            ranks = part_ranks(prefix, ranks=self.ranks, packed=self.packed_modules_mapping)
            return AasvdLinearMethod(ranks) if ranks else UnquantizedLinearMethod()
