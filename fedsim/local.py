"""What a local training rule is, and what it hands back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedsim.data import Split
from fedsim.defense import Batch, ClientContext, Defense, Tensors, TrainingPlan
from fedsim.threat import TrainingDetails


@dataclass(frozen=True)
class LocalData:
    """One client's examples, moved to where it trains."""

    split: Split
    device: torch.device
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: Tensor) -> Batch:
        """Return images ``[B, C, H, W]`` in ``[0, 1]`` and labels ``[B]``."""
        images, labels = self.split.batch(indices, self.dtype)
        return images.to(self.device), labels.to(self.device)


@dataclass(frozen=True)
class Trained:
    """What one client's local training gave.

    Attributes
    ----------
    upload : dict of str to Tensor
        The gradient (``kind="gradient"``) or the weights (``kind="weights"``) to send.
    clean : dict of str to Tensor
        The update as it was before any defense changed the upload.
    indices : Tensor
        ``[N]``: which of the client's examples it was computed on.
    update : dict of str to Tensor or None
        The update as uploaded; None where that is ``upload`` itself.
    """

    upload: Tensors
    clean: Tensors
    indices: Tensor
    update: Tensors | None = None


class Local(ABC):
    """How a client turns the model it received into an upload."""

    kind: ClassVar[Literal["gradient", "weights"]]
    batch_size: int
    lr: float

    @abstractmethod
    def plan(self, examples: int, rounds: int) -> TrainingPlan:
        """Say what this rule will do with so many examples."""

    def check(self, most: int) -> None:  # noqa: B027 - most rules take what there is
        """Refuse what no client can do (``ValueError``), if ``most`` is what any of them holds."""

    @abstractmethod
    def train(
        self,
        model: nn.Module,
        data: LocalData,
        defenses: Sequence[Defense],
        ctx: ClientContext,
        proximal_mu: float = 0.0,
    ) -> Trained:
        """Train ``model`` in place and return what to upload."""

    @abstractmethod
    def probe(self, data: LocalData, ctx: ClientContext) -> Batch:
        """Return the first batch that :meth:`train` would take without any defense."""

    def details(self) -> TrainingDetails:
        """Return what a parameter-aware adversary knows of this rule."""
        return TrainingDetails(
            kind=self.kind,
            lr=self.lr,
            batch_size=self.batch_size,
            epochs=getattr(self, "epochs", 1),
            momentum=getattr(self, "momentum", 0.0),
            weight_decay=getattr(self, "weight_decay", 0.0),
        )
