"""A jury that hears witnesses: exact symmetries, no leak, and verdicts that survive the store."""
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone

from rssqa import jury as rooms
from rssqa.core import MissingFeatures
from rssqa.jury import JURY, JuryModel, JuryNet, Verdicts, clues, inner_folds, posterior, train_jury, verdicts
from rssqa.metrics import srocc
from rssqa.sqed import Lattice, coarse, pack_points
from rssqa.store import Store

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


def given(seen): return [torch.as_tensor(np.stack([getattr(s, f) for s in seen])) for f in ('p', 'flip', 'pred')]


@pytest.fixture(scope='module')
def trained(): return train_jury(lattices(30), NAMES, epochs=8, width=8)


# ---------------------------------------------------------------- the network

def test_an_absent_method_leaves_no_trace():
    seen = lattices(2)
    p, flip, pred = given(seen)
    keep = torch.tensor([[1., 0, 1]] * 2)
    other = [v.clone() for v in (p, flip, pred)]
    for v in other: v[:, 1] = 0
    for one, two in zip(clues(p, flip, pred, keep), clues(*other, keep)):
        if one.ndim == 4: assert torch.allclose(one, two)
    a, b = clues(p, flip, pred, keep)[0], clues(*other, keep)[0]
    assert torch.allclose(a, b)


def test_classes_may_be_renamed(trained):
    s, order = lattices(1, seed=3)[0], [2, 0, 1]
    q = posterior([trained], Lattice(**{**vars(s), 'dataset': 'new'}), NAMES)
    back = np.argsort(order)
    t = Lattice(s.image_id, 'new', s.methods, s.p[:, order], s.flip[:, order], back[s.pred].astype(np.uint8), s.truth)
    assert torch.allclose(posterior([trained], t, NAMES), q[order], atol=1e-5)


@pytest.mark.parametrize('classes', [1, 2, 3, 7])
@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (10, 10)])
def test_any_class_table_and_any_size(trained, classes, shape):
    rng = np.random.default_rng(0)
    pred = rng.integers(classes, size=(3, *shape)).astype(np.uint8)
    p = rng.integers(256, size=(3, classes, *shape)).astype(np.uint8)
    s = Lattice('x', 'elsewhere', NAMES, p, p, pred, np.full(shape, 255, np.uint8))
    q = posterior([trained], s, NAMES)
    told = verdicts([trained], [s], NAMES)
    assert q.shape == (classes, *shape) and torch.allclose(q.sum(0), torch.ones(shape), atol=1e-5)
    assert list(told.method) == NAMES and told[list(JURY)].notna().all(axis=None) and told.jury_oa.between(0, 1 + 1e-6).all()


def test_untrained_jury_is_the_mean():
    p, flip, pred = given(lattices(4))
    x, mean = clues(p, flip, pred, torch.ones(4, 3))
    assert torch.equal(JuryNet(3, {})(x, mean, 'any').argmax(1), mean.argmax(1))


# ---------------------------------------------------------------- learning

def test_same_seed_same_jury():
    one, two, three = (train_jury(lattices(6), NAMES, epochs=1, width=8, seed=s) for s in (0, 0, 1))
    pairs = [[torch.equal(a, b) for a, b in zip(one.state_dict().values(), net.state_dict().values())] for net in (two, three)]
    assert all(pairs[0]) and not all(pairs[1])


def test_unlabelled_images_teach_nothing_and_break_nothing():
    seen = lattices(4)
    for s in seen: s.truth[:] = 255
    net = train_jury(seen, NAMES, epochs=1, width=8)
    assert all(torch.isfinite(v).all() for v in net.state_dict().values())
    x, mean = clues(*given(seen), torch.ones(4, 3))
    assert torch.equal(net(x, mean, 'town').argmax(1), mean.argmax(1))


def test_two_class_tables_and_missing_methods_in_one_training():
    some = [Lattice(s.image_id, s.dataset, ['a', 'c'], s.p[[0, 2]], s.flip[[0, 2]], s.pred[[0, 2]], s.truth) for s in lattices(5, seed=1)]
    net = train_jury([*lattices(5), *lattices(5, classes=2, dataset='field'), *some], NAMES, epochs=1, width=8)
    assert set(net.habit) == {'town', 'field'} and len(net.habit['field']) == 2
    told = verdicts([net], [*some, *lattices(2, classes=5, dataset='sea')], NAMES)
    assert len(told) == 2 * 5 + 3 * 2


