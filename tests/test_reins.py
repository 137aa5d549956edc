"""The adapter on a frozen transformer: order of operations by hand, identity, frozen weights, what is stored."""
import copy

import pytest
import torch
from torch import nn

from rssqa.core import Incompatible
from rssqa.domains.reins import (
    SCALE, FrozenSegFormer, LoRAReins, ReinsSegFormer, adapter_state, attach, head_spec, load_merged, merge_state,
    reins_parameters, spec,
)
from rssqa.segment.methods.segformer import NANO, SegFormer
from rssqa.segment.protocol import METHOD_NAMES, TorchSegmenter, check_segmenter, methods

K = 3


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def nano(kind=ReinsSegFormer, **options): return kind(K, **NANO, **options)


def set_scale(net, value):
    for adapter in net.reins: adapter.scale.data.fill_(value)


# ---------------------------------------------------------------- the adapter

def test_the_order_of_operations_by_hand():
    reins = LoRAReins(2, 4, tokens=3, rank=2, scale=0.5)
    features = torch.randn(2, 5, 4)
    tokens = reins.a[1] @ reins.b[1]
    expected = features.clone()
    for n in range(2):
        for place in range(5):
            f = features[n, place]
            attention = torch.exp(torch.stack([f @ t for t in tokens]) / 2)          # square root of the width
            attention = attention / attention.sum()
            mapped = [reins.of_tokens.weight @ t + reins.of_tokens.bias for t in tokens[1:]]
            change = sum(a * m for a, m in zip(attention[1:], mapped))
            change = reins.of_features.weight @ (change + f) + reins.of_features.bias
            expected[n, place] = f + 0.5 * change
    assert torch.allclose(reins(features, 1), expected, atol=1e-5)


def test_token_0_takes_part_in_the_softmax_and_adds_nothing():
    reins = LoRAReins(1, 4, tokens=2, rank=2, scale=1.0)
    nn.init.zeros_(reins.of_features.bias)
    nn.init.eye_(reins.of_features.weight)
    features = torch.randn(1, 3, 4)
    reins.a.data[0, 0] *= 1e4                          # all attention goes to token 0, or none
    looks_at_0 = (features @ reins.tokens(0)[0] > 0)[..., None]
    change = reins(features, 0) - features             # delta + f
    at_0 = (change - features)[looks_at_0.expand_as(change)]
    elsewhere = (change - features - reins.of_tokens(reins.tokens(0)[1]))[~looks_at_0.expand_as(change)]
    assert torch.allclose(at_0, torch.zeros_like(at_0), atol=1e-5)
    assert torch.allclose(elsewhere, torch.zeros_like(elsewhere), atol=1e-5)


def test_layers_have_tokens_of_their_own():
    reins = LoRAReins(2, 8)
    features = torch.randn(1, 4, 8)
    assert not torch.equal(reins(features, 0), reins(features, 1))
    assert reins.scale.item() == pytest.approx(SCALE) == pytest.approx(0.001)


@pytest.mark.parametrize('class_tokens', [0, 1, 5])
def test_scale_0_is_the_identity_and_class_tokens_are_left_alone(class_tokens):
    reins = LoRAReins(1, 8, scale=0.0)
    features = torch.randn(2, 9, 8)
    assert torch.equal(reins(features, 0, class_tokens), features)
    reins.scale.data.fill_(0.1)
    changed = reins(features, 0, class_tokens)
    assert torch.equal(changed[:, :class_tokens], features[:, :class_tokens])
    assert (changed[:, class_tokens:] != features[:, class_tokens:]).any(-1).all()


def test_places_do_not_look_at_each_other():
    reins = LoRAReins(1, 8, scale=0.1)
    features = torch.randn(1, 6, 8)
    order = torch.randperm(6)
    assert torch.allclose(reins(features[:, order], 0), reins(features, 0)[:, order], atol=1e-6)
    assert torch.allclose(reins(features[:, :2], 0), reins(features, 0)[:, :2], atol=1e-6)


