"""A Weights & Biases server on 127.0.0.1 for tests: what the real client asks for an online run, a sweep and a view.

The client is wandb's own, unchanged, told of this server by WANDB_BASE_URL. It speaks GraphQL for everything about a
run, and posts history, summary and system metrics as lines of files to ``/files/ENTITY/PROJECT/RUN/file_stream``;
files go by PUT to addresses it was given. All requests are kept, so that a test can look at what left the process.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "tester"
KEY = "0123456789abcdef0123456789abcdef01234567"
"""Of the right shape; this server takes any."""


def numbers(rows: Iterable[Mapping[str, Any]], *, step: str) -> set[tuple[int, str, float]]:
    """(step, metric, value) of rows of metrics: lmlab's own (``step``) or W&B's history (``trainer/step``)."""
    return {
        (row[step], name, value)
        for row in rows
        for name, value in row.items()
        if "/" in name and "." not in name and name != step and isinstance(value, int | float)
    }


@dataclass(frozen=True)
class Request:
    """One request as it came; ``headers`` without Authorization, which carries the key."""

    method: str
    path: str
    headers: str
    body: bytes


@dataclass
class Run:
    """What the client told about one run.

    Attributes:
        about: the variables of its UpsertBucket calls, later ones over earlier ones.
        files: lines by file name and place, as streamed.
        exit_code: None until the client said that the run is complete.
    """

    about: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[int, str]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The run's config, without wandb's own part."""
        told = json.loads(self.about["config"])
        return {name: entry["value"] for name, entry in told.items() if name != "_wandb"}

    @property
    def numbers(self) -> set[tuple[int, str, float]]:
        """(step, metric, value) of everything in the history that metrics.jsonl has too."""
        return numbers(self.history, step="trainer/step")

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of history in order."""
        lines = self.files.get("wandb-history.jsonl", {})
        return [json.loads(lines[place]) for place in sorted(lines)]

    @property
    def summary(self) -> dict[str, Any]:
        """The summary as last sent."""
        lines = self.files.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}


class WandbServer:
    """Serves from a thread of its own until closed; a context manager.

    Args:
        status: answer everything with this, 401 for instance.
        after: let that many posts to a file stream pass, and then ...
        then: ... answer everything with this; None: the network goes away.
        delay: seconds before each answer.
    """

    def __init__(
        self, *, status: int = 200, after: int | None = None, then: int | None = None, delay: float = 0.0
    ) -> None:
        self.status, self.after, self.then, self.delay = status, after, then, delay
        self.requests: list[Request] = []
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, bytes] = {}
        self.views: list[dict[str, Any]] = []
        self.sweeps: dict[str, str] = {}
        self.unknown: set[str] = set()
        self.lost = False
        self._orders: list[tuple[str, Mapping[str, Any]]] = []
        self._posts = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop; connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, **more: str) -> dict[str, Any]:
        """What makes a child process take this server for W&B."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", **more}

    def mend(self, *, seconds: float) -> None:
        """Wait until it answers with an error, and that long; then it is as new."""
        while self.status == 200:
            time.sleep(0.1)
        time.sleep(seconds)
        with self._lock:
            self.status, self.after = 200, None

    def offer(self, runs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Runs for an agent to start, one after another: (run id, values by parameter)."""
        self._orders.extend(runs)

    # --- answers ------------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> tuple[int, Any] | None:
        """(status, JSON) for a request; None: the connection breaks."""
        time.sleep(self.delay)
        with self._lock:
            if self.lost:
                return None
            self.requests.append(request)
            streamed = request.path.endswith("/file_stream")
            if streamed and self._posts == self.after and self.then is None:
                self.lost = True
                threading.Thread(target=self.close, daemon=True).start()
                return None
            if streamed and self._posts == self.after:
                self.status = self.then or 200
            if self.status != 200:
                return self.status, {"errors": [{"message": "refused"}]}
            if streamed:
                return 200, self._file_stream(request)
            if request.path == "/graphql":
                return 200, self._graphql(json.loads(request.body))
            if request.method == "PUT":
                _, _, run, name = request.path.split("/", 3)
                (self.runs[run].uploads if run in self.runs else self.artifacts)[name] = request.body
            return 200, {}

    def _file_stream(self, request: Request) -> dict[str, Any]:
        self._posts += 1
        run = self.runs[request.path.split("/")[4]]
        told = json.loads(request.body)
        for name, part in told.get("files", {}).items():
            lines = run.files.setdefault(name, {})
            lines.update(enumerate(part["content"], start=part["offset"]))
        if told.get("complete"):
            run.exit_code = told["exitcode"]
        return {}

    def _graphql(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        name = found[1] if found else ""
        method: Callable[[Mapping[str, Any]], Any] | None = getattr(self, f"_on_{name}", None)
        if method is None:
            self.unknown.add(name)
            return {"data": {}}
        return {"data": method(asked.get("variables") or {})}

    def _on_Viewer(self, _: Mapping[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "", "flags": "{}"}
        return {"viewer": {**viewer, "admin": False, "apiKeys": {"edges": []}, "teams": {"edges": []}}}

    def _on_GetDefaultEntity(self, told: Mapping[str, Any]) -> dict[str, Any]:
        return self._on_Viewer(told)

    def _on_ServerFeaturesQuery(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_RunResumeStatus(self, told: Mapping[str, Any]) -> dict[str, Any]:
        run = self.runs.get(told["name"])
        bucket = None
        if run is not None:
            history, events = (run.files.get(f"wandb-{name}.jsonl", {}) for name in ("history", "events"))
            bucket = {
                "id": _id(told["name"]),
                "name": told["name"],
                "displayName": run.about.get("displayName"),
                "summaryMetrics": json.dumps(run.summary),
                "config": run.about.get("config"),
                "tags": run.about.get("tags") or [],
                "logLineCount": 0,
                "historyLineCount": len(history),
                "eventsLineCount": len(events),
                "historyTail": json.dumps([history[max(history)]] if history else []),
                "eventsTail": json.dumps([events[max(events)]] if events else []),
                "runInfo": {"args": []} if history else None,
            }
        return {"model": {**_project(told), "bucket": bucket}}

    def _on_UpsertBucket(self, told: Mapping[str, Any]) -> dict[str, Any]:
        run = self.runs.get(told["name"])
        inserted = run is None
        run = run or self.runs.setdefault(told["name"], Run())
        run.about.update({name: value for name, value in told.items() if value is not None})
        bucket = {
            "id": _id(told["name"]),
            "name": told["name"],
            "displayName": run.about.get("displayName"),
            "description": None,
            "sweepName": run.about.get("sweep"),
            "project": _project(told),
            "historyLineCount": len(run.files.get("wandb-history.jsonl", {})),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_CreateRunFiles(self, told: Mapping[str, Any]) -> dict[str, Any]:
        files = [{"name": n, "uploadUrl": f"{self.url}/storage/{told['run']}/{n}"} for n in told["files"]]
        return {"createRunFiles": {"runID": _id(told["run"]), "uploadHeaders": [], "files": files}}

    def _on_RunStoppedStatus(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def _on_OrganizationCoreWeaveOrganizationID(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    # --- artifacts: a logged table is one -----------------------------------------------------------------------

    def _on_ArtifactType(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}  # none of that name yet

    def _on_CreateArtifact(self, _: Mapping[str, Any]) -> dict[str, Any]:
        artifact = {"id": "artifact", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _on_CreateArtifactManifest(self, _: Mapping[str, Any]) -> dict[str, Any]:
        file = {"id": "file", "uploadUrl": f"{self.url}/storage/artifact/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}

    def _on_UpdateArtifactManifest(self, told: Mapping[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": self._on_CreateArtifactManifest(told)["createArtifactManifest"]}

    def _on_CreateArtifactFiles(self, told: Mapping[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": f"artifact/{spec['name']}",
                "uploadUrl": f"{self.url}/storage/artifact/{spec['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": "artifact"},
            }
            for spec in told["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _on_CommitArtifact(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": "artifact", "digest": ""}}}

    # --- sweeps and views ---------------------------------------------------------------------------------------

    def _on_UpsertSweep(self, told: Mapping[str, Any]) -> dict[str, Any]:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = told["config"]
        sweep = {"name": name, "project": _project({"project": told.get("projectName")})}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _on_SweepWithRuns(self, told: Mapping[str, Any]) -> dict[str, Any]:
        name = told["sweep"]
        about = {"id": _id(name), "name": name, "state": "RUNNING", "config": self.sweeps[name]}
        return {"project": {"sweep": {**about, "method": "bayes", "runs": {"edges": []}}}}

    def _on_CreateAgent(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _on_Heartbeat(self, told: Mapping[str, Any]) -> dict[str, Any]:
        commands = []
        if self._orders and not json.loads(told["runState"]):
            run_id, values = self._orders.pop(0)
            args = {name: {"value": value} for name, value in values.items()}
            commands = [{"type": "run", "run_id": run_id, "args": args, "program": "train.py"}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    def _on_UpsertView2(self, told: Mapping[str, Any]) -> dict[str, Any]:
        self.views.append(dict(told))
        return {"upsertView": {"view": {"id": "view", "name": told["name"]}, "inserted": True}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of what is tested."""


def _id(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def _project(told: Mapping[str, Any]) -> dict[str, Any]:
    entity = {"id": _id(ENTITY), "name": told.get("entity") or ENTITY}
    return {"id": "project", "name": told.get("project") or "uncategorized", "entity": entity}


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            headers = "\n".join(
                f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "authorization"
            )
            answer = server.answer(Request(self.command, self.path, headers, body))
            if answer is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, content = answer
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, format: str, *args: Any) -> None:
            """Not to the test's output."""

    return Handler
