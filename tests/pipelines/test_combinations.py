"""Sparse attention together with what people do to pipelines, done before it is enabled and after.

Every combination must leave three things true: at density 1 the model makes what it makes with the combination alone,
at a lower density its calls are sparse, and disabled it is the model with the combination alone, to the bit.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from sparse_dit.pipelines.patch import disable, enable, summary

BLOCKS = {"block_q": 16, "block_k": 16}
EVERYTHING = {"selection": {"name": "radial", "density": 1.0}, **BLOCKS}
SPARSE = {"selection": {"name": "radial", "density": 0.4}, **BLOCKS}


class Subject(NamedTuple):
    """A model, what runs it, and how many self-attention calls that makes."""

    model: Any
    run: Callable[[], torch.Tensor]
    calls: int


def flux() -> Subject:
    """Joint attention through the dispatcher, packed latents whose ids must be read."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(10.0), torch.arange(11.0))
    arguments = {
        "hidden_states": torch.randn(1, 110, 4),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(7, 3),
    }
    return Subject(model, lambda: forward(model, arguments), 4)


def hunyuan() -> Subject:
    """Joint attention under a mask, through the dispatcher."""
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
    ).eval()
    arguments = {
        "hidden_states": torch.randn(1, 4, 3, 12, 12),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": (torch.arange(12) < 9)[None].long(),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([500.0]),
        "guidance": torch.tensor([6000.0]),
    }
    return Subject(model, lambda: forward(model, arguments), 4)


def cogvideo() -> Subject:
    """Attention modules of the old style, which call torch's attention."""
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=2,
        sample_width=12,
        sample_height=12,
        max_text_seq_length=10,
    ).eval()
    arguments = {
        "hidden_states": torch.randn(1, 3, 4, 12, 12),
        "encoder_hidden_states": torch.randn(1, 10, 16),
        "timestep": torch.tensor([500.0]),
    }
    return Subject(model, lambda: forward(model, arguments), 2)


def forward(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**arguments, return_dict=False)[0]
    return out


@pytest.fixture
def wan_run(wan: Any) -> Callable[[], Subject]:
    """A whole pipeline, three steps of two forwards."""

    def make() -> Subject:
        pipe = wan.pipeline()
        return Subject(pipe.transformer, lambda: wan.generate(pipe), wan.CALLS)

    return make


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    registry = attention_dispatch._AttentionBackendRegistry
    backend = registry._active_backend
    yield
    registry._active_backend = backend
    torch._dynamo.reset()


def lora(model: Any) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def ip_adapter(model: Any) -> None:
    torch.manual_seed(5)
    processors = dict(model.attn_processors)
    for path in processors:
        if path.startswith("transformer_blocks"):
            processors[path] = FluxIPAdapterAttnProcessor(hidden_size=64, cross_attention_dim=64, num_tokens=(3,))
    model.set_attn_processor(processors)
    image = torch.randn(1, 1, 3, 64)
    # As a loaded adapter's projection does: it adds the image's tokens to what the processors get.
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "joint_attention_kwargs": {"ip_hidden_states": [image[0]]}}),
        with_kwargs=True,
    )


def layerwise_casting(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offload(model: Any) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )


def leaf_offload(model: Any) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def model_offload(model: Any) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


