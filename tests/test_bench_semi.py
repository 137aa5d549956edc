"""Gates and pseudo-labels of the semi-supervised bench, on made numbers."""
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest

from rssqa.bench.semi import (
    GATES, TeacherMap, choose_labels, mean_of_kept, measure_gates, precision_of_words, split_scenes,
)
from rssqa.core import Incompatible
from rssqa.data.datasets import IGNORE
from rssqa.semi.purify import Region

Tile = namedtuple('Tile', 'image_id')


def made_tables(noise, seed=0, images=60, methods=3): # predictions with this noise, max-softmax with .3
    rng = np.random.default_rng(seed)
    oa = rng.uniform(0.2, 1, (images, methods))
    base = pd.DataFrame(dict(
        dataset='a', image_id=np.repeat([f'i{i:03}' for i in range(images)], methods),
        method=np.tile([f'm{m}' for m in range(methods)], images), oa=oa.ravel()))
    scene = [f's{int(i[1:]) // 3}' for i in base.image_id]
    predicted = base.assign(scene=scene, predicted=base.oa + rng.normal(0, noise, len(base)))
    table = base.assign(conf_t=base.oa + rng.normal(0, 0.3, len(base)), agree_mean=0.5)
    return predicted, table.sample(frac=1, random_state=0)


def test_a_perfect_prediction_keeps_what_truth_keeps():
    row = measure_gates(*made_tables(0), draws=100).iloc[0]
    assert row.assessor == row.true_oa > row.max_softmax > row.all_maps
    assert 0 < row.low <= row.difference <= row.high
    assert (row.images, row.scenes) == (60, 20)


def test_a_bad_prediction_loses_against_a_better_gate():
    row = measure_gates(*made_tables(3.0), draws=100).iloc[0]
    assert row.difference < 0 and row.low < row.high and row.true_oa >= row.max_softmax


def test_kept_maps_by_hand():
    oa = np.array([[0.1, 0.9], [0.5, 0.5], [0.9, 0.1], [0.3, 0.3]])
    assert mean_of_kept(oa, oa) == pytest.approx((0.9 + 0.5 + 0.9 + 0.5) / 4)
    assert mean_of_kept(oa, -oa) == pytest.approx((0.1 + 0.3 + 0.1 + 0.3) / 4)
    assert mean_of_kept(oa, oa, 0.25) == pytest.approx(0.9) and mean_of_kept(oa, oa, 1) == pytest.approx(oa.mean())


def test_predictions_of_other_maps_are_refused():
    predicted, table = made_tables(0.1)
    with pytest.raises(Incompatible, match='(?i)differs by'):
        measure_gates(predicted, table.assign(oa=table.oa.to_numpy()[::-1]), draws=5)


@pytest.mark.parametrize('seed', range(5))
def test_scenes_are_divided_without_overlap(seed):
    tiles = pd.DataFrame(dict(scene=np.repeat([f's{i}' for i in range(20)], 3), image_id=range(60)))
    parts = split_scenes(tiles, seed)
    assert sorted(i for p in parts.values() for i in p.image_id) == list(range(60))
    assert {name: p.scene.nunique() for name, p in parts.items()} == dict(labelled=2, test=6, unlabelled=12)
    assert not split_scenes(tiles, seed + 5)['test'].equals(parts['test'])


def maps_of(sure, predicted): # one map an image; a region that is sure of class 1 in its left half
    maps = []
    for i, (p, q) in enumerate(zip(sure, predicted)):
        probs = np.zeros((3, 4, 4), np.float32) + (1 - p) / 2
        probs[0] = p
        maps.append(TeacherMap(Tile(f'i{i}'), probs, q, [Region(1, 0.99999, (0, 0, 2, 4))]))
    return maps


def test_each_gate_keeps_its_own_half():
    maps = maps_of([0.5, 0.6, 0.96, 0.97], [0.9, 0.8, 0.7, 0.6])
    used = {which: [p.used.mean() for p in choose_labels(maps, which)] for which in (
        'all', 'sure pixels', 'max-softmax gate', 'assessor gate', 'evidence')}
    assert used['all'] == [1, 1, 1, 1] and used['sure pixels'] == [0, 0, 1, 1]
    assert used['max-softmax gate'] == [0, 0, 1, 1] and used['assessor gate'] == [1, 1, 0, 0]
    assert used['evidence'] == [0.5, 0.5, 1, 1]
    mended = choose_labels(maps, 'evidence')[0].as_mask()
    assert (mended[:, :2] == 1).all() and (mended[:, 2:] == IGNORE).all()


def test_a_refused_prediction_is_not_kept():
    maps = maps_of([0.9] * 4, [0.9, np.nan, 0.7, 0.6])
    assert not choose_labels(maps, 'assessor gate')[1].used.any()


def test_without_labelled_tiles_words_have_no_score_to_speak_of():
    class Spec: classes = ('a', 'b', 'c', 'd')
    empty = pd.DataFrame(dict(image_id=[]))
    assert np.allclose(precision_of_words(None, empty, Spec), 1 / 4)
    assert list(GATES)[:2] == ['assessor', 'max_softmax']
