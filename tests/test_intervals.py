"""Intervals that count scenes: against crepes, the definition, and data whose coverage is known in closed form."""
import json, warnings
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from crepes import ConformalRegressor
from hypothesis import given, settings, strategies as st
from scipy.stats import norm
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from rssqa.quality.intervals import (
    Intervals, ShiftCheck, coverage, cross_intervals, expect_errors, load_intervals, row_intervals,
    save_intervals, scene_quantile, scenes_needed,
)
from rssqa.core import DataNotFound, Incompatible, LeakError, SchemaError

FEATURES = list('abcd')
# rows in a scene, standard deviation of its common error; standard deviation of a row's own error
SMALL = (1, 0.03)
LARGE = (12, 0.01)
NOISE = 0.005


def clustered(scenes=40, seed=0, datasets=1, drift=0.0) -> pd.DataFrame:
    "Scenes, half small with large errors, half large with small ones; features a..d; `hard` tells which."
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, scenes)
    rows = np.where(kind, LARGE[0], SMALL[0])
    sd = np.where(kind, LARGE[1], SMALL[1])
    error = rng.normal(0, sd)
    scene_type = rng.normal(drift, 1, (scenes, len(FEATURES)))
    s = np.repeat(np.arange(scenes), rows)
    oa = rng.uniform(0.5, 0.8, len(s))
    t = pd.DataFrame(dict(
        image_id=[f'i{i}' for i in range(len(s))],
        dataset=[f'd{i % datasets}' for i in s],
        scene=[f's{i // datasets}' for i in s],
        method=[f'm{i % 3}' for i in range(len(s))],
        oa=oa,
        predicted=oa + error[s] + rng.normal(0, NOISE, len(s)),
        hard=sd[s],
    ))
    features = scene_type[s] + rng.normal(0, 0.2, (len(s), len(FEATURES)))
    return t.join(pd.DataFrame(features, columns=FEATURES))


def by_scene(t, k=4) -> np.ndarray:  # folds that have scenes of every dataset
    return pd.factorize(t.scene)[0] % k


def true_coverage(q) -> float: # of a random row of a new scene of `clustered`, in closed form
    return np.mean([2 * norm.cdf(q / np.hypot(sd, NOISE)) - 1 for _, sd in (SMALL, LARGE)])


@pytest.fixture(scope='module')
def known(): return clustered(80, 1, 2)


@pytest.fixture(scope='module')
def new(): return clustered(60, 2, 2)


@pytest.fixture(scope='module')
def fitted(known): return Intervals().fit(known, known[FEATURES])


# ---------------------------------------------------------------- the quantile

def by_definition(score, scene, confidence): # exact fractions, no sorting tricks
    rows = {s: scene.count(s) for s in scene}
    for t in sorted(score):
        below = sum((Fraction(1, rows[s]) for r, s in zip(score, scene) if r <= t), Fraction())
        if below >= confidence * (len(rows) + 1): return t
    return np.inf


SCORES_AND_SCENES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(SCORES_AND_SCENES, st.sampled_from(['0.5', '0.6', '0.75', '0.8', '0.9']))
def test_quantile_meets_its_definition(pairs, confidence):
    score, scene = map(list, zip(*pairs))
    expected = by_definition(score, scene, Fraction(confidence))
    assert scene_quantile(score, scene, float(confidence)) == expected


@pytest.mark.parametrize('confidence', [0.5, 0.7, 0.8, 0.9, 0.95, 0.99])
def test_quantile_of_single_rows_is_the_textbook_one(confidence):
    rng = np.random.default_rng(0)
    for n in (*range(1, 25), 99, 100, 101, 999):
        r = rng.exponential(size=n)
        k = int(np.ceil(round(confidence * (n + 1), 9)))
        assert scene_quantile(r, range(n), confidence) == (np.sort(r)[k - 1] if k <= n else np.inf)
        assert np.isfinite(scene_quantile(r, range(n), confidence)) == (n >= scenes_needed(confidence))