@pytest.mark.parametrize('layers, width, tokens, rank', [(1, 4, 2, 1), (2, 32, 100, 16), (24, 1024, 100, 16)])
def test_parameters_are_counted(layers, width, tokens, rank):
    reins = LoRAReins(layers, width, tokens, rank)
    assert sum(p.numel() for p in reins.parameters()) == reins_parameters(layers, width, tokens, rank)


def test_parameters_of_the_paper(): assert reins_parameters(24, 1024) == 24 * 16 * 1124 + 2 * 1024 * 1025 + 1 == 2530817


@pytest.mark.parametrize('shape', [(2, 5, 9), (5, 8), (2, 8, 4, 4)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(Incompatible, match=r'expected \(N,L,8\)'): LoRAReins(1, 8)(torch.randn(shape), 0)


def test_a_layer_that_is_not_there_and_impossible_sizes_are_refused():
    with pytest.raises(Incompatible, match='Found layer 2, expected 0 to 1'): LoRAReins(2, 8)(torch.randn(1, 2, 8), 2)
    with pytest.raises(Incompatible, match='Found layer -1'): LoRAReins(2, 8)(torch.randn(1, 2, 8), -1)
    with pytest.raises(Incompatible, match='two tokens or more'): LoRAReins(1, 8, tokens=1)
    with pytest.raises(Incompatible, match='Found 0 layers'): LoRAReins(0, 8)


# ---------------------------------------------------------------- any transformer

def torch_layers(n=2):
    return nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(n))).eval()


def test_hooks_change_every_layer_and_can_be_removed():
    layers, reins, features = torch_layers(), LoRAReins(2, 8, scale=0.3), torch.randn(2, 5, 8)
    before = layers(features)
    expected = reins(layers[1](reins(layers[0](features), 0)), 1)
    handles = attach(layers, reins)
    assert torch.equal(layers(features), expected) and not torch.equal(expected, before)
    for handle in handles: handle.remove()
    assert torch.equal(layers(features), before)


class InTuple(nn.Module):
    def forward(self, x): return x + 1, 'attention'


def test_layers_that_give_tuples_keep_the_rest():
    layer, reins = InTuple(), LoRAReins(1, 8, scale=0.3)
    attach([layer], reins)
    features = torch.randn(1, 2, 8)
    changed, rest = layer(features)
    assert rest == 'attention' and torch.equal(changed, reins(features + 1, 0))


def test_an_adapter_of_other_width_or_depth_is_refused():
    with pytest.raises(Incompatible, match='Found 3 layers, expected 2'): attach(torch_layers(3), LoRAReins(2, 8))
    layers = torch_layers()
    attach(layers, LoRAReins(2, 16))
    with pytest.raises(Incompatible, match=r'expected \(N,L,16\)'): layers(torch.randn(1, 2, 8))


def test_dinov2_from_transformers():
    from transformers import Dinov2Config, Dinov2Model
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    model = Dinov2Model(config).eval().requires_grad_(False)
    x = torch.rand(1, 3, 28, 28)
    reins = LoRAReins(2, 16, scale=0.0)
    raw = {}
    model.encoder.layer[1].register_forward_hook(lambda *args: raw.update(before=args[2]))
    before = model(x).last_hidden_state
    attach(model.encoder.layer, reins, class_tokens=1)
    assert before.shape == (1, 1 + 16, 16) and torch.equal(model(x).last_hidden_state, before)
    reins.scale.data.fill_(0.5)
    after = model(x).last_hidden_state
    last_layer = raw['before']                          # of the adapted first layer, before the second adapter
    assert torch.allclose(after[:, 0], model.layernorm(last_layer)[:, 0]), 'the class token was changed'
    assert (after[:, 1:] - model.layernorm(last_layer)[:, 1:]).abs().max() > 1e-3
    after.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reins.parameters())
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- SegFormer

def test_scale_0_is_the_plain_segformer_bit_for_bit():
    plain, net = nano(SegFormer).eval(), nano(scale=0.0).eval()
    missing = net.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith('reins.') for name in missing)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(net(x), plain(x))
        set_scale(net, 0.2)
        assert not torch.allclose(net(x), plain(x), atol=1e-3)


