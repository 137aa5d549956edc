"""How CLIP-RS-mini is trained: each stage once, variants from their tables, on a fake corpus with a smaller network."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import rssqa.bench.clip_rs_mini as module
from rssqa.bench.clip_rs_mini import (
    MASK_SOURCES, MINI_VARIANT, NET, average_weights, bench_clip, first_net, mask_captions, pivot_variants,
    train_variant, variant_recipe,
)
from rssqa.core import DataNotFound, UnknownName
from rssqa.testing.fake_corpora import fake_corpus

ROOT = Path(__file__).resolve().parents[1]
TINY = NET | dict(
    embed_dim=16,
    vision_cfg=NET['vision_cfg'] | dict(timm_model_name='mobilenetv2_035', image_size=32),
    text_cfg=dict(context_length=32, vocab_size=49408, width=16, heads=2, layers=1),
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "Folders of pairs, weights and runs, and variants that take one short epoch."
    import timm
    from safetensors.torch import save_file
    fake_corpus('rssqa-pairs', tmp_path/'pairs', n=24)
    (tmp_path/'weights').mkdir()
    weights = timm.create_model('mobilenetv2_035').state_dict()
    weights = {name: values.clone() for name, values in weights.items() if 'num_batches' not in name}
    save_file(weights, tmp_path/'weights/mobilenetv2_100_imagenet.safetensors')
    short = {name: settings | dict(epochs=1, start=False) for name, settings in module.CLIP_VARIANTS.items()}
    monkeypatch.setattr(module, 'RECIPE', replace(module.RECIPE, batch=2, small_size=32, prototypes=16))
    monkeypatch.setattr(module.first_net, '__defaults__', (0, False, TINY))
    monkeypatch.setattr(module, 'CLIP_VARIANTS', short)
    monkeypatch.setattr(module, 'STAGES', 3)
    return tmp_path/'pairs', tmp_path/'weights', tmp_path/'home'


@pytest.mark.parametrize('variant', ['ITC and self-distill', 'noise, purified'])
def test_a_variant_is_trained_once_and_measured(folders, variant, monkeypatch):
    measures = train_variant(variant, *folders)
    assert set(measures.task) >= {'zero-shot', 'crops'} and measures.value.between(0, 1).all()
    monkeypatch.setattr(module, '_train', None)                          # a second training fails
    pd.testing.assert_frame_equal(measures, train_variant(variant, *folders))


def test_the_table_of_results_has_all_variants_and_seeds(folders):
    table = bench_clip(*folders, [MINI_VARIANT, 'noise, as it is'], [0, 1])
    seeds = table.groupby('variant').seed.nunique().to_dict()
    assert seeds == {'CLIP-RS-mini': 1, MINI_VARIANT: 2, 'noise, as it is': 2}
    assert {'commit', 'command', 'n'} <= set(table)
    wide = pivot_variants(table)
    assert list(wide.index) == ['CLIP-RS-mini', MINI_VARIANT, 'noise, as it is'] and wide.notna().all().all()


def test_average_weights_are_the_mean(folders):
    import torch
    from rssqa.clip.encoders import load_encoder
    home = folders[2]
    for seed in 0, 1: train_variant(MINI_VARIANT, *folders, seed)
    runs = [home/f'{MINI_VARIANT} {seed}' for seed in (0, 1)]
    first, second = (load_encoder(str(run)).net.state_dict() for run in runs)
    mean = average_weights(runs, home/'mean').net.state_dict()
    names = [name for name, values in mean.items() if values.is_floating_point()]
    assert names
    for name in names:
        assert torch.allclose(mean[name], (first[name] + second[name]) / 2, atol=1e-3, rtol=1e-3)


def test_with_all_layers_free_every_layer_moves(folders, monkeypatch):
    from rssqa.clip.encoders import load_encoder
    pairs, weights, home = folders
    train_variant(MINI_VARIANT, *folders)
    start = home/f'{MINI_VARIANT} 0'
    settings = module.CLIP_VARIANTS['all layers free'] | dict(start=str(start), table='noise')
    monkeypatch.setitem(module.CLIP_VARIANTS, 'all layers free', settings)
    monkeypatch.setattr(module, 'FREE_SIZES', dict(large_size=48, small_size=32))
    train_variant('all layers free', *folders)
    before, after = (load_encoder(str(run)).net.state_dict() for run in (start, home/'all layers free 0'))
    stem = [name for name in before if name.startswith('visual.trunk') and 'conv' in name and name.endswith('weight')]
    assert stem and all(not before[name].equal(after[name]) for name in stem)
    statistics = [name for name in before if 'running' in name]
    assert statistics and all(before[name].equal(after[name]) for name in statistics)    # batch norms stay frozen
    table = bench_clip(*folders, ['all layers free'], [0])
    assert set(table.variant) == {'all layers free', module.FREE_MEAN}
    mean = load_encoder(str(home/module.FREE_MEAN)).net.state_dict()
    for name in stem: np.testing.assert_allclose(mean[name], (before[name] + after[name]) / 2, atol=1e-3)


def test_a_recipe_may_have_views_of_another_size(folders):
    from rssqa.clip.train import PairViews
    from rssqa.bench.clip_rs_mini import read_corpus
    pairs, weights, home = folders
    encoder = first_net(weights, home/'net')
    table = read_corpus(pairs)
    recipe = variant_recipe('all layers free', 0, len(table))
    item = PairViews(table, recipe, encoder)[0, 0]
    assert item['large'].shape[-1] == 144 and item['small'].shape[-1] == 72
    assert PairViews(table, variant_recipe(MINI_VARIANT, 0, len(table)), encoder)[0, 0]['large'].shape[-1] == 32


def test_unknown_variants_and_missing_weights_are_refused(tmp_path):
    with pytest.raises(UnknownName, match='(?i)did you mean ITC only'): variant_recipe('ITC onli', 0, 100)
    with pytest.raises(DataNotFound, match='mobilenetv2'): first_net(tmp_path, tmp_path/'net')


def test_masks_become_captions_within_their_split(tmp_path, folders):
    from rssqa.data.synthetic import write_scenes
    for name in MASK_SOURCES: write_scenes(tmp_path/name, 'town', 3, 32)
    train = mask_captions(tmp_path, 'train')
    assert train.pair.is_unique and set(train.key.str.split('/').str[0]) == set(MASK_SOURCES)
    assert (train.split == 'train').all() and train.caption.str.len().gt(5).all()
    # all scenes are for training
    assert len(train) == 72 and len(mask_captions(tmp_path, 'val')) == len(mask_captions(tmp_path, 'test')) == 0
    with pytest.raises(DataNotFound, match='tiles'): train_variant('ITC and local-global, with masks', *folders)


def test_committed_tables_are_those_of_the_specs():
    from rssqa.clip.specs import SPECS
    conformance = pd.read_csv(ROOT/'data/results/clip_conformance.csv')
    assert conformance.encoder.tolist() == [spec.name for spec in SPECS] and conformance.ok.all()
    assert conformance['format'].tolist() == [spec.format for spec in SPECS]
    probe = pd.read_csv(ROOT/'data/results/clip_probe.csv')
    assert probe.groupby('source').encoder.nunique().eq(3).all() and probe.accuracy.between(0, 1).all()
