"""The Explorer without a browser: the state's answers, and a window that follows it."""
import base64, io, json, shutil, subprocess, sys, time, warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from rssqa.core import DataNotFound, Incompatible, MissingFeatures, SchemaError, UnknownName
from rssqa.viz.explorer import (
    ExplorerState,
    InMemory,
    InStore,
    EmbeddingSelection,
    binned,
    case_reader,
    open_run,
    paint_tile,
    save_run,
    sharpness,
    snapshot,
    tallied,
    why,
    why_text,
)
from rssqa.bench.explorer_speed import cloud
from rssqa.viz.explorer_widget import Explorer, SHADES, bars_svg, encode, explore, legend_html
from rssqa.tables.store import Store, put_vectors
from rssqa.data.synthetic import PALETTE as COLOURS, scene

CLASSES = ('ground', 'building', 'road', 'vegetation', 'water', 'vehicle')


def table(n=60, seed=0) -> pd.DataFrame:
    "Images with two maps each, placed by hand; doubt follows error."
    rng = np.random.default_rng(seed)
    i = np.arange(n)
    oa = rng.uniform(.3, 1, n)
    return pd.DataFrame(
        dict(
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
        )
    )


class Words:
    "An encoder whose sentences are the axes: 'water' is the first."
    name, dim, fingerprint = 'words', 4, 'abcdef0123456789'
    def encode_text(self, texts):
        return torch.eye(4)[[['water', 'road', 'field', 'roof'].index(t.split()[0]) for t in texts]]


def cases(row):
    s = scene('town', int(row.image_id[1:]), 48)
    return dict(
        image=s.image,
        truth=s.mask,
        mask=np.roll(s.mask, 3 if row.method == 'unet' else 9, 0),
        palette=COLOURS,
        classes=CLASSES,
    )


@pytest.fixture
def stored(tmp_path):
    t = table()
    store = Store(tmp_path/'store')
    ids = t.image_id.unique()
    vectors = np.random.default_rng(1).normal(0, .1, (len(ids), 4)) + np.eye(4)[np.arange(len(ids)) % 4]
    put_vectors(store, 'sem/words@abcdef01', ids, vectors)
    return ExplorerState(t, store=store, encoder=Words(), images=cases), vectors


# ---------------------------------------------------------------- filter, selection, histogram

def test_filters_agree_with_pandas():
    t = table()
    s = EmbeddingSelection(t)
    s.filter(dataset='coast', oa=(.4, .8), method=['unet', 'pspnet'], scene='s[0-3]', gap=(-.05, .05))
    gap = t.predicted - t.oa
    want = (
        t.dataset.eq('coast')
        & t.oa.between(0.4, 0.8)
        & t.scene.isin(['s0', 's1', 's2', 's3'])
        & gap.between(-0.05, 0.05)
    )
    assert 0 < want.sum() < 30 and np.array_equal(s.mask, want)
    s.filter(oa=None, gap=None, scene=None, method=None)
    assert np.array_equal(s.mask, t.dataset.eq('coast')) and s.filter(dataset=None).mask.all()


def test_a_wrong_filter_says_so_and_changes_nothing():
    s = EmbeddingSelection(table()).filter(dataset='coast')
    before = s.mask.copy()
    with pytest.raises(UnknownName, match='Did you mean coast'): s.filter(dataset='coats')
    with pytest.raises(UnknownName, match='no column named .metod'): s.filter(metod='unet')
    with pytest.raises(Incompatible, match='range 0.9 .. 0.1'): s.filter(oa=(.9, .1))
    assert np.array_equal(s.mask, before) and list(s.rules) == ['dataset']


def test_the_selection_keeps_its_order_and_obeys_the_filter():
    s = EmbeddingSelection(table()).select([9, 3, 30, 8], [.1, .2, .3, .4], 'by hand')
    assert list(s.selection().index) == [9, 3, 30, 8] and np.allclose(s.selection().score, [.1, .2, .3, .4])
    s.filter(method='unet')
    assert list(s.selection().index) == [30, 8] and np.allclose(s.selection().score, [.3, .4])
    assert list(s.filter(method=None).selection().index) == [9, 3, 30, 8]
    s.select(s.values('oa') > .5)
    assert len(s.selection()) == (table().oa > .5).sum() and 'score' not in s.selection()
    for bad in ([60], [-1]):
        with pytest.raises(Incompatible, match=f'row {bad[0]}, the table has 60'): s.select(bad)


