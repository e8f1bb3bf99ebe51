"""One scenario and seed give one run, whoever was asked first and whatever went before."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor, nn

from fedsim import reconstructions
from fedsim.data import DataSpec
from fedsim.defense import ClientContext, Defense, Tensors
from fedsim.models import build_model, is_buffer, travelling
from fedsim.parts import Parts, server_context
from fedsim.population import ADDRESS
from fedsim.run import _told
from fedsim.run_folder import RunFolder
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from tests.fedsim.small import Instead, Ran, federated, gray, inline, plug_in, scenario, watching

BATCHNORM = "resnet20(width=4)"
FEDAVG = "fedavg(epochs=1, batch_size=64, lr=0.1, momentum=0.9)"


@dataclass(frozen=True, kw_only=True)
class Noise(Defense):
    """Adds noise of the secret stream, and remembers each client's rounds."""

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        rounds = ctx.store.get("rounds", torch.zeros(1))
        ctx.store["rounds"] = rounds + 1
        generator = ctx.secret(self.name, ctx.round)
        return {n: t + torch.randn(t.shape, generator=generator) for n, t in update.items()}


@dataclass(frozen=True, kw_only=True)
class Widening(Defense):
    """Wraps the model by changing it in place, as it must not but may."""

    def wrap_model(self, model: nn.Module, ctx: ClientContext) -> nn.Module:
        model.register_parameter("private", nn.Parameter(torch.ones(3)))
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * 2)
        return model


def dropout(spec: DataSpec) -> nn.Module:
    pixels = spec.shape[0] * spec.shape[1] * spec.shape[2]
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(pixels, spec.num_classes))


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    def reconstruct(views: Sequence[ServerView], knowledge: Knowledge) -> None:
        list(views)

    plug_in(monkeypatch, "attack", "watching", watching(reconstruct))
    plug_in(monkeypatch, "defense", "noise", Noise)
    plug_in(monkeypatch, "defense", "widening", Widening)
    plug_in(monkeypatch, "model", "dropout", dropout)


KINDS: dict[str, dict[str, Any]] = {
    "fedsgd": {},
    "fedavg": {"federation.local": FEDAVG, "federation.rounds": 2},
    "noised": {"defenses": "noise", "federation.rounds": 2},
    "double precision": {"federation.precision": "float64"},
    "batch statistics": {
        "model.name": BATCHNORM, "model.batchnorm": "shared", "federation.local": FEDAVG,
    },
    "dropout": {"model.name": "dropout", "model.batchnorm": "shared"},
    "secure aggregation": {"channel": "secagg(max_weight=2)", "federation.rounds": 2},
    "a part of the clients": {"federation.fraction": 0.5, "federation.rounds": 3},
    "skewed": {"data.partition": "dirichlet(alpha=0.5)"},
}  # fmt: skip


def same(ours: dict[str, Tensor] | None, theirs: dict[str, Tensor] | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_repeats_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    changes = {"attack": "watching", **KINDS[kind]}
    runs = [federated(tmp_path / str(turn), changes, run_id=turn + 5) for turn in range(2)]
    for first, second in zip(*(run.views for run in runs), strict=True):
        assert (first.label, first.num_examples) == (second.label, second.num_examples)
        assert same(first.sent, second.sent)
        assert same(first.received, second.received)
    for one, other in zip(*(run.vault for run in runs), strict=True):
        assert (one.client, one.round) == (other.client, other.round)
        assert torch.equal(one.examples, other.examples)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.indices, other.indices)
        assert same(one.upload, other.upload)
    for key in ("accuracy", "bytes_up", "bytes_down", "failures", "receipts"):
        assert runs[0].federation[key] == runs[1].federation[key]


def test_a_reconstruction_repeats_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guess(views: Sequence[ServerView], knowledge: Knowledge) -> Any:
        noise = torch.rand(1, 1, 8, 8, generator=knowledge.generator("start"))
        return Instead(reconstructions.Reconstruction(noise, gray().views))

    plug_in(monkeypatch, "attack", "guessing", watching(guess))
    found = []
    for seed in (7, 7, 8):
        ran = federated(tmp_path, {"attack": "guessing", "seed": seed})
        path = ran.folder.path / "reconstructions" / "guessing.safetensors"
        found.append(reconstructions.load(path)[0].examples)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", ["fedsgd", "skewed", "a part of the clients"])
def test_another_seed_is_another_run(kind: str, tmp_path: Path) -> None:
    changes = {"attack": "watching", **KINDS[kind]}
    one, other = (federated(tmp_path, {**changes, "seed": seed}) for seed in (7, 8))
    assert not same(one.views[0].sent, other.views[0].sent)
    assert not same(one.views[0].received, other.views[0].received)


def test_the_noise_of_two_machines_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for key in ("11" * 32, "22" * 32):
        monkeypatch.setenv("FEDSIM_SECRET_KEY", key)
        found.append(federated(tmp_path, {"attack": "watching", "defenses": "noise"}).views[0])
    assert same(found[0].sent, found[1].sent)
    assert not same(found[0].received, found[1].received)


