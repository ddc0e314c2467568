"""Wan2.1-14B's architecture on one GPU and on several that share its tokens, with sparse attention; one result row.

    python -m torch.distributed.run --nproc-per-node 2 -m sparse_dit.eval.bench.parallel \\
        --rows eval/results/bench-parallel.jsonl

First a small transformer with random weights tells whether the processes together make what one makes: `small` holds,
for every recipe, the relative L2 difference of the two, and beside it that of one GPU in bf16 and in float32, which is
what rounding alone does. Then one forward of the large one, random weights too, is timed on one GPU, while the others
wait, and on all. `ratio` is the one time through the other, `exchange_s` what moving tokens and heads takes in a
forward. Phases for which no time is left are null.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparse_dit.eval.results import Row, append_row, command_line, device_of, provenance, to_json
from sparse_dit.parallel import shards_of
from sparse_dit.pipelines.patch import disable, enable, summary

BLOCKS = {"block_q": 128, "block_k": 128}
TILES = {"name": "tiles", "tile": [1, 8, 16]}
RADIAL = {"name": "radial, density 0.2", "selection": {"name": "radial", "density": 0.2}, **BLOCKS}
POOLED = {"selection": {"name": "pooled", "density": 0.2}, "order": TILES, **BLOCKS}
SMALL = (
    {**RADIAL, "name": "radial"},
    {**POOLED, "name": "pooled on tiles, with summaries", "skipped": "summary"},
    {**POOLED, "name": "pooled on tiles, int8", "precision": "int8"},
)


@dataclass(frozen=True)
class Size:
    """A Wan transformer and the video that it is given.

    Args:
        heads, layers: of the transformer.
        head_size, ffn, text: of a head, of the feed-forward layers, and of the text embeddings.
        latents: frames, rows and columns of the latents; a token is 1 x 2 x 2 of them.
    """

    heads: int
    layers: int
    latents: tuple[int, int, int]
    head_size: int = 128
    ffn: int = 13824
    text: int = 4096

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, H, W), video tokens."""
        return self.latents[0], self.latents[1] // 2, self.latents[2] // 2


LARGE_LAYERS = 40
# 1280 x 720 pixels, 81 frames: 75,600 tokens.
LARGE = Size(40, LARGE_LAYERS, (21, 90, 160))
LITTLE = Size(8, 3, (5, 48, 66), ffn=2048, text=64)
# For a trial on a machine without GPUs.
TINY = Size(2, 2, (3, 48, 66), head_size=16, ffn=32, text=16)


