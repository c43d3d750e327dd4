"""The HTML report as people use it, in headless Chromium."""

from __future__ import annotations

import json
import re

import pytest
import safetensors.torch
import torch

from pytest_quantcheck.report import html
from tests import models, runs
from tests.browser import chromium, needs_chromium

pytestmark = needs_chromium

ROWS = (
    "[...document.querySelectorAll('#artifact-0 .tensors tbody tr')]"
    ".map(row => [...row.cells].map(cell => cell.textContent))"
)
VIEW = "[...document.querySelectorAll('#artifact-0 .view')].filter(view => view.checkVisibility()).map(view => view.id)"
# The contrast of a text with the nearest background behind it (WCAG 2), the smallest over what a selector finds.
CONTRAST = """(selector, property, behind) => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => {
      const part = byte / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = (element) => {
    if (behind) return getComputedStyle(element.parentElement.querySelector(behind)).fill;
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "white";
  };
  return Math.min(...[...document.querySelectorAll(selector)].map((element) => {
    const [low, high] = [light(getComputedStyle(element)[property]), light(back(element))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }));
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small Llama in NF4 with the nibbles of one weight swapped and its embedding in 32 bit, and a sound one."""
    folder = tmp_path_factory.mktemp("browser")
    models.save("llama", folder / "full")
    models.load(folder / "full", **models.NF4).save_pretrained(folder / "sound")
    models.load(folder / "full", **models.NF4).save_pretrained(folder / "broken")
    tensors = safetensors.torch.load_file(folder / "broken/model.safetensors")
    codes = tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = (codes >> 4) | (codes << 4)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.float32)
    safetensors.torch.save_file(tensors, folder / "broken/model.safetensors")
    broken = runs.artifact(
        folder / "broken", budget=1, reference=folder / "full", baseline=folder / "sound", message="Ask first."
    )
    return runs.run(broken, runs.artifact(folder / "sound"), runs.unreadable("absent", "absent: no such file"))


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html.render(run))
    return path


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(window):
    """The browser, which must have nothing to complain about at the end of a test."""
    window.requests.clear()
    window.complaints.clear()
    yield window
    assert not window.complaints
    assert [address for address in window.requests if not address.startswith("file:")] == []


def search(browser, text):
    browser.run("(field => { field.value = ''; field.focus(); })(document.querySelector('#artifact-0 input'))")
    browser.write(text)
    return browser.run(ROWS), browser.run("document.querySelector('#artifact-0 output').textContent")


def test_search_keeps_the_rows_that_have_every_word(browser, page, run):
    browser.open(page)
    names = [tensor["name"] for tensor in run["artifacts"][0]["inspect"]["tensors"]]
    assert sorted(row[0] for row in browser.run(ROWS)) == sorted(names)
    found, said = search(browser, "down_proj")
    assert sorted(row[0] for row in found) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)]
    assert said == f"3 of {len(names)} tensors"
    found, _ = search(browser, "LAYERS.2 proj mlp.gate")
    assert [row[0] for row in found] == ["model.layers.2.mlp.gate_proj.weight"]
    found, _ = search(browser, "failed")
    assert [row[0] for row in found] == ["model.layers.1.mlp.down_proj.weight"]
    assert search(browser, "no such tensor") == ([], f"0 of {len(names)} tensors")
    assert browser.requests == [page.as_uri()]


@pytest.mark.parametrize("column", ["tensor", "SQNR dB", "gain", "bytes", "bits"])
def test_a_click_on_a_header_sorts_and_another_turns_it_round(browser, page, column):
    browser.open(page)
    heads = browser.run("[...document.querySelectorAll('#artifact-0 .tensors th')].map(head => head.textContent)")
    at = heads.index(column)
    columns = []
    for _ in range(2):
        browser.run(f"document.querySelectorAll('#artifact-0 .tensors th button')[{at}].click()")
        columns.append([row[at] for row in browser.run(ROWS)])
    up, down = columns
    if column == "tensor":
        assert up == sorted(up)
    else:
        numbers = [float(cell.replace(",", "")) for cell in up if re.match(r"[-+\d]", cell)]
        assert numbers == sorted(numbers)
        assert len(set(numbers)) > 1
    assert down != up
    assert sorted(down) == sorted(up)


def test_keys_go_into_the_map_of_bytes_and_out_again(browser, page):
    browser.open(page, height=700)
    (whole,) = browser.run(VIEW)
    first = browser.run(
        f"(link => {{ link.focus(); link.scrollIntoView(); return link.getAttribute('href').slice(1); }})"
        f"(document.querySelector('#{whole} .landscape a:not([tabindex])'))"
    )
    before = browser.run("scrollY")
    browser.press("Enter")
    assert browser.run(VIEW) == [first]
    assert browser.run("scrollY") == before
    assert browser.run("document.activeElement.id") == first
    browser.press("Tab")  # the branch above
    assert browser.run("document.activeElement.getAttribute('href')") == f"#{whole}"
    browser.press("Tab")
    deeper = browser.run("document.activeElement.getAttribute('href')")
    browser.press("Enter")
    assert browser.run(VIEW) == [deeper.removeprefix("#")]
    browser.press("Escape")
    browser.press("Escape")
    assert browser.run(VIEW) == [whole]


