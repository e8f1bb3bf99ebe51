"""Deep Leakage from Gradients: bimodal, and it knows which mode it is in."""

import dataclasses

import pytest
import torch

from fedsim.data import DataSpec, load_dataset
from strategies.attacks.optimization.basic.dlg import DLG
from strategies.attacks.optimization.gradients import BatchGradients
from strategies.attacks.optimization.matching import Matching
from strategies.attacks.optimization.objectives import SquaredDistance
from strategies.attacks.optimization.parametrizations import Pixels, PixelsAndLabels
from tests.strategies.passive.honest import Honest, batch, cifar10, psnr, spec, tiles


def digits():
    return load_dataset("digits").train


def digits_client() -> Honest:
    return Honest("lenet", load_dataset("digits").spec)


def test_a_digit_and_its_label_come_back_without_any_knowledge_but_the_update():
    client = digits_client()
    images, labels = batch(digits(), 1, 0)
    knowledge = client.knowledge("A")
    found = DLG(iterations=1500).reconstruct([client.gradient(images, labels)], knowledge)
    assert psnr(images, found.examples).item() > 30
    assert found.labels.tolist() == labels.tolist()
    assert {capability.value for capability in knowledge.used} == {"updates"}


def problem(parametrization):
    """Return the matching of one digit's gradient, the digit, and its label."""
    client = dataclasses.replace(digits_client(), dtype=torch.float64)
    images, labels = batch(digits(), 1, 0, torch.float64)
    received = client.gradient(images, labels).received
    observed = torch.cat([tensor.flatten() for tensor in received.values()]).unsqueeze(0)
    operator = BatchGradients(client.model(), list(received))
    found = Matching(operator, parametrization(client.spec, labels), SquaredDistance(observed))
    return found, images.flatten(1), labels, received


def test_the_distance_is_zero_at_the_truth_once_its_label_is_certain():
    """A softmax is one-hot only in the limit: the distance falls with the logit, and reaches 0."""
    matching, pixels, labels, _ = problem(lambda spec, _: PixelsAndLabels(spec, 1))
    one_hot = torch.nn.functional.one_hot(labels, 10)
    distances = [
        matching.evaluate(torch.cat([pixels, logit * one_hot], dim=1)).distance.item()
        for logit in (0, 2, 8, 32, 1000)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1e-2
    assert distances[-1] < 1e-20


def test_no_image_makes_up_for_a_wrong_label():
    """``g_b = p - onehot``: in the true label's entry a wrong one is off by 1 - p_y or more."""
    matching, pixels, labels, received = problem(lambda spec, y: Pixels(spec, (y[None] + 1) % 10))
    least = received["fc.bias"][labels].item() ** 2
    generator = torch.Generator().manual_seed(0)
    for at in (pixels, *torch.randn(5, 1, pixels.shape[1], generator=generator).double()):
        assert matching.evaluate(at).distance.item() > least > 0.1


def test_a_solved_view_is_not_started_again():
    client = digits_client()
    views = [client.gradient(*batch(digits(), 1, seed), client=seed) for seed in range(2)]
    for converged, tried in ((1e-30, 3), (1e3, 1)):
        attack = DLG(iterations=30, restarts=3, converged=converged)
        found = attack.reconstruct(views, client.knowledge("A"))
        assert all(f": {tried} restart" in line for line in found.receipts)
        assert found.cost.gradient_evaluations == 31 * tried * len(views)


def test_a_start_that_is_not_finite_is_dropped_and_said_so(monkeypatch):
    client = digits_client()
    images, labels = batch(digits(), 1, 0)
    begin, calls = PixelsAndLabels.start, []

    def start(self, generator):
        calls.append(generator)
        variables = begin(self, generator)
        return variables * torch.nan if len(calls) == 2 else variables  # the first shows the size

    monkeypatch.setattr(PixelsAndLabels, "start", start)
    attack = DLG(iterations=50, restarts=2, patience=50)
    found = attack.reconstruct([client.gradient(images, labels)], client.knowledge("A"))
    assert "2 restarts, 1 of them ended not finite" in found.receipts[0]
    assert found.examples.isfinite().all()
    assert found.scores.isfinite().all()


def test_where_no_start_is_finite_there_is_no_candidate(monkeypatch):
    client = digits_client()
    begin = PixelsAndLabels.start
    monkeypatch.setattr(PixelsAndLabels, "start", lambda *of: begin(*of) * torch.nan)
    view = client.gradient(*batch(digits(), 1, 0))
    found = DLG(iterations=5, restarts=2).reconstruct([view], client.knowledge("A"))
    assert len(found.examples) == len(found.labels) == len(found.scores) == 0
    assert "2 of them ended not finite; nothing found" in found.receipts[0]


def test_weights_are_refused_with_a_remedy():
    model = Honest("lenet", spec()).model()
    DLG().check(model, "gradient")
    with pytest.raises(ValueError, match="inverting-gradients"):
        DLG().check(model, "weights")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("source", ["photo-tiles", "cifar10"])
def test_at_least_8_of_10_images_come_back_with_8_restarts(source):
    split = tiles() if source == "photo-tiles" else cifar10()
    hundred = DataSpec((3, 32, 32), 100, spec().mean, spec().std)
    truth, views, first = [], [], None
    for seed in range(10):
        client = Honest("lenet", dataclasses.replace(hundred))
        first = first or client
        truth.append(batch(split, 1, seed))
        views.append(client.gradient(*truth[-1], client=seed))
    found = DLG().reconstruct(views, first.knowledge("A"))
    reached = torch.stack(
        [psnr(pair[0], found.examples[found.views == i])[0] for i, pair in enumerate(truth)]
    )
    right = sum(found.labels[i].item() == truth[i][1].item() for i in range(10))
    print(f"{source}: PSNR {[round(v) for v in reached.tolist()]}, labels {right} of 10,", end=" ")
    print(f"{found.cost.gradient_evaluations} gradient evaluations")
    assert (reached > 30).sum() >= 8
