"""The table: the same to the byte however often its building was killed, and checked before anyone trusts it."""
import os, pickle, signal, subprocess, sys, time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rssqa.tables import sqed as module
from rssqa.segment.confidence import AGREEMENT
from rssqa.core import DataNotFound, LeakError, MissingFeatures, Problem, SchemaError
from rssqa.data.datasets import read_image, read_mask
from rssqa.segment.methods.training import load_segmenter
from rssqa.segment.metrics import confusion
from rssqa.tables.sqed import (
    NON_FEATURE_COLUMNS,
    build_sqed,
    check_sqed,
    from_png,
    describe_prediction,
    label_free_columns,
    load_sqed,
    save_sqed,
    stored_mask,
    stored_features,
    features_table,
)
from rssqa.tables.store import Store
from trained import numbers, trained_setup


def build(tiles, store, networks=None, **options):
    w = trained_setup()
    return build_sqed(
        tiles,
        w.networks if networks is None else networks,
        w.specs,
        store,
        **dict(batch=4, every=6, workers=1) | options,
    )


@pytest.fixture
def store(tmp_path): return Store(tmp_path/'store')


@pytest.fixture(scope='module')
def some():
    return (t := trained_setup().tiles)[t.scene.isin(sorted(t.scene.unique())[:4])].reset_index(drop=True)


@pytest.fixture(scope='module')
def whole(some, tmp_path_factory):
    home = tmp_path_factory.mktemp('whole')
    return SimpleNamespace(
        table=(t := build(some, Store(home / 's'))), bytes=save_sqed(t, home / 't.parquet').read_bytes()
    )


def same(table, whole, tmp_path):
    return save_sqed(table, tmp_path/'again.parquet').read_bytes() == whole.bytes


# ---------------------------------------------------------------- kill it

@pytest.mark.parametrize('after', range(0, 9, 2))
def test_killed_between_results(after, some, whole, store, tmp_path, monkeypatch):
    run, calls = module._run, []
    def mortal(job):
        if len(calls) == after: raise KeyboardInterrupt
        calls.append(job)
        return run(job)
    monkeypatch.setattr(module, '_run', mortal)
    if after < 8:                                       # 16 tiles, 2 methods, 4 a batch: 8 jobs
        with pytest.raises(KeyboardInterrupt): build(some, store)
    monkeypatch.setattr(module, '_run', lambda job: calls.append(job) or run(job))
    assert same(build(some, store), whole, tmp_path)
    assert len(calls) == 8                             # nothing was done twice


