"""Errors, registries, digests, usable and damaged images, files that are complete or absent."""
import copy, importlib.metadata, io, os, pickle, stat, struct, subprocess, sys, threading, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.torch import save_file

from hostile import sparse_tiff
from rssqa import core
from rssqa.core import (
    BadImage, DataNotFound, DownloadError, Incompatible, LeakError, MissingFeatures, Problem, Registry,
    SchemaError, UnknownName, as_image, atomic, cache_dir, digest, file_id, load_recorded, load_tensors,
    model_faults, open_tiff, pick_device, progress, read_json, real_dir, say, seed_all, state_digest, stretch,
    unknown, weight_digests, write_json,
)

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BUILT_IN = {
    UnknownName: KeyError,
    SchemaError: ValueError,
    DataNotFound: FileNotFoundError,
    BadImage: ValueError,
    Incompatible: ValueError,
    LeakError: ValueError,
    MissingFeatures: KeyError,
    DownloadError: OSError,
}


def refused(error, make, *words):
    "Assert a one-line problem in three parts that contains the words; return it."
    with pytest.raises(error) as caught: make()
    problem = caught.value
    text = str(problem)
    assert problem.what and problem.found and problem.todo
    assert '\n' not in text and text.endswith(('.', '?')), text
    assert all(word in text for word in words), text
    return problem


# ---- errors

@pytest.mark.parametrize('kind, builtin', BUILT_IN.items())
def test_problem_is_what_people_catch_and_survives_copies(kind, builtin):
    e = kind('cannot x', 'found 1, expected 2', 'do y')
    assert isinstance(e, builtin) and isinstance(e, Problem)
    assert str(e) == 'cannot x. Found 1, expected 2. Do y.'
    for other in (pickle.loads(pickle.dumps(e)), copy.copy(e)):     # as from a worker process
        assert type(other) is kind and str(other) == str(e) and (other.found, other.todo) == (e.found, e.todo)


@pytest.mark.parametrize('parts, text', [
    (('a',), 'a.'),
    (('a', 'b'), 'a. B.'),
    (('a', '', 'c?'), 'a. C?'),
    (('a.', 'b …'), 'a. B …'),
    (('a', 'RGB'), 'a. RGB.'),
])
def test_problem_text(parts, text): assert str(Problem(*parts)) == text


def test_all_problem_classes_are_tested(): assert set(Problem.__subclasses__()) == set(BUILT_IN)


# ---- registries

def test_registry_register_list_replace():
    r = Registry('fruit')
    r.register('b', 2)
    r.register('a.x', 1)
    assert list(r) == ['a.x', 'b'] and r.list('a.*') == ['a.x'] and len(r) == 2
    assert 'b' in r and 'c' not in r and repr(r) == '2 fruits: a.x, b'
    with pytest.raises(Incompatible, match="'b' is registered already"): r.register('b', 3)
    r.register('b', 3, replace=True)
    assert r['b'] == 3
    @r.register('f')
    def f(): return 7
    assert f() == 7 and r['f'] is f


def test_registry_suggests_near_names_and_lists_when_none_is_near():
    r = Registry('method')
    for n in ('unet', 'unetformer', 'segformer'): r.register(n, n.upper)
    assert 'did you mean unet' in str(refused(UnknownName, lambda: r['unte'], '3 known')).lower()
    refused(UnknownName, lambda: r['zzzzzz'], 'segformer, unet, unetformer')
    assert str(unknown('x', 'y', [])).startswith("no x named 'y'. 0 known")
    assert str(unknown('x', 'q', (f'{i:03}' for i in range(99)))).count(',') == 11


def test_registry_imports_lazily_and_once(tmp_path, monkeypatch):
    count = 'builtins.rssqa_loads = getattr(builtins, "rssqa_loads", 0) + 1'
    (tmp_path/'lazy_part.py').write_text(f'import builtins\n{count}\nclass A:\n    b = object()\n')
    monkeypatch.syspath_prepend(tmp_path)
    r = Registry('part')
    r.register('a', 'lazy_part:A.b')
    assert r.list() == ['a'] and 'lazy_part' not in sys.modules
    assert r['a'] is r['a'] is sys.modules['lazy_part'].A.b and __import__('builtins').rssqa_loads == 1


@pytest.mark.parametrize('entry, words', [
    ('no_such_module_xyz:f', 'no_such_module_xyz'),
    ('json:no_such_name', 'no_such_name'),
    ('no colon!', 'no colon!'),
])
def test_registry_names_what_a_lazy_entry_lacks(entry, words):
    r = Registry('part')
    r.register('p', entry)
    refused(Incompatible, lambda: r['p'], "part 'p'", entry, words)
    # mended and tried again, it may work
    assert r.entries['p'] == entry


