"""Image-text corpora: every layout read back, every fault counted and named, shards written twice alike."""
import io, json, pickle, tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from rssqa import core
from rssqa.core import BadImage, DataNotFound, Incompatible, SchemaError, UnknownName, read_json
from rssqa.data import pairs
from rssqa.data.corpora import _plural, caption_from_mask, safe_path, text_encoding, unit_box
from rssqa.data.pairs import BadSample, PairRecord, audit, corpora, is_overlong, open_image, read_pairs
from rssqa.data.pairs import to_frame, token_count, write_shards
from rssqa.testing.fake_corpora import PAGE, fake_corpus, fake_samples
from rssqa.testing.fake_datasets import fake_dataset

KINDS = [
    'rs5m-tar', 'rs5m-tar-old', 'rs5m-csv', 'gaia', 'mgrs', 'skyscript', 'karpathy', 'nwpu', 'title-csv',
    'openclip-csv', 'rssqa-pairs', 'folder', 'translations', 'webdataset', 'masks',
]
WITH_IMAGES = [k for k in KINDS if k != 'rs5m-csv']
TARS = ['rs5m-tar', 'rs5m-tar-old', 'gaia', 'webdataset']
ANOTHER_ORDER = ['gaia', 'folder', 'nwpu', 'rs5m-csv', 'webdataset']   # than that of the samples


def n_records(kind): return 16 if kind == 'masks' else 6


