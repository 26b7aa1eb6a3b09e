"""Gradients block by block, and measures made of them, against autograd through the whole model at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from stored import CPU, Stored, activations, random_tokens
from torch import Tensor, nn
from torch.nn import functional

from aasvd import measures
from aasvd.blocks import Head, linears
from aasvd.gradients import Fisher, block_fisher, block_gradients, head_gradient, truncation_losses
from aasvd.objectives import Options, Statistics, solver

SEQUENCES = 5
# float32 passes, sums of some thousand terms in another order.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


class Found(NamedTuple):
    """What the stages' functions say of one block."""

    outer: dict[str, Tensor]
    fisher: dict[str, Fisher]
    losses: dict[str, Tensor]


def some_factors(block: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random u and v for every linear of a block, the same for the same block."""
    chance = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(linear.out_features, 7, generator=chance, dtype=torch.float64),
            torch.randn(7, linear.in_features, generator=chance, dtype=torch.float64),
        )
        for name, linear in linears(block).items()
    }


class Whole:
    """Each sequence's gradients of a tiny model's loss, by one backward pass through all of it."""

    def __init__(self, tiny: Stored) -> None:
        self.tiny, self.ids = tiny, random_tokens(SEQUENCES)
        self.prefix = tiny.parts.path
        model = tiny.model
        blocks = model.get_submodule(self.prefix)
        self.inputs: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
        self.outer: dict[str, Tensor] = {}
        self.reads: dict[str, list[Tensor]] = {}  # what enters every linear, and the gradients behind it
        self.returns: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[Tensor]] = {}
        self.losses = []
        handles = [block.register_forward_hook(self._watch(index)) for index, block in enumerate(blocks)] + [
            module.register_forward_hook(self._outputs(name))
            for name, module in blocks.named_modules()
            if isinstance(module, nn.Linear)
        ]
        for row in self.ids.split(1):
            model.zero_grad()
            logits = model(row, use_cache=False).logits[0, :-1]
            loss = functional.cross_entropy(logits, row[0, 1:], reduction="sum")
            loss.backward()
            self.losses.append(loss.item())
            for name, module in blocks.named_modules():
                if isinstance(module, nn.Linear):
                    assert module.weight.grad is not None
                    self.gradients.setdefault(name, []).append(module.weight.grad.clone())
        for handle in handles:
            handle.remove()
        model.zero_grad()

    def _watch(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor]) -> None:
            self.inputs[index].append(inputs[0].detach())
            self.inputs[index + 1].append((output if isinstance(output, Tensor) else output[0]).detach())

        return hook

    def _outputs(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.reads.setdefault(name, []).append(inputs[0].detach().flatten(0, -2).double())

            def add(gradient: Tensor) -> None:
                rows = gradient.reshape(-1, gradient.shape[-1]).double()
                self.outer[name] = self.outer.get(name, 0) + rows.T @ rows
                self.returns.setdefault(name, []).append(rows)

            output.register_hook(add)

        return hook

    def hidden(self, index: int) -> Tensor:
        """Return what enters a block; what is watched twice, as output and as input, counts once."""
        return torch.cat(self.inputs[index][:: 2 if 0 < index < len(self.inputs) - 1 else 1])

    def by_blocks(self, folder: Path, sequences: int = SEQUENCES) -> tuple[float, list[Found]]:
        """Run the stages' functions from the last block to the first, on the first sequences."""
        count = len(self.inputs) - 1
        head = Head(self.tiny.source, self.tiny.parts, device=CPU, dtype=torch.float32)
        made: list[Tensor] = []
        last = activations(folder / "hidden", self.hidden(count))
        loss = head_gradient(head, last, self.ids[:sequences], on_gradient=made.append)
        found = []
        for index in reversed(range(count)):
            upstream = activations(folder / f"upstream{index}", torch.cat(made))
            made = []
            asked: dict[str, Any] = {
                "inputs": activations(folder / f"inputs{index}", self.hidden(index)),
                "upstream": upstream,
                "arguments": self.tiny.arguments()[index],
                "device": CPU,
            }
            block, groups = self.tiny.block(index), self.tiny.groups(index)
            block.requires_grad_(False)
            outer = block_gradients(block, groups, **asked, on_gradient=made.append)
            seen: list[int] = []
            losses = truncation_losses(
                block, some_factors(block), **asked, on_sequence=lambda seen=seen: seen.append(1)
            )
            assert len(seen) == sequences
            found.append(Found(outer, block_fisher(block, groups, **asked), losses))
        return loss, found[::-1]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "opt", "gpt_neox"])
