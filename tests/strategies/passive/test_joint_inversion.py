"""Joint inversion: at the client's own private part the truth explains its upload, exactly."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim import registry
from fedsim.attack import Attack
from fedsim.defense import Defense
from fedsim.errors import ScenarioError
from fedsim.view import ServerView
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from strategies.attacks.optimization.beyond.joint_inversion import (
    Guess,
    JointGradients,
    JointInversion,
    PixelsAndParameters,
)
from strategies.attacks.optimization.objectives import Cosine
from strategies.attacks.optimization.parametrizations import Candidate
from tests.clients.model_side import Sent, images_of, sent, spec
from tests.clients.one_update import context
from tests.strategies.passive.honest import Honest, psnr

SMALL = "convnet(width=4)"
PRIVATE = ["spn", "fedkl(key_length=5)", "pefl(private=True)"]


# What the attacker takes each defense to be, and how it searches.
SEARCHED = [
    ("spn", {"defense": "spn"}),
    ("fedkl", {"defense": "fedkl(key_length=1, activation='sigmoid')", "rate": 3.0, "restarts": 8}),
    ("pefl(private=True)", {"defense": "pefl(private=True)"}),
]


def named(expression: str) -> Defense:
    defense: Defense = registry.build("defense", expression, "test")
    return defense


def of_clients(
    expression: str, batches: int, size: int, model: str = SMALL
) -> list[tuple[Sent, Tensor, Tensor]]:
    """Return uploads in float64, of clients with secrets of their own, and what they are of.

    FedKL's key is in a buffer, which is not searched: it is the same for all.
    """
    clients = []
    for seed in range(batches):
        pair, ctx = images_of(size, seed), context(seed)
        ctx.store["fedkl.key"] = torch.linspace(0, 1, getattr(named(expression), "key_length", 1))
        train = expression.startswith("fedkl")  # in eval mode its BatchNorm is nothing
        clients.append((sent(named(expression), model, *pair, train=train, ctx=ctx), *pair))
    return clients


def operator_of(seen: Sent, expression: str) -> JointGradients:
    """Build what the attacker has: the shared network, and a guess with a secret of another."""
    guess = Guess.of(seen.shared, named(expression), torch.Generator().manual_seed(1))
    keys = dict(seen.trained.named_buffers())
    for name, buffer in guess.model.named_buffers():
        buffer.copy_(keys[name])
    return JointGradients(guess, list(seen.upload))


def the_client(seen: Sent, expression: str) -> Guess:
    """Return the client's own network in the place of a guess."""
    guess = Guess.of(seen.shared, named(expression), torch.Generator())
    return replace(guess, model=copy.deepcopy(seen.trained))


def private_part(seen: Sent) -> Tensor:
    own = seen.trained.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in own if name not in seen.upload])


@pytest.mark.parametrize("expression", PRIVATE)
def test_at_the_truth_the_distance_is_nothing(expression: str):
    """Two clients with batches of three: one call, each with its own private part."""
    (one, *pair), (other, *theirs) = clients = of_clients(expression, batches=2, size=3)
    candidate = Candidate(
        torch.stack([pair[0], theirs[0]]),
        torch.stack([pair[1], theirs[1]]),
        torch.stack([private_part(one), private_part(other)]),
    )
    found, _ = operator_of(one, expression)(candidate)
    for row, (seen, *_) in enumerate(clients):
        for gradient, uploaded in zip(found, seen.upload.values(), strict=True):
            assert torch.allclose(gradient[row], uploaded, atol=1e-12)
    observed = torch.stack([torch.cat([t.flatten() for t in s.upload.values()])
                            for s, *_ in clients])  # fmt: skip
    distance, _ = Cosine(observed)(torch.cat([g.reshape(2, -1) for g in found], dim=1))
    assert distance.abs().max() < 1e-12
    wrong = candidate._replace(beside=candidate.beside.flip(0))
    assert not torch.allclose(operator_of(one, expression)(wrong)[0][0], found[0])


@pytest.mark.parametrize("expression", PRIVATE)
def test_the_slope_of_the_distance_along_private_parameters(expression: str):
    """Against finite differences, along a random direction of pixels and one of parameters."""
    ((seen, images, labels),) = of_clients(expression, batches=1, size=2)
    operator = operator_of(seen, expression)
    observed = torch.cat([t.flatten() for t in seen.upload.values()]).unsqueeze(0)
    torch.manual_seed(0)
    point = private_part(seen).unsqueeze(0) + 0.01 * torch.randn(1, len(private_part(seen)))
    direction = torch.randn_like(point)

    def distance(step: float) -> tuple[Tensor, Tensor]:
        beside = (point + step * direction).detach().requires_grad_()
        found, _ = operator(Candidate(images.unsqueeze(0), labels.unsqueeze(0), beside))
        flat = torch.cat([gradient.reshape(1, -1) for gradient in found], dim=1)
        value, derivative = Cosine(observed)(flat.detach().clone())
        (slope,) = torch.autograd.grad(flat, beside, derivative)
        return value, slope

    (after, _), (before, _), (_, slope) = distance(1e-6), distance(-1e-6), distance(0.0)
    assert (slope * direction).sum().item() == pytest.approx(
        ((after - before) / 2e-6).item(), rel=1e-4
    )


