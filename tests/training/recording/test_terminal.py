"""Text from records reaches a terminal as plain text."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from training.recording import terminal
from training.recording.terminal import Display, SafeConsole, printable


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert printable("a\tb\nc\x1b[2J\x07\x7f\x9b") == "a\tb\nc\u241b[2J\u2407\u2421\ufffd"


def test_a_console_applies_its_own_styles_and_no_codes_in_the_text() -> None:
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, color_system="standard", width=60)
    table = Table("name")
    table.add_row(Text("x\x1b[2Jy", style="red"))
    console.print(table)
    console.print("[bold]z\x1b]0;t\x07[/]", highlight=False)
    written = file.getvalue()
    assert "x\u241b[2J" in written
    assert "\x1b[31m" in written
    assert "\x1b[1mz\u241b]0;t" in written
    assert "\x1b[2J" not in written
    assert "\x07" not in written


def test_plain_lines_estimate_the_time_left_without_the_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step may compile for a minute; the estimate comes a few seconds after it."""
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    display = Display(104, 3, enabled=True)
    for step, moment in ((4, 60.0), (5, 62.0), (6, 64.0), (7, 66.0), (8, 78.0), (104, 260.0)):
        now = moment
        display.step({"step": step, "loss": 4.0, "tokens_per_second": 1000.0})
    assert capsys.readouterr().err.splitlines() == [
        "step 4/104  loss 4.0000  1.0k tok/s",
        "step 6/104  loss 4.0000  1.0k tok/s  3:16 left",
        "step 104/104  loss 4.0000  1.0k tok/s  0:00 left",
    ]
