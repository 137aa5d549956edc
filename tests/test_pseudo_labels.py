"""Purification of pseudo-labels: the released arithmetic changes nothing in the loss; evidence does what it says."""
import json

import numpy as np
import pytest

from rssqa.core import SchemaError, UnknownName
from rssqa.data.datasets import IGNORE
from rssqa.segment.confidence import segments
from rssqa.semi.purify import (
    FOUND, LOW, SPACES, PseudoLabels, Region, effective_change, near_boundary, purify_labels, read_answer,
    regions_of_boxes,
)

SHAPE = (40, 48)


def teacher(classes, seed, sharpness=2.0): # (C,H,W) random probabilities
    logits = np.random.default_rng(seed).normal(size=(classes, *SHAPE)) * sharpness
    p = np.exp(logits - logits.max(0))
    return (p / p.sum(0)).astype(np.float32)


def random_regions(classes, seed, n=6):
    rng = np.random.default_rng(seed)
    regions = []
    for _ in range(n):
        x, y = np.sort(rng.integers(0, SHAPE[1] + 1, 2)), np.sort(rng.integers(0, SHAPE[0] + 1, 2))
        if x[0] == x[1] or y[0] == y[1]: continue
        regions.append(Region(int(rng.integers(classes)), float(rng.uniform(0.2, 1)), (x[0], y[0], x[1], y[1])))
    return regions


@pytest.mark.parametrize('classes', [2, 6, 8, 16])
@pytest.mark.parametrize('seed', range(6))
def test_the_released_rule_changes_nothing_in_the_loss(classes, seed):
    probs = teacher(classes, seed, sharpness=0.5 + seed)
    plain = purify_labels(probs)
    released = purify_labels(probs, random_regions(classes, seed), rule='released')
    change = effective_change(plain, released)
    assert (change['entered'], change['left'], change['relabelled']) == (0, 0, 0)
    assert released.confidence[plain.confidence < LOW].max() <= LOW + 1e-6


def test_the_released_rule_rewrites_labels_outside_the_loss_for_nothing_found():
    probs = teacher(6, 0, sharpness=0.3)
    somewhere = [Region(3, 0.9, (0, 0, 4, 4))]
    released = purify_labels(probs, somewhere, rule='released')
    assert effective_change(purify_labels(probs), released)['rewritten_outside'] > 100
    elsewhere = np.ones(SHAPE, bool)
    elsewhere[:4, :4] = False
    rewritten = elsewhere & (released.labels != probs.argmax(0))
    assert (released.labels[rewritten] == 0).all()             # "nothing" is taken for the first class
    assert 1 / 9 > FOUND > 1 / 11


def released_by_hand(p, found): # one pixel: probabilities, set of found classes -> label, confidence
    P = np.exp([0.95 * (c in found) for c in range(len(p))])
    P /= P.sum()
    conf, label = p.max(), p.argmax()
    if conf >= LOW or P.max() <= FOUND: return label, conf
    if conf < 0.3 and label != P.argmax(): return P.argmax(), P.max()
    s = conf / LOW
    return label, s * conf + (1 - s) * P[label]


def test_the_released_rule_pixel_by_pixel():
    probs = teacher(6, 3, 0.8)[:, :8, :9]
    regions = [Region(2, 0.9, (0, 0, 5, 4)), Region(5, 0.9, (3, 2, 9, 8))]
    out = purify_labels(probs, regions, rule='released')
    drawn = {r.class_id: r.pixels(probs.shape[1:]) for r in regions}
    for y, x in np.ndindex(8, 9):
        label, confidence = released_by_hand(probs[:, y, x], {c for c, d in drawn.items() if d[y, x]})
        assert out.labels[y, x] == label and out.confidence[y, x] == pytest.approx(confidence, abs=1e-5)


@pytest.mark.parametrize('seed', range(4))
def test_no_evidence_is_the_identity(seed):
    probs = teacher(7, seed)
    for rule in ('evidence', 'released'):
        out = purify_labels(probs, rule=rule)
        assert (out.labels == probs.argmax(0)).all() and (out.confidence == probs.max(0)).all()
        assert (out.used == (probs.max(0) >= 0.95)).all()
    nothing = purify_labels(probs, [Region(1, 1 / 7, (0, 0, SHAPE[1], SHAPE[0]))])
    assert (nothing.labels == probs.argmax(0)).all()
    assert np.allclose(nothing.confidence, probs.max(0), atol=1e-4)


