"""AA-SVD: compress decoder-only language models by anchored low-rank factorization.

Importing this package is cheap and has one effect: as soon as transformers' quantizer registry is
imported (before or after this package), the checkpoint format `aasvd` is registered with it, so that
`AutoModelForCausalLM.from_pretrained` opens a compressed model like any other.
"""

import importlib
from types import ModuleType

import wrapt

__version__ = "0.1.0"


def _register(_module: ModuleType) -> None:
    # The module registers the format at its end. It may itself be what is importing transformers just
    # now; it is incomplete then, and still registers when it is done.
    importlib.import_module("aasvd.checkpoint")


wrapt.register_post_import_hook(_register, "transformers.quantizers.auto")
