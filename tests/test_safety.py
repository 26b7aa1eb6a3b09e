"""The loader under damaged and hostile folders: a clear error or the very same model, never anything else."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint import Q_PROJ, Written, load, tokens
from test_pruned import Written as Pruned
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from aasvd.checkpoint import METHOD
from aasvd.formats import FORMATS

SEARCH = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module", params=list(FORMATS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp(request.param), "llama", storage=request.param)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return Pruned(tmp_path_factory.mktemp("pruned"), "llama")


@pytest.fixture(scope="module")
def expected_logits(written: Written) -> Tensor:
    with torch.no_grad():
        return load(written.folder)(tokens()).logits


def state(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load(folder).state_dict().items()}


def refused_or_same(folder: Path, expected: dict[str, Tensor]) -> None:
    """Load a folder; a ValueError with a message is fine, and so is the model that was written."""
    try:
        found = state(folder)
    except ValueError as error:
        assert len(str(error)) > 20, repr(error)
        return
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def copied(written: Written | Pruned, folder: Path, *, checksums: bool) -> Path:
    target = folder / "copy"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(written.folder, target)
    if not checksums:
        (target / "SHA256SUMS").unlink()
    return target


@contextlib.contextmanager
def mutated(written: Written | Pruned, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a quantization_config to change; then it is refused, or the model is the one that was written.

    Without SHA256SUMS, so that the checks of the config itself are what is tested.
    """
    target = copied(written, folder, checksums=False)
    config = json.loads((target / "config.json").read_text())
    yield config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    refused_or_same(target, written.state)


@SEARCH
@given(data=st.data())
def test_mutated_quantization_config(written: Written, tmp_path: Path, data: st.DataObject) -> None:
    with mutated(written, tmp_path) as quantization:
        kind = data.draw(st.sampled_from(["value", "remove", "add", "rank", "name", "storage"]))
        key = data.draw(st.sampled_from(["format_version", "storage", "ranks"]))
        if kind == "value":
            quantization[key] = data.draw(JSON)
        elif kind == "remove":
            del quantization[key]
        elif kind == "add":
            quantization[data.draw(st.text(min_size=1, max_size=5))] = data.draw(JSON)
        elif kind == "rank":
            quantization["ranks"][Q_PROJ] = data.draw(JSON | st.integers(-3, 40))
        elif kind == "name":
            names = st.text(max_size=8) | st.sampled_from(["model", "lm_head", "model.norm", f"{Q_PROJ}.u"])
            quantization["ranks"][data.draw(names)] = data.draw(st.integers(1, 40))
        else:
            quantization["storage"] = data.draw(st.sampled_from(list(FORMATS)))


@SEARCH
@given(data=st.data())
def test_mutated_kept_sizes(pruned: Pruned, tmp_path: Path, data: st.DataObject) -> None:
    with mutated(pruned, tmp_path) as quantization:
        kept = quantization["kept"]
        name = data.draw(st.sampled_from(sorted(kept)))
        kind = data.draw(st.sampled_from(["value", "remove", "size", "sizes", "name", "both"]))
        if kind == "value":
            quantization["kept"] = data.draw(JSON)
        elif kind == "remove":
            del kept[name]
        elif kind == "size":
            kept[name] = data.draw(JSON)
        elif kind == "sizes":
            kept[name] = data.draw(st.lists(st.integers(-2, 50), min_size=1, max_size=3))
        elif kind == "name":
            names = st.text(max_size=8) | st.sampled_from(["model", "lm_head", "model.norm", f"{name}.kept"])
            kept[data.draw(names)] = data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=2))
        else:
            quantization["ranks"][name] = data.draw(st.integers(1, 40))


@SEARCH
@given(data=st.data())
def test_cut_and_flipped_files(written: Written, tmp_path: Path, data: st.DataObject) -> None:
    """Any bit of the weights, half of them in the header, any length; SHA256SUMS tells the rest."""
    folder = copied(written, tmp_path, checksums=True)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        place = data.draw(st.integers(0, header - 1) | st.integers(header, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors|lacks|holds"):
        load(folder)


@SEARCH
@given(data=st.data())
def test_flipped_headers_without_checksums(written: Written, tmp_path: Path, data: st.DataObject) -> None:
    """A header alone cannot say everything, but what it says wrong must not crash the loader."""
    folder = copied(written, tmp_path, checksums=False)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 8 + int.from_bytes(content[:8], "little") - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    refused_or_same(folder, written.state)


def changed(written: Written | Pruned, folder: Path, *, checksums: bool, **changes: object) -> Path:
    """Copy a folder and change keys of its config.json; a value of Ellipsis removes the key."""
    target = copied(written, folder, checksums=checksums)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config))
    return target


