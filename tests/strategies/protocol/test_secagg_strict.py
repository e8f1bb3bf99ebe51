"""Clients of ``secagg(strict=True)`` refuse a server that breaks the rules; it learns nothing."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from fedsim import client_app
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.interception import Interception, RoundTap
from fedsim.parts import Parts, check
from fedsim.registry import components
from fedsim.scenario import Scenario
from fedsim.threat import Capability, Knowledge
from strategies.channels.secagg import SecAgg
from strategies.channels.secagg_strict import COMMITMENT
from tests.fedsim.small import NOBODY, Ran, federated, gray, plug_in, scenario, watching
from tests.fedsim.test_manipulation import Tailoring

Lie = Callable[[list[Message]], list[Message]]
STRICT = "secagg(strict=True, max_weight=2, threshold=0.75)"


@dataclass(frozen=True, kw_only=True)
class Lying(Interception):
    """Says what a test wants in one stage of round 1."""

    paper = NOBODY
    needs = frozenset({Capability.UPDATES, Capability.MANIPULATION})
    stage: ClassVar[str]
    lie: ClassVar[Lie]

    def intercept(self, server_round: int, knowledge: Knowledge) -> RoundTap:
        return Tapped(self.stage, type(self).lie) if server_round == 1 else RoundTap()

    def reconstruct(self, views: Any, knowledge: Knowledge) -> Any:
        list(views)
        return gray()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel without the lie, which is told where the federation is."""
        return Lying, ()


@dataclass
class Tapped(RoundTap):
    stage: str
    lie: Lie

    def outgoing(self, messages: list[Message]) -> list[Message]:
        if not messages:  # nobody is left to be asked
            return messages
        record = messages[0].content.config_records[RECORD_KEY_CONFIGS]
        return self.lie(messages) if record[Key.STAGE] == self.stage else messages


def saying(message: Message, **told: Any) -> Message:
    """Return a message that says something else in its protocol's record."""
    record = ConfigRecord(dict(message.content.config_records[RECORD_KEY_CONFIGS]))
    for key, value in told.items():
        record[key] = value
    return with_records(message, {RECORD_KEY_CONFIGS: record})


def with_records(message: Message, records: dict[str, Any]) -> Message:
    changed = copy.copy(message)
    changed.content = RecordDict({**message.content, **records})
    return changed


def to_all(**told: Any) -> Lie:
    return lambda messages: [saying(message, **told) for message in messages]


def lists(change: Callable[[int, list[int]], tuple[list[int], list[int]]]) -> Lie:
    """Lie about who lives and who dropped, to each client by its own change."""

    def lie(messages: list[Message]) -> list[Message]:
        sent = []
        for message in messages:
            record = message.content.config_records[RECORD_KEY_CONFIGS]
            living = sorted(record[Key.ACTIVE_NODE_ID_LIST])
            alive, dead = change(message.metadata.dst_node_id, living)
            sent.append(saying(message, active_nids=alive, dead_nids=dead))
        return sent

    return lie


def without(living: list[int], one: int) -> list[int]:
    return [node for node in living if node != one]


def twice(first: Lie, second: Lie) -> Lie:
    """Ask each client twice; the population delivers the last of one client's messages first."""
    return lambda messages: [*second(messages), *first(messages)]


def dropping(node: int, living: list[int]) -> tuple[list[int], list[int]]:
    """Say of the next client that it dropped: nothing a client could object to, once."""
    other = next(one for one in living if one != node)
    return without(living, other), [other]


def another_model(messages: list[Message]) -> list[Message]:
    """Send other arrays than those that were committed to."""
    sent = []
    for message in messages:
        arrays = message.content.array_records["arrays"]
        zeros = {name: Array(array.numpy() * 0) for name, array in arrays.items()}
        sent.append(with_records(message, {"arrays": ArrayRecord(zeros)}))
    return sent


def another_setting(messages: list[Message]) -> list[Message]:
    """Send another number of the round than was committed to."""
    config = ConfigRecord(dict(messages[0].content.config_records["config"]))
    config["server-round"] = 9
    return [with_records(message, {"config": config}) for message in messages]


def uncommitted(messages: list[Message]) -> list[Message]:
    return [with_records(message, {COMMITMENT: ConfigRecord()}) for message in messages]


def twofold_sources(messages: list[Message]) -> list[Message]:
    sent = []
    for message in messages:
        record = message.content.config_records[RECORD_KEY_CONFIGS]
        doubled = {key: [*record[key], record[key][0]] for key in ("srcs", "ctxts")}
        sent.append(saying(message, **doubled))
    return sent


