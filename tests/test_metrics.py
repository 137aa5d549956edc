"""Measures against scikit-learn, SciPy and plain loops, and their results where nothing can be measured."""
import itertools, time, warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn import metrics as sk

from rssqa.core import SchemaError
from rssqa.segment.metrics import (
    FAILURE, IGNORE, Ranks, accuracy, aurc, choices, class_f1, class_iou, confusion, evaluate, failure_auroc,
    gains, grouped_srocc, krocc, logistic, mae, moment_plcc, moments, pair_balance, plcc, plcc_fitted,
    recommendation, rmse, single_best, srocc, views, weighted_auroc, weighted_aurc, weighted_srocc, wide,
    within,
)

quick = settings(max_examples=60, deadline=None)


@st.composite
def pairs(draw): # truth with ignored pixels, prediction, K
    k = draw(st.integers(2, 40))
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    seed = draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    present = rng.choice(k, rng.integers(1, k + 1), replace=False)       # some classes are absent
    truth = rng.choice(present, shape)
    correct = rng.random(shape) < draw(st.sampled_from([0, .5, 1]))
    predicted = np.where(correct, truth, rng.integers(0, k, shape))
    truth[rng.random(shape) < draw(st.sampled_from([0, .3, 1]))] = IGNORE
    return truth.astype(np.uint8), predicted.astype(draw(st.sampled_from(['uint8', 'int32', 'int64']))), k


# ---- maps

@quick
@given(pairs())
def test_confusion_and_accuracy_against_sklearn(case):
    truth, predicted, k = case
    c = confusion(truth, predicted, k)
    valid = truth != IGNORE
    t, p = truth[valid], predicted[valid]
    got = accuracy(c)
    assert c.shape == (k, k) and np.issubdtype(c.dtype, np.integer) and got['n_valid'] == len(t)
    if not len(t):
        assert c.sum() == 0 and all(np.isnan(got[n]) for n in ('oa', 'miou', 'mf1'))
        return
    assert np.array_equal(c, sk.confusion_matrix(t, p, labels=range(k)))
    present = np.unique(t)
    assert np.isclose(got['oa'], sk.accuracy_score(t, p))
    mean = dict(labels=present, average='macro', zero_division=0)
    assert np.isclose(got['miou'], sk.jaccard_score(t, p, **mean))
    assert np.isclose(got['mf1'], sk.f1_score(t, p, **mean))
    each = dict(labels=present, average=None, zero_division=0)
    assert np.allclose(class_iou(c)[present], sk.jaccard_score(t, p, **each))
    assert np.allclose(class_f1(c)[present], sk.f1_score(t, p, **each))
    assert np.isnan(np.delete(class_iou(c), present)).all()
    assert np.isnan(np.delete(class_f1(c), present)).all()


@pytest.mark.parametrize('k', [2, 15, 16, 254])           # the index needs more than 8 bits above 15 classes
def test_confusion_counts_the_last_class(k):
    truth = np.array([[k - 1, k - 1, IGNORE]], np.uint8)
    predicted = np.array([[k - 1, 0, k - 1]], np.uint8)
    c = confusion(truth, predicted, k)
    assert c[k-1, k-1] == 1 == c[k-1, 0] and c.sum() == 2


WRONG_IDS = [
    (3, 0, '0..3'), (0, 3, '0..3'), (0, 255, '255'), (-1, 0, '-1'), (0, -1, '-1'), (256, 0, '256'),
    (0, 256, '256'), (511, 0, '511'), (254, 0, '254'),
]


@pytest.mark.parametrize('truth, predicted, words', WRONG_IDS)
def test_ids_outside_the_class_table_are_refused_not_wrapped(truth, predicted, words):
    with pytest.raises(SchemaError, match=words.replace('.', r'\.')):
        confusion(np.array([[truth]]), np.array([[predicted]]), 3)


def test_shapes_must_agree():
    with pytest.raises(SchemaError, match=r'\(2, 3\) and \(3, 2\)'):
        confusion(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2)


