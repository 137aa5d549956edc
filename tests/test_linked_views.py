"Linked views: what happens in one picture happens in all, and each says what was measured behind it."
import io
import json
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from browser import choose_theme, chromium, drag, faint_texts, lab, page, run_all  # noqa: F401 (fixtures)
from rssqa.core import Incompatible, MissingFeatures
from rssqa.viz.committed import tables_folder
from rssqa.viz.explorer import example
from rssqa.viz.explorer_widget import Explorer
from rssqa.viz.linked_views import LinkedViews, committed_features, explore_linked, separation_sentence
from rssqa.tables.sqed import load_sqed
from rssqa.tables.rs_sqed_open import published_path


def features_of(state, seed=0):
    rng = np.random.default_rng(seed)
    n = len(state)
    return dict(quality=state.table.oa.to_numpy()[:, None] + rng.normal(0, 0.01, (n, 3)), noise=rng.normal(size=(n, 5)))


@pytest.fixture
def linked():
    state = example()
    return LinkedViews(Explorer(state), features_of(state), method='pca')


def widgets_of(linked): return [view.scatter.widget for view in linked.views.values()]


def test_a_lasso_in_one_view_selects_in_all(linked):
    first, second = widgets_of(linked)
    second.selection = np.array([7, 3, 11])
    assert linked.state.chosen.tolist() == [3, 7, 11] and linked.state.reason == 'lasso in noise'
    assert sorted(first.selection) == sorted(linked.explorer.scatter.widget.selection) == [3, 7, 11]
    linked.state.select([1, 2])
    assert sorted(first.selection) == sorted(second.selection) == [1, 2] and linked.state.reason == 'picked'
    first.selection = np.array([], int)
    assert not len(linked.state.chosen) and not len(second.selection)


def test_pointing_at_a_map_marks_it_everywhere(linked):
    first, second = widgets_of(linked)
    first.hovering = 5
    assert linked.state.focus == 5 and second.hovering == 5
    first.hovering = None
    assert linked.state.focus == 5 and second.hovering is None


def test_filter_and_colour_are_those_of_the_explorer(linked):
    some = linked.state.table.dataset.iloc[0]
    linked.state.filter(dataset=[some])
    expected = np.flatnonzero(linked.state.table.dataset == some).tolist()
    for view in linked.views.values(): assert sorted(view.scatter.widget.filter) == expected
    linked.state.filter(dataset=None)
    for view in linked.views.values(): assert view.scatter.widget.filter is None
    for column in ('method', 'oa'):
        linked.state.color(column)
        main = linked.explorer.scatter.widget
        for widget in widgets_of(linked):
            np.testing.assert_array_equal(widget.points[:, 2], main.points[:, 2])
            np.testing.assert_array_equal(widget.color, main.color)


def test_points_lie_where_the_projection_puts_them(linked):
    for view in linked.views.values():
        widget = view.scatter.widget
        low, high = np.array([widget.x_scale_domain, widget.y_scale_domain]).T
        expected = 2 * (view.points - low) / (high - low) - 1
        np.testing.assert_allclose(widget.points[:, :2], expected, atol=1e-5)


def test_sentences_tell_good_features_from_noise(linked):
    quality, noise = (view.note.value for view in linked.views.values())
    assert 'PCA. It separates quality:' in quality and 'does not separate quality' in noise


@pytest.mark.parametrize('found, silhouette, words', [
    (0.57, 0.0, 'separates quality: 57% of maps find their third of OA by neighbours, chance is 33%.* gradient'),
    (0.57, 0.4, 'chance is 33%.$'),
    (0.38, 0.0, 'separates quality a little'),
    (0.33, 0.0, 'does not separate quality: 33%'),
])
def test_a_sentence_follows_its_numbers(found, silhouette, words):
    numbers = dict(n=90, tertile_accuracy=found, chance=0.33, silhouette=silhouette)
    assert pd.Series([separation_sentence(numbers)]).str.contains(words).all()
    assert 'could not be measured' in separation_sentence({}) and 'could not' in separation_sentence(dict(n=0))


def test_features_of_some_maps_draw_these_maps(linked):
    state = example()
    rows = np.arange(2, 40, 3)
    views = LinkedViews(Explorer(state), dict(few=np.random.default_rng(0).normal(size=(len(rows), 4))), rows, 'pca')
    view = views.views['few']
    assert np.flatnonzero(view.placed).tolist() == rows.tolist()
    assert sorted(view.scatter.widget.filter) == rows.tolist()
    view.scatter.widget.selection = rows[:2]
    assert state.chosen.tolist() == rows[:2].tolist()


def test_a_failed_projection_keeps_pca(linked, monkeypatch):
    before = linked.views['noise'].points.copy()
    monkeypatch.setattr('rssqa.viz.linked_views.project', lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError): linked.wait()
    np.testing.assert_array_equal(linked.views['noise'].points, before)


def test_wrong_features_are_refused():
    state = example()
    n = len(state)
    with pytest.raises(Incompatible, match=f'(?i)found shape .* expected \\({n},D\\)'):
        LinkedViews(Explorer(state), dict(a=np.zeros((n - 1, 2))))
    bad = np.zeros((n, 2))
    bad[3, 1] = np.nan
    with pytest.raises(Incompatible, match='(?i)missing or infinite'): LinkedViews(Explorer(state), dict(a=bad))
    with pytest.raises(MissingFeatures, match='(?i)no features'): LinkedViews(Explorer(state), {})
    with pytest.raises(MissingFeatures, match='(?i)only committed results'): explore_linked(state)


