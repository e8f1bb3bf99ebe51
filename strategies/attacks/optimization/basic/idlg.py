"""Improved Deep Leakage from Gradients: read the label off its sign, then search the image alone.

For one example the gradient of cross-entropy with respect to the logits is ``p - onehot(y)``:
negative at the true class and nowhere else.  That gives y exactly; what is left is DLG's search
with half of its ambiguity gone, ``min_x ||F(x, y) - g||^2`` by L-BFGS from N(0, 1), without prior
or box.  Zhao, Mopuri and Bilen, 2020 (arXiv 2001.02610), Sec. 3 and Alg. 1.

As with DLG a start ends at the image or nowhere, the attack sees which from its own distance, and
restarts until one is below ``converged``.  It wants what DLG wants: a smooth network whose weights
were drawn wide.  Soft labels (mixup, smoothing) and more than one example stop the rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from fedsim.attack import Attack, Paper, Reconstruction, Setting, ToyCase
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.idlg import IDLG
from strategies.attacks.labels.rule import most_examples
from strategies.attacks.optimization.engine import Recipe, invert
from strategies.attacks.optimization.objectives import SquaredDistance
from strategies.attacks.optimization.optimizers import LBFGS
from strategies.attacks.optimization.parametrizations import Pixels


@register("attack", "idlg")
@dataclass(frozen=True, kw_only=True)
class ImprovedDLG(Attack):
    """Threat model A: updates are all it needs; it takes each to be of one example.

    Cost: up to ``iterations * restarts`` gradient evaluations for each view.

    Parameters
    ----------
    iterations : int
        Of L-BFGS, for each restart; the authors' code makes 300 steps of 20 each.
    restarts : int
        At most; tried until one converges.
    converged : float
        Squared distance below which a restart has found the image and no other is tried.
    patience : int
        Iterations in which the squared distance must fall by a tenth, or the restart ends.
    lr : float
        Step of L-BFGS.
    """

    paper = Paper(
        title="iDLG: Improved Deep Leakage from Gradients",
        authors="Bo Zhao, Konda Reddy Mopuri, Hakan Bilen",
        venue="arXiv 2001.02610",
        year=2020,
        published="label accuracy 100 / 100 / 100 % on MNIST / CIFAR-100 / LFW (Table 1; DLG 89.9 "
        "/ 83.3 / 79.1 %); pictures, no PSNR",
        measured="labels 32 of 32; one start, 16 images above 30 dB: photo-tiles 11 (dlg 10), "
        "CIFAR-10 10 (dlg 7), medians 45.0 and 35.4 dB (dlg 45.4, 6.7); lenet, 100 classes "
        "(FEDSIM_TEST_DATA=... python -m pytest -m slow -s tests/strategies/passive/test_idlg.py)",
    )
    needs = frozenset({Capability.UPDATES})
    unit = "iterations"
    toy = ToyCase(
        scenario={
            "threat-model": "A",
            "attack": "idlg",
            "data.dataset": "digits",
            "model.name": "lenet",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        low=40.0,
        high=199.0,
    )

    iterations: Annotated[int, Field(ge=1)] = 6000
    restarts: Annotated[int, Field(ge=1)] = 8
    converged: Annotated[float, Field(gt=0)] = 1e-5
    patience: Annotated[int, Field(ge=1)] = 250
    lr: Annotated[float, Field(gt=0)] = 1.0

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse weights, whose change is a gradient times an unknown step, and no last layer."""
        if kind == "weights":
            raise ValueError(
                "idlg matches the gradient's own size, which weights after local training do not "
                "tell; use federation.local = 'fedsgd(...)', or inverting-gradients, whose cosine "
                "is blind to size"
            )
        IDLG().check(model)

    def check_setting(self, setting: Setting) -> None:
        """Refuse updates of more than one example: the sign tells one label."""
        if (most := most_examples(setting)) > 1:
            raise ValueError(
                f"idlg is for one example and the server gets gradients of up to {most}; "
                "use federation.local = 'fedsgd(batch_size=1, ...)', dlg(batch_size=...), or "
                "inverting-gradients"
            )

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return an image and its label for each view."""
        recipe = Recipe(
            batch_size=lambda _: 1,
            labels=IDLG(),
            parametrization=lambda group: Pixels(group.spec, group.known_labels),
            objective=lambda group: SquaredDistance(group.observed),
            optimizer=lambda _: LBFGS(self.lr),
            iterations=self.iterations,
            restarts=self.restarts,
            converged=self.converged,
            patience=self.patience,
        )
        return invert(views, knowledge, recipe)
