"""Every name of other libraries that the package relies on though they may change it: an upgrade fails here first.

Run this file after an upgrade. A message says what is gone and which file needs it.
"""

import ast
import configparser
import functools
import importlib
import inspect
import re
from importlib.metadata import version

import pytest
import torch
from conftest import LORA, MODEL, ROOT
from packaging.requirements import Requirement

from nspo2_trl.training.checkpoints import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME

PACKAGE = {path.name: path.read_text() for path in sorted((ROOT / "nspo2_trl").rglob("*.py"))}
LIBRARIES = ("accelerate", "datasets", "deepspeed", "peft", "safetensors", "torch", "transformers", "trl")

# Where a name stands, the name, what it is for. An attribute that is set on instances counts as well.
NAMES = [
    # ---- Transformers ----
    ("transformers.Trainer", "_get_output_dir", "saving.py: the folder of a checkpoint that is half saved"),
    ("transformers.Trainer", "add_callback", "mixin.py: hooks into the steps"),
    ("transformers.Trainer", "remove_callback", "train.py: a live table in the place of the progress bar"),
    ("transformers.Trainer", "is_world_process_zero", "mixin.py: who writes the model card"),
    ("transformers.Trainer", "accelerator", "mixin.py: what kind of run it is"),
    ("transformers.Trainer", "deepspeed", "mixin.py: the engine whose step is wrapped"),
    ("transformers.Trainer", "is_fsdp_enabled", "mixin.py: whether the parameters are going to be sharded"),
    ("transformers.Trainer", "optimizer", "mixin.py: drops a gradient that would ruin the weights"),
    ("transformers.Trainer", "save_state", "train.py: trainer_state.json beside the adapter"),
    ("transformers.TrainerState", "max_steps", "mixin.py: the share of training done, for nspo2_anneal"),
    ("transformers.TrainerState", "global_step", "mixin.py: the same"),
    ("transformers.TrainerState", "log_history", "train.py, card.py: the figures in the tables"),
    ("transformers.TrainingArguments", "train_batch_size", "mixin.py: noise_scale in examples"),
    ("transformers.TrainingArguments", "gradient_accumulation_steps", "mixin.py: micro-batches of a step"),
    (
        "transformers.TrainingArguments",
        "world_size",
        "mixin.py: noise_scale; arguments.py: whether processes meet",
    ),
    ("transformers.TrainingArguments", "process_index", "data.py: who prints"),
    ("transformers.TrainingArguments", "should_save", "mixin.py: who writes nspo2_state.pt"),
    ("transformers.TrainingArguments", "eval_on_start", "train.py: held-out figures before training"),
    ("transformers.TrainingArguments", "to_dict", "card.py: the settings, with secrets masked"),
    ("transformers.TrainerCallback", "on_train_begin", "mixin.py: attaches the hooks"),
    ("transformers.TrainerCallback", "on_step_begin", "timing.py: the time of a step"),
    ("transformers.TrainerCallback", "on_substep_end", "mixin.py: the next micro-batch"),
    ("transformers.TrainerCallback", "on_pre_optimizer_step", "mixin.py: filters the gradient"),
    ("transformers.TrainerCallback", "on_optimizer_step", "mixin.py: filters the update, forgets the samples"),
    ("transformers.TrainerCallback", "on_step_end", "timing.py: the time of a step"),
    ("transformers.TrainerCallback", "on_evaluate", "mixin.py: shows eval_loss to the sentinel"),
    ("transformers.TrainerCallback", "on_train_end", "mixin.py: detaches the hooks"),
    ("transformers.PretrainedConfig", "_name_or_path", "card.py: the base model's name"),
    ("transformers.trainer_utils", "rotate_checkpoints", "checkpoints.py: old ones go when a new one is whole"),
    # ---- TRL ----
    ("trl.trainer.base_trainer._BaseTrainer", "_tag_names", "mixin.py: tags of the model card"),
    ("trl.trainer.base_trainer._BaseTrainer", "_name", "mixin.py: the name of the output folder"),
    ("trl.trainer.base_trainer._BaseTrainer", "_paper", "card.py: the model card cites the trainer's paper"),
    ("trl.DPOConfig", "model_init_kwargs", "train.py: dtype and revision of the model"),
    ("trl.DPOConfig", "trust_remote_code", "train.py: the same"),
    ("trl.ScriptArguments", "dataset_name", "data.py: where the pairs are"),
    ("trl.ScriptArguments", "dataset_config", "data.py: the same"),
    ("trl.ScriptArguments", "dataset_streaming", "data.py: the same"),
    ("trl.ScriptArguments", "dataset_train_split", "data.py: the same"),
    ("trl.ScriptArguments", "dataset_test_split", "data.py: the same"),
    ("trl.DatasetMixtureConfig", "datasets", "data.py: the same"),
    ("trl.ModelConfig", "model_name_or_path", "train.py: the model"),
    ("trl.ModelConfig", "model_revision", "train.py: the same"),
    ("trl.ModelConfig", "attn_implementation", "train.py: the same"),
    ("trl.ModelConfig", "dtype", "train.py: the same"),
    ("trl.TrlParser", "_actions", "arguments.py: the options there are, for a refusal that names the nearest"),
    ("trl.TrlParser", "error", "arguments.py: replaced, so that an error is one sentence"),
    # ---- Accelerate ----
    ("accelerate.Accelerator", "scaler", "samples.py: the loss scale of fp16; None without"),
    ("accelerate.Accelerator", "is_fsdp2", "refusals.py: FSDP1 is refused"),
    ("accelerate.Accelerator", "parallelism_config", "refusals.py: tensor parallelism is refused"),
    ("accelerate.Accelerator", "distributed_type", "refusals.py: what else is refused"),
    ("accelerate.Accelerator", "num_processes", "mixin.py: whether ranks share the work"),
    ("accelerate.ParallelismConfig", "tp_enabled", "refusals.py: tensor parallelism is refused"),
    ("accelerate.ParallelismConfig", "cp_enabled", "refusals.py: context parallelism is refused"),
    ("accelerate.ParallelismConfig", "sp_enabled", "refusals.py: sequence parallelism is refused"),
    ("accelerate.utils.FullyShardedDataParallelPlugin", "cpu_offload", "refusals.py: offloading is refused"),
    *[
        ("accelerate.utils.DistributedType", kind, "mixin.py: supported kinds of runs")
        for kind in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")
    ],
    # ---- torch ----
    ("torch.distributed.tensor.DTensor", "to_local", "stacks.py: what a rank has of a parameter under FSDP2"),
    ("torch.distributed.tensor.DTensor", "device_mesh", "local_parts.py: hybrid sharding is refused"),
    ("torch.distributed.tensor.DTensor", "placements", "local_parts.py: rows that a rank has"),
    ("torch", "_foreach_copy_", "stacks.py: copies all gradients of a group at once"),
    ("torch.distributed", "all_gather_into_tensor", "shards.py: the filtered gradient, before torch 2.13"),
    ("torch.distributed", "all_to_all_single", "shards.py: gradient samples"),
    ("torch.optim.Optimizer", "param_groups", "optimizer.py: shared with the optimizer inside"),
    ("torch.optim.Optimizer", "state", "optimizer.py: the same"),
    ("torch.optim.Optimizer", "defaults", "optimizer.py: the same"),
]