def test_nothing_selected_is_no_error(tmp_path):
    s = EmbeddingSelection(table())
    assert (
        s.selection().empty
        and s.summary()['n'] == 0
        and s.histogram('oa').selected.sum() == 0
        and list(s.selection().columns) == list(s.table.columns)
    )
    with pytest.raises(SchemaError, match='nothing is selected|Nothing is selected'):
        s.export(tmp_path/'x.csv')
    assert not list(tmp_path.iterdir()) and snapshot(s_with_tiles()).data_.selected.sum() == 0


def s_with_tiles(): return ExplorerState(table(), images=cases)


def test_counts_add_up():
    s = EmbeddingSelection(table().assign(oa=lambda t: t.oa.where(t.index % 5 > 0))).select(
        np.arange(0, 60, 3)
    )
    h = s.histogram('oa')
    assert h.shown.sum() == 48 and h.attrs['unknown'] == dict(shown=12, selected=4) and h.selected.sum() == 16
    for g, rows in (('shown', np.arange(60)), ('selected', np.arange(0, 60, 3))):
        assert (
            s.histogram('method').set_index('value')[g].to_dict()
            == s.table.iloc[rows].method.value_counts().to_dict()
        )
    many = tallied(np.arange(50) % 40, [f'n{k}' for k in range(40)], dict(all=slice(None)))
    assert len(many) == 12 and many['all'].sum() == 50 and many.value.iloc[-1] == '29 others'
    assert binned(np.full(4, np.nan), dict(all=slice(None)))['all'].sum() == 0


def test_observers_hear_every_change_once_and_may_leave():
    s = EmbeddingSelection(table())
    heard = []
    leave = s.observe(heard.append)
    s.filter(dataset='coast')
    s.select([1])
    s.hover(2)
    s.hover(None)
    s.color('method')
    s.show_histogram('gap')
    assert (
        heard == ['filter', 'selection', 'focus', 'color', 'histogram'] and s.focus == 2 and s.hovered is None
    )
    leave()
    s.select([2])
    assert len(heard) == 5


@pytest.mark.parametrize('kind', ['csv', 'parquet', 'lance'])
def test_exports_read_back(kind, tmp_path):
    t = table().assign(confusion=[[1, 2]] * 60)
    s = EmbeddingSelection(t).select([5, 2, 40], [.9, .8, .7])
    path = tmp_path/f'out.{kind}'
    s.export(path)
    import lance
    back = dict(
        csv=pd.read_csv, parquet=pd.read_parquet, lance=lambda p: lance.dataset(str(p)).to_table().to_pandas()
    )[kind](path)
    assert (
        list(back.image_id) == list(t.image_id[[5, 2, 40]])
        and np.allclose(back.score, [0.9, 0.8, 0.7])
        and np.allclose(back.oa, t.oa[[5, 2, 40]])
    )
    assert list(json.loads(back.confusion[0]) if kind == 'csv' else back.confusion[0]) == [1, 2]
    with pytest.raises(Incompatible, match='exists already'): s.export(path)
    s.select([1]).export(path, overwrite=True)
    assert (
        len(
            dict(
                csv=pd.read_csv,
                parquet=pd.read_parquet,
                lance=lambda p: lance.dataset(str(p)).to_table().to_pandas(),
            )[kind](path)
        )
        == 1
    )
    with pytest.raises(Incompatible, match="suffix '.xlsx'"): s.export(tmp_path/'a.xlsx')


# ---------------------------------------------------------------- places

