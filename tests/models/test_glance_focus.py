import itertools
import math

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

import visattn
from visattn.models import GlanceFocus
from visattn.models.glance_focus import GlanceSensor, geometric, read

SMALL = {"backbone": "test_resnet", "in_chans": 1, "patch": 16, "glimpses": 4, "width": 12, "policy_width": 8}


def small(**options) -> GlanceFocus:
    network = GlanceFocus(4, **SMALL | options)
    torch.nn.init.normal_(network.locator.mean.weight, std=3.0)  # so that it looks around
    return network


def photos(count: int = 3, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, 37, 50)


def rows(network: GlanceFocus) -> list[int]:
    """How many rows each call of a backbone has, in a list that grows."""
    seen: list[int] = []
    for backbone in network.backbones:
        whole = backbone.forward_intermediates

        def counted(x, *args, whole=whole, **options):
            seen.append(len(x))
            return whole(x, *args, **options)

        backbone.forward_intermediates = counted
    return seen


# --- what is seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [16, 15])
def test_crops_are_slices_of_the_image_bit_by_bit(patch):
    network, x = small(patch=patch), torch.rand(2, 3, 37, 50)
    actions = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.25], [-0.3, 1.7], [0.013, 0.987], [0.77, 0.4]])
    found = network.sensor.crop(x, network._place(actions, x))
    for row, (across, down) in enumerate(actions.clamp(0, 1).tolist()):
        left, top = (math.floor(share * (side - patch) + 0.5) for share, side in ((across, 50), (down, 37)))
        assert torch.equal(found[row], x[row // 3, :, top : top + patch, left : left + patch])


def test_the_network_sees_the_image_small_and_then_crops():
    network, x, seen = small().eval(), photos(), []
    network.backbones[0].conv1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    rollout = network.rollout(x, policy="sample")
    shrunk = F.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0], shrunk)
    for t, row in itertools.product(range(1, 4), range(3)):
        x0, y0 = network.sensor.corners(rollout.locations[:, t], (37, 50))[row, 0, 0].int().tolist()
        assert torch.equal(seen[t][row], x[row, :, y0 : y0 + 16, x0 : x0 + 16])
    assert len(seen) == 4


def test_one_pass_of_the_backbone_a_glimpse_and_one_glance_an_image():
    network, x = small(), photos()
    counts = rows(network)
    network.rollout(x, rollouts=5)
    assert counts == [3, 15, 15, 15]


def test_the_glance_has_no_aliases():
    lines = (torch.arange(60) % 2).float().expand(1, 1, 60, 60)
    torch.testing.assert_close(GlanceSensor(12).glance(lines), torch.full((1, 1, 12, 12), 0.5), rtol=0, atol=0.06)


def test_the_sensor_says_what_was_covered():
    sensor, x = GlanceSensor(16), photos(2)
    where = torch.tensor([[0.0, 0.0, 1.0], [0.2, -0.5, 0.0], [0.0, 0.0, 0.0], [0.9, 0.9, 1.0]])
    found, corners = sensor(sensor.prepare(x), where), sensor.corners(where, (37, 50))
    assert torch.equal(found[[0, 3], 0], sensor.glance(x))
    assert corners[[0, 3], 0].tolist() == [[[0, 0], [50, 0], [50, 37], [0, 37]]] * 2
    assert corners[2, 0].tolist() == [[17, 11], [33, 11], [33, 27], [17, 27]]
    assert torch.equal(found[2, 0], x[1, :, 11:27, 17:33])
    assert sensor.astray(torch.tensor([[0.0, 1.1, 0.0], [0.0, 1.0, 1.0]])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {}),
        ("test_vit", {"backbone_args": {"img_size": 32}}),
        pytest.param("mobilenetv3_small_050", {}, marks=pytest.mark.slow),
        pytest.param("swin_s3_tiny_224", {"patch": 224}, marks=pytest.mark.slow),
        pytest.param("densenet121", {}, marks=pytest.mark.slow),
        pytest.param("convnext_atto", {}, marks=pytest.mark.slow),
    ],
)
def test_any_timm_model_is_a_backbone_and_reads_as_it_does_alone(name, options):
    network = small(backbone=name, in_chans=3, **{"patch": 32} | options).eval()
    side = network.sensor.size
    x, backbone = torch.rand(2, 3, side, side), network.backbones[0]
    torch.testing.assert_close(read(backbone, x)[1], backbone(x))
    assert network(torch.rand(2, 3, side + 3, side + 20)).shape == (2, 4)


