"""What a defense may change besides an upload: the network, the server, what stays at home."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedsim.client_app import _defense_context
from fedsim.client_state import remember
from fedsim.defense import ClientContext, Defense, ServerContext, TrainingPlan, guarantees
from fedsim.errors import ScenarioError
from fedsim.federation import Wrapper, with_arrays
from fedsim.parts import Parts, check
from fedsim.view import SavedViews
from tests.fedsim.small import federated, plug_in, scenario

RATE = "private.rate"
PUBLIC_DPFL = "dpfl(sensitivity='vector', activity='public')"


@dataclass(frozen=True, kw_only=True)
class Branch(Defense):
    """Adds a private offset of the logits, which is trained and never sent."""

    def wrap_model(self, model: nn.Module, ctx: ClientContext) -> nn.Module:
        offset = nn.Parameter(ctx.store.get(RATE, torch.zeros(10)).clone())
        model.register_parameter("offset", offset)
        model.register_forward_hook(lambda module, _, out: out + module.offset)
        ctx.store[RATE] = offset.detach()
        return model


@dataclass(frozen=True, kw_only=True)
class Wider(Defense):
    """Has everybody train a wider network, and tells the auditor how wide."""

    changes_upload = False

    def architecture(self, model: str) -> str:
        return model.replace("[8]", "[16]")

    def wrap_model(self, model: nn.Module, ctx: ClientContext) -> nn.Module:
        ctx.effect(self).figures["parameters"] = sum(p.numel() for p in model.parameters())
        return model

    def weight(self, plan: TrainingPlan) -> int:
        return 1


class Frozen(Wrapper):
    """Hands on the model that was sent, whatever clients made of it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: object, grid: object
    ) -> Iterable[Message]:
        self.sent = arrays
        return super().configure_train(server_round, arrays, config, grid)  # type: ignore[arg-type]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        same = [with_arrays(reply, self.sent) for reply in replies]
        return super().aggregate_train(server_round, same)


@dataclass(frozen=True, kw_only=True)
class Freezing(Defense):
    changes_upload = False

    def strategy(self, inner: Strategy, ctx: ServerContext) -> Strategy:
        assert (ctx.cohort, ctx.rounds) == (4, 2)
        return Frozen(inner)


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, defense in (("branch", Branch), ("wider", Wider), ("freezing", Freezing)):
        plug_in(monkeypatch, "defense", name, defense)


@pytest.mark.parametrize("local", ["fedsgd(batch_size=4, lr=0.1)", "fedavg(batch_size=32)"])
def test_private_parameters_are_trained_kept_and_never_sent(local: str, tmp_path: Path) -> None:
    changes = {"defenses": "branch", "federation.local": local, "attack": "linear-inversion"}
    changes |= {"federation.rounds": 2, "data.dataset": "digits"}
    ran = federated(tmp_path, changes)
    assert not ran.failures
    assert all("offset" not in view.received for view in ran.views)
    plain = federated(tmp_path / "plain", changes | {"defenses": "none"})
    first, other = ran.views[0].received, plain.views[0].received
    same = all(torch.equal(first[name], other[name]) for name in first)
    assert same == local.startswith("fedsgd")  # the offset begins at zero and moves after a step
    late, later = ran.views[4].received, plain.views[4].received
    assert not all(torch.equal(late[name], later[name]) for name in late)  # it was remembered


def test_a_public_change_of_the_network_reaches_server_clients_and_attack(tmp_path: Path) -> None:
    ran = federated(tmp_path, {"defenses": "wider", "attack": "linear-inversion"})
    assert all(view.model == "mlp(hidden=[16])" for view in ran.views)
    assert [t.shape[0] for t in ran.views[0].received.values()] == [16, 16, 10, 10]
    assert {fact["num_examples"] for fact in SavedViews(ran.folder.path / "views").facts()} == {1}


