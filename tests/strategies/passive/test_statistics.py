"""Sources of a private batch's BatchNorm statistics: exact where they say so, else refused."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedsim import registry
from fedsim.attack import Setting
from fedsim.audit.verdict import judge
from fedsim.errors import NotGranted, ScenarioError
from fedsim.models import build_model, initial_model, load_arrays, travelling
from fedsim.models.statistics import LayerStatistics, layer_statistics
from fedsim.parts import Parts, check
from fedsim.registry import components
from fedsim.run import write_report
from fedsim.threat import Capability, Knowledge, TrainingDetails
from fedsim.view import ServerView
from strategies.attacks.statistics.oracle import Oracle
from strategies.attacks.statistics.proxy import Proxy
from strategies.attacks.statistics.recovered import Recovered
from strategies.attacks.statistics.running import Running
from strategies.attacks.statistics.source import StatisticsSource
from tests.fedsim.small import Ran, Watching, federated, plug_in, scenario, told
from tests.strategies.passive.honest import Honest, batch, spec, tiles

NETWORK = "resnet20(width=4)"
LAYER = "blocks.4.norm2"


def seen(model: nn.Module, images: Tensor) -> LayerStatistics:
    """Compute the statistics directly, one hook after another."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            hook = layer.register_forward_pre_hook(
                lambda _, inputs, name=name: found.update(
                    {
                        name: (
                            inputs[0].mean(dim=(0, 2, 3)),
                            inputs[0].var(dim=(0, 2, 3), correction=0),
                        )
                    }
                )
            )
            with torch.no_grad():
                model(images)
            hook.remove()
    return found


