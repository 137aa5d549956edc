"""Projections repeat and place new points; separation is not raised by dataset identity or by overlapping scenes."""
import os
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from rssqa.viz import projection
from rssqa.core import Incompatible, SchemaError, UnknownName
from rssqa.viz.projection import Projection, branch_maps, centred, neighbour_graph, preservation, project
from rssqa.viz.projection import quality_probe, sample_rows, separation, separation_text, stages
from rssqa.viz.figures import plot_embedding


# projection

@pytest.mark.parametrize('method', ['pca', 'tsne'])
def test_projection_repeats(method):
    x = np.random.default_rng(0).normal(size=(60, 8))
    one = project(x, method)
    two = project(x.copy(), method)
    assert np.array_equal(one, two) and one.attrs == two.attrs and one.attrs['n'] == 60
    if method == 'tsne': assert not np.array_equal(one, project(x, method, perplexity=5))


UMAP = """
import numpy as np
from rssqa.viz.projection import Projection, neighbour_graph, preservation, project, stages
part = np.arange(45) % 3
x = np.random.default_rng(0).normal(size=(45, 8)) + 12 * np.eye(8)[part]
one = project(x, n_epochs=30)
two = project(x.copy(), n_epochs=30)
assert np.array_equal(one, two) and one.attrs['method'] == 'umap' and one.attrs['n_epochs'] == 30
centre = one.groupby(part).mean().to_numpy()
assert (((one.to_numpy()[:, None] - centre)**2).sum(-1).argmin(1) == part).all()
few = project(x[:6])
assert few.attrs['n_neighbors'] == 5 and np.isfinite(few).all(axis=None)
assert not np.array_equal(few, project(x[:6], seed=1))
graph = neighbour_graph(x, 12)
assert np.array_equal(one, project(x, n_epochs=30, graph=graph))
assert not np.array_equal(one, project(x, n_epochs=30, graph=graph, min_dist=.5))
fitted = Projection(n_epochs=30, max_points=36, rest='place').fit(x)
assert np.array_equal(fitted.transform(x[fitted.rows_]), fitted.uv_)
assert len(fitted.frame) == 45 and fitted.frame.attrs['placed'] == 9
near = fitted.transform(x[fitted.rows_] + np.random.default_rng(1).normal(0, .05, (36, 8)))
assert np.median(np.linalg.norm(near - fitted.uv_, axis=1)) < .1 * np.ptp(fitted.uv_)
centre = fitted.frame.groupby(part).mean().to_numpy()
assert (((fitted.frame.to_numpy()[:, None] - centre)**2).sum(-1).argmin(1) == part).all()
assert np.array_equal(fitted.transform(x[[3]])[0], fitted.transform(x)[3])
first, second = stages(x, n_epochs=30)
assert first.attrs['method'] == 'pca' and np.array_equal(second, one) and first.index.equals(second.index)
print('fine')
"""


# compiling takes longer than everything else in this file
@pytest.mark.parametrize('jit', ['off', pytest.param('on', marks=pytest.mark.slow)])
def test_umap_repeats_and_keeps_clusters(jit):
    env = os.environ | {'NUMBA_DISABLE_JIT': str(int(jit == 'off'))}
    run = subprocess.run([sys.executable, '-c', UMAP], env=env, capture_output=True, text=True)
    assert run.stdout == 'fine\n', run.stderr[-2000:]


ONE_ROW = np.ones((1, 4))
TWO_ROWS = np.arange(8.).reshape(2, 4)
EQUAL_ROWS = np.ones((30, 4))
ONE_COLUMN = np.random.default_rng(0).normal(size=(4, 1))


@pytest.mark.parametrize('x', [ONE_ROW, TWO_ROWS, EQUAL_ROWS, ONE_COLUMN], ids=lambda x: str(x.shape))
def test_too_few_points_fall_back_to_pca(x):
    for method in ('umap', 'tsne', 'pca'):
        emb = project(x, method)
        assert emb.shape == (len(x), 2) and np.isfinite(emb).all(axis=None)
        assert emb.attrs['method'] == 'pca'
        assert ('note' in emb.attrs) == (method != 'pca')


def test_pca_is_the_textbook_one():
    x = np.random.default_rng(1).normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1]
    uv = project(x, 'pca').to_numpy()
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1][:2]
    assert np.allclose(uv.var(0, ddof=1), values, rtol=1e-4) and abs(np.corrcoef(uv.T)[0, 1]) < 1e-5


