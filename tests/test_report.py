"""The report is one closed file, escapes what it is given, fits its budget, and names whoever leads."""
import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from browser import chromium, opened  # noqa: F401 (a fixture)
from rssqa.viz import report
from rssqa.core import SchemaError
from rssqa.viz.projection import project, separation
from rssqa.viz.figures import follow, scores

MARKUP = '<script>alert("x")</script> & $y_'
VOID = {'meta', 'link', 'img', 'br', 'input', 'hr'}


def toy(n=24, markup=''):
    rng = np.random.default_rng(0)
    i, m = np.divmod(np.arange(n * 3), 3)
    level = np.array([0.8, 0.6])[i % 2] - 0.05 * rng.normal(size=n)[i]
    oa = np.clip(level + 0.03 * rng.normal(size=len(i)), 0, 1)
    t = pd.DataFrame(dict(
        image_id=[f'i{k}{markup}' for k in i],
        dataset=np.array([f'a{markup}', 'b'])[i % 2],
        scene=[f's{k // 4}' for k in i],
        method=np.array([f'm0{markup}', 'm1', 'm2'])[m],
        oa=oa,
        predicted=np.clip(oa + 0.02 * rng.normal(size=len(oa)), 0, 1),
    ))
    images = t.drop_duplicates('image_id').reset_index(drop=True)
    x = rng.normal(size=(n, 5))
    emb = project(x, 'pca', table=images)
    ours = scores(t) | follow(t).loc['all', ['top1', 'regret', 'gap_closed']].to_dict()
    better = dict(gap_closed=ours['gap_closed'] + 0.1, mae=ours['mae'] / 2, srocc_image=ours['srocc_image'])
    rows = {'RS-SQA': ours, f'baseline{markup}': ours | better}
    facts = dict(
        separation=separation(x, images.oa, images.dataset, images.scene, emb[['u', 'v']]),
        command=f'rssqa demo{markup}',
        seeds='0',
        versions={'a': 1, 'b': 2},
    )
    return t, emb, pd.DataFrame(rows).T, facts


def case(size=24, markup='', seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (size, size)).astype(np.uint8)
    return dict(
        image=rng.random((3, size, size), dtype=np.float32),
        truth=truth,
        mask=np.where(rng.random(truth.shape) < 0.75, truth, 0).astype(np.uint8),
        palette=[(9, 9, 9), (99, 9, 9), (9, 99, 9)],
        title=f'case{markup}',
        predicted=0.7,
    )


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    t, emb, comparison, facts = toy(markup=MARKUP)
    cases = [case(markup=MARKUP), case() | {'truth': None}]
    thumbs = [np.full((3, 8, 8), k / 24, np.float32) for k in range(24)]
    facts = facts | {'title': MARKUP, 'asked': MARKUP}
    path = tmp_path_factory.mktemp('r')/'report.html'
    report.write_report(path, t, emb, comparison, cases, facts, thumbs)
    return path.read_text(encoding='utf-8')


class Outline(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.faults = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.faults.append((tag, self.getpos()))


def test_the_page_is_well_formed(page):
    outline = Outline(page)
    assert not outline.open and not outline.faults and page.startswith('<!doctype html>')
    names = [tag for tag, _ in outline.tags]
    assert names.count('h1') == 1 and names.count('table') == 2 and names.count('h2') == 7


def test_it_loads_nothing_from_elsewhere(page):
    for tag, attrs in Outline(page).tags:
        for name in ('src', 'href', 'action', 'data', 'srcset'):
            if value := attrs.get(name): assert value.startswith('data:'), (tag, value[:60])
    assert not re.search(r'@import|url\(\s*["\']?(?!\$)|fetch\(|XMLHttp|https?://', page)
    assert "default-src 'none'" in page


def test_it_escapes(page):
    assert MARKUP not in page and '<script>alert' not in page and '&lt;script&gt;alert' in page
    assert sum(tag == 'script' for tag, _ in Outline(page).tags) == 2            # the points and the script


def test_it_is_accessible(page):
    tags = Outline(page).tags
    images = [a for tag, a in tags if tag == 'img']
    assert images and all(a.get('alt') for a in images)
    assert all('scope' in a for tag, a in tags if tag == 'th')
    assert dict(tags)['html']['lang'] == 'en'
    assert 'width=device-width' in page and 'prefers-color-scheme: dark' in page


def test_every_picture_opens(page):
    uris = re.findall(r'data:image/(png|jpeg|webp);base64,([A-Za-z0-9+/=]+)', page)
    # five figures, four + two panels, the thumbnails
    assert len(uris) == 5 + 6 + 1
    for kind, data in uris: Image.open(io.BytesIO(base64.b64decode(data))).verify()


def open_photo(rgb, size): # -> (h,w,3)
    url = report._encode_photo(rgb, size, exact=True)
    image = Image.open(io.BytesIO(base64.b64decode(url.split(',')[1])))
    return np.asarray(image.convert('RGB'))


def test_class_colours_survive():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (40, 3)).astype(np.uint8)
    rgb = colours[rng.integers(0, 40, (50, 70))]
    assert np.array_equal(open_photo(rgb, 320), rgb)
    small = open_photo(rgb, 35).reshape(-1, 3)
    assert {tuple(c) for c in small} <= {tuple(c) for c in colours}


def plot_data(page): return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])


def test_the_plot_has_the_points_and_their_thumbnails(page):
    data = plot_data(page)
    columns = {c['name']: c for c in data['columns']}
    assert data['n'] == 24 and data['thumbs']['n'] == 24
    assert {'dataset', 'method', 'oa', 'predicted'} <= set(columns)
    assert f'a{MARKUP}' in columns['dataset']['levels'] and 'n = 24' in page and 'pca, seed 0' in page


