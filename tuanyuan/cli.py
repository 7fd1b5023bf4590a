"""The command line. `main` is what the installed command `tuanyuan` runs."""

from __future__ import annotations

import logging
import sys

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


def _add_commands() -> None:
    """Commands import the kernels, so they are added after the cache's place is known."""
    from tuanyuan.commands import (
        alert,
        audit,
        audit_log,
        bench,
        dead_letters,
        demo,
        health,
        match,
        officer,
        operator,
        partner,
        pull,
        retention,
        run,
        send,
        serve,
        simulate,
        soak,
        top,
    )

    for module in (match, run, serve, send, pull, audit, demo, health, top, retention, bench, simulate, soak):
        name = module.__name__.rpartition(".")[2]
        app.command(name, epilog=module.EPILOG)(getattr(module, name))
    app.add_typer(alert.app, name="alert", epilog=alert.EPILOG)
    app.add_typer(dead_letters.app, name="dead-letters", epilog=dead_letters.EPILOG)
    app.add_typer(partner.app, name="partner", epilog=partner.EPILOG)
    app.add_typer(officer.app, name="officer", epilog=officer.EPILOG)
    app.add_typer(operator.app, name="operator", epilog=operator.EPILOG)
    app.add_typer(audit_log.app, name="audit-log", epilog=audit_log.EPILOG)


def main() -> None:
    """Run a command; Ctrl-C ends it with 130, a server out of reach with words instead of a traceback."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _add_commands()
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
