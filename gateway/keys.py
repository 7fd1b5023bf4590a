"""Secrets: what a caller is given once, and what is kept of it.

    key           ty_<key id>_<43 characters>          256 random bits; shown once, to whoever made it
    digest        SHA-256 of the 256 bits              kept; enough to compare
    signing key   HKDF of the 256 bits                 kept sealed: a signature can only be checked with it

    Sealer        AES-256-GCM under the gateway's own key file

So a copy of the server's data alone opens nothing: digests cannot be turned back, and what is sealed needs the file.
256 random bits need no slow hash: there is nothing to guess.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET_BYTES = 32
_KEY = re.compile(r"ty_([a-z2-7]{16})_([A-Za-z0-9_-]{43})")
_KEY_ANYWHERE = re.compile(r"(ty_[a-z2-7]{16}_)[A-Za-z0-9_-]{43}")
_NONCE_BYTES = 12
_NO_DIGEST = b"\0" * 32


@dataclass(frozen=True, slots=True)
class Key:
    """A key as its owner holds it."""

    key_id: str
    secret: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """What the owner is given."""
        return f"ty_{self.key_id}_{base64.urlsafe_b64encode(self.secret).rstrip(b'=').decode()}"

    @property
    def digest(self) -> bytes:
        """What is kept."""
        return hashlib.sha256(self.secret).digest()

    @property
    def signing_key(self) -> bytes:
        """What the owner's requests are signed with; nobody gets back from it to the key."""
        return derived(self.secret, b"tuanyuan request signatures")


def new_key() -> Key:
    """A fresh one."""
    key_id = base64.b32encode(secrets.token_bytes(10)).decode().lower()
    return Key(key_id, secrets.token_bytes(SECRET_BYTES))


def parse_key(text: str) -> Key | None:
    """A key from its text; None if it is no key's."""
    match = _KEY.fullmatch(text)
    if match is None:
        return None
    secret = base64.urlsafe_b64decode(match[2] + "=")
    # 43 characters hold 258 bits: of the four spellings of one secret only one is its.
    key = Key(match[1], secret)
    return key if key.text == text else None


def matches(key: Key, digest: bytes | None) -> bool:
    """Whether this is the key whose digest is kept; in the same time whatever differs, also where nothing is kept."""
    same = hmac.compare_digest(key.digest, digest or _NO_DIGEST)
    return same and digest is not None


def masked(text: str) -> str:
    """Text that may be logged: keys in it without their secrets."""
    return _KEY_ANYWHERE.sub(r"\1***", text)


def derived(secret: bytes, purpose: bytes) -> bytes:
    """32 bytes for one purpose (HKDF-SHA256, RFC 5869)."""
    return HKDF(SHA256(), 32, None, purpose).derive(secret)


class SealBroken(Exception):
    """What was sealed cannot be opened: another key file, another purpose, or it was changed."""


class Sealer:
    """Seals under the gateway's own key file: one base64 line of 32 bytes; more lines are older keys, which still open.

    All gateways of a deployment have the same file. Whoever has the file and a copy of the server can read what is
    sealed: keep them apart in backups.
    """

    def __init__(self, keys: list[bytes]) -> None:
        """`keys`: the first seals, all open."""
        assert keys and all(len(key) == SECRET_BYTES for key in keys)
        self._keys = keys
        self._ciphers = [AESGCM(derived(key, b"tuanyuan seals")) for key in keys]

    @classmethod
    def read(cls, path: Path) -> Sealer:
        """From the key file; one that is not there yet is made, readable for its owner only.

        Raises ValueError for a file that holds something else; OSError.
        """
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(base64.b64encode(secrets.token_bytes(SECRET_BYTES)) + b"\n")
                file.flush()
                os.fsync(descriptor)
            try:
                os.link(draft, path)  # of two that start at once, one makes the file
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        if path.stat().st_mode & 0o077:
            raise ValueError(f"the key file {path} must be for its owner alone: chmod 600 {path}")
        keys = []
        for number, line in enumerate(path.read_bytes().split(), 1):
            try:
                key = base64.b64decode(line, validate=True)
            except binascii.Error:
                key = b""
            if len(key) != SECRET_BYTES:
                raise ValueError(f"line {number} of the key file {path} must be 32 bytes in base64")
            keys.append(key)
        if not keys:
            raise ValueError(f"the key file {path} must hold a key: 32 bytes in base64, one a line")
        return cls(keys)

    def seal(self, plain: bytes, purpose: str) -> bytes:
        """`purpose`: what it is and whose; only who names the same can open it."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._ciphers[0].encrypt(nonce, plain, purpose.encode())

    def open(self, sealed: bytes, purpose: str) -> bytes:
        """What was sealed for this purpose. Raises SealBroken."""
        nonce, text = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        for cipher in self._ciphers:
            try:
                return cipher.decrypt(nonce, text, purpose.encode())
            except (InvalidTag, ValueError):
                continue
        raise SealBroken(f"what is sealed for {purpose!r} does not open with this gateway's key file")

    def keys_for(self, purpose: bytes) -> list[bytes]:
        """32 bytes for another use of the same file, of each key in it, the first for what is new."""
        return [derived(key, purpose) for key in self._keys]