def test_projection_samples_and_joins():
    table = pd.DataFrame(dict(oa=np.linspace(0, 1, 50), u='old'), index=range(100, 150))
    emb = project(np.random.default_rng(0).normal(size=(50, 3)), 'pca', max_points=20, table=table)
    assert len(emb) == 20 and emb.attrs['of'] == 50 and emb.u.dtype.kind == 'f'
    assert np.allclose(emb.oa, np.linspace(0, 1, 50)[emb.index])
    assert '20 of 50' in plot_embedding(emb).ax_.texts[0].get_text()


def test_projection_refuses():
    x = np.random.default_rng(0).normal(size=(9, 3))
    with pytest.raises(UnknownName, match='umap'): project(x, 'umpa')
    with pytest.raises(Incompatible, match='9 feature rows and 8'):
        project(x, 'pca', table=pd.DataFrame({'oa': range(8)}))
    with pytest.raises(SchemaError, match='at least one row'): project(np.zeros((0, 3)))
    with pytest.raises(SchemaError, match='Found shape'): project(np.zeros(5))
    x[4, 1] = np.nan
    with pytest.raises(SchemaError, match='1 of 9 rows.*row 4'): project(x)


# separation

def simulated(n=240, seed=0): # -> generator, dataset, quality, oa, features that encode quality and dataset
    rng = np.random.default_rng(seed)
    dataset = np.arange(n) % 3
    quality = rng.normal(size=n)
    oa = np.array([.5, .7, .9])[dataset] + .03 * quality
    return rng, dataset, quality, oa, np.c_[quality * 3, 20 * np.eye(3)[dataset], rng.normal(0, .3, (n, 5))]


def shuffled_within(oa, dataset, rng): # OA shuffled among the rows of each dataset
    out = oa.copy()
    for d in range(3): out[dataset == d] = rng.permutation(oa[dataset == d])
    return out


def test_separation_finds_quality_and_nothing_else():
    rng, dataset, quality, oa, x = simulated()
    good = separation(x, oa, dataset)
    assert good['skill'] > 0.6
    assert good['tertile_accuracy'] > 0.8
    assert good['silhouette'] > 0.1
    assert good['n'] == 240 and good['datasets'] == 3
    shuffled = shuffled_within(oa, dataset, rng)
    identity = np.c_[20 * np.eye(3)[dataset], rng.normal(0, .3, (240, 5))]
    for features, y in ((x, shuffled), (identity, oa)):
        none = separation(features, y, dataset)
        assert none['skill'] < .06
        assert abs(none['tertile_accuracy'] - 1/3) < .12
        assert none['silhouette'] < .05
    # over all datasets together, their identity alone has skill
    identity = np.c_[20 * np.eye(3)[dataset], rng.normal(0, 0.3, (240, 5))]
    assert separation(identity, oa, np.zeros(240))['skill'] > 0.5


def test_rows_of_the_same_scene_give_no_skill():
    rng = np.random.default_rng(0)
    scene = np.arange(240) // 8
    # each scene has features and an OA of its own
    x = rng.normal(size=(30, 6))[scene] * 5 + rng.normal(0, .1, (240, 6))
    oa = .7 + .05 * rng.normal(size=30)[scene]
    assert separation(x, oa, ['d'] * 240, k=5)['skill'] > .9
    assert separation(x, oa, ['d'] * 240, scene, k=5)['skill'] < .1


def test_separation_agrees_with_sklearn_and_by_hand():
    from sklearn.manifold import trustworthiness
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    oa = rng.random(60)
    numbers = separation(x, oa, np.zeros(60), uv=x[:, :2], k=7)
    near = NearestNeighbors(n_neighbors=7).fit(x).kneighbors(return_distance=False)
    third = pd.qcut(oa, 3, labels=False)
    assert np.isclose(numbers['knn_mae'], np.abs(oa - oa[near].mean(1)).mean())
    assert np.isclose(numbers['mean_mae'], np.abs(oa - (oa.sum() - oa) / 59).mean())
    assert np.isclose(numbers['silhouette'], silhouette_score(x, third), atol=1e-6)
    assert np.isclose(numbers['trustworthiness'], trustworthiness(x, x[:, :2], n_neighbors=7))


def test_separation_with_all_neighbours_has_no_skill():
    _, dataset, _, oa, x = simulated(60)
    assert separation(x, oa, dataset, k=10_000)['skill'] == 0


@pytest.mark.parametrize('n, scene', [(1, None), (4, None), (30, ['one'] * 30)])
def test_unmeasurable_separation_is_reported(n, scene):
    x = np.random.default_rng(0).normal(size=(n, 3))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        numbers = separation(x, np.linspace(.5, .6, n), ['d'] * n, scene)
    assert numbers['n'] == 0 and np.isnan(numbers['skill']) and 'cannot be measured' in separation_text(numbers)


