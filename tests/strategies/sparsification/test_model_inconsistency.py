"""What gradient suppression promises: to the bit, or to SecAgg+'s rounding step behind it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim import reconstructions, registry
from fedsim.attack import Reconstruction
from fedsim.errors import ScenarioError
from fedsim.threat import Knowledge, least_model
from fedsim.view import ServerView
from strategies.attacks.analytic.sparsification.model_inconsistency import ModelInconsistency
from strategies.attacks.labels.rule import classifier
from tests.fedsim.small import Ran, federated

HASTY = "then='inverting-gradients(iterations=1, labels=\\'idlg\\')'"
SETTINGS = {
    "data.dataset": "digits",
    "model.name": "mlp(hidden=[16, 16])",
    "federation.local": "fedsgd(batch_size=4, lr=0.1)",
    "attack": "model-inconsistency",
}


def knowing(ran: Ran) -> Knowledge:
    return Knowledge(
        "F",
        data=ran.parts.spec,
        training=ran.parts.local.details(),
        seed=1,
        device=torch.device("cpu"),
        num_examples={view.label: view.num_examples for view in ran.views},
    )


def taken(ran: Ran) -> list[tuple[ServerView, ServerView, int]]:
    """Return each view with the target in it, the target's own, and of how many examples it is."""
    attack = ran.parts.attack
    assert isinstance(attack, ModelInconsistency)
    found = []
    for view in ran.views:
        target = attack.target(view.round)
        if target in view.senders:
            found.append((view, *attack.unmixed(view, target, knowing(ran))))
    return found


def upload(ran: Ran, view: ServerView) -> tuple[dict[str, Tensor], int]:
    """Return what the target uploaded, from the vault, and on how many examples."""
    (client,) = view.senders
    record = ran.vault.record(client, view.round)
    assert record is not None
    assert record.upload is not None
    return record.upload, len(record.labels)


def found(ran: Ran) -> Reconstruction:
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    return reconstructions.load(path)[0]


def head_of(ran: Ran) -> str:
    return classifier(ran.parts.model())[0]


# -- suppression ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "model",
    ["mlp(hidden=[16, 16])", "convnet(width=4)", "lenet(activation='relu')", "resnet20(width=8)"],
)
def test_all_others_gradients_are_exactly_zero_but_for_the_last_bias(
    model: str, tmp_path: Path
) -> None:
    # Untrained, with BatchNorm at rest, a residual network's shortcuts carry dozens.
    attack = f"model-inconsistency({HASTY}, targets=[2], depth=1024.0)"
    changes = {**SETTINGS, "model.name": model, "federation.local": "fedsgd(batch_size=1)"}
    ran = federated(tmp_path, {**changes, "attack": attack})
    for view in ran.views:
        moved = {name for name, gradient in view.received.items() if gradient.count_nonzero()}
        if view.senders == (2,):
            assert len(moved) > 2
        else:
            assert moved == {f"{head_of(ran)}.bias"}


def test_the_two_models_differ_in_one_layer_s_biases_by_the_depth(tmp_path: Path) -> None:
    ran = federated(tmp_path, {**SETTINGS, "attack": "model-inconsistency(targets=[1])"})
    live, dead = ran.views[1].sent, ran.views[0].sent
    differing = [name for name in live if not torch.equal(live[name], dead[name])]
    assert differing == ["3.bias"]
    assert torch.equal(live["3.bias"] - 64, dead["3.bias"])
    assert torch.equal(dead["3.bias"] + 64, live["3.bias"])
    honest = ran.parts.model().state_dict()
    assert float((live["3.bias"] - honest["3.bias"]).abs().max()) <= 64 * 2**-24


@pytest.mark.parametrize("clients", [2, 8, pytest.param(32, marks=pytest.mark.slow)])
def test_behind_secagg_the_sum_is_the_targets_gradient_to_a_step(
    clients: int, tmp_path: Path
) -> None:
    attack = f"model-inconsistency(targets=[{clients - 1}, 0])"
    changes = {"federation.clients": clients, "federation.rounds": 2}
    changes |= {"channel": "secagg(max_weight=4)", "attack": attack}
    ran = federated(tmp_path, {**SETTINGS, **changes})
    assert ran.failures == []
    for view, own, examples in taken(ran):
        assert view.senders == tuple(range(clients))
        mine, count = upload(ran, own)
        assert examples == count == 4
        assert own.received.keys() == mine.keys() - {f"{head_of(ran)}.bias"}
        for name, gradient in own.received.items():
            # One stochastic rounding, of the target's own; the others' zeros are on the grid.
            assert float((gradient - mine[name]).abs().max()) <= 16 / 2**22 + clients * 1e-6
    assert [own.senders for _, own, _ in taken(ran)] == [(clients - 1,), (0,)]


