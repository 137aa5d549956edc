"""Displays hold hand-computed numbers, claim nothing that was not measured, and use the axes they get."""
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure

from rssqa.viz import figures as viz
from rssqa.viz.columns import SIGNED_COLOURS
from rssqa.core import BadImage, Incompatible, SchemaError, UnknownName
from rssqa.segment.metrics import recommendation, single_best
from rssqa.viz.projection import project, separation


@pytest.fixture
def tiny(): # two images x two methods in each of two datasets; every number below follows from it by hand
    columns = dict(
        dataset=['a'] * 4 + ['b'] * 4,
        image_id=['i1', 'i1', 'i2', 'i2', 'i3', 'i3', 'i4', 'i4'],
        scene=list('ssttuuvv'),
        method=['m', 'n'] * 4,
        oa=[0.9, 0.8, 0.6, 0.7, 0.5, 0.4, 0.5, 0.6],
        predicted=[0.9, 0.7, 0.8, 0.6, 0.5, 0.3, 0.4, 0.5],
    )
    return pd.DataFrame(columns)


def toy(n=60, seed=0, methods=4):
    rng = np.random.default_rng(seed)
    i, m = np.divmod(np.arange(n * methods), methods)
    difficulty = 0.05 * rng.normal(size=n)[i]
    interaction = 0.02 * rng.normal(size=(n, methods))[i, m]
    oa = np.clip(np.array([0.8, 0.7, 0.9])[i % 3] - difficulty + interaction, 0, 1)
    columns = dict(
        dataset=np.array(list('abc'))[i % 3],
        image_id=[f'i{k}' for k in i],
        scene=[f's{k // 6}' for k in i],
        method=[f'm{k}' for k in m],
        oa=oa,
        predicted=np.clip(oa + 0.02 * rng.normal(size=len(oa)), 0, 1),
    )
    return pd.DataFrame(columns)


def note(shown): return shown.ax_.texts[0].get_text()  # the line under the title


# numbers behind the figures

def test_scores_by_hand(tiny):
    s = viz.scores(tiny)
    assert np.isclose(s['mae'], (0 + 0.1 + 0.2 + 0.1 + 0 + 0.1 + 0.1 + 0.1) / 8)
    assert np.isclose(s['bias'], (0 - 0.1 + 0.2 - 0.1 + 0 - 0.1 - 0.1 - 0.1) / 8)
    # two methods make no rank correlation
    assert (s['n_rows'], s['n_images']) == (8, 4) and np.isnan(s['srocc_image'])
    assert viz.scores(toy().assign(predicted=lambda t: t.oa))['srocc_image'] == pytest.approx(1)


def test_a_difference_is_drawn_around_zero_with_words():
    emb = pd.DataFrame(dict(u=[0., 1, 2, 3], v=[0., 0, 1, 1], gap=[-.2, 0, .1, np.nan]))
    for many in (emb, pd.concat([emb] * 3)):
        shown = viz.plot_embedding(many, 'gap', max_points=5)
        words = [text.get_text() for ax in shown.figure_.axes for text in ax.texts]
        assert 'under-predicted' in words and 'over-predicted' in words
    marks = viz.plot_embedding(emb, 'gap').ax_.collections[0]
    assert marks.get_clim() == (-.2, .2)
    assert np.allclose(marks.cmap(marks.norm(0.))[:3], to_rgb(SIGNED_COLOURS[4]), atol=.01)


def test_follow_by_hand(tiny):
    out = viz.follow(tiny)
    assert list(out.index) == ['a', 'b', 'all'] and list(out.n_images) == [2, 2, 4]
    a, b, both = (out.loc[i] for i in out.index)
    assert a.always == 'm' and a.top1 == 0.5
    assert np.allclose([a.always_oa, a.picked_oa, a.oracle_oa, a.gap_closed], [0.75, 0.75, 0.8, 0])
    assert b.top1 == 1
    assert np.allclose([b.random_oa, b.picked_oa, b.oracle_oa, b.gap_closed], [0.5, 0.55, 0.55, 1])
    assert np.isclose(both.picked_oa, .65) and np.isclose(both.regret, .025)