def test_constant_oa_has_no_skill():
    x = np.random.default_rng(0).normal(size=(30, 3))
    assert separation(x, np.full(30, 0.8), np.zeros(30))['skill'] == 0


def test_separation_refuses():
    x = np.zeros((8, 2))
    with pytest.raises(Incompatible, match="'oa': 7"): separation(x, np.zeros(7), ['d'] * 8)
    with pytest.raises(SchemaError, match='1 of 8 rows'): separation(x, [np.nan] + [.5] * 7, ['d'] * 8)


# the graph

@pytest.mark.parametrize('metric', ['euclidean', 'cosine', 'manhattan'])
def test_graph_agrees_with_sklearn(metric):
    from sklearn.neighbors import NearestNeighbors
    x = np.random.default_rng(0).normal(size=(1203, 6)).astype(np.float32) + 50 * (metric == 'euclidean')
    graph = neighbour_graph(x, 7, metric)
    finder = NearestNeighbors(n_neighbors=7, metric=metric, algorithm='brute')
    d, near = finder.fit(x.astype(np.float64)).kneighbors()
    assert np.allclose(graph.distance, d, atol=1e-4) and (graph.near == near).mean() > .999
    assert (np.diff(graph.distance) >= 0).all() and (graph.near != np.arange(1203)[:, None]).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 40), k=st.integers(1, 50), copies=st.booleans())
def test_graph_of_anything(seed, n, k, copies):
    x = np.random.default_rng(seed).integers(0, 2 if copies else 1000, (n, 3))
    graph = neighbour_graph(x, k)
    capped = min(k, n - 1)
    assert graph.near.shape == (n, capped)
    assert all(len(set(near)) == len(near) and i not in near for i, near in enumerate(graph.near))
    distance = np.linalg.norm(x[:, None] - x[None], axis=2) + np.diag([np.inf] * n)
    assert np.allclose(graph.distance, np.sort(distance, axis=1)[:, :capped], atol=1e-3)
    order = np.random.default_rng(seed).permutation(n)
    assert np.allclose(neighbour_graph(x[order], k).distance, graph.distance[order], atol=1e-4)


def test_graph_of_other_rows_is_refused():
    x = np.random.default_rng(0).normal(size=(40, 3))
    graph = neighbour_graph(x, 6)
    with pytest.raises(Incompatible, match='other rows'): project(x + 1, graph=graph)
    with pytest.raises(Incompatible, match='another metric'): project(x, graph=graph, metric='cosine')
    with pytest.raises(Incompatible, match='needed are 11'): project(x, graph=graph, n_neighbors=12)
    with pytest.raises(SchemaError, match='found one row|Found one row'): neighbour_graph(x[:1])
    assert 'Graph of 40 rows' in repr(graph)


# fitting once, placing later

def test_pca_places_by_its_directions():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6)) * [6, 4, 1, 1, 1, 1]
    new = rng.normal(size=(30, 6))
    fitted = Projection('pca').fit(x)
    assert np.allclose(fitted.transform(x), fitted.uv_, atol=1e-5)
    assert np.allclose(fitted.transform(new[::-1]), fitted.transform(new)[::-1])
    order = rng.permutation(80)
    assert np.allclose(project(x[order], 'pca'), project(x, 'pca').to_numpy()[order], atol=1e-4)
    wide = rng.normal(size=(12, 40))                                        # more columns than rows
    assert np.allclose(Projection('pca').fit(wide).transform(wide), project(wide, 'pca'), atol=1e-4)
    u, s, _ = np.linalg.svd(wide - wide.mean(0))
    assert np.allclose(np.abs(project(wide, 'pca')), np.abs(u[:, :2] * s[:2]), atol=1e-3)


def test_maps_without_a_rule_refuse_new_points():
    x = np.random.default_rng(0).normal(size=(30, 4))
    fitted = Projection('tsne').fit(x)
    with pytest.raises(Incompatible, match='umap or pca'): fitted.transform(x)
    with pytest.raises(Incompatible, match='tsne'): Projection('tsne', max_points=20, rest='place').fit(x)
    with pytest.raises(Incompatible, match='found 3 columns|Found 3 columns'):
        Projection('pca').fit(x).transform(x[:, :3])
    with pytest.raises(UnknownName, match='place'): project(x, 'pca', rest='plaec')
    with pytest.raises(UnknownName, match='n_neighbors'): project(x, 'pca', n_neighbours=3)
    assert "method='tsne'" in repr(fitted)


