"""The recipes: each parses, a misspelt key is refused, its READMEs' commands parse, and it trains a tiny model of its
architecture with its chat template. The launch configs: each parses, and the one for two CPU processes runs."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import trl
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, launch_and_log
from peft import LoraConfig
from retained import sentences
from safetensors.torch import load_file
from test_scripts import few_rows
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_bitsandbytes_available
from trl import get_peft_config, get_quantization_config

from nspo2_trl import NSPO2Config, NSPO2DPOConfig
from nspo2_trl.cli import train
from nspo2_trl.training.options import nspo2_options

CONFIGS = sorted((ROOT / "recipes/accelerate_configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*/dpo/*.yaml"))
READMES = sorted((ROOT / "recipes").glob("*/README.md"))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# of each model: the class of its config, its chat template (a file of TRL's, or the text) and its special tokens, the
# one that ends a turn first. Llama has no token for padding.
LLAMA_TOKENS = ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", CHATML, ["<|im_end|>", "<|im_start|>"]),
    "Qwen/Qwen3-0.6B": ("qwen3", "qwen3.jinja", ["<|im_end|>", "<|im_start|>", "<think>", "</think>"]),
    "Qwen/Qwen3-8B": ("qwen3", "qwen3.jinja", ["<|im_end|>", "<|im_start|>", "<think>", "</think>"]),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", "llama3_2.jinja", LLAMA_TOKENS),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", "llama3_1.jinja", LLAMA_TOKENS),
}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}

pytestmark = pytest.mark.usefixtures("in_the_repository")
each_recipe = pytest.mark.parametrize(
    "path", [str(path.relative_to(ROOT)) for path in RECIPES], ids=lambda path: path.split("/", 1)[1][:-5]
)


# ---- every recipe ----


@each_recipe
def test_parses(path):
    wanted = yaml.safe_load(Path(path).read_text())
    script_args, args, model_args, _ = train.parse(["--config", path, "--use_cpu", "true"])
    assert type(args) is NSPO2DPOConfig and args.bf16 and args.gradient_checkpointing
    for key, value in wanted.items():  # nothing was dropped or read as something else
        found = [getattr(part, key) for part in (script_args, args, model_args) if hasattr(part, key)]
        assert found[0] == ([] if value == "none" else value), key
    assert NSPO2Config(**nspo2_options(args)).projection_rank == args.nspo2_projection_rank > 0
    assert args.gradient_accumulation_steps >= 4  # samples of the noise
    lora, quantization = get_peft_config(model_args), get_quantization_config(model_args)
    assert type(lora) is LoraConfig and lora.target_modules == "all-linear"
    assert bool(quantization) == wanted.get("load_in_4bit", False)
    if quantization:
        assert quantization.bnb_4bit_quant_type == "nf4" and quantization.bnb_4bit_use_double_quant
        assert str(quantization.bnb_4bit_compute_dtype) == "torch.bfloat16"
    kind = MODELS[model_args.model_name_or_path][0]
    assert AutoConfig.for_model(kind, **SHAPE).model_type == kind
    assert args.output_dir == f"out/{path.split('/')[1]}-{Path(path).stem}"


@each_recipe
def test_a_misspelt_key_is_refused(path, tmp_path):
    recipe = yaml.safe_load(Path(path).read_text())
    for key in recipe:
        wrong = key[:2] + key[3:]  # a letter is missing
        (tmp_path / "typo.yaml").write_text(yaml.safe_dump({wrong if k == key else k: v for k, v in recipe.items()}))
        with pytest.raises(ValueError, match=f"sets `{wrong}`, which is no option. Did you mean `{key}`"):
            train.parse(["--config", str(tmp_path / "typo.yaml")])


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_commands_of_the_readmes_parse(path):
    blocks = "".join(re.findall(r"```bash\n(.*?)```", path.read_text(), re.S)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines()]
    launched = [words for words in commands if words[:2] == ["accelerate", "launch"]]
    assert launched and all(Path(words[1]).is_file() for words in commands if words[0] == "python")
    for words in launched:
        options = launch_command_parser().parse_args(words[2:])
        assert options.training_script == "scripts/train.py"
        assert options.config_file is None or Path(options.config_file) in [p.relative_to(ROOT) for p in CONFIGS]
        train.parse([*options.training_script_args, "--use_cpu", "true"])
    used = {word for words in launched for word in words}
    assert {str(p.relative_to(ROOT)) for p in RECIPES if path.parent in p.parents} <= used


# ---- every recipe trains ----


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder for each of the two data sets: local rows of the same shape as the hub's."""
    folder = tmp_path_factory.mktemp("rows")
    turn = lambda role, text: {"role": role, "content": text}
    shapes = {
        "trl-lib/ultrafeedback_binarized": lambda p, c, r: {
            "chosen": [turn("user", p), turn("assistant", c)],
            "rejected": [turn("user", p), turn("assistant", r)],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        "trl-lib/hh-rlhf-helpful-base": lambda p, c, r: {
            "prompt": [turn("user", p), turn("assistant", "Go on."), turn("user", p)],
            "chosen": [turn("assistant", c)],
            "rejected": [turn("assistant", r)],
        },
    }
    (folder / "NeelNanda/pile-10k").mkdir(parents=True)
    (folder / "NeelNanda/pile-10k/train.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}) for text in sentences())
    )
    texts = [
        [row[k].strip()[:60] for k in ("prompt", "chosen", "rejected")] for row in few_rows(folder / "all.jsonl", 26)
    ]
    for name, shape in shapes.items():
        (folder / name).mkdir(parents=True)
        for split, part in (("train", texts[:24]), ("test", texts[24:])):
            (folder / name / f"{split}.jsonl").write_text("\n".join(json.dumps(shape(*text)) for text in part))
    return folder


@pytest.fixture(scope="module")
def tiny(rows):
    """`make(hub id)`: the folder of a tiny model of that architecture, with such a tokenizer and chat template."""

    def make(name: str) -> Path:
        folder = rows / "models" / name
        if not folder.is_dir():
            kind, template, special = MODELS[name]
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
            trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, **options)
            tokenizer.train([str(rows / "all.jsonl")], trainer)
            fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])
            if special is LLAMA_TOKENS:
                fast.bos_token = special[1]
            if template.endswith(".jinja"):
                template = (Path(trl.__file__).parent / "chat_templates" / template).read_text()
            fast.chat_template = template
            fast.save_pretrained(folder)
            config = AutoConfig.for_model(kind, **SHAPE, vocab_size=len(fast), eos_token_id=fast.eos_token_id)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