def sequential_offload(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def fuse(model: Any) -> None:
    model.fuse_qkv_projections()


def math_backend(model: Any) -> None:
    model.set_attention_backend("_native_math")


def int8_weights(model: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


ALL = [flux, hunyuan, cogvideo]
COMBINATIONS = [
    *((lora, subject) for subject in ALL),
    *((fuse, subject) for subject in (flux, cogvideo)),
    (ip_adapter, flux),
    *((layerwise_casting, subject) for subject in ALL),
    *((group_offload, subject) for subject in ALL),
    (leaf_offload, flux),
    *((model_offload, subject) for subject in ALL),
    *((sequential_offload, subject) for subject in ALL),
    *((math_backend, subject) for subject in (flux, hunyuan)),
    *((int8_weights, subject) for subject in ALL),
]


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two results differ by no more than float32 sums in another order do after a few layers."""
    return bool((left - right).abs().max() <= 64 * torch.finfo(torch.float32).eps * right.abs().max())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("combine", "make"), COMBINATIONS)
def test_a_combination(combine: Callable[[Any], None], make: Callable[[], Subject], order: str) -> None:
    alone = make()
    combine(alone.model)
    expected = alone.run()
    subject = make()
    if order == "before":
        combine(subject.model)
    enable(subject.model, EVERYTHING, strict=True)
    if order == "after":
        subject.run()
        combine(subject.model)
        assert close(subject.run(), expected)
        assert summary(subject.model).sparse == 2 * subject.calls
    assert close(subject.run(), expected)
    enable(subject.model, SPARSE, strict=True)
    assert not close(subject.run(), expected)
    assert summary(subject.model).sparse == subject.calls
    disable(subject.model)
    assert torch.equal(subject.run(), expected)


def whole_model(model: Any) -> None:
    model.compile(fullgraph=True, backend="eager")


def repeated_blocks(model: Any) -> None:
    model.compile_repeated_blocks(fullgraph=True, backend="eager")


@pytest.mark.parametrize(
    ("combine", "make"),
    [(whole_model, hunyuan), (whole_model, flux), (repeated_blocks, hunyuan), (repeated_blocks, flux)],
)
def test_compiled(combine: Callable[[Any], None], make: Callable[[], Subject]) -> None:
    subject = make()
    enable(subject.model, SPARSE, strict=True)
    expected = subject.run()
    combine(subject.model)
    assert close(subject.run(), expected)
    assert summary(subject.model).sparse == 2 * subject.calls


def test_unfusing_brings_no_stale_attention_back() -> None:
    subject = cogvideo()
    expected = subject.run()
    processors = [block.attn1.processor for block in subject.model.transformer_blocks]
    enable(subject.model, SPARSE, strict=True)
    sparse = subject.run()
    subject.model.fuse_qkv_projections()
    assert close(subject.run(), sparse)
    disable(subject.model)
    # diffusers kept the processors it found, which were ours, and puts them back now.
    subject.model.unfuse_qkv_projections()
    assert torch.equal(subject.run(), expected)
    enable(subject.model, SPARSE, strict=True)
    assert torch.equal(subject.run(), sparse)
    disable(subject.model)
    assert [block.attn1.processor for block in subject.model.transformer_blocks] == processors


CACHES = [
    diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks.*attn1",),
        current_timestep_callback=lambda: 500,
    ),
    diffusers.FirstBlockCacheConfig(threshold=1e3),
    diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    diffusers.MagCacheConfig(
        threshold=10.0, max_skip_steps=1, retention_ratio=0.1, num_inference_steps=3, mag_ratios=[1.0] * 3
    ),
    diffusers.SeaCacheConfig(),
]


# It leaves the unconditional half of a batch out in every second step.
FASTER_CACHE = diffusers.FasterCacheConfig(
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(-1, 1001),
    unconditional_batch_skip_range=2,
    unconditional_batch_timestep_skip_range=(-1, 1001),
    attention_weight_callback=lambda _: 0.5,
    current_timestep_callback=lambda: 500,
    tensor_format="BFCHW",
)


def guided_cogvideo() -> Subject:
    """Four steps, both branches in one batch."""
    model = cogvideo().model
    arguments = {"hidden_states": torch.randn(2, 3, 4, 12, 12), "encoder_hidden_states": torch.randn(2, 10, 16)}

    def run() -> torch.Tensor:
        model._reset_stateful_cache()
        steps = (forward(model, {**arguments, "timestep": torch.full((2,), level)}) for level in (900.0, 700.0, 500.0))
        return torch.stack(list(steps))

    return Subject(model, run, 6)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("cache", [*CACHES, FASTER_CACHE], ids=lambda cache: type(cache).__name__)
def test_a_cache(cache: Any, order: str, wan_run: Callable[[], Subject]) -> None:
    make = guided_cogvideo if cache is FASTER_CACHE else wan_run
    alone = make()
    alone.model.enable_cache(copy.deepcopy(cache))
    expected = alone.run()
    subject = make()
    if order == "before":
        subject.model.enable_cache(copy.deepcopy(cache))
    enable(subject.model, EVERYTHING)
    if order == "after":
        subject.model.enable_cache(copy.deepcopy(cache))
    with warnings.catch_warnings():
        # Whatever a cache skips is no call: told once, and not under `strict`.
        warnings.filterwarnings("ignore", message=".*self-attention calls were made where", category=RuntimeWarning)
        whole = subject.run()
        counts = summary(subject.model)
        enable(subject.model, SPARSE)
        sparse = subject.run()
    assert close(whole, expected)
    assert 0 < counts.sparse == counts.made <= subject.calls
    assert not close(sparse, expected)
    disable(subject.model)
    assert torch.equal(subject.run(), expected)
    subject.model.disable_cache()


@pytest.mark.parametrize("make", ALL)
def test_a_saved_model_knows_nothing_of_it(make: Callable[[], Subject], tmp_path: Path) -> None:
    subject = make()
    keys = list(subject.model.state_dict())
    enable(subject.model, SPARSE, strict=True)
    subject.run()
    assert list(subject.model.state_dict()) == keys
    subject.model.save_pretrained(tmp_path)
    again = type(subject.model).from_pretrained(tmp_path)
    assert not any(hasattr(module.processor, "site") for module in again.modules() if hasattr(module, "processor"))
    assert list(again.state_dict()) == keys


@pytest.mark.parametrize("make", ALL)
def test_a_copied_model_stands_on_its_own(make: Callable[[], Subject]) -> None:
    subject = make()
    expected = subject.run()
    enable(subject.model, SPARSE, strict=True)
    sparse = subject.run()
    twin = copy.deepcopy(subject.model)
    disable(subject.model)
    assert torch.equal(subject.run(), expected)
    enable(subject.model, SPARSE, strict=True)
    assert torch.equal(subject.run(), sparse)
    # The twin counts for itself, from the moment it was made.
    assert (summary(twin).made, summary(subject.model).made) == (0, subject.calls)
