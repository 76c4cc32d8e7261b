import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import visattn
from visattn.models import SiameseNetwork

SCHEMES = [None, "ABCNN-1", "ABCNN-2", "ABCNN-3"]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def images(batch: int = 3, *, channels: int = 1, size: tuple[int, int] = (12, 16)) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(batch, channels, *size, dtype=torch.double) for _ in range(2))


def small(scheme: str | None = None, **options) -> SiameseNetwork:
    options = {"in_chans": 1, "size": (12, 16), "width": 6, **options}
    return SiameseNetwork(attention=scheme, **options).double().eval()


def match(x: Tensor, y: Tensor) -> Tensor:
    return 1 / (1 + torch.stack([(x.flatten(1)[:, i, None] - y.flatten(1)).norm(dim=0) for i in range(x[0].numel())]))


def paper(network: SiameseNetwork, x: Tensor, y: Tensor, scheme: str | None) -> Tensor:
    """Sections 3 and 4 of the paper for one pair, in windows of two axes."""

    def cosine() -> Tensor:
        u, v = (each.mean((1, 2)) for each in (x, y))
        return u @ v / (u.norm() * v.norm())

    for layer in network.stem[::2]:
        x, y = (F.conv2d(each, layer.weight, layer.bias, 2, 1).tanh() for each in (x, y))
    similar = [cosine()]
    for level in network.levels:
        w = level.conv.kernel_size[0]
        if scheme in ("ABCNN-1", "ABCNN-3"):
            a, vectors = match(x, y), level.planes.values[0]
            planes = (vectors @ a.T).view_as(x), (vectors @ a).view_as(y)
            x, y = torch.cat((x, planes[0])), torch.cat((y, planes[1]))
        x, y = (F.conv2d(F.pad(each, (w - 1,) * 4), level.conv.weight, level.conv.bias).tanh() for each in (x, y))
        strengths = torch.full_like(x[0], 1 / w**2), torch.full_like(y[0], 1 / w**2)
        if scheme in ("ABCNN-2", "ABCNN-3"):
            a = match(x, y)
            strengths = a.sum(1).view_as(x[0]), a.sum(0).view_as(y[0])
        x, y = (
            sum(weighted[:, p : p + weighted.shape[1] - w + 1, q : q + weighted.shape[2] - w + 1]
                for p in range(w) for q in range(w))
            for weighted in (x * strengths[0], y * strengths[1])
        )  # fmt: skip
        similar.append(cosine())
    return network.head.weight[0] @ torch.stack(similar) + network.head.bias[0]


@every_scheme
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_equals_the_paper(scheme, kernel_size):
    network, (x, y) = small(scheme, kernel_size=kernel_size), images()
    with torch.no_grad():
        expected = torch.stack([paper(network, *pair, scheme) for pair in zip(x, y, strict=True)])
        torch.testing.assert_close(network(x, y), expected, rtol=0, atol=1e-12)


@every_scheme
def test_swapping_the_images_changes_nothing(scheme):
    network, (x, y) = small(scheme), images()
    torch.testing.assert_close(network(y, x), network(x, y), rtol=0, atol=1e-12)


@every_scheme
def test_pairs_do_not_mix_but_their_images_do_where_there_is_attention(scheme):
    network, (x, y) = small(scheme), images()
    alone = torch.cat([network(*pair) for pair in zip(x.split(1), y.split(1), strict=True)])
    torch.testing.assert_close(network(x, y), alone, rtol=0, atol=1e-12)
    maps = {}
    hook = network.levels[0].register_forward_hook(lambda module, args, output: maps.update(x=output[0]))
    network(x, y)
    before = maps["x"]
    network(x, y.flip(2))
    hook.remove()
    assert torch.equal(maps["x"], before) == (scheme is None)


@every_scheme
def test_a_fresh_network_takes_likeness_for_a_sign_of_one_kind(scheme):
    network, (x, y) = small(scheme), images()
    torch.testing.assert_close(network(x, x), torch.zeros(3, dtype=torch.double), rtol=0, atol=1e-12)
    assert (network(x, y) < 0).all()


