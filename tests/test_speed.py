"""Speed is printed, never tested: what is tested is that the fast way and the plain way say the same, and that the table of ratios adds up."""
import numpy as np
import pandas as pd
import pytest

from rssqa.cli import main
from rssqa.segment.methods.training import load_segmenter
from rssqa.bench.speed import enlarged, in_turns, largest_gap, line, plain_sqed
from rssqa.tables.sqed import label_free_columns, stored_features
from rssqa.tables.store import Store, get_vectors
from trained import numbers, with_features, trained_setup


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    "One run in miniature through the command line: (what was printed, what was written)."
    from contextlib import redirect_stdout
    from io import StringIO
    out = tmp_path_factory.mktemp('speed')/'speed.csv'
    said = StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as stop:
        main(['bench', 'speed', '--quick', '--out', str(out)])
    assert stop.value.code == 0
    return said.getvalue(), pd.read_csv(out)


def test_every_line_is_there(quick):
    words = (
        'SQED table',
        'jury fit',
        'score of one map',
        'score with peers',
        'quality model fit',
        'peak memory',
        'vectors of',
        'training on',
    )
    assert all(quick[1].what.str.startswith(w).any() for w in words) and len(quick[1]) == 10
    assert all(what in quick[0] for what in quick[1].what) and 'target' in quick[0]


def test_ratios_add_up(quick):
    t = quick[1]
    assert np.isfinite(t[['value', 'baseline', 'ratio']]).all(axis=None) and (
        t[['value', 'baseline', 'ratio']] > 0
    ).all(axis=None)
    better = np.where(t.unit.str.endswith('/s'), t.value / t.baseline, t.baseline / t.value)
    # written with five digits
    np.testing.assert_allclose(t.ratio, better, rtol=1e-2, atol=1e-4)
    assert (t.met.isna() == t.target.isna()).all() and ((t.met == 'yes') == (t.ratio >= t.target)).all()


def test_results_carry_their_provenance(quick):
    assert {'protocol', 'data', 'seed', 'rssqa', 'commit', 'command', 'machine', 'cores', 'torch'} <= set(
        quick[1]
    )


def test_the_plain_loop_gives_the_same_columns():
    w = trained_setup()
    fold = w.networks.fold[0]
    networks = {n.method: load_segmenter(n.folder) for n in w.networks[w.networks.fold == fold].itertuples()}
    gaps = largest_gap(w.sqed, plain_sqed(w.tiles[w.tiles.fold == fold].head(3), networks, w.spec))
    assert set(gaps.index) == {*label_free_columns(w.sqed), 'oa'} and gaps.max() < 1e-3


@pytest.mark.parametrize('unit, value, baseline, ratio', [('rows/s', 10., 2., 5.), ('ms', 10., 2., 0.2), ('MB', 2., 10., 5.)])
def test_better_is_more_than_one(unit, value, baseline, ratio):
    told = line('x', value, unit, 'y', baseline, 5)
    assert (
        told['ratio'] == pytest.approx(ratio)
        and told['met'] == ('yes' if ratio >= 5 else 'no')
        and line('x', value, unit, 'y', baseline)['met'] == ''
    )


def test_turns_alternate():
    seen = []
    assert (
        list(in_turns(dict(a=lambda: seen.append('a'), b=lambda: seen.append('b')), 3)) == ['a', 'b']
        and ''.join(seen) == 'ababab'
    )


@pytest.mark.parametrize('rows', [30, 108, 250])
def test_an_enlarged_table_brings_its_features(rows, tmp_path):
    table = numbers()                                                                # 108 rows, 3 methods
    store = Store(with_features(tmp_path/'store', table))
    many = pd.read_parquet(enlarged(table, store, 'sem/toy@1', rows, tmp_path/'many')/'table.parquet')
    assert (
        len(many) == rows // 3 * 3
        and many.groupby('image_id').size().eq(3).all()
        and not many.duplicated(['image_id', 'method']).any()
    )
    assert (
        many.groupby(['dataset', 'scene']).image_id.nunique().max()
        <= table.groupby(['dataset', 'scene']).image_id.nunique().max()
    )
    new = Store(tmp_path/'many'/'store')
    known = table.image_id.unique()
    original = lambda ids: [i.rsplit('+', 1)[0] for i in ids]
    assert set(original(many.image_id)) <= set(known)
    assert np.array_equal(
        get_vectors(new, 'sem/toy@1', many.image_id.unique()),
        get_vectors(store, 'sem/toy@1', original(many.image_id.unique())),
    )
    intermediate = stored_features(store, table)
    for method, found in stored_features(new, many).items():
        at = pd.Index(table.image_id[table.method == method]).get_indexer(
            original(many.image_id[many.method == method])
        )
        assert np.array_equal(found, intermediate[method][at])


def test_steps_are_chosen_by_name():
    from rssqa.core import UnknownName
    from rssqa.bench.speed import run
    with pytest.raises(UnknownName, match='(?i)reading vectors back'): run(True, only=('reading vectors',))
