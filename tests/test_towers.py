"""Towers: patches against a reference in loops, tokens against the pooled sentence, texts of 248 tokens."""
import copy, itertools, math

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from rssqa.clip.checkpoints import lengthen
from rssqa.core import Incompatible, UnknownName
from rssqa.clip.encoders import build_net
from rssqa.clip.towers import DENSE_MODES, dense_map, long_clip, positions, read_text, text_pool, text_tokens

VISION = dict(image_size=32, patch_size=8, width=32, head_width=16, layers=2)
TEXT = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=2)
CFG = dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)
MOBILE = dict(timm_model_name='mobilenetv2_050', timm_pool='avg', timm_proj='linear', image_size=64)
RESNET = dict(image_size=64, layers=[1, 1, 1, 1], width=8, patch_size=None)


def random_net(block='custom', seed=0, **changes):
    torch.manual_seed(seed)
    net = build_net(CFG | changes, block)
    for parameter in net.parameters(): parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.fixture
def x(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# patches ------------------------------------------------------------

def norm(x, ln): # layer norm of one vector, by hand
    x = np.asarray(x, np.float64)
    standardised = (x - x.mean()) / math.sqrt(x.var() + ln.eps)
    return standardised * ln.weight.double().numpy() + ln.bias.double().numpy()


def softmax(a):
    e = np.exp(a - a.max())
    return e / e.sum()


def attend(t, a, b): # attention of position t: softmax of a[t] · b[j] / √d over j
    d = len(a[t])
    return softmax(np.array([a[t] @ b[j] for j in range(len(b))]) / math.sqrt(d))


def attention_weights(mode, t, q, k, v): # weights of position t over all positions, the formulas of the table
    if mode == 'vanilla': return attend(t, q, k)
    if mode == 'maskclip': return np.eye(len(v))[t]
    if mode == 'clearclip': return attend(t, q, q)
    if mode == 'sclip': return attend(t, q, q) + attend(t, k, k)
    return attend(t, q, q) + attend(t, k, k) + attend(t, v, v)


def attention(block, rows, t, mode): # output of the attention of one block at position t, head by head
    state = {name: value.double().numpy() for name, value in block.state_dict().items()}
    qkv = [state['attn.in_proj_weight'] @ norm(row, block.ln_1) + state['attn.in_proj_bias'] for row in rows]
    heads = block.attn.num_heads
    width = len(rows[0])
    d = width // heads
    mixed = []
    for head in range(heads):
        parts = []
        for part in range(3):
            start = part * width + head * d
            parts.append([vector[start : start + d] for vector in qkv])
        weights = attention_weights(mode, t, *parts)
        mixed.append(sum(weight * value for weight, value in zip(weights, parts[2])))
    return state['attn.out_proj.weight'] @ np.concatenate(mixed) + state['attn.out_proj.bias']


def activate(block, hidden): # the activation of a block's MLP
    if type(block.mlp.gelu).__name__ == 'GELU': return F.gelu(torch.from_numpy(hidden)).numpy()
    return hidden / (1 + np.exp(-1.702 * hidden))


def mlp(block, y): # the MLP of one block for one vector
    state = {name: value.double().numpy() for name, value in block.state_dict().items()}
    hidden = state['mlp.c_fc.weight'] @ norm(y, block.ln_2) + state['mlp.c_fc.bias']
    return state['mlp.c_proj.weight'] @ activate(block, hidden) + state['mlp.c_proj.bias']


def reference(visual, x, mode): # (N,D,h,w), by loops over images, positions and heads
    *earlier, block = visual.transformer.resblocks
    before = visual._embeds(x)
    for b in earlier: before = b(before)
    projection = visual.proj.double().numpy()
    out = np.zeros((len(x), projection.shape[1], *visual.grid_size))
    for i in range(len(x)):
        rows = before[i].double().numpy()
        for t in range(1, len(rows)):
            y = attention(block, rows, t, mode)
            if mode in ('vanilla', 'sclip'):
                y = y + rows[t]
                y = y + mlp(block, y)
            row, column = divmod(t - 1, visual.grid_size[1])
            out[i, :, row, column] = norm(y, visual.ln_post) @ projection
    return out


@pytest.mark.parametrize('mode', DENSE_MODES)
@pytest.mark.parametrize('block, quick', [('custom', True), ('default', False)])
def test_every_mode_is_the_formula(mode, block, quick, x):
    visual = random_net(block, quick_gelu=quick).visual
    assert np.abs(dense_map(visual, x, mode).numpy() - reference(visual, x, mode)).max() < 1e-4


def test_modes_differ(x):
    maps = [F.normalize(dense_map(random_net().visual, x, mode), dim=1) for mode in DENSE_MODES]
    for a, b in itertools.combinations(maps, 2): assert (a - b).abs().max() > 0.01


@pytest.mark.parametrize('mode', DENSE_MODES)
def test_the_image_vector_does_not_change(mode, x):
    net = random_net()
    before = net.encode_image(x)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    dense_map(net.visual, x, mode)
    assert torch.equal(net.encode_image(x), before)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())


