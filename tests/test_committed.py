"""The committed tables in the Explorer: predictions and places in the right rows, pictures without imagery."""
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rssqa.core import DataNotFound, UnknownName
from rssqa.tables.rs_sqed_open import published_path
from rssqa.tables.sqed import load_sqed
from rssqa.viz import committed
from rssqa.viz.committed import (
    EXPERIMENTS, CommittedCases, CommittedStore, encoder_column, enlarge, layout_paths, open_committed, predicted_oa,
    tables_folder,
)
from rssqa.viz.explorer import paint_tile
from rssqa.viz.explorer_widget import explore

FOLDER = tables_folder()
KEYS = ['image_id', 'method']


@pytest.fixture(scope='module')
def state(): return open_committed('open', data='nowhere')


def test_each_row_has_its_own_prediction(state):
    predictions = pd.read_parquet(FOLDER/'predictions_main.parquet')
    expected = predictions.groupby(KEYS)['level-pooled ensemble'].mean()
    for row in state.table.sample(30, random_state=0).itertuples():
        assert row.predicted == pytest.approx(expected[row.image_id, row.method], abs=1e-6)
    assert np.allclose(state.table.gap, state.table.predicted - state.table.oa) and state.table.predicted.notna().all()


def test_each_row_has_its_own_place_and_what_was_measured(state):
    path, facts = layout_paths(FOLDER, 'open')
    places = pd.read_parquet(path).set_index(KEYS)
    for row in state.table.sample(30, random_state=1).itertuples():
        assert (row.u, row.v) == pytest.approx(tuple(places.loc[row.image_id, row.method]), abs=1e-6)
    assert state.placed.all() and not state.pending
    assert state.numbers == json.loads(facts.read_text())['numbers']
    assert 'umap' in state.provenance and 'thirds found' in state.header()


def test_places_do_not_depend_on_the_order_of_rows(tmp_path, monkeypatch):
    wanted = ('unseen', 'predictions_unseen', 'classes', 'renamed')
    for file in FOLDER.iterdir():
        if file.name.startswith(wanted): shutil.copyfile(file, tmp_path/file.name)
    table = pd.read_parquet(FOLDER/'unseen.parquet')
    places = table[KEYS].assign(u=np.arange(len(table)) * 1.0, v=0.0).sample(frac=1, random_state=0)
    path, facts = layout_paths(tmp_path, 'unseen')
    places.to_parquet(path, index=False)
    facts.write_text(json.dumps(dict(attrs=dict(method='umap', seed=3), numbers={})))
    found = open_committed('unseen', tmp_path, data='nowhere')
    expected = places.set_index(KEYS).u
    keys = pd.MultiIndex.from_frame(found.table[KEYS])
    assert np.array_equal(found.table.u.to_numpy(), expected.loc[keys].to_numpy())