def test_a_click_inside_of_a_frame_goes_one_step_in(browser, page):
    browser.open(page)
    (whole,) = browser.run(VIEW)
    x, y, target = browser.run(
        "(link => { link.scrollIntoView({block: 'center'});"
        " const box = link.querySelector('rect').getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2, link.getAttribute('href').slice(1)]; })"
        f"(document.querySelector('#{whole} .landscape a[tabindex]'))"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert browser.run(VIEW) == [target]


def test_the_map_has_every_byte_and_its_table_says_the_same(browser, page, run):
    browser.open(page)
    (whole,) = browser.run(VIEW)
    area, cells = browser.run(
        "(map => [map.viewBox.baseVal.width * map.viewBox.baseVal.height,"
        " [...map.children].filter(cell => !cell.hasAttribute('tabindex'))"
        " .map(cell => cell.querySelector('rect').getBBox())"
        f" .map(box => box.width * box.height)])(document.querySelector('#{whole} .landscape'))"
    )
    tree = run["artifacts"][0]["why"]["tree"]
    shares = sorted(child["bytes"] / tree["bytes"] for child in tree["children"])
    assert sorted(cell / area for cell in cells if cell / area > 0.01) == pytest.approx(
        [share for share in shares if share > 0.01], abs=2e-3
    )
    table = browser.run(
        "[...document.querySelectorAll('#artifact-0 .in-0')].map(head => head.parentElement.cells[2].textContent)"
    )
    assert sum(int(cell.replace(",", "")) for cell in table) == tree["bytes"]


def test_without_scripts_the_map_still_zooms_and_rows_are_shown(browser, page):
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open("about:blank")
        browser.open(f"{page.as_uri()}#map-0-1")
        assert browser.run(VIEW) == ["map-0-1"]
        assert len(browser.run(ROWS)) == html.ROWS
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_is_readable_in_light_and_dark(browser, page, dark):
    browser.open(page, dark=dark)
    red, green, blue = map(int, re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor")))
    assert (max(red, green, blue) < 60) == dark
    for selector in (
        "h1",
        "h3",
        ".muted",
        ".chip",
        ".why",
        ".headline",
        ".message",
        "td",
        "th",
        "pre",
        "a",
        ".saving",
        ".gpus li",
        ".wrong li",
    ):
        assert browser.run(f"({CONTRAST})({json.dumps(selector)}, 'color')") >= 4.5, selector
    assert browser.run(f"({CONTRAST})('.view text', 'fill', 'rect')") >= 4.5


@pytest.mark.parametrize("width", [320, 390, 820, 1200])
def test_no_page_is_wider_than_its_window(browser, page, width):
    browser.open(page, width=width)
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("document.querySelectorAll('.view .portrait')[0].checkVisibility()") == (width < 700)


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_the_lines_of_a_failure_are_not_cut_off(browser, run, tmp_path, width):
    path = tmp_path / "report.html"
    artifact = run["artifacts"][0]
    line = "  +12.80 KB  model.layers.0.mlp.down_proj.weight  plain BF16 4.22 KB -> 17.02 KB, 12.80 KB over"
    checks = [{**artifact["checks"][0], "details": [line]}]
    path.write_text(html.render({**run, "artifacts": [{**artifact, "checks": checks}]}))
    browser.open(path, width=width)
    widths = browser.run("[...document.querySelectorAll('pre')].map(box => [box.scrollWidth, box.clientWidth])")
    assert len(widths) == 1
    assert all(inside <= box for inside, box in widths)


def test_a_failing_tensor_has_a_card_and_no_line_beside(run):
    artifact = run["artifacts"][0]
    size, fidelity = artifact["checks"]
    alone = {**artifact, "checks": [size, {**fidelity, "check": "fidelity"}]}
    (line,) = (line for line in fidelity["details"] if line.startswith("model.layers.1.mlp.down_proj.weight: "))
    message = line.partition(": ")[2].partition(";")[0]
    assert html.render({**run, "artifacts": [alone]}).count(message) == 1
    assert html.render({**run, "artifacts": [{**alone, "compare": None}]}).count(message) == 1


def test_paper_shows_what_was_folded(browser, page):
    browser.open(page)
    browser.run("document.querySelector('#artifact-1').open = false")
    assert len(browser("Page.printToPDF", printBackground=True)["data"]) > 50_000
    assert browser.run("document.querySelector('#artifact-1').open")


def test_a_failing_tensor_is_named_with_its_numbers_and_marked_on_the_heat_map(browser, page):
    browser.open(page)
    wrong = browser.run("document.querySelector('.wrong').textContent")
    assert "model.layers.1.mlp.down_proj.weight" in wrong
    assert "Diagnosis: likely nibbles-swapped" in wrong
    marked = browser.run(
        "[...document.querySelectorAll('.heat td.bad')]"
        ".map(cell => [cell.title, cell.parentElement.cells[0].textContent])"
    )
    assert [module for _, module in marked] == ["mlp.down_proj"]
    assert marked[0][0].startswith("model.layers.1.mlp.down_proj.weight: ")
    assert browser.run("document.querySelectorAll('.heat td').length") == 3 * 7
