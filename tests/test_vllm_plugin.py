"""The vLLM plugin against stand-ins for vLLM's classes: vLLM itself is not among the requirements."""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_stand_ins as vllm
from architectures import linears, tiny_model
from safetensors.torch import load_file
from test_checkpoint import factor, load, pack
from torch import Tensor, nn
from transformers import PreTrainedModel

from aasvd import checkpoint, vllm_plugin

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
BLOCK = "model.layers.0."
STORAGES = ("factors", "pivoted")
# Rank by the linear's last name, None where it is dense; all that are not named have DEFAULT.
DEFAULT = 5
Ranks = dict[str, int | None]
MIXTURES: dict[str, Ranks] = {
    "all": {},
    "other ranks": {"q_proj": 1, "k_proj": 16, "v_proj": 7, "up_proj": 31},
    "first dense": {"q_proj": None, "gate_proj": None},
    "middle dense": {"k_proj": None, "v_proj": 3},
    "last dense": {"v_proj": None, "up_proj": None},
    "one left": {"q_proj": None, "v_proj": None},
    "wholly dense": {"q_proj": None, "k_proj": None, "v_proj": None, "o_proj": None, "down_proj": None},
}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> type:
    """Return the config that the plugin registers."""
    monkeypatch.setattr(vllm, "QUANTIZATION_METHODS", [*vllm.QUANTIZATION_METHODS])
    monkeypatch.setattr(vllm, "CUSTOM", {})
    for name, module in vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm_plugin.register()
    return vllm.CUSTOM["aasvd"]


def write(
    folder: Path,
    storage: str,
    ranks: Ranks,
    *,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint of a tiny model."""
    model = tiny_model(architecture)
    model.save_pretrained(folder / "dense")
    found = {name: ranks.get(name.rpartition(".")[2], DEFAULT) for name in linears(model)}
    factored = {name: rank for name, rank in found.items() if rank is not None}
    state: dict[str, Tensor] = {}
    # `factor` makes the named linears of one rank.
    for rank in {*factored.values()}:
        named = {name: rank for name in factored if factored[name] == rank}
        made = factor(model, named)
        kept = {name for name in factored if name not in named}
        state |= {key: tensor for key, tensor in made.items() if key.rpartition(".")[0] not in kept}
    checkpoint.write(
        dense=folder / "dense",
        output=folder / "model",
        ranks=factored,
        storage=storage,
        dtype=dtype,
        details={},
        tensor=pack(state, factored, storage, dtype).__getitem__,
    )
    return folder / "model"


def config(plugin: Any, folder: Path, packed: Any = PACKED, **changes: object) -> Any:
    stored = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
    made = plugin.from_config(stored)
    made.packed_modules_mapping = packed
    return made


def layers_of(model: PreTrainedModel, quant_config: Any, packed: Any = PACKED) -> dict[str, vllm.LinearBase]:
    """Return the linears that vLLM makes for a model's blocks, by name."""
    fused = {part: whole for whole, parts in packed.items() for part in parts}
    made: dict[str, vllm.LinearBase] = {}
    for name in linears(model):
        parent, _, leaf = name.rpartition(".")
        prefix = f"{parent}.{fused.get(leaf, leaf)}"
        attention, linear = model.get_submodule(parent), model.get_submodule(name)
        common: dict[str, Any] = {
            "bias": linear.bias is not None,
            "params_dtype": model.dtype,
            "quant_config": quant_config,
            "prefix": prefix,
        }
        if prefix in made:
            continue
        if "qkv_proj" in prefix:
            head, heads = attention.head_dim, model.config.num_attention_heads
            made[prefix] = vllm.QKVParallelLinear(
                linear.in_features, head, heads, model.config.num_key_value_heads, **common
            )
        elif "gate_up_proj" in prefix:
            sizes = [model.config.intermediate_size] * 2
            made[prefix] = vllm.MergedColumnParallelLinear(linear.in_features, sizes, **common)
        else:
            made[prefix] = vllm.RowParallelLinear(linear.in_features, linear.out_features, **common)
    return made


def read(layers: dict[str, vllm.LinearBase], folder: Path, *, load: Any, skip: str = "nothing") -> None:
    """Load a checkpoint into vLLM's linears."""
    tensors = load_file(folder / "model.safetensors")
    inside = {f"{part}." for name in layers for part in [name, *parts_of(name)]}
    load(
        layers,
        [
            (name, tensor)
            for name, tensor in tensors.items()
            if name != skip and any(name.startswith(prefix) for prefix in inside)
        ],
    )
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


def parts_of(name: str, packed: Any = PACKED) -> list[str]:
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in packed.get(leaf, [leaf])]


