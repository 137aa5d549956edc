"""The referring segmenter: shapes, two readings of a sentence, prompts that follow the text, losses, files, words."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from rssqa.clip.encoders import load_encoder
from rssqa.core import Incompatible
from rssqa.referring.segmenter import (
    PAPER, WEIGHTS, Attention, ImageFeatures, MaskTextContrast, PromptedDecoder, ReferringSegmenter,
    SecondOrderPrompter, Sizes, TextDecomposer, TextFeatures, Training, dice_loss, enlarge_masks, hooks_of,
    load_referring, missing_words, orthogonality, pool_tokens, read_images, read_texts, refer, referring_loss,
    save_referring, sizes_for, train_referring,
)

TINY = Sizes(image=6, text=5, sentence=4, decoder_image=3, fine=2, grid=4, decoder_grid=6, width=16, prompt=16)


def made(n=3, sizes=TINY, length=7, seed=0):
    torch.manual_seed(seed)
    g, d = sizes.grid, sizes.decoder_grid
    fine = torch.randn(n, sizes.fine, 2 * d, 2 * d) if sizes.fine else None
    images = ImageFeatures(torch.randn(n, sizes.image, g, g), torch.randn(n, sizes.decoder_image, d, d), fine)
    mask = torch.arange(length) < torch.tensor([[length], [4], [3]])[torch.arange(n) % 3]
    return images, TextFeatures(torch.randn(n, length, sizes.text), mask, torch.randn(n, sizes.sentence))


def model_of(sizes=TINY, seed=0):
    torch.manual_seed(seed)
    return ReferringSegmenter(sizes).eval()


# ---------------------------------------------------------------- shapes

@pytest.mark.parametrize('length', (3, 64))
def test_shapes_at_the_sizes_of_the_paper(length):
    sizes = Sizes(image=7, text=5, sentence=3, decoder_image=4, **PAPER | dict(width=16))
    assert (PAPER['width'], PAPER['heads'], PAPER['prompts'], sizes.grid**2, sizes.mask) == (512, 8, 9, 1024, 256)
    prompter = SecondOrderPrompter(sizes).eval()
    with torch.inference_mode():
        prompts = prompter(torch.randn(2, 1024, 7), torch.randn(2, length, 5), torch.randn(2, 3))
        assert prompts.sparse.shape == (2, 9, 256) and prompts.dense.shape == (2, 1, 256, 256)
        decoder = PromptedDecoder(sizes).eval()
        logits, embedding = decoder(torch.randn(2, 4, 64, 64), prompts.sparse, prompts.dense)
    assert logits.shape == (2, 1, 256, 256) and embedding.shape == (2, 256)
    assert enlarge_masks(logits, (100, 130)).shape == (2, 100, 130)


def test_layers_are_as_many_as_the_paper_has():
    prompter = model_of().prompter
    assert len(prompter.decompose.layers) == len(prompter.coarse) == len(prompter.refine) == 2
    assert prompter.decompose.places.shape == (2, 3, 16) and prompter.prompts.shape == (9, 16)


def test_image_tokens_of_another_size_are_refused():
    with pytest.raises(Incompatible, match=r'Found image tokens \(9, 6\), expected \(16, 6\)'):
        model_of().prompter(torch.randn(1, 9, 6), torch.randn(1, 7, 5), torch.randn(1, 4))


def test_sizes_are_read_from_features():
    images, texts = made()
    sizes = sizes_for(images, texts, width=16, prompt=16)
    assert sizes == TINY and sizes.mask == 24
    without = sizes_for(ImageFeatures(images.tokens, images.image), texts)
    assert without.fine == 0 and ReferringSegmenter(without)(ImageFeatures(images.tokens, images.image), texts)


# ---------------------------------------------------------------- the order of operations

def test_pooling_by_hand():
    text = torch.arange(5.0)[None, :, None]                              # 0 1 2 3 4
    pooled = pool_tokens(text, torch.ones(1, 5, dtype=torch.bool))
    assert pooled.flatten().tolist() == [0.5, 2.0, 3.5]                  # parts 0-1, 1-3, 3-4
    pooled = pool_tokens(text, torch.tensor([[True, True, False, False, False]]))
    assert pooled.flatten().tolist() == [0.0, 0.5, 1.0]                  # 0, 0-1, 1


@pytest.mark.parametrize('length', range(1, 9))
def test_pooling_is_adaptive_pooling_of_the_real_tokens(length):
    torch.manual_seed(length)
    text = torch.randn(1, 8, 3)
    expected = F.adaptive_avg_pool1d(text[0, :length].T, 3).T
    assert torch.allclose(pool_tokens(text, torch.arange(8)[None] < length)[0], expected, atol=1e-6)


def test_padding_changes_nothing():
    images, texts = made()
    model = model_of()
    padded = TextFeatures(F.pad(texts.tokens, (0, 0, 0, 5), value=7.0), F.pad(texts.mask, (0, 5)), texts.sentence)
    with torch.inference_mode():
        assert torch.allclose(model(images, texts).logits, model(images, padded).logits, atol=1e-5)


def test_attention_adds_and_normalises():
    x = torch.randn(2, 3, 8)
    attention = Attention(8, 2)
    expected, _ = attention.attend(x, x, x)
    assert torch.allclose(attention(x), F.layer_norm(x + expected, (8,)), atol=1e-5)
    assert abs(Attention(8, 2, mlp=True)(x).mean(-1)).max() < 1e-5       # the last thing is a norm


def test_prompts_depend_on_their_branch_of_the_text():
    images, texts = made()
    prompter = model_of().prompter
    tokens = images.tokens.flatten(2).transpose(1, 2)
    changes = {}
    for branch in range(2):                                              # another reading of one branch
        given = prompter(tokens, texts.tokens, texts.sentence, texts.mask)
        original = prompter.decompose.forward
        def read(text, mask, branch=branch, original=original):
            q = list(original(text, mask))
            q[branch] = q[branch] + 1.0 * torch.arange(16.0)
            return tuple(q)
        prompter.decompose.forward = read
        other = prompter(tokens, texts.tokens, texts.sentence, texts.mask)
        prompter.decompose.forward = original
        changes[branch] = (given.refined - other.refined).abs().max().item()
    assert min(changes.values()) > 1e-3                                  # the map depends on both


def test_both_readings_get_gradients_and_different_ones():
    images, texts = made()
    model = model_of().train()
    output = model(images, texts)
    output.prompts.q1.retain_grad()
    output.prompts.q2.retain_grad()
    target = (torch.rand(3, 24, 24) > 0.5).float()
    referring_loss(model, output, images, target)['total'].backward()
    g1, g2 = output.prompts.q1.grad, output.prompts.q2.grad
    assert min(g1.norm(), g2.norm()) > 1e-6
    assert F.cosine_similarity(g1.flatten(), g2.flatten(), dim=0) < 0.9
    places = model.prompter.decompose.places.grad
    assert not torch.allclose(places[0], places[1], rtol=0.05)


def test_every_weight_learns():
    images, texts = made()
    model = model_of().train()
    referring_loss(model, model(images, texts), images, torch.rand(3, 24, 24).round())['total'].backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_exchanged_text_changes_the_dense_prompt_and_the_mask():
    images, texts = made(2)
    model = model_of()
    exchanged = texts.take([1, 0])
    with torch.inference_mode(): before, after = model(images, texts), model(images, exchanged)
    assert (before.prompts.dense - after.prompts.dense).abs().mean() > 0.05
    assert (before.prompts.sparse - after.prompts.sparse).abs().max() > 1e-3
    assert (before.logits - after.logits).abs().max() > 1e-3


def test_dense_prompt_is_the_scaled_cosine():
    sizes = Sizes(image=6, text=5, sentence=4, decoder_image=3, grid=4, decoder_grid=4, width=16, prompt=16)
    images, texts = made(2, sizes)
    prompter = model_of(sizes).prompter
    with torch.no_grad():
        prompter.bias.fill_(-1.5)
        prompts = prompter(images.tokens.flatten(2).transpose(1, 2), texts.tokens, texts.sentence, texts.mask)
        joint = F.interpolate(prompter.dense(prompts.refined), (16, 16), mode='bilinear')
        cosine = F.cosine_similarity(joint, texts.sentence[:, :, None, None], dim=1)
    assert torch.allclose(prompts.dense[:, 0], 10 * cosine - 1.5, atol=1e-4)


@pytest.mark.parametrize('without', ('dense', 'sparse'))
def test_each_kind_of_prompt_reaches_the_mask(without):
    images, texts = made()
    model = model_of()
    with torch.inference_mode(): full, part = model(images, texts), model(images, texts, (without,))
    assert (full.logits - part.logits).abs().max() > 1e-3
    assert torch.equal(full.prompts.dense, part.prompts.dense)           # reported as made, not as used


def test_without_prompts_the_text_is_not_known():
    images, texts = made(2)
    model = model_of()
    both = ('dense', 'sparse')
    with torch.inference_mode(): a, b = model(images, texts, both), model(images, texts.take([1, 0]), both)
    assert torch.equal(a.logits, b.logits)


# ---------------------------------------------------------------- losses

def test_dice_by_hand():
    target = torch.zeros(1, 2, 2)
    target[0, 0] = 1                                                     # 2 of 4 pixels
    half = torch.zeros(1, 2, 2)                                          # p = .5: overlap 1, sums 2 and 2
    assert dice_loss(half, target).item() == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))
    assert dice_loss(100 * (2 * target - 1), target).item() == pytest.approx(0, abs=1e-6)


def test_orthogonality_by_hand():
    q1, q2 = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    q1[..., 0], q2[0, :, 1], q2[1] = 1, 1, 1                             # cosines of means: 0 and 1/sqrt(2)
    assert orthogonality(q1, q2).item() == pytest.approx((0 + 0.5) / 2)
    assert orthogonality(q1, -q1).item() == pytest.approx(1)             # opposite is not orthogonal


def test_terms_are_weighted_as_in_the_paper():
    assert WEIGHTS == dict(bce=5, dice=5, orthogonality=0.5, contrast=0.5)
    images, texts = made()
    model = model_of()
    target = torch.rand(3, 24, 24).round()
    terms = referring_loss(model, model(images, texts), images, target)
    assert terms['total'].item() == pytest.approx(sum(WEIGHTS[k] * terms[k].item() for k in WEIGHTS), rel=1e-5)


def contrast_of(n=3): # each image has its own direction under its mask
    sizes = Sizes(image=n + 1, text=4, sentence=4, decoder_image=3, grid=4, decoder_grid=4, width=n + 1, heads=1)
    contrast = MaskTextContrast(sizes)
    nn.init.eye_(contrast.enter.weight)
    nn.init.zeros_(contrast.enter.bias)
    target = torch.zeros(n, 8, 8)
    target[:, :4, :4] = 1
    tokens = torch.zeros(n, n + 1, 4, 4)
    tokens[:, n] = 1                                                     # outside all are alike
    tokens[:, n, :2, :2] = 0
    for i in range(n): tokens[i, i, :2, :2] = 1
    return contrast, tokens, target, torch.eye(n, n + 1)[:, None].expand(n, 3, n + 1)


def test_contrast_reads_what_is_under_the_mask():
    contrast, tokens, target, q2 = contrast_of()
    assert contrast.scale.exp().item() == pytest.approx(1 / 0.07)
    assert contrast(tokens, target, q2) < 1e-4
    assert contrast(tokens, target, q2.roll(1, 0)) > 5
    assert contrast(tokens, 1 - target, q2).item() == pytest.approx(np.log(3), abs=1e-4) # outside: all alike


def test_equal_sentences_are_no_negatives():
    contrast, tokens, target, q2 = contrast_of()
    alike = q2[:1].expand(3, -1, -1)
    same_image = tokens[:1].expand(3, -1, -1, -1)
    assert contrast(same_image, target, alike).item() == pytest.approx(np.log(3), abs=1e-4)
    assert contrast(same_image, target, alike, torch.ones(3, 3, dtype=torch.bool)).item() == pytest.approx(0, abs=1e-5)


def test_a_target_under_half_a_token_still_counts():
    contrast, tokens, target, q2 = contrast_of()
    small = torch.zeros_like(target)
    small[:, 0, 0] = 1                                                   # a quarter of one token
    assert contrast(tokens, small, q2) < 1e-4
    assert torch.isfinite(contrast(tokens, torch.zeros_like(target), q2)) # nothing at all


# ---------------------------------------------------------------- training

def blobs(n=24, side=6, seed=0): # two blobs an image, two sentences
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(side * side, generator=generator)[:2] for _ in range(n)])
    world = 0.1 * torch.randn(n, 4, side * side, generator=generator)
    for blob in range(2): world[torch.arange(n), blob, places[:, blob]] += 3
    world = world.unflatten(2, (side, side))
    texts = TextFeatures(
        torch.randn(2, 5, 8, generator=generator), torch.ones(2, 5, dtype=torch.bool),
        torch.randn(2, 6, generator=generator))
    cells = F.one_hot(places.flatten(), side * side).view(2 * n, 1, side, side).float()
    targets = (255 * F.interpolate(cells, scale_factor=4)[:, 0]).to(torch.uint8)
    return Training(ImageFeatures(world, world), texts, targets, torch.arange(n).repeat_interleave(2),
                    torch.arange(2).repeat(n))


BLOB_SIZES = Sizes(image=4, text=8, sentence=6, decoder_image=4, grid=6, decoder_grid=6, width=32, prompt=32, joint=4,
                   layers=1)


def test_readings_part_in_100_steps_while_bce_falls_and_the_mask_follows_the_words():
    torch.manual_seed(0)
    data = blobs()
    model = ReferringSegmenter(BLOB_SIZES)
    history = train_referring(model, data, steps=100, batch=16, lr=3e-3)
    assert history[0]['orthogonality'] > 0.2                             # so that there is something to part
    assert len(history) == 100 and history[-1]['orthogonality'] < 0.05
    assert history[-1]['bce'] < 0.25 * history[0]['bce'] and not model.training
    new, old = (iou_of(model, data, text) for text in (data.text, 1 - data.text))
    assert new > 0.7 and new - old > 0.6


def iou_of(model, data, text): # mean, with the targets of the data
    with torch.inference_mode(): logits = model(data.images.take(data.image), data.texts.take(text)).logits[:, 0]
    found, truth = logits > 0, data.targets > 127
    return ((found & truth).sum((1, 2)) / (found | truth).sum((1, 2))).mean().item()


def test_training_repeats():
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(train_referring(ReferringSegmenter(BLOB_SIZES), blobs(), steps=4, batch=4)[-1]['total'])
    assert losses[0] == losses[1]


def test_pairs_are_drawn_by_their_weight():
    data = blobs()
    data.weight = torch.zeros(len(data.image))
    data.weight[5] = 1.0
    before = data.targets.clone()
    drawn = []
    original = data.texts.take
    data.texts.take = lambda at: drawn.append(at) or original(at)
    train_referring(ReferringSegmenter(BLOB_SIZES), data, steps=3, batch=4)
    assert torch.cat(drawn).unique().tolist() == [int(data.text[5])] and torch.equal(before, data.targets)


def test_image_sentence_and_target_are_mirrored_together(monkeypatch):
    from rssqa.referring import segmenter
    data = blobs(4)
    data.mirrored = torch.tensor([[1, 0], [0, 1]])                       # left-right exchanges the sentences
    at = torch.arange(8)
    generator = torch.Generator()
    found = set()
    for seed in range(12):
        images, text, target = segmenter._mirror(data, at, generator.manual_seed(seed))
        ways = [list(axes) for axes in ((), (-1,), (-2,), (-1, -2)) if torch.equal(
            images.tokens, data.images.tokens[data.image].flip(axes))]
        assert len(ways) == 1
        assert torch.equal(target, data.targets.float().flip(ways[0]) / 255)
        assert torch.equal(text, 1 - data.text if -1 in ways[0] else data.text)
        found.add(tuple(ways[0]))
    assert len(found) == 4


# ---------------------------------------------------------------- files and use

class StubEncoder:
    fingerprint = 'abc'


def test_a_file_has_what_was_trained_and_nothing_else(tmp_path):
    images, texts = made()
    model = model_of()
    path = save_referring(model, tmp_path/'sub'/'m.safetensors', StubEncoder)
    again = load_referring(path, StubEncoder)
    assert again.sizes == TINY and not again.training
    with torch.inference_mode(): assert torch.equal(model(images, texts).logits, again(images, texts).logits)
    from rssqa.core import load_tensors
    names = set(load_tensors(path))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= names and names - trained == {n for n, _ in model.named_buffers()}
    assert not any('encoder' in name or 'visual' in name for name in names)


def test_another_encoder_or_file_is_refused(tmp_path):
    path = save_referring(model_of(), tmp_path/'m.safetensors', StubEncoder)
    class Other: fingerprint = 'xyz'
    with pytest.raises(Incompatible, match='encoder abc, found xyz'): load_referring(path, Other)
    save_file(dict(x=torch.zeros(1)), tmp_path/'x.safetensors')
    with pytest.raises(Incompatible, match='no referring segmenter'): load_referring(tmp_path/'x.safetensors', Other)


def test_hooks_by_hand():
    images, texts = made(2)
    with torch.inference_mode(): output = model_of()(images, texts)
    output.logits = torch.full((2, 1, 4, 4), -9.0)
    output.logits[0, 0, 0] = torch.tensor([0.8, 0.6, 0.9, 0.7]).logit()
    output.logits[1, 0, 0, 0] = torch.tensor(0.3).logit()                # nothing is above a half
    features, confidence = hooks_of(output)
    assert features.shape == (2, 16 + 16)
    assert confidence == pytest.approx([0.75, 0.7], abs=1e-4)            # mean inside; sure that there is nothing


@pytest.fixture(scope='module')
def encoder(): return load_encoder('clip-rs-mini', device='cpu')


def test_features_of_the_shipped_encoder(encoder):
    x = torch.rand(2, 3, 50, 70)
    images = read_images(encoder, x, side=96)
    assert [tuple(t.shape) for t in (images.tokens, images.image, images.fine)] == [
        (2, 352, 6, 6), (2, 96, 6, 6), (2, 32, 12, 12)]
    alone = read_images(encoder, x[1:], side=96)
    assert torch.allclose(images.tokens[1:].float(), alone.tokens.float(), atol=0.05)
    of_side = read_images(encoder, x, side=224)                          # the size that the encoder itself takes
    dense = encoder.encode_dense(x)
    pooled = F.adaptive_avg_pool2d(of_side.tokens[:, :256].float(), 7) / 16
    assert F.cosine_similarity(pooled.flatten(1), dense.flatten(1)).min() > 0.9 # enlarged, then averaged again


def test_words_without_a_vector_are_named(encoder):
    assert missing_words(encoder, ['The largest building', 'upper left']) == ['largest', 'upper']
    same = read_texts(encoder, ['the largest building', 'the smallest building']).tokens
    assert torch.equal(same[0], same[1])                                 # the trap: one sentence to the encoder
    apart = read_texts(encoder, ['the large building', 'the small building']).tokens
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)


def test_one_call(encoder):
    image = np.random.default_rng(0).random((3, 40, 60), np.float32)
    images = read_images(encoder, torch.as_tensor(image)[None], side=64)
    texts = read_texts(encoder, ['all water', 'the road on the left'])
    model = model_of(sizes_for(images, texts, width=16, prompt=16))
    masks, output = refer(model, encoder, image, ['all water', 'the road on the left'])
    assert masks.shape == (2, 40, 60) and masks.dtype == bool and output.logits.shape == (2, 1, 16, 16)
    assert json.dumps(model.sizes.__dict__)


def test_decomposer_without_padding_reads_all_tokens():
    torch.manual_seed(0)
    decompose = TextDecomposer(TINY).eval()
    text = torch.randn(1, 7, 5)
    changed = text.clone()
    changed[:, -1] += 3
    everything = torch.ones(1, 7, dtype=torch.bool)
    for a, b in zip(decompose(text, everything), decompose(changed, everything)): assert (a - b).abs().max() > 1e-3
