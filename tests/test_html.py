"""A page of points is one closed file within its budget; in a browser it shows the right values, counts what a lasso holds and hands it out."""
import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.path import Path as Loop
from PIL import Image

from browser import chromium, opened  # noqa: F401 (a fixture)
from rssqa.core import Incompatible, SchemaError, UnknownName
from rssqa.viz.html import CSP, LIMIT, MISSING, drawn, plane, to_html
from rssqa.data.synthetic import SCENE_TYPES, scene
from rssqa.viz.projection import project, separation

EVIL = '</script><script>alert("x")</script> {part} {data} & "y"'


def points(n=300, images=50, seed=0):
    rng = np.random.default_rng(seed)
    look = rng.choice(list(SCENE_TYPES), n)
    oa = rng.random(n)
    table = pd.DataFrame(
        dict(
            image_id=[f'im-{i % images:04d}' for i in range(n)],
            dataset=look,
            method=rng.choice(['unet', 'pspnet', 'segformer'], n),
            scene=[f's{i % 9}' for i in range(n)],
            oa=oa,
            predicted=np.where(rng.random(n) < 0.1, np.nan, np.clip(oa + rng.normal(0, 0.05, n), 0, 1)),
            boxes=rng.integers(0, 900, n),
        )
    )
    x = rng.normal(size=(n, 6)) + oa[:, None] * 4
    return project(x, 'pca', table=table), x, table


def told(text): return json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.S)[1])


def unpacked(column):
    code = np.frombuffer(base64.b64decode(column['data']), '<u2')
    if column['kind'] == 'name': return [column['levels'][c] if c != MISSING else None for c in code]
    return np.where(code == MISSING, np.nan, column['lo'] + column['step'] * code)


def test_what_goes_in_comes_out():
    emb, _, _ = points()
    page = told(plane(emb))
    held = {c['name']: unpacked(c) for c in page['columns']}
    rows = emb.sample(len(emb), random_state=0)
    for name in ('dataset', 'method', 'image_id'): assert list(held[name]) == list(rows[name])
    for name in ('oa', 'predicted'): np.testing.assert_allclose(held[name], rows[name], atol=1e-5)
    assert list(held['boxes']) == list(rows.boxes)                                # whole numbers are exact
    u = np.frombuffer(base64.b64decode(page['u']), '<u2') / 65535
    np.testing.assert_allclose(u, (rows.u - rows.u.min()) / np.ptp(rows.u), atol=1e-5)
    # one scale for both axes
    assert abs(page['high'] / page['wide'] - np.ptp(rows.v) / np.ptp(rows.u)) < 1e-3


@pytest.mark.parametrize('column', [[None] * 5, [np.nan] * 5, [True, False, True, True, None], [7.] * 5, [1e9, 1e9 + 1, 0, -3, np.inf], list('aab') + [None, 'é<&>']], ids=str)
def test_columns_of_all_kinds(column):
    emb = pd.DataFrame(dict(u=range(5), v=range(5), x=column))
    page = told(plane(emb, 'x'))
    got = unpacked(page['columns'][0])
    want = emb.sample(5, random_state=0).x
    if page['columns'][0]['kind'] == 'number':
        np.testing.assert_allclose(got, want.astype(float).replace(np.inf, np.nan), rtol=1e-4, atol=2e4)
    else: assert [g if g is None else str(g) for g in got] == [None if pd.isna(w) else str(w) for w in want]


def test_five_thousand_points_with_thumbnails_fit(tmp_path):
    emb, x, table = points(5000, 5000)
    small = {
        f'im-{i:04d}': Image.fromarray(
            (scene(list(SCENE_TYPES)[i % 4], i, 64).image.transpose(1, 2, 0) * 255).astype(np.uint8)
        )
        for i in range(100)
    }
    images = {f'im-{i:04d}': small[f'im-{i % 100:04d}'] for i in range(5000)}
    path = to_html(emb, tmp_path/'p.html', images=images)
    page = told(path.read_text(encoding='utf-8'))
    assert path.stat().st_size <= LIMIT and page['thumbs']['n'] == 5000 and page['thumbs']['side'] >= 32
    sheet = Image.open(io.BytesIO(base64.b64decode(page['thumbs']['src'].split(',')[1])))
    assert (
        sheet.width == page['thumbs']['across'] * page['thumbs']['side']
        and (np.frombuffer(base64.b64decode(page['thumbAt']), '<u2') < 5000).all()
    )


