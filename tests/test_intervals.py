"""Intervals that count scenes: against crepes, against the definition, and against data whose coverage is known in closed form."""
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

from rssqa.quality.intervals import (
    Intervals,
    ShiftCheck,
    coverage,
    cross_intervals,
    expect_errors,
    load_intervals,
    row_intervals,
    save_intervals,
    scene_quantile,
    scenes_needed,
)
from rssqa.core import DataNotFound, Incompatible, LeakError, SchemaError

F = list('abcd')
# rows in a scene, sd of its common error; sd of a row's own
SMALL, LARGE, NOISE = (1, 0.03), (12, 0.01), 0.005


def clustered(scenes=40, seed=0, datasets=1, drift=0.0) -> pd.DataFrame:
    "Scenes, half small and off, half large and good; feature columns a..d; `hard` says which."
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, scenes)
    rows, sd = (np.where(kind, LARGE[i], SMALL[i]) for i in (0, 1))
    error = rng.normal(0, sd)
    look = rng.normal(drift, 1, (scenes, len(F)))
    s = np.repeat(np.arange(scenes), rows)
    oa = rng.uniform(0.5, 0.8, len(s))
    t = pd.DataFrame(
        dict(
            image_id=[f'i{i}' for i in range(len(s))],
            dataset=[f'd{i % datasets}' for i in s],
            scene=[f's{i // datasets}' for i in s],
            method=[f'm{i % 3}' for i in range(len(s))],
            oa=oa,
            predicted=oa + error[s] + rng.normal(0, NOISE, len(s)),
            hard=sd[s],
        )
    )
    return t.join(pd.DataFrame(look[s] + rng.normal(0, 0.2, (len(s), len(F))), columns=F))


def by_scene(t, k=4) -> np.ndarray:  # folds that hold every dataset
    return pd.factorize(t.scene)[0] % k


def true_coverage(q) -> float: # of a random row of a new scene of `clustered`, in closed form
    return np.mean([2 * norm.cdf(q / np.hypot(sd, NOISE)) - 1 for _, sd in (SMALL, LARGE)])


@pytest.fixture(scope='module')
def known(): return clustered(80, 1, 2)


@pytest.fixture(scope='module')
def new(): return clustered(60, 2, 2)


@pytest.fixture(scope='module')
def fitted(known): return Intervals().fit(known, known[F])


# ---------------------------------------------------------------- the quantile

def by_definition(score, scene, confidence): # exact fractions, no sorting tricks
    rows = {s: scene.count(s) for s in scene}
    for t in sorted(score):
        if sum((Fraction(1, rows[s]) for r, s in zip(score, scene) if r <= t), Fraction()) >= confidence * (len(rows) + 1):
            return t
    return np.inf


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=60), st.sampled_from(['0.5', '0.6', '0.75', '0.8', '0.9']))
def test_quantile_meets_its_definition(pairs, confidence):
    score, scene = map(list, zip(*pairs))
    assert scene_quantile(score, scene, float(confidence)) == by_definition(
        score, scene, Fraction(confidence)
    )


@pytest.mark.parametrize('confidence', [0.5, 0.7, 0.8, 0.9, 0.95, 0.99])
def test_quantile_of_single_rows_is_the_textbook_one(confidence):
    rng = np.random.default_rng(0)
    ceil = lambda x: int(np.ceil(round(x, 9)))
    for n in (*range(1, 25), 99, 100, 101, 999):
        r = rng.exponential(size=n)
        k = ceil(confidence * (n + 1))
        assert scene_quantile(r, range(n), confidence) == (np.sort(r)[k - 1] if k <= n else np.inf)
        assert np.isfinite(scene_quantile(r, range(n), confidence)) == (n >= scenes_needed(confidence))


def test_copies_names_and_order_do_not_matter():
    rng = np.random.default_rng(3)
    r = rng.exponential(size=90)
    s = np.sort(rng.integers(0, 30, 90))
    at = rng.permutation(90)
    times = 1 + s % 4
    q = scene_quantile(r, s)
    assert (
        q
        == scene_quantile(r[at], s[at])
        == scene_quantile(r, [f'scene {29 - i}' for i in s])
        == scene_quantile(np.repeat(r, times), np.repeat(s, times))
    )


# ---------------------------------------------------------------- coverage over many trained

