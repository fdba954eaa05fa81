"""The command `rankaware`, also `python -m rankaware_optim`. The module of a subcommand is imported
when it is used.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..errors import CalibrationInterrupted, RankAwareError
from ._options import echo, in_options, warnings_as_notes

_INTERRUPTED = 130  # exit code of shells for SIGINT

# The module of each command.
_COMMANDS = {
    "calibrate": "_calibrate",
    "convert": "_convert",
    "coordcheck": "_adapters",
    "demo": "_demo",
    "diff": "_recipes",
    "doctor": "_doctor",
    "fit": "_calibrate",
    "inspect": "_adapters",
    "lr": "_recipes",
    "plot": "_recipes",
    "report": "_recipes",
    "show": "_recipes",
    "suggest": "_adapters",
}


class _Commands(click.Group):
    """Finds a command in its module, and prints this package's errors without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"{__package__}.{_COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[CompletionItem]:
        """Complete commands by name only: their help would import all of them, and torch, at every
        key press.
        """
        commands = [
            CompletionItem(name) for name in _COMMANDS if name.startswith(incomplete)
        ]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def main(self, *args: Any, **settings: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            # a console of Windows may lack √, and then its help would not print
            if (
                isinstance(stream, io.TextIOWrapper)
                and "utf" not in stream.encoding.lower()
            ):
                stream.reconfigure(errors="replace")
        return super().main(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings_as_notes():
                return super().invoke(ctx)
        except RankAwareError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "") or self
            raise click.ClickException(in_options(error, command)) from error
        except CalibrationInterrupted as error:
            echo(
                f"{error.cause} The same command continues where it stopped.", err=True
            )
            ctx.exit(_INTERRUPTED)
        except KeyboardInterrupt:
            echo("Interrupted.", err=True)
            ctx.exit(_INTERRUPTED)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="rankaware-optim")
def main() -> None:
    """Move a tuned learning rate to another LoRA rank, alpha or init, or to full finetuning.

    No rate yet: suggest gives a first one and calibrate finds one. A calibrated rate is kept in a
    file, its recipe.

    \b
    To complete commands in a shell, add a line to its start-up file:
      bash  eval "$(_RANKAWARE_COMPLETE=bash_source rankaware)"
      zsh   eval "$(_RANKAWARE_COMPLETE=zsh_source rankaware)"
      fish  _RANKAWARE_COMPLETE=fish_source rankaware | source
    """
