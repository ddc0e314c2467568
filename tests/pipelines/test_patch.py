"""Sparse attention in a real, tiny, random Wan pipeline: on, off, counted, copied."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_wan

import sparse_dit
from sparse_dit.pipelines.patch import disable, enable, explain, sparse, summary
from sparse_dit.state import Context

SPARSE = {"selection": {"name": "radial", "density": 0.3}, "block_q": 16, "block_k": 16}
EVERYTHING = {"selection": {"name": "radial", "density": 1.0}, "block_q": 16, "block_k": 16}
PARTLY = {**SPARSE, "schedule": {"dense_steps": 1, "dense_layers": [2]}}


def processors(model: torch.nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def test_every_planned_call_is_made_and_sparse(wan: Any, pipe: WanPipeline, dense: torch.Tensor) -> None:
    assert enable(pipe, SPARSE, strict=True) is pipe
    latents = wan.generate(pipe)
    counts = summary(pipe)
    assert (counts.planned, counts.made, counts.sparse, counts.dense) == (wan.CALLS, wan.CALLS, wan.CALLS, {})
    assert counts.density == counts.run_density
    assert counts.density == pytest.approx(0.3, abs=0.05)
    assert (counts.backend, counts.attention_seconds) == ("host", None)
    assert latents.isfinite().all()
    assert 1e-3 < (latents - dense).abs().max() < 1.0


def test_density_one_agrees_with_stock_attention_to_rounding(wan: Any) -> None:
    model = wan.transformer()
    stock, exact = wan.forward(model), wan.forward(copy.deepcopy(model).double(), dtype=torch.float64)
    enable(model, EVERYTHING, strict=True)
    full = wan.forward(model)
    assert summary(model).sparse == wan.LAYERS
    # Stock's own rounding error is the yardstick: the two may err in opposite directions, and by twice as much.
    assert (full - stock).abs().max() <= 4 * (stock - exact).abs().max()


def test_the_recipe_dense_is_bit_identical_and_timed(wan: Any, pipe: WanPipeline, dense: torch.Tensor) -> None:
    enable(pipe, "dense", strict=True, timing=True)
    assert torch.equal(wan.generate(pipe), dense)
    counts = summary(pipe)
    assert (counts.made, counts.dense, counts.density, counts.run_density) == (
        wan.CALLS,
        {"recipe": wan.CALLS},
        None,
        1.0,
    )
    assert counts.attention_seconds is not None
    assert 0.0 < counts.attention_seconds < 60.0


def test_disabling_restores_the_very_same_pipeline(wan: Any, pipe: WanPipeline, dense: torch.Tensor) -> None:
    model = pipe.transformer
    before, attributes = processors(model), set(vars(model))
    enable(pipe, SPARSE)
    wan.generate(pipe)
    assert disable(pipe) is pipe
    assert all(now is then for now, then in zip(processors(model), before, strict=True))
    assert set(vars(model)) - {"_diffusers_hook"} == attributes - {"_diffusers_hook"}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert torch.equal(wan.generate(pipe), dense)
    assert disable(pipe) is pipe


def test_enabling_twice_equals_once(wan: Any, pipe: WanPipeline, dense: torch.Tensor) -> None:
    before = processors(pipe.transformer)
    once = wan.generate(enable(pipe, SPARSE, strict=True))
    twice = wan.generate(enable(pipe, SPARSE, strict=True))
    assert torch.equal(once, twice)
    assert summary(pipe).made == wan.CALLS
    enable(pipe, PARTLY)
    assert not torch.equal(wan.generate(pipe), once)
    disable(pipe)
    assert processors(pipe.transformer) == before
    assert torch.equal(wan.generate(pipe), dense)


def test_two_pipelines_do_not_touch_each_other(wan: Any, dense: torch.Tensor) -> None:
    touched, untouched = wan.pipeline(), wan.pipeline()
    enable(touched, SPARSE)
    changed = wan.generate(touched)
    assert torch.equal(wan.generate(untouched), dense)
    enable(untouched, PARTLY)
    wan.generate(untouched)
    assert torch.equal(wan.generate(touched), changed)
    assert summary(untouched).dense != summary(touched).dense
    disable(touched)
    assert summary(untouched).made == wan.CALLS


def test_two_pipelines_run_in_two_threads(wan: Any) -> None:
    pipes = [enable(wan.pipeline(), SPARSE, strict=True), enable(wan.pipeline(), PARTLY, strict=True)]
    alone = [wan.generate(pipe) for pipe in pipes]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(wan.generate, pipes))
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_the_schedule_keeps_steps_and_layers_dense(wan: Any, pipe: WanPipeline) -> None:
    enable(pipe, PARTLY, strict=True)
    wan.generate(pipe)
    wan.generate(pipe)
    counts = summary(pipe)
    assert counts.dense == {
        "dense_steps": 2 * wan.FORWARDS * wan.LAYERS,
        "dense_layers": 2 * wan.FORWARDS * (wan.STEPS - 1),
    }
    assert counts.sparse == 2 * wan.FORWARDS * (wan.STEPS - 1) * (wan.LAYERS - 1)
    assert counts.run_density == pytest.approx(1 - counts.sparse / counts.made * (1 - (counts.density or 0.0)))


def test_the_schedule_follows_the_noise_level(wan: Any, pipe: WanPipeline) -> None:
    # The three steps have noise levels 1, 0.88 and 0.05.
    enable(pipe, {**SPARSE, "schedule": {"dense_above": 0.5}}, strict=True)
    wan.generate(pipe)
    counts = summary(pipe)
    assert counts.dense == {"dense_above": 2 * wan.FORWARDS * wan.LAYERS}
    assert counts.sparse == wan.FORWARDS * wan.LAYERS


def test_a_bare_transformer_counts_steps_by_its_timesteps(wan: Any) -> None:
    model = enable(wan.transformer(), PARTLY, strict=True)
    for level in (900.0, 900.0, 500.0, 100.0, 900.0):
        wan.forward(model, level)
    # The first two forwards are step 0, and so is the last one, which begins a new run.
    assert summary(model).dense == {"dense_steps": 3 * wan.LAYERS, "dense_layers": 2}


def test_the_step_that_the_pipeline_tells_counts(wan: Any) -> None:
    model = enable(wan.transformer(), {**SPARSE, "schedule": {"dense_steps": 3}}, strict=True)
    for step in (2, 3):
        with model.cache_context("cond", step_index=step):
            wan.forward(model)
    assert (summary(model).dense, summary(model).sparse) == ({"dense_steps": wan.LAYERS}, wan.LAYERS)


def test_another_size_in_the_same_pipeline(wan: Any, pipe: WanPipeline) -> None:
    enable(pipe, SPARSE, strict=True)
    first = wan.generate(pipe)
    wide = wan.generate(pipe, side=80)
    assert wide.shape[-2] == 10
    assert torch.equal(wan.generate(pipe), first)
    assert summary(pipe).sparse == 3 * wan.CALLS


def test_both_transformers_share_the_steps(wan: Any) -> None:
    pipe = wan.pipeline(transformer_2=wan.transformer(1), boundary_ratio=0.9)
    stock = wan.generate(pipe)
    enable(pipe, {**SPARSE, "schedule": {"dense_steps": 2}}, strict=True)
    assert not torch.equal(wan.generate(pipe), stock)
    counts = summary(pipe)
    # Steps 0 and 1 run in the first transformer, step 2 in the second one.
    assert (counts.dense, counts.sparse) == ({"dense_steps": 2 * wan.FORWARDS * wan.LAYERS}, wan.FORWARDS * wan.LAYERS)
    disable(pipe)
    assert torch.equal(wan.generate(pipe), stock)


def test_a_with_block_leaves_the_pipeline_as_it_was(wan: Any, pipe: WanPipeline, dense: torch.Tensor) -> None:
    with sparse(pipe, SPARSE, strict=True) as inside:
        assert inside is pipe
        assert not torch.equal(wan.generate(pipe), dense)
        with sparse(pipe, "dense", timing=True):
            assert torch.equal(wan.generate(pipe), dense)
        assert not torch.equal(wan.generate(pipe), dense)
    assert torch.equal(wan.generate(pipe), dense)

    def fail() -> None:
        with sparse(pipe, SPARSE):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(wan.generate(pipe), dense)


def test_a_with_block_leaves_strictness_and_timing_as_they_were(wan: Any, pipe: WanPipeline) -> None:
    enable(pipe, SPARSE, strict=True, timing=True)
    with sparse(pipe, "dense"):
        wan.generate(pipe)
        assert summary(pipe).attention_seconds is None
    wan.generate(pipe)
    assert (summary(pipe).attention_seconds or 0) > 0
    pipe.transformer.blocks[0].attn1.forward = lambda hidden_states, *_: hidden_states
    with pytest.raises(RuntimeError, match="2 self-attention calls were made where 3 were planned"):
        wan.generate(pipe)


def test_a_cache_context_ends_with_its_block(wan: Any) -> None:
    model = enable(wan.transformer(), SPARSE, strict=True)
    state = vars(model)["_sparse_dit"].run.state
    with model.cache_context("cond"):
        assert state.context == Context("cond", None)
        wan.forward(model)
    assert state.context == Context()


def test_arguments_may_be_given_by_position(wan: Any) -> None:
    model = wan.transformer()
    expected = wan.forward(enable(model, SPARSE, strict=True))

    def by_position(hidden_states: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool) -> Any:
        return model(hidden_states, timestep, encoder_hidden_states, return_dict=return_dict)

    assert torch.equal(wan.forward(by_position), expected)


def test_an_exception_inside_a_forward_leaves_a_usable_pipeline(
    wan: Any, pipe: WanPipeline, dense: torch.Tensor
) -> None:
    enable(pipe, SPARSE, strict=True)
    expected = wan.generate(pipe)

    def fail(*_: Any) -> None:
        raise InterruptedError

    broken = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        wan.generate(pipe)
    broken.remove()
    assert torch.equal(wan.generate(pipe), expected)
    counts = summary(pipe)
    assert (counts.planned, counts.made) == (2 * wan.CALLS, 2 * wan.CALLS)
    assert torch.equal(wan.generate(disable(pipe)), dense)


def test_a_missing_call_warns_once_or_raises(wan: Any, pipe: WanPipeline) -> None:
    enable(pipe, SPARSE)
    pipe.transformer.blocks[0].attn1.forward = lambda hidden_states, *_: hidden_states
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wan.generate(pipe)
    assert [str(entry.message)[:55] for entry in caught if entry.category is RuntimeWarning] == [
        "2 self-attention calls were made where 3 were planned: "
    ]
    enable(pipe, SPARSE, strict=True)
    with pytest.raises(RuntimeError, match="2 self-attention calls were made where 3 were planned"):
        wan.generate(pipe)


def test_a_processor_put_in_later_becomes_sparse_too(wan: Any, pipe: WanPipeline, dense: torch.Tensor) -> None:
    expected = wan.generate(enable(pipe, SPARSE, strict=True))
    attention = pipe.transformer.blocks[0].attn1
    attention.processor = newer = transformer_wan.WanAttnProcessor()
    assert torch.equal(wan.generate(pipe), expected)
    assert summary(pipe).sparse == 2 * wan.CALLS
    assert torch.equal(wan.generate(disable(pipe)), dense)
    assert attention.processor is newer


def test_a_copy_of_an_enabled_pipeline_stands_on_its_own(wan: Any, pipe: WanPipeline, dense: torch.Tensor) -> None:
    enable(pipe, SPARSE, strict=True)
    expected = wan.generate(pipe)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.zero_()
    assert torch.equal(wan.generate(twin), expected)
    assert (summary(twin).made, summary(pipe).made) == (wan.CALLS, wan.CALLS)
    disable(pipe)
    assert torch.equal(wan.generate(twin), expected)
    assert torch.equal(wan.generate(disable(twin)), dense)


def test_the_backend_of_the_user_stays_in_force(wan: Any, pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    seen: list[Any] = []
    stock = transformer_wan.dispatch_attention_fn

    def spy(query: torch.Tensor, key: torch.Tensor, *args: Any, backend: Any = None, **kwargs: Any) -> torch.Tensor:
        if query.shape == key.shape:
            seen.append(backend)
        out: torch.Tensor = stock(query, key, *args, backend=backend, **kwargs)
        return out

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", spy)
    dense_calls = wan.FORWARDS * wan.LAYERS + wan.FORWARDS * (wan.STEPS - 1)
    pipe.transformer.set_attention_backend("_native_math")
    enable(pipe, PARTLY, strict=True)
    wan.generate(pipe)
    assert seen == ["_native_math"] * dense_calls
    seen.clear()
    pipe.transformer.set_attention_backend("native")
    wan.generate(pipe)
    assert seen == ["native"] * dense_calls
    seen.clear()
    wan.generate(disable(pipe))
    assert seen == ["native"] * wan.CALLS


@pytest.mark.parametrize("thing", [42, "pipeline", torch.nn.Linear(1, 1), object()])
@pytest.mark.parametrize("function", [enable, summary])
def test_things_without_a_known_transformer_are_refused_in_one_line(thing: Any, function: Any) -> None:
    with pytest.raises(ValueError, match=r"^pipe: ") as caught:
        function(thing)
    assert "valid: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_recipe_changes_nothing(pipe: WanPipeline) -> None:
    before = processors(pipe.transformer)
    with pytest.raises(
        ValueError, match=r"^schedule\.dense_layers: \[3\]; valid: 0 to 2 for this WanTransformer3DModel$"
    ):
        enable(pipe, {**SPARSE, "schedule": {"dense_layers": [0, 3]}})
    with pytest.raises(ValueError, match=r"^schedule\.dense_layers: \[7\]; valid: 0 to 2 for "):
        explain(pipe, {"schedule": {"dense_layers": [7]}}, height=64, width=64, num_frames=9, num_inference_steps=2)
    assert processors(pipe.transformer) == before
    with pytest.raises(ValueError, match=r"valid: a pipeline after enable\(pipe\)$"):
        summary(pipe)
    before = processors(enable(pipe, SPARSE).transformer)
    with pytest.raises(ValueError, match=r"^schedule\.dense_layers: \[3\]"):
        enable(pipe, {**SPARSE, "schedule": {"dense_layers": [3]}})
    assert processors(pipe.transformer) == before


def test_a_stand_in_that_was_there_before_comes_back(wan: Any, pipe: WanPipeline) -> None:
    stock = pipe.transformer.cache_context
    seen: list[str] = []

    def watched(name: str, **fields: Any) -> Any:
        seen.append(name)
        return stock(name, **fields)

    pipe.transformer.cache_context = watched
    wan.generate(enable(pipe, PARTLY, strict=True))
    assert seen == ["cond", "uncond"] * wan.STEPS
    disable(pipe)
    assert pipe.transformer.cache_context is watched


def test_the_facade_is_lazy_and_complete() -> None:
    assert sparse_dit.enable is enable
    assert set(sparse_dit.__all__) <= set(dir(sparse_dit))
    assert all(getattr(sparse_dit, name) is not None for name in sparse_dit.__all__)
    unknown = "nothing"
    with pytest.raises(AttributeError, match=unknown):
        getattr(sparse_dit, unknown)
