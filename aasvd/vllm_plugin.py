"""Serve compressed checkpoints with vLLM: a plugin that registers the quantization method `aasvd`.

vLLM finds it through the entry point `vllm.general_plugins` of this package, and calls `register` in each of
its processes. The parts of its fused linears (qkv_proj, gate_up_proj) may be dense or have a rank each; the
first matrices of those with a rank are stacked. One device only: with tensor parallelism there is an error.

Written after vLLM's sources up to 0.33. vLLM never generated with it where it was written; docs/inference.md
says what was tried.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aasvd.checkpoint import METHOD, AasvdConfig
from aasvd.formats import FORMATS, MARKER
from aasvd.lowrank import product
from aasvd.pivoted import outputs

# What makes a part's outputs of its latents, by storage; called with the latents, what is stored beside the
# first matrix, and the bias.
_UP: dict[str, Callable[..., Tensor]] = {"factors": product, "pivoted": outputs}
# Names that vLLM's loaders give the parts of fused linears, in their order.
_SHARDS: tuple[Any, ...] = ("q", "k", "v")


def part_ranks(
    prefix: str, *, ranks: Mapping[str, int], packed: Mapping[str, Sequence[str]]
) -> list[int | None]:
    """Return the rank of each part of one of vLLM's linears, None for dense ones.

    Args:
        prefix: The linear's name in the model, such as `model.layers.0.self_attn.qkv_proj`.
        ranks: Rank of each factored linear of the checkpoint.
        packed: Names of the parts of each fused linear (vLLM's `packed_modules_mapping`).
    """
    parent, _, leaf = prefix.rpartition(".")
    # A model may have the linear already fused in its checkpoint.
    parts = [leaf] if prefix in ranks else packed.get(leaf, [leaf])
    return [ranks.get(f"{parent}.{part}" if parent else part) for part in parts]


class FusedLinear:
    """The weights of one of vLLM's linears, at least one part of which has a rank.

    What the checkpoint stores of the parts under one name (`u`, `rows`, `weight`) is one parameter of that
    name, part after part: by rows where it multiplies x, else flat, since parts share neither side.
    """

    def __init__(self, storage: str, ranks: Sequence[int | None]) -> None:
        """Remember the storage, one that the plugin reads, and the rank of each part."""
        self._format = FORMATS[storage]
        assert self._format.DOWN is not None
        self._down = self._format.DOWN
        self._up = _UP[storage]
        self._ranks = list(ranks)
        self._outputs: list[int] = []
        # By the tensor's name, its shape in each part that has it.
        self._shapes: dict[str, dict[int, torch.Size]] = {}
        self._missing: set[tuple[str, int]] = set()

    def create(self, layer: nn.Module, *, inputs: int, outputs: Sequence[int], dtype: torch.dtype) -> None:
        """Give a layer its empty parameters, each with the loader that vLLM will call.

        Raises:
            ValueError: If the layer has not as many parts as there are ranks, or a rank exceeds a side.
        """
        # Fused in the checkpoint already, it has one rank.
        self._outputs = [sum(outputs)] if len(self._ranks) == 1 else list(outputs)
        if len(self._outputs) != len(self._ranks):
            raise ValueError(
                f"a linear of vLLM has {len(outputs)} parts but the checkpoint has {len(self._ranks)} for it"
            )
        types: dict[str, torch.dtype] = {}
        for index, (rank, rows) in enumerate(zip(self._ranks, self._outputs, strict=True)):
            part = (
                nn.Linear(inputs, rows, bias=False, device="meta", dtype=dtype)
                if rank is None
                else self._format(inputs, rows, rank, bias=False, device="meta", dtype=dtype)
            )
            # vLLM's loaders look up a parameter for every tensor, also for a factored part's empty weight.
            empty = {} if rank is None else {MARKER: torch.empty(0, dtype=dtype)}
            for name, tensor in {**part.state_dict(), **empty}.items():
                self._shapes.setdefault(name, {})[index] = tensor.shape
                types[name] = tensor.dtype
        for name, shapes in self._shapes.items():
            numbers = sum(shape.numel() for shape in shapes.values())
            size = (numbers // inputs, inputs) if name in (self._down, MARKER) else (numbers,)
            # Integers too are parameters: vLLM's loaders look for no buffers.
            parameter = nn.Parameter(torch.empty(size, dtype=types[name]), requires_grad=False)
            # vLLM calls param.weight_loader(param, tensor[, part]).
            setattr(parameter, "weight_loader", self._loader(name))  # noqa: B010 (nn.Parameter has none)
            layer.register_parameter(name, parameter)
            # A checkpoint of format version 1 has no empty weights.
            self._missing |= {(name, index) for index, shape in shapes.items() if shape.numel()}

    def _loader(self, name: str) -> Callable[..., None]:
        def load(parameter: nn.Parameter, stored: Tensor, part: Any = None) -> None:
            alone = part is None and len(self._ranks) == 1
            index = 0 if alone else _SHARDS.index(part) if part in _SHARDS else part
            if index not in self._shapes[name]:
                raise ValueError(f"{name} of shape {tuple(stored.shape)}: there is no part {part!r} to load")
            target = self._pieces(name, parameter.data)[index]
            if target.shape != stored.shape or target.is_floating_point() != stored.is_floating_point():
                raise ValueError(
                    f"{name} of part {index} has shape {tuple(stored.shape)} and type {stored.dtype}: "
                    f"expected {tuple(target.shape)}, {target.dtype}"
                )
            if problem := self._format.problem(name, stored):
                raise ValueError(f"{name} of part {index} {problem}")
            target.copy_(stored)
            self._missing.discard((name, index))

        return load

    def _pieces(self, name: str, parameter: Tensor) -> dict[int, Tensor]:
        """Return each part's own tensor, by the part's index: views of a parameter."""
        shapes = self._shapes[name]
        flat = torch.split(parameter.view(-1), [shape.numel() for shape in shapes.values()])
        return {index: piece.view(shapes[index]) for index, piece in zip(shapes, flat, strict=True)}

    def check(self) -> None:
        """Raise ValueError unless every part was loaded."""
        if self._missing:
            name, index = min(self._missing)
            raise ValueError(f"the checkpoint holds no {name} for part {index} of a linear")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map x (..., in) to the outputs of all parts (..., Σ out)."""
        ranks = [rank for rank in self._ranks if rank is not None]
        latents = iter(torch.split(product(x, getattr(layer, self._down)), ranks, dim=-1))
        names = [name for name in self._shapes if name not in (self._down, MARKER)]
        others = [self._pieces(name, getattr(layer, name)) for name in names]
        dense = self._pieces(MARKER, getattr(layer, MARKER))
        biases = [None] * len(self._ranks) if bias is None else torch.split(bias, self._outputs)
        y = []
        for index, (rank, own) in enumerate(zip(self._ranks, biases, strict=True)):
            if rank is None:
                y.append(product(x, dense[index], own))
            else:
                y.append(self._up(next(latents), *(pieces[index] for pieces in others), own))
        return y[0] if len(y) == 1 else torch.cat(y, dim=-1)


def register() -> None:
    """Register the quantization method with vLLM; calling it again changes nothing."""
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if METHOD in QUANTIZATION_METHODS:
        return

    class AasvdLinearMethod(LinearMethodBase):
        """How vLLM makes, loads and applies one linear with a rank."""

        def __init__(self, linear: FusedLinear) -> None:
            self._linear = linear

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
            self._linear.create(layer, inputs=input_size, outputs=output_partition_sizes, dtype=params_dtype)

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            self._linear.check()

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return self._linear.apply(layer, x, bias)

    @register_quantization_config(METHOD)
    class AasvdVllmConfig(QuantizationConfig):
        """vLLM's view of a checkpoint's quantization_config."""

        def __init__(self, config: AasvdConfig) -> None:
            super().__init__()
            self.storage = config.storage
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
            found = "pruned (kept)" if checked.kept else checked.storage
            if found not in _UP:
                raise ValueError(
                    f"quantization_config says that linears are stored as {found}: the vLLM plugin reads "
                    f"{' and '.join(_UP)}, in a float type; merge the checkpoint to a dense one with "
                    "python -m aasvd.export, or compress with one of these as compression.storage and "
                    "compression.precision: model or bfloat16"
                )
            return cls(checked)

        def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
            # Some of vLLM's models have other module names than transformers.
            self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if not isinstance(layer, LinearBase):
                return None
            ranks = part_ranks(prefix, ranks=self.ranks, packed=self.packed_modules_mapping)
            if all(rank is None for rank in ranks):
                return UnquantizedLinearMethod()
            return AasvdLinearMethod(FusedLinear(self.storage, ranks))
