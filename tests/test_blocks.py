import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import GROUPED, SIZES, TINY, UNUSUAL, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from stored import CPU, TOKENS, WIDTH, Stored, describe, random_tokens, store
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from workflow_copy import trained_tokenizer

from aasvd.artifacts import DamagedArtifactError
from aasvd.blocks import (
    Source,
    embed,
    linears,
    load_block,
    open_config,
    open_model,
    open_tokenizer,
    skeleton,
)

LLAMA_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
GROUPS = {
    "llama": LLAMA_GROUPS,
    "mistral": LLAMA_GROUPS,
    "qwen2": LLAMA_GROUPS,
    "qwen3": LLAMA_GROUPS,
    "gemma3": LLAMA_GROUPS,
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ],
    "gpt_neox": [
        ["attention.query_key_value"],
        ["attention.dense"],
        ["mlp.dense_h_to_4h"],
        ["mlp.dense_4h_to_h"],
    ],
}


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[Stored]:
    """A model on disk that a test may damage."""
    yield store(tiny_model("llama"), tmp_path)


def hidden_states(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> list[Tensor]:
    """Return what enters the first block and what leaves every block in an ordinary call of the model."""
    states: list[Tensor] = []

    def enter(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        states.append(arguments[0])

    def leave(_module: nn.Module, _arguments: Any, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    handles = [blocks[0].register_forward_pre_hook(enter)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


# Every architecture


@pytest.mark.parametrize("architecture", [*TINY, *UNUSUAL])
@torch.no_grad()
def test_blocks_called_one_at_a_time_are_the_model(
    stored: Callable[[str], Stored], architecture: str
) -> None:
    """In batches of 3, in spite of arguments that were recorded with one sequence of zeros."""
    tiny = stored(architecture)
    blocks = tiny.model.get_submodule(tiny.parts.path)
    assert isinstance(blocks, nn.ModuleList)
    expected = hidden_states(tiny.model, blocks, random_tokens(3))
    found = [tiny.hidden(3)]
    for index, arguments in enumerate(tiny.arguments()):
        output = tiny.block(index)(found[-1], **arguments)
        assert isinstance(output, Tensor)
        found.append(output)
    assert len(found) == len(expected) == tiny.model.config.num_hidden_layers + 1
    for ours, theirs in zip(found, expected, strict=True):
        # The same operations; a mask of one sequence instead of three may choose another kernel, and a
        # sum of up to 48 products rounds differently in each of some ten steps.
        atol = 100 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def _model(kind: str, **settings: object) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(GROUPED | settings))).eval()


def test_a_decoder_that_is_no_part_of_its_model_is_embedded(tmp_path: Path) -> None:
    """Llama 4's names a prefix that its own parameters do not have."""
    model = _model("llama4_text", head_dim=8, intermediate_size_mlp=48, num_local_experts=2)
    expected = model.get_input_embeddings()(random_tokens(2))
    torch.testing.assert_close(store(model, tmp_path).hidden(2), expected, rtol=0, atol=0)


def test_buffers_of_a_block_are_read_like_its_parameters(tmp_path: Path) -> None:
    model = _model("apertus")
    model.model.layers[0].mlp.act_fn.beta.fill_(0.875)
    assert float(store(model, tmp_path).block().mlp.act_fn.beta) == 0.875


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("falcon", {}, "FalconForCausalLM passes on a part"),
        ("falcon", {"num_hidden_layers": 1}, "FalconDecoderLayer returns a tuple, not a tensor"),
        ("gpt_bigcode", {"n_embd": 32, "n_head": 4}, "GPTBigCodeForCausalLM calls its blocks with arguments"),
        (
            "gptj",
            {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
            "GPTJForCausalLM passes on a part",
        ),
    ],
)
def test_blocks_that_are_called_otherwise_are_one_message(
    kind: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        store(_model(kind, **settings), tmp_path).groups()


@pytest.mark.parametrize("architecture", TINY)
def test_linears_that_read_one_tensor_form_a_group(
    stored: Callable[[str], Stored], architecture: str
) -> None:
    tiny = stored(architecture)
    for index, block in enumerate(tiny.parts.blocks):
        assert tiny.groups(index) == GROUPS[architecture]
        assert sorted(name for group in tiny.groups(index) for name in group) == sorted(linears(block))


@pytest.mark.parametrize("architecture", TINY)
def test_skeleton_has_no_weights_and_stays_as_it_is(
    stored: Callable[[str], Stored], architecture: str
) -> None:
    tiny = stored(architecture)
    tiny.hidden(1)
    tiny.groups()
    tiny.block()
    assert all(parameter.is_meta for parameter in tiny.parts.model.parameters())
    assert not any(buffer.is_meta for buffer in tiny.parts.model.buffers())
    assert not any("forward" in vars(module) for module in tiny.parts.model.modules())
    assert not any(module._forward_pre_hooks for module in tiny.parts.model.modules())
    assert not tiny.parts.model.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", TINY)
def test_types_are_as_asked_throughout(
    stored: Callable[[str], Stored], architecture: str, dtype: torch.dtype
) -> None:
    tiny = stored(architecture)
    block, hidden = tiny.block(1, dtype), tiny.hidden(2, dtype)
    assert {parameter.dtype for parameter in block.parameters()} == {dtype} == {hidden.dtype}
    with torch.no_grad():
        output = block(hidden, **tiny.arguments(dtype)[1])
    assert output.dtype == dtype and torch.isfinite(output).all()


# Reading


def test_only_the_tensors_of_the_block_are_read(
    stored: Callable[[str], Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, read, names = stored("qwen2"), Source.read, []
    monkeypatch.setattr(Source, "read", lambda self, name: (names.append(name), read(self, name))[1])
    block = tiny.block(1)
    assert sorted(names) == sorted(f"model.layers.1.{name}" for name, _ in block.named_parameters())
    original = tiny.model.get_submodule("model.layers.1").state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in block.state_dict().items())


def test_two_loads_of_a_block_share_nothing(stored: Callable[[str], Stored]) -> None:
    first, second = stored("llama").block(), stored("llama").block()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert not any(parameter.eq(0).all() for parameter in second.parameters())


@pytest.mark.parametrize("stored_with_prefix", [True, False])
def test_files_of_the_base_model_do_too(tmp_path: Path, stored_with_prefix: bool) -> None:
    """Some checkpoints, among them OPT's own, name their tensors without the `model.` in front."""
    model = tiny_model("opt")
    folder = tmp_path / "dense"
    (model if stored_with_prefix else model.base_model).save_pretrained(folder)
    source = Source(describe(folder))
    assert ("model.decoder.layers.0.fc1.weight" in source.tensors) == stored_with_prefix
    parts = skeleton(folder)
    block = load_block(source, parts, 0, device=CPU, dtype=torch.float32)
    assert torch.equal(
        block.get_parameter("fc1.weight"), model.get_parameter("model.decoder.layers.0.fc1.weight")
    )
    hidden = next(embed(source, parts, [random_tokens(2)], dtype=torch.float32))
    assert float(hidden.std()) > 0.01


def test_files_with_tensors_of_no_parameter_are_read(tmp_path: Path) -> None:
    """Old GPT-NeoX files hold masks and the number that stands for minus infinity."""
    tiny_model("gpt_neox").save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    extra = {
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
    }
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    source = Source(describe(tmp_path / "dense"))
    assert all(torch.equal(source.read(name), tensor) for name, tensor in extra.items())


def test_embedding_yields_every_batch(stored: Callable[[str], Stored]) -> None:
    tiny = stored("llama")
    batches = embed(tiny.source, tiny.parts, random_tokens(5).split(2), dtype=torch.float32)
    assert torch.equal(torch.cat(list(batches)), tiny.hidden(5))


def test_arguments_differ_between_sliding_and_full_attention(stored: Callable[[str], Stored]) -> None:
    sliding, full, again = stored("gemma3").arguments()
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])
    assert torch.equal(sliding["position_embeddings"][0], again["position_embeddings"][0])
    # Token 19 sees 8 tokens through the window; a mask of None means all before it.
    assert int(sliding["attention_mask"][0, 0, -1].sum()) == 8
    assert full["attention_mask"] is None or int(full["attention_mask"][0, 0, -1].sum()) == TOKENS


def test_a_folders_own_code_is_not_run_whatever_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=trained_tokenizer(["some words"])).save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Mine\n"
        "from transformers import PreTrainedTokenizerFast as Words\n"
    )
    for name, change in {
        "config.json": {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Mine"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Words",
            "auto_map": {"AutoTokenizer": [None, "mine.Words"]},
        },
    }.items():
        described = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**described, **change}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    opening: list[Callable[[Path], object]] = [
        skeleton, open_config, open_tokenizer, functools.partial(open_model, dtype=torch.float32),
    ]  # fmt: skip
    for function in opening:
        with contextlib.suppress(ValueError):
            function(tmp_path)
    assert not (tmp_path / "ran").exists()


