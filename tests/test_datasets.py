"""Datasets: official layouts and their traps, bad input, tiles, real folders."""
import json, os, re, shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from hostile import sparse_tiff
from rssqa import core
from rssqa.data.catalog import isprs, snap
from rssqa.core import (
    BadImage, DataNotFound, Incompatible, Problem, SchemaError, UnknownName, datasets, file_id,
)
from rssqa.data.datasets import (
    IGNORE,
    ByColour,
    ById,
    DatasetSpec,
    class_fractions,
    colourise,
    default_palette,
    legend,
    make_spec,
    read_image,
    read_mask,
    read_valid,
    scan,
    spec_of,
    summary,
    tile,
)
from rssqa.data.splits import check_leak, folds
from rssqa.testing.fake_datasets import erode, fake_dataset, generic_spec, paint

real = pytest.mark.skipif(not os.environ.get('RSSQA_REAL'), reason='RSSQA_REAL is unset')
OFFICIAL = ('vaihingen', 'potsdam', 'loveda', 'uavid', 'floodnet')
RGB = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def rows(table): return list(table.itertuples(index=False))


def row_of(path, mask=None, w=None, h=None, x=0, y=0):
    return SimpleNamespace(root=str(path.parent), path=path.name, mask_path=mask, dataset='t',
                           x=x, y=y, w=w, h=h)


@pytest.fixture
def pair(tmp_path):
    "A folder with one good pair, and its description."
    image, mask = paint(RGB, 0, (20, 30))
    for kind, x in (('images', image), ('masks', mask)):
        (tmp_path/kind).mkdir()
        Image.fromarray(x).save(tmp_path/kind/'a.png')
    return tmp_path, make_spec('t', 'abc'), image, mask


def message(e):
    "One line in three sentences."
    text = str(e.value)
    assert '\n' not in text and e.value.what and e.value.found and e.value.todo
    return text


# ---- the official collections

@pytest.mark.parametrize('name', OFFICIAL)
def test_fake_of_each_layout_decodes_to_what_was_painted(name, tmp_path):
    spec = datasets[name]
    table = scan(fake_dataset(name, tmp_path, seed=3), name)
    assert set(table.columns) == set('image_id dataset scene split root path mask_path x y w h gsd_m'.split())
    assert set(table.dataset) == {name} and table.image_id.is_unique and Path(table.root[0]).is_absolute()
    assert not table.path.str.contains(r'\\').any() and not table.path.str.startswith('/').any()
    for row in rows(table[table.mask_path.notna()]):
        ids = read_mask(row)
        image = read_image(row)
        assert ids.dtype == np.uint8 and ids.shape == (64, 80) == image.shape[1:] and image.dtype == np.float32
        assert set(np.unique(ids)) <= {*range(len(spec.classes)), IGNORE}
        # the image was painted from the true mask
        tint = 40 + 0.6 * np.array(spec.palette)[ids[ids != IGNORE]]
        assert np.abs(255 * image.transpose(1, 2, 0)[ids != IGNORE] - tint).mean() < 20


@pytest.mark.parametrize('name', OFFICIAL)
def test_colours_and_ids_are_inverse(name):
    spec = datasets[name]
    ids = np.arange(len(spec.classes), dtype=np.uint8)[None]
    decode = ByColour(tuple(zip(spec.palette, range(len(spec.classes)))))
    assert (decode(colourise(ids, spec.palette)) == ids).all()
    if spec.decode.mode == 'RGB': assert (spec.decode(colourise(ids, spec.palette)) == ids).all()
    assert spec.licence and spec.homepage and spec.citation and (spec.downloads or spec.manual)


def test_isprs_class_order_and_black_boundary():
    classes = ('impervious_surface', 'building', 'low_vegetation', 'tree', 'car', 'clutter')
    assert datasets['vaihingen'].classes == datasets['potsdam'].classes == classes
    colours = [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0), (0, 0, 0)]
    decoded = datasets['vaihingen'].decode(np.array([colours], np.uint8))
    assert decoded.tolist() == [[0, 1, 2, 3, 4, 5, IGNORE]]


def test_vaihingen_is_irrg_and_potsdam_rgb():
    assert (datasets['vaihingen'].bands, datasets['vaihingen'].gsd_m) == ('IRRG', 0.09)
    assert (datasets['potsdam'].bands, datasets['potsdam'].gsd_m) == ('RGB', 0.05)


def test_isprs_official_lists(tmp_path):
    for city, n_train, n_test in (('vaihingen', 16, 17), ('potsdam', 24, 14)):
        splits = isprs(city).find.keywords['splits']
        assert [len(splits[s].split()) for s in ('train', 'test')] == [n_train, n_test]
        assert not set(splits['train'].split()) & set(splits['test'].split())
    table = scan(fake_dataset('vaihingen', tmp_path), 'vaihingen')
    assert table.set_index('scene').split.to_dict() == {'1': 'train', '3': 'train', '2': 'test', '4': 'test'}


