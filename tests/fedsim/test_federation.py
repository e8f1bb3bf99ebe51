"""Any Flower strategy can be inside, and the federation is the arithmetic it says it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedsim import registry, seeds
from fedsim.data import split_test
from fedsim.errors import RunFailed, ScenarioError
from fedsim.federation import build_strategy, inner_strategies, least_share, unfit_strategy
from fedsim.models import build_model, initial_model, load_arrays
from fedsim.parts import Parts, check
from fedsim.population import Ledger
from fedsim.run import History, accuracy
from fedsim.view import ServerView
from strategies.roles import Manipulator
from tests.fedsim.small import (
    Meddling,
    Ran,
    federated,
    meddling,
    plain_gradient,
    plug_in,
    scenario,
    watching,
)

FEDAVG = "fedavg(epochs=2, batch_size=32, lr=0.1)"


@pytest.fixture(autouse=True)
def _watching(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))


def watched(folder: Path, changes: dict[str, Any] | None = None) -> Ran:
    """Run two rounds; the second round's ``sent`` is what the first came to."""
    return federated(folder, {"attack": "watching", "federation.rounds": 2, **(changes or {})})


def of_round(ran: Ran, server_round: int) -> list[ServerView]:
    return [view for view in ran.views if view.round == server_round]


def mean(views: list[ServerView], name: str) -> Tensor:
    """Weighted by examples, in double precision."""
    weights = torch.tensor([float(view.num_examples or 0) for view in views]).double()
    stacked = torch.stack([view.received[name].double() for view in views])
    return torch.tensordot(weights / weights.sum(), stacked, dims=1)


def test_every_flower_strategy_that_averages_arrays_is_there() -> None:
    assert set(inner_strategies()) >= {
        "fedavg", "fedavgm", "fedadam", "fedadagrad", "fedyogi", "fedprox", "fedmedian",
        "fedtrimmedavg", "krum", "multikrum", "bulyan",
    }  # fmt: skip
    assert all(issubclass(one, Strategy) for one in inner_strategies().values())


STRATEGIES = {
    "fedavg": "fedavg",
    "fedavgm": "fedavgm(server_learning_rate=1.0, server_momentum=0.9)",
    "fedadam": "fedadam(eta=0.01)",
    "fedyogi": "fedyogi(eta=0.01)",
    "fedadagrad": "fedadagrad(eta=0.01)",
    "fedprox": "fedprox(proximal_mu=0.1)",
    "fedmedian": "fedmedian",
    "fedtrimmedavg": "fedtrimmedavg(beta=0.25)",
    "krum": "krum(num_malicious_nodes=1)",
    "multikrum": "multikrum(num_malicious_nodes=1, num_nodes_to_select=2)",
    "bulyan": "bulyan",
}


def test_every_strategy_is_run_here() -> None:
    assert STRATEGIES.keys() == inner_strategies().keys()


@pytest.mark.parametrize("local", ["fedsgd(batch_size=16, lr=0.1)", FEDAVG])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_runs_and_moves_the_model(strategy: str, local: str, tmp_path: Path) -> None:
    changes = {"federation.strategy": STRATEGIES[strategy], "federation.local": local}
    changes["federation.clients"] = 5  # the fewest among which Krum finds a malicious one
    if unfit_strategy(build_strategy(STRATEGIES[strategy], 1.0), "gradient", 5, False) and (
        local != FEDAVG
    ):
        pytest.skip("refused: the proximal term would be zero")
    ran = watched(tmp_path, changes)
    first, second = of_round(ran, 1), of_round(ran, 2)
    for name, before in first[0].sent.items():
        assert second[0].sent[name].dtype == before.dtype
        assert second[0].sent[name].isfinite().all()
    assert not torch.equal(first[0].sent["3.weight"], second[0].sent["3.weight"])
    assert ran.failures == []


