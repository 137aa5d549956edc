"""Fusion blocks: what each one reads, how faulty ones are found, and the losses that train them."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from rssqa.core import Incompatible, fusions
from rssqa.quality.fusion import (
    Concat, CrossGating, Gate, QualityNet, SegmenterOnly, SemanticOnly, check_fusion, symmetric_cross_gating
)
from rssqa.quality.model import plcc_loss, rank_loss

FUSIONS = ['scgb', 'scgb-symmetric', 'concat', 'sem', 'seg']


@pytest.mark.parametrize('name', FUSIONS)
@pytest.mark.parametrize('widths', [(12, 20, 16), (1, 1, 1), (768, 5, 8)])
def test_bundled_blocks_conform(name, widths):
    torch.manual_seed(0)
    if widths != (1, 1, 1): check_fusion(name, *widths)
    semantic_dim, segmenter_dim, dim = widths
    assert fusions[name](*widths)(torch.randn(3, semantic_dim), torch.randn(3, segmenter_dim)).shape == (3, dim)


# ---------------------------------------------------------------- planted faults

class Faultless(Concat):
    def forward(self, semantic, segmenter): return super().forward(semantic, segmenter)


class UnusedLayer(Concat):
    def __init__(self, *widths):
        super().__init__(*widths)
        self.spare = nn.Linear(3, 3)


class TooWide(nn.Module):
    def __init__(self, semantic_dim, segmenter_dim, dim):
        super().__init__()
        self.read = nn.Linear(semantic_dim + segmenter_dim, dim + 1)

    def forward(self, semantic, segmenter): return self.read(torch.cat([semantic, segmenter], 1))


class BatchNorm(Concat):
    def __init__(self, semantic_dim, segmenter_dim, dim):
        super().__init__(semantic_dim, segmenter_dim, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, semantic, segmenter): return self.norm(super().forward(semantic, segmenter))


class BatchNormWithoutRunningMean(BatchNorm):
    def __init__(self, semantic_dim, segmenter_dim, dim):
        super().__init__(semantic_dim, segmenter_dim, dim)
        self.norm = nn.BatchNorm1d(dim, track_running_stats=False)


class SubtractsBatchMean(Concat):
    def forward(self, semantic, segmenter): return super().forward(semantic - semantic.mean(0), segmenter)


class AddsBatchRank(Concat):
    def forward(self, semantic, segmenter):
        return super().forward(semantic, segmenter) + semantic.argmax(0).float().mean()


class Overflowing(Concat):
    def forward(self, semantic, segmenter): return torch.expm1(super().forward(semantic, segmenter))


class Undefined(Concat):
    def forward(self, semantic, segmenter):
        root = torch.sqrt(5e4 - semantic.pow(2).sum(1, keepdim=True))
        return super().forward(semantic, segmenter) + root * 1e-6


FAULTS = [
    (UnusedLayer, 'no gradient reaches spare.weight'),
    (TooWide, 'shape'),
    (BatchNorm, 'depends on the other rows'),
    (BatchNormWithoutRunningMean, 'depends on the other rows'),
    (SubtractsBatchMean, 'depends on the other rows'),
    (AddsBatchRank, 'depends on the other rows'),
    (Overflowing, 'not finite'),
    (Undefined, 'not finite'),
]


@pytest.fixture
def planted():
    yield lambda make: fusions.register('planted', make, replace=True)
    fusions.entries.pop('planted', None)


@pytest.mark.parametrize('make, message', FAULTS)
def test_planted_faults_are_found(make, message, planted):
    torch.manual_seed(1)
    planted(make)
    with pytest.raises(Incompatible, match=f'(?i){message}'): check_fusion('planted')


def test_all_faults_come_in_one_message(planted):
    class AllFaults(TooWide):
        def __init__(self, *widths):
            super().__init__(*widths)
            self.spare = nn.Linear(2, 2)

        def forward(self, semantic, segmenter):
            return torch.expm1(super().forward(semantic - semantic.mean(0), segmenter))

    planted(AllFaults)
    with pytest.raises(Incompatible, match='(?i)shape.*no gradient.*other rows.*not finite'):
        check_fusion('planted')


def test_faultless_block_of_a_user_passes(planted):
    planted(Faultless)
    assert isinstance(check_fusion('planted', 3, 4, 5), Faultless)


def test_unknown_block_is_suggested():
    with pytest.raises(KeyError, match='scgb'): check_fusion('scbg')


# ---------------------------------------------------------------- cross-gating

def test_gate_starts_near_one():
    torch.manual_seed(0)
    weights = Gate(32)(torch.randn(500, 32))
    assert abs(weights.mean() - 1) < 0.05 and weights.std() < 0.2


def inputs_with_gradient(block, semantic_dim=5, segmenter_dim=7): # [semantic, segmenter], bool
    semantic = torch.randn(4, semantic_dim, requires_grad=True)
    segmenter = torch.randn(4, segmenter_dim, requires_grad=True)
    block.eval()(semantic, segmenter).pow(2).sum().backward()
    return [x.grad is not None and bool(x.grad.any()) for x in (semantic, segmenter)]


@pytest.mark.parametrize('make, expected', [
    (CrossGating, [True, True]),
    (symmetric_cross_gating, [True, True]),
    (Concat, [True, True]),
    (SemanticOnly, [True, False]),
    (SegmenterOnly, [False, True]),
])
def test_each_block_reads_the_vectors_it_names(make, expected):
    assert inputs_with_gradient(make(5, 7, 6)) == expected


@pytest.mark.parametrize('mode, passes', [('semantic_guided', False), ('symmetric', True)])
def test_semantics_only_gate_in_the_guided_mode(mode, passes):
    "With an empty segmenter stream nothing is left to gate; the symmetric mode still passes the scene on."
    block = CrossGating(5, 7, 6, mode).eval()
    nn.init.zeros_(block.segmenter.bias)
    a, b = (block(torch.randn(1, 5), torch.zeros(1, 7)) for _ in range(2))
    assert torch.equal(a, b) != passes


def test_mode_with_a_typo_is_refused():
    with pytest.raises(KeyError, match='mean symmetric'): CrossGating(5, 7, 6, 'symetric')


# ---------------------------------------------------------------- the network

WIDTHS = dict(single_map=4, cross_method=3, prior=3, intermediate=6, semantic=5)


def random_blocks(n, methods=2, **widths): # in the order of QualityNet.forward; methods -1, 0, 1 in turn
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(n, width, generator=generator) for width in (WIDTHS | widths).values()]
    return [*blocks, torch.arange(n) % (methods + 1) - 1]


@pytest.mark.parametrize('widths', [
    dict(),
    dict(semantic=0),
    dict(intermediate=0),
    dict(cross_method=0),
    dict(semantic=0, intermediate=0, cross_method=0),
])
@pytest.mark.parametrize('fusion', FUSIONS)
def test_network_takes_any_set_of_blocks(fusion, widths):
    net = QualityNet(**WIDTHS | widths, methods=2, fusion=fusion, dim=8, hidden=8).eval()
    x = random_blocks(7, **widths)
    out = net(*x)
    assert out.shape == (7,) and ((out > 0) & (out < 1)).all()
    assert net.embed(*x).shape == (7, 8)
    assert torch.allclose(net(*[block[2:4] for block in x]), out[2:4], atol=1e-6)


def test_intermediate_features_of_an_unknown_method_are_not_read():
    net = QualityNet(**WIDTHS, methods=2, dim=8, hidden=8).eval()
    x = random_blocks(6)
    nn.init.normal_(net.head[-1].weight)
    other = [*x[:3], x[3] * 5 + 1, *x[4:]]
    same = net(*x) == net(*other)
    assert same.tolist() == (x[5] < 0).tolist()


# ---------------------------------------------------------------- losses

def standardise(x): return (x - x.mean()) / x.std(correction=0)


def one_group(y): return torch.zeros(len(y), dtype=torch.int64)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 60), st.integers(0, 10**6))
def test_plcc_loss_is_a_quarter_of_the_error_of_z_scores(n, seed):
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(n, generator=generator, dtype=torch.float64)
    y = torch.rand(n, generator=generator, dtype=torch.float64)
    loss = plcc_loss(s, y, one_group(y)).item()
    quarter = ((standardise(s) - standardise(y))**2).mean().item() / 4
    assert loss == pytest.approx(quarter) == pytest.approx((1 - np.corrcoef(s, y)[0, 1]) / 2)
    # scale-free
    assert loss == pytest.approx(plcc_loss(3 * s + 1, y, one_group(y)).item())


def test_plcc_loss_averages_groups():
    y = torch.linspace(0, 1, 20)
    group = torch.tensor([0] * 10 + [1] * 10)
    s = torch.where(group == 0, y, -y)
    assert plcc_loss(s, y, group).item() == pytest.approx(0.5, abs=1e-5)
    assert plcc_loss(y, y, group).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('s, y', [
    (torch.full((9,), .5), torch.rand(9)),
    (torch.rand(9), torch.full((9,), .5)),
    (torch.rand(1), torch.rand(1)),
    (torch.rand(3), torch.rand(3)),
    (torch.full((9,), .5), torch.full((9,), .5)),
])
def test_degenerate_batches_give_finite_losses_and_gradients(s, y):
    s.requires_grad_(True)
    (plcc_loss(s, y, one_group(y)) + rank_loss(s[None], y[None])).backward()
    assert torch.isfinite(s.grad).all()


def test_rank_loss_is_zero_for_separated_pairs():
    y = torch.tensor([[0.2, 0.5, 0.9], [0.7, 0.1, 0.3]])
    shifted = y + torch.tensor([[5.0], [-3.0]])
    assert rank_loss(y, y).item() == 0 and rank_loss(2 * y, y).item() == 0
    assert rank_loss(shifted, y).item() == pytest.approx(0, abs=1e-6)
    assert rank_loss(0.5 * y, y) > 0 and rank_loss(-y, y) > rank_loss(0 * y, y) > 0


def test_rank_loss_of_one_image_is_not_zero():
    "A public implementation uses `.t()` on a 1-D tensor and returns zero."
    assert rank_loss(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.9]])).item() == pytest.approx(1.6)


def test_rank_loss_ignores_missing_methods():
    missing = torch.full((4, 2), float('nan'))
    generator = torch.Generator().manual_seed(0)
    s = torch.rand(4, 3, generator=generator)
    y = torch.rand(4, 3, generator=generator)
    wide_y = torch.cat([y, missing], 1)
    assert rank_loss(torch.cat([s, missing], 1), wide_y).item() == pytest.approx(rank_loss(s, y).item())
    s.requires_grad_(True)
    rank_loss(torch.cat([s, missing], 1), wide_y).backward()
    assert torch.isfinite(s.grad).all() and s.grad.any()


def test_rank_loss_without_targets_has_no_gradient():
    s = torch.rand(2, 3, requires_grad=True)
    rank_loss(s, torch.full((2, 3), float('nan'))).backward()
    assert not s.grad.any()
