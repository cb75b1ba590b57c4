"""Faults of the trainers that users met or could meet, each by its smallest input, and its kin."""

import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import FAST_NSPO2, LORA, MODEL, assert_same, done, figures, losses, trainable
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from test_trainers import make, ours
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOTrainer

from nspo2_trl import (
    NSPO2DPOTrainer,
    NSPO2KTOConfig,
    NSPO2KTOTrainer,
    attach_nspo2,
    create_nspo2_optimizer,
    noise_summary,
)
from nspo2_trl.cli import runs
from nspo2_trl.cli.train import main
from nspo2_trl.projections.protocol import Projection
from nspo2_trl.training.checkpoints import CheckpointError
from nspo2_trl.training.mixin import NSPO2Mixin


def at(event, do):
    """A callback that calls `do(args, state)` at `event`."""
    return type("At", (TrainerCallback,), {event: lambda self, args, state, control, **kwargs: do(args, state)})()


def adapted():
    return get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(**LORA))


# ---- projections beside the noise filter ----


class WithAnother(NSPO2DPOTrainer):
    """Its other projection changes nothing, and notes what it is asked."""

    def _nspo2_other_projections(self):
        answers = {"before_step": True, "metrics": {}, "state_dict": {}}
        other = Mock(spec=Projection, **{f"{name}.return_value": value for name, value in answers.items()})
        return [*super()._nspo2_other_projections(), other]


def test_another_projection_is_made_once_and_ended(make_trainer):
    trainer = make_trainer(WithAnother, max_steps=4)
    (other,) = trainer.nspo2_projections[1:]

    def smaller(args, state):
        if state.global_step == 2:
            trainer.args.gradient_accumulation_steps = trainer.accelerator.gradient_accumulation_steps = 1

    trainer.add_callback(at("on_step_end", smaller))
    trainer.train()
    assert trainer.nspo2_projections == [trainer.nspo2, other] and trainer.nspo2.filters[0].step_count == 2
    steps = 2 * ["before_step", "after_step"]
    asked = [name for name, *_ in other.method_calls if name != "metrics"]
    assert asked == ["start", *steps, "start", *steps, "end"]


# ---- the batch that ran ----


class ShortOfMemory(NSPO2DPOTrainer):
    """Runs out of memory at a batch of more than 3, in the second micro-batch of its third step."""

    calls = 0

    def training_step(self, model, inputs, *args, **kwargs):
        self.calls += 1
        if len(inputs["input_ids"]) > 6 and self.calls == 6:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_batch_that_ran_is_logged(make_trainer, pairs, enabled, monkeypatch):
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda **kwargs: None)
    args = {"per_device_train_batch_size": 4, "auto_find_batch_size": True, "max_steps": 3, "nspo2_enabled": enabled}
    trainer = done(make_trainer(ShortOfMemory, **args))
    assert trainer.calls == 6 + 6 and figures(trainer, "batch_size") == [6, 6, 6]  # 3 pairs, 2 micro-batches
    if enabled:
        assert trainer.nspo2.filters[0].step_count == 3  # what the larger batch taught is of another noise
        assert noise_summary(trainer)["batch"] == 6
    few = make_trainer(trainer={"train_dataset": pairs.select(range(7))}, max_steps=4, nspo2_enabled=enabled)
    few.args.per_device_train_batch_size = 64  # Trainer took it when it was made
    few.train()
    assert figures(few, "batch_size") == [4, 3, 4, 3]


# ---- what is trained, and how, changed after the trainer was made ----


def v_proj(trainer):
    return [p for name, p in trainer.model.named_parameters() if "lora_" in name and "v_proj" in name]


class TrainsAllLora(NSPO2DPOTrainer):
    """The optimizer has all of LoRA, trained or not; `v_proj` is `frozen` when NSPO2 looks at the model first."""

    frozen = False

    def _nspo2_setup(self, *args):
        for p in v_proj(self) if self.frozen else ():
            p.requires_grad_(False)
        super()._nspo2_setup(*args)

    def create_optimizer(self, *args):
        self.optimizer = torch.optim.AdamW([p for n, p in self.model.named_parameters() if "lora_" in n], lr=1e-3)
        return self.optimizer


