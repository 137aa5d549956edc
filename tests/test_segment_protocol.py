"""The segmenter protocol: layers, padding, sliding windows, and a check that finds planted faults."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from rssqa.core import BadImage, Incompatible, UnknownName, segmenters
from rssqa.segment.protocol import (
    IMAGENET_MEAN, IMAGENET_STD, METHOD_NAMES, MIN_SIDE, FeatureHooks, MethodSpec, Segmenter, SegOutput,
    TorchSegmenter, _triangle, check_batch, check_segmenter, crop_like, methods, normalise,
    pad_to, predict_large, window_starts,
)

quick = settings(max_examples=40, deadline=None)


class Net(nn.Module):
    "Four classes: an encoder at stride 8, a decoder at stride 4, logits at input size."
    def __init__(self, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 6, 8, 8)
        self.decoder = nn.Conv2d(6, 5, 1)
        self.head = nn.Conv2d(5, classes, 1)

    def forward(self, x):
        h, w = x.shape[-2:]
        decoded = self.decoder(enlarge(self.encoder(x).relu(), (h // 4, w // 4)))
        return enlarge(self.head(decoded), (h, w))


def enlarge(x, size): return nn.functional.interpolate(x, size, mode='bilinear', align_corners=False)


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


def count_hooks(net): return sum(len(m._forward_hooks) for m in net.modules())


# ---- what comes out

def test_output_is_softmax_argmax_and_its_top():
    logits = torch.randn(2, 5, 6, 7)
    out = SegOutput(logits)
    softmax = torch.softmax(logits, 1)
    assert torch.equal(out.mask, logits.argmax(1))
    assert torch.allclose(out.probs(), softmax)
    assert torch.allclose(out.confidence, softmax.max(1).values)
    assert torch.allclose(out.probs(3.0).sum(1), torch.ones(2, 6, 7))
    assert (out.probs(5.0).amax(1) <= out.confidence + 1e-6).all()
    assert torch.equal(out.probs(5.0).argmax(1), out.mask)
    assert out.features == ()


@pytest.mark.parametrize('h, w', [(16, 16), (17, 40), (75, 64), (33, 31)])
def test_segmenter_returns_input_size_and_real_feature_pixels(h, w):
    out = seg()(batch(2, h, w))
    assert out.logits.shape == (2, 4, h, w)
    assert out.logits.dtype == torch.float32 and not out.logits.requires_grad
    decoder, encoder = out.features
    assert decoder.shape == (2, 5, -(-h // 4), -(-w // 4))
    assert encoder.shape == (2, 6, -(-h // 8), -(-w // 8))


def test_segmenter_describes_itself():
    s = Segmenter.from_torch(Net(), ('a', 'b', 'c', 'd'), stride=8, name='toy')
    assert s.channels == (5, 6) and s.strides == (4, 8)
    assert s.classes == tuple('abcd') and s.name == 'toy'
    assert not s.net.training and s.reference is None
    assert repr(s).startswith("toy: 4 classes, layers {'decoder': 5, 'encoder': 6}, fingerprint ")


def test_strides_are_measured_on_a_multiple_of_the_stride():
    class Coarse(Net):
        "Its encoder keeps no position of an image that is not a multiple of 48."
        def __init__(self):
            super().__init__()
            self.encoder = nn.Conv2d(3, 6, 48, 48)
    s = seg(Coarse(), stride=48)
    side, output = s._probe
    assert side == 96 and s.strides == (4, 48)
    assert output.logits.shape[-2:] == (96, 96)


def test_smaller_logits_are_enlarged():
    class Small(Net):
        def forward(self, x): return super().forward(x)[..., ::4, ::4]
    assert seg(Small())(batch(1, 37, 41)).logits.shape == (1, 4, 37, 41)


def test_half_precision_logits_arrive_as_float32():
    class Half(Net):
        def forward(self, x): return super().forward(x).bfloat16()
    assert seg(Half())(batch()).logits.dtype == torch.float32


def test_fingerprint_covers_all_that_changes_numbers():
    net = Net()
    base = seg(net).fingerprint
    assert base == seg(Net()).fingerprint
    assert base == seg(Net(), name='other').fingerprint         # a name changes no number
    common = dict(classes='abcd', stride=8)
    changes = dict(classes='abce', layers=('encoder',), mean=(0, 0, 0), std=(1, 1, 1), stride=16, temperature=2)
    changed = [TorchSegmenter(Net(), **common | {k: v}).fingerprint for k, v in changes.items()]
    with torch.no_grad(): net.head.bias[0] += 1e-3
    assert len({base, seg(net).fingerprint, *changed}) == 8


def test_results_do_not_depend_on_the_rest_of_the_batch():
    x = batch(4)
    s = seg()
    whole = s(x)
    for i in range(4):
        single = s(x[i:i+1])
        assert torch.allclose(single.logits, whole.logits[i:i+1], atol=1e-5)
        for a, b in zip(single.features, whole.features, strict=True):
            assert torch.allclose(a, b[i:i+1], atol=1e-5)


# ---- intermediate features

def test_features_come_in_the_order_of_names_and_last_of_lists():
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
    with FeatureHooks(net, ('encoder', 'many', 'decoder')) as hooks: net(x)
    assert [f.shape[1] for f in hooks.features] == [6, 3, 5]
    assert torch.equal(hooks.features[0], net.encoder(x))
    assert torch.equal(hooks.features[1], x + 2)
    assert count_hooks(net) == 0


def test_hooks_are_gone_when_the_net_raises():
    class Broken(Net):
        def forward(self, x):
            self.encoder(x)
            raise RuntimeError('boom')
    s = seg(Broken())
    for _ in range(3):
        with pytest.raises(RuntimeError, match='boom'): s(batch())
    assert count_hooks(s.net) == 0
    good = seg()
    for _ in range(3): good(batch())
    assert count_hooks(good.net) == 0


def test_wrong_layers_list_the_right_ones_and_leave_no_hooks():
    s = seg(layers=('encoder', 'neck'))
    with pytest.raises(Incompatible, match='neck.*encoder, decoder, head'): s(batch())
    assert count_hooks(s.net) == 0


def test_layer_that_never_runs_is_named():
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.aux = nn.Conv2d(3, 1, 1)
    with pytest.raises(Incompatible, match='aux.*did not run'):
        seg(Idle(), layers=('aux', 'encoder'))(batch())


# ---- input

WITH_INF = torch.rand(1, 3, 32, 32).index_fill(3, torch.tensor([4]), torch.inf)
BAD_BATCHES = [
    (torch.rand(3, 32, 32), r'\(3, 32, 32\)'),
    (torch.rand(1, 4, 32, 32), r'\(1, 4, 32, 32\)'),
    (torch.rand(1, 1, 32, 32), 'as_image'),
    (torch.rand(1, 3, 1, 1), '1x1'),
    (torch.rand(1, 3, 15, 64), '64x15'),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'uint8'),
    (torch.rand(1, 3, 32, 32) * 255, r'0\.\.1'),
    (torch.rand(1, 3, 32, 32) - .5, r'0\.\.1'),
    (torch.full((1, 3, 32, 32), torch.nan), 'nan'),
    (WITH_INF, 'inf'),
]


@pytest.mark.parametrize('x, words', BAD_BATCHES)
def test_bad_batches_are_refused_before_they_become_maps(x, words):
    with pytest.raises(BadImage, match=words) as e: seg()(x)
    assert 'toy' in str(e.value) and e.value.found and e.value.todo
    check_batch(torch.rand(1, 3, MIN_SIDE, MIN_SIDE), 'toy')


def test_normalise():
    x = batch(1)
    z = normalise(x, IMAGENET_MEAN, IMAGENET_STD)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert torch.allclose(z * std + mean, x, atol=1e-6)
    assert normalise(x.double(), IMAGENET_MEAN, IMAGENET_STD).dtype == torch.float64


sides = st.integers(1, 70)


@quick
@given(sides, sides, st.sampled_from([1, 4, 14, 32]), st.sampled_from([1, 2, 4, 7]))
def test_padding_repeats_the_edge_and_cropping_removes_it(h, w, stride, down):
    x = torch.rand(1, 2, h, w)
    p = pad_to(x, stride)
    height, width = p.shape[-2:]
    assert height % stride == 0 == width % stride
    assert height - h < stride and width - w < stride
    right = p[..., :h, w:]
    bottom = p[..., h:, :]
    assert torch.equal(p[..., :h, :w], x)
    assert torch.equal(right, x[..., -1:].expand_as(right))
    assert torch.equal(bottom, p[..., h-1:h, :].expand_as(bottom))
    assert torch.equal(crop_like(p, p, h, w), x)
    if stride % down == 0:
        cropped = crop_like(p[..., ::down, ::down], p, h, w)
        assert torch.equal(cropped, x[..., ::down, ::down])      # just the samples that lie in the image


# ---- sliding window

@quick
@given(st.integers(1, 200), st.integers(2, 64), st.data())
def test_windows_cover_every_pixel(length, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    starts = window_starts(length, window, window - overlap)
    visits = np.zeros(length, int)
    for a in starts: visits[a:a+window] += 1
    assert visits.min() >= 1
    assert starts == sorted(set(starts))
    assert starts[0] == 0 and starts[-1] == max(length - window, 0)
    assert (np.diff(starts) <= window - overlap).all()           # neighbours share at least the overlap


@pytest.mark.parametrize('n', [1, 2, 7, 64])
def test_window_weights_are_positive_symmetric_and_highest_in_the_middle(n):
    weights = _triangle(n)
    assert weights.shape == (n,) and weights.min() > 0
    assert weights.max() == weights[n // 2] == 1
    assert np.array_equal(weights, weights[::-1])


class Constant:
    name = 'ones'
    classes = ('a', 'b')
    channels = ()
    strides = ()
    fingerprint = ''
    def __init__(self): self.calls = []
    def __call__(self, x):
        self.calls.append(tuple(x.shape[-2:]))
        ones = torch.ones(x.shape[-2:])
        return SegOutput(torch.stack([ones, -2 * ones])[None])


large_sides = st.integers(16, 100)


@settings(max_examples=25, deadline=None)
@given(large_sides, large_sides, st.sampled_from([16, 24, 40]), st.sampled_from([0, 1, 7, 15]))
def test_blend_weights_sum_to_one_and_windows_have_one_size(h, w, window, overlap):
    s = Constant()
    out = predict_large(s, np.zeros((3, h, w), np.float32), window, overlap)
    assert out.shape == (2, h, w)
    assert torch.allclose(out[0], torch.ones(h, w))
    assert torch.allclose(out[1], -2 * torch.ones(h, w))
    assert set(s.calls) == {(min(h, window), min(w, window))}


@settings(max_examples=15, deadline=None)
@given(large_sides, large_sides, st.sampled_from([16, 32, 33]), st.sampled_from([0, 5, 12]))
def test_pointwise_net_gives_the_same_in_windows(h, w, window, overlap):
    s = TorchSegmenter(Pointwise(), 'abc', stride=1)
    x = batch(1, h, w)
    assert torch.allclose(predict_large(s, x[0].numpy(), window, overlap), s(x).logits[0], atol=1e-5)


def test_one_window_is_the_plain_result():
    s = seg()
    x = batch(1, 40, 48)
    assert torch.allclose(predict_large(s, x[0].numpy()), s(x).logits[0], atol=1e-5)


def test_seams_are_blended():
    class Alternating(Constant):
        "Logits are 1 in one window and 0 in the next."
        def __call__(self, x):
            self.calls.append(0)
            return SegOutput(torch.full((1, 2, *x.shape[-2:]), float(len(self.calls) % 2)))

    def largest_step(width, overlap):
        logits = predict_large(Alternating(), np.zeros((3, 16, width), np.float32), 32, overlap)
        return logits[0].diff(dim=1).abs().max()
    assert largest_step(64, 0) == 1 and largest_step(48, 16) < .1


@pytest.mark.parametrize('window, overlap', [(32, 32), (32, 40), (32, -1)])
def test_impossible_windows_are_refused(window, overlap):
    with pytest.raises(Incompatible, match=f'overlap {overlap}'):
        predict_large(Constant(), np.zeros((3, 64, 64), np.float32), window, overlap)


def test_large_images_as_bytes_or_floats():
    u8 = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    s = TorchSegmenter(Pointwise(), 'abc', stride=1)
    floats = (u8 / 255).astype(np.float32).transpose(2, 0, 1)
    assert torch.allclose(predict_large(s, u8, 32, 8), predict_large(s, floats, 32, 8), atol=1e-5)
    with pytest.raises(BadImage, match='expected 0..1'): predict_large(s, u8.astype(np.float32), 32, 8)


# ---- conformance

class Wrap:
    "A conforming segmenter with one thing changed."
    def __init__(self, **changes):
        self.inner = seg()
        self.changes = changes
    def __getattr__(self, name):
        if name in self.changes.get('missing', ()): raise AttributeError(name)
        return self.changes[name] if name in self.changes else getattr(self.inner, name)
    def __call__(self, x):
        out = self.inner(x)
        return self.changes['after'](out) if 'after' in self.changes else out


class Dropping(Net):
    def forward(self, x): return nn.functional.dropout(super().forward(x), .5, training=True)


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
    def forward(self, x): return super().forward(self.norm(x))


class Stretched(Net):
    "Stretches each channel to 0..1, which divides by zero on a flat image."
    def forward(self, x):
        low = x.amin((2, 3), True)
        high = x.amax((2, 3), True)
        return super().forward((x - low) / (high - low))


class Softmaxed(Net):
    def forward(self, x): return super().forward(x).softmax(1)


def change_logits(f): return lambda out: SegOutput(f(out.logits), out.features)
def change_features(f): return lambda out: SegOutput(out.logits, f(out.features))


def in_train_mode():
    net = nn.Sequential()
    net.encoder = nn.Conv2d(3, 4, 1)
    net.decoder = nn.BatchNorm2d(4, momentum=.5)
    net.forward = lambda x: net.decoder(net.encoder(x))
    s = seg(net)
    s.net.train()
    return s


def with_gradients():
    head = nn.Conv2d(4, 4, 1)
    return Wrap(after=change_logits(lambda logits: head(logits.clone())))


def with_token_features():
    return Wrap(after=change_features(lambda maps: tuple(m.flatten(2) for m in maps)))


FAULTS = {
    'train mode': (in_train_mode, 'other images of the batch'),
    'dropout': (lambda: seg(Dropping()), 'two calls differ'),
    'batch dependence': (lambda: seg(Normed()), 'other images of the batch'),
    'softmaxed': (lambda: seg(Softmaxed()), 'before softmax'),
    'too many classes': (lambda: seg(Net(5)), 'expected (2, 4, 75, 64)'),
    'wrong size': (lambda: Wrap(after=change_logits(lambda l: l[..., :-1])), 'expected (2, 4, 75, 64)'),
    'drops the batch': (lambda: Wrap(after=change_logits(lambda l: l.mean(0))), 'logits have shape (4, 75, 64)'),
    'NaN on a flat image': (lambda: seg(Stretched()), 'not finite'),
    'infinite features': (lambda: Wrap(after=change_features(lambda f: (f[0] / 0, f[1]))), 'not finite'),
    'no layers': (lambda: seg(layers=()), 'layers are empty'),
    'gradients': (with_gradients, 'carry gradients'),
    'declared channels': (lambda: Wrap(channels=(5, 7)), 'features have (5, 6) channels, declared (5, 7)'),
    'missing feature': (lambda: Wrap(after=change_features(lambda f: f[:1])), 'declared (5, 6)'),
    'token features': (with_token_features, 'expected (N,C,h,w)'),
    'no fingerprint': (lambda: Wrap(missing=('fingerprint',)), 'no attribute fingerprint'),
    'no classes': (lambda: Wrap(missing=('classes', 'channels')), 'no attribute classes; no attribute channels'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_planted_fault_is_found(fault):
    make, words = FAULTS[fault]
    with pytest.raises(Incompatible) as e: check_segmenter(make())
    assert words.lower() in str(e.value).lower() and 'toy' in str(e.value) and '\n' not in str(e.value)


def test_faults_are_listed_together():
    three_classes = change_logits(lambda logits: logits[:, :3].softmax(1))
    with pytest.raises(Incompatible) as e: check_segmenter(Wrap(channels=(1, 1), after=three_classes))
    assert all(w in str(e.value) for w in ('shape', 'declared (1, 1)', 'before softmax'))


@pytest.mark.parametrize('size', [(75, 64), (16, 16), (33, 50)])
def test_good_segmenters_pass_and_come_back(size):
    pointwise = TorchSegmenter(Pointwise(), 'abc', stride=1)
    for s in (seg(), Wrap(), seg(layers=('encoder',)), pointwise):
        assert check_segmenter(s, size) is s


def test_check_by_name():
    segmenters.register('test.toy', seg)
    try: assert check_segmenter('test.toy').name == 'toy'
    finally: del segmenters.entries['test.toy']
    with pytest.raises(UnknownName): check_segmenter('test.toy')


# ---- methods

def test_method_spec_builds_presets():
    def build_net(classes, encoder_weights=None, width=1): return classes, encoder_weights, width
    spec = MethodSpec('toy', 'CNN', 'no author, 2000', build_net, dict(nano={}, tiny=dict(width=3)))
    assert spec.build(5) == (5, None, 3)
    assert spec.build(5, 'nano', 'w') == (5, 'w', 1)
    with pytest.raises(UnknownName, match='tiny'): spec.build(5, 'tinny')


def test_the_eight_methods_are_registered():
    assert len(METHOD_NAMES) == 8 == len(set(METHOD_NAMES))
    assert set(METHOD_NAMES) <= set(methods)
    for name in METHOD_NAMES:
        assert methods[name].name == name
        assert {'nano', 'tiny', 'standard'} <= set(methods[name].presets)