@pytest.mark.parametrize('seed', range(4))
def test_evidence_is_the_posterior_of_bayes(seed):
    probs = teacher(5, seed)
    regions = random_regions(5, seed)
    out = purify_labels(probs, regions)
    best = np.full(SHAPE, -1)
    score = np.zeros(SHAPE)
    for r in regions:
        better = r.pixels(SHAPE) & (r.score > score)
        best[better], score[better] = r.class_id, r.score
    rng = np.random.default_rng(seed)
    for y, x in zip(rng.integers(0, SHAPE[0], 60), rng.integers(0, SHAPE[1], 60)):
        p = probs[:, y, x].astype(float)
        if best[y, x] >= 0:
            likelihood = np.full(5, (1 - score[y, x]) / 4)
            likelihood[best[y, x]] = score[y, x]
            p = p * likelihood / (p * likelihood).sum()
        assert out.confidence[y, x] == pytest.approx(p.max(), abs=2e-4)


def test_a_sure_region_brings_in_mends_and_takes_out():
    p = np.full((4, 1, 3), 0.0, np.float32)
    p[:, 0, 0] = [0.4, 0.2, 0.2, 0.2]                           # unsure
    p[:, 0, 1] = [0.97, 0.01, 0.01, 0.01]                       # sure, contested by a better region
    p[:, 0, 2] = [0.97, 0.01, 0.01, 0.01]                       # sure, contested by a weaker one
    out = purify_labels(p, [Region(1, 0.99999, (0, 0, 2, 1)), Region(1, 0.9, (2, 0, 3, 1))])
    assert out.labels.tolist() == [[1, 1, 0]] and out.used.tolist() == [[True, True, False]]
    assert effective_change(purify_labels(p), out) == dict(entered=1, left=1, relabelled=1, rewritten_outside=0)


def test_the_order_of_regions_does_not_matter():
    probs = teacher(5, 1)
    regions = random_regions(5, 2)
    a, b = purify_labels(probs, regions), purify_labels(probs, regions[::-1])
    assert (a.labels == b.labels).all() and (a.confidence == b.confidence).all()


def imperfect_teacher(truth, classes, seed): # right inside regions, shifted at boundaries
    rng = np.random.default_rng(seed)
    moved = np.roll(truth, (2, 3), (0, 1))
    p = np.full((classes, *truth.shape), 0.02, np.float32)
    np.put_along_axis(p, moved[None].astype(int), 0.97, 0)
    return (p * rng.uniform(0.9, 1.1, p.shape) / 1).astype(np.float32)


@pytest.mark.parametrize('seed', range(5))
def test_an_oracle_of_some_regions_mends_boundaries_and_harms_nothing(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 4, (5, 6))
    truth = coarse.repeat(8, 0).repeat(8, 1).astype(np.uint8)
    p = imperfect_teacher(truth, 4, seed)
    probs = p / p.sum(0)
    parts = segments(truth)
    chosen = rng.permutation(parts.max() + 1)[:max(1, round(0.3 * (parts.max() + 1)))]
    regions = [Region(int(truth[parts == i][0]), 0.9999, mask=parts == i) for i in chosen]
    before, after = purify_labels(probs, threshold=0.9), purify_labels(probs, regions, threshold=0.9)
    change = effective_change(before, after, truth)
    assert change['right_after_band'] > change['right_before_band']
    assert change['right_after_inner'] >= change['right_before_inner'] - 1e-9
    outside = ~np.isin(parts, chosen)
    assert (after.as_mask()[outside] == before.as_mask()[outside]).all()


def test_predicted_quality_leaves_images_out():
    probs = teacher(4, 0, 8.0)
    assert purify_labels(probs, quality=0.7, min_quality=0.6).used.any()
    for quality in (0.5, float('nan')):
        assert not purify_labels(probs, quality=quality, min_quality=0.6).used.any()
        assert (purify_labels(probs, quality=quality, min_quality=0.6).as_mask() == IGNORE).all()


