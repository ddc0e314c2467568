"""What a call does is noted and done again on other memory, or left to Python."""

import functools
import weakref

import pytest
import torch

from sparse_dit.kernels import replays
from sparse_dit.kernels.recorder import noting
from sparse_dit.kernels.replays import Recording, Replays

from .pretended_launches import KNOWN, SIZE, Result, again, kinds, launch, numbers

pytestmark = pytest.mark.usefixtures("on_a_gpu")


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


def test_operators_see_memory_as_it_was_seen():
    """Whole, in part and in another shape, which is also that in which it comes back."""

    def compute(x, y):
        out = torch.empty(SIZE)
        launch(x, y, out)
        out.masked_fill_(x > 8.0, 0.25)
        halves = out.view(2, 4)
        halves[1, 1:].masked_fill_(y.view(2, 4)[0, :3] > 3.0, 7.0)
        halves.masked_fill_(x.view(2, 4) > 6.0, 0.5)
        return Result(halves)

    inputs = [numbers(start, 2 * start) for start in range(4)]
    results, count, calls = again(compute, inputs)
    assert (count, kinds(calls)) == (2, [Recording])
    for (x, y), result in zip(inputs, results, strict=True):
        expected = (x + y).masked_fill(x > 8.0, 0.25)
        expected[5:] = expected[5:].masked_fill(y[:3] > 3.0, 7.0)
        assert torch.equal(result.out, expected.masked_fill(x > 6.0, 0.5).view(2, 4))


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
