import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import TINY
from stored import CPU, Stored, activations
from torch import Tensor, nn

from aasvd import blocks
from aasvd.compress import Captured, Solution, Stream, bucket_grams, capture_block, solve_block
from aasvd.lowrank import LowRankLinear
from aasvd.objectives import Options, Statistics
from aasvd.rank import uniform_rank

EPS = torch.finfo(torch.float64).eps
# Factors are rounded to float32 before they enter a block.
EPS32 = torch.finfo(torch.float32).eps
SEQUENCES = 6


class Side(nn.Module):
    """A block whose first group holds a single row, a tall matrix and a square one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.skip = nn.Linear(6, 1), nn.Linear(6, 10), nn.Linear(6, 6, bias=False)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.skip(x) + self.down(self.gate(x).sigmoid() * self.up(x).relu())
        return output


class Case:
    """A block and its inputs on both sides, in memory and on disk; all of one float type."""

    def __init__(
        self, folder: Path, block: nn.Module, groups: list[list[str]], x: Tensor, arguments: dict[str, Any]
    ) -> None:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
        self.block, self.groups, self.arguments = block, groups, arguments
        self.x, self.x_shifted = x, x + 0.3 * x.std() * noise
        self.original = activations(folder / "original.safetensors", self.x)
        self.shifted = activations(folder / "shifted.safetensors", self.x_shifted)

    def capture(self, batch: int = 4) -> list[Captured]:
        return capture_block(
            self.block,
            self.groups,
            inputs=self.original,
            arguments=self.arguments,
            batch=batch,
            device=CPU,
            on_output=lambda _output: None,
        )

    def ranks(self, ratio: float) -> dict[str, int | None]:
        return {
            name: uniform_rank(*weight_of(self.block, name).shape, parameter_ratio=ratio, storage="factors")
            for group in self.groups
            for name in group
        }

    def statistics(self) -> list[Statistics]:
        count = self.x.shape[0] * self.x.shape[1]
        return [Statistics(found.gram, found.absolute, count) for found in self.capture()]

    def solve(
        self,
        objective: str,
        *,
        ratio: float = 0.6,
        blend: float = 0.5,
        ridge: float = 0.0,
        unshifted: bool = False,
    ) -> tuple[nn.Module, Solution]:
        compressed = copy.deepcopy(self.block)
        shifted = self.original if unshifted else self.shifted
        stream = Stream(self.original, shifted, self.arguments, 4, CPU, self.x.dtype)
        solution = solve_block(
            self.block,
            compressed,
            self.groups,
            objective=objective,
            options=Options(blend=blend, ridge=ridge),
            weights=weights_of(self.block),
            ranks=self.ranks(ratio),
            statistics=self.statistics(),
            stream=None if objective.startswith("input_") else stream,
        )
        return compressed, solution


def weights_of(block: nn.Module) -> dict[str, Tensor]:
    return {name: linear.weight.detach() for name, linear in blocks.linears(block).items()}


def inputs_of(block: nn.Module, name: str, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return what a linear reads in an ordinary call of its block, one token per column."""
    seen: list[Tensor] = []
    handle = block.get_submodule(name).register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0])
    )
    with torch.no_grad():
        block(x, **arguments)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).T


def weight_of(block: nn.Module, name: str) -> Tensor:
    layer = block.get_submodule(name)
    return (layer.dense() if isinstance(layer, LowRankLinear) else layer.weight).detach().double()


@pytest.fixture
def case_of(stored: Callable[[str], Stored], tmp_path: Path) -> Callable[[str], Case]:
    def build(architecture: str, dtype: torch.dtype = torch.float64) -> Case:
        tiny = stored(architecture)
        x, arguments = tiny.hidden(SEQUENCES, dtype), tiny.arguments(dtype)[0]
        return Case(tmp_path, tiny.block(dtype=dtype), tiny.groups(), x, arguments)

    return build


@pytest.fixture
def llama(case_of: Callable[[str], Case]) -> Case:
    return case_of("llama")


