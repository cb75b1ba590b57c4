"""The table of metrics: what is logged as `nspo2/NAME`, with its meaning and unit."""

VANISHED = 0.01  # below this share of the run's largest gradient norm what is left is no noise worth a figure

# what it is, unit
METRICS = {
    "variance_reduction": (
        "share of the noise that the filter removes, on samples that it had not seen; absent where the gradient has "
        f"vanished, that is below {VANISHED:.0%} of the run's largest",
        "",
    ),
    "bias": ("1 - cos(m, m′): m the running mean gradient, m′ what the filter makes of it", ""),
    "rank": ("directions removed, mean over blocks", "directions"),
    "alpha": ("share of the projection that the trust region lets through, mean over blocks", ""),
    "noise_scale": ("batch size up to which more examples per step pay, over the last 512 steps", "examples"),
    "signal_removed": ("share of the signal that the filter removes, over the last 64 eigensolves", ""),
    "signal_removed_se": ("standard error of `signal_removed`; both are absent above 0.2", ""),
    "retain_kl": ("KL(frozen ‖ policy) on the retained texts of the KL term, before its weight", "nats per token"),
    "retain_ms": ("time of the KL term's forward passes, part of `step_time`", "ms per step"),
    "retain_leakage": ("share of held-out retained inputs' energy outside the directions taken out", ""),
    "retain_kl_unprojected": ("`eval_retain_kl` of the adapter as training left it, at the end", "nats per token"),
    "retain_loss_unprojected": ("`eval_retain_loss` of the adapter as training left it, at the end", "nats per token"),
    "active": ("share of steps that were projected", ""),
    "overhead_ms": ("time of NSPO2, part of `step_time`", "ms per step"),
    "grad_norm_raw": ("norm of the adapters' gradient after clipping, before the filter", ""),
    "grad_norm": ("norm of the adapters' gradient after the filter", ""),
    "skipped_steps": ("steps so far with NaN or Inf in a gradient: nothing was learned from them", "steps"),
    "sentinel_level": ("rung of the sentinel: 0 is as configured, higher ones are milder", ""),
    "batch_size": ("examples per step: batch per device × accumulation × processes", "examples"),
    "step_time": ("time of a training step, without evaluation and saving", "s"),
}
