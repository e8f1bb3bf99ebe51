"""Receipts say what really happened; a run in which nothing happened must not be believed."""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim import client_app
from fedsim.data import DataSpec
from fedsim.defense import Batch, ClientContext, Defense, Effect, Tensors, Verdict
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed
from fedsim.models import build_model
from fedsim.receipts import (
    in_network,
    measured_batch,
    measured_loss,
    measured_model,
    measured_sampler,
    measured_update,
)
from fedsim.registry import components
from tests.fedsim.small import federated, latest, meddling, nudge, plug_in, scenario, watching

CTX: Any = None
UPDATE = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}


def effect_of(hook: Any, *, times: int = 1) -> dict[str, Any]:
    effect = Effect()
    for _ in range(times):
        measured_update(effect, hook, UPDATE, CTX)
    return effect.receipt()


def test_a_hook_that_returns_what_it_got_changed_nothing() -> None:
    receipt = effect_of(lambda update, ctx: update)
    assert not receipt["changed"]
    assert receipt["cosine"] is receipt["norm_ratio"] is None
    assert not effect_of(lambda update, ctx: {n: t.clone() for n, t in update.items()})["changed"]


@pytest.mark.parametrize(
    ("hook", "cosine", "ratio"),
    [
        (lambda update, ctx: {n: t / 2 for n, t in update.items()}, 1.0, 0.5),
        (lambda update, ctx: {n: -t for n, t in update.items()}, -1.0, 1.0),
        (lambda update, ctx: {"a": update["a"], "b": update["b"] * 0}, 0.6, 0.6),
        (lambda update, ctx: {n: t * 0 for n, t in update.items()}, None, 0.0),
    ],
)
def test_cosine_and_norm_ratio_are_over_all_arrays(
    hook: Any, cosine: float | None, ratio: float
) -> None:
    for times in (1, 3):
        receipt = effect_of(hook, times=times)
        assert receipt["changed"]
        assert receipt["norm_ratio"] == pytest.approx(ratio)
        assert receipt["cosine"] == (None if cosine is None else pytest.approx(cosine))


def test_a_batch_is_changed_if_its_images_or_labels_are() -> None:
    batch: Batch = torch.zeros(2, 1, 8, 8), torch.tensor([1, 2])
    changes: dict[str, tuple[Any, bool]] = {
        "same": (lambda b, ctx: b, False),
        "equal": (lambda b, ctx: (b[0].clone(), b[1].clone()), False),
        "images": (lambda b, ctx: (b[0] + 1, b[1]), True),
        "labels": (lambda b, ctx: (b[0], b[1] + 1), True),
        "one-hot labels": (lambda b, ctx: (b[0], torch.eye(3)[b[1]]), False),
        "soft labels": (lambda b, ctx: (b[0], 0.9 * torch.eye(3)[b[1]] + 0.1 / 3), True),
        "rounded away": (lambda b, ctx: (b[0], torch.eye(3)[b[1]] + 1e-9), False),
        "not finite": (lambda b, ctx: (b[0], torch.eye(3)[b[1]] / 0), True),
        "another soft batch": (lambda b, ctx: (b[0], torch.eye(3)), True),
        "larger batch": (lambda b, ctx: (b[0].repeat(2, 1, 1, 1), b[1].repeat(2)), True),
    }
    for hook, changed in changes.values():
        effect = Effect()
        measured_batch(effect, hook, batch, CTX)
        assert effect.changed == changed


def test_an_update_that_is_rounded_away_where_it_is_added_is_no_change() -> None:
    for by, changed in {1e-9: False, 1e-3: True}.items():
        for start in (None, {name: torch.ones_like(t) for name, t in UPDATE.items()}):
            effect = Effect()
            tiny = {name: t + by * (t == 0) for name, t in UPDATE.items()}
            measured_update(effect, lambda update, ctx, tiny=tiny: tiny, UPDATE, CTX, start)
            assert effect.changed == (changed or start is None)


MODEL: Any = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
IMAGES, LABELS = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])


