"""Evaluation of a CLIP: recall against brute force and by hand, protocols, prompts, probes."""
from string import ascii_lowercase

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import adaptive_avg_pool2d, normalize

from rssqa.clip.encoders import SemOutput
from rssqa.clip.evaluate import PROMPTS, class_vectors, language_agreement, zero_shot
from rssqa.clip.evaluate import crop_retrieval, crops_of, dense_probe, patch_classes
from rssqa.clip.evaluate import evaluate_clip, recall, retrieval, protocol_texts
from rssqa.core import Incompatible, UnknownName


class LetterEncoder:
    "Counts the letters of a text; longer texts have longer vectors."
    name = 'letters'
    dim = 26
    image_size = 8

    def encode_text(self, texts, unit=True):
        counts = np.full((len(texts), 26), 1e-3)
        for row, text in enumerate(texts): counts[row] += [text.count(letter) for letter in ascii_lowercase]
        return counts / np.linalg.norm(counts, axis=1, keepdims=True) if unit else counts


class ColourEncoder:
    "Gives the mean colour of an image: whole and part of an even image agree."
    name = 'colour'
    dim = 3
    dense_dim = 3
    image_size = 8

    def encode_image(self, x):
        x = torch.as_tensor(x)
        return SemOutput(normalize(x.mean((2, 3)), dim=-1), adaptive_avg_pool2d(x, 4))


class LetterColourEncoder(LetterEncoder, ColourEncoder):
    "Both at once, with vectors of 26 numbers."
    def encode_image(self, x):
        out = super().encode_image(x)
        padded = torch.cat([out.pooled, torch.zeros(len(out.pooled), 23)], 1)
        return SemOutput(normalize(padded, dim=-1), out.dense)

    def encode_text(self, texts, unit=True):
        return torch.tensor(super().encode_text(texts, unit), dtype=torch.float32)


# ---------------------------------------------------------------- recall and retrieval

def recall_by_drawing(scores, belongs, k, rounds=4000): # equal scores in random order
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(rounds):
        order = np.lexsort((rng.random(scores.shape), -scores), axis=1)[:, :k]
        hits += np.take_along_axis(belongs, order, 1).any(1).mean()
    return hits / rounds


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(2, 7), st.integers(1, 4), st.integers(0, 1000))
def test_recall_is_the_mean_over_orders_of_equal_scores(queries, candidates, k, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (queries, candidates)).astype(float)
    belongs = rng.random((queries, candidates)) < 0.4
    belongs[np.arange(queries), rng.integers(0, candidates, queries)] = True
    assert recall(scores, belongs, k) == pytest.approx(recall_by_drawing(scores, belongs, k), abs=0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_recall_without_equal_scores_is_a_rank(queries, candidates, seed):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(queries * candidates).reshape(queries, candidates) / 7
    answer = rng.integers(0, candidates, queries)
    rank = (scores > scores[np.arange(queries), answer][:, None]).sum(1)
    belongs = np.arange(candidates) == answer[:, None]
    for k in range(1, candidates + 1): assert recall(scores, belongs, k) == pytest.approx((rank < k).mean())
    assert recall(scores, belongs, candidates) == pytest.approx(1)


def test_an_encoder_with_constant_vectors_is_at_chance():
    vectors = np.ones((20, 4)) / 2
    recalls = retrieval(vectors, vectors, np.eye(20, dtype=bool), at=(1, 5))
    assert recalls['i2t@1'] == pytest.approx(0.05) and recalls['t2i@5'] == pytest.approx(0.25)


def test_protocols_by_hand():
    captions = ['a', 'b', 'a', 'c', 'a']
    images = [0, 0, 1, 2, 2]
    texts, belongs = protocol_texts(captions, images, 'owner')
    assert texts == captions and belongs.sum() == 5
    assert belongs[:, 2].tolist() == [False, False, False, True, True]
    texts, belongs = protocol_texts(captions, images, 'unique')
    assert texts == ['a satellite image. a', 'a satellite image. b', 'a satellite image. c']
    assert belongs[0].tolist() == [True, True, True]
    with pytest.raises(UnknownName, match='(?i)did you mean owner'): protocol_texts(captions, images, 'owners')


@pytest.mark.parametrize('protocol,mean_recall', [('unique', 1), ('owner', 2 / 3)])
def test_the_same_vectors_under_two_protocols(protocol, mean_recall):
    vectors = dict(a=[1.0, 0], b=[0, 1.0])
    image = np.array([vectors['a'], vectors['a'], vectors['b']])
    texts, belongs = protocol_texts(['a', 'a', 'b'], [0, 1, 2], protocol, prompt='')
    text = np.array([vectors[text] for text in texts])
    assert retrieval(image, text, belongs, (1,))['mean_recall'] == pytest.approx(mean_recall)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(Incompatible, match='2 texts, 3 images'):
        retrieval(np.eye(3), np.eye(3)[:2], np.eye(3, dtype=bool))


# ---------------------------------------------------------------- zero-shot

def test_prompts_are_averaged_before_or_after_normalising():
    names = ['dense_residential/Area', 'sea']
    prompts = ['{}', '{} {} {} q']
    before = class_vectors(LetterEncoder(), names, prompts, 'before')
    after = class_vectors(LetterEncoder(), names, prompts, 'after')
    for vectors in (before, after): assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert not np.allclose(before, after)
    words = 'dense residential area'
    raw = LetterEncoder().encode_text([words, f'{words} {words} {words} q'], unit=False).mean(0)
    assert np.allclose(before[0], raw / np.linalg.norm(raw))
    with pytest.raises(UnknownName): class_vectors(LetterEncoder(), names, 'abuve')
    with pytest.raises(UnknownName): class_vectors(LetterEncoder(), names, 'above', 'never')


@pytest.mark.parametrize('prompts', PROMPTS.values(), ids=list(PROMPTS))
def test_every_prompt_takes_a_name(prompts):
    for prompt in prompts: assert prompt.count('{}') == 1


def test_zero_shot_by_hand():
    image = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1], [1, 0]])
    classes = dict(a=np.array([1.0, 0]), b=np.array([0, 1.0]))
    # of class a 3 of 3 are right, of class b 1 of 2
    assert zero_shot(image, ['a', 'a', 'a', 'b', 'b'], classes) == dict(top1=0.8, mean_class=0.75)
    assert zero_shot(image[1:], ['a', 'a', 'b', 'b'], classes) == dict(top1=0.75, mean_class=0.75)
    with pytest.raises(UnknownName): zero_shot(np.eye(2), ['a', 'z'], dict(a=np.eye(2)[0]))


