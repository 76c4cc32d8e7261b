"""What parallel decoders do with attention that picks."""

from functools import partial

import pytest
import torch

from tests.models.decoders.case import MEMORY, REGIONS, SIZE, VOCABULARY, memory, sentences, step_by_step
from visattn.attention import AdditiveAttention, HardAttention, MultiHeadAttention
from visattn.attention.memory.hard import HardWeights
from visattn.models.decoders import ConvolutionalDecoder, DilatedDecoder, FeedForwardDecoder, TransformerDecoder

DECODERS = {
    "transformer": partial(TransformerDecoder, width=8, heads=2, depth=2, dropout=0.0),
    "one layer": partial(TransformerDecoder, width=8, heads=2, depth=1, dropout=0.0),
    "one of all": partial(TransformerDecoder, width=8, heads=2, depth=1, dropout=0.0, maps="all"),
    "convolutional": partial(ConvolutionalDecoder, width=5, embedding=8, depth=3, kernel_size=2, dropout=0.0),
    "dilated": partial(DilatedDecoder, width=8, dilations=(1, 2), dropout=0.0),
    "feed-forward": partial(FeedForwardDecoder, context=2, embedding=4, hidden=5),
}
LAYERS = {"transformer": (2,), "one layer": (), "one of all": (1,), "convolutional": (3,), "dilated": (2,)}
HEADS = {"heads": partial(MultiHeadAttention, heads=2), "one": partial(AdditiveAttention, width=4)}
every_decoder = pytest.mark.parametrize("name", DECODERS)
every_attention = pytest.mark.parametrize("inner", HEADS)


def built(name: str, inner: str):
    attention = partial(HardAttention, attention=HEADS[inner], expected=0.0)
    return DECODERS[name](VOCABULARY, MEMORY, attention=attention).double()


@every_decoder
@every_attention
def test_all_layers_that_pick_say_where_while_they_learn(name, inner):
    decoder, words = built(name, inner).train(), sentences()
    prepared = decoder.prepare(memory(), None, SIZE)
    shape = (2, 3, 5, *LAYERS.get(name, ()), *([2] if inner == "heads" else []), REGIONS)
    for maps in (decoder(prepared, words).maps, step_by_step(decoder, prepared, words).maps):
        assert isinstance(maps, HardWeights)
        assert maps.weights.shape == maps.probabilities.shape == shape
    maps = decoder.eval()(decoder.prepare(memory(), None, SIZE), words).maps
    told = shape if decoder.maps == "all" else (*shape[:3], *shape[3 + len(LAYERS.get(name, ())) :])
    assert maps.weights.shape == told


@every_decoder
@every_attention
def test_what_was_picked_step_by_step_is_read_again_at_once(name, inner):
    decoder, words = built(name, inner).train(), sentences()
    prepared = decoder.prepare(memory(), None, SIZE)
    before = step_by_step(decoder, prepared, words)
    again = decoder(prepared, words, None, before.maps.choice)
    torch.testing.assert_close(again.features, before.features, rtol=0, atol=1e-11)
    assert torch.equal(again.maps.weights, before.maps.weights)
    torch.testing.assert_close(again.maps.probabilities, before.maps.probabilities, rtol=0, atol=1e-11)
    assert not torch.equal(decoder(prepared, words).maps.weights, before.maps.weights)


def test_refuses_a_choice_for_attention_that_does_not_pick():
    decoder = TransformerDecoder(VOCABULARY, MEMORY, width=8, heads=2, depth=1)
    with pytest.raises(ValueError, match="choice must be None for MultiHeadAttention, which does not pick"):
        decoder(decoder.prepare(memory(dtype=torch.float)), sentences(), None, torch.zeros(2, 3, 5, 8).long())