def test_thumbnails_belong_to_their_rows():
    emb, _, _ = points(40, 5)
    grey = lambda k: np.full((3, 8, 8), k / 10, np.float32)
    for images in ({f'im-{k:04d}': grey(k) for k in range(4)}, [grey(k % 5) if k % 5 < 4 else None for k in range(40)]):
        page = told(plane(emb, images=images))
        sheet = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(page['thumbs']['src'].split(',')[1]))).convert('L')
        )
        side = page['thumbs']['side']
        across = page['thumbs']['across']
        at = np.frombuffer(base64.b64decode(page['thumbAt']), '<u2')
        for j, image_id in zip(at, emb.sample(40, random_state=0).image_id):
            k = int(image_id[-1])
            if k == 4:
                assert j == MISSING
                continue
            assert abs(sheet[j // across * side + side // 2, j % across * side + side // 2] - 25.5 * k) < 6


def test_it_is_closed_and_escapes(tmp_path):
    emb, _, _ = points(30)
    path = to_html(emb.assign(dataset=[EVIL, 'b'] * 15), tmp_path/'p.html', 'dataset', title=EVIL)
    text = path.read_text(encoding='utf-8')
    assert (
        text.count('<script') == 2
        and 'alert("x")</script>' not in text
        and EVIL in told(text)['columns'][0]['levels']
    )
    assert CSP in text and not re.search(r'https?://|@import|fetch\(|XMLHttp', text)
    assert {c['name'] for c in told(plane(emb.assign(mask=[np.zeros(3)] * 30)))['columns']} == {
        'dataset',
        'method',
        'image_id',
        'scene',
        'oa',
        'predicted',
        'boxes',
    }


def test_the_head_says_what_was_measured(tmp_path):
    emb, x, table = points()
    say = lambda **more: to_html(emb, tmp_path/'p.html', **more).read_text(encoding='utf-8')
    assert 'Separation not measured' in say() and 'pca, seed 0' in say()
    numbers = separation(x[:90], table.oa[:90], table.dataset[:90])
    assert f'skill {numbers["skill"]:.2f}' in say(numbers=numbers) and 'n = 120 of 300' in say(max_points=120)
    assert drawn(emb.assign(u=emb.u.where(emb.index > 9))).startswith('n = 290 of 300, 10 without a place')


def test_mistakes_say_what_to_do(tmp_path):
    emb, _, _ = points(30)
    with pytest.raises(SchemaError, match='no column v'): to_html(emb.drop(columns='v'), tmp_path/'p.html')
    with pytest.raises(SchemaError, match='empty'): to_html(emb.head(0), tmp_path/'p.html')
    with pytest.raises(SchemaError, match='Project the features'): plane(emb.assign(u=np.nan))
    with pytest.raises(UnknownName, match='dataset'): plane(emb, 'datset')
    with pytest.raises(Incompatible, match='2 images for 30 points'): plane(emb, images=[None, None])
    with pytest.raises(SchemaError, match='larger limit'): to_html(emb, tmp_path/'p.html', limit=16_000)
    noise = [np.random.default_rng(k).random((3, 64, 64), dtype=np.float32) for k in range(30)]
    with pytest.raises(SchemaError, match='30 images of 16 pixels'):
        to_html(emb, tmp_path/'p.html', images=noise, limit=24_500)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope='module')
def page(tmp_path_factory, chromium):
    emb, x, table = points()
    images = {f'im-{i:04d}': scene(list(SCENE_TYPES)[i % 4], i, 64).image for i in range(40)}
    path = to_html(
        emb,
        tmp_path_factory.mktemp('page') / 'p.html',
        numbers=separation(x, table.oa, table.dataset, table.scene, emb[['u', 'v']]),
        images=images,
        title='Scenes',
    )
    with opened(chromium, path.as_uri(), accept_downloads=True) as seen:
        seen.wait_for_selector('.plane[data-ready]')
        yield seen, emb.sample(len(emb), random_state=0).reset_index(drop=True)


def ask(seen, code, *args):
    return seen.evaluate(
        f'args => {{ const plane = document.querySelector(".plane").plane; return {code} }}', list(args)
    )
def places(seen, n): return np.array(ask(seen, f'[...Array({n}).keys()].map(plane.at)'))


@pytest.fixture(autouse=True)
def fresh(request):
    if 'page' not in request.fixturenames: return
    seen = request.getfixturevalue('page')[0]
    for name in ('color', 'filter[name=dataset]', 'filter[name=method]'):
        seen.select_option(f'.plane select.{name}', 'oa' if name == 'color' else '')
    seen.click('.plane .fit')
    seen.click('[data-mode=move]')
    if seen.is_enabled('.plane .none'): seen.click('.plane .none')


def lasso(seen, corners, ctrl=False):
    seen.click('[data-mode=lasso]')
    if ctrl: seen.keyboard.down('Control')
    seen.mouse.move(*corners[0])
    seen.mouse.down()
    for corner in [*corners[1:], corners[0]]: seen.mouse.move(*corner, steps=2)
    seen.mouse.up()
    if ctrl: seen.keyboard.up('Control')


def test_pointing_shows_the_values_of_that_point(page):
    seen, rows = page
    at = places(seen, len(rows))
    gaps = np.sort(np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)), 1)[:, 1]
    for i in [*np.argsort(gaps)[-4:], rows.predicted.isna().idxmax() if gaps[rows.predicted.isna().idxmax()] > 1 else np.argmax(gaps)]:
        seen.mouse.move(*at[i])
        told = dict(
            zip(seen.locator('.tip th').all_text_contents(), seen.locator('.tip td').all_text_contents())
        )
        row = rows.loc[i]
        assert (
            told['OA'] == f'{row.oa:.3f}'
            and told['image'] == row.image_id
            and told['method'] == row.method
            and told['boxes'] == str(row.boxes)
        )
        assert told['predicted OA'] == ('unknown' if np.isnan(row.predicted) else f'{row.predicted:.3f}')
        assert seen.locator('.tip canvas').count() == (int(row.image_id[-4:]) < 40)
    seen.mouse.move(5, 5)
    assert not seen.is_visible('.tip')


