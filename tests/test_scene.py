"Scenes: every pixel in one cell, foreign grids, resuming, refusals, rasters that never stay half written."
import json

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.transform import from_origin
from rio_cogeo.cogeo import cog_validate

from rssqa.core import BadImage, Incompatible, Problem
from rssqa.data.synthetic import CLASSES, scene
from rssqa.quality.maps import class_table
from rssqa.quality.pack import open_pack
from rssqa.scene.assess import SceneTask, assess_cells, cell_posterior, summarise_cells
from rssqa.scene.assess_scene import assess_scene
from rssqa.scene.card import class_table_of, reasons_by_area
from rssqa.scene.outputs import CellIndex, block_posterior, region_table, window_weights, write_regions
from rssqa.scene.raster import Grid, open_scene, open_scene_map, scene_cells

SIDE = 320
ORIGIN = (500_000, 5_500_000)
TABLE = class_table(CLASSES)
UTM = rasterio.crs.CRS.from_epsg(32633).to_wkt()
GRID = Grid(SIDE, SIDE, (0.5, 0, ORIGIN[0], 0, -0.5, ORIGIN[1]), UTM)


def write(path, bands, **options):
    bands = np.asarray(bands)
    profile = dict(driver='GTiff', height=bands.shape[1], width=bands.shape[2], count=len(bands), dtype=bands.dtype)
    place = dict(crs='EPSG:32633', transform=from_origin(*ORIGIN, 0.5, 0.5))
    with rasterio.open(path, 'w', **profile | place | options) as f: f.write(bands)
    return str(path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A drawn scene and two maps of it."
    home = tmp_path_factory.mktemp('scene')
    drawn = scene('town', seed=5, size=SIDE)
    rng = np.random.default_rng(0)
    maps = {}
    for name, share in dict(good=0.1, poor=0.4).items():
        wrong = np.kron(rng.random((SIDE // 8, SIDE // 8)) < share, np.ones((8, 8), bool))
        ids = np.where(wrong, (drawn.mask + 1) % len(CLASSES), drawn.mask)
        maps[name] = write(home/f'{name}.tif', ids[None].astype(np.uint8))
    image = write(home/'image.tif', (drawn.image * 254 + 1).astype(np.uint8))
    return dict(home=home, image=image, maps=maps, drawn=drawn)


@pytest.fixture(scope='module')
def task(files):
    pack = open_pack(None)
    return SceneTask(files['image'], files['maps'], TABLE, pack=(str(pack.folder), pack.device))


@pytest.fixture(scope='module')
def cells(task, tmp_path_factory): return assess_cells(task, tmp_path_factory.mktemp('cells')/'out', workers=1)


@pytest.mark.parametrize('width, height', [(1, 7), (255, 256), (257, 300), (448, 449), (1000, 300)])
def test_every_pixel_lies_in_one_cell_and_in_its_window(width, height):
    count = np.zeros((height, width), int)
    for cell in scene_cells(Grid(width, height, GRID.transform)):
        left, top, right, bottom = cell.box
        near, high, far, low = cell.window
        count[top:bottom, left:right] += 1
        assert near <= left and right <= far and high <= top and bottom <= low
        assert far - near == min(256, width) and low - high == min(256, height)
    assert (count == 1).all()


def test_inner_cells_do_not_depend_on_the_extent():
    small, large = (scene_cells(Grid(n, n, GRID.transform)) for n in (1000, 3000))
    same = {(c.row, c.column): c for c in large}
    inner = [c for c in small if c.row < 4 and c.column < 4]
    assert len(inner) == 16 and all(same[c.row, c.column] == c for c in inner)


@pytest.mark.parametrize('dx, dy', [(0, 0), (1, 0), (32, 33), (191, 192), (77, 500)])
@pytest.mark.parametrize('width, height', [(300, 700), (1000, 256), (449, 448)])
def test_every_pixel_lies_in_one_cell_wherever_the_scene_was_cut_out(dx, dy, width, height):
    place = (0.5, 0, ORIGIN[0] + 0.5 * dx, 0, -0.5, ORIGIN[1] - 0.5 * dy)
    count = np.zeros((height, width), int)
    for cell in scene_cells(Grid(width, height, place, UTM)):
        left, top, right, bottom = cell.box
        near, high, far, low = cell.window
        count[top:bottom, left:right] += 1
        assert near <= left and right <= far and high <= top and bottom <= low
        assert far - near == min(256, width) and low - high == min(256, height) and near >= 0 and far <= width
        if left: assert left - near >= 32
        if right < width: assert far - right >= 32
    assert (count == 1).all()


@pytest.mark.parametrize('dx, dy', [(1, 0), (100, 37), (192, 192), (250, 511)])
def test_cells_of_an_extract_are_those_of_the_whole(dx, dy):
    whole = Grid(2000, 1800, GRID.transform, UTM)
    extract = Grid(1400, 1200, (0.5, 0, ORIGIN[0] + 0.5 * dx, 0, -0.5, ORIGIN[1] - 0.5 * dy), UTM)
    known = {cell.window: cell.box for cell in scene_cells(whole)}
    inner = 0
    for cell in scene_cells(extract):
        near, high, far, low = cell.window
        if near == 0 or high == 0 or far == 1400 or low == 1200: continue
        moved = (near + dx, high + dy, far + dx, low + dy)
        left, top, right, bottom = cell.box
        assert known[moved] == (left + dx, top + dy, right + dx, bottom + dy)
        inner += 1
    assert inner >= 16


def test_an_extract_has_the_answers_of_the_whole(tmp_path):
    "Not a bit differs where the window of a cell lies inside both."
    drawn = scene('town', seed=9, size=600)
    ids = np.where(np.random.default_rng(0).random(drawn.mask.shape) < 0.2, 1, drawn.mask).astype(np.uint8)
    pack = open_pack(None)
    answers = []
    for name, dx, dy in (('whole', 0, 0), ('extract', 37, 11)):
        place = dict(transform=from_origin(ORIGIN[0] + 0.5 * dx, ORIGIN[1] - 0.5 * dy, 0.5, 0.5))
        image = write(tmp_path/f'{name}.tif', (drawn.image[:, dy:, dx:] * 254 + 1).astype(np.uint8), **place)
        maps = dict(a=write(tmp_path/f'{name}_a.tif', ids[None, dy:, dx:], **place))
        task = SceneTask(image, maps, TABLE, pack=(str(pack.folder), pack.device))
        cells = assess_cells(task, tmp_path/f'{name}_out', workers=1)
        boxes = [tuple(np.array(window) + (dx, dy, dx, dy)) for window in cells.window]
        answers.append({box: (row.predicted[0], row.posterior) for box, row in zip(boxes, cells.itertuples())})
    whole, extract = answers
    common = set(whole) & set(extract)
    assert common and all(whole[box] == extract[box] for box in common)


@pytest.mark.parametrize('margin', [128, -1, 300])
def test_a_margin_that_leaves_no_cell_is_refused(margin):
    with pytest.raises(Incompatible, match='(?i)margin'): scene_cells(GRID, 256, margin)


def test_a_map_of_another_resolution_and_coordinate_system_is_resampled(files, tmp_path):
    from rasterio.warp import Resampling, calculate_default_transform, reproject
    truth = files['drawn'].mask.astype(np.uint8)
    bounds = rasterio.transform.array_bounds(SIDE, SIDE, from_origin(*ORIGIN, 0.5, 0.5))
    transform, width, height = calculate_default_transform('EPSG:32633', 'EPSG:4326', SIDE, SIDE, *bounds)
    turned = np.full((height, width), 255, np.uint8)
    reproject(truth, turned, src_transform=from_origin(*ORIGIN, 0.5, 0.5), src_crs='EPSG:32633',
              dst_transform=transform, dst_crs='EPSG:4326', resampling=Resampling.nearest, dst_nodata=255)
    path = write(tmp_path/'degrees.tif', turned[None], crs='EPSG:4326', transform=transform, nodata=255)
    with open_scene_map(path, TABLE, GRID) as m: read = m.read((32, 32, 288, 288)).ids
    inside = truth[32:288, 32:288]
    assert (read == inside).mean() > 0.9


def test_half_a_pixel_of_shift_is_named(files, tmp_path):
    path = write(tmp_path/'half.tif', files['drawn'].mask[None].astype(np.uint8),
                 transform=from_origin(ORIGIN[0] + 0.25, ORIGIN[1], 0.5, 0.5))
    with open_scene_map(path, TABLE, GRID) as m: assert 'shifted by 0.5 columns and 0 rows' in m.how


@pytest.mark.parametrize('options, words', [
    (dict(transform=from_origin(900_000, 5_500_000, 0.5, 0.5)), 'lies elsewhere'),
    (dict(crs=None, transform=from_origin(0, 0, 1, 1)), None),
])
def test_a_map_elsewhere_is_refused_and_one_without_a_place_is_read_as_it_is(files, tmp_path, options, words):
    path = write(tmp_path/'map.tif', files['drawn'].mask[None].astype(np.uint8), **options)
    if words is None:
        with open_scene_map(path, TABLE, GRID) as m: assert m.how.startswith('taken pixel by pixel')
        return
    with pytest.raises(Incompatible, match=words) as error, open_scene_map(path, TABLE, GRID): pass
    assert str(error.value).count('320x320') == 2


@pytest.mark.parametrize('dtype', ['float32', 'uint8'])
def test_probabilities_on_another_grid_have_no_value_beyond_their_border(files, tmp_path, dtype):
    truth = files['drawn'].mask[:, 100:]
    p = np.eye(len(CLASSES))[truth].transpose(2, 0, 1)
    p = (0.9 * p + 0.1 / len(CLASSES)).astype('float32') if dtype == 'float32' else (255 * p).astype('uint8')
    path = write(tmp_path/'p.tif', p, transform=from_origin(ORIGIN[0] + 50, ORIGIN[1], 0.5, 0.5))
    with open_scene_map(path, TABLE, GRID) as m: read = m.read((0, 0, 256, 256))
    assert (read.ids[:, :100] == 255).all() and (read.ids[:, 100:] == truth[:256, :156]).all()
    strongest = read.probabilities.max(0)[:, 100:]
    assert strongest.min() > 0.9


def test_a_map_of_another_size_without_a_place_is_refused(files, tmp_path):
    path = write(tmp_path/'map.tif', files['drawn'].mask[None, :100].astype(np.uint8), crs=None)
    with pytest.raises(Incompatible, match='(?i)resample it'), open_scene_map(path, TABLE, GRID): pass


@pytest.mark.parametrize('kwargs, words', [
    (dict(bands=(1, 2, 9)), 'counted from 1'),
    (dict(stretch=(5, 5)), 'lower value first'),
    (dict(stretch='best'), "or 'percentiles'"),
])
def test_bad_ways_of_reading_are_refused(files, kwargs, words):
    with pytest.raises(BadImage, match=words), open_scene(files['image'], **kwargs): pass


def test_percentiles_of_a_deep_image_become_0_and_1(files, tmp_path):
    deep = (files['drawn'].image * 9000 + 500).astype(np.uint16)
    with open_scene(write(tmp_path/'deep.tif', deep), stretch='percentiles') as image:
        x, valid = image.read((0, 0, SIDE, SIDE))
    assert valid.all() and np.allclose(np.quantile(x, [0.01, 0.99]), [0, 1], atol=1e-6)


def test_cells_are_finished_once_and_a_folder_belongs_to_one_task(files, task, cells, tmp_path, monkeypatch):
    out = tmp_path/'out'
    first = assess_cells(task, out, workers=1)
    pd.testing.assert_frame_equal(first.drop(columns='posterior'), cells.drop(columns='posterior'))
    monkeypatch.setattr('rssqa.scene.assess.assess_cell', lambda *a: pytest.fail('assessed again'))
    assert len(assess_cells(task, out, workers=1)) == len(first)
    other = SceneTask(files['image'], dict(good=files['maps']['good']), TABLE, pack=task.pack)
    with pytest.raises(Incompatible, match='(?i)cannot go on'): assess_cells(other, out, workers=1)


def test_a_folder_with_other_files_is_not_touched(task, tmp_path):
    (tmp_path/'letter.txt').write_text('a letter')
    with pytest.raises(Incompatible, match='other files'): assess_cells(task, tmp_path, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ['letter.txt']


def test_an_unknown_id_in_one_place_is_named_with_the_place(files, task, tmp_path):
    ids = files['drawn'].mask.astype(np.uint8).copy()
    ids[300:, 300:] = 77
    maps = dict(files['maps'], other=write(tmp_path/'other.tif', ids[None]))
    with pytest.raises(BadImage, match='77.*') as error:
        assess_cells(SceneTask(files['image'], maps, TABLE, pack=task.pack), tmp_path/'out', workers=1)
    assert 'at pixels (64, 64, 320, 320)' in str(error.value)


def test_a_map_without_values_in_a_cell_takes_no_part_there(files, task, tmp_path):
    ids = files['drawn'].mask.astype(np.uint8).copy()
    ids[:, :256] = 255
    maps = dict(files['maps'], part=write(tmp_path/'part.tif', ids[None], nodata=255))
    found = assess_cells(SceneTask(files['image'], maps, TABLE, pack=task.pack), tmp_path/'out', workers=1)
    at = found.set_index(['row', 'column'])
    assert np.isnan(at.predicted[0, 0][2]) and np.isfinite(at.predicted[0, 1]).all()
    table, _ = summarise_cells(found, list(maps))
    assert table.set_index('name').share['part'] < 1 and table.predicted.notna().all()


def test_the_better_map_is_ahead_and_weights_are_pixels(cells, task):
    table, advice = summarise_cells(cells, task.names)
    assert table.name.tolist() == ['good', 'poor'] and 'good' in advice
    weight = cells.pixels.to_numpy()
    predicted = np.stack(cells.predicted.to_numpy())[:, 0]
    assert table.predicted[0] == pytest.approx((weight * predicted).sum() / weight.sum())


def test_blending_leaves_constant_posteriors_as_they_are(cells):
    from rssqa.tables.grid import pack_four_bits
    shape = tuple(cells.points[0])
    flat = np.zeros(shape, np.float32)
    flat[2] = 1
    same = cells.assign(posterior=[pack_four_bits(flat)] * len(cells))
    q = block_posterior(CellIndex(same), (0, 0, SIDE, SIDE), GRID, 64, len(CLASSES))
    assert np.allclose(q[2], 1, atol=0.01) and np.allclose(q.sum(0), 1, atol=0.01)


def test_blocks_do_not_depend_on_where_they_are_cut(cells):
    whole = block_posterior(CellIndex(cells), (0, 0, SIDE, SIDE), GRID, 64, len(CLASSES))
    part = block_posterior(CellIndex(cells), (100, 37, 260, 301), GRID, 64, len(CLASSES))
    np.testing.assert_allclose(part, whole[:, 37:301, 100:260], atol=1e-5)


def test_weights_stay_1_at_the_border_of_the_scene():
    weights = window_weights((0, 64, 256, 320), GRID, 64)
    assert weights[-1, 0] == 1 and weights[0, 0] < 0.02 and weights[128, -1] < 0.02


def test_regions_come_back_from_the_geopackage(cells, task, tmp_path):
    pyogrio = pytest.importorskip('pyogrio')
    shapely = pytest.importorskip('shapely')
    regions = region_table(cells, task.names, GRID)
    path = write_regions(regions, GRID, tmp_path/'regions.gpkg')
    meta, _, geometry, values = pyogrio.raw.read(path)
    read = dict(zip(meta['fields'], values))
    assert meta['crs'] == 'EPSG:32633' and read['best'].tolist() == regions.best.tolist()
    np.testing.assert_allclose(read['good_oa'], regions.good_oa)
    assert sum(shapely.area(shapely.from_wkb(geometry))) == pytest.approx((SIDE * 0.5)**2)


def test_a_scene_leaves_all_files_and_no_others(files, tmp_path):
    answer = assess_scene(files['image'], files['maps'], tmp_path/'out', CLASSES, workers=1)
    names = {p.name for p in (tmp_path/'out').iterdir() if p.is_file()}
    assert names >= {'card.html', 'quality.tif', 'fused.tif', 'quality.qml', 'fused.qml', 'item.json', 'maps.csv'}
    assert not [name for name in names if name.startswith('.')]
    item = json.loads((tmp_path/'out'/'item.json').read_text())
    assert all((tmp_path/'out'/asset['href']).exists() for asset in item['assets'].values())
    west, south, east, north = item['bbox']
    assert west < east and south < north and 14 < west < 16
    for name in ('quality.tif', 'fused.tif'):
        valid, errors, warnings = cog_validate(str(tmp_path/'out'/name), strict=True)
        assert valid and not errors and not warnings
    with rasterio.open(tmp_path/'out'/'fused.tif') as f: fused = f.read(1)
    good = rasterio.open(files['maps']['good']).read(1)
    truth = files['drawn'].mask
    assert (fused == truth).mean() >= (good == truth).mean() - 0.02
    assert 'good <strong>(recommended)</strong>' in (tmp_path/'out'/'card.html').read_text()
    assert str(answer).startswith('Use good')


OWN_CRS = rasterio.crs.CRS.from_proj4('+proj=laea +lat_0=50 +lon_0=15 +ellps=bessel').to_wkt()


@pytest.mark.parametrize('crs, name, start', [(UTM, 'proj:code', 'EPSG:32633'), (OWN_CRS, 'proj:wkt2', 'PROJCRS['),
                                              ('', None, '')])
def test_an_item_follows_the_schema_of_stac(tmp_path, crs, name, start):
    pystac = pytest.importorskip('pystac')
    from pystac.validation import JsonSchemaSTACValidator
    from rssqa.scene.outputs import write_item
    for file in ('quality.tif', 'card.html', 'notes.txt'): (tmp_path/file).write_bytes(b'')
    maps = pd.DataFrame(dict(name=['a'], predicted=[0.9], lower=[0.8], upper=[1.0], recommended=[True]))
    crs_wkt = rasterio.crs.CRS.from_user_input(crs).to_wkt() if crs else ''
    grid = Grid(SIDE, SIDE, (0.5, 0, ORIGIN[0], 0, -0.5, ORIGIN[1]), crs_wkt)
    item = json.loads(write_item(grid, maps, tmp_path, 'scene').read_text())
    validator, item_type = JsonSchemaSTACValidator(), pystac.STACObjectType.ITEM
    validator.validate_core(item, item_type, item['stac_version'])                  # its own copy of the schema
    properties = {key: value for key, value in item['properties'].items() if key in ('proj:code', 'proj:wkt2')}
    assert list(properties) == [name] * bool(name) and all(text.startswith(start) for text in properties.values())
    assert set(item['assets']) == {'quality', 'card'}
    with pytest.raises(pystac.STACValidationError):
        validator.validate_core(item | dict(properties={}), item_type, item['stac_version'])


def test_a_failed_raster_leaves_nothing(files, task, cells, tmp_path, monkeypatch):
    from rssqa.scene import outputs
    def fail(*a): raise BadImage('cannot read a block', '', '')
    monkeypatch.setattr(outputs, '_quality_pixels', fail)
    with pytest.raises(Problem, match='cannot read a block'):
        outputs.write_rasters(task, cells, [0, 1], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_empty_scene_has_no_answer(files, tmp_path):
    image = write(tmp_path/'black.tif', np.zeros((3, SIDE, SIDE), np.uint8), nodata=0)
    pack = open_pack(None)
    task = SceneTask(image, files['maps'], TABLE, pack=(str(pack.folder), pack.device))
    found = assess_cells(task, tmp_path/'out', 1)
    table, advice = summarise_cells(found, list(files['maps']))
    assert set(found.state) == {'empty'} and advice.startswith('No answer') and not table.recommended.any()


def test_a_scene_without_an_answer_has_a_card_that_says_so(files, tmp_path):
    image = write(tmp_path/'black.tif', np.zeros((3, SIDE, SIDE), np.uint8), nodata=0)
    answer = assess_scene(image, files['maps'], tmp_path/'out', CLASSES, workers=1)
    page = (tmp_path/'out'/'card.html').read_text()
    assert answer.advice == 'No answer: the image has no data.' and answer.advice in page and 'no answer</td>' in page
    assert 'Where' not in page and '(recommended)' not in page


@pytest.mark.parametrize('chunk', [1, 64])
def test_empty_cells_do_not_disturb_the_others(files, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr('rssqa.scene.assess.CHUNK', chunk)
    pixels = (files['drawn'].image * 254 + 1).astype(np.uint8)
    pixels[:, :, 224:] = 0
    pixels = np.concatenate([pixels, np.zeros_like(pixels)], 2)                    # the right half has no data
    wide = {}
    for name, path in files['maps'].items():
        with rasterio.open(path) as f: ids = f.read()
        wide[name] = write(tmp_path/f'{name}.tif', np.concatenate([ids, ids], 2))
    image = write(tmp_path/'image.tif', pixels, nodata=0)
    answer = assess_scene(image, wide, tmp_path/'out', CLASSES, workers=1)
    states = answer.cells.groupby('column').state.first()
    assert states.iloc[0] != 'empty' and states.iloc[-1] == 'empty'
    assert answer.table.name[0] == 'good' and answer.table.predicted.notna().all()
    with rasterio.open(tmp_path/'out'/'quality.tif') as f: quality = f.read()
    assert (quality[0, :, -20:] == 255).all() and (quality[0, :, :20] < 255).all()


def test_networks_of_a_pack_make_the_maps_where_there_are_none(files, tmp_path, monkeypatch):
    from rssqa.core import bundled
    options = dict(pack=bundled('demo'), methods=('unet', 'pspnet'), workers=1)
    answer = assess_scene(files['image'], None, tmp_path/'out', **options)
    assert set(answer.table.name) == {'unet', 'pspnet'} and answer.table.predicted.between(0, 1).all()
    made = tmp_path/'out_maps'
    assert sorted(p.name for p in made.iterdir()) == ['pspnet.tif', 'task.json', 'unet.tif']
    with rasterio.open(made/'unet.tif') as f: p = f.read()
    assert np.abs(p.sum(0, dtype=int) - 255).max() <= len(p) / 2
    monkeypatch.setattr('rssqa.scene.segment.segment_box', lambda *a: pytest.fail('segmented again'))
    again = assess_scene(files['image'], None, tmp_path/'out', **options)
    pd.testing.assert_frame_equal(again.table, answer.table)


def _fill_the_disk(task, cells, out): # in a process of its own: no file may grow beyond 2 kB
    import resource, signal
    from rssqa.scene.outputs import write_rasters
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
    write_rasters(task, cells, [0, 1], out)


def test_a_full_disk_is_named_and_leaves_no_raster(task, cells, tmp_path):
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        with pytest.raises(Incompatible, match='(?i)cannot write .*tif.*make room'):
            pool.submit(_fill_the_disk, task, cells, tmp_path).result()
    assert not list(tmp_path.iterdir())


def test_two_calls_do_not_write_one_folder(task, tmp_path):
    from rssqa.quality.folders import claim_output
    with claim_output(tmp_path/'out'), pytest.raises(Incompatible, match='(?i)another call is writing it'):
        assess_cells(task, tmp_path/'out', workers=1)


def test_a_map_that_is_gone_is_named(files, task, tmp_path):
    maps = dict(files['maps'], gone=str(tmp_path/'gone.tif'))
    with pytest.raises(Problem, match='gone.tif'):
        assess_cells(SceneTask(files['image'], maps, TABLE, pack=task.pack), tmp_path/'out', workers=1)


def test_several_processes_give_the_cells_of_one(task, cells, tmp_path, monkeypatch):
    monkeypatch.setattr('rssqa.scene.assess.CHUNK', 1)
    several = assess_cells(task, tmp_path/'out', workers=2)
    for key in ('predicted', 'lower', 'upper', 'gains'):
        np.testing.assert_allclose(np.stack(several[key]), np.stack(cells[key]), atol=1e-5)


def test_the_command_writes_the_card(files, tmp_path, capsys):
    from rssqa.cli import main
    (tmp_path/'classes.json').write_text(json.dumps(list(CLASSES)))
    maps = [word for name, path in files['maps'].items() for word in ('--map', f'{name}={path}')]
    argv = ['scene', files['image'], *maps, '--classes', str(tmp_path/'classes.json'), '-o', str(tmp_path/'out')]
    with pytest.raises(SystemExit) as stop: main([*argv, '--workers', '1'])
    assert not stop.value.code and 'Use good' in capsys.readouterr().out and (tmp_path/'out'/'card.html').exists()
    with pytest.raises(SystemExit) as stop: main([*argv, '--stretch', 'bright'])
    assert stop.value.code == 2 and 'two numbers such as 0,3000' in capsys.readouterr().err


def test_a_scene_of_one_row_is_refused(files, tmp_path):
    image = write(tmp_path/'row.tif', np.ones((3, 1, SIDE), np.uint8))
    with pytest.raises(BadImage, match='at least'): assess_scene(image, files['maps'], tmp_path/'out', CLASSES)


def test_iou_by_hand():
    table = class_table_of(np.array([[3.0, 1], [2, 4]]), ('a', 'b'))
    assert table.iou.tolist() == pytest.approx([3 / 6, 4 / 7]) and table.area_map.tolist() == pytest.approx([0.4, 0.6])


def test_reasons_are_counted_without_their_numbers():
    reasons = ['30% of the image has no data', '9% of the image has no data', '']
    cells = pd.DataFrame(dict(pixels=[50, 30, 20], reason=reasons))
    assert reasons_by_area(cells) == [('part of the image has no data', 0.8)]


def test_the_posterior_of_a_cell_is_a_distribution(cells):
    q = cell_posterior(cells.iloc[0])
    assert np.abs(q.sum(0) - 1).max() < 0.03