class Served(nn.Module):
    """One part of one of vLLM's linears, in the place of transformers'; vLLM has all tokens in a row."""

    def __init__(self, layer: vllm.LinearBase, start: int, size: int) -> None:
        super().__init__()
        self.layer, self.start, self.size = layer, start, size

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.layer(x.flatten(0, -2))
        assert bias is None
        return y.view(*x.shape[:-1], -1)[..., self.start : self.start + self.size]


def serve(layers: dict[str, vllm.LinearBase], folder: Path, packed: Any = PACKED) -> PreTrainedModel:
    """Return transformers' model of a folder, all linears of its blocks computed by vLLM's."""
    model = load(folder)
    for name, layer in layers.items():
        start = 0
        for part in parts_of(name, packed):
            parent, _, leaf = part.rpartition(".")
            size = model.get_submodule(part).out_features
            setattr(model.get_submodule(parent), leaf, Served(layer, start, size))
            start += size
        assert start == layer.output_size
    return model


def assert_same(layers: dict[str, vllm.LinearBase], folder: Path, packed: Any = PACKED) -> None:
    """Compare the outputs of every block and the logits with transformers', for one and for many tokens."""
    theirs, ours = load(folder), serve(layers, folder, packed)
    generator = torch.Generator().manual_seed(1)
    for count in (1, 12):
        tokens = torch.randint(3, 128, (1, count), generator=generator)
        with torch.no_grad():
            found, expected = [model(tokens, output_hidden_states=True) for model in (ours, theirs)]
        pairs = zip(
            [*found.hidden_states, found.logits], [*expected.hidden_states, expected.logits], strict=True
        )
        for one, other in pairs:
            assert one.dtype == other.dtype
            # Products of a stack of matrices may add in another order; 16 bits round that.
            error = (one.double() - other.double()).norm() / other.double().norm()
            assert error < 8 * torch.finfo(theirs.dtype).eps


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("storage", STORAGES)
def test_blocks_compute_the_same(plugin: type, tmp_path: Path, storage: str, mixture: str) -> None:
    folder = write(tmp_path, storage, MIXTURES[mixture])
    model = load(folder)
    quant_config = config(plugin, folder)
    layers, others = layers_of(model, quant_config), layers_of(model, quant_config)
    read(layers, folder, load=vllm.load_by_table)
    assert_same(layers, folder)
    read(others, folder, load=vllm.load_by_mapper)
    for name, layer in layers.items():
        torch.testing.assert_close(others[name].state_dict(), layer.state_dict(), rtol=0, atol=0)
    for name, layer in layers.items():
        dense = all(part not in model.config.quantization_config.ranks for part in parts_of(name))
        assert (type(layer.quant_method) is vllm.UnquantizedLinearMethod) == dense
        # Not more than the checkpoint holds.
        stored = [model.get_submodule(part).state_dict().values() for part in parts_of(name)]
        assert sum(p.nbytes for p in layer.parameters()) == sum(t.nbytes for part in stored for t in part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", STORAGES)
def test_types(plugin: type, tmp_path: Path, storage: str, dtype: torch.dtype) -> None:
    folder = write(tmp_path, storage, MIXTURES["middle dense"], dtype=dtype)
    layers = layers_of(load(folder), config(plugin, folder))
    read(layers, folder, load=vllm.load_by_table)
    assert {p.dtype for layer in layers.values() for p in layer.parameters()} - {torch.int32} == {dtype}
    assert_same(layers, folder)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_biases_and_linears_that_are_fused_in_the_checkpoint(
    plugin: type, tmp_path: Path, storage: str, architecture: str
) -> None:
    folder = write(tmp_path, storage, {"k_proj": None, "down_proj": None}, architecture=architecture)
    # As vLLM's Phi3 says.
    packed = {name: [name] for name in PACKED} if architecture == "phi3" else PACKED
    model = load(folder)
    layers = layers_of(model, config(plugin, folder, packed), packed)
    read(layers, folder, load=vllm.load_by_table)
    assert_same(layers, folder, packed)


@pytest.mark.parametrize("storage", STORAGES)
def test_replicated_linears(plugin: type, tmp_path: Path, storage: str) -> None:
    folder = write(tmp_path, storage, {})
    name = f"{BLOCK}mlp.down_proj"
    layer = vllm.ReplicatedLinear(48, 32, bias=False, quant_config=config(plugin, folder), prefix=name)
    read({name: layer}, folder, load=vllm.load_by_table)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x)[0], load(folder).get_submodule(name)(x))


