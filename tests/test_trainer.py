"""NSPO2DPOTrainer against plain DPOTrainer, against a loop written out by hand, and against itself resumed."""

import contextlib
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import LORA, MODEL, assert_same, done, figures, losses, trainable
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from nspo2_trl import NSPO2, NSPO2Config, NSPO2DPOConfig, NSPO2DPOTrainer
from nspo2_trl.layout.adapters import lora_blocks
from nspo2_trl.layout.blocks import units
from nspo2_trl.projections.ranks import config_for, mean_width
from nspo2_trl.training.checkpoints import NSPO2_STATE_NAME
from nspo2_trl.training.options import nspo2_options
from nspo2_trl.training.refusals import refuse_unsupported
from nspo2_trl.training.samples import sample_share

# ---- equality with DPOTrainer ----


@pytest.mark.parametrize(
    "off, args",
    [
        ({"nspo2_enabled": False}, {}),
        ({"nspo2_projection_rank": 0}, {"gradient_checkpointing": True}),
        ({"nspo2_projection_rank": 0}, {"gradient_accumulation_steps": 1}),
    ],
)
def test_off_equals_dpo_trainer_bit_for_bit(trained, off, args):
    ours, plain = trained(**off, **args), trained(DPOTrainer, **args)
    assert_same(trainable(ours), trainable(plain))
    assert losses(ours) == losses(plain) and len(losses(ours)) == 8
    if "nspo2_enabled" not in off:  # it still measures
        assert figures(ours, "active") == [0] * 8 and ours.nspo2.filters[0].step_count == 8
        assert not figures(ours, "variance_reduction")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_equal_until_the_first_basis_and_different_after(trained, optim):
    ours, plain = trained(optim=optim, max_steps=5), trained(DPOTrainer, optim=optim, max_steps=5)
    assert losses(ours)[:3] == losses(plain)[:3]
    assert any(not torch.equal(p, trainable(plain)[name]) for name, p in trainable(ours).items())
    assert figures(ours, "active") == [0, 0, 1, 1, 1]


# ---- against a loop written out by hand ----


@pytest.mark.parametrize("accumulation, covariance", [(1, "adapter"), (3, "adapter"), (3, "factored")])
def test_equals_a_loop_by_hand(make_trainer, accumulation, covariance):
    """Gradients of the micro-batches one by one with autograd.grad, clipping, NSPO2 block by block, SGD by hand."""
    args = {
        "gradient_accumulation_steps": accumulation,
        "max_steps": 6,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.05,
        "train_sampling_strategy": "sequential",
        "nspo2_covariance": covariance,
        "nspo2_basis_dtype": "float32",  # roundings of another order would be far larger in bfloat16
    }
    trainer, by_hand = make_trainer(**args), make_trainer(**args)
    trainer.train()

    blocks = lora_blocks(by_hand.model)
    share = sample_share(accumulation)
    config = NSPO2Config(**nspo2_options(by_hand.args))
    mean = mean_width(units(blocks, covariance))
    make_engine = lambda width: NSPO2(config_for(config, width, mean), share=share)  # noqa: E731
    engines = [
        [make_engine(max(p.shape)) for p in b.params] if covariance == "factored" else make_engine(0) for b in blocks
    ]
    params = [p for block in blocks for p in block.params]
    batches = iter(by_hand.get_train_dataloader())
    by_hand.model.train()
    for step in range(6):
        learns = share == 1 or step % 5 > 0  # 4 of 5
        samples = []
        for _ in range(accumulation):
            loss = by_hand.compute_loss(by_hand.model, by_hand._prepare_inputs(next(batches)))
            samples.append(torch.autograd.grad(loss, params))
        mean = [torch.stack(parts).mean(0) for parts in zip(*samples)]
        clip = min(1.0, 1.0 / (torch.linalg.vector_norm(torch.cat([g.flatten() for g in mean])).item() + 1e-6))
        filtered, start = [], 0
        for block, engine in zip(blocks, engines):
            mine = slice(start, start + len(block.params))
            start += len(block.params)
            if covariance == "factored":
                for part, p, g, e in zip(range(len(block.params)), block.params, mean[mine], engine):
                    turn = (lambda x: x.T) if p.shape[0] > p.shape[1] else (lambda x: x)
                    stack = torch.stack([turn(s[mine][part]) for s in samples])[:, None]
                    filtered.append(turn(e.step(stack if learns else None, turn(g * clip)[None])[0]))
                continue
            stack = torch.stack([torch.cat([g.flatten() for g in s[mine]]) for s in samples])[:, None, None]
            grad = torch.cat([g.flatten() for g in mean[mine]])[None, None] * clip
            split = engine.step(stack if learns else None, grad)[0, 0].split([p.numel() for p in block.params])
            filtered += [g.view_as(p) for g, p in zip(split, block.params)]
        assert step < 5 or any((f - g * clip).norm() > 0.1 * f.norm() for f, g in zip(filtered, mean))
        with torch.no_grad():
            for p, g in zip(params, filtered):
                p -= 0.05 * g
    first, second = trainable(trainer), trainable(by_hand)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=2e-6), name


