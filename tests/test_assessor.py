"The assessor: symmetric in maps and classes, silent where it cannot know, equal after saving, mended by labels."
import json
from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from rssqa.core import BadImage, DataNotFound, Incompatible, Problem, SchemaError, UnknownName
from rssqa.data.synthetic import CLASSES, scene
from rssqa.quality.assessment import give_advice
from rssqa.quality.assessor import Assessor, TrainingImage, points_right
from rssqa.quality.bounds import (
    CALIBRATION_INPUTS, KNOWN_METHODS, KNOWN_SOURCE, MANY_MAPS, disagreements, gain_shortfalls, input_kind,
)
from rssqa.quality.maps import Map, class_table
from rssqa.quality.posterior import (
    find_neighbours, image_neighbours, map_posterior, point_features, point_maps, posterior_loss, train_posterior
)
from rssqa.quality.switching import ONE_SIDED, fit_switch_rules, pool_means
from rssqa.tables.grid import PredictionGrid, subsample

SIDE = 64


def noisy(mask, seed, shares=(0.1, 0.3, 0.6)):
    "Maps in which a share of the pixels is drawn at random."
    rng = np.random.default_rng(seed)
    maps = {}
    for share in shares:
        drawn = rng.integers(0, len(CLASSES), mask.shape)
        maps[f'{share:.0%}'] = np.where(rng.random(mask.shape) < share, drawn, mask).astype(np.uint8)
    return maps


def training_image(seed, dataset, shares=(0.1, 0.2, 0.3, 0.45, 0.6)):
    s = scene('town', seed=seed, size=SIDE)
    maps = noisy(s.mask, seed, shares)
    ids = np.stack([subsample(m) for m in maps.values()])
    p = (255 * np.eye(len(CLASSES))[ids].transpose(0, 3, 1, 2)).astype(np.uint8)
    grid = PredictionGrid(f'{dataset}{seed}', dataset, list(maps), p, p, ids, subsample(s.mask))
    return TrainingImage(s.image, grid, f's{seed}', {n: float((m == s.mask).mean()) for n, m in maps.items()})


@pytest.fixture(scope='module')
def assessor():
    images = [training_image(i, 'a') for i in range(7)] + [training_image(i, 'b') for i in range(20, 27)]
    return Assessor(encoder='', members=1, epochs=15, name='small').fit(images)


@pytest.fixture(scope='module')
def new(): return scene('town', seed=50, size=SIDE)


@pytest.fixture(scope='module')
def maps(new): return noisy(new.mask, 50)


@pytest.fixture(scope='module')
def answer(assessor, new, maps): return assessor.assess(new.image, maps, CLASSES)


def predicted(answer): return answer.table.set_index('name').predicted


# ---------------------------------------------------------------- the answer

def test_better_maps_are_predicted_better(assessor):
    orders = []
    for seed in range(60, 66):
        s = scene('town', seed=seed, size=SIDE)
        orders.append(assessor.assess(s.image, noisy(s.mask, seed), CLASSES).table.name.tolist())
    assert sum(order == ['10%', '30%', '60%'] for order in orders) >= 5


def test_the_table_holds_what_it_promises(answer):
    t = answer.table
    assert set(t) == {
        'name', 'predicted', 'lower', 'upper', 'as_good', 'recommended', 'agreement', 'confidence', 'iou'}
    assert ((0 <= t.lower) & (t.lower <= t.predicted) & (t.predicted <= t.upper) & (t.upper <= 1)).all()
    assert t.recommended.sum() == 1 and t.as_good[t.recommended].all()
    assert set(t.iou[0]) == set(CLASSES)
    assert t.predicted.is_monotonic_decreasing


def test_json_is_plain_and_complete(answer):
    plain = json.loads(json.dumps(answer.to_json()))
    assert plain['pack'] == 'small' and plain['advice'] == answer.advice
    assert plain['domain'] == dict(ok=True, refused=False, reasons=[], findings=[])
    assert [m['name'] for m in plain['maps']] == answer.table.name.tolist()
    assert {'predicted', 'lower', 'upper', 'as_good', 'recommended', 'iou'} <= set(plain['maps'][0])


