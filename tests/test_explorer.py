"""The Explorer without a browser: the state's answers, and a window that follows it."""
import asyncio, base64, html, io, json, shutil, subprocess, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from rssqa.bench.explorer_speed import random_maps
from rssqa.core import DataNotFound, Incompatible, MissingFeatures, SchemaError, UnknownName
from rssqa.data.synthetic import PALETTE as COLOURS, scene
from rssqa.tables.store import Store, put_vectors
from rssqa.viz.explorer import (EmbeddingSelection, ExplorerState, case_reader, count_names, count_values, open_run,
                                paint_tile, save_run, sharpness, snapshot, why, why_text)
from rssqa.viz.columns import SIGNED_COLOURS, UNKNOWN
from rssqa.viz.explorer_widget import Explorer, explore
from rssqa.viz.scatter import SHADES, encode_colours, legend_html
from rssqa.viz.share import share_page

CLASSES = ('ground', 'building', 'road', 'vegetation', 'water', 'vehicle')
VECTORS = 'sem/words@abcdef01' # table of the store


def table(n=60, seed=0) -> pd.DataFrame:
    "Images with two maps each, placed by hand; uncertainty follows error."
    rng = np.random.default_rng(seed)
    i = np.arange(n)
    oa = rng.uniform(.3, 1, n)
    return pd.DataFrame(dict(
        image_id=[f'i{k // 2:03d}' for k in i],
        dataset=np.array(['coast', 'moor'])[i // 2 % 2],
        scene=[f's{k // 2 % 6}' for k in i],
        split=np.where(i // 2 % 3 == 0, 'test', 'train'),
        method=np.array(['unet', 'pspnet'])[i % 2],
        oa=oa,
        predicted=np.clip(oa + rng.normal(0, 0.05, n), 0, 1),
        entropy=1 - oa + rng.normal(0, 0.02, n),
        agree_majority=oa + rng.normal(0, 0.02, n),
        u=i % 10 * 1.0,
        v=i // 10 * 1.0,
    ))


class AxisEncoder:
    "An encoder whose sentences are the axes: 'water' is the first."
    name = 'words'
    dim = 4
    fingerprint = 'abcdef0123456789'
    words = ['water', 'road', 'field', 'roof']

    def encode_text(self, texts): return torch.eye(4)[[self.words.index(t.split()[0]) for t in texts]]


def cases(row):
    s = scene('town', int(row.image_id[1:]), 48)
    mask = np.roll(s.mask, 3 if row.method == 'unet' else 9, 0)
    return dict(image=s.image, truth=s.mask, mask=mask, palette=COLOURS, classes=CLASSES)


def state_with_tiles(): return ExplorerState(table(), images=cases)


@pytest.fixture
def stored(tmp_path):
    "A state with vectors in a store, and the vectors."
    t = table()
    store = Store(tmp_path/'store')
    ids = t.image_id.unique()
    noise = np.random.default_rng(1).normal(0, .1, (len(ids), 4))
    vectors = noise + np.eye(4)[np.arange(len(ids)) % 4]
    put_vectors(store, VECTORS, ids, vectors)
    return ExplorerState(t, store=store, encoder=AxisEncoder(), images=cases), vectors


# ---------------------------------------------------------------- filter, selection, histogram

def test_filters_agree_with_pandas():
    t = table()
    s = EmbeddingSelection(t)
    s.filter(dataset='coast', oa=(.4, .8), method=['unet', 'pspnet'], scene='s[0-3]', gap=(-.05, .05))
    gap = t.predicted - t.oa
    expected = t.dataset.eq('coast') & t.oa.between(0.4, 0.8)
    expected &= t.scene.isin(['s0', 's1', 's2', 's3']) & gap.between(-0.05, 0.05)
    assert 0 < expected.sum() < 30 and np.array_equal(s.mask, expected)
    s.filter(oa=None, gap=None, scene=None, method=None)
    assert np.array_equal(s.mask, t.dataset.eq('coast')) and s.filter(dataset=None).mask.all()


def test_a_wrong_filter_is_explained_and_changes_nothing():
    s = EmbeddingSelection(table()).filter(dataset='coast')
    before = s.mask.copy()
    with pytest.raises(UnknownName, match='Did you mean coast'): s.filter(dataset='coats')
    with pytest.raises(UnknownName, match='no column named .metod'): s.filter(metod='unet')
    with pytest.raises(Incompatible, match='range 0.9 .. 0.1'): s.filter(oa=(.9, .1))
    # one wrong name beside a right one
    with pytest.raises(UnknownName, match='segnet'): s.filter(method=['unet', 'segnet'])
    assert np.array_equal(s.mask, before) and list(s.rules) == ['dataset']


def test_the_selection_keeps_its_order_and_obeys_the_filter():
    s = EmbeddingSelection(table()).select([9, 3, 30, 8], [.1, .2, .3, .4], 'by hand')
    assert list(s.selection().index) == [9, 3, 30, 8] and np.allclose(s.selection().score, [.1, .2, .3, .4])
    s.filter(method='unet')
    assert list(s.selection().index) == [30, 8] and np.allclose(s.selection().score, [.3, .4])
    assert list(s.filter(method=None).selection().index) == [9, 3, 30, 8]
    s.select(s.values('oa') > .5)
    assert len(s.selection()) == (table().oa > .5).sum() and 'score' not in s.selection()
    for wrong in (60, -1):
        with pytest.raises(Incompatible, match=f'row {wrong}, the table has 60'): s.select([wrong])


def test_nothing_selected_is_no_error(tmp_path):
    s = EmbeddingSelection(table())
    assert s.selection().empty and list(s.selection().columns) == list(s.table.columns)
    assert s.summary()['n'] == 0 and s.histogram('oa').selected.sum() == 0
    with pytest.raises(SchemaError, match='nothing is selected|Nothing is selected'):
        s.export(tmp_path/'x.csv')
    assert not list(tmp_path.iterdir()) and snapshot(state_with_tiles()).data_.selected.sum() == 0


def test_counts_add_up():
    every_third = np.arange(0, 60, 3)
    t = table()
    s = EmbeddingSelection(t.assign(oa=t.oa.where(t.index % 5 > 0))).select(every_third)
    h = s.histogram('oa')
    assert h.shown.sum() == 48 and h.selected.sum() == 16
    assert h.attrs['unknown'] == dict(shown=12, selected=4)
    for group, rows in (('shown', np.arange(60)), ('selected', every_third)):
        counts = s.histogram('method').set_index('value')[group].to_dict()
        assert counts == s.table.iloc[rows].method.value_counts().to_dict()
    many = count_names(np.arange(50) % 40, [f'n{k}' for k in range(40)], dict(all=slice(None)))
    assert len(many) == 12 and many['all'].sum() == 50 and many.value.iloc[-1] == '29 others'
    assert count_values(np.full(4, np.nan), dict(all=slice(None)))['all'].sum() == 0


def test_a_summary_is_the_mean_of_what_is_known():
    t = table().assign(oa=lambda t: t.oa.where(t.index != 4))
    facts = EmbeddingSelection(t).select([2, 3, 4, 5]).summary()
    part = t.loc[[2, 3, 4, 5]]
    assert np.isclose(facts['oa'], part.oa.mean()) and np.isclose(facts['predicted'], part.predicted.mean())
    assert np.isclose(facts['error'], (part.predicted - part.oa).abs().mean())
    assert facts['dataset'] == {'moor': 2, 'coast': 2} and facts['method'] == {'unet': 2, 'pspnet': 2}


def test_observers_are_called_once_a_change_and_may_leave():
    s = EmbeddingSelection(table())
    changes = []
    leave = s.observe(changes.append)
    s.filter(dataset='coast')
    s.select([1])
    s.hover(2)
    s.hover(None)
    s.color('method')
    s.show_histogram('gap')
    assert changes == ['filter', 'selection', 'focus', 'color', 'histogram']
    assert s.focus == 2 and s.hovered is None
    leave()
    s.select([2])
    assert len(changes) == 5


def read_export(path):
    if path.suffix == '.csv': return pd.read_csv(path)
    if path.suffix == '.parquet': return pd.read_parquet(path)
    import lance
    return lance.dataset(str(path)).to_table().to_pandas()


@pytest.mark.parametrize('kind', ['csv', 'parquet', 'lance'])
def test_exports_read_back(kind, tmp_path):
    t = table().assign(confusion=[[1, 2]] * 60)
    s = EmbeddingSelection(t).select([5, 2, 40], [.9, .8, .7])
    path = tmp_path/f'out.{kind}'
    s.export(path)
    back = read_export(path)
    assert list(back.image_id) == list(t.image_id[[5, 2, 40]])
    assert np.allclose(back.score, [0.9, 0.8, 0.7]) and np.allclose(back.oa, t.oa[[5, 2, 40]])
    assert list(json.loads(back.confusion[0]) if kind == 'csv' else back.confusion[0]) == [1, 2]
    with pytest.raises(Incompatible, match='exists already'): s.export(path)
    s.select([1]).export(path, overwrite=True)
    assert len(read_export(path)) == 1
    with pytest.raises(Incompatible, match="suffix '.xlsx'"): s.export(tmp_path/'a.xlsx')


# ---------------------------------------------------------------- layout

def test_the_layout_comes_from_the_table_or_is_made_and_measured():
    t = table()
    placed = EmbeddingSelection(t)
    assert 'not measured' in placed.header() and np.array_equal(placed.table.u, t.u)
    made = EmbeddingSelection(t.drop(columns=['u', 'v']), method='pca')
    # uncertainty and agreement predict OA
    assert made.numbers['skill'] > .5 and 'pca' in made.header()
    again = EmbeddingSelection(t, np.c_[t.oa, t.oa**2], method='pca')
    # features that are given are projected anew
    assert not np.allclose(again.table.u, t.u)
    with pytest.raises(Incompatible, match='3 feature rows and 60'): EmbeddingSelection(t, np.ones((3, 2)))
    with pytest.raises(SchemaError, match='empty'): EmbeddingSelection(t[:0])
    with pytest.raises(SchemaError, match='neither u and v nor label-free'):
        EmbeddingSelection(t[['image_id', 'oa']])


def test_rows_without_a_place_are_counted_and_never_shown():
    t = table()
    t.loc[[3, 4], 'u'] = np.nan
    s = EmbeddingSelection(t)
    assert '2 without a place' in s.header() and not s.mask[[3, 4]].any()
    assert len(s.select(np.arange(60)).selection()) == 58
    assert not s.filter(dataset='coast').filter(dataset=None).mask[3]
    with pytest.raises(SchemaError, match='missing in all'): EmbeddingSelection(t.assign(u=np.nan))


# ---------------------------------------------------------------- questions

def cosine_distance(x, row): return 1 - x @ x[row] / np.linalg.norm(x, axis=1) / np.linalg.norm(x[row])


def test_neighbours_in_memory_are_the_nearest_of_other_images():
    t = table()
    x = np.random.default_rng(2).normal(size=(60, 5))
    s = ExplorerState(t, x, method='pca')
    neighbours = s.neighbours(7, 5)
    distance = cosine_distance(x - x.mean(0), 7)
    distance[t.image_id == t.image_id[7]] = np.inf
    assert list(neighbours.index) == list(np.argsort(distance)[:5])
    assert np.allclose(neighbours.score, np.sort(distance)[:5], atol=1e-5)
    assert s.filter(method='pspnet').neighbours(7, 100).method.eq('pspnet').all() and len(s.rows()) == 29


def test_neighbours_in_a_store_are_images_and_keep_the_method(stored):
    s, x = stored
    neighbours = s.neighbours(8, 6)
    nearest = np.argsort(cosine_distance(x, 4))[1:7]
    assert list(neighbours.image_id) == [f'i{k:03d}' for k in nearest] and neighbours.method.eq('unet').all()


def test_words_find_their_images(stored):
    s, _ = stored
    images = s.search('water', 7)
    axes = [int(i[1:]) % 4 for i in images.image_id]
    assert axes == [0] * 7 and images.score.is_monotonic_decreasing and images.image_id.is_unique
    assert list(images.index) == list(s.rows()) and 'water' in s.reason
    s.filter(dataset='moor')
    assert s.search('road', 100).dataset.eq('moor').all()
    # nothing shown, nothing found
    assert len(s.filter(dataset=None, oa=(2, 3)).search('road')) == 0
    with pytest.raises(Incompatible, match='found no word|Found no word'): s.search('  ')


def test_search_needs_words_and_vectors_of_the_same_encoder(stored):
    with pytest.raises(Incompatible, match='no vectors in a store'): ExplorerState(table()).search('road')
    s, _ = stored
    with pytest.raises(Incompatible, match='vectors are of sem/other'):
        ExplorerState(table(), store=s.store, semantic='sem/other@1', encoder=AxisEncoder()).search('road')
    with pytest.raises(MissingFeatures, match='neither features nor label-free'):
        ExplorerState(table()[['image_id', 'oa', 'u', 'v']]).neighbours(0)


WRITE_VECTORS = '''import sys, numpy as np
from rssqa.tables.store import *
store = Store(sys.argv[1])
water = np.array([[1, 0, 0, 0]], "f4")
put_vectors(store, "sem/words@abcdef01", [f"new{k}" for k in range(40)] + ["i001"], np.tile(water, (41, 1)))'''


def test_a_store_that_another_process_writes_to(stored):
    s, _ = stored
    before = set(s.search('water', 5).image_id)
    subprocess.run([sys.executable, '-c', WRITE_VECTORS, s.store.root], check=True, timeout=120)
    after = s.search('water', 5)
    assert after.image_id.iloc[0] == 'i001' and len(after) == 5
    assert not after.image_id.str.startswith('new').any() and len(before & set(after.image_id)) >= 3


def test_why_counts_and_reports_only_what_is_known():
    s = state_with_tiles()
    t = s.table
    row = int(t.entropy.argmax())
    facts = why(s, row)
    peers = t[t.dataset == t.dataset[row]].drop(index=row)
    assert facts['uncertainty']['worse_than'] == (peers.entropy < t.entropy[row]).mean()
    assert facts['uncertainty']['of'] == 29
    assert facts['disagreement']['worse_than'] == (peers.agree_majority > t.agree_majority[row]).mean()
    near = t.loc[facts['training']['rows']]
    assert set(near.split) == {'train'} and t.scene[row] not in set(near.scene)
    assert near.method.eq(t.method[row]).all() and np.isclose(near.oa.mean(), facts['training']['oa'])
    mask = cases(t.iloc[row])['mask']
    shares = list(facts['classes'].values())
    assert np.isclose(facts['classes']['road'], (mask == 2).mean()) and shares == sorted(shares, reverse=True)
    assert 'less certain' in why_text(facts) and 'fine detail' in why_text(facts).lower()
    bare = why_text(why(ExplorerState(table()[['image_id', 'u', 'v']]), 3))
    assert bare == 'row 3: no score.'


def test_sharpness_falls_with_blur():
    from rssqa.data.synthetic import degrade
    x = scene('town', 1, 64).image
    values = [sharpness(degrade(x, 'blur', level)) for level in (0, .2, .5, 1)]
    assert values == sorted(values, reverse=True) and sharpness(np.zeros((3, 8, 8))) == 0


# ---------------------------------------------------------------- tiles

def pixels(data): return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'), int)


def test_a_tile_shows_image_map_and_error():
    s = scene('flood', 1, 64)
    wrong = s.mask.copy()
    wrong[:, 32:] = (wrong[:, 32:] + 1) % 6
    tile = pixels(paint_tile(dict(image=s.image, mask=wrong, truth=s.mask, palette=COLOURS), 64))
    image = tile[:, :64]
    painted = tile[:, 68:132]
    error = tile[:, 136:]
    assert np.abs(image - (s.image.transpose(1, 2, 0) * 255)).max() < 2
    assert np.array_equal(painted, np.array(COLOURS)[wrong])
    orange = (error == (213, 94, 0)).all(-1)
    assert orange[:, 32:].all() and not orange[:, :32].any()


BLACK = np.zeros((3, 9, 9), np.float32)
GROUND = np.zeros((9, 9), np.uint8)


@pytest.mark.parametrize('case', [
    {},
    None,
    dict(image=np.zeros((3, 9, 40), np.float32)),
    dict(mask=GROUND, palette=COLOURS),
    dict(image=BLACK, mask=GROUND, palette=COLOURS),
])
def test_whatever_is_missing_the_tile_keeps_its_shape(case):
    assert pixels(paint_tile(case, 50)).shape == (50, 158, 3)


def test_a_missing_picture_is_explained_in_its_tile():
    def missing_image(row): raise DataNotFound(f'no image {row.image_id}')
    s = ExplorerState(table(), images=missing_image)
    whole = pixels(state_with_tiles().tile(0))
    tile = pixels(s.tile(0))
    assert tile.shape == whole.shape and not np.array_equal(tile, whole)
    case, reason = s.case(0)
    assert case == {} and 'no image i000' in reason
    assert why(s, 0)['blur'] is None and why(s, 0)['classes'] == {}
    broken = ExplorerState(table(), images=lambda row: dict(image='nonsense'))
    assert pixels(broken.tile(1)).shape == whole.shape


def test_tiles_are_painted_only_when_looked_at():
    read = []
    window = Explorer(table(), images=lambda row: read.append(row.image_id) or cases(row))
    window.state.select_shown()
    assert read == []
    window.scatter.widget.hovering = 4
    window.scatter.widget.hovering = None
    window.scatter.widget.hovering = 4
    assert read == ['i002']


# ---------------------------------------------------------------- the window

def press(window, name): window.controls[name].click()
def status(window): return window.screens['status'].value
def lasso(window, rows): window.scatter.widget.selection = np.array(rows, 'uint32')


@pytest.fixture
def window(stored): return Explorer(stored[0])


def test_the_tooltip_says_oa_in_capitals_and_gives_the_values_of_the_row(window, monkeypatch):
    sent = []
    monkeypatch.setattr(window.scatter.widget, 'send', sent.append)
    assert 'OA' in window.scatter.widget.tooltip_properties and 'oa' not in window.scatter.widget.tooltip_properties
    window.scatter.widget._handle_tooltip(dict(type='tooltip', index=4, properties=['OA', 'method', 'nothing']))
    row = window.state.table.iloc[4]
    assert sent[0]['properties'] == dict(OA=f'{row.oa:.3f}', method=str(row.method)) and sent[0]['index'] == 4


def test_a_lasso_reaches_histogram_list_and_selection(window):
    lasso(window, [9, 4, 30])
    assert list(window.selection().index) == [4, 9, 30] and '3 selected (lasso)' in status(window)
    assert window.maps.rows[:3].tolist() == [4, 9, 30] and len(window.maps.rows) == 60
    assert [row for row, selected, *_ in window.maps.page(0) if selected] == [4, 9, 30]
    assert '3 selected' in window.screens['bars'].value and '<b>3</b> of 60' in window.screens['summary'].value
    lasso(window, [])
    assert window.selection().empty and 'Nothing selected' in window.screens['summary'].value


def test_controls_and_state_stay_together(window):
    s = window.state
    widget = window.scatter.widget
    window.controls['dataset'].value = ('coast',)
    window.controls['oa'].value = (.5, .9)
    assert s.mask.sum() == (s.table.dataset.eq('coast') & s.table.oa.between(0.5, 0.9)).sum()
    assert np.array_equal(widget.filter, np.flatnonzero(s.mask))
    press(window, 'shown')
    assert len(window.selection()) == s.mask.sum()
    assert np.array_equal(np.sort(widget.selection), np.flatnonzero(s.mask))
    press(window, 'reset')
    assert s.mask.all() and widget.filter is None
    assert window.controls['dataset'].value == () and window.controls['oa'].value == (0, 1)
    s.color('method')
    s.show_histogram('gap')
    assert window.controls['color'].value == 'method' and window.controls['histogram'].value == 'gap'
    assert 'pspnet' in window.screens['legend'].value
    window.controls['color'].value = 'dataset'
    assert s.color_by == 'dataset'
    press(window, 'clear')
    assert window.selection().empty


def test_columns_are_named_in_words(window):
    window.state.color('gap')
    window.state.show_histogram('predicted')
    assert 'predicted OA − OA' in window.screens['legend'].value
    assert 'predicted OA: 60 shown' in window.screens['bars'].value
    assert [label for label, column in window.controls['color'].options if column == 'oa'] == ['OA']


def ask_table(window, **message): # as the browser does
    window.maps.widget._handle_custom_msg(message | dict(version=window.maps.widget.version), [])


def test_the_table_is_the_keyboards_way_to_the_tile(window):
    window.controls['search'].value = 'water'
    order = list(window.selection().index)
    assert window.maps.page(0)[0][2][0] == f'{window.selection().score.iloc[0]:.3f}'
    ask_table(window, type='focus', at=1)
    assert window.state.focus == order[1]
    assert base64.b64encode(window.state.tile(order[1])).decode() in window.screens['tile'].value
    press(window, 'why')
    assert 'nearest labelled maps' in window.screens['why'].value
    press(window, 'near')
    assert window.selection().score.is_monotonic_increasing and order[1] not in window.selection().index


def test_an_error_is_shown_and_the_window_lives_on(window, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    press(window, 'near')
    assert 'no map is in focus' in status(window).lower()
    press(window, 'save')
    assert 'othing is selected' in status(window)
    window.controls['search'].value = 'unicorn'                              # an unforeseen error
    assert 'ValueError' in status(window)
    lasso(window, [1, 2])
    press(window, 'save')
    assert '2 maps written to /' in status(window) and '/selection.csv' in status(window)
    assert len(pd.read_csv('selection.csv')) == 2
    press(window, 'save')
    assert 'selection-2.csv' in status(window) and len(pd.read_csv('selection-2.csv')) == 2


def test_what_is_shown_is_shared_as_a_page_and_a_figure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    window = Explorer(table(), images=cases)
    window.state.filter(dataset='coast')
    lasso(window, [0, 1, 4])
    keep(window, 'first <i>')
    part(window, 'note').value = 'muddy & wide'
    part(window, 'tags').value = 'a, b'
    window.state.color('gap')
    lasso(window, [5])
    press(window, 'share')
    assert str(tmp_path/'explorer.html') in html.unescape(status(window))
    text = (tmp_path/'explorer.html').read_text()
    data = json.loads(text.split('<script type="application/json">')[1].split('</script>')[0])
    now, kept = data['selections']
    assert now['about'] == '1 map selected (lasso)' and kept['name'] == 'first <i>'
    assert 'muddy & wide' in kept['about'] and 'tags: a, b' in kept['about'] and 'dataset coast' in kept['about']
    unpack = lambda packed: np.frombuffer(base64.b64decode(packed), '<u2')       # noqa: E731
    columns = {column['name']: column for column in data['columns']}
    image = [columns['image_id']['levels'][code] for code in unpack(columns['image_id']['data'])]
    assert {image[k] for k in unpack(kept['rows'])} == {'i000', 'i002'} and len(unpack(kept['rows'])) == 3
    assert columns['gap']['ends'] == ['under-predicted', 'over-predicted'] and data['thumbs'] is not None
    assert 'by rssqa' in text and 'filter: dataset coast' in text and 'Separation' in text
    assert 'no pictures' not in text
    monkeypatch.setattr('rssqa.viz.share.MAX_PICTURES', 1)
    many = share_page(window.state, window.kept, 'many.html').read_text()
    assert 'a page holds at most 1' in many and '"thumbs":null' in many
    press(window, 'figure')
    assert str(tmp_path/'explorer.svg') in html.unescape(status(window)) and 'explorer.pdf' in status(window)
    drawn = (tmp_path/'explorer.svg').read_text()
    for words in ('over-predicted', '1 map selected (lasso), ringed', 'filter: dataset coast', 'by rssqa'):
        assert words in drawn
    assert (tmp_path/'explorer.pdf').read_bytes().startswith(b'%PDF')
    for name in ('share', 'figure'): press(window, name)                  # a second time
    names = {path.name for path in tmp_path.glob('explorer*')}
    assert names == {f'{stem}.{kind}' for stem in ('explorer', 'explorer-2') for kind in ('html', 'pdf', 'svg')}


def test_long_actions_say_what_they_do_and_take_no_second_click(window, monkeypatch):
    during = []

    def slow(row, k=10):
        during.append((status(window), window.controls['share'].disabled, part(window, 'keep').disabled))
        return window.state.select([row])

    monkeypatch.setattr(window.state, 'neighbours', slow)
    window.controls['figure'].disabled = True
    window.state.hover(3)
    press(window, 'near')
    assert 'looking for neighbours …' in during[0][0] and during[0][1:] == (True, True)
    assert '1 selected' in status(window) and not window.controls['share'].disabled
    assert window.controls['figure'].disabled                              # as it was before
    monkeypatch.setattr(window.state, 'neighbours', lambda row: 1 / 0)
    press(window, 'near')
    assert 'ZeroDivisionError' in status(window) and not window.controls['near'].disabled


def test_the_first_search_is_prepared_in_the_background(stored):
    loads = []

    def load():
        loads.append(1)
        time.sleep(.3)
        return Words()

    class Words(AxisEncoder):
        words = [*AxisEncoder.words[:3], 'a'] # 'a map', with which the search is prepared

    async def live():
        window = Explorer(ExplorerState(table(), store=stored[0].store, semantic=VECTORS, encoder=load, images=cases))
        await asyncio.sleep(.1)
        assert window.state.chosen.size == 0
        window.controls['search'].value = 'water'                        # while it is being prepared
        await window._warming
        return window

    window = asyncio.run(live())
    assert loads == [1] and 'most like' in status(window) and len(window.selection())


# ---------------------------------------------------------------- colours

def test_unknown_scores_are_grey_and_never_zero():
    t = table()
    t.loc[:9, 'oa'] = np.nan
    values, colours, scale = encode_colours(Explorer(t).state, 'oa')
    assert (values[:10] == 0).all() and (values[10:] > 0).all() and (values < 1).all()
    assert colours[0] == '#BBBBBB' and (scale.low, scale.high) == (0, 1)
    some_unknown = EmbeddingSelection(t.assign(method=t.method.where(t.index > 4)))
    codes, colours, legend = encode_colours(some_unknown, 'method')
    assert set(codes[:5]) == {0} and 0 not in set(codes[5:]) and len(legend) == 2
    assert 'unknown (10)' in Explorer(t).screens['legend'].value
    assert Explorer(t.assign(oa=np.nan)).state.summary()['n'] == 0


def point_colours(window) -> list:
    "Colour of each point as the widget receives it: its code looked up in the list of colours."
    from matplotlib.colors import to_hex
    widget = window.scatter.widget
    column = dict(valueA=2, valueB=3)[widget.color_by]
    return [to_hex(widget.color[int(code)]).upper() for code in widget.points[:, column]]


def legend_colours(window, column) -> list:
    "Colour of each row according to the legend; grey where it names none."
    _, _, legend = encode_colours(window.state, column)
    colours = dict(legend)
    return [colours.get(name, UNKNOWN).upper() for name in window.state.table[column]]


def assert_colours_match(window, column):
    assert point_colours(window) == legend_colours(window, column)
    for name, colour in encode_colours(window.state, column)[2]:
        assert f'background:{colour};' in window.screens['legend'].value and name in window.screens['legend'].value


@pytest.mark.parametrize('unknown', [0, 7], ids=['all known', 'some unknown'])
def test_points_have_the_colours_of_the_legend(unknown):
    t = table()
    t = t.assign(method=t.method.where(t.index >= unknown), kind=[f'k{k % 5}' for k in range(len(t))])
    window = Explorer(t)
    for column in ('method', 'kind', 'dataset'):
        window.state.color(column)
        assert_colours_match(window, column)
    # from names to numbers and back
    window.state.color('oa')
    assert len(window.scatter.widget.color) == 257
    window.state.color('method')
    assert_colours_match(window, 'method')
    assert point_colours(window).count(UNKNOWN) == unknown
    # a filter hides points and recolours none
    window.controls['method'].value = ('unet',)
    assert 0 < window.state.mask.sum() < len(t)
    assert_colours_match(window, 'method')
    window.controls['color'].value = 'dataset'
    assert_colours_match(window, 'dataset')


def number_colours(window) -> list:
    "Colour of each point, as the shader of jupyter-scatter looks it up for numbers."
    from matplotlib.colors import to_hex
    widget = window.scatter.widget
    column = dict(valueA=2, valueB=3)[widget.color_by]
    places = np.floor(widget.points[:, column] * np.float32(len(widget.color) - 1)).astype(int)
    return [to_hex(widget.color[place]).upper() for place in places]


def lab(colour) -> np.ndarray:
    "CIELAB of '#rrggbb', D65."
    rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055)**2.4)
    xyz = np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]]) @ linear
    xyz = xyz / np.array([.9505, 1, 1.089])
    f = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_a_gap_of_zero_is_neutral_and_both_signs_are_equally_strong():
    t = table(9)
    gap = np.array([-.4, -.2, -.1, 0, .1, .2, .4, np.nan, .05])
    window = Explorer(t.assign(oa=.5, predicted=.5 + gap))
    window.state.color('gap')
    colours = number_colours(window)
    neutral = SIGNED_COLOURS[4]
    assert colours[3] == neutral and colours[7] == UNKNOWN
    assert np.linalg.norm(lab(neutral) - lab(UNKNOWN)) > 25                  # neutral is not unknown
    strength = [np.linalg.norm(lab(colour) - lab(neutral)) for colour in colours]
    for under, over in ((0, 6), (1, 5), (2, 4)):
        assert strength[under] == pytest.approx(strength[over], rel=.06) and strength[under] > 15
        assert lab(colours[under])[2] < lab(neutral)[2] and lab(colours[over])[1] > lab(neutral)[1]
    assert strength[0] > strength[1] > strength[2]
    legend = window.screens['legend'].value
    assert 'under-predicted -0.4' in legend and '0.4 over-predicted' in legend
    # one-sided gaps keep their middle, an accuracy keeps its map
    window = Explorer(t.assign(oa=.5, predicted=.5 + np.abs(gap)))
    window.state.color('gap')
    assert number_colours(window)[3] == neutral
    window.state.color('oa')
    assert 'over-predicted' not in window.screens['legend'].value


