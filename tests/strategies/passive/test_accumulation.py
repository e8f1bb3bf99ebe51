"""Accumulation: what comes late is told apart from what never comes, to the last digit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clients.defenses.perturbation.soteriafl import SoteriaFL
from fedsim import registry
from fedsim.defense import ClientContext, Defense
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from fedsim.view import ServerView
from strategies.attacks.analytic.closed_form.accumulation import (
    Accumulation,
    fed_back,
    flat_update,
    shift_rate,
    shifted,
    with_update,
)
from tests.clients.one_update import context
from tests.fedsim.small import scenario

FEEDBACK = (
    "prune(ratio=0.9, feedback=True)",
    "prune(ratio=0.8, by='random', feedback=True, scope='global')",
    "prune(by='threshold', threshold=1.5, feedback=True)",
    "large-prune(ratio=0.4, feedback=True)",
)


def gradient(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"1.weight": (20, 30), "1.bias": (20,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sent_by(defense: Defense, gradients: list[dict[str, Tensor]]) -> list[ServerView]:
    """Return the uploads of one client over rounds, its memory kept."""
    views, store = list[ServerView](), dict[str, Tensor]()
    for number, each in enumerate(gradients, start=1):
        ctx: ClientContext = replace(context(round=number), store=store)
        received = defense.transform_update(each, ctx)
        views.append(ServerView(number, (0,), "mlp", gradients[0], received, "gradient"))
    return views


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in gradient.values()])


@pytest.mark.parametrize("expression", FEEDBACK)
def test_what_feedback_brings_late_is_the_sum_since_it_last_came(expression: str) -> None:
    defense = registry.build("defense", expression, "test")
    gradients = [gradient(seed) for seed in range(6)]
    summed = torch.stack([flat(each) for each in gradients]).cumsum(0)
    summed = torch.cat([torch.zeros(1, summed.shape[1]), summed])
    for number, (sums, rounds) in enumerate(fed_back(sent_by(defense, gradients)), start=1):
        came = rounds > 0
        since = (number - rounds[came]).long()
        expected = summed[number][came] - summed[since, came.nonzero().flatten()]
        assert torch.allclose(sums[came], expected, atol=1e-5)
        assert not sums[~came].any()
    assert number == 6
    assert 0 < came.double().mean() < 1
    assert rounds.max() > 1


def test_of_a_gradient_that_stays_feedback_brings_everything() -> None:
    """Top-k sends each coordinate in turn, the small ones after many rounds."""
    true = gradient(0)
    true = {name: tensor.sign() * (tensor.abs() + 0.5) for name, tensor in true.items()}
    defense = registry.build("defense", "prune(ratio=0.8, feedback=True)", "test")
    heard = list(fed_back(sent_by(defense, [true] * 40)))
    sums, rounds = (sum(each) for each in zip(*heard, strict=True))
    assert bool((rounds > 0).all())
    assert torch.allclose(sums / rounds, flat(true), atol=1e-5)


def test_a_shift_is_followed_and_each_rounds_gradient_is_there_to_the_last_digit() -> None:
    defense = SoteriaFL(std=0.1, keep=0.2)
    gradients = [gradient(seed) for seed in range(8)]
    views = sent_by(defense, gradients)
    before = [flat(each) for each in privately(defense, gradients)]
    for true, (update, came), view in zip(before, shifted(views, 0.2), views, strict=True):
        assert came.sum() == round(0.2 * len(true))
        assert torch.equal(came > 0, flat_update(view) != 0)
        assert torch.allclose(update[came > 0], true[came > 0], atol=1e-6)
        assert not update[came == 0].any()
    assert not torch.allclose(flat_update(view)[came > 0] * 0.2, true[came > 0], atol=1e-2)


def privately(defense: SoteriaFL, gradients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return what the client compresses: with everything kept, the first upload is all of it."""
    whole = replace(defense, keep=1.0)
    made, ledger = list[dict[str, Tensor]](), dict[str, Tensor]()
    for number, each in enumerate(gradients, start=1):
        ctx = replace(context(round=number), store=dict(ledger))
        made.append(whole.transform_update(each, ctx))
        ledger = {name: t for name, t in ctx.store.items() if "ledger" in name or "rounds" in name}
    return made


@pytest.mark.parametrize("keep", [0.05, 0.5, 1.0])
def test_the_shift_moves_as_the_clients_does(keep: float) -> None:
    assert shift_rate(keep) == pytest.approx(SoteriaFL(keep=keep).gamma)


@pytest.mark.parametrize("kind", ["gradient", "weights"])
def test_a_view_with_another_update_keeps_its_buffers(kind: str) -> None:
    sent = {"0.weight": torch.ones(2, 3), "1.running_mean": torch.zeros(4)}
    received = {"0.weight": torch.zeros(2, 3), "1.running_mean": torch.full((4,), 7.0)}
    view = ServerView(1, (0,), "x", sent, received, kind)
    made = with_update(view, torch.arange(6.0))
    assert torch.equal(flat_update(made), torch.arange(6.0))
    assert torch.equal(made.received["1.running_mean"], received["1.running_mean"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"channel": "secagg", "attack": "accumulation(then='linear-inversion')"}, "sums arrive"),
        ({"data.partition": "iid"}, "draws another batch every round"),
        ({"attack": "accumulation(then='robbing-the-fed')"}, "must be passive"),
        ({"attack": "accumulation(keep=0.0)"}, "above 0 and at most 1"),
        ({"attack": "accumulation(keep=nan)"}, "keep"),
        ({"threat-model": "B"}, "details"),
    ],
)
def test_what_it_cannot_follow_is_refused_before_anyone_trains(
    tmp_path: Path, changes: dict[str, str], told: str
) -> None:
    with pytest.raises(ScenarioError, match=told):
        check(Parts(scenario(tmp_path, {**Accumulation.toy.scenario, **changes})))
