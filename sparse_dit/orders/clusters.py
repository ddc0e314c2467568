"""Order `clusters`: queries and keys, each by themselves, in the order of their k-means clusters.

Source: Sparse VideoGen 2, SVG2 (arXiv 2505.18875, NeurIPS 2025).
"""

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from einops import rearrange

from sparse_dit.clusters import chain, first_centroids, kmeans
from sparse_dit.layout import TokenLayout


@dataclass(frozen=True)
class Clusters:
    """Tokens of a cluster follow each other; queries are clustered apart from keys, whose order values share.

    The first clustering of a layer starts from tokens drawn at random. Its centroids stay with the layer, and later
    ones start from them. Text keeps its places.

    What differs from SVG2: its kernel takes clusters of any size as blocks, ours are of fixed size and cut the order
    wherever they end. So that clusters which share a block are alike, the first centroids are numbered along a chain of
    nearest neighbours. SVG2 clusters during dense steps, too, and shares centroids between the branches of guidance;
    here each branch has its own, from the first sparse step on.

    Args:
        queries: clusters of the queries of a head, at most one a token.
        keys: clusters of the keys.
        first_iterations: k-means iterations of the first clustering.
        iterations: of later ones.
        tolerance: the first clustering stops when no centroid moved farther.

    Raises:
        ValueError: a value is out of its range.
    """

    queries: int = 300
    keys: int = 1000
    first_iterations: int = 50
    iterations: int = 2
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "first_iterations", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"order.{name}: {getattr(self, name)!r}; valid: 1 or more")
        if not 0.0 <= self.tolerance < float("inf"):
            raise ValueError(f"order.tolerance: {self.tolerance!r}; valid: 0 or a positive number")

    def table(self, layout: TokenLayout, heads: int) -> torch.Tensor | None:
        """See `Order.table`. Raises ValueError: the order depends on the content; `tables` has it."""
        raise ValueError("order: 'clusters' depends on the content of each call; valid: an order of the grid")

    def tables(
        self, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, slot: MutableMapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The orders of queries and of keys.

        Args:
            q, k: [B, H, S, D] in the model's own token order.
            layout: the tokens.
            slot: what the layer keeps for this branch; its `q_centroids` and `k_centroids`, fp32 [B * H, C, D], are
                where the clustering starts, and are replaced.

        Returns:
            int64 [B * H, S] each, on q's device: token ids in the order in which they enter blocks; text stays.
        """
        return (
            self._table(q, "q_centroids", self.queries, layout, slot),
            self._table(k, "k_centroids", self.keys, layout, slot),
        )

    def _table(
        self, x: torch.Tensor, name: str, clusters: int, layout: TokenLayout, slot: MutableMapping[str, torch.Tensor]
    ) -> torch.Tensor:
        video = x[:, :, layout.text_before : layout.text_before + layout.video_tokens]
        tokens = rearrange(video, "b h s d -> (b h) s d")
        centroids, iterations = slot.get(name), self.iterations
        if centroids is None:
            drawn = first_centroids(tokens, min(clusters, layout.video_tokens), seed=0)
            found, _ = kmeans(tokens, drawn, iterations=self.first_iterations, tolerance=self.tolerance)
            centroids, iterations = chain(found), 1
        # Later iterations are few and wait for nothing.
        slot[name], labels = kmeans(tokens, centroids, iterations=iterations)
        order = labels.argsort(dim=1, stable=True) + layout.text_before
        ids = torch.arange(layout.length, device=x.device).expand(len(order), -1)
        return torch.cat([ids[:, : layout.text_before], order, ids[:, layout.text_before + layout.video_tokens :]], 1)

    def kept_bytes(self, layout: TokenLayout, *, batch: int, heads: int, head_size: int, keeps: bool) -> int:
        """Bytes that one layer keeps for one branch: centroids, and between refreshes the two orders.

        Args:
            layout: the tokens.
            batch, heads, head_size: of the queries.
            keeps: whether there are steps between refreshes (`Schedule.keeps`).
        """
        centroids = sum(min(clusters, layout.video_tokens) for clusters in (self.queries, self.keys))
        return batch * heads * (4 * head_size * centroids + keeps * 2 * 4 * layout.length)