def test_confusion_leaves_its_inputs_alone_and_adds_up():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (2, 9, 9)).astype(np.uint8)
    before = truth.copy(), predicted.copy()
    whole = confusion(truth, predicted, 4)
    assert np.array_equal(truth, before[0]) and np.array_equal(predicted, before[1])
    upper = confusion(truth[:4], predicted[:4], 4)
    lower = confusion(truth[4:], predicted[4:], 4)
    assert np.array_equal(whole, upper + lower)
    assert np.array_equal(whole.T, confusion(predicted, truth, 4))
    assert np.array_equal(whole, confusion(truth[::-1].T, predicted[::-1].T, 4))


def test_empty_masks_have_no_accuracy():
    assert accuracy(confusion(np.zeros((0, 5), np.uint8), np.zeros((0, 5), np.uint8), 3))['n_valid'] == 0


def test_perfect_and_worst():
    mask = np.array([[0, 1], [1, 2]], np.uint8)
    best = accuracy(confusion(mask, mask, 4))
    worst = accuracy(confusion(mask, np.full_like(mask, 3), 4))
    assert best == dict(oa=1, miou=1, mf1=1, n_valid=4)
    assert worst == dict(oa=0, miou=0, mf1=0, n_valid=4)



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
    assert np.isclose(rmse(y, s), sk.mean_squared_error(y, s) ** 0.5)
    assert np.isclose(mae(y, s), sk.mean_absolute_error(y, s))
    assert isinstance(srocc(y, s), float) and np.isclose(srocc(y, s), srocc(s, y))
    assert np.isclose(srocc(y, np.exp(5 * s)), srocc(y, s))
    assert np.isclose(plcc(y, 3 * s - 1), plcc(y, s))
    assert np.isclose(krocc(y, -s), -krocc(y, s))


RISING = [.1, .2, .3, .4, .5]
WITHOUT_ORDER = [
    ([], []), ([.5], [.5]), ([.1, .9], [.1, .9]),                               # too few
    ([.5] * 5, RISING), (RISING, [.7] * 5), ([.1, .2, .3], [.7, .7 + 1e-14, .7]),   # constant
    ([.1, np.nan, .3, .4, .5], RISING), (RISING, [.1, .2, np.inf, .4, .5]),     # not finite
]


@pytest.mark.parametrize('f', [srocc, krocc, plcc, plcc_fitted])
@pytest.mark.parametrize('y, s', WITHOUT_ORDER)
def test_without_order_there_is_nan_and_no_warning(f, y, s):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert np.isnan(f(y, s))


def test_columns_of_any_kind():
    y, s = [.1, .5, .3, .9], [.2, .4, .3, .5]
    def shuffled_index(v): return pd.Series(v, index=[9, 2, 7, 1])
    for kind in (list, np.array, pd.Series, shuffled_index, np.float32):
        assert np.isclose(srocc(kind(y), s), 1) and rmse(kind(y), s) > 0
    assert rmse(y, y) == mae(y, y) == 0       # no error where both columns are equal
    assert rmse(y, s) > mae(y, s) > 0


def test_fit_repairs_a_bent_scale_and_never_crashes():
    rng = np.random.default_rng(0)
    bent = rng.uniform(-60, 60, 200)          # another unit, and it saturates
    y = .3 + .65 / (1 + np.exp(-(bent - 5) / 6)) + rng.normal(0, .005, 200)
    assert plcc_fitted(y, bent) > .995 > .97 > plcc(y, bent)
    assert plcc_fitted(y, -bent) > 0.995      # the fit reverses a falling scale
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for n in (3, 4, 5, 9):  # four parameters, three rows
            assert -1 <= plcc_fitted(y[:n], bent[:n]) <= 1.0000001
        for _ in range(10): assert np.isfinite(plcc_fitted(rng.random(6), rng.random(6)))
    assert mae(y, logistic(y, bent)) < 0.01
    assert np.array_equal(logistic([0.5, 0.5, 0.5], [1, 2, 3]), [1, 2, 3])
    assert FAILURE == 0.7


# ---- groups

def table(rows): return pd.DataFrame(rows, columns=['image_id', 'dataset', 'method', 'oa', 'predicted'])