@pytest.fixture
def side(tmp_path: Path) -> Case:
    generator = torch.Generator().manual_seed(0)
    block = Side().double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(SEQUENCES, 20, 6, generator=generator, dtype=torch.float64)
    return Case(tmp_path, block, [["gate", "up", "skip"], ["down"]], x, {})


# Covariances of the original block


@pytest.mark.parametrize("architecture", TINY)
def test_captured_covariances_are_the_explicit_ones(
    case_of: Callable[[str], Case], architecture: str
) -> None:
    case = case_of(architecture)
    outputs: list[Tensor] = []
    captured = capture_block(
        case.block,
        case.groups,
        inputs=case.original,
        arguments=case.arguments,
        batch=4,
        device=CPU,
        on_output=outputs.append,
    )
    assert len(captured) == len(case.groups)
    for group, (gram, absolute) in zip(case.groups, captured, strict=True):
        for name in group:
            x = inputs_of(case.block, name, case.x, case.arguments)
            # Two float64 sums over 120 tokens of inputs that batches of 4 and of 6 compute alike but for
            # rounding in some ten steps.
            bound = 500 * EPS * float(x.square().sum(0).max() * x.shape[1])
            torch.testing.assert_close(gram, x @ x.T, rtol=0, atol=bound)
            # Each batch is summed in float32.
            torch.testing.assert_close(absolute, x.abs().sum(1), rtol=1e-6, atol=0)
    with torch.no_grad():
        expected = case.block(case.x, **case.arguments)
    torch.testing.assert_close(
        torch.cat(outputs), expected, rtol=0, atol=1000 * EPS * float(expected.abs().max())
    )


def test_covariances_do_not_depend_on_the_batch(llama: Case) -> None:
    for (gram, _), (other, _) in zip(llama.capture(batch=1), llama.capture(batch=50), strict=True):
        torch.testing.assert_close(gram, other, rtol=0, atol=1000 * EPS * float(gram.diagonal().max()))


@pytest.mark.parametrize("buckets", [[[0], [1], [2], [3], [4], [5]], [[4, 1], [0, 3, 5], [2]]])
def test_bucket_covariances_are_those_of_averaged_sequences(llama: Case, buckets: list[list[int]]) -> None:
    grams = bucket_grams(
        llama.block,
        llama.groups,
        inputs=llama.original,
        buckets=buckets,
        arguments=llama.arguments,
        device=CPU,
    )
    for group, gram in zip(llama.groups, grams, strict=True):
        x = inputs_of(llama.block, group[0], llama.x, llama.arguments)
        x = x.view(len(x), SEQUENCES, -1)
        averaged = torch.cat([x[:, some].mean(1) for some in buckets], 1)
        bound = 500 * EPS * float(averaged.square().sum())
        torch.testing.assert_close(gram, averaged @ averaged.T, rtol=0, atol=bound)


# Solving