def test_copies_names_and_order_do_not_matter():
    rng = np.random.default_rng(3)
    r = rng.exponential(size=90)
    s = np.sort(rng.integers(0, 30, 90))
    at = rng.permutation(90)
    times = 1 + s % 4
    q = scene_quantile(r, s)
    assert q == scene_quantile(r[at], s[at])
    assert q == scene_quantile(r, [f'scene {29 - i}' for i in s])
    assert q == scene_quantile(np.repeat(r, times), np.repeat(s, times))


# ---------------------------------------------------------------- coverage over many calibration sets

@pytest.mark.parametrize('scenes', [12, 19, 60])
def test_coverage_by_scene_reaches_its_level_and_by_row_does_not(scenes):
    sets = [clustered(scenes, seed) for seed in range(120)]
    errors = [((t.oa - t.predicted).abs().to_numpy(), t.scene.to_numpy()) for t in sets]
    per_scene = np.array([true_coverage(scene_quantile(r, s)) for r, s in errors])
    per_row = np.array([true_coverage(scene_quantile(r, range(len(r)))) for r, _ in errors])
    se = per_scene.std() / len(sets)**0.5
    assert 0.9 - 3 * se < per_scene.mean() < 0.9 + 2 / (scenes + 1) + 3 * se
    assert per_row.mean() + 3 * per_row.std() / len(sets)**0.5 < 0.88


def test_coverage_of_single_rows_is_exact():
    # 0.9 * 20 is whole: the coverage is 18/20 on average, neither more nor less
    n = 19
    reached = []
    for seed in range(1000):
        score = np.abs(np.random.default_rng(seed).normal(size=n))
        reached.append(2 * norm.cdf(scene_quantile(score, range(n))) - 1)
    assert abs(np.mean(reached) - 0.9) < 3 * np.std(reached) / 1000**0.5


def test_each_dataset_with_its_own_bin_is_covered():
    reached = []
    for seed in range(40):
        t = clustered(60, seed, 2)
        t['predicted'] = t.oa + (t.predicted - t.oa) * np.where(t.dataset == 'd1', 3, 1)
        q = Intervals().fit(t).bins_['quantile']
        reached.append((true_coverage(q['d0']), true_coverage(q['d1'] / 3), true_coverage(q[''] / 3)))
    coverage0, coverage1, pooled = np.mean(reached, 0)
    # one quantile for both would fail the harder one
    assert 0.885 < coverage0 < 0.97 and 0.885 < coverage1 < 0.97 and pooled < 0.87


# ---------------------------------------------------------------- crepes

@pytest.mark.parametrize('n', [11, 37, 100, 998])
@pytest.mark.parametrize('confidence', [0.8, 0.9])
@pytest.mark.parametrize('by,difficulty', [('', ''), ('dataset', ''), ('', 'hard'), ('dataset', 'hard')])
def test_one_row_a_scene_equals_crepes(n, confidence, by, difficulty):
    rng = np.random.default_rng(n)
    dataset = rng.choice(['u', 'v'], n) if n > 90 else 'u'
    oa = rng.uniform(0.2, 0.9, n)
    t = pd.DataFrame(dict(dataset=dataset, scene=np.arange(n), oa=oa, hard=rng.exponential(size=n)))
    t['predicted'] = t.oa + rng.normal(0, 0.05, n)
    new = t.sample(min(n, 50), random_state=0).assign(predicted=lambda t: t.predicted + 0.01)
    def sigma(rows): return (rows.hard / t.hard.mean() + 0.5).to_numpy() if difficulty else None
    def bins(rows): return rows.dataset.to_numpy(str) if by else None
    crepes = ConformalRegressor().fit((t.oa - t.predicted).to_numpy(), sigma(t), bins(t))
    expected = crepes.predict_int(new.predicted.to_numpy(), sigma(new), bins(new), confidence - 1e-9, 0, 1)
    scenes = Intervals(confidence, by, difficulty, min_scenes=1).fit(t).predict(new)[['low', 'high']]
    rows = row_intervals(t, new, confidence, by, difficulty)
    assert np.abs(scenes - expected).to_numpy().max() < 1e-12
    assert np.abs(rows - expected).to_numpy().max() < 1e-12
    assert rows.index.equals(new.index) and rows.high.gt(rows.low).all()


