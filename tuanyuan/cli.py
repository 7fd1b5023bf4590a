"""The command line. `main` is what the installed command `tuanyuan` runs."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

from tuanyuan import kernel_cache

KERNEL_CACHE = kernel_cache.use()  # before anything of geoindex is imported

import typer  # noqa: E402

from tuanyuan.console import fail, note, notes  # noqa: E402

_NO_KERNELS = {
    "-h",
    "--help",
    "warmup",
    "health",
    "top",
    "alert",
    "pull",
    "dead-letters",
    "partner",
    "officer",
    "operator",
    "audit-log",
}
"""Words in a command line that needs no kernels, so should not wait for them to be compiled."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tuanyuan finds every phone near a missing child, within seconds, and never tells one twice.",
)


@app.command()
def warmup() -> None:
    """Compile and cache the kernels for this machine, if that has not been done yet."""
    kernel_cache.warm(KERNEL_CACHE, note)
    note(f"kernels: {KERNEL_CACHE}")


COMMANDS = (
    "match",
    "run",
    "serve",
    "send",
    "pull",
    "audit",
    "demo",
    "health",
    "top",
    "retention",
    "bench",
    "simulate",
    "soak",
)
"""Commands, each a function of `tuanyuan.commands.<name>`, as the help lists them."""
GROUPS = ("alert", "dead-letters", "partner", "officer", "operator", "audit-log")
"""Commands with commands of their own."""


def module_of(name: str) -> ModuleType:
    """The module of a command. It may import the kernels, so the cache's place has to be known."""
    return importlib.import_module(f"tuanyuan.commands.{name.replace('-', '_')}")


def _add_commands(named: str | None) -> None:
    """Only the one that was named, if there is such a one: all others' imports would take longer than it does."""
    known = COMMANDS + GROUPS
    for name in (named,) if named in known else known:
        module = module_of(name)
        if name in GROUPS:
            app.add_typer(module.app, name=name, epilog=module.EPILOG)
        else:
            app.command(name, epilog=module.EPILOG)(getattr(module, name))


def main() -> None:
    """Run a command; Ctrl-C ends it with 130, a server out of reach with words instead of a traceback."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _add_commands(sys.argv[1] if len(sys.argv) > 1 else None)
    import redis

    try:
        if not _NO_KERNELS & set(sys.argv[1:]) and len(sys.argv) > 1:
            kernel_cache.warm(KERNEL_CACHE, note)
        app()
    except KeyboardInterrupt:
        notes.print("interrupted")
        raise SystemExit(130) from None
    except redis.RedisError as problem:
        try:
            fail(f"the server does not answer: {problem}")
        except typer.Exit as end:
            raise SystemExit(end.exit_code) from None


if __name__ == "__main__":
    main()
