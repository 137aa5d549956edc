"""The command line as a person meets it: verbs, typos, bad files, and the demo from pixels to report."""
import json, os, pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from PIL import Image

from rssqa.cli import main
from rssqa.core import cache_dir
from rssqa.demo import RS_SQA, Plan, as_text, real_plan, run, summary
from rssqa.segment.methods.training import Recipe
from rssqa.data.synthetic import scene, write_scenes


def call(capsys, *args):
    "-> exit code, stdout, stderr"
    with pytest.raises(SystemExit) as stop: main(list(map(str, args)))
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


@pytest.fixture(scope='session')
def demo():
    "A demo run in miniature, one for all workers: two looks, three methods, a dozen steps; every stage is the real one."
    home = Path(os.environ['RSSQA_TEST_RUN'])/'demo'
    plan = Plan(
        'two looks',
        home / 'run',
        [home / 'data' / 'synthetic'],
        Recipe('nano', steps=12, batch=4, crop=64, lr=5e-3),
        'tiny-clip',
        ['segformer', 'pspnet', 'upernet-swin'],
    )
    with FileLock(f'{home}.lock'):
        if not (home/'done.pickle').exists():
            write_scenes(plan.folders[0], ('town', 'flood'), scenes=6, size=64)
            (home/'done.pickle').write_bytes(pickle.dumps((plan, run(plan, home/'out', workers=1), home)))
    return pickle.loads((home/'done.pickle').read_bytes())


def test_demo_writes_report_table_and_pack(demo):
    plan, board, home = demo
    assert {p.name for p in (home / 'out').iterdir()} == {
        'report.html',
        'results.csv',
        'run.json',
        'sqed.parquet',
        'tiles.parquet',
    }
    table = pd.read_parquet(home/'out'/'sqed.parquet')
    assert (
        len(table) == 48 * 3
        and set(table.dataset) == {'town', 'flood'}
        and table.predicted.between(0, 1).all()
    )
    saved = pd.read_csv(home/'out'/'results.csv')
    assert {'protocol', 'data', 'seed', 'commit', 'command'} <= set(saved) and set(saved.predictor) == set(
        board.index
    )
    html = (home/'out'/'report.html').read_text()
    assert 'two looks' in html and 'src="http' not in html and 'href="http' not in html
    assert json.loads((cache_dir('demo')/'latest.json').read_text())['pack'] == str(plan.home)


def test_demo_reports_every_predictor_beside_ours(demo):
    plan, board, home = demo
    text = summary(board, plan, home/'out')
    assert (
        as_text(board).splitlines()[2].startswith(RS_SQA)
        and all(name in text for name in board.index)
        and 'minutes' in text
        and f'rssqa app explorer --data {home / "out"}' in text
    )
    assert board.loc['mean of dataset and method', 'gap_closed'] == pytest.approx(0, abs=0.35)


def test_second_run_computes_nothing_again(demo, monkeypatch):
    plan, board, home = demo
    import rssqa.segment.methods.training as training, rssqa.tables.sqed as sqed
    monkeypatch.setattr(training, '_fit', lambda *a: pytest.fail('a network was trained again'))
    monkeypatch.setattr(sqed, '_run', lambda *a: pytest.fail('a tile was segmented again'))
    again = run(plan, home/'out2', workers=1)
    pd.testing.assert_frame_equal(again, board)
    assert (home/'out2'/'sqed.parquet').read_bytes() == (home/'out'/'sqed.parquet').read_bytes()


