"""Rebound processors: the model's own code with another attention, and nothing else changed."""

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparse_dit import processors as processors_module
from sparse_dit.engine import Run, sparse_attention
from sparse_dit.layout import TokenLayout
from sparse_dit.processors import Installed
from sparse_dit.recipe import Recipe
from sparse_dit.samples import Sample, Tokens
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Radial
from sparse_dit.state import Context

LAYOUT = TokenLayout((5, 5, 9))
THIS = sys.modules[__name__]


def dispatch_attention_fn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Stands in for diffusers' dispatcher: tokens first, and it tells what it was given."""
    dispatched.append((args, kwargs))
    moved = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*moved).transpose(1, 2)


dispatched: list[tuple[Any, Any]] = []


class DispatchProcessor:
    """Tokens first, through the dispatcher."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, attn: Any, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0) -> Any:
        return scale * dispatch_attention_fn(x, x, x, attn_mask=mask, backend=self._attention_backend)


class FunctionalProcessor:
    """Heads first, through torch."""

    def __call__(self, attn: Any, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0) -> Any:
        x = x.transpose(1, 2)
        return scale * F.scaled_dot_product_attention(x, x, x, mask, dropout_p=0.0).transpose(1, 2)


class Attention(torch.nn.Module):
    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        return self.processor(self, x, **kwargs)


processors = pytest.mark.parametrize("processor", [DispatchProcessor, FunctionalProcessor])


def install(*processors: Any, dense_steps: int = 0) -> tuple[Run, Installed, list[torch.nn.Module]]:
    schedule = Schedule(dense_steps=dense_steps)
    run = Run(Recipe(selection=Radial(density=0.4), schedule=schedule, block_q=16, block_k=16))
    attentions: list[torch.nn.Module] = [Attention(processor) for processor in processors]
    installed = Installed(run, attentions)
    run.state.context = Context("cond", 0)
    run.begin_forward(LAYOUT, torch.tensor(0.5), planned=len(attentions))
    return run, installed, attentions


def tokens(length: int = LAYOUT.length) -> torch.Tensor:
    return torch.randn(1, length, 2, 64, generator=torch.Generator().manual_seed(0))


@processors
def test_the_class_keeps_its_name_its_signature_and_its_settings(processor: type[Any]) -> None:
    original = processor()
    original.setting = object()
    _, _, (first, second) = install(original, processor())
    rebound: Any = first.processor
    assert isinstance(rebound, processor)
    assert type(rebound).__name__ == processor.__name__
    assert inspect.signature(rebound.__call__) == inspect.signature(original.__call__)
    assert rebound.setting is original.setting
    assert type(rebound) is type(second.processor)
    assert type(rebound) is not processor


@processors
def test_a_call_goes_to_the_engine(processor: type[Any]) -> None:
    run, _, (attention,) = install(processor())
    x = tokens()
    out = attention(x, scale=2.0)
    heads = x.transpose(1, 2)
    expected = 2.0 * sparse_attention(heads, heads, heads, grid=LAYOUT.grid, recipe=run.recipe).transpose(1, 2)
    assert torch.equal(out, expected)
    run.end_forward()
    assert run.tally.summary().sparse == 1


@processors
def test_the_modules_that_others_use_are_not_touched(processor: type[Any]) -> None:
    dispatch, attention = dispatch_attention_fn, F.scaled_dot_product_attention
    call = processor.__call__
    _, installed, (module,) = install(processor())
    module(tokens())
    stock = Attention(processor())
    moved = tokens().transpose(1, 2)
    assert torch.equal(stock(tokens()), F.scaled_dot_product_attention(moved, moved, moved).transpose(1, 2))
    assert (THIS.dispatch_attention_fn, F.scaled_dot_product_attention, processor.__call__) == (
        dispatch,
        attention,
        call,
    )
    installed.remove()


@processors
@pytest.mark.parametrize(
    ("arguments", "grad", "reason"),
    [({"mask": torch.ones(225, 225, dtype=torch.bool)}, False, "mask"), ({}, True, "gradient")],
)
def test_calls_that_cannot_be_sparse_run_as_the_model_made_them(
    processor: type[Any], arguments: dict[str, Any], grad: bool, reason: str
) -> None:
    run, _, (attention,) = install(processor())
    x = tokens().requires_grad_(grad)
    assert torch.equal(attention(x, **arguments), Attention(processor())(x, **arguments))
    run.end_forward()
    assert run.tally.summary().dense == {reason: 1}


class Varied:
    """Makes the call that a test asks for."""

    def __call__(
        self, attn: Any, x: torch.Tensor, key: torch.Tensor, options: dict[str, Any], value: torch.Tensor | None = None
    ) -> Any:
        return F.scaled_dot_product_attention(x, key, key if value is None else value, **options)


@pytest.mark.parametrize(
    ("keys", "heads", "options", "reason"),
    [
        (225, 2, {"is_causal": True}, "causal"),
        (225, 2, {"is_causal": True, "scale": 0.7}, "causal"),
        (77, 2, {"attn_mask": torch.arange(77)[None] < 50}, "cross_attention"),
        (225, 2, {"dropout_p": 0.5}, "dropout"),
        (77, 2, {}, "cross_attention"),
        (225, 1, {"enable_gqa": True}, "grouped_heads"),
    ],
)
def test_features_the_kernel_lacks_are_dense(keys: int, heads: int, options: dict[str, Any], reason: str) -> None:
    run, _, (attention,) = install(Varied())
    x, key = torch.randn(1, 2, LAYOUT.length, 64), torch.randn(1, heads, keys, 64)
    torch.manual_seed(0)
    out = attention(x, key=key, options=options)
    torch.manual_seed(0)
    assert torch.equal(out, F.scaled_dot_product_attention(x, key, key, **options))
    run.end_forward()
    assert run.tally.summary().dense == {reason: 1}


def test_values_of_another_width_are_dense() -> None:
    run, _, (attention,) = install(Varied())
    x, value = torch.randn(1, 2, LAYOUT.length, 64), torch.randn(1, 2, LAYOUT.length, 32)
    out = attention(x, key=x, value=value, options={})
    assert torch.equal(out, F.scaled_dot_product_attention(x, x, value))
    run.end_forward()
    assert run.tally.summary().dense == {"grouped_heads": 1}


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_any_of_three_that_needs_a_gradient_makes_a_call_dense(trained: int) -> None:
    run, _, (attention,) = install(Varied())
    q, k, v = (torch.randn(1, 2, LAYOUT.length, 64, requires_grad=place == trained) for place in range(3))
    attention(q, key=k, value=v, options={})
    run.end_forward()
    run.begin_forward(LAYOUT, torch.tensor(0.5), planned=1)
    with torch.no_grad():
        attention(q, key=k, value=v, options={})
    run.end_forward()
    assert (run.tally.summary().dense, run.tally.summary().sparse) == ({"gradient": 1}, 1)


# What diffusers passes where several processes share the tokens; how, nobody has told here.
_MESH = SimpleNamespace(get_group=lambda: "processes")
SHARED = SimpleNamespace(context_parallel_config=SimpleNamespace(_flattened_mesh=_MESH))


class Forwarding:
    """Passes the options that a test asks for to the dispatcher."""

    def __call__(self, attn: Any, x: torch.Tensor, options: dict[str, Any]) -> Any:
        return dispatch_attention_fn(x, x, x, **options)


@pytest.mark.filterwarnings("ignore:enable_parallelism")
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"parallel_config": SHARED}, "shared_text"), ({"attention_kwargs": {"window": 3}}, "attention_kwargs")],
)
def test_options_of_the_dispatcher_that_the_kernel_lacks_are_dense(options: dict[str, Any], reason: str) -> None:
    run, _, (attention,) = install(Forwarding())
    dispatched.clear()
    attention(tokens(), options=options)
    run.end_forward()
    assert run.tally.summary().dense == {reason: 1}
    positional, named = dispatched[0]
    assert next(iter(options.values())) in (*positional, *named.values())


def test_a_dense_call_passes_every_option_on() -> None:
    options = {"dropout_p": 0.5, "is_causal": True, "scale": 0.7, "enable_gqa": True, "attention_kwargs": {"window": 3}}
    _, _, (attention,) = install(Forwarding())
    dispatched.clear()
    attention(tokens(), options=options)
    assert dispatched == [((None, *options.values()), {"backend": None, "parallel_config": None})]


def test_a_dense_call_passes_the_backend_of_the_user_on() -> None:
    _, installed, (attention,) = install(DispatchProcessor())
    rebound: Any = attention.processor
    rebound._attention_backend = "chosen"
    dispatched.clear()
    attention(tokens(), mask=torch.ones(225, 225, dtype=torch.bool))
    assert [options["backend"] for _, options in dispatched] == ["chosen"]
    installed.remove()
    original: Any = attention.processor
    assert original is not rebound
    assert original._attention_backend == "chosen"


def test_removing_puts_the_same_objects_back() -> None:
    originals = [DispatchProcessor(), FunctionalProcessor()]
    _, installed, attentions = install(*originals)
    installed.remove()
    assert [attention.processor for attention in attentions] == originals
    assert all(attention.processor is original for attention, original in zip(attentions, originals, strict=True))
    assert all("site" not in vars(original) for original in originals)


def test_removing_leaves_the_processors_of_others_alone() -> None:
    _, installed, (attention,) = install(DispatchProcessor())
    newer = FunctionalProcessor()
    attention.processor = newer
    installed.remove()
    assert attention.processor is newer


def test_samples_that_reach_beyond_the_sequence_stay_dense() -> None:
    run = Run(Recipe(selection=Radial(density=0.4), block_q=16, block_k=16))
    attention = Attention(FunctionalProcessor())
    Installed(run, [attention], Tokens(read=True, removes_masks=True, samples=(Sample(LAYOUT),)))
    run.begin_forward(LAYOUT, torch.tensor(0.5), planned=1)
    x, mask = tokens(200), torch.ones(200, 200, dtype=torch.bool).tril()
    with pytest.warns(RuntimeWarning, match="other tokens than"):
        out = attention(x, mask=mask)
    assert torch.equal(out, Attention(FunctionalProcessor())(x, mask=mask))
    run.end_forward()
    assert run.tally.summary().dense == {"unknown_grid": 1}


class Adapted:
    """Attends to itself, then to the tokens of an adapter."""

    def __call__(self, attn: Any, x: torch.Tensor, image: torch.Tensor) -> Any:
        return F.scaled_dot_product_attention(x, x, x) + F.scaled_dot_product_attention(x, image, image)


def test_an_adapter_next_to_the_self_attention_is_not_counted() -> None:
    run, _, (attention,) = install(Adapted())
    x, image = torch.randn(1, 2, LAYOUT.length, 64), torch.randn(1, 2, 7, 64)
    own = sparse_attention(x, x, x, grid=LAYOUT.grid, recipe=run.recipe)
    assert torch.equal(attention(x, image=image), own + F.scaled_dot_product_attention(x, image, image))
    run.end_forward()
    assert (run.tally.summary().made, run.tally.summary().sparse) == (1, 1)


def test_a_processor_put_in_later_is_rebound_by_renewing() -> None:
    run, installed, (attention,) = install(DispatchProcessor())
    stale: Any = attention.processor
    attention.processor = newer = FunctionalProcessor()
    installed.renew()
    attention(tokens())
    run.end_forward()
    assert run.tally.summary().sparse == 1
    # What was in the slot before has become the model's own attention again.
    assert torch.allclose(stale(attention, tokens()), Attention(DispatchProcessor())(tokens()), atol=1e-6)
    installed.remove()
    assert attention.processor is newer


def test_a_rebound_processor_is_never_rebound_twice() -> None:
    original = DispatchProcessor()
    _, first, (attention,) = install(original)
    stale = attention.processor
    first.remove()
    attention.processor = stale
    second = Installed(Run(Recipe(selection=Radial(density=0.4), block_q=16, block_k=16)), [attention])
    assert type(attention.processor) is type(stale)
    second.remove()
    assert attention.processor is original


class ModuleProcessor(torch.nn.Module):
    """A processor with weights, as adapters bring."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def __call__(self, attn: Any, x: torch.Tensor) -> Any:
        return self.weight * F.scaled_dot_product_attention(x, x, x)


