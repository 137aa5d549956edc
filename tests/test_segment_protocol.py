"""The segmenter protocol: layers, padding, sliding windows, and a check that finds planted faults."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from rssqa.core import BadImage, Incompatible, UnknownName, segmenters
from rssqa.segment.protocol import (
    METHOD_NAMES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MIN_SIDE,
    MethodSpec,
    Segmenter,
    SegOutput,
    TorchSegmenter,
    _hat,
    _starts,
    check_batch,
    check_segmenter,
    crop_like,
    FeatureHooks,
    methods,
    normalise,
    pad_to,
    predict_large,
)

quick = settings(max_examples=40, deadline=None)
ONE = dict(mean=(0, 0, 0), std=(1, 1, 1))


class Net(nn.Module):
    "Four classes: an encoder at stride 8, a decoder at stride 4, logits at input size."
    def __init__(self, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 6, 8, 8)
        self.decoder = nn.Conv2d(6, 5, 1)
        self.head = nn.Conv2d(5, classes, 1)

    def forward(self, x):
        up = lambda f, size: nn.functional.interpolate(f, size, mode='bilinear', align_corners=False)
        d = self.decoder(up(self.encoder(x).relu(), (x.shape[-2] // 4, x.shape[-1] // 4)))
        return up(self.head(d), x.shape[-2:])


class Pointwise(nn.Module):
    "Logits that depend on their own pixel alone."
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Conv2d(3, 4, 1)
        self.decoder = nn.Conv2d(4, 3, 1)

    def forward(self, x): return self.decoder(self.encoder(x).tanh())


def seg(net=None, **kwargs):
    return TorchSegmenter(net or Net(), 'abcd', **{'stride': 8, 'name': 'toy'} | kwargs)
def batch(n=2, h=40, w=48, seed=0):
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed))
def hooks(net): return sum(len(m._forward_hooks) for m in net.modules())


# ---- what comes out

def test_output_is_softmax_argmax_and_its_top():
    logits = torch.randn(2, 5, 6, 7)
    out = SegOutput(logits)
    assert torch.equal(out.mask, logits.argmax(1)) and torch.allclose(out.probs(), torch.softmax(logits, 1))
    assert torch.allclose(out.confidence, torch.softmax(logits, 1).max(1).values) and torch.allclose(
        out.probs(3.0).sum(1), torch.ones(2, 6, 7)
    )
    assert (
        (out.probs(5.0).amax(1) <= out.confidence + 1e-6).all()
        and torch.equal(out.probs(5.0).argmax(1), out.mask)
        and out.features == ()
    )


@pytest.mark.parametrize('h, w', [(16, 16), (17, 40), (75, 64), (33, 31)])
def test_segmenter_returns_input_size_and_real_feature_pixels(h, w):
    out = seg()(batch(2, h, w))
    assert (
        out.logits.shape == (2, 4, h, w)
        and out.logits.dtype == torch.float32
        and not out.logits.requires_grad
    )
    assert [tuple(f.shape) for f in out.features] == [
        (2, 5, -(-h // 4), -(-w // 4)),
        (2, 6, -(-h // 8), -(-w // 8)),
    ]


def test_segmenter_describes_itself():
    s = Segmenter.from_torch(Net(), ('a', 'b', 'c', 'd'), stride=8, name='toy')
    assert (s.channels, s.strides, s.classes, s.name) == (
        (5, 6),
        (4, 8),
        tuple('abcd'),
        'toy',
    ) and not s.net.training
    assert (
        repr(s).startswith("toy: 4 classes, layers {'decoder': 5, 'encoder': 6}, fingerprint ")
        and s.reference is None
    )


def test_smaller_logits_are_enlarged():
    class Small(Net):
        def forward(self, x): return super().forward(x)[..., ::4, ::4]
    assert seg(Small())(batch(1, 37, 41)).logits.shape == (1, 4, 37, 41)


def test_half_precision_logits_arrive_as_float32():
    class Half(Net):
        def forward(self, x): return super().forward(x).bfloat16()
    assert seg(Half())(batch()).logits.dtype == torch.float32


def test_fingerprint_sees_all_that_changes_numbers():
    net = Net()
    base = seg(net).fingerprint
    # a name changes no number
    assert base == seg(Net()).fingerprint == seg(Net(), name='other').fingerprint
    changes = [
        dict(classes='abce'),
        dict(layers=('encoder',)),
        dict(mean=(0, 0, 0)),
        dict(std=(1, 1, 1)),
        dict(stride=16),
        dict(temperature=2),
    ]
    prints = [TorchSegmenter(Net(), **{'classes': 'abcd', 'stride': 8} | c).fingerprint for c in changes]
    with torch.no_grad(): net.head.bias[0] += 1e-3
    assert len({base, seg(net).fingerprint, *prints}) == 8


def test_results_do_not_depend_on_company():
    x = batch(4)
    s = seg()
    whole = s(x)
    for i in range(4):
        assert torch.allclose(s(x[i:i+1]).logits, whole.logits[i:i+1], atol=1e-5)
        assert all(
            torch.allclose(a, b[i : i + 1], atol=1e-5)
            for a, b in zip(s(x[i : i + 1]).features, whole.features)
        )


# ---- layers

def test_listen_hears_in_the_order_of_names_and_last_of_lists():
    class Lists(Net):
        def __init__(self):
            super().__init__()
            self.many = nn.Identity()
            self.many.forward = lambda x: [x, (x + 1, [x + 2])]
        def forward(self, x):
            self.many(x)
            return super().forward(x)
    net = Lists()
    x = batch()
    with FeatureHooks(net, ('encoder', 'many', 'decoder')) as ear: net(x)
    assert [f.shape[1] for f in ear.features] == [6, 3, 5] and torch.equal(ear.features[1], x + 2)
    assert torch.equal(ear.features[0], net.encoder(x)) and hooks(net) == 0


def test_hooks_are_gone_when_the_net_raises():
    class Broken(Net):
        def forward(self, x):
            self.encoder(x)
            raise RuntimeError('boom')
    s = seg(Broken())
    for _ in range(3):
        with pytest.raises(RuntimeError, match='boom'): s(batch())
    assert hooks(s.net) == 0
    good = seg()
    for _ in range(3): good(batch())
    assert hooks(good.net) == 0


def test_wrong_taps_list_the_right_ones_and_leave_no_hooks():
    s = seg(layers=('encoder', 'neck'))
    with pytest.raises(Incompatible, match='neck.*encoder, decoder, head'): s(batch())
    assert hooks(s.net) == 0


def test_tap_that_never_runs_is_named():
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.aux = nn.Conv2d(3, 1, 1)
    with pytest.raises(Incompatible, match='aux.*did not run'):
        seg(Idle(), layers=('aux', 'encoder'))(batch())


# ---- input

@pytest.mark.parametrize('x, words', [
    (torch.rand(3, 32, 32), r'\(3, 32, 32\)'), (torch.rand(1, 4, 32, 32), r'\(1, 4, 32, 32\)'), (torch.rand(1, 1, 32, 32), 'as_image'), (torch.rand(1, 3, 1, 1), '1x1'),
    (torch.rand(1, 3, 15, 64), '64x15'), (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'uint8'), (torch.rand(1, 3, 32, 32) * 255, r'0\.\.1'),
    (torch.rand(1, 3, 32, 32) - .5, r'0\.\.1'), (torch.full((1, 3, 32, 32), torch.nan), 'nan'), (torch.rand(1, 3, 32, 32).index_fill(3, torch.tensor([4]), torch.inf), 'inf')])
def test_bad_batches_are_refused_before_they_become_maps(x, words):
    with pytest.raises(BadImage, match=words) as e: seg()(x)
    assert 'toy' in str(e.value) and e.value.found and e.value.todo
    check_batch(torch.rand(1, 3, MIN_SIDE, MIN_SIDE), 'toy')


def test_normalise():
    x = batch(1)
    z = normalise(x, IMAGENET_MEAN, IMAGENET_STD)
    assert torch.allclose(
        z * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1), x, atol=1e-6
    )
    assert normalise(x.double(), IMAGENET_MEAN, IMAGENET_STD).dtype == torch.float64


@quick
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 4, 14, 32]), st.sampled_from([1, 2, 4, 7]))
def test_padding_invents_nothing_and_cropping_takes_it_away(h, w, stride, down):
    x = torch.rand(1, 2, h, w)
    p = pad_to(x, stride)
    assert (
        p.shape[-2] % stride == 0 == p.shape[-1] % stride
        and p.shape[-2] - h < stride
        and p.shape[-1] - w < stride
    )
    assert (
        torch.equal(p[..., :h, :w], x)
        and torch.equal(p[..., :h, w:], x[..., -1:].expand_as(p[..., :h, w:]))
        and torch.equal(p[..., h:, :], p[..., h - 1 : h, :].expand_as(p[..., h:, :]))
    )
    assert torch.equal(crop_like(p, p, h, w), x)
    if stride % down == 0:
        kept = crop_like(p[..., ::down, ::down], p, h, w)
        # just the samples that lie in the image
        assert torch.equal(kept, x[..., ::down, ::down])


# ---- sliding window

@quick
@given(st.integers(1, 200), st.integers(2, 64), st.data())
def test_windows_cover_every_pixel(length, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    starts = _starts(length, window, window - overlap)
    seen = np.zeros(length, int)
    for a in starts: seen[a:a + window] += 1
    assert (
        seen.min() >= 1
        and starts[0] == 0
        and starts == sorted(set(starts))
        and starts[-1] == max(length - window, 0)
    )
    # neighbours share at least the overlap
    assert all(b - a <= window - overlap for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize('n', [1, 2, 7, 64])
def test_hat_is_positive_symmetric_and_highest_in_the_middle(n):
    hat = _hat(n)
    assert (
        hat.shape == (n,)
        and hat.min() > 0
        and hat.max() == 1
        and np.array_equal(hat, hat[::-1])
        and hat[n // 2] == 1
    )


class Constant:
    name = 'ones'
    classes = ('a', 'b')
    channels = ()
    strides = ()
    fingerprint = ''
    def __init__(self): self.calls = []
    def __call__(self, x):
        self.calls.append(tuple(x.shape[-2:]))
        return SegOutput(torch.stack([torch.ones(x.shape[-2:]), -2 * torch.ones(x.shape[-2:])])[None])


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 90), st.integers(16, 90), st.sampled_from([16, 24, 40]), st.sampled_from([0, 1, 7, 15]))
def test_blend_weights_sum_to_one_and_windows_have_one_size(h, w, window, overlap):
    s = Constant()
    out = predict_large(s, np.zeros((3, h, w), np.float32), window, overlap)
    assert (
        out.shape == (2, h, w)
        and torch.allclose(out[0], torch.ones(h, w))
        and torch.allclose(out[1], -2 * torch.ones(h, w))
    )
    assert set(s.calls) == {(min(h, window), min(w, window))}


@settings(max_examples=15, deadline=None)
@given(st.integers(16, 100), st.integers(16, 100), st.sampled_from([16, 32, 33]), st.sampled_from([0, 5, 12]))
def test_pointwise_net_gives_the_same_in_windows(h, w, window, overlap):
    s = TorchSegmenter(Pointwise(), 'abc', stride=1)
    x = batch(1, h, w)
    assert torch.allclose(predict_large(s, x[0].numpy(), window, overlap), s(x).logits[0], atol=1e-5)


def test_one_window_is_the_plain_result():
    s = seg()
    x = batch(1, 40, 48)
    assert torch.allclose(predict_large(s, x[0].numpy()), s(x).logits[0], atol=1e-5)


def test_seams_are_blended():
    class Patchy(Constant):                                                           # every window says its own number
        def __call__(self, x):
            self.calls.append(0)
            return SegOutput(torch.full((1, 2, *x.shape[-2:]), float(len(self.calls) % 2)))
    step = lambda width, overlap: (
        predict_large(Patchy(), np.zeros((3, 16, width), np.float32), 32, overlap)[0].diff(dim=1).abs().max()
    )
    assert step(64, 0) == 1 and step(48, 16) < .1


@pytest.mark.parametrize('window, overlap', [(32, 32), (32, 40), (32, -1)])
def test_impossible_windows(window, overlap):
    with pytest.raises(Incompatible, match=f'overlap {overlap}'):
        predict_large(Constant(), np.zeros((3, 64, 64), np.float32), window, overlap)


def test_large_pictures_of_other_kinds():
    u8 = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    s = TorchSegmenter(Pointwise(), 'abc', stride=1)
    assert torch.allclose(
        predict_large(s, u8, 32, 8),
        predict_large(s, (u8 / 255).astype(np.float32).transpose(2, 0, 1), 32, 8),
        atol=1e-5,
    )
    with pytest.raises(BadImage, match='expected 0..1'): predict_large(s, u8.astype(np.float32), 32, 8)


# ---- conformance

class Wrap:
    "A conforming segmenter with one thing changed."
    def __init__(self, **changes):
        self.inner = seg()
        self.changes = changes
    def __getattr__(self, name):
        if name in self.changes.get('lacks', ()): raise AttributeError(name)
        return self.changes[name] if name in self.changes else getattr(self.inner, name)
    def __call__(self, x):
        out = self.inner(x)
        return self.changes.get('after', lambda x, o: o)(x, out)


class Dropping(Net):
    def forward(self, x): return nn.functional.dropout(super().forward(x), .5, training=True)

class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
    def forward(self, x): return super().forward(self.norm(x))

class FlatDivides(Net):
    def forward(self, x):
        return super().forward((x - x.amin((2, 3), True)) / (x.amax((2, 3), True) - x.amin((2, 3), True)))

class Softmaxed(Net):
    def forward(self, x): return super().forward(x).softmax(1)


def swap(**kw):
    return lambda x, o: SegOutput(
        kw.get('logits', lambda l: l)(o.logits), kw.get('features', lambda f: f)(o.features)
    )


def training():
    net = nn.Sequential()
    net.encoder = nn.Conv2d(3, 4, 1)
    net.decoder = nn.BatchNorm2d(4, momentum=.5)
    net.forward = lambda x: net.decoder(net.encoder(x))
    s = seg(net)
    s.net.train()
    return s


def with_gradients():
    head = nn.Conv2d(4, 4, 1)
    return Wrap(after=lambda x, o: SegOutput(head(o.logits.clone()), o.features))


FAULTS = {
    'train mode': (training, 'other images of the batch'),
    'dropout': (lambda: seg(Dropping()), 'two calls differ'),
    'batch dependence': (lambda: seg(Normed()), 'other images of the batch'),
    'softmaxed': (lambda: seg(Softmaxed()), 'before softmax'),
    'too many classes': (lambda: seg(Net(5)), 'expected (2, 4, 75, 64)'),
    'wrong size': (lambda: Wrap(after=swap(logits=lambda l: l[..., :-1])), 'expected (2, 4, 75, 64)'),
    'drops the batch': (
        lambda: Wrap(after=swap(logits=lambda l: l.mean(0))),
        'logits have shape (4, 75, 64)',
    ),
    'NaN on a flat image': (lambda: seg(FlatDivides()), 'not finite'),
    'infinite features': (lambda: Wrap(after=swap(features=lambda f: (f[0] / 0, f[1]))), 'not finite'),
    'no layers': (lambda: seg(layers=()), 'layers are empty'),
    'gradients': (with_gradients, 'carry gradients'),
    'declared channels': (lambda: Wrap(channels=(5, 7)), 'features have (5, 6) channels, declared (5, 7)'),
    'missing feature': (lambda: Wrap(after=swap(features=lambda f: f[:1])), 'declared (5, 6)'),
    'token features': (
        lambda: Wrap(after=swap(features=lambda f: tuple(t.flatten(2) for t in f))),
        'expected (N,C,h,w)',
    ),
    'no fingerprint': (lambda: Wrap(lacks=('fingerprint',)), 'no attribute fingerprint'),
    'no classes': (
        lambda: Wrap(lacks=('classes', 'channels')),
        'no attribute classes; no attribute channels',
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_planted_fault_is_found(fault):
    make, words = FAULTS[fault]
    with pytest.raises(Incompatible) as e: check_segmenter(make())
    assert words.lower() in str(e.value).lower() and 'toy' in str(e.value) and '\n' not in str(e.value)


def test_faults_are_listed_together():
    class Two(Softmaxed):
        def forward(self, x): return super().forward(x)[:, :3]
    with pytest.raises(Incompatible) as e:
        check_segmenter(Wrap(channels=(1, 1), after=swap(logits=lambda l: l[:, :3].softmax(1))))
    assert all(w in str(e.value) for w in ('shape', 'declared (1, 1)', 'before softmax'))


@pytest.mark.parametrize('size', [(75, 64), (16, 16), (33, 50)])
def test_good_segmenters_pass_and_come_back(size):
    for s in (seg(), Wrap(), seg(layers=('encoder',)), TorchSegmenter(Pointwise(), 'abc', stride=1)):
        assert check_segmenter(s, size) is s


def test_check_by_name():
    segmenters.register('test.toy', seg)
    try: assert check_segmenter('test.toy').name == 'toy'
    finally: del segmenters.entries['test.toy']
    with pytest.raises(UnknownName): check_segmenter('test.toy')


# ---- methods

def test_method_spec_builds_presets():
    spec = MethodSpec(
        'toy',
        'CNN',
        'nobody, 2000',
        lambda classes, encoder_weights=None, width=1: (classes, encoder_weights, width),
        dict(nano={}, tiny=dict(width=3)),
    )
    assert spec.build(5) == (5, None, 3) and spec.build(5, 'nano', 'w') == (5, 'w', 1)
    with pytest.raises(UnknownName, match='tiny'): spec.build(5, 'tinny')


def test_the_eight_methods_are_registered():
    assert (
        len(METHOD_NAMES) == 8 == len(set(METHOD_NAMES))
        and set(METHOD_NAMES) <= set(methods)
        and all(
            methods[n].name == n and {'nano', 'tiny', 'standard'} <= set(methods[n].presets)
            for n in METHOD_NAMES
        )
    )
