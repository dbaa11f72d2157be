"""``dino explore``: the page's numbers are Python's, in a real browser (headless Chromium) where there is one."""

import base64
import json
import re
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino.commands import cli
from dino.config import ModelConfig
from dino.data.sources import open_source
from dino.encoder.components import Codes
from dino.encoder.encoder import open_encoder
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone

MARKUP = "<img src=x onerror=window.hacked=1><script>window.hacked=1<script>&amp;.png"  # A name may not hold "/".


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of 14 images of two classes, 12 of them with patches; one is broken, one is called like a script."""
    folder = tmp_path_factory.mktemp("explore")
    random = np.random.default_rng(0)
    for i in range(14):
        path = folder / "data" / ("ant" if i < 7 else "bee") / (MARKUP if i == 0 else f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        colors = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(colors).resize((40, 40), Image.Resampling.NEAREST).save(path)
    (folder / "data" / "bee" / "broken.png").write_bytes(b"none")
    torch.manual_seed(0)
    save_backbone(VisionTransformer(32, 8, 3, 48, 2, 3), folder / "w.safetensors", ModelConfig(), 32)
    arguments = ["explore", str(folder / "w.safetensors"), str(folder / "data"), "--out", str(folder / "x.html")]
    assert cli.main([*arguments, "--patches", "12", "--device", "cpu"]) == 0
    return folder


def data_of(page: str) -> dict:
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[0])


def codes_of(data: dict) -> Codes:
    codes = torch.from_numpy(np.frombuffer(base64.b64decode(data["codes"]), np.int8).copy()).view(-1, data["width"])
    return Codes(codes, torch.tensor(data["scales"]))


def test_what_the_page_holds(made):
    page = (made / "x.html").read_text()
    data, source = data_of(page), open_source(made / "data")
    readable = [i for i in range(15) if "broken" not in source.name(i)]
    assert data["names"] == [source.name(i) for i in readable]
    assert [data["classes"][i] for i in data["labels"]] == ["ant"] * 7 + ["bee"] * 7
    assert len(data["dense"]) in (11, 12)  # Of twelve evenly spread ones the broken one may be one.
    assert "cannot be read" in page
    # Nothing is asked of a network, and the only script is ours.
    assert not re.findall(r'(?:src|href)\s*=\s*"?https?:', page.replace(json.dumps(data), ""))
    assert len(re.findall(r"<script", page)) == 2
    assert "onerror=window" not in page.replace("\\u003c", "")[: page.index('id="data"')]
    # The codes are the encoder's patch tokens, to the error that the page states.
    encoder = open_encoder(str(made / "w.safetensors"), device="cpu")
    shown = source.subset([readable[i] for i in data["dense"]])
    images = torch.cat([pixels for pixels, _ in encoder.batches(shown, {})])
    exact = F.normalize(encoder.tokens(images).patch_tokens.flatten(0, 2), dim=1)
    codes = codes_of(data)
    assert data["grid"] == [4, 4]
    worst = max((codes.similarities(i) - exact @ exact[i]).abs().max().item() for i in range(0, len(exact), 7))
    assert worst < 0.03
    attention = encoder.attention(images)
    kept = np.frombuffer(base64.b64decode(data["attention"]), np.uint8).reshape(attention.shape) / 255
    np.testing.assert_allclose(kept, attention / attention.amax((2, 3), keepdim=True), atol=0.003)
    features = encoder.features(source).features
    similarities = (features @ features.mT).fill_diagonal_(-9)
    assert data["neighbors"][3] == similarities[3].argsort(descending=True)[:12].tolist()


def test_bad_input_is_named(made, capsys):
    arguments = ["explore", str(made / "w.safetensors"), str(made / "data"), "--out"]
    for more in (["x.png"], ["x.html", "--patches", "0"], ["x.html", "--limit", "0"]):
        assert cli.main([*arguments, *more]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_backbone_without_attention(made, tmp_path):
    from dino.models.backbone import Tokens
    from dino.pictures.explore import explore

    class Colors(torch.nn.Module):
        embed_dim, patch_size = 3, 8

        def forward(self, images):
            patches = F.avg_pool2d(images, 8).permute(0, 2, 3, 1)
            return Tokens(patches.mean((1, 2)), patches)

    explore(open_encoder(Colors(), size=16, resize=16), open_source(made / "data"), tmp_path / "x.html", limit=5)
    data = data_of((tmp_path / "x.html").read_text())
    assert data["heads"] == 0
    assert "attention" not in data
    assert len(data["names"]) <= 5


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Chromium and its driver are not installed (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1100"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def opened(browser, page):
    browser.get_log("browser")
    browser.get(page.as_uri())
    for _ in range(300):
        if browser.execute_script("return Boolean(window.explorer && window.explorer.ready)"):
            return
        time.sleep(0.1)
    pytest.fail(f"the page did not start: {browser.get_log('browser')}")


def test_a_click_shows_what_python_computes(made, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    opened(browser, made / "x.html")
    data = data_of((made / "x.html").read_text())
    codes = codes_of(data)
    browser.execute_script("explorer.select(explorer.data.dense[2])")
    image = browser.find_element(By.ID, "image")
    side = image.size["width"]
    # Row 1, column 3 of 4: offsets count from the middle.
    ActionChains(browser).move_to_element_with_offset(image, int(side * 0.375), int(-side * 0.125)).click().perform()
    assert browser.execute_script("return explorer.state.query") == {"dense": 2, "patch": 7}
    got = np.array([browser.execute_script(f"return explorer.heat({i})") for i in range(len(data["dense"]))])
    expected = codes.similarities(2 * 16 + 7).view(-1, 16)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert browser.execute_script("return explorer.milliseconds") < 1000
    # The other images follow, most similar first.
    texts = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#all button")]
    best = sorted((f"{row.max():.2f}" for i, row in enumerate(expected) if i != 2), reverse=True)
    assert texts == best
    # Keys move the patch; the picture is painted.
    image.send_keys("\ue012")  # Arrow to the left.
    assert browser.execute_script("return explorer.state.query.patch") == 6
    painted = "const c = document.getElementById('image'); return c.getContext('2d').getImageData(0, 0, 9, 9).data[3]"
    assert browser.execute_script(painted) == 255
    assert browser.get_log("browser") == []


def test_search_map_and_names_with_markup(made, browser):
    from selenium.webdriver.common.by import By

    opened(browser, made / "x.html")
    box = browser.find_element(By.ID, "search")
    box.send_keys("onerror")
    assert [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#found button")] == [
        str(made / "data" / "ant" / MARKUP)
    ]
    box.send_keys("\ue007")  # Enter.
    assert browser.find_element(By.ID, "name").text == str(made / "data" / "ant" / MARKUP)
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    browser.find_element(By.CSS_SELECTOR, "[data-mode=attention]").click()
    assert browser.execute_script("return explorer.state.mode") == "attention"
    browser.find_element(By.CSS_SELECTOR, "#headstrip button:nth-child(2)").click()
    assert browser.execute_script("return explorer.state.head") == 1
    box.send_keys("\ue00c")  # Escape: all are found again.
    seen = set()
    for key in ("\ue014", "\ue012", "\ue015", "\ue013", "+", "-", "0"):  # Right, left, down, up.
        browser.find_element(By.ID, "map").send_keys(key)
        seen.add(browser.execute_script("return explorer.state.row"))
    assert len(seen) > 1
    browser.find_element(By.ID, "theme").click()
    browser.find_element(By.ID, "theme").click()
    browser.set_window_size(500, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.get_log("browser") == []