def test_places_come_from_the_table_or_are_made_and_measured():
    t = table()
    assert 'not measured' in EmbeddingSelection(t).header() and np.array_equal(
        EmbeddingSelection(t).table.u, t.u
    )
    made = EmbeddingSelection(t.drop(columns=['u', 'v']), method='pca')
    assert made.numbers['skill'] > .5 and 'pca' in made.header()             # doubt and agreement tell OA
    again = EmbeddingSelection(t, np.c_[t.oa, t.oa**2], method='pca')
    # features asked for are projected anew
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
    assert (
        len(s.select(np.arange(60)).selection()) == 58
        and not s.filter(dataset='coast').filter(dataset=None).mask[3]
    )
    with pytest.raises(SchemaError, match='missing in all'): EmbeddingSelection(t.assign(u=np.nan))


# ---------------------------------------------------------------- questions

def test_neighbours_in_memory_are_the_nearest_of_other_images():
    t = table()
    x = np.random.default_rng(2).normal(size=(60, 5))
    s = ExplorerState(t, x, method='pca')
    found = s.neighbours(7, 5)
    c = x - x.mean(0)
    d = 1 - c @ c[7] / np.linalg.norm(c, axis=1) / np.linalg.norm(c[7])
    d[t.image_id == t.image_id[7]] = np.inf
    assert list(found.index) == list(np.argsort(d)[:5]) and np.allclose(
        found.score, np.sort(d)[:5], atol=1e-5
    )
    assert s.filter(method='pspnet').neighbours(7, 100).method.eq('pspnet').all() and len(s.rows()) == 29


def test_neighbours_in_a_store_are_images_and_keep_the_method(stored):
    s, x = stored
    found = s.neighbours(8, 6)
    d = 1 - x @ x[4] / np.linalg.norm(x, axis=1) / np.linalg.norm(x[4])
    assert list(found.image_id) == [f'i{k:03d}' for k in np.argsort(d)[1:7]] and found.method.eq('unet').all()


def test_words_find_their_images(stored):
    s, x = stored
    found = s.search('water', 7)
    assert (
        [int(i[1:]) % 4 for i in found.image_id] == [0] * 7
        and found.score.is_monotonic_decreasing
        and found.image_id.is_unique
    )
    assert list(found.index) == list(s.rows()) and 'water' in s.reason
    s.filter(dataset='moor')
    assert s.search('road', 100).dataset.eq('moor').all()
    # nothing shown, nothing found
    assert len(s.filter(dataset=None, oa=(2, 3)).search('road')) == 0
    with pytest.raises(Incompatible, match='found no word|Found no word'): s.search('  ')


def test_search_needs_words_and_their_own_vectors(stored, tmp_path):
    with pytest.raises(Incompatible, match='no vectors in a store'): ExplorerState(table()).search('road')
    s, _ = stored
    with pytest.raises(Incompatible, match='vectors are of sem/other'):
        ExplorerState(table(), store=s.store, semantic='sem/other@1', encoder=Words()).search('road')
    with pytest.raises(MissingFeatures, match='neither features nor label-free'):
        ExplorerState(table()[['image_id', 'oa', 'u', 'v']]).neighbours(0)


def test_a_store_that_another_process_writes_to(stored):
    s, _ = stored
    first = set(s.search('water', 5).image_id)
    code = (
        "import sys, numpy as np; from rssqa.tables.store import *; s = Store(sys.argv[1]); "
        "put_vectors(s, 'sem/words@abcdef01', [f'new{k}' for k in range(40)] + ['i001'], np.r_[np.tile([[1, 0, 0, 0]], (40, 1)), [[1, 0, 0, 0]]].astype('f4'))"
    )
    subprocess.run([sys.executable, '-c', code, s.store.root], check=True, timeout=120)
    found = s.search('water', 5)
    assert (
        found.image_id.iloc[0] == 'i001'
        and not found.image_id.str.startswith('new').any()
        and len(found) == 5
        and len(first & set(found.image_id)) >= 3
    )


