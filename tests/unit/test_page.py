"""The report's page and trace, without a browser: what is in them, and that nothing in them can be more than text."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardwise as sw
from shardwise.errors import ConfigurationError
from shardwise.profiling import LoadReport
from shardwise.report import save_page, save_trace
from shardwise.report.page.chart import ticks
from shardwise.report.page.markup import Markup, data_script, element, join
from shardwise.report.page.series import MOST_LINES, on_grid
from shardwise.report.page.tensors import MOST_NAMES
from tests.unit.comparisons import ERROR, MIB, MODES, comparison, run, timeline, with_origins, with_steps

HOSTILE = "</script><script>alert('x')</script><img src=http://h/x onerror=\"alert(1)\">&amp;'"


class Elements(HTMLParser):
    """Collects start tags with their attributes, and the text of each element that ends."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(documents: list[dict[str, Any]], folder: Path) -> Elements:
    save_page(documents, folder / "new" / "report.html")
    return Elements((folder / "new" / "report.html").read_text(encoding="utf-8"))


def load_report() -> LoadReport:
    entry = run("native_fsdp", ranks=2, peak_mib=500, device_mib=0)
    return LoadReport.from_json({name: entry[name] for name in LoadReport.__dataclass_fields__})


# -- markup


def test_text_and_attributes_are_escaped_and_markup_is_not() -> None:
    made = element("p", "<b>", element("i", "&"), None, title='"<', hidden=True, lang=None, data_x=1)
    assert made == '<p title="&quot;&lt;" hidden data-x="1">&lt;b&gt;<i>&amp;</i></p>'
    assert join(("<", Markup("<br>"))) == "&lt;<br>"
    assert element("input", type="text") == '<input type="text"/>'


def test_data_of_a_script_cannot_end_it_and_reads_back() -> None:
    value = {"name": HOSTILE + "\u2028<!--"}
    made = data_script(value)
    content = made.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert not set(content) & set("<>&\u2028")
    assert json.loads(content) == value


# -- page


def test_hostile_names_stay_text_everywhere(tmp_path: Path) -> None:
    document = with_origins(with_steps(comparison(ranks=2)), (HOSTILE,))
    document["model"] = HOSTILE
    document["environment"] = {"versions": {HOSTILE: HOSTILE}, "platform": HOSTILE}
    for entry in document["runs"]:
        entry["mode"] += HOSTILE
        entry["route_reason"] = HOSTILE
        entry["dtypes"]["stored"] = HOSTILE
        for rank in entry["ranks"]:
            rank["node"] = HOSTILE
        for line in (*entry["timelines"], *entry["step_timelines"]):
            line["measures"] = HOSTILE
            for span in line["phases"]:
                span["name"] += HOSTILE
    document["runs"].append({"mode": HOSTILE, "status": "failed", "error": HOSTILE})
    elements = page([document], tmp_path)
    assert not elements.of("img")
    assert [each for each in elements.of("script") if each.get("type") != "application/json"] == [{}]
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert any(HOSTILE in text for text in elements.texts)


