"""Containers: what a weight file is, under which names its tensors go, and which architecture its shapes need."""
import os

import pytest
import torch

from rssqa.clip.conformance import write_format
from rssqa.clip.checkpoints import (
    FORMATS,
    clip_shape,
    detect_format,
    fitting_architectures,
    is_long,
    lengthen,
    long_masks,
    misfit_hint,
    read_weights,
)
from rssqa.core import DataNotFound, Incompatible
from rssqa.clip.encoders import _net

TEXT = dict(context_length=77, vocab_size=200, width=16, heads=2, layers=1)
VISION = dict(image_size=32, patch_size=8, width=32, head_width=16, layers=2)


def state_of(vision={}, text={}, **more):
    torch.manual_seed(0)
    return _net(dict(embed_dim=16, vision_cfg=VISION | vision, text_cfg=TEXT | text) | more).state_dict()


def meta(name):
    import open_clip
    with torch.device('meta'): return open_clip.CLIP(**open_clip.get_model_config(name)).state_dict()


@pytest.mark.parametrize('format', sorted(FORMATS))
def test_every_container_is_named_and_gives_the_same_table(format, tmp_path):
    state = state_of()
    if format == 'bundle': (tmp_path/'open_clip_config.json').write_text('{}')
    path = write_format(
        tmp_path
        if format == 'bundle'
        else tmp_path / f'w.{"safetensors" if format == "safetensors" else "pt"}',
        state,
        format,
    )
    assert detect_format(tmp_path if format == 'bundle' else path) == format
    again = read_weights(path)
    assert again.keys() == state.keys() and all(torch.equal(again[k], t) for k, t in state.items())


def test_raw_contents_and_nested_prefixes_are_named_too():
    state = {'visual.proj': torch.ones(2), 'ln_final.weight': torch.ones(2)}
    assert detect_format(state) == 'flat' and detect_format(dict(model=state)) == 'open_clip_train'
    assert (
        detect_format(
            {
                'module.image_backbone.proj': torch.ones(2),
                'module.text_backbone.ln_final.weight': torch.ones(2),
            }
        )
        == 'itra'
    )


def test_itra_inside_a_training_checkpoint(tmp_path):
    inner = {
        'module._orig_mod.image_backbone.proj': torch.ones(2),
        'module._orig_mod.text_backbone.ln_final.weight': torch.zeros(2),
    }
    torch.save(dict(epoch=1, state_dict=inner), tmp_path/'w.pt')
    assert (
        read_weights(tmp_path / 'w.pt').keys() == {'visual.proj', 'ln_final.weight'}
        and detect_format(tmp_path / 'w.pt') == 'itra'
    )


def test_two_names_for_one_tensor_are_refused(tmp_path):
    torch.save(
        {'text_backbone.ln_final.weight': torch.ones(2), 'ln_final.weight': torch.zeros(2)}, tmp_path / 'w.pt'
    )
    with pytest.raises(Incompatible, match='ln_final.weight with and without'): read_weights(tmp_path/'w.pt')


def test_what_is_no_container(tmp_path):
    with pytest.raises(DataNotFound, match='open_clip_config'): detect_format(tmp_path)
    with pytest.raises(DataNotFound, match='no weights'): detect_format(tmp_path/'w.pt')
    with pytest.raises(Incompatible, match='no state dict'): detect_format({'epoch': 3})


class Evil:
    def __init__(self, target): self.target = target
    def __reduce__(self): return os.mkdir, (str(self.target),)


@pytest.mark.parametrize('read', [read_weights, detect_format])
def test_code_in_a_pickle_never_runs(tmp_path, read):
    torch.save(
        dict(state_dict={'visual.proj': torch.ones(2)}, optimizer=Evil(tmp_path / 'boom')), tmp_path / 'w.pt'
    )
    with pytest.raises(Incompatible, match='mkdir'): read(tmp_path/'w.pt')
    assert not (tmp_path/'boom').exists()


# shapes ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['ViT-B-32', 'ViT-B-16', 'ViT-L-14', 'ViT-L-14-336', 'ViT-H-14', 'RN50', 'RN101', 'ViT-B-32-256'])
def test_shapes_name_their_architecture(name):
    assert name in fitting_architectures(meta(name)) and all(
        not n.endswith('quickgelu') for n in fitting_architectures(meta(name))
    )


def test_shape_of_a_tiny_net():
    assert clip_shape(state_of()) == dict(
        width=32,
        patch=8,
        layers=2,
        image_size=32,
        dim=16,
        text_width=16,
        vocab=200,
        text_layers=1,
        context=77,
    )
    assert clip_shape(state_of(custom_text=True)) == clip_shape(state_of())
    assert (
        clip_shape({}) == clip_shape({'visual.proj': torch.ones(2, 2)}) == {}
        and fitting_architectures(state_of()) == []
    )


@pytest.mark.parametrize('file, net, hint', [
    ('ViT-B-32-256', 'ViT-B-32', '256-pixel net of patch 32: use image_size=256'), ('ViT-L-14', 'ViT-L-14-336', 'use image_size=224'),
    ('ViT-L-14', 'ViT-B-32', 'those of open_clip ViT-L-14'), ('RN50', 'ViT-B-32', 'RN50')])
def test_hints_name_what_fits(file, net, hint): assert hint in misfit_hint(meta(file), meta(net))


def test_hints_for_nets_of_no_known_kind():
    net = state_of()
    assert misfit_hint(state_of(dict(image_size=64)), net).endswith('use image_size=64')
    assert 'config of its own' in misfit_hint(state_of(dict(width=48)), net) and 'width 48' in misfit_hint(
        state_of(dict(width=48)), net
    )
    assert 'context_length=32' in misfit_hint(state_of(text=dict(context_length=32)), net)
    assert (
        misfit_hint({}, net)
        == misfit_hint(net, net)
        == 'choose the architecture the weights were trained with'
    )


# long texts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rows, keep, times', [(77, 20, 4), (16, 4, 3), (10, 0, 2)])
def test_stretching_is_linear_interpolation(rows, keep, times):
    table = torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    long = lengthen(dict(positional_embedding=table), keep, times)
    stretched = long['positional_embedding']
    assert (
        is_long(long)
        and len(stretched) == keep + times * (rows - keep)
        and torch.equal(stretched, long['positional_embedding_res'])
    )
    assert torch.equal(stretched[:keep], table[:keep]) and torch.allclose(
        stretched[keep::times], table[keep:]
    )
    for i in range(keep, len(stretched) - times):                      # every new row, written as a loop
        j, r = divmod(i - keep, times)
        assert torch.allclose(
            stretched[i], table[keep + j] + r / times * (table[keep + j + 1] - table[keep + j])
        )


def test_masks_split_the_positions():
    masks = long_masks(248)
    assert masks['mask1'].flatten().nonzero().flatten().tolist() == list(range(20)) and torch.equal(
        masks['mask1'] + masks['mask2'], torch.ones(248, 1)
    )


def test_lengthening_leaves_the_rest_alone():
    state = state_of()
    long = lengthen(state)
    assert (
        long.keys() - state.keys() == {'positional_embedding_res', 'mask1', 'mask2'}
        and len(state['positional_embedding']) == 77
    )
    assert all(long[k] is state[k] for k in state if k != 'positional_embedding')
