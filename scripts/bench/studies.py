"""The studies: under which conditions the methods are compared, each with its own choice of rates."""

from __future__ import annotations

from .methods import IDEAS, METHODS

EPOCHS, WEIGHED = ["balanced-order", "frozen-batches"], ["agreement", "agreement-pooled"]
CORE = ["plain", "keep", "noise", "hybrid", "keep-factored"]  # plain AdamW and ours
HIGH = [4e-3, 8e-3, 16e-3]
ONE_PAIR = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}
# `rates` are those that the quick start is tried at, `also` those that every method is reported at besides its best,
# `only_rate` the one that replaces them; `seeds` is how many are reported if not 10, `first` the first of them;
# `options` are the trainer's, `pairs` is how many of the training pairs are used, `label_noise` the share of them that
# have their answers change places (the same ones in every run).
STUDIES: dict[str, dict] = {
    "convergence": {
        "words": "Less than one pass over the data, 16 pairs a step, linear schedule.",
        "methods": [name for name in METHODS if name not in IDEAS],
        "rates": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
    },
    "ideas": {
        "words": "As `convergence`, for changes of the filter.",
        "methods": ["plain", "keep", *(name for name in IDEAS if name not in ["retain", "replay", *EPOCHS])],
        "rates": HIGH,
    },
    "batch-4": {
        "words": "4 pairs a step, as 4 micro-batches of one; twice as many steps.",
        "methods": CORE,
        "rates": HIGH,
        "longer": 2,
        "options": {"per_device_train_batch_size": 1},
    },
    "batch-1": {
        "words": "One pair a step, so that the noise is estimated from successive differences; four times as many "
        "steps.",
        "methods": CORE,
        "rates": [2e-3, 4e-3, 8e-3],
        "longer": 4,
        "options": ONE_PAIR,
    },
    "small-data": {
        "words": "400 pairs, seen again and again: 6 epochs in 150 steps. The choosing seeds hardly tell the rates "
        "apart here, so each method is shown at two of them besides.",
        "methods": CORE + EPOCHS,
        "rates": HIGH,
        "also": [8e-3, 16e-3],
        "longer": 1.5,
        "pairs": 400,
    },
    "constant-rate": {
        "words": "A constant learning rate after the warm-up, so that the noise does not die away at the end.",
        "methods": ["plain", "keep", "noise", "hybrid"],
        "rates": HIGH,
        "options": CONSTANT,
    },
    "constant-again": {
        "words": "As `constant-rate` with seeds that no other study has, for `noise`, which came nearest to a gain "
        "there.",
        "methods": ["plain", "noise"],
        "rates": [2e-3, 4e-3, 8e-3],
        "only_rate": 4e-3,
        "first": 10,
        "seeds": 20,
        "options": CONSTANT,
    },
    "labels-20": {
        "words": "20 % of the training labels turned round, besides those that are wrong anyway.",
        "methods": CORE,
        "rates": HIGH,
        "label_noise": 0.2,
    },
    "labels-30": {
        "words": "30 % of the training labels turned round, besides those that are wrong anyway.",
        "methods": CORE + WEIGHED,
        "rates": HIGH,
        "label_noise": 0.3,
    },
    "long": {
        "words": "Three times as many steps.",
        "methods": ["plain", "keep", "noise"],
        "rates": HIGH,
        "longer": 3,
    },
    **{
        f"kept-{beta}": {
            "words": f"What is kept, with beta {beta}; a larger beta is what a user would try first.",
            "methods": methods,
            "rates": HIGH,
            "also": [4e-3],
            "options": {"beta": beta},
        }
        for beta, methods in (
            (0.1, ["plain", "keep", "noise", "hybrid", "retain", "replay"]),
            (0.2, ["plain"]),
            (0.4, ["plain", "keep", "retain", "replay"]),
        )
    },
    "kept-again": {
        "words": "As `kept-0.1` with seeds that no other study has, for the gold score, which looked better with the "
        "filters there.",
        "methods": ["plain", "keep", "noise", "hybrid"],
        "rates": HIGH,
        "only_rate": 8e-3,
        "first": 10,
        "seeds": 20,
    },
    "kept-batch-1": {
        "words": "As `batch-1` with seeds that no other study has, for the KL, which looked lower with the filters "
        "there.",
        "methods": ["plain", "keep", "noise", "hybrid"],
        "rates": [2e-3, 4e-3, 8e-3],
        "only_rate": 2e-3,
        "first": 10,
        "seeds": 20,
        "longer": 4,
        "options": ONE_PAIR,
    },
}
IN_A_CELL = ("options", "pairs", "label_noise")


def of_a_cell(study: str) -> dict:
    """What a cell of a study has beside the figures that all cells have."""
    return {name: STUDIES[study][name] for name in IN_A_CELL if name in STUDIES[study]}
