"""Huang et al.: what their attack is told is all that sets it apart from Inverting Gradients."""

from pathlib import Path

import pytest
import torch

from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from fedsim.scenario import Scenario
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from strategies.attacks.optimization.beyond.gradattack import GradAttack
from strategies.attacks.optimization.parametrizations import NormalizedPixelsAndLabels
from tests.strategies.passive.honest import Honest, batch, spec, tiles

FOLDER = Path(__file__).parents[3] / "scenarios" / "huang2021"


def test_without_statistics_it_is_inverting_gradients():
    client = Honest("convnet(stride=2, width=8)", spec())
    view = client.gradient(*batch(tiles(), 2, 0))
    found = [
        attack.reconstruct([view], client.knowledge("B", 2))
        for attack in (
            GradAttack(iterations=20, tv=1e-3),
            InvertingGradients(iterations=20, tv=1e-3),
        )
    ]
    assert torch.equal(found[0].examples, found[1].examples)


def test_joint_labels_are_searched_with_the_images():
    search = NormalizedPixelsAndLabels(spec(), 2, torch.zeros(1), boxed=True)
    start = search.start(torch.Generator().manual_seed(0)).unsqueeze(0) * 9
    search.box(start)
    images, labels, _ = search.decode(start)
    assert images.shape == (1, 2, *spec().shape)
    assert images.min() > -1e-5
    assert images.max() < 1 + 1e-5
    assert torch.allclose(labels.sum(-1), torch.ones(1, 2))
    client = Honest("convnet(stride=2, width=8)", spec())
    image, label = batch(tiles(), 1, 0)
    attack = GradAttack(iterations=150, tv=1e-2, labels="joint")
    found = attack.reconstruct([client.gradient(image, label)], client.knowledge("B", 1))
    assert found.labels.tolist() == label.tolist()


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_scenario_of_the_evaluation_is_valid(file):
    """On other data, and from untrained weights: CIFAR-10 and the first scenario's are not here."""
    changes = {"data.dataset": "photo-tiles", "model.weights": "none"}
    flat = {**Scenario.load(file).flat(), **changes}
    if "running" in flat["attack"]:
        with pytest.raises(ScenarioError, match="are 0 and 1"):
            check(Parts(Scenario.from_flat(flat)))
        flat["model.batchnorm"] = "shared"
    check(Parts(Scenario.from_flat(flat)))
