"""Encoders: specs, weight files, activation, number formats, preprocessing, conformance."""
import json, os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rssqa.clip.encoders as E
from rssqa.clip.conformance import conformance, tiny_multilingual, write_format
from rssqa.clip.checkpoints import lengthen
from rssqa.core import BadImage, DataNotFound, DownloadError, Incompatible, UnknownName, encoders
from rssqa.clip.encoders import (
    EncoderSpec,
    OpenClipEncoder,
    SemanticEncoder,
    SemOutput,
    check_encoder,
    encode,
    load_encoder,
    read_weights,
    resize,
    spec_from_folder,
    spec_from_tag,
    strip_checkpoint,
)
from rssqa.clip.towers import text_pool

real = pytest.mark.skipif(not os.environ.get('RSSQA_REAL'), reason='RSSQA_REAL is unset')
VISION = dict(image_size=32, patch_size=8, width=32, head_width=16, layers=2)
TEXT = dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1)
CFG = dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)
MOBILE = dict(timm_model_name='mobilenetv2_050', timm_pool='avg', timm_proj='linear', image_size=32)


def random_net(cfg, seed=0):
    torch.manual_seed(seed)
    net = E._net(cfg)
    for p in net.parameters(): p.add_(0.02 * torch.randn_like(p))
    return net


def folder(path, cfg=CFG, seed=0, weights=True):
    path.mkdir(parents=True, exist_ok=True)
    (path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg)))
    if weights:
        E._write_safetensors(
            path / 'open_clip_model.safetensors', random_net(cfg, seed).state_dict(), lambda t: t, {}
        )
    return path


def training_checkpoint(path, net, **more):
    "The layout of CLIP_RS.pt: epoch, name, state_dict under module., Adam's moments."
    moments = {
        i: dict(step=torch.tensor(3.0), exp_avg=torch.rand_like(p), exp_avg_sq=torch.rand_like(p))
        for i, p in enumerate(net.parameters())
    }
    state = {f'module.{k}': v for k, v in net.state_dict().items()}
    torch.save(
        dict(
            epoch=3, name='run', state_dict=state, optimizer=dict(state=moments, param_groups=[dict(lr=1e-4)])
        )
        | more,
        path,
    )
    return path


@pytest.fixture
def enc(tmp_path): return load_encoder(folder(tmp_path/'model'), device='cpu', dtype='float32')


@pytest.fixture
def x(): return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(1))


# specs ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('spec', E.SPECS, ids=lambda s: s.name)
def test_specs_agree_with_open_clip(spec):
    import open_clip
    E._config(spec)                                                    # dim and image size
    if spec.format != 'safetensors': return                         # a file that open_clip does not list
    tag = open_clip.get_pretrained_cfg(spec.architecture, spec.weights)
    assert tag, 'no such tag'
    assert (spec.quick_gelu, spec.mean, spec.std, spec.interpolation) == (
        tag.get('quick_gelu', False),
        tuple(tag['mean']),
        tuple(tag['std']),
        tag['interpolation'],
    )
    assert replace(spec_from_tag(f'{spec.architecture}/{spec.weights}'), name='', source='') == replace(
        spec, name='', source='', licence='', note=''
    )


@pytest.mark.parametrize('name', ['openai-vit-b-32', 'laion-vit-b-32', 'clip-rs'])
def test_every_activation_is_the_specs(name, monkeypatch):
    import open_clip
    small = CFG | dict(embed_dim=encoders[name].dim, vision_cfg=VISION | dict(image_size=224, patch_size=112))
    monkeypatch.setattr(open_clip, 'get_model_config', lambda _: json.loads(json.dumps(small)))
    net = E._net(E._config(encoders[name]))
    kinds = {type(m).__name__ for m in net.modules()} & {'QuickGELU', 'GELU'}
    assert kinds == ({'QuickGELU'} if encoders[name].quick_gelu else {'GELU'})


def test_a_stated_activation_beats_silence_but_not_the_spec(tmp_path):
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
        E._config(EncoderSpec('a', 'ViT-B-32-quickgelu', False, 512))
    with pytest.raises(Incompatible, match='(?i)dim, image_size'):
        E._config(EncoderSpec('a', 'ViT-B-32', False, 768))
    with pytest.raises(UnknownName, match='ViT-B-32'): E._config(EncoderSpec('a', 'ViT-B-23', False, 512))


def test_unknown_names(tmp_path):
    with pytest.raises(UnknownName, match='clip-rs'): load_encoder('cliprs')
    with pytest.raises(UnknownName, match='ViT-B-32/laion400m_e32'): load_encoder('ViT-B-32/laion400m_e33')
    with pytest.raises(Incompatible, match='activation'): load_encoder(tmp_path/'w.pt')
    with pytest.raises(DataNotFound, match='open_clip_config'): load_encoder(tmp_path)


def test_clip_rs_says_where_to_put_the_file():
    with pytest.raises(DataNotFound, match='CLIP_RS.pt from hy1111/CLIP-RS'): load_encoder('clip-rs')


def test_frozen_without_real_data(monkeypatch):
    monkeypatch.delenv('RSSQA_REAL', raising=False)
    with pytest.raises(DataNotFound, match='RSSQA_REAL'): load_encoder('clip-rs-frozen')


