"""Rank-elastic resume: are moments carried to another rank better than new ones?

    python benchmarks/ecosystem/rank_elastic.py

The demo's network learns digits at one rank for 40 steps. Its adapters are then widened or narrowed. Widening draws new
rows of A and sets new columns of B to zero, so that the function stays the same. Narrowing keeps the leading
directions. Training then goes on for 40 steps with on_rank_change="resize" or "reset". The table has the held-out loss
in nats, as a mean over seeds, and the paired difference.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from itertools import islice
from typing import Any

import click
import torch
from recording import RESULTS, machine, page
from torch import nn

from rankaware_optim import RankAwareOptimizer, Reference
from rankaware_optim.cli._demo import HEAD_RATE, build, evaluate, fit

RESTS_ON = ("optimizer",)
CHANGES = ((8, 32), (32, 8))
CHECKS = (1, 3, 10, 40)
POLICIES = ("resize", "reset")
HEADS = ("change", "steps after", *POLICIES, "resize − reset (± standard error)")
LR, AT = 2e-3, Reference(rank=8, alpha=8)


@click.command()
@click.option("--seeds", default=5, show_default=True)
def main(seeds: int) -> None:
    """Write results/rank_elastic.md and .json."""
    torch.set_num_threads(1)
    on = machine(1)
    rows = [row for change in CHANGES for seed in range(seeds) for row in run(change, seed)]
    (RESULTS / "rank_elastic.json").write_text(json.dumps({"machine": on, "rows": rows}, indent=1) + "\n")
    notes = [f"Held-out loss in nats, {seeds} seeds."]
    text = page("Moments carried to another rank, against moments reset to zero", HEADS, [*table(rows)], on, notes)
    (RESULTS / "rank_elastic.md").write_text(text)
    click.echo(text)


def run(change: tuple[int, int], seed: int) -> list[dict[str, Any]]:
    """Both policies from the same checkpoint, on the same batches."""
    before, after = change
    torch.manual_seed(seed)
    model = build(before)
    opt = optimizer(model)
    for _ in fit(model, opt, seed):  # the demo's 40 steps
        pass
    rows = []
    for policy in POLICIES:
        torch.manual_seed(seed)
        other = build(after)
        copy_adapters(model, other)
        resumed = optimizer(other, on_rank_change=policy)
        resumed.load_state_dict(opt.state_dict())
        losses = dict(zip(CHECKS, train_and_check(other, resumed, seed), strict=True))
        rows.append({"from": before, "to": after, "seed": seed, "policy": policy, "losses": losses})
    return rows


def optimizer(model: nn.Module, **options: str) -> RankAwareOptimizer:
    """AdamW at the demo's rates; trained adapters keep their declared init."""
    rates = {"*classifier*": HEAD_RATE}
    return RankAwareOptimizer(model, torch.optim.AdamW, lr=LR, tuned_at=AT, weight_decay=0.01, rates=rates, **options)


def train_and_check(model: nn.Module, opt: RankAwareOptimizer, seed: int) -> list[float]:
    """Held-out loss after 1, 3, 10 and 40 steps."""
    losses, done = [], 0
    for check in CHECKS:
        for _ in islice(fit(model, opt, 1000 * (seed + 1) + done), check - done):
            pass
        losses.append(evaluate(model))
        done = check
    return losses


@torch.no_grad()
def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters. Adapters of another rank share the leading directions, and B's other columns are zero."""
    own = dict(target.named_parameters())
    for name, value in source.named_parameters():
        param = own[name]
        if value.shape == param.shape:
            param.copy_(value)
            continue
        if "lora_B" in name:
            param.zero_()
        shared = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, param.shape, strict=True))
        param[shared] = value[shared]


def table(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Means by policy and the paired difference with its standard error."""
    for before, after in CHANGES:
        for check in CHECKS:
            both = {p: [r["losses"][check] for r in rows if r["policy"] == p and r["to"] == after] for p in POLICIES}
            gaps = [a - b for a, b in zip(both["resize"], both["reset"], strict=True)]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps))
            means = [f"{statistics.mean(both[p]):.3f}" for p in POLICIES]
            yield [f"{before} → {after}", str(check), *means, f"{statistics.mean(gaps):+.3f} ± {error:.3f}"]


if __name__ == "__main__":
    main()