@pytest.mark.parametrize('scenes', [12, 19, 60])
def test_coverage_by_scene_reaches_its_level_and_by_row_does_not(scenes):
    trained = [clustered(scenes, seed) for seed in range(120)]
    errors = [((t.oa - t.predicted).abs().to_numpy(), t.scene.to_numpy()) for t in trained]
    per_scene = np.array([true_coverage(scene_quantile(r, s)) for r, s in errors])
    per_row = np.array([true_coverage(scene_quantile(r, range(len(r)))) for r, _ in errors])
    se = per_scene.std() / len(trained)**0.5
    assert 0.9 - 3 * se < per_scene.mean() < 0.9 + 2 / (scenes + 1) + 3 * se
    assert per_row.mean() + 3 * per_row.std() / len(trained)**0.5 < 0.88


def test_coverage_of_single_rows_is_exact():
    # 0.9 * 20 is whole: the coverage is 18/20 on average, neither more nor less
    n = 19
    reached = [
        2 * norm.cdf(scene_quantile(np.abs(np.random.default_rng(seed).normal(size=n)), range(n))) - 1
        for seed in range(1000)
    ]
    assert abs(np.mean(reached) - 0.9) < 3 * np.std(reached) / 1000**0.5


def test_each_dataset_with_its_own_bin_is_covered():
    reached = []
    for seed in range(40):
        t = clustered(60, seed, 2)
        t['predicted'] = t.oa + (t.predicted - t.oa) * np.where(t.dataset == 'd1', 3, 1)
        q = Intervals().fit(t).bins_['quantile']
        reached.append((true_coverage(q['d0']), true_coverage(q['d1'] / 3), true_coverage(q[''] / 3)))
    own0, own1, pooled = np.mean(reached, 0)
    # one quantile for both would fail the harder one
    assert 0.885 < own0 < 0.97 and 0.885 < own1 < 0.97 and pooled < 0.87


# ---------------------------------------------------------------- crepes

@pytest.mark.parametrize('n', [11, 37, 100, 998])
@pytest.mark.parametrize('confidence', [0.8, 0.9])
@pytest.mark.parametrize('by,difficulty', [('', ''), ('dataset', ''), ('', 'hard'), ('dataset', 'hard')])
def test_one_row_a_scene_equals_crepes(n, confidence, by, difficulty):
    rng = np.random.default_rng(n)
    t = pd.DataFrame(
        dict(
            dataset=rng.choice(['u', 'v'], n) if n > 90 else 'u',
            scene=np.arange(n),
            oa=rng.uniform(0.2, 0.9, n),
            hard=rng.exponential(size=n),
        )
    )
    t['predicted'] = t.oa + rng.normal(0, 0.05, n)
    new = t.sample(min(n, 50), random_state=0).assign(predicted=lambda t: t.predicted + 0.01)
    sigma = lambda x: (x.hard / t.hard.mean() + 0.5).to_numpy() if difficulty else None
    bins = lambda x: x.dataset.to_numpy(str) if by else None
    theirs = (
        ConformalRegressor()
        .fit((t.oa - t.predicted).to_numpy(), sigma(t), bins(t))
        .predict_int(new.predicted.to_numpy(), sigma(new), bins(new), confidence - 1e-9, 0, 1)
    )
    ours = Intervals(confidence, by, difficulty, min_scenes=1).fit(t).predict(new)
    rows = row_intervals(t, new, confidence, by, difficulty)
    assert (
        np.abs(ours[['low', 'high']] - theirs).to_numpy().max() < 1e-12
        and np.abs(rows - theirs).to_numpy().max() < 1e-12
    )
    assert rows.index.equals(new.index) and rows.high.gt(rows.low).all()


def test_crepes_edges_are_mended(known, new):
    single = known.drop_duplicates(['dataset', 'scene'])[:9].assign(dataset='u')
    # nine rows are enough for 90 %
    assert (row_intervals(single, new, by='').high - row_intervals(single, new, by='').low).max() < 1
    told = row_intervals(known, new.assign(dataset='elsewhere'))
    # crepes alone gives an unseen bin 0..0
    assert told.equals(row_intervals(known, new, by='')) and told.high.min() > 0.3
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

def test_wider_with_confidence(known, new):
    for options in (dict(), dict(by=''), dict(difficulty='hard'), dict(min_scenes=60)):
        # 0.98: past what 40 scenes of one dataset can say
        widths = [
            (t := Intervals(c, **options).fit(known).predict(new)).high - t.low
            for c in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.975, 0.98)
        ]
        assert (
            all((b >= a - 1e-12).all() for a, b in zip(widths, widths[1:])) and (widths[-1] > widths[0]).all()
        )