def test_follow_agrees_with_metrics():
    t = toy(30)
    for_training = t.image_id.isin([f'i{k}' for k in range(15)])
    train, test = t[for_training], t[~for_training]
    figures = viz.follow(test, always=single_best(train)).loc['all']
    metrics = recommendation(test, single_best(train))
    for name in ('top1', 'regret', 'gap_closed'): assert np.isclose(figures[name], metrics[name])
    assert figures.n_images == metrics['images']


def test_follow_names_the_single_method(tiny):
    assert (viz.follow(tiny, always='n').always == 'n').all()
    with pytest.raises(UnknownName, match='unet'): viz.follow(tiny.replace({'m': 'unet'}), always='unte')
    incomplete = tiny.drop(index=[0])
    assert viz.follow(incomplete).loc['a', 'n_images'] == 1                # i1 lacks a method
    with pytest.raises(SchemaError, match='No image has a row for every method'):
        viz.follow(tiny.iloc[[0, 3]])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(3, 9), methods=st.integers(2, 5))
def test_no_choice_beats_the_oracle(seed, n, methods):
    out = viz.follow(toy(n, seed, methods))
    assert (out.picked_oa <= out.oracle_oa + 1e-12).all()
    assert (out.always_oa <= out.oracle_oa + 1e-12).all()
    assert (out.random_oa <= out.always_oa + 1e-12).all()
    assert (out.gap_closed.dropna() <= 1 + 1e-9).all()
    assert np.allclose(out.regret, out.oracle_oa - out.picked_oa)


def test_method_shares_split_ties(tiny):
    tied = tiny.assign(oa=[.9, .9, .6, .7, .5, .4, .5, .6])
    shares = viz.method_shares(tied)
    assert np.isclose(shares.best['m'], 1.5 / 4)
    assert np.isclose(shares.best['n'], 2.5 / 4)
    assert np.isclose(shares.recommended['m'], 3 / 4)
    assert 'recommended' not in viz.method_shares(tied.drop(columns='predicted'))


def test_best_rows_know_directions():
    t = pd.DataFrame({'mae': [.1, .05, .05], 'top1': [.3, np.nan, .2]}, index=list('xyz'))
    assert viz.best_rows(t, 'mae').tolist() == [False, True, True]
    assert viz.best_rows(t, 'top1').tolist() == [True, False, False]


# displays

PLOTS = (viz.plot_predicted_true, viz.plot_calibration, viz.plot_recommendation, viz.plot_methods)


def test_displays_hold_what_they_draw(tiny):
    shown = viz.plot_predicted_true(tiny)
    assert sorted(shown.data_.oa) == sorted(tiny.oa)
    assert 'n = 8 maps of 4 images' in note(shown)
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in shown.ax_.collections])
    assert {tuple(np.round(p, 6)) for p in drawn} == {(p, t) for p, t in zip(tiny.predicted, tiny.oa)}
    bins = viz.plot_calibration(tiny, bins=2).data_
    assert list(bins.n) == [4, 4]
    assert np.allclose(bins.predicted, [0.425, 0.75])
    assert np.allclose(bins.true, [0.5, 0.75])
    means = viz.plot_methods(tiny).data_
    assert np.isclose(means.loc['m', 'a'], .75) and np.isclose(means.loc['n', 'b'], .5)
    assert np.isclose(viz.plot_recommendation(tiny, baseline='oa').data_.gap_closed_oa['all'], 1)


def test_displays_use_the_axes_they_get(tiny):
    fig = Figure()
    for ax, plot in zip(fig.subplots(2, 2).ravel(), PLOTS):
        shown = plot(tiny, ax=ax)
        assert shown.ax_ is ax and shown.figure_ is fig
    assert shown._repr_png_().startswith(b'\x89PNG')


def test_pyplot_figures_are_not_shown_twice(tiny):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    assert viz.plot_calibration(tiny, ax=ax)._repr_png_() is None
    plt.close(fig)
    before = plt.get_fignums()
    viz.plot_calibration(tiny)
    assert plt.get_fignums() == before


