import math

import pytest
import timm
import torch
from torch import Tensor, nn

import visattn
from visattn.models import AttentionBranchNetwork
from visattn.models.attention_branch import Logits, undivided
from visattn.surgery import insertions


def tiny(**options) -> AttentionBranchNetwork:
    return AttentionBranchNetwork("test_resnet", num_classes=7, **options)


def test_reads_as_the_paper_s_picture():
    network, x = tiny().eval(), torch.randn(2, 3, 64, 96)
    resnet, branch = network.backbone, network.attention
    trunk = resnet.layer3(resnet.layer2(resnet.layer1(resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(x)))))))
    features = branch.classes(branch.stage(trunk))
    weights, logits = branch.map(features), branch.classifier(features.mean((2, 3)))
    perception = resnet.fc(resnet.layer4(trunk * weights + trunk).mean((2, 3)))
    torch.testing.assert_close(network(x), perception)
    network.training = True  # the norms stay in evaluation
    both = network(x)
    assert isinstance(both, Logits)
    torch.testing.assert_close(tuple(both), (perception, logits))


def test_the_branch_is_a_copy_of_what_follows_with_stride_1():
    resnet, branch = timm.create_model("resnet50"), None
    network = AttentionBranchNetwork(resnet, num_classes=100)
    branch = network.attention
    assert network.behind == ["layer4"]
    copied = branch.stage[0].state_dict()
    assert all(torch.equal(copied[name], value) for name, value in resnet.layer4.state_dict().items())
    assert branch.stage[0][0].conv2.stride == branch.stage[0][0].downsample[0].stride == (1, 1)
    assert resnet.layer4[0].conv2.stride == resnet.layer4[0].downsample[0].stride == (2, 2)
    last, classes, extra = 2048, 100, sum(p.numel() for p in branch.parameters())
    layer4 = sum(p.numel() for p in resnet.layer4.parameters())
    assert extra == layer4 + last * classes + classes**2 + classes + 2 * last + 2 * classes + 2
    released = AttentionBranchNetwork("resnet18", num_classes=100, kernel_size=3).attention
    paper = AttentionBranchNetwork("resnet18", num_classes=100).attention
    nine = [sum(p.numel() for p in each.parameters()) for each in (released, paper)]
    assert nine[0] - nine[1] == 8 * classes


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (32, 160)])
def test_records_a_map_of_the_split_level_at_any_size(size):
    network = tiny().eval()
    with visattn.record(network) as maps:
        network(torch.randn(2, 3, *size))
    (name, weights), *others = maps.items()
    assert (name, others) == ("attention/AttentionBranch", [])
    assert weights.shape == (2, 1, *(math.ceil(side / 16) for side in size))
    assert ((weights > 0) & (weights < 1)).all()


def test_both_losses_reach_the_trunk_and_each_its_own_branch():
    network, x = tiny(), torch.randn(4, 3, 64, 64)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # those of timm that start at zero let nothing through

    def reached(logits: Tensor) -> set[str]:
        network.zero_grad()
        logits.square().sum().backward(retain_graph=True)
        return {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}

    perception, attention = (reached(logits) for logits in network(x))
    trunk = {
        name for name in dict(network.named_parameters()) if name.startswith(("backbone.conv1", "backbone.layer3"))
    }
    assert trunk <= perception & attention
    assert {"backbone.fc.weight", "attention.map.0.weight"} <= perception
    assert not {name for name in attention if name.startswith(("backbone.layer4", "backbone.fc", "attention.map"))}
    assert "attention.classifier.weight" in attention - perception
    assert perception | attention == set(dict(network.named_parameters()))


@pytest.mark.parametrize(
    ("backbone", "behind"),
    [
        ("convnext_atto", ["stages.3"]),
        ("densenet121", ["features.transition3", "features.denseblock4", "features.norm5"]),
        ("efficientnet_b0", ["blocks.5", "blocks.6", "conv_head", "bn2"]),
        ("mobilenetv3_small_100", ["blocks.4", "blocks.5"]),
        ("poolformer_s12", ["stages.3"]),
        ("regnetx_002", ["s4"]),
        ("resnet26d", ["layer4"]),
        ("resnetv2_50", ["stages.3", "norm"]),
        ("test_nfnet", ["stages.3", "final_conv", "final_act"]),
    ],
)
def test_splits_backbones_of_many_families(backbone, behind):
    with torch.device("meta"):
        model = timm.create_model(backbone, num_classes=7)
        network = AttentionBranchNetwork(model)
        assert network.behind == behind
        assert [each.shape for each in network(torch.randn(2, 3, 128, 96))] == [(2, 7), (2, 7)]