@pytest.mark.parametrize('bad', [
    np.full((3, 4, 4), 0.5), np.full((3, 4, 4), np.nan), np.full((3, 4), 1 / 3),
    np.full((2, 4, 4), [[[1.5]], [[-0.5]]]),
])
def test_what_is_no_probability_is_refused(bad):
    with pytest.raises(SchemaError, match='(?i)softmax|one image'): purify_labels(bad)


def test_bad_regions_and_rules_are_named():
    probs = teacher(3, 0)
    corner = (0, 0, 1, 1)
    with pytest.raises(SchemaError, match='(?i)found class 3 of 3'): purify_labels(probs, [Region(3, 0.5, corner)])
    with pytest.raises(SchemaError, match='(?i)either a box or a mask'): Region(0, 0.5)
    with pytest.raises(SchemaError, match='(?i)0..1'): Region(0, 95, corner)
    small = Region(0, 0.5, mask=np.ones((2, 2), bool))
    with pytest.raises(SchemaError, match='(?i)resize'): purify_labels(probs, [small])
    with pytest.raises(UnknownName, match='released'): purify_labels(probs, rule='release')


@pytest.mark.parametrize('seed', range(8))
def test_both_grammars_come_back(seed):
    rng = np.random.default_rng(seed)
    boxes = rng.integers(0, 448, (5, 4)).tolist()
    names = ['building', 'bare land', 'water', 'building', 'road']
    expected = [(n, tuple(map(float, b))) for n, b in zip(names, boxes)]
    lines = '\n'.join(f'{n}: {b}' for n, b in zip(names, boxes))
    text = json.dumps([dict(bbox_2d=b, label=n) for n, b in zip(names, boxes)])
    for answer in (lines, text, f'```json\n{text}\n```', f'Here they are:\n{text}'):
        assert read_answer(answer).found == expected and read_answer(answer).unread == 0
    for cut in range(1, len(text)):                            # cut off at any place: a beginning of what was said
        read = read_answer(text[:-cut])
        assert read.found == expected[:len(read.found)] and read.unread <= 1
    for cut in range(1, len(lines)):
        read = read_answer(lines[:-cut])
        assert len(read.found) <= 5 and read.unread <= 1


def test_what_is_not_a_box_is_counted():
    text = '[{"bbox_2d": [1, 2, 3], "label": "a"}, {"bbox_2d": [1, 2, 3, 4]}, {"label": "b", "bbox_2d": [1, 2, 3, 4]}]'
    assert read_answer(text).found == [('b', (1, 2, 3, 4))] and read_answer(text).unread == 2
    assert read_answer('').found == [] and read_answer('ship: [1, 2, x, 4]').unread == 1


@pytest.mark.parametrize('space', SPACES)
@pytest.mark.parametrize('seed', range(5))
def test_coordinates_come_back_within_a_pixel(space, seed):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.integers(0, 519, 2)), np.sort(rng.integers(0, 519, 2))
    x[1] += x[0] == x[1]
    y[1] += y[0] == y[1]
    sides = dict(pixels=448, thousandths=1000)[space]
    stated = np.array([x[0], y[0], x[1], y[1]]) * sides / 518
    regions, _ = regions_of_boxes([('a', tuple(stated))], ('a',), (518, 518), (448, 448), space)
    assert np.abs(np.array(regions[0].box) - [x[0], y[0], x[1], y[1]]).max() <= 1


def test_boxes_outside_the_image_are_cut_or_dropped():
    found = [('a', (-5, -5, 10, 10)), ('a', (60, 60, 90, 90)), ('a', (30, 30, 20, 20))]
    regions, _ = regions_of_boxes(found, ('a',), SHAPE)
    assert [r.box for r in regions] == [(0, 0, 10, 10), (20, 20, 30, 30)]


def test_the_band_is_near_a_boundary():
    mask = np.zeros((20, 20), int)
    mask[:, 10:] = 1
    assert near_boundary(mask, 2).any(0).tolist() == [7 <= x <= 12 for x in range(20)]
    same = PseudoLabels(mask.astype(np.uint8), np.ones(mask.shape), np.ones(mask.shape, bool))
    change = effective_change(same, same, mask)
    assert change['right_after'] == change['right_before_band'] == change['right_after_inner'] == 1
