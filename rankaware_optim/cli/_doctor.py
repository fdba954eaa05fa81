"""`rankaware doctor`: print the installed versions, the packages that extras lack, and the GPUs
that torch finds.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import click
from packaging.requirements import Requirement

from ._echo import echo, echo_json
from ._options import json_option
from ._workers import machine_cores

PACKAGE = "rankaware-optim"


_SHAPE = (
    "an object. Fields: python (version), platform, cpus (cores that this process may use), cache"
    " (folder of recipes from the Hugging Face Hub, or null), packages (version by name, null if"
    " not installed), missing (required packages that are missing or too old), extras (the same by"
    " extra), torch. torch has error (of its import, or null), cuda (version that it is built for,"
    " or null) and devices (name and memory_gib of each GPU)."
)


@dataclass(frozen=True)
class Need:
    """A requirement of the package. extra: "" if it is always needed. version: None if it is not
    installed.
    """

    requirement: Requirement
    extra: str
    version: str | None

    @property
    def met(self) -> bool:
        return self.version is not None and self.requirement.specifier.contains(
            self.version, prereleases=True
        )

    @property
    def lacking(self) -> str:
        """The requirement and what is installed, as "matplotlib>=3.8 (not installed)"."""
        found = "not installed" if self.version is None else f"{self.version} is installed"
        return f"{self.requirement.name}{self.requirement.specifier} ({found})"


@click.command()
@json_option(_SHAPE)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Print the installed versions, missing packages and GPUs.

    Extras are sets of optional packages. For each that is not complete, the command that installs
    the rest is printed. The exit code is 1 if a required package is missing or too old.
    """
    needs = tuple(needs_of(metadata.requires(PACKAGE) or ()))
    missing = [need for need in needs if not need.extra and not need.met]
    torch = _torch()
    if as_json:
        echo_json(_document(needs, torch))
    else:
        for line in _sentences(needs, torch):
            echo(line)
    ctx.exit(1 if missing else 0)


def needs_of(requires: Iterable[str]) -> Iterator[Need]:
    """Yield the requirements, as the package's metadata state them, with the installed versions."""
    extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    for text in requires:
        requirement = Requirement(text)
        marker = requirement.marker
        for extra in ["", *extras]:
            if marker is None or marker.evaluate({"extra": extra}):
                yield Need(requirement, extra, _version(requirement.name))
                break


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    """Return torch's import error, the CUDA version that it is built for, and the GPUs that it
    finds.
    """
    try:
        import torch
    except Exception as error:  # a broken build raises OSError, ImportError and others
        return {"error": f"{type(error).__name__}: {error}", "cuda": None, "devices": []}
    devices = []
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        devices.append({"name": found.name, "memory_gib": round(found.total_memory / 2**30, 1)})
    if torch.backends.mps.is_available():
        devices.append({"name": "Apple GPU (mps)", "memory_gib": None})
    return {"error": None, "cuda": torch.version.cuda, "devices": devices}


def _cache() -> str | None:
    """Return the folder of the recipes that huggingface_hub downloads, or None if it is not
    installed.
    """
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return None
    return str(HF_HUB_CACHE)


def _extras(needs: tuple[Need, ...]) -> Mapping[str, list[Need]]:
    return {
        extra: [need for need in needs if need.extra == extra]
        for extra in sorted({n.extra for n in needs} - {""})
    }


def _document(needs: tuple[Need, ...], torch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": machine_cores(),
        "cache": _cache(),
        "packages": {
            PACKAGE: _version(PACKAGE),
            **{need.requirement.name: need.version for need in needs},
        },
        "missing": [need.lacking for need in needs if not need.extra and not need.met],
        "extras": {
            name: [n.lacking for n in own if not n.met] for name, own in _extras(needs).items()
        },
        "torch": torch,
    }


def _sentences(needs: tuple[Need, ...], torch: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Python {platform.python_version()} on {platform.platform()} with {machine_cores()} CPU"
        " cores."
    )
    always = ", ".join(f"{n.requirement.name} {n.version}" for n in needs if not n.extra and n.met)
    yield f"{PACKAGE} {_version(PACKAGE)} is installed, with {always}."
    for need in needs:
        if not need.extra and not need.met:
            name = f"{need.requirement.name}{need.requirement.specifier}"
            yield (
                f"A required package is missing: {need.lacking}. To install it: pip install"
                f' "{name}".'
            )
    for name, own in _extras(needs).items():
        lacking = [need.lacking for need in own if not need.met]
        there = ", ".join(f"{need.requirement.name} {need.version}" for need in own)
        cure = (
            f"is not complete: {', '.join(lacking)}. To install it, in a clone of {PACKAGE}: pip"
            f' install ".[{name}]".'
        )
        yield f"Extra {name} " + (cure if lacking else f"is complete: {there}.")
    yield from _of_torch(torch)
    cache = _cache()
    if cache is not None:
        yield f"Recipes from the Hugging Face Hub are cached in {cache}."


def _of_torch(torch: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each GPU that torch finds, or why it finds none and what to do."""
    if torch["error"] is not None:
        yield (
            f"torch cannot be imported: {torch['error']}. Install it again with the command from"
            " pytorch.org."
        )
        return
    for i, device in enumerate(torch["devices"]):
        memory = "" if device["memory_gib"] is None else f", {device['memory_gib']} GiB"
        yield f"GPU {i}: {device['name']}{memory}."
    if torch["devices"]:
        return
    if torch["cuda"] is None:
        yield (
            "torch finds no GPU, because it is built without CUDA. To use one, install a CUDA build"
            " from pytorch.org."
        )
    else:
        yield (
            f"torch is built for CUDA {torch['cuda']}, but finds no GPU. Check whether nvidia-smi"
            " lists one."
        )