def test_failed_download_is_explained(monkeypatch):
    import open_clip
    def offline(*a, **k): raise ConnectionError('no route')
    monkeypatch.setattr(open_clip, 'download_pretrained', offline)
    with pytest.raises(DownloadError, match='weights=<path>'): load_encoder('laion-vit-b-32')


# weight files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_containers_give_the_same_encoder(tmp_path, enc, zipped):
    net = random_net(CFG)
    spec = enc.spec
    files = [tmp_path/n for n in ('plain.pt', 'prefixed.pt', 'bundle.pt')]
    for file, state in zip(files, (net.state_dict(), {f'module.{k}': v for k, v in net.state_dict().items()}, dict(model=net.state_dict(), epoch=1))):
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
    assert {load_encoder(spec, weights=f, dtype='float32').fingerprint for f in files} == {enc.fingerprint}


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_strip(tmp_path, enc, dtype, capsys, monkeypatch):
    monkeypatch.delenv('RSSQA_QUIET', raising=False)
    net = random_net(CFG)
    path = training_checkpoint(tmp_path/'run.pt', net)
    report = strip_checkpoint(path, tmp_path/'out.safetensors', dtype)
    state = read_weights(tmp_path/'out.safetensors')
    assert state.keys() == net.state_dict().keys() and all(
        torch.equal(state[k], v.to(state[k].dtype)) for k, v in net.state_dict().items()
    )
    assert (
        abs(report['before'] / report['after'] / (3 if dtype == 'float32' else 6) - 1) < 0.1
        and 'MB' in capsys.readouterr().err
    )
    direct, stripped = (
        load_encoder(enc.spec, weights=w, dtype='float32').fingerprint
        for w in (path, tmp_path / 'out.safetensors')
    )
    assert direct == enc.fingerprint and (stripped == direct) == (dtype == 'float32')


def test_strip_keeps_integers_scalars_and_strides(tmp_path):
    state = dict(
        count=torch.tensor(7),
        scale=torch.tensor(2.5),
        t=torch.arange(6.0).view(2, 3).T,
        flag=torch.tensor([True]),
        none=torch.zeros(0, 3),
    )
    torch.save(state, tmp_path/'a.pt')
    strip_checkpoint(tmp_path/'a.pt', tmp_path/'a.safetensors')
    again = read_weights(tmp_path/'a.safetensors')
    assert (
        again['count'].dtype == torch.int64
        and again['scale'].shape == ()
        and all(torch.equal(again[k].to(v.dtype), v) for k, v in state.items())
    )


def test_strip_refuses(tmp_path):
    torch.save(dict(w=torch.tensor([1e6])), tmp_path/'a.pt')
    with pytest.raises(Incompatible, match='65504'):
        strip_checkpoint(tmp_path/'a.pt', tmp_path/'a.safetensors')
    with pytest.raises(DownloadError, match='(?i)sha256'):
        strip_checkpoint(
            tmp_path / 'a.pt', tmp_path / 'a.safetensors', 'float32', sha256=encoders['clip-rs'].sha256
        )
    with pytest.raises(Incompatible, match='safetensors'): strip_checkpoint(tmp_path/'a.pt', tmp_path/'a.bin')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.pt']


class Evil:
    def __init__(self, target): self.target = target
    def __reduce__(self): return os.mkdir, (str(self.target),)


@pytest.mark.parametrize('where', ['state_dict', 'optimizer'])
def test_code_in_a_pickle_never_runs(tmp_path, where):
    path = training_checkpoint(tmp_path/'evil.pt', random_net(CFG), **{where: Evil(tmp_path/'boom')})
    with pytest.raises(Incompatible, match=r'evil\.pt.*mkdir.*safetensors') as e: read_weights(path)
    assert not (tmp_path/'boom').exists() and e.value.what and e.value.found and e.value.todo


@pytest.mark.parametrize('content, name', [(b'<html>not found</html>', 'a.pt'), (b'', 'b.pt'), (b'PK\x03\x04junk', 'c.pt'), (b'\x08\0\0\0\0\0\0\0{}', 'd.safetensors')])
def test_damaged_files(tmp_path, content, name):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(Incompatible, match=name): read_weights(tmp_path/name)


def test_truncated_and_missing(tmp_path):
    path = training_checkpoint(tmp_path/'run.pt', random_net(CFG))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(Incompatible, match='run.pt'): read_weights(path)
    with pytest.raises(DataNotFound): read_weights(tmp_path/'nothing.pt')
    torch.save(dict(epoch=1, name='x'), tmp_path/'empty.pt')
    with pytest.raises(Incompatible, match='no state dict'): read_weights(tmp_path/'empty.pt')


def test_wrong_architecture_counts_and_shows(tmp_path, enc):
    other = CFG | dict(vision_cfg=VISION | dict(patch_size=16, layers=3))
    torch.save(random_net(other).state_dict(), tmp_path/'w.pt')
    with pytest.raises(Incompatible) as e: load_encoder(enc.spec, weights=tmp_path/'w.pt')
    message = str(e.value)
    assert (
        '2 of another shape' in message
        and '12 unexpected' in message
        and '(5, 32)' in message
        and '(17, 32)' in message
    )
    state = random_net(CFG).state_dict()
    state.pop('ln_final.weight')
    torch.save(state, tmp_path/'w.pt')
    with pytest.raises(Incompatible, match='1 missing, first: ln_final.weight'):
        load_encoder(enc.spec, weights=tmp_path/'w.pt')