def test_isprs_takes_eroded_masks_if_there_are_any_and_full_ones_on_request(tmp_path):
    fake_dataset('vaihingen', tmp_path)
    auto = scan(tmp_path, 'vaihingen')
    full = scan(tmp_path, isprs('vaihingen', labels='full'))
    assert auto.mask_path.str.contains('noBoundary').all()
    assert not full.mask_path.str.contains('noBoundary').any()
    eroded = read_mask(rows(auto)[0])
    complete = read_mask(rows(full)[0])
    assert (eroded == erode(complete)).all() and (complete != IGNORE).all()
    assert 0 < (eroded == IGNORE).mean() < 0.5
    shutil.rmtree(tmp_path/'eroded')
    assert scan(tmp_path, 'vaihingen').mask_path.tolist() == full.mask_path.tolist()


def test_isprs_training_mask_missing_is_an_error_and_test_mask_may_be_hidden(tmp_path):
    fake_dataset('vaihingen', tmp_path)
    shutil.rmtree(tmp_path/'eroded')
    (tmp_path/'gts/top_mosaic_09cm_area2.tif').unlink()
    assert scan(tmp_path, 'vaihingen').set_index('scene').mask_path['2'] is None
    (tmp_path/'gts/top_mosaic_09cm_area3.tif').unlink()
    with pytest.raises(DataNotFound) as e: scan(tmp_path, 'vaihingen')
    assert 'top_mosaic_09cm_area3.tif' in message(e)


def test_potsdam_7_10_is_left_out_and_listed(tmp_path):
    table = scan(fake_dataset('potsdam', tmp_path), 'potsdam')
    assert '7_10' not in set(table.scene)
    assert 'top_potsdam_7_10' in summary(table) and 'faulty' in summary(table)
    assert '7_10' in set(scan(tmp_path, isprs('potsdam', faulty=True)).scene)


def test_potsdam_lossy_masks_are_mended_and_only_those(tmp_path):
    fake_dataset('potsdam', tmp_path, seed=5)
    table = scan(tmp_path, isprs('potsdam', labels='full'))
    lossy = next(r for r in rows(table) if r.scene == '4_12')
    assert (read_mask(lossy) == paint(datasets['potsdam'].palette, 5 + 1, (64, 80))[1]).all()
    shutil.copy(tmp_path/lossy.mask_path, tmp_path/'5_Labels_all/top_potsdam_2_10_label.tif')
    with pytest.raises(BadImage) as e: read_mask(next(r for r in rows(table) if r.scene == '2_10'))
    assert 'top_potsdam_2_10_label.tif' in message(e)
    assert snap(np.array([[(252, 255, 0)]], np.uint8)).tolist() == [[[255, 255, 0]]]


def test_potsdam_with_other_bands_only_says_what_to_add(tmp_path):
    (tmp_path/'4_Ortho_RGBIR').mkdir()
    (tmp_path/'4_Ortho_RGBIR/top_potsdam_2_10_RGBIR.tif').write_bytes(b'x')
    with pytest.raises(DataNotFound) as e: scan(tmp_path, 'potsdam')
    assert 'RGBIR' in message(e) and '2_Ortho_RGB.zip' in message(e)


def test_padding_colour_of_a_foreign_splitter_is_an_error_not_impervious_surface(tmp_path):
    fake_dataset('vaihingen', tmp_path)
    path = tmp_path/'eroded/top_mosaic_09cm_area1_noBoundary.tif'
    stored = np.array(Image.open(path))
    stored[:5] = (6, 0, 0)
    Image.fromarray(stored).save(path)
    with pytest.raises(BadImage) as e: read_mask(rows(scan(tmp_path, 'vaihingen'))[0])
    assert path.name in message(e) and '(6, 0, 0) on 400 px' in message(e)


def test_loveda_ids_no_data_and_hidden_test_labels(tmp_path):
    spec = datasets['loveda']
    assert spec.decode(np.arange(8, dtype=np.uint8)[None]).tolist() == [[IGNORE, 0, 1, 2, 3, 4, 5, 6]]
    assert spec.classes[0] == 'background' and len(spec.classes) == 7
    with pytest.raises(BadImage): spec.decode(np.array([[8]], np.uint8))
    table = scan(fake_dataset('loveda', tmp_path), 'loveda')
    assert table.groupby('split').size().to_dict() == {'train': 4, 'val': 4, 'test': 4}
    assert table[table.split == 'test'].mask_path.isna().all()
    assert table[table.split != 'test'].mask_path.notna().all()
    assert table.scene.is_unique and table.scene.str.match('(urban|rural)-').all()
    assert (read_mask(rows(table)[0])[:4] == IGNORE).all()
    with pytest.raises(DataNotFound) as e: read_mask(rows(table[table.split == 'test'])[0])
    assert 'hidden' in message(e)


