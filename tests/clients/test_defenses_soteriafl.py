"""SoteriaFL: unbiased compression, two shifts that agree, and the epsilon of what is clipped."""

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from clients.defenses.formal.gaussian import epsilon_of
from clients.defenses.perturbation.soteriafl import Shifted, SoteriaFL, random_k
from fedsim.defense import Tensors, TrainingPlan
from fedsim.federation import Wrapper
from tests.clients.one_update import context

RATE = 0.1
CLIENTS = 3


def gradient(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {"1.weight": torch.randn(20, 10, generator=generator), "1.bias": torch.ones(20)}


def test_compression_is_right_on_average_and_of_the_papers_variance() -> None:
    before, keep, draws = {"a": torch.randn(60), "b": torch.randn(4, 10)}, 0.1, 4000
    generator = torch.Generator().manual_seed(0)
    flat = torch.cat([t.flatten() for t in before.values()])
    seen = torch.stack(
        [
            torch.cat([t.flatten() for t in random_k(before, keep, generator).values()])
            for _ in range(draws)
        ]
    )
    assert bool((seen.count_nonzero(dim=1) == 10).all())
    omega = 1 / keep - 1
    sigma = flat.abs() * math.sqrt(omega / draws)
    assert bool(((seen.mean(0) - flat).abs() <= 4 * sigma).all())
    errors = (seen - flat).square().sum(1).mean() / flat.square().sum()
    assert float(errors) == pytest.approx(omega, rel=0.05)


@pytest.mark.parametrize("keep", [0.05, 0.5, 1.0])
def test_gamma_is_the_papers(keep: float) -> None:
    omega = 1 / keep - 1
    expected = math.sqrt((1 + 2 * omega) / (2 * (1 + omega) ** 3))
    assert SoteriaFL(keep=keep).gamma == pytest.approx(expected)


class Averaging(Wrapper):
    """What an inner strategy does, and no more."""

    def __init__(self) -> None:
        pass

    def configure_train(self, *_: Any) -> Iterable[Message]:
        return []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        records = [reply.content.array_records["arrays"] for reply in replies]
        means = {n: np.mean([r[n].numpy() for r in records], axis=0) for n in records[0]}
        return ArrayRecord({name: Array(mean) for name, mean in means.items()}), MetricRecord()


def message(arrays: Tensors) -> Any:
    record = ArrayRecord({name: Array(t.double().numpy()) for name, t in arrays.items()})
    metrics = MetricRecord({"num-examples": 5})
    return SimpleNamespace(content=RecordDict({"arrays": record, "metrics": metrics}))


def mean_shift(stores: list[Tensors], like: Tensors) -> Tensors:
    kept = {
        n: [s.get(f"soteriafl/{n}", torch.zeros_like(t)) for s in stores] for n, t in like.items()
    }
    return {name: torch.stack(shifts).mean(0) for name, shifts in kept.items()}


def test_the_servers_shift_is_the_clients_mean_and_its_step_is_the_papers() -> None:
    defense = SoteriaFL(std=1e-6, norm=100.0, keep=0.2)
    server = Shifted(Averaging(), defense.gamma)
    stores: list[Tensors] = [{} for _ in range(CLIENTS)]
    weights = {name: torch.zeros_like(t).double() for name, t in gradient(0).items()}
    for round in range(1, 11):
        shift = mean_shift(stores, weights)
        sent = []
        for client in range(CLIENTS):
            ctx = context(seed=client, round=round)
            ctx.store = stores[client]
            sent.append(defense.transform_update(gradient(client), ctx))
        server.sent = message(weights).content.array_records["arrays"]
        replies = [message({n: weights[n] - RATE * v for n, v in one.items()}) for one in sent]
        arrays, _ = server.aggregate_train(round, replies)
        assert arrays is not None
        now = mean_shift(stores, weights)
        for name, before in weights.items():
            step = shift[name] + torch.stack([one[name] for one in sent]).mean(0)
            after = torch.from_numpy(arrays[name].numpy())
            assert (after - (before - RATE * step)).abs().max() < 1e-6
            assert (torch.from_numpy(server.shift[name]) / -RATE - now[name]).abs().max() < 1e-6
            weights[name] = after


def test_the_servers_shift_stays_the_clients_mean_where_one_drops_out() -> None:
    defense = SoteriaFL(std=1e-6, norm=100.0, keep=0.2)
    server = Shifted(Averaging(), defense.gamma)
    stores: list[Tensors] = [{} for _ in range(CLIENTS)]
    weights = {name: torch.zeros_like(t).double() for name, t in gradient(0).items()}
    server.sent = message(weights).content.array_records["arrays"]
    for round in range(1, 7):
        replies = []
        for client in range(CLIENTS):
            if (round, client) in ((3, 0), (4, 2)):
                continue
            ctx = context(seed=client, round=round)
            ctx.store = stores[client]
            sent = defense.transform_update(gradient(client), ctx)
            replies.append(message({n: weights[n] - RATE * v for n, v in sent.items()}))
        server.aggregate_train(round, replies)
        for name, mean in mean_shift(stores, weights).items():
            assert (torch.from_numpy(server.shift[name]) / -RATE - mean).abs().max() < 1e-6


def test_the_shift_nears_the_gradient_so_that_in_the_end_little_is_lost() -> None:
    """With the same gradient and hardly any noise, what is compressed goes to zero."""
    defense, ctx = SoteriaFL(std=1e-9, norm=100.0, keep=0.5), context()
    rest = []
    for round in range(1, 41):
        ctx.round = round
        defense.transform_update(gradient(1), ctx)
        rest.append(float((gradient(1)["1.weight"] - ctx.store["soteriafl/1.weight"]).norm()))
    assert rest[-1] < 0.01 * rest[0]


def test_noise_has_its_deviation_and_follows_the_secret_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defense, zeros = SoteriaFL(std=0.3, keep=1.0), {"a": torch.zeros(40_000)}
    first = defense.transform_update(zeros, context())["a"]
    assert float(first.std()) == pytest.approx(0.3, rel=0.02)
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "ff" * 32)
    assert not torch.equal(first, defense.transform_update(zeros, context())["a"])


