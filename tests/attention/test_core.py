import pytest
import torch
from torch.nn import functional as F

from visattn.attention import core


@pytest.fixture
def rounded():
    """Matrix products as ``--matmul_precision medium`` has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def heads(*, n=7, m=7, d=5) -> list[torch.Tensor]:
    return [torch.randn(3, 2, size, d, requires_grad=True) for size in (n, m, m)]


def gradients(y, inputs):
    return torch.autograd.grad(y.square().sum(), inputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"causal": True}, {"mask": torch.ones(7, 7).tril(-2).bool().logical_not()}, {"mask": "bias"}],
    ids=["plain", "scaled", "causal", "masked", "biased"],
)
def test_few_weights_are_written_out_where_the_kernel_is_slow(options, rounded, monkeypatch):
    inputs = heads()
    options = {name: torch.randn(3, 2, 7, 7) if value == "bias" else value for name, value in options.items()}
    mask, causal, scale = options.get("mask"), options.get("causal", False), options.get("scale")
    torch.set_float32_matmul_precision("highest")
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=causal, scale=scale)
    wanted = gradients(expected, inputs)

    torch.set_float32_matmul_precision("medium")
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given, **_: calls.append(1) or given[2])
    y = core.scaled_dot_product(*inputs, **options)
    assert not calls
    torch.set_float32_matmul_precision("highest")  # for the gradients, and now as it is at any size
    torch.testing.assert_close(y, expected, atol=0.03, rtol=0.03)
    for found, right in zip(gradients(y, inputs), wanted, strict=True):
        torch.testing.assert_close(found, right, atol=0.1, rtol=0.1)
    core.scaled_dot_product(*inputs, **options)
    assert calls


@pytest.mark.parametrize("change", ["many", "bfloat16", "autocast"])
def test_otherwise_the_kernel_reads(change, rounded, monkeypatch):
    inputs = heads(n=60, m=60) if change == "many" else heads()
    monkeypatch.setattr(core, "SMALL", 3 * 2 * 50 * 50)
    if change == "bfloat16":
        inputs = [x.to(torch.bfloat16) for x in inputs]
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given, **_: calls.append(1) or given[2])
    with torch.autocast("cpu", enabled=change == "autocast"):
        core.scaled_dot_product(*inputs)
    assert calls