@each_recipe
def test_trains_a_tiny_model(path, rows, tiny, tmp_path):
    recipe = yaml.safe_load(Path(path).read_text())
    options = {
        "config": path,
        "model_name_or_path": tiny(recipe["model_name_or_path"]),
        "dataset_name": rows / recipe["dataset_name"],
        "output_dir": tmp_path,
        "max_steps": 5,
        "use_cpu": True,
        "per_device_train_batch_size": 1,
        "max_length": 320,
        "logging_steps": 1,
        "nspo2_update_freq": 2,
        "disable_tqdm": True,
    }
    retained = "nspo2_retain_dataset" in recipe
    if retained:
        options |= {"nspo2_retain_dataset": rows / recipe["nspo2_retain_dataset"], "nspo2_retain_rank": 4}
    if not is_bitsandbytes_available():
        options["load_in_4bit"] = False
    if "hh_helpful" in path:  # bfloat16 is slow on many CPUs: once for each model is enough
        options |= {"bf16": False, "dtype": "float32"}
    train.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry]
    evaluations = 3 if retained else 2  # a run that projects evaluates once more, after it
    assert len(losses) == 5 + evaluations and all(map(math.isfinite, losses))
    assert any(entry.get("nspo2/active", 0) > 0 and "nspo2/variance_reduction" in entry for entry in history)
    assert retained == any("nspo2/retain_kl_unprojected" in entry for entry in history)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    learned = [name for name, weight in adapter.items() if "lora_B" in name and weight.any()]
    assert len(learned) == 2 * 7  # B starts at zero; seven linear layers in each of two


# ---- launch configs ----


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_launch_configs_parse(path):
    config = load_config_from_file(str(path))  # raises on unknown keys
    kind = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "cpu_2proc": "MULTI_GPU"}[path.stem]
    assert config.distributed_type == kind
    assert (config.num_processes > 1) == (path.stem != "single_gpu")
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


def test_the_two_process_config_runs(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "recipes/accelerate_configs/cpu_2proc.yaml", "scripts/train.py"]
    command += ["--config", "recipes/quickstart/dpo.yaml", "--use_cpu", "true", "--max_steps", "6"]
    command += ["--nspo2_update_freq", "2", "--eval_strategy", "no", "--logging_steps", "1"]
    command += ["--output_dir", str(tmp_path)]
    output = launch_and_log(command, tmp_path / "log", timeout=150)
    assert "NSPO2, mean of what was logged" in output and "nspo2/variance_reduction" in output, output[-3000:]
    assert (tmp_path / "adapter_model.safetensors").is_file()
