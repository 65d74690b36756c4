"""The report: what it says, that its page is whole and safe, and that a browser shows it."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from megrez_cli import main
from megrez_gguf.errors import OutputError, RuntimeUnavailableError, SourceError
from megrez_parity import results
from megrez_parity.answers import read as read_answers
from megrez_parity.report import prepare, print_table, schema, write
from megrez_parity.report.html import render as page
from megrez_parity.report.markdown import render as markdown
from megrez_parity.report.words import family, interval, labels, number
from megrez_parity.results import Figure, ParityReport
from support import reports
from support.marks import loop_takes
from support.random_checkpoint import POCKET, make_checkpoint

HOSTILE = "/models/<script>alert(1)</script>\"'&|`*/魔改 </style>\x1b[31m\udce9.gguf"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


def validate(report: ParityReport) -> None:
    jsonschema.Draft202012Validator(schema()).validate(json.loads(json.dumps(report.as_dict())))


def broken(value: Any) -> Any:
    """The same with NaN for every float and nothing in any list but those."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: broken(x) for name, x in old.items()})
    if isinstance(value, dict):
        return {key: broken(item) for key, item in value.items()}
    if isinstance(value, list):
        return [broken(item) for item in value]
    return math.nan if isinstance(value, float) else value


def odd_reports() -> dict[str, ParityReport]:
    one = reports.report(["q4_0"], layers=4)
    lost = broken(one.levels[0])
    # Thresholds and times are never NaN.
    lost = dataclasses.replace(
        lost, thresholds=one.levels[0].thresholds, seconds=one.levels[0].seconds
    )
    bare = dataclasses.replace(
        one.levels[0], routing=[], depth={}, domains={}, fallbacks=[], thresholds={}, types={}
    )
    exact = dataclasses.replace(one.levels[0], kld_percentiles=[0.0] * 101)
    return {
        "all": reports.report(traced=("q8_0", "q2_k")),
        "one": one,
        "none": dataclasses.replace(one, levels=[], audit=None, texts=[], provenance={}),
        "lost": dataclasses.replace(one, levels=[lost, *reports.report(["q8_0"], 4).levels]),
        "bare": dataclasses.replace(one, levels=[bare]),
        "exact": dataclasses.replace(one, levels=[exact]),
        "hostile": dataclasses.replace(
            one,
            checkpoint=HOSTILE,
            provenance={"command": f"parity '{HOSTILE}'", HOSTILE: HOSTILE},
            texts=[results.Text(HOSTILE, HOSTILE, "", 1, 1)],
            levels=[reports.level(HOSTILE, 4, traced=True, kind="q4_0")] * 2,
        ),
    }


ODD = odd_reports()


@cache
def shown(name: str) -> str:
    """The page of an odd report, which takes a second to draw."""
    return page(ODD[name])


every_report = pytest.mark.parametrize("name", ODD)