def random_table(images=12, methods=5, seed=0, levels=1000):
    rng = np.random.default_rng(seed)
    rows = []
    for i, m in itertools.product(range(images), range(methods)):
        oa = rng.integers(0, levels) / levels
        predicted = rng.integers(0, levels) / levels
        rows.append((f'i{i}', f'd{i % 2}', f'm{m}', oa, predicted))
    return table(rows)


def test_within_averages_groups_and_counts_the_skipped():
    small = [('small', 'd0', 'm0', 0.1, 0.2), ('small', 'd0', 'm1', 0.3, 0.4)]
    flat = [('flat', 'd1', f'm{i}', 0.5, i / 9) for i in range(5)]
    t = pd.concat([random_table(), table(small + flat)])
    usable = t[~t.image_id.isin(['small', 'flat'])]
    expected = [stats.spearmanr(g.oa, g.predicted)[0] for _, g in usable.groupby('image_id')]
    assert np.allclose(within(t, 'image_id'), (np.mean(expected), 12, 2))
    mean, used, skipped = within(t, 'image_id', min_rows=6)
    assert np.isnan(mean) and (used, skipped) == (0, 14)
    assert within(t, ['dataset', 'method'], mae)[1:] == (10, 0)
    errors = [mae(g.oa, g.predicted) for _, g in t.groupby('dataset')]
    assert np.isclose(within(t, 'dataset', mae)[0], np.mean(errors))


def test_within_ignores_unused_categories_and_row_order():
    t = random_table()
    c = t.assign(image_id=pd.Categorical(t.image_id, [*t.image_id.unique(), 'never']))
    assert np.allclose(within(c, 'image_id'), within(t, 'image_id'))
    assert np.allclose(within(t.sample(frac=1, random_state=0), 'image_id'), within(t, 'image_id'))


def test_pooled_correlation_can_be_high_while_that_within_images_is_low():
    rng = np.random.default_rng(0)
    level = np.repeat(rng.random(50), 6)
    oa = level + rng.normal(0, 0.01, 300)
    predicted = level + rng.normal(0, 0.01, 300)
    t = random_table(50, 6).assign(oa=oa, predicted=predicted)
    assert srocc(t.oa, t.predicted) > .95 and abs(within(t, 'image_id')[0]) < .2


def test_all_groups_at_once_equal_the_loop():
    t = random_table(60, 5, levels=6)
    t.loc[t.image_id == 'i3', 'predicted'] = .5       # no order
    first_method = t.image_id.isin(['i4', 'i5']) & (t.method == 'm0')
    t.loc[first_method, ['oa', 'predicted']] = [[np.nan, 0.1], [0.1, np.inf]]
    t = t[(t.image_id != 'i6') | t.method.isin(['m0', 'm1'])].sample(frac=1, random_state=3)
    loop = {i: srocc(g.oa, g.predicted) if len(g) >= 3 else np.nan for i, g in t.groupby('image_id')}
    got = grouped_srocc(t.oa, t.predicted, t.groupby('image_id').ngroup())
    assert np.allclose(got, list(loop.values()), equal_nan=True) and np.isnan(got).sum() >= 4
    expected = (np.nanmean(got), np.isfinite(got).sum(), np.isnan(got).sum())
    assert within(t, 'image_id') == pytest.approx(expected)
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
    y = rng.integers(0, 1000, n) / 1000
    s = rng.integers(0, levels, n) / levels
    return y, s, group, rng.integers(0, draw(st.sampled_from([2, 4])), (n, 5))


def repeated(group, w, *columns): # the rows that a weighting stands for, group by group
    for g in np.unique(group):
        at = np.repeat(np.flatnonzero(group == g), w[group == g])
        yield g, [c[at] for c in columns]


@quick
@given(weightings())
def test_weighted_ranks_are_ranks_of_repeated_rows(case):
    y, s, group, w = case
    ranks = Ranks(s, group)
    got = ranks(w)
    scatter = ranks.scatter(ranks.totals(w))
    for b in range(w.shape[1]):
        for g, (rows,) in repeated(group, w[:, b], np.arange(len(s))):
            expected = stats.rankdata(s[rows])
            if len(rows): assert np.allclose(got[rows, b], expected - (len(rows) + 1) / 2)
            assert np.isclose(scatter[g, b], np.var(expected) * len(rows) if len(rows) else 0)