def opened(kind, path, **options): return read_pairs(kind.removesuffix('-old'), path, **options)
def keys(records): return [r.key for r in records]
def bytes_of(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def captions_of(records):
    captions = []
    for record in records: captions += record.captions
    return captions


def encoded(colour=(200, 30, 30), kind='PNG', size=(12, 8)):
    buffer = io.BytesIO()
    Image.new('RGB', size, colour).save(buffer, kind)
    return buffer.getvalue()


def tar_of(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def rs5m_members(stem, image, caption=b'a field', name=None):
    members = [(f'{stem}.img_content', image), (f'{stem}.caption', caption)]
    return members + [(f'{stem}.img_name', name)] if name else members


def plain(n=5):
    records = []
    for i in range(n):
        captions = (f'sentence {i}', 'a field')
        records.append(PairRecord(f'k{i}', encoded((10 * i, 9, 9)), captions, 'demo'))
    return records


@pytest.fixture(scope='module')
def corpus_of(tmp_path_factory):
    "Synthetic corpora, each made once."
    made = {}
    def get(kind, *faults):
        if (kind, faults) not in made:
            made[kind, faults] = fake_corpus(kind, tmp_path_factory.mktemp('corpora')/kind, 6, faults=faults)
        return made[kind, faults]
    return get


# ---- every layout ----

def test_every_reader_has_a_synthetic_corpus():
    assert {k.removesuffix('-old') for k in KINDS} == set(corpora.list()) - {'lesson'}


@pytest.mark.parametrize('kind', KINDS)
def test_reader_returns_every_sample_of_its_synthetic_corpus(corpus_of, kind):
    corpus = opened(kind, corpus_of(kind))
    records = list(corpus)
    assert len(records) == n_records(kind)
    assert len(set(keys(records))) == len(records)
    assert keys(corpus) == keys(records)
    assert corpus.counts['records'] == len(records)
    assert corpus.counts['captions'] == sum(len(r.captions) for r in records)
    assert corpus.counts['bad'] == corpus.counts['blanks'] == corpus.counts['overlong'] == 0
    assert not corpus.problems
    for r in records:
        assert r.source and r.captions
        assert r.tier in ('fine', 'coarse', '')
        assert r.split in ('train', 'val', 'test', '')
    assert corpus.counts['no_image'] == (6 if kind == 'rs5m-csv' else 0)


@pytest.mark.parametrize('kind', [k for k in KINDS if k not in ('masks', *ANOTHER_ORDER)])
def test_order_text_and_pixels_are_those_of_the_samples(corpus_of, kind):
    for record, s in zip(opened(kind, corpus_of(kind)), fake_samples(6), strict=True):
        assert s['name'] in record.key
        assert record.captions[0].strip() == s['captions'][0]
        assert (open_image(record) == open_image(s['image'])).all()
        assert open_image(record).shape == (3, 48, 48)


@pytest.mark.parametrize('kind', ANOTHER_ORDER)
def test_text_belongs_to_its_image_where_the_order_is_another(corpus_of, kind):
    samples = fake_samples(6, kind='PNG' if kind == 'gaia' else 'JPEG')
    named = {str(i) if kind == 'gaia' else s['name']: s for i, s in enumerate(samples)}
    for record in opened(kind, corpus_of(kind)):
        s = named.pop(record.key.split('/')[-1].removesuffix('.jpg'))
        assert record.captions == s['captions'][:len(record.captions)]
        if kind == 'rs5m-csv': assert record.image is None
        else: assert (open_image(record) == open_image(s['image'])).all()
    assert not named


@pytest.mark.parametrize('kind', KINDS)
def test_resuming_anywhere_gives_the_tail(corpus_of, kind):
    whole = keys(opened(kind, corpus_of(kind)))
    for k in (0, 1, 3, len(whole) - 1, len(whole)):
        rest = opened(kind, corpus_of(kind), skip=k)
        assert keys(rest) == whole[k:]
        assert rest.counts['records'] == len(whole) - k
        first = opened(kind, corpus_of(kind))
        for _, _ in zip(range(k), first): pass
        assert keys(first.again(first.resume)) == whole[k:]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n', [2, 3, 7])
def test_shards_partition_the_records(corpus_of, kind, n):
    path = corpus_of(kind)
    whole = keys(opened(kind, corpus_of(kind)))
    parts = [opened(kind, path, shard=(i, n)) for i in range(n)]
    read = [keys(p) for p in parts]
    assert sorted(sum(read, [])) == sorted(whole)
    assert max(map(len, read)) - min(map(len, read)) <= 3
    assert all(keys(opened(kind, path, shard=(i, n), skip=1)) == part[1:] for i, part in enumerate(read))
    assert all([k for k in whole if k in part] == part for part in read)


@pytest.mark.parametrize('kind', ['rs5m-tar', 'webdataset'])
def test_tars_resume_by_shard_and_offset_within_a_part(corpus_of, kind):
    for i in range(2):
        whole = keys(opened(kind, corpus_of(kind), shard=(i, 2)))
        part = opened(kind, corpus_of(kind), shard=(i, 2))
        next(iter(part))
        assert set(part.resume) == {'start'}
        assert keys(part.again(part.resume)) == whole[1:]
    shards = sorted(p.name for p in Path(corpus_of(kind)).glob('*.tar'))
    second = opened(kind, corpus_of(kind), start=(shards[1], 1))
    assert len(keys(second)) == 3
    with pytest.raises(DataNotFound, match='no shard'):
        list(opened(kind, corpus_of(kind), start=('none.tar', 0)))


def test_records_carry_the_fields_of_their_corpus(corpus_of):
    first = {k: next(iter(opened(k, corpus_of(k)))) for k in KINDS}
    for kind in ('karpathy', 'nwpu'): assert first[kind].tier == 'fine'
    for kind in ('rs5m-tar', 'gaia', 'masks'): assert first[kind].tier == 'coarse'
    rs5m = first['rs5m-tar']
    assert (rs5m.source, rs5m.split, rs5m.meta['name']) == ('rs5m/pub11', 'train', 'town_1.jpg')
    assert first['karpathy'].scene == first['nwpu'].scene == 'town'
    assert (first['folder'].split, first['folder'].scene) == ('test', 'flood')
    assert first['gaia'].meta['lat'] == 10.5
    assert 'location' not in first['gaia'].meta
    assert first['gaia'].split == 'train'
    assert not first['gaia'].captions[0].startswith('The image')
    assert first['translations'].translations == {'pt': ('cena 0',)}
    assert first['title-csv'].captions[2] == '俯瞰的城镇和道路'
    (left, top, right, bottom, category, number, text), = first['mgrs'].regions
    assert (left, top, right, bottom) == (4 / 48, 8 / 48, 24 / 48, 44 / 48)
    assert (category, number, text) == ('house', 0, 'a house in the town')
    splits = Counter(r.split for r in opened('rssqa-pairs', corpus_of('rssqa-pairs')))
    assert splits == {'train': 4, 'val': 1, 'test': 1}
    assert {r.tier for r in opened('rssqa-pairs', corpus_of('rssqa-pairs'))} == {'fine', 'coarse'}


def test_rs3_names_give_their_dataset(tmp_path):
    names = ['fmow_barn_1_rgb.jpg', 'ben_12.jpg', 'millionaid_P1.jpg', 'other.jpg']
    members = []
    for i, name in enumerate(names): members += rs5m_members(f'{i}.a', encoded(), b'x', name.encode())
    tar_of(tmp_path/'rs3-val-0000.tar', members)
    records = list(read_pairs('rs5m-tar', tmp_path))
    assert [r.source for r in records] == ['rs5m/rs3/fmow', 'rs5m/rs3/ben', 'rs5m/rs3/millionaid', 'rs5m/rs3']
    assert records[0].key == 'rs3-val-0000/0.a'
    assert records[0].split == 'val'


def test_captions_without_images_come_when_asked_for(corpus_of):
    path = corpus_of('rssqa-pairs')
    all_records = list(read_pairs('rssqa-pairs', path, keep='captions'))
    captions = ('a pier of grey stone', 'grey stone, blue water')
    pier = PairRecord('rsitmd/pier_1.tif', None, captions, 'rsitmd', tier='fine', scene='pier')
    assert all_records[-1] == pier
    assert all_records[-1:] == list(read_pairs('rssqa-pairs', path / 'captions_only.csv.gz'))
    assert all_records[:-1] == list(read_pairs('rssqa-pairs', path))


# ---- faults ----

@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'masks'])
def test_blank_captions_are_counted_and_named(corpus_of, kind):
    corpus = opened(kind, corpus_of(kind, 'blank'))
    assert len(list(corpus)) == 5
    assert corpus.counts['bad'] == 1
    assert corpus.counts['blanks'] == (1 if 'rs5m' in kind else 2)
    assert set(corpus.problems.values()) == {'no caption'}
    assert all(caption.strip() for caption in captions_of(corpus))


@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'masks'])
def test_captions_of_4000_letters_are_kept_and_counted(corpus_of, kind):
    corpus = opened(kind, corpus_of(kind, 'long'))
    long = [len(caption) for caption in captions_of(corpus) if is_overlong(caption)]
    assert corpus.counts['overlong'] == len(long) in (1, 2)
    assert set(long) == {4000}
    assert corpus.counts['records'] == 6


