"""The table: the same bytes however often its building was killed, and checked before anyone uses it."""
import os, pickle, signal, subprocess, sys, time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from rssqa.core import DataNotFound, LeakError, MissingFeatures, Problem, SchemaError
from rssqa.data.datasets import read_image, read_mask
from rssqa.segment.confidence import AGREEMENT
from rssqa.segment.methods.training import load_segmenter
from rssqa.segment.metrics import confusion
from rssqa.tables import sqed as module
from rssqa.tables.sqed import (
    NON_FEATURE_COLUMNS, build_sqed, check_sqed, features_table, label_free_columns, load_sqed, save_sqed,
    stored_features, stored_mask
)
from rssqa.tables.store import Store
from trained import numbers, trained_setup


def build(tiles, store, networks=None, **options):
    setup = trained_setup()
    if networks is None: networks = setup.networks
    return build_sqed(tiles, networks, setup.specs, store, **dict(batch=4, every=6, workers=1) | options)


@pytest.fixture
def store(tmp_path): return Store(tmp_path/'store')


@pytest.fixture(scope='module')
def some():
    tiles = trained_setup().tiles
    scenes = sorted(tiles.scene.unique())[:4]
    return tiles[tiles.scene.isin(scenes)].reset_index(drop=True)


@pytest.fixture(scope='module')
def whole(some, tmp_path_factory):
    home = tmp_path_factory.mktemp('whole')
    table = build(some, Store(home/'s'))
    return SimpleNamespace(table=table, bytes=save_sqed(table, home/'t.parquet').read_bytes())


def same(table, whole, tmp_path):
    return save_sqed(table, tmp_path/'again.parquet').read_bytes() == whole.bytes


# ---------------------------------------------------------------- kill it

@pytest.mark.parametrize('after', range(0, 9, 2))
def test_killed_between_results(after, some, whole, store, tmp_path, monkeypatch):
    segment, calls = module._segment_job, []
    def counted(job):
        calls.append(job)
        return segment(job)
    def interrupted(job):
        if len(calls) == after: raise KeyboardInterrupt
        return counted(job)
    monkeypatch.setattr(module, '_segment_job', interrupted)
    if after < 8:                                       # 16 tiles, 2 methods, 4 a batch: 8 jobs
        with pytest.raises(KeyboardInterrupt): build(some, store)
    monkeypatch.setattr(module, '_segment_job', counted)
    assert same(build(some, store), whole, tmp_path)
    assert len(calls) == 8                             # nothing was done twice


@pytest.mark.parametrize('table', ['masks', 'intermediate', 'rows', 'agreement'])
@pytest.mark.parametrize('nth', [0, 1])
def test_killed_in_the_middle_of_a_commit(table, nth, some, whole, store, tmp_path, monkeypatch):
    put, agree, commits = Store.put, module._agree_missing, []
    def interrupted(self, name, frame):
        if name.startswith(table):
            commits.append(name)
            if len(commits) == nth + 1: raise KeyboardInterrupt
        return put(self, name, frame)
    monkeypatch.setattr(Store, 'put', interrupted)
    monkeypatch.setattr(module, '_agree_missing', lambda rows, store: agree(rows, store, chunk=4))
    with pytest.raises(KeyboardInterrupt): build(some, store)
    monkeypatch.setattr(Store, 'put', put)
    assert same(build(some, store), whole, tmp_path)


KILLED = '''
import pickle, sys
from pathlib import Path
from rssqa.data.datasets import folder_spec
from rssqa.tables.sqed import build_sqed
from rssqa.tables.store import Store
home, tiles, store = Path(sys.argv[1]), *pickle.load(open(sys.argv[2], 'rb'))
spec = folder_spec(home/'town')
networks = pickle.loads((home/'done.pickle').read_bytes())[1]
build_sqed(tiles, networks, {spec.name: spec}, Store(store), batch=4, every=4, workers=1)
'''


