"""What new users type and have in their files: it works, or one sentence says what to change. Most trains nothing."""

import inspect
import re
from importlib.util import find_spec

import pytest
import torch
import yaml
from conftest import ROOT
from test_scripts import RECIPE, command, refused
from trl import DPOTrainer

from nspo2_trl.cli import checks, train
from nspo2_trl.cli.threads import few_threads
from nspo2_trl.cli.words import with_config

pytestmark = pytest.mark.usefixtures("in_the_repository")


def parsed(tmp_path, *options):
    """Options and values of the command line `options`, of all kinds together."""
    found = train.parse(command(tmp_path, *options))
    return {name: value for part in found for name, value in vars(part).items()}


# ---- the command line ----


@pytest.mark.parametrize(
    "argv, meant",
    [
        ("r.yaml --max_steps 3", "--config r.yaml --max_steps 3"),
        ("recipe --max_steps 3", "--config recipe --max_steps 3"),
        ("--max_steps 3 r.YML", "--config r.YML --max_steps 3"),
        ("--max_steps 3 --config=r.yaml", "--max_steps 3 --config r.yaml"),
        ("--fsdp_config f.yaml --config r.yaml", "--fsdp_config f.yaml --config r.yaml"),
        ("--fsdp_config f.yaml", "--fsdp_config f.yaml"),
        ("--max_steps 3", "--max_steps 3"),
    ],
)
def test_a_recipe_needs_no_option(argv, meant):
    assert with_config(argv.split()) == meant.split()


def test_a_recipe_without_an_option_is_read():
    assert train.parse([RECIPE, "--use_cpu", "true"])[1].max_steps == 100


@pytest.mark.parametrize("number", ["1e-3", "-1"])
def test_numbers_are_no_options(tmp_path, number):
    assert parsed(tmp_path, "--max_grad_norm", "1", "--router_aux_loss_coef", number)["router_aux_loss_coef"] == float(
        number
    )


