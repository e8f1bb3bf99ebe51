"""The auditor's lock: anybody can put something in, only the auditor can take it out.

A client seals its deposits to the auditor's public key: an ephemeral X25519 exchange, HKDF-SHA256,
ChaCha20-Poly1305.  So a vault file tells a reader without the key nothing but its size, whatever
library the reader opens it with, and a file that was changed or moved does not open at all.

The private key is ``$FEDSIM_HOME/auditor.key`` (or the file ``FEDSIM_AUDITOR_KEY_FILE`` names),
made on first use, outside every run folder.  A machine that only hosts clients needs no more than
the public key: ``FEDSIM_AUDITOR_PUBLIC_KEY`` (hex) or ``$FEDSIM_HOME/auditor.pub``.
"""

import os
import secrets
import sys
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsim import seeds
from fedsim.errors import RunFailed

MAGIC = b"fedsim-vault/1\n"
_KEY = 32


def key_path() -> Path:
    """Return where this machine's auditor keeps the private key (it need not exist)."""
    named = os.environ.get("FEDSIM_AUDITOR_KEY_FILE")
    return Path(named).expanduser().absolute() if named else seeds.home() / "auditor.key"


def private_key() -> bytes:
    """Return the auditor's 32 private bytes, made (mode 0600) on first use.

    Raises
    ------
    RunFailed
        If the key file does not hold a key.
    """
    sys.audit("fedsim.private", "the auditor's key")
    path = key_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _create(path, secrets.token_bytes(_KEY))
        _create(path.with_suffix(".pub"), (_public(path.read_bytes()).hex() + "\n").encode())
    key = path.read_bytes()
    if len(key) != _KEY:
        raise RunFailed(f"{path} does not hold an auditor's key ({_KEY} bytes); move it away")
    return key


def public_key() -> bytes:
    """Return the 32 bytes that clients seal to; the pair is made where there is neither.

    Raises
    ------
    RunFailed
        If what is configured is not a public key.
    """
    text = os.environ.get("FEDSIM_AUDITOR_PUBLIC_KEY", "")
    beside = key_path().with_suffix(".pub")
    if not text and beside.exists():
        text = beside.read_text()
    if not text:
        return _public(private_key())
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != _KEY:
        raise RunFailed(
            f"the auditor's public key is {2 * _KEY} hex digits, in FEDSIM_AUDITOR_PUBLIC_KEY or "
            f"{beside}"
        )
    return key


def seal(content: bytes, place: str, public: bytes) -> bytes:
    """Encrypt ``content`` to a public key; it opens only at ``place`` (a name, not a secret)."""
    ephemeral = X25519PrivateKey.generate()
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
    sender = ephemeral.public_key().public_bytes_raw()
    cipher = ChaCha20Poly1305(_content_key(shared, sender + public))
    # The content key is used once, so the nonce may be constant.
    return MAGIC + sender + cipher.encrypt(bytes(12), content, place.encode())


def unseal(sealed: bytes, place: str, private: bytes) -> bytes:
    """Decrypt what was sealed for ``place``.

    Raises
    ------
    RunFailed
        If it was changed, moved, or sealed to another auditor.
    """
    head, sender, body = sealed[: len(MAGIC)], sealed[len(MAGIC) :][:_KEY], sealed[len(MAGIC) :]
    try:
        if head != MAGIC:
            raise ValueError(head)
        key = X25519PrivateKey.from_private_bytes(private)
        shared = key.exchange(X25519PublicKey.from_public_bytes(sender))
        cipher = ChaCha20Poly1305(_content_key(shared, sender + _public(private)))
        return cipher.decrypt(bytes(12), body[_KEY:], place.encode())
    except (InvalidTag, ValueError):
        raise RunFailed(
            f"vault file {place} does not open: it was changed, or sealed to another auditor's key "
            f"than {key_path()}"
        ) from None


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _content_key(shared: bytes, context: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=MAGIC + context).derive(shared)


def _create(path: Path, content: bytes) -> None:
    """Write a private file whole, unless another process was first: then its content stands."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.touch(mode=0o600)
    try:
        partial.write_bytes(content)
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink()
