"""The command `nspo2`: train, measure, retain, report, env."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ..training.trl_range import leave_without_trl
from .words import nearest, with_config

HELP = """usage: nspo2 COMMAND [options]

  nspo2 train RECIPE.yaml            train a LoRA adapter with DPO and NSPO2
  nspo2 measure RECIPE.yaml          which batch pays, and which modules learn; no adapter is saved
  nspo2 retain ADAPTER ...           project an adapter off what texts use that the model should go on knowing
  nspo2 report OUT [OUT2 ...]        one HTML page of plots of one run, or of several runs together
  nspo2 env                          versions, devices, what is supported here; paste it into a bug report

`nspo2 COMMAND --help` says more, `nspo2 --version` which version this is."""


def main(argv: list[str] | None = None) -> None:
    try:
        run(argv)
    except KeyboardInterrupt:  # during the imports, which take seconds
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)


def run(argv: list[str] | None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(HELP)
    elif command == "--version":
        print(version("nspo2_trl"))
    elif command in COMMANDS:
        if command in NEED_TRL:
            leave_without_trl()
        run_here = COMMANDS[command] or import_module(f".{command}", __package__).main
        run_here(rest)
    else:
        sys.exit(f"error: there is no command `nspo2 {command}`.{nearest(command, list(COMMANDS))}\n\n{HELP}")


# ---- nspo2 train ----


def train(argv: list[str]) -> None:
    """`scripts/train.py`, in this process, or in several if a launch option or more than one GPU asks for them."""
    import torch

    parser = argparse.ArgumentParser(prog="nspo2 train", add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--accelerate_config")
    parser.error = lambda message: sys.exit(f"error: {message}")  # type: ignore[method-assign]
    launch, argv = parser.parse_known_args(argv)
    argv = with_config(argv)
    gpus = torch.cuda.device_count()  # with several in sight one process would spread the model's batches over them
    several = max(gpus, launch.num_processes or 1) > 1 or launch.accelerate_config
    if not several or "LOCAL_RANK" in os.environ or {"-h", "--help", "--help_all"} & set(argv):
        from .train import main as train_here

        return train_here(argv, prog="nspo2 train")
    recipe = next((Path(path) for flag, path in zip(argv, argv[1:]) if flag == "--config"), Path())
    says_cpu = "--use_cpu" in argv or (recipe.is_file() and "use_cpu" in recipe.read_text(errors="ignore"))
    if not gpus and not says_cpu and not launch.accelerate_config:
        sys.exit("error: there is no GPU here, and each process would train for itself: add `--use_cpu true`.")
    options = []
    if launch.accelerate_config:
        if not os.path.isfile(launch.accelerate_config):
            sys.exit(f"error: `--accelerate_config`: there is no file {launch.accelerate_config!r}.")
        options += ["--config_file", launch.accelerate_config]
    elif launch.num_processes:  # said in full, or accelerate warns about what it assumes
        options += ["--multi_gpu"] if launch.num_processes > 1 else []
        options += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if launch.num_processes:
        options += ["--num_processes", str(launch.num_processes)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "nspo2_trl.cli.train", *argv]
    environment = dict(os.environ)
    from .endings import in_a_sentence
    from .train import read

    with in_a_sentence():  # here, since the launcher would add its traceback
        read(argv)
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # the launcher in this one's place, so that signals reach it


# ---- nspo2 env ----


def packages() -> list[tuple[str, str, str, bool]]:
    """Name, version here or `-`, range supported, whether the version is in it; of what nspo2_trl needs or uses."""
    from packaging.requirements import Requirement

    rows = []
    for need in map(Requirement, requires("nspo2_trl") or []):
        if need.marker is None or need.marker.evaluate({"extra": "deepspeed"}):
            try:
                found = version(need.name)
            except PackageNotFoundError:
                found = "-"
            rows.append((need.name, found, str(need.specifier), found != "-" and need.specifier.contains(found)))
    return rows


def env(argv: list[str]) -> None:
    words = (
        "Versions and devices of this machine, and which ways of training are supported on it. Nothing is downloaded "
    )
    words += "or changed, no secrets are read. Paste it into a bug report."
    argparse.ArgumentParser(prog="nspo2 env", description=words).parse_args(argv)
    import torch

    print(f"nspo2_trl {version('nspo2_trl')}, Python {platform.python_version()}, {platform.platform()}")
    print("\nPackages")
    for name, found, wanted, fine in packages():
        note = "" if fine else ("  not installed" if found == "-" else "  NOT SUPPORTED")
        print(f"  {name:<14} {found:<14} {wanted}{note}")
    print("\nDevices")
    print(f"  CPU            {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    gpus = torch.cuda.device_count()
    for i in range(gpus):
        gpu = torch.cuda.get_device_properties(i)
        print(f"  GPU {i}          {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}")
    print(f"  CUDA           {torch.version.cuda or 'not in this build of torch'}")
    installed = {name: importlib.util.find_spec(name) is not None for name in ("deepspeed", "bitsandbytes")}
    bf16 = torch.cuda.is_bf16_supported() if gpus else None
    lines = {
        "training": "GPU (NSPO2 has not been tested on GPUs yet)" if gpus else "CPU only: add `--use_cpu true`",
        "bf16": "yes" if bf16 else ("no: add `--bf16 false`" if gpus else "slow on a CPU: add `--bf16 false`"),
        "4-bit (QLoRA)": "yes" if installed["bitsandbytes"] else "no: pip install bitsandbytes",
        "DDP, FSDP2": f"{gpus} GPUs" if gpus > 1 else "one device: only several processes on a CPU, for trying it",
        "DeepSpeed ZeRO": "yes" if installed["deepspeed"] else 'no: pip install -e ".[deepspeed]"',
        "refused": "FSDP1, tensor and context parallelism, MPS, full fine-tuning",
    }
    print("\nSupported here")
    for name, words in lines.items():
        print(f"  {name:<14} {words}")
    print("\nEnvironment")
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "WORLD_SIZE", "ACCELERATE_CONFIG_FILE"):
        print(f"  {name:<22} {os.environ.get(name, '-')}")


# None: the module of that name has its `main`; it is imported when it is asked for, since that may take seconds
COMMANDS = {"train": train, "measure": None, "retain": None, "report": None, "env": env}
NEED_TRL = ("train", "measure", "retain")
