"""Encoders: specs, weight files, activation, number formats, preprocessing, conformance."""
import json, os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import rssqa.clip.encoders as E
from rssqa.clip.conformance import conformance, tiny_multilingual, write_format
from rssqa.clip.checkpoints import lengthen, read_weights, strip_checkpoint, write_safetensors
from rssqa.core import BadImage, DataNotFound, DownloadError, Incompatible, UnknownName, encoders
from rssqa.clip.encoders import EncoderSpec, SemOutput, SemanticEncoder, build_net
from rssqa.clip.encoders import check_encoder, encode, load_encoder, resize, spec_from_folder, spec_from_tag
from rssqa.clip.specs import HALF, SPECS
from rssqa.clip.towers import text_pool

real = pytest.mark.skipif(not os.environ.get('RSSQA_REAL'), reason='RSSQA_REAL is unset')
VISION = dict(image_size=32, patch_size=8, width=32, head_width=16, layers=2)
TEXT = dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1)
CFG = dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)
MOBILE = dict(timm_model_name='mobilenetv2_050', timm_pool='avg', timm_proj='linear', image_size=32)


def random_net(config, seed=0):
    torch.manual_seed(seed)
    net = build_net(config)
    for parameter in net.parameters(): parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def load(source, **settings):
    "Load an encoder in float32 on the processor."
    return load_encoder(source, **dict(device='cpu', dtype='float32') | settings)


def folder(path, config=CFG, seed=0, weights=True):
    path.mkdir(parents=True, exist_ok=True)
    (path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=config)))
    if weights: write_safetensors(path/'open_clip_model.safetensors', random_net(config, seed).state_dict())
    return path


def training_checkpoint(path, net, **more):
    "Write the layout of CLIP_RS.pt: epoch, name, state_dict under module., Adam's moments."
    moments = {}
    for i, parameter in enumerate(net.parameters()):
        exp_avg = torch.rand_like(parameter)
        exp_avg_sq = torch.rand_like(parameter)
        moments[i] = dict(step=torch.tensor(3.0), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    state = {f'module.{name}': t for name, t in net.state_dict().items()}
    optimizer = dict(state=moments, param_groups=[dict(lr=1e-4)])
    torch.save(dict(epoch=3, name='run', state_dict=state, optimizer=optimizer) | more, path)
    return path


@pytest.fixture
def enc(tmp_path): return load(folder(tmp_path/'model'))


@pytest.fixture
def x(): return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(1))


# specs ------------------------------------------------------------

@pytest.mark.parametrize('spec', SPECS, ids=lambda s: s.name)
def test_specs_agree_with_open_clip(spec):
    import open_clip
    E._model_config(spec)                                           # dim and image size
    if spec.format != 'safetensors': return                         # a file that open_clip does not list
    tag = open_clip.get_pretrained_cfg(spec.architecture, spec.weights)
    assert tag, 'no such tag'
    assert spec.quick_gelu == tag.get('quick_gelu', False)
    assert (spec.mean, spec.std) == (tuple(tag['mean']), tuple(tag['std']))
    assert spec.interpolation == tag['interpolation']
    without_texts = replace(spec, name='', source='', licence='', note='')
    from_tag = spec_from_tag(f'{spec.architecture}/{spec.weights}')
    assert replace(from_tag, name='', source='') == without_texts


@pytest.mark.parametrize('name', ['openai-vit-b-32', 'laion-vit-b-32', 'clip-rs'])
def test_every_activation_is_that_of_the_spec(name, monkeypatch):
    import open_clip
    spec = encoders[name]
    small = CFG | dict(embed_dim=spec.dim, vision_cfg=VISION | dict(image_size=224, patch_size=112))
    monkeypatch.setattr(open_clip, 'get_model_config', lambda _: json.loads(json.dumps(small)))
    net = build_net(E._model_config(spec))
    kinds = {type(m).__name__ for m in net.modules()} & {'QuickGELU', 'GELU'}
    assert kinds == ({'QuickGELU'} if spec.quick_gelu else {'GELU'})


def test_a_stated_activation_must_equal_that_of_the_spec(tmp_path):
    stated = folder(tmp_path/'quick', CFG | dict(quick_gelu=True))
    spec = spec_from_folder(stated)
    assert spec.quick_gelu and load_encoder(spec, device='cpu').config['quick_gelu']
    with pytest.raises(Incompatible, match='states QuickGELU, the spec says GELU'):
        load_encoder(replace(spec, quick_gelu=False))
    silent = spec_from_folder(folder(tmp_path/'silent'))
    for weights in (stated, stated/'open_clip_model.safetensors'):
        with pytest.raises(Incompatible, match='states QuickGELU'): load_encoder(silent, weights=weights)


def test_config_name_of_open_clip_states_its_activation():
    with pytest.raises(Incompatible, match='QuickGELU'):
        E._model_config(EncoderSpec('a', 'ViT-B-32-quickgelu', False, 512))
    with pytest.raises(Incompatible, match='(?i)dim, image_size'):
        E._model_config(EncoderSpec('a', 'ViT-B-32', False, 768))
    misspelt = EncoderSpec('a', 'ViT-B-23', False, 512)
    with pytest.raises(UnknownName, match='ViT-B-32'): E._model_config(misspelt)


def test_unknown_names(tmp_path):
    with pytest.raises(UnknownName, match='clip-rs'): load_encoder('cliprs')
    with pytest.raises(UnknownName, match='ViT-B-32/laion400m_e32'): load_encoder('ViT-B-32/laion400m_e33')
    with pytest.raises(Incompatible, match='activation'): load_encoder(tmp_path/'w.pt')
    with pytest.raises(DataNotFound, match='open_clip_config'): load_encoder(tmp_path)


def test_the_error_names_where_to_put_the_clip_rs_file():
    with pytest.raises(DataNotFound, match='CLIP_RS.pt from hy1111/CLIP-RS'): load_encoder('clip-rs')


