"""What partners encode is what the wire reads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from flows import wire_kernels as kernels
from flows.ping_payload import common_width, ping_payload
from flows.wire import decode_pings, encode_pings
from geoindex.columns import pack_ids
from tests.flows.test_wire import assert_same_pings, pings


@pytest.mark.parametrize("ids", [[], ["a"], ["ab", "cd"], ["ab", "c"], ["a", "bc", "d"], ["", "a"], ["手机", "abcdef"]])
def test_plain_width_is_the_kernels(ids: list[str]) -> None:
    _, id_end = pack_ids(ids)
    assert common_width(id_end) == kernels.common_width(id_end)


@pytest.mark.parametrize("ids", [["phone-1", "phone-2"], ["phone-9", "phone-10"]])
def test_payload_of_the_plain_encoder_is_the_wires(ids: list[str]) -> None:
    batch = pings(ids)
    payload = ping_payload(batch, common_width(batch.id_end))
    assert payload == encode_pings(batch)
    assert_same_pings(decode_pings(payload), batch)
    assert np.frombuffer(payload, np.uint8).size > len(ids) * 18


def test_encoder_loads_no_compiler() -> None:
    code = (
        "import sys, flows.ping_payload; print([name for name in ('numba', 'redis', 'fastapi') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
