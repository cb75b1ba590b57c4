"""The grid of scripts/benchmark.py convergence: what it runs, what it makes of it."""

import itertools
import json
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, figures

sys.path.insert(0, str(ROOT / "scripts"))
from bench import convergence, grid, judge, methods, results, stats, tables, tasks

COMMON = {"study": "s", "task": "quickstart", "steps": 20, "held_out": 300, "samples": 200}


def record(method, lr, seed, losses, role="report", gold=1.0, kl=5.0):
    """A raw file's content, with the same loss curve for all but its last point."""
    curve = {"step": [5, 10, 15, 20], "loss": losses, "accuracy": [0.5] * 4, "margin": [0.1] * 4}
    samples = {"gold": gold, "kl": kl} if role == "report" else {}
    cell = COMMON | {"method": method, "lr": lr, "seed": seed, "role": role}
    figures = {"variance_reduction": 0.4, "rank": 12} if method == "keep" else {}
    return {"cell": cell, "curve": curve, "samples": samples, "nspo2": figures, "pairs_a_step": 16, "ms_a_step": 50.0}


def study():
    """plain is best at 0.002, inside of its grid; keep at 0.004, the edge of its own, and better by 0.01 to 0.03."""
    found = []
    for lr, plain, keep in ((1e-3, 0.5, 0.5), (2e-3, 0.4, 0.42), (4e-3, 0.45, 0.39)):
        for seed in (100, 101):
            found.append(record("plain", lr, seed, [plain] * 4, "select"))
            found.append(record("keep", lr, seed, [keep] * 4, "select"))
    for seed in range(10):
        for lr, kl, gold in ((1e-3, 2.0, 1.0), (2e-3, 6.0, 2.0), (4e-3, 10.0, 3.0)):
            found.append(record("plain", lr, seed, [0.65, 0.6, 0.5, 0.4 + 0.01 * seed], gold=gold, kl=kl + seed))
        last = 0.4 + 0.01 * seed - (0.01, 0.02, 0.03, 0.02, 0.02)[seed % 5]
        found.append(record("keep", 4e-3, seed, [0.6, 0.5, 0.45, last], gold=3.0, kl=6.0 + seed))
    return found


# ---- statistics ----


def test_interval_is_the_bootstrap_over_all_resamples():
    values = np.array([0.3, -0.1, 0.4, 0.2, 0.9])
    means = np.sort([np.mean(draw) for draw in itertools.product(values, repeat=5)])
    normal = statistics.NormalDist()
    below = (np.mean(means < values.mean()) + np.mean(means <= values.mean())) / 2
    without = (values.sum() - values) / 4
    off = without.mean() - without
    bias, skew = normal.inv_cdf(below), (off**3).sum() / (6 * (off**2).sum() ** 1.5)

    def end(share):
        z = bias + normal.inv_cdf(share)
        return np.quantile(means, normal.cdf(bias + z / (1 - skew * z)))

    assert stats.interval(values) == pytest.approx((end(0.025), end(0.975)), abs=0.015)
    assert stats.interval([0.2, 0.2, 0.2]) == (0.2, 0.2)
    assert stats.interval([0.1, 0.2]) is None and stats.interval([0.1, 0.2, math.inf]) is None


def test_intervals_and_verdicts_where_there_is_no_difference():
    draws = np.random.default_rng(0).standard_normal((400, 10))
    covered = np.mean([low <= 0 <= high for low, high in map(stats.interval, draws)])
    wrong = np.mean([stats.verdict(draw) != "no difference shown" for draw in draws])
    assert 0.86 < covered < 0.93 and 0.02 < wrong < 0.08  # tables.py says 89 %


def test_several_comparisons_are_corrected_for():
    rare, common = [-1.0, -2, -3, -4, -5, -6], [-1.0, 2, -3, 4, -5, 6]
    ps = [stats.p_value(rare), None, *[stats.p_value(common)] * 8]
    assert stats.adjusted(ps)[:2] == [pytest.approx(9 * 2 / 64), None] and stats.adjusted([None]) == [None]
    assert stats.verdict(rare, stats.adjusted(ps)[0]) == "perhaps better" and stats.verdict(rare, 0.04) == "better"


def test_the_least_difference_that_is_found():
    rng, spread = np.random.default_rng(0), 0.3
    least = np.mean([stats.least_found(spread * rng.standard_normal(10)) for _ in range(400)])
    found = [stats.p_value(least + spread * rng.standard_normal(10)) < 0.05 for _ in range(400)]
    assert 0.7 < np.mean(found) < 0.9


