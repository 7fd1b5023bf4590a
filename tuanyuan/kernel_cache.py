"""Where compiled kernels are kept, so that they are compiled once and never served stale.

Numba looks only at a kernel's own file when it decides whether a cached one still fits, not at the files of what it
calls. So each version of the sources gets a folder of its own, named by their digest. Call `use` before anything of
geoindex is imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

KEPT_VERSIONS = 12
_COMPLETE = "complete"


def use() -> Path:
    """Point Numba at this version's folder and return it. A folder named by NUMBA_CACHE_DIR is taken as it is."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    folder = _root() / _digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        # No writable home: Numba falls back to folders beside the sources, or compiles every time.
        return folder
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    return folder


def is_warm(folder: Path) -> bool:
    """Whether every kernel of this version is there."""
    return (folder / _COMPLETE).exists()


def warm(folder: Path, say: Callable[[str], None]) -> None:
    """Compile every kernel now if this version's are not compiled yet, saying so."""
    if is_warm(folder):
        return
    say("Compiling the kernels for this machine: once, about half a minute ...")
    started = time.monotonic()
    from tuanyuan.warmup import run_every_kernel  # imports geoindex: only after `use`

    run_every_kernel()
    say(f"Kernels compiled in {time.monotonic() - started:.0f} s and kept in {folder}")
    try:
        (folder / _COMPLETE).touch()
        if folder.parent == _root():
            _forget_old_versions(folder)
    except OSError:
        say("warning: the folder cannot be written, so they will be compiled again next time")


def _root() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home) / "tuanyuan" / "kernels"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tuanyuan" / "kernels"
    return Path.home() / ".cache" / "tuanyuan" / "kernels"


def _digest() -> str:
    top = Path(__file__).resolve().parent.parent
    # Numba keeps kernels by the path of their source, too: another checkout has to compile its own.
    digest = hashlib.sha256(f"{sys.version}\0{top}".encode())
    # Of the gateway its kernels alone: its other files say the word, and change nothing that is compiled.
    for package, names in (("geoindex", "*.py"), ("flows", "*.py"), ("gateway", "*kernels.py"), ("loadtest", "*.py")):
        for source in sorted((top / package).glob(names)):
            text = source.read_bytes()
            if b"kernel" in text:
                digest.update(source.name.encode() + b"\0" + text)
    return digest.hexdigest()[:16]


def _forget_old_versions(folder: Path) -> None:
    versions = sorted(folder.parent.iterdir(), key=lambda version: version.stat().st_mtime, reverse=True)
    for version in versions[KEPT_VERSIONS:]:
        if version != folder:
            shutil.rmtree(version, ignore_errors=True)
