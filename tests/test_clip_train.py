"""Training a CLIP: exact resume, chunks, processes that share a batch, a killed process, faults, views."""
import copy, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from rssqa.clip.train import CachedViews, ClipRecipe, PairViews, Training
from rssqa.clip.train import cut_view, cut_views, draw_box, batches, batch_positions
from rssqa.clip.train import compute_loss, export_clip, learning_rate_factor, new_clip, save_clip, train_clip
from rssqa.core import DataNotFound, Incompatible
from rssqa.clip.encoders import load_encoder
from rssqa.clip.cached_stem import StemViews, cut_stem
from rssqa.clip.objectives import caption_ids
from rssqa.clip.towers import read_text

TEXT = dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1)
MOBILENET = dict(timm_model_name='mobilenetv2_035', timm_model_pretrained=False, timm_pool='avg', timm_proj='linear',
                 image_size=32)
CONV = dict(embed_dim=16, custom_text=True, vision_cfg=MOBILENET, text_cfg=TEXT)
VIT = dict(
    embed_dim=16,
    vision_cfg=dict(image_size=32, patch_size=8, width=16, head_width=8, layers=2),
    text_cfg=TEXT,
)
WORDS = 'river field town forest harbour road lake desert bridge farm'.split()
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
TIMES = ['images_s', 'waited'] # columns of a curve that differ from run to run


def make_pairs(n=24, seed=0): # table of pairs, and a function that opens their images
    rng = np.random.default_rng(seed)
    images = {f'k{i:02}': rng.random((3, 40, 36), np.float32) for i in range(n)}
    rows = []
    for i, key in enumerate(images):
        rows += [dict(key=key, caption=f'a {WORDS[i % len(WORDS)]} number {j}') for j in range(1 + i % 3)]
    return pd.DataFrame(rows), lambda row: images[row['key']]


@pytest.fixture(params=[CONV, VIT], ids=['conv', 'vit'])
def encoder(request, tmp_path): return new_clip(request.param, tmp_path/'net')


def make_views(encoder, recipe=RECIPE, kind=PairViews):
    table, open = make_pairs()
    return kind(table, recipe, encoder, open)


def train_copy(encoder, recipe=RECIPE, *args, **kw): # the encoder's own net stays as it is
    return train_clip(copy.deepcopy(encoder.net), make_views(encoder, recipe), recipe, *args, **kw)


def weights(net): return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


# ---------------------------------------------------------------- the same curve

def test_resume_is_exact(encoder, tmp_path):
    whole_net = copy.deepcopy(encoder.net)
    whole = train_clip(whole_net, make_views(encoder), RECIPE)
    for until in 1, 2, 5: train_copy(encoder, RECIPE, tmp_path/'run', until=until)
    resumed_net = copy.deepcopy(encoder.net)
    resumed = train_clip(resumed_net, make_views(encoder), RECIPE, tmp_path/'run')
    assert whole.drop(columns=TIMES).equals(resumed.drop(columns=TIMES))
    assert torch.equal(weights(whole_net), weights(resumed_net))
    finished = train_copy(encoder, RECIPE, tmp_path/'run') # nothing is left to do
    assert finished.loss.tolist() == whole.loss.tolist()
    assert pd.read_csv(tmp_path/'run/curve.csv').step.tolist() == list(range(6))
    assert list((tmp_path/'run/board').glob('events*'))


class InterruptedViews(PairViews):
    def __getitem__(self, at):
        if at == (1, 7): raise KeyboardInterrupt
        return super().__getitem__(at)


def test_after_a_break_between_checkpoints_the_curve_is_the_same(encoder, tmp_path):
    whole = train_copy(encoder)
    with pytest.raises(KeyboardInterrupt):
        train_clip(copy.deepcopy(encoder.net), make_views(encoder, kind=InterruptedViews), RECIPE, tmp_path)
    assert train_copy(encoder, RECIPE, tmp_path).loss.tolist() == whole.loss.tolist()


