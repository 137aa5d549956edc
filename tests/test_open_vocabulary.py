"""Segmentation by words: each rule on a fake encoder whose answer is known, and the committed figures."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from rssqa.bench.open_vocabulary import FOREIGN, WORDS, add_foreign_map, draw_tiles, words_of_others
from rssqa.core import BadImage, Incompatible, UnknownName
from rssqa.open_vocabulary.segmenter import (
    OpenVocabulary, class_probabilities, class_words, fill_background, word_vectors,
)
from rssqa.quality.assessor import TrainingImage
from rssqa.segment.protocol import check_segmenter, window_starts
from rssqa.tables.grid import PredictionGrid

ROOT = Path(__file__).resolve().parents[1]
COLOURS = dict(red=(1, 0, 0), crimson=(0.9, 0.1, 0), green=(0, 1, 0), blue=(0, 0, 1))


class Colours: # an encoder whose space is colour: parts of 16 pixels, words that are colours
    name, fingerprint, stride = 'colours', 'colours-1', 16

    def __init__(self): self.calls = []

    def _parts(self, x): return F.avg_pool2d(x, self.stride, ceil_mode=True) + 1e-6

    def encode_dense(self, x):
        self.calls.append(tuple(x.shape))
        return F.normalize(self._parts(x), dim=1)

    def encode_image(self, x): return SimpleNamespace(pooled=F.normalize(x.mean((2, 3)), dim=1), dense=self._parts(x))

    def encode_text(self, texts):
        words = [next(name for name in sorted(COLOURS, key=len)[::-1] if name in text) for text in texts]
        return F.normalize(torch.tensor([COLOURS[word] for word in words], dtype=torch.float32), dim=1)


def halves(left='red', right='blue', size=64): # one image of two colours
    image = torch.zeros(1, 3, size, size)
    image[..., :size // 2] = torch.tensor(COLOURS[left]).view(1, 3, 1, 1)
    image[..., size // 2:] = torch.tensor(COLOURS[right]).view(1, 3, 1, 1)
    return image


def segmenter(classes=('red', 'green', 'blue'), **options): return OpenVocabulary(Colours(), classes, **options)


def test_parts_go_to_the_word_they_resemble():
    mask = segmenter(whole=0.0)(halves()).mask[0]
    assert (mask[:, :28] == 0).all() and (mask[:, 36:] == 2).all()


def test_it_is_a_segmenter(): check_segmenter(segmenter())


@pytest.mark.parametrize('order', [(2, 0, 1), (1, 2, 0)])
def test_classes_in_another_order_give_the_same_map(order):
    names = ['red', 'green', 'blue']
    first = segmenter(names)(halves())
    second = segmenter([names[i] for i in order])(halves())
    assert torch.allclose(second.logits, first.logits[:, list(order)], atol=1e-4)


def test_a_class_has_the_best_of_its_words():
    p = (50 * torch.tensor([0.9, 0.7, 0.8])).softmax(0)
    merged = class_probabilities(torch.tensor([0.9, 0.7, 0.8]).view(1, 3, 1, 1), torch.tensor([0, 0, 1])).flatten()
    assert torch.allclose(merged, torch.stack([p[0], p[2]]) / (p[0] + p[2]))
    words = dict(reddish=('red', 'crimson'), blue=())
    assert class_words(words) == dict(reddish=('red', 'crimson'), blue=('blue',))
    assert (segmenter(words, whole=0.0)(halves('crimson', 'blue')).mask[0, :, :28] == 0).all()


def test_what_the_whole_window_is_about_is_taken_away():
    encoder = Colours()
    image = halves('red', 'red')
    image[..., :8, :8] = torch.tensor([0.6, 0.5, 0.0]).view(1, 3, 1, 1)     # a corner between red and green
    plain = OpenVocabulary(encoder, ('red', 'green'), whole=0.0, scale=10)(image).probs()[0, 1]
    less = OpenVocabulary(encoder, ('red', 'green'), whole=0.3, scale=10)(image).probs()[0, 1]
    assert (less >= plain - 1e-6).all() and less[0, 0] > plain[0, 0] + 0.05


def test_what_no_class_is_sure_of_is_background():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05]]).T.reshape(1, 3, 1, 2)
    assert fill_background(p, 2, 0.6).argmax(1).flatten().tolist() == [2, 0]
    assert torch.allclose(fill_background(p, 2, 0.6).sum(1), torch.ones(1, 1, 2))
    grey = torch.full((1, 3, 64, 64), 0.5)
    sure = segmenter(('red', 'green', 'blue'), background='blue', least=0.5, whole=0.0)(grey)
    assert (sure.mask == 2).all()
    with pytest.raises(Incompatible, match='background='): segmenter(least=0.5)
    with pytest.raises(UnknownName, match='(?i)did you mean blue'): segmenter(background='blu')


@pytest.mark.parametrize('length', [1, 63, 224, 225, 300, 336, 448, 1000])
def test_windows_cover_every_pixel(length):
    starts = window_starts(length, 224, 112)
    covered = np.zeros(length, int)
    for start in starts: covered[start:start + 224] += 1
    assert covered.min() >= 1 and starts == sorted(set(starts)) and starts[-1] + 224 <= max(length, 224)


def test_windows_have_the_stated_size_and_a_batch_is_its_images():
    s = segmenter()
    wide = torch.rand(2, 3, 40, 80, generator=torch.Generator().manual_seed(0))
    both = s(wide)
    assert set(s.encoder.calls) == {(2, 3, 224, 224)} and both.logits.shape == (2, 3, 40, 80)
    for i in range(2): assert torch.allclose(s(wide[i:i + 1]).logits, both.logits[i:i + 1], atol=1e-4)
    with pytest.raises(BadImage): s(255 * wide)
    with pytest.raises(Incompatible, match='two or more'): segmenter(('red',))


def test_words_and_settings_are_in_the_fingerprint():
    prints = {segmenter(c, **o).fingerprint for c, o in [
        (('red', 'blue'), {}), (('blue', 'red'), {}), (dict(red=('crimson',), blue=()), {}),
        (('red', 'blue'), dict(whole=0.2)), (('red', 'blue'), dict(scale=40.0)), (('red', 'blue'), dict(step=64)),
    ]}
    assert len(prints) == 6 and segmenter(('red', 'blue')).fingerprint in prints


def test_a_word_is_the_mean_of_its_sentences():
    vectors = word_vectors(Colours(), ['red', 'blue'], ('a {} roof', 'a {} field'))
    assert torch.allclose(vectors, F.normalize(torch.tensor([COLOURS['red'], COLOURS['blue']]).float(), dim=1))


def test_a_foreign_map_joins_the_others():
    rng = np.random.default_rng(0)
    p = rng.integers(0, 255, (2, 3, 16, 16)).astype(np.uint8)
    truth = rng.integers(0, 3, (16, 16)).astype(np.uint8)
    grid = PredictionGrid('i', 'town', ['a', 'b'], p, p, p.argmax(1).astype(np.uint8), truth)
    image = TrainingImage(halves()[0].numpy(), grid, 's', dict(a=0.3, b=0.4))
    found = add_foreign_map(image, segmenter(whole=0.0), 0.9)
    assert found.grid.methods == ['a', 'b', FOREIGN] and found.oa == dict(a=0.3, b=0.4) | {FOREIGN: 0.9}
    assert np.array_equal(found.grid.p[:2], p) and found.grid.p.shape == (3, 3, 16, 16)
    assert (found.grid.pred[2, :, :6] == 0).all() and (found.grid.pred[2, :, 10:] == 2).all()


def test_tiles_come_from_all_scenes():
    tiles = pd.DataFrame(dict(scene=[*'aaaaaaaab', 'c'], path=range(10)))
    drawn = draw_tiles(tiles, 3)
    assert set(drawn.scene) == set('abc') and len(draw_tiles(tiles, 99)) == 10
    assert draw_tiles(tiles, 4).path.tolist() == draw_tiles(tiles, 4).path.tolist()


def test_no_class_keeps_its_own_words():
    for words in WORDS.values():
        other = words_of_others(words)
        assert list(other) == list(words) and all(other[name] != words[name] for name in words)


def test_the_committed_figures():
    maps = pd.read_csv(ROOT/'data/results/open_vocabulary.csv')
    oa = maps.pivot(index='source', columns='variant', values='oa')
    assert set(oa.index) == set(WORDS) and (oa['words'] > oa['words of other classes']).all()
    assessed = pd.read_csv(ROOT/'data/results/open_vocabulary_assessed.csv')
    foreign = assessed[assessed.maps == FOREIGN]
    assert len(foreign) == 3 and foreign.right_side.between(0, 1).all() and foreign.mae.between(0, 1).all()
