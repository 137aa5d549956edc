"""Composites: labels are exactly what was pasted, backgrounds hide nothing, one seed is one image."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rssqa.core import Incompatible
from rssqa.data.composites import SHADOW, CutObject, alter_object, compose, cut_objects
from rssqa.data.datasets import IGNORE

ROOT = Path(__file__).resolve().parents[1]


def an_object(h=6, w=9, class_id=3, value=0.9, seed=0):
    shape = np.random.default_rng(seed).random((h, w)) < 0.8
    shape[0, 0] = shape[-1, -1] = True
    return CutObject(np.full((3, h, w), value, np.float32), shape, class_id)


def grey(size=48, value=0.4): return np.full((3, size, size), value, np.float32)


def test_objects_are_connected_parts_inside_the_image():
    mask = np.zeros((20, 20), np.uint8)
    mask[2:8, 2:9] = 1                                     # inside
    mask[12:20, 3:9] = 1                                   # cut off by the border
    mask[12:14, 14:16] = 1                                 # too small
    mask[4:8, 14:18] = 2                                   # another class
    image = np.random.default_rng(0).random((3, 20, 20)).astype(np.float32)
    found = cut_objects(image, mask, 1, least=10)
    assert len(found) == 1 and found[0].shape.shape == (6, 7) and found[0].shape.all()
    assert np.array_equal(found[0].patch, image[:, 2:8, 2:9])
    assert len(cut_objects(image, mask, 1, least=10, most=30)) == 0 and len(cut_objects(image, mask, 1, least=4)) == 2
    image[:] = 0
    assert found[0].patch.any(), 'a cut object does not change with its image'


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_the_mask_is_the_union_of_what_was_pasted(seed, count, overlap):
    objects = [an_object(4 + i % 5, 5 + i % 3, 1 + i % 2, seed=i) for i in range(count)]
    known = np.zeros((48, 48), np.uint8)
    made = compose(grey(), objects, np.random.default_rng(seed), known, overlap=overlap)
    assert len(made.placed) + made.left_out == count
    counted = sum(entry['pixels'] for entry in made.placed)
    assert (made.mask > 0).sum() == counted if not overlap else (made.mask > 0).sum() <= counted
    changed = (made.image != grey()).any(0)
    assert np.array_equal(changed, made.mask > 0)
    assert not known.any(), 'the background is not written to'


def test_one_seed_is_one_composite():
    objects = [an_object(seed=i) for i in range(6)]
    first, second, other = (compose(grey(), objects, np.random.default_rng(s), shadow=0.4) for s in (5, 5, 6))
    assert np.array_equal(first.image, second.image) and first.placed == second.placed
    assert not np.array_equal(first.image, other.image)


def test_backgrounds_do_not_leak_their_own_objects():
    known = np.zeros((48, 48), np.uint8)
    known[5:9, 5:9] = 3
    with pytest.raises(Incompatible, match='objects of class 3 itself'):
        compose(grey(), [an_object()], np.random.default_rng(0), known)
    unlabelled = compose(grey(), [an_object()], np.random.default_rng(0))
    assert set(np.unique(unlabelled.mask)) == {3, IGNORE}
    other = compose(grey(), [an_object(class_id=2)], np.random.default_rng(0), known)
    assert set(np.unique(other.mask)) == {0, 2, 3} or set(np.unique(other.mask)) == {0, 2}
    with pytest.raises(Incompatible, match='one size'):
        compose(grey(), [an_object()], np.random.default_rng(0), known[:40])


def test_shadows_darken_the_ground_and_no_object():
    objects = [an_object(8, 8, value=0.9) for _ in range(5)]
    made = compose(grey(), objects, np.random.default_rng(1), shadow=0.5, alter=False)
    plain = compose(grey(), objects, np.random.default_rng(1), alter=False)
    assert made.placed == plain.placed, 'a shadow moves nothing'
    dark = np.isclose(made.image[0], 0.2)
    pasted = made.mask != IGNORE
    assert dark.any() and not (dark & pasted).any() and np.allclose(made.image[:, pasted], 0.9)
    rows, columns = np.nonzero(dark)
    for row, column in zip(rows, columns): # a shadow lies down to the right of its object, a few pixels away
        near = pasted[max(0, row - SHADOW):row + 1, max(0, column - SHADOW):column + 1]
        assert near.any()
    assert np.allclose(plain.image[0][plain.mask == IGNORE], 0.4)


def test_what_finds_no_place_is_left_out():
    crowd = [an_object(20, 20, seed=i) for i in range(40)]
    made = compose(grey(), crowd, np.random.default_rng(0))
    assert made.left_out > 0 and len(made.placed) < 10
    assert compose(grey(16), [an_object(20, 20)], np.random.default_rng(0)).left_out == 1
    assert compose(grey(), crowd, np.random.default_rng(0), overlap=True).left_out == 0


@pytest.mark.parametrize('seed', range(6))
def test_a_changed_object_keeps_its_pixels(seed):
    cut = an_object(5, 9)
    cut.patch[:, ~cut.shape] = 0.1
    moved = alter_object(cut, np.random.default_rng(seed))
    assert moved.shape.sum() == cut.shape.sum() and sorted(moved.shape.shape) == [5, 9]
    inside, outside = moved.patch[:, moved.shape], moved.patch[:, ~moved.shape]
    assert np.ptp(inside) < 1e-6 and np.ptp(outside) < 1e-6 and inside.mean() > outside.mean()
    assert moved.patch.min() >= 0 and moved.patch.max() <= 1 and moved.patch.dtype == np.float32


def test_the_committed_difficulties():
    table = pd.read_csv(ROOT/'data/results/composites.csv')
    assert (table.composites >= 200).all() and table.srocc_level.between(-1, 1).all()
    objects = table[table.knob == 'objects'].set_index('method')
    assert (objects.srocc_predicted > 0.3).all() and (objects.srocc_level < -0.4).all()
    assert objects.srocc_level['unet'] < -0.5, 'more buildings are harder'
