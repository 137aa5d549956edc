"""A jury that hears witnesses: exact symmetries, no leak, and verdicts that survive the store."""
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone

from rssqa.core import DataNotFound, MissingFeatures
from rssqa.quality.consensus import JURY, Jury, JuryModel, JuryNet, Panel, clues, convene, levelled, load_jury, posterior, sample, save_jury, train_jury, verdicts
from rssqa.segment.metrics import srocc
from rssqa.tables.sqed import Lattice, coarse, pack_points
from rssqa.tables.store import Store

NAMES = ['a', 'b', 'c']


def lattices(n, side=10, classes=3, seed=0, dataset='town'):
    "Truth in blocks, witnesses of known reliability."
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        truth = rng.integers(classes, size=(side // 5, side // 5)).repeat(5, 0).repeat(5, 1).astype(np.uint8)
        pred = np.stack([np.where(rng.random((side, side)) < e, rng.integers(classes, size=(side, side)), truth) for e in rng.uniform(0.05, 0.6, 3)]).astype(np.uint8)
        p = np.stack([np.where(pred == c, 200, 55 // (classes - 1)) for c in range(classes)], 1).astype(np.uint8)
        out.append(Lattice(f'{dataset}{seed}-{i}', dataset, list(NAMES), p, p, pred, truth))
    return out


def stored(folder, seen, scenes=6):
    "Put lattices into a store; return their table."
    store = Store(folder)
    store.put('lattice', pd.DataFrame([pack_points(np.stack([s.p[i], s.flip[i]])) | dict(pred=s.pred[i].tobytes(), key=f'{s.image_id}|{m}@{s.dataset}') for s in seen for i, m in enumerate(s.methods)]))
    store.put('truth', pd.DataFrame([pack_points(s.truth) | dict(key=s.image_id) for s in seen]))
    return pd.DataFrame([dict(image_id=s.image_id, dataset=s.dataset, scene=f's{n % scenes}', split='train', method=m, method_fp=f'{m}@{s.dataset}', fold=0, n_valid=100,
                              oa=float((s.pred[i] == s.truth).mean()), conf=0.7 + 0.01 * (n % 3), edge=float(n % 2)) for n, s in enumerate(seen) for i, m in enumerate(s.methods)])


def learn(seen, **kw): return train_jury(sample(seen, NAMES, 60), 3, **dict(epochs=4, width=8) | kw)


def alone(net): return Jury(NAMES, {'': [net]})


@pytest.fixture(scope='module')
def trained(): return alone(learn(lattices(40), epochs=20))


# ---------------------------------------------------------------- the network

def test_an_absent_method_is_the_mean_of_the_others():
    s = lattices(1)[0]
    less = Lattice(s.image_id, s.dataset, ['a', 'c'], s.p[[0, 2]], s.flip[[0, 2]], s.pred[[0, 2]], s.truth)
    x = clues(less, NAMES)
    assert x.shape == (15, 3, 10, 10) and torch.allclose(x[1], (x[0] + x[2]) / 2) and torch.allclose(x[4], (x[3] + x[5]) / 2)
    assert torch.allclose(x[0], clues(s, NAMES)[0]) and torch.allclose(x[6], torch.as_tensor(s.p[[0, 2]]).float().mean(0) / 255)


def test_no_known_witness():
    with pytest.raises(MissingFeatures, match='expected some of zebra'): clues(lattices(1)[0], ['zebra'])


def test_the_order_of_methods_does_not_matter():
    s = lattices(1)[0]
    turned = Lattice(s.image_id, s.dataset, ['c', 'a', 'b'], s.p[[2, 0, 1]], s.flip[[2, 0, 1]], s.pred[[2, 0, 1]], s.truth)
    assert torch.allclose(clues(s, NAMES), clues(turned, NAMES), atol=1e-6)


def test_classes_may_be_renamed(trained):
    s, order = lattices(1, seed=3)[0], [2, 0, 1]
    back = np.argsort(order)
    new = Lattice(s.image_id, 'new', s.methods, s.p, s.flip, s.pred, s.truth)
    renamed = Lattice(s.image_id, 'new', s.methods, s.p[:, order], s.flip[:, order], back[s.pred].astype(np.uint8), s.truth)
    assert torch.allclose(posterior(trained, renamed), posterior(trained, new)[order], atol=1e-5)


@pytest.mark.parametrize('classes', [1, 2, 3, 7])
@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (10, 10)])
def test_any_class_table_and_any_size(trained, classes, shape):
    rng = np.random.default_rng(0)
    pred = rng.integers(classes, size=(3, *shape)).astype(np.uint8)
    p = rng.integers(256, size=(3, classes, *shape)).astype(np.uint8)
    s = Lattice('x', 'elsewhere', NAMES, p, p, pred, np.full(shape, 255, np.uint8))
    q, told = posterior(trained, s), verdicts(trained, [s])
    assert q.shape == (classes, *shape) and torch.allclose(q.sum(0), torch.ones(shape), atol=1e-5)
    assert list(told.method) == NAMES and told[list(JURY)].notna().all(axis=None) and told.jury_oa.between(0, 1 + 1e-6).all()


def test_untrained_jury_is_the_mean():
    s = lattices(1)[0]
    x = clues(s, NAMES).flatten(2).permute(2, 1, 0)
    assert torch.equal(JuryNet(3, {})(x, 'any').argmax(1), x[..., 6].argmax(1))


# ---------------------------------------------------------------- learning

def test_same_seed_same_jury():
    one, two, three = (learn(lattices(6), seed=s) for s in (0, 0, 1))
    pairs = [[torch.equal(a, b) for a, b in zip(one.state_dict().values(), net.state_dict().values())] for net in (two, three)]
    assert all(pairs[0]) and not all(pairs[1])


def test_points_are_labelled_ones():
    seen = lattices(4)
    for s in seen: s.truth[:5] = 255
    x, y = sample(seen, NAMES, 1000)['town']
    assert len(y) == 4 * 50 and x.shape == (200, 3, 15) and y.max() < 3
    seen[0].truth[:] = 255
    assert len(sample(seen, NAMES, 7)['town'][1]) == 21


def test_two_class_tables_and_missing_methods_in_one_training():
    some = [Lattice(s.image_id, s.dataset, ['a', 'c'], s.p[[0, 2]], s.flip[[0, 2]], s.pred[[0, 2]], s.truth) for s in lattices(5, seed=1)]
    net = learn([*lattices(5), *lattices(5, classes=2, dataset='field'), *some])
    assert set(net.habit) == {'town', 'field'} and len(net.habit['field']) == 2
    assert len(verdicts(alone(net), [*some, *lattices(2, classes=5, dataset='sea')])) == 2 * 5 + 3 * 2


def test_a_method_without_a_place_is_judged_by_the_others(trained):
    s = lattices(1, seed=5)[0]
    more = Lattice(s.image_id, s.dataset, [*NAMES, 'zzz'], np.concatenate([s.p, s.p[:1]]), np.concatenate([s.flip, s.flip[:1]]), np.concatenate([s.pred, s.pred[:1]]), s.truth)
    told = verdicts(trained, [more]).set_index('method')
    assert told.jury_oa['zzz'] == pytest.approx(told.jury_oa['a']) and verdicts(trained, [s]).jury_oa[0] == pytest.approx(told.jury_oa['a'])


def test_verdicts_follow_the_truth(trained):
    fresh = lattices(20, seed=9)
    told = verdicts(trained, fresh)
    assert srocc([(y == s.truth).mean() for s in fresh for y in s.pred], told.jury_oa) > 0.8


def test_without_habits_no_class_table_is_known():
    net = learn([*lattices(5), *lattices(5, classes=2, dataset='field')], habits=False)
    x = clues(lattices(1)[0], NAMES).flatten(2).permute(2, 1, 0)
    assert not net.habit and torch.equal(net(x, 'town'), net(x, 'anything'))


def test_silence_replaces_a_witness_by_the_mean_of_all_and_only_while_learning():
    torch.manual_seed(0)
    net, x = JuryNet(3, {}, silence=0.5), clues(lattices(1)[0], NAMES).flatten(2).permute(2, 1, 0)
    quiet = net._silenced(x)
    own, told = x[..., :6].unflatten(-1, (2, 3)), quiet[..., :6].unflatten(-1, (2, 3))
    mean = own.mean(-1, keepdim=True).expand_as(own)
    silent = (told != own).any(1).any(1)                                                      # (n,3): at all classes, in both kinds of clue
    at = silent[:, None, None].expand_as(own)
    assert torch.equal(told[at], mean[at]) and torch.equal(quiet[..., 6:], x[..., 6:]) and 0.2 < silent.float().mean() < 0.6
    assert torch.equal(net.eval()(x, 'town'), JuryNet(3, {}).eval()(x, 'town'))


# ---------------------------------------------------------------- jurors

def test_jurors_of_a_dataset_and_of_none():
    both = sample([*lattices(6), *lattices(6, classes=2, dataset='field')], NAMES, 30)
    jury = convene(both, NAMES, epochs=1, width=8)
    assert {d: len(n) for d, n in jury.jurors.items()} == {'': 2, 'town': 4, 'field': 4} and jury.of('sea') == jury.of('')
    assert jury.of('town')[:2] == jury.of('field')[:2] and not set(jury.of('town')[2:]) & set(jury.of('field')[2:])
    assert set(convene({'town': both['town']}, NAMES, epochs=1, width=8).jurors) == {''}      # two would be the same
    s = lattices(1)[0]
    assert torch.allclose(posterior(jury, s), sum(posterior(alone(n), s) for n in jury.of('town')) / 4, atol=1e-6)


def test_a_jury_survives_its_folder(tmp_path):
    seen = [*lattices(4), *lattices(4, classes=2, dataset='field')]
    jury = convene(sample(seen, NAMES, 30), NAMES, epochs=1, width=8)
    again = load_jury(save_jury(jury, tmp_path/'jury'))
    assert all(torch.equal(posterior(jury, s), posterior(again, s)) for s in [*seen, *lattices(1, classes=4, dataset='sea')])
    assert again.of('town')[0] is again.of('field')[0]                                        # shared jurors stay shared
    with pytest.raises(DataNotFound, match='no jury.json'): load_jury(tmp_path)


@pytest.mark.parametrize('name', ['potsdam.v2', 'training', 'keys', 'forward', 'a b'])
def test_any_name_of_a_dataset_will_do(name, tmp_path):
    seen = [*lattices(3, dataset=name), *lattices(3, classes=2)]
    jury = convene(sample(seen, NAMES, 20), NAMES, epochs=1, width=8)
    again = load_jury(save_jury(jury, tmp_path/'jury'))
    assert len(jury.of(name)) == 4 and all(torch.equal(posterior(jury, s), posterior(again, s)) for s in seen)


# ---------------------------------------------------------------- the model and the panel

def test_without_truth_nothing_is_learned(tmp_path):
    seen = lattices(6)
    for s in seen: s.truth[:] = 255
    with pytest.raises(MissingFeatures, match='(?i)found none for 6 images'): JuryModel(str(tmp_path), epochs=1).fit(stored(tmp_path, seen).assign(oa=0.5))


def test_model_is_an_estimator_and_never_reads_the_labels_of_new_rows(tmp_path):
    table = stored(tmp_path, lattices(18))
    model = clone(JuryModel(str(tmp_path), epochs=2, width=8)).fit(table[:36])
    guess = model.predict(table[36:].drop(columns=['oa', 'n_valid']))
    assert np.array_equal(guess, model.predict(table[36:].assign(oa=0.0))) and np.isfinite(guess).all() and guess.min() >= 0 and guess.max() <= 1
    assert np.array_equal(model.predict(table[36:][::-1]), guess[::-1])


def test_truth_of_test_images_does_not_matter(tmp_path):
    seen = lattices(18)
    a = stored(tmp_path/'a', seen)
    for s in seen[12:]: s.truth[:] = 255
    b = stored(tmp_path/'b', seen).assign(oa=a.oa)
    one, two = (JuryModel(str(tmp_path/x), epochs=1, width=8).fit(t[:36]).predict(t[36:]) for x, t in (('a', a), ('b', b)))
    assert np.array_equal(one, two)


def test_fresh_lattices_need_no_store(tmp_path):
    seen = lattices(12)
    table = stored(tmp_path, seen)
    model = JuryModel(str(tmp_path), epochs=1, width=8).fit(table[:24])
    assert np.array_equal(model.predict(table[24:], seen[8:]), model.predict(table[24:]))


@pytest.mark.parametrize('others', [0, 1, 3])
def test_levels_are_shared_and_differences_stay(others):
    rng = np.random.default_rng(others)
    jury, rest, image = rng.uniform(0.4, 0.6, 24), list(rng.uniform(0.4, 0.6, (others, 24))), np.arange(24) % 5
    told = pd.DataFrame(dict(image=image, told=levelled(jury, rest, image), jury=jury) | {f'other {i}': v for i, v in enumerate(rest)})
    mean = told.groupby('image').transform('mean')
    odds = np.log(mean / (1 - mean))
    assert np.allclose(odds.told, odds.drop(columns='told').mean(axis=1)) and np.allclose(told.told - mean.told, told.jury - mean.jury)


def test_a_panel_is_its_jury_levelled_by_its_members(tmp_path):
    from rssqa.quality.baselines import ColumnBaseline, MeanBaseline
    table = stored(tmp_path, lattices(18))
    jury, members, new = JuryModel(str(tmp_path), epochs=1, width=8), (MeanBaseline(), ColumnBaseline('conf')), table[36:].drop(columns='oa')
    panel = clone(Panel(jury, members)).fit(table[:36])
    assert np.allclose(panel.predict(new), levelled(clone(jury).fit(table[:36]).predict(new), [m.fit(table[:36]).predict(new) for m in members], new.image_id))


def test_without_a_store_it_says_so():
    with pytest.raises(MissingFeatures, match='lattices'): JuryModel().fit(pd.DataFrame(dict(image_id=['x'])))


def test_coarse_keeps_small_lattices_and_bounds_large_ones():
    for side, want in ((10, 10), (40, 40), (41, 20), (64, 32), (72, 36), (128, 32)):
        s = lattices(1, side=10)[0]
        big = Lattice('x', 'd', NAMES, *(np.zeros((3, *k, side, side), np.uint8) for k in ((2,), (2,), ())), np.zeros((side, side), np.uint8))
        assert coarse(big).truth.shape == (want, want) and coarse(big).p.shape == (3, 2, want, want) and coarse(s) is s


def test_seats_may_stay_empty():
    both = sample([*lattices(4), *lattices(4, classes=2, dataset='field')], NAMES, 20)
    count = lambda **kw: {d: len(n) for d, n in convene(both, NAMES, epochs=1, width=4, **kw).jurors.items()}
    assert count(own=False) == {'': 2} and count(kinds=(True,)) == {'': 1, 'town': 2, 'field': 2}
    assert not convene(both, NAMES, epochs=1, width=4, kinds=(False,), own=False).of('town')[0].habit
