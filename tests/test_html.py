"""A page of points is one closed file within its limit; in a browser it shows the right values, counts a
lasso selection and downloads it."""
import base64
import io
import json
import os
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.path import Path as Polygon
from PIL import Image

from browser import chromium, faint_texts, opened  # noqa: F401 (a fixture)
from rssqa.core import Incompatible, SchemaError, UnknownName
from rssqa.viz.html import CSP, LIMIT, MISSING, drawn, plane, to_html
from rssqa.data.synthetic import SCENE_TYPES, scene
from rssqa.viz.projection import project, separation

HOSTILE = '</script><script>alert("x")</script> {part} {data} & "y"'
TYPES = list(SCENE_TYPES)


def points(n=300, images=50, seed=0):
    rng = np.random.default_rng(seed)
    scene_type = rng.choice(TYPES, n)
    oa = rng.random(n)
    columns = dict(
        image_id=[f'im-{i % images:04d}' for i in range(n)],
        dataset=scene_type,
        method=rng.choice(['unet', 'pspnet', 'segformer'], n),
        scene=[f's{i % 9}' for i in range(n)],
        oa=oa,
        predicted=np.where(rng.random(n) < 0.1, np.nan, np.clip(oa + rng.normal(0, 0.05, n), 0, 1)),
        boxes=rng.integers(0, 900, n),
    )
    table = pd.DataFrame(columns)
    x = rng.normal(size=(n, 6)) + oa[:, None] * 4
    return project(x, 'pca', table=table), x, table


def shuffled(emb): return emb.sample(len(emb), random_state=0)  # the order of a page


def content(text):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.S)[1])


def codes(text): return np.frombuffer(base64.b64decode(text), '<u2')


def unpacked(column):
    code = codes(column['data'])
    if column['kind'] == 'name': return [column['levels'][c] if c != MISSING else None for c in code]
    return np.where(code == MISSING, np.nan, column['lo'] + column['step'] * code)


def atlas(page): return Image.open(io.BytesIO(base64.b64decode(page['thumbs']['src'].split(',')[1])))


def test_a_page_holds_the_values_of_the_table():
    emb, _, _ = points()
    page = content(plane(emb))
    columns = {c['name']: unpacked(c) for c in page['columns']}
    rows = shuffled(emb)
    for name in ('dataset', 'method', 'image_id'): assert list(columns[name]) == list(rows[name])
    for name in ('oa', 'predicted'): np.testing.assert_allclose(columns[name], rows[name], atol=1e-5)
    assert list(columns['boxes']) == list(rows.boxes)  # whole numbers are exact
    u = codes(page['u']) / 65535
    np.testing.assert_allclose(u, (rows.u - rows.u.min()) / np.ptp(rows.u), atol=1e-5)
    # one scale for both axes
    assert abs(page['high'] / page['wide'] - np.ptp(rows.v) / np.ptp(rows.u)) < 1e-3


COLUMNS = [
    [None] * 5,
    [np.nan] * 5,
    [True, False, True, True, None],
    [7.] * 5,
    [1e9, 1e9 + 1, 0, -3, np.inf],
    ['a', 'a', 'b', None, 'é<&>'],
]


@pytest.mark.parametrize('column', COLUMNS, ids=str)
def test_columns_of_all_kinds(column):
    emb = pd.DataFrame(dict(u=range(5), v=range(5), x=column))
    packed = content(plane(emb, 'x'))['columns'][0]
    values = unpacked(packed)
    expected = shuffled(emb).x
    if packed['kind'] == 'number':
        np.testing.assert_allclose(values, expected.astype(float).replace(np.inf, np.nan), rtol=1e-4, atol=2e4)
        return
    names = [None if x is None else str(x) for x in values]
    assert names == [None if pd.isna(x) else str(x) for x in expected]


