"""A partner's own server, as a test wants it: it records what it is sent, and answers what it is told to."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from tests.flows.waiting import eventually


@dataclass(frozen=True, slots=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def is_push(self) -> bool:
        return str(self.event.get("type")).startswith("push.")

    @property
    def devices(self) -> list[str]:
        found = self.event["data"]["device_ids"]
        assert isinstance(found, list)
        return found


Answer = tuple[int, dict[str, str], bytes]
OK: Answer = (200, {}, b"{}")


@dataclass
class Receiver:
    """`answer` is called with each request, in the server's thread, and may be replaced at any time."""

    port: int
    answer: Callable[[Received], Answer] = lambda _: OK
    requests: list[Received] = field(default_factory=list)
    """All of them, whatever they were answered with."""
    accepted: list[Received] = field(default_factory=list)
    """Pushes that were answered with 2xx."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?from=tuanyuan"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"] + "?" + scope["query_string"].decode()
        got = Received(path, {name.decode(): value.decode() for name, value in scope["headers"]}, body)
        self.requests.append(got)
        status, headers, content = self.answer(got)
        if got.is_push and 200 <= status < 300:
            self.accepted.append(got)
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": content})


@contextmanager
def serving(app: Any, port: int = 0, **options: Any) -> Iterator[int]:
    """An ASGI application on a free port of the loopback; the port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=5, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive(), timeout_s=20)
        assert server.started
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


@contextmanager
def receiving(receiver: Receiver | None = None) -> Iterator[Receiver]:
    """A receiver that is up; one that was up before comes back on its port."""
    receiver = receiver or Receiver(0)
    with serving(receiver, receiver.port, lifespan="off") as port:
        receiver.port = port
        yield receiver