def test_a_dark_theme_changes_background_and_dark_colours():
    def brightness(colour): return lab(colour)[0]
    window = Explorer(table().assign(oa=np.linspace(0, 1, 60), kind=[f'k{k % 20:02d}' for k in range(60)]))
    for column in ('oa', 'gap', 'kind'):
        window.state.color(column)
        colour_of = number_colours if column != 'kind' else point_colours
        light = min(map(brightness, colour_of(window)))
        window.keys.dark = True
        dark = min(map(brightness, colour_of(window)))
        assert dark > 37 and (dark > light + 5 or column == 'gap')
        assert max(window.scatter.widget.background_color[:3]) < .2
        if column == 'kind': assert point_colours(window) == legend_colours(window, 'kind')
        window.keys.dark = False
        assert min(window.scatter.widget.background_color[:3]) == 1


def test_rare_names_are_grey_where_colours_run_out():
    n = len(SHADES) + 9
    window = Explorer(table(200).assign(kind=[f'k{k % n:02d}' for k in range(200)]))
    window.state.color('kind')
    assert point_colours(window) == legend_colours(window, 'kind')
    assert point_colours(window).count(UNKNOWN) > 0
    _, colours, legend = encode_colours(window.state, 'kind')
    assert legend[-1][0] == '9 others' and len(colours) == len(SHADES) + 1
    assert 'and' in legend_html('kind', legend)


