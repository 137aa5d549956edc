"""Measures against scikit-learn, SciPy and plain loops, and what they do where there is nothing to measure."""
import itertools, time, warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn import metrics as sk

from rssqa.core import SchemaError
from rssqa.segment.metrics import (
    FAILURE,
    IGNORE,
    Ranks,
    accuracy,
    aurc,
    choices,
    class_f1,
    class_iou,
    confusion,
    evaluate,
    failure_auroc,
    gains,
    grouped_srocc,
    krocc,
    logistic,
    mae,
    moment_plcc,
    moments,
    pair_balance,
    plcc,
    plcc_fitted,
    recommendation,
    rmse,
    single_best,
    srocc,
    views,
    weighted_auroc,
    weighted_aurc,
    weighted_srocc,
    wide,
    within,
)

quick = settings(max_examples=60, deadline=None)


@st.composite
def pairs(draw): # truth with ignored pixels, prediction, K
    k = draw(st.integers(2, 40))
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    seed = draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    # some classes are absent
    present = rng.choice(k, rng.integers(1, k + 1), replace=False)
    truth = rng.choice(present, shape)
    guess = np.where(rng.random(shape) < draw(st.sampled_from([0, .5, 1])), truth, rng.integers(0, k, shape))
    truth[rng.random(shape) < draw(st.sampled_from([0, .3, 1]))] = IGNORE
    return truth.astype(np.uint8), guess.astype(draw(st.sampled_from(['uint8', 'int32', 'int64']))), k


# ---- maps

@quick
@given(pairs())
def test_confusion_and_accuracy_against_sklearn(case):
    truth, guess, k = case
    c = confusion(truth, guess, k)
    valid = truth != IGNORE
    t, p = truth[valid], guess[valid]
    got = accuracy(c)
    assert c.shape == (k, k) and np.issubdtype(c.dtype, np.integer) and got['n_valid'] == len(t)
    if not len(t):
        assert c.sum() == 0 and all(np.isnan(got[n]) for n in ('oa', 'miou', 'mf1'))
        return
    assert np.array_equal(c, sk.confusion_matrix(t, p, labels=range(k)))
    present = np.unique(t)
    assert np.isclose(got['oa'], sk.accuracy_score(t, p))
    assert np.isclose(got['miou'], sk.jaccard_score(t, p, labels=present, average='macro', zero_division=0))
    assert np.isclose(got['mf1'], sk.f1_score(t, p, labels=present, average='macro', zero_division=0))
    assert np.allclose(
        class_iou(c)[present], sk.jaccard_score(t, p, labels=present, average=None, zero_division=0)
    )
    assert np.allclose(class_f1(c)[present], sk.f1_score(t, p, labels=present, average=None, zero_division=0))
    assert (
        np.isnan(np.delete(class_iou(c), present)).all() and np.isnan(np.delete(class_f1(c), present)).all()
    )


@pytest.mark.parametrize('k', [2, 15, 16, 254])                                       # the index leaves 8 bits after 15 classes
def test_confusion_counts_the_last_class(k):
    truth = np.array([[k - 1, k - 1, IGNORE]], np.uint8)
    guess = np.array([[k - 1, 0, k - 1]], np.uint8)
    c = confusion(truth, guess, k)
    assert c[k-1, k-1] == 1 == c[k-1, 0] and c.sum() == 2


@pytest.mark.parametrize('truth, guess, words', [([[3]], [[0]], '0..3'), ([[0]], [[3]], '0..3'), ([[0]], [[255]], '255'), ([[-1]], [[0]], '-1'), ([[0]], [[-1]], '-1'),
                                                ([[256]], [[0]], '256'), ([[0]], [[256]], '256'), ([[511]], [[0]], '511'), ([[254]], [[0]], '254')])
def test_ids_outside_the_class_table_are_refused_not_wrapped(truth, guess, words):
    with pytest.raises(SchemaError, match=words.replace('.', r'\.')):
        confusion(np.array(truth), np.array(guess), 3)


def test_shapes_must_agree():
    with pytest.raises(SchemaError, match=r'\(2, 3\) and \(3, 2\)'):
        confusion(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2)


