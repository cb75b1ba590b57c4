"""NSPO2DPOTrainer, in the place of TRL's DPOTrainer."""

from __future__ import annotations

import logging
from typing import Any

from datasets import IterableDataset
from trl import DPOConfig, DPOTrainer

from .mixin import NSPO2Mixin
from .options import NSPO2DPOConfig
from .refusals import check_nothing_missing, check_preferences, checked_stream, lost_rows

logger = logging.getLogger(__name__)


class NSPO2DPOTrainer(NSPO2Mixin, DPOTrainer):
    """[`~trl.DPOTrainer`] with NSPO2: the same arguments, `args` being a [`NSPO2DPOConfig`] (built when left out).

    A plain `DPOConfig` cannot say how to filter, so it is refused.
    """

    args: NSPO2DPOConfig
    _nspo2_config_class = NSPO2DPOConfig
    _tag_names = ["trl", "dpo", "nspo2"]

    def _nspo2_check(self, given: dict) -> None:
        dataset = given.get("train_dataset")
        if isinstance(dataset, IterableDataset):
            given["train_dataset"] = checked_stream(dataset)
        elif dataset is not None:
            check_preferences(dataset)
            check_nothing_missing(dataset)
        super()._nspo2_check(given)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        kept = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        name = {"train": "training", "eval": "evaluation"}.get(dataset_name, dataset_name)
        words = lost_rows(name, dataset, kept, args.max_length)
        if words and args.process_index == 0:
            logger.warning(words)
        return kept