def test_bounds_are_shares_around_the_prediction(known, new):
    told = Intervals().fit(known).predict(new.assign(predicted=np.linspace(-0.05, 1.05, len(new))))
    assert told.low.between(0, 1).all() and told.high.between(0, 1).all() and (told.low <= told.high).all()
    assert (told.low == 0).any() and (told.high == 1).any()
    inside = Intervals().fit(known).predict(new)
    assert np.allclose((inside.low + inside.high) / 2, new.predicted)


def test_rows_without_prediction_are_refused(fitted, new):
    new = new.copy()
    new.loc[new.index[:3], 'predicted'] = [np.nan, np.inf, -np.inf]
    told = fitted.predict(new, new[F])
    assert (
        told.state[:3].eq('refused').all()
        and told.reason[:3].eq('no prediction').all()
        and told[['low', 'high']][:3].isna().all().all()
    )
    assert (
        told.low[3:].notna().sum() > 0
        and told.low.isna().equals(told.state.eq('refused'))
        and told.reason.ne('').equals(told.state.eq('refused'))
    )


def test_rows_with_unknown_difficulty_or_features_are_refused(known, new):
    new, f = new.copy(), new[F].to_numpy(copy=True)
    new.loc[new.index[0], 'hard'] = np.nan
    f[1, 2] = np.nan
    f[2, 0] = np.inf
    told = Intervals(difficulty='hard').fit(known, known[F]).predict(new, f)
    assert (
        told.reason[:3].tolist() == ['difficulty unknown', 'features unknown', 'features unknown']
        and told.state[:3].eq('refused').all()
        and told.low[:3].isna().all()
    )


def test_calibration_rows_with_gaps_are_left_out(known, new):
    gaps = pd.concat(
        [
            known,
            known[:9].assign(oa=np.nan),
            known[:9].assign(predicted=np.nan),
            known[:9].assign(hard=np.nan),
        ]
    )
    a, b = (Intervals(difficulty='hard').fit(t, t[F]).predict(new, new[F]) for t in (known, gaps))
    assert np.allclose(a[['low', 'high', 'shift']], b[['low', 'high', 'shift']], equal_nan=True)
    # some features missing: rows count, their looks do not
    part = known[F].assign(a=known.a.mask(known.index % 7 == 0))
    assert np.allclose(
        Intervals().fit(known, part).bins_['quantile'], Intervals().fit(known).bins_['quantile']
    )


def test_unseen_and_small_datasets(known, new):
    hard = known[known.dataset == 'd1'].assign(predicted=lambda t: t.oa + 4 * (t.predicted - t.oa))
    t = pd.concat([known[known.dataset == 'd0'], hard[hard.scene.isin(hard.scene.unique()[:12])]])
    m = Intervals().fit(t)
    assert m.bins_.bin.to_dict() == {
        '': 'pooled',
        'd0': 'own',
        'd1': 'mixed',
    } and m.bins_.scenes.to_dict() == {'': 52, 'd0': 40, 'd1': 12}
    assert m.bins_['quantile']['d1'] > m.bins_['quantile'][''] > m.bins_['quantile']['d0']
    told = m.predict(new.assign(dataset='d9'))
    assert set(told.bin) == {'pooled'} and np.allclose((told.high - told.low) / 2, m.bins_['quantile'][''])
    easy = Intervals().fit(
        pd.concat([hard, known[(known.dataset == 'd0') & known.scene.isin(known.scene.unique()[:12])]])
    )
    # too few scenes to claim a narrower one
    assert easy.bins_['quantile']['d0'] == easy.bins_['quantile']['']


def test_scene_names_may_repeat_between_datasets(known):
    apart = known.assign(scene=known.dataset + known.scene)
    assert (
        Intervals().fit(apart).bins_.equals(Intervals().fit(known).bins_)
        and Intervals().fit(known).bins_.scenes[''] == 80
    )


def test_categories_and_frames_are_taken(known, new, fitted):
    kinds = {c: 'category' for c in ('dataset', 'scene', 'method', 'image_id')}
    told = (
        Intervals()
        .fit(known.astype(kinds), known[F].to_numpy(np.float64))
        .predict(new.astype(kinds), new[F].to_numpy())
    )
    assert told.equals(fitted.predict(new, new[F])) and len(coverage(new.astype(kinds).join(told))) == 7
    assert Intervals(by='method').fit(known.astype(kinds)).predict(new.astype(kinds)).bin.eq('own').all()