def furthest(one: LayerStatistics, other: LayerStatistics) -> float:
    """Return the largest difference of any mean or variance, beside the largest there is or 1."""
    assert list(one) == list(other)
    pairs = [(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


@dataclasses.dataclass(frozen=True)
class Shared:
    """A client that took one step in train mode, and shares BatchNorm's statistics."""

    images: Tensor
    view: ServerView
    knowledge: Knowledge
    model: nn.Module

    @classmethod
    def step(cls, size: int, dtype: torch.dtype = torch.float32) -> "Shared":
        honest = Honest(NETWORK, spec(), dtype=dtype)
        model = initial_model(NETWORK, spec(), 0).to(dtype).train()
        model(batch(tiles(), 16, seed=5, dtype=dtype)[0])  # running statistics of its own
        sent = {name: tensor.clone() for name, tensor in travelling(model).items()}
        images, _ = batch(tiles(), size, seed=1, dtype=dtype)
        model(images)
        received = {name: tensor.clone() for name, tensor in travelling(model).items()}
        view = ServerView(1, (0,), NETWORK, sent, received, "gradient")
        knowledge = honest.knowledge("B", examples=size, batchnorm="shared")
        return cls(images, view, knowledge, knowledge.model(view))


@pytest.mark.ladder(4)
@pytest.mark.parametrize("size", [2, 7])
def test_what_a_shared_step_tells_is_the_batch_itself(size: int) -> None:
    shared = Shared.step(size)
    before = {name: tensor.clone() for name, tensor in shared.model.state_dict().items()}
    found = Recovered().statistics(shared.view, shared.model, shared.knowledge)
    truth = seen(shared.knowledge.model(shared.view), shared.images)
    assert len(found) == 19
    assert furthest(found, truth) < 1e-6
    after = shared.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert shared.knowledge.used == {Capability.UPDATES, Capability.BASICS}


def test_in_float64_it_is_exact() -> None:
    shared = Shared.step(4, torch.float64)
    found = Recovered().statistics(shared.view, shared.model, shared.knowledge)
    assert furthest(found, seen(shared.model, shared.images)) < 1e-13


def test_of_several_steps_it_tells_their_mixture_and_of_no_batch_the_statistics() -> None:
    """``sum_k (1 - m)^(K - k) mu_k``, the last the most, less what is left of the start twice."""
    model = initial_model(NETWORK, spec(), 0).double().train()
    model(batch(tiles(), 16, seed=5, dtype=torch.float64)[0])
    sent = {name: tensor.clone() for name, tensor in travelling(model).items()}
    steps = [batch(tiles(), 4, seed, torch.float64)[0] for seed in range(3)]
    each: list[Tensor] = []
    model.get_submodule(LAYER).register_forward_pre_hook(
        lambda _, inputs: each.append(inputs[0].detach().mean(dim=(0, 2, 3)))
    )
    for images in steps:
        model(images)
    received = {name: tensor.clone() for name, tensor in travelling(model).items()}
    view = ServerView(1, (0,), NETWORK, sent, received, "weights")
    knowledge = Honest(NETWORK, spec(), dtype=torch.float64).knowledge(
        "B", examples=4, batchnorm="shared"
    )
    found = Recovered().statistics(view, knowledge.model(view), knowledge)[LAYER][0]
    kept, start = 0.9, sent[f"{LAYER}.running_mean"]
    mixture = sum(kept ** (2 - k) * mean for k, mean in enumerate(each))
    assert torch.allclose(found, mixture - (kept - kept**3) / (1 - kept) * start, atol=1e-12)
    assert min(float((found - mean).abs().max()) for mean in each) > 1e-2


def test_what_was_sent_is_what_the_running_source_says() -> None:
    shared = Shared.step(4)
    found = Running().statistics(shared.view, shared.model, shared.knowledge)
    assert torch.equal(found[LAYER][0], shared.view.sent[f"{LAYER}.running_mean"])
    assert torch.equal(found[LAYER][1], shared.view.sent[f"{LAYER}.running_var"])
    assert furthest(found, seen(shared.model, shared.images)) > 1e-2


@pytest.mark.parametrize("policy", ["shared", "frozen"])
def test_the_proxy_is_of_as_many_surrogate_images_in_the_clients_mode(policy: str) -> None:
    honest = Honest(NETWORK, spec())
    images, labels = batch(tiles(), 6, seed=1)
    view = honest.gradient(images, labels)
    surrogate = tiles().subset(torch.arange(6))
    knowledge = honest.knowledge("D", examples=6, surrogate=surrogate, batchnorm=policy)
    model = knowledge.model(view)
    found = Proxy().statistics(view, model, knowledge)
    whole, _ = surrogate.batch(torch.arange(6))  # all there are, in whatever order
    assert furthest(found, seen(knowledge.model(view), whole)) < 1e-5
    assert knowledge.used >= Proxy.needs
    again = Proxy().statistics(view, model, knowledge)
    assert furthest(found, again) == 0
    with pytest.raises(NotGranted, match="surrogate"):
        Proxy().statistics(view, model, honest.knowledge("C", examples=6))


def test_dropout_is_off_and_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.rand(4, 3, 5, 5)
    found = layer_statistics(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(layer.training for layer in model)
    model[1].eval()
    assert furthest(found, seen(model, images)) < 1e-6


# -- refusals ----------------------------------------------------------------------------------


def setting(batchnorm: str, kind: str = "gradient", examples: int = 4, epochs: int = 1) -> Setting:
    model = initial_model(NETWORK, spec(), 0)
    training = TrainingDetails(kind, 0.1, 4, epochs, 0.0, 0.0)
    parts = Parts(scenario(Path("unused")))
    return Setting(model, 1, 1, (examples,), training, batchnorm, parts.channel)


@pytest.mark.parametrize("source", ["running", "proxy", "recovered", "oracle"])
def test_a_model_without_batchnorm_is_refused(source: str) -> None:
    assert source in components("statistics")
    built: StatisticsSource = registry.build("statistics", source, "statistics")
    with pytest.raises(ValueError, match="no BatchNorm layer; use one that has"):
        built.check(initial_model("lenet", spec(), 0))
    built.check(initial_model(NETWORK, spec(), 0))


@pytest.mark.parametrize("source", [Running(), Recovered()])
def test_a_batchnorm_that_keeps_nothing_is_refused(source: StatisticsSource) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="keeps no running statistics; use statistics='proxy'"):
        source.check(model)


def test_what_does_not_come_back_cannot_be_read() -> None:
    shared = Shared.step(4)
    without = dataclasses.replace(shared.view, received={})
    with pytest.raises(ValueError, match=r"brought no .*running_mean back"):
        Recovered().statistics(without, shared.model, shared.knowledge)
    private = Honest(NETWORK, spec()).knowledge("B", examples=4, batchnorm="private")
    with pytest.raises(ValueError, match="'private' no running statistics come back"):
        Recovered().statistics(shared.view, shared.model, private)


def test_settings_in_which_a_source_would_say_nothing_are_refused() -> None:
    Recovered().check_setting(setting("shared"))
    Recovered().check_setting(setting("shared", "gradient", examples=40))  # one batch of them
    Recovered().check_setting(setting("shared", "weights"))
    for kept in ("frozen", "private"):
        with pytest.raises(ValueError, match="no running statistics come back; use"):
            Recovered().check_setting(setting(kept))
        with pytest.raises(ValueError, match="are 0 and 1, and with model"):
            Running().check_setting(setting(kept))
    Running().check_setting(setting("shared"))
    for steps in ({"examples": 9}, {"epochs": 3}):
        with pytest.raises(ValueError, match="takes 3 local steps"):
            Recovered().check_setting(setting("shared", "weights", **steps))
    trained = setting("frozen")
    trained.model.norm1.running_mean.add_(1)
    Running().check_setting(trained)


# -- the oracle, in a whole run ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking(Watching):
    """Asks a source for one layer."""

    source: str = "oracle"

    @property
    def oracles(self) -> frozenset[str]:
        return frozenset({"batchnorm"})


def asked(views: Sequence[ServerView], knowledge: Knowledge) -> object:
    """What the oracle says of every view, in the attack's own process."""
    found = {}
    for view in views:
        said = Oracle().statistics(view, knowledge.model(view), knowledge)
        found[view.label] = {name: [t.tolist() for t in pair] for name, pair in said.items()}
    return found


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]) -> Ran:
    asking = type("Asking", (Asking,), {"deed": staticmethod(asked)})
    plug_in(monkeypatch, "attack", "asking", asking)
    every = {"attack": "asking", "oracles": "batchnorm", "model.name": NETWORK, **changes}
    return federated(tmp_path, every)


