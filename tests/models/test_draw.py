import math
from functools import partial

import numpy as np
import pytest
import torch

import visattn
from visattn.models import DRAW, DifferentiableGlimpseClassifier
from visattn.models.draw import divergence

SMALL = {"size": (8, 11), "steps": 3, "width": 6, "latent": 4, "read": 2, "write": 3}
FEW = {"size": (14, 11), "glimpses": 3, "patch": 4, "width": 6}


def scattered(network, std=0.4):
    """A network whose windows, and what it begins with, are not all but the same."""
    for name, p in network.named_parameters():
        if name.endswith("bias") or name.startswith(("aim", "describe")):
            torch.nn.init.normal_(p, std=std)
    return network


def small(**options) -> DRAW:
    return scattered(DRAW(**SMALL | options))


def few(**options) -> DifferentiableGlimpseClassifier:
    return scattered(DifferentiableGlimpseClassifier(**FEW | options))


# --- the paper as loops -----------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Loops:
    """What the paper writes, of a network's weights, for one image; pixels and filters count from 1, as there."""

    def __init__(self, network):
        self.weights = {name: p.detach().numpy() for name, p in network.named_parameters()}

    def linear(self, name, x):
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0)

    def lstm(self, name, x, h, c, known=0.0):
        gates = self.linear(f"{name}.gates", np.concatenate((x, h))) + known
        i, f, o, g = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    @staticmethod
    def filters(window, patch, shape):
        height, width = shape
        gx, gy = (width + 1) / 2 * (window[0] + 1), (height + 1) / 2 * (window[1] + 1)
        stride = (max(height, width) - 1) / (patch - 1) * math.exp(window[3])
        banks = []
        for centre, side in ((gy, height), (gx, width)):
            bank = np.zeros((patch, side))
            for i in range(1, patch + 1):
                mean = centre + (i - patch / 2 - 0.5) * stride
                for a in range(1, side + 1):
                    bank[i - 1, a - 1] = math.exp(-((a - mean) ** 2) / (2 * math.exp(window[2])))
                bank[i - 1] /= bank[i - 1].sum()
            banks.append(bank)
        return banks

    def read(self, image, window, patch):
        down, across = self.filters(window, patch, image.shape[1:])
        return math.exp(window[4]) * np.stack([down @ channel @ across.T for channel in image])

    def write(self, stroke, window, shape):
        down, across = self.filters(window, stroke.shape[1], shape)
        return np.stack([down.T @ channel @ across for channel in stroke]) / math.exp(window[4])


class Drawn(Loops):
    def __call__(self, image, noise, options):
        attention, patch = options.get("attention", True), SMALL["write"]
        canvas = self.weights["canvas_bias"]
        (h_enc, c_enc), (h, c) = self.weights["encoder.state_bias"], self.weights["decoder.state_bias"]
        told, reads, writes, canvases = [], [], [], []
        for epsilon in noise:
            if image is None:
                z = epsilon
            else:
                error = image - sigmoid(canvas)
                if attention:
                    reads.append(self.linear("aim", h)[:5])
                    seen = [self.read(each, reads[-1], SMALL["read"]).ravel() for each in (image, error)]
                    seen, known = np.concatenate(seen), 0.0
                else:
                    seen, known = error.ravel(), self.linear("image", image.ravel())
                h_enc, c_enc = self.lstm("encoder", np.concatenate((seen, h)), h_enc, c_enc, known)
                mean, log_spread = np.split(self.linear("describe", h_enc), 2)
                z = mean + np.exp(log_spread) * epsilon
                told.append(sum(m**2 + math.exp(2 * s) - 2 * s - 1 for m, s in zip(mean, log_spread, strict=True)) / 2)
            h, c = self.lstm("decoder", z, h, c)
            stroke = self.linear("stroke", h)
            if attention:
                writes.append(self.linear("aim", h)[5:])
                canvas = canvas + self.write(stroke.reshape(-1, patch, patch), writes[-1], canvas.shape[1:])
            else:
                canvas = canvas + stroke.reshape(canvas.shape)
            canvases.append(canvas)
        return canvases, told, reads, writes


OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"in_chans": 3}, {"attention": False, "in_chans": 2}], ids=["attention", "colours", "whole images"]
)