def test_placing_is_a_robust_mean_of_neighbours():
    uv = np.r_[np.zeros((8, 2)), [[100, 100]]].astype(np.float32)
    place = projection._placed(np.arange(9)[None], np.linspace(1, 1.2, 9)[None], uv)
    assert np.abs(place).max() < 0.1  # a single far neighbour hardly moves the point
    assert np.array_equal(projection._placed(np.array([[8, 0]]), np.array([[0., 1.]]), uv), uv[8:])


def test_membership_sums_to_log2():
    d = np.sort(np.random.default_rng(0).random((50, 15)), axis=1)
    w = projection._membership(d)
    assert np.allclose(w.sum(1), np.log2(15), atol=1e-3) and (w[:, 0] == 1).all() and (np.diff(w) <= 0).all()
    assert np.isfinite(projection._membership(np.zeros((3, 4)))).all()


def test_points_beyond_the_limit():
    n = 20_001
    x = np.random.default_rng(0).normal(size=(n, 3))
    table = pd.DataFrame(dict(i=np.arange(n)))
    sampled = project(x, 'pca', table=table)
    placed = project(x, 'pca', table=table, rest='place')
    assert len(sampled) == 20_000 and sampled.attrs['of'] == n and 'placed' not in sampled.attrs
    assert len(placed) == n and placed.attrs['placed'] == 1
    assert (placed.i == np.arange(n)).all()
    assert np.allclose(placed.loc[sampled.index], sampled, atol=1e-4)
    assert set(sample_rows(n, 100)) < set(sample_rows(n, 200)) and len(sample_rows(5)) == 5
    assert '20,000 of 20,001' in plot_embedding(sampled, 'i').ax_.texts[0].get_text()


def test_stages_end_with_what_was_asked():
    x = np.random.default_rng(0).normal(size=(40, 3))
    table = pd.DataFrame(dict(oa=np.linspace(0, 1, 40)))
    first, second = stages(x, 'tsne', table=table, max_points=30)
    assert (first.attrs['method'], second.attrs['method']) == ('pca', 'tsne')
    assert first.index.equals(second.index) and len(first) == 30
    assert np.array_equal(second, project(x, 'tsne', table=table, max_points=30))
    assert len(list(stages(x, 'pca'))) == 1
    with pytest.raises(UnknownName): next(stages(x, 'umpa'))


PACMAP = """
import numpy as np
from rssqa.viz.projection import project
part = np.arange(45) % 3
x = np.random.default_rng(0).normal(size=(45, 8)) + 12 * np.eye(8)[part]
one = project(x, 'pacmap')
two = project(x.copy(), 'pacmap')
assert np.array_equal(one, two) and one.attrs['method'] == 'pacmap'
assert np.isfinite(project(x[:6], 'pacmap')).all(axis=None)
centre = one.groupby(part).mean().to_numpy()
assert (((one.to_numpy()[:, None] - centre)**2).sum(-1).argmin(1) == part).all()
print('fine')
"""


@pytest.mark.slow
def test_pacmap_repeats_and_keeps_clusters():
    pytest.importorskip('pacmap')
    run = subprocess.run([sys.executable, '-c', PACMAP], capture_output=True, text=True)
    assert run.stdout == 'fine\n', run.stderr[-2000:]


def test_pacmap_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pacmap', None)
    with pytest.raises(Incompatible, match=r'rssqa\[pacmap\]'):
        project(np.random.default_rng(0).normal(size=(20, 3)), 'pacmap')
    with pytest.raises(UnknownName, match='euclidean'):
        project(np.random.default_rng(0).normal(size=(20, 3)), 'pacmap', metric='chebyshev')


# neighbours kept by a projection

def test_preservation_by_hand():
    x = np.array([[0.], [1], [3], [7]])
    assert preservation(x, np.c_[x, x], k=1) == 1 and preservation(x, np.c_[x, x], 99) == 1
    # row 3 moves beside row 0: rows 1 and 2 keep their neighbour
    assert preservation(x, np.array([[0, 0], [1, 0], [3, 0], [-0.5, 0]]), k=1) == 0.5
    far = np.random.default_rng(0).normal(size=(400, 2))
    assert abs(preservation(np.random.default_rng(1).normal(size=(400, 5)), far, 20) - 20 / 399) < .03
    graph = neighbour_graph(far, 20)
    assert preservation(graph, far, 20) == 1


# the probe

