"""Every name of other libraries that the package relies on though they may change it: an upgrade fails here first.

Run this file after an upgrade. A message says what is gone and which file needs it.
"""

import ast
import configparser
import functools
import importlib
import inspect
import re
import runpy
from importlib.metadata import version

import pytest
import torch
from accelerate import Accelerator
from conftest import LORA, MODEL, ROOT
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOTrainer

import nspo2_trl
from nspo2_trl.cli import command
from nspo2_trl.layout.adapters import lora_blocks
from nspo2_trl.training import trl_range
from nspo2_trl.training.checkpoints import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME

PACKAGE = {path.name: path.read_text() for path in sorted((ROOT / "nspo2_trl").rglob("*.py"))}
LIBRARIES = ("accelerate", "datasets", "deepspeed", "peft", "safetensors", "torch", "transformers", "trl")

# Names that the package uses, by where they stand. An attribute that is set on instances counts as well.
NAMES = {
    "transformers.Trainer": "_get_output_dir add_callback remove_callback is_world_process_zero accelerator deepspeed "
    "is_fsdp_enabled optimizer save_state _save _train_batch_size "
    "_initial_global_step is_in_train",
    "transformers.TrainerState": "max_steps global_step log_history",
    "transformers.TrainingArguments": "train_batch_size gradient_accumulation_steps world_size process_index "
    "should_save eval_on_start to_dict",
    "transformers.TrainerCallback": "on_train_begin on_step_begin on_substep_end on_pre_optimizer_step "
    "on_optimizer_step on_step_end on_evaluate on_train_end",
    "transformers.PretrainedConfig": "_name_or_path",
    "transformers.trainer_utils": "rotate_checkpoints",
    "trl.trainer.base_trainer._BaseTrainer": "_tag_names _name _paper",
    "trl.DPOConfig": "model_init_kwargs trust_remote_code",
    "trl.ScriptArguments": "dataset_name dataset_config dataset_streaming dataset_train_split dataset_test_split",
    "trl.DatasetMixtureConfig": "datasets",
    "trl.ModelConfig": "model_name_or_path model_revision attn_implementation dtype",
    "trl.TrlParser": "_actions error",
    "accelerate.Accelerator": "split_batches scaler is_fsdp2 parallelism_config distributed_type num_processes",
    "accelerate.ParallelismConfig": "tp_enabled cp_enabled sp_enabled",
    "accelerate.utils.FullyShardedDataParallelPlugin": "cpu_offload",
    "accelerate.utils.DistributedType": "NO MULTI_GPU MULTI_CPU FSDP DEEPSPEED",
    "datasets.Dataset": "_indices",
    "torch": "_foreach_copy_",
    "torch.Tensor": "_version",
    "torch.distributed.tensor.DTensor": "to_local device_mesh placements",
    "torch.distributed": "all_gather_into_tensor all_to_all_single",
    "torch.optim.Optimizer": "param_groups state defaults _optimizer_state_dict_pre_hooks "
    "_optimizer_state_dict_post_hooks _optimizer_load_state_dict_pre_hooks _optimizer_load_state_dict_post_hooks",
    "peft.tuners.tuners_utils.BaseTunerLayer": "adapter_layer_names",
    "peft.utils.other.AuxiliaryTrainingWrapper": "original_module",
    "deepspeed.DeepSpeedEngine": "step optimizer is_gradient_accumulation_boundary was_step_applied _global_grad_norm "
    "_config zero_optimization_stage fp16_enabled",
    "deepspeed.runtime.config.DeepSpeedConfig": "zero_config",
    "deepspeed.runtime.zero.config.DeepSpeedZeroConfig": "offload_optimizer offload_param",
    "deepspeed.runtime.zero.partition_parameters": "ds_shape",
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": "clip_grad torch_autocast_gradscaler",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": "clip_grad torch_autocast_gradscaler",
}

