"""Which sentence is said: the likeliest found by a beam, or one by chance; images and beams side by side."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visattn.attention.core import wide
from visattn.models.decoders.core import Decoder, over, stacked
from visattn.models.network import at_least_one

Norm = Literal["power", "gnmt"]


class Sentences(NamedTuple):
    """What was said about images, the best first; or by chance, in no order."""

    words: Int[Tensor, "b n t"]
    """The words; behind the end of a sentence, more of what ends it."""
    lengths: Int[Tensor, "b n"]
    """How many words there are, with the one that ends the sentence, unless it was cut."""
    log_probs: Float[Tensor, "b n"]
    """Log-probability of each sentence."""
    scores: Float[Tensor, "b n"]
    """What they were chosen by: the log-probability, by length as was asked for."""
    maps: Any
    """Where was looked before each word, with the axes ``b n t``; zeros behind the end. None without attention."""


@torch.no_grad()
def beam(
    decoder: Decoder,
    prepared: Any,
    *,
    end: int,
    width: int = 3,
    longest: int = 20,
    shortest: int = 0,
    alpha: float = 0.0,
    norm: Norm = "power",
    groups: int = 1,
    diversity: float = 0.5,
    repeat: bool = True,
    never: Sequence[int] = (),
) -> Sentences:
    r"""Search for the likeliest sentences by keeping the best beginnings, for all images at once.

    A beginning that ends with one of the ``width`` best continuations is finished. What is finished is ranked by
    :math:`\log p / l^\alpha`, or by :math:`\log p / ((5 + l) / 6)^\alpha` with the norm of GNMT (arXiv:1609.08144), and
    the search stops as soon as nothing unfinished can come before the last of ``width`` finished sentences. Sentences
    that reach the greatest length are cut, and ranked as they are. A width of 1, without ``alpha``, is a greedy search.

    Groups of beams (arXiv:1610.02424) choose one after the other: a word that beams of the image in earlier groups have
    chosen at this place, to end with it or to go on, counts less by ``diversity`` for each of them.

    Args:
        decoder: What says sentences.
        prepared: What it made of a memory.
        end: The word that ends a sentence.
        width: How many beginnings are kept, and sentences returned, for an image.
        longest: How many words a sentence has at most, with the one that ends it.
        shortest: How many words it has at least, without the one that ends it.
        alpha: By which power of its length the log-probability of a sentence is divided.
        norm: ``"power"`` or ``"gnmt"``.
        groups: In how many groups the beams are.
        diversity: What a word loses for each choice of it by earlier groups.
        repeat: Whether three words in a row may come again.
        never: Words that are not said, such as one that stands for all that are not known; the others share what they
            have in probability.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> from visattn.models.decoders import ShowAttendAndTell
        >>> decoder = ShowAttendAndTell(100, 32).eval()
        >>> said = beam(decoder, decoder.prepare(torch.randn(2, 49, 32)), end=0, width=3)
        >>> said.words.shape[:2], said.maps.shape[-1]
        (torch.Size([2, 3]), 49)
    """
    check(decoder, end, longest, shortest, never, width=width, groups=groups)
    if width % groups:
        raise ValueError(f"groups must divide width={width}, got {groups}")
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be {' or '.join(get_args(Norm))}, got {norm!r}")
    if alpha < 0 or diversity < 0:
        raise ValueError(f"alpha and diversity must not be negative, got {alpha} and {diversity}")

    def ranked(log_probs: Tensor, length: int) -> Tensor:
        return log_probs / (length if norm == "power" else (5 + length) / 6) ** alpha

    each = width // groups
    features, maps, state = decoder.step(None, prepared, decoder.begin(prepared, 1))
    state, maps = over(lambda x: x.expand(-1, width, *x.shape[2:]), (state, maps))
    logits = decoder.write(features).expand(-1, width, -1)
    images, device = logits.shape[0], logits.device
    live = wide(logits).new_full((images, groups, each), -torch.inf)  # log-probabilities of the beginnings
    live[:, :, 0] = 0.0  # all are the same at first
    done = Finished.none(live)
    history = logits.new_empty((images, width, 0), dtype=torch.long)
    words: list[Tensor] = []
    parents: list[Tensor] = []
    looked = [maps]
    offset = each * torch.arange(groups, device=device)[:, None]
    unsaid = torch.tensor([*never, end], device=device)
    for t in range(longest):
        logits = allowed(logits, history, unsaid if t < shortest else unsaid[:-1])
        total = logits.logsumexp(-1).view_as(live)
        before = (live - total).masked_fill(total == -torch.inf, -torch.inf)  # where all words would repeat three
        logits = logits.unflatten(1, (groups, each))
        less = logits.new_zeros(images, logits.shape[-1])
        chosen: list[Candidates] = []
        for g in range(groups):
            chosen.append(choose(before[:, g], logits[:, g], 2 * each, less if g else None))
            if g + 1 < groups:
                log_prob, _, word = chosen[-1]
                on = word != end  # others take the places of those that end
                taken = torch.where(on, on.cumsum(1), torch.arange(1, word.shape[1] + 1, device=device)) <= each
                less = less.scatter_add(1, word, diversity * (taken & log_prob.isfinite()).to(less.dtype))
        candidates = Candidates(*(torch.stack(field, 1) for field in zip(*chosen, strict=True)))
        ends = candidates.word == end
        ended = candidates.log_prob[..., :each].masked_fill(~ends[..., :each], -torch.inf)
        done = done.joined(ranked(ended, t + 1), ended, candidates.parent[..., :each], t)
        order = ends.long().argsort(dim=-1, stable=True)[..., :each]  # those that go on, the best first
        live, parent, word = (field.gather(-1, order) for field in candidates)
        live = live.masked_fill(word == end, -torch.inf)  # where all words but few are forbidden
        words.append(word.flatten(1))
        parents.append((parent + offset).flatten(1))
        if t + 1 == longest or bool((done.score[..., -1] >= ranked(live.amax(-1), longest)).all()):
            break
        state = reordered(state, parents[-1])
        if not repeat:
            history = torch.cat((reordered(history, parents[-1]), words[-1][..., None]), 2)
        features, maps, state = decoder.step(words[-1], prepared, state)
        looked.append(maps)
        logits = decoder.write(features)
    if len(words) == longest:
        done = done.joined(ranked(live, longest), live, torch.arange(each, device=device).expand_as(live), longest)
    return done.told(words, parents, looked, offset, end)


@torch.no_grad()
def sample(
    decoder: Decoder,
    prepared: Any,
    *,
    end: int,
    count: int = 1,
    longest: int = 20,
    shortest: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    nucleus: float = 1.0,
    repeat: bool = True,
    never: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Sentences:
    """Say sentences by chance, word by word, several about each image.

    Args:
        decoder: What says sentences.
        prepared: What it made of a memory.
        end: The word that ends a sentence.
        count: How many sentences are said about an image.
        longest: How many words a sentence has at most, with the one that ends it.
        shortest: How many words it has at least, without the one that ends it.
        temperature: What logits are divided by; below 1, the likelier words come more often.
        top_k: Among how many of the likeliest words the next is drawn; None: all.
        nucleus: The next is drawn among the likeliest words that have this probability together (arXiv:1904.09751).
        repeat: Whether three words in a row may come again.
        never: Words that are not said; the others share what they have in probability.
        generator: Where numbers are drawn from.

    Raises:
        ValueError: If an option is out of its range.
    """
    check(decoder, end, longest, shortest, never, count=count)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < nucleus <= 1:
        raise ValueError(f"nucleus must lie in (0, 1], got {nucleus}")

    state, word = decoder.begin(prepared, count), None
    words: list[Tensor] = []
    looked: list[Any] = []
    for t in range(longest):
        features, maps, state = decoder.step(word, prepared, state)
        logits = decoder.write(features)
        if not t:
            total = wide(logits).new_zeros(logits.shape[:2])
            going = torch.ones_like(total, dtype=torch.bool)
            history = logits.new_empty((*logits.shape[:2], 0), dtype=torch.long)
            unsaid = torch.tensor([*never, end], device=logits.device)
        logits = allowed(logits, history, unsaid if t < shortest else unsaid[:-1])
        probabilities = truncated(logits / temperature, top_k, nucleus).softmax(-1)
        word = probabilities.flatten(0, 1).multinomial(1, generator=generator).view_as(total).masked_fill(~going, end)
        total = total + logits.log_softmax(-1).gather(2, word[..., None])[..., 0].masked_fill(~going, 0.0)
        words.append(word)
        looked.append(while_on(maps, going))
        going = going & (word != end)
        if not bool(going.any()):
            break
        if not repeat:
            history = torch.cat((history, word[..., None]), 2)
    said = torch.stack(words, 2)
    lengths = ((said != end).cumprod(2).sum(2) + 1).clamp(max=said.shape[2])
    return Sentences(said, lengths, total, total, stacked(looked))


def check(decoder: Decoder, end: int, longest: int, shortest: int, never: Sequence[int], **counts: int) -> None:
    """Raise a ``ValueError`` if what is asked for is out of its range."""
    at_least_one(longest=longest, **counts)
    if end in never or not all(0 <= word < decoder.vocabulary for word in never):
        raise ValueError(f"never must be some of {decoder.vocabulary} words but end={end}, got {list(never)}")
    if not 0 <= end < decoder.vocabulary:
        raise ValueError(f"end must be one of {decoder.vocabulary} words, got {end}")
    if not 0 <= shortest < longest:
        raise ValueError(f"shortest must be less than longest={longest}, got {shortest}")
    if shortest and len(set(never)) + 1 >= decoder.vocabulary:
        left = f"one of {decoder.vocabulary} words to say before end={end} for shortest={shortest}"
        raise ValueError(f"never must leave {left}, got {list(never)}")


def without(logits: Float[Tensor, "*b v"], never: Sequence[int] | Int[Tensor, "n"]) -> Float[Tensor, "*b v"]:
    """Return the logits in at least float32, with -inf for words that may not come."""
    logits = wide(logits)
    return logits.index_fill(-1, torch.as_tensor(never, device=logits.device), -torch.inf) if len(never) else logits


def allowed(
    logits: Float[Tensor, "b r v"], history: Int[Tensor, "b r t"], never: Int[Tensor, "n"]
) -> Float[Tensor, "b r v"]:
    """Return the logits in at least float32, with -inf for words that may not come, or would repeat three in a row."""
    logits = without(logits, never)
    if history.shape[2] >= 3:
        pairs = (history[:, :, :-2] == history[:, :, -2:-1]) & (history[:, :, 1:-1] == history[:, :, -1:])
        less = torch.zeros_like(pairs, dtype=logits.dtype).masked_fill(pairs, -torch.inf)
        logits = logits.scatter_add(2, history[:, :, 2:], less)
    return logits


def truncated(logits: Float[Tensor, "b r v"], top_k: int | None, nucleus: float) -> Float[Tensor, "b r v"]:
    """Leave only the likeliest words, so many or of such a probability together; always one."""
    if top_k is not None and top_k < logits.shape[2]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if nucleus < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= nucleus).scatter(2, order, before >= nucleus), -torch.inf)
    return logits


def reordered(state: Any, order: Int[Tensor, "b r"]) -> Any:
    """Put what is kept for each sentence in another order."""

    def moved(x: Tensor) -> Tensor:
        flat = order + x.shape[1] * torch.arange(order.shape[0], device=order.device)[:, None]
        return x.flatten(0, 1).index_select(0, flat.flatten()).view(*order.shape, *x.shape[2:])

    return over(moved, state)


def while_on(maps: Any, on: Bool[Tensor, "b r"]) -> Any:
    """Return maps with zeros for sentences that have ended."""
    return over(lambda x: x * on.view(*on.shape, *[1] * (x.ndim - 2)).to(x.dtype), maps)


class Candidates(NamedTuple):
    """Continuations of beginnings, the best first."""

    log_prob: Float[Tensor, "*b n"]
    parent: Int[Tensor, "*b n"]
    word: Int[Tensor, "*b n"]


def choose(
    before: Float[Tensor, "b k"], logits: Float[Tensor, "b k v"], count: int, less: Tensor | None = None
) -> Candidates:
    """Return the best continuations of each image: first the best of each beam, then of those.

    Args:
        before: Log-probability of each beginning, less the normaliser of its logits.
        logits: Of the next word.
        count: How many are wanted.
        less: What words lose in the choice, but not in their probability.
    """
    ranked = logits if less is None else logits - less[:, None]
    totals, words = ranked.topk(min(count, logits.shape[2]))
    totals, words = (before[..., None] + totals).flatten(1), words.flatten(1)
    parents = torch.arange(before.shape[1], device=before.device).repeat_interleave(words.shape[1] // before.shape[1])
    totals, best = totals.topk(min(count, totals.shape[1]))
    word = words.gather(1, best)
    return Candidates(totals if less is None else totals + less.gather(1, word), parents[best], word)


class Finished(NamedTuple):
    """The best sentences that have ended, the best first."""

    score: Float[Tensor, "b g k"]
    log_prob: Float[Tensor, "b g k"]
    beam: Int[Tensor, "b g k"]
    """Which beginning the last word follows."""
    last: Int[Tensor, "b g k"]
    """At which step it came; or the number of steps, for those that were cut."""

    @classmethod
    def none(cls, live: Tensor) -> "Finished":
        nothing = torch.full_like(live, -torch.inf)
        return cls(nothing, nothing, torch.zeros_like(live, dtype=torch.long), torch.zeros_like(live, dtype=torch.long))

    def joined(self, score: Tensor, log_prob: Tensor, beam: Tensor, step: int) -> "Finished":
        """Return the best of these and others."""
        fields = (score, log_prob, beam, torch.full_like(beam, step))
        score, log_prob, beam, last = (torch.cat(each, -1) for each in zip(self, fields, strict=True))
        score, best = score.topk(self.score.shape[-1])
        return Finished(score, *(each.gather(-1, best) for each in (log_prob, beam, last)))

    def told(
        self, words: list[Tensor], parents: list[Tensor], looked: list[Any], offset: Tensor, end: int
    ) -> Sentences:
        """Follow each sentence back from its end, and return all, the best first."""
        beam, last = (self.beam + offset).flatten(1), self.last.flatten(1)
        lengths = (last + 1).clamp(max=len(words))
        steps = int(lengths.max()) if lengths.numel() else 0
        said = last.new_full((*last.shape, steps), end)
        maps: Any = []
        for t in reversed(range(steps)):
            follows = last > t  # the word of this step is one of the beginning's
            said[..., t] = torch.where(follows, words[t].gather(1, beam), end)
            at = torch.where(follows, parents[t].gather(1, beam), beam)
            maps.append(while_on(reordered(looked[t], at), last >= t))
            beam = at
        order = self.score.flatten(1).argsort(dim=1, descending=True, stable=True)
        scores, log_probs, lengths = (each.flatten(1).gather(1, order) for each in (self.score, self.log_prob, lengths))
        said, maps = reordered((said, stacked(maps[::-1]) if maps else None), order)
        return Sentences(said, lengths, log_probs, scores, maps)
