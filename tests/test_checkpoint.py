import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TINY, linears, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
)

from aasvd import checkpoint, latents, weights
from aasvd.artifacts import DamagedArtifactError
from aasvd.blocks import skeleton
from aasvd.formats import FORMATS, MARKER
from aasvd.lowrank import CompressedLinear
from aasvd.rank import stored_bytes, stored_parameters

RANK = 5
DETAILS = {"method": "aasvd", "objective": "anchored", "parameter_ratio": 0.6}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def factor(model: PreTrainedModel, ranks: dict[str, int]) -> dict[str, Tensor]:
    """Return the state of the compressed model, and make the model itself equal to it, densely."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, rank in ranks.items():
        weight = state.pop(f"{name}.weight")
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        state[f"{name}.u"] = left[:, :rank] * singular[:rank]
        state[f"{name}.v"] = right[:rank]
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(state[f"{name}.u"] @ state[f"{name}.v"])
    return state


def pack(
    state: dict[str, Tensor], ranks: dict[str, int], storage: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a state with the factors of the named linears packed as a storage has them."""
    for name in ranks:
        parts = FORMATS[storage].pack(state.pop(f"{name}.u"), state.pop(f"{name}.v"), dtype)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return state


def expand(model: PreTrainedModel, ranks: dict[str, int], storage: str, state: dict[str, Tensor]) -> None:
    """Make a dense model compute what its packed linears stand for."""
    for name in ranks:
        linear = model.get_submodule(name)
        layer = FORMATS[storage](
            linear.in_features, linear.out_features, ranks[name], bias=False, dtype=torch.float32
        )
        layer.load_state_dict({part: state[f"{name}.{part}"] for part in layer.state_dict()})
        with torch.no_grad():
            linear.weight.copy_(layer.dense())


class Written:
    """A checkpoint on disk, beside the dense model that computes the same."""

    def __init__(
        self,
        folder: Path,
        architecture: str,
        *,
        keep_dense: int = 0,
        storage: str = "factors",
        dtype: torch.dtype = torch.float32,
        **arguments: Any,
    ) -> None:
        self.model = tiny_model(architecture)
        self.dense = folder / "dense"
        self.model.save_pretrained(self.dense)
        (self.dense / "tokenizer_config.json").write_text('{"model_max_length": 128}')
        (self.dense / "run_me.py").write_text("raise SystemExit")
        self.linears = list(linears(self.model))
        self.ranks = dict.fromkeys(self.linears[keep_dense:], RANK)
        self.storage = storage
        self.state = pack(factor(self.model, self.ranks), self.ranks, storage, dtype)
        self.markers = {f"{name}.{MARKER}": torch.empty(0) for name in self.ranks}
        if FORMATS[storage].OVERHEAD[-1:] == ("scales",):
            expand(self.model, self.ranks, storage, self.state)
        self.folder = folder / "model"
        self.asked: list[str] = []
        defaults: dict[str, Any] = {
            "ranks": self.ranks,
            "storage": storage,
            "dtype": dtype,
            "tensor": self.tensor,
        }
        checkpoint.write(dense=self.dense, output=self.folder, details=DETAILS, **{**defaults, **arguments})
        self.state |= self.markers

    def tensor(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.state[name]


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.fixture(scope="module", params=[f"{name} {storage}" for name in TINY for storage in FORMATS])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    name, storage = request.param.split()
    return Written(tmp_path_factory.mktemp(name), name, keep_dense=1, storage=storage)


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[Written]:
    yield Written(tmp_path, "llama")


def tokens() -> Tensor:
    """Two sequences of 20 tokens, longer than any sliding window of the tiny models."""
    return torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))


def files(folder: Path) -> dict[str, bytes]:
    """Return the files that `save_pretrained` of a model writes."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]
    paths += [folder / "config.json", folder / "generation_config.json"]
    return {path.name: path.read_bytes() for path in paths}


def edit_config(folder: Path, **changes: object) -> None:
    """Change entries of quantization_config; a value of Ellipsis removes the entry."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    for key in [key for key, value in changes.items() if value is ...]:
        del config["quantization_config"][key]
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# Every architecture