def slow_anchored(
    case: Case, *, ratio: float, blend: float
) -> tuple[nn.Module, dict[str, Tensor], dict[str, float]]:
    """Compress a block by reduced-rank regression on raw inputs, recomputing everything for every linear.

    Returns the block with dense float64 weights W', and by linear W'X' and ‖WX − W'X'‖ / ‖WX‖.
    """
    compressed = copy.deepcopy(case.block)
    outputs: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for group in case.groups:
        weights: dict[str, Tensor] = {}
        for name in group:
            weight = weight_of(case.block, name)
            x = inputs_of(case.block, name, case.x, case.arguments)
            x_shifted = inputs_of(compressed, name, case.x_shifted, case.arguments)
            target = weight @ (blend * x + (1 - blend) * x_shifted)
            # Singular values below 1e-10 of the largest are zeros: where v_proj's rank is below the width
            # of its heads, o_proj reads heads of fewer directions than they have channels.
            solution = torch.from_numpy(
                np.linalg.lstsq(x_shifted.T.numpy(), target.T.numpy(), rcond=1e-10)[0]
            ).T
            rank = uniform_rank(*weight.shape, parameter_ratio=ratio, storage="factors")
            left = torch.linalg.svd(solution @ x_shifted, full_matrices=False).U[:, :rank]
            weights[name] = left @ left.T @ solution
            outputs[name] = weights[name] @ x_shifted
            errors[name] = float((weight @ x - outputs[name]).norm() / (weight @ x).norm())
        with torch.no_grad():
            for name in group:
                compressed.get_submodule(name).weight.copy_(weights[name])
    return compressed, outputs, errors


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt_neox"])
@pytest.mark.parametrize("blend", [1.0, 0.4, 0.0])
def test_solution_equals_a_slow_reference(
    case_of: Callable[[str], Case], architecture: str, blend: float
) -> None:
    """Each group is fitted to the inputs that the groups compressed before it cause."""
    case = case_of(architecture)
    block, outputs, errors = slow_anchored(case, ratio=0.6, blend=blend)
    compressed, solution = case.solve("blended" if blend else "shift_aware", blend=blend)
    for name, expected in outputs.items():
        found = weight_of(compressed, name) @ inputs_of(compressed, name, case.x_shifted, case.arguments)
        # Every group inherits the float32 rounding of the factors before it, times the inverse of the gap
        # in its spectrum (up to 200). Another input than the one that the groups before cause changes
        # the output by 1e-2 and more: see the next test.
        torch.testing.assert_close(found, expected, rtol=0, atol=1000 * EPS32 * float(expected.abs().max()))
        if blend > 0:
            assert solution.report[name]["relative_error"] == pytest.approx(errors[name], rel=1e3 * EPS32)
    with torch.no_grad():
        found, expected = (b(case.x_shifted, **case.arguments) for b in (compressed, block))
    torch.testing.assert_close(found, expected, rtol=0, atol=1000 * EPS32 * float(expected.abs().max()))


def test_the_reference_would_notice_a_missing_shift(llama: Case) -> None:
    """The comparison above means something: without the groups before, W'X' is another by far more."""
    _, outputs, _ = slow_anchored(llama, ratio=0.6, blend=1)
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        alone = copy.copy(llama)
        alone.groups = [[name]]
        _, expected, _ = slow_anchored(alone, ratio=0.6, blend=1)
        assert (outputs[name] - expected[name]).norm() > 1e-2 * expected[name].norm()


@pytest.mark.parametrize("name", ["input_aware", "input_agnostic"])
def test_objectives_without_shift_look_at_original_inputs_only(llama: Case, name: str) -> None:
    compressed, solution = llama.solve(name)
    for linear in [linear for group in llama.groups for linear in group]:
        weight = weight_of(llama.block, linear)
        x = inputs_of(llama.block, linear, llama.x, llama.arguments)
        seen = x if name == "input_aware" else torch.eye(len(x), dtype=torch.float64)
        rank = solution.report[linear]["rank"]
        assert isinstance(rank, int)
        left = torch.linalg.svd(weight @ seen, full_matrices=False).U[:, :rank]
        expected = left @ left.T @ weight
        # Two roundings to float32, and nothing that amplifies them.
        torch.testing.assert_close(
            weight_of(compressed, linear), expected, rtol=0, atol=4 * EPS32 * float(expected.norm())
        )
        error = float(((weight - expected) @ seen).norm() / (weight @ seen).norm())
        assert solution.report[linear]["relative_error"] == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt"])
def test_objectives_agree_in_the_first_group_where_nothing_is_shifted(
    case_of: Callable[[str], Case], architecture: str
) -> None:
    case = case_of(architecture)
    expected, _ = case.solve("input_aware")
    for name in ("shift_aware", "anchored", "blended", "saes"):
        compressed, _ = case.solve(name, blend=0.3, unshifted=True)
        for name in case.groups[0]:
            wanted = weight_of(expected, name)
            torch.testing.assert_close(
                weight_of(compressed, name), wanted, rtol=0, atol=4 * EPS32 * float(wanted.norm())
            )
        later = case.groups[-1][0]
        assert (weight_of(compressed, later) - weight_of(expected, later)).norm() > 1e-3


