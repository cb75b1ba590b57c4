"""What new users type and have in their files: it works, or one sentence says what to change. Most trains nothing."""

import ast
import csv
import gzip
import inspect
import io
import json
import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import MODEL, ROOT
from datasets import Dataset
from rich.console import Console
from test_scripts import RECIPE, command, few_rows, refused
from transformers import AutoTokenizer, TrainerState
from transformers.utils.logging import set_verbosity_warning
from trl import DPOTrainer

from nspo2_trl.cli import checks, measure, retain, train
from nspo2_trl.cli.lines import WATCHED, BriefTable
from nspo2_trl.cli.recipe import make_parser, read_recipe
from nspo2_trl.cli.threads import few_threads
from nspo2_trl.cli.words import with_config
from nspo2_trl.metrics import METRICS

FEW_TEXTS = ["--nspo2_retain_samples", "8", "--nspo2_retain_project", "no"]
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
        ("{run_name: 7}", "run_name", "7"),
        ("{lr_scheduler_kwargs: {a: 1}}", "lr_scheduler_kwargs", {"a": 1}),
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
        ("{beta: true}", "`beta` must be a number, got True"),
        ("{dataset_name: [a, b]}", "`dataset_name` must be text, got ['a', 'b']"),
        ("{use_cpu: [1]}", "`use_cpu` must be true or false, got [1]"),
        ("{env: 3}", "`env` must be a mapping, got 3"),
        ("{truncation_mode: keep_middle}", "`truncation_mode` must be one of keep_end, keep_start"),
        ("{model_init_kwargs: 3}", "`model_init_kwargs` must be a mapping, got 3"),
        ("{help: true}", "sets `help`, which is no option"),
    ],
)
def test_values_in_a_recipe_that_fit_nowhere(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train.parse(in_recipe(tmp_path, text))


def test_merged_keys_of_a_recipe(tmp_path):
    text = "env: &base {A: b}\nmodel_init_kwargs:\n  <<: *base\n"
    (tmp_path / "r.yaml").write_text(text)
    assert read_recipe(tmp_path / "r.yaml", make_parser())["model_init_kwargs"] == {"A": "b"}


@pytest.mark.parametrize(
    "text, message", [("beta: 0.2\nbeta: 0.3", "`beta` stands twice"), ("beta: 'x", "while scanning")]
)
def test_a_recipe_that_is_no_yaml(tmp_path, capsys, text, message):
    (tmp_path / "r.yaml").write_text(f"{(ROOT / RECIPE).read_text()}\n{text}\n")
    assert f"is no YAML: {message}" in refused(capsys, [str(tmp_path / "r.yaml")])


@pytest.mark.parametrize("none", ["none", "null", ""])
def test_texts_of_a_recipe_are_left_out(tmp_path, none):
    argv = [RECIPE, "--use_cpu", "true", "--output_dir", str(tmp_path)]
    assert train.parse(argv)[1].nspo2_retain_dataset
    assert train.parse([*argv, "--nspo2_retain_dataset", none])[1].nspo2_retain_dataset is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config"], "`--config` takes one recipe"),
        (["--config", RECIPE, "--config", RECIPE], "`--config` takes one recipe"),
        ([RECIPE, "--use_cpu", "true", "stray"], "['stray'] belongs to no option"),
        (["recipes"], "`--config` 'recipes': is a folder, not a recipe"),
        ([], "give `--config RECIPE.yaml`"),
    ],
)
def test_one_recipe(capsys, argv, message):
    assert message in refused(capsys, argv)


