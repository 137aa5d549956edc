"""Tables on disk that are complete or absent, found by key, and never computed twice."""
import shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings, strategies as st

from hostile import flip_bit
from rssqa.core import Incompatible, MissingFeatures, Problem, SchemaError, UnknownName
from rssqa.tables.store import (
    Store, chunks, extract, feature_table, get_vectors, index_vectors, missing_tiles, nearest, put_vectors
)
from trained import trained_setup


@pytest.fixture
def store(tmp_path): return Store(tmp_path/'store')


def frame(keys, **columns): return pd.DataFrame(dict(key=list(keys)) | columns)
def content(store, name='t'): return store.get(name).set_index('key').sort_index()
def values(store): return content(store).get('v', pd.Series(dtype=int)).to_dict()


def test_absent_table_is_empty(store):
    assert store.get('t').empty and list(store.get('t')) == ['key']
    assert len(store.keys('t')) == 0
    assert store.missing('t', ['a', 'b']) == ['a', 'b']
    assert store.names() == [] and 'empty' in repr(store)
    assert store.tidy('t') is None


def test_putting_twice_changes_nothing(store):
    rows = frame('abc', v=[1, 2, 3])
    store.put('t', rows)
    first = content(store)
    store.put('t', rows)
    store.put('t', rows[1:2])
    assert content(store).equals(first) and len(store.get('t')) == 3


def test_equal_keys_are_replaced_and_others_kept(store):
    store.put('t', frame('abc', v=[1, 2, 3]))
    store.put('t', frame('cd', v=[30, 40]))
    assert values(store) == dict(a=1, b=2, c=30, d=40)


DICTIONARIES = st.dictionaries(st.sampled_from('abcdef'), st.integers(0, 99), min_size=1)