# the net --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('quick', [True, False])
def test_parity_with_open_clip(tmp_path, x, quick):
    import open_clip
    cfg = CFG | dict(quick_gelu=quick)
    path = folder(tmp_path/'m', cfg)
    reference = open_clip.create_model(f'local-dir:{path}').eval()     # default attention block
    ours = load_encoder(path, device='cpu', dtype='float32')
    with torch.no_grad():
        z = ours.prepare(x)
        pooled = reference.encode_image(z, normalize=True)
        dense = reference.visual.ln_post(reference.visual.transformer(reference.visual._embeds(z)))[:, 1:]
        text = reference.encode_text(
            open_clip.get_tokenizer(f'local-dir:{path}')(['a town', 'water']), normalize=True
        )
    out = ours.encode_image(x)
    assert torch.allclose(out.pooled, pooled, atol=1e-5) and torch.allclose(out.tokens, dense, atol=1e-4)
    assert torch.allclose(ours.encode_text(['a town', 'water']), text, atol=1e-5)


def test_activation_changes_the_numbers(tmp_path, x):
    one, two = (
        load_encoder(folder(tmp_path / str(q), CFG | dict(quick_gelu=q)), device='cpu', dtype='float32')
        for q in (True, False)
    )
    assert (
        read_weights(tmp_path / 'True/open_clip_model.safetensors').keys()
        and one.fingerprint != two.fingerprint
    )
    assert (one.encode_image(x).pooled - two.encode_image(x).pooled).abs().max() > 1e-5


def test_custom_text_names(tmp_path, x):
    "Old flat names load into a net whose text tower is a module of its own."
    custom = CFG | dict(custom_text=True)
    spec = spec_from_folder(folder(tmp_path/'c', custom, weights=False))
    torch.save(random_net(CFG).state_dict(), tmp_path/'flat.pt')
    flat = load_encoder(folder(tmp_path/'f'), device='cpu', dtype='float32')
    ours = load_encoder(spec, weights=tmp_path/'flat.pt', device='cpu', dtype='float32')
    assert (
        torch.equal(ours.encode_text(['a town']), flat.encode_text(['a town']))
        and type(ours.net).__name__ == 'CustomTextCLIP'
    )


@pytest.mark.parametrize('vision, channels', [(MOBILE, 1280), (VISION | dict(pool_type='avg'), 32), (dict(image_size=64, layers=[1, 1, 1, 1], width=8, patch_size=None), 256)],
                         ids=['timm', 'mean-pooled', 'resnet'])
def test_towers(tmp_path, x, vision, channels):
    e = load_encoder(folder(tmp_path/'m', CFG | dict(vision_cfg=vision)), device='cpu', dtype='float32')
    assert e.dense_dim == e.encode_image(x).dense.shape[1] == channels
    assert 'fingerprint' in check_encoder(e) and isinstance(e, SemanticEncoder)
    with torch.no_grad():
        assert torch.allclose(
            F.normalize(e.net.encode_image(e.prepare(x)), dim=-1), e.encode_image(x).pooled, atol=1e-5
        )


def test_timm_map_is_what_the_pool_averages(tmp_path, x):
    e = load_encoder(folder(tmp_path/'m', CFG | dict(vision_cfg=MOBILE)), device='cpu')
    assert e.dtype == 'float32'                                        # auto: convolutions stay in float32
    with torch.no_grad():
        pooled = F.normalize(e.net.visual.head(e.encode_image(x).dense.mean((2, 3))), dim=-1)
    assert torch.allclose(pooled, e.encode_image(x).pooled, atol=1e-5)


def test_building_leaves_the_callers_chance_alone(tmp_path):
    path = folder(tmp_path/'m')
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_encoder(path)
    assert torch.equal(torch.rand(3), expected)


def test_loading_inside_inference_mode(tmp_path, x):
    with torch.inference_mode(): e = load_encoder(folder(tmp_path/'m'), device='cpu', dtype='float32')
    assert e.fingerprint and not e.encode_image(x).pooled.is_inference()


# number formats -------------------------------------------------------------------------------------------------------

def test_dtype_policy(tmp_path, monkeypatch):
    path = folder(tmp_path/'m')
    for fast, expected in ((True, 'bfloat16'), (False, 'float32')):
        monkeypatch.setattr(E, 'fast_bf16', lambda: fast)
        assert load_encoder(path, device='cpu').dtype == expected
    assert load_encoder(path, device='cpu', dtype='bfloat16').dtype == 'bfloat16'
    with pytest.raises(UnknownName, match='bfloat16'): load_encoder(path, device='cpu', dtype='bfloat61')


def test_bfloat16_is_close_and_has_its_own_fingerprint(tmp_path, x, enc):
    low = load_encoder(enc.spec, device='cpu', dtype='bfloat16')
    a = enc.encode_image(x)
    b = low.encode_image(x)
    assert (a.pooled * b.pooled).sum(1).min() > 0.999 and b.pooled.dtype == b.dense.dtype == torch.float32
    assert low.fingerprint != enc.fingerprint and check_encoder(low)


