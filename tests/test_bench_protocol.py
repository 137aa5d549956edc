"""The protocol: scenes apart, every predictor on the same rows, and a comparison_summary that can be read off."""
import os, signal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from joblib import parallel_config
from sklearn.base import BaseEstimator

from rssqa.bench import protocol as bench
from rssqa.quality.baselines import ColumnBaseline, MeanBaseline
from rssqa.bench.protocol import (
    DIRECTION,
    RS_SQA,
    VIEWS,
    bootstrap,
    by_group,
    commit,
    compare,
    predictors,
    cross_predict,
    holdout_folds,
    leaderboard,
    load_predictions,
    measure,
    read_results,
    run,
    save_predictions,
    save_results,
    scene_folds,
    transfer,
    comparison_summary,
)
from rssqa.core import DataNotFound, Incompatible, LeakError, SchemaError, UnknownName
from rssqa.segment.metrics import evaluate, gains, single_best, views
from trained import numbers


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


def uneven(scenes=9, seed=0): # one dataset, scenes of 1, 2, 3 ... images
    t = numbers(1, scenes, scenes, 2, seed)
    return t[t.image_id.str.split('-').str[2].astype(int) <= t.scene.str[1:].astype(int)]


def test_another_seed_is_another_deal():
    t = uneven()
    deals = [scene_folds(t, 3, s) for s in range(8)]
    # other partitions, not only other names
    assert len({tuple(pd.factorize(d)[0]) for d in deals}) >= 6
    sizes = np.array([np.unique(t.image_id[d == k]).size for d in deals for k in range(3)])
    assert sizes.max() <= 2 * 45 / 3 and sizes.min() >= 45 / 3 / 2                     # of 45 images
    assert np.array_equal(deals[3], scene_folds(t, 3, 3))


def test_the_deal_depends_neither_on_row_order_nor_on_other_datasets():
    t = numbers(3, 7)
    fold = pd.Series(scene_folds(t, 3, 5), t.index)
    mixed = t.sample(frac=1, random_state=0)
    assert np.array_equal(scene_folds(mixed, 3, 5), fold[mixed.index]) and np.array_equal(
        scene_folds(t[t.dataset == 'd1'], 3, 5), fold[t.dataset == 'd1']
    )


def test_few_scenes_make_few_folds():
    t = numbers(2, 4)
    t = t[(t.dataset == 'd1') | t.scene.isin(['s0', 's1'])]
    fold = scene_folds(t, 5)
    assert set(fold[t.dataset == 'd0']) == {0, 1} and set(fold[t.dataset == 'd1']) == {0, 1, 2, 3}
    with pytest.raises(Incompatible, match='1 folds'): scene_folds(t, 1)


class Spy(BaseEstimator):
    "Remembers what it learned from, and refuses to judge it or to see labels."
    def fit(self, X, y=None):
        self.seen_ = set(X.dataset + X.scene)
        self.mean_ = X.oa.mean()
        return self
    def predict(self, X):
        assert not {'oa', 'miou', 'mf1', 'n_valid', 'confusion'} & set(X)
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
    perfect = measure(t, t.oa.to_numpy(), fold)
    mean = measure(t, cross_predict(dict(m=MeanBaseline(('method',))), t, fold).m.to_numpy(), fold)
    assert (
        perfect['mae'] == perfect['regret'] == 0
        and perfect['top1'] == perfect['srocc_image'] == 1
        and perfect['gap_closed'] == pytest.approx(1)
    )
    assert mean['regret'] >= 0 and mean['mae'] > 0 and set(VIEWS) <= set(perfect)
    # the method's mean chooses nearly what the single best is
    assert abs(mean['gap_closed']) < 0.5


def test_datasets_with_different_methods_can_be_measured():
    t = numbers()
    t.loc[t.dataset == 'd1', 'method'] += 'x'
    assert np.isnan(measure(t, t.oa.to_numpy(), scene_folds(t, 2))['top1'])


