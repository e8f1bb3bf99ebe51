"""What a label rule is, and the layer that every rule reads.

For mean cross-entropy with one-hot labels the gradient of the last layer's bias is, exactly,
``b_c = mean_p_c - n_c / B``: mean predicted probability minus the share of class c in the batch.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedsim.attack import Setting
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

    def check_setting(self, setting: Setting) -> None:  # noqa: B027
        """Refuse a federation whose views are of more than this rule can read (``ValueError``)."""

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


def most_examples(setting: Setting) -> int:
    """Return of how many examples the largest view can be: of an aggregate, all its senders'."""
    uploads = setting.uploads
    return sum(uploads[-setting.cohort :]) if setting.channel.aggregates else uploads[-1]


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


def biased_classifier(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return :func:`classifier`, where it has a bias.

    Raises
    ------
    ValueError
        If there is no such layer, or it has none.
    """
    name, layer = classifier(model)
    if layer.bias is None:
        raise ValueError(
            f"the last layer {name!r} has no bias to read label counts from; use labels='idlg' "
            "for one example, a rule that reads the weights ('llg', 'gradinversion', 'rlg', or "
            "'fedavg-counts' with read='weight'), labels='oracle', or a model with that bias"
        )
    return name, layer


def moved(view: ServerView, model: nn.Module, part: Literal["weight", "bias"]) -> Tensor:
    """Return what the update says of the last layer: ``[K, d]`` or ``[K]``, float64 on the CPU.

    Raises
    ------
    ValueError
        If it is not in the update or not finite.
    """
    name = f"{classifier(model)[0]}.{part}"
    found = view.update().get(name)
    if found is None or not found.isfinite().all():
        raise ValueError(f"{view.label} has no finite gradient of {name} to read")
    return found.detach().double().cpu()


def listed(counts: Tensor) -> Tensor:
    """Turn counts ``[K]`` into sorted labels, each as often as it was counted."""
    return torch.repeat_interleave(torch.arange(len(counts)), counts)
