"""What is measured, and in which order: what matters most comes first, for time may run out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """Self-attention of one batch entry: heads, tokens, head size."""

    heads: int
    tokens: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.heads}x{self.tokens}x{self.head_size}"

    @property
    def flop(self) -> float:
        """FLOP of dense attention: two products of 2 S^2 D a head."""
        return 4.0 * self.tokens**2 * self.head_size * self.heads


def read_shape(text: str) -> Shape:
    """A shape from "HEADSxTOKENSxHEAD_SIZE".

    Raises:
        ValueError: text is no such shape.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise ValueError(f"shapes: {text!r}; valid: HEADSxTOKENSxHEAD_SIZE, such as 12x32760x128")
    return Shape(*map(int, text.split("x")))


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        what: "attention"; "quantize", order and quantization of q, k and v; "lists", pooled scores and top-k lists;
            "mass", exact block mass under a given log-sum-exp.
        kernel: who computes it.
        density: wanted share of the key blocks of each row; 1 in dense kernels.
        precision: of attention and quantize.
        ordered: whether tokens are brought into the order of tiles of the grid on the way.
        codes: whether q, k and v were quantized beforehand: the kernel alone.
        lists: "equal", as many blocks in every row; "uneven", from 1 to all with dense rows at the end; "same area",
            equal ones of the area of the uneven ones.
        block_k: key tokens a block; query blocks are of 128.
        skipped: "drop", or "summary": skipped blocks enter as their means.
    """

    what: str
    kernel: str
    density: float = 1.0
    precision: str = "native"
    ordered: bool = False
    codes: bool = False
    lists: str = "equal"
    block_k: int = 128
    skipped: str = "drop"


@dataclass(frozen=True)
class Group:
    """Cases of one shape, between two measurements of the dense kernel."""

    shape: Shape
    cases: tuple[Case, ...]


BLOCK_Q = 128
SHAPES = tuple(
    map(read_shape, ("12x32760x128", "4x118800x128", "48x17776x64", "8x75600x128", "24x4608x128", "16x1000x72"))
)
DENSITIES = (0.5, 0.3, 0.2, 0.1, 1.0)
GRIDS = {32760: (21, 30, 52), 118800: (33, 45, 80), 75600: (21, 45, 80)}
TILE = (1, 8, 16)  # of the order, as DraftAttention's: one block a tile
LOW_PRECISIONS = ("int8", "int8_fp8")
# Densities measured first, by shape; for the first shape so is what surrounds attention.
HEADLINES = {SHAPES[0]: (0.3, 0.2, 0.1, 1.0), SHAPES[1]: (0.3,), SHAPES[2]: (0.3,)}
TYPICAL = 0.3
SUMMARIZED = 0.2


def plan(
    shapes: Sequence[Shape], densities: Sequence[float], ours: Sequence[str], others: Sequence[str], flex: bool
) -> list[Group]:
    """The groups in the order of their weight.

    Args:
        shapes: what attends.
        densities: of the block lists.
        ours: our backends, the fastest first.
        others: dense kernels of other people besides the one that all are compared with; "flash4" takes lists too.
        flex: whether FlexAttention is measured; it compiles for long, so it comes last.
    """
    first = ours[0]
    groups = [Group(shape, tuple(_headline(shape, densities, first))) for shape in shapes if shape in HEADLINES]
    planned = {(group.shape, case) for group in groups for case in group.cases}
    for shape in shapes:
        rest = [case for case in _rest(shape, densities, ours, others) if (shape, case) not in planned]
        groups.append(Group(shape, tuple(rest)))
    if flex:
        for shape in shapes:
            groups.append(Group(shape, tuple(Case("attention", "flex", density) for density in densities)))
    return [group for group in groups if group.cases]


def _headline(shape: Shape, densities: Sequence[float], kernel: str) -> list[Case]:
    cases = [Case("attention", kernel, density) for density in HEADLINES[shape] if density in densities]
    if TYPICAL in densities:
        cases += _low_precision(kernel, TYPICAL)
    if SUMMARIZED in densities:
        cases.append(Case("attention", kernel, SUMMARIZED, skipped="summary"))
    if shape == SHAPES[0]:
        cases += _surroundings(shape, kernel)
    return cases


def _low_precision(kernel: str, density: float) -> list[Case]:
    whole = [Case("attention", kernel, density, precision) for precision in LOW_PRECISIONS]
    return [each for case in whole for each in (case, replace(case, codes=True))]


def _surroundings(shape: Shape, kernel: str) -> list[Case]:
    """Quantization, lists, mass, uneven lists, orders, smaller key blocks."""
    orders = (False, True) if shape.tokens in GRIDS else (False,)
    cases = [
        Case("quantize", "quantize", precision=precision, ordered=ordered)
        for ordered in orders
        for precision in LOW_PRECISIONS
    ]
    cases += [Case("lists", "pool + top-k", TYPICAL), Case("mass", "mass")]
    cases += [Case("attention", kernel, 0.5, lists=lists) for lists in ("same area", "uneven")]
    if len(orders) > 1:
        cases += [
            Case("attention", kernel, TYPICAL, precision, ordered=True) for precision in ("native", *LOW_PRECISIONS)
        ]
    return [*cases, Case("attention", kernel, TYPICAL, block_k=64)]


def _rest(shape: Shape, densities: Sequence[float], ours: Sequence[str], others: Sequence[str]) -> list[Case]:
    cases = [Case("attention", other) for other in others]
    if "flash4" in others:
        cases += [Case("attention", "flash4", density) for density in densities if density < 1]
    for kernel in ours:
        cases += [Case("attention", kernel, density) for density in densities]
        for density in densities if kernel == ours[0] else {TYPICAL} & set(densities):
            cases += _low_precision(kernel, density)
    if SUMMARIZED in densities:
        cases.append(Case("attention", ours[0], SUMMARIZED, skipped="summary"))
    return cases + _surroundings(shape, ours[0])