def test_the_sum_of_plain_uploads_is_the_target_s_to_the_bit(tmp_path: Path) -> None:
    ran = federated(tmp_path, SETTINGS)
    for name in ran.views[0].received.keys() - {f"{head_of(ran)}.bias"}:
        total = torch.stack([view.received[name] for view in ran.views]).sum(dim=0)
        assert torch.equal(total, ran.views[0].received[name])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_after_local_training_the_sum_moves_by_the_target_s_update(
    momentum: float, tmp_path: Path
) -> None:
    local = f"fedavg(epochs=2, batch_size=8, lr=0.1, momentum={momentum})"
    sizes = [60, 20, 30, 50]
    changes = {"data.partition": f"size(partition_sizes={sizes})", "federation.local": local}
    changes |= {"channel": "secagg(max_weight=1000)", "attack": "model-inconsistency(targets=[1])"}
    ran = federated(tmp_path, {**SETTINGS, **changes})
    ((_, own, examples),) = taken(ran)
    mine, count = upload(ran, own)
    assert examples == count == 20
    step = 16 / 2**22 * 1000 / 20
    for name, received in own.received.items():
        moved = own.sent[name].double() - received
        true = own.sent[name].double() - mine[name].double()
        assert float((moved - true).abs().max()) <= 4 * step
    head = f"{head_of(ran)}.weight"
    assert float((own.sent[head] - own.received[head]).abs().max()) > 20 * step


# -- the mark ------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["mlp(hidden=[16, 16])", "convnet(width=4)"])
def test_the_mark_tells_the_target_s_own_last_bias(model: str, tmp_path: Path) -> None:
    changes = {"model.name": model, "channel": "secagg(max_weight=4)"}
    attack = "model-inconsistency(then='inverting-gradients(iterations=1)', mark=True)"
    ran = federated(tmp_path, {**SETTINGS, **changes, "attack": attack})
    ((_, own, _),) = taken(ran)
    mine, _ = upload(ran, own)
    assert own.received.keys() == mine.keys()
    name = f"{head_of(ran)}.bias"
    assert float((own.received[name] - mine[name]).abs().max()) <= 16 / 2**22 + 1e-6
    record = ran.vault.record(0, 1)
    assert record is not None
    labels = found(ran).labels
    assert labels is not None
    assert sorted(labels.tolist()) == sorted(record.labels.tolist())


# -- what follows --------------------------------------------------------------------------------
@pytest.mark.parametrize("clients", [2, 8, pytest.param(32, marks=pytest.mark.slow)])
def test_one_image_is_read_out_of_a_sum_however_many_there_are(
    clients: int, tmp_path: Path
) -> None:
    changes = {"federation.clients": clients, "channel": "secagg(max_weight=1)"}
    changes |= {"federation.local": "fedsgd(batch_size=1, lr=0.1)"}
    ran = federated(tmp_path, {**SETTINGS, **changes})
    record = ran.vault.record(0, 1)
    assert record is not None
    (image,) = found(ran).examples
    assert float((image - record.examples[0]).abs().max()) < 2e-2
    assert found(ran).labels is not None
    assert found(ran).labels.tolist() == record.labels.tolist()  # type: ignore[union-attr]


def test_a_manipulation_is_the_target_s_payload(tmp_path: Path) -> None:
    attack = "model-inconsistency(then='robbing-the-fed(units=64)')"
    changes = {"threat-model": "G", "channel": "secagg(max_weight=4)", "attack": attack}
    changes |= {"federation.clients": 8, "data.dataset": "photo-tiles"}
    ran = federated(tmp_path, {**SETTINGS, **changes})
    record = ran.vault.record(0, 1)
    assert record is not None
    candidates = found(ran).examples.double()
    assert 1 <= len(candidates) <= 4
    nearest = [(record.examples - image).square().mean(dim=(1, 2, 3)).min() for image in candidates]
    assert sum(float(error) < 1e-4 for error in nearest) >= 2


# -- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("model-inconsistency(targets=[])", "names nobody"),
        ("model-inconsistency(depth=50.0)", "power of two"),
        ("model-inconsistency(then='model-inconsistency')", "the same model"),
        ("model-inconsistency(then='fishing')", "the same model"),
        ("model-inconsistency(then='sybil-sa-dp')", "leaves it open who they are"),
        ("model-inconsistency(then='dlg(')", "then"),
        ("model-inconsistency(then=\"inverting-gradients(labels='oracle')\")", "whole sum"),
    ],
)
def test_what_cannot_be_meant_is_refused(expression: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        registry.build("attack", expression, "attack")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "mlp(hidden=[])"}, "hidden layer"),
        ({"model.name": "lenet"}, "ReLU before the last layer"),
        ({"attack": "model-inconsistency(depth=0.0625)"}, "let depth be more"),
        ({"attack": "model-inconsistency(then='inverting-gradients')"}, "no bias"),
        (
            {
                "model.name": "resnet20(width=8)",
                "attack": "model-inconsistency(mark=True, depth=1024.0)",
            },
            "shortcut",
        ),
        (
            {
                "attack": "model-inconsistency(mark=True)",
                "federation.local": "fedavg(batch_size=8)",
            },
            "mark=False",
        ),
        ({"attack": "model-inconsistency(then='robbing-the-fed')"}, "surrogate"),
        ({"attack": "model-inconsistency(targets=[0, 9])"}, "target 9 is none of the"),
        ({"federation.local": "fedavg(batch_size=8, weight_decay=0.1)"}, r"weight_decay=0\.0"),
        (
            {"federation.local": "fedavg(batch_size=8)", "channel": "secagg(max_weight=1000)"},
            "let depth be",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anybody_trains(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ScenarioError, match=message):
        federated(tmp_path, {**SETTINGS, **changes})


def test_the_threat_model_is_that_of_the_stronger_part() -> None:
    assert least_model(ModelInconsistency().required) == "F"
    assert least_model(ModelInconsistency(then="robbing-the-fed").required) == "G"
