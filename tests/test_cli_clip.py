"""`rssqa clip`: from a corpus to a trained and measured encoder, each verb once, and what it says of faults."""
import pandas as pd
import pytest
from typer.testing import CliRunner

from rssqa.cli import app, main
from rssqa.core import write_json
from rssqa.clip.encoders import load_encoder
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


def run(*words):
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_from_a_corpus_to_an_encoder(tmp_path):
    corpus = fake_corpus('rssqa-pairs', tmp_path/'corpus', n=16)
    assert 'captions' in run('clip', 'shards', 'rssqa-pairs', corpus, tmp_path/'shards', '--per-shard', 7)
    table = pd.read_parquet(tmp_path/'shards/pairs.parquet')
    write_json(tmp_path/'net/open_clip_config.json', dict(model_cfg=NET))
    for steps in 2, 2:                                                   # the second call finds everything done
        told = run(
            'clip',
            'train',
            tmp_path / 'shards',
            '--net',
            tmp_path / 'net',
            '--out',
            tmp_path / 'run',
            '--steps',
            steps,
            '--batch',
            4,
            '--split',
            '',
            '--workers',
            0,
            '--objectives',
            'itc, local-global:0.5',
            '--small',
            1,
        )
    assert 'loss' in told and len(pd.read_csv(tmp_path/'run/curve.csv')) == 2
    assert load_encoder(str(tmp_path/'run')).dim == 16
    assert 'zero-shot' in run(
        'clip', 'eval', tmp_path / 'run', tmp_path / 'shards', '--split', '', '--out', tmp_path / 'eval.csv'
    ) and len(pd.read_csv(tmp_path / 'eval.csv'))
    run('clip', 'purify', tmp_path/'shards', '--encoder', tmp_path/'run', '--out', tmp_path/'pure')
    pure = pd.read_parquet(tmp_path/'pure/purified.parquet')
    assert 0 < len(pure) <= len(table) and set(pure.pair) <= set(table.pair)
    begun = run(
        'clip',
        'train',
        tmp_path / 'pure/purified.parquet',
        '--net',
        tmp_path / 'run',
        '--out',
        tmp_path / 'more',
        '--steps',
        1,
        '--batch',
        2,
        '--split',
        '',
        '--workers',
        0,
    )
    # paths of a purified table open from anywhere, and an encoder is a start
    assert 'loss' in begun


@pytest.mark.parametrize('words, said', [(('clip', 'shards', 'karpaty', '.', 'out'), 'karpathy'), (('clip', 'eval', 'tiny-clip', 'nowhere'), 'rssqa clip shards')])
def test_faults_end_with_two_and_a_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(list(words))
    assert e.value.code == 2 and said in capsys.readouterr().err
