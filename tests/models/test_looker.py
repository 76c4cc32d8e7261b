"""What all networks share that look at one place after another."""

import shutil
from functools import partial

import pytest
import timm
import torch

import visattn
from visattn.models import DeepRecurrentAttention, DifferentiableGlimpseClassifier, GlanceFocus, RecurrentAttention
from visattn.models.looker import Looker, Rollout
from visattn.models.readout import stopping

RAM = partial(RecurrentAttention, 4, size=(20, 24), patch=9, glimpses=3, width=12, glimpse_width=8, location_width=6)
DRAM = partial(DeepRecurrentAttention, 4, size=(20, 24), patch=9, glimpses=3, scales=1, width=12, glimpse_width=8)
DRAW = partial(DifferentiableGlimpseClassifier, 4, size=(20, 24), patch=9, glimpses=3, width=12)
GFNET = partial(GlanceFocus, 4, backbone="test_resnet", patch=16, glimpses=3, in_chans=1, width=8, policy_width=8)
READING = [pytest.param(RAM, id="RAM"), pytest.param(DRAM, id="DRAM"), pytest.param(DRAW, id="DRAW's reading")]


def shaken(network: Looker) -> Looker:
    """The same network, looking around."""
    for name, p in network.named_parameters():
        if name.startswith(("locator", "aim")) and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5)
    return network.eval()


def states_of(network: Looker) -> list[torch.Tensor]:
    """What the network has in mind after each glimpse, once it has looked."""
    seen: list[torch.Tensor] = []
    cell = getattr(network, "lower", None) or getattr(network, "core", None) or network.memory
    cell.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    return seen


# --- what is classified -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", READING)
@pytest.mark.parametrize("readout", ["last", "mean", "attention"])
def test_reads_the_states_so_far(make, readout):
    network = shaken(make(readout=readout))
    states = states_of(network)
    rollout = network.rollout(torch.rand(2, 1, 20, 24), rollouts=2)
    for t in range(3):
        seen = torch.stack(states[: t + 1], 1)
        scores = network.score(seen)[..., 0] if readout == "attention" else torch.zeros(4, t + 1)
        if readout == "last":
            scores[:, :-1] = -torch.inf
        weights = scores.softmax(1)
        torch.testing.assert_close(rollout.logits[:, t], network.classifier((weights[..., None] * seen).sum(1)))
    torch.testing.assert_close(rollout.weights, weights)


@pytest.mark.parametrize("readout", ["last", "mean", "attention"])
def test_reads_the_states_since_the_target_before(readout):
    network = shaken(DRAM(targets=2, readout=readout))
    states = states_of(network)
    x = torch.rand(2, 1, 20, 24)
    rollout = network.rollout(x, policy="mean")
    seen = torch.stack(states[3:], 1)  # of the second target
    scores = network.score(seen)[..., 0] if readout == "attention" else torch.zeros(2, 3)
    if readout == "last":
        scores[:, :-1] = -torch.inf
    weights = scores.softmax(1)
    torch.testing.assert_close(rollout.logits[:, 5], network.classifier((weights[..., None] * seen).sum(1)))
    torch.testing.assert_close(rollout.weights, torch.cat((torch.zeros(2, 3), weights), 1))
    torch.testing.assert_close(network(x), rollout.logits[:, [2, 5]])


@pytest.mark.parametrize("make", READING)
def test_an_unknown_readout_is_refused(make, unchecked):
    with pytest.raises(ValueError, match="readout must be last or mean or attention, got 'first'"):
        make(readout="first")


