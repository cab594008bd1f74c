"""What a person sees: plain lines at a sane rate, bars on a terminal, tables with the figures."""

import io
import threading

import pytest
from rich.console import Console
from rich.table import Table

from flows.reporting.narrow import fitting
from flows.reporting.tables import gates_table, show_result
from flows.reporting.terminal import TerminalProgress
from tests.flows.test_cli import result


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plain():
    stream, clock = io.StringIO(), Clock()
    return TerminalProgress(stream, clock=clock), stream, clock


def test_plain_lines_come_each_tenth_with_the_time_left(plain):
    terminal, stream, clock = plain
    with terminal:
        terminal.started("int8")
        for done in range(1, 101):
            clock.now = done / 10
            terminal.for_step("int8").advanced(done, 100)
        terminal.finished("int8", 10.0, cached=False, why="params.x: 1 -> 2")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "int8: started" and lines[-1] == "int8: done in 10 s (params.x: 1 -> 2)"
    assert lines[1:4] == ["int8: 10%, 9.0 s left", "int8: 20%, 8.0 s left", "int8: 30%, 7.0 s left"]
    assert len(lines) == 12


def test_plain_lines_come_each_quarter_minute_of_slow_work(plain):
    terminal, stream, clock = plain
    for second in range(61):
        clock.now = float(second)
        terminal.advanced("slow", second, 10_000)
    assert len(stream.getvalue().splitlines()) == 1 + 4
    assert "left" in stream.getvalue()


def test_plain_lines_start_over_when_a_step_begins_a_second_part(plain):
    terminal, stream, _ = plain
    terminal.advanced("a", 10, 10)
    terminal.advanced("a", 0, 0)
    terminal.advanced("a", 1, 10)
    assert stream.getvalue().splitlines() == ["a: started", "a: 100%", "a: 10%, 0.0 s left"]


def test_plain_lines_say_cached_failed_and_notes(plain):
    terminal, stream, _ = plain
    terminal.finished("a", 0.0, cached=True)
    terminal.failed("b", "it broke")
    terminal.for_step("c").note("[bold]12 layers")
    terminal.for_step("c").metric("loss", 1.0, 1)
    assert stream.getvalue().splitlines() == ["a: cached", "b: failed: it broke", "c: [bold]12 layers"]


def test_bars_show_running_steps_and_leave_a_line_when_done():
    stream = io.StringIO()
    terminal = TerminalProgress(stream, live=True)
    with terminal:
        terminal.started("dense")
        terminal.started("dense")
        terminal.advanced("dense", 1, 4)
        terminal.advanced("late", 1, 4)
        bars = {task.description: task.percentage for task in terminal._bars.shown.tasks}
        assert bars == {"dense": 25.0, "late": 25.0}
        terminal.finished("dense", 3.0, cached=False)
        terminal.line("[x] a sentence")
        assert [task.description for task in terminal._bars.shown.tasks] == ["late"]
    assert "dense: done in 3.0 s" in stream.getvalue() and "[x] a sentence" in stream.getvalue()


def test_terminal_hears_many_threads_without_mixing_lines(plain):
    terminal, stream, _ = plain

    def work(name: str) -> None:
        for done in range(1, 11):
            terminal.advanced(name, done, 10)
        terminal.finished(name, 1.0, cached=False)

    threads = [threading.Thread(target=work, args=(f"s{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 8 * 12 and all(line.startswith("s") and line.count(":") == 1 for line in lines)


def test_result_table_gives_a_judged_step_the_perplexity_of_its_measurement():
    stream = io.StringIO()
    show_result(result(passed=False), Console(file=stream, width=140))
    said = stream.getvalue()
    cpu = next(line for line in said.splitlines() if line.startswith("│ cpu"))
    assert "90.0 MB" in cpu and "21.7" in cpu and "params.x: [1] -> 2" in cpu
    gate = next(line for line in said.splitlines() if "perplexity / dense" in line)
    assert "1.2..1.41" in gate and "<= 1.25" in gate and "FAILED" in gate
    assert "run r1: gate failed in 1 min 15 s" in said


def test_result_without_gates_says_that_nothing_was_judged():
    stream = io.StringIO()
    bare = result().model_copy(update={"gates": [], "verdict": "not judged"})
    show_result(bare, Console(file=stream, width=140))
    said = stream.getvalue()
    assert "run r1: not judged (the recipe has no gates), done in 1 min 15 s" in said and "passed" not in said
    assert "registered: m version 3 as champion, serves onnxruntime:cpu, promoted without a gate" in said
    assert "executed and measured: cpu" in said


@pytest.mark.parametrize(("bound", "sign"), [("at_most", "<="), ("at_least", ">=")])
def test_gates_table_shows_which_side_of_the_limit_is_held(bound, sign):
    gate = result().gates[0].model_copy(update={"bound": bound})
    stream = io.StringIO()
    Console(file=stream, width=140).print(gates_table([gate, gate.model_copy(update={"measured": None, "low": None})]))
    rows = [line for line in stream.getvalue().splitlines() if "perplexity" in line]
    assert all(f"{sign} 1.25" in row for row in rows)
    assert "passed" in rows[0] and "not applicable" in rows[1]


def test_result_table_gives_a_step_no_perplexity_of_one_whose_name_begins_like_it():
    whole = result()
    measured = next(step for step in whole.steps if step.measures)
    other = measured.model_copy(update={"name": "validate-cpu-fast-text", "measures": "cpu-fast"})
    stream = io.StringIO()
    steps = [step for step in whole.steps if not step.measures]
    show_result(whole.model_copy(update={"steps": [*steps, other]}), Console(file=stream, width=140))
    cpu = next(line for line in stream.getvalue().splitlines() if line.startswith("│ cpu"))
    assert "90.0 MB" in cpu and "21.7" not in cpu


def test_table_that_a_terminal_has_no_room_for_is_a_line_for_each_column():
    stream = io.StringIO()
    show_result(result(), Console(file=stream, width=80))
    said = stream.getvalue()
    assert "│ cpu" in said, "steps fit"
    lines = [line.split(maxsplit=1) for line in said[said.index("Gates") :].splitlines()]
    assert ["measure", "perplexity / dense"] in [[one.strip() for one in line] for line in lines]
    assert max(len(line) for line in said.splitlines()) <= 80


def test_table_without_rows_is_a_table_however_narrow_the_terminal():
    stream = io.StringIO()
    console = Console(file=stream, width=20)
    empty = Table("fingerprint", "step", "registered")
    assert fitting(empty, console) is empty