def test_every_block_has_an_adapter():
    net = ReinsSegFormer(K, **NANO | dict(depths=[1, 2, 1, 3]))
    assert [(a.layers, a.width) for a in net.reins] == [(1, 16), (2, 32), (1, 64), (3, 96)]
    set_scale(net, 0.3)
    x = torch.rand(1, 3, 64, 64)
    whole = net.eval()(x)
    for adapter in net.reins:
        for layer in range(adapter.layers):
            kept = adapter.a.data.clone()
            adapter.a.data[layer] = 5.0
            assert not torch.equal(net(x), whole), 'an adapter without effect'
            adapter.a.data.copy_(kept)
    assert torch.equal(net(x), whole)


@pytest.mark.parametrize('kind', [FrozenSegFormer, ReinsSegFormer])
def test_training_leaves_the_encoder_bitwise_as_it_is(kind):
    net = kind(K, **NANO | dict(drop_path_rate=0.5)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimiser = torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1)
    x = torch.rand(2, 3, 64, 64)
    assert not any(module.training for module in net.encoder.modules()) and net.decoder.training
    for _ in range(2):
        optimiser.zero_grad()
        net(x).square().mean().backward()
        optimiser.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith('encoder.') for name in changed)
    assert {name.split('.')[0] for name in changed} >= {'decoder', 'classifier'}
    learned = {name for name in changed if name.startswith('reins.')}
    assert learned == {name for name in before if name.startswith('reins.')}


def test_only_adapter_and_head_are_stored_and_merging_restores_the_model():
    net = nano(scale=0.2).train()
    for _ in range(3): net(torch.rand(2, 3, 64, 64))       # running statistics of the head
    net.eval()
    state = adapter_state(net)
    assert {name.split('.')[0] for name in state} == {'reins', 'decoder', 'classifier'}
    assert not torch.equal(state['decoder.batch_norm.running_mean'], torch.zeros(48))
    torch.manual_seed(9)
    other = load_merged(nano().eval(), state, net.encoder.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode(): assert torch.equal(other(x), net(x))


def test_what_does_not_fit_is_refused():
    net = nano()
    with pytest.raises(Incompatible, match='a full model already'): merge_state(net.state_dict(), {})
    with pytest.raises(Incompatible, match='cannot merge'): load_merged(nano(), adapter_state(net), {})
    wider = ReinsSegFormer(K, **NANO | dict(hidden_sizes=[16, 32, 64, 120])).encoder.state_dict()
    with pytest.raises(Incompatible, match=r'(?s)cannot merge.*[Uu]se the encoder'):
        load_merged(nano(), adapter_state(net), wider)
    assert set(merge_state(dict(a=1), dict(b=2), 'backbone')) == {'a', 'backbone.b'}


def test_a_deep_copy_has_an_adapter_of_its_own():
    net = nano(scale=0.2).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        before = net(x)
        twin = copy.deepcopy(net)
        set_scale(twin, 0.0)
        assert torch.equal(net(x), before) and not torch.equal(twin(x), before)


def test_it_keeps_the_protocol_and_is_no_ninth_method():
    net = spec.build(K, 'nano')
    segmenter = check_segmenter(TorchSegmenter(net, tuple('abc'), net.layers, stride=net.stride))
    assert segmenter.strides == (4, 32)
    assert len(methods) == len(METHOD_NAMES) == 8 and spec.name not in methods
    assert not hasattr(head_spec.build(K, 'nano'), 'reins')
    with pytest.raises(Incompatible, match='Mix Transformer'): spec.build(K, 'nano', 'timm')


def test_encoder_weights_are_loaded_and_frozen(tmp_path):
    from safetensors.torch import save_file
    donor = nano(SegFormer)
    save_file({k: v.contiguous() for k, v in donor.encoder.mit.state_dict().items()}, tmp_path/'mit.safetensors')
    net = spec.build(K, 'nano', str(tmp_path/'mit.safetensors'))
    for name, value in net.encoder.mit.state_dict().items():
        assert torch.allclose(value, donor.encoder.mit.state_dict()[name])
    assert not any(p.requires_grad for p in net.encoder.parameters())