def test_uavid_order_sequences_and_renamed_split_folders(tmp_path):
    spec = datasets['uavid']
    order = 'clutter building road static_car tree low_vegetation human moving_car'
    assert spec.classes == tuple(order.split())
    assert spec.decode(np.array([[(0, 0, 0), (192, 0, 192), (64, 0, 128)]], np.uint8)).tolist() == [[0, 3, 7]]
    table = scan(fake_dataset('uavid', tmp_path), 'uavid')
    splits = table.groupby('scene').split.first().to_dict()
    assert splits == {'seq1': 'train', 'seq2': 'train', 'seq16': 'val', 'seq21': 'test'}
    assert table.groupby('scene').size().eq(2).all() and table[table.split == 'test'].mask_path.isna().all()
    for old, new in (('train', 'uavid_train'), ('valid', 'uavid_val'), ('test', 'uavid_test')):
        (tmp_path/old).rename(tmp_path/new)
    again = scan(tmp_path, 'uavid')
    assert again.image_id.tolist() == table.image_id.tolist() and again.split.tolist() == table.split.tolist()


def test_floodnet_ids_are_as_stored_and_a_folder_above_is_fine(tmp_path):
    fake_dataset('floodnet', tmp_path/'FloodNet-Supervised_v1.0')
    table = scan(tmp_path, 'floodnet')
    assert table.path[0].startswith('FloodNet-Supervised_v1.0/train/train-org-img/')
    assert table.mask_path.notna().all()
    assert datasets['floodnet'].decode(np.arange(10, dtype=np.uint8)[None]).tolist() == [list(range(10))]
    assert datasets['floodnet'].classes[1:3] == ('building_flooded', 'building_non_flooded')


def test_one_split_alone_is_fine_an_empty_split_is_not(tmp_path):
    fake_dataset('loveda', tmp_path)
    shutil.rmtree(tmp_path/'Train')
    shutil.rmtree(tmp_path/'Test')
    assert set(scan(tmp_path, 'loveda').split) == {'val'}
    (tmp_path/'Train/Urban/images_png').mkdir(parents=True)
    with pytest.raises(DataNotFound) as e: scan(tmp_path, 'loveda')
    assert 'split train is empty' in message(e)
    with pytest.raises(DataNotFound) as e: scan(fake_dataset('folder', tmp_path/'f'), split='validation')
    assert "'validation'" in message(e) and 'val' in message(e)


# ---- bad input: one test each

def test_missing_folder(tmp_path):
    with pytest.raises(DataNotFound, match='no folder .*nowhere'): scan(tmp_path/'nowhere')
    with pytest.raises(UnknownName, match='loveda'): scan(tmp_path, 'lovda')


def test_folder_without_images_lists_what_is_there(tmp_path):
    (tmp_path/'readme.txt').write_text('x')
    for name in OFFICIAL:
        with pytest.raises(DataNotFound) as e: scan(tmp_path, name)
        assert 'readme.txt' in message(e) and datasets[name].layout in message(e)


def test_mask_missing_and_mask_of_another_size(pair):
    root, spec, image, mask = pair
    Image.fromarray(mask[:10]).save(root/'masks/a.png')
    with pytest.raises(BadImage) as e: scan(root, spec)
    assert 'a.png' in message(e) and '30x10' in message(e) and '30x20' in message(e)
    (root/'masks/a.png').unlink()
    with pytest.raises(DataNotFound) as e: scan(root, spec)
    assert 'masks/a.png' in message(e)


