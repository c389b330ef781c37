"""The calls of `deploy/requests.http`, and the Postman collection generated from them: `python -m tests.collection`.

The reader accepts only syntax that Visual Studio Code's REST Client and JetBrains' HTTP client read in the same way:

    @host = http://127.0.0.1:8080

    ### folder: name
    # One line of description.
    POST {{host}}/v1/files
    Content-Type: multipart/form-data; boundary=part

    a body, up to the last line before the next ### that is not empty
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).parents[1] / "deploy"
SOURCE = DEPLOY / "requests.http"
POSTMAN = DEPLOY / "requests.postman_collection.json"

_DEFINITION = re.compile(r"@(\w+) = (\S+)")
_TITLE = re.compile(r"### ([^:]+): (.+)")
_NOTE = re.compile(r"# ([^@].*)")  # `# @name` and the like are settings of the clients
_REQUEST = re.compile(r"(GET|POST|DELETE) (\{\{host\}\}/\S+)")
_HEADER = re.compile(r"([A-Za-z-]+): (.+)")
_FILE = re.compile(r"< \./(\S+)")
# One of the two clients reads these as a comment, variable, script, file or recorded response, in a body too.
_SPECIAL = re.compile(r"\s*(#|//|@|<|>|```|HTTP/)")
_VARIABLE = re.compile(r"\{\{(.+?)\}\}")
_PART = re.compile(r'Content-Disposition: form-data; name="(\w+)"(?:; filename="([^"]+)")?(?:\nContent-Type: (\S+))?')


@dataclass(frozen=True)
class Call:
    """One request, with its variables unresolved; lines end with a line feed."""

    folder: str
    name: str
    note: str
    method: str
    url: str
    headers: tuple[tuple[str, str], ...]
    body: str

    @property
    def boundary(self) -> str | None:
        """The boundary of a form; None if the body is no form."""
        kind = dict(self.headers).get("Content-Type", "")
        return kind.partition("boundary=")[2] if kind.startswith("multipart/form-data;") else None

    def payload(self, values: Mapping[str, str]) -> bytes:
        """Return the body as both clients send it: lines of a form end with CRLF, except the last one."""
        if self.boundary is None:
            return fill(self.body, values).encode()
        lines = []
        for line in self.body.split("\n"):
            file = _FILE.fullmatch(line)
            lines.append((DEPLOY / file[1]).read_bytes() if file else fill(line, values).encode())
        return b"\r\n".join(lines)

    def parts(self) -> Iterator[tuple[str, str | None, str | None, str]]:
        """Yield name, file name, content type and content of each part of a form."""
        for part in re.split(rf"(?:\A|\n)--{self.boundary}(?:--\Z|\n)", self.body)[1:-1]:
            head, _, content = part.partition("\n\n")
            found = _PART.fullmatch(head)
            if found is None:
                raise ValueError(f"{self.name}: {head!r} is not a valid head of a part")
            yield found[1], found[2], found[3], content


@dataclass(frozen=True)
class Collection:
    """The content of a file: its variables, and its calls in order."""

    variables: dict[str, str]
    calls: tuple[Call, ...]


def fill(text: str, values: Mapping[str, str]) -> str:
    """Return the text with each variable replaced by its value."""
    return _VARIABLE.sub(lambda found: values[found[1]], text)


def read(text: str) -> Collection:
    """Read a file. Raises ValueError with the line number for syntax that the two clients do not share."""
    lines = text.splitlines()
    titles = [number for number, line in enumerate(lines) if line.startswith("###")]
    variables: dict[str, str] = {}
    for number, line in enumerate(lines[: titles[0]] if titles else lines):
        if line.startswith("@"):
            name, value = _expect(_DEFINITION, line, number, "@name = value").groups()
            variables[name] = value
        elif line and not line.startswith("#"):
            raise ValueError(f"line {number + 1}: neither a comment nor a variable")
    for number, line in enumerate(lines):
        for name in _VARIABLE.findall(line):
            if name not in variables:
                raise ValueError(f"line {number + 1}: there is no variable {name!r}")
    ends = [*titles[1:], len(lines)]
    calls = tuple(_call(lines[start:end], start) for start, end in zip(titles, ends, strict=False))
    if len({(call.folder, call.name) for call in calls}) < len(calls):
        raise ValueError("two calls have one name")
    return Collection(variables, calls)


def _call(lines: list[str], start: int) -> Call:
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) < 3:
        raise ValueError(f"line {start + 1}: a title, a comment and a request are needed")
    folder, name = _expect(_TITLE, lines[0], start, "### folder: name").groups()
    note = _expect(_NOTE, lines[1], start + 1, "# and a comment")[1]
    method, url = _expect(_REQUEST, lines[2], start + 2, "METHOD {{host}}/path").groups()
    head = lines.index("") if "" in lines else len(lines)
    headers = []
    for number in range(3, head):
        found = _expect(_HEADER, lines[number], start + number, "Header: value")
        headers.append((found[1], found[2]))
    call = Call(folder, name, note, method, url, tuple(headers), "\n".join(lines[head + 1 :]))
    for number in range(head + 1, len(lines)):
        line = lines[number]
        if _SPECIAL.match(line) and not (call.boundary is not None and _FILE.fullmatch(line)):
            raise ValueError(f"line {start + number + 1}: a body's line may not begin so")
    if call.boundary is not None and not call.body.endswith(f"\n--{call.boundary}--"):
        raise ValueError(f"line {start + len(lines)}: the form does not end with its boundary")
    return call


def _expect(pattern: re.Pattern[str], line: str, number: int, what: str) -> re.Match[str]:
    found = pattern.fullmatch(line)
    if found is None:
        raise ValueError(f"line {number + 1}: {what} is expected")
    return found


def postman(collection: Collection) -> str:
    """Return the calls as a Postman collection, v2.1, folder by folder."""
    folders: dict[str, list[dict[str, Any]]] = {}
    for call in collection.calls:
        folders.setdefault(call.folder, []).append(_item(call))
    made = {
        "info": {
            "name": "Azure OpenAI gateway",
            "description": "Made from requests.http, which says how to use it. Postman finds the files of forms where "
            "its working directory is the folder `deploy`.",
            "schema": "https://schema.getpostman.com/json/collection/v2.1.0/collection.json",
        },
        "item": [{"name": name, "item": items} for name, items in folders.items()],
        "variable": [{"key": name, "value": value} for name, value in collection.variables.items()],
    }
    return json.dumps(made, indent=2) + "\n"


def _item(call: Call) -> dict[str, Any]:
    headers = [{"key": name, "value": value} for name, value in call.headers]
    request: dict[str, Any] = {"method": call.method, "header": headers, "url": call.url, "description": call.note}
    if any(_FILE.fullmatch(line) for line in call.body.split("\n")):
        # Postman reads files only in its own forms, and sets their boundary itself.
        request["header"] = [header for header in headers if header["key"] != "Content-Type"]
        request["body"] = {"mode": "formdata", "formdata": [_field(*part) for part in call.parts()]}
    elif call.boundary is not None:
        request["body"] = {"mode": "raw", "raw": call.body.replace("\n", "\r\n")}
    elif call.body:
        request["body"] = {"mode": "raw", "raw": call.body, "options": {"raw": {"language": "json"}}}
    return {"name": call.name, "request": request}


def _field(name: str, filename: str | None, kind: str | None, content: str) -> dict[str, str]:
    if filename is None:
        return {"key": name, "type": "text", "value": content}
    found = _FILE.fullmatch(content)
    if found is None or kind is None:
        raise ValueError(f"{filename}: a form with a file of the disk has others in it only with a content type")
    return {"key": name, "type": "file", "src": found[1], "contentType": kind}


if __name__ == "__main__":
    POSTMAN.write_text(postman(read(SOURCE.read_text())))
