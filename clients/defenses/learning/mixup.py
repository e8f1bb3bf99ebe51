"""MixUp: the client trains on convex mixtures of its images, and so that is what leaks.

``x~ = sum_{j=1..k} w_j x_{p_j}``, ``y~ = sum_j w_j onehot(y_{p_j})``, w on the simplex.  Zhang,
Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018; as a defense
with k = 4 and 6 and a cap of 0.65 on w: Huang, Gupta, Song, Li, Arora, "Evaluating Gradient
Inversion Attacks and Defenses in Federated Learning", NeurIPS 2021.

Promises: no single image has a gradient of its own in the upload.  Does not promise that the
mixture hides: exact attacks return ``x~`` exactly, and up to ``cap`` of one image stays readable in
it.  Broken by reconstructing many mixtures of the same images over epochs and un-mixing them:
clustering and least squares (Carlini et al., "Is Private Learning Possible with Instance
Encoding?", IEEE S&P 2021).  With per-example clipping and noise the unit protected is a mixture;
an example is in about k of them, so that an epsilon told for one step's examples is too small.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from clients.defenses.learning.mixing import Mixing
from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Rank
from fedsim.registry import register


@register("defense", "mixup")
@dataclass(frozen=True, kw_only=True)
class MixUp(Mixing):
    """Train on capped mixtures of ``k`` images and of their labels."""

    paper: ClassVar[Paper] = Paper(
        title="Evaluating Gradient Inversion Attacks and Defenses in Federated Learning",
        authors="Huang, Gupta, Song, Li, Arora",
        venue="NeurIPS",
        year=2021,
        published="CIFAR-10 accuracy 92.3 with k = 4, 90.4 with k = 6 (as quoted elsewhere)",
        measured="fedsim run scenarios/mixup.toml (robbing-the-fed, 4 x 16 mixtures of photo "
        "tiles): none exact, 18 of 243 images that were mixed at 20 dB, mean 18.8 dB; undefended "
        "58 of 64 exact, 61 at 20 dB.  Ratio attack, batch 1: the mixture at 120 dB, the image 14 "
        "to 20 dB (mean of 4, six seeds); un-mixed exactly from two epochs where classes differ "
        "(pytest tests/clients/test_defenses_mixup.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "mixup"},
        # The ratio is exact, of the mixture: its largest part is half an image or less.
        figure="leak.psnr.mean",
        low=10.0,
        high=26.0,
    )
    rank: ClassVar[Rank] = Rank.DATA
    strengths: ClassVar[tuple[str, ...]] = ("mixup(k=2)", "mixup(k=4)", "mixup(k=6)")
    adversary: ClassVar[str] = "unmixing(k=4)"
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {
        "model.name": "mlp(hidden=[256])",
        "federation.clients": 8,
        "federation.rounds": 48,
        "federation.local": "fedsgd(batch_size=1, lr=0.01)",
    }