def test_the_name_of_one_module_is_no_pattern(tmp_path):
    found = train.build(*train.parse(command(tmp_path, "--lora_target_modules", "q_proj", "--eval_strategy", "no")))
    adapted = {name.split(".lora_A")[0] for name, _ in found.model.named_parameters() if ".lora_A." in name}
    assert adapted and all(name.endswith(".q_proj") for name in adapted)


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
        (
            "--dataset_name nowhere",
            "`dataset_name`: there is no file or folder 'nowhere', and as a hub id it could not",
        ),
        ("--model_name_or_path docs", "`model_name_or_path`: the folder 'docs' has no config.json"),
        ("--lr_scheduler_kwargs {a", "`lr_scheduler_kwargs` is no JSON: Expecting property name"),
        ('--lr_scheduler_kwargs {"a":1}', "for `lr_scheduler_type: linear`: get_linear_schedule_with_warmup() got"),
        ("--lr_scheduler_type cosine_with_min_lr", "`lr_scheduler_kwargs` None for `lr_scheduler_type: cosine_with_"),
        ("--metric_for_best_model rewards/accuracie", "Did you mean `rewards/accuracies`?"),
        ("--label_smoothing 0.5", "`label_smoothing` must be a number from 0 to below 0.5, got 0.5"),
        ("--lora_dropout 1", "`lora_dropout` must be a number of at least 0 and below 1, got 1"),
        ("--eval_strategy steps --dataset_test_split train", "`dataset_test_split` is 'train', which is trained on"),
        ('--model_init_kwargs {"foo":1}', "`model_init_kwargs`: "),
        ('--accelerator_config {"foo":1}', "`accelerator_config`: a mapping has a key that is none: "),
        ("--accelerator_config 5", "`accelerator_config` must be a mapping as JSON, '{\"key\": 1}', or a file of one"),
        ("--gradient-checkpointing-kwargs=[1]", "must be a mapping as JSON"),
        ('--gradient_checkpointing_kwargs {"a":1}', "`gradient_checkpointing_kwargs`: 'a' is none of context_fn"),
        ("--lr_scheduler_kwargs 5", "`lr_scheduler_kwargs` must be a mapping"),
        ("--lr_scheduler_kwargs " + 300 * "a", "`lr_scheduler_kwargs` must be a mapping"),
        ("--gradient_checkpointing_kwargs setup.cfg", "`gradient_checkpointing_kwargs` must be a mapping"),
        ("--optim_args a=b=c", "`optim_args` must be key=value"),
        ("--optim_args 5", "`optim_args` must be key=value, separated by commas, got '5'"),
        ("--sync_ref_model true", "You passed `sync_ref_model=True` while using a PEFT model"),
        ("--eval_strategy no --adam_beta1 2", "Invalid beta parameter at index 0: 2.0"),
        ("--report_to nonesuch", "`report_to`: 'nonesuch' is none of azure_ml"),
        ("--report_to tensorbord", "Did you mean `tensorboard`?"),
        ("--push_to_hub true", "`push_to_hub`: the hub does not answer, or does not know you (Cannot reach"),
    ],
)
def test_values_that_cannot_work(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    said = refused(capsys, command(tmp_path, *options.split())).strip()
    assert message in said and said.startswith("error: ") and "\n" not in said
    assert not list(tmp_path.rglob("adapter*"))


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


# ---- files ----

PAIR = {"prompt": "Ada and", "chosen": " Bea sang in a café.", "rejected": " Bea cried."}
CSV = "prompt,chosen,rejected\n" + 4 * "Ada and, Bea sang in a café., Bea cried.\n"


def say(*texts) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]


CHAT = {"prompt": say("Sing"), "chosen": say("", "La")[1:], "rejected": say("", "No")[1:]}
TALK = {"prompt": "Sing ", "chosen": say("Sing", "La"), "rejected": say("Sing", "No")}  # UltraFeedback's shape
CALLS = PAIR | {"chosen": '[{"name": "f"}]', "rejected": "[{}]"}  # answers that are JSON
FULL = {"chosen": TALK["chosen"], "rejected": TALK["rejected"]}


