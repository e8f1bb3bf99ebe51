"""Stand-in inversion: rehearsals are what clients send, and what they teach undoes a defense."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedsim import registry
from fedsim.attack import Setting
from fedsim.data import Split, load_dataset, split_test
from fedsim.errors import NotGranted, ScenarioError
from fedsim.parts import Parts, check
from fedsim.threat import Knowledge, TrainingDetails
from fedsim.view import ServerView
from strategies.attacks.optimization.augmented.stand_in_inversion import (
    Inverter,
    StandInInversion,
    upload,
)
from tests.fedsim.small import scenario
from tests.strategies.passive.honest import Honest, batch, floor_psnr, psnr

RATIO = "linear-inversion"


def setup(network: str = "mlp(hidden=[32])") -> tuple[Split, Split, Honest]:
    """Return private and surrogate digits, and a client."""
    dataset = load_dataset("digits")
    return dataset.train, split_test(dataset.test, 7)[0], Honest(network, dataset.spec)


def defended(
    defense: str, client: Honest, private: Split, count: int
) -> tuple[torch.Tensor, list[ServerView]]:
    """Return images, and the views of clients with one each, of secrets that nobody else draws."""
    known = [registry.build("defense", one, "test") for one in registry.parse(defense, "test")]
    secrets = replace_seed(client.knowledge("D", 1), 12)
    views = []
    for number in range(count):
        own = private.subset(torch.tensor([number]))
        view = client.gradient(*own.batch(torch.arange(1)), client=number)
        views.append(replace(view, received=upload(known, view, own, number, secrets, rounds=1)))
    return private.batch(torch.arange(count))[0], views


def replace_seed(knowledge: Knowledge, seed: int) -> Knowledge:
    knowledge._seed = seed
    return knowledge


def knows(client: Honest, views: list[ServerView], surrogate: Split, model: str = "D") -> Knowledge:
    return client.knowledge(model, {view.label: 1 for view in views}, surrogate=surrogate)


@pytest.mark.parametrize("kind", ["gradient", "weights"])
def test_without_a_defense_a_rehearsal_is_what_an_honest_client_sends(kind: str) -> None:
    private, surrogate, client = setup()
    images, labels = batch(private, 3, 0)
    own, lr = Split(images, labels), 0.05
    known = client.knowledge("D", 3, lr=lr, batch_size=3, surrogate=surrogate)
    honest = client.gradient(images, labels)
    if kind == "weights":
        honest = client.weights(images, labels, lr, epochs=2)
        known = client.knowledge("D", 3, lr=lr, batch_size=3, surrogate=surrogate, epochs=2)
    made = upload([], honest, own, 0, known, rounds=1)
    assert made.keys() == honest.received.keys()
    assert all(torch.allclose(made[n], t, atol=1e-6) for n, t in honest.received.items())


def test_every_rehearsing_client_draws_secrets_of_its_own() -> None:
    private, surrogate, client = setup()
    own = private.subset(torch.tensor([0]))
    view = client.gradient(*own.batch(torch.arange(1)))
    known, digest = client.knowledge("D", surrogate=surrogate), registry.build(
        "defense", "digestnn", "test"
    )  # fmt: skip
    one, again, other = (upload([digest], view, own, n, known, rounds=1) for n in (0, 0, 1))
    assert one.keys() == view.received.keys()  # what is private stays at home
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.allclose(one["1.weight"], other["1.weight"])
    assert not torch.allclose(one["1.weight"], view.received["1.weight"])


def test_a_known_transform_that_loses_nothing_is_undone() -> None:
    """Policy 0 inverts: the ratio reads 1 - x exactly, and the way back is one line."""
    private, surrogate, client = setup()
    images, views = defended("ats(policies='0')", client, private, 8)
    attack = StandInInversion(defense="ats(policies='0')", then=RATIO, pairs=64, steps=150)
    known = knows(client, views, surrogate)
    read = attack.inner.reconstruct(views, known)
    assert torch.allclose(read.examples.float(), 1 - images, atol=1e-4)
    found = attack.reconstruct(views, known)
    assert found.views.tolist() == list(range(8))
    reached = psnr(images, found.examples).mean()
    print(f"read {psnr(images, read.examples).mean():.1f} dB, undone {reached:.1f}", found.receipts)
    assert reached > floor_psnr(images, surrogate).mean() + 4
    assert {one.value for one in known.used} == {"updates", "basics", "details", "surrogate"}
    assert "inverter of 48 rehearsals takes the 16 held out from" in found.receipts[0]


def test_what_is_no_gain_is_handed_on_as_it_is_and_said() -> None:
    private, surrogate, client = setup()
    _, views = defended("none", client, private, 2)
    attack = StandInInversion(defense="none", then=RATIO, pairs=16, steps=3)
    found = attack.reconstruct(views, knows(client, views, surrogate))
    read = attack.inner.reconstruct(views, knows(client, views, surrogate))
    assert torch.equal(found.examples, read.examples)
    assert torch.equal(found.labels, read.labels)
    assert "that is no gain: what was read is handed on as it is" in found.receipts[0]
    assert not any("client" in line for line in found.receipts[1:])


def test_views_of_other_weights_are_rehearsed_apart_and_batches_whole() -> None:
    private, surrogate, client = setup("convnet(width=4)")
    other = replace(client, seed=8)
    views = [
        client.gradient(*batch(private, 2, 0), client=0),
        other.gradient(*batch(private, 2, 1), client=1),
    ]
    known = client.knowledge("D", {view.label: 2 for view in views}, surrogate=surrogate)
    attack = StandInInversion(
        defense="obscure(iterations=2)",
        then="inverting-gradients(iterations=2)",
        pairs=4,
        steps=1,
    )
    found, again = attack.reconstruct(views, known), attack.reconstruct(views, known)
    assert torch.equal(found.examples, again.examples)
    assert found.views.tolist() == [0, 0, 1, 1]
    assert sum("inverter of 3 rehearsals" in line for line in found.receipts) == 2
    assert found.cost.gradient_evaluations == (2 + 8) * 3 + 8
    with pytest.raises(NotGranted):
        attack.reconstruct(views, client.knowledge("C", {v.label: 2 for v in views}))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 5, 9)])
def test_the_network_takes_images_of_any_size_and_begins_with_no_correction(
    shape: tuple[int, int, int],
) -> None:
    network, seen = Inverter(*shape), torch.rand(2, *shape)
    assert torch.equal(network(seen), seen)
    nn.init.ones_(network.out.weight)
    seen.requires_grad_()
    (slope,) = torch.autograd.grad(network(seen)[0, 0, 0, 0], seen)
    assert slope[0, :, -1, -1].abs().sum() > 0  # the last pixel reaches the first
    assert slope[1].abs().sum() == 0


def test_the_defense_is_checked_before_any_client_trains(tmp_path: Path) -> None:
    changes = {"threat-model": "D", "federation.local": "fedsgd(batch_size=1, lr=0.1)"}
    wrong = {
        "stand-in-inversion(defense='obscur')": "did you mean 'obscure'",
        "stand-in-inversion(defense='obscure(iteration=3)')": "iterations",
        "stand-in-inversion(defense='obscure', then='robbing-the-fed')": "must be passive",
        "stand-in-inversion(defense='obscure', "
        "then=\"inverting-gradients(labels='oracle')\")": "wants an oracle",
        "stand-in-inversion(defense=\"soteria(layer='fc9')\")": "no fully connected layer 'fc9'",
    }
    for attack, why in wrong.items():
        with pytest.raises(ScenarioError, match=why):
            check(Parts(scenario(tmp_path, {**changes, "attack": attack})))
    fine = "stand-in-inversion(defense='obscure')"
    check(Parts(scenario(tmp_path, {**changes, "attack": fine})))


def test_it_refuses_what_its_reader_refuses() -> None:
    _, _, client = setup("convnet(width=4)")
    attack = StandInInversion(defense="obscure", then=RATIO)
    with pytest.raises(ValueError, match="reads this model's pixels"):
        attack.check(client.model(), "gradient")
    details = TrainingDetails("gradient", 0.1, 1, 1, 0.0, 0.0)
    plain = registry.build("channel", "plain", "test")
    setting = Setting(client.model(), 1, 1, (1,), details, "frozen", plain)
    attack.check_setting(setting)
    sums = registry.build("channel", "trusted-sum", "test")
    with pytest.raises(ValueError, match="sums arrive"):
        attack.check_setting(replace(setting, clients=2, cohort=2, examples=(1, 1), channel=sums))
    mixing = StandInInversion(defense="mixup(k=2)", then=RATIO)
    with pytest.raises(ValueError, match="of all that a client holds"):
        mixing.check_setting(replace(setting, examples=(4,)))
    assert attack.required == attack.needs


def test_to_a_reader_that_joins_rounds_rehearsing_clients_are_strangers() -> None:
    private, surrogate, client = setup()
    view = client.gradient(*private.batch(torch.arange(1)))
    views = [replace(view, round=1), replace(view, round=2)]
    attack = StandInInversion(
        defense="clip", then="temporal-robust(iterations=2)", pairs=8, steps=1
    )
    found = attack.reconstruct(views, knows(client, views, surrogate))
    assert [line for line in found.receipts if "client-0 and 1 more: 1 restart" in line]
    assert [line for line in found.receipts if "of 6 rehearsals takes the 2 held out" in line]
