"""The baselines: simple, calibrated, and fit for the same protocol."""
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.base import clone

from rssqa.quality.baselines import (
    COLUMN_BASELINES, MAX_SEGMENTS, SEGMENT_COLUMNS, TUNING_GRIDS,
    BlockBaseline, ColumnBaseline, DifferenceBaseline, ImageQualityBaseline, MeanBaseline, NeighbourBaseline,
    SegmentBaseline, ThresholdBaseline,
    _put_summaries, _tune, baselines, fit_groups, has_grids, histograms, map_keys, read_groups, segment_table,
    summarise_grids,
)
from rssqa.segment.confidence import boundary, segments
from rssqa.core import MissingFeatures, SchemaError
from rssqa.data.splits import scene_parts
from rssqa.segment.metrics import mae, srocc
from rssqa.tables.grid import PredictionGrid
from rssqa.tables.store import Store, get_vectors, put_vectors
from trained import numbers, with_features, trained_setup


@pytest.fixture(scope='module')
def table(): return numbers()


@pytest.fixture(scope='module')
def new(): return numbers(seed=5).assign(image_id=lambda t: 'n' + t.image_id)


@pytest.fixture(scope='module')
def store(table, new, tmp_path_factory):
    return with_features(tmp_path_factory.mktemp('s')/'store', pd.concat([table, new]))


def test_all_baselines_are_clones_of_themselves_and_predict(table, new, store):
    found = baselines(table, store, 'sem/toy@1')
    expected = {'mean of dataset and method', 'max-softmax', 'ridge: semantics', 'ridge: intermediate features',
                'ridge: everything', 'boosting: everything'}
    assert expected <= set(found)
    for name, estimator in found.items():
        twin = clone(estimator)
        assert type(twin) is type(estimator) and twin.get_params() == estimator.get_params(), name
        if 'trees' in name: twin.set_params(learner='ridge')
        p = twin.fit(table).predict(new)
        assert p.shape == (len(new),) and np.isfinite(p).all() and ((p >= 0) & (p <= 1)).all(), name
        assert np.allclose(p, twin.predict(new.drop(columns=['oa', 'miou', 'mf1', 'scene']))), name


def test_only_what_the_table_allows_is_offered(table):
    names = set(baselines(table.drop(columns=['margin', 'conf_t']).assign(agree_mean=np.nan)))
    impossible = {'margin', 'max-softmax, temperature-scaled, no fit', 'agreement with the other methods',
                  'ridge: semantics', 'ridge: intermediate features'}
    assert not names & impossible
    assert 'max-softmax' in names and 'ridge: everything' not in names
    assert set(COLUMN_BASELINES) - {'flip agreement'} <= set(baselines(table))


@pytest.mark.parametrize('slope, intercept', [(1, 0), (0.5, 0.2), (-2, 1)])
def test_a_perfect_column_has_no_error(slope, intercept, table, new):
    def perfect(t): return t.assign(conf=(t.oa - intercept) / slope)
    assert mae(new.oa, ColumnBaseline('conf').fit(perfect(table)).predict(perfect(new))) < 1e-9


def test_without_a_fit_the_column_is_the_prediction(table, new):
    assert np.array_equal(ColumnBaseline('conf_t', fitted=False).fit(table).predict(new), new.conf_t)
    worse = new.assign(conf_t=new.conf_t + 0.4)
    assert ColumnBaseline('conf_t', fitted=False).fit(table).predict(worse).max() == 1


@pytest.mark.parametrize('values', [0.5, np.nan])
def test_a_constant_column_gives_the_mean_or_itself(values, table):
    p = ColumnBaseline('conf').fit(table.assign(conf=values)).predict(table.assign(conf=values))
    assert np.ptp(p) == 0 and p[0] == pytest.approx(table.oa.mean() if np.isnan(values) else 0.5)


def test_missing_values_fall_back_to_the_mean(table, new):
    gaps = table.assign(conf=table.conf.where(table.index % 2 == 0))
    p = ColumnBaseline('conf').fit(gaps).predict(new.assign(conf=new.conf.where(new.index > 3)))
    assert p[:4] == pytest.approx(table.oa.mean()) and srocc(new.oa[4:], p[4:]) > 0.8


