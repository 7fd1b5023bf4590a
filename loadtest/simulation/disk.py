"""A disk in memory that forgets what it may forget: what was not synced when the machine loses power.

    write ──> the file as every process sees it ──sync──> what a power failure leaves for certain
    create, rename, remove ──> the folder likewise ──sync_folder──> its names for certain

A process that dies loses nothing but its locks. A power failure leaves, of the bytes that were not synced, none, some,
or others in their place; of the names that changed since `sync_folder`, the first few changes (a journal keeps order).
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from flows.disk import Disk


@dataclass(slots=True, eq=False)
class File:
    """One file, whatever its name."""

    content: bytearray = field(default_factory=bytearray)
    synced_bytes: int = 0
    owner: object | None = None
    """Who has its lock."""


class SimulatedDisk:
    """What all processes of one machine see."""

    def __init__(self) -> None:
        self.on_rename: Callable[[Path], None] = lambda name: None
        """Told of a file's new name."""
        self.files: dict[Path, File] = {}
        self._certain: dict[Path, File] = {}
        self._changes: list[tuple[Path, Path | None, File]] = []
        """(new name, old name, file) since the folder was synced; a the same name twice: it was removed."""
        self._folders: set[Path] = set()

    def names(self, folder: Path) -> list[str]:
        """Sorted, so that a run is the same every time."""
        start = f"{folder}{os.sep}"
        below = [path[len(start) :] for path in map(str, (*self.files, *self._folders)) if path.startswith(start)]
        return sorted({name for name in below if os.sep not in name})

    def make_folder(self, folder: Path) -> None:
        self._folders.update((folder, *folder.parents))

    def create(self, path: Path) -> File:
        if path.parent not in self._folders:
            _fail(errno.ENOENT, path)
        if path in self.files:
            _fail(errno.EEXIST, path)
        created = self.files[path] = File()
        self._changes.append((path, None, created))
        return created

    def rename(self, path: Path, target: Path) -> None:
        if path not in self.files:
            _fail(errno.ENOENT, path)
        moved = self.files[target] = self.files.pop(path)
        self._changes.append((target, path, moved))
        self.on_rename(target)

    def remove(self, path: Path) -> None:
        removed = self.files.pop(path, None)
        if removed is not None:
            self._changes.append((path, path, removed))

    def sync_folder(self, folder: Path) -> None:
        left: list[tuple[Path, Path | None, File]] = []
        for change in self._changes:
            if change[0].parent == folder:
                _apply(self._certain, change)
            else:
                left.append(change)
        self._changes = left

    def lose_power(self, rng: random.Random) -> int:
        """All that was not synced is in doubt; how many files and names are other than they were."""
        files = dict(self._certain)
        kept = rng.randint(0, len(self._changes))
        for change in self._changes[:kept]:
            _apply(files, change)
        lost = len(self._changes) - kept
        for file in files.values():
            doubtful = len(file.content) - file.synced_bytes
            if doubtful > 0:
                _tear(file, rng)
                lost += 1
            file.synced_bytes = len(file.content)
            file.owner = None
        self.files, self._certain, self._changes = files, dict(files), []
        return lost


def _apply(files: dict[Path, File], change: tuple[Path, Path | None, File]) -> None:
    name, old_name, file = change
    if old_name == name:
        files.pop(name, None)
        return
    if old_name is not None:
        files.pop(old_name, None)
    files[name] = file


def _tear(file: File, rng: random.Random) -> None:
    """What a power failure does to bytes that were not synced."""
    start, stop = file.synced_bytes, len(file.content)
    cut = rng.randint(start, stop)
    if rng.random() < 0.5:
        del file.content[cut:]
    else:
        # The length is there already, the bytes are not.
        file.content[cut:] = bytes(stop - cut)


class ProcessDisk(Disk):
    """One process's view of the disk."""

    def __init__(
        self,
        disk: SimulatedDisk,
        interlude: Callable[[str], None],
        bytes_taken: Callable[[int], int] = lambda wanted: wanted,
    ) -> None:
        """`interlude`: others may run, and this process may die. `bytes_taken`: of a write, -1 for a full disk."""
        self._disk = disk
        self._interlude = interlude
        self._bytes_taken = bytes_taken
        self._open: dict[int, tuple[File, list[int]]] = {}
        """By descriptor: the file and where reading goes on."""
        self._last_descriptor = 0
        self.is_dead = False

    def die(self) -> None:
        """The process is gone: its locks too; what it still calls changes nothing."""
        for file, _ in self._open.values():
            if file.owner is self:
                file.owner = None
        self._open.clear()
        self.is_dead = True

    def _alive(self) -> None:
        if self.is_dead:
            raise OSError(errno.EIO, "this process is dead")

    def names(self, folder: Path) -> list[str]:
        self._alive()
        return self._disk.names(folder)

    def make_folder(self, folder: Path, parents: bool = False) -> None:
        self._alive()
        self._disk.make_folder(folder)

    def create(self, path: Path) -> int:
        self._alive()
        self._interlude("disk")
        file = self._disk.create(path)
        file.owner = self
        return self._opened(file)

    def open(self, path: Path) -> int:
        self._alive()
        file = self._disk.files.get(path)
        if file is None:
            _fail(errno.ENOENT, path)
        return self._opened(file)

    def _opened(self, file: File) -> int:
        self._last_descriptor += 1
        self._open[self._last_descriptor] = file, [0]
        return self._last_descriptor

    def lock_if_free(self, descriptor: int) -> bool:
        self._alive()
        file, _ = self._open[descriptor]
        if file.owner is not None:
            return False
        file.owner = self
        return True

    def close(self, descriptor: int) -> None:
        found = self._open.pop(descriptor, None)
        if found is not None and found[0].owner is self:
            found[0].owner = None

    def write(self, descriptor: int, views: Iterable[memoryview]) -> int:
        self._alive()
        self._interlude("disk")
        file, _ = self._open[descriptor]
        raw = b"".join(views)
        taken = self._bytes_taken(len(raw))
        if taken < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.content += raw[:taken]
        return taken

    def sync_bytes(self, descriptor: int) -> None:
        self._alive()
        self._interlude("disk")
        file, _ = self._open[descriptor]
        file.synced_bytes = len(file.content)

    sync = sync_bytes

    def sync_folder(self, folder: Path) -> None:
        self._alive()
        self._interlude("disk")
        self._disk.sync_folder(folder)

    def rename(self, path: Path, target: Path) -> None:
        self._alive()
        self._interlude("disk")
        self._disk.rename(path, target)

    def remove(self, path: Path) -> None:
        self._alive()
        self._disk.remove(path)

    def size_bytes(self, descriptor: int) -> int:
        return len(self._open[descriptor][0].content)

    def read_at(self, descriptor: int, size_bytes: int, offset: int) -> bytes:
        self._alive()
        return bytes(self._open[descriptor][0].content[offset : offset + size_bytes])

    def seek(self, descriptor: int, offset: int) -> None:
        self._open[descriptor][1][0] = offset

    def read_into(self, descriptor: int, views: list[Any]) -> int:
        self._alive()
        file, place = self._open[descriptor]
        total = 0
        for view in views:
            part = file.content[place[0] : place[0] + len(view)]
            view[: len(part)] = part
            place[0] += len(part)
            total += len(part)
            if len(part) < len(view):
                break
        return total


def _fail(number: int, path: Path) -> NoReturn:
    raise OSError(number, os.strerror(number), str(path))
