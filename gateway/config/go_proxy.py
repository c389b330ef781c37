"""The configuration file of stulzq/azure-openai-proxy, which many come from, as one of ours.

Its nodes become our nodes and keep their places, so that a mistake is reported where it stands in the file. What
that proxy does with such a file was measured: docs/coming-from-the-go-proxy.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gateway.config.nodes import Reader
from gateway.config.pipeline import with_cors
from gateway.errors import ConfigError, Mistake

__all__ = ("Imported", "convert", "is_go_proxy")

LISTEN = "${GATEWAY_LISTEN:-:8080}"
PROXY = "${AZURE_OPENAI_SOCKS_PROXY:-${AZURE_OPENAI_HTTP_PROXY:-}}"
VERSION = "2024-10-21"
# For what the versions of the file do not have, as the shipped configuration says it.
OTHERWISE = ("v1", "2025-04-01-preview")

_NAMES = ("deployment_name", "model_name", "endpoint")
_FIELDS = (*_NAMES, "api_key", "api_version")
_ENDPOINT = re.compile(r"(https?://[^/?#]+)/?(.*)", re.DOTALL)
_ADDRESS = re.compile(r"[0-9.]+|\[.*")
# As the shipped configuration has them.
_REPAIRS = ("missing_message", "missing_fields", "missing_delta", "prompt_filter_chunk")


@dataclass
class Imported:
    """One of our configurations, made of one of theirs.

    `notes` are what is different now, or was left out; `keys` the variables that stand for stored keys;
    `comments` say why, above the settings that they are of (their paths).
    """

    root: MappingNode = field(repr=False)
    notes: list[Mistake]
    keys: dict[str, str] = field(default_factory=dict, repr=False)
    comments: dict[tuple[str, ...], str] = field(default_factory=dict)


@dataclass
class _Entry:
    """One of `deployment_config`: the text of each field, and where it stands."""

    node: Node
    texts: dict[str, str] = field(default_factory=dict, repr=False)
    places: dict[str, Node] = field(default_factory=dict)
    resource: str = ""

    def place(self, name: str) -> Node:
        return self.places.get(name, self.node)


def is_go_proxy(root: MappingNode) -> bool:
    """Whether a file is one of that proxy's; it does not tell capital letters from small ones."""
    return any(isinstance(key, ScalarNode) and key.value.lower() == "deployment_config" for key, _ in root.value)


def convert(reader: Reader, root: MappingNode, *, importing: bool = False) -> Imported:
    """Return their configuration as ours, what is wrong with it noted as mistakes. Raises ConfigError if all is.

    When `importing` a file that is to be kept, variables stand for its keys.
    """
    return _Conversion(reader, root, importing).run()


