"""DP-SGD and Fed-CDP: sampling, clipping, noise, and an epsilon for all steps of all rounds."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.defenses.formal.dp_sgd import DPSGD
from clients.defenses.formal.fed_cdp import FedCDP
from clients.ledger import released
from clients.noised_sum import NoisedSum, norms_of, scaled
from clients.per_example import per_example_gradients
from clients.trainer import FedAvg
from fedsim.accounting import Release, epsilon
from fedsim.audit import judge
from fedsim.defense import ClientContext, Defense, Tensors, TrainingPlan, guarantees
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from fedsim.view import SavedViews
from tests.clients.one_update import context
from tests.fedsim.small import federated, scenario

EVERYTHING = TrainingPlan("gradient", 0.1, 6, 6, 1, 1, tensors=4)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 10)).double()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(size, 3, 4, 4, generator=generator).double()
    return images, torch.arange(size) % 10


def stepping(plan: TrainingPlan = EVERYTHING, **where: int) -> ClientContext:
    ctx = context(**where)
    ctx.plan = plan
    return ctx


def loop(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensors]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    for image, label in zip(images, labels, strict=True):
        loss = cross_entropy(model(image.unsqueeze(0)), label.unsqueeze(0))
        yield dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def norm(gradient: Tensors) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def test_each_examples_gradient_is_that_of_a_batch_of_one() -> None:
    model, (images, labels) = network(), batch()
    (together,) = per_example_gradients(model, (images, labels), alone=True)
    for at, single in enumerate(loop(model, images, labels)):
        assert all(torch.allclose(together[n][at], g, atol=1e-10) for n, g in single.items())


class Entangling(nn.Sequential):
    """Whatever a server may send: it looks at the other examples, and vmap cannot follow it."""

    def forward(self, images: Tensor) -> Tensor:
        if float(images.sum()) > -1:
            images = images - images.mean(dim=0, keepdim=True) * (len(images) > 1)
        logits: Tensor = super().forward(images)
        return logits


def test_a_model_that_would_mix_examples_is_given_them_one_by_one() -> None:
    model, (images, labels) = Entangling(*network()), batch()
    each = list(per_example_gradients(model, (images, labels), alone=True))
    assert [len(g["1.weight"]) for g in each] == [1] * 6
    for own, single in zip(each, loop(model, images, labels), strict=True):
        assert torch.allclose(own["1.weight"][0], single["1.weight"], atol=1e-10)


def test_without_noise_it_is_the_sum_of_clipped_gradients_over_the_expected_size() -> None:
    model, given = network(), batch()
    sent = DPSGD(norm=0.7, sigma=0.0).gradients(model, given, stepping())
    singles = list(loop(model, *given))
    assert max(map(norm, singles)) > 0.7
    for name, got in sent.items():
        expected = sum(g[name] * min(1.0, 0.7 / norm(g)) for g in singles) / 6
        assert torch.allclose(got, torch.as_tensor(expected), atol=1e-10)


def test_no_examples_gradient_is_longer_than_the_norm() -> None:
    model, given = network(), batch()
    (gradients,) = per_example_gradients(model, given, alone=True)
    for bound in (1e-3, 0.5, 1.0, 50.0):
        whole = DPSGD(norm=bound).clip(gradients)
        total = torch.stack([norms_of(g) for g in whole.values()]).square().sum(dim=0).sqrt()
        assert float(total.max()) <= bound
        layers = FedCDP(norm=bound).clip(gradients)
        assert all(float(norms_of(g).max()) <= bound for g in layers.values())
        assert float(norms_of(layers["1.weight"]).max()) >= float(norms_of(whole["1.weight"]).max())


def test_one_that_is_not_finite_counts_as_none() -> None:
    gradient = torch.tensor([[1.0, 0.0], [math.inf, 0.0], [math.nan, 1.0], [0.0, 0.0]])
    got = scaled(gradient, norms_of(gradient), 0.5)
    assert torch.allclose(got, torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("defense", [DPSGD(norm=2.0, sigma=1.5), FedCDP(norm=2.0, sigma=1.5)])
def test_the_noise_on_the_sum_is_sigma_times_the_norm(defense: NoisedSum) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4000))
    images, labels = batch()
    clean = type(defense)(norm=2.0, sigma=0.0).gradients(
        model, (images.float(), labels), stepping()
    )
    noisy = defense.gradients(model, (images.float(), labels), stepping())
    drawn = 6 * (noisy["1.weight"] - clean["1.weight"])
    assert float(drawn.std()) == pytest.approx(3.0, rel=0.02)


def test_an_empty_batch_gives_noise_and_no_error() -> None:
    sent = DPSGD().gradients(network(), batch(0), stepping())
    assert float(torch.cat([g.flatten() for g in sent.values()]).std()) == pytest.approx(
        1 / 6, rel=0.1
    )


# -- sampling --------------------------------------------------------------------------------------
def drawn(steps: int, size: int, examples: int, seed: int = 0) -> list[Tensor]:
    ctx = context(seed)
    ctx.plan = TrainingPlan("weights", 0.1, size, examples, steps, 1)
    return list(DPSGD().sampler(iter([torch.arange(size)] * steps), examples, ctx))


def test_every_example_is_drawn_by_itself() -> None:
    sizes = torch.tensor([len(indices) for indices in drawn(400, 64, 512)]).double()
    assert float(sizes.mean()) == pytest.approx(64, rel=0.03)
    assert float(sizes.var()) == pytest.approx(64 * 7 / 8, rel=0.25)  # binomial
    assert len(set(sizes.tolist())) > 20
    assert all(len(set(i.tolist())) == len(i) for i in drawn(5, 64, 512))


def test_a_batch_of_all_is_all_and_a_small_one_is_often_empty() -> None:
    assert [len(indices) for indices in drawn(3, 9, 9)] == [9, 9, 9]
    assert 10 < sum(len(indices) == 0 for indices in drawn(60, 1, 50)) < 35


def test_a_client_says_the_expected_size_and_not_the_drawn_one(tmp_path: Path) -> None:
    changes = {"defenses": "dp-sgd", "attack": "linear-inversion"}
    ran = federated(tmp_path, {**changes, "federation.local": "fedsgd(batch_size=32)"})
    assert {fact["num_examples"] for fact in SavedViews(ran.folder.path / "views").facts()} == {32}
    assert len({len(record.examples) for record in ran.vault}) > 1


# -- epsilon ---------------------------------------------------------------------------------------
def test_all_steps_of_all_rounds_are_accounted_for_at_the_clients_own_rate() -> None:
    local = FedAvg(epochs=2, batch_size=10)
    plan = local.plan(100, 5)
    said = guarantees((DPSGD(sigma=1.0),), plan)["dp-sgd"]
    assert said.epsilon == pytest.approx(epsilon((Release(1.0, 0.1, 100),), 1e-5))
    assert said.epsilon == pytest.approx(7.047, abs=0.01)
    assert (said.unit, said.relation) == ("example", "add-or-remove-one")


def test_layers_clipped_by_themselves_cost_the_root_of_their_number() -> None:
    plan = TrainingPlan("weights", 0.1, 10, 1000, 100, 100, tensors=8)
    said = guarantees((FedCDP(sigma=6.0),), plan)["fed-cdp"]
    assert said.epsilon == pytest.approx(2.01, abs=0.02)
    plain = guarantees((DPSGD(sigma=6.0),), plan)["dp-sgd"]
    assert plain.epsilon == pytest.approx(0.60, abs=0.01)


def test_what_touches_examples_beside_it_voids_the_guarantee() -> None:
    class Mixing(Defense):
        name = "mixing"
        rank = DPSGD.rank

    assert guarantees((DPSGD(),), EVERYTHING)
    assert guarantees((Mixing(), DPSGD()), EVERYTHING) == {}


@pytest.mark.parametrize("name", ["dp-sgd", "fed-cdp"])
def test_what_each_client_spent_is_what_its_run_promised(name: str, tmp_path: Path) -> None:
    local = "fedavg(epochs=1, batch_size=64, lr=0.1)"
    changes = {"defenses": name, "federation.rounds": 2, "federation.local": local}
    ran = federated(tmp_path, changes)
    (part,) = judge(ran.folder.path).defenses
    assert part.epsilon is not None
    assert part.spent[0].epsilon == part.epsilon.epsilon
    assert {s.releases for s in part.spent} == {
        2 * ran.parts.plan(len(ran.parts.partitions[0])).steps
    }


def test_the_ledger_counts_one_round_once() -> None:
    ctx = stepping(TrainingPlan("weights", 0.1, 3, 6, 2, 1))
    for _ in range(2):
        DPSGD().gradients(network(), batch(), ctx)
        ctx.step += 1
    DPSGD().transform_update({}, ctx)
    assert released(ctx, "dp-sgd") == (Release(1.0, 0.5, 2),)


# -- runs ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("local", ["fedsgd(batch_size=1)", "fedavg(batch_size=2, epochs=1)"])
def test_runs_with_empty_batches_are_judged(local: str, tmp_path: Path) -> None:
    changes = {"defenses": "dp-sgd", "attack": "linear-inversion", "federation.local": local}
    ran = federated(tmp_path, {**changes, "federation.clients": 16, "data.dataset": "photo-tiles"})
    assert not ran.failures
    if local.startswith("fedsgd"):
        assert any(len(record.examples) == 0 for record in ran.vault)
    report = judge(ran.folder.path)
    assert report.failed is None
    assert report.leak is not None
    assert report.leak.leaked == 0


def test_a_run_in_which_nobody_drew_an_example_has_nothing_to_leak(tmp_path: Path) -> None:
    changes = {"defenses": "dp-sgd", "attack": "linear-inversion", "federation.clients": 1}
    for seed in range(20):
        named = {"federation.local": "fedsgd(batch_size=1)", "seed": seed}
        ran = federated(tmp_path / str(seed), changes | named)
        if not len(next(iter(ran.vault)).examples):
            break
    report = judge(ran.folder.path)
    assert report.leak is None
    assert report.leak_reason == "there are no private images behind these views"


@pytest.mark.parametrize("name", ["dp-sgd", "fed-cdp"])
def test_batchnorm_is_refused_and_what_would_do_is_said(name: str, tmp_path: Path) -> None:
    changes = {"defenses": name, "model.name": "resnet20(width=4)"}
    with pytest.raises(ScenarioError, match=r"normalizes over the batch.*fedsim fix"):
        check(Parts(scenario(tmp_path, changes)))
    check(Parts(scenario(tmp_path, {**changes, "model.name": "resnet20(width=4, norm='group')"})))
