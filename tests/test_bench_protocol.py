"""The protocol: scenes apart, every predictor on the same rows, and a summary that can be read off."""
import os, signal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from joblib import parallel_config
from sklearn.base import BaseEstimator

from rssqa.bench.protocol import (
    DIRECTION, RS_SQA, VIEWS, BootstrapTable, bootstrap, by_group, compare, comparison_summary, cross_predict,
    leaderboard, load_predictions, measure, predictors, run, save_predictions, transfer,
    _choices, _estimator_identity, _single_bests,
)
from rssqa.core import DataNotFound, Incompatible, LeakError, SchemaError, UnknownName
from rssqa.data.splits import holdout_folds, scene_folds
from rssqa.provenance import read_results, save_results
from rssqa.quality.baselines import ColumnBaseline, MeanBaseline
from rssqa.segment.metrics import evaluate, gains, views
from trained import numbers

UNIT_ORDER = ['dataset', 'unit', 'image_id', 'method']


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 9), st.integers(1, 3), st.integers(1, 3), st.integers(2, 6),
    st.integers(0, 99))
def test_a_scene_is_never_in_two_folds(datasets, scenes, images, methods, k, seed):
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
    assert t.groupby('scene')[['dataset']].nunique().eq(3).all(axis=None)
    assert t.assign(fold=fold).groupby('scene').fold.nunique().max() > 1 and np.bincount(fold).min() == 27


def uneven(scenes=9, seed=0): # one dataset, scenes of 1, 2, 3 ... images
    t = numbers(1, scenes, scenes, 2, seed)
    return t[t.image_id.str.split('-').str[2].astype(int) <= t.scene.str[1:].astype(int)]


def test_another_seed_gives_other_folds():
    t = uneven()
    folds = [scene_folds(t, 3, seed) for seed in range(8)]
    # other partitions, not only other numbers
    assert len({tuple(pd.factorize(fold)[0]) for fold in folds}) >= 6
    for fold in folds:
        sizes = t.groupby(fold).image_id.nunique()                  # of 45 images
        assert sizes.max() <= 2 * 45 / 3 and sizes.min() >= 45 / 3 / 2
    assert np.array_equal(folds[3], scene_folds(t, 3, 3))


def test_folds_depend_neither_on_row_order_nor_on_other_datasets():
    t = numbers(3, 7)
    fold = pd.Series(scene_folds(t, 3, 5), t.index)
    shuffled = t.sample(frac=1, random_state=0)
    assert np.array_equal(scene_folds(shuffled, 3, 5), fold[shuffled.index])
    d1 = t.dataset == 'd1'
    assert np.array_equal(scene_folds(t[d1], 3, 5), fold[d1])


def test_few_scenes_make_few_folds():
    t = numbers(2, 4)
    t = t[(t.dataset == 'd1') | t.scene.isin(['s0', 's1'])]
    fold = scene_folds(t, 5)
    assert set(fold[t.dataset == 'd0']) == {0, 1} and set(fold[t.dataset == 'd1']) == {0, 1, 2, 3}
    with pytest.raises(Incompatible, match='1 folds'): scene_folds(t, 1)


class NoLabels(BaseEstimator):
    "Predicts the training mean; fails on scenes that it was fitted on, and on labels."
    def fit(self, X, y=None):
        self.scenes_ = set(X.dataset + X.scene)
        self.mean_ = X.oa.mean()
        return self
    def predict(self, X):
        assert not {'oa', 'miou', 'mf1', 'n_valid', 'confusion'} & set(X)
        assert not self.scenes_ & set(X.dataset + X.scene) and (X.index == np.arange(len(X))).all()
        return np.full(len(X), self.mean_)


def test_cross_prediction_is_out_of_fold_and_repeatable():
    t = numbers().sample(frac=1, random_state=1)
    fold = scene_folds(t, 3)
    tried = dict(no_labels=NoLabels(), column=ColumnBaseline('conf_t', fitted=False), mean=MeanBaseline())
    predicted = cross_predict(tried, t, fold)
    assert list(predicted) == list(tried) and predicted.index.equals(t.index)
    assert predicted.notna().all(axis=None) and predicted.equals(cross_predict(tried, t, fold))
    assert np.array_equal(predicted.column, t.conf_t)
    for k in range(3): assert np.allclose(predicted.no_labels[fold == k], t.oa[fold != k].mean())


