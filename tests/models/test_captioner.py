from functools import partial

import pytest
import timm
import torch
from torch import nn

import visattn
from visattn.models.captioner import Captioner
from visattn.models.decoders import Decoder, ShowAttendAndTell

SMALL = partial(ShowAttendAndTell, hidden=16, embedding=16)
BACKBONES = {  # the last map of each, at the size of its images
    "mobilenetv2_050": ((3, 96, 128), (3, 4)),
    "vit_tiny_patch16_224": ((3, 224, 224), (14, 14)),
    "vit_small_patch16_dinov3": ((3, 96, 96), (6, 6)),
    "swin_tiny_patch4_window7_224": ((3, 224, 224), (7, 7)),
    "convnext_atto": ((3, 64, 96), (2, 3)),
}


def captioner(backbone: str = "resnet10t", **options) -> Captioner:
    return Captioner(20, backbone=backbone, decoder=SMALL, **options).eval()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_is_a_grid_of_regions_that_is_never_resized(backbone):
    size, grid = BACKBONES[backbone]
    args = {"img_size": size[1:]} if "dinov3" in backbone else None
    model, images = captioner(backbone, backbone_args=args), torch.randn(2, *size)
    memory, found = model.regions(model.features(images))
    assert found == grid
    assert memory.shape == (2, grid[0] * grid[1], model.backbone.num_features)
    assert model(images, torch.randint(20, (2, 5, 3))).shape == (2, 5, 4, 20)


def test_regions_are_the_positions_row_by_row():
    model, images = captioner(), torch.randn(2, 3, 64, 96)
    plain = model.backbone.forward_features(images)
    memory, (height, width) = model.regions(model.features(images))
    for row in range(height):
        for column in range(width):
            assert torch.equal(memory[:, row * width + column], plain[:, :, row, column])


def test_regions_are_narrowed_and_look_at_each_other():
    narrow, blocks = captioner(width=32), captioner(width=32, layers=2)
    features = torch.randn(2, 512, 2, 3)
    other = features.clone()
    other[:, :, 0, 0] += 1
    for model, mixed in ((narrow, False), (blocks, True)):
        one, two = model.regions(features).memory, model.regions(other).memory
        assert one.shape == (2, 6, 32)
        assert not torch.equal(one[:, 0], two[:, 0])
        assert torch.equal(one[:, 1:], two[:, 1:]) != mixed


def test_regions_are_told_their_rows_and_columns():
    torch.manual_seed(0)
    plain = Captioner(5, backbone="resnet10t", width=8)
    told = Captioner(5, backbone=plain.backbone, width=8, placed=True)
    told.load_state_dict(plain.state_dict())
    features = torch.randn(2, 512, 2, 3)
    added = told.regions(features).memory - plain.regions(features).memory
    torch.testing.assert_close(added[0], added[1])
    waves = added[0].unflatten(0, (2, 3))  # half of the features tell the row, half the column
    torch.testing.assert_close(waves[..., :4], waves[:, :1, :4].expand(-1, 3, -1))
    torch.testing.assert_close(waves[..., 4:], waves[:1, :, 4:].expand(2, -1, -1))
    assert (waves[0, 0] - waves[1, 2]).abs().amax() > 0.5
    with pytest.raises(ValueError, match="width must be divisible by 4 for regions to be told their places, got 6"):
        Captioner(5, backbone="resnet10t", width=6, placed=True)


def test_captions_are_said_of_many_images_as_of_each_alone():
    model, images = captioner(), torch.randn(3, 3, 64, 64)
    together = model.caption(images, width=2, longest=6)
    for i in range(3):
        alone = model.caption(images[i : i + 1], width=2, longest=6)
        torch.testing.assert_close(together.scores[i], alone.scores[0], rtol=0, atol=1e-4)
    assert together.maps.shape[3] == 4


