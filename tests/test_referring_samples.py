"""Samples of referring segmentation: run lengths, pickles, readers with the traps of real data, expressions."""
import json, os, pickle, zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from rssqa.core import BadImage, DataNotFound, SchemaError, UnknownName
from rssqa.referring.samples import (
    FACTOR, FEW, LEAST, SIDES, SPECK, Collection, Sample, counts_to_text, decode_rle, encode_rle, find_pieces,
    fit_mask, load_plain_pickle, make_expressions, read_jsonl, read_refsegrs, read_risbench, read_rrsisd,
    text_to_counts, write_jsonl,
)

# ---------------------------------------------------------------- run lengths

BY_HAND = {
    '0': [0], '9': [9], '?': [15], '`0': [16], 'o0': [31], 'P1': [32], '0`0': [0, 16],
    '535N': [5, 3, 5, 1],                 # 1 - 3 = -2: bits 11110, the sign bit is set and nothing follows
    '5350': [5, 3, 5, 3], '1234': [1, 2, 3, 6],
    'PPP1': [32 * 32 * 32],               # 0 0 0 1 in base 32, with three marks that more follows
}


@pytest.mark.parametrize('text', BY_HAND)
def test_known_texts(text):
    assert counts_to_text(BY_HAND[text]) == text and text_to_counts(text) == BY_HAND[text]


