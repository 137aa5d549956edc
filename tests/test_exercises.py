"""Exercises: the reference passes, every slip is told by its reason, nothing gives the answer away."""
import numpy as np
import pandas as pd
import pytest

from rssqa.core import UnknownName
from rssqa.exercises import check, difference, exercises

TABLE = pd.DataFrame(
    dict(
        image_id=np.repeat([*'abcd'], 3),
        method=[*'xyz'] * 4,
        conf=[0.9, 0.8, 0.5] * 4,
        oa=np.linspace(0.3, 0.85, 12),
        predicted=np.tile([0.5, 0.505, 0.7, 0.9, 0.2, 0.905], 2),
        mean=0.5,
    )
)
TILES = pd.DataFrame(
    dict(scene=list('aaabb'), split=['train', 'train', 'train', 'train', 'test'], fold=[0, 0, 1, 1, 0])
)
CUTS = pd.DataFrame(dict(cut=[.1, .2, .3], shuffled=[.5, .92, 1.], clean=[.1, .3, .95]))
GIVEN = {
    'accuracy_without_labels/boastful': (TABLE,),
    'two_branches/taps': ((4, 8),),
    'build_an_sqed/rows': (TILES, ['unet', 'pspnet', 'logcan']),
    'build_an_sqed/torn': (TILES,),
    'train_a_quality_model/error': (TABLE,),
    'read_a_umap/surviving': (dict(a=0.5, b=0.1), 0.2),
    'which_method/close': (TABLE,),
    'train_a_clip/chance': (48,),
    'purify_captions/cut': (CUTS,),
    'purify_captions/price': (CUTS,),
}
NAMES = exercises.list('*/*')


def inputs(name): return exercises[name].trials() if exercises[name].trials else [GIVEN[name]]


@pytest.mark.parametrize('name', NAMES)
def test_the_reference_is_right(name):
    ex = exercises[name]
    assert check(name, ex.reference) if ex.trials else check(name, ex.reference(*GIVEN[name]), *GIVEN[name])
    assert ex.question.rstrip()[-1] in '.?'


@pytest.mark.parametrize('name', NAMES)
def test_slips_are_told_apart(name):
    ex, heard = exercises[name], []
    for why, slip in ex.slips.items():
        # these inputs do not show it
        if not ex.trials and not difference(slip(*GIVEN[name]), ex.reference(*GIVEN[name]), ex.tolerance):
            continue
        told = check(name, slip) if ex.trials else check(name, slip(*GIVEN[name]), *GIVEN[name])
        assert not told and told.said == f'not yet: {why}'
        heard.append(why)
    assert heard or not ex.slips


@pytest.mark.parametrize('name', NAMES)
def test_the_answer_is_kept(name):
    right = exercises[name].reference(*inputs(name)[0])
    if isinstance(right, (float, int)):
        assert (
            f'{right:.3g}'
            not in (
                check(name, lambda *a: -123.0)
                if exercises[name].trials
                else check(name, -123.0, *GIVEN[name])
            ).said.split('(called')[0]
        )
    if isinstance(right, str): assert repr(right) not in check(name, 'something', *GIVEN[name]).said


@pytest.mark.parametrize('answer, right, said', [
    (0.5, 0.5, ''), (np.float32(.5), .5, ''), (.505, .5, ''), (.6, .5, 'too high'), (50., .5, 'percent'), (np.nan, .5, 'NaN'), (.5, np.nan, 'expected NaN'), (np.nan, np.nan, ''),
    (1002, 1000, ''), (1200, 1000, 'too high'), ('a', 'a', ''), ('b', 'a', 'is not it'), ('a', 1., 'expected a number'), ([1, 2], (1, 2), ''), ([1], [1, 2], 'found 1 values, expected 2'),
    ([1, 3.5], [1, 2], 'value 1'), ({'a'}, {'a'}, ''), ({'a': 1}, {'a': 1}, ''), ({'b': 1}, {'a': 1}, 'names differ'), ({'a': 2}, {'a': 1}, 'a: '), (True, 1, 'expected a number'),
    (pd.Series({'a': 1.}), {'a': 1.}, ''), (np.arange(3), [0, 1, 2], ''), (None, 1, 'NoneType')])
def test_difference(answer, right, said):
    told = difference(answer, right)
    assert told == '' if not said else said in told


def test_bad_functions_are_told_and_not_raised():
    assert 'raised TypeError' in check('which_method/regret', lambda: 0).said
    assert 'expected a function' in check('which_method/regret', 0.1).said
    with pytest.raises(UnknownName, match='which_method/regret'): check('which_method/regrets', 0.1)
