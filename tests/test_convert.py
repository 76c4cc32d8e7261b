"""Weights as they are released: synthetic, of exactly those names and shapes, and what is computed with them."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers import (
    AttentionPool2d,
    CecaModule,
    EcaModule,
    EffectiveSEModule,
    SEModule,
    SplitAttn,
)
from timm.layers import GlobalContext as TimmGlobalContext
from timm.layers import SelectiveKernel as TimmSelectiveKernel
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn
from torch.nn import functional as F

import visattn
from visattn import (
    BAM,
    CBAM,
    AttentionPool,
    BottleneckSelfAttention,
    CoordinateAttention,
    EffectiveSqueezeExcitation,
    EfficientChannelAttention,
    GlobalContext,
    SelectiveKernel,
    SplitAttention,
    SqueezeExcitation,
)
from visattn.convert import SOURCES, ConversionError, convert

State = dict[str, Tensor]


# --- what is released -------------------------------------------------------------------------------------------------


def affine(name: str, *shape: int) -> State:
    return {f"{name}.weight": torch.randn(shape) / 4, f"{name}.bias": torch.randn(shape[0])}


def batch_norm(name: str, width: int) -> State:
    """As written by old versions, which counted no batches."""
    running = {f"{name}.running_mean": torch.randn(width), f"{name}.running_var": torch.rand(width) + 0.5}
    return affine(name, width) | running


def cbam_state(c: int) -> State:
    return {
        **affine("ChannelGate.mlp.1", c // 16, c),
        **affine("ChannelGate.mlp.3", c, c // 16),
        "SpatialGate.spatial.conv.weight": torch.randn(1, 2, 7, 7) / 4,
        **batch_norm("SpatialGate.spatial.bn", 1),
    }


def bam_state(c: int) -> State:
    channel, spatial, r = "channel_att.gate_c.gate_c", "spatial_att.gate_s.gate_s", c // 16
    state = affine(f"{channel}_fc_0", r, c) | batch_norm(f"{channel}_bn_1", r) | affine(f"{channel}_fc_final", c, r)
    state |= affine(f"{spatial}_conv_reduce0", r, c, 1, 1) | batch_norm(f"{spatial}_bn_reduce0", r)
    for k in range(2):
        state |= affine(f"{spatial}_conv_di_{k}", r, r, 3, 3) | batch_norm(f"{spatial}_bn_di_{k}", r)
    return state | affine(f"{spatial}_conv_final", 1, r, 1, 1)


def gcnet_state(c: int, way: str = "add") -> State:
    transform, r = f"channel_{way}_conv", c // 16
    return {
        **affine("conv_mask", 1, c, 1, 1),
        **affine(f"{transform}.0", r, c, 1, 1),
        **{f"{transform}.1.{name}": torch.randn(r, 1, 1) for name in ("weight", "bias")},
        **affine(f"{transform}.3", c, r, 1, 1),
    }


def coordinate_state(c: int, height: str = "conv_h", width: str = "conv_w") -> State:
    r = max(8, c // 32)
    ends = affine(height, c, r, 1, 1) | affine(width, c, r, 1, 1)
    return affine("conv1", r, c, 1, 1) | batch_norm("bn1", r) | ends


def eca_state(c: int, kernel_size: int = 3) -> State:
    return {"conv.weight": torch.randn(1, 1, kernel_size)}


# --- what is computed with it -----------------------------------------------------------------------------------------


def norm(state: State, name: str, x: Tensor) -> Tensor:
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts)


def conv(state: State, name: str, x: Tensor, **options) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def dense(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def cbam(state: State, x: Tensor) -> Tensor:
    pools = x.mean((2, 3)), x.amax((2, 3))
    logits = sum(dense(state, "ChannelGate.mlp.3", dense(state, "ChannelGate.mlp.1", p).relu()) for p in pools)
    x = x * logits.sigmoid()[:, :, None, None]
    pooled = torch.stack((x.amax(1), x.mean(1)), 1)  # the maximum comes first
    gate = norm(state, "SpatialGate.spatial.bn", conv(state, "SpatialGate.spatial.conv", pooled, padding=3))
    return x * gate.sigmoid()


def bam(state: State, x: Tensor) -> Tensor:
    channel, spatial = "channel_att.gate_c.gate_c", "spatial_att.gate_s.gate_s"
    inner = norm(state, f"{channel}_bn_1", dense(state, f"{channel}_fc_0", x.mean((2, 3)))).relu()
    which = dense(state, f"{channel}_fc_final", inner)[:, :, None, None]
    y = norm(state, f"{spatial}_bn_reduce0", conv(state, f"{spatial}_conv_reduce0", x)).relu()
    for k in range(2):
        y = conv(state, f"{spatial}_conv_di_{k}", y, padding=4, dilation=4)
        y = norm(state, f"{spatial}_bn_di_{k}", y).relu()
    return x * (1 + (which * conv(state, f"{spatial}_conv_final", y)).sigmoid())


def gcnet(state: State, x: Tensor, way: str = "add") -> Tensor:
    weights = conv(state, "conv_mask", x).flatten(2).softmax(2)
    read, transform = (x.flatten(2) @ weights.mT)[..., None], f"channel_{way}_conv"
    inner = conv(state, f"{transform}.0", read)
    parts = state[f"{transform}.1.weight"], state[f"{transform}.1.bias"]
    t = conv(state, f"{transform}.3", F.layer_norm(inner, parts[0].shape, *parts).relu())
    return x + t if way == "add" else x * t.sigmoid()


def coordinate(state: State, x: Tensor, height: str = "conv_h", width: str = "conv_w") -> Tensor:
    both = torch.cat((x.mean(3), x.mean(2)), 2)[..., None]
    rows, columns = F.hardswish(norm(state, "bn1", conv(state, "conv1", both))).split(x.shape[2:], 2)
    return x * conv(state, height, rows).sigmoid() * conv(state, width, columns).sigmoid().mT


def eca(state: State, x: Tensor) -> Tensor:
    weight = state["conv.weight"]
    return x * F.conv1d(x.mean((2, 3))[:, None], weight, padding=weight.shape[2] // 2).sigmoid()[:, 0, :, None, None]


RELEASED = {
    "cbam": ("cbam", cbam_state, cbam, CBAM, {}, ()),
    "bam": ("bam", bam_state, bam, BAM, {"combine": "product"}, ()),
    "gcnet add": ("gcnet", gcnet_state, gcnet, GlobalContext, {}, ("add",)),
    "gcnet mul": ("gcnet", gcnet_state, gcnet, GlobalContext, {"fusion": "scale"}, ("mul",)),
    "coordinate": ("coordinate", coordinate_state, coordinate, CoordinateAttention, {}, ()),
    "coordinate, mobile": ("coordinate", coordinate_state, coordinate, CoordinateAttention, {}, ("conv2", "conv3")),
    "eca": ("eca", eca_state, eca, EfficientChannelAttention, {}, ()),
}
every_release = pytest.mark.parametrize("released", RELEASED.values(), ids=RELEASED.keys())


@every_release
def test_released_weights_compute_what_they_did(released):
    source, made, compute, cls, options, way = released
    state, x = made(64, *way), torch.randn(2, 64, 5, 7)
    module = cls(64, **options).eval()
    module.load_state_dict(convert(state, source))
    torch.testing.assert_close(module(x), compute(state, x, *way))
    counted = {name: tensor for name, tensor in module.state_dict().items() if name.endswith("num_batches_tracked")}
    assert not any(counted.values())
    again = convert({f"module.{name}": tensor for name, tensor in state.items()}, source, into=module)
    assert again.keys() == module.state_dict().keys()


def test_the_released_bam_multiplies():
    state, x = bam_state(64), torch.randn(2, 64, 5, 7)
    module = BAM(64).eval()
    module.load_state_dict(convert(state, "bam"))
    assert not torch.allclose(module(x), bam(state, x))


def test_released_widths_are_the_reduction_and_kernel_size():
    module = EfficientChannelAttention(64, kernel_size=7)
    module.load_state_dict(convert(eca_state(64, 7), "eca", into=module))
    with pytest.raises(ConversionError, match=r"conv.weight is \(1, 1, 7\), expected \(1, 1, 3\)"):
        convert(eca_state(64, 7), "eca", into=EfficientChannelAttention(64))


# --- timm's layers ----------------------------------------------------------------------------------------------------

TIMM = [
    (SEModule(64, rd_channels=4), SqueezeExcitation(64)),
    (SEModule(64, rd_channels=8, bias=False), SqueezeExcitation(64, reduction=8, bias=False)),
    (EffectiveSEModule(64), EffectiveSqueezeExcitation(64)),
    (EcaModule(64), EfficientChannelAttention(64)),
    (CecaModule(256), EfficientChannelAttention(256, padding="circular")),
    (CbamModule(64), CBAM(64)),
    (CbamModule(64, rd_ratio=1 / 8, mlp_bias=True, spatial_kernel_size=3), CBAM(64, reduction=8, kernel_size=3)),
    (TimmGlobalContext(64), GlobalContext(64, reduction=8, fusion="scale")),
    (TimmGlobalContext(64, fuse_add=True, fuse_scale=False), GlobalContext(64, reduction=8)),
    (CoordAttn(64, rd_channels=8), CoordinateAttention(64)),
    (CoordAttn(64, rd_channels=8, bias=True), CoordinateAttention(64)),
    (SplitAttn(64, norm_layer=nn.BatchNorm2d), SplitAttention(64, downsample="convolution")),
    (
        TimmSelectiveKernel(64, groups=8, rd_channels=32, split_input=False),
        SelectiveKernel(64, groups=8),
    ),
    (BottleneckAttn(64, feat_size=(5, 7)), BottleneckSelfAttention(64, size=(5, 7), scale_positions=False)),
    (AttentionPool2d(64, feat_size=(5, 7), head_dim=8), AttentionPool(64, size=(5, 7))),
]


@pytest.mark.parametrize(("theirs", "ours"), TIMM, ids=lambda module: type(module).__name__)
def test_timm_s_layers_compute_what_they_did(theirs, ours):
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    if isinstance(theirs, TimmGlobalContext):
        (theirs.mlp_add or theirs.mlp_scale).norm.eps = ours.norm.eps
    name = type(theirs).__name__.replace("CecaModule", "EcaModule")
    ours.load_state_dict(convert(theirs.state_dict(), f"timm.{name}", into=ours))
    x = torch.randn(2, 256 if isinstance(theirs, CecaModule) else 64, 5, 7)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_every_source_is_tested():
    ours = {source for source, *_ in RELEASED.values()} | {f"timm.{type(theirs).__name__}" for theirs, _ in TIMM}
    assert ours - {"timm.CecaModule"} == set(SOURCES)


def test_timm_s_norms_are_not_ours():
    with pytest.raises(ConversionError, match=r"timm.SplitAttn: missing: bn0.bias, .*bn1.weight$"):
        convert(SplitAttn(64).state_dict(), "timm.SplitAttn")
    both = TimmGlobalContext(64, fuse_add=True)
    with pytest.raises(ConversionError, match=r"timm.GlobalContext: left over: mlp_scale.fc1.bias, "):
        convert(both.state_dict(), "timm.GlobalContext")


# --- whole networks ---------------------------------------------------------------------------------------------------


def under(name: str, state: State) -> State:
    return {f"{name}.{key}": tensor for key, tensor in state.items()}


def released_resnet(parts: dict[str, State], compute, name: str = "resnet18"):
    """A network as released: torchvision's, with a function of its own weights behind some of its modules."""
    network = getattr(torchvision.models, name)(num_classes=10).eval()
    state = network.state_dict()
    for where, (key, part) in parts.items():
        state |= under(key, part)
        hook = lambda module, args, output, part=part: compute(part, output)  # noqa: E731
        network.get_submodule(where).register_forward_hook(hook)
    return network, state