def test_a_method_without_a_place_is_judged_by_the_others(trained):
    s = lattices(1, seed=5)[0]
    more = Lattice(s.image_id, s.dataset, [*NAMES, 'zzz'], np.concatenate([s.p, s.p[:1]]), np.concatenate([s.flip, s.flip[:1]]), np.concatenate([s.pred, s.pred[:1]]), s.truth)
    told = verdicts([trained], [more], NAMES).set_index('method')
    assert told.jury_oa['zzz'] == pytest.approx(told.jury_oa['a']) and verdicts([trained], [s], NAMES).jury_oa[0] == pytest.approx(told.jury_oa['a'])


def test_verdicts_follow_the_truth(trained):
    fresh = lattices(20, seed=9)
    told = verdicts([trained], fresh, NAMES)
    assert srocc([(y == s.truth).mean() for s in fresh for y in s.pred], told.jury_oa) > 0.8


# ---------------------------------------------------------------- folds and the store

@pytest.mark.parametrize('k', [2, 3, 5])
def test_inner_folds_keep_scenes_whole(k, tmp_path):
    table = stored(tmp_path, [*lattices(24), *lattices(24, dataset='field')])
    fold = inner_folds(table, k)
    assert table.assign(fold=fold).groupby(['dataset', 'scene']).fold.nunique().max() == 1 and set(fold) == set(range(k))
    one = table[table.scene == 's0']
    assert table.loc[one.index].assign(fold=inner_folds(one, k)).groupby('image_id').fold.nunique().max() == 1 and len(set(inner_folds(one, k))) == min(k, 4)


def test_verdicts_are_kept_and_named_after_their_training_rows(tmp_path, monkeypatch):
    table = stored(tmp_path, lattices(12))
    ask, (train, test) = Verdicts(str(tmp_path), epochs=1, width=8), (table[:18], table[18:])
    first = ask(train, test)
    monkeypatch.setattr(rooms, 'train_jury', lambda *a, **k: pytest.fail('trained again'))
    assert ask(train.sample(frac=1, random_state=0), test).equals(first)                       # the order of rows does not matter
    assert ask(train, test[::-1]).equals(first[::-1])
    names = {v.name(t) for v in (ask, Verdicts('elsewhere', 1, 8)) for t in (train,)}
    assert len(names) == 1 and len({ask.name(train), ask.name(train[:-1]), Verdicts('', 2, 8).name(train), Verdicts('', 1, 8, seed=1).name(train), Verdicts('', 1, 8, nets=2).name(train)}) == 5


def test_no_training_image_is_judged_by_a_jury_that_saw_its_scene(tmp_path, monkeypatch):
    table, asked = stored(tmp_path, lattices(12)), []
    call = Verdicts.__call__
    monkeypatch.setattr(Verdicts, '__call__', lambda self, train, rows: (asked.append((set(train.scene) if 'scene' in train else set(), set(rows.scene))), call(self, train, rows))[1])
    JuryModel(str(tmp_path), taps=False, inner=3, epochs=1, width=8, gated=0).fit(table)
    assert len(asked) == 3 and all(seen and not seen & judged for seen, judged in asked) and set.union(*(j for _, j in asked)) == set(table.scene)


def test_model_is_an_estimator_and_never_reads_the_labels_of_new_rows(tmp_path):
    table = stored(tmp_path, lattices(18))
    model = clone(JuryModel(str(tmp_path), taps=False, inner=2, epochs=2, width=8, gated=0)).fit(table[:36])
    guess = model.predict(table[36:].drop(columns=['oa', 'n_valid']))
    assert np.array_equal(guess, model.predict(table[36:].assign(oa=0.0))) and np.isfinite(guess).all() and guess.min() >= 0 and guess.max() <= 1
    assert np.array_equal(model.predict(table[36:][::-1]), guess[::-1])


def test_truth_of_test_images_does_not_matter(tmp_path):
    seen = lattices(18)
    a = stored(tmp_path/'a', seen)
    for s in seen[12:]: s.truth[:] = 255
    b = stored(tmp_path/'b', seen).assign(oa=a.oa)
    one, two = (JuryModel(str(tmp_path/x), taps=False, inner=2, epochs=1, width=8, gated=0).fit(t[:36]).predict(t[36:]) for x, t in (('a', a), ('b', b)))
    assert np.array_equal(one, two)


def test_without_a_store_it_says_so():
    with pytest.raises(MissingFeatures, match='lattices'): JuryModel().fit(pd.DataFrame(dict(image_id=['x'])))


def test_coarse_keeps_small_lattices_and_bounds_large_ones():
    for side, want in ((10, 10), (40, 40), (41, 20), (64, 32), (72, 36), (128, 32)):
        s = lattices(1, side=10)[0]
        big = Lattice('x', 'd', NAMES, *(np.zeros((3, *k, side, side), np.uint8) for k in ((2,), (2,), ())), np.zeros((side, side), np.uint8))
        assert coarse(big).truth.shape == (want, want) and coarse(big).p.shape == (3, 2, want, want) and coarse(s) is s
