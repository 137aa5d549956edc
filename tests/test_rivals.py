"""Votes, learning to rank, nuclear norm and trees on points: by hand, by simulation, and through the bench."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rssqa.core import MissingFeatures
from rssqa.data.datasets import IGNORE
from rssqa.quality.baselines import BlockBaseline
from rssqa.quality.nuclear_norm import NuclearNormBaseline, nuclear_norm
from rssqa.quality.point_trees import PointTrees, point_rows
from rssqa.quality.ranking import RankBaseline, grades, has_lightgbm
from rssqa.quality.votes import (
    StapleBaseline, VoteBaseline, class_posterior, count_confusion, dawid_skene, vote_logits,
)
from rssqa.segment.metrics import grouped_srocc
from rssqa.tables.grid import PredictionGrid, prediction_grids
from rssqa.tables.store import Store
from trained import numbers, trained_setup

needs_lightgbm = pytest.mark.skipif(not has_lightgbm(), reason='LightGBM is an extra')


def simulated(n=6000, accuracies=(0.9, 0.75, 0.6), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.choice(classes, n, p=[0.5, 0.3, 0.2])
    wrong = (truth[:, None] + rng.integers(1, classes, (n, len(accuracies)))) % classes
    votes = np.where(rng.random((n, len(accuracies))) < accuracies, truth[:, None], wrong)
    return truth, votes.astype(np.uint8)


# ---------------------------------------------------------------- votes

def test_confusion_is_counted_by_hand():
    votes = np.array([[0], [0], [1], [1], [IGNORE]], np.uint8)
    truth = np.array([0, 0, 0, 1, 1])
    table = count_confusion(votes, np.eye(2)[truth])[0]
    # one point in each cell before counting: class 0 was voted 0, 0, 1; class 1 was voted 1
    assert np.allclose(table, [[3 / 5, 2 / 5], [1 / 3, 2 / 3]])


def test_the_posterior_is_that_of_bayes():
    truth, votes = simulated()
    confusion = count_confusion(votes, np.eye(3)[truth])
    prior = np.bincount(truth) / len(truth)
    posterior = class_posterior(vote_logits(votes[:1], confusion), prior)[0]
    likelihood = prior * np.prod([confusion[m, :, votes[0, m]] for m in range(3)], 0)
    assert np.allclose(posterior, likelihood / likelihood.sum())
    flat = class_posterior(vote_logits(votes[:1], confusion), prior, 1e9)[0]
    assert np.allclose(flat, prior, atol=1e-6)


def test_absent_votes_count_for_nothing():
    truth, votes = simulated()
    confusion = count_confusion(votes, np.eye(3)[truth])
    absent = votes.copy()
    absent[:, 2] = IGNORE
    assert np.allclose(vote_logits(absent, confusion), vote_logits(votes[:, :2], confusion[:2]))


@pytest.mark.parametrize('seed', range(3))
def test_dawid_skene_finds_accuracies_without_labels(seed):
    truth, votes = simulated(seed=seed)
    confusion, prior = dawid_skene(votes, 3)
    counted = count_confusion(votes, np.eye(3)[truth])
    assert np.abs(confusion - counted).max() < 0.1
    assert np.abs(prior - np.bincount(truth) / len(truth)).max() < 0.05
    fused = class_posterior(vote_logits(votes, confusion), prior).argmax(1)
    assert (fused == truth).mean() > max((votes == truth[:, None]).mean(0))


def test_classes_may_be_renamed():
    _, votes = simulated(2000)
    names = np.array([2, 0, 1])
    confusion, prior = dawid_skene(votes, 3)
    renamed, other_prior = dawid_skene(names[votes].astype(np.uint8), 3)
    assert np.allclose(renamed[:, names][:, :, names], confusion, atol=1e-6)
    assert np.allclose(other_prior[names], prior, atol=1e-6)


@pytest.mark.parametrize('labels', [True, False])
def test_a_vote_baseline_learns_from_grids(labels):
    setup = trained_setup()
    store = str(setup.home/'store')
    model = VoteBaseline(store, labels).fit(setup.sqed)
    predicted = model.predict(setup.sqed)
    assert predicted.shape == (len(setup.sqed),) and ((predicted >= 0) & (predicted <= 1)).all()
    order = setup.sqed.sample(len(setup.sqed), random_state=0)
    assert np.allclose(model.predict(order), pd.Series(predicted, setup.sqed.index)[order.index])
    assert np.abs(predicted - setup.sqed.oa).mean() < setup.sqed.oa.std() + 0.05
    with pytest.raises(MissingFeatures, match='(?i)not in training'):
        model.predict(setup.sqed.assign(dataset='elsewhere'))


def test_staple_reads_one_image_at_a_time():
    setup = trained_setup()
    model = StapleBaseline(str(setup.home/'store')).fit(setup.sqed)
    predicted = pd.Series(model.predict(setup.sqed), setup.sqed.index)
    image = setup.sqed.image_id == setup.sqed.image_id.iloc[0]
    assert np.allclose(model.predict(setup.sqed[image]), predicted[image])
    assert np.abs(predicted - setup.sqed.oa).mean() < setup.sqed.oa.std() + 0.05
    grid = prediction_grids(Store(setup.home/'store'), setup.sqed[image])[0]
    q = model.posterior(grid)
    assert q.shape == (grid.p.shape[1], *grid.pred.shape[1:]) and np.allclose(q.sum(0), 1)
    # the methods of an image in another order are the same methods
    backwards = replace(grid, methods=grid.methods[::-1], pred=grid.pred[::-1], p=grid.p[::-1], flip=grid.flip[::-1])
    assert np.allclose(model.posterior(backwards), q)


def test_votes_need_grids(tmp_path):
    with pytest.raises(MissingFeatures, match='prediction grid'): VoteBaseline(str(tmp_path)).fit(numbers())


# ---------------------------------------------------------------- ranking

def test_grades_are_ranks_within_images():
    oa = np.array([0.3, 0.9, 0.3, 0.5, 0.6])
    assert grades(oa, np.array([0, 0, 0, 0, 1])).tolist() == [0, 2, 0, 1, 0]


def ordered_table(seed=0): # one column tells the differences within an image, another the level
    rng = np.random.default_rng(seed)
    t = numbers(datasets=1, scenes=16, images=4, seed=seed)
    level = t.groupby('image_id').oa.transform('mean')
    difference = rng.normal(0, 0.05, len(t))
    oa = (level + difference).clip(0, 1)
    return t.assign(oa=oa, entropy=1 - level, margin=0.5 + difference + rng.normal(0, 0.01, len(t)))


@needs_lightgbm
def test_ranking_orders_maps_and_keeps_the_level_of_trees():
    t = ordered_table()
    test = t.scene.isin(['s0', 's1', 's2', 's3'])
    blocks = ('single_map', 'cross_method', 'prior')
    ranked = RankBaseline(blocks, seed=1).fit(t[~test])
    trees = BlockBaseline(blocks, 'trees', seed=1).fit(t[~test])
    rows, image = t[test], pd.factorize(t.image_id[test])[0]
    predicted, level = ranked.predict(rows), trees.predict(rows)
    means = [pd.Series(p).groupby(image).mean() for p in (predicted, level)]
    assert np.allclose(*means, atol=0.01)
    oa = rows.oa.to_numpy()
    assert np.nanmean(grouped_srocc(oa, predicted, image)) > 0.6 and ranked.slope_ > 0
    again = RankBaseline(blocks, seed=1).fit(t[~test].sample(frac=1, random_state=0)).predict(rows)
    assert np.abs(again - predicted).max() < 0.05


@needs_lightgbm
def test_ranking_is_repeated_exactly():
    t = ordered_table()
    first, second = (RankBaseline(('single_map', 'prior'), seed=2).fit(t).predict(t) for _ in range(2))
    assert np.array_equal(first, second)


def test_without_lightgbm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr('rssqa.quality.ranking.has_lightgbm', lambda: False)
    with pytest.raises(MissingFeatures, match='(?i)no LightGBM.*rssqa.rivals'): RankBaseline().fit(ordered_table())


# ---------------------------------------------------------------- nuclear norm

def test_the_nuclear_norm_is_the_sum_of_singular_values():
    p = np.random.default_rng(0).dirichlet(np.ones(4), (2, 6, 7)).transpose(0, 3, 1, 2)
    expected = [np.linalg.norm(x.reshape(4, -1), 'nuc') / np.sqrt(4 * 42) for x in p]
    assert np.allclose(nuclear_norm(p), expected)


def test_the_nuclear_norm_does_not_depend_on_the_order_of_classes_and_points():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(3), (5, 5)).transpose(2, 0, 1)[None]
    shuffled = rng.permutation(p.reshape(3, 25).T).T.reshape(1, 3, 5, 5)
    assert np.allclose(nuclear_norm(p), nuclear_norm(p[:, [2, 0, 1]]))
    assert np.allclose(nuclear_norm(p), nuclear_norm(shuffled))


def test_the_nuclear_norm_baseline_learns_and_needs_grids(tmp_path):
    setup = trained_setup()
    model = NuclearNormBaseline(str(setup.home/'store')).fit(setup.sqed)
    predicted = model.predict(setup.sqed)
    means = setup.sqed.assign(predicted=predicted).groupby('method')[['oa', 'predicted']].mean()
    assert np.allclose(means.oa, means.predicted, atol=0.02)           # a line goes through the mean of its group
    with pytest.raises(MissingFeatures, match='(?i)keep grids'): NuclearNormBaseline(str(tmp_path)).fit(numbers())


# ---------------------------------------------------------------- trees on points

class Drawn(PointTrees):
    "Trees on grids that are kept in memory."
    def _grids(self, X): return [grid for grid in GRIDS if grid.image_id in set(X.image_id)]


def drawn_grid(i, rates, side=12):
    rng = np.random.default_rng(i)
    truth = rng.integers(3, size=(side, side))
    wrong = (truth + rng.integers(1, 3, (len(rates), side, side))) % 3
    pred = np.where(rng.random(wrong.shape) < np.array(rates)[:, None, None], truth, wrong).astype(np.uint8)
    p = (np.eye(3)[pred].transpose(0, 3, 1, 2) * 180 + 25).astype(np.uint8)
    return PredictionGrid(f'i{i}', 'a' if i % 2 else 'b', ['good', 'poor'], p, p, pred, truth.astype(np.uint8))


GRIDS = [drawn_grid(i, (0.9, 0.5)) for i in range(16)]
TABLE = pd.DataFrame([
    dict(image_id=grid.image_id, dataset=grid.dataset, method=method) for grid in GRIDS for method in grid.methods])


def test_trees_on_points_learn_whom_to_trust():
    model = Drawn(trees=40).fit(TABLE[:20])
    rows = TABLE[20:].assign(predicted=model.predict(TABLE[20:]))
    found = rows.groupby('method').predicted.mean()
    assert found.good == pytest.approx(0.9, abs=0.05) and found.poor == pytest.approx(0.5, abs=0.08)
    for grid in GRIDS[10:]: assert np.allclose(model.posterior(grid).sum(0), 1)


def test_rows_of_a_point_keep_their_class():
    x = np.random.default_rng(0).normal(size=(4, 3, 5))
    rows = point_rows(x, np.array([7, -1, 9])).reshape(4, 3, 6)
    assert np.array_equal(rows[..., :5], x) and np.isnan(rows[:, 1, 5]).all()
    assert (rows[:, 0, 5] == 7).all() and (rows[:, 2, 5] == 9).all()


def test_trees_on_points_serve_a_dataset_that_was_not_in_training_and_repeat_themselves():
    first = Drawn(trees=20).fit(TABLE[TABLE.dataset == 'a'])
    predicted = first.predict(TABLE)
    assert np.isfinite(predicted).all() and ((predicted >= 0) & (predicted <= 1)).all()
    assert np.array_equal(predicted, Drawn(trees=20).fit(TABLE[TABLE.dataset == 'a']).predict(TABLE))


def test_trees_on_points_need_true_classes():
    blank = [replace(grid, truth=np.full_like(grid.truth, IGNORE)) for grid in GRIDS]
    class Blank(PointTrees):
        def _grids(self, X): return blank
    with pytest.raises(MissingFeatures, match='(?i)found none for 16 images'): Blank().fit(TABLE)