BLOCKS = [(f"layer{k}.{i}", 64 * 2 ** (k - 1)) for k in range(1, 5) for i in range(2)]


@pytest.mark.parametrize(
    ("source", "cls", "key", "made", "compute", "blocks"),
    [
        ("cbam", CBAM, "cbam", cbam_state, cbam, BLOCKS),
        ("eca", EfficientChannelAttention, "eca", lambda c: eca_state(c, 5 if c > 64 else 3), eca, BLOCKS),
        ("gcnet", GlobalContext, "context_block", gcnet_state, gcnet, BLOCKS[2:]),
    ],
    ids=["cbam", "eca", "gcnet"],
)
@pytest.mark.parametrize("gate", ["identity", None])
def test_released_networks_compute_what_they_did(source, cls, key, made, compute, blocks, gate):
    parts = {f"{block}.bn2": (f"{block}.{key}", made(c)) for block, c in blocks}
    theirs, state = released_resnet(parts, compute)
    ours = visattn.insert(timm.create_model("resnet18", num_classes=10), cls, gate=gate).eval()
    ours.load_state_dict(convert(under("module", state), source, into=ours))
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_a_released_network_with_bam_computes_what_it_did():
    parts = {f"layer{k}": (f"bam{k}", bam_state(64 * 2 ** (k - 1))) for k in (1, 2, 3)}
    theirs, state = released_resnet(parts, bam)
    state = dict(reversed(state.items()))
    make = partial(BAM, combine="product")
    ours = visattn.insert(timm.create_model("resnet18", num_classes=10), make, gate=None).eval()
    ours.load_state_dict(convert(state, "bam", into=ours))
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def number(shape: torch.Size, value: int) -> Tensor:
    return torch.tensor(float(value)).expand(shape)


