"""ROG: few pixels enlarged, the ceiling that this sets, and what the restorer adds."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import interpolate

from clients.defenses.perturbation.prune import Prune
from fedsim.attack import Reconstruction, Setting
from fedsim.data import load_dataset, split_test
from fedsim.errors import ScenarioError
from fedsim.threat import TrainingDetails
from strategies.attacks.optimization.augmented.rehearsals import paired
from strategies.attacks.optimization.augmented.rog import ROG, LowResolution, obfuscated
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from strategies.attacks.optimization.engine import Recipe, invert
from strategies.attacks.optimization.objectives import SquaredDistance
from strategies.attacks.optimization.optimizers import Adam
from strategies.attacks.optimization.parametrizations import Pixels
from strategies.attacks.optimization.schedules import cosine
from strategies.attacks.optimization.surrogate_gradients import by_model
from tests.clients.one_update import context
from tests.strategies.passive.honest import (
    Honest,
    batch,
    floor_psnr,
    matched_psnr,
    psnr,
    spec,
)


def setup(network="convnet(width=8)"):
    """Return private and surrogate digits, and a client."""
    dataset = load_dataset("digits")
    return dataset.train, split_test(dataset.test, 7)[0], Honest(network, dataset.spec)


def down_then_up(images, factor):
    """Return images made smaller and enlarged again, bicubically both times."""
    small = interpolate(images, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return interpolate(small, size=images.shape[2:], mode="bicubic")


def nearest_enlarged(images, factor):
    """Return the enlarged small images that are nearest: nothing that is enlarged is nearer."""
    onto = []
    for side in images.shape[2:]:
        unit = torch.eye(side // factor, dtype=torch.float64).view(side // factor, 1, -1, 1)
        weights = interpolate(unit, size=(side, 1), mode="bicubic").view(side // factor, side).T
        onto.append(weights @ torch.linalg.pinv(weights))
    return onto[0] @ images.double() @ onto[1].T


def pruned(view, ratio):
    """Return a view of which each tensor lost its smallest entries."""
    received = Prune(ratio=ratio).transform_update(view.received, context())
    return dataclasses.replace(view, received=received)


class UniformPixels(Pixels):
    """Plain pixels that start where ROG's do."""

    def start(self, generator):
        return torch.rand(self.labels.shape[1] * 64, generator=generator)


def test_factor_one_is_pixels_by_adam_and_squared_distance():
    private, surrogate, client = setup()
    view = client.gradient(*batch(private, 2, 0))
    attack = ROG(iterations=20, factor=1, restore=False)
    knowledge = client.knowledge("D", 2, surrogate=surrogate)
    plain = Recipe(
        batch_size=knowledge.num_examples,
        labels=attack.rule,
        parametrization=lambda group: UniformPixels(group.spec, group.known_labels),
        objective=lambda group: SquaredDistance(group.observed),
        optimizer=lambda _: Adam(0.05, signed=False, schedule=cosine(lowest=0.1)),
        iterations=20,
    )
    found, wanted = attack.reconstruct([view], knowledge), invert([view], knowledge, plain)
    assert torch.equal(found.examples, wanted.examples)


def test_the_first_stage_stays_below_its_ceiling_and_above_a_guess(monkeypatch):
    private, surrogate, client = setup("convnet(stride=2)")
    truth = [batch(private, 1, seed) for seed in range(3)]
    views = [client.gradient(*pair, client=i) for i, pair in enumerate(truth)]
    images = torch.cat([pair[0] for pair in truth])
    known = client.knowledge("D", {view.label: 1 for view in views}, surrogate=surrogate)
    monkeypatch.setattr(LowResolution, "finish", lambda self, v: self.decode(v)[:2])  # unclamped
    found = ROG(restore=False).reconstruct(views, known)
    reached, ceiling = psnr(images, found.examples), psnr(images, nearest_enlarged(images, 2))
    assert (reached < ceiling).all()
    assert (psnr(images, down_then_up(images, 2)) < ceiling).all()
    assert reached.mean() > floor_psnr(images, surrogate).mean()


def test_an_image_that_was_enlarged_has_no_ceiling():
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = interpolate(small, size=(8, 8), mode="bicubic")
    assert (psnr(images, nearest_enlarged(images, 2)) > 100).all()
    layout = LowResolution(load_dataset("digits").spec, torch.zeros(1, 2, dtype=torch.int64), 2)
    start = layout.start(torch.Generator().manual_seed(0))
    assert start.shape == (2 * 16,)
    assert (psnr(*[layout.decode(start[None]).images[0]] * 2) > 100).all()
    assert (nearest_enlarged(layout.decode(start[None]).images[0], 2).shape) == (2, 1, 8, 8)


