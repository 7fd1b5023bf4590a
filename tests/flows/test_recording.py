"""Recorded pings as people keep them: what a reader makes of every kind of CSV that turns up."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from flows.recording import DEFAULT_PARTNER, EXAMPLES_PER_REASON, PingReader, RecordedPings, UnreadableFile

T0 = 1_700_000_000_000
"""2023-11-14 22:13:20 UTC."""
HEADER = "device_id,lat,lng,observed_at\n"


def write(folder: Path, text: str | bytes, name: str = "pings.csv") -> Path:
    path = folder / name
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(path: Path, chunk_rows: int = 1000) -> tuple[RecordedPings | None, PingReader]:
    """All chunks as one, None if there are none."""
    reader = PingReader(path, chunk_rows)
    pings: RecordedPings | None = None
    for chunk in reader.chunks():
        pings = chunk if pings is None else pings.followed_by(chunk)
    return pings, reader


def read_ids(path: Path, chunk_rows: int = 1000) -> tuple[list[str], PingReader]:
    pings, reader = read(path, chunk_rows)
    return [] if pings is None else pings.ids, reader


def one_ping(folder: Path, text: str | bytes, name: str = "pings.csv") -> RecordedPings:
    pings, reader = read(write(folder, text, name))
    assert reader.set_aside.counts == {}
    assert pings is not None
    assert len(pings) == 1
    return pings


# ---- what a file may look like


def test_a_row_becomes_columns(tmp_path: Path) -> None:
    pings = one_ping(tmp_path, f"{HEADER}phone-1,30.5,-114.25,{T0}\n")
    assert (pings.partners, pings.ids, pings.lines) == ([DEFAULT_PARTNER], ["phone-1"], [2])
    assert (pings.lat.tolist(), pings.lng.tolist()) == ([30.5], [-114.25])
    assert pings.observed_at_ms.tolist() == [T0]
    assert pings.at_ms is None


def test_partner_and_at_are_read_where_the_file_has_them(tmp_path: Path) -> None:
    pings = one_ping(tmp_path, f"device_id,lat,lng,observed_at,partner,at\na,1,2,{T0},amap,{T0 + 5}\n")
    assert pings.partners == ["amap"]
    assert pings.at_ms is not None
    assert pings.at_ms.tolist() == [T0 + 5]


def test_columns_may_come_in_any_order_among_others(tmp_path: Path) -> None:
    text = f"speed,lng,at,observed_at,remark,partner,lat,device_id\n9,2,{T0 + 1},{T0},x,amap,1,a\n"
    pings = one_ping(tmp_path, text)
    assert (pings.ids, pings.partners, pings.lat.tolist(), pings.lng.tolist()) == (["a"], ["amap"], [1.0], [2.0])
    assert pings.observed_at_ms.tolist() == [T0]


def test_spaces_around_column_names_and_numbers_do_not_matter(tmp_path: Path) -> None:
    pings = one_ping(tmp_path, f"device_id, lat, lng, observed_at\na, 1.5, 2.5, {T0}\n")
    assert (pings.lat.tolist(), pings.lng.tolist(), pings.observed_at_ms.tolist()) == ([1.5], [2.5], [T0])


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    assert one_ping(tmp_path, b"\xef\xbb\xbf" + f"{HEADER}a,1,2,{T0}\n".encode()).ids == ["a"]


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    text = f"{HEADER}a,1,2,{T0}\nb,1,2,{T0}\n".replace("\n", "\r\n")
    pings, reader = read(write(tmp_path, text))
    assert pings is not None
    assert (pings.ids, pings.lines, reader.set_aside.counts) == (["a", "b"], [2, 3], {})


def test_the_last_line_may_lack_its_end(tmp_path: Path) -> None:
    assert one_ping(tmp_path, f"{HEADER}a,1,2,{T0}").ids == ["a"]


def test_blank_lines_are_passed_over_and_counted_as_lines(tmp_path: Path) -> None:
    pings, reader = read(write(tmp_path, f"{HEADER}\n\na,1,2,{T0}\n\nb,1,2,{T0}\n\n"))
    assert pings is not None
    assert (pings.ids, pings.lines, reader.set_aside.counts) == (["a", "b"], [4, 6], {})


def test_quoted_fields_may_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    text = f'{HEADER}"a,b",1,2,{T0}\n"say ""hi""",1,2,{T0}\n"two\nlines",1,2,"{T0}"\nplain,"1","2",{T0}\n'
    ids, reader = read_ids(write(tmp_path, text))
    assert ids == ["a,b", 'say "hi"', "two\nlines", "plain"]
    assert reader.set_aside.counts == {}