@pytest.mark.parametrize('rows', [pytest.param(1, marks=pytest.mark.slow), 12])
def test_killed_by_the_system(rows, some, whole, store, tmp_path):
    (tmp_path/'job').write_bytes(pickle.dumps((some, store.root)))
    command = [sys.executable, '-c', KILLED, str(trained_setup().home), str(tmp_path/'job')]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 240                     # a busy machine is slow to import torch
    while len(store.keys('rows')) < rows and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert rows <= len(store.keys('rows')) < 32
    assert same(build(some, store), whole, tmp_path)


def test_batches_do_not_depend_on_the_order_of_tiles(some, whole, store, tmp_path):
    assert same(build(some.sample(frac=1, random_state=1), store, every=1000), whole, tmp_path)


@pytest.mark.slow
def test_worker_processes_give_the_same_table(some, whole, store, tmp_path):
    assert same(build(some, store, workers=2), whole, tmp_path)


# ---------------------------------------------------------------- what a row holds

def test_labels_are_those_of_the_segmenter(some, whole):
    setup = trained_setup()
    k = len(setup.spec.classes)
    networks = setup.networks.set_index('fingerprint')
    segmenters = {fingerprint: load_segmenter(folder) for fingerprint, folder in networks.folder.items()}
    for row in whole.table.sample(6, random_state=0).itertuples():
        tile = some[some.image_id == row.image_id].iloc[0]
        x = torch.as_tensor(read_image(tile))[None]
        mask = segmenters[row.method_fp](x).mask[0].numpy()
        truth = read_mask(tile, setup.spec)
        valid = truth != 255
        counts = np.asarray(row.confusion).reshape(k, k)
        assert abs(row.oa - (mask == truth)[valid].mean()) < 2e-3 and row.n_valid == valid.sum()
        assert abs(counts - confusion(truth, mask, k)).sum() <= 16
        network = networks.loc[row.method_fp]
        assert row.scene not in network.scenes and row.method == network.method and row.fold == tile.fold


def test_table_has_one_sorted_row_a_pair(some, whole):
    table = whole.table
    assert len(table) == 2 * len(some) and not table.duplicated(['image_id', 'method']).any()
    assert table.equals(table.sort_values(['image_id', 'method'], ignore_index=True))
    assert 'root' not in table


def test_no_label_is_among_the_label_free_columns(whole):
    columns = set(label_free_columns(whole.table))
    assert {'conf', 'conf_t', 'entropy', 'margin', 'tta', 'dec_shift', *AGREEMENT} <= columns
    assert not columns & set(NON_FEATURE_COLUMNS)
    assert np.isfinite(whole.table[list(columns)]).all().all()


def test_a_network_that_saw_the_scene_is_refused(some, store):
    networks = trained_setup().networks
    with pytest.raises(LeakError, match='trained on .* of the scenes'):
        build(some, store, networks.assign(fold=1 - networks.fold))
    with pytest.raises(LeakError): build(some, store, networks[:1].assign(fold=-1))
    assert store.names() == []                          # before anything was computed


def test_rows_of_another_network_are_not_mixed_in(some, whole, store):
    build(some, store)
    networks = trained_setup().networks
    one = build(some, store, networks[networks.method == 'pspnet'])
    expected = whole.table[whole.table.method == 'pspnet'].oa
    assert set(one.method) == {'pspnet'} and len(one) == len(some)
    assert one[list(AGREEMENT)].isna().all().all()
    assert (one.oa.to_numpy() == expected.to_numpy()).all()


def test_agreement_is_computed_again_when_a_method_joins(some, whole, store, tmp_path):
    networks = trained_setup().networks
    alone = build(some, store, networks[networks.method == 'pspnet'])
    assert alone.agree_mean.isna().all()
    both = build(some, store)
    assert both.agree_mean.notna().all() and same(both, whole, tmp_path)
    row = both.iloc[0]
    fingerprints = both[both.image_id == row.image_id].method_fp
    first, second = [stored_mask(store, row.image_id, fingerprint) for fingerprint in fingerprints]
    assert row.agree_mean == pytest.approx((first == second).mean())


