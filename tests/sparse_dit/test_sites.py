"""What a layer knows of itself, and the operator by which a compiled graph calls the engine."""

import copy
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparse_dit.engine import HEADS_FIRST, TOKENS_FIRST, Run
from sparse_dit.layout import TokenLayout
from sparse_dit.recipe import Recipe
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Radial
from sparse_dit.sites import Site
from sparse_dit.state import Context

RAGGED = TokenLayout((5, 5, 9), text_before=3, text_after=11)


def qkv() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, RAGGED.length, 64, generator=generator) for _ in range(3))


def running(**schedule: Any) -> Run:
    """A run in the first step of a forward."""
    recipe = Recipe(selection=Radial(density=0.4), schedule=Schedule(**schedule), block_q=16, block_k=16)
    run = Run(recipe)
    run.state.context = Context("cond", 0)
    run.begin_forward(RAGGED, torch.tensor(0.5), planned=1)
    return run


@pytest.mark.parametrize("axes", [HEADS_FIRST, TOKENS_FIRST])
def test_the_operator_and_its_fake_agree(axes: str) -> None:
    q, k, v = (x if axes == HEADS_FIRST else x.transpose(1, 2) for x in qkv())
    run = running()
    site = Site(0, run, torch.zeros((), dtype=torch.int64), F.__name__)
    arguments = (q, k, v, site.slot, site.clock, axes, None, "", "")
    torch.library.opcheck(torch.ops.sparse_dit.attend.default, arguments)
    out = torch.ops.sparse_dit.attend(*arguments)
    assert torch.equal(out, run.call(0, q, k, v, axes=axes, scale=None, refusal=None, dense=pytest.fail))  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "given"), [("sage", "sage"), ("", None)])
def test_a_dense_call_of_the_operator_keeps_the_backend_of_the_user(
    asked: str, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def dispatch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(options)
        return query + key + value

    home = types.ModuleType("home_of_a_processor")
    home.__dict__["dispatch_attention_fn"] = dispatch
    monkeypatch.setitem(sys.modules, home.__name__, home)
    site = Site(0, running(dense_steps=1), torch.zeros((), dtype=torch.int64), home.__name__)
    q, k, v = (x.transpose(1, 2) for x in qkv())
    out = torch.ops.sparse_dit.attend(q, k, v, site.slot, site.clock, TOKENS_FIRST, 0.5, asked)
    assert torch.equal(out, q + k + v)
    assert seen == [{"scale": 0.5, "backend": given}]


def test_a_copied_site_gets_a_number_and_a_run_of_its_own() -> None:
    run = running()
    clock = torch.zeros((), dtype=torch.int64)
    first, second = copy.deepcopy([Site(0, run, clock, ""), Site(1, run, clock, "")])
    assert first.run is second.run
    assert first.run is not run
    assert first.run.recipe == run.recipe
    assert first.clock is second.clock
    assert Site.find(first.slot) is first
    assert Site.find(second.slot) is second
