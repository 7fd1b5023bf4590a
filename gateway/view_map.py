"""Where live phones are, as a map for people: coarse cells, none under 20 phones, in tens, a minute late.

    density:{s} ──every half minute──> coarse_cells ──> the map of this minute, held back
                                                           └── 60 s after its newest count: shown

What is shown is a function of the counts that all shards had made at least a minute before: nobody sees where somebody
is now. There is one resolution for all, so no cell can be held against its parts; a hidden one does not follow from
others, and one phone more or less seldom changes a ten.
"""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections import deque
from dataclasses import dataclass

import orjson

from flows.density import Density, coarse_cells

DELAY_MS = 60_000
LOOK_S = 30.0
"""Between two looks at what the shards have counted, which they do once a minute."""
RESOLUTION = 4
"""1,770 km2 on average: 42 km across."""
FALLBACK_RESOLUTION = 3
CELLS_MAX = 12_000
"""More cells than that are shown coarser: a map is some 100 KB, and drawn 60 times a second."""
HELD_MAX = 8


@dataclass(frozen=True, slots=True)
class Document:
    """The bytes of an answer, plain and compressed, each with its ETag."""

    at_ms: int | None
    body: bytes
    etag: str
    compressed: bytes
    compressed_etag: str

    @classmethod
    def of(cls, body: bytes, at_ms: int | None = None) -> Document:
        digest = hashlib.sha256(body).hexdigest()[:32]
        packed = gzip.compress(body, 5, mtime=0)
        return cls(at_ms, body, f'"{digest}"', packed, f'"{digest}-gzip"')


def map_document(density: Density) -> Document:
    """The map of one count, as `gateway.view_models.DensityMap` describes it."""
    resolution = RESOLUTION
    cells = coarse_cells(density, resolution)
    if len(cells.h3_index) > CELLS_MAX:
        resolution = FALLBACK_RESOLUTION
        cells = coarse_cells(density, resolution)
    shown = [
        [f"{index:x}", phones] for index, phones in zip(cells.h3_index.tolist(), cells.phones.tolist(), strict=True)
    ]
    body = {
        "at_ms": density.at_ms,
        "resolution": resolution,
        "cells": shown,
        "shards_missing": list(density.missing),
    }
    return Document.of(orjson.dumps(body), density.at_ms)


class DelayedMaps:
    """Maps that are held back until they are old enough. One thread adds; any asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: deque[tuple[int, Document]] = deque(maxlen=HELD_MAX)
        self._shown: Document = EMPTY
        self._last: tuple[int | None, int | None, tuple[int, ...]] | None = None

    def add(self, density: Density) -> None:
        """What all shards have counted last. Nothing happens if that is known."""
        what = (density.at_ms, density.newest_ms, density.missing)
        if what == self._last:
            return
        self._last = what
        if density.newest_ms is None or density.at_ms is None:
            # Nobody counts any more: what was shown is gone when the counts are.
            empty = {"at_ms": None, "resolution": RESOLUTION, "cells": [], "shards_missing": list(density.missing)}
            with self._lock:
                self._held.clear()
                self._shown = Document.of(orjson.dumps(empty))
            return
        document = map_document(density)
        with self._lock:
            self._held.append((density.newest_ms + DELAY_MS, document))

    def shown(self, now_ms: int) -> Document:
        """The newest map that may be shown; `now_ms`: by the server's clock."""
        with self._lock:
            while self._held and self._held[0][0] <= now_ms:
                self._shown = self._held.popleft()[1]
            return self._shown


EMPTY = Document.of(orjson.dumps({"at_ms": None, "resolution": RESOLUTION, "cells": [], "shards_missing": []}))
