"""The report in a real browser: offline, as wide as the screen, moved by its controls, in both themes, without scripts, on paper."""

import math
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from report_page import STEPS, TAGS

import jaxbptt as bptt

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]

CHARTS = ("saliency", "flow", "causes", "lags", "truncation", "agreement", "singular-values")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(whole_report, browser):
    """Opens a page, and at the end checks that nothing went wrong on it and nothing was asked of a network."""

    @contextmanager
    def visit(name="text", *, width=1280, scripts=True, **options):
        problems = []
        context = browser.new_context(
            viewport={"width": width, "height": 900}, java_script_enabled=scripts, offline=True, **options
        )
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
        page.on("request", lambda request: request.url.startswith("file:") or problems.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: problems.append(message.text) if _matters(message) else None)
        page.goto((whole_report.folder / f"{name}.html").as_uri())
        if scripts:
            page.wait_for_function("!document.querySelector('.picture')")
        yield page
        context.close()
        assert problems == []

    return visit


def _matters(message):
    # Vega-Lite says this of every chart that is as wide as its container and as high as its rows.
    return message.type in ("warning", "error") and 'Dropping "fit-y"' not in message.text


WIDE = """() => {
  document.querySelectorAll("details").forEach(details => details.open = true);
  const found = [];
  const check = (what, inner, outer) => {
    if (inner.left < outer.left - 1 || inner.right > outer.right + 1) found.push([what, inner.left, inner.right, outer]);
  };
  const screen = {left: 0, right: innerWidth};
  if (document.scrollingElement.scrollWidth > innerWidth) found.push(["page", document.scrollingElement.scrollWidth]);
  for (const element of document.querySelectorAll("svg, table, select, input")) {
    const box = element.getBoundingClientRect();
    check(element.outerHTML.slice(0, 80), box, screen);
    check(element.outerHTML.slice(0, 80), box, element.parentElement.getBoundingClientRect());
  }
  for (const svg of document.querySelectorAll(".chart svg")) for (const text of svg.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    if (box.width && getComputedStyle(text).opacity > 0) check(text.textContent, box, svg.getBoundingClientRect());
  }
  return found;
}"""


@pytest.mark.parametrize("name", ["text", "numbers"])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(visit, name, width):
    with visit(name, width=width) as page:
        assert page.evaluate(WIDE) == []
        assert page.locator(".chart .live svg").count() == len(CHARTS)


def test_without_scripts_there_are_pictures_and_words(visit, whole_report):
    with visit(scripts=False, width=390) as page:
        for name in CHARTS:
            picture = page.locator(f"#{name} .picture svg")
            assert picture.is_visible()
            assert picture.bounding_box()["width"] <= 390
            assert len(page.locator(f"#{name} figcaption").inner_text()) > 20
        assert page.locator("#saliency").get_by_text("What the loss of step 24 depends on").is_visible()
        assert page.locator("body").bounding_box()["width"] <= 390
    assert (whole_report.folder / "text.html").stat().st_size < 3e6


def test_what_the_file_holds_is_text(visit):
    for name in ("text", "numbers"):
        with visit(name) as page:
            assert page.locator("img, b, #evil").count() == 0
            assert page.locator("script").count() == 1
            assert TAGS in page.locator("body").inner_text()
        with visit(name, scripts=False) as page:
            assert page.locator("img, b, #evil").count() == 0
    with visit("numbers") as page:
        assert page.locator("#saliency select").last.locator("option").all_inner_texts()[0] == "<b id=evil>a</b>"


def title(page, name):
    return page.locator(f"#{name} .role-title-text").first.text_content()


def shapes(page, name, layer):
    """What is drawn of a layer: its paths, with their places, and its words."""
    items = page.locator(f"#{name} .{layer}_marks").locator("path, text")
    return items.evaluate_all("all => all.map(e => [e.getAttribute('d'), e.getAttribute('transform'), e.textContent])")


def control(page, name, label):
    role = "slider" if label in ("K", "loss of step") else "combobox"
    return page.locator(f"#{name}").get_by_role(role, name=label)