def test_frozen_without_real_data(monkeypatch):
    monkeypatch.delenv('RSSQA_REAL', raising=False)
    with pytest.raises(DataNotFound, match='RSSQA_REAL'): load_encoder('clip-rs-frozen')


def test_failed_download_is_explained(monkeypatch):
    import open_clip
    def offline(*a, **k): raise ConnectionError('no route')
    monkeypatch.setattr(open_clip, 'download_pretrained', offline)
    with pytest.raises(DownloadError, match='weights=<path>'): load_encoder('laion-vit-b-32')


# weight files ------------------------------------------------------------

@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_every_layout_of_a_pickle_gives_the_same_encoder(tmp_path, enc, zipped):
    state = random_net(CFG).state_dict()
    prefixed = {f'module.{name}': t for name, t in state.items()}
    layouts = {'plain.pt': state, 'prefixed.pt': prefixed, 'bundle.pt': dict(model=state, epoch=1)}
    for file, contents in layouts.items():
        torch.save(contents, tmp_path/file, _use_new_zipfile_serialization=zipped)
        assert load(enc.spec, weights=tmp_path/file).fingerprint == enc.fingerprint


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_strip(tmp_path, enc, dtype, capsys, monkeypatch):
    monkeypatch.delenv('RSSQA_QUIET', raising=False)
    net = random_net(CFG)
    path = training_checkpoint(tmp_path/'run.pt', net)
    stripped = tmp_path/'out.safetensors'
    report = strip_checkpoint(path, stripped, dtype)
    state = read_weights(stripped)
    expected = net.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], v.to(state[k].dtype)) for k, v in expected.items())
    saving = 3 if dtype == 'float32' else 6
    assert abs(report['before'] / report['after'] / saving - 1) < 0.1
    assert 'MB' in capsys.readouterr().err
    assert load(enc.spec, weights=path).fingerprint == enc.fingerprint
    is_same = load(enc.spec, weights=stripped).fingerprint == enc.fingerprint
    assert is_same == (dtype == 'float32')


def test_strip_keeps_integers_scalars_and_strides(tmp_path):
    state = dict(count=torch.tensor(7), scale=torch.tensor(2.5), t=torch.arange(6.0).view(2, 3).T)
    state |= dict(flag=torch.tensor([True]), none=torch.zeros(0, 3))
    torch.save(state, tmp_path/'a.pt')
    strip_checkpoint(tmp_path/'a.pt', tmp_path/'a.safetensors')
    again = read_weights(tmp_path/'a.safetensors')
    assert again['count'].dtype == torch.int64 and again['scale'].shape == ()
    assert all(torch.equal(again[k].to(v.dtype), v) for k, v in state.items())


@pytest.mark.parametrize('weight', [1e6, -1e6, float('inf'), -float('inf'), 65536.0, -65536.0])
def test_weights_beyond_float16_are_refused_for_float16_only(tmp_path, weight):
    "Of either sign: a large negative weight would become -inf."
    path = tmp_path/'a.pt'
    torch.save(dict(small=torch.zeros(3), w=torch.tensor([1.0, weight])), path)
    with pytest.raises(Incompatible, match='65504'): strip_checkpoint(path, tmp_path/'a.safetensors')
    assert list(tmp_path.iterdir()) == [path]
    strip_checkpoint(path, tmp_path/'a.safetensors', 'float32')
    assert read_weights(tmp_path/'a.safetensors')['w'][1] == weight


@pytest.mark.parametrize('weight', [65504.0, -65504.0])
def test_the_largest_float16_weights_are_kept(tmp_path, weight):
    torch.save(dict(w=torch.tensor([weight])), tmp_path/'a.pt')
    strip_checkpoint(tmp_path/'a.pt', tmp_path/'a.safetensors')
    assert read_weights(tmp_path/'a.safetensors')['w'].item() == weight


def test_strip_refuses_another_file_and_another_suffix(tmp_path):
    path = tmp_path/'a.pt'
    torch.save(dict(w=torch.tensor([1.0])), path)
    with pytest.raises(DownloadError, match='(?i)sha256'):
        strip_checkpoint(path, tmp_path/'a.safetensors', 'float32', sha256=encoders['clip-rs'].sha256)
    with pytest.raises(Incompatible, match='safetensors'): strip_checkpoint(path, tmp_path/'a.bin')
    assert list(tmp_path.iterdir()) == [path]


class Evil:
    def __init__(self, target): self.target = target
    def __reduce__(self): return os.mkdir, (str(self.target),)


@pytest.mark.parametrize('where', ['state_dict', 'optimizer'])
def test_code_in_a_pickle_never_runs(tmp_path, where):
    path = training_checkpoint(tmp_path/'evil.pt', random_net(CFG), **{where: Evil(tmp_path/'boom')})
    with pytest.raises(Incompatible, match=r'evil\.pt.*mkdir.*safetensors') as e: read_weights(path)
    assert not (tmp_path/'boom').exists() and e.value.what and e.value.found and e.value.todo


DAMAGED = {
    'a.pt': b'<html>not found</html>',
    'b.pt': b'',
    'c.pt': b'PK\x03\x04junk',
    'd.safetensors': b'\x08\0\0\0\0\0\0\0{}',
}


@pytest.mark.parametrize('name', DAMAGED)
def test_damaged_files(tmp_path, name):
    (tmp_path/name).write_bytes(DAMAGED[name])
    with pytest.raises(Incompatible, match=name): read_weights(tmp_path/name)


def test_truncated_and_missing(tmp_path):
    path = training_checkpoint(tmp_path/'run.pt', random_net(CFG))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(Incompatible, match='run.pt'): read_weights(path)
    with pytest.raises(DataNotFound): read_weights(tmp_path/'nothing.pt')
    torch.save(dict(epoch=1, name='x'), tmp_path/'empty.pt')
    with pytest.raises(Incompatible, match='no state dict'): read_weights(tmp_path/'empty.pt')