@SEARCH
@given(quantization=JSON, checksums=st.booleans())
def test_quantization_config_that_is_something_else(
    pruned: Pruned, tmp_path: Path, quantization: object, checksums: bool
) -> None:
    folder = changed(pruned, tmp_path, checksums=checksums, quantization_config=quantization)
    # Where there is none, it is transformers that refuses: the shapes are not those of a dense model.
    with pytest.raises(RuntimeError if quantization is None else ValueError) as error:
        load(folder)
    assert len(str(error.value)) > 20


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (..., "ignore_mismatched_sizes"),
        (None, "ignore_mismatched_sizes"),
        ({"quant_method": "other"}, "ignore_mismatched_sizes"),
        ([], r"config\.json: quantization_config is \[\]: expected an object"),
        ("x", r"config\.json: quantization_config is 'x': expected an object"),
        (False, r"config\.json: quantization_config is False: expected an object"),
        ({}, "quant_method"),
    ],
    ids=repr,
)
def test_dense_config_beside_compressed_weights(
    written: Written, tmp_path: Path, checksums: bool, quantization: object, message: str
) -> None:
    folder = changed(written, tmp_path, checksums=checksums, quantization_config=quantization)
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(folder)


def test_pruned_weights_are_not_taken_for_dense_ones(pruned: Pruned, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(changed(pruned, tmp_path, checksums=True, quantization_config=...))


def test_another_method_of_quantization_is_refused(pruned: Pruned, tmp_path: Path) -> None:
    """Every one that transformers knows, whether or not its package is installed."""
    for method in set(AUTO_QUANTIZATION_CONFIG_MAPPING) - {METHOD}:
        folder = changed(pruned, tmp_path, checksums=False, quantization_config={"quant_method": method})
        with pytest.raises((ValueError, RuntimeError, ImportError, TypeError)) as error:
            load(folder)
        assert len(str(error.value)) > 20, (method, error.value)


def test_without_this_package_transformers_refuses(tmp_path: Path) -> None:
    written = Written(tmp_path, "llama", storage="pivoted")
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(written.folder)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr.splitlines()[-1], done.stderr
    assert Q_PROJ.replace(".0.", ".{0, 1}.") in done.stderr


# Keys that say which tensors there are, of which shapes and types; others change what is computed with them,
# which SHA256SUMS alone can tell.
SHAPING = {
    "architectures": st.none() | st.lists(st.sampled_from(["LlamaForCausalLM", "OPTForCausalLM", "x"])),
    "dtype": st.sampled_from(["float16", "bfloat16", "float64", "int8", "torch", "x"]),
    "hidden_size": st.integers(-1, 70),
    "intermediate_size": st.integers(-1, 70),
    "num_hidden_layers": st.integers(-1, 5),
    "num_key_value_heads": st.sampled_from([-1, 0, 1, 3, 4]),
    "tie_word_embeddings": st.booleans(),
    "vocab_size": st.integers(-1, 200),
    "attention_bias": st.booleans(),
}


@SEARCH
@given(data=st.data())
def test_mutated_shapes_in_the_config(
    written: Written, expected_logits: Tensor, tmp_path: Path, data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(list(SHAPING)))
    value = data.draw(SHAPING[key] | JSON)
    folder = changed(written, tmp_path, checksums=data.draw(st.booleans()), **{key: value})
    try:
        model = load(folder)
    except Exception as error:  # transformers' own checks of a config raise what they like
        assert len(str(error)) > 10, repr(error)
        return
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, expected_logits), (key, value)


@SEARCH
@given(data=st.data())
def test_any_mutated_key_beside_checksums(pruned: Pruned, tmp_path: Path, data: st.DataObject) -> None:
    config = json.loads((pruned.folder / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    value = data.draw(JSON.filter(lambda value: value != config[key]))
    with pytest.raises(Exception) as error:
        load(changed(pruned, tmp_path, checksums=True, **{key: value}))
    assert len(str(error.value)) > 10, (key, value)


def test_folders_code_is_never_run(written: Written, tmp_path: Path) -> None:
    folder = copied(written, tmp_path, checksums=False)
    marker = tmp_path / "ran"
    names = "LlamaForCausalLM as Mine, LlamaConfig as Config"
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import {names}\n"
    (folder / "mine.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    load(folder, trust_remote_code=False)
    assert not marker.exists()


def test_changed_config_beside_checksums(written: Written, tmp_path: Path) -> None:
    folder = copied(written, tmp_path, checksums=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match=r"config\.json is damaged or was changed.*remove SHA256SUMS"):
        load(folder)
    (folder / "SHA256SUMS").unlink()
    assert load(folder).config.rms_norm_eps == 0.5
