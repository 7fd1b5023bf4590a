"""Files that somebody else deletes leave the disk piece by piece."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.disk import GradualDeletion


@pytest.fixture
def files(tmp_path: Path) -> Iterator[GradualDeletion]:
    files = GradualDeletion(tmp_path, "*.aof")
    yield files
    files.close()


def sizes(descriptors: list[int]) -> list[int]:
    return sorted(os.fstat(descriptor).st_size for descriptor in descriptors)


def test_a_deleted_file_is_shortened_a_piece_at_a_time_and_others_are_left_alone(
    tmp_path: Path, files: GradualDeletion
) -> None:
    (tmp_path / "1.aof").write_bytes(b"x" * 1000)
    (tmp_path / "2.aof").write_bytes(b"y" * 500)
    (tmp_path / "manifest").write_bytes(b"z" * 10)
    descriptors = files.look()
    assert sizes(descriptors) == [500, 1000]
    (deleted,) = (one for one in descriptors if os.fstat(one).st_size == 1000)
    watched = os.dup(deleted)
    try:
        files.shrink(300)
        assert os.fstat(watched).st_size == 1000
        (tmp_path / "1.aof").unlink()
        assert sizes(files.look()) == [500]
        for left in (700, 400, 100):
            files.shrink(300)
            assert os.fstat(watched).st_size == left
        files.shrink(300)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(deleted)
    finally:
        os.close(watched)
    files.shrink(300)
    assert (tmp_path / "2.aof").read_bytes() == b"y" * 500
    assert (tmp_path / "manifest").read_bytes() == b"z" * 10


def test_several_small_files_share_a_piece(tmp_path: Path, files: GradualDeletion) -> None:
    for name in ("1.aof", "2.aof", "3.aof"):
        (tmp_path / name).write_bytes(b"x" * 100)
    watched = [os.dup(descriptor) for descriptor in files.look()]
    try:
        for path in tmp_path.glob("*.aof"):
            path.unlink()
        files.shrink(250)
        assert len(os.listdir(tmp_path)) == 0
        assert sizes(watched) == [50, 100, 100], "two are closed as they are, of the third a piece is gone"
    finally:
        for descriptor in watched:
            os.close(descriptor)


def test_a_file_that_is_written_on_is_seen_as_it_is_and_a_new_one_is_held(
    tmp_path: Path, files: GradualDeletion
) -> None:
    path = tmp_path / "1.aof"
    path.write_bytes(b"x" * 10)
    files.look()
    with path.open("ab") as file:
        file.write(b"x" * 5)
    (tmp_path / "2.aof").write_bytes(b"")
    assert sizes(files.look()) == [0, 15]
    path.rename(tmp_path / "3.aof")
    assert sizes(files.look()) == [0, 15]


def test_closed_it_holds_nothing(tmp_path: Path, files: GradualDeletion) -> None:
    (tmp_path / "1.aof").write_bytes(b"x")
    (descriptor,) = files.look()
    files.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert sizes(files.look()) == [1]
