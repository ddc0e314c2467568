"""Sparse attention in a real, tiny, random Wan pipeline: on, off, counted, compiled, copied."""

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_wan

import sparse_dit
from sparse_dit.pipelines.patch import disable, enable, explain, sparse, summary

LAYERS, STEPS, FORWARDS = 3, 3, 2  # forwards a step: cond and uncond
CALLS = LAYERS * STEPS * FORWARDS
GRID = (3, 8, 8)
SPARSE = {"selection": {"name": "radial", "density": 0.3}, "block_q": 16, "block_k": 16}
EVERYTHING = {"selection": {"name": "radial", "density": 1.0}, "block_q": 16, "block_k": 16}
PARTLY = {**SPARSE, "schedule": {"dense_steps": 1, "dense_layers": [2]}}


def transformer(seed: int = 0, layers: int = LAYERS) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=1,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()


def pipeline(seed: int = 0, **components: Any) -> WanPipeline:
    model = transformer(seed)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = WanPipeline(transformer=model, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: WanPipeline, steps: int = STEPS, side: int = 64) -> torch.Tensor:
    texts = torch.randn(2, 1, 8, 32, generator=torch.Generator().manual_seed(1))
    latents: torch.Tensor = pipe(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        height=side,
        width=64,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames
    return latents


def forward(model: Callable[..., Any], level: float = 500.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        out: torch.Tensor = model(
            hidden_states=torch.randn(1, 16, *GRID, generator=generator).to(dtype),
            timestep=torch.tensor([level]),
            encoder_hidden_states=torch.randn(1, 8, 32, generator=generator).to(dtype),
            return_dict=False,
        )[0]
    return out


def processors(model: torch.nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def pipe() -> WanPipeline:
    return pipeline()


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    """What a pipeline that was never touched makes."""
    return generate(pipeline())


def test_every_planned_call_is_made_and_sparse(pipe: WanPipeline, dense: torch.Tensor) -> None:
    assert enable(pipe, SPARSE, strict=True) is pipe
    latents = generate(pipe)
    counts = summary(pipe)
    assert (counts.planned, counts.made, counts.sparse, counts.dense) == (CALLS, CALLS, CALLS, {})
    assert counts.density == counts.run_density
    assert counts.density == pytest.approx(0.3, abs=0.05)
    assert (counts.backend, counts.attention_seconds) == ("host", None)
    assert latents.isfinite().all()
    assert 1e-3 < (latents - dense).abs().max() < 1.0


def test_density_one_agrees_with_stock_attention_to_rounding() -> None:
    model = transformer()
    stock, exact = forward(model), forward(copy.deepcopy(model).double(), dtype=torch.float64)
    enable(model, EVERYTHING, strict=True)
    full = forward(model)
    assert summary(model).sparse == LAYERS
    # Stock's own rounding error is the yardstick: the two may err in opposite directions, and by twice as much.
    assert (full - stock).abs().max() <= 4 * (stock - exact).abs().max()


def test_the_recipe_dense_is_bit_identical_and_timed(pipe: WanPipeline, dense: torch.Tensor) -> None:
    enable(pipe, "dense", strict=True, timing=True)
    assert torch.equal(generate(pipe), dense)
    counts = summary(pipe)
    assert (counts.made, counts.dense, counts.density, counts.run_density) == (CALLS, {"recipe": CALLS}, None, 1.0)
    assert counts.attention_seconds is not None
    assert 0.0 < counts.attention_seconds < 60.0


def test_disabling_restores_the_very_same_pipeline(pipe: WanPipeline, dense: torch.Tensor) -> None:
    model = pipe.transformer
    before, attributes = processors(model), set(vars(model))
    enable(pipe, SPARSE)
    generate(pipe)
    assert disable(pipe) is pipe
    assert all(now is then for now, then in zip(processors(model), before, strict=True))
    assert set(vars(model)) - {"_diffusers_hook"} == attributes - {"_diffusers_hook"}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert torch.equal(generate(pipe), dense)
    assert disable(pipe) is pipe


def test_enabling_twice_equals_once(pipe: WanPipeline, dense: torch.Tensor) -> None:
    before = processors(pipe.transformer)
    once = generate(enable(pipe, SPARSE, strict=True))
    twice = generate(enable(pipe, SPARSE, strict=True))
    assert torch.equal(once, twice)
    assert summary(pipe).made == CALLS
    enable(pipe, PARTLY)
    assert not torch.equal(generate(pipe), once)
    disable(pipe)
    assert processors(pipe.transformer) == before
    assert torch.equal(generate(pipe), dense)


def test_two_pipelines_do_not_touch_each_other(dense: torch.Tensor) -> None:
    touched, untouched = pipeline(), pipeline()
    enable(touched, SPARSE)
    changed = generate(touched)
    assert torch.equal(generate(untouched), dense)
    enable(untouched, PARTLY)
    generate(untouched)
    assert torch.equal(generate(touched), changed)
    assert summary(untouched).dense != summary(touched).dense
    disable(touched)
    assert summary(untouched).made == CALLS


def test_two_pipelines_run_in_two_threads() -> None:
    pipes = [enable(pipeline(), SPARSE, strict=True), enable(pipeline(), PARTLY, strict=True)]
    alone = [generate(pipe) for pipe in pipes]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(generate, pipes))
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_the_schedule_keeps_steps_and_layers_dense(pipe: WanPipeline) -> None:
    enable(pipe, PARTLY, strict=True)
    generate(pipe)
    generate(pipe)
    counts = summary(pipe)
    assert counts.dense == {"dense_steps": 2 * FORWARDS * LAYERS, "dense_layers": 2 * FORWARDS * (STEPS - 1)}
    assert counts.sparse == 2 * FORWARDS * (STEPS - 1) * (LAYERS - 1)
    assert counts.run_density == pytest.approx(1 - counts.sparse / counts.made * (1 - (counts.density or 0.0)))


def test_the_schedule_follows_the_noise_level(pipe: WanPipeline) -> None:
    # The three steps have noise levels 1, 0.88 and 0.05.
    enable(pipe, {**SPARSE, "schedule": {"dense_above": 0.5}}, strict=True)
    generate(pipe)
    counts = summary(pipe)
    assert counts.dense == {"dense_above": 2 * FORWARDS * LAYERS}
    assert counts.sparse == FORWARDS * LAYERS


def test_a_bare_transformer_counts_steps_by_its_timesteps() -> None:
    model = enable(transformer(), PARTLY, strict=True)
    for level in (900.0, 900.0, 500.0, 100.0, 900.0):
        forward(model, level)
    # The first two forwards are step 0, and so is the last one, which begins a new run.
    assert summary(model).dense == {"dense_steps": 3 * LAYERS, "dense_layers": 2}


def test_the_step_that_the_pipeline_tells_counts() -> None:
    model = enable(transformer(), {**SPARSE, "schedule": {"dense_steps": 3}}, strict=True)
    for step in (2, 3):
        with model.cache_context("cond", step_index=step):
            forward(model)
    assert (summary(model).dense, summary(model).sparse) == ({"dense_steps": LAYERS}, LAYERS)


def test_another_size_in_the_same_pipeline(pipe: WanPipeline) -> None:
    enable(pipe, SPARSE, strict=True)
    first = generate(pipe)
    wide = generate(pipe, side=80)
    assert wide.shape[-2] == 10
    assert torch.equal(generate(pipe), first)
    assert summary(pipe).sparse == 3 * CALLS


def test_both_transformers_share_the_steps() -> None:
    pipe = pipeline(transformer_2=transformer(1), boundary_ratio=0.9)
    stock = generate(pipe)
    enable(pipe, {**SPARSE, "schedule": {"dense_steps": 2}}, strict=True)
    assert not torch.equal(generate(pipe), stock)
    counts = summary(pipe)
    # Steps 0 and 1 run in the first transformer, step 2 in the second one.
    assert (counts.dense, counts.sparse) == ({"dense_steps": 2 * FORWARDS * LAYERS}, FORWARDS * LAYERS)
    disable(pipe)
    assert torch.equal(generate(pipe), stock)


def test_a_with_block_leaves_the_pipeline_as_it_was(pipe: WanPipeline, dense: torch.Tensor) -> None:
    with sparse(pipe, SPARSE, strict=True) as inside:
        assert inside is pipe
        assert not torch.equal(generate(pipe), dense)
        with sparse(pipe, "dense", timing=True):
            assert torch.equal(generate(pipe), dense)
        assert not torch.equal(generate(pipe), dense)
    assert torch.equal(generate(pipe), dense)

    def fail() -> None:
        with sparse(pipe, SPARSE):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(generate(pipe), dense)


def test_an_exception_inside_a_forward_leaves_a_usable_pipeline(pipe: WanPipeline, dense: torch.Tensor) -> None:
    enable(pipe, SPARSE, strict=True)
    expected = generate(pipe)

    def fail(*_: Any) -> None:
        raise InterruptedError

    broken = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        generate(pipe)
    broken.remove()
    assert torch.equal(generate(pipe), expected)
    counts = summary(pipe)
    assert (counts.planned, counts.made) == (2 * CALLS, 2 * CALLS)
    assert torch.equal(generate(disable(pipe)), dense)


def test_a_missing_call_warns_once_or_raises(pipe: WanPipeline) -> None:
    stock = pipe.transformer.blocks[0].attn1.processor
    enable(pipe, SPARSE)
    pipe.transformer.blocks[0].attn1.processor = stock
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(pipe)
    assert [str(entry.message)[:55] for entry in caught if entry.category is RuntimeWarning] == [
        "2 self-attention calls were made where 3 were planned: "
    ]
    enable(pipe, SPARSE, strict=True)
    pipe.transformer.blocks[0].attn1.processor = stock
    with pytest.raises(RuntimeError, match="2 self-attention calls were made where 3 were planned"):
        generate(pipe)
    disable(pipe)
    assert pipe.transformer.blocks[0].attn1.processor is stock


def test_a_copy_of_an_enabled_pipeline_stands_on_its_own(pipe: WanPipeline, dense: torch.Tensor) -> None:
    enable(pipe, SPARSE, strict=True)
    expected = generate(pipe)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.zero_()
    assert torch.equal(generate(twin), expected)
    assert (summary(twin).made, summary(pipe).made) == (CALLS, CALLS)
    disable(pipe)
    assert torch.equal(generate(twin), expected)
    assert torch.equal(generate(disable(twin)), dense)


def test_the_backend_of_the_user_stays_in_force(pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
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
    dense_calls = FORWARDS * LAYERS + FORWARDS * (STEPS - 1)
    pipe.transformer.set_attention_backend("_native_math")
    enable(pipe, PARTLY, strict=True)
    generate(pipe)
    assert seen == ["_native_math"] * dense_calls
    seen.clear()
    pipe.transformer.set_attention_backend("native")
    generate(pipe)
    assert seen == ["native"] * dense_calls
    seen.clear()
    generate(disable(pipe))
    assert seen == ["native"] * CALLS


class Graphs:
    """A compiler backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def operators(self) -> list[list[str]]:
        """Names of the engine's operators in each graph."""
        names = [[str(node.target) for node in graph.graph.nodes] for graph in self.graphs]
        return [[name.split(".")[1] for name in of_graph if name.startswith("sparse_dit.")] for of_graph in names]


def test_a_compiled_transformer_is_one_graph_for_all_steps(pipe: WanPipeline) -> None:
    expected = generate(enable(pipe, PARTLY, strict=True))
    graphs = Graphs()
    pipe.transformer.compile(fullgraph=True, backend=graphs)
    enable(pipe, PARTLY, strict=True)
    assert torch.equal(generate(pipe), expected)
    # Dynamo traces the hooks as frames of their own.
    assert graphs.operators() == [["begin_forward"], ["attend"] * LAYERS, ["end_forward"]]
    counts = summary(pipe)
    assert counts.dense == {"dense_steps": FORWARDS * LAYERS, "dense_layers": FORWARDS * (STEPS - 1)}


def test_a_wrapped_transformer_survives_functionalisation(pipe: WanPipeline) -> None:
    expected = generate(enable(pipe, PARTLY, strict=True))
    pipe.transformer = torch.compile(disable(pipe).transformer, fullgraph=True, backend="aot_eager")
    enable(pipe, PARTLY, strict=True)
    assert torch.allclose(generate(pipe), expected, atol=1e-5)
    assert summary(pipe).made == CALLS
    assert disable(pipe) is pipe


def test_a_compiled_function_around_a_transformer_is_one_graph() -> None:
    model = enable(transformer(), SPARSE, strict=True)
    expected = forward(model)
    graphs = Graphs()
    compiled = torch.compile(lambda **arguments: model(**arguments), fullgraph=True, backend=graphs)
    assert torch.equal(forward(compiled), expected)
    assert graphs.operators() == [["begin_forward", *["attend"] * LAYERS, "end_forward"]]
    assert summary(model).sparse == 2 * LAYERS


def test_compiled_blocks_share_one_graph() -> None:
    model = transformer(layers=10)
    expected = forward(enable(model, PARTLY, strict=True), 900.0), forward(model, 100.0)
    graphs = Graphs()
    enable(model, PARTLY, strict=True).compile_repeated_blocks(fullgraph=True, backend=graphs)
    assert torch.equal(forward(model, 900.0), expected[0])
    assert torch.equal(forward(model, 100.0), expected[1])
    assert graphs.operators() == [["attend"]]
    assert summary(model).dense == {"dense_steps": 10, "dense_layers": 1}


def test_explain_tells_what_the_run_then_does(pipe: WanPipeline) -> None:
    before = set(vars(pipe.transformer))
    told = explain(pipe, PARTLY, height=64, width=64, num_frames=9, num_inference_steps=STEPS)
    assert set(vars(pipe.transformer)) == before
    assert (told.model, told.grid, told.tokens, told.layers) == ("WanTransformer3DModel", GRID, 192, LAYERS)
    assert (told.block_q, told.block_k, told.blocks) == (16, 16, (12, 12))
    assert (told.text_before, told.text_after) == (0, 0)
    assert told.state_bytes > 0
    assert [(step.sparse_layers, step.dense_layers) for step in told.steps] == [
        (0, {"dense_steps": 3}),
        (2, {"dense_layers": 1}),
        (2, {"dense_layers": 1}),
    ]
    assert [round(step.noise, 2) for step in told.steps] == [1.0, 0.88, 0.05]
    generate(enable(pipe, PARTLY))
    counts = summary(pipe)
    assert told.density == counts.density
    assert told.run_density == pytest.approx(counts.run_density)
    assert told.to_dict()["recipe"]["selection"] == {"name": "radial", "density": 0.3, **_DEFAULTS}
    text = str(told)
    assert "3 x 8 x 8" in text
    assert "steps 1-2" in text


_DEFAULTS = {"sink_frames": 1, "full_distance": 1, "min_width": None, "decimate_below": 128}


def test_explain_of_the_dense_recipe(pipe: WanPipeline) -> None:
    told = explain(pipe, "dense", height=64, width=64, num_frames=9, num_inference_steps=2)
    assert (told.density, told.run_density, told.state_bytes) == (1.0, 1.0, 0)
    assert [step.dense_layers for step in told.steps] == [{"recipe": 3}] * 2


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (8, 3), (9, 3), (10, 3), (33, 9)])
def test_explain_rounds_frames_as_the_pipeline_does(pipe: WanPipeline, frames: int, latent_frames: int) -> None:
    told = explain(pipe, SPARSE, height=64, width=64, num_frames=frames, num_inference_steps=1)
    assert told.grid[0] == latent_frames


@pytest.mark.parametrize("size", ["height", "width", "num_frames", "num_inference_steps"])
def test_explain_refuses_sizes_below_one(pipe: WanPipeline, size: str) -> None:
    sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, size: 0}
    with pytest.raises(ValueError, match=f"^{size}: 0; valid: "):
        explain(pipe, SPARSE, **sizes)


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


def test_a_stand_in_that_was_there_before_comes_back(pipe: WanPipeline) -> None:
    stock = pipe.transformer.cache_context
    seen: list[str] = []

    def watched(name: str, **fields: Any) -> Any:
        seen.append(name)
        return stock(name, **fields)

    pipe.transformer.cache_context = watched
    generate(enable(pipe, PARTLY, strict=True))
    assert seen == ["cond", "uncond"] * STEPS
    disable(pipe)
    assert pipe.transformer.cache_context is watched


def test_the_facade_is_lazy_and_complete() -> None:
    assert sparse_dit.enable is enable
    assert set(sparse_dit.__all__) <= set(dir(sparse_dit))
    assert all(getattr(sparse_dit, name) is not None for name in sparse_dit.__all__)
    unknown = "nothing"
    with pytest.raises(AttributeError, match=unknown):
        getattr(sparse_dit, unknown)
