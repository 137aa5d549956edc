"A pack for tiles of one's own: from networks or maps of other programs, stopped and resumed, mistakes said first."
import json, shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rssqa.cli import main
from rssqa.core import (
    BadImage, DataNotFound, Incompatible, LeakError, Problem, SchemaError, UnknownName, file_id, read_json,
)
from rssqa.data.synthetic import CLASSES, scene, write_scenes
from rssqa.quality import assessor, fit_pack as module
from rssqa.quality.bounds import KNOWN_SOURCE, measure_calibration
from rssqa.quality.fit_pack import card_text, fit_pack, plan_fit, read_tiles, tile_spec
from rssqa.quality.pack import Pack, bundled_pack
from rssqa.quality.recommend import assess, calibrate_pack, rank, score
from rssqa.segment.methods import training
from rssqa.segment.methods.training import Recipe

SHORT = Recipe('nano', steps=4, batch=2, crop=64, lr=5e-3)
NETWORKS = dict(methods=['pspnet'], recipe=SHORT, encoder='', workers=1)
SHARES = dict(good=0.1, fair=0.35, poor=0.7)


@pytest.fixture(scope='module', autouse=True)
def short_training():
    "Fit the assessor in few steps."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assessor, 'TUNE_EPOCHS', (1, 1))
        patch.setattr(assessor, 'CONSENSUS_EPOCHS', (2, 2))
        yield


@pytest.fixture(scope='module')
def town(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('tiles')/'town', 'town', scenes=4, size=64)


def noisy(mask, share, seed):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(mask.shape) < share, rng.integers(0, len(CLASSES), mask.shape), mask).astype(np.uint8)


@pytest.fixture(scope='module')
def maps(town, tmp_path_factory):
    "Maps of three qualities: PNG, npy, and npz with probabilities."
    home = tmp_path_factory.mktemp('maps')
    for name in SHARES: (home/name).mkdir()
    for i, path in enumerate(sorted((town/'masks').glob('*.png'))):
        mask = np.asarray(Image.open(path))
        Image.fromarray(noisy(mask, SHARES['good'], i)).save(home/'good'/path.name)
        np.save(home/'fair'/f'{path.stem}.npy', noisy(mask, SHARES['fair'], i))
        p = np.eye(len(CLASSES), dtype=np.float32)[noisy(mask, SHARES['poor'], i)].transpose(2, 0, 1)
        np.savez(home/'poor'/f'{path.stem}.npz', p=0.8 * p + 0.2 / len(CLASSES))
    return {name: home/name for name in SHARES}


@pytest.fixture(scope='module')
def trained(town, tmp_path_factory): return fit_pack(town, tmp_path_factory.mktemp('trained')/'pack', **NETWORKS)


@pytest.fixture(scope='module')
def own(town, maps, tmp_path_factory):
    return fit_pack(town, tmp_path_factory.mktemp('own')/'pack', maps=maps, encoder='')


@pytest.fixture
def copy(town, tmp_path): return shutil.copytree(town, tmp_path/'town')


@pytest.fixture(scope='module')
def new(): return scene('town', 77, 64)


def maps_of(s, seed=5): return {name: noisy(s.mask, share, seed) for name, share in SHARES.items()}


# ---------------------------------------------------------------- a pack of networks

def test_every_call_opens_the_pack(trained, new):
    pack = Pack(trained)
    assert pack.datasets == ['synth_town'] and pack.methods() == ['pspnet'] and pack.usual() == 'pspnet'
    assert pack.classes() == CLASSES and len(pack.fingerprint()) == 16
    assert 0 <= score(new.image, 'pspnet', pack=pack) <= 1
    assert list(rank(new.image, pack).method) == ['pspnet']
    answer = assess(new.image, pack=pack)
    assert answer.pack == 'pack' and answer.table.predicted.between(0, 1).all()


def test_no_network_segments_what_it_learned(trained, town):
    tiles = read_tiles(town)[0]
    for path in trained.rglob('config.json'):
        config = read_json(path)
        assert set(config['scenes']) < set(tiles.scene)
    assert len(list(trained.rglob('model.safetensors'))) == 3                        # one a fold


