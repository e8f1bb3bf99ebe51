"""What a label rule is, and the layer that every rule reads.

For mean cross-entropy with one-hot labels the gradient of the last layer's bias is, exactly,
``b_c = mean_p_c - n_c / B``: mean predicted probability minus the share of class c in the batch.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from fedsim.data import DataSpec
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView


class LabelRule(ABC):
    """Reads the multiset of labels of a batch off an update."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.UPDATES})

    @property
    def oracles(self) -> frozenset[str]:
        """Names of the oracle grants that this rule asks for."""
        return frozenset()

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Refuse a model whose gradient this rule cannot read (``ValueError``)."""

    @abstractmethod
    def labels(
        self, view: ServerView, model: nn.Module, batch_size: int, knowledge: Knowledge
    ) -> Tensor:
        """Return ``[batch_size]`` int64; their order means nothing unless the rule says so.

        Parameters
        ----------
        view : ServerView
        model : nn.Module
            The model that the senders received; left as it is.
        batch_size : int
            How many examples the update is of.
        knowledge : Knowledge

        Raises
        ------
        ValueError
            If the rule cannot say anything about this update.
        """


def classifier(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and module of the last fully connected layer with an output for each class.

    Raises
    ------
    ValueError
        If there is none.
    """
    spec: DataSpec = model.spec  # type: ignore[assignment]
    classes = spec.num_classes
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
    ]
    if not found:
        raise ValueError(
            f"the model has no fully connected layer with {classes} outputs to read labels from; "
            "use labels='oracle' or a model that ends in one"
        )
    return found[-1]