@pytest.mark.parametrize("event", ["", "on_train_begin", "on_step_begin"])
@pytest.mark.parametrize("wanted", [False, True])
def test_requires_grad_changed_later(make_trainer, event, wanted, caplog):
    """Filtered is what is trained, changed by a callback that comes after NSPO2's own too.

    PEFT switches all of an adapter on again when it was off for the reference: here that is done before.
    """
    trainer = make_trainer(
        type("Own", (TrainsAllLora,), {"frozen": wanted}), max_steps=6, precompute_ref_log_probs=True
    )
    v = v_proj(trainer)

    def switch(args, state):
        if event != "on_step_begin" or state.global_step == 3:
            for p in v:
                p.requires_grad_(wanted)

    if event:
        trainer.add_callback(at(event, switch))
    else:
        switch(None, None)
    before = [p.detach().clone() for p in v]
    trainer.train()
    held = {id(place.param) for stack in trainer.nspo2.stacks for place in stack.places}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert figures(trainer, "active")[-1] == 1 and all(not p._backward_hooks for p in v)
    moved = any(not torch.equal(p, old) for p, old in zip(v, before))
    assert moved == (wanted or event == "on_step_begin")
    assert ("starts anew" in caplog.text) == (event == "on_step_begin")


@pytest.mark.parametrize(
    "event, steps",
    [
        ("", 4),
        ("on_train_begin", 1),
        ("on_step_begin", 4),
        ("on_substep_end", 4),
        ("on_step_end", 4),
        ("on_step_end", 1),
    ],
)
def test_accumulation_changed_later(make_trainer, event, steps):
    trainer, plain = make_trainer(nspo2_projection_rank=0, max_steps=6), make_trainer(DPOTrainer, max_steps=6)
    for made in (trainer, plain):

        def switch(args, state, made=made):
            if event in ("", "on_train_begin") or state.global_step == 3:
                made.args.gradient_accumulation_steps = steps

        if event:
            made.add_callback(at(event, switch))
        else:
            switch(None, None)
        made.train()
    assert losses(trainer) == losses(plain)
    assert_same(trainable(trainer), trainable(plain))
    if event != "on_substep_end":
        assert figures(trainer, "batch_size")[-1] == 2 * steps


def test_options_changed_later(make_trainer):
    trainer = make_trainer(max_steps=4)
    trainer.args.nspo2_projection_rank = 2
    trainer.accelerator.gradient_accumulation_steps = 4
    trainer.train()
    assert figures(trainer, "rank")[-1] == pytest.approx(2, abs=0.25) and trainer.nspo2.config.projection_rank == 2
    for name, value in (("projection_rank", -1), ("enabled", False)):
        setattr(trainer.args, f"nspo2_{name}", value)
        with pytest.raises(ValueError, match=f"`nspo2_{name}` (must be a whole number|was changed after)"):
            trainer.train()


# ---- optimizers ----


class StepsInBackward(torch.optim.Optimizer):
    """As GaLore's layer-wise optimizers do: a hook steps and drops the gradient, `step` does nothing."""

    def __init__(self, params, through_data, to_none):
        params = list(params)
        super().__init__(params, {"lr": 1e-3})

        def hook(p):
            with torch.no_grad():
                (p.data if through_data else p).sub_(1e-3 * p.grad)
            p.grad = None if to_none else torch.zeros_like(p.grad)

        for p in params:
            p.register_post_accumulate_grad_hook(hook)

    def step(self, closure=None):
        pass