def test_committed_features_are_those_of_one_method():
    table = load_sqed(published_path(tables_folder(), 'open'))
    with pytest.raises(Incompatible, match='(?i)rows of one method'): committed_features(table)
    part = table[table.method == 'unet'].sample(40, random_state=0)
    features = committed_features(part)
    assert list(features) == ['semantic', 'segmenter', 'fused', 'label-free']
    assert all(len(x) == 40 and np.isfinite(x).all() for x in features.values())
    again = committed_features(part.iloc[::-1])
    np.testing.assert_allclose(again['segmenter'][::-1], features['segmenter'], atol=1e-4)


SOURCES = '''import numpy as np
from rssqa.viz.explorer import example
from rssqa.viz.explorer_widget import Explorer
from rssqa.viz.linked_views import LinkedViews
state = example()
rng = np.random.default_rng(0)
n = len(state)
features = dict(quality=state.table.oa.to_numpy()[:, None] + rng.normal(0, .05, (n, 3)), noise=rng.normal(size=(n, 5)))
linked = LinkedViews(Explorer(state), features, method='pca')
linked''', '''import json, os
from pathlib import Path

def report(change=''):
    facts = dict(chosen=state.chosen.tolist(), focus=state.focus, reason=state.reason)
    Path('.linked').write_text(json.dumps(facts))
    os.replace('.linked', 'linked.json')

np.save('linked.npy', linked.views['noise'].scatter.widget.points)
state.observe(report)
report()'''


def wait_for(page, lab, condition, wait=180):
    path = lab.home/'linked.json'
    for _ in range(10 * wait):
        report = json.loads(path.read_text()) if path.exists() else {}
        if report and condition(report): return report
        page.wait_for_timeout(100)
    pytest.fail(f'the kernel reports {report}')


def shot(page, name): # for a person to look at
    if 'RSSQA_SHOTS' in os.environ: page.screenshot(path=f'{os.environ["RSSQA_SHOTS"]}/{name}.png')


def look_at_themes(page, canvas):
    "Every text can be read in both themes, an error and a comparison too; scatters have the background of the theme."
    page.set_viewport_size(dict(width=1500, height=2000))
    page.get_by_role('button', name='Compare').click()
    page.locator('.rssqa-figure svg').wait_for()
    page.get_by_text('?', exact=True).first.click()
    page.get_by_text('Nearness is measured among all features').first.wait_for()
    for theme, is_right in (('JupyterLab Light', '> 240'), ('JupyterLab Dark', '< 40')):
        choose_theme(page, theme)
        page.wait_for_function(f"""() => [...document.querySelectorAll('.rssqa-explorer [data-jss-theme]')]
            .every(e => getComputedStyle(e).backgroundColor.match(/[0-9]+/g).slice(0, 3).every(x => x {is_right}))""")
        page.get_by_placeholder('gap < -0.3').fill(f'no such {theme}')
        page.keyboard.press('Enter')
        page.locator('.rssqa-error').wait_for()
        page.locator('.rssqa-explorer canvas').first.evaluate('e => e.scrollIntoView()')
        shot(page, f'{theme[11:].lower()}')
        assert faint_texts(page.locator('.jp-OutputArea .rssqa-explorer').first) == []
        assert page.locator('.rssqa-explorer :text-is("Color")').count() == 0      # no second legend, no axes
        picture = canvas.screenshot()
        corner = np.asarray(Image.open(io.BytesIO(picture)).convert('L'))[3, 3]
        assert eval(f'{corner} {is_right}')


def test_a_lasso_with_the_mouse_in_a_view(page, lab):
    lab.write('linked.ipynb', *SOURCES)
    run_all(page, lab.url('linked.ipynb'))
    wait_for(page, lab, lambda r: True)
    lasso = page.locator('[title="Activate lasso selection"]').nth(2)         # Explorer, quality, noise
    lasso.click()
    canvas = lasso.locator('xpath=ancestor::*[.//canvas][1]//canvas').first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(800)
    points = np.load(lab.home/'linked.npy')[:, :2]
    box = canvas.bounding_box()
    centre = np.array([box['x'] + box['width'] / 2, box['y'] + box['height'] / 2])
    at = centre + points * np.array([1, -1]) * box['height'] / 2
    middle = float(np.median(at[:, 0]))
    gap = np.sort(np.abs(at[:, 0] - middle))
    edge = middle + 0.5 * float(gap[gap > 0][0])
    left, top, bottom = box['x'] + 2, box['y'] + 2, box['y'] + box['height'] - 2
    drag(page, [(left, top), (edge, top), (edge, bottom), (left, bottom), (left, top)])
    if 'RSSQA_SHOTS' in os.environ: page.screenshot(path=f'{os.environ["RSSQA_SHOTS"]}/linked.png')
    report = wait_for(page, lab, lambda r: r['chosen'])
    inside = np.flatnonzero(at[:, 0] < edge)
    assert set(inside) >= set(report['chosen']) and len(report['chosen']) >= 0.9 * len(inside)
    assert report['reason'] == 'lasso in noise'
    page.get_by_text(f'{len(report["chosen"])} selected (lasso in noise)').wait_for()
    look_at_themes(page, canvas)
    assert [fault for fault in page.faults if 'Failed to initialize model' not in fault] == []
