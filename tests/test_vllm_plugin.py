"""The vLLM plugin against stand-ins for vLLM's classes: vLLM itself cannot be installed here."""

import importlib.metadata
import json
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import Written, load
from torch import nn

from aasvd import vllm_plugin

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# What vLLM's Llama calls its stacked_params_mapping.
STACKED = [
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
]


class Vllm:
    """The parts of vLLM that a quantization plugin touches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.methods: dict[str, Any] = {}

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
            def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...

        class LinearMethodBase(ABC):
            @abstractmethod
            def create_weights(self, *args: Any, **kwargs: Any) -> None: ...
            @abstractmethod
            def apply(self, layer: nn.Module, x: torch.Tensor, bias: Any = None) -> torch.Tensor: ...
            def process_weights_after_loading(self, layer: nn.Module) -> None:  # noqa: B027 (as vLLM's)
                pass

        class UnquantizedLinearMethod(LinearMethodBase):
            def create_weights(self, layer: Any, *_: Any, **sizes: Any) -> None:
                layer.weight = nn.Parameter(torch.empty(sizes["output_size"], sizes["input_size"]))

            def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
                return nn.functional.linear(x, layer.weight, bias)

        class LinearBase(nn.Module):
            """Like vLLM's, for one or several outputs side by side."""

            def __init__(
                self, inputs: int, outputs: list[int], config: Any, prefix: str, devices: int = 1
            ) -> None:
                super().__init__()
                self.quant_method = config.get_quant_method(self, prefix=prefix)
                self.quant_method.create_weights(
                    layer=self,
                    input_size_per_partition=inputs,
                    output_partition_sizes=[size // devices for size in outputs],
                    input_size=inputs,
                    output_size=sum(outputs),
                    params_dtype=torch.float32,
                    weight_loader=None,
                )

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.quant_method.apply(self, x, None)

        def register_quantization_config(name: str) -> Any:
            def wrapper(cls: type) -> type:
                assert name not in self.methods, "vLLM raises here"
                assert issubclass(cls, QuantizationConfig)
                self.methods[name] = cls
                return cls

            return wrapper

        contents = {
            "vllm": {},
            "vllm.model_executor": {},
            "vllm.model_executor.layers": {},
            "vllm.model_executor.layers.linear": {
                "LinearBase": LinearBase,
                "LinearMethodBase": LinearMethodBase,
                "UnquantizedLinearMethod": UnquantizedLinearMethod,
            },
            "vllm.model_executor.layers.quantization": {
                "QUANTIZATION_METHODS": self.methods,
                "register_quantization_config": register_quantization_config,
            },
            "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        }
        for name, members in contents.items():
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
        self.linear = LinearBase
        self.unquantized = UnquantizedLinearMethod

    def config(self, folder: Path, **changes: object) -> Any:
        stored = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
        config = self.methods["aasvd"].from_config(stored)
        config.packed_modules_mapping = PACKED
        return config


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    found = Vllm(monkeypatch)
    vllm_plugin.register()
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("llama"), "llama")


BLOCK = "model.layers.0."
# (in, outputs) of vLLM's linears in one block of the tiny Llama.
LINEARS = {
    f"{BLOCK}self_attn.qkv_proj": (32, [32, 16, 16]),
    f"{BLOCK}self_attn.o_proj": (32, [32]),
    f"{BLOCK}mlp.gate_up_proj": (32, [48, 48]),
    f"{BLOCK}mlp.down_proj": (48, [32]),
}


def read(layers: dict[str, nn.Module], folder: Path, *, skip: str = "nothing") -> None:
    """Load one block as vLLM's Llama does."""
    parameters = {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.named_parameters()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.startswith(BLOCK) or "norm" in name or name == skip:
            continue
        for fused, part, shard in STACKED:
            if part in name:
                parameter = parameters[name.replace(part, fused)]
                parameter.weight_loader(parameter, tensor, shard)
                break
        else:
            parameter = parameters[name]
            parameter.weight_loader(parameter, tensor)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


def test_a_block_is_loaded_and_computes_the_same(vllm: Vllm, llama: Written) -> None:
    config = vllm.config(llama.folder)
    layers = {name: vllm.linear(*sizes, config, name) for name, sizes in LINEARS.items()}
    read(layers, llama.folder)
    model = load(llama.folder)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        x = torch.randn(5, LINEARS[name][0], generator=torch.Generator().manual_seed(0))
        parts = [model.get_submodule(f"{parent}.{part}")(x) for part in PACKED.get(leaf, [leaf])]
        torch.testing.assert_close(layer(x), torch.cat(parts, -1), rtol=0, atol=1e-5)
        # Not more than the checkpoint holds.
        stored = sum(
            p.numel()
            for part in PACKED.get(leaf, [leaf])
            for p in model.get_submodule(f"{parent}.{part}").parameters()
        )
        assert sum(p.numel() for p in layer.parameters()) == stored


def test_ranks_may_differ_within_a_fused_linear() -> None:
    layer = nn.Module()
    factors = vllm_plugin.Factors([2, 3])
    factors.create(layer, inputs=4, outputs=[5, 6], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    u = [torch.randn(5, 2, generator=generator), torch.randn(6, 3, generator=generator)]
    v = [torch.randn(2, 4, generator=generator), torch.randn(3, 4, generator=generator)]
    for index in (1, 0):
        layer.u.weight_loader(layer.u, u[index], index)
        layer.v.weight_loader(layer.v, v[index], index)
    factors.check()
    x, bias = torch.randn(7, 4, generator=generator), torch.randn(11, generator=generator)
    expected = torch.cat([x @ (a @ b).T for a, b in zip(u, v, strict=True)], -1) + bias
    torch.testing.assert_close(factors.apply(layer, x, bias), expected)
    with pytest.raises(ValueError, match=r"u of part 0 has shape \(6, 3\): expected \(5, 2\)"):
        layer.u.weight_loader(layer.u, u[1], 0)
    with pytest.raises(ValueError, match="there is no part 'v' to load"):
        layer.v.weight_loader(layer.v, v[1], "v")
    with pytest.raises(ValueError, match="there is no part None to load"):
        layer.v.weight_loader(layer.v, torch.cat(v))
    layer.weight.weight_loader(layer.weight, torch.empty(0), 0)
    with pytest.raises(ValueError, match=r"a weight of shape \(5, 4\) for a factored linear"):
        layer.weight.weight_loader(layer.weight, torch.ones(5, 4), 0)


def test_dense_linears_and_other_layers(vllm: Vllm, llama: Written) -> None:
    config = vllm.config(llama.folder)
    assert config.get_quant_method(nn.Embedding(2, 2), prefix="model.embed_tokens") is None
    head = config.get_quant_method(vllm.linear(4, [4], config, f"{BLOCK}self_attn.o_proj"), prefix="lm_head")
    assert type(head) is vllm.unquantized
    ranks = {
        name: rank for name, rank in llama.ranks.items() if not name.endswith("layers.0.self_attn.k_proj")
    }
    with pytest.raises(ValueError, match=r"qkv_proj fuses factored linears with .*k_proj, which is dense"):
        vllm.linear(32, [32, 16, 16], vllm.config(llama.folder, ranks=ranks), f"{BLOCK}self_attn.qkv_proj")


def test_errors(vllm: Vllm, llama: Written) -> None:
    with pytest.raises(ValueError, match="format_version is 99"):
        vllm.config(llama.folder, format_version=99)
    with pytest.raises(ValueError, match="reads no pruned linears"):
        vllm.config(llama.folder, kept={f"{BLOCK}mlp.other": [3, 4]})
    config = vllm.config(llama.folder)
    with pytest.raises(ValueError, match="does not support tensor parallelism"):
        vllm.linear(32, [32], config, f"{BLOCK}self_attn.o_proj", devices=2)
    layers = {name: vllm.linear(*sizes, config, name) for name, sizes in LINEARS.items()}
    with pytest.raises(ValueError, match="holds no u for part 1 of a linear"):
        read(layers, llama.folder, skip=f"{BLOCK}self_attn.k_proj.u")


def test_registering_twice_changes_nothing(vllm: Vllm) -> None:
    before = dict(vllm.methods)
    vllm_plugin.register()
    assert vllm.methods == before


def test_module_needs_no_vllm_and_entry_point_names_it() -> None:
    assert "vllm" not in sys.modules
    project = (Path(vllm_plugin.__file__).parent.parent / "pyproject.toml").read_text()
    assert 'aasvd = "aasvd.vllm_plugin:register"' in project
    entry = importlib.metadata.EntryPoint("aasvd", "aasvd.vllm_plugin:register", "vllm.general_plugins")
    assert entry.load() is vllm_plugin.register
