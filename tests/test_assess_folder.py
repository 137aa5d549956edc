"Maps of a whole folder: found by place and name, one row a map, a reason for every image without an answer."
import json, os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import rssqa.quality.assess_folder as module
from rssqa.cli import main
from rssqa.core import DataNotFound, Incompatible
from rssqa.data.synthetic import CLASSES, scene
from rssqa.quality.assess_folder import ROW_COLUMNS, assess_folder
from rssqa.quality.pack import Pack, bundled_pack
from rssqa.quality.recommend import assess

NAMES = ('a.png', 'deep/b.png', 'deep/c.png')


@pytest.fixture(scope='module')
def pack(): return Pack(bundled_pack())


METHODS = dict(good=0.05, fair=0.15, poor=0.6) # share of pixels that are drawn at random


def write_case(home, name, seed): # an image and three maps
    s = scene('town', seed=seed, size=64)
    rng = np.random.default_rng(seed)
    for sub in ('images', *METHODS): (home/sub/name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * s.image.transpose(1, 2, 0)).round().astype(np.uint8)).save(home/'images'/name)
    for method, share in METHODS.items():
        drawn = rng.integers(0, len(CLASSES), s.mask.shape)
        wrong = rng.random(s.mask.shape) < share
        Image.fromarray(np.where(wrong, drawn, s.mask).astype(np.uint8)).save(home/method/name)


@pytest.fixture
def home(tmp_path):
    for i, name in enumerate(NAMES): write_case(tmp_path, name, i)
    (tmp_path/'classes.json').write_text(json.dumps(list(CLASSES)))
    return tmp_path


def folders(home): return {method: home/method for method in METHODS}


def test_rows_are_those_of_single_images(home, pack):
    result = assess_folder(home/'images', folders(home), CLASSES, pack=pack)
    assert result.rows.path.unique().tolist() == sorted(NAMES) and result.skipped.empty
    maps = {name: folder/'deep/b.png' for name, folder in folders(home).items()}
    single = assess(home/'images'/'deep/b.png', maps, CLASSES, pack=pack).table
    rows = result.rows[result.rows.path == 'deep/b.png'].reset_index(drop=True)
    assert rows.name.tolist() == single.name.tolist()
    for column in ROW_COLUMNS: np.testing.assert_array_equal(rows[column], single[column])
    assert 'poor' not in set(result.rows[result.rows.recommended].name)


def test_an_image_without_a_map_and_one_with_two(home, pack):
    (home/'good'/'a.png').unlink()
    np.save(home/'poor'/'deep'/'b.npy', np.zeros((64, 64), np.uint8))
    (home/'images'/'torn.png').write_bytes(b'x')
    rows, skipped, _ = assess_folder(home/'images', folders(home), CLASSES, pack=pack)
    reasons = dict(zip(skipped.path, skipped.reason))
    assert rows.path.unique().tolist() == ['deep/c.png'] and set(reasons) == {'a.png', 'deep/b.png', 'torn.png'}
    assert 'no map of a.png' in reasons['a.png'].lower() and 'name maps like their images' in reasons['a.png'].lower()
    assert 'b.png, b.npy' in reasons['deep/b.png']


def test_a_map_of_another_size_or_with_unknown_ids_is_a_reason(home, pack):
    Image.new('L', (32, 32)).save(home/'good'/'a.png')
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(home/'poor'/'deep'/'c.png')
    rows, skipped, _ = assess_folder(home/'images', folders(home), CLASSES, pack=pack)
    assert rows.path.unique().tolist() == ['deep/b.png']
    assert '32x32 pixels' in skipped.reason[0] and '77 on' in skipped.reason[1]


def test_an_image_that_is_refused_keeps_its_row_and_its_reason(home, pack):
    Image.new('RGB', (64, 64)).save(home/'images'/'a.png')
    rows = assess_folder(home/'images', folders(home), CLASSES, pack=pack).rows
    black = rows[rows.path == 'a.png']
    assert (black.state == 'refused').all() and black.predicted.isna().all() and not black.recommended.any()
    assert black.reason.str.len().min() > 10 and (rows[rows.path != 'a.png'].predicted.notna()).all()


