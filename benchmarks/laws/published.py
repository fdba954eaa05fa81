"""Do the shipped laws hold on sweeps that others published?

    python benchmarks/laws/published.py table sft_sweep.md rank_x_lr_results.json

Writes results/published.md from files that are not in the repository. Their licences allow their use. A file
must be one of `SOURCES`, and its hash must be that of the file that was read. Each law moves every best rate found at a
rank to every other rank of its model, as bench_law.py does.

**Looked for** on 2026-11-26 and 2026-11-30, in a stored index of public repositories and pages: a sweep of several ranks, with several
rates at each rank, a held-out score and a licence. **Left out**, and why:

* huggingface/peft, method_comparison (Apache-2.0): LoRA at several ranks, with one or two rates each.
* nikhil-ghosh-berkeley/loraplus (MIT): rates of A against rates of B, and scripts without results.
* nayyirahsan/LoRA-Rank-Threshold-Study (no licence file): ranks 4 and 64 at three rates.
* silversuncn/lora-rank-scaling (no licence file): six ranks at one rate.
* Four repositories called LoRA without regret, by waynehacking8, olokevin, kyleliang919 and Brokttv: one rate per rank,
  pictures, or only scripts.
* The paper of µA (arXiv 2602.06204, CC BY 4.0): the stored copy shows its sweeps as figures, without the numbers.
* On the Scaling of PEFT (arXiv 2606.02437) and its authors' report on ranks and rates under three rules of alpha
  (DistilBERT at eight ranks, Qwen3-4B at four): stored are the abstract and the report's text. Its sweeps are pictures
  at another address, and no repository of the authors that is stored has them by name. The text says what we say: with
  alpha / rank fixed the best rate falls with rank, with alpha kept it hardly moves. It also says that Qwen3-4B-Instruct
  on MATH does best near 7e-7, the lowest rate tried: far below every band of `suggest_lr`.
* The Hidden Power of Scaling Factor in LoRA Optimization (arXiv 2606.12883, CC BY 4.0): the stored copy is the paper's
  beginning, without its sweeps over alpha and rate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from internals import Source as Rows
from laws import learning_rate_matters, tinker
from laws.scoring import bench_law
from recording import machine, record

from rankaware_optim import Constant, MuA, Power

RESTS_ON = ("laws.adam", "transfer")
LAWS = (
    "mua",
    MuA(tokens=8.0),  # of `suggest_lr`
    "mua-paper",
    "constant",
    Power(-0.5, law=Constant()),
    Power(-1.0, law=Constant()),
)
NOTES = (
    "Octaves: |log2(moved rate / best rate found there)|. Loss: the loss at the moved rate, by a monotone spline "
    "between the rates tried, less the lowest, as a share of it. `off_grid`: moves beyond the rates tried, of unknown "
    "loss. bench_law.md has more laws on all 35 models.",
)


@dataclass(frozen=True)
class Source:
    """A published file: its origin, licence and hash, the function that reads it, and how we understand it."""

    origin: str
    licence: str
    sha256: str
    read: Callable[[Path], Rows]
    reading: str

    def words(self, name: str) -> str:
        return f"**{name}**: {self.origin}, {self.licence}, sha256 {self.sha256[:16]}. {self.reading}"


def grid(path: Path) -> Rows:
    """Read LoRA's sweep from a file of {method: {"ranks": {rank: {"lrs": [...], "acc": [...]}}}}."""
    ranks = json.loads(path.read_text())["lora"]["ranks"]
    rows: list[dict[str, Any]] = [
        {
            "model": "two-layer transformer",
            "rank": int(rank),
            "alpha": int(rank),
            "fan_in": 448,
            "lr": lr,
            "loss": 1 - acc,
        }
        for rank, found in ranks.items()
        for lr, acc in zip(found["lrs"], found["acc"], strict=True)
    ]
    return rows


SOURCES = {
    "sft_sweep.md": Source(
        "github.com/thinking-machines-lab/tinker-cookbook, tinker_cookbook/recipes/chat_sl/results/, commit 9dfcc3a2",
        "Apache-2.0",
        "ef4d8afaf871dd890141f22e74dce83640b38131d35f7fccd3439d473f624682",
        tinker.added,
        "Supervised finetuning of 35 language models on Tulu 3, AdamW, batch 128, 780 steps: test losses on a grid of "
        "ranks and rates, no rate by a formula. Alpha is 32 by that service's documentation, Init[A] is assumed, and runs "
        "that diverged are left out. The default law was chosen after a look at 18 of the models. Here laws are scored on "
        "the 17 that were added since.",
    ),
    "rank_x_lr_results.json": Source(
        "github.com/agme2019/lora-lr-rank-sensitivity, artifacts/, commit 8676b5ea",
        "MIT",
        "63caf55a2f361967f93ef2e9e578fbb1192ad9b05f8a4a582ea4977a9a7187f9",
        grid,
        "LoRA at ranks 2 to 32 and 16 rates on a synthetic task of 64 classes, a transformer of two layers and width "
        "192, AdamW at a constant rate, one seed. What is scored is 1 − accuracy; A is drawn with standard deviation "
        ".02 and alpha is the rank, so Init[A] and s = 1, by the repository's code, whose grid of rates and ranks is "
        "not quite the file's. It says little: accuracy goes from 1.6 % to 7 %, of some 1,200 examples, so a best rate "
        "is known to an octave at most; 1 % lost is .9 points of it.",
    ),
}


@click.group()
def main() -> None:
    """Score the shipped laws on sweeps that others published."""


@main.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
def table(files: tuple[Path, ...]) -> None:
    """Write results/published.md."""
    rows = [row for path in files for row in rows_of(path)]
    read = [SOURCES[path.name].words(path.name) for path in files]
    looked = "**Looked for** " + (__doc__ or "").partition("**Looked for**")[2].strip()
    record(
        "published",
        "Laws on sweeps that others published",
        rows,
        machine(1),
        [*NOTES, *read, explained(), learning_rate_matters.tables(), looked],
    )


def explained() -> str:
    """What stands before the tables of Learning Rate Matters."""
    return (learning_rate_matters.__doc__ or "").strip()


def known(path: Path) -> Source:
    """The source of a file, which must be the one that was read."""
    source = SOURCES.get(path.name)
    if source is None or hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
        raise click.ClickException(
            f"{path} is none of the files that were read. Name one of: {', '.join(SOURCES)}."
        )
    return source


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Every law's moves on a file, with both ways of finding a best rate."""
    source = known(path)
    sweep = source.read(path)
    for best in ("parabola", "bowl"):
        for score in bench_law(sweep, LAWS, best=best):
            yield {"sweep": path.name, "best rate by": best, **score.row()}


if __name__ == "__main__":
    main()