def test_crepes_edges_are_mended(known, new):
    single = known.drop_duplicates(['dataset', 'scene'])[:9].assign(dataset='u')
    # nine rows are enough for 90 %
    nine = row_intervals(single, new, by='')
    assert (nine.high - nine.low).max() < 1
    # crepes alone gives an unknown bin 0..0
    elsewhere = row_intervals(known, new.assign(dataset='elsewhere'))
    assert elsewhere.equals(row_intervals(known, new, by='')) and elsewhere.high.min() > 0.3
    # too few: all there is
    assert row_intervals(single[:3], new, by='').eq([0.0, 1.0]).all().all()
    assert row_intervals(known, new.assign(predicted=np.nan)).isna().all().all()


def test_crepes_leaves_warnings_alone(known, new):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        before = list(warnings.filters)
        row_intervals(known[:3], new)
        assert warnings.filters == before


# ---------------------------------------------------------------- intervals

@pytest.mark.parametrize('options', [dict(), dict(by=''), dict(difficulty='hard'), dict(min_scenes=60)])
def test_wider_with_confidence(options, known, new):
    widths = []
    # 0.98: more than 40 scenes of one dataset allow
    for confidence in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.975, 0.98):
        bounds = Intervals(confidence, **options).fit(known).predict(new)
        widths.append(bounds.high - bounds.low)
    assert all((wide >= narrow - 1e-12).all() for narrow, wide in zip(widths, widths[1:]))
    assert (widths[-1] > widths[0]).all()


def test_bounds_are_shares_around_the_prediction(known, new):
    m = Intervals().fit(known)
    bounds = m.predict(new.assign(predicted=np.linspace(-0.05, 1.05, len(new))))
    assert bounds.low.between(0, 1).all() and bounds.high.between(0, 1).all()
    assert (bounds.low <= bounds.high).all() and (bounds.low == 0).any() and (bounds.high == 1).any()
    inside = m.predict(new)
    assert np.allclose((inside.low + inside.high) / 2, new.predicted)


def test_rows_without_prediction_are_refused(fitted, new):
    new = new.copy()
    new.loc[new.index[:3], 'predicted'] = [np.nan, np.inf, -np.inf]
    bounds = fitted.predict(new, new[FEATURES])
    refused = bounds.state.eq('refused')
    assert refused[:3].all() and bounds.reason[:3].eq('no prediction').all()
    assert bounds[['low', 'high']][:3].isna().all().all() and bounds.low[3:].notna().sum() > 0
    assert bounds.low.isna().equals(refused) and bounds.reason.ne('').equals(refused)


def test_rows_with_unknown_difficulty_or_features_are_refused(known, new):
    new = new.copy()
    features = new[FEATURES].to_numpy(copy=True)
    new.loc[new.index[0], 'hard'] = np.nan
    features[1, 2] = np.nan
    features[2, 0] = np.inf
    bounds = Intervals(difficulty='hard').fit(known, known[FEATURES]).predict(new, features)
    assert bounds.reason[:3].tolist() == ['difficulty unknown', 'features unknown', 'features unknown']
    assert bounds.state[:3].eq('refused').all() and bounds.low[:3].isna().all()


def test_calibration_rows_with_gaps_are_left_out(known, new):
    rows = known[:9]
    gaps = pd.concat([known, rows.assign(oa=np.nan), rows.assign(predicted=np.nan), rows.assign(hard=np.nan)])
    bounds = []
    for t in (known, gaps):
        m = Intervals(difficulty='hard').fit(t, t[FEATURES])
        bounds.append(m.predict(new, new[FEATURES])[['low', 'high', 'shift']])
    assert np.allclose(*bounds, equal_nan=True)
    # some features missing: the errors of these rows count, their features do not
    part = known[FEATURES].assign(a=known.a.mask(known.index % 7 == 0))
    with_gaps = Intervals().fit(known, part)
    assert np.allclose(with_gaps.bins_['quantile'], Intervals().fit(known).bins_['quantile'])