def test_logits_are_those_of_the_product_of_the_factors(written: Written) -> None:
    model = load(written.folder)
    assert type(model) is type(written.model)
    assert not model.training
    found = {
        name: module.rank for name, module in model.named_modules() if isinstance(module, CompressedLinear)
    }
    assert found == written.ranks
    with torch.no_grad():
        logits, expected = model(tokens()).logits, written.model(tokens()).logits
    # Another order of summation in each linear; errors of eps per step grow through the layers and norms.
    torch.testing.assert_close(logits, expected, rtol=0, atol=300 * torch.finfo(torch.float32).eps)


def test_generation_with_the_cache_equals_generation_without(written: Written) -> None:
    model = load(written.folder)
    arguments = {
        "attention_mask": torch.ones_like(tokens()),
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
    }
    cached = model.generate(tokens(), use_cache=True, **arguments)
    assert cached.shape == (2, 32)
    assert torch.equal(cached, model.generate(tokens(), use_cache=False, **arguments))


def test_save_pretrained_gives_the_same_bytes(written: Written, tmp_path: Path) -> None:
    load(written.folder).save_pretrained(tmp_path)
    assert files(tmp_path) == files(written.folder)


def test_each_tensor_is_asked_for_once_and_stored(written: Written) -> None:
    stored = weights.stored_tensors([written.folder / "model.safetensors"])
    tied = written.model.all_tied_weights_keys
    assert sorted([*written.asked, *written.markers]) == sorted(stored) == sorted(written.state.keys() - tied)
    with safe_open(written.folder / "model.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), written.state[name]) for name in stored)


def test_file_is_smaller_by_what_the_ranks_say(written: Written) -> None:
    numbers = stored = dense_numbers = 0
    for name, linear in linears(written.model).items():
        rank, shape = written.ranks.get(name), linear.weight.shape
        numbers += stored_parameters(*shape, rank, storage=written.storage)
        stored += stored_bytes(*shape, rank, storage=written.storage, itemsize=4)
        dense_numbers += linear.weight.numel()
    dense = checkpoint.counts(written.dense, written.linears)
    compressed = checkpoint.counts(written.folder, written.linears)
    assert compressed["linears"] == numbers < dense["linears"] == dense_numbers
    assert dense["model"] == written.model.num_parameters()
    assert dense["model"] - compressed["model"] == dense_numbers - numbers
    # Four bytes a number in the dense file; the headers differ besides.
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (written.dense, written.folder)]
    assert [dense["bytes"], compressed["bytes"]] == sizes
    headers = [
        8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        for folder in (written.dense, written.folder)
    ]
    assert (sizes[0] - headers[0]) - (sizes[1] - headers[1]) == 4 * dense_numbers - stored


def test_embeddings_are_tied_as_in_the_dense_model(written: Written) -> None:
    model = load(written.folder)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == bool(written.model.config.tie_word_embeddings)
    assert ("lm_head.weight" in written.asked) == (not tied)


