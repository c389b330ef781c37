"""Converting a configuration file of stulzq/azure-openai-proxy (the Go proxy) to one of ours.

Its nodes become our nodes and keep their positions, so that mistakes are reported in the original file. The Go proxy's
behaviour was measured: docs/coming-from-the-go-proxy.md.
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
# For operations that the file's versions lack, as in the shipped configuration.
OTHERWISE = ("v1", "2025-04-01-preview")

_NAMES = ("deployment_name", "model_name", "endpoint")
_FIELDS = (*_NAMES, "api_key", "api_version")
_ENDPOINT = re.compile(r"(https?://[^/?#]+)/?(.*)", re.DOTALL)
_ADDRESS = re.compile(r"[0-9.]+|\[.*")
# As in the shipped configuration.
_REPAIRS = ("missing_message", "missing_fields", "missing_delta", "prompt_filter_chunk")


@dataclass
class Imported:
    """One of our configurations, converted from one of theirs.

    `notes` list the differences and the settings that were left out. `keys` are the variables that replace stored keys.
    `comments` explain settings, by their paths.
    """

    root: MappingNode = field(repr=False)
    notes: list[Mistake]
    keys: dict[str, str] = field(default_factory=dict, repr=False)
    comments: dict[tuple[str, ...], str] = field(default_factory=dict)


@dataclass
class _Entry:
    """An entry of `deployment_config`: the text and the node of each field."""

    node: Node
    texts: dict[str, str] = field(default_factory=dict, repr=False)
    nodes: dict[str, Node] = field(default_factory=dict)
    resource: str = ""

    def node_of(self, name: str) -> Node:
        return self.nodes.get(name, self.node)


def is_go_proxy(root: MappingNode) -> bool:
    """Whether a file is one of the Go proxy's, which ignores the case of names."""
    return any(isinstance(key, ScalarNode) and key.value.lower() == "deployment_config" for key, _ in root.value)


def convert(reader: Reader, root: MappingNode, *, importing: bool = False) -> Imported:
    """Convert their configuration to ours, and note mistakes. Raises ConfigError if no entry is usable.

    When `importing`, for a new file, variables replace its keys.
    """
    return _Conversion(reader, root, importing).run()


