"""What scripts/benchmark.py variance measures: against explicit matrices, and on planted noise and signal."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_lean import make

sys.path.insert(0, str(ROOT / "scripts"))
from bench import lean, variance, variance_tables


@pytest.mark.parametrize("shape", [(3, 10, 2, 6), (3, 5, 1, 40)])
def test_directions_are_the_covariances_eigenvectors(shape):
    samples = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1
    found = variance.directions(samples, 4)
    for block, basis in zip(samples.double(), found.double()):
        rows = (block - block.mean(0)).flatten(0, 1)
        values, vectors = torch.linalg.eigh(rows.mT @ rows)
        wanted = vectors[:, -4:] @ vectors[:, -4:].mT
        assert torch.allclose(basis.mT @ basis, wanted, atol=1e-5)
        assert torch.allclose((basis @ rows.mT).square().sum(1), values.flip(0)[:4], rtol=1e-5)
    few = variance.directions(samples[:, :3, :1], 4)  # two samples' worth of directions, the rest are zero
    assert few.shape == (3, 4, shape[-1]) and (few.norm(dim=-1) > 0.5).sum(1).tolist() == [2, 2, 2]


def test_moments_are_unbiased():
    generator, mean = torch.Generator().manual_seed(0), torch.tensor([0.3, 0.0, 0.1])
    found = [
        variance.moments([torch.randn(1, 6, 1, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5]) + mean])
        for _ in range(4000)
    ]
    trace, signal = torch.tensor(found).mean(0).tolist()
    assert trace == pytest.approx(5.25, rel=0.02) and signal == pytest.approx(0.1, abs=0.03)


class Blocks:
    """One stack of blocks that are one tensor each, as `stacked` and `measure` use a NoiseProjection."""

    def __init__(self, blocks, dim):
        self.places = [SimpleNamespace(param=torch.nn.Parameter(torch.zeros(1, dim))) for _ in range(blocks)]
        self.stacks, self.dim = [self], dim

    def buffer(self, samples):
        return torch.zeros(samples, len(self.places), 1, self.dim)

    def views_of(self, sample):
        return list(sample.unbind(0))


def test_planted_noise_and_signal(monkeypatch):
    """Noise in 4 of 200 directions, half of the signal in one of them: what each filter takes away is known."""
    monkeypatch.setitem(variance.RANKS, "adapter", [4])
    generator, groups = torch.Generator().manual_seed(0), Blocks(2, 200)
    scale = torch.ones(200)
    scale[:4] = 20
    mean = torch.zeros(200)
    mean[0] = mean[100] = 3

    def samples(count):
        return {
            id(place.param): (torch.randn(count, 1, 200, generator=generator) * scale + mean)
            for place in groups.places
        }

    taken = variance.measure(groups, samples(400), samples(2000), "adapter", generator)
    noise, signal = taken["unfiltered"]
    assert noise == pytest.approx(2 * (4 * 400 + 196), rel=0.05) and signal == pytest.approx(36, rel=0.3)
    shares = {name: (a / noise, b / signal) for name, (a, b) in taken.items()}
    assert shares["noise-4"] == pytest.approx((1600 / 1796, 0.5), abs=0.12)
    assert shares["keep-4"][0] > 0.6 and shares["keep-4"][1] < shares["noise-4"][1]
    assert shares["random-4"][0] < 0.1 and abs(shares["random-4"][1]) < 0.1


def test_gradients_are_those_of_the_trainer(tmp_path):
    trainer = make(tmp_path, nspo2_enabled=False)
    data = lean.load_data(trainer, range(8), tmp_path)
    points = variance.snapshots(trainer, data)
    assert list(points) == list(variance.POINTS)
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(points["end"], params))
    assert not any(torch.equal(a, b) for a, b in zip(points["middle"], points["end"]))
    rows = list(range(5, 5 + 6 * variance.PAIRS))
    found = variance.gradients(trainer, data, rows)
    for i in range(6):
        batch = trainer.data_collator([trainer.train_dataset[row] for row in rows[i * 4 : (i + 1) * 4]])
        grads = torch.autograd.grad(trainer.compute_loss(trainer.model, batch), params)
        for param, grad in zip(params, grads):
            assert torch.allclose(found[id(param)][i], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


def test_scores_are_ratios_of_sums_over_runs():
    records = [
        {"taken": {"middle adapter": {"unfiltered": [100.0 + i, 10.0], "keep-4": [50.0 + i, 1.0]}}} for i in range(5)
    ]
    found = variance_tables.pooled(records, "middle", "adapter", "keep-4")
    assert found["variance"][0] == pytest.approx(260 / 510) and found["signal"] == (0.1, (0.1, 0.1))
    assert found["relative"][0] == pytest.approx((250 / 45) / (510 / 50))
    assert found["error"][0] == pytest.approx((250 / 4 + 5) / (510 / 4))
    assert found["variance"][1][0] < 260 / 510 < found["variance"][1][1] and variance_tables.is_known(found["signal"])
    assert not variance_tables.is_known((0.1, (-0.3, 0.3))) and not variance_tables.is_known((0.1, None))
    scores = {"variance": (0.5, (0.45, 0.56)), "signal": (0.1, (-0.3, 0.3)), "error": (0.5, (0.4, 0.6))}
    assert variance_tables.told("variance", scores) == "50 % [45, 56]"
    assert variance_tables.told("signal", scores) == "not known"
    assert variance_tables.told("error", scores) == "0.50 [0.40, 0.60]"
