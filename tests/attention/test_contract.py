"""What holds for every attention module; one line in a module's own test file brings it under all of it."""

import copy
import inspect
import io
import math
import pickle
import re
import typing
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError, jaxtyped
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.case import Case, gather
from visattn import attention
from visattn.attention import Attention, SqueezeExcitation

CASES = gather()
CLASSES = sorted({case.cls for case in CASES}, key=lambda cls: cls.__name__)

FIRST = [case for i, case in enumerate(CASES) if case.cls not in {other.cls for other in CASES[:i]}]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_case_in_time = pytest.mark.parametrize(  # what takes seconds: other options of a module in the slow part
    "case",
    [case if any(case is c for c in FIRST) else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
either_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


HEADS_COST = {
    "AttentionPool": "with one query, every head reads the map itself",
    "ClassAttention": "with one query, every head reads the map itself",
    "EfficientAttention": "a head mixes its own features only",
    "LambdaAttention": "all heads share keys and values, whose width is that of a head",
    "OutlookAttention": "a head has its own weights, made by a layer",
    **dict.fromkeys(attention.sampling.__all__, "every head samples the map"),
}


def tensors(weights: Any) -> tuple[Tensor, ...]:
    return (weights,) if isinstance(weights, Tensor) else tuple(weights)


def close(ours: Any, theirs: Any, tolerance: float = 1e-11) -> None:
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def same(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(one, other) for one, other in zip(tensors(ours), tensors(theirs), strict=True))


def test_the_table_holds_every_public_module():
    assert {cls.__name__ for cls in CLASSES} == set(attention.__all__) - {"Attention", *attention.memory.__all__}


def test_shapes_in_signatures_are_checked_while_testing():
    with pytest.raises(TypeCheckError):
        SqueezeExcitation(64).attend(torch.randn(64))


def kinds(method: Any) -> list[Any]:
    """The shapes of what a method returns, as its signature states them."""
    kind = typing.get_type_hints(method)["return"]
    if typing.get_origin(kind) is tuple:
        return list(typing.get_args(kind))
    return list(typing.get_type_hints(kind).values()) if issubclass(kind, tuple) else [kind]


@every_case
@either_mode
def test_keeps_its_shape_contract(case, training):
    module, x = case.lively().train(training), case.input()
    weights, y = tensors(module.attend(*x)), tensors(module(*x))
    hints, names = typing.get_type_hints(case.cls.attend), list(inspect.signature(case.cls.attend).parameters)[1:]
    with jaxtyped("context"):  # one meaning of every axis for all of them
        for each, name in zip(x, names[: case.inputs], strict=True):
            assert isinstance(each, hints[name])
        for each, kind in zip((*weights, *y), (*kinds(case.cls.attend), *kinds(case.cls.read)), strict=True):
            assert isinstance(each, kind)
            assert each.isfinite().all()


@every_case
def test_forward_reads_where_it_attends(case):
    module, x = case.lively(), case.input()
    y = module(*x)
    assert tensors(y)[0].shape != x[0].shape or not torch.equal(tensors(y)[0], x[0])
    close(y, module.read(*x, weights=module.attend(*x)))


@every_case
@either_mode
def test_is_the_identity_at_init_iff_it_says_so(case, training):
    module, x = case.make().train(training), case.input(dtype=torch.float)
    y = tensors(module(*x))
    assert (y[0].shape == x[0].shape and torch.equal(y[0], x[0])) == module.identity_at_init


@pytest.mark.parametrize("case", [case for case in CASES if case.cls.neutral is not None], ids=str)
def test_reads_its_input_bit_for_bit_at_neutral_weights(case):
    module, x = case.lively(dtype=torch.float), case.input(dtype=torch.float)
    weights = module.attend(*x)
    neutral = [torch.full_like(w, case.cls.neutral) for w in tensors(weights)]
    neutral = neutral[0] if isinstance(weights, Tensor) else type(weights)(*neutral)
    assert torch.equal(module.read(*x, weights=neutral), x[0])


def check_gradient(case: Case, fast: bool) -> None:
    still = "spectral_norm" in case.options  # its weights take a step in each forward
    small = case.grid if case.fixed else (2, 3, 5)[-len(case.grid) :]
    module = case.lively(None if fast else case.small).train(fast and not still)
    x = case.input() if fast else case.input(1, case.small, grid=small)
    names, values = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())

    def call(*given: Tensor) -> Any:
        x, values = given[: case.inputs], given[case.inputs :]
        return functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (*(each.requires_grad_() for each in x), *values), fast_mode=fast)


