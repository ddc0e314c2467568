"""`sparse-dit calibrate`: what it does."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_dit.calibration import Search
    from sparse_dit.eval.calibrate import Sampling

TILE = [6, 8, 8]


def search_of(method: str, density: float | None, tile: list[int], costs: str, tokens: int = 0) -> "Search":
    """The search that the options mean.

    Args:
        method: one of `SEARCHES`.
        density: of the profile; `None` only where the method has a rule of its own.
        tile: tokens of a tile, for `sta`.
        costs: a file of rows, for `sparse-vdit`; empty for costs by area.
        tokens: length of the sequence, for which costs are looked up.

    Raises:
        ValueError: a value is not valid, or belongs to another method.
    """
    from sparse_dit.calibration import SEARCHES, Costs
    from sparse_dit.eval.results import load_rows

    settings: dict[str, Any] = {"density": density}
    if method == "sta":
        settings["tile"] = tuple(tile)
    elif tile != TILE:
        raise ValueError(f"tile: {tile} with method {method}; valid: method sta")
    if costs:
        if method != "sparse-vdit" or not Path(costs).is_file():
            raise ValueError(f"costs: {costs!r}; valid: with method sparse-vdit, a JSONL file of sparse-dit bench")
        settings["costs"] = Costs.measured(load_rows(Path(costs)), tokens)
    if density is None and method != "sparse-vdit":
        raise ValueError(f"density: null with method {method}; valid: a number in (0, 1]")
    return SEARCHES[method](**settings)


def sampling_of(bins: int, samples: int, block: int) -> "Sampling":
    """What of the runs is looked at; 0 bins are the method's own.

    Raises:
        ValueError: a value is not valid.
    """
    from sparse_dit.eval.calibrate import Sampling
    from sparse_dit.kernels.blocks import BLOCK_SIZES

    if block not in BLOCK_SIZES:
        raise ValueError(f"block: {block}; valid: {', '.join(map(str, BLOCK_SIZES))}")
    return Sampling(bins or None, samples, block, block)