def test_the_card(trained):
    card = read_json(trained/'card.json')
    assert card['tiles'] == 16 and card['scenes'] == 4 and card['folds'] == 3 and card['usual'] == 'pspnet'
    assert {'mae', 'coverage', 'width'} <= set(card['measures']['one'])
    assert set(card['seconds']) == {'training', 'segmenting', 'fitting the assessor'}
    for name, expected in card['digests'].items(): assert file_id(trained/name) == expected
    assert 'mean error' in card_text(trained)


def test_a_second_call_changes_nothing(trained, town):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob('*') if path.is_file()}
    assert fit_pack(town, trained, **NETWORKS) == trained
    assert {path: path.stat().st_mtime_ns for path in trained.rglob('*') if path.is_file()} == before


def test_stopped_and_resumed(town, trained, tmp_path, monkeypatch):
    finish = training._finish
    done = []
    def stop_at_third(*args, **options):
        if len(done) == 2: raise KeyboardInterrupt
        done.append(finish(*args, **options))
    monkeypatch.setattr(training, '_finish', stop_at_third)
    with pytest.raises(KeyboardInterrupt): fit_pack(town, tmp_path/'pack', **NETWORKS)
    assert not (tmp_path/'pack'/'pack.json').exists() and len(list(tmp_path.rglob('config.json'))) == 2
    with pytest.raises(DataNotFound): Pack(tmp_path/'pack')
    monkeypatch.setattr(training, '_finish', finish)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('model.safetensors')}
    monkeypatch.setattr(module.Assessor, 'fit_source', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError): fit_pack(town, tmp_path/'pack', **NETWORKS)
    monkeypatch.undo()
    monkeypatch.setattr(assessor, 'TUNE_EPOCHS', (1, 1))
    monkeypatch.setattr(assessor, 'CONSENSUS_EPOCHS', (2, 2))
    pack = fit_pack(town, tmp_path/'pack', **NETWORKS)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    same = [read_json(p/'card.json')['digests'] for p in (pack, trained)]
    assert same[0] == same[1]


# ---------------------------------------------------------------- a pack of maps

def test_own_maps_are_ordered_and_enclosed(own):
    hits, orders = [], []
    for seed in range(90, 96):
        s = scene('town', seed, 64)
        table = assess(s.image, maps_of(s, seed), pack=own).table.set_index('name')
        oa = pd.Series({name: (m == s.mask).mean() for name, m in maps_of(s, seed).items()})
        hits += list(oa.between(table.lower[oa.index], table.upper[oa.index]))
        orders.append(list(table.index) == ['good', 'fair', 'poor'])
    assert np.mean(hits) >= 0.85 and np.mean(orders) > 0.8


def test_intervals_of_a_known_source_cover_scenes_left_out(own):
    calibration = Pack(own).assessor.calibration
    known = calibration[calibration.kind.str.endswith(KNOWN_SOURCE)]
    measured = measure_calibration(known, datasets=['synth_town'])
    measured = measured.set_index(measured.input.str.removesuffix(KNOWN_SOURCE))
    assert (measured.coverage >= 0.75).all() and measured.coverage['few'] >= 0.85 and (measured.scenes == 4).all()
    assert measured.srocc_image['few, ids only'] > 0.5
    few = calibration[(calibration.kind == f'few{KNOWN_SOURCE}') & (calibration.dataset == 'synth_town')]
    assert set(few.method) == set(SHARES) and few.oa.between(0, 1).all()


def test_the_source_brings_class_table_and_usual_map(own, new):
    answer = assess(new.image, maps_of(new), pack=own, source='synth_town')
    assert answer.classes == CLASSES and answer.to_json() == assess(new.image, maps_of(new), pack=own).to_json()
    assert read_json(own/'card.json')['usual'] == 'good' and Pack(own).usual() == 'good'


def test_a_pack_without_networks_says_what_to_do(own, new):
    for call in (lambda: score(new.image, 'good', pack=own), lambda: rank(new.image, Pack(own)),
                 lambda: assess(new.image, pack=own)):
        with pytest.raises(DataNotFound, match='no networks') as e: call()
        assert '--map' in e.value.todo and 'synth_town' in e.value.todo
    with pytest.raises(UnknownName): assess(new.image, maps_of(new), pack=own, source='twon')


