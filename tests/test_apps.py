"""An app is a packaged notebook that Voila shows: it renders, reacts to buttons and keys, and saves."""
import base64
import http.client
import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from browser import chromium, record_faults  # noqa: F401 (a fixture)
from rssqa.cli import apps, main
from rssqa.clip.encoders import load_encoder
from rssqa.tables.store import Store, extract
from rssqa.viz.explorer import save_run
from rssqa.viz.widgets import app_settings
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


def status(address, host=None): # of the answer, without following a redirection; 0 where nobody listens
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    path = where.path or '/'
    try:
        connection.request('GET', f'{path}?{where.query}', headers=dict(Host=host or where.netloc))
        return connection.getresponse().status
    except OSError: return 0
    finally: connection.close()


def saved_ratings(path):
    if not path.exists(): return []
    return pd.read_csv(path, keep_default_na=False).rating.tolist()


def start_app(folder, port, options):
    program = [sys.executable, '-P', '-c', 'from rssqa.cli import main; main()']
    command = [*program, 'app', *options, '--port', str(port), '--no-browser']
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, **streams)
    address = process.stdout.readline().split()[0]
    Thread(target=process.stdout.read, daemon=True).start()
    return process, address


def stop_app(process): # the command, Voila and its kernel
    os.killpg(process.pid, signal.SIGTERM)
    try: process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def running(folder, *options):
    "The address that `rssqa app` prints, once it is served."
    port = free_port()
    process, address = start_app(folder, port, options)
    try:
        wait_for(lambda: status(f'http://127.0.0.1:{port}/voila/static/'), process=process)
        yield address
    finally: stop_app(process)


@contextmanager
def served(chromium, folder, *options):
    "The page of an app, as `rssqa app` shows it."
    with running(folder, *options) as address:
        base = address.partition('/?')[0]
        page = record_faults(chromium.new_page(viewport=dict(width=1500, height=1000)), ignored=(VOILA_NOISE,))
        page.set_default_timeout(90_000)
        # Voila asks for an icon font
        def is_outside(url): return not url.startswith(base) and url.startswith('http')
        page.route(is_outside, lambda route: route.fulfill(status=200, body='', content_type='text/css'))
        page.goto(address, wait_until='commit')
        yield page
        assert page.faults == []
        page.close()


def test_the_pair_reviewer_runs_as_an_app(chromium, tmp_path):
    out = tmp_path/'ratings.csv'
    with served(chromium, tmp_path, 'pairs', '--out', str(out)) as page:
        page.get_by_text('0 rated, 0 skipped, 8 left').wait_for()
        page.get_by_text('Keys, while this window has its outline').wait_for()
        # without a click before
        page.wait_for_function('document.activeElement.classList.contains("rssqa-keys")')
        page.keyboard.press('r')
        page.get_by_text('1 rated, 0 skipped, 7 left').wait_for()
        page.get_by_role('button', name='Wrong').click()
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
        page.locator('.rssqa-body [role=row][aria-selected=true]').first.wait_for()
        page.locator('.rssqa-view').focus()
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
        page.get_by_text(f'{n} maps written to {tmp_path}/selection.csv').wait_for()
    # where the person called it, not where the notebook is
    assert len(pd.read_csv(tmp_path/'selection.csv')) == n


def listening_addresses(port): # where a port is open, hexadecimal, as Linux lists it
    lines = Path('/proc/net/tcp').read_text().splitlines() + Path('/proc/net/tcp6').read_text().splitlines()
    local = [line.split()[1] for line in lines if line.split()[3] == '0A']
    return {address for address, number in (text.split(':') for text in local) if int(number, 16) == port}


@pytest.mark.skipif(not importlib.util.find_spec('voila'), reason='Voila is not installed')
def test_an_app_answers_only_to_its_token_under_a_name_of_this_machine(tmp_path):
    planted = tmp_path/'planted'
    for name in ('voila.py', 'json.py'): (tmp_path/name).write_text(f'open({str(planted)!r}, "w")\n')
    with running(tmp_path, 'pairs') as address:
        base, _, token = address.partition('/?token=')
        port = int(base.rpartition(':')[2])
        assert len(token) >= 32
        for path in ('/', '/?token=', '/?token=guess', f'/?token={token[:-1]}'):
            assert status(base + path) in (302, 403), path
        for host in ('evil.example', f'evil.example:{port}', '192.0.2.1', '127.0.0.1.evil.example'):
            assert status(address, host) == 403, host
            assert status(f'{base}/api/kernels/0-0-0-0-0?token={token}', host) == 403, host
        for host in (f'127.0.0.1:{port}', f'localhost:{port}'): assert status(address, host) == 200, host
        if sys.platform == 'linux': assert listening_addresses(port) == {'0100007F'}
    assert not planted.exists(), 'a file of the folder was run'


def test_an_app_imports_nothing_from_the_folder_it_is_called_in(tmp_path, monkeypatch):
    (tmp_path/'planted_module.py').write_text('')
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, 'path', ['', *sys.path])
    monkeypatch.setenv('RSSQA_APP_HERE', str(tmp_path))
    app_settings()
    assert Path.cwd() == tmp_path and importlib.util.find_spec('planted_module') is None


def test_two_apps_have_different_tokens_and_none_on_the_command_line(monkeypatch, capsys):
    calls = []
    def run(command, env, cwd):
        calls.append((command, env['JUPYTER_TOKEN'], Path(cwd)))
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(subprocess, 'run', run)
    for _ in range(2):
        with pytest.raises(SystemExit): main(['app', 'pairs', '--no-browser', '--port', str(free_port())])
    (command, first, cwd), (_, second, _) = calls
    assert first != second and first in capsys.readouterr().out
    assert first not in ' '.join(command) and cwd == apps()['pairs'].parent


def test_a_port_in_use_is_said(capsys):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        with pytest.raises(SystemExit) as stop: main(['app', 'pairs', '--port', str(s.getsockname()[1])])
    assert stop.value.code == 2 and '--port' in capsys.readouterr().err


def test_apps_are_found():
    assert {'degradation', 'explorer', 'pairs', 'recommender'} <= set(apps())
    assert all(path.is_file() for path in apps().values())


@pytest.mark.parametrize('arguments, message', [
    (['recomender'], 'did you mean recommender'),
    (['degradation'], 'rssqa[apps]'),
    (['recommender', '--data', 'no such folder'], 'check the path'),
])
def test_mistakes_are_explained(capsys, monkeypatch, arguments, message):
    real = importlib.util.find_spec
    def without_voila(name, *args): return None if name == 'voila' else real(name, *args)
    monkeypatch.setattr(importlib.util, 'find_spec', without_voila)
    with pytest.raises(SystemExit) as stop: main(['app', *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err.lower()
