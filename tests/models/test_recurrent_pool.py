import pytest
import timm
import torch

import visattn
from visattn.models import RecurrentPoolNetwork


def tiny(**options) -> RecurrentPoolNetwork:
    return RecurrentPoolNetwork("test_resnet", num_classes=7, **options)


def test_the_stages_ask_the_last_map():
    network, x = tiny().eval(), torch.randn(2, 3, 64, 96)
    resnet, pool, maps = network.backbone, network.pool, []
    y = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(x))))
    for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        maps.append(y := stage(y))
    h = c = torch.zeros(2, 96)
    lstm = torch.nn.LSTMCell(96, 96)
    lstm.load_state_dict(pool.memory.state_dict())
    for step, one in zip(pool.steps, maps[:-1], strict=True):
        h, c = lstm(step(one.mean((2, 3))), (h, c))
    tokens, attention = maps[-1].flatten(2).mT, pool.attention
    weights = attention.weights(h, tokens)
    torch.testing.assert_close(network(x), network.classifier(attention.read(tokens, weights)))
    with visattn.record(network) as recorded:
        network(x)
    torch.testing.assert_close(recorded, {"pool/AttentionPool": weights})


def test_what_follows_the_last_stage_falls_away_and_all_else_learns():
    network = RecurrentPoolNetwork("test_efficientnet", num_classes=7)
    assert network.classifier.in_features == 64
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    "backbone", ["convnext_atto", "densenet121", "swin_tiny_patch4_window7_224", "test_vit", "vgg11"]
)
def test_takes_backbones_of_many_families(backbone):
    with torch.device("meta"):
        model = timm.create_model(backbone)
        size = model.pretrained_cfg["input_size"]
        assert RecurrentPoolNetwork(model, num_classes=7)(torch.randn(2, *size)).shape == (2, 7)


def test_takes_any_size_and_some_stages():
    network = tiny(stages=(1, 4), heads=4).eval()
    assert len(network.pool.steps) == 1
    for size in ((33, 47), (32, 32)):
        assert network(torch.randn(1, 3, *size)).isfinite().all()


def test_saves_and_loads(tmp_path):
    network, x = tiny(heads=4, backbone_args={"in_chans": 1}).eval(), torch.randn(2, 1, 64, 64)
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert torch.equal(again(x), network(x))


@pytest.mark.slow
def test_compiles_and_exports(unchecked):
    network, x = tiny().eval(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager")(x), network(x), rtol=1e-4, atol=1e-4)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(network, (x,), dynamic_shapes=(dynamic,), strict=False).module()
    other = torch.randn(3, 3, 96, 64)
    torch.testing.assert_close(program(other), network(other), rtol=1e-4, atol=1e-4)


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="stages must be at least two, got 1"):
        tiny(stages=1)
    with pytest.raises(ValueError, match="heads must divide channels=96, got 7"):
        tiny(heads=7)
