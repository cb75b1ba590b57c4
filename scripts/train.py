"""Train a LoRA adapter with DPO and NSPO2 from a recipe; `nspo2_trl/cli/train.py` has the code.

accelerate launch scripts/train.py --config recipes/quickstart/dpo.yaml [--any_field value]
"""

from nspo2_trl.training.trl_range import leave_without_trl

if __name__ == "__main__":
    leave_without_trl()
    from nspo2_trl.cli.train import main

    main()
