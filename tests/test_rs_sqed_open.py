"""The published tables: without anything of the imagery, and enough for everything downstream."""
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from rssqa.core import DataNotFound
from rssqa.data.datasets import folder_spec, read_image, read_mask, scan
from rssqa.data.splits import folds
from rssqa.data.synthetic import write_scenes
from rssqa.tables.grid import limit_grid, prediction_grids
from rssqa.tables.rs_sqed_open import (
    DAMAGE, FEATURE_STEP, FOLDS, add_semantics, damage_tiles, edition, method_table, open_tiles, publish,
    publish_grids, published_path, shrink, unpack, unpack_grids
)
from rssqa.tables.sqed import stored_features
from rssqa.tables.store import Store, get_vectors, put_vectors
from trained import trained_setup

SEMANTIC = 'sem/toy@1'


def grids_path(folder): return published_path(folder, 'little', 'grids')


@pytest.fixture(scope='module')
def published(tmp_path_factory): # -> folder of the files, store that they were made from
    setup = trained_setup()
    folder = tmp_path_factory.mktemp('tables')
    store = Store(setup.home/'store')
    image_ids = setup.sqed.image_id.unique()
    put_vectors(store, SEMANTIC, image_ids, np.random.default_rng(0).normal(size=(len(image_ids), 5)))
    publish(setup.sqed, store, [SEMANTIC], folder, 'little')
    publish_grids(setup.sqed, store, grids_path(folder))
    return folder, store


def test_files_are_named_by_table_and_part(published, tmp_path):
    names = sorted(path.name for path in published[0].iterdir())
    assert names == [
        'little.parquet', 'little_features.parquet', 'little_grids.parquet', 'little_semantics.parquet'
    ]
    assert published_path(tmp_path, 'open') == tmp_path/'open.parquet'


def test_no_column_leads_to_the_imagery(published):
    for file in published[0].glob('*.parquet'):
        assert not {'path', 'mask_path', 'root'} & set(pd.read_parquet(file))
        assert b'/tmp' not in file.read_bytes() and b'.png' not in file.read_bytes()


def test_the_table_and_its_features_come_back(published, tmp_path):
    setup = trained_setup()
    folder, store = published
    back = Store(tmp_path)
    table, semantics = unpack(folder, 'little', back)
    expected = setup.sqed.drop(columns=['confusion', 'path', 'mask_path'])
    assert semantics == [SEMANTIC] and table.drop(columns='confusion').equals(expected)
    features = stored_features(back, table)
    for method, exact in stored_features(store, setup.sqed).items():
        exact = np.clip(exact, -127 * FEATURE_STEP, 127 * FEATURE_STEP)
        assert np.abs(features[method] - exact).max() <= FEATURE_STEP / 2 + 0.02


def test_grids_and_truth_come_back(published, tmp_path):
    setup = trained_setup()
    folder, store = published
    back = Store(tmp_path)
    table, _ = unpack(folder, 'little', back)
    unpack_grids(grids_path(folder), table, back, setup.tiles, setup.specs)
    before = [limit_grid(grid) for grid in prediction_grids(store, setup.sqed)]
    after = prediction_grids(back, table)
    assert len(before) == len(after) > 0
    for old, new in zip(before, after):
        assert old.methods == new.methods and old.p.shape == new.p.shape
        assert (old.pred == new.pred).all() and (old.truth == new.truth).all()
        assert np.abs((old.p.astype(float) + old.flip) / 510 - new.p / 255).max() < 0.06


class MeanColour: # an encoder whose vector is the mean of each channel
    name = 'means'
    dim = 3
    fingerprint = 'f' * 16
    def encode_image(self, x): return SimpleNamespace(pooled=torch.as_tensor(x).mean((2, 3)))


def test_a_later_encoder_joins_as_a_column(published, tmp_path):
    tiles = trained_setup().tiles
    folder = tmp_path/'copy'
    back = Store(tmp_path/'back')
    store = Store(tmp_path/'store')
    shutil.copytree(published[0], folder)
    path = published_path(folder, 'little', 'semantics')
    before = pd.read_parquet(path)
    assert add_semantics(folder, 'little', tiles, MeanColour(), store) == path
    _, semantics = unpack(folder, 'little', back)
    assert pd.read_parquet(path)[before.columns].equals(before)
    assert semantics[0] == SEMANTIC and len(semantics) == 2
    first = tiles.iloc[0]
    vector = get_vectors(back, semantics[1], [first.image_id])[0]
    assert np.allclose(vector, read_image(first).mean((1, 2)), atol=1e-2)
    with pytest.raises(DataNotFound, match='do not belong'):
        add_semantics(folder, 'little', tiles.iloc[1:], MeanColour(), store)