def test_one_known_name_or_none():
    t = table().assign(kind=np.array([None] * 60, object))
    _, colours, legend = encode_colours(EmbeddingSelection(t), 'kind')
    assert colours == [UNKNOWN] and legend == []
    t.loc[5, 'kind'] = 'only'
    window = Explorer(t)
    window.state.color('kind')
    assert_colours_match(window, 'kind')
    assert point_colours(window).count(UNKNOWN) == 59


# ---------------------------------------------------------------- tables of any kind and size

WITHOUT_SCORES = ['oa', 'predicted', 'entropy', 'agree_majority']
POOR_TABLES = {
    'one point': table(1),
    'one without scores': table(1).drop(columns=WITHOUT_SCORES),
    'places only': table(2)[['u', 'v']],
    'one place': table().assign(u=1., v=1.),
    'no score': table().assign(oa=np.nan, predicted=np.nan),
}


@pytest.mark.parametrize('kind', POOR_TABLES)
def test_poor_tables_open(kind):
    t = POOR_TABLES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        window = Explorer(t)
        lasso(window, np.arange(len(t)))
        window.scatter.widget.hovering = 0
        press(window, 'why')
        press(window, 'shown')
    assert len(window.selection()) == len(t) and 'Error' not in status(window)
    assert np.isfinite(window.scatter.widget.points).all()
    assert len(window.snapshot().data_) == len(t)


