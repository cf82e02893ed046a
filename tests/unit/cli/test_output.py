"""What others named or wrote cannot steer the terminal of who looks at it."""

import pytest

from isthmus.cli import main
from isthmus.cli.output import printable, show, show_fields, steerless

TITLE = "\x1b]0;owned\x07"
CLEAR = "\x1b[2J\x1b[H"


@pytest.mark.parametrize("control", [TITLE, CLEAR, "\r", "\n", "\x9b2J", "\x7f", "\u202e", "\x00"])
def test_a_name_stays_on_its_line_and_in_its_place(control, capsys):
    row = {"name": f"a{control}b"}
    show([row], False, [("NAME", lambda each: each["name"])], "nothing")
    show_fields(row, False, [("name", row["name"])])
    main._say(row["name"].replace("\n", ""))
    told = "".join(capsys.readouterr())
    assert all(letter == "\n" or letter.isprintable() for letter in told)
    assert "\n" not in printable(row["name"])


def test_ordinary_words_of_any_language_are_shown_as_they_are():
    assert printable("Grüße, 世界 [bold]x[/bold] 🙂") == "Grüße, 世界 [bold]x[/bold] 🙂"


def test_output_of_functions_keeps_lines_and_colours_and_nothing_else():
    assert steerless("\x1b[1;31mred\x1b[0m\tand\r\n") == "\x1b[1;31mred\x1b[0m\tand\r\n"
    assert "\x1b" not in steerless(TITLE + CLEAR + "\x1b[6n" + "\x1b")