class _Conversion:
    def __init__(self, reader: Reader, root: MappingNode, importing: bool) -> None:
        self.reader = reader
        self.root = root
        self.importing = importing
        self.cors = False
        self.made = Imported(root, [])
        self.settings = {key.lower(): (place, value) for key, place, value in reader.pairs(root)}

    def note(self, node: Node, message: str) -> None:
        self.made.notes.append(self.reader.at(node, message))

    def run(self) -> Imported:
        self._other_settings()
        entries = self._entries()
        if not entries:
            if not self.reader.mistakes:
                place = self.settings["deployment_config"][1]
                self.reader.mistake(place, "deployment_config lists nothing that can work")
            raise ConfigError(self.reader.mistakes)
        resources = self._resources(entries)
        several = len(resources.value) > 1
        stored = any(entry.texts["api_key"] for entry in entries)
        pipeline: list[Node] = [
            _scalar("access_log", self.root),
            *([] if stored else [_scalar("auth_passthrough", self.root)]),
            _mapping(self.root, model_map=self._model_map(entries)),
            _mapping(self.root, api_version=self._api_version(entries)),
            *(_scalar(name, self.root) for name in _REPAIRS),
            *([_scalar("resource_ids", self.root)] if several else []),
            _scalar("openai_errors", self.root),
            _scalar("sse_newline", self.root),
        ]
        listed: Node = SequenceNode("tag:yaml.org,2002:seq", pipeline, self.root.start_mark)
        if self.cors:
            listed = with_cors(listed)
            self.made.comments["pipeline", "cors", "origins"] = (
                "Any page may use this gateway from a browser, as with the Go proxy's `cors`. Better list the\n"
                "origins of your own pages: gateway stages cors"
            )
        listen = self.settings.get("listen")
        parts: dict[str, Node] = {
            "listen": _scalar(LISTEN, self.root) if listen is None else _copy(listen[1]),
            "resources": resources,
            **({"resource": _scalar(entries[0].resource, entries[0].node)} if several else {}),
            **({"auth": _scalar("none", self.root)} if stored else {}),
            "pipeline": listed,
        }
        if stored:
            self.note(
                next(entry.place("api_key") for entry in entries),
                "this file has keys and nothing that authenticates clients: whoever reaches the gateway spends them "
                "(`auth: none`), as it was with the Go proxy; let nobody reach it who must not",
            )
            self.made.comments["auth",] = (
                "WHOEVER REACHES THIS GATEWAY SPENDS THE KEYS ABOVE, with any key or none: nothing here authenticates\n"
                "clients, as nothing did in the Go proxy. Let nobody reach it who must not, or list a stage that does."
            )
        if several:
            self.made.comments["resource",] = "Where requests go that name no model: files, threads, lists."
        self.made.comments["listen",] = "Every interface, as the Go proxy. Behind nginx: 127.0.0.1:8080"
        self.made.root = _mapping(self.root, **parts)
        return self.made

    def _other_settings(self) -> None:
        """Say what becomes of the settings beside `deployment_config`."""
        for name, (key, value) in self.settings.items():
            text = value.value if isinstance(value, ScalarNode) else ""
            if name == "api_base":
                if text.strip("/") not in ("", "v1") or not isinstance(value, ScalarNode):
                    self._other_base(value, text)
            elif name == "cors":
                self.cors = text == "true"
            elif name not in ("deployment_config", "listen"):
                self.note(key, f"{name!r} means nothing in such a file; it is left out")

    def _other_base(self, node: Node, text: str) -> None:
        if self.importing:
            self.note(
                node,
                f"api_base is {text!r}: the gateway's is /v1, so clients need another base URL; for PREFIX/v1, write "
                "a team's file with `match: {path_prefix: PREFIX}`",
            )
        else:
            # Each request would be a 404, of a gateway that looks well.
            self.reader.mistake(
                node, f"api_base must be /v1, not {text!r}: write /v1 here, and at the end of your clients' base URL"
            )

    # -- deployment_config -----------------------------------------------------------------------------

    def _entries(self) -> list[_Entry]:
        """Return the entries that count: whole ones, the last of each model's."""
        _, node = self.settings["deployment_config"]
        if not isinstance(node, SequenceNode):
            self.reader.mistake(node, "deployment_config must be a list")
            return []
        by_model: dict[str, _Entry] = {}
        for item in node.value:
            entry = self._entry(item)
            if entry is None:
                continue
            model = entry.texts["model_name"]
            if model in by_model:
                self.note(
                    by_model.pop(model).node,
                    f"the model {model!r} stands here again further down, and the last one counts, as in the Go "
                    "proxy; this one is left out",
                )
            by_model[model] = entry
        entries = list(by_model.values())
        if any(entry.texts["api_key"] for entry in entries):
            for entry in entries:
                if not entry.texts["api_key"]:
                    self.note(
                        entry.node,
                        f"the model {entry.texts['model_name']!r} has no api_key, and others have one: that some use "
                        "the client's key and some a stored one cannot be carried over; it is left out",
                    )
            entries = [entry for entry in entries if entry.texts["api_key"]]
        self._name_resources(entries)
        return entries

    def _entry(self, item: Node) -> _Entry | None:
        if not isinstance(item, MappingNode):
            self.reader.mistake(item, "an entry of deployment_config is a mapping")
            return None
        entry = _Entry(item, dict.fromkeys(_FIELDS, ""))
        for name, key, value in self.reader.pairs(item):
            if name.lower() not in _FIELDS:
                self.note(key, f"{name!r} means nothing in deployment_config; it is left out")
            elif not isinstance(value, ScalarNode):
                self.reader.mistake(value, f"{name} must be text")
            else:
                entry.places[name.lower()] = value
                entry.texts[name.lower()] = "" if self.reader.blank(value) else value.value
        missing = [name for name in _NAMES if not entry.texts[name]]
        if missing:
            self.note(item, f"this entry has no {' and no '.join(missing)}, so it cannot have worked; it is left out")
            return None
        return entry

    # -- the parts of ours -----------------------------------------------------------------------------

    def _name_resources(self, entries: Iterable[_Entry]) -> None:
        """Name a resource for each endpoint and key, after the host's first label."""
        names: dict[tuple[str, str], str] = {}
        for entry in entries:
            given = entry.texts["endpoint"]
            found = _ENDPOINT.fullmatch(given)
            if found and found.group(2):
                self.note(
                    entry.place("endpoint"),
                    "the path behind the endpoint's host is left out: the Go proxy did not use it either",
                )
            if found:  # else loading it says what is wrong
                entry.texts["endpoint"] = found.group(1)
            place = entry.texts["endpoint"], entry.texts["api_key"]
            if place not in names:
                host = place[0].partition("://")[2]
                name = re.sub(r"[^A-Za-z0-9_-]", "", "" if _ADDRESS.match(host) else re.split(r"[.:]", host)[0])
                names[place] = _other_than(names.values(), name.strip("-_") or "azure")
            entry.resource = names[place]

    def _resources(self, entries: Iterable[_Entry]) -> MappingNode:
        made: dict[str, Node] = {}
        for entry in entries:
            if entry.resource in made:
                continue
            parts: dict[str, Node] = {"endpoint": _scalar(_plain(entry.texts["endpoint"]), entry.place("endpoint"))}
            if key := entry.texts["api_key"]:
                parts["api_key"] = _scalar(self._key(entry.resource, key), entry.place("api_key"))
            parts["proxy"] = _scalar(PROXY, entry.node)
            made[entry.resource] = _mapping(entry.node, **parts)
        return _mapping(self.root, **made)

    def _key(self, resource: str, key: str) -> str:
        if not self.importing:
            return _plain(key)
        name = "AZURE_OPENAI_KEY_" + re.sub(r"[^A-Z0-9]", "_", resource.upper())
        name = _other_than(self.made.keys, name, "_")
        self.made.keys[name] = key
        return f"${{{name}}}"

    def _model_map(self, entries: Iterable[_Entry]) -> MappingNode:
        models: list[tuple[Node, Node]] = []
        for entry in entries:
            name = entry.texts["model_name"]
            if name.startswith("~") or any(sign in name for sign in "*?["):
                name = "~" + re.escape(name)  # no pattern to the Go proxy
            deployment = _plain(f"{entry.resource}/{entry.texts['deployment_name']}")
            models.append(
                (_scalar(name, entry.place("model_name")), _scalar(deployment, entry.place("deployment_name")))
            )
        self.made.comments["pipeline", "model_map", "unmapped"] = (
            "The Go proxy refused what is not in its list, too. Others: gateway stages model_map"
        )
        return _mapping(self.root, models=_node(self.root, models), unmapped=_scalar("refuse", self.root))

    def _api_version(self, entries: list[_Entry]) -> MappingNode:
        """Take the version that most have, and the others by model."""
        for entry in entries:
            if not entry.texts["api_version"]:
                self.note(
                    entry.node,
                    f"the model {entry.texts['model_name']!r} has no api_version, and the Go proxy then sent an empty "
                    f"one, which Azure refuses; it is {VERSION} now",
                )
        versions = [(entry.texts["api_version"] or VERSION, entry.place("api_version")) for entry in entries]
        usual = Counter(version for version, _ in versions).most_common(1)[0][0]
        place = next(place for version, place in versions if version == usual)
        others: list[tuple[Node, Node]] = [
            (_scalar(entry.texts["model_name"], entry.place("model_name")), _scalar(_plain(version), place))
            for entry, (version, place) in zip(entries, versions, strict=True)
            if version != usual
        ]
        parts: dict[str, Node] = {"version": _scalar(_plain(usual), place)}
        otherwise = [_scalar(version, self.root) for version in OTHERWISE]
        parts["otherwise"] = SequenceNode("tag:yaml.org,2002:seq", otherwise, self.root.start_mark)
        if others:
            parts["models"] = _node(self.root, others)
        return _mapping(self.root, **parts)


def _other_than(taken: Iterable[str], name: str, before: str = "-") -> str:
    """Return a name, with a number behind it where it is taken already."""
    names, number, made = set(taken), 1, name
    while made in names:
        number += 1
        made = f"{name}{before}{number}"
    return made


def _plain(text: str) -> str:
    """Return a text of theirs, which knows no variables, as ours has it."""
    return text.replace("$", "$$")


def _scalar(text: str, at: Node) -> ScalarNode:
    """Make a text; as one in quotes, or a key that is the word `null` would be none."""
    return ScalarNode("tag:yaml.org,2002:str", text, at.start_mark, style='"')


def _copy(node: Node) -> Node:
    return _scalar(_plain(node.value), node) if isinstance(node, ScalarNode) else node


def _node(at: Node, pairs: list[tuple[Node, Node]]) -> MappingNode:
    return MappingNode("tag:yaml.org,2002:map", pairs, at.start_mark)


def _mapping(at: Node, /, **parts: Node) -> MappingNode:
    return _node(at, [(_scalar(name, value), value) for name, value in parts.items()])