@pytest.mark.parametrize("strategy", ["fedadam", "fedadagrad", "fedyogi"])
def test_the_clients_rate_is_refused_because_flower_never_reads_it(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.serverapp.strategy.fedopt import FedOpt

    with pytest.raises(ScenarioError, match=r"eta_l = 0\.5: Flower keeps it and never reads it"):
        build_strategy(f"{strategy}(eta_l=0.5)", 1.0)
    monkeypatch.setattr(FedOpt, "summary", lambda self: None)  # which only prints it
    unreadable = property(fset=lambda self, value: None)
    monkeypatch.setattr(FedOpt, "eta_l", unreadable, raising=False)
    assert watched(tmp_path, {"federation.strategy": strategy}).failures == []


def test_the_least_share_of_some_is_one_of_them() -> None:
    for count in range(1, 5000):
        assert int(least_share(count) * count) == 1
        assert int((least_share(count) - 0.0001) * count) == 0


def test_fedavg_averages_by_examples(tmp_path: Path) -> None:
    changes = {"federation.local": FEDAVG, "data.partition": "dirichlet(alpha=0.5)"}
    ran = watched(tmp_path, changes)
    first, second = of_round(ran, 1), of_round(ran, 2)
    assert len({view.num_examples for view in first}) > 1
    for name, tensor in second[0].sent.items():
        assert torch.allclose(tensor.double(), mean(first, name), atol=1e-6)


def test_fedmedian_takes_the_median(tmp_path: Path) -> None:
    changes = {"federation.local": FEDAVG, "federation.strategy": "fedmedian"}
    ran = watched(tmp_path, {**changes, "federation.clients": 3})
    first, second = of_round(ran, 1), of_round(ran, 2)
    for name, tensor in second[0].sent.items():
        uploads = torch.stack([view.received[name] for view in first])
        assert torch.allclose(tensor, uploads.median(dim=0).values, atol=1e-6)


def test_krum_takes_one_clients_upload(tmp_path: Path) -> None:
    changes = {"federation.local": FEDAVG, "federation.strategy": "krum(num_malicious_nodes=1)"}
    ran = watched(tmp_path, {**changes, "federation.clients": 5})
    first, second = of_round(ran, 1), of_round(ran, 2)
    assert any(
        all(torch.equal(view.received[n], t) for n, t in second[0].sent.items()) for view in first
    )


def test_fedadam_steps_as_reddi_et_al_say(tmp_path: Path) -> None:
    """Algorithm 2 from m = v = 0, in Flower's way: Kingma and Ba's rate, of a step later."""
    adam = "fedadam(eta=0.01, beta_1=0.9, beta_2=0.99, tau=0.001)"
    ran = watched(tmp_path, {"federation.local": FEDAVG, "federation.strategy": adam})
    first, second = of_round(ran, 1), of_round(ran, 2)
    for name, before in first[0].sent.items():
        delta = mean(first, name) - before.double()
        m, v = 0.1 * delta, 0.01 * delta**2
        rate = 0.01 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2)
        expected = before + rate * m / (v.sqrt() + 0.001)
        assert torch.allclose(second[0].sent[name].double(), expected, atol=1e-6)


def test_fedsgd_is_one_step_of_large_batch_sgd(tmp_path: Path) -> None:
    ran = watched(tmp_path, {"federation.local": "fedsgd(batch_size=16, lr=0.2)"})
    records = [ran.vault.record(client, 1) for client in range(4)]
    images = torch.cat([record.examples for record in records if record])
    labels = torch.cat([record.labels for record in records if record])
    model = ran.parts.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    plain_gradient(model, images, labels)
    optimizer.step()
    for name, parameter in model.named_parameters():
        found = of_round(ran, 2)[0].sent[name]
        assert torch.allclose(found, parameter, atol=1e-6)


def plain_federation(parts: Parts, rounds: int) -> nn.Module:
    """McMahan et al.'s Algorithm 1, in PyTorch and nothing else."""
    split, model, seed = parts.dataset.train, parts.model(), parts.scenario.seed
    for server_round in range(1, rounds + 1):
        start = {name: t.clone() for name, t in model.state_dict().items()}
        total = {name: torch.zeros_like(t) for name, t in start.items()}
        for client, own in enumerate(parts.partitions):
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for epoch in range(2):
                stream = seeds.generator(seed, "client", client, "batches", server_round, epoch)
                for rows in torch.split(torch.randperm(len(own), generator=stream), 32):
                    plain_gradient(model, *split.batch(own[rows]))
                    optimizer.step()
            share = len(own) / sum(len(one) for one in parts.partitions)
            total = {name: t + share * model.state_dict()[name] for name, t in total.items()}
        model.load_state_dict(total)
    return model


def test_an_honest_federation_is_as_good_as_a_plain_loop(tmp_path: Path) -> None:
    changes = {"federation.local": FEDAVG, "federation.rounds": 8, "attack": "none"}
    ran = federated(tmp_path, changes)
    model = plain_federation(ran.parts, 8)
    arrays = ArrayRecord(model.state_dict())
    holdout = split_test(ran.parts.dataset.test, ran.parts.scenario.seed)[1]
    found = ran.federation["accuracy"]
    assert found["after"] == pytest.approx(
        accuracy(ran.parts, arrays, holdout, ran.parts.architecture), abs=6e-3
    )
    assert found["before"] < 0.3 < 0.6 < found["after"]


