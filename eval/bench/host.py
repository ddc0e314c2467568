"""Host time of one attention call beyond the model's own, by recipe: what Python and launches cost before a GPU works.

    python -m sparse_dit.eval.bench.host --rows eval/results/bench-host.jsonl

On a GPU calls are so small that it waits for the host, and wall time over many of them is the host's. On a CPU the
kernels of both sides are replaced by ones that return at once, and what is left is Python.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from sparse_dit.engine import Run
from sparse_dit.eval.bench.clock import garbage_waits
from sparse_dit.eval.results import append_row, command_line, device_of, provenance, to_json
from sparse_dit.kernels import host
from sparse_dit.layout import TokenLayout
from sparse_dit.processors import Installed
from sparse_dit.recipe import load_recipe

GRID = (2, 16, 16)
HEADS, HEAD_SIZE = 1, 64
CALLS, BATCHES = 100, 15
BLOCKS = {"block_q": 128, "block_k": 128}
POOLED = {"selection": {"name": "pooled", "density": 0.5}, **BLOCKS}
RECIPES: Mapping[str, Mapping[str, Any] | str] = {
    "dense": {"selection": {"name": "all"}},
    "static": {"selection": {"name": "radial", "density": 0.5}, **BLOCKS},
    "static, int8": {"selection": {"name": "radial", "density": 0.5}, "precision": "int8", **BLOCKS},
    "static, int8_fp8": {"selection": {"name": "radial", "density": 0.5}, "precision": "int8_fp8", **BLOCKS},
    "static, ordered": {
        "selection": {"name": "window", "tile": [1, 8, 8], "size": [1, 1, 1]},
        "order": {"name": "tiles", "tile": [1, 8, 8]},
        **BLOCKS,
    },
    "static, summaries": {"selection": {"name": "radial", "density": 0.5}, "skipped": "summary", **BLOCKS},
    "pooled, chosen in every call": POOLED,
    "pooled, kept from an earlier step": {**POOLED, "schedule": {"refresh_every": 10**6}},
    "balanced": "balanced",
    "sparge": "sparge",
    "jenga": "jenga",
}


class Processor:
    """As diffusers' own, without projections."""

    _attention_backend = None

    def __call__(self, attn: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = dispatch_attention_fn(x, x, x, backend=self._attention_backend)
        return out


class Attention(torch.nn.Module):
    """What holds a processor."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = Processor()

    def forward(self, x: torch.Tensor) -> Any:
        """One call."""
        return self.processor(self, x)


@contextmanager
def without_work(device: torch.device) -> Iterator[None]:
    """On a CPU, kernels that return at once."""
    if device.type != "cpu":
        yield
        return

    def sparse(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def quantized(codes: Any, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse(codes.v)

    def dense(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return query

    with (
        mock.patch.object(host, "host_attention", sparse),
        mock.patch.object(host, "host_quantized_attention", quantized),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", dense),
    ):
        yield


def microseconds(recipes: Sequence[Mapping[str, Any] | str | None], x: torch.Tensor) -> list[float]:
    """Host time of a call by each recipe, for `None` of the model's own: the median over batches of calls.

    Batches of all take turns, so that what else the machine does meets all alike.
    """
    clock = time.perf_counter if x.is_cuda else time.process_time
    with torch.no_grad():
        calls = [_made(recipe, x) for recipe in recipes]
        times: list[list[float]] = [[] for _ in calls]
        with garbage_waits():
            for _ in range(BATCHES):
                for call, spent in zip(calls, times, strict=True):
                    if x.is_cuda:
                        torch.cuda.synchronize()
                    start = clock()
                    for _ in range(CALLS):
                        call(x)
                    spent.append((clock() - start) / CALLS * 1e6)
    return [statistics.median(spent[1:]) for spent in times]


def _made(recipe: Mapping[str, Any] | str | None, x: torch.Tensor) -> Attention:
    """A layer that has made calls before."""
    attention = Attention()
    if recipe is None:
        return attention
    run = Run(load_recipe(recipe))
    Installed(run, [attention])
    run.begin_forward(TokenLayout(GRID), torch.tensor(0.5), CALLS)
    attention(x)
    # The next step: what the first call kept is used, unless the schedule refreshes in every step.
    run.begin_forward(TokenLayout(GRID), torch.tensor(0.4), CALLS)
    return attention


def main() -> None:
    """Measure all recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="file that gets the row; it is printed, too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(1, GRID[0] * GRID[1] * GRID[2], HEADS, HEAD_SIZE, device=device, dtype=dtype)
    with without_work(device):
        own, *ours = microseconds([None, *RECIPES.values()], x)
        beyond = {name: spent - own for name, spent in zip(RECIPES, ours, strict=True)}
    row = {
        "kind": "host",
        "own_us": own,
        "beyond_us": beyond,
        "shape": {"grid": GRID, "heads": HEADS, "head_size": HEAD_SIZE},
        "device": device_of(device, dtype),
        "command": command_line("python -m sparse_dit.eval.bench.host", sys.argv[1:]),
        **provenance(),
    }
    print(to_json(row))
    if options.rows is not None:
        append_row(options.rows, row)


if __name__ == "__main__":
    main()
