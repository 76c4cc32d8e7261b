import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visattn.attention.pairwise import core
from visattn.attention.pairwise.core import Concatenation, Dot, Softmax, halve


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that any operation gave, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return result


def triple(n: int = 6, m: int = 5, d: int = 4, e: int = 3, b: int = 2) -> list[Tensor]:
    return [torch.randn(b, *shape, dtype=torch.double, requires_grad=True) for shape in ((n, d), (m, d), (m, e))]


def affinities(width: int = 4) -> list[Softmax | Dot | Concatenation]:
    return [Softmax(), Softmax(0.5), Dot(), Concatenation(width).double()]


def name(affinity: torch.nn.Module) -> str:
    return repr(affinity).partition("\n")[0]


@pytest.fixture
def without_matrix(monkeypatch) -> None:
    """Whatever the size, nothing is dispatched to the matrix, as in a compiled graph."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def test_is_plain_self_attention():
    x = torch.randn(4, 35, dtype=torch.double)
    weights = (x.T @ x).softmax(0)
    y = x @ weights
    torch.testing.assert_close(Softmax().read(x.T[None], x.T[None], x.T[None])[0].T, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("affinity", affinities(), ids=name)
@pytest.mark.parametrize("widths", [(4, 4), (4, 3), (4, 9)], ids=str)
@pytest.mark.parametrize("keys", [1, 5])
def test_reads_the_same_without_the_matrix(affinity, widths, keys, without_matrix):
    query, key, value = triple(m=keys, d=widths[0], e=widths[1])
    y, matrix = affinity.read(query, key, value), affinity.weights(query, key) @ value
    torch.testing.assert_close(y, matrix, rtol=0, atol=1e-12)
    g, inputs = torch.randn_like(y), [query, key, value, *affinity.parameters()]
    for ours, theirs in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(matrix, inputs, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("affinity", affinities(), ids=name)
def test_gradient_without_the_matrix_is_correct(affinity, without_matrix):
    assert torch.autograd.gradcheck(affinity.read, triple())


@pytest.mark.parametrize("affinity", affinities(8), ids=name)
@pytest.mark.parametrize("e", [8, 16])
def test_holds_no_matrix_of_a_large_map(affinity, e):
    n, m = 6000, 3000
    query, key, value = (x.float().detach().requires_grad_() for x in triple(n, m, 8, e, b=1))
    with Largest() as largest:
        affinity.float().read(query, key, value).sum().backward()
    assert largest.elements <= n * 4 * e  # the matrix has n * 3000
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("affinity", [Dot(), Concatenation(256).double()], ids=name)
def test_makes_the_matrix_of_a_small_map_where_the_linear_form_is_slower(affinity):
    with Largest() as largest, torch.no_grad():
        affinity.read(*triple(49, 49, 256, 256, b=1))
    assert largest.elements == 49 * 256  # the linear forms have 256 * 256 and 50 * 512


def test_makes_the_matrix_of_a_small_map_where_the_fused_kernel_is_slower(monkeypatch):
    for limit, matrix in ((core.SMALL, True), (0, False)):
        monkeypatch.setattr(core, "SMALL", limit)
        with Largest() as largest:
            Softmax().read(*triple(49, 49, 8, 8, b=1))
        assert (largest.elements == 49 * 49) == matrix


def test_logits_are_float32_where_halves_would_overflow_or_round():
    x = 300 * torch.randn(1, 6, 4)
    query = x.half()
    logits = query.float() @ query.float().mT
    assert logits.max() > 65504
    torch.testing.assert_close(Softmax().weights(query, query), logits.softmax(-1).half())
    q = torch.tensor([[[64.0]]])
    k = torch.tensor([[[4.0], [4.015625]]])  # their logits, 256 and 257, are one number in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(Softmax().weights(q, k)[0, 0], torch.tensor([0.0, 1.0]).softmax(0))


def test_dot_and_concatenation_read_halves_over_many_keys_without_overflow():
    ones = torch.ones(1, 30000, 4, dtype=torch.half)
    torch.testing.assert_close(Dot().read(8 * ones, 8 * ones, ones), 256 * ones, rtol=2e-3, atol=0)
    affinity = Concatenation(4).half()
    torch.nn.init.ones_(affinity.join.weight)
    torch.testing.assert_close(affinity.read(8 * ones, 8 * ones, ones), 64 * ones, rtol=2e-3, atol=0)


@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0], ids=["all scores negative", "mixed", "all positive"])
def test_concatenation_sums_the_right_keys(shift, without_matrix):
    affinity = Concatenation(1).double()
    torch.nn.init.ones_(affinity.join.weight)
    a = shift + torch.tensor([0.0, 1.0, 1.0, -2.0], dtype=torch.double)
    b = torch.tensor([0.0, -1.0, 2.0, 2.0, -1.0], dtype=torch.double)  # ties, and scores of exactly zero
    value = torch.randn(1, 5, 3, dtype=torch.double)
    y = affinity.read(a[None, :, None], b[None, :, None], value)
    for i in range(4):
        expected = sum(max(a[i] + b[j], torch.zeros(())) * value[0, j] for j in range(5)) / 5
        torch.testing.assert_close(y[0, i], expected.expand(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("space", "half"), [((1,), (1,)), ((5,), (3,)), ((1, 1), (1, 1)), ((4, 7), (2, 4)), ((3, 1, 5), (3, 1, 3))]
)
def test_halves_space_but_not_time_and_drops_no_border(space, half):
    x = torch.zeros(1, 1, *space)
    x.view(-1)[-1] = 1
    assert halve(x).shape == (1, 1, *half)
    assert halve(x).view(-1)[-1] == 1
