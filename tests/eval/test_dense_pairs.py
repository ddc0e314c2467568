"""Dense against dense: infinite PSNR and exactly zero differences, for every pipeline that ships."""

import math

import pytest
import torch

from sparse_dit.eval import pair
from sparse_dit.pipelines.generate import TINY_WAN, Request, load_pipeline
from sparse_dit.recipe import load_recipe

SHIPPED = (TINY_WAN,)
SMALL = Request("a large red circle moving right over a gray wall", seed=3, steps=2, height=48, width=48, num_frames=5)
# Its own size and the steps that it is meant for.
OWN = Request("a large red circle moving right over a gray wall", seed=3)


def assert_equal_to_the_bit(model: str, request: Request, device: str) -> None:
    pipe = load_pipeline(model, device)
    pipe.set_progress_bar_config(disable=True)
    [compared] = pair.compare(pipe, request, [load_recipe("dense")], model=model, warm_up=False)
    row = compared.record
    assert row["psnr"] == row["psnr_median"] == row["psnr_min"] == math.inf
    assert row["difference_max"] == row["flicker_max"] == 0
    assert row["ssim_min"] == pytest.approx(1, abs=1e-12)
    assert (compared.dense == compared.sparse).all()
    assert (row["density"], row["run_density"], row["calls"]["sparse"]) == (None, 1, 0)
    assert row["device"]["type"] == device


@pytest.mark.parametrize("model", SHIPPED)
def test_on_the_cpu(model: str) -> None:
    assert_equal_to_the_bit(model, SMALL, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("request_", [SMALL, OWN], ids=["small", "own size"])
@pytest.mark.parametrize("model", SHIPPED)
def test_on_the_gpu(model: str, request_: Request) -> None:
    assert torch.cuda.is_available()
    assert_equal_to_the_bit(model, request_, "cuda")
