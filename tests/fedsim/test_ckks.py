"""Behind CKKS the server adds what it cannot read, and is told the decrypted sum."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal
import torch
from flwr.app import Message

from fedsim import client_app, seeds
from fedsim.errors import RunFailed
from fedsim.isolation.walls import walls
from fedsim.registry import build
from strategies.channels import ckks
from strategies.channels.ckks import Ckks, CkksGrid
from tests.fedsim.small import Ran, federated, plug_in, watching

FEDAVG = "fedavg(epochs=1, batch_size=32, lr=0.1)"
SKEWED = {"data.partition": "dirichlet(alpha=1.0, min_partition_size=5)"}
FAST = "ckks(poly_modulus_degree=4096, coeff_modulus=[60, 49])"


@pytest.fixture(autouse=True)
def _watching(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "attack", "watching", watching(lambda views, knowledge: None))


def summed(folder: Path, changes: dict[str, Any] | None = None) -> Ran:
    return federated(folder, {"attack": "watching", "channel": FAST, **(changes or {})})


@pytest.mark.parametrize(
    ("channel", "ratio"),
    [("ckks", 20.2), ("ckks(coeff_modulus=[60, 60])", 8.0), (FAST, 8.0)],
)
def test_ten_uploads_come_out_as_their_sum_to_a_millionth(channel: str, ratio: float) -> None:
    """The card's parameters are the default: 331 kB for 4096 values, error of 10 below 1e-6."""
    made: Ckks = build("channel", channel, "channel")
    key = tenseal.context_from(
        ckks.new_key(made.poly_modulus_degree, list(made.coeff_modulus), made.scale_bits)
    )
    slots = made.poly_modulus_degree // 2
    values = np.random.default_rng(0).normal(size=(10, slots))
    sent = [ckks.encrypt(key, own, slots) for own in values]
    server = tenseal.context_from(made.public)
    total = tenseal.ckks_vector_from(server, sent[0][0])
    for one in sent[1:]:
        total = total + tenseal.ckks_vector_from(server, one[0])
    error = np.abs(ckks.decrypt(key, [total.serialize()]) - values.sum(axis=0)).max()
    assert 0 < error < 1e-6
    assert len(sent[0][0]) / (4 * slots) == pytest.approx(ratio, rel=0.02)


def test_what_the_server_holds_decrypts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[CkksGrid] = []
    honest = CkksGrid.release

    def release(self: CkksGrid, asked: list[Message]) -> list[Message]:
        held.append(self)
        return honest(self, asked)

    monkeypatch.setattr(CkksGrid, "release", release)
    summed(tmp_path)
    (grid,) = held
    for kind in ("secret", "public", "galois", "relin"):
        has = f"has_{kind}_key" + "s" * (kind in ("galois", "relin"))
        assert not getattr(grid.context, has)()
    with pytest.raises(ValueError, match="secret_key"):
        grid.sum[0].decrypt()


