"""Dense semantics: parts of images get class probabilities without having seen their own truth."""
import operator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from rssqa.clip.encoders import load_encoder
from rssqa.core import Incompatible, MissingFeatures
from rssqa.quality.consensus import ConsensusModel, load_consensus, posterior, save_consensus
from rssqa.quality.dense_semantics import (
    PROJECTED, SEMANTIC_MAP, add_map, class_shares, cross_fit, cut_quarters, dense_features, dense_tables,
    extract_dense, join_quarters, linear_probe, name_table, random_projection, read_parts,
)
from rssqa.tables.grid import PredictionGrid, map_key, pack_grid, pack_points
from rssqa.tables.store import Store, put_vectors

SIDE = 12 # grid points a side of a drawn image
PARTS = 4 # parts a side


def drawn_grid(number, dataset='town'):
    "Blocks of two classes; two methods that are right at a share of the points that differs from image to image."
    rng = np.random.default_rng(number)
    truth = rng.integers(2, size=(PARTS, PARTS)).repeat(SIDE // PARTS, 0).repeat(SIDE // PARTS, 1)
    is_right = rng.random((2, SIDE, SIDE)) < rng.random((2, 1, 1))
    pred = np.where(is_right, truth, 1 - truth).astype(np.uint8)
    p = np.where(np.stack([pred == 0, pred == 1], 1), 160, 95).astype(np.uint8)
    return PredictionGrid(f'{dataset}{number:02}', dataset, ['a', 'b'], p, p, pred, truth.astype(np.uint8))


def put_features(store, grid):
    "Features that say the class of each part, with noise."
    shares, _ = class_shares(grid.truth, 2, PARTS)
    rng = np.random.default_rng(len(grid.image_id))
    x = rng.normal(0, 0.3, (PROJECTED, PARTS, PARTS))
    x[:2] += shares
    put_vectors(store, 'dense/drawn', [grid.image_id], x.reshape(1, -1).astype(np.float32))
    put_vectors(store, name_table('dense/drawn', grid.dataset), [grid.image_id], 0.1 * shares.reshape(1, -1))


@pytest.fixture
def drawn(tmp_path):
    grids = [drawn_grid(i) for i in range(16)]
    store = Store(tmp_path)
    for grid in grids: put_features(store, grid)
    return str(tmp_path), grids, {grid.image_id: f's{i % 4}' for i, grid in enumerate(grids)}


def right(grid): return (grid.pred[-1] == grid.truth).mean()


# ---------------------------------------------------------------- parts of an image

@pytest.mark.parametrize('height, width', [(32, 32), (33, 47), (2, 3)])
def test_each_part_lies_where_it_was_cut(height, width):
    image = np.zeros((3, height, width), np.float32)
    image[0, height // 2 + height % 2 :] = 1
    image[1, :, width // 2 + width % 2 :] = 1
    whole = join_quarters(cut_quarters(image, 8))
    assert whole.shape == (3, 16, 16)
    assert whole[0, :8].max() == 0 and whole[0, 8:].min() > 0.999
    assert whole[1, :, :8].max() == 0 and whole[1, :, 8:].min() > 0.999


def test_the_projection_keeps_distances_and_is_the_same_every_time():
    x = np.random.default_rng(1).standard_normal((40, 1280))
    projection = random_projection(1280)
    assert projection.shape == (1280, PROJECTED) and (projection == random_projection(1280)).all()
    ratio = np.linalg.norm((x[1:] - x[0]) @ projection, axis=1) / np.linalg.norm(x[1:] - x[0], axis=1)
    assert abs(ratio.mean() - 1) < 0.05 and abs(ratio - 1).max() < 0.3
    assert (random_projection(5) == np.eye(5)).all()


def test_a_damaged_part_changes_its_own_features_only():
    encoder = load_encoder('tiny-clip')
    projection = random_projection(encoder.dense_dim)
    image = np.random.default_rng(0).random((3, 64, 64)).astype(np.float32)
    changed = image.copy()
    changed[:, 32:, 32:] = 0
    before, after = dense_features(encoder, image, projection), dense_features(encoder, changed, projection)
    half = before.shape[1] // 2
    moved = np.abs(before - after).max(0) > 1e-5
    assert moved[half:, half:].all() and moved.sum() == half ** 2


@pytest.mark.parametrize('seed', range(5))
def test_shares_count_labelled_points(seed):
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 255], (12, 12)).astype(np.uint8)
    shares, labelled = class_shares(truth, 3, 4)
    part = truth[3:6, 6:9]
    assert labelled[1, 2] == pytest.approx((part < 255).mean())
    for k in range(3): assert shares[k, 1, 2] == pytest.approx((part == k).sum() / max((part < 255).sum(), 1))


# ---------------------------------------------------------------- cross-fitting

def fit(drawn, kind='linear', grids=None):
    folder, own, scenes = drawn
    grids = grids or own
    parts = read_parts(Store(folder), 'dense/drawn', grids, kind)
    return cross_fit(grids, parts, [scenes[grid.image_id] for grid in grids], kind)


def parts_of(folder, grid, kind='linear'): return read_parts(Store(folder), 'dense/drawn', [grid], kind)[0]


@pytest.mark.parametrize('kind', ['linear', 'names'])
def test_the_map_is_right_where_features_say_the_class(drawn, kind):
    grids = drawn[1]
    found, _ = fit(drawn, kind)
    assert [grid.methods[-1] for grid in found] == [SEMANTIC_MAP] * len(grids)
    assert np.mean([right(grid) for grid in found]) > 0.85
    for before, after in zip(grids, found): assert (after.p[:2] == before.p).all() and len(after.pred) == 3


def test_an_image_gets_a_probe_that_has_not_seen_its_scene(drawn):
    _, grids, scenes = drawn
    inverted = []
    for grid in grids:
        truth = 1 - grid.truth if scenes[grid.image_id] == 's0' else grid.truth
        inverted.append(replace(grid, truth=truth))
    for before, after in zip(fit(drawn)[0], fit(drawn, grids=inverted)[0]):
        assert (before.p == after.p).all() == (scenes[before.image_id] == 's0')


def test_a_new_image_gets_a_probe_of_all_scenes(drawn):
    folder = drawn[0]
    new = drawn_grid(40)
    put_features(Store(folder), new)
    _, probes = fit(drawn)
    found = probes.add_to(replace(new, truth=np.full_like(new.truth, 255)), parts_of(folder, new))
    assert (found.pred[-1] == new.truth).mean() > 0.85
    assert probes.add_to(new, None) is new


def test_names_of_other_classes_say_nothing(drawn):
    p = np.stack([grid.p[-1] for grid in fit(drawn, 'shuffled names')[0]])
    assert abs(p.astype(int) - 127).max() < 12          # nearly even: wrong names get no weight


def test_one_scene_is_not_enough(drawn):
    folder, grids, _ = drawn
    found, probes = fit((folder, grids, {grid.image_id: 's' for grid in grids}))
    assert all(map(operator.is_, found, grids)) and not probes.probes


def test_another_dataset_has_names_but_no_linear_probe(drawn):
    other = drawn_grid(3, 'village')
    put_features(Store(drawn[0]), other)
    for kind, methods in (('linear', 2), ('names', 3)):
        _, probes = fit(drawn, kind)
        assert len(probes.add_to(other, parts_of(drawn[0], other, kind)).methods) == methods


def test_the_same_seed_gives_the_same_map(drawn):
    assert all((a.p == b.p).all() for a, b in zip(fit(drawn)[0], fit(drawn)[0]))


def test_a_linear_probe_learns_shares():
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    share = torch.sigmoid(2 * x[:, 0])
    probe = linear_probe(x, torch.stack([share, 1 - share], 1))
    assert (probe(x).softmax(1)[:, 0] - share).abs().mean() < 0.05


# ---------------------------------------------------------------- in the consensus, and refusals

def table_of(store, grids, scenes):
    rows = []
    for grid in grids:
        for i, method in enumerate(grid.methods):
            key = map_key(grid.image_id, method)
            points = pack_grid(np.stack([grid.p[i], grid.flip[i]]), grid.pred[i])
            store.put('grid', pd.DataFrame([dict(key=key, **points)]))
            rows.append(dict(image_id=grid.image_id, dataset=grid.dataset, method=method, method_fp=method,
                             scene=scenes[grid.image_id], oa=(grid.pred[i] == grid.truth).mean()))
        store.put('truth', pd.DataFrame([dict(key=grid.image_id, **pack_points(grid.truth))]))
    return pd.DataFrame(rows)


def test_the_consensus_uses_it_where_no_method_can_be_trusted(drawn):
    folder, grids, scenes = drawn
    table = table_of(Store(folder), grids, scenes)
    train = table.scene != 's3'
    options = dict(epochs=20, per_dataset=False)
    plain = ConsensusModel(folder, **options).fit(table[train])
    helped = ConsensusModel(folder, dense='dense/drawn', **options).fit(table[train])
    test = table[~train]
    error = [np.abs(model.predict(test) - test.oa).mean() for model in (plain, helped)]
    assert error[1] < 0.8 * error[0]
    assert set(helped.describe(test).columns) == set(plain.describe(test).columns)
    assert len(helped.predict(test)) == len(test)


def test_a_stored_consensus_keeps_its_probes(drawn, tmp_path):
    folder, grids, scenes = drawn
    table = table_of(Store(folder), grids, scenes)
    ensemble = ConsensusModel(folder, epochs=1, dense='dense/drawn').fit(table).ensemble_
    loaded = load_consensus(save_consensus(ensemble, tmp_path/'saved'))
    parts = parts_of(folder, grids[0])
    assert torch.equal(posterior(ensemble, grids[0], parts), posterior(loaded, grids[0], parts))
    assert not torch.equal(posterior(loaded, grids[0], parts), posterior(loaded, grids[0]))


def test_what_is_missing_is_named(drawn):
    folder, grids, _ = drawn
    with pytest.raises(KeyError, match='linear'): cross_fit(grids, grids, grids, 'linnear')
    with pytest.raises(MissingFeatures, match='dense/none'): read_parts(Store(folder), 'dense/none', grids)
    with pytest.raises(MissingFeatures, match='town30'): parts_of(folder, drawn_grid(30))


def test_tables_of_encoders_are_listed(drawn):
    store, *_ = drawn
    assert dense_tables(Store(store)) == {'dense/drawn': True}


def test_names_need_an_encoder_of_sentences(tmp_path):
    tiles = pd.DataFrame(dict(image_id=[], dataset=[]))
    encoder = SimpleNamespace(name='blind')
    with pytest.raises(Incompatible, match='without texts'):
        extract_dense(tiles, encoder, Store(tmp_path), dict(town=('a', 'b')))


def test_a_map_of_any_size_takes_part():
    grid = drawn_grid(1)
    q = np.zeros((2, 3, 5), np.float32)
    q[1] = 1
    found = add_map(grid, 'wall', q)
    assert found.methods == ['a', 'b', 'wall'] and (found.pred[-1] == 1).all() and (found.p[-1, 1] == 255).all()
