import gzip
import json
import unicodedata

import pytest

from visattn.metrics import tokenise
from visattn.metrics.tokens import PUNCTUATION


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog runs.", "a dog runs"),
        ("Two dogs , one black -- run ; why ? !", "two dogs one black run why"),
        ("it's the dog's ball, isn't it?", "it 's the dog 's ball is n't it"),
        ("the dogs' balls; I can't, you'd, they've, we'll, I'm", "the dogs balls i ca n't you 'd they 've we 'll i 'm"),
        ("a sign says \"stop\" and 'go'", "a sign says stop and go"),
        ("curly “quotes” and it’s", "curly quotes and it 's"),
        ("a man (in red) on a {t-shirt}", "a man in red on a t-shirt"),
        ("at 10:30, 1,000 people... and 3.5 more", "at 10:30 1,000 people and 3.5 more"),
        ("cannot gonna wanna gotta", "can not gon na wan na got ta"),
        ("Mr. Smith of the U.S. team at 5 a.m.", "mr. smith of the u.s. team at 5 a.m."),
        ("#1 for $5 & 50%", "# 1 for $ 5 & 50 %"),
        ("a black/white cat.On a mat", "a black/white cat on a mat"),
        ("- a list -", "a list"),
        (" . ", ""),
        ("", ""),
    ],
)
def test_cuts(caption, words):
    assert tokenise(caption) == words.split()


def test_punctuation_goes_wherever_it_stands_alone():
    assert len(PUNCTUATION) == 17
    assert tokenise(" ".join(("a", *PUNCTUATION, "b", *map(str.upper, PUNCTUATION)))) == ["a", "b"]


def test_leaves_alone_what_it_has_cut(shared):
    with gzip.open(shared / "data" / "flickr8k" / "dataset_flickr8k.json.gz") as file:
        captions = [s for image in json.load(file)["images"] for s in image["sentences"]][::10]
    for caption in captions:
        words = tokenise(caption["raw"])
        assert tokenise(" ".join(words)) == words
    plain = [caption["tokens"] for caption in captions if "cannot" not in caption["tokens"]]
    assert [tokenise(" ".join(words)) for words in plain] == plain


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("एक कुत्ता दौड़ रहा है।", ["एक", "कुत्ता", "दौड़", "रहा", "है"]),
        ("cafe\u0301 noir", ["caf\u00e9", "noir"]),
        ("¿dónde está?", ["dónde", "está"]),
        ("كَلْبٌ يَجْرِي، هنا", ["كَلْبٌ", "يَجْرِي", "هنا"]),
    ],
)
def test_words_of_other_scripts_keep_their_marks_and_lose_their_punctuation(caption, words):
    assert tokenise(caption) == [unicodedata.normalize("NFC", word) for word in words]
