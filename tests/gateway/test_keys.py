"""Secrets: their text, what is kept of them, what is sealed."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest

from gateway.keys import Key, SealBroken, Sealer, derived, masked, matches, new_key, parse_key

KNOWN = Key("abcdefghijklmnop", bytes(range(32)))
KNOWN_TEXT = "ty_abcdefghijklmnop_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"


def test_a_key_is_written_as_its_id_and_43_characters() -> None:
    assert KNOWN.text == KNOWN_TEXT
    assert parse_key(KNOWN_TEXT) == KNOWN


def test_keys_are_256_fresh_bits() -> None:
    keys = [new_key() for _ in range(100)]
    assert len({key.secret for key in keys}) == len({key.key_id for key in keys}) == 100
    assert {len(key.secret) for key in keys} == {32}
    assert [parse_key(key.text) for key in keys] == keys


@pytest.mark.parametrize(
    "text",
    [
        "",
        KNOWN_TEXT[:-1],
        KNOWN_TEXT + "A",
        KNOWN_TEXT + "\n",
        KNOWN_TEXT.replace("ty_", "TY_"),
        KNOWN_TEXT.replace("abc", "ABC"),
        KNOWN_TEXT[:-1] + "9",  # the same 32 bytes: its last character holds two bits too many
        KNOWN_TEXT[:-1] + "é",
    ],
)
def test_a_text_that_is_no_key_is_none(text: str) -> None:
    assert parse_key(text) is None


def test_only_the_key_matches_what_is_kept_of_it() -> None:
    assert KNOWN.digest == hashlib.sha256(bytes(range(32))).digest()
    assert matches(KNOWN, KNOWN.digest)
    assert not matches(new_key(), KNOWN.digest)
    assert not matches(KNOWN, None)


def test_the_signing_key_is_neither_the_secret_nor_its_digest() -> None:
    assert len({KNOWN.secret, KNOWN.digest, KNOWN.signing_key}) == 3
    # RFC 5869 without a salt: extract with 32 zero bytes, then one block of expand.
    extracted = hmac.digest(bytes(32), KNOWN.secret, "sha256")
    assert hmac.digest(extracted, b"tuanyuan request signatures\x01", "sha256") == KNOWN.signing_key


def test_a_key_in_a_text_that_is_logged_loses_its_secret() -> None:
    assert masked(f"refused {KNOWN_TEXT}, twice") == "refused ty_abcdefghijklmnop_***, twice"
    assert "AAECAwQ" not in repr(KNOWN)


def test_what_is_sealed_opens_for_the_same_purpose_and_key_alone(tmp_path: Path) -> None:
    sealer = Sealer.read(tmp_path / "gateway.key")
    sealed = sealer.seal(b"secret", "webhook of amap")
    assert b"secret" not in sealed
    assert sealed != sealer.seal(b"secret", "webhook of amap")
    assert sealer.open(sealed, "webhook of amap") == b"secret"
    for other, purpose, text in (
        (sealer, "webhook of baidu", sealed),
        (Sealer.read(tmp_path / "other.key"), "webhook of amap", sealed),
        (sealer, "webhook of amap", sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (sealer, "webhook of amap", b"short"),
    ):
        with pytest.raises(SealBroken, match="does not open"):
            other.open(text, purpose)


def test_a_key_file_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gateway.key"
    sealed = Sealer.read(path).seal(b"x", "y")
    assert path.stat().st_mode & 0o777 == 0o600
    assert Sealer.read(path).open(sealed, "y") == b"x"
    assert [file.name for file in path.parent.iterdir()] == ["gateway.key"]


def test_an_older_key_in_the_file_still_opens(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    sealed = Sealer.read(old).seal(b"x", "y")
    Sealer.read(new)
    new.write_bytes(new.read_bytes() + old.read_bytes())
    both = Sealer.read(new)
    assert both.open(sealed, "y") == b"x"
    with pytest.raises(SealBroken):
        Sealer.read(old).open(both.seal(b"x", "y"), "y")


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"", "must hold a key"), (b"AAAA\n", "line 1 of the key file"), (b"\xff\xfe", "must be 32 bytes in base64")],
)
def test_a_key_file_that_holds_something_else_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "gateway.key"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(ValueError, match=words):
        Sealer.read(path)


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gateway.key"
    Sealer.read(path)
    path.chmod(0o640)
    with pytest.raises(ValueError, match="for its owner alone: chmod 600"):
        Sealer.read(path)


def test_one_secret_gives_another_key_for_every_purpose() -> None:
    assert derived(b"s" * 32, b"a") != derived(b"s" * 32, b"b")