def test_detection_answers_a_bool(): assert isinstance(E.fast_bf16(), bool)


# preprocessing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('h, w', [(64, 64), (100, 40), (20, 20), (7, 33)])
def test_resize_matches_pil(h, w):
    from PIL import Image
    # no overshoot: PIL clips between its two passes
    image = np.random.default_rng(0).integers(64, 192, (h, w, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
    ours = resize(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, 32)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() < 2.5 / 255


def test_resize_of_the_same_size_is_the_same(x): assert resize(x[..., :40], 40).data_ptr() == x.data_ptr()


@pytest.mark.parametrize('bad', [torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), np.nan),
                                 torch.rand(1, 3, 8, 8) * 255, torch.rand(1, 3, 8, 8) - 0.5, torch.full((1, 3, 8, 8), np.inf), torch.zeros(0, 3, 8, 8)],
                         ids=['3d', 'bands', 'uint8', 'nan', '255', 'negative', 'inf', 'empty'])
def test_bad_batches(enc, bad):
    with pytest.raises(BadImage, match='cannot encode'): enc.encode_image(bad)


def test_numpy_and_double_are_welcome(enc, x):
    expected = enc.encode_image(x).pooled
    assert torch.allclose(enc.encode_image(x.numpy()).pooled, expected) and torch.allclose(
        enc.encode_image(x.double()).pooled, expected, atol=1e-6
    )


def test_text_inputs(enc):
    one = enc.encode_text('a town')
    assert (
        one.shape == (1, 16)
        and torch.equal(one, enc.encode_text(['a town']))
        and enc.encode_text(('a', 'b')).shape == (2, 16)
    )
    assert enc.encode_text(['very ' * 200]).shape == (1, 16)


# fingerprint ----------------------------------------------------------------------------------------------------------

def test_fingerprint_covers_what_changes_numbers(tmp_path, enc):
    changes = [dict(mean=E.HALF), dict(std=E.HALF), dict(interpolation='bilinear')]
    prints = [
        load_encoder(replace(enc.spec, **c), device='cpu', dtype='float32').fingerprint for c in changes
    ]
    prints += [
        load_encoder(folder(tmp_path / 'seed', seed=1), device='cpu', dtype='float32').fingerprint,
        enc.fingerprint,
    ]
    prints += [
        load_encoder(
            folder(tmp_path / 'heads', CFG | dict(vision_cfg=VISION | dict(head_width=8))),
            device='cpu',
            dtype='float32',
        ).fingerprint
    ]
    assert len(set(prints)) == len(prints)


def test_fingerprint_ignores_names_and_places(tmp_path, enc):
    assert (
        load_encoder(folder(tmp_path / 'elsewhere'), device='cpu', dtype='float32').fingerprint
        == enc.fingerprint
    )


def test_fingerprint_follows_the_weights_in_memory(enc):
    before = enc.fingerprint
    state = {k: v.clone() for k, v in enc.net.state_dict().items()}
    enc.net.visual.proj.mul_(2)
    changed = enc.fingerprint
    enc.net.load_state_dict(state)
    assert changed != before == enc.fingerprint


def test_fingerprint_is_remembered(enc, monkeypatch):
    enc.fingerprint
    monkeypatch.setattr(E, 'state_digest', lambda _: pytest.fail('digested again'))
    enc.fingerprint


# encode ---------------------------------------------------------------------------------------------------------------

def test_encode_is_the_same_at_any_batch(enc):
    rng = np.random.default_rng(0)
    images = [
        rng.random((3, h, w), np.float32) for h, w in ((32, 32), (40, 20), (50, 64), (33, 31), (32, 32))
    ]
    whole = encode(enc, images, batch=5, grid=None)
    small = encode(enc, iter(images), batch=2, grid=2)
    assert torch.allclose(whole.pooled, small.pooled, atol=1e-5) and small.dense.shape == (5, 32, 2, 2)
    assert torch.allclose(F.adaptive_avg_pool2d(whole.dense, 2), small.dense, atol=1e-4)
    with pytest.raises(BadImage, match='nothing'): encode(enc, [])


# planted faults -------------------------------------------------------------------------------------------------------

class Planted:
    "A sound encoder with one thing wrong."
    def __init__(self, inner, **wrong): self.inner, self.net, self.wrong = inner, inner.net, wrong
    def __getattr__(self, name): return self.wrong[name] if name in self.wrong else getattr(self.inner, name)
    def encode_image(self, x): return self.wrong.get('image', lambda e, x: e.encode_image(x))(self.inner, x)
    def encode_text(self, texts):
        return self.wrong.get('says', lambda e, t: e.encode_text(t))(self.inner, texts)


def unnormalised(e, x):
    out = e.encode_image(x)
    return SemOutput(out.pooled * 3, out.dense)
def careless(e, x): return e.encode_image((x / 255 if x.max() > 1 else x))
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


