"""What scripts/benchmark.py variance measures: against explicit matrices, and on planted noise and signal."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from bench import convergence, judge, tasks, variance, variance_tables


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
    scales = torch.tensor([1.0, 2.0, 0.5])
    draws = torch.randn(4000, 1, 6, 1, 3, generator=generator) * scales + mean
    found = [variance.moments([draw]) for draw in draws]
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
        draw = lambda: torch.randn(count, 1, 200, generator=generator) * scale + mean
        return {id(place.param): draw() for place in groups.places}

    taken = variance.measure(groups, samples(400), samples(2000), "adapter", generator)
    noise, signal = taken["unfiltered"]
    assert noise == pytest.approx(2 * (4 * 400 + 196), rel=0.05) and signal == pytest.approx(36, rel=0.3)
    shares = {name: (a / noise, b / signal) for name, (a, b) in taken.items()}
    assert shares["noise-4"] == pytest.approx((1600 / 1796, 0.5), abs=0.12)
    assert shares["keep-4"][0] > 0.6 and shares["keep-4"][1] < shares["noise-4"][1]
    assert shares["random-4"][0] < 0.1 and abs(shares["random-4"][1]) < 0.1


@pytest.fixture(scope="module")
def trainer():
    cell = {"method": "plain", "lr": 1e-3, "seed": 0, "steps": 20}
    return tasks.make_trainer(cell, convergence.QUICKSTART, range(20), stride=tasks.LOOKS)


def test_reference_and_gradients_are_those_of_the_trainer(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    kept = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    for known, own in zip(kept, trainer.compute_ref_log_probs(trainer.model, batch)):
        assert torch.allclose(known, own, rtol=1e-5)
    rows = trainer.train_dataset[:4]
    chosen = list(zip(rows["prompt_ids"], rows["chosen_ids"]))
    assert torch.allclose(judge.log_probs(trainer, chosen, adapted=False), kept[0], rtol=1e-5)
    points = variance.Snapshots(trainer)
    trainer.add_callback(points)
    trainer.train()
    assert list(points.found) == list(variance.POINTS)
    assert all(torch.equal(a, b) for a, b in zip(points.found["end"], points.params))
    assert not any(torch.equal(a, b) for a, b in zip(points.found["middle"], points.found["end"]))
    first, both = (variance.gradients(trainer, rows) for rows in (range(4), range(8)))
    for param in points.params:
        assert both[id(param)].shape == (2, *param.shape) and torch.equal(both[id(param)][0], first[id(param)][0])
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(torch.allclose(first[id(p)][0], p.grad, rtol=1e-4, atol=1e-7) for p in points.params)


def test_scores_are_ratios_of_sums_over_runs():
    both = [{"unfiltered": [100.0 + i, 10.0], "keep-4": [50.0 + i, 1.0]} for i in range(5)]
    found = variance_tables.pooled([{"taken": {"middle adapter": one}} for one in both], "middle", "adapter", "keep-4")
    assert found["variance"][0] == pytest.approx(260 / 510) and found["signal"] == (0.1, (0.1, 0.1))
    assert found["relative"][0] == pytest.approx((250 / 45) / (510 / 50))
    assert found["error"][0] == pytest.approx((250 / 4 + 5) / (510 / 4))
    assert found["variance"][1][0] < 260 / 510 < found["variance"][1][1] and variance_tables.is_known(found["signal"])
    assert not variance_tables.is_known((0.1, (-0.3, 0.3))) and not variance_tables.is_known((0.1, None))
    assert variance_tables.told("signal", {"signal": (0.1, (-0.3, 0.3))}) == "not known"
