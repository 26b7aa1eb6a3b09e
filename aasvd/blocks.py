"""The decoder blocks of any Hugging Face model, one at a time: the only module that knows model classes.

Nothing here is specific to an architecture. The model is built without weights, its
blocks are found as the longest list of equal modules, a block's weights are read when it is needed, its
keyword arguments (rotary embeddings, masks, per-layer differences) are recorded by letting the model
call stand-ins, and linears that read the same tensor are found by watching one call without data.
"""

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights

from aasvd import attention
from aasvd.artifacts import DamagedArtifactError, digest, read_json, remake_command
from aasvd.capture import sharing
from aasvd.likelihood import token_losses

# Left unset, transformers asks whether code that a folder brings along may run, in the middle of a stage.
_OPENING: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def open_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a model folder; its own code is never run."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **_OPENING)
    # A folder may ask for what this machine lacks, such as flash attention; transformers then chooses itself.
    config._attn_implementation = None
    return config


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder; its own code is never run."""
    return AutoTokenizer.from_pretrained(folder, **_OPENING)


def open_model(folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the whole causal model of a folder, dense or compressed; its own code is never run."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, config=open_config(folder), dtype=dtype, **_OPENING
    )
    return model


class Source:
    """A dense model on disk, read one tensor at a time, each verified against its recorded checksum."""

    def __init__(self, path: Path) -> None:
        """Open the model that a `source.json` describes, and verify all of it but the weights.

        Raises:
            DamagedArtifactError: If a file, such as config.json, is not the one that was fetched.
        """
        record = read_json(path)
        self._remedy = f"fetch it again with\n    {remake_command(path)}"
        self.folder = path.parent / record["folder"]
        self.tensors: dict[str, dict[str, Any]] = record["tensors"]
        for name, expected in record["files"].items():
            if digest(self._existing(name)) != expected:
                raise DamagedArtifactError(
                    f"{self.folder / name} is damaged: it is not the file that was fetched; {self._remedy}"
                )

    def _existing(self, name: str) -> Path:
        file = self.folder / name
        if not file.exists():
            raise DamagedArtifactError(f"{file} is missing; {self._remedy}")
        return file

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored type.

        Raises:
            ValueError: If the model's files have no such tensor.
            DamagedArtifactError: If its bytes are not those that were fetched.
        """
        if name not in self.tensors:
            some = ", ".join(sorted(self.tensors)[:3])
            raise ValueError(f"{self.folder} has no tensor {name}; it has e.g. {some}")
        entry = self.tensors[name]
        file = self._existing(entry["file"])
        try:
            with safe_open(file, framework="pt") as stream:
                tensor: Tensor = stream.get_tensor(name)
        except SafetensorError as error:
            raise DamagedArtifactError(f"{file} is damaged ({error}); {self._remedy}") from error
        # Flat, since a single number has no bytes to view: old GPT-NeoX files hold such.
        if hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest() != entry["sha256"]:
            raise DamagedArtifactError(
                f"{file} is damaged: tensor {name} is not the one that was fetched; {self._remedy}"
            )
        return tensor

    def byte_count(self) -> int:
        """Return the size of the files that hold the model's tensors."""
        files = {entry["file"] for entry in self.tensors.values()}
        return sum((self.folder / file).stat().st_size for file in files)

    def find(self, name: str, *, prefix: str) -> str | None:
        """Return the name under which the files hold a parameter: with or without the base model's prefix."""
        alternatives = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((alternative for alternative in alternatives if alternative in self.tensors), None)


