"""The paper's study, scaled down to two cores: which rate is best at each rank, by domain and configuration.

    tox run -e bench -- --suite quick                               # minutes, a small part of it
    tox run -e bench -- --suite full --domain image_generation      # resumable: every finished run is kept
    tox run -e bench -- --suite full --tables                       # tables and figures of the runs on file

The recipe is the paper's: AdamW, betas 0.9 and 0.999, epsilon 1e-8, weight decay 0.01, gradients clipped at norm 1,
5 % warm-up and then a cosine to a tenth of the rate. Heads have a fixed rate. Rates are an octave apart. A coarse pass
of one seed, with rates two octaves apart, places a grid of seven rates at each rank. If a grid's best rate is at an
edge, the grid grows there.

A large domain is one where a run takes more than a minute. It has one seed, no rank 1, and grids of five rates, placed
by rates three octaves apart. rsLoRA and LoRA+ are run at two ranks only. This was set before any of its runs, to
limit their time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from recording import RESULTS, machine, written_by
from study.configurations import CONFIGS, LORAPLUS, RSLORA, START, run_at, starts
from study.domains import STUDY, Domain, DomainError, get_domain, weights_hash
from study.grids import FULL, Cell, Grid, Job, Losses
from study.optima import best_rates, domains_in
from study.runs_on_file import complete, machines, read
from study.suite_tables import tables

from rankaware_optim.errors import RankAwareError

RESTS_ON = ("laws", "recipe")
README = RESULTS.parents[1] / "README.md"
STORES, PAGE = RESULTS / "suite", RESULTS / "study.md"
QUICK_DOMAINS, QUICK_STORES = ("vision_classification",), Path("bench-quick")
NOTED = ("cpu", "cores", "threads", "torch", "python")  # what tables show of a machine
FIRST_CONFIG = next(iter(CONFIGS))
COMPARED = FIRST_CONFIG + LORAPLUS  # beside the configurations


def coarse_pass(lora: range, raised: range, full: range) -> dict[str, range]:
    """log2 rates of the coarse pass, by scheme.

    Args:
        lora: rates of the LoRA configurations.
        raised: base rates of LoRA+, which gives B a higher rate than A.
        full: rates of full finetuning. They go as high as LoRA's, to score LoRA rates in full finetuning.
    """
    return {**dict.fromkeys((*CONFIGS, *RSLORA), lora), COMPARED: raised, "full": full}


COARSE = coarse_pass(range(-13, -2, 2), range(-15, -4, 2), range(-15, -2, 2))
SPARSE = coarse_pass(range(-13, -2, 3), range(-15, -5, 3), range(-15, -2, 3))


@dataclass(frozen=True)
class Part:
    """Schemes that are swept in the same way.

    Args:
        schemes: their names.
        ranks: the ranks of each.
        seeds: how many seeds.
        half: octaves of the grid on either side of the coarse pass's best rate.
        coarse: log2 rates of the coarse pass, by scheme.
    """

    schemes: tuple[str, ...]
    ranks: tuple[int, ...]
    seeds: int
    half: int
    coarse: Mapping[str, range]

    def cells(self, domain: str) -> list[Cell]:
        return [
            (domain, scheme, rank) for scheme in self.schemes for rank in self.ranks
        ]

    def grid(self, cells: Sequence[Cell]) -> Grid:
        return Grid(cells, self.coarse, self.seeds, self.half)


def parts(domain: str, suite: str) -> tuple[Part, ...]:
    """The parts that a suite runs on a domain; the configurations of the paper's claims come first."""
    found = get_domain(domain)
    ranks = found.ranks_swept
    if suite == "quick":
        quick = {FIRST_CONFIG: range(-11, -4, 2), "full": range(-13, -6, 2)}
        return (
            Part((FIRST_CONFIG,), (4, 16, 64), 1, 2, quick),
            Part(("full",), (FULL,), 1, 2, quick),
        )
    if found.large:
        return study(ranks[1:], ranks[1::2], 1, 2, SPARSE)
    return study(ranks, ranks, 3, 3, COARSE)


def study(
    ranks: tuple[int, ...],
    fewer: tuple[int, ...],
    seeds: int,
    half: int,
    coarse: Mapping[str, range],
) -> tuple[Part, ...]:
    """The configurations of the paper's claims at all `ranks`, and those for comparison at the ranks `fewer`."""
    return (
        Part(tuple(CONFIGS), ranks, seeds, half, coarse),
        Part(("full",), (FULL,), seeds, half, coarse),
        Part(tuple(RSLORA), fewer, 1, half, coarse),
        Part((COMPARED,), fewer, 1, half, coarse),
    )


