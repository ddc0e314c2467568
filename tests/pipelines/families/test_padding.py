"""Padding is cut off exactly, samples stand by themselves, and what cannot be cut off stays dense for a reason."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux2

from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.patch import disable, enable, summary
from sparse_dit.samples import Layer, Sample

BLOCKS = {"block_q": 16, "block_k": 16}
EVERYTHING = {"selection": {"name": "radial", "density": 1.0}, **BLOCKS}
SPARSE = {"selection": {"name": "radial", "density": 0.4}, **BLOCKS}


def rounding(reference: torch.Tensor) -> float:
    """Bound on what two float32 orders of summation may differ by after a few layers of gain about one."""
    return 32 * torch.finfo(torch.float32).eps * float(reference.abs().max())


@pytest.mark.parametrize(
    "name",
    ["HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel", "QwenImageTransformer2DModel"],
)
def test_padding_takes_no_part(name: str, build_model: Callable[..., Any]) -> None:
    model = build_model(name)
    enable(model.transformer, SPARSE, strict=True)
    sparse = model.forward()
    text = model.arguments["encoder_hidden_states"].clone()
    text[:, 9:] = 1e4
    assert torch.equal(model.forward(encoder_hidden_states=text), sparse)


def pair(model: Any) -> None:
    """Make the batch two samples, the second with a shorter text."""
    lengths = torch.tensor([9, 5])
    for name, value in model.arguments.items():
        if name in ("encoder_attention_mask", "encoder_hidden_states_mask"):
            model.arguments[name] = (torch.arange(value.shape[1]) < lengths[:, None]).to(value.dtype)
        elif name == "text_lens":
            model.arguments[name] = lengths
        elif name == "x":
            model.arguments[name] = [value[0], value[0].flip(-1)]
        elif name == "cap_feats":
            model.arguments[name] = [value[0], torch.cat([value[0]] * 4)]
        elif name == "img_shapes":
            model.arguments[name] = value * 2
        elif isinstance(value, torch.Tensor) and value.shape[0] == 1:
            model.arguments[name] = torch.cat([value, 0.7 * value.flip(-1)]) if value.is_floating_point() else value
            if name in ("timestep", "t", "guidance"):
                model.arguments[name] = torch.cat([value, value])
            elif name == "encoder_attention_mask_2":
                model.arguments[name] = torch.cat([value, torch.ones_like(value)])


PADDED = [
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "MotifVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "Krea2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "HunyuanImageTransformer2DModel",
    "ErnieImageTransformer2DModel",
]


@pytest.mark.parametrize("name", PADDED)
def test_samples_with_texts_of_different_lengths(name: str, build_model: Callable[..., Any]) -> None:
    model = build_model(name)
    pair(model)
    stock = model.forward()
    enable(model.transformer, EVERYTHING, strict=True)
    assert (model.forward() - stock).abs().max() <= rounding(stock)
    enable(model.transformer, SPARSE, strict=True)
    sparse = model.forward()
    assert (sparse - stock).abs().max() > rounding(stock)
    counts = summary(model.transformer)
    # One call a sample, and every one of them on the tokens that count in it.
    assert (counts.planned, counts.sparse, counts.dense) == (2 * model.tiny.layers, 2 * model.tiny.layers, {})
    enable(model.transformer, {**SPARSE, "schedule": {"dense_layers": [0]}}, strict=True)
    model.forward()
    assert summary(model.transformer).dense == {"dense_layers": 2}
    enable(model.transformer, "dense", strict=True)
    assert torch.equal(model.forward(), stock)
    disable(model.transformer)
    assert torch.equal(model.forward(), stock)


@pytest.mark.parametrize("name", ["MochiTransformer3DModel", "HunyuanVideoTransformer3DModel"])
def test_samples_keep_what_is_theirs(
    name: str, build_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(name)
    pair(model)
    seen: list[tuple[str, int]] = []
    stock = Layer.call

    def spy(self: Layer, *args: Any, **options: Any) -> torch.Tensor:
        assert self.run.state.layout is not None
        seen.append((self.run.state.branch, self.run.state.layout.text_after))
        return stock(self, *args, **options)

    monkeypatch.setattr(Layer, "call", spy)
    enable(model.transformer, SPARSE, strict=True)
    with model.transformer.cache_context("cond_uncond"):
        model.forward()
    assert seen == [("cond_uncond[0]", 9), ("cond_uncond[1]", 5)] * model.tiny.layers


def test_samples_of_one_length_are_still_called_one_by_one(build_model: Callable[..., Any]) -> None:
    model = build_model("MochiTransformer3DModel")
    pair(model)
    model.arguments["encoder_attention_mask"][1] = model.arguments["encoder_attention_mask"][0]
    enable(model.transformer, SPARSE, strict=True)
    model.forward()
    assert summary(model.transformer).sparse == 2 * model.tiny.layers


def test_a_refusal_holds_for_its_own_forward(build_model: Callable[..., Any]) -> None:
    model = build_model("QwenImageTransformer2DModel")
    enable(model.transformer, SPARSE, strict=True)
    whole = model.arguments["encoder_hidden_states_mask"].clone()
    holes(model)
    model.forward()
    model.forward(encoder_hidden_states_mask=whole)
    counts = summary(model.transformer)
    assert (counts.dense, counts.sparse) == ({"mask_with_holes": model.tiny.layers}, model.tiny.layers)


def test_padding_comes_back_as_zeros(build_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("HunyuanVideoTransformer3DModel")
    pair(model)
    stock, padding = Layer.attend_read, []

    def spy(self: Layer, *args: Any, **options: Any) -> torch.Tensor:
        out = stock(self, *args, **options)
        tokens = out if options["axes"] == "b s h d" else out.transpose(1, 2)
        padding.extend(sample[found.layout.length :] for sample, found in zip(tokens, self.tokens.samples, strict=True))
        return out

    monkeypatch.setattr(Layer, "attend_read", spy)
    enable(model.transformer, SPARSE, strict=True)
    model.forward()
    assert [len(part) for part in padding] == [3, 7] * model.tiny.layers
    assert not any(part.any() for part in padding)


def holes(model: Any) -> None:
    model.arguments["encoder_hidden_states_mask"][0, 3] = 0


def padded_prompt(model: Any) -> None:
    model.arguments["attention_mask"][:, 6:9] = 0


def padded_frame(model: Any) -> None:
    model.arguments["attention_mask"][:, 2] = 0


def extra_tokens(model: Any) -> None:
    model.arguments["hidden_states"] = torch.cat([model.arguments["hidden_states"]] * 2, 1)
    model.arguments["video_coords"] = torch.rand(1, 3, 420)


def cached_references(model: Any) -> None:
    # klein's pipeline puts the references in front of the image.
    model.arguments.update(kv_cache_mode="extract", num_ref_tokens=50)
    for block in model.transformer.transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
    for block in model.transformer.single_transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())


@pytest.mark.parametrize(
    ("name", "change", "config", "reason"),
    [
        ("QwenImageTransformer2DModel", holes, {}, "mask_with_holes"),
        ("ChromaTransformer2DModel", padded_prompt, {}, "mask"),
        ("GlmImageTransformer2DModel", padded_prompt, {}, "mask"),
        ("AllegroTransformer3DModel", padded_frame, {}, "mask"),
        ("LTXVideoTransformer3DModel", extra_tokens, {}, "unknown_grid"),
        ("SkyReelsV2Transformer3DModel", None, {"num_frame_per_block": 3}, "mask"),
        ("Flux2Transformer2DModel", cached_references, {}, "reference_cache"),
        ("MotifVideoTransformer3DModel", None, {"num_single_layers": 2, "num_decoder_layers": 1}, "unknown_grid"),
    ],
)
def test_what_cannot_be_sparse_stays_dense_for_a_reason(
    name: str, change: Any, config: dict[str, Any], reason: str, build_model: Callable[..., Any]
) -> None:
    model = build_model(name, **config)
    if change is not None:
        change(model)
    stock = model.forward()
    enable(model.transformer, EVERYTHING, strict=reason != "unknown_grid")
    with pytest.warns(RuntimeWarning) if reason == "unknown_grid" else nullcontext():
        out = model.forward()
    counts = summary(model.transformer)
    assert counts.planned == counts.made
    assert counts.dense[reason] == counts.made - counts.sparse > 0
    if counts.sparse == 0:
        assert torch.equal(out, stock)
    assert (out - stock).abs().max() <= rounding(stock)


def test_samples_tell_the_stretches_that_count() -> None:
    layout = TokenLayout((1, 4, 5), 3, 2)
    assert Sample(layout).spans() == ((0, 25),)
    assert Sample(layout, gap=4).spans() == ((0, 3), (7, 22))


def test_samples_that_a_cache_takes_out_of_the_batch(build_model: Callable[..., Any]) -> None:
    """FasterCache cuts the batch in half inside the forward, after its arguments were read."""
    model = build_model("QwenImageTransformer2DModel")
    pair(model)
    stock = model.transformer.forward

    def second_half(**arguments: Any) -> Any:
        arguments["img_shapes"] = arguments["img_shapes"][1:]
        return stock(**{name: x[1:] if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})

    model.transformer.forward = second_half
    expected = model.forward()
    enable(model.transformer, SPARSE)
    with pytest.warns(RuntimeWarning, match=r"^hidden_states: a self-attention call has other tokens than"):
        assert torch.equal(model.forward(), expected)
    counts = summary(model.transformer)
    assert counts.dense == {"unknown_grid": 2 * model.tiny.layers}
    assert counts.planned == counts.made
    enable(model.transformer, SPARSE, strict=True)
    with pytest.raises(ValueError, match=r"^hidden_states: a self-attention call has other tokens than"):
        model.forward()