def test_verdicts():
    assert stats.p_value([1.0, 2, 3, 4, 5, 6]) == pytest.approx(2 / 64)
    assert stats.verdict([-1.0, -2, -3, -4, -5, -6]) == "better" and stats.verdict([1.0, 2, 3, 4, 5, 6]) == "worse"
    assert stats.verdict([-1.0, 2, -3, 4, -5, 6]) == "no difference shown"
    assert stats.verdict([1.0] * 5) == stats.verdict([1.0] * 9 + [math.inf]) == "cannot be said"


def test_steps_to_a_loss():
    steps, losses = [10, 20, 30], [0.6, 0.5, 0.55]
    assert stats.crossing(steps, losses, 0.55) == pytest.approx(15)
    assert stats.crossing(steps, losses, (math.log(2) + 0.6) / 2) == pytest.approx(5)
    assert stats.crossing(steps, losses, 0.5) == 20 and stats.crossing(steps, losses, 0.49) is None
    assert stats.crossing(steps, [None, 0.5, 0.5], 0.55) == pytest.approx(20)  # nothing to interpolate with
    plain = {"step": [5, 10, 15, 20], "loss": [0.65, 0.6, 0.5, 0.4]}
    own = {"step": [5, 10, 15, 20], "loss": [0.6, 0.5, 0.45, 0.41]}
    assert stats.steps_to(own, 0.6) == (5, True) and stats.steps_to(plain, 0.4) == (20, True)
    assert stats.steps_to(own, 0.4) == (20, False)


def test_gold_at_equal_kl():
    seeds = np.arange(5.0)
    plain_kl = np.array([2 + seeds, 6 + seeds, 10 + seeds])
    plain_gold = np.array([1 + 0 * seeds, 2 + 0 * seeds, 3 + 0 * seeds])
    gain, bounds = stats.gold_at_equal_kl(4 + seeds, 2.5 + 0.1 * seeds, plain_kl, plain_gold)
    assert gain == pytest.approx(2.7 - 1.5) and 1.0 < bounds[0] < gain < bounds[1] < 1.4
    assert stats.gold_at_equal_kl(20 + seeds, seeds, plain_kl, plain_gold) is None


# ---- tables ----


def test_rows_are_paired_and_each_at_its_best_rate():
    records = study()
    plain, keep = rows = tables.compare(records, "quickstart")
    tables.add_speed_and_frontier(rows, records, "quickstart")
    assert (plain["lr"], plain["edge"], keep["lr"], keep["edge"]) == (2e-3, False, 4e-3, True)
    assert keep["apart"].mean() == pytest.approx(-0.02) and keep["gap"][0] == pytest.approx(-0.02 / 0.445)
    assert keep["frontier"][0] == pytest.approx(1.0) and keep["removed"] == [0.4] * 10 and plain["removed"] == []
    assert plain[0.5] == (1.0, (1.0, 1.0), 10) and keep[0.5][::2] == pytest.approx((0.5, 10)) and keep["rank"] == 12
    # the mean of plain's last losses is .445: its seeds 0 to 4 get there, those of keep that end below
    assert plain[1.0][2] == 5 and keep[1.0][2] == sum(
        keep["apart"] + [0.4 + 0.01 * seed for seed in range(10)] <= 0.445
    )


def test_what_beats_plain_only_at_the_rate_chosen_for_it_has_not_won():
    records = study()
    assert tables.difference(tables.compare(records, "quickstart")[-1])[1] == "better"
    for found in records:
        cell = found["cell"]
        if (cell["method"], cell["lr"], cell["role"]) == ("plain", 1e-3, "report"):
            found["curve"]["loss"][-1] -= 0.015 + 0.01 * (cell["seed"] % 2)
    rows = tables.compare(records, "quickstart")
    missing = [
        entry for entry in records if (entry["cell"]["lr"], entry["cell"]["seed"]) not in ((1e-3, 8), (1e-3, 9))
    ]
    assert tables.difference(tables.compare(missing, "quickstart")[-1])[1] == "better, but not than `plain` at 0.001"
    assert [(row["method"], row["lr"]) for row in rows] == [("plain", 2e-3), ("keep", 4e-3)]
    assert [tables.difference(row)[1] for row in rows] == ["", "better, but not than `plain` at 0.001"]


