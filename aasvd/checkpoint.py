"""The checkpoint: an ordinary Hugging Face folder some of whose linears are stored as low-rank ones.

`config.json` says which linears, in which format and to which rank, under `quantization_config`. Once this
module is registered with transformers (importing `aasvd` is enough), `from_pretrained` puts the format's
layer in the place of each of them before it reads the weights; model code stays transformers'
own and nothing from the folder is executed. transformers only warns about absent and left-over tensors, and
fills the gaps at random; here the safetensors headers are compared with the model first and each such
difference is an error. Where this module is not asked, since it was not imported or config.json has lost its
`quantization_config`, transformers finds an empty weight for each of these linears and refuses that.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import wrapt
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from aasvd.artifacts import DamagedArtifactError, digest, remake_command, replacing, replacing_folder
from aasvd.formats import FORMATS, MARKER, replace_linears
from aasvd.fusion import fuse
from aasvd.lowrank import CompressedLinear
from aasvd.pruned import PrunedLinear
from aasvd.weights import TYPE_NAMES, StoredTensor, stored_tensors, weight_files, write_safetensors

METHOD = "aasvd"
FORMAT_VERSION = 2
# Version 1 has no `aasvd.formats.MARKER`; such a folder opens as ever, and is saved again as it is.
READABLE_VERSIONS = (1, FORMAT_VERSION)
_FLOATS = ("F16", "BF16", "F32", "F64")
CHECKSUMS = "SHA256SUMS"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class AasvdConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    Attributes:
        ranks: Rank of each factored linear, by its module name in the causal language model.
        storage: How a factored linear is stored, one of `aasvd.formats.FORMATS`.
        kept: Rows and columns that stay of each pruned linear, by its module name.
        format_version: Version of this layout.
        details: Where the numbers come from: objective, allocation, ratio and so on (not what the method is
            called), and what a cache of latents saves; not interpreted here.
    """

    def __init__(
        self,
        *,
        ranks: Mapping[str, int] | None = None,
        storage: str = "factors",
        kept: Mapping[str, Sequence[int]] | None = None,
        format_version: int | None = None,
        details: Mapping[str, object] | None = None,
        quant_method: str = METHOD,
        **unknown: object,
    ) -> None:
        """Check every field, since they may come from anybody's config.json.

        Raises:
            ValueError: If a field is missing, unknown or of the wrong type, or its value is not supported.
        """
        if quant_method != METHOD:
            raise ValueError(f"quantization_config.quant_method is {quant_method!r}: expected {METHOD!r}")
        if type(format_version) is not int or format_version not in READABLE_VERSIONS:
            raise ValueError(
                f"quantization_config.format_version is {format_version!r}: this version of aasvd reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}"
            )
        if unknown:
            raise ValueError(f"quantization_config has the unknown key {min(unknown)!r}")
        if not isinstance(storage, str) or storage not in FORMATS:
            raise ValueError(
                f"quantization_config.storage is {storage!r}: expected one of {', '.join(FORMATS)}"
            )
        if not isinstance(ranks, Mapping):
            raise ValueError(
                f"quantization_config.ranks is {ranks!r}: expected an object of module names and ranks"
            )
        for name, rank in ranks.items():
            if type(rank) is not int or rank < 1:
                raise ValueError(
                    f"quantization_config.ranks[{name!r}] is {rank!r}: expected a positive integer"
                )
        if not isinstance(kept, Mapping | None):
            raise ValueError(
                f"quantization_config.kept is {kept!r}: expected an object of module names and sizes"
            )
        for name, size in (kept or {}).items():
            whole = isinstance(size, list | tuple) and [type(number) for number in size] == [int, int]
            if not whole or name in ranks:
                raise ValueError(
                    f"quantization_config.kept[{name!r}] is {size!r}: expected how many rows and columns "
                    "stay of a linear without rank"
                )
        if not isinstance(details, Mapping | None):
            raise ValueError(f"quantization_config.details is {details!r}: expected an object")
        self.quant_method = METHOD
        self.format_version = format_version
        self.storage = storage
        self.ranks = dict(ranks)
        self.kept = {name: list(size) for name, size in (kept or {}).items()}
        self.details = dict(details or {})

    @property
    def marked(self) -> bool:
        """Say whether each compressed linear has its `aasvd.formats.MARKER`."""
        return self.format_version > 1


