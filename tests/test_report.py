"""The report leads with pictures, is one closed file, escapes what it is given, and fits its budget."""
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
from rssqa.core import BadImage, SchemaError
from rssqa.viz.projection import project, separation
from rssqa.viz.figures import WRONG, follow, scores

MARKUP = '<script>alert("x")</script> & $y_'
VOID = {'meta', 'link', 'img', 'br', 'wbr', 'input', 'hr'}


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


PALETTE = [(9, 90, 160), (20, 130, 60), (240, 210, 90), (120, 120, 130), (250, 250, 250)]
CLASSES = ['water', 'trees', 'field', 'road', 'snow']


def loader(t, size=48, noise=False, markup='', classes=4): # image_id -> pixels; 'snow' never occurs
    rng = np.random.default_rng(0)
    pixels = {}
    for image_id, rows in t.groupby('image_id'):
        truth = rng.integers(0, classes, (size, size)).astype(np.uint8)
        if not noise: truth = truth[:4, :4].repeat(size // 4, 0).repeat(size // 4, 1)
        truth[:3] = 255
        maps = {}
        for row in rows.itertuples():
            wrong = rng.random(truth.shape) > (row.oa if np.isfinite(row.oa) else 1)
            maps[row.method] = np.where(wrong | (truth == 255), rng.integers(0, 2, truth.shape), truth)
        pixels[image_id] = dict(
            image=rng.random((3, size, size), dtype=np.float32),
            truth=truth,
            maps=maps,
            palette=PALETTE,
            classes=[f'{name}{markup}' for name in CLASSES],
            title=f'place of {image_id}{markup}',
        )
    return pixels.get


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    t, emb, comparison, facts = toy(markup=MARKUP)
    cases = [case(markup=MARKUP), case() | {'truth': None}]
    thumbs = [np.full((3, 8, 8), k / 24, np.float32) for k in range(24)]
    facts = facts | {'title': MARKUP, 'asked': MARKUP}
    path = tmp_path_factory.mktemp('r')/'report.html'
    load = loader(t, markup=MARKUP)
    report.write_report(path, t, emb, comparison, cases, facts, thumbs, load)
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
    assert names.count('h1') == 1 and names.count('table') == 3 and names.count('h2') == 5


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
    assert any(a['alt'].startswith('Map by m1 of place of i') and '% water' in a['alt'] for a in images)
    assert all('scope' in a for tag, a in tags if tag == 'th')
    assert dict(tags)['html']['lang'] == 'en'
    assert 'width=device-width' in page and 'prefers-color-scheme: dark' in page


def test_every_picture_opens(page):
    uris = re.findall(r'data:image/(png|jpeg|webp);base64,([A-Za-z0-9+/=]+)', page)
    # two plots; image, truth, three maps and errors of each example; four + two of cases; the thumbnails
    examples = page.count('class="example"')
    assert examples == 3 and len(uris) == 2 + 8 * examples + 6 + 1
    for kind, data in uris: Image.open(io.BytesIO(base64.b64decode(data))).verify()


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
    body = re.findall(r'<tbody>(.*?)</tbody>', page, re.S)[-1]
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
    def numbers(**change): return report._case_numbers(one | change)
    assert numbers(predicted=.9) == 'true OA 0.833, predicted OA 0.900, error +0.067'
    assert numbers(predicted=.5) == 'true OA 0.833, predicted OA 0.500, error -0.333'
    assert numbers(predicted=None) == 'true OA 0.833'
    assert numbers(predicted=.5, truth=None) == 'no truth, so its OA is unknown, predicted OA 0.500'


def test_least_report(tmp_path):
    t, emb, comparison, _ = toy(2)
    page = report.write_report(tmp_path/'r.html', t, emb, comparison.head(1)).read_text(encoding='utf-8')
    assert 'No case was given' in page and 'No image was given' in page
    assert 'Separation not measured' in page
    assert plot_data(page)['thumbs'] is None


def eight_methods(n=24):
    rng = np.random.default_rng(0)
    i, m = np.divmod(np.arange(n * 8), 8)
    oa = np.clip(.7 + .1 * rng.normal(size=n)[i] + .05 * rng.normal(size=len(i)), 0, 1)
    names = np.array(['deeplabv3plus', 'ft-unetformer', 'logcan', 'pspnet', 'segformer', 'unet', 'unetformer',
                      'upernet-swin'])
    return pd.DataFrame(dict(
        image_id=[f'i{k}' for k in i],
        dataset=np.array(['a_city_with_a_rather_long_name', 'b'])[i % 2],
        method=names[m],
        oa=oa,
        predicted=np.clip(oa + .05 * rng.normal(size=len(oa)), 0, 1),
    ))


def test_budget_holds_for_noise(tmp_path):
    _, emb, comparison, facts = toy()
    t = eight_methods()
    cases = [case(360, seed=k) for k in range(10)]
    thumbs = [np.random.default_rng(k).random((3, 64, 64), dtype=np.float32) for k in range(420)]
    path = tmp_path/'r.html'
    report.write_report(path, t, emb, comparison, cases, facts, thumbs, loader(t, 360, noise=True))
    page = path.read_text(encoding='utf-8')
    assert path.stat().st_size <= report.MAX_BYTES == 3_000_000
    assert page.count('class="case"') == 8 and '2 more were given' in page
    assert page.count('class="example"') == 3 and page.count('class="map"') == 3 * 7
    assert plot_data(page)['thumbs']['n'] == 24


def test_a_failed_report_leaves_the_old_one(tmp_path):
    t, emb, comparison, facts = toy()
    path = tmp_path/'r.html'
    path.write_text('old')
    wrong_size = case() | {'mask': np.zeros((3, 3), np.uint8)}
    with pytest.raises(BadImage): report.write_report(path, t, emb, comparison, [wrong_size], facts)
    def load_two(image_id): return loader(t)(image_id) | dict(maps={'m0': None, 'm1': None})
    with pytest.raises(SchemaError, match='none of m2'):
        report.write_report(path, t, emb, comparison, [], facts, load=load_two)
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_the_baseline_given_in_facts_is_used():
    t, _, comparison, _ = toy()
    assert 'Always using m2 gives' in report.headlines(t, comparison, {'always': 'm2'})[0]


# ---------------------------------------------------------------- pictures first

def test_pictures_come_before_any_table_and_predictors_are_folded(page):
    first_map = page.index('class="map first"')
    assert page.index('One image, all its maps') < first_map < page.index('<table')
    headings = re.findall(r'<h2><small>(.*?)</small>', page)
    assert headings == ['One image, all its maps', 'Predicted and true OA', 'What to use', 'What to distrust',
                        'All maps in one picture']
    folded = page[page.index('<details>'):page.index('</details>')]
    assert folded.count('<table') == 1 and 'rssqa demo' in folded and '<dt>seeds</dt>' in folded
    assert page.index('<details>') > page.rindex('<h2>') and '<details open' not in page


def test_two_reports_are_the_same(tmp_path):
    t, emb, comparison, facts = toy()
    for name in ('one', 'two'):
        report.write_report(tmp_path/name, t, emb, comparison, [case()], facts, load=loader(t))
    assert (tmp_path/'one').read_bytes() == (tmp_path/'two').read_bytes()


def one_image(oa=(.8, .7, .6), predicted=(.5, .9, .4), **columns):
    return pd.DataFrame(dict(image_id='i', dataset='d', method=['a', 'b', 'c'], oa=oa, predicted=predicted) | columns)


def example_of(t, always='a', truth=True):
    pixels = loader(t)('i') | ({} if truth else {'truth': None})
    examples = report._load_examples(t, {'i': pixels}.get, always)
    return report._example_content(examples[0], 48, report._page_colours(examples))


def test_maps_stand_in_the_order_of_predicted_oa():
    shown = example_of(one_image())
    assert [card['name'] for card in shown['maps']] == ['b', 'a', 'c']
    assert [card['first'] for card in shown['maps']] == [True, False, False]
    assert shown['maps'][0]['numbers'] == [('predicted OA', '0.900'), ('true OA', '0.700')]
    assert shown['maps'][1]['notes'] == ['best here', 'best on average']
    assert shown['advice'] == (
        'Recommended is b, whose true OA is 0.700. Always using a, the method that is best on average, '
        'gives 0.800 here: following the advice loses 0.100.'
    )


def test_a_map_without_a_number_is_no_example():
    unknown = one_image().tail(1).assign(method='d', oa=np.nan)
    t = pd.concat([one_image(), unknown])
    assert [card['name'] for card in example_of(t)['maps']] == ['b', 'a', 'c']


def test_the_advice_is_put_into_words():
    gains = one_image(oa=(.6, .7, .6))
    assert example_of(gains)['advice'].endswith('following the advice gains 0.100.')
    assert 'It is also the method that is best on average' in example_of(gains, 'b')['advice']
    assert example_of(one_image(oa=(.7, .7, .6)))['advice'].endswith('following the advice changes nothing.')


def test_an_interval_is_shown_where_there_is_one():
    t = one_image(lower=(.7, .8, np.nan), upper=(.9, .95, np.nan))
    a, b, c = sorted(example_of(t)['maps'], key=lambda card: card['name'])
    assert ('interval', '0.700 to 0.900') in a['numbers'] and 'outside its interval' not in a['notes']
    assert 'outside its interval' in b['notes'] and len(c['numbers']) == 2
    coverage = 'The interval of predicted OA holds the true OA of 50% of 2 maps'
    assert report._coverage_text(t, .9) == f'{coverage}; it is made to hold 90%.'
    other = t.rename(columns=dict(lower='low', upper='high'))
    assert report._coverage_text(other, None) == f'{coverage}.'
    assert report._coverage_text(one_image(), .9) == ''
    assert report.dataset_quality(t).inside.item() == .5
    assert 'inside' not in report.dataset_quality(one_image())


def test_without_truth_there_is_no_error_picture():
    shown = example_of(one_image(), truth=False)
    assert shown['truth'] is None and all(card['error'] is None for card in shown['maps'])


def test_headings_say_the_finding_whichever_way_it_goes():
    def use(**columns): return report.findings(one_image(**columns), 'a')['use']
    assert use(oa=(.6, .7, .6)) == 'Use the recommended map: it gains 0.100 OA over always using a'
    assert use() == 'Always use a: following the recommendation loses 0.100 OA'
    assert use(oa=(.7, .7, .6)) == 'Following the recommendation is as good as always using a'
    best = report.findings(one_image(oa=(.6, .7, .6)), 'a')
    assert best['images'] == 'The recommended map is the best one of every image'
    assert best['distrust'] == 'Where the prediction is furthest from the truth'
    two = pd.concat([one_image(predicted=(.8, .8, .8)), one_image().assign(image_id='j', dataset='bad')])
    weakest = 'Trust it least on bad: predicted OA is off by 0.233 there, against 0.100 elsewhere'
    assert report.findings(two)['distrust'] == weakest
    assert list(report.dataset_quality(two).index) == ['bad', 'd']
    assert '13% less' in report.findings(two, separation=dict(n=9, skill=.13))['features']
    assert 'do not have' in report.findings(two, separation=dict(n=9, skill=-.1))['features']


def test_strips_show_what_follow_measures():
    t = toy()[0]
    table = follow(t, always='m2')
    strips = report._choice_strips(t, 'm2')
    assert [strip['name'] for strip in strips] == ['a', 'b', 'all datasets']
    for strip, row in zip(strips, table.itertuples()):
        assert strip['gap'] == f'gap closed: {row.gap_closed:+.0%}' and f'{row.picked_oa:.3f}' in strip['text']
    places = [float(left) for strip in strips for _, left in strip['marks']]
    assert min(places) == 0 and max(places) == 100
    alone = report._choice_strips(one_image(oa=(.7, .7, .7)), 'a')
    assert len(alone) == 1 and alone[0]['gap'] == 'no gap'


def test_names_may_break_after_underscores_and_stay_escaped():
    assert report._breakable('a_b<') == 'a_<wbr>b&lt;'


def test_no_python_object_leaks_into_the_page(page): assert ' object at 0x' not in page and 'built-in' not in page


def test_cases_share_a_legend_only_where_it_means_the_same():
    sea, land, ice = ('sea', '#000001'), ('land', '#000002'), ('ice', '#000001')
    assert report._shared_legend([dict(legend=[sea]), dict(legend=[sea, land])]) == [sea, land]
    assert report._shared_legend([dict(legend=[sea]), dict(legend=[ice])]) == []
    assert report._shared_legend([dict(legend=[sea]), dict(legend=[('sea', '#000009')])]) == []
    assert report._shared_legend([]) == []


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope='module')
def long_report(tmp_path_factory):
    _, emb, comparison, facts = toy()
    t = eight_methods()
    t = t.assign(lower=t.predicted - .1, upper=t.predicted + .1)
    comparison.index = ['RS-SQA', 'a baseline with a name that is rather long for a telephone']
    comparison = comparison.assign(top1=.5, regret=.01, plcc_dataset=.7)
    load = loader(t)
    cases = [load('i0') | dict(mask=load('i0')['maps']['unet'], predicted=.5), case()]
    path = tmp_path_factory.mktemp('r')/'report.html'
    return report.write_report(path, t, emb, comparison, cases, facts | dict(confidence=.9), load=load)