def test_unlike_an_assessor_that_says_nothing_about_maps(tmp_path):
    (tmp_path/'pack.json').write_text(json.dumps(dict(networks=dict(a={}))))
    with pytest.raises(SchemaError, match='neither networks nor'): Pack(tmp_path)


def test_a_known_source_of_the_bundled_pack(new):
    answer = assess(new.image, dict(a=np.zeros((64, 64), np.uint8)), pack=bundled_pack(), source='amazon_forest')
    assert answer.classes == Pack(bundled_pack()).classes('amazon_forest')


# ---------------------------------------------------------------- tiles

def test_without_splits_each_tile_is_a_scene(copy, capsys, monkeypatch):
    (copy/'splits.csv').unlink()
    spoken = []
    monkeypatch.setattr(module, 'say', spoken.append)
    tiles, _ = read_tiles(copy)
    assert tiles.scene.nunique() == len(tiles) == 16 and any('scene of its own' in text for text in spoken)


def test_splits_may_name_image_and_scene_only(copy):
    table = pd.read_csv(copy/'splits.csv')[['image', 'scene']]
    table.to_csv(copy/'splits.csv', index=False)
    assert read_tiles(copy)[0].scene.nunique() == 4


@pytest.mark.parametrize('classes', [list(CLASSES), {str(i): name for i, name in enumerate(CLASSES)}])
def test_class_tables_of_other_forms(copy, classes):
    (copy/'classes.json').write_text(json.dumps(classes))
    assert tile_spec(copy).classes == CLASSES and tile_spec(copy).name == 'town'
    assert len(read_tiles(copy)[0]) == 16


def test_tiles_without_a_mask_are_left_out(copy):
    for path in sorted((copy/'masks').iterdir())[:3]: path.unlink()
    (copy/'splits.csv').unlink()
    assert len(read_tiles(copy)[0]) == 13


def spoil_ids(folder):
    path = sorted((folder/'masks').iterdir())[2]
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(path)


def spoil_all(folder):
    for path in (folder/'masks').iterdir(): Image.fromarray(np.full((64, 64), 255, np.uint8)).save(path)


def one_scene(folder):
    table = pd.read_csv(folder/'splits.csv')
    table.assign(scene='only').to_csv(folder/'splits.csv', index=False)


def no_masks(folder):
    shutil.rmtree(folder/'masks')
    (folder/'splits.csv').unlink()


def no_scene_column(folder): pd.read_csv(folder/'splits.csv').drop(columns='scene').to_csv(folder/'splits.csv')


def torn_mask(folder): sorted((folder/'masks').iterdir())[0].write_bytes(b'GIF89a')


FAULTS = [
    (spoil_ids, BadImage, 'undescribed class id'), (spoil_all, Problem, 'nothing to measure'),
    (one_scene, LeakError, '1 scene in 16 tiles'), (no_masks, DataNotFound, 'no masks in'),
    (no_scene_column, SchemaError, 'missing scene'), (torn_mask, BadImage, 'cannot read'),
    (lambda folder: (folder/'classes.json').unlink(), DataNotFound, 'no class table'),
    (lambda folder: (folder/'classes.json').write_text('{"classes": 3}'), Problem, 'class table'),
    (lambda folder: shutil.rmtree(folder), DataNotFound, 'no folder'),
]


@pytest.mark.parametrize('spoil, error, text', FAULTS)
def test_faults_are_found_before_any_work(copy, tmp_path, spoil, error, text):
    spoil(copy)
    with pytest.raises(error) as e: fit_pack(copy, tmp_path/'pack', **NETWORKS)
    assert text in str(e.value) and e.value.found and e.value.todo or text == 'no folder'
    assert not (tmp_path/'pack').exists()


@pytest.mark.parametrize('options, error, text', [
    (dict(methods=['pspnett']), UnknownName, 'pspnet'),
    (dict(recipe=Recipe('nanno')), UnknownName, 'nano'),
    (dict(encoder='clip-rs-mino'), Problem, 'clip-rs-mini'),
    (dict(folds=1), LeakError, '1 fold'),
    (dict(maps=dict(a='.')), Incompatible, 'Found methods pspnet and maps a'),
])
def test_faulty_options(town, tmp_path, options, error, text):
    with pytest.raises(error, match=text): fit_pack(town, tmp_path/'pack', **NETWORKS | options)
    assert not (tmp_path/'pack').exists()