def test_the_plot_answers_in_a_browser(tmp_path, chromium):
    t, emb, comparison, facts = toy()
    thumbs = {'i3': np.ones((3, 8, 8), np.float32)}
    path = report.write_report(tmp_path/'report.html', t, emb, comparison, [case()], facts, thumbs)
    with opened(chromium, path.as_uri()) as browser_page:
        browser_page.wait_for_selector('.plane[data-ready]')
        browser_page.locator('canvas.points').scroll_into_view_if_needed()
        i = int(np.flatnonzero(emb.sample(24, random_state=0).image_id == 'i3')[0])
        at = browser_page.evaluate('i => document.querySelector(".plane").plane.at(i)', i)
        browser_page.mouse.move(*at)
        names = browser_page.locator('.tip th').all_text_contents()
        values = browser_page.locator('.tip td').all_text_contents()
        tip = dict(zip(names, values))
        assert tip['image'] == 'i3' and tip['OA'] == f'{emb.oa[emb.image_id == "i3"].iloc[0]:.3f}'
        assert browser_page.locator('.tip canvas').count() == 1
        browser_page.click('table.sort >> nth=0 >> button >> nth=1')
        assert browser_page.locator('th[aria-sort=descending]').count() == 1


def test_the_table_says_what_the_frame_says(page):
    t, _, comparison, _ = toy(markup=MARKUP)
    body = re.findall(r'<tbody>(.*?)</tbody>', page, re.S)[0]
    numbers = [[float(n) for n in re.findall(r'data-n="([^"]+)"', row)] for row in body.split('</tr>')[:2]]
    columns = [m for m in report.METRICS if m in comparison] + ['n_rows', 'n_images']
    assert np.allclose(numbers, comparison[columns].astype(float))
    # seven metrics, five of them tied
    assert body.count('class="best"') == 7 + 5


def test_headlines_name_who_leads():
    t, _, comparison, facts = toy()
    sentences = report.headlines(t, comparison, facts)
    assert '“baseline” leads' in sentences[1] and 'level' in sentences[2]
    assert '“baseline” leads' in sentences[3] and 'skill' in sentences[-1]
    total = follow(t).loc['all']
    for value in (total.always_oa, total.oracle_oa, total.picked_oa): assert f'{value:.3f}' in sentences[0]
    flipped = report.headlines(t, comparison.assign(gap_closed=[.5, .4], mae=[.01, .02]))
    assert 'RS-SQA leads' in flipped[1] and 'RS-SQA leads' in flipped[3]
    assert 'nothing was compared' in report.headlines(t, comparison.head(1))[1]
    assert '-12.0%' in report.headlines(t, comparison.assign(gap_closed=[-.12, .3]))[1]
    with pytest.raises(SchemaError, match="no row 'Ours'"): report.headlines(t, comparison, {'ours': 'Ours'})


def test_headlines_survive_missing_numbers():
    t, _, comparison, _ = toy()
    sentences = report.headlines(t, comparison.assign(gap_closed=np.nan, mae=[.1, np.nan]))
    assert len(sentences) == 3 and 'nothing was compared' in sentences[2]
    assert report._cell(np.nan, '.3f')['text'] == '—' and report._cell(np.nan, '.3f')['number'] == ''


def test_the_text_of_a_case_is_exact():
    truth = np.array([[0, 1, 2, 255], [0, 1, 2, 255]], np.uint8)
    mask = np.array([[0, 1, 0, 1], [0, 1, 2, 1]], np.uint8)                  # five of six labelled pixels
    one = case(4) | dict(truth=truth, mask=mask, image=np.zeros((3, 2, 4), np.float32))
    def numbers(**change): return report._case_content(one | change, 8)['numbers']
    assert numbers(predicted=.9) == 'true OA 0.833, predicted OA 0.900, error +0.067'
    assert numbers(predicted=.5) == 'true OA 0.833, predicted OA 0.500, error -0.333'
    assert numbers(predicted=None) == 'true OA 0.833'
    assert numbers(predicted=.5, truth=None) == 'no truth, so its OA is unknown, predicted OA 0.500'


def test_least_report(tmp_path):
    t, emb, comparison, _ = toy(2)
    page = report.write_report(tmp_path/'r.html', t, emb, comparison.head(1)).read_text(encoding='utf-8')
    assert 'No case was given' in page and 'Separation not measured' in page
    assert plot_data(page)['thumbs'] is None


def test_budget_holds_for_noise(tmp_path):
    t, emb, comparison, facts = toy()
    cases = [case(360, seed=k) for k in range(10)]
    thumbs = [np.random.default_rng(k).random((3, 64, 64), dtype=np.float32) for k in range(420)]
    path = report.write_report(tmp_path/'r.html', t, emb, comparison, cases, facts, thumbs)
    page = path.read_text(encoding='utf-8')
    assert path.stat().st_size <= report.MAX_BYTES
    assert page.count('class="case"') == 8 and '2 more were given' in page
    assert plot_data(page)['thumbs']['n'] == 24


def test_a_failed_report_leaves_the_old_one(tmp_path):
    t, emb, comparison, facts = toy()
    path = tmp_path/'r.html'
    path.write_text('old')
    wrong_size = case() | {'mask': np.zeros((3, 3), np.uint8)}
    with pytest.raises(ValueError): report.write_report(path, t, emb, comparison, [wrong_size], facts)
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_the_baseline_given_in_facts_is_used():
    t, _, comparison, _ = toy()
    assert 'Always using m2 gives' in report.headlines(t, comparison, {'always': 'm2'})[0]