@pytest.mark.parametrize('kind', WITH_IMAGES)
def test_a_web_page_is_no_image(corpus_of, kind):
    corpus = opened(kind, corpus_of(kind, 'html'))
    assert len(list(corpus)) == n_records(kind) - 1
    assert corpus.counts['bad'] == 1
    (name, reason), = corpus.problems.items()
    assert 'no image' in reason
    assert '<!DOCTYPE' in reason
    assert kind in ('gaia', 'masks') or 'oblique_3' in name


@pytest.mark.parametrize('kind', WITH_IMAGES)
def test_a_missing_image_is_counted_and_skipped_or_kept_as_text(corpus_of, kind):
    path = corpus_of(kind, 'missing')
    n = n_records(kind)
    corpus = opened(kind, path)
    assert len(list(corpus)) == n - 1
    assert corpus.counts['no_image'] == 1
    assert corpus.counts['bad'] == 0
    (name, reason), = corpus.problems.items()
    assert 'image' in reason
    assert kind != 'gaia' or reason == 'image missing: images1.example.org' and name == '3'
    kept = [r for r in opened(kind, path, keep='captions') if r.image is None]
    if kind == 'rssqa-pairs': kept = [r for r in kept if r.source != 'rsitmd']  # of captions_only.csv.gz
    assert len(kept) == 1
    assert kept[0].captions


@pytest.mark.parametrize('kind', TARS)
def test_a_missing_shard_is_named(corpus_of, kind):
    corpus = opened(kind, corpus_of(kind, 'shard'))
    assert len(list(corpus)) == 4
    assert corpus.counts['bad'] == 1
    missing = [name for name, reason in corpus.problems.items() if reason == 'missing shard']
    assert [name[-8:] for name in missing] == ['0001.tar']
    assert corpus.counts['no_image'] == (2 if kind == 'gaia' else 0)
    parts = [opened(kind, corpus_of(kind, 'shard'), shard=(i, 2)) for i in range(2)]
    assert sum(len(list(p)) for p in parts) == 4
    assert sum(p.counts['bad'] for p in parts) == 1


@pytest.mark.parametrize('kind', TARS)
def test_a_truncated_tar_gives_all_before_the_cut(corpus_of, kind):
    corpus = opened(kind, corpus_of(kind, 'truncated'))
    assert len(list(corpus)) == 5
    assert corpus.counts['bad'] >= 1
    assert any('cut off' in reason for reason in corpus.problems.values())


