"""The plots for error analysis hold hand-computed numbers, use the axes they get, refuse unusable tables,
and draw the committed ones."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from rssqa.viz import plots
from rssqa.core import BadImage, Incompatible, SchemaError, UnknownName

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tiny(): # two images x two methods in each of two datasets
    columns = dict(
        dataset=['a'] * 4 + ['b'] * 4,
        image_id=['i1', 'i1', 'i2', 'i2', 'i3', 'i3', 'i4', 'i4'],
        scene=list('ssttuuvv'),
        method=['m', 'n'] * 4,
        conf=[0.9, 0.9, 0.9, 0.9, 0.4, 0.4, 0.4, 0.4],
        oa=[0.9, 0.8, 0.6, 0.7, 0.5, 0.4, 0.5, 0.6],
        predicted=[0.9, 0.7, 0.8, 0.6, 0.5, 0.3, 0.4, 0.5],
        confusion=[[3, 1, 0, 4]] * 8,
    )
    return pd.DataFrame(columns)


DRAW = (plots.plot_ranking, plots.plot_choices, plots.plot_cells, plots.plot_confidence, plots.plot_classes,
        plots.plot_residuals)


def texts(ax): return ' '.join(text.get_text() for text in ax.texts)


@pytest.mark.parametrize('plot', DRAW)
def test_plots_use_the_axes_they_get(tiny, plot):
    ax = Figure().subplots()
    shown = plot(tiny, ax=ax)
    assert shown.ax_ is ax
    assert shown.figure_ is ax.figure
    assert 'n = ' in texts(ax)
    assert shown._repr_png_()
    one = plot(tiny.head(1))
    assert one._repr_png_() and len(one.data_)
    with pytest.raises(SchemaError, match='empty'): plot(tiny.head(0))
    with pytest.raises(SchemaError, match='no column'): plot(tiny[['image_id']])


@pytest.mark.parametrize('name', ['$x_', 'x' * 80, r'\frac{ %s {0}'])
def test_names_are_never_formulas(tiny, name):
    t = tiny.replace({'dataset': {'a': name}, 'method': {'m': name}, 'scene': {'s': name}})
    for plot in DRAW: assert plot(t)._repr_png_()


def test_missing_numbers_are_counted(tiny):
    tiny.loc[0, 'predicted'] = np.nan
    for plot in (plots.plot_cells, plots.plot_residuals):
        assert '1 without numbers left out' in texts(plot(tiny).ax_)
    # no recommendation where a prediction is missing
    assert 'recommended' not in plots.method_regrets(tiny).index
    assert plots.choice_table(tiny).attrs['n'] == 3


def test_regret_by_hand(tiny):
    t = plots.method_regrets(tiny)
    assert np.isclose(t.regret['m'], (0 + 0.1 + 0 + 0.1) / 4)
    assert np.isclose(t.regret['n'], (0.1 + 0 + 0.1 + 0) / 4)
    assert np.isclose(t.regret['recommended'], 0.1 / 4)
    assert t.near_best['recommended'] == 0.75
    assert t['rank']['m'] == 1.5
    assert (t.n == 4).all()
    with pytest.raises(SchemaError, match='every method'): plots.method_regrets(tiny.iloc[[0, 3]])
    perfect = plots.method_regrets(tiny.assign(predicted=tiny.oa))
    assert perfect.index[0] == 'recommended' and perfect.regret.iloc[0] == 0 and perfect['rank'].iloc[0] == 1


def test_choices_by_hand(tiny):
    t = plots.choice_table(tiny)
    assert t.loc['m', 'm'] == 2 and t.loc['n', 'm'] == 1 and t.loc['n', 'n'] == 1
    assert t.attrs['top1'] == 0.75
    assert np.isclose(t.attrs['regret'], 0.025)
    tied = plots.choice_table(tiny.assign(oa=.5, predicted=.5))
    assert np.allclose(tied, 1) and np.isclose(tied.to_numpy().sum(), 4)
    assert tied.attrs['top1'] == 1 and tied.attrs['regret'] == 0
    assert np.array_equal(plots.choice_table(tiny.sample(frac=1, random_state=0)), t)


def test_cells_by_hand(tiny):
    assert np.isclose(plots.plot_cells(tiny).data_.loc['m', 'a'], 0.1)
    assert np.isclose(plots.plot_cells(tiny, 'bias').data_.loc['n', 'a'], -0.1)
    worse = tiny.assign(image_id=tiny.image_id + 'x', oa=tiny.oa - 0.3)
    monotone = pd.concat([tiny, worse]).assign(predicted=lambda t: t.oa**2)
    assert np.isclose(plots.plot_cells(monotone, 'srocc').data_.loc['m', 'a'], 1)
    assert np.isnan(plots.plot_cells(tiny, 'srocc').data_.loc['m', 'a'])  # two images make no correlation
    with pytest.raises(UnknownName, match='mae'): plots.plot_cells(tiny, 'mea')


def test_confidence_by_hand(tiny):
    t = plots.plot_confidence(tiny).data_
    assert np.isclose(t.confidence['a'], 0.9)
    assert np.isclose(t.oa['a'], 0.75)
    assert np.isclose(t.gap['a'], 0.15)
    assert t.share_over['a'] == 0.75 and t.share_over['b'] == 0
    assert list(plots.plot_confidence(tiny, by='method').data_.index) == ['m', 'n']


def test_class_quality_by_hand(tiny):
    t = plots.class_quality(tiny, ['ground', 'roof'])
    assert np.isclose(t.loc['ground', 'm'], 3 / 4)
    assert np.isclose(t.loc['roof', 'm'], 4 / 5)
    assert np.isclose(t.attrs['share']['ground'], 0.5)
    assert np.isclose(t.attrs['oa']['n'], 7 / 8)
    absent = tiny.assign(confusion=[[3, 1, 0, 0]]*8)
    assert np.isnan(plots.class_quality(absent).loc[1, 'm'])
    assert len(plots.plot_classes(absent).ax_.get_yticklabels()) == 1
    with pytest.raises(Incompatible, match='3 names and 2 classes'): plots.class_quality(tiny, list('xyz'))
    with pytest.raises(Incompatible, match=r'\[1, 2\] classes'):
        plots.class_quality(tiny.assign(confusion=[[3, 1, 0, 4]]*7 + [[1]]))


def test_learning_rows_read_names():
    names = ['RS-SQA @ 0.5', 'RS-SQA @ 0.25', 'without a share']
    board = pd.DataFrame(dict(predictor=names, mae=[0.1, 0.2, 0.9])).set_index('predictor')
    rows = plots.learning_rows(board, pd.DataFrame(dict(predictor=['RS-SQA', 'other'], mae=[.05, .07])))
    expected = [['RS-SQA', 0.5, 0.1], ['RS-SQA', 0.25, 0.2], ['RS-SQA', 1.0, 0.05]]
    assert rows[['name', 'share', 'mae']].values.tolist() == expected
    data = plots.plot_learning(pd.concat([rows, rows.assign(mae=rows.mae + .02)])).data_
    assert np.allclose(data['mean'], [0.21, 0.11, 0.06])
    assert np.allclose(data.low, [0.2, 0.1, 0.05])
    assert np.allclose(data.high, [0.22, 0.12, 0.07])
    assert (data.n == 2).all()
    assert data.share.is_monotonic_increasing
    with pytest.raises(SchemaError, match="xpected names such as"): plots.learning_rows(board.tail(1))
    ax = plots.plot_learning(rows.assign(gsd_m=rows.share, mean_oa=rows.mae), x='gsd_m', measure='mean_oa').ax_
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('GSD (m)', 'mean OA')
    with pytest.raises(SchemaError, match='no column scenes'): plots.plot_learning(rows, x='scenes')


def test_degradation_by_hand(tiny):
    blurred = dict(image_id=['i1+blur0.5'] * 2, kind='blur', level=0.5, oa=[0.6, 0.4], predicted=[0.7, 0.5])
    damaged = tiny.head(2).assign(**blurred)
    both = plots.with_originals(damaged, tiny[['image_id', 'method', 'oa', 'predicted']])
    shown = plots.plot_degradation(both)
    data = shown.data_
    assert np.allclose(data.oa, [0.85, 0.5])
    assert np.allclose(data.predicted, [0.8, 0.6])
    assert list(data.level) == [0, 0.5]
    assert list(data.n) == [2, 2]
    assert 'largest drop: blur, 0.350' in texts(shown.ax_).replace('\n', ' ')
    assert 'predicted' not in plots.plot_degradation(both.drop(columns='predicted')).data_
    with pytest.raises(Incompatible, match='found no row|Found no row'):
        plots.with_originals(damaged, tiny.tail(2))


def test_scene_share_of_simulated_residuals():
    rng = np.random.default_rng(0)
    for share in (0, .3, .8):
        scene = np.arange(4000) // 20
        between = rng.normal(0, share**0.5, 200)[scene]
        inside = rng.normal(0, (1 - share) ** 0.5, 4000)
        assert abs(plots.scene_share(between + inside, scene) - share) < .07
    unequal = np.repeat(np.arange(60), rng.integers(1, 60, 60))
    residual = rng.normal(0, 0.7, 60)[unequal] + rng.normal(0, 0.7, len(unequal))
    assert abs(plots.scene_share(residual, unequal) - 0.5) < 0.15
    assert np.isnan(plots.scene_share([1, 2], ['a', 'a']))
    assert np.isnan(plots.scene_share([1, 2], ['a', 'b']))
    assert np.isnan(plots.scene_share(np.zeros(4), list('aabb')))


def test_residuals_by_hand(tiny):
    data = plots.plot_residuals(tiny).data_.set_index('scene')
    assert np.isclose(data['median']['s'], -0.05)
    assert np.isclose(data['mean']['t'], 0.05)
    assert (data.n == 2).all()
    assert len(plots.plot_residuals(tiny, most=2).ax_.get_yticklabels()) == 2
    assert len(plots.plot_residuals(tiny.drop(columns='dataset')).data_) == 4


def test_uncertainty_by_hand():
    truth = np.array([[0, 0, 255, 255], [1, 1, 1, 255]], np.uint8)
    mask = np.array([[0, 1, 1, 1], [1, 1, 0, 0]], np.uint8)
    image = np.full((3, 2, 4), .5, np.float32)
    colours = [(255, 0, 0), (0, 0, 255)]
    confidence = np.array([[.9, .4, .1, 0], [.8, .9, .85, 1]])
    row = plots.plot_uncertainty(image, truth, mask, confidence, colours).data_.iloc[0]
    assert np.isclose(row.oa, 3 / 5)
    assert np.isclose(row.auroc, 5 / 6)  # of 3 x 2 pairs one is the wrong way round
    assert np.isclose(row.right, 2.6 / 3)
    assert np.isclose(row.wrong, 0.625)
    right = plots.plot_uncertainty(image, truth, truth % 255, confidence, colours)
    assert np.isnan(right.data_.auroc[0])
    assert 'AUROC' not in right.ax_[3].get_title() and right._repr_png_()
    with pytest.raises(BadImage, match='one number a pixel'):
        plots.plot_uncertainty(image, truth, mask, confidence[:1], colours)


def test_committed_tables_are_drawn():
    columns = ['image_id', 'dataset', 'scene', 'method', 'oa', 'conf', 'confusion']
    sqed = pd.read_parquet(ROOT/'data/tables/open.parquet', columns=columns)
    shares = plots.class_quality(sqed[sqed.dataset == 'czech_ortho'])
    assert np.isclose(sum(shares.attrs['share'].values()), 1)
    assert plots.method_regrets(sqed).regret.min() > 0
    assert plots.plot_confidence(sqed).data_.n.sum() == 14_144