def test_rows_without_a_number_are_not_measured():
    t = numbers()
    told = t.oa.where(t.image_id != 'i0-0-0').to_numpy()
    assert measure(t, told, scene_folds(t, 3))['n_images'] == 35
    with pytest.raises(SchemaError, match='Predict first'):
        measure(t, np.full(len(t), np.nan), scene_folds(t, 3))


# ---------------------------------------------------------------- leaving out more

class Witness(BaseEstimator):
    "Predicts what it was told: rows on show, and how many of their methods and datasets it learned from."
    def fit(self, X, y=None):
        self.methods_ = set(X.method)
        self.places_ = set(X.dataset + X.scene)
        return self
    def predict(self, X):
        return (
            X.method.isin(self.methods_) * 1.0
            + (X.dataset + X.scene).isin(self.places_) * 2
            + X.groupby('image_id').method.transform('size') * 10
        )


def test_a_method_left_out_is_unknown_on_unknown_scenes_but_its_peers_are_on_show():
    t = numbers(2, 4)
    fold = holdout_folds(t, 'method', k=2)
    assert (
        fold.shape == (len(t), 2)
        and np.array_equal(fold[:, 0], scene_folds(t, 2))
        and len(np.unique(fold, axis=0)) == 6
    )
    # three methods on show, none of them known from a known scene
    assert (cross_predict(dict(w=Witness()), t, fold).w == 30).all()
    assert (cross_predict(dict(w=Witness()), t, scene_folds(t, 2)).w == 31).all()


def test_a_dataset_left_out():
    t = numbers(3, 4)
    fold = holdout_folds(t)
    told = cross_predict(dict(m=MeanBaseline(()), spy=Spy()), t, fold)
    for d in ('d0', 'd1', 'd2'): assert np.allclose(told.m[t.dataset == d], t.oa[t.dataset != d].mean())
    row = measure(t, t.oa.to_numpy(), fold)
    # the rival is the best of the other datasets
    assert row['gap_closed'] == 1 and row['regret_single'] > 0
    with pytest.raises(Incompatible, match='leave out'): holdout_folds(t[t.dataset == 'd0'])
    with pytest.raises(UnknownName, match='method'): holdout_folds(t, 'metod')


def test_transfer_equals_fitting_by_hand():
    train = numbers(1, 5)
    test = numbers(1, 4, seed=3).assign(dataset='new', image_id=lambda t: 'n' + t.image_id)
    tried = dict(conf=ColumnBaseline('conf_t'), mean=MeanBaseline(('method',)))
    table, told = transfer(tried, train, test)
    for name, e in tried.items():
        assert np.allclose(told[name], by_hand := e.fit(train).predict(test))
        assert table.loc[name].to_dict() == pytest.approx(
            evaluate(test.assign(predicted=by_hand), train), nan_ok=True
        )
    sure = bootstrap(test, told, 'conf', n=20, train=train).value.unstack()
    for m in DIRECTION: assert np.allclose(sure[m][table.index], table[m], equal_nan=True), m
    with pytest.raises(LeakError, match='4 scenes'): transfer(tried, train, test.assign(dataset='d0'))


# ---------------------------------------------------------------- cells

class Logged(ColumnBaseline):
    "Writes a line for each fit, and may be shot at one of them."
    def __init__(self, column='conf_t', fitted=True, log='', shot=0):
        super().__init__(column, fitted)
        self.log, self.shot = log, shot
    def fit(self, X, y=None):
        with open(self.log, 'a') as f: f.write('fit\n')
        if os.environ.get('SHOOT') and sum(1 for _ in open(self.log)) == self.shot:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(X)


def makes(tmp_path):
    return lambda seed: {
        RS_SQA: Logged(log=str(tmp_path / 'log'), shot=7),
        'mean': MeanBaseline(('method',)),
        'by: a/b': ColumnBaseline('conf'),
    }


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    t = numbers()
    whole = run(t, makes(tmp_path), 4, (0, 3), tmp_path/'whole')
    (tmp_path/'log').unlink()
    monkeypatch.setenv('SHOOT', '1')
    if not (pid := os.fork()):
        run(t, makes(tmp_path), 4, (0, 3), tmp_path/'cells')
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    monkeypatch.delenv('SHOOT')
    done = len(list((tmp_path/'cells').glob('[!.]*.parquet')))
    # every fit before the shot is on disk
    assert 6 <= done < 24
    resumed = run(t, makes(tmp_path), 4, (0, 3), tmp_path/'cells')
    pd.testing.assert_frame_equal(resumed, whole)
    # of eight fits one was begun twice
    assert len((tmp_path / 'log').read_text().split()) == 8 + 1
    pd.testing.assert_frame_equal(run(t, makes(tmp_path), 4, (0, 3)), whole)           # and without a folder