def test_the_error_counts_and_shows_what_does_not_fit(tmp_path, enc):
    other = CFG | dict(vision_cfg=VISION | dict(patch_size=16, layers=3))
    torch.save(random_net(other).state_dict(), tmp_path/'w.pt')
    with pytest.raises(Incompatible) as e: load_encoder(enc.spec, weights=tmp_path/'w.pt')
    for part in ('2 of another shape', '12 unexpected', '(5, 32)', '(17, 32)'): assert part in str(e.value)
    state = random_net(CFG).state_dict()
    state.pop('ln_final.weight')
    torch.save(state, tmp_path/'w.pt')
    with pytest.raises(Incompatible, match='1 missing, first: ln_final.weight'):
        load_encoder(enc.spec, weights=tmp_path/'w.pt')


# the net ------------------------------------------------------------

@pytest.mark.parametrize('quick', [True, False])
def test_parity_with_open_clip(tmp_path, x, quick):
    import open_clip
    path = folder(tmp_path/'m', CFG | dict(quick_gelu=quick))
    reference = open_clip.create_model(f'local-dir:{path}').eval()     # default attention block
    tokens = open_clip.get_tokenizer(f'local-dir:{path}')(['a town', 'water'])
    ours = load(path)
    visual = reference.visual
    with torch.no_grad():
        z = ours.prepare(x)
        pooled = reference.encode_image(z, normalize=True)
        dense = visual.ln_post(visual.transformer(visual._embeds(z)))[:, 1:]
        text = reference.encode_text(tokens, normalize=True)
    out = ours.encode_image(x)
    assert torch.allclose(out.pooled, pooled, atol=1e-5) and torch.allclose(out.tokens, dense, atol=1e-4)
    assert torch.allclose(ours.encode_text(['a town', 'water']), text, atol=1e-5)


def test_activation_changes_the_numbers(tmp_path, x):
    quick = load(folder(tmp_path/'quick', CFG | dict(quick_gelu=True)))
    gelu = load(folder(tmp_path/'gelu', CFG | dict(quick_gelu=False)))
    files = [tmp_path/name/'open_clip_model.safetensors' for name in ('quick', 'gelu')]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert quick.fingerprint != gelu.fingerprint
    assert (quick.encode_image(x).pooled - gelu.encode_image(x).pooled).abs().max() > 1e-5


def test_flat_names_load_into_a_separate_text_tower(tmp_path):
    spec = spec_from_folder(folder(tmp_path/'c', CFG | dict(custom_text=True), weights=False))
    torch.save(random_net(CFG).state_dict(), tmp_path/'flat.pt')
    flat = load(folder(tmp_path/'f'))
    custom = load(spec, weights=tmp_path/'flat.pt')
    assert torch.equal(custom.encode_text(['a town']), flat.encode_text(['a town']))
    assert type(custom.net).__name__ == 'CustomTextCLIP'


RESNET = dict(image_size=64, layers=[1, 1, 1, 1], width=8, patch_size=None)


@pytest.mark.parametrize('vision, channels', [
    pytest.param(MOBILE, 1280, id='timm'),
    pytest.param(VISION | dict(pool_type='avg'), 32, id='mean-pooled'),
    pytest.param(RESNET, 256, id='resnet'),
])
def test_towers(tmp_path, x, vision, channels):
    e = load(folder(tmp_path/'m', CFG | dict(vision_cfg=vision)))
    out = e.encode_image(x)
    assert e.dense_dim == out.dense.shape[1] == channels
    assert 'fingerprint' in check_encoder(e) and isinstance(e, SemanticEncoder)
    with torch.no_grad(): expected = F.normalize(e.net.encode_image(e.prepare(x)), dim=-1)
    assert torch.allclose(expected, out.pooled, atol=1e-5)


def test_timm_map_is_what_the_pool_averages(tmp_path, x):
    e = load_encoder(folder(tmp_path/'m', CFG | dict(vision_cfg=MOBILE)), device='cpu')
    assert e.dtype == 'float32'                                        # auto: convolutions stay in float32
    with torch.no_grad():
        pooled = F.normalize(e.net.visual.head(e.encode_image(x).dense.mean((2, 3))), dim=-1)
    assert torch.allclose(pooled, e.encode_image(x).pooled, atol=1e-5)


def test_building_keeps_the_random_state_of_the_caller(tmp_path):
    path = folder(tmp_path/'m')
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_encoder(path)
    assert torch.equal(torch.rand(3), expected)


def test_loading_inside_inference_mode(tmp_path, x):
    with torch.inference_mode(): e = load(folder(tmp_path/'m'))
    assert e.fingerprint and not e.encode_image(x).pooled.is_inference()


# number formats ------------------------------------------------------------

def test_dtype_policy(tmp_path, monkeypatch):
    path = folder(tmp_path/'m')
    for fast, expected in ((True, 'bfloat16'), (False, 'float32')):
        monkeypatch.setattr(E, 'fast_bf16', lambda: fast)
        assert load_encoder(path, device='cpu').dtype == expected
    assert load_encoder(path, device='cpu', dtype='bfloat16').dtype == 'bfloat16'
    with pytest.raises(UnknownName, match='bfloat16'): load_encoder(path, device='cpu', dtype='bfloat61')


def test_bfloat16_is_close_and_has_its_own_fingerprint(x, enc):
    low = load(enc.spec, dtype='bfloat16')
    a = enc.encode_image(x)
    b = low.encode_image(x)
    assert (a.pooled * b.pooled).sum(1).min() > 0.999
    assert b.pooled.dtype == b.dense.dtype == torch.float32
    assert low.fingerprint != enc.fingerprint and check_encoder(low)