def test_probe_finds_quality_and_nothing_else():
    rng, dataset, quality, oa, x = simulated()
    scene = np.arange(240) // 6
    assert quality_probe(x, oa, dataset, scene)['accuracy'] > .75
    shuffled = shuffled_within(oa, dataset, rng)
    identity = np.c_[20 * np.eye(3)[dataset], rng.normal(0, .3, (240, 5))]
    for features, y in ((x, shuffled), (identity, oa)):
        probe = quality_probe(features, y, dataset, scene)
        assert abs(probe['accuracy'] - 1/3) < .12
        assert probe['n'] == 240 and abs(probe['chance'] - 1/3) < .01
    # over all datasets together, their identity alone is enough
    assert quality_probe(identity, oa, np.zeros(240), scene)['accuracy'] > 0.6


def test_probe_is_tested_on_other_scenes():
    rng = np.random.default_rng(0)
    scene = np.arange(240) // 8
    x = rng.normal(size=(30, 12))[scene] * 5 + rng.normal(0, .1, (240, 12))
    oa = .7 + .05 * rng.normal(size=30)[scene]
    same_scenes = quality_probe(x, oa, ['d'] * 240)['accuracy']
    other_scenes = quality_probe(x, oa, ['d'] * 240, scene)['accuracy']
    assert same_scenes > other_scenes + 0.2


@pytest.mark.parametrize('n, scene', [(1, None), (4, None), (30, ['one'] * 30)])
def test_probe_needs_two_scenes_and_six_rows(n, scene):
    x = np.random.default_rng(0).normal(size=(n, 3))
    probe = quality_probe(x, np.linspace(0.5, 0.6, n), ['d'] * n, scene)
    assert probe['n'] == 0 and np.isnan(probe['accuracy'])


def test_probe_of_degenerate_features():
    x = np.random.default_rng(0).normal(size=(12, 3))
    # constant features
    assert 0 <= quality_probe(np.ones((12, 3)), np.linspace(0, 1, 12), ['d'] * 12)['accuracy'] <= 1
    # a training fold with few thirds
    assert 0 <= quality_probe(x, np.linspace(0, 1, 12), ['d'] * 12, [0] * 4 + [1] * 8)['accuracy'] <= 1
    wide = np.random.default_rng(0).normal(size=(30, 90))
    assert quality_probe(np.c_[wide, 30 * np.arange(30)], np.linspace(0, 1, 30), ['d'] * 30)['accuracy'] > .6


# several feature spaces

def test_branch_maps_share_rows():
    rng, dataset, quality, oa, x = simulated()
    table = pd.DataFrame(dict(oa=oa, dataset=dataset, scene=np.arange(240) // 6), index=np.arange(240) + 7)
    maps = branch_maps({'all': x, 'noise': rng.normal(size=(240, 4))}, table, 'pca', max_points=200)
    (a, one), (b, two) = maps.values()
    assert a.index.equals(b.index) and len(a) == 200 and a.attrs['of'] == 240
    assert np.allclose(a.oa, oa[a.index])
    assert one['skill'] > .5 and two['skill'] < .08 and one['n'] == 200 and 0 < one['preservation'] <= 1
    assert np.abs(a.groupby('dataset')[['u', 'v']].mean().to_numpy()).max() < 1e-3
    uncentred = branch_maps({'all': x}, table, 'pca', control=False)['all'][0]
    assert np.abs(uncentred.groupby('dataset')[['u', 'v']].mean().to_numpy()).max() > 5
    with pytest.raises(SchemaError, match='no column dataset'):
        branch_maps({'x': x}, table.drop(columns='dataset'))
    with pytest.raises(SchemaError, match='no features|Found no features'): branch_maps({}, table)


def test_centred_groups_have_mean_zero():
    x = np.random.default_rng(0).normal(size=(50, 3)) + 9
    g = np.arange(50) % 4
    out = centred(x, g)
    assert all(np.abs(out[g == i].mean(0)).max() < 1e-5 for i in range(4))
    assert np.allclose(np.diff(out[g == 1], axis=0), np.diff(x[g == 1], axis=0), atol=1e-5)
    with pytest.raises(SchemaError, match='have no group'): centred(x, [None, *g[1:]])
    with pytest.raises(Incompatible, match='49 groups'): centred(x, g[1:])


def test_text_gives_the_measures():
    rng, dataset, quality, oa, x = simulated(60)
    numbers = separation(x, oa, dataset, uv=x[:, :2])
    text = separation_text(numbers)
    assert f'probe {numbers["probe_accuracy"]:.0%}' in text
    assert f'trustworthy to {numbers["trustworthiness"]:.2f}' in text
    del numbers['probe_accuracy']  # as in an older table
    assert 'probe' not in separation_text(numbers)