def test_names_are_text_and_never_markup():
    window = Explorer(table().assign(method='<img src=x onerror=alert(1)>', dataset='a & b'))
    window.state.color('method')
    window.state.show_histogram('method')
    window.state.select([1, 2])
    window.state.hover(1)
    shown = ''.join(s.value for s in window.screens.values())
    assert '<img src=x' not in shown and '&lt;img' in shown


def test_a_million_maps_and_a_lasso_over_a_hundred_thousand():
    window = Explorer(random_maps(100_000))
    seconds = []
    for k in range(5):
        rows = np.arange(k, 100_000, 3, dtype='uint32')
        start = time.process_time()
        window.scatter.widget.selection = rows
        seconds.append(time.process_time() - start)
    assert len(window.selection()) == len(rows) and np.median(seconds) < .2
    start = time.process_time()
    window = Explorer(random_maps(1_000_000))
    assert time.process_time() - start < 6
    assert len(window.state) == 1_000_000 and window.scatter.widget.points.shape == (1_000_000, 4)


def test_explore_opens_files_and_refuses_others(tmp_path):
    table().to_parquet(tmp_path/'t.parquet')
    table().to_csv(tmp_path/'t.csv', index=False)
    assert len(explore(tmp_path/'t.parquet').state) == len(explore(str(tmp_path/'t.csv')).state) == 60
    with pytest.raises(DataNotFound): explore(tmp_path/'no.parquet')
    (tmp_path/'t.xlsx').write_bytes(b'')
    with pytest.raises(Incompatible, match="suffix '.xlsx'"): explore(tmp_path/'t.xlsx')
    with pytest.raises(DataNotFound, match='no run in'): explore(tmp_path)