def test_a_row_after_one_of_two_lines_is_still_named_by_its_own_line(tmp_path: Path) -> None:
    _, reader = read(write(tmp_path, f'{HEADER}"two\nlines",1,2,{T0}\nb,north,2,{T0}\n'))
    assert reader.set_aside.examples == [
        f"{tmp_path}/pings.csv:4: latitude must be a number from -90 to 90, got 'north'"
    ]


def test_a_gzip_file_is_read_like_a_plain_one(tmp_path: Path) -> None:
    text = f"{HEADER}a,1,2,{T0}\nb,north,2,{T0}\nc,1,2,{T0}\n"
    plain, plain_reader = read(write(tmp_path, text))
    packed, packed_reader = read(write(tmp_path, text, "pings.csv.gz"))
    assert plain is not None
    assert packed is not None
    assert (plain.ids, plain.lines) == (packed.ids, packed.lines) == (["a", "c"], [2, 4])
    assert plain_reader.set_aside.counts == packed_reader.set_aside.counts


def test_gzip_files_that_were_joined_are_read_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "pings.csv.gz"
    path.write_bytes(gzip.compress(f"{HEADER}a,1,2,{T0}\n".encode()) + gzip.compress(f"b,1,2,{T0}\n".encode()))
    assert read_ids(path)[0] == ["a", "b"]


@pytest.mark.parametrize("name", ["pings.csv", "pings.csv.gz"])
def test_a_file_with_nothing_but_a_header_has_no_pings(name: str, tmp_path: Path) -> None:
    for text in (HEADER, HEADER.strip(), f"{HEADER}\n\n"):
        ids, reader = read_ids(write(tmp_path, text, name))
        assert (ids, reader.set_aside.counts) == ([], {})


def test_ids_of_any_script_are_kept_byte_for_byte(tmp_path: Path) -> None:
    ids = ["团圆", "📱" * 16, "caf\u00e9", "cafe\u0301", " a ", "a b", "x" * 64]
    text = HEADER + "".join(f"{device_id},1,2,{T0}\n" for device_id in ids)
    assert read_ids(write(tmp_path, text))[0] == ids


def test_a_nul_byte_is_a_character_like_others_and_spoils_no_other_row(tmp_path: Path) -> None:
    text = f"{HEADER}a\0b,1,2,{T0}\nc,1\0,2,{T0}\nd,1,2,{T0}\n"
    ids, reader = read_ids(write(tmp_path, text))
    assert ids == ["a\0b", "d"]
    assert reader.set_aside.counts == {"latitude": 1}


# ---- times


@pytest.mark.parametrize(
    ("text", "time_ms"),
    [
        (str(T0), T0),
        ("0", 0),
        (f" {T0} ", T0),
        ("2023-11-14T22:13:20Z", T0),
        ("2023-11-14T22:13:20", T0),
        ("2023-11-14 22:13:20", T0),
        ("2023-11-14T22:13:20.123Z", T0 + 123),
        ("2023-11-14T22:13:20.123999", T0 + 123),
        ("2023-11-15T06:13:20+08:00", T0),
        ("2023-11-14T14:13:20-0800", T0),
        ("20231114T221320Z", T0),
        ("2023-11-14", T0 - (22 * 3600 + 13 * 60 + 20) * 1000),
    ],
)
def test_a_time_is_epoch_milliseconds_or_iso_8601_and_utc_without_an_offset(
    text: str, time_ms: int, tmp_path: Path
) -> None:
    assert one_ping(tmp_path, f"{HEADER}a,1,2,{text}\n").observed_at_ms.tolist() == [time_ms]