def test_trained_weights_are_kept(monkeypatch):
    loaded = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: loaded.append(model))
    network = small(backbone="test_resnet.r160_in1k", crop_backbone="test_resnet.r160_in1k", pretrained=True)
    assert loaded == list(network.backbones)
    assert "pretrained" not in network.arguments
    monkeypatch.undo()
    torch.manual_seed(3)
    alone = timm.create_model("test_resnet", num_classes=0, in_chans=1)
    torch.manual_seed(3)
    for (key, a), b in zip(small().backbones[0].state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_crops_may_have_a_backbone_of_their_own():
    network, x = small(crop_backbone="test_resnet").eval(), photos()
    glance, crops = network.backbones
    called = []
    for name, backbone in (("glance", glance), ("crops", crops)):
        backbone.conv1.register_forward_hook(lambda *_, name=name: called.append(name))
    network(x)
    assert called == ["glance", "crops", "crops", "crops"]
    features = torch.rand(2, 4, 96)
    guesses = network.guess(features)
    torch.testing.assert_close(guesses[:, 0], network.auxiliary[0](features[:, 0]))
    torch.testing.assert_close(guesses[:, 3], network.auxiliary[1](features[:, 3]))


# --- the steps --------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(weights: dict[str, np.ndarray], name: str, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    takes, keeps = (weights[f"{name}.weight_{k}"] @ v + weights[f"{name}.bias_{k}"] for k, v in (("ih", x), ("hh", h)))
    (r, z, n), (hr, hz, hn) = np.split(takes, 3), np.split(keeps, 3)
    r, z = sigmoid(r + hr), sigmoid(z + hz)
    return (1 - z) * np.tanh(n + r * hn) + z * h


@pytest.mark.parametrize("classifier", ["recurrent", "concatenation"])
def test_is_the_paper_written_as_loops(classifier):
    network = small(classifier=classifier).double().eval()
    weights = {name: p.detach().numpy() for name, p in network.named_parameters()}
    x, noise = photos(2).double(), torch.randn(3, 2, 2, dtype=torch.float64)
    drawn = iter(noise)
    network.policy.sample = lambda mean: (mean + 0.1 * next(drawn)).detach()
    rollout = network.rollout(x)

    def linear(name, v):
        return weights[f"{name}.weight"] @ v + weights[f"{name}.bias"]

    for image in range(2):
        h, s, known = np.zeros(12), np.zeros(8), []
        glimpse = F.interpolate(x[image, None], (16, 16), mode="bilinear", antialias=True)
        for t in range(4):
            with torch.no_grad():
                seen, feature = (each[0].numpy() for each in read(network.backbones[0], glimpse))
            known.append(feature)
            if classifier == "recurrent":
                h = gru(weights, "classifier.memory", feature, h)
                logits = linear("classifier.linear", h)
            else:
                logits = linear(f"classifier.linears.{t}", np.concatenate(known))
            np.testing.assert_allclose(rollout.logits[image, t].detach(), logits, rtol=1e-6, atol=1e-9)
            if t == 3:
                break
            narrow = np.maximum(np.einsum("oc,chw->ohw", weights["locator.see.weight"][:, :, 0, 0], seen), 0)
            s = gru(weights, "locator.memory", np.maximum(linear("locator.join", narrow.ravel()), 0), s)
            mean = sigmoid(linear("locator.mean", s))
            action = mean + 0.1 * noise[t, image].numpy()
            density = np.exp(-((action - mean) ** 2) / 0.02) / (0.1 * math.sqrt(2 * math.pi))
            assert rollout.log_probs[image, t].item() == pytest.approx(np.log(density).sum(), abs=1e-5)
            assert rollout.baselines[image, t].item() == pytest.approx(linear("locator.value", s)[0])
            place = np.clip(action, 0, 1)
            centre = (2 * place - 1) * (1 - 16 / np.array([50, 37]))
            np.testing.assert_allclose(rollout.locations[image, t + 1], [*centre, 0], rtol=1e-9, atol=1e-9)
            left, top = (math.floor(p * (side - 16) + 0.5) for p, side in zip(place, (50, 37), strict=True))
            glimpse = x[image, None, :, top : top + 16, left : left + 16]


def test_the_score_is_of_what_was_drawn_and_not_of_where_that_is_kept():
    network, x = small(spread=0.8), photos(20)
    looks = network.look(x, rollouts=2)
    assert ((looks.actions < 0) | (looks.actions > 1)).any()
    means, state = [], None
    for seen in looks.maps.unbind(1):
        mean, _, state = network.locator(seen, state)
        means.append(mean)
    mean = torch.stack(means, 1)
    found, _, _ = network.judge(looks.maps, looks.actions)
    normal = torch.distributions.Normal(mean, 0.8)
    torch.testing.assert_close(found, normal.log_prob(looks.actions).sum(-1))
    kept = normal.log_prob(looks.actions.clamp(0, 1)).sum(-1)
    outside = (looks.actions != looks.actions.clamp(0, 1)).any(-1)
    assert (found[outside] != kept[outside]).all()
    corners = network.sensor.corners(looks.locations.flatten(0, 1), (37, 50))
    assert corners.amin() >= 0
    assert (corners.amax((0, 1, 2)) <= torch.tensor([50, 37])).all()


def test_rollouts_of_an_image_are_rows_one_after_the_other_and_do_not_mix():
    network, x = small().double().eval(), photos().double()
    noise = torch.randn(3, 6, 2).double()

    def scripted(noise):
        drawn = iter(noise)
        network.policy.sample = lambda mean: (mean + 0.1 * next(drawn)).detach()

    scripted(noise)
    folded = network.rollout(x, rollouts=2)
    for m in range(2):
        scripted(noise[:, m::2])
        alone = network.rollout(x)
        for name in ("logits", "locations", "log_probs", "baselines"):
            torch.testing.assert_close(getattr(folded, name)[m::2], getattr(alone, name))


def test_controls_do_not_ask_the_policy():
    network, x = small(), photos(100)
    look = network.look
    network.locator = None
    assert not look(x, policy="centre").locations[:, 1:].any()
    actions = look(x, policy="random").actions
    assert 0 <= actions.min() < 0.02
    assert 0.98 < actions.max() <= 1
    torch.testing.assert_close(actions.mean((0, 1)), torch.full((2,), 0.5), rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("of", "reached"),
    [
        (lambda rollout: rollout.logits, {"backbones", "classifier"}),
        (lambda rollout: rollout.log_probs, {"locator"}),
        (lambda rollout: rollout.baselines, {"locator"}),
    ],
    ids=["logits", "log_probs", "baselines"],
)
def test_gradients_go_only_where_the_paper_sends_them(of, reached):
    network, x = small(), photos()
    of(network.rollout(x, rollouts=2)).square().sum().backward()
    found = {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert found == reached


# --- stopping ---------------------------------------------------------------------------------------------------------


def spread_out(network: GlanceFocus) -> GlanceFocus:
    """Let it be more or less sure, by the image and by the glimpse."""
    torch.nn.init.normal_(network.classifier.linear.weight, std=2.0)
    return network.eval()


def test_an_image_that_is_sure_stops_and_costs_nothing_more():
    whole, x = spread_out(small()), torch.rand(30, 1, 37, 50) * torch.rand(30, 1, 1, 1) * 9
    logits = whole.rollout(x, policy="mean").logits
    certain = logits.softmax(-1).amax(-1)
    network = small(confidence=[certain[:, t].quantile(0.7).item() for t in range(3)]).eval()
    network.load_state_dict(whole.state_dict())
    stops = [next((t for t in range(3) if image[t] >= network.confidence[t]), 3) for image in certain.tolist()]
    assert set(stops) >= {0, 3}
    rollout = network.rollout(x, policy="mean")
    assert (rollout.glimpses - 1).tolist() == stops
    counts = rows(network)
    found = network(x)
    torch.testing.assert_close(found, logits[torch.arange(30), stops], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, rollout.decision, rtol=1e-4, atol=1e-4)
    assert counts == [sum(stop >= t for stop in stops) for t in range(4)]
    assert torch.equal(network(x), found)
    alone = torch.cat([network(image[None]) for image in x])
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-4)


def test_all_stop_at_the_glance_or_none_before_the_end():
    x = photos()
    for confidence, calls in ((0.0, [3]), (None, [3] * 4), ([None, None, 0.0], [3] * 3), (1.0, [3] * 4)):
        network = small(confidence=confidence).eval()
        counts = rows(network)
        logits = network(x)
        assert counts == calls
        rollout = network.rollout(x, policy="mean")
        torch.testing.assert_close(logits, rollout.logits[:, len(calls) - 1])
        assert rollout.glimpses.tolist() == [len(calls)] * 3
    assert small().eval().rollout(x).halting is None


def test_nothing_stops_early_in_training():
    network, x = small(confidence=0.0), photos()
    counts = rows(network)
    network(x)
    assert counts == [3] * 4
    assert network.rollout(x).halting is None


@pytest.mark.parametrize("budget", [1.0, 1.7, 2.5, 3.9, 4.0])
def test_limits_keep_to_a_budget_of_glimpses_and_use_it_up(budget):
    network = small()
    logits = torch.randn(500, 4, 4) * torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None]
    spent = network.calibrate(logits, glimpses=budget)
    assert budget - 3 / 500 <= spent.glimpses <= budget
    certain, total = logits.softmax(-1).amax(-1), 0
    for image in certain:
        limits = [2.0 if limit is None else limit for limit in network.confidence] + [0.0]
        total += next(t for t in range(4) if image[t] >= limits[t]) + 1
    assert spent.glimpses == pytest.approx(total / 500)
    assert network.spent(logits) == spent
    assert network.arguments["confidence"] == list(network.confidence or [])