@pytest.mark.parametrize('stop_at', [0, 1, 2])
def test_a_stopped_call_goes_on(home, pack, monkeypatch, stop_at):
    out = home/'table.csv'
    whole = assess_folder(home/'images', folders(home), CLASSES, pack=pack, out=home/'whole.csv').rows
    done = []

    def stopping(path, *args, **options):
        if len(done) == stop_at: raise KeyboardInterrupt
        done.append(path)
        return assess(path, *args, **options)

    monkeypatch.setattr(module, 'assess', stopping)
    with pytest.raises(KeyboardInterrupt):
        assess_folder(home/'images', folders(home), CLASSES, pack=pack, out=out)
    monkeypatch.setattr(module, 'assess', counting := Counting())
    rows = assess_folder(home/'images', folders(home), CLASSES, pack=pack, out=out).rows
    assert counting.calls == len(NAMES) - stop_at
    pd.testing.assert_frame_equal(rows, whole)
    assert out.read_bytes() == (home/'whole.csv').read_bytes()


class Counting:
    calls = 0

    def __call__(self, *args, **options):
        self.calls += 1
        return assess(*args, **options)


def test_a_changed_map_is_assessed_again(home, pack, monkeypatch):
    out = home/'table.csv'
    part = home/'table.csv.part.jsonl'

    def stop(path, *args, **options):
        if part.exists() and b'"rows"' in part.read_bytes(): raise KeyboardInterrupt
        return assess(path, *args, **options)

    monkeypatch.setattr(module, 'assess', stop)
    with pytest.raises(KeyboardInterrupt):
        assess_folder(home/'images', folders(home), CLASSES, pack=pack, out=out)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(home/'good'/'a.png')
    monkeypatch.setattr(module, 'assess', counting := Counting())
    rows = assess_folder(home/'images', folders(home), CLASSES, pack=pack, out=out).rows
    assert counting.calls == len(NAMES) and rows.path.nunique() == len(NAMES)


def test_mistakes_are_found_before_any_work(home, pack, monkeypatch):
    monkeypatch.setattr(module, 'process_folder', lambda *a: pytest.fail('work began'))
    with pytest.raises(DataNotFound, match='no folder'):
        assess_folder(home/'images', dict(good=home/'god'), CLASSES, pack=pack)
    with pytest.raises(Incompatible, match='class table'): assess_folder(home/'images', folders(home), pack=pack)
    with pytest.raises(DataNotFound): assess_folder(home/'images', folders(home), home/'none.json', pack=pack)
    with pytest.raises(Exception, match='(?i)expected .parquet or .csv'):
        assess_folder(home/'images', folders(home), CLASSES, pack=pack, out=home/'t.xls')


def run(args, capsys, code=0):
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    out = capsys.readouterr()
    assert e.value.code == code, out.err
    return out.out if code == 0 else out.err


def test_the_command(home, capsys, monkeypatch):
    monkeypatch.setenv('RSSQA_PACK', str(bundled_pack()))
    Image.new('RGB', (64, 64)).save(home/'images'/'deep'/'c.png')
    (home/'images'/'torn.png').write_bytes(b'x')
    maps = [word for method in METHODS for word in ('--map', f'{method}={home/method}')]
    command = ['assess', home/'images', *maps, '--classes', home/'classes.json', '-o', home/'t.parquet']
    lines = run(command, capsys).splitlines()
    assert lines[0].startswith('3 images, 9 maps -> ') and lines[4].split() == ['poor', '3', lines[4].split()[2], '0']
    assert any('1 images without an answer, for example deep/c.png' in line for line in lines)
    assert any('skipped torn.png' in line for line in lines) and lines[-1] == 'pack: rssqa open pack'
    assert len(pd.read_parquet(home/'t.parquet')) == 9
    plain = json.loads(run([*command, '--json'], capsys))
    assert [i['path'] for i in plain['images']] == sorted(NAMES) and plain['skipped'][0]['path'] == 'torn.png'
    assert plain['images'][-1]['maps'][0]['predicted'] is None
    assert 'belongs to one image' in run([*command, '--pictures', home/'p'], capsys, code=2).lower()


def test_the_networks_of_a_pack_assess_a_folder(home, pack):
    for name in NAMES[1:]: os.unlink(home/'images'/name)
    rows = assess_folder(home/'images', pack=pack, dataset='dubai_mbrsc').rows
    assert set(rows.name) == set(pack.methods('dubai_mbrsc')) and rows.recommended.sum() == 1
