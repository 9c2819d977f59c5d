"""The README's picture of a report: its results in the light theme beside two captioned clips in the dark one.

python -m tests.demo.picture demo-report.html docs/report.png
"""

from __future__ import annotations

import base64
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.demo.chromium import Chromium

WIDTH, SCALE = 1080, 1.5


def take(report: Path, target: Path) -> None:
    """Photograph a report and save the picture."""
    binary = shutil.which("chromium")
    assert binary, "no Chromium here: apt-get install chromium"
    with tempfile.TemporaryDirectory() as profile:
        browser = Chromium(binary, Path(profile))
        try:
            browser.open(report, width=WIDTH)
            results = _part(browser, "[0, document.querySelector('#reading').getBoundingClientRect().top]")
            browser.open(report, width=WIDTH, dark=True)
            # from the first clip on whose captions differ, as far as the results reach
            top = browser.evaluate(
                "(document.querySelector('.clip:not(.same):has(.corrected)') ?? document.querySelector('.clip'))"
                ".getBoundingClientRect().top - 16"
            )
            clips = _part(browser, f"[{top}, {top + results.height / SCALE}]")
        finally:
            browser.close()
    picture = Image.new("RGB", (results.width + clips.width, results.height), clips.getpixel((0, 0)))
    picture.paste(results, (0, 0))
    picture.paste(clips, (results.width, 0))
    picture.quantize(192, dither=Image.Dither.NONE).save(target, optimize=True)


def _part(browser: Chromium, script: str) -> Image.Image:
    top, bottom = browser.evaluate(script)
    clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top, "scale": SCALE}
    data = browser.call("Page.captureScreenshot", captureBeyondViewport=True, format="png", clip=clip)["data"]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
