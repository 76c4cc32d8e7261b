import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import visattn
from tests.models.test_recurrent_attention import glimpsed, scripted
from visattn.models import DeepRecurrentAttention
from visattn.models.deep_recurrent_attention import convolutions

SMALL = {"width": 12, "glimpse_width": 7, "filters": (3, 4, 5), "context": 10, "context_filters": (2, 3, 4)}
SMALL |= {"size": (20, 28), "patch": 9, "glimpses": 3}


def small(**options) -> DeepRecurrentAttention:
    network = DeepRecurrentAttention(**SMALL | options)
    torch.nn.init.normal_(network.locator.weight, std=3)  # so that it looks around
    return network


# --- the paper as loops -----------------------------------------------------------------------------------------------


def correlated(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """What filters find where they lie within an image."""
    side = weight.shape[2]
    found = np.zeros((len(weight), image.shape[1] - side + 1, image.shape[2] - side + 1))
    for k, i, j in np.ndindex(found.shape):
        found[k, i, j] = (weight[k] * image[:, i : i + side, j : j + side]).sum() + bias[k]
    return found


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """Means of all pixels that are, wholly or in part, behind a larger one."""
    found = np.zeros((len(image), side, side))
    for i, j in np.ndindex(side, side):
        rows, columns = (
            slice(math.floor(n * size / side), math.ceil((n + 1) * size / side))
            for n, size in zip((i, j), image.shape[1:], strict=True)
        )
        found[:, i, j] = image[:, rows, columns].mean((1, 2))
    return found


def as_loops(network: DeepRecurrentAttention, images, firsts, noises, patch: int, scales: int):
    """Every glimpse of every roll-out; what is returned are logits, locations, log-probabilities and guesses."""
    weights = {name: p.detach().numpy() for name, p in network.named_parameters()}
    spread, width = network.policy.spread.item(), len(weights["upper.bias_hh"]) // 4

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def relu(x):
        return np.maximum(x, 0)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def read(name, x):
        for layer in (0, 2, 4):
            x = relu(correlated(x, weights[f"{name}.{layer}.weight"], weights[f"{name}.{layer}.bias"]))
        return linear(f"{name}.7", x.ravel())

    def lstm(name, x, state, cell):
        gates = weights[f"{name}.weight_ih"] @ x + weights[f"{name}.weight_hh"] @ state
        take, keep, new, show = (gates + weights[f"{name}.bias_ih"] + weights[f"{name}.bias_hh"]).reshape(4, -1)
        cell = sigmoid(keep) * cell + sigmoid(take) * np.tanh(new)
        return sigmoid(show) * np.tanh(cell), cell

    found = []
    for image, first, noise in zip(images, firsts, noises, strict=True):
        known = plan = (np.zeros(width), np.zeros(width))
        if network.context is not None:
            cell = read("context", shrunk(image, network.context_size))
            plan = np.tanh(cell), cell
        locations, logits, scores, guesses = [], [], [], []
        noise = iter(noise)
        for t in range(network.targets * network.glimpses):
            if t == 0 and first is not None:
                where = first
            else:
                mean = linear("locator", plan[0])
                action = mean + spread * next(noise)
                density = np.exp(-((action - mean) ** 2) / (2 * spread**2)) / (spread * math.sqrt(2 * math.pi))
                scores.append(np.log(density[0] * density[1]))
                guesses.append(linear("baseline", plan[0])[0])
                where = np.clip(action, -1, 1)
            locations.append(where)
            patches = glimpsed(image, where, patch, scales).reshape(-1, patch, patch)
            g = relu(read("glimpse.see.1", patches)) * relu(linear("glimpse.place", where))
            known = lstm("lower", g, *known)
            plan = lstm("upper", known[0], *plan)
            logits.append(linear("classifier.2", relu(linear("classifier.0", known[0]))))
        found.append((logits, locations, scores, guesses))
    return [torch.tensor(np.array(each)) for each in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("images", "rollouts", "options", "given"),
    [
        (2, 1, {}, False),
        (1, 2, {"in_chans": 3, "patch": 10, "scales": 1, "spread": 0.7, "targets": 2, "glimpses": 2}, False),
        (2, 2, {"size": (31, 17), "context": None, "patch": 11, "glimpses": 2}, True),
        (1, 2, {"glimpses": 2}, True),
        (2, 1, {"glimpses": 1}, False),
    ],
    ids=["plain", "two targets, three channels", "no context", "a first location", "one glimpse"],
)
def test_is_the_paper_written_as_loops(images, rollouts, options, given):
    network = small(**options).double()
    settings = SMALL | {"in_chans": 1, "scales": 2, "targets": 1} | options
    x = torch.rand(images, settings["in_chans"], *settings["size"], dtype=torch.float64)
    m, glimpses = images * rollouts, settings["targets"] * settings["glimpses"]
    actions = glimpses - given
    first = 2 * torch.rand(m, 2, dtype=torch.float64) - 1 if given else None
    noise = torch.randn(actions, m, 2, dtype=torch.float64)
    scripted(network, noise)
    rollout = network.rollout(x, rollouts=rollouts, first=first)
    logits, locations, scores, guesses = as_loops(
        network,
        x.repeat_interleave(rollouts, 0).numpy(),
        [None] * m if first is None else first.numpy(),
        noise.transpose(0, 1).numpy(),
        settings["patch"],
        settings["scales"],
    )
    torch.testing.assert_close(rollout.logits, logits)
    torch.testing.assert_close(rollout.locations, locations)
    torch.testing.assert_close(rollout.log_probs, scores)
    torch.testing.assert_close(rollout.baselines, guesses)
    assert rollout.logits.shape == (m, glimpses, 10)
    assert rollout.log_probs.shape == rollout.baselines.shape == rollout.entropies.shape == (m, actions)
    assert torch.equal(rollout.weights, torch.eye(glimpses, dtype=torch.float64)[-1:].expand(m, -1))


@pytest.mark.parametrize("context", [10, None])
@pytest.mark.parametrize("targets", [1, 2])
def test_forward_follows_the_mean_of_the_policy(context, targets):
    network = small(context=context, targets=targets).double().eval()
    x = torch.rand(2, 1, 20, 28, dtype=torch.float64)
    first = [None] * 2 if context else np.zeros((2, 2))
    logits, locations, *_ = as_loops(network, x.numpy(), first, np.zeros((2, 3 * targets, 2)), 9, 2)
    rollout = network.rollout(x, policy="mean", first=None if context else torch.zeros(2, 2))
    torch.testing.assert_close(rollout.locations, locations)
    # each target by what is known after its last glimpse
    torch.testing.assert_close(network(x), logits[:, [2, 5]] if targets == 2 else logits[:, 2])


# --- where it looks ---------------------------------------------------------------------------------------------------


def test_the_first_location_follows_from_the_image_and_is_an_action():
    network, x, asked = small(spread=1e-4).eval(), torch.rand(40, 1, 20, 28) * torch.rand(40, 1, 1, 1), []
    for layer in (network.context[-1], network.locator):
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    sample = network.policy.sample
    network.policy.sample = lambda mean: asked.append(len(mean)) or sample(mean)
    rollout = network.rollout(x, rollouts=2)
    assert not network.begins_anywhere
    assert asked == [80] * 3  # nobody asks where to look after the last glimpse
    assert rollout.log_probs.shape == (80, 3)
    first = rollout.locations[::2, 0]
    torch.testing.assert_close(rollout.locations[1::2, 0], first, rtol=0, atol=1e-3)
    assert first.std(0).min() > 0.01  # not the same for all images


def test_without_a_context_it_begins_anywhere():
    network, x = small(context=None), torch.rand(500, 1, 20, 28)
    rollout = network.rollout(x, policy="mean")
    first = rollout.locations[:, 0]
    assert network.begins_anywhere
    assert rollout.log_probs.shape == (500, 2)
    assert first.abs().max() <= 1
    assert first.max() > 0.9
    assert first.min() < -0.9
    torch.testing.assert_close(first.mean(0), torch.zeros(2), rtol=0, atol=0.1)
    assert small(context=None, glimpses=1).rollout(x[:2]).log_probs.shape == (2, 0)


@pytest.mark.parametrize("context", [10, None])
def test_controls_do_not_look_where_the_policy_says(context):
    network, x = small(context=context), torch.rand(200, 1, 20, 28)
    torch.nn.init.constant_(network.locator.bias, 50.0)
    network.policy.sample = None
    assert not network.rollout(x, policy="centre").locations.any()
    where = network.rollout(x, policy="random").locations
    torch.testing.assert_close(where.std((0, 2)), torch.full((3,), 3**-0.5), rtol=0, atol=0.06)
    assert (network.rollout(x, policy="mean", first=torch.zeros(200, 2)).locations[:, 1:] == 1).all()


def test_rollouts_of_an_image_are_rows_one_after_the_other_and_do_not_mix():
    network, x = small().double(), torch.rand(3, 1, 20, 28, dtype=torch.float64)
    noise = torch.randn(3, 6, 2).double()
    scripted(network, noise)
    folded = network.rollout(x, rollouts=2)
    for m in range(2):
        scripted(network, noise[:, m::2])
        alone = network.rollout(x)
        for name in ("logits", "locations", "log_probs", "baselines"):
            torch.testing.assert_close(getattr(folded, name)[m::2], getattr(alone, name))


def test_the_context_reaches_logits_only_through_where_was_looked():
    network, x = small(scales=1).double(), torch.rand(2, 1, 20, 28, dtype=torch.float64, requires_grad=True)
    places = iter(torch.tensor([[[-0.5, -0.4]] * 2, [[-0.6, -0.3]] * 2, [[-0.4, -0.4]] * 2]).double())
    network.policy.sample = lambda mean: next(places)
    rollout = network.rollout(x)
    covered = torch.zeros(20, 28, dtype=torch.bool)
    for corners in network.sensor.corners(rollout.locations[0], (20, 28))[:, 0]:
        (left, top), (right, bottom) = corners.amin(0).floor().int().tolist(), corners.amax(0).ceil().int().tolist()
        covered[max(0, top) : bottom, max(0, left) : right] = True
    assert 0 < covered.sum() < 200  # of 560
    (of_logits,) = torch.autograd.grad(rollout.logits.square().sum(), x, retain_graph=True)
    assert of_logits[:, :, covered].any()
    assert not of_logits[:, :, ~covered].any()
    (of_actions,) = torch.autograd.grad(rollout.log_probs[:, 0].sum(), x)
    assert of_actions[:, :, ~covered].any()  # the context sees all of the image


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "reached"),
    [
        (lambda rollout: rollout.logits, {"glimpse", "lower", "classifier"}),
        (lambda rollout: rollout.log_probs, {"locator", "policy", "upper", "context", "lower", "glimpse"}),
        (lambda rollout: rollout.log_probs[:, 0], {"locator", "policy", "context"}),
        (lambda rollout: rollout.entropies, {"policy"}),
        (lambda rollout: rollout.baselines, {"baseline"}),
    ],
    ids=["logits", "log_probs", "the first action", "entropies", "baselines"],
)
@pytest.mark.parametrize("targets", [1, 2])
def test_gradients_go_only_where_the_paper_sends_them(of, reached, targets):
    network = small(learned_spread=True, targets=targets)
    of(network.rollout(torch.rand(4, 1, 20, 28), rollouts=2)).square().sum().backward()
    found = {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert found == reached


def test_no_gradient_goes_through_locations():
    network, x = small(), torch.rand(2, 1, 20, 28, requires_grad=True)
    for policy in ("sample", "mean"):
        assert not network.rollout(x, policy=policy).locations.requires_grad


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_glimpse_is_the_product_of_what_is_seen_and_where():
    network = small().double()
    patches, where = torch.rand(5, 2, 1, 9, 9).double(), torch.rand(5, 2).double()
    seen, place = network.glimpse.see(patches).relu(), network.glimpse.place(where).relu()
    torch.testing.assert_close(network.glimpse(patches, where), seen * place)
    torch.nn.init.constant_(network.glimpse.place.bias, -9.0)
    assert not network.glimpse(patches, where).any()  # a sum would still show what is seen


def test_the_papers_filters_are_not_padded():
    reader = convolutions(2, 12, (64, 64, 128), 256)
    count = 64 * (2 * 25 + 1) + 64 * (64 * 9 + 1) + 128 * (64 * 9 + 1) + 256 * (128 * 4 * 4 + 1)
    assert sum(p.numel() for p in reader.parameters()) == count
    assert reader(torch.rand(3, 2, 12, 12)).shape == (3, 256)
    assert convolutions(1, 9, (2, 2, 2), 4)(torch.rand(1, 1, 9, 9)).shape == (1, 4)


@pytest.mark.parametrize("scales", [1, 2])
def test_a_timm_model_reads_every_patch_for_itself(scales):
    options = {"size": (40, 50), "patch": 32, "scales": scales, "in_chans": 3}
    network, x = small(encoder="test_resnet", **options).eval(), torch.rand(2, 3, 40, 50)
    reader, patches = network.glimpse.see, network.sensor(network.sensor.prepare(x), torch.zeros(2, 2))
    features = torch.cat([reader.encoder(patches[:, k]) for k in range(scales)], 1)
    torch.testing.assert_close(reader(patches), F.linear(features, reader.join.weight, reader.join.bias))
    network.train()(x).sum().backward()
    assert reader.encoder.conv1[0].weight.grad.any()


def test_trained_weights_of_an_encoder_are_kept(monkeypatch):
    loaded = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: loaded.append(model))
    network = small(encoder="test_resnet.r160_in1k", pretrained=True, patch=16)
    assert loaded == [network.glimpse.see.encoder]
    assert "pretrained" not in network.arguments


