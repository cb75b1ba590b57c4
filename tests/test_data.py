"""Every shape of data that DPO takes, columns by other names, and bad rows refused by their number."""

import json

import pytest
import yaml
from conftest import ROOT, write
from datasets import Dataset, DatasetDict, IterableDataset
from test_scripts import command, few_rows, logged, refused

from nspo2_trl.cli import train

pytestmark = pytest.mark.usefixtures("in_the_repository")


def loaded(tmp_path, *options):
    """The train and evaluation set of the command line `options`."""
    script_args, args, _, mixture = train.parse(command(tmp_path, *options))
    return train.splits(script_args, args, mixture)


def say(role, text, **more):
    return [{"role": role, "content": text} | more]


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHAT = {"prompt": say("user", "a"), "chosen": say("assistant", "b"), "rejected": say("assistant", "c")}


@pytest.mark.parametrize("columns", [("prompt", "chosen", "rejected"), ("chosen", "rejected")])
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_kinds_of_local_data(tmp_path, kind, columns):
    """Text files are those of test_stumbles::test_files_are_read."""
    path, rows = tmp_path / f"pairs.{kind}", few_rows(tmp_path / "rows.jsonl", columns=columns)
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        DatasetDict(train=Dataset.from_list(rows)).save_to_disk(path)
    training, held_out = loaded(tmp_path, "--dataset_name", str(path))
    assert len(training) == 38 and len(held_out) == 2
    assert sorted(training.column_names) == sorted(columns)
    assert rows[0]["chosen"] in [*training["chosen"], *held_out["chosen"]]


# ---- columns by other names ----


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_columns_by_other_names(tmp_path, streaming):
    rows = few_rows(tmp_path / "rows.jsonl", 12)
    other = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "chosen": "no"} for r in rows]
    path = write(tmp_path / "other.jsonl", other)
    names = ["--prompt_column", "question", "--chosen_column", "good", "--rejected_column", "bad"]
    options = ["--dataset_name", path, "--eval_strategy", "no", "--dataset_streaming", streaming, *names]
    training, _ = loaded(tmp_path, *options)
    assert isinstance(training, IterableDataset) == (streaming == "true")
    assert list(training) == [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("better", ["rejected", "other"])
def test_columns_that_change_places(tmp_path, streaming, better):
    path = write(tmp_path / "swapped.jsonl", [{"prompt": "a", "chosen": "worse", better: "better"}] * 4)
    names = ["--chosen_column", better, "--rejected_column", "chosen", "--dataset_streaming", streaming]
    training, _ = loaded(tmp_path, "--dataset_name", path, "--eval_strategy", "no", *names)
    assert list(training)[0] == {"prompt": "a", "chosen": "better", "rejected": "worse"}


def test_a_column_that_is_not_there_is_refused(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"question": "a", "chosen": "b", "rejected": "c"}])
    said = refused(capsys, command(tmp_path, "--dataset_name", path, "--prompt_column", "questoin"))
    assert said == (
        "error: `prompt_column`: the dataset has no column 'questoin', it has question, chosen, rejected. "
        "Did you mean `question`?"
    )


# ---- bad rows ----


@pytest.mark.parametrize(
    "good, bad, message",
    [
        (GOOD, {"rejected": None}, "`rejected` is missing"),
        (GOOD, {"chosen": ""}, "`chosen` is empty"),
        (GOOD, {"prompt": None}, "`prompt` is missing"),
        (CHAT, {"chosen": []}, "`chosen` is empty"),
        (CHAT, {"prompt": []}, "`prompt` is empty"),
        (CHAT, {"rejected": [{"role": None, "content": "c"}]}, "`rejected` has a message without `role`"),
        (CHAT, {"rejected": [{"role": "assistant", "content": None}]}, "`rejected` has a message without `content`"),
    ],
)
def test_the_first_bad_row_is_named(tmp_path, capsys, good, bad, message):
    path = write(tmp_path / "rows.jsonl", [good] * 1203 + [good | bad] + [good] * 3 + [good | bad])
    said = refused(capsys, command(tmp_path, "--dataset_name", path, "--model_name_or_path", "no/such-model"))
    assert f"rows.jsonl, split train`, row 1204 (the first is 1): {message}" in said and said.startswith("error: ")


