"""Points to label: what is asked, order of methods, calibration, parity with slow references, refusals."""
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rssqa.bench import labels as bench
from rssqa.core import Incompatible, UnknownName
from rssqa.quality import active_selection as chosen
from rssqa.quality.active_selection import (
    CODA, Informative, ModelSelector, RandomPoints, RecalibratedPosterior, Uncertainty, advise, best_of_betas,
    count_right, draw_problem, find_candidates, normal_standing,
)

SELECTORS = (RandomPoints, Uncertainty, ModelSelector, CODA, Informative)
every_selector = pytest.mark.parametrize('kind', SELECTORS)


@pytest.fixture(scope='module')
def problem(): # candidates of drawn methods, the first is the best, and their truth
    votes, q, truth = draw_problem((0.85, 0.7, 0.65), n=600, n_classes=3)
    candidates = find_candidates(votes, q)
    return candidates, truth[candidates.points]


def label(selector, truth, n, batch=10, seed=0):
    asked = np.array([], int)
    while len(asked) < n:
        more = selector.next(asked, truth[asked], min(batch, n - len(asked)), seed)
        if not len(more): break
        asked = np.append(asked, more)
    return asked


# ---------------------------------------------------------------- what is asked

def test_points_where_all_agree_are_no_candidates():
    votes, q, _ = draw_problem(n=500)
    found = find_candidates(votes, q)
    same = (votes == votes[:, :1]).all(1)
    assert same.any() and not same[found.points].any()
    assert len(found.differ[0]) == (~same).sum() and found.share == pytest.approx((~same).mean())
    np.testing.assert_array_equal(found.votes, votes[found.points])


def test_a_sample_of_candidates_keeps_labelled_points():
    votes, q, _ = draw_problem(n=500)
    all_points = find_candidates(votes, q).points
    found = find_candidates(votes, q, most=50, keep=all_points[-30:])
    assert np.isin(all_points[-30:], found.points).all() and 50 <= len(found.points) <= 80
    assert len(found.differ[1]) == len(all_points)


def test_drawn_points_come_in_proportion_to_their_scores():
    class Proportional(chosen.Selector):
        drawn = True
        def scores(self, asked, truth): return np.array([0.5] + [0.5 / 9] * 9)

    votes = np.zeros((10, 2), int)
    selector = Proportional(type('Ten', (), dict(votes=votes)))
    none = np.array([], int)
    first = np.array([selector.next(none, none, 1, seed)[0] for seed in range(4000)])
    shares = np.bincount(first, minlength=10) / len(first)
    np.testing.assert_allclose(shares, [0.5] + [0.5 / 9] * 9, atol=0.025)


@every_selector
def test_points_are_new_and_different(problem, kind):
    candidates, truth = problem
    asked = label(kind(candidates), truth, 60)
    assert len(set(asked)) == len(asked) == 60


@every_selector
def test_all_points_can_be_asked_and_no_more(kind):
    votes, q, truth = draw_problem((0.8, 0.6), n=40, n_classes=2)
    candidates = find_candidates(votes, q)
    truth = truth[candidates.points]
    asked = label(kind(candidates), truth, 10**6)
    assert sorted(asked) == list(range(len(truth)))
    assert not len(kind(candidates).next(asked, truth[asked], 3))