# --- as a network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"targets": 3, "num_classes": 11},
        {"encoder": "test_resnet", "patch": 16, "in_chans": 3, "num_classes": 4},
        {"context": None, "learned_spread": True, "spread": 0.1},
    ],
    ids=["targets", "encoder", "no context"],
)
def test_saves_and_loads(options, tmp_path):
    network, x = small(**options).eval(), torch.rand(2, options.get("in_chans", 1), 20, 28)
    network.policy.narrow(0.5)
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert torch.equal(again(x), network(x))
    assert torch.equal(again.policy.spread, network.policy.spread)
    assert again.arguments == network.arguments
    assert again.num_classes == options.get("num_classes", 10)


@pytest.mark.parametrize(
    "options",
    [{"targets": 2, "glimpses": 1}, pytest.param({"context": None, "glimpses": 2}, marks=pytest.mark.slow)],
    ids=["targets", "no context"],
)
def test_compiles_without_a_break_and_exports(options, unchecked):
    network, x = small(**options).eval(), torch.rand(2, 1, 20, 28)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-4)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False).module()
    other = torch.rand(5, 1, 20, 28)
    torch.testing.assert_close(program(other), network(other), rtol=1e-4, atol=1e-4)


def test_looks_at_images_of_other_sizes_and_at_none():
    network = small().eval()
    for size, count in itertools.product(((9, 9), (100, 33)), (2, 1, 0)):
        assert network(torch.rand(count, 1, *size)).shape == (count, 10)
    rollout = small(targets=2).rollout(torch.rand(0, 1, 20, 28), rollouts=3)
    assert (rollout.logits.shape, rollout.log_probs.shape) == ((0, 6, 10), (0, 6))