def test_resnet_101_with_cbam_has_every_block_in_its_place():
    with torch.device("meta"):
        theirs, made = torchvision.models.resnet101(), timm.create_model("resnet101")
        ours = visattn.insert(made, CBAM, gate=None)
        blocks = [f"layer{k}.{i}" for k, n in enumerate((3, 4, 23, 3), 1) for i in range(n)]
        parts = {block: cbam_state(64 * 4 * 2 ** (int(block[5]) - 1)) for block in blocks}
    state = {name: number(tensor.shape, 0) for name, tensor in theirs.state_dict().items()}
    for k, (block, part) in enumerate(parts.items()):
        state |= under(f"{block}.cbam", {name: number(tensor.shape, k) for name, tensor in part.items()})
    converted = convert(dict(sorted(state.items())), "cbam", into=ours)  # layer3.10 comes before layer3.2
    assert converted.keys() == ours.state_dict().keys()
    for k, block in enumerate(blocks):
        key = f"visattn.{block.replace('.', '__')}__bn3__CBAM.attention.channel.excite.bias"
        assert converted[key][0] == k


def test_resnet_50_with_cbam_and_bam_has_the_names_and_the_parameters_that_were_released():
    for source, cls, keys, golden in (
        ("cbam", CBAM, [f"layer{k}.{i}.cbam" for k, n in enumerate((3, 4, 6, 3), 1) for i in range(n)], 28_089_624),
        ("bam", BAM, ["bam1", "bam2", "bam3"], 25_915_099),
    ):
        with torch.device("meta"):
            ours = visattn.insert(timm.create_model("resnet50"), cls, gate=None)
            state = torchvision.models.resnet50().state_dict()
            made = cbam_state if source == "cbam" else bam_state
            for key in keys:
                stage = int(key[5] if source == "cbam" else key[3])
                state |= under(key, made(128 * 2**stage))
        converted = convert(state, source, into=ours)
        parameters = dict(ours.named_parameters())
        assert converted.keys() == ours.state_dict().keys()
        assert sum(converted[name].numel() for name in parameters) == golden