def test_an_absent_column_is_named_in_fit_and_predict(table):
    with pytest.raises(SchemaError, match='nope'): ColumnBaseline('nope').fit(table)
    with pytest.raises(SchemaError, match='conf'):
        ColumnBaseline('conf').fit(table).predict(table.drop(columns='conf'))


def test_means_are_means(table, new):
    means = table.groupby(['dataset', 'method']).oa.mean().rename('mean').reset_index()
    wanted = new.merge(means, on=['dataset', 'method'], how='left')['mean']
    assert np.allclose(MeanBaseline().fit(table).predict(new), wanted)
    assert MeanBaseline(()).fit(table).predict(new[:2]).tolist() == [table.oa.mean()] * 2
    of_method = new.method.map(table.groupby('method').oa.mean())
    assert np.allclose(MeanBaseline(('method',)).fit(table).predict(new), of_method)


@pytest.mark.parametrize('change, known', [
    (dict(dataset='elsewhere'), 'method'),
    (dict(method='m9'), 'dataset'),
    (dict(dataset='elsewhere', method='m9'), None),
])
def test_unknown_names_fall_back_to_what_is_known(change, known, table, new):
    wanted = new[known].map(table.groupby(known).oa.mean()) if known else table.oa.mean()
    changed = new.assign(**change)
    assert np.allclose(MeanBaseline().fit(table).predict(changed), wanted)
    for learner in ('ridge', 'boosting'):
        m = BlockBaseline(('single_map', 'cross_method', 'prior'), learner).fit(table)
        assert np.isfinite(m.predict(changed)).all()


BLOCKS = [('single_map',), ('cross_method',), ('prior',), ('single_map', 'cross_method', 'prior')]


@pytest.mark.parametrize('blocks', BLOCKS)
@pytest.mark.parametrize('learner', ['ridge', 'boosting'])
def test_blocks_learn(blocks, learner, table, new):
    m = BlockBaseline(blocks, learner).fit(table)
    p = m.predict(new)
    assert srocc(new.oa, p) > 0.4 and np.array_equal(clone(m).fit(table).predict(new), p)


def test_an_unknown_method_has_no_column(table):
    x = BlockBaseline(('prior',)).fit(table)._inputs(table.assign(method='m9'))
    assert x.shape == (len(table), 3 + 3) and not x[:, 3:].any()


def test_trees_are_reproducible(table):
    m = BlockBaseline(('single_map',), 'trees', seed=3)
    assert np.array_equal(clone(m).fit(table).predict(table), m.fit(table).predict(table))


def test_an_unknown_learner_or_block_is_named(table):
    with pytest.raises((KeyError, ValueError), match='forest'):
        BlockBaseline(learner='forest', blocks=('single_map',)).fit(table)


# ---------------------------------------------------------------- groups and differences

def test_groups_fall_back_to_method_then_dataset_then_all(table):
    oa = table.oa.to_numpy()
    means = fit_groups(table, lambda i: oa[i].mean())
    asked = pd.DataFrame(dict(dataset=['d0', 'x', 'd0', 'x'], method=['m1', 'm1', 'y', 'y']))
    in_dataset = (table.dataset == 'd0').to_numpy()
    in_method = (table.method == 'm1').to_numpy()
    wanted = [oa[in_dataset & in_method].mean(), oa[in_method].mean(), oa[in_dataset].mean(), oa.mean()]
    assert np.allclose(read_groups(asked, means), wanted)
    assert len(means) == 6 + 3 + 2 + 1


def test_doc_moves_as_far_as_confidence(table, new):
    groups = table.groupby(['dataset', 'method'])[['oa', 'conf_t']].mean()
    means = groups.loc[list(zip(new.dataset, new.method))]
    doc = DifferenceBaseline().fit(table)
    assert np.allclose(doc.predict(new), np.clip(means.oa.to_numpy() + new.conf_t - means.conf_t.to_numpy(), 0, 1))
    assert np.allclose(doc.predict(new.assign(conf_t=np.nan)), means.oa)


@pytest.mark.parametrize('slope', [0.2, 1.0, 3.0])
def test_regression_finds_the_slope_and_few_rows_are_shrunk_to_one(slope):
    conf_t = np.random.default_rng(0).uniform(0.4, 0.6, 2000)
    t = pd.DataFrame(dict(dataset='d', method='m', conf_t=conf_t, oa=0.5 + slope * (conf_t - 0.5)))
    def fitted_slope(rows): return DifferenceBaseline(regression=True).fit(rows).lines_['d', 'm'][2]
    assert fitted_slope(t) == pytest.approx(slope, abs=0.02)
    assert slope == 1 or min(slope, 1) < fitted_slope(t[:4]) < max(slope, 1)