def test_confusion_leaves_its_inputs_alone_and_adds_up():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, (2, 9, 9)).astype(np.uint8)
    before = truth.copy(), guess.copy()
    whole = confusion(truth, guess, 4)
    assert np.array_equal(truth, before[0]) and np.array_equal(guess, before[1])
    assert np.array_equal(whole, confusion(truth[:4], guess[:4], 4) + confusion(truth[4:], guess[4:], 4))
    assert np.array_equal(whole.T, confusion(guess, truth, 4)) and np.array_equal(
        whole, confusion(truth[::-1].T, guess[::-1].T, 4)
    )


def test_empty_masks_have_no_accuracy():
    assert accuracy(confusion(np.zeros((0, 5), np.uint8), np.zeros((0, 5), np.uint8), 3))['n_valid'] == 0


def test_perfect_and_worst():
    mask = np.array([[0, 1], [1, 2]], np.uint8)
    assert [accuracy(confusion(mask, mask, 4))[n] for n in ('oa', 'miou', 'mf1')] == [1, 1, 1]
    assert [accuracy(confusion(mask, np.full_like(mask, 3), 4))[n] for n in ('oa', 'miou', 'mf1')] == [
        0,
        0,
        0,
    ]


# ---- columns of numbers

@st.composite
def columns(draw): # two columns, with ties
    n = draw(st.integers(3, 40))
    levels = draw(st.sampled_from([2, 4, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return rng.integers(0, levels, n) / levels, rng.integers(0, levels, n) / levels


@quick
@given(columns())
def test_correlations_against_scipy(ys):
    y, s = ys
    if np.ptp(y) == 0 or np.ptp(s) == 0:
        assert all(np.isnan(f(y, s)) for f in (srocc, krocc, plcc, plcc_fitted))
        return
    for ours, theirs in ((srocc, stats.spearmanr), (krocc, stats.kendalltau), (plcc, stats.pearsonr)):
        assert np.isclose(ours(y, s), theirs(y, s)[0], atol=1e-9)
    assert np.isclose(rmse(y, s), sk.mean_squared_error(y, s) ** 0.5) and np.isclose(
        mae(y, s), sk.mean_absolute_error(y, s)
    )
    assert isinstance(srocc(y, s), float) and np.isclose(srocc(y, s), srocc(s, y))
    assert (
        np.isclose(srocc(y, np.exp(5 * s)), srocc(y, s))
        and np.isclose(plcc(y, 3 * s - 1), plcc(y, s))
        and np.isclose(krocc(y, -s), -krocc(y, s))
    )


@pytest.mark.parametrize('f', [srocc, krocc, plcc, plcc_fitted])
@pytest.mark.parametrize('y, s', [([], []), ([.5], [.5]), ([.1, .9], [.1, .9]), ([.5] * 5, [.1, .2, .3, .4, .5]), ([.1, .2, .3, .4, .5], [.7] * 5), ([.1, .2, .3], [.7, .7 + 1e-14, .7]),
                                  ([.1, np.nan, .3, .4, .5], [.1, .2, .3, .4, .5]), ([.1, .2, .3, .4, .5], [.1, .2, np.inf, .4, .5])])
def test_without_order_there_is_nan_and_no_warning(f, y, s):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert np.isnan(f(y, s))


def test_columns_of_any_kind():
    y, s = [.1, .5, .3, .9], [.2, .4, .3, .5]
    for kind in (list, np.array, pd.Series, lambda v: pd.Series(v, index=[9, 2, 7, 1]), lambda v: np.array(v, np.float32)):
        assert np.isclose(srocc(kind(y), s), 1) and rmse(kind(y), s) > 0
    # labels against labels is what 0 means
    assert rmse(y, y) == mae(y, y) == 0 and rmse(y, s) > mae(y, s) > 0


def test_fit_repairs_a_bent_scale_and_never_crashes():
    rng = np.random.default_rng(0)
    # another unit, and it saturates
    bent = rng.uniform(-60, 60, 200)
    y = .3 + .65 / (1 + np.exp(-(bent - 5) / 6)) + rng.normal(0, .005, 200)
    assert plcc_fitted(y, bent) > .995 > .97 > plcc(y, bent)
    # the fit turns a falling scale round
    assert plcc_fitted(y, -bent) > 0.995
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for n in (3, 4, 5, 9):  # four parameters, three rows
            assert -1 <= plcc_fitted(y[:n], bent[:n]) <= 1.0000001
        for _ in range(10): assert np.isfinite(plcc_fitted(rng.random(6), rng.random(6)))
    assert (
        mae(y, logistic(y, bent)) < 0.01
        and np.array_equal(logistic([0.5, 0.5, 0.5], [1, 2, 3]), [1, 2, 3])
        and FAILURE == 0.7
    )


# ---- groups

def table(rows): return pd.DataFrame(rows, columns=['image_id', 'dataset', 'method', 'oa', 'predicted'])


def random_table(images=12, methods=5, seed=0, levels=1000):
    rng = np.random.default_rng(seed)
    return table(
        [
            (
                f'i{i}',
                f'd{i % 2}',
                f'm{m}',
                rng.integers(0, levels) / levels,
                rng.integers(0, levels) / levels,
            )
            for i in range(images)
            for m in range(methods)
        ]
    )


def test_within_averages_groups_and_counts_the_skipped():
    t = pd.concat(
        [
            random_table(),
            table(
                [
                    ('small', 'd0', 'm0', 0.1, 0.2),
                    ('small', 'd0', 'm1', 0.3, 0.4),
                    *(('flat', 'd1', f'm{i}', 0.5, i / 9) for i in range(5)),
                ]
            ),
        ]
    )
    want = [
        stats.spearmanr(g.oa, g.predicted)[0] for n, g in t.groupby('image_id') if n not in ('small', 'flat')
    ]
    assert np.allclose(within(t, 'image_id'), (np.mean(want), 12, 2))
    assert within(t, 'image_id', min_rows=6)[1:] == (0, 14) and np.isnan(within(t, 'image_id', min_rows=6)[0])
    assert within(t, ['dataset', 'method'], mae)[1:] == (10, 0) and np.isclose(
        within(t, 'dataset', mae)[0], np.mean([mae(g.oa, g.predicted) for _, g in t.groupby('dataset')])
    )


def test_within_ignores_unused_categories_and_row_order():
    t = random_table()
    c = t.assign(image_id=pd.Categorical(t.image_id, [*t.image_id.unique(), 'never']))
    assert np.allclose(within(c, 'image_id'), within(t, 'image_id')) and np.allclose(
        within(t.sample(frac=1, random_state=0), 'image_id'), within(t, 'image_id')
    )


def test_pooling_hides_what_within_shows():
    rng = np.random.default_rng(0)
    level = np.repeat(rng.random(50), 6)
    t = random_table(50, 6).assign(
        oa=level + rng.normal(0, 0.01, 300), predicted=level + rng.normal(0, 0.01, 300)
    )
    assert srocc(t.oa, t.predicted) > .95 and abs(within(t, 'image_id')[0]) < .2


def test_all_groups_at_once_equal_the_loop():
    t = random_table(60, 5, levels=6)
    t.loc[t.image_id == 'i3', 'predicted'] = .5                                       # no order
    t.loc[t.image_id.isin(['i4', 'i5']) & (t.method == 'm0'), ['oa', 'predicted']] = [
        [np.nan, 0.1],
        [0.1, np.inf],
    ]
    t = t[(t.image_id != 'i6') | t.method.isin(['m0', 'm1'])].sample(frac=1, random_state=3)
    loop = {i: srocc(g.oa, g.predicted) if len(g) >= 3 else np.nan for i, g in t.groupby('image_id')}
    got = grouped_srocc(t.oa, t.predicted, t.groupby('image_id').ngroup())
    assert np.allclose(got, list(loop.values()), equal_nan=True) and np.isnan(got).sum() >= 4
    assert within(t, 'image_id') == pytest.approx(
        (np.nanmean(got), np.isfinite(got).sum(), np.isnan(got).sum())
    )
    code = t.groupby('image_id').ngroup().where(t.image_id != 'i1', -1)
    assert len(grouped_srocc(t.oa, t.predicted, code)) == 59 and len(grouped_srocc([], [], [])) == 0
    assert within(t[:0], 'image_id')[1:] == (0, 0)


def test_images_are_ranked_much_faster_than_one_by_one():
    t = random_table(800, 8)
    begun = time.process_time()
    within(t, 'image_id')
    ours = time.process_time() - begun
    begun = time.process_time()
    within(t, 'image_id', lambda y, s: srocc(y, s))
    loop = time.process_time() - begun
    assert ours < loop / 4


# ---- weights

@st.composite
def weightings(draw): # two columns with ties, group codes, multiplicities of several resamples
    n = draw(st.integers(3, 40))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    groups = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    group = pd.factorize(np.sort(rng.integers(0, groups, n)))[0]
    return (
        rng.integers(0, 1000, n) / 1000,
        rng.integers(0, levels, n) / levels,
        group,
        rng.integers(0, draw(st.sampled_from([2, 4])), (n, 5)),
    )


def repeated(group, w, *columns): # the rows that a weighting stands for, group by group
    for g in np.unique(group):
        at = np.repeat(np.flatnonzero(group == g), w[group == g])
        yield g, [c[at] for c in columns]


@quick
@given(weightings())
def test_weighted_ranks_are_ranks_of_repeated_rows(case):
    y, s, group, w = case
    got = Ranks(s, group)(w)
    for b in range(w.shape[1]):
        for g, (rows,) in repeated(group, w[:, b], np.arange(len(s))):
            if len(rows): assert np.allclose(got[rows, b], stats.rankdata(s[rows]) - (len(rows) + 1) / 2)
            assert np.isclose(
                Ranks(s, group).scatter(Ranks(s, group).totals(w))[g, b],
                np.var(stats.rankdata(s[rows])) * len(rows) if len(rows) else 0,
            )


@quick
@given(weightings())
def test_weighted_correlations_against_scipy_on_repeated_rows(case):
    y, s, group, w = case
    ry = Ranks(y, group)
    rs = Ranks(s, group)
    got = weighted_srocc(ry, rs, w)
    total = np.add.reduceat(w[:, None, :] * moments(y - y.mean(), s - s.mean())[:, :, None], ry.first, axis=0)
    for b in range(w.shape[1]):
        for g, (a, c) in repeated(group, w[:, b], y, s):
            varied = len(a) > 2 and np.ptp(a) > 0 and np.ptp(c) > 0
            want = (stats.spearmanr(a, c)[0], stats.pearsonr(a, c)[0]) if varied else (np.nan, np.nan)
            assert np.allclose((got[g, b], moment_plcc(total[g, :, b])), want, atol=1e-9, equal_nan=True)


@quick
@given(weightings())
def test_pair_balance_against_kendall_on_repeated_rows(case):
    y, s, unit, w = case
    ry = Ranks(y)
    rs = Ranks(s)
    units = unit.max() + 1
    c = pair_balance(ry, rs, unit)
    t1 = pair_balance(ry, ry, unit)
    t2 = pair_balance(rs, rs, unit)
    assert (
        np.array_equal(c, c.T)
        and c.shape == (units, units)
        and t1.sum() == len(y) ** 2 - sum(n**2 for n in np.unique(y, return_counts=True)[1])
    )
    for v in np.random.default_rng(0).integers(0, 3, (4, units)):
        at = np.repeat(np.arange(len(y)), v[unit])
        want = stats.kendalltau(y[at], s[at])[0] if len(at) > 1 else np.nan
        below = (v @ t1 @ v) * (v @ t2 @ v)
        if below: assert np.isclose(v @ c @ v / below**.5, want)
        else: assert np.isnan(want)


def test_pair_balance_takes_long_units():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 50, 300) / 50
    s = rng.random(300)
    unit = np.repeat([0, 1, 2], [1, 230, 69])
    assert pair_balance(Ranks(y), Ranks(s), unit).sum() == sum(
        np.sign(y - a) @ np.sign(s - b) for a, b in zip(y, s)
    )


@quick
@given(weightings(), st.floats(.05, .95))
def test_weighted_refusal_against_repeated_rows(case, threshold):
    y, s, _, w = case
    w[0] = 1
    ranks = Ranks(s)
    upto = ranks.totals(w)
    areas = weighted_aurc((1 - y)[:, None] * w, ranks, upto)
    rocs = weighted_auroc((y < threshold)[:, None] * w, ranks, upto)
    for b in range(w.shape[1]):
        (_, (a, c)), = repeated(np.zeros(len(y), int), w[:, b], y, s)
        order = np.random.default_rng(0).permutation(len(a))
        assert np.isclose(areas[b], aurc(a[order], c[order])) and np.isclose(
            rocs[b], failure_auroc(a, c, threshold), equal_nan=True
        )


def test_roc_against_sample_weights_of_sklearn():
    rng = np.random.default_rng(0)
    y = rng.random(200)
    s = rng.integers(0, 30, 200) / 30
    w = rng.integers(0, 4, (200, 3))
    got = weighted_auroc((y < .4)[:, None] * w, Ranks(s), Ranks(s).totals(w))
    assert np.allclose(got, [sk.roc_auc_score(y < .4, -s, sample_weight=v) for v in w.T])


# ---- choices

def by_hand(t, best, tie):
    "The definition, image by image."
    full = t.method.nunique()
    out = []
    for _, g in t.groupby('image_id'):
        g = g.dropna(subset=['oa', 'predicted']).sort_values('method').reset_index()
        if len(g) < full: continue
        top = g.oa.max()
        single = g.oa[list(g.method).index(best.get(g.dataset[0], best['']))]
        # each as likely as the others
        picks = [g.oa[i] for i in range(full) if g.predicted[i] == g.predicted.max()]
        out.append(
            (
                np.mean([p == top for p in picks]),
                np.mean([p >= top - tie for p in picks]),
                float(single == top),
                np.mean([top - p for p in picks]),
                top - single,
            )
        )
    if not out: return None
    mean = dict(zip(('top1', 'top1_tie', 'top1_single', 'regret', 'regret_single'), np.mean(out, 0)))
    return mean | dict(
        gap_closed=1 - mean['regret'] / mean['regret_single'] if mean['regret_single'] > 0 else np.nan,
        images=len(out),
    )


@quick
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 5), st.sampled_from([3, 1000]), st.floats(0, .3), st.booleans())
def test_recommendation_by_hand(seed, images, methods, levels, lost, by_row):
    t = random_table(images, methods, seed, levels)
    rng = np.random.default_rng(seed)
    gone = rng.random(len(t)) < lost
    # one image stays complete, so every method is known
    gone[:methods] = False
    best = {'d0': 'm1', '': 'm0'}                                                     # d1 was never seen
    t = t[~gone] if by_row else t.assign(predicted=t.predicted.where(~gone))
    got = recommendation(t.sample(frac=1, random_state=seed % 1000), best, .05)
    want = by_hand(t, best, .05)
    assert got.keys() == want.keys() and all(np.isclose(got[k], want[k], equal_nan=True) for k in want), (
        got,
        want,
    )


