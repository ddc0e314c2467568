"""Sparse attention together with what other libraries make of a model: quantized weights, and blocks that are cached.

As in `test_combinations`: at density 1 the model makes what it makes with the library alone, below its calls are
sparse, and disabled it is the model with the library alone, to the bit.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_dit
import gguf
import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, TorchAoConfig, WanPipeline, WanTransformer3DModel
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from sparse_dit.pipelines.patch import disable, enable, summary

BLOCKS = {"block_q": 16, "block_k": 16}
EVERYTHING = {"selection": {"name": "radial", "density": 1.0}, **BLOCKS}
SPARSE = {"selection": {"name": "radial", "density": 0.4}, **BLOCKS}
STEPS = 4


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two results differ by no more than float32 sums in another order do after a few layers."""
    return bool((left - right).abs().max() <= 64 * torch.finfo(torch.float32).eps * right.abs().max())


def torchao_loaded(model: Any, folder: Path) -> Any:
    """Loaded with int8 weights, as diffusers' configuration says."""
    model.save_pretrained(folder)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return WanTransformer3DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)


def gguf_loaded(model: Any, folder: Path) -> Any:
    """Loaded from a GGUF file, matrices in 8 bits a number in blocks of 32 (Q8_0)."""
    model.save_pretrained(folder)
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "wan")
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        values = tensor.numpy().astype(np.float32)
        if values.ndim == 2 and values.shape[1] % 32 == 0 and name.endswith("weight"):
            writer.add_tensor(name, gguf.quants.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return WanTransformer3DModel.from_single_file(
        str(folder / "model.gguf"), config=str(folder), quantization_config=config, torch_dtype=torch.float32
    )


@pytest.mark.parametrize(("load", "kind"), [(torchao_loaded, "Int8Tensor"), (gguf_loaded, "GGUFParameter")])
def test_quantized_weights(load: Callable[[Any, Path], Any], kind: str, wan: Any, tmp_path: Path) -> None:
    whole = wan.forward(wan.transformer())
    model = load(wan.transformer(), tmp_path).eval()
    assert type(model.blocks[0].attn1.to_q.weight).__name__ == kind
    expected = wan.forward(model)
    assert not close(expected, whole)
    enable(model, EVERYTHING, strict=True)
    assert close(wan.forward(model), expected)
    enable(model, SPARSE, strict=True)
    assert not close(wan.forward(model), expected)
    assert summary(model).sparse == wan.LAYERS
    disable(model)
    assert torch.equal(wan.forward(model), expected)


def test_weights_quantized_after(wan: Any) -> None:
    alone, model = wan.transformer(), wan.transformer()
    quantize_(alone, Int8WeightOnlyConfig())
    expected = wan.forward(alone)
    enable(model, EVERYTHING, strict=True)
    assert not close(wan.forward(model), expected)
    quantize_(model, Int8WeightOnlyConfig())
    assert close(wan.forward(model), expected)
    assert summary(model).sparse == 2 * wan.LAYERS
    enable(model, SPARSE, strict=True)
    assert not close(wan.forward(model), expected)
    disable(model)
    assert torch.equal(wan.forward(model), expected)


def cached(pipe: WanPipeline) -> None:
    """Every other step computes the first block only."""
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=1e3
    )
    cache_dit.enable_cache(pipe, cache_config=config)


@pytest.mark.parametrize("order", ["before", "after"])
def test_cache_dit(order: str, wan: Any) -> None:
    alone, pipe = wan.pipeline(), wan.pipeline()
    cached(alone)
    expected = wan.generate(alone, steps=STEPS)
    plain = wan.generate(enable(wan.pipeline(), SPARSE), steps=STEPS)
    if order == "before":
        cached(pipe)
    enable(pipe, EVERYTHING)
    if order == "after":
        cached(pipe)
    with warnings.catch_warnings():
        # Whatever a cache skips is no call: told once, and not under `strict`.
        warnings.filterwarnings("ignore", message=".*self-attention calls were made where", category=RuntimeWarning)
        whole = wan.generate(pipe, steps=STEPS)
        counts = summary(pipe)
        enable(pipe, SPARSE)
        sparse = wan.generate(pipe, steps=STEPS)
        cache_dit.disable_cache(pipe)
        uncached = wan.generate(pipe, steps=STEPS)
        cached(pipe)
    assert close(whole, expected)
    assert 0 < counts.sparse == counts.made < wan.LAYERS * STEPS * wan.FORWARDS == counts.planned
    assert not close(sparse, expected)
    assert torch.equal(uncached, plain)
    disable(pipe)
    assert torch.equal(wan.generate(pipe, steps=STEPS), expected)