@pytest.mark.parametrize('cut', range(0, 14 * 512, 700))
def test_a_tar_cut_anywhere_never_raises_and_never_invents(tmp_path, cut):
    members = []
    for i in range(3): members += rs5m_members(f'k{i}', encoded((i, 0, 0)))
    path = tar_of(tmp_path/'a.tar', members)
    path.write_bytes(path.read_bytes()[:cut])
    corpus = read_pairs('rs5m-tar', path)
    records = list(corpus)
    whole = min(cut // 2048, 3)     # a sample has the headers and data of two members, 512 bytes each
    assert len(records) == whole
    assert [r.image for r in records] == [encoded((i, 0, 0)) for i in range(whole)]
    assert bool(corpus.problems) == (cut < 13 * 512)     # 12 blocks and the mark of the end


def test_a_damaged_header_ends_its_shard_but_not_the_stream(tmp_path):
    members = []
    for i in range(3): members += rs5m_members(i, encoded())
    for n in range(2): tar_of(tmp_path/f'a-{n}.tar', members)
    data = bytearray((tmp_path/'a-0.tar').read_bytes())
    data[2048:2148] = b'\xff' * 100
    (tmp_path/'a-0.tar').write_bytes(data)
    (tmp_path/'a-2.tar').write_bytes(PAGE * 20)
    corpus = read_pairs('rs5m-tar', tmp_path)
    assert keys(corpus) == ['a-0/0', 'a-1/0', 'a-1/1', 'a-1/2']
    assert corpus.counts['bad'] == 2
    assert 'a-2.tar' in corpus.problems


@pytest.mark.parametrize('kind', ['karpathy', 'folder', 'webdataset'])
def test_all_faults_at_once_leave_the_rest(corpus_of, kind):
    corpus = opened(kind, corpus_of(kind, 'blank', 'long', 'html', 'missing'))
    assert len(list(corpus)) == 3
    assert (corpus.counts['bad'], corpus.counts['no_image'], corpus.counts['overlong']) == (2, 1, 2)
    assert len(corpus.problems) == 3


def test_bad_members_are_passed_over(tmp_path):
    secret = tmp_path/'secret.txt'
    secret.write_text('do not read')
    with tarfile.open(tmp_path/'a.tar', 'w') as tar:
        def put(name, data=b'', **about):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for k, v in about.items(): setattr(info, k, v)
            tar.addfile(info, io.BytesIO(data))
        put('k0.img_content', encoded())
        put('k0.caption', b'a field')
        put('../../evil.img_content', encoded())
        put('../../evil.caption', b'out')
        put('/etc/evil.caption', b'out')
        put('k1.caption', type=tarfile.SYMTYPE, linkname=str(secret))
        put('k2.img_content', encoded())
        put('k2.caption', b'\xff\xfe broken')
        put('k0.img_content', encoded())
        put('k0.caption', b'again')
        put('readme.md', b'nothing')
        put('k3.img_content', encoded())
        put('k4.img_content', encoded())
        put('k4.caption', b'a wood')
    corpus = read_pairs('rs5m-tar', tmp_path/'a.tar')
    assert [r.captions[0] for r in corpus] == ['a field', 'a wood']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.tar', 'secret.txt']
    assert not (tmp_path.parent / 'evil.caption').exists()
    unsafe = {'../../evil.img_content', '../../evil.caption', '/etc/evil.caption', 'k1.caption'}
    assert set(corpus.problems) == unsafe | {'a/k2', 'a.tar/k0', 'a/k3'}
    assert corpus.counts['bad'] == 7


UNSAFE_NAMES = ['../x.png', 'a/../../x.png', '/etc/x.png', '..\\x.png', 'C:/x.png', '', ' ', 'a\0b']


@pytest.mark.parametrize('name', UNSAFE_NAMES)
def test_names_that_lead_out_are_refused(tmp_path, name):
    assert safe_path(tmp_path, name) == ''
    item = dict(filename=name, split='train', sentences=[dict(raw='a')])
    (tmp_path/'dataset_x.json').write_text(json.dumps(dict(images=[item])))
    corpus = read_pairs('karpathy', tmp_path/'dataset_x.json', images=tmp_path)
    assert list(corpus) == []
    assert corpus.counts['bad'] == 1


def test_absolute_names_are_read_only_in_openclip_tables(tmp_path):
    (tmp_path/'a.png').write_bytes(encoded())
    for kind, sep in (('openclip-csv', '\t'), ('skyscript', ',')):
        (tmp_path/kind).write_text(f'filepath{sep}title\n{tmp_path}/a.png{sep}a field\n')
    assert len(list(read_pairs('openclip-csv', tmp_path / 'openclip-csv'))) == 1
    assert len(list(read_pairs('skyscript', tmp_path / 'skyscript'))) == 0


@pytest.mark.parametrize('share', [0.3, 0.7])
def test_gaia_with_dead_links_gives_exactly_the_intersection(tmp_path, share):
    path = fake_corpus('gaia', tmp_path, 12)
    gone = np.random.default_rng(3).random(12) < share
    for tar in path.glob('*.tar'):
        with tarfile.open(tar) as t: members = [(m.name, t.extractfile(m).read()) for m in t]
        tar_of(tar, [(n, d) for n, d in members if not gone[int(n.partition('.')[0])]])
    corpus = read_pairs('gaia', path)
    assert sorted(map(int, keys(corpus))) == list(np.flatnonzero(~gone))
    assert corpus.counts['no_image'] == gone.sum()
    reasons = {str(i): f'image missing: images{i % 2}.example.org' for i in np.flatnonzero(gone)}
    assert dict(corpus.problems) == reasons
    for f in path.glob('*.tar'): f.unlink()
    texts = read_pairs('gaia', path)
    assert len(list(texts)) == 12      # sentences alone are no fault
    assert texts.counts['no_image'] == 12
    assert not texts.problems


def test_gaia_shards_alone_carry_their_captions(tmp_path):
    path = fake_corpus('gaia', tmp_path, 6)
    both = {r.key: r.captions for r in read_pairs('gaia', path)}
    for f in path.glob('*.json'): f.unlink()
    assert {r.key: r.captions for r in read_pairs('gaia', path)} == both


def test_repeated_keys_become_distinct(tmp_path):
    (tmp_path/'a.csv').write_text('filename,title\na.png,one\na.png,One \nb.png,two\na.png,three\n')
    corpus = read_pairs('title-csv', tmp_path/'a.csv')
    assert keys(corpus) == ['a.png', 'b.png', 'a.png~2']
    assert corpus.counts['duplicates'] == 1
    assert keys(read_pairs('title-csv', tmp_path / 'a.csv', skip=2)) == ['a.png~2']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'gb18030'])
def test_chinese_text_is_never_mojibake(tmp_path, encoding):
    (tmp_path/'t_test.csv').write_bytes('filename,title\na_1.tif,"海滩, 港口和𠮷"\n'.encode(encoding))
    record, = read_pairs('title-csv', tmp_path/'t_test.csv')
    assert record.captions == ('海滩, 港口和𠮷',)
    assert record.key == 'a_1.tif'


def test_text_in_no_known_encoding_is_an_error_with_a_clear_message(tmp_path):
    (tmp_path/'t.csv').write_bytes(b'filename,title\na.tif,\xff\xff\n')
    with pytest.raises(SchemaError, match='neither UTF-8 nor GB18030'): text_encoding(tmp_path/'t.csv')


def test_rows_that_cannot_be_read_are_named(tmp_path):
    too_long = 'x' * 140_000
    (tmp_path/'t.csv').write_text(f'filepath,title\na.png,one\nb.png\nc.png,"{too_long}"\nd.png,two\n')
    corpus = read_pairs('skyscript', tmp_path/'t.csv', keep='captions')
    captions = [r.captions[0] for r in corpus]
    assert captions[0] == 'one'
    assert captions[-1] == 'two'
    assert corpus.counts['bad'] == 2


def test_missing_columns_and_wrong_json_are_errors(tmp_path):
    (tmp_path/'t.csv').write_text('image,text\na,b\n')
    (tmp_path/'t.json').write_text('"text"')
    with pytest.raises(SchemaError, match='Missing columns filename, title'):
        list(read_pairs('title-csv', tmp_path/'t.csv'))
    with pytest.raises(SchemaError, match='Expected a list'): list(read_pairs('karpathy', tmp_path/'t.json'))


