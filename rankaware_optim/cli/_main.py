"""The command `rankaware`, also `python -m rankaware_optim`.

Help and completion in a shell import the modules of all commands. So these import torch, numpy and
Optuna only in a command that uses them.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import click

from ..errors import CalibrationInterrupted, RankAwareError
from ._adapters import coordcheck, inspect, suggest
from ._calibrate import calibrate, fit
from ._convert import convert
from ._doctor import doctor
from ._options import echo, in_options, warnings_as_notes
from ._recipes import diff, lr, plot, report, show

_INTERRUPTED = 130  # exit code of shells for SIGINT


class _Commands(click.Group):
    """Prints this package's errors without a traceback."""

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


for _command in (
    calibrate,
    convert,
    coordcheck,
    diff,
    doctor,
    fit,
    inspect,
    lr,
    plot,
    report,
    show,
    suggest,
):
    main.add_command(_command)