@pytest.mark.parametrize("kind", ["gradient", "weights"])
def test_a_rehearsal_is_what_a_client_would_have_sent(kind):
    private, surrogate, client = setup()
    data = batch(private, 4, 0)
    epochs = 2 if kind == "weights" else None
    view = client.weights(*data, 0.1, batch_size=2, epochs=2) if epochs else client.gradient(*data)
    known = client.knowledge("D", 4, lr=0.1, batch_size=2, surrogate=surrogate, epochs=epochs)
    (job,) = by_model([view], known, [])
    made = ROG(pairs=4)._rehearsals(job, 0, 4, known)
    assert len({one.view.label for one in made}) == 4
    for one in made:
        same = (
            client.weights(one.images, one.labels, 0.1, batch_size=2, epochs=2)
            if epochs
            else client.gradient(one.images, one.labels)
        )
        wanted, got = same.update(), one.view.update()
        nothing = {name: int((tensor == 0).sum()) for name, tensor in view.update().items()}
        for name in job.names:  # where the observed one has zeros, rehearsals have as many
            assert int((got[name] == 0).sum()) >= nothing[name]
            kept = got[name] != 0
            assert torch.allclose(got[name][kept], wanted[name][kept], atol=1e-6)


def test_a_rehearsal_is_as_sparse_and_as_noised():
    draw = torch.Generator().manual_seed(0)
    update, observed = torch.randn(100, 10, generator=draw), torch.zeros(100, 10)
    observed[0] = 1
    sparse = obfuscated(update, observed, 0.0, draw)
    assert int(sparse.count_nonzero()) == 10
    assert sparse.abs()[sparse != 0].min() >= update.abs()[sparse == 0].max()
    noised = obfuscated(update, torch.ones(100, 10), 2.0, draw) - update
    assert noised.std().item() == pytest.approx(2.0, rel=0.1)


def test_pairs_are_put_in_the_order_that_fits():
    private, surrogate, client = setup()
    view = client.gradient(*batch(private, 3, 0))
    known = client.knowledge("D", 3, surrogate=surrogate)
    (job,) = by_model([view], known, [])
    (one, *_) = ROG(pairs=4)._rehearsals(job, 0, 3, known)
    nothing = torch.full((3,), 7)
    found = Reconstruction(one.images[[2, 0, 1]], nothing)
    ((shown, clean),) = paired(found, [(6, one), (7, one)])
    assert torch.equal(shown, clean)


def test_only_the_clients_views_are_handed_over_and_the_report_says_what_restoring_did():
    private, surrogate, client = setup()
    views = [client.gradient(*batch(private, 2, seed), client=seed) for seed in range(2)]
    known = client.knowledge("D", {view.label: 2 for view in views}, surrogate=surrogate)
    found = ROG(iterations=5, pairs=8, steps=2).reconstruct(views, known)
    assert found.views.tolist() == [0, 0, 1, 1]
    assert len(found.examples) == len(found.labels) == len(found.scores) == 4
    assert found.cost.gradient_evaluations == (2 + 8) * 6 + 8
    assert len(found.receipts) == 3
    assert "restorer of 6 rehearsals takes the 2 held out" in found.receipts[0]
    first = ROG(iterations=5, restore=False).reconstruct(views, known)
    assert not torch.equal(found.examples, first.examples)
    assert torch.equal(found.labels, first.labels)


def test_restoring_pruned_digits_adds_something():
    private, surrogate, client = setup()
    pairs = [batch(private, 1, seed) for seed in range(6)]
    views = [pruned(client.gradient(*pair, client=i), 0.5) for i, pair in enumerate(pairs)]
    images = torch.cat([pair[0] for pair in pairs])
    known = client.knowledge("D", {view.label: 1 for view in views}, surrogate=surrogate)
    first, both = (
        psnr(images, attack.reconstruct(views, known).examples).mean()
        for attack in (ROG(restore=False), ROG(pairs=24, steps=60))
    )
    assert both > first + 0.5


def test_a_factor_that_does_not_fit_is_refused():
    model = Honest("lenet", spec()).model()
    ROG(factor=4).check(model, "weights")
    with pytest.raises(ValueError, match="divides both sides"):
        ROG(factor=5).check(model, "gradient")
    with pytest.raises(ScenarioError, match="fedavg-counts"):
        ROG(labels="fedavg-count")
    assert ROG(labels="oracle").oracles == {"labels"}


