import copy
import io
import logging
import pickle
from functools import cache, partial

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import visattn
from visattn import CBAM, Attention, NonLocal, SqueezeExcitation, insert, insertions, remove, sites
from visattn.surgery import SurgeryError, restore

INSERTABLE = [getattr(visattn, n) for n in visattn.attention.__all__ if getattr(visattn, n).place is not None]
GATED = [make for make in INSERTABLE if not make.replaces]


class Brighten(Attention):
    """Has an effect from the start and counts its calls, where an identity would hide being called twice or never."""

    paper = "none"
    place = "stages"

    def __init__(self, channels: int):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, channels)[:, None, None])
        self.seen: list[Tensor] = []

    def attend(self, x: Tensor) -> Tensor:
        return self.factor

    def read(self, x: Tensor, *, weights: Tensor) -> Tensor:
        assert x.shape[1] == weights.shape[0]
        self.seen.append(x)
        return x * weights


class Elsewhere(Attention):
    """Used inside models only."""


class Swap(Attention):
    """Takes the place of a convolution."""

    replaces = "convolution"
    place = "convolutions"
    paper = "none"

    def __init__(self, channels: int, *, out_channels: int | None = None, stride: int = 1, groups: int = 1):
        super().__init__()
        self.convolution = nn.Conv2d(channels, out_channels or channels, 1, stride, groups=groups)

    def attend(self, x: Tensor) -> Tensor:
        return self.convolution.weight

    def read(self, x: Tensor, *, weights: Tensor) -> Tensor:
        return self.convolution(x)


class Corner(Attention):
    """Takes the place of a pool: picks the first position."""

    replaces = "pool"
    place = "pool"
    paper = "none"

    def __init__(self, channels: int, *, out_channels: int | None = None):
        super().__init__()
        self.out_channels = out_channels

    def attend(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:1, :1]).index_fill_(3, torch.tensor(0), 1)

    def read(self, x: Tensor, *, weights: Tensor) -> Tensor:
        return x[:, :, 0, 0]


