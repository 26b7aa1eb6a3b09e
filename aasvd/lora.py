"""LoRA adapters of PEFT on compressed linears, by PEFT's plain calls.

The package imports this module as soon as PEFT's LoRA is imported, by a hook as for transformers, and never
imports PEFT by itself. PEFT's own way to make it know a layer is to tell every single `LoraConfig`; and what
`target_modules="all-linear"` means is a list of classes inside a function. So the two functions that decide
are wrapped: other models, and other kinds of adapters, pass through.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import wrapt
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.utils import PeftType
from torch import nn

from aasvd.lowrank import CompressedLinear
from aasvd.pruned import PrunedLinear

_LAYERS = (CompressedLinear, PrunedLinear)


class CompressedLoraLinear(Linear):
    """PEFT's LoRA of a linear, around a compressed one."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Return both sizes; PEFT warns of every layer type that it does not know."""
        assert isinstance(module, _LAYERS)
        return module.in_features, module.out_features

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter beside the layer, where PEFT looks for a `weight`."""
        base = self.get_base_layer()
        first = next(itertools.chain(base.parameters(), base.buffers()))
        super()._move_adapter_to_device_of_base_layer(adapter_name, device=device or first.device)

    def update_layer(self, adapter_name: str, *arguments: Any, config: Any, **named: Any) -> None:
        """Add an adapter, unless it looks at the weight.

        Raises:
            ValueError: If it is DoRA, or to begin as a part of the weight.
        """
        if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"LoRA of a compressed linear with use_dora={config.use_dora} and init_lora_weights="
                f"{config.init_lora_weights!r}: there is no weight to look at. Use use_dora=False and True, "
                "False or 'gaussian'"
            )
        super().update_layer(adapter_name, *arguments, config=config, **named)

    def merge(self, *_arguments: Any, **_named: Any) -> None:
        """Refuse: what an adapter adds has no place in a matrix of lower rank.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "an adapter cannot be merged into a compressed linear: make the model dense first (python -m "
            "aasvd.export FOLDER OUTPUT), open the adapter on that and merge there"
        )


def _create(
    wrapped: Callable[..., nn.Module], _instance: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> nn.Module:
    """Tell the config of an adapter how compressed linears are wrapped, before PEFT wraps a layer."""
    config = args[0] if args else kwargs["lora_config"]
    config._register_custom_module(dict.fromkeys(_LAYERS, CompressedLoraLinear))
    return wrapped(*args, **kwargs)


def _include(
    wrapped: Callable[..., Any], _instance: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Count compressed linears among "all-linear" where PEFT makes a list of that."""

    def included(peft_config: Any, model: nn.Module) -> Any:
        before = peft_config.target_modules
        peft_config = wrapped(peft_config, model)
        # PEFT replaces the word by a set of names, and leaves anything else as it is.
        if peft_config.peft_type == PeftType.LORA and peft_config.target_modules is not before:
            peft_config.target_modules |= _outermost(model)
        return peft_config

    return included(*args, **kwargs)


def _outermost(model: Any) -> set[str]:
    """Return a model's compressed linears by name but those in an adapter's layer, and the output layer."""
    adapted = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, tuners_utils.BaseTunerLayer)
    ]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and module is not head and not name.startswith(tuple(adapted))
    }


wrapt.wrap_function_wrapper(LoraModel, "_create_new_module", _create)
wrapt.wrap_function_wrapper(tuners_utils, "_maybe_include_all_linear_layers", _include)