# ---------------------------------------------------------------- maps

def without_three(folder):
    for path in sorted(folder.iterdir())[:3]: path.unlink()


def of_another_size(folder): np.save(sorted(folder.iterdir())[0], np.zeros((32, 32), np.uint8))
def of_another_table(folder): np.save(sorted(folder.iterdir())[0], np.full((64, 64), 99, np.uint8))
def twice(folder): shutil.copy(sorted(folder.iterdir())[0], sorted(folder.iterdir())[0].with_suffix('.tif'))


@pytest.mark.parametrize('spoil, error, text', [
    (without_three, DataNotFound, '13 of 16'), (of_another_size, BadImage, '32x32'),
    (of_another_table, BadImage, '99'), (twice, Incompatible, 'two maps'), (shutil.rmtree, DataNotFound, 'no folder'),
])
def test_faulty_maps(town, maps, tmp_path, spoil, error, text):
    folder = shutil.copytree(maps['fair'], tmp_path/'fair')
    spoil(folder)
    with pytest.raises(error, match=text): fit_pack(town, tmp_path/'pack', maps=dict(fair=folder), encoder='')
    assert not (tmp_path/'pack'/'pack.json').exists()


# ---------------------------------------------------------------- the folder of the pack

def test_other_packs_are_not_overwritten(own, trained, town, maps, tmp_path):
    for out in (own, trained):
        with pytest.raises(Incompatible, match='belongs to another fit'):
            fit_pack(town, out, maps=dict(good=maps['good']), encoder='')
    (tmp_path/'letter.txt').write_text('dear')
    with pytest.raises(Incompatible, match='other files'): fit_pack(town, tmp_path, **NETWORKS)
    with pytest.raises(Incompatible, match='Found a file'): fit_pack(town, tmp_path/'letter.txt', **NETWORKS)


def test_a_changed_tile_is_another_fit(copy, maps, tmp_path):
    plan = plan_fit(copy, tmp_path/'pack', maps=maps, encoder='')
    before = plan.settings()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(sorted((copy/'masks').iterdir())[0])
    after = plan_fit(copy, tmp_path/'pack', maps=maps, encoder='').settings()
    assert before['tiles'] != after['tiles'] and {k for k in after if after[k] != before[k]} == {'tiles'}


# ---------------------------------------------------------------- points

def points_of(folder, seeds, n=8):
    rng = np.random.default_rng(0)
    rows = []
    for seed in seeds:
        s = scene('town', seed, 64)
        Image.fromarray((255 * s.image.transpose(1, 2, 0)).round().astype(np.uint8)).save(folder/f'{seed}.png')
        for name, m in maps_of(s, seed).items():
            (folder/name).mkdir(exist_ok=True)
            Image.fromarray(m).save(folder/name/f'{seed}.png')
        for y, x in rng.integers(0, 64, (n, 2)):
            rows.append(dict(image=f'{seed}.png', x=x, y=y) | {'class': CLASSES[s.mask[y, x]]})
    return pd.DataFrame(rows)


def test_points_calibrate_a_copy(own, tmp_path, new):
    points = points_of(tmp_path, range(30, 33))
    named = {name: tmp_path/name for name in SHARES}
    pack = Pack(calibrate_pack(points, tmp_path/'mine', tmp_path, named, pack=own))
    assert pack.config['calibrated']['points'] == 24 and pack.assessor.shift.spread < 1
    before, after = (assess(new.image, maps_of(new), pack=p) for p in (own, pack))
    assert after.pack == 'mine' and not after.table.predicted.equals(before.table.predicted)
    assert Pack(own).assessor.shift.mean == 0 and not (tmp_path/'mine'/'fit.json').exists()
    with pytest.raises(Incompatible, match='It exists'):
        calibrate_pack(points, tmp_path/'mine', tmp_path, named, pack=own)