def test_predictions_of_a_run_are_those_of_its_folds(tmp_path):
    t = numbers().sample(frac=1, random_state=2)
    told = run(t, makes(tmp_path), 3, (1, 2), tmp_path/'c')
    assert (
        list(told) == ['image_id', 'method', 'seed', 'fold', RS_SQA, 'mean', 'by: a/b']
        and len(told) == 2 * len(t)
        and told.notna().all(axis=None)
    )
    for s, part in told.groupby('seed'):
        assert np.array_equal(part.fold, scene_folds(t, 3, s)) and np.array_equal(part.image_id, t.image_id)
        assert np.allclose(
            part['mean'], cross_predict(dict(m=MeanBaseline(('method',))), t, scene_folds(t, 3, s)).m
        )


def test_a_cell_is_known_by_all_that_makes_it(tmp_path):
    t = numbers()
    log = tmp_path/'log'
    def fits(table=t, folder='c', k=2, **params):
        log.write_text('')
        run(table, lambda s: dict(a=Logged(log=str(log), **params)), k, (0,), tmp_path/folder)
        return len(log.read_text().split())
    assert (
        fits() == 2 and fits() == 0 and fits(k=3) == 3 and fits(column='conf') == 2 and fits(folder='d') == 2
    )
    assert (
        fits(t.assign(conf_t=t.conf_t + 1e-9)) == 2
        and fits(t.rename(columns=dict(energy='e'))) == 2
        and fits() == 0
    )
    confusions = t.assign(confusion=[[1, 2]] * len(t))
    # no predictor is given those
    assert fits(confusions) == 0
    cell = next((tmp_path/'d').glob('*.parquet'))
    cell.write_bytes(cell.read_bytes()[:100])
    # a damaged cell is computed again
    assert fits(folder='d') == 1 and fits(folder='d') == 0


def test_where_the_store_lies_is_no_part_of_a_cell(tmp_path):
    t = numbers()
    same, other, none = (bench._identity(predictors(t, store=s)[RS_SQA]) for s in ('here', 'there', ''))
    assert same == other != none and bench._identity(ColumnBaseline('conf')) != bench._identity(
        ColumnBaseline('conf', fitted=False)
    )


def test_workers_and_left_out_methods(tmp_path):
    t = numbers(1, 4)
    with parallel_config('threading'):                                                 # processes would spend their time importing
        told = run(
            t,
            lambda s: dict(w=Witness(), m=MeanBaseline(('method',))),
            2,
            (0, 1),
            tmp_path,
            by='method',
            workers=2,
        )
    assert (told.w == 30).all() and set(told.fold) == {0, 1} and len(list(tmp_path.glob('w.seed1*'))) == 6
    assert len(leaderboard(t, told)) == 2 and leaderboard(t, told).top1.notna().all()


def test_predictions_are_kept_and_checked(tmp_path):
    t = numbers()
    told = run(t, lambda s: dict(m=MeanBaseline()), 2, (0,))
    assert load_predictions(save_predictions(told, tmp_path / 'p.parquet')).equals(told) and [
        p.name for p in tmp_path.iterdir()
    ] == ['p.parquet']
    with pytest.raises(DataNotFound, match='no predictions'): load_predictions(tmp_path/'q.parquet')
    with pytest.raises(SchemaError, match='second row'):
        save_predictions(pd.concat([told, told[:1]]), tmp_path/'r.parquet')
    with pytest.raises(SchemaError, match='columns'):
        save_predictions(told.drop(columns='fold'), tmp_path/'r.parquet')
    with pytest.raises(SchemaError, match='columns'):
        save_predictions(told.drop(columns='m'), tmp_path/'r.parquet')
    with pytest.raises(SchemaError, match='seed 0 for 9 of 108'):
        leaderboard(
            t, told[told.image_id.ne('i0-0-0') & told.image_id.ne('i1-1-1') & told.image_id.ne('i1-1-2')]
        )
    with pytest.raises(SchemaError, match='for 1 of 108'):
        bootstrap(t, told.assign(m=told.m.where(told.index != 5)), 'm')