def test_registry_names_the_plugin_whose_own_import_fails(tmp_path, monkeypatch):
    (tmp_path/'needy_plugin.py').write_text('import not_installed_xyz')
    monkeypatch.syspath_prepend(tmp_path)
    r = Registry('part')
    r.register('p', 'needy_plugin:f')
    refused(Incompatible, lambda: r['p'], 'needy_plugin', 'not_installed_xyz')


def test_plugins_come_from_a_distribution_on_the_path(tmp_path, monkeypatch):
    info = tmp_path/'fake_plugin-1.0.dist-info'
    info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: fake-plugin\nVersion: 1.0\n')
    entries = 'extra = fake_plugin_mod:thing\nours = fake_plugin_mod:thing\n'
    (info/'entry_points.txt').write_text(f'[rssqa.testparts]\n{entries}')
    (tmp_path/'fake_plugin_mod.py').write_text('thing = 42')
    monkeypatch.syspath_prepend(tmp_path)
    r = Registry('part', 'rssqa.testparts')
    r.register('ours', 1)
    assert r.list() == ['extra', 'ours'] and 'fake_plugin_mod' not in sys.modules
    # a plugin does not replace an entry
    assert r['extra'] == 42 and r['ours'] == 1


def test_registry_looks_for_plugins_once_and_only_when_a_name_is_needed(monkeypatch):
    calls = []
    monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: calls.append(group) or [])
    r = Registry('part', 'g')
    r.register('a', 1)
    assert calls == []
    r['a'], r.list(), 'a' in r, len(r)
    assert calls == ['g']
    Registry('plain').list()
    assert calls == ['g']


# ---- identity

def test_digest_separates_parts_types_and_shapes():
    a = np.arange(6, dtype=np.int32)
    different = [
        ('a', 'bc'), ('ab', 'c'), ('abc',), ('',), (),
        (a,), (a.reshape(2, 3),), (a.astype(np.int64),), (a, a),
        (1,), ('1',), (None,), (b'1', b''),
    ]
    assert len({digest(*d) for d in different}) == len(different)
    assert digest(a.reshape(2, 3).T) == digest(a.reshape(2, 3).T.copy()) and len(digest()) == 16
    assert digest({'x': 1, 'y': (2, 3)}) == digest({'y': [2, 3], 'x': 1})


def test_digest_sees_every_value_of_nested_and_object_arrays():
    long = np.arange(5000)
    # str(array) would hide the middle
    changed = long.copy()
    changed[2500] = -1
    assert digest({'x': long}) != digest({'x': changed})
    words = [np.array([''.join(('a', 'b')), 'c'], object) for _ in range(2)]     # equal, but other objects
    assert digest(words[0]) == digest(words[1]) and digest(np.float32(.5)) == digest(.5)


def test_digest_is_the_same_in_every_process():
    code = "from rssqa.core import digest; print(digest({'b','a','c'}, {'k': 1.5}, 'text'))"
    here = digest({'a', 'b', 'c'}, {'k': 1.5}, 'text')
    for hashseed in '12':
        environment = os.environ | {'PYTHONHASHSEED': hashseed}
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
        assert done.stdout == here + '\n', done.stderr


def test_file_id_follows_bytes_not_names(tmp_path):
    for n, data in dict(a=b'1' * 70000, b=b'1' * 70000, c=b'2').items(): (tmp_path/n).write_bytes(data)
    a, b, c = (file_id(tmp_path/n) for n in 'abc')
    assert a == b != c and len(a) == 32
    with pytest.raises(DataNotFound, match='nowhere'): file_id(tmp_path/'nowhere')


def test_state_digest_ignores_order_and_layout_but_no_weight():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = net.state_dict()
    want = state_digest(state)
    assert state_digest(dict(reversed(state.items()))) == want
    assert state_digest({k: v.clone() for k, v in state.items()}) == want
    for k in state:
        changed = {n: v.clone() for n, v in state.items()}
        changed[k].view(-1)[0] += 1
        assert state_digest(changed) != want, k
    renamed = {('z.' + k if k == '0.bias' else k): v for k, v in state.items()}
    assert state_digest(renamed) != want
    w = torch.rand(4, 6)
    assert state_digest({'w': w.T}) == state_digest({'w': w.T.contiguous()}) != state_digest({'w': w})


# ---- images that can be used

def check(x, h, w):
    "Assert rssqa's convention for images; return the image."
    assert x.shape == (3, h, w) and x.dtype == np.float32 and 0 <= x.min() and x.max() <= 1
    assert x.flags.c_contiguous and x.flags.writeable
    return x