def test_estimators_are_left_unfitted():
    t = numbers()
    estimator = NoLabels()
    cross_predict(dict(a=estimator), t, scene_folds(t, 2))
    assert not hasattr(estimator, 'scenes_')


def cross_predicted_mean(t, fold): # the mean of the method
    return cross_predict(dict(mean=MeanBaseline(('method',))), t, fold)['mean'].to_numpy()


def test_perfect_and_useless_predictions_differ():
    t = numbers()
    fold = scene_folds(t, 3)
    perfect = measure(t, t.oa.to_numpy(), fold)
    mean = measure(t, cross_predicted_mean(t, fold), fold)
    assert perfect['mae'] == perfect['regret'] == 0 and perfect['top1'] == perfect['srocc_image'] == 1
    assert perfect['gap_closed'] == pytest.approx(1)
    assert mean['regret'] >= 0 and mean['mae'] > 0 and set(VIEWS) <= set(perfect)
    # the method's mean chooses nearly what the single best is
    assert abs(mean['gap_closed']) < 0.5


def test_datasets_with_different_methods_can_be_measured():
    t = numbers()
    t.loc[t.dataset == 'd1', 'method'] += 'x'
    assert np.isnan(measure(t, t.oa.to_numpy(), scene_folds(t, 2))['top1'])


def test_rows_without_a_number_are_not_measured():
    t = numbers()
    fold = scene_folds(t, 3)
    assert measure(t, t.oa.where(t.image_id != 'i0-0-0').to_numpy(), fold)['n_images'] == 35
    with pytest.raises(SchemaError, match='Predict first'): measure(t, np.full(len(t), np.nan), fold)


# ---------------------------------------------------------------- leaving out more

class KnownParts(BaseEstimator):
    "Predicts 1 if the method and 2 if the scene was in training, and 10 for each visible method of the image."
    def fit(self, X, y=None):
        self.methods_ = set(X.method)
        self.scenes_ = set(X.dataset + X.scene)
        return self
    def predict(self, X):
        method = X.method.isin(self.methods_) * 1.0
        scene = (X.dataset + X.scene).isin(self.scenes_) * 2
        return method + scene + X.groupby('image_id').method.transform('size') * 10


def test_a_method_left_out_is_unknown_on_unknown_scenes_but_the_other_methods_are_visible():
    t = numbers(2, 4)
    by_scene = scene_folds(t, 2)
    by_method = holdout_folds(t, 'method', k=2)
    assert by_method.shape == (len(t), 2) and np.array_equal(by_method[:, 0], by_scene)
    assert len(np.unique(by_method, axis=0)) == 6
    # three methods are visible; left out, the method is not known from training
    tried = dict(a=KnownParts())
    assert (cross_predict(tried, t, by_method).a == 30).all()
    assert (cross_predict(tried, t, by_scene).a == 31).all()


def test_a_dataset_left_out():
    t = numbers(3, 4)
    fold = holdout_folds(t)
    predicted = cross_predict(dict(mean=MeanBaseline(()), no_labels=NoLabels()), t, fold)
    for d in ('d0', 'd1', 'd2'):
        assert np.allclose(predicted['mean'][t.dataset == d], t.oa[t.dataset != d].mean())
    row = measure(t, t.oa.to_numpy(), fold)
    # the single best method is that of the other datasets
    assert row['gap_closed'] == 1 and row['regret_single'] > 0
    with pytest.raises(Incompatible, match='leave out'): holdout_folds(t[t.dataset == 'd0'])
    with pytest.raises(UnknownName, match='method'): holdout_folds(t, 'metod')


@pytest.fixture(scope='module')
def two_tables(): # training rows where m0 is best, test rows of another dataset where m2 is best
    train = numbers(1, 5)
    test = numbers(1, 4, seed=3).assign(dataset='new', image_id=lambda t: 'n' + t.image_id)
    gain = test.method.map(dict(m0=0, m1=0.06, m2=0.2))
    return train, test.assign(oa=(test.oa + gain).clip(upper=1))