# Where a method stands, its name, parameters that must be there, what it is for.
METHODS = [
    ("transformers.Trainer", "log", ["logs", "start_time"], "mixin.py: logs nspo2/ figures"),
    ("transformers.Trainer", "_save_checkpoint", ["model", "trial"], "saving.py: removes a half-saved checkpoint"),
    ("transformers.Trainer", "_save_optimizer_and_scheduler", ["output_dir"], "saving.py: saves its state there"),
    ("transformers.Trainer", "_load_optimizer_and_scheduler", ["checkpoint"], "saving.py: loads its state there"),
    ("transformers.Trainer", "_save_rng_state", ["output_dir"], "saving.py: all learn whether one could not write"),
    ("transformers.Trainer", "train", ["resume_from_checkpoint"], "mixin.py: passes over half a checkpoint"),
    ("transformers.Trainer", "push_to_hub", [], "train.py"),
    (
        "trl.trainer.base_trainer._BaseTrainer",
        "create_model_card",
        ["model_name", "dataset_name"],
        "mixin.py: adds the run's figures",
    ),
    ("trl.trainer.utils", "get_config_model_id", ["config"], "mixin.py: the name of the output folder"),
    ("trl.TrlParser", "parse_args_and_config", ["args"], "train.py: reads recipes"),
    *[
        (
            f"trl.{name}Trainer",
            "__init__",
            ["model", "args", "train_dataset", "peft_config"],
            "trainer.py, trainers.py",
        )
        for name in ("DPO", "GRPO", "KTO", "Reward", "SFT")
    ],
    ("trl.DPOTrainer", "__init__", ["eval_dataset", "quantization_config"], "train.py"),
    ("torch.optim.Optimizer", "add_param_group", ["param_group"], "optimizer.py: a block for each new parameter"),
    ("torch.optim.Optimizer", "zero_grad", ["set_to_none"], "optimizer.py"),
    ("torch.optim.Optimizer", "load_state_dict", ["state_dict"], "optimizer.py"),
]

