"""Fused maps and recommended maps are measured at the same points, and averaged as stated."""
import numpy as np
import pandas as pd
import pytest

from rssqa.bench.fused import CHOSEN, FUSED, answers_of_image, compare_answers, majority
from rssqa.data.datasets import IGNORE
from rssqa.tables.grid import PredictionGrid, mean_probability

NAMES = [*FUSED, *CHOSEN]


def grid(seed=0, methods=5, classes=4, side=7):
    rng = np.random.default_rng(seed)
    p = rng.integers(1, 255, (methods, classes, side, side)).astype(np.uint8)
    flip = rng.integers(1, 255, p.shape).astype(np.uint8)
    truth = rng.integers(classes, size=(side, side)).astype(np.uint8)
    truth[0] = IGNORE
    return PredictionGrid('i', 'town', list('abcde')[:methods], p, flip, p.argmax(1).astype(np.uint8), truth)


@pytest.mark.parametrize('seed', range(3))
def test_the_majority_agrees_with_a_plain_loop(seed):
    g = grid(seed)
    fused, mean = majority(g), mean_probability(g)
    for y, x in np.ndindex(fused.shape):
        votes = np.bincount(g.pred[:, y, x], minlength=4)
        tied = np.flatnonzero(votes == votes.max())
        assert fused[y, x] == max(tied, key=lambda k: mean[k, y, x])


def test_the_order_of_methods_does_not_matter():
    g = grid()
    turned = PredictionGrid('i', 'town', g.methods[::-1], g.p[::-1], g.flip[::-1], g.pred[::-1], g.truth)
    assert np.array_equal(majority(g), majority(turned)) and np.allclose(mean_probability(g), mean_probability(turned))


def test_only_labelled_points_count_and_the_best_map_bounds_the_chosen_ones():
    g = grid()
    found = answers_of_image(g, dict(truth=g.truth, first=np.zeros_like(g.truth)), dict(recommended='b', usual='d'))
    labelled = g.truth != IGNORE
    assert found['truth'] == 1 and found['first'] == pytest.approx((g.truth[labelled] == 0).mean())
    assert found['recommended'] == pytest.approx((g.pred[1] == g.truth)[labelled].mean())
    assert found['best'] >= max(found['recommended'], found['usual'])


def answers(seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for dataset, sizes in dict(a=(1, 5, 2), b=(4, 4)).items():
        for scene, n in enumerate(sizes):
            for i in range(n):
                oa = dict(zip(NAMES, rng.uniform(0.4, 1, len(NAMES))))
                rows.append(dict(image_id=f'{dataset}{scene}{i}', dataset=dataset, scene=str(scene), seed=0) | oa)
    return pd.DataFrame(rows)


def test_tiles_and_scenes_are_counted_as_stated():
    rows = answers()
    found = compare_answers(rows, draws=20).set_index(['answer', 'dataset', 'counted'])
    for name in NAMES:
        assert found.oa[name, 'all', 'tiles'] == pytest.approx(rows[name].mean())
        by_scene = rows.groupby(['dataset', 'scene'])[name].mean()
        assert found.oa[name, 'all', 'scenes'] == pytest.approx(by_scene.mean())
        assert found.oa[name, 'b', 'tiles'] == pytest.approx(rows[rows.dataset == 'b'][name].mean())
        difference = (rows[name] - rows.recommended).mean()
        assert found.difference[name, 'all', 'tiles'] == pytest.approx(difference)
    assert found.loc['majority', 'a', 'scenes'].scenes == 3 and found.loc['majority', 'all', 'tiles'].images == 16


def test_seeds_are_averaged_before_scenes_are_drawn():
    one, two = answers(1), answers(2).assign(seed=1)
    both = compare_answers(pd.concat([one, two]), draws=5)
    mean = one.assign(**{name: (one[name] + two[name]) / 2 for name in NAMES})
    expected = compare_answers(mean, draws=5)
    pd.testing.assert_frame_equal(both, expected)


def test_intervals_are_those_of_drawn_scenes_and_repeat_themselves():
    found = compare_answers(answers(), draws=400, seed=3)
    again = compare_answers(answers(), draws=400, seed=3)
    pd.testing.assert_frame_equal(found, again)
    assert (found.low <= found.difference + 1e-9).all() and (found.difference <= found.high + 1e-9).all()
    same = found[found.answer == 'recommended']
    assert (same.low == 0).all() and (same.high == 0).all()
    one_scene = answers()
    one_scene = one_scene[(one_scene.dataset == 'a') & (one_scene.scene == '1')]
    alone = compare_answers(one_scene, draws=30)
    assert np.allclose(alone.low, alone.difference) and np.allclose(alone.high, alone.difference) # nothing else to draw