def test_order_of_rows_does_not_matter(known, new, fitted):
    a = known.sample(frac=1, random_state=1)
    b = new.sample(frac=1, random_state=2)
    told = fitted.predict(new, new[F])
    again = Intervals().fit(a, a[F]).predict(b, b[F])
    assert again.index.equals(b.index) and again[['state', 'bin', 'reason']].loc[new.index].equals(
        told[['state', 'bin', 'reason']]
    )
    assert np.allclose(
        again[['low', 'high', 'shift']].loc[new.index],
        told[['low', 'high', 'shift']],
        atol=1e-5,
        equal_nan=True,
    )
    alone = fitted.predict(new[5:6], new[F][5:6])
    assert (
        np.allclose(alone[['low', 'high', 'shift']], told[['low', 'high', 'shift']][5:6], atol=1e-5)
        and fitted.predict(new[:0], new[F][:0]).empty
    )


def test_difficulty_scales_and_pays(known, new):
    m = Intervals(difficulty='hard', by='').fit(known)
    told = m.predict(new)
    width = (told.high - told.low).groupby(new.hard).mean()
    scale = known.hard.mean()
    assert np.allclose(width[LARGE[1]] / width[SMALL[1]], (LARGE[1] / scale + 0.5) / (SMALL[1] / scale + 0.5))
    # its unit is free
    assert np.allclose(
        Intervals(difficulty='hard', by='')
        .fit(known.assign(hard=known.hard * 7))
        .predict(new.assign(hard=new.hard * 7))
        .low,
        told.low,
    )
    flat = Intervals(difficulty='hard').fit(known.assign(hard=0.0)).predict(new.assign(hard=0.0))
    assert np.allclose(flat[['low', 'high']], Intervals().fit(known).predict(new)[['low', 'high']])
    score = lambda t: coverage(new.join(t), ()).winkler[0]
    assert score(told) < score(Intervals(by='').fit(known).predict(new))


def test_parameters_are_plain_and_cloned(fitted, new):
    assert json.loads(json.dumps(fitted.get_params())) == fitted.get_params() == clone(fitted).get_params()
    with pytest.raises(NotFittedError): clone(fitted).predict(new, new[F])
    with pytest.raises(NotFittedError): save_intervals(clone(fitted), 'nowhere')


@pytest.mark.parametrize('spoil,options,match', [
    (lambda t: t[t.scene == 's0'][t.dataset == 'd0'], {}, 'found 1 scene with|Found 1 scene with'), (lambda t: t[t.scene.isin(['s0', 's1', 's2'])], {}, r'6 scenes.* at least 9.*0\.85 or less'),
    (lambda t: t, dict(confidence=0.99), 'at least 99'), (lambda t: t, dict(confidence=90), 'between 0 and 1'), (lambda t: t[:0], {}, '0 scenes'), (lambda t: t.assign(predicted=np.nan), {}, '0 scenes'),
    (lambda t: t.assign(oa=t.oa * 100), {}, 'percent'), (lambda t: t.drop(columns='scene'), {}, 'lacks scene'), (lambda t: t, dict(by='town'), 'lacks town'), (lambda t: t, dict(difficulty='doubt'), 'lacks doubt'),
    (lambda t: t.assign(scene=t.scene.where(t.scene != 's0')), {}, 'without a scene'), (lambda t: t.assign(hard=-t.hard), dict(difficulty='hard'), 'difficulty')])
@pytest.mark.filterwarnings('ignore:Boolean Series key')
def test_what_cannot_be_calibrated_is_said(known, spoil, options, match):
    with pytest.raises(SchemaError, match=match): Intervals(**options).fit(spoil(known))


def test_features_must_fit(known, new, fitted):
    for bad in (known[F][:5], known['a'], np.zeros((len(known), 2, 2))):
        with pytest.raises(Incompatible, match='expected'): Intervals().fit(known, bad)
    with pytest.raises(Incompatible, match='Fitted with features'): fitted.predict(new)
    with pytest.raises(Incompatible, match='Fitted without features'):
        Intervals().fit(known).predict(new, new[F])
    with pytest.raises(Incompatible, match='Found 3 features, expected 4'): fitted.predict(new, new[F[:3]])
    with pytest.raises(SchemaError, match='fewer than two scenes'): Intervals().fit(known, known[F] * np.nan)