@OPTIONS
def test_is_the_paper_written_as_loops(options):
    network = small(**options).double()
    x = torch.rand(2, options.get("in_chans", 1), 8, 11, dtype=torch.float64)
    torch.manual_seed(7)
    drawing = network(x, canvases=True)
    torch.manual_seed(7)
    noise = torch.randn(3, 2, 4, dtype=torch.float64).transpose(0, 1)
    found = [Drawn(network)(image, epsilon, options) for image, epsilon in zip(x.numpy(), noise.numpy(), strict=True)]
    canvases, told, reads, writes = (torch.tensor(np.array(each)) for each in zip(*found, strict=True))
    torch.testing.assert_close(drawing.canvases, canvases)
    torch.testing.assert_close(drawing.canvas, canvases[:, -1])
    torch.testing.assert_close(drawing.divergences, told)
    if options.get("attention", True):
        torch.testing.assert_close(drawing.reads, reads)
        torch.testing.assert_close(drawing.writes, writes)
    else:
        assert drawing.reads is drawing.writes is None


@OPTIONS
def test_draws_of_nothing_by_its_second_half(options):
    network = small(**options).double()
    torch.manual_seed(7)
    drawing = network.generate(2, steps=5, canvases=True)
    torch.manual_seed(7)
    noise = torch.randn(5, 2, 4, dtype=torch.float64).transpose(0, 1)
    canvases = [Drawn(network)(None, epsilon, options)[0] for epsilon in noise.numpy()]
    torch.testing.assert_close(drawing.canvases, torch.tensor(np.array(canvases)))
    assert drawing.reads is None
    assert not drawing.divergences.any()
    assert not drawing.canvas.requires_grad


def test_two_drawings_are_the_same_by_one_seed_only():
    network, drawn = small(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(network.generate(3).canvas)
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().min() > 0
    assert network.generate(3).canvases is None


def test_says_what_its_windows_cover():
    network = small()
    drawing = network.generate(2)
    corners = network.corners(drawing)
    assert corners.shape == (2, 3, 4, 2)
    for t, (x, y, _, stride, _) in enumerate(drawing.writes[1]):
        side = corners[1, t, 2] - corners[1, t, 0]
        torch.testing.assert_close(side, (3 * stride.exp() * 10 / 2).expand(2))
        centre = torch.stack((12 * x + 11, 9 * y + 8)) / 2
        torch.testing.assert_close(corners[1, t].mean(0), centre)
    assert small(attention=False).corners(small(attention=False).generate(2)) is None


@pytest.mark.parametrize("size", [(28, 28), (12, 30)])
def test_a_fresh_network_looks_and_writes_all_over_the_image(size):
    network, side = DRAW(size=size, width=4), max(size)
    read, write = network.aim.bias.detach()[None].split(5, 1)
    classifier = DifferentiableGlimpseClassifier(size=size)
    aims = [(network.reader, read), (network.writer, write), (classifier.sensor, classifier.aim.bias.detach()[None])]
    for sensor, window in aims:
        left, top, right, bottom = sensor.corners(window, size)[0, 0, ::2].flatten().tolist()
        assert (right - left, bottom - top) == pytest.approx((side, side))
        assert (left + right, top + bottom) == pytest.approx((size[1], size[0]))
    (written,) = network.writer.write(torch.ones(1, 1, 5, 5), write, size)[0]
    assert written.min() > 0.4
    assert size[0] < size[1] or written[5:-5, 5:-5].sub(1).abs().max() < 0.3


def test_without_attention_the_whole_image_is_read_and_written():
    network = small(attention=False)
    assert (network.image.in_features, network.encoder.gates.in_features) == (88, 88 + 2 * 6)
    assert network.stroke.out_features == 88
    x = torch.rand(1, 1, 8, 11, requires_grad=True)
    network(x).divergences[:, 0].sum().backward()
    assert (x.grad != 0).all()  # the first step sees every pixel


def test_samples_do_not_mix():
    network, x = small(), torch.rand(3, 1, 8, 11)
    other = torch.cat((x[:2], torch.rand(1, 1, 8, 11)))
    drawn = []
    for images in (x, other):
        torch.manual_seed(0)
        drawn.append(network(images))
    for name in ("canvas", "divergences", "reads", "writes"):
        first, second = (getattr(each, name) for each in drawn)
        torch.testing.assert_close(first[:2], second[:2])
    assert (drawn[0].canvas[2] - drawn[1].canvas[2]).abs().max() > 1e-3


@OPTIONS
def test_every_parameter_has_a_gradient(options):
    network = small(**options)
    drawing = network(torch.rand(2, options.get("in_chans", 1), 8, 11))
    (drawing.canvas.square().sum() + drawing.divergences.sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_divergence_is_zero_for_the_standard_normal_only():
    assert divergence(torch.zeros(3, 4), torch.zeros(3, 4)).tolist() == [0, 0, 0]
    mean, log_spread = torch.randn(2, 5000, 3, dtype=torch.float64)
    assert (divergence(mean, log_spread) > 0).all()
    q = torch.distributions.Normal(mean, log_spread.exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(divergence(mean, log_spread), expected)
    assert divergence(torch.zeros(1, 1), torch.full((1, 1), 1e-4)) > 0  # not lost in rounding


def test_windows_and_canvas_stay_fine_in_bfloat16():
    network, x = small(), torch.rand(2, 1, 8, 11)
    torch.manual_seed(0)
    expected = network(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        drawing = network(x)
    drawing.canvas.sum().backward()
    for name in ("canvas", "divergences", "reads", "writes"):
        assert getattr(drawing, name).dtype == torch.float32
        torch.testing.assert_close(getattr(drawing, name), getattr(expected, name), rtol=0.1, atol=0.1)
    low = small().bfloat16()
    assert low(x.bfloat16()).canvas.isfinite().all()
    assert low.generate(2).writes.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"attention": False}], ids=["attention", "whole images"])
def test_compiles_without_a_break(options, unchecked):
    network, x = small(steps=2, **options), torch.rand(2, 1, 8, 11)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    expected = network(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x).canvas, expected.canvas, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"attention": False, "in_chans": 3}])