def test_why_counts_and_says_only_what_is_known():
    s = s_with_tiles()
    row = int(s.table.entropy.argmax())
    facts = why(s, row)
    peers = s.table[s.table.dataset == s.table.dataset[row]].drop(index=row)
    assert (
        facts['dispersion']['worse_than'] == (peers.entropy < s.table.entropy[row]).mean()
        and facts['dispersion']['of'] == 29
    )
    assert facts['disagreement']['worse_than'] == (peers.agree_majority > s.table.agree_majority[row]).mean()
    near = s.table.loc[facts['training']['rows']]
    assert (
        set(near.split) == {'train'}
        and s.table.scene[row] not in set(near.scene)
        and near.method.eq(s.table.method[row]).all()
        and np.isclose(near.oa.mean(), facts['training']['oa'])
    )
    mask = cases(s.table.iloc[row])['mask']
    assert np.isclose(facts['classes']['road'], (mask == 2).mean()) and list(
        facts['classes'].values()
    ) == sorted(facts['classes'].values(), reverse=True)
    assert 'less certain' in why_text(facts) and 'fine detail' in why_text(facts).lower()
    bare = why_text(why(ExplorerState(table()[['image_id', 'u', 'v']]), 3))
    assert bare == 'row 3: no score.'


def test_blur_is_seen_as_blur():
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
    image, drawn, error = tile[:, :64], tile[:, 68:132], tile[:, 136:]
    assert np.abs(image - (s.image.transpose(1, 2, 0) * 255)).max() < 2 and np.array_equal(
        drawn, np.array(COLOURS)[wrong]
    )
    orange = (error == (213, 94, 0)).all(-1)
    assert orange[:, 32:].all() and not orange[:, :32].any()


@pytest.mark.parametrize('case', [{}, None, dict(image=np.zeros((3, 9, 40), np.float32)), dict(mask=np.zeros((9, 9), np.uint8), palette=COLOURS),
                                  dict(image=np.zeros((3, 9, 9), np.float32), mask=np.zeros((9, 9), np.uint8), palette=COLOURS)])
def test_whatever_is_missing_the_tile_keeps_its_shape(case):
    assert pixels(paint_tile(case, 50)).shape == (50, 158, 3)


def test_a_missing_picture_is_told_in_its_tile():
    def gone(row): raise DataNotFound(f'no image {row.image_id}')
    s = ExplorerState(table(), images=gone)
    whole = s_with_tiles()
    assert pixels(s.tile(0)).shape == pixels(whole.tile(0)).shape and not np.array_equal(
        pixels(s.tile(0)), pixels(whole.tile(0))
    )
    assert s.case(0) == ({}, 'no image i000.') or 'no image i000' in s.case(0)[1]
    assert why(s, 0)['blur'] is None and why(s, 0)['classes'] == {}
    broken = ExplorerState(table(), images=lambda row: dict(image='nonsense'))
    assert pixels(broken.tile(1)).shape == pixels(whole.tile(0)).shape


def test_tiles_are_painted_only_when_looked_at():
    asked = []
    window = Explorer(table(), images=lambda row: asked.append(row.image_id) or cases(row))
    window.state.select_shown()
    assert asked == []
    window.scatter.widget.hovering = 4
    window.scatter.widget.hovering = None
    window.scatter.widget.hovering = 4
    assert asked == ['i002']


# ---------------------------------------------------------------- the window

def press(window, name): window.controls[name].click()
def words(window): return window.screens['status'].value


@pytest.fixture
def window(stored): return Explorer(stored[0])


def test_a_lasso_reaches_panel_list_and_selection(window):
    window.scatter.widget.selection = np.array([9, 4, 30], 'uint32')
    assert list(window.selection().index) == [4, 9, 30] and '3 selected (lasso)' in words(window)
    assert [v for _, v in window.controls['listed'].options] == [4, 9, 30] and '3 selected' in window.screens[
        'bars'
    ].value
    assert '<b>3</b> of 60' in window.screens['summary'].value
    window.scatter.widget.selection = np.array([], 'uint32')
    assert window.selection().empty and 'Nothing selected' in window.screens['summary'].value