def test_a_sum_of_clients_local_training_is_refused():
    model, secagg = Honest("lenet", spec()).model(), SimpleNamespace(aggregates=True)
    trained = TrainingDetails("weights", 0.1, 4, 2, 0.0, 0.0)
    setting = Setting(model, 2, 2, (8, 8), trained, "frozen", channel=secagg)
    with pytest.raises(ValueError, match="plain"):
        ROG().check_setting(setting)
    ROG().check_setting(
        dataclasses.replace(setting, training=dataclasses.replace(trained, kind="gradient"))
    )


# -- figures ---------------------------------------------------------------------------------------


def noised(view, std):
    """Return a view with normal noise on every entry."""
    draw = torch.Generator().manual_seed(100 + view.senders[0])
    received = {
        name: tensor + std * torch.randn(tensor.shape, generator=draw)
        for name, tensor in view.received.items()
    }
    return dataclasses.replace(view, received=received)


def report(what, attacks, truth, views, knows):
    """Print what attacks reach, and return it, by name."""
    reached = {}
    for name, attack in attacks.items():
        found = attack.reconstruct(views, knows())
        of_view = [found.examples[found.views == i] for i in range(len(views))]
        each = torch.cat([matched_psnr(*pair) for pair in zip(truth, of_view, strict=True)])
        reached[name] = each.mean().item()
        told = [line for line in found.receipts if "restorer" in line]
        spread = f"{each.min():.1f} to {each.max():.1f}"
        print(f"{what}, {name}: {reached[name]:.1f} dB ({spread})", *told, flush=True)
    return reached


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("obfuscation", ["none", "pruned", "noised"])
def test_both_stages_on_obfuscated_gradients(obfuscation):
    data = load_dataset("photo-tiles")
    surrogate, client = split_test(data.test, 7)[0], Honest("convnet(stride=2)", data.spec)
    pairs = [batch(data.train, 1, seed) for seed in range(4)]
    truth = [pair[0] for pair in pairs]
    views = [client.gradient(*pair, client=i) for i, pair in enumerate(pairs)]
    everything = torch.cat([t.flatten() for view in views for t in view.received.values()])
    std = float(everything.square().mean().sqrt()) if obfuscation == "noised" else 0.0
    if obfuscation == "pruned":
        views = [pruned(view, 0.9) for view in views]
    if std:
        views = [noised(view, std) for view in views]
    images = torch.cat(truth)
    limits = {
        "ceiling": nearest_enlarged(images, 2),
        "bicubic down and up": down_then_up(images, 2),
    }
    print(*(f"{name} {psnr(images, one).mean():.1f} dB" for name, one in limits.items()))
    print(f"floor {floor_psnr(images, surrogate).mean():.1f} dB, noise {std:.2g}")
    attacks = {
        "first stage": ROG(restore=False),
        "pixels": ROG(restore=False, factor=1),
        "inverting-gradients, 100": InvertingGradients(iterations=100, tv=1e-2),
        "inverting-gradients, 500": InvertingGradients(iterations=500, tv=1e-2),
        "inverting-gradients, 500, tv 0.1": InvertingGradients(iterations=500, tv=1e-1),
        "both": ROG(pairs=32, steps=200, noise=std),
    }
    known = {view.label: 1 for view in views}
    reached = report(
        obfuscation,
        attacks,
        truth,
        views,
        lambda: client.knowledge("D", known, surrogate=surrogate),
    )
    floor = floor_psnr(images, surrogate).mean()
    assert reached["both"] > reached["first stage"] + 0.8
    assert max(reached["pixels"], reached["inverting-gradients, 100"]) < floor + 1.5
    alike = reached["both"] - reached["inverting-gradients, 500"]
    assert {"none": alike < -4, "pruned": alike > 0.2, "noised": alike > 3}[obfuscation]
    weighed = max(value for name, value in reached.items() if "500" in name)
    assert reached["both"] < weighed - 0.4  # it does not beat total variation weighed for it


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_both_stages_after_local_training():
    private, surrogate, client = setup("convnet(stride=2)")
    pairs = [batch(private, 4, seed) for seed in range(2)]
    views = [
        client.weights(*pair, 0.05, client=i, batch_size=2, epochs=2, shuffled=True)
        for i, pair in enumerate(pairs)
    ]
    attacks = {"first stage": ROG(restore=False), "both": ROG(pairs=16, steps=200)}
    known = {view.label: 4 for view in views}
    images = [pair[0] for pair in pairs]
    floor = floor_psnr(torch.cat(images), surrogate).mean()
    print(f"floor {floor:.1f} dB")
    reached = report("local training", attacks, images, views, lambda: client.knowledge(
        "D", known, lr=0.05, batch_size=2, surrogate=surrogate, epochs=2))  # fmt: skip
    assert reached["both"] > reached["first stage"] + 0.6
    assert reached["first stage"] > floor + 1