class AasvdQuantizer(HfQuantizer):
    """Lets transformers load, save, train and compile a compressed model.

    Floating-point tensors are ordinary parameters in the type and on the device that `from_pretrained` was
    asked for; integers are buffers that keep theirs.
    """

    # Factors come from a checkpoint; transformers refuses by itself to "quantize" a dense model on the fly.
    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: object
    ) -> Any:
        """Put the low-rank modules in place and compare the model with the files it will be read from."""
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ValueError(
                "a compressed model is read from the safetensors files of its folder, "
                f"not from {checkpoint_files}"
            )
        name = type(model).__name__
        own = name in (model.config.architectures or [name])
        stored = stored_tensors([Path(file) for file in checkpoint_files])
        theirs, ours = ("", "") if own else _prefixes(model, stored)
        config = self.quantization_config
        compressed = {*config.ranks, *config.kept}
        # The config gets the model's names: `save_pretrained` writes it beside tensors of these names.
        for field in ("ranks", "kept"):
            sizes = getattr(config, field).items()
            inside = {ours + key.removeprefix(theirs): size for key, size in sizes if key.startswith(theirs)}
            setattr(config, field, inside)
        replace_linears(model, config.ranks, storage=config.storage, kept=config.kept, marked=config.marked)
        expected = {theirs + key.removeprefix(ours): value for key, value in saved_tensors(model).items()}
        # Under another head than the stored one, transformers starts the new head and drops the old one, as
        # with any checkpoint; only the factors have no start of their own.
        required = set(expected) if own else {key for key in expected if _module(key) in compressed}
        folder = Path(checkpoint_files[0]).parent
        if missing := sorted(required - set(stored)):
            raise ValueError(f"{folder} lacks {len(missing)} tensors of {name}, the first is {missing[0]}")
        if own and (unexpected := sorted(set(stored) - set(expected))):
            raise ValueError(
                f"{folder} holds {len(unexpected)} tensors that {name} does not have, "
                f"the first is {unexpected[0]}"
            )
        for key in sorted(expected.keys() & stored.keys()):
            _check_stored(key, expected[key], stored[key])
            if _module(key) in compressed:
                layer = model.get_submodule(ours + _module(key).removeprefix(theirs))
                _check_overhead(key, stored[key], layer)
        _check_type(folder, stored)
        _check_digests(folder, [Path(file) for file in checkpoint_files])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: object) -> Any:
        """Let linears that read the same input share their first product, where all weights are in memory.

        Empty tensors get memory of no address.
        """
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.numel():
                # As read, it points at memory of the reader, which `save_pretrained` would group shards by.
                tensor.data = torch.empty_like(tensor)
        if not any(parameter.is_meta for parameter in model.parameters()):
            fuse(model)
        return model

    def is_serializable(self) -> bool:
        """Say that `save_pretrained` works: parameters and config.json hold everything."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that adapters may be trained on the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Say that the model's own parameters may be trained: the factors are ordinary ones."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Say that the model may be compiled."""
        return True


def register() -> None:
    """Make transformers know the format; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(AasvdConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(AasvdQuantizer)
        wrapt.wrap_function_wrapper(PreTrainedConfig, "from_dict", _checking_first)


def saved_tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors that `save_pretrained` writes for a transformers model, in its order.

    These are the state without aliases of tied weights. `save_pretrained` of a loaded model sorts it by
    name, with numbers as numbers, which decides what goes into which shard.
    """
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    state = model.state_dict()
    return {name: state[name] for name in sorted(state, key=_natural_key) if name not in left_out}


def parameter_count(model: Any) -> int:
    """Return how many numbers a checkpoint of a transformers model holds; others' files may hold more.

    A tied output layer is stored twice by some, and masks and frequencies that models make by themselves.
    """
    return sum(tensor.numel() for tensor in saved_tensors(model).values())


def outline(folder: Path) -> Any:
    """Return the causal model of a checkpoint with its compressed layers on the meta device, unfilled."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return _unfilled(config, AasvdConfig(**config.quantization_config), dtype=config.dtype)


def _unfilled(config: Any, stored: AasvdConfig, *, dtype: torch.dtype) -> Any:
    """Return a causal model with compressed layers on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    replace_linears(model, stored.ranks, storage=stored.storage, kept=stored.kept, marked=stored.marked)
    return model


