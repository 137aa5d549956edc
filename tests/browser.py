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


# every visible text of a part of a page: its words, contrast ratio (WCAG 2) to what lies behind it, colours
CONTRASTS = r"""root => {
  const parse = text => { const n = text.match(/[0-9.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const isSpaced = text => text.startsWith('color(');
  const scaled = c => [c[0] * 255, c[1] * 255, c[2] * 255, c[3]];
  const colour = text => isSpaced(text) ? scaled(parse(text)) : parse(text);
  const over = (top, below) => [0, 1, 2].map(k => top[k] * top[3] + below[k] * (1 - top[3])).concat(1);
  const luminance = c => c.slice(0, 3).map(x => x / 255)
    .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, k) => sum + x * [.2126, .7152, .0722][k], 0);
  const behind = node => {
    const layers = [];
    for (let e = node; e; e = e.parentElement) {
      const c = colour(getComputedStyle(e).backgroundColor);
      if (c[3] > 0) layers.push(c);
      if (c[3] == 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const found = [], walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const check = (node, words, ink) => {
    const style = getComputedStyle(node), box = node.getBoundingClientRect();
    if (!words.trim() || !box.width || !box.height || node.matches(':disabled, :disabled *')) return;
    if (!node.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) return;
    if (node.closest('style, script, option, [class*="jss:"]')) return;
    const ground = behind(node), top = over(colour(ink ?? style.color), ground);
    const [dark, light] = [luminance(ground), luminance(top)].sort((a, b) => a - b);
    found.push({ words: words.trim().slice(0, 40), ratio: (light + .05) / (dark + .05),
                 ink: top.map(Math.round).join(), ground: ground.map(Math.round).join() });
  };
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (parent) check(parent, walker.currentNode.textContent, parent.closest('svg') && getComputedStyle(parent).fill);
  }
  for (const field of root.querySelectorAll('input[type=text], select, textarea')) {
    check(field, field.value || field.textContent);
    const hint = !field.value && field.placeholder;
    if (hint) check(field, hint, getComputedStyle(field, '::placeholder').color);
  }
  return found;
}"""


def faint_texts(part, least=4.5, least_of_signs=2) -> list:
    """Texts of a part of a page (a locator) with less contrast than the least, each once; fails if there is no text.
    Signs without letter or digit are lines of a legend: they have a pattern beside the colour of the palette."""
    found = part.evaluate(CONTRASTS)
    assert len(found) > 10, found
    faint = {(text['words'], round(text['ratio'], 2), text['ink'], text['ground']) for text in found}
    def wanted(words): return least if any(letter.isalnum() for letter in words) else least_of_signs
    return sorted(text for text in faint if text[1] < wanted(text[0]))


def choose_theme(page, name='JupyterLab Dark'):
    "Choose a theme of JupyterLab by its menu."
    page.click('.lm-MenuBar-itemLabel:has-text("Settings")')
    page.hover('.lm-Menu-itemLabel:text-is("Theme")')
    page.click(f'.lm-Menu-itemLabel:text-is("{name}")')
    page.wait_for_function('n => document.body.dataset.jpThemeName == n', arg=name)