def test_five_thousand_points_with_thumbnails_fit(tmp_path):
    emb, x, table = points(5000, 5000)
    pictures = []
    for i in range(100):
        rgb = scene(TYPES[i % 4], i, 64).image.transpose(1, 2, 0)
        pictures.append(Image.fromarray((rgb * 255).astype(np.uint8)))
    images = {f'im-{i:04d}': pictures[i % 100] for i in range(5000)}
    path = to_html(emb, tmp_path/'p.html', images=images)
    page = content(path.read_text(encoding='utf-8'))
    thumbs = page['thumbs']
    assert path.stat().st_size <= LIMIT
    assert thumbs['n'] == 5000 and thumbs['side'] >= 32
    assert atlas(page).width == thumbs['across'] * thumbs['side']
    assert (codes(page['thumbAt']) < 5000).all()


def test_thumbnails_belong_to_their_rows():
    def grey(k): return np.full((3, 8, 8), k / 10, np.float32)
    emb, _, _ = points(40, 5)
    by_id = {f'im-{k:04d}': grey(k) for k in range(4)}
    by_row = [grey(k % 5) if k % 5 < 4 else None for k in range(40)]
    for images in (by_id, by_row):
        page = content(plane(emb, images=images))
        picture = np.asarray(atlas(page).convert('L'))
        side = page['thumbs']['side']
        across = page['thumbs']['across']
        for j, image_id in zip(codes(page['thumbAt']), shuffled(emb).image_id):
            k = int(image_id[-1])
            if k == 4:
                assert j == MISSING
                continue
            y = j // across * side + side // 2
            x = j % across * side + side // 2
            assert abs(picture[y, x] - 25.5 * k) < 6


def test_the_file_loads_nothing_and_escapes_text(tmp_path):
    emb, _, _ = points(30)
    path = to_html(emb.assign(dataset=[HOSTILE, 'b'] * 15), tmp_path/'p.html', 'dataset', title=HOSTILE)
    text = path.read_text(encoding='utf-8')
    assert text.count('<script') == 2
    assert 'alert("x")</script>' not in text
    assert HOSTILE in content(text)['columns'][0]['levels']
    assert CSP in text and not re.search(r'https?://|@import|fetch\(|XMLHttp', text)


def test_columns_of_arrays_are_left_out():
    emb, _, _ = points(30)
    page = content(plane(emb.assign(mask=[np.zeros(3)] * 30)))
    names = {c['name'] for c in page['columns']}
    assert names == {'dataset', 'method', 'image_id', 'scene', 'oa', 'predicted', 'boxes'}


def test_the_head_gives_the_measured_separation(tmp_path):
    emb, x, table = points()
    def written(**options): return to_html(emb, tmp_path/'p.html', **options).read_text(encoding='utf-8')
    assert 'Separation not measured' in written() and 'pca, seed 0' in written()
    numbers = separation(x[:90], table.oa[:90], table.dataset[:90])
    assert f'skill {numbers["skill"]:.2f}' in written(numbers=numbers)
    assert 'n = 120 of 300' in written(max_points=120)
    assert drawn(emb.assign(u=emb.u.where(emb.index > 9))).startswith('n = 290 of 300, 10 without a place')


def test_errors_name_the_remedy(tmp_path):
    emb, _, _ = points(30)
    with pytest.raises(SchemaError, match='no column v'): to_html(emb.drop(columns='v'), tmp_path/'p.html')
    with pytest.raises(SchemaError, match='empty'): to_html(emb.head(0), tmp_path/'p.html')
    with pytest.raises(SchemaError, match='Project the features'): plane(emb.assign(u=np.nan))
    with pytest.raises(UnknownName, match='dataset'): plane(emb, 'datset')
    with pytest.raises(Incompatible, match='2 images for 30 points'): plane(emb, images=[None, None])
    with pytest.raises(SchemaError, match='larger limit'): to_html(emb, tmp_path/'p.html', limit=16_000)
    without_images = to_html(emb, tmp_path/'p.html')
    limit = without_images.stat().st_size + 500
    without_images.unlink()
    noise = [np.random.default_rng(k).random((3, 64, 64), dtype=np.float32) for k in range(30)]
    with pytest.raises(SchemaError, match='30 images of 16 pixels'):
        to_html(emb, tmp_path/'p.html', images=noise, limit=limit)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope='module')
