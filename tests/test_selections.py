"""Selections: undo and redo, names that survive a restart, files that are damaged, and what two of them differ in."""
import json, os, subprocess, sys, threading

import numpy as np
import pandas as pd
import pytest

from rssqa.core import DataNotFound, Incompatible, Problem, SchemaError, UnknownName
from rssqa.viz.contrast import (
    MIN_IMAGES, cliffs_delta, compare_selections, comparison_note, difference_text, draw_images, plot_differences,
    size_word,
)
from rssqa.viz.explorer import ExplorerState
from rssqa.viz.selections import (
    MAX_ROWS, REST, KeptSelections, SelectionHistory, select_by_query,
)


def table(images=60, methods=('unet', 'pspnet', 'logcan'), seed=0) -> pd.DataFrame:
    "Maps of images; in the first half the methods disagree more."
    rng = np.random.default_rng(seed)
    n = images * len(methods)
    image = np.arange(n) // len(methods)
    half = image < images // 2
    oa = rng.uniform(.3, 1, n)
    return pd.DataFrame(dict(
        image_id=[f'i{k:03d}' for k in image],
        dataset=np.array(['coast', 'moor'])[(image % 4 > 0) * 1],
        method=np.array(methods)[np.arange(n) % len(methods)],
        oa=oa,
        predicted=oa + rng.normal(0, .1, n),
        disagreement=rng.normal(.2, .1, images)[image] + .21 * half,
        level=half * 1,
        u=rng.normal(size=n),
        v=rng.normal(size=n),
    ))


@pytest.fixture
def state(): return ExplorerState(table())


# ---------------------------------------------------------------- undo, redo, query

def test_undo_and_redo_follow_every_change(state):
    history = SelectionHistory(state)
    steps = [([1, 2], 'lasso'), ([], ''), ([5, 4], 'most like "road"'), ([7], 'lasso')]
    for rows, reason in steps: state.select(rows, reason=reason)
    state.select([7], reason='the same rows are no step')
    found = []
    for _ in steps:
        history.undo()
        found.append((state.chosen.tolist(), state.reason))
    assert found == [*reversed(steps[:-1]), ([], '')]
    with pytest.raises(Incompatible, match='nothing to undo'): history.undo()
    for rows, _ in steps:
        history.redo()
        assert state.chosen.tolist() == rows
    with pytest.raises(Incompatible, match='nothing to redo'): history.redo()
    history.undo()
    state.select([9])
    with pytest.raises(Incompatible, match='nothing to redo'): history.redo()


def test_undo_brings_order_and_scores_back(state):
    history = SelectionHistory(state)
    state.select([9, 3, 30], [.9, .8, .7], 'most like "water"').select([])
    history.undo()
    assert state.chosen.tolist() == [9, 3, 30] and np.allclose(state.scores(), [.9, .8, .7])


def test_the_history_forgets_the_oldest_first(state, monkeypatch):
    from rssqa.viz import selections
    history = SelectionHistory(state)
    for k in range(150): state.select([k])
    assert len(history.past) == 100 and history.past[-1][0].tolist() == [148]
    monkeypatch.setattr(selections, 'MAX_ROWS', 250)
    state.select(np.arange(120)).select(np.arange(110)).select([1])
    assert sum(len(step[0]) for step in history.past) <= 250 < MAX_ROWS
    history.undo()
    assert len(state.chosen) == 110


def test_a_query_selects_and_the_filter_decides_what_is_shown(state):
    t = state.table
    select_by_query(state, ' oa < 0.6 and dataset == "coast" ')
    expected = t.oa.lt(.6) & t.dataset.eq('coast')
    assert np.array_equal(np.sort(state.rows()), np.flatnonzero(expected))
    assert state.reason == 'query oa < 0.6 and dataset == "coast"'
    assert set(state.filter(method='unet').selection().method) == {'unet'}
    before = state.chosen
    with pytest.raises(UnknownName): select_by_query(state, 'ao < 0.6')
    assert state.chosen is before


# ---------------------------------------------------------------- keeping

@pytest.fixture
def kept(state, tmp_path): return KeptSelections(state, tmp_path/'run/selections.json')


def reopened(kept, order=1): return KeptSelections(ExplorerState(table().iloc[::order]), kept.path)


def keys(frame): return list(zip(frame.image_id, frame.method))


