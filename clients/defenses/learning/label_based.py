"""Label-based defense: labels repeat in a batch, and BatchNorm sees it in groups.

Li, Zhao et al., "Label is the Culprit: Defending Gradient Inversion Attacks" (README of the
authors' code): with r images of each label in a batch and their order unknown, the equations of an
inversion have too few independent rows.  The released training does not do that: its scheme is a
batch of 384 over four GPUs whose BatchNorm is not synchronized, and labels are repeated only in the
attack's script.  Both are here, as two switches: a sampler that draws ``B / r`` classes and r
images of each, and "ghost" BatchNorm over ``groups`` parts of the batch, whose statistics are not
uploaded.

Promises ambiguity, not secrecy, and the unknown order is none: the gradient of a mean is the same
for every order of the examples, so that candidates matched under any order of the right labels have
the private batch as a solution, in that order (BatchNorm in train mode too).  There is no
permutation to search; the labels as a multiset are what is wanted, and label rules read them.  The
order says something where ``groups`` is more than 1: who is normalized with whom, not who is first.
Broken by matching, and by every imprint and first-layer ratio, which use no label.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from clients.defenses.learning.by_class import repeated_classes
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import ClientContext, Defense, Rank
from fedsim.registry import register


@register("defense", "label-based")
@dataclass(frozen=True, kw_only=True)
class LabelBased(Defense):
    """Draw batches with ``repeats`` images of each label; normalize them in ``groups``.

    Parameters
    ----------
    repeats : int
        Images of each label that is in a batch.
    groups : int
        Parts of a batch over which BatchNorm takes statistics of its own; 1 leaves it alone.
    """

    paper: ClassVar[Paper] = Paper(
        title="Label is the Culprit: Defending Gradient Inversion Attacks",
        authors="Li, Zhao et al.",
        venue="code release",
        year=2023,
        published="no figure read",
        measured="fedsim run scenarios/label_based.toml (robbing-the-fed, 4 x 16 photo tiles, "
        "repeats 4): 56 of 64 exact, undefended 58.  spear, 4 x 8, one hidden layer: 32 of 32 "
        "exact, as undefended",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "G",
            "attack": "robbing-the-fed(units=200)",
            "defenses": "label-based",
            "data.dataset": "photo-tiles",
            "model.name": "mlp(hidden=[32])",
            "federation.clients": 4,
            "federation.local": "fedsgd(batch_size=8, lr=0.1)",
        },
        # An imprint uses no label: as many images as without it.
        figure="leak.exact",
        low=18.0,
        high=32.0,
    )
    rank: ClassVar[Rank] = Rank.DATA
    refuses_on_examples: ClassVar[bool] = True  # too few of each class
    strengths: ClassVar[tuple[str, ...]] = (
        "label-based(repeats=2)",
        "label-based(repeats=4)",
        "label-based(repeats=8)",
    )
    adversary: ClassVar[str] = "robbing-the-fed(units=256)"

    repeats: Annotated[int, Field(ge=2)] = 4
    groups: Annotated[int, Field(ge=1)] = 1

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse groups in a model without BatchNorm."""
        if self.groups > 1 and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            raise ValueError("this model has no BatchNorm to group; let groups be 1")

    def check_setting(self, setting: Setting) -> None:
        """Refuse batches that cannot hold the repeats, and statistics that are sent or unused."""
        if setting.training.batch_size < self.repeats:
            raise ValueError(
                f"batches of {setting.training.batch_size} hold no {self.repeats} images of a "
                "label; let repeats be smaller, or batch_size larger"
            )
        if self.groups > 1 and setting.batchnorm != "private":
            raise ValueError(
                "groups want model.batchnorm = 'private': in train mode, and never uploaded"
            )

    def sampler(
        self,
        batches: Iterable[Tensor],
        examples: int,  # noqa: ARG002
        ctx: ClientContext,
    ) -> Iterator[Tensor]:
        """Return batches with ``repeats`` images of each label in them."""
        return repeated_classes(batches, self.repeats, self.name, ctx)

    def wrap_model(self, model: nn.Module, ctx: ClientContext) -> nn.Module:  # noqa: ARG002
        """Let every BatchNorm normalize the batch in parts; names stay."""
        if self.groups > 1:
            for module in list(model.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(module, name, GhostBatchNorm2d(child, self.groups))
        return model


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Another's parameters and statistics, taken over parts of a batch in train mode."""

    def __init__(self, like: nn.BatchNorm2d, groups: int) -> None:
        super().__init__(
            like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats
        )
        self._parameters = like._parameters
        self._buffers = like._buffers
        self.groups = groups
        self.train(like.training)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same; parts of at least two examples, where there are two."""
        if not self.training:
            return super().forward(features)
        parts = features.tensor_split(max(1, min(self.groups, len(features) // 2)))
        return torch.cat([super(GhostBatchNorm2d, self).forward(part) for part in parts])