def test_errors_are_more_probable_where_the_map_is_wrong(answer, new, maps):
    error = answer.error_map('60%')
    wrong = maps['60%'] != new.mask
    assert error.shape == new.mask.shape and 0 <= error.min() <= error.max() <= 1
    assert error[wrong].mean() > error[~wrong].mean() + 0.2
    with pytest.raises(UnknownName): answer.error_map('none')


def test_pictures_of_names_that_are_no_file_names(assessor, new, maps, tmp_path):
    named = dict(zip(('a b', 'a/b', '../up'), maps.values()))
    paths = assessor.assess(new.image, named, CLASSES).save_pictures(tmp_path/'p')
    assert len({*paths}) == 4 and all(path.parent == tmp_path/'p' and path.exists() for path in paths)


def test_the_fused_map_is_better_than_the_mean_map(answer, new, maps):
    fused = (answer.fused == new.mask).mean()
    assert fused > np.mean([(m == new.mask).mean() for m in maps.values()])
    assert 0 <= answer.fused_predicted <= 1


# ---------------------------------------------------------------- symmetries

def test_the_order_of_maps_does_not_matter(assessor, new, maps, answer):
    turned = assessor.assess(new.image, dict(reversed(maps.items())), CLASSES)
    pd.testing.assert_series_equal(predicted(turned), predicted(answer), atol=1e-6)


def test_the_numbers_and_the_order_of_classes_do_not_matter(assessor, new, maps, answer):
    order = np.random.default_rng(1).permutation(len(CLASSES))
    stored = np.array([11, 30, 2, 7, 200, 90])
    table = {int(stored[i]): CLASSES[i] for i in order}
    renumbered = {name: stored[m] for name, m in maps.items()}
    pd.testing.assert_series_equal(
        predicted(assessor.assess(new.image, renumbered, table)), predicted(answer), atol=1e-6)


def test_ids_files_arrays_and_one_hot_probabilities(assessor, new, maps, tmp_path, answer):
    paths = {}
    for name, m in maps.items():
        paths[name] = tmp_path/f'{name}.npy'
        np.save(paths[name], m)
    pd.testing.assert_series_equal(predicted(assessor.assess(new.image, paths, CLASSES)), predicted(answer))
    soft = {name: np.eye(len(CLASSES), dtype=np.float32)[m].transpose(2, 0, 1) for name, m in maps.items()}
    mixed = {**maps, '10%': soft['10%']}
    for given in (soft, mixed):
        assert assessor.assess(new.image, given, CLASSES).table.name.tolist() == answer.table.name.tolist()


def test_the_same_question_has_the_same_answer(assessor, new, maps, answer):
    pd.testing.assert_frame_equal(assessor.assess(new.image, maps, CLASSES).table, answer.table)


def test_a_copy_of_a_map_is_as_good_as_the_map(assessor, new, maps):
    t = assessor.assess(new.image, {**maps, 'copy': maps['10%']}, CLASSES).table.set_index('name')
    assert t.predicted['copy'] == pytest.approx(t.predicted['10%'], abs=1e-6)
    assert t.as_good['copy'] and t.as_good['10%']


@pytest.mark.parametrize('n', [1, 2, 3, 4, 6, 12])
def test_any_number_of_maps(assessor, new, n):
    shares = np.linspace(0.05, 0.6, n)
    many = {f'm{i}': list(noisy(new.mask, i, (s,)).values())[0] for i, s in enumerate(shares)}
    answer = assessor.assess(new.image, many, CLASSES)
    assert answer.table.predicted.notna().all() and len(answer.table) == n
    if n > 1: assert answer.table.name[0] == 'm0'
    assert ('no other map' in answer.advice) == (n == 1)


def test_one_more_map_changes_little(assessor, new):
    shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    maps = {f'm{i}': list(noisy(new.mask, i, (s,)).values())[0] for i, s in enumerate(shares)}
    levels = []
    for n in range(2, 7):
        some = dict(list(maps.items())[:n])
        levels.append(predicted(assessor.assess(new.image, some, CLASSES))['m0'])
    assert np.abs(np.diff(levels)).max() < 0.15