def test_score_and_recommend(demo, capsys, tmp_path):
    plan, _, home = demo
    for i, look in enumerate(('town', 'flood', 'rural')):
        Image.fromarray((scene(look, 900 + i, 64).image.transpose(1, 2, 0) * 255).astype(np.uint8)).save(
            tmp_path / f'{look}.png'
        )
    (tmp_path/'page.png').write_text('<html>not found</html>')
    Image.new('RGB', (1, 1)).save(tmp_path/'dot.png')
    code, out, _ = call(capsys, 'score', tmp_path/'town.png', '--pack', plan.home)
    assert code == 0 and out.count('recommended') == 1 and len(out.splitlines()) == 3
    code, out, _ = call(capsys, 'score', tmp_path/'town.png', '-m', 'pspnet', '--pack', plan.home)
    assert code == 0 and out.startswith('pspnet') and 0 <= float(out.split()[1]) <= 1
    code, out, _ = call(capsys, 'recommend', tmp_path, '-o', tmp_path/'r.parquet', '--pack', plan.home)
    assert code == 0 and 'skipped page.png' in out and 'skipped dot.png' in out
    table = pd.read_parquet(tmp_path/'r.parquet')
    assert table.groupby('path').recommended.sum().eq(1).all() and table.path.nunique() == 3


@pytest.mark.parametrize('args, words', [
    (('score', 'nowhere.png', '--pack', 'PACK'), ('nowhere.png', 'check the path')),
    (('score', 'IMAGE', '-m', 'segfromer', '--pack', 'PACK'), ('segfromer', 'Did you mean segformer')),
    (('score', 'IMAGE', '--dataset', 'syntetic', '--pack', 'PACK'), ('syntetic', 'Did you mean synthetic')),
    (('score', 'IMAGE', '--pack', 'nowhere'), ('nowhere', 'pack.json', 'rssqa demo')),
    (('recommend', 'nowhere', '--pack', 'PACK'), ('nowhere',)),
    (('recommend', '.', '-o', 'table.xlsx', '--pack', 'PACK'), ('.xlsx', '.parquet or .csv')),
    (('demo', '--data', 'nowhere'), ('nowhere', 'splits.csv')),
    (('ls', 'methds'), ('methds', 'Did you mean methods')),
    (('data', 'get', 'lovdea'), ('lovdea', 'loveda')),
    (('scroe', 'IMAGE'), ('scroe',)),
    (('score',), ('IMAGE',))])
def test_a_mistake_is_one_line_and_exit_code_2(demo, capsys, tmp_path, args, words):
    Image.new('RGB', (64, 64), 'green').save(tmp_path/'green.png')
    code, out, err = call(
        capsys, *[{'PACK': demo[0].home, 'IMAGE': tmp_path / 'green.png'}.get(a, a) for a in args]
    )
    assert (
        code == 2
        and 'Traceback' not in err
        and err.startswith('rssqa: ')
        and len(err.strip().splitlines()) == 1
    )
    assert all(w.lower() in err.lower() for w in words), err


def test_lists_and_doctor(capsys):
    code, out, _ = call(capsys, 'ls', 'methods')
    assert code == 0 and len(out.splitlines()) == 8
    assert 'vaihingen' in call(capsys, 'ls', 'datasets')[1] and 'clip-rs' in call(capsys, 'ls', 'encoders')[1]
    code, out, _ = call(capsys, 'doctor')
    assert code == 0 and all(word in out for word in ('torch', 'device', 'cache', 'pack'))


def test_interruption_says_how_to_go_on(capsys, monkeypatch):
    import rssqa.demo as module
    monkeypatch.setattr(module, 'run', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = call(capsys, 'demo')
    assert code == 130 and 'goes on from here' in err


def test_help_and_typos_do_not_load_torch():
    code = 'import sys; from rssqa.cli import main\ntry: main(["--help"])\nexcept SystemExit: pass\nassert "torch" not in sys.modules'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


@pytest.mark.real
def test_real_plan_finds_weights_and_sources(real):
    plan = real_plan(real/'seg')
    assert (
        [f.name for f in plan.folders] == ['mumbai_pleiades', 'dubai_mbrsc']
        and plan.recipe.encoder_weights
        and plan.encoder.endswith('clip_rs_mini')
    )
