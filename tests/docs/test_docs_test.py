"""`make docs-test` fails where a page does not do what it says."""

from __future__ import annotations

import pytest
from docs_test import main, run_page

RIGHT = """
```
echo 3 > three
```

<!-- not run: it needs a GPU -->
```
exit 1
```

```text
exit 1
```

```python
from pathlib import Path

three = int(Path("three").read_text())
```

<!-- first: echo 4 > four -->
```python
three  # 3
int(Path("four").read_text()) + three  # 7
three  # a number
```
"""


def run(text, directory, monkeypatch):
    page = directory / "page.md"
    page.write_text(text)
    monkeypatch.chdir(directory)
    return run_page(page)


def test_a_page_that_is_right(tmp_path, monkeypatch, capfd):
    assert run(RIGHT, tmp_path, monkeypatch) == 0
    told = capfd.readouterr().out
    assert told.count(": passed") == 3 and told.count("not run: it needs a GPU") == 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("three  # 3", "three  # 4"), ("echo 3", "false; echo 3"), ("first: echo 4", "first: false")],
)
def test_a_page_that_is_wrong(tmp_path, monkeypatch, right, wrong):
    assert run(RIGHT.replace(right, wrong), tmp_path, monkeypatch) >= 1


def test_a_page_that_does_not_exist(capsys):
    assert main(["NONE.md"]) == 2 and "NONE.md" in capsys.readouterr().out
