"""The disk as checkpoints use it: the operating system's calls, no more, so that a simulator can give another disk.

What was written is on the disk only after `sync`, and a new name of a file only after `sync_folder`: before that,
either may be lost, or be there in parts, when the machine loses power.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_sync_bytes = getattr(os, "fdatasync", os.fsync)
"""macOS has no fdatasync."""


def drop_cache(descriptor: int) -> None:
    """Give back the memory in which the system keeps what of a file is on the disk already, for files that nobody reads
    soon. Else they fill all memory, and on a virtual machine whose host takes free memory back every new page is one
    that the host must find first: 9-14 us each, *measured*, against 1.6 for one that was in use a moment ago.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class GradualDeletion:
    """Large files that somebody else writes and deletes, held open here, so that they leave the disk piece by piece.

    A file system that tells its disk what is free at once (mount option `discard`) does nothing else meanwhile: 5 GB
    deleted at a time kept all fsyncs waiting for 3 s, *measured*. In pieces nobody waits. For one thread.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        """`pattern`: of the files' names in the folder, as for `Path.glob`."""
        self._folder = folder
        self._pattern = pattern
        self._held: dict[int, int] = {}
        """Inode -> descriptor. Kept until the file is deleted and empty."""

    def look(self) -> list[int]:
        """Hold what is new; descriptors of all files that still have a name. Raises OSError."""
        for path in self._folder.glob(self._pattern):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino not in self._held:
                    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                    self._held[os.fstat(descriptor).st_ino] = descriptor
        return [descriptor for descriptor in self._held.values() if os.fstat(descriptor).st_nlink]

    def shrink(self, most_bytes: int) -> None:
        """Take so much from the end of files that have no name any more. Raises OSError."""
        for inode, descriptor in list(self._held.items()):
            facts = os.fstat(descriptor)
            if facts.st_nlink:
                continue
            left_bytes = max(0, facts.st_size - most_bytes)
            if left_bytes:
                os.ftruncate(descriptor, left_bytes)
                return
            del self._held[inode]
            os.close(descriptor)
            most_bytes -= facts.st_size

    def close(self) -> None:
        """Hold nothing any more: what was deleted leaves the disk at once."""
        while self._held:
            os.close(self._held.popitem()[1])


class Disk:
    """This machine's. Every method raises OSError."""

    def names(self, folder: Path) -> list[str]:
        """What is in a folder, in no order; nothing if there is no such folder."""
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(folder)
        return []

    def make_folder(self, folder: Path, parents: bool = False) -> None:
        """For this user alone; nothing happens if it exists."""
        folder.mkdir(parents=parents, exist_ok=True, mode=0o700)

    def create(self, path: Path) -> int:
        """Descriptor of a new file, locked, so that `lock_if_free` of others fails while its owner lives."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def open(self, path: Path) -> int:
        """Descriptor of a file to read."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def lock_if_free(self, descriptor: int) -> bool:
        """Take a file's lock; False if somebody has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self, descriptor: int) -> None:
        """Close, and give up the lock."""
        os.close(descriptor)

    def write(self, descriptor: int, views: Iterable[memoryview]) -> int:
        """Write at the file's end; how many bytes, which may be fewer than given."""
        return os.writev(descriptor, list(views))

    def sync_bytes(self, descriptor: int) -> None:
        """What was written is on the disk; the file's times need not be. It is not expected to be read soon."""
        _sync_bytes(descriptor)
        drop_cache(descriptor)

    def sync(self, descriptor: int) -> None:
        """The whole file is on the disk. It is not expected to be read soon."""
        os.fsync(descriptor)
        drop_cache(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """The names in a folder are on the disk."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, target: Path) -> None:
        """Give a file another name, in place of whatever has that name."""
        os.replace(path, target)

    def remove(self, path: Path) -> None:
        """Take a file's name away; nothing happens if it has none."""
        path.unlink(missing_ok=True)

    def size_bytes(self, descriptor: int) -> int:
        """How long a file is."""
        return os.fstat(descriptor).st_size

    def read_at(self, descriptor: int, size_bytes: int, offset: int) -> bytes:
        """So many bytes from there, or fewer at the file's end."""
        return os.pread(descriptor, size_bytes, offset)

    def seek(self, descriptor: int, offset: int) -> None:
        """Where `read_into` goes on."""
        os.lseek(descriptor, offset, os.SEEK_SET)

    def read_into(self, descriptor: int, views: list[Any]) -> int:
        """Read on into the views; how many bytes, which may be fewer than they take, 0 at the file's end."""
        return os.readv(descriptor, views)


DISK = Disk()