def page(tmp_path_factory, chromium):
    emb, x, table = points()
    images = {f'im-{i:04d}': scene(TYPES[i % 4], i, 64).image for i in range(40)}
    numbers = separation(x, table.oa, table.dataset, table.scene, emb[['u', 'v']])
    path = tmp_path_factory.mktemp('page') / 'p.html'
    to_html(emb, path, numbers=numbers, images=images, title='Scenes')
    with opened(chromium, path.as_uri(), accept_downloads=True) as browser_page:
        browser_page.wait_for_selector('.plane[data-ready]')
        yield browser_page, shuffled(emb).reset_index(drop=True)


def ask(browser_page, code, *args):
    script = f'args => {{ const plane = document.querySelector(".plane").plane; return {code} }}'
    return browser_page.evaluate(script, list(args))


def positions(browser_page, n): return np.array(ask(browser_page, f'[...Array({n}).keys()].map(plane.at)'))


def nearest_gap(at):  # (n,2) -> (n,) pixels to the nearest other point
    return np.sort(np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)), 1)[:, 1]


@pytest.fixture(autouse=True)
def fresh(request):
    if 'page' not in request.fixturenames: return
    browser_page = request.getfixturevalue('page')[0]
    browser_page.select_option('.plane select.color', 'oa')
    for name in ('dataset', 'method'): browser_page.select_option(f'.plane select.filter[name={name}]', '')
    browser_page.click('.plane .fit')
    browser_page.click('[data-mode=move]')
    if browser_page.is_enabled('.plane .none'): browser_page.click('.plane .none')


def lasso(browser_page, corners, ctrl=False):
    browser_page.click('[data-mode=lasso]')
    if ctrl: browser_page.keyboard.down('Control')
    browser_page.mouse.move(*corners[0])
    browser_page.mouse.down()
    for corner in [*corners[1:], corners[0]]: browser_page.mouse.move(*corner, steps=2)
    browser_page.mouse.up()
    if ctrl: browser_page.keyboard.up('Control')


def test_pointing_shows_the_values_of_that_point(page):
    browser_page, rows = page
    at = positions(browser_page, len(rows))
    gaps = nearest_gap(at)
    unknown = rows.predicted.isna().idxmax()
    apart = unknown if gaps[unknown] > 1 else np.argmax(gaps)
    for i in [*np.argsort(gaps)[-4:], apart]:
        browser_page.mouse.move(*at[i])
        names = browser_page.locator('.tip th').all_text_contents()
        values = dict(zip(names, browser_page.locator('.tip td').all_text_contents()))
        row = rows.loc[i]
        assert values['OA'] == f'{row.oa:.3f}'
        assert values['image'] == row.image_id
        assert values['method'] == row.method
        assert values['boxes'] == str(row.boxes)
        assert values['predicted OA'] == ('unknown' if np.isnan(row.predicted) else f'{row.predicted:.3f}')
        assert browser_page.locator('.tip canvas').count() == (int(row.image_id[-4:]) < 40)
    browser_page.mouse.move(5, 5)
    assert not browser_page.is_visible('.tip')


PIXELS = '''() => {
    const canvas = document.querySelector(".plane .tip canvas");
    return canvas.getContext("2d").getImageData(0, 0, 224, 224).data.join();
}'''