def test_what_is_noised_was_clipped_first() -> None:
    """All is kept and the noise is nothing: the upload of a norm of 50 is of a norm of 1."""
    update = {"a": torch.full((30,), 4.0), "b": torch.full((4, 5), 10.0)}
    length = math.sqrt(30 * 4.0**2 + 20 * 10.0**2)
    assert length > 49
    sent = SoteriaFL(std=1e-9, keep=1.0).transform_update(update, context())
    for name, tensor in update.items():
        assert torch.allclose(sent[name], tensor / length, atol=1e-6)


def test_the_papers_noise_does_not_give_its_epsilon_where_the_mean_is_clipped() -> None:
    """m 6,000, T 1,000, delta 1e-3: sigma for an epsilon of 4 gives one of millions."""
    rounds, stated = 1000, 4.0
    sigma = math.sqrt(12 * rounds * math.log(1e3)) / (6000 * stated)
    plan = TrainingPlan("gradient", 0.1, 128, 6000, 1, rounds)
    told = SoteriaFL(std=sigma).privacy(plan, {})
    assert told is not None
    assert told.epsilon == epsilon_of(sigma, 2.0, rounds, 1e-3)
    assert told.epsilon > 1e5


def test_a_cohort_that_is_not_all_clients_is_refused() -> None:
    whole: Any = SimpleNamespace(cohort=4, clients=4)
    SoteriaFL().check_setting(whole)
    part: Any = SimpleNamespace(cohort=2, clients=4)
    with pytest.raises(ValueError, match="fraction"):
        SoteriaFL().check_setting(part)
