"""NoiseFilter against the slow float64 reference, on planted problems, and its invariants as properties."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from torch import nn

from nspo2_trl import NSPO2Config
from nspo2_trl.engine.covariance import mixture
from nspo2_trl.engine.filter import NoiseFilter, figures
from nspo2_trl.layout.blocks import Block
from nspo2_trl.projections.noise import NoiseProjection
from nspo2_trl.training.samples import sample_share


def config(**options):
    defaults = {"projection_rank": 4, "min_rank": 4, "update_freq": 2, "cov_momentum": 0.9, "target_bias": 1.0}
    return NSPO2Config(**({"sentinel": False} | defaults | options))


def stream(steps, n, blocks, dim, seed=0, dtype=torch.float32):
    """Samples (n, blocks, 1, dim) a step: a fixed mean and noise with a falling spectrum, other axes in each block."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(blocks, dim, dim, generator=generator)).Q
    mean = torch.randn(blocks, dim, generator=generator)
    scales = torch.logspace(1, -1, dim)
    for _ in range(steps):
        noise = torch.einsum("nbd,bde->nbe", torch.randn(n, blocks, dim, generator=generator) * scales, axes)
        yield (mean + noise).to(dtype)[:, :, None]


def noisy(engine, number, n, make):
    """`number` steps of n samples; mean rank in the steps."""
    ranks = []
    for _ in range(number):
        samples = make(n)
        engine.step(samples, samples.mean(0))
        ranks.append(engine.rank.double().mean().item())
    return sum(ranks) / number


@pytest.mark.parametrize("strategy", ["noise", "keep", "hybrid"])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.float64, 1e-8)])
def test_agrees_with_the_slow_reference(strategy, n, dtype, tolerance):
    blocks, dim = 3, 24
    engine = NoiseFilter(config(strategy=strategy), recent=False)
    slow = [Reference(dim, strategy) for _ in range(blocks)]
    for samples in stream(15, n, blocks, dim, dtype=dtype):
        got = engine.step(samples, samples.mean(0))
        for block in range(blocks):
            expected = slow[block].step(samples[:, block, 0])
            error = (got[block, 0].double() - expected).norm() / expected.norm()
            assert error < tolerance, (engine.step_count, block)
    found = figures([engine])
    total = sum(s.removed for s in slow) / sum(s.energy for s in slow)
    assert found["variance_reduction"] == pytest.approx(total, abs=1e-4)
    if strategy == "keep":
        assert found["bias"] < 1e-6 and found["alpha"] == 1


