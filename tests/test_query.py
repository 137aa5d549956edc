"""A query chooses the rows that pandas would choose, and never runs code."""
import builtins, os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from rssqa.core import Incompatible, Problem, UnknownName
from rssqa.viz.query import MAX_LETTERS, query_columns, query_rows

RNG = np.random.default_rng(0)
N = 200
TABLE = pd.DataFrame(dict(
    image_id=[f'i{k // 2}' for k in range(N)],
    dataset=np.array(['coast', 'moor', 'czech_ortho'])[RNG.integers(3, size=N)],
    method=np.array(['unet', 'pspnet'])[np.arange(N) % 2],
    oa=RNG.uniform(0, 1, N).round(2).astype(np.float32),
    predicted=RNG.uniform(0, 1, N),
    level=RNG.integers(4, size=N),
    checked=RNG.integers(2, size=N).astype(bool),
))
TABLE['gap'] = TABLE.predicted - TABLE.oa

LIKE_PANDAS = [
    'gap < -0.3 and dataset == "czech_ortho"',
    'oa < predicted',
    '0.2 <= oa <= 0.4 or not (method == "unet")',
    'dataset in ("coast", "moor") and level != 2',
    'dataset not in ["coast"] and oa > +0.5',
    '-0.1 < gap < 0.1',
    '0.5 > oa',
    'level in (1, 3)',
    'checked and oa > 0.5',
    'not checked',
    'checked == True and "unet" == method',
    'dataset != method and oa > 0.5',
]
HOSTILE = [
    '__import__("os").system("touch hacked")',
    'open("hacked", "w")',
    '(lambda: 0)()',
    'oa.__class__.__mro__',
    'oa.__class__ == 1',
    '[x for x in ().__class__.__bases__][0] == oa',
    '@os.getcwd() == oa',
    'oa > 0.5; import os',
    'oa := 1',
    '(oa := 1) > 0',
    'oa > exec("1")',
    'f"{oa}" == dataset',
    'f"{__import__(\'os\')}" == dataset',
    'dataset == `oa`',
    'oa[0] > 1',
    'oa if oa else oa',
    'oa + 1 > 2',
    'oa > 10 ** 9',
    '9**9**9**9 > oa',
    'oa is None',
    'oa == None',
    'oa > 1j',
    'dataset == b"coast"',
    'dataset < "moor"',
    'oa > "0.5"',
    'dataset in method',
    'dataset in "coast"',
    'dataset in ()',
    'dataset in ("coast", oa)',
    'oa in ("coast",)',
    '1 < 2',
    'True',
    'oa',
    'dataset',
    '"coast"',
    'await oa',
    'yield oa',
    'print',
    'oa > -"a"',
    'oa > - - 1',
    'oa > ' + '9' * 400,
    'oa > ' + '9' * 990,
    '*oa > 1',
    '**oa',
    'oa >',
    '> 0.5',
    'oa > 0.5 and',
    'oa & 1 > 0',
    'oa > 0.5 | gap < 0',
    '(' * 400 + 'oa > 1' + ')' * 400,
    'not ' * 240 + 'oa',
    '\0',
    'oa > 0.5\0',
    'oa\n> 0.5\nimport os',
    '# only a remark',
    ' ',
    '',
    'oa > 1 and ' * 200 + 'oa > 1',
    '\ud800',
    'oa > ٣',
]


@pytest.mark.parametrize('text', LIKE_PANDAS)
def test_rows_are_those_of_pandas(text):
    expected = np.zeros(N, bool)
    expected[TABLE.query(text).index] = True
    found = query_rows(TABLE, text)
    assert found.dtype == bool and np.array_equal(found, expected) and 0 < found.sum() < N


@pytest.mark.parametrize('text', HOSTILE)
def test_nothing_is_run_and_the_error_has_three_parts(text, tmp_path, monkeypatch):
    def fail(*args, **options): raise AssertionError('code was run')
    monkeypatch.chdir(tmp_path)
    for name in ('eval', 'exec'): monkeypatch.setattr(builtins, name, fail)
    monkeypatch.setattr(os, 'system', fail)
    with pytest.raises(Problem) as caught: query_rows(TABLE, text)
    assert caught.value.what and caught.value.found and caught.value.todo and str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_names_get_near_ones():
    with pytest.raises(UnknownName, match='no column named .gpa.*mean gap'): query_rows(TABLE, 'gpa < 0')
    with pytest.raises(UnknownName, match='no dataset named .czech.*mean czech_ortho'):
        query_rows(TABLE, 'dataset == "czech"')
    with pytest.raises(UnknownName, match='segnet'): query_rows(TABLE, 'method in ("unet", "segnet")')
    with pytest.raises(Incompatible, match='without quotes'): query_rows(TABLE, 'oa > "0.5"')
    with pytest.raises(Incompatible, match=f'at most {MAX_LETTERS:,}'): query_rows(TABLE, 'oa > 1' + ' ' * 995)


def test_an_unknown_value_passes_neither_a_condition_nor_its_opposite():
    t = TABLE.assign(gap=TABLE.gap.where(TABLE.index > 9), method=TABLE.method.where(TABLE.index > 4))
    for text in ('gap < 0', 'not gap < 0', 'gap != 7', 'gap not in (7, 8)'):
        assert not query_rows(t, text)[:10].any()
    for text in ('method == "unet"', 'method != "unet"', 'not method == "unet"', 'method not in ("unet",)'):
        assert not query_rows(t, text)[:5].any() and query_rows(t, text)[5:].any()
    # one side is enough for "or", and for a false "and"
    assert np.array_equal(query_rows(t, 'gap < 0 or oa >= 0'), np.ones(N, bool))
    assert np.array_equal(query_rows(t, 'not (gap < 0 and oa < 0)'), np.ones(N, bool))


def test_numbers_are_compared_as_the_column_keeps_them():
    t = pd.DataFrame(dict(oa=np.array([.9, .1], np.float32), n=[2**53, 3], text=[[1], [2]]))
    assert query_rows(t, 'oa == 0.9').tolist() == query_rows(t, 'oa >= 0.9').tolist() == [True, False]
    assert query_rows(t, 'oa in (0.9, 0.5)').tolist() == [True, False]
    assert query_rows(t, f'n == {2**53}').tolist() == [True, False] and query_rows(t, 'oa < 1e300').all()
    with pytest.raises(Incompatible, match='lists'): query_rows(t, 'text == 1')


def test_columns_of_a_query():
    assert query_columns('gap < -0.3 and dataset == "oa"') == ['dataset', 'gap']


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(
    ['oa', 'gap', 'dataset', '<', '==', 'in', 'not', 'and', 'or', '(', ')', '"moor"', '0.5', ',', '-', '.', 'x'],
), max_size=12).map(' '.join))
def test_any_text_gives_rows_or_a_problem(text):
    try: found = query_rows(TABLE, text)
    except Problem as e: assert e.what and str(e)
    else: assert found.dtype == bool and found.shape == (N,)