@pytest.mark.parametrize("through_data, to_none", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("args", [{}, {"lora": {"modules_to_save": ["norm"]}, "nspo2_apply_to": "update"}])
def test_an_optimizer_that_steps_in_backward_is_noticed_at_once(make_trainer, through_data, to_none, args):
    class Own(NSPO2DPOTrainer):
        def create_optimizer(self, *args):
            params = (p for p in self.model.parameters() if p.requires_grad)
            self.optimizer = StepsInBackward(params, through_data, to_none)
            return self.optimizer

    trainer = make_trainer(Own, **args)
    with pytest.raises(ValueError, match="^The optimizer steps inside the backward pass.*nspo2_enabled=False`.$"):
        trainer.train()
    assert not trainer.state.log_history


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"])
def test_optimizers_known_to_step_in_backward_are_refused(make_trainer, optim):
    args = {"optim": optim, "optim_target_modules": ["q_proj"], "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match=f"`optim='{optim}'` steps inside the backward pass"):
        make_trainer(model="no-such-model", **args)  # before anything is loaded
    plain = make_trainer(DPOTrainer, **args)
    with pytest.raises(ValueError, match=f"`optim='{optim}'` steps inside the backward pass"):
        attach_nspo2(plain)
    assert make_trainer(nspo2_enabled=False, **args).nspo2 is None


def wrapped(model):
    params = [p for p in model.parameters() if p.requires_grad]
    return create_nspo2_optimizer(params, torch.optim.AdamW, {"lr": 1e-3})


def test_two_doors_are_not_both_taken(make_trainer):
    """NSPO2 by the trainer and by the optimizer: given, made later, wrapped in another one, or attached to."""

    class Around(torch.optim.Optimizer):
        def __init__(self, inner):
            self.optimizer = inner
            super().__init__(inner.param_groups, inner.defaults)

    class Own(NSPO2DPOTrainer):
        def create_optimizer(self, *args):
            self.optimizer = Around(wrapped(self.model))
            return self.optimizer

    def parts():
        model = adapted()
        return {"model": model, "model_init_kwargs": None, "trainer": {"optimizers": (wrapped(model), None)}}

    with pytest.raises(ValueError, match="is an NSPO2Optimizer.*filtered twice"):
        make_trainer(**parts())
    with pytest.raises(ValueError, match="is an NSPO2Optimizer.*filtered twice"):
        make_trainer(Own).train()
    plain = make_trainer(DPOTrainer, **parts())
    with pytest.raises(ValueError, match="is an NSPO2Optimizer.*filtered twice"):
        attach_nspo2(plain)
    assert type(plain) is DPOTrainer
    for made in (make_trainer(), make_trainer(nspo2_enabled=False), attach_nspo2(make_trainer(DPOTrainer))):
        with pytest.raises(ValueError, match="has NSPO2 already"):
            attach_nspo2(made)
    make_trainer(**parts(), nspo2_enabled=False, max_steps=1).train()  # one door is enough


# ---- trainers of one's own ----


def with_its_own_argument(base):
    class Own(base):
        """Takes `alpha`, and hands on the rest by name."""

        def __init__(self, model, alpha, **kwargs):
            super().__init__(model=model, **kwargs)
            self.alpha = alpha

    return Own


def under_the_mixin(base):
    """The mixin before a trainer of one's own."""
    trl_trainer = base.__mro__[base.__mro__.index(NSPO2Mixin) + 1 :]
    trl_trainer = next(kind for kind in trl_trainer if kind.__name__.endswith("Trainer"))
    own = with_its_own_argument(trl_trainer)
    return type("Mixed", (NSPO2Mixin, own), {"_nspo2_config_class": base._nspo2_config_class})


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "Reward", "SFT"])
@pytest.mark.parametrize("derive", [with_its_own_argument, under_the_mixin])
def test_a_signature_of_ones_own(kind, derive, pairs, tmp_path):
    base, config = ours(kind)
    cls = derive(base)

    class Called(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, alpha=0.5, retain_dataset=["Rosa saw a bell in spring"] * 10, **kwargs)

    trainer = make(Called, config, kind, pairs, tmp_path, **FAST_NSPO2)
    assert trainer.alpha == 0.5 and trainer.args.learning_rate == 2e-3 and trainer.nspo2 is not None
    assert len(trainer.nspo2_retained.texts) == 8
    with pytest.raises(TypeError, match="alpha"):  # Python's own words
        make(cls, config, kind, pairs, tmp_path)


