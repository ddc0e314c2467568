"""A visitor of a running demo without a browser: speaks HTTP and server-sent events as the page's own script does."""

from __future__ import annotations

import json
import re
import secrets
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from html import unescape
from typing import Any

PATIENCE = 600.0
"""Seconds without a word from the server after which a visitor gives up."""
# The server is near; proxies are for the rest of the world.
_OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@dataclass(frozen=True)
class Shown:
    """What the page shows when a run has ended.

    Attributes:
        status: the last line under the buttons, without its markup.
        files: name → address of what may be taken home; empty where there was no run.
        gallery: captions of this visit's runs.
    """

    status: str
    files: Mapping[str, str] = field(default_factory=dict)
    gallery: Sequence[str] = ()


class Visitor:
    """Opens the page and stays until `leave`, as a browser's tab does.

    Args:
        url: of the page, ending in a slash.

    Raises:
        OSError: nobody listens there.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = secrets.token_hex(8)
        with self._get("config") as answer:
            config = json.load(answer)
        self.components = {part["id"]: part["props"] for part in config["components"]}
        self.events = {event["api_name"]: event for event in config["dependencies"]}
        # Held open: the server closes the visit when this connection ends.
        self.heartbeat = self._get(f"gradio_api/heartbeat/{self.session}")
        self.heartbeat.readline()
        self._call("open_visit", [])

    def ask(self, **fields: Any) -> str:
        """Fills the page's fields and presses Generate.

        Args:
            fields: by the ids that they have on the page, `-` written as `_`; others stay as the page sets them.

        Returns:
            The line under the buttons, without its markup.

        Raises:
            ValueError: the page has no such field.
        """
        inputs = [self.components[number] for number in self.events["admit"]["inputs"]]
        names = [(props.get("elem_id") or "").replace("-", "_") for props in inputs]
        if unknown := fields.keys() - set(names):
            raise ValueError(f"fields: {sorted(unknown)}; valid: {', '.join(filter(None, names))}")
        data = [fields.get(name, props.get("value")) for name, props in zip(names, inputs, strict=True)]
        return plain(self._call("admit", data)[0])

    def wait(self) -> Shown:
        """Waits for the run that was asked for, and for nothing where none was.

        Raises:
            RuntimeError: the server says that it failed.
        """
        outputs = [self.components[number].get("elem_id") for number in self.events["run"]["outputs"]]
        ended: Mapping[str, Any] = {}
        for message in self.begin():
            if message["msg"] == "process_completed":
                ended = message
        if not ended.get("success"):
            raise RuntimeError(f"the run failed: {ended.get('output')}")
        values = dict(zip(outputs, ended["output"]["data"], strict=True))
        files = values["files"] if isinstance(values["files"], list) else []
        gallery = values["gallery"] if isinstance(values["gallery"], list) else []
        return Shown(
            plain(values["status"]) if isinstance(values["status"], str) else "",
            {file["orig_name"]: file["url"] for file in files},
            [picture["caption"] for picture in gallery],
        )

    def take(self, address: str) -> bytes:
        """The content of a file that the page offers."""
        with _OPEN(address, timeout=PATIENCE) as answer:
            content: bytes = answer.read()
        return content

    def leave(self) -> None:
        """Closes the page."""
        self.heartbeat.close()

    def begin(self) -> Generator[dict[str, Any]]:
        """Begins the run that was asked for; what the server says of it, as it says it."""
        self._post("gradio_api/queue/join", self._body("run", [None]))
        with self._get(f"gradio_api/queue/data?session_hash={self.session}") as stream:
            for line in stream:
                if line.startswith(b"data:"):
                    yield json.loads(line.removeprefix(b"data:"))

    def _call(self, event: str, data: Sequence[Any]) -> list[Any]:
        """What an event that does not wait in the queue returns."""
        values: list[Any] = self._post("gradio_api/run/predict", self._body(event, data))["data"]
        return values

    def _body(self, event: str, data: Sequence[Any]) -> dict[str, Any]:
        return {"data": data, "fn_index": self.events[event]["id"], "session_hash": self.session}

    def _get(self, path: str) -> Any:
        return _OPEN(self.url + path, timeout=PATIENCE)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _OPEN(request, timeout=PATIENCE) as answer:
            values: dict[str, Any] = json.load(answer)
        return values


def plain(html: str) -> str:
    """The text of a line of HTML."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())
