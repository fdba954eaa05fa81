"""Configurations of LoRA and full finetuning for the tests of laws, each available as a factor and
as a resolved reference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from hypothesis import strategies as st

from rankaware_optim import Factor, Reference


class Site(NamedTuple):
    """A configuration of LoRA, or of full finetuning if init is "full", where rank and scaling are
    not used.
    """

    init: str = "A"
    rank: int = 4
    scaling: float = 1.0
    fan_in: int = 64

    def factor(self, role: str = "A") -> Factor:
        width = self.fan_in
        if self.init == "full":
            return Factor("w", "full", None, width, width)
        return Factor("w", role, self.rank, width, width, self.scaling, self.init)

    def reference(self) -> Reference:
        if self.init == "full":
            return Reference(method="full", fan_in=self.fan_in)
        at = Reference(self.rank, self.scaling * (self.rank or 1), init=self.init)
        return replace(at, fan_in=self.fan_in)


ranks, widths = st.integers(1, 4096), st.integers(1, 2**16)
scalings = st.floats(2.0**-10, 2.0**6)
lora_sites = st.builds(Site, st.sampled_from("AB"), ranks, scalings, widths)
sites = lora_sites | widths.map(lambda width: Site("full", fan_in=width))
