"""What is trained, with which loss and which metrics (Lightning)."""

from visattn.tasks.answering import Answering
from visattn.tasks.base import Task
from visattn.tasks.captioning import Captioning
from visattn.tasks.classification import Classification
from visattn.tasks.focusing import Focusing
from visattn.tasks.generation import Generation
from visattn.tasks.looking import Looking
from visattn.tasks.pairs import Verification
from visattn.tasks.run import Outcome, RunError
from visattn.tasks.sketches import Sketches
from visattn.tasks.watch import Alignment, Gaze

__all__ = [
    "Alignment",
    "Answering",
    "Captioning",
    "Classification",
    "Focusing",
    "Gaze",
    "Generation",
    "Looking",
    "Outcome",
    "RunError",
    "Sketches",
    "Task",
    "Verification",
]