def chosen_by_hand(test, predicted): # highest prediction of each image; there are no equal ones
    highest = test.assign(predicted=predicted).groupby('image_id').predicted.idxmax()
    return test.loc[highest].set_index('image_id')


def test_transfer_equals_fitting_and_measuring_by_hand(two_tables):
    train, test = two_tables
    tried = dict(conf=ColumnBaseline('conf_t'), mean=MeanBaseline(('method',)))
    board, predictions = transfer(tried, train, test)
    best = test.groupby('image_id').oa.max()
    single = test[test.method == train.groupby('method').oa.mean().idxmax()].set_index('image_id').oa
    for name, estimator in tried.items():
        predicted = estimator.fit(train).predict(test)
        row = board.loc[name]
        assert np.allclose(predictions[name], predicted)
        assert row.mae == pytest.approx(np.abs(predicted - test.oa).mean())
        assert row.rmse == pytest.approx(np.sqrt(((predicted - test.oa)**2).mean()))
        assert row.srocc == pytest.approx(pd.Series(predicted, test.index).corr(test.oa, 'spearman'))
        chosen = chosen_by_hand(test, predicted).oa
        assert row.top1 == pytest.approx((chosen == best).mean())
        assert row.regret == pytest.approx((best - chosen).mean())
        assert row.regret_single == pytest.approx((best - single).mean())
        assert row.gap_closed == pytest.approx(1 - (best - chosen).mean() / (best - single).mean())
        assert row.to_dict() == pytest.approx(evaluate(test.assign(predicted=predicted), train), nan_ok=True)
    # the best method of the test rows would have given another regret
    assert test.groupby('method').oa.mean().idxmax() != train.groupby('method').oa.mean().idxmax()
    measured = bootstrap(test, predictions, 'conf', n=20, train=train).value.unstack()
    for m in DIRECTION: assert np.allclose(measured[m][board.index], board[m], equal_nan=True), m


def test_tables_that_share_scenes_are_refused(two_tables):
    train, test = two_tables
    with pytest.raises(LeakError, match='4 scenes'):
        transfer(dict(mean=MeanBaseline()), train, test.assign(dataset='d0'))


# ---------------------------------------------------------------- files of single fits

class Logged(ColumnBaseline):
    "Writes a line for each fit, and kills the process at one of them if KILL is set."
    def __init__(self, column='conf_t', fitted=True, log='', killed_at=0):
        super().__init__(column, fitted)
        self.log = log
        self.killed_at = killed_at
    def fit(self, X, y=None):
        with open(self.log, 'a') as f: f.write('fit\n')
        if os.environ.get('KILL') and sum(1 for _ in open(self.log)) == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(X)


@pytest.fixture
def make(tmp_path): # seed -> predictors; the first is logged in tmp_path/log
    logged = Logged(log=str(tmp_path/'log'), killed_at=7)
    return lambda seed: {RS_SQA: logged, 'mean': MeanBaseline(('method',)), 'by: a/b': ColumnBaseline('conf')}


def test_a_run_that_was_killed_goes_on_and_ends_the_same(make, tmp_path, monkeypatch):
    t = numbers()
    log = tmp_path/'log'
    whole = run(t, make, 4, (0, 3), tmp_path/'whole')
    log.unlink()
    monkeypatch.setenv('KILL', '1')
    if not (pid := os.fork()):
        run(t, make, 4, (0, 3), tmp_path/'fits')
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    monkeypatch.delenv('KILL')
    # every fit before the kill is on disk
    assert 6 <= len(list((tmp_path/'fits').glob('[!.]*.parquet'))) < 24
    pd.testing.assert_frame_equal(run(t, make, 4, (0, 3), tmp_path/'fits'), whole)
    # of eight fits one was begun twice
    assert len(log.read_text().split()) == 8 + 1
    pd.testing.assert_frame_equal(run(t, make, 4, (0, 3)), whole)           # and without a folder


