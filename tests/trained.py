"""What several test files share: two trained nano networks with their table, and tables of random numbers."""
import pickle
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from filelock import FileLock

from rssqa.core import cache_dir
from rssqa.data.datasets import folder_spec, scan
from rssqa.data.splits import folds
from rssqa.segment.methods.training import Recipe, cross_fit
from rssqa.quality.pack import write_pack
from rssqa.tables.sqed import build_sqed, features_table
from rssqa.tables.store import Store, put_vectors
from rssqa.data.synthetic import write_scenes

METHODS = ['pspnet', 'segformer']
RECIPE = Recipe('nano', steps=8, batch=4, crop=64, lr=5e-3)


def _make(home: Path):
    root = write_scenes(home/'town', 'town', scenes=6, size=64)
    spec = folder_spec(root)
    tiles = scan(root)
    tiles['fold'] = folds(tiles, 2)
    specs = {spec.name: spec}
    networks = cross_fit(tiles, specs, home/'models', METHODS, RECIPE, workers=1)
    sqed = build_sqed(tiles, networks, specs, Store(home/'store'), workers=1)
    write_pack(home, networks)
    (home/'done.pickle').write_bytes(pickle.dumps((tiles, networks, sqed)))


@lru_cache
def trained_setup() -> SimpleNamespace: # home, spec, specs, tiles, networks, sqed
    "Make or open the networks and their table: once a test run, whatever the number of workers."
    home = cache_dir('tests', 'trained')
    with FileLock(f'{home}.lock'):
        if not (home/'done.pickle').exists(): _make(home)
    tiles, networks, sqed = pickle.loads((home/'done.pickle').read_bytes())
    spec = folder_spec(home/'town')
    specs = {spec.name: spec}
    return SimpleNamespace(home=home, spec=spec, specs=specs, tiles=tiles, networks=networks, sqed=sqed)


AGREEMENT = ('agree_mean', 'agree_majority', 'agree_max', 'agree_min')
PROBABILITIES = ('conf', 'conf_t', 'entropy', 'margin', *AGREEMENT)


def numbers(datasets=2, scenes=6, images=3, methods=3, seed=0) -> pd.DataFrame:
    "Make an SQED table of random numbers: OA follows the uncertainty columns, the scene and the method."
    rng = np.random.default_rng(seed)
    rows = []
    for d, s, i in np.ndindex(datasets, scenes, images):
        difficulty = rng.uniform(0, 0.3)
        tile = dict(image_id=f'i{d}-{s}-{i}', dataset=f'd{d}', scene=f's{s}', split='train')
        tile['path'] = f'{d}/{s}/{i}.png'
        for m in range(methods):
            oa = np.clip(0.9 - 0.15 * d - difficulty - 0.05 * m + rng.normal(0, 0.03), 0.05, 0.99)
            network = dict(method=f'm{m}', method_fp=f'{m}' * 16, fold=0)
            labels = dict(oa=oa, miou=oa**2, mf1=oa, n_valid=100)
            rows.append(tile | network | labels | _label_free_numbers(oa, rng))
    table = pd.DataFrame(rows)
    return table.assign(**{name: table[name].clip(0, 1) for name in PROBABILITIES})


def _label_free_numbers(oa, rng):
    return dict(
        conf=oa + rng.normal(0, 0.03),
        conf_t=oa + rng.normal(0, 0.02),
        entropy=1 - oa + rng.normal(0, 0.03),
        margin=oa - 0.1,
        energy=3 * oa + rng.normal(0, 0.5),
        parts=1 + 3 * rng.random(),
        agree_mean=oa - 0.05,
        agree_majority=oa,
        agree_max=oa + 0.01,
        agree_min=oa - 0.1,
    )


def with_features(folder, table: pd.DataFrame, width=10, seed=0) -> str: # -> folder of the store
    "Put features and a table 'sem/toy@1' of image vectors into a store; both are shifted by OA."
    rng = np.random.default_rng(seed)
    store = Store(folder)
    for (method, fingerprint), part in table.groupby(['method', 'method_fp']):
        vectors = rng.normal(size=(len(part), width)) + part.oa.to_numpy()[:, None]
        put_vectors(store, features_table(method, fingerprint), part.image_id, vectors)
    oa = table.groupby('image_id').oa.mean()
    vectors = rng.normal(size=(len(oa), width + 2)) + 2 * oa.to_numpy()[:, None]
    put_vectors(store, 'sem/toy@1', oa.index, vectors)
    return str(folder)