def mean_loss(model: nn.Module, batch: Batch, ctx: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("hook", "changed"),
    [
        (lambda model, batch, ctx: None, False),
        (mean_loss, False),
        (lambda *given: mean_loss(*given) + 0 * MODEL[1].weight.sum(), False),
        (lambda *given: mean_loss(*given) + MODEL[1].weight.square().sum(), True),
        (lambda model, batch, ctx: model(batch[0]).square().mean(), True),
        (lambda model, batch, ctx: mean_loss(model, (1 - batch[0], batch[1]), ctx) * 2, True),
        (lambda model, batch, ctx: model[1].weight.sum(), True),  # it looks at no example
    ],
)
def test_a_loss_is_changed_if_it_is_not_cross_entropy(hook: Any, changed: bool) -> None:
    effect = Effect()
    measured_loss(effect, hook, MODEL, (IMAGES, LABELS), CTX)
    assert effect.changed == changed
    assert not MODEL._forward_hooks


def with_another(model: nn.Module, ctx: Any) -> nn.Module:
    model.add_module("more", nn.Linear(3, 3))
    return model


def moved(model: nn.Module, ctx: Any) -> nn.Module:
    with torch.no_grad():
        model[1].bias[0] += 1  # type: ignore[index]
    return model


def counting(model: nn.Module, ctx: Any) -> nn.Module:
    model.register_forward_hook(lambda *seen: None)
    return model


@pytest.mark.parametrize(
    ("hook", "changed"),
    [
        (lambda model, ctx: model, False),
        (lambda model, ctx: copy.deepcopy(model), False),
        (counting, False),
        (with_another, True),
        (moved, True),
        (lambda model, ctx: nn.Sequential(model), True),
        (lambda model, ctx: nn.Sequential(nn.Identity(), model[1]), True),
    ],
)
def test_a_model_is_changed_if_its_modules_or_tensors_are(hook: Any, changed: bool) -> None:
    effect = Effect()
    measured_model(effect, hook, copy.deepcopy(MODEL), CTX)
    assert effect.changed == changed


@pytest.mark.parametrize(
    ("hook", "changed"),
    [
        (lambda batches, examples, ctx: batches, False),
        (lambda batches, examples, ctx: [batch.clone() for batch in batches], False),
        (lambda batches, examples, ctx: [batch.flip(0) for batch in batches], True),
        (lambda batches, examples, ctx: list(batches)[:1], True),
        (lambda batches, examples, ctx: [*batches, torch.arange(2)], True),
    ],
)
def test_a_sampler_changes_if_its_batches_are_others(hook: Any, changed: bool) -> None:
    effect, drawn = Effect(), [torch.arange(2), torch.arange(2, 4)]
    list(measured_sampler(effect, hook, iter(drawn), 4, CTX))
    assert effect.changed == changed


@pytest.mark.parametrize(
    ("name", "sent", "there"),
    [
        ("pefl", "pefl-network(of='mlp')", True),
        ("pefl", "precode-network(of=\"pefl-network(of='mlp')\")", True),
        ("pefl", "mlp", False),  # whoever sent it took the defense out
        ("clip", "mlp", False),
        ("dropout", "dropout-network(of='mlp')", False),  # it tells what was dropped
    ],
)
def test_a_defense_in_the_network_is_there_if_the_network_sent_has_it(
    name: str, sent: str, there: bool
) -> None:
    defense = components("defense")[name]
    assert in_network(defense(), "mlp", sent) == there


# -- in a run -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Idle(Defense):
    """Does nothing, and should."""


