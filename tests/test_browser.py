"""The Explorer as a person meets it: the app in JupyterLab in a real browser, with mouse and keyboard."""
import json, os, time

import nbformat
import numpy as np
import pytest

from browser import chromium, drag, lab, page, run_all
from rssqa.bench.explorer_speed import browser_waits
from test_house import ROOT

TELL = '''import base64, json, os
import numpy as np
from pathlib import Path

def tell(what=''):
    s, rows = window.state, window.selection()
    tile = base64.b64encode(s.tile(s.focus)).decode() if s.focus is not None else ''
    Path('.seen').write_text(json.dumps(dict(rows=rows.index.tolist(), scores=rows.score.tolist() if 'score' in rows else [], datasets=rows.dataset.tolist(), focus=s.focus, tile=tile,
                                             name=s.name(s.focus) if s.focus is not None else '', method=str(s.table.method[s.focus or 0]), shown=int(s.mask.sum()))))
    os.replace('.seen', 'seen.json')

np.save('points.npy', window.scatter.widget.points)
window.state.observe(tell)
tell()'''


def between(x) -> float:
    "The middle of the widest gap in the inner half of numbers: where a line touches no point."
    x = np.sort(x)
    x = x[len(x) // 4:-len(x) // 4]
    return float((x[1:] + x[:-1])[np.argmax(np.diff(x))] / 2)


@pytest.fixture
def app(lab):
    "The app, with a last cell in which the kernel writes down what its state says, beside what the window shows."
    nb = nbformat.read(ROOT/'nbs/apps/explorer.ipynb', 4)
    lab.write('explorer.ipynb', *(c.source for c in nb.cells if c.cell_type == 'code'), TELL)
    return lab


def told(lab, holds, wait=90) -> dict:
    "What the kernel wrote, as soon as it holds."
    until = time.monotonic() + wait
    while True:
        seen = json.loads((lab.home/'seen.json').read_text()) if (lab.home/'seen.json').exists() else {}
        if seen and holds(seen): return seen
        assert time.monotonic() < until, f'the kernel says {({k: v for k, v in seen.items() if k != "tile"})}'
        time.sleep(.05)


def status(page, words) -> str:
    page.wait_for_function('t => document.querySelector("[role=status]")?.textContent.includes(t)', arg=words)
    return page.locator('[role=status]').inner_text()


def on_page(box, points): # (n,2) of -1..1 -> (n,2) pixels: the cloud is a square as high as its canvas
    return (
        np.array([box['x'] + box['width'] / 2, box['y'] + box['height'] / 2])
        + points * np.array([1, -1]) * box['height'] / 2
    )


def test_lasso_hover_search_and_keyboard(page, app):
    run_all(page, app.url('explorer.ipynb'))
    canvas = page.locator('.jp-OutputArea canvas').first
    status(page, '120 of 120 shown')
    told(app, lambda s: s['shown'] == 120)
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    box = canvas.bounding_box()
    points = np.load(app.home/'points.npy')[:, :2]
    at = on_page(box, points)

    # a lasso round the lower left: panel, list and selection() have exactly the points inside
    page.get_by_title('Activate lasso selection').click()
    right = between(at[:, 0])
    top = between(at[:, 1])
    inside = set(np.flatnonzero((at[:, 0] < right) & (at[:, 1] > top)).tolist())
    drag(
        page,
        [
            (box['x'] + 2, top),
            (right, top),
            (right, box['y'] + box['height'] - 2),
            (box['x'] + 2, box['y'] + box['height'] - 2),
            (box['x'] + 2, top),
        ],
    )
    seen = told(app, lambda s: s['rows'])
    assert set(seen['rows']) == inside and 0 < len(inside) < 120
    assert f'{len(inside)} selected (lasso)' in status(page, '(lasso)')
    assert f'{len(inside)} selected' in page.locator('.rssqa-explorer svg[role=img]').get_attribute(
        'aria-label'
    )
    assert page.locator('.rssqa-explorer select[size="7"] option').count() == len(inside)

    # pointing at the loneliest point shows its tile, in the panel and at the pointer
    page.get_by_title('Activate pan & zoom').click()
    apart = np.linalg.norm(at[:, None] - at[None], axis=-1) + 1e9 * np.eye(len(at))
    row = int(apart.min(1).argmax())
    page.mouse.move(*(at[row] + [9, 9]))
    page.mouse.move(*at[row], steps=4)
    seen = told(app, lambda s: s['focus'] == row)
    page.wait_for_function(
        'n => document.querySelector(".rssqa-explorer img")?.alt.includes(n)', arg=seen['name']
    )
    assert page.locator('.rssqa-explorer img').get_attribute('src') == 'data:image/png;base64,' + seen['tile']
    tip = page.locator('.rssqa-explorer div[style*="data:image/png"]').first
    tip.wait_for()
    assert tip.bounding_box()['width'] > 250 and seen['method'] in tip.locator('xpath=../..').inner_text()
    if 'RSSQA_SHOTS' in os.environ:
        page.wait_for_timeout(600)
        page.screenshot(path=os.environ['RSSQA_SHOTS'] + '/hover.png')

    # words reorder the list
    before = [
        t.replace("\xa0", " ")
        for t in page.locator('.rssqa-explorer select[size="7"] option').all_inner_texts()
    ]
    page.get_by_placeholder('flooded road').fill('a flooded town with muddy water')
    page.keyboard.press('Enter')
    seen = told(app, lambda s: s['scores'])
    status(page, 'most like')
    # 2.5 by chance
    assert (
        seen['scores'] == sorted(seen['scores'], reverse=True)
        and seen['datasets'][0] == 'flood'
        and seen['datasets'][:10].count('flood') > 5
    )
    after = [
        t.replace("\xa0", " ")
        for t in page.locator('.rssqa-explorer select[size="7"] option').all_inner_texts()
    ]
    assert after != before and after[0].startswith(f'{seen["scores"][0]:.3f} · flood')

    # the keyboard reaches the controls in order, walks through the list, and shows where it is
    page.get_by_placeholder('flooded road').focus()
    page.keyboard.press('Tab')
    assert (
        page.evaluate('document.activeElement.textContent') == 'Select shown'
        and page.evaluate('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    )
    page.locator('.rssqa-explorer select[size="7"]').focus()
    for k in range(2):
        page.keyboard.press('ArrowDown')
        told(app, lambda s: s['focus'] == seen['rows'][k])
    page.get_by_role('button', name='Why?').click()
    page.wait_for_function(
        '[...document.querySelectorAll(".rssqa-explorer div")].some(e => e.textContent.includes("nearest judged maps"))'
    )
    if 'RSSQA_SHOTS' in os.environ: page.screenshot(path=os.environ['RSSQA_SHOTS'] + '/words.png')
    assert page.faults == []


STATES = (
    '''import numpy as np, pandas as pd
from rssqa.bench.explorer_speed import cloud
from rssqa.viz.explorer_widget import Explorer

def nothing(row): raise FileNotFoundError(f'{row.image_id}.png is not there')''',
    "nan = Explorer(cloud(40).assign(oa=np.nan, predicted=np.nan), images=nothing, height=240)\nnan",
    "one = Explorer(cloud(1), height=240)\none",
    "rng = np.random.default_rng(0)\nsoon = Explorer(cloud(3000).drop(columns=['u', 'v']), rng.normal(size=(3000, 64)).cumsum(0), height=240)\nsoon",
)
TELL_STATES = '''import json, os
from pathlib import Path

def tell(what=''):
    Path('.seen').write_text(json.dumps(dict(nan=len(nan.selection()), one=len(one.selection()), soon=len(soon.selection()), coming=soon.state.coming, lost=int(soon.state.chosen.sum()))))
    os.replace('.seen', 'seen.json')

for w in (nan, one, soon): w.state.observe(tell)
tell()'''


def test_poor_states_are_told_and_umap_takes_the_place_of_pca(page, lab):
    (lab.home/'seen.json').unlink(missing_ok=True)
    run_all(page, lab.url(lab.write('states.ipynb', *STATES, TELL_STATES)))
    nan, one, soon = (page.locator('.rssqa-explorer').nth(k) for k in range(3))
    said = lambda window: window.locator('[role=status]')
    early = soon.get_by_text('umap is on its way')
    early.wait_for()
    # the window answers while UMAP is at work
    soon.get_by_role('button', name='Select shown').click()
    page.wait_for_function(
        '[...document.querySelectorAll("[role=status]")].some(e => e.textContent.includes("3,000 selected"))'
    )
    before = early.count()
    soon.get_by_text('umap, seed 0').wait_for()
    assert (
        before == 1
        and early.count() == 0
        and told(lab, lambda s: s['soon'] == 3000 and not s['coming'])['lost'] == 2999 * 1500
    )

    # nobody knows a score, and there is no picture
    nan.scroll_into_view_if_needed()
    assert 'unknown (40)' in nan.inner_text() and 'OA' not in nan.locator('select[size="7"]').inner_text()
    nan.get_by_role('button', name='Save').click()
    page.wait_for_function(
        '[...document.querySelectorAll("[role=status]")].some(e => /othing is selected/.test(e.textContent))'
    )
    nan.get_by_role('button', name='Select shown').click()
    told(lab, lambda s: s['nan'] == 40)
    nan.locator('select[size="7"]').focus()
    page.keyboard.press('ArrowDown')
    nan.locator('img').wait_for()
    nan.get_by_role('button', name='Why?').click()
    nan.get_by_text('no score').wait_for()

    # a lasso round nothing, and one point alone
    one.scroll_into_view_if_needed()
    one.get_by_title('Activate lasso selection').click()
    box = one.locator('canvas').first.bounding_box()
    drag(page, [(box['x'] + dx, box['y'] + dy) for dx, dy in ((4, 4), (40, 4), (40, 40), (4, 40), (4, 4))])
    assert '1 of 1 shown, 0 selected' in said(one).inner_text()
    drag(
        page,
        [
            (box['x'] + dx, box['y'] + dy)
            for dx, dy in (
                (4, 4),
                (box['width'] - 4, 4),
                (box['width'] - 4, box['height'] - 4),
                (4, box['height'] - 4),
                (4, 4),
            )
        ],
    )
    told(lab, lambda s: s['one'] == 1)
    if 'RSSQA_SHOTS' in os.environ: page.screenshot(path=os.environ['RSSQA_SHOTS'] + '/states.png')
    assert page.faults == []


def test_a_million_maps_answer_a_lasso(page, lab):
    waits = browser_waits(lab, page, 1_000_000, laps=1)
    # how long it takes is for the benchmark
    assert 0 < waits['lasso'] < 60 and 0 < waits['paint'] < 60
    words = page.locator('[role=status]').inner_text()
    assert (
        '1,000,000 of 1,000,000 shown' in words
        and 200_000 < int(words.split(', ')[1].split()[0].replace(',', '')) < 800_000
    )
    # anywidget says so after two seconds, and goes on
    assert [f for f in page.faults if 'Failed to initialize model' not in f] == []