def test_factored_is_the_reference_with_every_row_a_sample():
    """A block of m vectors: right covariance over d from n·m rows; the reference direction is one of m·d entries."""
    torch.manual_seed(0)
    n, vectors, dim = 3, 2, 12
    engine = NoiseFilter(config(strategy="noise", trust_radius=1e9))
    covariance = None
    for step in range(8):
        samples = torch.randn(n, 1, vectors, dim, dtype=torch.float64) * torch.logspace(1, -1, dim)
        grad = samples.mean(0)
        got = engine.step(samples, grad)
        if step >= 2:
            refreshed = 2 * (step // 2)
            total = sum(0.9 ** (refreshed - 1 - i) * c for i, c in enumerate(covariance[:refreshed]))
            top = torch.linalg.eigh(total).eigenvectors.flip(1)[:, :4]
            assert torch.allclose(got[0], grad[0] - grad[0] @ top @ top.T, atol=1e-9)
        rows = ((samples - grad) / math.sqrt(n * (n - 1))).reshape(-1, dim)
        covariance = [*(covariance or []), rows.T @ rows]


@given(
    seed=st.integers(0, 10_000),
    strategy=st.sampled_from(["noise", "keep", "hybrid"]),
    n=st.integers(1, 5),
    vectors=st.integers(1, 3),
    dim=st.integers(2, 40),
    radius=st.floats(0.01, 2),
    target=st.floats(0.01, 1),
)
@settings(max_examples=40)
def test_invariants_of_the_filter(seed, strategy, n, vectors, dim, radius, target):
    torch.manual_seed(seed)
    engine = NoiseFilter(config(strategy=strategy, trust_radius=radius, target_bias=target, min_rank=0))
    for _ in range(7):
        samples = torch.randn(n, 2, vectors, dim) * torch.logspace(1, -1, dim) + 0.3
        grad = samples.mean(0)
        result = engine.step(samples, grad)
        assert (result.norm(dim=(1, 2)) <= grad.norm(dim=(1, 2)) * (1 + 1e-5)).all()
        basis = engine.cov.basis
        overlap = basis @ basis.mT
        present = (engine.cov.values > 0).float()
        assert (overlap - torch.diag_embed(present)).abs().max() < 1e-4
    if engine.is_active:
        head, m = engine.head(), engine.reference
        moved = (head.apply(m) - m).norm(dim=(1, 2))
        assert (moved <= radius * m.norm(dim=(1, 2)) * (1 + 1e-4)).all()
        cosine = torch.nn.functional.cosine_similarity(head.apply(m).flatten(1), m.flatten(1))
        assert (1 - cosine <= target + 1e-5).all()


def test_rank_zero_and_inactive_return_the_gradient_itself():
    nothing, inactive = NoiseFilter(config(projection_rank=0, min_rank=0)), NoiseFilter(config())
    inactive.active = False
    for samples in stream(6, 3, 1, 10):
        grad = samples.mean(0)
        assert nothing.step(samples, grad) is inactive.step(samples, grad) is grad


@pytest.mark.parametrize("n", [1, 4])
def test_finds_planted_noise_and_scores_it_on_fresh_samples(n):
    torch.manual_seed(0)
    dim, planted = 200, torch.linalg.qr(torch.randn(200, 4)).Q
    options = {"projection_rank": 8, "update_freq": 10, "cov_momentum": 0.97, "trust_radius": 1e9, "min_rank": 0}
    engine = NoiseFilter(config(strategy="noise", **options), recent=False)
    ranks = []
    for step in range(200):
        noise = torch.randn(n, 4) @ planted.T * 5 + 0.1 * torch.randn(n, dim)
        samples = noise[:, None, None]
        engine.step(samples, samples.mean(0))
        if step == 30:
            engine.sums.reset()
        if step > 60:
            ranks.append(engine.rank.item())
    share = 4 * 25 / (4 * 25 + 0.01 * dim)  # of the noise that is planted
    assert sum(ranks) / len(ranks) == pytest.approx(4, abs=0.3)
    assert figures([engine])["variance_reduction"] == pytest.approx(share, abs=0.02)
    angles = torch.rad2deg(torch.arccos(torch.linalg.svdvals(engine.cov.basis[0, :4] @ planted).clamp(max=1)))
    assert angles.max() < 10


@pytest.mark.parametrize("n", [1, 4])
def test_white_noise_promises_nothing(n):
    """Scored on unseen rows, a basis fitted on white noise removes rank/d and no more."""
    torch.manual_seed(0)
    dim = 400
    fixed = NoiseFilter(config(strategy="noise", min_rank=4, update_freq=5, cov_momentum=0.97, trust_radius=1e9))
    free = NoiseFilter(config(strategy="noise", min_rank=0, update_freq=5, cov_momentum=0.97))
    for _ in range(50):
        samples = torch.randn(n, 8, 1, dim)
        for engine in (fixed, free):
            engine.step(samples, samples.mean(0))
    assert figures([fixed])["variance_reduction"] == pytest.approx(4 / dim, rel=0.3)
    assert free.rank.double().mean() < 0.3


@pytest.mark.parametrize("update_freq", [2, 3, 10])
def test_white_noise_is_not_significant_at_the_first_solve_either(update_freq):
    """With one sample a step the newest difference is held back, so that one step fewer was learned from."""
    torch.manual_seed(0)
    engine = NoiseFilter(config(min_rank=0, update_freq=update_freq, cov_momentum=0.97))
    noisy(engine, update_freq + 2, 1, lambda n: torch.randn(n, 100, 1, 200))
    assert engine.is_active and (engine.rank > 0).double().mean() <= 0.03


@pytest.mark.parametrize("n", [1, 4])
def test_noise_scale_and_signal_removed_on_a_planted_problem(n):
    """The signal lies by 64 % in the noisy directions; the noise is known, so both figures have exact values."""
    torch.manual_seed(0)
    dim, batch = 100, 8
    signal = torch.zeros(dim)
    signal[0], signal[50] = 0.8, 0.6
    scales = torch.full((dim,), 0.05)
    scales[:4] = 1.0
    engine = NoiseFilter(config(strategy="noise", update_freq=10, cov_momentum=0.97, trust_radius=1e9, min_rank=4))
    scales *= n**0.5  # the mean over n samples is equally noisy in both cases
    noisy(engine, 600, n, lambda n: (signal + torch.randn(n, dim) * scales)[:, None, None])
    found = figures([engine], batch_size=batch)
    exact = scales.square().sum().item() / n * batch  # ‖E g‖² = 1
    assert found["noise_scale"] == pytest.approx(exact, rel=0.1)
    assert found["signal_removed"] == pytest.approx(0.64, abs=0.1)
    assert found["signal_removed_se"] < 0.1


def test_figures_without_evidence_are_left_out():
    torch.manual_seed(0)
    engine = NoiseFilter(config())
    noisy(engine, 40, 4, lambda n: torch.randn(n, 1, 1, 50))
    assert "noise_scale" not in figures([engine]) and "signal_removed" not in figures([engine])


def test_anneal_ends_the_projection():
    engine = NoiseFilter(config(anneal=0.5))
    for samples in stream(6, 3, 1, 20):
        engine.step(samples, samples.mean(0))
    assert engine.strength == 1 and engine.is_active
    engine.progress = 0.25
    assert engine.strength == 0.5
    engine.progress = 0.5
    assert engine.strength == 0 and not engine.is_active


def test_strength_removes_its_share():
    full, half = NoiseFilter(config(strategy="keep")), NoiseFilter(config(strategy="keep", strength=0.5))
    for samples in stream(5, 3, 2, 20):
        grad = samples.mean(0)
        a, b = full.step(samples, grad), half.step(samples, grad)
    assert torch.allclose(b, (grad + a) / 2, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stop", [3, 4, 7])
def test_state_resumes_bit_for_bit_through_torch_save(tmp_path, n, stop):
    whole, first = NoiseFilter(config()), NoiseFilter(config())
    second = NoiseFilter(config())
    for step, samples in enumerate(stream(14, n, 2, 20)):
        if step == stop:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        grad = samples.mean(0)
        expected = whole.step(samples, grad)
        got = (first if step < stop else second).step(samples, grad)
        assert torch.equal(expected, got)
    assert figures([whole]) == figures([second])


def test_a_state_of_other_blocks_is_refused():
    small, large = NoiseFilter(config()), NoiseFilter(config(projection_rank=6, min_rank=6))
    for samples in stream(4, 2, 1, 20):
        small.step(samples, samples.mean(0))
    with pytest.raises(ValueError, match="this run needs"):
        large.load_state_dict(small.state_dict())


def test_min_rank_is_bounded_by_rank_and_block_and_removes_no_whole_gradient():
    torch.manual_seed(0)
    for options, dim, most in (({"projection_rank": 4, "min_rank": 8}, 40, 4), ({"min_rank": 4}, 4, 2)):
        engine = NoiseFilter(config(strategy="noise", trust_radius=1e9, **options))
        for _ in range(12):
            samples = torch.randn(3, 3, 1, dim)
            result = engine.step(samples, samples.mean(0))
        assert engine.head().taken.sum(1).max() <= most
        assert (result.norm(dim=(1, 2)) > 0.05 * samples.mean(0).norm(dim=(1, 2))).all()
        assert math.isfinite(figures([engine])["bias"])


def test_steps_of_one_sample_among_others_do_not_bias_the_noise_scale():
    torch.manual_seed(0)
    signal = torch.zeros(60)
    signal[0] = 1.0
    engine = NoiseFilter(config(cov_momentum=0.97), recent=False)
    for step in range(500):
        n = 1 if step % 4 == 3 else 4
        samples = (signal + torch.randn(n, 60))[:, None, None]
        engine.step(samples, samples.mean(0))
    assert figures([engine])["noise_scale"] == pytest.approx(60 / 4, rel=0.15)


@pytest.mark.parametrize("update_freq", [2, 10])
@pytest.mark.parametrize("n", [2, 6, 16])
def test_white_noise_is_not_significant_where_some_steps_are_left_out(n, update_freq):
    """The eigenvalues, the trace and the edge are of the same samples, whichever steps those came from."""
    torch.manual_seed(0)
    options = {"min_rank": 0, "projection_rank": 16, "max_rank": 32, "cov_momentum": 0.97, "update_freq": update_freq}
    engine, share, ranks = NoiseFilter(config(**options), share=sample_share(n)), sample_share(n), []
    for step in range(60):
        learns = int((step + 20) * share) > int((step + 19) * share)
        samples = torch.randn(n, 8, 1, 4000) if learns else None
        engine.step(samples, torch.randn(8, 1, 4000))
        if engine.cov is not None:
            ranks.append(engine.rank.float().mean().item())
            assert (engine.cov.values.sum(1) <= engine.cov.trace * 1.001).all() or not engine.cov.solved
    assert sum(ranks) / len(ranks) < 0.2, ranks


def test_a_bfloat16_basis_costs_half_the_memory_and_little_accuracy():
    """Directions rounded to 8 bits: what is left in them of a gradient is of the size of the rounding."""
    torch.manual_seed(0)
    options = {"strategy": "noise", "trust_radius": 1e9, "update_freq": 5, "min_rank": 4, "cov_momentum": 0.97}
    fine, rough = (
        NoiseFilter(config(basis_dtype=dtype, **options), recent=False) for dtype in ("float32", "bfloat16")
    )
    planted = torch.linalg.qr(torch.randn(2000, 4)).Q
    for _ in range(60):
        samples = torch.randn(4, 1, 1, 4) @ planted.T * 30 + torch.randn(4, 1, 1, 2000)
        grad = samples.mean(0)
        expected, got = fine.step(samples, grad), rough.step(samples, grad)
    assert rough.cov.stack.nbytes == fine.cov.stack.nbytes / 2 and got.dtype == torch.float32
    assert (got - expected).norm() < 0.01 * grad.norm()
    basis = rough.cov.basis[0, :4].float()
    assert (basis @ basis.T - torch.eye(4)).abs().max() < 2e-3
    assert (got[0] @ basis.T).norm() < 0.01 * (grad[0] @ basis.T).norm()
    shares = [figures([engine])["variance_reduction"] for engine in (fine, rough)]
    assert shares[1] == pytest.approx(shares[0], abs=2e-3)


def test_a_mixture_of_a_matrix_s_rows_is_unbiased():
    """Factored, many vectors a sample: fewer random combinations of them are kept, with the same covariance."""
    torch.manual_seed(0)
    grad = torch.randn(16, 5, dtype=torch.float64)
    mixed = [mixture(3, 16, seed) @ grad for seed in range(4000)]
    mean = sum(part.T @ part for part in mixed) / len(mixed)
    assert torch.allclose(mean, grad.T @ grad, atol=0.05 * torch.linalg.matrix_norm(grad.T @ grad, 2).item())
    engine = NoiseFilter(config(update_freq=10, max_rank=32), recent=False)
    noisy(engine, 10, 4, lambda n: torch.randn(n, 1, 16, 40))
    # 8 of 16 rows a sample fill the 32 of the buffer; after two steps of 24 independent ones sums take over
    assert engine.cov.rows_a_sample(4, 16) == 8 and engine.cov.mixtures.tolist() == [48] and engine.cov.solved == 10


MANY_ROWS = {"projection_rank": 8, "max_rank": 10, "update_freq": 5, "cov_momentum": 0.97, "basis_dtype": "bfloat16"}


def test_many_weak_directions_are_found_together():
    """20 of 100 directions with three times the variance of the others: each alone is lost in the scatter."""
    torch.manual_seed(0)
    options = MANY_ROWS | {"projection_rank": 24, "max_rank": 30}
    engine = NoiseFilter(config(strategy="noise", min_rank=0, trust_radius=1e9, **options), recent=False)
    scale = torch.ones(100)
    scale[:20] = math.sqrt(3)
    make = lambda n: (torch.randn(n, 8, 1, 1) / 2).exp() * torch.randn(n, 8, 8, 100) * scale
    noisy(engine, 31, 4, make)
    engine.sums.reset()
    noisy(engine, 29, 4, make)
    assert engine.rank.double().mean() > 12
    assert figures([engine])["variance_reduction"] > 0.25  # of 60 / 140 at most


@pytest.mark.parametrize(
    "options, n, spread",
    [({}, 4, 0), ({}, 4, 1), ({}, 8, 2), ({"update_freq": 1}, 2, 0), ({"cov_momentum": 0}, 2, 0), ({}, 32, 1)],
)
def test_white_noise_of_many_rows_is_not_significant(options, n, spread):
    """Of one micro-batch in effect, or of such that differ much in size, no direction counts."""
    torch.manual_seed(0)
    engine = NoiseFilter(config(min_rank=0, **MANY_ROWS | options))
    make = lambda n: torch.randn(n, 50, 8, 200) * (spread * torch.randn(n, 50, 1, 1)).exp()
    assert noisy(engine, 40, n, make) < 0.3


def test_first_steps_without_a_gradient_end_no_direction():
    """`lora_A` has none while B is 0, as it is in the first steps of a warm-up; one block never has."""
    torch.manual_seed(0)
    planted = torch.linalg.qr(torch.randn(200, 3)).Q
    engine = NoiseFilter(config(strategy="noise", min_rank=0, trust_radius=1e9, **MANY_ROWS))
    there = torch.ones(50, 1, 1)
    there[7] = 0
    noisy(engine, 3, 16, lambda n: torch.zeros(n, 50, 8, 200))
    noisy(engine, 60, 16, lambda n: there * (torch.randn(n, 50, 8, 3) @ planted.T * 3 + torch.randn(n, 50, 8, 200)))
    ranks = engine.rank.tolist()
    assert ranks.pop(7) == 0 and min(ranks) >= 3


def test_a_saved_state_does_not_change_with_later_steps():
    torch.manual_seed(0)
    engine = NoiseFilter(config(**MANY_ROWS))
    make = lambda n: torch.randn(n, 50, 8, 200)
    noisy(engine, 12, 4, make)
    kept = engine.state_dict()
    before = copy.deepcopy(kept)
    noisy(engine, 3, 4, make)
    for name, value in before["cov"].items():
        if torch.is_tensor(value):
            assert torch.equal(kept["cov"][name], value), name


def test_the_trainers_default_finds_planted_directions_within_adamws_state():
    """Factored: 8 rows a sample that vary in 3 of 200 directions; state of at most 2 floats for each of 8 · 200."""
    torch.manual_seed(0)
    planted = torch.linalg.qr(torch.randn(200, 3)).Q
    engine = NoiseFilter(config(strategy="noise", min_rank=0, trust_radius=1e9, **MANY_ROWS), recent=False)
    make = lambda n: torch.randn(n, 2, 8, 3) @ planted.T * 3 + 0.3 * torch.randn(n, 2, 8, 200)
    noisy(engine, 31, 4, make)
    engine.sums.reset()
    noisy(engine, 29, 4, make)
    share = 27 / (27 + 0.09 * 200)  # of the noise that is planted
    assert engine.rank.tolist() == [3, 3]
    assert figures([engine])["variance_reduction"] == pytest.approx(share, abs=0.02)
    found = engine.cov.basis[:, :3].float()
    assert (torch.linalg.svdvals(found @ planted) > 0.98).all()
    assert engine.cov.stack.nbytes + engine.gauge.reference.nbytes <= 8 * 2 * 8 * 200


@pytest.mark.parametrize("together", [False, True])
def test_the_trainers_default_finds_nothing_in_white_noise(together):
    """Also where the rows of a sample are the same up to a factor, so that it has one row's evidence."""
    torch.manual_seed(0)
    engine = NoiseFilter(config(strategy="noise", min_rank=0, **MANY_ROWS), recent=False)
    factors = lambda n: torch.nn.functional.normalize(torch.randn(n, 8, 8, 1), dim=2)
    make = lambda n: torch.randn(n, 8, 1, 200) * factors(n) if together else torch.randn(n, 8, 8, 200)
    assert noisy(engine, 60, 4, make) < 0.3 and figures([engine])["variance_reduction"] < 0.01


def test_sums_of_many_rows_resume_bit_for_bit_and_take_steps_of_one_sample(tmp_path):
    torch.manual_seed(0)
    whole, first, second = (NoiseFilter(config(min_rank=0, **MANY_ROWS)) for _ in range(3))
    for step in range(26):
        samples = torch.randn(1 if step in (14, 15) else 4, 2, 8, 60) * torch.logspace(1, -1, 60)
        if step == 13:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        expected = whole.step(samples, samples.mean(0))
        assert torch.equal(expected, (first if step < 13 else second).step(samples, samples.mean(0)))
    assert whole.rank.min() > 0 and torch.isfinite(whole.cov.basis.float()).all()


@pytest.mark.parametrize("rank, share, later", [(4, 0.8, 20), (0, 0.8, 40), (4, 1.0, 50), (4, 0.2, 5)])
def test_a_steady_filter_learns_from_half_as_many_steps(rank, share, later):
    block = Block("a", [nn.Parameter(torch.zeros(4, 8))])
    noise, learned = NoiseProjection([block], NSPO2Config(projection_rank=rank, update_freq=5), share=share), []
    for _ in range(200):
        learned.append(noise.learns)
        noise.filters[0].step_count += 1
    assert sum(learned[:50]) == pytest.approx(50 * share, abs=1) and sum(learned[100:150]) == later
