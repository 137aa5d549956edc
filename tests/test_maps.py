"Maps of other programs: every form gives the same map, every unusable one is refused with three parts."
import json

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from rssqa.core import BadImage, DataNotFound, Incompatible, Problem, SchemaError
from rssqa.quality.maps import ClassTable, Map, class_table, map_from_ids, map_from_scores, read_map
from rssqa.segment.protocol import SegOutput

TABLE = class_table({0: 'water', 3: 'land', 9: 'town'})
IDS = np.random.default_rng(0).integers(0, 3, (12, 10)).astype(np.uint8)
STORED = np.array(TABLE.ids, np.uint8)[IDS]
IMAGE = np.full((3, 12, 10), 0.5, np.float32)


def three_parts(problem: Problem): return all([problem.what, problem.found, problem.todo])


def write(tmp_path, suffix, values, **profile):
    path = tmp_path/f'map{suffix}'
    if suffix == '.npy': np.save(path, values)
    elif suffix == '.npz': np.savez(path, values)
    elif suffix == '.png': Image.fromarray(values).save(path)
    else:
        bands = values[None] if values.ndim == 2 else values
        profile = dict(driver='GTiff', count=len(bands), height=bands.shape[1], width=bands.shape[2],
                       dtype=bands.dtype, transform=rasterio.Affine(1, 0, 5, 0, -1, 9)) | profile
        with rasterio.open(path, 'w', **profile) as f: f.write(bands)
    return path


@pytest.mark.parametrize('suffix', ['.npy', '.npz', '.png', '.tif'])
def test_ids_are_the_same_from_every_file(tmp_path, suffix):
    path = write(tmp_path, suffix, STORED)
    assert (read_map(path, TABLE, image=IMAGE).ids == IDS).all()
    assert (read_map(str(path), TABLE).ids == IDS).all()


@pytest.mark.parametrize('suffix', ['.npy', '.npz', '.tif'])
@pytest.mark.parametrize('kind', ['float32', 'uint8', 'logits'])
def test_probabilities_are_the_same_from_every_file(tmp_path, suffix, kind):
    logits = np.random.default_rng(1).normal(size=(3, 12, 10)) * 3
    p = np.exp(logits) / np.exp(logits).sum(0)
    stored = dict(float32=p.astype(np.float32), uint8=(255 * p).round().astype(np.uint8),
                  logits=logits.astype(np.float32))[kind]
    read = read_map(write(tmp_path, suffix, stored), TABLE, image=IMAGE)
    assert np.allclose(read.probabilities, p, atol=0.02)
    assert (read.ids == stored.argmax(0)).all()


def test_classes_may_come_last():
    p = np.random.default_rng(2).dirichlet(np.ones(3), (12, 10))
    read = read_map(p, TABLE, image=IMAGE)
    assert np.allclose(read.probabilities, np.moveaxis(p, -1, 0))


def test_a_palette_png_gives_its_numbers_not_its_colours(tmp_path):
    picture = Image.fromarray(STORED).convert('P')
    picture.putpalette([7, 7, 7] * 256)
    picture.save(tmp_path/'map.png')
    assert (read_map(tmp_path/'map.png', TABLE).ids == IDS).all()


def test_colours_are_read_where_the_table_knows_them(tmp_path):
    entries = [dict(id=i, name=n, rgb=[20 * i, 9, 200]) for i, n in zip(TABLE.ids, TABLE.names)]
    (tmp_path/'classes.json').write_text(json.dumps(dict(classes=entries)))
    table = class_table(tmp_path/'classes.json')
    Image.fromarray(np.array(table.colours, np.uint8)[IDS]).save(tmp_path/'map.png')
    assert (read_map(tmp_path/'map.png', table).ids == IDS).all()
    with pytest.raises(BadImage, match='(?i)found colours') as e: read_map(tmp_path/'map.png', TABLE)
    assert three_parts(e.value)
    picture = np.array(table.colours, np.uint8)[IDS]
    picture[0, 0] = 1, 2, 3
    Image.fromarray(picture).save(tmp_path/'map.png')
    with pytest.raises(BadImage, match=r'(?i)\(1, 2, 3\) on 1 px'): read_map(tmp_path/'map.png', table)


def test_nodata_of_a_geotiff_has_no_value(tmp_path):
    stored = STORED.copy()
    stored[:3] = 77
    read = read_map(write(tmp_path, '.tif', stored, nodata=77), TABLE)
    assert (read.ids[:3] == 255).all() and (read.ids[3:] == IDS[3:]).all()
    stored[:3] = 0                                                  # a number that also stands for a class
    read = read_map(write(tmp_path, '.tif', stored, nodata=0), TABLE)
    assert (read.ids[stored == 0] == 255).all()


def test_numbers_that_are_not_finite_have_no_value():
    values = STORED.astype(np.float32)
    values[0, 0] = np.nan
    assert read_map(values, TABLE).ids[0, 0] == 255
    p = np.full((3, 4, 4), 1 / 3, np.float32)
    p[0] += 0.1
    p[1] -= 0.1
    p[:, 1, 1] = np.nan
    read = read_map(p, TABLE)
    assert read.ids[1, 1] == 255 and (read.ids == 0).sum() == 15


