"""Automatic transformation search: each image is replaced by a transform of itself.

Gao, Guo, Zhang, Qiu, Wen, Liu, "Privacy-preserving Collaborative Learning with Automatic
Transformation Search", CVPR 2021.  A policy is a sequence of up to three of 50 transforms (those of
AutoAugment, with a magnitude of 0 to 9 each).  The authors search offline for policies whose
gradient tells little of an image, ``S_pri = 1/20 sum_t cos(grad(x_t), grad(x))`` along
``x_t = (t/20) x + (1 - t/20) noise``, and that still train.  Here are their transforms and the
policies that they found for CIFAR-100; the search is not.

Promises nothing of ``T(x)``: exact attacks return it, and a metric against x flatters the defense.
Broken early in training (Balunovic et al., ICLR 2022), and by undoing the transforms, which are
public: of ``3-1-7`` two are shifts and one is affine in the pixel values.  In the released code a
transform's probability is read and never used (all are always applied), which is kept here; its
search script has a minus sign that is no ASCII and does not parse.  Its usual random crop and flip
before the policy are augmentation, and left out.
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from clients.defenses.toy import RATIO_ATTACK
from fedsim.attack import Paper, ToyCase
from fedsim.defense import Batch, ClientContext, Defense, Rank
from fedsim.registry import register

#: The authors' 50 transforms and magnitudes, in their order: policies name them by number.
_LIBRARY = (
    "invert 7, contrast 6, rotate 2, translateX 9, sharpness 1, sharpness 3, shearY 2, "
    "translateY 2, autocontrast 5, equalize 2, shearY 5, posterize 5, color 3, brightness 5, "
    "sharpness 9, brightness 9, equalize 5, equalize 1, contrast 7, sharpness 5, color 5, "
    "translateX 5, equalize 7, autocontrast 8, translateY 3, sharpness 6, brightness 6, color "
    "8, solarize 0, invert 0, equalize 0, autocontrast 0, equalize 8, equalize 4, color 5, "
    "equalize 5, autocontrast 4, solarize 4, brightness 3, color 0, solarize 1, autocontrast 0, "
    "translateY 3, translateY 3, autocontrast 1, solarize 1, equalize 5, invert 0, translateY "
    "3, autocontrast 1"
)
TRANSFORMS = tuple(_LIBRARY.split(", "))


@register("defense", "ats")
@dataclass(frozen=True, kw_only=True)
class Ats(Defense):
    """Transform every image by one of the policies; which, and in which direction, is secret.

    Parameters
    ----------
    policies : str
        Numbers of transforms joined by ``-``, policies by ``+``; each image gets one of them.
    """

    paper: ClassVar[Paper] = Paper(
        title="Privacy-preserving Collaborative Learning with Automatic Transformation Search",
        authors="Gao, Guo, Zhang, Qiu, Wen, Liu",
        venue="CVPR",
        year=2021,
        published="no figure read",
        measured="fedsim run scenarios/ats.toml (robbing-the-fed, 4 x 16 photo tiles): none "
        "exact, 2 of 64 at 20 dB, mean 12.8 dB; undefended 58 exact.  Ratio attack, batch 1: T(x) "
        "at 120 dB, x 11 to 15 dB (mean of 4, five seeds); 3-1-7 undone to 1e-6 but for the rims "
        "that the shifts cut off and values that the contrast cuts off (pytest "
        "tests/clients/test_defenses_ats.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={**RATIO_ATTACK, "defenses": "ats"},
        # The ratio is exact, of the transformed image.
        figure="leak.psnr.mean",
        low=7.0,
        high=24.0,
    )
    rank: ClassVar[Rank] = Rank.DATA
    strengths: ClassVar[tuple[str, ...]] = (
        "ats(policies='43-18-18')",
        "ats(policies='3-1-7')",
        "ats(policies='3-1-7+43-18-18')",
    )
    # It reads T(x) and goes from there to x, as rehearsals of both directions taught it.
    adversary: ClassVar[str] = "stand-in-inversion(defense=\"ats(policies='3-1-7')\")"

    policies: str = "3-1-7+43-18-18"

    def __post_init__(self) -> None:
        self._parsed()

    def _parsed(self) -> list[list[str]]:
        try:
            numbers = [[int(n) for n in policy.split("-")] for policy in self.policies.split("+")]
        except ValueError:
            numbers = [[-1]]
        if any(not 0 <= n < len(TRANSFORMS) for policy in numbers for n in policy):
            raise ValueError(
                f"policies are numbers below {len(TRANSFORMS)} joined by - and +, such as "
                f"'3-1-7+43-18-18', not {self.policies!r}"
            )
        return [[TRANSFORMS[n] for n in policy] for policy in numbers]

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:
        """Transform each image by a policy of its own; labels stay."""
        generator = ctx.secret(self.name, ctx.round, ctx.step)
        policies = self._parsed()
        images = []
        for image in batch[0]:
            policy = policies[int(torch.randint(len(policies), (), generator=generator))]
            signs = 2 * torch.randint(2, (len(policy),), generator=generator) - 1
            images.append(reduce(_step, zip(policy, signs.tolist(), strict=True), image))
        return torch.stack(images), batch[1]


def _step(image: Tensor, step: tuple[str, int]) -> Tensor:
    return transformed(image, *step)


def transformed(image: Tensor, transform: str, sign: int) -> Tensor:
    """Apply one of ``TRANSFORMS`` to ``[C, H, W]`` in ``[0, 1]``.

    ``sign`` is the direction of shears, shifts and enhancements.  Ranges from magnitude 0 to 9:
    shear 0 to 0.3, shift 0 to 150/331 of the side, rotation 0 to 30 degrees (one way, gray around),
    enhancements 1 to 1 +- 0.5, posterize 8 to 4 bits, solarize above 256 to 0.
    """
    name, magnitude = transform.split()
    level = int(magnitude) / 9
    if name in ("shearX", "shearY", "translateX", "translateY"):
        return moved(image, name, sign * level)
    if name in ("color", "contrast", "sharpness", "brightness"):
        return enhanced(image, name, 1 + sign * 0.5 * level)
    return recolored(image, name, level)


def moved(image: Tensor, name: str, by: float) -> Tensor:
    """Shear along an axis by ``0.3 * by``, or shift by ``150/331 * by``; black comes in."""
    axis = 2 if name.endswith("X") else 1
    if name.startswith("translate"):
        shift = -round(150 / 331 * by * image.shape[axis])
        kept = image.roll(shift, axis)
        empty = slice(image.shape[axis] + shift, None) if shift < 0 else slice(0, shift)
        index = (slice(None),) * axis + (empty,)
        kept[index] = 0.0
        return kept
    slope = 0.3 * by * image.shape[3 - axis] / image.shape[axis]  # of normalized coordinates
    rows = ((1.0, slope, slope), (0.0, 1.0, 0.0))
    if axis == 1:
        rows = ((1.0, 0.0, 0.0), (slope, 1.0, slope))
    grid = affine_grid(image.new_tensor([rows]), [1, *image.shape], align_corners=False)
    sheared: Tensor = grid_sample(image.unsqueeze(0), grid, mode="bicubic", align_corners=False)
    return sheared[0].clamp(0, 1)


def enhanced(image: Tensor, name: str, factor: float) -> Tensor:
    """Blend with black, gray mean, gray image or blur: 1 leaves the image as it is."""
    from torchvision.transforms.v2 import functional  # a second to import: only who needs it

    if name == "color" and image.shape[0] == 1:
        return image
    adjust = {
        "brightness": functional.adjust_brightness,
        "contrast": functional.adjust_contrast,
        "color": functional.adjust_saturation,
        "sharpness": functional.adjust_sharpness,
    }
    result: Tensor = adjust[name](image, factor)
    return result


def recolored(image: Tensor, name: str, level: float) -> Tensor:
    """Apply what has no direction: invert, solarize, posterize, equalize, autocontrast, rotate."""
    from torchvision.transforms.v2 import functional

    if name == "invert":
        return 1 - image
    if name == "solarize":
        return torch.where(image * 255 >= 256 * (1 - level), 1 - image, image)
    if name == "rotate":
        turned: Tensor = functional.rotate(image, 30 * level, fill=[128 / 255])
        return turned
    bytes_ = (image * 255).round().to(torch.uint8)
    if name == "posterize":
        dropped = 8 - math.floor(8 - 4 * level + 0.5)
        bytes_ = bytes_ >> dropped << dropped
    elif name == "equalize":
        bytes_ = functional.equalize(bytes_)
    else:
        bytes_ = functional.autocontrast(bytes_)
    return bytes_.to(image.dtype) / 255