# Methods that it calls or overrides, with parameters that must be there.
METHODS = {
    "transformers.Trainer.log": "logs start_time",
    "transformers.Trainer._save_checkpoint": "model trial",
    "transformers.Trainer._save_optimizer_and_scheduler": "output_dir",
    "transformers.Trainer._load_optimizer_and_scheduler": "checkpoint",
    "transformers.Trainer._save_rng_state": "output_dir",
    "transformers.Trainer.train": "resume_from_checkpoint",
    "transformers.Trainer.push_to_hub": "",
    "transformers.Trainer._save": "output_dir state_dict",
    "transformers.Trainer.save_model": "output_dir _internal_call",
    "transformers.Trainer.compute_loss": "model inputs",
    "transformers.Trainer.evaluation_loop": "",
    "transformers.Trainer.training_step": "model inputs",
    "transformers.Trainer.get_batch_samples": "epoch_iterator num_batches",
    "trl.trainer.base_trainer._BaseTrainer.create_model_card": "model_name dataset_name",
    "trl.trainer.utils.get_config_model_id": "config",
    "trl.TrlParser.parse_args_and_config": "args",
    **{
        f"trl.{name}Trainer.__init__": "model args train_dataset peft_config"
        for name in ("GRPO", "KTO", "Reward", "SFT")
    },
    "trl.DPOTrainer.__init__": "model args train_dataset peft_config eval_dataset quantization_config",
    "torch.optim.Optimizer.add_param_group": "param_group",
    "torch.optim.Optimizer.zero_grad": "set_to_none",
    "torch.optim.Optimizer.load_state_dict": "state_dict",
    "torch.distributed.checkpoint.state_dict._get_optim_state_dict": "info",
}


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


def check_name(path: str, name: str) -> None:
    library = path.split(".")[0]
    if library == "deepspeed":
        pytest.importorskip("deepspeed")
    owner = find(path)
    users = [file for file, text in PACKAGE.items() if re.search(rf"\b{name}\b", text)]
    there = owner is not None and has(owner, name)
    assert there, f"{path}.{name} is gone in {library} {version(library)}; it is used in {users}"


def imports() -> list[tuple[str, str]]:
    """(module, name) of everything that the package imports from these libraries."""
    nodes = [node for text in PACKAGE.values() for node in ast.walk(ast.parse(text))]
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom) and not n.level and n.module.split(".")[0] in LIBRARIES]
    return sorted({(node.module, alias.name) for node in froms for alias in node.names})


# ---- names ----


@pytest.mark.parametrize("part, option", [("options", "install_requires"), ("options.extras_require", "deepspeed")])
def test_versions(part, option):
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    for line in filter(None, setup[part][option].split("\n")):
        wanted = Requirement(line)
        if wanted.name == "deepspeed":
            pytest.importorskip("deepspeed")
        installed = version(wanted.name)
        fits = wanted.specifier.contains(installed.split("+")[0], prereleases=True)
        assert fits, (
            f"{wanted.name} {installed} is installed, setup.cfg asks for {wanted.specifier}: widen it, or mend"
        )


LISTED = [(path, name) for path, names in NAMES.items() for name in names.split()]


@pytest.mark.parametrize("path, name", imports() + LISTED)
def test_name(path, name):
    check_name(path, name)


@pytest.mark.parametrize("path, wanted", METHODS.items())
def test_method(path, wanted):
    owner, name = path.rsplit(".", 1)
    check_name(owner, name)
    there = inspect.signature(getattr(find(owner), name)).parameters
    assert set(wanted.split()) <= set(there), f"{path} has other parameters in {version(path.split('.')[0])}"


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
    missing = private - set(" ".join(NAMES.values()).split())
    missing |= {name for name in inherited if not name.startswith("__")} - {path.split(".")[-1] for path in METHODS}
    assert not missing, f"list these in NAMES or METHODS: {missing}"


