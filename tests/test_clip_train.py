"""Training a CLIP: exact resume, chunks, processes that share a batch, killed ranks, faults, what a step sees."""
import copy, os, subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rssqa.clip.train import (
    ClipRecipe,
    Distilled,
    Heads,
    CachedViews,
    PairViews,
    Towers,
    Training,
    batches,
    cut_view,
    cut_views,
    draw_box,
    compute_loss,
    new_clip,
    positions,
    rate,
    save_clip,
    train_clip,
)
from rssqa.core import DataNotFound, Incompatible
from rssqa.clip.encoders import load_encoder
from rssqa.clip.cached_stem import StemViews, cut_stem
from rssqa.clip.objectives import caption_ids
from rssqa.clip.towers import read_text

CONV = dict(
    embed_dim=16,
    custom_text=True,
    vision_cfg=dict(
        timm_model_name='mobilenetv2_035',
        timm_model_pretrained=False,
        timm_pool='avg',
        timm_proj='linear',
        image_size=32,
    ),
    text_cfg=dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1),
)
VIT = dict(
    embed_dim=16,
    vision_cfg=dict(image_size=32, patch_size=8, width=16, head_width=8, layers=2),
    text_cfg=dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1),
)
WORDS = 'river field town forest harbour road lake desert bridge farm'.split()


def world(n=24, seed=0):
    rng = np.random.default_rng(seed)
    images = {f'k{i:02}': rng.random((3, 40, 36), np.float32) for i in range(n)}
    table = pd.DataFrame(
        [
            dict(key=k, caption=f'a {WORDS[i % len(WORDS)]} number {j}')
            for i, k in enumerate(images)
            for j in range(1 + i % 3)
        ]
    )
    return table, lambda row: images[row['key']]


@pytest.fixture(params=[CONV, VIT], ids=['conv', 'vit'])
def encoder(request, tmp_path): return new_clip(request.param, tmp_path/'net')


RECIPE = ClipRecipe(
    steps=6,
    batch=8,
    warmup=2,
    lr=1e-3,
    large=2,
    small=2,
    prototypes=32,
    save_every=2,
    objectives=(('multi-positive', 1.0), ('self-distill', 0.5)),
)


def data(encoder, recipe=RECIPE): return PairViews(world()[0], recipe, encoder, world()[1])


def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


# ---------------------------------------------------------------- the same curve

def test_resume_is_exact(encoder, tmp_path):
    whole = train_clip(one := copy.deepcopy(encoder.net), data(encoder), RECIPE)
    for until in 1, 2, 5:
        train_clip(copy.deepcopy(encoder.net), data(encoder), RECIPE, tmp_path/'run', until=until)
    again = train_clip(two := copy.deepcopy(encoder.net), data(encoder), RECIPE, tmp_path/'run')
    assert (
        (whole.drop(columns=['images_s', 'waited']) == again.drop(columns=['images_s', 'waited'])).all().all()
    )
    assert torch.equal(weights(one), weights(two))
    done = train_clip(copy.deepcopy(encoder.net), data(encoder), RECIPE, tmp_path/'run')
    # nothing is left to do, and nothing is done
    assert done.loss.tolist() == whole.loss.tolist()
    assert pd.read_csv(tmp_path / 'run/curve.csv').step.tolist() == list(range(6)) and list(
        (tmp_path / 'run/board').glob('events*')
    )


def test_a_break_between_checkpoints_loses_nothing_but_time(encoder, tmp_path):
    class Breaks(PairViews):
        def __getitem__(self, at):
            if at[0] == 1 and at[1] == 7: raise KeyboardInterrupt
            return super().__getitem__(at)
    whole = train_clip(copy.deepcopy(encoder.net), data(encoder), RECIPE)
    with pytest.raises(KeyboardInterrupt):
        train_clip(
            copy.deepcopy(encoder.net), Breaks(world()[0], RECIPE, encoder, world()[1]), RECIPE, tmp_path
        )
    assert (
        train_clip(copy.deepcopy(encoder.net), data(encoder), RECIPE, tmp_path).loss.tolist()
        == whole.loss.tolist()
    )


