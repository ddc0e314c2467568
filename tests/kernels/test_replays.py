"""Calls that come again do the same work on other memory, or are computed as before."""

import copy
import ctypes
import functools
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from sparse_dit.engine import Run
from sparse_dit.kernels import replays, tiles
from sparse_dit.kernels.launches import Known
from sparse_dit.kernels.recorder import noting
from sparse_dit.kernels.replays import Recording, Replays
from sparse_dit.recipe import load_recipe

SIZE = 8


def floats(address):
    return (ctypes.c_float * SIZE).from_address(address)


def added(x, y, z, stream, function, packed, metadata, enter, leave, first, second, out, factor):
    """A "kernel" that works on addresses: out = first + factor second. None is zeros, a descriptor its tensor."""
    assert (x, y, z, stream, function, packed) == (3, 1, 1, driver.active.get_current_stream(0), "function", "packed")
    first, second = (getattr(each, "base", each) for each in (first, second))
    first, second = (each if each is None or isinstance(each, int) else each.data_ptr() for each in (first, second))
    one, two = (floats(each) if each else [0.0] * SIZE for each in (first, second))
    for i in range(SIZE):
        floats(out)[i] = one[i] + factor * two[i]


class Box:
    """Stands in for a TMA descriptor."""

    def __init__(self, base):
        self.base, self.block_shape = base, [4]


