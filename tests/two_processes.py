"""One training run for test_distributed.py; where it is launched the main process saves its adapters and losses.

torchrun --nproc_per_node 2 tests/two_processes.py OUT '{"option": value}' [RESUME_FROM]
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import ARGS, FAST_NSPO2, LORA, MODEL, ROOT, configure, losses
from datasets import load_dataset
from peft import LoraConfig
from retained import adapted, sentences
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from nspo2_trl import NSPO2DPOConfig, NSPO2DPOTrainer

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
# "deepspeed": {"zero_optimization": {"stage": 2}} among the options is put on top of this
DEEPSPEED = {
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
}


def count_traffic(counts: dict) -> None:
    """Count the entries that this rank sends through torch.distributed from now on, by kind."""

    def wrap(name, sent):
        inner = getattr(dist, name)

        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + sent(*args)
            return inner(*args, **kwargs)

        setattr(dist, name, counted)

    ranks = dist.get_world_size()
    share = (ranks - 1) / ranks
    wrap("all_reduce", lambda tensor, *_: 2 * share * tensor.numel())  # as a ring does it
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    wrap(gather, lambda out, part, *_: (ranks - 1) * part.numel())
    wrap("all_to_all_single", lambda out, part, *_: share * part.numel())


def unreadable(state: dict) -> None:
    raise OSError("a disk of this rank's own")


def full_disk(self, output_dir: str) -> None:
    raise OSError(28, "No space left on device")


class Kill(TrainerCallback):
    """SIGKILL for the last rank, after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def whole(param: torch.Tensor) -> torch.Tensor:
    if hasattr(param, "ds_id") or hasattr(param, "_hp_mapping"):  # ZeRO-3, or ZeRO-1 and 2
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(param).clone()
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def errors_of_all(train: Callable[[], object]) -> list[str]:
    """What every rank's training stopped with; the launcher would kill the others as soon as one ends."""
    mine = "none"
    try:
        train()
    except Exception as error:
        mine = str(error)
    errors = [""] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    return errors


def train(out: str, resume: str | None = None, **options) -> dict:
    """Train in this process, or in this rank of a launch."""
    args = {"output_dir": out} | ARGS | {"train_sampling_strategy": "sequential"} | options
    processes, nan_rank, kill_after = args.pop("processes"), args.pop("nan_rank", None), args.pop("kill_after", None)
    unreadable_on, full_disk_on = args.pop("unreadable_on", None), args.pop("full_disk_on", None)
    fsdp, lora = args.pop("fsdp", False), LORA | args.pop("lora", {})
    trained_before, extra = args.pop("trained_before", False), {}
    if args.pop("retain", False):
        extra["retain_dataset"] = sentences()
    if fsdp:
        os.environ.update(FSDP2)
    trainer_class, config_class = NSPO2DPOTrainer, NSPO2DPOConfig
    if args.pop("plain", False):
        trainer_class, config_class = DPOTrainer, DPOConfig
    else:
        args = FAST_NSPO2 | args

    class Run(trainer_class):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            loss = super().compute_loss(*args, **kwargs)
            bad = self.args.process_index == nan_rank and self.calls == 9
            return loss * float("nan") if bad else loss

    if "deepspeed" in args:
        import deepspeed

        args["deepspeed"] = DEEPSPEED | args["deepspeed"]
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)  # ZeRO-3 makes the model before the trainer does
    data = load_dataset(str(ROOT / "recipes/quickstart/data"), split="train[:64]")
    data = data.select_columns(["prompt", "chosen", "rejected"])
    config = configure(config_class, **args)
    if fsdp:  # Accelerate shards on accelerators only, so a CPU has to pass for one
        config.device  # noqa: B018 (makes the state)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if trained_before:
        model = adapted(**lora)
    else:
        model, extra["peft_config"] = MODEL, LoraConfig(**lora)
    trainer = Run(model, args=config, train_dataset=data, **extra)
    assert trainer.accelerator.num_processes == processes, trainer.accelerator.num_processes
    assert trainer.is_fsdp_enabled == fsdp
    if unreadable_on == config.process_index:
        trainer.nspo2.load_state_dict = unreadable
    if full_disk_on == config.process_index:
        Trainer._save_rng_state = full_disk
    if kill_after:
        trainer.add_callback(Kill(kill_after))
    sent = {}
    if processes > 1 and "deepspeed" not in args:
        count_traffic(sent)
    if full_disk_on is not None:
        return {"errors": errors_of_all(trainer.train)}
    trainer.train(resume_from_checkpoint=resume)
    sent = dict(sent)
    if trainer_class is NSPO2DPOTrainer and trainer.nspo2_retained is not None:
        trainer.save_model()
    skipped = trainer.nspo2.skipped_steps if getattr(trainer, "nspo2", None) else 0
    params = {name: whole(p).detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    mine = torch.cat([p.flatten() for p in params.values()])
    everyone = trainer.accelerator.gather(mine[None])
    assert all(torch.equal(row, mine) for row in everyone), "the ranks hold different adapters"
    result = {"params": params, "losses": losses(trainer), "skipped": skipped, "sent": sent, "entries": len(mine)}
    result["norms"] = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    if getattr(trainer, "nspo2", None):
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        result |= {"share": trainer.nspo2.share, "blocks": sum(len(group.names) for group in trainer.nspo2.stacks)}
        result |= {"figures": logged[-1], "active": sum(e.get("nspo2/active", 0) for e in logged) / len(logged)}
    return result


def main(out: str, options: str, resume: str | None = None) -> NoReturn:
    """Save the main process's result and end all processes."""
    result = train(out, resume, **json.loads(options))
    if PartialState().is_main_process:
        torch.save(result, f"{out}/result.pt")
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # two gloo processes were seen to hang on a regular exit, with plain TRL too


if __name__ == "__main__":
    main(*sys.argv[1:])
