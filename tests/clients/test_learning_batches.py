"""Soft labels and enlarged batches go through local training, and the truth stays the client's."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from clients.defenses.learning.ats import Ats
from clients.defenses.learning.giande import Giande
from clients.defenses.learning.gradient_mixing import GradientMixing
from clients.defenses.learning.instahide import InstaHide
from clients.defenses.learning.label_based import LabelBased
from clients.defenses.learning.label_smoothing import LabelSmoothing
from clients.defenses.learning.mixup import MixUp
from clients.defenses.learning.oasis import Oasis
from clients.per_example import per_example_gradients
from clients.trainer import FedAvg, FedSGD, batch_gradient
from fedsim.data import Split
from fedsim.defense import Defense
from fedsim.local import Local, LocalData
from fedsim.models import initial_model
from fedsim.view import SavedViews
from tests.clients.test_defenses_mixup import SPEC, client, encoded, images
from tests.fedsim.small import federated

CHAINS: list[Sequence[Defense]] = [
    *([d] for d in (MixUp(), InstaHide(), Oasis(), Ats(policies="43-47"), Giande())),
    *([d] for d in (LabelSmoothing(), LabelBased(repeats=2), GradientMixing())),
    (MixUp(), Oasis()),
    (Oasis(), MixUp()),
    (Oasis(), Giande(), LabelSmoothing()),
    (InstaHide(), LabelSmoothing()),
    (LabelBased(repeats=2), Oasis()),
]
HELD = Split(images(20).float(), torch.arange(20) % 5)


@pytest.mark.parametrize("local", [FedSGD(batch_size=6), FedAvg(batch_size=6, epochs=1)])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(d.name for d in chain))
def test_local_training_takes_what_they_make_of_a_batch(
    local: Local, chain: Sequence[Defense]
) -> None:
    data = LocalData(HELD, torch.device("cpu"), torch.float32)
    ctx = client()
    ctx.labels, ctx.plan = HELD.labels, local.plan(20, 1)
    trained = local.train(initial_model("mlp(hidden=[4])", SPEC, 0), data, chain, ctx)
    plain = local.train(initial_model("mlp(hidden=[4])", SPEC, 0), data, (), client())
    assert all(tensor.isfinite().all() for tensor in trained.upload.values())
    assert not torch.equal(trained.upload["1.weight"], plain.upload["1.weight"])
    used = trained.indices.tolist()
    assert len(set(used)) == len(used) <= 20
    assert all(ctx.effects[defense.name].changed for defense in chain)


def test_mixtures_go_through_per_example_gradients() -> None:
    model = initial_model("mlp(hidden=[4])", SPEC, 0).double()
    batch = encoded(MixUp(), images(4), torch.arange(4), client(4))
    (each,) = per_example_gradients(model, batch)
    whole = batch_gradient(model, batch, (), client())
    for name, gradient in whole.items():
        assert torch.allclose(each[name].mean(dim=0), gradient, atol=1e-12)


@pytest.mark.parametrize("local", ["fedsgd(batch_size=8, lr=0.1)", "fedavg(batch_size=256)"])
def test_vault_and_count_are_of_the_clients_own_examples(local: str, tmp_path: Path) -> None:
    changes = {"defenses": "mixup(k=4) | oasis", "federation.local": local}
    changes |= {"threat-model": "B", "attack": "linear-inversion"}
    ran = federated(tmp_path, {**changes, "federation.clients": 2})
    facts = SavedViews(ran.folder.path / "views").facts()
    assert not ran.failures
    for view, fact in zip(ran.views, facts, strict=True):
        record = ran.vault.record(view.senders[0], 1)
        assert record is not None
        own = ran.parts.dataset.train.subset(ran.parts.partitions[view.senders[0]])
        assert torch.equal(record.examples, own.subset(record.indices).images)
        assert len(set(record.indices.tolist())) == len(record.indices) > 16
        assert fact["num_examples"] == (8 if "fedsgd" in local else len(record.indices))
