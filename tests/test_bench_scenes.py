"""Scenes counted equally: against the bench itself, against hand-made sums, and what must not change them."""
import numpy as np
import pandas as pd
import pytest

from rssqa.bench.protocol import bootstrap
from rssqa.bench.scenes import COUNTED, MEASURES, measure_scenes
from rssqa.core import UnknownName
from rssqa.segment.metrics import srocc
from trained import numbers


@pytest.fixture(scope='module')
def table(): # two datasets, scenes of different sizes
    t = numbers(scenes=5, images=4)
    return t[~((t.scene == 's0') & t.image_id.str.endswith('-3'))].reset_index(drop=True)


@pytest.fixture(scope='module')
def predictions(table):
    fold = pd.factorize(table.scene)[0] % 2
    rng = np.random.default_rng(0)
    noisy = table.oa + rng.normal(0, 0.02, len(table))
    return table[['image_id', 'method']].assign(seed=0, fold=fold, conf=table.conf, noisy=noisy)


@pytest.fixture(scope='module')
def measured(table, predictions):
    return measure_scenes(table, predictions, draws=40).set_index(['predictor', 'counted', 'measure'])


def test_tiles_counted_equally_are_the_measures_of_the_bench(table, predictions, measured):
    known = [name for name in MEASURES if name != 'near_best']
    expected = bootstrap(table, predictions, 'conf', n=3, measures=tuple(known)).value
    for name in ('conf', 'noisy'):
        for measure in known: assert measured.value[name, 'tiles', measure] == pytest.approx(expected[name, measure])


def test_scenes_counted_equally_are_means_of_means(table, predictions, measured):
    rows = table.assign(predicted=predictions.noisy)
    error = (rows.oa - rows.predicted).abs().groupby([rows.dataset, rows.scene]).mean().mean()
    assert measured.value['noisy', 'scenes', 'mae'] == pytest.approx(error)
    order = rows.groupby(['dataset', 'scene', 'image_id']).apply(lambda g: srocc(g.oa, g.predicted))
    assert measured.value['noisy', 'scenes', 'srocc_image'] == pytest.approx(order.groupby(level=[0, 1]).mean().mean())


def test_near_best_counts_small_losses(table):
    exact = table[['image_id', 'method']].assign(seed=0, fold=0, exact=table.oa)
    single = measure_scenes(table, exact, train=table, draws=5).set_index(['counted', 'measure'])
    assert (single.value[:, 'near_best'] == 1).all() and (single.value[:, 'regret'] == 0).all()
    wrong = exact.assign(exact=-table.oa)
    measured = measure_scenes(table, wrong, train=table, draws=5).set_index(['counted', 'measure'])
    assert (measured.value[:, 'near_best'] < 1).all()


def test_more_tiles_of_a_scene_change_nothing_for_scenes(table, predictions, measured):
    again = (table.scene == 's1') & (table.dataset == 'd0')
    copies = table[again].assign(image_id=lambda t: t.image_id + 'x')
    more = predictions[again].assign(image_id=lambda p: p.image_id + 'x')
    both = measure_scenes(pd.concat([table, copies]), pd.concat([predictions, more]), draws=5)
    both = both.set_index(['predictor', 'counted', 'measure'])
    for measure in ('mae', 'srocc_image', 'near_best'):
        key = ('noisy', 'scenes', measure)
        assert both.value[key] == pytest.approx(measured.value[key])
    assert both.value['noisy', 'tiles', 'mae'] != pytest.approx(measured.value['noisy', 'tiles', 'mae'], abs=1e-9)


def test_the_most_influential_scene_is_the_one_without_which_the_value_is_that(table, predictions, measured):
    row = measured.loc['conf', 'tiles', 'mae']
    dataset, scene = row.scene.split('/')
    kept = ~((table.dataset == dataset) & (table.scene == scene))
    assert row.without == pytest.approx((table.oa - predictions.conf)[kept].abs().mean())
    assert row.share == pytest.approx(1 - kept.mean())
    others = [(table.oa - predictions.conf)[table.scene != s].abs().mean() for s in table.scene.unique()]
    assert abs(row.without - row.value) > 0 and len(others) == 5


def test_the_jackknife_of_a_mean_is_its_standard_error():
    t = numbers(datasets=1, scenes=30, images=1)
    predictions = t[['image_id', 'method']].assign(seed=0, fold=0, conf=t.conf)
    row = measure_scenes(t, predictions, train=t, draws=5).set_index(['counted', 'measure']).loc['tiles', 'mae']
    error = (t.oa - t.conf).abs().groupby(t.scene).mean()
    assert row.jackknife == pytest.approx(error.std() / np.sqrt(30), rel=0.02)


def test_rows_and_names(table, predictions, measured):
    assert len(measured) == 2 * len(COUNTED) * len(MEASURES) and (measured.scenes == 10).all()
    assert (measured.low <= measured.high).all()
    with pytest.raises(UnknownName, match='conf'): measure_scenes(table, predictions, ['confi'])


def test_differences_are_taken_on_the_same_draws(table, predictions):
    shifted = predictions.assign(same=predictions.noisy, better=(predictions.noisy + table.oa) / 2)
    rows = measure_scenes(table, shifted, draws=60, reference='better')
    rows = rows.set_index(['predictor', 'counted', 'measure'])
    mae = rows.xs('mae', level='measure')
    assert (mae.loc['better', ['delta', 'delta_low', 'delta_high']] == 0).all(axis=None)
    for counted in COUNTED:                                    # half the error in every scene: surely better
        assert mae.delta['noisy', counted] == pytest.approx(-mae.value['noisy', counted] / 2)
        assert mae.delta_low['noisy', counted] <= mae.delta['noisy', counted] <= mae.delta_high['noisy', counted] < 0
        spread = mae.delta_high['noisy', counted] - mae.delta_low['noisy', counted]
        assert spread < mae.high['noisy', counted] - mae.low['noisy', counted]
    pd.testing.assert_series_equal(rows.delta['same'], rows.delta['noisy'])
    assert 'delta' not in measure_scenes(table, shifted, draws=5)
    with pytest.raises(UnknownName, match='bettr'): measure_scenes(table, shifted, draws=5, reference='bettr')
    with pytest.raises(UnknownName, match='reference'):           # it must be among the measured ones
        measure_scenes(table, shifted, ['same', 'noisy'], draws=5, reference='better')