def test_oracle_single_best_and_worst():
    t = random_table()
    best = single_best(t)
    oracle = recommendation(t.assign(predicted=t.oa), best)
    assert oracle['regret'] == 0 and oracle['gap_closed'] == 1 == oracle['top1'] == oracle['top1_tie']
    stubborn = recommendation(t.assign(predicted=(t.method == t.dataset.map(best)).astype(float)), best)
    assert (
        stubborn['gap_closed'] == 0
        and stubborn['regret'] == stubborn['regret_single']
        and stubborn['top1'] == stubborn['top1_single']
    )
    assert recommendation(t.assign(predicted=-t.oa), best)['gap_closed'] < 0


def test_single_image_ties_and_nothing():
    one = table([('i', 'd', 'a', .8, .5), ('i', 'd', 'b', .8, .4), ('i', 'd', 'c', .797, .9)])
    got = recommendation(one, {'': 'b'})
    assert (
        got['images'] == 1
        and got['top1'] == 0
        and got['top1_tie'] == 1
        and got['top1_single'] == 1
        and np.isclose(got['regret'], 0.003)
        and np.isnan(got['gap_closed'])
    )
    # equal scores: two of three are best
    assert recommendation(one.assign(predicted=0.5), {'': 'a'})['top1'] == pytest.approx(2 / 3)
    nothing = recommendation(one.assign(predicted=np.nan), {'': 'a'})
    assert (
        nothing['images'] == 0
        and all(np.isnan(v) for k, v in nothing.items() if k != 'images')
        and nothing.keys() == got.keys()
    )


