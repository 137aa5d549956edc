"""Conformance: the table of tiny networks finds a loader that drops something."""
import pytest
import torch

import rssqa.clip.conformance as C
import rssqa.clip.encoders as E
from rssqa.clip.specs import SPECS
from rssqa.core import Incompatible, UnknownName, encoders


@pytest.mark.parametrize('spec', SPECS, ids=lambda s: s.name)
def test_the_tiny_net_is_of_the_same_kind(spec):
    import open_clip
    tiny = C._tiny_config(spec)
    published = open_clip.get_model_config(spec.architecture)
    for config in (tiny, published): assert ('hf_model_name' in config['text_cfg']) == spec.multilingual
    is_resnet = [isinstance(config['vision_cfg']['layers'], list) for config in (tiny, published)]
    assert is_resnet[0] == is_resnet[1]
    assert tiny['text_cfg'].get('context_length') == published['text_cfg'].get('context_length')
    assert 'quick_gelu' not in tiny


@pytest.mark.parametrize('name, grid, activation', [
    ('openai-vit-l-14', (16, 16), 'QuickGELU'),
    ('georsclip-vit-l-14-336', (24, 24), 'QuickGELU'),
    ('remoteclip-rn50', (7, 7), 'QuickGELU'),
    ('rs-m-clip', (7, 7), 'GELU'),
    ('georsclip-vit-h-14', (16, 16), 'GELU'),
])
def test_full_size_nets_are_read_without_their_memory(name, grid, activation):
    assert C._full_size(encoders[name]) == (activation, grid)


def test_a_changed_weight_shows_in_the_gap(monkeypatch):
    read = E.read_weights
    def careless(path):
        state = dict(read(path))
        state['visual.proj'] = state['visual.proj'] * 1.01
        state['visual.ln_post.bias'] = state['visual.ln_post.bias'] + 0.01
        return state
    monkeypatch.setattr(E, 'read_weights', careless)
    table = C.conformance(['clip-rs'])
    assert table.gap['clip-rs'] > 1e-5 and not table.ok['clip-rs']


def test_a_long_file_whose_second_table_is_dropped_is_found(monkeypatch):
    monkeypatch.setattr(E, 'is_long', lambda state: False)
    with pytest.raises(Incompatible, match='positional_embedding_res|248'):
        C.conformance(['farslip2-vit-b-32'])


def test_unknown_encoders_get_a_suggestion():
    with pytest.raises(UnknownName, match='clip-rs'): C.conformance(['clip-sr'])


def test_the_tiny_tokenizer_encodes_any_script(tmp_path):
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(str(C.tiny_multilingual(tmp_path)))
    for text in ('boats', 'гавань', '港口', 'القوارب'):
        ids = tok(text).input_ids
        assert ids[0] == 0 and ids[-1] == 2 and 3 not in ids and len(ids) == len(text.encode()) + 3


def test_activation_classes_are_distinguished():
    import open_clip
    gelu = torch.nn.GELU()
    quick = open_clip.transformer.QuickGELU()
    assert C.activation_of(torch.nn.Sequential(gelu)) == 'GELU' and C.activation_of(quick) == 'QuickGELU'
    assert C.activation_of(torch.nn.Sequential(gelu, quick)) == 'GELU, QuickGELU'
