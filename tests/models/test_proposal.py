import pytest
import torch

from visattn.models.proposal import Proposal, draw


def test_knows_the_whole_caption_and_nothing_after_it():
    proposal, memory = Proposal(20, 6, hidden=8).double(), torch.randn(2, 9, 6, dtype=torch.double)
    words, lengths = torch.randint(20, (2, 3, 5)), torch.tensor([[5, 3, 1], [2, 4, 5]])
    before = proposal(memory, words, lengths)
    torch.testing.assert_close(before.exp().sum(-1), torch.ones(2, 3, 5, dtype=torch.double))
    changed = words.clone()
    changed[0, 1, 3:] += 1  # after its end
    torch.testing.assert_close(proposal(memory, changed % 20, lengths)[0, 1, :3], before[0, 1, :3])
    changed = words.clone()
    changed[0, 0, 4] += 1  # its last word
    assert (proposal(memory, changed % 20, lengths)[0, 0, 0] != before[0, 0, 0]).all()
    torch.testing.assert_close(proposal(memory[1:], words[1:, 1:2], lengths[1:, 1:2])[0, 0, :4], before[1, 1, :4])


def test_draws_are_as_likely_as_they_are_said_to_be():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.1, 0.2, 0.7])
    drawn = draw(probabilities.log().expand(20_000, -1))
    torch.testing.assert_close(drawn.bincount(minlength=3) / 20_000, probabilities, rtol=0, atol=0.02)


def test_refuses_no_units():
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        Proposal(20, 6, hidden=0)