# ---------------------------------------------------------------- views and intervals

def guesses(t, seeds=(0,), seed=0, k=3, **noise): # predictions with known errors; name -> standard deviation
    rng = np.random.default_rng(seed)
    return pd.concat(
        [
            t[['image_id', 'method']].assign(
                seed=s,
                fold=scene_folds(t, k, s),
                **{n: t.oa + rng.normal(0, e, len(t)) for n, e in noise.items()},
            )
            for s in seeds
        ],
        ignore_index=True,
    )


@pytest.fixture(scope='module')
def judged(): # table with ties, predictions with ties, three seeds
    t = numbers(3, 5, 2, 4)
    t = t[(t.dataset != 'd2') | t.scene.isin(['s0', 's1'])].assign(oa=lambda t: t.oa.round(2))
    told = guesses(t, (0, 1, 2), good=.02, bad=.1)
    return t, told.assign(
        coarse=told.good.round(1),
        mute=0.8,
        blind=t.groupby('image_id').oa.transform('mean').to_numpy()[np.arange(len(told)) % len(t)],
    )


def test_leaderboard_averages_seeds(judged):
    t, told = judged
    table = leaderboard(t.sample(frac=1, random_state=0), told.sample(frac=1, random_state=1))
    assert list(table.index) == ['good', 'bad', 'coarse', 'mute', 'blind'] and np.allclose(
        table.failure_below, 0.7
    )
    for name in ('good', 'coarse'):
        by_hand = pd.DataFrame(
            [measure(t, part[name].to_numpy(), part.fold.to_numpy()) for _, part in told.groupby('seed')]
        ).mean()
        assert table.loc[name].to_dict() == pytest.approx(by_hand[list(table)].to_dict(), abs=1e-6)


def test_groups_are_measured_by_themselves(judged):
    t, told = judged
    told = told[told.seed < 2]
    by_dataset = by_group(t, told)
    by_method = by_group(t, told, 'method')
    assert (
        list(by_dataset.index.names) == ['dataset', 'predictor']
        and len(by_dataset) == 15
        and len(by_method) == 20
    )
    mine = told[told.seed == 1].reset_index(drop=True)
    at = (t.dataset == 'd1').to_numpy()
    want = measure(t[at], mine.bad[at].to_numpy(), mine.fold[at].to_numpy())
    assert by_group(t, mine).loc['d1', 'bad'].to_dict() == pytest.approx(want, abs=1e-6, nan_ok=True)
    assert (
        by_method.loc['m2', 'good'].mae
        == pytest.approx(np.abs(told.good - np.tile(t.oa, 2))[np.tile(t.method == 'm2', 2)].mean())
        and 'top1' not in by_method
    )
    assert len(by_group(t, mine[['image_id', 'method', 'seed', 'fold', 'bad']], ['dataset', 'method'])) == 12
    assert by_dataset.images.groupby('dataset').first().sum() == t.image_id.nunique()


