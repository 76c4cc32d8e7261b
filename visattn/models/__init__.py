"""Networks made of attention; no loss, no Lightning. ``__all__`` is the index."""

from visattn.models.attention_branch import AttentionBranchNetwork
from visattn.models.captioner import Captioner
from visattn.models.deep_recurrent_attention import DeepRecurrentAttention
from visattn.models.draw import DRAW, DifferentiableGlimpseClassifier
from visattn.models.glance_focus import GlanceFocus
from visattn.models.pairs import SiameseNetwork
from visattn.models.pay_attention import LearnToPayAttention
from visattn.models.question_answerer import QuestionAnswerer
from visattn.models.recurrent_attention import RecurrentAttention
from visattn.models.recurrent_pool import RecurrentPoolNetwork
from visattn.models.spatial_transformer import DigitClassifier, SpatialTransformerNetwork

__all__ = [
    "DRAW",
    "AttentionBranchNetwork",
    "Captioner",
    "DeepRecurrentAttention",
    "DifferentiableGlimpseClassifier",
    "DigitClassifier",
    "GlanceFocus",
    "LearnToPayAttention",
    "QuestionAnswerer",
    "RecurrentAttention",
    "RecurrentPoolNetwork",
    "SiameseNetwork",
    "SpatialTransformerNetwork",
]
