"""What this project has to measure on a CUDA device, in short pieces that can be stopped and continued.

    python benchmarks/gpu/kit.py run --minutes 9                     # what is missing, the most useful first
    python benchmarks/gpu/kit.py run --piece width --minutes 9       # what is missing in one piece
    python benchmarks/gpu/kit.py table                               # results/cuda.md, with the card's name
    python benchmarks/gpu/kit.py run --device cpu --smallest         # every piece at its smallest, a minute of a CPU
    python benchmarks/gpu/kit.py archives                            # fetch what the pieces read, and print the paths

Run from the repository's root with PYTHONPATH=.:benchmarks. Every run is appended to results/cuda/ as it ends. The same
command, called again, runs what is still missing. The pieces:

    checks      the wrapper's tests of tests/environments/cuda: GradScaler, bf16, bitsandbytes, FSDP2, offload, graphs
    step_cost   a step of RankAwareOptimizer against the bare optimizer's, by CUDA events
    width       best rates at widths 512 to 4096, planned for 20 minutes of an H100
    smollm2     the study's SmolLM2 with the full grid and three seeds, planned for half an hour of an H100

On a machine that has torch with CUDA, install the rest with one command:

    python -m pip install -e '.[peft,transformers]' bitsandbytes gguf hypothesis pytest scipy

If the machine has no network, run `archives` on one that has. Copy the files that it prints (some 100 MB, 93 of them
SmolLM2's; use `split -b 40M` if they are too large), and set RANKAWARE_CACHE to their folder. Copy pip's packages as
wheels (`python -m pip download --only-binary=:all: -d wheels`, then `pip install --no-index --find-links wheels`).
Tokens and pretrained networks are made on the machine itself, in the cache: 4 GB.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from gpu import checks, smollm2, steps, width
from gpu.setup import Setup, rows_in
from recording import RESULTS, machine, written_by
from study.domains import DomainError
from study.domains._llama import BROWN, CODE
from study.domains._wordnet import WORDNET
from study.domains.language_smollm2 import SMOLLM2

RESTS_ON = ()
# most useful per minute first
PIECES = {
    "checks": checks,
    "step_cost": steps,
    "width": width,
    "smollm2": smollm2,
}
PUBLISHED, TRIED = RESULTS / "cuda", Path("bench-cuda")


@click.group()
def main() -> None:
    """Run the GPU kit, or write its page."""


OPTIONS = (
    click.option(
        "--device",
        type=click.Choice(("cuda", "cpu")),
        default="cuda",
        show_default=True,
    ),
    click.option(
        "--smallest", is_flag=True, help="Shapes that a CPU runs in a minute."
    ),
    click.option(
        "--into",
        type=click.Path(path_type=Path),
        help=f"Folder of runs [default: results/cuda or {TRIED}].",
    ),
)


def shaped(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that both commands have."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@main.command()
@shaped
@click.option(
    "--piece",
    "chosen",
    multiple=True,
    type=click.Choice(tuple(PIECES)),
    help="Pieces [default: all].",
)
@click.option(
    "--minutes",
    default=9.0,
    show_default=True,
    help="Start no run after so many minutes.",
)
def run(
    chosen: tuple[str, ...],
    minutes: float,
    device: str,
    smallest: bool,
    into: Path | None,
) -> None:
    """Run what is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "There is no CUDA device here. To try the kit, use --device cpu --smallest."
        )
    setup = Setup(
        device,
        smallest,
        folder_of(device, smallest, into),
        time.monotonic() + 60 * minutes,
    )
    for name in chosen or PIECES:
        try:
            PIECES[name].run(setup)
        except DomainError as error:
            raise click.ClickException(
                f"{name}: {error} Finished runs are kept."
            ) from error


@main.command()
@shaped
def table(device: str, smallest: bool, into: Path | None) -> None:
    """Write the page from the runs on file."""
    folder = folder_of(device, smallest, into)
    setup = Setup(device, smallest, folder, 0.0)
    parts = [part for piece in PIECES.values() for part in piece.blocks(setup)]
    if not parts:
        raise click.ClickException(
            f"There is nothing in {folder}. Run first: python benchmarks/gpu/kit.py run."
        )
    page = folder.with_suffix(".md")
    page.write_text(
        "\n\n".join(
            [f"# On {' and '.join(cards(folder))}", *parts, written_by(machine(1))]
        )
        + "\n"
    )
    click.echo(page.read_text())


def cards(folder: Path) -> list[str]:
    """The names of all devices that made the rows on file."""
    rows = [row for store in sorted(folder.glob("*.jsonl")) for row in rows_in(store)]
    tests = folder / checks.STORE
    rows += [json.loads(tests.read_text())] if tests.exists() else []
    return list(
        dict.fromkeys(row["machine"]["device"] for row in rows if "machine" in row)
    )


def folder_of(device: str, smallest: bool, into: Path | None) -> Path:
    """The folder of runs. Runs on a CPU or of the smallest shapes are not published."""
    return into or (PUBLISHED if device == "cuda" and not smallest else TRIED)


@main.command()
def archives() -> None:
    """Fetch the archives that the pieces read, and print their paths."""
    for asset in (BROWN, CODE, WORDNET, SMOLLM2):
        click.echo(asset.path())


if __name__ == "__main__":
    main()
