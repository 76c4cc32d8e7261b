import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from torch import nn

import visattn
from visattn.attention.sampling.grids import identity
from visattn.attention.sampling.spatial_transformer import SpatialTransformer
from visattn.models import DigitClassifier, SpatialTransformerNetwork
from visattn.models.spatial_transformer import TRANSFORMERS, MapLocaliser

# --- digits -----------------------------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_has_as_many_parameters_as_the_paper_gives_all_its_networks():
    assert count(DigitClassifier()) == 399_206
    assert count(DigitClassifier()) == 64 * (9 * 9 + 1) + 124 * (64 * 7 * 7 + 1) + 10 * (124 * 2 * 2 + 1)
    connected = DigitClassifier(kind="connected", filters=(128, 96), in_chans=2, num_classes=19, size=(42, 40), pool=2)
    assert count(connected) == 128 * (2 * 21 * 20 + 1) + 96 * (128 + 1) + 19 * (96 + 1)


@pytest.mark.parametrize(
    ("size", "pool"), [((28, 28), 1), ((42, 42), 2), ((60, 60), 1), ((60, 60), 2), ((21, 34), 1), ((43, 67), 2)]
)
def test_the_classifier_reads_all_that_the_convolutions_leave(size, pool):
    network = DigitClassifier(7, in_chans=2, size=size, filters=(3, 5), pool=pool)
    ends = []
    for side in size:
        side //= pool
        for kernel in (9, 7):
            windows = [start for start in range(side) if start + kernel <= side]
            side = len({window // 2 for window in range(len(windows))})  # of a pool that reads what is left over, too
        ends.append(side)
    assert network.layers[-1].in_features == 5 * ends[0] * ends[1]
    x = torch.randn(2, 2, *size)
    y = nn.functional.avg_pool2d(x, pool)
    for convolution in (m for m in network.layers if isinstance(m, nn.Conv2d)):
        y = nn.functional.max_pool2d(convolution(y).relu(), 2, ceil_mode=True)
    torch.testing.assert_close(network(x), network.layers[-1](y.flatten(1)))


def test_the_connected_one_has_two_hidden_layers():
    network, x = DigitClassifier(kind="connected", size=(28, 20), filters=(8, 6)), torch.randn(3, 1, 28, 20)
    first, second, last = (m for m in network.layers if isinstance(m, nn.Linear))
    torch.testing.assert_close(network(x), last(second(first(x.flatten(1)).relu()).relu()))


@pytest.mark.parametrize("kind", ["convolutional", "connected"])
def test_a_transformer_comes_before_the_average_and_changes_nothing_at_first(kind):
    network, x = DigitClassifier(kind=kind, size=(42, 42), pool=2, filters=(4, 6)).eval(), torch.randn(2, 1, 42, 42)
    before = network(x)
    visattn.insert(network, partial(visattn.AffineTransformer, view=21), gate=None, input_size=(1, 42, 42))
    assert torch.equal(network(x), before)
    with visattn.record(network) as maps:
        network(x)
    assert [grid.shape for grid in maps.values()] == [(2, 1, 42, 42, 2)]


def test_a_classifier_of_digits_saves_and_loads_with_its_transformer(tmp_path):
    network, x = DigitClassifier(12, filters=(4, 6), size=(30, 28)).eval(), torch.randn(2, 1, 30, 28)
    visattn.insert(network, partial(visattn.ThinPlateTransformer, view=8, jitter=0.1), input_size=(1, 30, 28))
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert torch.equal(again(x), network(x))
    assert again.num_classes == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "conv"}, "kind must be convolutional or connected, got 'conv'"),
        ({"size": (28, 20)}, r"size must be at least 21 for its convolutions, got \(28, 20\)"),
        ({"size": (41, 60), "pool": 2}, r"size must be at least 42 for its convolutions, got \(41, 60\)"),
        ({"pool": 0}, r"filters and pool must be at least 1, got \(64, 124\) and 0"),
        ({"filters": (0, 3)}, r"filters and pool must be at least 1, got \(0, 3\) and 1"),
    ],
)
def test_says_what_does_not_fit_digits(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        DigitClassifier(**options)


# --- any backbone -----------------------------------------------------------------------------------------------------


def tiny(backbone: str = "test_resnet", **options) -> SpatialTransformerNetwork:
    return SpatialTransformerNetwork(backbone, num_classes=7, **options)


def moved(network: SpatialTransformerNetwork) -> SpatialTransformerNetwork:
    """A network in evaluation whose views depend on the image."""
    nn.init.normal_(network.transformer.head.weight, std=0.3)
    return network.eval()


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("options", [{}, {"localiser": "test_resnet", "stage": 2, "transform": "thin_plate"}])
def test_a_fresh_network_gives_the_logits_of_its_backbone(backbone, options):
    model, x = timm.create_model(backbone, num_classes=7), torch.randn(2, 3, 160, 160)
    network = SpatialTransformerNetwork(copy.deepcopy(model), **options)
    assert torch.equal(network.eval()(x), model.eval()(x))
    torch.nn.init.normal_(network.transformer.head.weight, std=0.3)
    assert not torch.allclose(network(x), model(x), rtol=1e-2)


def test_weights_that_were_trained_are_kept(monkeypatch):
    loaded = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: loaded.append(model))
    network = SpatialTransformerNetwork("test_resnet.r160_in1k", pretrained=True, localiser="test_vit.r160_in1k")
    assert loaded == [network.backbone, network.transformer.localiser.trunk]
    assert network.backbone.get_classifier().out_features == network.num_classes == 1000
    assert "pretrained" not in network.arguments


