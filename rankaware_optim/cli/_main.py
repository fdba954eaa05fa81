"""This module defines `rankaware`, which can also be run as `python -m rankaware_optim`.

Shell completion and --help import the modules of all commands, and both must be fast. Therefore,
torch, numpy and Optuna are only imported by the commands that need them.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from typing import Any

import click

from ..errors import CalibrationInterrupted, RankAwareError
from ._adapters import inspect, suggest
from ._calibrate import calibrate
from ._convert import convert
from ._fit import fit
from ._options import INTERRUPTED, echo, echo_note
from ._recipes import lr, plot, report, show


class _Commands(click.Group):
    """The group of all commands.

    This group of commands prints errors of the package without a traceback. After
    Ctrl-C, the exit code is 130.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = echo_note
                return super().invoke(ctx)
        except (RankAwareError, OSError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as error:
            said = "Interrupted."
            if isinstance(error, CalibrationInterrupted):
                said = f"{error.cause} Run the same command again to continue where it stopped."
            echo(said, err=True)
            ctx.exit(INTERRUPTED)


def _print_versions(ctx: click.Context, _: Any, asked: bool) -> None:
    if not asked:
        return
    for package in ("rankaware-optim", "torch", "peft", "optuna"):
        try:
            echo(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            echo(f"{package} is not installed")
    ctx.exit()


@click.group(
    cls=_Commands,
    commands=[convert, suggest, calibrate, fit, inspect, lr, show, plot, report],
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Print the versions of this package, torch, peft and optuna.",
)
def main() -> None:
    """Convert a tuned learning rate to another LoRA rank, alpha or width, or to full finetuning.

    If you have no learning rate yet, "rankaware suggest" suggests one. "rankaware calibrate" finds
    the best learning rate with short training runs and writes it to a recipe file.

    \b
    To complete commands in a shell, add a line to its start-up file:
      bash  eval "$(_RANKAWARE_COMPLETE=bash_source rankaware)"
      zsh   eval "$(_RANKAWARE_COMPLETE=zsh_source rankaware)"
      fish  _RANKAWARE_COMPLETE=fish_source rankaware | source
    """