def test_what_one_client_sends_says_nothing_of_its_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two encryptions of the same values differ, and neither holds them."""
    key = tenseal.context_from(ckks.new_key(4096, [60, 49], 40))
    values = np.ones(2048)
    first, second = (ckks.encrypt(key, values, 2048)[0] for _ in range(2))
    a, b = (np.frombuffer(one[200:60_000], dtype=np.uint8) for one in (first, second))
    assert (a != b).mean() > 0.95


KINDS: dict[str, dict[str, Any]] = {
    "gradients": {},
    "the default parameters": {"channel": "ckks"},
    "weights": {"federation.local": FEDAVG},
    "unequal weights": {"federation.local": FEDAVG, **SKEWED},
    "two clients": {"federation.clients": 2},
    "double precision": {"federation.precision": "float64"},
    "several ciphertexts": {"model.name": "mlp(hidden=[64])"},
    "statistics": {
        "model.name": "resnet20(width=4)",
        "model.batchnorm": "shared",
        "federation.local": "fedsgd(batch_size=4)",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_gets_the_weighted_mean(kind: str, tmp_path: Path) -> None:
    ran = summed(tmp_path, KINDS[kind])
    (view,) = ran.views
    records = [record for record in ran.vault if record.upload]
    weights = torch.tensor([float(len(record.labels)) for record in records]).double()
    assert view.senders == tuple(range(ran.parts.scenario.federation.clients))
    assert view.num_examples == int(weights.sum())
    assert view.metrics == {}
    for name, got in view.received.items():
        sent = torch.stack([record.upload[name].double() for record in records])  # type: ignore[index]
        mean = torch.tensordot(weights / weights.sum(), sent, dims=1)
        assert torch.allclose(got.double(), mean, atol=1e-6, rtol=1e-6)


def test_rounds_go_on_with_one_key_and_it_goes_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []
    honest = ckks._write_once

    def write_once(path: Path, content: bytes) -> None:
        honest(path, content)
        assert path.stat().st_mode & 0o777 == 0o600
        made.append(content)

    monkeypatch.setattr(ckks, "_write_once", write_once)
    ran = summed(tmp_path, {"federation.rounds": 3, "federation.local": FEDAVG})
    assert ran.failures == []
    assert [view.round for view in ran.views] == [1, 2, 3]
    assert ran.federation["accuracy"]["after"] > ran.federation["accuracy"]["before"]
    assert len(made) == 1
    assert list((seeds.home() / "keys").iterdir()) == []


def test_attack_code_is_walled_off_from_the_key(tmp_path: Path) -> None:
    ran = summed(tmp_path, {"channel": f"ckks(keys={str(tmp_path / 'elsewhere')!r})"})
    assert tmp_path / "elsewhere" in walls(ran.parts, ran.folder)


def test_sizes_and_times_are_told(tmp_path: Path) -> None:
    ran = summed(tmp_path, {"channel": "ckks", "model.name": "mlp(hidden=[64])"})
    told = ran.federation["channel"]
    values = 64 * 64 + 64 + 64 * 10 + 10
    assert told["size_ratio_to_float32"] == pytest.approx(told["upload_bytes"] / (4 * values))
    assert 600_000 < told["upload_bytes"] < 700_000  # two ciphertexts of 331 kB
    for time in ("encrypt_seconds_a_client", "add_seconds_a_round", "decrypt_seconds_a_round"):
        assert 0 < told[time] < 5


def failing(monkeypatch: pytest.MonkeyPatch, victims: set[int], stage: str) -> None:
    """Let clients drop out when they are asked for this stage."""
    honest = Ckks.client

    def client(self: Ckks, msg: Message, context: Any, call_next: Any) -> Message:
        asked = msg.content.config_records[ckks.RECORD]["stage"]
        if context.node_config["client"] in victims and asked == stage:
            raise ZeroDivisionError("gone")
        return honest(self, msg, context, call_next)

    monkeypatch.setattr(Ckks, "client", client)


def test_who_drops_out_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {1}, "encrypt")
    ran = summed(tmp_path)
    assert [view.senders for view in ran.views] == [(0, 2, 3)]
    assert [(r, c) for r, c, _ in ran.failures] == [(1, 1)]


def test_the_next_one_decrypts_where_the_first_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {0, 1}, "decrypt")
    ran = summed(tmp_path)
    assert [view.senders for view in ran.views] == [(0, 1, 2, 3)]
    assert [(r, c) for r, c, _ in ran.failures] == [(1, 0), (1, 1)]


def test_a_single_clients_sum_is_not_decrypted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {0, 1, 2}, "encrypt")
    with pytest.raises(RunFailed, match="the sum of a single client is not decrypted"):
        summed(tmp_path)


def test_ciphertexts_of_two_keys_are_not_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines, each with a folder of its own; SEAL adds them without an error."""
    keys = [ckks.new_key(4096, [60, 49], 40) for _ in range(2)]
    monkeypatch.setattr(Ckks, "_key", lambda _, context: keys[context.node_config["client"] % 2])
    ran = summed(tmp_path)
    assert [view.senders for view in ran.views] in ([(0, 2)], [(1, 3)])  # whose came first
    assert len(ran.failures) == 2
    assert all("ckks(keys='...')" in reason for _, _, reason in ran.failures)
    assert ckks.fingerprint(keys[0]) != ckks.fingerprint(keys[1])


