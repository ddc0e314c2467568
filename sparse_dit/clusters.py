"""k-means of tokens in torch: Lloyd's iterations for many heads at once, from given centroids."""

import torch
import torch.nn.functional as F
from einops import rearrange

# Products of tokens and centroids held at once.
PRODUCTS = 2**26


def kmeans(
    x: torch.Tensor, centroids: torch.Tensor, *, iterations: int, tolerance: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's iterations: each assigns every token to its nearest centroid and moves centroids to their means.

    A centroid without tokens stays where it is. `objective` of centroids and labels never rises from one iteration to
    the next. Sums run in a fixed order, so that a run repeats on any device.

    Args:
        x: tokens [G, N, D], any floating dtype; G groups (batch entries times heads) that share nothing.
        centroids: fp32 [G, C, D], where the iterations start; C at most N.
        iterations: at least 1.
        tolerance: stop when no centroid moved farther than this; above 0 each iteration waits for the device.

    Returns:
        centroids fp32 [G, C, D], and labels int64 [G, N], the last assignment, of which they are the means.

    Raises:
        ValueError: no iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations: {iterations}; valid: at least 1")
    for _ in range(iterations):
        labels = nearest(x, centroids)
        moved = means(x, labels, centroids)
        still = tolerance > 0.0 and float((moved - centroids).norm(dim=-1).max()) <= tolerance
        centroids = moved
        if still:
            break
    return centroids, labels


def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The centroid nearest to each token by Euclidean distance, int64 [G, N]; shapes as `kmeans`."""
    # |x - c|^2 without |x|^2, which is the same for all centroids.
    half = centroids.square().sum(dim=-1)[:, None] / 2
    some = max(1, PRODUCTS // (centroids.shape[0] * centroids.shape[1]))
    return torch.cat([(part.float() @ centroids.mT - half).argmax(dim=-1) for part in x.split(some, dim=1)], dim=1)


def means(x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The mean token of each label, fp32 [G, C, D]; of a label without tokens its centroid. Shapes as `kmeans`."""
    groups, clusters, width = centroids.shape
    by_label = labels.argsort(dim=1, stable=True)[..., None].expand(-1, -1, width)
    tokens = rearrange(x.gather(1, by_label).float(), "g n d -> (g n) d")
    sizes = cluster_sizes(labels, clusters)
    sums = torch.segment_reduce(tokens, "sum", lengths=sizes.flatten(), axis=0, unsafe=True, initial=0.0)
    sums = rearrange(sums, "(g c) d -> g c d", g=groups)
    return torch.where((sizes > 0)[..., None], sums / sizes.clamp(min=1)[..., None], centroids)


def cluster_sizes(labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Tokens of each of so many clusters, int64 [G, clusters], from labels int64 [G, N]."""
    sizes = torch.zeros(labels.shape[0], clusters, dtype=torch.int64, device=labels.device)
    return sizes.scatter_add_(1, labels, torch.ones_like(labels))


def first_centroids(x: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """Tokens drawn without repetition, the same places in all groups and on all devices.

    Args:
        x: tokens [G, N, D].
        clusters: how many, at most N.
        seed: of the draw.

    Returns:
        fp32 [G, clusters, D].
    """
    drawn = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))[:clusters]
    return x[:, drawn.to(x.device)].float()


def chain(centroids: torch.Tensor) -> torch.Tensor:
    """The centroids, each followed by the nearest one that is left; fp32 [G, C, D], shapes as `kmeans`.

    Blocks of fixed size straddle clusters; so the clusters that share a block are alike.
    """
    groups, clusters, width = centroids.shape
    half = centroids.square().sum(dim=-1) / 2
    left = torch.zeros_like(half)
    place = torch.zeros(groups, 1, dtype=torch.int64, device=centroids.device)
    places = [place]
    for _ in range(clusters - 1):
        left = left.scatter(1, place, torch.inf)
        last = centroids.gather(1, place[..., None].expand(-1, -1, width))
        place = (half - (last @ centroids.mT).squeeze(1) + left).argmin(dim=1, keepdim=True)
        places.append(place)
    return centroids.gather(1, torch.cat(places, dim=1)[..., None].expand(-1, -1, width))


def objective(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What k-means lowers: the sum of squared distances of tokens to the centroids of their labels, float64 [G]."""
    own = centroids.double().gather(1, labels[..., None].expand(-1, -1, centroids.shape[-1]))
    return F.mse_loss(x.double(), own, reduction="none").sum(dim=(1, 2))
