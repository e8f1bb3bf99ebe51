"""A partner that talks to the server holds the whole update, and nobody notices."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from strategies.attacks.protocol.fragment_collusion import FragmentCollusion
from tests.fedsim.small import Ran, federated, plug_in, scenario, watching

FEDAVG = "fedavg(epochs=1, batch_size=32, lr=0.1)"
SETTINGS: dict[str, dict[str, Any]] = {
    "gradients": {},
    "weights of unequal clients": {
        "federation.local": FEDAVG,
        "data.partition": "dirichlet(alpha=1.0, min_partition_size=5)",
    },
    "double precision": {"federation.precision": "float64"},
    "a client without a partner": {"federation.clients": 5},
    "few coordinates": {
        "channel": "fragmented(share=0.05)",
        "attack": "fragment-collusion(share=0.05)",
    },
}


def colluding(folder: Path, changes: dict[str, Any]) -> Ran:
    return federated(folder, {"attack": "fragment-collusion", "channel": "fragmented", **changes})


@pytest.fixture(autouse=True)
def _watching(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_comes_out_is_what_would_have_been_sent_in_the_clear(
    setting: str, tmp_path: Path
) -> None:
    """w_k = (1 - M) u_k + M (M w_k): gradients bit for bit."""
    changes = SETTINGS[setting]
    ran = colluding(tmp_path / "behind", changes)
    clear = federated(tmp_path / "clear", {**changes, "attack": "watching", "channel": "plain"})
    expected = {view.senders: view for view in clear.views}
    assert len(ran.views) == 4
    for view in ran.views:
        true = expected[view.senders]
        assert view.num_examples == true.num_examples
        for name, tensor in true.received.items():
            if view.kind == "gradient":
                assert torch.equal(view.received[name], tensor)
            else:  # what was sent is taken off and put back
                assert (view.received[name] - tensor).abs().max() < 1e-6
    assert "lied to 4/4 clients in round 1" in ran.federation["receipts"]


@pytest.mark.parametrize("local", ["fedsgd(batch_size=2, lr=0.1)", FEDAVG])
def test_the_model_that_comes_of_it_is_an_honest_rounds(local: str, tmp_path: Path) -> None:
    common = {"federation.local": local, "federation.rounds": 2}
    ran = colluding(tmp_path / "attacked", common)
    honest = federated(
        tmp_path / "honest", {"attack": "watching", "channel": "fragmented", **common}
    )
    second, expected = (next(v for v in r.views if v.round == 2).sent for r in (ran, honest))
    for name, tensor in expected.items():
        assert (second[name] - tensor).abs().max() < 1e-6
    assert ran.failures == honest.failures == []


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"channel": "plain"}, "channel = 'fragmented'"),
        ({"channel": "fragmented(share=0.309)"}, "write share=0.309"),
    ],
)
def test_what_it_cannot_be_a_partner_in_is_refused(
    changes: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    wanted = {"attack": "fragment-collusion", "channel": "fragmented", **changes}
    with pytest.raises(ScenarioError, match=remedy):
        check(Parts(scenario(tmp_path, wanted)))


def test_it_reads_with_passive_attacks_only() -> None:
    with pytest.raises(ValueError, match="must be passive"):
        FragmentCollusion(then="robbing-the-fed")