def test_anchored_is_the_best_of_the_objectives_at_what_it_minimises(llama: Case) -> None:
    """‖WX − W'X'‖ of the first group, whose inputs all objectives share."""
    errors = {}
    names = ["input_agnostic", "input_aware", "shift_aware", "anchored", "blended", "saes"]
    for name in names:
        compressed, _ = llama.solve(name)
        for linear in llama.groups[0]:
            x = inputs_of(llama.block, linear, llama.x, llama.arguments)
            x_shifted = inputs_of(llama.block, linear, llama.x_shifted, llama.arguments)
            difference = weight_of(llama.block, linear) @ x - weight_of(compressed, linear) @ x_shifted
            errors[name, linear] = float(difference.norm())
    for linear in llama.groups[0]:
        assert min(names, key=lambda name: errors[name, linear]) == "anchored"


def test_ridge_is_relative_and_reported(llama: Case) -> None:
    _, plain = llama.solve("input_aware")
    _, solution = llama.solve("input_aware", ridge=0.5)
    for group, (gram, _) in zip(llama.groups, llama.capture(), strict=True):
        for name in group:
            assert plain.report[name]["ridge"] == 0
            assert solution.report[name]["ridge"] == pytest.approx(
                0.5 * float(gram.diagonal().mean()), rel=100 * EPS
            )
    assert not torch.equal(plain.tensors["mlp.down_proj.u"], solution.tensors["mlp.down_proj.u"])


def test_ridge_keeps_rounding_noise_from_being_inverted(case_of: Callable[..., Case]) -> None:
    """At this ratio v_proj's rank is below the width of its heads: o_proj's inputs do not fill theirs.

    In float64 the empty directions are dropped. In bfloat16 rounding fills them with noise some 300 times
    smaller than a channel, which the anchored solution is free to use, with weights to match.
    """
    norms = {}
    for dtype in (torch.float64, torch.bfloat16):
        case = case_of("llama", dtype)
        for ridge in (0.0, 1e-3):
            compressed, solution = case.solve("anchored", ratio=0.5, ridge=ridge)
            dropped = solution.report["self_attn.o_proj"]["directions_dropped"]
            assert dropped == (12 if (dtype, ridge) == (torch.float64, 0.0) else 0)
            fitted, weight = (weight_of(block, "self_attn.o_proj") for block in (compressed, case.block))
            norms[dtype, ridge] = float(fitted.norm() / weight.norm())
    assert norms.pop((torch.bfloat16, 0.0)) > 10
    assert max(norms.values()) < 2


# What is made


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("ratio", [0.2, 0.8])
def test_ranks_biases_and_tensors(case_of: Callable[[str], Case], architecture: str, ratio: float) -> None:
    case = case_of(architecture)
    before = {name: parameter.clone() for name, parameter in case.block.named_parameters()}
    compressed, solution = case.solve("anchored", ratio=ratio)
    names = [name for group in case.groups for name in group]
    assert list(solution.report) == names
    assert sorted(solution.tensors) == sorted(f"{name}.{factor}" for name in names for factor in "uv")
    for name in names:
        dense, layer = case.block.get_submodule(name), compressed.get_submodule(name)
        assert isinstance(dense, nn.Linear) and isinstance(layer, LowRankLinear)
        rows, columns = dense.weight.shape
        assert layer.rank == solution.report[name]["rank"] == int(ratio * rows * columns / (rows + columns))
        u, v = solution.tensors[f"{name}.u"], solution.tensors[f"{name}.v"]
        assert u.dtype == v.dtype == torch.float32
        assert torch.equal(layer.u, u.double()) and torch.equal(layer.v, v.double())
        assert (layer.bias is None) == (dense.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, dense.bias)
    # What is not a linear stays, and the original block with it.
    after = dict(compressed.named_parameters())
    for name, parameter in case.block.named_parameters():
        assert torch.equal(parameter, before[name])
        assert name.removesuffix(".weight") in names or torch.equal(after[name], parameter)


