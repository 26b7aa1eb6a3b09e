"""Compute the latents of linears that read the same tensor (q, k, v; gate, up) in one matrix product.

The first linear of a group that is called computes the latents of all of them with one stacked weight; the
others take theirs. Model code stays transformers' own: who shares an input is found by watching one call.
The layers' own parameters come to lie in the stacked weight, so nothing is stored twice and
`save_pretrained` writes the same bytes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aasvd.capture import sharing
from aasvd.lowrank import CompressedLinear, product


class _Latents(NamedTuple):
    """Latents of all layers of a group, the input that they belong to, its version and the parameters'."""

    x: Tensor
    versions: tuple[int, ...]
    parts: tuple[Tensor, ...]


class Stacked:
    """The stacked weight of layers that read the same tensor.

    It steps aside, and each layer computes its own latents, where gradients are recorded, under compilers,
    for tensors of inference mode (which do not tell when they were written to), for one token in float32 on
    a CPU, and for ever once a layer's parameter was replaced or moved.
    """

    def __init__(self, layers: Sequence[CompressedLinear]) -> None:
        """Stack the layers' weights; from here on their parameters lie in the stack's memory."""
        self._layers = list(layers)
        self._weight = torch.cat([_weight(layer).detach() for layer in layers])
        self._ranks = [layer.rank for layer in layers]
        for layer, view in zip(layers, torch.split(self._weight, self._ranks), strict=True):
            trains = _weight(layer).requires_grad
            # A storage of its own in the same memory: what saves a model takes views of one storage for tied
            # weights, and keeps one of them (accelerate's and safetensors' save_model).
            own = torch.utils.dlpack.from_dlpack(view)
            setattr(layer, layer.DOWN or "", nn.Parameter(own, requires_grad=trains))
            layer.shared = self
        # The stack keeps its memory, so a parameter at its address is still in it.
        self._addresses = [_weight(layer).data_ptr() for layer in layers]
        self._latest: _Latents | None = None

    def latents(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return one layer's latents (..., rank) of x (..., in)."""
        assert isinstance(layer, CompressedLinear)
        weight = _weight(layer)
        # Compilers do not trace what comes next.
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return product(x, weight)
        # One token's product is bound by memory in float32: several small ones take no longer than one.
        one = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() == x.shape[-1]
        if one or x.is_inference() or self._weight.is_inference():
            return product(x, weight)
        weights = [_weight(one) for one in self._layers]
        if [one.data_ptr() for one in weights] != self._addresses:
            self.dissolve()
            return product(x, weight)
        latest = self._latest
        # The versions tell whether x or a parameter was written to.
        versions = (x._version, *(one._version for one in weights))
        if latest is None or latest.x is not x or latest.versions != versions:
            parts = torch.split(product(x, self._weight), self._ranks, dim=-1)
            latest = _Latents(x, versions, tuple(parts))
        index = self._layers.index(layer)
        # The last layer lets go of the activations.
        self._latest = None if index == len(self._layers) - 1 else latest
        return latest.parts[index]

    def dissolve(self) -> None:
        """Let each layer compute its own latents again."""
        for layer in self._layers:
            layer.shared = None


def _weight(layer: CompressedLinear) -> nn.Parameter:
    assert layer.DOWN is not None
    weight = getattr(layer, layer.DOWN)
    assert isinstance(weight, nn.Parameter)
    return weight


def fuse(model: Any) -> list[list[str]]:
    """Fuse the first products of all low-rank linears of a transformers model that share an input.

    `from_pretrained` does it by itself. It calls the model once, with one token and plain attention, to see
    who shares an input. Layers whose weights are made from codes, or not all in memory, on one device and in
    one type, stay as they are; do it again after moving or casting a model.

    Returns:
        The module names of each fused group, in the order in which they are called.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear) and module.DOWN is not None
    }
    if not layers:
        return []
    for layer in layers.values():
        layer.shared = None
    training = model.training
    model.eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad(), _plain_attention(model), sharing(layers) as groups:
        # Also of a model with another head, which may want more than tokens.
        model.base_model(input_ids=token, use_cache=False)
    model.train(training)
    fused = [names for names in groups if len(names) > 1 and _alike([layers[name] for name in names])]
    for names in fused:
        Stacked([layers[name] for name in names])
    return fused


@contextlib.contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Let a model compute attention in plain torch for a while.

    Who shares an input does not depend on the kernel that it was opened with, which may refuse the device or
    type that it is in at the moment, as flash attention does on CPUs and in float32.
    """
    # Found without transformers' classes: importing them here would be a circle (`aasvd.checkpoint`).
    found = [getattr(module, "config", None) for module in model.modules()]
    configs: list[Any] = [config for config in found if hasattr(config, "_attn_implementation")]
    chosen = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            # As a mapping it is that of this config alone, not of configs inside it.
            config._attn_implementation = {"": "eager"}
        yield
    finally:
        for config, implementation in zip(configs, chosen, strict=True):
            config._attn_implementation = {"": implementation}


def unfuse(model: nn.Module) -> None:
    """Let every low-rank linear of a model compute its own latents again."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.shared = None


def _alike(layers: Sequence[CompressedLinear]) -> bool:
    """Tell whether the layers' weights can be stacked; a layer that is called twice cannot."""
    kinds = {(_weight(layer).device, _weight(layer).dtype) for layer in layers}
    return len(kinds) == 1 and len(set(layers)) == len(layers) and not _weight(layers[0]).is_meta
