"""Measures of models that are not there, for tests of what is chosen from them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from aasvd.allocation import CANDIDATES


def made_up(shapes: Mapping[str, tuple[int, int]], blocks: int) -> dict[str, list[dict[str, Tensor]]]:
    """Return every measure of a model of Llama blocks whose later ones and o_proj matter more.

    Args:
        shapes: (out, in) of the linears of a block.
        blocks: Number of blocks.
    """
    chance = torch.Generator().manual_seed(0)
    width = shapes["self_attn.q_proj"][1]
    found: dict[str, list[dict[str, Tensor]]] = {
        name: []
        for name in ("spectra", "influence", "sensitivity", "relative_gradients", "profile", "positions")
    }
    for block in range(blocks):
        depth = 6 * block / blocks
        scales = {
            name: (1 + depth) * float(torch.rand((), generator=chance) + (name[10:] == "o_proj"))
            for name in shapes
        }
        spectra = {
            name: scales[name] * 1e3 * torch.exp(-torch.arange(min(shape)) / (15 * width / 96)).double()
            for name, shape in shapes.items()
        }
        found["spectra"].append(spectra)
        found["influence"].append(
            {name: s * torch.rand(len(s), generator=chance).double() for name, s in spectra.items()}
        )
        found["sensitivity"].append(
            {name: 20 + scales[name] * (1 - torch.tensor(CANDIDATES).double()) for name in shapes}
        )
        found["relative_gradients"].append({name: torch.tensor([scales[name]]).double() for name in shapes})
        found["positions"].append(
            {name: torch.tensor([min(1.0, 0.1 * scale)]).double() for name, scale in scales.items()}
        )
        singular = torch.exp(-torch.arange(width) / ((10 + 5 * depth) * width / 96)).double()
        found["profile"].append({"cosine": torch.tensor([0.6 + 0.05 * depth]).double(), "singular": singular})
    return found
