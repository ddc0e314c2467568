"""Calibration: what heads need, found from a few calls whose queries and keys were looked at.

Pure functions of tensors; running a pipeline for them is `sparse_dit.eval.calibrate`. A search looks at calls (`look`),
whose findings are averaged by bin of steps, and settles them into what a profile holds (`settle`).
"""

from sparse_dit.calibration.costs import Costs
from sparse_dit.calibration.paro import Paro
from sparse_dit.calibration.search import Findings, Found, Search, Seen
from sparse_dit.calibration.sparse_vdit import SparseVDiT
from sparse_dit.calibration.windows import Windows

SEARCHES: dict[str, type[Search]] = {"paro": Paro, "sparse-vdit": SparseVDiT, "sta": Windows}

__all__ = ["SEARCHES", "Costs", "Findings", "Found", "Paro", "Search", "Seen", "SparseVDiT", "Windows"]
