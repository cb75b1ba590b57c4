"""DDP and FSDP2 on this machine's CPU. Every launch has a time limit: such runs were seen to hang at exit."""

import json
from pathlib import Path

import pytest
import torch
import two_processes
from conftest import torchrun


def run(out: Path, processes: int, resume: Path | None = None, **options) -> dict:
    """What training ended with: here for one process, else in a fresh launch."""
    out.mkdir(exist_ok=True)
    options, resume = options | {"processes": processes}, resume and str(resume)
    if processes == 1 and "deepspeed" not in options:
        return two_processes.train(str(out), resume, **options)
    argv = [json.dumps(options), *([resume] * bool(resume))]
    # the first time DeepSpeed compiles something
    timeout = 240 if "deepspeed" in options else 120
    return torchrun("two_processes.py", processes, out, *argv, timeout=timeout)


def difference(first: dict, second: dict) -> float:
    """Of the adapters, relative to their norm."""
    a, b = (torch.cat([p.flatten() for p in result["params"].values()]) for result in (first, second))
    return float((a - b).norm() / b.norm())


def assert_identical(first: dict, second: dict) -> None:
    assert first["losses"] == second["losses"]
    assert all(torch.equal(p, second["params"][name]) for name, p in first["params"].items())


# Ten steps on the same four micro-batches a step, wherever they run. Wide adapters, so that traffic can be compared.
# In float32, since the last bits differ, and what is rounded to bfloat16 then differs more.
SAME = {"max_steps": 10, "lora": {"r": 16}, "nspo2_covariance": "adapter", "nspo2_basis_dtype": "float32"}
SAVES = {"save_strategy": "steps", "save_steps": 5}
LAUNCHES = {
    "one": (1, {"gradient_accumulation_steps": 4}),
    "ddp": (2, {"gradient_accumulation_steps": 2}),
    "fsdp": (2, {"gradient_accumulation_steps": 2, "fsdp": True}),
    "plain": (1, {"gradient_accumulation_steps": 4, "plain": True}),
    "four": (4, {"gradient_accumulation_steps": 1}),
} | {
    f"zero{stage}": (2, {"gradient_accumulation_steps": 2, "deepspeed": {"zero_optimization": {"stage": stage}}})
    for stage in range(4)
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(name, **options)`: that launch's result, run once for each set of options."""
    base, results = tmp_path_factory.mktemp("launches"), {}

    def start(name: str, **options) -> dict:
        key = name + json.dumps(options, sort_keys=True)
        if key not in results:
            processes, own = LAUNCHES[name]
            asked = SAME | own | options
            if "plain" in own:
                asked = {name: value for name, value in asked.items() if not name.startswith("nspo2_")}
            results[key] = run(base / str(len(results)), processes, **asked)
            results[key]["out"] = base / str(len(results) - 1)
        return results[key]

    return start


SLOW = [
    pytest.param({"optim": "sgd", "learning_rate": 0.5}, marks=pytest.mark.slow),
    pytest.param({"nspo2_apply_to": "update"}, marks=pytest.mark.slow),
    pytest.param({"nspo2_eigensolver": "randomized", "nspo2_basis_dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param({"max_grad_norm": 0.02}, marks=pytest.mark.slow),
    pytest.param({"lora": {"r": 3}}, marks=pytest.mark.slow),  # shards of different sizes
]


@pytest.mark.parametrize("options", [{}, {"nspo2_covariance": "factored"}, *SLOW])
@pytest.mark.parametrize("name", ["ddp", "fsdp", pytest.param("four", marks=pytest.mark.slow)])
def test_the_same_micro_batches_end_with_the_same_adapters(launch, name, options):
    """The script checks besides that all ranks hold the same adapters bit for bit."""
    one, spread = launch("one", **options), launch(name, **options)
    # a basis rounded to bfloat16 is another one where a last bit differs
    assert difference(spread, one) < (1e-4 if "nspo2_basis_dtype" in options else 1e-6)
    assert difference(launch("plain", **options), one) > 1e-4
    assert spread["figures"]["nspo2/variance_reduction"] == pytest.approx(
        one["figures"]["nspo2/variance_reduction"], rel=1e-2 if "nspo2_basis_dtype" in options else 1e-4
    )


def test_traffic_of_ddp_is_below_an_all_reduce_of_the_gradients(launch):
    """What the docstring of `SampleCollector` says, by counting entries sent in 10 steps."""
    result = launch("ddp")
    sent, entries, steps = result["sent"], result["entries"], 10
    learned, projected = int(steps * result["share"]), round(result["active"] * steps)
    assert result["share"] == 0.8 and projected >= 7
    assert sent["all_to_all_single"] == learned * entries / 2  # two samples: one difference travels
    k, tracked, n, solves = 4, 8, 4, steps / 2
    rows = 2 * n + tracked
    small = steps * ((n + 3) * (k + 1) + 3) + solves * (rows * (rows - tracked) + tracked**2)
    assert 0 < sent["all_reduce"] <= result["blocks"] * small + 4 * steps
    eigenvectors = sent.get("all_gather_single", sent.get("all_gather_into_tensor")) - projected * entries / 2
    assert 0 < eigenvectors <= (result["blocks"] + 3) / 2 * solves * rows * (rows + 1)
    assert sum(sent.values()) < 2 / 2 * entries * steps


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run whose second process got SIGKILL after step 7."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(AssertionError):
        run(folder, 2, kill_after=7, **SAME | SAVES | LAUNCHES["ddp"][1])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-5"]
    return folder / "checkpoint-5"


def test_killed_between_checkpoints_resumes_to_the_same_end(launch, killed, tmp_path):
    assert_identical(run(tmp_path, 2, resume=killed, **SAME | LAUNCHES["ddp"][1]), launch("ddp"))


def test_one_rank_that_cannot_write_leaves_no_checkpoint(tmp_path):
    own = SAME | SAVES | LAUNCHES["ddp"][1] | {"max_steps": 2, "save_steps": 1, "full_disk_on": 1}
    errors = run(tmp_path, 2, **own)["errors"]
    assert "another process could not write its part" in errors[0] and "No space left" in errors[1]
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
def test_fsdp_resumes_to_the_same_end(launch, tmp_path):
    whole = launch("fsdp", **SAVES)
    own = SAME | LAUNCHES["fsdp"][1]
    assert_identical(run(tmp_path / "out", 2, resume=whole["out"] / "checkpoint-5", **own), whole)


def test_resumes_on_one_process(launch, killed, tmp_path):
    assert difference(run(tmp_path, 1, resume=killed, **SAME | LAUNCHES["one"][1]), launch("one")) < 1e-6


@pytest.mark.slow
def test_resumes_on_more_processes(launch, tmp_path):
    saved = launch("one", **SAVES)["out"] / "checkpoint-5"
    assert difference(run(tmp_path, 2, resume=saved, **SAME | LAUNCHES["ddp"][1]), launch("one")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_rank_zero_equals_dpo_trainer_under_the_same_launch(tmp_path, name):
    own = LAUNCHES[name][1]
    ours = run(tmp_path / "ours", 2, **(own | {"nspo2_projection_rank": 0}))
    assert_identical(ours, run(tmp_path / "plain", 2, **(own | {"plain": True})))


def test_nan_on_one_rank_skips_the_step_on_both(killed, tmp_path):
    """And one that cannot read the state lets all start anew; else they would wait for each other forever."""
    trouble = {"nan_rank": 1, "unreadable_on": 1}
    result = run(tmp_path, 2, resume=killed, **SAME | LAUNCHES["ddp"][1] | trouble)
    log = (tmp_path / "log").read_text()
    assert "another process could not read it" in log and "the noise estimate starts anew" in log
    assert result["skipped"] == 1 and all(torch.isfinite(p).all() for p in result["params"].values())


@pytest.mark.slow
def test_nan_on_one_rank_skips_the_step_on_both_under_fsdp(tmp_path):
    result = run(tmp_path, 2, **LAUNCHES["fsdp"][1], nan_rank=1)
    assert result["skipped"] == 1 and all(torch.isfinite(p).all() for p in result["params"].values())


@pytest.mark.slow
def test_single_parameters_under_fsdp_are_refused(tmp_path):
    """PEFT reads such adapters without calling them, so that nothing tells when FSDP2 has made them whole."""
    lora = {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]}
    with pytest.raises(AssertionError):
        run(tmp_path / "out", 2, lora=lora, **LAUNCHES["fsdp"][1])
    assert "use `target_modules` instead of `target_parameters`" in (tmp_path / "out/log").read_text()


@pytest.mark.slow
def test_one_micro_batch_on_each_of_two_ranks(tmp_path):
    """Nothing has to travel to know the other's sample: it follows from the gradient."""
    one = run(tmp_path / "one", 1, **(SAME | {"gradient_accumulation_steps": 2}))
    two = run(tmp_path / "two", 2, **(SAME | {"gradient_accumulation_steps": 1}))
    assert difference(two, one) < 1e-6 and "all_to_all_single" not in two["sent"]
