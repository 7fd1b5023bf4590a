"""The settings of a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.config import FlowConfig, parse_shards


def test_defaults_are_an_embedded_server_and_all_shards() -> None:
    config = FlowConfig.read({})
    assert config.valkey is None
    assert config.embedded_directory == Path("var/valkey")
    assert config.shard_list(4) == [0, 1, 2, 3]


def test_environment_is_read_and_options_win() -> None:
    environment = {"TUANYUAN_VALKEY": "redis://a", "TUANYUAN_SHARDS": "0-1", "TUANYUAN_UNSAFE_SERVER": "yes"}
    config = FlowConfig.read(environment, shards="2", valkey=None)
    assert (config.valkey, config.shards, config.unsafe_server) == ("redis://a", "2", True)


def test_empty_variable_is_none_at_all() -> None:
    assert FlowConfig.read({"TUANYUAN_VALKEY": "", "TUANYUAN_IDLE_WAIT_MS": ""}) == FlowConfig()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("TUANYUAN_UNSAFE_SERVER", "maybe", "TUANYUAN_UNSAFE_SERVER: must be yes or no, got 'maybe'"),
        ("TUANYUAN_IN_FLIGHT_MAX", "many", "TUANYUAN_IN_FLIGHT_MAX: must be a whole number, got 'many'"),
        ("TUANYUAN_IN_FLIGHT_MAX", "0", "in_flight_max must be from 1 to 65536, got 0"),
        ("TUANYUAN_VALKEY", "http://x", "a server's url must begin with"),
        ("TUANYUAN_SHARDS", "3-1", "a range of shards must rise, got '3-1'"),
    ],
)
def test_faulty_variable_is_refused_by_name(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        FlowConfig.read({name: text})
    assert message in str(caught.value)


def test_settings_of_the_embedded_server_do_not_go_with_another() -> None:
    with pytest.raises(ValueError, match="they cannot go with valkey"):
        FlowConfig(valkey="redis://a", memory_mb=100)


def test_password_is_masked() -> None:
    config = FlowConfig(valkey="redis://user:secret@host")
    assert "secret" not in repr(config)
    assert "secret" not in str(config)
    assert "redis://user:***@host" in repr(config)


@pytest.mark.parametrize(
    ("text", "shards"), [("0", [0]), ("0-3,7", [0, 1, 2, 3, 7]), ("7, 0-1", [0, 1, 7]), ("5-5", [5])]
)
def test_shards_are_ranges(text: str, shards: list[int]) -> None:
    assert parse_shards(text, 8) == shards


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "shards must be numbers and ranges like 0-3,7, got ''"),
        ("a", "shards must be numbers and ranges like 0-3,7, got 'a'"),
        ("1-", "shards must be numbers and ranges like 0-3,7, got '1-'"),
        ("-1", "shards must be numbers and ranges like 0-3,7, got '-1'"),
        ("1,,2", "shards must be numbers and ranges like 0-3,7, got '1,,2'"),
        ("²", "shards must be numbers and ranges like 0-3,7, got '²'"),
        ("0-8", "shards must be below 8, got '0-8'"),
        ("1,0-2", "shards must be named once, got '1,0-2'"),
    ],
)
def test_faulty_shards_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="shards must") as caught:
        parse_shards(text, 8)
    assert str(caught.value) == message


def test_shard_beyond_the_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="shards must be below 8, got '9'"):
        FlowConfig(shards="9").shard_list(8)