def test_the_thumbnail_is_drawn(page):
    seen, rows = page
    at = places(seen, len(rows))
    gaps = np.sort(np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)), 1)[:, 1]
    i = max(rows.index[rows.image_id < 'im-0040'], key=lambda k: gaps[k])
    seen.mouse.move(*at[i])
    got = np.array(
        seen.evaluate(
            '() => { const c = document.querySelector(".plane .tip canvas"); return c.getContext("2d").getImageData(0, 0, 224, 224).data.join() }'
        ).split(','),
        float,
    ).reshape(224, 224, 4)[..., :3]
    k = int(rows.image_id[i][-4:])
    want = scene(list(SCENE_TYPES)[k % 4], k, 64).image
    assert np.abs(got.mean((0, 1)) / 255 - want.mean((1, 2))).max() < 0.03


def test_a_lasso_counts_and_averages(page):
    seen, rows = page
    at = places(seen, len(rows))
    middle = at.mean(0)
    size = np.array([130, 90])
    corners = [tuple(middle + size * c) for c in ((-1, -1), (1, -.8), (.9, 1), (-.7, .8))]
    lasso(seen, corners)
    inside = Loop(corners).contains_points(at)
    assert 20 < inside.sum() < 290 and ask(seen, 'plane.picked()') == list(np.flatnonzero(inside))
    text = seen.inner_text('.plane .told')
    assert (
        text.startswith(
            f'{inside.sum()} selected: mean OA {rows.oa[inside].mean():.3f}, mean predicted OA {rows.predicted[inside].mean():.3f}'
        )
        and '300 of 300' in text
    )
    corner = [
        tuple(at.min(0) - 4),
        (at[:, 0].max() + 4, at[:, 1].min() - 4),
        (at[:, 0].max() + 4, middle[1] - 95),
        (at[:, 0].min() - 4, middle[1] - 95),
    ]
    lasso(seen, corner, ctrl=True)
    assert ask(seen, 'plane.picked()') == list(np.flatnonzero(inside | Loop(corner).contains_points(at)))
    seen.click('.plane .none')
    assert seen.inner_text('.plane .told').startswith('Nothing selected') and seen.is_disabled('.plane .save')


