"""Drive the Chromium of this machine: pages are opened without a network, and what the console says is kept."""
import shutil
from contextlib import contextmanager

import pytest

ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']


def chromium() -> str:
    "Return the path of Chromium; skip the test where there is none."
    found = next((p for name in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(name))), None)
    return found or pytest.skip('no Chromium on this machine')


@contextmanager
def browser():
    "Start Chromium; end it afterwards."
    from playwright.sync_api import sync_playwright
    path = chromium()
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=path, args=ARGS)
        try: yield started
        finally: started.close()


@contextmanager
def opened(started, address, offline=True, width=1200, height=860, **options):
    "Open a page and yield it; afterwards nothing may have gone wrong on its console, and an offline page has asked nobody."
    context = started.new_context(offline=offline, viewport=dict(width=width, height=height), **options)
    page, faults, asked = context.new_page(), [], []
    page.on('console', lambda m: faults.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: faults.append(str(e)))
    page.on('request', lambda r: asked.append(r.url))
    try:
        page.goto(address)
        yield page
        assert faults == []
        if offline: assert [a for a in asked if not a.startswith(('file:', 'data:', 'blob:'))] == []
    finally: context.close()