# What cannot be compressed


def test_model_without_blocks(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.num_hidden_layers = 0
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: LlamaForCausalLM has no decoder blocks"):
        skeleton(tmp_path)


def test_model_without_linears(tmp_path: Path) -> None:
    """GPT-2 keeps its matrices in a layer class of its own."""
    sizes = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=32, **sizes).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"the blocks transformer\.h of GPT2LMHeadModel hold no linear layer"
    ):
        skeleton(tmp_path)


class WordDependent(nn.Module):
    """Rotary embeddings that depend on what is said, not only where."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = x.mean(-1, keepdim=True).expand(*x.shape[:-1], 8)
        return angle.cos(), angle.sin()


def test_arguments_that_depend_on_the_tokens_are_refused(llama: Stored) -> None:
    llama.parts.model.get_submodule("model").rotary_emb = WordDependent()
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM are called with position_embeddings that depend on the tokens"
    ):
        llama.hidden(2)


def test_blocks_that_are_skipped_are_refused(llama: Stored) -> None:
    llama.parts.model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="LlamaForCausalLM called 1 of its 2 blocks"):
        llama.arguments()
    assert not any("forward" in vars(block) for block in llama.parts.blocks)


def test_linear_that_is_not_called_is_in_no_group(llama: Stored) -> None:
    llama.parts.blocks[0].spare = nn.Linear(2, 2, device="meta")
    assert llama.groups() == LLAMA_GROUPS


# Damage


def test_missing_tensor(llama: Stored) -> None:
    with pytest.raises(
        ValueError, match=r"dense has no tensor model\.layers\.9\.x; it has e\.g\. lm_head\.weight, "
    ):
        llama.source.read("model.layers.9.x")
    del llama.source.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        llama.block(1)


def flip(file: Path) -> None:
    """Change the last byte of the data, which belongs to the tensor that comes last in the file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "is damaged: tensor .* is not the one that was fetched"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "is damaged"),
        (lambda file: os.truncate(file, 4), "is damaged"),
        (Path.unlink, "is missing"),
    ],
    ids=["byte", "cut", "stump", "gone"],
)
def test_damaged_model_names_the_file_and_the_command(
    llama: Stored, damage: Callable[[Path], object], message: str
) -> None:
    damage(llama.source.folder / "model.safetensors")
    with pytest.raises(
        DamagedArtifactError, match=rf"(?s)model\.safetensors {message}.*fetch it again"
    ) as caught:
        for name in llama.source.tensors:
            llama.source.read(name)
    assert str(caught.value).endswith(f"--force {llama.record}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip, "is damaged: it is not the file that was fetched"), (Path.unlink, "is missing")],
)
def test_a_damaged_config_names_the_file_and_the_command(
    llama: Stored, damage: Callable[[Path], object], message: str
) -> None:
    damage(llama.source.folder / "config.json")
    with pytest.raises(DamagedArtifactError, match=rf"(?s)config\.json {message}.*fetch it again") as caught:
        Source(llama.record)
    assert str(caught.value).endswith(f"--force {llama.record}")


def test_damaged_record(llama: Stored) -> None:
    flip(llama.record)
    with pytest.raises(DamagedArtifactError, match=r"source\.json is damaged"):
        Source(llama.record)


def test_file_that_lacks_a_tensor_of_the_record(llama: Stored) -> None:
    llama.source.tensors["extra"] = {"file": "model.safetensors", "sha256": ""}
    with pytest.raises(DamagedArtifactError, match=r"model\.safetensors is damaged .*extra"):
        llama.source.read("extra")
