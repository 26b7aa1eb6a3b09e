"""AA-SVD: compress decoder-only language models by anchored low-rank factorization.

Importing this package is cheap and has two effects, each as soon as somebody imports the other package
(before or after this one):

* transformers' quantizer registry: the checkpoint format `aasvd` is registered with it, so that
  `AutoModelForCausalLM.from_pretrained` opens a compressed model like any other.
* PEFT's LoRA: it knows compressed linears.
"""

import importlib
from types import ModuleType

import wrapt

__version__ = "0.1.0"


def _import(name: str, *, after: str) -> None:
    """Import a module of this package as soon as a foreign one is imported."""

    def on_import(_module: ModuleType) -> None:
        # Our module may itself be what is importing the foreign one just now; it is incomplete then, and
        # still does its work when it is done.
        importlib.import_module(name)

    wrapt.register_post_import_hook(on_import, after)


_import("aasvd.checkpoint", after="transformers.quantizers.auto")
_import("aasvd.lora", after="peft.tuners.lora.model")
