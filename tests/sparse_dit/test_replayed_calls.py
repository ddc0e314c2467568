"""Calls that are replayed give what computed ones give, with kernels that really run.

Where there is no GPU Triton interprets them, and tensors of the CPU say that they lie on a GPU.
"""

import ctypes
from types import SimpleNamespace

import pytest
import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from sparse_dit.calls import _plan, plan
from sparse_dit.engine import TOKENS_FIRST, Run
from sparse_dit.kernels import launches, quantize_triton
from sparse_dit.kernels.replays import Recording
from sparse_dit.layout import TokenLayout
from sparse_dit.recipe import load_recipe

LAYOUT, HEADS, HEAD_SIZE = TokenLayout((1, 10, 13), 0, 5), 1, 64
interpret = InterpretedFunction.run


class Interpreted(CompiledKernel):
    """A kernel as a compiled one is started: by addresses, from which tensors are made."""

    function = packed_metadata = None

    def __init__(self, kernel, args, options):
        self.kernel, self.options, self.module = kernel, options, None
        self.args = args

    @property
    def run(self):
        def run(x, y, z, stream, function, packed, metadata, enter, leave, *args):
            given = [
                at(now, x) if isinstance(x, torch.Tensor) else now for now, x in zip(args, self.args, strict=False)
            ]
            given += args[len(given) :]
            with _disable_current_modes():
                interpret(self.kernel, *given, grid=(x, y, z), warmup=False, **self.options)

        return run


def at(address, like):
    """A tensor at an address that reaches as far as another one's memory does."""
    size = like.untyped_storage().nbytes() - like.storage_offset() * like.element_size()
    if not address or not size:
        return torch.zeros(0, dtype=like.dtype)
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=torch.uint8).view(like.dtype)


def first_run(self, *args, grid, warmup, **fixed):
    with _disable_current_modes():
        interpret(self, *args, grid=grid, warmup=warmup, **fixed)
    return Interpreted(self, args, {name: fixed[name] for name in fixed if name not in self.arg_names})


@pytest.fixture
def device(monkeypatch):
    """Where tensors lie."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    monkeypatch.setattr(InterpretedFunction, "run", first_run)
    monkeypatch.setattr(launches, "_known", {})
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    monkeypatch.setattr(quantize_triton, "architecture", lambda _: "sm_89")
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda _: 0))
    return "cpu"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("preset", ["radial", "sparge", "jenga"])
def test_replayed_calls_give_what_computed_ones_give(preset, mode, device, monkeypatch):
    with mode():
        check_replayed(load_recipe(preset), device, monkeypatch)


def test_a_sink_and_blocks_that_are_forced_are_replayed(device, monkeypatch):
    settings = {"name": "pooled", "density": 0.3, "sink": True, "similarity": 0.2, "adjacent": True}
    with torch.inference_mode():
        check_replayed(load_recipe({"selection": settings, "block_q": 64, "block_k": 64}), device, monkeypatch)


def check_replayed(recipe, device, monkeypatch):
    dense = {"schedule.dense_steps": 0, "schedule.dense_above": 1.0, "schedule.dense_layers": []}
    recipe = recipe.override(dense)
    runs = [Run(recipe), Run(recipe)]
    monkeypatch.setattr(runs[1]._replays, "call", lambda settings, inputs, compute: compute(), raising=False)
    torch.manual_seed(0)
    for step in range(3):
        q, k, v = torch.randn(1, LAYOUT.length, 3 * HEADS, HEAD_SIZE, device=device).half().chunk(3, dim=2)
        found = []
        for run in runs:
            run.begin_forward(LAYOUT, torch.tensor(0.5 - step / 100), planned=1)
            found.append(run.call(0, q, k, v, axes=TOKENS_FIRST, scale=None, refusal=None, dense=torch.zeros_like))
            run.end_forward()
        assert torch.equal(*found)
        assert found[0].stride() == found[1].stride()
        assert found[0].isfinite().all()
    replayed, computed = (run.tally.summary() for run in runs)
    assert replayed == computed
    assert replayed.backend.startswith(("triton", "hopper"))
    assert [type(kind) for kind in runs[0]._replays._calls.values()] == [Recording]


def test_a_replay_does_not_lose_the_error_of_gradients(device):
    run = Run(load_recipe("radial").override({"schedule.dense_steps": 0, "schedule.dense_layers": []}))
    run.begin_forward(LAYOUT, torch.tensor(0.5), planned=4)
    q = torch.randn(1, LAYOUT.length, HEADS, HEAD_SIZE, device=device).half().requires_grad_()

    def called():
        return run.call(0, q, q, q, axes=TOKENS_FIRST, scale=None, refusal=None, dense=torch.zeros_like)

    with torch.no_grad():
        assert not any(called().requires_grad for _ in range(3))
    assert [type(kind) for kind in run._replays._calls.values()] == [Recording]
    with pytest.raises(RuntimeError, match="autograd"):
        called().sum().backward()


@pytest.mark.gpu
def test_streams_share_a_run_and_read_nothing_that_another_one_has_still_to_write():
    recipe = load_recipe("radial").override({"schedule.dense_steps": 0, "schedule.dense_layers": []})
    q = torch.randn(1, LAYOUT.length, HEADS, HEAD_SIZE, device="cuda").half()

    def calls(run):
        run.begin_forward(LAYOUT, torch.tensor(0.5), planned=3)
        settings = {"axes": TOKENS_FIRST, "scale": None, "refusal": None, "dense": torch.zeros_like}
        return [run.call(0, q, q, q, **settings) for _ in range(3)]

    wanted, *_ = calls(Run(recipe))  # compiles
    _plan.cache_clear()
    plan(recipe, LAYOUT, q.device, HEADS)  # its copies would wait for the busy stream
    run, busy, other = Run(recipe), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(10**9)
        late = calls(run)
    with torch.cuda.stream(other):
        early = calls(run)
    other.synchronize()
    assert not busy.query(), "it was over before the other stream could be early"
    assert all(torch.equal(out, wanted) for out in early)
    busy.synchronize()
    assert all(torch.equal(out, wanted) for out in late)
