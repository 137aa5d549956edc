"""FeatureBlocks that fuse two vectors, the promises they make, and the losses that train them."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from rssqa.core import Incompatible, fusions
from rssqa.quality.fusion import Concat, CrossGating, Gate, QualityNet, SegOnly, SemOnly, check_fusion
from rssqa.quality.model import plcc_loss, rank_loss


@pytest.mark.parametrize('name', ['scgb', 'scgb-symmetric', 'concat', 'sem', 'seg'])
@pytest.mark.parametrize('widths', [(12, 20, 16), (1, 1, 1), (768, 5, 8)])
def test_shipped_blocks_keep_their_promises(name, widths):
    torch.manual_seed(0)
    if widths != (1, 1, 1): check_fusion(name, *widths)
    assert fusions[name](*widths)(torch.randn(3, widths[0]), torch.randn(3, widths[1])).shape == (
        3,
        widths[2],
    )


class Base(Concat):
    def forward(self, sem, seg): return super().forward(sem, seg)

class Unused(Concat):
    def __init__(self, *widths):
        super().__init__(*widths)
        self.spare = nn.Linear(3, 3)

class Wide(nn.Module):
    def __init__(self, d_sem, d_seg, dim):
        super().__init__()
        self.read = nn.Linear(d_sem + d_seg, dim + 1)
    def forward(self, sem, seg): return self.read(torch.cat([sem, seg], 1))

class Batch(Concat):
    def __init__(self, d_sem, d_seg, dim):
        super().__init__(d_sem, d_seg, dim)
        self.norm = nn.BatchNorm1d(dim)
    def forward(self, sem, seg): return self.norm(super().forward(sem, seg))

class BatchWithoutMemory(Batch):
    def __init__(self, d_sem, d_seg, dim):
        super().__init__(d_sem, d_seg, dim)
        self.norm = nn.BatchNorm1d(dim, track_running_stats=False)

class Mean(Concat):
    def forward(self, sem, seg): return super().forward(sem - sem.mean(0), seg)

class Rank(Concat):
    def forward(self, sem, seg): return super().forward(sem, seg) + sem.argmax(0).float().mean()

class Exploding(Concat):
    def forward(self, sem, seg): return torch.expm1(super().forward(sem, seg))

class Undefined(Concat):
    def forward(self, sem, seg):
        return super().forward(sem, seg) + torch.sqrt(5e4 - sem.pow(2).sum(1, keepdim=True)) * 1e-6


FAULTS = dict(
    Unused=(Unused, 'no gradient reaches spare.weight'),
    Wide=(Wide, 'shape'),
    Batch=(Batch, 'depends on the other rows'),
    Memory=(BatchWithoutMemory, 'depends on the other rows'),
    Mean=(Mean, 'depends on the other rows'),
    Rank=(Rank, 'depends on the other rows'),
    Exploding=(Exploding, 'not finite'),
    Undefined=(Undefined, 'not finite'),
)


@pytest.fixture
def planted():
    yield lambda make: fusions.register('planted', make, replace=True)
    fusions.entries.pop('planted', None)


@pytest.mark.parametrize('name', FAULTS)
def test_planted_faults_are_found(name, planted):
    torch.manual_seed(1)
    planted(FAULTS[name][0])
    with pytest.raises(Incompatible, match=f'(?i){FAULTS[name][1]}'): check_fusion('planted')


def test_all_faults_come_in_one_message(planted):
    class Bad(Wide):
        def __init__(self, *w):
            super().__init__(*w)
            self.spare = nn.Linear(2, 2)
        def forward(self, sem, seg): return torch.expm1(super().forward(sem - sem.mean(0), seg))
    planted(Bad)
    with pytest.raises(Incompatible, match='(?i)shape.*no gradient.*other rows.*not finite'):
        check_fusion('planted')


def test_a_sound_block_of_ones_own_passes(planted):
    planted(Base)
    assert isinstance(check_fusion('planted', 3, 4, 5), Base)


def test_unknown_block_is_suggested():
    with pytest.raises(KeyError, match='scgb'): check_fusion('scbg')


# ---------------------------------------------------------------- cross-gating

def test_gate_starts_near_one():
    torch.manual_seed(0)
    weights = Gate(32)(torch.randn(500, 32))
    assert abs(weights.mean() - 1) < 0.05 and weights.std() < 0.2


def grads(block, d_sem=5, d_seg=7):
    sem = torch.randn(4, d_sem, requires_grad=True)
    seg = torch.randn(4, d_seg, requires_grad=True)
    block.eval()(sem, seg).pow(2).sum().backward()
    return [g is not None and bool(g.any()) for g in (sem.grad, seg.grad)]


@pytest.mark.parametrize('make, sees', [(CrossGating, [True, True]), (lambda *w: CrossGating(*w, 'symmetric'), [True, True]), (Concat, [True, True]), (SemOnly, [True, False]), (SegOnly, [False, True])])
def test_each_block_sees_what_its_name_says(make, sees): assert grads(make(5, 7, 6)) == sees


def test_semantics_only_gates_in_the_guided_mode():
    "With an empty segmentation stream nothing is left to gate; the symmetric mode still passes the scene on."
    for mode, passes in [('semantic_guided', False), ('symmetric', True)]:
        block = CrossGating(5, 7, 6, mode).eval()
        nn.init.zeros_(block.seg.bias)
        a, b = (block(torch.randn(1, 5), torch.zeros(1, 7)) for _ in range(2))
        assert torch.equal(a, b) != passes


def test_a_mode_with_a_typo_is_refused():
    with pytest.raises(KeyError, match='mean symmetric'): CrossGating(5, 7, 6, 'symetric')


# ---------------------------------------------------------------- the network

def blocks(n, own=4, cross_method=3, intermediate=6, sem=5, methods=2):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, k, generator=g) for k in (own, cross_method, 3, intermediate, sem)] + [
        torch.arange(n) % (methods + 1) - 1
    ]


@pytest.mark.parametrize('widths', [dict(), dict(sem=0), dict(intermediate=0), dict(cross_method=0), dict(sem=0, intermediate=0, cross_method=0)])
@pytest.mark.parametrize('fusion', ['scgb', 'scgb-symmetric', 'concat', 'sem', 'seg'])
def test_network_takes_any_set_of_blocks(fusion, widths):
    sizes = dict(own=4, cross_method=3, intermediate=6, sem=5) | widths
    net = QualityNet(prior=3, methods=2, fusion=fusion, dim=8, hidden=8, **sizes).eval()
    x = blocks(7, **sizes)
    out = net(*x)
    fused = net.embed(*x)
    assert out.shape == (7,) and ((out > 0) & (out < 1)).all() and fused.shape == (7, 8)
    assert torch.allclose(net(*[t[2:4] for t in x]), out[2:4], atol=1e-6)


def test_taps_of_an_unseen_method_are_not_read():
    net = QualityNet(4, 3, 3, 6, 5, 2, dim=8, hidden=8).eval()
    x = blocks(6)
    nn.init.normal_(net.head[-1].weight)
    other = [*x[:3], x[3] * 5 + 1, *x[4:]]
    same = net(*x) == net(*other)
    assert same.tolist() == (x[5] < 0).tolist()


# ---------------------------------------------------------------- losses

def z(x): return (x - x.mean()) / x.std(correction=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 60), st.integers(0, 10**6))
def test_plcc_loss_is_a_quarter_of_the_error_of_z_scores(n, seed):
    g = torch.Generator().manual_seed(seed)
    s = torch.rand(n, generator=g, dtype=torch.float64)
    y = torch.rand(n, generator=g, dtype=torch.float64)
    loss = plcc_loss(s, y, torch.zeros(n, dtype=torch.int64)).item()
    assert (
        loss
        == pytest.approx(((z(s) - z(y)) ** 2).mean().item() / 4)
        == pytest.approx((1 - np.corrcoef(s, y)[0, 1]) / 2)
    )
    # scale-free
    assert loss == pytest.approx(plcc_loss(3 * s + 1, y, torch.zeros(n, dtype=torch.int64)).item())


def test_plcc_loss_averages_groups():
    y = torch.linspace(0, 1, 20)
    group = torch.tensor([0] * 10 + [1] * 10)
    s = torch.where(group == 0, y, -y)
    assert plcc_loss(s, y, group).item() == pytest.approx(0.5, abs=1e-5) and plcc_loss(
        y, y, group
    ).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('s, y', [(torch.full((9,), .5), torch.rand(9)), (torch.rand(9), torch.full((9,), .5)), (torch.rand(1), torch.rand(1)), (torch.rand(3), torch.rand(3)), (torch.full((9,), .5), torch.full((9,), .5))])
def test_degenerate_batches_give_finite_losses_and_gradients(s, y):
    s.requires_grad_(True)
    (plcc_loss(s, y, torch.zeros(len(y), dtype=torch.int64)) + rank_loss(s[None], y[None])).backward()
    assert torch.isfinite(s.grad).all()


def test_rank_loss_is_zero_for_separated_pairs():
    y = torch.tensor([[0.2, 0.5, 0.9], [0.7, 0.1, 0.3]])
    assert (
        rank_loss(y, y).item() == 0
        and rank_loss(2 * y, y).item() == 0
        and rank_loss(y + torch.tensor([[5.0], [-3.0]]), y).item() == pytest.approx(0, abs=1e-6)
    )
    assert rank_loss(0.5 * y, y) > 0 and rank_loss(-y, y) > rank_loss(0 * y, y) > 0


def test_rank_loss_sees_vectors_of_one_row():
    "The trap: with `.t()` on a 1-D tensor a public implementation returns zero."
    assert rank_loss(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.9]])).item() == pytest.approx(1.6)


def test_rank_loss_ignores_missing_methods():
    nan = float('nan')
    g = torch.Generator().manual_seed(0)
    s = torch.rand(4, 3, generator=g)
    y = torch.rand(4, 3, generator=g)
    wide = [torch.cat([t, torch.full((4, 2), nan)], 1) for t in (s, y)]
    assert rank_loss(*wide).item() == pytest.approx(rank_loss(s, y).item())
    s.requires_grad_(True)
    rank_loss(torch.cat([s, torch.full((4, 2), nan)], 1), wide[1]).backward()
    assert torch.isfinite(s.grad).all() and s.grad.any()


def test_all_missing_is_no_loss():
    s = torch.rand(2, 3, requires_grad=True)
    rank_loss(s, torch.full((2, 3), float('nan'))).backward()
    assert not s.grad.any()
