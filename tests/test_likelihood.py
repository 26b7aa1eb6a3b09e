import pytest
import torch

from aasvd import likelihood


@pytest.mark.parametrize("elements", [1, 7 * 11, 2**21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """−log softmax in float64, by hand; whatever is computed at a time."""
    monkeypatch.setattr(likelihood, "_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    logits = (40 * torch.randn(13, 11, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(11, (13,), generator=generator)
    found = likelihood.token_losses(logits, targets)
    exact = logits.detach().double()
    shifted = exact - exact.max(1, keepdim=True).values
    probabilities = shifted.exp() / shifted.exp().sum(1, keepdim=True)
    wanted = shifted.exp().sum(1).log() - shifted[torch.arange(13), targets]
    assert found.dtype == torch.float32 and found.shape == (13,)
    torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-6, atol=1e-5)
    found.sum().backward()
    assert logits.grad is not None
    gradient = probabilities - torch.nn.functional.one_hot(targets, 11)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(logits.grad.double(), gradient, **close)
