"""Profiles: the file, what is refused, and what each head of a profile computes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sparse_dit.calls import attend
from sparse_dit.forecast import forecast
from sparse_dit.kernels.lists import lists_to_mask, pack_bits
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Axes, Hilbert, Tiles, TimeMajor
from sparse_dit.profiles import Model, Pattern, Profile, find_profile, load_profile, load_tensors, save_tensors
from sparse_dit.recipe import Recipe
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Band, Call, Profiled, Window
from sparse_dit.selection.profile import layer_mask
from sparse_dit.skipped import Reuse
from sparse_dit.state import Slot

LAYOUT = TokenLayout((3, 4, 10), text_after=9)  # 129 tokens: 9 blocks of 16, 8 of them with video
PATTERNS = (
    Pattern("all"),
    Pattern("skip"),
    Pattern("diagonal", width=20),
    Pattern("multi_diagonal", width=20),
    Pattern("stripe", 0.25),
    Pattern("window", size=(1, 3, 0), tile=(1, 1, 4)),
    Pattern("mask", 0.25),
)
HEADS = 7


def profile(**parts: Any) -> Profile:
    """Two bins, two layers, seven heads: in the first layer one head a pattern, in the second all skip, then all."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 2, HEADS, 8, 8, generator=generator) < 0.3
    masks |= torch.eye(8, dtype=torch.bool)
    stripes = torch.zeros(2, 2, HEADS, 8, dtype=torch.bool)
    stripes[..., [1, 5]] = True
    pattern = torch.arange(HEADS).expand(2, 2, -1).clone()
    pattern[0, 1], pattern[1, 1] = 1, 0
    settings = {
        "method": "by hand",
        "model": Model("WanTransformer3DModel", 2, HEADS),
        "layout": LAYOUT,
        "block_q": 16,
        "block_k": 16,
        "steps": 10,
        "bins": (0, 4),
        "patterns": PATTERNS,
        "pattern": pattern.to(torch.uint8),
        "stripes": pack_bits(stripes),
        "axes": torch.full((2, HEADS), 5, dtype=torch.uint8),
        "masks": pack_bits(masks),
        "about": {"prompts": ["a"]},
    }
    return Profile(**{**settings, **parts})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "by-hand.safetensors"
    profile().save(path)
    return path


def recipe(file: Path, **choices: Any) -> Recipe:
    return Recipe(**{"selection": Profiled(str(file)), "block_q": 16, "block_k": 16, **choices})


def qkv(layout: TokenLayout = LAYOUT, heads: int = HEADS, batch: int = 1) -> torch.Tensor:
    return torch.randn(3, batch, heads, layout.length, 64, generator=torch.Generator().manual_seed(0))


def one_call(chosen: Recipe, inputs: torch.Tensor, *, layer: int = 0, step: int = 0, slot: Slot | None = None) -> Any:
    layout = dataclasses.replace(LAYOUT, text_after=inputs.shape[3] - 120)
    slot = Slot() if slot is None else slot
    return attend(chosen, layout, *inputs, scale=None, layer=layer, step=step, slot=slot)


def test_a_profile_survives_its_file(file: Path) -> None:
    one, other = profile(), load_profile(file)
    for field in dataclasses.fields(Profile):
        before, after = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    assert load_profile(file) is other
    assert Recipe.from_dict(recipe(file).to_dict()) == recipe(file)


def test_the_bin_of_a_step() -> None:
    assert [profile().bin_of(step) for step in (0, 3, 4, 99)] == [0, 0, 1, 1]