def test_missing_predictions_are_counted(tiny):
    tiny.loc[[0, 5], 'predicted'] = np.nan
    assert '2 without numbers left out' in note(viz.plot_predicted_true(tiny))
    for plot in (viz.plot_predicted_true, viz.plot_calibration, viz.plot_recommendation):
        with pytest.raises(SchemaError, match='missing in all 8 rows'): plot(tiny.assign(predicted=np.nan))
        with pytest.raises(SchemaError, match='empty'): plot(tiny.head(0))
        with pytest.raises(SchemaError, match='no column predicted|no column'): plot(tiny.drop(columns='oa'))


def test_one_point_one_dataset(tiny):
    one = tiny.head(1)
    for plot in PLOTS: assert plot(one)._repr_png_()
    assert np.isnan(viz.follow(one).gap_closed).all()             # one method leaves no gap
    emb = project(np.ones((1, 3)), table=one)
    assert 'too few' in note(viz.plot_embedding(emb)).replace('\n', ' ')


def test_embedding_claims_nothing_without_numbers():
    t = toy(30).drop_duplicates('image_id').reset_index(drop=True)
    x = np.random.default_rng(0).normal(size=(30, 4))
    emb = project(x, 'pca', table=t)
    plain = viz.plot_embedding(emb)
    measured = viz.plot_embedding(emb, numbers=separation(x, t.oa, t.dataset, t.scene))
    assert 'not measured' in note(plain) and 'skill' in note(measured)


def test_colours_of_an_embedding():
    t = toy(30).drop_duplicates('image_id').reset_index(drop=True)
    emb = project(np.random.default_rng(0).normal(size=(30, 4)), 'pca', table=t)
    assert viz.plot_embedding(emb).ax_.collections[0].get_clim() == (0, 1)
    assert len(viz.plot_embedding(emb, 'dataset').ax_.collections) == 3
    low, high = viz.plot_embedding(emb.assign(error=emb.oa * 40 - 20), 'error').ax_.collections[0].get_clim()
    assert low < 0 or high > 1
    with pytest.raises(SchemaError, match='no column quality'): viz.plot_embedding(emb, 'quality')
    legend = viz.plot_embedding(emb.assign(oa=np.nan)).ax_.get_legend()
    assert legend.get_texts()[0].get_text() == 'unknown (30)'
    assert '1 without OA' in note(viz.plot_embedding(emb.assign(oa=[np.nan, *emb.oa[1:]])))


def test_many_points_become_density():
    n = 120_000
    rng = np.random.default_rng(0)
    columns = dict(u=rng.normal(size=n), v=rng.normal(size=n), oa=rng.random(n))
    emb = pd.DataFrame(columns).assign(dataset=rng.choice(['a', 'b'], n, p=[0.9, 0.1]))
    emb.attrs['of'] = 200_000
    shown = viz.plot_embedding(emb)
    assert shown.data_.n.sum() == n
    assert len(shown.data_) < 110**2
    assert '120,000 of 200,000' in note(shown) and 'density' in note(shown)
    assert len(viz.plot_embedding(emb, max_points=n).data_) == n  # points on request
    assert np.isclose((shown.data_.n * shown.data_.oa).sum() / n, emb.oa.mean())
    named = viz.plot_embedding(emb, 'dataset')
    assert (named.data_[named.data_.n > 30].dataset == 'a').all()
    assert named.ax_.get_legend().get_texts()[0].get_text().startswith('a (10')
    assert len(shown._repr_png_()) < 60_000


