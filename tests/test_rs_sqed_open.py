"""The published tables: nothing of the imagery leaves, and everything downstream runs on what comes back."""
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rssqa.core import DataNotFound, SchemaError
from rssqa.data.datasets import folds, folder_spec, read_image, read_mask, scan
from rssqa.tables.rs_sqed_open import (
    DAMAGE,
    SIDE,
    TAP_STEP,
    add_semantics,
    damaged,
    method_table,
    open_tiles,
    publish,
    publish_grids,
    shrink,
    unpack,
    unpack_grids,
)
from rssqa.tables.sqed import limit_grid, prediction_grids, stored_features
from rssqa.tables.store import Store, get_vectors, put_vectors
from rssqa.data.synthetic import write_scenes
from trained import trained_setup


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    w = trained_setup()
    out = tmp_path_factory.mktemp('tables')
    store = Store(w.home/'store')
    put_vectors(
        store,
        'sem/toy@1',
        w.sqed.image_id.unique(),
        np.random.default_rng(0).normal(size=(w.sqed.image_id.nunique(), 5)),
    )
    publish(w.sqed, store, ['sem/toy@1'], out, 'little')
    publish_grids(w.sqed, store, out/'little_grids.parquet')
    return out, store


def test_no_column_leads_to_the_imagery(published):
    for file in published[0].glob('*.parquet'):
        table = pd.read_parquet(file)
        assert not {'path', 'mask_path', 'root'} & set(table.columns)
        assert b'/tmp' not in file.read_bytes() and b'.png' not in file.read_bytes()


def test_back_in_a_store_everything_is_as_before(published, tmp_path):
    w, (folder, store), back = trained_setup(), published, Store(tmp_path)
    table, sems = unpack(folder, 'little', back)
    assert sems == ['sem/toy@1'] and table.drop(columns='confusion').equals(
        w.sqed.drop(columns=['confusion', 'path', 'mask_path'])
    )
    for method, v in stored_features(store, w.sqed).items():
        assert (
            np.abs(stored_features(back, table)[method] - np.clip(v, -127 * TAP_STEP, 127 * TAP_STEP)).max()
            <= TAP_STEP / 2 + 0.02
        )
    unpack_grids(folder/'little_grids.parquet', table, back, w.tiles, w.specs)
    for s, t in zip(map(limit_grid, prediction_grids(store, w.sqed)), prediction_grids(back, table)):
        assert (
            s.methods == t.methods
            and (s.pred == t.pred).all()
            and (s.truth == t.truth).all()
            and t.p.shape == s.p.shape
        )
        assert np.abs((s.p.astype(float) + s.flip) / 510 - t.p / 255).max() < 0.06


class Toy: # an encoder that says the mean of each channel
    name = 'means'
    dim = 3
    fingerprint = 'f' * 16
    def encode_image(self, x):
        from types import SimpleNamespace
        import torch
        return SimpleNamespace(pooled=torch.as_tensor(x).mean((2, 3)))


def test_a_later_encoder_joins_as_a_column(published, tmp_path):
    import shutil
    w = trained_setup()
    folder = tmp_path/'copy'
    back = Store(tmp_path/'back')
    shutil.copytree(published[0], folder)
    before = pd.read_parquet(folder/'little_semantics.parquet')
    add_semantics(folder, 'little', w.tiles, Toy(), Store(tmp_path/'store'))
    after, (table, sems) = pd.read_parquet(folder/'little_semantics.parquet'), unpack(folder, 'little', back)
    assert after[before.columns].equals(before) and sems[0] == 'sem/toy@1' and len(sems) == 2
    first = w.tiles.iloc[0]
    assert np.allclose(
        get_vectors(back, sems[1], [first.image_id])[0], read_image(first).mean((1, 2)), atol=1e-2
    )
    with pytest.raises(DataNotFound, match='do not belong'):
        add_semantics(folder, 'little', w.tiles.iloc[1:], Toy(), Store(tmp_path/'store'))


def test_equal_tables_give_equal_files(published, tmp_path):
    w, (folder, store) = trained_setup(), published
    publish(w.sqed, store, ['sem/toy@1'], tmp_path, 'little')
    publish_grids(w.sqed, store, tmp_path/'little_grids.parquet', chunk=3)
    assert all((tmp_path/f.name).read_bytes() == f.read_bytes() for f in folder.glob('*.parquet'))


def test_truth_is_not_published(published, tmp_path):
    back = Store(tmp_path)
    table, _ = unpack(published[0], 'little', back)
    unpack_grids(published[0]/'little_grids.parquet', table, back)
    assert all((s.truth == 255).all() for s in prediction_grids(back, table)) and 'truth' not in back.names()


def test_masks_of_other_images_are_refused(published, tmp_path):
    "They used to be dropped without a word, and the jury with them."
    w = trained_setup()
    back = Store(tmp_path)
    table, _ = unpack(published[0], 'little', back)
    for wrong in (w.tiles.assign(image_id='x' + w.tiles.image_id), w.tiles.iloc[1:]):
        with pytest.raises(DataNotFound, match='do not belong'):
            unpack_grids(published[0]/'little_grids.parquet', table, back, wrong, w.specs)
    assert 'truth' not in back.names()


def test_missing_tables_say_what_to_do(tmp_path):
    with pytest.raises(DataNotFound, match='build'): unpack(tmp_path, 'nothing', Store(tmp_path/'s'))
    with pytest.raises(DataNotFound, match='dubai_mbrsc'): open_tiles(tmp_path, tmp_path)


@pytest.mark.parametrize('factor', [2, 4])
def test_shrinking_averages_images_and_keeps_classes(tmp_path, factor):
    root = write_scenes(tmp_path/'town', 'town', scenes=2, size=64)
    small = shrink(root, tmp_path/f'small{factor}', factor)
    for a, b in zip(scan(root, folder_spec(root)).itertuples(), scan(small, folder_spec(small)).itertuples()):
        x = read_image(a)
        y = read_image(b)
        assert np.abs(x.reshape(3, 64 // factor, factor, 64 // factor, factor).mean((2, 4)) - y).max() < 0.01
        assert (
            read_mask(a, folder_spec(root))[factor // 2 :: factor, factor // 2 :: factor]
            == read_mask(b, folder_spec(small))
        ).all()


def test_damaged_copies_keep_scene_fold_and_truth(tmp_path):
    root = write_scenes(tmp_path/'town', 'town', scenes=4, size=64, damaged=0)
    spec = folder_spec(root)
    tiles = scan(root, folder_spec(root))
    tiles['fold'] = folds(tiles, 2)
    copies = damaged(tiles, tmp_path, each=2)
    assert len(copies) == 2 * len(DAMAGE) and copies.groupby(['kind', 'level']).size().eq(2).all()
    at = tiles.set_index('image_id')
    for r in copies.itertuples():
        own = at.loc[r.image_id.split('+')[0]]
        assert (r.scene, r.fold, r.split) == (own.scene, own.fold, own.split) and (
            read_mask(r, spec) == read_mask(own, spec)
        ).all()
        assert 0.001 < np.abs(read_image(r) - read_image(own)).mean() < 0.5
    again = damaged(tiles, tmp_path, each=2)
    assert again.equals(copies)


def test_method_table_counts_pixels_not_tiles():
    t = trained_setup().sqed
    row = method_table(t).iloc[0]
    part = t[(t.method == row.method)]
    assert row.oa == pytest.approx(
        (part.oa * part.n_valid).sum() / part.n_valid.sum(), abs=1e-5
    ) and row.tiles == len(part)
