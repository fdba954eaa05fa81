"""Draw the best learning rate over the rank, as the default law predicts it, relative to rank 16 at init A."""

from pathlib import Path

from matplotlib import pyplot

from rankaware_optim import Falling, Reference

WIDTH, LARGEST = 6853, 14336  # mean and largest fan-in of an 8B Llama's linear layers
RANKS = range(1, 257)
TICKS = (1, 4, 16, 64, 256)
AT = Reference(rank=16, alpha=16, fan_in=WIDTH)
LAW = Falling()


def line(alpha, init="A"):
    """Return the multiplier at each of RANKS. `alpha` is a function of the rank."""
    at_each = (
        Reference(rank=r, alpha=alpha(r), init=init, fan_in=WIDTH) for r in RANKS
    )
    return [LAW.multiplier(reference.as_factor(), AT) for reference in at_each]


figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
full = LAW.multiplier(Reference(method="full", fan_in=LARGEST).as_factor(), AT)
lines = {
    "init A, alpha = rank": (line(lambda r: r), "#0072B2", "-"),
    "init A, alpha = 16": (line(lambda r: 16), "#D55E00", "-"),
    "init B, alpha = rank": (line(lambda r: r, "B"), "#009E73", "--"),
    "full finetuning": ([full] * len(RANKS), "0.4", ":"),
}
for label, (values, colour, style) in lines.items():
    axis.plot(RANKS, values, style, color=colour)
    axis.annotate(
        label,
        (RANKS[-1], values[-1]),
        (6, 0),
        textcoords="offset points",
        color=colour,
        va="center",
    )
axis.plot(16, 1, "o", color="#0072B2")
axis.annotate("tuned here", (16, 1), (-4, -14), textcoords="offset points", ha="right")
axis.set(
    xscale="log",
    yscale="log",
    xlabel="rank",
    ylabel="best learning rate,\nrelative to rank 16",
    xlim=(1, RANKS[-1]),
)
axis.set_xticks(TICKS, list(map(str, TICKS)))
axis.set_yticks(
    [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]
)
axis.minorticks_off()
axis.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
