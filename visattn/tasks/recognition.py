"""What tasks have in common that say of which class an image is: the data fits the network, and labels are checked."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visattn.tasks.base import Task


class Recognition(Task):
    """Say of which class an image is.

    A data module says how many classes and channels there are, how large images are, what the classes are called, and
    how images are prepared: ``num_classes``, ``in_chans``, ``input_size``, ``labels`` and ``preprocess``.
    """

    num_classes: int

    def read_data(self) -> dict[str, Any]:
        """Take over labels and preprocessing, and return what the data says of the network."""
        data: Any = getattr(self._trainer, "datamodule", None)
        self.labels, self.preprocess = getattr(data, "labels", None), getattr(data, "preprocess", None)
        known = {name: getattr(data, name) for name in ("num_classes", "in_chans") if hasattr(data, name)}
        return known | ({"size": tuple(data.input_size[1:])} if hasattr(data, "input_size") else {})

    def check_entries(self, **given: Sequence[Any] | None) -> None:
        """Raise a ``ValueError`` if anything that is given does not have one entry for each class."""
        for name, entries in given.items():
            if entries is not None and len(entries) != self.num_classes:
                raise ValueError(
                    f"{name} must have one entry for each of {self.num_classes} classes, got {len(entries)}"
                )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # here, where the batch still lies in the memory of the host: on a GPU a label out of range kills the process
        if isinstance(batch, (list, tuple)) and len(batch) > 1 and isinstance(batch[1], Tensor):
            labels, classes = batch[1], self.num_classes
            if self.hparams.get("multi_label"):
                if labels.shape[1:] != (classes,):
                    raise ValueError(
                        f"labels must be of shape (b, {classes}), one column a class, got {tuple(labels.shape)}"
                    )
            elif len(bad := labels[(labels < 0) | (labels >= classes)]):
                raise ValueError(
                    f"label {int(bad[0])} is out of range: the model has {classes} classes, 0 to {classes - 1}"
                )
        return batch
