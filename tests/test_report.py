"""nspo2 report: what stands on the page, in a browser too, and every way of asking for it wrongly."""

import html
import json
import math
import re
import shutil
import subprocess
import sys

import pytest

from nspo2_trl.cli import report
from nspo2_trl.cli.runs import labels, number, read, unit_of

matplotlib = pytest.importorskip("matplotlib")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SMALL = [{"step": 1, "loss": 0.7}]  # soon drawn
TIMED = ["loss", "accuracy", "margins", "logps"]
NSPO2 = ["variance_reduction", "bias", "signal_removed", "rank", "alpha", "noise_scale", "skipped_steps"]
NSPO2 += ["sentinel_level", "overhead_ms", "overhead_share"]


def entry(step, plain=False, **more):
    """What the trainer logs, with figures that are easy to tell."""
    found = {"step": step, "loss": 0.7 - step / 100, "rewards/accuracies": 0.5, "rewards/margins": step / 10}
    found |= {"logps/chosen": -20.0 - step, "grad_norm": 1.0, "nspo2/step_time": 0.5, "nspo2/batch_size": 16}
    if not plain:
        names = ("variance_reduction", "bias", "signal_removed", "signal_removed_se", "alpha", "overhead_ms")
        found |= {f"nspo2/{name}": 0.1 for name in names}
        found |= {"nspo2/rank": 4.0, "nspo2/noise_scale": 90.0 + step, "nspo2/skipped_steps": step // 10}
        found |= {"nspo2/sentinel_level": 0}
    return found | more


def evaluation(step, loss=0.5):
    return {"step": step, "eval_loss": loss, "eval_rewards/accuracies": 0.8, "eval_rewards/margins": 0.4}


def written(folder, history, **more):
    folder.mkdir(parents=True, exist_ok=True)
    steps = max((e.get("step", 0) for e in history), default=0)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": steps} | more))
    return folder


def page_of(*runs, **options):
    argv = [str(run) for run in runs]
    for name, values in options.items():
        argv += [f"--{name}", *values]
    report.main(argv)
    return (runs[0] / "report.html").read_text()


def panels(page):
    """Panels on a page by name, each with its SVG."""
    return dict(re.findall(r'<figure id="([\w-]+)">.*?(<svg.*?</svg>)', page, re.S))


def visible(page):
    """The text of a page."""
    body = re.sub(r"<svg.*?</svg>|<style>.*?</style>", " ", page, flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        report.main([str(arg) for arg in argv])
    assert str(stopped.value.code).startswith("error: ") and "\n" not in stopped.value.code
    return stopped.value.code


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The page of a run of 40 steps with everything, and one of 20 that was plain DPO."""
    folder = tmp_path_factory.mktemp("runs")
    history = [evaluation(0)] + [entry(step) for step in (10, 20, 30, 40)] + [evaluation(20), evaluation(40, 0.45)]
    written(folder / "ours", history)
    written(folder / "plain", [entry(step, plain=True) for step in (10, 20)] + [evaluation(20)])
    page_of(folder / "ours", folder / "plain")
    return folder / "ours/report.html"


# ---- what is read ----


def test_time_is_the_sum_of_the_steps(tmp_path):
    history = [entry(10, **{"nspo2/step_time": 1.0}), entry(30, **{"nspo2/step_time": 2.0}), evaluation(20)]
    run = read(written(tmp_path, history), "run")
    assert run.clock == [(0, 0.0), (10, 10.0), (30, 50.0)]
    assert [run.seconds_at(step) for step in (0, 5, 10, 20, 30, 35)] == [0, 5, 10, 30, 50, 60]
    assert run.train[0]["overhead_share"] == pytest.approx(0.0001)


@pytest.mark.parametrize("time", [None, math.nan, 0, "fast"])
def test_a_run_whose_times_are_not_all_known_is_not_drawn_against_time(tmp_path, time):
    run = read(written(tmp_path, [entry(10), entry(20, **{"nspo2/step_time": time})]), "run")
    assert not run.clock and "not in the plots against time" in " ".join(run.notes)


def test_units_and_numbers():
    assert [unit_of(seconds)[1] for seconds in (1, 179, 180, 10799, 10800)] == ["s", "s", "min", "min", "h"]
    assert [math.isnan(number(value)) for value in (None, "1", True, math.inf, math.nan, 1)] == [True] * 5 + [False]


def test_names_are_the_folders_and_made_unique(tmp_path):
    for name in ("a/run", "b/run", "c"):
        written(tmp_path / name, [entry(1)])
    paths = [tmp_path / name for name in ("a/run", "b/run", "c", "c/trainer_state.json")]
    assert labels(paths[:1]) == ["run"]
    assert labels(paths[1:3]) == ["run", "c"]
    assert labels(paths) == list(map(str, paths))  # two of each


def test_a_run_that_goes_on_is_read_from_its_last_checkpoint(tmp_path):
    for step in (9, 10, 100):
        written(tmp_path / f"checkpoint-{step}", [entry(step)])
    assert read(tmp_path, "run").steps == 100
    assert read(tmp_path / "checkpoint-9/trainer_state.json", "run").steps == 9
    written(tmp_path, [entry(50)])
    run = read(tmp_path, "run")
    assert run.steps == 50 and any(note.startswith("checkpoint-100 goes further") for note in run.notes)


# ---- the page ----


def test_a_real_run(make_trainer, tmp_path, pairs):
    options = {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True, "max_steps": 8}
    out = tmp_path / "out"
    trainer = make_trainer(
        save_strategy="steps", save_steps=4, trainer={"eval_dataset": pairs.select(range(4))}, **options
    )
    trainer.train()  # leaves no trainer_state.json but those of its checkpoints
    page = page_of(out)
    assert {*TIMED, "variance_reduction", "bias", "rank", "alpha", "skipped_steps", "overhead_ms"} <= panels(
        page
    ).keys()
    assert "Mean over adapters, the later the stronger. out: 4, 8." in visible(page)
    run = read(out, "out")
    assert run.steps == 8 and [step for step, _ in run.spectra] == [4, 8]
    assert run.spectra[-1][1][:4] == pytest.approx(trainer.nspo2.spectrum()[:4], rel=0.2)  # there with shrinkage
    (out / "checkpoint-8/nspo2_state.pt").write_bytes(b"half a file")
    run = read(out, "out")
    assert [step for step, _ in run.spectra] == [4]
    assert any(note.startswith("checkpoint-8/nspo2_state.pt could not be read") for note in run.notes)


def test_two_runs_over_each_other(two_runs):
    page = two_runs.read_text()
    found = panels(page)
    assert found.keys() == {*TIMED, *(f"{key}-time" for key in TIMED), *NSPO2}
    for key in TIMED:
        for name in (key, f"{key}-time"):
            assert "var(--run-0)" in found[name] and "var(--run-1)" in found[name], name
    for key in NSPO2:
        assert "var(--run-0)" in found[key] and "var(--run-1)" not in found[key], key
    text = visible(page)
    assert "ours 40 20.0 s 0.4500 0.8000 0.4000 40 10.0% 0.0% 4" in text
    assert "plain 20 10.0 s 0.5000 0.8000 0.4000 20 – – –" in text
    assert "plain: nothing of NSPO2 is in its log" in text and "Not logged in these runs: Eigenvalues" in text
    assert "batch size 16" in found["noise_scale"]


def test_nothing_is_loaded_and_no_ids_clash(two_runs):
    page = two_runs.read_text()
    assert not re.findall(r"https?:|src=|@import|<script|<link(?! rel=\"icon\" href=\"data:,\")", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page))
    assert used and {a or b for a, b in used} <= set(ids)
    assert not re.findall(r"#0a0b\d|#010203|<g id=|<metadata", page)
    for svg in panels(page).values():
        assert 'role="img" aria-label="' in svg and "<title>" in svg


ODD = {
    "one point": [entry(10)],
    "evaluations only": [evaluation(0), evaluation(5)],
    "older and plain": [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "epoch": 1}],
    "before the first step": [entry(0), entry(0)],
    "bad numbers": [entry(10, loss=math.nan), entry(20, loss=None), entry(30, loss=math.inf), entry(40)],
    "of other kinds": [entry(s, **{"nspo2/rank": None, "nspo2/bias": "0"}) for s in (1, 2)],
    "ended": [entry(1, plain=True), {"train_runtime": 3.0, "step": 1}, {"no": "step"}],
    "far apart": [entry(s, **{"nspo2/noise_scale": v, "nspo2/batch_size": 8 * s}) for s, v in ((1, 1e-3), (2, 1e6))],
}


@pytest.mark.filterwarnings("error")
def test_odd_logs(tmp_path):
    runs = [read(written(tmp_path / name, history), name, i) for i, (name, history) in enumerate(ODD.items())]
    from nspo2_trl.cli import plots
    from nspo2_trl.cli.panels import PANELS

    by_key = {panel.key: panel for panel in PANELS}
    for run in runs:  # each by itself
        svg = plots.draw(by_key["loss"], [run])
        assert "var(--run-" in svg and "nan" not in svg.replace("dominant", ""), run.name
    assert [bool(run.clock) for run in runs] == [True, False, False, False, True, True, True, True]
    assert "the first loss at step 10." in runs[4].notes[0] and "2 logged values" in runs[4].notes[0]
    assert "<use" in plots.draw(by_key["loss"], runs[:1])  # a point, where a line would not be seen
    assert plots.draw(by_key["rank"], [runs[1], runs[2], runs[5]]) is None
    assert "batch size 8" in (svg := plots.draw(by_key["noise_scale"], runs)) and "batch size 16" in svg
    report.write_page(runs, tmp_path / "page.html")  # all of them, more runs than colours
    assert len(panels((tmp_path / "page.html").read_text())) == len(TIMED) * 2 + len(NSPO2)


def test_names_are_escaped(tmp_path):
    name = "<script>alert(1)</script> & $x^2$"
    page = page_of(written(tmp_path / "run", SMALL), names=[name])
    assert "<script" not in page and visible(page).count(name) >= 3


# ---- it refuses ----


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert "there is no '" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "new").mkdir()
    assert "has no trainer_state.json: either the run has not saved a checkpoint" in refused(capsys, tmp_path / "new")
    assert "has no loss in its log" in refused(capsys, written(tmp_path / "empty", []))
    for text in ('{"log_history": [{"loss"', "[]", "{}", '{"log_history": 3}', '{"log_history": [3]}', ""):
        (tmp_path / "new/trainer_state.json").write_text(text)
        assert "is no whole trainer_state.json" in refused(capsys, tmp_path / "new"), text
    (tmp_path / "new/trainer_state.json").write_bytes(b"\xff\xfe\x00")
    assert "is no whole trainer_state.json" in refused(capsys, tmp_path / "new/trainer_state.json")
    fine = written(tmp_path / "fine", SMALL)
    for names in (["a"], ["a", "a"], ["a", "b", "c"]):
        assert "must be 2 different names" in refused(capsys, fine, fine, "--names", *names)
    assert not (fine / "report.html").exists()


def test_only_its_own_page_is_overwritten(tmp_path, capsys):
    fine = written(tmp_path / "fine", SMALL)
    (fine / "report.html").write_text("mine")
    assert "choose another file with `--output`" in refused(capsys, fine)
    assert (fine / "report.html").read_text() == "mine"
    assert "is a folder: give the name of a file" in refused(capsys, fine, "-o", tmp_path)
    assert "error: " in refused(capsys, fine, "-o", fine / "report.html/page.html")
    page = tmp_path / "made/for/it.html"
    for _ in range(2):
        report.main([str(fine / "trainer_state.json"), "-o", str(page)])
    assert capsys.readouterr().out.split() == [str(page)] * 2


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "nspo2_trl.cli.plots", raising=False)
    monkeypatch.delattr("nspo2_trl.cli.plots", raising=False)
    assert 'pip install -e ".[plot]"' in refused(capsys, written(tmp_path, SMALL))


# ---- in a browser ----

MEASURE = """
<body><script>
const widths = [360, 1000, 1600], source = JSON.parse(document.querySelector("#page").textContent), found = {};
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px";
  frame.srcdoc = source;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement, panels = {};
    for (const figure of page.querySelectorAll("figure")) {
      const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect(), cut = [];
      for (const text of svg.querySelectorAll("text")) {
        const t = text.getBoundingClientRect();
        if (t.left < box.left - 1 || t.right > box.right + 1 || t.top < box.top - 1 || t.bottom > box.bottom + 1)
          cut.push(text.textContent);
      }
      const line = svg.querySelector('[style*="stroke: var(--run-0)"]');
      panels[figure.id] = {width: box.width, height: box.height, cut, stroke: line && getComputedStyle(line).stroke};
    }
    found[width] = {wider: root.scrollWidth - root.clientWidth, panels};
    document.querySelector("#found").textContent = JSON.stringify(found);
    console.log("measured");
  };
  document.body.append(frame);
}
</script></body>
"""


def browse(url, tmp_path, *options):
    """Standard output and what the page said on its console."""
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    always += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--hide-scrollbars"]
    done = subprocess.run([CHROMIUM, *always, *options, url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium or Chrome in PATH")
def test_in_a_browser(two_runs, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    expected, shot = panels(two_runs.read_text()).keys(), tmp_path / "dark.png"
    dark = ["--blink-settings=preferredColorScheme=0", "--window-size=1000,1200", f"--screenshot={shot}"]
    said = browse(two_runs.as_uri(), tmp_path, *dark)[1]
    assert not said
    pixels = image.imread(shot)[..., :3]
    grey = pixels.mean(-1)
    assert grey[0, 0] == pytest.approx(0.1, abs=0.05)
    assert 0.02 < (grey - grey[0, 0] > 0.3).mean() < 0.5  # text and lines that stand out
    assert (pixels.max(-1) - pixels.min(-1) > 0.3).mean() > 0.001  # in colour
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy".*?>')
    source = json.dumps(policy.sub("", two_runs.read_text())).replace("</", "<\\/")
    wrapper = tmp_path / "measure.html"
    wrapper.write_text(f'<pre id="found"></pre><script type="text/plain" id="page">{source}</script>{MEASURE}')
    dom, said = browse(wrapper.as_uri(), tmp_path, "--dump-dom", "--virtual-time-budget=5000")
    assert said and all("measured" in line for line in said)  # so a word on the console would have been seen above
    measured = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S).group(1)))
    assert measured.keys() == {"360", "1000", "1600"}
    for width, found in measured.items():
        assert found["wider"] <= 0, width  # nothing to scroll sideways
        assert found["panels"].keys() == expected
        for key, panel in found["panels"].items():
            assert 280 < panel["width"] <= 500 and 150 < panel["height"] < 400, (width, key)
            assert not panel["cut"], (width, key)
            assert panel["stroke"] == "rgb(0, 114, 178)", (width, key)  # the light theme's
