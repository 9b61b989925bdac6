"""Text from records reaches a terminal as plain text."""

import io

from rich.table import Table
from rich.text import Text

from training.recording.terminal import SafeConsole, printable


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
