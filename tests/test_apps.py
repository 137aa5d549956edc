"""An app is a packaged notebook that Voila shows: it renders, reacts to buttons and keys, and saves."""
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

from browser import chromium, record_faults  # noqa: F401 (a fixture)
from rssqa.cli import apps, main
from rssqa.clip.encoders import load_encoder
from rssqa.tables.store import Store, extract
from rssqa.viz.explorer import save_run
from trained import trained_setup

# Voila says so while it loads extensions of JupyterLab that it does not use
VOILA_NOISE = 'The getter for the shared module is not a function'


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


def saved_ratings(path):
    if not path.exists(): return []
    return pd.read_csv(path, keep_default_na=False).rating.tolist()


def start_app(folder, port, options):
    program = [sys.executable, '-c', 'from rssqa.cli import main; main()']
    command = [*program, 'app', *options, '--port', str(port), '--no-browser']
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **quiet)


def stop_app(process): # the command, Voila and its kernel
    os.killpg(process.pid, signal.SIGTERM)
    try: process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def served(chromium, folder, *options):
    "The page of an app, as `rssqa app` shows it."
    port = free_port()
    process = start_app(folder, port, options)
    try:
        wait_for(lambda: answers(f'http://127.0.0.1:{port}'), process=process)
        page = record_faults(chromium.new_page(viewport=dict(width=1500, height=1000)), ignored=(VOILA_NOISE,))
        page.set_default_timeout(90_000)
        # Voila asks for an icon font
        def is_outside(url): return f'127.0.0.1:{port}' not in url and url.startswith('http')
        page.route(is_outside, lambda route: route.fulfill(status=200, body='', content_type='text/css'))
        page.goto(f'http://127.0.0.1:{port}', wait_until='commit')
        yield page
        assert page.faults == []
        page.close()
    finally: stop_app(process)


def test_the_pair_reviewer_runs_as_an_app(chromium, tmp_path):
    out = tmp_path/'ratings.csv'
    with served(chromium, tmp_path, 'pairs', '--out', str(out)) as page:
        page.get_by_text('0 rated, 0 skipped, 8 left').wait_for()
        page.get_by_role('button', name='Right').click()
        page.get_by_text('1 rated, 0 skipped, 7 left').wait_for()
        page.get_by_text('Keys, after a click').wait_for()
        # the button that was clicked has the focus
        page.keyboard.press('w')
        page.get_by_text('2 rated, 0 skipped, 6 left').wait_for()
        page.keyboard.press('s')
        page.get_by_text('2 rated, 1 skipped, 5 left').wait_for()
        assert saved_ratings(out)[:3] == ['right', 'wrong', '']
        assert page.locator('img').first.evaluate('i => i.naturalWidth') == 280


def test_the_explorer_opens_a_run_as_an_app(chromium, tmp_path):
    setup = trained_setup()
    store = Store(setup.home/'store')
    semantic = extract(setup.tiles, load_encoder('tiny-clip', dtype='float32'), store)
    save_run(tmp_path/'run', setup.sqed, setup.tiles, store, semantic, 'tiny-clip', 'float32')
    n = len(setup.sqed)
    with served(chromium, tmp_path, 'explorer', '--data', str(tmp_path/'run')) as page:
        page.get_by_text(f'{n} of {n} shown').wait_for()
        page.get_by_text('umap, seed 0').wait_for()                        # the layout of PCA was replaced
        page.get_by_placeholder('flooded road').fill('a town with houses')
        page.keyboard.press('Enter')
        page.get_by_text('most like "').wait_for()
        page.locator('select[size="7"] option').first.wait_for(state='attached')
        page.locator('select[size="7"]').focus()
        page.keyboard.press('ArrowDown')
        tile = page.locator('.rssqa-explorer img')
        tile.wait_for()
        png = base64.b64decode(tile.get_attribute('src').partition(',')[2])
        image = Image.open(io.BytesIO(png))
        assert image.size == (392, 128)
        # image, map and error are there
        rows = np.asarray(image.convert('RGB'), float)[20:108].reshape(88, -1, 3)
        for k in range(3): assert rows[:, k * 132 + 10:k * 132 + 118].std() > 10
        page.get_by_role('button', name='Select shown').click()
        page.get_by_text(f'{n} selected').first.wait_for()
        page.get_by_role('button', name='Save').click()
        page.get_by_text(f'{n} maps written to selection.csv').wait_for()
    # where the person called it, not where the notebook is
    assert len(pd.read_csv(tmp_path/'selection.csv')) == n


def test_apps_are_found():
    assert {'degradation', 'explorer', 'pairs', 'recommender'} <= set(apps())
    assert all(path.is_file() for path in apps().values())


@pytest.mark.parametrize('arguments, message', [
    (['recomender'], 'did you mean recommender'),
    (['degradation'], 'rssqa[apps]'),
    (['recommender', '--data', 'no such folder'], 'check the path'),
])
def test_mistakes_are_explained(capsys, monkeypatch, arguments, message):
    import importlib.util
    real = importlib.util.find_spec
    def without_voila(name, *args): return None if name == 'voila' else real(name, *args)
    monkeypatch.setattr(importlib.util, 'find_spec', without_voila)
    with pytest.raises(SystemExit) as stop: main(['app', *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err.lower()
