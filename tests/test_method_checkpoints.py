"""Checkpoints of others: formats, prefixes, refusals, and mmsegmentation's layout against a plain reference."""
import pickle

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from rssqa.core import DataNotFound, Incompatible, SchemaError, state_digest
from rssqa.segment.methods import checkpoints as ck
from rssqa.segment.protocol import TorchSegmenter, check_segmenter, methods

STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@pytest.fixture(scope='module')
def nano():
    torch.manual_seed(0)
    return methods['unetformer'].build(5, 'nano')


def fresh(classes=5): return methods['unetformer'].build(classes, 'nano')
def same(a, b): return state_digest(a.state_dict()) == state_digest(b.state_dict())


# checkpoint formats and prefixes

PREFIXES = ('module.', 'net.', 'model.', '_orig_mod.', 'model.net._orig_mod.')
WRAPPINGS = [('', None), ('', 'model_state_dict'), ('', 'model'), ('net.', None)]
WRAPPINGS += [(prefix, 'state_dict') for prefix in PREFIXES]


@pytest.mark.parametrize('prefix, key', WRAPPINGS)
def test_every_wrapping_opens(nano, tmp_path, prefix, key):
    state = {prefix + k: v for k, v in nano.state_dict().items()}
    if key: state = {key: state, 'epoch': 3, 'hyper_parameters': {'lr': 1e-3}}
    torch.save(state, tmp_path/'x.ckpt')
    assert same(ck.load_weights(fresh(), tmp_path/'x.ckpt'), nano)


def without_counters(net): return {k: v for k, v in net.state_dict().items() if 'num_batches' not in k}


def test_safetensors_nested_keys_and_other_entries(nano, tmp_path):
    save_file(without_counters(nano), tmp_path/'x.safetensors')
    other = {'state': {0: torch.zeros(3)}}
    torch.save({'model': {'state_dict': dict(nano.state_dict())}, 'optimizer': other}, tmp_path/'deep.pt')
    prefixed = {f'net.{k}': v for k, v in nano.state_dict().items()}
    prefixed |= {'loss.weight': torch.ones(5), 'net.aux_head.weight': torch.ones(2)}
    torch.save({'state_dict': prefixed}, tmp_path/'loss.ckpt')
    for name in ('x.safetensors', 'deep.pt', 'loss.ckpt'):
        net = ck.load_weights(fresh(), tmp_path/name)
        for key, value in without_counters(net).items():
            assert torch.equal(value, nano.state_dict()[key]), name


# refusals

def damage(kind, state):
    state = dict(state)
    key = 'decoder.enter.weight'
    if kind == 'missing': del state[key]
    if kind == 'shape': state[key] = state[key][:-1]
    if kind == 'extra': state['decoder.fourth.weight'] = torch.ones(3)
    if kind == 'renamed': state['decoder.entry.weight'] = state.pop(key)
    return state


@pytest.mark.parametrize('kind', ('missing', 'shape', 'extra', 'renamed'))
def test_one_wrong_tensor_is_enough_to_refuse(nano, tmp_path, kind):
    torch.save({f'model.{k}': v for k, v in damage(kind, nano.state_dict()).items()}, tmp_path/'x.pt')
    net = fresh()
    before = state_digest(net.state_dict())
    with pytest.raises(Incompatible) as e: ck.load_weights(net, tmp_path/'x.pt')
    message = str(e.value)
    total = sum('num_batches' not in k for k in net.state_dict())
    assert state_digest(net.state_dict()) == before
    assert f'ound {total - (kind != "extra")} of {total} tensors' in message and 'x.pt' in message
    key, shape = 'decoder.enter.weight', 'expected (32, 112, 1, 1)'
    if kind == 'extra': key, shape = 'decoder.fourth.weight', 'found (3,), expected nothing'
    assert key in message and shape in message and ('found (31, 112, 1, 1)' in message) == (kind == 'shape')


def test_other_architectures_and_class_tables_are_refused(nano, tmp_path):
    torch.save(nano.state_dict(), tmp_path/'x.pt')
    unet = methods['unet'].build(5, 'nano')
    larger = methods['unetformer'].build(5, 'tiny')
    for net in (fresh(6), unet, larger, nn.Linear(3, 3)):
        with pytest.raises(Incompatible, match='first misfit is'): ck.load_weights(net, tmp_path/'x.pt')


