"""scripts/bench/retain: the judge on frontiers made by hand, and a study of the quick start's model, tiny."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import write
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from bench import retain, retain_about, retain_gain, retain_judge, retain_page, retain_texts, retain_trainers

from nspo2_trl.projections.retain.collect import InputSpace

MODEL = str(ROOT / "recipes/quickstart/model")
KINDS = ("prose", "python")


def row(method="plain", seed=0, rank=0, scale=1.0, loss=0.5, kl=0.1, control=""):
    figures = {kind: {"kl": kl, "loss_rise": kl} for kind in KINDS}
    same = {"form": "hard", "accuracy": 0.5, "margin": 0.0}
    return {"method": method, "seed": seed, "rank": rank, "scale": scale, "control": control, "loss": loss} | (
        same | {"retained": figures}
    )


def frontier(seed=0, factor=1.0):
    """Plain's adapter at three scales: KL = factor · exp(-10 · loss)."""
    losses = {1.0: 0.4, 0.7: 0.5, 0.4: 0.7}
    return [row(seed=seed, scale=s, loss=loss, kl=factor * math.exp(-10 * loss)) for s, loss in losses.items()]


@pytest.mark.parametrize("loss", [0.4, 0.43, 0.5, 0.61, 0.7])
def test_log_kl_is_interpolated_in_the_loss(loss):
    assert retain_judge.kl_at(frontier(), "prose", loss) == pytest.approx(math.exp(-10 * loss))


def test_outside_of_the_frontier():
    assert retain_judge.kl_at(frontier(), "prose", 0.3) == pytest.approx(math.exp(-4))  # not extrapolated
    assert retain_judge.kl_at(frontier(), "prose", 0.71) is None


def test_the_rival_is_taken_at_its_best_where_two_scales_have_one_loss():
    bent = [*frontier(), row(scale=1.5, loss=0.45, kl=1.0)]
    assert retain_judge.kl_at(bent, "prose", 0.45) == pytest.approx(math.exp(-4.5))


def test_shares_are_paired_by_seed():
    rows = [*frontier(0), *frontier(1, factor=10)]
    rows += [row(seed=seed, rank=12, loss=0.6, kl=0.3 * math.exp(-6)) for seed in (0, 1)]
    rows.append(row("kl2", seed=0, loss=0.9))
    rows.append(row("kl2", seed=2, loss=0.5))  # plain has no such seed
    shares = {(r["method"], r["seed"], r["rank"], r["scale"]): r["share"] for r in retain_judge.judge(rows)}
    assert shares["plain", 0, 12, 1.0] == pytest.approx(dict.fromkeys(KINDS, 0.3))
    assert shares["plain", 1, 12, 1.0] == pytest.approx(dict.fromkeys(KINDS, 0.03))
    assert shares["plain", 1, 0, 0.7] == pytest.approx(dict.fromkeys(KINDS, 1.0))
    assert shares["kl2", 0, 0, 1.0] == dict.fromkeys(KINDS) and shares["kl2", 2, 0, 1.0] == {}


def test_lines_have_median_and_range_and_keep_controls_apart():
    rows = [row_ for seed in range(3) for row_ in frontier(seed)]
    rows += [row(seed=s, rank=12, loss=0.6, kl=f * math.exp(-6)) for s, f in enumerate((0.1, 0.4, 0.2))]
    rows += [row(seed=s, rank=12, loss=0.6, kl=math.exp(-6), control="random") for s in range(3)]
    groups = retain_judge.settings(retain_judge.judge(rows))
    lines = [retain_judge.cells(group) for group in groups]
    assert len(lines) == 5 and all(line[3] == "3" for line in lines)
    ours, control = (line for line in lines if line[1].startswith("12"))
    assert ours[1] == "12 directions" and ours[-1].endswith(", 0.20 [0.10, 0.40]")
    assert control[1] == "12 random" and control[-1].endswith(", 1.00 [1.00, 1.00]")
    compared = retain_judge.compare(retain_judge.lowest_loss(groups))
    assert len(compared) == 2 and "prose: plain, 12 directions, has 0.20 [0.10, 0.40] of the share" in compared[0]