@pytest.mark.parametrize('supported', [(), ('_is_avx512_bf16_supported',), ('_is_amx_tile_supported',)])
def test_bfloat16_is_fast_where_the_processor_has_an_instruction(monkeypatch, supported):
    import platform
    monkeypatch.setattr(platform, 'machine', lambda: 'x86_64')
    for probe in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
        monkeypatch.setattr(torch.cpu, probe, lambda found=probe in supported: found, raising=False)
    assert E.fast_bf16() is bool(supported)


# preprocessing ------------------------------------------------------------

@pytest.mark.parametrize('h, w', [(64, 64), (100, 40), (20, 20), (7, 33)])
def test_resize_matches_pil(h, w):
    from PIL import Image
    # no overshoot: PIL clips between its two passes
    image = np.random.default_rng(0).integers(64, 192, (h, w, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
    ours = resize(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, 32)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() < 2.5 / 255


def test_resize_of_the_same_size_is_the_same(x): assert resize(x[..., :40], 40).data_ptr() == x.data_ptr()


BAD_BATCHES = {
    '3d': torch.rand(3, 8, 8),
    'bands': torch.rand(1, 4, 8, 8),
    'uint8': torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    'nan': torch.full((1, 3, 8, 8), np.nan),
    '255': torch.rand(1, 3, 8, 8) * 255,
    'negative': torch.rand(1, 3, 8, 8) - 0.5,
    'inf': torch.full((1, 3, 8, 8), np.inf),
    'empty': torch.zeros(0, 3, 8, 8),
}


@pytest.mark.parametrize('name', BAD_BATCHES)
def test_bad_batches(enc, name):
    with pytest.raises(BadImage, match='cannot encode'): enc.encode_image(BAD_BATCHES[name])


def test_numpy_and_double_are_accepted(enc, x):
    expected = enc.encode_image(x).pooled
    assert torch.allclose(enc.encode_image(x.numpy()).pooled, expected)
    assert torch.allclose(enc.encode_image(x.double()).pooled, expected, atol=1e-6)


def test_text_inputs(enc):
    one = enc.encode_text('a town')
    assert one.shape == (1, 16) and torch.equal(one, enc.encode_text(['a town']))
    assert enc.encode_text(('a', 'b')).shape == (2, 16)
    assert enc.encode_text(['very ' * 200]).shape == (1, 16)


# fingerprint ------------------------------------------------------------

def test_fingerprint_covers_what_changes_numbers(tmp_path, enc):
    changes = [dict(mean=HALF), dict(std=HALF), dict(interpolation='bilinear')]
    other = [load(replace(enc.spec, **change)) for change in changes]
    other.append(load(folder(tmp_path/'seed', seed=1)))
    other.append(load(folder(tmp_path/'heads', CFG | dict(vision_cfg=VISION | dict(head_width=8)))))
    fingerprints = [e.fingerprint for e in [enc, *other]]
    assert len(set(fingerprints)) == len(fingerprints)


def test_fingerprint_ignores_names_and_places(tmp_path, enc):
    assert load(folder(tmp_path/'elsewhere')).fingerprint == enc.fingerprint


def test_fingerprint_follows_the_weights_in_memory(enc):
    before = enc.fingerprint
    state = {k: v.clone() for k, v in enc.net.state_dict().items()}
    enc.net.visual.proj.mul_(2)
    changed = enc.fingerprint
    enc.net.load_state_dict(state)
    assert changed != before == enc.fingerprint


def test_fingerprint_is_cached(enc, monkeypatch):
    enc.fingerprint
    monkeypatch.setattr(E, 'state_digest', lambda _: pytest.fail('digested again'))
    enc.fingerprint


# encode ------------------------------------------------------------

def test_encode_is_the_same_at_any_batch(enc):
    rng = np.random.default_rng(0)
    sizes = ((32, 32), (40, 20), (50, 64), (33, 31), (32, 32))
    images = [rng.random((3, h, w), np.float32) for h, w in sizes]
    whole = encode(enc, images, batch=5, grid=None)
    small = encode(enc, iter(images), batch=2, grid=2)
    assert torch.allclose(whole.pooled, small.pooled, atol=1e-5) and small.dense.shape == (5, 32, 2, 2)
    assert torch.allclose(F.adaptive_avg_pool2d(whole.dense, 2), small.dense, atol=1e-4)
    with pytest.raises(BadImage, match='nothing'): encode(enc, [])


# planted faults ------------------------------------------------------------

class Planted:
    "A sound encoder with one thing wrong: an attribute, `image` or `text`."
    def __init__(self, inner, **wrong):
        self.inner = inner
        self.net = inner.net
        self.wrong = wrong
    def __getattr__(self, name): return self.wrong[name] if name in self.wrong else getattr(self.inner, name)
    def encode_image(self, x):
        if 'image' in self.wrong: return self.wrong['image'](self.inner, x)
        return self.inner.encode_image(x)
    def encode_text(self, texts):
        if 'text' in self.wrong: return self.wrong['text'](self.inner, texts)
        return self.inner.encode_text(texts)


def unnormalised(e, x):
    out = e.encode_image(x)
    return SemOutput(out.pooled * 3, out.dense)
def careless(e, x): return e.encode_image(x / 255 if x.max() > 1 else x)
def centred(e, x):
    out = e.encode_image(x)
    v = out.pooled + 0.3 * out.pooled.mean(0)
    return SemOutput(F.normalize(v, dim=-1), out.dense)
def contrast(e, x):
    out = e.encode_image(x)
    scale = x.std((1, 2, 3))[:, None]
    return SemOutput(out.pooled * (scale / scale), out.dense)
def dropout(e, x):
    out = e.encode_image(x)
    return SemOutput(F.normalize(F.dropout(out.pooled, 0.2), dim=-1), out.dense)
def in_place(e, x):
    x.clamp_(0, 0.5 if x.max() <= 1 else None)
    return e.encode_image(x)
def flat(e, x):
    out = e.encode_image(x)
    return SemOutput(out.pooled, out.dense.flatten(2))
def half(e, x):
    out = e.encode_image(x)
    return SemOutput(out.pooled.half(), out.dense)
def grads(e, x):
    out = e.encode_image(x)
    return SemOutput(out.pooled, out.dense.clone().requires_grad_())
def blind(e, x):
    e.encode_image(x)
    return e.encode_image(torch.zeros_like(x))
def long_text(e, t): return e.encode_text(t) * 2
def text_mean(e, t):
    v = e.encode_text(t)
    return F.normalize(v + v.mean(0), dim=-1)


@pytest.mark.parametrize('promise, wrong', [
    ('unit', dict(image=unnormalised)),
    ('range', dict(image=careless)),
    ('batch', dict(image=centred)),
    ('constant', dict(image=contrast)),
    ('repeat', dict(image=dropout)),
    ('repeat', dict(image=in_place)),
    ('shapes', dict(image=flat)),
    ('shapes', dict(image=half)),
    ('quiet', dict(image=grads)),
    ('sight', dict(image=blind)),
    ('shapes', dict(dim=17)),
    ('shapes', dict(dense_dim=31)),
    ('attributes', dict(name=None)),
    ('fingerprint', dict(fingerprint='v1')),
    ('text', dict(text=long_text)),
    ('text', dict(text=text_mean)),
])
def test_planted_faults_are_found(enc, wrong, promise):
    assert check_encoder(Planted(enc)) == list(E._CHECKS)
    with pytest.raises(Incompatible, match=f'(?i){promise}: '): check_encoder(Planted(enc, **wrong))


def test_training_mode_is_found_and_all_faults_are_listed(enc):
    enc.net.train()
    with pytest.raises(Incompatible, match='(?i)quiet: the net is in training mode'): check_encoder(enc)
    with pytest.raises(Incompatible, match='(?i)breaks 4 of .*unit: .*constant: .*quiet: .*range: '):
        check_encoder(Planted(enc, image=lambda e, x: unnormalised(e, x.clamp(max=1))))


def test_check_leaves_the_weights_as_they_were(enc):
    before = {k: v.clone() for k, v in enc.net.state_dict().items()}
    check_encoder(enc)
    assert all(torch.equal(v, before[k]) for k, v in enc.net.state_dict().items())


def test_plugins_may_register_objects_made_by_a_factory(enc):
    encoders.register('planted', lambda: Planted(enc), replace=True)
    try: assert load_encoder('planted').name == enc.name and load_encoder(enc) is enc
    finally: del encoders.entries['planted']


# tiny-clip and real weights ------------------------------------------------------------

def test_tiny_is_trained_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    for name, value in dict(scenes=2, steps=3, size=32).items(): monkeypatch.setitem(E._RECIPE, name, value)
    first = load('tiny-clip')
    monkeypatch.setattr(E, '_make_tiny', lambda _: pytest.fail('trained again'))
    assert load('tiny-clip').fingerprint == first.fingerprint
    files = [path.name for path in (tmp_path/'encoders').iterdir()]
    assert files == [f'tiny-clip-{E._tiny_version()}'] and check_encoder(first)
    monkeypatch.undo()


def test_tiny_survives_a_race(tmp_path, monkeypatch):
    "Another process finishes first: its folder stays, ours goes."
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    def other_process(tmp):
        folder(tmp_path/'encoders'/f'tiny-clip-{E._tiny_version()}', E._TINY, seed=1)
        folder(E.Path(tmp), E._TINY, seed=2)
    monkeypatch.setattr(E, '_make_tiny', other_process)
    e = load('tiny-clip')
    assert torch.equal(e.net.visual.proj, random_net(E._TINY, 1).visual.proj)
    assert len(list((tmp_path/'encoders').iterdir())) == 1


def test_an_interrupted_training_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    def stop(tmp):
        (E.Path(tmp)/'open_clip_config.json').write_text('{')
        raise KeyboardInterrupt
    monkeypatch.setattr(E, '_make_tiny', stop)
    with pytest.raises(KeyboardInterrupt): load_encoder('tiny-clip')
    assert list((tmp_path/'encoders').iterdir()) == []


def test_tiny_data_pairs_every_case_once():
    def tokenizer(texts): return torch.tensor([[hash(text) % 2**31] for text in texts])
    images, tokens = E._tiny_data(tokenizer, 2, 32)
    n_cases = len(E._CASES)
    assert images.shape == (2, n_cases, 3, 64, 64)
    for wording in tokens:
        for of_scene in wording: assert len(set(of_scene[:, 0].tolist())) == n_cases


@real
def test_mini_names_scenes():
    from pathlib import Path
    e = load_encoder('clip-rs-mini', device='cpu')
    images = Path(os.environ['RSSQA_REAL'])/'pairs'/'images'/'rsicd'
    words = dict(beach='beach', forest='forest', parking='parking', storagetanks='storage tanks')
    words |= dict(airport='airport', desert='desert')
    paths = []
    truth = []
    for i, name in enumerate(words):
        of_class = sorted(images.glob(f'{name}_*.jpg'))[:6]
        paths += of_class
        truth += [i] * len(of_class)
    text = e.encode_text([f'a satellite image of {word}.' for word in words.values()])
    predictions = (encode(e, paths).pooled @ text.T).argmax(1)
    assert predictions.eq(torch.tensor(truth)).float().mean() > 0.8 and check_encoder(e)


@real
def test_frozen_parity_with_open_clip(x):
    import open_clip
    e = load_encoder('clip-rs-frozen', device='cpu')
    reference = open_clip.create_model(f'local-dir:{e.spec.architecture}').eval()
    with torch.no_grad(): expected = reference.encode_image(e.prepare(x), normalize=True)
    assert torch.allclose(expected, e.encode_image(x).pooled, atol=1e-5)


# a backbone without words ------------------------------------------------------------

def backbone_file(path, name='mobilenetv2_035'):
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model(name).state_dict(), path)
    return path


def test_a_backbone_encodes_images_and_refuses_text(tmp_path):
    weights = backbone_file(tmp_path/'w.safetensors')
    e = E.BackboneEncoder('mobilenetv2_035', weights, 64)
    out = encode(e, [np.zeros((3, 40, 50), np.float32), np.ones((3, 64, 64), np.float32)])
    assert out.pooled.shape == (2, e.dim) and out.dense.shape[:2] == (2, e.dense_dim)
    assert e.fingerprint != E.BackboneEncoder('mobilenetv2_035', weights, 96).fingerprint
    assert e.fingerprint == E.BackboneEncoder('mobilenetv2_035', weights, 64).fingerprint
    with pytest.raises(Incompatible, match='no text tower'): e.encode_text(['a town'])


def test_a_backbone_may_widen_its_pooled_vector(tmp_path):
    name = 'mobilenetv3_small_050'
    e = E.BackboneEncoder(name, backbone_file(tmp_path/'w.safetensors', name), 64)
    assert e.encode_image(torch.rand(1, 3, 64, 64)).pooled.shape == (1, e.dim)


def test_a_backbone_must_be_convolutional(tmp_path):
    name = 'vit_tiny_patch16_224'
    path = backbone_file(tmp_path/'w.safetensors', name)
    with pytest.raises(Incompatible, match='convolutional'): E.BackboneEncoder(name, path)


def test_weights_of_another_backbone_are_refused(tmp_path):
    with pytest.raises(Incompatible, match='missing or has another shape'):
        E.BackboneEncoder('mobilenetv2_050', backbone_file(tmp_path/'w.safetensors'))


# published remote-sensing encoders ------------------------------------------------------------

def messages_of(capsys): return capsys.readouterr().err


@pytest.fixture
def loud(monkeypatch): monkeypatch.delenv('RSSQA_QUIET', raising=False)


def test_the_table_holds_every_published_remote_sensing_clip():
    published = [spec for spec in SPECS if spec.name != 'clip-rs']
    families = Counter(spec.name.split('-')[0].rstrip('12') for spec in published)
    assert families == dict(georsclip=6, farslip=4, openai=3, laion=3, remoteclip=3, skyclip=2, rs=1)
    gelu = [s.name for s in SPECS if not s.quick_gelu and not s.name.startswith('laion')]
    assert gelu == ['georsclip-vit-h-14', 'rs-m-clip', 'skyclip-vit-b-32']
    assert encoders['georsclip-vit-l-14-336'].image_size == 336
    inferred = [s for s in SPECS if s.name.startswith(('remoteclip', 'georsclip', 'clip-rs'))]
    assert all('inferred' in s.note for s in inferred)
    assert all(s.licence and s.source and s.weights for s in SPECS)


def test_conformance_of_the_whole_table():
    table = conformance()
    assert list(table.index) == [s.name for s in SPECS] and table.ok.all(), table[~table.ok]
    assert set(table.index[table.context == 248]) == {'farslip2-vit-b-32', 'farslip2-vit-b-16'}
    assert (table.promises == len(E._CHECKS)).all()


@pytest.mark.parametrize('name, file', [
    ('remoteclip-vit-b-32', 'RemoteCLIP-ViT-B-32.pt from chendelong'),
    ('rs-m-clip', 'open_clip_model.safetensors from joaodaniel'),
    ('skyclip-vit-l-14', 'unpack'),
])
def test_the_error_names_the_file_of_a_published_encoder(name, file):
    with pytest.raises(DataNotFound, match=file): load_encoder(name)


def test_conformance_finds_a_wrong_activation(monkeypatch):
    "A loader that ignores the spec's activation would be found."
    def gelu_only(config, block='custom'): return build_net(config | dict(quick_gelu=False), block)
    monkeypatch.setattr(E, 'build_net', gelu_only)
    assert conformance(['laion-vit-b-32', 'openai-vit-b-32']).ok.tolist() == [True, False]


def test_an_itra_file_is_the_same_encoder(tmp_path, enc):
    path = write_format(tmp_path/'itra.pt', random_net(CFG).state_dict(), 'itra')
    assert load(enc.spec, weights=path).fingerprint == enc.fingerprint


def test_a_grid_of_another_size_names_its_remedy(tmp_path, enc, x):
    net = random_net(CFG | dict(vision_cfg=VISION | dict(image_size=64)))
    torch.save(net.state_dict(), tmp_path/'w.pt')
    with pytest.raises(Incompatible, match='64-pixel net of patch 8: use image_size=64'):
        load_encoder(enc.spec, weights=tmp_path/'w.pt')
    corrected = load(replace(enc.spec, image_size=64), weights=tmp_path/'w.pt')
    out = corrected.encode_image(x)
    expected = F.normalize(net.encode_image(corrected.prepare(x)), dim=1)
    assert out.dense.shape[2:] == (8, 8) and torch.allclose(expected, out.pooled, atol=1e-5)


def test_the_error_for_a_bare_file_lists_what_can_be_read_from_it(tmp_path):
    import open_clip
    with torch.device('meta'): shapes = open_clip.CLIP(**open_clip.get_model_config('ViT-B-32')).state_dict()
    # one number each on disk
    state = {name: torch.zeros(()).expand(t.shape) for name, t in shapes.items()}
    path = write_format(tmp_path/'w.pt', state, 'open_clip_train')
    known = r"activation; this one is of kind 'open_clip_train' and has the shapes of ViT-B-32.*quick_gelu"
    with pytest.raises(Incompatible, match=known): load_encoder(path)


# texts of 248 tokens ------------------------------------------------------------

LONG_TEXT = TEXT | dict(context_length=77)


def long_file(path, drop=(), net=None):
    state = lengthen((net or random_net(CFG | dict(text_cfg=LONG_TEXT))).state_dict())
    torch.save({k: t for k, t in state.items() if k not in drop}, path)
    return path


@pytest.mark.parametrize('drop', [(), ('mask1', 'mask2')], ids=['masks', 'no-masks'])
def test_a_long_clip_is_recognised_by_its_keys(tmp_path, capsys, loud, drop):
    short = load(folder(tmp_path/'m', CFG | dict(text_cfg=LONG_TEXT)))
    long = load(short.spec, weights=long_file(tmp_path/'w.pt', drop))
    assert '248 tokens' in messages_of(capsys)
    assert long.context_length == long.spec.context_length == long.tokenizer(['a']).shape[1] == 248
    assert torch.allclose(long.encode_text(['a town']), short.encode_text(['a town']), atol=1e-5)
    assert long.fingerprint != short.fingerprint
    assert check_encoder(long) and long.encode_text_tokens(['a town'])[0].shape == (1, 248, 16)


def test_a_long_clip_reads_what_a_short_one_cuts(tmp_path, capsys, loud):
    short = load(folder(tmp_path/'m', CFG | dict(text_cfg=LONG_TEXT)))
    long = load(short.spec, weights=long_file(tmp_path/'w.pt'))
    texts = [' '.join(['road'] * 100 + [end]) for end in ('forest', 'harbour')]
    assert not torch.equal(*long.encode_text(texts)) and 'cut' not in messages_of(capsys)
    assert torch.equal(*short.encode_text(texts)) and '2 of 2 sentences' in messages_of(capsys)


def test_a_long_clip_in_the_wrong_place(tmp_path):
    spec = spec_from_folder(folder(tmp_path/'m', CFG | dict(custom_text=True), weights=False))
    with pytest.raises(Incompatible, match='Long-CLIP'):
        load_encoder(spec, weights=long_file(tmp_path/'w.pt'))


def test_open_clip_itself_would_not_load_it(tmp_path):
    "The reason for this module: stock loading fails, and lenient loading would drop the second table."
    net = random_net(CFG | dict(text_cfg=LONG_TEXT))
    state = torch.load(long_file(tmp_path/'w.pt'), weights_only=True)
    with pytest.raises(RuntimeError, match='positional_embedding_res'): net.load_state_dict(state)


# patches and tokens ------------------------------------------------------------

@pytest.mark.parametrize('mode', ['vanilla', 'maskclip', 'clearclip', 'sclip', 'segearth'])
def test_dense_vectors_share_the_space_of_sentences(enc, x, mode):
    before = enc.encode_image(x).pooled
    dense = enc.encode_dense(x, mode)
    assert dense.shape == (3, enc.dim, 4, 4) and dense.dtype == torch.float32
    assert torch.allclose(dense.norm(dim=1), torch.ones(3, 4, 4), atol=1e-5)
    cosines = torch.einsum('ndhw,td->nthw', dense, enc.encode_text(['a town', 'water']))
    assert cosines.abs().max() <= 1 + 1e-5
    assert torch.equal(enc.encode_image(x).pooled, before)
    assert enc.encode_dense(x, mode, project=False).shape == (3, enc.dense_dim, 4, 4)


def test_dense_in_bfloat16_is_close(enc, x):
    low = load(enc.spec, dtype='bfloat16')
    cosines = (low.encode_dense(x, 'segearth') * enc.encode_dense(x, 'segearth')).sum(1)
    assert cosines.min() > 0.99 and low.encode_dense(x).dtype == torch.float32


def test_dense_checks_its_input(enc):
    with pytest.raises(BadImage): enc.encode_dense(torch.rand(1, 3, 8, 8) * 255)
    with pytest.raises(UnknownName, match='sclip'): enc.encode_dense(torch.rand(1, 3, 8, 8), 'scilp')


def test_tokens_pooled_are_the_sentence(enc):
    words = ['a harbour with many boats', 'forest']
    features, mask = enc.encode_text_tokens(words)
    assert features.dtype == torch.float32 and mask.dtype == torch.bool and mask.sum(1).tolist() == [7, 3]
    pooled = F.normalize(text_pool(enc.net, features, mask), dim=1)
    assert torch.allclose(pooled, enc.encode_text(words), atol=1e-5)


def test_sentences_that_are_cut_are_counted(enc, capsys, loud):
    long = 'a satellite image of a town beside a river ' * 93 + 'x'
    assert len(long) == 4000 and enc.encode_text([long, 'a town', long]).shape == (3, 16)
    expected = '2 of 3 sentences have more than 16 tokens; their ends were cut'
    assert messages_of(capsys).strip().endswith(expected)
    fourteen = 'one two three four five six seven eight nine ten eleven twelve thirteen fourteen'
    enc.encode_text([fourteen])                                        # with start and end exactly 16 tokens
    assert 'cut' not in messages_of(capsys)
    enc.encode_text([fourteen + ' fifteen'])
    assert '1 of 1' in messages_of(capsys)


def test_empty_sentences(enc):
    for read in (enc.encode_text, enc.encode_text_tokens):
        with pytest.raises(Incompatible, match='2 of 3 sentences.*index 0, 2'): read([' ', 'a town', ''])
        with pytest.raises(Incompatible, match='Found NoneType'): read(['a town', None])
    out = enc.encode_text(['', 'a town'], empty='zero')
    assert out[0].abs().max() == 0 and torch.allclose(out[1:], enc.encode_text(['a town']), atol=1e-6)
    with pytest.raises(UnknownName, match='zero'): enc.encode_text(['a'], empty='drop')


# a bundle with its own tokenizer ------------------------------------------------------------

MULTI_TEXT = dict(hf_model_name='text', hf_tokenizer_name='text', hf_pooler_type='mean_pooler')
MULTI = CFG | dict(text_cfg=MULTI_TEXT)


@pytest.fixture
def bundle(tmp_path):
    home = tmp_path/'bundle'
    home.mkdir()
    tiny_multilingual(home/'text')
    (home/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=MULTI)))
    torch.manual_seed(0)
    net = E.build_net_in_folder(MULTI, home)
    for parameter in net.parameters(): parameter.add_(0.05 * torch.randn_like(parameter))
    write_format(home, net.state_dict(), 'bundle')
    return home


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)


