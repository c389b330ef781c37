"""`gateway keys`: make a key for a team, or print the digest of one."""

from __future__ import annotations

import argparse
import datetime
import getpass
import json
import sys

from gateway.cli.arguments import Commands
from gateway.errors import StartError

__all__ = ("add_parser",)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    keys = commands.add_parser(
        "keys", help="make a team's key", description="Make keys for teams; the configuration has only their digests."
    ).add_subparsers(dest="keys_command", metavar="new|digest", required=True)
    new = keys.add_parser(
        "new",
        help="make a key",
        description="Make a key and print it, this once, with the line that makes it a team's. Nothing is stored.",
    )
    new.add_argument("--team", metavar="NAME", required=True, help="whose key it will be: the name of the team's file")
    new.add_argument("--label", metavar="TEXT", help="who will have it, for logs and limits")
    expires = "in so many days (90), or on its last day (2027-01-31); never if it is left out"
    new.add_argument("--expires", metavar="DAYS|DATE", help=expires)
    new.set_defaults(run=_new_key)
    digest = keys.add_parser(
        "digest",
        help="print the digest of a key",
        description="Read a key from standard input, and print its digest as `match: keys:` has it.",
    )
    digest.set_defaults(run=_digest)


def _new_key(options: argparse.Namespace) -> int:
    from gateway.auth.credentials import key_digest, new_key  # noqa: PLC0415
    from gateway.config.nodes import NAME  # noqa: PLC0415

    if not NAME.fullmatch(options.team):
        raise StartError(f"--team: {options.team!r} cannot be a team's name: letters, digits, _ . -")
    if options.label == "":
        raise StartError("--label is empty; leave it out for a key that is known by its digest")
    today = datetime.datetime.now(datetime.UTC).date()
    key = new_key()
    facts = {"digest": key_digest(key), "label": options.label, "created": str(today)}
    facts["expires"] = _last_day(options.expires, today) if options.expires is not None else None
    line = ", ".join(f"{name}: {json.dumps(text, ensure_ascii=False)}" for name, text in facts.items() if text)
    where = "gateway.yaml" if options.team == "default" else f"the team's file, {options.team}.yaml"
    print(f"{key}\n\nThis is the key; it is shown only now. It works once this stands in {where}")
    print(f"(where there are keys already, add its last line to them):\n\nmatch:\n  keys:\n    - {{{line}}}")
    return 0


def _last_day(text: str, today: datetime.date) -> str:
    """Return what `expires:` is to say. Raises StartError where that is past, or no day."""
    from gateway.config.load import end_of  # noqa: PLC0415

    try:
        day = str(today + datetime.timedelta(days=int(text))) if text.isdecimal() else text
        if end_of(day) <= datetime.datetime.now(datetime.UTC).timestamp():
            raise StartError(f"--expires: {day} is past")
    except (ValueError, OverflowError):
        raise StartError(f"--expires: {text!r} is neither a number of days nor a day, such as 2027-01-31") from None
    return day


def _digest(_: argparse.Namespace) -> int:
    from gateway.auth.credentials import is_key, key_digest  # noqa: PLC0415

    key = (getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    if not is_key(key):
        raise StartError("standard input has no key: one line of letters, digits and . _ ~ + / - =")
    print(key_digest(key))
    return 0