def counts(folder: Path, linears: Sequence[str]) -> dict[str, int]:
    """Count what a checkpoint stores, dense or compressed, from its headers.

    Args:
        folder: A folder with safetensors files.
        linears: Module names of the linears that compression is about, factored or kept dense.

    Returns:
        `linears`: numbers of those modules' weights in whatever form, without biases; `model`: numbers of
        all tensors; `bytes`: size of the weight files. Indices and scales are no numbers, but have bytes.

    Raises:
        ValueError: If the folder holds no weights in safetensors, or nothing of one of the linears.
    """
    files = weight_files(folder)
    overhead = {leaf for layer in FORMATS.values() for leaf in layer.OVERHEAD} | {*PrunedLinear.OVERHEAD}
    numbers = dict.fromkeys(linears, 0)
    found: set[str] = set()
    total = 0
    for name, tensor in stored_tensors(files).items():
        module, _, leaf = name.rpartition(".")
        if module in numbers and (leaf in overhead or (leaf == MARKER and tensor.shape == (0,))):
            continue
        elements = torch.Size(tensor.shape).numel()
        total += elements
        if module in numbers and leaf != "bias":
            numbers[module] += elements
            found.add(module)
    if absent := [name for name in numbers if name not in found]:
        raise ValueError(f"{folder} holds no weight of the linear {absent[0]}")
    return {
        "linears": sum(numbers.values()),
        "model": total,
        "bytes": sum(file.stat().st_size for file in files),
    }


def write(
    *,
    dense: Path,
    output: Path,
    ranks: Mapping[str, int],
    storage: str,
    kept: Mapping[str, Sequence[int]] | None = None,
    details: Mapping[str, object],
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_size: int | str | None = None,
) -> None:
    """Assemble a checkpoint byte for byte as `save_pretrained` would, holding one tensor at a time.

    The folder appears under its name when it is complete and on disk; a former checkpoint of that name is
    replaced.

    Args:
        dense: Folder of the dense model: config.json and, if they exist, generation_config.json and the
            tokenizer's files; its weights are not read.
        output: Folder to make.
        ranks: Rank of each factored linear, by module name; all others stay dense.
        storage: How these are stored, one of `aasvd.formats.FORMATS`.
        kept: Rows and columns that stay of each pruned linear, by module name.
        details: Recorded in config.json as they are, beside what the cache of a token takes and whether one
            of latents would save anything (`aasvd.latents.summary`); must be JSON without NaN.
        tensor: Returns the tensor of a name of the compressed model's state, such as
            `model.layers.0.self_attn.q_proj.u` or `model.norm.weight`, in any type, on any device. Called
            once for each name, but for the empty `weight` of compressed linears.
        dtype: Type of the stored parameters.
        max_shard_size: Split the weights into files of at most this size, given as transformers has it
            (`5GB`); by default transformers' own default.

    Raises:
        ValueError: If the dense folder is quantized, the ranks do not fit the model, `details` holds NaN, a
            tensor has another shape than the model's or is not finite in `dtype`, or `output` is a folder of
            something else.
    """
    if output.exists() and any(output.iterdir()) and not (output / CHECKSUMS).exists():
        raise ValueError(f"{output} exists and is not a checkpoint (it has no {CHECKSUMS}): remove it first")
    config = AutoConfig.from_pretrained(dense, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{dense} is already quantized: its config.json has a quantization_config")
    quantization = AasvdConfig(
        ranks=ranks, storage=storage, kept=kept, details={}, format_version=FORMAT_VERSION
    )
    model = _unfilled(config, quantization, dtype=dtype)
    # Not above: transformers' caches may be what is importing transformers, and so this module, just now.
    from aasvd import latents

    described = {**details, "cache_bytes_per_token": latents.summary(model)}
    quantization.details = json.loads(json.dumps(described, allow_nan=False))
    model.config.quantization_config = quantization
    markers = {f"{name}.{MARKER}" for name in (*quantization.ranks, *quantization.kept)}

    def stored(name: str) -> Tensor:
        return torch.empty(0) if name in markers else tensor(name)

    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    with replacing_folder(output) as staging:
        model.config.save_pretrained(staging)
        if model.can_generate():
            has_own = (dense / "generation_config.json").exists()
            generation = GenerationConfig.from_pretrained(dense) if has_own else model.generation_config
            generation.save_pretrained(staging)
        for name in TOKENIZER_FILES:
            if (dense / name).exists():
                shutil.copyfile(dense / name, staging / name)
        _write_weights(model, folder=staging, tensor=stored, max_shard_size=max_shard_size)
        lines = [f"{digest(path)}  {path.name}\n" for path in sorted(staging.iterdir())]
        (staging / CHECKSUMS).write_text("".join(lines))


def add_file(folder: Path, name: str, text: str) -> None:
    """Add a text file to a checkpoint and to its SHA256SUMS; links to files elsewhere are replaced."""
    with replacing(folder / name) as temporary:
        temporary.write_text(text)
    lines = (folder / CHECKSUMS).read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.rstrip("\n").partition("  ")[2] != name]
    kept.append(f"{digest(folder / name)}  {name}\n")
    with replacing(folder / CHECKSUMS) as temporary:
        temporary.write_text("".join(sorted(kept, key=lambda line: line.partition("  ")[2])))


