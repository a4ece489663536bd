"""The part of the Hugging Face hub's interface that loading a model needs, for folders on this machine.

python hub.py PORT OWNER/NAME=FOLDER ...
"""

import hashlib
import json
import re
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

FOLDERS = {repo: Path(folder) for repo, folder in (argument.split("=", 1) for argument in sys.argv[2:])}


def parameters(folder: Path) -> dict[str, int]:
    """How many numbers of each type the weights are, from the headers of their files."""
    counts: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for side in entry["shape"]:
                    size *= side
                counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + size
    return counts


class Handler(BaseHTTPRequestHandler):
    """Describes repositories and serves their files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for repo, folder in FOLDERS.items():
            commit = hashlib.sha1(repo.encode()).hexdigest()
            name = re.escape(repo)
            if re.fullmatch(rf"/api/models/{name}(/revision/[^/]+)?", path):
                return self.describe(repo, folder, commit)
            if path.startswith(f"/api/models/{repo}/"):
                return self.missing("EntryNotFound")
            match = re.fullmatch(rf"/{name}/resolve/[^/]+/(.+)", path)
            if match:
                file = folder / match[1]
                return self.send(file, commit) if file.is_file() else self.missing("EntryNotFound")
        return self.missing("RepoNotFound")

    do_HEAD = do_GET

    def describe(self, repo: str, folder: Path, commit: str) -> None:
        counts = parameters(folder)
        self.reply(
            200,
            {
                "_id": commit[:24],
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "pipeline_tag": "text-generation",
                "library_name": "transformers",
                "tags": ["transformers", "safetensors", "text-generation"],
                "downloads": 0,
                "likes": 0,
                "createdAt": "2026-01-01T00:00:00.000Z",
                "lastModified": "2026-01-01T00:00:00.000Z",
                "safetensors": {"parameters": counts, "total": sum(counts.values())},
                "siblings": [{"rfilename": file.name} for file in sorted(folder.iterdir())],
            },
        )

    def send(self, file: Path, commit: str) -> None:
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        size = file.stat().st_size
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(f"{file}{file.stat().st_mtime_ns}".encode()).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(size - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            with file.open("rb") as source:
                source.seek(start)
                while piece := source.read(1 << 20):
                    self.wfile.write(piece)

    def missing(self, code: str) -> None:
        self.reply(404, {"error": "not found"}, code)

    def reply(self, status: int, data: dict, code: str = "") -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