@every_scheme
@pytest.mark.parametrize("normalized", [False, True])
def test_an_image_is_like_itself_and_every_parameter_learns(scheme, normalized):
    network, (x, y) = small(scheme, normalized=normalized), images()
    with torch.no_grad():
        network.head.weight.copy_(torch.tensor([[0.3, -0.2, 0.5]]))
        torch.testing.assert_close(network(x, x), (0.6 + network.head.bias).expand(3))  # all cosines are one
    network(x, y).square().sum().backward()
    assert all(p.grad.any() for p in network.parameters())


def test_the_counts_of_parameters_are_those_of_the_formulas():
    stem, head = 9 * 50 + 50 + 9 * 50 * 50 + 50, 4
    plain, seen = 50 * 50 * 9 + 50, 2 * 50 * 50 * 9 + 50 + 50 * 49
    expected = [stem + head + 2 * each for each in (plain, seen, plain, seen)]
    networks = [SiameseNetwork(in_chans=1, size=(28, 28), attention=scheme) for scheme in SCHEMES]
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == expected


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext"])
def test_compares_by_any_backbone(backbone):
    args = {"img_size": 64} if backbone == "test_vit" else None
    network = SiameseNetwork(backbone, backbone_args=args, size=(64, 64), stage=-2, attention="ABCNN-3").eval()
    x, y = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    logits = network(x, y)
    assert logits.shape == (2,)
    torch.testing.assert_close(network(y, x), logits)
    assert network.levels[0].planes.arguments["size"] == (4, 4)


def test_records_where_the_images_match():
    network, (x, y) = small("ABCNN-3"), images()
    with visattn.record(network) as maps:
        network(x, y)
    assert {name: tuple(weights.shape) for name, weights in maps.items()} == {
        f"levels.{k}.{which}": (3, n, n)
        for k in range(2)
        for which, n in (("planes/MatchingAttention", 12), ("pool/MatchingPool", 30))
    }


@every_scheme
def test_copies_give_the_same(scheme):
    network, (x, y) = small(scheme), images()
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(x, y), network(x, y))
        assert twin.arguments == network.arguments


def test_is_saved_and_loaded_ready_for_use(tmp_path):
    network = SiameseNetwork("test_resnet", size=(32, 48), attention="ABCNN-2", kernel_size=2, normalized=True).train()
    x, y = torch.randn(2, 3, 32, 48), torch.randn(2, 3, 32, 48)
    again = visattn.load(visattn.save(network, tmp_path / "mine", labels=["different", "same"], task="verification"))
    assert not again.training
    assert again.labels == ["different", "same"]
    assert torch.equal(again(x, y), network.eval()(x, y))


def test_one_with_trained_weights_is_built_again_without(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **kwargs: asked.append(args))
    network = SiameseNetwork("test_resnet.r160_in1k", pretrained=True, size=(32, 32))
    assert len(asked) == 1
    visattn.load(visattn.save(network, tmp_path / "mine"))
    assert len(asked) == 1


@pytest.mark.slow
def test_compiles_without_a_break(unchecked):
    network, (x, y) = small("ABCNN-3"), images()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), network(x, y), rtol=0, atol=1e-12)


def test_refuses_an_unknown_scheme(unchecked):
    with pytest.raises(ValueError, match="attention must be None, ABCNN-1, ABCNN-2 or ABCNN-3, got 'ABCNN'"):
        SiameseNetwork(attention="ABCNN")


@pytest.mark.parametrize("name", ["width", "kernel_size", "levels"])
def test_refuses_what_is_not_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        SiameseNetwork(**{name: 0})


@pytest.mark.parametrize("scheme", ["ABCNN-1", "ABCNN-3"])
def test_refuses_images_of_another_size_where_vectors_are_learned(scheme):
    with pytest.raises(ValueError, match=r"size must be \(3, 4\), as given, got \(4, 4\)"):
        small(scheme)(*images(size=(16, 16)))
