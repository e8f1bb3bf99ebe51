"""SPN: the branch stays at home, changes what is uploaded, and what it leaves readable."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from clients.defenses.model.spn import SPN, Branch
from fedsim.view import SavedViews
from tests.clients.model_side import given_the_secret, guessed, images_of, inverted, jointly, sent
from tests.clients.one_update import context
from tests.fedsim.small import federated
from tests.strategies.passive.honest import psnr

SMALL = "convnet(width=8)"


def test_the_branch_is_private_and_everything_else_is_there():
    seen = sent(SPN(), SMALL, *images_of(2))
    names = [name for name, _ in seen.shared.named_parameters()]
    assert list(seen.upload) == names
    private = {name for name, _ in seen.trained.named_parameters()} - set(names)
    assert private == {"fc.secret.layer.weight", "fc.secret.layer.bias"}
    assert set(seen.ctx.store) == {"spn.layer.weight", "spn.layer.bias"}


def test_with_the_branch_at_zero_the_upload_is_the_plain_one():
    images, labels = images_of(3)
    ctx = context()
    zeros = {"layer.weight": torch.zeros(10, 64), "layer.bias": torch.zeros(10)}
    ctx.store |= {f"spn.{name}": zero for name, zero in zeros.items()}
    seen = sent(SPN(polarization=0.0), SMALL, images, labels, ctx=ctx)
    loss = cross_entropy(seen.shared(images), labels)
    plain = torch.autograd.grad(loss, list(seen.shared.parameters()))
    for mine, other in zip(seen.upload.values(), plain, strict=True):
        assert torch.allclose(mine, other, atol=1e-12)


def test_the_polarization_loss_by_hand():
    branch = Branch(2, 3, weight=0.5, margin=1.0).double()
    with torch.no_grad():
        branch.layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        branch.layer.bias.zero_()
    features = torch.tensor([[0.25, -3.0]], dtype=torch.float64)
    # own class: 1 - 0.25; the second is at -3, far enough; the third is at 0
    told = branch.penalty(features, torch.tensor([0]))
    assert told.item() == pytest.approx(0.5 * (0.75 + 0 + 1))
    assert branch.penalty(features, torch.tensor([[0.9, 0.1, 0.0]])).item() == told.item()


def test_the_loss_is_that_of_summed_logits_and_the_polarization():
    images, labels = images_of(3)
    trained = sent(SPN(polarization=0.5, margin=2.0), SMALL, images, labels).trained
    features = trained.body(trained.normalize(images)).flatten(1)  # type: ignore[operator]
    public, branch = trained.fc, trained.fc.secret.layer  # type: ignore[union-attr]
    private = features @ branch.weight.T + branch.bias  # type: ignore[operator,union-attr]
    logits = features @ public.weight.T + public.bias + private  # type: ignore[operator]
    code = torch.full_like(private, -1).scatter(1, labels.unsqueeze(1), 1.0)
    short = (2.0 - code * private).clamp_min(0).sum(dim=1).mean()
    told = SPN(polarization=0.5, margin=2.0).loss(trained, (images, labels), context())
    assert short > 1
    assert told.item() == pytest.approx((cross_entropy(logits, labels) + 0.5 * short).item())


def test_the_branch_is_another_for_each_client_and_goes_on_where_it_was(tmp_path):
    changes = {"defenses": "spn", "federation.rounds": 2, "attack": "linear-inversion"}
    ran = federated(tmp_path, changes | {"threat-model": "A"})
    assert not ran.failures
    assert all("secret" not in name for view in ran.views for name in view.received)
    assert len(list(SavedViews(ran.folder.path / "views"))) == 8
    one, other = (sent(SPN(), SMALL, *images_of(1), ctx=context(seed)) for seed in (1, 2))
    assert not torch.equal(one.ctx.store["spn.layer.weight"], other.ctx.store["spn.layer.weight"])
    ctx = context(round=2)
    ctx.store |= one.ctx.store
    later = sent(SPN(), SMALL, *images_of(1), ctx=ctx)
    assert all(torch.equal(later.upload[name], t) for name, t in one.upload.items())


def test_the_public_classifier_gives_the_features_away():
    images, labels = images_of(1)
    seen = sent(SPN(), SMALL, images, labels)
    features = seen.shared.body(seen.shared.normalize(images)).flatten()  # type: ignore[operator]
    row = seen.upload["fc.bias"].abs().argmax()
    read = seen.upload["fc.weight"][row] / seen.upload["fc.bias"][row]
    assert torch.allclose(read, features, atol=1e-9)


@pytest.mark.slow
def test_the_branch_searched_with_the_image_finds_it():
    truth = [images_of(1, seed) for seed in range(4)]
    seen = [sent(SPN(), SMALL, *pair, ctx=context(i)) for i, pair in enumerate(truth)]
    pairs = [(one, labels) for one, (_, labels) in zip(seen, truth, strict=True)]
    images = torch.cat([x for x, _ in truth])
    plain = [sent(SPN(polarization=0.0), SMALL, *pair, ctx=zeroed()) for pair in truth]
    made = {
        "whole": [inverted(s, y) for s, y in pairs],
        "classifier alone": [inverted(s, y, "body") for s, y in pairs],
        "branch searched": [jointly(s, guessed(s, SPN()), y) for s, y in pairs],
        "branch known": [given_the_secret(s, y) for s, y in pairs],
        "undefended": [inverted(s, y) for s, (_, y) in zip(plain, truth, strict=True)],
    }
    found = {name: psnr(images, torch.cat(each)).mean().item() for name, each in made.items()}
    print(found)
    assert min(found["branch searched"], found["branch known"]) > found["whole"] + 15
    assert found["undefended"] > found["whole"] + 15


@pytest.mark.slow
def test_given_the_branch_most_images_come_back_as_exactly_as_undefended(monkeypatch):
    """Searched to the end, and hardly smoothed; a search may stick, and more restarts with it."""
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "5a" * 32)
    settings, known, undefended = {"iterations": 1000, "tv": 1e-5}, [], []
    for seed in range(4):
        image, labels = images_of(1, seed)
        seen = sent(SPN(), SMALL, image, labels, ctx=context(seed))
        plain = sent(SPN(polarization=0.0), SMALL, image, labels, ctx=zeroed())
        known.append(psnr(image, given_the_secret(seen, labels, **settings)).item())
        undefended.append(psnr(image, inverted(plain, labels, **settings)).item())
    print(f"dB: branch known {known}, undefended {undefended}")
    assert min(undefended) > 70
    assert sum(found > 70 for found in known) >= 3
    assert min(known) > 30


def zeroed():
    ctx = context()
    ctx.store |= {"spn.layer.weight": torch.zeros(10, 64), "spn.layer.bias": torch.zeros(10)}
    return ctx
