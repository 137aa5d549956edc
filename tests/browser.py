"""A real browser on a real JupyterLab, one of each for a module: fixtures `lab`, `chromium` and `page`.

Playwright drives the Chromium that is installed; no browser is downloaded. Where there is none, the tests skip and say so.
"""
import pytest

from rssqa.explorerspeed import CHROMIUM, FLAGS, Lab, drag, run_all  # noqa: F401 (tests take them from here)

NOISE = ('favicon', 'ERR_INTERNET_DISCONNECTED', 'ERR_NAME_NOT_RESOLVED')
WHY = 'no chromium on the path: the views are not tried in a browser'


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    if not CHROMIUM: pytest.skip(WHY)
    lab = Lab(tmp_path_factory.mktemp('lab')/'home')
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


@pytest.fixture
def page(chromium):
    "A page that remembers what its console complained of, in `page.faults`."
    page = chromium.new_page(viewport=dict(width=1500, height=1000))
    page.set_default_timeout(180_000)
    page.faults = []
    page.on('console', lambda m: page.faults.append(m.text) if m.type == 'error' and not any(n in m.text for n in NOISE) else None)
    page.on('pageerror', lambda e: page.faults.append(str(e)))
    yield page
    page.close()