@pytest.mark.parametrize(
    "row, message",
    [
        (GOOD | {"prompt": say("user", "a")}, "`prompt` is messages, `chosen` is text, `rejected` is text: make them"),
        (GOOD | {"chosen": 3}, "`chosen` is int, it must be text or a list of messages"),
        (GOOD | {"chosen": ["b"]}, "`chosen` has a message without `role`"),
    ],
)
def test_kinds_of_columns_that_do_not_fit(tmp_path, capsys, row, message):
    path = write(tmp_path / "rows.jsonl", [row] * 3)
    assert f"row 1 (the first is 1): {message}" in refused(capsys, command(tmp_path, "--dataset_name", path))


def test_rows_of_the_test_split_are_looked_at_too(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train.jsonl", [GOOD] * 8)
    write(tmp_path / "data/test.jsonl", [GOOD] * 2 + [GOOD | {"chosen": ""}])
    said = refused(capsys, command(tmp_path, "--dataset_name", str(tmp_path / "data")))
    assert "split test`, row 3" in said


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (1, "", "has one row, none can be held out"),
        (12, "--max_length 3 --eval_strategy no --allow_dropped_rows true", "No row of the training set is left"),
    ],
)
def test_nothing_left_to_train_on(tmp_path, capsys, rows, options, message):
    few_rows(tmp_path / "rows.jsonl", rows)
    argv = command(tmp_path, "--dataset_name", str(tmp_path / "rows.jsonl"), *options.split())
    assert message in refused(capsys, argv)


def test_what_teaches_nothing_is_counted(tmp_path, capsys):
    rows = few_rows(tmp_path / "rows.jsonl", 12)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["chosen"] = rows[5]["chosen"] * 9
    path = write(tmp_path / "odd.jsonl", rows)
    options = ["--dataset_name", path, "--eval_strategy", "no", "--max_length", "100"]
    train.build(*train.parse(command(tmp_path, *options)))
    said = capsys.readouterr().out
    assert "in 1 of 12 rows `chosen` and `rejected` are the same; they teach nothing." in said
    assert "1 of 12 training pairs are longer than `max_length` (100) and are cut." in said


# ---- what TRL does with data stays ----


def test_a_mixture(tmp_path):
    rows = few_rows(tmp_path / "all.jsonl", 30)
    parts = [write(tmp_path / f"{i}.jsonl", rows[i::2]) for i in range(2)]
    recipe = yaml.safe_load((ROOT / "recipes/quickstart/dpo.yaml").read_text()) | {"test_split_size": 0.2}
    recipe["datasets"] = [{"path": "json", "data_files": part} for part in parts]
    del recipe["dataset_name"]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(recipe))
    argv = ["--config", str(tmp_path / "mixture.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    script_args, args, _, mixture = train.parse(argv)
    training, held_out = train.splits(script_args, args, mixture)
    assert (len(training), len(held_out)) == (24, 6)


@pytest.mark.parametrize(
    "options",
    [
        "--precompute_ref_log_probs true --loss_type ipo --beta 0.3",
        "--dataset_streaming true --eval_strategy no --max_length 24 --truncation_mode keep_end",
    ],
)
def test_settings_of_trl_that_touch_the_data(tmp_path, options):
    train.main(command(tmp_path, *options.split(), steps=3))
    steps = [entry for entry in logged(tmp_path / "out") if "loss" in entry]
    assert len(steps) == 3 and steps[-1]["nspo2/active"] == 1


def test_tools_columns_are_left_alone(tmp_path):
    tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}
    path = write(tmp_path / "tools.jsonl", [CHAT | {"tools": json.dumps([tool])}] * 8)
    training, _ = loaded(tmp_path, "--dataset_name", path, "--eval_strategy", "no")
    assert json.loads(training[0]["tools"]) == [tool]