def test_all_scenes_once_is_the_measure_itself(judged):
    t, told = judged
    sure = bootstrap(t, told, 'good', n=10).value.unstack()
    table = leaderboard(t, told)
    assert set(sure) == set(DIRECTION) <= set(table)
    lower = bootstrap(t, told[told.seed == 0], 'good', ['bad'], n=2, threshold=.5)
    assert lower.failure_below.eq(0.5).all() and lower.value['bad', 'failure_auroc'] == pytest.approx(
        leaderboard(t, told[told.seed == 0], threshold=0.5).failure_auroc['bad']
    )
    for m in DIRECTION:
        assert np.allclose(
            sure[m][table.index], table[m], atol=1e-5 if 'fitted' in m else 1e-9, equal_nan=True
        ), m


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_a_draw_equals_measuring_its_scenes_again(judged):
    t, told = judged
    told = told[told.seed == 0]
    t = t.sort_values(['dataset', 'scene', 'image_id', 'method']).reset_index(drop=True)
    told = t[['image_id', 'method']].merge(told)
    sheet = bench.BootstrapTable(t.assign(unit=t.scene), 6, 3, .7)
    for name in ('good', 'coarse', 'bad'):
        mine = t.assign(predicted=told[name])
        chosen = bench._chosen(mine, told.fold.to_numpy(), bench._rivals(mine, told.fold.to_numpy()))
        draws = np.array(sheet.measure([(told[name].to_numpy(), chosen)], chunk=4))[0]
        for b in range(7):
            copies = [
                mine.iloc[np.flatnonzero(sheet.unit == u)].assign(image_id=lambda v: v.image_id + f'#{c}')
                for u, n in enumerate(sheet.times[b])
                for c in range(int(n))
            ]
            again = pd.concat(copies, ignore_index=True)
            want = views(again) | gains(
                chosen.loc[again.drop_duplicates('image_id').image_id.str.split('#').str[0]]
            )
            for m, value in zip(DIRECTION, draws[:, b]):
                if 'fitted' not in m:
                    assert value == pytest.approx(want[m], abs=1e-9, nan_ok=True), (name, b, m)


def test_draws_keep_datasets_whole():
    t = numbers(2, 5).query("dataset == 'd0' or scene in ['s0', 's1', 's2']")
    for unit, sizes in (('scene', [5, 3]), ('image', [15, 9])):
        sheet = bench.BootstrapTable(
            t.assign(unit=t.scene if unit == 'scene' else t.image_id).sort_values(
                ['dataset', 'unit', 'image_id', 'method']
            ),
            200,
            0,
            0.7,
        )
        assert (sheet.times[0] == 1).all() and np.bincount(sheet.strata).tolist() == sizes
        for d, n in enumerate(sizes):
            assert (sheet.times[:, sheet.strata == d].sum(1) == n).all() and abs(
                sheet.times[1:, sheet.strata == d].mean(0) - 1
            ).max() < 0.35
        sure = bootstrap(t, guesses(t, a=.1, b=.2), 'a', n=9, unit=unit)
        assert (
            (sure.units == sum(sizes)).all()
            and (sure.fewest == sizes[1]).all()
            and (sure.unit == unit).all()
            and (sure.draws == 9).all()
        )


def test_intervals_are_paired_repeatable_and_signed(judged):
    t, told = judged
    sure = bootstrap(t, told, 'good', ['bad', 'mute'], n=60)
    assert list(sure.index.levels[0]) == ['bad', 'good', 'mute'] and len(sure) == 3 * len(DIRECTION)
    pd.testing.assert_frame_equal(
        sure,
        bootstrap(
            t.sample(frac=1, random_state=0),
            told.sample(frac=1, random_state=5),
            'good',
            ['bad', 'mute'],
            n=60,
        ),
    )
    assert not sure.equals(bootstrap(t, told, 'good', ['bad', 'mute'], n=60, seed=1))
    assert sure.loc['good', ['delta', 'delta_low', 'better']].isna().all(axis=None)
    bad = sure.loc['bad']
    assert (
        bad.better[['mae', 'srocc_dataset', 'rmse', 'plcc', 'krocc']].eq(1).all()
        and bad.delta_high['mae'] < 0 < bad.delta_low['srocc_dataset']
    )
    assert (
        bad.delta['mae'] == pytest.approx(sure.value['good', 'mae'] - sure.value['bad', 'mae'])
        and (sure.low <= sure.high).where(sure.low.notna(), True).all()
    )
    turned = bootstrap(t, told, 'bad', ['good'], n=60).loc['good']
    assert (
        np.allclose(turned.delta, -bad.delta)
        and np.allclose(turned.delta_low, -bad.delta_high)
        and np.allclose(turned.better, 1 - bad.better)
    )
    twin = bootstrap(t, told.assign(twin=told.good), 'good', ['twin'], n=20).loc['twin']
    assert (twin.delta == 0).all() and (twin.better == .5).all()
    with pytest.raises(UnknownName, match='bda'): bootstrap(t, told, 'good', ['bda'])
    with pytest.raises(UnknownName, match=RS_SQA): bootstrap(t, told)
    with pytest.raises(UnknownName, match='tile'): bootstrap(t, told, 'good', unit='tile')


