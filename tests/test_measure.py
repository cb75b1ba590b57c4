"""The gauge: it changes nothing, holds little, tells planted figures, and says so where it cannot tell."""

import json
import math

import pytest
import torch
import trl
from conftest import assert_same, done, losses, trainable
from test_scripts import command
from test_trainers import KINDS, make, ours, theirs

from nspo2_trl import NSPO2Config, attach_nspo2, noise_summary
from nspo2_trl.cli import command as cli
from nspo2_trl.cli.measure import measure
from nspo2_trl.engine.filter import NoiseFilter
from nspo2_trl.engine.gauge import read, sums_of
from nspo2_trl.layout.blocks import Block
from nspo2_trl.projections.noise import NoiseProjection
from nspo2_trl.projections.protocol import Step
from nspo2_trl.training.summary import summarize_run


def reading(n, steps=400, signal=2.0, **options):
    """Of 3 blocks with 40 entries: signal in the first alone, noise 4 times as strong in the second."""
    torch.manual_seed(0)
    mean, scale = torch.zeros(3, 1, 40), torch.tensor([1.0, 2.0, 1.0]).view(3, 1, 1) * n**0.5
    mean[0, 0, 0] = signal
    engine = NoiseFilter(NSPO2Config(projection_rank=0, cov_momentum=0.9, **options))
    for _ in range(steps):
        samples = mean + scale * torch.randn(n, 3, 1, 40)
        assert engine.step(samples, samples.mean(0)) is not None
    sums, counts = sums_of([engine.gauge])
    return read(sums.sum(2), counts), [read(sums[:, :, block], counts) for block in range(3)], engine


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16"])
def test_planted_signal_and_noise_of_each_block(n, basis_dtype):
    whole, blocks, engine = reading(n, basis_dtype=basis_dtype)
    assert whole.steps == 400 and whole.noise == pytest.approx(240, rel=0.05)
    assert whole.known and abs(whole.signal - 4) < 3 * whole.signal_error < 2
    assert abs(whole.scale - 60) < 3 * whole.error * whole.scale
    assert [block.noise / whole.noise for block in blocks] == pytest.approx([1 / 6, 2 / 3, 1 / 6], rel=0.1)
    assert blocks[0].known and not blocks[1].known and not blocks[2].known
    assert engine.cov is None and len(engine.gauge.counts) <= 24


def test_too_wide_an_error_is_said_and_how_many_steps_would_do():
    whole, _, _ = reading(4, steps=60, signal=0.2)
    assert not whole.known and whole.wanted > 60
    assert whole.at_least < 240 / 0.04  # the true noise scale is above what is told
    assert reading(4, steps=10)[0] is None


def test_no_signal_is_no_evidence_and_errors_shrink_with_steps():
    assert not reading(4, signal=0.0)[0].known
    short, long = (reading(4, steps=steps)[0].error for steps in (100, 400))
    assert 1.3 < short / long < 3


def test_state_is_one_float_per_parameter_and_resumes(tmp_path):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(8, 256)) for _ in range(4)]
    blocks = [Block(f"model.layers.{i}.q_proj:default", [p]) for i, p in enumerate(params)]
    made = lambda: NoiseProjection(blocks, NSPO2Config(projection_rank=0, basis_dtype="bfloat16"))
    whole, first, second = made(), made(), made()
    for step in range(60):
        samples = [0.1 + torch.randn(4, *stack.grad.shape) for stack in whole.stacks]
        if step == 30:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for noise in (whole, first if step < 30 else second):
            for p in params:
                p.grad = torch.ones_like(p)
            noise.read_grads()
            noise.before_step(Step(samples))
            noise.after_step()
            assert all((p.grad == 1).all() for p in params)
    assert whole.state_bytes <= 4 * sum(p.numel() for p in params)
    found = [summarize_run(noise, 16, "pairs", 60, 0.5) for noise in (whole, second)]
    assert found[0] == found[1] and len(found[0]["modules"]) == 4
    assert found[0]["modules"][0]["name"].startswith("model.layers.")


@pytest.mark.parametrize("kind", ["DPO", *KINDS])
def test_measures_any_trainer_and_leaves_it_as_trl_is(kind, pairs, tmp_path):
    plain = done(make(*theirs(kind), kind, pairs, tmp_path / "plain", max_steps=6))
    trainer = make(*ours(kind), kind, pairs, tmp_path / "ours", nspo2_projection_rank=0, max_steps=6)
    found = measure(trainer)
    assert_same(trainable(trainer), trainable(plain))
    assert losses(trainer) == losses(plain)
    units = {"DPO": "pairs", "Reward": "pairs", "GRPO": "completions"}
    assert found["unit"] == units.get(kind, "examples") and found["step_time"] > 0 and found["steps"] == 6
    assert all("not enough steps to tell" in sentence for sentence in found["sentences"])
    json.dumps(found)


def test_stops_within_the_schedule_of_the_whole_run(make_trainer):
    whole = done(make_trainer(trl.DPOTrainer, max_steps=8))
    trainer = make_trainer(max_steps=8, nspo2_projection_rank=0)
    assert measure(trainer, steps=5)["steps"] == 5
    assert losses(trainer) == losses(whole)[:5]


def test_attached_and_filtering_trainers_have_the_summary_too(make_trainer, trained):
    with pytest.raises(ValueError, match="call `attach_nspo2"):
        noise_summary(make_trainer(trl.DPOTrainer))
    attached = done(attach_nspo2(make_trainer(trl.DPOTrainer, max_steps=20), NSPO2Config(projection_rank=0)))
    made = trained(max_steps=20, nspo2_projection_rank=0)
    filtering = noise_summary(trained(max_steps=20))
    names = [entry["name"] for entry in noise_summary(attached)["modules"]]
    assert len(names) == len(set(names)) == 9 and sorted(names) == sorted(e["name"] for e in filtering["modules"])
    assert noise_summary(made)["modules"] and math.isclose(sum(e["noise"] for e in filtering["modules"]), 1)


def test_the_command_writes_figures_that_the_report_draws(tmp_path, in_the_repository, capsys):
    pytest.importorskip("matplotlib")
    before = command(tmp_path, "--eval_strategy", "steps", steps=20)
    cli.main(["measure", *before, "--steps", "20"])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out/noise.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["noise.json"]
    assert all(sentence in said for sentence in found["sentences"]) and "Shares of signal and noise" in said
    cli.main(["report", str(tmp_path / "out")])
    page = (tmp_path / "out/report.html").read_text()
    assert 'id="noise-parts"' in page and 'id="noise-modules"' in page and "The batch now is" in page


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--steps 0", "whole number of at least 1"),
        ("", "--config RECIPE.yaml"),
    ],
)
def test_what_cannot_be_measured_is_refused(argv, message, in_the_repository):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["measure", *argv.split()])
    assert message in str(stopped.value)
