"""The pack as an artist meets it: ComfyUI's own frontend, in Chromium on a laptop's screen.

Playwright drives the Chromium that is installed; CHROMIUM names one that is not on the PATH.
"""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host.saved_workflows import NAMES, NOTES, TRY_IT, read
from tests.host.server import SHIPPED, Server

pytestmark = [pytest.mark.host, pytest.mark.browser]

SETTINGS = {"Comfy.TutorialCompleted": True, "LiteGraph.Canvas.MaximumFps": 10}
"""No first-run dialog; time for the server while the browser draws."""
SCREEN = {"width": 1366, "height": 768}
WAIT_SECONDS = 120
"""Only what hangs may reach this."""
MODES = ("apply a saved file", "apply a connected LINVIDEO", "run the transfer now")
LINVIDEO_TYPES = ("LINVIDEO", "LINVIDEO_SETTINGS")
MODEL_WIDGETS = {
    "UNETLoader": ("diffusion_models", 0),
    "CLIPLoader": ("text_encoders", 0),
    "VAELoader": ("vae", 0),
    "LoraLoaderModelOnly": ("loras", 0),
    "LinVideo": ("linvideo", 1),
}
"""Where the file lies that a node names, and which of its values names it."""

READY = "window.app?.graph && app.canvas && document.querySelector('#graph-canvas')"
NODES = """() => app.graph.nodes.map((node) => ({
    type: node.type,
    title: node.title,
    red: Boolean(node.has_errors),
    box: [node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT,
          node.size[0], node.size[1] + LiteGraph.NODE_TITLE_HEIGHT],
}))"""
GROUPS = "() => app.graph.groups.map(({ title, pos, size }) => ({ title, box: [...pos, ...size] }))"
DRAWN = """() => {
    const context = CanvasRenderingContext2D.prototype;
    const original = context.fillText;
    const drawn = [];
    context.fillText = function (text, ...place) {
        drawn.push(String(text));
        return original.call(this, text, ...place);
    };
    app.canvas.draw(true, true);
    context.fillText = original;
    return drawn;
}"""
VISIBLE = "() => { app.canvas.ds.computeVisibleArea(); return [...app.canvas.visible_area] }"
WORDS = """() => {
    const node = app.graph.nodes.find(({ type }) => type === "LinVideo");
    const words = node.widgets.find(({ name }) => name === "$$node-text-preview");
    const [, needed] = node.computeSize();
    return { text: words?.value ?? "", room: words?.computedHeight, height: node.size[1], needed };
}"""
LINEARIZE = """() => {
    const node = app.graph.nodes.find(({ type }) => type === "LinVideo");
    const values = Object.fromEntries(node.widgets.map(({ name, value }) => [name, value]));
    const links = node.inputs.filter(({ link }) => link != null).map(({ name }) => name);
    return { values, links: links.sort() };
}"""
SET = """([name, value]) => {
    const node = app.graph.nodes.find(({ type }) => type === "LinVideo");
    node.widgets.find((widget) => widget.name === name).value = value;
}"""
CONNECT = """([type, output, input]) => {
    const node = app.graph.nodes.find(({ type }) => type === "LinVideo");
    let origin = app.graph.nodes.find((node) => node.type === type);
    if (!origin) app.graph.add((origin = LiteGraph.createNode(type)));
    origin.connect(output, node, node.inputs.findIndex(({ name }) => name === input));
}"""
FILES_LISTED = """() => app.graph.nodes.find(({ type }) => type === "LinVideo")
    .widgets.find(({ name }) => name === "mode.file").options.values"""
COLOURS = """(type) => [
    app.canvas.default_connection_color_byType[type],
    app.canvas.constructor.link_type_colors[type],
    getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${type}`).trim(),
]"""
OPEN = """async (name) => {
    const file = await fetch(`/api/workflow_templates/LinVideo/${encodeURIComponent(name)}.json`);
    await app.loadGraphData(await file.json(), true, true, name, { openSource: "template" });
}"""
SETTLED = "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 300)))"
"""What the frontend does after an event, it does within some frames."""
PLACE = """([type, name]) => {
    const node = app.graph.nodes.find((node) => node.type === type);
    const widget = node.widgets.find((widget) => widget.name === name);
    const [x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10];
    const { offset, scale } = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    return [canvas.left + (x + offset[0]) * scale, canvas.top + (y + offset[1]) * scale];
}"""


