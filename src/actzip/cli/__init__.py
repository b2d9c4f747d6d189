"""The command line: ``actzip VERB``. One file a verb, each with ``register(app)``; add its name to ``VERBS``.

Exit codes: 0 done, 1 any other error of actzip, 2 a wrong value or option, 3 a damaged blob, 4
missing or unreadable data, 5 a wrong recipe, 6 an unknown layer, 7 something the engine cannot run,
8 training that cannot go on, 130 interrupted, 143 ended by SIGTERM. Errors are one line on standard
error; ``--debug`` anywhere on the line shows the traceback instead.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from actzip.errors import ActzipError, ActzipWarning

__all__ = ["VERBS", "build", "main"]

#: The verbs, in the order of ``actzip --help``; each is a module of this package.
VERBS = (
    "info",
    "profile",
    "accelerate",
    "sparsify",
    "quantize",
    "split",
    "encode",
    "decode",
    "inspect",
    "export",
    "compile",
    "bench",
    "serve",
    "reproduce",
)

_EPILOG = (
    "Exit codes: 0 done, 1 other error, 2 wrong value or option, 3 damaged blob, 4 missing data, "
    "5 wrong recipe, 6 unknown layer, 7 unsupported operator, 8 training failed, 130 interrupted, "
    "143 ended by SIGTERM. --debug shows tracebacks."
)


def build() -> typer.Typer:
    """The Typer application with every verb."""
    app = typer.Typer(
        name="actzip",
        help="Make the zeros of trained CNNs pay: sparsify, quantize, encode, compile.",
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
        debug: bool = typer.Option(
            False, "--debug", help="Show the traceback of an error (works after a verb too)."
        ),
    ) -> None:
        if version:
            from actzip._version import __version__

            typer.echo(__version__)
            raise typer.Exit

    for verb in VERBS:
        importlib.import_module(f"actzip.cli.{verb}").register(app)
    return app


def _traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    import traceback

    from actzip.text import visible

    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace)), keep="\n"))


def _usage(error: Any) -> int:
    """Says what is wrong with the line; its exit code."""
    from actzip.cli.common import complain

    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        of = getattr(getattr(error, "ctx", None), "command_path", "actzip")
        complain("error", f"{error.format_message()} ({of} --help)")
    return int(error.exit_code)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; leaves by SystemExit with the exit code of what happened."""
    from actzip.cli.common import complain, errors

    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]

    def show(
        message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None
    ) -> None:
        if issubclass(category, ActzipWarning) or debug:
            complain("warning", message, "yellow")

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)  # so that temporary files are removed on the way out

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if here else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", ActzipWarning)
            warnings.showwarning = show
            code = build()(args=args, prog_name="actzip", standalone_mode=False)
            sys.stdout.flush()
            raise SystemExit(code if isinstance(code, int) else 0)
    except typer.Abort:
        raise SystemExit(1) from None
    except typer.Exit as error:
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:  # whoever read the results has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(141) from None
    except ActzipError as error:
        if debug:
            raise
        complain("error", error)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if debug:
            raise
        errors.print("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        if hasattr(error, "format_message"):  # of click, or of typer's own copy of it: a wrong line
            raise SystemExit(_usage(error)) from None
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is None and error.errno == errno.ENOSPC:
            complain("error", f"cannot write standard output: {error.strerror}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left cannot be written either
            raise SystemExit(4) from None
        complain("error", f"{type(error).__name__}: {error} (not foreseen: --debug shows where)")
        raise SystemExit(1) from None
    finally:
        if debug:
            sys.excepthook = _traceback
        if here:
            signal.signal(signal.SIGTERM, before)
