"""Run by test_distributed.py: one training run, its adapters and losses saved by the main process.

torchrun --nproc_per_node 2 tests/two_processes.py OUT '{"option": value}' [RESUME_FROM]
"""

import json
import os
import sys

import torch
from conftest import ARGS, FAST_NSPO2, LORA, MODEL, ROOT, losses, trainable
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from nspo2_trl import NSPO2DPOConfig, NSPO2DPOTrainer


def main(out: str, options: str, resume: str | None = None) -> None:
    args = {"output_dir": out} | ARGS | {"train_sampling_strategy": "sequential"} | json.loads(options)
    processes, nan_rank = args.pop("processes"), args.pop("nan_rank", None)
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

    data = load_dataset(str(ROOT / "recipes/quickstart/data"), split="train[:64]")
    data = data.select_columns(["prompt", "chosen", "rejected"])
    trainer = Run(MODEL, args=config_class(**args), train_dataset=data, peft_config=LoraConfig(**LORA))
    assert trainer.accelerator.num_processes == processes, trainer.accelerator.num_processes
    trainer.train(resume_from_checkpoint=resume)
    skipped = trainer.nspo2.skipped_steps if getattr(trainer, "nspo2", None) else 0
    mine = torch.cat([p.flatten() for p in trainable(trainer).values()])
    everyone = trainer.accelerator.gather(mine[None])
    assert all(torch.equal(row, mine) for row in everyone), "the ranks hold different adapters"
    if trainer.accelerator.is_main_process:
        torch.save({"params": trainable(trainer), "losses": losses(trainer), "skipped": skipped}, f"{out}/result.pt")
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # two gloo processes were seen to hang on a regular exit, with plain TRL too


if __name__ == "__main__":
    main(*sys.argv[1:])