class Skeleton(NamedTuple):
    """A model without weights.

    Attributes:
        model: All parameters on the meta device; buffers such as rotary frequencies are real.
        blocks: Its decoder blocks.
        path: The blocks' name in the model, such as `model.layers`.
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    path: str


def skeleton(folder: Path) -> Skeleton:
    """Build a model without weights from its configuration and find its decoder blocks.

    Raises:
        ValueError: If the model has no list of equal blocks, or its blocks hold no linear layer.
    """
    config = open_config(folder)
    # Drawing random numbers for weights that are not there takes longer than all else.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    attention.use(model)
    model.tie_weights()
    model.eval()
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    }
    if not lists:
        raise ValueError(f"{folder}: {type(model).__name__} has no decoder blocks (no list of equal modules)")
    path = max(lists, key=lambda name: len(lists[name]))
    if not linears(lists[path][0]):
        raise ValueError(f"{folder}: the blocks {path} of {type(model).__name__} hold no linear layer")
    return Skeleton(model, lists[path], path)


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return a block's linear layers by their name in the block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def load_block(
    source: Source, parts: Skeleton, index: int, *, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Return block `index` with its weights, on a device and in a float type of one's choice."""
    block = copy.deepcopy(parts.blocks[index])
    parameters = dict(block.named_parameters(remove_duplicate=False))
    state = {}
    for name in block.state_dict():
        stored = f"{parts.path}.{index}.{name}"
        # All parameters, and the buffers that the files have.
        if name in parameters or source.find(stored, prefix=parts.model.base_model_prefix):
            tensor = read(source, parts, stored)
            state[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    block.load_state_dict(state, strict=False, assign=True)
    return block.to(device)


def read(source: Source, parts: Skeleton, name: str) -> Tensor:
    """Return the dense model's parameter of a name, whatever its files hold in its place.

    They may leave a prefix out, have an older name (GPT-NeoX's head), or one tensor for each expert of a
    mixture that the model has in one parameter: what transformers itself reads.
    """
    found = source.find(name, prefix=parts.model.base_model_prefix)
    if found:
        return source.read(found)
    mapping = get_model_conversion_mapping(parts.model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    gathered: list[WeightConverter] = []
    # Experts by number, not by their names' letters.
    for older in sorted(source.tensors, key=dot_natural_key):
        newer, pattern = rename_source_key(older, renamings, converters)
        if newer != name:
            continue
        if pattern is None:
            return source.read(older)
        gathered = [entry for entry in converters if pattern in entry.source_patterns]
        gathered[0].add_tensor(name, older, pattern, source.read(older))
    if not gathered:
        return source.read(name)
    made: dict[str, Tensor] = gathered[0].convert(name, model=parts.model, config=parts.model.config)
    return made[name]


class Entrance(NamedTuple):
    """What reaches the first block, and the keyword arguments of every block.

    Attributes:
        hidden: (sequences, tokens, width).
        arguments: One mapping per block; tensors in it have batch size 1 and broadcast.
    """

    hidden: Tensor
    arguments: list[dict[str, Any]]


@contextlib.contextmanager
def _stand_ins(
    parts: Skeleton, calls: list[tuple[Tensor, dict[str, Any]]], output: Tensor | None = None
) -> Iterator[None]:
    """Let every block record its call and return its input, or `output`; the blocks stay what they are."""

    def stand_in(hidden_states: Tensor, *unnamed: Any, **arguments: Any) -> Tensor:
        if unnamed:
            raise ValueError(
                f"{type(parts.model).__name__} calls its blocks with arguments that it does not name; such "
                "models cannot be compressed block by block"
            )
        # A model that unpacks a tuple takes the first sequence of a tensor instead.
        if calls and hidden_states.shape != calls[0][0].shape:
            raise ValueError(
                f"{type(parts.model).__name__} passes on a part of what its blocks return (of a tuple, as a "
                "rule), not a tensor; such models cannot be compressed block by block"
            )
        calls.append((hidden_states, arguments))
        return hidden_states if output is None else output

    for block in parts.blocks:
        block.forward = stand_in
    try:
        yield
    finally:
        for block in parts.blocks:
            del block.forward


# Not inference mode: the recorded tensors also take part in training.
@torch.no_grad()
def _enter(parts: Skeleton, tokens: Tensor) -> Entrance:
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    decoder = parts.model.base_model
    with _stand_ins(parts, calls):
        decoder(input_ids=tokens, use_cache=False)
    if len(calls) != len(parts.blocks):
        raise ValueError(
            f"{type(parts.model).__name__} called {len(calls)} of its {len(parts.blocks)} blocks; "
            "only models that call every block once, in order, can be compressed"
        )
    return Entrance(calls[0][0], [arguments for _, arguments in calls])


def embed(
    source: Source, parts: Skeleton, tokens: Sequence[Tensor], *, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield what reaches the first block for each batch of tokens, (sequences, tokens, width), on the host.

    Raises:
        ValueError: If a block's keyword arguments depend on the tokens, which the pipeline cannot reproduce.
    """
    # Neither the blocks nor, where the decoder is a part of the model, the output head are called.
    called = {id(parameter) for parameter in parts.model.base_model.parameters()}
    state = {
        name: read(source, parts, name).to(dtype)
        for name, parameter in parts.model.named_parameters()
        if id(parameter) in called and not name.startswith(f"{parts.path}.")
    }
    filled = _callable(parts, state, dtype)
    expected = forward_arguments(parts, tokens=tokens[0].shape[1], device=torch.device("cpu"), dtype=dtype)
    for batch in tokens:
        entrance = _enter(filled, batch)
        for found, wanted in zip(_enter(filled, batch[:1]).arguments, expected, strict=True):
            differing = sorted(name for name in found if not _equal(found[name], wanted.get(name)))
            if differing:
                raise ValueError(
                    f"the blocks of {type(parts.model).__name__} are called with {', '.join(differing)} that "
                    "depend on the tokens; such models cannot be compressed block by block"
                )
        yield entrance.hidden


def forward_arguments(
    parts: Skeleton, *, tokens: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Return every block's keyword arguments for sequences of a given length.

    They depend on positions only (`embed` checks it), so the embeddings may be zeros.

    Args:
        parts: The model without weights.
        tokens: Length of the sequences.
        device: Where the arguments' tensors go.
        dtype: Float type of the activations.
    """
    arguments = _enter(_callable(parts, {}, dtype), torch.zeros(1, tokens, dtype=torch.long)).arguments
    return [place(mapping, device=device, dtype=dtype) for mapping in arguments]


# Elements of the logits that exist at one time.
_LOGITS = 2**24


class Head:
    """What a model does behind its last block: its loss as a function of what leaves the blocks."""

    def __init__(self, source: Source, parts: Skeleton, *, device: torch.device, dtype: torch.dtype) -> None:
        """Read everything but the blocks."""
        state = {
            name: read(source, parts, name).to(dtype)
            for name, _ in parts.model.named_parameters()
            if not name.startswith(f"{parts.path}.") and name not in parts.model.all_tied_weights_keys
        }
        self._parts = _callable(parts, state, dtype)
        # A tied output layer has no weights of its own to read.
        self._parts.model.tie_weights()
        for name, module in self._parts.model.named_modules():
            if not f"{name}.".startswith(f"{parts.path}."):
                for part in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    part.data = part.data.to(device)
        self._device, self._dtype = device, dtype

    def loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return each sequence's summed cross entropy, in nats; differentiable in `hidden`.

        The head works position by position, so it is called for a limited number of positions at a time.

        Args:
            hidden: What leaves the last block, (sequences, tokens, width).
            ids: The sequences' tokens, (sequences, tokens).
        """
        vocabulary = self._parts.model.config.get_text_config().vocab_size
        step = max(1, _LOGITS // (vocabulary * len(ids)))
        total = torch.zeros(len(ids), device=self._device)
        for start in range(0, ids.shape[1] - 1, step):
            stop = min(start + step, ids.shape[1] - 1)
            some = hidden[:, start:stop].to(self._device, self._dtype)
            with _stand_ins(self._parts, [], output=some):
                logits = self._parts.model(
                    input_ids=ids[:, start:stop].to(self._device), use_cache=False
                ).logits
            targets = ids[:, start + 1 : stop + 1].to(self._device)
            losses = token_losses(logits.flatten(0, 1), targets.flatten())
            total = total + losses.view(targets.shape).sum(1)
        return total

    def mean_loss(self, hidden: Tensor, ids: Tensor) -> float:
        """Return the cross entropy, in nats per predicted token."""
        return float(self.loss(hidden, ids).sum()) / (len(ids) * (ids.shape[1] - 1))


def _callable(parts: Skeleton, state: Mapping[str, Tensor], dtype: torch.dtype) -> Skeleton:
    """Return a copy of a model that can be called up to its blocks.

    Parameters outside the blocks that `state` does not hold become zeros of no size in memory.
    """
    # The blocks are not called, so they need no copies.
    model = copy.deepcopy(parts.model, {id(block): block for block in parts.blocks})
    model.load_state_dict(dict(state), strict=False, assign=True)
    zero = torch.zeros((), dtype=dtype)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and not name.startswith(f"{parts.path}."):
            owner, _, leaf = name.rpartition(".")
            empty = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, empty)
    return Skeleton(model, model.get_submodule(parts.path), parts.path)


def place(arguments: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Move the tensors in a block's keyword arguments to a device, and the floats among them to a type."""
    return tree_map_only(
        Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), dict(arguments)
    )


def _equal(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or not first.is_floating_point():
            return torch.equal(first, second)
        # Cosines may differ in their last bit from one call to the next.
        return torch.allclose(first, second.to(first.dtype), rtol=1e-2, atol=1e-2)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    return type(first) is type(second) and (first is second or first == second)


def groups(
    parts: Skeleton, index: int, *, arguments: Mapping[str, Any], width: int, tokens: int
) -> list[list[str]]:
    """Return the names of a block's linears, grouped by the tensor they read, in the order they are called.

    Found by calling the block on the meta device, without data: linears that receive the same tensor
    object form a group (q, k, v; gate, up). A linear that is not called is in no group and stays dense.

    Raises:
        ValueError: If the block returns something else than what the next one gets.
    """
    # The type in which torch multiplies mixtures of experts on the meta device.
    meta, dtype = torch.device("meta"), torch.bfloat16
    block = copy.deepcopy(parts.blocks[index]).to(dtype)
    with torch.inference_mode(), sharing(linears(block)) as found:
        output = block(
            torch.empty(1, tokens, width, dtype=dtype, device=meta),
            **place(arguments, device=meta, dtype=dtype),
        )
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{type(block).__name__} returns a {type(output).__name__}, not a tensor; such blocks cannot be "
            "compressed"
        )
    return found
