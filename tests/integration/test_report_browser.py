"""The report in a real browser, without a screen."""

import json
import shutil

import numpy as np
import pytest
from report_page import EVIL, make_page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

SLICES, ROWS, COLUMNS = 9, 40, 60
# Red, green, blue and opacity of all pixels of a canvas.
READ = """
const shown = document.getElementById(arguments[0]), copy = document.createElement("canvas");
[copy.width, copy.height] = [shown.width, shown.height];
const context = copy.getContext("2d", { willReadFrequently: true });
context.drawImage(shown, 0, 0);
return Array.from(context.getImageData(0, 0, copy.width, copy.height).data);
"""
# Width of the page; pixels of the canvas and of the screen that it takes; how far down the chart reaches.
MEASURE = """
const view = document.getElementById("slice-view");
const chart = document.getElementById("chart").getBoundingClientRect();
return [document.documentElement.scrollWidth, view.width, view.clientWidth, chart.bottom];
"""


@pytest.fixture(scope="module")
def browser():
    chromium, chromedriver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(chromedriver))
    yield driver
    driver.quit()


class Opened:
    """A page in the browser, and what a user sees of it and does with it."""

    def __init__(self, browser, path):
        self.browser = browser
        for log in ("browser", "performance"):
            browser.get_log(log)  # of the page before
        browser.get(path.as_uri())
        WebDriverWait(browser, 20).until(lambda _: self.shown() is not None)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def shown(self):
        """Number of the slice that is painted."""
        shown = self.one("#slice-view").get_attribute("data-shown")
        return shown and int(shown)

    def wait_for(self, number):
        WebDriverWait(self.browser, 10).until(lambda _: self.shown() == number, f"slice {number} is not shown")

    def press(self, keys):
        ActionChains(self.browser).send_keys(keys).perform()

    def picture(self, canvas="slice-view"):
        return np.array(self.browser.execute_script(READ, canvas), dtype=np.int16).reshape(-1, 4)

    def changed(self, action, canvas="slice-view"):
        """The picture before an action, and after it has changed."""
        before = self.picture(canvas)
        action()
        WebDriverWait(self.browser, 10).until(lambda _: (self.picture(canvas) != before).any(), "the picture stays the same")
        return before, self.picture(canvas)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    make_page(path, SLICES, shape=(ROWS, COLUMNS), warnings=["a warning"])
    return path


@pytest.fixture
def page(browser, path):
    """The page, freshly opened; in the end, the console must be empty and the network unasked."""
    page = Opened(browser, path)
    yield page
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked and {url.split(":")[0] for url in asked} <= {"file", "data"}


def colored(picture, color):
    return (np.abs(picture[:, :3] - color).max(1) < 12).sum()


CYAN, ORANGE = (76, 201, 240), (255, 140, 66)


def test_it_opens_on_the_slice_with_the_lesion(page):
    assert page.shown() == SLICES // 2
    assert page.one("#where").text == "Slice 4" and page.one("#where-mm").text == "position 20.0 mm"
    assert colored(page.picture(), CYAN) > 100 and colored(page.picture(), ORANGE) > 50


def test_the_slider_moves_the_picture(page):
    slider = page.one("#slice")
    before, after = page.changed(lambda: slider.send_keys(Keys.ARROW_RIGHT))
    assert page.shown() == 5 and colored(before, CYAN) and not colored(after, CYAN)
    page.browser.execute_script("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input'))", slider)
    page.wait_for(0)
    assert page.one("#where").text == "Slice 0"
    grey = [page.picture()[:, 0].mean(), after[:, 0].mean()]
    assert grey[0] > grey[1]  # each slice of the page is 20 HU darker than the one before


@pytest.mark.parametrize("keys, number", [
    (Keys.ARROW_RIGHT, 5), (Keys.ARROW_DOWN, 5), (Keys.ARROW_LEFT, 3), (Keys.ARROW_UP, 3),
    (Keys.PAGE_DOWN, 8), (Keys.PAGE_UP, 0), (Keys.HOME, 0), (Keys.END, 8),
    (Keys.END + Keys.ARROW_RIGHT, 8), (Keys.HOME + Keys.ARROW_RIGHT * 2, 2),
])  # fmt: skip
def test_keys_go_through_the_slices(page, keys, number):
    page.press(keys)
    page.wait_for(number)


def test_the_mouse_wheel_and_the_chart_go_through_the_slices(page):
    origin = webdriver.common.actions.wheel_input.ScrollOrigin.from_element(page.one("#slice-view"))
    ActionChains(page.browser).scroll_from_origin(origin, 0, 100).perform()
    WebDriverWait(page.browser, 10).until(lambda _: page.shown() > 4)
    chart = page.one("#chart")
    x = round(chart.size["width"] * (1.5 / SLICES - 0.5))  # from the middle of the chart to the middle of slice 1
    ActionChains(page.browser).move_to_element_with_offset(chart, x, 0).click().perform()
    page.wait_for(1)


def test_boxes_and_overlay_can_be_hidden(page):
    _, without = page.changed(page.one("#boxes").click)
    assert not colored(without, CYAN) and colored(without, ORANGE)
    assert page.one("#boxes").get_attribute("aria-pressed") == "false"
    _, with_boxes = page.changed(lambda: page.press("b"))
    assert colored(with_boxes, CYAN)
    _, without = page.changed(lambda: page.press("o"))
    assert not colored(without, ORANGE) and colored(without, CYAN)
    page.changed(page.one("#overlay").click)
    opacity = page.one("#opacity")
    _, opaque = page.changed(lambda: opacity.send_keys(Keys.END))
    assert colored(opaque, ORANGE) > 2000 and page.shown() == 4  # End moved the opacity, not the slice