# ---------------------------------------------------------------- where there is no answer

@pytest.mark.parametrize('image, text', [
    (np.zeros((3, SIDE, SIDE), np.float32), 'no data'),
    (np.ones((3, SIDE, SIDE), np.float32), 'no data'),
    (np.full((3, SIDE, SIDE), 0.4, np.float32), 'nearly constant'),
])
def test_blank_images_have_no_answer(assessor, maps, image, text):
    answer = assessor.assess(image, maps, CLASSES)
    assert answer.table.predicted.isna().all() and not answer.table.recommended.any()
    assert answer.domain.refused and text in answer.advice and 'No answer' in answer.advice
    assert json.dumps(answer.to_json())
    assert [m['predicted'] for m in answer.to_json()['maps']] == [None] * 3
    with pytest.raises(Problem, match='no picture'): answer.error_map('10%')


def test_nodata_does_not_count_and_widens(assessor, new, maps, answer):
    image = np.clip(new.image, 0.02, 0.98)
    image[:, :, :SIDE * 2 // 5] = 0
    damaged = {name: np.where(np.arange(SIDE) < SIDE * 2 // 5, 0, m).astype(np.uint8) for name, m in maps.items()}
    part = assessor.assess(image, damaged, CLASSES)
    assert any('no data' in reason for reason in part.domain.reasons) and not part.domain.ok
    assert np.isnan(part.error_map('10%')[:, 0]).all()
    width = (part.table.upper - part.table.lower).max()
    assert width > (answer.table.upper - answer.table.lower).max()
    filled = {name: np.where(np.arange(SIDE) < SIDE * 2 // 5, 3, m).astype(np.uint8) for name, m in maps.items()}
    pd.testing.assert_series_equal(predicted(assessor.assess(image, filled, CLASSES)), predicted(part), atol=1e-6)


def test_maps_without_a_value_where_the_image_has_data(assessor, new, maps):
    image = np.clip(new.image, 0.02, 0.98)
    image[:, :, :40] = 0
    m = maps['10%'].copy()
    m[:, 40:] = 255
    answer = assessor.assess(image, {**maps, 'border': m}, CLASSES)
    assert answer.domain.refused and answer.table.predicted.isna().all()


def test_unusual_images_are_said_and_widen(assessor, new, maps, answer):
    dark = assessor.assess(new.image * 0.1, maps, CLASSES)
    assert any('darker' in reason for reason in dark.domain.reasons)
    assert (dark.table.upper - dark.table.lower).max() > (answer.table.upper - answer.table.lower).max()


def test_one_map_is_said_to_be_one(assessor, new, maps):
    answer = assessor.assess(new.image, maps['30%'], CLASSES)
    assert answer.table.name.tolist() == ['map 1']
    assert any('one map without probabilities' in reason for reason in answer.domain.reasons)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize('change, error, text', [
    (dict(maps={}), Incompatible, 'none'),
    (dict(usual='no such map'), UnknownName, 'no map named'),
    (dict(classes=['a', 'b']), BadImage, 'class ids'),
    (dict(image=np.zeros((3, 8, 8), np.float32)), BadImage, '8x8'),
    (dict(maps=[np.zeros((3, 3), int)]), BadImage, '3x3'),
    (dict(maps=[Map('a', np.zeros((SIDE, SIDE), np.uint8))] * 2), Incompatible, 'two maps'),
])
def test_bad_questions(assessor, new, maps, change, error, text):
    question = dict(image=new.image, maps=maps, classes=CLASSES) | change
    with pytest.raises(error, match=text): assessor.assess(**question)


# ---------------------------------------------------------------- advice

def test_change_only_for_a_certain_gain(assessor, new):
    maps = noisy(new.mask, 1, (0.05, 0.6))
    change = assessor.assess(new.image, maps, CLASSES, usual='60%')
    assert change.advice.startswith('Change from 60% to 5%')
    maps = noisy(new.mask, 1, (0.30, 0.31))
    best = assessor.assess(new.image, maps, CLASSES).table.name[0]
    [other] = set(maps) - {best}
    cautious = replace_bounds(assessor, shortfall=1.0)
    stay = cautious.assess(new.image, maps, CLASSES, usual=other)
    assert stay.advice.startswith(f'Stay with {other}')
    assert stay.table.name[stay.table.recommended].tolist() == [other]


def replace_bounds(assessor, shortfall):
    from copy import copy
    changed = copy(assessor)
    changed.bounds = copy(assessor.bounds)
    changed.bounds.shortfall = dict.fromkeys(assessor.bounds.error, shortfall)
    return changed


def test_a_gain_is_never_above_the_disagreement():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (1, 9, 9))
    pred = rng.integers(0, 3, (4, 9, 9))
    oa = (pred == truth).mean((1, 2))
    assert (np.abs(oa[:, None] - oa) <= disagreements(pred) + 1e-9).all()
    assert np.allclose(gain_shortfalls(oa, oa, pred), 0)


def test_kinds_of_input():
    assert [input_kind(n, True) for n in (1, 2, MANY_MAPS - 1, MANY_MAPS)] == ['one', 'few', 'few', 'many']
    assert [input_kind(n, False) for n in (1, 2, MANY_MAPS)] == [
        'one, ids only', 'few, ids only', 'many, ids only']
    assert input_kind(2, True, 0.5) == 'few, known methods' and input_kind(2, True, 0.4, True) == 'few'
    assert input_kind(9, True, 1.0, True) == 'many, known source'


def test_a_known_source_is_used_where_it_is_named(assessor, new, maps, answer):
    soft = {n: 0.9 * np.eye(len(CLASSES))[m].transpose(2, 0, 1) + 0.1 / len(CLASSES) for n, m in maps.items()}
    known = assessor.assess(new.image, soft, CLASSES, source='a')
    assert not np.allclose(predicted(known), predicted(assessor.assess(new.image, soft, CLASSES)))
    ids = assessor.assess(new.image, maps, CLASSES, source='a')        # without probabilities it has no say
    assert np.allclose(predicted(ids), predicted(answer))
    with pytest.raises(UnknownName, match='no source named'): assessor.assess(new.image, maps, CLASSES, source='c')
    with pytest.raises(Incompatible, match='as maps of a'):
        assessor.assess(new.image, maps, [*CLASSES, 'more'], source='a')


# ---------------------------------------------------------------- labelled points

def labelled(mask, n, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, SIDE, (2, n))
    return pd.DataFrame(dict(x=x, y=y)).assign(**{'class': [CLASSES[i] for i in mask[y, x]]})


def test_labels_of_the_image_correct_the_level(assessor, new, maps):
    biased = replace_shift(assessor, 1.5)
    before = biased.assess(new.image, maps, CLASSES)
    after = biased.assess(new.image, maps, CLASSES, labels=labelled(new.mask, 60))
    true = pd.Series({name: (m == new.mask).mean() for name, m in maps.items()})
    def error(a): return abs((predicted(a) - true).mean())
    assert error(after) < 0.5 * error(before)
    assert (after.table.upper - after.table.lower).mean() < (before.table.upper - before.table.lower).mean()


def replace_shift(assessor, mean):
    from copy import copy
    from rssqa.quality.bounds import LevelShift
    changed = copy(assessor)
    changed.shift = LevelShift(mean)
    return changed


def test_labels_of_a_source_correct_its_level(assessor):
    biased = replace_shift(assessor, 1.5)
    answers, labels = [], []
    for seed in range(70, 74):
        s = scene('town', seed=seed, size=SIDE)
        answers.append(biased.assess(s.image, noisy(s.mask, seed), CLASSES))
        labels.append(labelled(s.mask, 10, seed))
    calibrated = biased.with_labels(answers, labels)
    assert calibrated.shift.mean < 0.9 < biased.shift.mean and calibrated.shift.spread < 1
    assert biased.shift.mean == 1.5


def test_points_by_hand():
    m = Map('m', np.array([[0, 1], [255, 1]], np.uint8))
    table = class_table({4: 'water', 9: 'land'})
    labels = pd.DataFrame({'x': [0, 1, 0, 1], 'y': [0, 0, 1, 1], 'class': ['water', '4', 'land', 9]})
    assert np.array_equal(points_right([m], labels, table)[:, 0], [1, 0, np.nan, 1], equal_nan=True)


@pytest.mark.parametrize('labels, error, text', [
    (pd.DataFrame(dict(x=[1], y=[1])), SchemaError, 'expected x, y and class'),
    (pd.DataFrame({'x': [], 'y': [], 'class': []}), SchemaError, '0 rows'),
    (pd.DataFrame({'x': [SIDE], 'y': [0], 'class': ['road']}), SchemaError, 'outside'),
    (pd.DataFrame({'x': [0], 'y': [0], 'class': ['raod']}), UnknownName, 'road'),
])
def test_bad_labels(assessor, new, maps, labels, error, text):
    with pytest.raises(error, match=text): assessor.assess(new.image, maps, CLASSES, labels=labels)


# ---------------------------------------------------------------- saving

def test_saved_and_read_again(assessor, new, maps, answer, tmp_path):
    again = Assessor.load(assessor.save(tmp_path))
    pd.testing.assert_frame_equal(again.assess(new.image, maps, CLASSES).table, answer.table)
    pd.testing.assert_frame_equal(again.calibration, assessor.calibration)


@pytest.mark.parametrize('name', ['assessor.safetensors', 'calibration.parquet'])
def test_a_flipped_bit_is_seen(assessor, tmp_path, name):
    assessor.save(tmp_path)
    content = bytearray((tmp_path/name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path/name).write_bytes(content)
    with pytest.raises(Incompatible, match=f'(?i){name}'): Assessor.load(tmp_path)


def test_what_is_no_assessor(tmp_path, assessor):
    with pytest.raises(DataNotFound, match='no assessor in'): Assessor.load(tmp_path)
    (tmp_path/'assessor.json').write_text('{}')
    with pytest.raises(SchemaError, match='describes no assessor'): Assessor.load(tmp_path)
    assessor.save(tmp_path/'a')
    (tmp_path/'a'/'assessor.safetensors').unlink()
    with pytest.raises(DataNotFound): Assessor.load(tmp_path/'a')


def test_another_encoder_is_refused(assessor, new, maps):
    from copy import copy
    changed = copy(assessor)
    changed.encoder_fingerprint = 'other'
    if hasattr(changed, '_semantics'): del changed._semantics
    with pytest.raises(Incompatible, match='not the one of this assessor'): changed.assess(new.image, maps, CLASSES)


# ---------------------------------------------------------------- learning

def test_calibration_leaves_the_dataset_out(assessor):
    t = assessor.calibration
    assert set(t.dataset) == {'a', 'b'}
    suffixes = ('', KNOWN_METHODS, KNOWN_SOURCE)
    assert set(t.kind) == {kind + suffix for kind in CALIBRATION_INPUTS for suffix in suffixes}
    assert t.oa.between(0, 1).all() and t.predicted.between(0, 1).all()
    covered = assessor.bounds.interval(t.predicted.to_numpy(), 'many')
    assert len(covered[0]) == len(t)


def test_no_image_no_assessor():
    with pytest.raises(Problem, match='no training image'): Assessor(encoder='').fit([])


def test_neighbours_are_of_the_other_half_of_the_blocks():
    from rssqa.quality.posterior import _halves
    points = np.random.default_rng(0).normal(size=(30 * 20, 4))
    half = _halves((30, 20), 0)
    neighbours = find_neighbours(points, (30, 20))
    assert (half[neighbours] != half[:, None]).all()
    assert 0.3 < half.mean() < 0.7


@pytest.mark.parametrize('shape', [(1, 1), (2, 3), (4, 4), (8, 9), (40, 40)])
def test_small_grids_have_neighbours(shape):
    image = np.random.default_rng(0).random((3, 4 * shape[0], 4 * shape[1])).astype(np.float32)
    for neighbours in image_neighbours(image, shape):
        assert neighbours.shape == (shape[0] * shape[1], 12) and neighbours.max() < shape[0] * shape[1]


def test_missing_values_do_not_count_in_features(new):
    m = new.mask.copy()
    m[:, :32] = 255
    maps = point_maps([Map('half', m), Map('whole', new.mask)], new.image, len(CLASSES))
    features = point_features(maps)
    assert torch.isfinite(features.own).all() and torch.isfinite(features.statistics).all()
    assert features.statistics[0, 0] == 1 and features.own[0, :, :, 0, 0].sum() == 0


def test_the_loss_ignores_points_without_a_value_and_learns(assessor):
    samples = assessor.draw([assessor.prepare(training_image(i, 'a')) for i in range(4)])
    few = train_posterior(samples, assessor.methods, epochs=1, seed=0)
    many = train_posterior(samples, assessor.methods, epochs=25, seed=0)
    same_size = [s for s in samples if s.pred.shape[1] == 5]
    torch.manual_seed(0)
    before = posterior_loss(few, same_size).item()
    torch.manual_seed(0)
    assert posterior_loss(many, same_size).item() < before


def test_methods_have_vectors_and_strangers_have_none(assessor, new):
    maps = point_maps([Map(n, new.mask) for n in ('10%', 'stranger')], new.image, len(CLASSES))
    assert assessor.nets[0].method_numbers(maps.names).tolist()[1] == 0
    known = map_posterior(assessor.nets[0], maps)
    strange = map_posterior(assessor.nets[0], replace(maps, names=['x', 'y']))
    assert not torch.allclose(known, strange)


def test_an_image_that_would_fill_the_memory_is_refused(assessor, monkeypatch):
    import rssqa.quality.assessor as module
    monkeypatch.setattr(module, 'MAX_PIXELS', 64 * 64 - 1)
    ids = np.zeros((64, 64), np.uint8)
    with pytest.raises(BadImage, match='64x64 pixels.*(?i:cut it into tiles)'):
        assessor.assess(np.random.default_rng(0).random((3, 64, 64)).astype(np.float32), ids, CLASSES)


def test_refit_learns_from_other_images_and_leaves_scenes_out_of_the_intervals(assessor, answer, new, maps):
    images = [training_image(i, 'a') for i in range(4)]
    left_out = {('b', str(scene)) for scene in assessor.calibration.scene[assessor.calibration.dataset == 'b']}
    other = assessor.refit(images, left_out)
    assert other.calibration is assessor.calibration and other.bounds.state() != assessor.bounds.state()
    again = assessor.assess(new.image, maps, CLASSES).table
    pd.testing.assert_frame_equal(again.drop(columns='iou'), answer.table.drop(columns='iou'))
    assert not np.allclose(other.assess(new.image, maps, CLASSES).table.predicted, again.predicted, atol=1e-6)


def switch_gains(noise, scenes=20, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for scene_number in range(scenes):
        for image in range(3):
            oa = rng.uniform(0.5, 0.9, 3)
            predicted = oa + rng.normal(0, noise, 3)
            about = dict(kind='k', dataset='d', scene=scene_number, image_id=f'{scene_number}-{image}')
            rows += [about | dict(method=m, oa=o, predicted=p) for m, o, p in zip('xyz', oa, predicted)]
    return pd.DataFrame(rows)


def test_a_change_is_advised_where_it_paid_on_enough_scenes():
    rule = fit_switch_rules(switch_gains(0.02))['k']['d']
    assert rule['margin'] == 0 and 0.02 < rule['lower'] < rule['gain'] < 0.4
    assert fit_switch_rules(switch_gains(3.0)) == {} and fit_switch_rules(switch_gains(0.02, scenes=7)) == {}
    table = pd.DataFrame(dict(name=['a', 'b'], predicted=[0.8, 0.79], lower=0.5, upper=0.9, as_good=True))
    table['gain_lower'] = -0.1
    assert give_advice(table, 'b')[0] == 'b' and give_advice(table, 'b', rule)[0] == 'a'
    assert give_advice(table, 'b', rule | dict(margin=0.05))[0] == 'b'
    assert 'such changes gained' in give_advice(table, 'b', rule)[1]


def gains_of_scenes(**scenes): # dataset -> mean gains of its scenes
    values = {(dataset, i): gain for dataset, gains in scenes.items() for i, gain in enumerate(gains)}
    return pd.Series(values).rename_axis(['dataset', 'scene'])


def test_few_scenes_follow_the_other_sources_and_many_speak_for_themselves():
    rng = np.random.default_rng(0)
    good, bad = 0.1 + rng.normal(0, 0.01, 40), -0.1 + rng.normal(0, 0.01, 40)
    few = pool_means(gains_of_scenes(a=good, b=good + 0.01, c=[-0.02]))
    assert abs(few.gain['a'] - good.mean()) < 0.01 and few.gain['c'] > -0.02
    assert few.error['c'] > few.error['a']
    many = pool_means(gains_of_scenes(a=good, b=bad))
    assert np.allclose(many.gain, [good.mean(), bad.mean()], atol=0.002)
    alone = pool_means(gains_of_scenes(a=good))
    assert np.isclose(alone.gain['a'], good.mean()) and np.isclose(alone.error['a'], good.std(ddof=1) / np.sqrt(40))


@pytest.mark.parametrize('between', [0.0, 0.01, 0.05])
def test_bounds_of_pooled_means_hold_as_often_as_promised(between):
    rng = np.random.default_rng(1)
    holds = []
    for _ in range(300):
        true = 0.01 + rng.normal(0, between, 6)
        of_scenes = gains_of_scenes(**{f'd{i}': t + rng.normal(0, 0.03, 4 + 5 * i) for i, t in enumerate(true)})
        pooled = pool_means(of_scenes)
        holds.append((pooled.gain - ONE_SIDED * pooled.error).to_numpy() <= true)
    assert 0.85 <= np.mean(holds) <= 0.97


def test_a_source_with_few_scenes_changes_where_it_pays_elsewhere():
    elsewhere, here = switch_gains(0.02), switch_gains(0.02, scenes=2, seed=1).assign(dataset='e')
    assert set(fit_switch_rules(pd.concat([elsewhere, here]))['k']) == {'d', 'e'}
    noise = switch_gains(3.0, scenes=40, seed=1).assign(dataset='e')
    assert set(fit_switch_rules(pd.concat([elsewhere, noise]))['k']) == {'d'}


def test_rules_are_saved(assessor, tmp_path):
    changed = copy(assessor)
    changed.switch_rules = fit_switch_rules(switch_gains(0.02))
    assert Assessor.load(changed.save(tmp_path)).switch_rules == changed.switch_rules


# ---------------------------------------------------------------- dense semantics

@pytest.fixture(scope='module')
def dense_assessor():
    images = [training_image(i, 'a', (0.1, 0.3)) for i in range(3)]
    images += [training_image(i, 'b', (0.1, 0.3)) for i in range(20, 23)]
    return Assessor(encoder='tiny-clip', members=1, epochs=1, dense=True).fit(images)


def certain(mask): # probabilities of two maps
    return {name: np.eye(len(CLASSES))[m].transpose(2, 0, 1) for name, m in noisy(mask, 50, (0.1, 0.3)).items()}


def test_the_encoder_takes_part_for_known_sources_only(dense_assessor, new):
    blind = copy(dense_assessor)
    blind.dense = False
    maps = certain(new.mask)
    known, without = (a.assess(new.image, maps, CLASSES, source='a') for a in (dense_assessor, blind))
    assert (predicted(known) - predicted(without)).abs().max() > 1e-4
    first, second = (a.assess(new.image, maps, CLASSES) for a in (dense_assessor, blind))
    assert predicted(first).equals(predicted(second))
    assert [m.name for m in known.maps] == ['10%', '30%'] and len(known.table) == 2


def test_a_stored_assessor_keeps_the_encoder_in_the_consensus(dense_assessor, new, tmp_path):
    loaded = Assessor.load(dense_assessor.save(tmp_path/'assessor'))
    assert loaded.dense and set(loaded.consensus.probes.probes) == {'a', 'b'}
    maps = certain(new.mask)
    first, second = (a.assess(new.image, maps, CLASSES, source='b') for a in (dense_assessor, loaded))
    assert np.allclose(predicted(first), predicted(second), atol=1e-6)