# ---- checkpoints ----


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 1}, {"nspo2_apply_to": "update"}], ids=lambda args: [*args, ""][0]
)
def test_resumed_equals_uninterrupted_bit_for_bit(make_trainer, trained, tmp_path, options):
    args = {"save_strategy": "steps", "save_steps": 5, "max_steps": 7} | options
    whole = trained(**args)
    resumed = make_trainer(**args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-5"))
    assert_same(trainable(whole), trainable(resumed))
    assert losses(whole) == losses(resumed)
    assert figures(whole, "variance_reduction") == figures(resumed, "variance_reduction")
    assert figures(whole, "active")[-1] == 1


def test_missing_or_broken_state_is_named_and_the_run_goes_on(make_trainer, tmp_path, caplog):
    args = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    make_trainer(**args).train()
    for damage in ("missing", "broken", "other"):
        folder = tmp_path / damage
        shutil.copytree(tmp_path / "out/checkpoint-3", folder)
        state = folder / NSPO2_STATE_NAME
        if damage == "missing":
            state.unlink()
        elif damage == "broken":
            state.write_bytes(b"not a state")
        resumed = make_trainer(**args, **({"nspo2_max_rank": 7} if damage == "other" else {}))
        caplog.clear()
        resumed.train(resume_from_checkpoint=str(folder))
        assert any(str(state) in record.getMessage() for record in caplog.records), damage
        assert resumed.nspo2.filters[0].step_count == 1  # a fresh estimate
        assert resumed.state.global_step == 4


# ---- bad numbers ----


def test_nan_loss_in_the_middle_of_a_run(make_trainer):
    class Sick(NSPO2DPOTrainer):
        calls, before = 0, []

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.calls == 10 else loss  # in step 5 of 2 micro-batches each

        def _nspo2_before_step(self):
            learned = [(part.cov.stack.clone(), part.reference.clone()) for part in self.nspo2.filters if part.cov]
            self.before.append((trainable(self), learned))
            super()._nspo2_before_step()

    trainer = done(make_trainer(Sick))
    assert figures(trainer, "skipped_steps") == [0, 0, 0, 0, 1, 1, 1, 1]
    (weights, learned), (same, unchanged), (other, _) = trainer.before[4:7]
    assert_same(weights, same)  # the step did nothing
    assert all(torch.equal(a, b) for old, new in zip(learned, unchanged) for a, b in zip(old, new)) and learned
    assert all(torch.isfinite(p).all() and not torch.equal(p, same[name]) for name, p in other.items())


def test_nan_outside_the_blocks_is_skipped_too(make_trainer):
    trainer = make_trainer(lora={"modules_to_save": ["norm"]})
    norm = next(p for n, p in trainer.model.named_parameters() if "modules_to_save" in n and p.requires_grad)
    calls = []
    norm.register_hook(lambda grad: grad * float("nan") if calls.append(0) or len(calls) == 9 else grad)
    trainer.train()
    assert figures(trainer, "skipped_steps")[-1] == 1
    assert all(torch.isfinite(p).all() for p in trainable(trainer).values())


def test_anneal_ends_the_projection_after_its_share_of_training(trained):
    trainer = trained(nspo2_anneal=0.5)
    assert figures(trainer, "active") == [0, 0, 1, 1, 0, 0, 0, 0]


# ---- in update space ----


def test_update_space_filters_what_the_optimizer_changed(trained):
    """With SGD and full strength both spaces are the same; with Adam they are not."""
    for optim in ("sgd", "adamw_torch"):
        sgd = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"} if optim == "sgd" else {}
        gradient, update = trained(max_steps=6, **sgd), trained(nspo2_apply_to="update", max_steps=6, **sgd)
        assert figures(update, "active")[-1] == 1
        if optim == "sgd":
            for name, p in trainable(gradient).items():
                assert torch.allclose(p, trainable(update)[name], atol=1e-6), name
        else:
            assert losses(gradient)[:3] == losses(update)[:3] and losses(gradient)[4:] != losses(update)[4:]


def test_sentinel_reads_eval_loss_and_its_state_survives(make_trainer, pairs, tmp_path, caplog):
    class Worse(NSPO2DPOTrainer):
        """Every evaluation finds a higher loss than the one before."""

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss if self.model.training else loss * (1 + self.state.global_step)

    args = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 8}
    trainer = make_trainer(Worse, trainer={"eval_dataset": pairs.select(range(4))}, **args)
    with caplog.at_level(logging.WARNING, logger="nspo2_trl"):
        trainer.train()
    assert "eval_loss rose to" in caplog.text and "half the rank" in caplog.text
    assert trainer.nspo2.sentinel.level > 0
    resumed = make_trainer(trainer={"eval_dataset": pairs.select(range(4))}, **args)
    resumed.nspo2.load_state_dict(torch.load(tmp_path / "out/checkpoint-8" / NSPO2_STATE_NAME, weights_only=True))
    assert resumed.nspo2.sentinel.state_dict() == trainer.nspo2.sentinel.state_dict()