def test_a_map_without_imagery_is_drawn_from_its_grid(state):
    row = state.table[state.table.dataset == 'czech_ortho'].iloc[5]
    case = state.images(row)
    grids = pd.read_parquet(FOLDER/'open_grids.parquet', columns=[*KEYS, 'h', 'w', 'pred'])
    grid = grids[(grids.image_id == row.image_id) & (grids.method == row.method)].iloc[0]
    points = np.frombuffer(grid.pred, np.uint8).reshape(grid.h, grid.w)
    side = round(row.h / grid.h)
    assert case['mask'].shape == (row.h, row.w)
    assert np.array_equal(case['mask'][side // 2::side, side // 2::side][:grid.h, :grid.w], points)
    assert 'image' not in case and 'truth' not in case
    assert len(case['palette']) == len(case['classes']) > points.max()
    assert paint_tile(case, why='test').startswith(b'\x89PNG')


def test_every_class_of_every_table_has_a_name_and_a_colour():
    for name in EXPERIMENTS:
        if not published_path(FOLDER, name).exists(): continue
        known = json.loads((FOLDER/'classes.json').read_text())
        table = load_sqed(published_path(FOLDER, name))
        for dataset, rows in table.groupby('dataset', observed=True):
            k = int(np.sqrt(len(rows.confusion.iloc[0])))
            assert len(known[dataset]['classes']) == len(known[dataset]['palette']) == k


@pytest.mark.parametrize('shape, points', [((256, 256), (32, 32)), ((306, 306), (39, 39)), ((100, 60), (25, 15))])
def test_enlarged_points_keep_their_place(shape, points):
    ids = np.random.default_rng(0).integers(5, size=points)
    full = enlarge(ids, shape)
    side = round(shape[0] / points[0])
    assert full.shape == shape
    for y, x in ((0, 0), (7, 3), (points[0] - 1, points[1] - 1)):
        at = min(y * side + side // 2, shape[0] - 1), min(x * side + side // 2, shape[1] - 1)
        assert full[at] == ids[y, x]


def test_vectors_are_unpacked_at_the_first_question_only(state, monkeypatch, tmp_path):
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    semantic = encoder_column(FOLDER, 'open')
    store = CommittedStore(FOLDER, 'open', semantic)
    assert store._store is None
    vectors = pd.read_parquet(published_path(FOLDER, 'open', 'semantics'), columns=['image_id', semantic])
    some = vectors.iloc[[3, 700]]
    from rssqa.tables.store import get_vectors
    found = get_vectors(store, semantic, some.image_id)
    expected = np.stack([np.frombuffer(row, np.float16) for row in some[semantic]]).astype(np.float32)
    assert np.array_equal(found, expected) and store._store is not None


@pytest.mark.real
def test_the_real_image_of_a_row_stands_beside_its_map(state):
    row = state.table[state.table.dataset == 'amazon_forest'].iloc[0]
    case = CommittedCases(FOLDER, 'open')(row)
    assert case['image'].shape[-2:] == case['mask'].shape == case['truth'].shape
    right = case['mask'] == case['truth']
    known = case['truth'] != 255
    assert right[known].mean() == pytest.approx(row.oa, abs=0.03)         # every eighth pixel stands for all


def test_opening_loads_no_encoder_and_looks_for_no_imagery(monkeypatch):
    def fail(*args, **options): raise AssertionError('loaded before it was asked for')
    monkeypatch.setattr('rssqa.clip.encoders.load_encoder', fail)
    monkeypatch.setattr(committed, 'open_tiles', fail)
    window = explore('open')
    assert len(window.state) == 14144 and not window.state.pending


def test_wrong_names_and_missing_tables_are_explained(tmp_path, monkeypatch):
    with pytest.raises(UnknownName, match='open'): open_committed('opn')
    with pytest.raises(UnknownName, match='(?i)predictor'): predicted_oa(FOLDER, 'open', 'RS-SQ')
    with pytest.raises(DataNotFound, match='(?i)one of open, unseen'): explore('nothing-here')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(committed, 'PACKAGE_FILE', str(tmp_path/'rssqa/__init__.py'))
    with pytest.raises(DataNotFound, match='(?i)clone the repository'): tables_folder()
    assert Path(FOLDER/'open.parquet').exists()


def test_the_app_takes_the_name_of_a_published_table(monkeypatch, tmp_path):
    from rssqa.cli import _app_environment, _is_published
    assert _is_published('explorer', Path('open')) and _is_published('explorer', Path('unseen'))
    assert not _is_published('pairs', Path('open')) and not _is_published('explorer', Path('opne'))
    monkeypatch.chdir(tmp_path)
    assert _app_environment(dict(data=Path('open')), None)['RSSQA_APP_DATA'] == 'open'
    (tmp_path/'open').mkdir()                                            # a folder of that name comes first
    assert _app_environment(dict(data=Path('open')), None)['RSSQA_APP_DATA'] == str(tmp_path/'open')


def test_words_and_neighbours_find_committed_images(monkeypatch, tmp_path):
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    state = open_committed('open', data='nowhere')
    state.search('dense forest', k=10)
    found = state.table.iloc[state.rows()]
    assert len(found) == 10 and not set(found.dataset) & {'dubai_mbrsc'}         # a desert city
    row = int(state.rows()[0])
    state.neighbours(row, k=5)
    near = state.table.iloc[state.rows()]
    assert len(near) == 5 and state.table.image_id[row] not in set(near.image_id)
