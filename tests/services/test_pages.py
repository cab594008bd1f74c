"""The pages of a store in Chromium: what Prefect's and MLflow's say of runs that ended in every way there is."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from stages.runtime.fingerprint import ROOT
from tests.flows.pages.test_servers import Ui

RECIPE = Path(__file__).with_name("pages.yaml")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PAGE_S = 60.0

pytestmark = [
    pytest.mark.service,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium with its driver: apt-get install chromium chromium-driver"
    ),
]


def enginery(store, source, *options):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    words = [
        sys.executable,
        "-m",
        "flows",
        "run",
        RECIPE,
        "--store",
        store,
        "--set",
        f"steps.dense.params.source={source}",
    ]
    with (store.parent / "log").open("ab") as log:
        return subprocess.Popen(
            [*map(str, words), *options],
            env={**plain, "PYTHONPATH": str(ROOT), "HOME": str(store.parent), "OMP_NUM_THREADS": "1"},
            stdout=log, stderr=log, cwd=store.parent,
        )  # fmt: skip


def done(store, source, code, *options):
    """The name of a run that has ended as it should."""
    assert enginery(store, source, "--launcher", "inline", *options).wait(400) == code, (
        store.parent / "log"
    ).read_text()
    return max(path.name for path in (store / "state" / "runs").iterdir())


def cut(store, source, number, code, *options):
    """The name of a run that was ended by a signal while it quantized."""
    before = set((store / "state" / "runs").iterdir())
    run = enginery(store, source, *options)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for folder in set((store / "state" / "runs").iterdir()) - before:
            log = folder / "log.jsonl"
            events = log.read_text().splitlines() if log.exists() else []
            if any('"started", "step": "small"' in line for line in events) and followed(store, folder.name):
                run.send_signal(number)
                assert run.wait(60) == code
                return folder.name
        assert run.poll() is None, (store.parent / "log").read_text()
        time.sleep(0.1)
    raise AssertionError((store.parent / "log").read_text())


def followed(store, run):
    """Whether MLflow has the run, which begins while MLflow is opened."""
    with closing(sqlite3.connect(f"file:{store}/state/mlflow.db?mode=ro", uri=True)) as database:
        return database.execute("select 1 from tags where value = ?", (run,)).fetchone()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("browsed") / "store"


@pytest.fixture(scope="module")
def runs(store, tiny):
    """How a run ended -> its name."""
    int4 = ("--set", "steps.small.params.scheme=int4_weight_only")
    fp8 = ("--set", "steps.small.params.scheme=fp8_e4m3")
    return {
        "passed": done(store, tiny, 0),
        "other": done(store, tiny, 0, *int4),
        "failed": done(store, tiny, 2, "--set", "gates.0.at_most=0.9"),
        "interrupted": cut(store, tiny, signal.SIGTERM, 130, *fp8),
        "crashed": cut(store, tiny, signal.SIGKILL, -9, *fp8),
    }


@pytest.fixture(scope="module")
def pages(store, runs):
    ui = Ui(store)
    yield ui.pages()
    ui.press(b"\x03")
    assert ui.ended() == 0


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # A root's Chromium has no sandbox, and a container little shared memory.
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1400"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def shown(browser, *words, frame=False):
    """The text of the page, or of a frame in it, once it holds all words."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By

    text, deadline = "", time.monotonic() + PAGE_S
    while time.monotonic() < deadline:
        try:
            browser.switch_to.default_content()
            if frame:
                browser.switch_to.frame(browser.find_element(By.CSS_SELECTOR, "iframe"))
            text = browser.find_element(By.TAG_NAME, "body").text
        except WebDriverException:  # the page is being drawn anew
            text = ""
        if all(word in text for word in words):
            browser.switch_to.default_content()
            return text
        time.sleep(0.3)
    raise AssertionError(f"{browser.current_url} does not show {[word for word in words if word not in text]}:\n{text}")


def click(browser, text):
    """Click a link once it is there, and look where it leads, be it in another window."""
    from selenium.webdriver.common.by import By

    shown(browser, text)
    browser.find_element(By.LINK_TEXT, text).click()
    browser.switch_to.window(browser.window_handles[-1])


def flow_run(pages, name):
    """Prefect's id of a run."""
    asked = {"flow_runs": {"tags": {"all_": [name]}}}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = httpx.post(f"{pages['Prefect']}/api/flow_runs/filter", json=asked).json()
        if found:
            return found[0]["id"]
        time.sleep(0.3)
    raise AssertionError(f"Prefect has no run {name}")


