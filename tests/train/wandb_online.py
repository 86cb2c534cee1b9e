"""A W&B server on this machine that knows what a run that logs, resumes, is tagged and ends asks of one."""

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Json = dict[str, Any]


class Server(http.server.ThreadingHTTPServer):
    """`runs`: {id: {history, summary, config, tags, exit}}, whatever their project; `starts`: ids as they came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, Json] = {}
        self.starts: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def run_of(self, name: str) -> Json:
        empty = {"history": [], "summary": {}, "config": {}, "tags": [], "exit": None}
        return self.runs.setdefault(name, empty)

    def handle_error(self, *_: Any) -> None: ...


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._send({})

    def do_PUT(self) -> None:
        self._body()
        self._send({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            self._send({"data": self._answer(asked.get("query", ""), asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self._stream(self.server.run_of(self.path.split("/")[-2]), json.loads(body or b"{}"))
            self._send({"limits": {}})
        else:
            self._send({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _stream(self, run: Json, sent: Json) -> None:
        files = sent.get("files") or {}
        for name, chunk in files.items():
            if "history" in name:
                del run["history"][chunk["offset"] :]
                run["history"] += [json.loads(line) for line in chunk["content"]]
            elif "summary" in name:
                run["summary"] = json.loads(chunk["content"][-1])
        if "exitcode" in sent:
            run["exit"] = sent["exitcode"]

    def _answer(self, query: str, v: Json) -> Json:
        name = v.get("name")
        if "upsertBucket" in query:
            self.server.starts.append(str(name)) if name and v.get("project") else None
            run = self.server.run_of(str(name))
            run["config"] = json.loads(v["config"]) if v.get("config") else run["config"]
            run["tags"] = v["tags"] if v.get("tags") else run["tags"]
            return {"upsertBucket": {"inserted": not run["history"], "bucket": self._bucket(str(name), run)}}
        if "historyTail" in query:  # what a run that may be resumed asks
            bucket = self._bucket(name, self.server.runs[name]) if name in self.server.runs else None
            return {"model": {"id": "P", "name": "lowprec", "entity": {"id": "E", "name": "me"}, "bucket": bucket}}
        if "viewer" in query:
            return {"viewer": {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []},
                               "email": "", "admin": False}}  # fmt: skip
        if "run(" in query and name in self.server.runs:
            return {"project": {"run": self._bucket(name, self.server.runs[name])}}
        if "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.server.url}/up"} for file in v.get("files", [])]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self, name: str, run: Json) -> Json:
        history, project = run["history"], {"id": "P", "name": "lowprec", "entity": {"id": "E", "name": "me"}}
        config = json.dumps(run["config"])
        return {
            "id": name, "name": name, "displayName": name, "project": project, "projectId": "1", "tags": run["tags"],
            "state": "running", "config": config, "sweepName": None, "summaryMetrics": json.dumps(run["summary"]),
            "systemMetrics": "{}", "historyKeys": None, "user": {"name": "me", "username": "me"},
            "historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": '["{}"]',
            "historyTail": json.dumps([json.dumps(history[-1] if history else {})]), "wandbConfig": '{"t": 1}',
            "description": None, "notes": None, "group": None, "jobType": None, "heartbeatAt": None,
        }  # fmt: skip

    def _send(self, answer: Json, status: int = 200) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