def test_limits_keep_to_a_budget_of_multiplications():
    network, logits = small(), torch.randn(400, 4, 4)
    costs = network.macs
    spent = network.calibrate(logits, macs=1.8 * costs[0])
    assert 1.8 * costs[0] - 3 / 400 * costs[0] * 1.1 <= spent.macs <= 1.8 * costs[0]


def test_images_that_are_equally_sure_stop_together():
    network, logits = small(), torch.zeros(10, 4, 4)
    assert network.calibrate(logits, glimpses=2.5).glimpses == 1
    assert network.calibrate(logits, glimpses=4.0).glimpses == 4


def test_a_network_on_the_validation_images_keeps_to_the_budget():
    network, x = spread_out(small()), torch.rand(40, 1, 37, 50) * torch.rand(40, 1, 1, 1) * 9
    spent = network.calibrate(network.rollout(x, policy="mean").logits, glimpses=2.0)
    counts = rows(network)
    network(x)
    assert sum(counts) / 40 == pytest.approx(spent.glimpses, abs=0.05)
    assert spent.glimpses <= 2


def test_shares_of_glimpses_are_geometric():
    shares = geometric(torch.tensor([2.0, 3.0, 5.0, 9.0], dtype=torch.float64), 4.0)
    ratios = shares[1:] / shares[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(3))
    assert (shares * torch.tensor([2.0, 3, 5, 9])).sum() == pytest.approx(4.0)


