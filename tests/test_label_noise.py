"""Doubtful labels: by hand, on references with known errors, and through the bench."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rssqa.bench.label_noise import REGION, compare_without_doubtful, find_planted, plant_errors
from rssqa.bench.protocol import leaderboard
from rssqa.core import MissingFeatures
from rssqa.data.datasets import IGNORE
from rssqa.quality.label_noise import class_thresholds, doubtful_labels, find_doubtful, label_noise
from rssqa.segment.confidence import segments
from rssqa.tables.grid import PredictionGrid
from trained import numbers


def image(i, accuracy=0.9, side=24, methods=4, classes=3):
    rng = np.random.default_rng(i)
    truth = np.kron(rng.integers(classes, size=(3, 3)), np.ones((side // 3, side // 3), int))
    wrong = (truth + rng.integers(1, classes, (methods, side, side))) % classes
    pred = np.where(rng.random(wrong.shape) < accuracy, truth, wrong).astype(np.uint8)
    p = (np.eye(classes)[pred].transpose(0, 3, 1, 2) * 180 + 25).astype(np.uint8)
    return PredictionGrid(f'i{i}', 'town', list('abcdefgh')[:methods], p, p, pred, truth.astype(np.uint8))


GRIDS = [image(i) for i in range(20)]


def test_thresholds_and_doubts_agree_with_a_plain_loop():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 300)
    labels = rng.choice([0, 1, 2, IGNORE], 300)                        # class 3 has no label
    thresholds = class_thresholds(p, labels)
    assert np.isinf(thresholds[3])
    for k in range(3): assert thresholds[k] == pytest.approx(p[labels == k, k].mean())
    for row, label, found in zip(p, labels, doubtful_labels(p, labels, thresholds)):
        best = max(range(4), key=lambda k: row[k])
        doubted = label not in (best, IGNORE) and row[best] >= thresholds[best]
        assert found == (best if doubted else -1)


def test_a_label_that_is_the_most_probable_class_is_never_doubted():
    p = np.array([[0.6, 0.4]] * 8 + [[0.9, 0.1]] * 2)
    labels = np.array([0] * 9 + [1])                                   # a rare class with a low threshold
    thresholds = class_thresholds(p, labels)
    assert thresholds[1] < 0.4 and (doubtful_labels(p, labels, thresholds)[:9] == -1).all()


def test_renaming_classes_renames_the_answer():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(3), 200)
    labels = rng.integers(3, size=200)
    new_name = np.array([2, 0, 1])
    found = doubtful_labels(p, labels, class_thresholds(p, labels))
    permuted = np.empty_like(p)
    permuted[:, new_name] = p
    again = doubtful_labels(permuted, new_name[labels], class_thresholds(permuted, new_name[labels]))
    assert np.array_equal(np.where(found < 0, -1, new_name[found]), again)


def test_a_clean_reference_is_not_doubted_and_a_wrong_region_is():
    assert np.mean([(doubt >= 0).mean() for doubt in find_doubtful(GRIDS)]) < 0.01
    truth = GRIDS[3].truth.copy()
    truth[:8, :8] = (truth[0, 0] + 1) % 3
    changed = [*GRIDS[:3], replace(GRIDS[3], truth=truth), *GRIDS[4:]]
    doubt = find_doubtful(changed)[3]
    inside = doubt[:8, :8]
    assert (inside == GRIDS[3].truth[0, 0]).mean() > 0.5 and (doubt >= 0).sum() == (inside >= 0).sum()


def test_the_corrected_accuracy_counts_the_confident_class():
    truth = GRIDS[3].truth.copy()
    truth[:8, :8] = (truth[0, 0] + 1) % 3
    grids = [*GRIDS[:3], replace(GRIDS[3], truth=truth), *GRIDS[4:]]
    rows = label_noise(grids).set_index(['image_id', 'method'])
    doubt = find_doubtful(grids)[3]
    for method, pred in zip(GRIDS[3].methods, GRIDS[3].pred):
        row = rows.loc['i3', method]
        corrected = np.where(doubt >= 0, doubt, truth)
        assert row.oa == pytest.approx((pred == truth).mean())
        assert row.oa_corrected == pytest.approx((pred == corrected).mean())
        assert row.doubtful == pytest.approx((doubt >= 0).mean()) and row.labelled == 576


def test_unlabelled_points_count_for_nothing():
    truth = GRIDS[0].truth.copy()
    truth[:12] = IGNORE
    row = label_noise([replace(GRIDS[0], truth=truth), *GRIDS[1:]]).iloc[0]
    assert row.labelled == 288 and row.oa == pytest.approx((GRIDS[0].pred[0, 12:] == truth[12:]).mean())
    blank = [replace(grid, truth=np.full_like(grid.truth, IGNORE)) for grid in GRIDS]
    with pytest.raises(MissingFeatures, match='(?i)found none in 20 images'): label_noise(blank)


def test_planted_errors_are_one_region_of_every_second_image():
    changed, wrong = plant_errors(GRIDS, seed=3)
    assert not any(w.any() for w in wrong[::2]) and np.mean([w.any() for w in wrong[1::2]]) > 0.5
    for grid, new, w in zip(GRIDS, changed, wrong):
        assert np.array_equal(grid.truth != new.truth, w) and np.array_equal(grid.pred, new.pred)
        if not w.any(): continue
        assert REGION[0] <= w.mean() <= REGION[1]
        assert len(np.unique(new.truth[w])) == 1 and len(np.unique(segments(grid.truth)[w])) == 1
    again, _ = plant_errors(GRIDS, seed=3)
    assert all(np.array_equal(a.truth, b.truth) for a, b in zip(changed, again))


def test_planted_errors_are_found_by_good_maps_and_less_by_poor_ones():
    measured = {a: find_planted([image(i, accuracy=a) for i in range(20)]) for a in (0.9, 0.5, 1 / 3)}
    assert measured[0.9]['recall'] > 0.5 and measured[0.9]['elsewhere'] < 0.01 and measured[0.9]['srocc'] > 0.9
    contrast = [m['recall'] - m['elsewhere'] for m in measured.values()]
    assert contrast[0] > contrast[1] > contrast[2]
    assert contrast[2] < 0.1                                          # maps that know nothing doubt all labels alike


def test_recall_and_doubts_elsewhere_are_counted_by_hand():
    changed, wrong = plant_errors(GRIDS, seed=1)
    doubts = find_doubtful(changed)
    hit = sum(int(d >= 0) for doubt, w in zip(doubts, wrong) for d in doubt[w])
    other = sum(int(d >= 0) for doubt, w in zip(doubts, wrong) for d in doubt[~w])
    n_wrong = sum(w.sum() for w in wrong)
    found = find_planted(GRIDS, seed=1)
    assert found['recall'] == pytest.approx(hit / n_wrong)
    assert found['elsewhere'] == pytest.approx(other / (20 * 576 - n_wrong))
    assert found['planted'] == pytest.approx(n_wrong / (20 * 576))


def test_comparisons_leave_out_the_doubtful_fifth_of_each_dataset():
    table = numbers(datasets=2, scenes=5, images=2)
    rng = np.random.default_rng(0)
    predictions = table[['image_id', 'method', 'fold']].assign(seed=0, noisy=table.oa + rng.normal(0, 0.05, len(table)))
    images = table.drop_duplicates('image_id').set_index('image_id')
    doubtful = pd.Series(rng.random(len(images)), images.index)
    found = compare_without_doubtful(table, predictions, doubtful, table).set_index('images', append=True)
    kept = []
    for _, group in images.groupby('dataset'): kept += list(doubtful[group.index].sort_values().index[:8])
    chosen = table[table.image_id.isin(kept)]
    expected = leaderboard(chosen, predictions[predictions.image_id.isin(kept)], table)
    assert found.loc[('noisy', 'without the doubtful fifth'), 'mae'] == pytest.approx(expected.mae['noisy'])
    assert found.loc[('noisy', 'all'), 'n_images'] == 20
    assert found.loc[('noisy', 'without the doubtful fifth'), 'n_images'] == 16
