"""What a manipulator can do beside changing the model: remember, tailor, bring its own devices."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from fedsim.attack import Manipulation, ModelToSend, Reconstruction
from fedsim.data import split_test
from fedsim.defense import Batch, ClientContext, Defense, Tensors, Verdict
from fedsim.models import build_model, load_arrays
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from tests.fedsim.small import NOBODY, federated, gray, nudge, plug_in


@dataclass(frozen=True, kw_only=True)
class Remembering(Manipulation):
    """Says in a bias how many views it has seen, and of how many examples."""

    paper = NOBODY
    needs = frozenset({Capability.UPDATES, Capability.BASICS, Capability.MANIPULATION})

    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        seen = [knowledge.num_examples(view) for view in knowledge.history]
        name = next(name for name in arrays if name.endswith("bias"))
        told = torch.full_like(arrays[name], float(100 * len(seen) + sum(seen)))
        return ModelToSend(expression, {**arrays, name: told})

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        return gray()


@dataclass(frozen=True, kw_only=True)
class Tailoring(Remembering):
    """Says in a bias which client it is for."""

    calls: ClassVar[list[int]] = []
    seeds: ClassVar[list[int]] = []

    def tailor(self, sent: ModelToSend, client: int, server_round: int) -> ModelToSend:
        self.calls.append(client)
        self.seeds.append(torch.initial_seed())
        name = next(name for name in sent.arrays if name.endswith("bias"))
        own = torch.full_like(sent.arrays[name], float(client))
        return dataclasses.replace(sent, arrays={**sent.arrays, name: own})


@dataclass(frozen=True, kw_only=True)
class Flooding(Remembering):
    """Trains one client among devices of its own."""

    needs = frozenset(Remembering.needs | {Capability.SELECTION})

    @property
    def sybils(self) -> int:
        return 3

    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        nudge(arrays)
        return ModelToSend(expression, arrays)

    def select(self, clients: Sequence[int], server_round: int) -> Sequence[int]:
        return [1, *clients[-self.sybils :]]


@dataclass(frozen=True, kw_only=True)
class Peeping(Remembering):
    """Sends the honest model, and looks for numbers of examples where they were."""

    seen: ClassVar[list[int | None]] = []

    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        history = knowledge.history
        self.seen.extend(view.num_examples for view in [*history, *history[:1], *history[-1:]])
        return ModelToSend(expression, arrays)


@dataclass(frozen=True, kw_only=True)
class Sparing(Peeping):
    """Makes each client a model anew, and changes just one."""

    def tailor(self, sent: ModelToSend, client: int, server_round: int) -> ModelToSend:
        own = {name: tensor.clone() for name, tensor in sent.arrays.items()}
        if client == 2:
            nudge(own)
        return dataclasses.replace(sent, arrays=own)


@dataclass(frozen=True, kw_only=True)
class Wholly(Remembering):
    """Makes each client a model of which all arrays are its own."""

    calls: ClassVar[list[int]] = []

    def tailor(self, sent: ModelToSend, client: int, server_round: int) -> ModelToSend:
        self.calls.append(client)
        own = {name: tensor + client for name, tensor in sent.arrays.items()}
        return dataclasses.replace(sent, arrays=own)


def bias(view: ServerView) -> Tensor:
    return view.sent[next(name for name in view.sent if name.endswith("bias"))]


def test_a_manipulator_reads_what_came_back_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "remembering", Remembering)
    ran = federated(tmp_path, {"attack": "remembering", "federation.rounds": 3})
    told = {view.round: float(bias(view)[0]) for view in ran.views}
    assert told == {1: 0.0, 2: 400.0 + 4 * 2, 3: 800.0 + 8 * 2}


def test_what_a_manipulator_remembers_is_blanked_of_what_it_must_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Peeping.seen.clear()
    plug_in(monkeypatch, "attack", "peeping", Peeping)
    ran = federated(tmp_path, {"attack": "peeping", "federation.rounds": 2})
    assert Peeping.seen == [None] * 6
    assert ran.federation["used"] == [Capability.UPDATES.value]


def test_each_client_can_get_a_model_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "tailoring", Tailoring)
    ran = federated(tmp_path, {"attack": "tailoring"})
    assert [float(bias(view)[0]) for view in ran.views] == [0.0, 1.0, 2.0, 3.0]
    others = [{n: t for n, t in view.sent.items() if "bias" not in n} for view in ran.views]
    assert all(torch.equal(others[0][name], one[name]) for one in others for name in one)
    assert (
        "sent a modified model, to each its own, to 4/4 clients in round 1"
        in (ran.federation["receipts"])
    )


def test_a_model_that_is_the_honest_one_is_not_counted_as_modified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that is made anew for a client and says the same."""

    plug_in(monkeypatch, "attack", "sparing", Sparing)
    ran = federated(tmp_path, {"attack": "sparing"})
    told = "sent a modified model, to each its own, to 1/4 clients in round 1"
    assert ran.federation["receipts"] == [told]