def test_unknown_and_small_datasets(known, new):
    few = known.scene.isin(known.scene.unique()[:12])
    hard = known[known.dataset == 'd1'].assign(predicted=lambda t: t.oa + 4 * (t.predicted - t.oa))
    m = Intervals().fit(pd.concat([known[known.dataset == 'd0'], hard[few[hard.index]]]))
    quantile = m.bins_['quantile']
    assert m.bins_.bin.to_dict() == {'': 'pooled', 'd0': 'own', 'd1': 'mixed'}
    assert m.bins_.scenes.to_dict() == {'': 52, 'd0': 40, 'd1': 12}
    assert quantile['d1'] > quantile[''] > quantile['d0']
    bounds = m.predict(new.assign(dataset='d9'))
    assert set(bounds.bin) == {'pooled'} and np.allclose((bounds.high - bounds.low) / 2, quantile[''])
    # too few scenes to claim a narrower one
    easy = Intervals().fit(pd.concat([hard, known[(known.dataset == 'd0') & few]]))
    assert easy.bins_['quantile']['d0'] == easy.bins_['quantile']['']


def test_scene_names_may_repeat_between_datasets(known):
    bins = Intervals().fit(known).bins_
    apart = known.assign(scene=known.dataset + known.scene)
    assert Intervals().fit(apart).bins_.equals(bins) and bins.scenes[''] == 80


def test_categories_and_frames_are_taken(known, new, fitted):
    kinds = dict.fromkeys(('dataset', 'scene', 'method', 'image_id'), 'category')
    m = Intervals().fit(known.astype(kinds), known[FEATURES].to_numpy(np.float64))
    bounds = m.predict(new.astype(kinds), new[FEATURES].to_numpy())
    assert bounds.equals(fitted.predict(new, new[FEATURES]))
    assert len(coverage(new.astype(kinds).join(bounds))) == 7
    assert Intervals(by='method').fit(known.astype(kinds)).predict(new.astype(kinds)).bin.eq('own').all()


def test_order_of_rows_does_not_matter(known, new, fitted):
    numbers = ['low', 'high', 'shift']
    words = ['state', 'bin', 'reason']
    bounds = fitted.predict(new, new[FEATURES])
    shuffled = known.sample(frac=1, random_state=1)
    asked = new.sample(frac=1, random_state=2)
    again = Intervals().fit(shuffled, shuffled[FEATURES]).predict(asked, asked[FEATURES])
    assert again.index.equals(asked.index)
    again = again.loc[new.index]
    assert again[words].equals(bounds[words])
    assert np.allclose(again[numbers], bounds[numbers], atol=1e-5, equal_nan=True)
    one = fitted.predict(new[5:6], new[FEATURES][5:6])
    assert np.allclose(one[numbers], bounds[numbers][5:6], atol=1e-5)
    assert fitted.predict(new[:0], new[FEATURES][:0]).empty


def test_difficulty_scales_and_pays(known, new):
    bounds = Intervals(difficulty='hard', by='').fit(known).predict(new)
    width = (bounds.high - bounds.low).groupby(new.hard).mean()
    scale = known.hard.mean()
    assert np.allclose(width[LARGE[1]] / width[SMALL[1]], (LARGE[1] / scale + 0.5) / (SMALL[1] / scale + 0.5))
    # its unit is free
    other_unit = Intervals(difficulty='hard', by='').fit(known.assign(hard=known.hard * 7))
    assert np.allclose(other_unit.predict(new.assign(hard=new.hard * 7)).low, bounds.low)
    constant = Intervals(difficulty='hard').fit(known.assign(hard=0.0)).predict(new.assign(hard=0.0))
    one_width = Intervals().fit(known).predict(new)
    assert np.allclose(constant[['low', 'high']], one_width[['low', 'high']])
    def winkler(b): return coverage(new.join(b), ()).winkler[0]
    assert winkler(bounds) < winkler(Intervals(by='').fit(known).predict(new))