class Page(HTMLParser):
    """What a page holds; complains of elements that are not closed in order."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag}: an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@every_report
def test_json_is_as_its_schema_says(name: str) -> None:
    validate(ODD[name])


def test_the_schema_is_strict_and_explains_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())

    def objects(part: Any) -> Any:
        if isinstance(part, dict):
            if "properties" in part:
                yield part
            for value in part.values():
                yield from objects(value)

    found = list(objects(schema()))
    assert len(found) == 16  # one for each dataclass of results.py
    for part in found:
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])
        assert all(field["description"].endswith(".") for field in part["properties"].values())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["levels"][0].update(surprise=1),
        lambda data: data["levels"][0]["metrics"].pop("rms_delta_p"),
        lambda data: data["levels"][0]["metrics"]["nmse"].update(value="0.1"),
        lambda data: data["levels"][0]["kld_percentiles"].pop(),
        lambda data: data.update(schema=2),
    ],
)
def test_the_schema_refuses(change: Any) -> None:
    data = ODD["one"].as_dict()
    change(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(data)


def test_a_real_run_is_as_the_schema_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "report"
    make_checkpoint(POCKET | {"num_hidden_layers": 3, "vocab_size": 1024}, checkpoint)
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: 世界上最高的山峰是珠穆朗玛峰。\n" * 20, encoding="utf-8")
    command = ["parity", checkpoint, "--levels", "f32,q4_k_m", "--text", text, "--ctx", 64]
    command += ["--windows", 1, "--trace", "--json", "--report", folder]
    with pytest.raises(SystemExit):  # its thresholds are not for random weights
        main([str(part) for part in command])
    data = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert data == json.loads((folder / "report.json").read_text("utf-8"))
    assert [level["level"] for level in data["levels"]] == ["f32", "q4_k_m"]
    assert data["levels"][0]["trace"]["points"]
    page_found = Page((folder / "report.html").read_text("utf-8"))
    assert len([box for box in page_found.all("div") if box.get("class") == "figure"]) == 6
    assert "q4_k_m" in (folder / "report.md").read_text("utf-8")


@every_report
def test_pages_are_whole_and_ask_for_nothing(name: str) -> None:
    found = Page(shown(name))
    assert [tag for tag, _ in found.tags if tag in ("html", "head", "body", "main")] == [
        "html", "head", "body", "main",
    ]  # fmt: skip
    assert not re.search(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", shown(name))  # HTML has none
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    # Nothing is loaded: links lead to places in the page, and the policy allows no connection.
    for tag, attributes in found.tags:
        assert attributes.keys().isdisjoint({"src", "srcset", "data", "action", "onclick"}), tag
        if "href" in attributes:
            assert str(attributes["href"])[1:] in ids
            assert str(attributes["href"])[0] == "#"
    assert "link" not in dict(found.tags)
    style = "".join(found.text["style"])
    assert "url(" not in style
    assert "@import" not in style
    policy = found.all("meta")[1]["content"]
    assert str(policy).startswith("default-src 'none'; ")
    assert "http" not in str(policy)
    # Whoever has no mouse or no JavaScript reads the tables.
    for box in found.all("div"):
        if box.get("class") == "scroll":
            assert (box["tabindex"], box["role"]) == ("0", "region")
            assert box["aria-label"]
    assert "noscript" in dict(found.tags)


@every_report
def test_figures_are_json_without_markup(name: str) -> None:
    found = Page(shown(name))
    scripts = [s for s in found.all("script") if s.get("type") == "application/json"]
    assert len(scripts) == sum(box.get("class") == "figure" for box in found.all("div"))
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', shown(name))
    assert len(blocks) == len(scripts) >= 2
    heights = re.findall(r'class="chart"[^>]* style="height: (\d+)px"', shown(name))
    for block, height in zip(blocks, heights, strict=True):
        assert "<" not in block
        figure = json.loads(block, parse_constant=pytest.fail)
        assert figure["layout"]["height"] == int(height) >= 100
        for trace in figure["data"]:
            for which in "xy":
                axis = figure["layout"][
                    trace.get(f"{which}axis", which).replace(which, f"{which}axis")
                ]
                assert None not in axis.get("range", [])
                if axis.get("type") == "log":
                    assert all(value is None or value > 0 for value in trace[which])


def test_sections_hold_what_they_promise() -> None:
    found = shown("all")
    for text in (
        "How to read this.",
        "Missed: 2 of 20 levels: q8_0, q2_k.",
        "q8_0: ffn_moe_out-17 is the first tensor to err by itself",
        '<strong class="bad">missed: ffn_moe_out-17</strong>',
        "q4_K → q5_0",
        "F16 would hold it",
        "megrez-gguf parity models/Megrez2-3x7B-A3B --trace --report out",
        '<th scope="col">chinese</th>',
    ):
        assert text in found, text
    for figure in ("overview", "distribution", "routing", "pregate", "depth", "trace"):
        assert f'id="figure-{figure}"' in found
    assert '<strong class="bad">missed: NaN not ≤ 0.006144</strong>' in shown("lost")
    # The trace opens at the first level that breaks.
    assert '<option value="3" selected>q8_0</option>' in found


def test_names_from_outside_stay_text() -> None:
    text = shown("hostile")
    found = Page(text)
    assert len(found.all("script")) == len(Page(shown("all")).all("script"))
    assert "<script>alert" not in text
    assert "魔改" in text
    assert "\x1b" not in text
    assert "\\x1b[31m\\udce9" in text
    lines = markdown(ODD["hostile"]).splitlines()
    assert not [line for line in lines if "<script" in line and not line.startswith("    ")]
    assert any("魔改" in line for line in lines)


@every_report
def test_markdown_tables_are_rectangular(name: str) -> None:
    text = markdown(ODD[name])
    assert text.startswith("# Parity of ")
    assert text.count("<details>") == text.count("</details>")
    for block in re.split(r"\n\n", text):
        rows = [re.split(r"(?<!\\)\|", line) for line in block.splitlines() if line[0] == "|"]
        assert len({len(row) for row in rows}) <= 1
    if name == "all":
        assert "| **missed** |" in text
        assert "| q4_k_m+imatrix | 4,380.94 |" in text


@every_report
def test_the_terminal_gets_plain_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ODD[name])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["level", "MiB", "NMSE"]
    assert lines[0].split()[-1] == "verdict"
    assert "\x1b" not in "".join(lines)
    found = {"lost": "missed", "bare": "no threshold", "one": "ok", "hostile": "ok"}
    if name in found:
        assert lines[1].rstrip().endswith(found[name])
    if name == "all":
        assert "Trace: q8_0: ffn_moe_out-17 is the first tensor beyond its tolerance" in lines[-3]


def test_a_narrow_terminal_cuts_no_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    print_table(ODD["all"])
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        (Figure(0.0123456, 0.0117, 0.0129), "0.01235 ± 0.00060"),
        (Figure(3.6e-13, 3.4e-13, 3.84e-13), "(3.60 ± 0.22)e-13"),
        (Figure(1.0, 1.0 - 1e-9, 1.0 + 1e-9), "1.000000 ± 1.0e-09"),
        (Figure(11.2, 11.2, 11.2), "11.20 ± 0.00"),
        (Figure(0.0, 0.0, 0.0), "0.00 ± 0.00"),
        (Figure(math.nan, math.nan, math.nan), "NaN ± NaN"),
        (Figure(math.inf, 1.0, math.inf), "inf ± inf"),
    ],
)
def test_intervals_read_well(figure: Figure, expected: str) -> None:
    assert interval(figure) == expected


def test_numbers_read_well() -> None:
    found = [number(x) for x in (0.0, 1.0, 0.0100, 123.4, 1.234e-5, 1.234e7, math.nan, None)]
    assert found == ["0.00", "1.00", "0.0100", "123", "1.23e-05", "1.23e+07", "NaN", "–"]


def test_levels_have_short_names_of_their_own_and_a_color() -> None:
    names = ["/a/x.gguf", "/b/x.gguf", "q4_0", "/c/" + "long" * 9 + ".gguf"]
    levels = [reports.level(name, 2, kind="") for name in names]
    assert labels(levels) == ["x.gguf", "x.gguf (2)", "q4_0", "longlonglong…long.gguf"]
    bits = {name: family(reports.level(name, 2)) for name in reports.LEVELS}
    assert bits["mxfp4_moe"] == bits["iq4_nl"] == bits["q4_k_m+imatrix"] == 4
    assert (bits["bf16"], bits["f32"], bits["q2_k"]) == (16, 32, 2)
    for name in ("/tmp/unknown.gguf", "iq1_s"):
        assert family(reports.level(name, 2, kind="")) == 0


def test_write_makes_the_folder_and_replaces_what_it_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    prepare(folder)
    assert list(folder.iterdir()) == []
    paths = write(ODD["one"], folder)
    assert [path.name for path in paths] == ["report.html", "report.json", "report.md"]
    write(ODD["hostile"], folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
    data = json.loads(paths[1].read_text("utf-8"))
    assert data["checkpoint"] == HOSTILE
    jsonschema.Draft202012Validator(schema()).validate(data)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=f"{re.escape(str(folder))}.*cannot be"):
            write(ODD["one"], folder)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        prepare(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'megrez-gguf\[report\]'"):
        prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # The terminal's table needs none.
    code = "import sys; import megrez_parity.report; sys.exit('plotly' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# Chromium's window cannot be as narrow as a phone; a frame in it can.
FRAME = """<!DOCTYPE html><iframe src="%s" width="%d" height="800"></iframe><pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
const timer = setInterval(() => {
  const page = frame.contentDocument;
  if (!page?.documentElement?.dataset.drawn) return;
  clearInterval(timer);
  frame.width -= 10;  // as when a phone is turned: figures must keep their height
  setTimeout(() => look(page), 1000);
}, 50);
function look(page) {
  const style = (selector, name) =>
    getComputedStyle(page.querySelector(selector))[name];
  const overview = page.querySelector("#figure-overview");
  const boxes = (selector) =>
    [...overview.querySelectorAll(selector)].map((x) => x.getBoundingClientRect());
  const met = (a, b) =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const labels = boxes(".annotation-text"), points = boxes(".points path");
  page.querySelector(".legend button")?.click();
  document.querySelector("#found").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    inner: frame.contentWindow.innerWidth,
    room: page.documentElement.clientWidth,
    background: style("body", "backgroundColor"),
    ink: style("body", "color"),
    plots: page.querySelectorAll(".cartesianlayer > .subplot").length,
    title: style(".chart .ytitle, .chart .xtitle", "fill"),
    pressed: page.querySelector(".legend button")?.ariaPressed,
    labels: labels.length,
    met: labels.flatMap((a, i) =>
      [...labels.slice(i + 1), ...points].filter((b) => met(a, b))).length,
    collapsed: [...page.querySelectorAll(".chart")].filter(
      (chart) => chart.clientHeight < chart.querySelector(".main-svg").clientHeight).length,
  });
}
</script>
"""


def brightness(color: str) -> float:
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3 / 255


def browse(report: ParityReport, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser, google-chrome or chrome to be found")
    write(report, folder)
    frame = folder / "frame.html"
    frame.write_text(FRAME % ("report.html", width), encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={max(width, 500) + 40},900",
        "--virtual-time-budget=20000",
        "--dump-dom",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert errors == []
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert found, f"the page was never drawn: {done.stdout[-300:]} {done.stderr[-2000:]}"
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.mark.parametrize("name", loop_takes("bare".__eq__, ["all", "hostile", "lost", "bare"]))
def test_a_browser_shows_it_on_a_phone_in_the_dark(name: str, tmp_path: Path) -> None:
    found = browse(ODD[name], tmp_path, 375, dark=True)
    assert found["inner"] == 375 - 10
    assert found["width"] == found["room"]  # nothing makes the page scroll sideways
    assert brightness(found["background"]) < 0.2 < 0.7 < brightness(found["ink"])
    assert brightness(found["title"]) > 0.7  # the figures follow
    assert found["plots"] == {"all": 8, "hostile": 8, "lost": 7, "bare": 2}[name]
    assert found["collapsed"] == 0
    assert found["met"] == 0
    assert found["pressed"] == "false"


@pytest.mark.slow
def test_a_browser_shows_it_on_a_desk_in_the_light(tmp_path: Path) -> None:
    found = browse(ODD["all"], tmp_path, 1280, dark=False)
    assert found["inner"] == 1280 - 10
    assert found["width"] == found["room"]
    assert (found["labels"], found["met"]) == (20, 0)
    assert brightness(found["ink"]) < 0.2 < 0.9 < brightness(found["background"])
    assert brightness(found["title"]) < 0.3


ANSWERS = results.Answers(
    [
        results.Answered("q8_0", "arc", "acc", 1200, 0.5, 0.47, 0.53, 0.25),
        results.Answered("<b>q2_k</b>", "arc", "acc", 1200, 0.26, 0.23, 0.29, 0.25),
    ],
    [
        results.Flipped(
            "arc", "q8_0", "<b>q2_k</b>", 1200, 300, 12, 1e-30, 0.03,
            [results.Lost("Which?\n<i>A</i>|B", " A", " A", " B")],
        )
    ],
)  # fmt: skip


def test_answers_are_shown_beside_the_divergence(tmp_path: Path) -> None:
    report = dataclasses.replace(reports.report(["q4_0"], layers=4), answers=ANSWERS)
    validate(report)
    html, text = page(report), markdown(report)
    for shown in (html, text):
        assert "Does it still answer?" in shown
        assert "26.0%, at chance" in shown or "26.00%, at chance" in shown
        assert "worse" in shown
        assert "<b>q2_k" not in shown
        assert "<i>A" not in shown
    assert "Does it still answer?" not in page(dataclasses.replace(report, answers=None))


def test_what_eval_writes_is_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="megrez-gguf eval --out writes it"):
        read_answers(tmp_path)
    (tmp_path / "results.json").write_text('{"models": 1}', "utf-8")
    with pytest.raises(SourceError, match="not what megrez-gguf eval"):
        read_answers(tmp_path)