@settings(max_examples=8, deadline=None)
@given(st.lists(DICTIONARIES, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_store_behaves_like_a_dictionary(tmp_path_factory, puts, random):
    store = Store(tmp_path_factory.mktemp('s'))
    model = {}
    for rows in puts:
        store.put('t', frame(rows, v=list(rows.values())))
        model |= rows
        if random.random() < 0.4: store.tidy('t')
        assert content(store).v.to_dict() == model and sorted(store.keys('t')) == sorted(model)


def test_a_frame_with_a_repeated_key_is_refused(store):
    for present in [{}, dict(a=1)]:                          # a new table, and one that is there
        store.put('t', frame(present, v=list(present.values())))
        with pytest.raises(SchemaError, match='a key twice'): store.put('t', frame('aab', v=[1, 2, 3]))
        assert values(store) == present


def test_empty_frame_leaves_no_table(store):
    store.put('t', frame([]))
    assert store.names() == []


def interrupted_reader(rows): # a pyarrow table -> a reader that breaks off after its first row
    def batches():
        yield from rows[:1].to_batches()
        raise KeyboardInterrupt
    return pa.RecordBatchReader.from_batches(rows.schema, batches())


@pytest.mark.parametrize('present', [{}, dict(a=1, b=2)], ids=['new table', 'old table'])
def test_interrupted_put_leaves_the_old_version(present, store, monkeypatch):
    "Lance gets a stream that breaks off, both when a table is created and when rows are merged."
    import lance
    from lance.dataset import MergeInsertBuilder
    store.put('t', frame(present, v=list(present.values())))
    write, merge = lance.write_dataset, MergeInsertBuilder.execute
    calls = []
    def broken_write(rows, *args, **options):
        calls.append('write')
        return write(interrupted_reader(rows), *args, **options)
    def broken_merge(self, rows):
        calls.append('merge')
        return merge(self, interrupted_reader(rows))
    with monkeypatch.context() as patch:
        patch.setattr(lance, 'write_dataset', broken_write)
        patch.setattr(MergeInsertBuilder, 'execute', broken_merge)
        with pytest.raises(BaseException): store.put('t', frame('bc', v=[20, 30]))
    assert calls == ['merge' if present else 'write']
    assert values(store) == present
    store.put('t', frame('bc', v=[20, 30]))
    assert values(store) == present | dict(b=20, c=30)


def test_keys_follow_another_writer(store):
    store.put('t', frame('a', v=[1]))
    assert list(store.keys('t')) == ['a']
    Store(store.root).put('t', frame('b', v=[2]))
    assert set(store.keys('t')) == {'a', 'b'}
    assert store.take('t', ['b'])['v'].to_pylist() == [2]


def test_take_keeps_the_order_asked_for(store):
    store.put('t', frame('abcdef', v=range(6)))
    for keys in ('fa', 'cab', 'aa', 'fedcba'):
        assert store.take('t', list(keys), ['v'])['v'].to_pylist() == ['abcdef'.index(k) for k in keys]


def test_unknown_keys_are_counted_and_named(store):
    store.put('t', frame('ab', v=[1, 2]))
    with pytest.raises(MissingFeatures, match='t has no rows for 2 of 3 keys.*nope.*xtract') as e:
        store.take('t', ['a', 'nope', 'nor'])
    assert isinstance(e.value, KeyError)
    with pytest.raises(MissingFeatures, match='absent'): store.take('absent', ['a'])


def test_tidy_keeps_rows_and_lowers_the_number_of_files(store, tmp_path):
    for i in range(6): store.put('t', frame([f'k{i}'], v=[i]))
    before = content(store)
    folder = tmp_path/'store'/'t.lance'/'data'
    files = len(list(folder.iterdir()))
    store.tidy('t')
    assert content(store).equals(before) and len(list(folder.iterdir())) < files
    assert store.take('t', ['k3'], ['v'])['v'].to_pylist() == [3]


def test_names_reach_into_folders(store):
    names = ['rows', 'sem/a@1', 'taps/x@2']
    for name in names: store.put(name, frame('a', v=[1]))
    assert store.names() == names and 'sem/a@1 (1)' in repr(store)


WRITER = '''
import sys, pandas as pd
from rssqa.tables.store import Store
for i in range(6): Store(sys.argv[1]).put('t', pd.DataFrame(dict(key=[f'{sys.argv[2]}{i}', 'both'], v=[i, i])))
'''


def test_two_processes_lose_no_row(tmp_path):
    command = [sys.executable, '-c', WRITER, str(tmp_path/'s')]
    writers = [subprocess.Popen([*command, who], stderr=subprocess.PIPE, text=True) for who in 'xy']
    assert [w.communicate(timeout=60)[1] for w in writers if w.wait()] == []
    expected = [f'x{i}' for i in range(6)] + [f'y{i}' for i in range(6)] + ['both']
    assert sorted(Store(tmp_path/'s').get('t').key) == sorted(expected)


# ---------------------------------------------------------------- vectors

def test_vectors_come_back_in_order_as_float16_allows(store):
    x = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) * 10
    put_vectors(store, 'v', range(50), x)
    at = np.random.default_rng(1).permutation(50)[:20]
    found = get_vectors(store, 'v', [str(i) for i in at])
    assert found.dtype == np.float32 and found.shape == (20, 7)
    assert np.array_equal(found, x[at].astype(np.float16).astype(np.float32))


def test_huge_vectors_stay_finite(store):
    put_vectors(store, 'v', 'ab', np.array([[1e6, -1e6], [65000, 1]], np.float32))
    found = get_vectors(store, 'v', ['a', 'b'])
    assert np.isfinite(found).all() and found[0, 0] == -found[0, 1] > 6e4 and found[1, 1] == 1


class CountingEncoder:
    "An encoder that counts its images: mean and maximum of all values, and the width."
    name = 'toy / 1'
    dim = 3
    fingerprint = 'f' * 16
    def __init__(self): self.encoded = 0
    def encode_image(self, x):
        self.encoded += len(x)
        width = torch.full((len(x),), float(x.shape[-1]))
        return SimpleNamespace(pooled=torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3)), width], 1))