SHOWN = """() => {
  const hex = text => '#' + text.match(/\\d+/g).slice(0, 3).map(x => (+x).toString(16).padStart(2, '0')).join('');
  const colours = img => {
    const canvas = document.createElement('canvas');
    canvas.width = img.naturalWidth; canvas.height = img.naturalHeight;
    const pen = canvas.getContext('2d');
    pen.drawImage(img, 0, 0);
    const data = pen.getImageData(0, 0, canvas.width, canvas.height).data, found = new Set();
    for (let i = 0; i < data.length; i += 4) found.add(hex([data[i], data[i + 1], data[i + 2]].join(' ')));
    return [...found];
  };
  const swatch = li => hex(getComputedStyle(li.querySelector('i')).backgroundColor);
  return [...document.querySelectorAll('.example')].map(e => ({
    legend: [...e.querySelectorAll('.legend li:not(.wrong)')].map(swatch),
    names: [...e.querySelectorAll('.legend li')].map(li => li.textContent),
    wrong: swatch(e.querySelector('.legend .wrong')),
    maps: [...e.querySelectorAll('img.exact:not(.error)')].flatMap(colours),
    errors: [...e.querySelectorAll('img.error')].map(colours)
  }))
}"""


def test_legend_and_pixels_have_the_same_colours(long_report, chromium):
    with opened(chromium, long_report.as_uri()) as browser_page:
        shown = browser_page.evaluate(SHOWN)
    assert len(shown) == 3
    for example in shown:
        assert set(example['legend']) == set(example['maps']) and len(example['legend']) == 5
        assert example['names'][:4] == CLASSES[:4] and 'snow' not in example['names']
        assert example['wrong'] == '#{:02x}{:02x}{:02x}'.format(*WRONG)
        assert len(example['errors']) == 8
        assert all(example['wrong'] in colours for colours in example['errors'])
        others = set(sum(example['errors'], [])) - {example['wrong']}
        greys = {colour for colour in others if colour[1:3] == colour[3:5] == colour[5:]}
        assert others == greys