def test_the_selection_can_be_taken_home(page):
    seen, rows = page
    at = places(seen, len(rows))
    box = [
        tuple(at.min(0) - 5),
        (at[:, 0].max() + 5, at[:, 1].min() - 5),
        tuple(at.max(0) + 5),
        (at[:, 0].min() - 5, at[:, 1].max() + 5),
    ]
    seen.select_option('.filter[name=dataset]', label='town')
    lasso(seen, box)
    with seen.expect_download() as got: seen.click('.plane .save')
    assert got.value.suggested_filename == 'p-selection.csv'
    table = pd.read_csv(got.value.path())
    want = rows[rows.dataset == 'town'].reset_index(drop=True)
    assert len(table) and list(table.image_id) == list(want.image_id) and set(table.dataset) == {'town'}
    for c in ('oa', 'predicted', 'boxes'): np.testing.assert_allclose(table[c], want[c], atol=2e-5)


def test_filters_colours_and_legend(page):
    seen, rows = page
    seen.select_option('.filter[name=dataset]', label='rural')
    seen.select_option('.filter[name=method]', label='unet')
    assert ask(seen, 'plane.shown()') == list(rows.index[(rows.dataset == 'rural') & (rows.method == 'unet')])
    seen.select_option('.filter[name=dataset]', '')
    seen.select_option('.filter[name=method]', '')
    seen.select_option('.plane .color', 'method')
    labels = seen.locator('.plane .key button').all_text_contents()
    assert labels == [f'{m} ({k})' for m, k in rows.method.value_counts().sort_index().items()]
    seen.click('.plane .key button >> nth=0')
    assert (
        ask(seen, 'plane.shown()') == list(rows.index[rows.method != 'pspnet'])
        and seen.get_attribute('.plane .key button >> nth=0', 'aria-pressed') == 'false'
    )
    seen.select_option('.plane .color', 'predicted')
    assert 'unknown (' in seen.inner_text('.plane .key') and len(ask(seen, 'plane.shown()')) == len(rows)


def test_zoom_pan_and_keys(page):
    seen, rows = page
    before = places(seen, len(rows))
    seen.mouse.click(*before[0])
    seen.mouse.move(*before[7])
    seen.mouse.wheel(0, -400)
    after = places(seen, len(rows))
    # what lies under the pointer stays there
    np.testing.assert_allclose(after[7], before[7], atol=1)
    assert np.ptp(after[:, 0]) > 1.5 * np.ptp(before[:, 0])
    seen.keyboard.press('0')
    np.testing.assert_allclose(places(seen, len(rows)), before, atol=.6)
    seen.mouse.move(300, 400)
    seen.mouse.down()
    seen.mouse.move(350, 420, steps=2)
    seen.mouse.up()
    np.testing.assert_allclose(places(seen, len(rows)) - before, [[50, 20]] * len(rows), atol=.6)
    seen.keyboard.press('0')
    seen.keyboard.press('Escape')
    seen.keyboard.press('n')
    spoken = seen.text_content('.plane .spoken')
    assert re.search(r'OA [01]\.\d{3}', spoken) and seen.is_visible('.tip')
    seen.keyboard.press('n')
    assert seen.text_content('.plane .spoken') != spoken
    seen.keyboard.press('p')
    assert seen.text_content('.plane .spoken') == spoken
    seen.keyboard.press('Enter')
    assert len(ask(seen, 'plane.picked()')) == 1
    seen.keyboard.press('Escape')
    assert ask(seen, 'plane.picked()') == []


def test_the_plot_has_names_for_all_controls(page):
    seen, _ = page
    unnamed = seen.evaluate(
        '() => [...document.querySelectorAll(".plane button, .plane select, .plane canvas.points")].filter(e => !(e.textContent.trim() || e.ariaLabel || e.closest("label"))).length'
    )
    assert (
        unnamed == 0
        and 'Coloured by OA' in seen.get_attribute('canvas.points', 'aria-label')
        and seen.get_attribute('canvas.points', 'tabindex') == '0'
    )