def test_a_selection_survives_a_restart_and_another_order(kept):
    kept.state.select([9, 3, 30], [.9, .8, .7], 'most like "water"')
    kept.keep('wet')
    kept.annotate('wet', note='ponds, too', tags=' water, check,')
    again = reopened(kept, -1)
    assert again.choose('wet') == 0
    assert keys(again.state.selection()) == keys(kept.state.selection())
    assert np.allclose(again.state.selection().score, [.9, .8, .7]) and again.state.reason == 'kept as wet'
    row = again.table().iloc[0]
    assert (row['name'], row.maps, row.images, row.tags, row.note) == ('wet', 3, 3, 'water, check', 'ponds, too')
    assert row.reason == 'most like "water"' and pd.Timestamp(row.made).tzinfo is not None


RESTART = '''import sys
sys.path.insert(0, sys.argv[2])
from test_selections import table
from rssqa.viz.explorer import ExplorerState
from rssqa.viz.selections import KeptSelections
kept = KeptSelections(ExplorerState(table()), sys.argv[1])
kept.choose("low")
print(*kept.state.selection().index)'''


def test_another_process_finds_what_was_kept(kept):
    select_by_query(kept.state, 'oa < 0.4')
    kept.keep('low')
    command = [sys.executable, '-c', RESTART, str(kept.path), os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert [int(row) for row in done.stdout.split()] == kept.state.rows().tolist()


def test_only_what_is_shown_is_kept_and_how_it_was_made(kept):
    kept.state.filter(method='unet', oa=(.3, .8))
    select_by_query(kept.state, 'disagreement > 0.3')
    kept.keep('far apart')
    entry = kept.entry('far apart')
    assert set(entry['maps']['method']) == {'unet'} and len(entry['maps']['method']) == len(kept.state.rows())
    assert entry['filters'] == dict(method='unet', oa=[.3, .8]) or entry['filters'] == dict(method='unet', oa=(.3, .8))
    assert entry['columns'] == ['disagreement', 'method', 'oa'] and entry['reason'] == 'query disagreement > 0.3'


def test_names_are_taken_once_renamed_and_removed(kept):
    kept.state.select([1, 2])
    kept.keep('a')
    kept.annotate('a', note='first')
    kept.state.select([3])
    with pytest.raises(Incompatible, match='kept already'): kept.keep(' a ')
    kept.keep('a', replace=True)                                     # its note stays
    assert kept.table().maps.tolist() == [1] and kept.table().note.tolist() == ['first']
    kept.keep('b')
    with pytest.raises(Incompatible, match='kept already'): kept.rename('a', 'b')
    kept.rename('a', 'c')
    assert reopened(kept).names() == ['c', 'b']
    kept.remove('c')
    assert reopened(kept).names() == ['b'] and 'b' in kept and len(kept) == 1
    for call in (kept.choose, kept.remove, kept.entry, lambda name: kept.rename(name, 'x'), kept.annotate):
        with pytest.raises(UnknownName, match='no selection named'): call('bb')
    for name in ('', ' ', 'x' * 81, REST):
        with pytest.raises(Incompatible, match='cannot use'): kept.keep(name)
    kept.state.select([])
    with pytest.raises(SchemaError, match='nothing is selected|Nothing is selected'): kept.keep('empty')


def test_two_windows_share_a_file(kept):
    other = reopened(kept)
    kept.state.select([1])
    other.state.select([2])
    kept.keep('one')
    other.keep('another')
    assert other.names() == reopened(kept).names() == ['one', 'another']

    def keep_many(window, label):
        for k in range(10): window.keep(f'{label}{k}')

    threads = [threading.Thread(target=keep_many, args=pair) for pair in ((kept, 'a'), (other, 'b'))]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(reopened(kept)) == 22


GOOD = dict(name='a', maps=dict(image_id=['i000'], method=['unet']), score=None, reason='lasso', filters={}, columns=[],
            made='2026-01-01', note='', tags=[])
DAMAGED = [
    '',
    '{"version": 1, "selections": [',
    '[]',
    '{}',
    '{"version": 2, "selections": []}',
    '{"version": 1, "selections": {}}',
    '{"version": 1, "selections": [{"name": "a"}]}',
    json.dumps(dict(version=1, selections=[GOOD | dict(maps=dict(method=['unet']))])),
    json.dumps(dict(version=1, selections=[GOOD | dict(maps=dict(image_id=['i000'], method=[]))])),
    json.dumps(dict(version=1, selections=[GOOD | dict(score=[1, 2])])),
    json.dumps(dict(version=1, selections=[GOOD | dict(tags='a')])),
    '\udcff',
]


@pytest.mark.parametrize('content', DAMAGED)
def test_a_damaged_file_is_reported_and_never_overwritten(content, state, tmp_path):
    path = tmp_path/'selections.json'
    data = content.encode('utf-8', 'surrogateescape')
    path.write_bytes(data)
    kept = KeptSelections(state, path)
    assert isinstance(kept.fault, SchemaError) and 'cannot read the selections' in str(kept.fault)
    assert kept.fault.found and 'not overwritten' in kept.fault.todo
    state.select([1])
    for call in (lambda: kept.keep('a'), lambda: kept.remove('a'), lambda: kept.annotate('a', note='x')):
        with pytest.raises(SchemaError, match='cannot read the selections'): call()
    assert path.read_bytes() == data
    # once it is moved away, keeping works again
    path.rename(tmp_path/'old.json')
    kept.keep('a')
    assert kept.fault is None and KeptSelections(state, path).names() == ['a']


def test_a_file_damaged_meanwhile_is_not_overwritten(kept):
    kept.state.select([1])
    kept.keep('a')
    kept.path.write_text('{"version": 1')
    with pytest.raises(SchemaError): kept.keep('b')
    assert kept.path.read_text() == '{"version": 1' and kept.names() == ['a']


def test_a_write_that_fails_leaves_the_old_file(kept, monkeypatch):
    kept.state.select([1])
    kept.keep('a')
    before = kept.path.read_text()

    def fail(*args): raise OSError(28, 'No space left on device')

    monkeypatch.setattr('rssqa.core.os.replace', fail)
    with pytest.raises(DataNotFound, match='cannot write selections.json.*[Nn]o space left'): kept.keep('b')
    assert kept.path.read_text() == before and kept.names() == ['a']


def test_tables_without_keys_are_refused_and_missing_maps_counted(kept):
    kept.state.select([1, 2, 3])
    kept.keep('three')
    part = KeptSelections(ExplorerState(table().iloc[2:]), kept.path)
    assert part.choose('three') == 1 and len(part.state.rows()) == 2
    with pytest.raises(Incompatible, match='[Nn]one of its 3 maps'):
        KeptSelections(ExplorerState(table().iloc[50:]), kept.path).choose('three')
    with pytest.raises(Incompatible, match='[Ii]t was kept by image_id, method'):
        KeptSelections(ExplorerState(table(methods=['unet']).drop(columns='method')), kept.path).choose('three')
    for wrong, words in ((table().drop(columns='image_id'), 'no column image_id'),
                         (table().assign(method='unet'), 'repeat the image_id')):
        nameless = KeptSelections(ExplorerState(wrong))
        nameless.state.select([1])
        with pytest.raises(SchemaError, match=words): nameless.keep('a')


def test_without_a_path_selections_last_as_long_as_the_program(state):
    kept = KeptSelections(state)
    state.select([1, 2])
    kept.keep('a')
    kept.annotate('a', tags=['x'])
    kept.rename('a', 'b')
    assert kept.table().tags.tolist() == ['x'] and kept.choose('b') == 0


def test_an_export_says_where_its_rows_come_from(kept, tmp_path):
    kept.state.filter(dataset='coast')
    select_by_query(kept.state, 'oa < 0.6')
    kept.keep('low')
    kept.annotate('low', note='=1+1', tags=['a', 'b'])
    kept.state.select([])
    back = pd.read_csv(kept.export('low', tmp_path/'low.csv'))
    assert keys(back) == list(zip(*kept.entry('low')['maps'].values()))
    row = back.iloc[0]
    assert (row.selection, row.selection_by, row.selection_tags) == ('low', 'query oa < 0.6', 'a, b')
    assert row.selection_filters == 'dataset: coast' and row.selection_note == "'=1+1" and row.rssqa
    with pytest.raises(Incompatible, match='exists already'): kept.export('low', tmp_path/'low.csv')
    with pytest.raises(SchemaError, match='[Nn]othing is selected'): kept.export(None, tmp_path/'now.csv')
    kept.state.select([0, 1], reason='lasso')
    assert set(pd.read_csv(kept.export(None, tmp_path/'now.csv')).selection_by) == {'lasso'}


# ---------------------------------------------------------------- comparison

def test_cliffs_delta_is_the_difference_of_two_probabilities():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.integers(6, size=rng.integers(1, 30))
        b = rng.integers(6, size=rng.integers(1, 30))
        pairs = np.sign(a[:, None] - b)
        assert np.isclose(cliffs_delta(a, b), pairs.mean())
    assert [size_word(d) for d in (0, .1, -.2, .4, -.5, 1)] == [
        'negligible', 'negligible', 'small', 'medium', 'large', 'large']


def split(t): return np.flatnonzero(t.level == 1), np.flatnonzero(t.level == 0)


def test_a_planted_difference_comes_first_and_others_are_not_clear():
    t = table(200)
    found = compare_selections(t, *split(t), columns=['oa', 'disagreement', 'method', 'dataset'])
    first = found.iloc[0]
    assert first['column'] == 'disagreement' and first['size'] == 'large' and first.clear
    assert np.isclose(first.difference, .21, atol=.05) and first.low < first.delta < first.high
    by_name = found[found.column != 'disagreement']
    assert by_name.clear.mean() < .2 and found.delta.abs().is_monotonic_decreasing
    text = difference_text(first, ("'flooded'", 'the rest'))
    assert f"maps in 'flooded' have {first.difference:.2g} " in text
    assert 'higher disagreement than those in the rest' in text
    assert ': large (' in text and 'made by' not in text
    assert 'made by this column' in difference_text(first, made_by=('disagreement',))


def test_names_are_compared_by_their_shares():
    t = table(100)
    a = np.flatnonzero((t.dataset == 'coast') | (t.index % 7 == 0))
    b = np.setdiff1d(np.arange(len(t)), a)
    found = compare_selections(t, a, b, columns=['dataset'])
    coast = found[found.name == 'coast'].iloc[0]
    share = t.dataset.eq('coast')
    assert np.isclose(coast.a, share[a].mean()) and coast.b == 0 and np.isclose(coast.delta, coast.a)
    assert 'of the maps in A have dataset coast, 0% in B' in difference_text(coast)


def test_images_are_drawn_not_maps():
    "A column that is the same for all maps of an image has an interval as wide as if there were one map an image."
    many = table(60, methods=[f'm{k}' for k in range(8)])
    one = many[many.method == 'm0'].reset_index(drop=True)
    width = {}
    for name, t in dict(many=many, one=one).items():
        row = compare_selections(t, *split(t), columns=['disagreement'], draws=2000).iloc[0]
        width[name] = row.high - row.low
    assert np.isclose(width['many'], width['one'], rtol=.1)
    times = draw_images(np.array([True] * 5 + [False] * 5), np.array([False] * 4 + [True] * 6), 200)
    assert (times[:4].sum(0) == 4).all() and (times[4] == 1).all() and (times[5:].sum(0) == 5).all()


def test_intervals_cover_no_difference_as_often_as_they_claim():
    covered = []
    for seed in range(60):
        t = table(60, seed=seed)
        rng = np.random.default_rng(seed)
        group = rng.permutation(60)[np.arange(len(t)) // 3] < 30        # images at random
        value = rng.normal(size=60)[np.arange(len(t)) // 3] + rng.normal(0, .3, len(t))
        row = compare_selections(t.assign(value=value), np.flatnonzero(group), np.flatnonzero(~group), ['value'])
        covered.append(not row.clear[0])
    assert np.mean(covered) > .85


def test_few_images_are_refused_with_the_number_wanted():
    t = table()
    a, b = split(t)
    few = a[:3 * (MIN_IMAGES - 1)]
    with pytest.raises(Incompatible, match=f'9 and 30 images, expected at least {MIN_IMAGES} in each'):
        compare_selections(t, few, b)
    # many maps of few images are few
    with pytest.raises(Incompatible): compare_selections(t, np.repeat(few, 20), b)
    with pytest.raises(Incompatible): compare_selections(t, [], b)
    assert len(compare_selections(t, a[:3 * MIN_IMAGES], b))
    with pytest.raises(UnknownName): compare_selections(t, a, b, columns=['ao'])
    with pytest.raises(UnknownName): compare_selections(t, a, b, unit='town')


def test_columns_that_are_not_known_in_both_are_left_out():
    t = table().assign(only=lambda t: t.oa.where(t.level == 1), fixed=1., none=np.nan, lists=[[1]] * 180)
    found = compare_selections(t, *split(t))
    assert not {'only', 'fixed', 'none', 'lists', 'u', 'image_id'} & set(found.column)
    assert {'oa', 'predicted', 'disagreement'} <= set(found.column)


def test_the_note_counts_and_the_figure_has_its_data(kept):
    t = kept.state.table
    kept.state.select(np.flatnonzero(t.level == 1), reason='lasso')
    kept.keep('half')
    kept.state.select(np.arange(100))
    found = kept.compare('half')
    assert found.attrs['names'] == ('half', REST) and found.attrs['maps'] == (90, 90)
    note = comparison_note(found)
    assert '90 maps of 30 images against 90 maps of 30' in note and 'would by chance' in note
    shared = kept.compare('half', None)
    assert shared.attrs['shared'] == 90 and '90 maps in both' in comparison_note(shared)
    picture = plot_differences(found, found.attrs['names'], limit=4)
    assert len(picture.data_) == 4 and len(picture._repr_png_()) < 60_000
    with pytest.raises(Problem): kept.compare('nothing')