@pytest.mark.parametrize('wrong, promise', [
    (dict(image=unnormalised), 'unit'), (dict(image=careless), 'range'), (dict(image=centred), 'batch'), (dict(image=contrast), 'constant'),
    (dict(image=dropout), 'repeat'), (dict(image=in_place), 'repeat'), (dict(image=flat), 'shapes'), (dict(image=half), 'shapes'), (dict(image=grads), 'quiet'),
    (dict(image=blind), 'sight'), (dict(dim=17), 'shapes'), (dict(dense_dim=31), 'shapes'), (dict(name=None), 'attributes'),
    (dict(fingerprint='v1'), 'fingerprint'), (dict(says=long_text), 'text'), (dict(says=text_mean), 'text')],
    ids=lambda v: v if isinstance(v, str) else '-'.join(getattr(f, '__name__', str(f)) for f in v.values()))
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


# tiny-clip and real weights -------------------------------------------------------------------------------------------

def test_tiny_is_trained_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    monkeypatch.setitem(E._RECIPE, 'scenes', 2)
    monkeypatch.setitem(E._RECIPE, 'steps', 3)
    monkeypatch.setitem(E._RECIPE, 'size', 32)
    first = load_encoder('tiny-clip', device='cpu', dtype='float32')
    monkeypatch.setattr(E, '_make_tiny', lambda _: pytest.fail('trained again'))
    assert load_encoder('tiny-clip', device='cpu', dtype='float32').fingerprint == first.fingerprint
    assert [p.name for p in (tmp_path / 'encoders').iterdir()] == [
        f'tiny-clip-{E._tiny_version()}'
    ] and check_encoder(first)
    monkeypatch.undo()


def test_tiny_survives_a_race(tmp_path, monkeypatch):
    "Another process finishes first: its folder stays, ours goes."
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    def rival(tmp):
        folder(tmp_path/'encoders'/f'tiny-clip-{E._tiny_version()}', E._TINY, seed=1)
        folder(E.Path(tmp), E._TINY, seed=2)
    monkeypatch.setattr(E, '_make_tiny', rival)
    e = load_encoder('tiny-clip', device='cpu', dtype='float32')
    assert (
        torch.equal(e.net.visual.proj, random_net(E._TINY, 1).visual.proj)
        and len(list((tmp_path / 'encoders').iterdir())) == 1
    )


def test_an_interrupted_training_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path))
    def stop(tmp):
        (E.Path(tmp)/'open_clip_config.json').write_text('{')
        raise KeyboardInterrupt
    monkeypatch.setattr(E, '_make_tiny', stop)
    with pytest.raises(KeyboardInterrupt): load_encoder('tiny-clip')
    assert list((tmp_path/'encoders').iterdir()) == []


def test_tiny_data_pairs_every_case_once():
    images, tokens = E._tiny_data(lambda texts: torch.tensor([[hash(t) % 2**31] for t in texts]), 2, 32)
    assert images.shape == (2, len(E._CASES), 3, 64, 64) and all(
        len(set(tokens[i, j, :, 0].tolist())) == len(E._CASES) for i in (0, 1) for j in (0, 1)
    )


@real
def test_mini_names_scenes():
    from pathlib import Path
    from PIL import Image
    e = load_encoder('clip-rs-mini', device='cpu')
    folder = Path(os.environ['RSSQA_REAL'])/'pairs'/'images'/'rsicd'
    names = ['beach', 'forest', 'parking', 'storagetanks', 'airport', 'desert']
    paths = [p for n in names for p in sorted(folder.glob(f'{n}_*.jpg'))[:6]]
    truth = torch.tensor([names.index(p.name.split('_')[0]) for p in paths])
    text = e.encode_text(
        [f'a satellite image of {n.replace("storagetanks", "storage tanks")}.' for n in names]
    )
    assert (encode(e, paths).pooled @ text.T).argmax(1).eq(truth).float().mean() > 0.8 and check_encoder(e)


@real
def test_frozen_parity_with_open_clip(x):
    import open_clip
    e = load_encoder('clip-rs-frozen', device='cpu')
    reference = open_clip.create_model(f'local-dir:{e.spec.architecture}').eval()
    with torch.no_grad():
        assert torch.allclose(
            reference.encode_image(e.prepare(x), normalize=True), e.encode_image(x).pooled, atol=1e-5
        )


# ---------------------------------------------------------------- a backbone without words

def backbone_file(path, name='mobilenetv2_035'):
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model(name).state_dict(), path)
    return path


def test_a_backbone_is_an_encoder_that_cannot_read(tmp_path):
    e = E.BackboneEncoder('mobilenetv2_035', backbone_file(tmp_path/'w.safetensors'), 64)
    out = encode(e, [np.zeros((3, 40, 50), np.float32), np.ones((3, 64, 64), np.float32)])
    assert (
        out.pooled.shape == (2, e.dim)
        and out.dense.shape[:2] == (2, e.dense_dim)
        and e.fingerprint != E.BackboneEncoder('mobilenetv2_035', tmp_path / 'w.safetensors', 96).fingerprint
    )
    with pytest.raises(Incompatible, match='no text tower'): e.encode_text(['a town'])