# ---------------------------------------------------------------- PCA first

def table_and_features(n=80):
    rng = np.random.default_rng(0)
    t = pd.concat([table(), table(n - 60, 1)], ignore_index=True).drop(columns=['u', 'v'])
    return t, rng.normal(size=(n, 12)) + 3 * t.oa.to_numpy()[:, None]


def test_a_draft_ends_with_the_layout_of_the_plain_state():
    t, x = table_and_features()
    draft = EmbeddingSelection(t, x, draft=True, method='tsne')
    pca = EmbeddingSelection(t, x, method='pca')
    assert draft.pending == 'tsne' and 'tsne is on its way' in draft.header()
    assert np.allclose(draft.table[['u', 'v']], pca.table[['u', 'v']])
    draft.filter(dataset='coast').select([1, 2, 3])
    changes = []
    draft.observe(changes.append)
    draft.wait()
    draft.wait()
    plain = EmbeddingSelection(t, x, method='tsne')
    assert changes == ['layout'] and np.array_equal(draft.table, plain.table)
    assert draft.header() == plain.header() and draft.numbers == plain.numbers
    assert list(draft.chosen) == [1, 2, 3] and np.array_equal(draft.mask, t.dataset == 'coast')
    assert np.array_equal(draft.values('u'), plain.values('u'))


