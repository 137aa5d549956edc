"""Training objectives: closed forms, parity with other implementations, and which side gets a gradient."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from rssqa.core import Incompatible, Registry, UnknownName
from rssqa.clip.objectives import Centre, EmaTeacher, PrototypeHead, self_distill
from rssqa.clip.objectives import caption_ids, clamped_scale, info_nce, multi_positive, siglip
from rssqa.clip.objectives import local_global, patch_distill, region_category, total_loss


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---------------------------------------------------------------- images and captions

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(2, 7), st.floats(0.1, 100))
def test_info_nce_is_that_of_open_clip(n, d, scale):
    from open_clip.loss import ClipLoss
    image = unit(n, d)
    text = unit(n, d, seed=1)
    loss = info_nce(image, text, scale)
    assert torch.isclose(loss, ClipLoss()(image, text, scale), atol=1e-5)
    assert torch.isclose(multi_positive(image, text, torch.randperm(n), scale), loss, atol=1e-5)


def test_siglip_is_that_of_open_clip():
    from open_clip.loss import SigLipLoss
    image = unit(7, 5)
    text = unit(7, 5, seed=1)
    expected = SigLipLoss()(image, text, 12.0, -8.0)
    assert torch.isclose(siglip(image, text, 12.0, -8.0), expected, atol=1e-5)


def multi_positive_of_five(image, text): return multi_positive(image, text, torch.tensor([0, 0, 1, 2, 2]))


@pytest.mark.parametrize('loss', [info_nce, siglip, multi_positive_of_five])
def test_image_and_text_may_be_swapped(loss):
    image = unit(5, 4)
    text = unit(5, 4, seed=1)
    assert torch.isclose(loss(image, text), loss(text, image), atol=1e-5)


def test_pairs_may_be_reordered_with_their_numbers():
    image = unit(6, 4)
    text = unit(6, 4, seed=1)
    ids = torch.tensor([0, 0, 1, -1, 1, 2])
    loss = multi_positive(image, text, ids, 9.0)
    order = torch.randperm(6)
    assert torch.isclose(loss, multi_positive(image[order], text[order], ids[order], 9.0), atol=1e-5)
    numbered = ids >= 0
    assert torch.isclose(loss, multi_positive(image[numbered], text[numbered], ids[numbered], 9.0))


def test_a_batch_without_known_numbers_has_no_gradient():
    image = unit(3, 4).requires_grad_()
    loss = multi_positive(image, unit(3, 4, seed=1), torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0 and image.grad.abs().sum() == 0


def test_equal_numbers_attract():
    text = unit(4, 6, seed=1)
    numbered = unit(4, 6).requires_grad_()
    multi_positive(numbered, text, torch.tensor([3, 3, 8, 9]), 5.0).backward()
    plain = unit(4, 6).requires_grad_()
    info_nce(plain, text, 5.0).backward()
    # image 0 moves towards the caption of image 1, where InfoNCE leads away
    assert -(numbered.grad[0] @ text[1]) > -(plain.grad[0] @ text[1])


def test_perfect_pairs_at_a_high_scale_cost_nothing():
    x = torch.eye(8)
    assert info_nce(x, x) < 1e-6 and siglip(x, x, 100.0, -50.0) < 1e-6


def test_captions_are_numbered_without_case_and_blanks():
    a, b, c, *empty = caption_ids(['A b', 'a  B', ' c', '', '  ']).tolist()
    assert a == b != c and min(a, c) >= 0
    assert empty == [-1, -1] and caption_ids([]).tolist() == []


def test_scale_stays_between_1_and_100():
    scales = [clamped_scale(torch.tensor(value)).item() for value in (-3.0, math.log(20), 9.0)]
    assert [round(scale, 3) for scale in scales] == [1, 20, 100]


def multi_positive_of_one_group(image, text): return multi_positive(image, text, torch.zeros(len(image)).long())


@pytest.mark.parametrize('image,text', [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,))])
@pytest.mark.parametrize('loss', [info_nce, siglip, multi_positive_of_one_group])
def test_shapes_that_are_no_pairs_are_refused(loss, image, text):
    with pytest.raises(Incompatible, match='cannot pair'): loss(torch.zeros(image), torch.zeros(text))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.floats(0.5, 50))
def test_equal_captions_make_no_difference_to_info_nce(ids, scale):
    ids = torch.tensor(ids)
    image = unit(len(ids), 6).requires_grad_()
    text = unit(4, 6, seed=1)[ids].requires_grad_()
    losses = [multi_positive(image, text, ids, scale), info_nce(image, text, scale)]
    assert torch.isclose(*losses, atol=1e-4)
    gradients = [torch.autograd.grad(loss, image, retain_graph=True)[0] for loss in losses]
    assert torch.allclose(*gradients, atol=1e-3)


# ---------------------------------------------------------------- teacher and student

@pytest.mark.parametrize('momentum', [0.0, 0.5, 0.996])
def test_the_moving_average_has_its_closed_form(momentum):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = EmaTeacher(net, momentum)
    expected = net[0].weight.detach().clone()
    for step in range(6):
        with torch.no_grad(): net[0].weight.add_(torch.randn(4, 3))
        net(torch.randn(5, 3))
        teacher.update(net)
        expected = momentum * expected + (1 - momentum) * net[0].weight.detach()
    assert torch.allclose(teacher.net[0].weight, expected, atol=1e-5)
    assert torch.equal(teacher.net[1].running_mean, net[1].running_mean)


def test_a_teacher_gets_no_gradient():
    teacher = EmaTeacher(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.net.training
    assert not teacher(torch.randn(2, 3)).requires_grad


def test_a_teacher_of_another_shape_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        EmaTeacher(nn.Linear(3, 2)).update(nn.Linear(3, 2, bias=False))


def test_views_are_not_compared_with_themselves():
    student = [torch.randn(4, 6) for _ in range(4)]
    teacher = [torch.randn(4, 6) for _ in range(2)]
    by_hand = []
    for i in range(2):
        target = F.softmax((teacher[i] - 0.3) / 0.04, -1)
        for j in range(4):
            if i != j: by_hand.append(-(target * F.log_softmax(student[j] / 0.1, -1)).sum(-1).mean())
    assert len(by_hand) == 6
    assert torch.isclose(self_distill(student, teacher, 0.3), sum(by_hand) / 6, atol=1e-5)


@pytest.mark.parametrize('student,teacher', [(1, 1), (2, 3)])
def test_too_few_views_are_refused(student, teacher):
    with pytest.raises(Incompatible, match='two views'):
        self_distill([torch.zeros(2, 3)] * student, [torch.zeros(2, 3)] * teacher)


def test_the_centre_is_a_moving_mean():
    centre = Centre(3, 0.8)
    expected = torch.zeros(3)
    for batch in torch.randn(5, 2, 4, 3):
        centre.update(batch)
        expected = 0.8 * expected + 0.2 * batch.mean((0, 1))
    assert torch.allclose(centre.mean, expected, atol=1e-6)


def test_prototype_head_by_hand():
    torch.manual_seed(0)
    head = PrototypeHead(5, 7, hidden=6, bottleneck=4)
    first, second, third = (layer for layer in head.layers if isinstance(layer, nn.Linear))
    x = torch.randn(3, 5)
    hidden = F.gelu(x @ first.weight.T + first.bias)
    hidden = F.gelu(hidden @ second.weight.T + second.bias)
    vectors = hidden @ third.weight.T + third.bias
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    prototypes = head.prototypes / head.prototypes.norm(dim=-1, keepdim=True)
    assert torch.allclose(head(x), vectors @ prototypes.T, atol=1e-6)


def entropy_after_training(steps, temperature): # of the mean output over images, as a share of log K
    torch.manual_seed(0)
    k = 16
    net = PrototypeHead(8, k, 32, 8)
    teacher = EmaTeacher(net, 0.9)
    centre = Centre(k)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    x = torch.randn(64, 8)
    for _ in range(steps):
        views = [x + 0.3 * torch.randn_like(x) for _ in range(3)]
        scores = [teacher(view) for view in views[:2]]
        loss = self_distill([net(view) for view in views], scores, centre.mean, 0.1, temperature)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        teacher.update(net)
        centre.update(torch.stack(scores))
    p = ((teacher(x) - centre.mean) / temperature).softmax(-1).mean(0)
    return -(p * (p + 1e-9).log()).sum().item() / math.log(k)


def test_centring_keeps_the_prototypes_in_use():
    assert entropy_after_training(200, 0.04) > 0.5


# ---------------------------------------------------------------- views and patches

def test_local_global_by_hand():
    image = unit(5, 8)
    small = torch.stack([unit(5, 8, seed=seed) for seed in (1, 2, 3)], 1)
    by_hand = torch.stack([info_nce(image, small[:, view], 7.0) for view in range(3)]).mean()
    assert torch.isclose(local_global(image, small, 7.0), by_hand)
    assert local_global(image, small[:, :0]) == 0
    assert local_global(image, image[:, None]) < local_global(image, small)


FIRST_IMAGE = torch.zeros(1, dtype=torch.long)


def test_the_whole_as_its_own_crop_costs_nothing():
    maps = torch.rand(3, 6, 5, 5)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)
    assert abs(patch_distill(maps, maps, boxes, torch.arange(3)).item()) < 1e-6


BOXES = [ # left, top, right, bottom; x runs along the last axis
    ([0, 0, 1, 0.5], slice(0, 2), slice(0, 4)),
    ([0.5, 0, 1, 1], slice(0, 4), slice(2, 4)),
    ([0.25, 0.5, 0.75, 1], slice(2, 4), slice(1, 3)),
]


@pytest.mark.parametrize('box,rows,columns', BOXES)
def test_a_box_cuts_what_it_names(box, rows, columns):
    maps = torch.rand(1, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    crop = maps[:, :, rows, columns]
    box = torch.tensor([box], dtype=torch.float32)
    right = patch_distill(maps, crop, box, FIRST_IMAGE).item()
    transposed = patch_distill(maps.transpose(2, 3), crop, box, FIRST_IMAGE).item()
    assert right < 1e-5 < transposed


def test_owners_say_which_image_a_crop_is_of():
    maps = torch.rand(2, 6, 4, 4, generator=torch.Generator().manual_seed(4))
    crops = maps[[1, 0, 1]]
    boxes = torch.tensor([[0., 0., 1., 1.]] * 3)
    right = patch_distill(maps, crops, boxes, torch.tensor([1, 0, 1]))
    wrong = patch_distill(maps, crops, boxes, torch.tensor([0, 1, 0]))
    assert right < 1e-6 < wrong


@pytest.mark.parametrize('detach', [True, False])
def test_detached_crops_get_no_gradient(detach):
    maps = torch.rand(1, 3, 4, 4, requires_grad=True)
    crops = torch.rand(1, 3, 4, 4, requires_grad=True)
    patch_distill(maps, crops, torch.tensor([[0.0, 0.0, 0.5, 0.5]]), FIRST_IMAGE, detach).backward()
    assert maps.grad.abs().sum() > 0 and (crops.grad is None) == detach


@pytest.mark.parametrize('box', [[0.5, 0, 0.5, 1], [0, 0.6, 1, 0.2], [-0.1, 0, 1, 1], [0, 0, 1, 1.2]])
def test_impossible_boxes_are_refused(box):
    maps = torch.rand(1, 3, 4, 4)
    with pytest.raises(Incompatible, match='empty or leaves'):
        patch_distill(maps, maps, torch.tensor([box]), FIRST_IMAGE)


def test_without_crops_there_is_no_loss():
    maps = torch.rand(1, 3, 4, 4, requires_grad=True)
    loss = patch_distill(maps, maps[:0], torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and maps.grad.abs().sum() == 0


def test_region_category_is_the_multi_positive_loss_of_classes():
    region = unit(6, 8)
    category = unit(6, 8, seed=1)
    ids = torch.tensor([0, 1, 0, 2, -1, -1])
    known = multi_positive(region[:4], category[:4], ids[:4], 20.0)
    assert torch.equal(region_category(region, category, ids, 20.0), known)
    assert region_category(region, category, torch.full((6,), -1)) == 0


# ---------------------------------------------------------------- adding up

def test_a_recipe_is_names_and_weights():
    image = unit(4, 5)
    text = unit(4, 5, seed=1)
    loss, parts = total_loss({'itc': 2.0, 'siglip': 0.5}, image=image, text=text, scale=10.0, bias=-10.0, unused=3)
    by_hand = 2 * info_nce(image, text, 10.0).item() + 0.5 * siglip(image, text).item()
    assert math.isclose(loss.item(), by_hand, rel_tol=1e-5) and set(parts) == {'itc', 'siglip'}
    with pytest.raises(Incompatible, match='no ids'): total_loss({'multi-positive': 1.0}, image=image, text=text)
    with pytest.raises(UnknownName, match='itc'): total_loss({'itx': 1.0}, image=image, text=text)


def test_a_new_objective_can_be_registered(monkeypatch):
    registry = Registry('objective')
    registry.register('length', lambda image: image.norm())
    monkeypatch.setattr('rssqa.clip.objectives.objectives', registry)
    loss, _ = total_loss({'length': 3.0}, image=torch.ones(1, 4))
    assert loss == 6.0