def test_many_faults_are_counted_and_can_be_skipped(pair):
    root, spec, image, mask = pair
    for i in range(3): Image.fromarray(image[::-1] // (i + 1)).save(root/f'images/b{i}.png')
    with pytest.raises(DataNotFound) as e: scan(root, spec)
    assert 'b0.png' in message(e) and '2 more' in message(e) and "bad='skip'" in message(e)
    table = scan(root, spec, bad='skip')
    assert table.path.tolist() == ['images/a.png'] and 'left out 3 (unusable)' in summary(table)


def test_unknown_colour_names_file_colour_and_count(pair):
    root, _, image, mask = pair
    stored = colourise(mask, RGB)
    stored[0, :7] = (1, 2, 3)
    Image.fromarray(stored).save(root/'masks/a.png')
    spec = make_spec('t', 'abc', palette=RGB)
    with pytest.raises(BadImage) as e: read_mask(rows(scan(root, spec))[0], spec)
    assert 'masks/a.png' in message(e) and '(1, 2, 3) on 7 px' in message(e)
    ignoring = make_spec('t', 'abc', palette=RGB, ignore=[(1, 2, 3)])
    expected = np.where(np.arange(600).reshape(20, 30) < 7, IGNORE, mask)
    assert (read_mask(rows(scan(root, ignoring))[0], ignoring) == expected).all()


def test_class_id_out_of_range_names_file(pair):
    root, spec, image, mask = pair
    Image.fromarray(np.where(mask == 0, 9, mask).astype(np.uint8)).save(root/'masks/a.png')
    with pytest.raises(BadImage) as e: read_mask(rows(scan(root, spec))[0], spec)
    assert 'masks/a.png' in message(e) and f'9 on {(mask == 0).sum()} px' in message(e)


def test_all_ignore_tile_is_a_counted_skip(pair):
    root, spec, image, mask = pair
    mask[:, :10] = IGNORE
    Image.fromarray(mask).save(root/'masks/a.png')
    tiles = tile(scan(root, spec), 10, spec=spec, min_valid=0.01)
    assert len(tiles) == 4 and (tiles.x >= 10).all() and 'left out 2 (tiles under 1% valid)' in summary(tiles)
    Image.fromarray(np.full_like(mask, IGNORE)).save(root/'masks/a.png')
    with pytest.raises(DataNotFound) as e: tile(scan(root, spec), 10, spec=spec)
    assert 'll 6 tiles' in message(e)


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tif'])
def test_one_pixel_image(tmp_path, suffix):
    (tmp_path/'images').mkdir()
    Image.new('RGB', (1, 1), (255, 255, 255)).save(tmp_path/f'images/a.{suffix}')
    spec = make_spec('t', 'ab', masks=None)
    table = scan(tmp_path, spec)
    assert (table.w[0], table.h[0]) == (1, 1) and read_image(rows(table)[0]).shape == (3, 1, 1)
    padded = tile(table, 4, min_valid=0)
    assert read_image(rows(padded)[0]).shape == (3, 4, 4) and read_valid(rows(padded)[0]).sum() == 1
    with pytest.raises(DataNotFound): tile(table, 4)


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bit_is_named(tmp_path, suffix):
    (tmp_path/'images').mkdir()
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path/f'images/deep.{suffix}')
    with pytest.raises(BadImage) as e: scan(tmp_path, make_spec('t', 'ab', masks=None))
    assert f'deep.{suffix}' in message(e) and 'stretch' in message(e)


def test_16_bit_rgb_png_is_not_read_as_8_bit(tmp_path):
    import rasterio
    (tmp_path/'images').mkdir()
    profile = dict(driver='PNG', width=4, height=4, count=3, dtype='uint16')
    with rasterio.open(tmp_path/'images/deep.png', 'w', **profile) as f:
        f.write(np.full((3, 4, 4), 4000, np.uint16))
    with pytest.raises(BadImage) as e: scan(tmp_path, make_spec('t', 'ab', masks=None))
    assert 'deep.png' in message(e)


@pytest.mark.parametrize('mode,suffix', [
    ('L', 'png'), ('L', 'tif'), ('RGBA', 'png'), ('RGBA', 'tif'),
    ('CMYK', 'jpg'), ('P', 'png'), ('LA', 'png'), ('1', 'png'),
])
def test_grey_alpha_palette_and_print_colours_become_rgb(tmp_path, mode, suffix):
    (tmp_path/'images').mkdir()
    source = Image.fromarray(paint(RGB, 1, (20, 30))[0])
    source.convert(mode).save(tmp_path/f'images/a.{suffix}')
    row = rows(scan(tmp_path, make_spec('t', 'ab', masks=None)))[0]
    image = read_image(row)
    assert image.shape == (3, 20, 30) and image.dtype == np.float32 and 0 <= image.min() <= image.max() <= 1
    if mode == 'RGBA': assert np.allclose(image * 255, np.asarray(source).transpose(2, 0, 1))
    if mode == 'L': assert (image[0] == image[1]).all()


@pytest.mark.parametrize('fraction', [0.3, 0.7, 0.98])
@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_truncated_file_is_named_by_scan(tmp_path, suffix, fraction):
    (tmp_path/'images').mkdir()
    path = tmp_path/f'images/cut.{suffix}'
    Image.fromarray(paint(RGB, 1, (100, 120))[0]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * fraction)])
    with pytest.raises(BadImage) as e: scan(tmp_path, make_spec('t', 'ab', masks=None))
    assert f'cut.{suffix}' in message(e)


def test_jpeg_with_bytes_after_its_end_is_fine(tmp_path):
    (tmp_path/'images').mkdir()
    Image.fromarray(paint(RGB, 1, (20, 30))[0]).save(tmp_path/'images/a.jpg')
    with open(tmp_path/'images/a.jpg', 'ab') as f: f.write(b'camera maker note' * 10)
    assert len(scan(tmp_path, make_spec('t', 'ab', masks=None))) == 1


def test_empty_file_and_web_page_are_named(tmp_path):
    (tmp_path/'images').mkdir()
    for content in (b'', b'<html>please log in</html>'):
        (tmp_path/'images/a.png').write_bytes(content)
        with pytest.raises(BadImage) as e: scan(tmp_path, make_spec('t', 'ab', masks=None))
        assert 'a.png' in message(e)
    (tmp_path/'images/a.png').rename(tmp_path/'images/a.tif')
    with pytest.raises(BadImage) as e: scan(tmp_path, make_spec('t', 'ab', masks=None))
    assert 'a.tif' in message(e)


