"""DDP and FSDP2 on this machine's CPU. Every launch has a time limit: such runs were seen to hang at exit."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import launch_and_log

SCRIPT = str(Path(__file__).parent / "two_processes.py")


def run(out: Path, processes: int, resume: Path | None = None, **options) -> dict:
    """Train in a fresh launch and return what it saved."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, SCRIPT]
    if processes > 1 or "deepspeed" in options:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [*launcher, "--master_port", str(port), SCRIPT]
    command += [str(out), json.dumps(options | {"processes": processes}), *([str(resume)] if resume else [])]
    # the first time DeepSpeed compiles something
    output = launch_and_log(command, out / "log", timeout=240 if "deepspeed" in options else 120)
    assert (out / "result.pt").is_file(), output[-4000:]
    return torch.load(out / "result.pt", weights_only=True)


def difference(first: dict, second: dict) -> float:
    """Of the adapters, relative to their norm."""
    a, b = (torch.cat([p.flatten() for p in result["params"].values()]) for result in (first, second))
    return float((a - b).norm() / b.norm())


def assert_identical(first: dict, second: dict) -> None:
    assert first["losses"] == second["losses"]
    assert all(torch.equal(p, second["params"][name]) for name, p in first["params"].items())


# Ten steps on the same four micro-batches a step, wherever they run. Wide adapters, so that traffic can be compared.
SAME = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "lora": {"r": 16}}
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
            results[key] = run(base / str(len(results)), processes, **(SAME | own | options))
            results[key]["out"] = base / str(len(results) - 1)
        return results[key]

    return start


SLOW = [
    pytest.param({"optim": "sgd", "learning_rate": 0.5}, marks=pytest.mark.slow),
    pytest.param({"nspo2_covariance": "factored"}, marks=pytest.mark.slow),
    pytest.param({"nspo2_apply_to": "update"}, marks=pytest.mark.slow),
    pytest.param({"nspo2_eigensolver": "randomized", "nspo2_basis_dtype": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param({"max_grad_norm": 0.02}, marks=pytest.mark.slow),
    pytest.param({"lora": {"r": 3}}, marks=pytest.mark.slow),  # shards of different sizes
]


@pytest.mark.parametrize("options", [{}, *SLOW])
@pytest.mark.parametrize("name", ["ddp", "fsdp", pytest.param("four", marks=pytest.mark.slow)])
def test_the_same_micro_batches_end_with_the_same_adapters(launch, name, options):
    """Invariant 3; the script checks besides that all ranks hold the same adapters to the bit."""
    one, spread = launch("one", **options), launch(name, **options)
    # a basis rounded to bfloat16 is another one where a last bit differs
    assert difference(spread, one) < (1e-4 if "nspo2_basis_dtype" in options else 1e-6)
    assert difference(launch("plain", **{k: v for k, v in options.items() if "nspo2" not in k}), one) > 1e-4
    assert spread["figures"]["nspo2/variance_reduction"] == pytest.approx(
        one["figures"]["nspo2/variance_reduction"], rel=1e-2 if "nspo2_basis_dtype" in options else 1e-4
    )


def test_traffic_of_ddp_is_below_an_all_reduce_of_the_gradients(launch):
    """What the docstring of `SampleCollector` says, by counting entries sent in 10 steps."""
    result = launch("ddp", save_strategy="no")  # checkpoints gather the state of all ranks
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


def test_killed_between_checkpoints_resumes_to_the_same_end(launch, tmp_path):
    """SIGKILL for one of two processes after step 7; the next launch goes on from the checkpoint of step 5."""
    own = SAME | LAUNCHES["ddp"][1]
    with pytest.raises(AssertionError):
        run(tmp_path / "run", 2, kill_after=7, **own)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-5"]
    assert_identical(run(tmp_path / "run", 2, resume=tmp_path / "run/checkpoint-5", **own), launch("ddp"))


def test_one_rank_that_cannot_write_leaves_no_checkpoint(tmp_path):
    own = SAME | LAUNCHES["ddp"][1] | {"max_steps": 2, "save_steps": 1, "full_disk_on": 1}
    errors = run(tmp_path, 2, **own)["errors"]
    assert "another process could not write its part" in errors[0] and "No space left" in errors[1]
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
def test_fsdp_resumes_to_the_same_end(launch, tmp_path):
    whole = launch("fsdp")
    own = SAME | LAUNCHES["fsdp"][1]
    assert_identical(run(tmp_path / "out", 2, resume=whole["out"] / "checkpoint-5", **own), whole)


@pytest.mark.parametrize("saved, resumed", [("ddp", "one"), pytest.param("one", "ddp", marks=pytest.mark.slow)])
def test_resumes_on_another_number_of_processes(launch, tmp_path, saved, resumed):
    processes, own = LAUNCHES[resumed]
    result = run(tmp_path / "out", processes, resume=launch(saved)["out"] / "checkpoint-5", **(SAME | own))
    assert difference(result, launch("one")) < 1e-6


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_nan_on_one_rank_skips_the_step_on_both(tmp_path, name):
    result = run(tmp_path / "nan", 2, **(LAUNCHES[name][1] | {"nan_rank": 1}))
    assert result["skipped"] == 1
    assert all(torch.isfinite(p).all() for p in result["params"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_rank_zero_equals_dpo_trainer_under_the_same_launch(tmp_path, name):
    own = LAUNCHES[name][1]
    ours = run(tmp_path / "ours", 2, **(own | {"nspo2_projection_rank": 0}))
    assert_identical(ours, run(tmp_path / "plain", 2, **(own | {"plain": True})))


def test_one_rank_that_cannot_read_the_state_lets_all_start_anew(launch, tmp_path):
    """Else the ranks would go on from different states, and wait for each other forever."""
    own = SAME | LAUNCHES["ddp"][1]
    result = run(tmp_path / "out", 2, resume=launch("ddp")["out"] / "checkpoint-5", unreadable_on=1, **own)
    log = (tmp_path / "out/log").read_text()
    assert "another process could not read it" in log and "the noise estimate starts anew" in log
    assert all(torch.isfinite(p).all() for p in result["params"].values())


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
