"""Central noise: its size, whom one client can move, and a norm that settles where it should."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from clients.defenses.formal.central_dp import CentralDP, CentralServer
from clients.defenses.perturbation.clip import LEAST_NORM, MOST_NORM
from fedsim import seeds
from fedsim.audit import judge
from fedsim.defense import ServerContext, TrainingPlan, guarantees
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from tests.fedsim.small import federated, scenario

SIZE = 100_000
Record = dict[str, np.ndarray[Any, Any]]


def arrays(values: Record) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in values.items()})


def reply(after: Record, examples: int = 1) -> Message:
    asked = Message(RecordDict(), 1, "train")
    content = RecordDict({"arrays": arrays(after)})
    content["metrics"] = MetricRecord({"num-examples": examples})
    return Message(content, reply_to=asked)


def server(defense: CentralDP, cohort: int, seed: int = 0, inner: Any = None) -> CentralServer:
    ctx = ServerContext(cohort, 1, lambda *names: seeds.secret_generator(seed, "server", *names))
    made = defense.strategy(inner or flower.FedAvg(min_train_nodes=1), ctx)
    assert isinstance(made, CentralServer)
    return made


def aggregated(
    made: CentralServer, before: Record, afters: list[Record], server_round: int = 1
) -> Record:
    made.sent = arrays(before)
    found, _ = made.aggregate_train(server_round, [reply(after) for after in afters])
    assert found is not None
    return {name: array.numpy() for name, array in found.items()}


@pytest.fixture(autouse=True)
def _in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):  # what Message(...) reads
        monkeypatch.setattr(TaskIdentity, name, 1)


ZERO = {"w": np.zeros(SIZE, np.float32)}


def along(axis: int, length: float) -> Record:
    after = np.zeros(SIZE, np.float32)
    after[axis] = length
    return {"w": after}


@pytest.mark.parametrize(("norm", "sigma", "clients"), [(1.0, 1.0, 5), (0.5, 2.0, 20)])
def test_the_noise_of_the_average_is_z_times_s_over_n(
    norm: float, sigma: float, clients: int
) -> None:
    afters = [along(k, 3.0) for k in range(clients)]
    got = aggregated(server(CentralDP(norm=norm, sigma=sigma), clients), ZERO, afters)["w"]
    clean = sum(along(k, norm)["w"] for k in range(clients)) / clients
    assert float((got - clean).std()) == pytest.approx(sigma * norm / clients, rel=0.02)


@pytest.mark.parametrize(("norm", "sigma", "clients"), [(1.0, 1.0, 4), (0.5, 2.0, 20)])
def test_where_the_norm_follows_the_sum_has_the_noise_that_is_left_to_it(
    norm: float, sigma: float, clients: int
) -> None:
    """15 % more than ``sigma``: what is told of the share is paid for with it."""
    defense = CentralDP(norm=norm, sigma=sigma, adaptive=True)
    got = aggregated(server(defense, clients), ZERO, [ZERO] * clients)["w"]
    expected = defense.noise_multiplier(clients) * norm / clients
    assert expected == pytest.approx(2 / 3**0.5 * sigma * norm / clients)
    assert float(got.std()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("clients", "sigma"), [(4, 1.0), (3, 0.5)])
def test_the_share_of_short_updates_is_noised(clients: int, sigma: float) -> None:
    """Over 800 secrets: the spread of log S is that of the count's noise, its mean the step."""
    defense = CentralDP(sigma=sigma, adaptive=True, rate=0.1)
    zero, moved = {"w": np.zeros(4, np.float32)}, []
    for seed in range(800):
        made = server(defense, clients, seed)
        aggregated(made, zero, [zero] * clients)
        moved.append(math.log(made.norm / defense.norm))
    expected = 0.1 * defense.count_noise(clients) / clients
    assert float(np.std(moved)) == pytest.approx(expected, rel=0.1)  # 4 standard errors
    assert float(np.mean(moved)) == pytest.approx(-0.1 * (1 - 0.5), abs=4 * expected / 800**0.5)


def test_one_client_moves_the_average_by_no_more_than_twice_s_over_n() -> None:
    others = [along(k, 2.0) for k in range(3)]
    moved = [
        aggregated(server(CentralDP(norm=0.5, sigma=1.0), 4), ZERO, [*others, last])["w"]
        for last in (along(9, 100.0), along(9, -100.0))
    ]
    assert float(np.linalg.norm(moved[0] - moved[1])) == pytest.approx(2 * 0.5 / 4, rel=1e-4)


def test_examples_do_not_weigh_and_who_does_not_answer_still_counts() -> None:
    made = server(CentralDP(norm=10.0, sigma=0.0), 4)
    made.sent = arrays(ZERO)
    found, _ = made.aggregate_train(1, [reply(along(0, 1.0), 1), reply(along(1, 1.0), 1000)])
    assert found is not None
    assert found["w"].numpy()[:2] == pytest.approx([0.25, 0.25])


