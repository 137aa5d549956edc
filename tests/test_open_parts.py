"""A table built fold by fold is the table that is built at once."""
import numpy as np
import pandas as pd
import pytest

from rssqa.core import DataNotFound, Incompatible
from rssqa.data.synthetic import write_scenes
from rssqa.segment.methods.training import Recipe
from rssqa.tables.open_parts import FOLDS, KINDS, build_part, join_parts, part_name, segment_fold
from rssqa.tables.rs_sqed_open import open_tiles, published_path, unpack, unpack_grids
from rssqa.tables.sqed import load_sqed
from rssqa.tables.store import Store

QUICK = dict(
    recipe=Recipe('nano', steps=2, batch=2, crop=32), each=1, sources=('town', 'flood'), workers=1,
    methods=['unet', 'pspnet'])


@pytest.fixture(scope='module')
def built(tmp_path_factory): # -> folder with data, networks and parts
    home = tmp_path_factory.mktemp('parts')
    for name in ('town', 'flood'): write_scenes(home/'data'/name, name, FOLDS + 1, 32)
    for fold in range(FOLDS): build_part(home/'data', home, home/'parts', fold, **QUICK)
    return home


def test_each_map_comes_from_a_network_that_did_not_learn_from_its_scene(built, tmp_path):
    join_parts(built/'parts', 'open', tmp_path)
    table = load_sqed(tmp_path/'open.parquet')
    tiles, _ = open_tiles(built/'data', built, QUICK['sources'], FOLDS)
    expected = tiles.set_index('image_id').fold
    assert set(table.image_id) == set(tiles.image_id)
    assert (table.fold.to_numpy() == expected.loc[table.image_id].to_numpy()).all()
    assert table.groupby('fold').method_fp.nunique().eq(2 * 2).all()       # methods x datasets: logits of their own
    assert table.groupby('method_fp').fold.nunique().eq(1).all()


def test_joined_files_can_be_unpacked(built, tmp_path):
    files = join_parts(built/'parts', 'open', tmp_path)
    assert [path.name for path in files] == ['open.parquet'] + [f'open_{kind}.parquet' for kind in KINDS[1:]]
    table, semantics = unpack(tmp_path, 'open', Store(tmp_path/'store'))
    assert semantics == [] and table.iqa_brisque_00.notna().all()
    unpack_grids(tmp_path/'open_grids.parquet', table, Store(tmp_path/'store'))
    rows = pd.concat([load_sqed(published_path(built/'parts', part_name('open', f))) for f in range(FOLDS)])
    rows = rows.sort_values(['image_id', 'method'], ignore_index=True)
    assert np.array_equal(table.oa, rows.oa) and not table.duplicated(['image_id', 'method']).any()


def test_damaged_copies_are_in_the_fold_of_their_image(built, tmp_path):
    join_parts(built/'parts', 'open', tmp_path)
    join_parts(built/'parts', 'damaged', tmp_path)
    fold = load_sqed(tmp_path/'open.parquet').drop_duplicates('image_id').set_index('image_id').fold
    copies = load_sqed(tmp_path/'damaged.parquet')
    original = copies.image_id.str.replace(r'\+.*', '', regex=True)
    assert len(copies) == 2 * 2 * 12 and (copies.fold.to_numpy() == fold.loc[original].to_numpy()).all()


def test_a_finished_part_is_not_trained_again(built):
    before = {path: path.stat().st_mtime_ns for path in (built/'networks').rglob('*') if path.is_file()}
    files = build_part(built/'data', built, built/'parts', 1, **QUICK)
    assert {path.stem.split('_')[0] for path in files} == {'open-2of4', 'damaged-2of4'}
    assert before == {path: path.stat().st_mtime_ns for path in (built/'networks').rglob('*') if path.is_file()}


def test_missing_parts_and_wrong_folds_are_named(built, tmp_path):
    with pytest.raises(DataNotFound, match=r'(?i)0 of 4 parts; open-1of4.parquet'): join_parts(tmp_path, 'open')
    with pytest.raises(Incompatible, match='(?i)folds 0 to 3'): segment_fold(built/'data', built, -1, **QUICK)