@pytest.mark.parametrize('chunk', [1, 3, 8, 100])
def test_chunks_change_nothing(encoder, chunk):
    one, other = (
        train_clip(copy.deepcopy(encoder.net), data(encoder), replace(RECIPE, steps=3, chunk=c))
        for c in (0, chunk)
    )
    assert np.allclose(one.loss, other.loss, atol=2e-4)


def test_workers_change_nothing(encoder):
    one, other = (
        train_clip(copy.deepcopy(encoder.net), data(encoder), replace(RECIPE, steps=2), workers=w)
        for w in (0, 2)
    )
    assert one.loss.tolist() == other.loss.tolist()


SCRIPT = '''
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_cliptrain import *
folder = Path(sys.argv[1])
class Kills(PairViews):
    def __getitem__(self, at):
        if len(sys.argv) > 2 and int(os.environ['RANK']) == 1 and at[0] == 1: os._exit(13)
        return super().__getitem__(at)
encoder = new_clip(CONV, folder/'net' if os.environ['RANK'] == '0' else folder/'net1')
train_clip(encoder.net, Kills(world()[0], RECIPE, encoder, world()[1]), RECIPE, folder, device='cpu')
'''


def torchrun(script, *args, n=2):
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')} | dict(OMP_NUM_THREADS='1')
    return subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            f'--nproc-per-node={n}',
            str(script),
            *map(str, args),
        ],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )


def test_two_processes_give_the_curve_of_one_and_a_killed_one_resumes(tmp_path):
    script = tmp_path/'run.py'
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    encoder = new_clip(CONV, tmp_path/'net')
    alone = train_clip(encoder.net, data(encoder), RECIPE)
    killed = torchrun(script, tmp_path/'two', 'kill')
    # an epoch has three steps, a checkpoint two
    assert killed.returncode and len(pd.read_csv(tmp_path / 'two/curve.csv')) == 2
    done = torchrun(script, tmp_path/'two')
    assert done.returncode == 0, done.stderr[-2000:]
    shared = pd.read_csv(tmp_path/'two/curve.csv')
    assert np.allclose(alone.loss, shared.loss, atol=1e-4) and np.allclose(
        alone.gradient, shared.gradient, rtol=1e-3
    )


# ---------------------------------------------------------------- what a step sees

def test_an_epoch_sees_each_image_once_and_each_epoch_another_order():
    recipe = replace(RECIPE, batch=5)
    epochs = [[i for s in range(4 * e, 4 * e + 4) for _, i in positions(23, recipe, s)] for e in range(2)]
    assert len(set(epochs[0])) == len(epochs[0]) == 20 and epochs[0] != epochs[1]
    assert positions(23, replace(recipe, seed=1), 0) != positions(23, recipe, 0)


def test_a_view_is_where_its_box_is():
    image = torch.zeros(3, 40, 40)
    image[0, :20, :20] = 1
    assert (
        cut_view(image, (0, 0, 0.5, 0.5), 20)[0].min() == 1
        and cut_view(image, (0.5, 0.5, 1, 1), 20).max() == 0
    )
    corner = cut_view(image, (0, 0, 1, 1), 40, 1)
    # a quarter turn against the clock moves it down
    assert corner[0, -1, 0] == 1 and corner[0, 0, 0] == 0
    assert {
        tuple(np.argwhere(cut_view(image, (0, 0, 1, 1), 2, t)[0].numpy() > 0.5)[0]) for t in range(8)
    } == {(0, 0), (0, 1), (1, 0), (1, 1)}
    eight = (image * 255).byte()
    assert torch.allclose(
        cut_view(eight, (0.1, 0.2, 0.8, 0.9), 16), cut_view(image, (0.1, 0.2, 0.8, 0.9), 16), atol=0.02
    )


def test_boxes_keep_area_and_aspect():
    rng = np.random.default_rng(0)
    b = np.array([draw_box(rng, (0.05, 0.3)) for _ in range(500)])
    w = b[:, 2] - b[:, 0]
    h = b[:, 3] - b[:, 1]
    assert (
        (w / h).max() <= 4 / 3 + 1e-9
        and (w / h).min() >= 3 / 4 - 1e-9
        and (w * h).min() < 0.07
        and (w * h).max() > 0.28
    )


