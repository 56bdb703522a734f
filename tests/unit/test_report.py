"""The comparison's table and picture, from a synthetic document."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure as Canvas
from rich.console import Console

from shardwise.errors import ConfigurationError, MissingDependencyError
from shardwise.profiling import Timeline
from shardwise.report import comparison_table, render, save_figure
from shardwise.report.comparison import read_comparison
from shardwise.report.documents import read_documents
from shardwise.report.legend import rank_colour, shaded_phases
from shardwise.report.units import format_bytes, format_number, format_seconds
from tests.unit.comparisons import (
    ERROR,
    MIB,
    MODES,
    PHASES,
    comparison,
    with_steps,
)


def drawn(document: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Draw a document, and return the panels by row."""
    figures: list[Canvas] = []
    savefig = Canvas.savefig

    def keep(figure: Canvas, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Canvas, "savefig", keep)
    save_figure(document, path)
    (figure,) = figures
    rows = len(document["runs"])
    columns = len(figure.axes) // rows
    return [figure.axes[row * columns : (row + 1) * columns] for row in range(rows)]


def highest(axis: Any) -> float:
    return max(float(line.get_ydata().max()) for line in axis.lines)


def words_of(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def printed(document: dict[str, Any], **options: Any) -> str:
    file = io.StringIO()
    render(document, Console(file=file, **options))
    return file.getvalue()


# -- figures of the document


def test_worst_rank_leaves_the_step_out_and_takes_file_and_pss_from_the_timelines() -> None:
    first = read_comparison(comparison())[0]
    assert first.worst_rank.anon_bytes == 501 * MIB
    assert first.worst_rank.file_bytes == 40 * MIB
    assert first.worst_rank.pss_bytes == 7 * MIB
    assert first.node.anon_bytes == 1234 * MIB
    assert first.node.pss_bytes is None
    line = first.timelines[0]
    assert isinstance(line, Timeline)
    assert line.peak_bytes("anon_bytes", until_seconds=2.0) == 500 * MIB
    assert line.peak_bytes("anon_bytes", until_seconds=9.0) == 500 * MIB


def test_fullest_node_is_the_one_drawn() -> None:
    document = comparison(ranks=3)
    for rank, node in enumerate(("a", "b", "b")):
        document["runs"][0]["ranks"][rank]["node"] = node
    first = read_comparison(document)[0]
    assert [line.rank for line in first.node_timelines] == [1, 2]


def test_a_phase_inside_one_of_the_same_name_is_shaded_once() -> None:
    first = read_comparison(comparison())[0]
    assert [span.name for _, span in shaded_phases(first.timelines)] == list(PHASES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other/1"}, "expected schema 'shardwise.compare/1'"),
        ({"runs": []}, "expected at least one run"),
        ({"runs": [{"mode": "x", "status": "ok"}]}, "expected the key 'schema'"),
    ],
)
def test_a_document_that_cannot_be_read_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        comparison_table({**comparison(), **change})


def test_the_load_ends_with_its_last_phase_on_each_rank() -> None:
    first = read_comparison(comparison())[0]
    assert [float(line.seconds[-1]) for line in first.timelines] == [2.0, 2.0]
    assert not any(span.name == "step" for line in first.timelines for span in line.phases)
    assert first.step_timelines == ()


def test_a_timeline_without_phases_is_a_load_from_end_to_end() -> None:
    document = comparison()
    for line in document["runs"][0]["timelines"]:
        line["phases"] = []
    assert read_comparison(document)[0].timelines[0].seconds.size == 60


def test_a_step_that_was_sampled_apart_counts_from_the_loads_baseline() -> None:
    read = read_comparison(with_steps(comparison()))[0]
    assert [line.rank for line in read.step_timelines] == [0, 1]
    line = read.step_timelines[1]
    assert line.started_at_seconds == 1100.1
    assert line.increases["anon_bytes"][0] == 0
    assert line.increases["anon_bytes"][59] == 20_000 * MIB
    # The load does not change by it.
    assert read.timelines[1].seconds.size == read_comparison(comparison())[0].timelines[1].seconds.size
    assert read.worst_rank == read_comparison(comparison())[0].worst_rank


def test_a_step_that_some_rank_lacks_is_left_out() -> None:
    document = with_steps(comparison())
    del document["runs"][0]["step_timelines"][1]
    first, second, *_ = read_comparison(document)
    assert first.step_timelines == ()
    assert len(second.step_timelines) == 2


def test_the_steps_of_the_fullest_node_are_summed() -> None:
    document = with_steps(comparison(ranks=3))
    for rank, node in enumerate(("a", "b", "b")):
        document["runs"][0]["ranks"][rank]["node"] = node
    assert [line.rank for line in read_comparison(document)[0].node_step_timelines] == [1, 2]


# -- table