def test_windows_change_the_picture_as_they_should(page):
    page.press(Keys.HOME)
    page.wait_for(0)
    hu = np.linspace(-1350, 1650, ROWS * COLUMNS)
    for number, (width, level) in enumerate([(1500, -600), (400, 40), (1800, 400)], start=1):
        if number > 1:
            page.changed(lambda: page.press(str(number)))
        assert page.one("#width").get_attribute("value") == str(width)
        expected = ((hu - level) / width + 0.5).clip(0, 1).mean() * 255
        assert page.picture()[:, 0].mean() == pytest.approx(expected, abs=4)
    page.changed(page.one("#windows button").click)
    assert page.one("#windows button").get_attribute("aria-pressed") == "true"


def test_window_by_dragging_and_by_sliders(page):
    view = page.one("#slice-view")
    drag = ActionChains(page.browser).move_to_element(view).click_and_hold().move_by_offset(40, -30).release()
    page.changed(drag.perform)
    assert int(page.one("#width").get_attribute("value")) > 1600 and int(page.one("#level").get_attribute("value")) < -650
    assert "−" in page.one("#level-text").text
    assert not page.browser.find_elements(By.CSS_SELECTOR, "#windows [aria-pressed=true]")
    page.changed(lambda: page.one("#level").send_keys(Keys.HOME))
    assert page.one("#level").get_attribute("value") == "-1350" and page.shown() == 4


def test_a_click_on_a_lesion_shows_it(page):
    page.press(Keys.HOME)
    page.wait_for(0)
    page.one(".lesions button").click()
    page.wait_for(4)
    assert "chosen" in page.one(".lesions tbody tr").get_attribute("class")
    assert colored(page.picture(), (255, 255, 255)) > 100 and not colored(page.picture(), CYAN)


def test_a_click_on_where_to_look_first_goes_there(page):
    page.press(Keys.HOME)
    page.wait_for(0)
    page.one(".look").click()
    page.wait_for(4)


def test_reconstruction_and_its_error_stand_beside_the_input(page):
    page.press(Keys.HOME)
    page.wait_for(0)
    hu = np.linspace(-1350, 1650, ROWS * COLUMNS)
    rebuilt = ((hu + 1350) / 1500).clip(0, 1) * 0.9
    assert page.picture("rebuilt-view")[:, 0].mean() == pytest.approx(255 * rebuilt.mean(), abs=4)
    error = page.picture("error-view")
    # Above the window the error is 0.1: half of the ramp, (182, 54, 121). At its lower end it is 0: black.
    assert colored(error, (182, 54, 121)) > 0.3 * len(error) and error[: len(error) // 100, :3].mean() < 20


def test_the_slice_has_its_proportion_in_millimetres(page):
    size = page.one("#slice-view").size
    assert size["width"] / size["height"] == pytest.approx(COLUMNS / (2 * ROWS), rel=0.02)
    assert [page.one(f".frame .{side}").text for side in "ARLP"] == list("ARLP")
    scale = page.one("#scale")
    assert scale.size["width"] / size["width"] == pytest.approx(float(scale.text.split()[0]) / COLUMNS, rel=0.05)


def test_every_control_has_a_name_and_can_be_reached(page):
    controls = page.browser.find_elements(By.CSS_SELECTOR, "button, input, canvas, [role=meter], svg")
    assert len(controls) > 10
    assert all(control.accessible_name for control in controls)
    reached = set()
    for _ in range(25):
        page.press(Keys.TAB)
        reached.add(page.browser.switch_to.active_element.get_attribute("id"))
    assert {"width", "level", "overlay", "opacity", "boxes", "slice"} <= reached


@pytest.mark.parametrize("width", [360, 800, 1280, 1920])
def test_it_fits_any_screen(page, width):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": False}
    )
    page.browser.refresh()
    page.wait_for(4)
    wide, pixels, shown, bottom = page.browser.execute_script(MEASURE)
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= width and pixels == pytest.approx(2 * shown, abs=2)  # sharp on a screen of two pixels for one
    if width >= 1280:
        assert bottom <= 800  # the slider and the chart are on the screen


def test_a_picture_has_contrasts_and_no_slider(browser, tmp_path):
    make_page(tmp_path / "x.html", 1, hounsfield=False, spacing=None, lung=None)
    page = Opened(browser, tmp_path / "x.html")
    names = [button.text.split()[0] for button in browser.find_elements(By.CSS_SELECTOR, "#windows button")]
    assert names == ["All", "Dark", "Bright"]
    assert not browser.find_elements(By.CSS_SELECTOR, "#slice, #chart, .frame .A, #scale")
    dark, bright = [page.changed(lambda: page.press(key))[1][:, 0].mean() for key in "23"]
    assert dark > bright
    page.press(Keys.ARROW_RIGHT)
    assert page.shown() == 0 and browser.get_log("browser") == []


def test_a_scan_with_the_name_of_a_script_does_nothing(browser, tmp_path):
    probabilities = {EVIL: 0.75, "</script><!--": 0.25}
    classification = {"predicted": EVIL, "probabilities": probabilities, "slices": 2, "agreeing": 1}
    rows = {"position_mm": None, "probabilities": probabilities, "novelty": None, "boxes": []}
    slices = [{"index": k, **rows, "reconstruction_error": None} for k in range(2)]
    make_page(tmp_path / "x.html", 2, tasks=("classification",), scan=EVIL, classification=classification, slices=slices)
    page = Opened(browser, tmp_path / "x.html")
    assert page.one("h1").text == EVIL and page.one("#slice-bars span").text == EVIL
    assert browser.get_log("browser") == []