sides = st.integers(5, 20)      # 3 and 4 are also numbers of bands
modes = st.sampled_from(['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr', 'HSV'])
band_axes = st.sampled_from([(), (1,), (3,), (4,)])
dtypes = st.sampled_from(['uint8', 'float16', 'float32', 'float64'])
seeds = st.integers(0, 99)


@quick
@given(modes, sides, sides, seeds)
def test_every_8_bit_mode_of_pil(mode, h, w, seed):
    rgb = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))
    im = rgb.convert('LA').convert('PA') if mode == 'PA' else rgb.convert(mode)
    x = check(as_image(im), h, w)
    if mode in ('RGB', 'RGBA', 'RGBX'): assert (x * 255 == np.asarray(rgb).transpose(2, 0, 1)).all()
    if mode in ('1', 'L', 'LA'): assert (x[0] == x[1]).all() and (x[0] == x[2]).all()


@quick
@given(sides, sides, band_axes, st.booleans(), dtypes, st.booleans(), seeds)
def test_every_layout_and_type_of_array(h, w, bands, first, dtype, as_tensor, seed):
    raw = np.random.default_rng(seed).integers(0, 256, (h, w, *bands), np.uint8)
    a = raw if dtype == 'uint8' else (raw / 255).astype(dtype)
    if first and bands in ((1,), (3,)): a = np.moveaxis(a, -1, 0)
    want = np.broadcast_to(raw.reshape(h, w, -1)[..., :3], (h, w, 3)).transpose(2, 0, 1) / 255
    before = a.copy()
    x = check(as_image(torch.as_tensor(a.copy()) if as_tensor else a), h, w)
    assert np.allclose(x, want, atol=1e-3 if dtype == 'float16' else 1e-6)
    x[:] = 0
    # a copy, never a view of the source
    assert (a == before).all()
    # converting twice changes nothing
    assert np.array_equal(as_image(check(as_image(a), h, w)), as_image(a))


@pytest.mark.parametrize('shape', [(1, 1), (1, 1, 1), (1, 1, 3), (3, 1, 1), (1, 1, 4)])
def test_one_pixel(shape): assert np.allclose(check(as_image(np.full(shape, 51, np.uint8)), 1, 1), .2)


def test_channel_order_where_the_shape_decides_it():
    tall = np.zeros((3, 40, 4), np.float32)
    tall[0] = 1
    # three planes, four columns
    assert as_image(tall).shape == (3, 40, 4) and as_image(tall)[0].all()
    # both ways possible: channels last
    assert as_image(np.zeros((3, 7, 3), np.uint8)).shape == (3, 3, 7)
    assert as_image(np.zeros((1, 9, 3), np.uint8)).shape == (3, 1, 9)


def test_paths_pil_and_arrays_agree(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    for ext in ('png', 'tif', 'bmp', 'webp'):
        path = tmp_path/f'x.{ext}'
        Image.fromarray(a).save(path, **(dict(lossless=True) if ext == 'webp' else {}))
        assert np.array_equal(as_image(path), as_image(a)), ext
        assert np.array_equal(as_image(str(path)), as_image(a)), ext


def test_cmyk_jpeg_and_palette_with_transparency(tmp_path):
    red = Image.new('RGB', (8, 8), (250, 10, 10))
    red.convert('CMYK').save(tmp_path/'c.jpg', quality=95)
    assert np.allclose(as_image(tmp_path/'c.jpg')[:, 4, 4] * 255, (250, 10, 10), atol=12)
    red.quantize(4).save(tmp_path/'p.png', transparency=0)
    assert Image.open(tmp_path/'p.png').mode == 'P'
    assert np.allclose(as_image(tmp_path/'p.png')[:, 4, 4] * 255, (250, 10, 10), atol=3)


def geotiff(path, bands, dtype='uint8', **kwargs):
    import rasterio, warnings
    a = np.arange(bands * 48).reshape(bands, 6, 8).astype(dtype)
    profile = dict(driver='GTiff', height=6, width=8, count=bands, dtype=dtype, photometric='MINISBLACK')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with rasterio.open(path, 'w', **profile | kwargs) as f: f.write(a)
    return a


@pytest.mark.parametrize('bands, profile', [
    (1, {}),
    (3, {}),
    (3, dict(photometric='RGB', compress='deflate')),
    (4, dict(photometric='RGB', alpha='YES')),
])
def test_geotiff_of_one_three_and_alpha(tmp_path, bands, profile):
    a = geotiff(tmp_path/'x.tif', bands, **profile)
    x = check(as_image(tmp_path/'x.tif'), 6, 8)
    assert np.allclose(x * 255, np.broadcast_to(a[:3], (3, 6, 8)))


def test_palette_tiff_arrives_in_its_colours(tmp_path):
    rgb = Image.fromarray(np.repeat(np.array([[[200, 10, 30], [0, 90, 250]]], np.uint8), 8, 1).repeat(6, 0))
    rgb.quantize(4).save(tmp_path/'p.tif')
    assert np.allclose(as_image(tmp_path/'p.tif'), as_image(rgb), atol=2 / 255)


# ---- images that cannot be used

@pytest.mark.parametrize('bands, dtype, words', [
    (4, 'uint8', '4 bands'),
    (2, 'uint8', '2 bands'),
    (8, 'uint8', '8 bands'),
    (12, 'uint16', '12 bands'),
    (3, 'complex64', 'complex64'),
    (3, 'uint16', 'uint16'),
    (1, 'int16', 'int16'),
    (3, 'float32', '0..143'),
])
def test_geotiff_that_needs_a_decision(tmp_path, bands, dtype, words):
    geotiff(tmp_path/'field.tif', bands, dtype)
    problem = refused(BadImage, lambda: as_image(tmp_path/'field.tif'), 'field.tif', words)
    assert problem.what.startswith('cannot use') and 'damaged' not in str(problem)


def deep_png(path, channels, colour_type):
    "Write 16 bits a channel, which PIL cannot."
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + bytes(range(8 * channels)) for _ in range(4))               # 4 pixels wide
    head = struct.pack('>IIBBBBB', 4, 4, 16, colour_type, 0, 0, 0)
    chunks = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunks)