def test_a_constant_predictor_is_neither_lucky_nor_unlucky():
    t = random_table(40, 5)
    # the alphabet turned round
    names = dict(zip(sorted(t.method.unique()), 'edcba'))
    mute, turned = (
        recommendation(v.assign(predicted=0.7), single_best(v))
        for v in (t, t.assign(method=t.method.map(names)))
    )
    assert mute == pytest.approx(turned) and mute['regret'] == pytest.approx(
        (t.groupby('image_id').oa.max() - t.groupby('image_id').oa.mean()).mean()
    )
    level = t.groupby('image_id').oa.transform('mean')
    jitter = t.assign(predicted=level * (1 + 1e-15 * np.random.default_rng(0).random(len(t))))
    assert views(jitter) == pytest.approx(views(t.assign(predicted=level)), abs=1e-6, nan_ok=True)
    # the order of additions is no opinion
    noise = t.assign(predicted=0.7 + np.random.default_rng(0).choice([-1, 1], len(t)) * 1e-16)
    assert recommendation(noise, single_best(t)) == pytest.approx(mute) and np.isnan(
        within(noise, 'image_id')[0]
    )


def test_ties_equal_the_mean_over_random_choices():
    t = random_table(30, 5, levels=4)
    rng = np.random.default_rng(1)
    best = single_best(t)
    drawn = [
        recommendation(t.assign(predicted=t.predicted + 1e-6 * rng.random(len(t))), best) for _ in range(60)
    ]
    got = recommendation(t, best)
    for k in ('top1', 'top1_tie', 'regret', 'gap_closed'):
        assert got[k] == pytest.approx(
            np.mean([d[k] for d in drawn]), abs=4 * np.std([d[k] for d in drawn]) / 60**0.5 + 1e-6
        )