def lively(model: nn.Module) -> nn.Module:
    """With last norms that are not zero, so that what stands in a residual branch has an effect."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 96)


@pytest.fixture
def model() -> nn.Module:
    return lively(timm.create_model("resnet18"))


# --- where


@pytest.mark.parametrize(
    ("make", "parameters"),
    [(CBAM, 28_089_624), (visattn.BAM, 25_915_099), (SqueezeExcitation, 28_088_024)],
)
def test_a_resnet50_has_the_parameters_of_the_paper(make, parameters):
    model = insert(timm.create_model("resnet50"), make, gate=None)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("at", "names"),
    [
        ("stages", ["layer1", "layer2", "layer3", "layer4"]),
        ("stages[1:3]", ["layer2", "layer3"]),
        ("stages[-1]", ["layer4"]),
        ("blocks[2::2]", ["layer1.2", "layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5", "layer4.1"]),
        ("stages[2].blocks", [f"layer3.{i}" for i in range(6)]),
        ("stages[2].blocks[1::2]", ["layer3.1", "layer3.3", "layer3.5"]),
        ("stages[0].residual", [f"layer1.{i}.bn3" for i in range(3)]),
        ("stages[3].inner", [f"layer4.{i}.aa" for i in range(3)]),
        ("stages[3].convolutions", [f"layer4.{i}.conv2" for i in range(3)]),
        ("head", ["layer4"]),
        ("input", ["conv1"]),
        ("pool", ["global_pool"]),
        ("layer3.*", [f"layer3.{i}" for i in range(6)]),
        ("layer4.**.bn3", [f"layer4.{i}.bn3" for i in range(3)]),
        (["head", "stages[0]", "layer1"], ["layer1", "layer4"]),
    ],
)
def test_the_grammar_of_places(at, names):
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    assert [site.name for site in sites(model, at)] == names


def test_the_papers_places_for_non_local_blocks_are_every_other_block_of_two_stages():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    found = [site.name for site in sites(model, NonLocal.place)]
    assert found == ["layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5"]


@pytest.mark.parametrize("size", [(800, 100), (500, 150), (1333, 333), (600, 333)])
def test_tall_and_wide_images_have_the_same_sites(size):
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    tall, wide = (sites(model, "stages", input_size=s) for s in (size, size[::-1]))
    assert [s.name for s in tall] == [s.name for s in wide] == ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [
        ("resnet18", 32, "layer4"),
        ("mobilenetv2_050", 32, "bn2"),
        ("densenet121", 64, "features"),
        ("convnext_atto", 64, "norm_pre"),
        ("vit_tiny_patch16_224", 224, "norm"),
        ("swin_tiny_patch4_window7_224", 224, "norm"),
        ("resnet50_clip", 224, "final_conv"),
        ("vit_base_patch16_siglip_224", 224, "norm"),
        ("volo_d1_224", 224, "norm"),
    ],
)
def test_the_head_is_the_last_map_before_pool_and_classifier(name, size, head):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [s.name for s in sites(model, "head", input_size=size)] == [head]


def test_in_a_branch_attention_comes_before_the_path_is_dropped():
    with torch.device("meta"):
        found = sites(timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.1, depth=3), "residual")
    assert [s.name for s in found][2:] == [f"blocks.{b}.ls{n}" for b in (1, 2) for n in (1, 2)]


def test_expanded_is_where_the_widened_map_of_an_inverted_residual_goes_into_its_projection():
    found = sites(timm.create_model("mobilenetv2_100"), "expanded")
    assert len(found) == 16
    assert (found[0].channels, found[0].stride) == (96, 4)
    assert [s.channels for s in sites(timm.create_model("efficientnet_b0"), "expanded")][:2] == [96, 144]


def test_a_site_says_what_goes_through_it():
    site = sites(timm.create_model("resnet18"), "stages", input_size=(160, 96))[2]
    assert (site.channels, site.height, site.width, site.stride, site.layout) == (256, 10, 6, 16, "nchw")
    site = sites(timm.create_model("vit_tiny_patch16_224", reg_tokens=3), "blocks")[0]
    assert (site.channels, site.height, site.width, site.stride, site.layout, site.prefix) == (
        192,
        14,
        14,
        16,
        "tokens",
        4,
    )
    site = sites(timm.create_model("swin_tiny_patch4_window7_224"), "stages")[0]
    assert (site.channels, site.height, site.width, site.stride, site.layout) == (96, 56, 56, 4, "nhwc")


def test_a_backbone_without_the_place_gets_the_next_coarser_one_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="visattn"):
        found = sites(timm.create_model("vgg11"), "residual")
    assert [s.name for s in found] == [s.name for s in sites(timm.create_model("vgg11"), "stages")]
    assert "VGG has no place 'residual'; using 'blocks' instead" in caplog.text


def test_tokens_that_do_not_lie_row_by_row_are_reported(caplog):
    with caplog.at_level(logging.WARNING, logger="visattn"):
        insert(timm.create_model("hiera_tiny_224", stages=(1, 1, 1, 1)), SqueezeExcitation, at="blocks")
    assert "Hiera keeps its tokens in the order of mask units" in caplog.text


def test_a_network_that_is_not_timms_is_watched_the_same_way(x):
    model = lively(torchvision.models.resnet18())
    assert [s.name for s in sites(model, "layer2.*")] == ["layer2.0", "layer2.1"]
    assert [s.name for s in sites(model, "residual")][:2] == ["layer1.0.bn2", "layer1.1.bn2"]
    assert [s.name for s in sites(model, "stages")] == ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    before = model(x)
    assert torch.equal(insert(model, CBAM)(x), before)


def test_models_with_one_input_channel_and_feature_lists_are_watched_as_they_are():
    grey = timm.create_model("resnet18", in_chans=1)
    assert len(sites(grey, "blocks")) == 8
    features = lively(timm.create_model("resnet18", features_only=True, out_indices=(1, 3)))
    image = torch.randn(1, 3, 64, 64)
    plain = features(image)
    insert(features, Brighten, at="stages[0]", gate=None)
    assert torch.equal(features(image)[0], plain[0] * insertions(features)[0].attention.factor)


def test_a_level_that_is_a_list_of_maps_takes_the_attention_on_one_of_them():
    model = lively(timm.create_model("hrnet_w18_small"))
    insert(model, Brighten, at="stages", gate=None)
    model(torch.randn(1, 3, 64, 64))
    assert all(len(i.attention.seen) == 1 for i in insertions(model))


# --- unchanged at insertion


SAME_AT_FIRST = (visattn.MeanPool, visattn.DeformableConvolution, visattn.DynamicConvolution)
"""What takes the place of a module and gives the same, but for rounding."""
FOR_LEARNING = {
    visattn.HierarchicalAttentionPool: partial(visattn.HierarchicalAttentionPool, crops=2),  # one crop has no choice
    visattn.PyramidSqueezeAttention: partial(visattn.PyramidSqueezeAttention, reduction=1),  # not one feature, dead
}


@cache
def built(name: str, size: int | None) -> tuple[nn.Module, Tensor, Tensor]:
    """A backbone, an image and what it makes of it."""
    model = lively(timm.create_model(name, num_classes=10))
    image = torch.randn(2, 3, *([size] * 2 if size else model.default_cfg["input_size"][1:]))
    with torch.no_grad():
        return model, image, model(image)


PLACES = [(make, "mobilenetv2_100", 64) for make in INSERTABLE]
PLACES += [pytest.param(make, "resnet50", 64, marks=pytest.mark.slow) for make in INSERTABLE]
PLACES += [
    pytest.param(make, name, None, marks=pytest.mark.slow)
    for make in GATED
    for name in ("vit_tiny_patch16_224", "test_convnext")
]


@pytest.mark.parametrize(("make", "name", "size"), PLACES)
def test_goes_where_its_paper_puts_it(make, name, size):
    backbone, image, before = built(name, size)
    model = copy.deepcopy(backbone)
    if make.replaces and sites_there(model, make.place, size) == 0:
        with pytest.raises(SurgeryError, match="has no place"):
            insert(model, make, input_size=size)
        return
    insert(model, make, input_size=size)
    instead = [i.site.side == "instead" for i in insertions(model)]
    assert len(instead) > 0
    with torch.no_grad():
        after = model(image)
        trained = copy.deepcopy(model).train()(image)  # what fills a whole network wants its norms to see it
    if any(instead):
        assert make.replaces
        assert all(instead)
        assert after.shape == trained.shape == before.shape
        assert trained.isfinite().all()
        assert torch.allclose(after, before, rtol=1e-3, atol=1e-3) == (make in SAME_AT_FIRST)
    else:
        assert torch.equal(after, before)
    with torch.no_grad():
        assert torch.equal(remove(model)(image), before)


def sites_there(model: nn.Module, at: str, size: int | None) -> int:
    try:
        return len(sites(model, at, input_size=size))
    except SurgeryError:
        return 0


def test_what_is_left_at_none_or_at_stride_1_comes_from_the_site():
    model = timm.create_model("resnet18")
    make = partial(visattn.SplitAttention, out_channels=None, stride=1, downsample="convolution")
    insert(model, make, at="stages[1].convolutions")
    insert(model, partial(visattn.AttentionPool, size=None, heads=4), at="pool")
    assert model.layer2[0].conv1.split[0].stride == (2, 2)
    assert model.global_pool.size == (7, 7)
    assert model.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize("make", INSERTABLE)
def test_every_inserted_parameter_has_a_gradient_within_three_steps(make):
    backbone = "resnet26" if make is visattn.Involution else "resnet18"  # which keeps the number of channels
    model = lively(timm.create_model(backbone, num_classes=4))
    insert(model, FOR_LEARNING.get(make, make), input_size=64).train()
    trained = {
        f"{number}.{name}": parameter
        for number, inserted in enumerate(insertions(model))
        for name, parameter in (*inserted.attention.named_parameters(), ("gate", inserted.gate))
        if parameter is not None
    }
    assert {id(p) for p in model.visattn.parameters()} <= {id(p) for p in trained.values()}
    reached = set()
    # noise would throw what chooses locations out of the image in one long step
    optimizer = torch.optim.SGD(model.parameters(), 1e-3 if make.locations else 0.1)
    for _ in range(3):
        logits = model(torch.randn(4, 3, 64, 64))
        loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)))
        optimizer.zero_grad()
        loss.backward()
        reached |= {name for name, p in trained.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert reached == set(trained)


def test_a_gate_mixes_between_the_map_and_what_the_paper_does_with_it(model, x):
    before = model(x)
    insert(model, Brighten, at="stages[1]")
    (inserted,) = insertions(model)
    assert inserted.gate.shape == (1,)
    assert torch.equal(model(x), before)
    nn.init.ones_(inserted.gate)
    gated = model(x)
    remove(model)
    insert(model, Brighten, at="stages[1]", gate=None)
    torch.testing.assert_close(gated, model(x))
    assert not torch.allclose(gated, before)


def test_a_gate_is_folded_into_the_weights_where_they_have_a_neutral_value(x):
    site = sites(timm.create_model("resnet18"), "stages[0]")[0]
    module, half = SqueezeExcitation(64), torch.tensor(0.5)
    inserted = visattn.surgery.Inserted(module, site, gated=True)
    nn.init.constant_(inserted.gate, 0.5)
    images = torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(inserted(images), torch.lerp(images, module(images), half))


def test_a_module_that_is_the_identity_already_gets_no_gate(model):
    insert(model, NonLocal, at="stages[1]")
    assert insertions(model)[0].gate is None
    assert insertions(insert(model, NonLocal, at="stages[2]", gate=None))[1].gate is None


# --- every layout


def test_tokens_are_read_as_the_map_they_stand_for_and_prefix_tokens_pass_by():
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=2).eval()
    taken = {}
    model.blocks[0].register_forward_hook(lambda m, a, out: taken.setdefault("before", out))
    insert(model, Brighten, at="blocks[0]", gate=None)
    model.blocks[1].register_forward_pre_hook(lambda m, a: taken.setdefault("after", a[0]))
    model.blocks[0]._forward_hooks.move_to_end(next(reversed(model.blocks[0]._forward_hooks)), last=False)
    model(torch.randn(1, 3, 224, 224))
    attention = insertions(model)[0].attention
    before = taken["before"]
    for row, column in ((0, 0), (3, 11), (13, 2)):
        assert torch.equal(attention.seen[0][0, :, row, column], before[0, 1 + 14 * row + column])
    assert torch.equal(taken["after"][:, :1], before[:, :1])
    assert torch.equal(taken["after"][:, 1:], before[:, 1:] * attention.factor.flatten())


def test_tokens_of_an_image_of_another_shape_fit_or_say_why_not():
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1).eval()
    insert(model, Brighten, at="blocks", gate=None)
    model(torch.randn(1, 3, 160, 160))
    assert insertions(model)[0].attention.seen[0].shape == (1, 192, 10, 10)
    with pytest.raises(ValueError, match=r"60 tokens at blocks.0 fit no map shaped like 14×14; insert with input_size"):
        model(torch.randn(1, 3, 96, 160))
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1).eval()
    insert(model, Brighten, at="blocks", gate=None, input_size=(96, 160))
    model(torch.randn(1, 3, 192, 320))
    assert insertions(model)[0].attention.seen[0].shape == (1, 192, 12, 20)


def test_channels_last_maps_are_read_with_channels_in_front():
    model = timm.create_model("swin_tiny_patch4_window7_224").eval()
    insert(model, Brighten, at="layers.1.blocks.0", gate=None)
    model(torch.randn(1, 3, 224, 224))
    assert insertions(model)[0].attention.seen[0].shape == (1, 192, 28, 28)


def test_the_image_itself_can_be_attended_to(model, x):
    insert(model, Brighten, at="input", gate=None)
    (inserted,) = insertions(model)
    model(x)
    assert torch.equal(inserted.attention.seen[0], x)
    expected = copy.deepcopy(remove(model))(x * inserted.attention.factor)
    insert(model, Brighten, at="input", gate=None)
    assert torch.equal(model(x), expected)


def test_a_convolution_is_swapped_and_comes_back(model, x):
    before, keys = model(x), list(model.state_dict())
    insert(model, Swap, at="stages[1].convolutions")
    swapped = {name: m for name, m in model.named_modules() if isinstance(m, Swap)}
    assert list(swapped) == ["layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"]
    assert swapped["layer2.0.conv1"].convolution.stride == (2, 2)
    assert model(x).shape == before.shape
    assert len(insertions(copy.deepcopy(model))) == 4
    remove(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


def test_only_what_can_take_a_place_takes_it(model):
    with pytest.raises(SurgeryError, match="CBAM does not take the place of a pool, as at global_pool"):
        insert(model, CBAM, at="pool")
    with pytest.raises(SurgeryError, match="Swap does not take the place of a pool, as at global_pool"):
        insert(model, Swap, at="pool")
    with pytest.raises(SurgeryError, match="Corner does not take the place of a convolution, as at layer2"):
        insert(model, Corner, at="stages[1].convolutions")
    with pytest.raises(SurgeryError, match='Corner takes the place of a pool: at must be "pool", got a site at layer1'):
        insert(model, Corner, at="layer1")


def test_what_keeps_the_shape_of_a_map_takes_no_place_that_changes_it(model):
    class Still(Swap):
        def __init__(self, channels: int, *, stride: int = 1):
            super().__init__(channels, stride=stride)

    class Stiller(Swap):
        def __init__(self, channels: int):
            super().__init__(channels)

    with pytest.raises(
        SurgeryError, match=r"Still keeps the number of channels, layer2\.0\.conv1 goes from 64 channels"
    ):
        insert(model, Still, at="stages[1].convolutions")
    assert len(insertions(insert(model, Still, at="stages[1].convolutions[1:]"))) == 3
    bottlenecks = timm.create_model("resnet26")
    with pytest.raises(SurgeryError, match=r"Stiller keeps the size of the map, layer2\.0\.conv2 has stride 2"):
        insert(bottlenecks, Stiller, at="convolutions")


def test_a_substitute_for_a_convolution_may_stand_behind_one_instead_unchanged_at_insertion(model, x):
    before = model(x)
    insert(model, Swap, at="layer1")
    (inserted,) = insertions(model)
    assert torch.equal(model(x), before)
    assert (inserted.gate.shape, inserted.attention.convolution.out_channels) == ((1,), 64)
    nn.init.ones_(inserted.gate)
    assert not torch.equal(model(x), before)
    assert torch.equal(remove(model)(x), before)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_a_pool_gets_a_map_and_gives_what_the_pool_before_gave(name):
    model = timm.create_model(name, num_classes=4).eval()
    image = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    with torch.no_grad():
        before, features = model(image), model.forward_features(image)
        if features.shape[1] != model.num_features:
            features = features.movedim(-1, 1)  # channels last
        insert(model, Corner, at="pool")
        (inserted,) = insertions(model)
        pooled = []
        watch = inserted.attention.register_forward_hook(lambda module, args, output: pooled.append((*args, output)))
        after = model(image)
        watch.remove()
    ((given, output),) = pooled
    assert torch.equal(given, features)
    assert inserted.attention.out_channels == features.shape[1]
    assert torch.equal(output.flatten(), features[:, :, 0, 0].flatten())  # with axes of one where the pool had them
    assert after.shape == before.shape
    assert not torch.allclose(after, before)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        assert torch.equal(twin(image), after)
        assert torch.equal(remove(model)(image), before)


def test_a_pool_that_timm_made_anew_is_replaced_again(model, x):
    insert(model, Corner, at="pool")
    model.reset_classifier(3)
    assert not isinstance(model.global_pool, Corner)
    assert isinstance(visattn.restore(model).global_pool, Corner)
    assert torch.equal(model(x), model.fc(model.forward_features(x)[:, :, 0, 0]))


@pytest.mark.parametrize("make", [visattn.DeformableConvolution, visattn.DynamicConvolution])
def test_a_substitute_that_can_adopts_the_kernel_unless_told_otherwise(make):
    model = lively(timm.create_model("resnet18", output_stride=16, num_classes=4))  # the last stage is dilated
    image = torch.randn(2, 3, 64, 64)
    before = model(image)
    twin = insert(copy.deepcopy(model), make, at="stages[:3].convolutions")
    torch.testing.assert_close(twin(image), before, rtol=1e-4, atol=1e-5)
    fresh = insert(copy.deepcopy(model), make, at="stages[:3].convolutions", gate=None)
    assert not torch.allclose(fresh(image), before, rtol=1e-2, atol=1e-2)


def test_the_dilation_of_a_convolution_is_kept(x):
    model = lively(timm.create_model("resnet18", output_stride=16, num_classes=4))
    before = model(x)
    insert(model, visattn.DeformableConvolution, at="stages[-1].convolutions")
    assert {i.attention.conv.dilation for i in insertions(model)} == {(1, 1), (2, 2)}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_what_hangs_on_a_convolution_stays_when_it_is_swapped(model, x):
    insert(model, Brighten, at="layer2.1.conv1", gate=None)
    insert(model, Swap, at="stages[1].convolutions")
    model(x)
    assert len(insertions(model)[0].attention.seen) == 1


def test_a_swapped_module_comes_back_as_the_model_is_by_then(model):
    insert(model.train(), Swap, at="stages[1].convolutions")
    remove(model.eval().bfloat16())
    assert not any(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# --- what must survive


def test_no_parameter_of_the_backbone_changes_its_name(model, x):
    weights = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    other = insert(copy.deepcopy(model), CBAM)
    model.load_state_dict(weights)
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.startswith("visattn.") for key in missing)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in weights.items())
    assert list(remove(other).state_dict()) == list(weights)
    assert not hasattr(other, "visattn")
    assert all(not m._forward_hooks for m in other.modules())


@pytest.fixture
def cbam(model) -> nn.Module:
    """With gates half open."""
    insert(model, CBAM)
    for inserted in insertions(model):
        nn.init.constant_(inserted.gate, 0.5)
    return model


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_gives_the_same_and_is_independent(cbam, x, clone):
    twin, before = clone(cbam), cbam(x)
    assert torch.equal(twin(x), before)
    for inserted in insertions(twin):
        nn.init.zeros_(inserted.gate)
    assert not torch.equal(twin(x), before)
    assert torch.equal(cbam(x), before)


@pytest.mark.parametrize("average", [torch.optim.swa_utils.AveragedModel, timm.utils.ModelEmaV3])
def test_an_average_of_the_weights_holds_what_is_inserted(cbam, x, average):
    averaged = average(cbam)
    before = averaged.module(x)
    torch.testing.assert_close(before, cbam(x))
    for inserted in insertions(cbam):
        nn.init.ones_(inserted.gate)
    assert torch.equal(averaged.module(x), before)
    for _ in range(3):
        averaged.update_parameters(cbam) if hasattr(averaged, "update_parameters") else averaged.update(cbam)
    assert all(0.5 < i.gate.item() <= 1 for i in insertions(averaged.module))


def test_weights_round_trip_through_a_file(cbam, x):
    file = io.BytesIO()
    torch.save(cbam.state_dict(), file)
    file.seek(0)
    other = insert(timm.create_model("resnet18").eval(), CBAM)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), cbam(x))


def test_timms_own_ways_through_a_model_all_pass_the_attention(model, x):
    insert(model, Brighten, at=["stages", "layer2.0"], gate=None)
    wanted = model(x)

    def calls() -> list[int]:
        counts = [len(i.attention.seen) for i in insertions(model)]
        for i in insertions(model):
            i.attention.seen.clear()
        return counts

    assert calls() == [1] * 5
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), wanted)
    assert calls() == [1] * 5
    final, levels = model.forward_intermediates(x)
    assert torch.equal(levels[-1], final)
    assert calls() == [1] * 5
    model.set_grad_checkpointing(True)
    model.train()(x).sum()
    assert calls() == [1] * 5
    model.eval().set_grad_checkpointing(False)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert calls() == [1] * 5


def test_bf16_autocast_and_channels_last_are_close_to_fp32(cbam, x):
    wanted = cbam(x)
    channels_last = copy.deepcopy(cbam).to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        channels_last(x.contiguous(memory_format=torch.channels_last)), wanted, rtol=1e-4, atol=1e-4
    )
    with torch.autocast("cpu", torch.bfloat16):
        auto = cbam(x)
    half = copy.deepcopy(cbam).bfloat16()(x.bfloat16())
    for output in (auto, half):
        assert output.dtype == torch.bfloat16
        assert nn.functional.cosine_similarity(output.float(), wanted).min() > 0.99


@pytest.mark.usefixtures("unchecked")
def test_compiles_into_one_graph(cbam, x):
    compiled = torch.compile(cbam, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), cbam(x))
    with pytest.raises(SurgeryError, match=r"model is compiled already: insert first, then torch.compile"):
        insert(compiled, CBAM)


def test_a_model_that_is_compiled_in_place_is_noticed(model):
    model.layer3.compile(backend="eager")
    with pytest.raises(SurgeryError, match=r"model is compiled already: insert first, then torch.compile"):
        insert(model, CBAM)


def test_a_wrapped_model_is_seen_through(cbam):
    wrapped = nn.Sequential(cbam)
    assert len(insertions(wrapped)) == 8
    remove(wrapped)
    assert not hasattr(cbam, "visattn")
    assert not any(m._forward_hooks for m in cbam.modules())


def test_a_model_that_has_run_and_holds_what_it_computed_is_watched():
    model = timm.create_model("levit_128s").eval()
    model(torch.randn(1, 3, 224, 224))
    assert len(sites(model, "stages")) == 3


@pytest.mark.usefixtures("unchecked")
def test_exports_with_any_batch_and_image_size(cbam, x):
    auto = torch.export.Dim.AUTO
    program = torch.export.export(cbam, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    other = torch.randn(5, 3, 96, 128)
    torch.testing.assert_close(program.module()(other), cbam(other))


def test_a_converter_that_builds_norms_anew_is_repaired(model):
    insert(model, CBAM)
    converted = timm.layers.convert_sync_batchnorm(model)
    lost = [i for i in insertions(converted) if not _is_hooked(converted, i)]
    assert lost, "the converter keeps hooks by now; restore is not needed any more"
    restore(converted)
    assert all(_is_hooked(converted, i) for i in insertions(converted))
    assert sum(len(m._forward_hooks) for m in restore(converted).modules()) == len(insertions(converted))


def _is_hooked(model: nn.Module, inserted: visattn.surgery.Inserted) -> bool:
    hooks = model.get_submodule(inserted.site.name)._forward_hooks.values()
    return any(getattr(hook, "inserted", None) is inserted for hook in hooks)


def test_several_modules_at_one_site_act_in_the_order_of_insertion(model, x):
    insert(model, Brighten, at="layer2", gate=None)
    insert(model, Brighten, at="layer2.1", gate=None)
    model(x)
    first, second = (i.attention for i in insertions(model))
    assert torch.equal(second.seen[0], first.seen[0] * first.factor)
    assert len(model.visattn) == 2


def test_what_a_lambda_makes_is_inserted_too_but_needs_a_place(model):
    insert(model, lambda channels: SqueezeExcitation(channels, reduction=4), at="head")
    assert insertions(model)[0].attention.arguments == {"channels": 512, "reduction": 4}
    with pytest.raises(SurgeryError, match=r"at must be given, since .* does not say which attention class it makes"):
        insert(model, lambda channels: SqueezeExcitation(channels))


# --- what is refused, and what it says


class Odd(nn.Module):
    """Calls one module twice, one never, and one for nothing."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.never = nn.Conv2d(8, 8, 1)
        self.unread = nn.Conv2d(8, 8, 1)
        self.iterated = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.flat = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)))
        self.unread(x)
        for module in self.iterated:
            x = module(x)
        return self.flat(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("twice", "at='twice': twice is called 2 times in a forward"),
        ("never", "at='never': never is not called in a forward"),
        ("unread", "at='unread': unread returns what nobody reads"),
        ("iterated", "iterated is not called in a forward; its last child is iterated.1"),
        ("flat", r"flat returns no feature map, but \(4,\) an image"),
        ("frist", r"at='frist' matches no module \(close: first\); there are"),
        ("nowhere.*", "at='nowhere.*' matches no module"),
        ("pool", "Odd has no place 'pool'"),
        ("stages", "Odd has no place 'stages': modules first, twice, never"),
        ("blocks.residual", 'only "stages" may have a place inside'),
    ],
)
def test_says_why_a_place_cannot_be_used(at, message):
    model = Odd().eval()
    with pytest.raises(SurgeryError, match=message):
        insert(model, CBAM, at=at)
    assert not hasattr(model, "visattn")