class _Conversion:
    def __init__(self, reader: Reader, root: MappingNode, importing: bool) -> None:
        self.reader = reader
        self.root = root
        self.importing = importing
        self.cors = False
        self.made = Imported(root, [])
        self.settings = {key.lower(): (key_node, value) for key, key_node, value in reader.pairs(root)}

    def note(self, node: Node, message: str) -> None:
        self.made.notes.append(self.reader.at(node, message))

    def run(self) -> Imported:
        self._other_settings()
        entries = self._entries()
        if not entries:
            if not self.reader.mistakes:
                node = self.settings["deployment_config"][1]
                self.reader.mistake(node, "deployment_config has no usable entry")
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
                "Browsers may call this gateway from any page, as with the Go proxy's `cors`. Better list the\n"
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
                next(entry.node_of("api_key") for entry in entries),
                "this file has keys and nothing authenticates clients: anyone who reaches the gateway can spend them "
                "(`auth: none`), as with the Go proxy; restrict access to the gateway",
            )
            self.made.comments["auth",] = (
                "ANYONE WHO REACHES THIS GATEWAY CAN SPEND THE KEYS ABOVE, with any key or none: nothing\n"
                "authenticates clients, as with the Go proxy. Restrict access to it, or add a stage that authenticates."
            )
        if several:
            self.made.comments["resource",] = "For requests that name no model: files, threads, lists."
        self.made.comments["listen",] = "Every interface, as with the Go proxy. If nginx is in front: 127.0.0.1:8080"
        self.made.root = _mapping(self.root, **parts)
        return self.made

    def _other_settings(self) -> None:
        """Convert the settings other than `deployment_config`."""
        for name, (key, value) in self.settings.items():
            text = value.value if isinstance(value, ScalarNode) else ""
            if name == "api_base":
                if text.strip("/") not in ("", "v1") or not isinstance(value, ScalarNode):
                    self._other_base(value, text)
            elif name == "cors":
                self.cors = text == "true"
            elif name not in ("deployment_config", "listen"):
                self.note(key, f"{name!r} is not a setting of the Go proxy; it is left out")

    def _other_base(self, node: Node, text: str) -> None:
        if self.importing:
            self.note(
                node,
                f"api_base is {text!r}, but the gateway's is /v1, so clients need another base URL; for PREFIX/v1, "
                "write a team's file with `match: {path_prefix: PREFIX}`",
            )
        else:
            # Else every request would get a 404 from a gateway that looks healthy.
            self.reader.mistake(
                node, f"api_base must be /v1, not {text!r}: write /v1 here, and at the end of your clients' base URL"
            )

    # -- deployment_config -----------------------------------------------------------------------------

    def _entries(self) -> list[_Entry]:
        """Return the usable entries: complete ones, and the last one for each model."""
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
                    f"the model {model!r} appears again further down, and the last entry counts, as with the Go "
                    "proxy; this one is left out",
                )
            by_model[model] = entry
        entries = list(by_model.values())
        if any(entry.texts["api_key"] for entry in entries):
            for entry in entries:
                if not entry.texts["api_key"]:
                    self.note(
                        entry.node,
                        f"the model {entry.texts['model_name']!r} has no api_key, but others have one: the gateway "
                        "cannot use the client's key for some models and a stored one for others; it is left out",
                    )
            entries = [entry for entry in entries if entry.texts["api_key"]]
        self._name_resources(entries)
        return entries

    def _entry(self, item: Node) -> _Entry | None:
        if not isinstance(item, MappingNode):
            self.reader.mistake(item, "an entry of deployment_config must be a mapping")
            return None
        entry = _Entry(item, dict.fromkeys(_FIELDS, ""))
        for name, key, value in self.reader.pairs(item):
            if name.lower() not in _FIELDS:
                self.note(key, f"{name!r} is not a setting of deployment_config; it is left out")
            elif not isinstance(value, ScalarNode):
                self.reader.mistake(value, f"{name} must be text")
            else:
                entry.nodes[name.lower()] = value
                entry.texts[name.lower()] = "" if self.reader.blank(value) else value.value
        missing = [name for name in _NAMES if not entry.texts[name]]
        if missing:
            self.note(item, f"this entry has no {' and no '.join(missing)}, so it cannot work; it is left out")
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
                    entry.node_of("endpoint"),
                    "the path after the endpoint's host is left out; the Go proxy did not use it either",
                )
            if found:  # else loading reports the mistake
                entry.texts["endpoint"] = found.group(1)
            endpoint_and_key = entry.texts["endpoint"], entry.texts["api_key"]
            if endpoint_and_key not in names:
                host = endpoint_and_key[0].partition("://")[2]
                name = re.sub(r"[^A-Za-z0-9_-]", "", "" if _ADDRESS.match(host) else re.split(r"[.:]", host)[0])
                names[endpoint_and_key] = _unused_name(names.values(), name.strip("-_") or "azure")
            entry.resource = names[endpoint_and_key]

    def _resources(self, entries: Iterable[_Entry]) -> MappingNode:
        made: dict[str, Node] = {}
        for entry in entries:
            if entry.resource in made:
                continue
            parts: dict[str, Node] = {"endpoint": _scalar(_plain(entry.texts["endpoint"]), entry.node_of("endpoint"))}
            if key := entry.texts["api_key"]:
                parts["api_key"] = _scalar(self._key(entry.resource, key), entry.node_of("api_key"))
            parts["proxy"] = _scalar(PROXY, entry.node)
            made[entry.resource] = _mapping(entry.node, **parts)
        return _mapping(self.root, **made)

    def _key(self, resource: str, key: str) -> str:
        if not self.importing:
            return _plain(key)
        name = "AZURE_OPENAI_KEY_" + re.sub(r"[^A-Z0-9]", "_", resource.upper())
        name = _unused_name(self.made.keys, name, "_")
        self.made.keys[name] = key
        return f"${{{name}}}"

    def _model_map(self, entries: Iterable[_Entry]) -> MappingNode:
        models: list[tuple[Node, Node]] = []
        for entry in entries:
            name = entry.texts["model_name"]
            if name.startswith("~") or any(sign in name for sign in "*?["):
                name = "~" + re.escape(name)  # to the Go proxy it is not a pattern
            deployment = _plain(f"{entry.resource}/{entry.texts['deployment_name']}")
            models.append(
                (_scalar(name, entry.node_of("model_name")), _scalar(deployment, entry.node_of("deployment_name")))
            )
        self.made.comments["pipeline", "model_map", "unmapped"] = (
            "Models that are not listed are refused, as with the Go proxy. Other values: gateway stages model_map"
        )
        return _mapping(self.root, models=_node(self.root, models), unmapped=_scalar("refuse", self.root))

    def _api_version(self, entries: list[_Entry]) -> MappingNode:
        """Use the most frequent version as the default, and list the others by model."""
        for entry in entries:
            if not entry.texts["api_version"]:
                self.note(
                    entry.node,
                    f"the model {entry.texts['model_name']!r} has no api_version, for which the Go proxy sent an empty "
                    f"one, which Azure refuses; it is {VERSION} now",
                )
        versions = [(entry.texts["api_version"] or VERSION, entry.node_of("api_version")) for entry in entries]
        usual = Counter(version for version, _ in versions).most_common(1)[0][0]
        usual_node = next(node for version, node in versions if version == usual)
        others: list[tuple[Node, Node]] = [
            (_scalar(entry.texts["model_name"], entry.node_of("model_name")), _scalar(_plain(version), node))
            for entry, (version, node) in zip(entries, versions, strict=True)
            if version != usual
        ]
        parts: dict[str, Node] = {"version": _scalar(_plain(usual), usual_node)}
        otherwise = [_scalar(version, self.root) for version in OTHERWISE]
        parts["otherwise"] = SequenceNode("tag:yaml.org,2002:seq", otherwise, self.root.start_mark)
        if others:
            parts["models"] = _node(self.root, others)
        return _mapping(self.root, **parts)


def _unused_name(taken: Iterable[str], name: str, before: str = "-") -> str:
    """Return a name, with a number after it if it is taken."""
    names, number, made = set(taken), 1, name
    while made in names:
        number += 1
        made = f"{name}{before}{number}"
    return made


def _plain(text: str) -> str:
    """Escape a text of theirs, which has no variables."""
    return text.replace("$", "$$")


def _scalar(text: str, at: Node) -> ScalarNode:
    """Make a quoted text node; unquoted, a key `null` would be blank."""
    return ScalarNode("tag:yaml.org,2002:str", text, at.start_mark, style='"')


def _copy(node: Node) -> Node:
    return _scalar(_plain(node.value), node) if isinstance(node, ScalarNode) else node


def _node(at: Node, pairs: list[tuple[Node, Node]]) -> MappingNode:
    return MappingNode("tag:yaml.org,2002:map", pairs, at.start_mark)


def _mapping(at: Node, /, **parts: Node) -> MappingNode:
    return _node(at, [(_scalar(name, value), value) for name, value in parts.items()])
