import pytest
import torch
from torch import Tensor

from tests.attention.memory.case import MEMORY, QUERY, REGIONS, SIZE, MemoryCase, memory, queries, small
from visattn.attention import ConvolutionalSummary, CoverageAttention, SmoothedAttention

GATES = 2 * 5 * 4 + 4 * 5  # both perceptrons, but for what they make of the query

CASES = [
    MemoryCase(
        ConvolutionalSummary,
        {"width": 4, "attention": small},
        lambda q, d: 4 * (9 * d + 1) + 10 * q + GATES + 4 * 5,
        51_284,
        ordered=True,
    ),
    MemoryCase(
        ConvolutionalSummary,
        {"width": 4, "window": 4, "axes": 1, "kernel_size": 5, "attention": small},
        lambda q, d: 4 * (5 * d + 1) + 10 * q + GATES + 4 * 5,
        30_804,
        ordered=True,
    ),
]


def paper(module: ConvolutionalSummary, held: Tensor, query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Convolution, gates of windows, gate of all, and the layer on top, in loops."""
    height, width = SIZE if module.axes == 2 else (1, REGIONS)
    filters = module.filters.weight if module.axes == 2 else module.filters.weight[:, :, None]
    reach = filters.shape[2] // 2, filters.shape[3] // 2
    units, windows = [], {}
    for i in range(height):
        for j in range(width):
            unit = module.filters.bias.clone()
            for y in range(-reach[0], reach[0] + 1):
                for x in range(-reach[1], reach[1] + 1):
                    if 0 <= i + y < height and 0 <= j + x < width and mask[(i + y) * width + j + x]:
                        unit += filters[:, :, y + reach[0], x + reach[1]] @ held[(i + y) * width + j + x]
            units.append(unit.clamp(min=0))
            if mask[i * width + j]:
                windows.setdefault((i // module.window[0], j // module.window[1]), []).append(i * width + j)

    def gate(attention: torch.nn.Module, items: list[Tensor]) -> Tensor:
        scores = [
            attention.score.weight[0]
            @ (attention.query.weight @ query + attention.key.weight @ item + attention.key.bias).tanh()
            for item in items
        ]
        exponentials = torch.stack(scores).exp()
        return exponentials / exponentials.sum()

    near = {window: gate(module.near, [units[i] for i in regions]) for window, regions in windows.items()}
    sums = [sum(a * units[i] for a, i in zip(near[window], windows[window], strict=True)) for window in windows]
    weights = torch.zeros(REGIONS, dtype=torch.double)
    far = gate(module.far, sums)
    for window, b in zip(windows, far, strict=True):
        weights[windows[window]] = b * near[window]
    summary = sum(b * each for b, each in zip(far, sums, strict=True))
    return weights, (module.out.weight @ summary + module.out.bias).tanh()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_sums_up_as_loops_do(case, masked):
    module, held, (asked, *_) = case.lively(), memory(), queries()
    mask = torch.ones(2, REGIONS, dtype=torch.bool)
    mask[1, [0, 1, 2, 3, 5, 6, 9]] = not masked  # all of the first window, and a part of others
    prepared = module.prepare(held, mask if masked else None, SIZE)
    weights, _ = module.attend(asked, prepared)
    found, _ = module(asked, prepared)
    for b in range(2):
        for r in range(3):
            right, read = paper(module, held[b], asked[b, r], mask[b])
            torch.testing.assert_close(weights[b, r], right, rtol=0, atol=1e-12)
            torch.testing.assert_close(found[b, r], read, rtol=0, atol=1e-12)


def test_moves_with_the_map_by_whole_windows_and_turned_around_it_does_not_read_the_same():
    module, (asked, *_) = CASES[0].lively(), queries()
    held = torch.zeros(2, 8, 10, MEMORY, dtype=torch.double)
    held[:, 2:4, 2:6] = torch.randn(2, 2, 4, MEMORY, dtype=torch.double)
    module.filters.bias.detach().zero_()

    def read(held: Tensor) -> Tensor:
        return module(asked, module.prepare(held.flatten(1, 2), None, (8, 10)))[0]

    found = read(held)
    torch.testing.assert_close(read(held.roll((2, 2), (1, 2))), found, rtol=0, atol=1e-12)
    assert not torch.allclose(read(held.flip(1, 2)), found, rtol=0, atol=1e-3)


def test_takes_values_of_others():
    module = ConvolutionalSummary(QUERY, MEMORY, width=4, attention=SmoothedAttention).double().eval()
    held, (asked, *_) = memory(), queries()
    prepared = module.prepare(held, None, SIZE)
    features = module.filters(held.mT.unflatten(2, SIZE)).relu().flatten(2).mT
    values = module.near.prepare(features, None, SIZE).values  # around each region, on the map
    weights, _ = module.attend(asked, prepared)
    torch.testing.assert_close(module(asked, prepared)[0], module.out(weights @ values).tanh(), rtol=0, atol=1e-12)


def test_the_convolution_is_made_once():
    module = CASES[0].lively()
    made = []
    module.filters.register_forward_hook(lambda *_: made.append(1))
    prepared = module.prepare(memory(), None, SIZE)
    for query in queries(steps=4):
        module(query, prepared)
    assert len(made) == 1


@pytest.mark.parametrize("option", ["width", "window"])
def test_refuses_less_than_one(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        ConvolutionalSummary(QUERY, MEMORY, **{option: 0})


def test_refuses_what_it_does_not_know(unchecked):
    with pytest.raises(ValueError, match="kernel_size must be odd, got 2"):
        ConvolutionalSummary(QUERY, MEMORY, kernel_size=2)
    with pytest.raises(ValueError, match="axes must be 1 or 2, got 3"):
        ConvolutionalSummary(QUERY, MEMORY, axes=3)
    with pytest.raises(ValueError, match="by the softmax of their scores, got CoverageAttention"):
        ConvolutionalSummary(QUERY, MEMORY, attention=CoverageAttention)
