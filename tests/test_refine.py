import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from stored import CPU, Stored, activations
from torch import Tensor, nn

from aasvd.artifacts import Activations
from aasvd.compress import Stream, capture_block, solve_block
from aasvd.objectives import Options, Statistics
from aasvd.rank import uniform_rank
from aasvd.refine import Recipe, distortion, refine, schedule

RECIPE = Recipe(
    epochs=6,
    steps=0,
    batch=4,
    optimizer="adamw",
    learning_rate=3e-3,
    weight_decay=0.01,
    clip=1.0,
    shuffle=True,
    loss="mse",
)
EPS32 = torch.finfo(torch.float32).eps


class Task(NamedTuple):
    """A float32 block to refine, shifted inputs, the original block's outputs, and the type of the passes."""

    block: nn.Module
    inputs: Activations
    targets: Activations
    arguments: dict[str, Any]
    dtype: torch.dtype

    def refine(
        self, recipe: Recipe = RECIPE, *, seed: int = 0, steps: list[tuple[int, int, float]] | None = None
    ) -> tuple[nn.Module, list[float]]:
        """Refine a copy of the block."""
        block = copy.deepcopy(self.block)
        trace = refine(
            block,
            inputs=self.inputs,
            targets=self.targets,
            arguments=self.arguments,
            recipe=recipe,
            generator=torch.Generator().manual_seed(seed),
            device=CPU,
            dtype=self.dtype,
            on_step=lambda *step: None if steps is None else steps.append(step),
        )
        return block, trace

    def distortion(
        self, block: nn.Module, on_output: Callable[[Tensor], None] = lambda _: None
    ) -> dict[str, float]:
        """Measure a block as it is used: with weights in the type of the passes."""
        return distortion(
            copy.deepcopy(block).to(self.dtype),
            inputs=self.inputs,
            targets=self.targets,
            arguments=self.arguments,
            batch=3,
            device=CPU,
            on_output=on_output,
        )


class Listed(Activations):
    """Activations that list which of their sequences were read."""

    def __init__(self, others: Activations) -> None:
        self.__dict__ |= vars(others)
        self.order: list[int] = []

    def read(self, sequences: list[int]) -> Tensor:
        """Read, and remember what."""
        self.order += sequences
        return super().read(sequences)


def state(block: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(tensor, state(second)[name]) for name, tensor in state(first).items())


@pytest.fixture
def task_of(stored: Callable[[str], Stored], tmp_path: Path) -> Callable[[str, torch.dtype], Task]:
    """Return a compressed block of an architecture; its inputs are those of the original, with noise."""

    def build(architecture: str, dtype: torch.dtype) -> Task:
        tiny = stored(architecture)
        block, arguments, groups = tiny.block(dtype=dtype), tiny.arguments(dtype)[0], tiny.groups()
        x = tiny.hidden(8, dtype)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        original = activations(tmp_path / "original.safetensors", x)
        shifted = activations(tmp_path / "shifted.safetensors", x + (0.1 * x.std() * noise).to(dtype))
        outputs: list[Tensor] = []
        captured = capture_block(
            block, groups, inputs=original, arguments=arguments, batch=8, device=CPU, on_output=outputs.append
        )
        compressed = copy.deepcopy(block)
        solve_block(
            block,
            compressed,
            groups,
            objective="anchored",
            # Without a ridge o_proj inverts rounding noise: see test_compress.
            options=Options(blend=1.0, ridge=1e-3),
            weights={name: block.get_submodule(name).weight.detach() for group in groups for name in group},
            ranks={
                name: uniform_rank(
                    *block.get_submodule(name).weight.shape, parameter_ratio=0.5, storage="factors"
                )
                for group in groups
                for name in group
            },
            statistics=[Statistics(*found, x.shape[0] * x.shape[1]) for found in captured],
            stream=Stream(original, shifted, arguments, 8, CPU, dtype),
        )
        targets = activations(tmp_path / "targets.safetensors", outputs[0])
        return Task(compressed.float(), shifted, targets, arguments, dtype)

    return build


@pytest.fixture
def llama(task_of: Callable[[str, torch.dtype], Task]) -> Task:
    return task_of("llama", torch.float32)


class Affine(nn.Module):
    """A block whose gradient can be written down: y = x Wᵀ + b."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def affine(folder: Path, dtype: torch.dtype = torch.float32) -> Task:
    """Return five sequences of three tokens of width two; weights of size one, targets three times that."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 3, 2, generator=generator)
    # Between 0.5 and 1 in size, where float types resolve alike.
    sized = [x.sign() * (0.5 + 0.4 * x.abs().tanh()) for x in torch.randn(3, 2, generator=generator)]
    weight, bias = torch.stack(sized[:2]), sized[2]
    return Task(
        Affine(weight.to(dtype).float(), bias.to(dtype).float()),
        activations(folder / "x.safetensors", x),
        activations(folder / "y.safetensors", 3 * y),
        {},
        dtype,
    )