SENTENCES = ['a harbour with boats', 'um porto com barcos', 'ein Hafen mit Booten']
SENTENCES += ['港口和船只', 'гавань с лодками', '배가 있는 항구']


def test_a_multilingual_bundle_loads_from_its_folder(bundle, offline):
    e = load(bundle)
    assert type(e.tokenizer).__name__ == 'HFTokenizer' and check_encoder(e)
    assert e.config['text_cfg']['hf_model_name'] == 'text'
    assert 'XLMRobertaModel' in {type(m).__name__ for m in e.net.modules()}
    assert spec_from_folder(bundle).format == 'bundle'


def test_multilingual_sentences_have_different_vectors(bundle, offline):
    text = load(bundle).encode_text(SENTENCES)
    assert (text @ text.T - 2 * torch.eye(len(SENTENCES))).max() < 0.99999


def test_multilingual_vectors_are_means_of_real_tokens(bundle, offline):
    e = load(bundle)
    features, mask = e.encode_text_tokens(SENTENCES)
    pooled = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = F.normalize(e.net.text.proj(pooled), dim=1)
    assert torch.allclose(expected, e.encode_text(SENTENCES), atol=1e-5)
    # one token for each byte, the mark of the first word, start and end
    assert mask.sum(1).tolist() == [len(sentence.encode()) + 3 for sentence in SENTENCES]