def fused(storage: str = "factors", ranks: tuple[int | None, ...] = (2, None, 3)) -> tuple[Any, nn.Module]:
    """A linear from 4 to 5, 6 and 7 numbers."""
    layer = nn.Module()
    linear = vllm_plugin.FusedLinear(storage, ranks)
    linear.create(layer, inputs=4, outputs=[5, 6, 7], dtype=torch.float32)
    return linear, layer


def test_products_and_bias_against_the_weights() -> None:
    linear, layer = fused()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "u": {0: random(5, 2), 2: random(7, 3)},
        "v": {0: random(2, 4), 2: random(3, 4)},
        "weight": {1: random(6, 4)},
    }
    for name, parts in tensors.items():
        parameter = getattr(layer, name)
        for index, tensor in reversed(parts.items()):
            parameter.weight_loader(parameter, tensor, index)
    linear.check()
    u, v = tensors["u"], tensors["v"]
    whole = torch.cat([u[0] @ v[0], tensors["weight"][1], u[2] @ v[2]])
    bias = random(18)
    for tokens in (1, 9):
        x = random(tokens, 4)
        torch.testing.assert_close(linear.apply(layer, x, bias), x @ whole.T + bias)
        torch.testing.assert_close(linear.apply(layer, x, None), x @ whole.T)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_compiler_sees_one_graph_for_any_number_of_tokens(storage: str) -> None:
    linear, layer = fused(storage)
    for parameter in layer.parameters():
        parameter.data.zero_()
    calls: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        calls.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: linear.apply(layer, x, None), backend=backend, fullgraph=True)
    for tokens in (7, 1, 30):
        x = torch.ones(tokens, 4)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        torch.testing.assert_close(compiled(x), linear.apply(layer, x, None))
    assert len(calls) == 1


def test_wrong_tensors() -> None:
    _, layer = fused()
    with pytest.raises(ValueError, match=r"u of part 0 has shape \(7, 3\) .*expected \(5, 2\)"):
        layer.u.weight_loader(layer.u, torch.zeros(7, 3), 0)
    for part in ("k", None, 3, -1, (0, 1)):
        with pytest.raises(ValueError, match=r"there is no part .* to load"):
            layer.v.weight_loader(layer.v, torch.zeros(3, 4), part)
    layer.weight.weight_loader(layer.weight, torch.empty(0), "q")
    with pytest.raises(ValueError, match=r"weight of part 0 has shape \(5, 4\) .*expected \(0,\)"):
        layer.weight.weight_loader(layer.weight, torch.zeros(5, 4), "q")
    _, layer = fused("pivoted")
    with pytest.raises(ValueError, match=r"order of part 0 is not an order of the numbers 0 to 4"):
        layer.order.weight_loader(layer.order, torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32), 0)
    with pytest.raises(ValueError, match=r"order of part 2 .* type torch.float32: .*torch.int32"):
        layer.order.weight_loader(layer.order, torch.arange(7.0), "v")


