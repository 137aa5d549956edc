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

EVIL = '<script>alert("x")</script> & $y_'
VOID = {'meta', 'link', 'img', 'br', 'input', 'hr'}


def toy(n=24, evil=''):
    rng = np.random.default_rng(0)
    i, m = np.divmod(np.arange(n * 3), 3)
    oa = np.clip(
        np.array([0.8, 0.6])[i % 2] - 0.05 * rng.normal(size=n)[i] + 0.03 * rng.normal(size=len(i)), 0, 1
    )
    t = pd.DataFrame(
        dict(
            image_id=[f'i{k}{evil}' for k in i],
            dataset=np.array([f'a{evil}', 'b'])[i % 2],
            scene=[f's{k // 4}' for k in i],
            method=np.array([f'm0{evil}', 'm1', 'm2'])[m],
            oa=oa,
            predicted=np.clip(oa + 0.02 * rng.normal(size=len(oa)), 0, 1),
        )
    )
    images = t.drop_duplicates('image_id').reset_index(drop=True)
    x = rng.normal(size=(n, 5))
    emb = project(x, 'pca', table=images)
    ours = scores(t) | follow(t).loc['all', ['top1', 'regret', 'gap_closed']].to_dict()
    rows = {
        'RS-SQA': ours,
        f'rival{evil}': ours
        | dict(gap_closed=ours['gap_closed'] + 0.1, mae=ours['mae'] / 2, srocc_image=ours['srocc_image']),
    }
    facts = dict(
        separation=separation(x, images.oa, images.dataset, images.scene, emb[['u', 'v']]),
        command=f'rssqa demo{evil}',
        seeds='0',
        versions={'a': 1, 'b': 2},
    )
    return t, emb, pd.DataFrame(rows).T, facts


def case(size=24, evil='', seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (size, size)).astype(np.uint8)
    return dict(
        image=rng.random((3, size, size), dtype=np.float32),
        truth=truth,
        mask=np.where(rng.random(truth.shape) < 0.75, truth, 0).astype(np.uint8),
        palette=[(9, 9, 9), (99, 9, 9), (9, 99, 9)],
        title=f'case{evil}',
        predicted=0.7,
    )


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    t, emb, comparison, facts = toy(evil=EVIL)
    cases = [case(evil=EVIL), case() | {'truth': None}]
    thumbs = [np.full((3, 8, 8), k / 24, np.float32) for k in range(24)]
    path = report.write_report(
        tmp_path_factory.mktemp('r') / 'report.html',
        t,
        emb,
        comparison,
        cases,
        facts | {'title': EVIL, 'asked': EVIL},
        thumbs,
    )
    return path.read_text(encoding='utf-8')


class Outline(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.faults = [], [], []
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
    assert (
        not re.search(r'@import|url\(\s*["\']?(?!\$)|fetch\(|XMLHttp|https?://', page)
        and "default-src 'none'" in page
    )


def test_it_escapes(page):
    assert EVIL not in page and '<script>alert' not in page and '&lt;script&gt;alert' in page
    assert sum(tag == 'script' for tag, _ in Outline(page).tags) == 2            # the points and the script


def test_it_is_accessible(page):
    tags = Outline(page).tags
    images = [a for tag, a in tags if tag == 'img']
    assert images and all(a.get('alt') for a in images)
    assert all('scope' in a for tag, a in tags if tag == 'th')
    assert (
        dict(tags)['html']['lang'] == 'en'
        and 'width=device-width' in page
        and 'prefers-color-scheme: dark' in page
    )


def test_every_picture_opens(page):
    uris = re.findall(r'data:image/(png|jpeg|webp);base64,([A-Za-z0-9+/=]+)', page)
    # five figures, four + two panels, the thumbnails
    assert len(uris) == 5 + 6 + 1
    for kind, data in uris: Image.open(io.BytesIO(base64.b64decode(data))).verify()


def test_class_colours_survive():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (40, 3)).astype(np.uint8)
    rgb = colours[rng.integers(0, 40, (50, 70))]
    back = Image.open(
        io.BytesIO(base64.b64decode(report._photo(rgb, 320, exact=True).split(',')[1]))
    ).convert('RGB')
    assert np.array_equal(back, rgb)
    small = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(report._photo(rgb, 35, exact=True).split(',')[1]))).convert(
            'RGB'
        )
    ).reshape(-1, 3)
    assert {tuple(c) for c in small} <= {tuple(c) for c in colours}


def held(page): return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])


def test_the_map_holds_the_points_and_their_thumbnails(page):
    told = held(page)
    columns = {c['name']: c for c in told['columns']}
    assert (
        told['n'] == 24
        and told['thumbs']['n'] == 24
        and {'dataset', 'method', 'oa', 'predicted'} <= set(columns)
    )
    assert f'a{EVIL}' in columns['dataset']['levels'] and 'n = 24' in page and 'pca, seed 0' in page


