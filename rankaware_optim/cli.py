"""The command `rankaware`, also `python -m rankaware_optim`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click

from .calibrate_command import calibrate
from .coordinate_command import coordcheck
from .errors import RankAwareError
from .law_commands import bench, fit
from .laws import DEFAULT_LAW
from .recipe import Rate, Recipe
from .recipe_commands import diff, plot, report
from .suggest_command import suggest

__all__ = ["main"]


class _Group(click.Group):
    """Shows this package's errors as one sentence of cause and one of cure, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: click.echo(f"note: {message}", err=True)
                return super().invoke(ctx)
        except RankAwareError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rankaware-optim")
def main() -> None:
    """Learning rates that stay right when the LoRA rank, alpha or init changes, or for full finetuning."""


@main.command()
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("rankaware-demo"))
def demo(out: Path) -> None:
    """Calibrate and check on real weights and images, offline, in about two minutes."""
    from rich.console import Console

    from .demo import run_demo, table, verdict

    console = Console(width=None if sys.stdout.isatty() else 120)
    _, arms = run_demo(out, console.print)
    console.print(table(arms))
    for arm in arms:
        console.print(verdict(arm), highlight=False)
    console.print(f"Files: {out}/recipe.toml, {out}/recipe.safetensors, {out}/transfer.png", highlight=False)
    console.print(f"Next: rankaware lr {out}/recipe.toml --rank 32", highlight=False)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--lr", type=float, help="Base rate: adds a column of rates.")
@click.option("--law", default=DEFAULT_LAW, show_default=True)
@click.option("--tuned-at", help="Where the base rate was tuned, as r=16,alpha=32.")
@click.option("--per-module", is_flag=True, help="A line for every tensor.")
def inspect(path: Path, lr: float | None, law: str, tuned_at: str | None, per_module: bool) -> None:
    """Say what adapters PATH holds: a PEFT folder or a .safetensors file, read without the model."""
    from .adapter_files import inspect_file, survey_report

    survey = inspect_file(path)
    click.echo(survey_report(survey, lr=lr, law=law, tuned_at=tuned_at, per_module=per_module))


@main.command()
@click.argument("lr", type=float)
@click.option("--from", "from_", required=True, help="Where LR was tuned, as r=16,alpha=32 or full,fan_in=4096.")
@click.option("--to", required=True, help="Where it is wanted, as r=128,alpha=16,rslora.")
@click.option("--law", default=DEFAULT_LAW, show_default=True)
def convert(lr: float, from_: str, to: str, law: str) -> None:
    """Say in words what LR, tuned with one rank and alpha, becomes with another."""
    from .convert import convert_lr

    click.echo(convert_lr(lr, from_=from_, to=to, law=law).explain())


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
def show(recipe: Path) -> None:
    """Print what a recipe holds."""
    from rich.console import Console

    loaded = Recipe.load(recipe)
    Console(width=None if sys.stdout.isatty() else 100).print(_recipe_table(loaded))


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--rank", type=int)
@click.option("--alpha", type=float)
@click.option("--rslora", is_flag=True, help="alpha is divided by √rank.")
@click.option("--init", type=click.Choice(["A", "B"]))
@click.option("--full", is_flag=True, help="The rate for full finetuning.")
@click.option("--fan-in", type=float, help="The model's width, if not the recipe's.")
@click.option("--steps", type=int, help="Training steps, if not the recipe's: an extrapolation.")
@click.option("--batch", type=float, help="Batch, counted as the recipe counts its own: an extrapolation.")
def lr(recipe: Path, rank: int | None, alpha: float | None, rslora: bool, full: bool, **where: Any) -> None:
    """Print a recipe's rate at a rank, or for full finetuning."""
    if full == (rank is not None):
        raise click.UsageError("Give --rank N or --full.")
    if alpha is None and rslora:
        raise click.UsageError("--rslora says how --alpha is meant: give --alpha too.")
    if full and alpha is not None:
        raise click.UsageError("Full finetuning has no --alpha.")
    method: Any = "full" if full else "lora"
    loaded = Recipe.load(recipe)
    rate = loaded.at(rank, alpha=alpha, rslora=rslora, method=method, **where)
    click.echo(_rate_lines(rate))


for _command in (bench, calibrate, coordcheck, diff, fit, plot, report, suggest):
    main.add_command(_command)


def _rate_lines(rate: Rate) -> str:
    lines = [f"lr        {rate.lr:.3g}", f"90 % band {rate.low:.3g} to {rate.high:.3g}"]
    lines += [] if rate.ceiling is None else [f"ceiling   {rate.ceiling:.3g} (the smallest rate seen to diverge)"]
    lines += ["extrapolated"] if rate.extrapolated else []
    return "\n".join([*lines, *(f"note: {note}" for note in rate.notes)])


def _recipe_table(recipe: Recipe) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(title=f"Recipe {recipe.name!r}", title_justify="left", box=box.SIMPLE, show_header=False)
    own = recipe.at() if recipe.reference.method == "lora" else recipe.at(method="full")
    rows = {
        "base rate": f"{recipe.lr:.3g} at {recipe.reference}, width {recipe.reference.fan_in or 'unknown'}",
        "90 % band": f"{own.low:.3g} to {own.high:.3g}",
        "ceiling": "none seen" if recipe.ceiling is None else f"{recipe.ceiling:.3g}",
        "law": repr(recipe.law),
        "alpha by rank": recipe.scaling_rule,
        "optimizer": f"{recipe.optimizer} {dict(recipe.settings)}",
        "horizon": f"{recipe.steps or 'untold'} steps, batch {recipe.batch or 'not told'}, "
        f"warm-up {'not told' if recipe.warmup is None else f'{recipe.warmup:.0%}'}",
        "seen": f"ranks {', '.join(map(str, recipe.ranks)) or 'none'}{', full finetuning' * recipe.full_seen}; "
        f"{len(recipe.tensors.get('lr', ()))} trials",
        **({"notes": "; ".join(recipe.notes)} if recipe.notes else {}),
        "versions": ", ".join(f"{k} {v}" for k, v in recipe.versions.items()),
    }
    for key, value in rows.items():
        made.add_row(key, value)
    return made