# ---------------------------------------------------------------- shift

def test_scenes_like_the_old_ones_pass():
    beyond = []
    for seed in range(20):
        a = clustered(60, seed)
        b = clustered(60, 1000 + seed)
        s = ShiftCheck().fit(a[F], a.scene).transform(b[F])
        beyond.append(pd.Series(s > 1).groupby(b.scene).mean().mean())
    # the edge is the 95 % quantile
    assert 0.01 < np.mean(beyond) < 0.12


def test_shift_grows_with_distance_and_finds_one_odd_column(known):
    check = ShiftCheck().fit(known[F], known.dataset + known.scene)
    ray = check.transform(np.outer(np.arange(3, 40), np.ones(4)))
    assert (np.diff(ray) > 0).all() and ray[0] > 1
    odd = known[F][:1].assign(a=1000.0)
    assert check.transform(odd)[0] > 100 and check.transform(known[F]).min() == 0


def test_shift_ignores_units_copies_and_order(known, new):
    scene = known.dataset + known.scene
    rng = np.random.default_rng(0)
    check = lambda t, s, f=lambda x: x: ShiftCheck().fit(f(t), s).transform(f(new[F]))
    told = check(known[F], scene)
    at = rng.permutation(len(known))
    assert np.allclose(
        told, check(known[F], scene, lambda x: x * [1, 50, 1e-3, 7] + [0, 9, 1, -4]), atol=1e-3
    )
    assert np.allclose(told, check(known[F].iloc[at], scene.iloc[at]), atol=1e-5)
    # methods that share the image's vector
    assert np.allclose(told, check(pd.concat([known[F]] * 3), pd.concat([scene] * 3)), atol=1e-3)


def test_own_scene_is_no_neighbour():
    # rows of a scene all alike
    f = np.repeat(np.random.default_rng(0).normal(size=(30, 3)), 6, axis=0)
    check = ShiftCheck(neighbours=1).fit(f, np.repeat(range(30), 6))
    assert check.middle > 0.05 and (check._distance(check._scaled(f)) == 0).all()
    # nothing varies: same is same, other is far
    flat = ShiftCheck().fit(np.zeros((10, 3)), range(10))
    assert flat.transform(np.zeros((2, 3))).tolist() == [0, 0] and flat.transform(np.ones((1, 3)))[0] > 1000


def test_widened_then_refused(known, new):
    m = Intervals(widen=0.5, refuse=2.5).fit(known, known[F])
    plain = Intervals().fit(known).predict(new)
    told = pd.concat(
        [m.predict(new, new[F] + d).assign(plain=plain.high - plain.low) for d in (0, 0.7, 1.4, 2.1, 9)]
    )
    assert set(told.state) == {'ok', 'widened', 'refused'} and told.state.tail(len(new)).eq('refused').all()
    assert (
        told['shift'][told.state == 'ok'].max() <= 1 < told['shift'][told.state == 'widened'].min()
        and told['shift'][told.state == 'refused'].min() > 2.5
    )
    growth = (told.high - told.low) / told.plain
    assert np.allclose(growth[told.state == 'ok'], 1)
    known_rows = told.state != 'refused'
    assert (
        np.allclose(growth[known_rows], 1 + 0.5 * (told['shift'][known_rows] - 1).clip(lower=0))
        and told.reason[~known_rows].str.contains('far').all()
    )
    assert set(plain.state) == {'unchecked'} and plain['shift'].isna().all()


def test_a_fall_of_six_points_is_noticed(fitted):
    def after(off, drift):
        t = clustered(200, 5, 2, drift).assign(oa=lambda t: t.oa + off)
        told = fitted.predict(t, t[F])
        bare = told.assign(**Intervals().fit(clustered(80, 1, 2)).predict(t)[['low', 'high']])
        return (
            coverage(t.join(bare), ()).coverage[0],
            coverage(t.join(told), ()).coverage[0],
            (told.state != 'ok').mean(),
        )
    calm = after(0, 0)
    blind = after(-0.06, 0)
    seen = after(-0.06, 4)
    assert calm[0] > 0.8 and calm[2] < 0.25
    # no change of look: nothing to see
    assert blind[0] < 0.65 and blind[2] < 0.25
    assert seen[0] < 0.65 and seen[2] > 0.95