_STAGES = ("stage_1_and_2.DeepSpeedZeroOptimizer", "stage3.DeepSpeedZeroOptimizer_Stage3")
DEEPSPEED = [
    ("deepspeed.DeepSpeedEngine", "step", "deepspeed.py: wrapped, since Trainer has no callback there"),
    ("deepspeed.DeepSpeedEngine", "optimizer", "deepspeed.py: which kind of ZeRO it is"),
    ("deepspeed.DeepSpeedEngine", "is_gradient_accumulation_boundary", "deepspeed.py: whether it is about to step"),
    ("deepspeed.DeepSpeedEngine", "was_step_applied", "deepspeed.py: whether the norm is that of a step"),
    ("deepspeed.DeepSpeedEngine", "_global_grad_norm", "deepspeed.py: the norm that Trainer logs"),
    ("deepspeed.DeepSpeedEngine", "_config", "deepspeed.py: offloading is refused"),
    ("deepspeed.DeepSpeedEngine", "zero_optimization_stage", "deepspeed.py: stage 0 is refused"),
    ("deepspeed.DeepSpeedEngine", "fp16_enabled", "deepspeed.py: fp16 is refused"),
    ("deepspeed.runtime.config.DeepSpeedConfig", "zero_config", "deepspeed.py: offloading is refused"),
    ("deepspeed.runtime.zero.config.DeepSpeedZeroConfig", "offload_optimizer", "deepspeed.py: the same"),
    ("deepspeed.runtime.zero.config.DeepSpeedZeroConfig", "offload_param", "deepspeed.py: the same"),
    ("deepspeed.runtime.zero.partition_parameters", "ds_shape", "blocks.py: the whole shape under ZeRO-3"),
    *[(f"deepspeed.runtime.zero.{stage}", "clip_grad", "deepspeed.py: clips before the filter") for stage in _STAGES],
    *[
        (f"deepspeed.runtime.zero.{stage}", "torch_autocast_gradscaler", "deepspeed.py: fp16 is refused")
        for stage in _STAGES
    ],
]


