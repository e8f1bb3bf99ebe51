"""Who knows every public seed can re-derive every public generator, and no formal noise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.defenses.formal.adaptive_noise_dp import AdaptiveNoiseDP
from clients.defenses.formal.distributed_dp import DistributedDP
from clients.defenses.formal.dp_sgd import DPSGD
from clients.defenses.formal.fed_cdp import FedCDP
from clients.defenses.formal.gaussian import Gaussian
from clients.defenses.formal.local_dp import LocalDP
from clients.defenses.perturbation.dpfl import DPFL, laplace
from clients.defenses.perturbation.soteriafl import SoteriaFL
from clients.ledger import Accounted
from clients.noise import noised, normal
from fedsim import registry, seeds
from fedsim.defense import ClientContext, Defense, Rank
from tests.clients.one_update import context

SIZE = 5_000
FORMAL: list[Defense] = [
    Gaussian(std=1.0),
    LocalDP(),
    DistributedDP(),
    AdaptiveNoiseDP(),
    DPSGD(),
    FedCDP(),
    SoteriaFL(keep=1.0),
    DPFL(sensitivity="vector", activity="public"),
]


def noise(defense: Defense, ctx: ClientContext) -> Tensor:
    """Return what is sent of an update of zeros, or of a batch without examples."""
    if isinstance(defense, DPSGD | FedCDP):
        model = nn.Sequential(nn.Flatten(), nn.Linear(100, 50, bias=False))
        empty = torch.empty(0, 1, 10, 10), torch.empty(0, dtype=torch.int64)
        return defense.gradients(model, empty, ctx)["1.weight"].flatten()
    if isinstance(defense, DPFL):
        ctx.trainee = nn.Sequential(nn.Linear(10, SIZE // 10, bias=False))
        ctx.batch = torch.empty(0, 10), torch.empty(0, dtype=torch.int64)
        upload = {"0.weight": torch.zeros(SIZE // 10, 10)}
        return defense.transform_update(upload, ctx)["0.weight"].flatten()
    return defense.transform_update({"a": torch.zeros(SIZE)}, ctx)["a"]


def correlation(one: Tensor, other: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1]))


def test_every_formal_defense_of_a_client_is_here() -> None:
    known = registry.components("defense").values()
    classes = [one for one in known if isinstance(one, type) and issubclass(one, Defense)]
    promising = {one for one in classes if one.privacy is not Defense.privacy}
    at_the_server = {one for one in classes if one.rank is Rank.SERVER}
    assert promising - at_the_server == {type(defense) for defense in FORMAL}
    assert {one for one in classes if issubclass(one, Accounted)} <= promising


@pytest.mark.parametrize("defense", FORMAL, ids=lambda defense: defense.name)
def test_no_public_generator_gives_the_noise(
    defense: Defense, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    theirs = noise(defense, context(round=3))
    assert torch.equal(theirs, noise(defense, context(round=3)))  # the client's own run repeats
    name = defense.name
    endings = [(), (3,), (3, 0), (3, 0, 0), (0, 3), (0, 3, 0)]
    uses = [("client", 0), ("client", 0, 3), ()]
    public: list[Callable[[], torch.Generator]] = [
        lambda use=use, end=end, own=own: seeds.generator(0, *use, *own, *end)  # type: ignore[misc]
        for use in uses
        for end in endings
        for own in ((name,), ())
    ]
    zeros = torch.zeros(SIZE)
    guesses = [
        laplace(zeros, made()) if isinstance(defense, DPFL) else normal(zeros, made())
        for made in public
    ]
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "22" * 32)  # somebody else's machine
    guesses.append(noise(defense, context(round=3)))
    assert max(correlation(theirs, guess) for guess in guesses) < 5 / SIZE**0.5


@pytest.mark.parametrize("defense", FORMAL, ids=lambda defense: defense.name)
def test_noise_is_drawn_in_float64_whatever_the_upload_is(
    defense: Defense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float32 none would leave 5.77 standard deviations: delta would be told too small."""
    drawn: set[torch.dtype] = set()

    def watched(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def seen(*given: Any, **named: Any) -> Tensor:
            made = draw(*given, **named)
            drawn.add(made.dtype)
            return made

        return seen

    monkeypatch.setattr(torch, "randn", watched(torch.randn))
    monkeypatch.setattr(Tensor, "exponential_", watched(Tensor.exponential_))
    assert noise(defense, context(round=3)).dtype is torch.float32
    assert drawn == {torch.float64}


def test_noise_is_added_in_float64_and_rounded_once() -> None:
    zero, one = torch.zeros(SIZE), torch.ones(SIZE)
    exact = torch.randn(SIZE, generator=seeds.generator(0, "n"), dtype=torch.float64)
    assert torch.equal(normal(zero, seeds.generator(0, "n")), exact.float())
    sent = noised({"a": one}, 1e-3, seeds.generator(0, "n"))["a"]
    assert torch.equal(sent, (1 + 1e-3 * exact).float())


def test_the_sample_of_dp_sgd_is_as_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(key: str) -> list[int]:
        monkeypatch.setenv("FEDSIM_SECRET_KEY", key * 32)
        ctx = context()
        ctx.plan = type(ctx.plan)("gradient", 0.1, 100, 1000, 1, 1)
        (indices,) = DPSGD().sampler(iter([torch.arange(100)]), 1000, ctx)
        return list(indices.tolist())

    assert drawn("11") == drawn("11")
    assert len(set(drawn("11")) & set(drawn("22"))) < 30