def test_choices_are_the_images_behind_the_recommendation():
    t = random_table(12, 5)
    # one image lacks a method
    chosen = choices(t[1:], single_best(t), 0.1)
    assert (
        len(chosen) == 11
        and t.image_id[0] not in chosen.index
        and gains(chosen) == recommendation(t[1:], single_best(t), 0.1)
    )
    assert chosen.loc['i3', 'regret'] == pytest.approx(
        t[t.image_id == 'i3'].oa.max() - t[t.image_id == 'i3'].set_index('predicted').oa.sort_index().iloc[-1]
    )


def test_a_rival_without_rows_gives_nan_not_another_method():
    got = recommendation(random_table(), {'': 'left out'})
    assert (
        all(np.isnan(got[k]) for k in ('top1_single', 'regret_single', 'gap_closed'))
        and np.isfinite(got['regret'])
        and got['images'] == 12
    )


def test_duplicate_rows_are_an_error():
    t = random_table()
    with pytest.raises(ValueError, match='uplicate'): recommendation(pd.concat([t, t[:1]]), {'': 'm0'})


def test_single_best_by_hand():
    t = random_table(seed=5)
    best = single_best(t)
    assert set(best) == {'d0', 'd1', ''} and best[''] == max(
        t.method.unique(), key=lambda m: t.oa[t.method == m].mean()
    )
    for d in ('d0', 'd1'):
        assert best[d] == max(
            t.method.unique(), key=lambda m: t.oa[(t.method == m) & (t.dataset == d)].mean()
        )
    unlabelled = t.assign(dataset='new', oa=np.nan)
    # maps without labels say nothing
    assert single_best(pd.concat([t, unlabelled])) == best


