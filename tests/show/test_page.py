"""The page about a network: what it holds, and that it works in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import torchslice as ts
from torchslice import TorchsliceError
from torchslice.judge import evaluate_stages
from torchslice.rankings import by_mean_score, widths
from torchslice.show import figures

pytest.importorskip("matplotlib")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def made():
    """Neurons of a trained network, its task and contributions; a class has a name that must be quoted."""
    task = ts.data.load("digits")
    model = ts.models.create("convnet", channels=1, width=0.25)
    training = ts.Training(epochs=1, device="cpu", precision="fp32", progress=False)
    rows = ts.fit(model, task, training)
    neurons = ts.find_neurons(model, task.example, classes=task.classes)
    return neurons, task, ts.semantic.contributions(neurons, task, samples_per_class=16, **QUIET), rows


@pytest.fixture(scope="module")
def page(made) -> str:
    neurons, task, scores, rows = made
    slice_ = neurons.random(0.5)
    stages = evaluate_stages(neurons, task, slice_, classes=["3", "8"], training=None, latency_repeats=1).to_plain()
    accuracy = ts.accuracy(neurons.model, task, "validation")
    about = {"metrics": {"a": {"b": 0.25}}, "title": "<b>Digits & more</b>", "words": ["my runs/d", "digits"]}
    return ts.report(neurons, task, scores, rows=rows, stages=stages, accuracy=accuracy, **about).html


def embedded(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_stands_alone_and_is_small(page):
    assert len(page.encode()) < 200_000
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "import(" not in page
    assert [*re.findall(r"https?://[^\s\"'<]+", page)] == [
        link for link in re.findall(r"https?://[^\s\"'<]+", page) if link.startswith("http://www.w3.org/")
    ]  # names of the SVG format only


def test_it_says_what_is_known(page, made):
    neurons, _, scores, _ = made
    assert "&lt;b&gt;Digits &amp; more&lt;/b&gt;" in page and "<b>Digits" not in page
    for layer in neurons.layers:
        assert f"<td>{layer}</td>" in page
    assert "random slice, repaired" in page and "<td>a.b</td><td>0.25</td>" in page
    for group in ts.semantic.groups(neurons, scores):
        if len(group.classes) < 10:
            assert f'<td class="names">{html.escape(", ".join(group.classes))}</td>' in page


def test_sizes_are_what_a_cut_costs(page, made):
    neurons, _, scores, _ = made
    data = embedded(page)
    ranking = by_mean_score(scores["taylor"])
    for number, share in ((0, 0.1), (-1, 1.0)):
        counts = widths(ranking.layers, share, powers=(1.0, 1.0), steps=neurons.steps(8))
        kept = ts.retention(neurons, neurons.closed(ranking.prefix(counts)))
        size = data["sizes"][number]
        assert size["widths"] == [*counts.values()]
        assert (size["macs"], size["parameters"]) == (kept.built_mac, kept.built_param)
    assert data["sizes"][-1]["macs"] == 1 and len(data["layers"]) == len(neurons.layers)
    order = [data["classes"][c] for c in data["order"]]
    assert tuple(order) == ts.semantic.groups(neurons, scores).order
    assert {*data["maps"]} == {"all layers", *neurons.layers} and len(data["maps"]["all layers"]) == 100


def test_without_scores_there_is_what_can_be_cut(made):
    neurons, task, _, _ = made
    page = ts.report(neurons, task, notes=["not trained yet"])
    assert "What can be cut" in page.html and "not trained yet" in page.html
    assert 'id="parts"' not in page.html and 'id="groups"' not in page.html and 'id="training"' not in page.html
    assert repr(page).startswith("Report(") and page._repr_html_().startswith("<iframe srcdoc=")


def test_many_classes_share_the_room(monkeypatch, made):
    neurons, task, scores, _ = made
    monkeypatch.setattr("torchslice.show.page.CELLS", 300)
    assert len(embedded(ts.report(neurons, task, scores).html)["maps"]) == 1 + 3


def test_other_scores_are_refused(made):
    neurons, task, scores, _ = made
    with pytest.raises(TorchsliceError, match="logit 0 of the network is '0', and class 0 of digits is '1'"):
        ts.report(neurons, task.restrict(["1", "2"]), scores)


#: What a reader does, in a frame as narrow as a telephone's: the first failure is the answer, or "fine".
SCRIPT = """
const frame = document.createElement("iframe"), failures = [];
frame.width = 400; frame.height = 3000; frame.srcdoc = PAGE;
const check = (is, what) => { if (!is) failures.push(what); };
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow, at = name => page.getElementById(name);
  const text = name => at(name).textContent.replace(/\\s+/g, " ");
  check(page.documentElement.scrollWidth <= 400, `wider than 400: ${page.documentElement.scrollWidth}`);
  const boxes = [...page.querySelectorAll("#choices input")], first = text("cost");
  check(boxes.length === 10 && first.startsWith("2 classes: "), `at first: ${first}`);
  const command = "torchslice extract 'my runs/d' digits --classes 0,1 --mac-retention ";
  check(text("command").startsWith(command), text("command"));
  at("all").click();
  check(text("cost").startsWith("10 classes: "), `all: ${text("cost")}`);
  at("none").click();
  check(text("cost") === "Choose at least two classes." && text("command") === "", "none");
  boxes[3].click(); boxes[8].click();
  check(text("command").includes("--classes 3,8 "), text("command"));
  at("size").value = at("size").max; at("size").dispatchEvent(new view.Event("input"));
  check(text("cost") === "2 classes: 100 % of the multiply-accumulates, 100 % of the parameters.", text("cost"));
  check([...at("kept").querySelectorAll(".bar span")].every(bar => bar.style.width === "100%"), "whole network");
  at("size").value = 0; at("size").dispatchEvent(new view.Event("input"));
  const kept = [...at("kept").querySelectorAll(".bar span")].map(bar => parseFloat(bar.style.width));
  check(kept.every(share => share > 0 && share < 100), `kept: ${kept}`);
  const mean = of => of.reduce((a, b) => a + b, 0) / of.length;
  check(mean([kept[3], kept[8]]) > mean(kept.filter((_, c) => c !== 3 && c !== 8)), `chosen keep most: ${kept}`);
  at("layer").selectedIndex = 1; at("layer").dispatchEvent(new view.Event("change"));
  at("map").dispatchEvent(new view.KeyboardEvent("keydown", {key: "ArrowDown"}));
  check(/^\\S+ and \\S+: \\d+ %$/.test(text("cell")), `cell: ${text("cell")}`);
  check(page.querySelectorAll("svg.figure").length === 2, "figures");
  const dark = view.matchMedia("(prefers-color-scheme: dark)").matches;
  check(view.getComputedStyle(page.body).color === (dark ? "rgb(232, 232, 232)" : "rgb(27, 27, 27)"), "colours");
  document.title = failures[0] ?? `fine, ${dark ? "dark" : "light"}`;
};
document.body.append(frame);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("options", "theme"), [((), "light"), (("--force-dark-mode",), "dark")])
def test_it_works_in_a_browser(page, tmp_path: Path, options, theme):
    script = SCRIPT.replace("PAGE", json.dumps(page).replace("<", "\\u003c"))
    file = tmp_path / "test.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><title>nothing ran</title><body><script>{script}</script>")
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *flags, *options, profile, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert re.search(r"<title>(.*?)</title>", done.stdout)[1] == f"fine, {theme}"
    assert "CONSOLE" not in done.stderr


def test_overlap_and_heat_map_agree(page, made):
    neurons, _, scores, _ = made
    data, found = embedded(page), ts.semantic.groups(neurons, scores)
    exact = figures.overlaps(found)[data["order"]][:, data["order"]]
    assert data["maps"]["all layers"] == (100 * exact).round().int().flatten().tolist()