def test_what_is_unknown_is_read_but_never_said(monkeypatch):
    model, images = captioner(unknown=1), torch.randn(2, 3, 64, 64)
    write = model.decoder.write
    likely = 30 * nn.functional.one_hot(torch.tensor(1), 20)
    monkeypatch.setattr(model.decoder, "write", lambda features: write(features) + likely)
    assert (model(images, torch.ones(2, 1, 3, dtype=torch.long)).argmax(-1) == 1).all()
    assert (model.caption(images, width=2, longest=6).words != 1).all()
    assert (model.caption(images, width=2, longest=6, never=()).words[:, 0] == 1).all()


def test_a_backbone_runs_once_for_all_captions_of_an_image():
    model, calls = captioner(), []
    model.backbone.conv1.register_forward_hook(lambda module, given, _: calls.append(len(given[0])))
    model(torch.randn(2, 3, 64, 64), torch.randint(20, (2, 5, 3)))
    assert calls == [2]


def test_what_is_inserted_into_the_backbone_is_used():
    backbone = timm.create_model("resnet10t", num_classes=0)
    images = torch.randn(2, 3, 64, 64)
    visattn.insert(backbone, visattn.SqueezeExcitation, at="stages", gate=None)
    model = captioner(backbone)
    before = model.features(images)
    nn.init.constant_(next(iter(backbone.visattn.parameters())), 3.0)
    assert not torch.equal(model.features(images), before)


def test_features_of_a_frozen_backbone_say_the_same():
    model, images = captioner(width=16), torch.randn(2, 3, 64, 64)
    words = torch.randint(20, (2, 5, 3))
    kept = model.features(images)
    torch.testing.assert_close(model.decoder(model.ready(kept), words).features, model.told(images, words).features)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_convnext", {"in_chans": 1}),
        ("mobilenetv3_small_050", {}),
        ("naflexvit_base_patch16_gap", {"depth": 1, "embed_dim": 32, "num_heads": 2}),  # no convolution
    ],
)
def test_what_regions_do_not_read_of_a_backbone_asks_for_no_gradient(name, options):
    backbone = timm.create_model(name, num_classes=0, **options)
    captioner = Captioner(5, backbone=backbone, width=8)
    captioner.features(torch.randn(2, options.get("in_chans", 3), 64, 64)).sum().backward()
    read = {parameter for parameter, p in backbone.named_parameters() if p.grad is not None}
    assert len(read) < len([*backbone.parameters()])
    captioner.freeze_unread()
    assert {parameter for parameter, p in backbone.named_parameters() if p.requires_grad} == read


@pytest.mark.slow
def test_learns_a_sentence_by_heart():
    torch.manual_seed(0)
    model = Captioner(12, backbone="resnet10t", decoder=partial(SMALL, dropout=0.0), width=16).train()
    images = torch.randn(2, 3, 32, 32)
    words = torch.tensor([[[3, 4, 5, 0]], [[6, 7, 0, 0]]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        logits = model(images, words[..., :-1])
        nn.functional.cross_entropy(logits.flatten(0, 2), words.flatten()).backward()
        optimizer.step()
    model.decoder.eval()
    with torch.no_grad():
        said = model.caption(images, width=3)
    assert said.words[0, 0, :4].tolist() == [3, 4, 5, 0]
    assert said.words[1, 0, :3].tolist() == [6, 7, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
        ({"end": 20}, "end must be one of 20 words, got 20"),
        ({"unknown": 20}, "unknown must be one of 20 words but end=0, got 20"),
        ({"unknown": 0}, "unknown must be one of 20 words but end=0, got 0"),
        ({"layers": -1}, "layers must not be negative, got -1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"backbone": "resnet10x"}, "backbone must be the name of a timm model, got 'resnet10x'; close: resnet10t"),
    ],
)
def test_refuses_options_it_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        Captioner(**{"vocabulary": 20, "backbone": "resnet10t"} | options)


def test_refuses_arguments_for_a_backbone_that_is_given():
    with pytest.raises(ValueError, match="are for a backbone that is named, got a model"):
        Captioner(20, backbone=timm.create_model("resnet10t"), pretrained=True)


def test_its_decoder_is_the_one_that_was_asked_for():
    class Mute(Decoder):
        pass

    assert isinstance(Captioner(20, backbone="resnet10t", decoder=Mute).decoder, Mute)