@every_case
def test_gradient_is_correct_in_a_direction(case):
    check_gradient(case, fast=True)


@pytest.mark.slow
@every_case
def test_gradient_is_correct(case):
    check_gradient(case, fast=False)


@every_case
def test_samples_do_not_mix(case):
    module, x = case.lively(), case.input(batch=3)
    alone = zip(*(tensors(module(*sample)) for sample in zip(*(each.split(1) for each in x), strict=True)), strict=True)
    close(module(*x), [torch.cat(each) for each in alone])


@every_case
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_weights_round_trip(case, way):
    module, x = case.lively(), case.input()
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        twin = case.make().double().eval()
        twin.load_state_dict(torch.load(file, weights_only=True))
    elif way == "pickle" and "spectral_norm" in case.options:  # nor does torch pickle it
        with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
            pickle.dumps(module)
        return
    else:
        twin = copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert twin.arguments == module.arguments
    assert same(twin(*x), module(*x))
    if list(twin.parameters()):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not same(twin(*x), module(*x))  # it has its own


@every_case
def test_weights_sum_to_one_where_they_should(case):
    several = tensors(case.lively().attend(*case.input()))
    for weights, axes in zip(several, case.axes(len(several)), strict=True):
        tried = range(1, weights.ndim) if axes is None else [axes]
        sums = [weights.sum(axis) for axis in tried if axes is not None or weights.shape[axis] > 1]
        ones = [torch.allclose(s, torch.ones_like(s)) for s in sums]
        assert any(ones) == (axes is not None)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@either_mode
