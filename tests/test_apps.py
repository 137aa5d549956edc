"""An app is a packaged notebook that Voila shows: it renders without a fault, hears a button and a key, and saves."""
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pandas as pd
import pytest

from headless import browser, chromium
from rssqa.cli import apps, main


OF_VOILA = 'The getter for the shared module is not a function'   # Voila says so while it loads extensions of JupyterLab that it does not use


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


def verdicts(path): return pd.read_csv(path, keep_default_na=False).verdict.tolist() if path.exists() else []


def test_the_pair_reviewer_runs_as_an_app(tmp_path):
    chromium()
    port, out = free_port(), tmp_path/'verdicts.csv'
    process = subprocess.Popen([sys.executable, '-c', 'from rssqa.cli import main; main()', 'app', 'pairs', '--out', str(out), '--port', str(port), '--no-browser'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path, start_new_session=True)
    try:
        wait_for(lambda: answers(f'http://127.0.0.1:{port}'), process=process)
        with browser() as started:
            page, faults = started.new_page(), []
            page.on('pageerror', lambda e: faults.append(str(e)))
            page.on('console', lambda m: faults.append(m.text) if m.type == 'error' and OF_VOILA not in m.text else None)
            page.route(lambda url: f'127.0.0.1:{port}' not in url and url.startswith('http'), lambda route: route.fulfill(status=200, body='', content_type='text/css'))   # Voila asks for an icon font
            page.goto(f'http://127.0.0.1:{port}', wait_until='commit', timeout=90_000)
            page.get_by_role('button', name='Right').wait_for(timeout=90_000)
            page.get_by_text('0 judged, 0 skipped, 8 left').wait_for()
            page.get_by_role('button', name='Right').click()
            page.get_by_text('1 judged, 0 skipped, 7 left').wait_for()
            page.get_by_text('Keys, after a click').wait_for()
            page.keyboard.press('w')                                       # the button that was clicked has the focus
            page.get_by_text('2 judged, 0 skipped, 6 left').wait_for()
            page.keyboard.press('s')
            page.get_by_text('2 judged, 1 skipped, 5 left').wait_for()
            assert verdicts(out)[:3] == ['right', 'wrong', '']
            assert page.locator('img').first.evaluate('i => i.naturalWidth') == 280 and faults == []
    finally:
        os.killpg(process.pid, signal.SIGTERM)                             # the verb, Voila and its kernel
        try: process.wait(10)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL); process.wait()


def test_apps_are_found_and_mistakes_explained(capsys, monkeypatch, tmp_path):
    import importlib.util
    assert {'lab', 'pairs', 'recommender'} <= set(apps()) and all(p.is_file() for p in apps().values())
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'voila' else real(name, *a))
    for args, words in ((['app', 'recomender'], 'Did you mean recommender'), (['app', 'lab'], 'rssqa[apps]'), (['app', 'recommender', '--data', str(tmp_path/'x')], 'check the path')):
        with pytest.raises(SystemExit) as stop: main(args)
        assert stop.value.code == 2 and words.lower() in capsys.readouterr().err.lower()
