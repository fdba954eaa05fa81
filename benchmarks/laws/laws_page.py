"""All evidence for the laws on one page: exponents by formula and by check, a real sweep, the yardstick.

    python benchmarks/laws/laws_page.py        # results/laws.md and results/laws-*.png

It reads the result files of exponents.py and bench_law.py. If the exponents (10 minutes) or
the yardstick (a minute, needs the published sweep) are missing, it makes them first.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
from laws import bench_law, exponents
from laws.scoring import LawScore
from laws.scoring import bench_law as scores_on
from matplotlib.figure import Figure
from recording import RESULTS, machine, page, shown, written_by

from rankaware_optim._figures import COLOURS
from rankaware_optim.sweeps import DEMO_SWEEP

RESTS_ON = ("laws.adam", "laws.lamb")
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "sft_sweep.csv"
PUBLISHED_ALPHA = 32.0
LAWS = dict(
    zip(
        bench_law.AT_INIT_A,
        (
            "µA, 1 token (the default)",
            "µA, the paper's",
            "constant",
            "LoRA+",
            "1/r",
            "r^-1/2",
        ),
        strict=True,
    )
)
OF_FAMILIES = (
    "What the laws of SGD, Muon, LAMB and Adafactor do in a real sweep: "
    "[the laws on a small real sweep](law_check.md), which is frozen."
)
Rows = list[dict[str, Any]]


@click.command()
@click.option(
    "--published",
    type=click.Path(path_type=Path),
    default=PUBLISHED,
    help="The published sweep, alpha 32.",
)
def main(published: Path) -> None:
    """Write results/laws.md and its figures."""
    _make_missing(published)
    rates = exponents.load()["log2_rates"]
    found = [
        row for label in exponents.OPTIMIZERS for row in exponents.rows_of(label, rates)
    ]
    _draw_exponents(found, RESULTS / "laws-exponents.png")
    _draw_errors(published, RESULTS / "laws-errors.png")
    parts = [
        "# The laws, shown",
        OF_FAMILIES,
        *_exponents_page(found),
        *_yardstick_page(),
    ]
    (RESULTS / "laws.md").write_text(
        "\n\n".join([*parts, written_by(machine(1))]) + "\n"
    )
    click.echo(f"{RESULTS / 'laws.md'}, laws-exponents.png, laws-errors.png")


def _make_missing(published: Path) -> None:
    if not exponents.STORE.exists():
        exponents.run.callback(only=None, widest=max(exponents.WIDTHS))
        exponents.table.callback()
    if not (RESULTS / "bench_law.json").exists():
        if not published.exists():
            raise click.ClickException(
                f"results/bench_law.json and {published} are missing. Give --published a sweep."
            )
        bench_law.table.callback(published=published, alpha=PUBLISHED_ALPHA)


def _demoted(text: str) -> str:
    """A result's page as a section of this page: every heading one level deeper."""
    return re.sub(r"^(#+ )", r"#\1", text.strip(), flags=re.MULTILINE)


# --- exponents ------------------------------------------------------------------------------------------------------


def _exponents_page(rows: Rows) -> Iterator[str]:
    """Worst differences by family × init × γ × tokens, and each optimizer's verdict."""
    heads = [
        "family",
        "optimizers",
        "bar",
        "init",
        "gamma",
        *(f"{tokens} tokens" for tokens in exponents.TOKENS),
    ]
    notes = [
        "Worst difference between formula and check over a family's optimizers: in the exponent of the rank, then of "
        "the width. Every exponent is in [exponents.md](exponents.md). gamma: s goes as r^-gamma. The bar is the "
        "task's, for its three families; the others have none.",
        "\n".join(
            exponents.summary(rows, label)
            for label in dict.fromkeys(row["optimizer"] for row in rows)
        ),
        "![Exponents: formula against check](laws-exponents.png)",
    ]
    title = "Exponents of the best rate: formula against check"
    yield _demoted(page(title, heads, _worst_cells(rows), exponents.made_on(), notes))