def test_is_finite_in_bf16_and_keeps_the_input_s_dtype(case, dtype, autocast, training):
    module = case.lively(dtype=torch.float if autocast else dtype).train(training)
    x = case.input(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        several = tensors(module(*x))
    assert all(y.dtype == dtype for y in several)
    assert all(y.isfinite().all() for y in several)


class OfTwo(nn.Module):
    def __init__(self, module: Attention):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.module(x, y)


class PlainNorm(nn.BatchNorm2d):
    """Batch norm in eval as its equation reads."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


@pytest.mark.parametrize(
    "case", [c for c in CASES if (c.inputs, len(c.grid)) == (1, 2) and c.cls.replaces != "pool"], ids=str
)
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_batch_norm_beside_it_gets_the_right_gradient_from_one_image(case, side):
    module, (x,) = case.lively(), case.input(1)
    channels = (x if side == "before" else module(x)).shape[1]
    norm, plain = (cls(channels).double().eval() for cls in (nn.BatchNorm2d, PlainNorm))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(norm.state_dict())
    found = []
    for each in (norm, plain):
        x = x.detach().requires_grad_()
        y = module(each(x)) if side == "before" else each(module(x))
        torch.manual_seed(0)
        found.append(torch.autograd.grad(y, (x, *each.parameters()), torch.randn_like(y.contiguous())))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@every_case
def test_channels_last_gives_the_same(case):
    module, x = case.lively(), case.input()
    last = [each.movedim(1, -1).contiguous().movedim(-1, 1) for each in x]
    assert last[0].stride() != x[0].stride()
    close(module(*last), module(*x))


@every_case
@either_mode
def test_writes_to_no_input(case, training):
    module, x = case.lively().train(training), case.input()
    before = [each.clone() for each in x]
    weights = module.attend(*x)
    kept = [w.clone() for w in tensors(weights)]
    several = tensors(module(*(each.requires_grad_() for each in x)))
    gradients = [torch.ones_like(y) for y in several]
    module.read(*x, weights=weights)
    torch.autograd.backward(several, gradients)
    assert same(x, before)
    assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in gradients)
    assert same(weights, kept)


@every_case
@either_mode
def test_makes_no_parameter_in_forward(case, training):
    module = case.make().train(training)
    before = {name: id(p) for name, p in module.named_parameters()}, set(module.state_dict())
    module(*case.input(dtype=torch.float))
    assert ({name: id(p) for name, p in module.named_parameters()}, set(module.state_dict())) == before


@every_case
@either_mode
@pytest.mark.parametrize("side", ["1x1", "1xn", "nx1", "odd"])
def test_takes_any_size_one_sample_at_a_time(case, side, training):
    module, ndim = case.lively().train(training), len(case.grid)
    sizes = {"1x1": [1] * ndim, "1xn": [1] * (ndim - 1) + [6], "nx1": [6] + [1] * (ndim - 1), "odd": [3, 9, 7][:ndim]}
    x = case.input(1, grid=sizes[side])
    if case.fixed:
        with pytest.raises(ValueError, match=r"size must be .*5.*7.*, got"):
            module(*x)
    elif training and side in {"samples": sizes, "positions": ["1x1"], "strips": ["1x1", "1xn", "nx1"]}.get(
        case.norm_over, []
    ):
        with pytest.raises(ValueError, match=r"more than (1|one) .*got"):
            module(*x)
    else:
        several = tensors(module(*x))
        assert all(y.isfinite().all() for y in several)
        if case.cls.replaces != "pool":
            assert several[0].shape[2:] == x[0].shape[2:]


@every_case_in_time
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"])
def test_compiles_without_a_break(case, training, unchecked):
    module, x = case.lively().train(training), case.input()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for f in (module, compiled):
        sum(y.square().sum() for y in tensors(f(*(each.requires_grad_() for each in x)))).backward()
    close(compiled(*x), module(*x))
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@every_case_in_time
def test_exports_with_dynamic_batch_and_size(case, unchecked):
    module = (nn.Sequential if case.inputs == 1 else OfTwo)(case.lively())  # whose forward names its arguments
    axes = (0,) if case.fixed else (0, *range(2, 2 + len(case.grid)))
    free = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _ in range(case.inputs))
    program = torch.export.export(module, case.input(), dynamic_shapes=free, strict=False).module()
    for batch, scale in ((3, 2), (1, 3)):
        grid = case.grid if case.fixed else [scale * side + 1 for side in case.grid]
        x = case.input(batch, grid=grid)
        close(program(*x), module(*x))


@every_class
def test_rejects_a_misspelt_option(cls):
    with pytest.raises(TypeError, match="reductoin"):
        cls(64, reductoin=8)


@every_class
def test_options_are_named(cls):
    first, *rest = inspect.signature(cls).parameters.values()
    assert first.name == "channels"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if "size" in inspect.signature(cls).parameters])
def test_says_that_it_needs_a_size(cls):
    tied = next(case for case in CASES if case.cls is cls and case.fixed)
    options = {name: value for name, value in tied.options.items() if name != "size"}
    with pytest.raises(ValueError, match=r"size must be .*, got None"):
        cls(64, **options)


@every_case
@pytest.mark.parametrize("which", [0, 1], ids=["narrow", "wide"])
def test_has_the_parameters_its_paper_says(case, which):
    channels = case.channels[which]
    count = sum(p.numel() for p in case.make(channels).parameters())
    assert count == case.parameters(channels)
    assert count == case.golden[which]


@every_case
def test_has_the_multiply_adds_its_paper_says(case):
    *outer, height, width = (1, *case.grid)
    expected = case.macs(case.channels[0], math.prod(outer) * height, width)
    module, x = case.make().eval(), case.input(1, dtype=torch.float)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*x)
    assert counter.get_total_flops() == 2 * expected


HEADS = [case for case in CASES if "heads" in inspect.signature(case.cls).parameters and "heads" not in case.options]


@pytest.mark.parametrize("case", [case for case in HEADS if case.cls.__name__ not in HEADS_COST], ids=str)
def test_costs_the_same_with_one_four_and_eight_heads(case):
    def cost(heads: int) -> int:
        module = case.cls(case.channels[0], heads=heads, **case.options).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*case.input(1, dtype=torch.float))
        return counter.get_total_flops()

    assert cost(1) == cost(4) == cost(8) > 0


@every_class
def test_docstring_has_an_equation_every_argument_and_an_example(cls):
    doc = inspect.getdoc(cls)
    assert inspect.getdoc(cls) != inspect.getdoc(Attention)
    assert ".. math::" in doc
    _, _, rest = doc.partition("\nArgs:\n")
    args, _, _ = rest.partition("\n\n")
    assert re.findall(r"^    (\w+): \S", args, re.M) == list(inspect.signature(cls).parameters)
    assert re.search(r"\nExample:\n    >>> ", doc)


@every_class
def test_names_its_paper(cls):
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|doi:10\.\d{4,}/\S+|https://(proceedings|openaccess)\.\S+", cls.paper)


@every_case
def test_its_arguments_build_it_again(case):
    module, x = case.lively(), case.input()
    assert module.arguments == {"channels": case.channels[0], **case.options}
    twin = type(module)(**module.arguments).double().eval()
    twin.load_state_dict(module.state_dict())
    assert same(twin(*x), module(*x))