@click.command()
@click.option(
    "--suite", type=click.Choice(("quick", "full")), default="quick", show_default=True
)
@click.option(
    "--domain",
    "chosen",
    multiple=True,
    help="Some domains; by default all, or the quick ones.",
)
@click.option(
    "--workers", default=2, show_default=True, help="Processes of one thread."
)
@click.option(
    "--tables",
    "only_tables",
    is_flag=True,
    help="Only write tables and figures of what is on file.",
)
def main(
    suite: str,
    chosen: tuple[str, ...],
    workers: int,
    only_tables: bool,
) -> None:
    """Run the missing runs, then write the tables and figures."""
    folder = QUICK_STORES if suite == "quick" else STORES
    try:
        todo = [
            get_domain(name).name
            for name in chosen or (QUICK_DOMAINS if suite == "quick" else STUDY)
        ]
        for domain in () if only_tables else todo:
            sweep(domain, suite, folder / f"{domain}.jsonl", workers)
        write(suite, folder)
    except (RankAwareError, OSError) as error:
        raise click.ClickException(f"{error} Finished runs are kept.") from error


def sweep(domain: str, suite: str, store: Path, workers: int) -> None:
    """Run every missing run of a domain, and append it to the store."""
    asked, on = parts(domain, suite), provenance(domain)
    for grid in (
        starts(domain, range(asked[0].seeds)),
        *(part.grid(part.cells(domain)) for part in asked),
    ):
        complete(grid, run_at, store, workers, click.echo, on)


def provenance(domain: str | Domain) -> dict[str, Any]:
    """The row in a store before its runs: commit, machine, versions, and the network's hash before training."""
    found, here = (
        domain if isinstance(domain, Domain) else get_domain(domain),
        machine(1),
    )
    found.warm()
    packages = {
        name: version(name) for name in ("optuna", "peft", "transformers", "timm")
    }
    return {
        **{key: here[key] for key in ("commit", *NOTED)},
        **packages,
        "weights": weights_hash(found),
    }


def finished_in(stores: Iterable[Path], suite: str) -> dict[Job, float | None]:
    """The runs of complete grids in these files."""
    done = {job: loss for store in stores for job, loss in read(store).items()}
    return finished(done, suite)


def finished(done: Losses, suite: str) -> dict[Job, float | None]:
    """The runs of complete grids, since an incomplete one has no best rate."""
    asked = [
        (name, part)
        for name in {job.domain for job in done}
        for part in parts(name, suite)
    ]
    whole = {
        cell
        for name, part in asked
        for cell in part.cells(name)
        if not part.grid([cell]).wanted(done)
    }
    return {
        job: loss
        for job, loss in done.items()
        if job.scheme == START or job[:3] in whole
    }


def write(suite: str, folder: Path) -> None:
    """Write the tables of every domain on file, and their figures."""
    from study.suite_figures import draw_all

    stores = sorted(folder.glob("*.jsonl"))
    done = finished_in(stores, suite)
    if not done:
        raise DomainError(f"{folder} has no runs.", "Run the suite first.")
    page = PAGE if folder == STORES else folder / "tables.md"
    figures = draw_all(done, folder)
    pictures = [f"![{path.stem}]({path.relative_to(page.parent)})" for path in figures]
    whole = domains_in(done)
    made = on_machines(store for store in stores if store.stem in whole)
    text = "\n\n".join(
        [
            "# The study",
            *tables(done),
            *pictures,
            made,
            written_by(machine(1)),
        ]
    )
    page.write_text(f"{text}\n")
    click.echo(text)


UNKNOWN = -8  # log2 of a first rate where the study has none


@cache
def study_rates(domain: str, scheme: str) -> dict[int, float]:
    """log2 of the study's best rates on file, by rank."""
    return best_rates(read(STORES / f"{domain}.jsonl"), domain, scheme)


def on_machines(stores: Iterable[Path]) -> str:
    """The machines that made each domain's runs, in words."""
    said: dict[str, list[str]] = {}
    for store in stores:
        for on in machines(store) or [{"cpu": "not noted"}]:
            named = said.setdefault(
                ", ".join(f"{key} {on[key]}" for key in NOTED if key in on), []
            )
            named += [store.stem] * (store.stem not in named)
    return "\n\n".join(
        f"Machine: {on}: {', '.join(domains)}." for on, domains in said.items()
    )


def publish(readme: Path, name: str, text: str) -> None:
    """Replace the text between the marks of this name in a README."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = readme.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise DomainError(
            f"{readme} lacks {begin} or {end}.",
            "Put both back where the tables belong.",
        )
    readme.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    main()