def test_all_at_one_loss_each_on_its_own_scales():
    rows = [one | {"seed": seed} for seed in (0, 1) for one in frontier()]
    rows = [one | {"scale": 0.75 if one["scale"] == 0.7 else one["scale"]} for one in rows]
    fast = [row("corda", scale=s, loss=loss, kl=0.5 * math.exp(-10 * loss)) for s, loss in ((1.0, 0.3), (0.5, 0.6))]
    short = [row("early", scale=s, loss=loss, kl=0.1) for s, loss in ((1.5, 0.55), (1.0, 0.65))]
    rows += [one | {"seed": seed} for seed in (0, 1) for one in (*fast, *short)]
    found = retain_page.shares(rows, 0.75)
    assert set(found) == {("plain", 0, ""), ("corda", 0, "")}  # the other does not reach the loss
    assert found["corda", 0, ""]["prose"] == pytest.approx([math.log(0.5)] * 2)
    assert "at scale 1, each" in retain_page.at_one_loss(rows)[1]
    ours = [row(rank=12, scale=s, loss=loss, kl=0.1 * math.exp(-10 * loss)) for s, loss in ((1.0, 0.45), (0.5, 0.6))]
    rows += [one | {"seed": seed} for seed in (0, 1) for one in ours]
    text, lines = (found := retain_page.at_one_loss(rows))[1], found[5:]
    assert "at scale 0.75, each" in text and "to its loss (0.500). With 12 directions" in text  # 0.4 is below ours
    assert len(lines) == 2 and lines[0].startswith("| plain | 12 directions") and lines[1].startswith("| CorDA")
    assert "| 2 | 0.10" in lines[0] and "| 2 | 0.50" in lines[1]
    assert retain_page.WORSE not in text
    assert retain_page.WORSE in retain_page.at_one_loss(rows, untrained=0.45)[1]


def test_scales_beyond_the_lowest_loss_do_not_count():
    """A larger scale that both learns less and forgets more is no way to reach a loss."""
    over = [
        row("corda", scale=s, loss=loss, kl=kl) for s, loss, kl in ((0.5, 0.45, 0.001), (1.0, 0.4, 0.1), (1.5, 0.6, 9))
    ]
    assert set(retain_page.shares([*frontier(), *over], 0.7)) == {("plain", 0, "")}  # 0.5: on the way up again alone
    more = [*over, row("corda", scale=0.3, loss=0.55, kl=0.001)]
    found = retain_page.shares([*frontier(), *more], 0.7)
    assert found["corda", 0, ""]["prose"] == pytest.approx([math.log(0.001) + 5])
    bent = [*frontier(), row(scale=1.5, loss=0.8, kl=9.0)]  # plain's own
    assert retain_judge.kl_at(bent, "prose", 0.75) is None
    bent[-1]["loss"] = 0.5
    assert retain_page.shares(bent, 1.5)["plain", 0, ""]["prose"] == [0.0]


def test_a_line_has_a_share_where_most_of_its_seeds_do():
    rows = [one for seed in range(4) for one in frontier(seed)]
    for missing, expected in ((1, "0.30 [0.30, 0.30] (3 seeds)"), (2, "-")):
        losses = [0.9] * missing + [0.6] * (4 - missing)  # 0.9: above plain's
        ours = [row(seed=s, rank=12, loss=loss, kl=0.3 * math.exp(-6)) for s, loss in enumerate(losses)]
        group = next(g for g in retain_judge.settings(retain_judge.judge([*rows, *ours])) if g[0]["rank"])
        assert retain_judge.cells(group)[-1].endswith(f", {expected}")


def test_the_picture_takes_a_kl_of_zero(tmp_path):
    rows = [row(scale=s, loss=loss, kl=kl) for s, loss, kl in ((1.0, 0.4, 0.1), (0.5, 0.5, 0.0))]
    retain_judge.draw(rows, tmp_path / "drawn.png", 12)
    assert (tmp_path / "drawn.png").stat().st_size > 1000


