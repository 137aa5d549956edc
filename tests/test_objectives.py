"""Objectives of training: closed forms, parity with other implementations, and who learns from whom."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from rssqa.core import Incompatible, Registry, UnknownName
from rssqa.clip.objectives import (
    Centre,
    EmaTeacher,
    PrototypeHead,
    caption_ids,
    clamped,
    info_nce,
    multi_positive,
    patch_distill,
    self_distill,
    siglip,
    total,
)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---------------------------------------------------------------- images and sentences

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(2, 7), st.floats(0.1, 100))
def test_info_nce_is_that_of_open_clip(n, d, scale):
    from open_clip.loss import ClipLoss
    a = unit(n, d)
    b = unit(n, d, seed=1)
    assert torch.isclose(info_nce(a, b, scale), ClipLoss()(a, b, scale), atol=1e-5)
    assert torch.isclose(multi_positive(a, b, torch.randperm(n), scale), info_nce(a, b, scale), atol=1e-5)


def test_siglip_is_that_of_open_clip():
    from open_clip.loss import SigLipLoss
    a = unit(7, 5)
    b = unit(7, 5, seed=1)
    assert torch.isclose(siglip(a, b, 12.0, -8.0), SigLipLoss()(a, b, 12.0, -8.0), atol=1e-5)


@pytest.mark.parametrize('loss', [info_nce, siglip, lambda a, b: multi_positive(a, b, torch.tensor([0, 0, 1, 2, 2]))])
def test_order_of_pairs_and_of_sides_does_not_matter(loss):
    a = unit(5, 4)
    b = unit(5, 4, seed=1)
    assert torch.isclose(loss(a, b), loss(b, a), atol=1e-5)


def test_pairs_may_be_reordered_with_their_numbers():
    a = unit(6, 4)
    b = unit(6, 4, seed=1)
    ids = torch.tensor([0, 0, 1, -1, 1, 2])
    order = torch.randperm(6)
    assert torch.isclose(
        multi_positive(a, b, ids, 9.0), multi_positive(a[order], b[order], ids[order], 9.0), atol=1e-5
    )
    assert torch.isclose(
        multi_positive(a, b, ids, 9.0), multi_positive(a[ids >= 0], b[ids >= 0], ids[ids >= 0], 9.0)
    )


def test_a_batch_without_known_numbers_teaches_nothing():
    a = unit(3, 4).requires_grad_()
    loss = multi_positive(a, unit(3, 4, seed=1), torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0 and a.grad.abs().sum() == 0


def test_equal_images_of_one_class_attract():
    a = unit(4, 6).requires_grad_()
    ids = torch.tensor([3, 3, 8, 9])
    multi_positive(a, unit(4, 6, seed=1), ids, 5.0).backward()
    b = a.detach().clone().requires_grad_()
    info_nce(b, unit(4, 6, seed=1), 5.0).backward()
    other = unit(4, 6, seed=1)[1]
    # towards the sentence of its twin, where InfoNCE leads away
    assert -(a.grad[0] @ other) > -(b.grad[0] @ other)


def test_perfect_pairs_at_a_high_scale_cost_nothing():
    x = torch.eye(8)
    assert info_nce(x, x) < 1e-6 and siglip(x, x, 100.0, -50.0) < 1e-6


def test_captions_are_numbered_by_what_they_say():
    a, b, c, *empty = caption_ids(['A b', 'a  B', ' c', '', '  ']).tolist()
    assert a == b != c and min(a, c) >= 0 and empty == [-1, -1] and caption_ids([]).tolist() == []


def test_scale_stays_between_1_and_100():
    assert [round(clamped(torch.tensor(v)).item(), 3) for v in (-3.0, math.log(20), 9.0)] == [1, 20, 100]


@pytest.mark.parametrize('a,b', [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,))])
@pytest.mark.parametrize('loss', [info_nce, siglip, lambda a, b: multi_positive(a, b, torch.zeros(len(a)).long())])
def test_what_is_no_pair_is_refused(loss, a, b):
    with pytest.raises(Incompatible, match='cannot pair'): loss(torch.zeros(a), torch.zeros(b))


# ---------------------------------------------------------------- teacher and student

@pytest.mark.parametrize('momentum', [0.0, 0.5, 0.996])
def test_the_moving_average_has_its_closed_form(momentum):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = EmaTeacher(net, momentum)
    start = net[0].weight.detach().clone()
    wanted = net[0].weight.detach().clone()
    for step in range(6):
        with torch.no_grad(): net[0].weight.add_(torch.randn(4, 3))
        net(torch.randn(5, 3))
        teacher.update(net)
        wanted = momentum * wanted + (1 - momentum) * net[0].weight.detach()
    assert torch.allclose(teacher.net[0].weight, wanted, atol=1e-5) and torch.equal(
        teacher.net[1].running_mean, net[1].running_mean
    )
    assert (
        not any(p.requires_grad for p in teacher.parameters())
        and not teacher.net.training
        and not teacher(torch.randn(2, 3)).requires_grad
    )


def test_a_teacher_of_another_shape_is_no_teacher():
    with pytest.raises((ValueError, RuntimeError)):
        EmaTeacher(nn.Linear(3, 2)).update(nn.Linear(3, 2, bias=False))


def test_views_are_not_compared_with_themselves():
    s = [torch.randn(4, 6) for _ in range(4)]
    t = [torch.randn(4, 6) for _ in range(2)]
    by_hand = [
        -(F.softmax((t[i] - 0.3) / 0.04, -1) * F.log_softmax(s[j] / 0.1, -1)).sum(-1).mean()
        for i in range(2)
        for j in range(4)
        if i != j
    ]
    assert len(by_hand) == 6 and torch.isclose(self_distill(s, t, 0.3), sum(by_hand) / 6, atol=1e-5)


@pytest.mark.parametrize('student,teacher', [(1, 1), (2, 3)])
def test_too_few_views(student, teacher):
    with pytest.raises(Incompatible, match='two views'):
        self_distill([torch.zeros(2, 3)] * student, [torch.zeros(2, 3)] * teacher)


def test_the_centre_is_a_moving_mean():
    c = Centre(3, 0.8)
    batches = torch.randn(5, 2, 4, 3)
    wanted = torch.zeros(3)
    for b in batches:
        c.update(b)
        wanted = 0.8 * wanted + 0.2 * b.mean((0, 1))
    assert torch.allclose(c.mean, wanted, atol=1e-6)


def spread_after(steps, centred, temperature):
    "Train a head on random vectors with its own moving average; -> entropy of the mean output, as a share of log K."
    torch.manual_seed(0)
    k = 16
    net = PrototypeHead(8, 16, 32, 8)
    teacher = EmaTeacher(net, 0.9)
    centre = Centre(16)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    x = torch.randn(64, 8)
    for _ in range(steps):
        views = [x + 0.3 * torch.randn_like(x) for _ in range(3)]
        said = [teacher(v) for v in views[:2]]
        loss = self_distill([net(v) for v in views], said, centre.mean if centred else 0.0, 0.1, temperature)
        opt.zero_grad()
        loss.backward()
        opt.step()
        teacher.update(net)
        centre.update(torch.stack(said))
    p = ((teacher(x) - (centre.mean if centred else 0.0)) / temperature).softmax(-1).mean(0)
    return -(p * (p + 1e-9).log()).sum().item() / math.log(k)


def test_centring_keeps_the_prototypes_in_use():
    assert spread_after(200, True, 0.04) > 0.5


# ---------------------------------------------------------------- patches

def test_the_whole_as_its_own_crop_costs_nothing():
    maps = torch.rand(3, 6, 5, 5)
    assert (
        abs(
            patch_distill(
                maps, maps, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4), torch.arange(3)
            ).item()
        )
        < 1e-6
    )


@pytest.mark.parametrize('box,rows,columns', [([0, 0, 1, 0.5], slice(0, 2), slice(0, 4)), ([0.5, 0, 1, 1], slice(0, 4), slice(2, 4)), ([0.25, 0.5, 0.75, 1], slice(2, 4), slice(1, 3))])
def test_a_box_cuts_what_it_names(box, rows, columns):
    "left, top, right, bottom; x runs along the last axis."
    maps = torch.rand(1, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    part = maps[:, :, rows, columns]
    one = torch.zeros(1, dtype=torch.long)
    cut = lambda m: patch_distill(m, part, torch.tensor([box], dtype=torch.float32), one).item()
    assert cut(maps) < 1e-5 < cut(maps.transpose(2, 3))


def test_owners_say_which_image_a_crop_is_of():
    maps = torch.rand(2, 6, 4, 4, generator=torch.Generator().manual_seed(4))
    boxes = torch.tensor([[0., 0., 1., 1.]] * 3)
    assert (
        patch_distill(maps, maps[[1, 0, 1]], boxes, torch.tensor([1, 0, 1]))
        < 1e-6
        < patch_distill(maps, maps[[1, 0, 1]], boxes, torch.tensor([0, 1, 0]))
    )


@pytest.mark.parametrize('detach', [True, False])
def test_who_learns(detach):
    maps = torch.rand(1, 3, 4, 4, requires_grad=True)
    crops = torch.rand(1, 3, 4, 4, requires_grad=True)
    patch_distill(
        maps, crops, torch.tensor([[0.0, 0.0, 0.5, 0.5]]), torch.zeros(1, dtype=torch.long), detach
    ).backward()
    assert maps.grad.abs().sum() > 0 and (crops.grad is None) == detach


@pytest.mark.parametrize('box', [[0.5, 0, 0.5, 1], [0, 0.6, 1, 0.2], [-0.1, 0, 1, 1], [0, 0, 1, 1.2]])
def test_impossible_boxes_are_refused(box):
    with pytest.raises(Incompatible, match='empty or leaves'):
        patch_distill(
            torch.rand(1, 3, 4, 4),
            torch.rand(1, 3, 4, 4),
            torch.tensor([box]),
            torch.zeros(1, dtype=torch.long),
        )


def test_no_crops_no_loss():
    maps = torch.rand(1, 3, 4, 4, requires_grad=True)
    patch_distill(maps, maps[:0], torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).backward()
    assert maps.grad.abs().sum() == 0


# ---------------------------------------------------------------- adding up

def test_a_recipe_is_names_and_weights():
    a = unit(4, 5)
    b = unit(4, 5, seed=1)
    loss, parts = total({'itc': 2.0, 'siglip': 0.5}, image=a, text=b, scale=10.0, bias=-10.0, unused=3)
    assert math.isclose(
        loss.item(), 2 * info_nce(a, b, 10.0).item() + 0.5 * siglip(a, b).item(), rel_tol=1e-5
    ) and set(parts) == {'itc', 'siglip'}
    with pytest.raises(Incompatible, match='no ids'): total({'multi-positive': 1.0}, image=a, text=b)
    with pytest.raises(UnknownName, match='itc'): total({'itx': 1.0}, image=a, text=b)


def test_a_new_objective_can_be_registered(monkeypatch):
    monkeypatch.setattr('rssqa.clip.objectives.objectives', mine := Registry('objective'))
    mine.register('length', lambda image: image.norm())
    assert total({'length': 3.0}, image=torch.ones(1, 4))[0] == 6.0


def test_region_category_is_the_multi_positive_loss_of_classes():
    from rssqa.clip.objectives import region_category
    a = unit(6, 8)
    b = unit(6, 8, seed=1)
    ids = torch.tensor([0, 1, 0, 2, -1, -1])
    assert (
        torch.equal(region_category(a, b, ids, 20.0), multi_positive(a[:4], b[:4], ids[:4], 20.0))
        and region_category(a, b, ids * 0 - 1) == 0
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.floats(0.5, 50))
def test_equal_sentences_make_no_difference_to_info_nce(ids, scale):
    ids = torch.tensor(ids)
    image = unit(len(ids), 6).requires_grad_()
    text = unit(4, 6, seed=1)[ids].requires_grad_()
    one = multi_positive(image, text, ids, scale)
    other = info_nce(image, text, scale)
    assert torch.isclose(one, other, atol=1e-4)
    assert torch.allclose(
        *(torch.autograd.grad(x, image, retain_graph=True)[0] for x in (one, other)), atol=1e-3
    )


def test_local_global_by_hand():
    from rssqa.clip.objectives import local_global
    image = unit(5, 8)
    small = torch.stack([unit(5, 8, seed=s) for s in (1, 2, 3)], 1)
    assert torch.isclose(
        local_global(image, small, 7.0),
        torch.stack([info_nce(image, small[:, v], 7.0) for v in range(3)]).mean(),
    )
    assert local_global(image, small[:, :0]) == 0 and local_global(image, image[:, None]) < local_global(
        image, small
    )