def test_4_band_geotiff_is_named(tmp_path):
    import rasterio
    (tmp_path/'images').mkdir()
    profile = dict(driver='GTiff', width=8, height=8, count=4, dtype='uint8', photometric='MINISBLACK')
    with rasterio.open(tmp_path/'images/nir.tif', 'w', **profile) as f:
        f.write(np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(BadImage) as e: scan(tmp_path, make_spec('t', 'ab', masks=None))
    assert 'nir.tif' in message(e) and '4 bands' in message(e)


def test_equal_content_is_a_counted_skip(pair):
    root, spec, *_ = pair
    for kind in ('images', 'masks'): shutil.copy(root/kind/'a.png', root/kind/'b.png')
    table = scan(root, spec)
    assert len(table) == 1 and 'left out 1 (equal content): images/b.png = images/a.png' in summary(table)


def test_a_stray_file_is_not_an_image(pair):
    root, spec, *_ = pair
    for name in ('a.png.aux.xml', 'Thumbs.db', '.hidden.png', 'a.tfw'): (root/'images'/name).write_bytes(b'x')
    assert len(scan(root, spec)) == 1


# ---- masks as they are stored

@pytest.mark.parametrize('kind', ['uint8', 'three equal bands', 'uint16', 'int32'])
@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_id_masks_in_any_depth(tmp_path, kind, suffix):
    mask = paint(RGB, 2, (9, 13))[1]
    stored = np.repeat(mask[..., None], 3, -1) if kind == 'three equal bands' else mask.astype(kind)
    if suffix == 'png' and stored.dtype == np.int32: pytest.skip('PNG has no 32-bit numbers')
    Image.fromarray(stored).save(tmp_path/f'm.{suffix}')
    row = row_of(tmp_path/'x.png', f'm.{suffix}', 13, 9)
    assert (read_mask(row, make_spec('t', 'abc')) == mask).all()


def test_palette_masks_are_numbers_for_ids_and_colours_for_colours(tmp_path):
    mask = paint(RGB, 2, (9, 13))[1]
    im = Image.fromarray(mask)
    im.putpalette([v for c in RGB for v in c])
    im.save(tmp_path/'m.png')
    row = row_of(tmp_path/'x.png', 'm.png', 13, 9)
    assert (read_mask(row, make_spec('t', 'abc')) == mask).all()
    assert (read_mask(row, make_spec('t', 'abc', palette=RGB)) == mask).all()


def test_colour_masks_for_ids_and_grey_masks_for_colours_are_refused(tmp_path):
    mask = paint(RGB, 2, (9, 13))[1]
    Image.fromarray(colourise(mask, RGB)).save(tmp_path/'c.png')
    Image.fromarray(mask).save(tmp_path/'g.tif')
    with pytest.raises(BadImage, match='c.png'):
        read_mask(row_of(tmp_path/'x', 'c.png', 13, 9), make_spec('t', 'abc'))
    with pytest.raises(BadImage, match='g.tif'):
        read_mask(row_of(tmp_path/'x', 'g.tif', 13, 9), make_spec('t', 'abc', palette=RGB))


@given(st.lists(st.integers(-300, 70000), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_ids_never_pass_undescribed(values):
    raw = np.array([values], np.int32)
    decode = ById(((0, IGNORE), (7, 0), (200, 1)))
    ids = {0: IGNORE, 7: 0, 200: 1}
    if set(values) <= set(ids): assert decode(raw).tolist() == [[ids[v] for v in values]]
    else:
        with pytest.raises(BadImage): decode(raw)


@given(st.integers(0, 2**24 - 1))
@settings(max_examples=100, deadline=None)
def test_colours_never_pass_undescribed(key):
    colour = (key >> 16, key >> 8 & 255, key & 255)
    known = dict(zip(RGB, range(3)))
    raw = np.array([[colour]], np.uint8)
    if colour in known: assert ByColour(tuple(known.items()))(raw)[0, 0] == known[colour]
    else:
        with pytest.raises(BadImage, match=re.escape(str(colour))): ByColour(tuple(known.items()))(raw)


@pytest.mark.parametrize('classes,palette', [
    ((), ()),
    (('a', 'a'), RGB[:2]),
    (('a', 'b'), RGB),
    (('a', 'b'), RGB[:1] * 2),
    (('a',), ((0, 0, 256),)),
    ([str(i) for i in range(255)], default_palette(255)),
])
def test_bad_class_tables_are_refused(classes, palette):
    with pytest.raises(SchemaError): DatasetSpec('t', classes, palette, list, np.asarray)


def test_default_palette_is_distinct():
    assert len(set(default_palette(254))) == 254


def test_colourise_and_legend():
    spec = datasets['floodnet']
    mask = np.array([[0, 1, 1, IGNORE]], np.uint8)
    painted = colourise(mask, spec.palette, ignore=(9, 9, 9))
    assert painted[0].tolist() == [list(rgb) for rgb in (*spec.palette[:2], spec.palette[1], (9, 9, 9))]
    assert np.allclose(legend(spec, mask).fraction[:2], (1 / 3, 2 / 3)) and legend(spec).hex[1] == '#ff0000'
    with pytest.raises(Incompatible, match='10'): colourise(np.array([[10]], np.uint8), spec.palette)


# ---- own datasets and the folder format

def test_generic_folder_with_scenes_and_without_masks(tmp_path):
    table = scan(fake_dataset('generic', tmp_path), generic_spec())
    assert sorted(set(table.scene)) == ['east', 'north', 'south']
    assert set(table.split) == {''} and (table.gsd_m == 0.2).all()
    without_masks = make_spec('g', 'abc', images='img/*', masks=None)
    unlabelled = scan(tmp_path, replace(generic_spec(), find=without_masks.find))
    assert unlabelled.mask_path.isna().all() and unlabelled.mask_path[0] is None
    assert len(tile(unlabelled, 32, spec=generic_spec())) > 0


def test_own_dataset_needs_a_description_to_be_read(tmp_path):
    row = rows(scan(fake_dataset('generic', tmp_path), generic_spec()))[0]
    with pytest.raises(DataNotFound, match='datasets.register'): read_mask(row)
    datasets.register('generic', generic_spec())
    try: assert read_mask(row).shape == (64, 80)
    finally: del datasets.entries['generic']


def test_masks_beside_images_ids_and_split_by_path(tmp_path):
    for split in ('train', 'test'):
        (tmp_path/split).mkdir()
        image, mask = paint(RGB, len(split), (8, 8))
        Image.fromarray(image).save(tmp_path/split/'p.jpg')
        Image.fromarray(mask * 40 + 40).save(tmp_path/split/'p_gt.png')
    spec = make_spec('t', 'abc', images='*/*.jpg', masks='{folder}/{stem}_gt.png', ids=(40, 80, 120),
                     split=lambda p: p.parts[0], scene=lambda p: p.parts[0])
    table = scan(tmp_path, spec)
    assert table.split.tolist() == ['test', 'train']
    assert table.mask_path.tolist() == ['test/p_gt.png', 'train/p_gt.png']
    assert (read_mask(rows(table)[1], spec) == paint(RGB, 5, (8, 8))[1]).all()
    with pytest.raises(SchemaError): make_spec('t', 'abc', ids=(1, 2))


def test_masks_of_nested_folders(tmp_path):
    for seed, place in enumerate('bc'):
        (tmp_path/f'a/{place}/images').mkdir(parents=True)
        (tmp_path/f'masks/a/{place}/images').mkdir(parents=True)
        image, mask = paint(RGB, seed, (8, 8))
        Image.fromarray(image).save(tmp_path/f'a/{place}/images/x.jpg')
        Image.fromarray(mask).save(tmp_path/f'masks/a/{place}/images/x.png')
    spec = make_spec('t', 'abc', images='a/*/images/*.jpg', masks='masks/{folder}/{stem}.png')
    table = scan(tmp_path, spec)
    assert table.mask_path.tolist() == ['masks/a/b/images/x.png', 'masks/a/c/images/x.png']
    assert (read_mask(rows(table)[1], spec) == paint(RGB, 1, (8, 8))[1]).all()


def test_folder_format(tmp_path):
    table = scan(fake_dataset('folder', tmp_path))
    assert set(table.dataset) == {'fake_folder'} and (table.gsd_m == 0.5).all()
    assert table.groupby('split').size().to_dict() == {'train': 9, 'val': 3, 'test': 3}
    assert spec_of(rows(table)[0]).classes == ('building', 'road', 'vegetation', 'water')
    check_leak(table)


def test_folder_format_faults_name_the_file(tmp_path):
    fake_dataset('folder', tmp_path)
    about = json.loads((tmp_path/'classes.json').read_text())
    (tmp_path/'classes.json').write_text(json.dumps({'classes': [{'id': 0, 'name': 'a'}]}))
    with pytest.raises(SchemaError, match='classes.json.*rgb'): scan(tmp_path)
    (tmp_path/'classes.json').write_text('{')
    with pytest.raises(SchemaError, match='classes.json'): scan(tmp_path)
    (tmp_path/'classes.json').write_text(json.dumps(about))
    (tmp_path/'splits.csv').write_text('image,mask\na,b\n')
    with pytest.raises(SchemaError, match='splits.csv.*scene, split'): scan(tmp_path)
    (tmp_path/'splits.csv').write_text('image,mask,scene,split\n')
    with pytest.raises(DataNotFound, match='no images'): scan(tmp_path)
    (tmp_path/'splits.csv').unlink()
    with pytest.raises(DataNotFound, match='splits.csv'): scan(tmp_path)
    (tmp_path/'classes.json').unlink()
    with pytest.raises(DataNotFound, match='classes.json'): scan(tmp_path)


def test_folder_format_ids_with_gaps_empty_masks_and_own_gsd(tmp_path):
    image, mask = paint(RGB, 0, (8, 8))
    Image.fromarray(image).save(tmp_path/'a.png')
    Image.fromarray(image[::-1]).save(tmp_path/'b.png')
    Image.fromarray(mask * 5).save(tmp_path/'m.png')
    classes = [dict(id=10, name='x', rgb=RGB[0]), dict(id=5, name='y', rgb=RGB[1])]
    (tmp_path/'classes.json').write_text(json.dumps(dict(ignore_index=0, classes=classes)))
    lines = 'image,mask,scene,split,gsd_m', 'a.png,m.png,07,train,0.1', 'b.png,,8,test,'
    (tmp_path/'splits.csv').write_text('\n'.join(lines) + '\n')
    table = scan(tmp_path)
    first = rows(table)[0]
    assert table.scene.tolist() == ['07', '8'] and table.mask_path[1] is None
    assert table.gsd_m[0] == 0.1 and np.isnan(table.gsd_m[1])
    assert (read_mask(first) == np.array([IGNORE, 0, 1])[mask]).all() and spec_of(first).classes == ('y', 'x')


def test_scan_is_deterministic_and_ids_are_digests(tmp_path):
    fake_dataset('loveda', tmp_path)
    a = scan(tmp_path, 'loveda')
    b = scan(tmp_path, 'loveda')
    assert a.equals(b) and a.image_id[3] == file_id(tmp_path/a.path[3])


# ---- windows and tiles

pixels = st.integers(1, 40)


@given(pixels, pixels, st.integers(1, 25), st.integers(1, 30), st.sampled_from(['pad', 'shift', 'drop']))
@settings(max_examples=80, deadline=None)
def test_tiles_cover_the_image(w, h, size, stride, edge):
    row = dict(image_id='ff', dataset='t', scene='s', split='', root='.', path='a.png', mask_path=None,
               x=0, y=0, w=w, h=h, gsd_m=1.0)
    table = pd.DataFrame([row])
    try: tiles = tile(table, size, stride, edge, min_valid=0)
    except DataNotFound:
        assert edge == 'drop' and (w < size or h < size)
        return
    covered = np.zeros((h + size, w + size), bool)
    for r in rows(tiles):
        covered[r.y:r.y + size, r.x:r.x + size] = True
        assert (r.w, r.h) == (size, size) and r.x < w and r.y < h
        if edge == 'drop' or edge == 'shift' and min(w, h) >= size: assert r.x + size <= w and r.y + size <= h
    if stride <= size and edge != 'drop': assert covered[:h, :w].all()
    assert tiles.image_id.is_unique and list(tiles.columns) == list(table.columns)
    assert ('ff' in set(tiles.image_id)) == (w == h == size)


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_windows_equal_crops_and_padding_is_never_a_class(pair, suffix):
    root, spec, image, mask = pair
    for kind, x in (('images', image), ('masks', mask)):
        (root/kind/'a.png').unlink()
        Image.fromarray(x).save(root/kind/f'a.{suffix}')
    spec = make_spec('t', 'abc', masks=f'masks/{{stem}}.{suffix}')
    for r in rows(tile(scan(root, spec), 16, 12, min_valid=0, spec=spec)):
        x = read_image(r)
        ids = read_mask(r, spec)
        inside = mask[r.y:r.y + 16, r.x:r.x + 16]
        ih, iw = inside.shape
        assert x.shape == (3, 16, 16) and ids.shape == (16, 16) and (ids[:ih, :iw] == inside).all()
        assert np.allclose(x[:, :ih, :iw] * 255, image[r.y:r.y + 16, r.x:r.x + 16].transpose(2, 0, 1))
        assert (ids[ih:] == IGNORE).all() and (ids[:, iw:] == IGNORE).all()
        assert ((ids != IGNORE) == read_valid(r)).all()


def test_tiles_of_tiles_keep_file_coordinates(pair):
    root, spec, image, mask = pair
    table = scan(root, spec)
    nested = tile(tile(table, 10, spec=spec), 5, spec=spec)
    assert sorted(nested.image_id) == sorted(tile(table, 5, spec=spec).image_id)


def test_tiny_windows_of_grey_tiffs(tmp_path):
    grey = np.arange(40, dtype=np.uint8).reshape(4, 10)
    Image.fromarray(grey).save(tmp_path/'g.tif')
    for h in (1, 3, 4):
        x = read_image(row_of(tmp_path/'g.tif', None, 3, h))
        assert np.allclose(x * 255, np.repeat(grey[None, :h, :3], 3, 0))


def test_window_outside_the_file_is_an_error(pair):
    root, spec, *_ = pair
    with pytest.raises(BadImage) as e: read_image(row_of(root/'images/a.png', None, 4, 4, x=30))
    assert 'a.png' in message(e)


def test_tiling_keeps_the_notes_of_scan_and_adds_its_own(pair):
    root, spec, image, mask = pair
    mask[:, :10] = IGNORE
    Image.fromarray(mask).save(root/'masks/a.png')
    for kind in ('images', 'masks'): shutil.copy(root/kind/'a.png', root/kind/'b.png')
    table = scan(root, spec)
    before = dict(table.attrs['skipped'])
    tiles = tile(table, 10, spec=spec)
    assert set(before) == {'equal content'} and table.attrs['skipped'] == before
    assert set(tiles.attrs['skipped']) == {'equal content', 'tiles under 50% valid'}
    assert tiles.attrs['skipped']['equal content'] == ['images/b.png = images/a.png']
    assert len(tiles.attrs['skipped']['tiles under 50% valid']) == 2


def test_tile_arguments(pair):
    table = scan(pair[0], pair[1])
    for bad in (dict(size=0), dict(size=4, stride=-1), dict(size=4, edge='wrap')):
        with pytest.raises(Incompatible): tile(table, **bad)
    with pytest.raises(DataNotFound, match='smaller than a tile'): tile(table, 99, edge='drop', spec=pair[1])


# ---- class balance, real folders

def test_class_fractions(tmp_path):
    table = scan(fake_dataset('folder', tmp_path))
    balance = class_fractions(table)
    masks = [read_mask(r).ravel() for r in rows(table[table.split == 'val'])]
    counts = np.bincount(np.concatenate(masks), minlength=256)
    assert np.allclose(balance.loc['val'], counts[[0, 1, 2, 3, IGNORE]] / counts.sum())
    assert set(balance.index) == {'train', 'val', 'test'} and list(balance)[-1] == 'ignore'
    with pytest.raises(Incompatible): class_fractions(pd.concat([table, table.assign(dataset='other')]))


REAL = ('amazon_forest', 'czech_ortho', 'dronedeploy', 'dubai_mbrsc', 'mumbai_pleiades')


@real
@pytest.mark.parametrize('name', REAL)
def test_real_folder_scans(name):
    root = Path(os.environ['RSSQA_REAL'])/'seg'/name
    table = scan(root)
    listed = pd.read_csv(root/'splits.csv', dtype=str)
    assert len(table) == len(listed) and table.mask_path.notna().all() and table.attrs['skipped'] == {}
    assert table.w.astype(str).tolist() == listed.width.tolist()
    assert table.scene.tolist() == listed.scene.tolist()
    check_leak(table)
    row = rows(table)[0]
    assert read_image(row).shape == (3, row.h, row.w) and read_mask(row).shape == (row.h, row.w)
    assert set(folds(table, 4)) == set(range(4))


@real
@pytest.mark.parametrize('name', ['mumbai_pleiades', 'dubai_mbrsc'])
def test_real_class_fractions_agree_with_the_folder(name):
    root = Path(os.environ['RSSQA_REAL'])/'seg'/name
    about = json.loads((root/'classes.json').read_text())
    balance = class_fractions(scan(root))
    for split, shares in about['class_fraction'].items():
        assert np.allclose(balance.loc[split, list(shares)], list(shares.values()), atol=2e-5)


# ---- hostile files in a folder

PLAIN = make_spec('plain', ['field'], masks=None)


def test_a_huge_sparse_tiff_is_scanned_and_cut_but_never_read_whole(tmp_path):
    (tmp_path/'images').mkdir()
    sparse_tiff(tmp_path/'images/huge.tif')
    table = scan(tmp_path, PLAIN)
    row = table.iloc[0]
    assert (row.w, row.h) == (100_000, 100_000)
    with pytest.raises(BadImage, match='tiles'): read_image(row)
    one_tile = row.copy()
    one_tile[['x', 'y', 'w', 'h']] = 99_000, 50_000, 1000, 64
    assert read_image(one_tile).shape == (3, 64, 1000)


@pytest.mark.parametrize('name', ['vrt.tif', 'link.png', 'lat\udcfcin.png', 'big.png'])
def test_one_hostile_file_does_not_lose_the_folder(tmp_path, monkeypatch, name):
    (tmp_path/'images').mkdir()
    Image.new('RGB', (8, 6), (1, 2, 3)).save(tmp_path/'images/good.png')
    path = tmp_path/'images'/name
    if name == 'vrt.tif': path.write_text('<VRTDataset rasterXSize="8" rasterYSize="6"></VRTDataset>')
    elif name == 'link.png': path.symlink_to('gone.png')
    else:
        Image.new('RGB', (9, 6)).save(tmp_path/'images/x.png')
        (tmp_path/'images/x.png').rename(path)
    if name == 'big.png': monkeypatch.setattr(core, 'MAX_PIXELS', 50)
    with pytest.raises(Problem) as caught: scan(tmp_path, PLAIN)
    assert str(caught.value).encode() and caught.value.todo
    assert list(scan(tmp_path, PLAIN, bad='skip').path) == ['images/good.png']


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_a_sideways_photograph_has_the_size_it_is_read_with(tmp_path, orientation):
    (tmp_path/'images').mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (40, 24)).save(tmp_path/'images/x.jpg', exif=exif)
    row = scan(tmp_path, PLAIN).iloc[0]
    assert (row.w, row.h) == ((40, 24) if orientation < 5 else (24, 40))
    assert read_image(row).shape == (3, row.h, row.w) and read_valid(row).all()