def test_a_file_that_is_no_checkpoint_gives_a_clear_error(tmp_path):
    with pytest.raises(DataNotFound, match='gone.pt'): ck.read_state(tmp_path/'gone.pt')
    for name in ('page.pt', 'page.safetensors'):
        (tmp_path/name).write_bytes(b'<html>')
        with pytest.raises(Incompatible, match='(?i)not a (checkpoint of plain tensors|safetensors file)'):
            ck.read_state(tmp_path/name)
    contents = [
        ({'epoch': 3}, 'a dictionary of epoch'), ([1, 2], 'list'), ({}, 'a dictionary of nothing'),
        ({'state_dict': {}}, 'a dictionary of nothing'),
    ]
    for content, found in contents:
        torch.save(content, tmp_path/'x.pt')
        with pytest.raises(Incompatible, match=f'(?i){found}'): ck.read_state(tmp_path/'x.pt')


class Bomb:
    def __reduce__(self): return exec, ('import rssqa; rssqa.exploded = True',)


def write_pickle(content, path): path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize('dump', (torch.save, write_pickle))
def test_no_code_runs_from_a_file(tmp_path, dump):
    import rssqa
    dump({'state_dict': {'a': torch.zeros(1)}, 'bomb': Bomb()}, tmp_path/'x.pt')
    with pytest.raises(Incompatible, match='state_dict alone'): ck.read_state(tmp_path/'x.pt')
    assert not hasattr(rssqa, 'exploded')


# segmentation-models-pytorch

def small_smp():
    options = dict(encoder_weights=None, activation='softmax2d', decoder_channels=(32, 16, 16, 8, 8))
    return smp.Unet('tu-mobilenetv2_035', classes=4, **options)


def test_smp_folder(tmp_path):
    torch.manual_seed(0)
    source = small_smp().eval()
    source.save_pretrained(tmp_path/'m')
    net = ck.load_smp(tmp_path/'m', classes=4).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(net(x).softmax(1), source(x), atol=1e-6)      # the folder asks for softmax
    check_segmenter(TorchSegmenter(net, tuple('abcd'), name='smp'))
    with pytest.raises(Incompatible, match='[Ff]ound 4 classes, expected 6'):
        ck.load_smp(tmp_path/'m', classes=6)
    torch.save({'state_dict': {f'model.{k}': v for k, v in source.state_dict().items()}}, tmp_path/'x.ckpt')
    assert same(ck.load_weights(small_smp(), tmp_path/'x.ckpt'), source)


def test_smp_faults(tmp_path):
    small_smp().save_pretrained(tmp_path/'m')
    config = (tmp_path/'m'/'config.json').read_text()
    (tmp_path/'m'/'config.json').write_text(config.replace('mobilenetv2_035', 'mobilenetv2_050'))
    with pytest.raises(Incompatible, match='first misfit is encoder'): ck.load_smp(tmp_path/'m')
    for other in ('"Nonet"', '"create_model"', '"__builtins__"'):
        (tmp_path/'m'/'config.json').write_text(config.replace('"Unet"', other))
        with pytest.raises(Incompatible, match='names no network'): ck.load_smp(tmp_path/'m')
    (tmp_path/'m'/'config.json').write_text(config[:20])
    with pytest.raises(SchemaError): ck.load_smp(tmp_path/'m')
    (tmp_path/'m'/'config.json').write_text(config)
    (tmp_path/'m'/'model.safetensors').unlink()
    with pytest.raises(DataNotFound, match='model.safetensors'): ck.load_smp(tmp_path/'m')
    with pytest.raises(DataNotFound): ck.load_smp(tmp_path/'nowhere')


# mmsegmentation: the layout of its files, written down from its configuration, not from our modules

def conv_bn(name, out, inp, k=3, conv='.conv', bn='.bn'):
    yield f'{name}{conv}.weight', (out, inp, k, k)
    for part in ('weight', 'bias', 'running_mean', 'running_var'): yield f'{name}{bn}.{part}', (out,)
    yield f'{name}{bn}.num_batches_tracked', ()


def backbone_layout(depth):
    for i, (inp, out) in zip((0, 3, 6), ((3, 32), (32, 32), (32, 64))):
        yield from conv_bn('backbone.stem', out, inp, 3, f'.{i}', f'.{i+1}')
    inp = 64
    grow = 1 if depth == 18 else 4
    for stage, blocks in enumerate(STAGES[depth]):
        mid = 64 * 2**stage
        for b in range(blocks):
            name = f'backbone.layer{stage+1}.{b}'
            shapes = ((mid, inp, 1), (mid, mid, 3), (mid * 4, mid, 1))
            if depth == 18: shapes = ((mid, inp, 3), (mid, mid, 3))
            for i, shape in enumerate(shapes): yield from conv_bn(name, *shape, f'.conv{i+1}', f'.bn{i+1}')
            if b == 0 and inp != mid * grow:
                yield from conv_bn(name, mid * grow, inp, 1, '.downsample.0', '.downsample.1')
            inp = mid * grow