def test_extract_encodes_each_image_once(store):
    tiles = trained_setup().tiles
    encoder = CountingEncoder()
    name = extract(pd.concat([tiles[:5], tiles[:3]]), encoder, store, batch=2, chunk=3)
    assert encoder.encoded == 5 and name == feature_table(encoder) == 'sem/toy___1@ffffffff'
    extract(tiles[:8], encoder, store)
    assert encoder.encoded == 8
    extract(tiles[:8], encoder, store)
    assert encoder.encoded == 8 and len(store.keys(name)) == 8


def test_killed_extraction_goes_on(store):
    tiles = trained_setup().tiles[:10]
    class Interrupted(CountingEncoder):
        def encode_image(self, x):
            if self.encoded >= 6: raise KeyboardInterrupt
            return super().encode_image(x)
    encoder = CountingEncoder()
    table = feature_table(encoder)
    with pytest.raises(KeyboardInterrupt): extract(tiles, Interrupted(), store, batch=2, chunk=4)
    kept = len(store.keys(table))
    extract(tiles, encoder, store, batch=2, chunk=4)
    assert kept == 4 and encoder.encoded == 6
    uninterrupted = CountingEncoder()
    other = Store(store.root + '2')
    extract(tiles, uninterrupted, other, batch=3)
    assert uninterrupted.encoded == 10
    assert np.array_equal(
        get_vectors(store, table, tiles.image_id), get_vectors(other, table, tiles.image_id)
    )


def test_another_fingerprint_is_another_table(store):
    encoder = CountingEncoder()
    other = CountingEncoder()
    other.fingerprint = 'e' * 16
    tiles = trained_setup().tiles[:2]
    assert extract(tiles, encoder, store) != extract(tiles, other, store) and other.encoded == 2
    with pytest.raises(MissingFeatures): get_vectors(store, 'sem/toy___1@00000000', tiles.image_id)


def test_images_of_different_size_share_a_table(store):
    tiles = trained_setup().tiles[:4].copy()
    tiles.loc[tiles.index[:2], ['w', 'h']] = 32
    tiles['image_id'] = [f'i{n}' for n in range(4)]
    name = extract(tiles, CountingEncoder(), store)
    assert get_vectors(store, name, tiles.image_id)[:, 2].tolist() == [32, 32, 64, 64]


def test_nothing_to_extract(store):
    encoder = CountingEncoder()
    extract(trained_setup().tiles[:0], encoder, store)
    assert encoder.encoded == 0


def test_missing_tiles_are_sorted_and_those_without_a_row(store):
    tiles = pd.DataFrame(dict(image_id=list('dbca')))
    assert list(missing_tiles(tiles, store, 't').image_id) == list('abcd')
    store.put('t', frame('bd'))
    assert list(missing_tiles(tiles, store, 't').image_id) == ['a', 'c']


def test_chunks_hold_all_rows_in_order():
    table = pd.DataFrame(dict(v=range(7)), index=range(7, 0, -1))          # an index that is not the position
    for rows in (table, table.v, np.arange(7), list(range(7))):
        assert [len(part) for part in chunks(rows, 3)] == [3, 3, 1]
    assert pd.concat(chunks(table, 2)).equals(table) and chunks(table[:0], 3) == []


# ---------------------------------------------------------------- nearest

def clusters(n=1200, d=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, d))[np.arange(n) % 12] * 3
    return (centres + rng.normal(size=(n, d))).astype(np.float16).astype(np.float32)


def distances(x, query, metric):
    if metric == 'l2': return ((x - query)**2).sum(1)
    return 1 - x @ query / np.linalg.norm(x, axis=1) / np.linalg.norm(query)


