"""`python -m isthmus` is the `isthmus` command."""

from isthmus.cli.main import run

run()