def test_a_federation_of_one_is_the_plain_loop_bit_for_bit(tmp_path: Path) -> None:
    ran = watched(tmp_path, {"federation.local": FEDAVG, "federation.clients": 1})
    model = plain_federation(ran.parts, 1)
    for name, parameter in model.named_parameters():
        assert torch.equal(of_round(ran, 1)[0].received[name], parameter)
        assert torch.equal(of_round(ran, 2)[0].sent[name], parameter)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_as_many_train_as_the_fraction_says(fraction: float, tmp_path: Path) -> None:
    ran = watched(tmp_path, {"federation.clients": 8, "federation.fraction": fraction})
    for server_round in (1, 2):
        assert len(of_round(ran, server_round)) == 8 * fraction


def test_the_baseline_is_the_run_without_defenses(tmp_path: Path) -> None:
    settings = {"federation.local": FEDAVG, "audit.baseline": True, "federation.rounds": 2}
    noisy = {"defenses": "clip(norm=1.0) | gaussian(std=1.0)", "attack": "watching"}
    honest = federated(tmp_path / "honest", {**settings, "audit.baseline": False})
    defended = federated(tmp_path / "defended", {**settings, **noisy})
    after = defended.federation["accuracy"]
    assert after["baseline_after"] == honest.federation["accuracy"]["after"]
    assert after["after"] < after["baseline_after"]


def test_the_baseline_is_no_part_of_what_the_federation_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = federated(tmp_path, {"audit.baseline": True, "defenses": "clip(norm=0.1)"})
    lines = (ran.folder.path / "events.jsonl").read_text().splitlines()
    at = {event["event"]: event["time"] for event in map(json.loads, lines)}
    assert ran.federation["seconds"] <= at["baseline"] - at["started"] + 0.01
    printed = capsys.readouterr().out
    assert "federation 1/1 rounds" in printed
    assert "baseline 1/1 rounds" in printed


def test_a_server_may_not_ask_for_a_baseline_that_the_scenario_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim import federation

    honest = federation.Applied.configure_train

    def sly(self: Any, *args: Any) -> list[Message]:
        messages = list(honest(self, *args))
        for message in messages:
            message.metadata.message_type = "train.baseline"
        return messages

    monkeypatch.setattr(federation.Applied, "configure_train", sly)
    with pytest.raises(RunFailed, match="a server may not ask for one"):
        watched(tmp_path, {"defenses": "clip(norm=1.0)"})


# -- roles --------------------------------------------------------------------------------------


def test_a_manipulator_that_sends_the_honest_model_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "meddling", meddling(lambda arrays, knowledge: None))
    meddled = watched(tmp_path / "meddled", {"attack": "meddling"})
    honest = watched(tmp_path / "honest")
    for ours, theirs in zip(meddled.views, honest.views, strict=True):
        for name, tensor in theirs.received.items():
            assert torch.equal(ours.received[name], tensor)
            assert torch.equal(ours.sent[name], theirs.sent[name])
    sent = [f"sent a modified model to 0/4 clients in round {number}" for number in (1, 2)]
    assert meddled.federation["receipts"] == sent
    read = [f"read 4 replies in round {number}" for number in (1, 2)]
    assert honest.federation["receipts"] == read


def choosing(clients: list[int]) -> type[Meddling]:
    from fedsim.threat import Capability

    needs = Meddling.needs | {Capability.SELECTION}
    return type(
        "Choosing",
        (meddling(lambda arrays, knowledge: None),),
        {"needs": needs, "select": lambda self, available, server_round: clients},
    )


def test_a_manipulator_that_selects_trains_whom_it_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "choosing", choosing([3, 1]))
    changes = {"attack": "choosing", "threat-model": "H", "federation.fraction": 0.25}
    ran = watched(tmp_path, changes)
    assert [view.senders for view in ran.views] == [(1,), (3,), (1,), (3,)]


@pytest.mark.parametrize("clients", [[], [0, 0], [0, 9], [-1]])
def test_a_selection_of_nobody_twice_or_of_strangers_fails_in_plain_words(
    clients: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "choosing", choosing(clients))
    with pytest.raises(RunFailed, match="it may select some of those that are there, each once"):
        watched(tmp_path, {"attack": "choosing", "threat-model": "H"})