@pytest.mark.parametrize('channels, colour_type', [(1, 0), (3, 2), (2, 4), (4, 6)])
def test_sixteen_bit_png_of_every_colour_type_is_refused(tmp_path, channels, colour_type):
    deep_png(tmp_path/'deep.png', channels, colour_type)
    with Image.open(tmp_path/'deep.png') as im: im.load()                               # a valid file
    problem = refused(BadImage, lambda: as_image(tmp_path/'deep.png'), 'deep.png', '16', 'stretch')
    assert 'damaged' not in str(problem)


@pytest.mark.parametrize('source, words', [
    (np.zeros((5, 6), np.uint16), 'uint16'),
    (np.zeros((5, 6, 3), np.int64), 'int64'),
    (np.ones((5, 6), bool), 'bool'),
    (np.full((5, 6, 3), 1.01), '1.01'),
    (np.full((5, 6, 3), -.01), '-0.01'),
    (np.full((5, 6, 3), np.nan, np.float32), 'NaN values'),
    (np.where(np.eye(6), np.nan, .5), 'NaN values'),
    (np.ones((5, 6), np.complex64), 'complex64'),
    (np.full((5, 6), 'a'), '<U1'),
    (np.full((5, 6), None), 'object'),
    (np.full((5, 6), np.inf), 'inf'),
    (np.zeros((5, 6, 2), np.uint8), '2 bands'),
    (np.zeros((6, 5, 7), np.uint8), '7 bands'),
    (np.zeros((2, 3, 5, 6), np.uint8), '(2, 3, 5, 6)'),
    (np.zeros(9, np.uint8), '(9,)'),
    (None, '()'),
    (3.5, '()'),
    (np.zeros((0, 6, 3), np.uint8), '(0, 6, 3)'),
    (np.zeros((0, 0)), '(0, 0'),
    (Image.new('I', (5, 6)), 'int32'),
    (Image.new('I;16', (5, 6)), 'uint16'),
    (Image.fromarray(np.full((5, 6), 300, np.float32)), '300'),
])
@pytest.mark.filterwarnings('ignore:All-NaN')
def test_arrays_that_need_a_decision(source, words):
    refused(BadImage, lambda: as_image(source, 'tile 7'), 'tile 7', words)


def encoded(ext):
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(noise).save(out, {'jpg': 'jpeg', 'tif': 'tiff'}.get(ext, ext))
    return out.getvalue()


NO_IMAGES = dict(empty=b'', html=b'<!DOCTYPE html><html><body>404</body></html>', zeros=b'\0' * 500,
                 pointer=b'version https://git-lfs')


@pytest.mark.parametrize('content', NO_IMAGES)
@pytest.mark.parametrize('ext', ['jpg', 'png', 'tif'])
def test_files_that_are_no_images(tmp_path, ext, content):
    (tmp_path/f'no.{ext}').write_bytes(NO_IMAGES[content])
    refused(BadImage, lambda: as_image(tmp_path/f'no.{ext}'), f'no.{ext}')


