"""The report's page in a real browser: nothing overlaps or is cut, no error, and the keyboard reaches everything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from shardwise.report import save_page
from tests.unit.comparisons import comparison, with_origins, with_steps

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHECKS = Path(__file__).with_name("page_checks.js").read_text(encoding="utf-8")
HEIGHT = 2400
FRAME = """<!doctype html><body style="margin: 0">
<script>
onmessage = (event) => {{
  const left = document.createElement("script");
  left.type = "application/json";
  left.id = "checked";
  left.textContent = event.data;
  document.body.append(left);
}};
</script>
<iframe src="{page}" style="border: 0; width: {width}px; height: {height}px"></iframe>
"""
HOSTILE = "<script>document.title = 'taken over'</script>"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the browser made of a page."""

    found: dict[str, Any]
    console: list[str]
    size: tuple[int, int]
    brightness: float


def look_at(page: Path, *, width: int, is_dark: bool) -> Seen:
    """Open a page with the checks behind its own script, and take a picture of it."""
    digest = base64.b64encode(hashlib.sha256(CHECKS.encode()).digest()).decode()
    text = page.read_text(encoding="utf-8")
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    text = text.replace("</body>", f"<script>{CHECKS}</script></body>")
    checked = page.with_stem(f"{page.stem}-{width}-{'dark' if is_dark else 'light'}")
    checked.write_text(text, encoding="utf-8")
    # A browser's window has a smallest width; a frame has none, and counts as the screen for what is in it.
    frame = checked.with_stem(f"frame-of-{checked.stem}")
    frame.write_text(FRAME.format(width=width, height=HEIGHT, page=checked.name), encoding="utf-8")
    picture = checked.with_suffix(".png")
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",  # tests may run as root, for whom there is none
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={page.with_name('browser')}",
            f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
            f"--window-size={width},{HEIGHT}",
            "--virtual-time-budget=5000",
            f"--screenshot={picture}",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (found,) = re.findall(
        r'<script type="application/json" id="checked">(.*?)</script>', done.stdout, re.DOTALL
    )
    return Seen(
        found=json.loads(found),
        console=[line for line in done.stderr.splitlines() if "CONSOLE" in line],
        size=struct.unpack(">II", picture.read_bytes()[16:24]),
        brightness=float(imread(picture)[..., :3].mean()),
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    document = with_origins(
        with_steps(comparison(ranks=4, device_mib=140, failed=("accelerate-eager",))), (HOSTILE, "model.norm")
    )
    document["model"] = HOSTILE
    for entry in document["runs"]:
        for line in entry.get("timelines", ()):  # ticks with decimals, one of them near the end
            line["seconds"] = [0.62 * seconds for seconds in line["seconds"]]
            for span in line["phases"]:
                span["start_seconds"] *= 0.62
                span["stop_seconds"] *= 0.62
    path = tmp_path_factory.mktemp("page") / "report.html"
    save_page([document], path)
    return path


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_is_sound_on_phone_and_desk_in_light_and_dark(page: Path, width: int, is_dark: bool) -> None:
    seen = look_at(page, width=width, is_dark=is_dark)
    assert seen.found["faults"] == []
    assert seen.console == []
    assert (seen.found["width"], seen.found["dark"]) == (width, is_dark)
    assert seen.found["states"] >= 5  # as it opens, with every part open, and each figure
    assert seen.found["texts"] > 300
    assert seen.size == (width, HEIGHT)
    assert seen.brightness < 0.4 if is_dark else seen.brightness > 0.8
    assert HOSTILE in seen.found["title"]  # as text


def test_the_checks_find_what_is_wrong(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    spoilt = page.with_name("spoilt.html")
    spoilt.write_text(
        text.replace(
            "</style>", ".y-axis span { bottom: 0 !important; } h2 { width: 3000px; color: #777; }</style>"
        )
        .replace("<caption>", "<caption hidden>", 1)
        .replace("</body>", "<script>alert(1)</script><p onclick='1'>late</p></body>"),
        encoding="utf-8",
    )
    seen = look_at(spoilt, width=375, is_dark=True)
    faults = "\n".join(seen.found["faults"])
    assert "overlap" in faults
    assert "the page is 30" in faults
    assert "has a contrast of" in faults
    assert any("Content Security Policy" in line for line in seen.console)
