"""Towers: patches against a loop-written reference, tokens against the pooled sentence, texts of 248 tokens."""
import copy, math

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from rssqa.clip.checkpoints import lengthen
from rssqa.core import Incompatible, UnknownName
from rssqa.clip.encoders import _net
from rssqa.clip.towers import DENSE_MODES, dense_map, long_clip, positions, text_pool, text_tokens

VISION = dict(image_size=32, patch_size=8, width=32, head_width=16, layers=2)
TEXT = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=2)
CFG = dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)
MOBILE = dict(timm_model_name='mobilenetv2_050', timm_pool='avg', timm_proj='linear', image_size=64)
RESNET = dict(image_size=64, layers=[1, 1, 1, 1], width=8, patch_size=None)


def random_net(block='custom', seed=0, **changes):
    torch.manual_seed(seed)
    net = _net(CFG | changes, block)
    for p in net.parameters(): p.add_(0.1 * torch.randn_like(p))
    return net


@pytest.fixture
def x(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# patches --------------------------------------------------------------------------------------------------------------

def norm(x, ln): # layer norm of one vector, by hand
    x = np.asarray(x, np.float64)
    return (x - x.mean()) / math.sqrt(
        x.var() + ln.eps
    ) * ln.weight.double().numpy() + ln.bias.double().numpy()


def softmax(a):
    e = np.exp(a - a.max())
    return e / e.sum()


def reference(visual, x, mode): # (N,D,h,w), by loops over images, heads and positions
    state = {k: v.double().numpy() for k, v in visual.transformer.resblocks[-1].state_dict().items()}
    block = visual.transformer.resblocks[-1]
    before = visual._embeds(x)
    for b in list(visual.transformer.resblocks)[:-1]: before = b(before)
    n, length, width = before.shape
    heads = block.attn.num_heads
    d = width // block.attn.num_heads
    out = np.zeros((n, 16, *visual.grid_size))
    act = (
        torch.nn.functional.gelu
        if type(block.mlp.gelu).__name__ == 'GELU'
        else (lambda v: v * torch.sigmoid(1.702 * v))
    )
    for i in range(n):
        rows = before[i].double().numpy()
        qkv = [state['attn.in_proj_weight'] @ norm(r, block.ln_1) + state['attn.in_proj_bias'] for r in rows]
        for t in range(1, length):
            mixed = []
            for h in range(heads):
                q, k, v = (
                    [p[part * width + h * d : part * width + (h + 1) * d] for p in qkv] for part in range(3)
                )
                def attend(a, b):
                    return softmax(np.array([a[t] @ b[j] for j in range(length)]) / math.sqrt(d))
                weights = dict(
                    vanilla=lambda: attend(q, k),
                    maskclip=lambda: np.eye(length)[t],
                    clearclip=lambda: attend(q, q),
                    sclip=lambda: attend(q, q) + attend(k, k),
                    segearth=lambda: attend(q, q) + attend(k, k) + attend(v, v),
                )[mode]()
                mixed.append(sum(w * row for w, row in zip(weights, v)))
            y = state['attn.out_proj.weight'] @ np.concatenate(mixed) + state['attn.out_proj.bias']
            if mode in ('vanilla', 'sclip'):
                y = y + rows[t]
                hidden = act(
                    torch.from_numpy(state['mlp.c_fc.weight'] @ norm(y, block.ln_2) + state['mlp.c_fc.bias'])
                ).numpy()
                y = y + state['mlp.c_proj.weight'] @ hidden + state['mlp.c_proj.bias']
            row, column = divmod(t - 1, visual.grid_size[1])
            out[i, :, row, column] = norm(y, visual.ln_post) @ visual.proj.double().numpy()
    return out


@pytest.mark.parametrize('mode', DENSE_MODES)
@pytest.mark.parametrize('block, quick', [('custom', True), ('default', False)])
def test_every_mode_is_the_formula(mode, block, quick, x):
    visual = random_net(block, quick_gelu=quick).visual
    assert np.abs(dense_map(visual, x, mode).numpy() - reference(visual, x, mode)).max() < 1e-4


def test_modes_differ(x):
    maps = [F.normalize(dense_map(random_net().visual, x, m), dim=1) for m in DENSE_MODES]
    assert min((a - b).abs().max().item() for i, a in enumerate(maps) for b in maps[:i]) > 0.01


@pytest.mark.parametrize('mode', DENSE_MODES)
def test_the_picture_vector_does_not_change(mode, x):
    net = random_net()
    before = net.encode_image(x)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    dense_map(net.visual, x, mode)
    assert torch.equal(net.encode_image(x), before) and all(
        torch.equal(v, weights[k]) for k, v in net.state_dict().items()
    )


def test_vanilla_is_open_clips_own_last_map(x):
    visual = random_net().visual
    own = visual.forward_intermediates(x, indices=1, normalize_intermediates=True)['image_intermediates'][0]
    assert torch.allclose(dense_map(visual, x, project=False), own, atol=1e-5)
    assert torch.allclose(dense_map(visual, x), torch.einsum('nchw,cd->ndhw', own, visual.proj), atol=1e-5)


@pytest.mark.parametrize('mode', DENSE_MODES)
def test_a_transposed_picture_gives_a_transposed_map(mode, x):
    visual = random_net().visual
    visual.positional_embedding.zero_()
    visual.conv1.weight.add_(visual.conv1.weight.transpose(2, 3).clone())
    one = dense_map(visual, x, mode)
    other = dense_map(visual, x.transpose(2, 3), mode)
    assert torch.allclose(other, one.transpose(2, 3), atol=1e-5) and not torch.allclose(other, one, atol=1e-3)


def test_a_mark_shows_where_it_is(x):
    visual = random_net().visual
    mark = x.clone()
    mark[:, :, 8:16, 24:] += 3                                         # row 1, column 3
    moved = (dense_map(visual, mark, 'maskclip') - dense_map(visual, x, 'maskclip')).norm(dim=1)
    assert moved.flatten(1).argmax(1).tolist() == [7, 7]


def test_the_dense_branch_ignores_the_last_mlp(x):
    net = random_net()
    kept = {m: dense_map(net.visual, x, m) for m in DENSE_MODES}
    net.visual.transformer.resblocks[-1].mlp.c_fc.weight.mul_(3)
    changed = {m for m in DENSE_MODES if not torch.equal(kept[m], dense_map(net.visual, x, m))}
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


@pytest.mark.parametrize('vision, mode, found', [(MOBILE, 'sclip', 'convolutional'), (RESNET, 'vanilla', "mode='maskclip'"), (RESNET, 'segearth', 'convolutional'),
                                                 (VISION | dict(attentional_pool=True, attn_pooler_heads=2), 'clearclip', 'learned queries')])
def test_what_a_tower_cannot_give_is_refused(vision, mode, found):
    side = vision['image_size']
    with pytest.raises(Incompatible, match=found):
        dense_map(random_net(vision_cfg=vision).visual, torch.randn(1, 3, side, side), mode)


def test_timm_transformers_and_unknown_modes_are_refused(x):
    vit = random_net(
        vision_cfg=dict(
            timm_model_name='vit_tiny_patch16_224', timm_pool='avg', timm_proj='linear', image_size=224
        )
    ).visual
    with pytest.raises(Incompatible, match='transformer of timm'): dense_map(vit, torch.randn(1, 3, 224, 224))
    with pytest.raises(UnknownName, match='segearth'): dense_map(random_net().visual, x, 'seg-earth')


# tokens ---------------------------------------------------------------------------------------------------------------

WORDS = ['a harbour with many boats', 'forest', 'a ' * 100]


@pytest.mark.parametrize('changes', [{}, dict(custom_text=True), dict(custom_text=True, text_cfg=TEXT | dict(pool_type='eos', eos_id=49407)), dict(text_cfg=TEXT | dict(proj_bias=True))],
                         ids=['clip', 'custom', 'eos', 'bias'])
def test_pooling_the_tokens_gives_the_sentence(changes):
    net = random_net(**changes)
    tokens = open_clip.get_tokenizer('ViT-B-32')(WORDS)
    features, mask = text_tokens(net, tokens)
    assert features.shape == (3, 77, 16) and mask.sum(1).tolist() == [7, 3, 77]
    assert torch.allclose(text_pool(net, features, mask), net.encode_text(tokens), atol=1e-5)


def test_towers_with_other_pooling_keep_their_mask_and_refuse_the_last_position():
    net = random_net(custom_text=True, text_cfg=TEXT | dict(embed_cls=True))
    tokens = open_clip.get_tokenizer('ViT-B-32')(WORDS)
    features, mask = text_tokens(net, tokens)
    assert features.shape == (3, 77, 16)
    with pytest.raises(Incompatible, match='rule of its own'): text_pool(net, features, mask)


def test_words_after_a_token_do_not_reach_it():
    "A text tower of CLIP looks back only."
    net = random_net()
    tokenizer = open_clip.get_tokenizer('ViT-B-32')
    one, other = (text_tokens(net, tokenizer([t]))[0][0] for t in ('a town by a river', 'a town by a forest'))
    assert torch.allclose(one[:5], other[:5], atol=1e-6) and not torch.allclose(one[5], other[5], atol=1e-3)


# 248 tokens -----------------------------------------------------------------------------------------------------------

def long_net(state, length=248):
    net = long_clip()(**CFG | dict(text_cfg=TEXT | dict(context_length=length))).eval().requires_grad_(False)
    net.load_state_dict(state)
    return net


def test_a_long_clip_goes_there_and_back(tmp_path):
    state = lengthen(random_net().state_dict())
    state['positional_embedding_res'] = state['positional_embedding_res'] + 0.1 * torch.randn(248, 16)
    torch.save(long_net(state).state_dict(), tmp_path/'w.pt')
    again = torch.load(tmp_path/'w.pt', weights_only=True)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    assert isinstance(long_net(again), open_clip.CLIP) and list(again)[:1] == ['positional_embedding']


def test_short_sentences_keep_their_vector_and_long_ones_are_read():
    net = random_net()
    long = long_net(lengthen(net.state_dict()))
    tokenizer = open_clip.get_tokenizer('ViT-B-32', context_length=248)
    words = ['forest', 'a harbour with many boats beside a road and a row of houses']
    assert torch.allclose(
        long.encode_text(tokenizer(words)),
        net.encode_text(open_clip.get_tokenizer('ViT-B-32')(words)),
        atol=1e-5,
    )
    ends = [' '.join(['road'] * 120 + [end]) for end in ('forest', 'harbour')]
    assert F.cosine_similarity(*(long.encode_text(tokenizer([t])) for t in ends)).item() < 0.9999
    assert torch.equal(*(net.encode_text(open_clip.get_tokenizer('ViT-B-32')([t])) for t in ends))


def test_the_formula_of_the_two_tables():
    state = lengthen(random_net().state_dict())
    state['positional_embedding_res'] = torch.randn(248, 16)
    table = positions(long_net(state))
    assert torch.equal(table[:20], state['positional_embedding'][:20]) and torch.equal(
        table[20:], state['positional_embedding_res'][20:]
    )


def test_the_long_tower_reads_like_a_stock_tower_with_the_same_table():
    "Another way to the same numbers: fold both tables into one and give it to open_clip."
    state = lengthen(random_net().state_dict())
    state['positional_embedding_res'] = state['positional_embedding_res'] + torch.randn(248, 16)
    long = long_net(state)
    stock = (
        open_clip.CLIP(**CFG | dict(text_cfg=TEXT | dict(context_length=248))).eval().requires_grad_(False)
    )
    stock.load_state_dict(
        {k: v for k, v in state.items() if k not in ('positional_embedding_res', 'mask1', 'mask2')}
        | dict(positional_embedding=positions(long))
    )
    tokens = open_clip.get_tokenizer('ViT-B-32', context_length=248)(WORDS)
    assert torch.allclose(long.encode_text(tokens), stock.encode_text(tokens), atol=1e-5)
    assert torch.allclose(long.encode_text(tokens, normalize=True).norm(dim=1), torch.ones(3))
    features, mask = text_tokens(long, tokens)
    assert mask.sum(1).tolist() == [7, 3, 102] and torch.allclose(
        text_pool(long, features, mask), long.encode_text(tokens), atol=1e-6
    )


def test_paths_that_know_one_table_only_are_closed():
    long = long_net(lengthen(random_net().state_dict()))
    tokens = open_clip.get_tokenizer('ViT-B-32', context_length=248)(['forest'])
    with pytest.raises(Incompatible, match='one position table'): long.forward_intermediates(text=tokens)
    assert (
        'image_features' in long.forward_intermediates(image=torch.randn(1, 3, 32, 32))
        and len(long(torch.randn(1, 3, 32, 32), tokens)) == 3
    )
    assert copy.deepcopy(long).encode_text(tokens).shape == (1, 16)