def test_an_image_alone_is_seen_as_among_others():
    network, x = small(targets=2).double().eval(), torch.rand(3, 1, 20, 28).double()
    torch.testing.assert_close(network(x[1:2]), network(x)[1:2])


def test_locations_stay_fine_in_bfloat16():
    network, x = small(), torch.rand(2, 1, 20, 28)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = network.rollout(x, rollouts=2)
        (rollout.logits.float().square().mean() + rollout.log_probs.mean()).backward()
    for values in (rollout.locations, rollout.log_probs, rollout.entropies):
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    for context in (10, None):
        assert small(context=context).bfloat16().eval()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"glimpses": 0}, "glimpses must be at least 1, got 0"),
        ({"targets": 0}, "targets must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"filters": (3, 0, 2)}, "filters must be at least 1, got 0"),
        ({"context_filters": (3, 3, 0)}, "context_filters must be at least 1, got 0"),
        ({"patch": 8}, "patch must be at least 9 for convolutions without padding, got 8"),
        ({"context": 8}, "context must be at least 9 for convolutions without padding, got 8"),
        ({"zoom": 1}, "zoom must be at least 2, got 1"),
        ({"patch": 29}, "images must be as high or wide as a patch of 29, got 20 × 28"),
        ({"pretrained": True}, "pretrained and encoder_args must be left out without an encoder"),
        ({"encoder": "resnt18"}, "encoder must be the name of a timm model, got 'resnt18'; close: resnet18, "),
        ({"encoder": "test_vit"}, r"encoder VisionTransformer cannot read patches of \(1, 9, 9\): Input height"),
        ({"spread": 0.0}, "spread must be one or two positive numbers, got 0.0"),
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
        ({"first": torch.zeros(3, 2)}, "first must be a location for each of 2 roll-outs, got 3"),
        (
            {"first": torch.tensor([[0.0, 0.0], [0.0, 1.01]])},
            r"where must lie in \[-1, 1\], got .* first, in rows \[1\]",
        ),
        ({"first": torch.full((2, 2), math.nan)}, r"where must lie in \[-1, 1\], got .* first, in rows \[0, 1\]"),
        ({"answer": torch.tensor([0, 1])}, "answer must be None: nothing that is told it draws actions"),
    ],
)
def test_says_what_a_rollout_cannot_be(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        small().rollout(torch.rand(2, 1, 20, 28), **options)


def test_refuses_images_smaller_than_a_glimpse():
    with pytest.raises(ValueError, match="images must be as high or wide as a patch of 9, got 8 × 8"):
        small()(torch.rand(2, 1, 8, 8))