def test_wrong_arguments_are_errors(tmp_path):
    with pytest.raises(UnknownName, match='Did you mean karpathy'): read_pairs('karpaty', tmp_path)
    with pytest.raises(DataNotFound): read_pairs('gaia', tmp_path/'none')
    with pytest.raises(DataNotFound, match='no tar files'): list(read_pairs('rs5m-tar', tmp_path))
    for options in (dict(shard=(2, 2)), dict(skip=-1), dict(keep='all'), dict(colour='red')):
        with pytest.raises(Incompatible): read_pairs('gaia', tmp_path, **options)


def test_the_counts_are_printed_even_if_the_reading_stops(corpus_of, monkeypatch):
    messages = []
    monkeypatch.setattr(pairs, 'say', messages.append)
    stream = iter(opened('rs5m-tar', corpus_of('rs5m-tar', 'shard')))
    next(stream)
    stream.close()
    list(opened('rs5m-tar', corpus_of('rs5m-tar')))
    assert [s.split(': ')[1].split(',')[0] for s in messages] == ['1 records', '6 records']
    assert 'missing shard' in messages[0]
    assert not any('\n' in s for s in messages)


def test_problems_stop_at_a_thousand(monkeypatch):
    def read_broken(path):
        for i in range(1500): yield BadSample(f'row {i}', 'empty')
    monkeypatch.setitem(corpora.entries, 'broken', read_broken)
    corpus = read_pairs('broken', '.')
    assert list(corpus) == []
    assert corpus.counts['bad'] == 1500
    assert len(corpus.problems) == 1000


def test_readers_stream(monkeypatch):
    taken = []
    def read_endless(path):
        for i in range(10**9):
            taken.append(i)
            yield PairRecord(str(i), None, ('a',))
    monkeypatch.setitem(corpora.entries, 'endless', read_endless)
    for record, _ in zip(read_pairs('endless', '.', shard=(1, 3)), range(4)): pass
    assert record.key == '10'
    assert len(taken) < 20


# ---- boxes, tokens, sentences from masks ----

@given(st.lists(st.floats(-20, 120), min_size=4, max_size=4), st.integers(1, 100), st.integers(1, 100))
def test_boxes_lie_inside_in_the_order_left_top_right_bottom(corners, w, h):
    box = unit_box((*corners, w, h))
    if box is None:
        has_width = np.clip(corners[0] / w, 0, 1) < np.clip(corners[2] / w, 0, 1)
        has_height = np.clip(corners[1] / h, 0, 1) < np.clip(corners[3] / h, 0, 1)
        assert not (has_width and has_height)
        return
    left, top, right, bottom = box
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1
    assert box == unit_box(dict(H=h, W=w, y2=corners[3], x2=corners[2], y1=corners[1], x1=corners[0]))


def test_regions_without_area_are_left_out_and_counted(tmp_path):
    box = dict(x1=0, y1=0, x2=5, y2=9, W=10, H=18)
    segments = [dict(bbox=box, category='ship', category_id=2), dict(bbox=dict(box, x2=0)), dict(bbox=None)]
    item = dict(global_filepath='a.png', brief_caption='a quay', segment=segments)
    (tmp_path/'a.png').write_bytes(encoded())
    (tmp_path/'text_info.json').write_text(json.dumps([item]))
    record, = read_pairs('mgrs', tmp_path)
    assert record.regions == ((0, 0, 0.5, 0.5, 'ship', 2, ''),)
    assert record.meta == {'lost_regions': 2}


@pytest.mark.parametrize('box', [None, {}, [1, 2, 3], dict(x1=0, y1=0, x2=5, y2=5, W=0, H=9), 'xyxywh'])
def test_values_that_are_no_box_give_none(box): assert unit_box(box) is None


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=120))
def test_tokens_are_those_of_open_clip(text):
    assert token_count(text) == 2 + len(pairs._tokenizer().encode(text))
    assert is_overlong(text) == (token_count(text) > 77)


UNUSUAL_TEXTS = [
    "it's the town's DON'T", 'x' * 300, 'a  b\n c', '&lt;b&gt; &amp;', '<start_of_text> x', '12,345.67 km2',
    'a' * 75, 'a ' * 75, 'a ' * 76, "''s 'S'",
]


@pytest.mark.parametrize('text', UNUSUAL_TEXTS)
def test_tokens_of_unusual_text(text):
    assert token_count(text) == 2 + len(pairs._tokenizer().encode(text))
    assert is_overlong(text) == (token_count(text) > 77)


def test_the_context_is_that_of_open_clip():
    assert pairs._tokenizer()(['a field'])[0].tolist()[:4] == [49406, 320, 1570, 49407]
    assert pairs._tokenizer()(['a field']).shape[1] == pairs.CONTEXT
    assert token_count('a field') == 4


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_caption_names_the_classes_of_its_mask_and_no_others(seed, weights):
    classes = ('road', 'forest', 'water', 'building')
    rng = np.random.default_rng(seed)
    probabilities = np.array([*weights, 0.1]) / (sum(weights) + 0.1)
    mask = rng.choice([0, 1, 2, 3, 255], (20, 20), p=probabilities).astype(np.uint8)
    caption = caption_from_mask(mask, classes, np.random.default_rng(seed))
    shares = np.bincount(mask[mask != 255], minlength=4) / max((mask != 255).sum(), 1)
    assert caption == caption_from_mask(mask, classes, np.random.default_rng(seed))
    assert [c in caption for c in classes] == [bool(s > 0.002) for s in shares] or not caption
    assert ('mostly' in caption) == (shares.max() >= 0.5)
    largest = [c for c, share in zip(classes, shares) if share == shares.max()] # two, where they are equal
    assert 'mostly' not in caption or any(f'mostly {_plural(c)}' in caption for c in largest)