def few_sources(messages: list[Message]) -> list[Message]:
    sent = []
    for message in messages:
        record = message.content.config_records[RECORD_KEY_CONFIGS]
        sent.append(saying(message, srcs=record["srcs"][:1], ctxts=record["ctxts"][:1]))
    return sent


def few_keys(messages: list[Message]) -> list[Message]:
    """Tell each client of one other."""
    sent = []
    for message in messages:
        record = message.content.config_records[RECORD_KEY_CONFIGS]
        own, nodes = str(message.metadata.dst_node_id), [n for n in record if n != Key.STAGE]
        kept = {own, next(node for node in nodes if node != own), Key.STAGE}
        told = ConfigRecord({key: value for key, value in record.items() if key in kept})
        sent.append(with_records(message, {RECORD_KEY_CONFIGS: told}))
    return sent


LIES: dict[str, tuple[str, Lie, str]] = {
    "half of the shares": (Stage.SETUP, to_all(threshold=2), "2 of 4 shares would recover a seed"),
    "one share": (Stage.SETUP, to_all(threshold=1), "1 of 4 shares would recover a seed"),
    "small modulus": (Stage.SETUP, to_all(mod_range=2), "mod_range = 2, and 4294967296 was agreed"),
    "other steps": (Stage.SETUP, to_all(target_range=2), "target_range = 2, and 4194304"),
    "other weight": (Stage.SETUP, to_all(max_weight=1.0), "max_weight = 1.0, and 2"),
    "other range": (Stage.SETUP, to_all(clipping_range=1.0), "clipping_range = 1.0, and 8.0"),
    "two take part": (Stage.SETUP, to_all(sample_num=2), "2 clients take part, and it wants"),
    "two keys": (Stage.SHARE_KEYS, few_keys, "2 keys were sent, and it wants to be one of 3"),
    "no commitment": (Stage.SHARE_KEYS, uncommitted, "does not say which model"),
    "another model": (Stage.COLLECT_MASKED_VECTORS, another_model, "not the one that the server"),
    "another setting": (Stage.COLLECT_MASKED_VECTORS, another_setting, "not the one that the"),
    "shares twice": (Stage.COLLECT_MASKED_VECTORS, twofold_sources, "shares come twice"),
    "two shared": (Stage.COLLECT_MASKED_VECTORS, few_sources, "2 clients shared their keys"),
    "living and dropped": (
        Stage.UNMASK, lists(lambda node, living: (living, living[:1])),
        "1 clients are said to live and to have dropped",
    ),
    "living twice": (
        Stage.UNMASK, lists(lambda node, living: ([*living, living[0]], [])), "stands twice"
    ),
    "itself dropped": (
        Stage.UNMASK, lists(lambda node, living: (without(living, node), [node])),
        "itself not among those who live",
    ),
    "strangers": (
        Stage.UNMASK, lists(lambda node, living: ([*living, 99], [])), "shared no masks with"
    ),
    "two left": (
        Stage.UNMASK,
        lists(lambda node, living: ([node, without(living, node)[0]], [])), "2 clients are left",
    ),
}  # fmt: skip


def lying(monkeypatch: pytest.MonkeyPatch, stage: str, lie: Lie) -> str:
    kind = type("Lying", (Lying,), {"stage": stage, "lie": staticmethod(lie)})
    plug_in(monkeypatch, "attack", "lying", kind)
    return "lying"


