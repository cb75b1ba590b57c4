"""The README's Python blocks run as they stand, and its commands name files that exist."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    for name in ("recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        exec(block, {"__name__": "readme"})


def test_paths_exist():
    for path in set(re.findall(r"(?:recipes|scripts|nspo2_trl|tests)/[\w./-]+\w", README)):
        assert (ROOT / path).exists(), path


def test_every_logged_key_is_real():
    code = "".join(path.read_text() for path in (ROOT / "nspo2_trl").rglob("*.py"))
    for key in re.findall(r"`nspo2/(\w+)`", README):
        assert f'"{key}"' in code, key
