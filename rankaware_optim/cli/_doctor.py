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

from ._options import echo_result, json_option
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
        installed = (
            "not installed" if self.version is None else f"{self.version} is installed"
        )
        return f"{self.requirement.name}{self.requirement.specifier} ({installed})"


def _lacking(needs: Iterable[Need]) -> list[str]:
    return [need.lacking for need in needs if not need.met]


def _installed(needs: Iterable[Need]) -> str:
    return ", ".join(
        f"{need.requirement.name} {need.version}" for need in needs if need.met
    )


@click.command()
@json_option(_SHAPE)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Print the installed versions, missing packages and GPUs.

    Extras are sets of optional packages. For each that is not complete, the command that installs
    the rest is printed. The exit code is 1 if a required package is missing or too old.
    """
    needs = sorted(needs_of(metadata.requires(PACKAGE) or ()), key=lambda n: n.extra)
    by_extra: dict[str, list[Need]] = {}
    for need in needs:
        by_extra.setdefault(need.extra, []).append(need)
    required = by_extra.pop("")
    document: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": machine_cores(),
        "cache": _cache(),
        "packages": {PACKAGE: _version(PACKAGE)},
        "missing": _lacking(required),
        "extras": {extra: _lacking(needs) for extra, needs in by_extra.items()},
        "torch": _torch(),
    }
    document["packages"] |= {need.requirement.name: need.version for need in needs}
    lines = "\n".join(_sentences(document, required, by_extra))
    echo_result(as_json, lines, document)
    ctx.exit(1 if document["missing"] else 0)


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
        return {
            "error": f"{type(error).__name__}: {error}",
            "cuda": None,
            "devices": [],
        }
    devices = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        devices.append(
            {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)}
        )
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


def _sentences(
    document: Mapping[str, Any],
    required: Iterable[Need],
    by_extra: Mapping[str, Iterable[Need]],
) -> Iterator[str]:
    python, system, cores = (document[key] for key in ("python", "platform", "cpus"))
    yield f"Python {python} on {system} with {cores} CPU cores."
    yield f"{PACKAGE} {_version(PACKAGE)} is installed, with {_installed(required)}."
    for need in required:
        if not need.met:
            name = f"{need.requirement.name}{need.requirement.specifier}"
            cure = f'To install it: pip install "{name}".'
            yield f"A required package is missing: {need.lacking}. {cure}"
    for extra, needs in by_extra.items():
        if lacking := document["extras"][extra]:
            cure = f'To install it, in a clone of {PACKAGE}: pip install ".[{extra}]".'
            yield f"Extra {extra} is not complete: {', '.join(lacking)}. {cure}"
        else:
            yield f"Extra {extra} is complete: {_installed(needs)}."
    yield from _of_torch(document["torch"])
    if document["cache"] is not None:
        yield f"Recipes from the Hugging Face Hub are cached in {document['cache']}."


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