@pytest.mark.parametrize(
    "text", ["", "noon", "2023-02-30T00:00:00Z", "1.7e12", "1_700_000_000_000", "٣", "-1", "9" * 15, "9" * 30]
)
def test_what_is_no_time_is_set_aside(text: str, tmp_path: Path) -> None:
    ids, reader = read_ids(write(tmp_path, f"{HEADER}a,1,2,{text}\nb,1,2,{T0}\n"))
    assert (ids, reader.set_aside.counts) == (["b"], {"observed_at": 1})
    assert reader.set_aside.examples[0].startswith(f"{tmp_path}/pings.csv:2: observed_at must ")


def test_a_bad_arrival_time_is_set_aside_under_its_own_name(tmp_path: Path) -> None:
    ids, reader = read_ids(write(tmp_path, f"device_id,lat,lng,observed_at,at\na,1,2,{T0},soon\nb,1,2,{T0},{T0}\n"))
    assert (ids, reader.set_aside.counts) == (["b"], {"at": 1})
    assert reader.set_aside.examples == [
        f"{tmp_path}/pings.csv:2: at must be ms since 1970 or an ISO 8601 time, got 'soon'"
    ]


# ---- places


@pytest.mark.parametrize("text", ["90", "-90", "+0.5", "-0", "1e1", ".5", "89.9999999"])
def test_a_latitude_may_be_written_as_any_decimal_number(text: str, tmp_path: Path) -> None:
    assert one_ping(tmp_path, f"{HEADER}a,{text},2,{T0}\n").lat.tolist() == [float(text)]


@pytest.mark.parametrize("column", ["latitude", "longitude"])
@pytest.mark.parametrize("text", ["", "north", "nan", "inf", "-Infinity", "3_0", "0x10", "1e3", "180.0000001", "1,5"])
def test_what_is_no_coordinate_is_set_aside(text: str, column: str, tmp_path: Path) -> None:
    quoted = f'"{text}"'
    row = f"a,{quoted},2" if column == "latitude" else f"a,1,{quoted}"
    ids, reader = read_ids(write(tmp_path, f"{HEADER}{row},{T0}\nb,1,2,{T0}\n"))
    assert (ids, reader.set_aside.counts) == (["b"], {column: 1})
    limit = 90 if column == "latitude" else 180
    assert reader.set_aside.examples == [
        f"{tmp_path}/pings.csv:2: {column} must be a number from -{limit} to {limit}, got {text!r}"
    ]


def test_a_row_with_several_faults_is_counted_once(tmp_path: Path) -> None:
    _, reader = read(write(tmp_path, f"{HEADER},north,east,noon\nb,1,2,{T0}\n"))
    assert reader.set_aside.counts == {"id_length": 1}


# ---- ids and partners


@pytest.mark.parametrize(
    ("device_id", "reason", "words"),
    [
        ("", "id_length", "device_id must be 1 to 64 bytes, got 0"),
        ("x" * 65, "id_length", "device_id must be 1 to 64 bytes, got 65"),
        ("号" * 22, "id_length", "device_id must be 1 to 64 bytes, got 66"),
        (b"a\xff", "id_utf8", r"device_id must be UTF-8, got b'a\xff'"),
    ],
)
def test_an_id_that_no_log_takes_is_set_aside(device_id: str | bytes, reason: str, words: str, tmp_path: Path) -> None:
    raw = device_id if isinstance(device_id, bytes) else device_id.encode()
    ids, reader = read_ids(write(tmp_path, HEADER.encode() + raw + f",1,2,{T0}\nb,1,2,{T0}\n".encode()))
    assert (ids, reader.set_aside.counts) == (["b"], {reason: 1})
    assert reader.set_aside.examples == [f"{tmp_path}/pings.csv:2: {words}"]


