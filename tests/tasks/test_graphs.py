"""Compilers meet no break in the networks of the tasks, which are traced in training, as they are trained."""

from functools import partial

import pytest
import torch
from torch import nn

import visattn
from visattn.models import (
    DRAW,
    AttentionBranchNetwork,
    Captioner,
    DeepRecurrentAttention,
    DifferentiableGlimpseClassifier,
    GlanceFocus,
    QuestionAnswerer,
    RecurrentAttention,
    RecurrentPoolNetwork,
    SiameseNetwork,
)
from visattn.models.decoders import ShowAttendAndTell, TransformerDecoder
from visattn.tasks import Classification
from visattn.tasks.command_line import known_tasks

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
GREY = IMAGES[:, :1]
WORDS = torch.tensor([[[3, 4, 5]], [[6, 7, 0]]])


def classifier(**options) -> nn.Module:
    task = Classification("test_resnet", backbone_args={"num_classes": 4}, **options)
    task.configure_model()
    return task.model


CASES = {
    "Classification": (classifier, IMAGES),
    "Classification, CBAM": (partial(classifier, attention=visattn.CBAM), IMAGES),
    "Classification, transformer": (partial(classifier, attention=visattn.AffineTransformer), IMAGES),
    "Classification, checkpointing": (partial(classifier, attention=visattn.CBAM, grad_checkpointing=True), IMAGES),
    "Classification, branch": (partial(classifier, network=AttentionBranchNetwork), IMAGES),
    "Classification, recurrent pool": (partial(classifier, network=RecurrentPoolNetwork), IMAGES),
    "Verification": (partial(SiameseNetwork, attention="ABCNN-3"), IMAGES, IMAGES.flip(0)),
    "Looking": (partial(RecurrentAttention, 4, in_chans=1, size=(64, 64)), GREY),
    "Looking, deep": (partial(DeepRecurrentAttention, 4, in_chans=1, size=(64, 64)), GREY),
    "Looking, differentiable": (partial(DifferentiableGlimpseClassifier, 4, in_chans=1, size=(64, 64)), GREY),
    "Focusing": (partial(GlanceFocus, 4, backbone="test_resnet", patch=32), IMAGES),
    "Generation": (partial(DRAW, size=(64, 64), steps=2), GREY.sigmoid()),
    "Captioning": (partial(Captioner, 8, backbone="test_resnet", decoder=ShowAttendAndTell), IMAGES, WORDS),
    "Captioning, transformer": (
        partial(Captioner, 8, backbone="test_resnet", decoder=TransformerDecoder),
        IMAGES,
        WORDS,
    ),
    "Answering": (partial(QuestionAnswerer, 8, 4, backbone="test_resnet"), IMAGES, WORDS),
}


def test_every_task_is_there():
    assert {name.partition(",")[0] for name in CASES} == set(known_tasks())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_has_no_break(case, unchecked):
    make, *inputs = CASES[case]
    found = torch._dynamo.explain(make().train())(*inputs)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
