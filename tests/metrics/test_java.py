import shutil
import sys
from types import SimpleNamespace

import pytest

from visattn.metrics import evaluate, meteor, spice


class Recorder:
    """Stands for a scorer of pycocoevalcap: keeps what it is given."""

    given: tuple = ()
    answer: tuple = ()

    def compute_score(self, references, hypotheses):
        Recorder.given = references, hypotheses
        return Recorder.answer


@pytest.fixture
def _installed(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    for name in ("Meteor", "Spice"):
        low = name.lower()
        for module in ("pycocoevalcap", f"pycocoevalcap.{low}"):
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{low}.{low}", SimpleNamespace(**{name: Recorder}))


@pytest.mark.usefixtures("_installed")
def test_meteor_gets_strings_by_image(monkeypatch):
    monkeypatch.setattr(Recorder, "answer", (0.4, [0.5, 0.25]))
    found = meteor(["a  dog", ["two", "cats"]], [["the dog"], ["cats", ["2", "cats"]]])
    assert Recorder.given == ({0: ["the dog"], 1: ["cats", "2 cats"]}, {0: ["a dog"], 1: ["two cats"]})
    assert (found.corpus, found.images.tolist()) == (0.4, [0.5, 0.25])
    assert evaluate(["a dog", "a cat"], [["a dog"], ["a cat"]], ["meteor"]) == {"meteor": 0.4}


@pytest.mark.usefixtures("_installed")
def test_spice_is_the_f_score_of_all_tuples(monkeypatch):
    answer = (0.375, [{"All": {"f": 0.5, "pr": 1.0}}, {"All": {"f": 0.25, "pr": 1.0}}])
    monkeypatch.setattr(Recorder, "answer", answer)
    found = spice(["a dog", "a cat"], [["the dog"], ["a cat"]])
    assert (found.corpus, found.images.tolist()) == (0.375, [0.5, 0.25])


@pytest.mark.parametrize("metric", [meteor, spice])
def test_says_what_is_missing(metric, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    name = metric.__name__.title()
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(RuntimeError, match=f"{name} needs .*, missing: the program java and the package pycocoevalcap"):
        metric(["a"], [["a"]])
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    with pytest.raises(RuntimeError, match=f"{name} needs .*, missing: the package pycocoevalcap"):
        metric(["a"], [["a"]])


@pytest.mark.usefixtures("_installed")
def test_java_alone_may_be_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(RuntimeError, match=r"missing: the program java$"):
        meteor(["a"], [["a"]])
    with pytest.raises(ValueError, match="hypotheses must be one for each image of references, got 1 for 2"):
        meteor(["a"], [["a"], ["b"]])