def test_predictions_of_a_run_are_those_of_its_folds(make, tmp_path):
    t = numbers().sample(frac=1, random_state=2)
    predictions = run(t, make, 3, (1, 2), tmp_path/'fits')
    assert list(predictions) == ['image_id', 'method', 'seed', 'fold', RS_SQA, 'mean', 'by: a/b']
    assert len(predictions) == 2 * len(t) and predictions.notna().all(axis=None)
    for seed, part in predictions.groupby('seed'):
        fold = scene_folds(t, 3, seed)
        assert np.array_equal(part.fold, fold) and np.array_equal(part.image_id, t.image_id)
        assert np.allclose(part['mean'], cross_predicted_mean(t, fold))


def test_a_fit_is_identified_by_all_that_determines_it(tmp_path):
    t = numbers()
    log = tmp_path/'log'
    def n_fits(table=t, folder='a', k=2, **params):
        log.write_text('')
        run(table, lambda seed: dict(a=Logged(log=str(log), **params)), k, (0,), tmp_path/folder)
        return len(log.read_text().split())
    assert n_fits() == 2 and n_fits() == 0
    assert n_fits(k=3) == 3 and n_fits(column='conf') == 2 and n_fits(folder='b') == 2
    assert n_fits(t.assign(conf_t=t.conf_t + 1e-9)) == 2 and n_fits(t.rename(columns=dict(energy='e'))) == 2
    assert n_fits() == 0
    # no predictor gets the confusion matrices
    assert n_fits(t.assign(confusion=[[1, 2]] * len(t))) == 0
    file = next((tmp_path/'b').glob('*.parquet'))
    file.write_bytes(file.read_bytes()[:100])
    # a damaged file is computed again
    assert n_fits(folder='b') == 1 and n_fits(folder='b') == 0


def test_where_the_store_lies_does_not_identify_a_fit():
    t = numbers()
    def identity(store): return _estimator_identity(predictors(t, store=store)[RS_SQA])
    assert identity('here') == identity('there') != identity('')
    raw = ColumnBaseline('conf', fitted=False)
    assert _estimator_identity(ColumnBaseline('conf')) != _estimator_identity(raw)


def test_workers_and_methods_left_out(tmp_path):
    t = numbers(1, 4)
    def make(seed): return dict(a=KnownParts(), m=MeanBaseline(('method',)))
    with parallel_config('threading'):                 # processes would spend their time importing
        predictions = run(t, make, 2, (0, 1), tmp_path, by='method', workers=2)
    assert (predictions.a == 30).all() and set(predictions.fold) == {0, 1}
    assert len(list(tmp_path.glob('a.seed1*'))) == 6
    board = leaderboard(t, predictions)
    assert len(board) == 2 and board.top1.notna().all()


def test_predictions_are_kept_and_checked(tmp_path):
    t = numbers()
    predictions = run(t, lambda seed: dict(m=MeanBaseline()), 2, (0,))
    path = save_predictions(predictions, tmp_path/'p.parquet')
    assert load_predictions(path).equals(predictions) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataNotFound, match='no predictions'): load_predictions(tmp_path/'q.parquet')
    other = tmp_path/'r.parquet'
    twice = pd.concat([predictions, predictions[:1]])
    with pytest.raises(SchemaError, match='second row'): save_predictions(twice, other)
    for column in ('fold', 'm'):
        with pytest.raises(SchemaError, match='columns'):
            save_predictions(predictions.drop(columns=column), other)
    fewer = predictions[~predictions.image_id.isin(['i0-0-0', 'i1-1-1', 'i1-1-2'])]
    with pytest.raises(SchemaError, match='seed 0 for 9 of 108'): leaderboard(t, fewer)
    gap = predictions.assign(m=predictions.m.where(predictions.index != 5))
    with pytest.raises(SchemaError, match='for 1 of 108'): bootstrap(t, gap, 'm')


# ---------------------------------------------------------------- views and intervals

def noisy_predictions(t, seeds=(0,), seed=0, k=3, **noise): # name -> standard deviation of the error
    rng = np.random.default_rng(seed)
    parts = []
    for s in seeds:
        rows = t[['image_id', 'method']].assign(seed=s, fold=scene_folds(t, k, s))
        parts.append(rows.assign(**{name: t.oa + rng.normal(0, sd, len(t)) for name, sd in noise.items()}))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope='module')