@quick
@given(st.sampled_from(['jpg', 'png', 'bmp', 'gif', 'webp', 'tif']), st.floats(0.02, 0.97), st.booleans())
def test_damaged_files_are_refused_or_read_never_crash(tmp_path, ext, at, cut):
    data = encoded(ext)
    n = int(len(data) * at)
    inverted = bytes(255 - b for b in data[n:n + 9])
    (tmp_path/f'd.{ext}').write_bytes(data[:n] if cut else data[:n] + inverted + data[n + 9:])
    try: x = as_image(tmp_path/f'd.{ext}')
    except BadImage as e: assert f'd.{ext}' in str(e) and '\n' not in str(e)
    else: assert x.shape[0] == 3 and x.dtype == np.float32 and (not cut or ext == 'gif')


@pytest.mark.parametrize('ext', ['jpg', 'png', 'tif'])
def test_truncated_images_are_refused(tmp_path, ext):
    data = encoded(ext)
    for share in (.3, .6, .9):
        (tmp_path/f't.{ext}').write_bytes(data[:int(len(data) * share)])
        refused(BadImage, lambda: as_image(tmp_path/f't.{ext}'), f't.{ext}', 'damaged')


@pytest.mark.parametrize('name', ['gone.jpg', 'gone.tif', 'no/such/folder/x.png'])
def test_missing_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name): as_image(tmp_path/name)
    with pytest.raises(DataNotFound): as_image(str(tmp_path/name))


@pytest.mark.parametrize('name', ['folder', 'folder.tif', 'folder.png'])
def test_folders(tmp_path, name):
    (tmp_path/name).mkdir()
    refused(BadImage, lambda: as_image(tmp_path/name), name, 'folder')


@pytest.mark.parametrize('ext', ['png', 'jpg', 'webp', 'bmp', 'tif'])
@pytest.mark.parametrize('limit_of_pil', [None, 10**9])
def test_images_with_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch, ext, limit_of_pil):
    path = tmp_path/f'big.{ext}'
    Image.new('RGB', (40, 41)).save(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit_of_pil)
    monkeypatch.setattr(core, 'MAX_PIXELS', 1639)
    refused(BadImage, lambda: as_image(path), f'big.{ext}', 'tiles', '40x41', '1,639')
    monkeypatch.setattr(core, 'MAX_PIXELS', 1640)
    assert as_image(path).shape == (3, 41, 40)


def test_a_lower_limit_of_pil_is_kept_and_named(tmp_path, monkeypatch):
    Image.new('L', (40, 40)).save(tmp_path/'big.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    refused(BadImage, lambda: as_image(tmp_path/'big.png'), 'big.png', 'tiles', '200 pixels')


def test_a_sparse_tiff_of_ten_thousand_megapixels_is_refused(tmp_path):
    sparse_tiff(tmp_path/'huge.tif')
    assert (tmp_path/'huge.tif').stat().st_size < 100_000
    refused(BadImage, lambda: as_image(tmp_path/'huge.tif'), 'huge.tif', '100000x100000', 'tiles')


def test_a_tiff_whose_single_block_is_too_large_is_refused(tmp_path, monkeypatch):
    geotiff(tmp_path/'strip.tif', 1, compress='deflate', blockysize=6)
    monkeypatch.setattr(core, 'MAX_PIXELS', 40)
    refused(BadImage, lambda: open_tiff(tmp_path/'strip.tif').__enter__(), 'a block of', '8x6')


# ---- hostile paths and files

VRT = """<VRTDataset rasterXSize="8" rasterYSize="6"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename relativeToVRT="0">{source}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>
</VRTDataset>"""


@pytest.mark.parametrize('source', ['secret.tif', '/vsicurl/http://127.0.0.1:9/x.tif'])
@pytest.mark.parametrize('ext', ['tif', 'TIFF'])
def test_a_text_that_names_another_file_is_no_tiff(tmp_path, source, ext):
    geotiff(tmp_path/'secret.tif', 1)
    named = tmp_path/source if source == 'secret.tif' else source
    (tmp_path/f'x.{ext}').write_text(VRT.format(source=named))
    refused(BadImage, lambda: as_image(tmp_path/f'x.{ext}'), f'x.{ext}', 'TIFF', 'VRT')


@pytest.mark.parametrize('kind', ['png', 'bmp', 'gif'])
def test_another_format_named_tif_is_not_handed_to_another_driver(tmp_path, kind):
    Image.new('L', (8, 6)).save(tmp_path/f'x.{kind}')
    (tmp_path/f'x.{kind}').rename(tmp_path/'x.tif')
    refused(BadImage, lambda: as_image(tmp_path/'x.tif'), 'x.tif', 'TIFF')


@pytest.mark.parametrize('named', ['x.tif', 'GTIFF_DIR:1:x.tif', 'zip:x.tif', 'a!b.tif', 'http:x.tif'])
def test_a_name_is_never_read_as_an_instruction(tmp_path, monkeypatch, named):
    a = geotiff(tmp_path/'x.tif', 1)
    (tmp_path/'x.tif').rename(tmp_path/named)
    monkeypatch.chdir(tmp_path)
    assert np.allclose(as_image(named)[0] * 255, a[0])


def test_files_beside_a_tiff_have_no_influence(tmp_path):
    import rasterio
    path = tmp_path/'x.tif'
    geotiff(path, 4, photometric='RGB', alpha='YES')
    before = as_image(path)
    interpretation = ''.join(f'<PAMRasterBand band="{i}"><ColorInterp>Undefined</ColorInterp></PAMRasterBand>'
                             for i in range(1, 5))
    metadata = '<Metadata><MDI key="planted">yes</MDI></Metadata>'
    (tmp_path/'x.tif.aux.xml').write_text(f'<PAMDataset>{metadata}{interpretation}</PAMDataset>')
    (tmp_path/'x.tfw').write_text('7\n0\n0\n-7\n100\n200\n')
    geotiff(tmp_path/'x.tif.ovr', 4)
    geotiff(tmp_path/'x.tif.msk', 1)
    with rasterio.open(path) as f: assert f.tags().get('planted') == 'yes' and f.transform.a == 7
    with open_tiff(path) as f:
        assert 'planted' not in f.tags() and f.transform.a == 1 and f.overviews(1) == []
        assert [Path(name).name for name in f.files] == ['x.tif']
    assert np.array_equal(as_image(path), before)


@pytest.mark.parametrize('path, words', [
    ('https://example.org/tile.png', 'This is a URL'),
    ('http://example.org/tile.tif', 'This is a URL'),
    ('s3://bucket/tile.tif', 'This is a URL'),
    ('ftp://example.org/a.jpg', 'This is a URL'),
    (Path('https://example.org/tile.png'), 'This is a URL'),
    ('/vsicurl/http://127.0.0.1:9/x.tif', 'virtual path'),
    ('/vsimem/x.tif', 'virtual path'),
    ('/vsizip//data/a.zip/x.png', 'virtual path'),
])
def test_addresses_are_no_files(path, words):
    problem = refused(BadImage, lambda: as_image(path), words)
    assert problem.todo


def test_a_device_or_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/'pipe.png')
    for path in (tmp_path/'pipe.png', '/dev/zero'): refused(BadImage, lambda: as_image(path), 'pipe')