@every_selector
def test_the_same_seed_asks_the_same_points(problem, kind):
    candidates, truth = problem
    first, again = (label(kind(candidates), truth, 30, seed=4) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize('kind', [RandomPoints, Informative])
def test_another_seed_asks_other_points(problem, kind):
    candidates, truth = problem
    assert set(label(kind(candidates), truth, 30, seed=0)) != set(label(kind(candidates), truth, 30, seed=1))


def test_uncertainty_asks_the_most_even_votes_first(problem):
    candidates, _ = problem
    scores = Uncertainty(candidates).scores([], [])
    picked = Uncertainty(candidates).next([], [], 20)
    assert scores[picked].min() >= np.sort(scores)[-20]


def test_informative_points_set_leader_and_rival_apart():
    "The third method is far behind: points where only it differs say little."
    votes, q, truth = draw_problem((0.8, 0.78, 0.3), n=4000, n_classes=2)
    candidates = find_candidates(votes, q)
    truth = truth[candidates.points]
    asked = np.random.default_rng(0).permutation(len(truth))[:200]
    scores = Informative(candidates).scores(asked, truth[asked])
    differ = candidates.votes[:, 0] != candidates.votes[:, 1]
    assert scores[differ].mean() > 3 * scores[~differ].mean()


# ---------------------------------------------------------------- the answer

@every_selector
def test_a_perfect_method_is_found(kind):
    votes, q, truth = draw_problem((1.0, 0.6, 0.6, 0.6), n=500)
    candidates = find_candidates(votes, q)
    selector = kind(candidates)
    asked = label(selector, truth[candidates.points], 80)
    assert selector.standing(asked, truth[candidates.points][asked]).leader == 0


def test_with_all_truth_the_answer_is_certain(problem):
    candidates, truth = problem
    every = np.arange(len(truth))
    standing = RecalibratedPosterior(candidates).standing(every, truth)
    oa = (candidates.votes == truth[:, None]).mean(0)
    np.testing.assert_allclose(standing.mean, candidates.share * oa)
    assert standing.best.tolist() == np.eye(3)[oa.argmax()].tolist()


def test_more_labels_make_surer(problem):
    candidates, truth = problem
    order = np.random.default_rng(0).permutation(len(truth))
    model = RecalibratedPosterior(candidates)
    spreads = [np.trace(model.moments(model.fit(order[:n], truth[order[:n]]), order[:n], truth[order[:n]])[1])
               for n in (0, 10, 50, 200)]
    assert (np.diff(spreads) < 0).all()


@pytest.mark.parametrize('kind', [ModelSelector, CODA, Informative])
def test_methods_in_another_order_permute_the_answer(problem, kind):
    candidates, truth = problem
    order = [2, 0, 1]
    usual = (candidates.usual[0][:, order], candidates.usual[1])
    turned = chosen.Candidates(candidates.votes[:, order], candidates.q, candidates.points, candidates.share,
                               (candidates.differ[0][:, order], candidates.differ[1]), usual)
    asked = np.random.default_rng(0).permutation(len(truth))[:50]
    first, second = kind(candidates), kind(turned)
    scores = [np.asarray(s.scores(asked, truth[asked])) for s in (first, second)]
    assert np.corrcoef(*scores)[0, 1] > 0.95
    straight, permuted = (s.standing(asked, truth[asked]) for s in (first, second))
    np.testing.assert_allclose(straight.mean[order], permuted.mean, atol=1e-6)
    np.testing.assert_allclose(straight.best[order], permuted.best, atol=0.05)


@pytest.mark.parametrize('kind', [ModelSelector, CODA, Informative])
def test_classes_in_another_order_change_nothing(problem, kind):
    candidates, truth = problem
    new = np.array([2, 0, 1])                                             # old class -> new class
    q = candidates.q[:, np.argsort(new)]
    usual = (new[candidates.usual[0]], candidates.usual[1][:, np.argsort(new)])
    differ = (new[candidates.differ[0]], candidates.differ[1][:, np.argsort(new)])
    turned = chosen.Candidates(new[candidates.votes], q, candidates.points, candidates.share, differ, usual)
    asked = np.random.default_rng(0).permutation(len(truth))[:50]
    first = kind(candidates).standing(asked, truth[asked])
    second = kind(turned).standing(asked, new[truth[asked]])
    np.testing.assert_allclose(first.mean, second.mean, atol=0.02)


def test_labels_in_another_order_change_nothing(problem):
    candidates, truth = problem
    asked = np.arange(40)
    for kind in SELECTORS:
        one, other = (kind(candidates).standing(a, truth[a]) for a in (asked, asked[::-1]))
        np.testing.assert_allclose(one.mean, other.mean, atol=1e-8)


def test_normal_standing_counts_margins():
    equal = normal_standing(np.array([0.5, 0.5]), 1e-4 * np.eye(2), draws=20000)
    assert equal.best == pytest.approx([0.5, 0.5], abs=0.02) and (equal.near > equal.best).all()
    difference = stats.norm(0, np.sqrt(2e-4))
    assert equal.near[0] == pytest.approx(difference.cdf(0.005), abs=0.02)


# ---------------------------------------------------------------- calibration

def test_stops_are_right_as_often_as_they_say():
    "Drawn problems with close methods: of stops at 95 %, about 95 % or more are right."
    right = []
    for seed in range(36):
        rng = np.random.default_rng(seed)
        accuracies = 0.75 + rng.normal(0, 0.05, 4)
        votes, q, truth = draw_problem(tuple(accuracies), n=3000, n_classes=3, seed=seed)
        candidates = find_candidates(votes, q, most=600)
        oa = (votes == truth[:, None]).mean(0)
        selector, labels = Informative(candidates), truth[candidates.points]
        asked = np.array([], int)
        while len(asked) < 200:
            asked = np.append(asked, selector.next(asked, labels[asked], 40, seed))
            standing = selector.standing(asked, labels[asked])
            if standing.near[standing.leader] < 0.95: continue
            right.append(oa[standing.leader] >= oa.max() - 0.005)
            break
    assert len(right) >= 10 and np.mean(right) >= 0.9


def test_without_labels_drawn_equal_methods_are_open():
    votes, q, _ = draw_problem((0.7, 0.7, 0.7, 0.7), n=3000)
    assert RecalibratedPosterior(find_candidates(votes, q)).standing([], []).best.max() < 0.7


# ---------------------------------------------------------------- parity with slow references

def test_weights_are_the_mode_of_the_posterior(problem):
    from scipy.optimize import minimize
    candidates, truth = problem
    asked = np.arange(0, 120, 2)
    model = RecalibratedPosterior(candidates)
    def loss(w):
        total = 0.5 * (model.precision * (w - model.start)**2).sum()
        for i, y in zip(asked, truth[asked]):
            logits = model.features[i] @ w
            total += np.log(np.exp(logits).sum()) - logits[y]
        return total
    fitted = model.fit(asked, truth[asked])
    np.testing.assert_allclose(fitted.w, minimize(loss, model.start, tol=1e-9).x, atol=1e-3)


def test_features_are_logarithm_class_and_votes(problem):
    candidates, _ = problem
    model = RecalibratedPosterior(candidates)
    for i, c in ((0, 0), (5, 2), (9, 1)):
        agrees = candidates.votes[i] == c
        pairs = [agree * (k == c) for agree in agrees for k in range(3)]
        expected = [np.log(candidates.q[i, c] + 0.01), *np.eye(3)[c], *agrees, *pairs]
        np.testing.assert_allclose(model.features[i, c], expected)


def test_corrected_probabilities_are_those_of_the_features(problem):
    candidates, _ = problem
    model = RecalibratedPosterior(candidates)
    w = np.random.default_rng(0).normal(size=model.features.shape[2])
    logits = model.features @ w
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(chosen.corrected(candidates.votes, candidates.q, w), expected)


def test_gradient_is_that_of_finite_differences(problem):
    candidates, truth = problem
    asked, step = np.arange(20), 1e-5
    model = RecalibratedPosterior(candidates)
    fitted = model.fit(asked, truth[asked])
    unknown = np.setdiff1d(np.arange(len(truth)), asked)
    for f in range(len(fitted.w)):
        sums = []
        for sign in (1, -1):
            w = fitted.w + sign * step * np.eye(len(fitted.w))[f]
            sums.append(model._apply(w, fitted.cov, asked).voted[unknown].sum(0))
        slope = candidates.share * (sums[0] - sums[1]) / (2 * step) / len(truth)
        np.testing.assert_allclose(fitted.gradient[:, f], slope, atol=1e-7)


def test_information_is_the_fall_of_the_variance_for_a_weak_label(problem):
    "Where one label adds little, the first-order formula is the exact fall of the variance."
    candidates, truth = problem
    asked = np.arange(150)
    model = RecalibratedPosterior(candidates)
    fitted = model.fit(asked, truth[asked])
    best = np.array([0.5, 0.5, 0.0])
    scores = chosen.information(model.features, fitted, best)
    pairs = (fitted.gradient[0] - fitted.gradient) * np.sqrt(best + 1e-3)[:, None]
    for i in (160, 170, 180, 190):
        x, p = model.features[i], fitted.p[i]
        fisher = x.T @ (np.diag(p) - np.outer(p, p)) @ x
        after = np.linalg.inv(np.linalg.inv(fitted.cov) + fisher)
        exact = np.trace(pairs @ (fitted.cov - after) @ pairs.T)
        assert scores[i] == pytest.approx(exact, rel=0.15)


def test_model_selector_is_bayes_and_mutual_information(problem):
    candidates, truth = problem
    asked, epsilon = np.arange(15), 0.4
    selector = ModelSelector(candidates, epsilon)
    prior = np.ones(3)
    for i in asked: prior *= np.where(candidates.votes[i] == truth[i], 1 - epsilon, epsilon)
    prior /= prior.sum()
    np.testing.assert_allclose(selector.standing(asked, truth[asked]).best, prior)
    scores = selector.scores(asked, truth[asked])
    for i in (20, 40, 60):
        expected = 0
        for c in range(3):
            after = prior * np.where(candidates.votes[i] == c, 1 - epsilon, epsilon)
            after /= after.sum()
            expected -= stats.entropy(after) / 3
        assert scores[i] == pytest.approx(expected)


def test_best_of_betas_is_the_share_of_draws():
    hit, missed = np.array([8.0, 6.0, 2.0]), np.array([2.0, 3.0, 1.0])
    drawn = np.random.default_rng(0).beta(hit, missed, (100_000, 3)).argmax(1)
    np.testing.assert_allclose(best_of_betas(hit, missed), np.bincount(drawn) / 100_000, atol=0.01)


def test_coda_scores_are_those_of_a_loop_over_points_and_classes(problem):
    candidates, truth = problem
    asked = np.arange(25)
    selector = CODA(candidates, eta=0.5)
    scores = selector.scores(asked, truth[asked])
    theta = selector.confusion(asked, truth[asked])
    def by_class(theta):
        rows = []
        for c in range(3):
            hit = theta[:, c, c]
            rows.append(best_of_betas(hit, theta[:, c].sum(1) - hit))
        return np.array(rows)
    recall = theta / theta.sum(2, keepdims=True)
    def classes(votes):
        p = np.array([[recall[m, c, v] for m, v in enumerate(votes)] for c in range(3)]).sum(1)
        return p / p.sum()
    shares = np.mean([classes(v) for v in candidates.usual[0]], 0)
    now = shares @ by_class(theta)
    for i in (30, 50, 70):
        expected = 0
        for c in range(3):
            changed = theta.copy()
            for m, v in enumerate(candidates.votes[i]): changed[m, c, v] += 0.5
            expected += classes(candidates.votes[i])[c] * stats.entropy(shares @ by_class(changed))
        assert scores[i] == pytest.approx(stats.entropy(now) - expected, abs=1e-9)


def test_coda_prior_rows_sum_to_its_strength(problem):
    candidates, _ = problem
    prior = chosen.consensus_prior(*candidates.usual)
    np.testing.assert_allclose(prior.sum(2), chosen.STRENGTH)
    assert (np.diagonal(prior, axis1=1, axis2=2) > prior.mean()).all()


def test_counting_is_a_share_with_a_weak_prior(problem):
    candidates, truth = problem
    standing = count_right(candidates, np.arange(50), truth[:50])
    right = (candidates.votes[:50] == truth[:50, None]).sum(0)
    np.testing.assert_allclose(standing.mean, candidates.share * right / 52)


# ---------------------------------------------------------------- advice

def test_advice_ends_with_the_best_method_first():
    votes, q, truth = draw_problem((0.6, 0.9, 0.6), n=800)
    points = np.array([], int)
    for _ in range(20):
        advice = advise(votes, q, points, truth[points], names=list('abc'), n=10)
        assert not np.isin(advice.points, points).any()
        if advice.stop: break
        points = np.append(points, advice.points)
    assert advice.stop and advice.leader == 'b' and advice.table.behind['b'] == 0
    assert advice.table.p_best.sum() == pytest.approx(1) and advice.labels == len(points)


def test_labels_where_all_agree_say_nothing():
    votes, q, truth = draw_problem(n=500)
    same = np.flatnonzero((votes == votes[:, :1]).all(1))[:20]
    without, with_labels = advise(votes, q), advise(votes, q, same, truth[same])
    assert with_labels.labels == 0
    pd.testing.assert_frame_equal(without.table, with_labels.table)


@pytest.mark.parametrize('change, words', [
    (dict(votes=np.zeros((5, 1), int)), 'do not fit'),
    (dict(q=np.ones((4, 2))), 'do not fit'),
    (dict(votes=np.full((5, 2), 7)), 'votes are not class ids'),
    (dict(votes=np.full((5, 2), 0.5)), 'votes are not class ids'),
    (dict(q=np.full((5, 2), np.nan)), 'not valid'),
    (dict(q=np.zeros((5, 2))), 'not valid'),
    (dict(votes=np.zeros((5, 2), int)), 'same class at every point'),
    (dict(points=[0], classes=[]), 'do not fit'),
    (dict(points=[0, 0], classes=[1, 1]), 'do not fit'),
    (dict(points=[9], classes=[1]), 'points are not'),
    (dict(points=[0], classes=[2]), 'classes are not class ids'),
    (dict(names=['a']), 'names'),
])
def test_bad_inputs_are_named(change, words):
    good = dict(votes=np.array([[0, 1], [1, 0], [0, 0], [1, 1], [0, 1]]), q=np.full((5, 2), 0.5))
    advise(**good)
    with pytest.raises(Incompatible, match=words) as raised: advise(**(good | change))
    assert 'Found' in str(raised.value)


# ---------------------------------------------------------------- the bench

def drawn_source(seed=0):
    votes, q, truth = draw_problem((0.85, 0.8, 0.7), n=3000, n_classes=3, seed=seed)
    return bench.SourcePoints(votes, truth, np.repeat(np.arange(30), 100), dict.fromkeys(bench.PRIORS, q))


def test_a_run_records_every_batch_and_the_shared_estimate():
    problem = bench.draw_problem(drawn_source(), bench.PRIORS[0], 10)
    run = bench.run_selector(problem, 'coda', 50)
    own = run[run.estimate == 'own']
    assert own.labels.tolist()[:21] == list(range(21)) and own.labels.max() == 50
    assert set(run[run.estimate == 'shared'].labels) == {1, 2, 5, 10, 20, 50}
    assert len(problem.truth) == 1000 and (run.loss >= 0).all() and run.sure.between(0, 1).all()


def test_random_points_of_all_find_the_best():
    problem = bench.draw_problem(drawn_source(), bench.PRIORS[0], 30)
    run = bench.run_random(problem)
    own = run[run.estimate == 'own'].set_index('labels')
    assert own.loss[2000] == 0 and own.sure[2000] > own.sure[1]


def test_unknown_names_of_the_bench():
    problem = bench.draw_problem(drawn_source(), bench.PRIORS[0], 3)
    with pytest.raises(UnknownName): bench.run_selector(problem, 'best')
    with pytest.raises(UnknownName): bench.draw_problem(drawn_source(), 'none')
    with pytest.raises(UnknownName): bench.source_points('mars', '.')


def test_runs_are_kept_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, 'source_points', lambda *_: drawn_source())
    monkeypatch.setattr(bench, 'COUNTS', (1, 5, 10))
    monkeypatch.setattr(bench, 'RANDOM_COUNTS', (1, 5, 10))
    monkeypatch.setattr(bench.run_selector, '__defaults__', (10, 0))
    board, _ = bench.bench_labels('.', home=tmp_path, sources=('amazon_forest',), repeats=2, images=10)
    monkeypatch.setattr(bench, '_runs', None)
    again, _ = bench.bench_labels('.', home=tmp_path, sources=('amazon_forest',), repeats=2, images=10)
    pd.testing.assert_frame_equal(board, again)
    assert set(board.selector) == {'random', *bench.SELECTORS}
    assert set(board.source) == {bench.ALL, 'amazon_forest'}
    assert (board.runs == 2).all() and board.near_10.between(0, 1).all()
    assert len(bench.plot_labels(board).ax_.lines) == len(bench.LINES) + 1


def test_a_run_that_never_stops_counts_with_its_last_label():
    rows = [dict(labels=n, loss=0.0, sure=0.1) for n in (1, 5, 10)]
    runs = pd.DataFrame(rows).assign(source='a', seed=0, prior='p', selector='s', estimate='own')
    measured = bench.measure_runs(runs).iloc[0]
    assert measured.stopped == 0 and measured.labels_stop == 10 and np.isnan(measured.right_stop)
    assert measured.labels_95 == 1 and measured.settled == 0