@pytest.mark.parametrize('metric, tolerance', [('cosine', 1e-3), ('l2', 2e-2)])
def test_nearest_is_what_numpy_finds(metric, tolerance, store):
    x = clusters(400)
    put_vectors(store, 'v', range(400), x)
    for i in (0, 17, 399):
        found = nearest(store, 'v', x[i], 9, metric)
        expected = distances(x, x[i], metric)
        assert list(found.key) == [str(j) for j in np.argsort(expected, kind='stable')[:9]]
        assert np.allclose(found.distance, np.sort(expected)[:9], atol=tolerance)
    assert len(nearest(store, 'v', x[0], 10_000)) == 400


def test_an_index_finds_nearly_the_same_and_all_that_came_later(store):
    x = clusters()
    put_vectors(store, 'v', range(len(x)), x)
    assert not index_vectors(store, 'v') and index_vectors(store, 'v', min_rows=1000)
    recall = []
    for query in x[:40]:
        exact = set(nearest(store, 'v', query, 10, exact=True).key)
        recall.append(len(set(nearest(store, 'v', query, 10).key) & exact) / 10)
    assert np.mean(recall) > .95
    new = np.full((1, 8), 50, np.float32)
    put_vectors(store, 'v', ['late'], new)
    assert nearest(Store(store.root), 'v', new[0], 1, 'cosine').key[0] == 'late'


def test_nearest_sees_rows_of_another_process(store):
    put_vectors(store, 'v', 'ab', np.eye(2, dtype=np.float32))
    assert list(nearest(store, 'v', [1, 0], 1).key) == ['a']
    code = (
        'import numpy as np; from rssqa.tables.store import *; '
        f"put_vectors(Store({store.root!r}), 'v', ['c'], np.array([[3, .1]], np.float32))"
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)
    assert set(nearest(store, 'v', [1, .05], 2).key) == {'a', 'c'}


def test_impossible_queries_say_why(store):
    put_vectors(store, 'v', 'ab', np.eye(2, dtype=np.float32))
    with pytest.raises(MissingFeatures, match='no table w.*The store has v'): nearest(store, 'w', [1, 0])
    with pytest.raises(Incompatible, match='3 numbers.*expected 2'): nearest(store, 'v', [1, 0, 0])
    with pytest.raises(Incompatible, match='1 of them finite'): nearest(store, 'v', [1, np.nan])
    with pytest.raises(UnknownName, match='Did you mean cosine'): nearest(store, 'v', [1, 0], metric='cosin')


# ---- names and damage

BAD_NAMES = [
    '', '.', '..', '../x', 'a/../../x', '/etc/x', 'a//b', 'a/', './a', '..\\x', 'a\0b', 'a\nb', 's3://x/y', None, 3,
]


@pytest.mark.parametrize('name', BAD_NAMES)
def test_names_that_lead_out_of_the_store_are_refused(store, tmp_path, name):
    for use in (lambda: store.put(name, frame('a')), lambda: store.get(name), lambda: store.keys(name),
                lambda: store.take(name, ['a']), lambda: store.tidy(name), lambda: store.missing(name, ['a'])):
        with pytest.raises(Incompatible, match='leads out') as caught: use()
        assert caught.value.todo
    assert not list(tmp_path.rglob('*.lance'))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet='a./\\~: ', max_size=8))
def test_whatever_the_name_nothing_is_written_outside(tmp_path_factory, name):
    home = tmp_path_factory.mktemp('h')
    store = Store(home/'in/store')
    try: store.put(name, frame('a'))
    except Incompatible: return
    assert values(store) == {} or name == 't'
    assert all(path.is_relative_to(home/'in/store') for path in home.rglob('*.lance'))


def test_a_store_without_folder_is_refused():
    with pytest.raises(Incompatible, match='without folder'): Store('').get('t')