def test_steps_of_equal_methods_are_equal():
    """Where a method is plain, seed by another seed, no column makes it look faster or slower."""
    rng, records = np.random.default_rng(0), []
    for method in ("plain", "keep"):
        records += [record(method, 1e-3, seed, [0.5] * 4, "select") for seed in (100, 101)]
        for seed in range(200):
            losses = np.array([0.6, 0.5, 0.45, 0.42]) + 0.03 * rng.standard_normal() + 0.01 * rng.standard_normal(4)
            records.append(record(method, 1e-3, seed, losses.tolist()))
    _, keep = rows = tables.compare(records, "quickstart")
    tables.add_speed_and_frontier(rows, records, "quickstart")
    assert all(
        keep[at][0] == pytest.approx(1, abs=0.04) and keep[at][1][0] < 1 < keep[at][1][1] for at in tables.SHARES
    )


def test_an_unfinished_grid_can_be_shown(tmp_path):
    records = [entry | {"cell": entry["cell"] | {"study": "convergence"}} for entry in study()]
    save([r for r in records if (r["cell"]["method"], r["cell"]["seed"]) != ("keep", 3)], tmp_path / "raw")
    assert len(results.write(tmp_path / "raw", tmp_path / "none.json", tmp_path)) == 2
    text = (tmp_path / "results.md").read_text()
    assert "10 seeds" in text and "| time of a step | under +5 % |  | unknown |" in text


def save(records, raw):
    for entry in records:
        grid.write(raw, entry)


def test_page_says_what_the_figures_say(tmp_path, capsys):
    page, raw, overhead = tmp_path / "results.md", tmp_path / "raw", tmp_path / "overhead.json"
    records = [entry | {"cell": entry["cell"] | {"study": "convergence"}} for entry in study()]
    save(records, raw)
    overhead.write_text(json.dumps({"cells": [{"ratio_of_sums": 1.03, "ratio_of_sums_interval": [1.02, 1.06]}]}))
    page.write_text(f"Before.\n{results.MARKS[0]}\nstale figures\n{results.MARKS[1]}\nAfter.\n")
    made = results.write(raw, overhead, tmp_path)
    text = page.read_text()
    claims = [
        line for line in text.splitlines() if line.startswith(("| variance", "| steps to", "| held-out", "| time"))
    ]
    assert "quickstart 40.0 % [40.0, 40.0] | holds |" in claims[0] and "quickstart -" in claims[1]
    assert claims[2].count("| holds |") == 1 and "quickstart +3.0 % [+2.0, +6.0] | unclear |" in claims[3]
    assert text.startswith("Before.") and text.endswith("After.\n") and "stale" not in text
    assert [path.name for path in made] == ["results.md", "convergence_quickstart.png"] and made[1].exists()
    keep, second = [line for line in text.splitlines() if line.startswith("| `keep`")]
    assert "0.004 (at the edge of the grid) | 0.4250 | -0.0200 [-0.0" in keep and "| better |" in keep
    assert "| +1.00 [+1.00, +1.00] | " in second and "| 50 % [50, 50] |" in second
    assert text == (results.write(raw, overhead, tmp_path), page.read_text())[1]  # the same files, the same page
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no lines"):
        results.write(raw, overhead, tmp_path)
    save([entry for entry in records if entry["cell"]["method"] == "keep"], tmp_path / "other")
    assert results.write(tmp_path / "other", overhead, tmp_path) == []
    assert "nothing to compare with" in capsys.readouterr().out


def test_one_word_for_a_claim():
    assert results.judged([(0.3, 0.4), (0.26, 0.5)], 0.25, 1) == "holds"
    assert results.judged([(0.1, 0.2), (0.05, 0.24)], 0.25, 1) == "fails"
    assert results.judged([(0.3, 0.4), (0.1, 0.2)], 0.25, 1) == "mixed"
    assert results.judged([(0.2, 0.3), (0.2, 0.3)], 0.25, 1) == "unclear"
    assert results.judged([], 0.25, 1) == results.judged([None], 0.25, 1) == "unknown"


def test_the_committed_page_is_made_of_the_committed_files(tmp_path):
    page = (ROOT / "docs/results.md").read_text()
    (tmp_path / "results.md").write_text(page)
    assert results.write(ROOT / "benchmarks/raw", ROOT / "benchmarks" / results.OVERHEAD, tmp_path)
    assert (tmp_path / "results.md").read_text() == page, "run `python scripts/benchmark.py tables`"
    total = sum(path.stat().st_size for path in (ROOT / "benchmarks").rglob("*.*"))
    assert total < 1e6, "raw files shall stay small"
    assert not list((ROOT / "benchmarks/raw").glob("*.jsonl")), "run `python scripts/benchmark.py pack`"