def test_table_has_every_mode_and_every_phase() -> None:
    table = comparison_table(comparison(failed=("accelerate-efficient",)))
    headers = [str(column.header) for column in table.columns]
    assert headers[0] == "mode"
    assert headers[-1] == "status"
    assert set(PHASES) | {"step"} <= {header.replace("_\n", "_") for header in headers}
    assert {f"{who}\n{what}" for who in ("rank", "node") for what in ("anon", "file", "PSS")} <= set(headers)
    assert table.row_count == len(MODES)
    assert [str(cell) for cell in table.columns[0].cells] == list(MODES)
    assert list(map(str, table.columns[-1].cells)) == ["ok", "ok", "ok", "failed"]


def test_piped_output_keeps_each_row_on_one_line_whatever_the_width() -> None:
    text = printed(comparison(failed=("accelerate-efficient",)), width=40)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip().startswith(MODES)}
    expected = [
        "2.25",
        "0.01",
        "1.75",
        "1.12",
        "131",
        "501",
        "501",
        "40",
        "7.0",
        "1,234",
        "160",
        "-",
        "0",
        "ok",
    ]
    assert rows["native-eager"][1:] == expected
    assert rows["accelerate-efficient"][1] in {"-", "failed:"}
    assert "…" not in text
    assert "\x1b" not in text
    assert "SmolLM2, 2 ranks. Times in seconds, memory in MiB." in text
    assert ERROR in " ".join(text.split())
    assert "Measured: host: RssAnon of /proc/self/status." in text


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (60, 3), (20, 14)])
def test_no_figure_is_cut_in_a_narrow_terminal(width: int, tables: int) -> None:
    """Figures came out as "1,2…"."""
    console_options: dict[str, Any] = {"width": width, "force_terminal": True, "color_system": None}
    text = printed(comparison(), **console_options)
    assert "…" not in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("native-eager ")]
    (whole,) = [line.split() for line in printed(comparison()).splitlines() if "native-eager " in line]
    assert [cell for row in rows for cell in row[1:]] == whole[1:]
    assert len(rows) == tables
    # A terminal that is narrower than names and one column gets longer lines.
    assert max(len(line) for line in text.splitlines()) <= max(width, 36)


def test_render_leaves_the_console_as_it_was() -> None:
    console = Console(file=io.StringIO(), width=40)
    render(comparison(), console)
    assert console.width == 40


def test_large_models_are_given_in_gib() -> None:
    document = comparison()
    document["runs"][0]["node"]["host_anon_peak_bytes"] = 100 << 30
    text = printed(document)
    assert "memory in GiB" in text
    assert "100.00" in text


# -- picture


@pytest.mark.parametrize(("ranks", "device_mib"), [(1, 0), (2, 0), (2, 140), (12, 0)])
def test_picture_is_a_png_of_sensible_size(tmp_path: Path, ranks: int, device_mib: int) -> None:
    path = tmp_path / "new" / "report.png"
    save_figure(comparison(ranks=ranks, device_mib=device_mib, failed=("accelerate-efficient",)), path)
    width, height = png_size(path)
    assert (1400 <= width <= 1800) if device_mib == 0 else (2200 <= width <= 2800)
    assert 1200 <= height <= 2000


@pytest.mark.parametrize(
    ("model", "is_whole"),
    [("short", True), ("mixture of 64 experts, 1 B parameters", True), ("x" * 400, False)],
)
def test_no_words_of_the_picture_are_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, is_whole: bool
) -> None:
    panels = drawn({**comparison(), "model": model}, tmp_path / "report.png", monkeypatch)
    figure = panels[0][0].figure
    words = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    assert all(word.get_window_extent().x0 >= 0 for word in words)
    assert all(word.get_window_extent().x1 <= figure.bbox.width for word in words)
    (title,) = (text.get_text() for text in figure.texts if text.get_text().startswith("Memory"))
    assert (model in title) == is_whole


def test_picture_grows_by_one_panel_a_mode(tmp_path: Path) -> None:
    document = comparison()
    save_figure(document, tmp_path / "four.png")
    save_figure({**document, "runs": document["runs"][:2]}, tmp_path / "two.png")
    assert png_size(tmp_path / "four.png")[1] - png_size(tmp_path / "two.png")[1] > 400


def test_picture_says_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "report.svg"
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        save_figure(comparison(failed=("accelerate-efficient",)), path)
    text = path.read_text()
    for mode in MODES:
        assert f">{mode}<" in text
    assert "Memory while loading and sharding SmolLM2 on 2 ranks" in text
    assert "worst rank (rank 1) 501 MiB = 3.82x shard, all ranks together 1,234 MiB" in text
    assert "Host memory added" in text
    assert "Device memory added" not in text
    assert "This mode failed:" in text
    assert "$x_i$" in text
    for words in ("rank 0", "rank 1", "all ranks together", "wrap_model: shard the model", "Seconds since"):
        assert words in text