def test_the_thumbnail_is_drawn(page):
    browser_page, rows = page
    at = positions(browser_page, len(rows))
    gaps = nearest_gap(at)
    i = max(rows.index[rows.image_id < 'im-0040'], key=lambda k: gaps[k])
    browser_page.mouse.move(*at[i])
    pixels = np.array(browser_page.evaluate(PIXELS).split(','), float).reshape(224, 224, 4)
    k = int(rows.image_id[i][-4:])
    image = scene(TYPES[k % 4], k, 64).image
    assert np.abs(pixels[..., :3].mean((0, 1)) / 255 - image.mean((1, 2))).max() < 0.03


def test_a_lasso_counts_and_averages(page):
    browser_page, rows = page
    at = positions(browser_page, len(rows))
    middle = at.mean(0)
    size = np.array([130, 90])
    corners = [tuple(middle + size * c) for c in ((-1, -1), (1, -.8), (.9, 1), (-.7, .8))]
    lasso(browser_page, corners)
    inside = Polygon(corners).contains_points(at)
    assert 20 < inside.sum() < 290
    assert ask(browser_page, 'plane.selected()') == list(np.flatnonzero(inside))
    text = browser_page.inner_text('.plane .summary')
    oa, predicted = rows.oa[inside].mean(), rows.predicted[inside].mean()
    assert text.startswith(f'{inside.sum()} selected: mean OA {oa:.3f}, mean predicted OA {predicted:.3f}')
    assert '300 of 300' in text

    left, top = at.min(0) - 4
    right = at[:, 0].max() + 4
    strip = [(left, top), (right, top), (right, middle[1] - 95), (left, middle[1] - 95)]
    lasso(browser_page, strip, ctrl=True)
    both = inside | Polygon(strip).contains_points(at)
    assert ask(browser_page, 'plane.selected()') == list(np.flatnonzero(both))
    browser_page.click('.plane .none')
    assert browser_page.inner_text('.plane .summary').startswith('Nothing selected')
    assert browser_page.is_disabled('.plane .save')


def test_kept_selections_are_chosen_in_a_dark_page(chromium, tmp_path):
    emb, _, _ = points(60)
    emb = emb.assign(gap=emb.predicted - emb.oa)
    kept = [dict(name=HOSTILE, rows=[3, 7, 41], about='tags: a\nnote <b>'), dict(name='one', rows=[5], about='')]
    path = to_html(emb, tmp_path/'p.html', 'gap', selections=kept, provenance='made today\nby <i>')
    rows = shuffled(emb)['image_id'].tolist()
    with opened(chromium, path.as_uri(), color_scheme='dark') as browser_page:
        browser_page.wait_for_selector('.plane[data-ready]')
        assert browser_page.locator('.plane .key').inner_text().split('\n')[1].endswith('over-predicted')
        browser_page.select_option('.plane .kept', label=' '.join(HOSTILE.split()))
        chosen = [rows[k] for k in ask(browser_page, 'plane.selected()')]
        assert sorted(chosen) == sorted(emb.image_id[[3, 7, 41]])
        assert browser_page.inner_text('.plane .about') == 'tags: a\nnote <b>'
        assert browser_page.get_by_text('by <i>').is_visible()
        at = np.array(ask(browser_page, 'plane.at(0)'))
        browser_page.mouse.move(*at)
        browser_page.locator('.plane .tip').wait_for()
        assert faint_texts(browser_page.locator('body')) == []
        assert browser_page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(17, 17, 17)'
        if 'RSSQA_SHOTS' in os.environ: browser_page.screenshot(path=f'{os.environ["RSSQA_SHOTS"]}/page-dark.png')
        browser_page.click('.plane .none')
        assert browser_page.input_value('.plane .kept') == '' and browser_page.inner_text('.plane .about') == ''
    with opened(chromium, path.as_uri()) as browser_page:
        browser_page.wait_for_selector('.plane[data-ready]')
        assert faint_texts(browser_page.locator('body')) == []