def measured(): # table with ties, predictions with ties, three seeds
    t = numbers(3, 5, 2, 4)
    t = t[(t.dataset != 'd2') | t.scene.isin(['s0', 's1'])].assign(oa=lambda t: t.oa.round(2))
    predictions = noisy_predictions(t, (0, 1, 2), good=.02, bad=.1)
    image_mean = t.groupby('image_id').oa.transform('mean').to_numpy()
    same_row = np.arange(len(predictions)) % len(t)
    rounded = predictions.good.round(1)
    return t, predictions.assign(rounded=rounded, constant=0.8, image_only=image_mean[same_row])


def shuffled(frame, seed): return frame.sample(frac=1, random_state=seed)


def test_leaderboard_averages_seeds(measured):
    t, predictions = measured
    board = leaderboard(shuffled(t, 0), shuffled(predictions, 1))
    assert list(board.index) == ['good', 'bad', 'rounded', 'constant', 'image_only']
    assert np.allclose(board.failure_below, 0.7)
    for name in ('good', 'rounded'):
        seeds = [measure(t, p[name].to_numpy(), p.fold.to_numpy()) for _, p in predictions.groupby('seed')]
        by_hand = pd.DataFrame(seeds).mean()
        assert board.loc[name].to_dict() == pytest.approx(by_hand[list(board)].to_dict(), abs=1e-6)


def test_each_group_is_measured_without_the_others(measured):
    t, predictions = measured
    predictions = predictions[predictions.seed < 2]
    by_dataset = by_group(t, predictions)
    assert list(by_dataset.index.names) == ['dataset', 'predictor'] and len(by_dataset) == 15
    assert by_dataset.images.groupby('dataset').first().sum() == t.image_id.nunique()
    by_method = by_group(t, predictions, 'method')
    assert len(by_method) == 20 and 'top1' not in by_method
    error = np.abs(predictions.good - np.tile(t.oa, 2))
    m2 = np.tile(t.method == 'm2', 2)
    assert by_method.loc['m2', 'good'].mae == pytest.approx(error[m2].mean())
    one_seed = predictions[predictions.seed == 1].reset_index(drop=True)
    d1 = (t.dataset == 'd1').to_numpy()
    expected = measure(t[d1], one_seed.bad[d1].to_numpy(), one_seed.fold[d1].to_numpy())
    assert by_group(t, one_seed).loc['d1', 'bad'].to_dict() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    only_bad = one_seed[['image_id', 'method', 'seed', 'fold', 'bad']]
    assert len(by_group(t, only_bad, ['dataset', 'method'])) == 12


def test_all_scenes_once_is_the_measure_itself(measured):
    t, predictions = measured
    value = bootstrap(t, predictions, 'good', n=10).value.unstack()
    board = leaderboard(t, predictions)
    assert set(value) == set(DIRECTION) <= set(board)
    for m in DIRECTION:
        tolerance = 1e-5 if 'fitted' in m else 1e-9
        assert np.allclose(value[m][board.index], board[m], atol=tolerance, equal_nan=True), m


def test_the_threshold_of_failures_can_be_set(measured):
    t, predictions = measured
    predictions = predictions[predictions.seed == 0]
    result = bootstrap(t, predictions, 'good', ['bad'], n=2, threshold=.5)
    board = leaderboard(t, predictions, threshold=0.5)
    assert result.failure_below.eq(0.5).all()
    assert result.value['bad', 'failure_auroc'] == pytest.approx(board.failure_auroc['bad'])


