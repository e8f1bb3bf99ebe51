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


def first(generator: torch.Generator) -> list[int]:
    return torch.randint(2**62, (4,), generator=generator).tolist()


def test_a_secret_stream_is_none_of_the_four_billion_that_a_seed_can_begin() -> None:
    """``manual_seed`` keeps 32 bits, which can all be tried; here the whole state is secret."""
    generator = seeds.secret_generator(7, "noise")
    state = generator.get_state()
    seeded = torch.Generator().manual_seed(generator.initial_seed()).get_state()
    same = state[24:5016].view(torch.int64) == seeded[24:5016].view(torch.int64)
    assert same.float().mean() < 0.01
    noise = torch.randn(200_000, generator=generator)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    entropy = [first(seeds.secret_generator(7, "noise", key=seeds.fresh_key())) for _ in range(2)]
    assert entropy[0] != entropy[1]


def test_global_streams_begin_where_a_generator_is() -> None:
    drawn = []
    for name in ("one", "other", "one"):
        with seeds.seeded_globals(seeds.secret_generator(7, name)):
            drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])


def test_what_a_gpu_draws_is_secret_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public seeds reach CUDA's generators as well: the secret one has to come after them."""
    told: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", told.append)
    for name in ("one", "other", "one"):
        with (
            seeds.seeded_globals(7),
            seeds.seeded_globals(seeds.secret_generator(7, name)),
        ):
            pass
    secret = [seed for seed in told if seed != 7]
    assert secret[0] == secret[2] != secret[1]
    assert min(secret) > 2**40
    assert told[-1] != 7


@pytest.mark.gpu
def test_masks_drawn_on_a_gpu_hang_on_the_secret_and_nothing_else() -> None:
    drawn = []
    for public, name in ((1, "one"), (2, "one"), (1, "other")):
        torch.manual_seed(public)
        with seeds.seeded_globals(seeds.secret_generator(7, name)):
            drawn.append(torch.nn.functional.dropout(torch.ones(999, device="cuda")))
        torch.manual_seed(public)
        assert not torch.equal(torch.nn.functional.dropout(torch.ones(999).cuda()), drawn[-1])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_secret_stream_hangs_on_the_key_and_not_on_the_seed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    one = first(seeds.secret_generator(7, "noise"))
    assert one == first(seeds.secret_generator(7, "noise"))
    assert one != first(seeds.secret_generator(8, "noise"))
    assert one != first(seeds.generator(7, "noise"))
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "22" * 32)
    assert one != first(seeds.secret_generator(7, "noise"))


def test_runs_draw_for_themselves_unless_a_key_asks_for_a_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn() -> list[bytes]:
        return [seeds.secret_bytes(7, "noise", run_id=run) for run in (5, 6, 5)]

    one, other, again = drawn()
    assert one == again != other
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    assert len(set(drawn())) == 1


def test_entropy_ignores_seed_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "11" * 32)
    keys = [seeds.fresh_key() for _ in range(4)]
    found = [tuple(first(seeds.secret_generator(7, "x", key=key))) for key in keys]
    assert len(set(found)) == 4
    assert found == [tuple(first(seeds.secret_generator(7, "x", key=key))) for key in keys]


def test_the_key_is_made_once_and_for_its_owner_only() -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: seeds.secret_key(), range(16)))
    assert len(keys) == 1
    assert len(keys.pop()) == 32
    made = list(seeds.home().iterdir())
    assert [path.name for path in made] == ["secret.key"]
    assert stat.S_IMODE(made[0].stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["11", "zz" * 32, "11" * 31, "11" * 33, " " * 64])
def test_a_variable_that_holds_no_key_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", text)
    with pytest.raises(ValueError, match="FEDSIM_SECRET_KEY must be 64 hexadecimal digits") as told:
        seeds.secret_generator(7, "noise")
    assert text not in str(told.value)


@pytest.mark.parametrize("size", [0, 16, 64])
def test_a_file_that_holds_no_key_is_refused(size: int) -> None:
    """An empty one, of a disk that was full, would have been everybody's key."""
    path = seeds.home() / "secret.key"
    path.parent.mkdir()
    path.write_bytes(b"a" * size)
    with pytest.raises(ValueError, match=f"secret.key must hold 32 bytes, and holds {size}"):
        seeds.secret_bytes(7, "noise", run_id=5)


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
