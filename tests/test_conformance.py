"""Conformance: the table of tiny nets finds a loader that loses something."""
import pytest
import torch

import rssqa.clip.conformance as C
import rssqa.clip.encoders as E
from rssqa.core import Incompatible, UnknownName, encoders
from rssqa.clip.encoders import SPECS


@pytest.mark.parametrize('spec', SPECS, ids=lambda s: s.name)
def test_the_tiny_net_is_of_the_same_kind(spec, tmp_path):
    import open_clip
    cfg = C._tiny_config(spec)
    real = open_clip.get_model_config(spec.architecture)
    assert ('hf_model_name' in cfg['text_cfg']) == spec.multilingual == ('hf_model_name' in real['text_cfg'])
    assert isinstance(cfg['vision_cfg']['layers'], list) == isinstance(real['vision_cfg']['layers'], list)
    assert (
        cfg['text_cfg'].get('context_length') == real['text_cfg'].get('context_length')
        and 'quick_gelu' not in cfg
    )


@pytest.mark.parametrize('name, grid, activation', [('openai-vit-l-14', (16, 16), 'QuickGELU'), ('georsclip-vit-l-14-336', (24, 24), 'QuickGELU'), ('remoteclip-rn50', (7, 7), 'QuickGELU'),
                                                    ('rs-m-clip', (7, 7), 'GELU'), ('georsclip-vit-h-14', (16, 16), 'GELU')])
def test_full_size_nets_are_read_without_their_memory(name, grid, activation):
    assert C._full_size(encoders[name]) == (activation, grid)


def test_a_lost_weight_shows_in_the_gap(monkeypatch):
    def careless(path):
        return {
            k: t * 1.01 if k == 'visual.proj' else t + 0.01 if k == 'visual.ln_post.bias' else t
            for k, t in read(path).items()
        }
    read = E.read_weights
    monkeypatch.setattr(E, 'read_weights', careless)
    table = C.conformance(['clip-rs'])
    assert table.gap['clip-rs'] > 1e-5 and not table.ok['clip-rs']


def test_a_long_file_whose_second_table_is_dropped_is_seen(monkeypatch):
    monkeypatch.setattr(E, 'is_long', lambda state: False)
    with pytest.raises(Incompatible, match='positional_embedding_res|248'):
        C.conformance(['farslip2-vit-b-32'])


def test_unknown_encoders_get_a_suggestion():
    with pytest.raises(UnknownName, match='clip-rs'): C.conformance(['clip-sr'])


def test_the_tiny_tokenizer_spells_any_script(tmp_path):
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(str(C.tiny_multilingual(tmp_path)))
    for text in ('boats', 'гавань', '港口', 'القوارب'):
        ids = tok(text).input_ids
        assert ids[0] == 0 and ids[-1] == 2 and 3 not in ids and len(ids) == len(text.encode()) + 3


def test_activation_classes_are_told_apart():
    import open_clip
    assert (
        C.activation_of(torch.nn.Sequential(torch.nn.GELU())) == 'GELU'
        and C.activation_of(open_clip.transformer.QuickGELU()) == 'QuickGELU'
    )
    assert (
        C.activation_of(torch.nn.Sequential(torch.nn.GELU(), open_clip.transformer.QuickGELU()))
        == 'GELU, QuickGELU'
    )