# The recipe


@pytest.mark.parametrize("clip", [0.05, 1.0, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("loss", ["mse", "relative"])
def test_steps_are_those_of_adamw_written_by_hand(
    tmp_path: Path, clip: float, weight_decay: float, loss: str
) -> None:
    """Six epochs of three batches, the last of one sequence, in order; clipping at 0.05 always acts."""
    task = affine(tmp_path)
    recipe = Recipe(
        epochs=6,
        steps=0,
        batch=2,
        optimizer="adamw",
        learning_rate=0.05,
        weight_decay=weight_decay,
        clip=clip,
        shuffle=False,
        loss=loss,
    )
    steps: list[tuple[int, int, float]] = []
    block, trace = task.refine(recipe, steps=steps)

    x = task.inputs.read(list(range(5))).double().numpy()
    y = task.targets.read(list(range(5))).double().numpy()
    parameters = np.append(
        task.block.weight.detach().double().numpy().ravel(), task.block.bias.detach().numpy()
    )
    first, second = np.zeros(6), np.zeros(6)
    losses, clipped = [], []
    for step in range(18):
        batch = slice(2 * (step % 3), 2 * (step % 3) + 2)
        rows, wanted = x[batch].reshape(-1, 2), y[batch].reshape(-1, 2)
        difference = rows @ parameters[:4].reshape(2, 2).T + parameters[4:] - wanted
        weighted = difference / (
            difference.size if loss == "mse" else len(rows) * (wanted**2).sum(1, keepdims=True)
        )
        losses.append((weighted * difference).sum())
        gradient = 2 * np.append((weighted.T @ rows).ravel(), weighted.sum(0))
        norm = np.sqrt((gradient**2).sum())
        clipped.append(norm > clip)
        gradient *= min(1.0, clip / norm)
        # Warm-up over round(1.8) = 2 steps, then a cosine from 1 towards 0.1 over the other 16.
        rate = (step + 1) / 2 if step < 2 else 0.55 + 0.45 * math.cos(math.pi * (step - 2) / 16)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        parameters = parameters * (1 - 0.05 * rate * weight_decay)
        mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        parameters = parameters - 0.05 * rate * mean / (np.sqrt(square) + 1e-8)
    assert {0.05: all(clipped), 1e6: not any(clipped)}.get(clip, True)

    found = np.append(block.weight.numpy().ravel(), block.bias.numpy())
    # 18 float32 steps on numbers of size one. Clipping divides by norm + 1e-6, a relative 2e-5 at 0.05
    # which Adam's ratio of moments takes out again.
    np.testing.assert_allclose(found, parameters, rtol=0, atol=100 * EPS32)
    np.testing.assert_allclose([value for _, _, value in steps], losses, rtol=100 * EPS32)
    assert [(step, total) for step, total, _ in steps] == [(step + 1, 18) for step in range(18)]
    # Epochs weigh sequences, not batches, equally.
    expected = [(2 * a + 2 * b + c) / 5 for a, b, c in np.reshape(losses, (6, 3))]
    np.testing.assert_allclose(trace, expected, rtol=100 * EPS32)


def test_schedule() -> None:
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[19] == rates[20] == 1
    assert rates[110] == pytest.approx(0.55)
    assert rates[65] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[20:]))
    # The floor is reached one step after the last; on the way there the cosine is flat.
    assert 0.1 < rates[-1] < 0.1001


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_schedule_of_a_few_steps_starts_at_the_peak(steps: int) -> None:
    rates = [schedule(step, steps) for step in range(steps)]
    assert rates[0] == 1 and all(0.1 <= rate <= 1 for rate in rates)


# What refinement does


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt_neox"])
def test_loss_falls_and_everything_moves(
    task_of: Callable[[str, torch.dtype], Task], architecture: str, dtype: torch.dtype, optimizer: str
) -> None:
    task = task_of(architecture, dtype)
    before = state(task.block)
    block, trace = task.refine(RECIPE._replace(optimizer=optimizer))
    assert len(trace) == RECIPE.epochs and trace == sorted(trace, reverse=True)
    before_after = [task.distortion(block)["mse"] for block in (task.block, block)]
    assert before_after[1] < 0.95 * before_after[0]
    after = state(block)
    assert after.keys() == before.keys()
    kinds = {name.rpartition(".")[2] for name in after}
    assert {"u", "v", "weight"} <= kinds and ("bias" in kinds) == (architecture != "llama")
    for name, tensor in after.items():
        # A key's bias adds the same number to all scores of a query: softmax takes it out, its gradient
        # is rounding, and it may move or not.
        if name != "self_attn.k_proj.bias":
            assert not torch.equal(tensor, before[name]), name