def test_specs_name_their_multilingual_encoders():
    assert encoders['rs-m-clip'].multilingual and not encoders['laion-vit-b-32'].multilingual


def test_the_named_spec_takes_the_folder(bundle, offline, x):
    # the published sizes outside, tiny inside
    config = MULTI | dict(embed_dim=512, vision_cfg=VISION | dict(image_size=224, patch_size=32))
    config_file = bundle/'open_clip_config.json'
    config_file.write_text(json.dumps(dict(model_cfg=config)))
    torch.manual_seed(0)
    net = E.build_net_in_folder(config, bundle)
    write_format(bundle, net.state_dict(), 'bundle')
    named = load('rs-m-clip', weights=bundle)
    assert named.name == 'rs-m-clip' and named.fingerprint == load(bundle).fingerprint
    expected = F.normalize(net.encode_image(named.prepare(x)), dim=1)
    assert torch.allclose(named.encode_image(x).pooled, expected, atol=1e-5)
    config_file.write_text(json.dumps(dict(model_cfg=config | dict(quick_gelu=True))))
    with pytest.raises(Incompatible, match='states QuickGELU'): load_encoder('rs-m-clip', weights=bundle)


def test_weights_from_elsewhere_do_not_bring_their_config(tmp_path, x):
    "The folder that was named decides the architecture, whatever lies beside the weights."
    spec = spec_from_folder(folder(tmp_path/'a', CFG | dict(custom_text=True), weights=False))
    other = folder(tmp_path/'b')
    e = load(spec, weights=other/'open_clip_model.safetensors')
    assert type(e.net).__name__ == 'CustomTextCLIP'
    assert torch.equal(e.encode_image(x).pooled, load(other).encode_image(x).pooled)