@pytest.mark.parametrize('turn', range(8))
def test_many_views_at_once_are_the_views_one_by_one(turn):
    images = torch.rand(2, 3, 64, 64)
    boxes = torch.tensor([[[.25, .125, .75, .625], [0, 0, 1, 1]], [[.5, .5, 1, 1], [0, .25, .5, .75]]])
    many = cut_views(images, boxes, torch.full((2, 2), turn), 32)
    for i in range(2):
        for j in range(2):
            if (i, j) != (0, 1):  # boxes of 32 pixels need no resizing
                assert torch.allclose(
                    many[i, j], cut_view(images[i], boxes[i, j].tolist(), 32, turn), atol=1e-5
                )
    whole = cut_views(images, boxes[:, 1:] * 0 + torch.tensor([0, 0, 1, 1.0]), torch.full((2, 1), turn), 64)[
        :, 0
    ]
    assert torch.allclose(
        whole, torch.stack([cut_view(im, (0, 0, 1, 1), 64, turn) for im in images]), atol=1e-5
    )


def test_kept_views_are_the_same_views(encoder):
    table, open = world()
    recipe = replace(RECIPE, small_size=32)
    one = PairViews(table, recipe, encoder, open)
    two = CachedViews(table, recipe, encoder, open=open)
    a, b = (v.collate([v[3, i] for i in (0, 5, 2)]) for v in (one, two))
    assert (
        set(a) == set(b)
        and all(torch.equal(a[k], b[k]) for k in ('tokens', 'ids'))
        and torch.allclose(a['boxes'], b['boxes'])
        and {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    )
    assert (
        two.mark == one.mark
        and (a['large'] - b['large']).abs().mean() < 0.15
        and torch.equal(b['large'], two.collate([two[3, i] for i in (0, 5, 2)])['large'])
    )
    assert train_clip(encoder.net, two, replace(recipe, steps=2)).loss.notna().all()


def test_equal_sentences_have_equal_keys_in_every_process():
    keys = caption_ids(['A  road', 'a road', 'a river', ''])
    assert keys[0] == keys[1] != keys[2] and keys[3] == -1
    out = subprocess.run(
        [
            sys.executable,
            '-c',
            "from rssqa.clip.objectives import caption_ids; print(caption_ids(['a road'])[0].item())",
        ],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONHASHSEED='7'),
    )
    assert int(out.stdout) == keys[0]


def test_short_sentences_read_the_same_without_padding(encoder):
    tokens = encoder.tokenizer(['a road', 'a long sentence about a town near a river', ''])
    assert torch.allclose(read_text(encoder.net, tokens), encoder.net.encode_text(tokens), atol=1e-6)


def test_rate_of_learning():
    rates = np.array([rate(s, replace(RECIPE, steps=100, warmup=10)) for s in range(100)])
    assert (
        np.allclose(np.diff(rates[:10]), 0.1)
        and rates.argmax() in (9, 10)
        and (np.diff(rates[10:]) < 0).all()
        and rates[55] == pytest.approx(0.5)
    )


# ---------------------------------------------------------------- who learns

def test_the_teacher_follows_and_has_no_gradient(encoder):
    state = Training(encoder.net, RECIPE, encoder.spec, encoder.dim, 'cpu')
    before = [p.clone() for p in state.teacher.parameters()]
    start = [p.clone() for p in state.student.parameters()]
    batch = next(iter(batches(data(encoder), RECIPE, range(1))))
    compute_loss(state.towers, state.heads, state.teacher, batch, RECIPE)
    assert all(p.grad is None for p in state.teacher.parameters()) and all(
        torch.equal(a, b) for a, b in zip(before, state.teacher.parameters())
    )
    with torch.no_grad(): [p.add_(1) for p in state.student.parameters()]
    state.teacher.update(state.student)
    for was, is_ in zip(start, state.teacher.parameters()):
        assert torch.allclose(is_, was + 1 - RECIPE.teacher, atol=1e-5)