def test_what_a_model_could_before():
    able = judge.skills(["One day, Ada met Finn at school."], [" Ada shared the kite with Finn. Bea of was sad."])
    assert able == {"grammar": 0.5, "memory": 0.5}  # Ada and Finn are remembered; the kite and Bea are new
    assert judge.skills(["Ada had a red kite."], [" It began to rain."]) == {"grammar": 1.0, "memory": 0.0}


def test_diverged_runs_are_not_hidden():
    records = study()
    for entry in records:
        if (entry["cell"]["method"], entry["cell"]["seed"], entry["cell"]["role"]) == ("keep", 0, "report"):
            entry["curve"]["loss"][-1], entry["samples"] = None, {}
    *_, keep = rows = tables.compare(records, "quickstart")
    tables.add_speed_and_frontier(rows, records, "quickstart")
    assert keep["loss"] == math.inf and stats.verdict(keep["apart"]) == "cannot be said" and not keep["frontier"]


# ---- the grid ----


def test_rates():
    assert grid.best_rate({1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.6}) == (2e-3, False)
    assert grid.best_rate({1e-3: 0.5, 2e-3: 0.4}) == (2e-3, True)
    assert grid.beyond({1e-3: 0.5, 2e-3: 0.4}) == [4e-3] and grid.beyond({5e-4: 0.4, 1e-3: 0.5}) == [2.5e-4]
    records = study()[:-1] + [record("keep", 8e-3, 100, [0.1] * 4, "select")]  # a rate with one seed of two
    assert grid.best_rate(grid.losses_by_rate(records, "quickstart", "keep")) == (4e-3, True)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--only task=quikstart", "expected one of quickstart"),
        ("--only foo", "expected one of task, method, role, lr, seed"),
        ("--stories_model /nope", "`--stories_model` /nope: the task `stories` needs both"),
        (f"--stories_model {ROOT}", "`--stories_data` is missing"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(SystemExit, match=message):
        convergence.run(options.split())


def test_no_raw_files_no_tables(tmp_path):
    with pytest.raises(SystemExit, match="no raw files in .*run `python"):
        convergence.tables(["--raw", str(tmp_path)])


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(grid, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))


def test_a_finished_cell_is_never_run_again(tmp_path, threads, capsys):
    cells = grid.select_cells(COMMON, ["plain", "keep"], [1e-3], [100, 101])
    ran, broken = [], {("keep", 101)}

    def run(cell, folders):
        ran.append((cell["method"], cell["seed"]))
        if ran[-1] in broken:
            raise ValueError("no luck")
        return record(cell["method"], cell["lr"], cell["seed"], [0.5] * 4, "select") | {"cell": cell}

    folders = {"quickstart": {}}
    assert grid.run_cells(tmp_path, cells, folders, 2, "test", run) == 1
    assert "failed" in capsys.readouterr().out and len(ran) == 4
    names = ["keep-lr0.001-s100", "plain-lr0.001-s100", "plain-lr0.001-s101"]
    assert list(grid.by_name(tmp_path, COMMON["study"])) == [f"quickstart/{name}" for name in names]
    broken.clear()
    assert grid.run_cells(tmp_path, cells, folders, 2, "test", run) == 0 and ran[4:] == [("keep", 101)]
    assert grid.run_cells(tmp_path, cells, folders, 2, "test", run) == 0 and len(ran) == 5
    with pytest.raises(SystemExit, match="was made with steps 20: give another folder"):
        grid.run_cells(tmp_path, [cell | {"steps": 40} for cell in cells], folders, 2, "test", run)


def test_packed_cells_are_there_as_loose_ones_are(tmp_path, threads, capsys):
    cells = grid.select_cells(COMMON, ["plain", "keep"], [1e-3], [100, 101])
    run = lambda cell, _: record(cell["method"], cell["lr"], cell["seed"], [0.5] * 4, "select") | {"cell": cell}
    study, folders = COMMON["study"], {"quickstart": {}}
    grid.run_cells(tmp_path, cells[::-1], folders, 1, "test", run)
    before = grid.read(tmp_path, study)
    convergence.pack(["--raw", str(tmp_path)])
    packed = grid.packed(tmp_path, study)
    assert list(tmp_path.iterdir()) == [packed] and grid.read(tmp_path, study) == before
    once = packed.read_bytes()
    assert grid.missing(tmp_path, cells) == [] and grid.pack(tmp_path, study).read_bytes() == once
    with pytest.raises(SystemExit, match="was made with steps 20: give another folder"):
        grid.missing(tmp_path, [cells[0] | {"steps": 40}])
    grid.run_cells(tmp_path, cells + [cells[0] | {"seed": 102}], folders, 1, "test", run)  # one more, loose
    assert len(grid.loose(tmp_path, study).read_text().splitlines()) == 1
    assert [entry["cell"]["seed"] for entry in grid.read(tmp_path, study)] == [100, 101, 100, 101, 102]
    both = grid.read(tmp_path, study)
    grid.pack(tmp_path, study)
    assert grid.read(tmp_path, study) == both and grid.studies_in(tmp_path) == [study]