def test_features_come_in_the_order_of_the_table(some, store):
    table = build(some, store)
    features = stored_features(store, table)
    assert {m: len(v) for m, v in features.items()} == {'pspnet': len(some), 'segformer': len(some)}
    shuffled = table.sample(frac=1, random_state=3)
    for method, found in stored_features(store, shuffled).items():
        image_ids = table[table.method == method].image_id.tolist()
        order = [image_ids.index(image_id) for image_id in shuffled[shuffled.method == method].image_id]
        assert np.array_equal(found, features[method][order])
    twice = stored_features(store, pd.concat([table, table]))                     # the index repeats
    for method, vectors in features.items():
        assert np.array_equal(twice[method], np.concatenate([vectors, vectors]))


def test_a_map_that_is_not_in_the_store_is_named(some, store):
    build(some[:4], store)
    with pytest.raises(MissingFeatures, match='no-image'): stored_mask(store, 'no-image', 'f')


# ---------------------------------------------------------------- awkward images

@pytest.mark.parametrize('absent', [None, np.nan])
def test_unlabelled_images_are_left_out_and_counted(absent, some, store, monkeypatch):
    messages = []
    tiles = some.copy()
    tiles['mask_path'] = tiles.mask_path.astype(object)
    tiles.loc[tiles.index[:3], 'mask_path'] = absent
    monkeypatch.setattr(module, 'say', messages.append)
    table = build(tiles, store)
    assert set(table.image_id) == set(some.image_id[3:])
    assert len(messages) == 1 and '3 images' in messages[0]
    assert len(store.keys('masks')) == 32               # they are segmented all the same


def test_only_unlabelled_images(some, store):
    with pytest.raises(Problem, match='label'): build(some[:4].assign(mask_path=None), store)


def test_tile_with_all_pixels_ignored_is_left_out(some, store, tmp_path):
    tiles = some.copy()
    empty = Image.fromarray(np.full((64, 64), 255, np.uint8))
    empty.putpalette(list(range(256)) * 3)
    empty.save(tmp_path/'empty.png')
    # an absolute path wins over root
    tiles.loc[tiles.index[0], 'mask_path'] = str(tmp_path/'empty.png')
    assert set(build(tiles, store).image_id) == set(some.image_id[1:])


def test_images_of_mixed_size(some, store):
    tiles = some.copy()
    tiles.loc[tiles.index[::2], ['w', 'h']] = [48, 32]
    tiles['image_id'] += [f':0_0_{w}_{h}' for w, h in zip(tiles.w, tiles.h)]
    table = build(tiles, store)
    assert len(table) == 2 * len(tiles) and (table.n_valid == table.w * table.h).all()
    small = table[table.w == 48].iloc[0]
    assert stored_mask(store, small.image_id, small.method_fp).shape == (32, 48)


def test_tiles_without_a_network_are_named(some, store):
    with pytest.raises(Problem, match='elsewhere'): build(some.assign(dataset='elsewhere'), store)


# ---------------------------------------------------------------- the rules

def valid_table(scenes=3): return numbers(1, scenes, 2, 2).assign(confusion=[[90, 10, 0, 0]] * scenes * 4)


def broken_tables(): # -> (name of the rule, first row that breaks it, table)
    t = valid_table()
    def put(column, value, row=3):
        out = t.copy()
        out[column] = out[column].astype(object)
        out.at[row, column] = value
        return out.infer_objects()
    fourth = 'i0-0-1 / m1'
    yield 'OA outside', fourth, put('oa', 1.2)
    yield 'OA outside', fourth, put('oa', -0.1)
    yield 'OA outside', fourth, put('oa', np.nan)
    yield 'percent', 'i0-0-0 / m0', t.assign(oa=t.oa * 100)
    yield 'second row', 'i0-0-0 / m0', pd.concat([t, t[:1]])
    yield 'no labelled pixel', fourth, put('n_valid', 0)
    yield 'empty image_id', 'nan / m1', put('image_id', None)
    yield 'empty image_id', fourth, put('scene', np.nan)
    yield 'empty image_id', 'i0-0-1 / ', put('method', '')
    yield 'more than one split', 'i0-0-0 / m0', put('split', 'test')
    yield 'not n_valid pixels', fourth, put('confusion', [90, 10, 1, 0])