# ---------------------------------------------------------------- summaries of prediction grids

def grid(rng, methods=2, classes=3, h=12, w=16, name='i'):
    p = rng.dirichlet(np.full(classes, 0.5), (methods, h // 4, w // 4))
    p8 = np.round(255 * p.repeat(4, 1).repeat(4, 2).transpose(0, 3, 1, 2)).astype(np.uint8)
    truth = rng.integers(0, classes, (h, w)).astype(np.uint8)
    names = [f'm{k}' for k in range(methods)]
    return PredictionGrid(name, 'd', names, p8, p8, p8.argmax(1).astype(np.uint8), truth)


def described(p, pred, truth): return pd.DataFrame(segment_table(p, pred, truth), columns=SEGMENT_COLUMNS).astype(float)


@pytest.mark.parametrize('classes', [2, 3, 9])
def test_histograms_count_levels(classes):
    p = grid(np.random.default_rng(classes), 3, classes).p
    h = histograms(p)
    levels = np.arange(256)
    assert h.shape == (3, 512) and np.allclose(h.reshape(3, 2, 256).sum(2), 1, atol=1e-6)
    assert np.allclose(h[:, :256] @ levels, p.max(1).mean((1, 2)), rtol=1e-5)
    share = p / 255
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1) / np.log(classes)
    assert np.allclose(h[:, 256:] @ levels, 255 * (1 - entropy).mean((1, 2)), atol=1)


def mean_or_nan(x, where): return x[where].mean() if where.any() else np.nan


@pytest.mark.parametrize('classes', [2, 3, 6])
def test_segments_equal_slow_counts(classes):
    g = grid(np.random.default_rng(classes), 1, classes)
    p = g.p[0] / 255
    pred = g.pred[0]
    truth = np.where(np.random.default_rng(1).random(g.truth.shape) < 0.2, 255, g.truth).astype(np.uint8)
    table = described(g.p[0], pred, truth)
    assert table.area.sum() == pytest.approx(1, abs=2e-3) and table.area.is_monotonic_decreasing
    assert table.labelled.sum() == pytest.approx((truth != 255).mean(), abs=2e-3)
    assert table.correct.sum() == pytest.approx((pred == truth).mean(), abs=2e-3)
    first, second = np.sort(p, 0)[::-1][:2]
    entropy = -(p * np.log(np.maximum(p, 1e-12))).sum(0) / np.log(classes)
    quantities = dict(entropy=entropy, gap=1 - first + second, variation=1 - first)
    number = segments(pred)
    edge = boundary(pred)
    masks = sorted((number == k for k in np.unique(number)), key=lambda m: -m.sum())
    sizes = [m.sum() for m in masks]
    compared = 0
    for row, mask, size in zip(table.to_dict('records'), masks, sizes):
        if sizes.count(size) > 1: continue                          # order among equals is free
        compared += 1
        assert pred[mask][0] == row['class']
        assert row['interior'] == pytest.approx((~edge[mask]).mean(), abs=2e-3)
        assert row['labelled'] == pytest.approx((mask & (truth != 255)).mean(), abs=2e-3)
        for name, q in quantities.items():
            wanted = [q[mask].mean(), q[mask].std(), mean_or_nan(q, mask & ~edge), mean_or_nan(q, mask & edge)]
            columns = [name, f'{name}_std', f'{name}_interior', f'{name}_boundary']
            assert np.allclose([row[c] for c in columns], wanted, atol=3e-3, equal_nan=True), name
        assert np.allclose([row['p1'], row['p2']], np.sort(p[:, mask].mean(1))[::-1][:2], atol=2e-3)
    assert compared


def test_small_segments_are_taken_together():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), (40, 40)).transpose(2, 0, 1)
    pred = p.argmax(0).astype(np.uint8)
    truth = rng.integers(0, 4, (40, 40)).astype(np.uint8)
    table = described(np.round(255 * p).astype(np.uint8), pred, truth)
    assert len(table) == MAX_SEGMENTS + 1
    assert table['class'].iloc[-1] == -1 and (table['class'][:-1] >= 0).all()
    assert table.area.sum() == pytest.approx(1, abs=5e-3)
    assert table.correct.sum() == pytest.approx((pred == truth).mean(), abs=5e-3)