@pytest.mark.parametrize('chunk', [1, 3, 8, 100])
def test_chunks_change_nothing(encoder, chunk):
    recipe = replace(RECIPE, steps=3)
    whole = train_copy(encoder, recipe)
    chunked = train_copy(encoder, replace(recipe, chunk=chunk))
    assert np.allclose(whole.loss, chunked.loss, atol=2e-4)


def test_workers_change_nothing(encoder):
    recipe = replace(RECIPE, steps=2)
    assert train_copy(encoder, recipe).loss.tolist() == train_copy(encoder, recipe, workers=2).loss.tolist()


SCRIPT = '''
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_clip_train import *

class KilledViews(PairViews):
    def __getitem__(self, at):
        if len(sys.argv) > 2 and os.environ['RANK'] == '1' and at[0] == 1: os._exit(13)
        return super().__getitem__(at)

folder = Path(sys.argv[1])
encoder = new_clip(CONV, folder/'net' if os.environ['RANK'] == '0' else folder/'net1')
train_clip(encoder.net, make_views(encoder, kind=KilledViews), RECIPE, folder, device='cpu')
'''


def torchrun(script, *args, n=2):
    env = {name: value for name, value in os.environ.items() if name not in ('RANK', 'WORLD_SIZE')}
    env |= dict(OMP_NUM_THREADS='1')
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}']
    command = launcher + [str(part) for part in (script, *args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def test_two_processes_give_the_curve_of_one_and_a_killed_one_resumes(tmp_path):
    script = tmp_path/'run.py'
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    encoder = new_clip(CONV, tmp_path/'net')
    alone = train_clip(encoder.net, make_views(encoder), RECIPE)
    killed = torchrun(script, tmp_path/'two', 'kill')
    assert killed.returncode, killed.stderr[-2000:]
    # an epoch has three steps, a checkpoint two
    assert len(pd.read_csv(tmp_path/'two/curve.csv')) == 2, killed.stderr[-2000:]
    resumed = torchrun(script, tmp_path/'two')
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    shared = pd.read_csv(tmp_path/'two/curve.csv')
    assert np.allclose(alone.loss, shared.loss, atol=1e-4)
    assert np.allclose(alone.gradient, shared.gradient, rtol=1e-3)


# ---------------------------------------------------------------- views and batches

def test_an_epoch_has_each_image_once_and_each_epoch_another_order():
    recipe = replace(RECIPE, batch=5)
    epochs = {0: [], 1: []}
    for step in range(8):
        for epoch, number in batch_positions(23, recipe, step): epochs[epoch].append(number)
    assert len(set(epochs[0])) == len(epochs[0]) == 20
    assert epochs[0] != epochs[1]
    assert batch_positions(23, replace(recipe, seed=1), 0) != batch_positions(23, recipe, 0)


def test_a_view_is_where_its_box_is():
    image = torch.zeros(3, 40, 40)
    image[0, :20, :20] = 1
    assert cut_view(image, (0, 0, 0.5, 0.5), 20)[0].min() == 1
    assert cut_view(image, (0.5, 0.5, 1, 1), 20).max() == 0


def test_views_of_8_bit_images_are_those_of_float_images():
    image = torch.zeros(3, 40, 40)
    image[0, :20, :20] = 1
    box = (0.1, 0.2, 0.8, 0.9)
    assert torch.allclose(cut_view((image * 255).byte(), box, 16), cut_view(image, box, 16), atol=0.02)


def test_a_view_is_turned_and_mirrored():
    image = torch.zeros(3, 40, 40)
    image[0, :20, :20] = 1
    quarter = cut_view(image, (0, 0, 1, 1), 40, 1)[0] # against the clock: the upper left corner moves down
    assert quarter[-1, 0] == 1 and quarter[0, 0] == 0
    corners = set()
    for turn in range(8):
        view = cut_view(image, (0, 0, 1, 1), 2, turn)[0]
        corners.add(tuple(np.argwhere(view.numpy() > 0.5)[0]))
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_boxes_keep_area_and_aspect():
    rng = np.random.default_rng(0)
    left, top, right, bottom = np.array([draw_box(rng, (0.05, 0.3)) for _ in range(500)]).T
    w = right - left
    h = bottom - top
    assert (w / h).max() <= 4 / 3 + 1e-9 and (w / h).min() >= 3 / 4 - 1e-9
    assert (w * h).min() < 0.07 and (w * h).max() > 0.28


@pytest.mark.parametrize('turn', range(8))
def test_many_views_at_once_are_the_views_one_by_one(turn):
    images = torch.rand(2, 3, 64, 64)
    boxes = torch.tensor([[[.25, .125, .75, .625], [0, 0, 1, 1]], [[.5, .5, 1, 1], [0, .25, .5, .75]]])
    views = cut_views(images, boxes, torch.full((2, 2), turn), 32)
    for i, j in ((0, 0), (1, 0), (1, 1)): # boxes of 32 pixels need no resizing
        one = cut_view(images[i], boxes[i, j].tolist(), 32, turn)
        assert torch.allclose(views[i, j], one, atol=1e-5)
    whole = torch.tensor([0, 0, 1, 1.0]).expand(2, 1, 4)
    views = cut_views(images, whole, torch.full((2, 1), turn), 64)[:, 0]
    one_by_one = torch.stack([cut_view(image, (0, 0, 1, 1), 64, turn) for image in images])
    assert torch.allclose(views, one_by_one, atol=1e-5)


def test_cached_views_are_the_same_views(encoder):
    recipe = replace(RECIPE, small_size=32)
    table, open = make_pairs()
    views = PairViews(table, recipe, encoder, open)
    cached = CachedViews(table, recipe, encoder, open=open)
    def third_epoch(data): return data.collate([data[3, i] for i in (0, 5, 2)])
    expected = third_epoch(views)
    batch = third_epoch(cached)
    assert set(batch) == set(expected)
    for name in batch: assert batch[name].shape == expected[name].shape
    assert torch.equal(batch['tokens'], expected['tokens']) and torch.equal(batch['ids'], expected['ids'])
    assert torch.allclose(batch['boxes'], expected['boxes'])
    assert (batch['large'] - expected['large']).abs().mean() < 0.15 # sampled without averaging
    assert torch.equal(batch['large'], third_epoch(cached)['large'])
    assert cached.mark == views.mark
    assert train_clip(encoder.net, cached, replace(recipe, steps=2)).loss.notna().all()


def test_equal_captions_have_equal_numbers_in_every_process():
    ids = caption_ids(['A  road', 'a road', 'a river', ''])
    assert ids[0] == ids[1] != ids[2] and ids[3] == -1
    code = "from rssqa.clip.objectives import caption_ids; print(caption_ids(['a road'])[0].item())"
    env = os.environ | dict(PYTHONHASHSEED='7')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert int(out.stdout) == ids[0]


def test_short_captions_read_the_same_without_padding(encoder):
    tokens = encoder.tokenizer(['a road', 'a long sentence about a town near a river', ''])
    assert torch.allclose(read_text(encoder.net, tokens), encoder.net.encode_text(tokens), atol=1e-6)


def test_learning_rate_rises_and_falls():
    recipe = replace(RECIPE, steps=100, warmup=10)
    factors = np.array([learning_rate_factor(step, recipe) for step in range(100)])
    assert np.allclose(np.diff(factors[:10]), 0.1)
    assert factors.argmax() in (9, 10)
    assert (np.diff(factors[10:]) < 0).all()
    assert factors[55] == pytest.approx(0.5)


# ---------------------------------------------------------------- what is trained

def test_the_teacher_follows_and_has_no_gradient(encoder):
    state = Training(encoder.net, RECIPE, encoder.spec, encoder.dim, 'cpu')
    before = [parameter.clone() for parameter in state.teacher.parameters()]
    start = [parameter.clone() for parameter in state.student.parameters()]
    batch = next(iter(batches(make_views(encoder), RECIPE, range(1))))
    compute_loss(state.towers, state.heads, state.teacher, batch, RECIPE)
    for was, parameter in zip(before, state.teacher.parameters()):
        assert parameter.grad is None and torch.equal(was, parameter)
    with torch.no_grad():
        for parameter in state.student.parameters(): parameter.add_(1)
    state.teacher.update(state.student)
    for was, parameter in zip(start, state.teacher.parameters()):
        assert torch.allclose(parameter, was + 1 - RECIPE.teacher, atol=1e-5)


def test_a_frozen_image_tower_stays(encoder):
    tokens = torch.tensor([[49406, 320, 49407] + [0] * 13])
    before = {name: parameter.clone() for name, parameter in encoder.net.visual.named_parameters()}
    text = read_text(encoder.net, tokens)
    train_clip(encoder.net, make_views(encoder), replace(RECIPE, image_lr=0.0))
    for name, parameter in encoder.net.visual.named_parameters():
        assert torch.equal(parameter, before[name]) or name.startswith(('head', 'proj'))
    assert not torch.equal(text, read_text(encoder.net, tokens))


def test_batch_norms_keep_their_statistics(tmp_path):
    encoder = new_clip(CONV, tmp_path)
    mean = encoder.net.visual.trunk.bn1.running_mean
    before = mean.clone()
    train_clip(encoder.net, make_views(encoder), RECIPE)
    assert torch.equal(before, encoder.net.visual.trunk.bn1.running_mean)
    free = replace(RECIPE, freeze_norms=False)
    train_clip(encoder.net, make_views(encoder), free)
    assert not torch.equal(before, encoder.net.visual.trunk.bn1.running_mean)
    with pytest.raises(Incompatible, match='batch norms'):
        train_clip(encoder.net, make_views(encoder), replace(free, chunk=2))


OBJECTIVES = [
    (('itc', 1.0),),
    (('siglip', 1.0),),
    (('multi-positive', 1.0), ('patch-distill', 0.1)),
    (('itc', 0.5), ('local-global', 1.0)),
]


@pytest.mark.parametrize('objectives', OBJECTIVES)
def test_every_objective_trains(encoder, objectives):
    small = 2 if len(objectives) > 1 else 0
    recipe = replace(RECIPE, objectives=objectives, steps=30, lr=3e-3, large=1, small=small, plain=True, turns=False)
    curve = train_clip(encoder.net, make_views(encoder, recipe), recipe)
    assert curve.loss.tail(6).mean() < curve.loss.head(6).mean()
    assert {name for name, _ in objectives} <= set(curve)


def add_regions(table): # none, one or two annotated boxes an image
    categories = [('road', 0), ('river', 1), ('field', 2)]
    boxes = [(0, 0, 0.5, 0.5), (0.2, 0.3, 1, 1)]
    regions = []
    for key in table.key:
        i = int(key[1:])
        regions.append(tuple((*boxes[j], *categories[(i + j) % 3], '') for j in range(i % 3)))
    return table.assign(regions=regions)


def test_regions_train_on_their_classes(encoder):
    table, open = make_pairs()
    objectives = (('itc', 0.1), ('region-category', 1.0))
    recipe = replace(RECIPE, steps=30, lr=3e-3, objectives=objectives, large=1, plain=True)
    views = PairViews(add_regions(table), recipe, encoder, open)
    ids = views.collate([views[0, i] for i in range(6)])['region_ids']
    assert ids.shape == (6, 2)
    assert sorted(ids[2].tolist()) == [0, 2] and ids[0].tolist() == [-1, -1]
    curve = train_clip(copy.deepcopy(encoder.net), views, recipe)
    assert curve['region-category'].tail(6).mean() < curve['region-category'].head(6).mean()
    chunked = train_clip(copy.deepcopy(encoder.net), views, replace(recipe, chunk=3, steps=2))
    assert np.isclose(curve.loss[0], chunked.loss[0], atol=1e-4)
    with pytest.raises(Incompatible, match='regions=True'): PairViews(table, recipe, encoder, open)


def test_bfloat16_trains_alike(encoder):
    recipe = replace(RECIPE, steps=3)
    full = train_copy(encoder, recipe)
    half = train_copy(encoder, replace(recipe, dtype='bfloat16'))
    assert np.allclose(full.loss, half.loss, rtol=0.05) and not np.array_equal(full.loss, half.loss)


# ---------------------------------------------------------------- faults

def test_another_recipe_or_other_pairs_are_refused(encoder, tmp_path):
    train_copy(encoder, RECIPE, tmp_path, until=1)
    with pytest.raises(Incompatible, match='another recipe'):
        train_copy(encoder, replace(RECIPE, lr=1e-5), tmp_path)
    table, open = make_pairs(30)
    with pytest.raises(Incompatible, match='another recipe'):
        train_clip(copy.deepcopy(encoder.net), PairViews(table, RECIPE, encoder, open), RECIPE, tmp_path)
    train_copy(encoder, replace(RECIPE, chunk=4), tmp_path) # how it is computed may change


def test_faults_are_named(encoder):
    table, open = make_pairs()
    with pytest.raises(DataNotFound, match='no pairs'): PairViews(table.iloc[:0], RECIPE, encoder, open)
    with pytest.raises(Incompatible, match='lacks caption'):
        PairViews(table.drop(columns='caption'), RECIPE, encoder, open)
    views = make_views(encoder)
    large_batch = replace(RECIPE, batch=100)
    with pytest.raises(Incompatible, match='batch of 100'): train_clip(encoder.net, views, large_batch)
    with pytest.raises(Incompatible, match='share a batch'): batches(views, RECIPE, range(1), 0, 3)
    with torch.no_grad(): next(iter(encoder.net.visual.parameters())).fill_(float('nan'))
    with pytest.raises(Incompatible, match='broke off at step 0'): train_clip(encoder.net, views, RECIPE)


# ---------------------------------------------------------------- frozen stems

@pytest.mark.parametrize('stages', [0, 3, 6])
def test_stem_and_rest_are_the_whole(tmp_path, stages):
    encoder = new_clip(CONV, tmp_path)
    stem, rest = cut_stem(encoder, stages)
    images = torch.rand(2, 3, 32, 32)
    vectors = nn.functional.normalize(rest.encode_image(stem(images)), dim=-1)
    assert torch.allclose(vectors, encoder.encode_image(images).pooled, atol=1e-5)


def test_towers_that_cannot_be_cut_are_refused(tmp_path):
    with pytest.raises(Incompatible, match='no stem'): cut_stem(new_clip(VIT, tmp_path/'v'))
    with pytest.raises(Incompatible, match='at least one|leave'): cut_stem(new_clip(CONV, tmp_path/'c'), 7)


def test_cached_maps_are_those_of_the_views_and_continue_after_a_break(tmp_path):
    encoder = new_clip(CONV, tmp_path/'net')
    stem, rest = cut_stem(encoder, 4)
    table, open = make_pairs()
    recipe = replace(RECIPE, small_size=24)
    calls = []
    def interrupted(row):
        calls.append(row['key'])
        if len(calls) == 20: raise KeyboardInterrupt
        return open(row)
    with pytest.raises(KeyboardInterrupt):
        StemViews(table, recipe, encoder, stem, tmp_path/'a', open=interrupted)
    continued = StemViews(table, recipe, encoder, stem, tmp_path/'a', open=open)
    whole = StemViews(table, recipe, encoder, stem, tmp_path/'b', open=open)
    for kind in ('large', 'small'): assert np.array_equal(continued.files[kind], whole.files[kind])
    views = PairViews(table, replace(recipe, large=3, small=4), encoder, open)[0, 5]
    assert np.allclose(continued.files['large'][5], stem(views['large']).numpy(), atol=1e-2, rtol=1e-2)
    calls.clear()
    StemViews(table, recipe, encoder, stem, tmp_path/'b', open=interrupted)
    assert not calls # all maps are there already
    train_clip(rest, continued, recipe)


def test_saved_weights_come_back(tmp_path):
    encoder = new_clip(CONV, tmp_path)
    ids = set(encoder.tokenizer(['a road near a river'])[0].tolist())
    save_clip(encoder, tmp_path, ids)
    again = load_encoder(tmp_path)
    image = torch.full((1, 3, 32, 32), 0.3)
    assert torch.allclose(again.encode_text(['a road']), encoder.encode_text(['a road']), atol=2e-3)
    assert torch.allclose(again.encode_image(image).pooled, encoder.encode_image(image).pooled, atol=2e-3)
    assert (again.net.text.token_embedding.weight.abs().sum(1) > 0).sum() == len(ids)


# ---------------------------------------------------------------- folders for open_clip

def open_plain(folder): # -> network, preparation of images, tokenizer
    import open_clip
    net, _, prepare = open_clip.create_model_and_transforms(f'local-dir:{folder}')
    return net.eval(), prepare, open_clip.get_tokenizer(f'local-dir:{folder}')


@torch.inference_mode()
def test_an_exported_encoder_opens_in_plain_open_clip(encoder, tmp_path):
    net, prepare, tokenizer = open_plain(export_clip(encoder, tmp_path/'export'))
    sentences = ['a road near a river', 'the harbour']
    texts = net.encode_text(tokenizer(sentences), normalize=True)
    assert torch.allclose(texts, encoder.encode_text(sentences), atol=5e-3)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    x = prepare(Image.fromarray(pixels))[None]
    own = encoder.encode_image(torch.as_tensor(pixels.transpose(2, 0, 1) / 255, dtype=torch.float32)[None])
    assert torch.allclose(net.encode_image(x, normalize=True), own.pooled, atol=5e-3)


@torch.inference_mode()
def test_the_shipped_encoder_is_the_same_in_plain_open_clip(tmp_path):
    own = load_encoder('clip-rs-mini')
    folder = export_clip('clip-rs-mini', tmp_path/'export')
    net, prepare, tokenizer = open_plain(folder)
    sentences = ['an airport with planes', 'houses beside a river']
    texts = net.encode_text(tokenizer(sentences), normalize=True)
    assert torch.allclose(texts, own.encode_text(sentences), atol=1e-5)
    pixels = np.random.default_rng(1).integers(0, 256, (300, 200, 3), np.uint8)
    x = prepare(Image.fromarray(pixels))[None]
    theirs = net.encode_image(x, normalize=True)
    image = torch.as_tensor(pixels.transpose(2, 0, 1) / 255, dtype=torch.float32)[None]
    assert (theirs * own.encode_image(image).pooled).sum() > 0.999      # PIL rounds resized pixels to bytes
    card = (folder/'README.md').read_text()
    assert 'research use' in card and 'never occurred in training' in card and card.startswith('---\nlibrary_name')


def test_an_export_overwrites_nothing(encoder, tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    with pytest.raises(Incompatible, match='(?i)choose a new folder'): export_clip(encoder, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ['notes.txt']


def test_a_network_without_texts_is_not_exported(tmp_path):
    blind = SimpleNamespace(name='blind')
    with pytest.raises(Incompatible, match='blind'): export_clip(blind, tmp_path/'export')
    assert not (tmp_path/'export').exists()