def test_saves_and_loads(options, tmp_path):
    network = small(**options).eval()
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert type(again) is DRAW
    assert again.arguments == network.arguments
    drawn = []
    for each in (network, again):
        torch.manual_seed(0)
        drawn.append(each.generate(2).canvas)
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(small, steps=0), "steps must be at least 1, got 0"),
        (partial(small, in_chans=0), "in_chans must be at least 1, got 0"),
        (partial(small, width=0), "width must be at least 1, got 0"),
        (partial(small, latent=0), "latent must be at least 1, got 0"),
        (partial(small, read=1), "read must be at least 2, got 1"),
        (partial(small, write=9), "size must be at least 9, as high and wide as write, got 8 × 11"),
        (lambda: small()(torch.rand(2, 1, 9, 11)), r"images must be of \(1, 8, 11\), got \(1, 9, 11\)"),
        (lambda: small().generate(0), "count must be at least 1, got 0"),
        (lambda: small().generate(2, steps=0), "steps must be at least 1, got 0"),
    ],
)
def test_says_what_cannot_be(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


# --- its window as a classifier ---------------------------------------------------------------------------------------


class Looked(Loops):
    def __call__(self, image, glimpses):
        h, c = self.weights["memory.state_bias"]
        windows, states = [], []
        for _ in range(glimpses):
            windows.append(self.linear("aim", h))
            h, c = self.lstm("memory", self.read(image, windows[-1], FEW["patch"]).ravel(), h, c)
            states.append(h)
        return windows, states


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("readout", ["last", "mean", "attention"])
def test_looks_as_the_paper_written_as_loops(channels, readout):
    network = few(in_chans=channels, readout=readout).double()
    x = torch.rand(2, channels, 14, 11, dtype=torch.float64)
    rollout = network.rollout(x)
    loops = Looked(network)
    for m, image in enumerate(x.numpy()):
        windows, states = loops(image, 3)
        torch.testing.assert_close(rollout.locations[m], torch.tensor(np.array(windows)))
        for t in range(3):
            scores = np.array([loops.linear("score", h)[0] if readout == "attention" else 0.0 for h in states[: t + 1]])
            if readout == "last":
                scores[:-1] = -np.inf
            odds = np.exp(scores) / np.exp(scores).sum()
            read = sum(odd * state for odd, state in zip(odds, states, strict=False))
            torch.testing.assert_close(rollout.logits[m, t], torch.tensor(loops.linear("classifier", read)))
        torch.testing.assert_close(rollout.weights[m], torch.tensor(odds))
    torch.testing.assert_close(network(x), rollout.logits[:, -1])


def test_nothing_is_drawn_by_chance():
    network, x = few(), torch.rand(2, 1, 14, 11)
    rollout = network.rollout(x, rollouts=3)
    assert rollout.log_probs.shape == rollout.entropies.shape == rollout.baselines.shape == (6, 0)
    assert rollout.halting is None
    torch.testing.assert_close(rollout.logits, network.rollout(x.repeat_interleave(3, 0), policy="mean").logits)
    assert torch.equal(network(x), network(x))
    assert not network.begins_anywhere
    assert not network.informed


def test_the_gradient_of_the_logits_teaches_where_to_look():
    network = few(readout="attention")
    network(torch.rand(2, 1, 14, 11)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ([[0.0, 1.5], [0.0, 0.0]], r"first must lie in \[-1, 1\], got \[0.0, 1.5\] first, in 1 rows"),
        ([[0.0, 0.0], [math.nan, 0.0]], r"first must lie in \[-1, 1\], got \[nan, 0.0\] first, in 1 rows"),
        ([[0.0] * 3] * 2, "first must be 2 numbers for each roll-out, got 3"),
    ],
)
def test_refuses_first_locations_that_are_none(first, message, unchecked):
    with pytest.raises(ValueError, match=message):
        few().rollout(torch.rand(2, 1, 14, 11), first=torch.tensor(first))