# ---- what it works with ----


@pytest.mark.slow  # compiling takes a minute or more
def test_compiled_models_teach_the_same(make_trainer):
    eager = make_trainer(max_steps=6)
    compiled = make_trainer(torch_compile=True, torch_compile_backend="aot_eager", max_steps=6)
    eager.train()
    compiled.train()
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    for name, p in trainable(eager).items():
        assert torch.allclose(p, trainable(compiled)[name], atol=1e-5), name
    expected = figures(eager, "variance_reduction")
    assert expected and figures(compiled, "variance_reduction") == pytest.approx(expected, rel=1e-3)


def test_a_ready_peft_model_with_an_optimizer_of_ones_own(make_trainer):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(**LORA))
    optimizer = torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    parts = {"optimizers": (optimizer, scheduler)}
    trainer = make_trainer(model=model, model_init_kwargs=None, trainer=parts, max_steps=4)
    assert not any(":ref" in block.name for block in lora_blocks(trainer.model))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer and figures(trainer, "active")[-1] == 1


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_kinds_of_lora(make_trainer, lora):
    """What is no matrix of LoRA is in no block, and keeps its gradient as it is."""

    class Watch(NSPO2DPOTrainer):
        def _nspo2_before_step(self):
            before = [p.grad.clone() for p in others]
            super()._nspo2_before_step()
            assert all(torch.equal(a, p.grad) for a, p in zip(before, others))

    trainer = make_trainer(Watch, lora=lora, max_steps=5)
    before = trainable(trainer)
    blocks = lora_blocks(trainer.model)
    inside = {id(p) for block in blocks for p in block.params}
    others = [p for p in trainer.model.parameters() if p.requires_grad and id(p) not in inside]
    names = {n for n, p in trainer.model.named_parameters() if id(p) in inside}
    assert all("lora_" in name for name in names)
    trainer.train()
    assert len(blocks[0].params) == (3 if "use_dora" in lora else 2)
    assert any("lora_embedding_A" in name for name in names) == ("target_modules" in lora)
    assert bool(others) == ("modules_to_save" in lora)
    assert figures(trainer, "active")[-1] == 1 and figures(trainer, "variance_reduction")
    moved = {name for name, p in trainable(trainer).items() if not torch.equal(p, before[name])}
    assert names <= moved and ("modules_to_save" not in lora or len(moved) > len(names))


def test_gradient_checkpointing_sees_the_same_samples(trained):
    with_it, without = trained(gradient_checkpointing=True, max_steps=5), trained(max_steps=5)
    assert losses(with_it) == pytest.approx(losses(without), rel=1e-4)
    assert figures(with_it, "variance_reduction") == pytest.approx(figures(without, "variance_reduction"), rel=1e-3)


def test_bf16_autocast_and_bf16_adapters(make_trainer, trained):
    trainer = trained(bf16=True, max_steps=4)
    assert figures(trainer, "active")[-1] == 1
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(**LORA), autocast_adapter_dtype=False)
    trainer = make_trainer(model=model, model_init_kwargs=None, max_steps=4)
    assert all(p.dtype == torch.bfloat16 for p in trainable(trainer).values())
    trainer.train()
    assert figures(trainer, "active")[-1] == 1
    assert trainer.nspo2.stacks[0].grad.dtype == torch.float32


def test_trains_twice_and_leaves_no_hooks(make_trainer):
    trainer = make_trainer(max_steps=3)
    for _ in range(2):
        trainer.train()
        assert all(not p._backward_hooks for p in trainer.model.parameters())
    assert trainer.nspo2.filters[0].step_count == 6


def watch_samples(trainer) -> list:
    """For each step the mean of the samples and the gradient, of the first stack; learns from every step."""
    seen, collect = [], trainer.nspo2_samples.collect
    trainer.nspo2.share = 1.0

    def watch():
        samples = collect()
        seen.append((samples[0].mean(0), trainer.nspo2.stacks[0].grad.clone(), len(samples[0])))
        return samples

    trainer.nspo2_samples.collect = watch
    return seen