# ---------------------------------------------------------------- the report

def hand():
    return pd.DataFrame(
        dict(
            dataset=list('uuuuvv'),
            scene=list('aaabcd'),
            method=list('xyxyxy'),
            oa=[0.5, 0.5, 0.9, 0.5, 0.2, 0.5],
            low=[0.4, 0.6, 0.4, 0.4, 0.3, np.nan],
            high=[0.6, 0.7, 0.6, 0.6, 0.5, np.nan],
        )
    )


def test_report_by_hand():
    r = coverage(hand(), ('dataset',), min_scenes=1).set_index(['by', 'group'])
    # scenes a 1/3, b 1, c 0; d has no answer
    a = r.loc[('all', '')]
    assert (
        np.isclose(a.coverage, (1 / 3 + 1 + 0) / 3)
        and np.isclose(a.refused, 1 / 6)
        and (a.rows, a.scenes) == (6, 3)
    )
    assert np.isclose(a.width, (0.5 / 3 + 0.2 + 0.2) / 3) and np.isclose(
        a.winkler, ((0.2 + 0.1 + 20 * 0.1 + 0.2 + 20 * 0.3) / 3 + 0.2 + 0.2 + 20 * 0.1) / 3
    )
    assert np.isclose(a.se, np.std([1 / 3, 1, 0], ddof=1) / 3**0.5)
    assert (
        r.loc[('dataset', 'v')].coverage == 0
        and r.loc[('worst', 'dataset=v')].coverage == 0
        and r.loc[('dataset', 'v')].scenes == 1
    )
    assert coverage(hand(), ('dataset',), min_scenes=2).group.iloc[-1] == 'dataset=u' and 'worst' not in set(
        coverage(hand(), ('dataset',), min_scenes=3).by
    )


def test_report_edges():
    t = hand()
    assert coverage(t.assign(oa=[np.nan] + t.oa.tolist()[1:])).rows[0] == 5
    nothing = coverage(t.assign(low=np.nan, high=np.nan))
    assert (
        nothing.refused.eq(1).all()
        and nothing.coverage.isna().all()
        and nothing.scenes.eq(0).all()
        and 'worst' not in set(nothing.by)
    )
    assert coverage(t, ()).shape == (1, 9)
    # bounds belong to the interval
    edge = coverage(t.assign(oa=t.low), (), min_scenes=1)
    assert edge.coverage[0] == 1 and np.isclose(edge.winkler[0], edge.width[0])
    for column in ('low', 'scene', 'method'):
        with pytest.raises(SchemaError, match=f'lacks {column}'): coverage(t.drop(columns=column))


def test_winkler_prefers_the_honest_width(new):
    center = lambda w: coverage(new.assign(low=new.predicted - w, high=new.predicted + w), ()).winkler[0]
    scores = [center(w) for w in (0.001, 0.04, 0.5)]
    assert min(scores) == scores[1]


# ---------------------------------------------------------------- folds

def test_each_fold_is_calibrated_on_the_others(known):
    fold = by_scene(known)
    told = cross_intervals(known, fold, known[F], confidence=0.8)
    assert told.index.equals(known.index)
    for k in range(4):
        manual = (
            Intervals(0.8)
            .fit(known[fold != k], known[F][fold != k])
            .predict(known[fold == k], known[F][fold == k])
        )
        assert told[fold == k].equals(manual)
    changed = cross_intervals(known.assign(oa=known.oa.where(fold != 2, 0.0)), fold, known[F], confidence=0.8)
    # a fold's own labels are not heard
    assert changed[fold == 2].equals(told[fold == 2]) and not changed[fold == 1].equals(told[fold == 1])


def test_folds_need_no_unique_index_and_no_features(known):
    fold = by_scene(known)
    twice = known.set_axis(np.zeros(len(known), int))
    assert np.array_equal(
        cross_intervals(twice, pd.Series(fold)).low, cross_intervals(known, fold).low
    ) and cross_intervals(twice, fold).index.equals(twice.index)


