"""Label-free columns: definitions by brute force, and what must not change them."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from rssqa.segment.confidence import (
    AGREEMENT, SMALL_SEGMENT, agreement, boundary, feature_columns, feature_names, fit_temperature,
    label_free, pool_features, segments, uncertainty,
)

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)


def close(a, b, atol=1e-5): return np.allclose(a, b, atol=atol, rtol=1e-4)
def noise(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(seed, n=2, k=4, h=24, w=20): # logits of maps with segments
    return torch.nn.functional.avg_pool2d(noise(seed, n, k, h, w) * 9, 5, 1, 2)


# ---- per pixel

@quick
@given(seeds, st.integers(2, 7), st.sampled_from([.3, 1., 4.]))
def test_uncertainty_by_definition(seed, k, temperature):
    logits = noise(seed, 2, k, 3, 4) * 3
    got = uncertainty(logits, temperature)
    p = torch.softmax(logits.double() / temperature, 1).sort(1).values
    assert close(got['conf'], p[:, -1]) and close(got['margin'], p[:, -1] - p[:, -2])
    assert close(got['entropy'], stats.entropy(p.numpy(), axis=1) / np.log(k))
    assert all(v.shape == (2, 3, 4) and v.min() >= -1e-6 and v.max() <= 1 + 1e-6 for v in got.values())


def test_uncertainty_of_equal_and_of_certain_logits():
    def values(logits):
        pixel = torch.tensor(logits).view(1, -1, 1, 1)
        return {k: v.item() for k, v in uncertainty(pixel).items()}
    undecided = dict(conf=1 / 3, margin=0, entropy=1)
    certain = dict(conf=1, margin=1, entropy=0)
    two_equal = dict(conf=.5, margin=0, entropy=np.log(2) / np.log(3))
    assert values([0., 0, 0]) == pytest.approx(undecided, abs=1e-6)
    assert values([1000., 0, -1000]) == pytest.approx(certain, abs=1e-6)
    assert values([5., 5, -50]) == pytest.approx(two_equal, abs=1e-6)
    assert values([1.]) == certain                                  # one class leaves no uncertainty


# ---- edges and segments

@st.composite
def masks(draw):
    sides = st.integers(1, 14)
    rng = np.random.default_rng(draw(seeds))
    return rng.integers(0, draw(st.integers(1, 4)), (draw(sides), draw(sides))).astype(np.uint8)


def flood(mask):
    "Number the regions by flood fill, one pixel at a time."
    out = np.full(mask.shape, -1)
    n = 0
    for start in np.ndindex(mask.shape):
        if out[start] >= 0: continue
        stack = [start]
        while stack:
            pixel = stack.pop()
            if out[pixel] >= 0 or mask[pixel] != mask[start]: continue
            out[pixel] = n
            stack += neighbours(mask, *pixel)
        n += 1
    return out


def neighbours(mask, y, x):
    h, w = mask.shape
    around = ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1))
    return [(v, u) for v, u in around if 0 <= v < h and 0 <= u < w]


@quick
@given(masks())
def test_segments_are_those_of_a_flood_fill(mask):
    ours = segments(mask)
    theirs = flood(mask)
    pairs = set(zip(ours.ravel(), theirs.ravel()))
    # one to one, no gap
    assert ours.dtype == np.int32
    assert len(pairs) == theirs.max() + 1 == ours.max() + 1 == len(np.unique(ours))
    assert ours.min() == 0


@pytest.mark.parametrize('k', [1, 5])
def test_segments_keep_diagonals_apart_and_take_any_ids(k):
    board = (np.indices((6, 6)).sum(0) % 2 * k).astype(np.uint8)
    assert segments(board).max() == 35
    assert segments(np.full((4, 4), 255, np.uint8)).max() == 0
    assert segments(board == 0).max() == 35


@quick
@given(masks())
def test_boundary_by_definition_and_its_symmetries(mask):
    edge = boundary(mask)
    assert edge.dtype == bool
    for pixel in np.ndindex(mask.shape):
        assert edge[pixel] == any(mask[n] != mask[pixel] for n in neighbours(mask, *pixel))
    for turn in (np.transpose, np.flipud, np.fliplr, np.rot90):
        assert np.array_equal(boundary(turn(mask)), turn(edge))
    assert np.array_equal(boundary(9 - mask), edge) and not boundary(np.zeros_like(mask)).any()


# ---- one row a predicted segmentation

def row_by_hand(logits, t):
    "Every column of one map, from its definition."
    p = torch.softmax(logits.double(), 0).numpy()
    scaled = torch.softmax(logits.double() / t, 0).numpy()
    mask = logits.argmax(0).numpy()
    conf = scaled.max(0)
    edge = boundary(mask)
    parts = flood(mask)
    in_part = [parts == i for i in range(parts.max() + 1)]
    areas = np.array([part.sum() for part in in_part])
    part_conf = np.array([conf[part].mean() for part in in_part])
    share = np.unique(mask, return_counts=True)[1] / mask.size
    top = np.sort(p, 0)
    def entropy(q): return (stats.entropy(q, axis=0) / np.log(len(q))).mean()
    def mean_conf(where): return conf[where].mean() if where.any() else conf.mean()
    return dict(
        conf=top[-1].mean(),
        margin=(top[-1] - top[-2]).mean(),
        entropy=entropy(p),
        conf_t=conf.mean(),
        entropy_t=entropy(scaled),
        low_t=(conf < 0.5).mean(),
        energy=torch.logsumexp(logits, 0).mean().item(),
        conf_in=mean_conf(~edge),
        conf_edge=mean_conf(edge),
        conf_low=np.quantile(conf, 0.1),
        conf_std=conf.std(),
        edge=edge.mean(),
        parts=np.log(1 + len(areas)),
        crumbs=areas[areas < SMALL_SEGMENT * mask.size].sum() / mask.size,
        seg_conf=part_conf.mean(),
        seg_conf_std=part_conf.std(),
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
        expected = row_by_hand(logits[i], t)
        assert list(got.columns) == list(expected)
        assert close(got.iloc[i], list(expected.values())), (dict(got.iloc[i]), expected)


def test_crumbs_count_pixels_of_segments_below_a_thousandth_of_the_image():
    logits = torch.zeros(1, 3, 100, 100)
    logits[:, 0] = 5
    logits[0, 1, 10, 10:19] = 9         # 9 of 10,000 pixels
    logits[0, 1, 50, 50:60] = 9         # 10
    logits[0, 2, 80, 80] = 9            # 1
    assert label_free(logits).crumbs[0] == np.float32(10 / 10000)


@quick
@given(seeds, st.floats(-30, 30), st.permutations(range(4)))
def test_what_must_not_change_label_free_columns(seed, constant, order):
    logits = blobs(seed)
    other = blobs(seed + 1)
    base = label_free(logits, 1.7, other)
    shifted = label_free(logits + constant, 1.7, other - constant)
    assert close(shifted.drop(columns='energy'), base.drop(columns='energy'))
    assert close(shifted.energy - base.energy, constant)
    classes = list(order)
    assert close(label_free(logits[:, classes], 1.7, other[:, classes]), base)
    assert close(label_free(logits.transpose(2, 3), 1.7, other.transpose(2, 3)), base)
    assert close(label_free(logits.flip(-1), 1.7, other.flip(-1)), base)
    one_by_one = [label_free(logits[i:i+1], 1.7, other[i:i+1]) for i in range(2)]
    assert close(pd.concat(one_by_one), base)
    assert close(label_free(logits.flip(0), 1.7, other.flip(0)).iloc[::-1], base)


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
    ragged = noise(0, 2, k, h, w) * scale
    one_class = torch.zeros(2, k, h, w)
    one_class[:, 1] = scale
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for logits in (ragged, one_class):
            got = label_free(logits, 2., logits)
            assert np.isfinite(got).all().all() and (got.tta == 1).all() and (got.tta_gap == 0).all()
            shares = got.drop(columns=['energy', 'parts', 'classes_seen', 'class_entropy'])
            assert (shares >= -1e-6).all().all()


def test_one_class_map_has_one_segment_and_no_edge():
    logits = noise(0, 1, 3, 12, 12) + torch.tensor([0, 50., 0]).view(1, 3, 1, 1)
    row = label_free(logits).iloc[0]
    assert (row.edge, row.classes_seen, row.top_share, row.crumbs, row.class_entropy) == (0, 1, 1, 0, 0)
    assert row.parts == np.float32(np.log(2)) and row.conf_edge == row.conf_in


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
    assert close(got.tta, (a.argmax(1) == b.argmax(1)).float().mean((1, 2)))
    assert close(got.tta_gap, (pa - pb).clamp_min(0).sum(1).mean((1, 2)))
    assert close(label_free(b, flipped=a)[['tta', 'tta_gap']], got[['tta', 'tta_gap']])
    assert 'tta' not in label_free(a)
    certain = torch.tensor([99., 0]).view(1, 2, 1, 1)
    # the most that two can differ
    assert label_free(certain, flipped=certain.flip(1)).tta_gap[0] == 1


# ---- intermediate features

def maps(seed, n=2): # of a decoder and an encoder
    return noise(seed, n, 6, 12, 10).relu() + .1, noise(seed + 1, n, 9, 3, 4) * 2


def test_pooled_features_by_hand():
    f = maps(0)
    expected = []
    for m in f: expected += [m.numpy().mean((2, 3)), m.numpy().std((2, 3))]
    assert close(pool_features(f), np.concatenate(expected, 1)) and pool_features(f).shape == (2, 30)
    assert pool_features((f[0].bfloat16(),)).dtype == torch.float32


LAYER_NAMES = [(0, []), (1, ['tap0']), (2, ['dec', 'enc']), (3, ['tap0', 'tap1', 'tap2'])]


@pytest.mark.parametrize('n, names', LAYER_NAMES)
def test_feature_names(n, names): assert feature_names(n) == names


def test_feature_columns_by_hand():
    f = maps(4)
    mask = blobs(0, h=12, w=10).argmax(1)
    ref = torch.stack([pool_features(f).mean(0), pool_features(f).std(0) + .5]) * 1.1
    got = feature_columns(f[:1], mask, 4, ref[:, :12])
    assert list(got) == ['tap0_norm', 'tap0_rank', 'tap0_fisher', 'tap0_shift']
    assert (got.dtypes == np.float32).all()
    for i in range(2):
        x = f[0][i].flatten(1).double().numpy()
        m = mask[i].flatten().numpy()
        norm = np.log(np.sqrt((x**2).mean()))
        values = np.linalg.eigvalsh(np.cov(x))
        rank = values.sum()**2 / (values**2).sum() / 6
        between = sum((m == c).sum() * ((x[:, m == c].mean(1) - x.mean(1))**2).sum() for c in np.unique(m))
        fisher = between / ((x - x.mean(1, keepdims=True))**2).sum()
        shift = ((pool_features(f[:1])[i] - ref[0, :12]) / ref[1, :12]).abs().mean()
        assert close(got.iloc[i], [norm, rank, fisher, shift], 1e-4)


@quick
@given(seeds, st.permutations(range(6)), st.permutations(range(9)), st.permutations(range(4)))
def test_what_must_not_change_feature_columns(seed, order, order2, classes):
    f = maps(seed)
    mask = blobs(seed).argmax(1)
    ref = torch.stack([noise(seed, 30), noise(seed + 2, 30).abs() + .1])
    base = feature_columns(f, mask, 4, ref)
    decoder = np.array(order)
    encoder = 12 + np.array(order2)
    moved = torch.as_tensor(np.concatenate([decoder, decoder + 6, encoder, encoder + 9]))
    permuted = (f[0][:, list(order)], f[1][:, list(order2)])
    assert close(feature_columns(permuted, mask, 4, ref[:, moved]), base, 1e-4)
    assert close(feature_columns(f, torch.as_tensor(classes)[mask], 4, ref), base, 1e-4)
    assert close(feature_columns(f, mask, 9, ref), base, 1e-4)
    one_by_one = [feature_columns((f[0][i:i+1], f[1][i:i+1]), mask[i:i+1], 4, ref) for i in range(2)]
    assert close(pd.concat(one_by_one), base, 1e-4)
    without_shift = base[[c for c in base if 'shift' not in c]]
    assert close(feature_columns(f, mask, 4), without_shift, 1e-4)


def test_feature_columns_of_extreme_maps():
    mask = blobs(0).argmax(1)
    class_features = torch.nn.functional.one_hot(mask, 4).movedim(-1, 1).float()
    one_direction = noise(0, 2, 1, 24, 20).expand(2, 7, 24, 20)
    got = feature_columns((class_features, one_direction), mask, 4)
    assert close(got.dec_fisher, 1) and (got.enc_fisher < 0.1).all()
    assert close(got.enc_rank, 1 / 7) and (got.dec_rank > 0.25).all()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        constant = (torch.zeros(2, 3, 4, 4), torch.full((2, 3, 1, 1), 7.0))
        got = feature_columns(constant, mask, 4, torch.zeros(2, 12))
    assert np.isfinite(got).all().all()
    assert (got[['dec_rank', 'dec_fisher', 'enc_fisher']] == 0).all().all()
    assert got.dec_shift[0] == 0 and got.enc_shift[0] == 10         # three means clipped at 20, three of 0


def test_shift_is_small_for_training_images():
    f = noise(0, 40, 5, 8, 8)
    ref = torch.stack([pool_features((f,)).mean(0), pool_features((f,)).std(0)])
    mask = torch.zeros(40, 8, 8, dtype=torch.long)
    training = feature_columns((f,), mask, 2, ref).tap0_shift.mean()
    shifted = feature_columns((f * 2 + 1,), mask, 2, ref).tap0_shift.mean()
    assert training < 1.2 and shifted > 5 * training


# ---- agreement

@quick
@given(seeds, st.integers(2, 6), st.integers(1, 4))
def test_agreement_by_counting(seed, m, k):
    maps = np.random.default_rng(seed).integers(0, k, (m, 4, 5)).astype(np.uint8)
    got = agreement(maps)
    assert tuple(got.columns) == AGREEMENT and len(got) == m and (got.dtypes == np.float32).all()
    for i in range(m):
        others = np.delete(maps, i, 0)
        pairwise = [(maps[i] == other).mean() for other in others]
        votes = np.stack([(others == c).sum(0) for c in range(k)])
        majority = (maps[i] == votes.argmax(0)).mean()              # a tie goes to the lowest id
        assert close(got.iloc[i], [np.mean(pairwise), majority, max(pairwise), min(pairwise)])


def test_majority_does_not_count_the_map_itself():
    a = np.zeros((2, 2), np.uint8)
    b = np.ones((2, 2), np.uint8)
    assert agreement(np.stack([a, b])).agree_majority.tolist() == [0, 0]
    assert agreement(np.stack([a, a, b])).agree_majority.tolist() == [1, 1, 0]
    assert agreement(np.stack([b, b, a])).agree_majority.tolist() == [0, 0, 0]


@pytest.mark.parametrize('m', [0, 1])
def test_agreement_needs_two(m):
    got = agreement(np.zeros((m, 3, 3), np.uint8))
    assert got.shape == (m, 4) and got.isna().all().all() and tuple(got) == AGREEMENT


def test_agreement_of_equal_maps_and_of_ignored_pixels():
    mask = np.random.default_rng(0).integers(0, 7, (9, 9)).astype(np.uint8)
    for n in (2, 8, 100): assert (agreement(np.stack([mask] * n)) == 1).all().all()
    with_ignored = np.where(mask == 0, 255, mask).astype(np.uint8)
    assert (agreement(np.stack([with_ignored] * 3)) == 1).all().all()
    assert close(agreement(np.stack([with_ignored, mask])).agree_mean, (mask != 0).mean())


def test_agreement_follows_the_order_of_maps():
    maps = np.random.default_rng(1).integers(0, 3, (5, 8, 8)).astype(np.uint8)
    order = [3, 1, 4, 0, 2]
    assert close(agreement(maps[order]), agreement(maps).iloc[order])
    assert close(agreement(maps.astype(np.int64)), agreement(maps))


# ---- temperature

@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(2, 6), st.floats(.4, 9))
def test_temperature_against_a_grid(seed, k, true):
    rng = torch.Generator().manual_seed(seed)
    calibrated = torch.randn(1500, k, generator=rng) * 1.5
    labels = torch.multinomial(calibrated.softmax(1), 1, generator=rng)[:, 0]
    def loss(t): return torch.nn.functional.cross_entropy(calibrated * true / t, labels).item()
    grid = np.exp(np.linspace(-2, 3, 400))
    found = fit_temperature(calibrated * true, labels)
    assert loss(found) <= min(map(loss, grid)) + 1e-6 and true / 1.35 < found < true * 1.35


def test_temperature_without_pixels_and_at_the_bounds():
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 1
    right = torch.nn.functional.one_hot(torch.tensor([0, 1, 2])).float()
    assert fit_temperature(right, torch.tensor([0, 1, 2])) < 0.2       # always right: sharpen
    assert fit_temperature(right, torch.tensor([1, 2, 0])) > 19        # always wrong: flatten
    assert isinstance(fit_temperature(right, torch.tensor([0, 1, 1])), float)
