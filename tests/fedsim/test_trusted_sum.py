"""A trusted aggregator tells the server the exact mean, and forgets each upload at once."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.attack import Manipulation, ModelToSend, Reconstruction
from fedsim.errors import ScenarioError
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.channels.trusted_sum import SummingGrid, Total
from tests.fedsim.small import NOBODY, federated, gray, plug_in

SUMMED = {"channel": "trusted-sum", "attack": "robbing-the-fed(units=4)", "threat-model": "G"}


def upload(examples: int = 1, **arrays: list[float]) -> RecordDict:
    values = {name: Array(np.array(value, dtype=np.float32)) for name, value in arrays.items()}
    weight = MetricRecord({"num-examples": examples})
    return RecordDict({"arrays": ArrayRecord(values), "metrics": weight})


def test_a_grid_that_sums_says_how() -> None:
    assert SummingGrid.__abstractmethods__ >= {"take", "release"}


def test_the_server_gets_the_weighted_mean_of_what_it_would_have_seen(tmp_path: Path) -> None:
    summed = federated(tmp_path / "summed", SUMMED)
    seen = federated(tmp_path / "seen", {**SUMMED, "channel": "plain"})
    (view,) = summed.views
    assert view.senders == (0, 1, 2, 3)
    assert view.num_examples == 4 * 2
    for name, got in view.received.items():
        exact = torch.stack([one.received[name].double() for one in seen.views]).mean(dim=0)
        assert torch.allclose(got.double(), exact, rtol=1e-6, atol=1e-12)


def test_uploads_weigh_as_many_examples_as_they_are_of() -> None:
    total = Total()
    assert total.add(0, upload(1, w=[1.0, 2.0]), {}) is None
    assert total.add(1, upload(3, w=[5.0, 2.0]), {}) is None
    mean = total.mean()
    assert mean.array_records["arrays"]["w"].numpy().tolist() == [4.0, 2.0]
    assert mean.metric_records["metrics"]["num-examples"] == 4


def test_blocks_lie_side_by_side_in_the_sum() -> None:
    total = Total()
    total.add(0, upload(1, w=[1.0, 2.0]), {"w": (0, 3)})
    total.add(2, upload(1, w=[4.0, 8.0]), {"w": (2, 3)})
    wide = total.mean().array_records["arrays"]["w"].numpy()
    assert wide.tolist() == [[0.5, 1.0], [0.0, 0.0], [2.0, 4.0]]


@pytest.mark.parametrize(
    "broken", [upload(1, w=[1.0, float("nan")]), upload(1, w=[1.0]), upload(1, v=[1.0, 2.0])]
)
def test_a_broken_upload_spoils_nothing(broken: RecordDict) -> None:
    total = Total()
    total.add(0, upload(1, w=[1.0, 2.0]), {})
    assert total.add(1, broken, {}) is not None
    mean = total.mean()
    assert mean.array_records["arrays"]["w"].numpy().tolist() == [1.0, 2.0]
    assert mean.config_records["senders"]["clients"] == [0]


def test_a_single_client_has_nothing_to_hide_in(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="at least 2 clients"):
        federated(tmp_path, {**SUMMED, "federation.clients": 1})


@dataclass(frozen=True, kw_only=True)
class Blocks(Manipulation):
    """Says that the first bias is a client's own block, and keeps none of it for the federation."""

    paper = NOBODY
    needs = frozenset({Capability.UPDATES, Capability.MANIPULATION})

    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        return ModelToSend(expression, arrays, prefix="none of these.")

    def tailor(self, sent: ModelToSend, client: int, server_round: int) -> ModelToSend:
        name = next(name for name in sent.arrays if name.endswith("bias"))
        return dataclasses.replace(sent, places={name: (client, 4)})

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        return gray()


@pytest.mark.parametrize("channel", ["secagg(max_weight=2)", "trusted-sum"])
def test_masked_or_trusted_blocks_of_different_clients_do_not_mix(
    channel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "blocks", Blocks)
    alone = federated(tmp_path / "alone", {"attack": "blocks"})
    ran = federated(tmp_path / "summed", {"attack": "blocks", "channel": channel})
    assert ran.failures == []
    (view,) = ran.views
    name = next(name for name in view.sent if name.endswith("bias"))
    blocks = torch.stack([one.received[name] for one in alone.views]) / 4
    assert view.received[name].shape == blocks.shape
    assert torch.allclose(view.received[name].float(), blocks, atol=1e-5)


def test_an_upload_that_need_not_be_masked_travels_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "blocks", Blocks)
    sizes = {
        channel: federated(
            tmp_path / channel[:4], {"attack": "blocks", "channel": channel}
        ).federation["bytes_up"]
        for channel in ("plain", "trusted-sum", "secagg(max_weight=2)")
    }
    assert sizes["plain"] == sizes["trusted-sum"] < sizes["secagg(max_weight=2)"]
