"""What a pattern costs: measured milliseconds where there are any, else its area."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Kernels of this package, as `sparse-dit bench kernels` names them.
KERNELS = ("hopper", "triton", "host")
Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Costs:
    """Cost of a head's call over that of dense attention, by density and by whether its tokens are reordered.

    Between measured densities costs are linear, beyond them the nearest is moved in proportion to area. Where nothing
    was measured with an order, it adds nothing; nothing computed costs nothing.

    Args:
        plain: (density, cost) ascending, of calls in the model's own order; empty: cost is area.
        ordered: the same with an order of the tokens.
        source: what the costs are from, in words.
    """

    plain: Curve = ()
    ordered: Curve = ()
    source: str = "area, as no measurement was given"

    @classmethod
    def measured(cls, rows: Iterable[Mapping[str, Any]], tokens: int, precision: str = "native") -> Costs:
        """Costs from the rows of `sparse-dit bench kernels`, of the shape whose length is nearest.

        Args:
            rows: of kind `kernel`; those of attention along equal lists by this package's kernels count, of the kernel
                with most of them.
            tokens: length of the sequence.
            precision: of the calls.

        Raises:
            ValueError: no such row has milliseconds.
        """
        fit = [
            row
            for row in rows
            if row.get("kind") == "kernel"
            and row.get("what") == "attention"
            and row.get("kernel") in KERNELS
            and row.get("precision") == precision
            and row.get("lists") == "equal"
            and not row.get("codes")
            and row.get("ms")
            and row.get("dense_ms")
        ]
        if not fit:
            raise ValueError(
                f"costs: no milliseconds of attention in {precision} precision; valid: rows of sparse-dit bench kernels"
            )
        length = min({row["shape"]["tokens"] for row in fit}, key=lambda found: (abs(found - tokens), found))
        fit = [row for row in fit if row["shape"]["tokens"] == length]
        kernel = max(KERNELS, key=lambda name: sum(row["kernel"] == name for row in fit))
        mine = [row for row in fit if row["kernel"] == kernel]
        return cls(_curve(mine, False), _curve(mine, True), f"milliseconds of {kernel} over {length} tokens")

    def of(self, density: float, *, ordered: bool) -> float:
        """The cost of a call, in dense calls.

        Args:
            density: computed tile area over full area; 0 costs nothing.
            ordered: whether tokens are reordered.
        """
        if density == 0.0:
            return 0.0
        plain = _at(self.plain, density) if self.plain else density
        if not ordered or not self.ordered:
            return plain
        # Few densities are measured with an order; what it adds there it adds everywhere.
        near = min(self.ordered, key=lambda point: abs(point[0] - density))
        return plain + near[1] - (_at(self.plain, near[0]) if self.plain else near[0])


def _at(curve: Curve, density: float) -> float:
    place = bisect_left(curve, (density,))
    if place < len(curve) and curve[place][0] == density:
        return curve[place][1]
    if place in (0, len(curve)):
        nearest = curve[min(place, len(curve) - 1)]
        return nearest[1] * density / nearest[0]
    (left, low), (right, high) = curve[place - 1], curve[place]
    return low + (high - low) * (density - left) / (right - left)


def _curve(rows: Iterable[Mapping[str, Any]], ordered: bool) -> Curve:
    points = {row["density"]: row["ms"] / row["dense_ms"] for row in rows if bool(row["ordered"]) is ordered}
    return tuple(sorted(points.items()))
