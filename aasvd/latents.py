"""A key-value cache that stores the latents of low-rank key and value projections.

Where k_proj or v_proj has a rank k below its width, the k numbers v x determine the key or value of a token:
keys and values are then computed from the latents of all tokens whenever they are needed, the rotary
embedding of keys after the up-projection. The cache shrinks by k / width, and every step pays for the
up-projections of all past tokens; `plan` says where that saves memory and `cache_bytes_per_token` how much.

Model code stays transformers' own. What an attention module does between `k_proj` and the cache (heads, a
norm `k_norm` of each head or of all, its module's `apply_rotary_pos_emb` on all of a head or its first
part) is redone from the latents, and compared with what the module itself hands to the cache when a layer
is first used: a module that does something else is an error.
"""

import copy
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from aasvd.lowrank import CompressedLinear

_PROJECTIONS = ("k_proj", "v_proj")


class Decision(NamedTuple):
    """How one attention layer is cached.

    Attributes:
        keys: Numbers per token stored for the keys.
        values: Numbers per token stored for the values.
        width: Numbers per token of the keys, and of the values, in an ordinary cache.
        reason: Why neither is stored as latents; "" where at least one is.
    """

    keys: int
    values: int
    width: int
    reason: str

    @property
    def saves(self) -> bool:
        """Say whether latents are stored."""
        return not self.reason


def plan(model: Any) -> list[Decision]:
    """Decide for each attention layer of a model whether its latents are smaller than its keys and values.

    Keys and values are decided on separately. Layers with a sliding window keep their ordinary cache, whose
    size is bounded anyway; so do all where keys and values are clipped (`clip_qkv`), since a token that is
    clipped may come long after the first one, on which they are compared.

    Raises:
        ValueError: If the model has no attention modules with k_proj and v_proj, one for each layer of its
            cache.
    """
    clipped = "clipped keys and values" if getattr(model.config, "clip_qkv", None) is not None else ""
    ordinary = [clipped or ("sliding window" if slides else "") for slides in _ordinary(model).is_sliding]
    return [_decide(module, why) for module, why in zip(_attention_modules(model), ordinary, strict=True)]


def cache_bytes_per_token(model: Any) -> dict[str, int]:
    """Return the bytes that one token of one sequence takes in the ordinary cache and in a `LatentCache`.

    The latent cache's count includes the rotary cosines and sines, stored once for all layers. Layers with
    a sliding window count in both as long as the window is not full.
    """
    decisions = plan(model)
    size = model.dtype.itemsize
    return {
        "ordinary": sum(2 * decision.width for decision in decisions) * size,
        "latents": (sum(decision.keys + decision.values for decision in decisions) + _rotary(model)) * size,
    }


def obstacle(model: Any) -> str:
    """Say why a `LatentCache` is of no use for a model; "" where it saves memory."""
    if misfit := _misfit(model):
        return misfit
    decisions = plan(model)
    useless = f"a latent cache saves nothing for {type(model).__name__}: "
    if not any(decision.saves for decision in decisions):
        return useless + "; ".join(sorted({decision.reason for decision in decisions}))
    counts = cache_bytes_per_token(model)
    if counts["latents"] >= counts["ordinary"]:
        return (
            f"{useless}with the rotary embeddings it takes {counts['latents']} bytes per token, the ordinary "
            f"one {counts['ordinary']}"
        )
    return ""


def summary(model: Any) -> dict[str, int | str | None]:
    """Return `cache_bytes_per_token` with null for what cannot be, and as `reason` the `obstacle`.

    Shapes alone are looked at: the model may be on the meta device.
    """
    unknown = {"ordinary": None, "latents": None}
    counts = unknown if _misfit(model) else cache_bytes_per_token(model)
    reason = obstacle(model)
    return {
        "ordinary": counts["ordinary"],
        "latents": None if reason else counts["latents"],
        "reason": reason,
    }


class _Rotations:
    """Cosines and sines of all cached positions, stored once for all layers.

    Attributes:
        parts: Cosines and sines, each (sequences or 1, tokens, head width); empty without rotary embedding.
    """

    def __init__(self) -> None:
        self.parts: tuple[Tensor, ...] = ()
        self.length = 0

    def extend(self, new: tuple[Tensor, ...], *, past: int, tokens: int) -> None:
        """Append those of new tokens, unless an earlier layer has done so."""
        if self.length == past:
            self.parts = tuple(map(_joined, self.parts, new)) if past else new
            self.length += tokens

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace both; those that hold for every sequence stay."""
        self.parts = tuple(part if part.shape[0] == 1 else change(part) for part in self.parts)

    def crop(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.parts = tuple(part[:, :length] for part in self.parts)
        self.length = length


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Join along tokens; one that holds for every sequence meets one with a part for each.

    A model called without a mask gives the former, `generate`, which numbers padded prompts, the latter.
    """
    sequences = max(len(old), len(new))
    return torch.cat([part.expand(sequences, -1, -1) for part in (old, new)], dim=1)


