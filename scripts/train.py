"""Train a LoRA adapter with DPO and NSPO2 from a recipe; `nspo2_trl/cli/train.py` has the code.

accelerate launch scripts/train.py --config recipes/quickstart/dpo.yaml [--any_field value]
"""

import sys

from nspo2_trl.training.trl_range import refuse_trl

if __name__ == "__main__":
    try:
        refuse_trl()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from nspo2_trl.cli.train import main

    main()
