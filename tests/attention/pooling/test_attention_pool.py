import math

import pytest
import torch
from timm.layers import AttentionPool2d
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import AttentionPool

CASES = [
    Case(
        AttentionPool,
        {"size": (5, 7)},
        lambda c: 36 * c + 4 * c * c + 3 * c,
        (18_880, 272_128),
        # query, keys, values and out are each applied to one vector; eight heads read 36 tokens
        macs=lambda c, h, w: 4 * c * c + 2 * 8 * (h * w + 1) * c,
        sums_to_one=-1,
    ),
    Case(
        AttentionPool,
        {"query": "learned", "heads": 4, "out_channels": 32},
        lambda c: c + 3 * c * c + 2 * c + 32 * c + 32,
        (14_560, 205_600),
        macs=lambda c, h, w: 3 * c * c + 32 * c + 2 * 4 * h * w * c,
        sums_to_one=-1,
    ),
]


def lively(**options) -> AttentionPool:
    module = AttentionPool(8, heads=2, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def asked(module: AttentionPool, query: Tensor, tokens: list[Tensor]) -> Tensor:
    """Multi-head attention of one query as it is written: a key and a value for every token."""
    part, heads = module.attention, []
    q = part.query.weight @ query + part.query.bias
    for head in (slice(0, 4), slice(4, 8)):
        keys = [(part.key.weight @ t)[head] for t in tokens]
        values = [(part.value.weight @ t + part.value.bias)[head] for t in tokens]
        s = [math.exp(q[head] @ k / 2) for k in keys]
        heads.append(sum(e / sum(s) * v for e, v in zip(s, values, strict=True)))
    return part.out.weight @ torch.cat(heads) + part.out.bias


@pytest.mark.parametrize("query", ["mean", "learned", "recurrent"])
@torch.no_grad()
def test_equals_the_paper_in_loops(query):
    options = {"mean": {"size": (3, 5)}, "learned": {}, "recurrent": {"stages": (3, 6)}}[query]
    module, x = lively(query=query, **options), torch.randn(2, 8, 3, 5, dtype=torch.double)
    stages = [torch.randn(2, c, 6, 10, dtype=torch.double) for c in options.get("stages", ())]
    y = module(x, *stages)
    for b in range(2):
        tokens = [x[b, :, i, j] for i in range(3) for j in range(5)]
        if query == "mean":
            tokens = [sum(tokens) / 15, *tokens]
            tokens = [token + p for token, p in zip(tokens, module.position, strict=True)]
            q = tokens[0]
        elif query == "learned":
            q = module.latent[0]
        else:
            h, c = torch.zeros(8).double(), torch.zeros(8).double()
            lstm = module.memory
            for step, stage in zip(module.steps, stages, strict=True):
                v = step.weight @ stage[b].mean((1, 2)) + step.bias
                gates = lstm.weight_ih @ v + lstm.bias_ih + lstm.weight_hh @ h + lstm.bias_hh
                i, f, g, o = gates.chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            q = h
        torch.testing.assert_close(y[b], asked(module, q, tokens), rtol=0, atol=1e-11)
    close = module.read(x, *stages, weights=module.attend(x, *stages))
    torch.testing.assert_close(y, close, rtol=0, atol=1e-12)


def test_equals_timm_after_copying_weights():
    theirs = AttentionPool2d(64, feat_size=(5, 7), num_heads=8).double()
    ours = AttentionPool(64, heads=8, size=(5, 7)).double()
    q, k, v = theirs.qkv.weight.chunk(3)
    bias_q, _, bias_v = theirs.qkv.bias.chunk(3)  # that of the keys changes nothing
    nn.init.normal_(theirs.qkv.bias)
    with torch.no_grad():
        ours.position.copy_(theirs.pos_embed)
        for layer, weight, bias in (("query", q, bias_q), ("value", v, bias_v)):
            getattr(ours.attention, layer).weight.copy_(weight)
            getattr(ours.attention, layer).bias.copy_(bias)
        ours.attention.key.weight.copy_(k)
        ours.attention.out.load_state_dict(theirs.proj.state_dict())
    x = torch.randn(2, 64, 5, 7, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs(x))


def test_positions_are_what_sees_where_things_are():
    x, order = torch.randn(2, 8, 3, 5, dtype=torch.double), torch.randperm(15)
    shuffled = x.flatten(2)[..., order].view_as(x)
    learned, mean = lively(query="learned"), lively(size=(3, 5))
    torch.testing.assert_close(learned(shuffled), learned(x), rtol=0, atol=1e-12)
    assert not torch.allclose(mean(shuffled), mean(x))
    before = mean(x)
    with torch.no_grad():
        mean.position[1:] = mean.position[1:][order].clone()  # and moves with the positions
    torch.testing.assert_close(mean(shuffled), before, rtol=0, atol=1e-12)


def test_equal_weights_read_the_mean():
    module, x = lively(query="learned"), torch.randn(2, 8, 3, 5, dtype=torch.double)
    nn.init.zeros_(module.attention.query.weight)
    nn.init.zeros_(module.attention.query.bias)
    part = module.attention
    torch.testing.assert_close(module(x), part.out(part.value(x.mean((2, 3)))))


def test_the_recurrent_query_depends_on_the_image_and_on_the_order_of_the_stages():
    module, x = lively(query="recurrent", stages=(4, 4)), torch.randn(2, 8, 3, 5, dtype=torch.double)
    one, other = torch.randn(2, 2, 4, 6, 10, dtype=torch.double)
    assert not torch.allclose(module.attend(x, one, other), module.attend(x, other, one))
    assert not torch.allclose(module.attend(x, one, other), module.attend(x, one + 1, other))


def test_says_what_does_not_fit(unchecked):
    with pytest.raises(ValueError, match="query must be learned, mean or recurrent, got 'cls'"):
        AttentionPool(64, query="cls")
    with pytest.raises(ValueError, match="heads must divide channels=64, got 7"):
        AttentionPool(64, query="learned", heads=7)
    with pytest.raises(ValueError, match="stages must be given with query='recurrent' and only then, got \\(\\)"):
        AttentionPool(64, query="recurrent")
    with pytest.raises(ValueError, match="stages must be given with query='recurrent' and only then, got \\(3,\\)"):
        AttentionPool(64, query="learned", stages=(3,))
    with pytest.raises(ValueError, match="stages must be 2 maps before the last, got 1"):
        lively(query="recurrent", stages=(3, 6))(torch.randn(1, 8, 3, 5).double(), torch.randn(1, 3, 6, 6).double())
    with pytest.raises(ValueError, match=r"size must be that of the map, \(3, 5\), got \(4, 5\)"):
        lively(size=(3, 5))(torch.randn(1, 8, 4, 5).double())
