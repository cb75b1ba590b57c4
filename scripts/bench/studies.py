"""The studies: under which conditions the methods are compared, each with its own choice of rates."""

from __future__ import annotations

from .methods import IDEAS, METHODS

KEPT, EPOCHS = ["retain", "replay"], ["balanced-order", "frozen-batches"]  # what is kept; what needs several epochs
WEIGHED = ["agreement", "agreement-pooled"]
CORE = ["plain", "keep", "noise", "hybrid", "keep-factored"]  # plain AdamW and ours
# `also` are rates that every method is reported at, `first` is the first reported seed; `options` are the trainer's,
# `pairs` is how many of the training pairs are used, `label_noise` the share of them whose answers change places (the
# same ones in every run).
STUDIES: dict[str, dict] = {
    "convergence": {
        "words": "Less than one pass over the data, 16 pairs a step, linear schedule.",
        "methods": [name for name in METHODS if name not in IDEAS],
    },
    "ideas": {
        "words": "As `convergence`, for changes of the filter.",
        "methods": ["plain", "keep", *(name for name in IDEAS if name not in KEPT + EPOCHS)],
    },
    "batch-4": {
        "words": "4 pairs a step, as 4 micro-batches of one; twice as many steps.",
        "methods": CORE,
        "longer": 2,
        "options": {"per_device_train_batch_size": 1},
    },
    "batch-1": {
        "words": "One pair a step, so that the noise is estimated from successive differences; four times as many "
        "steps.",
        "methods": CORE,
        "longer": 4,
        "options": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
    },
    "small-data": {
        "words": "400 pairs, seen again and again: 6 epochs in 150 steps. The choosing seeds hardly tell the rates "
        "apart here, so each method is shown at two of them besides.",
        "methods": CORE + EPOCHS,
        "longer": 1.5,
        "also": [8e-3, 16e-3],
        "pairs": 400,
    },
    "constant-rate": {
        "words": "A constant learning rate after the warm-up, so that the noise does not die away at the end.",
        "methods": CORE,
        "options": {"lr_scheduler_type": "constant_with_warmup"},
    },
    "constant-again": {
        "words": "As `constant-rate` with seeds that no other study has, for `noise`, which came nearest to a gain "
        "there.",
        "methods": ["plain", "noise"],
        "first": 10,
        "options": {"lr_scheduler_type": "constant_with_warmup"},
    },
    "labels-20": {
        "words": "20 % of the training labels turned round, besides those that are wrong anyway.",
        "methods": CORE + WEIGHED,
        "label_noise": 0.2,
    },
    "labels-30": {
        "words": "30 % of the training labels turned round, besides those that are wrong anyway.",
        "methods": CORE + WEIGHED,
        "label_noise": 0.3,
    },
    **{
        f"kept-{beta}": {
            "words": f"What is kept, with beta {beta}; a larger beta is what a user would try first.",
            "methods": ["plain", "keep", "noise", "hybrid", *KEPT],
            "also": [4e-3],
            "options": {"beta": beta},
        }
        for beta in (0.1, 0.2, 0.4)
    },
    "kept-again": {
        "words": "As `kept-0.1` with seeds that no other study has, for the gold score, which looked better with the "
        "filters there.",
        "methods": ["plain", "keep", "noise", "hybrid"],
        "first": 10,
    },
    "kept-batch-1": {
        "words": "As `batch-1` with seeds that no other study has, for the KL, which looked lower with the filters "
        "there.",
        "methods": ["plain", "keep", "noise", "hybrid"],
        "first": 10,
        "longer": 4,
        "options": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
    },
    "long": {
        "words": "Three times as many steps.",
        "methods": ["plain", "keep", "noise"],
        "longer": 3,
    },
}
IN_A_CELL = ("options", "pairs", "label_noise")


def of_a_cell(study: str) -> dict:
    """What a cell of a study has beside the figures that all cells have."""
    return {name: STUDIES[study][name] for name in IN_A_CELL if name in STUDIES[study]}