def separable(name, out, inp):
    yield from conv_bn(f'{name}.depthwise_conv', inp, 1)
    yield from conv_bn(f'{name}.pointwise_conv', out, inp, 1)


def head_layout(head, depth, width, classes):
    deep, fine, thin = (512, 64, 12) if depth == 18 else (2048, 256, 48)
    h = 'decode_head'
    yield from ((f'{h}.conv_seg.weight', (classes, width, 1, 1)), (f'{h}.conv_seg.bias', (classes,)))
    if head == 'psp':
        for i in range(4): yield from conv_bn(f'{h}.psp_modules.{i}.1', width, deep, 1)
        yield from conv_bn(f'{h}.bottleneck', width, deep + 4 * width)
        return
    yield from conv_bn(f'{h}.image_pool.1', width, deep, 1)
    yield from conv_bn(f'{h}.aspp_modules.0', width, deep, 1)
    for i in (1, 2, 3): yield from separable(f'{h}.aspp_modules.{i}', width, deep)
    yield from conv_bn(f'{h}.bottleneck', width, 5 * width)
    yield from conv_bn(f'{h}.c1_bottleneck', thin, fine, 1)
    yield from separable(f'{h}.sep_bottleneck.0', width, width + thin)
    yield from separable(f'{h}.sep_bottleneck.1', width, width)


def aux_layout(depth, width, classes):
    yield 'auxiliary_head.conv_seg.weight', (classes, width, 1, 1)
    yield 'auxiliary_head.conv_seg.bias', (classes,)
    yield from conv_bn('auxiliary_head.convs.0', width, 256 if depth == 18 else 1024)