def test_dtype_is_honoured(written: Written) -> None:
    model = load(written.folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    indices = {name: buffer for name, buffer in model.named_buffers() if name in written.state}
    assert all(torch.equal(buffer, written.state[name]) for name, buffer in indices.items())
    assert model(tokens()).logits.dtype == torch.bfloat16


# One architecture


@pytest.mark.parametrize(
    "device_map",
    ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}],
    ids=["cpu", "auto", "root", "parts"],
)
def test_device_map_is_honoured(llama: Written, device_map: str | dict[str, str]) -> None:
    model = load(llama.folder, device_map=device_map)
    if device_map != "auto":
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with torch.no_grad():
        ids = tokens().to(model.device)
        expected = llama.model(tokens()).logits
        torch.testing.assert_close(model(ids).logits.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_blocks_offloaded_to_disk(llama: Written, tmp_path: Path) -> None:
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    model = load(
        llama.folder,
        device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert model.get_submodule("model.layers.1.mlp.up_proj").u.is_meta
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens()).logits,
            llama.model(tokens()).logits,
            rtol=0,
            atol=300 * torch.finfo(torch.float32).eps,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_written_in_another_type(tmp_path: Path, dtype: torch.dtype) -> None:
    llama = Written(tmp_path, "llama", dtype=dtype)
    model = load(llama.folder)
    assert model.dtype == dtype
    assert torch.equal(model.get_submodule(Q_PROJ).u, llama.state[f"{Q_PROJ}.u"].to(dtype))
    model.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(llama.folder)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_shards(tmp_path: Path, architecture: str) -> None:
    # OPT's fc1 and fc2 sort by their number; ten kilobytes make about eight shards.
    written = Written(tmp_path, architecture, max_shard_size="10KB")
    assert len(list(written.folder.glob("*.safetensors"))) > 3
    model = load(written.folder)
    state = model.state_dict()
    assert all(torch.equal(state[name], written.state[name]) for name in written.asked)
    model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert files(tmp_path / "again") == files(written.folder)
    counts = checkpoint.counts(written.folder, written.linears)
    assert counts["model"] == model.num_parameters()
    checkpoint.verify(written.folder)


def test_shards_are_replaced_by_one_file(tmp_path: Path) -> None:
    Written(tmp_path, "llama", max_shard_size="10KB")
    llama = Written(tmp_path, "llama")
    assert [path.name for path in llama.folder.glob("*.safetensors")] == ["model.safetensors"]
    load(llama.folder)


def test_folder_holds_tokenizer_and_details_but_no_code(llama: Written) -> None:
    assert sorted(path.name for path in llama.folder.iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    tokenizer = "tokenizer_config.json"
    assert (llama.folder / tokenizer).read_bytes() == (llama.dense / tokenizer).read_bytes()
    assert json.loads((llama.folder / "config.json").read_text())["quantization_config"] == {
        "quant_method": "aasvd",
        "format_version": 2,
        "storage": "factors",
        "kept": {},
        "ranks": llama.ranks,
        "details": {**DETAILS, "cache_bytes_per_token": latents.summary(load(llama.folder))},
    }


def test_generation_config_of_the_dense_model_is_kept(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    dense.generation_config.top_k = 7
    dense.generation_config.do_sample = True
    dense.save_pretrained(tmp_path / "dense")
    state = dense.state_dict()
    checkpoint.write(
        dense=tmp_path / "dense",
        output=tmp_path / "model",
        ranks={},
        storage="factors",
        details={},
        tensor=state.__getitem__,
        dtype=torch.float32,
    )
    model = load(tmp_path / "model")
    assert model.generation_config.top_k == 7
    # Nothing factored: but for the note in config.json, the dense folder again.
    before, after = files(tmp_path / "dense"), files(tmp_path / "model")
    assert before["model.safetensors"] == after["model.safetensors"]
    assert before["generation_config.json"] == after["generation_config.json"]


def test_header_is_that_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6).reshape(2, 3),
        "a.10": torch.ones(3, dtype=torch.bfloat16),
        "a.9": torch.ones(0, 4, dtype=torch.bfloat16),
        "c": torch.tensor(1.5, dtype=torch.float64),
        "d": torch.tensor([True]),
        "é": torch.ones(2, dtype=torch.float16),
        "f": torch.ones(2, 2),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    weights.write_safetensors(tmp_path / "ours", meta, tensors.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_model_trains(llama: Written) -> None:
    model = load(llama.folder)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("architecture", "storage"), [("llama", "pivoted-int8"), ("phi3", "factors")])
def test_outline_says_what_a_cache_takes(architecture: str, storage: str, tmp_path: Path) -> None:
    written = Written(tmp_path, architecture, storage=storage)
    outline = checkpoint.outline(written.folder)
    assert all(tensor.is_meta for tensor in outline.state_dict().values())
    found = latents.summary(outline)
    assert found == latents.summary(load(written.folder))
    # In config.json too, so that a folder says by itself whether that cache is of use.
    config = json.loads((written.folder / "config.json").read_text())["quantization_config"]
    assert config["details"] == {**DETAILS, "cache_bytes_per_token": found}
    if architecture == "llama":  # two layers of 2 * 16 numbers, or of 2 * 5 latents and 16 cosines and sines
        assert found == {"ordinary": 2 * 32 * 4, "latents": (2 * 10 + 16) * 4, "reason": ""}
    else:
        assert (found["ordinary"], found["latents"]) == (None, None)
        assert "0 attention modules with k_proj and v_proj" in str(found["reason"])


def test_other_heads(llama: Written) -> None:
    backbone = AutoModel.from_pretrained(llama.folder)
    with torch.no_grad():
        hidden = backbone(tokens()).last_hidden_state
        logits = nn.functional.linear(hidden, llama.state["lm_head.weight"])
        expected = llama.model(tokens()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=300 * torch.finfo(torch.float32).eps)
    classifier = AutoModelForSequenceClassification.from_pretrained(llama.folder)
    assert torch.equal(classifier.get_submodule(Q_PROJ).u, llama.state[f"{Q_PROJ}.u"])
    edit_tensors(llama.folder, lambda tensors: tensors.pop(f"{Q_PROJ}.u"))
    for cls in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=rf"lacks 1 tensors .*{Q_PROJ}\.u"):
            cls.from_pretrained(llama.folder)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
def test_backbones_are_saved_and_opened_again_with_and_without_head(
    architecture: str, tmp_path: Path
) -> None:
    written = Written(tmp_path, architecture, keep_dense=1, storage="pivoted")
    AutoModel.from_pretrained(written.folder).save_pretrained(tmp_path / "backbone")
    backbone = AutoModel.from_pretrained(tmp_path / "backbone")
    prefix = f"{backbone.base_model_prefix}."
    assert backbone.config.quantization_config.ranks == {
        name.removeprefix(prefix): rank for name, rank in written.ranks.items()
    }
    state = backbone.state_dict()
    assert all(torch.equal(tensor, written.state[prefix + name]) for name, tensor in state.items())
    backbone.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "backbone/model.safetensors"
    ).read_bytes()
    # With its head back in place it is what it was.
    model = load(tmp_path / "backbone")
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(load(written.folder).get_output_embeddings().weight)
        assert torch.equal(model(tokens()).logits, load(written.folder)(tokens()).logits)
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (
        written.folder / "model.safetensors"
    ).read_bytes()
    assert load(tmp_path / "whole").config.quantization_config.ranks == written.ranks
    lost = next(name for name in state if name.endswith(".rows"))
    edit_tensors(tmp_path / "backbone", lambda tensors: tensors.pop(lost))
    with pytest.raises(ValueError, match=rf"lacks 1 tensors of .*, the first is {lost}"):
        load(tmp_path / "backbone")


