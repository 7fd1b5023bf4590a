"""Play the Dockerfile in a temporary directory: the same COPY, ENV and RUN steps, without a container engine.

    ENV /opt/x, WORKDIR /y, COPY to /z     the same path below a temporary root, which all stages share
    RUN                                    run by sh with the stage's environment; steps that create users are skipped
    the rest                               not played: `tests/test_packaging.py` reads it

Then checks what an image promises: the entry point answers, and kernels that `warmup` compiled at build time are not
compiled again. It does not show that the base image has everything: that takes a container engine.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TARGETARCH = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
"""Docker's names of processors."""
OUTER_VARIABLES = re.compile(r"PIP_.*|SSL_CERT_.*|.*_proxy|.*_PROXY|LANG|LC_ALL|TMPDIR")
"""What a step may see of the environment of this process: how to reach a package index, and no more."""


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, its lines joined."""

    keyword: str
    argument: str


@dataclass
class Stage:
    """What a `FROM` begins."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(dockerfile: str) -> Iterator[Instruction]:
    """Instructions of a Dockerfile in order; comments dropped, continued lines joined by a space."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    for statement in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if statement.strip():
            keyword, argument = statement.strip().split(maxsplit=1)
            yield Instruction(keyword.upper(), argument)


def stages(dockerfile: str, targetarch: str) -> list[Stage]:
    """Stages that the last one is made of, itself included, in the order of the file."""
    found: list[Stage] = []
    for instruction in parse(dockerfile):
        if instruction.keyword == "FROM":
            base, *alias = re.split(r"\s+AS\s+", expand(instruction.argument, {"TARGETARCH": targetarch}), flags=re.I)
            found.append(Stage(base, alias[0] if alias else ""))
        elif found:
            found[-1].instructions.append(instruction)
    needed = {found[-1].base}
    for stage in reversed(found):
        if stage is found[-1] or stage.name in needed:
            needed |= {stage.base, *re.findall(r"--from=(\S+)", " ".join(i.argument for i in stage.instructions))}
    return [stage for stage in found if stage is found[-1] or stage.name in needed]


def expand(text: str, environment: Mapping[str, str]) -> str:
    """Replace `$NAME` and `${NAME}`."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: environment.get(match[1], ""), text)


def below(root: Path, text: str) -> str:
    """Every absolute path of a list separated by colons moved below `root`."""
    return re.sub(r"(^|:)/", rf"\g<1>{root}/", text)


def play(stage: Stage, root: Path, environment: dict[str, str], index: int) -> None:
    """Play the steps of one stage. Leaves the stage's environment in `environment`, its directory in PWD."""
    for keyword, argument in stage.instructions:
        if keyword in ("ENV", "ARG"):
            for assignment in shlex.split(argument):
                name, value = assignment.split("=", 1)
                environment[name] = expand(below(root, value), environment)
        elif keyword == "WORKDIR":
            environment["PWD"] = below(root, argument)
            Path(environment["PWD"]).mkdir(parents=True, exist_ok=True)
        elif keyword == "COPY" and "--from=" not in argument:
            *sources, target = argument.split()
            copy(
                [ROOT / source for source in sources], Path(environment["PWD"], target), to_folder=target.endswith("/")
            )
        elif keyword == "RUN" and "useradd" not in argument:
            print(f"\n[{index}] {argument}", flush=True)
            started = time.monotonic()
            subprocess.run(["sh", "-euc", argument], check=True, env=environment, cwd=environment["PWD"])
            print(f"[{index}] {time.monotonic() - started:.1f} s", flush=True)


def copy(sources: list[Path], target: Path, *, to_folder: bool) -> None:
    """As COPY: the content of a folder goes into the target, a file keeps its name in a folder."""
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            file = target / source.name if to_folder else target
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, file)


def kernel_files(environment: Mapping[str, str]) -> dict[str, int]:
    """Compiled kernels: path -> time of the last change in ns."""
    return {str(path): path.stat().st_mtime_ns for path in Path(environment["NUMBA_CACHE_DIR"]).rglob("*.nb?")}


def forget_notes(folder: Path) -> None:
    """Delete what is no kernel: notes that there is nothing left to compile. The next `warmup` has to find out."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.match("*.nb?"):
            path.unlink()


def size_mb(folder: Path) -> float:
    """Size of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> int:
    """Play all steps; returns 0 if the result keeps its promises."""
    played = stages((ROOT / "Dockerfile").read_text(), TARGETARCH[platform.machine()])
    with tempfile.TemporaryDirectory(prefix="tuanyuan-image-") as temporary:
        root = Path(temporary).resolve() / "root"
        tools = Path(temporary).resolve() / "bin"
        tools.mkdir()
        base_python = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
        (tools / "python").symlink_to(base_python)
        outer = {name: value for name, value in os.environ.items() if OUTER_VARIABLES.fullmatch(name)}
        outer |= {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tools), "PWD": str(root)}
        environments: dict[str, dict[str, str]] = {}
        for index, stage in enumerate(played, start=1):
            environment = dict(environments.get(stage.base, outer))
            play(stage, root, environment, index)
            environments[stage.name] = environment

        final = environments[played[-1].name]
        compiled = kernel_files(final)
        forget_notes(Path(final["NUMBA_CACHE_DIR"]))
        for command in (["tuanyuan", "--help"], ["tuanyuan", "warmup"]):
            subprocess.run(command, check=True, env=final, cwd=final["PWD"], stdout=subprocess.DEVNULL)
        if kernel_files(final) != compiled or not compiled:
            print(f"\nFAILED: {len(compiled)} files of kernels in the image, others after one more warmup")
            return 1
        print(f"\n{len(compiled)} files of compiled kernels, none compiled again at run time")
        print(f"/opt/tuanyuan: {size_mb(root / 'opt/tuanyuan'):.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