def test_wide():
    t = random_table()
    w = wide(t.sample(frac=1, random_state=1), 'oa')
    assert (
        w.shape == (12, 5)
        and list(w.columns) == sorted(w.columns)
        and all(w.loc[r.image_id, r.method] == r.oa for r in t.itertuples())
    )


# ---- refusal

def area(y, s): # of one order, by the definition
    order = sorted(range(len(y)), key=lambda i: -s[i])
    return np.mean([np.mean([1 - y[i] for i in order[:n]]) for n in range(1, len(y) + 1)])


@quick
@given(columns())
def test_aurc_against_a_loop(ys):
    y, s = ys
    s = s + 1e-6 * np.arange(len(s))                                                  # no ties
    assert np.isclose(aurc(y, s), area(y, s)) and aurc(y, y) <= aurc(y, s) + 1e-12 <= aurc(y, -y) + 2e-12
    assert np.isclose(aurc(np.ones(7), np.arange(7)), 0) and np.isclose(aurc(y[:1], s[:1]), 1 - y[0])


@quick
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=6))
def test_aurc_is_the_mean_over_all_orders_of_ties(rows):
    y, s = np.array(rows).T / 5
    orders = [p for p in itertools.permutations(range(len(y))) if all(s[a] >= s[b] for a, b in zip(p, p[1:]))]
    assert np.isclose(
        aurc(y, s), np.mean([np.mean(np.cumsum(1 - y[list(p)]) / np.arange(1, len(y) + 1)) for p in orders])
    )


