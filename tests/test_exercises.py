"""Exercises: the reference passes, every slip gets its own reason, no message gives the answer away."""
import numpy as np
import pandas as pd
import pytest

from rssqa.core import UnknownName
from rssqa.exercises import check, difference, exercises

KEYS = dict(image_id=np.repeat([*'abcd'], 3), method=[*'xyz'] * 4)
PREDICTED = np.tile([0.5, 0.505, 0.7, 0.9, 0.2, 0.905], 2)
NUMBERS = dict(conf=[0.9, 0.8, 0.5] * 4, oa=np.linspace(0.3, 0.85, 12), predicted=PREDICTED, mean=0.5)
TABLE = pd.DataFrame(KEYS | NUMBERS)
TILES = pd.DataFrame(dict(scene=list('aaabb'), split=['train'] * 4 + ['test'], fold=[0, 0, 1, 1, 0]))
TRAIN = pd.DataFrame(dict(dataset=[*'xxxxy'], scene=[*'abbbc']))
TEST = pd.DataFrame(dict(dataset=[*'xxxxxyy'], scene=[*'aaaafcd']))
CUTS = pd.DataFrame(dict(cut=[.1, .2, .3], shuffled=[.5, .92, 1.], clean=[.1, .3, .95]))
ERRORS = pd.DataFrame({'one network': [.1, .2, .3], 'concatenated': [.05, .25, .29]}, [*'xyz']).T
ACCOUNT = pd.DataFrame(dict(labels=[0, 10, 20, 30], p_best=[.2, .5, .8, .93], p_near=[.3, .92, .85, .97]))
ACCOUNT.loc[4] = 40, .94, .99
BOUNDED = pd.DataFrame(dict(oa=[.1, .2, .6, .9, .95, .7, .5], lower=.3, upper=[.8] * 4 + [.97, .8, .8]))
GIVEN = {
    'accuracy_without_labels/overconfident': (TABLE,),
    'accuracy_without_labels/pick': (TABLE,),
    'two_branches/features': ((4, 8),),
    'two_branches/source': (ERRORS,),
    'assess_your_own_maps/review': (np.arange(10) / 10, np.arange(10) % 4 == 1),
    'assess_your_own_maps/covered': (BOUNDED,),
    'from_labels_to_a_map/when': (ACCOUNT,),
    'build_an_sqed/rows': (TILES, ['unet', 'pspnet', 'logcan']),
    'build_an_sqed/split_scene': (TILES,),
    'build_an_sqed/forbidden': (['conf', 'miou', 'scene'], ['conf', 'entropy']),
    'train_a_quality_model/error': (TABLE,),
    'train_a_quality_model/leak': (TRAIN, TEST),
    'read_a_umap/surviving': (dict(a=0.5, b=0.1), 0.2),
    'which_method/close': (TABLE,),
    'train_a_clip/chance': (48,),
    'purify_captions/cut': (CUTS,),
    'purify_captions/price': (CUTS,),
}
NAMES = exercises.list('*/*')


def inputs(name) -> tuple:
    "Return one set of arguments of an exercise."
    exercise = exercises[name]
    return exercise.trials()[0] if exercise.trials else GIVEN[name]


def hand_in(name, function):
    "Check a function, or what it returns where the answer is a value."
    if exercises[name].trials: return check(name, function)
    return check(name, function(*GIVEN[name]), *GIVEN[name])


@pytest.mark.parametrize('name', NAMES)
def test_the_reference_is_right(name):
    assert hand_in(name, exercises[name].reference)
    assert exercises[name].question.rstrip()[-1] in '.?'


@pytest.mark.parametrize('name', NAMES)
def test_each_slip_gets_its_own_reason(name):
    exercise = exercises[name]
    reasons = []
    for reason, slip in exercise.slips.items():
        if not exercise.trials:
            given = GIVEN[name]
            if not difference(slip(*given), exercise.reference(*given), exercise.tolerance): continue   # not shown
        outcome = hand_in(name, slip)
        assert not outcome and outcome.message == f'not yet: {reason}'
        reasons.append(reason)
    assert reasons or not exercise.slips


@pytest.mark.parametrize('name', NAMES)
def test_no_message_gives_the_answer_away(name):
    right = exercises[name].reference(*inputs(name))
    wrong = 'something' if isinstance(right, str) else -123.0
    message = hand_in(name, lambda *given: wrong).message.split('(called')[0]
    if isinstance(right, str): assert repr(right) not in message
    if isinstance(right, (float, int)): assert f'{right:.3g}' not in message


EQUAL = [
    (0.5, 0.5), (np.float32(.5), .5), (.505, .5), (np.nan, np.nan), (1002, 1000),
    ('a', 'a'), ([1, 2], (1, 2)), ({'a'}, {'a'}),
    ({'a': 1}, {'a': 1}), (pd.Series({'a': 1.}), {'a': 1.}), (np.arange(3), [0, 1, 2]),
]
DIFFERENT = [
    (.6, .5, 'too high'), (50., .5, 'percent'), (np.nan, .5, 'NaN'), (.5, np.nan, 'expected NaN'),
    (1200, 1000, 'too high'),
    ('b', 'a', 'is not it'), ('a', 1., 'expected a number'), ([1], [1, 2], 'found 1 values, expected 2'),
    ([1, 3.5], [1, 2], 'value 1'),
    ({'b': 1}, {'a': 1}, 'names differ'), ({'a': 2}, {'a': 1}, 'a: '),
    (True, 1, 'expected a number'), (None, 1, 'NoneType'),
]


@pytest.mark.parametrize('answer, right', EQUAL)
def test_equal_answers(answer, right): assert difference(answer, right) == ''


@pytest.mark.parametrize('answer, right, words', DIFFERENT)
def test_different_answers(answer, right, words): assert words in difference(answer, right)


def test_a_function_that_fails_is_reported_and_not_raised():
    assert 'raised TypeError' in check('which_method/regret', lambda: 0).message
    assert 'expected a function' in check('which_method/regret', 0.1).message
    with pytest.raises(UnknownName, match='which_method/regret'): check('which_method/regrets', 0.1)
