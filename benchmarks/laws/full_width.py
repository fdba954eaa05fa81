"""Which width decides full finetuning: error of the law's full rate, from LoRA rates tuned at Init[A] and Init[B].

    python benchmarks/laws/full_width.py sweep    # the demo's network: every rate, rank and seed; resumable, ~8 minutes
    python benchmarks/laws/full_width.py table     # benchmarks/results/full_width.md

The best rates of the three other networks come from this project's small sweeps (AdamW, cosine decay to a tenth). They
are a byte-level transformer and a DiT, both of width 128 with MLPs four times as wide, and SmolLM2-135M (width 576, k
and v 192, MLP 1536).
"""

from __future__ import annotations

import math

import click
import torch
from laws.bench_law import FOLLOWS, append
from recording import RESULTS, machine

from rankaware_optim import Factor, MuA, Reference
from rankaware_optim.cli._demo import SEEDS, STEPS, run_at
from rankaware_optim.fitting import Prior, fit_observations
from rankaware_optim.sweeps import DEMO_SWEEP
from rankaware_optim.sweeps._runs import SweepRun, observation_of, read_sweep

RESTS_ON = ("laws.adam", "fit")
RANKS = (4, 16, 64, None)
EXPONENTS = range(-15, -3)

# Network, init, rank (s = 1), log2 of the best LoRA rate, log2 of the best full rate, (model width, mean, largest).
BLOCK_128, SMOLLM2, LITE0 = (128, 256, 512), (576, 816, 1536), (192, 567, 1152)
KNOWN = [
    ("transformer", "A", 16, -6.5, -9.2, BLOCK_128),
    ("transformer", "A", 64, -7.6, -9.2, BLOCK_128),
    ("DiT", "A", 8, -6.9, -9.7, BLOCK_128),
    ("DiT", "A", 32, -7.8, -9.7, BLOCK_128),
    ("SmolLM2-135M", "A", 4, -7.8, -12.8, SMOLLM2),
    ("SmolLM2-135M", "A", 64, -10.1, -12.8, SMOLLM2),
    ("transformer", "B", 64, -8.2, -9.2, BLOCK_128),
    ("DiT", "B", 32, -8.0, -9.7, BLOCK_128),
    ("SmolLM2-135M", "B", 64, -11.7, -12.8, SMOLLM2),
]
# prior exponent of Init[B]'s drift in rank, applied from the rank up to the width
DRIFT_B = -0.45


@click.group()
def main() -> None:
    """Sweep the demo's network, or make the table."""


@main.command()
def sweep() -> None:
    """Append every missing run to the package's sweep, rankaware_optim/sweeps/demo_sweep.csv."""
    torch.set_num_threads(1)
    done = {(run.rank, run.lr, run.seed) for run in _runs()}
    for rank in RANKS:
        for exponent in EXPONENTS:
            for seed in SEEDS:
                run = (rank, 2.0**exponent, seed)
                if run not in done:
                    width = LITE0[2] if rank is None else LITE0[1]
                    append(
                        FOLLOWS,
                        rank or "full",
                        rank,
                        width,
                        run[1],
                        seed,
                        f"{run_at(run):.4f}",
                    )


@main.command()
def table() -> None:
    """Write results/full_width.md."""
    vertices = _demo_vertices()
    rows = [
        *KNOWN,
        *(
            ("EfficientNet-lite0", "A", r, vertices[r], vertices[None], LITE0)
            for r in RANKS[:3]
            if r
        ),
    ]
    heads = (
        "network",
        "init",
        "rank",
        "best LoRA",
        "best full",
        "model width",
        "mean",
        "largest",
    )
    lines = [
        "# Which width decides full finetuning",
        "",
        _story(rows),
        "",
        "| " + " | ".join(heads) + " |",
    ]
    lines.append("|" + "---|" * len(heads))
    for name, init, rank, lora, full, widths in rows:
        errors = [_error(init, rank, lora, full, widths[1], width) for width in widths]
        lines.append(
            f"| {name} | {init} | {rank} | {lora:.2f} | {full:.2f} | "
            + " | ".join(f"{e:+.2f}" for e in errors)
            + " |"
        )
    lines += [
        "",
        f"Made by `python benchmarks/laws/full_width.py table` on {machine(1)}",
    ]
    lines.append(
        f"EfficientNet-lite0: {STEPS} steps, seeds {SEEDS}, grid of one octave, the package's `demo_sweep.csv`."
    )
    (RESULTS / "full_width.md").write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


def _story(rows: list) -> str:
    def summary(init: str, index: int) -> str:
        errors = [
            _error(i, r, lora, full, w[1], w[index])
            for _, i, r, lora, full, w in rows
            if i == init
        ]
        mean = sum(errors) / len(errors)
        return f"{mean:+.2f} ± {math.sqrt(sum((e - mean) ** 2 for e in errors) / (len(errors) - 1)):.2f}"

    return (
        "log2 of the law's point for full finetuning (MuA, 8 tokens) over the best rate found, octaves, with the LoRA "
        "rate read at the mean fan-in and full finetuning at the width named; under Init[B] with the prior drift "
        f"{DRIFT_B} continued from the rank to the width. Mean ± sd from Init[A]: mean width {summary('A', 1)}, "
        f"largest {summary('A', 2)}; from Init[B]: mean width {summary('B', 1)}, largest {summary('B', 2)}. So "
        "`Survey.full_width` is the largest from Init[A] and the mean from Init[B], with a factor of 1 ± 0.4 octaves."
    )


def _error(
    init: str, rank: int, lora: float, full: float, mean: float, width: float
) -> float:
    """Octaves by which the law's full rate lies above the best one found."""
    reference = Reference(rank, rank, init=init, fan_in=mean)  # type: ignore[arg-type]
    moved = math.log2(
        MuA(tokens=8.0).multiplier(
            Factor("full", "full", None, width, width), reference
        )
    )
    drift = DRIFT_B * math.log2(width / rank) if init == "B" else 0.0
    return lora + moved + drift - full


def _demo_vertices() -> dict[int | None, float]:
    mine = [
        run
        for run in _runs()
        if run.rank in RANKS and run.seed in SEEDS and math.log2(run.lr) in EXPONENTS
    ]
    fit = fit_observations(
        [observation_of(run, math.log2(run.lr)) for run in mine], Prior()
    )
    assert fit is not None
    return {rank: mean for rank, (mean, _) in fit.vertices.items()}


def _runs() -> list[SweepRun]:
    return [run for run in read_sweep(DEMO_SWEEP).runs if run.model == FOLLOWS]


if __name__ == "__main__":
    main()
