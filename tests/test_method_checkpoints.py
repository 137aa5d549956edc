"""Foreign checkpoints: containers, prefixes, refusals, and mmsegmentation's layout against a plain functional reference."""
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


# containers and prefixes

@pytest.mark.parametrize('prefix, shelf', [('', s) for s in (None, 'model_state_dict', 'model')] + [('net.', None)] +
                         [(p, 'state_dict') for p in ('module.', 'net.', 'model.', '_orig_mod.', 'model.net._orig_mod.')])
def test_every_wrapping_opens(nano, tmp_path, prefix, shelf):
    state = {prefix + k: v for k, v in nano.state_dict().items()}
    torch.save(
        {shelf: state, 'epoch': 3, 'hyper_parameters': {'lr': 1e-3}} if shelf else state, tmp_path / 'x.ckpt'
    )
    assert same(ck.load_weights(fresh(), tmp_path/'x.ckpt'), nano)


def test_safetensors_nested_shelves_and_neighbours(nano, tmp_path):
    save_file(
        {k: v for k, v in nano.state_dict().items() if 'num_batches' not in k}, tmp_path / 'x.safetensors'
    )
    torch.save(
        {'model': {'state_dict': dict(nano.state_dict())}, 'optimizer': {'state': {0: torch.zeros(3)}}},
        tmp_path / 'deep.pt',
    )
    torch.save(
        {
            'state_dict': {
                **{f'net.{k}': v for k, v in nano.state_dict().items()},
                'loss.weight': torch.ones(5),
                'net.aux_head.weight': torch.ones(2),
            }
        },
        tmp_path / 'loss.ckpt',
    )
    for name in ('x.safetensors', 'deep.pt', 'loss.ckpt'):
        net = ck.load_weights(fresh(), tmp_path/name)
        assert all(
            torch.equal(v, nano.state_dict()[k])
            for k, v in net.state_dict().items()
            if 'num_batches' not in k
        ), name


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
    key, shape = (
        ('decoder.fourth.weight', 'found (3,), expected nothing')
        if kind == 'extra'
        else ('decoder.enter.weight', 'expected (32, 112, 1, 1)')
    )
    assert key in message and shape in message and ('found (31, 112, 1, 1)' in message) == (kind == 'shape')


def test_other_architectures_and_class_tables_are_refused(nano, tmp_path):
    torch.save(nano.state_dict(), tmp_path/'x.pt')
    for net in (fresh(6), methods['unet'].build(5, 'nano'), methods['unetformer'].build(5, 'tiny'), nn.Linear(3, 3)):
        with pytest.raises(Incompatible, match='first misfit is'): ck.load_weights(net, tmp_path/'x.pt')


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(DataNotFound, match='gone.pt'): ck.read_state(tmp_path/'gone.pt')
    (tmp_path/'page.pt').write_bytes(b'<html>'), (tmp_path/'page.safetensors').write_bytes(b'<html>')
    for name in ('page.pt', 'page.safetensors'):
        with pytest.raises(Incompatible, match='(?i)not a checkpoint of plain tensors'):
            ck.read_state(tmp_path/name)
    for content, found in (({'epoch': 3}, 'a dictionary of epoch'), ([1, 2], 'list'), ({}, 'a dictionary of nothing'), ({'state_dict': {}}, 'a dictionary of nothing')):
        torch.save(content, tmp_path/'x.pt')
        with pytest.raises(Incompatible, match=f'(?i){found}'): ck.read_state(tmp_path/'x.pt')


class Bomb:
    def __reduce__(self): return exec, ('import rssqa; rssqa.exploded = True',)


@pytest.mark.parametrize('dump', (torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))))
def test_no_code_runs_from_a_file(tmp_path, dump):
    import rssqa
    dump({'state_dict': {'a': torch.zeros(1)}, 'bomb': Bomb()}, tmp_path/'x.pt')
    with pytest.raises(Incompatible, match='state_dict alone'): ck.read_state(tmp_path/'x.pt')
    assert not hasattr(rssqa, 'exploded')


# segmentation-models-pytorch

def small_smp():
    return smp.Unet(
        'tu-mobilenetv2_035',
        encoder_weights=None,
        classes=4,
        activation='softmax2d',
        decoder_channels=(32, 16, 16, 8, 8),
    )


def test_smp_folder(tmp_path):
    torch.manual_seed(0)
    source = small_smp().eval()
    source.save_pretrained(tmp_path/'m')
    net = ck.load_smp(tmp_path/'m', classes=4).eval()
    # logits, also where the folder asks for softmax
    assert torch.allclose(net(x := torch.randn(2, 3, 64, 64)).softmax(1), source(x), atol=1e-6)
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
    (tmp_path/'m'/'config.json').write_text(config), (tmp_path/'m'/'model.safetensors').unlink()
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
            shapes = (
                ((mid, inp, 3), (mid, mid, 3))
                if depth == 18
                else ((mid, inp, 1), (mid, mid, 3), (mid * 4, mid, 1))
            )
            for i, shape in enumerate(shapes): yield from conv_bn(name, *shape, f'.conv{i+1}', f'.bn{i+1}')
            if b == 0 and inp != mid * grow:
                yield from conv_bn(name, mid * grow, inp, 1, '.downsample.0', '.downsample.1')
            inp = mid * grow