def versions_of(store): return sorted(Path(store.root, 't.lance/_versions').glob('*.manifest')) # newest first
def tear(path): path.write_bytes(path.read_bytes()[:20])
def empty(path): path.write_bytes(b'')
def invert(path): path.write_bytes(bytes(255 - b for b in path.read_bytes()))


DAMAGES = dict(
    torn=lambda store: tear(versions_of(store)[0]),
    emptied=lambda store: empty(versions_of(store)[0]),
    inverted=lambda store: invert(versions_of(store)[0]),
    newest_gone=lambda store: versions_of(store)[0].unlink(),
    all_gone=lambda store: [path.unlink() for path in versions_of(store)],
    versions_gone=lambda store: shutil.rmtree(Path(store.root, 't.lance/_versions')),
    data_gone=lambda store: next(Path(store.root, 't.lance/data').iterdir()).unlink(),
    data_inverted=lambda store: [invert(path) for path in Path(store.root, 't.lance/data').iterdir()],
)


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_table_is_an_error_and_never_empty(store, damage):
    for i, key in enumerate('abc'): store.put('t', frame(key, v=[i]))
    DAMAGES[damage](store)
    files = sorted(path for path in Path(store.root).rglob('*') if path.is_file())
    for use in (lambda: store.get('t'), lambda: store.keys('t'), lambda: store.missing('t', ['a']),
                lambda: store.take('t', ['a', 'b', 'c'])):
        with pytest.raises(SchemaError, match='t.lance is damaged') as caught: use()
        assert caught.value.found and 'go back' in caught.value.todo
    assert 'damaged' in repr(store)
    if not damage.startswith('data'):
        with pytest.raises(SchemaError): store.put('t', frame('d', v=[9]))
    assert set(files) <= {path for path in Path(store.root).rglob('*') if path.is_file()}


@pytest.mark.parametrize('damage', ['torn', 'emptied', 'inverted', 'newest_gone'])
def test_the_advice_goes_back_by_one_version(store, damage):
    for i, key in enumerate('abc'): store.put('t', frame(key, v=[i]))
    newest = versions_of(store)[0]
    DAMAGES[damage](store)
    newest.unlink(missing_ok=True)
    (newest.parent/'latest_version_hint.json').unlink()
    assert values(store) == dict(a=0, b=1)
    store.put('t', frame('c', v=[2]))
    assert values(store) == dict(a=0, b=1, c=2)


def test_a_flipped_byte_of_the_newest_manifest_never_raises_a_foreign_error(store):
    for i, key in enumerate('abc'): store.put('t', frame(key, v=[i]))
    newest = versions_of(store)[0]
    whole = newest.read_bytes()
    refused = 0
    for at in range(0, len(whole), 23):
        flip_bit(newest, at)
        try: store.get('t')
        except Problem: refused += 1
        newest.write_bytes(whole)
    assert refused and len(store.get('t')) == 3


def test_a_table_that_another_writer_makes_meanwhile_is_no_damage(store, monkeypatch):
    import lance
    opened = lance.dataset
    def make_first(uri):
        monkeypatch.setattr(lance, 'dataset', opened)
        try: return opened(uri)
        finally: Store(store.root).put('t', frame('ab', v=[1, 2]))
    monkeypatch.setattr(lance, 'dataset', make_first)
    assert values(store) == dict(a=1, b=2)


def test_a_creation_that_was_interrupted_is_no_damage(store):
    store.put('t', frame('a', v=[1]))
    shutil.rmtree(Path(store.root, 't.lance/_versions'))                   # as before the first commit
    assert store.missing('t', ['a']) == ['a']
    store.put('t', frame('b', v=[2]))
    assert values(store) == dict(b=2)


def test_an_unknown_column_is_suggested(store):
    store.put('t', frame('a', value=[1]))
    for use in (lambda: store.get('t', ['valu']), lambda: store.take('t', ['a'], ['valu'])):
        with pytest.raises(UnknownName, match='value'): use()
