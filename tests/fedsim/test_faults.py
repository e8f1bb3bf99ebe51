"""What goes wrong at one client, on the disk or by a signal costs that much and no more."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message, MetricRecord, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS

from clients.trainer import FedSGD
from fedsim import client_app
from fedsim.audit.verdict import judge
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed
from strategies.channels.secagg import SecAgg
from tests.fedsim.small import Ran, federated, latest, plug_in, scenario, watching

ROOT = Path(__file__).parents[2]
VICTIM = 1
ROUNDS = {"federation.rounds": 2}


# -- clients -----------------------------------------------------------------------------------


def raises() -> None:
    raise ZeroDivisionError("the client's own mistake")


def with_values(value: float) -> Callable[[RecordDict], RecordDict]:
    def change(content: RecordDict) -> RecordDict:
        arrays = content.array_records["arrays"]
        name = next(iter(arrays))
        values = arrays[name].numpy().copy()
        values.flat[0] = value
        arrays[name] = Array(values)
        return content

    return change


def of_wrong_shape(content: RecordDict) -> RecordDict:
    arrays = content.array_records["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(arrays[name].numpy().T.copy())
    return content


def lying_about_its_shape(content: RecordDict) -> RecordDict:
    arrays = content.array_records["arrays"]
    name = next(iter(arrays))
    shape = tuple(arrays[name].shape)
    liar = Array(np.zeros(3, dtype=np.float32))
    liar.shape = shape
    arrays[name] = liar
    return content


def of_garbage(content: RecordDict) -> RecordDict:
    arrays = content.array_records["arrays"]
    name = next(iter(arrays))
    shape = tuple(arrays[name].shape)
    arrays[name] = Array("float32", shape, "numpy.ndarray", b"this is no array at all")
    return content


def of_text(content: RecordDict) -> RecordDict:
    arrays = content.array_records["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(np.full(arrays[name].shape, "text"))
    return content


def without_an_array(content: RecordDict) -> RecordDict:
    arrays = content.array_records["arrays"]
    del arrays[next(iter(arrays))]
    return content


def with_another_array(content: RecordDict) -> RecordDict:
    content.array_records["arrays"]["extra"] = Array(np.zeros(1))
    return content


def saying(**metrics: Any) -> Callable[[RecordDict], RecordDict]:
    def change(content: RecordDict) -> RecordDict:
        content["metrics"] = MetricRecord({n.replace("_", "-"): v for n, v in metrics.items()})
        return content

    return change


CHANGES: dict[str, tuple[Callable[[RecordDict], RecordDict], str]] = {
    "NaN": (with_values(float("nan")), "holds NaN or Inf"),
    "Inf": (with_values(float("inf")), "holds NaN or Inf"),
    "wrong shape": (of_wrong_shape, "has shape [64, 8], not [8, 64]"),
    "lie about its shape": (lying_about_its_shape, "has shape [3], not [8, 64]"),
    "garbage": (of_garbage, "cannot be read"),
    "text": (of_text, "not floating-point numbers"),
    "missing array": (without_an_array, "its reply lacks, or adds, '1.weight'"),
    "another array": (with_another_array, "its reply lacks, or adds, 'extra'"),
    "no arrays": (lambda c: RecordDict({"metrics": c["metrics"]}), "holds no arrays"),
    "empty reply": (lambda c: RecordDict(), "holds no arrays"),
    "no num-examples": (saying(loss=1.0), "does not say num-examples"),
    "no examples": (saying(num_examples=0), "weighs nothing"),
    "less than no examples": (saying(num_examples=-4), "weighs nothing"),
    "a list of examples": (saying(num_examples=[1, 2]), "not a finite number"),
    "examples that are no number": (saying(num_examples=float("nan")), "not a finite number"),
    "a list beside": (saying(num_examples=2, losses=[1.0, 2.0]), "losses = [1.0, 2.0]"),
}


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> str:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: list(views)))
    return "watching"


def sabotaged(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[RecordDict], RecordDict], victims: set[int]
) -> None:
    """Let some clients answer something else."""
    honest = client_app._respond

    def respond(msg: Message, context: Context, *args: Any, **rest: Any) -> Message:
        reply = honest(msg, context, *args, **rest)
        if context.node_config["client"] in victims:
            return Message(change(reply.content), reply_to=msg)
        return reply

    monkeypatch.setattr(client_app, "_respond", respond)


def assert_went_on_without_the_victim(ran: Ran, reason: str, others: int = 3) -> None:
    assert [failure[:2] for failure in ran.failures] == [(1, VICTIM), (2, VICTIM)]
    assert all(reason in failure[2] for failure in ran.failures), ran.failures
    assert ran.federation["rounds_done"] == 2
    assert ran.federation["accuracy"]["after"] is not None
    senders = [view.senders for view in ran.views]
    assert len(senders) == 2 * others
    assert (VICTIM,) not in senders


@pytest.mark.parametrize("fault", CHANGES)
def test_a_broken_reply_is_left_out_and_named(
    fault: str, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, reason = CHANGES[fault]
    sabotaged(monkeypatch, change, {VICTIM})
    ran = federated(tmp_path, {"attack": attack, **ROUNDS})
    assert_went_on_without_the_victim(ran, reason)


def test_a_client_that_raises_is_left_out_and_named(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = FedSGD.train

    def train(self: FedSGD, model: Any, data: Any, defenses: Any, ctx: Any, pull: float) -> Any:
        if ctx.client == VICTIM:
            raises()
        return honest(self, model, data, defenses, ctx, pull)

    monkeypatch.setattr(FedSGD, "train", train)
    ran = federated(tmp_path, {"attack": attack, **ROUNDS})
    assert_went_on_without_the_victim(ran, "ZeroDivisionError: the client's own mistake")


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The victim waits in its first round until the test is over; given up, it trains no more."""
    honest, over, returned = FedSGD.train, threading.Event(), threading.Event()
    trained: list[Any] = []

    def train(self: FedSGD, model: Any, data: Any, defenses: Any, ctx: Any, pull: float) -> Any:
        if ctx.client == VICTIM and ctx.round == 1:
            try:
                over.wait()
                trained.append(honest(self, model, data, defenses, ctx, pull))
            finally:
                returned.set()
        return honest(self, model, data, defenses, ctx, pull)

    monkeypatch.setattr(FedSGD, "train", train)
    yield {"over": over}
    over.set()
    assert returned.wait(10)
    assert not trained