def test_a_bundle_is_its_files_and_not_its_place(bundle, offline, tmp_path):
    first = load(bundle).fingerprint
    moved = tmp_path/'elsewhere'
    os.rename(bundle, moved)
    assert load(moved).fingerprint == first
    tokenizer = moved/'text'/'tokenizer.json'
    tokenizer.write_text(tokenizer.read_text().replace('-1.0', '-2.0'))
    assert load(moved).fingerprint != first


def test_tokenizer_files_may_lie_beside_the_weights(bundle, offline):
    for p in (bundle/'text').glob('token*'): os.rename(p, bundle/p.name)
    assert load_encoder(bundle, device='cpu', dtype='float32').encode_text(['a town']).shape == (1, 16)


@pytest.mark.parametrize('file', ['config.json', 'tokenizer.json'])
def test_a_missing_file_is_named(bundle, offline, file):
    (bundle/'text'/file).unlink()
    with pytest.raises(DownloadError, match=f'no {file} of text.*put {file}'):
        load_encoder(bundle, device='cpu', dtype='float32').encode_text(['a town'])


def test_a_damaged_text_config_is_named(bundle, offline):
    (bundle/'text'/'config.json').write_text('{')
    with pytest.raises(Incompatible, match='config.json'): load_encoder(bundle)