def test_the_page_fetches_nothing_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    save_page([comparison()], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    elements = Elements(text)
    for _, attributes in elements.tags:
        for name in ("src", "href", "action", "poster", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", value
    assert "url(" not in text
    assert "@import" not in text
    policy = next(each["content"] for each in elements.of("meta") if "http-equiv" in each)
    assert policy is not None
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_every_part_has_its_figures(tmp_path: Path) -> None:
    document = with_origins(
        comparison(ranks=2, device_mib=140, failed=("accelerate-eager",)), ("new.weight",)
    )
    document["environment"] = {"versions": {"torch": "2.13.0"}, "cpus": 2}
    document["agreement"] = {
        "equal": True,
        "reference": MODES[0],
        "parameters": 9,
        "buffers": 2,
        "differences": [],
    }
    elements = page([document], tmp_path)
    assert [each["id"] for each in elements.of("h2")] == [
        "summary",
        "modes",
        "memory",
        "predicted",
        "ranks",
        "tensors",
        "dtypes",
        "environment",
    ]
    text = "\n".join(elements.texts)
    for words in (
        "The runs that came to their end ended with equal parameters, buffers and logits",
        ERROR,
        "1,234",  # the node's anonymous peak in MiB
        "Highest: rank 1, 501 MiB",
        "-7.0 MiB (-100.0 %)",  # moved between ranks, predicted and not so
        "+11 MiB (+2.2 %)",
        "new.weight",
        "checkpoint, converted whole",
        "it was asked for",
        "2.13.0",
        "phase wrap_model",
    ):
        assert words in text, words
    figures = [each["value"] for each in elements.of("input") if each.get("type") == "radio"]
    assert figures == ["anon_bytes", "file_bytes", "pss_bytes", "device_bytes"]
    assert len(elements.of("svg")) == 3 * len(figures)
    assert all(each["aria-label"] for each in elements.of("svg"))


def test_values_that_are_read_out_are_those_that_were_measured(tmp_path: Path) -> None:
    document = comparison(ranks=2)
    save_page([document], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    first = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    assert [line["name"] for line in first["lines"]] == ["rank 0", "rank 1", "all ranks together"]
    highest = [max(value for value in line["values"] if value is not None) for line in first["lines"]]
    assert highest == [5000, 5010, 10010]  # tenths of a MiB
    assert [name for name, _, _ in first["phases"]][:2] == ["from_pretrained", "from_pretrained"]
    assert math.isclose(first["end"], 2.1, abs_tol=0.1)


def test_of_many_ranks_those_are_drawn_that_say_most(tmp_path: Path) -> None:
    document = comparison(ranks=20)
    save_page([document], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    first = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    names = [line["name"] for line in first["lines"]]
    assert names == [
        "rank 0",
        *(f"rank {rank}" for rank in range(20 - MOST_LINES + 1, 20)),
        "all ranks together",
    ]
    assert "(12 ranks with lower peaks are not drawn)" in text


def test_a_long_list_of_tensors_is_cut_and_says_so(tmp_path: Path) -> None:
    document = comparison(ranks=1)
    for entry in document["runs"]:
        entry["origins"] = {f"w{index}": "checkpoint" for index in range(MOST_NAMES + 7)}
    elements = page([document], tmp_path)
    text = "\n".join(elements.texts)
    assert f"The first {MOST_NAMES:,} of {MOST_NAMES + 7:,} tensors" in text
    assert f"w{MOST_NAMES - 1}" in elements.texts
    assert f"w{MOST_NAMES}" not in elements.texts


def test_failures_alone_make_a_page(tmp_path: Path) -> None:
    elements = page([comparison(failed=MODES)], tmp_path)
    assert "No memory was recorded over time." in elements.texts
    assert elements.texts.count(ERROR) == len(MODES)


def test_a_load_report_makes_a_page(tmp_path: Path) -> None:
    elements = page([load_report().to_json()], tmp_path)
    assert "Loading org/model on 2 ranks" in elements.texts
    assert "501" in elements.texts
    assert "environment" not in [each.get("id") for each in elements.of("h2")]


def test_saved_profiles_of_ranks_make_a_page_and_a_trace(tmp_path: Path) -> None:
    with sw.profile_memory("cpu") as profile, sw.phase("outer"), sw.phase("inner"):
        pass
    paths = [tmp_path / f"{rank}.json" for rank in (1, 0)]
    for path in paths:
        profile.save(path, rank=int(path.stem))
    documents = [json.loads(path.read_text()) for path in paths]
    elements = page(documents, tmp_path)
    assert "Memory on 2 ranks" in elements.texts
    assert "outer" in elements.texts
    save_trace(documents, tmp_path / "trace.json")
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"outer", "inner", "host memory, anonymous"} <= names


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "expected one document of"),
        ([{"schema": "other"}], r"got \['other'\]"),
        ([{"schema": "shardwise.compare/1"}] * 2, "expected one document of"),
        ([{"schema": "shardwise.memory_profile/1", **timeline(0, 5, 0)}] * 2, "each rank once"),
        ([{"schema": "shardwise.compare/1", "runs": []}], "at least one run"),
    ],
)
def test_documents_that_do_not_belong_together_are_refused(
    documents: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    for save in (save_page, save_trace):
        with pytest.raises(ConfigurationError, match=message):
            save(documents, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_shown_is_left_as_it_was(tmp_path: Path) -> None:
    document = with_origins(with_steps(comparison(ranks=2)), ("a",))
    before = copy.deepcopy(document)
    save_page([document], tmp_path / "report.html")
    save_trace([document], tmp_path / "trace.json")
    assert document == before


# -- grid and ticks


def test_a_grid_keeps_each_peak_and_holds_the_last_value() -> None:
    values = on_grid(
        np.array([0.5, 1.1, 1.2, 1.3, 4.9]), np.array([1.0, 2.0, 9.0, 3.0, 4.0]), np.linspace(0.0, 5.0, 6)
    )
    assert np.isnan(values[0])
    assert values[1:].tolist() == [1.0, 9.0, 3.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.0, 0.82, [0.0, 0.25, 0.5, 0.75]),
        (-30.0, 1180.0, [0.0, 500.0, 1000.0]),
        (0.0, 7.0, [0.0, 2.0, 4.0, 6.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


# -- trace


def test_a_trace_has_a_process_for_each_rank_of_each_mode(tmp_path: Path) -> None:
    save_trace(
        [with_steps(comparison(ranks=2, failed=("accelerate-eager",)))], tmp_path / "new" / "trace.json"
    )
    events = json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    named = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert list(named.values()) == [
        f"{mode} rank {rank}" for mode in MODES if mode != "accelerate-eager" for rank in range(2)
    ]
    for event in events:
        assert event["ph"] in "MXC"
        assert event["pid"] in named
        if event["ph"] != "M":
            assert isinstance(event["ts"], int)
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
    own = [event for event in events if event["pid"] == 2]
    slices = {event["name"]: event for event in own if event["ph"] == "X"}
    assert slices["wrap_model"]["ts"] == 1_110_000  # rank 1 began 0.1 s after rank 0
    assert slices["wrap_model"]["dur"] == 990_000
    assert slices["step"]["ts"] == 100_100_000
    anon = [event for event in own if event["name"] == "host memory, anonymous" and event["ts"] < 50_000_000]
    assert max(event["args"]["bytes"] for event in anon) == 501 * MIB
    assert len({event["args"]["bytes"] for event in anon}) == len(anon)  # what did not change is not repeated


def test_slices_that_overlap_lie_on_tracks_of_their_own(tmp_path: Path) -> None:
    document = comparison(ranks=1, failed=MODES[1:])
    (line,) = document["runs"][0]["timelines"]
    line["phases"] = [
        {"name": "a", "depth": 0, "start_seconds": 0.0, "stop_seconds": 2.0},
        {"name": "inside a", "depth": 1, "start_seconds": 0.5, "stop_seconds": 2.0},
        {"name": "across", "depth": 1, "start_seconds": 1.0, "stop_seconds": 2.5},
        {"name": "after", "depth": 0, "start_seconds": 2.0, "stop_seconds": 2.1},
    ]
    save_trace([document], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {event["name"]: event["tid"] for event in events if event["ph"] == "X"}
    assert tracks["a"] == tracks["inside a"] == tracks["after"] != tracks["across"]