def test_bad_partner_names_are_set_aside_row_by_row(tmp_path: Path) -> None:
    names: list[bytes] = [b"amap", b"", b"x" * 64, b"x" * 65, b"\xff", "高德".encode(), b""]
    rows = [b"%d,1,2,%d,%b\n" % (number, T0, name) for number, name in enumerate(names)]
    pings, reader = read(write(tmp_path, b"device_id,lat,lng,observed_at,partner\n" + b"".join(rows)))
    assert pings is not None
    assert (pings.ids, pings.partners) == (["0", "2", "5"], ["amap", "x" * 64, "高德"])
    assert reader.set_aside.counts == {"partner": 4}
    assert sorted(reader.set_aside.examples) == [
        f"{tmp_path}/pings.csv:3: partner must be 1 to 64 bytes, got 0",
        f"{tmp_path}/pings.csv:5: partner must be 1 to 64 bytes, got 65",
        rf"{tmp_path}/pings.csv:6: partner must be UTF-8, got b'\xff'",
        f"{tmp_path}/pings.csv:8: partner must be 1 to 64 bytes, got 0",
    ]


# ---- rows that are none


def test_rows_with_too_few_or_too_many_fields_are_set_aside(tmp_path: Path) -> None:
    ids, reader = read_ids(write(tmp_path, f"{HEADER}a,1,2\nb,1,2,{T0}\nc,1,2,{T0},more\n,\n"))
    assert (ids, reader.set_aside.counts) == (["b"], {"columns": 3})
    assert reader.set_aside.examples == [
        f"{tmp_path}/pings.csv:2: must have 4 fields as the header, got 3",
        f"{tmp_path}/pings.csv:4: must have 4 fields as the header, got 5",
        f"{tmp_path}/pings.csv:5: must have 4 fields as the header, got 2",
    ]


def test_a_huge_line_is_set_aside_and_the_next_one_read(tmp_path: Path) -> None:
    ids, reader = read_ids(write(tmp_path, f"{HEADER}a,1,2,{T0}\n{'x' * 3_000_000},1,2,{T0}\nb,1,2,{T0}\n"))
    assert (ids, reader.set_aside.counts) == (["a", "b"], {"columns": 1})
    assert reader.set_aside.examples == [
        f"{tmp_path}/pings.csv:3: not a CSV row: field larger than field limit (131072)"
    ]


def test_a_huge_number_of_fields_is_set_aside_and_the_next_row_read(tmp_path: Path) -> None:
    ids, reader = read_ids(write(tmp_path, f"{HEADER}{',' * 500_000}\nb,1,2,{T0}\n"))
    assert (ids, reader.set_aside.counts) == (["b"], {"columns": 1})


def test_bytes_of_another_encoding_spoil_only_their_own_row(tmp_path: Path) -> None:
    ids, reader = read_ids(
        write(tmp_path, HEADER.encode() + "手机,1,2,1\n".encode("gb18030") + f"b,1,2,{T0}\n".encode())
    )
    assert (ids, reader.set_aside.counts) == (["b"], {"id_utf8": 1})


def test_each_reason_is_counted_in_full_and_shown_a_few_times(tmp_path: Path) -> None:
    rows = "".join(f"a,{91 + number},2,{T0}\n" for number in range(40)) + f"b,1,181,{T0}\nc,1,2,{T0}\n"
    ids, reader = read_ids(write(tmp_path, HEADER + rows), chunk_rows=7)
    assert (ids, reader.set_aside.counts) == (["c"], {"latitude": 40, "longitude": 1})
    shown = [f"{tmp_path}/pings.csv:{line}: latitude" for line in range(2, 2 + EXAMPLES_PER_REASON)]
    shown.append(f"{tmp_path}/pings.csv:42: longitude")
    assert [example.partition(" must")[0] for example in reader.set_aside.examples] == shown