def _worst_cells(rows: Rows) -> list[list[str]]:
    cells = []
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family]
        start = [
            family,
            str(len({row["optimizer"] for row in mine})),
            f"{exponents.BARS[family]:g}" if family in exponents.BARS else "–",
        ]
        for init, gamma in itertools.product("AB", exponents.GAMMAS):
            at = [row for row in mine if (row["init"], row["gamma"]) == (init, gamma)]
            worst = [
                _worst([row for row in at if row["tokens"] == tokens])
                for tokens in exponents.TOKENS
            ]
            cells.append([*start, init, f"{gamma:g}", *worst])
    return cells


def _worst(rows: Rows) -> str:
    """The largest differences in rank and in width, and how many cells no rate solves."""
    reached = [row for row in rows if _reached(row)]
    if not reached:
        return "not reached" if rows else "–"
    worst = ", ".join(
        f"{max(abs(float(row[f'{x}: off'])) for row in reached):.2f}" for x in "rn"
    )
    missed = len(rows) - len(reached)
    return f"{worst} ({missed} of {len(rows)} not reached)" if missed else worst


def _reached(row: dict[str, Any]) -> bool:
    return row["r: off"] != "not reached"


def _draw_exponents(rows: Rows, path: Path) -> None:
    """Draw a panel per family: the formula's exponents against the check's, with the bar shaded about the diagonal."""
    solved = [row for row in rows if _reached(row)]
    families = list(dict.fromkeys(row["family"] for row in solved))
    figure = Figure(figsize=(3.3 * len(families), 4.6), layout="constrained")
    axes = figure.subplots(1, len(families), squeeze=False)[0]
    for axis, family in zip(axes, families, strict=True):
        _draw_family(axis, family, [row for row in solved if row["family"] == family])
    axes[0].set_ylabel("exponent by the formula")
    figure.suptitle(
        "Exponents of the best rate, in rank (●) and in width (○): formula against check",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def _draw_family(axis: Any, family: str, rows: Rows) -> None:
    bar = exponents.BARS.get(family)
    values = [
        float(row[f"{x}: {by}"])
        for row in rows
        for x in "rn"
        for by in ("check", "formula")
    ]
    ends = [min(values) - 0.3, max(values) + 0.3]
    axis.plot(ends, ends, color="0.5", linewidth=0.8, zorder=0)
    if bar is not None:
        axis.fill_between(
            ends,
            [e - bar for e in ends],
            [e + bar for e in ends],
            color="0.88",
            lw=0,
            zorder=-1,
        )
    for label, colour in zip(
        dict.fromkeys(row["optimizer"] for row in rows), COLOURS, strict=False
    ):
        mine = [row for row in rows if row["optimizer"] == label]
        for x, face in (("r", colour), ("n", "none")):
            pairs = [
                [float(row[f"{x}: {by}"]) for row in mine]
                for by in ("check", "formula")
            ]
            axis.plot(
                *pairs,
                "o",
                color=colour,
                markerfacecolor=face,
                markersize=4,
                label=label if x == "r" else None,
            )
    axis.set(xlim=ends, ylim=ends, aspect="equal", xlabel="exponent by the check")
    axis.set_title(f"{family}{'' if bar is None else f', bar {bar:g}'}", fontsize=10)
    axis.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18)
    )
    axis.set_anchor("N")


# --- the yardstick --------------------------------------------------------------------------------------------------