def test_the_map_answers_in_a_browser(tmp_path, chromium):
    t, emb, comparison, facts = toy()
    path = report.write_report(
        tmp_path / 'report.html', t, emb, comparison, [case()], facts, {'i3': np.ones((3, 8, 8), np.float32)}
    )
    with opened(chromium, path.as_uri()) as seen:
        seen.wait_for_selector('.plane[data-ready]')
        seen.locator('canvas.points').scroll_into_view_if_needed()
        i = int(np.flatnonzero(emb.sample(24, random_state=0).image_id == 'i3')[0])
        seen.mouse.move(*seen.evaluate('i => document.querySelector(".plane").plane.at(i)', i))
        told = dict(
            zip(seen.locator('.tip th').all_text_contents(), seen.locator('.tip td').all_text_contents())
        )
        assert (
            told['image'] == 'i3'
            and told['OA'] == f'{emb.oa[emb.image_id == "i3"].iloc[0]:.3f}'
            and seen.locator('.tip canvas').count() == 1
        )
        seen.click('table.sort >> nth=0 >> button >> nth=1')
        assert seen.locator('th[aria-sort=descending]').count() == 1


def test_the_table_says_what_the_frame_says(page):
    t, _, comparison, _ = toy(evil=EVIL)
    body = re.findall(r'<tbody>(.*?)</tbody>', page, re.S)[0]
    numbers = [[float(n) for n in re.findall(r'data-n="([^"]+)"', row)] for row in body.split('</tr>')[:2]]
    columns = [m for m in report.METRICS if m in comparison] + ['n_rows', 'n_images']
    assert np.allclose(numbers, comparison[columns].astype(float))
    # seven metrics, five of them tied
    assert body.count('class="best"') == 7 + 5


def test_headlines_name_who_leads():
    t, _, comparison, facts = toy()
    said = report.headlines(t, comparison, facts)
    assert (
        '“rival” leads' in said[1]
        and 'level' in said[2]
        and '“rival” leads' in said[3]
        and 'skill' in said[-1]
    )
    total = follow(t).loc['all']
    for value in (total.always_oa, total.oracle_oa, total.picked_oa): assert f'{value:.3f}' in said[0]
    flipped = comparison.assign(gap_closed=[.5, .4], mae=[.01, .02])
    assert (
        'RS-SQA leads' in report.headlines(t, flipped)[1]
        and 'RS-SQA leads' in report.headlines(t, flipped)[3]
    )
    assert 'nothing was compared' in report.headlines(t, comparison.head(1))[1]
    assert '-12.0%' in report.headlines(t, comparison.assign(gap_closed=[-.12, .3]))[1]
    with pytest.raises(SchemaError, match="no row 'Ours'"): report.headlines(t, comparison, {'ours': 'Ours'})


def test_headlines_survive_missing_numbers():
    t, _, comparison, _ = toy()
    said = report.headlines(t, comparison.assign(gap_closed=np.nan, mae=[.1, np.nan]))
    assert len(said) == 3 and 'nothing was compared' in said[2]
    assert report._cell(np.nan, '.3f')['text'] == '—' and report._cell(np.nan, '.3f')['number'] == ''


def test_least_report(tmp_path):
    t, emb, comparison, _ = toy(2)
    page = report.write_report(tmp_path/'r.html', t, emb, comparison.head(1)).read_text(encoding='utf-8')
    assert 'No case was given' in page and 'Separation not measured' in page and held(page)['thumbs'] is None


def test_budget_holds_for_noise(tmp_path):
    t, emb, comparison, facts = toy()
    cases = [case(360, seed=k) for k in range(10)]
    thumbs = [np.random.default_rng(k).random((3, 64, 64), dtype=np.float32) for k in range(420)]
    path = report.write_report(tmp_path/'r.html', t, emb, comparison, cases, facts, thumbs)
    page = path.read_text(encoding='utf-8')
    assert (
        path.stat().st_size <= report.LIMIT
        and page.count('class="case"') == 8
        and '2 more were given' in page
        and held(page)['thumbs']['n'] == 24
    )


def test_a_failed_report_leaves_the_old_one(tmp_path):
    t, emb, comparison, facts = toy()
    (tmp_path/'r.html').write_text('old')
    with pytest.raises(ValueError):
        report.write_report(
            tmp_path / 'r.html', t, emb, comparison, [case() | {'mask': np.zeros((3, 3), np.uint8)}], facts
        )
    assert (tmp_path/'r.html').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_the_rival_given_in_facts_is_used():
    t, _, comparison, _ = toy()
    assert 'Always using m2 gives' in report.headlines(t, comparison, {'always': 'm2'})[0]