def test_expected_errors_are_honest(known, new):
    "No row's expected error hears its own label, and no new row's label is looked at."
    fold = by_scene(known)
    columns = ['hard', *F]
    a, b = expect_errors(known, fold, new.drop(columns='oa'), columns)
    assert (
        a.drop(columns='expected_error').equals(known)
        and a.expected_error.between(0, 1).all()
        and np.isfinite(b.expected_error).all()
    )
    changed, other = expect_errors(known.assign(oa=known.oa.where(fold != 2, 0.0)), fold, new, columns)
    assert np.array_equal(
        changed.expected_error[fold == 2], a.expected_error[fold == 2]
    ) and not np.array_equal(changed.expected_error[fold == 1], a.expected_error[fold == 1])
    assert not np.array_equal(other.expected_error, b.expected_error)
    again = expect_errors(known, fold, new, columns)
    assert again[0].equals(a) and np.array_equal(again[1].expected_error, b.expected_error)


def test_expected_errors_find_what_is_hard_and_bear_gaps(known, new):
    gaps = known.assign(
        a=known.a.where(np.arange(len(known)) % 3 > 0), oa=known.oa.where(np.arange(len(known)) % 7 > 0)
    )
    from sklearn.metrics import roc_auc_score
    for rows in (known, gaps):
        told = expect_errors(rows, by_scene(known), new, ['hard', *F])[1]
        assert roc_auc_score(new.hard > 0.02, told.expected_error) > 0.9


def test_expected_errors_need_folds_and_columns(known, new):
    with pytest.raises(ValueError, match='(?i)found 2 folds, expected three'):
        cross_intervals(known, by_scene(known, 2), columns=('hard',))
    with pytest.raises(ValueError, match='one fold'):
        expect_errors(known, np.zeros(len(known)), new, ['hard'])
    with pytest.raises(ValueError, match='lacks nothing_such'):
        expect_errors(known, by_scene(known), new, ['nothing_such'])


def test_learned_widths_hear_no_label_of_their_fold(known):
    fold = by_scene(known)
    told = cross_intervals(known, fold, known[F], columns=('hard',))
    changed = cross_intervals(
        known.assign(oa=known.oa.where(fold != 2, 0.0)), fold, known[F], columns=('hard',)
    )
    assert (
        told.index.equals(known.index)
        and changed[fold == 2].equals(told[fold == 2])
        and not changed[fold == 1].equals(told[fold == 1])
    )
    assert (told.high - told.low).nunique() > 50 and abs(
        coverage(known.join(told), ()).coverage[0] - 0.9
    ) < 0.06


def test_folds_that_share_a_scene_are_refused(known):
    with pytest.raises(LeakError, match='more than one fold'):
        cross_intervals(known, np.arange(len(known)) % 4)


def test_cross_coverage_holds_on_average():
    reached = []
    for seed in range(12):
        t = clustered(60, seed)
        reached.append(coverage(t.join(cross_intervals(t, by_scene(t))), ()).coverage[0])
    assert 0.9 - 3 * np.std(reached) / 12**0.5 < np.mean(reached) < 0.96


# ---------------------------------------------------------------- files

def test_roundtrip(fitted, known, new, tmp_path):
    back = load_intervals(save_intervals(fitted, tmp_path/'m'))
    assert (
        back.predict(new, new[F]).equals(fitted.predict(new, new[F]))
        and back.bins_.equals(fitted.bins_)
        and back.get_params() == fitted.get_params()
    )
    assert {p.name for p in (tmp_path / 'm').iterdir()} == {
        'intervals.json',
        'intervals.safetensors',
    } and json.loads((tmp_path / 'm/intervals.json').read_text())['kind'] == 'Intervals'
    plain = Intervals(difficulty='hard', by='method').fit(known)
    again = load_intervals(save_intervals(plain, tmp_path/'m'))
    assert again.predict(new).equals(plain.predict(new)) and not (tmp_path/'m/intervals.safetensors').exists()
    assert load_intervals(save_intervals(again, tmp_path/'again')).predict(new).equals(plain.predict(new))


def test_missing_torn_and_mixed_files_are_named(fitted, known, new, tmp_path):
    with pytest.raises(DataNotFound, match='nowhere'): load_intervals(tmp_path/'nowhere')
    save_intervals(fitted, tmp_path/'a')
    save_intervals(Intervals().fit(new, new[F]), tmp_path/'b')
    (tmp_path/'a/intervals.safetensors').write_bytes((tmp_path/'b/intervals.safetensors').read_bytes())
    with pytest.raises(SchemaError, match='not of one fit'): load_intervals(tmp_path/'a')
    (tmp_path/'b/intervals.json').write_text('{"kind": ')
    with pytest.raises(SchemaError, match='intervals.json'): load_intervals(tmp_path/'b')