@pytest.mark.parametrize(
    "first",
    [
        "import aasvd; from transformers import LlamaForCausalLM",
        "import transformers.modeling_utils, aasvd",
        "import aasvd.checkpoint; aasvd.checkpoint.register()",
        "import aasvd.fusion",
        "import aasvd.stages",
    ],
)
def test_importing_registers_in_any_order(first: str) -> None:
    check = (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "assert AUTO_QUANTIZER_MAPPING['aasvd'].__name__ == 'AasvdQuantizer'\n"
        "assert AUTO_QUANTIZATION_CONFIG_MAPPING['aasvd'].__name__ == 'AasvdConfig'\n"
    )
    done = subprocess.run([sys.executable, "-c", f"{first}\n{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What goes wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, r"format_version is 3.*reads 1 and 2"),
        ({"format_version": 1}, rf"holds 14 tensors that LlamaForCausalLM does not have, .*{MARKER}"),
        ({"quant_method": "other"}, r"quantization_config\.quant_method is 'other': expected 'aasvd'"),
        ({"quant_method": "fp8"}, r"quantization_config\.quant_method is 'fp8': expected 'aasvd'"),
        ({"quant_method": ...}, r"quantization config .* has no `quant_method` attribute"),
        ({"load_in_8bit": True}, r"unknown key 'load_in_8bit'"),
        ({"format_version": True}, r"format_version is True"),
        ({"format_version": ...}, r"format_version is None"),
        ({"storage": "zip"}, r"storage is 'zip': expected one of factors, pivoted"),
        ({"storage": "pivoted"}, r"lacks 42 tensors .*rows|lacks 42 tensors .*coefficients"),
        ({"storage": []}, r"storage is \[\]"),
        ({"surprise": 1}, r"unknown key 'surprise'"),
        ({"ranks": ...}, r"ranks is None"),
        ({"ranks": [1]}, r"ranks is \[1\]"),
        ({"ranks": {Q_PROJ: 0}}, rf"ranks\['{Q_PROJ}'\] is 0: expected a positive integer"),
        ({"ranks": {Q_PROJ: -3}}, r"is -3: expected a positive integer"),
        ({"ranks": {Q_PROJ: 2.0}}, r"is 2\.0: expected a positive integer"),
        ({"ranks": {Q_PROJ: "2"}}, r"is '2': expected a positive integer"),
        ({"ranks": {Q_PROJ: True}}, r"is True: expected a positive integer"),
        ({"ranks": {Q_PROJ: 33}}, rf"rank 33 of '{Q_PROJ}' exceeds .* 32 x 32"),
        ({"ranks": {"model.layers.9.mlp": 2}}, r"'model.layers.9.mlp', which LlamaForCausalLM does not have"),
        ({"ranks": {"model.norm": 2}}, r"'model.norm', .* has as LlamaRMSNorm"),
        ({"ranks": {"": 2}}, r"'', .* has as LlamaForCausalLM"),
        ({"ranks": {}}, r"holds 28 tensors that LlamaForCausalLM does not have"),
        ({"details": []}, r"details is \[\]"),
    ],
)
def test_malformed_config(llama: Written, changes: dict[str, object], message: str) -> None:
    edit_config(llama.folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(llama.folder)


def test_wrong_rank(llama: Written) -> None:
    edit_config(llama.folder, ranks={**llama.ranks, Q_PROJ: RANK - 1})
    with pytest.raises(ValueError, match=rf"{Q_PROJ}\.. with shape .*5.*: the model has .*4"):
        load(llama.folder)
    with pytest.raises(ValueError, match=Q_PROJ):
        load(llama.folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("missing", [f"{Q_PROJ}.u", f"{Q_PROJ}.v", "model.norm.weight", "lm_head.weight"])
def test_missing_tensor(llama: Written, missing: str) -> None:
    edit_tensors(llama.folder, lambda tensors: tensors.pop(missing))
    with pytest.raises(ValueError, match=rf"lacks 1 tensors of LlamaForCausalLM, the first is {missing}"):
        load(llama.folder)


def test_folders_of_the_first_format_open_and_are_saved_as_they_are(llama: Written, tmp_path: Path) -> None:
    expected = load(llama.folder)(tokens()).logits
    edit_tensors(llama.folder, lambda tensors: [tensors.pop(name) for name in llama.markers])
    with pytest.raises(ValueError, match=r"lacks 14 tensors of LlamaForCausalLM"):
        load(llama.folder)
    edit_config(llama.folder, format_version=1)
    (llama.folder / "SHA256SUMS").unlink()
    model = load(llama.folder)
    assert torch.equal(model(tokens()).logits, expected)
    model.save_pretrained(tmp_path / "again")
    again = weights.stored_tensors([tmp_path / "again" / "model.safetensors"])
    assert sorted(again) == sorted(llama.asked)
    assert torch.equal(load(tmp_path / "again")(tokens()).logits, expected)


def test_missing_tied_tensor(tmp_path: Path) -> None:
    qwen2 = Written(tmp_path, "qwen2")
    edit_tensors(qwen2.folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* model\.embed_tokens\.weight"):
        load(qwen2.folder)


def test_unexpected_tensor(llama: Written) -> None:
    edit_tensors(llama.folder, lambda tensors: tensors.update({f"{Q_PROJ}.w": torch.ones(32, 32)}))
    with pytest.raises(ValueError, match=rf"holds 1 tensors that .* {Q_PROJ}\.w"):
        load(llama.folder)


def test_dense_weight_of_a_compressed_linear(llama: Written) -> None:
    edit_tensors(llama.folder, lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.ones(32, 32)}))
    with pytest.raises(ValueError, match=rf"{Q_PROJ}\.weight with shape \(32, 32\): the model has \(0,\)"):
        load(llama.folder)


def test_factor_of_integers(llama: Written) -> None:
    name = f"{Q_PROJ}.u"
    edit_tensors(llama.folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    with pytest.raises(ValueError, match=r"as I32: expected floating-point"):
        load(llama.folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda order: order.new_zeros(len(order)), r"is not an order of the numbers 0 to 31"),
        (lambda order: order + 1, r"is not an order of the numbers 0 to 31"),
        (lambda order: -order, r"is not an order of the numbers 0 to 31"),
        (lambda order: order[:-1].clone(), r"with shape \(31,\): the model has \(32,\)"),
        (lambda order: order.to(torch.int64), r"as I64: expected I32"),
        (lambda order: order.to(torch.float32), r"as F32: expected I32"),
    ],
)
def test_bad_order_of_rows(tmp_path: Path, edit: Callable[[Tensor], Tensor], message: str) -> None:
    llama = Written(tmp_path, "llama", storage="pivoted")
    name = f"{Q_PROJ}.order"
    edit_tensors(llama.folder, lambda tensors: tensors.update({name: edit(tensors[name])}))
    with pytest.raises(ValueError, match=rf"holds {name}.* {message}"):
        load(llama.folder)


