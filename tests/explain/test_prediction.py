from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import visattn
from visattn import AttentionPool, GatedMultipleInstancePool, NonLocal, SpatialGate, StandAloneSelfAttention
from visattn.attention.base import Attention
from visattn.explain import Prediction, explain, kendall, spatial, uniform


class Said(Attention):
    """Attention whose weights, one a position, are what the model says; or of which nothing is read."""

    def __init__(self, deaf: bool):
        super().__init__()
        self.deaf = deaf

    def attend(self, x):
        return x.flatten(1).softmax(1).view_as(x)

    def read(self, x, *, weights):
        return (0 * weights + x if self.deaf else weights.clamp_min(1e-9).log()).flatten(1)


class Speaker(nn.Module):
    def __init__(self, deaf: bool):
        super().__init__()
        self.attention = Said(deaf)

    def forward(self, images):
        return self.attention(F.avg_pool2d(images[:, :1], 8))


IMAGE = torch.kron(torch.tensor([[4.0, 0.0], [1.0, 0.5]]), torch.ones(8, 8))[None]  # 2 × 2 patches: 4, 0; 1, 0.5


IMAGE3 = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0))


def with_inserted(make, *, at, **options):
    model = timm.create_model("test_resnet", num_classes=5)
    visattn.insert(model, make, at=at, gate=None, **options)
    for inserted in visattn.insertions(model):
        for parameter in inserted.attention.parameters():  # some add nothing at first
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_a_model_that_says_its_weights_is_moved_by_them_and_one_that_does_not_read_them_is_not():
    open_book, deaf = (Prediction(Speaker(deaf).eval(), IMAGE) for deaf in (False, True))
    for subject in (open_book, deaf):
        torch.testing.assert_close(subject.weights, torch.tensor([[4.0, 0.0, 1.0, 0.5]]).softmax(1))
        assert subject.size == (2, 2)
        assert not subject.gates
        assert not subject.fixed
        assert subject.target == 0
        assert subject.probability == pytest.approx(subject.weights[0, 0].item(), abs=1e-6)
    said = open_book.given(torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[1.0, 0.0, 0.0, 0.0]]]))
    torch.testing.assert_close(said, torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]]))
    assert uniform(open_book.given, open_book.weights) == pytest.approx(open_book.probability - 0.25, abs=1e-6)
    found = explain(open_book, epsilon=0.01).findings
    assert found["adversary"].of_map <= 0.01 * 0.6932
    found = explain(deaf).findings
    assert found["permutation"].of_shuffled == found["uniform"].of_uniform == 0
    assert found["adversary"].of_map > 0.5


def test_gradients_are_those_of_a_softmax_and_leaving_out_is_a_patch_of_the_baseline():
    subject = Prediction(Speaker(True).eval(), IMAGE)
    p = subject.output
    slopes = torch.cat((p[:1] * (1 - p[:1]), p[0] * p[1:])) / 64  # of each pixel of a patch
    torch.testing.assert_close(subject.gradient("norm").flatten(), slopes)
    torch.testing.assert_close(subject.gradient("product").flatten(), slopes * torch.tensor([4.0, 0.0, 1.0, 0.5]))
    there = torch.tensor([[[False, True], [True, True]]])
    torch.testing.assert_close(
        subject.without(there, torch.full_like(IMAGE, 2.0))[0], torch.tensor([2.0, 0.0, 1.0, 0.5]).softmax(0)
    )


@pytest.mark.parametrize(
    ("make", "at", "size", "gates"),
    [
        (SpatialGate, "stages[1]", (16, 16), True),
        (NonLocal, "stages[-1]", (4, 4), False),
        (GatedMultipleInstancePool, "pool", (4, 4), False),
        (partial(AttentionPool, heads=2), "pool", (4, 4), False),  # its first token is the mean of the others
    ],
    ids=["gate", "pairs", "pool", "prefix"],
)
def test_any_module_reads_with_its_own_weights_what_it_read_before_and_with_others_something_else(
    make, at, size, gates
):
    model, image = with_inserted(make, at=at, input_size=128), torch.randn(3, 128, 128)
    subject = Prediction(model, image)
    assert subject.size == size
    assert subject.gates == gates
    with torch.no_grad():
        torch.testing.assert_close(subject.output, model(image[None])[0].softmax(0))
        own = subject.given(torch.stack((subject.weights, torch.rand_like(subject.weights))))
    torch.testing.assert_close(own[0], subject.output, rtol=1e-4, atol=1e-6)
    assert (own[1] - own[0]).abs().max() > 1e-6
    if gates:
        with torch.no_grad(), visattn.record(model) as maps:
            model(image[None])
        torch.testing.assert_close(subject.map, next(iter(maps.values()))[0, 0])


def test_attention_of_timm_is_observed_and_not_replaced():
    model = timm.create_model("test_vit", num_classes=5).eval()
    subject = Prediction(model, torch.randn(3, 160, 160))
    assert subject.fixed
    assert subject.size == (10, 10)
    assert set(explain(subject, steps=4, draws=1).findings) == {"deletion", "insertion", "gradient", "leave-one-out"}
    with pytest.raises(ValueError, match=r"weights of blocks\.5\.attn/\w+ can be recorded, but not replaced"):
        subject.given(subject.weights[None])