class Eight(SqueezeExcitation):
    """At least eight features between, as timm has it."""

    def __init__(self, channels: int):
        super().__init__(channels, reduction=channels // max(8, channels // 16))


def test_timm_s_networks_become_plain_ones_with_insertions():
    theirs, plain = (timm.create_model(name, num_classes=10).eval() for name in ("seresnet18", "resnet18"))
    ours = visattn.insert(plain, visattn.SqueezeExcitation, at="layer1.*", gate=None)
    with pytest.raises(
        ConversionError, match="there are 8 whole modules in the weights, 2 are inserted; left over: no"
    ):
        convert(theirs.state_dict(), "timm.SEModule", into=ours)
    ours = visattn.remove(ours)
    ours = visattn.insert(ours, Eight, at="residual", gate=None)
    ours.load_state_dict(convert(theirs.state_dict(), "timm.SEModule", into=ours))
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_says_what_does_not_fit():
    with pytest.raises(ConversionError, match=r"source must be one of cbam, bam, .*timm.SplitAttn, got 'cbma'"):
        convert({}, "cbma")
    state = cbam_state(64)
    del state["ChannelGate.mlp.1.bias"]
    state["mlp.bias"] = torch.zeros(4)
    missing = r"cbam: missing: ChannelGate.mlp.1.bias; left over: mlp.bias"
    with pytest.raises(ConversionError, match=missing):
        convert(state, "cbam")
    with pytest.raises(ConversionError, match=r"eca: missing: conv.weight; left over: ChannelGate.mlp.1.bias, "):
        convert(cbam_state(64), "eca")
    with pytest.raises(ConversionError, match=r"channel.squeeze.weight is \(4, 64\), expected \(8, 64\)"):
        convert(cbam_state(64), "cbam", into=CBAM(64, reduction=8))
    with pytest.raises(ConversionError, match=r"missing: channel.0.bias, .*; left over: channel.excite.bias, "):
        convert(cbam_state(64), "cbam", into=BAM(64))


def test_says_what_does_not_fit_in_a_network():
    with torch.device("meta"):
        ours = visattn.insert(timm.create_model("resnet18", num_classes=10), CBAM, gate=None)
        state = torchvision.models.resnet18(num_classes=10).state_dict()
        for block, c in BLOCKS:
            state |= under(f"{block}.cbam", cbam_state(c))
    assert convert(state, "cbam", into=ours).keys() == ours.state_dict().keys()
    part = {name: tensor for name, tensor in state.items() if name != "layer1.1.cbam.ChannelGate.mlp.1.bias"}
    with pytest.raises(
        ConversionError, match=r"there are 7 whole modules .*, 8 are inserted; left over: layer1.1.cbam"
    ):
        convert(part, "cbam", into=ours)
    with pytest.raises(ConversionError, match=r"cbam: missing: fc.bias; left over: head.bias"):
        convert({name.replace("fc.bias", "head.bias"): t for name, t in state.items()}, "cbam", into=ours)
    with torch.device("meta"):
        other = visattn.insert(timm.create_model("resnet18"), CBAM, gate=None)
        few = visattn.insert(timm.create_model("resnet18", num_classes=10), CBAM, at="layer2.*", gate=None)
    with pytest.raises(ConversionError, match=r"fc.weight is \(10, 512\), expected \(1000, 512\)"):
        convert(state, "cbam", into=other)
    first = {n: t for n, t in state.items() if ".cbam." not in n or n.startswith("layer1")}
    with pytest.raises(ConversionError, match=r"there is layer1.0.cbam in the weights where layer2.0 has something"):
        convert(first, "cbam", into=few)