def test_a_draft_of_pca_only_measures():
    t, x = table_and_features()
    draft = EmbeddingSelection(t, x, draft=True, method='pca')
    before = draft.table.u.to_numpy()
    assert 'being measured' in draft.header() and draft.wait().numbers and np.array_equal(before, draft.table.u)


def test_two_threads_get_the_same_layout():
    t, x = table_and_features()
    draft = EmbeddingSelection(t, x, draft=True, method='tsne')
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(draft.compute_layout) for _ in range(3)]
        layouts = [future.result() for future in futures]
    assert all(layout is layouts[0] for layout in layouts) and layouts[0][0].attrs['method'] == 'tsne'


def test_the_window_shows_pca_and_then_what_was_asked_for():
    t, x = table_and_features()

    async def live():
        window = Explorer(t, x, method='tsne')
        header = window.screens['header'].value
        points = window.scatter.widget.points.copy()
        lasso(window, [5, 6])
        window.controls['dataset'].value = ('coast',)
        await window._task
        return window, header, points

    window, header, points = asyncio.run(live())
    widget = window.scatter.widget
    assert 'tsne is on its way' in header
    assert 'on its way' not in window.screens['header'].value and 'perplexity' in window.screens['header'].value
    assert not np.allclose(points[:, :2], widget.points[:, :2])
    plain = EmbeddingSelection(t, x, method='tsne')
    assert np.array_equal(window.state.table[['u', 'v']], plain.table[['u', 'v']])
    assert list(widget.selection) == [5, 6]
    assert np.array_equal(widget.filter, np.flatnonzero(t.dataset == 'coast'))
    # without a loop nobody could look meanwhile
    assert Explorer(t, x, method='tsne').state.pending == ''


def test_a_projection_that_fails_leaves_the_window_with_pca(monkeypatch):
    from rssqa.viz.projection import DRAWERS
    t, x = table_and_features()
    monkeypatch.setitem(DRAWERS, 'tsne', lambda *args, **more: 1 / 0)

    async def live():
        window = Explorer(t, x, method='tsne')
        await window._task
        return window

    window = asyncio.run(live())
    assert 'tsne failed, the places of PCA stay' in status(window) and window.state.attrs['method'] == 'pca'
    lasso(window, [5, 6])
    assert '2 selected' in status(window)


# ---------------------------------------------------------------- runs

TIDY_STORE = '''import sys, numpy as np
from rssqa.tables.store import Store, put_vectors
store = Store(sys.argv[1])
put_vectors(store, "sem/words@abcdef01", ["new"], np.ones((1, 4)))
store.tidy("sem/words@abcdef01")
store.tidy("masks")'''


def save_small_run(tmp_path): # -> what trained_setup made; a copy of its store and run in tmp_path
    from trained import trained_setup
    setup = trained_setup()
    store = Store(tmp_path/'store')
    original = Store(setup.home/'store')
    for name in original.names(): store.put(name, original.get(name))
    ids = setup.sqed.image_id.unique()
    put_vectors(store, VECTORS, ids, np.random.default_rng(0).normal(size=(len(ids), 4)))
    save_run(tmp_path/'run', setup.sqed, setup.tiles, store, VECTORS)
    return setup


def test_a_run_is_opened_again(tmp_path):
    setup = save_small_run(tmp_path)
    run = tmp_path/'run'
    assert {p.name for p in run.iterdir()} == {'sqed.parquet', 'tiles.parquet', 'run.json'}
    assert explore(run, height=300, method='pca').scatter.height() == 300
    s = open_run(run, method='pca')
    case, reason = s.case(3)
    assert not reason and set(case) == {'image', 'mask', 'truth', 'palette', 'classes'}
    assert len(s) == len(setup.sqed)
    assert s.neighbours(0, 3).image_id.nunique() == 3 and 'picture trustworthy' in s.header()
    with pytest.raises(Incompatible, match='in words'): s.search('water')    # no encoder was named
    # another process writes and tidies
    subprocess.run([sys.executable, '-c', TIDY_STORE, str(tmp_path/'store')], check=True)
    assert s.neighbours(1, 3).image_id.nunique() == 3 and s.case(4)[1] == ''
    assert s.vectors().store.keys(VECTORS).isin(['new']).any()
    # a run of the first edition called the table of vectors `sem`
    settings = json.loads((run/'run.json').read_text())
    old = {'sem' if name == 'semantic' else name: value for name, value in settings.items()}
    (run/'run.json').write_text(json.dumps(old))
    assert 'semantic' not in old and open_run(run, method='pca').semantic == VECTORS
    shutil.rmtree(tmp_path/'store')
    with pytest.raises(DataNotFound, match='maps of .* are gone'): open_run(run)
    with pytest.raises(DataNotFound, match='no run'): open_run(tmp_path/'nothing')


def test_case_reader_reads_what_the_pipeline_stored():
    from trained import trained_setup
    setup = trained_setup()
    read = case_reader(setup.tiles, Store(setup.home/'store'), setup.specs)
    s = ExplorerState(setup.sqed, images=read, method='pca')
    for row in (0, len(setup.sqed) - 1):
        case, reason = s.case(row)
        assert not reason and set(case) == {'image', 'mask', 'truth', 'palette', 'classes'}
        valid = case['truth'] != 255
        oa = (case['mask'] == case['truth'])[valid].mean()
        assert np.isclose(oa, setup.sqed.oa.iloc[row], atol=1e-6)


# ---------------------------------------------------------------- selections in the window

def test_a_lasso_adds_and_subtracts_by_key(window):
    lasso(window, [9, 4, 30])
    window.keys.lasso = 'add'                                            # Shift was down when the mouse was released
    lasso(window, [4, 5, 9, 30])
    assert list(window.state.chosen) == [4, 9, 30, 5] and '(lasso · lasso adds)' in status(window)
    window.keys.lasso = 'subtract'
    lasso(window, [4, 5])
    assert list(window.state.chosen) == [4, 5]
    window.keys.lasso = ''
    lasso(window, [])                                                    # Escape
    assert window.selection().empty
    for expected in ([4, 5], [4, 9, 30, 5], [4, 9, 30], []):
        press(window, 'undo')
        assert list(window.state.chosen) == expected
    press(window, 'undo')
    assert 'nothing to undo' in status(window)
    press(window, 'redo')
    assert list(window.state.chosen) == [4, 9, 30] and set(window.scatter.widget.selection) == {4, 9, 30}