@pytest.mark.parametrize("case", LIES)
def test_all_clients_refuse_and_the_next_round_is_as_ever(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, lie, reason = LIES[case]
    attack = lying(monkeypatch, stage, lie)
    ran = federated(tmp_path, {"attack": attack, "channel": STRICT, "federation.rounds": 2})
    assert [view.label for view in ran.views] == ["round-2-aggregate-of-4"]
    refused = [(r, c) for r, c, why in ran.failures if reason in why]
    assert refused == [(1, client) for client in range(4)], ran.failures
    assert ran.failures[-1] == (
        1, None, "secure aggregation halted: too few of 4 clients were left"
    )  # fmt: skip
    assert "lied to 4/4 clients in round 1" in ran.federation["receipts"]


def test_flowers_own_clients_answer_the_same_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = lying(monkeypatch, *LIES["another model"][:2])
    ran = federated(tmp_path, {"attack": attack, "channel": "secagg(max_weight=2)"})
    assert ran.failures == []
    assert [view.label for view in ran.views] == ["round-1-aggregate-of-4"]


AGAIN: dict[str, tuple[Lie, str, int]] = {
    # what is asked; why the second time is refused; how often clients refuse
    "answered, then the other list": (
        twice(list, lists(dropping)), "shares are asked for a second time in one round", 1
    ),
    "refused, then the honest list": (
        twice(LIES["living and dropped"][1], list), "this round is over since it refused", 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AGAIN)
def test_who_answered_or_refused_does_not_answer_again(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie, reason, refusals = AGAIN[case]
    attack = lying(monkeypatch, Stage.UNMASK, lie)
    ran = federated(tmp_path, {"attack": attack, "channel": STRICT, "federation.rounds": 2})
    again = [(r, c) for r, c, why in ran.failures if reason in why]
    assert again == [(1, client) for client in range(4)]
    assert sum("refused" in why for *_, why in ran.failures) == 4 * refusals
    labels = [view.label for view in ran.views]
    assert labels == [f"round-{r}-aggregate-of-4" for r in (1, 2)][refusals - 1 :]


# -- the attacks that it is for ----------------------------------------------------------------

UNMASKINGS = {
    "secagg-unmasking(victims=[0])": "1 clients are said to live and to have dropped",
    "secagg-unmasking": "4 clients are said to live and to have dropped",
    "secagg-unmasking(lists='split')": "1 of 4 shares would recover a seed",
}


@pytest.mark.parametrize("attack", UNMASKINGS)
def test_with_all_clients_refusing_the_server_learns_nothing(attack: str, tmp_path: Path) -> None:
    ran = scenario(tmp_path, {"attack": attack, "channel": STRICT, "federation.rounds": 2})
    page = run_inline(ran, "a test")
    report = json.loads((page.parent / "report.json").read_text())
    assert list((page.parent / "views").glob("*")) == []
    assert report["leak"] is None
    assert "every client refused" in report["verdict"]
    assert report["failed"] is report["stopped"] is None
    refusals = [f for f in report["federation"]["failures"] if f["client"] is not None]
    assert [(f["round"], f["client"]) for f in refusals] == [
        (r, c) for r in (1, 2) for c in range(4)
    ]
    assert all(UNMASKINGS[attack] in f["reason"] for f in refusals)
    found = [(d["client"], d["round"], d["verdict"]) for d in report["detection"]]
    said = f"refused: {refusals[0]['reason']}"
    assert found == [(c, r, said) for c in range(4) for r in (1, 2)]
    assert UNMASKINGS[attack] in page.read_text()


def test_models_that_differ_from_client_to_client_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "tailoring", Tailoring)
    tailored = {"attack": "tailoring", "channel": "secagg(max_weight=2)"}
    assert len(federated(tmp_path / "lax", tailored).views) == 1
    page = run_inline(scenario(tmp_path / "strict", {**tailored, "channel": STRICT}), "a test")
    report = json.loads((page.parent / "report.json").read_text())
    assert list((page.parent / "views").glob("*")) == []
    refusals = [f for f in report["federation"]["failures"] if f["client"] is not None]
    assert [f["client"] for f in refusals] == [0, 1, 2, 3]
    assert all("a neighbor was told of another model" in f["reason"] for f in refusals)


@pytest.mark.parametrize("attack", ["model-inconsistency", "loki", "sparse-linear-layer"])
def test_attacks_that_tailor_the_model_end_there(attack: str, tmp_path: Path) -> None:
    toy = components("attack")[attack].toy.scenario  # type: ignore[attr-defined]
    channel = "secagg(strict=True, threshold=0.8)"
    page = run_inline(
        Scenario.from_flat({**toy, "channel": channel, "output.dir": str(tmp_path)}), "a test"
    )
    report = json.loads((page.parent / "report.json").read_text())
    assert list((page.parent / "views").glob("*")) == []
    reasons = {f["reason"] for f in report["federation"]["failures"] if f["client"] is not None}
    assert reasons == {
        "secagg(strict=True) refused the round: a neighbor was told of another model"
    }


# -- honest rounds -----------------------------------------------------------------------------

HONEST: dict[str, dict[str, Any]] = {
    "gradients": {},
    "weights": {"federation.local": "fedavg(epochs=1, batch_size=32, lr=0.1)",
                "channel": "secagg(strict=True, threshold=0.75)"},
    "few shares": {"channel": "secagg(strict=True, max_weight=2, num_shares=0.5)",
                   "federation.clients": 7},
    "batchnorm": {"model.name": "resnet20(width=4)", "model.batchnorm": "shared"},
}  # fmt: skip


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_round_is_bit_for_bit_as_without(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))
    wanted = {"attack": "watching", "channel": STRICT, "federation.rounds": 2, **HONEST[kind]}
    lax = {**wanted, "channel": wanted["channel"].replace("strict=True, ", "")}
    strict, plain = federated(tmp_path / "strict", wanted), federated(tmp_path / "lax", lax)
    assert strict.failures == plain.failures == []
    assert len(strict.views) == len(plain.views) == 2
    for mine, theirs in zip(strict.views, plain.views, strict=True):
        for name, array in mine.received.items():
            assert torch.equal(array, theirs.received[name])


def failing(monkeypatch: pytest.MonkeyPatch, stage: str, gone: set[int]) -> None:
    """Let some clients not answer in one stage of round 1."""
    honest = SecAgg.client

    def client(self: SecAgg, msg: Message, context: Any, call_next: Any) -> Any:
        record = msg.content.config_records[RECORD_KEY_CONFIGS]
        if record[Key.STAGE] == stage and context.node_config["client"] in gone:
            raise ZeroDivisionError("gone")
        return honest(self, msg, context, call_next)

    monkeypatch.setattr(SecAgg, "client", client)


def five(folder: Path) -> Ran:
    """Run five strict clients, of whom three recover a seed."""
    channel = "secagg(strict=True, max_weight=2, threshold=0.6)"
    return federated(folder, {"attack": "watching", "channel": channel, "federation.clients": 5})


@pytest.mark.parametrize("stage", Stage.all())
def test_as_many_may_drop_out_as_the_threshold_allows(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))
    failing(monkeypatch, stage, {1, 4})
    ran = five(tmp_path)
    (view,) = ran.views
    summed = (0, 1, 2, 3, 4) if stage == Stage.UNMASK else (0, 2, 3)
    assert view.senders == summed
    assert [failure[1] for failure in ran.failures] == [1, 4]
    uploads = [r.upload for r in ran.vault if r.client in summed and r.upload is not None]
    for name, array in view.received.items():
        mean = torch.stack([upload[name].double() for upload in uploads]).mean(dim=0)
        assert torch.allclose(array, mean, atol=1e-5)


