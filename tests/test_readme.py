"""The README's Python blocks run as they stand. Its links, paths, options and commands are checked in test_docs."""

import re

from conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    for name in ("recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        exec(block, {"__name__": "readme"})