def test_other_layers(plugin: type, tmp_path: Path) -> None:
    quant_config = config(plugin, write(tmp_path, "pivoted", {}))
    assert quant_config.get_quant_method(nn.Embedding(2, 2), prefix="model.embed_tokens") is None
    head = vllm.RowParallelLinear(4, 4, quant_config=quant_config, prefix="lm_head")
    assert type(head.quant_method) is vllm.UnquantizedLinearMethod


def test_a_model_with_other_names(plugin: type, tmp_path: Path) -> None:
    quant_config = config(plugin, write(tmp_path, "factors", {}))

    class Mapper:
        def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
            return {f"language_{name}": value for name, value in values.items()}

    quant_config.apply_vllm_mapper(Mapper())
    layer = vllm.RowParallelLinear(
        32, 32, quant_config=quant_config, prefix=f"language_{BLOCK}self_attn.o_proj"
    )
    assert {"u", "v"} <= dict(layer.named_parameters()).keys()


@pytest.mark.parametrize("storage", STORAGES)
def test_errors(plugin: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    folder = write(tmp_path, storage, MIXTURES["middle dense"])
    with pytest.raises(ValueError, match="format_version is 99"):
        config(plugin, folder, format_version=99)
    for other in ("factors-int8", "pivoted-int8", "remapped"):
        with pytest.raises(ValueError, match=rf"stored as {other}: .* factors and pivoted.* aasvd\.export"):
            config(plugin, folder, storage=other)
    with pytest.raises(ValueError, match=r"stored as pruned \(kept\): .* aasvd\.export"):
        config(plugin, folder, kept={f"{BLOCK}mlp.other": [3, 4]})
    quant_config = config(plugin, folder)
    o_proj = f"{BLOCK}self_attn.o_proj"
    ranks = {**quant_config.ranks, o_proj: 33}
    with pytest.raises(ValueError, match="rank 33 of a linear from 32 to 32 features: expected 1 to 32"):
        vllm.RowParallelLinear(32, 32, quant_config=config(plugin, folder, ranks=ranks), prefix=o_proj)
    with pytest.raises(ValueError, match="has 2 parts but the checkpoint has 3"):
        vllm.MergedColumnParallelLinear(
            32, [32, 32], quant_config=quant_config, prefix=f"{BLOCK}self_attn.qkv_proj"
        )
    missing = {"factors": "u", "pivoted": "order"}[storage]
    for name, tensor in {"q_proj": missing, "k_proj": "weight"}.items():
        layers = layers_of(load(folder), quant_config)
        index = PACKED["qkv_proj"].index(name)
        with pytest.raises(ValueError, match=f"holds no {tensor} for part {index} of a linear"):
            read(layers, folder, load=vllm.load_by_table, skip=f"{BLOCK}self_attn.{name}.{tensor}")
    monkeypatch.setattr(vllm, "world_size", 2)
    for prefix, make in {
        o_proj: lambda **known: vllm.RowParallelLinear(32, 32, **known),
        f"{BLOCK}self_attn.qkv_proj": lambda **known: vllm.QKVParallelLinear(32, 8, 4, 2, **known),
    }.items():
        with pytest.raises(ValueError, match="does not support tensor parallelism"):
            make(quant_config=quant_config, prefix=prefix)


def test_registering_twice_changes_nothing(plugin: type) -> None:
    before = [*vllm.QUANTIZATION_METHODS]
    assert "aasvd" in before
    vllm_plugin.register()
    assert before == vllm.QUANTIZATION_METHODS


def test_module_needs_no_vllm_and_entry_point_names_it() -> None:
    assert "vllm" not in sys.modules
    project = (Path(vllm_plugin.__file__).parent.parent / "pyproject.toml").read_text()
    assert 'aasvd = "aasvd.vllm_plugin:register"' in project
    entry = importlib.metadata.EntryPoint("aasvd", "aasvd.vllm_plugin:register", "vllm.general_plugins")
    assert entry.load() is vllm_plugin.register
