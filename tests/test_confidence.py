"""Label-free columns: definitions by brute force, and what must not change them."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from rssqa.segment.confidence import (
    AGREEMENT,
    CRUMB,
    agreement,
    boundary,
    uncertainty,
    fit_temperature,
    label_free,
    pool_features,
    segments,
    feature_columns,
    feature_names,
)

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)
close = lambda a, b, atol=1e-5: np.allclose(a, b, atol=atol, rtol=1e-4)


def noise(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def blobs(seed, n=2, k=4, h=24, w=20):  # logits of maps with segments
    return torch.nn.functional.avg_pool2d(noise(seed, n, k, h, w) * 9, 5, 1, 2)


# ---- per pixel

@quick
@given(seeds, st.integers(2, 7), st.sampled_from([.3, 1., 4.]))
def test_doubt_by_definition(seed, k, temperature):
    logits = noise(seed, 2, k, 3, 4) * 3
    got = uncertainty(logits, temperature)
    p = torch.softmax(logits.double() / temperature, 1).sort(1).values
    assert close(got['conf'], p[:, -1]) and close(got['margin'], p[:, -1] - p[:, -2])
    assert close(got['entropy'], stats.entropy(p.numpy(), axis=1) / np.log(k))
    assert all(v.shape == (2, 3, 4) and v.min() >= -1e-6 and v.max() <= 1 + 1e-6 for v in got.values())


def test_doubt_at_the_ends():
    torn = torch.zeros(1, 3, 1, 1)
    sure = torch.tensor([1000., 0, -1000]).view(1, 3, 1, 1)
    equal = torch.tensor([5., 5, -50]).view(1, 3, 1, 1)
    ends = [{k: v.item() for k, v in uncertainty(x).items()} for x in (torn, sure, equal)]
    assert ends[0] == pytest.approx(dict(conf=1 / 3, margin=0, entropy=1), abs=1e-6) and ends[
        1
    ] == pytest.approx(dict(conf=1, margin=0 + 1, entropy=0), abs=1e-6)
    assert ends[2] == pytest.approx(dict(conf=.5, margin=0, entropy=np.log(2) / np.log(3)), abs=1e-6)
    # one class leaves no uncertainty
    assert {k: v.item() for k, v in uncertainty(torch.ones(1, 1, 1, 1)).items()} == dict(
        conf=1, margin=1, entropy=0
    )


# ---- edges and segments

masks = st.builds(
    lambda seed, h, w, k: np.random.default_rng(seed).integers(0, k, (h, w)).astype(np.uint8),
    seeds,
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(1, 4),
)


def flood(mask):
    "Number the regions by flood fill, one pixel at a time."
    out = np.full(mask.shape, -1)
    n = 0
    for start in np.ndindex(mask.shape):
        if out[start] >= 0: continue
        stack = [start]
        while stack:
            y, x = stack.pop()
            if not (0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]) or out[y, x] >= 0 or mask[y, x] != mask[start]:
                continue
            out[y, x] = n
            stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        n += 1
    return out


@quick
@given(masks)
def test_segments_are_those_of_a_flood_fill(mask):
    ours = segments(mask)
    theirs = flood(mask)
    pairs = set(zip(ours.ravel(), theirs.ravel()))
    # one to one, no gap
    assert (
        ours.dtype == np.int32
        and len(pairs) == theirs.max() + 1 == ours.max() + 1 == len(np.unique(ours))
        and ours.min() == 0
    )


@pytest.mark.parametrize('k', [1, 5])
def test_segments_keep_diagonals_apart_and_take_any_ids(k):
    board = (np.indices((6, 6)).sum(0) % 2 * k).astype(np.uint8)
    assert (
        segments(board).max() == 35
        and segments(np.full((4, 4), 255, np.uint8)).max() == 0
        and segments(board == 0).max() == 35
    )


@quick
@given(masks)
def test_boundary_by_definition_and_its_symmetries(mask):
    h, w = mask.shape
    near = lambda y, x: [
        (v, u) for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)) if 0 <= v < h and 0 <= u < w
    ]
    edge = boundary(mask)
    assert edge.dtype == bool and all(
        edge[p] == any(mask[q] != mask[p] for q in near(*p)) for p in np.ndindex(h, w)
    )
    for turn in (np.transpose, np.flipud, np.fliplr, np.rot90):
        assert np.array_equal(boundary(turn(mask)), turn(edge))
    assert np.array_equal(boundary(9 - mask), edge) and not boundary(np.zeros_like(mask)).any()


# ---- one row a map

def row_by_hand(logits, t):
    "Every column of one map, from its definition."
    p, pt = (torch.softmax(logits.double() / u, 0).numpy() for u in (1, t))
    mask = logits.argmax(0).numpy()
    conf = pt.max(0)
    entropy = lambda q: (stats.entropy(q, axis=0) / np.log(len(q))).mean()
    edge = boundary(mask)
    parts = flood(mask)
    areas = np.array([(parts == i).sum() for i in range(parts.max() + 1)])
    seg = np.array([conf[parts == i].mean() for i in range(parts.max() + 1)])
    share = np.unique(mask, return_counts=True)[1] / mask.size
    top = np.sort(p, 0)
    mean = lambda where: conf[where].mean() if where.any() else conf.mean()
    return dict(
        conf=top[-1].mean(),
        margin=(top[-1] - top[-2]).mean(),
        entropy=entropy(p),
        conf_t=conf.mean(),
        entropy_t=entropy(pt),
        low_t=(conf < 0.5).mean(),
        energy=torch.logsumexp(logits, 0).mean().item(),
        conf_in=mean(~edge),
        conf_edge=mean(edge),
        conf_low=np.quantile(conf, 0.1),
        conf_std=conf.std(),
        edge=edge.mean(),
        parts=np.log(1 + len(areas)),
        crumbs=areas[areas < CRUMB * mask.size].sum() / mask.size,
        seg_conf=seg.mean(),
        seg_conf_std=seg.std(),
        class_entropy=stats.entropy(share),
        classes_seen=len(share),
        top_share=share.max(),
    )


@quick
@given(seeds, st.integers(2, 5), st.sampled_from([.5, 1., 2.5]))
def test_label_free_by_hand(seed, k, t):
    logits = blobs(seed, 2, k)
    got = label_free(logits, t)
    assert list(got.index) == [0, 1] and (got.dtypes == np.float32).all()
    for i in range(2):
        want = row_by_hand(logits[i], t)
        assert list(got.columns) == list(want) and close(got.iloc[i], [want[c] for c in got]), dict(
            got=dict(got.iloc[i]), want=want
        )


def test_crumbs_count_regions_below_a_thousandth():
    logits = torch.zeros(1, 3, 100, 100)
    logits[:, 0] = 5
    # 9, 10 and 1 of 10,000 pixels
    logits[0, 1, 10, 10:19] = logits[0, 1, 50, 50:60] = logits[0, 2, 80, 80] = 9
    assert label_free(logits).crumbs[0] == np.float32(10 / 10000)


def columns_of(logits, **kwargs): return label_free(logits, 1.7, kwargs.get('flipped', logits.flip(-1) * .9))


@quick
@given(seeds, st.floats(-30, 30), st.permutations(range(4)))
def test_what_must_not_change_label_free_columns(seed, constant, order):
    logits = blobs(seed)
    other = blobs(seed + 1)
    base = columns_of(logits, flipped=other)
    shifted = columns_of(logits + constant, flipped=other - constant)
    assert close(shifted.drop(columns='energy'), base.drop(columns='energy')) and close(
        shifted.energy - base.energy, constant
    )
    assert close(columns_of(logits[:, list(order)], flipped=other[:, list(order)]), base)
    assert close(columns_of(logits.transpose(2, 3), flipped=other.transpose(2, 3)), base) and close(
        columns_of(logits.flip(-1), flipped=other.flip(-1)), base
    )
    alone = pd.concat([columns_of(logits[i:i+1], flipped=other[i:i+1]) for i in range(2)], ignore_index=True)
    assert close(alone, base) and close(columns_of(logits.flip(0), flipped=other.flip(0)).iloc[::-1], base)


def test_shift_of_single_pixels_changes_nothing_either():
    logits = blobs(0)
    assert close(
        label_free(logits + 5 * noise(1, 2, 1, 24, 20)).drop(columns='energy'),
        label_free(logits).drop(columns='energy'),
    )


@pytest.mark.parametrize('k', [2, 6])
@pytest.mark.parametrize('scale', [0, 1e-6, 1, 1e4])
@pytest.mark.parametrize('h, w', [(16, 16), (1, 1), (1, 9)])
def test_no_nan_and_no_warning(k, scale, h, w):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for logits in (noise(0, 2, k, h, w) * scale, torch.stack([torch.full((2, h, w), float(scale * (i == 1))) for i in range(k)], 1)):    # ragged, and one class alone
            got = label_free(logits, 2., logits)
            assert np.isfinite(got).all().all() and (got.tta == 1).all() and (got.tta_gap == 0).all()
            assert (
                (got.drop(columns=['energy', 'parts', 'classes_seen', 'class_entropy']) >= -1e-6).all().all()
            )


def test_one_class_map_has_one_segment_and_no_edge():
    logits = noise(0, 1, 3, 12, 12) + torch.tensor([0, 50., 0]).view(1, 3, 1, 1)
    row = label_free(logits).iloc[0]
    assert (
        (row.edge, row.classes_seen, row.top_share, row.crumbs, row.class_entropy) == (0, 1, 1, 0, 0)
        and row.parts == np.float32(np.log(2))
        and row.conf_edge == row.conf_in
    )


def test_temperature_touches_only_calibrated_columns():
    logits = blobs(3)
    cold = label_free(logits, 1)
    warm = label_free(logits, 3)
    moved = {c for c in cold if not np.allclose(cold[c], warm[c])}
    assert moved == {
        'conf_t',
        'entropy_t',
        'low_t',
        'conf_in',
        'conf_edge',
        'conf_low',
        'conf_std',
        'seg_conf',
        'seg_conf_std',
    }
    assert (warm.conf_t < cold.conf_t).all() and close(cold.conf, cold.conf_t)


def test_flip_columns_by_hand():
    a = blobs(0)
    b = blobs(1)
    got = label_free(a, flipped=b)
    pa = a.softmax(1)
    pb = b.softmax(1)
    # total variation
    assert close(got.tta, (a.argmax(1) == b.argmax(1)).float().mean((1, 2))) and close(
        got.tta_gap, (pa - pb).clamp_min(0).sum(1).mean((1, 2))
    )
    assert close(
        label_free(b, flipped=a)[['tta', 'tta_gap']], got[['tta', 'tta_gap']]
    ) and 'tta' not in label_free(a)
    certain = torch.tensor([99., 0]).view(1, 2, 1, 1)
    # the most that two can differ
    assert label_free(certain, flipped=certain.flip(1)).tta_gap[0] == 1


# ---- taps

def taps(seed, n=2): return noise(seed, n, 6, 12, 10).relu() + .1, noise(seed + 1, n, 9, 3, 4) * 2


def test_pool_taps_by_hand():
    f = taps(0)
    want = np.concatenate([g for t in f for g in (t.numpy().mean((2, 3)), t.numpy().std((2, 3)))], 1)
    assert (
        close(pool_features(f), want)
        and pool_features(f).shape == (2, 30)
        and pool_features((f[0].bfloat16(),)).dtype == torch.float32
    )


@pytest.mark.parametrize('n, names', [(1, ['tap0']), (2, ['dec', 'enc']), (3, ['tap0', 'tap1', 'tap2']), (0, [])])
def test_tap_names(n, names): assert feature_names(n) == names


def test_tap_columns_by_hand():
    f = taps(4)
    mask = blobs(0, h=12, w=10).argmax(1)
    ref = torch.stack([pool_features(f).mean(0), pool_features(f).std(0) + .5]) * 1.1
    got = feature_columns(f[:1], mask, 4, ref[:, :12])
    assert (
        list(got) == ['tap0_norm', 'tap0_rank', 'tap0_fisher', 'tap0_shift']
        and (got.dtypes == np.float32).all()
    )
    for i in range(2):
        x = f[0][i].flatten(1).double().numpy()
        m = mask[i].flatten().numpy()
        values = np.linalg.eigvalsh(np.cov(x))
        between = sum((m == c).sum() * ((x[:, m == c].mean(1) - x.mean(1))**2).sum() for c in np.unique(m))
        shift = ((pool_features(f[:1])[i] - ref[0, :12]) / ref[1, :12]).abs().mean()
        assert close(
            got.iloc[i],
            [
                np.log(np.sqrt((x**2).mean())),
                values.sum() ** 2 / (values**2).sum() / 6,
                between / ((x - x.mean(1, keepdims=True)) ** 2).sum(),
                shift,
            ],
            1e-4,
        )


@quick
@given(seeds, st.permutations(range(6)), st.permutations(range(9)), st.permutations(range(4)))
def test_what_must_not_change_tap_columns(seed, order, order2, classes):
    f = taps(seed)
    mask = blobs(seed).argmax(1)
    ref = torch.stack([noise(seed, 30), noise(seed + 2, 30).abs() + .1])
    base = feature_columns(f, mask, 4, ref)
    moved = torch.as_tensor(
        [*order, *(6 + i for i in order), *(12 + i for i in order2), *(21 + i for i in order2)]
    )
    assert close(
        feature_columns((f[0][:, list(order)], f[1][:, list(order2)]), mask, 4, ref[:, moved]), base, 1e-4
    )
    assert close(feature_columns(f, torch.as_tensor(classes)[mask], 4, ref), base, 1e-4) and close(
        feature_columns(f, mask, 9, ref), base, 1e-4
    )
    alone = pd.concat(
        [feature_columns(tuple(t[i : i + 1] for t in f), mask[i : i + 1], 4, ref) for i in range(2)],
        ignore_index=True,
    )
    assert close(alone, base, 1e-4) and close(
        feature_columns(f, mask, 4), base[[c for c in base if 'shift' not in c]], 1e-4
    )


def test_tap_columns_range_and_ends():
    mask = blobs(0).argmax(1)
    aware = torch.nn.functional.one_hot(mask, 4).movedim(-1, 1).float()
    one_direction = noise(0, 2, 1, 24, 20).expand(2, 7, 24, 20)
    got = feature_columns((aware, one_direction), mask, 4)
    assert (
        close(got.dec_fisher, 1)
        and (got.enc_fisher < 0.1).all()
        and close(got.enc_rank, 1 / 7)
        and (got.dec_rank > 0.25).all()
    )
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        dead = feature_columns(
            (torch.zeros(2, 3, 4, 4), torch.full((2, 3, 1, 1), 7.0)), mask, 4, torch.zeros(2, 12)
        )
    # clipped at 20
    assert (
        np.isfinite(dead).all().all()
        and (dead[['dec_rank', 'dec_fisher', 'enc_fisher']] == 0).all().all()
        and dead.dec_shift[0] == 0
        and dead.enc_shift[0] == 10
    )


def test_shift_is_small_at_home():
    f = noise(0, 40, 5, 8, 8)
    ref = torch.stack([pool_features((f,)).mean(0), pool_features((f,)).std(0)])
    mask = torch.zeros(40, 8, 8, dtype=torch.long)
    home, away = (feature_columns((x,), mask, 2, ref).tap0_shift.mean() for x in (f, f * 2 + 1))
    assert home < 1.2 and away > 5 * home


# ---- agreement

@quick
@given(seeds, st.integers(2, 6), st.integers(1, 4))
def test_agreement_by_counting(seed, m, k):
    maps = np.random.default_rng(seed).integers(0, k, (m, 4, 5)).astype(np.uint8)
    got = agreement(maps)
    assert tuple(got.columns) == AGREEMENT and len(got) == m and (got.dtypes == np.float32).all()
    for i in range(m):
        rest = [maps[j] for j in range(m) if j != i]
        pairwise = [(maps[i] == r).mean() for r in rest]
        # a tie goes to the lowest id
        votes = np.array(
            [
                [max(range(k), key=lambda c: (sum(r[y, x] == c for r in rest), -c)) for x in range(5)]
                for y in range(4)
            ]
        )
        assert close(
            got.iloc[i], [np.mean(pairwise), (maps[i] == votes).mean(), max(pairwise), min(pairwise)]
        )


def test_majority_leaves_the_own_vote_out():
    a = np.zeros((2, 2), np.uint8)
    b = np.ones((2, 2), np.uint8)
    # tie a:b goes to a
    assert agreement(np.stack([a, b])).agree_majority.tolist() == [0, 0] and agreement(
        np.stack([a, a, b])
    ).agree_majority.tolist() == [1, 1, 0]
    assert agreement(np.stack([b, b, a])).agree_majority.tolist() == [0, 0, 0]


@pytest.mark.parametrize('m', [0, 1])
def test_agreement_needs_two(m):
    got = agreement(np.zeros((m, 3, 3), np.uint8))
    assert got.shape == (m, 4) and got.isna().all().all() and tuple(got) == AGREEMENT


def test_agreement_of_equals_of_many_and_of_ignored_pixels():
    mask = np.random.default_rng(0).integers(0, 7, (9, 9)).astype(np.uint8)
    for n in (2, 8, 100): assert (agreement(np.stack([mask] * n)) == 1).all().all()
    holed = np.where(mask == 0, 255, mask).astype(np.uint8)
    assert (agreement(np.stack([holed] * 3)) == 1).all().all() and close(
        agreement(np.stack([holed, mask])).agree_mean, (mask != 0).mean()
    )


def test_agreement_follows_its_rows():
    maps = np.random.default_rng(1).integers(0, 3, (5, 8, 8)).astype(np.uint8)
    order = [3, 1, 4, 0, 2]
    assert close(agreement(maps[order]), agreement(maps).iloc[order]) and close(
        agreement(maps.astype(np.int64)), agreement(maps)
    )


# ---- temperature

@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(2, 6), st.floats(.4, 9))
def test_temperature_against_a_grid(seed, k, true):
    rng = torch.Generator().manual_seed(seed)
    honest = torch.randn(1500, k, generator=rng) * 1.5
    labels = torch.multinomial(honest.softmax(1), 1, generator=rng)[:, 0]
    loss = lambda t: torch.nn.functional.cross_entropy(honest * true / t, labels).item()
    grid = np.exp(np.linspace(-2, 3, 400))
    found = fit_temperature(honest * true, labels)
    assert loss(found) <= min(map(loss, grid)) + 1e-6 and true / 1.35 < found < true * 1.35


def test_temperature_ends():
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 1
    right = torch.nn.functional.one_hot(torch.tensor([0, 1, 2])).float()
    # always right: sharpen; always wrong: flatten
    assert (
        fit_temperature(right, torch.tensor([0, 1, 2])) < 0.2
        and fit_temperature(right, torch.tensor([1, 2, 0])) > 19
    )
    assert isinstance(fit_temperature(right, torch.tensor([0, 1, 1])), float)
