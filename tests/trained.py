"""Small trained that several test files share: two trained nano networks and their table, and tables made of plain random numbers."""
import pickle
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from filelock import FileLock

from rssqa.core import cache_dir
from rssqa.data.datasets import folder_spec, folds, scan
from rssqa.segment.methods.training import Recipe, cross_fit
from rssqa.quality.model import QualityModel, save_model
from rssqa.quality.recommend import write_pack
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
    networks = cross_fit(tiles, {spec.name: spec}, home/'models', METHODS, RECIPE, workers=1)
    sqed = build_sqed(tiles, networks, {spec.name: spec}, Store(home/'store'), workers=1)
    save_model(QualityModel(epochs=6, members=1, store=str(home/'store')).fit(sqed), home/'model')
    write_pack(home, networks)
    (home/'done.pickle').write_bytes(pickle.dumps((tiles, networks, sqed)))


@lru_cache
def trained_setup() -> SimpleNamespace: # home, spec, specs, tiles, networks, sqed; made once a test run, whatever the number of workers
    home = cache_dir('tests', 'world')
    with FileLock(f'{home}.lock'):
        if not (home/'done.pickle').exists(): _make(home)
    tiles, networks, sqed = pickle.loads((home/'done.pickle').read_bytes())
    spec = folder_spec(home/'town')
    return SimpleNamespace(
        home=home, spec=spec, specs={spec.name: spec}, tiles=tiles, networks=networks, sqed=sqed
    )


def numbers(datasets=2, scenes=6, images=3, methods=3, seed=0) -> pd.DataFrame:
    "An SQED table of random numbers: OA follows the doubt columns, the scene and the method."
    rng = np.random.default_rng(seed)
    rows = []
    for d, s, i in np.ndindex(datasets, scenes, images):
        hard = rng.uniform(0, 0.3)
        for m in range(methods):
            oa = np.clip(0.9 - 0.15 * d - hard - 0.05 * m + rng.normal(0, 0.03), 0.05, 0.99)
            rows.append(
                dict(
                    image_id=f'i{d}-{s}-{i}',
                    dataset=f'd{d}',
                    scene=f's{s}',
                    split='train',
                    path=f'{d}/{s}/{i}.png',
                    method=f'm{m}',
                    method_fp=f'{m}' * 16,
                    fold=0,
                    oa=oa,
                    miou=oa**2,
                    mf1=oa,
                    n_valid=100,
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
            )
    table = pd.DataFrame(rows)
    shares = ['conf', 'conf_t', 'entropy', 'margin', 'agree_mean', 'agree_majority', 'agree_max', 'agree_min']
    return table.assign(**{c: table[c].clip(0, 1) for c in shares})


def with_features(folder, table: pd.DataFrame, width=10, seed=0) -> str:
    "Put pooled taps and a table 'sem/toy@1' of semantic vectors into a store; both know something about OA."
    rng = np.random.default_rng(seed)
    store = Store(folder)
    for (method, fp), part in table.groupby(['method', 'method_fp']):
        put_vectors(
            store,
            features_table(method, fp),
            part.image_id,
            rng.normal(size=(len(part), width)) + part.oa.to_numpy()[:, None],
        )
    oa = table.groupby('image_id').oa.mean()
    put_vectors(
        store, 'sem/toy@1', oa.index, rng.normal(size=(len(oa), width + 2)) + 2 * oa.to_numpy()[:, None]
    )
    return str(folder)
