from functools import partial

import pytest
import timm
import torch

import visattn
from visattn import CBAM, AttentionPool, HardAttention, ImpatientReader, MultiHeadAttention, NonLocal, SpatialGate
from visattn.explain import replaced

MODULES = [SpatialGate(8), CBAM(8, reduction=2), NonLocal(8), AttentionPool(8, query="learned", heads=2)]
MEMORIES = [MultiHeadAttention(8, 6, heads=2), HardAttention(8, 6), ImpatientReader(8, 6)]


def same(own):
    return own


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_its_own_weights_change_nothing_and_others_are_read_with(module):
    module, x = module.eval(), torch.randn(2, 8, 4, 5)
    expected = module(x)
    weights = module.attend(torch.randn(2, 8, 4, 5))
    with replaced(module, same):
        torch.testing.assert_close(module(x), expected)
    with replaced(module, lambda own: weights):
        torch.testing.assert_close(module(x), module.read(x, weights=weights))
    torch.testing.assert_close(module(x), expected)
    assert not {"attend", "forward"} & set(vars(module))


@pytest.mark.parametrize("module", MEMORIES, ids=lambda module: type(module).__name__)
def test_a_memory_is_read_with_others_and_remembers_its_own(module):
    module, query = module.eval(), torch.randn(2, 3, 8)
    prepared = module.prepare(torch.randn(2, 5, 6))
    expected, after = module(query, prepared)
    weights, _ = module.attend(torch.randn(2, 3, 8), prepared)
    with replaced(module, same):
        torch.testing.assert_close(module(query, prepared)[0], expected)
    with replaced(module, lambda own: weights):
        read, state = module(query, prepared)
    torch.testing.assert_close(read, module.read(query, prepared, weights=weights))
    assert (read - expected).abs().max() > 1e-3
    torch.testing.assert_close(state, after)


def test_one_may_stand_within_another_and_an_error_leaves_nothing_behind():
    gate, x = SpatialGate(8).eval(), torch.randn(1, 8, 4, 4)
    with replaced(gate, torch.zeros_like):
        with replaced(gate, lambda own: own + 1):
            torch.testing.assert_close(gate(x), x)
        assert not gate(x).any()
    with pytest.raises(RuntimeError, match="no"), replaced(gate, torch.zeros_like):
        raise RuntimeError("no")
    assert gate(x).any()


@pytest.mark.parametrize("gate", [None, "identity"])
def test_within_a_backbone_the_changed_weights_are_read_and_recorded(gate):
    model = timm.create_model("test_resnet")
    visattn.insert(model, partial(CBAM, reduction=4), at="head", gate=gate).eval()
    (inserted,) = visattn.insertions(model)
    if inserted.gate is not None:
        torch.nn.init.ones_(inserted.gate)
    x = torch.randn(1, 3, 64, 64)
    zeros = partial(torch.utils._pytree.tree_map, torch.zeros_like)
    with torch.no_grad(), visattn.record(model) as maps, replaced(inserted.attention, zeros):
        replaced_logits = model(x)
    (recorded,) = maps.values()
    assert not recorded.spatial.any()
    torch.testing.assert_close(replaced_logits, model.get_classifier().bias[None].detach())  # of nothing