@given(st.lists(st.integers(0, 10**7), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_counts_come_back(counts): assert text_to_counts(counts_to_text(counts)) == counts


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_mask_comes_back(mask, text):
    rle = encode_rle(mask, text)
    assert (decode_rle(rle) == mask).all() and rle['size'] == list(mask.shape)
    assert isinstance(rle['counts'], str if text else list)


def test_columns_come_first_and_height_before_width():
    mask = np.zeros((2, 3), bool)
    mask[0, 1] = True                     # the third pixel column by column, the second row by row
    assert encode_rle(mask) == dict(size=[2, 3], counts=[2, 1, 3])
    assert np.argwhere(decode_rle(dict(size=[3, 2], counts=[2, 1, 3]))).tolist() == [[2, 0]]
    assert encode_rle(np.ones((2, 2), bool))['counts'] == [0, 4]
    assert decode_rle(dict(size=[2, 3], counts=b'213'))[0, 1]


@pytest.mark.parametrize('rle', [
    dict(size=[2, 3], counts=[2, 1]), dict(size=[2, 3], counts=[2, 5]), dict(size=[2, 2], counts=[5, -1]),
    dict(size=[2, 3], counts='2P'), dict(size=[2, 3], counts='2\n4'), dict(size=[2], counts=[2]),
    dict(size=[2, 2], counts=[2.0, 2]), dict(size=[2, 2]), [2, 2], None,
])
def test_broken_run_lengths_are_refused(rle):
    with pytest.raises(SchemaError, match='cannot decode these run lengths'): decode_rle(rle)


def test_a_mask_of_absurd_size_is_refused():
    with pytest.raises(BadImage, match='at most'): decode_rle(dict(size=[10**6, 10**6], counts=[10**12]))


# ---------------------------------------------------------------- pickles

class Planted:
    def __init__(self, function, *args): self.planted = function, args
    def __reduce__(self): return self.planted


PLAIN = [{'a': [1, 2.5, None, True, 'ü', b'\xff\x00'], (1, 2): {3, 4}}, frozenset([5]), bytearray(b'x'), 2**80]


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_loaded(protocol): assert load_plain_pickle(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize('function, args', [
    (os.system, ('touch {}',)), (eval, ('open("{}", "w")',)), (getattr, (os, 'system')), (zlib.compress, (b'x',)),
])
def test_code_is_refused_and_does_not_run(tmp_path, protocol, function, args):
    trace = tmp_path/'trace'
    args = tuple(a.format(trace) if isinstance(a, str) else a for a in args)
    if function is getattr: args = (Planted(os.getenv, 'HOME'), 'upper')
    with pytest.raises(SchemaError, match=r'refused .* could run code'):
        load_plain_pickle(pickle.dumps([Planted(function, *args)], protocol))
    assert not trace.exists()


def test_hand_written_opcodes_are_refused():
    for code in (b"cos\nsystem\n(S'true'\ntR.", b"(S'true'\nios\nsystem\n.", b'\x80\x04\x8c\x02os\x8c\x06system\x93.'):
        with pytest.raises(SchemaError, match='refused'): load_plain_pickle(code)
    with pytest.raises(SchemaError, match='points to objects elsewhere'): load_plain_pickle(b'Pelsewhere\n.')
    with pytest.raises(SchemaError, match="'rot13'"):
        load_plain_pickle(b"c_codecs\nencode\n(Vx\nVrot13\ntR.")
    with pytest.raises(SchemaError, match='damaged'): load_plain_pickle(pickle.dumps(PLAIN)[:-9])


def test_text_of_python_2_is_loaded(tmp_path):
    assert load_plain_pickle(b"(lp0\nS'caf\\xe9'\np1\na.") == ['café']
    with pytest.raises(DataNotFound, match='check the path'.capitalize()): load_plain_pickle(tmp_path/'none.p')


# ---------------------------------------------------------------- the unified format

def made_sample(i=0, **more):
    mask = np.zeros((4, 5), bool)
    mask[i % 4, 1:4] = True
    return Sample(f'i{i}', f'images/i{i}.png', f'the road number {i}', encode_rle(mask, text=i % 2 == 0),
                  ('train', 'test')[i % 2], more)


def test_samples_come_back(tmp_path):
    samples = [made_sample(i, ann_id=i, category_name='ü') for i in range(4)]
    path = write_jsonl(samples, tmp_path/'sub'/'s.jsonl')
    assert read_jsonl(path).samples == samples
    assert [s.image_id for s in read_jsonl(path, 'test').samples] == ['i1', 'i3']
    stated = json.loads(path.read_text(encoding='utf-8').splitlines()[0])
    assert {'split', 'image_id', 'sent', 'file_name', 'segmentation', 'area', 'ann_id'} <= set(stated)
    assert stated['area'] == 3


def test_a_stated_area_is_not_believed(tmp_path):
    path = write_jsonl([made_sample()], tmp_path/'s.jsonl')
    path.write_text(path.read_text().replace('"area": 3', '"area": 279213'))
    sample = read_jsonl(path).samples[0]
    assert sample.area == 3 and 'area' not in sample.more


def test_bad_lines_are_named_and_nothing_takes_their_place(tmp_path):
    path = write_jsonl([made_sample(i) for i in range(3)], tmp_path/'s.jsonl')
    lines = path.read_text().splitlines()
    no_mask = json.dumps({k: v for k, v in json.loads(lines[0]).items() if k != 'segmentation'})
    short = json.dumps(json.loads(lines[0]) | dict(segmentation=dict(size=[4, 5], counts=[19])))
    other = json.dumps(json.loads(lines[0]) | dict(segmentation=dict(size=7, counts=[19])))
    path.write_text('\n'.join([lines[0], no_mask, '', short, lines[1], '{', other, '[1]', lines[2]]))
    collection = read_jsonl(path)
    assert [s.image_id for s in collection.samples] == ['i0', 'i1', 'i2']
    assert list(collection.bad) == ['line 2', 'line 4', 'line 6', 'line 7', 'line 8']
    assert 'segmentation' in collection.bad['line 2'] and '19 pixels' in collection.bad['line 4']
    assert '3 samples, 5 bad, 0 warnings' in repr(collection) and 'line 2' in repr(collection)
    with pytest.raises(DataNotFound): read_jsonl(tmp_path/'none.jsonl')


# ---------------------------------------------------------------- sizes

def test_small_differences_are_resized_and_large_ones_refused():
    mask = np.zeros((800, 800), bool)
    mask[:400] = True
    for shape in ((800, 801), (787, 800), (800 + FEW, 800 - FEW)):
        fitted = fit_mask(mask, shape)
        assert fitted.shape == shape and abs(fitted.mean() - 0.5) < 0.002
    assert fit_mask(mask, (800, 800)) is mask
    for shape in ((800, 800 + FEW + 1), (400, 400), (800 - FEW - 1, 800)):
        with pytest.raises(SchemaError, match='this mask does not fit its image'): fit_mask(mask, shape)


# ---------------------------------------------------------------- RefSegRS and RISBench

def write_phrases(root, images, masks, suffix, value=255):
    for folder in (images, masks): (root/folder).mkdir(parents=True)
    for name, width in {'22187': 20, '20203': 20, '00413': 22, 'd': 60, 'e': 20, 'f': 20}.items():
        Image.new('RGB', (20, 20)).save(root/images/f'{name}{suffix}')
        mask = np.zeros((20, width), np.uint8)
        if name != 'f': mask[3:6, 4:8] = value
        Image.fromarray(mask).save(root/masks/f'{name}{suffix}')
    (root/masks/f'e{suffix}').write_bytes(b'no image')
    return root


@pytest.mark.parametrize('read, images, masks, suffix, as_written', [
    (read_refsegrs, 'images', 'masks', '.tif', ''), (read_risbench, 'img_rgb', 'mask', '.png', '.png'),
])
def test_phrases(tmp_path, read, images, masks, suffix, as_written):
    root = write_phrases(tmp_path, images, masks, suffix, value=1 if suffix == '.tif' else 255)
    named = ('22187', '20203', '00413', 'd', 'e', 'f', 'g')
    lines = [f'{name}{as_written} the road {i}' for i, name in enumerate(named)]
    (root/'output_phrase_val.txt').write_text('\n'.join([*lines, f'22187{as_written}', '', f'22187{as_written} a b c']))
    collection = read(root, 'val')
    assert [s.image_id for s in collection.samples] == ['22187', '20203', '00413', 'f', '22187'] # none is skipped
    assert [s.sent for s in collection.samples] == ['the road 0', 'the road 1', 'the road 2', 'the road 5', 'a b c']
    assert [s.area for s in collection.samples] == [12, 12, 9, 0, 12]  # of columns 4 to 7 of 22, three remain
    assert all((root/s.file_name).is_file() and s.split == 'val' for s in collection.samples)
    names = [f'{name}{as_written} (line {i})' for name, i in dict(d=4, e=5, g=7, **{'22187': 8}).items()]
    assert list(collection.bad) == names
    reasons = list(collection.bad.values())
    for part, reason in zip(('does not fit', 'cannot read', 'no image', 'no sentence'), reasons): assert part in reason
    assert collection.warnings == [
        f'00413{as_written}: mask of 22x20 resized to 20x20', f'f{as_written}: the mask is empty']


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(DataNotFound, match='output_phrase_test.txt'): read_refsegrs(tmp_path, 'test')
    (tmp_path/'output_phrase_train.txt').write_text('')
    with pytest.raises(UnknownName, match='Did you mean train'): read_refsegrs(tmp_path, 'trian')


# ---------------------------------------------------------------- RRSIS-D

def write_rrsisd(root, extra=()):
    images = root/'images'/'rrsisd'/'JPEGImages'
    for folder in (images, root/'rrsisd', root/'ann_split'): folder.mkdir(parents=True)
    refs, annotations = [], []
    for i, (h, w) in enumerate([(80, 80), (80, 81), (67, 80), (80, 40), (80, 80)]):
        Image.new('RGB', (w, h)).save(images/f'{i:05}.jpg')
        parts = [np.zeros((80, 80), bool) for _ in range(2)]
        parts[0][10:20, 10:30] = True
        parts[1][50:55, 10:30] = True
        annotations.append(dict(
            id=i, image_id=i, categories_id=i % 2, bbox=[10, 10, 30, 55], area=279213,
            segmentation=[encode_rle(part, text=True) for part in parts[:1 + i % 2]]))
        sentence = dict(tokens=['a', 'ship'], raw='A ship', sent_id=i, sent=f'ship {i}')
        refs.append(dict(image_id=i, split=('train', 'test')[i == 4], sentences=[sentence], file_name=f'{i:05}.jpg',
                         category_id=i % 2, ann_id=i, sent_ids=[i], ref_id=i))
    (root/'rrsisd'/'refs(unc).p').write_bytes(pickle.dumps([*refs, *extra], 2))
    stated = dict(images=[], annotations=annotations, categories=[dict(id=0, name='ship'), dict(id=1, name='dam')])
    (root/'rrsisd'/'instances.json').write_text(json.dumps(stated))
    return root


def test_rrsisd(tmp_path):
    collection = read_rrsisd(write_rrsisd(tmp_path), 'train')
    assert [s.sent for s in collection.samples] == ['ship 0', 'ship 1', 'ship 2']
    assert collection.samples[0].area == 200                              # not 279,213
    assert collection.samples[1].area in range(290, 310)                  # both parts
    assert [s.mask.shape for s in collection.samples] == [(80, 80), (80, 81), (67, 80)]
    assert [s.more['category_name'] for s in collection.samples] == ['ship', 'dam', 'ship']
    assert list(collection.bad) == ['ref 3, sentence 3'] and 'expected 40x80' in collection.bad['ref 3, sentence 3']
    assert len(collection.warnings) == 2 and all('resized' in warning for warning in collection.warnings)
    assert [s.sent for s in read_rrsisd(tmp_path, 'test').samples] == ['ship 4']
    with pytest.raises(UnknownName): read_rrsisd(tmp_path, 'val')
    again = read_jsonl(write_jsonl(collection.samples, tmp_path/'s.jsonl')).samples
    assert all((a.mask == b.mask).all() and a.more == b.more for a, b in zip(again, collection.samples))


def test_expressions_that_the_pickle_left_out_are_reported(tmp_path):
    root = write_rrsisd(tmp_path)
    objects = ''.join(f'<object><description>{text}</description></object>' for text in ('ship', 'ship x', 'ship 4'))
    (root/'ann_split'/'00004.xml').write_text(f'<annotation><filename>00004.jpg</filename>{objects}</annotation>')
    (root/'ann_split'/'00000.xml').write_text('<annotation><description>ship 0</description></annotation>')
    (root/'ann_split'/'00001.xml').write_text('<annotation>')
    assert read_rrsisd(root, 'test').warnings == ['00004.jpg: 2 more expressions in 00004.xml']
    assert not any('more expressions' in warning for warning in read_rrsisd(root, 'train').warnings)


def test_missing_parts_of_rrsisd_are_named(tmp_path):
    sentence = dict(tokens=[], raw='', sent_id=77, sent='x')
    ref = dict(split='test', sentences=[sentence], ref_id=9, image_id=9, file_name='none.jpg', ann_id=0)
    no_mask = ref | dict(file_name='00000.jpg', ann_id=500, ref_id=10)
    no_field = {k: v for k, v in ref.items() if k != 'ann_id'} | dict(file_name='00000.jpg', ref_id=11)
    collection = read_rrsisd(write_rrsisd(tmp_path, (ref, no_mask, no_field)), 'test')
    assert list(collection.bad) == [f'ref {i}, sentence 77' for i in (9, 10, 11)]
    reasons = list(collection.bad.values())
    assert 'no image none.jpg' in reasons[0] and 'annotation 500' in reasons[1] and 'ann_id' in reasons[2]
    assert [s.sent for s in collection.samples] == ['ship 4']


def test_a_hostile_pickle_of_a_dataset_is_refused(tmp_path):
    root = write_rrsisd(tmp_path, (Planted(os.system, f'touch {tmp_path}/trace'),))
    with pytest.raises(SchemaError, match='refused'): read_rrsisd(root, 'train')
    assert not Path(tmp_path/'trace').exists()


# ---------------------------------------------------------------- made expressions

NOUNS = {0: ('building', 'buildings'), 1: ('road', 'roads'), 2: ('lake', 'lakes')}


def flood(mask): # pieces, written independently: lists of pixels
    left = {tuple(p) for p in np.argwhere(mask)}
    pieces = []
    while left:
        todo = [left.pop()]
        piece = set(todo)
        while todo:
            r, c = todo.pop()
            for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                if near in left:
                    left.remove(near)
                    piece.add(near)
                    todo.append(near)
        pieces.append(piece)
    return pieces


def fits(text, piece, pieces, shape): # does an expression fit a piece?
    y, x = (np.mean([p[axis] for p in piece]) + 0.5 for axis in (0, 1))
    words = text.split()
    if 'largest' in words: return all(len(piece) >= len(other) for other in pieces)
    if 'smallest' in words: return all(len(piece) <= len(other) for other in pieces)
    if {'left'} & set(words) and not x < shape[1] / 2: return False
    if {'right'} & set(words) and not x > shape[1] / 2: return False
    if {'top', 'upper'} & set(words) and not y < shape[0] / 2: return False
    return not ({'bottom', 'lower'} & set(words) and not y > shape[0] / 2)


@pytest.mark.parametrize('seed', range(60))
def test_every_expression_fits_exactly_one_target(seed):
    rng = np.random.default_rng(seed)
    mask = rng.choice([1, 2, 255], p=[0.3, 0.5, 0.2])*np.ones((24, 30), int)
    for _ in range(rng.integers(1, 9)):
        top, left = rng.integers(0, 20), rng.integers(0, 26)
        mask[top:top + rng.integers(1, 9), left:left + rng.integers(1, 9)] = rng.choice([0, 0, 1, 2, 255])
    for made in make_expressions(mask, NOUNS):
        whole = mask == made.class_id
        noun = NOUNS[made.class_id]
        if made.kind == 'all':
            assert made.text == f'all {noun[1]}' and (made.mask == whole).all()
            continue
        pieces = [p for p in flood(whole) if len(p) >= SPECK * mask.size]
        fitting = [p for p in pieces if fits(made.text, p, pieces, mask.shape)]
        assert len(fitting) == 1 and fitting[0] == {tuple(p) for p in np.argwhere(made.mask)}, made.text
        assert noun[0] in made.text and made.mask.sum() >= LEAST * mask.size
        assert (made.kind == 'only') == (len(pieces) == 1)


def test_no_text_is_used_twice_and_all_kinds_are_made():
    kinds = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        mask = np.full((24, 24), 1)
        for _ in range(3):
            top, left, side = rng.integers(0, 18), rng.integers(0, 18), rng.integers(2, 7)
            mask[top:top + side, left:left + side] = 0
        made = make_expressions(mask, NOUNS)
        assert len({e.text for e in made}) == len(made)
        kinds |= {e.kind for e in made}
    assert kinds == {'only', 'all', 'size', 'position'}


def blocks(*sides): # squares of class 0 in a row
    mask = np.full((40, 20 * len(sides)), 255)
    for i, side in enumerate(sides): mask[5:5 + side, 20 * i + 2:20 * i + 2 + side] = 0
    return mask


def texts(mask): return {e.text for e in make_expressions(mask, NOUNS)}


def test_sizes_that_are_nearly_equal_are_not_distinguished():
    assert FACTOR == 1.5
    assert not {'the largest building', 'the smallest building'} & texts(blocks(10, 9)) # 100 and 81
    assert {'the largest building', 'the smallest building'} <= texts(blocks(10, 8)) # 100 and 64


def test_pieces_too_small_for_a_target_count_against_uniqueness():
    assert texts(blocks(10)) == {'the building'}
    mask = blocks(10, 0)                                                 # 1600 pixels: targets 16, noise below 1.6
    assert texts(mask) == {'the building'}
    mask[30, 30] = 0                                                     # one pixel of noise
    assert texts(mask) == {'the building'}
    mask[30, 31] = 0                                                     # two are a piece
    found = texts(mask)
    assert 'the building' not in found and 'the smallest building' not in found and 'all buildings' not in found
    assert {'the largest building', 'the building on the left'} <= found and not any('right' in t for t in found)


def test_position_is_not_claimed_near_the_middle():
    mask = np.full((40, 100), 255)
    mask[15:25, 40:50] = 0                                               # its centre is at 45 % of the width
    mask[15:25, 80:90] = 0
    assert not any('left' in t for t in texts(mask)) and 'the building on the right' in texts(mask)


def test_wording_can_be_another():
    wording = dict(only='{one}', all='every {one}', largest='big {one}', smallest='small {one}',
                   position='{where} {one}')
    made = make_expressions(blocks(10, 6), NOUNS, {'left': (-1, 0)}, wording)
    assert {e.text for e in made} == {'every building', 'big building', 'small building', 'left building'}
    assert set(SIDES.values()) == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)} - {(0, 0)}


def test_unknown_pixels_and_equal_nouns_are_refused():
    with pytest.raises(SchemaError, match='255'): make_expressions(blocks(5), {255: ('a', 'as')})
    with pytest.raises(SchemaError, match='same noun'): make_expressions(blocks(5), {0: ('a', 'as'), 1: ('a', 'bs')})
    assert make_expressions(np.full((9, 9), 255), NOUNS) == []


def test_pieces_are_ordered_by_size():
    areas = [p.sum() for p in find_pieces(blocks(3, 9, 6) == 0)]
    assert areas == [81, 36, 9]
    assert len(Collection()) == 0