def test_the_step_is_a_narrow_column_with_scales_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels = drawn(with_steps(comparison()), tmp_path / "report.png", monkeypatch)
    alone = drawn(comparison(), tmp_path / "alone.png", monkeypatch)
    assert [len(row) for row in panels] == [2] * 4
    assert [len(row) for row in alone] == [1] * 4
    for row, before in zip(panels, alone, strict=True):
        load, step = row
        assert load.get_position().width > 3 * step.get_position().width
        # In MiB; two ranks of 500 and 501 MiB. The step's 2 x 20,000 MiB change nothing here.
        assert load.get_ylim() == before[0].get_ylim() == panels[0][0].get_ylim()
        assert 1001 <= load.get_ylim()[1] < 1300
        assert load.get_xlim() == before[0].get_xlim() == pytest.approx((0, 1.01 * 2.1))
        # In GiB.
        assert step.get_ylabel().endswith("(GiB)")
        assert 40_000 / 1024 <= step.get_ylim()[1] < 50_000 / 1024
        assert step.get_xlim() == pytest.approx((0, 1.01 * 3.05))
        assert highest(step) == pytest.approx(40_000 / 1024)
    assert [row[1].get_title("left") for row in panels] == ["one training step, apart", "", "", ""]
    assert not any(axis.get_title("left") == "one training step, apart" for row in alone for axis in row)


def test_the_steps_sum_begins_when_every_rank_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels = drawn(with_steps(comparison()), tmp_path / "report.png", monkeypatch)
    load, step = panels[0]
    assert float(step.lines[0].get_xdata().min()) == pytest.approx(0.1)
    assert float(load.lines[0].get_xdata().min()) == 0


def test_modes_without_a_step_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = with_steps(comparison(failed=("native-eager",)))
    document["runs"][1]["step_timelines"] = []
    panels = drawn(document, tmp_path / "report.png", monkeypatch)
    assert panels[0][1].get_title("left") == "one training step, apart"
    assert [words_of(row[1]) for row in panels] == [["no step measured"]] * 2 + [["step"]] * 2


def test_each_load_panel_has_a_line_at_the_largest_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = with_steps(comparison(device_mib=140, failed=("accelerate-eager",)))
    document["runs"][0]["ranks"][1]["shard_bytes"] = 1500 * MIB
    panels = drawn(document, tmp_path / "report.png", monkeypatch)
    for (load, *others), shard_mib in zip(panels, (1500, 131, None, 131), strict=True):
        flat = [float(line.get_ydata()[0]) for line in load.lines if list(line.get_xdata()) == [0, 1]]
        labels = [text for text in words_of(load) if text.startswith("shard")]
        assert flat == ([] if shard_mib is None else [shard_mib])
        assert labels == ([] if shard_mib is None else [f"shard\n{shard_mib:,} MiB"])
        assert not any("shard" in text for axis in others for text in words_of(axis))
        assert load.get_ylim()[1] > 1500
    assert "501 MiB = 0.33x shard" in panels[0][0].get_title("right")


def test_device_memory_stands_between_load_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = drawn(with_steps(comparison(device_mib=140)), tmp_path / "report.png", monkeypatch)
    assert [axis.get_ylabel() for axis in panels[0]] == [
        "Host memory added\n(MiB)",
        "Device memory added\n(MiB)",
        "Host memory added\n(GiB)",
    ]
    assert highest(panels[0][1]) == pytest.approx(280)
    assert "worst rank (rank 0) 140 MiB, all ranks together 280 MiB" in panels[0][1].get_title("right")


def test_picture_of_failures_alone(tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    save_figure(comparison(failed=MODES), path)
    assert png_size(path)[0] > 1000


def test_picture_leaves_pyplot_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    save_figure(comparison(), tmp_path / "report.png")


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'shardwise\[report\]'"):
        save_figure(comparison(), tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


def test_few_ranks_have_a_colour_each_and_of_many_only_rank_0() -> None:
    assert len({rank_colour(rank, 6) for rank in range(6)}) == 6
    assert len({rank_colour(rank, 64) for rank in range(64)}) == 2


# -- units


def test_numbers_keep_what_matters() -> None:
    assert format_bytes(0, unit=None) == "0 MiB"
    assert format_bytes(1.5 * MIB, unit=None) == "1.5 MiB"
    assert format_bytes(1442 * MIB, unit=None) == "1,442 MiB"
    assert format_bytes(5 << 30, unit=None) == "5.00 GiB"
    assert format_number(512 * MIB, unit="GiB") == "0.50"
    assert [format_seconds(value) for value in (0.012, 12.34, 1234.5)] == ["0.01", "12.3", "1,234"]


def test_replicas_are_in_the_headlines() -> None:
    text = printed({**comparison(), "replicas": 2})
    assert "SmolLM2, 2 ranks (2 replicas). Times in seconds" in text
    assert read_documents([{**comparison(), "replicas": 2}]).title.endswith(" on 2 ranks (2 replicas)")
