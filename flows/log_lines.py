"""Log lines of a process that goes on with a server which may lose what it acknowledged: each of them says so."""

from __future__ import annotations

import logging
from typing import Any

UNSAFE_MARK = "[unsafe server] "

_make_record = logging.getLogRecordFactory()


def say_unsafe(unsafe: bool) -> None:
    """From now on every log record of this process begins with UNSAFE_MARK; or, with False, none does any more."""
    logging.setLogRecordFactory(_marked_record if unsafe else _make_record)


def says_unsafe() -> bool:
    """Whether log records are marked; for lines that do not go through `logging`."""
    return logging.getLogRecordFactory() is _marked_record


def _marked_record(*arguments: Any, **named: Any) -> logging.LogRecord:
    record = _make_record(*arguments, **named)
    record.msg = f"{UNSAFE_MARK}{record.msg}"
    return record