def test_classes_without_meaning_are_not_named_and_others_get_common_names():
    mask = np.repeat(np.arange(4, dtype=np.uint8), 16).reshape(8, 8)
    classes = ('background', 'impervious_surfaces', 'low vegetation', 'Tree')
    captions = {caption_from_mask(mask, classes, np.random.default_rng(s)) for s in range(30)}
    assert len(captions) > 8
    for caption in captions:
        for words in ('paved ground', 'low vegetation', 'tree'): assert words in caption
        for words in ('background', '{'): assert words not in caption
    assert caption_from_mask(np.zeros((2, 2), np.uint8), ('clutter',), np.random.default_rng(0)) == ''


@pytest.mark.parametrize('name', ['loveda', 'vaihingen', 'uavid'])
def test_masks_of_registered_datasets_become_captions(tmp_path, name):
    records = list(read_pairs('masks', fake_dataset(name, tmp_path), dataset=name))
    assert records
    assert all(r.source == name and len(open_image(r)) == 3 for r in records)
    assert keys(records) == keys(read_pairs('masks', tmp_path, dataset=name, seed=5))
    captions = [r.captions for r in records]
    assert captions == [r.captions for r in read_pairs('masks', tmp_path, dataset=name)]
    assert captions != [r.captions for r in read_pairs('masks', tmp_path, dataset=name, seed=5)]


def test_masks_of_a_plain_folder_become_captions_and_bad_ones_are_named(tmp_path):
    for sub, x in (('images', np.zeros((8, 8, 3), np.uint8)), ('masks', np.ones((8, 8), np.uint8))):
        (tmp_path/sub).mkdir()
        for n in 'ab': Image.fromarray(x).save(tmp_path/sub/f'{n}.png')
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path/'masks'/'b.png')
    corpus = read_pairs('masks', tmp_path, classes=('road', 'water'))
    record, = corpus
    assert 'mostly water' in record.captions[0]
    assert 'images/b.png' in corpus.problems


# ---- shards ----

@pytest.mark.parametrize('kind', ['karpathy', 'mgrs', 'translations', 'gaia', 'rs5m-tar'])
def test_shards_give_back_what_was_written(corpus_of, tmp_path, kind):
    before = list(opened(kind, corpus_of(kind)))
    folder = write_shards(opened(kind, corpus_of(kind)), tmp_path, 4)
    after = {r.key: r for r in read_pairs('webdataset', folder)}
    assert len(after) == len(before) == 6
    for r in before:
        assert replace(after[r.key], image=None, meta={}) == replace(r, image=None, meta={})
        assert after[r.key].image == pairs.image_bytes(r.image)
        meta = {k: v for k, v in r.meta.items() if k not in ('shard', 'offset', 'path')}
        assert meta.items() <= after[r.key].meta.items()


def test_members_are_sorted_dateless_and_fit_webdataset(tmp_path):
    unusual = ['a.b/c.jpg', '../up', 'ünï 港', 'k', 'k!', 'k%2E']
    images = [encoded(kind='JPEG' if i % 2 else 'PNG') for i in range(len(unusual))]
    records = [PairRecord(key, image, ('a field',)) for key, image in zip(unusual, images)]
    folder = write_shards(records, tmp_path)
    with tarfile.open(folder/'00000.tar') as tar: members = tar.getmembers()
    names = [m.name for m in members]
    assert names == sorted(names)
    for m in members:
        assert m.mtime == 0 and m.uid == 0
        assert '/' not in m.name and m.name.count('.') == 1
    stems = [n.partition('.')[0] for n in names]     # WebDataset groups neighbours up to the first dot
    assert stems[::2] == stems[1::2]
    assert len(set(stems)) == 6
    assert sorted(keys(read_pairs('webdataset', folder))) == sorted(unusual)
    try: import webdataset
    except ImportError: return
    samples = webdataset.WebDataset(str(folder/'00000.tar'), shardshuffle=False).decode()
    assert sorted(s['json']['key'] for s in samples) == sorted(unusual)


def test_bad_images_are_named_and_never_written(tmp_path):
    bad = [
        ('page', PAGE),
        ('half', encoded()[:60]),
        ('halfjpg', encoded(kind='JPEG', size=(300, 300))[:900]),
        ('empty', b''),
        ('gone', str(tmp_path / 'gone.png')),
    ]
    records = [
        *plain(2),
        *(PairRecord(k, data, ('x',)) for k, data in bad),
        plain(3)[2],
        plain(1)[0],
        PairRecord('text', None, ('only text',)),
    ]
    folder = write_shards(records, tmp_path/'out', 2)
    state = read_json(folder/'shards.json')
    assert set(state['bad']) == {*(k for k, _ in bad), 'k0 again'}
    assert all(state['bad'].values())
    assert 'DOCTYPE' in state['bad']['page']
    assert sorted(keys(read_pairs('webdataset', folder))) == ['k0', 'k1', 'k2', 'text']
    assert not any(b'DOCTYPE' in p.read_bytes() for p in folder.glob('*.tar'))


