"""This module defines `Survey`, which lists the parameters that an inspection has
found.

The module also recognises adapters without a scaling law by their parameter names.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from .._printing import Table
from .._types import Factor, Init, Reference
from ..errors import InspectionError

_LEFT_ALIGNED = ("convention", "kind", "role", "init", "why")
_NUMBERS = ("fan-in", "fan-out", "tensors")
_HEADINGS = ("convention", "kind", "role", "rank", "scaling", "init", *_NUMBERS, "why")
# A scaling (alpha / rank) outside this range is probably a mistake. The limits were
# chosen by judgement.
_LEAST_SCALING, _MOST_SCALING = 1 / 64, 8.0
_USUAL = "a LoRA pair", "a whole weight"
_FROZEN = "a LoRA matrix that is frozen and does not train"


def without_embeddings(factors: Iterable[Factor]) -> list[Factor]:
    """Return the LoRA matrices of all layers except embeddings."""
    return [f for f in factors if f.kind != "embedding"]


@dataclass(frozen=True)
class Survey:
    """A list of the trainable parameters that `inspect_model` or `inspect_file` has
    found.

    To describe this model in a `Reference`, set its `fan_in` to `width` for LoRA, or to
    `full_width()` for full finetuning.

    Args:
        factors: the trainable LoRA matrices, or the weights for full finetuning.
        other: the names of all other trainable parameters.
        notes: notes about the inspection, which are shown in reports.
        frozen: the names of LoRA matrices that are frozen.
    """

    factors: tuple[Factor, ...] = ()
    other: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    frozen: tuple[str, ...] = field(default=(), repr=False)

    @property
    def unsupported(self) -> dict[str, str]:
        """The parameters of adapters that no scaling law covers.

        The dict maps the name of each parameter to the type of its adapter, for example
        {"q.hada_w1_a": "LoHa"}.
        """
        return {name: kind for name in self.other if (kind := other_kind(name))}

    @property
    def has_adapter(self) -> bool:
        """Return whether the survey contains any trainable adapter, with or without a
        scaling law.

        A weight that is trained in full finetuning counts as an adapter too.
        """
        if self.factors or any(map(is_other_adapter, self.other)):
            return True
        # PEFT can train the embeddings of new tokens without any LoRA pair. If there
        # are frozen LoRA matrices, the user probably intended to train these.
        return _NEW_TOKENS in self.unsupported.values() and not self.frozen

    @property
    def width(self) -> float:
        """The width of the model that determines the learning rates of LoRA.

        The width is the mean fan-in of the adapted layers, weighted by the sizes of
        their weights. Embeddings are left out.
        """
        # Every layer counts once, even if it has several adapters.
        layers = {f.layer: f for f in without_embeddings(self.factors)}
        total = weighted = 0.0
        for f in layers.values():
            size = f.fan_in * f.fan_out
            total += size
            weighted += f.fan_in * size
        # If there is no layer, no learning rate is converted, so the value does not
        # matter.
        return weighted / total if total else 1.0

    def full_width(self, init: Init = "A") -> float:
        """Return the width of the model that determines the learning rate of full
        finetuning.

        If the learning rate is converted from LoRA with init A, the result is the
        largest fan-in of all layers except embeddings. If the learning rate is
        converted from LoRA with init B, the result is the mean fan-in, `width`. If the
        mean is used for init B and the largest fan-in for init A, the scaling law needs
        no further correction (benchmarks/answers.md).

        Args:
            init: the init with which the LoRA learning rate was tuned: "A" (B starts at
                zero) or "B" (A starts at zero).
        """
        if init == "B":
            return self.width
        return max((f.fan_in for f in without_embeddings(self.factors)), default=1.0)

    def dominant(self) -> Reference:
        """Return the most common rank, scaling and init of the model as a `Reference`.

        The reference has no fan-in. Every LoRA pair counts once. Embeddings and pairs
        without a scaling law are used only if the model has no other pairs.

        Raises:
            InspectionError: the model does not contain LoRA pairs.
        """
        if any(f.role == "full" for f in self.factors):
            return Reference(method="full")
        pairs = {}
        for f in self.factors:
            pairs[f.layer, f.adapter, f.convention] = f
        covered = [f for f in pairs.values() if f.kind not in LAWLESS]
        usual = without_embeddings(covered) or pairs.values()
        keys: list[Any] = [(f.rank, f.scaling, f.init) for f in usual]
        if not keys:
            raise InspectionError(
                "The rank and alpha of this model cannot be read, because it has no LoRA pairs.",
                "Pass a model with LoRA adapters. For full finetuning, pass method='full'.",
            )
        # If two configurations are equally common, `most_common` returns the one that
        # comes first in the model.
        (rank, scaling, init), _ = Counter(keys).most_common(1)[0]
        alpha = scaling * rank
        return Reference(rank, alpha, init="B" if init == "B" else "A")

    def __str__(self) -> str:
        return self._table().text(140)

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        counts = Counter(self._lines())
        rows = []
        for (*cells, why), count in counts.items():
            rows.append((*cells, str(count), why))
        remarks = [f"check: {check}" for check in self.audit()]
        remarks += [f"note: {note}" for note in self.notes]
        return Table(_HEADINGS, rows, remarks, left=_LEFT_ALIGNED)

    def _lines(self) -> Iterator[tuple[str, ...]]:
        """Yield the table cells for each tensor of the model.

        Tensors with equal cells share one row of the table, and the row states how many
        tensors it describes.
        """
        blank = [""] * 5
        for f in self.factors:
            how = ["", ""] if f.role == "full" else [f"{f.scaling:g}", f.init]
            what = f.convention, f.kind, f.role, str(f.rank or "")
            fans = f"{f.fan_in:g}", f"{f.fan_out:g}"
            yield *what, *how, *fans, _remark(f)
        for kind in map(other_kind, self.other):
            yield "", kind or "", "other", *blank, _remark_on_other(kind)
        for _ in self.frozen:
            yield "", "", "frozen", *blank, _FROZEN

    def audit(self) -> tuple[str, ...]:
        """Return warnings about probable mistakes, such as a very large scaling."""
        named = defaultdict[str, list[str]](list)
        for name in self.frozen:
            named[_FROZEN].append(name)
        for f in self.factors:
            named[_remark(f)].append(f.name)
        return tuple(
            f"{remark}: {names[0]} ({len(names)} in all)."
            for remark, names in named.items()
            if remark not in _USUAL
        )


def _remark(factor: Factor) -> str:
    """Describe a LoRA matrix or a weight in words, with its problem if it has one.

    If the matrix has no problem, the description is one of those in `_USUAL`.
    """
    if factor.role == "full":
        return "a whole weight"
    if factor.kind in LAWLESS:
        return _remark_on_other(LAWLESS[factor.kind])
    if factor.init == "other":
        return "a LoRA pair in which neither A nor B started at zero"
    if factor.init == "unknown":
        return "a LoRA pair whose init cannot be read"
    if factor.kind != "embedding" and (factor.rank or 0) > factor.fan_in:
        return "a LoRA pair whose rank is larger than the fan-in"
    if not _LEAST_SCALING <= factor.scaling <= _MOST_SCALING:
        return "a LoRA pair whose scaling (alpha / rank) is above 8 or below 1/64"
    return "a LoRA pair"


def _remark_on_other(kind: str | None) -> str:
    """Describe a parameter that does not belong to a LoRA pair in words.

    Args:
        kind: the type of its adapter, or None if it is not part of an adapter.
    """
    return f"{kind}: no law covers it" if kind else "not a LoRA matrix"


# --- adapters without a law -----------------------------------------------------------------------

# The scaling laws are derived for layers that add s·B·A. These adapters also have
# matrices A and B, but they add a different product.
LAWLESS = {"adalora": "AdaLoRA", "kasa": "KaSA", "mica": "MiCA", "xlora": "X-LoRA"}
# Regular expressions that recognise other finetuning methods by their parameter names.
_ADAPTERS = {
    "LoHa": r"hada_[wt]\d",
    "LoKr": r"lokr_[wt]\d",
    "PVeRA": r"pvera_lambda_",
    "VeRA": r"vera_lambda_",
    "VB-LoRA": r"vblora_",
    "RandLoRA": r"randlora_",
    "Poly": r"poly_lora_",
    "DyLoRA": r"lora_[AB]\.\d+$|(^|\.)(up|down)_list\.\d+$",
    "GLoRA": r"(^|\.)([ab][12]|bm)\.weight$|glora_[A-E]\.",
    "T-LoRA": r"(^|\.)lambda_layer$",
    "GraLoRA": r"gralora_[AB]",
    "DeLoRA": r"delora_(A|B|lambda)",
    "HiRA": r"hira_(embedding_)?[AB]",
    "Lily": r"lily_(A|B|router)",
    "TinyLoRA": r"tinylora_v",
    "Uni-LoRA": r"unilora_theta",
    "AdaMSS": r"adamss_[AB]",
    "PEANuT": r"peanut_",
    "FRoD": r"frod_lambda_",
    "DEFT": r"deft_[PR]\.",
    "OSF": r"osf_svd_params",
    "SuperTuning": r"supertuning_",
    "RoAd": r"road_(theta|alpha)",
    "BEFT": r"beft_bias",
    "LN tuning": r"ln_tuning_layers",
    "IA³": r"ia3_l(\.|$)",
    "BOFT": r"boft_[Rs]",
    "PSOFT": r"psoft_R",
    "OFT": r"(^|\.)oft_",
    "HRA": r"hra_u",
    "MiSS": r"(bone|miss)_block|(^|\.)bone_",
    "SHiRA": r"shira_weight",
    "C³A": r"c3a_kernel",
    "FourierFT": r"fourierft_spectrum",
    "WaveFT": r"waveft_spectrum",
    "Adaption Prompt": r"(^|\.)adaption_(prompt|gate)$",
    "SHADOW": r"(^|\.)shadow_(backbone|down|up|update_\w+)\.",
    "prompt tuning": r"prompt_(encoder|embeddings)",
}
_NEW_TOKENS = "new tokens"
# Parameters that can be trained in addition to a LoRA pair.
_PARTS = {
    "AdaLoRA's singular values": r"(^|\.)lora_E(\.|$)",
    "KaSA's singular values": r"(^|\.)lora_diag(\.|$)",
    "X-LoRA's classifier": r"internal_xlora_classifier",
    "MonteCLoRA's sampler": r"lora_monteclora_sampler",
    "DoRA magnitude": r"lora_magnitude|dora_scale|(^|\.)(weight_)?magnitude(\.|$)",
    "Tucker core": r"lora_mid\.",
    "LoRA bias": r"(lora_[ABab]|lora_up|lora_down)\.(.*\.)?bias$",
    "LyCORIS scalar": r"(^|\.)scalar$",
    _NEW_TOKENS: r"trainable_tokens_",
    "whole copy (modules_to_save)": r"modules_to_save\.",
}
_PATTERNS = _ADAPTERS | _PARTS
_KINDS = {kind: re.compile(pattern) for kind, pattern in _PATTERNS.items()}


def other_kind(name: str) -> str | None:
    """Return the type of adapter that a parameter belongs to, based on the parameter's
    name.

    If the name does not belong to an adapter, None is returned. This function does not
    recognise the matrices A and B of LoRA.

    >>> other_kind("blocks.0.q.vera_lambda_b.default"), other_kind("head.weight")
    ('VeRA', None)
    """
    for kind, pattern in _KINDS.items():
        if pattern.search(name):
            return kind
    return None


def is_other_adapter(name: str) -> bool:
    """Return whether a parameter's name belongs to an adapter other than LoRA, such as LoHa."""
    return other_kind(name) in _ADAPTERS


def unread_lora(survey: Survey) -> list[str]:
    """Return the names of parameters that look like LoRA but were not recognised.

    These parameters have "lora" in their name, or in the name of a parent module that
    contains no recognised LoRA matrix.
    """
    rest = [name for name in survey.other if _called_lora(name)]
    # If a module such as `lora_layers` contains recognised pairs, its name explains the
    # "lora" in the names of all parameters inside. These should not be reported.
    read = {path for f in survey.factors for path in _called_lora(f.name)}
    return [n for n in rest if n not in survey.unsupported and _called_lora(n) - read]


def _called_lora(name: str) -> set[str]:
    """Return the paths of a parameter and its parent modules whose last part contains
    "lora".

    For example, the result for "lora_layers.0.weight" is {"lora_layers"}.
    """
    called = set()
    for path in accumulate(name.split("."), "{}.{}".format):
        last = path.rpartition(".")[2]
        if "lora" in last.lower():
            called.add(path)
    return called