@pytest.mark.parametrize("heads", [2, 4])
def test_one_backbone_reads_all_views_and_one_layer_classifies_what_it_says(heads):
    network, x = tiny(transform="isotropic", scale=0.5, heads=heads).eval(), torch.randn(2, 3, 64, 96)
    views = network.transformer(x).chunk(heads, 1)
    for k, view in enumerate(views):  # crops that tile the image, or its middle rows
        row, column = (k // 2 * 32, k % 2 * 48) if heads == 4 else (16, k * 48)
        crop = x[:, :, row : row + 32, column : column + 48]
        larger = nn.functional.interpolate(crop, scale_factor=2, mode="bilinear")
        torch.testing.assert_close(view[..., 1:-1, 1:-1], larger[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-4)
    resnet, found = network.backbone, []
    for view in views:
        y = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(view))))
        found.append(resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(y)))).mean((2, 3)))
    torch.testing.assert_close(network(x), network.classifier(torch.cat(found, 1)))
    assert network.classifier.in_features == heads * 96


@pytest.mark.parametrize("stage", [1, -1])
def test_a_shared_localiser_reads_a_map_of_the_backbone(stage):
    network, x = moved(tiny(stage=stage, view=(32, 48))), torch.randn(2, 3, 64, 96)
    localiser, resnet = network.transformer.localiser, network.backbone
    y = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(nn.functional.avg_pool2d(x, 2)))))
    y = resnet.layer1(y) if stage == 1 else resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(y))))
    y = nn.functional.adaptive_avg_pool2d(localiser.narrow(y).relu(), 7)
    torch.testing.assert_close(localiser(x), localiser.connected(y.flatten(1)).relu())
    assert localiser.narrow.in_channels == {1: 32, -1: 96}[stage]


def test_things_keep_their_place_in_a_localiser():
    network = tiny().eval()
    x = torch.zeros(2, 3, 96, 96)
    x[0, :, :24, :24] = x[1, :, -24:, -24:] = 3
    here, there = network.transformer.localiser(x)
    assert (here - there).abs().max() > 0.01


def test_the_weights_of_a_shared_localiser_are_those_of_the_backbone_and_stay_so(tmp_path):
    network, x = moved(tiny()), torch.randn(2, 3, 64, 96)
    own = [name for name in network.state_dict() if name.startswith("transformer.")]
    assert {name.removeprefix("transformer.").rpartition(".")[0] for name in own} == {
        "localiser.narrow",
        "localiser.connected",
        "head",
    }
    plain = timm.create_model("test_resnet", num_classes=7)
    assert count(network) == count(plain) + (96 + 1) * 128 + (49 * 128 + 1) * 128 + (128 + 1) * 6
    saved = visattn.load(visattn.save(network, tmp_path / "saved"))
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), saved):
        assert twin.transformer.localiser.trunk is twin.backbone is not network.backbone
        assert torch.equal(twin(x), network(x))
        nn.init.normal_(twin.backbone.conv1[0].weight)
        before = network.transformer(x)
        assert not torch.allclose(twin.transformer(x), before)  # and not those of another
        assert torch.equal(network.transformer(x), before)
    network.double()
    assert network(x.double()).dtype == torch.double
    synchronised = timm.layers.convert_sync_batchnorm(network)
    assert synchronised.transformer.localiser.trunk is synchronised.backbone


@pytest.mark.parametrize(
    "options",
    [
        {"transform": "isotropic", "heads": 4, "scale": 0.5, "output_size": 32, "backbone_args": {"in_chans": 1}},
        {"transform": "projective", "steps": 2, "fill": (0.1, 0.2, 0.3), "localiser": "convolutional", "view": 16},
        {"transform": "thin_plate", "points": (3, 5), "localiser": "test_efficientnet", "stage": 1, "jitter": 0.1},
        {"transform": "similarity", "padding": "border", "view": (32, 48), "stage": 0, "heads": 2},
    ],
    ids=lambda options: options["transform"],
)
def test_saves_and_loads(options, tmp_path):
    network = moved(tiny(**options))
    x = torch.randn(2, options.get("backbone_args", {}).get("in_chans", 3), 64, 96)
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert torch.equal(again(x), network(x))
    assert again.arguments == network.arguments
    assert type(again.transformer) is TRANSFORMERS[options["transform"]]


def test_every_step_looks_at_what_the_one_before_has_found():
    network, x, looks = moved(tiny(steps=2)), torch.randn(2, 3, 64, 96), []
    network.transformer.localiser.register_forward_hook(lambda module, args, output: looks.append(args[0]))
    network(x)
    assert torch.equal(looks[0], x)
    assert len(looks) == 2
    assert not torch.equal(looks[1], x)