def test_tailoring_happens_outside_what_is_seeded_for_a_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, the process's global generators are the client's secret stream."""
    Tailoring.calls.clear()
    Tailoring.seeds.clear()
    plug_in(monkeypatch, "attack", "tailoring", Tailoring)
    federated(tmp_path, {"attack": "tailoring"})
    seeds = {
        client: {seed for one, seed in zip(Tailoring.calls, Tailoring.seeds, strict=True)
                 if one == client}
        for client in range(4)
    }  # fmt: skip
    assert seeds[0] == seeds[1] == seeds[2] == seeds[3]


def test_a_model_of_ones_own_is_made_once_to_be_told_sent_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many arrays of it are the client's own."""

    Wholly.calls.clear()
    plug_in(monkeypatch, "attack", "wholly", Wholly)
    federated(tmp_path, {"attack": "wholly", "federation.rounds": 2})
    # The last round's are measured as well.
    assert max(Wholly.calls.count(client) for client in range(4)) <= 2 * 3 + 1


def test_the_federation_says_what_clients_got_beside_the_honest_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "tailoring", Tailoring)
    ran = federated(tmp_path / "each", {"attack": "tailoring", "federation.rounds": 2})
    told = ran.federation["manipulation"]
    assert (told["parameters"], told["bytes"]) == (told["honest_parameters"], told["honest_bytes"])
    assert told["bytes"] == 4 * told["parameters"]
    assert told["models_measured"] == 4
    attack = "robbing-the-fed(units=16)"
    ran = federated(tmp_path / "one", {"attack": attack, "threat-model": "G"})
    told, accuracy = ran.federation["manipulation"], ran.federation["accuracy"]
    assert told["parameters"] - told["honest_parameters"] == 16 * (8 * 8 + 1)
    assert told["models_measured"] == 1
    assert told["honest_accuracy"] == accuracy["before"]
    model = build_model(ran.views[0].model, ran.parts.spec)
    load_arrays(model, ran.views[0].sent)
    holdout = split_test(ran.parts.dataset.test, ran.parts.scenario.seed)[1]
    images, labels = holdout.batch(torch.arange(len(holdout)))
    right = (model.eval()(images).argmax(dim=1) == labels).double().mean()
    assert told["accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize(
    ("local", "weight"),
    [("fedsgd(batch_size=2, lr=0.1)", 2), ("fedavg(batch_size=64, lr=0.1)", 400)],
)
def test_among_sybils_the_sum_is_the_targets_own_upload(
    local: str, weight: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "flooding", Flooding)
    settings = {"attack": "flooding", "threat-model": "H", "federation.local": local}
    ran = federated(tmp_path, {**settings, "channel": f"secagg(max_weight={weight})"})
    (view,) = ran.views
    record = ran.vault.record(1, 1)
    assert record is not None
    assert view.senders == (1,)
    assert len(ran.vault) == 1
    examples = len(record.labels)
    assert view.num_examples == examples + 3
    assert record.upload is not None
    for name, moved in view.update().items():
        own = record.upload[name]
        own = own if view.kind == "gradient" else view.sent[name] - own
        share = examples / (examples + 3)
        assert torch.allclose(moved.double(), own.double() * share, atol=2e-5)


@dataclass(frozen=True, kw_only=True)
class Looking(Defense):
    """Keeps the batch that it was shown."""

    changes_upload = False
    shown: ClassVar[dict[int, Batch]] = {}

    def inspect(
        self, model: nn.Module, received: Tensors, probe: Batch, ctx: ClientContext
    ) -> Verdict:
        self.shown[ctx.client] = probe
        for parameter in model.parameters():
            parameter.data.zero_()
        return Verdict(accept=True, checks={"examples": float(len(probe[1]))})


def test_a_defense_is_shown_the_very_batch_and_a_copy_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "remembering", Remembering)
    plug_in(monkeypatch, "defense", "looking", Looking)
    ran = federated(tmp_path, {"attack": "remembering", "defenses": "looking"})
    for record in ran.vault:
        images, labels = Looking.shown[record.client]
        assert torch.equal(images, record.examples)
        assert torch.equal(labels, record.labels)
    assert all(tensor.any() for view in ran.views for tensor in view.received.values())