def find_chromium() -> str:
    """Return the path of a Chromium, or skip the test."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no Chromium is installed: apt-get install chromium, or set CHROMIUM")
    return found


def find_missing(folder: Path) -> Iterator[Path]:
    """Yield the path of every file that a workflow names and that is not there."""
    for node in itertools.chain.from_iterable(read(name)["nodes"] for name in NAMES):
        kind, value = MODEL_WIDGETS.get(node["type"], (None, 0))
        if kind and node["widgets_values"][value].endswith(".safetensors"):
            path = folder / "models" / kind / node["widgets_values"][value]
            if not path.exists():
                yield path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = find_chromium()
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def artists_server(server: Server) -> Iterator[Server]:
    """The server after its first-run dialog, with all models that the workflows name.

    Nothing of them is loaded: they are empty files.
    """
    paths = set(find_missing(server.folder))
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    server.ask("/settings", SETTINGS)
    yield server
    for path in paths:
        path.unlink()


@pytest.fixture(scope="module")
def page(artists_server: Server, chromium: Any) -> Any:
    return visit(chromium.new_page(viewport=SCREEN), artists_server)


def visit(page: Any, server: Server) -> Any:
    """Return a page when it shows ComfyUI and takes commands."""
    page.set_default_timeout(1000 * WAIT_SECONDS)
    page.goto(server.address)
    page.wait_for_function(READY)
    page.wait_for_function("app.extensionManager?.command")
    return page


def open_template(page: Any, name: str) -> None:
    """Open a workflow as the template browser does when it is clicked there."""
    page.evaluate(OPEN, name)
    page.evaluate(SETTLED)


def assert_nothing_is_wrong(page: Any) -> None:
    """No node is red, none lies on another or on the border of a group."""
    nodes = page.evaluate(NODES)
    assert [node["title"] for node in nodes if node["red"]] == []
    assert page.get_by_text("errors found").count() == 0
    pairs = itertools.combinations(nodes, 2)
    assert [(a["title"], b["title"]) for a, b in pairs if is_overlap(a["box"], b["box"])] == []
    pairs = itertools.product(nodes, page.evaluate(GROUPS))
    assert [(a["title"], b["title"]) for a, b in pairs if is_cut(a["box"], b["box"])] == []


def is_overlap(one: list[float], other: list[float]) -> bool:
    return all(
        one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2]
        for axis in (0, 1)
    )


def is_cut(one: list[float], other: list[float]) -> bool:
    """Say whether the border of another box runs through one."""
    is_inside = all(
        other[axis] <= one[axis] and one[axis] + one[axis + 2] <= other[axis] + other[axis + 2]
        for axis in (0, 1)
    )
    return is_overlap(one, other) and not is_inside


def test_the_template_browser_lists_the_workflows_in_their_order_and_opens_one(page: Any) -> None:
    page.evaluate("() => app.graph.clear()")
    page.evaluate("() => void app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_test_id("template-workflows-content").wait_for()
    page.get_by_text("LinVideo", exact=True).first.click()
    first, *_ = NAMES
    page.get_by_test_id(f"template-workflow-{first}").wait_for()
    cards = page.locator("[data-testid^='template-workflow-']")
    listed = [card.get_attribute("data-testid") for card in cards.all()]
    assert [each.removeprefix("template-workflow-") for each in listed] == list(NAMES)
    cards.first.click()
    page.wait_for_function(
        "(count) => app.graph.nodes.length === count", arg=len(read(first)["nodes"])
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_whole_and_readable_on_a_laptop(
    name: str, page: Any, artists_server: Server
) -> None:
    core = {node["type"] for node in read(name)["nodes"] if "LinVideo" not in node["type"]}
    if missing := core.difference(NOTES, artists_server.ask("/object_info")):
        pytest.skip(f"this ComfyUI has no {', '.join(missing)}")
    open_template(page, name)
    assert_nothing_is_wrong(page)
    nodes = page.evaluate(NODES)
    drawn = page.evaluate(DRAWN)
    assert [node["title"] for node in nodes if node["title"] not in drawn] == []
    left, top, width, height = page.evaluate(VISIBLE)
    for x, y, node_width, node_height in (node["box"] for node in nodes):
        assert left <= x and x + node_width <= left + width
        assert top <= y and y + node_height <= top + height


def forget_the_pack(route: Any) -> None:
    """Answer which nodes there are as a server without the pack does."""
    response = route.fetch()
    described = {k: v for k, v in response.json().items() if not k.startswith("LinVideo")}
    route.fulfill(response=response, json=described)


def test_without_the_pack_a_workflow_names_it_among_the_missing(
    artists_server: Server, chromium: Any
) -> None:
    page = chromium.new_page(viewport=SCREEN)
    page.route("**/object_info", forget_the_pack)
    open_template(visit(page, artists_server), TRY_IT)
    page.get_by_text("View details").first.click()
    page.get_by_text("Missing Node Packs").wait_for()
    page.get_by_text("linvideo", exact=True).wait_for()
    page.close()


def test_run_on_the_demo_shows_a_video_and_what_differs(page: Any, artists_server: Server) -> None:
    open_template(page, TRY_IT)
    page.evaluate(
        "() => app.graph.nodes.filter(({ type }) => type === 'KSampler').forEach("
        "(node) => { node.widgets.find(({ name }) => name === 'cfg').value = 7 })"
    )
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function(
        "() => app.graph.nodes.some(({ type, imgs }) => /WEBP/.test(type) && imgs)"
    )
    *_, answer = artists_server.ask("/history").values()
    assert answer["status"]["status_str"] == "success", answer["status"]
    assert_nothing_is_wrong(page)
    for words in ("Sampled: cfg 7", "ms (plain PyTorch)"):
        page.wait_for_function(f"() => ({WORDS})().text.includes('{words}')")
    page.evaluate(SETTLED)
    said = page.evaluate(WORDS)
    assert said["room"] >= 15 * len(said["text"].split("\n"))
    assert said["height"] >= said["needed"]


def choose(page: Any, widget: str, value: str) -> None:
    """Choose a value of a list of LinVideo Linearize, by clicks."""
    page.mouse.click(*page.evaluate(PLACE, ["LinVideo", widget]))
    page.locator(".litemenu-entry", has_text=value).click()
    page.wait_for_function(
        f"([name, value]) => ({LINEARIZE})().values[name] === value", arg=[widget, value]
    )
    page.evaluate(SETTLED)


def reopen(page: Any) -> None:
    """Save the graph and load what was saved."""
    page.evaluate("() => app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())))")
    page.evaluate(SETTLED)


def test_switching_modes_and_back_loses_nothing(page: Any) -> None:
    open_template(page, TRY_IT)
    typed = "a handwritten three moving left\na handwritten four moving up"
    page.evaluate(SET, ["mode.strength", 0.35])
    choose(page, "mode", MODES[2])
    page.get_by_placeholder("prompts to learn with").fill(typed)
    choose(page, "mode.quality", "best")
    page.evaluate(CONNECT, ["LinVideoTransferSettings", 0, "mode.settings"])
    page.evaluate(CONNECT, ["LinVideoDemo", 1, "mode.positive"])
    transfer = page.evaluate(LINEARIZE)
    assert transfer["values"]["mode.prompts"] == typed
    assert transfer["links"] == ["mode.positive", "mode.settings", "model"]

    choose(page, "mode", MODES[1])
    page.evaluate(CONNECT, ["LinVideoLoad", 0, "mode.linvideo"])
    choose(page, "mode", MODES[0])
    assert page.evaluate(LINEARIZE)["values"]["mode.strength"] == 0.35
    reopen(page)
    assert page.evaluate(LINEARIZE)["values"]["mode.strength"] == 0.35
    choose(page, "mode", MODES[2])
    assert page.evaluate(LINEARIZE) == transfer
    reopen(page)
    assert page.evaluate(LINEARIZE) == transfer
    choose(page, "mode", MODES[1])
    assert page.evaluate(LINEARIZE)["links"] == ["mode.linvideo", "model"]


def test_a_file_that_was_made_meanwhile_is_listed_after_r(
    page: Any, artists_server: Server
) -> None:
    open_template(page, TRY_IT)
    made = artists_server.folder / "models" / "linvideo" / "made meanwhile.safetensors"
    made.write_bytes(SHIPPED.read_bytes())
    page.mouse.click(SCREEN["width"] // 2, SCREEN["height"] - 60)
    page.keyboard.press("r")
    page.wait_for_function(f"(file) => ({FILES_LISTED})().includes(file)", arg=made.name)
    choose(page, "mode", MODES[2])
    choose(page, "mode", MODES[0])
    assert made.name in page.evaluate(FILES_LISTED)
    choose(page, "mode.file", made.name)
    made.unlink()


def search(page: Any, words: str) -> list[str]:
    """Type words into the search for nodes and return the titles of what it finds."""
    page.get_by_role("combobox").fill(words)
    page.evaluate(SETTLED)
    return [found.inner_text().split("\n")[0] for found in page.get_by_test_id("result-item").all()]


def test_the_search_finds_linearize_first(page: Any) -> None:
    page.evaluate("() => app.graph.clear()")
    page.evaluate(SETTLED)
    # A page that is busy may take two clicks for two single ones.
    for _ in range(5):
        page.mouse.dblclick(SCREEN["width"] // 2, SCREEN["height"] - 60)
        page.wait_for_timeout(1000)
        if page.get_by_role("combobox").count():
            break
    for words in ("linvideo", "speed up wan", "linear attention"):
        assert search(page, words)[0] == "LinVideo Linearize", words
    for words in ("sage", "teacache"):
        assert "LinVideo Linearize" in search(page, words), words
    page.keyboard.press("Escape")


def test_linvideo_sockets_have_a_colour_in_every_palette(page: Any) -> None:
    for palette in ("dark", "light"):
        page.evaluate(
            "(palette) => app.extensionManager.setting.set('Comfy.ColorPalette', palette)", palette
        )
        page.evaluate(SETTLED)
        for kind in LINVIDEO_TYPES:
            colours = page.evaluate(COLOURS, kind)
            assert len(set(colours)) == 1 and colours[0].startswith("#"), (palette, kind, colours)