BROKEN = list(broken_tables())


@pytest.mark.parametrize('rule, first, table', BROKEN, ids=[f'{i}-{row[0]}' for i, row in enumerate(BROKEN)])
def test_broken_rules_are_named_with_the_first_row(rule, first, table):
    with pytest.raises(SchemaError) as e: check_sqed(table)
    fault, = [part for part in str(e.value).split(';') if rule in part]
    assert f', first {first}' in fault


@pytest.mark.parametrize('column', ['oa', 'scene', 'method_fp', 'n_valid', 'split', 'fold'])
def test_absent_columns_are_named(column):
    with pytest.raises(SchemaError, match=f'(?i)no column {column}'):
        check_sqed(valid_table().drop(columns=column))


def test_all_faults_come_in_one_message():
    t = valid_table(scenes=4)
    t.loc[0, 'oa'] = 87.0
    t.loc[2, 'n_valid'] = 0
    t.loc[4, 'scene'] = None
    t.loc[7, 'split'] = 'test'
    t.at[9, 'confusion'] = [1, 1, 1, 1]
    with pytest.raises(SchemaError) as e: check_sqed(pd.concat([t, t[12:13]]))
    expected = [
        '1 rows with OA outside 0..1 (percent?)', '2 rows with a confusion', '1 rows with no labelled pixel',
        '1 rows with an empty', 'rows with a scene in more than one split', '1 rows with a second row',
        'first i0-0-0 / m0', 'i0-1-0 / m0',
    ]
    assert [rule for rule in expected if rule not in str(e.value)] == []
    with pytest.raises(SchemaError, match='(?i)no column oa; no column n_valid'):
        check_sqed(t.drop(columns=['oa', 'n_valid']))


def test_scenes_of_two_datasets_may_share_a_name():
    t = numbers(2, 2, 1, 1)
    t.loc[t.dataset == 'd1', 'split'] = 'test'
    assert set(t.scene[t.dataset == 'd0']) == set(t.scene[t.dataset == 'd1'])
    assert check_sqed(t) is t


def test_a_valid_table_is_returned_as_it_is():
    t = numbers()
    assert check_sqed(t) is t and check_sqed(t[:0]).empty


# ---------------------------------------------------------------- files

def test_round_trip(whole, tmp_path):
    path = save_sqed(whole.table, tmp_path/'deep'/'t.parquet')
    back = load_sqed(path)
    assert same(back, whole, tmp_path) and (back.dtypes == whole.table.dtypes).all()
    assert str(trained_setup().home).encode() not in path.read_bytes()
    assert list(load_sqed(path, ['image_id', 'oa'])) == ['image_id', 'oa']


def test_a_bad_table_is_not_saved(tmp_path):
    with pytest.raises(SchemaError): save_sqed(numbers().assign(oa=2.0), tmp_path/'t.parquet')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('data', [b'', b'PAR1', b'<html>'])
def test_unreadable_files_are_named(data, tmp_path):
    (tmp_path/'t.parquet').write_bytes(data)
    with pytest.raises(SchemaError, match='t.parquet'): load_sqed(tmp_path/'t.parquet')


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataNotFound, match='t.parquet'): load_sqed(tmp_path/'t.parquet')


def test_unknown_column_is_named(whole, tmp_path):
    path = save_sqed(whole.table, tmp_path/'t.parquet')
    with pytest.raises(SchemaError, match='nope'): load_sqed(path, ['nope'])


def test_tables_of_features_carry_method_and_fingerprint():
    assert features_table('unet', 'abcdef0123') == 'intermediate/unet@abcdef01'
