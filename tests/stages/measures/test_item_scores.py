"""Measures of items typed otherwise, counted one by one in every resample."""

import numpy as np
import pytest

from stages.measures.item_scores import columns, robustness, variant_flips


def test_robustness_and_flips_count_each_item_as_often_as_it_is_drawn():
    rng = np.random.default_rng(0)
    given = [
        {"right": int(rng.random() < 0.6), "variants": list((rng.random(rng.integers(0, 4)) < 0.5).astype(int))}
        for _ in range(40)
    ]
    documents = [
        {
            "right": one["right"],
            "varied": len(one["variants"]),
            "varied_right": sum(one["variants"]),
            "varied_flipped": sum(each != one["right"] for each in one["variants"]),
        }
        for one in given
    ]
    weights = rng.multinomial(40, [1 / 40] * 40, size=6)
    for row in weights:
        drawn = [one for one, times in zip(given, row, strict=True) for _ in range(times)]
        pairs = [(one["right"], each) for one in drawn for each in one["variants"]]
        right, written = (sum(pair[side] for pair in pairs) for side in (1, 0))
        own = row[None].astype(float)
        assert robustness(columns(documents), own)[0] == pytest.approx(right / written)
        assert variant_flips(columns(documents), own)[0] == pytest.approx(np.mean([a != b for a, b in pairs]))
    nothing = columns([{"right": 0, "varied": 1, "varied_right": 0, "varied_flipped": 0}])
    assert np.isnan(robustness(nothing, np.ones((1, 1)))[0]) and variant_flips(nothing, np.ones((1, 1)))[0] == 0