@pytest.mark.parametrize("storage", ["remapped", "factors-int8", "pivoted-int8"])
@pytest.mark.parametrize("bits", [0, -1, 0x7C00])
def test_bad_scales(tmp_path: Path, storage: str, bits: int) -> None:
    """Zero, NaN and infinity, as float16 has them."""
    llama = Written(tmp_path, "llama", storage=storage)
    edit_tensors(llama.folder, lambda tensors: tensors[f"{Q_PROJ}.scales"][0, 1:2].fill_(bits))
    with pytest.raises(ValueError, match=rf"{Q_PROJ}\.scales, which holds scales that are not positive"):
        load(llama.folder)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    llama = Written(tmp_path, "llama", max_shard_size="20KB")
    shards = sorted(llama.folder.glob("*.safetensors"))
    tensors = load_file(shards[0])
    save_file({**tensors, **load_file(shards[1])}, shards[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match="both hold the tensor"):
        load(llama.folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(llama: Written, keep: int) -> None:
    path = llama.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        load(llama.folder)
    with pytest.raises(DamagedArtifactError, match=r"model\.safetensors is damaged"):
        checkpoint.verify(llama.folder)


def test_dense_model_cannot_be_compressed_while_loading(llama: Written) -> None:
    config = checkpoint.AasvdConfig(ranks=llama.ranks, format_version=1)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        load(llama.dense, quantization_config=config)


def test_state_dict_instead_of_a_folder(llama: Written) -> None:
    config = AutoConfig.from_pretrained(llama.folder)
    with pytest.raises(ValueError, match="read from the safetensors files of its folder"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=llama.state)


def test_verify_names_the_damage(llama: Written, tmp_path: Path) -> None:
    checkpoint.verify(llama.folder)
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=llama.folder).returncode == 0
    path = llama.folder / "config.json"
    original = path.read_bytes()
    path.write_bytes(original.replace(b"5", b"6", 1))
    with pytest.raises(DamagedArtifactError, match=rf"config\.json is damaged(?s:.*)--force {llama.folder}"):
        checkpoint.verify(llama.folder)
    path.unlink()
    with pytest.raises(DamagedArtifactError, match=r"config\.json is missing"):
        checkpoint.verify(llama.folder)
    (llama.folder / "SHA256SUMS").write_text("what\n")
    with pytest.raises(DamagedArtifactError, match=r"SHA256SUMS is damaged"):
        checkpoint.verify(llama.folder)
    (llama.folder / "SHA256SUMS").write_text("")
    with pytest.raises(DamagedArtifactError, match=r"SHA256SUMS is empty"):
        checkpoint.verify(llama.folder)
    (llama.folder / "SHA256SUMS").unlink()
    with pytest.raises(DamagedArtifactError, match=r"SHA256SUMS is missing"):
        checkpoint.verify(llama.folder)


def test_added_file_is_listed_and_links_stay_as_they_were(llama: Written, tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    for file in llama.folder.iterdir():
        (published / file.name).hardlink_to(file)
    before = (llama.folder / "SHA256SUMS").read_text()
    for text in ("first", "second"):
        checkpoint.add_file(published, "README.md", text)
    assert (published / "README.md").read_text() == "second"
    assert (published / "SHA256SUMS").read_text().count("README.md") == 1
    checkpoint.verify(published)
    assert (llama.folder / "SHA256SUMS").read_text() == before
    load(published)


def test_failed_write_leaves_the_former_checkpoint(llama: Written) -> None:
    before = files(llama.folder)

    def failing(name: str) -> Tensor:
        if name == "model.norm.weight":
            raise OSError("No space left on device")
        return llama.state[name]

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(
            dense=llama.dense,
            output=llama.folder,
            ranks=llama.ranks,
            storage="factors",
            details={},
            tensor=failing,
            dtype=torch.float32,
        )
    assert files(llama.folder) == before
    assert sorted(path.name for path in llama.folder.parent.iterdir()) == ["dense", "model"]


def test_remains_of_a_killed_write_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "model-00001-of-00009.safetensors").write_text("half")
    llama = Written(tmp_path, "llama")
    assert not (tmp_path / ".model.tmp").exists()
    checkpoint.verify(llama.folder)
    assert len(list(llama.folder.glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor": lambda name: torch.ones(3, 3)}, r"has shape \(3, 3\): the model has"),
        ({"dtype": torch.float16, "scale": 1e6}, r"is not finite in torch\.float16"),
        ({"ranks": {"lm_head": 2}, "architecture": "qwen2"}, r"'lm_head', whose weight is tied"),
        ({"ranks": {Q_PROJ: 99}}, r"rank 99 of"),
        ({"ranks": {Q_PROJ: 0}}, r"ranks\['.*'\] is 0: expected a positive integer"),
        ({"details": {"loss": float("nan")}}, r"not JSON compliant"),
    ],
)
def test_write_refuses(llama: Written, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    dense = tmp_path / "other"
    tiny_model(change.pop("architecture", "llama")).save_pretrained(dense)
    scale = change.pop("scale", 1.0)
    arguments: dict[str, Any] = {
        "ranks": llama.ranks,
        "storage": "factors",
        "details": {},
        "tensor": lambda name: llama.state[name] * scale,
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        checkpoint.write(dense=dense, output=tmp_path / "new", **{**arguments, **change})
    assert not (tmp_path / "new").exists()


def test_write_refuses_quantized_models_and_foreign_folders(llama: Written, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "ranks": {},
        "storage": "factors",
        "details": {},
        "tensor": llama.tensor,
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match="already quantized"):
        checkpoint.write(dense=llama.folder, output=tmp_path / "new", **arguments)
    (tmp_path / "new").mkdir()
    shutil.copy(llama.dense / "config.json", tmp_path / "new")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.write(dense=llama.dense, output=tmp_path / "new", **arguments)


def test_counts_of_an_incomplete_folder(llama: Written, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        checkpoint.counts(tmp_path, [])
    with pytest.raises(ValueError, match="no weight of the linear other"):
        checkpoint.counts(llama.folder, [*llama.linears, "other"])


@pytest.mark.parametrize("name", TINY)
def test_numbers_of_a_model_are_counted_once_whatever_its_files_hold(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    masks = {"model.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}
    head = {"lm_head.weight": model.get_output_embeddings().weight.detach().clone()}
    save_file({**load_file(file), **masks, **head}, file, metadata={"format": "pt"})
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert checkpoint.parameter_count(skeleton(tmp_path).model) == expected