# --- when there is enough ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", READING)
@pytest.mark.parametrize(("bias", "looks"), [(-9.0, 3), (0.1, 1)])
def test_stops_where_it_was_seen_enough(make, bias, looks):
    network = shaken(make(halting=True, readout="mean"))
    torch.nn.init.zeros_(network.halt.weight)
    torch.nn.init.constant_(network.halt.bias, bias)
    x = torch.rand(2, 1, 20, 24)
    first = torch.zeros(2, 2) if network.begins_anywhere else None
    whole = network.rollout(x, policy="mean", first=first)
    torch.testing.assert_close(whole.halting, stopping(torch.full((2, 3), bias)))
    states = states_of(network)
    torch.testing.assert_close(network(x), whole.decision)
    assert len(states) == looks == int(whole.glimpses[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", READING)
def test_each_image_stops_for_itself_and_a_trace_goes_on(make, unchecked):
    network = shaken(make(halting=True))
    torch.nn.init.normal_(network.halt.weight, std=20)
    x = torch.rand(40, 1, 20, 24) * torch.rand(40, 1, 1, 1)
    first = torch.zeros(40, 2) if network.begins_anywhere else None
    states = states_of(network)
    network.rollout(x, policy="mean", first=first)
    with torch.no_grad():  # half of them stop at once
        network.halt.bias.copy_(network.halt.bias - network.halt(states[0]).median())
    rollout = network.rollout(x, policy="mean", first=first)
    assert len(rollout.glimpses.unique()) > 1
    torch.testing.assert_close(network(x), rollout.decision)
    soonest, latest = (x[k : k + 1] for k in (rollout.glimpses.argmin(), rollout.glimpses.argmax()))
    traced = torch.jit.trace(network, soonest, check_trace=False)
    torch.testing.assert_close(traced(latest), network(latest))


def test_targets_have_all_their_glimpses():
    with pytest.raises(ValueError, match="halting must be False for several targets, whose glimpses go on, got 2"):
        DRAM(targets=2, halting=True)


def test_nothing_is_added_up_by_what_is_not_deterministic_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cumsum", None)
    halting = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    empty = torch.zeros(2, 0)
    rollout = Rollout(torch.zeros(2, 3, 4), torch.zeros(2, 3, 2), empty, empty, empty, halting, halting)
    assert rollout.glimpses.tolist() == [1, 3]
    torch.testing.assert_close(rollout.expected_glimpses, torch.tensor([1.5, 2.4]))
    torch.testing.assert_close(stopping(torch.zeros(1, 3)), torch.tensor([[0.5, 0.25, 0.25]]))


# --- what is looked at ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*READING, pytest.param(GFNET, id="glance and focus")])
def test_images_are_prepared_once_for_all_glimpses(make, monkeypatch):
    network, calls = shaken(make()), []
    name = "glance" if isinstance(network, GlanceFocus) else "prepare"
    prepare = getattr(network.sensor, name)
    monkeypatch.setattr(network.sensor, name, lambda images: calls.append(len(images)) or prepare(images))
    network.rollout(torch.rand(2, 1, 20, 24), rollouts=3)
    assert calls == [2]


ENCODED = [
    pytest.param(partial(RAM, patch=16), "encoder", id="RAM"),
    pytest.param(partial(DRAM, patch=16), "encoder", id="DRAM"),
    pytest.param(partial(DRAW, patch=16), "encoder", id="DRAW's reading"),
    pytest.param(GFNET, "backbone", id="glance and focus"),
]


@pytest.mark.parametrize(("make", "argument"), ENCODED)
def test_what_was_built_from_a_folder_needs_it_no_more(make, argument, tmp_path):
    encoder = timm.create_model("test_resnet", in_chans=1)
    visattn.save(encoder, tmp_path / "weights")
    options = {argument: f"local-dir:{tmp_path / 'weights'}", "pretrained": True}
    if argument == "backbone":
        options["crop_backbone"] = options["backbone"]
    network = shaken(make(**options))
    weights = {name: p for name, p in network.state_dict().items() if name.endswith("conv1.0.weight")}
    assert any(torch.equal(p, encoder.conv1[0].weight) for p in weights.values())
    visattn.save(network, tmp_path / "network")
    shutil.rmtree(tmp_path / "weights")
    x = torch.rand(2, 1, 20, 24)
    torch.testing.assert_close(visattn.load(tmp_path / "network")(x), network(x), rtol=0, atol=0)


@pytest.mark.parametrize(("make", "argument"), ENCODED)
@pytest.mark.parametrize("given", ["in_chans", "num_classes"])
def test_what_the_network_says_is_no_argument_of_its_encoder(make, argument, given):
    among = "backbone_args" if "backbone" in argument else "encoder_args"
    with pytest.raises(
        ValueError, match=rf"{among} must not have {given}, which the network says, got {{'{given}': 3}}"
    ):
        make(**{argument: "test_resnet", among: {given: 3}})
