"""The eight families: shapes, gradients, sizes, encoder weights, and their parts against plain references."""
import copy, os, pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from rssqa.core import DataNotFound, Incompatible, UnknownName, state_digest
from rssqa.segment.methods import blocks
from rssqa.segment.methods.logcan import ClassAttention, class_centres
from rssqa.segment.protocol import METHOD_NAMES, TorchSegmenter, check_segmenter, FeatureHooks, methods
from rssqa.data.synthetic import scene

real = pytest.mark.skipif(not os.environ.get('RSSQA_REAL'), reason='RSSQA_REAL is unset')
SIZES = ((64, 64), (96, 96), (128, 160))
ON_MOBILENET = ('unet', 'deeplabv3plus', 'pspnet', 'unetformer', 'logcan')
BUDGETS = dict(nano=(0.1, 0.7), tiny=(1.5, 6.5)) # millions of parameters, least and most
STANDARD = { # millions of parameters
    'unet': 24.4, 'deeplabv3plus': 26.7, 'pspnet': 29.8, 'upernet-swin': 36.7, 'segformer': 27.4,
    'unetformer': 11.7, 'ft-unetformer': 94.1, 'logcan': 28.1,
}
fixed = settings(max_examples=25, deadline=None)
map_sides = st.integers(1, 13)
window_sides = st.integers(1, 5)


@pytest.fixture(scope='module')
def nanos():
    torch.manual_seed(0)
    return {name: methods[name].build(5, 'nano') for name in METHOD_NAMES}


def millions(net): return sum(p.numel() for p in net.parameters()) / 1e6


# every method keeps the contract of a network

@pytest.mark.parametrize('name', METHOD_NAMES)
@pytest.mark.parametrize('train', (True, False))
def test_logits_have_the_size_of_the_input(nanos, name, train):
    net = copy.deepcopy(nanos[name]).train(train)
    for size in SIZES:
        for batch in (1, 2):
            with FeatureHooks(net, net.layers) as hooks: y = net(torch.randn(batch, 3, *size))
            decoder, encoder = hooks.features
            assert y.shape == (batch, 5, *size) and torch.isfinite(y).all()
            assert decoder.ndim == encoder.ndim == 4 and len(decoder) == len(encoder) == batch
            assert decoder.shape[-1] >= encoder.shape[-1] and encoder.shape[1] > decoder.shape[1]