def test_other_formats_become_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    def saved(kind):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        return buffer.getvalue()
    folder = write_shards([PairRecord(k, saved(k), ('a field',)) for k in ('TIFF', 'BMP')], tmp_path)
    for record in read_pairs('webdataset', folder):
        assert pairs.image_format(record.image) == 'png'
        assert (np.asarray(Image.open(io.BytesIO(record.image))) == pixels).all()
    assert pd.read_parquet(folder/'pairs.parquet').width.tolist() == [9, 9]


class Stop(Exception): pass


@pytest.mark.parametrize('at', range(0, 10))
def test_a_stopped_run_ends_with_the_same_bytes(tmp_path, at):
    records = [*plain(4), PairRecord('page', PAGE, ('x',)), *(replace(r, key=f'm{r.key}') for r in plain(4))]
    def stopped():
        yield from records[:at]
        raise Stop
    whole = bytes_of(write_shards(records, tmp_path/'whole', 2))
    with pytest.raises(Stop): write_shards(stopped(), tmp_path/'parts', 2)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'parts').glob('*.tar')}
    assert len(kept) == (at - (at > 4)) // 2
    assert not (tmp_path/'parts/pairs.parquet').exists()
    assert bytes_of(write_shards(iter(records), tmp_path/'parts', 2)) == whole
    assert all((tmp_path/'parts'/n).stat().st_mtime_ns == t for n, t in kept.items())
    assert bytes_of(write_shards([], tmp_path/'parts', 2)) == whole      # finished: nothing is read again


@pytest.mark.parametrize('kind', ['rs5m-tar', 'karpathy', 'gaia'])
def test_a_corpus_goes_on_where_its_shards_end(corpus_of, tmp_path, monkeypatch, kind):
    path = corpus_of(kind, 'html', 'blank')
    whole = bytes_of(write_shards(opened(kind, path), tmp_path/'whole', 2))
    real_write = pairs._write_tar
    calls = []
    def failing(*args):
        calls.append(args)
        if len(calls) == 2: raise Stop
        return real_write(*args)
    monkeypatch.setattr(pairs, '_write_tar', failing)
    with pytest.raises(Stop): write_shards(opened(kind, path), tmp_path/'parts', 2)
    monkeypatch.undo()
    assert len(list((tmp_path/'parts').glob('*.tar'))) == 1
    assert bytes_of(write_shards(opened(kind, path), tmp_path/'parts', 2)) == whole


def test_a_crash_while_a_tar_is_written_leaves_nothing_half(tmp_path, monkeypatch):
    def failing(*args): raise Stop
    monkeypatch.setattr(tarfile.TarFile, 'addfile', failing)
    with pytest.raises(Stop): write_shards(plain(), tmp_path/'out', 2)
    assert list((tmp_path/'out').iterdir()) == []


def test_going_on_with_something_else_is_refused(tmp_path):
    def stopped():
        yield from plain(3)
        raise Stop
    with pytest.raises(Stop): write_shards(stopped(), tmp_path, 2)
    with pytest.raises(Incompatible, match='other records'): write_shards(plain(5)[::-1], tmp_path, 2)
    with pytest.raises(Incompatible, match='per_shard'): write_shards(plain(5), tmp_path, 3)
    (tmp_path/'00000.tar').write_bytes(b'cut')
    with pytest.raises(Incompatible, match='00000.tar'): write_shards(plain(5), tmp_path, 2)


def test_the_table_of_shards_opens_its_images(corpus_of, tmp_path):
    folder = write_shards(opened('karpathy', corpus_of('karpathy')), tmp_path, 4)
    table = pd.read_parquet(folder/'pairs.parquet')
    assert len(table) == 12
    assert table.pair.is_unique
    columns = ['pair', 'key', 'caption', 'source', 'split', 'tier', 'scene', 'shard', 'path']
    assert list(table) == [*columns, 'width', 'height', 'n_tokens']
    pixels = {r.key: open_image(r) for r in opened('karpathy', corpus_of('karpathy'))}
    for row in table.itertuples():
        assert (open_image(row, folder) == pixels[row.key]).all()
        assert (row.width, row.height) == (48, 48)
        assert row.n_tokens == token_count(row.caption)
    again = to_frame(read_pairs('webdataset', folder))
    assert set(again.pair) == set(table.pair)
    assert all((open_image(row) == pixels[row['key']]).all() for _, row in again.iterrows())
    with pytest.raises(DataNotFound, match='other members'): open_image('00000.tar!none.jpg', folder)


def test_rows_of_a_tar_find_their_pixels_again(corpus_of):
    records = list(opened('rs5m-tar', corpus_of('rs5m-tar')))
    for record, row in zip(records, to_frame(records).itertuples(), strict=True):
        assert (open_image(row) == open_image(record)).all()


def test_images_that_cannot_be_opened_raise_errors():
    for image, error in ((PAGE, BadImage), (encoded()[:50], BadImage), (None, DataNotFound)):
        with pytest.raises(error): open_image(PairRecord('k', image, ('x',)))


# ---- table and audit ----