def test_a_link_that_leads_nowhere_is_said(tmp_path):
    (tmp_path/'x.png').symlink_to(tmp_path/'gone.png')
    refused(DataNotFound, lambda: as_image(tmp_path/'x.png'), 'x.png', 'link')


def test_no_picture_starts_another_program(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin
    started = []
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args: started.append(args))
    (tmp_path/'x.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n')
    refused(BadImage, lambda: as_image(tmp_path/'x.png'), 'x.png')
    assert not started


@pytest.mark.parametrize('name', ['lat\udcfcin.tif', 'lat\udcfcin.png'])
def test_names_that_are_no_text_never_raise_their_own_error(tmp_path, name):
    with pytest.raises(DataNotFound) as caught: as_image(tmp_path/name)
    assert str(caught.value).encode()
    Image.new('L', (8, 6)).save(tmp_path/f'x{name[-4:]}')
    (tmp_path/f'x{name[-4:]}').rename(tmp_path/name)
    try: assert as_image(tmp_path/name).shape == (3, 6, 8)
    except BadImage as e: assert 'rename' in str(e).lower() and str(e).encode()


@pytest.mark.parametrize('ext', ['png', 'tif'])
def test_too_little_memory_is_said(tmp_path, monkeypatch, ext):
    def fail(*args, **options): raise MemoryError
    Image.new('L', (8, 6)).save(tmp_path/f'x.{ext}')
    monkeypatch.setattr(core, 'decode_picture' if ext == 'png' else 'read_bands', fail)
    refused(BadImage, lambda: as_image(tmp_path/f'x.{ext}'), f'x.{ext}', 'memory', 'tiles')


@quick
@given(st.text() | st.sampled_from(['', '.', '/', '\0', 'a' * 5000, 'C:/x.png', 'file:///etc/passwd']))
def test_any_text_as_path_gives_a_problem(text):
    with pytest.raises(Problem) as caught: as_image(text + '.no image')
    assert str(caught.value).encode() and caught.value.todo


# ---- photographs held sideways