def test_when_more_drop_out_nothing_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))
    failing(monkeypatch, Stage.COLLECT_MASKED_VECTORS, {1, 2, 4})
    with pytest.raises(RunFailed, match="too few of 5 clients were left"):
        five(tmp_path)


def test_a_client_that_cannot_train_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))
    honest = client_app._respond

    def respond(msg: Any, context: Any, *args: Any, **rest: Any) -> Any:
        if context.node_config["client"] == 1:
            raise ZeroDivisionError("no memory left")
        return honest(msg, context, *args, **rest)

    monkeypatch.setattr(client_app, "_respond", respond)
    ran = five(tmp_path)
    ((_, client, reason),) = ran.failures
    assert client == 1
    assert "no memory left" in reason
    assert "refused" not in reason


@pytest.mark.parametrize(
    ("channel", "clients", "remedy"),
    [
        ("secagg(strict=True)", 4, r"threshold of 2 of 4 shares.*at least 0\.75"),
        ("secagg(strict=True, threshold=0.5)", 8, r"threshold of 4 of 8 shares.*at least 0\.625"),
        ("secagg(strict=True)", 2, "want to be one of 3, and each would share with 2"),
        ("secagg(strict=True, min_cohort=6)", 5, "want to be one of 6"),
        ("secagg(strict=True, num_shares=0.5, min_cohort=6)", 10, "each would share with 5"),
        ("secagg(min_cohort=2)", 5, "nobody looks at min_cohort unless strict=True"),
    ],
)  # fmt: skip
def test_what_strict_clients_would_refuse_is_refused_before(
    channel: str, clients: int, remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(ScenarioError, match=remedy):
        check(Parts(scenario(tmp_path, {"channel": channel, "federation.clients": clients})))


@pytest.mark.parametrize("channel", ["secagg(strict=True)", "secagg(strict=True, threshold=0.51)"])
def test_the_remedy_fits(channel: str, tmp_path: Path) -> None:
    """For every cohort whose threshold is too low, the one that is proposed is high enough."""
    for clients in range(3, 40):
        wanted = {"channel": channel, "federation.clients": clients}
        try:
            check(Parts(scenario(tmp_path, wanted)))
        except ScenarioError as error:
            least = str(error).rpartition(" ")[2]
            mended = f"secagg(strict=True, threshold={least})"
            check(Parts(scenario(tmp_path, {**wanted, "channel": mended})))