def test_a_frozen_image_tower_stays(encoder):
    before = {n: p.clone() for n, p in encoder.net.visual.named_parameters()}
    text = read_text(encoder.net, torch.tensor([[49406, 320, 49407] + [0] * 13]))
    train_clip(encoder.net, data(encoder), replace(RECIPE, image_lr=0.0))
    moved = [n for n, p in encoder.net.visual.named_parameters() if not torch.equal(p, before[n])]
    assert all(n.startswith(('head', 'proj')) for n in moved) and not torch.equal(
        text, read_text(encoder.net, torch.tensor([[49406, 320, 49407] + [0] * 13]))
    )


def test_norms_keep_their_statistics(tmp_path):
    encoder = new_clip(CONV, tmp_path)
    before = encoder.net.visual.trunk.bn1.running_mean.clone()
    train_clip(encoder.net, data(encoder), RECIPE)
    assert torch.equal(before, encoder.net.visual.trunk.bn1.running_mean)
    train_clip(encoder.net, data(encoder), replace(RECIPE, freeze_norms=False))
    assert not torch.equal(before, encoder.net.visual.trunk.bn1.running_mean)
    with pytest.raises(Incompatible, match='batch norms'):
        train_clip(encoder.net, data(encoder), replace(RECIPE, freeze_norms=False, chunk=2))


@pytest.mark.parametrize('objectives', [(('itc', 1.0),), (('siglip', 1.0),), (('multi-positive', 1.0), ('patch-distill', 0.1)), (('itc', 0.5), ('local-global', 1.0))])
def test_every_objective_trains(encoder, objectives):
    recipe = replace(
        RECIPE,
        steps=30,
        objectives=objectives,
        large=1,
        plain=True,
        turns=False,
        lr=3e-3,
        small=2 if len(objectives) > 1 else 0,
    )
    curve = train_clip(encoder.net, data(encoder, recipe), recipe)
    assert curve.loss.tail(6).mean() < curve.loss.head(6).mean() and {n for n, _ in objectives} <= set(curve)


def test_regions_train_on_their_classes(encoder):
    table, open = world()
    kinds = [('road', 0), ('river', 1), ('field', 2)]
    boxes = [(0, 0, 0.5, 0.5), (0.2, 0.3, 1, 1)]
    table['regions'] = [
        tuple((*boxes[j], *kinds[(int(k[1:]) + j) % 3], '') for j in range(int(k[1:]) % 3)) for k in table.key
    ]
    recipe = replace(
        RECIPE, steps=30, lr=3e-3, objectives=(('itc', 0.1), ('region-category', 1.0)), large=1, plain=True
    )
    views = PairViews(table, recipe, encoder, open)
    batch = views.collate([views[0, i] for i in range(6)])
    assert (
        batch['region_ids'].shape == (6, 2)
        and sorted(batch['region_ids'][2].tolist()) == [0, 2]
        and batch['region_ids'][0].tolist() == [-1, -1]
    )
    curve = train_clip(copy.deepcopy(encoder.net), views, recipe)
    chunks = train_clip(copy.deepcopy(encoder.net), views, replace(recipe, chunk=3, steps=2))
    assert curve['region-category'].tail(6).mean() < curve['region-category'].head(6).mean() and np.isclose(
        curve.loss[0], chunks.loss[0], atol=1e-4
    )
    with pytest.raises(Incompatible, match='regions=True'):
        PairViews(table.drop(columns='regions'), recipe, encoder, open)


def test_bfloat16_trains_alike(encoder):
    one, half = (
        train_clip(copy.deepcopy(encoder.net), data(encoder), replace(RECIPE, steps=3, dtype=d))
        for d in ('float32', 'bfloat16')
    )
    assert np.allclose(one.loss, half.loss, rtol=0.05) and not np.array_equal(one.loss, half.loss)


# ---------------------------------------------------------------- faults