@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'vit_tiny_patch16_224'])
def test_only_convolutional_backbones(name, tmp_path):
    "A head that widens the pooled vector is fine; a map of tokens is not."
    path = backbone_file(tmp_path/'w.safetensors', name)
    if name.startswith('mobile'):
        assert (
            len(E.BackboneEncoder(name, path, 64).encode_image(torch.rand(1, 3, 64, 64)).pooled[0])
            == E.BackboneEncoder(name, path, 64).dim
        )
    else:
        with pytest.raises(Incompatible, match='convolutional'): E.BackboneEncoder(name, path)


def test_weights_of_another_backbone_are_refused(tmp_path):
    with pytest.raises(Incompatible, match='missing or has another shape'):
        E.BackboneEncoder('mobilenetv2_050', backbone_file(tmp_path/'w.safetensors'))


# ---------------------------------------------------------------- published remote-sensing encoders

def say_of(capsys): return capsys.readouterr().err


@pytest.fixture
def loud(monkeypatch): monkeypatch.delenv('RSSQA_QUIET', raising=False)


def test_the_table_holds_every_published_remote_sensing_clip():
    families = (
        pd.Series([s.name.split('-')[0].rstrip('12') for s in E.SPECS if s.name != 'clip-rs'])
        .value_counts()
        .to_dict()
    )
    assert families == dict(georsclip=6, farslip=4, openai=3, laion=3, remoteclip=3, skyclip=2, rs=1)
    gelu = [s.name for s in E.SPECS if not s.quick_gelu and not s.name.startswith('laion')]
    assert (
        gelu == ['georsclip-vit-h-14', 'rs-m-clip', 'skyclip-vit-b-32']
        and encoders['georsclip-vit-l-14-336'].image_size == 336
    )
    assert all(
        'inferred' in s.note for s in E.SPECS if s.name.startswith(('remoteclip', 'georsclip', 'clip-rs'))
    )
    assert all(s.licence and s.source and s.weights for s in E.SPECS)


def test_conformance_of_the_whole_table():
    table = conformance()
    assert list(table.index) == [s.name for s in E.SPECS] and table.ok.all(), table[~table.ok]
    assert {n for n in table.index if table.context[n] == 248} == {
        'farslip2-vit-b-32',
        'farslip2-vit-b-16',
    } and (table.promises == len(E._CHECKS)).all()


@pytest.mark.parametrize('name, file', [('remoteclip-vit-b-32', 'RemoteCLIP-ViT-B-32.pt from chendelong'), ('rs-m-clip', 'open_clip_model.safetensors from joaodaniel'),
                                        ('skyclip-vit-l-14', 'unpack')])
def test_a_published_encoder_says_where_its_file_goes(name, file):
    with pytest.raises(DataNotFound, match=file): load_encoder(name)


def test_conformance_sees_a_wrong_activation(monkeypatch):
    "A loader that ignores the spec's activation would be found."
    build = E._net
    monkeypatch.setattr(E, '_net', lambda cfg, block='custom': build(cfg | dict(quick_gelu=False), block))
    assert conformance(['laion-vit-b-32', 'openai-vit-b-32']).ok.tolist() == [True, False]


def test_an_itra_file_is_the_same_encoder(tmp_path, enc):
    path = write_format(tmp_path/'itra.pt', random_net(CFG).state_dict(), 'itra')
    assert load_encoder(enc.spec, weights=path, device='cpu', dtype='float32').fingerprint == enc.fingerprint


def test_a_grid_of_another_size_names_its_remedy(tmp_path, enc, x):
    other = CFG | dict(vision_cfg=VISION | dict(image_size=64))
    torch.save(random_net(other).state_dict(), tmp_path/'w.pt')
    with pytest.raises(Incompatible, match='64-pixel net of patch 8: use image_size=64'):
        load_encoder(enc.spec, weights=tmp_path/'w.pt')
    mended = load_encoder(
        replace(enc.spec, image_size=64), weights=tmp_path / 'w.pt', device='cpu', dtype='float32'
    )
    assert mended.encode_image(x).dense.shape[2:] == (8, 8) and torch.allclose(
        F.normalize(random_net(other).encode_image(mended.prepare(x)), dim=1),
        mended.encode_image(x).pooled,
        atol=1e-5,
    )


def test_a_bare_file_tells_what_can_be_read_from_it(tmp_path):
    import open_clip
    with torch.device('meta'): shapes = open_clip.CLIP(**open_clip.get_model_config('ViT-B-32')).state_dict()
    # one number each on disk
    path = write_format(
        tmp_path / 'w.pt', {k: torch.zeros(()).expand(t.shape) for k, t in shapes.items()}, 'open_clip_train'
    )
    with pytest.raises(Incompatible, match=r"activation; this one is of kind 'open_clip_train' and has the shapes of ViT-B-32.*quick_gelu"):
        load_encoder(path)


# texts of 248 tokens --------------------------------------------------------------------------------------------------

LONG_TEXT = TEXT | dict(context_length=77)


def long_file(path, drop=(), net=None):
    state = lengthen((net or random_net(CFG | dict(text_cfg=LONG_TEXT))).state_dict())
    torch.save({k: t for k, t in state.items() if k not in drop}, path)
    return path


