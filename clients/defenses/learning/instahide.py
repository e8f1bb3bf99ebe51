"""InstaHide, intra-client: mixtures of a client's images under a random sign for every pixel.

``x^ = s * x~`` with ``x~`` the mixture of :mod:`clients.defenses.learning.mixing` and s uniform on
``{-1, 1}^(C x H x W)``, new for every sample and step; labels mixed, no sign.  Huang, Song, Li,
Arora, "InstaHide: Instance-hiding Schemes for Private Distributed Learning", ICML 2020, Alg. 1
without the public images ("intra", as Huang et al., NeurIPS 2021, evaluate it against gradients).

Signs mean something only around zero, so that they are taken in standardized values: a pixel x
becomes ``m + s (x - m)`` with the channel's public mean m, and may leave ``[0, 1]``.

Promises less than it seems: ``|x^| = |x~|`` is in every sample, the sign mask hides one bit a
value.  Broken by Carlini et al., "Is Private Learning Possible with Instance Encoding?", IEEE S&P
2021: cluster the absolute values by image, then phase retrieval over a few encodings.  Their
impossibility result covers every such encoding that learns as well.  Where encodings are read
exactly, 64 of eight images give all eight exactly (``adversary``).  The released defense needs a
random generator library that is no longer maintained; here masks come from the client's secret
stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clients.defenses.learning.mixing import Mixing
from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Rank
from fedsim.registry import register


@register("defense", "instahide")
@dataclass(frozen=True, kw_only=True)
class InstaHide(Mixing):
    """Train on capped mixtures of ``k`` images whose standardized values have random signs."""

    paper: ClassVar[Paper] = Paper(
        title="InstaHide: Instance-hiding Schemes for Private Distributed Learning",
        authors="Huang, Song, Li, Arora",
        venue="ICML",
        year=2020,
        published="CIFAR-10 accuracy, intra: 90.0 with k = 4, 88.2 with k = 6; with pruning 0.9 "
        "86.1 and 83.2 (Huang et al., NeurIPS 2021, as quoted elsewhere)",
        measured="fedsim run scenarios/instahide.toml (robbing-the-fed, 4 x 16 encodings of photo "
        "tiles): 0 of 247 images that were mixed at 20 dB, mean 13.8 dB; undefended 61 of 64.  "
        "Ratio attack, batch 1: 12 to 14 dB (mean of 4, six seeds); un-mixed over 64 rounds all 16 "
        "exactly (fedsim run scenarios/unmixing_instahide.toml).  Three epochs' encodings of "
        "four images of different classes give the absolute values of all four back to 1e-6 "
        "(pytest tests/clients/test_defenses_instahide.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "instahide"},
        # The ratio is exact, of an encoding that looks like noise around the mean.
        figure="leak.psnr.mean",
        low=7.0,
        high=19.0,
    )
    rank: ClassVar[Rank] = Rank.DATA
    strengths: ClassVar[tuple[str, ...]] = ("instahide(k=2)", "instahide(k=4)", "instahide(k=6)")
    adversary: ClassVar[str] = "unmixing(k=4, signs=True)"
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {
        "model.name": "mlp(hidden=[256])",
        "federation.clients": 8,
        "federation.rounds": 64,
        "federation.local": "fedsgd(batch_size=1, lr=0.01)",
    }

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:
        """Mix, then flip: images ``[B * k, C, H, W]`` become ``[B, C, H, W]``."""
        images, labels = super().transform_batch(batch, ctx)
        assert ctx.spec is not None
        generator = ctx.secret(self.name, "signs", ctx.round, ctx.step)
        mean = images.new_tensor(ctx.spec.mean).view(-1, 1, 1)
        return mean + signs(images, generator) * (images - mean), labels


def signs(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return independent fair signs, ``[B, C, H, W]``."""
    bits = torch.randint(2, images.shape, generator=generator)
    return (2 * bits - 1).to(images)