def test_phases(tmp_path, threads, monkeypatch):
    """Select goes on beyond the edge; report takes the best rates, other seeds, and plain's neighbours."""

    def run(cell, folders):
        best = {"plain": 2e-3, "keep": 16e-3}[cell["method"]]
        loss = 0.5 + abs(math.log(cell["lr"] / best)) / 10
        return record(cell["method"], cell["lr"], cell["seed"], [loss] * 4, cell["role"]) | {"cell": cell}

    run_cells = grid.run_cells
    monkeypatch.setattr(grid, "run_cells", lambda *args: run_cells(*args, run=run))
    options = ["--methods", "plain", "keep", "--rates", "1e-3", "2e-3", "4e-3", "--raw", str(tmp_path)]
    with pytest.raises(SystemExit, match="18 cells that choose"):
        convergence.run([*options, "--phase", "report"])
    assert convergence.run([*options, "--only", "method=keep,role=select"]) == 0
    assert {entry["cell"]["method"] for entry in grid.read(tmp_path, "convergence")} == {"keep"}
    assert convergence.run([*options, "--report_seeds", "3"]) == 0
    cells = [entry["cell"] for entry in grid.read(tmp_path, "convergence")]
    rates = lambda **kinds: sorted({c["lr"] for c in cells if all(c[key] == kinds[key] for key in kinds)})
    assert rates(method="keep", role="select") == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]
    assert rates(method="plain", role="report") == [1e-3, 2e-3, 4e-3, 16e-3]  # neighbours, and the rate of keep
    assert rates(method="keep", role="report") == [16e-3]
    assert {c["seed"] for c in cells if c["role"] == "report"} == {0, 1, 2}


def test_the_command_finds_all_its_raw_files(monkeypatch):
    left = []
    monkeypatch.setattr(grid, "run_cells", lambda raw, cells, *_: left.extend(grid.missing(raw, cells)) or 0)
    convergence.run([])
    assert not left


# ---- methods ----


def test_every_method_has_words():
    assert [name for name in methods.WORDS if name in methods.METHODS] == list(methods.METHODS)


@pytest.mark.slow
def test_random_directions_remove_what_their_number_says():
    removed = {}
    for method in ("keep", "random"):
        cell = {"method": method, "lr": 1e-3, "seed": 0, "steps": 20}
        trainer = tasks.make_trainer(cell, convergence.QUICKSTART, range(20), stride=tasks.LOOKS)
        methods.prepare(trainer, method)
        trainer.train()
        removed[method] = figures(trainer, "variance_reduction")[-1]
        ranks = figures(trainer, "rank")[-1] / max(part.cov.dim for part in trainer.nspo2.filters)
    assert 0.3 * ranks < removed["random"] < 0.5 * removed["keep"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smoke():
    folder = convergence.smoke()
    text = (folder / "docs/results.md").read_text()
    assert "| `keep` | 0.00" in text and "2 seeds" in text and (folder / "docs/convergence_quickstart.png").exists()
    assert "| `factored` | `random`, rank 8 | " in text and (folder / "docs/variance_quickstart.png").exists()
    assert len(grid.read(folder / "raw", "variance")) == 2
    lines = grid.loose(folder / "raw", "convergence").read_text().splitlines()
    assert len(lines) == 16 and max(map(len, lines)) < 3000
    assert all(json.loads(text)["curve"]["loss"][-1] < math.log(2) for text in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_every_method_learns(method):
    cell = COMMON | {"method": method, "lr": 1e-3, "seed": 0, "role": "report", "held_out": 20, "samples": 5}
    found = tasks.run_cell(cell, convergence.QUICKSTART)
    assert found["curve"]["loss"][-1] < math.log(2) and found["samples"]["kl"] is not None
    assert bool(found["nspo2"]) == methods.options_of(method)["nspo2_enabled"]
    plain = tasks.run_cell(cell | {"method": "plain"}, convergence.QUICKSTART)
    assert method == "plain" or found["curve"] != plain["curve"]