def verify(folder: Path) -> None:
    """Compare a checkpoint's files with its SHA256SUMS.

    Raises:
        DamagedArtifactError: If the list or a file in it is missing, or a file's bytes differ.
    """
    checksums = folder / CHECKSUMS
    # The list is what a rule makes; Snakemake knows no folder by this name.
    remedy = f"remake the checkpoint with\n    {remake_command(checksums)}"
    if not checksums.exists():
        raise DamagedArtifactError(f"{checksums} is missing; {remedy}")
    lines = checksums.read_text().splitlines()
    if not lines:
        raise DamagedArtifactError(f"{checksums} is empty; {remedy}")
    for line in lines:
        expected, separator, name = line.partition("  ")
        if not separator:
            raise DamagedArtifactError(f"{checksums} is damaged: it has the line {line!r}; {remedy}")
        if not (folder / name).exists():
            raise DamagedArtifactError(f"{folder / name} is missing; {remedy}")
        found = digest(folder / name)
        if found != expected:
            raise DamagedArtifactError(
                f"{folder / name} is damaged: its sha256 is {found[:12]}... "
                f"but {expected[:12]}... was recorded; {remedy}"
            )


def _write_weights(
    model: Any, *, folder: Path, tensor: Callable[[str], Tensor], max_shard_size: int | str | None
) -> None:
    """Write the safetensors files of a model on the meta device, and their index if there are several."""
    tensors = saved_tensors(model)
    if max_shard_size is None:
        max_shard_size = inspect.signature(model.save_pretrained).parameters["max_shard_size"].default
    split = split_torch_state_dict_into_shards(
        # `save_pretrained` keeps together what begins at the same address, as all empty tensors do.
        {name: value if value.numel() else torch.empty(0) for name, value in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with tqdm(total=len(tensors), desc="Writing tensors", unit="tensor") as progress:

        def checked(name: str) -> Tensor:
            progress.update()
            return _checked(name, tensor(name), like=tensors[name])

        for file, names in split.filename_to_tensors.items():
            write_safetensors(folder / file, {name: tensors[name] for name in names}, checked)
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)


def _checked(name: str, value: Tensor, *, like: Tensor) -> Tensor:
    """Return a tensor in host memory in the model's type, or say what is wrong with it."""
    if value.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: the model has {tuple(like.shape)}")
    value = value.detach().to("cpu", like.dtype).contiguous()
    # A value that is fine in float32 may overflow in float16.
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ValueError(f"{name} is not finite in {like.dtype}")
    return value


def _check_stored(name: str, expected: Tensor, stored: StoredTensor) -> None:
    """Raise ValueError unless a stored tensor has the model's shape and kind of number."""
    if stored.shape != tuple(expected.shape):
        raise ValueError(
            f"{stored.file} holds {name} with shape {stored.shape}: the model has {tuple(expected.shape)}"
        )
    if expected.is_floating_point():
        if stored.dtype not in _FLOATS:
            raise ValueError(
                f"{stored.file} holds {name} as {stored.dtype}: expected floating-point numbers "
                f"({', '.join(_FLOATS)})"
            )
    elif stored.dtype != TYPE_NAMES[expected.dtype]:
        raise ValueError(
            f"{stored.file} holds {name} as {stored.dtype}: expected {TYPE_NAMES[expected.dtype]}"
        )


def _check_type(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError where config.json names a type that no weight is stored in."""
    path = folder / "config.json"
    named = json.loads(path.read_text()).get("dtype") if path.exists() else None
    found = sorted({tensor.dtype for tensor in stored.values()} & {*_FLOATS})
    types = {str(dtype).removeprefix("torch."): name for dtype, name in TYPE_NAMES.items()}
    if named is not None and types.get(str(named), "") not in found:
        raise ValueError(
            f"{path} has the dtype {named!r}, but the weights beside it are stored as {', '.join(found)}; to "
            "compute in another type, open the folder with from_pretrained(..., dtype=...)"
        )


def _checking_first(
    read: Callable[..., Any], _class: object, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Any:
    """Check config.json's `quantization_config` before transformers makes its configuration of the file.

    No later place will do: transformers takes a model whose method it does not know for a dense one, and
    believes everything else to be an object.

    Raises:
        ValueError: If it is no object, or one of ours that is malformed or has another method's name.
    """
    described = arguments[0] if arguments else keywords["config_dict"]
    quantization = described.get("quantization_config")
    if not isinstance(quantization, dict | QuantizationConfigMixin | None):
        raise ValueError(f"config.json: quantization_config is {quantization!r}: expected an object")
    if isinstance(quantization, dict) and {"format_version", "ranks", "storage"} <= quantization.keys():
        AasvdConfig(**quantization)
    return read(*arguments, **keywords)


def _check_digests(folder: Path, weights: Sequence[Path]) -> None:
    """Raise ValueError where config.json or weights are not those that a folder's SHA256SUMS lists.

    A folder without the list, such as `save_pretrained` makes, has nothing to compare with.
    """
    checksums = folder / CHECKSUMS
    if not checksums.exists():
        return
    lines = [line.partition("  ") for line in checksums.read_text(errors="replace").splitlines()]
    listed = {name: expected for expected, _, name in lines}
    for path in (folder / "config.json", *weights):
        if path.name not in listed or digest(path) != listed[path.name]:
            raise ValueError(
                f"{path} is damaged or was changed: it is not the file that {CHECKSUMS} lists. "
                f"Get the folder again, or remove {CHECKSUMS} if the change is meant"
            )


def _check_overhead(name: str, stored: StoredTensor, layer: Any) -> None:
    """Raise ValueError where a tensor of indices or scales of a layer holds what no packing gives."""
    assert isinstance(layer, CompressedLinear | PrunedLinear)
    leaf = name.rpartition(".")[2]
    if leaf not in layer.OVERHEAD:
        return
    with safe_open(stored.file, framework="pt") as file:
        problem = layer.problem(leaf, file.get_tensor(name))
    if problem:
        raise ValueError(f"{stored.file} holds {name}, which {problem}")


def _prefixes(model: Any, stored: Iterable[str]) -> tuple[str, str]:
    """Return what the names of a folder's tensors begin with and a model's do not, and the other way round.

    A model without head (AutoModel) has the names of one with a head less the prefix of its backbone.
    """
    prefix = f"{model.base_model_prefix}."
    prefixed = any(name.startswith(prefix) for name in stored)
    if model.base_model is model:
        return (prefix, "") if prefixed else ("", "")
    return ("", "") if prefixed else ("", prefix)


def _module(name: str) -> str:
    """Return the module of a parameter's name."""
    return name.rpartition(".")[0]


def _natural_key(name: str) -> list[tuple[bool, str, int]]:
    """Return a sort key that puts `layers.2` before `layers.10`, and numbers before words."""
    parts = [(part, part.rstrip("0123456789")) for part in name.split(".")]
    return [(text != "", text, int(part[len(text) :] or -1)) for part, text in parts]


# Also when this module is what first imports transformers' registry: the hook in the package then runs
# while this module is not yet complete.
register()