@pytest.mark.parametrize('name', METHOD_NAMES)
def test_smallest_image_trains_alone(nanos, name):
    net = copy.deepcopy(nanos[name]).train()
    net(torch.randn(1, 3, 32, 32)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize('name', METHOD_NAMES)
def test_gradients_reach_every_parameter(nanos, name):
    net = copy.deepcopy(nanos[name]).train()
    y = torch.randint(0, 5, (2, 128, 128))
    F.cross_entropy(net(torch.randn(2, 3, 128, 128)), y).backward()
    unreached = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unreached


@pytest.mark.parametrize('name', METHOD_NAMES)
def test_keeps_the_segmenter_protocol(nanos, name):
    net = copy.deepcopy(nanos[name])
    net.train()
    net(torch.randn(2, 3, 64, 64))           # dropout and norms have been in use
    seg = check_segmenter(TorchSegmenter(net, tuple('abcde'), name=f'{name}.test'))
    assert seg.strides[1] in (16, 32) and seg.strides[0] in (1, 4, 16)


@pytest.mark.parametrize('name', METHOD_NAMES)
def test_copies_and_pickles_give_equal_logits(nanos, name):
    net = copy.deepcopy(nanos[name]).eval()
    x = torch.randn(1, 3, 64, 64)
    again = pickle.loads(pickle.dumps(net))
    fresh = methods[name].build(5, 'nano').eval()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(net(x), again(x)) and torch.equal(net(x), fresh(x))


@pytest.mark.parametrize('name', METHOD_NAMES)
def test_learns_a_few_scenes(name):
    torch.manual_seed(0)
    scenes = [scene('town', seed, 64) for seed in range(2)]
    x = torch.as_tensor(np.stack([s.image for s in scenes])) * 4 - 2
    y = torch.as_tensor(np.stack([s.mask for s in scenes]).astype(np.int64))
    net = methods[name].build(int(y[y < 255].max()) + 1, 'nano').train()
    optimiser = torch.optim.AdamW(net.parameters(), 4e-3)
    losses = []
    for _ in range(16):
        loss = F.cross_entropy(net(x), y, ignore_index=255)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


# sizes

@pytest.mark.parametrize('name', METHOD_NAMES)
def test_parameter_budgets(name):
    for preset, (least, most) in BUDGETS.items():
        assert least < millions(methods[name].build(6, preset)) < most, preset
    with torch.device('meta'): whole = millions(methods[name].build(6, 'standard'))
    assert whole == pytest.approx(STANDARD[name], abs=0.1)


def test_presets_of_all_methods_have_the_same_names():
    assert {tuple(methods[n].presets) for n in METHOD_NAMES} == {('nano', 'tiny', 'standard')}
    assert {methods[n].family for n in METHOD_NAMES} == {'CNN', 'transformer', 'hybrid'}
    assert all(methods[n].name == n for n in METHOD_NAMES)
    with pytest.raises(UnknownName, match='[Dd]id you mean nano'): methods['unet'].build(3, 'nan')


# encoder weights

def test_encoder_weights_load_into_networks_of_libraries_and_of_this_package(tmp_path):
    donor = blocks.timm_encoder('mobilenetv2_035', out_indices=5).net.state_dict()
    path = str(tmp_path/'w.safetensors')
    save_file(donor | {'classifier.weight': torch.zeros(10, 1280)}, path)
    for name in ON_MOBILENET:
        net = methods[name].build(5, 'nano', path)
        inner = net.encoder.net if hasattr(net.encoder, 'net') else net.encoder.model
        assert all(
            torch.equal(v, donor[k]) for k, v in inner.state_dict().items() if 'num_batches' not in k
        ), name


def test_names_of_a_swin_classifier_are_translated(tmp_path):
    import timm
    small = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    whole = timm.create_model('swin_tiny_patch4_window7_224', num_classes=3, **small)
    save_file(whole.state_dict(), tmp_path/'swin.safetensors')
    encoder = blocks.timm_encoder(
        'swin_tiny_patch4_window7_224', tmp_path / 'swin.safetensors', strict_img_size=False, **small
    )
    loaded = encoder.net.layers_2.blocks[0].mlp.fc1.weight
    assert torch.equal(loaded, whole.layers[2].blocks[0].mlp.fc1.weight)


def test_segformer_encoder_weights(tmp_path, nanos):
    path = str(tmp_path/'mit.safetensors')
    save_file(nanos['segformer'].encoder.mit.state_dict(), path)
    twin = methods['segformer'].build(3, 'nano', path)
    assert state_digest(twin.encoder.state_dict()) == state_digest(nanos['segformer'].encoder.state_dict())
    with pytest.raises(Incompatible, match='(?i)timm has no Mix Transformer'):
        methods['segformer'].build(3, 'nano', 'timm')


def test_foreign_encoder_weights_are_refused_untouched(tmp_path):
    net = blocks.timm_encoder('mobilenetv2_035').net
    before = state_digest(net.state_dict())
    wide = blocks.timm_encoder('mobilenetv2_100').net.state_dict()
    half = {k: v for i, (k, v) in enumerate(net.state_dict().items()) if i % 2}
    for state in (wide, half, {'x': torch.zeros(1)}):
        save_file(state, tmp_path/'w.safetensors')
        message = r'w\.safetensors.*Found \d+ of \d+ .*expected at least 90%.*Choose'
        with pytest.raises(Incompatible, match=message):
            blocks.load_encoder_weights(net, tmp_path/'w.safetensors')
    (tmp_path/'junk.safetensors').write_bytes(b'<html>not found</html>')
    with pytest.raises(Incompatible, match='(?i)not a safetensors file'):
        blocks.load_encoder_weights(net, tmp_path/'junk.safetensors')
    with pytest.raises(DataNotFound, match='no encoder weights nowhere'):
        blocks.load_encoder_weights(net, 'nowhere')
    assert state_digest(net.state_dict()) == before


@real
def test_imagenet_weights_load_into_every_tiny_hybrid():
    path = Path(os.environ['RSSQA_REAL'])/'weights'/'mobilenetv2_100_imagenet.safetensors'
    first = load_file(path)['conv_stem.weight'].float()
    for name in ON_MOBILENET:
        net = methods[name].build(6, 'tiny', str(path)).eval()
        inner = net.encoder.net if hasattr(net.encoder, 'net') else net.encoder.model
        assert torch.equal(inner.conv_stem.weight, first)
        assert torch.isfinite(net(torch.randn(1, 3, 64, 64))).all()
    with pytest.raises(Incompatible): blocks.timm_encoder('mobilenetv2_050', path)


# parts

@fixed
@given(st.integers(1, 3), st.integers(1, 4), map_sides, map_sides, window_sides, window_sides)
def test_windows_are_put_together_again(n, c, height, width, h, w):
    x = torch.randn(n, c, height, width)
    tokens = blocks.to_windows(x, (h, w))
    assert tokens.shape == (n, -(-height//h) * -(-width//w), h*w, c)
    assert torch.equal(blocks.from_windows(tokens, (h, w), (height, width)), x)


def test_windows_contain_neighbouring_pixels():
    x = torch.arange(24.).view(1, 1, 4, 6)
    assert blocks.to_windows(x, (2, 3))[0, :, :, 0].tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]


def test_window_attention_against_loops():
    torch.manual_seed(0)
    net = blocks.WindowAttention(8, 2, 3)
    x = torch.randn(1, 8, 3, 3)
    side = 3
    q, k, v = net.qkv(x)[0].flatten(1).T.view(9, 3, 2, 4).unbind(1)                      # each (T,heads,4)
    def offset(i, j): # number of the bias for tokens i and j
        rows = i // side - j // side + side - 1
        columns = i % side - j % side + side - 1
        return rows * (2 * side - 1) + columns
    expected = torch.zeros(9, 8)
    for head in range(2):
        for i in range(9):
            bias = [net.bias[head, offset(i, j)] for j in range(9)]
            share = torch.stack([q[i, head] @ k[j, head] / 2 + bias[j] for j in range(9)]).softmax(0)
            expected[i, 4*head:4*head+4] = sum(share[j] * v[j, head] for j in range(9))
    assert torch.allclose(net(x)[0].flatten(1).T, expected, atol=1e-5)


@fixed
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
def test_cross_mean_against_loops(height, width, length):
    x = torch.randn(1, 1, height, width)
    before = length // 2
    def strip(i, n): return [min(max(i - before + d, 0), n - 1) for d in range(length)] # repeats the edge
    expected = torch.zeros(height, width)
    for i, j in np.ndindex(height, width):
        vertical = x[0, 0, strip(i, height), j].mean()
        horizontal = x[0, 0, i, strip(j, width)].mean()
        expected[i, j] = vertical + horizontal
    assert torch.allclose(blocks.cross_mean(x, length)[0, 0], expected, atol=1e-5)


@fixed
@given(st.integers(1, 40), st.integers(1, 6), st.floats(0.1, 30))
def test_class_centres_stay_inside_the_features(pixels, classes, sharpness):
    x = torch.randn(pixels, 5)
    d = torch.randn(pixels, classes) * sharpness
    centres = class_centres(x, d)
    assert centres.shape == (classes, 5)
    assert (centres <= x.max(0).values + 1e-5).all() and (centres >= x.min(0).values - 1e-5).all()
    hard = class_centres(x, 1e4 * F.one_hot(torch.arange(pixels) % classes, classes).float())
    for c in range(min(classes, pixels)): assert torch.allclose(hard[c], x[c::classes].mean(0), atol=1e-4)


def test_class_attention_returns_mixtures_of_global_centres():
    torch.manual_seed(0)
    net = ClassAttention(8, 3, patches=2).eval()
    net.out = nn.Identity()
    x = torch.randn(1, 8, 7, 5)
    same = torch.randn(8)
    _, y = net(x, same.expand(1, 3, 8))
    assert torch.allclose(y[:, 8:], net.value(same).view(1, 8, 1, 1).expand(1, 8, 7, 5), atol=1e-5)
    assert torch.equal(y[:, :8], x)


def test_loss_of_auxiliary_logits_trains_the_rough_classification(nanos):
    net = copy.deepcopy(nanos['logcan']).train()
    logits, rough = net(torch.randn(2, 3, 64, 64), aux=True)
    assert [tuple(r.shape[1:]) for r in rough] == [(5, 2, 2), (5, 2, 2), (5, 4, 4), (5, 8, 8), (5, 16, 16)]
    sum(r.square().mean() for r in rough).backward()
    assert net.decoder.rough.weight.grad.abs().sum() > 0 and net.head[1].weight.grad is None


def test_a_single_value_leaves_running_statistics_alone():
    for norm in (nn.BatchNorm2d(4), blocks.timm_encoder('mobilenetv2_035').net.bn1.__class__(4)):
        with pytest.raises(ValueError): norm.train()(torch.randn(1, 4, 1, 1))
        blocks.safe_norms(norm).running_mean.fill_(2.)
        norm.num_batches_tracked.zero_()
        assert norm(torch.full((1, 4, 1, 1), 2.0)).abs().max() < 1e-6 and norm.training
        assert norm.num_batches_tracked == 0
        norm(torch.randn(1, 4, 3, 3))
        assert norm.num_batches_tracked == 1 and not norm.running_mean.eq(2).any()


def test_a_failing_norm_returns_to_train_mode():
    norm = blocks.safe_norms(nn.BatchNorm2d(4))
    with pytest.raises(RuntimeError): norm(torch.randn(1, 3, 1, 1))
    assert norm.training