def find(path: str):
    """The module or class at the dotted `path`."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name, None)
        return found


@functools.cache
def source(owner) -> str:
    """Of a module, or of a class and what it inherits."""
    found = []
    for part in [owner] if inspect.ismodule(owner) else owner.__mro__:
        try:
            found.append(inspect.getsource(part))
        except (OSError, TypeError):  # written in C
            continue
    return "\n".join(found)


def has(owner, name: str) -> bool:
    fields = {**getattr(owner, "__dataclass_fields__", {}), **getattr(owner, "model_fields", {})}
    whose = "self" if inspect.isclass(owner) else r"\w"
    set_somewhere = re.search(rf"{whose}\.{name}\s*(:[^=\n]+)?=[^=]", source(owner))
    return hasattr(owner, name) or name in fields or set_somewhere is not None


def gone(path: str, name: str, use: str) -> str:
    library = path.split(".")[0]
    return f"{path}.{name} is gone in {library} {version(library)}; nspo2_trl needs it: {use}"


def check_name(path: str, name: str, use: str) -> None:
    owner = find(path)
    assert owner is not None, gone(*path.rsplit(".", 1), use)
    assert has(owner, name), gone(path, name, use)


def requirements() -> list[Requirement]:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["deepspeed"]
    return [Requirement(line) for line in lines.split("\n") if line and not line.startswith("#")]


def imports() -> list[tuple[str, str, str]]:
    """(module, name, file) of everything that the package imports from these libraries."""
    found = set()
    for file, text in PACKAGE.items():
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and not node.level]
        found |= {(n.module, a.name, file) for n in nodes for a in n.names if n.module.split(".")[0] in LIBRARIES}
    return sorted(found)


# ---- names ----


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_version(requirement):
    if requirement.name == "deepspeed":
        pytest.importorskip("deepspeed")
    installed = version(requirement.name)
    assert requirement.specifier.contains(installed.split("+")[0], prereleases=True), (
        f"{requirement.name} {installed} is installed, setup.cfg asks for {requirement.specifier}. If all tests pass "
        "with it, widen the range; else the other failures of this file say what has to change."
    )


@pytest.mark.parametrize("module, name, file", imports())
def test_import(module, name, file):
    if module.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    check_name(module, name, f"{file} imports it")


@pytest.mark.parametrize("path, name, use", NAMES)
def test_name(path, name, use):
    check_name(path, name, use)


@pytest.mark.parametrize("path, name, use", DEEPSPEED)
def test_deepspeed_name(path, name, use):
    pytest.importorskip("deepspeed")
    check_name(path, name, use)


@pytest.mark.parametrize("path, name, wanted, use", METHODS)
def test_method(path, name, wanted, use):
    check_name(path, name, use)
    there = inspect.signature(getattr(find(path), name)).parameters
    for parameter in wanted:
        assert parameter in there, gone(path, f"{name}(…, {parameter})", use)


def test_every_private_name_is_listed():
    """Those that are used and not defined in the package, and the methods that its classes call through `super()`."""
    nodes = [node for text in PACKAGE.values() for node in ast.walk(ast.parse(text))]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.id for node in nodes if isinstance(node, ast.Name)}
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    private = {node.attr for node in attributes if re.match("_[a-z]", node.attr)} - own
    inherited = {node.attr for node in attributes if ast.unparse(node.value) == "super()"} & set(
        dir(find("transformers.Trainer"))
    )
    missing = private - {name for _, name, _ in NAMES + DEEPSPEED}
    missing |= {name for name in inherited if not name.startswith("__")} - {name for _, name, *_ in METHODS}
    assert not missing, f"list these in NAMES or METHODS, and say what they are for: {missing}"


# ---- what they do ----


def test_one_step_of_trainer(make_trainer, monkeypatch):
    """Clip, on_pre_optimizer_step, step, on_optimizer_step, zero_grad; hooks see micro-batches; callbacks in turn."""
    from accelerate import Accelerator
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from transformers import TrainerCallback
    from trl import DPOTrainer

    trainer = make_trainer(DPOTrainer, max_steps=1)
    param = [p for p in trainer.model.parameters() if p.requires_grad][-1]
    events = []
    note = lambda event: events.append((event, param.grad is not None))

    names = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
    watch = {name: lambda *args, name=name, **kwargs: note(name) for name in names}
    First = type("First", (TrainerCallback,), watch)

    class Second(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            note("second callback")

    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: [note("clip"), clip(*args)][1])
    trainer.add_callback(First())
    trainer.add_callback(Second())
    handles = [
        param.register_hook(lambda grad: note("hook")),
        register_optimizer_step_pre_hook(lambda *_: note("step")),
    ]
    trainer.train()
    for handle in handles:
        handle.remove()
    assert events == [
        ("hook", False),
        ("on_substep_end", True),
        ("hook", True),
        ("clip", True),
        ("on_pre_optimizer_step", True),
        ("second callback", True),
        ("step", True),
        ("on_optimizer_step", True),
        ("on_step_end", False),
    ], f"Trainer of transformers {version('transformers')} steps in another order: trainer.py relies on this one"


def test_names_in_a_checkpoint():
    theirs = find("transformers.trainer").TRAINER_STATE_NAME, find("transformers.trainer_utils").PREFIX_CHECKPOINT_DIR
    assert theirs == (TRAINER_STATE_NAME, PREFIX_CHECKPOINT_DIR), "checkpoints.py has other names than Trainer"


def test_the_state_is_the_last_file_of_a_checkpoint():
    text = inspect.getsource(find("transformers.Trainer")._save_checkpoint)
    places = [
        text.find(name) for name in ("_save_optimizer_and_scheduler", "TRAINER_STATE_NAME", "rotate_checkpoints(")
    ]
    assert -1 not in places and places == sorted(places), (
        "Trainer._save_checkpoint no longer writes trainer_state.json after all else and before it deletes old "
        "checkpoints: checkpoints.py takes it as the sign of a whole one"
    )


def test_names_of_lora_parameters_and_the_reference_adapter(make_trainer):
    """TRL keeps the reference as a second adapter, `ref`, of a PeftModel that it is given; it must not be trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import DPOTrainer

    from nspo2_trl.layout.adapters import lora_blocks

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(**LORA))
    modules = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert sorted(block.name for block in lora_blocks(model)) == sorted(f"{name}:default" for name in modules), (
        f"peft {version('peft')} calls LoRA parameters otherwise: adapters.py has a pattern for their names"
    )
    trainer = make_trainer(DPOTrainer, model=model)
    assert set(trainer.model.peft_config) == {"default", "ref"}, "TRL keeps DPO's reference in another way"
    assert all(block.name.endswith(":default") for block in lora_blocks(trainer.model)), (
        f"trl {version('trl')} leaves its reference adapter trainable: adapters.py would filter it"
    )


def test_the_model_card_has_the_place_for_the_figures(make_trainer, tmp_path):
    from trl import DPOTrainer

    trainer = make_trainer(DPOTrainer, output_dir=str(tmp_path))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    for text in ("### Framework versions", "[None](https://huggingface.co/None)", 'model="None"'):
        assert text in card, f"TRL's model card has no {text!r} any more: card.py looks for it"


def test_the_optimizer_base_class_adds_groups_through_its_method():
    """NSPO2Optimizer drops what the base class's constructor sets and adds: that must be all it does there."""
    added = []

    class Watched(torch.optim.Optimizer):
        def add_param_group(self, param_group):
            added.append(param_group)

    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    own = {name for name in vars(Watched(groups, {"lr": 1.0})) if not name.startswith("_")}
    assert added == groups and own == {"defaults", "state", "param_groups"}, (
        f"Optimizer.__init__ of torch {version('torch')} does something else: optimizer.py undoes what it did before"
    )
