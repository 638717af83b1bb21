"""The download command, against a small server that stands in for the hub."""

import hashlib
import os
import resource
import shlex
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import sample
from common.cli import run
from weights import download
from weights.download import FILES

SD15 = FILES["sd15"]
CHUNK = constants.DOWNLOAD_CHUNK_SIZE  # what arrives is written in pieces of this size
CONTENT = hashlib.shake_256(b"weights").digest(CHUNK + 2_000_000)
PROXIES = [name + "_proxy" for name in ("http", "https", "all")]


class Hub:
    """Serves CONTENT under every address, notes the requests, and misbehaves by its attributes."""

    def __init__(self):
        self.requests = []  # (method, path, Range, Authorization)
        self.status = 200  # of every answer
        self.cut = None  # bytes after which a connection ends; from then on the hub answers 503
        self.etag = hashlib.sha256(CONTENT).hexdigest()
        self.size = len(CONTENT)
        self.commit = "0" * 40
        self.elsewhere = None  # where the file really is, as the hub does it with large files
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def gets(self) -> list:
        return [request for request in self.requests if request[0] == "GET"]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, start = self.hub, int((self.headers["Range"] or "bytes=0-")[len("bytes="):-1])
        hub.requests.append(
            (self.command, self.path, self.headers["Range"], self.headers["Authorization"]))
        status = hub.status
        if status == 200:
            status = 302 if hub.elsewhere else 206 if start else 200
        self.send_response(status)
        self.send_header("Content-Length", str(hub.size - start if status in (200, 206) else 0))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{hub.size - 1}/{hub.size}")
        if status == 302:
            self.send_header("Location", hub.elsewhere + "/signed")
            self.send_header("X-Linked-Size", str(hub.size))
            self.send_header("X-Linked-Etag", f'"{hub.etag}"')
        self.send_header("ETag", f'"{hub.etag}"')
        if hub.commit:
            self.send_header("X-Repo-Commit", hub.commit)
        self.end_headers()
        if self.command == "GET" and status in (200, 206):
            self.wfile.write(CONTENT[start:hub.cut])
            if hub.cut:
                hub.status = 503

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", *PROXIES,
                 *map(str.upper, PROXIES)]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # no requests but the file's
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    close_session()  # the library's connections, which know the proxies of another test
    yield hub
    close_session()
    hub.close()


@pytest.fixture
def fetch(hub, tmp_path, capfd):
    """Run the command into `tmp_path / "weights"`; returns exit code, stdout and stderr."""

    def fetch(*names: str) -> tuple[int, str, str]:
        code = run(lambda: download.main([*names, "--to", str(tmp_path / "weights")]))
        return code, *capfd.readouterr()

    return fetch


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "weights" / SD15.name


def is_one_error_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1


def ranges(hub: Hub) -> list[str | None]:
    """The Range header of every GET."""
    return [range_ for _, _, range_, _ in hub.gets()]


def test_the_command_brings_the_exact_bytes_and_prints_how_to_use_them(hub, target, tmp_path):
    root = Path(__file__).parent.parent
    # with -m, Python would import the whole package first
    command = [sys.executable, "weights/download.py", "sd15", "--to", str(target.parent)]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"),
                                "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert target.read_bytes() == CONTENT and os.listdir(target.parent) == [SD15.name]
    assert f"{target}\n" in done.stdout
    assert f"python sample.py --checkpoint {target} " in done.stdout
    path = f"/{SD15.repository}/resolve/main/{SD15.name}"
    assert [request[:2] for request in hub.requests] == [("HEAD", path), ("GET", path)]


def test_a_cut_download_goes_on_where_it_stopped_when_the_command_is_run_again(hub, fetch, target):
    hub.cut = CHUNK + 1_000_000
    code, _, err = fetch("sd15")
    assert code == 1 and is_one_error_line(err) and "503" in err and "run the command again" in err
    assert f"{hub.url}/{SD15.repository}/resolve/main/{SD15.name}" in err and str(target) in err
    assert not target.exists()
    hub.cut, hub.status, hub.requests = None, 200, []
    assert fetch("sd15")[0] == 0
    assert ranges(hub) == [f"bytes={CHUNK}-"]
    assert target.read_bytes() == CONTENT and os.listdir(target.parent) == [SD15.name]


def test_nothing_is_taken_over_from_another_version_of_the_file(hub, fetch, target):
    hub.cut, hub.etag = CHUNK + 1, "1" * 64
    assert fetch("sd15")[0] == 1
    hub.cut, hub.status, hub.etag, hub.requests = None, 200, hashlib.sha256(CONTENT).hexdigest(), []
    assert fetch("sd15")[0] == 0
    assert ranges(hub) == [None] and target.read_bytes() == CONTENT


