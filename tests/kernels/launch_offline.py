"""Makes whole calls on a GPU that is not there, and prints their launches as a line of JSON a call.

Each is made three times: once as Triton launches, and twice by the remembered kernels.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from absent_gpu import launched

from sparse_dit.kernels import ops
from sparse_dit.kernels.bits_triton import triton_bits_to_lists, triton_lists_to_bits
from sparse_dit.kernels.cutoff_triton import triton_take_count, triton_take_mass
from sparse_dit.kernels.density_triton import triton_density
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.lists_triton import triton_lists
from sparse_dit.kernels.mass_triton import triton_mass
from sparse_dit.kernels.ordered_triton import triton_order_with_means
from sparse_dit.kernels.pool_triton import triton_mean_of_means, triton_pool
from sparse_dit.kernels.rows_triton import triton_band_errors, triton_closest_orders
from sparse_dit.kernels.scores_triton import triton_block_scores, triton_mark_unlike, triton_part_means, triton_scores

# precision, head size, keys a block, with an order, what becomes of skipped blocks
CALLS = (
    ("native", 128, 128, False, "drop"),
    ("native", 64, 64, True, "summary"),
    ("native", 72, 64, True, "drop"),
    ("int8", 128, 64, True, "summary"),
    ("int8_fp8", 128, 128, False, "drop"),
)
SEQ, HEADS = 500, 2


def thrice(work: Callable[[], object]) -> list[list[dict[str, Any]]]:
    """The launches of each of three equal calls."""
    calls = []
    for _ in range(3):
        launched.clear()
        work()
        calls.append(list(launched))
    return calls


def call(precision: str, head_size: int, block_k: int, ordered: bool, skipped: str, backend: str) -> None:
    """Prints the launches of attention along lists; tensors lie on the CPU."""
    q, k, v = (torch.zeros(1, SEQ, HEADS, head_size, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")
    mask = torch.ones(1, HEADS, -(-SEQ // 128), -(-SEQ // block_k), dtype=torch.bool).tril()
    lists = mask_to_lists(mask, 128, block_k)
    order = torch.arange(SEQ)[None] if ordered else None
    rest = (128, block_k, 0.125, precision, backend, skipped)
    calls = thrice(lambda: ops._computed(q, k, v, lists.indices, lists.counts, order, *rest))
    case = {"precision": precision, "head_size": head_size, "block_k": block_k, "ordered": ordered, "skipped": skipped}
    print(json.dumps({**case, "backend": backend, "calls": calls}))


def choose() -> None:
    """Prints the launches of everything that judges blocks and makes lists of them."""
    q, k, v = (torch.zeros(1, SEQ, HEADS, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")
    order, few = torch.arange(SEQ)[None], torch.arange(5)
    units = order.float().expand(2, -1)
    scores, own = torch.zeros(1, HEADS, 4, 8), torch.zeros(1, HEADS, 4, 8, dtype=torch.bool)
    blocks = mask_to_lists(~own, 128, 64)
    works: dict[str, Callable[[], object]] = {
        "order and means": lambda: triton_order_with_means(q, k, v, order, order, (16, 16), parts=True),
        "means of parts": lambda: triton_part_means(q, 16, order),
        "means": lambda: triton_pool(k, 64, order, None, True),
        "mean of means": lambda: triton_mean_of_means(scores, 64, 250),
        "unlike": lambda: triton_mark_unlike(scores, scores[..., 0], scores[:, :, 0], 0.5, lowest=True),
        "scores": lambda: triton_scores(q, k, 8, 4, 0.125, "logsumexp"),
        "scores of means": lambda: triton_block_scores(scores, scores, 0.125),
        "sampled rows": lambda: triton_band_errors(q, k, v, few, units, units, 7, 0.125),
        "closest orders": lambda: triton_closest_orders(torch.zeros(2, 1, HEADS, 5), order.expand(2, -1)),
        "count": lambda: triton_take_count(scores[0], 5, None),
        "mass": lambda: triton_take_mass(scores[0], own[0], 0.25),
        "lists": lambda: triton_lists("top_k", scores, 8, 3),
        "density": lambda: triton_density(blocks, SEQ),
        "bits": lambda: triton_bits_to_lists(triton_lists_to_bits(blocks, 8), 8),
        "block mass": lambda: triton_mass(q, k, torch.zeros(1, HEADS, SEQ), 128, 64, 0.125),
    }
    for name, work in works.items():
        print(json.dumps({"choice": name, "calls": thrice(work)}))


for case in CALLS:
    for backend in ("hopper", "triton"):
        call(*case, backend)
choose()
