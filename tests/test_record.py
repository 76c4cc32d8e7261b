import copy
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

from visattn import CBAM, NonLocal, SqueezeExcitation, insert, insertions, record
from visattn.record import _weights


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 96)


@pytest.fixture
def model() -> nn.Module:
    model = timm.create_model("resnet18")
    insert(model, CBAM, at="blocks[::4]")
    return insert(model, partial(NonLocal, reduction=4), at="layer3.*").eval()


def test_the_maps_are_what_attend_returns_for_what_reached_the_site(model, x):
    given = {}
    for inserted in insertions(model):
        name = f"{inserted.site.name}/{type(inserted.attention).__name__}"
        inserted.register_forward_pre_hook(lambda module, args, name=name: given.update({name: args[0]}))
    with record(model) as maps:
        model(x)
    assert list(maps) == ["layer1.0/CBAM", "layer3.0/CBAM", "layer3.0/NonLocal", "layer3.1/NonLocal"]
    for inserted in insertions(model):
        name = f"{inserted.site.name}/{type(inserted.attention).__name__}"
        torch.testing.assert_close(maps[name], inserted.attention.attend(given[name]))
    assert maps["layer1.0/CBAM"].channel.shape == (2, 64, 1, 1)
    assert maps["layer1.0/CBAM"].spatial.shape == (2, 1, 16, 24)
    assert maps["layer3.0/NonLocal"].shape == (2, 24, 24)
    torch.testing.assert_close(maps["layer3.0/NonLocal"].sum(-1), torch.ones(2, 24))


def test_recording_changes_nothing_and_leaves_nothing_behind(model, x):
    before, state = model(x), copy.deepcopy(model.state_dict())
    with record(model) as maps:
        assert torch.equal(model(x), before)
    recorded = len(maps)
    assert not any(weights.requires_grad for weights in maps.values() if isinstance(weights, Tensor))
    maps.clear()
    model(x)
    assert recorded == 4
    assert not maps
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_another_forward_writes_over_the_maps(model, x):
    with record(model) as maps:
        model(x)
        first = maps["layer1.0/CBAM"].spatial
        model(x.flip(0))
        torch.testing.assert_close(maps["layer1.0/CBAM"].spatial, first.flip(0))
        model(x[:1, :, :32, :32])
        assert maps["layer1.0/CBAM"].spatial.shape == (1, 1, 8, 8)


def test_needs_eval_mode(model):
    insertions(model)[1].attention.spatial.norm.train()
    with (
        pytest.raises(ValueError, match=r"model must be in eval mode to record, layer3\.0/CBAM is in training"),
        record(model),
    ):
        pass


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_model_is_recorded_as_it_was_before(model, x):
    with record(model) as wanted:
        model(x)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with record(compiled) as maps:
        compiled(x)
    assert list(maps) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(maps[name], wanted[name])


def test_attention_anywhere_in_a_network_is_recorded_but_not_what_lies_in_it():
    network = nn.Sequential(nn.Conv2d(3, 16, 1), CBAM(16), nn.Sequential(SqueezeExcitation(16))).eval()
    with record(network) as maps:
        network(torch.randn(1, 3, 5, 7))
    assert list(maps) == ["1/CBAM", "2.0/SqueezeExcitation"]
    with record(alone := SqueezeExcitation(16).eval()) as maps:
        alone(torch.randn(1, 16, 5, 7))
    assert list(maps) == ["SqueezeExcitation"]


def test_keywords_reach_attend_and_a_gate_that_is_called_twice_gives_both():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = CBAM(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x=x)

    with record(network := Keyword().eval()) as maps:
        network(torch.randn(1, 16, 5, 7))
    assert list(maps) == ["gate/CBAM"]
    coordinates = timm.create_model("resnet18", block_args={"attn_layer": "coord"}).eval()
    with record(coordinates) as maps:
        coordinates(torch.randn(1, 3, 64, 96))
    height, width = maps["layer1.0.se/CoordAttn"]
    assert (height.shape[2:], width.shape[2:]) == ((16, 1), (1, 24))


def test_an_error_in_a_forward_does_not_spoil_the_next():
    model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    broken = model.blocks[0].attn.proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with record(model) as maps:
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(1, 3, 224, 224))
        broken.remove()
        model(torch.randn(1, 3, 224, 224))
    assert list(maps) == ["blocks.0.attn/Attention"]


def test_several_of_a_kind_at_one_site_have_names_of_their_own(x):
    model = timm.create_model("resnet18").eval()
    insert(insert(model, SqueezeExcitation, at="layer2"), SqueezeExcitation, at="layer2")
    with record(model) as maps:
        model(x)
    assert list(maps) == ["layer2/SqueezeExcitation", "layer2/SqueezeExcitation.2"]


@pytest.mark.parametrize(
    ("name", "count", "shape"),
    [
        ("seresnet18", 8, (1, 64, 1, 1)),
        ("ecaresnet26t", 8, (1, 256, 1, 1)),
        ("efficientnet_b0", 16, (1, 32, 1, 1)),
        ("swin_tiny_patch4_window7_224", 12, (64, 3, 49, 49)),
    ],
)
def test_the_attention_that_timm_owns_is_recorded(name, count, shape):
    model = timm.create_model(name).eval()
    with record(model) as maps:
        model(torch.randn(1, 3, 224, 224))
    assert len(maps) == count
    weights = next(iter(maps.values()))
    assert weights.shape == shape
    assert weights.min() >= 0
    assert weights.max() <= 1


def test_timms_cbam_is_recorded_gate_by_gate(x):
    model = timm.create_model("resnet18", block_args={"attn_layer": "cbam"}).eval()
    with record(model) as maps:
        model(x)
    assert maps["layer1.0.se.channel/ChannelAttn"].shape == (2, 64, 1, 1)
    assert maps["layer1.0.se.spatial/SpatialAttn"].shape == (2, 1, 16, 24)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "deit_tiny_patch16_224"])
def test_heads_are_the_same_fused_and_not(name):
    model = timm.create_model(name, depth=2).eval()
    image = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    found = []
    for fused in (True, False):
        for block in model.blocks:
            assert hasattr(block.attn, "fused_attn")
            block.attn.fused_attn = fused
        with record(model) as maps, torch.no_grad():
            model(image)
        found.append(maps)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    assert len(found[0]) == 2
    for name, weights in found[0].items():
        assert weights.shape == (2, 3 if "tiny" in model.default_cfg["architecture"] else 6, tokens, tokens)
        torch.testing.assert_close(weights, found[1][name])
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("causal", [False, True])
def test_the_weights_of_fused_attention_are_those_it_used(causal):
    query, key, value = torch.randn(3, 2, 4, 6, 8, dtype=torch.double)
    mask = None if causal else torch.rand(6, 6) > 0.3
    options = {"attn_mask": mask, "is_causal": causal, "scale": 0.7}
    used = nn.functional.scaled_dot_product_attention(query, key, value, **options)
    weights = _weights(query, key, value, **options)
    torch.testing.assert_close(weights @ value, used, rtol=0, atol=1e-12)


def test_what_several_branches_weigh_is_of_items_and_channels():
    model = timm.create_model("resnest14d", num_classes=3).eval()
    with torch.no_grad(), record(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    weights = next(iter(maps.values()))
    assert weights.shape[:2] == (1, 2)
    assert weights.shape[3:] == (1, 1)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
