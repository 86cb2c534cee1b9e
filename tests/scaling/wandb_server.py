"""A W&B server on this machine that knows enough GraphQL for `wandb.Api().runs` and `Run.history`."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Json = dict[str, Any]


class Server(http.server.ThreadingHTTPServer):
    """`projects`: {"entity/project": records {name, id, state, config, summary, history}}. `failures`: HTTP statuses
    that the next requests for runs get instead of an answer, 0 = an answer. `asked`: (operation, variables) so far."""

    daemon_threads = True

    def __init__(self, projects: dict[str, list[Json]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.projects = projects
        self.failures: list[int] = []
        self.locked = False  # whether every key is refused
        self.asked: list[tuple[str, Json]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path != "/graphql":  # the client's own statistics
            return self._send({})
        body = json.loads(text)
        query, variables = body.get("query", ""), body.get("variables") or {}
        what = next((name for name in ("sampledHistory", "runs(", "run(", "viewer") if name in query), "")
        self.server.asked.append((what, variables))
        if what == "viewer" and self.server.locked:
            self._send({"errors": [{"message": "invalid key"}]}, 401)
        elif what != "viewer" and (status := self.server.failures.pop(0) if self.server.failures else 0):
            self._send({"errors": [{"message": "not now" if status in (429, 500) else "no"}]}, status)
        else:
            self._send({"data": self._answer(what, variables)})

    def _answer(self, what: str, v: Json) -> Json:
        if what == "viewer":
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []},
                               "email": "", "admin": False}}  # fmt: skip
        records = self.server.projects.get(f"{v.get('entity')}/{v.get('project')}")
        if what == "runs(" and records is not None:
            wanted = json.loads(v.get("filters") or "{}")
            records = [r for r in records if all(node(r).get(key) == value for key, value in wanted.items())]
            start, size = int(v.get("cursor") or 0), v["perPage"]
            edges = [
                {"node": node(r), "cursor": str(start + i + 1)} for i, r in enumerate(records[start : start + size])
            ]
            more = {"endCursor": str(start + len(edges)), "hasNextPage": start + size < len(records)}
            project = {"internalId": "1", "runCount": len(records), "readOnly": False}
            return {"project": project | {"runs": {"edges": edges, "pageInfo": more}}}
        found = next((r for r in records or [] if r["id"] == v.get("name")), None)
        if what == "run(" and found:
            return {"project": {"run": node(found)}}
        if what == "sampledHistory" and found:
            keys = json.loads(v["specs"][0])["keys"]
            lines = [line | {"_step": i} for i, line in enumerate(found["history"])]
            lines = [{key: line[key] for key in keys} for line in lines if all(key in line for key in keys)]
            return {"project": {"run": {"sampledHistory": [lines]}}}
        return {"project": None}

    def _send(self, answer: Json, status: int = 200) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def node(record: Json) -> Json:
    """A run as GraphQL has it."""
    config = {key: {"value": value} for key, value in record["config"].items()}
    return {"id": record["id"], "projectId": "1", "name": record["id"], "displayName": record["name"], "tags": [],
            "state": record["state"], "config": json.dumps(config), "summaryMetrics": json.dumps(record["summary"]),
            "systemMetrics": "{}", "historyKeys": None, "user": {"name": "me", "username": "me"}}  # fmt: skip


@contextmanager
def serve(projects: dict[str, list[Json]]) -> Iterator[Server]:
    server = Server(projects)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