def test_audit_counts_what_is_shared_blank_and_long():
    rows = [('a', 'A field'), ('b', 'a  field'), ('a', 'a wood'), ('a', 'a wood'), ('c', ' ')]
    rows.append(('c', 'pier ' * 90))
    frame = pd.DataFrame([dict(key=k, caption=c, source='demo') for k, c in rows])
    got = audit(frame).loc['demo']
    counts = got[['images', 'captions', 'distinct', 'shared', 'blanks', 'overlong']]
    assert counts.tolist() == [3, 6, 3, 1, 1, 1]
    assert got.mean_tokens == round(np.mean([4, 4, 4, 4, 92]), 1)


def test_audit_of_records_and_of_nothing(corpus_of):
    table = audit(opened('rssqa-pairs', corpus_of('rssqa-pairs')))
    assert table.index.tolist() == ['eurosat', 'ucm']
    assert table.images.sum() == 6
    assert table.captions.sum() == 12
    assert len(audit([])) == 0
    assert len(to_frame([])) == 0
    assert list(to_frame([]))[:3] == ['pair', 'key', 'caption']


# ---- the real pairs ----

@pytest.mark.real
def test_real_pairs_are_those_of_their_description(real):
    corpus = read_pairs('rssqa-pairs', real/'pairs')
    images = Counter()
    scenes = {}
    for r in corpus:
        images[r.source, r.split] += 1
        scenes.setdefault(r.source, set()).add(r.scene)
        last = r
    assert corpus.counts['records'] == 5520
    assert corpus.counts['captions'] == 14269
    assert not corpus.problems
    assert corpus.counts['duplicates'] < 100
    total = Counter()
    for (source, _), n in images.items(): total[source] += n
    assert total == dict(rsicd=2060, ucm=1680, eurosat=1000, rsscn7=420, nwpu12=360)
    assert {s: len(v) for s, v in scenes.items()} == dict(rsicd=30, ucm=21, eurosat=10, rsscn7=7, nwpu12=12)
    for source in ('eurosat', 'rsscn7', 'nwpu12'):
        for split, share in dict(train=0.7, val=0.1, test=0.2).items():
            assert images[source, split] == round(total[source] * share)
    assert open_image(last).shape[0] == 3
    only = read_pairs('rssqa-pairs', real/'pairs'/'captions_only.csv.gz')
    by_source = Counter()
    for r in only:
        by_source[r.source] += len(r.captions)
        assert r.image is None
    assert only.counts['captions'] == 42419
    assert by_source == dict(rsicd=17459, rsitmd=22123, sydney=2837)


def test_half_characters_do_not_stop_a_run(tmp_path):
    (tmp_path/'t.jsonl').write_text('{"image": "a.png", "captions": {"en": "a \\ud83d field"}}\n')
    corpus = read_pairs('translations', tmp_path/'t.jsonl')
    assert [r.captions for r in corpus] == [('a ? field',)]
    assert corpus.counts['captions'] == 1
    folder = write_shards([*corpus, PairRecord('half \ud83d', None, ('x',)), *plain(1)], tmp_path/'out')
    assert sorted(keys(read_pairs('webdataset', folder))) == ['a.png', 'k0']
    assert list(read_json(folder / 'shards.json')['bad']) == ['half ?']


@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'masks'])
def test_a_folder_without_the_corpus_is_an_error_or_empty(tmp_path, kind):
    if kind == 'folder':
        assert list(opened(kind, tmp_path)) == []
        return
    with pytest.raises(DataNotFound): list(opened(kind, tmp_path))


ONE_TABLE = ['karpathy', 'nwpu', 'title-csv', 'openclip-csv', 'skyscript', 'translations']


@pytest.mark.parametrize('kind', ONE_TABLE)
def test_a_folder_with_one_table_is_read_like_the_table(corpus_of, kind):
    assert keys(opened(kind, corpus_of(kind).parent)) == keys(opened(kind, corpus_of(kind)))


@pytest.mark.parametrize('faults', [('blank',), ('long',), ('html', 'missing')])
def test_synthetic_corpora_are_equal_for_equal_seeds_only(tmp_path, faults):
    a = fake_corpus('rs5m-tar', tmp_path/'a', 4, 1, faults)
    b = fake_corpus('rs5m-tar', tmp_path/'b', 4, 1, faults)
    c = fake_corpus('rs5m-tar', tmp_path/'c', 4, 2, faults)
    assert bytes_of(a) == bytes_of(b) != bytes_of(c)
    with pytest.raises(UnknownName): fake_corpus('rs5m-tar', tmp_path, faults=('blnk',))
    with pytest.raises(UnknownName): fake_corpus('rs6m', tmp_path)


@pytest.mark.parametrize('kind', ['karpathy', 'webdataset'])
def test_a_corpus_can_be_pickled_for_a_worker(corpus_of, kind):
    corpus = opened(kind, corpus_of(kind), shard=(1, 2))
    assert keys(pickle.loads(pickle.dumps(corpus))) == keys(corpus) != []


def encoded_image(image, kind='jpeg', **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_bytes_of_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(core, 'MAX_PIXELS', 100)
    with pytest.raises(BadImage, match='11x10 pixels'): open_image(encoded_image(Image.new('RGB', (11, 10))))
    assert open_image(encoded_image(Image.new('RGB', (10, 10)))).shape == (3, 10, 10)


def test_a_sideways_photograph_in_a_shard_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded_image(Image.new('RGB', (40, 24)), exif=exif)).shape == (3, 40, 24)