@pytest.mark.parametrize("text", [9, 0, 40])
def test_each_head_computes_its_pattern_in_its_order(file: Path, text: int, call_for: Callable[..., Call]) -> None:
    layout = dataclasses.replace(LAYOUT, text_after=text)
    selection = Profiled(str(file))
    call = call_for(layout, selection=selection, heads=HEADS)
    chosen = selection.choose(*qkv(layout), call)
    assert chosen.heads is not None
    assert chosen.heads.tolist() == [0, 2, 3, 4, 5, 6]
    assert chosen.table is not None
    mask = lists_to_mask(chosen.blocks, call.k_blocks)[0]
    tiles = Tiles((1, 1, 4)).table(layout, 1)
    orders = [None, None, TimeMajor().table(layout, 1), None, tiles, Axes("wht").table(layout, 1)]
    for row, table in zip(chosen.table, orders, strict=True):
        assert torch.equal(row, torch.arange(layout.length) if table is None else table[0])
    band = Band(width=20, sink_frames=0).select(layout, 16, 16)[0]
    window = Window(size=(1, 3, 0), tile=(1, 1, 4)).select(layout, 16, 16, tiles, 1)[0]
    assert mask[0].all()
    assert torch.equal(mask[1], band)
    assert torch.equal(mask[2], band)
    assert torch.equal(mask[4], window)
    video = layout.video_tokens // 16  # blocks without text
    assert torch.equal(mask[3][:video, :video], torch.tensor([n in (1, 5) for n in range(video)]).expand(video, -1))
    stored = torch.stack([profile().masks[0, 0, 6] >> n & 1 for n in range(8)], -1).bool().flatten(1)  # type: ignore[index]
    assert torch.equal(mask[5][:video, :video], stored[:video, :video])
    if text:
        assert mask[:, -1].all()
        assert mask[:, :, -1].all()


def test_output_and_density_are_those_of_the_masks(file: Path) -> None:
    inputs = qkv(batch=2)
    done = one_call(recipe(file), inputs)
    expected, areas = [], []
    orders = [None, None, None, TimeMajor(), None, Tiles((1, 1, 4)), Axes("wht")]
    for head, mask in enumerate(layer_mask(profile(), 0, 0, LAYOUT)):
        tokens = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)[:129, :129]
        areas.append(float(tokens.double().mean()))
        if head == 1:
            expected.append(torch.zeros_like(inputs[0][:, head]))
            continue
        table = None if orders[head] is None else orders[head].table(LAYOUT, 1)  # type: ignore[union-attr]
        table = torch.arange(129) if table is None else table[0]
        q, k, v = (x[:, head, table] for x in inputs)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=tokens)
        expected.append(torch.empty_like(out).index_copy_(1, table, out))
    assert torch.allclose(done.out, torch.stack(expected, dim=1), atol=2e-5)
    assert float(done.density) == pytest.approx(sum(areas) / HEADS)


def test_bins_and_layers_are_looked_up(file: Path) -> None:
    slot = Slot()
    inputs = qkv()
    skipped = one_call(recipe(file), inputs, layer=1, step=3, slot=slot)
    assert (skipped.out == 0).all()
    assert float(skipped.density) == 0.0
    whole = one_call(recipe(file), inputs, layer=1, step=4, slot=slot)
    assert torch.allclose(whole.out, F.scaled_dot_product_attention(*inputs), atol=2e-5)
    assert float(whole.density) == 1.0
    kept = recipe(file, schedule=Schedule(refresh_every=4))
    slot = Slot()
    assert (one_call(kept, inputs, layer=1, step=2, slot=slot).out == 0).all()
    assert (one_call(kept, inputs, layer=1, step=5, slot=slot).out == 0).all()
    assert float(one_call(kept, inputs, layer=1, step=6, slot=slot).density) == 1.0


def test_reuse_repeats_the_whole_output_where_heads_are_skipped(file: Path) -> None:
    chosen, slot = recipe(file, skipped=Reuse(), schedule=Schedule(refresh_every=3)), Slot()
    whole = one_call(chosen, qkv(), slot=slot)
    assert whole.whole
    after = one_call(chosen, qkv(), step=1, slot=slot)
    assert torch.allclose(after.out, whole.out, atol=2e-5)


