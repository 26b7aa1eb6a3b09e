"""Stand-ins for the classes of vLLM, not among the requirements, that a quantization plugin meets.

Written after vLLM 0.33: the same names, arguments, order of calls and ways to load weights; neither kernels
nor communication. Sources there: model_executor/layers/linear.py, model_executor/layers/quantization/,
model_executor/models/utils.py and llama.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

QUANTIZATION_METHODS = ["fp8", "gguf"]
CUSTOM: dict[str, Any] = {}
# Number of devices that a linear is split over.
world_size = 1


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None: ...
    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
    ) -> None:
        weight = nn.Parameter(
            torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        )
        weight.weight_loader = weight_loader
        layer.register_parameter("weight", weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...
    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...
    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...
    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...
    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Any: ...
    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None: ...
    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        return


def register_quantization_config(quantization: str) -> Callable[[type], type]:
    def wrapper(cls: type) -> type:
        assert quantization not in QUANTIZATION_METHODS, "older versions of vLLM raise here"
        assert issubclass(cls, QuantizationConfig)
        QUANTIZATION_METHODS.append(quantization)
        CUSTOM[quantization] = cls
        return cls

    return wrapper


class LinearBase(nn.Module):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool,
        params_dtype: torch.dtype | None,
        quant_config: QuantizationConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.params_dtype = params_dtype or torch.get_default_dtype()
        method = quant_config.get_quant_method(self, prefix=prefix)
        if method is None:
            raise ValueError("All linear layers should support quant method.")
        self.quant_method = method
        self._create()
        if bias:
            self.bias = nn.Parameter(torch.empty(output_size, dtype=self.params_dtype))
            self.bias.weight_loader = self.weight_loader
        else:
            self.register_parameter("bias", None)

    def _create(self) -> None:
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=self.input_size_per_partition,
            output_partition_sizes=self.output_partition_sizes,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor) -> None:
        assert param.shape == loaded_weight.shape
        param.data.copy_(loaded_weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.quant_method.apply(self, x, self.bias), None


class ReplicatedLinear(LinearBase):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__(input_size, output_size, bias, params_dtype, quant_config, prefix)

    def _create(self) -> None:
        self.quant_method.create_weights(
            self,
            self.input_size,
            [self.output_size],
            self.input_size,
            self.output_size,
            self.params_dtype,
            weight_loader=self.weight_loader,
        )


class RowParallelLinear(LinearBase):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        self.input_size_per_partition = input_size // world_size
        self.output_partition_sizes = [output_size]
        super().__init__(input_size, output_size, bias, params_dtype, quant_config, prefix)


class MergedColumnParallelLinear(LinearBase):
    SHARDS: tuple[Any, ...] = tuple(range(8))

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        self.output_sizes = output_sizes
        self.input_size_per_partition = input_size
        self.output_partition_sizes = [size // world_size for size in output_sizes]
        super().__init__(input_size, sum(output_sizes), bias, params_dtype, quant_config, prefix)

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        part = param.data
        if loaded_shard_id is not None:
            index = self.SHARDS.index(loaded_shard_id)
            part = part.narrow(0, sum(self.output_sizes[:index]), self.output_sizes[index])
        assert part.shape == loaded_weight.shape
        part.copy_(loaded_weight)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        for name, loaded_weight in weights:
            param = getattr(self, name)
            param.weight_loader(param, loaded_weight, getattr(loaded_weight, "shard_id", None))
            yield name


class QKVParallelLinear(MergedColumnParallelLinear):
    SHARDS = ("q", "k", "v")

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        heads = (total_num_heads, total_num_kv_heads, total_num_kv_heads)
        sizes = [number * head_size for number in heads]
        super().__init__(hidden_size, sizes, bias, params_dtype, quant_config, prefix)


# A Llama's: name of the part in the checkpoint, of the fused linear, of the part for the loader.
STACKED: tuple[tuple[str, str, Any], ...] = (
    (".q_proj", ".qkv_proj", "q"),
    (".k_proj", ".qkv_proj", "k"),
    (".v_proj", ".qkv_proj", "v"),
    (".gate_proj", ".gate_up_proj", 0),
    (".up_proj", ".gate_up_proj", 1),
)


def load_by_table(layers: Mapping[str, LinearBase], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Load weights as vLLM's Llama did in 2024 and 2025."""
    parameters = {
        f"{name}.{key}": parameter
        for name, layer in layers.items()
        for key, parameter in layer.named_parameters()
    }
    for name, tensor in weights:
        for part, fused, shard in STACKED:
            if f"{part}." in name:
                parameter = parameters[name.replace(part, fused)]
                parameter.weight_loader(parameter, tensor, shard)
                break
        else:
            parameter = parameters[name]
            parameter.weight_loader(parameter, tensor)


def load_by_mapper(layers: Mapping[str, LinearBase], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Load weights as vLLM's Llama did in 2026: the part's name is on the tensor, the linear loads itself."""
    for name, tensor in weights:
        mapped = name
        for part, fused, shard in STACKED:
            if f"{part}." in name:
                mapped, tensor.shard_id = name.replace(part, fused), shard
        prefix, _, leaf = mapped.rpartition(".")
        layer = layers[prefix]
        if isinstance(layer, MergedColumnParallelLinear):
            assert list(layer.load_weights([(leaf, tensor)])) == [leaf]
        else:
            parameter = dict(layer.named_parameters())[leaf]
            parameter.weight_loader(parameter, tensor)


def modules() -> dict[str, ModuleType]:
    """Return the modules that a plugin imports, by name."""
    linear = [
        LinearBase,
        LinearMethodBase,
        UnquantizedLinearMethod,
        ReplicatedLinear,
        RowParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
    ]
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {cls.__name__: cls for cls in linear},
        "vllm.model_executor.layers.quantization": {
            "QUANTIZATION_METHODS": QUANTIZATION_METHODS,
            "register_quantization_config": register_quantization_config,
        },
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    }
    made = {name: ModuleType(name) for name in contents}
    for name, members in contents.items():
        vars(made[name]).update(members)
    return made