def repeated_rows(table, resampled, draw): # the rows of one draw, each copy of an image renamed
    copies = []
    for u, n in enumerate(resampled.weights[draw]):
        rows = table.iloc[np.flatnonzero(resampled.unit == u)]
        copies += [rows.assign(image_id=rows.image_id + f'#{c}') for c in range(int(n))]
    return pd.concat(copies, ignore_index=True)


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_a_draw_equals_measuring_its_scenes_again(measured):
    t, predictions = measured
    t = t.sort_values(['dataset', 'scene', 'image_id', 'method']).reset_index(drop=True)
    predictions = t[['image_id', 'method']].merge(predictions[predictions.seed == 0])
    fold = predictions.fold.to_numpy()
    resampled = BootstrapTable(t.assign(unit=t.scene), 6, 3, .7)
    compared = 0
    for name in ('good', 'rounded', 'bad'):
        rows = t.assign(predicted=predictions[name])
        chosen = _choices(rows, fold, _single_bests(rows, fold))
        draws = np.array(resampled.measure([(predictions[name].to_numpy(), chosen)], chunk=4))[0]
        for draw in range(7):
            again = repeated_rows(rows, resampled, draw)
            images = again.drop_duplicates('image_id').image_id.str.split('#').str[0]
            expected = views(again) | gains(chosen.loc[images])
            for m, value in zip(DIRECTION, draws[:, draw]):
                if 'fitted' in m: continue
                compared += 1
                assert value == pytest.approx(expected[m], abs=1e-9, nan_ok=True), (name, draw, m)
    assert compared == 3 * 7 * (len(DIRECTION) - 2)


@pytest.mark.parametrize('unit, sizes', [('scene', [5, 3]), ('image', [15, 9])])
def test_draws_keep_the_size_of_each_dataset(unit, sizes):
    t = numbers(2, 5).query("dataset == 'd0' or scene in ['s0', 's1', 's2']")
    t = t.assign(unit=t.scene if unit == 'scene' else t.image_id)
    resampled = BootstrapTable(t.sort_values(UNIT_ORDER), 200, 0, 0.7)
    assert (resampled.weights[0] == 1).all() and np.bincount(resampled.dataset_of_unit).tolist() == sizes
    for d, n in enumerate(sizes):
        weights = resampled.weights[:, resampled.dataset_of_unit == d]
        assert (weights.sum(1) == n).all() and abs(weights[1:].mean(0) - 1).max() < 0.35
    result = bootstrap(t, noisy_predictions(t, a=.1, b=.2), 'a', n=9, unit=unit)
    assert (result.units == sum(sizes)).all() and (result.fewest == sizes[1]).all()
    assert (result.unit == unit).all() and (result.draws == 9).all()


def test_intervals_are_repeatable(measured):
    t, predictions = measured
    result = bootstrap(t, predictions, 'good', ['bad', 'constant'], n=60)
    assert list(result.index.levels[0]) == ['bad', 'constant', 'good'] and len(result) == 3 * len(DIRECTION)
    again = bootstrap(shuffled(t, 0), shuffled(predictions, 5), 'good', ['bad', 'constant'], n=60)
    pd.testing.assert_frame_equal(result, again)
    assert not result.equals(bootstrap(t, predictions, 'good', ['bad', 'constant'], n=60, seed=1))
    with_low = result[result.low.notna()]
    assert (with_low.low <= with_low.high).all()


def test_differences_are_paired_and_signed(measured):
    t, predictions = measured
    result = bootstrap(t, predictions, 'good', ['bad', 'constant'], n=60)
    assert result.loc['good', ['delta', 'delta_low', 'better']].isna().all(axis=None)
    bad = result.loc['bad']
    assert bad.better[['mae', 'srocc_dataset', 'rmse', 'plcc', 'krocc']].eq(1).all()
    assert bad.delta_high['mae'] < 0 < bad.delta_low['srocc_dataset']
    assert bad.delta['mae'] == pytest.approx(result.value['good', 'mae'] - result.value['bad', 'mae'])
    turned = bootstrap(t, predictions, 'bad', ['good'], n=60).loc['good']
    assert np.allclose(turned.delta, -bad.delta) and np.allclose(turned.delta_low, -bad.delta_high)
    assert np.allclose(turned.better, 1 - bad.better)
    twin = bootstrap(t, predictions.assign(twin=predictions.good), 'good', ['twin'], n=20).loc['twin']
    assert (twin.delta == 0).all() and (twin.better == .5).all()


def test_several_models_are_compared_one_by_one(measured):
    t, predictions = measured
    both = bootstrap(t, predictions, ['good', 'bad'], ['constant'], n=9)
    for name in ('good', 'bad'):
        one = bootstrap(t, predictions, name, [n for n in ('good', 'bad') if n != name] + ['constant'], n=9)
        part = both[both.model == name].drop(columns='model').sort_index()
        pd.testing.assert_frame_equal(part, one.sort_index())