def test_a_long_clip_is_known_by_its_keys(tmp_path, capsys, loud):
    short = load_encoder(folder(tmp_path/'m', CFG | dict(text_cfg=LONG_TEXT)), device='cpu', dtype='float32')
    for drop in ((), ('mask1', 'mask2')):
        long = load_encoder(
            short.spec, weights=long_file(tmp_path / 'w.pt', drop), device='cpu', dtype='float32'
        )
        assert (
            '248 tokens' in say_of(capsys)
            and long.context_length == long.spec.context_length == long.tokenizer(['a']).shape[1] == 248
        )
        assert (
            torch.allclose(long.encode_text(['a town']), short.encode_text(['a town']), atol=1e-5)
            and long.fingerprint != short.fingerprint
        )
        assert check_encoder(long) and long.encode_text_tokens(['a town'])[0].shape == (1, 248, 16)
    ends = [' '.join(['road'] * 100 + [end]) for end in ('forest', 'harbour')]
    assert 'cut' not in say_of(capsys)
    assert (
        not torch.equal(*long.encode_text(ends))
        and torch.equal(*short.encode_text(ends))
        and '2 of 2 sentences' in say_of(capsys)
    )


def test_a_long_clip_in_the_wrong_place(tmp_path):
    spec = spec_from_folder(folder(tmp_path/'m', CFG | dict(custom_text=True), weights=False))
    with pytest.raises(Incompatible, match='Long-CLIP'):
        load_encoder(spec, weights=long_file(tmp_path/'w.pt'))


def test_open_clip_itself_would_not_load_it(tmp_path):
    "The reason for the room: stock loading fails, and lenient loading would lose the second table."
    net = random_net(CFG | dict(text_cfg=LONG_TEXT))
    state = torch.load(long_file(tmp_path/'w.pt'), weights_only=True)
    with pytest.raises(RuntimeError, match='positional_embedding_res'): net.load_state_dict(state)


# patches and tokens ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', ['vanilla', 'maskclip', 'clearclip', 'sclip', 'segearth'])
def test_dense_vectors_live_beside_sentences(enc, x, mode):
    before = enc.encode_image(x).pooled
    dense = enc.encode_dense(x, mode)
    assert (
        dense.shape == (3, enc.dim, 4, 4)
        and dense.dtype == torch.float32
        and torch.allclose(dense.norm(dim=1), torch.ones(3, 4, 4), atol=1e-5)
    )
    assert torch.einsum('ndhw,td->nthw', dense, enc.encode_text(['a town', 'water'])).abs().max() <= 1 + 1e-5
    assert torch.equal(enc.encode_image(x).pooled, before) and enc.encode_dense(
        x, mode, project=False
    ).shape == (3, enc.dense_dim, 4, 4)


def test_dense_in_bfloat16_is_close(enc, x):
    low = load_encoder(enc.spec, device='cpu', dtype='bfloat16')
    assert (low.encode_dense(x, 'segearth') * enc.encode_dense(x, 'segearth')).sum(
        1
    ).min() > 0.99 and low.encode_dense(x).dtype == torch.float32


def test_dense_checks_its_input(enc):
    with pytest.raises(BadImage): enc.encode_dense(torch.rand(1, 3, 8, 8) * 255)
    with pytest.raises(UnknownName, match='sclip'): enc.encode_dense(torch.rand(1, 3, 8, 8), 'scilp')


def test_tokens_pooled_are_the_sentence(enc):
    words = ['a harbour with many boats', 'forest']
    features, mask = enc.encode_text_tokens(words)
    assert features.dtype == torch.float32 and mask.dtype == torch.bool and mask.sum(1).tolist() == [7, 3]
    assert torch.allclose(
        F.normalize(text_pool(enc.net, features, mask), dim=1), enc.encode_text(words), atol=1e-5
    )


def test_sentences_that_are_cut_are_counted(enc, capsys, loud):
    long = 'a satellite image of a town beside a river ' * 93 + 'x'
    assert len(long) == 4000 and enc.encode_text([long, 'a town', long]).shape == (3, 16)
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith('2 of 3 sentences have more than 16 tokens; their ends were cut')
    )
    enc.encode_text(['one two three four five six seven eight nine ten eleven twelve thirteen fourteen'])
    # fourteen words and two marks fill it exactly
    assert 'cut' not in say_of(capsys)
    enc.encode_text(
        ['one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen']
    )
    assert '1 of 1' in say_of(capsys)


def test_empty_sentences(enc):
    for read in (enc.encode_text, enc.encode_text_tokens):
        with pytest.raises(Incompatible, match='2 of 3 sentences.*index 0, 2'): read([' ', 'a town', ''])
        with pytest.raises(Incompatible, match='Found NoneType'): read(['a town', None])
    out = enc.encode_text(['', 'a town'], empty='zero')
    assert out[0].abs().max() == 0 and torch.allclose(out[1:], enc.encode_text(['a town']), atol=1e-6)
    with pytest.raises(UnknownName, match='zero'): enc.encode_text(['a'], empty='drop')


# a bundle with its own tokenizer --------------------------------------------------------------------------------------

MULTI = CFG | dict(
    text_cfg=dict(hf_model_name='text', hf_tokenizer_name='text', hf_pooler_type='mean_pooler')
)


@pytest.fixture
def bundle(tmp_path):
    home = tmp_path/'bundle'
    home.mkdir()
    tiny_multilingual(home/'text')
    (home/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=MULTI)))
    torch.manual_seed(0)
    net = E._build(MULTI, home)
    for p in net.parameters(): p.add_(0.05 * torch.randn_like(p))
    write_format(home, net.state_dict(), 'bundle')
    return home


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub, transformers
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)