def test_from_six_seeds_on_interval_and_p():
    middle, p = retain_judge.ratio([math.log(0.5) + 0.01 * i for i in range(6)]).split(", p ")
    assert middle.startswith("0.51 [0.5") and float(p) == pytest.approx(2 / 2**6, abs=1e-3)
    assert "p" not in retain_judge.ratio([math.log(0.5)] * 5)


def test_a_scale_is_chosen_by_loss_alone():
    rows = [row(rank=12, scale=1.0, loss=0.6, kl=0.001), row(rank=12, scale=1.5, loss=0.5, kl=0.1)]
    assert [group[0]["scale"] for group in retain_judge.lowest_loss(retain_judge.settings(rows))] == [1.5]


def test_pairs_keep_the_prompts_end_and_the_answers_beginnings():
    pair = {"prompt_ids": list(range(100)), "chosen_ids": list(range(50)), "rejected_ids": [7]}
    short = retain_trainers.cut(pair)
    assert short["prompt_ids"] == list(range(52, 100))
    assert short["chosen_ids"] == list(range(40)) and short["rejected_ids"] == [7]


def test_random_directions_are_as_many_and_others():
    own = InputSpace(["a", "b"], torch.eye(20)[:, :4], torch.ones(4), torch.ones(4))
    first, second = retain.random_spaces([own, own], seed=5)
    assert first.modules == own.modules and first.vectors.shape == (20, 4)
    torch.testing.assert_close(first.vectors.T @ first.vectors, torch.eye(4))
    assert not torch.allclose(first.vectors, second.vectors)
    assert torch.equal(retain.random_spaces([own], seed=5)[0].vectors, first.vectors)
    other = InputSpace(["c"], torch.eye(20)[:, 4:8], torch.ones(4), torch.ones(4))
    shifted = retain.shifted_spaces([own, other])
    assert torch.equal(shifted[0].vectors, other.vectors) and torch.equal(shifted[1].vectors, own.vectors)


