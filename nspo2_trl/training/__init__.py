"""Projections inside a training loop: TRL's trainers, any optimizer, samples, checkpoints, card, refusals.

May import everything but `cli`. What overrides or hooks into TRL, Trainer, Accelerate and DeepSpeed is here.
"""