def test_parameters_are_plain_and_cloned(fitted, new):
    assert json.loads(json.dumps(fitted.get_params())) == fitted.get_params() == clone(fitted).get_params()
    with pytest.raises(NotFittedError): clone(fitted).predict(new, new[FEATURES])
    with pytest.raises(NotFittedError): save_intervals(clone(fitted), 'nowhere')


@pytest.mark.parametrize('change, options, match', [
    (lambda t: t[(t.scene == 's0') & (t.dataset == 'd0')], {}, 'Found 1 scene with'),
    (lambda t: t[t.scene.isin(['s0', 's1', 's2'])], {}, r'6 scenes.* at least 9.*0\.85 or less'),
    (lambda t: t, dict(confidence=0.99), 'at least 99'),
    (lambda t: t, dict(confidence=90), 'between 0 and 1'),
    (lambda t: t[:0], {}, '0 scenes'),
    (lambda t: t.assign(predicted=np.nan), {}, '0 scenes'),
    (lambda t: t.assign(oa=t.oa * 100), {}, 'percent'),
    (lambda t: t.drop(columns='scene'), {}, 'lacks scene'),
    (lambda t: t, dict(by='town'), 'lacks town'),
    (lambda t: t, dict(difficulty='haze'), 'lacks haze'),
    (lambda t: t.assign(scene=t.scene.where(t.scene != 's0')), {}, 'without a scene'),
    (lambda t: t.assign(hard=-t.hard), dict(difficulty='hard'), 'difficulty'),
])
def test_why_calibration_is_impossible_is_stated(known, change, options, match):
    with pytest.raises(SchemaError, match=match): Intervals(**options).fit(change(known))


def test_features_must_fit(known, new, fitted):
    for bad in (known[FEATURES][:5], known['a'], np.zeros((len(known), 2, 2))):
        with pytest.raises(Incompatible, match='expected'): Intervals().fit(known, bad)
    with pytest.raises(Incompatible, match='Fitted with features'): fitted.predict(new)
    with pytest.raises(Incompatible, match='Fitted without features'):
        Intervals().fit(known).predict(new, new[FEATURES])
    with pytest.raises(Incompatible, match='Found 3 features, expected 4'):
        fitted.predict(new, new[FEATURES[:3]])
    with pytest.raises(SchemaError, match='fewer than two scenes'):
        Intervals().fit(known, known[FEATURES] * np.nan)


# ---------------------------------------------------------------- shift

def test_scenes_like_the_old_ones_pass():
    beyond = []
    for seed in range(20):
        a = clustered(60, seed)
        b = clustered(60, 1000 + seed)
        s = ShiftCheck().fit(a[FEATURES], a.scene).transform(b[FEATURES])
        beyond.append(pd.Series(s > 1).groupby(b.scene).mean().mean())
    # the edge is the 95 % quantile
    assert 0.01 < np.mean(beyond) < 0.12


def test_shift_grows_with_distance_and_finds_one_unusual_column(known):
    check = ShiftCheck().fit(known[FEATURES], known.dataset + known.scene)
    ray = check.transform(np.outer(np.arange(3, 40), np.ones(4)))
    assert (np.diff(ray) > 0).all() and ray[0] > 1
    unusual = known[FEATURES][:1].assign(a=1000.0)
    assert check.transform(unusual)[0] > 100 and check.transform(known[FEATURES]).min() == 0


