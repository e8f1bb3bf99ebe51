"""What runs beside a job, and an attempt that was cut off, leave no trace in what comes out."""

import pytest
import torch

from strategies.attacks.optimization import tally
from strategies.attacks.optimization.basic import see_through_gradients
from strategies.attacks.optimization.basic.bn_fedavg_inversion import BatchNormFedAvgInversion
from strategies.attacks.optimization.basic.e2egi import E2EGI
from strategies.attacks.optimization.basic.hf_gradinv import HFGradInv
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from strategies.attacks.optimization.basic.see_through_gradients import SeeThroughGradients
from strategies.attacks.optimization.groups import Group
from strategies.attacks.optimization.optimizers import Adam, Langevin
from tests.strategies.passive.honest import Honest, spec, tiles
from tests.strategies.passive.normed import Captured

NETWORK = "convnet(stride=2, width=4, norm='batch')"
ATTACKS = {
    "see-through-gradients": SeeThroughGradients(iterations=60, seeds=2, labels="oracle"),
    "one seed": SeeThroughGradients(iterations=60, seeds=1, labels="oracle", noise=1.0),
    "e2egi": E2EGI(iterations=20, seeds=2, labels="oracle", noise=1.0),
    "hf-gradinv": HFGradInv(iterations=20, labels="oracle"),
}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_view_alone_gives_what_it_gives_among_others(attack, monkeypatch):
    client = Honest(NETWORK, spec(), dtype=torch.float64)
    captured = Captured.of(client, tiles(), 1, 3, steps=5)
    together = attack.reconstruct(captured.views, captured.knowledge(("labels",)))
    for place in (1, 2):
        alone = attack.reconstruct(captured.views[place:][:1], captured.knowledge(("labels",)))
        among = together.examples[together.views == place]
        assert torch.allclose(alone.examples, among, atol=1e-6)
    monkeypatch.setattr(Group, "at_once", 1)
    apart = attack.reconstruct(captured.views, captured.knowledge(("labels",)))
    assert torch.allclose(apart.examples, together.examples, atol=1e-6)


def test_each_problem_has_noise_of_its_own_whoever_is_beside_it():
    def noise(optimizer, problems, steps):
        variables = torch.zeros(problems, 5)
        for _ in range(steps):
            optimizer.step(variables, torch.zeros(problems, 5), 0.0)
        return variables

    def langevin(*seeds):
        return Langevin(Adam(0.0, signed=False), lambda _: 1.0, generators(*seeds))

    three = langevin(1, 2, 3)
    first = noise(three, 3, 2)
    three.keep(torch.tensor([0, 2]))
    kept = three.state()
    rest = noise(three, 2, 2)
    alone = langevin(3)
    assert torch.equal(noise(alone, 1, 2)[0], first[2])
    assert torch.equal(noise(alone, 1, 2)[0], rest[1])
    restored = langevin(7, 8, 9)
    restored.restore(kept)
    assert torch.equal(noise(restored, 2, 2), rest)


@pytest.mark.parametrize("name", ["see-through-gradients", "bn-fedavg-inversion"])
def test_restarts_of_one_view_have_noise_of_their_own(name):
    captured = Captured.of(Honest(NETWORK, spec()), tiles(), 1, 1, steps=5)
    knowledge, jobs = captured.knowledge(("labels",)), [("one", 0), ("one", 1), ("other", 0)]
    made = {
        "see-through-gradients": lambda: SeeThroughGradients().optimizer(jobs, knowledge),
        "bn-fedavg-inversion": lambda: BatchNormFedAvgInversion()._optimizer(jobs, knowledge),
    }[name]()
    assert len({torch.randn(1, generator=each).item() for each in made.generators}) == 3


class CutOffError(Exception):
    """An attempt ends."""


@pytest.mark.parametrize("name", ["see-through-gradients", "hf-gradinv"])
def test_cut_off_and_resumed_is_as_if_it_had_not_been(name, monkeypatch):
    # Kept at iteration 50, between two drawings of the consensus.
    monkeypatch.setattr(see_through_gradients, "EVERY", 0.1)
    attack = {
        "see-through-gradients": SeeThroughGradients(
            iterations=120, seeds=2, group=1.0, labels="oracle"
        ),
        "hf-gradinv": HFGradInv(iterations=60, labels="oracle"),
    }[name]
    captured = Captured.of(Honest(NETWORK, spec()), tiles(), 1, 1, steps=5)
    whole = attack.reconstruct(captured.views, captured.knowledge(("labels",)))
    monkeypatch.setattr(tally, "KEEP_EVERY", 0.0)
    knowledge, kept = captured.knowledge(("labels",)), []
    keep = knowledge.keep

    def kept_twice(*what):
        keep(*what)
        kept.append(what)
        if len(kept) == 2:
            raise CutOffError

    knowledge.keep = kept_twice
    with pytest.raises(CutOffError):
        attack.reconstruct(captured.views, knowledge)
    resumed = attack.reconstruct(captured.views, knowledge)
    assert any("went on from the checkpoint" in line for line in resumed.receipts)
    assert torch.equal(resumed.examples, whole.examples)
    assert torch.equal(resumed.scores, whole.scores)
    assert resumed.cost.gradient_evaluations == whole.cost.gradient_evaluations


def test_what_ran_otherwise_side_by_side_is_not_gone_on_with(monkeypatch):
    """A machine that runs more at once has other batches, and begins them anew."""
    attack = InvertingGradients(iterations=60, labels="oracle")
    captured = Captured.of(Honest(NETWORK, spec()), tiles(), 1, 3, steps=5)
    monkeypatch.setattr(tally, "KEEP_EVERY", 0.0)
    knowledge = captured.knowledge(("labels",))
    monkeypatch.setattr(Group, "at_once", 1)
    keep, kept = knowledge.keep, []

    def kept_thrice(*what):
        keep(*what)
        kept.append(what)
        if len(kept) == 3:
            raise CutOffError

    knowledge.keep = kept_thrice
    with pytest.raises(CutOffError):
        attack.reconstruct(captured.views, knowledge)
    knowledge.keep = keep
    monkeypatch.setattr(Group, "at_once", 3)
    resumed = attack.reconstruct(captured.views, knowledge)
    assert len(resumed.examples) == 3
    assert resumed.cost.gradient_evaluations == 3 * 61