SAID = [
    'a harbour with boats',
    'um porto com barcos',
    'ein Hafen mit Booten',
    '港口和船只',
    'гавань с лодками',
    '배가 있는 항구',
]


def test_a_multilingual_bundle_loads_from_its_folder(bundle, offline):
    import open_clip
    e = load_encoder(bundle, device='cpu', dtype='float32')
    assert (
        type(e.tokenizer).__name__ == 'HFTokenizer'
        and check_encoder(e)
        and e.config['text_cfg']['hf_model_name'] == 'text'
    )
    text = e.encode_text(SAID)
    assert (text @ text.T - 2 * torch.eye(len(SAID))).max() < 0.99999 and {'XLMRobertaModel'} <= {
        type(m).__name__ for m in e.net.modules()
    }
    features, mask = e.encode_text_tokens(SAID)
    # its pooler is the mean of real tokens
    pooled = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert torch.allclose(F.normalize(e.net.text.proj(pooled), dim=1), text, atol=1e-5) and mask.sum(
        1
    ).tolist() == [len(s.encode()) - s.count(' ') + 3 * s.count(' ') - 2 * s.count(' ') + 3 for s in SAID]
    assert (
        spec_from_folder(bundle).format == 'bundle'
        and not encoders['laion-vit-b-32'].multilingual
        and encoders['rs-m-clip'].multilingual
    )


def test_the_named_spec_takes_the_folder(bundle, offline, x):
    # the published sizes outside, tiny inside
    cfg = MULTI | dict(embed_dim=512, vision_cfg=VISION | dict(image_size=224, patch_size=32))
    (bundle/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg)))
    torch.manual_seed(0)
    net = E._build(cfg, bundle)
    write_format(bundle, net.state_dict(), 'bundle')
    named = load_encoder('rs-m-clip', weights=bundle, device='cpu', dtype='float32')
    assert (
        named.name == 'rs-m-clip'
        and named.fingerprint == load_encoder(bundle, device='cpu', dtype='float32').fingerprint
    )
    assert torch.allclose(
        named.encode_image(x).pooled, F.normalize(net.encode_image(named.prepare(x)), dim=1), atol=1e-5
    )
    (bundle/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg | dict(quick_gelu=True))))
    with pytest.raises(Incompatible, match='states QuickGELU'): load_encoder('rs-m-clip', weights=bundle)


def test_weights_from_elsewhere_do_not_bring_their_config(tmp_path, x):
    "The folder that was named decides the architecture, whatever lies beside the weights."
    spec = spec_from_folder(folder(tmp_path/'a', CFG | dict(custom_text=True), weights=False))
    other = folder(tmp_path/'b')
    e = load_encoder(spec, weights=other/'open_clip_model.safetensors', device='cpu', dtype='float32')
    assert type(e.net).__name__ == 'CustomTextCLIP' and torch.equal(
        e.encode_image(x).pooled, load_encoder(other, device='cpu', dtype='float32').encode_image(x).pooled
    )


def test_a_bundle_is_its_files_and_not_its_place(bundle, offline, tmp_path):
    first = load_encoder(bundle, device='cpu', dtype='float32').fingerprint
    moved = tmp_path/'elsewhere'
    os.rename(bundle, moved)
    assert load_encoder(moved, device='cpu', dtype='float32').fingerprint == first
    tokenizer = moved/'text'/'tokenizer.json'
    tokenizer.write_text(tokenizer.read_text().replace('-1.0', '-2.0'))
    assert load_encoder(moved, device='cpu', dtype='float32').fingerprint != first


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
    e = load_encoder(bundle, device='cpu', dtype='float32')
    assert e.encode_text(['港' * 40, '港']).shape == (
        2,
        16,
    ) and '1 of 2 sentences have more than 77 tokens' in say_of(capsys)


# the hub --------------------------------------------------------------------------------------------------------------

def test_the_hub_without_a_network(monkeypatch):
    import open_clip
    def absent(*a, **k): raise FileNotFoundError('Failed to download file (open_clip_config.json)')
    monkeypatch.setattr(open_clip.pretrained, 'download_pretrained_from_hf', absent)
    with pytest.raises(DownloadError, match='hf-hub:someone/some-clip.*folder'):
        load_encoder('hf-hub:someone/some-clip')


def test_the_hub_gives_a_folder(monkeypatch, tmp_path, x):
    import open_clip
    home = folder(tmp_path/'snapshot')
    asked = []
    def fetch(owner, filename=None, **k):
        asked.append((owner, filename))
        return str(home/(filename or 'open_clip_model.safetensors'))
    monkeypatch.setattr(open_clip.pretrained, 'download_pretrained_from_hf', fetch)
    e = load_encoder('hf-hub:someone/some-clip', device='cpu', dtype='float32')
    assert e.name == 'someone/some-clip' and [owner for owner, _ in asked] == ['someone/some-clip'] * 2
    assert torch.equal(
        e.encode_image(x).pooled, load_encoder(home, device='cpu', dtype='float32').encode_image(x).pooled
    )