def test_shift_ignores_units_copies_and_order(known, new):
    scene = known.dataset + known.scene
    def shift(features, scene, asked): return ShiftCheck().fit(features, scene).transform(asked)
    expected = shift(known[FEATURES], scene, new[FEATURES])
    def other_units(x): return x * [1, 50, 1e-3, 7] + [0, 9, 1, -4]
    rescaled = shift(other_units(known[FEATURES]), scene, other_units(new[FEATURES]))
    assert np.allclose(expected, rescaled, atol=1e-3)
    order = np.random.default_rng(0).permutation(len(known))
    shuffled = shift(known[FEATURES].iloc[order], scene.iloc[order], new[FEATURES])
    assert np.allclose(expected, shuffled, atol=1e-5)
    # methods that share the image's vector
    copies = shift(pd.concat([known[FEATURES]] * 3), pd.concat([scene] * 3), new[FEATURES])
    assert np.allclose(expected, copies, atol=1e-3)


def test_the_scene_of_a_row_is_not_its_neighbour():
    # rows of a scene all alike
    features = np.repeat(np.random.default_rng(0).normal(size=(30, 3)), 6, axis=0)
    check = ShiftCheck(neighbours=1).fit(features, np.repeat(range(30), 6))
    assert check.middle > 0.05 and (check._distance(check._standardise(features)) == 0).all()
    # nothing varies: same is same, other is far
    constant = ShiftCheck().fit(np.zeros((10, 3)), range(10))
    assert constant.transform(np.zeros((2, 3))).tolist() == [0, 0]
    assert constant.transform(np.ones((1, 3)))[0] > 1000


def test_widened_then_refused(known, new):
    m = Intervals(widen=0.5, refuse=2.5).fit(known, known[FEATURES])
    plain = Intervals().fit(known).predict(new)
    plain_width = plain.high - plain.low
    moved = [m.predict(new, new[FEATURES] + d).assign(plain=plain_width) for d in (0, 0.7, 1.4, 2.1, 9)]
    bounds = pd.concat(moved)
    assert set(bounds.state) == {'ok', 'widened', 'refused'} and moved[-1].state.eq('refused').all()
    ok = bounds.state == 'ok'
    refused = bounds.state == 'refused'
    shift = bounds['shift']
    assert shift[ok].max() <= 1 < shift[~ok & ~refused].min() and shift[refused].min() > 2.5
    growth = (bounds.high - bounds.low) / bounds.plain
    assert np.allclose(growth[ok], 1)
    assert np.allclose(growth[~refused], 1 + 0.5 * (shift[~refused] - 1).clip(lower=0))
    assert bounds.reason[refused].str.contains('far').all()
    assert set(plain.state) == {'unchecked'} and plain['shift'].isna().all()


def test_a_fall_of_six_points_is_noticed(fitted):
    unchecked = Intervals().fit(clustered(80, 1, 2))
    def after(offset, drift): # coverage unchecked, share of rows that are not ok
        t = clustered(200, 5, 2, drift).assign(oa=lambda t: t.oa + offset)
        bounds = fitted.predict(t, t[FEATURES])
        plain = bounds.assign(**unchecked.predict(t)[['low', 'high']])
        return coverage(t.join(plain), ()).coverage[0], (bounds.state != 'ok').mean()
    same, same_noticed = after(0, 0)
    fallen, fallen_noticed = after(-0.06, 0)
    moved, moved_noticed = after(-0.06, 4)
    assert same > 0.8 and same_noticed < 0.25
    # the features have not changed: nothing to notice
    assert fallen < 0.65 and fallen_noticed < 0.25
    assert moved < 0.65 and moved_noticed > 0.95


# ---------------------------------------------------------------- the report

def small_table():
    return pd.DataFrame(dict(
        dataset=list('uuuuvv'),
        scene=list('aaabcd'),
        method=list('xyxyxy'),
        oa=[0.5, 0.5, 0.9, 0.5, 0.2, 0.5],
        low=[0.4, 0.6, 0.4, 0.4, 0.3, np.nan],
        high=[0.6, 0.7, 0.6, 0.6, 0.5, np.nan],
    ))