def test_counts_multiplications():
    network = small().eval()
    once = [0]
    for module in network.backbones[0].modules():
        if isinstance(module, torch.nn.Conv2d):

            def add(module, args, output):
                once[0] += output[0].numel() * module.weight[0].numel()

            module.register_forward_hook(add)
    read(network.backbones[0], torch.rand(1, 1, 16, 16))
    classify = 3 * 12 * (96 + 12) + 12 * 4
    locate = 32 * 96 + 32 * 8 + 3 * 8 * (8 + 8) + 2 * 8 + 8
    each = once[0] + classify
    assert network.macs == tuple((t + 1) * each + t * locate for t in range(4))


# --- as a network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"confidence": 0.4},
        {"classifier": "concatenation", "crop_backbone": "test_resnet", "confidence": (None, 0.5, 0.3)},
        {"backbone": "test_vit", "backbone_args": {"img_size": 16}, "spread": (0.2, 0.1)},
    ],
    ids=["plain", "two backbones", "vit"],
)
def test_saves_and_loads(options, tmp_path):
    network, x = small(**options).eval(), photos()
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert torch.equal(again(x), network(x))
    assert again.arguments == network.arguments
    assert again.confidence == network.confidence


def test_what_was_calibrated_is_saved(tmp_path):
    network = spread_out(small())
    network.calibrate(torch.randn(50, 4, 4), glimpses=2.2)
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert again.confidence == network.confidence