def test_vanilla_is_open_clips_own_last_map(x):
    visual = random_net().visual
    out = visual.forward_intermediates(x, indices=1, normalize_intermediates=True)
    last = out['image_intermediates'][0]
    assert torch.allclose(dense_map(visual, x, project=False), last, atol=1e-5)
    assert torch.allclose(dense_map(visual, x), torch.einsum('nchw,cd->ndhw', last, visual.proj), atol=1e-5)


@pytest.mark.parametrize('mode', DENSE_MODES)
def test_a_transposed_image_gives_a_transposed_map(mode, x):
    visual = random_net().visual
    visual.positional_embedding.zero_()
    visual.conv1.weight.add_(visual.conv1.weight.transpose(2, 3).clone())
    one = dense_map(visual, x, mode)
    other = dense_map(visual, x.transpose(2, 3), mode)
    assert torch.allclose(other, one.transpose(2, 3), atol=1e-5)
    assert not torch.allclose(other, one, atol=1e-3)


def test_a_mark_shows_where_it_is(x):
    visual = random_net().visual
    mark = x.clone()
    mark[:, :, 8:16, 24:] += 3                                         # row 1, column 3
    moved = (dense_map(visual, mark, 'maskclip') - dense_map(visual, x, 'maskclip')).norm(dim=1)
    assert moved.flatten(1).argmax(1).tolist() == [7, 7]


def test_the_dense_branch_ignores_the_last_mlp(x):
    net = random_net()
    before = {mode: dense_map(net.visual, x, mode) for mode in DENSE_MODES}
    net.visual.transformer.resblocks[-1].mlp.c_fc.weight.mul_(3)
    changed = {mode for mode in DENSE_MODES if not torch.equal(before[mode], dense_map(net.visual, x, mode))}
    assert changed == {'vanilla', 'sclip'}


def test_averaging_and_a_linear_head_may_be_swapped():
    visual = random_net(vision_cfg=MOBILE).visual
    x = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    maps = dense_map(visual, x)
    assert maps.shape == (2, 16, 3, 2) and torch.allclose(maps.mean((2, 3)), visual(x), atol=1e-5)
    assert torch.equal(dense_map(visual, x, project=False), visual.trunk.forward_features(x))


def test_a_resnet_projects_its_values():
    visual = random_net(vision_cfg=RESNET).visual
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = dense_map(visual, x, 'maskclip')
    pool = visual.attnpool
    raw = visual.forward_intermediates(x, indices=1)['image_intermediates'][0]
    expected = pool.c_proj(pool.v_proj(raw[1, :, 0, 1]))
    assert maps.shape == (2, 16, 2, 2) and torch.allclose(maps[1, :, 0, 1], expected, atol=1e-5)


POOLED_BY_QUERIES = VISION | dict(attentional_pool=True, attn_pooler_heads=2)


@pytest.mark.parametrize('vision, mode, found', [
    (MOBILE, 'sclip', 'convolutional'),
    (RESNET, 'vanilla', "mode='maskclip'"),
    (RESNET, 'segearth', 'convolutional'),
    (POOLED_BY_QUERIES, 'clearclip', 'learned queries'),
])
def test_what_a_tower_cannot_give_is_refused(vision, mode, found):
    side = vision['image_size']
    with pytest.raises(Incompatible, match=found):
        dense_map(random_net(vision_cfg=vision).visual, torch.randn(1, 3, side, side), mode)


@pytest.mark.parametrize('mode', ['vanilla', 'segearth'])
def test_timm_transformers_are_refused(mode):
    vision = dict(timm_model_name='vit_tiny_patch16_224', timm_pool='avg', timm_proj='linear', image_size=224)
    visual = random_net(vision_cfg=vision).visual
    with pytest.raises(Incompatible, match='transformer of timm'):
        dense_map(visual, torch.randn(1, 3, 224, 224), mode)


def test_unknown_modes_are_refused(x):
    with pytest.raises(UnknownName, match='segearth'): dense_map(random_net().visual, x, 'seg-earth')


# tokens ------------------------------------------------------------

WORDS = ['a harbour with many boats', 'forest', 'a ' * 100]


EOS_TEXT = TEXT | dict(pool_type='eos', eos_id=49407)


@pytest.mark.parametrize('changes', [
    pytest.param({}, id='clip'),
    pytest.param(dict(custom_text=True), id='custom'),
    pytest.param(dict(custom_text=True, text_cfg=EOS_TEXT), id='eos'),
    pytest.param(dict(text_cfg=TEXT | dict(proj_bias=True)), id='bias'),
])
def test_pooling_the_tokens_gives_the_sentence(changes):
    net = random_net(**changes)
    tokens = open_clip.get_tokenizer('ViT-B-32')(WORDS)
    features, mask = text_tokens(net, tokens)
    assert features.shape == (3, 77, 16) and mask.sum(1).tolist() == [7, 3, 77]
    assert torch.allclose(text_pool(net, features, mask), net.encode_text(tokens), atol=1e-5)
    assert torch.allclose(read_text(net, tokens), net.encode_text(tokens), atol=1e-5)


