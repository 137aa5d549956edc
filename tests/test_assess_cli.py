"`rssqa assess` as a mapping team meets it: files in, advice and numbers out, every mistake said."
import json, subprocess, sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import rssqa
from rssqa.cli import main
from rssqa.data.synthetic import CLASSES, PALETTE, scene
from rssqa.quality.pack import bundled_pack

SIDE = 96


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "An image, three maps of three qualities in three formats, a class table and labelled points."
    home = tmp_path_factory.mktemp('team')
    s = scene('town', seed=7, size=SIDE)
    Image.fromarray((255 * s.image.transpose(1, 2, 0)).round().astype(np.uint8)).save(home/'image.png')
    rng = np.random.default_rng(0)
    maps = {}
    for name, share in dict(good=0.05, fair=0.3, poor=0.7).items():
        drawn = rng.integers(0, len(CLASSES), s.mask.shape)
        maps[name] = np.where(rng.random(s.mask.shape) < share, drawn, s.mask).astype(np.uint8)
    Image.fromarray(maps['good']).save(home/'good.png')
    np.save(home/'fair.npy', maps['fair'])
    p = np.eye(len(CLASSES), dtype=np.float32)[maps['poor']].transpose(2, 0, 1)
    np.savez_compressed(home/'poor.npz', p=0.7 * p + 0.3 / len(CLASSES))
    (home/'classes.json').write_text(json.dumps(list(CLASSES)))
    y, x = rng.integers(0, SIDE, (2, 30))
    labels = pd.DataFrame({'x': x, 'y': y, 'class': [CLASSES[i] for i in s.mask[y, x]]})
    labels.to_csv(home/'labels.csv', index=False)
    return home


@pytest.fixture
def command(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv('RSSQA_PACK', str(bundled_pack()))
    maps = [word for name in ('good=good.png', 'fair=fair.npy', 'poor=poor.npz') for word in ('--map', name)]
    return ['assess', 'image.png', *maps, '--classes', 'classes.json']


def run(args, capsys, code=0):
    with pytest.raises(SystemExit) as e: main(args)
    out = capsys.readouterr()
    assert e.value.code == code, out.err
    return out.out if code == 0 else out.err


def test_advice_comes_first_and_the_pack_is_named(command, capsys):
    out = run(command, capsys)
    assert out.startswith('Use good') and 'rssqa open pack' in out.splitlines()[-1]
    assert out.index('good') < out.index('fair') < out.index('poor')


def test_json(command, capsys):
    plain = json.loads(run([*command, '--json'], capsys))
    assert list(plain) == ['pack', 'maps', 'advice', 'domain'] and set(plain['domain']) >= {'ok', 'reasons'}
    assert [m['name'] for m in plain['maps']][0] == 'good'
    assert set(plain['maps'][0]) >= {'name', 'predicted', 'lower', 'upper', 'as_good', 'recommended'}


def test_the_library_says_the_same(command, folder, capsys):
    plain = json.loads(run([*command, '--json'], capsys))
    maps = {name: folder/f for name, f in dict(good='good.png', fair='fair.npy', poor='poor.npz').items()}
    assert rssqa.assess(folder/'image.png', maps, folder/'classes.json').to_json() == plain


@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_table(command, capsys, tmp_path, suffix):
    run([*command, '-o', str(tmp_path/f't{suffix}')], capsys)
    read = pd.read_csv if suffix == '.csv' else pd.read_parquet
    table = read(tmp_path/f't{suffix}')
    assert len(table) == 3 and set(json.loads(table.iou[0])) == set(CLASSES)


def test_pictures(command, capsys, tmp_path):
    run([*command, '--pictures', str(tmp_path/'p')], capsys)
    assert {f.name for f in (tmp_path/'p').iterdir()} == {
        'fused.png', 'error_good.png', 'error_fair.png', 'error_poor.png'}
    means = {n: np.asarray(Image.open(tmp_path/'p'/f'error_{n}.png')).mean() for n in ('good', 'poor')}
    assert means['good'] < means['poor']
    assert np.asarray(Image.open(tmp_path/'p'/'fused.png')).max() < len(CLASSES)


def test_labels_and_the_usual_map(command, capsys):
    out = run([*command, '--labels', 'labels.csv', '--usual', 'poor'], capsys)
    assert out.startswith(('Change from poor to good', 'Stay with poor'))


def test_without_maps_the_networks_of_the_pack_run(command, capsys):
    out = run(['assess', 'image.png'], capsys)
    assert 'unetformer' in out and 'pack: rssqa open pack' in out


@pytest.mark.parametrize('change, text', [
    (['--map', 'x=none.png'], 'none.png'),
    (['--map', 'good=fair.npy'], 'a second time'),
    (['--map', '=fair.npy'], 'NAME=PATH'),
    (['--usual', 'goood'], 'did you mean good'),
    (['-o', 'table.xls'], 'expected .parquet or .csv'),
    (['-o', 'no/such/folder/t.csv'], 'not writable'),
    (['--labels', 'classes.json'], 'labels'),
    (['--pack', 'nowhere'], 'no pack in'),
])
def test_mistakes_are_said_in_one_line(command, capsys, change, text):
    err = run([*command, *change], capsys, code=2)
    assert text.lower() in err.lower() and 'Traceback' not in err and err.count('\n') == 1


def test_maps_without_class_table(command, capsys):
    err = run(['assess', 'image.png', '--map', 'good.png'], capsys, code=2)
    assert 'no class table' in err


def test_colours_are_read_with_a_table_that_has_them(folder, command, capsys):
    good = np.asarray(Image.open(folder/'good.png'))
    Image.fromarray(np.array(PALETTE, np.uint8)[good]).save(folder/'colours.png')
    entries = [dict(id=i, name=c, rgb=list(PALETTE[i])) for i, c in enumerate(CLASSES)]
    (folder/'colours.json').write_text(json.dumps(dict(classes=entries)))
    words = ['assess', 'image.png', '--map', 'a=colours.png', '--classes', 'colours.json', '--json']
    [one] = json.loads(run(words, capsys))['maps']
    words = ['assess', 'image.png', '--map', 'a=good.png', '--classes', 'classes.json', '--json']
    assert json.loads(run(words, capsys))['maps'] == [one]


def test_a_missing_file_is_said_before_anything_heavy_is_imported(tmp_path):
    code = 'import sys; from rssqa.cli import main\ntry: main(sys.argv[1:])\nfinally: print("torch" in sys.modules)'
    done = subprocess.run(
        [sys.executable, '-c', code, 'assess', str(tmp_path/'none.png')], capture_output=True, text=True)
    assert done.returncode == 2 and 'none.png' in done.stderr and done.stdout.strip() == 'False'


def test_packs_are_chosen_shown_and_given_back(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv('RSSQA_PACK', raising=False)
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    assert 'open' in run(['pack', 'use', str(bundled_pack())], capsys)
    assert (tmp_path/'pack.json').exists()
    run(['pack', 'use'], capsys)
    assert not (tmp_path/'pack.json').exists()
    assert '7 methods' in run(['pack', 'show'], capsys)
    assert 'no pack in' in run(['pack', 'use', str(tmp_path)], capsys, code=2)
