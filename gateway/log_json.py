"""Log lines as JSON objects, one a line. No device id, no key and no body ever stands in one.

{"at":"2026-05-04T09:12:01.123Z","level":"INFO","logger":"gateway.access","message":"request","request_id":…,…}
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import orjson

from gateway.keys import masked


class JsonFormatter(logging.Formatter):
    """A record's `members` (`extra={"members": {...}}`) stand beside its message. Keys are masked everywhere."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "at": f"{at.removesuffix('+00:00')}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "members", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = {name: _text(value) if isinstance(value, str) else value for name, value in line.items()}
        return orjson.dumps(text, default=repr).decode()


def _text(value: str) -> str:
    return masked(value.encode(errors="replace").decode())