@pytest.mark.parametrize('source, text', [
    (np.full((12, 10), 4), 'class ids 4 on 120 px'),
    (np.full((12, 10), -1), 'class ids -1'),
    (np.full((12, 10), 0.5), 'fractions'),
    (np.full((12, 10), 255), 'no pixel with a class'),
    (np.full((12, 10), np.nan), 'no pixel with a class'),
    (np.zeros((2, 12, 10)), r'expected \(3,H,W\) for 3 classes'),
    (np.zeros((12, 11), int), 'found 11x12 pixels, the image has 10x12'),
    (np.zeros(12, int), r'found shape \(12,\)'),
    (np.zeros((1, 3, 12, 10)), 'found shape'),
    (np.zeros((12, 10), complex), 'complex128'),
    (np.zeros((3, 12, 10), complex), 'complex128'),
    (np.array([['a']]), 'expected whole numbers'),
    (np.zeros((3, 12, 10), np.int32), 'int32 scores'),
])
def test_what_is_no_map_is_refused(source, text):
    with pytest.raises(BadImage, match=f'(?i){text}') as e: read_map(source, TABLE, 'theirs', IMAGE)
    assert 'theirs' in e.value.what and three_parts(e.value)


def test_files_that_are_no_map_are_refused(tmp_path):
    with pytest.raises(DataNotFound): read_map(tmp_path/'none.npy', TABLE)
    (tmp_path/'bad.npy').write_bytes(b'no array')
    with pytest.raises(BadImage, match='(?i)no array of numbers'): read_map(tmp_path/'bad.npy', TABLE)
    np.save(tmp_path/'pickle.npy', np.array([{}], object), allow_pickle=True)
    with pytest.raises(BadImage, match='(?i)no array of numbers'): read_map(tmp_path/'pickle.npy', TABLE)
    np.savez(tmp_path/'two.npz', a=IDS, b=IDS)
    with pytest.raises(BadImage, match='(?i)found arrays a, b'): read_map(tmp_path/'two.npz', TABLE)
    with pytest.raises(BadImage, match='(?i)found 2 bands'):
        read_map(write(tmp_path, '.tif', np.zeros((2, 12, 10), np.uint8)), TABLE)


@pytest.mark.parametrize('classes, text', [
    (['a'], '1 classes'), (['a', 'a'], 'a name twice'), ({0: 'a', 300: 'b'}, 'outside 0..254'),
    ({'x': 'a', 'y': 'b'}, 'no numbers'), (7, 'found int'), ([{'id': 0}], 'without'), ({0: '', 1: 'b'}, 'empty name'),
    (None, 'found NoneType'),
])
def test_what_is_no_class_table_is_refused(classes, text):
    with pytest.raises(SchemaError, match=f'(?i){text}') as e: class_table(classes)
    assert three_parts(e.value)


def test_class_tables_in_all_forms(tmp_path):
    path = tmp_path/'classes.json'
    for content in (['a', 'b'], {'0': 'a', '1': 'b'}, [dict(id=0, name='a'), dict(id=1, name='b')]):
        path.write_text(json.dumps(content))
        assert class_table(path) == class_table(content) == ClassTable(('a', 'b'), (0, 1))


def test_a_network_runs_on_the_image():
    class Network:
        classes = TABLE.names

        def __call__(self, x):
            return SegOutput(torch.as_tensor(np.eye(3, dtype=np.float32)[IDS]).permute(2, 0, 1)[None] * 9)
    assert (read_map(Network(), TABLE, image=IMAGE).ids == IDS).all()
    with pytest.raises(Incompatible, match='(?i)found no image'): read_map(Network(), TABLE)
    other = class_table(['a', 'b', 'c'])
    with pytest.raises(Incompatible, match='(?i)found classes water'): read_map(Network(), other, image=IMAGE)


@settings(max_examples=40, deadline=None)
@given(st.permutations([0, 3, 9, 17, 254]), st.integers(0, 99))
def test_renumbering_the_file_and_the_table_changes_nothing(numbers, seed):
    ids = np.random.default_rng(seed).integers(0, 5, (6, 7))
    table = ClassTable(tuple('abcde'), tuple(numbers))
    assert (map_from_ids(np.array(numbers)[ids], table).ids == ids).all()


def test_a_map_is_returned_as_it_is():
    m = Map('mine', IDS)
    assert read_map(m, TABLE) is m
    assert map_from_scores(np.eye(3)[IDS].transpose(2, 0, 1), TABLE).ids.dtype == np.uint8


class ByColour:
    "A segmenter whose logits are the colours: windows cannot change its map."
    classes = ('red', 'green', 'blue')
    temperature = 1.0

    def __call__(self, x): return SegOutput(4 * x)


def test_a_large_image_is_segmented_in_windows(monkeypatch):
    import rssqa.quality.maps as module
    image = np.random.default_rng(0).random((3, 600, 530)).astype(np.float32)
    whole = read_map(ByColour(), class_table(ByColour.classes), 'a', image)
    monkeypatch.setattr(module, 'WINDOWED', 600 * 530 - 1)
    windows = read_map(ByColour(), class_table(ByColour.classes), 'a', image)
    assert (windows.ids == whole.ids).all() and windows.probabilities.dtype == np.float16
    np.testing.assert_allclose(windows.probabilities.sum(0, dtype=np.float32), 1, atol=4e-3)
    np.testing.assert_allclose(windows.probabilities, whole.probabilities, atol=2e-3)