def test_one_segment_without_truth():
    p = np.stack([np.full((5, 7), 255), np.zeros((5, 7))]).astype(np.uint8)
    table = described(p, np.zeros((5, 7), np.uint8), np.full((5, 7), 255, np.uint8))
    row = table.iloc[0]
    assert len(table) == 1
    assert row.area == row.interior == row.p1 == 1 and row.entropy == row.labelled == row.correct == 0
    assert np.isnan(row.entropy_boundary)


def test_a_segment_without_a_boundary_has_no_boundary_numbers():
    "Rounding must not divide by zero: found in 219 of 261,574 segments of real maps."
    rng = np.random.default_rng(0)
    empty = np.zeros((37, 41), np.uint8)
    for _ in range(50):
        p = rng.dirichlet(np.ones(3), (37, 41)).transpose(2, 0, 1)
        table = described((255 * p).astype(np.uint8), empty, empty)
        assert not np.isinf(table).any(axis=None) and table.filter(like='_boundary').isna().all(axis=None)


def test_real_grids_are_summarised_once(monkeypatch, tmp_path):
    trained = trained_setup()
    sqed = trained.sqed
    store = Store(shutil.copytree(trained.home/'store', tmp_path/'store'))
    assert has_grids(store, sqed)
    assert not has_grids(store, sqed.assign(method_fp='0')) and not has_grids(Store(tmp_path/'none'), sqed)
    summarise_grids(store, sqed[:5], chunk=2)
    summarise_grids(store, sqed, chunk=3)
    monkeypatch.setattr('rssqa.quality.baselines.prediction_grids', None)
    summarise_grids(store, sqed)
    summarise_grids(store, sqed.iloc[::-1])
    h = get_vectors(store, 'conf_hist', map_keys(sqed))
    # one pixel in sixteen
    assert np.abs(h[:, :256] @ np.arange(256) / 255 - sqed.conf_t).mean() < 0.02
    tables = [read_segments(data) for data in store.take('segments', map_keys(sqed), ['data'])['data'].to_pylist()]
    assert np.abs([t.correct.sum() / t.labelled.sum() for t in tables] - sqed.oa).mean() < 0.05
    names = set(baselines(sqed, str(store.root)))
    assert {'ATC', 'ATC, negative entropy', 'MetaSeg-style segments + boosting'} <= names


def read_segments(data): # bytes of one map
    values = np.frombuffer(data, np.float16).reshape(-1, len(SEGMENT_COLUMNS))
    return pd.DataFrame(values, columns=SEGMENT_COLUMNS).astype(float)


# ---------------------------------------------------------------- thresholds and segments

