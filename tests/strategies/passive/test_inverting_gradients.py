"""Inverting Gradients: what it finds, what it is blind to, and what it is told."""

import dataclasses

import pytest
import torch
from torch import nn

from fedsim.data import Split
from fedsim.errors import NotGranted, ScenarioError
from fedsim.models import travelling
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from tests.strategies.passive.honest import (
    Honest,
    batch,
    cifar10,
    floor_psnr,
    matched_psnr,
    spec,
    tiles,
)

CIFAR_MEAN, CIFAR_STD = (0.4915, 0.4823, 0.4468), (0.247, 0.2435, 0.2616)


def captured(client: Honest, split: Split, size: int, count: int, sent=None):
    """Return the private batches of some clients, and their views."""
    batches = [batch(split, size, seed) for seed in range(count)]
    views = [client.gradient(*pair, client=i, sent=sent) for i, pair in enumerate(batches)]
    return [images for images, _ in batches], views


def reached(attack: InvertingGradients, client: Honest, truth, views, **known) -> torch.Tensor:
    """Return the PSNR of every true image, matched within its view, ``[V, B]``."""
    size = len(truth[0])
    knowledge = client.knowledge("B", {view.label: size for view in views}, **known)
    found = attack.reconstruct(views, knowledge)
    return torch.stack(
        [matched_psnr(images, found.examples[found.views == i]) for i, images in enumerate(truth)]
    )


def test_300_iterations_beat_the_mean_image():
    client = Honest("convnet", spec())
    truth, views = captured(client, tiles(), 1, 2)
    psnr = reached(InvertingGradients(iterations=300, tv=1e-3), client, truth, views)
    floor = torch.stack([floor_psnr(images, tiles()) for images in truth])
    assert (psnr > floor + 3).all()
    assert psnr.max() < 60


def test_clipping_and_one_step_of_fedavg_hide_nothing_from_the_cosine():
    client = Honest("convnet", spec())
    truth, views = captured(client, tiles(), 1, 1)
    clipped = {name: 0.01 * tensor for name, tensor in views[0].received.items()}
    images, labels = batch(tiles(), 1, 0)
    attack = InvertingGradients(iterations=300, tv=1e-3)
    floor = floor_psnr(truth[0], tiles())
    for view in (
        dataclasses.replace(views[0], received=clipped),
        client.weights(images, labels, lr=0.1),
    ):
        assert reached(attack, client, truth, [view]).item() > floor + 3


def test_among_restarts_the_lowest_distance_wins():
    client = Honest("lenet", spec())
    _, views = captured(client, tiles(), 1, 2)
    counts = {view.label: 1 for view in views}
    scores = {}
    for restarts in (1, 4):
        attack = InvertingGradients(iterations=60, restarts=restarts)
        found = attack.reconstruct(views, client.knowledge("B", counts))
        scores[restarts] = found.scores
        assert found.cost.gradient_evaluations == 61 * restarts * len(views)
        assert [f"{restarts} restart" in line for line in found.receipts] == [True, True]
    assert (scores[4] >= scores[1] - 1e-4).all()


def test_views_of_different_weights_and_sizes_are_each_inverted_under_their_own():
    clients = [Honest("lenet", spec(), seed=seed) for seed in (0, 1)]
    truth, views = [], []
    for number, (client, size) in enumerate([(clients[0], 1), (clients[1], 1), (clients[1], 2)]):
        images, labels = batch(tiles(), size, number)
        truth.append(images)
        views.append(client.gradient(images, labels, client=number))
    counts = {view.label: len(images) for view, images in zip(views, truth, strict=True)}
    found = InvertingGradients(iterations=300).reconstruct(views, clients[0].knowledge("B", counts))
    assert found.views.tolist() == [0, 1, 2, 2]
    assert found.examples.shape == (4, 3, 32, 32)
    assert found.labels.shape == (4,)
    for index in range(2):  # weights from the wrong round would leave the distance near 1
        assert found.scores[index] > -0.1


def test_a_view_that_says_nothing_is_left_out_and_named():
    client = Honest("lenet", spec())
    _, views = captured(client, tiles(), 1, 3)
    for index, value in ((0, 0.0), (2, torch.nan)):
        empty = {name: torch.full_like(t, value) for name, t in views[index].received.items()}
        views[index] = dataclasses.replace(views[index], received=empty)
    knowledge = client.knowledge("B", {view.label: 1 for view in views})
    found = InvertingGradients(iterations=5).reconstruct(views, knowledge)
    assert found.views.tolist() == [1]
    assert sum("left out" in line for line in found.receipts) == 2


