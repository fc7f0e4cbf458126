"""The report page: its data, its safety, and a browser that clicks through it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from qpass.report import render
from tests.conftest import Run
from tests.rules.kit import Graph

K = 64
EVIL = "</script><script>document.title='broken out'</script><b>&{{css}}"


def decoder(layers: int = 3) -> onnx.ModelProto:
    """Layers of norm → q, k → o → norm → up → down in PyTorch's names; one norm is spoilt, the head's name wicked."""
    g = Graph()
    x = g.input("x", ["B", "S", K])

    def op(layer: int, module: str, type_: str, *inputs: str, **attributes: Any) -> str:
        return g.op(type_, *inputs, name=f"/model/layers.{layer}/{module}/{type_}", **attributes)

    for i in range(layers):
        h = op(i, "input_norm", "LayerNormalization", x, g.gain(K))
        q, k = (op(i, f"attn/{n}", "MatMul", h, g.weight(K, K)) for n in ("q_proj", "k_proj"))
        o = op(i, "attn/o_proj", "MatMul", op(i, "attn", "Mul", q, k), g.weight(K, K))
        wide = {"axis": 1} if i == 1 else {}
        gamma = g.weight(3, K) if i == 1 else g.gain(K)
        h = op(i, "post_norm", "LayerNormalization", o, gamma, **wide)
        x = op(i, "mlp/down", "MatMul", op(i, "mlp/act", "Relu", op(i, "mlp/up", "MatMul", h, g.weight(K, 256))),
               g.weight(256, K))  # fmt: skip
    g.inputs[0].type.tensor_type.shape.dim[1].dim_value = 3
    return g.model(g.op("MatMul", x, g.weight(K, 96), name=EVIL))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "tiny & <model>.onnx"
    onnx.save(decoder(), path)
    path.with_name("recipe.yaml").write_text("preset: w8a8\nexclude: ['*layers.2.attn.o_proj*']\n")
    return path


def written(run: Run, model: Path, name: str = "report.html", command: str = "rewrite", *more: object) -> Path:
    page = model.with_name(name)
    r = run(command, model, "--spec", model.with_name("recipe.yaml"), "--report", page, *more)
    assert r.code == 0, r.err
    return page


def data_of(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    found: dict[str, Any] = json.loads(text)
    return found


class TestFile:
    def test_it_holds_the_ledger_and_the_rules(self, run: Run, model: Path) -> None:
        data = data_of(written(run, model))
        ledger = json.loads(model.with_name(model.name.replace(".onnx", ".qpass.ledger.json")).read_text())
        assert data["totals"] == ledger["totals"]
        assert [(s["kind"], s["status"], s["nodes"], s["fed"]) for s in data["sites"]] == [
            (s["kind"], s["status"], s["nodes"], s["fed_by"]) for s in ledger["sites"]
        ]
        assert data["sites"][1]["path"] == ["model", "layers.0", "attn", "q_proj"]
        assert data["sites"][1]["reads"] == data["sites"][2]["reads"]
        assert {r["rule"]: r["hits"] for r in data["rules"]}["lift_matmul"] == 16
        assert "seconds" not in data["rules"][0]
        assert data_of(written(run, model, "timed.html", "rewrite", "--profile-rules"))["rules"][0]["seconds"] >= 0

    def test_inspect_writes_one_and_nothing_else(self, run: Run, model: Path, tmp_path: Path) -> None:
        alone = tmp_path / "model.onnx"
        shutil.copy(model, alone)
        shutil.copy(model.with_name("recipe.yaml"), tmp_path)
        data = data_of(written(run, alone, "report.html", "inspect"))
        assert (data["written"], len(data["sites"])) == (None, 25)
        assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "recipe.yaml", "report.html"}

    def test_same_run_same_bytes(self, run: Run, model: Path) -> None:
        assert written(run, model, "a.html").read_bytes() == written(run, model, "b.html").read_bytes()
        assert written(run, model, "a.html").read_bytes() == model.with_name("b.html").read_bytes()

    def test_names_cannot_break_out(self, run: Run, model: Path) -> None:
        page = written(run, model)
        text = page.read_text()
        assert text.count("<script") == text.count("</script>") == 2
        assert "<b>&" not in text
        assert "<title>tiny &amp; &lt;model&gt;.onnx" in text
        assert data_of(page)["sites"][-1]["name"] == EVIL

    def test_it_loads_nothing(self, run: Run, model: Path) -> None:
        text = written(run, model).read_text()
        assert set(re.findall(r"https?://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}
        assert "default-src 'none'" in text
        assert not re.search(r"\b(src|href)=|@import|url\(", text)

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("tiny & <model>.onnx", "a file of this run has that name"),
            ("tiny & <model>.qpass.onnx", "a file of this run has that name"),
            ("tiny & <model>.qpass.ledger.json", "a file of this run has that name"),
            ("recipe.yaml", "a file of this run has that name"),
            ("precious.txt", "no report of qpass's lies there"),
            ("nowhere/report.html", "there is no folder"),
            (".", "that is a folder"),
        ],
    )
    def test_places_it_refuses(self, run: Run, model: Path, name: str, says: str, tmp_path: Path) -> None:
        model.with_name("precious.txt").write_text("precious")
        before = {p: p.read_bytes() for p in model.parent.iterdir() if p.is_file()}
        out = tmp_path / "out.onnx"
        target = [] if "qpass" in name else ["-o", out]
        r = run("rewrite", model, *target, "--spec", model.with_name("recipe.yaml"), "--report", model.parent / name)
        assert r.code == 2
        assert says in r.err
        assert r.err.count("\n") == 1
        assert not out.exists()
        assert before == {p: p.read_bytes() for p in model.parent.iterdir() if p.is_file()}


# -- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1400,1000",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, run: Run, model: Path) -> Iterator[webdriver.Chrome]:
    """A fresh report in the browser; nothing may have complained by the end."""
    browser.get(written(run, model).as_uri())
    yield browser
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


def rows(page: webdriver.Chrome) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, "#rows tr.site")


def column(page: webdriver.Chrome, name: str) -> list[str]:
    return [e.text for e in page.find_elements(By.CSS_SELECTOR, f"#rows td.{name}")]


def click(page: webdriver.Chrome, selector: str) -> None:
    page.find_element(By.CSS_SELECTOR, selector).click()


def search_for(page: webdriver.Chrome, text: str) -> None:
    page.find_element(By.ID, "search").send_keys(text)


class TestInTheBrowser:
    def test_head(self, page: webdriver.Chrome) -> None:
        head = page.find_element(By.ID, "head").text
        assert "tiny & <model>.onnx" in head
        assert "Linears rewritten 15 of 15 100%" in " ".join(head.split())
        assert "× smaller" in head
        assert page.title == "tiny & <model>.onnx · qpass"

    def test_search(self, page: webdriver.Chrome) -> None:
        assert len(rows(page)) == 25
        search_for(page, "q_proj")
        assert column(page, "index") == ["1", "9", "17"]
        search_for(page, " LAYERS.1")
        assert column(page, "index") == ["9"]
        assert page.find_element(By.ID, "count").text == "1 of 25 sites"
        search_for(page, " nothing")
        assert rows(page) == []
        click(page, "#clear")
        assert len(rows(page)) == 25

    def test_sort(self, page: webdriver.Chrome) -> None:
        def sizes() -> list[int]:
            order = [int(i) for i in column(page, "index")]
            sites: list[Any] = page.execute_script(
                "return JSON.parse(document.getElementById('data').textContent).sites"
            )
            return [sites[i]["weight"]["bytes_before"] if sites[i]["weight"] else -1 for i in order]

        click(page, "#by-before button")
        assert sizes() == sorted(sizes(), reverse=True)
        assert page.find_element(By.ID, "by-before").get_attribute("aria-sort") == "descending"
        click(page, "#by-before button")
        assert sizes() == sorted(sizes())
        assert len(set(sizes())) > 2
        click(page, "#by-name button")
        assert column(page, "index") != [str(i) for i in range(25)]
        click(page, "#by-index button")
        assert column(page, "index") == [str(i) for i in range(25)]

    def test_filters(self, page: webdriver.Chrome) -> None:
        click(page, "#statuses button[data-value=near_miss]")
        assert column(page, "status") == ["near miss"]
        click(page, "#statuses button[data-value=excluded]")
        assert sorted(column(page, "status")) == ["excluded", "near miss"]
        click(page, "#kinds button[data-value=linear]")
        assert column(page, "reason") == ["excluded by exclude[0] '*layers.2.attn.o_proj*'"]

    def test_a_row_expands(self, page: webdriver.Chrome) -> None:
        click(page, "#rows tr[data-index='1'] td.index")
        detail = page.find_element(By.ID, "detail-1").text
        assert "/model/layers.0/attn/q_proj/MatMul.SmoothQuantGemm" in detail
        assert "model.layers.0.attn.q_proj" in detail
        click(page, "#by-status button")
        assert page.find_elements(By.ID, "detail-1")
        click(page, "#rows tr[data-index='1'] td.index")
        assert not page.find_elements(By.ID, "detail-1")

    def test_an_mlp_leads_to_its_linears(self, page: webdriver.Chrome) -> None:
        click(page, "#rows tr[data-index='6'] td.index")
        parts = page.find_elements(By.CSS_SELECTOR, "#detail-6 button[data-jump]")
        assert [p.get_attribute("data-jump") for p in parts] == ["5", "7"]
        parts[1].click()
        assert page.find_element(By.CSS_SELECTOR, "tr.found").get_attribute("data-index") == "7"

    def test_a_narrow_window_leaves_room_for_names(self, browser: webdriver.Chrome, run: Run, model: Path) -> None:
        frame = model.with_name("frame.html")  # a frame has its width at once, a resized window some time later
        frame.write_text(f'<iframe src="{written(run, model).as_uri()}" width="700" height="900"></iframe>')
        browser.get(frame.as_uri())
        browser.switch_to.frame(0)
        click(browser, "#rows tr[data-index='1'] td.index")
        assert browser.find_element(By.CSS_SELECTOR, "tr[data-index='1'] td.name").size["width"] > 150
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        browser.switch_to.default_content()

    def test_keys(self, page: webdriver.Chrome) -> None:
        body = page.find_element(By.TAG_NAME, "body")
        body.send_keys("/")
        page.switch_to.active_element.send_keys("down", Keys.ARROW_DOWN)
        page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
        page.switch_to.active_element.send_keys(Keys.ENTER)
        assert [e.get_attribute("id") for e in page.find_elements(By.CSS_SELECTOR, "tr.detail")] == ["detail-15"]
        assert page.switch_to.active_element.get_attribute("data-index") == "15"

    def test_fed_by_leads_to_the_norm_even_if_filtered_out(self, page: webdriver.Chrome) -> None:
        click(page, "#kinds button[data-value=linear]")
        click(page, "#rows tr[data-index='18'] td.fed button")
        (found,) = page.find_elements(By.CSS_SELECTOR, "tr.found")
        assert found.get_attribute("data-index") == "16"
        assert found == page.switch_to.active_element
        assert found.is_displayed()

    def test_near_misses(self, page: webdriver.Chrome) -> None:
        (item,) = page.find_elements(By.CSS_SELECTOR, "#miss-list > li")
        assert "/model/layers.1/post_norm/LayerNormalization near miss\naxis is 1, wants the last axis" in item.text
        click(page, "#miss-list button")
        assert page.find_element(By.CSS_SELECTOR, "tr.found").get_attribute("data-index") == "12"

    def test_layers(self, page: webdriver.Chrome) -> None:
        tree = page.find_element(By.ID, "tree")
        layer = next(e for e in tree.find_elements(By.CLASS_NAME, "branch") if e.text.startswith("layers.1"))
        steps = [e.text.split("\n") for e in layer.find_elements(By.CLASS_NAME, "step")]
        assert steps == [["input_norm"], ["q_proj", "k_proj"], ["o_proj"], ["post_norm"], ["up"], ["act"], ["down"]]
        assert "near_miss" in (layer.find_elements(By.CLASS_NAME, "chip")[4].get_attribute("class") or "")
        assert "attn" not in tree.text
        layer.find_element(By.CSS_SELECTOR, "button[aria-expanded]").click()
        assert "attn" in tree.text
        layer.find_elements(By.CLASS_NAME, "chip")[1].click()
        assert page.find_element(By.CSS_SELECTOR, "tr.found").get_attribute("data-index") == "9"
        layer.find_element(By.CSS_SELECTOR, "button[aria-expanded]").click()
        assert "attn" not in tree.text

    def test_plots_and_rules(self, page: webdriver.Chrome) -> None:
        titles = [e.get_attribute("textContent") for e in page.find_elements(By.CSS_SELECTOR, "svg title")]
        assert "15 linear rewritten" in titles
        assert any(t is not None and t.startswith("model.layers.1\n") for t in titles)
        assert "lift_matmul linears.py:" in page.find_element(By.ID, "rule-bars").text.replace("\n", " ")

    def test_a_model_with_no_sites(self, browser: webdriver.Chrome, run: Run, tmp_path: Path) -> None:
        g = Graph()
        onnx.save(g.model(g.op("Relu", g.input("x", [2]))), tmp_path / "model.onnx")
        assert run("inspect", tmp_path / "model.onnx", "--report", tmp_path / "page.html").code == 0
        browser.get((tmp_path / "page.html").as_uri())
        assert "The model has no norm and no Linear." in browser.find_element(By.TAG_NAME, "main").text
        assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]

    def test_thousands_of_rows_stay_light(self, browser: webdriver.Chrome, run: Run, model: Path) -> None:
        data = data_of(written(run, model))
        of = data["sites"][:7]
        data["sites"] = [
            s | {"path": ["model", f"layers.{i // 7}", *s["path"][2:]], "fed": None if s["fed"] is None else i // 7 * 7}
            for i in range(5000)
            for s in (of[i % 7],)
        ]
        big = model.with_name("big.html")
        big.write_bytes(render(data))
        browser.get(big.as_uri())
        assert len(rows(browser)) < 500
        browser.execute_script("document.getElementById('scroll').scrollTop = 1e9")
        browser.execute_script("document.querySelector('#tree button').click()")
        search_for(browser, "layers.700 q_proj")
        assert column(browser, "index") == ["4901"]
        click(browser, "#rows td.fed button")
        assert browser.find_element(By.CSS_SELECTOR, "tr.found").get_attribute("data-index") == "4900"
        assert len(rows(browser)) < 500
        assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
