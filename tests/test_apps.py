"""An app is a packaged notebook that Voila shows: it renders without a fault, hears a button and a key, and saves."""
import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from browser import chromium, overhear  # noqa: F401 (a fixture)
from rssqa.cli import apps, main
from rssqa.clip.encoders import load_encoder
from rssqa.viz.explorer import save_run
from rssqa.tables.store import Store, extract
from trained import trained_setup


# Voila says so while it loads extensions of JupyterLab that it does not use
OF_VOILA = 'The getter for the shared module is not a function'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def wait_for(condition, seconds=30, process=None):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition(): return
        assert process is None or process.poll() is None, 'Voila stopped'
        time.sleep(.2)
    pytest.fail(f'nothing after {seconds} s')


def answers(address):
    try: return urllib.request.urlopen(address + '/static/', timeout=1).status
    except urllib.error.HTTPError: return True
    except OSError: return False


def verdicts(path): return pd.read_csv(path, keep_default_na=False).rating.tolist() if path.exists() else []


@contextmanager
def served(chromium, folder, *options):
    "-> the page of an app, as `rssqa app` shows it."
    port = free_port()
    process = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'from rssqa.cli import main; main()',
            'app',
            *options,
            '--port',
            str(port),
            '--no-browser',
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        start_new_session=True,
    )
    try:
        wait_for(lambda: answers(f'http://127.0.0.1:{port}'), process=process)
        page = overhear(chromium.new_page(viewport=dict(width=1500, height=1000)), noise=(OF_VOILA,))
        page.set_default_timeout(90_000)
        # Voila asks for an icon font
        page.route(
            lambda url: f'127.0.0.1:{port}' not in url and url.startswith('http'),
            lambda route: route.fulfill(status=200, body='', content_type='text/css'),
        )
        page.goto(f'http://127.0.0.1:{port}', wait_until='commit')
        yield page
        assert page.faults == []
        page.close()
    finally:
        os.killpg(process.pid, signal.SIGTERM)                             # the verb, Voila and its kernel
        try: process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_pair_reviewer_runs_as_an_app(chromium, tmp_path):
    out = tmp_path/'verdicts.csv'
    with served(chromium, tmp_path, 'pairs', '--out', str(out)) as page:
        page.get_by_text('0 judged, 0 skipped, 8 left').wait_for()
        page.get_by_role('button', name='Right').click()
        page.get_by_text('1 judged, 0 skipped, 7 left').wait_for()
        page.get_by_text('Keys, after a click').wait_for()
        # the button that was clicked has the focus
        page.keyboard.press('w')
        page.get_by_text('2 judged, 0 skipped, 6 left').wait_for()
        page.keyboard.press('s')
        page.get_by_text('2 judged, 1 skipped, 5 left').wait_for()
        assert verdicts(out)[:3] == ['right', 'wrong', '']
        assert page.locator('img').first.evaluate('i => i.naturalWidth') == 280


def test_the_explorer_opens_a_run_as_an_app(chromium, tmp_path):
    w = trained_setup()
    store = Store(w.home/'store')
    save_run(
        tmp_path / 'run',
        w.sqed,
        w.tiles,
        store,
        extract(w.tiles, load_encoder('tiny-clip', dtype='float32'), store),
        'tiny-clip',
        'float32',
    )
    with served(chromium, tmp_path, 'explorer', '--data', str(tmp_path/'run')) as page:
        page.get_by_text(f'{len(w.sqed)} of {len(w.sqed)} shown').wait_for()
        page.get_by_text('umap, seed 0').wait_for()                        # the places of PCA have given way
        page.get_by_placeholder('flooded road').fill('a town with houses')
        page.keyboard.press('Enter')
        page.get_by_text('most like "').wait_for()
        page.locator('select[size="7"] option').first.wait_for(state='attached')
        page.locator('select[size="7"]').focus()
        page.keyboard.press('ArrowDown')
        tile = page.locator('.rssqa-explorer img')
        tile.wait_for()
        seen = Image.open(io.BytesIO(base64.b64decode(tile.get_attribute('src').partition(',')[2])))
        part = np.asarray(seen.convert('RGB'), float)[20:108].reshape(88, -1, 3)
        # image, map and error are there
        assert seen.size == (392, 128) and all(
            part[:, k * 132 + 10 : k * 132 + 118].std() > 10 for k in range(3)
        )
        page.get_by_role('button', name='Select shown').click()
        page.get_by_text(f'{len(w.sqed)} selected').first.wait_for()
        page.get_by_role('button', name='Save').click()
        page.get_by_text(f'{len(w.sqed)} maps written to selection.csv').wait_for()
    # where the person called it, not where the notebook lies
    assert len(pd.read_csv(tmp_path / 'selection.csv')) == len(w.sqed)


def test_apps_are_found_and_mistakes_explained(capsys, monkeypatch, tmp_path):
    import importlib.util
    assert {'degradation', 'pairs', 'recommender'} <= set(apps()) and all(
        p.is_file() for p in apps().values()
    )
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *a: None if name == 'voila' else real(name, *a)
    )
    for args, words in ((['app', 'recomender'], 'Did you mean recommender'), (['app', 'degradation'], 'rssqa[apps]'), (['app', 'recommender', '--data', str(tmp_path/'x')], 'check the path')):
        with pytest.raises(SystemExit) as stop: main(args)
        assert stop.value.code == 2 and words.lower() in capsys.readouterr().err.lower()