@pytest.mark.parametrize('ext', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize('orientation', range(10))
def test_photographs_are_turned_upright(tmp_path, ext, orientation):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner = np.zeros((24, 40, 3), np.uint8)
    corner[:8, :8] = 255
    path = tmp_path/f'x.{ext}'
    Image.fromarray(corner).save(path, exif=exif, **(dict(lossless=True) if ext == 'webp' else {}))
    with Image.open(path) as im:
        expected = np.asarray(ImageOps.exif_transpose(im).convert('RGB'))
        assert core.upright_size(im) == expected.shape[1::-1]
    assert as_image(path).shape == (3, *((40, 24) if 5 <= orientation <= 8 else (24, 40)))
    assert np.allclose(as_image(path), as_image(expected), atol=.02)


@quick
@given(st.binary(max_size=60))
def test_damaged_exif_does_not_lose_the_image(tmp_path, data):
    Image.new('RGB', (6, 4)).save(tmp_path/'x.jpg', exif=b'Exif\0\0' + data)
    assert as_image(tmp_path/'x.jpg').size == 72


@quick
@given(st.sampled_from(['uint8', 'uint16', 'int16', 'float32']), st.floats(0, 40), st.floats(60, 100), seeds)
def test_stretch_gives_what_as_image_takes(dtype, low, high, seed):
    a = (np.random.default_rng(seed).random((9, 8, 3)) * 250).astype(dtype)
    s = stretch(a, low, high)
    check(as_image(s), 9, 8)
    assert s.min() == 0 and s.max() == 1 and s.shape == a.shape
    assert (np.diff(s.ravel()[np.argsort(a.ravel(), kind='stable')]) >= 0).all()       # order is kept


def test_stretch_of_constant_images_and_missing_values():
    assert (stretch(np.full((4, 4), 7)) == 0).all()
    holed = np.arange(400.).reshape(20, 20)
    holed[0, 0] = np.nan
    assert np.isfinite(stretch(holed)).all() and stretch(holed)[0, 0] == 0
    assert as_image(stretch((np.arange(300).reshape(10, 30) * 200).astype(np.uint16))).max() == 1


# ---- devices, seeds, folders

def test_pick_device(monkeypatch):
    monkeypatch.setenv('RSSQA_DEVICE', 'meta')
    # a named device wins over the variable
    assert pick_device() == 'meta' and pick_device('cpu') == 'cpu'
    monkeypatch.delenv('RSSQA_DEVICE')
    assert pick_device() in ('cpu', 'cuda', 'mps')


@pytest.mark.parametrize('seed', [0, 7, 2**31, 2**40])
def test_seed_all_repeats_all_three(seed):
    import random
    def draw():
        seed_all(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()
    assert draw() == draw()


def test_cache_dir_order_of_homes(tmp_path, monkeypatch):
    monkeypatch.setenv('RSSQA_CACHE', str(tmp_path/'set'))
    assert cache_dir('a', 'b') == tmp_path/'set/a/b' and (tmp_path/'set/a/b').is_dir()
    monkeypatch.delenv('RSSQA_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    assert cache_dir() == tmp_path/'xdg/rssqa'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(Path, 'home', lambda: tmp_path/'me')
    assert cache_dir('x') == tmp_path/'me/.cache/rssqa/x'


def test_real_dir(tmp_path, monkeypatch):
    monkeypatch.delenv('RSSQA_REAL', raising=False)
    assert real_dir('seg') is None
    monkeypatch.setenv('RSSQA_REAL', str(tmp_path))
    assert real_dir('seg') is None and real_dir() == tmp_path


# ---- all or nothing

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_keeps_the_old_file_when_the_block_dies(tmp_path, error):
    target = tmp_path/'a/b/x.txt'
    for had in (False, True):
        with pytest.raises(error):
            with atomic(target) as tmp:
                tmp.write_text('half')
                raise error
        assert [p.name for p in target.parent.iterdir()] == ['x.txt'] * had
        if not had: target.write_text('old')
    assert target.read_text() == 'old'


def test_atomic_shows_nothing_before_the_end_and_keeps_the_suffix(tmp_path):
    target = tmp_path/'model.tar.gz'
    with atomic(target) as tmp:
        assert tmp.parent == target.parent and tmp.suffix == '.gz' and tmp.name.startswith('.')
        assert not target.exists()
        tmp.write_text('x')
        assert not target.exists()
    assert target.read_text() == 'x' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != 'posix', reason='permission bits')
@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
def test_atomic_respects_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try: write_json(tmp_path/'x.json', 1)
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path/'x.json').stat().st_mode) == 0o666 & ~umask


def test_atomic_survives_a_killed_process(tmp_path):
    (tmp_path/'x.txt').write_text('old')
    block = f"with atomic({str(tmp_path/'x.txt')!r}) as t: t.write_text('half'); os._exit(9)"
    code = f'import os\nfrom rssqa.core import atomic\n{block}'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 9
    assert (tmp_path/'x.txt').read_text() == 'old'


