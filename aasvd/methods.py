"""The pieces that a compression method is composed of, and what each of them needs; imports nothing heavy.

A method is a layer objective, an allocation of ranks, a refinement and a post-step: a named set of
parameters in params.yaml. A new objective is one line here and one function of its name in
`aasvd.objectives`, a new allocation one line here and one function of its name in `aasvd.allocation`. The
rules of the workflow make what the pieces of a run need, and nothing else.

What there is to need, per block:

    shifted       X'X'ᵀ from passes of the partly compressed block: blocks then follow one another
    cross         XX'ᵀ, from passes of both blocks
    gradients     of the dense model's loss at the linears' outputs: one backward pass for all runs
    fisher        its gradients with respect to the weights: one more
    buckets       the covariance of averaged calibration sequences: one more pass of the original blocks
    spectra, influence, profile, sensitivity    see `aasvd.measures`

and for the whole model:

    positions     truncation positions trained by the model's loss, at one ratio: see `aasvd.truncation`
    removal       the order in which branches go (`aasvd.pruning`): hundreds of passes, for all ratios

The covariances of the original inputs are always there: capturing the original activations makes them.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """One objective or allocation.

    Attributes:
        needs: Statistics beyond the original covariances.
        options: Keys of `compression` in params.yaml that only such pieces read.
    """

    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def functions_of(names: Iterable[str], module: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's functions of these names.

    Args:
        names: Those of pieces.
        module: The module's `globals()`.

    Raises:
        ValueError: If one is missing; names it, and the file.
    """
    names = list(names)
    if missing := [name for name in names if name not in module]:
        raise ValueError(
            f"aasvd/methods.py lists {missing[0]!r}, but {module['__file__']} has no such function"
        )
    return {name: module[name] for name in names}


def require_known(pieces: Mapping[str, Piece]) -> None:
    """Raise ValueError if a piece needs what nothing makes."""
    for name, piece in pieces.items():
        if unknown := [need for need in piece.needs if need not in _STATISTICS]:
            raise ValueError(
                f"aasvd/methods.py: {name!r} needs {unknown[0]!r}; there are {', '.join(_STATISTICS)}"
            )


# All that there is to need.
_STATISTICS = (
    *("shifted", "cross", "gradients", "fisher", "buckets", "positions", "removal"),
    *("spectra", "influence", "profile", "sensitivity", "relative_gradients"),
)
# Measures that are made from statistics of gradients, and from which.
DIFFERENTIATED = {"influence": "gradients", "relative_gradients": "fisher"}
# Measures of the whole model.
WHOLE = ("removal",)

OBJECTIVES = {
    "input_agnostic": Piece(),
    "input_aware": Piece(),
    "shift_aware": Piece(("shifted",)),
    "anchored": Piece(("shifted", "cross")),
    "blended": Piece(("shifted", "cross"), ("blend",)),
    "saes": Piece(("shifted", "cross")),
    "asvd": Piece(),
    "lorap": Piece(),
    "fwsvd": Piece(("fisher",)),
    "dipsvd_paper": Piece(),
    "dipsvd_code": Piece(),
    "adasvd": Piece(("buckets",), ("buckets",)),
    "loss_aware": Piece(("gradients",)),
    "loss_blended": Piece(("shifted", "cross", "gradients"), ("blend",)),
    "unchanged": Piece(),
    "wanda_sp": Piece(("shifted",)),
}

ALLOCATIONS = {
    "uniform": Piece(),
    "file": Piece((), ("ranks_file",)),
    "lorap": Piece(),
    "strs": Piece(("sensitivity",), ("probe",)),
    "svdllm_v2": Piece(("spectra",)),
    "effective_rank": Piece(("spectra",)),
    "swift": Piece(("spectra", "profile")),
    "adasvd": Piece(("profile",)),
    "dobi": Piece(("positions",), ("dobi",)),
    "dipsvd": Piece(("profile", "relative_gradients")),
    "dipsvd_inverted": Piece(("profile", "relative_gradients")),
    "optimal": Piece(("influence",)),
    "shortgpt": Piece(("profile",)),
    "blockpruner": Piece(("removal",), ("probe",)),
}

for _pieces in (OBJECTIVES, ALLOCATIONS):
    require_known(_pieces)

# Objectives that factorize nothing and leave out rows, columns or all of a weight, with the allocations
# that they go with. `unchanged` leaves linears as they are, and it is the allocation that removes some.
PRUNING = {"unchanged": ("shortgpt", "blockpruner", "file"), "wanda_sp": ("uniform",)}
# Allocations that no other objectives go with.
REMOVING = ("shortgpt", "blockpruner")
