"""The factor on a float16 loss, which keeps small gradients from vanishing and follows what the numbers can hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScaler:
    """Dynamic loss scaling for float16 (Micikevicius et al., 2018, section 3.2); every stage keeps an equal one."""

    scale: float = 1.0
    growth_interval: int = 2000
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Halves the scale after an overflow, doubles it after `growth_interval` updates without one."""
        if not finite:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0
