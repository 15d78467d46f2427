"""Getting the weights through proxies and from servers that answer strangely: right files, or a sentence and
nothing half done.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import urllib.request
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hub import VAE, Hub, needed, released, there

from lance_core.hub import download, http, job, watch
from lance_core.hub.download import DownloadError
from lance_core.hub.proxy import Proxies
from lance_core.hub.record import RECORD

MODEL = "Lance_3B/model.safetensors"
PROXY_NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No token, cache, endpoint or proxy of this machine, and short waits."""
    names = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
    for name in (*names, *PROXY_NAMES, *map(str.lower, PROXY_NAMES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("LANCE_REVISION", "main")
    for name, value in {"BACKOFF": 0.0, "MARGIN": 0, "RETRIES": 1}.items():
        monkeypatch.setattr(job, name, value)
    monkeypatch.setattr(http, "STALL", 5.0)
    monkeypatch.setattr(watch, "POLL", 0.02)


@pytest.fixture
def hub():
    with Hub(released(30_000)) as hub:
        yield hub


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "models" / "lance"


def refused(root: Path, endpoint: str, words: str, reason: str | None = None) -> None:
    before = there(root) if root.exists() else {}
    with pytest.raises(DownloadError, match=words) as caught:
        download.download("Lance_3B", root, endpoint=endpoint)
    assert reason in (None, caught.value.reason), caught.value.reason
    assert len(str(caught.value)) < 500 + len(str(root))
    assert (there(root) if root.exists() else {}) == before


# -- complete means complete ---------------------------------------------------------------------------------


def test_a_revision_without_the_second_model_is_said(hub, root):
    download.download("Lance_3B", root, endpoint=hub.url)
    for path in [p for p in hub.files if p.startswith("Lance_3B_Video/")]:
        del hub.files[path]
    record = json.loads((root / RECORD).read_text())
    record["listing"] = {p: e for p, e in record["listing"].items() if p in hub.files}
    (root / RECORD).write_text(json.dumps(record))
    with pytest.raises(DownloadError, match="has no Lance_3B_Video/model.safetensors") as caught:
        download.download("Lance_3B_Video", root, endpoint=hub.url)
    assert caught.value.reason == "absent" and download.missing(root) == ["Lance_3B_Video"]
    assert not download.download("Lance_3B", root, endpoint=hub.url)["fetched"]


@pytest.mark.parametrize("listing", [{}, None])
def test_a_record_with_no_listing_is_completed(hub, root, listing):
    download.download("Lance_3B", root, endpoint=hub.url)
    record = json.loads((root / RECORD).read_text())
    (root / RECORD).write_text(json.dumps(record | {"listing": listing}))
    (root / MODEL).unlink()
    assert download.download("Lance_3B", root, endpoint=hub.url)["fetched"] == [MODEL]


@pytest.mark.parametrize("change", [
    {"commit": []}, {"commit": "../.."}, {"revision": 7}, {"verified": {MODEL: [1e999, 1, "a"]}},
    {"verified": {MODEL: [1, [], "a" * 40]}}, {"listing": {MODEL: [1e999, "a" * 64]}}, {"verified": []},
    {"listing": {MODEL: [5, "/" * 64]}}, {"listing": {MODEL: [True, "a" * 64]}}, {"listing": [1]},
], ids=str)  # fmt: skip
def test_a_record_of_strange_values_only_costs_a_check(hub, root, change):
    download.download("Lance_3B", root, endpoint=hub.url)
    record = json.loads((root / RECORD).read_text())
    (root / RECORD).write_text(json.dumps(record | change))
    assert download.missing(root) == ["Lance_3B_Video"]
    assert not download.download("Lance_3B", root, endpoint=hub.url)["fetched"]


# -- what a hub may not say ----------------------------------------------------------------------------------

LFS = {"lfs": {"sha256": "/" * 64, "size": 1}}
LISTINGS = {
    "a list": lambda told: [],
    "a number": lambda told: 7,
    "nothing": lambda told: {},
    "a commit that is a list": lambda told: told | {"sha": ["a" * 40]},
    "a commit that is a path": lambda told: told | {"sha": "../../x"},
    "no files": lambda told: told | {"siblings": None},
    "files of words": lambda told: told | {"siblings": ["model.safetensors"]},
    "an infinite size": lambda told: of_model(told, size=float("inf")),
    "a size that is none": lambda told: of_model(told, size=float("nan")),
    "a negative size": lambda told: of_model(told, size=-1),
    "an enormous size": lambda told: of_model(told, size=10**40),
    "a size in words": lambda told: of_model(told, size="5"),
    "a hash with a slash": lambda told: of_model(told, **LFS),
    "a hash with NUL": lambda told: of_model(told, lfs={"sha256": "\0" * 64}),
    "a hash too short": lambda told: of_model(told, lfs={"sha256": "ab"}),
    "a hash that is a list": lambda told: of_model(told, lfs={"sha256": ["a" * 64]}),
    "lfs that is a number": lambda told: of_model(told, lfs=3),
    "no hash": lambda told: of_model(told, lfs=None, blobId=None),
}


def of_model(told: dict, **changes) -> dict:
    files = [one | (changes if one["rfilename"] == MODEL else {}) for one in told["siblings"]]
    return told | {"siblings": files}


@pytest.mark.parametrize("change", LISTINGS.values(), ids=list(LISTINGS))
def test_a_malformed_listing_is_a_sentence(hub, root, monkeypatch, change):
    told = change(hub.listing())
    monkeypatch.setattr(hub, "listing", lambda: told)
    refused(root, hub.url, "does not answer as a hub does", "mismatch")


def test_a_listing_that_is_no_json_or_without_end(hub, root, monkeypatch):
    monkeypatch.setattr(http, "MAX_JSON", 2000)
    refused(root, hub.url, "where a listing was expected", "mismatch")
    monkeypatch.setattr(json, "dumps", lambda _: "<html>log in</html>")
    refused(root, hub.url, "no JSON where a listing was expected", "mismatch")


@pytest.mark.parametrize("endpoint", [
    "huggingface.co", "ftp://huggingface.co", "http://", "http://[::1", "http://a:99999", "file:///etc",
    "x" * 900,
])  # fmt: skip
def test_an_endpoint_that_is_no_address(root, endpoint):
    refused(root, endpoint, "is no https address", "network")


def test_a_token_of_other_characters_is_not_sent_and_not_shown(hub, root, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    with pytest.raises(DownloadError, match="HF_TOKEN is no token") as caught:
        download.download("Lance_3B", root, endpoint=hub.url)
    assert "cret" not in str(caught.value) and not hub.requests


# -- redirects -----------------------------------------------------------------------------------------------


@pytest.fixture
def redirecting(hub, monkeypatch):
    """redirecting(target): the hub's large files are said to be at that address."""

    def set_target(target: str) -> None:
        plain = hub._server.RequestHandlerClass._plain

        def changed(self, status, body, headers=None):
            if headers and "Location" in headers:
                headers = {"Location": target.format(port=hub.port, path=VAE)}
            plain(self, status, body, headers)

        monkeypatch.setattr(hub._server.RequestHandlerClass, "_plain", changed)

    return set_target


@pytest.mark.parametrize("target", [
    "ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::1", "javascript:1", "data:,x", "gopher://x", "http://",
    "http://a b/x", "http://127.0.0.1:99999/x",
])  # fmt: skip
def test_strange_redirects_are_not_followed(hub, root, redirecting, target):
    redirecting(target)
    with pytest.raises(DownloadError, match="By hand") as caught:
        download.download("Lance_3B", root, endpoint=hub.url)
    assert caught.value.reason in ("refused", "network")
    assert VAE not in there(root) and len(str(caught.value)) < 500 + len(str(root))


def test_from_https_a_redirect_leads_to_https_only():
    redirects = http._Redirects()
    asked = urllib.request.Request("https://hub.example/a", headers={"Authorization": "Bearer x"})
    for target in ("http://hub.example/b", "http://storage.example/b"):
        with pytest.raises(http.BadRedirect, match="not https"):
            redirects.redirect_request(asked, None, 302, "", HTTPMessage(), target)
    for target, kept in (("https://hub.example/b", True), ("https://storage.example/b", False)):
        new = redirects.redirect_request(asked, None, 302, "", HTTPMessage(), target)
        assert new.full_url == target and ("Authorization" in new.headers) == kept


def test_a_loop_of_redirects_ends(hub, root, redirecting):
    redirecting("http://localhost:{port}/bytedance-research/Lance/resolve/main/{path}")
    refused_words = "By hand"
    with pytest.raises(DownloadError, match=refused_words):
        download.download("Lance_3B", root, endpoint=hub.url)


# -- proxies -------------------------------------------------------------------------------------------------


class HttpProxy:
    """Passes whole addresses on, and notes them."""

    def __enter__(self):
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.asked.append(self.path)
                # Not urllib, which would ask the proxy again.
                host, _, path = self.path.removeprefix("http://").partition("/")
                connection = HTTPConnection(host)
                kept = {k: v for k, v in self.headers.items() if k.lower() in ("range", "authorization")}
                connection.request("GET", f"/{path}", headers=kept)
                answer = connection.getresponse()
                body = answer.read()
                self.send_response(answer.status)
                for key in ("Location", "Content-Range"):
                    if answer.headers.get(key):
                        self.send_header(key, answer.headers[key])
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class SocksProxy:
    """A SOCKS5 proxy (RFC 1928, 1929) that connects everything to one port, and notes what was asked for."""

    def __init__(self, port: int, login: tuple[str, str] | None = None, reply: int = 0) -> None:
        self.port, self.login, self.reply = port, login, reply
        self.asked: list[tuple[str, int]] = []

    def __enter__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.close()

    def accept(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        file = client.makefile("rb")
        version, count = file.read(2)
        methods = file.read(count)
        assert version == 5
        client.sendall(bytes([5, 2 if self.login else 0]))
        if self.login:
            if 2 not in methods:
                return client.close()
            file.read(1)
            given = tuple(file.read(file.read(1)[0]).decode() for _ in range(2))
            client.sendall(bytes([1, given != self.login]))
        version, command, _, kind = file.read(4)
        assert (version, command, kind) == (5, 1, 3)
        name = file.read(file.read(1)[0]).decode()
        self.asked.append((name, int.from_bytes(file.read(2), "big")))
        client.sendall(bytes([5, self.reply, 0, 1, 0, 0, 0, 0, 0, 0]))
        if self.reply:
            return client.close()
        server = socket.create_connection(("127.0.0.1", self.port))

        def pump(a, b):
            try:
                while data := a.recv(65536):
                    b.sendall(data)
                b.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        threading.Thread(target=pump, args=(client, server), daemon=True).start()
        pump(server, client)
        return None


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_listing_and_files_go_through_the_proxy(hub, root, monkeypatch, name, scheme):
    with HttpProxy() as proxy:
        monkeypatch.setenv(name, scheme + proxy.address)
        download.download("Lance_3B", root, endpoint=hub.url)
    assert len(there(root)) == len(needed(hub))
    assert len(proxy.asked) == len(hub.api_requests) + len(hub.requests) + 3  # three are sent on to storage
    assert any("/api/models/" in url for url in proxy.asked) and any("/storage/" in u for u in proxy.asked)


def test_no_proxy_holds_for_listing_and_files(hub, root, monkeypatch):
    with HttpProxy() as proxy:
        monkeypatch.setenv("ALL_PROXY", f"http://{proxy.address}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        download.download("Lance_3B", root, endpoint=hub.url)
    assert not proxy.asked


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks"])
def test_socks_takes_listing_and_files_and_looks_names_up(hub, root, monkeypatch, scheme):
    with SocksProxy(hub.port) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://{proxy.address}")
        download.download("Lance_3B", root, endpoint="http://hub.invalid:80")
    assert len(there(root)) == len(needed(hub))
    assert {name for name, _ in proxy.asked} == {"hub.invalid", "localhost"}  # the hub's storage is there


@pytest.mark.parametrize("given, right", [("user:p%40ss@", True), ("user:wrong@", False), ("", False)])
def test_socks_logs_in(hub, root, monkeypatch, given, right):
    with SocksProxy(hub.port, ("user", "p@ss")) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5://{given}{proxy.address}")
        if right:
            download.download("Lance_3B", root, endpoint=hub.url)
        else:
            refused(root, hub.url, "cannot be reached.*SOCKS", "network")


@pytest.mark.parametrize("reply, words", [(5, "connection was refused"), (99, "error 99")])
def test_socks_refusals_are_told(hub, root, monkeypatch, reply, words):
    with SocksProxy(hub.port, reply=reply) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5://{proxy.address}")
        refused(root, hub.url, words, "network")


@pytest.mark.parametrize(
    "address", ["socks4://127.0.0.1:1", "vmess://127.0.0.1:1", "http://", "socks5://a:99999"]
)
def test_a_proxy_of_another_kind_is_said_before_anything_is_asked(hub, root, monkeypatch, address):
    monkeypatch.setenv("ALL_PROXY", address)
    refused(root, hub.url, "No download is possible", "network")
    assert not hub.api_requests


def test_a_proxy_that_is_not_there_is_said(hub, root, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    refused(root, hub.url, "cannot be reached", "network")
    assert not hub.api_requests and not hub.requests


def test_the_particular_proxy_goes_before_all_proxy(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://a:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://b:2")
    assert Proxies.from_environment() == Proxies(http="socks5://a:1", https="http://b:2")


# -- strange things in the folder ----------------------------------------------------------------------------


def part_of(hub: Hub, root: Path, path: str = MODEL) -> Path:
    from hub import digest

    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f"{target.name}.{digest(path, hub.files[path])[:12]}.part")


@pytest.mark.skipif(os.name == "nt", reason="symlinks and FIFOs")
@pytest.mark.timeout(60)
def test_a_symlink_in_the_place_of_a_part_is_not_written_through(hub, root, tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    part_of(hub, root).symlink_to(mine)
    part_of(hub, root, VAE).symlink_to(tmp_path / "nowhere")
    os.mkfifo(part_of(hub, root, "Lance_3B/vocab.json"))
    download.download("Lance_3B", root, endpoint=hub.url)
    assert there(root) == {p: hub.files[p] for p in needed(hub)}
    assert mine.read_bytes() == b"mine" and not (tmp_path / "nowhere").exists()
    assert not (root / MODEL).is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="symlinks and FIFOs")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "symlink"])
@pytest.mark.parametrize("name", [RECORD, download.LOCK, MODEL])
def test_what_is_no_regular_file_in_the_folder_neither_blocks_nor_is_written_to(
    hub, root, tmp_path, kind, name
):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "mine").write_bytes(b"mine")
    os.mkfifo(root / name) if kind == "fifo" else (root / name).symlink_to(tmp_path / "mine")
    download.missing(root)
    if name == download.LOCK or (name == RECORD and kind == "fifo"):
        refused(root, hub.url, "which is not written to|expected a file or nothing", "disk")
    else:
        download.download("Lance_3B", root, endpoint=hub.url)
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_a_cut_file_of_the_hubs_cache_is_not_appended_to(hub, root, tmp_path):
    blob = tmp_path / "blob"
    blob.write_bytes(hub.files[MODEL][:100])
    os.link(blob, part_of(hub, root))
    download.download("Lance_3B", root, endpoint=hub.url)
    assert blob.read_bytes() == hub.files[MODEL][:100]
    assert (root / MODEL).read_bytes() == hub.files[MODEL]


def test_a_mirror_under_a_path_works(hub, root, monkeypatch):
    asked = []
    do_get = hub._server.RequestHandlerClass.do_GET

    def below(self):
        asked.append(self.path)
        self.path = self.path.removeprefix("/mirror")
        do_get(self)

    monkeypatch.setattr(hub._server.RequestHandlerClass, "do_GET", below)
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/mirror/")
    download.download("Lance_3B", root)
    assert len(there(root)) == len(needed(hub)) and any(p.startswith("/mirror/api/") for p in asked)
