"""What holds for every attention module; one line in the table brings a module under all of it."""

import copy
import inspect
import io
import pickle
import re
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pytest
import torch
from jaxtyping import TypeCheckError, jaxtyped
from torch import Tensor, nn
from torch.func import functional_call

from visattn import attention
from visattn.attention import (
    BAM,
    CBAM,
    Attention,
    ChannelGate,
    EfficientChannelAttention,
    NonLocal,
    SelfAttention2d,
    SpatialGate,
    SqueezeExcitation,
)


class Case(NamedTuple):
    """A module with some options, and what its paper says of them."""

    cls: type[Attention]
    options: dict[str, Any]
    parameters: Callable[[int], int]
    """How many parameters, by channels."""
    golden: tuple[int, int]
    """The same at 64 and at 256 channels, as counted in reference implementations."""
    grid: tuple[int, ...] = (5, 7)
    sums_to_one: int | None = None
    """The axis over which the weights sum to one, if they do."""
    norm_over: Literal["positions", "samples"] | None = None
    """What a batch norm inside takes its statistics over; training needs at least two of them."""

    def make(self, channels: int) -> Attention:
        return self.cls(channels, **self.options)

    def lively(self, channels: int = 64, dtype: torch.dtype = torch.double) -> Attention:
        """A module in which nothing is zero and nothing the identity."""
        module = self.make(channels).to(dtype).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                nn.init.uniform_(buffer, 0.5, 1.5)
        return module

    def input(self, batch: int = 2, channels: int = 64, dtype: torch.dtype = torch.double) -> Tensor:
        return torch.randn(batch, channels, *self.grid, dtype=dtype)

    def __str__(self) -> str:
        options = "".join(f"-{name}={value}" for name, value in self.options.items())
        return self.cls.__name__ + options + (f"-{len(self.grid)}d" if len(self.grid) != 2 else "")