@pytest.mark.parametrize(
    "changes",
    [{"model.batchnorm": "shared"}, {"model.batchnorm": "frozen"}, {"channel": "trusted-sum"}],
)
def test_the_oracle_tells_what_a_direct_computation_gives(
    changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(tmp_path, monkeypatch, changes)
    for view in ran.views:
        model = build_model(view.model, ran.parts.spec)
        each = []
        for client in view.senders:
            record = ran.vault.record(client, view.round)
            assert record is not None
            load_arrays(model, view.sent)
            model.train(ran.parts.scenario.model.batchnorm != "frozen")
            each.append(seen(model, record.examples.float()))
        truth = {
            name: (
                torch.stack([one[name][0] for one in each]).mean(dim=0),
                torch.stack([one[name][1] + one[name][0] ** 2 for one in each]).mean(dim=0)
                - torch.stack([one[name][0] for one in each]).mean(dim=0) ** 2,
            )
            for name in each[0]
        }  # every client has two examples
        said = told(ran)[view.label]
        found = {n: (torch.tensor(mean), torch.tensor(var)) for n, (mean, var) in said.items()}
        assert furthest(found, truth) < 1e-5
        if "shared" in changes.values() and len(view.senders) == 1:
            knowledge = Honest(NETWORK, ran.parts.spec).knowledge(
                "B", examples={view.label: 2}, batchnorm="shared"
            )
            recovered = Recovered().statistics(view, knowledge.model(view), knowledge)
            assert furthest(recovered, truth) < 1e-5


def test_the_report_wears_its_badge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run(tmp_path, monkeypatch, {})
    page = write_report(ran.folder)
    assert "oracle: batchnorm" in page.read_text()
    told_ = json.loads((ran.folder.path / "report.json").read_text())
    assert told_["threat_model"]["oracles"] == ["batchnorm"]
    assert "given the true BatchNorm statistics by an oracle" in judge(ran.folder.path).verdict


def test_without_the_grant_there_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "asking", type("A", (Asking,), {"deed": staticmethod(asked)}))
    wanted = {"attack": "asking", "model.name": NETWORK}
    with pytest.raises(ScenarioError, match="write oracles = 'batchnorm', and the report"):
        check(Parts(scenario(tmp_path, wanted)))
    honest = Honest(NETWORK, spec())
    view = honest.gradient(*batch(tiles(), 2, seed=1))
    knowledge = honest.knowledge("B")
    with pytest.raises(NotGranted, match="oracle 'batchnorm' is not granted"):
        Oracle().statistics(view, knowledge.model(view), knowledge)
