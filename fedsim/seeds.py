"""Two random streams that never meet.

*Public*: everything a simulation repeats from the scenario's one seed (cohort, partition, batches,
initial model, the attack's own start).  *Secret*: noise and masks of the defenses.  Every use of
either is a generator of its own, derived by hashing the names of what it is for, so that no order
of calls, no engine and no number of workers changes it.

The secret stream is keyed by 32 bytes that live outside the scenario: ``$FEDSIM_HOME/secret.key``,
made on first use, and the run's id, so that no two runs share noise that a server could subtract.
Whoever knows every public seed can still not subtract it.  What clients draw hangs on their process
as well (:func:`of_this_process`).  A run that is to repeat, noise and all, names the key itself:
under one ``FEDSIM_SECRET_KEY`` (64 hex digits) all runs draw alike.  A SuperNode of a deployed
cluster sets ``secret='entropy'`` in its node config and draws each message's under a key of the
operating system's (:func:`fresh_key`).
"""

import hashlib
import hmac
import os
import random
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

# Of torch's Mersenne Twister: its words, and where they begin in ``Generator.get_state()``.
_WORDS, _STATE = 624, 24
_KEY = 32  # bytes of the secret key


def home() -> Path:
    """Return ``$FEDSIM_HOME`` (default ``~/fedsim``)."""
    return Path(os.environ.get("FEDSIM_HOME", "~/fedsim")).expanduser().absolute()


def derive(seed: int, *names: object) -> int:
    """Return a 63-bit seed for one named use of a public seed."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator for one named use of a public seed."""
    return torch.Generator().manual_seed(derive(seed, *names))


def secret_key() -> bytes:
    """Return this machine's 32 secret bytes, made (mode 0600) on first use.

    Raises
    ------
    ValueError
        If the variable or the file holds no such key: all noise and masks would hang on it.
    """
    sys.audit("fedsim.private", "the secret stream")
    if text := os.environ.get("FEDSIM_SECRET_KEY"):
        if not re.fullmatch(f"[0-9a-fA-F]{{{2 * _KEY}}}", text):
            raise ValueError(
                f"FEDSIM_SECRET_KEY must be {2 * _KEY} hexadecimal digits, as openssl rand -hex "
                f"{_KEY} prints; this has {len(text)} characters, or others among them"
            )
        return bytes.fromhex(text)
    path = home() / "secret.key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"secret.key.{secrets.token_hex(8)}")
        partial.touch(mode=0o600)
        partial.write_bytes(secrets.token_bytes(_KEY))
        try:
            os.link(partial, path)  # fails where another process was first: then its key stands
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    if len(key := path.read_bytes()) != _KEY:
        raise ValueError(
            f"{path} must hold {_KEY} bytes, and holds {len(key)}: it was cut off, or is another "
            "file; remove it, and a new key is made"
        )
    return key


def fresh_key() -> bytes:
    """Return a key of the operating system's own, to draw under instead of this machine's."""
    return secrets.token_bytes(_KEY)


def secret_generator(
    seed: int, *names: object, run_id: int = 0, key: bytes | None = None
) -> torch.Generator:
    """Return a CPU generator of the secret stream, of one run's; ``key`` as for secret bytes.

    Its whole state is secret.  It is torch's Mersenne Twister: nobody can guess it, and it is still
    no cipher: whoever read enough of its raw numbers could go on with them.
    """
    found = secret_bytes(seed, *names, run_id=run_id, key=key)
    return _generator_of(hashlib.shake_256(found).digest(4 * _WORDS))


def secret_bytes(seed: int, *names: object, run_id: int = 0, key: bytes | None = None) -> bytes:
    """Return 32 bytes for one named use of the secret stream: a key, say.

    ``run_id`` counts unless ``FEDSIM_SECRET_KEY`` asks for a run that repeats; 0 is of no run.
    ``key`` stands in for this machine's: nothing repeats under one of :func:`fresh_key`, but what
    is drawn under that same one.
    """
    own = 0 if os.environ.get("FEDSIM_SECRET_KEY") else run_id
    text = "/".join([str(seed), *([f"run {own}"] if own else []), *map(str, names)])
    return hmac.new(secret_key() if key is None else key, text.encode(), hashlib.sha256).digest()


def of_this_process() -> str:
    """Return a word that no other process has, a name for its uses of the secret stream.

    A SuperNode that is started anew has lost its count of what it was asked (unless its node config
    has ``state='...'``), and asked for the same round again it must not draw the same noise.  Empty
    under ``FEDSIM_SECRET_KEY``, which asks for runs that repeat.
    """
    return "" if os.environ.get("FEDSIM_SECRET_KEY") else _nonce(os.getpid())


@lru_cache(maxsize=1)
def _nonce(_: int) -> str:
    return secrets.token_hex(16)


def _generator_of(content: bytes) -> torch.Generator:
    """Return a generator whose state is these bytes: of a seed ``manual_seed`` keeps 32 bits."""
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    words = torch.frombuffer(bytearray(content), dtype=torch.uint32).to(torch.int64)
    state[_STATE : _STATE + 8 * _WORDS] = words.view(torch.uint8)
    return generator.set_state(state)


@contextmanager
def seeded_globals(seed: int | torch.Generator) -> Iterator[None]:
    """Seed ``random``, ``numpy.random`` and torch's generators, and put them back afterwards.

    A generator hands over as much of its state as each of them holds: CUDA's take 63 bits.  Those
    are put back where CUDA was in use before.

    Only for library code that takes no generator: Flower samples nodes with ``random`` and rounds
    SecAgg+ with ``numpy.random``; ``torch.nn`` initializes from the global generator.
    """
    import numpy as np

    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=list(devices)):
            if isinstance(seed, torch.Generator):
                words = torch.randint(2**32, (_WORDS,), generator=seed)
                random.seed(words.numpy().tobytes())
                np.random.seed(words.numpy().astype(np.uint32))
                seed_there = hashlib.sha256(b"cuda" + words.numpy().tobytes()).digest()
                torch.cuda.manual_seed_all(int.from_bytes(seed_there[:8], "big") >> 1)
                torch.set_rng_state(seed.get_state())
            else:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
