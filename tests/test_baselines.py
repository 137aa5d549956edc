"""The rivals: simple, calibrated, and fit for the same protocol."""
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

from rssqa.baselines import COLUMNS, BlockBaseline, ColumnBaseline, MeanBaseline, baselines
from rssqa.core import SchemaError
from rssqa.metrics import mae, srocc
from worlds import numbers, with_features


@pytest.fixture(scope='module')
def table(): return numbers()


@pytest.fixture(scope='module')
def new(): return numbers(seed=5).assign(image_id=lambda t: 'n' + t.image_id)


@pytest.fixture(scope='module')
def store(table, new, tmp_path_factory): return with_features(tmp_path_factory.mktemp('s')/'store', pd.concat([table, new]))


def test_all_rivals_are_clones_of_themselves_and_predict(table, new, store):
    found = baselines(table, store, 'sem/toy@1')
    assert {'mean of dataset and method', 'max-softmax', 'ridge: semantics', 'ridge: segmenter taps', 'ridge: everything', 'boosting: everything'} <= set(found)
    for name, estimator in found.items():
        twin = clone(estimator)
        assert type(twin) is type(estimator) and twin.get_params() == estimator.get_params(), name
        twin.set_params(**({'learner': 'ridge'} if 'trees' in name else {})).fit(table)
        p = twin.predict(new)
        assert p.shape == (len(new),) and np.isfinite(p).all() and ((p >= 0) & (p <= 1)).all(), name
        assert np.allclose(p, twin.predict(new.drop(columns=['oa', 'miou', 'mf1', 'scene']))), name


def test_only_what_the_table_allows_is_offered(table):
    names = set(baselines(table.drop(columns=['margin', 'conf_t']).assign(agree_mean=np.nan)))
    assert not names & {'margin', 'max-softmax, temperature-scaled, no fit', 'agreement with the other methods', 'ridge: semantics', 'ridge: segmenter taps'}
    assert 'max-softmax' in names and 'ridge: everything' not in names
    assert set(COLUMNS) - {'flip agreement'} <= set(baselines(table))


@pytest.mark.parametrize('line', [(1, 0), (0.5, 0.2), (-2, 1)])
def test_a_perfect_column_has_no_error(line, table, new):
    perfect = lambda t: t.assign(conf=(t.oa - line[1]) / line[0])
    assert mae(new.oa, ColumnBaseline('conf').fit(perfect(table)).predict(perfect(new))) < 1e-9


def test_without_a_fit_the_column_is_the_prediction(table, new):
    assert np.array_equal(ColumnBaseline('conf_t', fitted=False).fit(table).predict(new), new.conf_t)
    worse = new.assign(conf_t=new.conf_t + 0.4)
    assert ColumnBaseline('conf_t', fitted=False).fit(table).predict(worse).max() == 1


@pytest.mark.parametrize('values', [0.5, np.nan])
def test_a_column_that_says_nothing_gives_the_mean_or_itself(values, table):
    p = ColumnBaseline('conf').fit(table.assign(conf=values)).predict(table.assign(conf=values))
    assert np.ptp(p) == 0 and p[0] == pytest.approx(table.oa.mean() if np.isnan(values) else 0.5)


def test_missing_values_fall_back_to_the_mean(table, new):
    p = ColumnBaseline('conf').fit(table.assign(conf=table.conf.where(table.index % 2 == 0))).predict(new.assign(conf=new.conf.where(new.index > 3)))
    assert (p[:4] == pytest.approx(table.oa.mean())) and srocc(new.oa[4:], p[4:]) > 0.8


def test_an_absent_column_is_named_in_fit_and_predict(table):
    with pytest.raises(SchemaError, match='nope'): ColumnBaseline('nope').fit(table)
    with pytest.raises(SchemaError, match='conf'): ColumnBaseline('conf').fit(table).predict(table.drop(columns='conf'))


def test_means_are_means(table, new):
    p = MeanBaseline().fit(table).predict(new)
    wanted = new.merge(table.groupby(['dataset', 'method']).oa.mean().rename('mean').reset_index(), on=['dataset', 'method'], how='left')['mean']
    assert np.allclose(p, wanted) and MeanBaseline(()).fit(table).predict(new[:2]).tolist() == [table.oa.mean()] * 2
    assert np.allclose(MeanBaseline(('method',)).fit(table).predict(new), new.method.map(table.groupby('method').oa.mean()))


@pytest.mark.parametrize('change', [dict(dataset='elsewhere'), dict(method='m9')])
def test_the_unseen_falls_back(change, table, new):
    assert np.allclose(MeanBaseline().fit(table).predict(new.assign(**change)), table.oa.mean())
    for learner in ('ridge', 'boosting'): assert np.isfinite(BlockBaseline(('own', 'peers', 'prior'), learner).fit(table).predict(new.assign(**change))).all()


@pytest.mark.parametrize('blocks', [('own',), ('peers',), ('prior',), ('own', 'peers', 'prior')])
@pytest.mark.parametrize('learner', ['ridge', 'boosting'])
def test_blocks_learn(blocks, learner, table, new):
    m = BlockBaseline(blocks, learner).fit(table)
    assert srocc(new.oa, m.predict(new)) > 0.4 and np.array_equal(clone(m).fit(table).predict(new), m.predict(new))


def test_an_unseen_method_has_no_column_of_its_own(table):
    x = BlockBaseline(('prior',)).fit(table)._x(table.assign(method='m9'))
    assert x.shape == (len(table), 3 + 3) and not x[:, 3:].any()


def test_trees_are_reproducible(table):
    m = BlockBaseline(('own',), 'trees', seed=3)
    assert np.array_equal(clone(m).fit(table).predict(table), m.fit(table).predict(table))


def test_an_unknown_learner_or_block_is_named(table):
    with pytest.raises((KeyError, ValueError), match='forest'): BlockBaseline(learner='forest', blocks=('own',)).fit(table)
