"""Questions that calls alike ask once."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_dit.kernels import alike
from sparse_dit.kernels.alike import remembered
from sparse_dit.kernels.lists import mask_to_lists

LISTS = mask_to_lists(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64)


class Asked:
    """How often a question came through, and with what."""

    def __init__(self):
        self.times = 0
        self.ask = remembered(self.answer)

    def answer(self, *args):
        self.times += 1
        return self.times


def test_what_looks_alike_is_asked_once():
    asked = Asked()
    for _ in range(3):
        assert asked.ask(torch.rand(2, 3), LISTS, "word", 1.0, None) == 1
    assert asked.times == 1


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(2, 4), LISTS, 1.0),
        (torch.ones(3, 2).mT, LISTS, 1.0),
        (torch.ones(2, 3, dtype=torch.float64), LISTS, 1.0),
        (torch.ones(2, 3, device="meta"), LISTS, 1.0),
        (torch.ones(7)[1:].view(2, 3), LISTS, 1.0),  # does not start at a piece
        (torch.ones(2, 3), mask_to_lists(torch.ones(1, 1, 2, 3, dtype=torch.bool), 64, 64), 1.0),
        (torch.ones(2, 3), mask_to_lists(torch.ones(1, 1, 2, 2, dtype=torch.bool), 32, 64), 1.0),
        (torch.ones(2, 3), LISTS.to("meta"), 1.0),
        (torch.ones(2, 3), LISTS, 2.0),
        (torch.ones(2, 3), LISTS, None),
        (torch.ones(2, 3), LISTS, torch.ones(2)),
    ],
)
def test_what_looks_another_is_asked_anew(other):
    asked = Asked()
    asked.ask(torch.ones(2, 3), LISTS, 1.0)
    asked.ask(*other)
    assert asked.times == 2


def test_what_another_thread_forgets_meanwhile_is_no_error(monkeypatch):
    monkeypatch.setattr(alike, "LIMIT", 1)
    asked, x = Asked(), torch.ones(2)

    class Between(str):
        """Looked up twice, it is forgotten in between."""

        looked_up = 0

        def __hash__(self):
            self.looked_up += 1
            if self.looked_up == 2:
                asked.ask(x, 2.0)
            return super().__hash__()

    asked.ask(x, "word")
    assert asked.ask(x, Between("word")) == asked.times


def test_errors_are_not_remembered():
    times = []

    @remembered
    def fails(x):
        times.append(x)
        if len(times) < 2:
            raise ValueError("x: once")
        return "fine"

    x = torch.ones(1)
    with pytest.raises(ValueError, match="x: once"):
        fails(x)
    assert fails(x) == fails(x) == "fine"
    assert len(times) == 2


def test_tensors_without_memory_are_asked_each_time():
    asked = Asked()
    with FakeTensorMode():
        x = torch.ones(2)
        assert (asked.ask(x), asked.ask(x)) == (1, 2)
    parameter = torch.nn.Parameter(torch.ones(2))
    assert (asked.ask(parameter), asked.ask(parameter)) == (3, 4)


def test_wrapped_tensors_are_asked_each_time():
    asked = Asked()
    for _ in range(2):
        torch.vmap(lambda x: x + asked.ask(x))(torch.ones(3, 2))
    assert asked.times == 2


def test_answers_are_bounded(monkeypatch):
    monkeypatch.setattr(alike, "LIMIT", 2)
    asked = Asked()
    for size in (1, 2, 3, 3, 1):
        asked.ask(torch.ones(size))
    assert asked.times == 4  # 1, 2, 3, and 1 again, which was forgotten
