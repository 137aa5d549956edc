"""Checkpoints: the format of a weight file, the names of its tensors, the architecture of its shapes."""
import os

import pytest
import torch

from rssqa.clip.conformance import write_format
from rssqa.clip.checkpoints import FORMATS, clip_shape, detect_format, fitting_architectures
from rssqa.clip.checkpoints import is_long, lengthen, long_masks, misfit_hint, read_weights, write_safetensors
from rssqa.core import DataNotFound, Incompatible
from rssqa.clip.encoders import build_net

TEXT = dict(context_length=77, vocab_size=200, width=16, heads=2, layers=1)
VISION = dict(image_size=32, patch_size=8, width=32, head_width=16, layers=2)


def state_of(vision={}, text={}, **more):
    torch.manual_seed(0)
    config = dict(embed_dim=16, vision_cfg=VISION | vision, text_cfg=TEXT | text) | more
    return build_net(config).state_dict()


def shapes_of(architecture):
    "State dict of a full-size network, without memory."
    import open_clip
    config = open_clip.get_model_config(architecture)
    with torch.device('meta'): return open_clip.CLIP(**config).state_dict()


@pytest.mark.parametrize('format', sorted(FORMATS))
def test_every_format_is_recognised_and_gives_the_same_state(format, tmp_path):
    state = state_of()
    target = tmp_path/('w.safetensors' if format == 'safetensors' else 'w.pt')
    if format == 'bundle':
        target = tmp_path
        (tmp_path/'open_clip_config.json').write_text('{}')
    path = write_format(target, state, format)
    assert detect_format(target) == format
    again = read_weights(path)
    assert again.keys() == state.keys() and all(torch.equal(again[k], t) for k, t in state.items())


def test_safetensors_are_read_by_their_own_library(tmp_path):
    from safetensors.torch import load_file
    state = dict(w=torch.randn(3, 2).T, n=torch.tensor(7), b=torch.randn(5).bfloat16())
    write_safetensors(tmp_path/'w.safetensors', state)
    again = load_file(tmp_path/'w.safetensors')
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)


def test_raw_contents_and_nested_prefixes_are_recognised_too():
    state = {'visual.proj': torch.ones(2), 'ln_final.weight': torch.ones(2)}
    assert detect_format(state) == 'flat' and detect_format(dict(model=state)) == 'open_clip_train'
    names = ('module.image_backbone.proj', 'module.text_backbone.ln_final.weight')
    assert detect_format({name: torch.ones(2) for name in names}) == 'itra'


def test_itra_inside_a_training_checkpoint(tmp_path):
    image = {'module._orig_mod.image_backbone.proj': torch.ones(2)}
    text = {'module._orig_mod.text_backbone.ln_final.weight': torch.zeros(2)}
    path = tmp_path/'w.pt'
    torch.save(dict(epoch=1, state_dict=image | text), path)
    assert read_weights(path).keys() == {'visual.proj', 'ln_final.weight'} and detect_format(path) == 'itra'


def test_two_names_for_one_tensor_are_refused(tmp_path):
    state = {'text_backbone.ln_final.weight': torch.ones(2), 'ln_final.weight': torch.zeros(2)}
    torch.save(state, tmp_path/'w.pt')
    with pytest.raises(Incompatible, match='ln_final.weight with and without'): read_weights(tmp_path/'w.pt')


def test_other_contents_are_refused(tmp_path):
    with pytest.raises(DataNotFound, match='open_clip_config'): detect_format(tmp_path)
    with pytest.raises(DataNotFound, match='no weights'): detect_format(tmp_path/'w.pt')
    with pytest.raises(Incompatible, match='no state dict'): detect_format({'epoch': 3})


class Evil:
    def __init__(self, target): self.target = target
    def __reduce__(self): return os.mkdir, (str(self.target),)


@pytest.mark.parametrize('read', [read_weights, detect_format])
def test_code_in_a_pickle_never_runs(tmp_path, read):
    contents = dict(state_dict={'visual.proj': torch.ones(2)}, optimizer=Evil(tmp_path/'boom'))
    torch.save(contents, tmp_path/'w.pt')
    with pytest.raises(Incompatible, match='mkdir'): read(tmp_path/'w.pt')
    assert not (tmp_path/'boom').exists()


# shapes ------------------------------------------------------------

ARCHITECTURES = ['ViT-B-32', 'ViT-B-16', 'ViT-B-32-256', 'ViT-L-14', 'ViT-L-14-336', 'ViT-H-14']
ARCHITECTURES += ['RN50', 'RN101']


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_shapes_name_their_architecture(name):
    fits = fitting_architectures(shapes_of(name))
    assert name in fits and not any(fit.endswith('quickgelu') for fit in fits)


def test_shape_of_a_tiny_net():
    image = dict(width=32, patch=8, layers=2, image_size=32)
    text = dict(text_width=16, vocab=200, text_layers=1, context=77)
    assert clip_shape(state_of()) == clip_shape(state_of(custom_text=True)) == image | text | dict(dim=16)
    assert fitting_architectures(state_of()) == []
    assert clip_shape({}) == clip_shape({'visual.proj': torch.ones(2, 2)}) == {}


@pytest.mark.parametrize('file, net, hint', [
    ('ViT-B-32-256', 'ViT-B-32', '256-pixel net of patch 32: use image_size=256'),
    ('ViT-L-14', 'ViT-L-14-336', 'use image_size=224'),
    ('ViT-L-14', 'ViT-B-32', 'those of open_clip ViT-L-14'),
    ('RN50', 'ViT-B-32', 'RN50'),
])
def test_hints_name_what_fits(file, net, hint): assert hint in misfit_hint(shapes_of(file), shapes_of(net))


def test_hints_for_nets_of_no_known_kind():
    net = state_of()
    assert misfit_hint(state_of(dict(image_size=64)), net).endswith('use image_size=64')
    assert 'context_length=32' in misfit_hint(state_of(text=dict(context_length=32)), net)
    wider = misfit_hint(state_of(dict(width=48)), net)
    assert 'config of its own' in wider and 'width 48' in wider
    general = 'choose the architecture the weights were trained with'
    assert misfit_hint({}, net) == misfit_hint(net, net) == general


# long texts ------------------------------------------------------------

@pytest.mark.parametrize('rows, keep, times', [(77, 20, 4), (16, 4, 3), (10, 0, 2)])
def test_stretching_is_linear_interpolation(rows, keep, times):
    table = torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    long = lengthen(dict(positional_embedding=table), keep, times)
    stretched = long['positional_embedding']
    assert is_long(long) and torch.equal(stretched, long['positional_embedding_res'])
    assert len(stretched) == keep + times * (rows - keep)
    assert torch.equal(stretched[:keep], table[:keep])
    assert torch.allclose(stretched[keep::times], table[keep:])
    for i in range(keep, len(stretched) - times):                      # every new row, written as a loop
        j, r = divmod(i - keep, times)
        before = table[keep + j]
        after = table[keep + j + 1]
        assert torch.allclose(stretched[i], before + r / times * (after - before))


def test_masks_split_the_positions():
    masks = long_masks(248)
    first = masks['mask1'].flatten().nonzero().flatten()
    assert first.tolist() == list(range(20))
    assert torch.equal(masks['mask1'] + masks['mask2'], torch.ones(248, 1))


def test_lengthening_keeps_all_other_tensors():
    state = state_of()
    long = lengthen(state)
    assert long.keys() - state.keys() == {'positional_embedding_res', 'mask1', 'mask2'}
    assert len(state['positional_embedding']) == 77
    assert all(long[k] is state[k] for k in state if k != 'positional_embedding')