def test_what_the_server_does_itself_stands_between_uploads_and_average(tmp_path: Path) -> None:
    ran = federated(tmp_path, {"defenses": "freezing", "federation.rounds": 2})
    before, after = ran.federation["accuracy"]["before"], ran.federation["accuracy"]["after"]
    assert np.isclose(before, after)


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ("refiner | dp-sgd", "refiner and dp-sgd each compute the gradient in a way of their own"),
        ("precode | dp-sgd", "precode and dp-sgd each"),
        ("gaussian | local-dp", "local-dp must come before gaussian: a norm cut off after noise"),
        ("quantize | soteriafl", "soteriafl must come before quantize"),
        ("local-dp | clip", "clip would clip the update after local-dp noised the update"),
        ("adaptive-noise-dp | clip", "clip would clip the update after adaptive-noise-dp noised"),
        ("distributed-dp | clip", "clip would clip the update after distributed-dp noised"),
        ("local-dp | adaptive-noise-dp", "adaptive-noise-dp would clip the update after local-dp"),
        ("soteriafl | clip", "clip would clip the update after soteriafl noised the update"),
        ("dpfl | clip", "clip would clip the update after dpfl noised the update"),
        (
            "clip(at='update') | gaussian(at='gradient')",
            "clip would clip the update after gaussian noised the gradient: a norm cut off after "
            "noise.*; clip where the noise is, at='gradient'",
        ),
        ("clip | outpost", "clip would clip the update after outpost noised the gradient"),
        ("local-dp | gaussian(at='gradient')", "local-dp would clip the update after gaussian"),
        ("soteriafl | prune", "prune must not follow soteriafl: it remembers what it sent"),
        ("soteriafl | dual-prune", "dual-prune must not follow soteriafl"),
        ("soteriafl | quantize", "quantize must not follow soteriafl"),
        ("soteriafl | gaussian", "gaussian must not follow soteriafl"),
        ("soteriafl | central-dp", "central-dp must not follow soteriafl"),
        ("local-dp | dpfl", "dpfl must come before local-dp: it makes the gradient"),
        ("graddefense | clip(at='gradient')", "clip would clip the gradient after graddefense"),
        ("graddefense | clip", "after graddefense noised the gradient: .* biases; leave one out$"),
        ("dpfl | clip", "after dpfl noised the update: .* biases; leave one out$"),
        ("precode(upstream_std=0.1) | clip", "clip would clip the update after precode noised"),
        ("graddefense | censor", "censor would throw away what graddefense .* write censor before"),
        ("soteria | censor", "censor would throw away what soteria did"),
        ("dcs2 | censor", "censor would throw away what dcs2 did: .* alone; leave one out$"),
        ("censor | dcs2", "censor would throw away what dcs2 did"),
        ("gradient-mixing | label-based", "gradient-mixing and label-based each choose"),
        ("gradient-mixing | mixup", "gradient-mixing and mixup each choose the batches"),
        ("mixup | gradient-mixing", "each choose the batches"),
        ("mixup(k=4) | label-based(repeats=3)", "each choose the batches"),
        ("mixup(k=4) | dp-sgd", "mixup and dp-sgd each choose the batches"),
    ],
)
def test_a_chain_that_breaks_its_own_guarantee_is_refused(
    chain: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ScenarioError, match=said):
        check(Parts(scenario(tmp_path, {"defenses": chain, "threat-model": "B"})))


@pytest.mark.parametrize(
    "argument",
    [
        "cvb(beta)", "dcs2(lambda_x)", "dcs2(lr)", "giande(feature_weight)", "obscure(beta)",
        "obscure(lr)", "precode-network(beta)", "refiner(beta)", "refiner(lr)", "spn(polarization)",
    ],
)  # fmt: skip
def test_a_weight_or_a_step_that_leaves_float32_is_refused(argument: str, tmp_path: Path) -> None:
    largest, beyond = (argument.replace("-network", "").replace(")", f"={v})") for v in (1e6, 1e7))
    changes = {"model.name": "convnet(width=8)", "threat-model": "B"}
    check(Parts(scenario(tmp_path, {**changes, "defenses": largest})))
    with pytest.raises(ScenarioError, match="at most 1000000") as refused:
        check(Parts(scenario(tmp_path, {**changes, "defenses": beyond})))
    assert argument in str(refused.value)