def test_batchnorm_in_train_mode_and_double_precision_run():
    client = Honest("resnet20(width=4)", spec(), dtype=torch.float64)
    truth, views = captured(client, tiles(), 2, 2)
    for mode in ("frozen", "private"):
        psnr = reached(InvertingGradients(iterations=3), client, truth, views, batchnorm=mode)
        assert psnr.isfinite().all()


def test_it_uses_updates_and_basics_and_is_told_how_far_it_is():
    client = Honest("lenet", spec())
    _, views = captured(client, tiles(), 1, 1)
    knowledge = client.knowledge("B", {view.label: 1 for view in views})
    told = []
    knowledge.progress = lambda done, total, text: told.append((done, total))
    InvertingGradients(iterations=100, restarts=2).reconstruct(views, knowledge)
    assert {capability.value for capability in knowledge.used} == {"updates", "basics"}
    assert told[-1] == (200, 200)
    assert told == sorted(told)


def test_what_is_left_out_does_not_matter_to_the_match_but_to_labels():
    """The last layer replaced by anything that says the same label: the same images, bit by bit."""
    client = Honest("convnet(width=8)", spec())
    _, (view,) = captured(client, tiles(), 1, 1)
    other = {n: 3 * t if n.startswith("fc") else t for n, t in view.received.items()}
    spoilt = dataclasses.replace(view, received=other)
    attack = InvertingGradients(iterations=20, without=["fc."])
    found, same = (attack.reconstruct([v], client.knowledge("B")) for v in (view, spoilt))
    assert torch.equal(found.examples, same.examples)
    assert torch.equal(found.labels, same.labels)
    plain = InvertingGradients(iterations=20)
    found, differs = (plain.reconstruct([v], client.knowledge("B")) for v in (view, spoilt))
    assert not torch.equal(found.examples, differs.examples)


def test_what_is_left_out_may_be_anything_at_all():
    """Not a number in a layer of no consequence: the same images as with zeros there."""
    client = Honest("convnet(width=8)", spec())
    _, (view,) = captured(client, tiles(), 1, 1)
    first = next(iter(view.received))
    broken, zero = (
        dataclasses.replace(
            view, received={**view.received, first: torch.full_like(view.received[first], value)}
        )
        for value in (float("nan"), 0.0)
    )
    attack = InvertingGradients(iterations=20, without=[first])
    found, same = (attack.reconstruct([v], client.knowledge("B")) for v in (broken, zero))
    assert len(found.examples) == 1
    assert torch.equal(found.examples, same.examples)
    blind = InvertingGradients(iterations=20).reconstruct([broken], client.knowledge("B"))
    assert "not finite; left out" in " ".join(blind.receipts)


def test_weights_that_are_not_finite_count_as_those_that_were_sent():
    """After local training: what is left out did not move, it did not go to zero."""
    client = Honest("convnet(stride=2, width=8)", spec())
    images, labels = batch(tiles(), 3, 0)
    view = client.weights(images, labels, lr=0.1, batch_size=1)
    unmoved = view.sent["fc.bias"]
    found, same = (
        InvertingGradients(iterations=3, without=["fc.bias"]).reconstruct(
            [dataclasses.replace(view, received={**view.received, "fc.bias": tensor})],
            client.knowledge("B", 3, epochs=1),
        )
        for tensor in (torch.full_like(unmoved, torch.inf), unmoved)
    )
    assert torch.equal(found.labels, same.labels)
    assert torch.equal(found.examples, same.examples)


def test_parts_that_leave_out_nothing_or_everything_are_refused():
    model = Honest("lenet", spec()).model()
    with pytest.raises(ValueError, match=r"no parameter's name has 'fcc'; there is: .*fc\.weight"):
        InvertingGradients(without=["fc", "fcc"]).check(model, "gradient")
    with pytest.raises(ValueError, match="every parameter"):
        InvertingGradients(without=["weight", "bias"]).check(model, "gradient")
    InvertingGradients(without=["fc"]).check(model, "gradient")


def test_labels_come_from_the_rule_that_is_named():
    client = Honest("lenet", spec())
    images, labels = batch(tiles(), 2, 0)
    view = client.gradient(images, labels)
    attack = InvertingGradients(iterations=5, labels="oracle")
    assert attack.oracles == {"labels"}
    with pytest.raises(NotGranted):
        attack.reconstruct([view], client.knowledge("B", 2))
    knowledge = client.knowledge("B", 2, labels={view.label: labels})
    assert attack.reconstruct([view], knowledge).labels.tolist() == labels.tolist()
    with pytest.raises(ScenarioError, match="analytic"):
        InvertingGradients(labels="analytical")