@dataclass
class Trial:
    """What all phases share.

    Args:
        device: of this process.
        dtype: of the weights.
        seconds: after so many no phase and no further run begins.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float
    begun: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that all processes have left, the same number on all."""
        left = torch.tensor(self.seconds - (time.monotonic() - self.begun), device=self.device)
        dist.all_reduce(left, dist.ReduceOp.MIN)
        return float(left)

    def say(self, what: str) -> None:
        """Tell how far it is, on the first process."""
        if dist.get_rank() == 0:
            print(f"{time.monotonic() - self.begun:6.1f} s  {what}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object], *, together: bool, runs: int) -> list[float]:
        """Seconds of calls after one that is not counted; of calls of all processes together, those of the slowest."""
        seconds = []
        for number in range(runs + 1):
            if number > 1 and (self.left() if together else self.seconds - (time.monotonic() - self.begun)) < 0:
                break
            if together:
                dist.barrier()
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            passed = torch.tensor(time.perf_counter() - start, device=self.device)
            if together:
                dist.all_reduce(passed, dist.ReduceOp.MAX)
            if number:
                seconds.append(float(passed))
        return seconds


def build(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A Wan transformer whose random weights, the same on all processes, are drawn where they stay."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel(
            num_attention_heads=size.heads,
            attention_head_dim=size.head_size,
            text_dim=size.text,
            freq_dim=256,
            ffn_dim=size.ffn,
            num_layers=size.layers,
            cross_attn_norm=True,
        ).eval()
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            weight = torch.empty(empty.shape, dtype=dtype, device=device)
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(float(name == "weight"))
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    return model.to(device)


def inputs(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a forward, the same on all processes."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, *size.latents, generator=generator).to(device, dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, 512, size.text, generator=generator).to(device, dtype),
        "return_dict": False,
    }


def forward(model: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    """The prediction."""
    with torch.no_grad():
        out: torch.Tensor = model(**arguments)[0]
    return out


def share(model: Any) -> None:
    """Let all processes share the tokens (Ulysses)."""
    from diffusers import ContextParallelConfig

    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance, the largest over the processes."""
    told = (one.double() - other.double()).norm() / other.double().norm()
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told)


def check(trial: Trial, size: Size) -> list[Row]:
    """Whether all processes together make what one makes, by recipe."""
    model, exact = (build(size, trial.device, dtype) for dtype in (trial.dtype, torch.float32))
    exact.load_state_dict(model.state_dict())
    given = inputs(size, trial.device, trial.dtype)
    alone = []
    for recipe in SMALL:
        enable(model, recipe, strict=True)
        enable(exact, recipe, strict=True)
        floats = {name: x.float() if name.endswith("states") else x for name, x in given.items()}
        alone.append((forward(model, given), forward(exact, floats)))
    disable(model)
    share(model)
    rows = []
    for recipe, (one, in_floats) in zip(SMALL, alone, strict=True):
        enable(model, recipe, strict=True)
        together = forward(model, given)
        rows.append(
            {
                "recipe": recipe["name"],
                "difference": difference(together, one),
                "rounding": difference(one, in_floats),
                "sparse_calls": summary(model).sparse,
                "density": summary(model).density,
            }
        )
        trial.say(f"small, {recipe['name']}: {rows[-1]['difference']:.2g}, rounding {rows[-1]['rounding']:.2g}")
    return rows


def exchange(trial: Trial, size: Size) -> float:
    """Seconds that moving tokens and heads takes in a forward."""
    frames, height, width = size.grid
    shards = shards_of(dist.group.WORLD, (frames * height * width,))
    shape = (1, shards.lengths[shards.rank], size.heads, size.head_size)
    q, k, v = (torch.zeros(shape, dtype=trial.dtype, device=trial.device) for _ in range(3))
    times = trial.time(lambda: shards.scatter(shards.gather(q, k, v)[0]), together=True, runs=5)
    return size.layers * statistics.median(times)


def measure(trial: Trial, size: Size, recipe: Mapping[str, Any], runs: int) -> Row:
    """One forward on one GPU and on all."""
    row: Row = dict.fromkeys(
        ("one_s", "one_runs", "shared_s", "shared_runs", "ratio", "exchange_s", "difference", "density", "peak_gib")
    )
    if trial.left() < 0:
        return row
    model, given = build(size, trial.device, trial.dtype), inputs(size, trial.device, trial.dtype)
    enable(model, recipe, strict=True)
    trial.say(f"{size.layers} layers are built")
    outs: list[torch.Tensor] = []
    if dist.get_rank() == 0:
        times = trial.time(lambda: outs.append(forward(model, given)), together=False, runs=runs)
        row |= {"one_s": statistics.median(times), "one_runs": len(times), "peak_gib": [peak(trial.device)]}
        trial.say(f"one GPU: {row['one_s']:.3f} s, {len(times)} runs")
    dist.barrier()
    if trial.left() < 0:
        return row
    one = outs[-1] if outs else torch.empty_like(given["hidden_states"])
    dist.broadcast(one, 0)
    outs.clear()
    share(model)
    times = trial.time(lambda: outs.append(forward(model, given)), together=True, runs=runs)
    row |= {"shared_s": statistics.median(times), "shared_runs": len(times), "density": summary(model).density}
    row["difference"], row["exchange_s"] = difference(outs[-1], one), exchange(trial, size)
    if row["one_s"] is not None:
        row["ratio"] = row["one_s"] / row["shared_s"]
        row["peak_gib"].append(peak(trial.device))
        trial.say(f"{dist.get_world_size()} processes: {row['shared_s']:.3f} s, {row['ratio']:.3f} times as fast")
    return row


def peak(device: torch.device) -> float | None:
    """GiB allocated at most since the last call; none on a CPU."""
    if device.type != "cuda":
        return None
    gib = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return gib


def main() -> None:
    """One of the processes that `torch.distributed.run` starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="file that gets the row; it is printed, too")
    parser.add_argument("--layers", type=int, default=LARGE_LAYERS, help=f"of {LARGE_LAYERS}")
    parser.add_argument("--runs", type=int, default=3, help="timed forwards, after one that is not")
    parser.add_argument("--seconds", type=float, default=140.0, help="no phase or run begins later")
    parser.add_argument("--precision", default="native", help="of the large transformer's attention")
    parser.add_argument("--tiny", action="store_true", help="a trial of this program on CPUs")
    options = parser.parse_args()
    device, dtype = torch.device("cpu"), torch.float32
    if options.tiny:
        dist.init_process_group("gloo")
        # diffusers divides by the number of accelerators to find this process's.
        torch.accelerator.device_count = dist.get_world_size
    else:
        device, dtype = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.bfloat16
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    trial = Trial(device, dtype, options.seconds)
    large = TINY if options.tiny else Size(LARGE.heads, options.layers, LARGE.latents)
    recipe = {**RADIAL, "precision": options.precision}
    small = check(trial, TINY if options.tiny else LITTLE)
    measured = measure(trial, large, recipe, options.runs)
    if dist.get_rank() == 0:
        shape = {"grid": large.grid, "heads": large.heads, "head_size": large.head_size, "layers": large.layers}
        row = {
            "kind": "parallel",
            "model": "tiny" if options.tiny else "Wan2.1-14B, random weights",
            "of_layers": TINY.layers if options.tiny else LARGE_LAYERS,
            "shape": shape,
            "processes": dist.get_world_size(),
            "recipe": recipe,
            "small": small,
            **measured,
            "seconds": time.monotonic() - trial.begun,
            "device": device_of(device, dtype),
            "command": command_line("python -m sparse_dit.eval.bench.parallel", sys.argv[1:]),
            **provenance(),
        }
        print(to_json(row))
        if options.rows is not None:
            append_row(options.rows, row)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
