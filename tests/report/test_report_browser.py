"""The page in a real browser: it fits, it is drawn, it follows light and dark, and it makes no noise."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_samples import CASES, privacy_alone, rendered, sample

from fedtune.report import compare

LEARNING = ["run-accuracy-rounds", "run-loss-rounds", "run-accuracy-bytes", "run-loss-bytes"]
USUAL = [*LEARNING, "run-clients", "run-split"]
PLOTS = {
    "usual": USUAL, "many-clients": USUAL, "hostile": USUAL, "diverged": USUAL, "images": USUAL,
    "unfinished": [*LEARNING, "run-split"], "not-begun": ["run-split"],
    "devices": [*LEARNING, "run-accuracy-time", "run-loss-time", "run-clients", "run-split"],
    "private": [*USUAL, "run-epsilon-rounds", "run-epsilon-clients"],
    "privacy-alone": ["run-epsilon-rounds", "run-epsilon-clients"],
    "compare": ["compare-rounds", "compare-bytes"],
}  # fmt: skip
MEASURE = """
const heights = f => [...f.querySelectorAll('.plot svg text')].map(t => t.getBoundingClientRect().height);
const box = e => { const b = e.getBoundingClientRect(); return Math.max(b.width, b.height); };
document.querySelectorAll('details').forEach(d => d.open = true);
return {
  plots: Object.fromEntries([...document.querySelectorAll('figure')].map(f => [f.id, {
    width: f.querySelector('.plot svg').getBoundingClientRect().width,
    height: f.querySelector('.plot svg').getBoundingClientRect().height,
    marks: [...f.querySelectorAll('[id*="-mark-"]')].map(box),
    named: !!f.querySelector('svg > title').textContent && !!f.querySelector('svg > desc').textContent,
    text: getComputedStyle(f.querySelector('.plot svg text')).fill,
    smallest: Math.min(...heights(f)),
    inside: [...f.querySelectorAll('.plot svg text')].every(t => {
      const a = t.getBoundingClientRect(), b = f.getBoundingClientRect();
      return a.left >= b.left - 1 && a.right <= b.right + 1; }),
  }])),
  over: document.scrollingElement.scrollWidth - innerWidth,
  wide: innerWidth,
  ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
  requests: performance.getEntriesByType('resource').map(r => r.name),
};
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    missing = None if importlib.util.find_spec("selenium") else "selenium is not installed"
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (binary and driver):
        missing = "no chromium with chromedriver on this machine"
    if missing and os.environ.get("CI"):
        pytest.fail(f"{missing}, and CI is set")
    if missing:
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("pages"), {}
    for name in PLOTS:
        html = (
            compare.render([sample(), CASES["unfinished"]()])
            if name == "compare"
            else privacy_alone()
            if name == "privacy-alone"
            else rendered(name)
        )
        made[name] = folder / f"{name}.html"
        made[name].write_text(html, encoding="utf-8")
    return made


def look(browser: Any, width: int, scheme: str) -> dict[str, Any]:
    """What the open page is like at this width and in this scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    return browser.execute_script(MEASURE)


def brightness(css: str) -> float:
    """Relative luminance of an rgb() colour, as WCAG defines it."""
    parts = [float(p) / 255 for p in css[css.index("(") + 1 : -1].split(",")[:3]]
    r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("name", PLOTS)
def test_page_in_a_browser(name: str, browser: Any, pages: dict[str, Path]) -> None:
    browser.get(pages[name].as_uri())
    for width in (1280, 360):
        light, dark = (look(browser, width, scheme) for scheme in ("light", "dark"))
        for seen in (light, dark):
            assert seen["requests"] == [] and seen["wide"] == width and seen["over"] <= 0
            assert set(seen["plots"]) == set(PLOTS[name])
            for key, plot in seen["plots"].items():
                assert plot["width"] > 250 and plot["height"] > 60, (width, key)
                assert plot["marks"] and all(size > 0 for size in plot["marks"]), (width, key)
                assert plot["named"] and plot["inside"] and plot["smallest"] >= 8, (width, key)
        assert light["ink"] != dark["ink"] and light["paper"] != dark["paper"]
        assert brightness(light["paper"]) > 0.8 > 0.05 > brightness(dark["paper"])
        assert all(light["plots"][key]["text"] != dark["plots"][key]["text"] for key in light["plots"])
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(scheme: str, browser: Any, pages: dict[str, Path]) -> None:
    """WCAG AA: 4.5 to 1 for every kind of text on what lies behind it; 3 to 1 for lines in plots."""
    browser.get(pages["diverged"].as_uri())
    look(browser, 1280, scheme)
    names = ["page", "card", "ink", "muted", "fed", "head", "local", "majority", "warn", "warn-tint"]
    colours = browser.execute_script("""
        const probe = document.body.appendChild(document.createElement('i'));
        const value = name => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
        return Object.fromEntries(arguments[0].map(n => [n, value(n)]));
    """, names)  # fmt: skip
    light = {name: brightness(css) for name, css in colours.items()}

    def contrast(front: str, back: str) -> float:
        high, low = sorted((light[front], light[back]), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for front, back in (
        ("ink", "page"),
        ("ink", "card"),
        ("muted", "page"),
        ("muted", "card"),
        ("fed", "page"),
        ("warn", "warn-tint"),
    ):
        assert contrast(front, back) >= 4.5, (front, back)
    for line in ("fed", "head", "local", "majority"):
        assert contrast(line, "card") >= 3, line
