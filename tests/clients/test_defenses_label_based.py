"""Labels repeat as often as promised; groups have statistics of their own, and none travels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from clients.defenses.learning.label_based import GhostBatchNorm2d, LabelBased
from fedsim.defense import Refusal
from fedsim.errors import ScenarioError
from fedsim.models import initial_model
from tests.clients.test_defenses_mixup import SPEC, client, images
from tests.fedsim.small import federated

GROUPED: dict[str, Any] = {
    "defenses": "label-based(repeats=2, groups=2)",
    "attack": "inverting-gradients(iterations=1)",
    "model.name": "convnet(width=4, norm='batch')",
    "model.batchnorm": "private",
    "federation.local": "fedsgd(batch_size=8, lr=0.1)",
}


@pytest.mark.parametrize("repeats", [2, 4, 8])
def test_every_label_in_a_batch_is_there_as_often_as_promised(repeats: int) -> None:
    ctx = client(200)
    batches = LabelBased(repeats=repeats).sampler([torch.arange(16)] * 5, 200, ctx)
    for indices in batches:
        assert len(set(indices.tolist())) == len(indices) == 16
        assert ctx.labels is not None
        assert set(ctx.labels[indices].bincount().tolist()) <= {0, repeats}


def test_batches_are_secret_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[list[int]]:
        batches = LabelBased().sampler([torch.arange(16)] * 2, 200, client(200))
        return [indices.tolist() for indices in batches]

    first = drawn()
    assert first == drawn()
    assert first[0] != first[1]
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "03" * 32)
    assert first != drawn()


def test_too_few_of_every_class_is_refused_and_of_some_makes_smaller_batches() -> None:
    with pytest.raises(Refusal, match="no class has the 4 examples"):
        list(LabelBased().sampler([torch.arange(16)], 20, client(20)))
    ctx = client(20)
    ctx.labels = torch.tensor([5] * 4 + [1] * 3 + [2] * 2)
    (indices,) = LabelBased().sampler([torch.arange(8)], 9, ctx)
    assert sorted(indices.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("groups", "order", "same"),
    [
        pytest.param(1, [5, 2, 7, 0, 3, 6, 1, 4], True, id="any order, one group"),
        pytest.param(2, [2, 0, 3, 1, 7, 5, 4, 6], True, id="within both groups"),
        pytest.param(2, [4, 5, 6, 7, 0, 1, 2, 3], True, id="the groups' own order"),
        pytest.param(2, [5, 2, 7, 0, 3, 6, 1, 4], False, id="across groups"),
    ],
)
def test_the_order_of_examples_is_not_in_the_gradient_but_who_shares_a_group_is(
    groups: int, order: list[int], same: bool
) -> None:
    """Candidates under labels in another order match with the same images in that order."""
    model = initial_model("convnet(width=4, norm='batch')", SPEC, 0).double().train()
    model = LabelBased(groups=groups).wrap_model(model, client(8))
    held, labels = images(8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])

    def gradient(pictures: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(model(pictures), classes)
        parts = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    private, other = gradient(held, labels), gradient(held[order], labels[order])
    assert torch.allclose(private, other, atol=1e-9) == same
    assert not torch.allclose(private, gradient(held, labels[[7, *range(7)]]), atol=1e-9)


def test_each_group_is_normalized_by_itself() -> None:
    plain = nn.BatchNorm2d(3)
    features = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 2
    features[4:] *= 5
    ghost = GhostBatchNorm2d(plain, 2)(features)
    for half in ghost.chunk(2):
        assert half.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert plain.running_mean is not None
    assert plain.running_mean.abs().min() > 0.1  # its own, not a copy
    assert not torch.allclose(ghost, nn.BatchNorm2d(3)(features), atol=0.1)
    ghosted = GhostBatchNorm2d(plain.eval(), 2)
    assert torch.equal(ghosted(features), plain(features))


@pytest.mark.parametrize(("count", "sizes"), [(7, [3, 2, 2]), (10, [3, 3, 2, 2]), (3, [3])])
def test_no_group_is_of_a_single_example(count: int, sizes: list[int]) -> None:
    """Of maps of one place, a single example leaves nothing to normalize by."""
    features = torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    found = GhostBatchNorm2d(nn.BatchNorm2d(3), 4)(features)
    for mine, part in zip(found.split(sizes), features.split(sizes), strict=True):
        assert torch.equal(mine, nn.BatchNorm2d(3)(part))


def test_names_stay_and_only_groups_wrap() -> None:
    model = initial_model("convnet(width=4, norm='batch')", SPEC, 0)
    names = [name for name, _ in model.named_parameters()]
    assert LabelBased().wrap_model(model, client()) is model
    assert not any(isinstance(m, GhostBatchNorm2d) for m in model.modules())
    LabelBased(groups=2).wrap_model(model, client())
    assert sum(isinstance(m, GhostBatchNorm2d) for m in model.modules()) == 3
    assert [name for name, _ in model.named_parameters()] == names


def test_statistics_are_not_in_the_upload(tmp_path: Path) -> None:
    ran = federated(tmp_path, GROUPED)
    assert not ran.failures
    assert len(ran.views) == 4
    assert not any("running" in name for view in ran.views for name in view.received)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model.batchnorm": "shared"}, "batchnorm = 'private'"),
        ({"model.name": "convnet(width=4)"}, "no BatchNorm to group"),
        ({"federation.local": "fedsgd(batch_size=1, lr=0.1)"}, "hold no 2 images"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=reason):
        federated(tmp_path, {**GROUPED, **changes})