# texts that are wider than the page or than their own box, outside of tables in a scroll container
CUT = """() => {
  const wide = document.scrollingElement.clientWidth, found = [];
  const may = '.scroll, select, .key *, .track *'; // marks of a strip lie in its padding
  for (const e of document.querySelectorAll('main *')) {
    if (e.closest('.scroll') && !e.matches('.scroll')) continue;
    if (e.closest('.spoken') || !e.getClientRects().length) continue;
    const box = e.getBoundingClientRect();
    if (box.right > wide + .5 || box.left < -.5) found.push(e.outerHTML.slice(0, 90));
    else if (e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !e.matches(may))
      found.push('over: ' + e.outerHTML.slice(0, 90));
  }
  return found;
}"""


@pytest.mark.parametrize('width', [320, 400, 768, 1200])
def test_nothing_is_cut(long_report, chromium, width):
    with opened(chromium, long_report.as_uri(), width=width) as browser_page:
        browser_page.evaluate('document.querySelector("details").open = true')
        browser_page.wait_for_selector('.plane[data-ready]')
        assert browser_page.evaluate('document.scrollingElement.scrollWidth') <= width
        assert browser_page.evaluate(CUT) == []
        for chip in browser_page.locator('.chip.recommended').all():
            box = chip.bounding_box()
            assert chip.is_visible() and 0 <= box['x'] and box['x'] + box['width'] <= width


