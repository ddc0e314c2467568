"""Which calls are alike, and when each is computed by Python."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from sparse_dit.engine import Run
from sparse_dit.kernels import replays, tiles
from sparse_dit.kernels.replays import Recording, Replays
from sparse_dit.recipe import load_recipe

from .pretended_launches import SIZE, Result, again, kinds, launch, numbers

pytestmark = pytest.mark.usefixtures("on_a_gpu")


class Looking(TorchDispatchMode):
    """Sees operators, and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_inputs_that_begin_at_one_place_are_another_call():
    """Recorded with k the same tensor as q, a list would read q in place of any other k."""

    def compute(x, y):
        out = torch.empty(SIZE)
        launch(x, y, out)
        return Result(out)

    calls = Replays()
    (x,) = numbers(1)
    again(compute, [(x, x)] * 3, calls)
    results, count, _ = again(compute, [numbers(1, 5)] * 3, calls)
    assert (count, kinds(calls)) == (2, [Recording] * 2)
    assert torch.equal(results[-1].out, 2 * x + 4)


def test_other_looks_and_settings_are_other_calls():
    def compute(x):
        out = torch.empty(SIZE)
        launch(x, None, out)
        return Result(out)

    calls = Replays()
    looks = [torch.zeros(SIZE), torch.zeros(2, SIZE)[:, :4], torch.zeros(SIZE + 1)[1:], torch.zeros(SIZE).double()]
    for x in looks:
        assert again(compute, [(x,)] * 3, calls)[1] == 2
    assert again(compute, [(looks[0],)] * 3, calls, "other")[1] == 2
    assert kinds(calls) == [Recording] * 5


def test_each_stream_has_calls_of_its_own(monkeypatch):
    """What stays may have been written by a launch, and another stream would not wait for it."""
    stays = {}

    def compute(x):
        stream = driver.active.get_current_stream(0)
        if stream not in stays:
            (stays[stream],) = numbers(stream)
        out = torch.empty(SIZE)
        launch(x, stays[stream], out)
        return Result(out)

    calls = Replays()
    for stream, count in ((10, 2), (20, 2), (10, 0), (20, 0)):
        monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda device, now=stream: now))
        results, made, _ = again(compute, [numbers(start) for start in range(3)], calls)
        assert made == count
        assert torch.equal(results[-1].out, numbers(2)[0] + numbers(stream)[0])
    assert kinds(calls) == [Recording] * 2


def test_who_looks_at_operators_or_launches_sees_them():
    def compute(x):
        out = torch.empty(SIZE)
        launch(x, None, out)
        return Result(out)

    calls, (x,) = Replays(), numbers(0)
    again(compute, [(x,)] * 3, calls)
    with Looking():
        assert again(compute, [(x,)], calls)[1] == 1
    knobs.runtime.launch_enter_hook.add(print)
    assert again(compute, [(x,)], calls)[1] == 1
    knobs.runtime.launch_enter_hook.remove(print)
    assert again(compute, [(x,)], calls)[1] == 0


def product(x, y):
    """Multiplies by torch, as gates are made, and goes on in the dtype that comes of it."""
    out, shares = torch.empty(SIZE), torch.bmm(x.view(1, 1, SIZE), y.view(1, SIZE, 1)).view(1)
    if shares.dtype is not torch.float32:
        return Result(out.copy_(shares.expand(SIZE)), "cast")
    padded = torch.zeros(SIZE)
    padded[:1].index_copy_(0, torch.ops.aten.zeros.default([1], dtype=torch.int64), shares)
    launch(padded, None, out)
    return Result(out)


def test_under_autocast_it_is_another_call():
    """Operators would cast, and kernels read what they made as if they had not."""
    calls, inputs = Replays(), [numbers(1, 2)] * 3
    assert again(product, inputs, calls)[1] == 2
    with torch.autocast("cpu", torch.bfloat16):
        results, count, _ = again(product, inputs, calls)
    assert count == 3
    assert [result.told for result in results] == ["cast"] * 3
    results, count, _ = again(product, inputs, calls)
    assert count == 0
    assert results[0].out[0] == torch.dot(*inputs[0])


def test_without_memory_for_all_at_once_python_computes(monkeypatch):
    def compute(x):
        out = torch.empty(SIZE)
        launch(x, None, out)
        return Result(out)

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("full")

    calls, (x,) = Replays(), numbers(0)
    again(compute, [(x,)] * 3, calls)
    monkeypatch.setattr(torch, "empty_strided", full)
    assert again(compute, [(x,)], calls)[1] == 1


def test_threads_share_calls_and_no_memory():
    def compute(x, y):
        half, out = torch.empty(SIZE), torch.empty(SIZE)
        launch(x, y, half, 3.0)
        launch(half, x, out)
        return Result(out)

    calls, inputs = Replays(), [numbers(start, 7 * start) for start in range(64)]
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(calls.call, None, given, functools.partial(compute, *given)) for given in inputs]
        results = [each.result() for each in made]
    assert kinds(calls) == [Recording]
    for (x, y), result in zip(inputs, results, strict=True):
        assert torch.equal(result.out, 2 * x + 3 * y)


def test_a_copied_run_notes_calls_of_its_own():
    run = Run(load_recipe("radial"))
    assert copy.deepcopy(run)._replays is not run._replays


def test_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(replays, "LIMIT", 2)
    _, _, calls = again(lambda x: Result(torch.empty(SIZE)), [[torch.zeros(size)] for size in range(1, 6)])
    assert len(calls._calls) <= 2


def test_what_calls_keep_is_bounded(monkeypatch):
    """Each text of another length has a block list of its own; those of calls that keep coming stay."""
    monkeypatch.setattr(replays, "KEPT", 3 * 4 * SIZE)
    kept, calls = {}, Replays()

    def compute(settings, x):
        stays = kept.setdefault(settings, torch.full((SIZE,), float(settings)))
        out = torch.empty(SIZE)
        launch(x, stays, out)
        return Result(out)

    def called(settings):
        return again(functools.partial(compute, settings), [numbers(1)] * 3, calls, settings)

    for settings in range(9):
        results, count, _ = called(settings)
        assert count == 2
        assert torch.equal(results[-1].out, numbers(1)[0] + settings)
        assert sum(calls._kept.values()) <= 4 * 4 * SIZE
    assert kinds(calls) == [Recording]
    again(functools.partial(compute, 8), [numbers(1)] * 3, calls, "shares its list")
    assert sum(calls._kept.values()) == 4 * SIZE
    many = range(9, 12)
    for settings in many:
        called(settings)
    assert sum(calls._kept.values()) > replays.KEPT
    assert [called(settings)[1] for settings in many] == [0, 0, 0]


def test_a_trial_of_launches_is_no_replay():
    def compute(x):
        out = torch.empty(SIZE)
        launch(x, None, out)
        return Result(out)

    calls = Replays()
    again(compute, [numbers(0)] * 3, calls)
    with tiles.trial(tiles.pinned("attention", "native", 64, "sm_90")):
        assert again(compute, [numbers(0)], calls)[1] == 1
    assert again(compute, [numbers(0)], calls)[1] == 0


def test_on_a_cpu_nothing_is_noted(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    _, count, calls = again(lambda x: Result(torch.empty(SIZE)), [numbers(0)] * 4)
    assert (count, kinds(calls)) == (4, [])