def test_the_selection_can_be_downloaded(page):
    browser_page, rows = page
    at = positions(browser_page, len(rows))
    (left, top), (right, bottom) = at.min(0) - 5, at.max(0) + 5
    browser_page.select_option('.filter[name=dataset]', label='town')
    lasso(browser_page, [(left, top), (right, top), (right, bottom), (left, bottom)])
    with browser_page.expect_download() as download: browser_page.click('.plane .save')
    assert download.value.suggested_filename == 'p-selection.csv'
    table = pd.read_csv(download.value.path())
    expected = rows[rows.dataset == 'town'].reset_index(drop=True)
    assert len(table) and list(table.image_id) == list(expected.image_id)
    assert set(table.dataset) == {'town'}
    for c in ('oa', 'predicted', 'boxes'): np.testing.assert_allclose(table[c], expected[c], atol=2e-5)


def test_filters_colours_and_legend(page):
    browser_page, rows = page
    browser_page.select_option('.filter[name=dataset]', label='rural')
    browser_page.select_option('.filter[name=method]', label='unet')
    both = (rows.dataset == 'rural') & (rows.method == 'unet')
    assert ask(browser_page, 'plane.shown()') == list(rows.index[both])
    browser_page.select_option('.filter[name=dataset]', '')
    browser_page.select_option('.filter[name=method]', '')
    browser_page.select_option('.plane .color', 'method')
    labels = browser_page.locator('.plane .key button').all_text_contents()
    assert labels == [f'{m} ({k})' for m, k in rows.method.value_counts().sort_index().items()]
    first = '.plane .key button >> nth=0'
    browser_page.click(first)
    assert ask(browser_page, 'plane.shown()') == list(rows.index[rows.method != 'pspnet'])
    assert browser_page.get_attribute(first, 'aria-pressed') == 'false'
    browser_page.select_option('.plane .color', 'predicted')
    assert 'unknown (' in browser_page.inner_text('.plane .key')
    assert len(ask(browser_page, 'plane.shown()')) == len(rows)


def test_zoom_pan_and_keys(page):
    browser_page, rows = page
    press = browser_page.keyboard.press
    before = positions(browser_page, len(rows))
    browser_page.mouse.click(*before[0])
    browser_page.mouse.move(*before[7])
    browser_page.mouse.wheel(0, -400)
    after = positions(browser_page, len(rows))
    np.testing.assert_allclose(after[7], before[7], atol=1)  # what lies under the pointer stays there
    assert np.ptp(after[:, 0]) > 1.5 * np.ptp(before[:, 0])
    press('0')
    np.testing.assert_allclose(positions(browser_page, len(rows)), before, atol=.6)
    browser_page.mouse.move(300, 400)
    browser_page.mouse.down()
    browser_page.mouse.move(350, 420, steps=2)
    browser_page.mouse.up()
    np.testing.assert_allclose(positions(browser_page, len(rows)) - before, [[50, 20]] * len(rows), atol=.6)
    press('0')
    press('Escape')
    press('n')
    spoken = browser_page.text_content('.plane .spoken')
    assert re.search(r'OA [01]\.\d{3}', spoken) and browser_page.is_visible('.tip')
    press('n')
    assert browser_page.text_content('.plane .spoken') != spoken
    press('p')
    assert browser_page.text_content('.plane .spoken') == spoken
    press('Enter')
    assert len(ask(browser_page, 'plane.selected()')) == 1
    press('Escape')
    assert ask(browser_page, 'plane.selected()') == []


UNNAMED = '''() => {
    const controls = document.querySelectorAll(".plane button, .plane select, .plane canvas.points");
    const named = e => e.textContent.trim() || e.ariaLabel || e.closest("label");
    return [...controls].filter(e => !named(e)).length;
}'''


def test_all_controls_have_names_for_screen_readers(page):
    browser_page, _ = page
    assert browser_page.evaluate(UNNAMED) == 0
    assert 'Coloured by OA' in browser_page.get_attribute('canvas.points', 'aria-label')
    assert browser_page.get_attribute('canvas.points', 'tabindex') == '0'