def test_records_the_grids_of_all_views():
    for heads in (1, 2):
        network = tiny(heads=heads).eval()
        with visattn.record(network) as maps:
            network(torch.randn(2, 3, 64, 96))
        assert {name: grid.shape for name, grid in maps.items()} == {
            "transformer/AffineTransformer": (2, heads, 64, 96, 2)
        }
        assert torch.equal(maps["transformer/AffineTransformer"][:1, 0], identity((64, 96))) == (heads == 1)


def test_a_backbone_of_a_fixed_size_takes_larger_images_by_views():
    network = moved(tiny("test_vit", view=160, output_size=160, heads=2))
    assert network(torch.randn(2, 3, 200, 320)).shape == (2, 7)


@pytest.mark.parametrize(
    "backbone", ["convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224", "test_mambaout", "vgg11"]
)
@pytest.mark.parametrize("heads", [1, 2])
def test_takes_backbones_of_many_families(backbone, heads):
    with torch.device("meta"):
        model = timm.create_model(backbone)
        size = model.pretrained_cfg["input_size"]
        network = SpatialTransformerNetwork(model, num_classes=7, heads=heads)
        assert network(torch.randn(2, *size)).shape == (2, 7)


@pytest.mark.parametrize("options", [{}, {"localiser": "test_efficientnet", "stage": 2, "heads": 2}, {"steps": 2}])
def test_every_parameter_learns(options):
    network = tiny(jitter=0.1, **options)
    moved(network).train()(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert network.transformer.localiser.narrow.weight.grad.any()
    assert network.backbone.conv1[0].weight.grad.any()


def test_batch_norms_see_the_image_and_its_views():
    network, alone = tiny(), tiny(localiser="connected")
    for each in (network, alone):
        each.train()(torch.randn(4, 3, 64, 64))
    assert network.backbone.bn1.num_batches_tracked == 2
    assert alone.backbone.bn1.num_batches_tracked == 1


def test_nothing_is_inserted_in_a_backbone_that_runs_twice_or_on_several_views():
    with pytest.raises(ValueError, match=r"backbone.layer2 is called 2 times in a forward"):
        visattn.insert(tiny(), visattn.CBAM, at="backbone.layer2")
    with pytest.raises(ValueError, match=r"backbone.layer2 returns no feature map, but \(48, 28, 28\) an image"):
        visattn.insert(tiny(localiser="convolutional", heads=2), visattn.CBAM, at="backbone.layer2")
    network = visattn.insert(tiny(localiser="convolutional"), visattn.CBAM, at="backbone.layer2")
    assert [i.site.name for i in visattn.insertions(network)] == ["backbone.layer2"]


@pytest.mark.parametrize(
    "options",
    [{"heads": 2}, pytest.param({}, marks=pytest.mark.slow), pytest.param({"steps": 2}, marks=pytest.mark.slow)],
)
def test_compiles_without_a_break_and_exports(options, unchecked):
    network, x = moved(tiny(**options)), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-4)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False).module()
    other = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(program(other), network(other), rtol=1e-4, atol=1e-4)


class Plain(nn.Sequential):
    num_classes = 10


def test_a_backbone_that_shows_no_maps_has_another_localiser():
    plain = Plain(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="Plain cannot be split: it has no forward_intermediates"):
        SpatialTransformerNetwork(plain)
    x = torch.randn(2, 3, 20, 24)
    assert torch.equal(SpatialTransformerNetwork(plain, localiser="convolutional")(x), plain(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "afine"}, "transform must be one of isotropic, .*, thin_plate, got 'afine'"),
        ({"scale": 0.5}, "scale must be None where transform is 'affine', got 0.5"),
        ({"stage": 5}, "stage must be one of the 5 levels of ResNet, got 5"),
        ({"stage": -7, "localiser": "test_vit"}, "stage must be one of the 6 levels of VisionTransformer, got -7"),
        ({"localiser": "sharde"}, "localiser must be shared, convolutional, connected or the name of a timm model, .*"
         "got 'sharde'; close: shared"),
        ({"localiser": "resnt18"}, "got 'resnt18'; close: resnet18, "),
        ({"localiser": "!"}, "got '!'$"),
        ({"view": 0}, "view must be a positive height and width, got 0"),
        ({"steps": 2, "heads": 2}, "steps must be 1 with several heads, got 2 and 2"),
        ({"steps": 2, "transform": "isotropic", "scale": 0.5}, r"Isotropic\(scale=0.5\) is not closed under"),
        ({"heads": 0}, "heads and steps must be at least 1, got 0 and 1"),
        ({"fill": (0.0, 0.0)}, "fill must have one value for each of 3 channels, got 2"),
    ],
)  # fmt: skip
def test_says_what_does_not_fit(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_every_transformer_is_a_transformer_of_ours():
    assert all(issubclass(cls, SpatialTransformer) and hasattr(visattn, cls.__name__) for cls in TRANSFORMERS.values())
    assert isinstance(tiny().transformer.localiser, MapLocaliser)