def lines(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(*rows, write=json.dumps) -> str:
    """CSV with lists written as text."""
    out = io.StringIO()
    rows = [{k: v if isinstance(v, str) else write(v) for k, v in row.items()} for row in rows]
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read(path, *options) -> list[dict]:
    """The rows that a command line with the data `path` trains on."""
    argv = command(path.parent, "--dataset_name", str(path), "--eval_strategy", "no", *options)
    script_args, args, _, mixture = train.parse(argv)
    return list(train.splits(script_args, args, mixture)[0])


@pytest.mark.parametrize(
    "name, text, row",
    [
        ("a.jsonl", b"\xef\xbb\xbf" + lines(PAIR).encode(), PAIR),
        ("a.JSONL", lines(PAIR), PAIR),
        ("a.Jsonl.GZ", gzip.compress(lines(PAIR).encode()), PAIR),
        ("a.json", json.dumps([PAIR]), PAIR),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode(), PAIR),
        ("a.csv", CSV.replace("\n", "\r\n"), PAIR),
        *[("a.csv", CSV.replace(",", separator), PAIR) for separator in ";\t|"],
        ("a.TSV", CSV.replace(",", "\t"), PAIR),
        ("a.csv.gz", gzip.compress(CSV.replace(",", ";").encode()), PAIR),
        (
            "a.csv",
            "prompt,chosen,rejected\n2+2,4,NA\nnull,None,5\n",
            {"prompt": "2+2", "chosen": "4", "rejected": "NA"},
        ),
        ("a.csv", CSV.replace("prompt,chosen", "Prompt, CHOSEN "), PAIR),
        ("a.jsonl", lines({key.title(): text for key, text in PAIR.items()}), PAIR),
        ("a.csv", table(CHAT), CHAT),
        ("a.csv", table(CHAT, write=str), CHAT),
        ("a.jsonl", lines({key: json.dumps(value) for key, value in CHAT.items()}), CHAT),
        ("a.jsonl", lines(TALK), FULL),
        ("a.csv", table(TALK), FULL),
        ("a.jsonl", lines(FULL | {"prompt": say("Sing")}), FULL),
        ("a.jsonl", lines(CALLS), CALLS),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
@pytest.mark.parametrize("folder", [False, True])
def test_files_are_read(tmp_path, name, text, row, folder):
    path = tmp_path / "data" / name
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if folder and name != name.lower():
        pytest.skip("which files of a folder are data is datasets' business")
    assert read(path.parent if folder else path)[0] == row


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", lines(*3 * [{"chosen": "a"}], PAIR).encode("latin-1"), "a.jsonl, line 4 is not UTF-8"),
        ("a.jsonl", lines(PAIR).encode("utf-16"), "a.jsonl, line 1 is not UTF-8"),
        ("a.json", json.dumps([PAIR], ensure_ascii=False).encode("latin-1"), "a.json, line 1 is not UTF-8"),
        ("a.csv", CSV.encode("cp1252"), "a.csv, line 2 is not UTF-8"),
        ("a.jsonl", lines(PAIR) + "{oops\n", "JSON parse error in a.jsonl, line 2, column 2: Expecting"),
        ("a.jsonl", "[1]\n[2]\n", "a.jsonl, line 1 is no object"),
        ("a.csv", CSV + "a,b,c,d\n", "Expected 3 fields in line 6, saw 4"),
        ("a.csv", CSV + "a,b\n", "row 5 (the first is 1): `rejected` is empty"),
        ("a.jsonl.gz", b"nonsense", "a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(lines(*99 * [PAIR]).encode())[:-9], "a.jsonl.gz: Compressed file ended before"),
        ("a.parquet", b"nonsense", "could not be read: Parquet magic bytes not found"),
        *[(name, "", "is empty: DPO needs rows") for name in ("a.jsonl", "a.json", "a.csv")],
        *[(name, text, "is empty: DPO needs") for name, text in {"a.jsonl": "\n\n", "a.json": "[]"}.items()],
        ("a.csv", "prompt,chosen,rejected\n", "is empty: DPO needs"),
        ("a.jsonl", lines({"prompt": "a", "chosen": "b"}), "has no column `rejected`, it has prompt, chosen"),
        ("a.jsonl", lines(PAIR, PAIR, CHAT), "row 3 (the first is 1): `prompt` is messages, and in row 1 it is text"),
        ("a.jsonl", lines(CHAT, PAIR), "row 2 (the first is 1): `prompt` is text, and in row 1 it is messages"),
        (
            "a.jsonl",
            lines(TALK, TALK | {"prompt": "Cry"}),
            "row 2 (the first is 1): `prompt` is text, `chosen` is mess",
        ),
        (
            "a.csv",
            table(CHAT, CHAT | {"chosen": "La"}),
            "row 2 (the first is 1): `chosen` must be messages as in row 1",
        ),
        ("a.csv", table(CHAT | {"chosen": [{"from": "gpt"}], "rejected": [{"from": "gpt"}]}), "has a message without"),
        ("a.jsonl", lines(*9 * [CHAT]), "has no chat template: take an instruct model"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_files_that_cannot_be_used(tmp_path, capfd, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused(capfd, command(tmp_path, "--dataset_name", str(tmp_path / name), "--eval_strategy", "no"))
    assert message in said and said.startswith("error: ") and "\n" not in said
    assert "Failed to" not in capfd.readouterr().err  # what datasets logs


@pytest.mark.parametrize(
    "text, message",
    [
        (lines(*3 * [CHAT]), "has no chat template: take an instruct model"),
        (lines(*9 * [PAIR], *9 * [CHAT]), "row 10 (the first is 1): `prompt` is messages, and in row 1 it is text"),
        (lines(*9 * [PAIR], PAIR | {"chosen": None}), "row 10 (the first is 1): `chosen` is missing"),
    ],
    ids=["template", "mixed", "missing"],
)
def test_rows_of_a_stream_are_looked_at_as_they_come(tmp_path, capsys, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    argv = command(tmp_path, "--dataset_name", str(tmp_path / "a.jsonl"), "--eval_strategy", "no")
    argv += ["--dataset_streaming", "true", *FEW_TEXTS]
    said = refused(capsys, argv).strip()
    assert message in said and said.startswith("error: ") and "\n" not in said


def test_messages_in_cells_may_have_keys_that_others_lack(tmp_path):
    named = CHAT | {"prompt": [{"role": "user", "content": "Sing", "name": "Ada"}]}
    (tmp_path / "a.csv").write_text(table(*1100 * [CHAT], named))
    assert [rows["prompt"][0]["name"] for rows in read(tmp_path / "a.csv")] == 1100 * [None] + ["Ada"]


def test_whole_texts_with_a_prompt_are_told(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(PAIR | {"chosen": "Ada and Bea sang.", "rejected": "Ada and Bea cried."}))
    assert read(path)[0]["prompt"] == PAIR["prompt"]
    assert "all begin with `prompt`; if they are whole texts, remove that column" in capsys.readouterr().out


def test_pairs_for_nspo2_retain(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    args = SimpleNamespace(dataset_name=str(tmp_path / "a.csv"), max_length=16)
    (tmp_path / "a.csv").write_text(CSV.replace("prompt,chosen", "Prompt,Chosen").replace("Ada and", "Ada " * 16, 1))
    assert len(retain.load_pairs(args, tokenizer)[0]) == 3
    assert "1 of 4 held-out pairs are left out: their prompts alone fill `--max_length`" in capsys.readouterr().out
    (tmp_path / "a.csv").write_text(table(CHAT))
    with pytest.raises(ValueError, match="has no chat template"):
        retain.load_pairs(args, tokenizer)
    options = retain.parse(
        [
            "a",
            "--retain_dataset",
            "b",
            "--dataset_name",
            "d",
            "--output_dir",
            "c",
            "--ranks",
            "1,4",
            "--point",
            "[4, 1.2]",
        ]
    )
    assert options.ranks == [1, 4] and (options.point.rank, options.point.scale) == (4, 1.2)


# ---- rows that are too long ----


@pytest.mark.parametrize("lost", [1, 6, 7])
@pytest.mark.parametrize("held_out", ["no", "steps"])
def test_rows_with_too_long_a_prompt_are_counted(tmp_path, caplog, lost, held_out):
    rows = few_rows(tmp_path / "a.jsonl", 12 if held_out == "no" else 13)
    for row in rows[3 : 3 + lost]:
        row["prompt"] = "Ada " * 200
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    argv = command(tmp_path, "--dataset_name", str(tmp_path / "a.jsonl"), "--eval_strategy", held_out)
    words = (
        "12 training rows are left out, since their prompts alone have `max_length` (128) tokens or more; the first"
    )
    if lost > 6:
        with pytest.raises(ValueError, match="go on with `--allow_dropped_rows true`"):
            train.build(*train.parse(argv))
        argv += ["--allow_dropped_rows", "true"]
    train.build(*train.parse(argv))
    said = caplog.text
    assert words in said and "(the first is 1), 'Ada Ada Ada " in said
    assert held_out == "steps" or f"{lost} of {words} is row 4 (" in said


@pytest.mark.parametrize("options", ["--dataset_streaming true", "--dataloader_drop_last true --max_length 999"])
@pytest.mark.parametrize("start", [train.main, measure.main])
def test_a_run_without_a_step_is_no_success(tmp_path, capsys, options, start):
    rows = few_rows(tmp_path / "a.jsonl", 3)
    (tmp_path / "a.jsonl").write_text(lines(*(row | {"prompt": "Ada " * 200} for row in rows)))
    argv = command(tmp_path, "--dataset_name", str(tmp_path / "a.jsonl"), "--eval_strategy", "no", *options.split())
    with pytest.raises(SystemExit) as stopped:
        start([*argv, "--per_device_train_batch_size", "4", "--nspo2_retain_dataset", "none"])
    assert "error: no step was taken, since the training data gives no batch" in str(stopped.value)
    assert not list(tmp_path.rglob("adapter*")) and not list(tmp_path.rglob("noise.json"))


def test_rows_that_a_script_loses_or_lacks(tmp_path, pairs, make_trainer, caplog):
    rows = pairs.select(range(6)).to_list()
    rows[2]["prompt"] = "Ada " * 200
    make_trainer(trainer={"train_dataset": Dataset.from_list(rows)}, max_length=128)
    assert "1 of 6 training rows are left out, since their prompts alone have `max_length` (128)" in caplog.text
    rows[4]["rejected"] = None
    with pytest.raises(ValueError, match=r"Row 5 of `train_dataset` \(the first is 1\) has no `rejected`"):
        make_trainer(trainer={"train_dataset": Dataset.from_list(rows)})


def test_measuring_a_diverged_run_is_no_success(tmp_path, capsys):
    argv = command(tmp_path, "--eval_strategy", "no", "--learning_rate", "1e30", "--nspo2_retain_dataset", "none")
    with pytest.raises(SystemExit) as stopped:
        measure.main([*argv, "--warmup_steps", "0", "--max_steps", "5"])
    assert "error: the loss or a gradient was not finite from step" in str(stopped.value)


# ---- what is there already ----


def test_a_finished_runs_folder_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/trainer_state.json").write_text("{}")
    argv = command(tmp_path, "--resume_from_checkpoint", str(tmp_path / "run"))
    assert "has an adapter, but no optimizer to go on with: name a folder checkpoint-N" in refused(capsys, argv)


@pytest.mark.parametrize(
    "there, kind",
    [("adapter_config.json", "an adapter"), ("adapter_model.bin", "an adapter"), ("model.safetensors", "a")],
)
def test_what_was_trained_is_not_overwritten(tmp_path, capsys, there, kind):
    argv = command(tmp_path, "--save_strategy", "no")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).touch()
    said = refused(capsys, argv)
    assert said.startswith("error: `--output_dir` '") and f"holds {kind}" in said and "choose another folder" in said
    (tmp_path / "out/checkpoint-3").mkdir()
    (tmp_path / "out/checkpoint-3/trainer_state.json").write_text("{}")
    args = train.parse([*argv, "--resume_from_checkpoint", "true"])[1]
    assert train.checkpoint_to_resume(args)  # to go on is to be told


# ---- what is shown ----


@pytest.mark.parametrize("options", ["", "--disable_tqdm false", "--log_level debug"])
def test_lines_have_what_people_watch(tmp_path, capsys, options):
    train.main(command(tmp_path, *options.split(), *FEW_TEXTS, "--eval_steps", "2", steps=2))
    set_verbosity_warning()
    shown = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{'")]
    steps, evaluations = ([line for line in shown if name in line] for name in ("loss", "eval_loss"))
    assert steps[0].keys() >= {"loss", "rewards/accuracies", "rewards/margins", "learning_rate", "nspo2/active"}
    assert list(steps[0])[1] == "rewards/accuracies" and evaluations[0].keys() >= {"eval_loss", "eval_retain_kl"}
    for line in shown:
        assert (len(line) > 12) == ("debug" in options and line in steps + evaluations) or "train_loss" in line
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert "logps/chosen" in state["log_history"][1]


def test_a_narrow_terminal_has_the_rewards_in_sight(tmp_path):
    names = [*WATCHED, *(f"nspo2/{name}" for name in METRICS), "logps/chosen", "logits/chosen"]
    for level, wanted in (("passive", ["accuracies", "margins", "noise_scale"]), ("info", ["accuracies", "margins"])):
        table = BriefTable()
        args, state = SimpleNamespace(log_level=level), TrainerState(max_steps=2, is_world_process_zero=True)
        table.on_train_begin(args, state, None)
        table.on_log(args, state, None, logs={name: 0.5 for name in reversed(names) if "eval" not in name})
        table.rich_group.stop()
        out = Console(width=80, file=io.StringIO())
        out.print(table.training_status.renderable)
        shown = "\n".join(out.file.getvalue().splitlines()[:20])
        assert all(word in shown for word in wanted), shown


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