def test_the_forecast_is_what_happens(file: Path) -> None:
    chosen, slot = recipe(file), Slot()
    told = forecast(chosen, LAYOUT, layers=1, branches=1, shape=(2, HEADS, 129, 64), dtype=torch.float32)
    densities = [float(one_call(chosen, qkv(), layer=layer, step=step).density) for layer in (0, 1) for step in (0, 4)]
    # Four steps of the first bin, six of the second.
    assert told.density == pytest.approx((4 * (densities[0] + densities[2]) + 6 * (densities[1] + densities[3])) / 20)
    one_call(chosen, qkv(batch=2), slot=slot)
    assert told.kept_bytes == slot.nbytes


def test_a_profile_of_another_model_grid_or_head_count_is_refused(file: Path) -> None:
    found = load_profile(file)
    found.check_model("WanTransformer3DModel", 2)
    for name, layers in (("FluxTransformer2DModel", 2), ("WanTransformer3DModel", 3)):
        with pytest.raises(ValueError, match=rf"^profile: made for WanTransformer3DModel .* {name} .*; valid: "):
            found.check_model(name, layers)
    with pytest.raises(ValueError, match=r"^profile: heads 3, and it was made for 7; valid: "):
        one_call(recipe(file), qkv(heads=3))
    other = TokenLayout((3, 5, 8), text_after=9)
    with pytest.raises(ValueError, match=r"^profile: grid \(3, 5, 8\), and it was made for \(3, 4, 10\); valid: "):
        forecast(recipe(file), other, layers=1, branches=1, shape=(1, 7, 129, 64), dtype=torch.float32)


@pytest.mark.parametrize("choices", [{"block_q": 32}, {"order": Hilbert()}])
def test_choices_that_a_profile_excludes_are_refused(file: Path, choices: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(block_q, block_k|order): .*; valid: "):
        recipe(file, **choices)


def test_a_missing_or_damaged_profile_is_refused(file: Path, tmp_path: Path) -> None:
    for name in ("", "nothing.safetensors", str(tmp_path)):
        with pytest.raises(ValueError, match=r"^selection.file: .* is no profile; valid: "):
            Profiled(name)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"^profile: .* cannot be read .*; valid: "):
        load_profile(torn)
    with pytest.raises(ValueError, match=r"^profile: .* cannot be read .*; valid: "):
        load_profile(tmp_path / "nothing.safetensors")
    header, tensors = load_tensors(file)
    save_file(tensors, torn, metadata={"profile": "[1]"})
    with pytest.raises(ValueError, match=r"^profile: .* cannot be read .*; valid: "):
        load_profile(torn)
    for change, message in (
        ({"schema": 2}, "has schema 2; valid: 1"),
        ({"bins": [1, 4]}, "bins"),
        ({"block_q": 17}, "blocks of 17"),
        ({"patterns": [{"kind": "spiral"}]}, "spiral"),
        ({"patterns": ["all"]}, "is damaged"),
        ({"patterns": [{"kind": "diagonal"}]}, "without width"),
        ({"patterns": [{"kind": "all"}]}, "points at 6"),
    ):
        save_tensors(torn, tensors, {**header, **change})
        with pytest.raises(ValueError, match=rf"^(profile|pattern): .*{message}.*"):
            load_profile(torn)
    save_tensors(torn, {"pattern": tensors["pattern"]}, header)
    with pytest.raises(ValueError, match=r"^profile: stripes is nothing; valid: "):
        load_profile(torn)
    assert find_profile(str(file)) == file


def test_a_row_without_blocks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    profile(masks=torch.zeros(2, 2, HEADS, 8, 1, dtype=torch.uint8)).save(path)
    # Without text, whose blocks would be computed in any case.
    with pytest.raises(ValueError, match=r"^profile: head 6 of layer 0 has a query block without a key block; valid: "):
        one_call(recipe(path), qkv(TokenLayout((3, 4, 10))))