def test_controls_and_state_stay_together(window):
    s = window.state
    window.controls['dataset'].value = ('coast',)
    window.controls['oa'].value = (.5, .9)
    assert s.mask.sum() == (
        s.table.dataset.eq('coast') & s.table.oa.between(0.5, 0.9)
    ).sum() and np.array_equal(window.scatter.widget.filter, np.flatnonzero(s.mask))
    press(window, 'shown')
    assert len(window.selection()) == s.mask.sum() and np.array_equal(
        np.sort(window.scatter.widget.selection), np.flatnonzero(s.mask)
    )
    press(window, 'reset')
    assert (
        s.mask.all()
        and window.controls['dataset'].value == ()
        and window.controls['oa'].value == (0, 1)
        and window.scatter.widget.filter is None
    )
    s.color('method')
    s.show_histogram('gap')
    assert (window.controls['color'].value, window.controls['histogram'].value) == (
        'method',
        'gap',
    ) and 'pspnet' in window.screens['legend'].value
    window.controls['color'].value = 'dataset'
    assert s.color_by == 'dataset'
    press(window, 'clear')
    assert window.selection().empty


def test_the_list_is_the_keyboards_way_to_the_tile(window):
    window.controls['search'].value = 'water'
    order = list(window.selection().index)
    assert window.controls['listed'].options[0][0].startswith(f'{window.selection().score.iloc[0]:.3f}')
    window.controls['listed'].value = order[1]
    assert (
        window.state.focus == order[1]
        and base64.b64encode(window.state.tile(order[1])).decode() in window.screens['tile'].value
    )
    press(window, 'why')
    assert 'nearest judged maps' in window.screens['why'].value
    press(window, 'near')
    assert window.selection().score.is_monotonic_increasing and order[1] not in window.selection().index


