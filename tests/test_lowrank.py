import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aasvd.lowrank import LowRankLinear

# (in, out, rank): one direction, all of them, wide and tall.
SIZES = [(6, 6, 1), (6, 6, 6), (12, 5, 3), (5, 12, 5)]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def layer_of(sizes: tuple[int, int, int], *, bias: bool = True) -> LowRankLinear:
    in_features, out_features, rank = sizes
    return LowRankLinear.from_factors(
        random(out_features, rank), random(rank, in_features), random(out_features) if bias else None
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_output_is_sum_of_rank_one_maps(sizes: tuple[int, int, int], bias: bool) -> None:
    layer = layer_of(sizes, bias=bias)
    x = random(2, 7, sizes[0])
    expected = torch.zeros(2, 7, sizes[1], dtype=torch.float64)
    for direction in range(sizes[2]):
        expected += (x * layer.v[direction]).sum(-1, keepdim=True) * layer.u[:, direction]
    if bias:
        expected += random(sizes[1])
    # At most 12 + 6 additions of numbers of order ten, in another order.
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=200 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("sizes", SIZES)
def test_dense_is_the_weight_of_an_equal_linear(sizes: tuple[int, int, int]) -> None:
    layer = layer_of(sizes)
    linear = nn.Linear(sizes[0], sizes[1], dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(layer.dense())
        linear.bias.copy_(random(sizes[1]))
    x = random(3, sizes[0])
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=200 * torch.finfo(torch.float64).eps)


def test_full_rank_svd_reproduces_the_weight() -> None:
    weight = random(5, 12)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    layer = LowRankLinear.from_factors(left * singular, right)
    assert layer.rank == 5
    # Backward error of an SVD: a modest multiple of eps times the largest singular value, here about 5.
    torch.testing.assert_close(layer.dense(), weight, rtol=0, atol=100 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_match_finite_differences(sizes: tuple[int, int, int]) -> None:
    layer = layer_of(sizes)
    x = random(3, sizes[0]).requires_grad_()

    def output(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"u": u, "v": v, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.u, layer.v, layer.bias))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    layer = layer_of((12, 5, 3))
    x = random(4, 12)
    layer(x).square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(parameter.grad, plain[name]) for name, parameter in layer.named_parameters())


def test_autocast_computes_in_bfloat16_and_keeps_parameters() -> None:
    layer = layer_of((12, 5, 3)).to(torch.float32)
    x = random(4, 12).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert layer.u.dtype == torch.float32
    # Factors, input, latents and output are each rounded once: relative 4 eps of terms up to about 15.
    torch.testing.assert_close(
        output.float(), layer(x), rtol=0, atol=4 * 15 * torch.finfo(torch.bfloat16).eps
    )


def test_traces_as_one_graph() -> None:
    layer = layer_of((12, 5, 3))
    x = random(4, 12)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))


def test_constructor_allocates_as_told() -> None:
    layer = LowRankLinear(12, 5, 3, bias=True, device="meta", dtype=torch.bfloat16)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "u": (5, 3),
        "v": (3, 12),
        "bias": (5,),
    }
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert (layer.in_features, layer.out_features, layer.rank) == (12, 5, 3)
    assert "in_features=12, out_features=5, rank=3, bias=True" in repr(layer)


def test_state_round_trips() -> None:
    layer = layer_of((12, 5, 3), bias=False)
    assert list(layer.state_dict()) == ["u", "v"]
    other = LowRankLinear(12, 5, 3, bias=False, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dense(), layer.dense())
    assert torch.equal(copy.deepcopy(layer).dense(), layer.dense())


def test_from_factors_shares_memory() -> None:
    u, v = random(5, 3), random(3, 12)
    layer = LowRankLinear.from_factors(u, v)
    assert layer.u.data_ptr() == u.data_ptr() and layer.v.data_ptr() == v.data_ptr()
    assert layer.u.requires_grad


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} .*12 to 5 .*expected 1 to 5"):
        LowRankLinear(12, 5, rank, bias=False)


def test_factors_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(4, 12\)"):
        LowRankLinear.from_factors(random(5, 3), random(4, 12))
    with pytest.raises(ValueError, match=r"\(5,\) and \(3, 12\)"):
        LowRankLinear.from_factors(random(5), random(3, 12))
    with pytest.raises(ValueError, match=r"bias of shape \(4,\): expected \(5,\)"):
        LowRankLinear.from_factors(random(5, 3), random(3, 12), random(4))
    with pytest.raises(ValueError, match="rank 6"):
        LowRankLinear.from_factors(random(5, 6), random(6, 12))
