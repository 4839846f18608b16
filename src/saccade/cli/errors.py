"""One red line for what the user can mend; a traceback only for bugs, or when asked for."""

from __future__ import annotations

from contextlib import ContextDecorator
from contextvars import ContextVar
from types import TracebackType

import typer
from rich.markup import escape

from saccade.cli.console import console

# set by `saccade --debug` (or SACCADE_DEBUG=1) for the command that follows
debug: ContextVar[bool] = ContextVar("debug", default=False)

_FOR_THE_USER = (ValueError, TypeError, OSError, ImportError)


class friendly(ContextDecorator):
    """Around a command: what the user can mend becomes `error: ...` on stderr and exit code 2; Ctrl-C becomes 130.

    ValueError, TypeError, ImportError (which names the extra to install) and OSError (missing files, permissions) are
    for the user. Anything else, and everything under `saccade --debug`, keeps its traceback.
    """

    def __enter__(self) -> friendly:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(130) from None
        # a reader that closed the pipe (`saccade list | head`) is no error
        if isinstance(error, _FOR_THE_USER) and not isinstance(error, BrokenPipeError) and not debug.get():
            console(stderr=True).print(f"[bold red]error:[/] [red]{escape(one_line(error))}[/]", soft_wrap=True)
            raise typer.Exit(2) from None


def one_line(error: BaseException) -> str:
    """The message of an exception as one line; never empty."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return " ".join(str(error).split()) or type(error).__name__