@pytest.mark.usefixtures("unchecked")
def test_refuses_what_it_cannot_insert(model):
    with pytest.raises(SurgeryError, match="at must be given: Elsewhere has no place in a backbone"):
        insert(model, Elsewhere)
    with pytest.raises(ValueError, match="gate must be \"identity\" or None, got 'zero'"):
        insert(model, CBAM, gate="zero")
    with pytest.raises(ValueError, match=r"at must be a string or several of them, got \[\]"):
        sites(model, [])
    with pytest.raises(
        ValueError, match=r"input_size must be n, \(h, w\) or \(c, h, w\) in pixels, got \(1, 2, 3, 4\)"
    ):
        sites(model, input_size=(1, 2, 3, 4))
    with pytest.raises(
        SurgeryError, match=r"VisionTransformer does not run on an image of 3×100×100, set by input_size"
    ):
        sites(timm.create_model("vit_tiny_patch16_224", depth=1), input_size=100)
    with pytest.raises(SurgeryError, match=r"there are 4 stages, so \[7\] is out of range"):
        insert(model, CBAM, at="stages[7]")
    with pytest.raises(
        SurgeryError, match=r"at='stages\[9:\]' leaves no site in ResNet: 4 stages, 8 blocks, 8 residual"
    ):
        insert(model, CBAM, at="stages[9:]")
    with pytest.raises(TypeError, match=r"make must be an attention class or functools.partial of one, got a CBAM"):
        insert(model, CBAM(64), at="head")
    with pytest.raises(TypeError, match="make must return an Attention, got Conv2d"):
        insert(model, lambda channels: nn.Conv2d(channels, channels, 1), at="head")
    with pytest.raises(TypeError, match="reductoin"):
        insert(model, partial(CBAM, reductoin=4))
    assert not hasattr(model, "visattn")


@pytest.mark.slow
def test_real_pretrained_weights_predict_the_same_after_insertion(shared):
    name = f"local-dir:{shared / 'weights' / 'mobilenetv2_100'}"
    model = timm.create_model(name, pretrained=True).eval()
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        before = model(image)
        for make in GATED:
            assert torch.equal(insert(model, make)(image), before)
        assert torch.equal(remove(model)(image), before)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_runs_in_onnxruntime_with_any_batch(cbam, x, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    insert(cbam, NonLocal, at="stages[2]")
    file = tmp_path / "model.onnx"
    torch.onnx.export(cbam, (x,), file, dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    images = torch.randn(5, *x.shape[1:])
    (output,) = onnxruntime.InferenceSession(file).run(None, {"x": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), cbam(images), rtol=1e-3, atol=1e-4)
