"""k-means, the order of clusters, and SVG2 on blocks of fixed size against SVG2 on whole clusters in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_dit.apart import attend_chosen
from sparse_dit.calls import attend
from sparse_dit.clusters import chain, cluster_sizes, first_centroids, kmeans, means, nearest, objective
from sparse_dit.forecast import forecast
from sparse_dit.kernels.lists import mask_to_lists
from sparse_dit.kernels.oracle import oracle_attention
from sparse_dit.layout import TokenLayout
from sparse_dit.orders import Clusters, Hilbert, Rows
from sparse_dit.recipe import Recipe, load_recipe
from sparse_dit.schedule import Schedule
from sparse_dit.selection import Chosen, Mass, Pooled, Radial, Window
from sparse_dit.skipped import Reuse
from sparse_dit.state import Slot

LAYOUT = TokenLayout((3, 6, 10), text_before=3, text_after=11)


def tokens(groups: int = 3, length: int = 70, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(groups, length, width, generator=torch.Generator().manual_seed(seed))


def qkv(batch: int = 1, seed: int = 0) -> torch.Tensor:
    q, k, v = torch.randn(3, batch, 2, LAYOUT.length, 64, generator=torch.Generator().manual_seed(seed))
    return torch.stack([3 * q, k, v])


def recipe(**choices: Any) -> Recipe:
    settings = {"order": Clusters(queries=7, keys=9), "selection": Pooled(density=0.3), "block_q": 16, "block_k": 16}
    return Recipe(**{**settings, **choices})


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_the_objective_of_kmeans_never_rises(seed: int, length: int, clusters: int) -> None:
    x = tokens(2, length, seed=seed)
    centroids = first_centroids(x, min(clusters, length), seed)
    last = torch.full((2,), torch.inf, dtype=torch.float64)
    for _ in range(6):
        labels = nearest(x, centroids)
        centroids = means(x, labels, centroids)
        now = objective(x, centroids, labels)
        # What fp32 loses of squared distances is of the order of its epsilon of the squared norms.
        assert (now <= last + 1e-5 * x.square().sum(dim=(1, 2))).all()
        last = now


def test_an_iteration_is_that_of_the_definition() -> None:
    x, start = tokens(), first_centroids(tokens(), 11, 0)
    # A centroid that no token is near keeps its place.
    start[:, 4] = 1e3
    found, labels = kmeans(x, start, iterations=1)
    distances = torch.cdist(x.double(), start.double())
    assert torch.equal(labels, distances.argmin(dim=-1))
    for group in range(3):
        for cluster in range(11):
            members = x[group][labels[group] == cluster].double()
            expected = members.mean(dim=0) if len(members) else start[group, cluster].double()
            assert torch.allclose(found[group, cluster].double(), expected, atol=1e-6)
    assert torch.equal(found[:, 4], start[:, 4])
    assert torch.equal(cluster_sizes(labels, 11).sum(dim=1), torch.full((3,), 70))


def test_kmeans_stops_where_nothing_moves_and_repeats() -> None:
    x, start = tokens(), first_centroids(tokens(), 5, 0)
    once = kmeans(x, start, iterations=200, tolerance=1e-6)
    still = kmeans(x, once[0], iterations=1)
    assert torch.allclose(once[0], still[0], atol=1e-5)
    again = kmeans(x, start, iterations=200, tolerance=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    with pytest.raises(ValueError, match="iterations: 0; valid: at least 1"):
        kmeans(x, start, iterations=0)


def test_tokens_in_parts_are_assigned_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, start = tokens(), first_centroids(tokens(), 5, 0)
    whole = nearest(x, start)
    monkeypatch.setattr("sparse_dit.clusters.PRODUCTS", 3 * 5 * 13)
    assert torch.equal(nearest(x, start), whole)


def test_a_chain_goes_to_the_nearest_that_is_left() -> None:
    places = torch.tensor([[0.0], [9.0], [1.0], [2.5], [-5.0]])
    assert chain(places[None]).flatten().tolist() == [0.0, 1.0, 2.5, 9.0, -5.0]


@pytest.mark.parametrize("batch", [1, 2])
def test_the_order_is_a_permutation_by_cluster_that_leaves_text(batch: int) -> None:
    q, k, _ = qkv(batch)
    slot: dict[str, torch.Tensor] = {}
    for table in Clusters(queries=7, keys=9).tables(q, k, LAYOUT, slot):
        assert torch.equal(table.sort(dim=1).values, torch.arange(LAYOUT.length).expand(2 * batch, -1))
        assert torch.equal(table[:, :3], torch.arange(3).expand(2 * batch, -1))
        assert torch.equal(table[:, -11:], torch.arange(183, 194).expand(2 * batch, -1))
    assert slot["q_centroids"].shape == (2 * batch, 7, 64)
    assert slot["k_centroids"].shape == (2 * batch, 9, 64)


def test_later_clusterings_start_from_the_centroids_of_the_last() -> None:
    q, k, _ = qkv()
    slot: dict[str, torch.Tensor] = {}
    order = Clusters(queries=7, keys=9, iterations=2)
    order.tables(q, k, LAYOUT, slot)
    before = slot["k_centroids"]
    order.tables(q, k + 0.1, LAYOUT, slot)
    video = (k + 0.1)[0, :, 3:183]
    assert torch.allclose(slot["k_centroids"], kmeans(video, before, iterations=2)[0])


def test_planted_clusters_are_found_whatever_their_place() -> None:
    generator = torch.Generator().manual_seed(0)
    code = F.normalize(torch.randn(6, 64, generator=generator), dim=-1)
    labels = torch.randint(6, (180,), generator=generator)
    x = torch.cat([torch.zeros(3, 64), code[labels], torch.zeros(11, 64)])[None, None]
    # More clusters than there are planted, as random starts may miss one.
    table, _ = Clusters(queries=24, keys=24).tables(x, x, LAYOUT, {})
    ordered = labels[table[0, 3:-11] - 3]
    assert int((ordered.diff() != 0).sum()) == 5


def one_call(chosen: Recipe, inputs: torch.Tensor, step: int, slot: Slot) -> Any:
    return attend(chosen, LAYOUT, *inputs, scale=None, layer=0, step=step, slot=slot)


@pytest.mark.parametrize("batch", [1, 2])
def test_everything_computed_in_clusters_is_dense_attention(batch: int) -> None:
    inputs = qkv(batch)
    out = one_call(recipe(selection=Pooled(density=1.0)), inputs, 0, Slot())
    assert float(out.density) == 1.0
    assert torch.allclose(out.out, F.scaled_dot_product_attention(*inputs), atol=2e-5)


def test_text_is_exact_and_the_rest_is_not() -> None:
    inputs = qkv()
    out = one_call(recipe(), inputs, 0, Slot())
    difference = (out.out - F.scaled_dot_product_attention(*inputs)).abs()
    assert difference[:, :, [*range(3), *range(183, 194)]].max() <= 2e-5
    assert difference.max() > 1e-3
    assert 0.1 < float(out.density) < 0.6


def test_a_batch_comes_to_what_its_entries_come_to_alone() -> None:
    inputs = qkv(2)
    both = one_call(recipe(), inputs, 0, Slot())
    for entry in range(2):
        alone = one_call(recipe(), inputs[:, entry : entry + 1], 0, Slot())
        assert torch.allclose(both.out[entry : entry + 1], alone.out, atol=2e-5)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(refresh_every=2)])
def test_the_forecast_of_what_is_kept_is_what_is_kept(schedule: Schedule) -> None:
    chosen, slot = recipe(schedule=schedule), Slot()
    one_call(chosen, qkv(2), 0, slot)
    told = forecast(chosen, LAYOUT, layers=1, branches=1, shape=(2, 2, LAYOUT.length, 64), dtype=torch.float32)
    assert told.kept_bytes == slot.nbytes


def test_between_refreshes_orders_and_blocks_stay() -> None:
    chosen, slot = recipe(schedule=Schedule(refresh_every=3)), Slot()
    first = one_call(chosen, qkv(), 4, slot)
    assert torch.equal(one_call(chosen, qkv(), 5, slot).out, first.out)
    kept = {name: tensor.clone() for name, tensor in slot.items()}
    one_call(chosen, qkv(seed=1), 6, slot)
    assert all(torch.equal(slot[name], kept[name]) for name in kept)
    assert slot.refreshed == 4
    one_call(chosen, qkv(seed=1), 7, slot)
    assert slot.refreshed == 7
    assert not torch.equal(slot["k_centroids"], kept["k_centroids"])


def test_reuse_repeats_the_whole_output_after_a_refresh() -> None:
    chosen, slot = recipe(skipped=Reuse(), schedule=Schedule(refresh_every=3)), Slot()
    whole = one_call(chosen, qkv(), 0, slot)
    assert whole.whole
    assert torch.allclose(one_call(chosen, qkv(), 1, slot).out, whole.out, atol=2e-5)


@pytest.mark.parametrize("computed", [[0, 2], [], [0, 1, 2]])
def test_heads_that_are_left_out_are_zero(computed: list[int]) -> None:
    q, k, v = torch.randn(3, 2, 3, 40, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(1, max(1, len(computed)), 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    chosen = Chosen(mask_to_lists(mask, 16, 16), None, heads=torch.tensor(computed, dtype=torch.int64))
    out, lse = attend_chosen(q, k, v, chosen, scale=0.25, precision="native")
    left = [head for head in range(3) if head not in computed]
    assert (out[:, left] == 0).all()
    assert (lse[:, left] == -torch.inf).all()
    if computed:
        expected, sums = oracle_attention(q[:, computed], k[:, computed], v[:, computed], mask, 16, 16, 0.25)
        assert torch.allclose(out[:, computed].double(), expected, atol=1e-5)
        assert torch.allclose(lse[:, computed].double(), sums, atol=1e-5)


def whole_clusters(q: torch.Tensor, k: torch.Tensor, order: Clusters, p: float, least: float) -> torch.Tensor:
    """SVG2's mask over tokens bool [H, S, S] in float64: clusters by a softmax of centroids weighted by size."""
    labels, centroids = [], []
    for x, clusters in ((q[0], order.queries), (k[0], order.keys)):
        found = kmeans(x, first_centroids(x, clusters, 0), iterations=order.first_iterations, tolerance=order.tolerance)
        centroids.append(found[0].double())
        labels.append(found[1])
    sizes = cluster_sizes(labels[1], order.keys)
    scores = centroids[0] @ centroids[1].mT / q.shape[-1] ** 0.5 + sizes[:, None].double().log()
    ordered, ranks = scores.softmax(dim=-1).sort(dim=-1, descending=True)
    taken = ordered.cumsum(dim=-1) - ordered < p
    taken[..., : int(least * order.keys)] = True
    clusters = torch.zeros_like(taken).scatter_(-1, ranks, taken)
    return torch.stack([clusters[head][labels[0][head]][:, labels[1][head]] for head in range(q.shape[1])])


