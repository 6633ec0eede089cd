"""The pictures of docs/tour.md, docs/commands.md and docs/api.md, of the runs and pages that the tour makes.

    PYTHONPATH=. python scripts/screenshots.py [--tour FOLDER] [--notebook tour.html]

FOLDER is where the commands of docs/tour.md were run. ``jupyter nbconvert --to html docs/tour.ipynb`` makes tour.html.
Needs Chromium and TensorBoard.
"""

from __future__ import annotations

import argparse
import io
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image

from tests.browser import Browser

IMAGES = Path(__file__).parent.parent / "docs" / "images"
MOST_BYTES = 150_000
# What TensorBoard's tabs are asked to show: time series by the filters of its address, columns by their check boxes.
SERIES = "?runFilter=rate&tagFilter=test/accuracy_ema%7Ctrain/loss&smoothing=0#timeseries"
COLUMNS = ["schedule.learning_rate", "train.seed", "result/test_accuracy", "result/test_loss"]
# TensorBoard's pages are trees of shadow roots, which a query does not enter.
EVERY_ELEMENT = """
function within(root) {
  return [...root.querySelectorAll("*")].flatMap(e => e.shadowRoot ? [e, ...within(e.shadowRoot)] : [e]);
}"""
CHOOSE_COLUMNS = """
for (const box of within(document).filter(e => e.localName == "paper-checkbox")) {
  const name = box.innerText.trim();
  if (/^[a-z]+[./]/.test(name) && box.checked != COLUMNS.includes(name)) box.click();
}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tour", type=Path, default=Path(), help="where the tour was run (default: here)")
    parser.add_argument("--notebook", type=Path, help="docs/tour.ipynb as HTML")
    arguments = parser.parse_args()
    browser = Browser()
    try:
        page(browser, arguments.tour / "runs" / "first" / "report.html", "tour-report", height=1360)
        page(browser, arguments.tour / "runs" / "first" / "report.html", "tour-mistakes", height=620, part="mistakes")
        page(browser, arguments.tour / "rates.html", "tour-rates", height=1180)
        if arguments.notebook:
            page(browser, arguments.notebook, "notebook", height=1500, width=920)
        tensorboard(browser, arguments.tour / "runs")
    finally:
        browser.close()
    return 0


def page(browser: Browser, path: Path, name: str, *, height: int, width: int = 1100, part: str = "") -> None:
    """A picture of the top of a page, or of the section ``part`` of it."""
    browser.open(path, width=width, height=height)
    if part:
        browser.run(f"document.getElementById({part!r}).scrollIntoView()")
    time.sleep(1)  # for curves, which are drawn after loading
    save(browser, name)


def tensorboard(browser: Browser, runs: Path) -> None:
    """Pictures of the time series and of the HPARAMS tab, of the runs of two learning rates."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", runs, "--host", "127.0.0.1", "--port", port]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(address + "data/runs")
        visit(browser, address + SERIES, height=640)
        browser.run("document.querySelector('button[aria-label=\"Close side pane\"]').click()")
        time.sleep(2)
        save(browser, "tensorboard")
        visit(browser, address + "#hparams", height=400)
        browser.run(f"(() => {{ {EVERY_ELEMENT} const COLUMNS = {COLUMNS}; {CHOOSE_COLUMNS} }})()")
        time.sleep(2)
        save(browser, "hparams")
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str) -> None:
    """Until TensorBoard answers and lists runs."""
    until = time.monotonic() + 60
    while True:
        try:
            if urllib.request.urlopen(address).read() != b"[]":
                break
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(0.5)
    time.sleep(5)  # the event files, which are read after their names


def visit(browser: Browser, address: str, *, height: int) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=height, deviceScaleFactor=1, mobile=False)
    browser.call("Page.navigate", url="about:blank")  # an address that differs in its fragment alone loads nothing
    browser.call("Page.navigate", url=address)
    time.sleep(10)


def save(browser: Browser, name: str) -> None:
    """Quantise what the browser shows to 256 colours, or to as many fewer as the largest file asks for."""
    path = IMAGES / f"{name}.png"
    browser.screenshot(path)
    with Image.open(path) as picture:
        shown = picture.convert("RGB")
    for colours in (256, 128, 64, 32):
        data = io.BytesIO()
        shown.quantize(colours).save(data, "PNG", optimize=True)
        if len(data.getvalue()) <= MOST_BYTES:
            break
    path.write_bytes(data.getvalue())
    print(f"wrote {path} ({len(data.getvalue()):,} bytes)")


if __name__ == "__main__":
    sys.exit(main())