def test_report_by_hand():
    report = coverage(small_table(), ('dataset',), min_scenes=1).set_index(['by', 'group'])
    # scenes a 1/3, b 1, c 0; d has no interval
    row = report.loc[('all', '')]
    assert np.isclose(row.coverage, (1 / 3 + 1 + 0) / 3) and np.isclose(row.refused, 1 / 6)
    assert (row.rows, row.scenes) == (6, 3)
    assert np.isclose(row.width, (0.5 / 3 + 0.2 + 0.2) / 3)
    winkler_a = (0.2 + 0.1 + 20 * 0.1 + 0.2 + 20 * 0.3) / 3
    assert np.isclose(row.winkler, (winkler_a + 0.2 + 0.2 + 20 * 0.1) / 3)
    assert np.isclose(row.se, np.std([1 / 3, 1, 0], ddof=1) / 3**0.5)
    v = report.loc[('dataset', 'v')]
    assert v.coverage == 0 and v.scenes == 1 and report.loc[('worst', 'dataset=v')].coverage == 0
    assert coverage(small_table(), ('dataset',), min_scenes=2).group.iloc[-1] == 'dataset=u'
    assert 'worst' not in set(coverage(small_table(), ('dataset',), min_scenes=3).by)


def test_report_edges():
    t = small_table()
    assert coverage(t.assign(oa=[np.nan] + t.oa.tolist()[1:])).rows[0] == 5
    nothing = coverage(t.assign(low=np.nan, high=np.nan))
    assert nothing.refused.eq(1).all() and nothing.coverage.isna().all() and nothing.scenes.eq(0).all()
    assert 'worst' not in set(nothing.by)
    assert coverage(t, ()).shape == (1, 9)
    # bounds belong to the interval
    edge = coverage(t.assign(oa=t.low), (), min_scenes=1)
    assert edge.coverage[0] == 1 and np.isclose(edge.winkler[0], edge.width[0])
    for column in ('low', 'scene', 'method'):
        with pytest.raises(SchemaError, match=f'lacks {column}'): coverage(t.drop(columns=column))


def test_winkler_prefers_the_right_width(new):
    def winkler(w): return coverage(new.assign(low=new.predicted - w, high=new.predicted + w), ()).winkler[0]
    scores = [winkler(w) for w in (0.001, 0.04, 0.5)]
    assert min(scores) == scores[1]


# ---------------------------------------------------------------- folds

def without_accuracy(known, fold, k): # the labels of one fold replaced by 0
    return known.assign(oa=known.oa.where(fold != k, 0.0))


def test_each_fold_is_calibrated_on_the_others(known):
    fold = by_scene(known)
    features = known[FEATURES]
    bounds = cross_intervals(known, fold, features, confidence=0.8)
    assert bounds.index.equals(known.index)
    for k in range(4):
        train = fold != k
        by_hand = Intervals(0.8).fit(known[train], features[train]).predict(known[~train], features[~train])
        assert bounds[~train].equals(by_hand)
    changed = cross_intervals(without_accuracy(known, fold, 2), fold, features, confidence=0.8)
    # the labels of a fold do not change its intervals
    assert changed[fold == 2].equals(bounds[fold == 2]) and not changed[fold == 1].equals(bounds[fold == 1])


def test_folds_need_no_unique_index_and_no_features(known):
    fold = by_scene(known)
    repeated = known.set_axis(np.zeros(len(known), int))
    bounds = cross_intervals(repeated, pd.Series(fold))
    assert np.array_equal(bounds.low, cross_intervals(known, fold).low)
    assert bounds.index.equals(repeated.index)


def test_expected_errors_use_no_label_of_the_row(known, new):
    "The expected error of a row does not depend on its label, nor on any label of a new row."
    fold = by_scene(known)
    columns = ['hard', *FEATURES]
    a, b = expect_errors(known, fold, new.drop(columns='oa'), columns)
    assert a.drop(columns='expected_error').equals(known)
    assert a.expected_error.between(0, 1).all() and np.isfinite(b.expected_error).all()
    changed, other = expect_errors(without_accuracy(known, fold, 2), fold, new, columns)
    same = changed.expected_error == a.expected_error
    assert same[fold == 2].all() and not same[fold == 1].all()
    assert not np.array_equal(other.expected_error, b.expected_error)
    again = expect_errors(known, fold, new, columns)
    assert again[0].equals(a) and np.array_equal(again[1].expected_error, b.expected_error)