def test_gradients_by_blocks_are_those_of_the_whole_model(
    stored: Callable[[str], Stored], tmp_path: Path, name: str
) -> None:
    """With tied and untied heads, biases, soft norms and several attentions."""
    whole = Whole(stored(name))
    loss, blocks = whole.by_blocks(tmp_path)
    tokens = whole.ids.shape[1] - 1
    assert loss == pytest.approx(sum(whole.losses) / (SEQUENCES * tokens), rel=1e-5)
    for index, block in enumerate(blocks):
        assert set(block.outer) == set(block.fisher)
        for inner, found in block.fisher.items():
            key = f"{index}.{inner}"
            expected = torch.stack(whole.gradients[key]).double()
            scale = float(expected.square().mean())
            torch.testing.assert_close(
                found.squared / scale, expected.square().mean(0).sum(0) / scale, **CLOSE
            )
            assert float(found.norm) == pytest.approx(float(expected.mean(0).norm()), rel=1e-3)
            outer = whole.outer[key] / whole.ids.numel()
            torch.testing.assert_close(block.outer[inner] / outer.norm(), outer / outer.norm(), **CLOSE)
            # What only the first k directions leave out counts by the gradients of its own tokens.
            x, g = torch.cat(whole.reads[key]), torch.cat(whole.returns[key])
            u, v = some_factors(whole.tiny.block(index))[inner]
            missing = torch.stack([g.mul(x @ (u[:, k:] @ v[k:]).T).sum(1).square().mean() for k in range(7)])
            assert block.losses[inner].dtype == torch.float64
            torch.testing.assert_close(2 * block.losses[inner] / missing[0], missing / missing[0], **CLOSE)


