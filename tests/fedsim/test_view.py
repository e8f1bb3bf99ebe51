"""A view holds what the adversary holds; saved and loaded it is the same, and only data."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedsim.errors import ScenarioError
from fedsim.view import SavedViews, ServerView, load_view, save_view

SENT = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)}


def view(
    *, senders: tuple[int, ...] = (3,), server_round: int = 1, kind: str = "weights"
) -> ServerView:
    received = {name: tensor - 0.25 for name, tensor in SENT.items()}
    return ServerView(
        round=server_round,
        senders=senders,
        model="mlp",
        sent=SENT,
        received=received,
        kind="weights" if kind == "weights" else "gradient",
        num_examples=16,
        metrics={"loss": 0.5},
    )


def test_a_view_survives_its_file(tmp_path: Path) -> None:
    path = save_view(tmp_path / "views", view())
    loaded = load_view(path)
    for field in ("round", "senders", "model", "kind", "num_examples", "metrics"):
        assert getattr(loaded, field) == getattr(view(), field)
    for name, tensor in view().received.items():
        assert torch.equal(loaded.received[name], tensor)
        assert torch.equal(loaded.sent[name], SENT[name])


def test_views_are_in_order_of_round_and_sender(tmp_path: Path) -> None:
    for server_round, client in [(10, 0), (2, 11), (2, 2), (1, 0)]:
        save_view(tmp_path, view(senders=(client,), server_round=server_round))
    save_view(tmp_path, view(senders=(0, 1, 2), server_round=3))
    saved = SavedViews(tmp_path)
    labels = [fact["label"] for fact in saved.facts()]
    assert labels == [
        "round-1-client-0",
        "round-2-client-2",
        "round-2-client-11",
        "round-3-aggregate-of-3",
        "round-10-client-0",
    ]
    assert labels == [one.label for one in saved]
    assert [one.label for one in saved[1:3]] == labels[1:3]
    assert saved[-1].label == labels[-1]


def test_what_was_sent_to_many_is_kept_once(tmp_path: Path) -> None:
    for client in range(5):
        save_view(tmp_path, view(senders=(client,)))
    assert len(list(tmp_path.glob("sent-*.safetensors"))) == 1
    assert len(list(tmp_path.iterdir())) == 6


def test_the_update_is_what_moved() -> None:
    weights, gradient = view(), view(kind="gradient")
    assert torch.equal(weights.update()["bias"], torch.full((2,), 0.25))
    assert torch.equal(gradient.update()["bias"], torch.full((2,), -0.25))


def test_an_update_of_what_was_not_sent_is_none(tmp_path: Path) -> None:
    other = ServerView(1, (0,), "mlp", {}, {"extra": torch.ones(1)}, "weights")
    assert other.update() == {}


@pytest.mark.parametrize("sent", ["../other.safetensors", "/etc/passwd", "absent.safetensors"])
def test_a_view_reads_only_its_own_folder(sent: str, tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    save_file(SENT, tmp_path / "other.safetensors")
    facts = {"round": 1, "senders": [0], "model": "mlp", "kind": "weights", "sent": sent}
    path = tmp_path / "views" / "round-1-client-0.safetensors"
    save_file(SENT, path, metadata={"view": json.dumps(facts)})
    with pytest.raises(ScenarioError, match="not a readable view"):
        load_view(path)


def test_code_in_a_view_does_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run!",)

    path = tmp_path / "round-1-client-0.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ScenarioError, match="not a readable view"):
        load_view(path)


def test_a_half_written_view_is_not_there(tmp_path: Path) -> None:
    save_view(tmp_path, view())
    (tmp_path / ".round-1-client-4.safetensors.123.partial").write_bytes(b"half")
    assert len(SavedViews(tmp_path)) == 1