def test_faulty_points(own, tmp_path):
    points = points_of(tmp_path, [30])
    named = {name: tmp_path/name for name in SHARES}
    with pytest.raises(SchemaError, match='expected image, x, y, class'):
        calibrate_pack(points.drop(columns='image'), tmp_path/'out', tmp_path, named, pack=own)
    with pytest.raises(DataNotFound, match='no map of 30.png'):
        calibrate_pack(points, tmp_path/'out', tmp_path, dict(good=tmp_path/'nowhere'), pack=own)
    with pytest.raises(SchemaError, match='no class in 8 rows'):
        calibrate_pack(points.assign(**{'class': '?'}), tmp_path/'out', tmp_path, named, pack=own)


def test_points_without_a_class_do_not_count(own, tmp_path):
    points = points_of(tmp_path, [30])
    named = {name: tmp_path/name for name in SHARES}
    more = points.assign(**{'class': ['?', ''] * 4})
    both = pd.concat([points, more], ignore_index=True)
    with_more = Pack(calibrate_pack(both, tmp_path/'with', tmp_path, named, pack=own))
    alone = Pack(calibrate_pack(points, tmp_path/'alone', tmp_path, named, pack=own))
    assert with_more.config['calibrated']['points'] == 8
    assert with_more.assessor.shift.mean == alone.assessor.shift.mean
    with pytest.raises(SchemaError, match='outside'):
        calibrate_pack(points.assign(x=64), tmp_path/'out', tmp_path, named, pack=own)
    assert not (tmp_path/'out').exists()


# ---------------------------------------------------------------- command line

def run(args, capsys, code=0):
    with pytest.raises(SystemExit) as e: main([str(arg) for arg in args])
    out = capsys.readouterr()
    assert e.value.code == code, out.err
    return out.out if code == 0 else out.err


def test_fit_and_assess_on_the_command_line(town, maps, own, new, tmp_path, capsys):
    words = ['fit', town, '-o', own, '--encoder', '']
    for name, folder in maps.items(): words += ['--maps', f'{name}={folder}']
    text = run(words, capsys)                                     # the same settings: the pack is there
    assert 'best on average: good' in text and 'next: rssqa assess IMAGE --map good=PATH' in text
    Image.fromarray((255 * new.image.transpose(1, 2, 0)).round().astype(np.uint8)).save(tmp_path/'new.png')
    for name, m in maps_of(new).items(): Image.fromarray(m).save(tmp_path/f'{name}.png')
    words = ['assess', tmp_path/'new.png', '--pack', own, '--source', 'synth_town', '--json']
    for name in SHARES: words += ['--map', f'{name}={tmp_path/name}.png']
    plain = json.loads(run(words, capsys))
    assert plain['pack'] == 'pack' and [m['name'] for m in plain['maps']] == ['good', 'fair', 'poor']
    assert 'no networks' in run(['score', tmp_path/'new.png', '--pack', own], capsys, code=2)
    assert 'no networks' in run(['recommend', tmp_path, '--pack', own, '-o', tmp_path/'t.csv'], capsys, code=2)


def test_pack_use_opens_it(own, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv('RSSQA_PACK', raising=False)
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    run(['pack', 'use', own], capsys)
    assert 'synth_town' in run(['pack', 'show'], capsys)


def test_calibrate_on_the_command_line(own, tmp_path, capsys):
    points_of(tmp_path, range(30, 32)).to_csv(tmp_path/'points.csv', index=False)
    words = ['pack', 'calibrate', tmp_path/'points.csv', '-o', tmp_path/'mine', '--images', tmp_path, '--pack', own]
    for name in SHARES: words += ['--maps', f'{name}={tmp_path/name}']
    assert '16 points' in run(words, capsys) and Pack(tmp_path/'mine').name == 'mine'


@pytest.mark.parametrize('words, text', [
    (['fit', 'nowhere', '-o', 'x'], 'nowhere'),
    (['fit', '.', '-o', 'x', '--maps', 'a'], 'class table'),
    (['fit', '.', '-o', 'x', '--steps', '0'], '--steps'),
    (['pack', 'calibrate', 'none.csv', '-o', 'x'], 'none.csv'),
])
def test_mistakes_are_said_in_one_line(words, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = run(words, capsys, code=2)
    assert text in error and 'Traceback' not in error and error.count('\n') == 1
    assert not (tmp_path/'x').exists()