def distance_from_dense(out: torch.Tensor, inputs: torch.Tensor) -> float:
    exact = F.scaled_dot_product_attention(*inputs.double())
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("pattern", ["clustered", "local"])
def test_blocks_of_clusters_come_near_to_whole_clusters(pattern: str, plant: Callable[..., Any]) -> None:
    """At the paper's share of computed pairs, rounded up to a block, blocks are as near to dense as whole clusters."""
    layout = TokenLayout((4, 8, 12))
    q, k = plant(pattern, layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    inputs = torch.stack([q, k, v])
    order = Clusters(queries=16, keys=24)
    mask = whole_clusters(q, k, order, 0.9, 0.1)
    scores = (q.double() @ k.double().mT / 8).masked_fill(~mask, -torch.inf)
    published = distance_from_dense(scores.softmax(dim=-1) @ v.double(), inputs)
    k_blocks = layout.length // 16
    share = math.ceil(float(mask.double().mean()) * k_blocks) / k_blocks
    chosen = Recipe(order=order, selection=Pooled(density=share), block_q=16, block_k=16)
    ours = attend(chosen, layout, *inputs, scale=None, layer=0, step=0, slot=Slot())
    assert float(ours.density) == pytest.approx(share)
    assert distance_from_dense(ours.out, inputs) < published


@pytest.mark.parametrize("other", [Rows(), Hilbert()])
def test_clusters_win_where_tokens_cluster(other: Any) -> None:
    """Planted clusters whose tokens are strewn over the grid: no order of the grid gathers them."""
    layout = TokenLayout((4, 8, 12))
    generator = torch.Generator().manual_seed(0)
    code = F.normalize(torch.randn(8, 64, generator=generator), dim=-1)
    labels = torch.randint(8, (layout.length,), generator=generator)
    noise = 0.1 * torch.randn(2, 1, 2, layout.length, 64, generator=generator)
    q, k = 12 * code[labels] + noise[0], 12 * code[labels] + noise[1]
    inputs = torch.stack([q, k, torch.randn(q.shape, generator=generator)])
    errors = []
    for order in (Clusters(queries=16, keys=16), other):
        chosen = Recipe(order=order, selection=Pooled(density=0.4), block_q=16, block_k=16)
        out = attend(chosen, layout, *inputs, scale=None, layer=0, step=0, slot=Slot()).out
        errors.append(distance_from_dense(out, inputs))
    assert errors[0] < 0.05
    assert errors[1] > 10 * errors[0]


@pytest.mark.parametrize("selection", [Radial(), Window(), Mass(), Pooled(adjacent=True)])
def test_selections_that_need_the_grid_are_refused(selection: Any) -> None:
    with pytest.raises(ValueError, match=r"^order: 'clusters' with selection .*; valid: "):
        Recipe(order=Clusters(), selection=selection)


@pytest.mark.parametrize(
    ("settings", "name"), [({"queries": 0}, "queries"), ({"iterations": 0}, "iterations"), ({"tolerance": -1}, "toler")]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^order\.{name}.*; valid: "):
        Clusters(**settings)


def test_the_grid_alone_gives_no_order_of_clusters() -> None:
    with pytest.raises(ValueError, match="depends on the content"):
        Clusters().table(LAYOUT, 2)


def test_the_preset_is_what_svg2_publishes_for_wan() -> None:
    svg2 = load_recipe("svg2")
    assert svg2.order == Clusters(queries=300, keys=1000, first_iterations=50, iterations=2, tolerance=1e-4)
    assert svg2.selection == Pooled(top_p=0.9, crossing=True, least=0.1)
    assert (svg2.schedule.dense_steps, svg2.schedule.dense_layers) == (10, (0,))