@pytest.mark.parametrize(
    "chain",
    [
        "clip | gaussian",
        "clip(at='gradient') | gaussian(at='gradient')",
        "clip(at='gradient') | gaussian",
        "clip | local-dp | gaussian | prune | quantize",
        "dp-sgd | clip | gaussian",
        "self-audit | clip | soteriafl",
        "clip(at='gradient') | outpost",
        "censor | graddefense | prune",
        "precode | clip | gaussian",
        "oasis | mixup | label-smoothing | soteria",
    ],
)
def test_clipping_before_noise_and_compressing_after_it_are_in_order(
    chain: str, tmp_path: Path
) -> None:
    changes = {"defenses": chain, "federation.local": "fedsgd(batch_size=1)", "threat-model": "B"}
    check(Parts(scenario(tmp_path, changes)))


@pytest.mark.parametrize(
    ("chain", "told"),
    [
        ("dp-sgd", {"dp-sgd"}),
        ("self-audit | local-dp", {"local-dp"}),
        ("self-audit(refuse_above=20.0) | local-dp", set()),
        ("gradient-concentration(refuse_above=0.5) | dp-sgd", set()),
        ("label-based | local-dp", set()),
        ("dp-sgd | graddefense", set()),
        ("spn | fed-cdp", set()),
        (PUBLIC_DPFL, {"dpfl"}),
        (f"pefl(private=True) | {PUBLIC_DPFL}", set()),
        (f"digestnn | {PUBLIC_DPFL}", set()),
        (f"spn | {PUBLIC_DPFL}", set()),
    ],
)
def test_no_epsilon_is_told_where_something_else_tells_of_the_examples(
    chain: str, told: set[str], tmp_path: Path
) -> None:
    parts = Parts(scenario(tmp_path, {"defenses": chain}))
    assert guarantees(parts.defenses, parts.plan(32)).keys() == told


def test_a_client_started_anew_draws_other_noise_for_the_same_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has forgotten that it answered; under FEDSIM_SECRET_KEY it must repeat all the same."""
    parts = Parts(scenario(tmp_path, {"defenses": "gaussian(std=0.5)"}))

    def drawn(process: int) -> torch.Tensor:
        monkeypatch.setattr("os.getpid", lambda: process)
        context = Context(7, 1, {"client": 0}, RecordDict(), parts.scenario.flat())
        ctx = _defense_context(parts, context, 1, 32, parts.model())
        return torch.randn(4, generator=ctx.secret("noise"))

    monkeypatch.delenv("FEDSIM_SECRET_KEY", raising=False)
    assert not torch.equal(drawn(11), drawn(12))
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    assert torch.equal(drawn(11), drawn(12))


@pytest.mark.parametrize("secret", ["", "entropy"])
def test_one_use_of_the_secret_stream_is_one_draw_within_a_message(
    secret: str, tmp_path: Path
) -> None:
    """A learning rate that is drawn for a round holds for all of its steps."""
    parts = Parts(scenario(tmp_path, {"defenses": "lr-perturbation"}))
    context = Context(7, 1, {"client": 0, "secret": secret}, RecordDict(), parts.scenario.flat())
    rates = []
    for _ in range(2):
        ctx = _defense_context(parts, context, 1, 32, parts.model())
        for ctx.step in range(3):
            rates.append(parts.defenses[0].learning_rate(0.1, ctx))
        assert not torch.equal(*(torch.rand(4, generator=ctx.secret(n)) for n in ("one", "other")))
        remember(context, ctx.store)
    assert len(set(rates[:3])) == len(set(rates[3:])) == 1
    assert rates[0] != rates[3]


def test_a_round_asked_for_twice_gets_other_noise(tmp_path: Path) -> None:
    """A server that gives two rounds one number must not be able to subtract the noise."""
    changes = {"defenses": "gaussian(std=0.5)", "attack": "linear-inversion"}
    parts = Parts(scenario(tmp_path, changes))
    context = Context(7, 1, {"client": 0}, RecordDict(), parts.scenario.flat())
    drawn = []
    for _ in range(2):
        ctx = _defense_context(parts, context, 1, 32, parts.model())
        drawn.append(torch.randn(4, generator=ctx.secret("noise")))
        remember(context, ctx.store)
    assert not torch.equal(drawn[0], drawn[1])