def test_density_by_hand():
    emb = pd.DataFrame(dict(u=[0, 0.1, 1, 1.0], v=[0, 0, 1, 1.0], oa=[0.2, 0.4, 0.9, np.nan]))
    emb['kind'] = ['x', 'y', 'y', None]
    cells = viz.plot_embedding(emb, max_points=2, cells=2).data_
    assert list(cells.n) == [2, 2] and np.allclose(cells.oa, [.3, .9]) and np.allclose(cells.u, [.25, 1.25])
    # ties: the first name
    assert list(viz.plot_embedding(emb, 'kind', max_points=2, cells=2).data_.kind) == ['x', 'unknown']
    assert viz.plot_embedding(emb.assign(oa=np.nan), max_points=2)._repr_png_()
    one_place = viz.plot_embedding(emb.assign(u=1.0, v=1.0), max_points=2)
    assert one_place.data_.n.tolist() == [4]


def test_branches_carry_their_numbers():
    t = toy(40).drop_duplicates('image_id').reset_index(drop=True)
    rng = np.random.default_rng(0)
    views = {
        'semantic': rng.normal(size=(40, 5)),
        'fused': np.c_[t.groupby('dataset').oa.rank(), rng.normal(size=40)],
    }
    shown = viz.compare_branches(views, t, method='pca', k=5)
    assert list(shown.data_.index) == list(views) and len(shown.ax_) == 2 and shown._repr_png_()
    for ax, row in zip(shown.ax_, shown.data_.itertuples()):
        assert f'skill {row.skill:.2f}' in ax.get_xlabel()
        assert f'probe {row.probe_accuracy:.0%}' in ax.get_xlabel()
    ranks = np.concatenate([c.get_array() for c in shown.ax_[0].collections])
    assert np.isclose(ranks.max(), 1) and len(ranks) == 40
    assert shown.data_.skill['fused'] > .5 > shown.data_.skill['semantic'] + .2
    by_oa = viz.compare_branches(views, t, 'oa', 'pca')
    assert [ax.get_ylabel() for ax in by_oa.figure_.axes][-1] == 'OA'
    fig = Figure()
    by_dataset = viz.compare_branches(views, t, 'dataset', 'pca', axes=fig.subplots(1, 2))
    assert by_dataset.figure_ is fig
    assert [x.get_text() for x in by_dataset.ax_[-1].get_legend().get_texts()] == ['a', 'b', 'c']
    few = viz.compare_branches({'few': views['semantic'][:4]}, t.head(4), method='pca')
    assert 'cannot be measured' in few.ax_[0].get_xlabel()
    with pytest.raises(SchemaError, match='no column season'): viz.compare_branches(views, t, 'season')
    with pytest.raises(Incompatible, match='40 feature rows and 39'): viz.compare_branches(views, t.head(39))


@pytest.mark.parametrize('name', ['$x_', '<script>', 'x' * 80, 'ünï – 航空', r'\frac{', '$', '%s {0}'])
def test_names_are_never_formulas(tiny, name):
    t = tiny.replace({'dataset': {'a': name}, 'method': {'m': name}})
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*[Gg]lyph.*')
        for plot in (viz.plot_predicted_true, viz.plot_recommendation, viz.plot_methods):
            assert plot(t)._repr_png_()


DEUTERANOPIA = [[.367, .861, -.228], [.280, .673, .047], [-.012, .043, .969]]
PROTANOPIA = [[.152, 1.053, -.205], [.115, .786, .099], [-.004, -.048, 1.052]]


@pytest.mark.parametrize('matrix', [DEUTERANOPIA, PROTANOPIA], ids=['deuteranopia', 'protanopia'])
def test_palette_survives_colour_blindness(matrix):
    from matplotlib.colors import to_rgb
    rgb = np.array([to_rgb(c) for c in viz.PALETTE])
    observed = np.clip(rgb @ np.array(matrix).T, 0, 1)
    difference = np.abs(observed[:, None] - observed[None]).sum(-1)
    assert difference[~np.eye(8, dtype=bool)].min() > .14
    assert len(set(viz.MARKERS)) == len(viz.PALETTE) == 8


def test_style_is_changed_only_on_request(tiny):
    import matplotlib
    with matplotlib.rc_context():
        before = dict(matplotlib.rcParams)
        viz.plot_methods(tiny)
        assert dict(matplotlib.rcParams) == before
        viz.set_style()
        assert matplotlib.rcParams['figure.dpi'] == 80


