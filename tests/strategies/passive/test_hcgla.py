"""HCGLA: only what was kept is matched, and a denoiser makes both ends."""

import dataclasses

import pytest
import torch

from fedsim import registry
from fedsim.attack import Setting
from fedsim.data import load_dataset
from fedsim.threat import TrainingDetails
from fedsim.view import ServerView
from strategies.attacks.optimization.augmented import hcgla
from strategies.attacks.optimization.augmented.hcgla import HCGLA, kept_entries, trained
from strategies.attacks.optimization.basic.idlg import ImprovedDLG
from tests.strategies.passive.honest import Honest, batch, cifar10, floor_psnr, psnr, spec


def digits() -> tuple[Honest, object, object]:
    """Return a client, and what clients and the adversary draw from."""
    found = load_dataset("digits")
    return Honest("lenet", found.spec), found.train, found.test


def sparse(view: ServerView, keep: float) -> ServerView:
    """Return a view of which each tensor kept its largest entries, by magnitude."""
    received = {}
    for name, tensor in view.received.items():
        flat = tensor.flatten()
        kept = flat.abs().topk(max(1, round(keep * flat.numel()))).indices
        received[name] = torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(tensor)
    return dataclasses.replace(view, received=received)


def test_with_all_entries_and_the_plain_start_it_is_idlg():
    client, train, surrogate = digits()
    views = [client.gradient(*batch(train, 1, seed), client=seed) for seed in range(2)]
    plain = HCGLA(iterations=15, restarts=2, start="noise", filtered=False)
    same = ImprovedDLG(iterations=15, restarts=2)
    knowledge = client.knowledge("D", surrogate=surrogate)
    found, wanted = (attack.reconstruct(views, knowledge) for attack in (plain, same))
    assert torch.equal(found.examples, wanted.examples)
    assert torch.equal(found.labels, wanted.labels)
    assert "surrogate" not in {capability.value for capability in knowledge.used}


def test_entries_that_were_dropped_say_nothing():
    observed = torch.tensor([[0.0, 2.0, 0.0, -1.0]])
    distance, slope = kept_entries(observed)(torch.tensor([[9.0, 1.0, -9.0, -1.0]]))
    assert distance.tolist() == [1.0]
    assert slope.tolist() == [[0.0, -2.0, 0.0, 0.0]]


def test_the_denoiser_takes_noise_off():
    client, train, surrogate = digits()
    denoiser = trained(client.knowledge("D", surrogate=surrogate), steps=60, receipts=[])
    images, _ = batch(train, 32, 0)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = images + 0.5 * noise
    gain = psnr(images, denoiser.cleaned(noisy)) - psnr(images, noisy.clamp(0, 1))
    assert gain.mean() > 2


def test_a_sparse_gradient_gives_the_digit_back():
    client, train, surrogate = digits()
    images, labels = batch(train, 1, 0)
    view = sparse(client.gradient(images, labels), 0.2)
    knowledge = client.knowledge("D", surrogate=surrogate)
    attack = HCGLA(iterations=400, restarts=1, steps=5, filtered=False)
    found = attack.reconstruct([view], knowledge)
    assert psnr(images, found.examples).item() > 30
    assert found.labels.tolist() == labels.tolist()
    assert {capability.value for capability in knowledge.used} == {"updates", "surrogate"}


def test_of_a_thousandth_of_the_entries_nothing_comes_back():
    client, train, surrogate = digits()
    images, labels = batch(train, 1, 0)
    view = sparse(client.gradient(images, labels), 1e-3)
    attack = HCGLA(iterations=400, restarts=1, start="noise", filtered=False)
    found = attack.reconstruct([view], client.knowledge("D", surrogate=surrogate))
    assert (psnr(images, found.examples) < floor_psnr(images, surrogate)).all()


def test_what_it_cannot_read_is_refused_with_a_remedy():
    model = Honest("lenet", spec()).model()
    with pytest.raises(ValueError, match="inverting-gradients"):
        HCGLA().check(model, "weights")
    training = TrainingDetails("gradient", 0.1, 4, 1, 0.0, 0.0)
    plain = registry.build("channel", "plain", "channel")
    setting = Setting(model, 2, 2, (8, 8), training, "frozen", channel=plain)
    with pytest.raises(ValueError, match="batch_size=1"):
        HCGLA().check_setting(setting)


# -- figures ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_where_too_little_was_kept_each_end_adds_something(monkeypatch):
    client, count = Honest("lenet", spec()), 4
    truth = [batch(cifar10().subset(torch.arange(8000)), 1, seed) for seed in range(count)]
    surrogate = cifar10().subset(torch.arange(8000, 10000))
    denoiser = trained(client.knowledge("D", surrogate=surrogate), steps=200, receipts=[])
    monkeypatch.setattr(hcgla, "trained", lambda *_: denoiser)
    plain = {"iterations": 500, "restarts": 1}
    attacks = {
        "plain": HCGLA(**plain, start="noise", filtered=False),
        "start": HCGLA(**plain, filtered=False),
        "both": HCGLA(**plain),
    }
    for keep in (0.5, 0.3, 0.1):
        views = [sparse(client.gradient(*pair, client=i), keep) for i, pair in enumerate(truth)]
        reached = {}
        for name, attack in attacks.items():
            found = attack.reconstruct(views, client.knowledge("D", surrogate=surrogate))
            each = [psnr(pair[0], found.examples[i : i + 1]) for i, pair in enumerate(truth)]
            reached[name] = torch.cat(each)
            assert found.labels.tolist() == [pair[1].item() for pair in truth]
        print(keep, {name: [round(v, 1) for v in values.tolist()] for name, values in
                     reached.items()})  # fmt: skip
        plainly, started, both = (values.mean() for values in reached.values())
        assert plainly + 2 < started < both - 1