def test_expected_errors_find_what_is_hard_and_bear_gaps(known, new):
    row = np.arange(len(known))
    gaps = known.assign(a=known.a.where(row % 3 > 0), oa=known.oa.where(row % 7 > 0))
    for rows in (known, gaps):
        _, expected = expect_errors(rows, by_scene(known), new, ['hard', *FEATURES])
        assert roc_auc_score(new.hard > 0.02, expected.expected_error) > 0.9


def test_expected_errors_need_folds_and_columns(known, new):
    with pytest.raises(SchemaError, match='Found 2 folds, expected three'):
        cross_intervals(known, by_scene(known, 2), columns=('hard',))
    with pytest.raises(SchemaError, match='one fold'):
        expect_errors(known, np.zeros(len(known)), new, ['hard'])
    with pytest.raises(SchemaError, match='lacks nothing_such'):
        expect_errors(known, by_scene(known), new, ['nothing_such'])


def test_learned_widths_use_no_label_of_their_fold(known):
    fold = by_scene(known)
    bounds = cross_intervals(known, fold, known[FEATURES], columns=('hard',))
    changed = cross_intervals(without_accuracy(known, fold, 2), fold, known[FEATURES], columns=('hard',))
    assert bounds.index.equals(known.index)
    assert changed[fold == 2].equals(bounds[fold == 2]) and not changed[fold == 1].equals(bounds[fold == 1])
    assert (bounds.high - bounds.low).nunique() > 50
    assert abs(coverage(known.join(bounds), ()).coverage[0] - 0.9) < 0.06


def test_folds_that_share_a_scene_are_refused(known):
    with pytest.raises(LeakError, match='more than one fold'):
        cross_intervals(known, np.arange(len(known)) % 4)


def test_cross_coverage_is_reached_on_average():
    reached = []
    for seed in range(12):
        t = clustered(60, seed)
        reached.append(coverage(t.join(cross_intervals(t, by_scene(t))), ()).coverage[0])
    assert 0.9 - 3 * np.std(reached) / 12**0.5 < np.mean(reached) < 0.96


# ---------------------------------------------------------------- files

def test_roundtrip(fitted, known, new, tmp_path):
    loaded = load_intervals(save_intervals(fitted, tmp_path/'m'))
    assert loaded.predict(new, new[FEATURES]).equals(fitted.predict(new, new[FEATURES]))
    assert loaded.bins_.equals(fitted.bins_) and loaded.get_params() == fitted.get_params()
    assert {p.name for p in (tmp_path/'m').iterdir()} == {'intervals.json', 'intervals.safetensors'}
    assert json.loads((tmp_path/'m/intervals.json').read_text())['kind'] == 'Intervals'
    plain = Intervals(difficulty='hard', by='method').fit(known)
    loaded = load_intervals(save_intervals(plain, tmp_path/'m'))
    assert loaded.predict(new).equals(plain.predict(new))
    assert not (tmp_path/'m/intervals.safetensors').exists()
    assert load_intervals(save_intervals(loaded, tmp_path/'again')).predict(new).equals(plain.predict(new))


def test_missing_torn_and_mixed_files_are_named(fitted, known, new, tmp_path):
    with pytest.raises(DataNotFound, match='nowhere'): load_intervals(tmp_path/'nowhere')
    save_intervals(fitted, tmp_path/'a')
    save_intervals(Intervals().fit(new, new[FEATURES]), tmp_path/'b')
    (tmp_path/'a/intervals.safetensors').write_bytes((tmp_path/'b/intervals.safetensors').read_bytes())
    with pytest.raises(SchemaError, match='not of one fit'): load_intervals(tmp_path/'a')
    (tmp_path/'b/intervals.json').write_text('{"kind": ')
    with pytest.raises(SchemaError, match='intervals.json'): load_intervals(tmp_path/'b')
