"""The simulated disk: as the real one while the machine lives, and forgetful when it loses power."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.disk import DISK, Disk
from loadtest.simulation.disk import ProcessDisk, SimulatedDisk


def process(disk: SimulatedDisk) -> ProcessDisk:
    return ProcessDisk(disk, lambda moment: None)


def write(disk: Disk, path: Path, raw: bytes, sync: bool = True) -> None:
    descriptor = disk.create(path)
    assert disk.write(descriptor, [memoryview(raw)]) == len(raw)
    if sync:
        disk.sync(descriptor)
    disk.close(descriptor)


@pytest.mark.parametrize("disk_of", [lambda: DISK, lambda: process(SimulatedDisk())], ids=["real", "simulated"])
def test_both_disks_do_the_same(disk_of: Callable[[], Disk], tmp_path: Path) -> None:
    disk = disk_of()
    folder = tmp_path / "a" / "b"
    assert disk.names(folder) == []
    disk.make_folder(folder, parents=True)
    disk.make_folder(folder)
    assert disk.names(folder.parent) == ["b"]
    disk.sync_folder(folder)
    path, other = folder / "x", folder / "y"
    descriptor = disk.create(path)
    with pytest.raises(FileExistsError):
        disk.create(path)
    assert disk.write(descriptor, [memoryview(b"abc"), memoryview(b"defgh")]) == 8
    disk.sync_bytes(descriptor)
    reader = disk.open(path)
    assert not disk.lock_if_free(reader)
    disk.close(descriptor)
    assert disk.lock_if_free(reader)
    assert (disk.size_bytes(reader), disk.read_at(reader, 3, 4)) == (8, b"efg")
    disk.seek(reader, 1)
    views = [bytearray(2), bytearray(9)]
    assert disk.read_into(reader, [memoryview(view) for view in views]) == 7
    assert (bytes(views[0]), bytes(views[1][:5])) == (b"bc", b"defgh")
    assert disk.read_into(reader, [memoryview(views[0])]) == 0
    write(disk, other, b"other")
    disk.rename(path, other)
    assert disk.names(folder) == ["y"]
    disk.remove(other)
    disk.remove(other)
    assert disk.names(folder) == []
    assert disk.read_at(reader, 8, 0) == b"abcdefgh"  # open files stay
    disk.close(reader)
    for missing in (disk.open, lambda path: disk.rename(path, other)):
        with pytest.raises(FileNotFoundError):
            missing(path)


def test_what_was_synced_outlives_a_power_failure_and_nothing_else_is_sure(tmp_path: Path) -> None:
    fates: set[object] = set()
    for seed in range(60):
        disk = SimulatedDisk()
        mine = process(disk)
        mine.make_folder(tmp_path)
        write(mine, tmp_path / "synced", b"synced")
        mine.sync_folder(tmp_path)
        write(mine, tmp_path / "nameless", b"nameless")
        write(mine, tmp_path / "torn", b"half of it", sync=False)
        disk.lose_power(random.Random(seed))
        reader = process(disk)
        assert reader.read_at(reader.open(tmp_path / "synced"), 9, 0) == b"synced"
        names = frozenset(reader.names(tmp_path))
        torn = reader.read_at(reader.open(tmp_path / "torn"), 10, 0) if "torn" in names else None
        assert not ("torn" in names and "nameless" not in names), "a journal keeps the order of names"
        fates.add((names, None if torn is None else len(torn), torn is not None and b"\0" in torn))
    assert len(fates) > 8


def test_a_dead_process_has_no_locks_and_changes_nothing(tmp_path: Path) -> None:
    disk = SimulatedDisk()
    dying, other = process(disk), process(disk)
    dying.make_folder(tmp_path)
    descriptor = dying.create(tmp_path / "x")
    assert not other.lock_if_free(other.open(tmp_path / "x"))
    dying.die()
    assert other.lock_if_free(other.open(tmp_path / "x"))
    for call in (lambda: dying.remove(tmp_path / "x"), lambda: dying.write(descriptor, [memoryview(b"a")])):
        with pytest.raises(OSError, match="dead"):
            call()
    assert other.names(tmp_path) == ["x"]
