"""Dropout Inversion: with the masks searched, thinned networks are inverted again."""

import pytest
import torch
from torch.nn.functional import cross_entropy, dropout

from fedsim.models import build_model, load_arrays
from fedsim.view import ServerView
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from strategies.attacks.optimization.beyond.dropout_inversion import (
    DropoutInversion,
    DropoutRate,
    Masked,
    MaskedGradients,
    PixelsAndMasks,
    masked,
)
from strategies.attacks.optimization.parametrizations import Candidate
from tests.strategies.passive.honest import Honest, batch, cifar10, floor_psnr, psnr, spec, tiles

THIN = "convnet(stride=2, dropout=0.5)"


def thinned(client: Honest, images, labels, number=0) -> tuple[ServerView, list[torch.Tensor]]:
    """Return the upload of a client that trains with dropout on, and the masks that it drew."""
    model = build_model(client.expression, client.spec).to(client.dtype).train()
    load_arrays(model, client.sent())
    drawn: list[torch.Tensor] = []

    def peek(layer, inputs):
        state = torch.get_rng_state()
        drawn.append((1 - layer.p) * dropout(torch.ones_like(inputs[0]), layer.p))
        torch.set_rng_state(state)  # the layer itself draws the same

    for layer in masked(model):
        model.get_submodule(layer.name).register_forward_pre_hook(peek)
    with torch.random.fork_rng():
        torch.manual_seed(number)
        loss = cross_entropy(model(images.to(client.dtype)), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    upload = dict(zip(names, gradients, strict=True))
    view = ServerView(1, (number,), client.expression, client.sent(), upload, "gradient")
    return view, drawn


def test_masks_explain_the_gradient_of_the_thinned_network():
    client = Honest("convnet(width=4, hidden=[8], dropout=0.3)", spec(), dtype=torch.float64)
    pairs = [batch(tiles(), 2, seed, torch.float64) for seed in range(3)]
    views, masks = zip(*(thinned(client, *p, i) for i, p in enumerate(pairs)), strict=True)
    model = client.model()
    assert [(layer.p, layer.shape) for layer in masked(model)] == [(0.3, (512,)), (0.3, (8,))]
    operator = MaskedGradients(model, list(views[0].received))
    beside = torch.stack([torch.cat([m.flatten(1) for m in each], dim=1).flatten()
                          for each in masks])  # fmt: skip
    images, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    found, seen = operator(Candidate(images, labels, beside))
    for index, view in enumerate(views):
        for gradient, sent in zip(found, view.received.values(), strict=True):
            assert torch.allclose(gradient[index], sent, atol=1e-12)
    assert torch.equal(seen[1][2], masks[2][1])


def test_masks_start_at_their_rate_and_stay_in_their_box():
    layers = [Masked("one", 0.25, (4000,)), Masked("other", 0.9, (50, 80))]
    labels = torch.zeros(2, 3, dtype=torch.int64)
    search = PixelsAndMasks(spec(), labels, torch.float64, layers)
    start = search.start(torch.Generator().manual_seed(0)).double()
    masks = start[3 * 3072 :].view(3, 8000)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks[:, :4000].mean().item() == pytest.approx(0.75, abs=0.02)
    assert masks[:, 4000:].mean().item() == pytest.approx(0.1, abs=0.02)
    variables = torch.stack([start * 5 - 2, start])
    search.box(variables)
    images, _, beside = search.decode(variables)
    assert images.min() > -1e-9
    assert images.max() < 1 + 1e-9
    assert (beside.min(), beside.max()) == (0, 1)
    assert search.take(torch.tensor([1])).decode(variables[1:]).images.shape == (1, 3, 3, 32, 32)


def test_the_penalty_is_of_each_masks_share():
    mask = torch.tensor([[[1.0, 0.0, 1.0, 1.0]], [[0.5, 0.5, 0.0, 0.0]]])
    penalty = DropoutRate(2.0, Masked("one", 0.25, (4,)))([mask])
    assert torch.allclose(penalty, torch.tensor([0.0, 1.0]))


def test_without_dropout_it_is_inverting_gradients():
    client = Honest("lenet", spec(), dtype=torch.float64)
    views = [client.gradient(*batch(tiles(), 2, seed), client=seed) for seed in range(2)]
    counts, found = {view.label: 2 for view in views}, []
    for attack in (DropoutInversion, InvertingGradients):
        made = attack(iterations=30, tv=1e-3)
        found.append(made.reconstruct(views, client.knowledge("B", counts)))
    assert torch.allclose(found[0].examples, found[1].examples, atol=1e-6)
    assert torch.allclose(found[0].scores, found[1].scores)


def test_where_there_is_no_dropout_it_is_refused():
    with pytest.raises(ValueError, match="inverting-gradients"):
        DropoutInversion().check(Honest("convnet", spec()).model(), "gradient")
    DropoutInversion().check(Honest(THIN, spec()).model(), "gradient")


def ordering(split, count: int, iterations: int, tv: float) -> dict[str, float]:
    """Return the mean PSNR of dropout ignored, masks searched, and true masks."""
    client = Honest(THIN, spec())
    truth = [batch(split, 1, seed) for seed in range(count)]
    views, masks = zip(*(thinned(client, *p, i) for i, p in enumerate(truth)), strict=True)
    counts = {view.label: 1 for view in views}
    ignored = InvertingGradients(iterations=iterations, tv=tv)
    searched = DropoutInversion(iterations=iterations, tv=tv)
    found = {
        "ignored": ignored.reconstruct(views, client.knowledge("B", counts)).examples,
        "searched": searched.reconstruct(views, client.knowledge("B", counts)).examples,
    }
    known = []
    for view, own in zip(views, masks, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            told = torch.cat([mask.flatten() for mask in own])
            decode = PixelsAndMasks.decode

            def with_truth(self, variables, told=told, decode=decode):
                made = decode(self, variables)
                return made._replace(beside=told + 0 * made.beside)  # fixed, whatever is searched

            patch.setattr(PixelsAndMasks, "decode", with_truth)
            known.append(searched.reconstruct([view], client.knowledge("B", counts)).examples)
    found["known"] = torch.cat(known)
    images = torch.cat([images for images, _ in truth])
    return {name: psnr(images, made).mean().item() for name, made in found.items()}


def test_searching_the_masks_brings_the_image_back():
    client = Honest(THIN, spec())
    images, labels = batch(tiles(), 1, 0)
    view, _ = thinned(client, images, labels)
    attack = DropoutInversion(iterations=300, tv=1e-2)
    knowledge = client.knowledge("B", batchnorm="private")
    found = attack.reconstruct([view], knowledge)
    assert psnr(images, found.examples).item() > floor_psnr(images, tiles()).item() + 3
    assert {capability.value for capability in knowledge.used} == {"updates", "basics"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tv", [1e-5, 1e-2])
def test_ignored_is_far_below_searched_and_that_is_near_known_masks(tv):
    reached = ordering(cifar10(), count=6, iterations=600, tv=tv)
    print(f"tv {tv}:", {name: round(value, 1) for name, value in reached.items()})
    assert reached["ignored"] + 8 < reached["searched"]
    assert abs(reached["searched"] - reached["known"]) < 3
