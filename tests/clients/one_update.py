"""One client's gradient of one smooth image, and what an eavesdropper reads off it.

3 x 32 x 32 uniform noise on an 8 x 8 grid, bilinearly enlarged; flatten -> 256 -> ReLU -> 10 in
PyTorch's default initialization; mean cross-entropy; float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from fedsim import seeds
from fedsim.defense import ClientContext, Tensors, TrainingPlan

# Of a few hundred draws of this kind of image and network, one whose first-layer gradient norm
# (12.0) and 50 % pruning row lie near those of the table in test_defenses_table.py.
DRAW = 13


def context(seed: int = 0, *, round: int = 1, step: int = 0) -> ClientContext:
    """A client whose secret stream hangs on FEDSIM_SECRET_KEY and on nothing public alone."""
    return ClientContext(
        client=0,
        round=round,
        plan=TrainingPlan("gradient", 0.1, 1, 1, 1, 1),
        public=lambda *names: seeds.generator(seed, "client", 0, *names),
        secret=lambda *names: seeds.secret_generator(seed, "client", 0, *names),
        step=step,
    )


@dataclass(frozen=True)
class Eavesdropped:
    """PSNR in dB of the best row's ratio and of the least squares over all rows; cosine."""

    best_row: float
    least_squares: float
    cosine: float


def smooth_image(draw: int = DRAW) -> Tensor:
    generator = torch.Generator().manual_seed(draw)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    return interpolate(coarse, size=32, mode="bilinear").double()


def gradient(image: Tensor, draw: int = DRAW) -> Tensors:
    with seeds.seeded_globals(draw):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 10))
    model = model.double()
    loss = cross_entropy(model(image), torch.tensor([draw % 10]))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def eavesdrop(received: Tensors, clean: Tensors, image: Tensor) -> Eavesdropped:
    weight, bias = received["1.weight"], received["1.bias"]
    rows = (weight / bias.unsqueeze(1)).nan_to_num(0, 0, 0).clamp(0, 1)
    squares = ((bias @ weight) / (bias @ bias)).clamp(0, 1)
    best = (rows - image.flatten()).square().mean(dim=1).min()
    error = (squares - image.flatten()).square().mean()
    return Eavesdropped(_decibel(best), _decibel(error), cosine(received, clean))


def cosine(a: Tensors, b: Tensors) -> float:
    return float(flat(a) @ flat(b) / flat(a).norm() / flat(b).norm())


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def _decibel(mse: Tensor) -> float:
    return float(-10 * mse.clamp_min(1e-12).log10())