def test_what_follows_the_split_gives_what_the_backbone_gives():
    for backbone in ("test_convnext", "test_efficientnet", "test_nfnet", "test_byobnet", "ghostnet_100"):
        network, x = AttentionBranchNetwork(backbone).eval(), torch.randn(2, 3, 64, 96)
        network.attention.map = nn.Sequential(network.attention.map, nn.Threshold(2.0, 0.0))  # attend to nothing
        torch.testing.assert_close(network(x), network.backbone(x))


def test_vgg_is_split_before_its_last_convolutions():
    with torch.device("meta"):
        model = timm.create_model("vgg11", num_classes=7)
        with pytest.raises(ValueError, match="split must leave layers of VGG behind it, got -2"):
            AttentionBranchNetwork(model)
        network = AttentionBranchNetwork(model, split=-3)
    kinds = [type(model.get_submodule(name)) for name in network.behind]
    assert kinds == [nn.MaxPool2d, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d]


def test_strides_fall_away_and_sizes_stay():
    pools = [nn.AvgPool2d(2, 2, ceil_mode=True), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)]
    layers = [nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 2, 2), nn.Conv2d(4, 4, 1, (1, 2)), *pools]
    stage = undivided([*layers, nn.Sequential(nn.MaxPool2d(2))])
    assert stage(torch.randn(1, 4, 5, 7)).shape == (1, 4, 5, 7)
    assert [type(layer) for layer in stage[3:6]] == [nn.Identity, nn.MaxPool2d, nn.AvgPool2d]
    assert layers[0].stride == (2, 2)
    torch.testing.assert_close(stage[0](x := torch.randn(1, 4, 5, 7))[:, :, ::2, ::2], layers[0](x))


def test_saves_and_loads(tmp_path):
    network, x = tiny(split=-3, kernel_size=3).eval(), torch.randn(2, 3, 64, 64)
    visattn.insert(network, visattn.SqueezeExcitation, at="backbone.layer1", gate=None)
    again = visattn.load(visattn.save(network, tmp_path / "saved", labels=list("abcdefg")))
    assert torch.equal(again(x), network(x))
    assert type(insertions(again)[0].attention) is visattn.SqueezeExcitation
    assert again.attention.map[0].kernel_size == (3, 3)
    assert again.labels == list("abcdefg")
    given = AttentionBranchNetwork(timm.create_model("test_resnet"))
    with pytest.raises(
        visattn.checkpoint.CheckpointError, match=r"argument backbone of AttentionBranchNetwork .* a ResNet"
    ):
        visattn.save(given, tmp_path / "given")


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_break_and_exports(training, unchecked):
    network, x = tiny().train(training), torch.randn(2, 3, 64, 64)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    expected = network(x)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    if not training:
        dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
        program = torch.export.export(network, (x,), dynamic_shapes=(dynamic,), strict=False).module()
        other = torch.randn(3, 3, 96, 64)
        torch.testing.assert_close(program(other), network(other), rtol=1e-4, atol=1e-4)


class Plain(nn.Sequential):
    num_classes = 10


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("test_vit", {}, "VisionTransformer cannot be split at level 4: .* not one module after another"),
        ("inception_v4", {}, "InceptionV4 cannot be split at level 3: .* stride 1: it turns 17×17 to 15×15"),
        ("inception_v3", {}, "InceptionV3 cannot be split at level 3: .* stride 1: Sizes of tensors must match"),
        ("xception41", {}, "XceptionAligned cannot be split after blocks.11.stack.conv3: "),
        ("test_resnet", {"split": -6}, r"stages must be of the 5 levels of ResNet, in order, got \(-6,\)"),
        ("test_resnet", {"split": -1}, "split must leave layers of ResNet behind it, got -1"),
        ("test_resnet", {"kernel_size": 2}, "kernel_size must be odd and positive, got 2"),
    ],
)
def test_says_what_cannot_be_split(backbone, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        AttentionBranchNetwork(timm.create_model(backbone), **options)


def test_says_what_is_no_backbone_for_it():
    with pytest.raises(ValueError, match="Plain cannot be split: it has no forward_intermediates"):
        AttentionBranchNetwork(Plain(nn.Conv2d(3, 8, 3)))
    with pytest.raises(ValueError, match="pretrained and backbone_args are for a backbone that is named, got a model"):
        AttentionBranchNetwork(timm.create_model("test_resnet"), pretrained=True)
    with pytest.raises(ValueError, match="backbone must have nothing inserted: insert into the network"):
        AttentionBranchNetwork(visattn.insert(timm.create_model("test_resnet"), visattn.CBAM))