# ---- files that are none


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "missing device_id, lat, lng, observed_at, got ''"),
        (b"\n", "missing device_id, lat, lng, observed_at, got ''"),
        (b"a,1,2,1700000000000\n", "missing device_id, lat, lng, observed_at, got 'a,1,2,1700000000000'"),
        (b"device_id;lat;lng;observed_at\n", "got 'device_id;lat;lng;observed_at'"),
        (b"device_id,LAT,lng,observed_at\n", "missing lat, got 'device_id,LAT,lng,observed_at'"),
    ],
)
def test_a_file_without_the_header_is_refused_with_what_was_found(text: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile) as refusal:
        read(write(tmp_path, text))
    assert str(refusal.value).startswith(f"{tmp_path}/pings.csv:1: the first line must name the columns device_id, ")
    assert str(refusal.value).endswith(words)


def test_a_header_of_a_million_columns_gets_a_short_answer(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile) as refusal:
        read(write(tmp_path, "x," * 1_000_000))
    assert len(str(refusal.value)) < 600


def test_a_header_that_is_no_csv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"pings\.csv:1: field larger than field limit"):
        read(write(tmp_path, "x" * 200_000))


def test_a_plain_file_named_gz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pings.csv.gz"
    path.write_text(f"{HEADER}a,1,2,{T0}\n")
    with pytest.raises(UnreadableFile, match=r"pings\.csv\.gz:1: Not a gzipped file"):
        read(path)


def test_a_gzip_file_that_ends_early_is_refused_after_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "pings.csv.gz"
    rows = HEADER + "".join(f"a{number * number},1,2,{T0 + number}\n" for number in range(20_000))
    path.write_bytes(gzip.compress(rows.encode())[:-2000])
    with pytest.raises(UnreadableFile, match=r"pings\.csv\.gz: after line 1\d{4}: Compressed file ended"):
        read(path)


# ---- chunks, batches, progress


def test_chunks_hold_the_file_in_order_whatever_their_size(tmp_path: Path) -> None:
    rows = "".join(f"{'bad' if number % 7 == 0 else number},{'x' if number % 7 == 0 else 1},2,{T0 + number}\n"
                   for number in range(100))  # fmt: skip
    path = write(tmp_path, HEADER + rows)
    whole, whole_reader = read(path, 1000)
    assert whole is not None
    for chunk_rows in (1, 2, 7, 99, 100):
        cut, reader = read(path, chunk_rows)
        assert cut is not None
        assert (cut.ids, cut.lines, cut.partners) == (whole.ids, whole.lines, whole.partners)
        assert np.array_equal(cut.observed_at_ms, whole.observed_at_ms)
        assert reader.set_aside == whole_reader.set_aside
        assert all(0 < len(chunk) <= chunk_rows or chunk_rows == 1 for chunk in PingReader(path, chunk_rows).chunks())


def test_a_batch_holds_the_rows_asked_for_in_whole_units(tmp_path: Path) -> None:
    text = (
        "device_id,lat,lng,observed_at,partner\n"
        f"a,1,2,{T0},amap\nbb,30.12345674,-114.00000006,{T0 + 1},baidu\n团,-90,180,{T0 + 2},amap\n"
    )
    pings, _ = read(write(tmp_path, text))
    assert pings is not None
    batch = pings.batch(slice(1, 3), {"amap": 4, "baidu": 2})
    assert [batch.device_id(row) for row in range(len(batch))] == ["bb", "团"]
    assert batch.partner.tolist() == [2, 4]
    assert batch.lat_e7.tolist() == [301_234_567, -900_000_000]
    assert batch.lng_e7.tolist() == [-1_140_000_001, 1_800_000_000]
    assert batch.observed_at_ms.tolist() == [T0 + 1, T0 + 2]
    assert batch.at_ms is None


def test_progress_goes_from_nothing_to_the_files_size(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "".join(f"a{number},1,2,{T0}\n" for number in range(50_000)))
    reader = PingReader(path, 1000)
    seen = [reader.bytes_read for _ in reader.chunks()]
    assert seen == sorted(seen)
    assert 0 < seen[0] < reader.size_bytes / 2
    assert seen[-1] == reader.bytes_read == reader.size_bytes == path.stat().st_size