class LatentLayer(DynamicLayer):
    """Cache of one attention layer whose keys, values or both are stored as latents.

    `keys` and `values` hold (sequences, 1, tokens, rank) where latents are stored, so that cropping,
    reordering and offloading are those of an ordinary layer.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, attention: nn.Module, decision: Decision, rotations: _Rotations) -> None:
        """Cache for one attention module."""
        super().__init__()
        self._attention = attention
        self._latent = (decision.keys < decision.width, decision.values < decision.width)
        self._rotations = rotations
        self._checked = False
        # What the attention module's hooks have seen of the call in progress.
        self._active = False
        self._inputs: dict[str, Tensor] = {}
        self._embeddings: Any = None

    def watch(self, cache: "LatentCache") -> list[Any]:
        """Record the projections' inputs and the rotary embeddings of every call that uses a cache."""
        reference = weakref.ref(cache)
        # The hooks must not keep the cache, which this layer belongs to, alive.
        layer_reference = weakref.ref(self)

        def start(_module: nn.Module, _inputs: Any, arguments: Mapping[str, Any]) -> None:
            layer = layer_reference()
            if layer is not None:
                used = arguments.get("past_key_values")
                layer._inputs = {}
                layer._active = used is not None and used is reference()
                layer._embeddings = arguments.get("position_embeddings") if layer._active else None

        def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                layer = layer_reference()
                if layer is not None and layer._active:
                    layer._inputs[name] = inputs[0]

            return hook

        handles = [self._attention.register_forward_pre_hook(start, with_kwargs=True)]
        for name, latent in zip(_PROJECTIONS, self._latent, strict=True):
            if latent:
                projection = getattr(self._attention, name)
                handles.append(projection.register_forward_pre_hook(remember(name)))
        return handles

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and return the keys and values of all, (sequences, heads, tokens, head width).

        Raises:
            ValueError: If the call did not come from the model that the cache was made for, or its attention
                module makes keys or values in a way that is not known here.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, tokens = self.get_seq_length(), key_states.shape[-2]
        rotations = self._rotations
        rotations.extend(self._cosines_and_sines(tokens), past=past, tokens=tokens)
        self.keys, keys = self._appended("k_proj", self._latent[0], self.keys, key_states, rotations.parts)
        self.values, values = self._appended("v_proj", self._latent[1], self.values, value_states, ())
        if not self._checked:
            self._check(key_states, keys[:, :, past:])
            self._check(value_states, values[:, :, past:])
            # The sine at position 0 is 0: no rotation there, so a lone first token tells nothing of one.
            self._checked = not rotations.parts or bool(rotations.parts[1][:, past:].any())
        self._inputs, self._embeddings = {}, None
        return keys, values

    def take(self, other: "LatentLayer") -> None:
        """Copy what another layer for the same attention module has cached."""
        if other.is_initialized:
            self.lazy_initialization(other.keys, other.values)
            self.keys, self.values = other.keys.clone(), other.values.clone()

    def _appended(
        self, name: str, latent: bool, stored: Tensor, new: Tensor, rotations: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return what is stored, and the keys or values that it stands for."""
        if not latent:
            stored = torch.cat([stored, new], dim=-2)
            return stored, stored
        projection = getattr(self._attention, name)
        if name not in self._inputs:
            raise ValueError(
                f"{type(self._attention).__name__} called the cache before its {name}, or is not of the "
                "model that this LatentCache was made for"
            )
        latents = projection.down(self._inputs[name]).unsqueeze(1)
        stored = torch.cat([stored, latents], dim=-2) if stored.numel() else latents
        states = projection.up(stored.squeeze(1))
        heads, width = new.shape[1], new.shape[3]
        if states.shape[-1] != heads * width:
            raise self._unknown()
        norm = getattr(self._attention, "k_norm", None) if name == "k_proj" else None
        sizes = tuple(getattr(norm, "weight", states.new_empty(width)).shape)
        if sizes not in {(width,), (heads, width), (heads * width,)}:
            raise self._unknown()
        whole = sizes == (heads * width,)
        if norm is not None and whole:
            states = norm(states)
        states = states.unflatten(-1, (heads, width))
        if norm is not None and not whole:
            states = norm(states)
        states = states.transpose(1, 2)
        return stored, self._rotated(states, rotations) if rotations else states

    def _cosines_and_sines(self, tokens: int) -> tuple[Tensor, ...]:
        """Return the rotary embeddings of the call in progress, (sequences or 1, tokens, width), if any."""
        if self._embeddings is None:
            return ()
        pair = tuple(self._embeddings)
        if len(pair) != 2 or any(part.ndim != 3 or part.shape[1] != tokens for part in pair):
            raise self._unknown()
        return pair

    def _rotated(self, keys: Tensor, rotations: tuple[Tensor, ...]) -> Tensor:
        """Return keys (sequences, heads, tokens, head width) with the rotary embedding applied."""
        rotate = getattr(sys.modules[type(self._attention).__module__], "apply_rotary_pos_emb", None)
        if rotate is None or list(inspect.signature(rotate).parameters)[:4] != ["q", "k", "cos", "sin"]:
            raise self._unknown()
        # Models that rotate a part of each head cut it off themselves, and say how large it is.
        width = getattr(self._attention, "rotary_ndims", keys.shape[-1])
        part, rest = keys[..., :width], keys[..., width:]
        rotations = tuple(rotation.to(keys.device) for rotation in rotations)
        # Queries of no heads: only keys are to be rotated.
        _, part = rotate(part[:, :0], part, *rotations)
        return torch.cat((part, rest), dim=-1) if rest.shape[-1] else part

    def _unknown(self) -> ValueError:
        return ValueError(
            f"{type(self._attention).__name__} makes its keys or values in a way that LatentCache does "
            "not know; use the ordinary cache"
        )

    def _check(self, expected: Tensor, found: Tensor) -> None:
        """Compare what was computed from latents with what the attention module made of the same tokens."""
        # Both are the same products, at most in another order.
        tolerance = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
        if expected.shape != found.shape or not bool(((expected - found).abs() <= tolerance).all()):
            raise self._unknown()


class LatentCache(DynamicCache):
    """Cache for `generate(past_key_values=...)` that stores latents where that saves memory.

    It belongs to the model it was made for, as an ordinary cache belongs to its tokens. Layers where latents
    save nothing, and layers with a sliding window, are cached as usual; see `plan`. Hooks on the model's
    attention modules last as long as the cache.
    """

    def __init__(self, model: Any) -> None:
        """Make an empty cache.

        Raises:
            ValueError: If latents would save no memory in any layer, the model's attention is unknown, or
                weights that keys or values are made with lie elsewhere between calls.
        """
        if reason := obstacle(model):
            raise ValueError(reason)
        decisions = plan(model)
        super().__init__(config=model.config)
        self._model = model
        self._rotations = _Rotations()
        handles = []
        for index, (module, decision) in enumerate(zip(_attention_modules(model), decisions, strict=True)):
            if decision.saves:
                if any(tensor.is_meta for tensor in module.state_dict().values()):
                    raise ValueError(
                        f"the weights of attention layer {index} of {type(model).__name__} are offloaded, "
                        "and a latent cache needs them between calls: use the ordinary cache"
                    )
                self.layers[index] = LatentLayer(module, decision, self._rotations)
                handles += self.layers[index].watch(self)
        weakref.finalize(self, _remove, handles)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy what is cached, for the same model."""
        other = type(self)(self._model)
        other._rotations.parts = copy.deepcopy(self._rotations.parts, memo)
        other._rotations.length = self._rotations.length
        for index, layer in enumerate(self.layers):
            if isinstance(layer, LatentLayer):
                other.layers[index].take(layer)
            else:
                other.layers[index] = copy.deepcopy(layer, memo)
        return other

    def bytes_in_use(self) -> int:
        """Return the bytes that the cache holds now."""
        tensors = [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in [*tensors, *self._rotations.parts] if tensor is not None)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._rotations.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is negative, as for every cache."""
        super().crop(tokens_to_remove)
        self._rotations.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose sequences, for beam search."""
        super().reorder_cache(beam_idx)
        self._rotations.change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)
        self._rotations.change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        self._rotations.change(lambda part: part[indices])


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _ordinary(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def _attention_modules(model: Any) -> list[nn.Module]:
    """Return the attention modules in the order of the cache's layers."""
    if misfit := _misfit(model):
        raise ValueError(misfit)
    return [module for _, module in sorted(_indexed(model).items())]


def _indexed(model: Any) -> dict[int, nn.Module]:
    """Return the attention modules with both projections by the index of their layer."""
    return {
        module.layer_idx: module
        for module in model.modules()
        if hasattr(module, "layer_idx") and all(hasattr(module, name) for name in _PROJECTIONS)
    }


def _misfit(model: Any) -> str:
    """Say what is wrong unless each layer of the cache has an attention module with both projections."""
    found, layers = sorted(_indexed(model)), len(_ordinary(model).layers)
    if found == list(range(layers)):
        return ""
    return (
        f"{type(model).__name__} has {len(found)} attention modules with {' and '.join(_PROJECTIONS)} "
        f"for {layers} layers; a latent cache needs one in each: use the ordinary cache"
    )


def _decide(attention: Any, ordinary: str) -> Decision:
    """Decide on a layer; `ordinary` says why its cache must be an ordinary one, if it must."""
    projections = [getattr(attention, name) for name in _PROJECTIONS]
    widths = [projection.out_features for projection in projections]
    if ordinary:
        return Decision(widths[0], widths[1], widths[0], ordinary)
    stored = [
        projection.rank if isinstance(projection, CompressedLinear) and projection.rank < width else width
        for projection, width in zip(projections, widths, strict=True)
    ]
    saves = stored != widths
    return Decision(stored[0], stored[1], widths[0], "" if saves else "no rank is below the width")


def _rotary(model: Any) -> int:
    """Return the cosines and sines stored for a token: two for each number of a head, or none."""
    attention: Any = _attention_modules(model)[0]
    rotates = "position_embeddings" in inspect.signature(attention.forward).parameters
    if not rotates:
        return 0
    config = model.config.get_text_config(decoder=True)
    width = getattr(attention, "head_dim", config.hidden_size // config.num_attention_heads)
    part = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return 2 * int(width * part)