def test_of_several_labels_each_is_there_or_not():
    model = Speaker(True).eval()
    model.task = "multi-label"
    subject = Prediction(model, IMAGE, target=2)
    assert subject.output.tolist() == pytest.approx([0.731059, 1 - 0.731059], abs=1e-6)  # σ(1)
    assert (subject.label, subject.target) == (2, 0)


def test_the_last_map_that_says_where_is_taken_or_the_last_of_a_pattern():
    model = with_inserted(partial(visattn.CBAM, reduction=4), at="stages", input_size=64)
    image = torch.randn(3, 64, 64)
    sizes = {name: found.size for name, found in spatial(model, image).items()}
    assert all(name.endswith("/CBAM.spatial") for name in sizes)  # channels lie nowhere
    assert [min(size) for size in sizes.values()] == sorted((min(size) for size in sizes.values()), reverse=True)
    assert sizes[Prediction(model, image).name] == (4, 4) > min(sizes.values())
    assert Prediction(model, image, name="*").name == list(sizes)[-1]
    assert Prediction(model, image, name=next(iter(sizes))).name == next(iter(sizes))


def test_bad_input_is_refused():
    model = Speaker(True).eval()
    with pytest.raises(ValueError, match=r"name must be that of a map \(attention/Said\), got 'layer1'"):
        Prediction(model, IMAGE, name="layer1")
    with pytest.raises(ValueError, match="target must be one of 4 classes, got 4"):
        Prediction(model, IMAGE, target=4)
    with pytest.raises(ValueError, match=r"name must be that of a map \(the model has none\), got None"):
        Prediction(timm.create_model("test_resnet").eval(), torch.randn(3, 64, 64))


def test_unknown_options_are_refused(unchecked):
    subject = Prediction(Speaker(True).eval(), IMAGE)
    with pytest.raises(ValueError, match=r"measures must be of deletion, insertion, .*, got 'truth'"):
        explain(subject, ["truth"])
    with pytest.raises(ValueError, match="by must be pixels or regions, got 'words'"):
        explain(subject, by="words")
    with pytest.raises(ValueError, match="gradient must be norm or product, got 'sum'"):
        explain(subject, ["gradient"], gradient="sum")


def test_a_model_in_training_mode_is_refused_and_left_as_it_is():
    model = timm.create_model("resnet10t", num_classes=3, block_args={"attn_layer": "cbam"}).train()
    before = model.bn1.running_mean.clone()
    with pytest.raises(ValueError, match="model must be in eval mode to be explained, ResNet is in training mode"):
        Prediction(model, torch.randn(3, 64, 96))
    assert torch.equal(model.bn1.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_precision_put_regions_in_the_same_order(dtype):
    torch.manual_seed(0)
    model, image = with_inserted(SpatialGate, at="stages[:2]", input_size=(3, 64, 96)), torch.randn(3, 64, 96)
    wanted = Prediction(model, image).gradient()
    subject = Prediction(model.to(dtype), image.to(dtype))
    found = subject.gradient()
    assert found.dtype == torch.float32
    assert kendall(found, wanted) > 0.7
    assert -1 <= explain(subject, ["gradient"]).findings["gradient"][0] <= 1


def test_weights_of_pairs_are_shares_though_what_lies_beyond_the_border_has_some():
    subject = Prediction(with_inserted(StandAloneSelfAttention, at="stages[2:3]", input_size=(3, 64, 96)), IMAGE3)
    assert (subject.weights.sum(1) - 1).abs().max() > 0.1
    assert not subject.gates


def test_weights_of_channels_have_no_place():
    edges = timm.create_model("edgenext_xx_small", num_classes=3, dims=(24, 48, 88, 144), heads=(4, 4, 4, 4)).eval()
    image = torch.randn(3, 96, 96)  # at the last stage 36 channels a head, and 3 × 3 positions
    assert not [name for name in spatial(edges, image) if "CrossCovarianceAttn" in name]
    assert not spatial(timm.create_model("resnest14d", num_classes=3).eval(), torch.randn(3, 64, 64))


def test_curves_of_regions_are_those_of_a_model_that_is_known():
    subject = Prediction(Speaker(True).eval(), IMAGE)
    found = explain(subject, ["deletion"], by="regions", baseline="zero", steps=4)
    values = [torch.tensor(each).softmax(0)[0].item() for each in ([4.0, 0, 1, 0.5], [0, 0, 1, 0.5], [0, 0, 0, 0.5])]
    curve = found.curves["deletion"]["map"]
    assert curve.scores.tolist() == pytest.approx([*values, 0.25, 0.25], abs=1e-6)
    assert found.findings["deletion"].of_map == curve.area
    faded = [torch.tensor([4.0, 0, 1, 0.5]).mul(1 - k / 4).softmax(0)[0].item() for k in range(5)]
    assert found.curves["deletion"]["uniform"].scores.tolist() == pytest.approx(faded, abs=1e-6)
    assert curve.area < found.findings["deletion"].of_shuffled


def test_ranks_are_those_of_the_map():
    subject = Prediction(Speaker(True).eval(), IMAGE)
    found = explain(subject, ["gradient", "leave-one-out"], gradient="product", baseline="zero").findings
    assert found["gradient"].of_map == kendall(subject.map, subject.gradient("product")) > 0.9
    assert found["leave-one-out"].of_map == pytest.approx(1)  # the parts of the sum, in their order
