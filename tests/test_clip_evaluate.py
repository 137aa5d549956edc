"""Evaluation of a CLIP: recalls against a loop and by hand, protocols, prompts, probes."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from rssqa.clip.evaluate import (
    PROMPTS,
    class_vectors,
    crop_retrieval,
    crops_of,
    dense_probe,
    evaluate_clip,
    language_agreement,
    patch_classes,
    recall,
    retrieval,
    texts_of,
    zero_shot,
)
from rssqa.core import Incompatible, UnknownName


def shuffled_recall(scores, belongs, k, rounds=4000):
    "The same by drawing orders of equal scores."
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
    assert recall(scores, belongs, k) == pytest.approx(shuffled_recall(scores, belongs, k), abs=0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_recall_without_equals_is_a_rank(queries, candidates, seed):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(queries * candidates).reshape(queries, candidates) / 7
    own = rng.integers(0, candidates, queries)
    rank = (scores > scores[np.arange(queries), own][:, None]).sum(1)
    belongs = np.arange(candidates) == own[:, None]
    for k in range(1, candidates + 1): assert recall(scores, belongs, k) == pytest.approx((rank < k).mean())
    assert recall(scores, belongs, candidates) == pytest.approx(1)


def test_an_encoder_that_says_always_the_same_is_at_chance():
    told = retrieval(np.ones((20, 4)) / 2, np.ones((20, 4)) / 2, np.eye(20, dtype=bool), at=(1, 5))
    assert told['i2t@1'] == pytest.approx(0.05) and told['t2i@5'] == pytest.approx(0.25)


def test_protocols_by_hand():
    captions, images = ['a', 'b', 'a', 'c', 'a'], [0, 0, 1, 2, 2]
    owner, belongs = texts_of(captions, images, 'owner')
    assert (
        owner == captions
        and belongs.sum() == 5
        and belongs[:, 2].tolist() == [False, False, False, True, True]
    )
    unique, belongs = texts_of(captions, images, 'unique')
    assert unique == ['a satellite image. a', 'a satellite image. b', 'a satellite image. c'] and belongs[
        0
    ].tolist() == [True, True, True]
    with pytest.raises(UnknownName, match='(?i)did you mean owner'): texts_of(captions, images, 'owners')


def test_same_vectors_two_protocols():
    captions, images = ['a', 'a', 'b'], [0, 1, 2]
    vectors = dict(a=[1.0, 0], b=[0, 1.0])
    image = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    told = {
        p: retrieval(
            image,
            np.array(
                [vectors[t.removeprefix('a satellite image. ')] for t in texts_of(captions, images, p)[0]]
            ),
            texts_of(captions, images, p)[1],
            (1,),
        )
        for p in ('owner', 'unique')
    }
    assert told['unique']['mean_recall'] == pytest.approx(1) and told['owner'][
        'mean_recall'
    ] == pytest.approx(2 / 3)


def test_shapes_that_do_not_fit():
    with pytest.raises(Incompatible, match='2 texts, 3 images'):
        retrieval(np.eye(3), np.eye(3)[:2], np.eye(3, dtype=bool))


class Reader:
    "Says of a text how often it uses each letter; longer texts have longer vectors."
    name, dim, image_size = 'reader', 26, 8
    def encode_text(self, texts, unit=True):
        v = np.array([[t.count(chr(97 + i)) + 1e-3 for i in range(26)] for t in texts], float)
        return v / np.linalg.norm(v, axis=1, keepdims=True) if unit else v


def test_prompts_before_and_after():
    names = ['dense_residential/Area', 'sea']
    before, after = (
        class_vectors(Reader(), names, ['{}', '{} {} {} q'], average) for average in ('before', 'after')
    )
    assert (
        np.allclose(np.linalg.norm(before, axis=1), 1)
        and np.allclose(np.linalg.norm(after, axis=1), 1)
        and not np.allclose(before, after)
    )
    texts = [
        'dense residential area',
        'dense residential area dense residential area dense residential area q',
    ]
    raw = Reader().encode_text(texts, unit=False).mean(0)
    assert np.allclose(before[0], raw / np.linalg.norm(raw))
    with pytest.raises(UnknownName): class_vectors(Reader(), names, 'abuve')
    with pytest.raises(UnknownName): class_vectors(Reader(), names, 'above', 'never')


def test_every_prompt_takes_a_name():
    for prompts in PROMPTS.values(): assert all(p.count('{}') == 1 for p in prompts)


def test_zero_shot_by_hand():
    told = zero_shot(
        np.array([[1.0, 0], [1, 0], [0, 1], [1, 0]]),
        ['a', 'a', 'b', 'b'],
        dict(a=np.array([1.0, 0]), b=np.array([0, 1.0])),
    )
    assert told == dict(top1=0.75, mean_class=0.75)
    with pytest.raises(UnknownName): zero_shot(np.eye(2), ['a', 'z'], dict(a=np.eye(2)[0]))


def test_crops_are_parts_and_repeat():
    image = np.random.default_rng(0).random((3, 40, 60), np.float32)
    one = crops_of(image, 3, (0.1, 0.2), 5, 16)
    two = crops_of(image, 3, (0.1, 0.2), 5, 16)
    assert (
        one.shape == (3, 3, 16, 16)
        and (one == two).all()
        and (one != crops_of(image, 3, (0.1, 0.2), 6, 16)).any()
    )


class Mean:
    "Sees the mean colour: whole and part of an even image agree."
    name = 'mean'
    dim = 3
    dense_dim = 3
    image_size = 8
    def encode_image(self, x):
        import torch
        from rssqa.clip.encoders import SemOutput
        x = torch.as_tensor(x)
        return SemOutput(
            torch.nn.functional.normalize(x.mean((2, 3)), dim=-1),
            torch.nn.functional.adaptive_avg_pool2d(x, 4),
        )


def test_even_images_are_found_from_any_part():
    rng = np.random.default_rng(0)
    images = [np.broadcast_to(rng.random((3, 1, 1), np.float32), (3, 32, 32)).copy() for _ in range(12)]
    assert crop_retrieval(Mean(), images, 2)['crop@1'] == pytest.approx(1)


def test_patch_classes():
    mask = np.full((8, 8), 255)
    mask[:4, :4], mask[:4, 4:], mask[4, 4] = 0, 1, 2
    assert patch_classes(mask, (2, 2), 3).tolist() == [[0, 1], [255, 2]]


def test_a_probe_reads_colours_and_not_more():
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 2, (4, 4)).repeat(4, 0).repeat(4, 1) for _ in range(12)]
    images = [np.stack([m * 0.8, 1 - m * 0.8, m * 0]).astype(np.float32) for m in masks]
    train = np.arange(12) < 8
    assert dense_probe(Mean(), images, masks, 2, train)['miou'] == 1
    blind = dense_probe(Mean(), [im * 0 + 0.5 for im in images], masks, 2, train)
    assert blind['accuracy'] < 0.7 and blind['positions'] == 64
    with pytest.raises(Incompatible, match='(?i)keep some scenes'):
        dense_probe(Mean(), images, masks, 2, train | True)


def test_languages():
    seen = Reader().encode_text(['sea sea sea', 'wood wood'])
    told = language_agreement(Reader(), seen, dict(en=['sea', 'wood'], other=['wood', 'sea']))
    assert told == dict(en=1.0, other=0.0)
    with pytest.raises(Incompatible, match='(?i)translate every class'):
        language_agreement(Reader(), seen, dict(en=['sea'], de=['see', 'wald']))


class Both(Reader, Mean): name = 'both'


def test_template_captions_are_not_retrieved():
    rng = np.random.default_rng(0)
    class Encoder(Both):
        def encode_image(self, x):
            out = super().encode_image(x)
            from rssqa.clip.encoders import SemOutput
            import torch
            return SemOutput(
                torch.nn.functional.normalize(
                    torch.cat([out.pooled, torch.zeros(len(out.pooled), 23)], 1), dim=-1
                ),
                out.dense,
            )
        def encode_text(self, texts, unit=True):
            import torch
            return torch.tensor(super().encode_text(texts, unit), dtype=torch.float32)
    rows = [
        dict(
            key=f'{s}{i}',
            caption=f'an image of {s}' if source == 'coarse' else f'{s} number {i}',
            scene=s,
            source=source,
            path='',
        )
        for source in ('coarse', 'fine')
        for s in ('sea', 'wood')
        for i in range(4)
    ]
    table = pd.DataFrame(rows).assign(key=lambda t: t.source + t.key)
    told = evaluate_clip(Encoder(), table, crops=1, open=lambda row: rng.random((3, 16, 16), np.float32))
    assert set(told[told.task == 'retrieval'].source) == {'fine'} and set(
        told[told.task == 'zero-shot'].source
    ) == {'coarse', 'fine'}
    assert set(told.protocol) == {'owner', 'unique', 'averaged before', 'averaged after', '1 an image'}
