"""Two random streams that never meet, and no order of calls that matters."""

import hashlib
import random
import secrets
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fedsim import seeds


def test_a_stream_is_the_same_on_every_machine() -> None:
    assert seeds.derive(7, "client", 3, "batches", 1) == 6680718124043252130
    digest = hashlib.sha256(b"7/client/3/batches/1").digest()
    assert seeds.derive(7, "client", 3, "batches", 1) == int.from_bytes(digest[:8], "big") // 2


def test_every_use_has_a_stream_of_its_own() -> None:
    found = {seeds.derive(s, *n) for s in range(5) for n in ((), ("a",), ("a", 1), ("a", "b"))}
    assert len(found) == 20
    assert all(0 <= one < 2**63 for one in found)


def test_one_use_tells_nothing_of_another() -> None:
    attack = seeds.derive(7, "attack")
    others = {seeds.derive(7, *n) for n in (("model",), ("partition",), ("client", 0, "batches"))}
    assert 7 not in (attack, attack >> 32, attack & 0xFFFFFFFF)
    assert attack not in others
    assert not others & {seeds.derive(attack, *n) for n in (("model",), ("partition",))}


def test_the_secret_stream_hangs_on_the_key_and_not_on_the_seed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    one = seeds.secret_generator(7, "noise").initial_seed()
    assert one == seeds.secret_generator(7, "noise").initial_seed()
    assert one != seeds.secret_generator(8, "noise").initial_seed()
    assert one != seeds.generator(7, "noise").initial_seed()
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "22" * 32)
    assert one != seeds.secret_generator(7, "noise").initial_seed()


def test_entropy_ignores_seed_and_key() -> None:
    found = {seeds.secret_generator(7, "x", entropy=True).initial_seed() for _ in range(4)}
    assert len(found) == 4


def test_the_key_is_made_once_and_for_its_owner_only() -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: seeds.secret_key(), range(16)))
    assert len(keys) == 1
    assert len(keys.pop()) == 32
    made = list(seeds.home().iterdir())
    assert [path.name for path in made] == ["secret.key"]
    assert stat.S_IMODE(made[0].stat().st_mode) == 0o600


def test_the_key_of_the_process_that_was_first_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def another_is_first(count: int) -> bytes:
        (seeds.home() / "secret.key").write_bytes(b"a" * count)
        return b"b" * count

    monkeypatch.setattr(secrets, "token_bytes", another_is_first)
    assert seeds.secret_key() == b"a" * 32
    assert [path.name for path in seeds.home().iterdir()] == ["secret.key"]


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_global_generators_are_seeded_inside_and_as_before_outside() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with seeds.seeded_globals(5):
        inside = draws()
        with seeds.seeded_globals(6):
            draws()
        after = draws()
    outside = draws()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert outside == draws()
    with seeds.seeded_globals(5):
        assert (inside, after) == (draws(), draws())


def test_global_generators_are_put_back_after_an_error() -> None:
    torch.manual_seed(1)
    with pytest.raises(KeyError), seeds.seeded_globals(5):
        raise KeyError
    found = torch.rand(())
    torch.manual_seed(1)
    assert found == torch.rand(())