@pytest.mark.parametrize(
    "options, name, value",
    [
        ("--loss_type sft,sigmoid", "loss_type", ["sft", "sigmoid"]),
        ("--loss_type=sft,sigmoid", "loss_type", ["sft", "sigmoid"]),
        ("--loss_type sft sigmoid --loss_weights [1.0, 0.5]", "loss_weights", [1.0, 0.5]),
        ("--loss_type sft sigmoid --loss-weights 1.0,0.5", "loss_weights", [1.0, 0.5]),
        ("--lora_target_modules q_proj,v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        (r"--lora_target_modules .*\.\d{1,2}\..*q_proj", "lora_target_modules", r".*\.\d{1,2}\..*q_proj"),
        ("--report_to tensorboard wandb", "report_to", ["tensorboard", "wandb"]),
        ("--report_to none", "report_to", []),
        ("--optim_target_modules a,b", "optim_target_modules", ["a", "b"]),
        ("--optim_target_modules all-linear", "optim_target_modules", "all-linear"),
    ],
)
def test_lists_on_the_command_line(tmp_path, options, name, value):
    assert parsed(tmp_path, *options.split())[name] == value


def in_recipe(tmp_path, text: str) -> list[str]:
    """The command line of the quick start's recipe with lines `text` in the place of its own."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(yaml.safe_load(open(RECIPE)) | (yaml.safe_load(text) or {})))
    return [str(tmp_path / "r.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("{loss_type: [sft, sigmoid], loss_weights: [1.0, 5e-1]}", "loss_weights", [1.0, 0.5]),
        ("{loss_type: 'sft, sigmoid', loss_weights: '1, 0.5'}", "loss_weights", [1.0, 0.5]),
        ("{loss_weights: 2}", "loss_weights", [2.0]),
        ("{loss_type: sft}", "loss_type", ["sft"]),
        ("{report_to: [tensorboard, wandb]}", "report_to", ["tensorboard", "wandb"]),
        ("{lora_modules_to_save: lm_head}", "lora_modules_to_save", ["lm_head"]),
        ("{eval_strategy: no}", "eval_strategy", "no"),
    ],
)
def test_lists_in_a_recipe(tmp_path, text, name, value):
    found = train.parse(in_recipe(tmp_path, text))
    assert {key: one for part in found for key, one in vars(part).items()}[name] == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("{loss_weights: [one]}", "`loss_weights` must be a list of numbers, got ['one']"),
        ("{loss_weights: [[1.0, 0.5]]}", "`loss_weights` must be a list of numbers"),
        ("{beta: [1.0]}", "`beta` must be a number, got [1.0]"),
        ("{truncation_mode: keep_middle}", "`truncation_mode` must be one of keep_end, keep_start"),
    ],
)
def test_values_in_a_recipe_that_fit_nowhere(tmp_path, capsys, text, message):
    assert message in refused(capsys, in_recipe(tmp_path, text))


def test_a_recipe_in_another_encoding(tmp_path, capsys):
    text = "# café\n" + (ROOT / "recipes/quickstart/dpo.yaml").read_text()
    (tmp_path / "r.yaml").write_bytes(text.encode("utf-8-sig"))
    assert train.parse([str(tmp_path / "r.yaml"), "--use_cpu", "true"])
    (tmp_path / "r.yaml").write_bytes(text.encode("latin-1"))
    assert "r.yaml' is no YAML: 'utf-8' codec can't decode byte 0xe9" in refused(capsys, [str(tmp_path / "r.yaml")])


# ---- values, packages, the hub ----


@pytest.mark.parametrize(
    "options, message",
    [
        ("--learning_rate -1e-3", "`learning_rate` must be a number of at least 0, got -0.001"),
        ("--learning_rate=-1", "`learning_rate` must be a number of at least 0, got -1.0"),
        ("--learning_rate nan", "`learning_rate` must be a number of at least 0, got nan"),
        ("--beta -.1", "`beta` must be a number of at least 0, got -0.1"),
        ("--max_length 0", "`max_length` must be a whole number of at least 1, or null, got 0"),
        ("--max_steps 0", "`max_steps` must be a whole number of at least 1, or -1, got 0"),
        ("--lora_r 0", "`lora_r` must be a whole number of at least 1, got 0"),
        ("--loss_type sigmod", "`loss_type`: 'sigmod' is none of sigmoid, hinge"),
        ("--f_divergence_type kl", "`f_divergence_type` must be one of reverse_kl, forward_kl"),
        ("--output_dir=", "`output_dir` is empty: name a folder, it will be made"),
        ("--model_name_or_path=", "`model_name_or_path` is missing"),
        ("--dataset_name=", "`dataset_name` is missing"),
        ("--report_to nonesuch", "`report_to`: 'nonesuch' is none of azure_ml"),
        ("--report_to tensorbord", "Did you mean `tensorboard`?"),
        ("--push_to_hub true", "`push_to_hub`: the hub does not answer, or does not know you (Cannot reach"),
    ],
)
def test_values_that_cannot_work(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    said = refused(capsys, command(tmp_path, *options.split()))
    assert message in said and said.startswith("error: ") and "\n" not in said


@pytest.mark.parametrize(
    "package, options, message",
    [
        ("wandb", "--report_to wandb", "`report_to`: wandb is not installed: `pip install wandb`, or set"),
        ("clearml", "--report_to clearml,comet_ml", "`report_to`: clearml is not installed"),
        ("bitsandbytes", "--optim paged_adamw_8bit", "`optim`: You need to install `bitsandbytes`"),
        ("bitsandbytes", "--load_in_4bit true", "`load_in_4bit`: Using `bitsandbytes` 4-bit"),
        ("lomo_optim", "--optim lomo", "`optim`: You need to install `lomo_optim`"),
        ("flash_attn", "--attn_implementation flash_attention_2", "`attn_implementation`: FlashAttention2 has been"),
        ("liger_kernel", "--use_liger_kernel true", "`use_liger_kernel`: You have set `use_liger_kernel`"),
    ],
)
def test_packages_that_are_not_there(tmp_path, capsys, package, options, message):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    said = refused(capsys, command(tmp_path, "--eval_strategy", "no", *options.split())).strip()
    assert message in said and said.startswith("error: ") and "\n" not in said


def test_the_losses_are_trls():
    source = inspect.getsource(DPOTrainer)
    names = re.search(r"Should be one of \[(.*?)\]", source, re.S).group(1)
    assert re.findall(r"'(\w+)'", names) == checks.LOSS_TYPES
    assert re.findall(r'self\.f_divergence_type == "(\w+)"', source) == checks.DIVERGENCES


# ---- threads ----


def test_a_cpu_gets_one_thread_unless_it_is_told(monkeypatch, capsys):
    for variable, on_cpu, threads in ((None, True, 1), ("2", True, 2), (None, False, 2)):
        torch.set_num_threads(2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        few_threads(on_cpu)
        assert torch.get_num_threads() == threads
        assert ("OMP_NUM_THREADS sets another" in capsys.readouterr().out) == (threads == 1)
    torch.set_num_threads(1)