def test_unknown_names_are_refused(measured):
    t, predictions = measured
    with pytest.raises(UnknownName, match='bda'): bootstrap(t, predictions, 'good', ['bda'])
    with pytest.raises(UnknownName, match=RS_SQA): bootstrap(t, predictions)
    with pytest.raises(UnknownName, match='tile'): bootstrap(t, predictions, 'good', unit='tile')
    with pytest.raises(UnknownName, match='mea'): bootstrap(t, predictions, 'good', measures=('mea',))


def test_a_predictor_that_knows_only_the_image_is_exposed_by_the_view_within_images(measured):
    t, predictions = measured
    result = bootstrap(t, predictions, 'good', n=60)
    image_only, constant, good = (result.loc[name] for name in ('image_only', 'constant', 'good'))
    # pooled views believe it
    assert image_only.value['srocc'] > 0.8 and image_only.value['plcc_dataset'] > 0.75
    assert np.isnan(image_only.value['srocc_image']) and good.value['srocc_image'] > 0.8
    assert image_only.value['top1'] == pytest.approx(constant.value['top1'])
    assert image_only.high['gap_closed'] < good.low['gap_closed'] and image_only.better['top1'] == 1
    assert constant.value[['srocc', 'srocc_dataset', 'plcc', 'krocc']].isna().all()
    assert constant.value['failure_auroc'] == pytest.approx(0.5)


def test_intervals_cover_a_known_difference():
    "The expected difference in MAE of errors with scene effects is known: 95 % intervals cover it in 95 % of cases."
    t = numbers(1, 30, 2, 2)
    resampled = BootstrapTable(t.assign(unit=t.scene).sort_values(UNIT_ORDER), 300, 0, 0.7)
    covered = 0
    for case in range(200):
        # some scenes are hard for both
        hard = np.random.default_rng(case).exponential(1, 30)[resampled.unit]
        a = resampled.mean(0.02 * hard, resampled.unit)
        b = resampled.mean(0.03 * hard + 0.01, resampled.unit)
        low, high = np.percentile((a - b)[1:], (2.5, 97.5))
        covered += low <= -.02 <= high
    assert 175 <= covered <= 199, covered


def test_pairing_removes_what_is_hard_for_both():
    t = numbers(1, 30, 2, 2)
    hard = np.random.default_rng(0).exponential(1, 30)[t.scene.str[1:].astype(int)]
    rows = t[['image_id', 'method']].assign(seed=0, fold=scene_folds(t, 3))
    predictions = rows.assign(a=t.oa + 0.02 * hard, b=t.oa + 0.03 * hard + 0.01)
    row = bootstrap(t, predictions, 'a', n=300).loc['b'].loc['mae']
    assert row.delta_low <= -0.02 <= row.delta_high
    assert row.delta_high - row.delta_low < (row.high - row.low) / 2


def test_tiles_of_a_scene_are_not_independent():
    t = numbers(1, 12, 6, 3)
    bias = np.random.default_rng(0).uniform(0, 0.2, 12)[t.scene.str[1:].astype(int)]
    predictions = t[['image_id', 'method']].assign(seed=0, fold=scene_folds(t, 3), a=t.oa + bias, b=t.oa)
    def width(unit):
        row = bootstrap(t, predictions, 'b', n=200, unit=unit).loc['a'].loc['mae']
        return row.high - row.low
    assert width('scene') > 1.5 * width('image')


# ---------------------------------------------------------------- boards

def board(**rows): # name -> within-dataset SROCC, within-image SROCC, MAE, gap closed
    columns = ['srocc_dataset', 'srocc_image', 'mae', 'gap_closed']
    return pd.DataFrame(rows.values(), [RS_SQA if name == 'model' else name for name in rows], columns)