def test_slider_moves_the_loss(visit, whole_report):
    with visit() as page:
        before = shapes(page, "saliency", "bars")
        values = whole_report.reports[0].saliency.values
        assert len(before) == np.count_nonzero(values[-1] > values[-1].max() / 1000)
        slider = control(page, "saliency", "loss of step")
        slider.focus()
        for _ in range(14):
            page.keyboard.press("ArrowLeft")
        assert title(page, "saliency") == "elmanWhat the loss of step 10 depends on"
        after = shapes(page, "saliency", "bars")
        assert len(after) == np.count_nonzero(values[9] > values[9].max() / 1000) < len(before)
        assert shapes(page, "saliency", "loss")
        page.keyboard.press("Home")
        assert title(page, "saliency") == "elmanWhat the loss of step 1 depends on"
        assert len(shapes(page, "saliency", "bars")) == 1


def test_bars_are_as_high_as_the_saliency(visit, whole_report):
    with visit() as page:
        for i, report in enumerate(whole_report.reports):
            control(page, "saliency", "network").select_option(index=i)
            assert title(page, "saliency").startswith(report.name)
            boxes = page.locator("#saliency .bars_marks path").evaluate_all("all => all.map(e => e.getBBox().height)")
            shares = report.saliency.values[-1] / report.saliency.values[-1].max()
            expected = [22 * (1 + math.log10(share) / 3) for share in shares if share > 1e-3]
            np.testing.assert_allclose(boxes, np.maximum(expected, 1), atol=0.1)


def test_columns_are_chosen(visit):
    with visit("numbers") as page:
        before, bars = shapes(page, "saliency", "series"), shapes(page, "saliency", "bars")
        control(page, "saliency", "column").select_option(index=1)
        assert shapes(page, "saliency", "series") != before
        assert shapes(page, "saliency", "bars") == bars
        control(page, "saliency", "loss of step").fill("5")
        assert shapes(page, "saliency", "bars") != bars


@pytest.mark.parametrize("name", ["flow", "lags", "truncation", "singular-values"])
def test_a_network_is_picked(visit, name):
    """In the select, and by a click on the legend."""

    def opacities():
        lines = page.locator(f"#{name} .mark-line path").evaluate_all(
            "all => all.map(e => +getComputedStyle(e).opacity)"
        )
        return lines[: 3 * curves]

    curves = 2 if name in ("truncation", "singular-values") else 1
    with visit() as page:
        assert opacities() == [1.0] * 3 * curves
        select = control(page, name, "network")
        select.select_option(label="gru")
        assert opacities() == [0.12] * curves + [1.0] * curves + [0.12] * curves
        select.select_option(label="all")
        assert opacities() == [1.0] * 3 * curves
        page.locator(f"#{name} .role-legend-label text").first.click()
        assert opacities() == [1.0] + [0.12] * (3 * curves - 1)


def test_slider_of_the_truncation_length(visit, whole_report):
    with visit(width=390) as page:
        slider = control(page, "truncation", "K")
        seen = []
        lengths = [int(K) for K in whole_report.reports[0].bias.lengths]
        for i, K in enumerate(lengths):
            slider.fill(str(i))
            words = page.locator("#truncation svg").text_content()
            assert f"K = {K}: the gradient is off by" in words
            for kind, scan, options in (
                ("truncated", bptt.truncated_scan, {"truncation_length": K}),
                ("windowed", bptt.windowed_scan, {"window": K}),
            ):
                kept = bptt.surviving_paths(scan, STEPS, **options).sum()
                assert f"{kind}: {percent(kept / 300)} of 300 paths" in words
                error = getattr(whole_report.reports[2].bias, kind).relative_errors[i]
                assert f"{percent(error)}  {kind}: lstm" in words
            seen.append(str(shapes(page, "truncation", "truncated_1") + shapes(page, "truncation", "at_0")))
        assert len(set(seen)) == len(lengths)


