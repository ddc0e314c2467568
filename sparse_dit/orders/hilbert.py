"""Order `hilbert`: a Hilbert curve through a grid of any size, every step of which goes to a neighbour.

The curve of a box of sides (a, b, c) starts in one corner and ends in the corner at the other end of side a. The box is
cut into pieces that have such curves of their own, each of which starts next to the end of the one before:

* a long box (2 a > 3 b and 2 a > 3 c) into two along a;
* a flat box (3 b > 4 c) into three, as Hilbert's curve in the plane: along b over the near half of a, along a over
  the far part of b, and back along b over the rest of a;
* any other box into five, as Hilbert's curve in space, with two pairs of octants joined.

That much is the idea of J. Červený's generalised Hilbert curve (github.com/jakubcerveny/gilbert, for cuboids of even
sides); where to cut is chosen here such that every step goes to a neighbour. A curve of unit steps between those
corners needs an even a, or a, b and c all odd. The cuts keep all pieces so: a long box is cut behind an even part of a;
the near part of b, along which the first and the last piece run, is even; a box of odd sides is never cut into five;
and where b and c are odd in a box that is cut into five, both parts of a are odd, so that the two pieces along c have
odd sides only. A whole grid has a side that can be a, so its curve has unit steps only, whatever its size.
"""

from dataclasses import dataclass

import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.orders.tables import place_text

Box = tuple[int, int, int]
# A piece of a box: the place where its curve starts, and its own sides a, b, c as (axis of the box, signed extent).
Side = tuple[int, int]
Piece = tuple[Box, tuple[Side, Side, Side]]


@dataclass(frozen=True)
class Hilbert:
    """Along a Hilbert curve through the whole grid: each token is a neighbour of the next, and blocks are compact.

    Source: Hilbert order of video tokens, SpargeAttn (arXiv 2502.18137) and Jenga (arXiv 2505.16864); the curve for any
    grid is described at the head of this file.
    """

    def table(self, layout: TokenLayout, heads: int) -> torch.Tensor | None:
        """See `Order.table`."""
        _, height, width = layout.grid
        t, h, w = curve(layout.grid).unbind(1)
        return place_text(layout, ((t * height + h) * width + w)[None])


def curve(grid: Box) -> torch.Tensor:
    """Hilbert curve through a grid.

    Args:
        grid: three sides, at least 1 each.

    Returns:
        int64 [cells, 3], coordinates of all cells; successive ones differ by 1 in one coordinate.
    """
    even = [axis for axis in range(3) if grid[axis] % 2 == 0]
    main = max(even or range(3), key=lambda axis: grid[axis])
    axes = [main, *(axis for axis in range(3) if axis != main)]
    cells = torch.empty(grid[0] * grid[1] * grid[2], 3, dtype=torch.int64)
    cells[:, axes] = _curve((grid[axes[0]], grid[axes[1]], grid[axes[2]]), {})
    return cells


def _curve(box: Box, known: dict[Box, torch.Tensor]) -> torch.Tensor:
    """Cells of the curve of a box, int64 [cells, 3]; `known` holds those of the boxes met before."""
    if box not in known:
        if box[1] == box[2] == 1:
            line = torch.zeros(box[0], 3, dtype=torch.int64)
            line[:, 0] = torch.arange(box[0])
            known[box] = line
        else:
            known[box] = torch.cat([_place(piece, known) for piece in _pieces(box)])
    return known[box]


def _place(piece: Piece, known: dict[Box, torch.Tensor]) -> torch.Tensor:
    """Cells of a piece in the coordinates of its box."""
    start, sides = piece
    (_, a), (_, b), (_, c) = sides
    own = _curve((abs(a), abs(b), abs(c)), known)
    cells = torch.empty_like(own)
    for place, (axis, extent) in enumerate(sides):
        cells[:, axis] = start[axis] + (own[:, place] if extent > 0 else -own[:, place])
    return cells


def _pieces(box: Box) -> list[Piece]:
    """How a box is cut, in the order of the curve."""
    a, b, c = box
    if 2 * a > 3 * max(b, c):
        near = _half(a)
        return [((0, 0, 0), ((0, near), (1, b), (2, c))), ((near, 0, 0), ((0, a - near), (1, b), (2, c)))]
    in_three = a * b * c % 2 == 1 or 3 * max(b, c) > 4 * min(b, c)
    if (in_three and c > b) or (not in_three and b % 2 == 0 and c % 2 == 1):
        return [((0, 0, 0), ((0, a), (2, c), (1, b)))]
    near_b = _half(b)
    if in_three:
        near = a // 2
        return [
            ((0, 0, 0), ((1, near_b), (2, c), (0, near))),
            ((0, near_b, 0), ((0, a), (1, b - near_b), (2, c))),
            ((a - 1, near_b - 1, 0), ((1, -near_b), (2, c), (0, near - a))),
        ]
    near, near_c = _half(a, odd=c % 2 == 1), c // 2
    return [
        ((0, 0, 0), ((1, near_b), (2, near_c), (0, near))),
        ((0, near_b, 0), ((2, c), (0, near), (1, b - near_b))),
        ((0, near_b - 1, c - 1), ((0, a), (1, -near_b), (2, near_c - c))),
        ((a - 1, near_b, c - 1), ((2, -c), (0, near - a), (1, b - near_b))),
        ((a - 1, near_b - 1, 0), ((1, -near_b), (2, near_c), (0, near - a))),
    ]


def _half(side: int, *, odd: bool = False) -> int:
    """About half of a side, even or odd as asked; half of 2 is 1."""
    half = side // 2
    return half if side == 2 or half % 2 == odd else half + 1
