"""What is kept on a device came there by a copy for which the host waited, so that any stream may read it at once.

A launch is no such thing: its stream alone knows when it is over. On a device without memory (`meta`) every operator
is still seen.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_dit import calls
from sparse_dit.kernels import density, quantize_hopper, sampled_means_triton
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Rows, Tiles, TimeMajor
from sparse_dit.parallel import ALL_HERE
from sparse_dit.selection import Radial, gate, head_types, pooled, profile

META = torch.device("meta")
CUBE, TEXT = TokenLayout((3, 4, 8)), TokenLayout((3, 4, 8), text_before=5, text_after=3)
TILES, TYPES = Tiles((3, 2, 4)), (Rows(), TimeMajor())
aten = torch.ops.aten


class Seen(TorchDispatchMode):
    """Notes operators that make or change something on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else [out]
        if any(isinstance(x, torch.Tensor) and x.device == META for x in outs):
            self.operators.add(func)
        return out


KEPT: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "a plan": (calls._plan, (TILES, Radial(), TEXT, 16, 16, META, 1, ALL_HERE)),
    "an order": (calls._table, (TILES, TEXT, 1, ALL_HERE, META)),
    "parts in order": (calls._parts, (TILES, TEXT, 4, 1, ALL_HERE, META)),
    "parts as tokens stand": (calls._parts, (Rows(), TEXT, 4, 1, ALL_HERE, META)),
    "blocks of text": (calls._forced, (TEXT, 16, 16, META)),
    "a gate's chunks": (gate._partition, (TILES, TEXT, 16, 16, META)),
    "orders of head types": (head_types._orders, (CUBE, TYPES, META)),
    "sampled queries": (head_types._drawn, (1, 2, 8, 96, META)),
    "units of head types": (head_types._units, (CUBE, TYPES, 1.0, 1, META)),
    "lists of head types": (head_types._lists, (head_types.HeadTypes().band, CUBE, 16, 16, META)),
    "adjacent blocks": (pooled._adjacent_blocks, (TILES, TEXT, 1, 16, 16, META)),
    "orders of a profile": (profile._table, (TYPES, CUBE, META)),
    "shares of rows": (density._row_shares, (100, 16, 16, META)),
    "matrices of codes": (quantize_hopper._matrices, (torch.bfloat16, META)),
    "a rotation": (sampled_means_triton.rotation_factors, (72, torch.bfloat16, META)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_was_copied_and_not_computed_there(name: str) -> None:
    build, arguments = KEPT[name]
    with Seen() as seen:
        build.__wrapped__(*arguments)  # type: ignore[attr-defined]
    assert seen.operators == {aten._to_copy.default}