def test_multilingual_captions_are_counted_and_cut(bundle, offline, capsys, loud):
    vectors = load(bundle).encode_text(['港' * 40, '港'])
    assert vectors.shape == (2, 16) and '1 of 2 sentences have more than 77 tokens' in messages_of(capsys)


# the hub ------------------------------------------------------------

def test_the_hub_without_a_network(monkeypatch):
    import open_clip
    def absent(*a, **k): raise FileNotFoundError('Failed to download file (open_clip_config.json)')
    monkeypatch.setattr(open_clip.pretrained, 'download_pretrained_from_hf', absent)
    with pytest.raises(DownloadError, match='hf-hub:someone/some-clip.*folder'):
        load_encoder('hf-hub:someone/some-clip')


def test_the_hub_gives_a_folder(monkeypatch, tmp_path, x):
    import open_clip
    home = folder(tmp_path/'snapshot')
    requests = []
    def fetch(owner, filename=None, **k):
        requests.append((owner, filename))
        return str(home/(filename or 'open_clip_model.safetensors'))
    monkeypatch.setattr(open_clip.pretrained, 'download_pretrained_from_hf', fetch)
    e = load('hf-hub:someone/some-clip')
    assert e.name == 'someone/some-clip' and [owner for owner, _ in requests] == ['someone/some-clip'] * 2
    assert torch.equal(e.encode_image(x).pooled, load(home).encode_image(x).pooled)
