"""What every test shares: Triton's interpreter where there is no GPU, and fresh memory that is never clean by luck."""

import json
import os
import subprocess
import sys
import time

import torch

# Before anything imports Triton: its decorators read this once.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(allocate)
    def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = allocate(*args, **kwargs)
        if fresh.is_floating_point() or fresh.is_complex():
            return fresh.fill_(torch.nan)
        if fresh.dtype is torch.bool:
            return fresh.fill_(True)
        return fresh.fill_(torch.iinfo(fresh.dtype).max)

    return allocate_and_fill


@pytest.fixture(scope="session", autouse=True)
def poison() -> Iterator[None]:
    """Fills memory that torch hands out uninitialised with NaN (integers: their largest value).

    A kernel that forgets to write an element, or reads a padded one, then shows at once instead of passing on zeroed
    pages.
    """
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ]:
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(scope="session")
def mini_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `WanPipeline` of random weights that runs in a fraction of a second; a token is 8x8 pixels.

    Read-only: a test that damages it takes a copy.
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    from sparse_dit.pipelines.tiny_wan import architecture

    torch.manual_seed(0)
    tokenizer = architecture.build_tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=architecture.TEXT_WIDTH, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=architecture.build_text_encoder(tokenizer),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    folder = tmp_path_factory.mktemp("mini-wan")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def printed_by(tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a program of the tests for which Triton compiles, and returns what it prints, a line of JSON each.

    It runs apart from the tests' process: Triton reads TRITON_INTERPRET once, when a kernel is defined. Programs import
    what lies beside the kernels' tests.
    """

    def run(program: Path, *arguments: str) -> list[Any]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = [str(Path(__file__).with_name("kernels")), *filter(None, [environment.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, program, *arguments],
            env=environment | {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(tmp_path / "triton")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="session")
def processes_find(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Runs a program of the tests in two processes at once, and returns what each of them finds.

    The program takes a folder, is told its number in RANK, and writes that number's file there, of JSON.
    """

    def run(program: Path, processes: int = 2) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("processes")
        settings = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(
                [sys.executable, program, str(folder)],
                env={**settings, "RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=(folder / f"{rank}.txt").open("w"),
            )
            for rank in range(processes)
        ]
        try:
            # One that failed is not what the others may wait for.
            while None in (codes := [process.poll() for process in running]) and not any(codes):
                time.sleep(0.05)
        finally:
            for process in running:
                process.kill()
        failed = [(folder / f"{rank}.txt").read_text()[-2000:] for rank, code in enumerate(codes) if code]
        assert not failed, failed[0]
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]

    return run