def test_equal_tables_give_equal_files(published, tmp_path):
    setup = trained_setup()
    folder, store = published
    publish(setup.sqed, store, [SEMANTIC], tmp_path, 'little')
    publish_grids(setup.sqed, store, grids_path(tmp_path), chunk=3)
    for file in folder.glob('*.parquet'): assert (tmp_path/file.name).read_bytes() == file.read_bytes()


def test_truth_is_not_published(published, tmp_path):
    back = Store(tmp_path)
    table, _ = unpack(published[0], 'little', back)
    unpack_grids(grids_path(published[0]), table, back)
    assert all((grid.truth == 255).all() for grid in prediction_grids(back, table))
    assert 'truth' not in back.names()


def test_masks_of_other_images_are_refused(published, tmp_path):
    "If they were dropped without a word, the consensus model would have nothing to learn from."
    setup = trained_setup()
    back = Store(tmp_path)
    table, _ = unpack(published[0], 'little', back)
    for wrong in (setup.tiles.assign(image_id='x' + setup.tiles.image_id), setup.tiles.iloc[1:]):
        with pytest.raises(DataNotFound, match='do not belong'):
            unpack_grids(grids_path(published[0]), table, back, wrong, setup.specs)
    assert 'truth' not in back.names()


def test_missing_tables_say_what_to_do(tmp_path):
    with pytest.raises(DataNotFound, match='build'): unpack(tmp_path, 'nothing', Store(tmp_path/'s'))
    with pytest.raises(DataNotFound, match='dubai_mbrsc'): open_tiles(tmp_path, tmp_path)


@pytest.mark.parametrize('factor', [2, 4])
def test_shrinking_averages_images_and_keeps_classes(tmp_path, factor):
    root = write_scenes(tmp_path/'town', 'town', scenes=2, size=64)
    small = shrink(root, tmp_path/f'small{factor}', factor)
    spec, small_spec = folder_spec(root), folder_spec(small)
    side = 64 // factor
    tiles = list(zip(scan(root, spec).itertuples(), scan(small, small_spec).itertuples()))
    assert tiles
    for old, new in tiles:
        mean = read_image(old).reshape(3, side, factor, side, factor).mean((2, 4))
        middle = read_mask(old, spec)[factor//2::factor, factor//2::factor]
        assert np.abs(mean - read_image(new)).max() < 0.01
        assert (middle == read_mask(new, small_spec)).all()


def test_damaged_copies_keep_scene_fold_and_truth(tmp_path):
    root = write_scenes(tmp_path/'town', 'town', scenes=4, size=64, damaged=0)
    spec = folder_spec(root)
    tiles = scan(root, spec)
    tiles['fold'] = folds(tiles, 2)
    copies = damage_tiles(tiles, tmp_path, each=2)
    assert len(copies) == 2 * len(DAMAGE) and copies.groupby(['kind', 'level']).size().eq(2).all()
    originals = tiles.set_index('image_id')
    for copy in copies.itertuples():
        tile = originals.loc[copy.image_id.split('+')[0]]
        assert (copy.scene, copy.fold, copy.split) == (tile.scene, tile.fold, tile.split)
        assert (read_mask(copy, spec) == read_mask(tile, spec)).all()
        assert 0.001 < np.abs(read_image(copy) - read_image(tile)).mean() < 0.5
    assert damage_tiles(tiles, tmp_path, each=2).equals(copies)


def test_method_table_counts_pixels_not_tiles():
    table = trained_setup().sqed
    row = method_table(table).iloc[0]
    part = table[table.method == row.method]
    expected = (part.oa * part.n_valid).sum() / part.n_valid.sum()
    assert row.oa == pytest.approx(expected, abs=1e-5) and row.tiles == len(part)


@pytest.mark.parametrize('scenes', [1, 2, FOLDS, FOLDS + 3])
def test_a_source_of_few_scenes_has_fewer_folds(scenes, tmp_path):
    write_scenes(tmp_path/'town', 'town', scenes, 32)
    tiles, _ = open_tiles(tmp_path, tmp_path, ('town',))
    assert tiles.fold.nunique() == min(scenes, FOLDS)
    assert (tiles.groupby('scene').fold.nunique() == 1).all()


def test_another_edition_has_another_name(tmp_path):
    (tmp_path/'open.parquet').write_bytes(b'first')
    first = edition(tmp_path)
    (tmp_path/'predictions_main.parquet').write_bytes(b'made from the tables')
    assert edition(tmp_path) == first
    (tmp_path/'unseen.parquet').write_bytes(b'more')
    second = edition(tmp_path)
    (tmp_path/'open.parquet').write_bytes(b'second')
    assert len({first, second, edition(tmp_path)}) == 3