def test_the_blind_are_exposed_by_the_view_within_images(judged):
    t, told = judged
    sure = bootstrap(t, told, 'good', n=60)
    blind, mute, good = (sure.loc[n] for n in ('blind', 'mute', 'good'))
    # pooled views believe it
    assert blind.value['srocc'] > 0.8 and blind.value['plcc_dataset'] > 0.75
    assert (
        np.isnan(blind.value['srocc_image'])
        and blind.value['top1'] == pytest.approx(mute.value['top1'])
        and good.value['srocc_image'] > 0.8
    )
    assert blind.high['gap_closed'] < good.low['gap_closed'] and blind.better['top1'] == 1
    assert mute.value[['srocc', 'srocc_dataset', 'plcc', 'krocc']].isna().all() and mute.value[
        'failure_auroc'
    ] == pytest.approx(0.5)


def test_intervals_cover_a_known_difference():
    "Errors of two predictors with scene effects, whose expected difference in MAE is known; 95 % intervals should cover it in about 95 % of trained."
    t = numbers(1, 30, 2, 2)
    hit = 0
    sheet = bench.BootstrapTable(
        t.assign(unit=t.scene).sort_values(['dataset', 'unit', 'image_id', 'method']), 300, 0, 0.7
    )
    for w in range(200):
        # some scenes are hard for both
        hard = np.random.default_rng(w).exponential(1, 30)[sheet.unit]
        low, high = np.percentile(
            (sheet.mean(0.02 * hard, sheet.unit) - sheet.mean(0.03 * hard + 0.01, sheet.unit))[1:],
            (2.5, 97.5),
        )
        hit += low <= -.02 <= high
    assert 175 <= hit <= 199, hit
    hard = np.random.default_rng(0).exponential(1, 30)[t.scene.str[1:].astype(int)]
    told = t[['image_id', 'method']].assign(
        seed=0, fold=scene_folds(t, 3), a=t.oa + 0.02 * hard, b=t.oa + 0.03 * hard + 0.01
    )
    row = bootstrap(t, told, 'a', n=300).loc['b'].loc['mae']
    # pairing: scenes that are hard for both do not blur it
    assert (
        row.delta_low <= -0.02 <= row.delta_high and row.delta_high - row.delta_low < (row.high - row.low) / 2
    )


def test_tiles_of_a_scene_are_not_independent():
    t = numbers(1, 12, 6, 3)
    rng = np.random.default_rng(0)
    told = t[['image_id', 'method']].assign(
        seed=0, fold=scene_folds(t, 3), a=t.oa + rng.uniform(0, 0.2, 12)[t.scene.str[1:].astype(int)], b=t.oa
    )
    width = {u: bootstrap(t, told, 'b', n=200, unit=u).loc['a'].loc['mae'] for u in ('scene', 'image')}
    width = {u: row.high - row.low for u, row in width.items()}
    assert width['scene'] > 1.5 * width['image']


# ---------------------------------------------------------------- boards

def board(**rows):
    return pd.DataFrame(
        {
            RS_SQA if k == 'ours' else k: dict(zip(('srocc_dataset', 'srocc_image', 'mae', 'gap_closed'), v))
            for k, v in rows.items()
        }
    ).T


