"""Small convolutions leave oneDNN out, and nothing else does."""

import pytest
import torch

from fedsim.models import initial_model
from strategies.attacks.optimization.convolutions import convolutions_for, is_narrow
from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.parametrizations import Candidate
from tests.strategies.passive.honest import batch, spec, tiles


@pytest.mark.parametrize(
    ("shape", "expression", "without"),
    [
        ((1, 1), "lenet", True),
        ((2, 1), "lenet5", True),
        ((1, 4), "lenet", False),
        ((3, 1), "lenet", False),
        ((1, 1), "convnet", False),
        ((1, 1), "resnet20", False),
        ((1, 1), "mlp", False),
    ],
)
def test_only_few_images_in_a_narrow_network_leave_onednn_out(shape, expression, without):
    before = torch.backends.mkldnn.enabled
    narrow = is_narrow(initial_model(expression, spec(), 0))
    with convolutions_for(torch.zeros(*shape, 3, 32, 32), narrow):
        assert torch.backends.mkldnn.enabled == (before and not without)
    assert torch.backends.mkldnn.enabled == before


def test_both_ways_give_the_same_gradient():
    images, labels = batch(tiles(), 1, 0)
    model = initial_model("lenet", spec(), 0).eval()
    gradients = BatchGradients(model, [name for name, _ in model.named_parameters()])
    candidate = Candidate(images.unsqueeze(0), labels.unsqueeze(0))
    plain, _ = gradients(candidate)
    with convolutions_for(candidate.images, gradients.narrow):
        found, _ = gradients(candidate)
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other)
