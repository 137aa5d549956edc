"""Encoders that learn from other encoders: loss by hand, exact resumption, clear refusals."""
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rssqa.core import DataNotFound, Incompatible, UnknownName
from rssqa.segment.methods import distil as module
from rssqa.segment.methods.blocks import full_weights, timm_encoder
from rssqa.segment.methods.distil import STUDENTS, DistilRecipe, _Distillation, distil, student
from rssqa.segment.protocol import methods

QUICK = DistilRecipe(steps=6, batch=2, crop=32)
SMALL = dict(recipe=QUICK, teacher='mobilenetv2_035', preset='nano')


@pytest.fixture(scope='module')
def material(tmp_path_factory): # -> image files, file of a teacher with random weights
    folder = tmp_path_factory.mktemp('distil')
    rng = np.random.default_rng(0)
    for i in range(3): Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder/f'{i}.png')
    torch.manual_seed(0)
    state = timm_encoder('mobilenetv2_035').net.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder/'teacher.safetensors')
    return sorted(folder.glob('*.png')), folder/'teacher.safetensors'


def test_the_loss_is_that_of_standardised_features(material):
    run = _Distillation('mit32', 'mobilenetv2_035', material[1], QUICK, 'nano')
    run.student.eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = run.losses(x)
        for loss, adapter, s, t in zip(losses, run.adapters, run.student(x), run.teacher(x)):
            mean = t.mean((0, 2, 3), keepdim=True)
            scaled = (t - mean) / (t.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
            assert loss.item() == pytest.approx((adapter(s) - scaled).square().mean().item(), rel=1e-4)
    assert len(losses) == 4


def test_the_teacher_does_not_learn(material, tmp_path):
    before = load_file(material[1])
    run = _Distillation('swin48', 'mobilenetv2_035', material[1], QUICK, 'nano')
    run.fit(module._Images(material[0]), tmp_path/'c.pt', lambda n, losses: None)
    after = run.teacher.net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k in after)


@pytest.mark.parametrize('name', STUDENTS)
def test_a_stopped_run_goes_on_exactly(name, material, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'CHECKPOINT_SECONDS', -1)              # a checkpoint after every step
    whole = distil(name, material[1], material[0], tmp_path/'whole', **SMALL)
    def stop(step, losses):
        if step == 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): distil(name, material[1], material[0], tmp_path/'parts', tick=stop, **SMALL)
    assert not (tmp_path/'parts'/f'{name}.safetensors').exists()
    steps = []
    parts = distil(name, material[1], material[0], tmp_path/'parts', tick=lambda n, losses: steps.append(n), **SMALL)
    assert steps == [4, 5, 6]                                          # the fourth step was not saved
    first, second = load_file(whole), load_file(parts)
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())
    assert [path.name for path in (tmp_path/'parts').iterdir()] == [f'{name}.safetensors']
    assert distil(name, 'nowhere', [], tmp_path/'parts', **SMALL) == parts # finished work is not done again


@pytest.mark.parametrize('method', ['upernet-swin', 'ft-unetformer', 'segformer'])
def test_the_methods_load_what_was_learned(method, material, tmp_path):
    name = next(name for name, of in STUDENTS.items() if of == method or method == 'ft-unetformer')
    path = distil(name, material[1], material[0], tmp_path, **SMALL)
    encoder = methods[method].build(2, 'nano', str(path)).encoder
    learned = list(full_weights(load_file(path)).values())
    for key, value in encoder.named_parameters():
        assert any(w.shape == value.shape and torch.allclose(w, value, atol=1e-6) for w in learned), key


def test_other_recipes_and_empty_folders_are_refused(material, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'CHECKPOINT_SECONDS', -1)
    def stop(step, losses):
        if step == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): distil('swin48', material[1], material[0], tmp_path, tick=stop, **SMALL)
    other = SMALL | dict(recipe=DistilRecipe(steps=7, batch=2, crop=32))
    with pytest.raises(Incompatible, match='(?i)another recipe.*delete it'):
        distil('swin48', material[1], material[0], tmp_path, **other)
    with pytest.raises(DataNotFound, match='(?i)no image'): distil('mit32', material[1], [], tmp_path, **SMALL)
    with pytest.raises(UnknownName, match='swin48'): student('swin')


def test_the_learning_rate_rises_falls_and_ends_near_nothing(material):
    run = _Distillation('mit32', 'mobilenetv2_035', material[1], DistilRecipe(steps=100, batch=2, crop=32), 'nano')
    share = np.array([run._factor(n) for n in range(101)])
    np.testing.assert_allclose(share[:4], [0.2, 0.4, 0.6, 0.8])
    assert share.argmax() in (4, 5) and share.max() > 0.99
    assert (np.diff(share[5:]) < 0).all()
    assert share[50] == pytest.approx(0.501) and share[100] == pytest.approx(0.001)
