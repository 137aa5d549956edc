"""The bench of metadata: classes in common, scenes kept apart, paired differences, and what the rows say."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rssqa.bench import metadata as module
from rssqa.bench.metadata import (
    CLASSES, METADATA, MODELS, MOST, SOURCES, count_tiles, differences, divide_scenes, sentence_vectors, summarise,
    train_segmenter,
)
from rssqa.bench.soft_guided import SourceFeatures
from rssqa.clip.encoders import load_encoder
from rssqa.domains.pairs import COMMON

RESULTS = Path(__file__).resolve().parents[1]/'data/results'


def draw_source(classes, seed=0, scenes=6):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (2 * scenes, 8, 8), generator=rng, dtype=torch.uint8)
    masks = [np.repeat(np.repeat(x.numpy(), 2, 0), 2, 1) for x in labels]
    features = torch.randn(2 * scenes, 6, 4, 4, generator=rng)
    frozen = torch.randn(2 * scenes, 8, 4, 4, generator=rng)
    whole = torch.zeros(2 * scenes, 8)
    return SourceFeatures(features, frozen, whole, labels, masks, np.repeat(np.arange(scenes), 2).astype(str))


def test_tiles_are_read_in_common_classes(tmp_path, monkeypatch):
    from rssqa.data.datasets import ById, DatasetSpec, default_palette
    classes = ('building', 'land', 'road', 'vegetation', 'water')
    decode = ById((*((i, i) for i in range(5)), (255, 255)))
    spec = DatasetSpec('dubai_mbrsc', classes, default_palette(5), None, decode)
    given = {}
    def note(tiles, spec, encoder): given[spec.name] = spec
    monkeypatch.setattr(module, 'SOURCES', ('dubai_mbrsc',))
    monkeypatch.setattr(module, 'open_tiles', lambda *_: (pd.DataFrame(dict(dataset=['d'], scene=['s'])), dict(d=spec)))
    monkeypatch.setattr(module, 'read_source', note)
    module.read_sources(tmp_path, None, tmp_path)
    [common] = given.values()
    assert common.classes == COMMON[CLASSES]
    names = [common.classes[i] for i in common.decode(np.arange(5)[None])[0]]
    assert names == ['building', 'bare land', 'paved', 'vegetation', 'water']
    assert common.decode(np.array([[255]])).tolist() == [[255]]


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_scenes_are_kept_apart_and_a_new_source_is_left_out(seed):
    sources = {name: draw_source(5, i) for i, name in enumerate('abc')}
    known = divide_scenes(sources, seed)
    for name, source in sources.items():
        train, test = set(source.scene[known.train[name]]), set(source.scene[known.test[name]])
        assert train and test and not train & test
        assert sorted([*known.train[name], *known.test[name]]) == list(range(len(source.scene)))
    new = divide_scenes(sources, seed, 'b')
    assert set(new.train) == {'a', 'c'} and set(new.test) == {'b'} and len(new.test['b']) == 12


def test_training_draws_sources_equally(monkeypatch):
    sources = dict(a=draw_source(5, scenes=6), b=draw_source(5, scenes=2))
    given = {}
    def note(model, features, labels, sentences, weight, steps, seed):
        given.update(weight=weight, sentences=sentences)
        return model
    monkeypatch.setattr(module, 'train_with_metadata', note)
    words = dict(a=torch.zeros(3, 8), b=torch.ones(3, 8))
    train_segmenter(sources, dict(a=np.arange(12), b=np.arange(4)), words, steps=1)
    assert given['weight'][:12].sum() == pytest.approx(1) and given['weight'][12:].sum() == pytest.approx(1)
    assert (given['sentences'][:12] == 0).all() and (given['sentences'][12:] == 1).all()


def test_counts_of_a_tile_cover_its_labels():
    source = draw_source(5)
    source.masks[0][:4] = 255
    model = train_segmenter(dict(a=source), dict(a=np.arange(12)), None, steps=1)
    counts = count_tiles(model, source, np.array([0, 3]))
    assert counts.shape == (2, 5, 5) and counts.sum((1, 2)).tolist() == [16 * 12, 16 * 16]


def tile(given, model, oa, scene='s', number=0, seed=0):
    return dict(experiment='known sources', model=model, seed=seed, source='a', given=given, tile=number, scene=scene,
                oa=oa, counts=np.diag([oa, 0]) + [[0, 1 - oa], [0, 0]])


def test_differences_are_paired_and_scenes_are_drawn_whole():
    rows = []
    for number, (scene, gain) in enumerate([('s', 0.1), ('s', 0.1), ('t', 0.4)]):
        rows += [tile('true', MODELS[1], 0.5 + gain, scene, number), tile('shuffled', MODELS[1], 0.5, scene, number),
                 tile('none', MODELS[1], 0.5, scene, number), tile('none', MODELS[0], 0.2, scene, number)]
    found = differences(pd.DataFrame(rows), 400).set_index('pair')
    assert found.difference['true minus shuffled'] == pytest.approx(0.2)
    assert found.difference['true minus image alone'] == pytest.approx(0.5)
    assert found.low['true minus shuffled'] == pytest.approx(0.1)
    assert found.high['true minus shuffled'] == pytest.approx(0.4)
    assert (found.scenes == 2).all()


def test_maps_of_a_source_are_counted_together():
    rows = pd.DataFrame([tile('true', MODELS[1], 0.2, number=0), tile('true', MODELS[1], 0.6, number=1)])
    [row] = summarise(rows).to_dict('records')
    assert row['oa'] == pytest.approx(0.4) and row['tiles'] == 2


def test_every_source_has_sentences_of_one_shape():
    encoder = load_encoder('clip-rs-mini')
    vectors = {name: sentence_vectors(encoder, name) for name in METADATA}
    assert {tuple(x.shape) for x in vectors.values()} == {(MOST, encoder.dim)}
    assert all(torch.allclose(x.norm(dim=1), torch.ones(MOST), atol=1e-5) for x in vectors.values())
    assert not torch.allclose(vectors['dubai_mbrsc'], vectors['mumbai_pleiades'], atol=1e-2)
    assert vectors['dronedeploy'][1].equal(vectors['dronedeploy'][2])                    # the last one is repeated


def test_committed_rows_are_complete():
    results = pd.read_csv(RESULTS/'metadata.csv')
    runs = results.groupby(['experiment', 'source', 'model', 'given']).seed.nunique()
    assert (runs == 3).all() and len(runs) == 2 * len(SOURCES) * 4
    apart = pd.read_csv(RESULTS/'metadata_differences.csv')
    assert (apart.low <= apart.difference + 1e-5).all() and (apart.difference <= apart.high + 1e-5).all()