@pytest.mark.parametrize('table', ['masks', 'intermediate', 'rows', 'agreement'])
@pytest.mark.parametrize('nth', [0, 1])
def test_killed_in_the_middle_of_a_commit(table, nth, some, whole, store, tmp_path, monkeypatch):
    put, seen = Store.put, []
    def mortal(self, name, frame):
        if name.startswith(table):
            seen.append(name)
            if len(seen) == nth + 1: raise KeyboardInterrupt
        return put(self, name, frame)
    monkeypatch.setattr(Store, 'put', mortal)
    monkeypatch.setattr(
        module,
        '_agree_missing',
        lambda rows, store, chunk=4, agree=module._agree_missing: agree(rows, store, chunk),
    )
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
    with open(tmp_path/'job', 'wb') as f: pickle.dump((some, store.root), f)
    process = subprocess.Popen(
        [sys.executable, '-c', KILLED, str(trained_setup().home), str(tmp_path / 'job')],
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
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


# ---------------------------------------------------------------- what a row says

def test_labels_are_those_of_the_segmenter(some, whole):
    w = trained_setup()
    nets = {n.fingerprint: load_segmenter(n.folder) for n in w.networks.itertuples()}
    for row in whole.table.sample(6, random_state=0).itertuples():
        tile = some[some.image_id == row.image_id].iloc[0]
        mask = nets[row.method_fp](__import__('torch').as_tensor(read_image(tile))[None]).mask[0].numpy()
        truth = read_mask(tile, w.spec)
        valid = truth != 255
        assert abs(row.oa - (mask == truth)[valid].mean()) < 2e-3 and row.n_valid == valid.sum()
        assert (
            abs(
                np.asarray(row.confusion).reshape(len(w.spec.classes), -1)
                - confusion(truth, mask, len(w.spec.classes))
            ).sum()
            <= 16
        )
        net = w.networks[w.networks.fingerprint == row.method_fp].iloc[0]
        assert row.scene not in net.scenes and row.method == net.method and row.fold == tile.fold


def test_table_has_one_row_a_pair_and_no_label_among_the_label_free_columns(some, whole):
    t = whole.table
    free = label_free_columns(whole.table)
    assert (
        len(t) == 2 * len(some)
        and not t.duplicated(['image_id', 'method']).any()
        and t.equals(t.sort_values(['image_id', 'method'], ignore_index=True))
    )
    assert {'conf', 'conf_t', 'entropy', 'margin', 'tta', 'dec_shift', *AGREEMENT} <= set(free) and not set(
        free
    ) & set(NON_FEATURE_COLUMNS)
    assert np.isfinite(t[free]).all().all() and 'root' not in t


def test_without_labels_the_label_free_columns_stay_the_same(some, whole, store):
    w = trained_setup()
    net = load_segmenter(trained_setup().networks.folder[0])
    part = some[some.fold == trained_setup().networks.fold[0]][:2]
    images = np.stack([read_image(r) for r in part.itertuples()])
    truths = [read_mask(r, w.spec) for r in part.itertuples()]
    (a, masks, intermediate, _), (b, same_masks, same_taps, _) = (
        describe_prediction(net, images, truths),
        describe_prediction(net, images),
    )
    free = label_free_columns(a)
    assert (
        a[free].equals(b[free])
        and np.array_equal(masks, same_masks)
        and np.array_equal(intermediate, same_taps)
    )
    assert b.n_valid.eq(0).all() and b.oa.isna().all() and a.oa.notna().all()
    mixed = describe_prediction(net, images, [truths[0], None])[0]
    assert mixed.n_valid.tolist() == [truths[0].size, 0] and mixed.oa[0] == a.oa[0]
    assert 'tta' not in describe_prediction(net, images, truths, tta=False)[0]


def test_a_network_that_saw_the_scene_is_refused(some, store):
    w = trained_setup()
    leaky = w.networks.assign(fold=1 - w.networks.fold)
    with pytest.raises(LeakError, match='trained on .* of the scenes'): build(some, store, leaky)
    with pytest.raises(LeakError): build(some, store, w.networks[:1].assign(fold=-1))
    assert store.names() == []                          # before anything was computed


def test_rows_of_another_network_are_not_mixed_in(some, whole, store):
    build(some, store)
    one = build(some, store, trained_setup().networks[trained_setup().networks.method == 'pspnet'])
    assert set(one.method) == {'pspnet'} and len(one) == len(some)
    assert (
        one[[c for c in AGREEMENT]].isna().all().all()
        and (one.oa.to_numpy() == whole.table[whole.table.method == 'pspnet'].oa.to_numpy()).all()
    )


def test_agreement_is_computed_again_when_a_method_joins(some, whole, store, tmp_path):
    networks = trained_setup().networks
    alone = build(some, store, networks[networks.method == 'pspnet'])
    assert alone.agree_mean.isna().all()
    both = build(some, store)
    assert both.agree_mean.notna().all() and same(both, whole, tmp_path)
    row = both.iloc[0]
    maps = [stored_mask(store, row.image_id, fp) for fp in both[both.image_id == row.image_id].method_fp]
    assert row.agree_mean == pytest.approx((maps[0] == maps[1]).mean())


def test_taps_come_in_the_order_of_the_table(some, store):
    table = build(some, store)
    intermediate = stored_features(store, table)
    assert {m: len(v) for m, v in intermediate.items()} == {'pspnet': len(some), 'segformer': len(some)}
    mixed = table.sample(frac=1, random_state=3)
    for method, found in stored_features(store, mixed).items():
        ids = table[table.method == method].image_id.tolist()
        order = mixed[mixed.method == method].image_id
        assert np.array_equal(found, intermediate[method][[ids.index(i) for i in order]])
    twice = stored_features(store, pd.concat([table, table]))                     # the index repeats
    assert all(np.array_equal(twice[m], np.concatenate([v, v])) for m, v in intermediate.items())


def test_what_was_never_drawn_is_named(some, store):
    build(some[:4], store)
    with pytest.raises(MissingFeatures): stored_mask(store, 'no-image', 'f')


# ---------------------------------------------------------------- awkward images

@pytest.mark.parametrize('absent', [None, np.nan])
def test_unlabelled_images_are_left_out_and_counted(absent, some, store, monkeypatch):
    said = []
    tiles = some.copy()
    tiles['mask_path'] = tiles.mask_path.astype(object)
    tiles.loc[tiles.index[:3], 'mask_path'] = absent
    monkeypatch.setattr(module, 'say', said.append)
    table = build(tiles, store)
    assert set(table.image_id) == set(some.image_id[3:]) and said and '3 images' in said[0]
    assert len(store.keys('masks')) == 32               # their maps are drawn all the same


def test_only_unlabelled_images(some, store):
    with pytest.raises(Problem, match='label'): build(some[:4].assign(mask_path=None), store)


def test_tile_with_all_pixels_ignored_is_left_out(some, store, tmp_path):
    tiles = some.copy()
    empty = Image.fromarray(np.full((64, 64), 255, np.uint8))
    empty.putpalette(list(range(256)) * 3)
    empty.save(tmp_path/'empty.png')
    # an absolute path wins over root
    tiles.loc[tiles.index[0], 'mask_path'] = str(tmp_path / 'empty.png')
    assert set(build(tiles, store).image_id) == set(some.image_id[1:])


def test_images_of_mixed_size(some, store):
    tiles = some.copy()
    tiles.loc[tiles.index[::2], ['w', 'h']] = [48, 32]
    tiles['image_id'] += [f':0_0_{w}_{h}' for w, h in zip(tiles.w, tiles.h)]
    table = build(tiles, store)
    assert len(table) == 2 * len(tiles) and (table.n_valid == table.w * table.h).all()
    small = table[table.w == 48].iloc[0]
    assert stored_mask(store, small.image_id, small.method_fp).shape == (32, 48)


def test_tiles_that_no_network_may_judge(some, store):
    with pytest.raises(Problem, match='elsewhere'): build(some.assign(dataset='elsewhere'), store)


# ---------------------------------------------------------------- the rules

def damaged(): # -> (name of the rule, table)
    t = numbers(1, 3, 2, 2).assign(confusion=[[90, 10, 0, 0]] * 12)
    def put(column, value, row=3):
        out = t.copy()
        out[column] = out[column].astype(object)
        out.at[row, column] = value
        return out.infer_objects()
    yield 'OA outside', put('oa', 1.2)
    yield 'OA outside', put('oa', -0.1)
    yield 'OA outside', put('oa', np.nan)
    yield 'percent', t.assign(oa=t.oa * 100)
    yield 'second row', pd.concat([t, t[:1]])
    yield 'no labelled pixel', put('n_valid', 0)
    yield 'empty image_id', put('image_id', None)
    yield 'empty image_id', put('scene', np.nan)
    yield 'empty image_id', put('method', '')
    yield 'more than one split', put('split', 'test')
    yield 'not n_valid pixels', put('confusion', [90, 10, 1, 0])
    for c in ('oa', 'scene', 'method_fp', 'n_valid', 'split', 'fold'):
        yield f'no column {c}', t.drop(columns=c)


@pytest.mark.parametrize('rule, table', damaged(), ids=[f'{i}-{r}' for i, (r, _) in enumerate(damaged())])
def test_broken_rules_are_named_with_the_first_row(rule, table):
    with pytest.raises(SchemaError, match=f'(?i){rule}') as e: check_sqed(table)
    assert 'no column' in rule or '/ m' in str(e.value) or 'first' in str(e.value)


def test_all_faults_come_in_one_message():
    t = numbers(1, 4, 2, 2).assign(confusion=[[90, 10, 0, 0]] * 16)
    t.loc[0, 'oa'] = 87.0
    t.loc[2, 'n_valid'] = 0
    t.loc[4, 'scene'] = None
    t.loc[7, 'split'] = 'test'
    t.at[9, 'confusion'] = [1, 1, 1, 1]
    with pytest.raises(SchemaError) as e: check_sqed(pd.concat([t, t[12:13]]))
    for rule in ('1 rows with OA outside 0..1 (percent?)', '2 rows with a confusion', '1 rows with no labelled pixel', '1 rows with an empty', 'rows with a scene in more than one split',
                 '1 rows with a second row', 'first i0-0-0 / m0', 'i0-1-0 / m0'): assert rule in str(e.value)
    with pytest.raises(SchemaError, match='(?i)no column oa; no column n_valid'):
        check_sqed(t.drop(columns=['oa', 'n_valid']))


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


@pytest.mark.parametrize('data', [b'', b'PAR1', b'<html>', None])
def test_unreadable_files_are_named(data, tmp_path):
    path = tmp_path/'t.parquet'
    if data is not None: path.write_bytes(data)
    with pytest.raises(SchemaError if data is not None else DataNotFound, match='t.parquet'): load_sqed(path)


def test_unknown_column_is_named(whole, tmp_path):
    with pytest.raises(SchemaError, match='nope'):
        load_sqed(save_sqed(whole.table, tmp_path/'t.parquet'), ['nope'])


def test_maps_survive_as_png():
    for shape in ((1, 1), (5, 9), (64, 64)):
        mask = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        assert np.array_equal(from_png(module._png(mask)), mask)
    assert features_table('unet', 'abcdef0123') == 'intermediate/unet@abcdef01'
