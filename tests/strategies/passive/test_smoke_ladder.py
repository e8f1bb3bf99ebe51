"""Two rungs that belong to no single method: a short run beats guessing, another's gradient not.

The others are in the methods' own tests: exact inversion of a first layer, the sign rule and
analytic counts (test_linear_inversion, test_idlg, test_labels), cosine 0 at the truth and
blind to order (test_engine), recovered BatchNorm statistics (test_statistics), SPEAR, the surrogate
model's midpoint, R-GAP's ranks, APRIL (test_spear, test_sme, test_r_gap, test_april), peeling
(test_peeling).  FGLA's corrected features are a generative attack's.
"""

import torch

from fedsim import registry
from tests.strategies.passive.honest import Honest, batch, floor_psnr, psnr, spec, tiles

ATTACK = "inverting-gradients(iterations=300, tv=1e-3)"
LENET = "lenet(activation='tanh', init='default')"


def reconstructed(expression, images, labels):
    """Invert the gradients of single images, one client each, in one call."""
    client = Honest(expression, spec())
    views = [
        client.gradient(images[i : i + 1], labels[i : i + 1], client=i) for i in range(len(images))
    ]
    knowledge = client.knowledge("B", examples={view.label: 1 for view in views})
    return registry.build("attack", ATTACK, "attack").reconstruct(views, knowledge).examples


def test_three_hundred_iterations_beat_the_mean_image_and_a_wrong_gradient_does_not():
    images, labels = batch(tiles(), 4, 3)
    floor = floor_psnr(images, tiles())
    found = reconstructed(LENET, images, labels)
    assert (psnr(images, found) - floor).min() > 3
    wrong = psnr(images, found.roll(1, dims=0))
    assert (wrong - floor).mean() < 1.5
    assert torch.isfinite(found).all()