def test_towers_with_other_pooling_keep_their_mask_and_refuse_the_last_position():
    net = random_net(custom_text=True, text_cfg=TEXT | dict(embed_cls=True))
    tokens = open_clip.get_tokenizer('ViT-B-32')(WORDS)
    features, mask = text_tokens(net, tokens)
    assert features.shape == (3, 77, 16)
    with pytest.raises(Incompatible, match='rule of its own'): text_pool(net, features, mask)


def test_words_after_a_token_do_not_reach_it():
    "A text tower of CLIP is causal."
    net = random_net()
    tokenizer = open_clip.get_tokenizer('ViT-B-32')
    river, _ = text_tokens(net, tokenizer(['a town by a river']))
    forest, _ = text_tokens(net, tokenizer(['a town by a forest']))
    assert torch.allclose(river[0, :5], forest[0, :5], atol=1e-6)
    assert not torch.allclose(river[0, 5], forest[0, 5], atol=1e-3)


# 248 tokens ------------------------------------------------------------

def text_config(length): return CFG | dict(text_cfg=TEXT | dict(context_length=length))


def long_net(state, length=248):
    net = long_clip()(**text_config(length)).eval().requires_grad_(False)
    net.load_state_dict(state)
    return net


def test_a_long_clip_goes_there_and_back(tmp_path):
    state = lengthen(random_net().state_dict())
    state['positional_embedding_res'] = state['positional_embedding_res'] + 0.1 * torch.randn(248, 16)
    torch.save(long_net(state).state_dict(), tmp_path/'w.pt')
    again = torch.load(tmp_path/'w.pt', weights_only=True)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    assert isinstance(long_net(again), open_clip.CLIP) and list(again)[:1] == ['positional_embedding']


def test_short_sentences_keep_their_vector():
    net = random_net()
    long = long_net(lengthen(net.state_dict()))
    words = ['forest', 'a harbour with many boats beside a road and a row of houses']
    expected = net.encode_text(open_clip.get_tokenizer('ViT-B-32')(words))
    tokens = open_clip.get_tokenizer('ViT-B-32', context_length=248)(words)
    assert torch.allclose(long.encode_text(tokens), expected, atol=1e-5)


def test_long_sentences_are_read_to_their_end():
    net = random_net()
    long = long_net(lengthen(net.state_dict()))
    texts = [' '.join(['road'] * 120 + [end]) for end in ('forest', 'harbour')]
    forest, harbour = long.encode_text(open_clip.get_tokenizer('ViT-B-32', context_length=248)(texts))
    assert F.cosine_similarity(forest, harbour, dim=0) < 0.9999
    forest, harbour = net.encode_text(open_clip.get_tokenizer('ViT-B-32')(texts))
    assert torch.equal(forest, harbour)


def test_the_formula_of_the_two_tables():
    state = lengthen(random_net().state_dict())
    state['positional_embedding_res'] = torch.randn(248, 16)
    table = positions(long_net(state))
    assert torch.equal(table[:20], state['positional_embedding'][:20])
    assert torch.equal(table[20:], state['positional_embedding_res'][20:])


def test_the_long_tower_reads_like_a_stock_tower_with_the_same_table():
    "Another way to the same numbers: fold both tables into one and give it to open_clip."
    state = lengthen(random_net().state_dict())
    state['positional_embedding_res'] = state['positional_embedding_res'] + torch.randn(248, 16)
    long = long_net(state)
    stock = open_clip.CLIP(**text_config(248)).eval().requires_grad_(False)
    new_names = ('positional_embedding_res', 'mask1', 'mask2')
    folded = {name: value for name, value in state.items() if name not in new_names}
    stock.load_state_dict(folded | dict(positional_embedding=positions(long)))
    tokens = open_clip.get_tokenizer('ViT-B-32', context_length=248)(WORDS)
    expected = stock.encode_text(tokens)
    assert torch.allclose(long.encode_text(tokens), expected, atol=1e-5)
    assert torch.allclose(long.encode_text(tokens, normalize=True), F.normalize(expected, dim=1), atol=1e-5)
    features, mask = text_tokens(long, tokens)
    assert mask.sum(1).tolist() == [7, 3, 102]
    assert torch.allclose(text_pool(long, features, mask), long.encode_text(tokens), atol=1e-6)


def test_open_clip_paths_that_know_one_table_only_are_closed():
    long = long_net(lengthen(random_net().state_dict()))
    tokens = open_clip.get_tokenizer('ViT-B-32', context_length=248)(['forest'])
    image = torch.randn(1, 3, 32, 32)
    with pytest.raises(Incompatible, match='one position table'): long.forward_intermediates(text=tokens)
    assert 'image_features' in long.forward_intermediates(image=image)
    assert len(long(image, tokens)) == 3
    assert copy.deepcopy(long).encode_text(tokens).shape == (1, 16)