@quick
@given(weightings())
def test_weighted_correlations_against_scipy_on_repeated_rows(case):
    y, s, group, w = case
    ry = Ranks(y, group)
    rs = Ranks(s, group)
    got = weighted_srocc(ry, rs, w)
    weighted = w[:, None, :] * moments(y - y.mean(), s - s.mean())[:, :, None]
    total = np.add.reduceat(weighted, ry.first, axis=0)
    for b in range(w.shape[1]):
        for g, (a, c) in repeated(group, w[:, b], y, s):
            varied = len(a) > 2 and np.ptp(a) > 0 and np.ptp(c) > 0
            expected = (stats.spearmanr(a, c)[0], stats.pearsonr(a, c)[0]) if varied else (np.nan, np.nan)
            assert np.allclose((got[g, b], moment_plcc(total[g, :, b])), expected, atol=1e-9, equal_nan=True)


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
    assert np.array_equal(c, c.T) and c.shape == (units, units)
    assert t1.sum() == len(y) ** 2 - sum(n**2 for n in np.unique(y, return_counts=True)[1])
    for v in np.random.default_rng(0).integers(0, 3, (4, units)):
        at = np.repeat(np.arange(len(y)), v[unit])
        expected = stats.kendalltau(y[at], s[at])[0] if len(at) > 1 else np.nan
        below = (v @ t1 @ v) * (v @ t2 @ v)
        if below: assert np.isclose(v @ c @ v / below**.5, expected)
        else: assert np.isnan(expected)


def test_pair_balance_takes_long_units():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 50, 300) / 50
    s = rng.random(300)
    unit = np.repeat([0, 1, 2], [1, 230, 69])
    expected = sum(np.sign(y - a) @ np.sign(s - b) for a, b in zip(y, s))
    assert pair_balance(Ranks(y), Ranks(s), unit).sum() == expected


@quick
@given(weightings(), st.floats(.05, .95))
def test_weighted_rejection_against_repeated_rows(case, threshold):
    y, s, _, w = case
    w[0] = 1
    ranks = Ranks(s)
    upto = ranks.totals(w)
    areas = weighted_aurc((1 - y)[:, None] * w, ranks, upto)
    rocs = weighted_auroc((y < threshold)[:, None] * w, ranks, upto)
    for b in range(w.shape[1]):
        (_, (a, c)), = repeated(np.zeros(len(y), int), w[:, b], y, s)
        order = np.random.default_rng(0).permutation(len(a))
        assert np.isclose(areas[b], aurc(a[order], c[order]))
        assert np.isclose(rocs[b], failure_auroc(a, c, threshold), equal_nan=True)


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
    methods = t.method.nunique()
    rows = []
    for _, g in t.groupby('image_id'):
        g = g.dropna(subset=['oa', 'predicted']).sort_values('method').reset_index()
        if len(g) < methods: continue
        top = g.oa.max()
        single = g.oa[list(g.method).index(best.get(g.dataset[0], best['']))]
        chosen = g.oa[g.predicted == g.predicted.max()]             # each as likely as the others
        rows.append(dict(
            top1=(chosen == top).mean(),
            top1_tie=(chosen >= top - tie).mean(),
            top1_single=float(single == top),
            regret=(top - chosen).mean(),
            regret_single=top - single,
        ))
    if not rows: return None
    mean = pd.DataFrame(rows).mean().to_dict()
    closed = 1 - mean['regret'] / mean['regret_single'] if mean['regret_single'] > 0 else np.nan
    return mean | dict(gap_closed=closed, images=len(rows))