def test_what_is_measured_on_is_not_what_is_given(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    measured = retain_texts.domains([], [], tokenizer, 32, 6)
    assert list(measured) == ["prose", "python", "arithmetic", "chat"]
    assert {len(ids) for name in ("prose", "python", "arithmetic") for ids in measured[name]} == {32}
    given = retain_texts.given_texts([], MODEL, 32, tmp_path)
    assert len(given) == retain_texts.GIVEN_CHUNKS
    assert not set(given) & {tokenizer.decode(ids) for ids in measured["prose"]}
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": f"Finn had {i} apples and a hat."}) + "\n" for i in range(10)))
    given = retain_texts.given_texts([str(path)], MODEL, 32, tmp_path)
    held = [tokenizer.decode(ids) for ids in retain_texts.domains([str(path)], [], tokenizer, 32, 6)["prose"]]
    assert (len(given), len(held)) == (8, 2) and not set(given) & set(held)


def test_sums_are_right():
    lines = retain_texts.arithmetic()[0].splitlines()
    assert all(eval(line.split("=")[0]) == int(line.split("=")[1]) for line in lines) and len(lines) == 2000


TEXTS = ROOT / "recipes/quickstart/texts"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retain")
    small = "--seeds 0 --steps 5 --learning_rate 4e-3 --ranks 3 --scales 1.2 --held_out 6 --chunks 8 --name tiny"
    methods = ["--methods", "kl2", "replay0.5", "frozen-a", "--texts", "2"]
    texts = ["--retain", str(TEXTS / "sums.jsonl.gz"), "--measure", f"sums={TEXTS / 'sums_test.jsonl.gz'}"]
    argv = [*small.split(), *methods, *texts, "--output_dir", str(folder)]
    assert retain.run(argv) == 0
    return argv, folder


def test_a_study_has_all_rows_table_and_pictures(study, tmp_path, capsys):
    argv, folder = study
    about, rows = retain_judge.read(folder / "retain-tiny.jsonl.gz")
    assert len(rows) == 4 * len(retain.ALONE) + 2 + 4 and (folder / "retain.png").stat().st_size > 1000
    projected = {(r["method"], r["rank"], r["control"]) for r in rows if r["rank"]}
    assert projected == {("kl2", 3, ""), ("plain", 3, ""), *(("plain", 3, c) for c in (*retain.CONTROLS, "texts0002"))}
    assert all(r["retained"]["sums"]["kl"] > 0 and 0 <= r["right"] <= 1 for r in rows)
    runs = {run["adapter"].removesuffix("-s0"): run for run in about["runs"]}
    assert all(run["losses"][0] == pytest.approx(math.log(2)) for name, run in runs.items() if name == "plain")
    assert runs["plain"]["retain_ms"] is None and runs["kl2"]["retain_ms"] > 0
    assert len({tuple(run["losses"]) for run in runs.values()}) == 4  # each method does something
    words = retain_about.words(about)
    assert "5 steps of 12 pairs at rate 0.004" in words and "KL term takes" in words
    assert re.search(r"share of plain's .*: in the null space, A as it starts \d\.\d\d; KL term, weight 2 \d", words)
    lines, (path,) = retain_gain.section(folder, tmp_path)
    assert path.stat().st_size > 1000 and "### More texts, more time: tiny" in lines and about["seconds_of_k"] > 0
    retain_judge.show(rows, "tiny")
    assert "only scaled" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", ["kto", "sft"])
def test_other_trainers(tmp_path, trainer):
    small = "--seeds 0 --steps 5 --learning_rate 4e-3 --ranks 3 --scales 1 --held_out 6 --chunks 8 --texts 2"
    texts = ["--retain", str(TEXTS / "sums.jsonl.gz"), "--measure", f"sums={TEXTS / 'sums_test.jsonl.gz'}"]
    argv = [*small.split(), *texts, "--trainer", trainer, "--methods", "kl2", "--output_dir", str(tmp_path)]
    assert retain.run(argv) == 0
    about, rows = retain_judge.read(tmp_path / "retain-quickstart.jsonl.gz")
    assert f"5 {retain_about.STEPS[trainer]}" in retain_about.words(about)
    assert len({tuple(run["losses"]) for run in about["runs"]}) == 2
    fewer = [row for row in rows if row["control"] == "texts0002"]
    assert len(fewer) == 1 and retain_judge.cells([fewer[0] | {"share": {}}])[1] == "3 of 2 texts"
    losses = [row["loss"] for row in rows if row["method"] == "plain" and not row["rank"]]
    assert len(set(losses)) == len(retain.ALONE)


def test_cost_is_paired_by_seed_and_without_runs_that_were_cut_off():
    seconds = {"plain-s0": 10.0, "plain-s1": 20.0, "kl2-s0": 12.0, "kl2-s1": 26.0, "kl2-s2": 50.0, "corda-s0": None}
    words = retain_about.times([{"adapter": name, "seconds": value} for name, value in seconds.items()])
    assert words.endswith("(median over seeds): KL term, weight 2 1.25.")
    assert retain_about.times([{"adapter": "plain-s0", "seconds": 1.0}]) == ""


def test_gain_against_texts_and_time():
    rows = [*frontier(0), *frontier(1)]
    for seed in (0, 1):
        rows += [
            row(seed=seed, rank=3, loss=0.6, kl=f * math.exp(-6), control=f"texts{n:04}")
            for n, f in ((8, 0.2), (64, 0.1))
        ]
        rows += [
            row("kl2", seed=seed, scale=s, loss=loss, kl=0.5 * math.exp(-10 * loss))
            for s, loss in ((1, 0.4), (0.5, 0.6))
        ]
        rows += [
            row(seed=seed, rank=3, scale=s, loss=loss, kl=0.1 * math.exp(-10 * loss))
            for s, loss in ((1, 0.4), (0.5, 0.6))
        ]
    texts = retain_gain.by_texts(retain_judge.judge(rows), "prose")
    assert [n for n, _ in texts] == [8, 64]
    assert [values for _, values in texts] == [pytest.approx([math.log(f)] * 2) for f in (0.2, 0.1)]
    seconds = {"plain-s0": 10.0, "plain-s1": 20.0, "kl2-s0": 12.0, "kl2-s1": 28.0}
    about = {"runs": [{"adapter": name, "seconds": value} for name, value in seconds.items()], "seconds_of_k": 5.0}
    found = {
        name: (time, values) for name, time, values in retain_gain.by_time(about, retain_judge.judge(rows), "prose")
    }
    assert found["plain"] == (1.0, [0.0])
    assert found["KL term, weight 2"] == (pytest.approx(1.3), pytest.approx([math.log(0.5)] * 2))
    assert found["plain, 3 directions"] == (pytest.approx(1.375), pytest.approx([math.log(0.1)] * 2))


def test_judged_by_the_gold_score(tmp_path):
    small = "--seeds 0 --steps 5 --learning_rate 4e-3 --ranks 3 --scales 1 --held_out 24 --chunks 8 --judge gold"
    texts = ["--retain", str(TEXTS / "sums.jsonl.gz"), "--measure", f"sums={TEXTS / 'sums_test.jsonl.gz'}"]
    assert retain.run([*small.split(), *texts, "--output_dir", str(tmp_path)]) == 0
    about, rows = retain_judge.read(tmp_path / "retain-quickstart.jsonl.gz")
    assert about["judge"] == "gold" and "minus the mean gold score" in retain_about.words(about)
    by_scale = {row["scale"]: row["loss"] for row in rows if row["method"] == "plain" and not row["rank"]}
    prompts = ["Finn saw a yellow cat by the wall."] * 20
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    scores = [retain_texts.gold(model, tokenizer, prompts) for _ in range(2)]
    assert scores[0] == scores[1] and torch.equal(torch.rand(1), first)
    assert len(set(by_scale.values())) > 2 and all(-6 < loss < 6 for loss in by_scale.values())


def test_finished_cells_are_skipped_and_missing_ones_made_again(study):
    argv, folder = study
    trained, lot = folder / "plain-s0/run.json", folder / "plain-s0/rank3.json"
    before, rows = trained.stat().st_mtime_ns, json.loads(lot.read_text())
    lot.unlink()
    retain.run(argv)
    assert trained.stat().st_mtime_ns == before
    again = json.loads(lot.read_text())
    assert again[0]["loss"] == pytest.approx(rows[0]["loss"], abs=1e-6)
    with pytest.raises(SystemExit, match="--steps 5"):
        retain.run([*argv, "--steps", "6"])


def test_settings_of_before_an_option_are_others(tmp_path):
    options = retain.parse(["--output_dir", str(tmp_path)])
    retain.check_settings(options)
    kept = json.loads((tmp_path / "settings.json").read_text())
    del kept["judge"]
    (tmp_path / "settings.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="has runs with --judge None: choose another folder"):
        retain.check_settings(options)


def test_pairs_may_have_their_prompts_in_the_answers(tmp_path):
    rows = [{"chosen": f"Finn saw a cat. He ran {i}.", "rejected": f"Finn saw a cat. He cried {i}."} for i in range(4)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    meter = retain.Meter(retain.parse(["--pairs", str(tmp_path), "--chunks", "2"]), [])
    assert sum(len(batch["input_ids"]) for batch in meter.pairs) == 8


def test_a_page_is_made_of_the_raw_file_alone(study, tmp_path):
    _, folder = study
    lines, pictures = retain_page.section(folder, tmp_path)
    assert "### Forgotten by tiny" in lines and pictures == [tmp_path / "retain_tiny.png"] and pictures[0].exists()
    assert sum(line.startswith("| plain | only scaled") for line in lines) == 1
    assert retain_page.section(tmp_path, tmp_path) == ([], [])
