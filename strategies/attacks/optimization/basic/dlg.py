"""Deep Leakage from Gradients: match the gradient itself, searching image and label together.

``min_{x, y} ||F(x, softmax(y)) - g||^2`` by L-BFGS from N(0, 1), without prior or box, where F is
the network's gradient and g the observed one.  Zhu, Liu and Han, NeurIPS 2019, Sec. 3.

Success is bimodal: a start ends at the image (40 dB and more) or nowhere (about 5 dB), and the
attack sees which from its own distance.  So it restarts until one is below ``converged``.  It
wants a smooth network whose weights were drawn wide (the paper's: ``lenet``, sigmoid, U(-0.5,
0.5)); ReLU, trained weights, noise and batches of more than a few images stop it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from fedsim.attack import Attack, Paper, Reconstruction, ToyCase
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.optimization.engine import Recipe, invert
from strategies.attacks.optimization.objectives import SquaredDistance
from strategies.attacks.optimization.optimizers import LBFGS
from strategies.attacks.optimization.parametrizations import PixelsAndLabels


@register("attack", "dlg")
@dataclass(frozen=True, kw_only=True)
class DLG(Attack):
    """Threat model A: updates are all it needs, and so the number of examples is a guess.

    Cost: up to ``iterations * restarts`` gradient evaluations for each view.

    Parameters
    ----------
    batch_size : int
        How many examples the attacker takes an update to be of.
    iterations : int
        Of L-BFGS, for each restart; the authors' code makes 300 steps of 20 each.
    restarts : int
        At most; tried until one converges.
    converged : float
        Squared distance below which a restart has found the image and no other is tried.  It runs
        on until it gets no nearer: single precision ends near 1e-6.
    patience : int
        Iterations in which the squared distance must fall by a tenth, or the restart ends.
    lr : float
        Step of L-BFGS.
    """

    paper = Paper(
        title="Deep Leakage from Gradients",
        authors="Ligeng Zhu, Zhijian Liu, Song Han",
        venue="NeurIPS",
        year=2019,
        published="pictures, no figures; label accuracy of one start on MNIST / CIFAR-100 / LFW "
        "89.9 / 83.3 / 79.1 % (measured by Zhao et al. 2020, Table 1)",
        measured="lenet, 100 classes, one image, up to 8 restarts chosen by own distance: "
        "photo-tiles 10 of 10 images at 52-59 dB with their labels, 5.6 k gradient evaluations an "
        "image; CIFAR-10 10 of 10 at 48-58 dB, 6.3 k; about two starts in three converge "
        "(FEDSIM_TEST_DATA=... python -m pytest -m slow -s tests/strategies/passive/test_dlg.py)",
    )
    needs = frozenset({Capability.UPDATES})
    unit = "iterations"
    toy = ToyCase(
        scenario={
            "threat-model": "A",
            "attack": "dlg",
            "data.dataset": "digits",
            "model.name": "lenet",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        low=40.0,
        high=199.0,
    )

    batch_size: Annotated[int, Field(ge=1)] = 1
    iterations: Annotated[int, Field(ge=1)] = 6000
    restarts: Annotated[int, Field(ge=1)] = 8
    converged: Annotated[float, Field(gt=0)] = 1e-5
    patience: Annotated[int, Field(ge=1)] = 250
    lr: Annotated[float, Field(gt=0)] = 1.0

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse weights: their change is a gradient times an unknown step."""
        if kind == "weights":
            raise ValueError(
                "dlg matches the gradient's own size, which weights after local training do not "
                "tell; use federation.local = 'fedsgd(...)', or inverting-gradients, whose cosine "
                "is blind to size"
            )

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return ``batch_size`` images and labels for each view."""
        recipe = Recipe(
            batch_size=lambda _: self.batch_size,
            parametrization=lambda group: PixelsAndLabels(group.spec, self.batch_size),
            objective=lambda group: SquaredDistance(group.observed),
            optimizer=lambda _: LBFGS(self.lr),
            iterations=self.iterations,
            restarts=self.restarts,
            converged=self.converged,
            patience=self.patience,
        )
        return invert(views, knowledge, recipe)