@quick
@given(
    seed=st.integers(0, 10**6), images=st.integers(1, 8), methods=st.integers(2, 5),
    levels=st.sampled_from([3, 1000]), missing_share=st.floats(0, .3), by_row=st.booleans(),
)
def test_recommendation_by_hand(seed, images, methods, levels, missing_share, by_row):
    t = random_table(images, methods, seed, levels)
    missing = np.random.default_rng(seed).random(len(t)) < missing_share
    missing[:methods] = False                       # one image stays complete, so every method is known
    best = {'d0': 'm1', '': 'm0'}                   # d1 has no training rows
    t = t[~missing] if by_row else t.assign(predicted=t.predicted.where(~missing))
    got = recommendation(t.sample(frac=1, random_state=seed % 1000), best, .05)
    assert got == pytest.approx(by_hand(t, best, .05), nan_ok=True)


def test_oracle_single_best_and_worst():
    t = random_table()
    best = single_best(t)
    oracle = recommendation(t.assign(predicted=t.oa), best)
    assert oracle['regret'] == 0 and oracle['gap_closed'] == 1 == oracle['top1'] == oracle['top1_tie']
    always_single_best = (t.method == t.dataset.map(best)).astype(float)
    baseline = recommendation(t.assign(predicted=always_single_best), best)
    assert baseline['gap_closed'] == 0
    assert baseline['regret'] == baseline['regret_single']
    assert baseline['top1'] == baseline['top1_single']
    assert recommendation(t.assign(predicted=-t.oa), best)['gap_closed'] < 0


def test_single_image_ties_and_nothing():
    one = table([('i', 'd', 'a', .8, .5), ('i', 'd', 'b', .8, .4), ('i', 'd', 'c', .797, .9)])
    got = recommendation(one, {'': 'b'})
    assert got['images'] == 1 and got['top1'] == 0
    assert got['top1_tie'] == 1 and got['top1_single'] == 1
    assert np.isclose(got['regret'], 0.003) and np.isnan(got['gap_closed'])
    equal_scores = recommendation(one.assign(predicted=0.5), {'': 'a'})
    assert equal_scores['top1'] == pytest.approx(2 / 3)       # two of three are best
    nothing = recommendation(one.assign(predicted=np.nan), {'': 'a'})
    assert nothing['images'] == 0
    assert all(np.isnan(v) for k, v in nothing.items() if k != 'images')
    assert nothing.keys() == got.keys()


def test_a_constant_predictor_gets_the_mean_over_methods_whatever_their_names():
    t = random_table(40, 5)
    new_names = dict(zip(sorted(t.method.unique()), 'edcba'))           # the reverse order
    renamed = t.assign(method=t.method.map(new_names))
    constant = recommendation(t.assign(predicted=0.7), single_best(t))
    assert constant == pytest.approx(recommendation(renamed.assign(predicted=0.7), single_best(renamed)))
    oa = t.groupby('image_id').oa
    assert constant['regret'] == pytest.approx((oa.max() - oa.mean()).mean())
    rounding = t.assign(predicted=0.7 + np.random.default_rng(0).choice([-1, 1], len(t)) * 1e-16)
    assert recommendation(rounding, single_best(t)) == pytest.approx(constant)
    assert np.isnan(within(rounding, 'image_id')[0])


def test_rounding_errors_do_not_order_equal_predictions():
    t = random_table(40, 5)
    level = t.groupby('image_id').oa.transform('mean')
    rounded = t.assign(predicted=level * (1 + 1e-15 * np.random.default_rng(0).random(len(t))))
    assert views(rounded) == pytest.approx(views(t.assign(predicted=level)), abs=1e-6, nan_ok=True)


def test_ties_equal_the_mean_over_random_choices():
    t = random_table(30, 5, levels=4)
    rng = np.random.default_rng(1)
    best = single_best(t)
    drawn = []
    for _ in range(60):
        predicted = t.predicted + 1e-6 * rng.random(len(t))         # breaks ties at random
        drawn.append(recommendation(t.assign(predicted=predicted), best))
    drawn = pd.DataFrame(drawn)
    got = recommendation(t, best)
    for k in ('top1', 'top1_tie', 'regret', 'gap_closed'):
        standard_error = drawn[k].std(ddof=0) / 60**0.5
        assert got[k] == pytest.approx(drawn[k].mean(), abs=4 * standard_error + 1e-6)