def percent(share):
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def test_hover_shows_values(visit, whole_report):
    with visit() as page:
        at = page.locator("#flow .hover_marks path").nth(11)
        at.scroll_into_view_if_needed()
        box = at.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tooltip = page.locator("#vg-tooltip-element")
        tooltip.wait_for()
        words = tooltip.inner_text()
        assert re.search(r"time step:?\s+12", words)
        for report in whole_report.reports:
            assert re.search(rf"{report.name}:?\s+{float(f'{report.flow.norms[11]:.3g}'):g}", words)
        page.locator("#saliency .hover_marks path").nth(0).hover()
        assert re.search(r"character:?\s+<\s+step:?\s+1\s", tooltip.inner_text())


def test_keyboard_reaches_every_control(visit):
    with visit() as page:
        wanted = page.locator(".controls input, .controls select").count()
        assert wanted == 7
        reached = {}
        for _ in range(200):
            page.keyboard.press("Tab")
            found = page.evaluate(
                "() => { const e = document.activeElement, f = e.closest('.chart');"
                "return f && e.closest('.controls') ? [f.id, e.closest('label, .vega-bind').textContent] : null; }"
            )
            if found and tuple(found) not in reached:
                before = page.evaluate("document.activeElement.value")
                page.keyboard.press("ArrowLeft" if before == str(STEPS) else "ArrowDown")
                reached[tuple(found)] = before != page.evaluate("document.activeElement.value")
            if len(reached) == wanted:
                break
        assert len(reached) == wanted
        assert all(reached.values())


DATA = """() => {
  const found = [];
  for (const mark of document.querySelectorAll(".chart .live .role-mark path, .chart .live .role-mark text")) {
    if (mark.closest("[class*='hover']") || mark.closest(".role-legend")) continue;
    const style = getComputedStyle(mark);
    for (const paint of [style.fill, style.stroke]) if (paint.startsWith("rgb(")) found.push([paint, +style.opacity]);
  }
  return [getComputedStyle(document.body).backgroundColor, found];
}"""


def contrast(one, other):
    lights = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(float(np.dot([0.2126, 0.7152, 0.0722], linear)) + 0.05)
    return max(lights) / min(lights)


def test_contrast_in_both_themes(visit):
    """Of everything that carries data; and the theme is switched without loading the page again."""
    with visit(color_scheme="light") as page:
        colours = {}
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            paper, found = page.evaluate(DATA)
            assert len(found) > 200
            assert {opacity for _, opacity in found} == {1}
            colours[theme] = {paint for paint, _ in found}
            assert min(contrast(paint, paper) for paint in colours[theme]) >= 4.5
        assert len(colours["light"]) == len(colours["dark"]) == 6
        assert not colours["light"] & colours["dark"]


def test_paper_is_light_and_has_everything(visit):
    with visit(color_scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        paper, found = page.evaluate(DATA)
        assert contrast(paper, "rgb(255, 255, 255)") == 1 or paper == "rgba(0, 0, 0, 0)"
        assert min(contrast(paint, "rgb(255, 255, 255)") for paint, _ in found) >= 4.5
        assert contrast(page.evaluate("getComputedStyle(document.body).color"), "rgb(255, 255, 255)") > 7
        for name in CHARTS:
            assert page.locator(f"#{name} svg").is_visible()
        assert not page.locator("#saliency .controls").is_visible()


def test_a_script_that_fails_leaves_the_picture(whole_report, browser):
    html = (whole_report.folder / "text.html").read_text(encoding="utf-8")
    loop = "\nfor (const [name, spec]"
    assert html.count(loop) == 1
    (whole_report.folder / "broken.html").write_text(
        html.replace(loop, f"\nspecs.flow = {{mark: 3}};{loop}"), encoding="utf-8"
    )
    page = browser.new_page(offline=True)
    page.goto((whole_report.folder / "broken.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.picture').length == 1")
    assert page.locator("#flow .picture svg").is_visible()
    assert page.locator("#flow .live svg, #flow .controls select").count() == 0
    page.close()
