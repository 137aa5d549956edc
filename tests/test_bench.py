"""The protocol: scenes apart, every predictor on the same rows, and a verdict that can be read off."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.base import BaseEstimator

from rssqa.baselines import ColumnBaseline, MeanBaseline
from rssqa.bench import OURS, VIEWS, commit, compare, cross_predict, measure, save_results, scene_folds, verdict, read_results
from rssqa.core import Incompatible
from worlds import numbers


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(0, 99))
def test_a_scene_is_never_on_both_sides(datasets, scenes, images, methods, k, seed):
    t = numbers(datasets, scenes, images, methods).sample(frac=1, random_state=seed)
    t['fold'] = scene_folds(t, k, seed)
    assert t.groupby(['dataset', 'scene']).fold.nunique().eq(1).all()
    assert t.groupby('dataset').fold.nunique().eq(min(k, scenes)).all()


def test_one_scene_cannot_be_split():
    t = numbers(2, 3)
    with pytest.raises(Incompatible, match='d1'): scene_folds(t[(t.dataset == 'd0') | (t.scene == 's0')])


def test_equal_names_in_two_datasets_are_two_scenes():
    t = numbers(3, 5)
    fold = scene_folds(t, 5)
    assert t.assign(fold=fold).groupby('scene').fold.nunique().max() >= 1 and np.bincount(fold).min() == 27


class Spy(BaseEstimator):
    "Remembers what it learned from, and refuses to judge it."
    def fit(self, X, y=None): self.seen_ = set(X.dataset + X.scene); self.mean_ = X.oa.mean(); return self
    def predict(self, X):
        assert not self.seen_ & set(X.dataset + X.scene) and (X.index == np.arange(len(X))).all()
        return np.full(len(X), self.mean_)


def test_cross_prediction_is_out_of_fold_and_repeatable():
    t = numbers().sample(frac=1, random_state=1)
    fold = scene_folds(t, 3)
    tried = dict(spy=Spy(), column=ColumnBaseline('conf_t', fitted=False), mean=MeanBaseline())
    told = cross_predict(tried, t, fold)
    assert list(told) == list(tried) and told.index.equals(t.index) and told.notna().all().all()
    assert np.array_equal(told.column, t.conf_t) and told.equals(cross_predict(tried, t, fold))
    for k in range(3): assert np.allclose(told.spy[fold == k], t.oa[fold != k].mean())


def test_estimators_are_left_unfitted():
    spy = Spy()
    cross_predict(dict(spy=spy), t := numbers(), scene_folds(t, 2))
    assert not hasattr(spy, 'seen_')


def test_perfect_and_useless_predictions_are_told_apart():
    t = numbers()
    fold = scene_folds(t, 3)
    perfect, mean = measure(t, t.oa.to_numpy(), fold), measure(t, cross_predict(dict(m=MeanBaseline(('method',))), t, fold).m.to_numpy(), fold)
    assert perfect['mae'] == perfect['regret'] == 0 and perfect['top1'] == perfect['srocc_image'] == 1 and perfect['gap_closed'] == pytest.approx(1)
    assert mean['regret'] >= 0 and mean['mae'] > 0 and set(VIEWS) <= set(perfect)
    assert abs(mean['gap_closed']) < 0.5                    # the method's mean chooses nearly what the single best is


def test_datasets_with_different_methods_can_be_measured():
    t = numbers()
    t.loc[t.dataset == 'd1', 'method'] += 'x'
    assert np.isnan(measure(t, t.oa.to_numpy(), scene_folds(t, 2))['top1'])


# ---------------------------------------------------------------- boards

def board(**rows): return pd.DataFrame({OURS if k == 'ours' else k: dict(zip(('srocc_dataset', 'srocc_image', 'mae', 'gap_closed'), v)) for k, v in rows.items()}).T


def test_verdict_states_the_order():
    said = verdict(board(ours=(0.9, 0.5, 0.02, 0.3), a=(0.8, 0.6, 0.03, 0.3001), b=(0.85, 0.1, 0.01, 0.1)))
    assert 'within-dataset SROCC 0.900, ahead of b (0.850)' in said and 'within-image SROCC 0.500, behind a (0.600)' in said
    assert 'MAE 0.020, behind b (0.010)' in said and 'gap closed 0.300, level with a (0.300)' in said
    said = verdict(board(ours=(0.1, -0.5, 0.01, -0.3), a=(0.2, -0.6, 0.02, -0.2)))
    assert 'behind a (0.200)' in said and '-0.500, ahead of a (-0.600)' in said and 'MAE 0.010, ahead of a' in said and '-0.300, behind a (-0.200)' in said


def test_verdict_skips_a_rival_without_a_value():
    assert 'ahead of a (0.100)' in verdict(board(ours=(0.9, 0.5, 0.02, 0.3), a=(0.1, 0.1, 0.1, 0.1), b=(np.nan, np.nan, np.nan, np.nan)))


def test_verdict_leaves_out_what_could_not_be_measured():
    said = verdict(board(ours=(0.9, np.nan, 0.02, np.nan), a=(0.8, np.nan, 0.03, np.nan)))
    assert 'ahead of a (0.800)' in said and 'nan' not in said


def test_compare_measures_all_predictors_alike():
    t = numbers(2, 4, 2, 3)
    table, predicted = compare(t, k=2, epochs=3, members=1, extra=dict(spy=Spy()))
    assert table.index[0] == OURS and 'spy' in table.index and set(table.index) == set(predicted) and predicted.index.equals(t.index)
    assert set(VIEWS) <= set(table) and (table.n_rows == len(t)).all()
    again, _ = compare(t, k=2, epochs=3, members=1, extra=dict(spy=Spy()))
    pd.testing.assert_frame_equal(table, again)


def test_results_carry_their_provenance(tmp_path):
    path = save_results(board(ours=(0.123456789, 0.5, 0.02, 0.3), a=(0.8, 0.6, 0.03, 0.1)).rename_axis('predictor'), tmp_path/'r.csv', '5 folds', 'numbers', 7, 'rssqa bench')
    back = read_results(path).reset_index()
    assert list(back) == ['predictor', 'srocc_dataset', 'srocc_image', 'mae', 'gap_closed', 'protocol', 'data', 'seed', 'rssqa', 'commit', 'command']
    assert back.srocc_dataset[0] == 0.12346 and back.seed.eq(7).all() and back.protocol[1] == '5 folds' and [p.name for p in tmp_path.iterdir()] == ['r.csv']
    assert back.commit.fillna('').iloc[0] == commit() and (not commit() or len(commit().rstrip('+')) == 12)