def separable(name, out, inp):
    yield from conv_bn(f'{name}.depthwise_conv', inp, 1)
    yield from conv_bn(f'{name}.pointwise_conv', out, inp, 1)


def head_layout(head, depth, width, classes):
    deep, fine, thin, h = *((512, 64, 12) if depth == 18 else (2048, 256, 48)), 'decode_head'
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
    yield from (
        (f'auxiliary_head.conv_seg.weight', (classes, width, 1, 1)),
        ('auxiliary_head.conv_seg.bias', (classes,)),
    )
    yield from conv_bn('auxiliary_head.convs.0', width, 256 if depth == 18 else 1024)


def fake_mmseg(head='psp', depth=18, width=32, classes=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda k, s: (
        torch.tensor(7)
        if not s
        else torch.rand(s, generator=g) + 0.5
        if 'running_var' in k
        else torch.randn(s, generator=g) * (2 / max(1, s[1:].numel() if len(s) > 1 else 1)) ** 0.5
    )
    layout = [
        *backbone_layout(depth),
        *head_layout(head, depth, width, classes),
        *aux_layout(depth, width // 2, classes),
    ]
    return {k: make(k, torch.Size(s)) for k, s in layout}


def saved(state, path, **meta):
    torch.save({'meta': {'mmseg_version': '1.2.2', 'CLASSES': ['a'], **meta}, 'state_dict': state}, path)
    return path


class Reference:
    "mmsegmentation's ResNet-18 networks as plain functions of the state dict, in its own names."
    def __init__(self, state): self.s = state
    def cb(self, x, name, conv='.conv', bn='.bn', act=True, **k):
        w = self.s[f'{name}{conv}.weight']
        y = F.conv2d(x, w, padding=k.get('dilation', 1) * (w.shape[-1] // 2), **k)
        y = F.batch_norm(
            y, *(self.s[f'{name}{bn}.{p}'] for p in ('running_mean', 'running_var', 'weight', 'bias'))
        )
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
                short = (
                    self.cb(x, name, '.downsample.0', '.downsample.1', act=False, stride=step)
                    if f'{name}.downsample.0.weight' in self.s
                    else x
                )
                x = (y + short).relu()
            maps.append(x)
        return maps

    def sep(self, x, name, d=1):
        x = self.cb(x, f'{name}.depthwise_conv', dilation=d, groups=x.shape[1])
        return self.cb(x, f'{name}.pointwise_conv')

    def __call__(self, x, head, rates=(12, 24, 36)):
        up = lambda t, like: F.interpolate(t, like.shape[-2:], mode='bilinear', align_corners=False)
        first, *_, deep = self.backbone(x)
        h = 'decode_head'
        if head == 'psp':
            pools = [
                up(self.cb(F.adaptive_avg_pool2d(deep, n), f'{h}.psp_modules.{i}.1'), deep)
                for i, n in enumerate((1, 2, 3, 6))
            ]
            y = self.cb(torch.cat([deep, *pools], 1), f'{h}.bottleneck')
        else:
            views = [
                up(self.cb(F.adaptive_avg_pool2d(deep, 1), f'{h}.image_pool.1'), deep),
                self.cb(deep, f'{h}.aspp_modules.0'),
            ]
            views += [self.sep(deep, f'{h}.aspp_modules.{i+1}', r) for i, r in enumerate(rates)]
            y = up(self.cb(torch.cat(views, 1), f'{h}.bottleneck'), first)
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
    drop = lambda *parts: {k: v for k, v in state.items() if not any(p in k for p in parts)}
    refuse('[Ff]ound 6 classes, expected 8', state, classes=8)
    refuse('not a ResNetV1c', drop('backbone.stem'))
    refuse('not a ResNetV1c', drop('layer3.1'))
    refuse('not a ResNetV1c', {k.replace('backbone.', 'net.'): v for k, v in state.items()})
    refuse(
        'head that is not known here.*[Ff]ound bottleneck, conv_seg but not decode_head.c1_bottleneck',
        drop('psp_modules'),
    )
    refuse('misfit is encoder.net.layer2.0.bn1.bias', drop('layer2.0.bn1.bias'))
    refuse('misfit is decoder.extra.weight', state | {'decode_head.extra.weight': torch.zeros(1)})
    refuse('not a ResNetV1c', drop('decode_head', 'backbone', 'auxiliary') | {'x': torch.zeros(1)})
    for part in ('decode_head.conv_seg', 'psp_modules.0.1.conv', 'decode_head'):
        refuse('head that is not known here.*but not decode_head', drop(part))