def test_the_summary_states_the_order():
    summary = comparison_summary(
        board(model=(0.9, 0.5, 0.02, 0.3), a=(0.8, 0.6, 0.03, 0.3001), b=(0.85, 0.1, 0.01, 0.1)))
    assert 'within-dataset SROCC 0.900, ahead of b (0.850)' in summary
    assert 'within-image SROCC 0.500, behind a (0.600)' in summary
    assert 'MAE 0.020, behind b (0.010)' in summary and 'gap closed 0.300, level with a (0.300)' in summary
    summary = comparison_summary(board(model=(0.1, -0.5, 0.01, -0.3), a=(0.2, -0.6, 0.02, -0.2)))
    assert 'behind a (0.200)' in summary and '-0.500, ahead of a (-0.600)' in summary
    assert 'MAE 0.010, ahead of a' in summary and '-0.300, behind a (-0.200)' in summary


def test_the_summary_skips_a_baseline_without_a_value():
    nothing = (np.nan, np.nan, np.nan, np.nan)
    table = board(model=(0.9, 0.5, 0.02, 0.3), a=(0.1, 0.1, 0.1, 0.1), b=nothing)
    assert 'ahead of a (0.100)' in comparison_summary(table)


def test_the_summary_leaves_out_what_could_not_be_measured():
    summary = comparison_summary(board(model=(0.9, np.nan, 0.02, np.nan), a=(0.8, np.nan, 0.03, np.nan)))
    assert 'ahead of a (0.800)' in summary and 'nan' not in summary


def test_any_row_can_be_summarised():
    summary = comparison_summary(board(model=(0.9, 0.5, 0.02, 0.3), a=(0.8, 0.6, 0.03, 0.1)), 'a')
    assert summary.startswith('a: within-dataset SROCC 0.800, behind RS-SQA (0.900); ')
    assert 'within-image SROCC 0.600, ahead of RS-SQA' in summary


def test_compare_measures_all_predictors_alike():
    t = numbers(2, 4, 2, 3)
    table, predicted = compare(t, k=2, epochs=3, members=1, extra=dict(extra=NoLabels()))
    assert table.index[0] == RS_SQA and 'extra' in table.index
    assert set(table.index) == set(predicted) and predicted.index.equals(t.index)
    assert set(VIEWS) <= set(table) and (table.n_rows == len(t)).all()
    again = cross_predict({RS_SQA: predictors(t, epochs=3, members=1)[RS_SQA]}, t, scene_folds(t, 2))
    assert np.array_equal(again[RS_SQA], predicted[RS_SQA])


def test_results_are_saved_with_their_provenance(tmp_path):
    table = board(model=(0.123456789, 0.5, 0.02, 0.3), a=(0.8, 0.6, 0.03, 0.1)).rename_axis('predictor')
    path = save_results(table, tmp_path/'r.csv', '5 folds', 'numbers', 7, 'rssqa bench')
    saved = read_results(path).reset_index()
    provenance = ['protocol', 'data', 'seed', 'rssqa', 'commit', 'command']
    assert list(saved) == ['predictor', 'srocc_dataset', 'srocc_image', 'mae', 'gap_closed', *provenance]
    assert saved.srocc_dataset[0] == 0.12346 and saved.seed.eq(7).all() and saved.protocol[1] == '5 folds'
    assert list(tmp_path.iterdir()) == [path]


def test_results_of_several_seeds_and_groups(measured, tmp_path):
    t, predictions = measured
    def saved(table, protocol, seed, **columns):
        return read_results(save_results(table, tmp_path/'r.csv', protocol, 'numbers', seed, 'x', **columns))
    rows = saved(bootstrap(t, predictions, 'good', n=5), '3 folds', (0, 1, 2), experiment='e1')
    first = ['measure', 'value', 'low', 'high', 'delta', 'delta_low', 'delta_high', 'better', 'unit']
    assert list(rows)[:9] == first and rows.seed.eq('0 1 2').all() and rows.experiment.eq('e1').all()
    rows = saved(by_group(t, predictions), '3 folds', 0)
    assert list(rows)[0] == 'dataset' and len(rows.loc['good']) == 3 and rows.protocol.eq('3 folds').all()
    # a column of the table stays
    assert saved(leaderboard(t, predictions).assign(seed=9), 'p', 0).seed.eq(9).all()