def test_choices_are_the_images_behind_the_recommendation():
    t = random_table(12, 5)
    chosen = choices(t[1:], single_best(t), 0.1)            # one image has no row of a method
    assert len(chosen) == 11 and t.image_id[0] not in chosen.index
    assert gains(chosen) == recommendation(t[1:], single_best(t), 0.1)
    image = t[t.image_id == 'i3']
    best_predicted = image.set_index('predicted').oa.sort_index().iloc[-1]
    assert chosen.loc['i3', 'regret'] == pytest.approx(image.oa.max() - best_predicted)


def test_a_single_best_without_rows_gives_nan_not_another_method():
    got = recommendation(random_table(), {'': 'left out'})
    assert all(np.isnan(got[k]) for k in ('top1_single', 'regret_single', 'gap_closed'))
    assert np.isfinite(got['regret']) and got['images'] == 12


def test_duplicate_rows_are_an_error():
    t = random_table()
    with pytest.raises(ValueError, match='uplicate'): recommendation(pd.concat([t, t[:1]]), {'': 'm0'})


def test_single_best_by_hand():
    t = random_table(seed=5)
    best = single_best(t)
    def best_of(rows): return rows.groupby('method').oa.mean().idxmax()
    assert best == {'d0': best_of(t[t.dataset == 'd0']), 'd1': best_of(t[t.dataset == 'd1']), '': best_of(t)}
    unlabelled = t.assign(dataset='new', oa=np.nan)
    assert single_best(pd.concat([t, unlabelled])) == best       # maps without labels do not count


def test_wide():
    t = random_table()
    w = wide(t.sample(frac=1, random_state=1), 'oa')
    assert w.shape == (12, 5) and list(w.columns) == sorted(w.columns)
    assert all(w.loc[r.image_id, r.method] == r.oa for r in t.itertuples())


# ---- rejection

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
    n = len(y)
    areas = []
    for order in itertools.permutations(range(n)):
        order = list(order)
        if (np.diff(s[order]) > 0).any(): continue              # not by falling score
        areas.append(np.mean(np.cumsum(1 - y[order]) / np.arange(1, n + 1)))
    assert np.isclose(aurc(y, s), np.mean(areas))


def test_measures_do_not_depend_on_row_order():
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
    expected = np.mean([(b < g) + .5 * (b == g) for b, g in itertools.product(bad, good)])
    assert np.isclose(failure_auroc(y, s, threshold), expected)
    assert np.isclose(expected, sk.roc_auc_score(y < threshold, -s))


# ---- all in one row

def test_evaluate_is_the_sum_of_its_parts_and_drops_rows_without_numbers():
    t = random_table()
    train = random_table(seed=1)
    incomplete = table([
        ('i99', 'd0', 'm0', np.nan, 0.5), ('i98', 'd0', 'm0', 0.5, np.nan), ('i97', 'd0', 'm0', 0.5, np.inf),
    ])
    got = evaluate(pd.concat([t, incomplete]), train)
    y, s = t.oa, t.predicted
    expected = dict(
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
        **recommendation(t, single_best(train)),
        n_rows=60,
        n_images=12,
    )
    assert got == pytest.approx(expected, nan_ok=True)


def test_evaluate_chooses_the_single_best_method_on_training_rows():
    oa = {'i0': (.9, .5), 'i1': (.8, .4)}                       # on test images m0 is better than m1
    test = table([(i, 'd', f'm{k}', v[k], 1 - k) for i, v in oa.items() for k in (0, 1)])
    train = test.assign(oa=1 - test.oa)                         # on training images m1 is better
    got = evaluate(test, train)
    assert got['top1'] == 1 and got['regret'] == 0
    assert got['top1_single'] == 0 and got['regret_single'] == pytest.approx(.4) and got['gap_closed'] == 1
    same = evaluate(test, test)
    assert same['top1_single'] == 1 and same['regret_single'] == 0 and np.isnan(same['gap_closed'])


def test_evaluate_needs_a_row():
    t = random_table()
    with pytest.raises(SchemaError, match='Predict first'): evaluate(t.assign(predicted=np.nan), t)
