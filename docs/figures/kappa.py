"""Draw the size of a sum of m terms of size 1 for several numbers of tokens."""

import math
from pathlib import Path

from matplotlib import pyplot

from rankaware_optim.laws import kappa

M = sorted({round(2 ** (i / 8)) for i in range(97)})
figure, axis = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
lines = {
    "m (the paper's law)": ([float(m) for m in M], "#D55E00", "--"),
    "2 tokens, the default": ([kappa(m, 2.0) for m in M], "#0072B2", "-"),
    "8 tokens": ([kappa(m, 8.0) for m in M], "#CC79A7", "-"),
    "64 tokens": ([kappa(m, 64.0) for m in M], "#009E73", "-"),
    "√m (no token agrees)": ([math.sqrt(m) for m in M], "0.4", ":"),
}
for label, (values, colour, style) in lines.items():
    axis.plot(M, values, style, color=colour)
    axis.annotate(
        label,
        (M[-1], values[-1]),
        (6, 6 if label == "m (the paper's law)" else 0),
        textcoords="offset points",
        color=colour,
        va="center",
    )
axis.set(
    xscale="log",
    yscale="log",
    xlabel="number of terms, m",
    ylabel="size of the sum, κ(m)",
    xlim=(1, M[-1]),
    ylim=(1, M[-1]),
)
axis.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
