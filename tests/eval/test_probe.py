"""What a recipe keeps, against attention computed whole, and a model that does not notice."""

import base64
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_dit.calls import plan
from sparse_dit.eval import kept
from sparse_dit.eval.kept import kept_of
from sparse_dit.eval.probe import FIGURES, Place, probe, probed
from sparse_dit.kernels.blocks import BlockList
from sparse_dit.kernels.lists import lists_to_mask, mask_to_lists
from sparse_dit.kernels.ops import block_sparse_attention
from sparse_dit.layout import TokenLayout
from sparse_dit.pipelines.generate import Request, generate, load_pipeline
from sparse_dit.pipelines.patch import sparse, summary
from sparse_dit.recipe import load_recipe

REQUEST = Request("a red circle moves right", seed=3, steps=3, height=64, width=64, num_frames=9)
RADIAL = load_recipe("radial").override(
    {"selection.density": 0.5, "schedule.dense_steps": 1, "schedule.dense_layers": [], "block_q": 32, "block_k": 32}
)


@pytest.fixture(scope="module")
def pipe(mini_wan: Path):
    loaded = load_pipeline(str(mini_wan))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def inputs(batch: int = 2, heads: int = 3, length: int = 75, width: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, width, generator=generator) for _ in range(3)]


def random_lists(batch: int, heads: int, length: int, block: int = 16, seed: int = 1) -> tuple[Tensor, BlockList]:
    """A mask over blocks in which every row has a block, and its lists."""
    blocks = -(-length // block)
    mask = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[..., 0] = True
    return mask, mask_to_lists(mask, block, block)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("together", [1, 2**27])
def test_figures_are_those_of_the_whole_matrix(ordered: bool, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_SCORES_BYTES", together)
    q, k, v = inputs()
    mask, lists = random_lists(2, 3, 75)
    generator = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(75, generator=generator) for _ in range(3)]) if ordered else None
    out, _ = block_sparse_attention(q, k, v, lists, order=order)
    found = kept_of(q, k, v, lists, out, torch.arange(75), scale=0.25, order=order)

    # Block by block, head by head, in the order in which tokens enter blocks.
    tokens = torch.arange(75).expand(3, -1) if order is None else order
    mass = (q.double() @ k.double().mT * 0.25).softmax(-1)
    recall = torch.zeros(2, 3, 75, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for i in range(75):
                for j in range(75):
                    if mask[b, h, i // 16, j // 16]:
                        recall[b, h, tokens[h, i]] += mass[b, h, tokens[h, i], tokens[h, j]]
    exact = mass @ v.double()
    error = (out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
    torch.testing.assert_close(found.recall.double(), recall.mean((0, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.recall_min.double(), recall.amin((0, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.error.double(), error.mean(0), atol=1e-5, rtol=0)
    assert float(found.density.mean()) == pytest.approx(lists.density(75, 75), abs=1e-6)


def test_planted_mass_is_found() -> None:
    """Each token attends to itself alone, so a diagonal keeps all of the mass, and a list without it nothing."""
    q = k = torch.eye(64)[None, None] * 20
    v = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    blocks = torch.eye(4, dtype=torch.bool)[None, None]
    for mask, recall in ((blocks, 1.0), (~blocks, 0.0)):
        lists = mask_to_lists(mask, 16, 16)
        out, _ = block_sparse_attention(q, k, v, lists, scale=1.0)
        found = kept_of(q, k, v, lists, out, torch.arange(0, 64, 5), scale=1.0)
        assert found.recall.item() == pytest.approx(recall, abs=1e-6)
        assert (found.error.item() < 1e-5) == (recall == 1.0)
        assert found.density.item() == pytest.approx(mask.double().mean().item())


def test_a_run_is_seen_and_not_changed(pipe) -> None:
    with sparse(pipe, RADIAL):
        before = generate(pipe, REQUEST)
        with probed(pipe, rows=5) as found:
            np.testing.assert_array_equal(generate(pipe, REQUEST), before)
        done = summary(pipe)
        generate(pipe, REQUEST)  # outside of the block nothing is seen
    assert found.layers == 2
    assert set(found.calls) == {Place(step, layer, branch) for step in (1, 2) for layer in (0, 1) for branch in (0, 1)}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    densities = [float(call.density.mean()) for calls in found.calls.values() for call in calls]
    assert np.mean(densities) == pytest.approx(done.density)


def test_a_denser_recipe_keeps_more(pipe) -> None:
    denser = RADIAL.override({"selection.density": 0.8})
    rows = [probe(pipe, REQUEST, recipe, model="mini") for recipe in (RADIAL, denser)]
    for row in rows:
        assert row["by_step"].keys() == row["by_head"].keys() == set(FIGURES)
        for name in FIGURES:
            assert row["by_step"][name][0] == [None, None], "the dense step"
            assert all(isinstance(cell, float) for line in row["by_step"][name][1:] for cell in line)
            assert [len(heads) for heads in row["by_head"][name]] == [2, 2]
    less, more = (np.array(row["by_step"]["recall"][1:]) for row in rows)
    assert (less > 0).all()
    assert (less < more).all()
    assert (more <= 1).all()
    less, more = (np.array(row["by_step"]["error"][1:]) for row in rows)
    assert (less > more).all()


def test_masks_are_those_of_the_calls(pipe) -> None:
    row = probe(pipe, REQUEST, RADIAL, model="mini", rows=4)
    places = [(mask["step"], mask["layer"], mask["query"]) for mask in row["masks"]]
    assert places == [(2, 0, [1, 4, 4]), (2, 1, [1, 4, 4])]
    layout = TokenLayout((3, 8, 8))
    blocks = lists_to_mask(plan(RADIAL, layout, torch.device("cpu"), heads=2).blocks, 6)[0, 0]
    token = 1 * 64 + 4 * 8 + 4
    expected = blocks[token // 32].repeat_interleave(32).numpy()
    for mask in row["masks"]:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(mask["keys"]), np.uint8), count=192).astype(bool)
        np.testing.assert_array_equal(bits, expected)
    assert row["frames"]["latents"] == [0, 1, 2]
    assert len(row["frames"]["jpegs"]) == 3


def test_masks_are_taken_in_the_transformer_that_makes_the_step(mini_wan: Path) -> None:
    two = load_pipeline(str(mini_wan))
    two.set_progress_bar_config(disable=True)
    two.register_modules(transformer_2=copy.deepcopy(two.transformer))
    two.register_to_config(boundary_ratio=0.9)
    row = probe(two, REQUEST, RADIAL, rows=4)
    table = row["by_step"]["recall"]
    assert [[cell is None for cell in line] for line in table[1:]] == [[True, True, False, False]] * 2
    assert [(mask["step"], mask["layer"]) for mask in row["masks"]] == [(2, 2), (2, 3)]


def test_what_a_cache_corrects_has_no_error_and_its_refreshes_are_dense(pipe) -> None:
    reuse = RADIAL.override({"skipped.name": "reuse", "schedule.dense_steps": 0, "schedule.refresh_every": 2})
    row = probe(pipe, REQUEST, reuse)
    assert row["by_step"]["error"] is row["by_head"]["error"] is None
    assert [line == [None, None] for line in row["by_step"]["recall"]] == [True, False, True]


def test_refuses_no_rows_and_unknown_models(pipe) -> None:
    with pytest.raises(ValueError, match="rows: 0"), probed(pipe, rows=0):
        pass
    with pytest.raises(ValueError, match="transformer"), probed(object()):
        pass


@pytest.mark.parametrize("order", ["hilbert", {"name": "clusters", "queries": 3, "keys": 5, "first_iterations": 3}])
def test_figures_are_of_what_was_computed_whoever_brought_tokens_into_their_order(pipe, monkeypatch, order) -> None:
    """Choosing blocks brings tokens into their order on the way, and clustered keys have another than queries."""
    seen = []

    def noted(q, k, v, blocks, out, rows, *, scale, order):
        again, _ = block_sparse_attention(q, k, v, blocks, scale=scale, order=order)
        seen.append(float((again - out).norm() / out.norm()))
        return kept_of(q, k, v, blocks, out, rows, scale=scale, order=order)

    monkeypatch.setattr("sparse_dit.eval.probe.kept_of", noted)
    recipe = load_recipe(
        {"order": order, "selection": {"name": "pooled", "density": 0.5}, "block_q": 32, "block_k": 32}
    )
    with sparse(pipe, recipe), probed(pipe):
        generate(pipe, REQUEST)
    assert seen
    assert max(seen) <= 1e-5
