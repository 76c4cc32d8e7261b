import pytest
import timm
import torch
from torch import nn

import visattn
from visattn.models import LearnToPayAttention


def tiny(**options) -> LearnToPayAttention:
    network = LearnToPayAttention("test_resnet", num_classes=7, **options)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # those of timm that start at zero let nothing through
    return network


@pytest.mark.parametrize("compatibility", ["parametrised", "dot"])
@pytest.mark.parametrize("combine", ["concatenate", "independent"])
def test_reads_as_the_paper_says(combine, compatibility):
    network, x = tiny(combine=combine, compatibility=compatibility).eval(), torch.randn(2, 3, 64, 96)
    resnet, maps = network.backbone, []
    y = resnet.layer1(resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(x)))))
    for stage in (resnet.layer2, resnet.layer3, resnet.layer4):
        maps.append(y := stage(y))
    g, read = y.mean((2, 3)), []
    for attention, local in zip(network.attention, maps, strict=True):
        local = local.flatten(2).mT
        if attention.projector is not None:
            local = attention.projector(local)
        scores = (local * g[:, None]).sum(2) if compatibility == "dot" else attention.score(local + g[:, None])[..., 0]
        read.append((scores.softmax(1)[..., None] * local).sum(1))
    if combine == "concatenate":
        expected = network.classifiers[0](torch.cat(read, 1)).softmax(1)
    else:
        expected = sum(c(r).softmax(1) for c, r in zip(network.classifiers, read, strict=True)) / 3
    torch.testing.assert_close(network(x).softmax(1), expected)


def test_has_a_projector_where_widths_differ_and_classifiers_as_they_are_combined():
    network = LearnToPayAttention("resnet18", num_classes=10)
    assert [a.projector is None for a in network.attention] == [False, False, True]
    backbone = sum(p.numel() for p in network.backbone.parameters())
    own = sum(p.numel() for p in network.parameters()) - backbone
    assert backbone == 11_689_512 - 513 * 1000
    assert own == 3 * 512 + (128 + 256) * 512 + (3 * 512 + 1) * 10
    apart = LearnToPayAttention("resnet18", num_classes=10, combine="independent")
    assert sum(p.numel() for p in apart.parameters()) - backbone - own == 2 * 10


def test_what_asks_reaches_the_classes_through_compatibility_alone():
    x = torch.randn(2, 3, 64, 96)
    for compatibility, asks in (("dot", True), ("parametrised", False)):
        network = tiny(compatibility=compatibility, stages=(1, 2)).eval()
        network(x).square().sum().backward()
        gradient = network.backbone.layer4[0].conv1.weight.grad
        assert gradient is not None  # so that every parameter has one, as distributed training wants
        assert (gradient.abs().max() > 1e-6) == asks


def test_records_a_map_for_each_stage():
    for stages, sizes in ((3, [(8, 12), (4, 6), (2, 3)]), (2, [(4, 6), (2, 3)]), ((0, -1), [(32, 48), (2, 3)])):
        network = tiny(stages=stages).eval()
        with visattn.record(network) as maps:
            network(torch.randn(2, 3, 64, 96))
        assert list(maps) == [f"attention.{k}/PayAttention" for k in range(len(sizes))]
        assert [weights.shape for weights in maps.values()] == [(2, 1, *size) for size in sizes]
        for weights in maps.values():
            torch.testing.assert_close(weights.sum((1, 2, 3)), torch.ones(2))


@pytest.mark.parametrize(
    "backbone", ["convnext_atto", "densenet121", "efficientnet_b0", "swin_tiny_patch4_window7_224", "test_vit", "vgg11"]
)
def test_takes_backbones_of_many_families(backbone):
    with torch.device("meta"):
        model = timm.create_model(backbone)
        size = model.pretrained_cfg["input_size"]
        assert LearnToPayAttention(model, num_classes=7)(torch.randn(2, *size)).shape == (2, 7)


def test_every_parameter_learns():
    network = tiny(compatibility="dot", combine="independent")
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_saves_and_loads(tmp_path):
    options = {"stages": (1, 3), "compatibility": "dot", "normalise": "sigmoid", "combine": "independent"}
    network, x = tiny(backbone_args={"in_chans": 1}, **options).eval(), torch.randn(2, 1, 64, 64)
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert torch.equal(again(x), network(x))
    assert again.arguments == network.arguments


@pytest.mark.slow
def test_compiles_without_a_break_and_exports(unchecked):
    network, x = tiny(combine="independent").eval(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-4)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(network, (x,), dynamic_shapes=(dynamic,), strict=False).module()
    other = torch.randn(3, 3, 96, 64)
    torch.testing.assert_close(program(other), network(other), rtol=1e-4, atol=1e-4)


class Plain(nn.Sequential):
    num_classes = 10

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes


def test_says_what_does_not_fit(unchecked):
    with pytest.raises(ValueError, match="combine must be concatenate or independent, got 'mean'"):
        tiny(combine="mean")
    for stages in (0, 6, (2, 1), (1, 1), (5,), ()):
        shown = str(stages).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=f"stages must be of the 5 levels of ResNet, in order, got {shown}"):
            tiny(stages=stages)
    with pytest.raises(ValueError, match="Plain cannot be split: it has no forward_intermediates"):
        LearnToPayAttention(Plain(nn.Conv2d(3, 8, 3)))