def test_an_update_of_zero_and_arrays_that_are_not_trained() -> None:
    before = {
        "w": np.zeros(4, np.float32),
        "norm.running_mean": np.zeros(2, np.float32),
        "norm.num_batches_tracked": np.array(0),
        "indices": np.array([0, 1]),
    }
    after = {**before, "w": np.full(4, 0.25, np.float32), "norm.num_batches_tracked": np.array(7)}
    after["norm.running_mean"] = np.full(2, 100.0, np.float32)
    got = aggregated(server(CentralDP(sigma=0.0), 2), before, [before, after])
    assert got["w"] == pytest.approx(np.full(4, 0.125))
    assert got["norm.num_batches_tracked"] == 0
    assert got["norm.running_mean"] == pytest.approx([0, 0])


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_the_norm_settles_at_that_of_the_updates(start: float) -> None:
    made = server(CentralDP(norm=start, sigma=0.0, adaptive=True), 4)
    small = {"w": np.zeros(4, np.float32)}
    one = {"w": np.array([0, 1, 0, 0], np.float32)}
    for server_round in range(60):
        aggregated(made, small, [one] * 4, server_round)
    assert abs(math.log(made.norm)) <= 0.1  # a step is 10 % of it


@pytest.mark.parametrize(("start", "ends"), [(0.1, 6.7e-4), (10.0, 1484.0)])
def test_flowers_own_runs_away(start: float, ends: float) -> None:
    theirs = flower.DifferentialPrivacyServerSideAdaptiveClipping(
        flower.FedAvg(min_train_nodes=1, min_available_nodes=1),
        noise_multiplier=0.0,
        num_sampled_clients=4,
        initial_clipping_norm=start,
        clipped_count_stddev=0.0,
    )
    zero, one = np.zeros(4, np.float32), np.array([0, 1, 0, 0], np.float32)
    for server_round in range(50):
        theirs.current_arrays = arrays({"w": zero})
        theirs.aggregate_train(server_round, [reply({"w": one.copy()}) for _ in range(4)])
    assert theirs.clipping_norm == pytest.approx(ends, rel=0.02)


def test_what_the_share_of_short_updates_costs_the_sum() -> None:
    for cohort, sigma in ((100, 1.0), (4, 1.0), (16, 3.0)):
        defense = CentralDP(sigma=sigma, adaptive=True)
        of_sum, of_count = defense.noise_multiplier(cohort), defense.count_noise(cohort)
        assert of_sum**-2 + (2 * of_count) ** -2 == pytest.approx(sigma**-2)
        assert sigma < of_sum < 1.16 * sigma
    assert CentralDP(sigma=1.0, adaptive=True).count_noise(1000) == 50


def test_epsilon_is_of_the_models_and_says_that_the_server_sees_all() -> None:
    plan = TrainingPlan("gradient", 0.1, 8, 64, 1, 100)
    said = guarantees((CentralDP(sigma=10.0),), plan)["central-dp"]
    assert said.epsilon == pytest.approx(4.377, abs=2e-3)
    assert (said.unit, said.relation) == ("client", "add-or-remove-one")
    assert "nothing is hidden from it" in said.mechanism
    both = guarantees((CentralDP(sigma=10.0, relation="replace-one"),), plan)["central-dp"]
    assert both.epsilon == pytest.approx(
        guarantees((CentralDP(sigma=5.0),), plan)["central-dp"].epsilon
    )


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedavgm(server_momentum=0.9)"])
def test_it_works_around_averages_and_leaves_its_receipt(strategy: str, tmp_path: Path) -> None:
    changes = {"defenses": "central-dp(norm=0.05)", "federation.strategy": strategy}
    ran = federated(tmp_path, {**changes, "federation.rounds": 2})
    (part,) = judge(ran.folder.path).defenses
    assert part.server is not None
    assert (part.server["rounds"], part.server["of"]) == (2, 8)
    assert 0 < part.server["updates clipped"] <= 8
    assert part.server["noise std in the last round"] == pytest.approx(0.05 / 4)


def test_a_server_that_did_nothing_of_it_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CentralDP, "strategy", lambda self, inner, ctx: inner)
    report = judge(federated(tmp_path, {"defenses": "central-dp"}).folder.path)
    assert report.failed is not None
    assert "the server did nothing of it" in report.failed


@pytest.mark.parametrize("sigma", [0.0, 1e-200, 1e6])
def test_whatever_the_noise_of_the_share_the_norm_stays_one_that_may_be(sigma: float) -> None:
    made = server(CentralDP(sigma=sigma, adaptive=True, rate=10.0), 2)
    for _ in range(3):
        after = aggregated(made, ZERO, [ZERO, ZERO])["w"]
        assert np.isfinite(after).all()
        assert LEAST_NORM <= made.norm <= MOST_NORM


def test_what_it_cannot_act_in_is_refused(tmp_path: Path) -> None:
    for changes, reason in (
        ({"channel": "trusted-sum"}, "the server gets sums"),
        ({"channel": "fragmented"}, "each upload is of several clients"),
        ({"federation.strategy": "fedmedian"}, "compares uploads"),
    ):
        with pytest.raises(ScenarioError, match=reason):
            check(Parts(scenario(tmp_path, {"defenses": "central-dp", **changes})))


def test_who_knows_every_public_seed_cannot_repeat_the_servers_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    theirs = aggregated(server(CentralDP(), 2), ZERO, [ZERO, ZERO])["w"]
    for names in (("central-dp", 1), ("server", "central-dp", 1)):
        guess = torch.randn(SIZE, generator=seeds.generator(0, *names), dtype=torch.float64)
        assert abs(float(np.corrcoef(theirs, guess.numpy())[0, 1])) < 5 / SIZE**0.5
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "22" * 32)
    guess = aggregated(server(CentralDP(), 2), ZERO, [ZERO, ZERO])["w"]
    assert abs(float(np.corrcoef(theirs, guess)[0, 1])) < 5 / SIZE**0.5