def test_where_every_view_is_left_out_there_is_no_candidate():
    client = Honest("lenet", spec())
    _, views = captured(client, tiles(), 1, 1)
    empty = {name: torch.zeros_like(tensor) for name, tensor in views[0].received.items()}
    views = [dataclasses.replace(views[0], received=empty)]
    found = InvertingGradients(iterations=5).reconstruct(views, client.knowledge("B", 1))
    assert len(found.examples) == len(found.views) == len(found.labels) == len(found.scores) == 0


def test_simulated_local_training_explains_what_one_step_does_not():
    client = Honest("convnet(width=8, stride=2)", spec())
    images, labels = batch(tiles(), 2, 1)
    order = labels.argsort()  # the guessed order: labels from a rule are sorted
    view = client.weights(images[order], labels[order], lr=0.1, batch_size=1, epochs=2)
    same = {"iterations": 100, "tv": 1e-2}
    scores = []
    for simulate in (False, True):
        knowledge = client.knowledge("C", 2, lr=0.1, batch_size=1, epochs=2)
        attack = InvertingGradients(**same, simulate=simulate)
        found = attack.reconstruct([view], knowledge)
        assert {capability.value for capability in attack.required} == (
            {"updates", "basics"} | ({"details"} if simulate else set())
        )
        assert found.cost.gradient_evaluations == 101 * (4 if simulate else 1)
        scores.append(found.scores[0])
    print(scores)
    assert scores[1] > scores[0] / 2


def test_what_cannot_be_simulated_is_refused():
    attack = InvertingGradients(simulate=True)
    model = Honest("lenet", spec()).model()
    with pytest.raises(ValueError, match="simulate=False"):
        attack.check(model, "gradient")
    attack.check(model, "weights")
    client = Honest("lenet", spec())
    view = client.weights(*batch(tiles(), 1, 0), lr=0.1)
    with pytest.raises(NotGranted, match="C"):
        attack.reconstruct([view], client.knowledge("B"))


@pytest.mark.gpu
def test_the_gpu_follows_the_cpu():
    client = Honest("convnet", spec(), dtype=torch.float64)
    _, views = captured(client, tiles(), 2, 2)
    counts = {view.label: 2 for view in views}
    scores = []
    for device in ("cpu", "cuda"):
        knowledge = client.knowledge("B", counts)
        knowledge.device = torch.device(device)
        found = InvertingGradients(iterations=20).reconstruct(views, knowledge)
        scores.append(found.scores)
    assert torch.allclose(*scores, rtol=1e-3)


# -- figures ---------------------------------------------------------------------------------------


def cifar_client() -> Honest:
    return Honest("convnet", dataclasses.replace(spec(), mean=CIFAR_MEAN, std=CIFAR_STD))


def trained(client: Honest, split: Split, steps: int) -> dict[str, torch.Tensor]:
    """Return what travels after some steps of SGD at batch size 64."""
    model, generator = client.model().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        images, labels = split.batch(torch.randint(len(split), (64,), generator=generator))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in travelling(model).items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lenet_on_cifar10_comes_near_the_paper():
    client = dataclasses.replace(cifar_client(), expression="lenet")
    truth, views = captured(client, cifar10(), 1, 10)
    psnr = reached(InvertingGradients(tv=1e-4), client, truth, views)
    print(
        f"lenet, 4,000 iterations: {psnr.mean():.1f} +- {psnr.std():.1f} dB (paper: 18.00 +- 3.33)"
    )
    assert 18 <= psnr.mean() <= 21


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("network", "size", "tv", "steps", "low", "high"),
    [
        ("convnet(stride=2)", 1, 1e-6, 0, 25, 30),
        ("convnet(stride=2)", 4, 1e-2, 0, 22, 26),
        ("convnet(stride=2)", 1, 1e-2, 500, 18, 22.5),
        ("convnet", 1, 1e-6, 0, 33, 39),
        ("convnet", 4, 1e-6, 0, 23.5, 28.5),
        ("convnet", 4, 1e-2, 0, 27, 31),
        ("convnet", 1, 1e-2, 500, 13, 16),
    ],
)
def test_1000_iterations_on_cifar10(network, size, tv, steps, low, high):
    client = dataclasses.replace(cifar_client(), expression=network)
    sent = trained(client, cifar10(), steps) if steps else None
    truth, views = captured(client, cifar10(), size, 4, sent)
    psnr = reached(InvertingGradients(iterations=1000, tv=tv), client, truth, views)
    by_view = [round(value, 1) for value in psnr.mean(dim=1).tolist()]
    print(
        f"{network}, batch {size}, tv {tv}, trained {steps} steps: {psnr.mean():.1f} dB, {by_view}"
    )
    assert low <= psnr.mean() <= high
