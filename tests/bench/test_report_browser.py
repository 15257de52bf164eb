"""The page in a real browser: it sorts, it fits a phone, and its script makes no error."""

import html as escape
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from growformer.report.bench import COLUMNS, render
from tests.bench.test_summary import SAVED, made

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page with")

WATCH = "<script>window.failures = []; onerror = said => { failures.push(String(said)); };</script>"

LOOK = """
const frame = document.getElementById("page"), out = {};
frame.onload = () => {
  const doc = frame.contentDocument, win = frame.contentWindow;
  const name = row => row.cells[0].querySelector("span").firstChild.data;
  const names = () => [...doc.querySelectorAll("#arms tbody tr")].map(name);
  const heads = [...doc.querySelectorAll("#arms thead th")];
  const shown = e => e.getClientRects().length > 0;
  out.sideways = doc.documentElement.scrollWidth - doc.documentElement.clientWidth;
  out.before = names();
  const loss = heads[COLUMN];
  loss.firstElementChild.click(); out.up = names(); out.aria = loss.getAttribute("aria-sort");
  loss.firstElementChild.click(); out.down = names();
  const by = doc.getElementById("by"); by.value = "0"; by.dispatchEvent(new win.Event("change")); out.named = names();
  out.figures = [...doc.querySelectorAll("figure svg.f")].filter(shown).map(svg => {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(t => t.getBoundingClientRect());
    return {width: box.width, outside: texts.filter(t => t.left < box.left - 1 || t.right > box.right + 1).length};
  });
  const faint = () => [...doc.querySelectorAll("[data-arm]")].filter(shown)
    .filter(e => Number(win.getComputedStyle(e).opacity) < 0.5).map(e => e.dataset.arm);
  const lit = doc.getElementById("lit");
  const point = arm => { lit.value = arm; lit.dispatchEvent(new win.Event("change")); return faint(); };
  out.faint = faint().length; out.others = [...new Set(point("grown"))].sort(); out.again = point("").length;
  out.failures = win.failures;
  document.getElementById("out").textContent = JSON.stringify(out);
};
"""


def opened(folder: Path, width: int, changed: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """What a browser finds on a page of made-up results in a window so wide."""
    page, _ = render(made(), "results")
    page = page.replace("<head>", "<head>" + WATCH, 1).replace(*changed)
    look = LOOK.replace("COLUMN", str(COLUMNS.index("loss")))
    frame = f'<iframe id="page" width="{width}" height="900" srcdoc="{escape.escape(page)}"></iframe>'
    path = folder / "look.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><pre id="out"></pre>{frame}<script>{look}</script>')
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found is not None and found[1], done.stderr
    out: dict[str, Any] = json.loads(escape.unescape(found[1]))
    return out


@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_in_a_browser(width: int, tmp_path: Path) -> None:
    found = opened(tmp_path, width)
    assert found["failures"] == [] and found["sideways"] <= 0
    assert found["aria"] == "ascending" and found["named"] == sorted(found["named"])
    assert found["up"][0] == "grown" and found["up"] != found["before"]
    assert sorted(found["up"]) == sorted(found["down"]) and found["down"][-1] == "grown"
    assert len(found["figures"]) == 4
    assert found["faint"] == found["again"] == 0 and found["others"] == sorted(SAVED.keys() - {"grown"})
    assert all(figure["width"] <= width and not figure["outside"] for figure in found["figures"])


def test_a_browser_sees_what_is_wrong(tmp_path: Path) -> None:
    assert opened(tmp_path, 360, ("<h1>", '<h1 style="width: 900px">'))["sideways"] > 0
    assert opened(tmp_path, 1200, ("</body>", "<script>none.there()</script></body>"))["failures"]
