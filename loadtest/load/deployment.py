"""What a run goes against: addresses and keys, in one JSON file that whoever made the accounts has written.

{"gateway": "https://tuanyuan.example.org",          required
 "partners": {"amap": "ty_…", "ditu": "ty_…"},       names as in the scenario's streams; at least one
 "officer": "ty_…", "operator": "ty_…",              without: no alerts; no operator's page
 "datums": {"amap": "gcj02"},                        as the accounts say; wgs84 where nothing is said
 "valkey": "redis://10.0.0.5:6379", "var": "/srv/tuanyuan",   without valkey: no lag, no audit; nothing to the logs
 "pids": {"flow": 4711, "gateway": 4712, "valkey": 4713}}     of this machine: for CPU and memory by role
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson


@dataclass(frozen=True, slots=True)
class Deployment:
    """One deployment under load. Its `repr` shows no key."""

    gateway: str
    partners: dict[str, str] = field(repr=False)
    officer: str | None = field(default=None, repr=False)
    operator: str | None = field(default=None, repr=False)
    valkey: str | None = field(default=None, repr=False)
    var: str | None = None
    pids: dict[str, int] = field(default_factory=dict)
    datums: dict[str, str] = field(default_factory=dict)
    """What coordinates of a partner mean where they are not WGS-84: gcj02, bd09. As the accounts say."""
    is_local: bool = False
    """Started by `python -m loadtest`, and ended by it."""

    @classmethod
    def read(cls, path: Path) -> Deployment:
        """Raises ValueError saying what is wrong with the file, OSError."""
        try:
            fields = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{path}: must be JSON: {error}") from None
        return cls.from_json(fields, str(path))

    @classmethod
    def from_json(cls, fields: Any, where: str = "deployment") -> Deployment:
        """Raises ValueError."""
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: must be a JSON object, got {type(fields).__name__}")
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"{where}: there is no {unknown[0]!r}; there are {', '.join(sorted(known))}")
        gateway = fields.get("gateway")
        if not isinstance(gateway, str) or not gateway.startswith(("http://", "https://")):
            raise ValueError(f"{where}: gateway must be a url, http:// or https://, got {gateway!r}")
        partners = fields.get("partners")
        if not isinstance(partners, dict) or not partners:
            raise ValueError(f"{where}: partners must be an object of names and keys, got {partners!r}")
        return cls(**{**fields, "gateway": gateway.rstrip("/")})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, path: Path) -> None:
        """For its owner alone: it holds keys. Whoever reads meanwhile sees the old one or the new one."""
        unfinished = path.with_suffix(".unfinished")
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(orjson.dumps(self.to_json(), option=orjson.OPT_INDENT_2))
        unfinished.replace(path)