def test_a_fault_is_told_and_the_window_lives_on(window, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    press(window, 'near')
    assert 'no map is in focus' in words(window).lower()
    press(window, 'save')
    assert 'othing is selected' in words(window)
    window.controls['search'].value = 'unicorn'                              # an error that nobody foresaw
    assert 'ValueError' in words(window)
    window.scatter.widget.selection = np.array([1, 2], 'uint32')
    press(window, 'save')
    assert '2 maps written to selection.csv' in words(window) and len(pd.read_csv('selection.csv')) == 2
    press(window, 'save')
    assert 'exists already' in words(window)


def test_unknown_scores_are_grey_and_never_zero():
    t = table()
    t.loc[:9, 'oa'] = np.nan
    values, colours, span = encode(Explorer(t).state, 'oa')
    assert (
        (values[:10] == 0).all()
        and (values[10:] > 0).all()
        and (values < 1).all()
        and colours[0] == '#BBBBBB'
        and span == (0, 1)
    )
    codes, colours, legend = encode(
        EmbeddingSelection(t.assign(method=t.method.where(t.index > 4))), 'method'
    )
    assert set(codes[:5]) == {0} and 0 not in set(codes[5:]) and len(legend) == 2
    assert 'unknown (10)' in Explorer(t).screens['legend'].value
    assert Explorer(t.assign(oa=np.nan)).state.summary()['n'] == 0


def test_more_names_than_colours():
    n = len(SHADES) + 9
    codes, colours, legend = encode(
        EmbeddingSelection(table(200).assign(kind=[f'k{i % n}' for i in range(200)])), 'kind'
    )
    assert (
        legend[-1][0] == '9 others'
        and len(colours) == len(SHADES) + 1
        and 'and' in legend_html('kind', legend)
    )


@pytest.mark.parametrize('t', [table(1), table(1).drop(columns=['oa', 'predicted', 'entropy', 'agree_majority']), table(2)[['u', 'v']], table().assign(u=1., v=1.), table().assign(oa=np.nan, predicted=np.nan)],
                         ids=['one point', 'one without scores', 'places only', 'one place', 'no score'])
def test_poor_tables_open(t):
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        window = Explorer(t)
        window.scatter.widget.selection = np.arange(len(t), dtype='uint32')
        window.scatter.widget.hovering = 0
        press(window, 'why')
        press(window, 'shown')
    assert (
        len(window.selection()) == len(t)
        and np.isfinite(window.scatter.widget.points).all()
        and 'Error' not in words(window)
    )
    assert len(window.snapshot().data_) == len(t)


def test_names_are_text_and_never_markup():
    t = table().assign(method='<img src=x onerror=alert(1)>', dataset='a & b')
    window = Explorer(t)
    window.state.color('method')
    window.state.show_histogram('method')
    window.state.select([1, 2])
    window.state.hover(1)
    shown = ''.join(s.value for s in window.screens.values())
    assert '<img src=x' not in shown and '&lt;img' in shown


def test_a_million_maps_and_a_lasso_over_a_hundred_thousand():
    window = Explorer(cloud(100_000))
    seconds = []
    for k in range(5):
        rows = np.arange(k, 100_000, 3, dtype='uint32')
        start = time.process_time()
        window.scatter.widget.selection = rows
        seconds.append(time.process_time() - start)
    assert len(window.selection()) == len(rows) and np.median(seconds) < .2
    start = time.process_time()
    window = Explorer(cloud(1_000_000))
    assert (
        len(window.state) == 1_000_000
        and window.scatter.widget.points.shape == (1_000_000, 4)
        and time.process_time() - start < 6
    )


def test_explore_opens_files_and_refuses_others(tmp_path):
    table().to_parquet(tmp_path/'t.parquet')
    table().to_csv(tmp_path/'t.csv', index=False)
    assert len(explore(tmp_path/'t.parquet').state) == len(explore(str(tmp_path/'t.csv')).state) == 60
    with pytest.raises(DataNotFound): explore(tmp_path/'no.parquet')
    (tmp_path/'t.xlsx').write_bytes(b'')
    with pytest.raises(Incompatible, match="suffix '.xlsx'"): explore(tmp_path/'t.xlsx')
    with pytest.raises(DataNotFound, match='no run in'): explore(tmp_path)


# ---------------------------------------------------------------- PCA first, and runs

def drafted(n=80, **options):
    rng = np.random.default_rng(0)
    t = pd.concat([table(), table(n - 60, 1)], ignore_index=True).drop(columns=['u', 'v'])
    return t, rng.normal(size=(n, 12)) + 3 * t.oa.to_numpy()[:, None], dict(method='tsne') | options


def test_a_draft_settles_where_the_plain_state_stands():
    t, x, options = drafted()
    soon = EmbeddingSelection(t, x, draft=True, **options)
    told = []
    assert (
        soon.coming == 'tsne'
        and 'tsne is on its way' in soon.header()
        and np.allclose(soon.table[['u', 'v']], EmbeddingSelection(t, x, method='pca').table[['u', 'v']])
    )
    soon.filter(dataset='coast').select([1, 2, 3])
    soon.observe(told.append)
    soon.wait()
    soon.wait()
    plain = EmbeddingSelection(t, x, **options)
    assert told == ['places'] and np.array_equal(soon.table, plain.table) and soon.header() == plain.header()
    assert (
        soon.numbers == plain.numbers
        and list(soon.chosen) == [1, 2, 3]
        and np.array_equal(soon.mask, t.dataset == 'coast')
    )
    assert np.array_equal(soon.values('u'), plain.values('u'))


def test_a_draft_of_pca_only_measures():
    t, x, _ = drafted()
    soon = EmbeddingSelection(t, x, draft=True, method='pca')
    before = soon.table.u.to_numpy()
    assert 'being measured' in soon.header() and soon.wait().numbers and np.array_equal(before, soon.table.u)


def test_two_who_wait_get_the_same_places():
    from concurrent.futures import ThreadPoolExecutor
    t, x, options = drafted()
    soon = EmbeddingSelection(t, x, draft=True, **options)
    with ThreadPoolExecutor(3) as pool:
        found = [f.result() for f in [pool.submit(soon.wanted) for _ in range(3)]]
    assert all(f is found[0] for f in found) and found[0][0].attrs['method'] == 'tsne'


def test_the_window_shows_pca_and_then_what_was_asked_for():
    import asyncio
    t, x, options = drafted()

    async def live():
        window = Explorer(t, x, **options)
        seen = window.screens['header'].value, window.scatter.widget.points.copy()
        window.scatter.widget.selection = np.array([5, 6], 'uint32')
        window.controls['dataset'].value = ('coast',)
        await window._task
        return window, *seen

    window, header, points = asyncio.run(live())
    plain = EmbeddingSelection(t, x, **options)
    assert (
        'tsne is on its way' in header
        and 'on its way' not in window.screens['header'].value
        and 'perplexity' in window.screens['header'].value
    )
    assert not np.allclose(points[:, :2], window.scatter.widget.points[:, :2]) and np.array_equal(
        window.state.table[['u', 'v']], plain.table[['u', 'v']]
    )
    assert list(window.scatter.widget.selection) == [5, 6] and np.array_equal(
        window.scatter.widget.filter, np.flatnonzero(t.dataset == 'coast')
    )
    # without a loop nobody could look meanwhile
    assert Explorer(t, x, **options).state.coming == ''


def test_a_projection_that_fails_leaves_the_window_with_pca(monkeypatch):
    import asyncio
    from rssqa.viz.projection import DRAWERS
    t, x, options = drafted()
    monkeypatch.setitem(DRAWERS, 'tsne', lambda *args, **more: 1 / 0)

    async def live():
        window = Explorer(t, x, **options)
        await window._task
        return window

    window = asyncio.run(live())
    assert 'tsne failed, the places of PCA stay' in words(window) and window.state.attrs['method'] == 'pca'
    window.scatter.widget.selection = np.array([5, 6], 'uint32')
    assert '2 selected' in words(window)


def test_a_run_is_opened_again(tmp_path):
    from trained import trained_setup
    w = trained_setup()
    store = Store(tmp_path/'store')
    for name in Store(w.home/'store').names(): store.put(name, Store(w.home/'store').get(name))
    put_vectors(
        store,
        'sem/words@abcdef01',
        ids := w.sqed.image_id.unique(),
        np.random.default_rng(0).normal(size=(len(ids), 4)),
    )
    assert {
        p.name for p in save_run(tmp_path / 'run', w.sqed, w.tiles, store, 'sem/words@abcdef01').iterdir()
    } == {'sqed.parquet', 'tiles.parquet', 'run.json'}
    assert explore(tmp_path/'run', height=300, method='pca').scatter.height() == 300
    s = open_run(tmp_path/'run', method='pca')
    case, fault = s.case(3)
    assert (
        not fault and set(case) == {'image', 'mask', 'truth', 'palette', 'classes'} and len(s) == len(w.sqed)
    )
    assert s.neighbours(0, 3).image_id.nunique() == 3 and 'picture trustworthy' in s.header()
    with pytest.raises(Incompatible, match='in words'): s.search('water')    # no encoder was named
    code = (
        "import sys, numpy as np, pandas as pd\nfrom rssqa.tables.store import Store, put_vectors\nstore = Store(sys.argv[1])\n"
        "put_vectors(store, 'sem/words@abcdef01', ['new'], np.ones((1, 4)))\nstore.tidy('sem/words@abcdef01'); store.tidy('masks')"
    )
    # another process writes and tidies
    subprocess.run([sys.executable, '-c', code, str(tmp_path / 'store')], check=True)
    assert (
        s.neighbours(1, 3).image_id.nunique() == 3
        and s.case(4)[1] == ''
        and s.vectors().store.keys('sem/words@abcdef01').isin(['new']).any()
    )
    shutil.rmtree(tmp_path/'store')
    with pytest.raises(DataNotFound, match='maps of .* are gone'): open_run(tmp_path/'run')
    with pytest.raises(DataNotFound, match='no run'): open_run(tmp_path/'nothing')


def test_case_reader_reads_what_the_pipeline_stored():
    from trained import trained_setup
    w = trained_setup()
    s = ExplorerState(w.sqed, images=case_reader(w.tiles, Store(w.home/'store'), w.specs), method='pca')
    for row in (0, len(w.sqed) - 1):
        case, fault = s.case(row)
        assert not fault and set(case) == {'image', 'mask', 'truth', 'palette', 'classes'}
        valid = case['truth'] != 255
        assert np.isclose((case['mask'] == case['truth'])[valid].mean(), w.sqed.oa.iloc[row], atol=1e-6)