class Looking(TorchDispatchMode):
    """Sees operators, and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


KNOWN = Known(compiled=None, constants=[], run=added, function="function", packed="packed")


def launch(first, second, out, factor=1.0, known=KNOWN, box=False):
    """As `launch_kernel` does it."""
    boxes = (Box(first),) if box else ()
    tensors = (second, out) if box else (first, second, out)
    if noting.recorder is not None:
        noting.recorder.note(known, (3, 1, 1), boxes, tensors, (factor,))
    at = [None if x is None else x.data_ptr() for x in (first, second, out)]
    added(3, 1, 1, driver.active.get_current_stream(0), "function", "packed", None, None, None, *at, factor)


class Result(NamedTuple):
    out: torch.Tensor
    told: str = "told"


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Tensors say that they lie on one, and memory is not poisoned: that would be an operator."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: -1)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda device: "stream"))
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)


def numbers(*first):
    return [torch.arange(SIZE, dtype=torch.float32) + start for start in first]


def kinds(calls):
    return [type(kind) for kind in calls._calls.values()]


class Counted:
    """A function that counts how often Python ran it."""

    def __init__(self, compute):
        self.compute, self.count = compute, 0

    def __call__(self, *inputs):
        self.count += 1
        return self.compute(*inputs)


def again(compute, inputs, calls=None, settings=None):
    """Results of calls with each of the inputs in turn, how often Python computed them, and the calls."""
    calls, counted = calls or Replays(), Counted(compute)
    results = [calls.call(settings, given, functools.partial(counted, *given)) for given in inputs]
    return results, counted.count, calls


def test_what_the_recorded_call_returned_is_let_go():
    def compute(x):
        out = torch.empty(SIZE)
        launch(x, x, out)
        return Result(out)

    calls, made = Replays(), []
    for start in range(3):
        out = calls.call(None, numbers(start), functools.partial(compute, *numbers(start))).out
        made.append(weakref.ref(out))
        del out
    assert kinds(calls) == [Recording]
    assert [one() for one in made] == [None, None, None]


def test_the_third_call_is_a_list_of_launches_on_memory_of_its_own():
    def compute(x, y):
        half, out = torch.empty(SIZE), torch.empty(1, SIZE)
        launch(x, y, half, 2.0)
        launch(half, None, out)
        return Result(out)

    inputs = [numbers(start, 10 * start) for start in range(5)]
    results, count, calls = again(compute, inputs)
    assert (count, kinds(calls)) == (2, [Recording])
    for (x, y), result in zip(inputs, results, strict=True):
        assert torch.equal(result.out, (x + 2 * y)[None])
        assert result.told == "told"
    assert len({result.out.data_ptr() for result in results}) == 5


@pytest.mark.parametrize("large", [False, True])
def test_views_large_memory_descriptors_and_what_stays(monkeypatch, large):
    monkeypatch.setattr(replays, "SMALL", 1 if large else 2**20)
    (stays,) = numbers(100)

    def compute(x):
        pair = torch.empty(2, SIZE)
        launch(x, stays, pair[1])
        out = torch.empty(SIZE, 2).t()[:1].new_empty(2, SIZE)
        launch(pair[1], stays, out[0], box=True)
        launch(stays, x, out[1], box=True)
        return Result(out.t())

    results, count, calls = again(compute, [numbers(start) for start in range(4)])
    assert (count, kinds(calls)) == (2, [Recording])
    for start, result in enumerate(results):
        (x,) = numbers(start)
        assert torch.equal(result.out, torch.stack((x + 2 * stays, stays + x)).t())
        assert result.out.stride() == (1, SIZE)


def test_operators_in_between_run_again():
    def compute(x, y):
        total = torch.zeros(2, SIZE)
        launch(x, y, total[0])
        shares = total.softmax(dim=-1)
        shares.masked_fill_(x > 3.0, 0.5)
        out = torch.empty(SIZE)
        launch(shares[0], x, out)
        return Result(out)

    inputs = [numbers(start, 2 * start) for start in range(4)]
    results, count, calls = again(compute, inputs)
    assert (count, kinds(calls)) == (2, [Recording])
    for (x, y), result in zip(inputs, results, strict=True):
        assert torch.equal(result.out, (x + y).softmax(dim=-1).masked_fill(x > 3.0, 0.5) + x)


def test_memory_that_is_handed_out_twice_is_told_apart():
    def compute(x):
        first = torch.empty(SIZE)
        launch(x, None, first, 1.0)
        kept = torch.empty(SIZE)
        launch(first, first, kept)
        del first
        second, out = torch.empty(SIZE), torch.empty(SIZE)  # where the first was, most likely
        launch(kept, None, second)
        launch(second, kept, out)
        return Result(out)

    results, count, _ = again(compute, [numbers(start) for start in range(3)])
    assert count == 2
    assert torch.equal(results[-1].out, 4 * numbers(2)[0])


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


def test_an_input_may_come_back_as_it_is():
    def compute(x, y):
        out = torch.empty(SIZE)
        launch(x, None, out)
        return (out, y)

    inputs = [numbers(start, 7) for start in range(3)]
    results, count, _ = again(compute, inputs)
    assert count == 2
    assert all(result[1] is y for (_, y), result in zip(inputs, results, strict=True))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.sum().item(),  # reads the GPU back
        lambda x: x.nonzero(),
        lambda x: torch.rand(SIZE),
        lambda x: launch(x, x, torch.empty(SIZE), known=None),
        lambda x: launch(x, x, torch.empty(SIZE), known=KNOWN._replace(run=None)),
        lambda x: launch(x[1:], None, torch.empty(SIZE), 0.0),
    ],
)
def test_what_only_python_can_do_is_left_to_it(other):
    def compute(x):
        other(x)
        out = torch.empty(SIZE)
        launch(x, None, out)
        return Result(out)

    results, count, calls = again(compute, [[torch.arange(2.0 * SIZE)]] * 6)
    assert count == 6
    assert kinds(calls) == [int]
    assert torch.equal(results[-1].out, torch.arange(float(SIZE)))


def twice(x):
    out = torch.empty(SIZE)
    launch(x, None, out)
    return out, out


def test_one_memory_comes_back_once():
    """A replay would make memory for each, and write to one alone."""
    results, count, calls = again(twice, [numbers(start) for start in range(4)])
    assert (count, kinds(calls)) == (4, [int])
    assert torch.equal(torch.stack(results[-1]), torch.stack(2 * numbers(3)))


@pytest.mark.parametrize("returned", [lambda x: x[:4], lambda x: torch.empty(2, SIZE)[0], lambda x: torch.zeros(SIZE)])
def test_results_must_be_memory_of_their_own(returned):
    _, count, calls = again(lambda x: Result(returned(x)), [numbers(0)] * 4)
    assert (count, kinds(calls)) == (4, [int])


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
    """Multiplies by torch, as scores of means are, and goes on in the dtype that comes of it."""
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operators_made_of_others_are_noted_in_any_mode(mode):
    def compute(x, y):
        scores = (x.view(1, 2, 4) @ y.view(1, 2, 4).mT).softmax(dim=-1)
        wide, out = scores.flatten().expand(2, 4).contiguous(), torch.empty(SIZE)
        launch(wide, None, out)
        return Result(out)

    inputs = [numbers(start, 2 * start) for start in range(4)]
    with mode():
        results, count, calls = again(compute, inputs)
    assert (count, kinds(calls)) == (2, [Recording])
    for (x, y), result in zip(inputs, results, strict=True):
        scores = (x.view(1, 2, 4) @ y.view(1, 2, 4).mT).softmax(dim=-1)
        assert torch.equal(result.out.view(2, 4), scores.flatten().expand(2, 4))


def test_views_of_nothing_have_no_address():
    def compute(x):
        out, places = torch.empty(SIZE), torch.zeros(SIZE, dtype=torch.int64)
        launch(x, None, out)
        out.index_copy_(0, places[SIZE:], torch.zeros(2 * SIZE)[SIZE:SIZE])
        return Result(out)

    results, count, calls = again(compute, [numbers(start) for start in range(4)])
    assert (count, kinds(calls)) == (2, [Recording])
    assert torch.equal(results[-1].out, *numbers(3))


def test_a_kernel_stays_as_long_as_it_is_launched():
    """Triton unloads one when the last that has it lets go."""

    class Compiled:
        pass

    known = KNOWN._replace(compiled=Compiled())
    stays = weakref.ref(known.compiled)

    def compute(x):
        out = torch.empty(SIZE)
        launch(x, None, out, known=given.pop())
        return Result(out)

    given, calls = [known, known], Replays()
    del known
    results, count, _ = again(compute, [numbers(start) for start in range(4)], calls)
    assert count == 2
    assert torch.equal(results[-1].out, *numbers(3))
    assert stays() is not None


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


def test_an_error_while_noting_passes_and_ends_it():
    def compute(x):
        if noting.recorder is not None:
            raise RuntimeError("broken")
        return Result(torch.empty(SIZE))

    calls = Replays()
    again(compute, [numbers(0)], calls)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        again(compute, [numbers(0)], calls)
    assert noting.recorder is None


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