def test_a_table_scrolls_inside_its_box_and_keeps_its_first_column(long_report, chromium):
    with opened(chromium, long_report.as_uri(), width=400) as browser_page:
        browser_page.evaluate('document.querySelector("details").open = true')
        for box in browser_page.locator('.scroll').all():
            first = box.locator('tbody th').first
            assert first.bounding_box()['width'] < 180
            before = first.bounding_box()['x']
            moved = box.evaluate('e => { e.scrollLeft = 9999; return e.scrollLeft }')
            assert moved > 0 and first.bounding_box()['x'] == pytest.approx(before, abs=1.5)
            # what lies under the middle of the first cell is that cell, and it is opaque
            first.scroll_into_view_if_needed()
            at = first.bounding_box()
            middle = [at['x'] + at['width'] / 2, at['y'] + at['height'] / 2]
            tag = browser_page.evaluate('([x, y]) => document.elementFromPoint(x, y).tagName', middle)
            opaque = first.evaluate('e => !getComputedStyle(e).backgroundColor.startsWith("rgba")')
            assert tag == 'TH' and opaque


# contrast (WCAG 2) of each text with the nearest background that is painted
CONTRAST = """() => {
  const part = x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = c => {
    const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
    return .2126*part(r) + .7152*part(g) + .0722*part(b);
  };
  const painted = c => c !== 'rgba(0, 0, 0, 0)';
  const behind = e => { while (e && !painted(getComputedStyle(e).backgroundColor)) e = e.parentElement;
                        return getComputedStyle(e ?? document.body).backgroundColor };
  const low = [];
  for (const e of document.querySelectorAll('main *')) {
    const texts = [...e.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim());
    if (e.closest('.plane') || !texts.length) continue;
    const a = light(getComputedStyle(e).color), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push([ratio, e.outerHTML.slice(0, 80)]);
  }
  return low;
}"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_is_readable_in_both_schemes(long_report, chromium, scheme):
    with opened(chromium, long_report.as_uri(), color_scheme=scheme) as browser_page:
        browser_page.evaluate('document.querySelector("details").open = true')
        assert browser_page.evaluate(CONTRAST) == []
        page_colour = browser_page.evaluate('getComputedStyle(document.body).backgroundColor')
        assert page_colour == dict(light='rgb(246, 247, 249)', dark='rgb(23, 27, 31)')[scheme]
