"""OASIS: each image is joined by turned, flipped or sheared copies of itself.

Jeter, Nguyen, Le, Thai, "OASIS: Offsetting Active Reconstruction Attacks in Federated Learning",
ICDCS 2024, Sec. 4: train on ``D' = D + {(T(x), y)}``, so that whatever malicious neuron fires for x
alone among images fires for ``T(x)`` too, and what is read off it is a combination
``sum_T g_T T(x) / sum_T g_T`` and not x.

Promises that only where the attacker's measurement is invariant under T.  Turning by quarters keeps
the mean pixel, which is what Robbing the Fed measures by default.  Broken by any other functional:
with a random row x and its copies fall into different bins, and x comes back exactly.  Attacks on
the sum of the batch return the combination, in which eyes still make x out.  Costs a batch as many
times larger as there are copies and one; the client still counts its own images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from fedsim.attack import Paper, ToyCase
from fedsim.data import DataSpec
from fedsim.defense import Batch, ClientContext, Defense, Rank
from fedsim.registry import register

MINOR = (30.0, 45.0, 60.0)  # degrees
SHEAR = (0.3, 0.6, 0.9)
Copies = Callable[[Tensor], list[Tensor]]


@register("defense", "oasis")
@dataclass(frozen=True, kw_only=True)
class Oasis(Defense):
    """Join every image of a batch by its transforms, with its label.

    Parameters
    ----------
    transforms : {"major-rotation", "minor-rotation", "shear", "flip", "major-rotation+shear"}
        By 90, 180, 270 degrees (exact, square images); by 30, 45, 60 degrees; shears of 0.3, 0.6,
        0.9 of the height; both mirrorings; or quarters and shears, which the authors name for
        attacks on rarely active units.
    """

    paper: ClassVar[Paper] = Paper(
        title="OASIS: Offsetting Active Reconstruction Attacks in Federated Learning",
        authors="Jeter, Nguyen, Le, Thai",
        venue="ICDCS",
        year=2024,
        published="no figure read; evaluated on ImageNet and CIFAR-100 against Robbing the Fed and "
        "curious-abandon-honesty, with little loss of accuracy",
        measured="fedsim run scenarios/oasis.toml (robbing-the-fed with a random functional, four "
        "candidates for each image that the client counts, 4 x 16 photo tiles): 46 of 64 exact, 50 "
        "at 20 dB; one candidate for each: 14 and 17; the default mean functional: none exact, 18 "
        "at 20 dB, mean 16.8 dB; undefended 62 and 58 exact.  8 images, 200 bins, all bins read: "
        "mean functional 120 dB before, 14.7 to 16.0 dB after, and the average of the four turns "
        "at 120 dB; random functional 6 of 8 at 120 dB (pytest "
        "tests/clients/test_defenses_oasis.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "G",
            "attack": "robbing-the-fed(units=200, read_out='linear')",
            "defenses": "oasis",
            "data.dataset": "photo-tiles",
            "model.name": "mlp(hidden=[32])",
            "federation.clients": 4,
            "federation.local": "fedsgd(batch_size=8, lr=0.1)",
        },
        # All copies share their bin: what comes out is the mean of the four.
        figure="leak.psnr.mean",
        low=12.0,
        high=27.0,
    )
    rank: ClassVar[Rank] = Rank.DATA
    strengths: ClassVar[tuple[str, ...]] = (
        "oasis(transforms='flip')",
        "oasis(transforms='major-rotation')",
        "oasis(transforms='major-rotation+shear')",
    )
    adversary: ClassVar[str] = "robbing-the-fed(units=256, functional='random', copies=4)"

    transforms: Literal[
        "major-rotation", "minor-rotation", "shear", "flip", "major-rotation+shear"
    ] = "major-rotation"

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse to turn images by quarters that are not square."""
        spec: DataSpec = model.spec  # type: ignore[assignment]
        _, height, width = spec.shape
        if "major" in self.transforms and height != width:
            raise ValueError(
                f"images of {height} x {width} do not fit when turned by 90 degrees; use "
                "transforms='flip' or 'shear'"
            )

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:  # noqa: ARG002
        """Return originals, then all first copies, then all second ones, and so on."""
        copies = [batch[0]]
        for family in self.transforms.split("+"):
            copies += FAMILIES[family](batch[0])
        return torch.cat(copies), torch.cat([batch[1]] * len(copies))


def quarters(images: Tensor) -> list[Tensor]:
    """Return the images turned by 90, 180 and 270 degrees; no value changes, only its place."""
    return [images.rot90(turns, (2, 3)) for turns in (1, 2, 3)]


def turned(images: Tensor) -> list[Tensor]:
    """Return the images turned by less than 90 degrees, black where nothing was."""
    turns = [(math.cos(math.radians(d)), math.sin(math.radians(d))) for d in MINOR]
    return [_resampled(images, ((c, -s, 0.0), (s, c, 0.0))) for c, s in turns]


def sheared(images: Tensor) -> list[Tensor]:
    """Return the images with rows moved sideways in proportion to their height."""
    return [_resampled(images, ((1.0, by, 0.0), (0.0, 1.0, 0.0))) for by in SHEAR]


def mirrored(images: Tensor) -> list[Tensor]:
    """Return the images mirrored at each axis."""
    return [images.flip(3), images.flip(2)]


def _resampled(images: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    theta = images.new_tensor(matrix).expand(len(images), 2, 3)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


FAMILIES: dict[str, Copies] = {
    "major-rotation": quarters,
    "minor-rotation": turned,
    "shear": sheared,
    "flip": mirrored,
}