@pytest.mark.parametrize("size", [(16, 16), (16, 90), (70, 17)])
@pytest.mark.parametrize("count", [1, 2, 0])
def test_looks_at_images_of_any_number_and_size(size, count):
    for confidence in (None, 0.5):
        network = small(confidence=confidence).eval()
        x = torch.rand(count, 1, *size)
        assert network(x).shape == (count, 4)
        assert network.rollout(x, rollouts=2).locations.shape == (2 * count, 4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("confidence", [None, 0.3])
def test_compiles_without_a_break_and_exports(confidence, unchecked):
    network, x = small(glimpses=2, confidence=confidence).eval(), photos(2)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-4)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False).module()
    other = photos(5)
    torch.testing.assert_close(program(other), network(other), rtol=1e-4, atol=1e-4)


def test_locations_stay_fine_in_bfloat16():
    network, x = small(), photos()
    with torch.autocast("cpu", torch.bfloat16):
        rollout = network.rollout(x, rollouts=2)
        rollout.logits.float().square().mean().backward()
    for values in (rollout.locations, rollout.log_probs, rollout.baselines):
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    low = small(confidence=0.3).bfloat16().eval()
    assert low(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"glimpses": 1}, "glimpses must be at least 2, a glance and a crop, got 1"),
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"policy_width": 0}, "policy_width must be at least 1, got 0"),
        ({"classifier": "gru"}, "classifier must be recurrent or concatenation, got 'gru'"),
        ({"backbone": "resnt18"}, "backbone must be the name of a timm model, got 'resnt18'; close: resnet18, "),
        ({"crop_backbone": "!"}, "crop_backbone must be the name of a timm model, got '!'$"),
        (
            {"crop_backbone": "test_efficientnet"},
            r"crop_backbone must make .* as backbone does, \(96, 1, 1\) and 96, got \(64, 1, 1\) and 256",
        ),
        ({"backbone": "test_vit", "patch": 20}, r"patch .* that backbone VisionTransformer reads \(Input.*\), got 20"),
        ({"spread": 0.0}, "spread must be one or two positive numbers, got 0.0"),
        ({"confidence": 1.5}, r"confidence must be one number in \[0, 1\], or 3, got 1.5"),
        ({"confidence": [0.5, 0.5]}, r"confidence must be one number in \[0, 1\], or 3, got \[0.5, 0.5\]"),
    ],
)
def test_says_which_options_cannot_be(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": 0}, "rollouts must be at least 1, got 0"),
        ({"policy": "greedy"}, "policy must be sample or mean or random or centre, got 'greedy'"),
        ({"first": torch.zeros(2, 2)}, "first must be None: all begins with the whole image"),
        ({"answer": torch.tensor([0, 1])}, "answer must be None: .* nothing is told the answer"),
    ],
)
def test_says_what_a_rollout_cannot_be(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        small().rollout(photos(2), **options)


@pytest.mark.parametrize("size", [(15, 40), (40, 15)])
def test_refuses_images_smaller_than_a_crop(size):
    with pytest.raises(
        ValueError, match=f"images must be at least as high and wide as a crop of 16, got {size[0]} × {size[1]}"
    ):
        small()(torch.rand(2, 1, *size))


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        ((5, 4, 4), {}, "one of glimpses and macs must be given, got None and None"),
        ((5, 4, 4), {"glimpses": 2.0, "macs": 1e6}, "one of glimpses and macs must be given, got 2.0 and 1000000.0"),
        ((5, 4, 4), {"glimpses": 4.5}, "glimpses must lie between 1 and 4, got 4.5"),
        ((5, 4, 4), {"macs": 1.0}, "macs must lie between [0-9]+ and [0-9]+, got 1.0"),
        ((5, 3, 4), {"glimpses": 2.0}, r"logits must be of some images after each of 4 glimpses, got \(5, 3, 4\)"),
        ((0, 4, 4), {"glimpses": 2.0}, r"logits must be of some images after each of 4 glimpses, got \(0, 4, 4\)"),
    ],
)
def test_says_which_budgets_cannot_be(logits, options, message):
    with pytest.raises(ValueError, match=message):
        small().calibrate(torch.zeros(logits), **options)