@pytest.mark.usefixtures("hanging")
def test_a_client_that_hangs_is_given_up_and_the_others_have_their_time(
    attack: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    ran = federated(tmp_path, {"attack": attack, **ROUNDS, "federation.timeout": 1.0})
    assert time.monotonic() - started < 10
    assert ran.failures == [(1, VICTIM, "no answer within 1 s")]
    assert len(ran.views) == 7


def test_a_client_that_wakes_up_late_disturbs_nobody(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes while the next client trains, and takes no end: each has a model of its own."""
    calm = federated(tmp_path / "calm", {"attack": attack})
    honest, woken, slept = FedSGD.train, threading.Event(), threading.Event()

    def train(self: FedSGD, model: Any, data: Any, defenses: Any, ctx: Any, pull: float) -> Any:
        if ctx.client == VICTIM:
            with contextlib.suppress(SystemExit):
                woken.wait()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(9.0)
            slept.set()
        elif ctx.client == VICTIM + 1:
            woken.set()
            assert slept.wait(10)
        return honest(self, model, data, defenses, ctx, pull)

    monkeypatch.setattr(FedSGD, "train", train)
    rude = federated(tmp_path / "rude", {"attack": attack, "federation.timeout": 1.0})
    expected = [view for view in calm.views if view.senders != (VICTIM,)]
    for found, view in zip(rude.views, expected, strict=True):
        for name, tensor in view.received.items():
            assert torch.equal(found.received[name], tensor)


def test_a_client_may_come_back(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = FedSGD.train

    def train(self: FedSGD, model: Any, data: Any, defenses: Any, ctx: Any, pull: float) -> Any:
        if ctx.client == VICTIM and ctx.round == 1:
            raises()
        return honest(self, model, data, defenses, ctx, pull)

    monkeypatch.setattr(FedSGD, "train", train)
    ran = federated(tmp_path, {"attack": attack, **ROUNDS})
    assert [(r, c) for r, c, _ in ran.failures] == [(1, VICTIM)]
    assert [view.senders for view in ran.views] == [(0,), (2,), (3,), (0,), (1,), (2,), (3,)]


def test_a_round_without_a_usable_reply_leaves_the_model_as_it_was(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = FedSGD.train

    def train(self: FedSGD, model: Any, data: Any, defenses: Any, ctx: Any, pull: float) -> Any:
        if ctx.round == 1:
            raises()
        return honest(self, model, data, defenses, ctx, pull)

    monkeypatch.setattr(FedSGD, "train", train)
    ran = federated(tmp_path, {"attack": attack, **ROUNDS})
    assert len(ran.failures) == 4
    initial = ran.parts.model().state_dict()
    for view in ran.views:
        assert view.round == 2
        assert all(torch.equal(view.sent[name], tensor) for name, tensor in initial.items())


def test_a_run_in_which_all_fail_fails_and_can_be_reported(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotaged(monkeypatch, with_values(float("nan")), {0, 1, 2, 3})
    with pytest.raises(RunFailed, match=r"no round had a usable reply: '1\.weight' holds NaN"):
        run_inline(scenario(tmp_path, {"attack": attack}), "a test")
    folder = latest(tmp_path)
    report = judge(folder.path)
    assert len(report.federation.failures) == 4
    assert report.leak is None
    assert report.stopped or report.failed


def test_a_flower_strategy_that_gives_up_fails_the_run_in_plain_words(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.serverapp.exception import AggregationError
    from flwr.serverapp.strategy import FedAvg

    def aggregate(*_: object) -> None:
        raise AggregationError("these cannot be averaged")

    monkeypatch.setattr(FedAvg, "aggregate_train", aggregate)
    with pytest.raises(RunFailed, match="could not aggregate: these cannot be averaged"):
        federated(tmp_path, {"attack": attack})


# -- behind secure aggregation -----------------------------------------------------------------

BEHIND = {"channel": "secagg(max_weight=2)", "federation.clients": 5}


def dropping(monkeypatch: pytest.MonkeyPatch, victims: set[int], stage: str) -> None:
    """Let clients drop out when they are asked for this stage."""
    honest = SecAgg.client

    def client(self: SecAgg, msg: Message, context: Context, call_next: Any) -> Message:
        asked = msg.content.config_records[RECORD_KEY_CONFIGS]["stage"]
        if context.node_config["client"] in victims and asked == stage:
            raises()
        return honest(self, msg, context, call_next)

    monkeypatch.setattr(SecAgg, "client", client)


@pytest.mark.parametrize("stage", ["setup", "share_keys", "collect_masked_vectors"])
def test_a_client_that_drops_out_of_the_sum_is_left_out_of_it(
    stage: str, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping(monkeypatch, {VICTIM}, stage)
    ran = federated(tmp_path, {"attack": attack, **BEHIND, **ROUNDS})
    assert [(r, c) for r, c, _ in ran.failures] == [(1, VICTIM), (2, VICTIM)]
    assert [view.senders for view in ran.views] == [(0, 2, 3, 4)] * 2
    view = ran.views[0]
    records = [ran.vault.record(client, 1) for client in view.senders]
    for name, mean in view.received.items():
        uploads = [r.upload[name].double() for r in records if r is not None and r.upload]
        assert len(uploads) == 4
        assert torch.allclose(mean, torch.stack(uploads).mean(dim=0), atol=1e-5)


def test_too_few_for_the_threshold_halts_the_round_in_plain_words(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping(monkeypatch, {0, 1, 2}, "collect_masked_vectors")
    with pytest.raises(RunFailed, match="secure aggregation halted: too few of 5 clients"):
        federated(tmp_path, {"attack": attack, **BEHIND})
    told = json.loads((latest(tmp_path).path / "federation.json").read_text())
    assert [f["client"] for f in told["failures"]] == [0, 1, 2, None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_values(float("nan")), "holds NaN or Inf, which would spoil the sum"),
        (of_wrong_shape, "arrays missing, or of wrong shapes"),
        (without_an_array, "arrays missing, or of wrong shapes"),
        (saying(num_examples=3), "cannot weigh 3 examples"),
        (saying(num_examples=0), "cannot weigh 0 examples"),
        (saying(loss=1.0), "does not say num-examples"),
        (lambda content: RecordDict(), "training gave no arrays"),
    ],
)
def test_a_broken_upload_does_not_spoil_the_sum(
    change: Callable[[RecordDict], RecordDict],
    reason: str,
    attack: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotaged(monkeypatch, change, {VICTIM})
    ran = federated(tmp_path, {"attack": attack, **BEHIND, **ROUNDS})
    assert [(r, c) for r, c, _ in ran.failures] == [(1, VICTIM), (2, VICTIM)]
    assert all(reason in failure[2] for failure in ran.failures), ran.failures
    assert [view.senders for view in ran.views] == [(0, 2, 3, 4)] * 2