def test_a_processor_with_weights_stays_one_part_of_the_model() -> None:
    original = ModuleProcessor()
    attention = Attention(original)
    keys = list(attention.state_dict())
    installed = Installed(Run(Recipe()), [attention])
    assert list(attention.state_dict()) == keys
    assert attention.processor.weight is original.weight
    installed.remove()
    assert attention.processor is original


class Breaking:
    """A processor that Dynamo cannot trace in one piece."""

    def __call__(self, attn: Any, x: torch.Tensor) -> Any:
        x = x + 0.0
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(x, x, x) + 0.0


@torch.compiler.disable
def in_eager_code(attention: Any, x: torch.Tensor) -> Any:
    return attention(x)


@pytest.mark.parametrize("around", [lambda attention, x: attention(x), in_eager_code])
def test_graph_breaks_do_not_lose_the_site(around: Any) -> None:
    run, _, (attention,) = install(Breaking())
    x = torch.randn(1, 2, LAYOUT.length, 64)
    expected = attention(x)
    run.end_forward()
    run.begin_forward(LAYOUT, torch.tensor(0.5), planned=1)
    compiled = torch.compile(around, backend="eager")
    assert torch.equal(compiled(attention, x), expected)
    run.end_forward()
    assert run.tally.summary().sparse == 2


def test_a_dense_step_of_compiled_code_runs_on_the_backend_of_the_user() -> None:
    run, _, (attention,) = install(DispatchProcessor(), dense_steps=1)
    attention.processor._attention_backend = "chosen"
    dispatched.clear()
    torch.compile(attention, backend="eager")(tokens())
    run.end_forward()
    assert run.tally.summary().dense == {"dense_steps": 1}
    assert [options.get("backend") for _, options in dispatched] == ["chosen"]


def test_a_call_that_raises_leaves_nothing_behind() -> None:
    run, _, (attention,) = install(DispatchProcessor())
    with pytest.raises(TypeError):
        attention(tokens(), unknown=1)
    with pytest.raises(ValueError, match=r"^q: "):
        attention(tokens().long())
    assert processors_module._eager.site is None, "it would keep the pipeline alive"
    run.begin_forward(LAYOUT, torch.tensor(0.5), planned=1)
    attention(tokens())
    run.end_forward()
    assert run.tally.summary().made == 1