def test_a_lasso_keeps_what_the_filter_hides(window):
    lasso(window, [0, 1, 2, 3])                                          # unet and pspnet in turn
    window.controls['method'].value = ('unet',)
    window.keys.lasso = 'add'
    lasso(window, [0, 2, 4])
    assert list(window.selection().index) == [0, 2, 4]
    window.keys.lasso = 'subtract'
    lasso(window, [2, 4])
    assert list(window.selection().index) == [2, 4]
    press(window, 'reset')
    assert sorted(window.selection().index) == [1, 2, 3, 4]


def test_the_query_box_selects_and_explains_what_it_refuses(window):
    window.controls['query'].value = 'oa < 0.5 and method == "unet"'
    t = window.state.table
    assert sorted(window.selection().index) == list(np.flatnonzero((t.oa < .5) & (t.method == 'unet')))
    before = list(window.state.chosen)
    window.controls['query'].value = '__import__("os").getcwd()'
    assert 'cannot use this query' in status(window) and 'Found' in status(window)
    window.controls['query'].value = 'metod == "unet"'
    assert 'Did you mean method' in status(window) and list(window.state.chosen) == before
    window.controls['query'].value = ''
    assert window.selection().empty


def test_the_histogram_filters_by_any_column(window):
    t = window.state.table
    window.controls['histogram'].value = 'entropy'
    slider = window.controls['range']
    assert (slider.min, slider.max) == pytest.approx((t.entropy.min(), t.entropy.max())) or slider.max == 1
    slider.value = (.2, .4)
    inside = t.entropy.astype(np.float32).between(np.float32(slider.value[0]), np.float32(slider.value[1]))
    assert 0 < inside.sum() < 60 and np.array_equal(window.state.mask, inside)
    assert set(window.scatter.widget.filter) == set(np.flatnonzero(inside))
    assert '(filter: mean entropy)' in status(window)
    # another column cuts across, and the first filter stays
    window.controls['histogram'].value = 'oa'
    assert tuple(slider.value) == (slider.min, slider.max) == (0, 1)
    slider.value = (.6, .8)
    assert np.array_equal(window.state.mask, inside & t.oa.between(.6, .8))
    assert tuple(window.controls['oa'].value) == (.6, .8)
    window.controls['histogram'].value = 'entropy'
    assert tuple(slider.value) == pytest.approx((.2, .4), abs=.01)
    press(window, 'reset')
    assert window.state.mask.all() and tuple(slider.value) == (slider.min, slider.max)
    window.controls['histogram'].value = 'method'
    assert slider.disabled


def test_clusters_are_outlined_named_and_selected():
    rng = np.random.default_rng(0)
    kind = np.repeat([0, 1, 2], 40)
    u, v = (np.array([[0, 0], [9, 1], [4, 8]])[kind] + rng.normal(0, .4, (120, 2))).T
    t = pd.DataFrame(dict(image_id=np.arange(120).astype(str), u=u, v=v, oa=np.array([.9, .85, .3])[kind],
                          predicted=np.array([.9, .85, .6])[kind], dataset=np.array(['coast', 'moor', 'moor'])[kind]))
    window = Explorer(t)
    assert window.scatter.widget.annotations in (None, [])
    window.controls['outlines'].value = True
    first = next(c for c in window.clusters if 'over-predicted' in c.name)
    assert len(window.clusters) == 3 and set(first.rows) <= set(range(80, 120)) and len(first.rows) > 35
    assert first.name == 'low OA ×3.0, over-predicted ×3.0'
    # outlines lie around the points, in the widget's own coordinates
    widget = window.scatter.widget
    assert len(widget.annotations) == 3
    corners = np.reshape(widget.annotations[window.clusters.index(first)].vertices, (-1, 2))
    points = widget.points[first.rows, :2]
    assert np.allclose(corners[0], corners[-1])
    assert np.all(corners.min(0) >= points.min(0) - 1e-5) and np.all(corners.max(0) <= points.max(0) + 1e-5)
    assert 'over-predicted ×3.0' in window.screens['clusters'].value
    window.controls['cluster'].value = str(first)
    assert set(window.selection().index) == set(first.rows) and 'cluster low OA' in status(window)
    window.keys.dark = True
    assert len(widget.annotations) == 3
    window.controls['outlines'].value = False
    assert not widget.annotations and window.screens['clusters'].value == ''


def test_noise_has_no_clusters():
    rng = np.random.default_rng(0)
    window = Explorer(pd.DataFrame(dict(u=rng.random(300), v=rng.random(300), oa=rng.random(300))))
    window.controls['outlines'].value = True
    assert all(cluster.name == 'mixed' for cluster in window.clusters)
    few = Explorer(table(5))
    few.controls['outlines'].value = True
    assert few.clusters == [] and 'No region is denser' in few.screens['clusters'].value


def test_a_few_extreme_gaps_do_not_make_all_others_neutral():
    gap = np.concatenate([np.linspace(-.1, .1, 300), [.9]])
    window = Explorer(table(301).assign(oa=.5, predicted=.5 + gap))
    window.state.color('gap')
    strength = [np.linalg.norm(lab(colour) - lab(SIGNED_COLOURS[4])) for colour in number_colours(window)]
    assert min(strength[0], strength[300]) > 70 and '≥ 0.09' in window.screens['legend'].value


def test_keys_undo_and_redo(window):
    lasso(window, [1])
    window.keys._handle_custom_msg(dict(type='undo'), [])
    assert window.selection().empty
    window.keys._handle_custom_msg(dict(type='redo'), [])
    assert list(window.selection().index) == [1]


def part(window, name): return window.panel.widgets[name]


def keep(window, name):
    part(window, 'name').value = name
    part(window, 'keep').click()


def test_the_panel_keeps_chooses_renames_and_removes(stored, tmp_path):
    path = tmp_path/'kept.json'
    window = Explorer(stored[0], selections=path)
    keep(window, 'nothing')
    assert 'othing is selected' in status(window)
    lasso(window, [9, 4, 30])
    keep(window, 'some')
    assert "3 maps kept as &#x27;some&#x27; in kept.json" in status(window)
    part(window, 'note').value = 'three'
    part(window, 'tags').value = 'a, b'
    lasso(window, [])
    keep(window, 'some')
    assert 'othing is selected' in status(window)
    # after a restart
    again = Explorer(ExplorerState(table(), images=cases), selections=path)
    (line, name), = part(again, 'kept').options
    assert name == 'some' and line == 'some · 3 maps of 3 images · a, b'
    part(again, 'kept').value = 'some'
    assert 'lasso, 20' in part(again, 'about').value
    assert part(again, 'note').value == 'three' and part(again, 'tags').value == 'a, b'
    part(again, 'choose').click()
    assert sorted(again.selection().index) == [4, 9, 30]
    part(again, 'name').value = 'other'
    part(again, 'rename').click()
    assert part(again, 'kept').value == 'other' and 'other' in part(again, 'second').options
    part(again, 'remove').click()
    assert 'click again' in status(again) and len(again.kept) == 1
    part(again, 'remove').click()
    assert len(again.kept) == 0 and part(again, 'kept').options == ()
    part(again, 'choose').click()
    assert 'no kept selection is chosen' in status(again)


def test_a_damaged_file_of_selections_is_shown_and_left_alone(stored, tmp_path):
    path = tmp_path/'kept.json'
    path.write_text('{')
    window = Explorer(stored[0], selections=path)
    assert 'cannot read the selections in kept.json' in status(window)
    lasso(window, [1])
    keep(window, 'a')
    assert 'not overwritten' in status(window) and path.read_text() == '{'