def test_row_order_does_not_move_a_measure():
    t = random_table(40, 5, levels=4)
    for seed in range(3):
        assert views(t.sample(frac=1, random_state=seed)) == pytest.approx(views(t), abs=1e-6)


@quick
@given(columns(), st.floats(.05, .95))
def test_failure_auroc_by_pairs(ys, threshold):
    y, s = ys
    bad, good = s[y < threshold], s[y >= threshold]
    if not len(bad) or not len(good):
        assert np.isnan(failure_auroc(y, s, threshold))
        return
    want = np.mean([(b < g) + .5 * (b == g) for b, g in itertools.product(bad, good)])
    assert np.isclose(failure_auroc(y, s, threshold), want) and np.isclose(
        want, sk.roc_auc_score(y < threshold, -s)
    )


# ---- all in one row

def test_evaluate_is_the_sum_of_its_parts_and_drops_rows_without_numbers():
    t = random_table()
    holed = pd.concat(
        [
            t,
            table(
                [
                    ('i99', 'd0', 'm0', np.nan, 0.5),
                    ('i98', 'd0', 'm0', 0.5, np.nan),
                    ('i97', 'd0', 'm0', 0.5, np.inf),
                ]
            ),
        ]
    )
    got = evaluate(holed, t)
    y, s = t.oa, t.predicted
    want = dict(
        srocc_image=within(t, 'image_id')[0],
        srocc_dataset=within(t, 'dataset')[0],
        srocc_method=within(t, ['dataset', 'method'])[0],
        plcc_dataset=within(t, 'dataset', plcc)[0],
        plcc_fitted_dataset=within(t, 'dataset', plcc_fitted)[0],
        krocc_dataset=within(t, 'dataset', krocc)[0],
        srocc=srocc(y, s),
        plcc=plcc(y, s),
        plcc_fitted=plcc_fitted(y, s),
        krocc=krocc(y, s),
        mae=mae(y, s),
        rmse=rmse(y, s),
        aurc=aurc(y, s),
        failure_auroc=failure_auroc(y, s, 0.7),
        failure_below=0.7,
        **recommendation(t, single_best(t)),
        n_rows=60,
        n_images=12,
    )
    assert got == pytest.approx(want, nan_ok=True)


def test_evaluate_needs_a_row():
    t = random_table()
    with pytest.raises(SchemaError, match='Predict first'): evaluate(t.assign(predicted=np.nan), t)