@pytest.mark.parametrize("weight", [0.0, np.nan])
def test_what_has_no_weight_is_no_sum(
    weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ckks.decrypt

    def decrypt(*given: Any) -> Any:
        return np.append(honest(*given)[:-1], weight)

    monkeypatch.setattr(ckks, "decrypt", decrypt)
    with pytest.raises(RunFailed, match="no sum of uploads"):
        summed(tmp_path)


def test_a_broken_upload_does_not_spoil_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = client_app._respond

    def respond(msg: Any, context: Any, *args: Any, **rest: Any) -> Message:
        reply = honest(msg, context, *args, **rest)
        if context.node_config["client"] == 1:
            name = next(iter(reply.content.array_records["arrays"]))
            array = reply.content.array_records["arrays"][name].numpy() * np.nan
            reply.content.array_records["arrays"][name] = type(
                reply.content.array_records["arrays"][name]
            )(array)
        return reply

    monkeypatch.setattr(client_app, "_respond", respond)
    ran = summed(tmp_path)
    assert [view.senders for view in ran.views] == [(0, 2, 3)]
    assert "NaN or Inf" in ran.failures[0][2]


@pytest.mark.parametrize(
    ("channel", "clients", "weight", "why"),
    [
        ("ckks", 1, 8, "nothing to hide in"),
        ("ckks(poly_modulus_degree=5000)", 4, 8, "write one of"),
        ("ckks(coeff_modulus=[60])", 4, 8, "two primes"),
        ("ckks(coeff_modulus=[60, 60, 60, 60])", 4, 8, "128 bits of security; at most 218"),
        ("ckks(coeff_modulus=[50, 50])", 4, 300, "wrap around at 512"),
        ("ckks(coeff_modulus=[60, 60], scale_bits=10)", 4, 8, "scale_bits=10 .* use 34 or more"),
        (
            "ckks(poly_modulus_degree=4096, coeff_modulus=[40, 20, 40], scale_bits=20)",
            4,
            8,
            "off by up to 0.0078, .* use 33 or more",
        ),
        (
            "ckks(poly_modulus_degree=32768, coeff_modulus=[20, 20, 20, 20])",
            4,
            8,
            "SEAL refuses .* enough qualifying primes",
        ),
    ],
)
def test_what_cannot_be_is_refused(channel: str, clients: int, weight: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        build("channel", channel, "channel").check(clients, weight)


@pytest.mark.parametrize(
    ("degree", "modulus", "least"),
    [
        (4096, [60, 49], 33),
        (8192, [60, 60], 34),
        (8192, [60, 40, 40, 60], 34),
        (16384, [60, 60], 35),
        (32768, [60, 30, 60], 36),
    ],
)
def test_the_fewest_scale_bits_that_are_taken_are_exact_to_a_millionth(
    degree: int, modulus: list[int], least: int
) -> None:
    """The error has the law that the bar was computed from: N / 6 units, tails of Laplace's."""
    made = Ckks(poly_modulus_degree=degree, coeff_modulus=modulus, scale_bits=least)
    made.check(10, 8)
    with pytest.raises(ValueError, match=f"use {least} or more"):
        Ckks(poly_modulus_degree=degree, coeff_modulus=modulus, scale_bits=least - 1).check(10, 8)
    key = ckks._new_context(degree, modulus, least)
    values = np.random.default_rng(0).uniform(-1, 1, degree // 2)
    off = np.mean(
        [ckks.decrypt(key, ckks.encrypt(key, values, degree // 2)) - values for _ in range(2)],
        axis=0,
    )
    assert off.std() * 2**least == pytest.approx(degree / 6 / 2**0.5, rel=0.1)
    assert np.abs(off).max() < made.error < 1e-6


def test_what_seal_does_not_return_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ckks, "error", 0.0)
    with pytest.raises(ValueError, match=r"came back off by .* with scale_bits=20"):
        Ckks(scale_bits=20).check(4, 8)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "tenseal":
            raise ImportError(name)
        return honest(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[he\]'"):
        Ckks().check(4, 8)
