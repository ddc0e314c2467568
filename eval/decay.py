"""How far self-attention looks: the mean attention mass by temporal and spatial distance.

    python -m sparse_dit.eval.decay --prompts 4 --out eval/results

Rows of sampled queries are computed in fp32 next to the model's own attention, which is left as it is; nothing of size
S x S is stored.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass
class Decay:
    """Attention mass summed over calls, heads and sampled queries of a (T, H, W) grid.

    Attributes:
        grid: the video's tokens.
        mass: fp64 [T, R], the mass of all keys `dt` frames and `ds` tokens (rounded Euclidean distance) away, summed.
        keys: fp64 [T, R], how many keys that were.
        queries: sampled query rows.
    """

    grid: tuple[int, int, int]
    mass: Tensor = field(init=False)
    keys: Tensor = field(init=False)
    queries: int = 0

    def __post_init__(self) -> None:
        frames, height, width = self.grid
        reach = round(math.hypot(height - 1, width - 1)) + 1
        self.mass = torch.zeros(frames, reach, dtype=torch.float64)
        self.keys = torch.zeros(frames, reach, dtype=torch.float64)

    def add(self, query: Tensor, key: Tensor, rows: Tensor) -> None:
        """Add the softmax rows of `query[:, :, rows]`: query, key [B, H, S, D] with S the grid's tokens."""
        scores = query[:, :, rows].float() @ rearrange(key.float(), "b h s d -> b h d s") / math.sqrt(query.shape[-1])
        row_mass = scores.softmax(-1).mean((0, 1)).double().cpu()  # [rows, S]
        time, space = self._distances(rows)
        cell = (time * self.mass.shape[1] + space).flatten()
        self.mass.view(-1).index_add_(0, cell, row_mass.flatten())
        self.keys.view(-1).index_add_(0, cell, torch.ones_like(row_mass).flatten())
        self.queries += len(rows)

    def _distances(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Frames and rounded tokens between each sampled query and every key: int64 [rows, S] each."""
        frames, height, width = self.grid
        t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
        t, y, x = t.flatten(), y.flatten(), x.flatten()
        space = torch.hypot((y[rows, None] - y).double(), (x[rows, None] - x).double()).round().long()
        return (t[rows, None] - t).abs(), space

    def relative(self, axis: str) -> list[float]:
        """Mean mass of one key at each distance over that of uniform attention; axis "time" or "space"."""
        if axis not in ("time", "space"):
            raise ValueError(f"axis must be 'time' or 'space', got {axis!r}")
        dim = 1 if axis == "time" else 0
        keys = self.keys.sum(dim).clamp(min=1)
        return [round(float(value), 5) for value in self.mass.sum(dim) / keys * math.prod(self.grid)]


class _SampledRows(TorchFunctionMode):
    """Looks at every self-attention call over the whole grid and lets it pass."""

    def __init__(self, decay: Decay, rows_per_call: int, seed: int) -> None:
        super().__init__()
        self.decay, self.rows_per_call = decay, rows_per_call
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = (
                kwargs.get(name, args[i] if i < len(args) else None) for i, name in enumerate(("query", "key"))
            )
            tokens = math.prod(self.decay.grid)
            if query.shape[-2] == tokens and key.shape[-2] == tokens:
                rows = torch.randperm(tokens, generator=self.generator)[: self.rows_per_call]
                self.decay.add(query, key, rows)
        return func(*args, **kwargs)


@contextmanager
def measured(grid: tuple[int, int, int], *, rows_per_call: int = 16, seed: int = 0) -> Iterator[Decay]:
    """Collect attention mass from every full self-attention call made through SDPA inside the block."""
    decay = Decay(grid)
    with _SampledRows(decay, rows_per_call, seed):
        yield decay


def draw(decay: Decay, path: Path) -> None:
    """Both curves as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, axis, unit in zip(panels, ("time", "space"), ("latent frames", "latent pixels"), strict=True):
        values = decay.relative(axis)
        panel.plot(range(len(values)), values, marker="o", color="#2458a6")
        panel.axhline(1, color="gray", linewidth=1, linestyle="--", label="uniform attention")
        panel.set(xlabel=f"distance in {axis} ({unit})", ylabel="mean mass of a key / uniform", yscale="log")
        panel.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    from sparse_dit.eval.pair import DENSE, plan_arguments
    from sparse_dit.eval.results import append_row, device_of, provenance
    from sparse_dit.pipelines.generate import Request, generate, load_pipeline
    from sparse_dit.pipelines.patch import explain
    from sparse_dit.pipelines.tiny_wan.grammar import held_out_prompts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts to generate")
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    options = parser.parse_args()
    pipe = load_pipeline("tiny-wan")
    requests = [Request(prompt, seed=seed) for seed, prompt in enumerate(held_out_prompts(options.prompts, seed=11))]
    grid = explain(pipe, DENSE, **plan_arguments(pipe, requests[0])).grid
    with measured(grid) as decay:
        for request in requests:
            generate(pipe, request)
    source = {
        "model": "tiny-wan",
        "grid": list(grid),
        "prompts": options.prompts,
        "queries": decay.queries,
        "device": device_of(pipe.device, pipe.dtype),
        **provenance(),
    }
    append_row(
        options.out / "tiny-wan-decay.jsonl",
        {**source, **{f"relative_mass_by_{axis}": decay.relative(axis) for axis in ("time", "space")}},
    )
    draw(decay, options.out / "pictures" / "tiny-wan-decay.png")


if __name__ == "__main__":
    main()