# ---- what they do ----


def test_one_step_of_trainer(make_trainer, monkeypatch):
    """Clip, on_pre_optimizer_step, step, on_optimizer_step, zero_grad; hooks see micro-batches; callbacks in turn."""
    trainer = make_trainer(DPOTrainer, max_steps=1)
    param = [p for p in trainer.model.parameters() if p.requires_grad][-1]
    events = []
    note = lambda event: events.append((event, param.grad is not None))

    def callback(names, prefix=""):
        watch = {name: lambda *args, name=name, **kwargs: note(prefix + name) for name in names}
        return type("Watch", (TrainerCallback,), watch)()

    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: [note("clip"), clip(*args)][1])
    trainer.add_callback(callback(["on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]))
    trainer.add_callback(callback(["on_pre_optimizer_step"], "second "))
    param.register_hook(lambda grad: note("hook"))
    handle = register_optimizer_step_pre_hook(lambda *_: note("step"))
    trainer.train()
    handle.remove()
    without = [event for event, grad in events if not grad]
    assert [event for event, _ in events] == [
        *["hook", "on_substep_end", "hook", "clip", "on_pre_optimizer_step", "second on_pre_optimizer_step"],
        *["step", "on_optimizer_step", "on_step_end"],
    ] and without == ["hook", "on_step_end"], "Trainer steps in another order: mixin.py relies on this one"


def test_names_in_a_checkpoint():
    theirs = find("transformers.trainer").TRAINER_STATE_NAME, find("transformers.trainer_utils").PREFIX_CHECKPOINT_DIR
    assert theirs == (TRAINER_STATE_NAME, PREFIX_CHECKPOINT_DIR), "checkpoints.py has other names than Trainer"


def test_the_state_is_the_last_file_of_a_checkpoint():
    text = inspect.getsource(find("transformers.Trainer")._save_checkpoint)
    names = ("_save_optimizer_and_scheduler", "TRAINER_STATE_NAME", "rotate_checkpoints(")
    places = [text.find(name) for name in names]
    assert -1 not in places and places == sorted(places), "checkpoints.py takes it as the sign of a whole checkpoint"


def test_names_of_lora_parameters_and_the_reference_adapter(make_trainer):
    """TRL keeps the reference as a second adapter, `ref`, of a PeftModel that it is given; it must not be trained."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(**LORA))
    modules = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    names = sorted(block.name for block in lora_blocks(model))
    assert names == sorted(f"{name}:default" for name in modules), "adapters.py finds them by `adapter_layer_names`"
    trainer = make_trainer(DPOTrainer, model=model)
    assert set(trainer.model.peft_config) == {"default", "ref"}, "TRL keeps DPO's reference in another way"
    assert sorted(block.name for block in lora_blocks(trainer.model)) == names, (
        "adapters.py would filter the reference"
    )


def test_the_model_card_has_the_place_for_the_figures(make_trainer, tmp_path):
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
    same = added == groups and own == {"defaults", "state", "param_groups"}
    assert same, "Optimizer.__init__ does something else: optimizer.py undoes what it did before"


def test_a_trl_out_of_range_ends_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(trl_range, "version", lambda name: "1.99.0")
    for start in (
        lambda: command.main(["train", "recipes/quickstart/dpo.yaml"]),
        lambda: command.main(["measure"]),
        lambda: runpy.run_path(str(ROOT / "scripts/train.py"), run_name="__main__"),
    ):
        with pytest.raises(SystemExit, match=r"^error: nspo2_trl needs trl.*, and trl 1\.99\.0 is installed: `pip"):
            start()
    with pytest.raises(ImportError, match="trl 1.99.0 is installed"):
        getattr(nspo2_trl, "NSPO2DPOTrainer")  # noqa: B009
    command.main(["env"])
    assert "\n  trl " in capsys.readouterr().out and nspo2_trl.NSPO2Config  # neither needs TRL