def _yardstick_page() -> Iterator[str]:
    """A table per sweep: errors in octaves and losses by law, with both ways of finding a best rate."""
    document = json.loads((RESULTS / "bench_law.json").read_text())
    notes = [
        "Each cell: median, worst. A best rate lies by the parabola through its best three, or by the calibration's "
        "bowl; in the figure by the parabola.",
        *document["notes"],
        "LoRA+ moves A's rate, which is what is compared here, as the constant law does; with a fixed alpha so does "
        "the paper's law under Init[A]: their rows agree there.",
        "![Errors in octaves by law](laws-errors.png)",
    ]
    for sweep in dict.fromkeys(row["sweep"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["sweep"] == sweep]
        yield _demoted(
            page(
                f"Laws on {sweep}", *_yardstick_cells(rows), document["machine"], notes
            )
        )
        notes = []  # only under the first table


def _yardstick_cells(rows: Rows) -> tuple[list[str], list[list[str]]]:
    finders = list(dict.fromkeys(row["best rate by"] for row in rows))
    heads = [
        "law",
        *(
            f"{by}: {what}"
            for by in finders
            for what in ("octaves", "loss lost", "off the grid")
        ),
    ]
    found = {(row["law"], row["best rate by"]): row for row in rows}
    laws = dict.fromkeys(row["law"] for row in rows)
    return heads, [
        [_law_name(law), *(c for by in finders for c in _score_cells(found[law, by]))]
        for law in laws
    ]


def _law_name(text: str) -> str:
    tokens = text.removeprefix("mua?tokens=")
    return (
        f"µA, {tokens} tokens"
        if tokens != text
        else LAWS.get(text, text.replace("mua", "µA"))
    )


def _score_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    losses = (_share(row["median_loss"]), _share(row["worst_loss"]))
    octaves = f"{row['median_octaves']:.2f}, {row['worst_octaves']:.2f}"
    return octaves, ", ".join(losses), f"{row['off_grid']} of {row['moves']}"


def _share(loss: float | str | None) -> str:
    """A cell for a loss above the best: "inf" on file means that a run diverged, None that no move is on the grid."""
    return (
        "–"
        if loss is None
        else "diverged"
        if float(loss) == float("inf")
        else f"{shown(100 * float(loss))} %"
    )


def _draw_errors(published: Path, path: Path) -> None:
    """Draw a panel per sweep and a strip per law, with the error of every move."""
    sources = {DEMO_SWEEP: None} | (
        {published: PUBLISHED_ALPHA} if published.exists() else {}
    )
    figure = Figure(figsize=(1.5 + 5.0 * len(sources), 4.2), layout="constrained")
    axes = figure.subplots(1, len(sources), squeeze=False, sharey=True)[0]
    for axis, (source, alpha) in zip(axes, sources.items(), strict=True):
        _draw_strips(axis, scores_on(source, bench_law.AT_INIT_A, alpha=alpha))
        axis.set_title(source.name, fontsize=10)
    axes[0].set_yticks(range(len(LAWS)), list(LAWS.values()))
    axes[0].invert_yaxis()
    figure.suptitle(
        "A best rate moved to every higher rank (a dot): octaves above the best one there",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def _draw_strips(axis: Any, scores: Sequence[LawScore]) -> None:
    """Draw moves to higher ranks only, as moves back have the opposite errors; the axis is linear within an octave."""
    for y, score in enumerate(scores):
        errors = sorted(
            move.octaves for move in score.moves if move.target.rank > move.source.rank
        )
        spread = [y + 0.3 * ((7 * i) % 11 - 5) / 5 for i in range(len(errors))]
        axis.plot(
            errors,
            spread,
            "o",
            color=COLOURS[y == 0],
            alpha=0.45,
            markersize=4,
            markeredgewidth=0,
        )
        axis.vlines(median(errors), y - 0.4, y + 0.4, color="black", linewidth=1.5)
    axis.axvline(0.0, color="0.5", linestyle="--", linewidth=1, zorder=0)
    axis.set_xscale("symlog", base=2, linthresh=1.0)
    axis.set_xlim(-10, 10)
    axis.set_xticks([-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8])
    axis.xaxis.set_major_formatter(
        lambda x, _: f"{x:g}".replace("0.5", "½").replace("-", "−")
    )
    axis.minorticks_off()
    axis.set_xlabel("error, octaves (line: the median)")


if __name__ == "__main__":
    main()
