"""The picture of a comparison."""

import numpy as np
import pytest

from sparse_dit.eval.side_by_side import GAP, PANEL, side_by_side


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 47), (300, 200)])
def test_panels_show_both_clips_and_their_difference(height: int, width: int) -> None:
    dense = np.full((2, height, width, 3), 0.25, np.float32)
    sparse = dense.copy()
    sparse[1] += 0.0625
    picture = side_by_side(dense, sparse, "a label")
    assert picture.dtype == np.float32
    assert picture.shape[1] % 2 == picture.shape[2] % 2 == 0
    factor = -(-PANEL // height)
    bottom, column = height * factor - 1, width * factor
    bar = picture.shape[1] - height * factor - (picture.shape[1] - height * factor) % 2
    row = bar + bottom // 2
    middles = [column // 2 + panel * (column + GAP) for panel in range(3)]
    np.testing.assert_allclose(picture[0, row, middles, 0], [0.25, 0.25, 0.0])
    # 16 is the largest power of two that keeps a difference of 1/16 within range.
    np.testing.assert_allclose(picture[1, row, middles, 0], [0.25, 0.3125, 1.0])
    assert (picture[:, : bar // 2].min(axis=(1, 2, 3)) < 0.5).all(), "no label is drawn"


def test_refuses_clips_of_two_shapes() -> None:
    with pytest.raises(ValueError, match="shape"):
        side_by_side(np.zeros((2, 16, 16, 3), np.float32), np.zeros((3, 16, 16, 3), np.float32), "")