def test_muon_moves_matrices_equally_in_all_directions(
    task_of: Callable[[str, torch.dtype], Task],
) -> None:
    """One step changes a matrix by lr · 0.2 √max(m, n) times a nearly orthogonal matrix, norms by lr."""
    task = task_of("llama", torch.float32)
    recipe = RECIPE._replace(epochs=1, steps=1, optimizer="muon", weight_decay=0.0)
    before, after = state(task.block), state(task.refine(recipe)[0])
    for name, tensor in after.items():
        change = (tensor - before[name]) / recipe.learning_rate
        if tensor.ndim == 2:
            sizes = torch.linalg.svdvals(change) / (0.2 * math.sqrt(max(tensor.shape)))
            # Singular values of directions that hardly had a gradient stay smaller.
            assert sizes.max() < 1.1 and sizes.median() > 0.5, name
        else:
            torch.testing.assert_close(change.abs(), torch.ones_like(change), rtol=0, atol=1e-2)


def test_a_limit_on_steps_ends_the_last_epoch_early(task_of: Callable[[str, torch.dtype], Task]) -> None:
    """The schedule spans the steps that are taken, so a limit at an epoch's end equals fewer epochs."""
    task = task_of("llama", torch.float32)
    per_epoch = math.ceil(len(task.inputs) / RECIPE.batch)
    fewer, trace = task.refine(RECIPE._replace(epochs=2))
    limited, same_trace = task.refine(RECIPE._replace(steps=2 * per_epoch))
    assert trace == same_trace
    assert all(torch.equal(tensor, state(fewer)[name]) for name, tensor in state(limited).items())
    _, longer = task.refine(RECIPE._replace(steps=2 * per_epoch + 1))
    assert len(longer) == 3
    assert len(task.refine(RECIPE._replace(steps=10_000))[1]) == RECIPE.epochs


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 8, 100])
def test_the_recipe_knows_how_many_sequences_are_visited(tmp_path: Path, limit: int) -> None:
    """Five sequences in batches of two: each epoch's last batch is a short one."""
    task = affine(tmp_path)
    inputs = Listed(task.inputs)
    recipe = RECIPE._replace(epochs=3, batch=2, steps=limit)
    steps: list[tuple[int, int, float]] = []
    task._replace(inputs=inputs).refine(recipe, steps=steps)
    assert recipe.visits(len(inputs)) == len(inputs.order)
    assert recipe.step_count(len(inputs)) == len(steps)
    assert recipe._replace(epochs=0).visits(len(inputs)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_is_trained_in_place_and_ends_in_float32_without_gradients(
    task_of: Callable[[str, torch.dtype], Task], dtype: torch.dtype
) -> None:
    task = task_of("llama", dtype)
    before, parameters = state(task.block), list(task.block.parameters())
    refine(
        task.block,
        inputs=task.inputs,
        targets=task.targets,
        arguments=task.arguments,
        recipe=RECIPE._replace(epochs=1),
        generator=torch.Generator(),
        device=CPU,
        dtype=dtype,
        on_step=lambda *_: None,
    )
    assert all(
        found is parameter for found, parameter in zip(task.block.parameters(), parameters, strict=True)
    )
    assert not torch.equal(state(task.block)["mlp.up_proj.u"], before["mlp.up_proj.u"])
    for parameter in parameters:
        assert parameter.dtype == torch.float32 and not parameter.requires_grad and parameter.grad is None


def test_updates_below_the_resolution_of_bfloat16_are_not_lost(tmp_path: Path) -> None:
    """Thirty steps of 3e-6 on weights of size one, where bfloat16 knows no number within 4e-3."""
    task = affine(tmp_path, torch.bfloat16)
    recipe = Recipe(
        epochs=30,
        steps=0,
        batch=5,
        optimizer="adamw",
        learning_rate=3e-6,
        weight_decay=0.0,
        clip=1e6,
        shuffle=False,
        loss="mse",
    )
    before = state(task.block)
    block, trace = task.refine(recipe)
    # The rounded weights and with them the gradient stay what they were, so every step of Adam has the
    # size of the rate. A float32 number of size one rounds it by up to 2 %.
    distance = 3e-6 * sum(schedule(step, 30) for step in range(30))
    for name, tensor in state(block).items():
        moved = (tensor - before[name]).abs().flatten().tolist()
        assert moved == pytest.approx([distance] * tensor.numel(), rel=0.05)
        assert torch.equal(tensor.bfloat16().float(), before[name])
    assert trace == [trace[0]] * 30


def test_loss_is_that_of_the_weights_as_they_will_be_used(tmp_path: Path) -> None:
    """The first loss is the bfloat16 block's own, and a later one that of the rounded master weights."""
    task = affine(tmp_path, torch.bfloat16)
    recipe = Recipe(
        epochs=2,
        steps=0,
        batch=5,
        optimizer="adamw",
        learning_rate=0.1,
        weight_decay=0.0,
        clip=1.0,
        shuffle=False,
        loss="mse",
    )
    _, trace = task.refine(recipe)
    assert trace[0] == pytest.approx(task.distortion(task.block)["mse"], rel=100 * EPS32)
    once, _ = task.refine(recipe._replace(epochs=1))
    # A refinement of one step ends where the second of two steps begins: both start at the peak rate.
    assert trace[1] == pytest.approx(task.distortion(once)["mse"], rel=100 * EPS32)


# Repeatability


def test_same_seed_gives_the_same_bytes_whatever_the_global_state(llama: Task) -> None:
    torch.manual_seed(1)
    first, trace = llama.refine()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second, again = llama.refine()
    assert same(first, second) and trace == again
    assert torch.equal(torch.get_rng_state(), before)


def test_order_comes_from_the_generator_alone(llama: Task) -> None:
    orders: dict[tuple[bool, int], list[int]] = {}

    for shuffle in (True, False):
        for seed in (0, 1):
            inputs = Listed(llama.inputs)
            llama._replace(inputs=inputs).refine(
                RECIPE._replace(shuffle=shuffle, epochs=2, batch=3), seed=seed
            )
            orders[shuffle, seed] = inputs.order
    assert orders[False, 0] == orders[False, 1] == [*range(8), *range(8)]
    generator = torch.Generator().manual_seed(1)
    assert orders[True, 1] == [
        *torch.randperm(8, generator=generator),
        *torch.randperm(8, generator=generator),
    ]
    assert orders[True, 0] != orders[True, 1]
    for order in orders.values():
        assert sorted(order[:8]) == sorted(order[8:]) == list(range(8))


# Distortion


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distortion_is_the_explicit_one(
    task_of: Callable[[str, torch.dtype], Task], dtype: torch.dtype
) -> None:
    task = task_of("llama", dtype)
    outputs: list[Tensor] = []
    found = task.distortion(task.block, outputs.append)
    output = torch.cat(outputs)
    assert output.dtype == dtype
    with torch.no_grad():
        expected = task.block.to(dtype)(task.inputs.read(list(range(8))), **task.arguments)
    # Batches of three and of eight may round differently in some ten steps, in the block's own type.
    torch.testing.assert_close(
        output, expected, rtol=0, atol=10 * torch.finfo(dtype).eps * float(expected.abs().max())
    )
    y, target = output.double().numpy(), task.targets.read(list(range(8))).double().numpy()
    norms = np.linalg.norm(y, axis=-1) * np.linalg.norm(target, axis=-1)
    assert found["mse"] == pytest.approx(((y - target) ** 2).mean(), rel=10 * EPS32)
    # Each token's cosine is a float32 near one.
    assert found["cosine"] == pytest.approx((1 - (y * target).sum(-1) / norms).mean(), abs=4 * EPS32)


def test_original_block_on_its_own_inputs_has_no_distortion(
    stored: Callable[[str], Stored], tmp_path: Path
) -> None:
    tiny = stored("llama")
    block, x, arguments = tiny.block(), tiny.hidden(4), tiny.arguments()[0]
    with torch.no_grad():
        y = block(x, **arguments)
    found = distortion(
        block,
        inputs=activations(tmp_path / "x.safetensors", x),
        targets=activations(tmp_path / "y.safetensors", y),
        arguments=arguments,
        batch=4,
        device=CPU,
    )
    assert found["mse"] == 0
    assert abs(found["cosine"]) <= 2 * EPS32


# Errors


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_loss_that_is_not_finite_is_an_error(tmp_path: Path, bad: float) -> None:
    task = affine(tmp_path)
    x = task.inputs.read(list(range(5)))
    x[4, 0, 0] = bad
    broken = task._replace(inputs=activations(tmp_path / "broken.safetensors", x))
    recipe = RECIPE._replace(batch=2, shuffle=False)
    with pytest.raises(
        ValueError, match=r"loss became (nan|inf) at step 3 of 18; lower refinement\.learning_rate"
    ):
        broken.refine(recipe)
    with pytest.raises(ValueError, match="output is not finite"):
        broken.distortion(broken.block)