@dataclass(frozen=True, kw_only=True)
class Pretending(Defense):
    """Has many hooks, all of which come to nothing."""

    def sampler(self, batches: Iterable[Tensor], examples: int, ctx: ClientContext) -> Any:
        return [batch.clone() for batch in batches]

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:
        return batch[0].clone(), batch[1].clone()

    def wrap_model(self, model: nn.Module, ctx: ClientContext) -> nn.Module:
        return model

    def loss(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensor:
        return mean_loss(model, batch, ctx)

    def learning_rate(self, lr: float, ctx: ClientContext) -> float:
        return lr * 1.0


@dataclass(frozen=True, kw_only=True)
class Blinking(Defense):
    """Changes the batch, of half the clients."""

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:
        return (1 - batch[0], batch[1]) if ctx.client % 2 else batch


@dataclass(frozen=True, kw_only=True)
class Suspicious(Defense):
    """Refuses the model, at some clients, and says what it measured."""

    refusing: int = 1
    changes_upload = False

    def inspect(
        self, model: nn.Module, received: Tensors, probe: Batch, ctx: ClientContext
    ) -> Verdict:
        return Verdict(
            accept=ctx.client >= self.refusing,
            checks={"largest": float(max(t.abs().max() for t in received.values()))},
            reason="too large a weight" if ctx.client < self.refusing else "",
        )


@dataclass(frozen=True, kw_only=True)
class Sparse(Defense):
    """Trains on the first half of the examples only."""

    changes_upload = False

    def sampler(self, batches: Iterable[Tensor], examples: int, ctx: ClientContext) -> Any:
        return [torch.arange(2)]


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: list(views)))
    plug_in(monkeypatch, "attack", "blind", watching(lambda views, knowledge: None))
    plug_in(monkeypatch, "attack", "meddling", meddling(nudge))
    plug_in(monkeypatch, "attack", "mild", meddling(lambda arrays, knowledge: None))
    for name, one in {
        "idle": Idle, "pretending": Pretending, "blinking": Blinking, "suspicious": Suspicious,
        "sparse": Sparse,
    }.items():  # fmt: skip
        plug_in(monkeypatch, "defense", name, one)


def test_a_defense_leaves_its_receipt_in_the_vault(tmp_path: Path) -> None:
    changes = {"attack": "watching", "defenses": "blinking | clip(norm=1e-3)"}
    ran = federated(tmp_path, changes)
    for record in ran.vault:
        blinking, clip = record.receipts
        assert blinking["changed"] == bool(record.client % 2)
        assert clip["name"] == "clip"
        assert clip["parameters"]["norm"] == 1e-3
        assert clip["changed"]
        assert clip["cosine"] == pytest.approx(1.0, abs=1e-5)
        assert 0 < clip["norm_ratio"] < 1
        assert clip["seconds"] > 0
    expected = [("blinking", True), ("clip", True)]
    told = ran.federation["defenses_expected"]
    assert [(one["name"], one["must_change"]) for one in told] == expected


def test_a_run_whose_defense_changed_nothing_fails_loudly(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"'idle' is switched on and changed 0/4 uploads"):
        run_inline(scenario(tmp_path, {"attack": "watching", "defenses": "idle"}), "a test")
    report = json.loads((latest(tmp_path).path / "report.json").read_text())
    assert "idle" in report["failed"]


ACTING = [
    "mixup", "instahide", "oasis", "label-smoothing", "gradient-mixing", "label-based",
    "label-based(groups=2)", "giande", "giande(features='body.3')", "digestnn", "precode",
    "precode(beta=0.0)", "cvb", "dropout", "spn", "fedkl", "pefl", "pefl(private=True)",
    "lr-perturbation", "dp-sgd",
]  # fmt: skip


