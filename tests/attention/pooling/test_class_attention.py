import pytest
import torch
from timm.models.cait import LayerScaleBlockClassAttn
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import ClassAttention


def parameters(c: int) -> int:
    return c + 2 * (4 * c * c + 3 * c + 8 * c * c + 5 * c + 4 * c + 2 * c) + 2 * c


CASES = [
    Case(
        ClassAttention,
        {},
        parameters,
        (100_288, 1_580_800),
        # all layers are applied to one vector; eight heads read 36 tokens, twice
        macs=lambda c, h, w: 2 * (4 * c * c + 2 * 8 * (h * w + 1) * c + 8 * c * c),
        sums_to_one=-1,
        small=8,
    ),
    Case(
        ClassAttention,
        {"heads": 2, "layers": 1, "scale": 1.0},
        lambda c: (parameters(c) - 3 * c) // 2 + 3 * c,
        (50_240, 790_784),
        macs=lambda c, h, w: 4 * c * c + 2 * 2 * (h * w + 1) * c + 8 * c * c,
        sums_to_one=-1,
        small=8,
    ),
]


def lively(layers: int = 2) -> ClassAttention:
    module = ClassAttention(16, heads=4, layers=layers).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def paper(module: ClassAttention, x: Tensor) -> Tensor:
    """Section 3.2 of the paper by torch's multi-head attention, layer by layer."""
    token, positions = module.token.expand(len(x), -1), x.flatten(2).mT
    for layer in module.layers:
        part, heads = layer.attention, nn.MultiheadAttention(16, 4, batch_first=True).double()
        with torch.no_grad():
            heads.in_proj_weight.copy_(torch.cat((part.query.weight, part.key.weight, part.value.weight)))
            heads.in_proj_bias.copy_(torch.cat((part.query.bias, torch.ones(16), part.value.bias)))
            heads.out_proj.load_state_dict(part.out.state_dict())
        tokens = layer.norm(torch.cat((token[:, None], positions), 1))
        token = token + layer.scale * heads(tokens[:, :1], tokens, tokens)[0][:, 0]
        token = token + layer.mlp_scale * layer.mlp(layer.mlp_norm(token))
    return module.norm(token)


def test_equals_the_paper():
    module, x = lively(), torch.randn(2, 16, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-11)


def test_a_layer_equals_that_of_timm():
    module, x = lively(1), torch.randn(2, 16, 3, 5, dtype=torch.double)
    theirs, (ours,) = LayerScaleBlockClassAttn(16, 4, qkv_bias=True, init_values=1.0).double(), module.layers
    theirs.norm1.load_state_dict(ours.norm.state_dict())
    theirs.norm2.load_state_dict(ours.mlp_norm.state_dict())
    for theirs_name, our_layer in (("q", "query"), ("k", "key"), ("v", "value"), ("proj", "out")):
        getattr(theirs.attn, theirs_name).load_state_dict(
            getattr(ours.attention, our_layer).state_dict(), strict=our_layer != "key"
        )
    theirs.mlp.fc1.load_state_dict(ours.mlp[0].state_dict())
    theirs.mlp.fc2.load_state_dict(ours.mlp[2].state_dict())
    with torch.no_grad():
        theirs.gamma_1.copy_(ours.scale)
        theirs.gamma_2.copy_(ours.mlp_scale)
    token = theirs(x.flatten(2).mT, module.token.expand(2, 1, -1))[:, 0]
    torch.testing.assert_close(module(x), module.norm(token), rtol=1e-5, atol=1e-6)  # norms differ in their epsilon


def test_does_not_see_where_things_are_but_which_channel_is_which():
    module, x = lively(), torch.randn(2, 16, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x.flip(2, 3)), module(x), rtol=0, atol=1e-11)
    assert not torch.allclose(module(x.flip(1)), module(x))


def test_heads_of_the_layers_stand_one_after_the_other():
    x = torch.randn(2, 16, 3, 5, dtype=torch.double)
    assert lively(3).attend(x).shape == (2, 12, 1, 16)
    module = lively(2)
    first = ClassAttention(16, heads=4, layers=1).double()
    first.load_state_dict(module.state_dict(), strict=False)
    torch.testing.assert_close(module.attend(x)[:, :4], first.attend(x))


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="heads must divide channels=64, got 7"):
        ClassAttention(64, heads=7)
    with pytest.raises(ValueError, match="layers must be positive, got 0"):
        ClassAttention(64, layers=0)