CASES = [
    Case(SqueezeExcitation, {}, lambda c: c * c // 8 + c // 16 + c, (580, 8464)),
    Case(SqueezeExcitation, {"bias": False}, lambda c: c * c // 8, (512, 8192)),
    Case(EfficientChannelAttention, {}, lambda c: c.bit_length() // 2 | 1, (3, 5)),
    Case(EfficientChannelAttention, {"kernel_size": 7}, lambda c: 7, (7, 7)),
    Case(ChannelGate, {}, lambda c: c * c // 8 + c // 16 + c, (580, 8464)),
    Case(SpatialGate, {}, lambda c: 2 * 7 * 7 + 2, (100, 100), norm_over="positions"),
    Case(SpatialGate, {"kernel_size": 3}, lambda c: 2 * 3 * 3 + 2, (20, 20), norm_over="positions"),
    *(
        Case(CBAM, options, lambda c: c * c // 8 + c // 16 + c + 2 * 7 * 7 + 2, (680, 8564), norm_over="positions")
        for options in ({}, {"order": "spatial-channel"}, {"zero_init": True})
    ),
    *(
        Case(
            BAM,
            options,
            lambda c: 3 * c * c // 16 + 18 * (c // 16) ** 2 + 13 * c // 16 + c + 1,
            (1173, 17_361),
            norm_over="samples",
        )
        for options in ({}, {"combine": "product"}, {"dilation": 1})
    ),
    *(
        Case(NonLocal, options, parameters, golden, grid, -1 if softmax else None, norm_over="positions")
        for options, parameters, golden, softmax in (
            ({}, lambda c: 2 * c * c + 3 * c // 2 + 3 * c, (8480, 132_224), True),
            ({"scale": True}, lambda c: 2 * c * c + 3 * c // 2 + 3 * c, (8480, 132_224), True),
            ({"subsample": "pre"}, lambda c: 2 * c * c + 3 * c // 2 + 3 * c, (8480, 132_224), True),
            ({"subsample": "post"}, lambda c: 2 * c * c + 3 * c // 2 + 3 * c, (8480, 132_224), True),
            ({"affinity": "gaussian"}, lambda c: c * c + c // 2 + 3 * c, (4320, 66_432), True),
            ({"affinity": "dot"}, lambda c: 2 * c * c + 3 * c // 2 + 3 * c, (8480, 132_224), False),
            ({"affinity": "concatenation"}, lambda c: 2 * c * c + 5 * c // 2 + 3 * c, (8544, 132_480), False),
        )
        for grid in ([(5, 7)] if options else [(5, 7), (7,), (2, 5, 7)])
    ),
    Case(NonLocal, {"norm": False}, lambda c: 2 * c * c + 5 * c // 2, (8352, 131_712), sums_to_one=-1),
    Case(SelfAttention2d, {}, lambda c: c * c // 2 + 1, (2049, 32_769), sums_to_one=-1),
    Case(SelfAttention2d, {"form": "released"}, lambda c: 5 * c * c // 4 + 1, (5121, 81_921), sums_to_one=-1),
    Case(SelfAttention2d, {"spectral_norm": True}, lambda c: c * c // 2 + 1, (2049, 32_769), sums_to_one=-1),
]
CLASSES = sorted({case.cls for case in CASES}, key=lambda cls: cls.__name__)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
either_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def tensors(weights: Any) -> tuple[Tensor, ...]:
    return (weights,) if isinstance(weights, Tensor) else tuple(weights)


def test_the_table_holds_every_public_module():
    assert {cls.__name__ for cls in CLASSES} == set(attention.__all__) - {"Attention"}


def test_shapes_in_signatures_are_checked_while_testing():
    with pytest.raises(TypeCheckError):
        SqueezeExcitation(64).attend(torch.randn(64))


def kinds(cls: type[Attention]) -> list[Any]:
    """The shapes of the weights, as the signature states them."""
    kind = typing.get_type_hints(cls.attend)["return"]
    return list(typing.get_type_hints(kind).values()) if issubclass(kind, tuple) else [kind]


@every_case
@either_mode
def test_keeps_its_shape_contract(case, training):
    module, x = case.lively().train(training), case.input()
    assert module(x).shape == x.shape
    weights = tensors(module.attend(x))
    with jaxtyped("context"):  # one meaning of every axis for all of them
        assert isinstance(x, typing.get_type_hints(case.cls.attend)["x"])
        for each, kind in zip(weights, kinds(case.cls), strict=True):
            assert isinstance(each, kind)
            assert each.isfinite().all()


@every_case
def test_forward_reads_where_it_attends(case):
    module, x = case.lively(), case.input()
    y = module(x)
    assert not torch.equal(y, x)
    torch.testing.assert_close(y, module.read(x, weights=module.attend(x)), rtol=0, atol=1e-11)


@every_case
@either_mode
def test_is_the_identity_at_init_iff_it_says_so(case, training):
    module, x = case.make(64).train(training), case.input(dtype=torch.float)
    assert torch.equal(module(x), x) == module.identity_at_init


@pytest.mark.parametrize("case", [case for case in CASES if case.cls.neutral is not None], ids=str)
def test_reads_its_input_bit_for_bit_at_neutral_weights(case):
    module, x = case.lively(dtype=torch.float), case.input(dtype=torch.float)
    weights = module.attend(x)
    neutral = [torch.full_like(w, case.cls.neutral) for w in tensors(weights)]
    neutral = neutral[0] if isinstance(weights, Tensor) else type(weights)(*neutral)
    assert torch.equal(module.read(x, weights=neutral), x)


@every_case
@pytest.mark.parametrize("form", ["fast", "full"])
def test_gradient_is_correct(case, form):
    batch, channels = (2, 64) if form == "fast" else (1, 16)
    still = "spectral_norm" in case.options  # its weights take a step in each forward
    module = case.lively(channels).train(form == "fast" and not still)
    x = torch.randn(batch, channels, *(case.grid if form == "fast" else (2, 3, 5)[-len(case.grid) :])).double()
    names, values = zip(*module.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=form == "fast")


@every_case
def test_samples_do_not_mix(case):
    module, x = case.lively(), case.input(batch=3)
    alone = torch.cat([module(sample[None]) for sample in x])
    torch.testing.assert_close(module(x), alone, rtol=0, atol=1e-11)


@every_case
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_weights_round_trip(case, way):
    module, x = case.lively(), case.input()
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        twin = case.make(64).double().eval()
        twin.load_state_dict(torch.load(file, weights_only=True))
    elif way == "pickle" and "spectral_norm" in case.options:  # nor does torch pickle it
        with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
            pickle.dumps(module)
        return
    else:
        twin = copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert twin.arguments == module.arguments
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(x), module(x))  # it has its own


@every_case
def test_weights_sum_to_one_where_they_should(case):
    for weights in tensors(case.lively().attend(case.input())):
        axes = range(1, weights.ndim) if case.sums_to_one is None else [case.sums_to_one % weights.ndim]
        ones = [torch.allclose(s, torch.ones_like(s)) for s in (weights.sum(axis) for axis in axes)]
        assert any(ones) == (case.sums_to_one is not None)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@either_mode
def test_is_finite_in_bf16_and_keeps_the_input_s_dtype(case, dtype, autocast, training):
    module = case.lively(dtype=torch.float if autocast else dtype).train(training)
    x = case.input(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    assert y.dtype == dtype
    assert y.isfinite().all()


@every_case
def test_channels_last_gives_the_same(case):
    module, x = case.lively(), case.input()
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert last.stride() != x.stride()
    torch.testing.assert_close(module(last), module(x), rtol=0, atol=1e-11)


@every_case
@either_mode
def test_writes_to_no_input(case, training):
    module, x = case.lively().train(training), case.input()
    before = x.clone()
    weights = module.attend(x)
    kept = [w.clone() for w in tensors(weights)]
    gradient = torch.ones_like(x)
    (module(x), module.read(x, weights=weights))[0].backward(gradient)
    assert torch.equal(x, before)
    assert torch.equal(gradient, torch.ones_like(x))
    assert all(torch.equal(w, k) for w, k in zip(tensors(weights), kept, strict=True))


@every_case
@either_mode
def test_makes_no_parameter_in_forward(case, training):
    module = case.make(64).train(training)
    before = {name: id(p) for name, p in module.named_parameters()}, set(module.state_dict())
    module(case.input(dtype=torch.float))
    assert ({name: id(p) for name, p in module.named_parameters()}, set(module.state_dict())) == before


@every_case
@either_mode
@pytest.mark.parametrize("side", ["1x1", "1xn", "nx1", "odd"])
def test_takes_any_size_one_sample_at_a_time(case, side, training):
    module, ndim = case.lively().train(training), len(case.grid)
    sizes = {"1x1": [1] * ndim, "1xn": [1] * (ndim - 1) + [6], "nx1": [6] + [1] * (ndim - 1), "odd": [3, 9, 7][:ndim]}
    x = torch.randn(1, 64, *sizes[side], dtype=torch.double)
    if training and (case.norm_over == "samples" or (case.norm_over == "positions" and side == "1x1")):
        with pytest.raises(ValueError, match=r"more than (1|one) .*got"):
            module(x)
    else:
        y = module(x)
        assert y.shape == x.shape
        assert y.isfinite().all()


@every_case
@either_mode
def test_compiles_without_a_break(case, training, unchecked):
    module, x = case.lively().train(training), case.input()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for f in (module, compiled):
        f(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-11)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@every_case
def test_exports_with_dynamic_batch_and_size(case, unchecked):
    module = nn.Sequential(case.lively())  # whose forward names its argument
    free = {axis: torch.export.Dim.DYNAMIC for axis in (0, *range(2, 2 + len(case.grid)))}
    program = torch.export.export(module, (case.input(),), dynamic_shapes=(free,), strict=False).module()
    for batch, scale in ((3, 2), (1, 3)):
        x = torch.randn(batch, 64, *(scale * side + 1 for side in case.grid), dtype=torch.double)
        torch.testing.assert_close(program(x), module(x), rtol=0, atol=1e-11)


@every_class
def test_rejects_a_misspelt_option(cls):
    with pytest.raises(TypeError, match="reductoin"):
        cls(64, reductoin=8)


@every_class
def test_options_are_named(cls):
    first, *rest = inspect.signature(cls).parameters.values()
    assert first.name == "channels"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)


@every_case
@pytest.mark.parametrize("channels", [64, 256])
def test_has_the_parameters_its_paper_says(case, channels):
    count = sum(p.numel() for p in case.make(channels).parameters())
    assert count == case.parameters(channels)
    assert count == dict(zip((64, 256), case.golden, strict=True))[channels]


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
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|doi:10\.\d{4,}/\S+", cls.paper)


@every_case
def test_its_arguments_build_it_again(case):
    module, x = case.lively(), case.input()
    assert module.arguments == {"channels": 64, **case.options}
    twin = type(module)(**module.arguments).double().eval()
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))