def test_verdict_states_the_order():
    said = comparison_summary(
        board(ours=(0.9, 0.5, 0.02, 0.3), a=(0.8, 0.6, 0.03, 0.3001), b=(0.85, 0.1, 0.01, 0.1))
    )
    assert (
        'within-dataset SROCC 0.900, ahead of b (0.850)' in said
        and 'within-image SROCC 0.500, behind a (0.600)' in said
    )
    assert 'MAE 0.020, behind b (0.010)' in said and 'gap closed 0.300, level with a (0.300)' in said
    said = comparison_summary(board(ours=(0.1, -0.5, 0.01, -0.3), a=(0.2, -0.6, 0.02, -0.2)))
    assert (
        'behind a (0.200)' in said
        and '-0.500, ahead of a (-0.600)' in said
        and 'MAE 0.010, ahead of a' in said
        and '-0.300, behind a (-0.200)' in said
    )


def test_verdict_skips_a_rival_without_a_value():
    assert 'ahead of a (0.100)' in comparison_summary(
        board(ours=(0.9, 0.5, 0.02, 0.3), a=(0.1, 0.1, 0.1, 0.1), b=(np.nan, np.nan, np.nan, np.nan))
    )


def test_verdict_leaves_out_what_could_not_be_measured():
    said = comparison_summary(board(ours=(0.9, np.nan, 0.02, np.nan), a=(0.8, np.nan, 0.03, np.nan)))
    assert 'ahead of a (0.800)' in said and 'nan' not in said


def test_verdict_of_another():
    table = board(ours=(0.9, 0.5, 0.02, 0.3), a=(0.8, 0.6, 0.03, 0.1))
    assert comparison_summary(table, 'a').startswith(
        'a: within-dataset SROCC 0.800, behind RS-SQA (0.900); within-image SROCC 0.600, ahead of RS-SQA'
    )


def test_compare_measures_all_predictors_alike():
    t = numbers(2, 4, 2, 3)
    table, predicted = compare(t, k=2, epochs=3, members=1, extra=dict(spy=Spy()))
    assert (
        table.index[0] == RS_SQA
        and 'spy' in table.index
        and set(table.index) == set(predicted)
        and predicted.index.equals(t.index)
    )
    assert set(VIEWS) <= set(table) and (table.n_rows == len(t)).all()
    again = cross_predict({RS_SQA: predictors(t, epochs=3, members=1)[RS_SQA]}, t, scene_folds(t, 2))
    assert np.array_equal(again[RS_SQA], predicted[RS_SQA])


def test_results_carry_their_provenance(tmp_path):
    path = save_results(
        board(ours=(0.123456789, 0.5, 0.02, 0.3), a=(0.8, 0.6, 0.03, 0.1)).rename_axis('predictor'),
        tmp_path / 'r.csv',
        '5 folds',
        'numbers',
        7,
        'rssqa bench',
    )
    back = read_results(path).reset_index()
    assert list(back) == [
        'predictor',
        'srocc_dataset',
        'srocc_image',
        'mae',
        'gap_closed',
        'protocol',
        'data',
        'seed',
        'rssqa',
        'commit',
        'command',
    ]
    assert (
        back.srocc_dataset[0] == 0.12346
        and back.seed.eq(7).all()
        and back.protocol[1] == '5 folds'
        and [p.name for p in tmp_path.iterdir()] == ['r.csv']
    )
    assert back.commit.fillna('').iloc[0] == commit() and (not commit() or len(commit().rstrip('+')) == 12)


def test_results_of_several_seeds_and_groups(judged, tmp_path):
    t, told = judged
    back = read_results(
        save_results(
            bootstrap(t, told, 'good', n=5),
            tmp_path / 'b.csv',
            '3 folds',
            'numbers',
            (0, 1, 2),
            'x',
            experiment='e1',
        )
    )
    assert (
        list(back)[:9]
        == ['measure', 'value', 'low', 'high', 'delta', 'delta_low', 'delta_high', 'better', 'unit']
        and back.seed.eq('0 1 2').all()
        and back.experiment.eq('e1').all()
    )
    back = read_results(save_results(by_group(t, told), tmp_path/'g.csv', '3 folds', 'numbers', 0, 'x'))
    assert list(back)[0] == 'dataset' and len(back.loc['good']) == 3 and back.protocol.eq('3 folds').all()
    own = leaderboard(t, told).assign(seed=9)
    # a column of the table stays
    assert read_results(save_results(own, tmp_path / 's.csv', 'p', 'd', 0, 'x')).seed.eq(9).all()