# comparisons and cases

def test_comparison_orders_by_the_first_metric():
    t = pd.DataFrame(
        {'mae': [0.1, 0.2], 'srocc_image': [0.3, 0.6], 'gap_closed': [-0.2, np.nan]},
        index=['RS-SQA', 'baseline'],
    )
    shown = viz.plot_comparison(t)
    assert list(shown.data_.index) == ['baseline', 'RS-SQA'] and len(shown.ax_) == 3
    with pytest.raises(SchemaError, match='columns among'): viz.plot_comparison(t[[]])
    assert viz.plot_comparison(t.head(1))._repr_png_()


@pytest.fixture
def case():
    truth = np.array([[0, 0, 0, 1, 1], [0, 0, 255, 1, 1]], np.uint8)
    return dict(
        image=np.full((3, 2, 5), 0.5, np.float32),
        truth=truth,
        mask=np.array([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]], np.uint8),
        palette=[(255, 0, 0), (0, 0, 255)],
    )


def test_case_by_hand(case):
    panels = viz.case_panels(case['image'], case['mask'], case['palette'], case['truth'])
    assert list(panels) == ['image', 'truth', 'map', 'error']
    assert all(panel.shape == (2, 5, 3) and panel.dtype == np.uint8 for panel in panels.values())
    wrong = (panels['error'] == viz.WRONG).all(-1)
    assert np.argwhere(wrong).tolist() == [[0, 2], [1, 4]]
    assert tuple(panels['error'][1, 2]) == viz.IGNORED == tuple(panels['truth'][1, 2])
    assert tuple(panels['map'][0, 0]) == (255, 0, 0)
    assert viz.case_oa(case['truth'], case['mask']) == 7 / 9
    data = viz.plot_case(case['image'], case['truth'], case['mask'], case['palette'], 'a $ case').data_
    assert np.allclose(data.map_share, [5 / 10, 5 / 10])
    assert np.allclose(data.truth_share, [5 / 9, 4 / 9])
    assert np.allclose(data.found, [4 / 5, 3 / 4])


def test_case_without_truth_claims_nothing(case):
    shown = viz.plot_case(case['image'], None, case['mask'], case['palette'])
    assert len(shown.ax_) == 2 and 'OA unknown' in shown.ax_[1].get_title() and 'found' not in shown.data_
    assert np.isnan(viz.case_oa(np.full((2, 2), 255), np.zeros((2, 2))))


def test_case_refuses(case):
    with pytest.raises(BadImage, match='map.*shape'):
        viz.case_panels(case['image'], case['mask'][:1], case['palette'])
    with pytest.raises(Incompatible, match='class id 1'):
        viz.case_panels(case['image'], case['mask'], case['palette'][:1])


def test_worst_is_one_map_an_image(tiny, case):
    rows = viz.worst(tiny, 3)
    assert rows.image_id.is_unique and rows.image_id.iloc[0] == 'i2'
    assert np.allclose(rows.error, [0.2, -0.1, -0.1])
    low = viz.worst(tiny, 2, by='oa')
    assert list(low.oa) == [.4, .5] and list(low.image_id) == ['i3', 'i4']
    shown = viz.plot_worst(tiny, lambda row: case, n=2)
    assert len(shown.ax_) == 8 and len(shown.data_) == 2 and shown._repr_png_()
    assert len(viz.plot_worst(tiny.head(2), lambda row: case | {'truth': None}).ax_) == 2
    with pytest.raises(UnknownName): viz.worst(tiny, by='eror')


def test_saved_figures(tiny, tmp_path):
    for suffix in ('png', 'svg', 'pdf'):
        assert viz.plot_calibration(tiny).save(tmp_path/f'c.{suffix}').stat().st_size > 1000


LIGHT = """
import sys
import rssqa.viz.figures, rssqa.viz.projection, rssqa.viz.report
heavy = {'matplotlib', 'umap', 'sklearn', 'jinja2', 'torch'} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_is_light():
    subprocess.run([sys.executable, '-c', LIGHT], check=True)
