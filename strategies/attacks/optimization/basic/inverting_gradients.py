"""Inverting Gradients: match the direction of the gradient, by signed Adam, with total variation.

``min_x 1 - cos(F(x, y), g) + tv * TV(x)`` over standardized images, where F is the network's
gradient, g the observed one, and the cosine is over all parameters as one vector.  Adam on the
sign of the gradient, a box, and a rate that falls to a tenth at 3/8, 5/8 and 7/8.
Geiping, Bauermeister, Droege and Moeller, NeurIPS 2020, Sec. 4 and the authors' code.

The cosine does not know the scale of the update: clipping does not hide anything, and weights
after local training are matched as if they were one step (an approximation: right for one step,
worse the more there are).  With ``simulate`` F is ``w_0 - w_K`` of the client's K local steps
instead, unrolled and differentiated (Sec. 6): every epoch walks the candidates in the same order,
which is a guess where clients shuffle.  What hides images: large batches, repeated labels, trained
networks, BatchNorm in train mode, pruning and noise.

``without`` leaves parameters out of the match, for a client who spoils only some: the layer that
Soteria prunes (Balunovic et al., ICLR 2022), PRECODE's bottleneck and what follows it
(Scheliga et al. 2023).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from fedsim.attack import Paper, Reconstruction, Setting, ToyCase
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.attack import TakesLabels
from strategies.attacks.optimization.engine import Recipe, invert, one_gradient
from strategies.attacks.optimization.gradients import Operator
from strategies.attacks.optimization.groups import Group
from strategies.attacks.optimization.local_updates import LocalUpdates, in_order, one_client_each
from strategies.attacks.optimization.objectives import (
    Cosine,
    Objective,
    Weighted,
    for_each_layer,
)
from strategies.attacks.optimization.optimizers import Adam
from strategies.attacks.optimization.parametrizations import NormalizedPixels
from strategies.attacks.optimization.priors import TotalVariation
from strategies.attacks.optimization.schedules import ig_steps


@register("attack", "inverting-gradients")
@dataclass(frozen=True, kw_only=True)
class InvertingGradients(TakesLabels):
    """Threat model B.  Cost: ``iterations * restarts`` gradient evaluations for each view.

    ``simulate`` needs C, and costs as many evaluations an iteration as there are local steps, and
    the memory of as many.

    The authors' settings: CIFAR-10, one image, untrained ConvNet: 4,000 iterations, tv 1e-6; their
    command line's default is tv 1e-4; trained ResNet-18, ImageNet: 24,000 iterations, tv 1e-1, 8
    restarts; 100 images: 24,000 iterations, tv 1e-2, 4 restarts.  Batches, few iterations and
    trained networks want more tv (1e-2); a sigmoid network whose gradient hardly moves with the
    image (``lenet(init='default')``) wants none.

    Parameters
    ----------
    iterations : int
        Of each restart.
    restarts : int
        The one with the lowest cosine distance wins, total variation left out.
    tv : float
        Weight of the total variation; 0 for none.
    lr : float
        Adam's rate at the start.
    signed : bool
        Whether Adam sees the sign of the gradient only.
    boxed : bool
        Whether pixels are held to ``[0, 1]``.
    labels : str
        Label rule expression: ``analytic``, ``idlg`` (one example), ``oracle`` (a grant).
    simulate : bool
        Whether candidates go through the client's local training, not through one step.
    without : list of str
        Parts of names of parameters that the match leaves out, whatever is in them; labels are read
        off them all the same, what is not finite as if it had not moved.
    """

    paper = Paper(
        title="Inverting Gradients - How easy is it to break privacy in federated learning?",
        authors="Jonas Geiping, Hartmut Bauermeister, Hannah Droege, Michael Moeller",
        venue="NeurIPS",
        year=2020,
        published="the authors' notebook: cosine distance 8e-4 for one CIFAR-10 image on an "
        "untrained ConvNet64; re-evaluated by Guo et al.: untrained ResNet-18, CIFAR-10, 1 / 32 / "
        "64 images, 22.03 / 12.59 / 12.47 dB. Table 1, from memory and unchecked: LeNet untrained "
        "18.00 +- 3.33 dB, trained 18.08 +- 4.27; ResNet20-4 untrained 19.83 +- 2.96, trained "
        "13.95 +- 3.38",
        measured="PSNR in [0, 1] (the authors' is on standardized images). CIFAR-10, lenet, one "
        "image, 4,000 iterations, tv 1e-4, 10 images: 19.5 +- 3.9 dB. convnet(stride=2) / convnet, "
        "1,000 iterations, 4 batches: one image, tv 1e-6, 26.5 / 35.9 dB; four images, tv 1e-2, "
        "24.0 / 28.9; one image after 500 steps of training, tv 1e-2, 20.2 / 14.4 "
        "(FEDSIM_TEST_DATA=... python -m pytest "
        "-m slow -s tests/strategies/passive/test_inverting_gradients.py)",
    )
    needs = frozenset({Capability.UPDATES, Capability.BASICS})
    unit = "iterations"
    toy = ToyCase(
        scenario={
            "threat-model": "B",
            "attack": "inverting-gradients(iterations=300, tv=1e-3)",
            "model.name": "convnet",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        low=20.0,
        high=50.0,
    )

    iterations: Annotated[int, Field(ge=1)] = 4000
    restarts: Annotated[int, Field(ge=1)] = 1
    tv: Annotated[float, Field(ge=0)] = 1e-4
    lr: Annotated[float, Field(gt=0)] = 0.1
    signed: bool = True
    boxed: bool = True
    labels: str = "analytic"
    simulate: bool = False
    without: list[str] | tuple[str, ...] = ()

    @property
    def required(self) -> frozenset[Capability]:
        """With ``simulate`` also how clients train."""
        return self.needs | ({Capability.DETAILS} if self.simulate else set())

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse a model that the label rule cannot read, and to simulate what is one step."""
        if self.simulate and kind != "weights":
            raise ValueError(
                "a gradient is one step, there is no local training to simulate; leave "
                'simulate=False, or use federation.local = "fedavg(...)"'
            )
        self._check_left_out(model)
        super().check(model, kind)

    def _check_left_out(self, model: nn.Module) -> None:
        """Refuse to leave out what is not there, or all there is."""
        names = [name for name, _ in model.named_parameters()]
        for part in self.without:
            if not any(part in name for name in names):
                there = ", ".join(names)
                raise ValueError(f"without: no parameter's name has {part!r}; there is: {there}")
        if all(self._left_out(name) for name in names):
            raise ValueError("without: it leaves out every parameter; keep some to match")

    def check_setting(self, setting: Setting) -> None:
        """Refuse batches too large for the label rule, and to simulate a sum of clients."""
        super().check_setting(setting)
        if self.simulate:
            one_client_each(setting)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return as many images for each view as it has examples."""

        def local_training(group: Group, _: Sequence[str]) -> Operator:
            steps = in_order(group.batch_size, knowledge.training)
            return LocalUpdates(group.model, group.names, knowledge.training, steps)

        recipe = Recipe(
            batch_size=knowledge.num_examples,
            labels=self.rule,
            operator=local_training if self.simulate else one_gradient,
            parametrization=lambda group: NormalizedPixels(
                group.spec, group.known_labels, group.observed.dtype, boxed=self.boxed
            ),
            objective=self._cosine,
            priors=lambda group: [TotalVariation(self.tv, group.spec.std)] if self.tv else [],
            optimizer=lambda _: Adam(self.lr, signed=self.signed, schedule=ig_steps),
            iterations=self.iterations,
            restarts=self.restarts,
        )
        return invert([self._without_broken(view) for view in views], knowledge, recipe)

    def _without_broken(self, view: ServerView) -> ServerView:
        """Return a view whose left-out parameters moved nowhere that is not finite.

        They must not spoil the others.
        """

        def whole(name: str, tensor: Tensor) -> Tensor:
            if not self._left_out(name):
                return tensor
            unmoved = view.sent[name].to(tensor) if view.kind == "weights" else 0.0
            return tensor.where(tensor.isfinite(), unmoved)

        received = {name: whole(name, tensor) for name, tensor in view.received.items()}
        return dataclasses.replace(view, received=received)

    def _cosine(self, group: Group) -> Objective:
        """Return the cosine over all parameters, or over those that are not left out."""
        if not self.without:
            return Cosine(group.observed)
        kept = [0.0 if self._left_out(name) else 1.0 for name in group.names]
        scale = for_each_layer(kept, group.sizes, group.observed)
        return Weighted(Cosine, group.observed, scale)

    def _left_out(self, name: str) -> bool:
        return any(part in name for part in self.without)
