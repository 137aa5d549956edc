"""Base and novel classes: divided without overlap, hidden in training, measured among all classes."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rssqa.bench.soft_guided import SEGMENTERS, SourceFeatures, class_vectors, divide, hide_novel, measure, run_division
from rssqa.data.datasets import IGNORE
from rssqa.open_vocabulary.soft_guided import SoftGuided

K, D, SIDE = 4, 8, 6


def made_source(noise=0.0, tiles=10, seed=0): # parts whose embedding is the vector of their class, and noise
    torch.manual_seed(seed)
    text = F.normalize(torch.linalg.qr(torch.randn(D, D))[0][:K], dim=1)
    truth = torch.randint(K, (tiles, SIDE, SIDE))
    frozen = F.normalize(text[truth].permute(0, 3, 1, 2) + noise * torch.randn(tiles, D, SIDE, SIDE), dim=1)
    labels = truth.repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8)
    masks = [label.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy() for label in labels]
    scene = np.array([f's{i // 2}' for i in range(tiles)])
    features = F.one_hot(truth, 10).permute(0, 3, 1, 2).float()
    return SourceFeatures(features, frozen, torch.zeros(tiles, D), labels, masks, scene), text


@pytest.mark.parametrize('seed', range(6))
def test_classes_and_scenes_are_divided(seed):
    source, _ = made_source()
    base, train, test = divide(source, K, seed)
    assert len(base) == 2 and set(base) <= set(range(K))
    assert sorted([*train, *test]) == list(range(10)) and len(test) == 4
    assert not set(source.scene[train]) & set(source.scene[test])
    again = divide(source, K, seed)
    assert all(np.array_equal(a, b) for a, b in zip((base, train, test), again))


def test_absent_classes_are_not_drawn():
    source, _ = made_source()
    source.labels[source.labels == 2] = IGNORE
    assert all(2 not in divide(source, K, seed)[0] for seed in range(10))


def test_novel_labels_are_hidden():
    labels = torch.tensor([[0, 1, 2, 3, IGNORE]], dtype=torch.uint8)
    assert hide_novel(labels, np.array([1, 3])).tolist() == [[IGNORE, 0, IGNORE, 1, IGNORE]]


def test_a_perfect_encoder_has_a_high_miou_of_both():
    source, text = made_source()
    frozen = SoftGuided(10, torch.randn(D), gate=1.0, guided=False)
    found = measure(frozen, source, text, np.array([0, 2]), np.arange(10))
    assert found['base'] > 0.6 and found['novel'] > 0.6        # bilinear enlargement rounds corners
    assert found['harmonic'] == pytest.approx(2 / (1 / found['base'] + 1 / found['novel']))
    swapped = measure(frozen, source, text, np.array([1, 3]), np.arange(10))
    assert swapped['base'] == found['novel'] and swapped['novel'] == found['base']


def test_every_segmenter_is_measured_and_training_free_is_not_tuned():
    source, text = made_source(0.5)
    rows = {row['segmenter']: row for row in run_division(source, text, torch.randn(D), 0, steps=30)}
    assert list(rows) == list(SEGMENTERS)
    base, _, test = divide(source, K, 0)
    frozen = measure(SoftGuided(10, torch.randn(D), gate=1.0, guided=False), source, text, base, test)
    assert rows['training-free']['novel'] == pytest.approx(frozen['novel'])
    assert rows['plain tuning']['base'] > rows['training-free']['base']
    again = run_division(source, text, torch.zeros(D), 0, steps=30)
    assert again[1]['base'] == rows['plain tuning']['base']    # the same seed; the bias has no part in plain tuning


def test_class_vectors_are_means_of_words():
    class Encoder:
        def encode_text(self, texts):
            return torch.tensor([[1.0, 0.0] if 'house' in t else [0.0, 1.0] for t in texts])
    vectors = class_vectors(Encoder(), dict(built=('house', 'hut'), sea=('water',)))
    assert torch.allclose(vectors, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))
