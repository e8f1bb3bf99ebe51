"""Gradient mixing: batches of one class, and a loss that does not take them apart.

Eloul, Silavong, Kamthe, Georgiadis, Moran, "Enhancing Privacy against Inversion Attacks in
Federated Learning by using Mixing Gradients Strategies", 2022; and "Mixing Gradients in Neural
Networks as a Strategy to Enhance Privacy in Federated Learning", WACV 2024.  A dense layer's row j
has the gradient ``sum_i d_ij x_i``.  With softmax cross-entropy ``d_ij = p_ij - [y_i = j]``: rows
of the labels in the batch, less one of a class that is not in it, are single inputs.  With one
label all rows are the same sum as long as outputs are alike, and a squared error keeps
``d_ij = z_ij - y_ij`` from dividing by them.  Which loss the authors settle on is not clear from
the abstracts: here squared error on the logits, ``1/2 |z - y|^2``, or cross-entropy.

Promises an overlap in the layer next to the loss, as long as outputs are alike.  Layers before it
see inputs through different ReLUs, which un-mixes them: broken by attacks on those
(``paper.measured``), by matching, and by any active server.  Batches of one class are bad for
BatchNorm and for SGD, and tell the class.  Labels have no order to search for: they are all one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from clients.defenses.learning.by_class import repeated_classes
from clients.defenses.learning.mixing import soft
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Rank
from fedsim.registry import register


@register("defense", "gradient-mixing")
@dataclass(frozen=True, kw_only=True)
class GradientMixing(Defense):
    """Draw each batch from one class of the client's, chosen by size; train on another loss.

    It has two strengths: what mixes more is a larger batch, which is the federation's to choose.

    Parameters
    ----------
    objective : {"squared", "cross-entropy"}
        Half the squared distance of the logits to the one-hot label, mean over the batch; or the
        usual loss.
    """

    paper: ClassVar[Paper] = Paper(
        title="Mixing Gradients in Neural Networks as a Strategy to Enhance Privacy in Federated "
        "Learning",
        authors="Eloul, Silavong, Kamthe, Georgiadis, Moran",
        venue="WACV",
        year=2024,
        published="no figure read; LeNet-like networks, absolute variation distance",
        measured="softmax regression from zero: with cross-entropy and different labels every "
        "image to 1e-9, with one label the mean of all (pytest "
        "tests/clients/test_defenses_gradient_mixing.py).  One hidden ReLU layer: fedsim run "
        "scenarios/gradient_mixing.toml (spear, 4 x 8 photo tiles) 32 of 32 exact, as undefended.  "
        "robbing-the-fed, 4 x 16: 49 of 64 exact, undefended 58",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "A",
            "attack": "linear-inversion",
            "defenses": "gradient-mixing",
            "data.dataset": "photo-tiles",
            "model.name": "mlp(hidden=[])",
            "federation.clients": 4,
            "federation.local": "fedsgd(batch_size=8, lr=0.1)",
        },
        # One mixture for each batch, nearest to what is in it most.
        figure="leak.psnr.mean",
        low=11.0,
        high=28.0,
    )
    rank: ClassVar[Rank] = Rank.DATA
    refuses_on_examples: ClassVar[bool] = True  # too few of each class
    strengths: ClassVar[tuple[str, ...]] = (
        "gradient-mixing(objective='cross-entropy')",
        "gradient-mixing(objective='squared')",
    )
    adversary: ClassVar[str] = "robbing-the-fed(units=256)"

    objective: Literal["squared", "cross-entropy"] = "squared"

    def check_setting(self, setting: Setting) -> None:
        """Refuse batches of one: they mix with nothing."""
        if setting.training.batch_size < 2:
            raise ValueError(
                "one example mixes with nothing; let federation.local's batch_size be 2 or more"
            )

    def sampler(
        self,
        batches: Iterable[Tensor],
        examples: int,  # noqa: ARG002
        ctx: ClientContext,
    ) -> Iterator[Tensor]:
        """Return batches of one class each, as large as they were where it has so many."""
        return repeated_classes(batches, None, self.name, ctx)

    def loss(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensor | None:
        """Return the squared error, or None for cross-entropy."""
        if self.objective == "cross-entropy":
            return None
        logits: Tensor = model(batch[0])
        return (logits - soft(batch[1], logits, ctx)).square().sum(dim=1).mean() / 2
