"""`gateway keys`: create a key for a team, or print the digest of a key."""

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
        "keys",
        help="create a key for a team",
        description="Create keys for teams. The configuration has only their digests.",
    ).add_subparsers(dest="keys_command", metavar="new|digest", required=True)
    new = keys.add_parser(
        "new",
        help="create a key",
        description="Create a key and print it, with the lines that add it to a team. It is shown only once and not "
        "stored.",
    )
    new.add_argument(
        "--team", metavar="NAME", required=True, help="the team: the name of its file without .yaml, or default"
    )
    new.add_argument("--label", metavar="TEXT", help="holder of the key, for logs and limits")
    expires = "number of days until it expires (90), or its last day (2027-01-31); default: never"
    new.add_argument("--expires", metavar="DAYS|DATE", help=expires)
    new.set_defaults(run=_new_key)
    digest = keys.add_parser(
        "digest",
        help="print the digest of a key",
        description="Read a key from standard input and print its digest, for `match: keys:`.",
    )
    digest.set_defaults(run=_digest)


def _new_key(options: argparse.Namespace) -> int:
    from gateway.auth.credentials import key_digest, new_key  # noqa: PLC0415
    from gateway.config.nodes import NAME  # noqa: PLC0415

    if not NAME.fullmatch(options.team):
        raise StartError(f"--team: {options.team!r} is not a valid team name: use letters, digits, . _ and -")
    if options.label == "":
        raise StartError("--label is empty; leave it out to identify the key by its digest")
    today = datetime.datetime.now(datetime.UTC).date()
    key = new_key()
    facts = {"digest": key_digest(key), "label": options.label, "created": str(today)}
    facts["expires"] = _last_day(options.expires, today) if options.expires is not None else None
    line = ", ".join(f"{name}: {json.dumps(text, ensure_ascii=False)}" for name, text in facts.items() if text)
    file = "gateway.yaml" if options.team == "default" else f"the team's file, {options.team}.yaml"
    print(f"{key}\n\nThis is the key; it is shown only once. It works as soon as these lines are in {file}")
    print(f"(if that has keys, add only the last line to them):\n\nmatch:\n  keys:\n    - {{{line}}}")
    return 0


def _last_day(text: str, today: datetime.date) -> str:
    """Return the value of `expires:`. Raises StartError if that is past, or not a day."""
    from gateway.config.keys import parse_expiry  # noqa: PLC0415

    try:
        day = str(today + datetime.timedelta(days=int(text))) if text.isdecimal() else text
        if parse_expiry(day) <= datetime.datetime.now(datetime.UTC).timestamp():
            raise StartError(f"--expires: {day} is past")
    except (ValueError, OverflowError):
        raise StartError(f"--expires: {text!r} must be a number of days, or a day such as 2027-01-31") from None
    return day


def _digest(_: argparse.Namespace) -> int:
    from gateway.auth.credentials import is_key, key_digest  # noqa: PLC0415

    key = (getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    if not is_key(key):
        raise StartError("standard input has no key; a key is one line of letters, digits and . _ ~ + / - =")
    print(key_digest(key))
    return 0
