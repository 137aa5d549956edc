"""How CLIP-RS-mini is made: each stage once, variants from their tables, on a fake corpus with a smaller net."""
from dataclasses import replace

from pathlib import Path

import pandas as pd
import pytest

import rssqa.bench.clip_rs_mini as M
from rssqa.core import DataNotFound, UnknownName
from rssqa.testing.fake_corpora import fake_corpus

ROOT = Path(__file__).resolve().parents[1]
TINY = M.NET | dict(
    embed_dim=16,
    vision_cfg=M.NET['vision_cfg'] | dict(timm_model_name='mobilenetv2_035', image_size=32),
    text_cfg=dict(context_length=32, vocab_size=49408, width=16, heads=2, layers=1),
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file
    fake_corpus('rssqa-pairs', tmp_path/'pairs', n=24)
    (tmp_path/'weights').mkdir()
    save_file(
        {
            k: v.clone()
            for k, v in timm.create_model('mobilenetv2_035').state_dict().items()
            if 'num_batches' not in k
        },
        tmp_path / 'weights/mobilenetv2_100_imagenet.safetensors',
    )
    monkeypatch.setattr(M, 'RECIPE', replace(M.RECIPE, batch=2, small_size=32, prototypes=16))
    monkeypatch.setattr(M.first_net, '__defaults__', (0, False, TINY))
    monkeypatch.setattr(M, 'VARIANTS', {n: v | dict(epochs=1, start=False) for n, v in M.VARIANTS.items()})
    monkeypatch.setattr(M, 'STAGES', 3)
    return tmp_path


@pytest.mark.parametrize('variant', ['ITC and self-distill', 'noise, purified'])
def test_a_variant_is_made_once_and_measured(world, variant, monkeypatch):
    one = M.make(variant, world/'pairs', world/'weights', world/'home')
    assert set(one.task) >= {'zero-shot', 'crops'} and one.value.between(0, 1).all()
    monkeypatch.setattr(M, '_train', None)                               # whoever trains again fails
    pd.testing.assert_frame_equal(one, M.make(variant, world/'pairs', world/'weights', world/'home'))


def test_the_table_of_results(world):
    table = M.bench_clip(world/'pairs', world/'weights', world/'home', [M.MINI, 'noise, as it is'], [0, 1])
    assert table.groupby('variant').seed.nunique().to_dict() == {
        'CLIP-RS-mini': 1,
        M.MINI: 2,
        'noise, as it is': 2,
    } and {'commit', 'command', 'n'} <= set(table)
    assert (
        list(M.pivot(table).index) == ['CLIP-RS-mini', M.MINI, 'noise, as it is']
        and M.pivot(table).notna().all().all()
    )


def test_a_soup_is_the_mean(world):
    import torch
    from rssqa.clip.encoders import load_encoder
    for seed in 0, 1: M.make(M.MINI, world/'pairs', world/'weights', world/'home', seed)
    folders = [world/'home'/f'{M.MINI} {seed}' for seed in (0, 1)]
    one, two, mean = (
        *(load_encoder(str(f)).net.state_dict() for f in folders),
        M.average_weights(folders, world / 'average_weights').net.state_dict(),
    )
    assert all(
        torch.allclose(mean[k], (one[k] + two[k]) / 2, atol=1e-3, rtol=1e-3)
        for k in mean
        if mean[k].is_floating_point()
    )


def test_faults(tmp_path):
    with pytest.raises(UnknownName, match='(?i)did you mean ITC only'): M.recipe_of('ITC onli', 0, 100)
    with pytest.raises(DataNotFound, match='mobilenetv2'): M.first_net(tmp_path, tmp_path/'net')


def test_masks_speak_where_their_split_allows(tmp_path, world):
    from rssqa.data.synthetic import write_scenes
    for name in M.SPOKEN: write_scenes(tmp_path/name, 'town', 3, 32)
    parts = {split: M.spoken(tmp_path, split) for split in ('train', 'val', 'test')}
    train = parts['train']
    assert (
        train.pair.is_unique
        and set(train.key.str.split('/').str[0]) == set(M.SPOKEN)
        and (train.split == 'train').all()
        and train.caption.str.len().gt(5).all()
    )
    # all scenes are for training
    assert len(parts['val']) == len(parts['test']) == 0 and len(train) == 72
    with pytest.raises(DataNotFound, match='tiles'):
        M.make('ITC and local-global, with masks', world/'pairs', world/'weights', world/'home')


def test_committed_tables_are_those_of_the_specs():
    from rssqa.clip.specs import SPECS
    known = pd.read_csv(ROOT/'data/results/clip_conformance.csv')
    assert (
        known.encoder.tolist() == [s.name for s in SPECS]
        and known.ok.all()
        and known.container.tolist() == [s.container for s in SPECS]
    )
    probe = pd.read_csv(ROOT/'data/results/clip_probe.csv')
    assert probe.groupby('source').encoder.nunique().eq(3).all() and probe.accuracy.between(0, 1).all()
