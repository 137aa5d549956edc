"""A real browser for the tests: fixtures `chromium`, `lab` (a JupyterLab) and `page`, and `opened` for pages from a file or a server.

Playwright drives the Chromium that is installed; no browser is downloaded. Where there is none, the tests skip and say so.
"""
from contextlib import contextmanager

import pytest

# noqa: F401 (tests take them from here)
from rssqa.bench.explorer_speed import CHROMIUM, FLAGS, JupyterLab, drag, run_all

NOISE = ('favicon', 'ERR_INTERNET_DISCONNECTED', 'ERR_NAME_NOT_RESOLVED')
WHY = 'no chromium on the path: the views are not tried in a browser'


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    if not CHROMIUM: pytest.skip(WHY)
    lab = JupyterLab(tmp_path_factory.mktemp('lab')/'home')
    yield lab
    lab.stop()


@pytest.fixture(scope='module')      # Playwright's loop must have ended before another module starts its own
def chromium():
    if not CHROMIUM: pytest.skip(WHY)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def overhear(page, kinds=('error',), noise=NOISE):
    "Remember what the console of a page complains of, in `page.faults`."
    page.faults = []
    page.on(
        'console',
        lambda m: (
            page.faults.append(m.text) if m.type in kinds and not any(n in m.text for n in noise) else None
        ),
    )
    page.on('pageerror', lambda e: page.faults.append(str(e)))
    return page


@pytest.fixture
def page(chromium):
    "A page for JupyterLab."
    page = overhear(chromium.new_page(viewport=dict(width=1500, height=1000)))
    page.set_default_timeout(180_000)
    yield page
    page.close()


@contextmanager
def opened(chromium, address, width=1200, height=860, **options):
    "Open a page from a file, with the network off; afterwards nothing may have gone wrong on its console, and nobody was asked for anything."
    context = chromium.new_context(offline=True, viewport=dict(width=width, height=height), **options)
    asked = []
    page = overhear(context.new_page(), ('error', 'warning'), ())
    page.on('request', lambda r: asked.append(r.url))
    try:
        page.goto(address)
        yield page
        assert page.faults == [] and [a for a in asked if not a.startswith(('file:', 'data:', 'blob:'))] == []
    finally: context.close()