def test_block_shares_no_memory_with_the_solution_or_the_original(case_of: Callable[..., Case]) -> None:
    """Refinement trains the block in place: in float32 on the host, a view would change its sources too."""
    case = case_of("qwen2", torch.float32)
    compressed, solution = case.solve("anchored")
    names = [name for group in case.groups for name in group]
    ours = {
        parameter.data_ptr() for name in names for parameter in compressed.get_submodule(name).parameters()
    }
    assert len(ours) == 2 * 7 + 3  # biases on q, k and v
    assert not ours & {tensor.data_ptr() for tensor in solution.tensors.values()}
    assert not ours & {parameter.data_ptr() for parameter in case.block.parameters()}


def test_matrix_whose_factors_would_not_be_smaller_stays_dense(side: Case) -> None:
    compressed, solution = side.solve("anchored")
    assert compressed.gate is not side.block.gate and isinstance(compressed.gate, nn.Linear)
    assert torch.equal(compressed.gate.weight, side.block.gate.weight)
    assert solution.report["gate"] == {"rank": None}
    assert not [name for name in solution.tensors if name.startswith("gate.")]
    assert all(isinstance(compressed.get_submodule(name), LowRankLinear) for name in ("up", "skip", "down"))


def test_fewer_tokens_than_channels(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    """Every covariance is singular: the result is finite, the directions are counted, training inputs fit."""
    full = case_of("llama")
    few = Case(tmp_path / "few", full.block, full.groups, full.x[:1], full.arguments)
    compressed, solution = few.solve("anchored", ratio=0.9)
    for name, entry in solution.report.items():
        # One sequence of 20 tokens.
        assert entry["directions_dropped"] == weight_of(few.block, name).shape[1] - 20
    with torch.no_grad():
        assert torch.isfinite(compressed(few.x_shifted, **few.arguments)).all()


def test_result_is_the_same_to_the_last_bit_every_time(llama: Case) -> None:
    _, first = llama.solve("anchored")
    torch.manual_seed(5)
    _, second = llama.solve("anchored")
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert first.report == second.report


def test_compressed_block_can_be_trained(llama: Case) -> None:
    """Nothing made in inference mode is left in it."""
    compressed, _ = llama.solve("anchored")
    compressed(llama.x_shifted, **llama.arguments).square().mean().backward()
    assert all(parameter.grad is not None for parameter in compressed.parameters())


# Errors


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_inputs_name_the_layers(side: Case, tmp_path: Path, bad: float) -> None:
    x = side.x.clone()
    x[4, 3, 2] = bad
    broken = activations(tmp_path / "broken.safetensors", x)
    arguments: dict[str, Any] = {"inputs": broken, "arguments": {}, "batch": 4, "device": CPU}
    with pytest.raises(ValueError, match="not finite"):
        capture_block(side.block, side.groups, on_output=lambda _output: None, **arguments)
    statistics = side.statistics()
    side.shifted = broken
    with pytest.raises(ValueError, match="covariance of the inputs of gate, up, skip is not finite"):
        side.solve("anchored")
    statistics[1] = statistics[1]._replace(gram=bad * statistics[1].gram)
    with pytest.raises(ValueError, match="covariance of the inputs of down is not finite"):
        solve_block(
            side.block,
            copy.deepcopy(side.block),
            side.groups,
            objective="input_aware",
            options=Options(blend=0, ridge=0),
            weights=weights_of(side.block),
            ranks=side.ranks(0.6),
            statistics=statistics,
            stream=None,
        )


def test_output_that_is_not_finite_is_an_error(side: Case) -> None:
    """An overflow in the last linear shows in no covariance of its own block."""
    with torch.no_grad():
        side.block.down.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="original block's output is not finite"):
        side.capture()
