"""A network on OpenVINO gives the maps that it gives on torch, is kept, and torch goes on where it fails."""
import numpy as np
import pytest
import torch
from torch import nn

from rssqa.core import Incompatible, UnknownName, few_threads
from rssqa.segment import openvino
from rssqa.segment.openvino import OpenVINOSegmenter, is_installed, with_engine
from rssqa.segment.protocol import METHOD_NAMES, TorchSegmenter, check_segmenter, methods, segment_views

needs_openvino = pytest.mark.skipif(not is_installed(), reason='openvino is not installed')


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 4, 4)
        self.decoder = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x): return 4 * self.head(self.decoder(self.encoder(x)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return TorchSegmenter(Small().requires_grad_(False), ('road', 'roof', 'tree'), name='small.city', stride=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('RSSQA_CACHE', str(tmp_path/'cache'))


def images(n=2, height=64, width=64): return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def converted(segmenter, after=0):
    fast = OpenVINOSegmenter(segmenter, after)
    fast.images = dict.fromkeys(((64, 64), (52, 40)), 1)
    return fast


@needs_openvino
@pytest.mark.parametrize('method', METHOD_NAMES)
def test_every_method_gives_the_same_map(method):
    torch.manual_seed(0)
    net = methods[method].build(5, 'nano').requires_grad_(False)
    plain = TorchSegmenter(net, 'abcde', net.layers, f'{method}.toy', stride=net.stride)
    fast = converted(plain)
    expected, found = plain(images()), fast(images())
    assert fast.compiled and fast.fingerprint == plain.fingerprint and fast.name == plain.name
    assert (found.probs() - expected.probs()).abs().max() < 1e-4
    assert (found.mask == expected.mask).float().mean() >= 0.999
    for a, b in zip(found.features, expected.features):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-3 * float(b.abs().max()))


@needs_openvino
def test_it_keeps_the_promises_of_a_segmenter(small):
    fast = OpenVINOSegmenter(small, 0)
    check_segmenter(fast)
    assert fast.compiled


@needs_openvino
def test_torch_runs_until_it_pays(small):
    fast = OpenVINOSegmenter(small, 6)
    found = []
    for _ in range(4):
        fast(images())
        found.append(len(fast.compiled))
    assert found == [0, 0, 0, 1]
    later = OpenVINOSegmenter(small, 6)                                     # of another process
    later(images())
    assert not later.compiled
    later(images())
    assert later.compiled


@needs_openvino
def test_a_damaged_file_is_made_again(small, tmp_path):
    expected = converted(small)(images()).logits
    kept, = (tmp_path/'cache'/'openvino').iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-9] + bytes(9))
    assert torch.equal(converted(small)(images()).logits, expected)
    assert kept.read_bytes() != whole[:-9] + bytes(9)


@pytest.mark.parametrize('fault', ['fails', 'differs'])
def test_torch_goes_on_where_openvino_fails(small, fault, tmp_path, monkeypatch, capsys):
    def fails(segmenter, x): raise RuntimeError('no conversion rule\nand more')
    def differs(segmenter, x):
        outputs = [np.float32(y) for y in TorchSegmenter._forward(segmenter, x)[1]]
        class Result:
            def to_tuple(self): return (np.zeros((1, 3, 16, 16), np.float32), *outputs)
        return lambda x: Result()
    monkeypatch.setattr(openvino, 'compile_network', dict(fails=fails, differs=differs)[fault])
    monkeypatch.setattr(openvino, '_kept_path', lambda segmenter, size: tmp_path/'nowhere')
    monkeypatch.delenv('RSSQA_QUIET', raising=False)
    fast = converted(small)
    for _ in range(2): assert torch.equal(fast(images()).logits, small(images()).logits)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and 'small.city runs on torch' in lines[0]


def test_engines_are_chosen_by_name(small, monkeypatch):
    assert with_engine(small, 'torch') is small
    monkeypatch.setenv('RSSQA_ENGINE', 'torch')
    assert with_engine(small) is small
    with pytest.raises(UnknownName): with_engine(small, 'torhc')
    monkeypatch.setattr(openvino, 'is_installed', lambda: False)
    assert with_engine(small, 'auto') is small
    with pytest.raises(Incompatible, match=r'rssqa\[openvino\]'): with_engine(small, 'openvino')


def test_both_views_are_those_of_two_calls(small):
    x = images(2, 50, 37)
    out, mirrored = segment_views(small, x)
    assert torch.allclose(out.logits, small(x).logits, atol=1e-5)
    assert torch.allclose(mirrored, small(x.flip(-1)).logits.flip(-1), atol=1e-5)
    assert [f.shape for f in out.features] == [f.shape for f in small(x).features]


@pytest.mark.parametrize('wanted, expected', [('', 1), ('1', 1), ('2', 2), ('999', None)])
def test_threads_are_limited_and_restored(wanted, expected, monkeypatch):
    import os
    monkeypatch.setenv('RSSQA_THREADS', wanted)
    before = torch.get_num_threads()
    with few_threads():
        assert torch.get_num_threads() == min(expected or 999, os.cpu_count())
    assert torch.get_num_threads() == before