def test_the_panel_compares(window):
    press(window, 'shown')
    part(window, 'compare').click()
    assert 'cannot compare these selections' in status(window)               # there is no rest
    window.controls['query'].value = 'oa < 0.6'
    keep(window, 'low <b>')
    part(window, 'first').value = 'low <b>'
    part(window, 'compare').click()
    page = part(window, 'result').value
    assert 'lower OA than those in the rest' in page and 'made by this column' in page
    assert '&lt;b&gt;' in page and 'low <b>' not in page and '<svg' in page and '--jp-ui-font-color1' in page
    part(window, 'second').value = 'selected now'
    part(window, 'first').value = 'selected now'
    part(window, 'compare').click()
    assert 'compare a selection with itself' in status(window)


def test_only_the_last_comparison_is_shown(monkeypatch):
    async def live():
        window = Explorer(table())
        window.controls['query'].value = 'oa < 0.6'
        slow = window.kept.compare

        def compare(*names):
            first = not calls
            calls.append(names)
            if first: time.sleep(.6)
            return slow(*names)

        calls = []
        monkeypatch.setattr(window.kept, 'compare', compare)
        keep(window, 'low')
        part(window, 'compare').click()
        first = window.panel._task
        part(window, 'first').value = 'low'
        part(window, 'compare').click()
        await asyncio.gather(first, window.panel._task)
        return window

    window = asyncio.run(live())
    assert '“low” against the rest' in part(window, 'result').value


def test_selections_are_kept_beside_what_was_opened(tmp_path, monkeypatch):
    from rssqa.viz import explorer_widget
    table().to_parquet(tmp_path/'t.parquet')
    assert explore(tmp_path/'t.parquet').kept.path == tmp_path/'t.selections.json'
    assert explore(tmp_path/'t.parquet', selections=tmp_path/'x.json').kept.path == tmp_path/'x.json'
    assert explore(table()).kept.path is None
    monkeypatch.setattr(explorer_widget, 'open_committed', lambda *args, **options: ExplorerState(table()))
    path = explore('open').kept.path
    assert path.parts[-4:] == ('data', 'runs', 'open', 'selections.json')


# ---------------------------------------------------------------- the table of maps

def shown_texts(window, column): # of the first page
    names = [c['name'] for c in window.maps.widget.columns]
    return [cells[names.index(column)] for _, _, cells, _ in window.maps.page(0)]


def test_the_table_sorts_by_any_column_both_ways_and_unknown_comes_last():
    t = table().assign(gap=np.nan)
    t.loc[:4, 'predicted'] = np.nan
    window = Explorer(t)
    grid = window.maps.widget
    gap = window.state.values('gap')
    for sort, sign in (('-gap', -1), ('gap', 1)):
        grid.sort = sort
        ordered = sign * gap[window.maps.rows]
        assert (np.diff(ordered[:55]) >= 0).all() and np.isnan(ordered[55:]).all()
    grid.sort = '-gap'
    assert shown_texts(window, 'gap')[0] == f'{np.nanmax(gap):.3f}' and shown_texts(window, 'gap')[-1] == 'unknown'
    grid.sort = 'method'
    assert shown_texts(window, 'method') == ['pspnet'] * 30 + ['unet'] * 30
    grid.sort = '-method'
    assert shown_texts(window, 'method')[0] == 'unet'
    grid.sort = ''
    assert window.maps.rows.tolist() == list(range(60))


def test_the_table_follows_filter_selection_and_focus(window):
    grid = window.maps.widget
    window.controls['method'].value = ('unet',)
    assert grid.total == 30 and '30 maps, 0 selected' == grid.note
    lasso(window, [8, 3, 4])
    assert window.maps.rows[:2].tolist() == [4, 8] and grid.note == '30 maps, 2 selected'
    grid.only = True
    assert window.maps.rows.tolist() == [4, 8]
    window.scatter.widget.hovering = 8
    assert grid.focus == 1
    window.scatter.widget.hovering = 6
    assert grid.focus == -1
    press(window, 'reset')
    assert window.maps.rows.tolist() == [3, 4, 8] and grid.total == 3
    grid.only = False
    grid.shown = ['oa', 'entropy']
    assert [c['name'] for c in grid.columns] == ['oa', 'entropy'] and len(window.maps.page(0)[0][2]) == 2


def test_the_table_selects_without_moving_rows(window):
    grid = window.maps.widget
    grid.sort = '-oa'
    order = window.maps.rows.copy()
    ask_table(window, type='toggle', at=5)
    ask_table(window, type='extend', **{'from': 9, 'to': 7})
    assert sorted(window.selection().index) == sorted(order[[5, 7, 8, 9]])
    assert set(window.scatter.widget.selection) == set(order[[5, 7, 8, 9]])
    # pressed before the browser has the new version: the order is the same, so nothing is dropped
    window.maps.widget._handle_custom_msg(dict(type='toggle', at=8, version=grid.version - 1), [])
    assert sorted(window.selection().index) == sorted(order[[5, 7, 9]]) and np.array_equal(window.maps.rows, order)
    press(window, 'undo')
    assert len(window.selection()) == 4
    # without a sorted column the order changes with the next selection from elsewhere only
    grid.sort = ''
    before = window.maps.rows.copy()
    ask_table(window, type='toggle', at=40)
    assert np.array_equal(window.maps.rows, before)
    lasso(window, [17])
    assert window.maps.rows[0] == 17


def test_the_table_sends_pages_on_demand_and_never_old_ones(monkeypatch):
    read = []
    state = ExplorerState(random_maps(12_256), images=lambda row: read.append(row.image_id) or {})
    window = Explorer(state)
    grid = window.maps.widget
    sent = []
    monkeypatch.setattr(grid, 'send', sent.append)
    assert grid.total == 12_256 and len(grid.get_state()['columns']) < 10 and not read
    ask_table(window, type='page', page=122)
    assert len(sent[0]['rows']) == 56 and sent[0]['rows'][-1][0] == 12_255
    old = grid.version
    grid.sort = 'oa'
    grid._handle_custom_msg(dict(type='page', version=old, page=0), [])
    grid._handle_custom_msg(dict(type='focus', version=old, at=3), [])
    assert len(sent) == 1 and state.focus is None and not read
    ask_table(window, type='tile', row=7)
    assert sent[1]['row'] == 7 and sent[1]['src'].startswith('data:image/png') and len(read) == 1


def test_a_search_adds_its_scores_and_takes_them_away(window):
    window.controls['search'].value = 'water'
    grid = window.maps.widget
    assert grid.columns[0]['name'] == 'score'
    grid.sort = 'score'
    assert shown_texts(window, 'score')[-1] == 'unknown'
    lasso(window, [3])
    assert grid.columns[0]['name'] != 'score' and window.maps.rows[0] == 3       # nothing to sort by is left


def test_names_in_the_table_stay_text():
    window = Explorer(table().assign(method='<img src=x>'))
    assert '<img src=x>' in window.maps.page(0)[0][2] and 'innerHTML' not in window.maps.widget._esm
