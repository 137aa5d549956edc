"""The command line as a person meets it: verbs, typos, bad files, and the demo from pixels to report."""
import os, pickle, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from PIL import Image

from rssqa.build_demo import (
    FIVE_RIVALS, RS_SQA, Plan, full_demo_summary, leaderboard_text, real_plan, run_full_demo,
)
from rssqa.cli import main
from rssqa.data.synthetic import scene, write_scenes
from rssqa.quality.pack import Pack, bundled_pack, default_pack
from rssqa.segment.methods.training import Recipe
from rssqa.tables.sqed import load_sqed


def call(capsys, *args):
    "-> exit code, stdout, stderr"
    with pytest.raises(SystemExit) as stop: main(list(map(str, args)))
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


@pytest.fixture(scope='session')
def demo():
    "A small demo run for all workers: two scene types, three methods, a dozen steps; (plan, board, folder)."
    home = Path(os.environ['RSSQA_TEST_RUN'])/'demo'
    recipe = Recipe('nano', steps=12, batch=4, crop=64, lr=5e-3)
    methods = ['segformer', 'pspnet', 'upernet-swin']
    plan = Plan('two scene types', home/'run', [home/'data'/'synthetic'], recipe, 'tiny-clip', methods)
    done = home/'done.pickle'
    with FileLock(f'{home}.lock'):
        if not done.exists():
            write_scenes(plan.folders[0], ('town', 'flood'), scenes=6, size=64)
            done.write_bytes(pickle.dumps((plan, run_full_demo(plan, home/'out', workers=1), home)))
    return pickle.loads(done.read_bytes())


def test_demo_writes_report_table_and_pack(demo):
    plan, board, home = demo
    names = {path.name for path in (home/'out').iterdir()}
    assert names == {'report.html', 'results.csv', 'run.json', 'sqed.parquet', 'tiles.parquet'}
    table = pd.read_parquet(home/'out'/'sqed.parquet')
    assert len(table) == 48 * 3 and set(table.dataset) == {'town', 'flood'}
    assert table.predicted.between(0, 1).all()
    saved = pd.read_csv(home/'out'/'results.csv')
    assert {'protocol', 'data', 'seed', 'commit', 'command'} <= set(saved)
    assert set(saved.predictor) == set(board.index)
    html = (home/'out'/'report.html').read_text()
    assert 0 < html.index('class="map first"') < html.index('<table') and '% vegetation' in html
    assert 'two scene types' in html and 'src="http' not in html and 'href="http' not in html
    assert Pack(plan.home).name.startswith('demo') and default_pack() == bundled_pack()


def test_demo_reports_every_predictor_beside_ours(demo):
    plan, board, home = demo
    text = full_demo_summary(board, plan, home/'out')
    assert leaderboard_text(board).splitlines()[2].startswith(RS_SQA)
    assert all(name in text for name in board.index) and 'minutes' in text
    assert set(board.index) == {RS_SQA, *FIVE_RIVALS}
    assert f'rssqa app explorer --data {home/"out"}' in text
    assert board.loc['mean of dataset and method', 'gap_closed'] == pytest.approx(0, abs=0.35)


def test_second_run_computes_nothing_again(demo, monkeypatch):
    import rssqa.segment.methods.training as training
    import rssqa.tables.sqed as sqed
    plan, board, home = demo
    monkeypatch.setattr(training, 'fit_network', lambda *a: pytest.fail('a network was trained again'))
    monkeypatch.setattr(sqed, '_segment_job', lambda *a: pytest.fail('a tile was segmented again'))
    again = run_full_demo(plan, home/'out2', workers=1)
    pd.testing.assert_frame_equal(again, board)
    assert (home/'out2'/'sqed.parquet').read_bytes() == (home/'out'/'sqed.parquet').read_bytes()


def write_images(folder): # three synthetic scenes, a page that is no image, and one that is too small
    for i, kind in enumerate(('town', 'flood', 'rural')):
        pixels = scene(kind, 900 + i, 64).image.transpose(1, 2, 0) * 255
        Image.fromarray(pixels.astype(np.uint8)).save(folder/f'{kind}.png')
    (folder/'page.png').write_text('<html>not found</html>')
    Image.new('RGB', (1, 1)).save(folder/'dot.png')


def test_score_and_recommend(demo, capsys, tmp_path):
    pack = demo[0].home
    write_images(tmp_path)
    code, out, _ = call(capsys, 'score', tmp_path/'town.png', '--pack', pack)
    assert code == 0 and out.count('recommended') == 1 and len(out.splitlines()) == 4
    assert out.startswith('pack demo')
    code, out, _ = call(capsys, 'score', tmp_path/'town.png', '-m', 'pspnet', '--pack', pack)
    [_, line] = out.splitlines()
    assert code == 0 and line.startswith('pspnet') and 0 <= float(line.split()[1]) <= 1
    code, out, _ = call(capsys, 'recommend', tmp_path, '-o', tmp_path/'r.parquet', '--pack', pack)
    assert code == 0 and 'skipped page.png' in out and 'skipped dot.png' in out
    table = pd.read_parquet(tmp_path/'r.parquet')
    assert table.groupby('path').recommended.sum().eq(1).all() and table.path.nunique() == 3