def test_samples_average_to_the_gradient_also_in_a_shorter_last_step(make_trainer, pairs):
    args = {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2, "max_grad_norm": 0.0}
    trainer = make_trainer(trainer={"train_dataset": pairs.select(range(10))}, **args)
    seen = watch_samples(trainer)
    trainer.train()  # 5 micro-batches an epoch: steps of 3 and 2
    assert [n for *_, n in seen] == [3, 2, 3, 2] and trainer.nspo2.skipped_steps == 0
    for mean, grad, _ in seen:
        assert torch.allclose(mean, grad, rtol=1e-4, atol=1e-7) and grad.norm() > 0


def test_loss_scale_of_fp16_is_taken_out_and_overflow_teaches_nothing(make_trainer):
    """fp16's GradScaler, which works on a CPU too: samples are unscaled, and a skipped step stays skipped."""

    class Scaled(NSPO2DPOTrainer):
        calls = 0

        def create_optimizer(self, *args):
            self.accelerator.scaler, self.accelerator.native_amp = scaler, True
            return super().create_optimizer(*args)

        def compute_loss(self, *args, **kwargs):
            self.accelerator.state._mixed_precision = "fp16"  # not before, so that the model stays in float32
            self.calls += 1
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("inf") if self.calls == 5 else loss

        def autocast_smart_context_manager(self, *args, **kwargs):
            return contextlib.nullcontext()

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = make_trainer(Scaled, max_steps=4)
    seen = watch_samples(trainer)
    try:
        trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"
    for step, (mean, grad, _) in enumerate(seen):
        if step != 2:  # the gradient is clipped, so only the direction is the same
            cosine = torch.nn.functional.cosine_similarity(mean.flatten(), grad.flatten(), 0)
            assert cosine > 0.999 and mean.norm() < 100, step
    assert figures(trainer, "skipped_steps")[-1] == 1 and scaler.get_scale() == 512
    assert all(torch.isfinite(p).all() for p in trainable(trainer).values())


# ---- what it logs ----


def test_logged_figures(trained):
    trainer = trained(logging_steps=2, max_steps=6)
    last = {name.removeprefix("nspo2/"): value for name, value in trainer.state.log_history[-2].items()}
    assert 0 < last["variance_reduction"] < 1 and 4 <= last["rank"] < 6 and last["active"] == 1  # 4 of mean width
    assert 0 < last["grad_norm"] < last["grad_norm_raw"] <= 1.0001 and last["overhead_ms"] > 0  # clipped at 1
    assert last["bias"] < 1e-6 and last["alpha"] == 1  # `keep`


# ---- refusals ----


def test_no_lora_is_refused(make_trainer):
    with pytest.raises(ValueError, match="No trainable LoRA adapter"):
        make_trainer(trainer={"peft_config": None})
    assert make_trainer(trainer={"peft_config": None}, nspo2_enabled=False).nspo2 is None


def test_plain_config_is_refused(pairs, tmp_path):
    with pytest.raises(TypeError, match="replace `DPOConfig"):
        NSPO2DPOTrainer(MODEL, args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=pairs)


def test_args_may_be_left_out(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.training_args.is_torch_bf16_gpu_available", lambda: True
    )  # TRL's default is bf16
    trainer = NSPO2DPOTrainer(MODEL, train_dataset=pairs, peft_config=LoraConfig(**LORA))
    assert isinstance(trainer.args, NSPO2DPOConfig) and trainer.args.output_dir == "model-NSPO2-DPO"


PLAN = SimpleNamespace(tp_enabled=True, cp_enabled=False, sp_enabled=False)
OFFLOAD = SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_offload=CPUOffloadPolicy()))


@pytest.mark.parametrize(
    "kind, more, words",
    [
        ("FSDP", {"is_fsdp2": False}, "NSPO2 does not support .*FSDP1.*accelerate launch --multi_gpu"),
        ("MEGATRON_LM", {}, "NSPO2 does not support .*MEGATRON.*accelerate launch --multi_gpu"),
        ("FSDP", {"is_fsdp2": True, "state": OFFLOAD}, "fsdp_offload_params: false"),
        ("MULTI_GPU", {"parallelism_config": PLAN}, "does not support tensor, context or sequence parallelism"),
        ("NO", {"device": torch.device("mps"), "parallelism_config": None}, "use_cpu=True"),
    ],
)
def test_unsupported_launches_are_refused(kind, more, words):
    common = {"distributed_type": DistributedType[kind], "device": torch.device("cpu")}
    with pytest.raises(ValueError, match=words):
        refuse_unsupported(SimpleNamespace(**common | more))
