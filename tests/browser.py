"""A real browser for the tests: fixtures `chromium`, `lab` (a JupyterLab) and `page`; `opened` for a page from a file.

Playwright drives the Chromium that is installed; no browser is downloaded. Where there is none, the tests skip and
say so.
"""
from contextlib import contextmanager

import pytest

from rssqa.testing.browser import CHROMIUM, FLAGS, JupyterLab, drag, run_all  # noqa: F401 (tests import these)

NO_NETWORK = ('favicon', 'ERR_INTERNET_DISCONNECTED', 'ERR_NAME_NOT_RESOLVED') # messages that are no fault
NO_BROWSER = 'no chromium on the path: the views are not tried in a browser'
LOCAL = ('file:', 'data:', 'blob:')


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    if not CHROMIUM: pytest.skip(NO_BROWSER)
    lab = JupyterLab(tmp_path_factory.mktemp('lab')/'home')
    yield lab
    lab.stop()


@pytest.fixture(scope='module')      # Playwright's loop must have ended before another module starts its own
def chromium():
    if not CHROMIUM: pytest.skip(NO_BROWSER)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def record_faults(page, kinds=('error',), ignored=NO_NETWORK):
    "Keep what the console of a page complains of in `page.faults`."
    page.faults = []

    def record(message):
        if message.type not in kinds: return
        if not any(words in message.text for words in ignored): page.faults.append(message.text)

    page.on('console', record)
    page.on('pageerror', lambda error: page.faults.append(str(error)))
    return page


@pytest.fixture
def page(chromium):
    "A page for JupyterLab."
    page = record_faults(chromium.new_page(viewport=dict(width=1500, height=1000)))
    page.set_default_timeout(180_000)
    yield page
    page.close()


@contextmanager
def opened(chromium, address, width=1200, height=860, **options):
    "Open a page from a file, with the network off; afterwards its console is clean and it asked for nothing."
    context = chromium.new_context(offline=True, viewport=dict(width=width, height=height), **options)
    requests = []
    page = record_faults(context.new_page(), ('error', 'warning'), ())
    page.on('request', lambda request: requests.append(request.url))
    try:
        page.goto(address)
        yield page
        assert page.faults == []
        assert [url for url in requests if not url.startswith(LOCAL)] == []
    finally: context.close()
