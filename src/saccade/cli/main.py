"""The program `saccade`: finds its commands by name and runs them."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import saccade
from saccade import cli
from saccade.cli.errors import debug as debug_wanted
from saccade.cli.errors import friendly

_EPILOG = "A method is written as a spec, such as 'snapkv(budget=0.25)'; `saccade list` names them all."


class Commands(TyperGroup):
    """The commands of this folder. Only the one that runs is imported; `--help` imports all, which is cheap."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in _modules() if self.get_command(ctx, name)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # the group looks a command up more than once in a run, so what was built is kept
        if cmd_name not in _modules():
            self.list_commands(ctx)  # so that the refusal can name the nearest of them
        elif cmd_name not in self.commands:
            module = import_module(f"{cli.__name__}.{cmd_name}")
            run, group = getattr(module, "command", None), getattr(module, "group", None)
            if group is not None:  # a command with commands of its own
                self.commands[cmd_name] = typer.main.get_command(group)
            elif run is not None:
                alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
                alone.command(cmd_name)(friendly()(run))
                self.commands[cmd_name] = typer.main.get_command(alone)
        return self.commands.get(cmd_name)


def _modules() -> list[str]:
    return sorted(module.name for module in iter_modules(cli.__path__))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"saccade {saccade.__version__}")
        raise typer.Exit()


app = typer.Typer(
    name="saccade", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None, epilog=_EPILOG,
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="SACCADE_DEBUG", help="Show tracebacks.")] = False,
) -> None:
    """Attention that looks only where it matters: run, compare and measure ways to make attention cheaper."""
    debug_wanted.set(debug)


def app_entry() -> None:
    """Entry point of the installed program."""
    app(prog_name="saccade")


if __name__ == "__main__":
    app_entry()