@pytest.mark.parametrize("defense", ACTING)
def test_what_a_defense_does_before_the_gradient_is_seen(defense: str, tmp_path: Path) -> None:
    changes = {
        "defenses": defense,
        "model.name": "convnet(width=8)",
        "federation.clients": 2,
        "federation.local": "fedsgd(batch_size=8)",
    }
    if defense == "lr-perturbation":
        changes["federation.local"] = "fedavg(batch_size=200)"
    if defense in ("dropout", "fedkl"):
        changes["model.batchnorm"] = "private"
    if "groups" in defense:
        changes |= {"model.name": "convnet(width=8, norm='batch')", "model.batchnorm": "private"}
    ran = federated(tmp_path, changes)
    assert [record.receipts[0]["changed"] for record in ran.vault] == [True, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"defenses": "label-smoothing(amount=1e-8)"},
        {"defenses": "dropout(p=1e-9)", "model.batchnorm": "private"},
        {"defenses": "gaussian(std=1e-30)", "federation.local": "fedavg(batch_size=32)"},
    ],
    ids=lambda changes: changes["defenses"],
)
def test_what_leaves_uploads_as_they_are_fails_the_run(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    small = {"federation.clients": 2, "model.name": "mlp(hidden=[8, 8])", "attack": "none"}
    with pytest.raises(RunFailed, match="is switched on and changed 0/2 uploads"):
        run_inline(scenario(tmp_path, {**small, **changes}), "a test")


@pytest.mark.parametrize("local", ["fedsgd(batch_size=4)", "fedavg(batch_size=32)"])
def test_hooks_that_come_to_nothing_fail_the_run(local: str, tmp_path: Path) -> None:
    changes = {"attack": "none", "defenses": "pretending", "federation.local": local}
    with pytest.raises(RunFailed, match=r"'pretending' is switched on and changed 0/4 uploads"):
        run_inline(scenario(tmp_path, changes), "a test")


def test_an_honest_runs_idle_defense_fails_it_too(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="'idle' is switched on"):
        run_inline(scenario(tmp_path, {"attack": "none", "defenses": "idle"}), "a test")


def test_a_run_whose_attack_read_nothing_fails_loudly(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="'blind' used nothing: it read no view"):
        run_inline(scenario(tmp_path, {"attack": "blind"}), "a test")


def test_a_manipulation_says_whom_it_reached(tmp_path: Path) -> None:
    page = run_inline(scenario(tmp_path, {"attack": "meddling"}), "a test")
    report = json.loads(page.with_suffix(".json").read_text())
    assert report["federation"]["receipts"] == ["sent a modified model to 4/4 clients in round 1"]


def test_a_manipulation_that_changes_no_model_fails_loudly(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="'mild' manipulates the model, yet no client was sent"):
        run_inline(scenario(tmp_path, {"attack": "mild"}), "a test")


def test_a_client_that_refuses_the_model_is_named_with_what_it_measured(tmp_path: Path) -> None:
    page = run_inline(scenario(tmp_path, {"attack": "watching", "defenses": "suspicious"}), "test")
    report = json.loads(page.with_suffix(".json").read_text())
    (failure,) = report["federation"]["failures"]
    assert failure["client"] == 0
    assert "suspicious refused the model: too large a weight" in failure["reason"]
    verdicts = {one["client"]: one["verdict"] for one in report["detection"]}
    assert verdicts[0].startswith("refused")
    assert verdicts[3] == "accepted"
    assert all(one["checks"]["largest"] > 0 for one in report["detection"])


def test_clients_that_refuse_cost_no_model_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who refused it looked at a copy: the next client gets the same."""
    built: list[str] = []

    def build(expression: str, spec: DataSpec) -> nn.Module:
        built.append(expression)
        return build_model(expression, spec)

    monkeypatch.setattr(client_app, "build_model", build)
    defense = "suspicious(refusing=3)"
    ran = federated(tmp_path, {"attack": "watching", "defenses": defense})
    assert [client for _, client, _ in ran.failures] == [0, 1, 2]
    assert built == ["mlp(hidden=[8])"]


def test_the_vault_holds_what_was_trained_on(tmp_path: Path) -> None:
    changes = {
        "attack": "watching",
        "defenses": "sparse",
        "federation.local": "fedavg(batch_size=4)",
    }
    ran = federated(tmp_path, changes)
    split = ran.parts.dataset.train
    for record in ran.vault:
        assert record.indices.tolist() == [0, 1]
        images, labels = split.batch(ran.parts.partitions[record.client][:2])
        assert torch.equal(record.examples, images)
        assert torch.equal(record.labels, labels)
    assert {view.num_examples for view in ran.views} == {2}
