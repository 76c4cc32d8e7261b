import itertools
import math

import numpy as np
import pytest
import torch

import visattn
from visattn.models import RecurrentAttention
from visattn.models.looker import Rollout
from visattn.models.readout import stopping

SMALL = {"width": 12, "glimpse_width": 7, "location_width": 5, "size": (20, 28), "patch": 6, "glimpses": 4}


def small(**options) -> RecurrentAttention:
    network = RecurrentAttention(**SMALL | options)
    torch.nn.init.normal_(network.locator.weight, std=0.5)  # so that it looks around
    return network


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- the paper as loops -----------------------------------------------------------------------------------------------


def bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The value at a point in pixels, the first of which is at 0, of an image with black around it."""
    value = np.zeros(len(image))
    for i, j in itertools.product(*(range(math.floor(at), math.floor(at) + 2) for at in (y, x))):
        if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
            value += image[:, i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return value


def glimpsed(image: np.ndarray, where: np.ndarray, patch: int, scales: int) -> np.ndarray:
    """Patches around a location, one after the other, each by its channels, rows and columns."""
    centre = [((w + 1) * side - 1) / 2 for w, side in zip(where, image.shape[:0:-1], strict=True)]
    patches = np.zeros((scales, len(image), patch, patch))
    for k, i, j in itertools.product(range(scales), range(patch), range(patch)):
        x, y = (c + (n - (patch - 1) / 2) * 2**k for c, n in zip(centre, (j, i), strict=True))
        patches[k, :, i, j] = bilinear(image, x, y)
    return patches.ravel()


def as_loops(network: RecurrentAttention, images, firsts, noises, patch: int, scales: int):
    """Every glimpse of every roll-out; what is returned are logits, locations, log-probabilities and guesses."""
    weights = {name: p.detach().numpy() for name, p in network.named_parameters()}
    spread = network.policy.spread.item()

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def relu(x):
        return np.maximum(x, 0)

    found = []
    for image, where, noise in zip(images, firsts, noises, strict=True):
        h, locations, logits, scores, guesses = np.zeros(len(weights["core.keep.bias"])), [], [], [], []
        for t in range(len(noise) + 1):
            locations.append(where)
            seen = relu(linear("glimpse.see", glimpsed(image, where, patch, scales)))
            place = relu(linear("glimpse.place", where))
            g = relu(linear("glimpse.join_seen", seen) + linear("glimpse.join_place", place))
            h = relu(linear("core.keep", h) + linear("core.take", g))
            logits.append(linear("classifier", h))
            if t < len(noise):
                mean = linear("locator", h)
                action = mean + spread * noise[t]
                density = np.exp(-((action - mean) ** 2) / (2 * spread**2)) / (spread * math.sqrt(2 * math.pi))
                scores.append(np.log(density[0] * density[1]))
                guesses.append(linear("baseline", h)[0])
                where = np.clip(action, -1, 1)
        found.append((logits, locations, scores, guesses))
    return [torch.tensor(np.array(each)) for each in zip(*found, strict=True)]


def scripted(network: RecurrentAttention, noise: torch.Tensor) -> None:
    """Have the policy draw what is given: (t, m, 2)."""
    drawn = iter(noise)
    network.policy.sample = lambda mean: (mean + network.policy.spread * next(drawn)).detach()


@pytest.mark.parametrize(
    ("images", "rollouts", "options"),
    [
        (2, 1, {}),
        (1, 3, {"in_chans": 3, "patch": 5, "scales": 2, "spread": 0.7}),
        (2, 2, {"size": (31, 17), "patch": 7, "glimpses": 1}),
    ],
    ids=["plain", "one image, three channels, odd patches", "one glimpse"],
)
def test_is_the_paper_written_as_loops(images, rollouts, options):
    network = small(**options).double()
    settings = SMALL | {"in_chans": 1, "scales": 1} | options
    x = torch.rand(images, settings["in_chans"], *settings["size"], dtype=torch.float64)
    m, steps = images * rollouts, settings["glimpses"] - 1
    first = 2 * torch.rand(m, 2, dtype=torch.float64) - 1
    first[0] = torch.tensor([-1.0, 1.0])  # a corner
    noise = torch.randn(steps, m, 2, dtype=torch.float64)
    scripted(network, noise)
    rollout = network.rollout(x, rollouts=rollouts, first=first)
    logits, locations, scores, guesses = as_loops(
        network,
        x.repeat_interleave(rollouts, 0).numpy(),
        first.numpy(),
        noise.transpose(0, 1).numpy(),
        settings["patch"],
        settings["scales"],
    )
    torch.testing.assert_close(rollout.logits, logits)
    torch.testing.assert_close(rollout.locations, locations)
    if steps:
        torch.testing.assert_close(rollout.log_probs, scores)
        torch.testing.assert_close(rollout.baselines, guesses)
        assert (rollout.locations.abs() == 1).any()  # some were drawn outside
    assert rollout.log_probs.shape == rollout.baselines.shape == rollout.entropies.shape == (m, steps)
    assert torch.equal(rollout.weights, torch.eye(steps + 1, dtype=torch.float64)[-1:].expand(m, -1))


def test_the_mean_policy_looks_where_the_state_says():
    network, x = small().double().eval(), torch.rand(2, 1, 20, 28, dtype=torch.float64)
    logits, locations, *_ = as_loops(network, x.numpy(), np.zeros((2, 2)), np.zeros((2, 3, 2)), 6, 1)
    rollout = network.rollout(x, policy="mean", first=torch.zeros(2, 2))
    torch.testing.assert_close(rollout.locations, locations)
    torch.testing.assert_close(network(x), logits[:, -1])
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({}, 209_677), ({"patch": 12, "scales": 3}, 256_781), ({"patch": 12, "scales": 4}, 275_213)],
)
def test_has_as_many_parameters_as_the_paper(options, parameters):
    assert count(RecurrentAttention(size=(100, 100), **options)) == parameters


# --- where it looks ---------------------------------------------------------------------------------------------------


def test_begins_anywhere_or_at_the_centre():
    x = torch.rand(500, 1, 20, 28)
    first = small().rollout(x, policy="mean").locations[:, 0]
    assert first.abs().max() <= 1
    assert first.max() > 0.9
    assert first.min() < -0.9
    torch.testing.assert_close(first.mean(0), torch.zeros(2), rtol=0, atol=0.1)
    network = small(first="centre")
    assert not network.begins_anywhere
    assert not network.rollout(x).locations[:, 0].any()
    assert network.rollout(x).locations[:, 1:].any()


def test_controls_do_not_ask_the_policy():
    network, x = small(first="centre"), torch.rand(200, 1, 20, 28)
    network.locator = None
    network.mean = lambda states: torch.zeros(*states.shape[:-1], 2)
    network.policy.sample = None
    assert not network.rollout(x, policy="centre").locations.any()
    where = network.rollout(x, policy="random").locations
    assert (where[:, 0] != 0).all()
    torch.testing.assert_close(where.std((0, 2)), torch.full((4,), 3**-0.5), rtol=0, atol=0.06)


def test_nobody_asks_where_to_look_after_the_last_glimpse():
    network, x, states, asked = small(glimpses=5, spread=0.05).double(), torch.rand(2, 1, 20, 28).double(), [], []
    torch.nn.init.normal_(network.locator.weight, std=0.1)
    network.core.register_forward_hook(lambda module, args, output: states.append(output.detach()))
    sample = network.policy.sample
    network.policy.sample = lambda mean: asked.append(len(mean)) or sample(mean)
    rollout = network.rollout(x, rollouts=3)
    assert asked == [6] * 4
    assert rollout.locations.shape == (6, 5, 2)
    assert rollout.log_probs.shape == (6, 4)
    actions = rollout.locations[:, 1:]
    assert actions.abs().max() < 1
    expected = network.policy.log_prob(network.locator(torch.stack(states[:-1], 1)), actions)
    torch.testing.assert_close(rollout.log_probs, expected)


def test_rollouts_of_an_image_are_rows_one_after_the_other_and_do_not_mix():
    network, x = small().double(), torch.rand(3, 1, 20, 28, dtype=torch.float64)
    first, noise = 2 * torch.rand(6, 2).double() - 1, torch.randn(3, 6, 2).double()
    scripted(network, noise)
    folded = network.rollout(x, rollouts=2, first=first)
    for m in range(2):
        scripted(network, noise[:, m::2])
        alone = network.rollout(x, first=first[m::2])
        for name in ("logits", "locations", "log_probs", "baselines"):
            torch.testing.assert_close(getattr(folded, name)[m::2], getattr(alone, name))


# --- gradients --------------------------------------------------------------------------------------------------------

HEADS = {"locator", "baseline", "policy", "guide"}


@pytest.mark.parametrize(
    ("of", "reached"),
    [
        (lambda rollout: rollout.logits, {"glimpse", "core", "classifier", "score"}),
        (lambda rollout: rollout.halting[:, 0], {"glimpse", "core", "halt"}),
        (lambda rollout: rollout.log_probs, {"locator", "policy"}),
        (lambda rollout: rollout.entropies, {"policy"}),
        (lambda rollout: rollout.baselines, {"baseline"}),
        (lambda rollout: rollout.informed, {"guide", "policy"}),
    ],
    ids=["logits", "halting", "log_probs", "entropies", "baselines", "informed"],
)
@pytest.mark.parametrize("core", ["rnn", "lstm"])
def test_gradients_go_only_where_the_paper_sends_them(of, reached, core):
    network = small(core=core, halting=True, learned_spread=True, informed=True, readout="attention")
    rollout = network.rollout(torch.rand(4, 1, 20, 28), rollouts=2, answer=torch.tensor([0, 3, 9, 1]))
    of(rollout).square().sum().backward()
    found = {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert found == reached


def test_no_gradient_goes_through_locations():
    network, x = small(), torch.rand(2, 1, 20, 28, requires_grad=True)
    rollout = network.rollout(x)
    assert not rollout.locations.requires_grad
    rollout.logits.sum().backward()
    assert x.grad.any()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", ["mean", "attention"])
def test_reads_all_states_so_far(readout):
    network, x, states = small(readout=readout), torch.rand(3, 1, 20, 28), []
    network.core.register_forward_hook(lambda module, args, output: states.append(output))
    rollout = network.rollout(x)
    for m, t in itertools.product(range(3), range(4)):
        scores = [0.0 if network.score is None else network.score(state[m]).item() for state in states[: t + 1]]
        odds = np.exp(scores) / np.exp(scores).sum()
        read = sum(float(w) * state[m] for w, state in zip(odds, states, strict=False))
        torch.testing.assert_close(rollout.logits[m, t], network.classifier(read))
    torch.testing.assert_close(rollout.weights[-1], torch.tensor(odds, dtype=torch.float32))
    torch.testing.assert_close(rollout.weights.sum(1), torch.ones(3))


def test_has_a_memory_that_is_an_lstm():
    network, x, vectors = small(core="lstm"), torch.rand(3, 1, 20, 28), []
    network.glimpse.register_forward_hook(lambda module, args, output: vectors.append(output))
    rollout = network.rollout(x)
    lstm = torch.nn.LSTM(12, 12, batch_first=True)
    lstm.load_state_dict({f"{name}_l0": p for name, p in network.core.state_dict().items()})
    torch.testing.assert_close(rollout.logits, network.classifier(lstm(torch.stack(vectors, 1))[0]))


@pytest.mark.parametrize("scales", [1, 2])
def test_a_timm_model_reads_every_patch_for_itself(scales):
    options = {"size": (40, 50), "patch": 32, "scales": scales, "in_chans": 3}
    network, x = small(encoder="test_resnet", **options).eval(), torch.rand(2, 3, 40, 50)
    patches, where = network.sensor(network.sensor.prepare(x), torch.zeros(2, 2)), torch.zeros(2, 2)
    features = torch.cat([network.glimpse.encoder(patches[:, k]) for k in range(scales)], 1)
    seen = network.glimpse.see(features).relu()
    joined = network.glimpse.join_seen(seen) + network.glimpse.join_place(network.glimpse.place(where).relu())
    torch.testing.assert_close(network.glimpse(patches, where), joined.relu())
    assert network.glimpse.see.in_features == 96 * scales
    network.train()(x).sum().backward()
    assert network.glimpse.encoder.conv1[0].weight.grad.any()


def test_trained_weights_of_an_encoder_are_kept(monkeypatch):
    loaded = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: loaded.append(model))
    network = small(encoder="test_resnet.r160_in1k", pretrained=True, patch=16)
    assert loaded == [network.glimpse.encoder]
    assert network.glimpse.encoder.training
    assert "pretrained" not in network.arguments


def test_takes_options_of_the_encoder():
    network = small(encoder="test_vit", encoder_args={"img_size": 16}, patch=16).eval()
    assert network(torch.rand(2, 1, 20, 28)).shape == (2, 10)


# --- halting ----------------------------------------------------------------------------------------------------------


def test_probabilities_to_stop_sum_to_one_and_the_last_glimpse_takes_the_rest():
    scores = torch.randn(50, 6, dtype=torch.float64) * 4
    p, chance = stopping(scores), scores.sigmoid()
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=torch.float64))
    for t in range(5):
        torch.testing.assert_close(p[:, t], chance[:, t] * (1 - chance[:, :t]).prod(1))
    torch.testing.assert_close(p[:, 5], (1 - chance[:, :5]).prod(1))
    torch.testing.assert_close(stopping(scores[:, :1]), torch.ones(50, 1, dtype=torch.float64))


def test_a_rollout_says_how_many_glimpses_are_taken():
    halting = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.4, 0.2, 0.4], [0.5, 0.5, 0.0]])
    empty = torch.zeros(4, 0)
    logits = torch.arange(12.0).view(4, 3, 1)
    rollout = Rollout(logits, torch.zeros(4, 3, 2), empty, empty, empty, torch.zeros(4, 3), halting)
    assert rollout.glimpses.tolist() == [1, 3, 2, 2]
    assert rollout.decision[:, 0].tolist() == [0, 5, 7, 10]
    torch.testing.assert_close(rollout.expected_glimpses, torch.tensor([1.5, 2.4, 2.0, 1.5]))
    assert torch.equal(rollout.stops, halting)
    whole = rollout._replace(halting=None)
    assert whole.glimpses.tolist() == [3] * 4
    assert whole.decision[:, 0].tolist() == [2, 5, 8, 11]
    assert whole.expected_glimpses.tolist() == [3] * 4


@pytest.mark.parametrize(("bias", "looks"), [(9.0, 1), (-9.0, 4), (0.2, 1), (-0.5, 2)])
def test_stops_when_all_have_stopped_more_likely_than_not(bias, looks):
    network, x, seen = small(halting=True).eval(), torch.rand(3, 1, 20, 28), []
    torch.nn.init.zeros_(network.halt.weight)
    torch.nn.init.constant_(network.halt.bias, bias)
    handle = network.sensor.register_forward_hook(lambda *_: seen.append(1))
    logits = network(x)
    assert len(seen) == looks
    handle.remove()
    rollout = network.rollout(x, policy="mean", first=torch.zeros(3, 2))
    assert rollout.glimpses.tolist() == [looks] * 3
    torch.testing.assert_close(logits, rollout.logits[:, looks - 1])


def test_images_stop_each_when_it_is_sure():
    network, x = small(halting=True).eval(), torch.rand(40, 1, 20, 28) * torch.rand(40, 1, 1, 1) * 5
    torch.nn.init.normal_(network.halt.weight, std=3)
    rollout = network.rollout(x, policy="mean", first=torch.zeros(40, 2))
    assert len(set(rollout.glimpses.tolist())) > 1
    torch.testing.assert_close(network(x), rollout.decision)


# --- wake-sleep -------------------------------------------------------------------------------------------------------


def test_what_is_told_the_answer_draws_the_actions():
    network, x, answer = small(informed=True, spread=1e-3), torch.rand(2, 1, 20, 28), torch.tensor([2, 7])
    states = []
    network.core.register_forward_hook(lambda module, args, output: states.append(output))
    rollout = network.rollout(x, rollouts=2, answer=answer)
    known = torch.stack(states[:-1], 1)
    told = torch.stack([network.guide(state, answer.repeat_interleave(2)) for state in known.unbind(1)], 1)
    actions = rollout.locations[:, 1:]
    assert actions.abs().max() < 1
    torch.testing.assert_close(actions, told, rtol=0, atol=0.01)
    torch.testing.assert_close(rollout.informed, network.policy.log_prob(told, actions), rtol=1e-3, atol=1e-2)
    assert (rollout.log_probs < -1e3).all()  # the policy would hardly have looked there
    assert network.rollout(x).informed is None
    other = network.rollout(x, rollouts=2, answer=1 + answer, first=rollout.locations[:, 0])
    assert (other.locations - rollout.locations)[:, 1].abs().max() > 0.05


# --- as a network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"scales": 2, "core": "lstm", "readout": "attention", "halting": True},
        {"encoder": "test_resnet", "patch": 16, "in_chans": 3, "num_classes": 4},
        {"learned_spread": True, "informed": True, "first": "centre", "readout": "mean", "spread": 0.1},
    ],
    ids=["halting", "encoder", "informed"],
)
def test_saves_and_loads(options, tmp_path):
    network, x = small(**options).eval(), torch.rand(2, options.get("in_chans", 1), 20, 28)
    network.policy.narrow(0.5)
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert torch.equal(again(x), network(x))
    assert torch.equal(again.policy.spread, network.policy.spread)
    assert again.arguments == network.arguments
    assert again.num_classes == options.get("num_classes", 10)


def test_looks_at_images_of_other_sizes():
    network = small().eval()
    for size in ((6, 6), (100, 33)):
        assert network(torch.rand(2, 1, *size)).shape == (2, 10)


@pytest.mark.parametrize(
    "options",
    [{"scales": 2}, pytest.param({"core": "lstm", "readout": "attention", "halting": True}, marks=pytest.mark.slow)],
    ids=["plain", "all options"],
)
def test_compiles_without_a_break_and_exports(options, unchecked):
    network, x = small(glimpses=2, **options).eval(), torch.rand(2, 1, 20, 28)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-4)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False).module()
    other = torch.rand(5, 1, 20, 28)
    torch.testing.assert_close(program(other), network(other), rtol=1e-4, atol=1e-4)


def test_locations_stay_fine_in_bfloat16():
    network, x = small(readout="attention", halting=True), torch.rand(2, 1, 20, 28)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = network.rollout(x, rollouts=2)
        rollout.logits.float().square().mean().backward()
    for values in (rollout.locations, rollout.log_probs, rollout.halting, rollout.weights):
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    low = small(scales=2).bfloat16().eval()
    assert low(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"glimpses": 0}, "glimpses must be at least 1, got 0"),
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"zoom": 1}, "zoom must be at least 2, got 1"),
        ({"core": "gru"}, "core must be rnn or lstm, got 'gru'"),
        ({"first": "left"}, "first must be random or centre, got 'left'"),
        ({"readout": "max"}, "readout must be last or mean or attention, got 'max'"),
        ({"patch": 29}, "images must be as high or wide as a patch of 29, got 20 × 28"),
        ({"pretrained": True}, "pretrained and encoder_args must be left out without an encoder"),
        ({"encoder": "resnt18"}, "encoder must be the name of a timm model, got 'resnt18'; close: resnet18, "),
        ({"encoder": "!"}, "encoder must be the name of a timm model, got '!'$"),
        ({"encoder": "test_vit"}, r"encoder VisionTransformer cannot read patches of \(1, 6, 6\): Input height"),
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
        ({"answer": torch.tensor([0, 1])}, "answer must be None unless the network is informed, and samples"),
    ],
)
def test_says_what_a_rollout_cannot_be(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        small().rollout(torch.rand(2, 1, 20, 28), **options)


def test_refuses_images_smaller_than_a_glimpse():
    with pytest.raises(ValueError, match="images must be as high or wide as a patch of 6, got 5 × 5"):
        small()(torch.rand(2, 1, 5, 5))
