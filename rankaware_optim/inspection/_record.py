"""`Survey`: the parameters that inspection found in a model or a file, and their table. Also a
table of names for adapters without a scaling law.
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
# A scaling (alpha / rank) outside this range is probably a mistake. The bounds were chosen by
# judgement.
_LEAST_SCALING, _MOST_SCALING = 1 / 64, 8.0
_USUAL = "a LoRA pair", "a whole weight"
_FROZEN = "a LoRA matrix that does not train"


def without_embeddings(factors: Iterable[Factor]) -> list[Factor]:
    """Return the LoRA matrices of all layers but embeddings."""
    return [f for f in factors if f.kind != "embedding"]


@dataclass(frozen=True)
class Survey:
    """The parameters that train in a model, as `inspect_model` or `inspect_file` found them.

    The `fan_in` of a reference to this model is `width` for LoRA, and `full_width()` for full
    finetuning.

    Args:
        factors: LoRA matrices and whole weights.
        other: names of the other parameters that train.
        notes: sentences for the report.
        frozen: names of LoRA matrices that do not train.
    """

    factors: tuple[Factor, ...] = ()
    other: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    frozen: tuple[str, ...] = field(default=(), repr=False)

    @property
    def unsupported(self) -> dict[str, str]:
        """Those of `other` that belong to an adapter without a law, with the adapter's kind, such
        as {"q.hada_w1_a": "LoHa"}.
        """
        return {name: kind for name in self.other if (kind := other_kind(name))}

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA matrix or whole weight trains, or an adapter that no law covers."""
        if self.factors or any(map(is_other_adapter, self.other)):
            return True
        # PEFT trains new tokens beside LoRA, or with nothing else.
        return _NEW_TOKENS in self.unsupported.values() and not self.frozen

    @property
    def width(self) -> float:
        """Mean fan-in of the adapted layers, weighted by the size of their weights: the width on
        which a LoRA learning rate depends. Embeddings do not count.
        """
        # A layer counts once, however many adapters and matrices it has.
        layers = {f.layer: f for f in without_embeddings(self.factors)}
        total = weighted = 0.0
        for f in layers.values():
            size = f.fan_in * f.fan_out
            total += size
            weighted += f.fan_in * size
        # Without a layer nothing is converted, and any positive width will do.
        return weighted / total if total else 1.0

    def full_width(self, init: Init = "A") -> float:
        """Return the width on which the learning rate of full finetuning depends: the largest
        fan-in of the layers, embeddings left out.

        If the learning rate was tuned with LoRA at A = 0 (init B), it is the mean fan-in, `width`.
        With these widths the law needs no further factor (benchmarks/answers.md).

        Args:
            init: the init of the LoRA learning rate that is converted: "A" (B starts at zero) or
                "B" (A starts at zero).
        """
        if init == "B":
            return self.width
        return max((f.fan_in for f in without_embeddings(self.factors)), default=1.0)

    def dominant(self) -> Reference:
        """Return the model's most common configuration (rank, scaling and init) as a reference
        without a fan-in.

        Every LoRA pair counts once. Pairs of embeddings, and pairs without a law, count only in the
        absence of others.

        Raises:
            InspectionError: the model lacks LoRA pairs.
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
                "The model has no LoRA pair, so it has no most common rank.",
                "Pass a model that has LoRA adapters, or method='full'.",
            )
        # Of equally common ones the first in the model counts.
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
        """Yield the cells of each tensor's row, without the number of tensors."""
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
        """Return sentences on probable mistakes in this model."""
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
    """Describe a factor in words: one of `_USUAL`, unless something is remarkable."""
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
    """Describe a parameter outside all LoRA pairs in words.

    kind: the kind of its adapter, if it belongs to one without a law.
    """
    return f"{kind}: no law covers it" if kind else "no LoRA matrix"


# --- adapters without a law -----------------------------------------------------------------------

# The laws are derived for a layer that adds s·B·A. These kinds of pairs add something else.
LAWLESS = {"adalora": "AdaLoRA", "kasa": "KaSA", "mica": "MiCA", "xlora": "X-LoRA"}
# Other finetuning methods, recognised by the names of their parameters.
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
# Parameters that train in addition to a LoRA pair.
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
    """Return the kind of an adapter's parameter outside LoRA pairs, recognised by its name. None
    for parameters of other modules.

    >>> other_kind("blocks.0.q.vera_lambda_b.default"), other_kind("head.weight")
    ('VeRA', None)
    """
    for kind, pattern in _KINDS.items():
        if pattern.search(name):
            return kind
    return None


def is_other_adapter(name: str) -> bool:
    """Return whether a parameter belongs, by its name, to an adapter other than LoRA, such as LoHa
    or IA³.
    """
    return other_kind(name) in _ADAPTERS


def unread_lora(survey: Survey) -> list[str]:
    """Return the parameters of `survey.other` that seem to belong to LoRA although inspection could
    not read them. "lora" is part of their name, or of the name of a module around them that has no
    LoRA matrix.
    """
    rest = [name for name in survey.other if _called_lora(name)]
    # Modules called after LoRA that contain pairs, such as `lora_layers`, explain the names inside.
    read = {path for f in survey.factors for path in _called_lora(f.name)}
    return [n for n in rest if n not in survey.unsupported and _called_lora(n) - read]


def _called_lora(name: str) -> set[str]:
    """Return the paths of a parameter and of the modules around it, as far as "lora" is in their
    own names.
    """
    called = set()
    for path in accumulate(name.split("."), "{}.{}".format):
        last = path.rpartition(".")[2]
        if "lora" in last.lower():
            called.add(path)
    return called
