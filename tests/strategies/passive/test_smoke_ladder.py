"""The smoke ladder: twelve rungs, from one division to a control that must fail.

``python -m pytest -m "ladder and not slow" tests/strategies/passive`` climbs it in minutes on a
CPU.  A rung is a test marked ``ladder(number)`` beside its method; those of no method are below.

1. A fully connected layer's ratio is the image to 1e-6, the bias's sign is the label.
2. The cosine is 1 at the truth, in whatever order the examples are.
3. Label counts are exact with the true mean prediction.
4. BatchNorm's statistics come back to 1e-6.
5. Inverting Gradients beats the mean image by 3 dB in 300 iterations.
6. SPEAR's batches are exact to 1e-9 in float64.
7. SME's midpoint is nearer to an update than its start.
8. R-GAP's table of unknowns, rows and ranks.
9. APRIL is exact to 1e-5, and lost with a skip connection.
10. Each example's features, read off the last layer, are off by less than a twentieth.
11. Peeling finds no fewer than stand alone.
12. Another batch's gradient is no better than a guess.
"""

import re
from pathlib import Path

import pytest
import torch

from fedsim import registry
from tests.strategies.passive.honest import Honest, batch, floor_psnr, psnr, spec, tiles
from tests.strategies.passive.test_label_rules import client_of, drawn

ATTACK = "inverting-gradients(iterations=300, tv=1e-3)"
LENET = "lenet(activation='tanh', init='default')"


def test_no_rung_is_missing():
    files = Path(__file__).parent.glob("test_*.py")
    rungs = {
        int(n) for file in files for n in re.findall(r"mark\.ladder\((\d+)\)", file.read_text())
    }
    assert rungs == set(range(1, 13))


@pytest.mark.ladder(10)
@pytest.mark.parametrize(("size", "most"), [(4, 0.01), (16, 0.05)])
def test_features_of_each_example_are_read_off_the_last_layer(size, most):
    """``(g_W[y] - o_W) / (g_b[y] - o_b)``, o being what classes that do not occur have.

    FGLA (Xue et al., INFOCOM 2023) begins with it, where no label repeats; what it makes of the
    features is a generator's, and not here.  Without the correction the others' features are in it.
    """
    client = client_of(100)
    images, labels = drawn(100, size, 0, distinct=True)
    received = client.gradient(images, labels).received
    weight, bias = received["fc.weight"].double(), received["fc.bias"].double()
    absent = torch.ones(100, dtype=torch.bool).index_fill(0, labels, False)
    others = [part[absent].mean(dim=0) * (size - 1) / size for part in (weight, bias)]
    raw = weight[labels] / bias[labels, None]
    corrected = (weight[labels] - others[0]) / (bias[labels] - others[1])[:, None]
    read, model = [], client.model()
    model.fc.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(images)
    off = [((f - read[0]).norm(dim=1) / read[0].norm(dim=1)).max() for f in (corrected, raw)]
    assert off[0] < most
    assert off[1] > most


def reconstructed(expression, images, labels):
    """Invert the gradients of single images, one client each, in one call."""
    client = Honest(expression, spec())
    views = [
        client.gradient(images[i : i + 1], labels[i : i + 1], client=i) for i in range(len(images))
    ]
    knowledge = client.knowledge("B", examples={view.label: 1 for view in views})
    return registry.build("attack", ATTACK, "attack").reconstruct(views, knowledge).examples


@pytest.mark.ladder(5)
@pytest.mark.ladder(12)
def test_three_hundred_iterations_beat_the_mean_image_and_a_wrong_gradient_does_not():
    images, labels = batch(tiles(), 4, 3)
    floor = floor_psnr(images, tiles())
    found = reconstructed(LENET, images, labels)
    assert (psnr(images, found) - floor).min() > 3
    wrong = psnr(images, found.roll(1, dims=0))
    assert (wrong - floor).mean() < 1.5
    assert torch.isfinite(found).all()