@pytest.mark.parametrize('args, words', [
    (('score', 'nowhere.png', '--pack', 'PACK'), ('nowhere.png', 'check the path')),
    (('score', 'IMAGE', '-m', 'segfromer', '--pack', 'PACK'), ('segfromer', 'Did you mean segformer')),
    (('score', 'IMAGE', '--dataset', 'syntetic', '--pack', 'PACK'), ('syntetic', 'Did you mean synthetic')),
    (('score', 'IMAGE', '--pack', 'nowhere'), ('nowhere', 'pack.json', 'rssqa fit')),
    (('recommend', 'nowhere', '--pack', 'PACK'), ('nowhere',)),
    (('recommend', '.', '-o', 'table.xlsx', '--pack', 'PACK'), ('.xlsx', '.parquet or .csv')),
    (('demo', '--data', 'nowhere'), ('nowhere', 'splits.csv')),
    (('ls', 'methds'), ('methds', 'Did you mean methods')),
    (('data', 'get', 'lovdea'), ('lovdea', 'loveda')),
    (('scroe', 'IMAGE'), ('scroe',)),
    (('score',), ('IMAGE',)),
])
def test_a_mistake_is_one_line_and_exit_code_2(demo, capsys, tmp_path, args, words):
    Image.new('RGB', (64, 64), 'green').save(tmp_path/'green.png')
    paths = dict(PACK=demo[0].home, IMAGE=tmp_path/'green.png')
    code, _, err = call(capsys, *[paths.get(arg, arg) for arg in args])
    assert code == 2 and 'Traceback' not in err
    assert err.startswith('rssqa: ') and len(err.strip().splitlines()) == 1
    assert all(word.lower() in err.lower() for word in words), err


def test_methods_are_listed_in_aligned_columns(capsys):
    code, out, _ = call(capsys, 'ls', 'methods')
    lines = out.splitlines()
    assert code == 0 and len(lines) == 8
    from rssqa.segment.protocol import methods
    places = {line.index(methods[line.split()[0]].source) for line in lines}
    assert len(places) == 1


def test_datasets_and_encoders_are_listed(capsys):
    assert 'vaihingen' in call(capsys, 'ls', 'datasets')[1]
    assert 'clip-rs' in call(capsys, 'ls', 'encoders')[1]
    listed = call(capsys, 'ls', 'systems', '*ov*')[1]
    assert 'SegEarth-OV' in listed and 'soft-guided OVSS' in listed and 'partly' in listed
    assert 'partly' in call(capsys, 'ls', 'systems', 'CrossEarth')[1]


def test_doctor_reports_device_folders_and_pack(capsys):
    code, out, _ = call(capsys, 'doctor')
    assert code == 0 and all(word in out for word in ('torch', 'device', 'cache', 'pack'))


@pytest.mark.parametrize('options, browser', [((), True), (('--no-browser',), False)])
def test_the_browser_is_used_unless_it_is_switched_off(capsys, monkeypatch, options, browser):
    import rssqa.bench.explorer_speed as module
    calls = []

    def record(sizes, browser):
        calls.append((sizes, browser))
        return pd.DataFrame(dict(what=['first paint'], value=[1.0])).set_index('what')

    monkeypatch.setattr(module, 'measure_waits', record)
    code, out, _ = call(capsys, 'bench', 'explorer', '--sizes', '10,20', *options)
    assert code == 0 and 'first paint' in out and calls == [((10, 20), browser)]


def test_costs_of_methods_stand_beside_their_accuracy(capsys, tmp_path):
    options = ('--preset', 'nano', '--laps', '1', '--out', str(tmp_path/'costs.csv'))
    code, out, _ = call(capsys, 'bench', 'methods', *options)
    written = pd.read_csv(tmp_path/'costs.csv')
    table = load_sqed('data/tables/open.parquet')
    assert code == 0 and 'logcan' in out and len(written) == 8 * table.dataset.nunique()
    assert written.groupby('dataset').behind.min().eq(0).all() and written.cost.min() == 1
    one = written[(written.dataset == 'mumbai_pleiades') & (written.method == 'logcan')].iloc[0]
    part = table[(table.dataset == 'mumbai_pleiades') & (table.method == 'logcan')]
    right = sum(np.trace(c.reshape(6, 6)) for c in part.confusion)
    assert one.oa == pytest.approx(right / sum(c.sum() for c in part.confusion), abs=1e-4)


def test_interruption_says_how_to_go_on(capsys, monkeypatch):
    import rssqa.build_demo as module

    def interrupt(*args): raise KeyboardInterrupt

    monkeypatch.setattr(module, 'run_full_demo', interrupt)
    code, _, err = call(capsys, 'demo', '--build')
    assert code == 130 and 'goes on from here' in err


def test_help_does_not_load_torch():
    code = '\n'.join([
        'import sys',
        'from rssqa.cli import main',
        'try: main(["--help"])',
        'except SystemExit: pass',
        'assert "torch" not in sys.modules',
    ])
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


@pytest.mark.real
def test_real_plan_finds_weights_and_sources(real):
    plan = real_plan(real/'seg')
    assert [folder.name for folder in plan.folders] == ['mumbai_pleiades', 'dubai_mbrsc']
    assert plan.recipe.encoder_weights and plan.encoder.endswith('clip_rs_mini')