def test_every_restart_guesses_anew_and_only_pixels_are_held_in_their_box():
    defense = named("spn")
    model = Honest(SMALL, spec()).model()
    labels = torch.zeros(2, 3, dtype=torch.int64)

    def guess(generator: torch.Generator) -> Tensor:
        return Guess.of(model, defense, generator).flat

    search = PixelsAndParameters(spec(), labels, torch.float32, guess, rate=0.1)
    one, again, other = (search.start(torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    pixels = 3 * 64
    assert not torch.equal(one[pixels:], other[pixels:])
    variables = torch.stack([one, other]) * 50
    search.box(variables)
    images, _, beside = search.decode(variables)
    assert (images.min(), images.max()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert torch.allclose(beside, torch.stack([one, other])[:, pixels:] * 5)
    assert search.take(torch.tensor([1])).decode(variables[1:]).images.shape == (1, 3, 1, 8, 8)


def test_it_finds_the_image_and_says_what_it_was_told(monkeypatch):
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "09" * 32)  # what the client draws hangs on it
    ((seen, images, _),) = of_clients("spn", batches=1, size=1, model="convnet(width=8)")
    client = Honest(seen.expression, spec(), dtype=torch.float64)
    knowledge = client.knowledge("C")
    attack = JointInversion(defense="spn", iterations=300)
    found = attack.reconstruct([seen.view()], knowledge)
    plain = InvertingGradients(iterations=300, tv=1e-5)
    missed = plain.reconstruct([seen.view()], client.knowledge("B"))
    assert psnr(images, found.examples).item() > psnr(images, missed.examples).item() + 5
    assert {one.value for one in knowledge.used} == {"updates", "basics", "details"}


@pytest.mark.parametrize(
    ("expression", "model"),
    [("pefl", "pefl-network(of='convnet')"), ("prune", "convnet"), ("fedkl", "convnet")],
)
def test_what_keeps_nothing_private_is_refused(expression: str, model: str):
    with pytest.raises(ValueError, match=r"private|no room"):
        JointInversion(defense=expression).check(Honest(model, spec()).model(), "gradient")


def test_a_defense_that_does_not_exist_is_refused():
    with pytest.raises(ScenarioError, match="defense"):
        JointInversion(defense="spm")


def reached(
    images: Tensor, attack: Attack, view: ServerView, client: Honest, batchnorm: str = "frozen"
) -> float:
    """Return the PSNR of what an attack makes of one upload; 40 dB show all, and count no more."""
    found = attack.reconstruct([view], client.knowledge("C", batchnorm=batchnorm))
    return psnr(images, found.examples).clamp_max(40).item()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("expression", "settings"), SEARCHED)
def test_searching_and_knowing_are_far_above_plain(expression: str, settings: dict[str, Any]):
    attack = JointInversion(**settings)
    plain = InvertingGradients(iterations=attack.iterations, restarts=attack.restarts, tv=attack.tv)
    known = replace(attack, rate=1e-9)  # does not leave where it begins
    found: dict[str, list[float]] = {"plain": [], "searched": [], "known": [], "undefended": []}
    for seen, images, labels in of_clients(expression, batches=4, size=1, model="convnet(width=8)"):
        told = Honest(seen.expression, spec(), dtype=torch.float64)
        free = Honest("convnet(width=8)", spec(), dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            of = the_client(seen, expression)
            patch.setattr(Guess, "of", lambda *_, of=of: copy.deepcopy(of))
            found["known"].append(reached(images, known, seen.view(), told, seen.batchnorm))
        found["plain"].append(reached(images, plain, seen.view(), told, seen.batchnorm))
        found["searched"].append(reached(images, attack, seen.view(), told, seen.batchnorm))
        found["undefended"].append(reached(images, plain, free.gradient(images, labels), free))
    mean = {name: sum(each) / len(each) for name, each in found.items()}
    print(expression, {name: round(value, 1) for name, value in mean.items()})
    assert min(mean["searched"], mean["known"]) > mean["plain"] + 8
