"""Do the shipped laws hold on sweeps that others published?

    python benchmarks/laws/published.py sft_sweep.md    # results/published.md

The file is not in the repository. Its licence allows its use, and its hash must be that of the file that was read. Each
law moves every best rate found at a rank to every other rank of its model, as bench_law.py does.

**Looked for** on 2026-11-26 and 2026-11-30, in a stored index of public repositories and pages: a sweep of several ranks, with several
rates at each rank, a held-out score and a licence. **Left out**, and why:

* huggingface/peft, method_comparison (Apache-2.0): LoRA at several ranks, with one or two rates each.
* nikhil-ghosh-berkeley/loraplus (MIT): rates of A against rates of B, and scripts without results.
* nayyirahsan/LoRA-Rank-Threshold-Study (no licence file): ranks 4 and 64 at three rates.
* silversuncn/lora-rank-scaling (no licence file): six ranks at one rate.
* agme2019/lora-lr-rank-sensitivity (MIT): ranks 2 to 32 at 16 rates on a synthetic task, with accuracies of 1.6 to 7 %,
  so that a best rate is known to an octave at most. The default law is .28 octaves off there in the median and a kept
  rate .58. By bowls they are .61 and .31 off (this page at 58e6aeca).
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

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
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


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
def main(path: Path) -> None:
    """Write results/published.md. PATH is sft_sweep.md."""
    rows = list(rows_of(tinker.checked(path)))
    scored = f"{tinker.WORDS} Here laws are scored on the 17 that were added since."
    looked = "**Looked for** " + (__doc__ or "").partition("**Looked for**")[2].strip()
    record(
        "published",
        "Laws on sweeps that others published",
        rows,
        machine(1),
        [*NOTES, scored, explained(), learning_rate_matters.tables(), looked],
    )


def explained() -> str:
    """What stands before the tables of Learning Rate Matters."""
    return (learning_rate_matters.__doc__ or "").strip()


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Every law's moves between ranks of the added models, with both ways of finding a best rate."""
    sweep = tinker.added(path)
    for best in ("parabola", "bowl"):
        for score in bench_law(sweep, LAWS, best=best):
            yield {"best rate by": best, **score.row()}


if __name__ == "__main__":
    main()