def test_gradients_of_some_sequences_are_theirs_alone(
    stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    whole = Whole(stored("llama"))
    loss, blocks = whole.by_blocks(tmp_path, sequences=2)
    assert loss == pytest.approx(sum(whole.losses[:2]) / (2 * (whole.ids.shape[1] - 1)), rel=1e-5)
    for index, block in enumerate(blocks):
        for inner, found in block.fisher.items():
            expected = torch.stack(whole.gradients[f"{index}.{inner}"][:2]).double()
            scale = float(expected.square().mean())
            torch.testing.assert_close(
                found.squared / scale, expected.square().mean(0).sum(0) / scale, **CLOSE
            )


def test_a_gradient_that_is_not_finite_names_its_layer(
    stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    tiny = stored("llama")
    x = tiny.hidden(1)
    asked: dict[str, Any] = {
        "inputs": activations(tmp_path / "x", x),
        "upstream": activations(tmp_path / "upstream", torch.full_like(x, torch.inf)),
        "arguments": tiny.arguments()[0],
        "device": CPU,
    }
    block, groups = tiny.block(0).requires_grad_(False), tiny.groups(0)
    factors = some_factors(block)
    for function, about, more in (
        (block_gradients, groups, {"on_gradient": lambda _: None}),
        (block_fisher, groups, {}),
        (truncation_losses, factors, {"on_sequence": lambda: None}),
    ):
        with pytest.raises(ValueError, match=r"gradient of \w+\.\w+ is not finite; set calibration\.dtype"):
            function(block, about, **asked, **more)  # type: ignore[operator]


def test_a_long_sequence_goes_through_the_head_in_parts(
    stored: Callable[[str], Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, ids = stored("llama"), random_tokens(2)
    hidden = tiny.hidden(2)
    head = Head(tiny.source, tiny.parts, device=CPU, dtype=torch.float32)
    expected = head.loss(hidden, ids)
    monkeypatch.setattr("aasvd.blocks._LOGITS", 128 * 2 * 3)  # three positions of two sequences
    torch.testing.assert_close(head.loss(hidden, ids), expected)


@pytest.mark.parametrize("objective", ["input_aware", "loss_aware"])
def test_directions_of_a_linear_are_its_solutions_of_every_rank(objective: str) -> None:
    chance = torch.Generator().manual_seed(0)
    for shape in ((6, 10), (10, 6)):
        weight = torch.randn(shape, generator=chance, dtype=torch.float64)
        x = torch.randn(shape[1], 40, generator=chance, dtype=torch.float64)
        g = torch.randn(shape[0], 40, generator=chance, dtype=torch.float64)
        known = Statistics(x @ x.T, x.abs().sum(1), 40, outer={"w": g @ g.T / 40})
        u, v = measures.directions({"w": weight}, {("w",): known}, objective=objective)["w"]
        assert u.shape == (shape[0], 6) and v.shape == (6, shape[1])
        solve = solver(objective, known, options=Options(blend=0.0, ridge=0.0))
        for rank in range(1, 7):
            factors = solve("w", weight, rank).factors
            expected = (factors.u @ factors.v).float()
            torch.testing.assert_close(u[:, :rank] @ v[:rank], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(u @ v, weight.float(), atol=1e-5, rtol=1e-5)


def test_a_direction_is_worth_what_the_loss_falls_by_with_it() -> None:
    losses = torch.tensor([5.0, 2.0, 2.5, 0.5], dtype=torch.float64)
    assert measures.influence({"w": losses})["w"].tolist() == [3.0, -0.5, 2.0, 0.5]


def test_spectra_hold_the_outputs_energy() -> None:
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 6, generator=chance, dtype=torch.float64)
    x = torch.randn(6, 40, generator=chance, dtype=torch.float64)
    known = {("w",): Statistics(x @ x.T, x.abs().sum(1), 40)}
    found = measures.spectra({"w": weight}, known)["w"]
    torch.testing.assert_close(found, torch.linalg.svdvals(weight @ x)[:6].square())


def test_profile_is_cosine_and_singular_values(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 5, 8, generator=chance)
    found = measures.profile(activations(tmp_path / "x", x), activations(tmp_path / "y", y), device=CPU)
    expected = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
    assert float(found["cosine"]) == pytest.approx(float(expected.mean()), rel=1e-5)
    torch.testing.assert_close(found["singular"], torch.linalg.svdvals(y.reshape(-1, 8).double()))


def test_sensitivity_is_the_perplexity_with_one_linear_replaced(stored: Callable[[str], Stored]) -> None:
    tiny, ids = stored("llama"), random_tokens(3)
    head = Head(tiny.source, tiny.parts, device=CPU, dtype=torch.float32)
    weight = tiny.block(0).get_submodule("mlp.up_proj").weight.detach()
    tried = [weight, 0.5 * weight, -weight]
    found = measures.sensitivity(
        [lambda: tiny.block(0), lambda: tiny.block(1)],
        tiny.arguments(),
        {"mlp.up_proj": tried},
        hidden=tiny.hidden(3),
        loss=lambda hidden: float(head.loss(hidden, ids).mean()) / (ids.shape[1] - 1),
    )["mlp.up_proj"]
    place = tiny.model.get_submodule(f"{tiny.parts.path}.0.mlp.up_proj")
    for value, trial in zip(found, tried, strict=True):
        place.weight.data.copy_(trial)
        with torch.no_grad():
            logits = tiny.model(ids).logits[:, :-1].flatten(0, 1)
        expected = functional.cross_entropy(logits, ids[:, 1:].flatten()).exp()
        assert float(value) == pytest.approx(float(expected), rel=1e-4)
    place.weight.data.copy_(weight)