def tracked(pages, name):
    """The address of MLflow's page of a run, by the link on Prefect's."""
    return httpx.get(f"{pages['Prefect']}/runs/{name}/mlflow").headers["location"]


LIMIT = "limit at most 0.9"
PREFECT = {
    "passed": ("Completed", "passed"),
    "failed": ("Failed", LIMIT),
    "interrupted": ("Cancelled", "interrupted"),
    "crashed": ("Crashed", "its process ended without a word"),
}
MLFLOW = {
    "passed": ("Finished", "passed"),
    "failed": ("Failed", LIMIT),
    "interrupted": ("Killed", "interrupted: the same command goes on"),
    "crashed": ("Killed", "crashed: its process ended without a word"),
}


@pytest.mark.parametrize("how", PREFECT)
def test_prefect_page_of_a_run_says_its_state_and_why(runs, pages, browser, how):
    state, why = PREFECT[how]
    browser.get(f"{pages['Prefect']}/runs/flow-run/{flow_run(pages, runs[how])}?tab=Logs")
    text = shown(browser, runs[how], state, why, "5 Task runs")
    if how == "failed":
        assert re.search(rf"gate failed: perplexity of small .* measured [\d.]+ .*{LIMIT}", text)
    browser.get(f"{pages['Prefect']}/runs/flow-run/{flow_run(pages, runs[how])}?tab=Details")
    shown(browser, "State Message", why.split(":")[0] if how != "failed" else "gate failed")


@pytest.mark.parametrize("how", MLFLOW)
def test_mlflow_page_of_a_run_says_its_state_and_why(runs, pages, browser, how):
    state, why = MLFLOW[how]
    browser.get(tracked(pages, runs[how]))
    text = shown(browser, runs[how], state, why)
    if how == "failed":
        assert re.search(rf"perplexity of small .* measured [\d.]+ .*{LIMIT}", text)


def test_prefect_page_leads_to_verdict_report_and_mlflow(runs, pages, browser):
    asked = {"artifacts": {"key": {"any_": ["verdict-tiny"]}}, "flow_runs": {"tags": {"all_": [runs["failed"]]}}}
    flow_run(pages, runs["failed"])
    (verdict,) = httpx.post(f"{pages['Prefect']}/api/artifacts/filter", json=asked).json()
    address = f"{pages['Prefect']}/artifacts/artifact/{verdict['id']}"
    browser.get(address)
    shown(browser, "gate failed", LIMIT, "size_bytes of small")
    click(browser, "The report")
    shown(browser, "1 of 2 gates did not hold", runs["failed"])
    assert browser.current_url == f"{pages['Prefect']}/runs/{runs['failed']}/report.html"
    browser.get(address)
    click(browser, "Its page in MLflow")
    shown(browser, runs["failed"], "Failed", LIMIT)
    assert browser.current_url.startswith(pages["MLflow"])


def test_mlflow_page_holds_the_report(runs, pages, browser):
    page, _, query = tracked(pages, runs["failed"]).partition("?")
    browser.get(f"{page}/artifacts/report.html?{query}")
    shown(browser, "report.html", "recipe.yaml")
    shown(browser, "1 of 2 gates did not hold", runs["failed"], frame=True)


def test_mlflow_comparison_of_two_runs_shows_the_param_that_differs(runs, pages, browser):
    from selenium.webdriver.common.by import By

    ids = [tracked(pages, runs[name]).partition("/runs/")[2].partition("?")[0] for name in ("passed", "other")]
    experiment = re.search(r"/experiments/(\d+)/", tracked(pages, runs["passed"]))[1]
    browser.get(f'{pages["MLflow"]}/#/compare-runs?runs={quote(json.dumps(ids))}&experiments=["{experiment}"]')
    text = shown(browser, "small.scheme", "int8_weight_only", "int4_weight_only", "small.observer")
    assert "small/perplexity.text" in text
    switches = browser.find_elements(By.XPATH, "//label[contains(., 'Show diff only')] | //*[text()='Show diff only']")
    browser.execute_script("arguments[0].click()", switches[0])
    deadline = time.monotonic() + PAGE_S
    while "small.observer" in shown(browser, "small.scheme") and time.monotonic() < deadline:
        time.sleep(0.3)
    text = shown(browser, "small.scheme", "int8_weight_only", "int4_weight_only")
    assert "small.observer" not in text and "dense.stage" not in text


def test_pages_ask_no_other_host(browser):
    """All that this browser asked for in the tests before, with both of Prefect's designs."""
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert len(sent) > 50
    assert {url for url in sent if url.startswith("http") and not url.startswith("http://127.0.0.1:")} == set()