def test_concurrent_writers_and_readers_get_complete_files(tmp_path):
    target = tmp_path/'x.json'
    values = set()
    errors = []
    write_json(target, [-1] * 2000)
    def work(i):
        try:
            for _ in range(15):
                write_json(target, [i] * 2000)
                numbers = read_json(target)
                assert len(numbers) == 2000 and len(set(numbers)) == 1
                values.add(numbers[0])
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and values and [p.name for p in tmp_path.iterdir()] == ['x.json']


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


def containers(items): return st.lists(items, max_size=4) | st.dictionaries(st.text(), items, max_size=4)


@given(st.recursive(leaves, containers, max_leaves=10))
@quick
def test_json_round_trip(tmp_path, obj): assert read_json(write_json(tmp_path/'x.json', obj)) == obj


def test_json_keeps_numbers_numbers(tmp_path):
    values = dict(n=np.int64(3), x=np.float32(0.5), yes=np.bool_(True), a=np.arange(3000), t=torch.ones(2),
                  p=Path('a'), s={2, 1})
    back = read_json(write_json(tmp_path/'x.json', values))
    assert back == dict(n=3, x=.5, yes=True, a=list(range(3000)), t=[1, 1], p='a', s=[1, 2])


def test_read_json_names_missing_and_broken_files(tmp_path):
    with pytest.raises(DataNotFound, match='x.json'): read_json(tmp_path/'x.json')
    for data in (b'', b'{"a": 1', b'\xff\xfe\x00', b'<html>'):
        (tmp_path/'x.json').write_bytes(data)
        refused(SchemaError, lambda: read_json(tmp_path/'x.json'), 'x.json')


def test_read_json_of_a_folder_and_of_a_thousand_brackets(tmp_path):
    refused(SchemaError, lambda: read_json(tmp_path), str(tmp_path))
    (tmp_path/'deep.json').write_text('[' * 100_000)
    refused(SchemaError, lambda: read_json(tmp_path/'deep.json'), 'deep.json')
    refused(DataNotFound, lambda: file_id(tmp_path), str(tmp_path))


def test_failed_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path/'x.json', 1)
    with pytest.raises(TypeError):  # keys that cannot be sorted
        write_json(tmp_path/'x.json', {1: 'a', 'b': 2})
    assert read_json(tmp_path/'x.json') == 1 and len(list(tmp_path.iterdir())) == 1


# ---- weight files

@quick
@given(st.binary(max_size=200), st.sampled_from(['torch', 'numpy']))
def test_bytes_that_are_no_weights_never_raise_a_foreign_error(tmp_path, data, framework):
    (tmp_path/'w.safetensors').write_bytes(data)
    try: assert load_tensors(tmp_path/'w.safetensors', framework) is not None
    except Incompatible as e: assert 'w.safetensors' in str(e) and e.found and e.todo


@quick
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_any_flipped_bit_of_recorded_weights_is_refused(tmp_path, at, bit):
    path = tmp_path/'w.safetensors'
    save_file(dict(a=torch.arange(40.)), path)
    digests = weight_digests(tmp_path, path.name)
    assert torch.equal(load_recorded(tmp_path, path.name, digests)['a'], torch.arange(40.))
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    refused(Incompatible, lambda: load_recorded(tmp_path, path.name, digests), 'w.safetensors', 'Found digest')


def test_weights_that_were_not_recorded_are_refused_beside_recorded_ones(tmp_path):
    save_file(dict(a=torch.ones(2)), tmp_path/'w.safetensors')
    assert load_recorded(tmp_path, 'w.safetensors', None)['a'].sum() == 2
    refused(Incompatible, lambda: load_recorded(tmp_path, 'w.safetensors', {}), 'expected none')
    refused(DataNotFound, lambda: load_recorded(tmp_path, 'gone.safetensors', {}), 'gone.safetensors')


MISFITS = [KeyError('classes'), TypeError('x'), RuntimeError('size\n\tmismatch'), ValueError()]


@pytest.mark.parametrize('error', MISFITS)
def test_files_that_do_not_fit_together_are_named(error):
    def load():
        with model_faults('models/town'): raise error
    refused(Incompatible, load, 'models/town', type(error).__name__, 'whole folder')


# ---- progress

def test_progress_and_say_are_quiet_when_asked(capsys, monkeypatch):
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    for quiet in ('1', '0'):
        monkeypatch.setenv('RSSQA_QUIET', quiet)
        assert list(progress(iter('abc'), 'reading', total=3, unit='file')) == ['a', 'b', 'c']
        say('done')
        out, err = capsys.readouterr()
        assert out == ''
        if quiet == '1': assert err == ''
        else: assert 'reading' in err and ' file/s' in err and err.endswith('done\n')


def test_exports_exist(): assert all(hasattr(core, n) for n in core.__all__)
