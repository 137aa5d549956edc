"""`rssqa clip`: from a corpus to a trained and measured encoder, each verb once, and its errors."""
import pandas as pd
import pytest
from typer.testing import CliRunner

from rssqa.clip.encoders import load_encoder
from rssqa.cli import app, main
from rssqa.core import write_json
from rssqa.testing.fake_corpora import fake_corpus

NET = dict(
    embed_dim=16,
    custom_text=True,
    vision_cfg=dict(
        timm_model_name='mobilenetv2_035',
        timm_model_pretrained=False,
        timm_pool='avg',
        timm_proj='linear',
        image_size=32,
    ),
    text_cfg=dict(context_length=32, vocab_size=49408, width=16, heads=2, layers=1),
)


def clip(verb, *words, **options): # -> what was printed
    command = ['clip', verb, *words]
    for name, value in options.items(): command += [f'--{name.replace("_", "-")}', value]
    done = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_from_a_corpus_to_an_encoder(tmp_path):
    shards = tmp_path/'shards'
    corpus = fake_corpus('rssqa-pairs', tmp_path/'corpus', n=16)
    assert 'captions' in clip('shards', 'rssqa-pairs', corpus, shards, per_shard=7)

    write_json(tmp_path/'net/open_clip_config.json', dict(model_cfg=NET))
    everything = dict(split='', workers=0)
    recipe = dict(steps=2, batch=4, objectives='itc, local-global:0.5', small=1)
    for _ in range(2):                                                   # the second call finds everything done
        printed = clip('train', shards, net=tmp_path/'net', out=tmp_path/'run', **recipe, **everything)
        assert 'loss' in printed and len(pd.read_csv(tmp_path/'run/curve.csv')) == 2
    assert load_encoder(str(tmp_path/'run')).dim == 16

    assert 'zero-shot' in clip('eval', tmp_path/'run', shards, split='', out=tmp_path/'eval.csv')
    assert len(pd.read_csv(tmp_path/'eval.csv'))

    clip('purify', shards, encoder=tmp_path/'run', out=tmp_path/'pure')
    table = pd.read_parquet(shards/'pairs.parquet')
    pure = pd.read_parquet(tmp_path/'pure/purified.parquet')
    assert 0 < len(pure) <= len(table) and set(pure.pair) <= set(table.pair)

    # paths of a purified table open from anywhere, and training can start_clip from an encoder
    purified = tmp_path/'pure/purified.parquet'
    assert 'loss' in clip('train', purified, net=tmp_path/'run', out=tmp_path/'more', steps=1, batch=2, **everything)


@pytest.mark.parametrize('words, message', [
    (('clip', 'shards', 'karpaty', '.', 'out'), 'karpathy'),
    (('clip', 'eval', 'tiny-clip', 'nowhere'), 'rssqa clip shards'),
])
def test_errors_end_with_code_two_and_a_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop: main(list(words))
    assert stop.value.code == 2 and message in capsys.readouterr().err