def test_the_noise_of_two_runs_differs_on_one_machine(tmp_path: Path) -> None:
    changes = {"attack": "watching", "defenses": "noise"}
    runs = [federated(tmp_path / str(i), changes, run_id=i).views[0] for i in (5, 6)]
    again = federated(tmp_path / "again", changes, run_id=5).views[0]
    assert same(runs[0].sent, runs[1].sent)
    assert not same(runs[0].received, runs[1].received)
    assert same(runs[0].received, again.received)
    parts = Parts(scenario(tmp_path))
    states = [server_context(parts, run).secret("noise").get_state() for run in (5, 6, 5)]
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])


class Asker:
    """Asks clients of one scenario to train, in any order and round."""

    def __init__(self, folder: Path, changes: dict[str, Any]) -> None:
        self.scenario = scenario(folder, changes)
        self.parts = Parts(self.scenario)
        made = RunFolder.create(self.scenario, run_id=7, engine="inline", command="a test")
        self.ran = Ran(made, self.parts)
        self.opened = inline(made, self.scenario)
        self.grid, self.context = self.opened.__enter__()
        self.arrays = travelling(self.parts.model())

    def ask(self, client: int, server_round: int) -> ArrayRecord:
        config = {"model": self.scenario.model.name, "server-round": server_round}
        content = RecordDict(
            {
                "arrays": ArrayRecord({n: Array(t.numpy()) for n, t in self.arrays.items()}),
                "config": ConfigRecord({**config, **_told(self.parts.spec)}),
                ADDRESS: ConfigRecord({"client": client}),
            }
        )
        (reply,) = self.grid.send_and_receive([Message(content, 2, "train")])
        assert not reply.has_error(), reply.error.reason
        return reply.content.array_records["arrays"]


def equal(one: ArrayRecord, other: ArrayRecord) -> bool:
    return list(one) == list(other) and all(
        np.array_equal(one[name].numpy(), other[name].numpy()) for name in one
    )


@pytest.mark.parametrize("kind", ["fedsgd", "fedavg", "noised", "batch statistics", "dropout"])
def test_neither_other_clients_nor_other_rounds_matter(kind: str, tmp_path: Path) -> None:
    changes = {"attack": "watching", **KINDS[kind]}
    alone = Asker(tmp_path, changes).ask(2, 3)
    busy = Asker(tmp_path, changes)
    for client, server_round in [(3, 1), (2, 1), (0, 3), (2, 2), (1, 3)]:
        assert not equal(busy.ask(client, server_round), alone)
    assert equal(busy.ask(2, 3), alone)
    # Asked for one round twice, a client does not send the same noise again.
    assert equal(busy.ask(2, 3), alone) == (kind not in ("noised", "dropout"))


def test_a_model_that_a_defense_changed_in_place_is_no_other_clients(tmp_path: Path) -> None:
    asker = Asker(tmp_path, {"defenses": "widening", "federation.local": FEDAVG})
    first, second = asker.ask(0, 1), asker.ask(0, 1)
    assert equal(first, second)
    assert list(first) == list(asker.arrays)


def test_each_client_remembers_its_own_rounds(tmp_path: Path) -> None:
    asker = Asker(tmp_path, {"defenses": "noise"})
    for client in (0, 1, 0, 0):
        asker.ask(client, 1)
    state = asker.context.state.array_records
    remembered = {name: record["rounds"].numpy().item() for name, record in state.items()}
    assert remembered == {"client-0.defense-store": 3.0, "client-1.defense-store": 1.0}


# -- BatchNorm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("local", ["fedsgd(batch_size=16)", FEDAVG])
@pytest.mark.parametrize("policy", ["frozen", "shared", "private"])
def test_what_travels_of_batchnorm_is_the_policy(policy: str, local: str, tmp_path: Path) -> None:
    changes = {"model.name": BATCHNORM, "model.batchnorm": policy, "federation.local": local}
    asker = Asker(tmp_path, changes)
    reply = asker.ask(0, 1)
    buffers = [name for name in asker.arrays if is_buffer(name)]
    assert buffers
    assert [name for name in reply if is_buffer(name)] == (buffers if policy == "shared" else [])
    assert not [name for name in reply if "num_batches_tracked" in name]
    if policy == "shared":
        assert any(
            not np.array_equal(reply[name].numpy(), asker.arrays[name].numpy()) for name in buffers
        )


def test_frozen_statistics_are_used_as_sent(tmp_path: Path) -> None:
    """In eval mode the gradient is that of the statistics sent, which the server may change."""
    changes = {"model.name": BATCHNORM, "federation.local": "fedsgd(batch_size=4)"}
    asker = Asker(tmp_path, changes)
    before = asker.ask(0, 1)
    name = next(name for name in asker.arrays if name.endswith("running_var"))
    asker.arrays[name] = asker.arrays[name] * 4
    assert not equal(asker.ask(0, 1), before)


def test_shared_statistics_are_plain_pytorchs(tmp_path: Path) -> None:
    changes = {
        "attack": "watching",
        "model.name": BATCHNORM,
        "model.batchnorm": "shared",
        "federation.local": "fedsgd(batch_size=16)",
    }
    ran = federated(tmp_path, changes)
    for view in ran.views:
        model = build_model(BATCHNORM, ran.parts.spec)
        model.load_state_dict(view.sent, strict=False)
        record = ran.vault.record(view.senders[0], 1)
        assert record is not None
        model.train()(record.examples)
        for name, tensor in model.state_dict().items():
            if is_buffer(name):
                assert torch.equal(tensor, view.received[name])
