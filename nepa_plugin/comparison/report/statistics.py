"""How much of a difference between rows is noise of the seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from scipy.stats import t

LEVEL = 0.95


@dataclass(frozen=True)
class Noise:
    """The seeds' standard deviation, pooled over rows: of two or three seeds a row, one alone says too little.

    Attributes:
        deviation: In the unit of the values.
        freedom: Its degrees of freedom; 0 where no row has several seeds.
    """

    deviation: float = 0.0
    freedom: int = 0

    @classmethod
    def of(cls, rows: Mapping[str, Sequence[float]]) -> "Noise":
        """Return the pooled deviation of rows of values."""
        freedom = sum(len(values) - 1 for values in rows.values() if values)
        if not freedom:
            return cls()
        squares = sum((value - mean(values)) ** 2 for values in rows.values() if values for value in values)
        return cls(math.sqrt(squares / freedom), freedom)

    def half_width(self, seeds: int) -> float | None:
        """Return half the width of the t interval of a mean over so many seeds."""
        return self._quantile() * self.deviation / math.sqrt(seeds) if self.freedom else None

    def separates(self, one: Sequence[float], other: Sequence[float]) -> bool:
        """Whether two rows' means differ by more than the noise: a t test of the two, at 5 %, not corrected."""
        if not self.freedom:
            return False
        limit = self._quantile() * self.deviation * math.sqrt(1 / len(one) + 1 / len(other))
        return abs(mean(one) - mean(other)) > limit

    def _quantile(self) -> float:
        return float(t.ppf((1 + LEVEL) / 2, self.freedom))
