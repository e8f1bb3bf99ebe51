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
from tests.fedsim.small import NOBODY, federated, gray, plug_in


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

    def tailor(self, sent: ModelToSend, client: int, server_round: int) -> ModelToSend:
        self.calls.append(client)
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
        return ModelToSend(expression, arrays)

    def select(self, clients: Sequence[int], server_round: int) -> Sequence[int]:
        return [1, *clients[-self.sybils :]]


def bias(view: ServerView) -> Tensor:
    return view.sent[next(name for name in view.sent if name.endswith("bias"))]


def test_a_manipulator_reads_what_came_back_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "remembering", Remembering)
    ran = federated(tmp_path, {"attack": "remembering", "federation.rounds": 3})
    told = {view.round: float(bias(view)[0]) for view in ran.views}
    assert told == {1: 0.0, 2: 400.0 + 4 * 2, 3: 800.0 + 8 * 2}


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
