"""Prediction grids: which points they keep, and how they come back from the store and from published files."""
import numpy as np
import pandas as pd
import pytest
import torch

from rssqa.core import MissingFeatures
from rssqa.tables.grid import (
    LEVELS, STRIDE, grid_probabilities, limit_grid, limit_points, map_key, mask_from_png, mask_to_png,
    pack_four_bits, pack_grid, pack_points, prediction_grids, subsample, unpack_four_bits, unpack_points
)
from rssqa.tables.store import Store

SHAPE = (3, 5, 7) # K,h,w


def random_bytes(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize('shape', [(64, 64), (3, 30, 22), (2, 4, 17, 5)])
def test_grid_points_are_the_middle_of_each_square(shape):
    x = random_bytes(*shape)
    points = subsample(x)
    middle = STRIDE // 2
    for row in range(points.shape[-2]):
        for column in range(points.shape[-1]):
            pixel = x[..., STRIDE * row + middle, STRIDE * column + middle]
            assert np.array_equal(points[..., row, column], pixel)
    assert points.shape[-2:] == tuple((side + middle - 1) // STRIDE for side in shape[-2:])


def test_probabilities_are_softmax_at_the_temperature():
    logits = torch.as_tensor(np.random.default_rng(0).normal(size=(2, 4, 16, 20)) * 3)
    found = grid_probabilities(logits, 2.0)
    exact = np.exp(subsample(logits.numpy()) / 2)
    exact /= exact.sum(1, keepdims=True)
    assert found.dtype == np.uint8 and found.shape == (2, 4, 4, 5)
    assert np.abs(found / 255 - exact).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize('shape', [(1, 1), (5, 9), (64, 64)])
def test_masks_survive_as_png(shape):
    mask = random_bytes(*shape)
    assert np.array_equal(mask_from_png(mask_to_png(mask)), mask)


def test_points_survive_packing():
    for x in (random_bytes(2, *SHAPE), random_bytes(8, 8)[::2, 1::3]):         # the second is not contiguous
        assert np.array_equal(unpack_points(pack_points(x)), x)


def put_maps(store, table): # random grids of the maps of a table -> (points, predicted) of each row
    maps = []
    for i in range(len(table)):
        maps.append((random_bytes(2, *SHAPE, seed=i), random_bytes(*SHAPE[1:], seed=i)))
    rows = pd.DataFrame([pack_grid(points, predicted) for points, predicted in maps])
    store.put('grid', rows.assign(key=map_key(table.image_id, table.method_fp)))
    return maps


@pytest.mark.parametrize('chunk', [1, 2, 512])
def test_grids_come_back_sorted_with_all_methods_and_the_truth(chunk, tmp_path):
    store = Store(tmp_path)
    table = pd.DataFrame(dict(image_id=list('baab'), method=['m1', 'm1', 'm0', 'm0'], method_fp=list('yyxx')))
    table['dataset'] = 'town'
    maps = put_maps(store, table)
    truth = random_bytes(*SHAPE[1:], seed=9)
    store.put('truth', pd.DataFrame([pack_points(truth) | dict(key='b')]))
    first, second = prediction_grids(store, table, chunk)
    assert (first.image_id, second.image_id, first.dataset) == ('a', 'b', 'town')
    for grid, rows in ((first, [2, 1]), (second, [3, 0])):
        assert grid.methods == ['m0', 'm1']
        for i, row in enumerate(rows):
            points, predicted = maps[row]
            assert np.array_equal(grid.p[i], points[0]) and np.array_equal(grid.flip[i], points[1])
            assert np.array_equal(grid.pred[i], predicted)
    assert np.array_equal(second.truth, truth)
    assert (first.truth == 255).all() and first.truth.shape == SHAPE[1:]                 # no label: ignore


def test_a_map_without_grid_is_named(tmp_path):
    table = pd.DataFrame(dict(image_id=['a'], dataset=['d'], method=['m'], method_fp=['f']))
    with pytest.raises(MissingFeatures, match=r'a\|f'): prediction_grids(Store(tmp_path), table)


@pytest.mark.parametrize('shape', [(40, 40), (41, 10), (10, 81), (128, 128), (200, 90)])
@pytest.mark.parametrize('side', [8, 40])
def test_no_side_of_a_limited_grid_is_longer_than_asked(shape, side):
    x = random_bytes(2, *shape)
    points = limit_points(x, side)
    step = max(1, *(int(np.ceil(length / side)) for length in shape))
    assert max(points.shape[-2:]) <= side
    assert np.array_equal(points, x[..., step//2::step, step//2::step])


def test_all_parts_of_a_grid_are_limited_alike(tmp_path):
    store = Store(tmp_path)
    table = pd.DataFrame(dict(image_id=['a'], dataset=['d'], method=['m'], method_fp=['f']))
    put_maps(store, table)
    grid, = prediction_grids(store, table)
    small = limit_grid(grid, 4)
    assert limit_grid(grid) is grid
    for name in ('p', 'flip', 'pred', 'truth'):
        assert np.array_equal(getattr(small, name), limit_points(getattr(grid, name), 4))
    assert small.p.shape == (1, 3, 2, 3)


@pytest.mark.parametrize('shape', [SHAPE, (2, 4, 4), (6, 1, 1)])                        # odd and even counts
def test_four_bits_keep_probabilities_within_a_step(shape):
    p = np.random.default_rng(0).dirichlet(np.ones(shape[0]) * 0.3, shape[1:]).astype(np.float32)
    p = np.moveaxis(p, -1, 0)
    packed = pack_four_bits(p)
    found = unpack_four_bits(packed, shape)
    codes = np.round(np.sqrt(p) * LEVELS)
    decoded = (codes / LEVELS)**2
    assert len(packed) == (p.size + 1) // 2 and found.shape == shape
    assert np.abs(found / 255 - decoded / decoded.sum(0)).max() <= 0.5 / 255 + 1e-6
    assert np.abs(found.astype(int).sum(0) - 255).max() <= shape[0] / 2


def test_certain_points_stay_certain():
    p = np.zeros((3, 2, 2), np.float32)
    p[1] = 1
    assert np.array_equal(unpack_four_bits(pack_four_bits(p), p.shape), (p * 255).astype(np.uint8))
