"""The operator's page: what `web/` was built into, served as it ships. Static and public; its figures need a key.

    GET /                            the page, asked for anew each time: 304 if it is the same
    GET /assets/{name}               scripts, styles, land; their names hold their hash, so they are kept for a year
    GET /third-party-notices.txt     licences of what is bundled

Assets ship compressed once, and are unpacked for the rare client that does not take gzip. The page may load and ask
nothing but this gateway.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.errors import Problem
from gateway.feeds import accepts_gzip, matches
from gateway.runtime import Gateway, gateway_of

FOLDER = Path(__file__).parent / "page"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self' blob:; "
    "worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""`data:` and `blob:` are pictures that the map's own style sheet and library hold; `blob:` is also what the page
itself has made for the map's worker to read. Neither leads anywhere."""
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
FOREVER = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the page."""

    compressed: bytes
    etag: str
    media_type: str
    cache_control: str

    @classmethod
    def of(cls, name: str, compressed: bytes, cache_control: str) -> PageFile:
        """`name`: that of the file itself, without `.gz`. Raises KeyError for another kind of file."""
        digest = hashlib.sha256(compressed).hexdigest()[:32]
        return cls(compressed, digest, MEDIA_TYPES[Path(name).suffix], cache_control)


class PageFiles:
    """The whole page in memory, 0.8 MB, by path."""

    def __init__(self, folder: Path = FOLDER) -> None:
        """Raises OSError: the package is not whole."""
        self.by_path: Mapping[str, PageFile] = {
            **{
                path: PageFile.of(name, gzip.compress((folder / name).read_bytes(), 9, mtime=0), ASK_AGAIN)
                for path, name in (("/", "index.html"), ("/third-party-notices.txt", "third-party-notices.txt"))
            },
            **{
                f"/assets/{file.stem}": PageFile.of(file.stem, file.read_bytes(), FOREVER)
                for file in sorted((folder / "assets").glob("*.gz"))
            },
        }

    def answer(self, request: Request, path: str) -> Response:
        """200 with the file, or 304. Raises Problem 404."""
        file = self.by_path.get(path)
        if file is None:
            raise Problem(404, "no-such-file", "the page has no file of this name: load it anew")
        is_compressed = accepts_gzip(request.headers.get("accept-encoding", ""))
        etag = f'"{file.etag}-gzip"' if is_compressed else f'"{file.etag}"'
        headers = {
            "ETag": etag,
            "Cache-Control": file.cache_control,
            "Vary": "Accept-Encoding",
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        }
        if_none_match = ",".join(request.headers.getlist("if-none-match"))
        if if_none_match and matches(if_none_match, etag):
            return Response(status_code=304, headers=headers)
        if is_compressed:
            headers["Content-Encoding"] = "gzip"
        body = file.compressed if is_compressed else gzip.decompress(file.compressed)
        return Response(body, headers=headers, media_type=file.media_type)

    def stop(self) -> None:
        """Nothing runs here."""


def start(_gateway: Gateway) -> PageFiles:
    """Read the page once."""
    return PageFiles()


def _files(request: Request) -> PageFiles:
    return gateway_of(request).service(PageFiles)


@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _files(request).answer(request, "/")


@router.get("/assets/{name}")
async def asset(request: Request, name: str) -> Response:
    """A part of it."""
    return _files(request).answer(request, f"/assets/{name}")


@router.get("/third-party-notices.txt")
async def notices(request: Request) -> Response:
    """Under which licences its libraries are."""
    return _files(request).answer(request, "/third-party-notices.txt")
