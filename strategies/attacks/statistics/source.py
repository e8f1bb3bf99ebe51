"""What a source of BatchNorm statistics is.

Attacks that draw their candidates towards a private batch's mean and variance in each BatchNorm
layer (Yin et al., "See through Gradients", CVPR 2021, Sec. 3) differ in where they have
these from, and their figures with it: Huang et al., "Evaluating Gradient Inversion Attacks and
Defenses in Federated Learning", NeurIPS 2021, Sec. 3.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from fedsim.attack import Setting
from fedsim.models.statistics import LayerStatistics, batchnorm_layers
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView


class StatisticsSource(ABC):
    """Says what a private batch's statistics are in each BatchNorm layer, or guesses them."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.UPDATES})

    @property
    def oracles(self) -> frozenset[str]:
        """Names of the oracle grants that this source asks for."""
        return frozenset()

    def check(self, model: nn.Module) -> None:
        """Refuse a model without BatchNorm (``ValueError``)."""
        if not batchnorm_layers(model):
            raise ValueError("the model has no BatchNorm layer; use one that has (resnet20)")

    def check_setting(self, setting: Setting) -> None:  # noqa: B027 - most take what there is
        """Refuse a federation in which this source has nothing to say (``ValueError``)."""

    @abstractmethod
    def statistics(
        self, view: ServerView, model: nn.Module, knowledge: Knowledge
    ) -> LayerStatistics:
        """Return mean ``[C]`` and biased variance ``[C]`` of each BatchNorm layer's input.

        They are of the model's type and on its device, by the layer's name.

        Parameters
        ----------
        view : ServerView
        model : nn.Module
            The model that the senders received (``knowledge.model(view)``); left as it is.
        knowledge : Knowledge

        Raises
        ------
        ValueError
            If the source cannot say anything about this view.
        fedsim.errors.NotGranted
            If it asks for what the threat model does not grant.
        """


def tracked(model: nn.Module) -> None:
    """Refuse a model whose BatchNorm keeps no running statistics (``ValueError``)."""
    for name, layer in batchnorm_layers(model).items():
        if layer.running_mean is None:
            raise ValueError(
                f"BatchNorm layer {name!r} keeps no running statistics; use statistics='proxy'"
            )