# ---- streams ----


def stream(rows, pulled=None):
    """Can be read once only; counts in `pulled` what was."""
    rest = iter(rows)

    def read():
        for row in rest:
            if pulled is not None:
                pulled.append(row)
            yield row

    return IterableDataset.from_generator(read)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_stream_loses_no_row_more_than_with_trl(make_trainer, pairs, enabled):
    rows, taken, runs = list(pairs.select(range(20))), [], []
    for cls, off in ((DPOTrainer, {}), (NSPO2DPOTrainer, {"nspo2_enabled": enabled, "nspo2_projection_rank": 0})):
        taken.append([])
        trainer = make_trainer(cls, trainer={"train_dataset": stream(rows, taken[-1])}, max_steps=2, **off)
        assert len(taken[-1]) < 4  # what TRL looks at
        trainer.train()
        runs.append(losses(trainer))
    assert taken[0] == taken[1] and runs[0] == runs[1]


@pytest.mark.parametrize("made", [stream, Dataset.from_list])
@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "is empty"),
        ([{"prompt": "a", "answer": "b"}], "no column `chosen` and `rejected`, it has prompt, answer"),
        ([{"prompt": "a", "chosen": "b"}], "no column `rejected`"),
    ],
)
def test_data_that_cannot_work_is_refused(make_trainer, made, rows, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(trainer={"train_dataset": made(rows)})


# ---- resuming ----


@pytest.fixture
def saved(make_trainer):
    """`saved()`: a run of 4 steps; and `make(...)` makes another trainer on its output_dir."""
    make = lambda **args: make_trainer(**{"save_strategy": "steps", "save_steps": 2, "max_steps": 4} | args)
    trainer = done(make())
    return trainer, make


RETAINED = {"retain_dataset": [f"Rosa saw {i} bells in spring" for i in range(10)]}
EPOCHS = {"max_steps": -1, "num_train_epochs": 0.25}


@pytest.mark.parametrize("args", [{}, {"max_steps": 3}, EPOCHS, {"nspo2_retain_rank": 2, "trainer": RETAINED}])
def test_a_finished_run_stays_as_it_is(saved, caplog, args):
    done, make = saved
    rest = make(**args)
    for checkpoint in (True, Path(f"{done.args.output_dir}/checkpoint-4")):
        result = rest.train(resume_from_checkpoint=checkpoint)
        assert result.global_step == 4 and re.search("finished, at step 4 of [34]", caplog.text)
    assert rest.nspo2_retain_projected == ("trainer" in args)
    if "trainer" not in args:
        assert_same(trainable(rest), trainable(done))
    logged = [entry for entry in rest.state.log_history if "train_loss" in entry]
    assert losses(rest) == losses(done) and not logged and rest.nspo2.filters[0].step_count == 4


@pytest.mark.parametrize(
    "args, words",
    [
        ({}, "`max_steps` 4 -> 6.$"),
        ({"beta": 0.5, "seed": 3}, "`max_steps` 4 -> 6, `seed` 0 -> 3, `beta` default -> 0.5.$"),
        ({"learning_rate": 1e-5}, "`learning_rate` 0.002 -> 1e-05 .the checkpoint's stays.."),
        ({"nspo2_enabled": False}, "`max_steps` 4 -> 6, `nspo2_enabled` default -> False.$"),
        ({"nspo2_strategy": "noise"}, "`nspo2_strategy` default -> noise.$"),
        ({"lora": {"lora_alpha": 16}}, "`lora_alpha` 8 -> 16.$"),
        ({"rows": 50}, "`training data` 64 rows [0-9a-f]{8} -> 50 rows [0-9a-f]{8}.$"),
    ],
)
def test_what_is_other_than_in_the_checkpoints_run_is_said(saved, pairs, caplog, args, words):
    done, make = saved
    args = dict(args)
    data = {"train_dataset": pairs.select(range(args.pop("rows", 64)))}
    rest = make(trainer=data, max_steps=6, **args)
    rest.train(resume_from_checkpoint=True)
    said = [record.getMessage() for record in caplog.records if "Other than in the run of" in record.getMessage()]
    assert len(said) == 1 and re.search(words, said[0]), said
    assert rest.state.global_step == 6
    rest.create_model_card()
    assert ("resumed with `nspo2_enabled: false`" in card(rest)) == ("nspo2_enabled" in args)
    if not args:
        make().train(resume_from_checkpoint=f"{done.args.output_dir}/checkpoint-2")
        assert "checkpoint-2:" not in caplog.text


def card(trainer):
    return (Path(trainer.args.output_dir) / "README.md").read_text()


@pytest.mark.parametrize(
    "args, words",
    [
        ({"lora": {"target_modules": ["q_proj"]}}, "does not fit this run's: it has `r` 4 and `target_modules` "),
        ({"lora": {"r": 8}}, "does not fit this run's: it has `r` 4"),
        ({"lora": {"use_dora": True}}, "does not fit this run's"),
        ({"optim": "sgd"}, "is of another optimizer, it has no `dampening` and `momentum`:"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_a_sentence(saved, args, words):
    done, make = saved
    for enabled in (True, False):
        rest = make(nspo2_enabled=enabled, max_steps=6, **args)
        with pytest.raises((ValueError, CheckpointError), match=words) as refused:
            rest.train(resume_from_checkpoint=True)
        assert len(str(refused.value).splitlines()) == 1


# ---- runs that diverge ----


class Diverges(NSPO2DPOTrainer):
    """The loss is NaN, or its gradient alone, from `start` to `stop`."""

    start, stop, gradient = 4, 100, False

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if not self.start <= self.state.global_step + 1 < self.stop:
            return loss
        return loss + (loss * 0).sqrt() * self.gradient if self.gradient else loss * float("nan")


OFF, RANK_0 = {"nspo2_enabled": False}, {"nspo2_projection_rank": 0}


@pytest.mark.parametrize(
    "options, gradient, start, stop, since",
    [
        ({}, False, 4, 9, 4),
        ({}, True, 4, 9, 4),
        ({}, False, 3, 5, None),  # dropped, and all is well again
        ({}, False, 8, 9, None),
        (OFF, False, 4, 5, 4),
        (OFF, True, 4, 5, 5),  # the weights are NaN from then on
        (OFF, False, 8, 9, 8),
        (RANK_0, True, 4, 5, 4),
    ],
)
def test_a_run_that_diverged_says_so(make_trainer, caplog, options, gradient, start, stop, since):
    trainer = make_trainer(type("Own", (Diverges,), {"start": start, "stop": stop, "gradient": gradient}), **options)
    trainer.train()
    trainer.create_model_card()
    assert trainer.nspo2_diverged_at == since
    assert since is None or f"not finite from step {since} on: lower `learning_rate`" in caplog.text
    assert (f"not finite from step {since} on." in card(trainer)) == (since is not None)
    if since and not options:
        trainer.stop = 0
        trainer.train()
        assert trainer.nspo2_diverged_at is None


# ---- the command ----


@pytest.fixture
def command(in_the_repository, pairs, tmp_path):
    """`command(...)`: `nspo2 train` on the quick start for 5 steps, with more options."""

    pairs.to_json(tmp_path / "pairs.jsonl")

    def run(*options):
        recipe = ["--config", "recipes/quickstart/dpo.yaml", "--output_dir", str(tmp_path), "--eval_strategy", "no"]
        recipe += ["--dataset_name", str(tmp_path / "pairs.jsonl")]
        quick = ["--nspo2_retain_project", "no", "--nspo2_retain_kl", "0", "--nspo2_retain_samples", "10"]
        main([*recipe, *quick, "--max_steps", "5", "--save_steps", "5", "--logging_steps", "1", *options])

    return run


@pytest.mark.parametrize("off", [[], ["--nspo2_enabled", "false"]])
def test_the_command_fails_where_the_run_diverged(command, tmp_path, monkeypatch, capsys, off):
    monkeypatch.setattr("nspo2_trl.cli.train.NSPO2DPOTrainer", Diverges)
    with pytest.raises(SystemExit) as left:
        command(*off)
    assert left.value.code.startswith("error: the loss or a gradient was not finite from step 4 on: lower")
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert "the first basis comes after" not in capsys.readouterr().out


def test_the_command_resumes_without_nspo2_and_refuses_what_does_not_fit(command, caplog, capsys):
    command("--nspo2_update_freq", "2")
    again = ["--resume_from_checkpoint", "true"]
    command(*again)
    assert "finished, at step 5 of 5" in caplog.text
    command(*again, "--max_steps", "6", "--nspo2_enabled", "false")
    assert "nspo2/active" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        command(*again, "--max_steps", "7", "--lora_target_modules", "q_proj", "v_proj")
    assert "does not fit this run's" in left.value.code and len(left.value.code.splitlines()) == 1


# ---- arguments that make no sense ----


@pytest.mark.parametrize(
    "args, words",
    [
        ({"beta": 0.0}, "`beta` must be above 0, got 0.0"),
        ({"beta": -0.1, "loss_type": ["ipo"]}, "`beta` must be above 0, got -0.1"),
        ({"beta": float("nan"), "loss_type": ["sft", "hinge"]}, "`beta` must be above 0"),
        ({"max_steps": 0}, "`max_steps` is 0"),
        ({"max_steps": -1, "num_train_epochs": 0}, "`max_steps` is 0, or -1 with no `num_train_epochs`"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be at least 1"),
    ],
)
def test_arguments_that_teach_nothing_are_refused(make_trainer, tmp_path, args, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(model="no-such-model", **args)  # before anything is loaded
    with pytest.raises(ValueError, match=words):
        attach_nspo2(make_trainer(DPOTrainer, **args))
    if "beta" in args:
        with pytest.raises(ValueError, match=words):
            NSPO2KTOTrainer("no", args=NSPO2KTOConfig(str(tmp_path), beta=args["beta"], bf16=False, use_cpu=True))
    make_trainer(**args | {"max_steps": 1, "gradient_accumulation_steps": 1, "loss_type": ["sft"]})


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_modules_that_are_not_there_are_named(make_trainer, caplog, option):
    there = {"target_modules": "q_proj", "modules_to_save": "norm"}[option]
    for names, said in (([there], False), ([there, "query"], True)):
        make_trainer(lora={option: names})
        assert (f"`{option}` has 'query', which no module of the model is called" in caplog.text) == said
    caplog.clear()
    make_trainer(lora={option: ".*q_proj" if option == "target_modules" else None})
    attach_nspo2(make_trainer(DPOTrainer, lora={option: [there, "query"]}))
    assert caplog.text.count("no module of the model is called") == 1


def test_no_share_of_a_noise_that_has_vanished(make_trainer, caplog):
    """The loss, and so its gradient, falls to nothing in a run, and stays so when that is resumed; then it is back."""

    class Solved(NSPO2DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (1e-4 if 5 <= self.state.global_step < 10 else 1.0)

    args = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "gradient_accumulation_steps": 1}
    trainer = done(make_trainer(Solved, **args))
    logged = lambda made: [e["step"] for e in made.state.log_history if "nspo2/variance_reduction" in e]
    assert logged(trainer) == [4, 5, 11, 12]
    assert figures(trainer, "active")[3:] == [1] * 9
    rest = make_trainer(Solved, **args)
    rest.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-6")
    assert logged(rest) == logged(trainer)
    rest.create_model_card()
    assert "absent where the gradient has vanished" in card(rest)
    notes = runs.of(rest.state.log_history, "run").notes
    assert any("the gradient had vanished at step 6" in note for note in notes)