def toy_grids(home, name, images=24, size=16, seed=0) -> pd.DataFrame:
    "Maps of two networks: m is right with the probability it states, n states too high ones."
    rng = np.random.default_rng(seed)
    rows = []
    grids = []
    for i in range(images):
        image = f'{name}{i}'
        truth = rng.integers(0, 2, (size // 4, size // 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        chance = []
        for _ in 'mn':
            small = np.clip(rng.beta(4, 1 + 3 * rng.random(), (size // 4, size // 4)), 0.5, 1)
            chance.append(small.repeat(4, 0).repeat(4, 1))
        pred = np.array([np.where(rng.random(truth.shape) < c, truth, 1 - truth) for c in chance], np.uint8)
        stated = np.round(255 * np.array([chance[0], 0.5 + 0.5 * np.sqrt(2 * chance[1] - 1)])).astype(np.uint8)
        p = np.stack([np.where(pred == k, stated, 255 - stated) for k in (0, 1)], 1)
        grids.append(PredictionGrid(image, f'd{i % 2}', ['m', 'n'], p, p, pred, truth))
        for k, method in enumerate('mn'):
            oa = (pred[k] == truth).mean()
            conf_t = stated[k].mean() / 255
            rows.append((image, f'd{i % 2}', f'{name}{i // 4}', method, method, oa, conf_t))
    columns = ['image_id', 'dataset', 'scene', 'method', 'method_fp', 'oa', 'conf_t']
    table = pd.DataFrame(rows, columns=columns)
    _put_summaries(Store(home), grids, table)
    Store(home).put('grid', pd.DataFrame(dict(key=map_keys(table))))
    Store(home).put('truth', pd.DataFrame(dict(key=table.image_id.unique())))
    return table


@pytest.fixture(scope='module')
def toys(tmp_path_factory): # folder of the store, training rows, test rows
    home = str(tmp_path_factory.mktemp('toys'))
    return home, toy_grids(home, 'a'), toy_grids(home, 'b', seed=1)


@pytest.mark.parametrize('score', ['confidence', 'certainty'])
def test_atc_reproduces_training_accuracy_of_each_group(toys, score):
    home, train, _ = toys
    groups = train.assign(p=ThresholdBaseline(home, score).fit(train).predict(train)).groupby(['dataset', 'method'])
    assert np.allclose(groups.p.mean(), groups.oa.mean(), atol=2e-3)


def test_atc_is_the_share_above_the_threshold(toys):
    home, train, test = toys
    atc = ThresholdBaseline(home).fit(train)
    h = get_vectors(Store(home), 'conf_hist', map_keys(test))[:, :256]
    threshold = read_groups(test, atc.levels_)
    lower = np.array([shares[int(np.ceil(t)):].sum() for shares, t in zip(h, threshold)])
    upper = np.array([shares[int(np.floor(t)):].sum() for shares, t in zip(h, threshold)])
    p = atc.predict(test)
    assert (lower - 1e-3 <= p).all() and (p <= upper + 1e-3).all()
    # the overconfident network needs a higher threshold
    assert (threshold[test.method == 'n'] > threshold[test.method == 'm']).all()


def test_the_list_has_each_kind_of_atc_under_its_name(toys):
    home, train, test = toys
    found = baselines(train, home)
    settings = {name: (b.score, b.fitted) for name, b in found.items() if name.startswith('ATC')}
    assert settings == {
        'ATC': ('confidence', False),
        'ATC, negative entropy': ('certainty', False),
        'ATC, line fitted': ('confidence', True),
    }
    predicted = [found[name].fit(train).predict(test) for name in settings]
    assert not np.array_equal(predicted[0], predicted[1]) and not np.array_equal(predicted[0], predicted[2])


def test_atc_saturated_confidence_still_meets_accuracy(tmp_path):
    p = np.zeros((1, 2, 8, 8), np.uint8)
    p[:, 0] = 255
    table = pd.DataFrame(dict(image_id=list('012'), dataset='d', scene=list('012'), method='m', method_fp='f'))
    table['oa'] = [0.6, 0.7, 0.8]
    grids = [PredictionGrid(image, 'd', ['m'], p, p, p[:, 0] * 0, p[0, 0] * 0) for image in table.image_id]
    _put_summaries(Store(tmp_path), grids, table)
    assert np.allclose(ThresholdBaseline(str(tmp_path)).fit(table).predict(table), 0.7, atol=1e-3)


def test_a_line_helps_where_atc_exaggerates(toys):
    home, train, test = toys
    plain, line = (ThresholdBaseline(home, fitted=f).fit(train).predict(test) for f in (False, True))
    assert mae(test.oa, line) < mae(test.oa, plain)


def test_segments_beat_the_mean_and_use_no_truth_of_new_maps(toys, tmp_path):
    home, train, test = toys
    m = SegmentBaseline(home).fit(train)
    p = m.predict(test)
    assert mae(test.oa, p) < mae(test.oa, MeanBaseline().fit(train).predict(test))
    assert np.array_equal(clone(m).fit(train).predict(test), p)
    other = Store(shutil.copytree(home, tmp_path/'s'))
    stored = other.take('segments', map_keys(test)).to_pandas()
    def without_truth(data):
        table = read_segments(data).assign(correct=0, labelled=0)
        return table.to_numpy(np.float16).tobytes()
    other.put('segments', stored.assign(data=stored.data.map(without_truth)))
    assert np.array_equal(m.set_params(store=str(other.root)).predict(test), p)


@pytest.mark.parametrize('kind', [ThresholdBaseline, SegmentBaseline])
def test_unknown_datasets_methods_and_single_scenes_are_no_trouble(kind, toys):
    home, train, test = toys
    m = kind(home).fit(train)
    for change in (dict(dataset='x'), dict(method='y'), dict(dataset='x', method='y')):
        p = m.predict(test.assign(**change))
        assert np.isfinite(p).all() and ((p >= 0) & (p <= 1)).all()
    one_scene = train[(train.scene == 'a0') & (train.dataset == 'd0')]
    assert np.isfinite(kind(home).fit(one_scene).predict(test)).all()


def test_a_draw_of_segments_is_weighted_back(toys):
    home, train, test = toys
    whole, drawn = (SegmentBaseline(home, limit=n).fit(train).predict(test) for n in (60_000, 300))
    assert np.abs(whole - drawn).mean() < 0.05 and not np.array_equal(whole, drawn)


def test_maps_without_grids_are_named(toys):
    home, train, _ = toys
    with pytest.raises(MissingFeatures, match='grid'):
        ThresholdBaseline(home).fit(train.assign(method_fp='other'))


# ---------------------------------------------------------------- tuned across scenes

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 3), st.integers(2, 5), st.integers(0, 99))
def test_scene_parts_keep_scenes_whole_and_are_even(datasets, scenes, images, k, seed):
    t = numbers(datasets, scenes, images, 2)
    part = scene_parts(t, k, seed)
    t = t.assign(part=part)
    assert t.groupby(['dataset', 'scene']).part.nunique().eq(1).all() and part.min() == 0 and part.max() < k
    counts = t.drop_duplicates(['dataset', 'scene']).part.value_counts().reindex(range(k), fill_value=0)
    assert counts.max() - counts.min() <= 1
    order = np.random.default_rng(seed).permutation(len(t))
    assert np.array_equal(scene_parts(t.iloc[order], k, seed), part[order])


def test_each_part_has_scenes_of_every_dataset():
    t = numbers(3, 6)
    assert t.assign(part=scene_parts(t, 2)).groupby('dataset').part.nunique().eq(2).all()


@pytest.fixture
def tuning_inputs(monkeypatch): # what the last fit passed to _tune
    passed = {}
    def keep(learner, X, inputs, seed): passed.update(inputs=inputs)
    monkeypatch.setattr('rssqa.quality.baselines._tune', keep)
    return passed


def test_the_prior_of_a_part_uses_no_label_of_the_rows_left_out(table, tuning_inputs):
    train = scene_parts(table) == 0
    changed = table.assign(oa=table.oa.where(train, table.oa[::-1].to_numpy()))
    x = []
    for t in (table, changed):
        BlockBaseline(('single_map', 'prior')).fit(t)
        x.append(tuning_inputs['inputs'](train))
    assert np.array_equal(*x) and not np.array_equal(x[0], tuning_inputs['inputs'](~train))


def test_the_full_prior_is_that_of_the_blocks(table, tuning_inputs):
    m = BlockBaseline(('single_map', 'prior')).fit(table)
    prior = tuning_inputs['inputs'](np.ones(len(table), bool))[:, :3]
    assert np.allclose(prior, m.features_.transform(table, training=True).prior)


@pytest.mark.parametrize('learner, kind, choices', [
    ('ridge', 'Ridge', 'alpha'),
    ('trees', 'ExtraTreesRegressor', 'min_samples_leaf'),
    ('boosting', 'HistGradientBoostingRegressor', 'max_leaf_nodes'),
])
def test_the_best_of_the_grid_is_chosen(learner, kind, choices, monkeypatch):
    t = numbers(1, 8, 2, 3)
    values = [parameters[choices] for parameters in TUNING_GRIDS[learner]]
    errors = dict(zip(values, np.linspace(1, 2, len(values))[::-1]))
    def stage_errors(make, parts): return np.array([errors[make().get_params()[choices]]] * 7)
    monkeypatch.setattr('rssqa.quality.baselines._stage_errors', stage_errors)
    m = _tune(learner, t, lambda train: t[['conf', 'entropy']].to_numpy(), 0)
    assert type(m).__name__ == kind and m.get_params()[choices] == min(errors, key=errors.get)
    assert learner != 'boosting' or m.max_iter == 2


def test_one_scene_is_learned_without_tuning():
    t = numbers(1, 1, 6, 3)
    for learner in TUNING_GRIDS:
        assert np.isfinite(BlockBaseline(('single_map', 'prior'), learner).fit(t).predict(t)).all()


# ---------------------------------------------------------------- neighbours

@pytest.mark.parametrize('k', [1, 3, 8])
def test_neighbours_equal_those_of_sklearn(k, table, new, store):
    from sklearn.neighbors import KNeighborsRegressor
    def vectors(rows): return get_vectors(Store(store), 'sem/toy@1', rows.image_id)
    m = NeighbourBaseline(store, 'sem/toy@1', counts=(k,)).fit(table)
    p = m.predict(new)
    for method in table.method.unique():
        train = table[table.method == method]
        test = new[new.method == method]
        reference = KNeighborsRegressor(k, metric='cosine').fit(vectors(train), train.oa)
        assert np.allclose(p[(new.method == method).to_numpy()], reference.predict(vectors(test)))
    unknown = m.predict(new.assign(method='other'))
    assert np.allclose(unknown[::3], p.reshape(-1, 3).mean(1))


def test_the_number_of_neighbours_is_chosen_across_scenes(tmp_path):
    rng = np.random.default_rng(0)
    # neighbours within a scene have its accuracy, others are of no use
    t = numbers(1, 20, 4, 1).assign(oa=rng.uniform(0, 1, 20).repeat(4))
    vectors = rng.normal(size=(20, 6)).repeat(4, 0) + rng.normal(0, 0.01, (80, 6))
    put_vectors(Store(tmp_path), 'v', t.image_id, vectors)
    assert NeighbourBaseline(str(tmp_path), 'v').fit(t).k_ >= 8


def test_missing_methods_and_few_images(table, store):
    first_image = table.image_id.iloc[0]
    few = table[(table.method != 'm1') | (table.image_id == first_image)]
    p = NeighbourBaseline(store, 'sem/toy@1').fit(few).predict(table)
    assert np.isfinite(p).all() and np.allclose(p[table.method == 'm1'], few.oa[few.method == 'm1'].iloc[0])
    one = table[table.image_id == first_image]
    assert np.allclose(NeighbourBaseline(store, 'sem/toy@1').fit(one).predict(one), one.oa)


# ---------------------------------------------------------------- image quality, and the list

def with_quality(t, seed=0):
    rng = np.random.default_rng(seed)
    image = t.groupby('image_id').oa.transform('mean')
    brisque = {f'iqa_brisque_{i:02d}': image * rng.normal() + rng.normal(0, 0.05, len(t)) for i in range(4)}
    return t.assign(**brisque, iqa_prompt_good=1 / (1 + np.exp(-8 * (image - 0.6))), iqa_score_niqe=5 - image)


@pytest.mark.parametrize('prefix', ['iqa_brisque_', 'iqa_prompt_'])
def test_quality_columns_learn_and_name_what_is_missing(prefix, table, new):
    m = ImageQualityBaseline(prefix).fit(with_quality(table))
    n = with_quality(new)
    assert srocc(n.oa, m.predict(n)) > 0.8
    assert np.isfinite(m.predict(n.assign(**{m.columns_[0]: np.nan}))).all()
    with pytest.raises(SchemaError, match=prefix): m.predict(new)
    with pytest.raises(SchemaError, match=prefix): ImageQualityBaseline(prefix).fit(table)


def test_shares_become_logits_and_certainty_stays_finite(table):
    t = table.assign(iqa_prompt_a=(table.oa > 0.7).astype(float))
    x = ImageQualityBaseline('iqa_prompt_').fit(t)._quality(t)
    assert np.isfinite(x).all() and x.max() > 10


def test_everything_that_can_be_tried_is_listed(table, store):
    names = set(baselines(with_quality(table), store, 'sem/toy@1'))
    expected = {'DoC', 'DoC, regression', 'encoder features + kNN', 'intermediate features + boosting',
                'BRISQUE statistics + ridge', 'CLIP-IQA prompts + ridge', 'image quality: niqe'}
    assert expected <= names
    # no prediction grids here
    assert not {n for n in names if n.startswith(('ATC', 'MetaSeg'))}
    assert not {n for n in baselines(table.drop(columns='conf_t')) if 'DoC' in n or 'IQA' in n}


def test_published_names_stay():
    published = pd.read_csv(Path(__file__).parents[1]/'data/results/demo_synthetic.csv').predictor
    names = set(baselines(numbers().assign(tta=0.5), 'nowhere', 'sem/x')) | {'RS-SQA'}
    assert not set(published) - names
