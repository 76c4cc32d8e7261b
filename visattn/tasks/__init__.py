"""What is trained, with which loss and which metrics (Lightning)."""

from visattn.tasks.classification import Classification
from visattn.tasks.run import Outcome, RunError

__all__ = ["Classification", "Outcome", "RunError"]