def fake_mmseg(head='psp', depth=18, width=32, classes=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    def make(name, shape):
        if not shape: return torch.tensor(7)
        if 'running_var' in name: return torch.rand(shape, generator=g) + 0.5
        fan_in = shape[1:].numel() if len(shape) > 1 else 1
        return torch.randn(shape, generator=g) * (2 / max(1, fan_in))**0.5
    layout = dict(backbone_layout(depth))
    layout |= dict(head_layout(head, depth, width, classes))
    layout |= dict(aux_layout(depth, width // 2, classes))
    return {name: make(name, torch.Size(shape)) for name, shape in layout.items()}


def saved(state, path, **meta):
    torch.save({'meta': {'mmseg_version': '1.2.2', 'CLASSES': ['a'], **meta}, 'state_dict': state}, path)
    return path


class Reference:
    "mmsegmentation's ResNet-18 networks as plain functions of the state dict, in its own names."
    def __init__(self, state): self.s = state
    def cb(self, x, name, conv='.conv', bn='.bn', act=True, **k):
        w = self.s[f'{name}{conv}.weight']
        y = F.conv2d(x, w, padding=k.get('dilation', 1) * (w.shape[-1] // 2), **k)
        statistics = [self.s[f'{name}{bn}.{p}'] for p in ('running_mean', 'running_var', 'weight', 'bias')]
        y = F.batch_norm(y, *statistics)
        return y.relu() if act else y

    def backbone(self, x):
        for i, stride in ((0, 2), (3, 1), (6, 1)):
            x = self.cb(x, 'backbone.stem', f'.{i}', f'.{i+1}', stride=stride)
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage, (stride, dilations) in enumerate(((1, (1, 1)), (2, (1, 1)), (1, (1, 2)), (1, (2, 4)))):
            for b, d in enumerate(dilations):
                name = f'backbone.layer{stage+1}.{b}'
                step = stride if b == 0 else 1
                y = self.cb(x, name, '.conv1', '.bn1', stride=step, dilation=d)
                y = self.cb(y, name, '.conv2', '.bn2', act=False)                  # undilated
                short = x
                if f'{name}.downsample.0.weight' in self.s:
                    short = self.cb(x, name, '.downsample.0', '.downsample.1', act=False, stride=step)
                x = (y + short).relu()
            maps.append(x)
        return maps

    def sep(self, x, name, d=1):
        x = self.cb(x, f'{name}.depthwise_conv', dilation=d, groups=x.shape[1])
        return self.cb(x, f'{name}.pointwise_conv')

    def __call__(self, x, head, rates=(12, 24, 36)):
        def up(t, like): return F.interpolate(t, like.shape[-2:], mode='bilinear', align_corners=False)
        first, *_, deep = self.backbone(x)
        h = 'decode_head'
        if head == 'psp':
            pools = []
            for i, n in enumerate((1, 2, 3, 6)):
                pooled = self.cb(F.adaptive_avg_pool2d(deep, n), f'{h}.psp_modules.{i}.1')
                pools.append(up(pooled, deep))
            y = self.cb(torch.cat([deep, *pools], 1), f'{h}.bottleneck')
        else:
            pooled = self.cb(F.adaptive_avg_pool2d(deep, 1), f'{h}.image_pool.1')
            scales = [up(pooled, deep), self.cb(deep, f'{h}.aspp_modules.0')]
            scales += [self.sep(deep, f'{h}.aspp_modules.{i+1}', r) for i, r in enumerate(rates)]
            y = up(self.cb(torch.cat(scales, 1), f'{h}.bottleneck'), first)
            y = torch.cat([y, self.cb(first, f'{h}.c1_bottleneck')], 1)
            for i in (0, 1): y = self.sep(y, f'{h}.sep_bottleneck.{i}')
        return up(F.conv2d(y, self.s[f'{h}.conv_seg.weight'], self.s[f'{h}.conv_seg.bias']), x)


@pytest.mark.parametrize('head', ('psp', 'aspp'))
def test_mmseg_logits_equal_the_reference(tmp_path, head):
    state = fake_mmseg(head)
    net = ck.load_mmseg(saved(state, tmp_path/'x.pth'), classes=6).eval()
    x = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        ours = net(x)
        theirs = Reference(state)(x, head)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max()) and theirs.std() > 0
    for block in net.encoder.net.layer4:  # timm's own dilation would be noticed
        block.conv2.dilation = block.conv2.padding = (4, 4)
    with torch.inference_mode():
        assert not torch.allclose(net(x), theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max())


def test_mmseg_d16_halves_the_rates(tmp_path):
    net = ck.load_mmseg(saved(fake_mmseg('aspp'), tmp_path/'x.pth'), output_stride=16).eval()
    assert [m.depthwise_conv[0].dilation[0] for m in net.decoder.aspp_modules[1:]] == [6, 12, 18]
    assert [m.shape[-1] for m in net.encoder(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 4]


@pytest.mark.parametrize('head, depth', (('psp', 50), ('aspp', 50), ('aspp', 101)))
def test_mmseg_deeper_layouts_load(tmp_path, head, depth):
    state = {f'module.{k}': v for k, v in fake_mmseg(head, depth, 16, 7).items()}
    net = ck.load_mmseg(saved(state, tmp_path/'x.pth')).eval()
    assert net(torch.randn(1, 3, 32, 64)).shape == (1, 7, 32, 64)
    assert torch.equal(net.encoder.net.layer4[2].conv3.weight, state['module.backbone.layer4.2.conv3.weight'])


def test_mmseg_faults(tmp_path):
    state = fake_mmseg()
    def refuse(match, change, **kwargs):
        with pytest.raises(Incompatible, match=match):
            ck.load_mmseg(saved(change, tmp_path/'x.pth'), **kwargs)
    def drop(*parts): return {k: v for k, v in state.items() if not any(p in k for p in parts)}
    refuse('[Ff]ound 6 classes, expected 8', state, classes=8)
    refuse('not a ResNetV1c', drop('backbone.stem'))
    refuse('not a ResNetV1c', drop('layer3.1'))
    refuse('not a ResNetV1c', {k.replace('backbone.', 'net.'): v for k, v in state.items()})
    no_aspp = '[Ff]ound bottleneck, conv_seg but not decode_head.c1_bottleneck'
    refuse(f'head that is not known here.*{no_aspp}', drop('psp_modules'))
    refuse('misfit is encoder.net.layer2.0.bn1.bias', drop('layer2.0.bn1.bias'))
    refuse('misfit is decoder.extra.weight', state | {'decode_head.extra.weight': torch.zeros(1)})
    refuse('not a ResNetV1c', drop('decode_head', 'backbone', 'auxiliary') | {'x': torch.zeros(1)})
    for part in ('decode_head.conv_seg', 'psp_modules.0.1.conv', 'decode_head'):
        refuse('head that is not known here.*but not decode_head', drop(part))