def test_another_recipe_or_other_pairs_are_refused(encoder, tmp_path):
    train_clip(copy.deepcopy(encoder.net), data(encoder), RECIPE, tmp_path, until=1)
    with pytest.raises(Incompatible, match='another recipe'):
        train_clip(copy.deepcopy(encoder.net), data(encoder), replace(RECIPE, lr=1e-5), tmp_path)
    with pytest.raises(Incompatible, match='another recipe'):
        train_clip(
            copy.deepcopy(encoder.net),
            PairViews(world(30)[0], RECIPE, encoder, world(30)[1]),
            RECIPE,
            tmp_path,
        )
    # how it is computed may change
    train_clip(copy.deepcopy(encoder.net), data(encoder), replace(RECIPE, chunk=4), tmp_path)


def test_faults_are_named(encoder):
    table, open = world()
    with pytest.raises(DataNotFound, match='no pairs'): PairViews(table.iloc[:0], RECIPE, encoder, open)
    with pytest.raises(Incompatible, match='lacks caption'):
        PairViews(table.drop(columns='caption'), RECIPE, encoder, open)
    with pytest.raises(Incompatible, match='batch of 100'):
        train_clip(encoder.net, data(encoder), replace(RECIPE, batch=100))
    with pytest.raises(Incompatible, match='share a batch'): batches(data(encoder), RECIPE, range(1), 0, 3)
    with torch.no_grad(): next(iter(encoder.net.visual.parameters())).fill_(float('nan'))
    with pytest.raises(Incompatible, match='broke off at step 0'):
        train_clip(encoder.net, data(encoder), RECIPE)


# ---------------------------------------------------------------- locked stems

@pytest.mark.parametrize('stages', [0, 3, 6])
def test_stem_and_rest_are_the_whole(tmp_path, stages):
    encoder = new_clip(CONV, tmp_path)
    stem, rest = cut_stem(encoder, stages)
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(
        nn.functional.normalize(rest.encode_image(stem(x)), dim=-1), encoder.encode_image(x).pooled, atol=1e-5
    )


def test_towers_that_cannot_be_cut(tmp_path):
    with pytest.raises(Incompatible, match='no stem'): cut_stem(new_clip(VIT, tmp_path/'v'))
    with pytest.raises(Incompatible, match='at least one|leave'): cut_stem(new_clip(CONV, tmp_path/'c'), 7)


def test_kept_views_are_views_and_go_on_after_a_break(tmp_path):
    encoder = new_clip(CONV, tmp_path/'net')
    stem, rest = cut_stem(encoder, 4)
    table, open = world()
    recipe = replace(RECIPE, small_size=24)
    calls = []
    def breaks(row):
        calls.append(row['key'])
        if len(calls) == 20: raise KeyboardInterrupt
        return open(row)
    with pytest.raises(KeyboardInterrupt): StemViews(table, recipe, encoder, stem, tmp_path/'a', open=breaks)
    one, two = (StemViews(table, recipe, encoder, stem, tmp_path/f, open=open) for f in 'ab')
    assert all(np.array_equal(one.files[k], two.files[k]) for k in ('large', 'small'))
    fresh = PairViews(table, replace(recipe, large=3, small=4), encoder, open)[0, 5]
    assert np.allclose(one.files['large'][5], stem(fresh['large']).numpy(), atol=1e-2, rtol=1e-2)
    calls.clear()
    StemViews(table, recipe, encoder, stem, tmp_path/'b', open=breaks)
    assert not calls                                                       # all is there already
    train_clip(rest, one, recipe)


def test_saved_weights_come_back(tmp_path):
    encoder = new_clip(CONV, tmp_path)
    ids = set(encoder.tokenizer(['a road near a river'])[0].tolist())
    save_clip(encoder, tmp_path, ids)
    again = load_encoder(tmp_path)
    assert torch.allclose(again.encode_text(['a road']), encoder.encode_text(['a road']), atol=2e-3)
    assert torch.allclose(
        again.encode_image(torch.full((1, 3, 32, 32), 0.3)).pooled,
        encoder.encode_image(torch.full((1, 3, 32, 32), 0.3)).pooled,
        atol=2e-3,
    )
    assert (again.net.text.token_embedding.weight.abs().sum(1) > 0).sum() == len(ids)