def test_languages_are_compared_with_the_first():
    image = LetterEncoder().encode_text(['sea sea sea', 'wood wood'])
    shares = language_agreement(LetterEncoder(), image, dict(en=['sea', 'wood'], other=['wood', 'sea']))
    assert shares == dict(en=1.0, other=0.0)
    with pytest.raises(Incompatible, match='(?i)translate every class'):
        language_agreement(LetterEncoder(), image, dict(en=['sea'], de=['see', 'wald']))


# ---------------------------------------------------------------- crops and patches

def test_crops_are_drawn_from_their_seed():
    image = np.random.default_rng(0).random((3, 40, 60), np.float32)
    crops = crops_of(image, 3, (0.1, 0.2), 5, 16)
    assert crops.shape == (3, 3, 16, 16)
    assert torch.equal(crops, crops_of(image, 3, (0.1, 0.2), 5, 16))
    assert not torch.equal(crops, crops_of(image, 3, (0.1, 0.2), 6, 16))


def test_even_images_are_found_from_any_part():
    colours = np.random.default_rng(0).random((12, 3, 1, 1), np.float32)
    images = [np.broadcast_to(colour, (3, 32, 32)).copy() for colour in colours]
    assert crop_retrieval(ColourEncoder(), images, 2)['crop@1'] == pytest.approx(1)


def test_patch_classes_by_hand():
    mask = np.full((8, 8), 255)
    mask[:4, :4] = 0
    mask[:4, 4:] = 1
    mask[4, 4] = 2
    assert patch_classes(mask, (2, 2), 3).tolist() == [[0, 1], [255, 2]]


def test_a_probe_reads_colours_and_not_more():
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 2, (4, 4)).repeat(4, 0).repeat(4, 1) for _ in range(12)]
    images = [np.stack([mask * 0.8, 1 - mask * 0.8, mask * 0]).astype(np.float32) for mask in masks]
    grey = [image * 0 + 0.5 for image in images]
    train = np.arange(12) < 8
    assert dense_probe(ColourEncoder(), images, masks, 2, train)['miou'] == 1
    blind = dense_probe(ColourEncoder(), grey, masks, 2, train)
    assert blind['accuracy'] < 0.7 and blind['positions'] == 64
    with pytest.raises(Incompatible, match='(?i)keep some scenes'):
        dense_probe(ColourEncoder(), images, masks, 2, np.ones(12, bool))


# ---------------------------------------------------------------- all of it

def test_template_captions_are_not_retrieved():
    rows = []
    for place in ('sea', 'wood'):
        for i in range(4):
            template = dict(key=f'coarse{place}{i}', caption=f'an image of {place}', source='coarse')
            specific = dict(key=f'fine{place}{i}', caption=f'{place} number {i}', source='fine')
            rows += [row | dict(scene=place, path='') for row in (template, specific)]
    rng = np.random.default_rng(0)
    def random_image(row): return rng.random((3, 16, 16), np.float32)
    results = evaluate_clip(LetterColourEncoder(), pd.DataFrame(rows), crops=1, open=random_image)
    assert set(results[results.task == 'retrieval'].source) == {'fine'}
    assert set(results[results.task == 'zero-shot'].source) == {'coarse', 'fine'}
    assert set(results.protocol) == {'owner', 'unique', 'averaged before', 'averaged after', '1 an image'}