def test_a_file_that_is_whole_is_not_fetched_again(hub, fetch, target):
    fetch("sd15")
    hub.requests = []
    code, out, err = fetch("sd15")
    assert (code, err, hub.gets()) == (0, "", []) and "is there" in out and str(target) in out


def test_a_file_that_is_there_needs_no_hub(hub, fetch, target):
    fetch("sd15")
    hub.close()
    code, out, err = fetch("sd15")
    assert (code, err) == (0, "") and "is there" in out


def test_a_file_of_another_size_is_left_alone_and_reported(hub, fetch, target):
    target.parent.mkdir()
    target.write_bytes(b"mine")
    code, _, err = fetch("sd15")
    assert code == 2 and is_one_error_line(err) and "4 bytes" in err
    assert target.read_bytes() == b"mine" and not hub.gets()


def test_a_full_disk_is_one_line_and_what_arrived_is_kept(hub, fetch, target):
    room, (soft, hard) = CHUNK // 2, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # beyond it, as on a full disk
    try:
        code, _, err = fetch("sd15")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and is_one_error_line(err)
    assert "needs 0.01 GB" in err and str(target.parent) in err
    assert not target.exists()
    hub.requests = []
    assert fetch("sd15")[0] == 0 and target.read_bytes() == CONTENT
    assert ranges(hub) == [f"bytes={room}-"]


def test_a_file_that_the_disk_has_no_room_for_is_not_begun(hub, fetch, target):
    hub.size = 10**18
    code, _, err = fetch("sd15")
    assert code == 1 and is_one_error_line(err)
    assert "needs 1,000,000,000.00 GB" in err and str(target.parent) in err
    assert not hub.gets() and not os.listdir(target.parent)


def test_without_a_hub_the_error_names_what_to_fetch_by_hand(hub, fetch, target):
    hub.close()
    code, _, err = fetch("sd15")
    assert code == 1 and is_one_error_line(err)
    assert f"{hub.url}/{SD15.repository}/resolve/main/{SD15.name}" in err and str(target) in err
    assert not target.parent.exists()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_gated_or_missing_repository_is_one_line_with_its_address(hub, fetch, target, status):
    hub.status = status
    code, _, err = fetch("sd15")
    assert code == 1 and is_one_error_line(err) and str(status) in err
    assert f"{hub.url}/{SD15.repository}/resolve/main/{SD15.name}" in err
    assert not target.parent.exists()


def test_what_is_not_the_hub_is_not_taken_for_it(hub, fetch, target):
    hub.commit = None  # as a login page or a proxy would answer
    code, _, err = fetch("sd15")
    assert code == 1 and is_one_error_line(err) and "not the hub" in err
    assert not target.parent.exists()


def test_a_file_damaged_on_its_way_is_deleted(hub, fetch, target):
    hub.etag = "1" * 64
    code, _, err = fetch("sd15")
    assert code == 1 and is_one_error_line(err) and "damaged" in err
    assert not os.listdir(target.parent)


def test_the_token_goes_to_the_hub_and_not_where_it_redirects_to(hub, fetch, target, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    storage = Hub()
    hub.elsewhere = storage.url.replace("127.0.0.1", "localhost")
    assert fetch("sd15")[0] == 0 and target.read_bytes() == CONTENT
    storage.close()
    assert {token for *_, token in hub.requests} == {"Bearer hf_secret"}
    assert [(path, token) for _, path, _, token in storage.gets()] == [("/signed", None)]


def test_with_a_controlnet_the_command_for_its_stable_diffusion_is_printed(fetch, target):
    code, out, _ = fetch("controlnet-canny")
    control = target.parent / FILES["controlnet-canny"].name
    assert code == 0 and f"--checkpoint {target} --controlnet {control} " in out
    assert f"python -m weights.download sd15 --to {target.parent}" in out


def test_an_unknown_name_is_answered_with_the_known_ones(fetch, capfd):
    with pytest.raises(SystemExit) as end:
        fetch("sd99")
    err = capfd.readouterr().err
    assert end.value.code == 2 and is_one_error_line(err) and "sd99" in err
    assert all(name in err for name in FILES)


def test_every_file_has_a_name_of_its_own_and_a_command_that_sample_accepts():
    assert len({file.name for file in FILES.values()}) == len(FILES)
    for file in FILES.values():
        words = shlex.split(download.command(file, Path("some folder")))
        settings, _ = sample.parse(words[2:])
        assert words[:2] == ["python", "sample.py"] and f"some folder/{file.name}" in words
        assert settings.checkpoint.name == (FILES[file.base].name if file.base else file.name)