def test_a_passive_attack_cannot_be_a_manipulator(tmp_path: Path) -> None:
    attack = registry.build("attack", "watching", "attack")
    inner = build_strategy("fedavg", 1.0)
    with pytest.raises(TypeError, match="watching is passive"):
        Manipulator(
            inner,
            tmp_path,
            "gradient",
            attack=attack,
            knowledge=None,
            seal=None,  # type: ignore[arg-type]
        )


def test_a_view_holds_what_was_sent_and_what_came_back(tmp_path: Path) -> None:
    ran = watched(tmp_path)
    initial = initial_model("mlp(hidden=[8])", ran.parts.spec, ran.parts.scenario.seed)
    for view in of_round(ran, 1):
        record = ran.vault.record(view.senders[0], 1)
        assert record is not None
        assert view.num_examples == len(record.labels) == 2
        model = build_model(view.model, ran.parts.spec)
        load_arrays(model, view.sent)
        for name, tensor in initial.state_dict().items():
            assert torch.equal(view.sent[name], tensor)
        for name, gradient in plain_gradient(model, record.examples, record.labels).items():
            assert torch.equal(view.received[name], gradient)


def test_an_honest_server_keeps_no_views_and_the_vault_no_examples(tmp_path: Path) -> None:
    ran = federated(tmp_path, {"attack": "none", "defenses": "clip(norm=0.01)"})
    assert ran.views == []
    assert len(ran.vault) == 4
    for record in ran.vault:
        assert len(record.examples) == len(record.labels) == len(record.indices) == 0
        assert record.receipts[0]["name"] == "clip"


def test_pictures_of_8_bits_are_deposited_as_they_are(tmp_path: Path) -> None:
    ran = federated(tmp_path, {"attack": "watching", "data.dataset": "photo-tiles"})
    split, own = ran.parts.dataset.train, ran.parts.partitions[1]
    record = ran.vault.record(1, 1)
    assert record is not None
    assert split.images.dtype == torch.uint8
    trained_on = split.batch(own[record.indices], torch.float64)[0]
    assert torch.equal(record.examples, trained_on)
    sealed = ran.folder.path / "vault" / "client-1" / "round-1.sealed"
    assert sealed.stat().st_size < 2 * 3 * 32 * 32 + 2000


def test_a_formal_guarantee_is_told(tmp_path: Path) -> None:
    ran = federated(tmp_path, {"defenses": "clip(norm=1.0) | gaussian(std=4.0)"})
    (promise,) = ran.federation["privacy"]
    assert promise["name"] == "gaussian"
    assert 0 < promise["epsilon"] < 10
    assert np.isfinite(promise["delta"])


def test_a_guarantee_is_that_of_the_client_who_spends_most(tmp_path: Path) -> None:
    """At batches of 32: 33 examples make two steps at nearly full rate."""
    told = []
    for sizes in ([32], [33], [400], [32, 33, 400]):
        changes = {
            "defenses": "dp-sgd",
            "federation.local": "fedavg(batch_size=32)",
            "federation.clients": len(sizes),
            "data.partition": f"size(partition_sizes={sizes})",
        }
        (promise,) = History(Parts(scenario(tmp_path, changes)), Ledger(), [], None).privacy
        told.append(promise["epsilon"])
    assert told[:3] == pytest.approx([4.38, 6.49, 2.58], abs=0.01)
    assert told[3] == told[1]


@pytest.mark.parametrize(
    ("defense", "local", "channel", "told"),
    [
        ("local-dp", "fedavg(batch_size=32)", "plain", True),
        ("local-dp", "fedsgd(batch_size=10000)", "plain", True),
        ("local-dp", "fedsgd(batch_size=2)", "plain", False),  # everybody's batch
        ("local-dp", "fedavg(batch_size=32)", "trusted-sum", False),
        ("dp-sgd", "fedavg(batch_size=32)", "plain", True),  # one example more is one more told
        ("dp-sgd", "fedavg(batch_size=32)", "trusted-sum", True),  # in the sum too
        ("fed-cdp", "fedsgd(batch_size=10000)", "plain", True),
        ("fed-cdp", "fedsgd(batch_size=2)", "plain", False),
        ("central-dp", "fedavg(batch_size=32)", "plain", False),
    ],
)
def test_a_count_of_examples_beside_a_guarantee_is_told(
    defense: str, local: str, channel: str, told: bool, tmp_path: Path
) -> None:
    changes = {"defenses": defense, "federation.local": local, "channel": channel}
    history = History(Parts(scenario(tmp_path, changes)), Ledger(), [], None)
    (promise,) = history.privacy
    assert ("the number of examples is sent beside it" in promise["mechanism"]) == told
    check(Parts(scenario(tmp_path)))