def test_refuses_images_smaller_than_a_patch():
    patch = FEW["patch"]
    with pytest.raises(ValueError, match=f"images must be at least {patch}, as high and wide as patch, got 2 × 11"):
        few()(torch.rand(2, 1, 2, 11))


def test_controls_have_centres_of_their_own():
    network, x = few(), torch.rand(200, 1, 14, 11)
    told = network.rollout(x[:1]).locations[0, 0]
    centred = network.rollout(x, policy="centre").locations
    assert not centred[..., :2].any()
    torch.testing.assert_close(centred[:, 0, 2:], told[2:].expand(200, -1))
    where = network.rollout(x, policy="random").locations[..., :2]
    assert where.abs().max() <= 1
    torch.testing.assert_close(where.std((0, 2)), torch.full((3,), 3**-0.5), rtol=0, atol=0.06)
    first = 2 * torch.rand(400, 2) - 1
    begun = network.rollout(x, rollouts=2, first=first).locations
    torch.testing.assert_close(begun[:, 0, :2], first)
    torch.testing.assert_close(begun[:, 0, 2:], told[2:].expand(400, -1))


def test_samples_that_are_looked_at_do_not_mix():
    network, x = few().eval(), torch.rand(3, 1, 14, 11)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]))


def test_a_timm_model_reads_patches():
    network, x = few(encoder="test_resnet", size=(40, 50), patch=32, in_chans=3), torch.rand(2, 3, 40, 50)
    assert network.memory.gates.in_features == 96 + 6
    network(x).sum().backward()
    assert network.encoder.conv1[0].weight.grad.any()
    assert "pretrained" not in few(encoder="test_resnet", encoder_args={"drop_rate": 0.1}).arguments


@pytest.mark.parametrize("options", [{"readout": "attention"}, {"encoder": "test_resnet", "num_classes": 4}])
def test_a_classifier_saves_and_loads(options, tmp_path):
    network, x = few(**options).eval(), torch.rand(2, 1, 14, 11)
    again = visattn.load(visattn.save(network, tmp_path / "saved"))
    assert torch.equal(again(x), network(x))
    assert again.num_classes == options.get("num_classes", 10)


@pytest.mark.slow
def test_a_classifier_compiles_without_a_break_and_exports(unchecked):
    network, x = few(readout="attention").eval(), torch.rand(2, 1, 14, 11)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-4)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False).module()
    other = torch.rand(5, 1, 14, 11)
    torch.testing.assert_close(program(other), network(other), rtol=1e-4, atol=1e-4)


def test_a_classifier_is_fine_in_bfloat16():
    network, x = few(readout="attention"), torch.rand(2, 1, 14, 11)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = network.rollout(x)
    assert rollout.locations.dtype == rollout.weights.dtype == torch.float32
    torch.testing.assert_close(rollout.logits.float(), network.rollout(x).logits, rtol=0.05, atol=0.05)
    assert few().bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(few, glimpses=0), "glimpses must be at least 1, got 0"),
        (partial(few, num_classes=0), "num_classes must be at least 1, got 0"),
        (partial(few, patch=1), "patch must be at least 2, got 1"),
        (partial(few, patch=12), "size must be at least 12, as high and wide as patch, got 14 × 11"),
        (partial(few, readout="max"), "readout must be last or mean or attention, got 'max'"),
        (partial(few, pretrained=True), "pretrained and encoder_args must be left out without an encoder"),
        (partial(few, encoder="resnt18"), "encoder must be the name of a timm model, got 'resnt18'; close: resnet18"),
        (lambda: looked(rollouts=0), "rollouts must be at least 1, got 0"),
        (lambda: looked(policy="greedy"), "policy must be sample or mean or random or centre, got 'greedy'"),
        (lambda: looked(first=torch.zeros(3, 2)), "first must be a location for each of 2 roll-outs, got 3"),
        (lambda: looked(answer=torch.zeros(2).long()), "answer must be None: nothing that is told it draws actions"),
    ],
)
def test_says_how_it_cannot_look(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


def looked(**options):
    return few().rollout(torch.rand(2, 1, 14, 11), **options)
