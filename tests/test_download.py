"""Getting the weights: every way a network, a disk or a process fails leads to right files or to a sentence,
against a local hub.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import hub as hubs
import pytest
from hub import VAE, Hub, child, damage, digest, files_of, needed, there

from lance_core.checkpoint import checkpoint
from lance_core.hub import download, http, job, released, watch
from lance_core.hub.download import DownloadError

MODEL = "Lance_3B/model.safetensors"
GOLDEN = Path(__file__).parent / "golden" / "checkpoint"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No token, cache or endpoint of this machine; short waits; pieces small enough for small files."""
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "LANCE_REVISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("LANCE_REVISION", "main")
    for name, value in {"BACKOFF": 0.01, "MARGIN": 0}.items():
        monkeypatch.setattr(job, name, value)
    monkeypatch.setattr(http, "STALL", 0.6)
    for name, value in {"CHUNK": 16384, "POLL": 0.05}.items():
        monkeypatch.setattr(watch, name, value)


@pytest.fixture
def hub():
    with Hub(hubs.released()) as hub:
        yield hub


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "models" / "lance"


def assert_complete(hub: Hub, root: Path, name: str = "Lance_3B") -> None:
    assert there(root) == {p: hub.files[p] for p in needed(hub, name)}
    assert not list(root.rglob("*.part"))
    assert name not in download.missing(root)


# -- when nothing fails --------------------------------------------------------------------------------------


def test_a_checkpoint_is_fetched_whole_and_then_needs_no_network(hub, root):
    told = []
    assert download.missing(root) == ["Lance_3B", "Lance_3B_Video"]
    result = download.download("Lance_3B", root, endpoint=hub.url, progress=lambda *a: told.append(a))
    assert_complete(hub, root)
    assert set(result["fetched"]) == needed(hub) and result["fetched"][-1] == MODEL, "the model comes last"
    assert (
        result["commit"] == hub.commit
        and result["folder"] == str(root / "Lance_3B")
        and not result["damaged"]
    )
    total = sum(len(hub.files[p]) for p in needed(hub))
    assert told[-1][1:] == (total, total) and all(0 <= done <= of for _, done, of in told)
    assert download.missing(root) == ["Lance_3B_Video"]
    count = len(hub.requests), len(hub.api_requests)
    again = download.download("Lance_3B", root, endpoint="http://127.0.0.1:9")
    assert (
        not again["fetched"]
        and set(again["reused"]) == needed(hub)
        and (len(hub.requests), len(hub.api_requests)) == count
    )


def test_the_second_checkpoint_shares_files_and_commit_with_the_first(hub, root):
    download.download("Lance_3B", root, endpoint=hub.url)
    result = download.download("Lance_3B_Video", root, endpoint=hub.url)
    assert set(result["fetched"]) == {p for p in hub.files if p.startswith("Lance_3B_Video/")}
    assert hub.api_requests == ["main"] and download.missing(root) == []


def test_endpoint_and_token_come_from_the_environment_and_the_token_stays_with_its_host(
    hub, root, monkeypatch
):
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download.download("Lance_3B", root)
    small = [token for path, _, token in hub.requests if path.endswith(".json")]
    large = [token for path, _, token in hub.requests if path in (MODEL, VAE)]
    assert set(small) == {"Bearer hf_secret"} and set(large) == {None}


def test_labels():
    assert [download.label(n) for n in download.RELEASED] == [
        "Lance_3B (download, 17 GB)",
        "Lance_3B_Video (download, 18 GB)",
    ]
    assert download.name_of("Lance_3B_Video (download, 1 GB)") == "Lance_3B_Video"
    assert download.name_of("Lance_3B") is None and download.name_of("Other (download, 1 GB)") is None


def test_other_files_of_the_repository_are_left_alone(hub, root):
    hub.files |= {
        "Lance_3B/../../evil.json": b"x",
        "../evil.txt": b"x",
        "Lance_3B/sub/x.json": b"x",
        "Lance_3B/run.py": b"x",
    }
    download.download("Lance_3B", root, endpoint=hub.url)
    for path in list(hub.files)[-4:]:
        assert path not in there(root) and not any(path == asked for asked, _, _ in hub.requests)
    assert not (root.parent / "evil.json").exists() and not (root.parent / "evil.txt").exists()


# -- when the network fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["stall", "truncate", "disconnect", 500, 503, 429, 408, "corrupt"])
@pytest.mark.parametrize("path", [MODEL, "Lance_3B/vocab.json"])
def test_a_failure_is_recovered_from(hub, root, fault, path):
    hub.faults = {path: [fault, fault] if fault != "corrupt" else [fault]}
    result = download.download("Lance_3B", root, endpoint=hub.url)
    assert_complete(hub, root)
    assert not result["damaged"]
    starts = [start for asked, start, _ in hub.requests if asked == path]
    if fault in ("stall", "truncate", "disconnect") and path == MODEL:
        assert 0 == starts[0] < starts[1] < starts[2] < len(hub.files[MODEL]), "resumed, not fetched anew"
    else:
        assert starts[0] == 0 and len(starts) == (2 if fault == "corrupt" else 3)


def test_a_server_without_ranges_starts_over(hub, root):
    hub.faults = {MODEL: ["disconnect", "no-range"]}
    download.download("Lance_3B", root, endpoint=hub.url)
    assert_complete(hub, root)


@pytest.mark.parametrize("fault, reason, words", [
    (("always", "truncate"), None, ""),  # every try brings half of the rest, so it ends
    (("always", "corrupt"), "mismatch", "arrived damaged twice"),
    (("always", 500), "network", "3 times in a row"),
    (404, "absent", "HTTP 404"),
    (401, "refused", "HF_TOKEN"),
    (403, "refused", "HF_TOKEN"),
    (418, "refused", "HTTP 418"),
    ("wrong-size", "mismatch", "26 bytes where 300000 were expected"),
    ("too-long", "mismatch", "more than the 300000 bytes"),
])  # fmt: skip
def test_a_lasting_failure_is_a_sentence_and_leaves_a_resumable_state(
    hub, root, monkeypatch, fault, reason, words
):
    monkeypatch.setattr(job, "RETRIES", 2 if reason else 30)
    monkeypatch.setattr(job, "BACKOFF", 0.0)
    hub.faults = {MODEL: [fault]}
    if reason is None:
        download.download("Lance_3B", root, endpoint=hub.url)
    else:
        with pytest.raises(DownloadError, match=words) as caught:
            download.download("Lance_3B", root, endpoint=hub.url)
        assert caught.value.reason == reason
        for part in (
            hub.url,
            "tree/" + hub.commit,
            "Lance_3B/model.safetensors",
            "Qwen2.5-VL-ViT",
            VAE,
            str(root),
        ):
            assert part in str(caught.value), "how to do it by hand"
        assert MODEL not in there(root) and all(hub.files[p] == data for p, data in there(root).items())
        hub.faults = {}
        assert download.download("Lance_3B", root, endpoint=hub.url)["fetched"] == [MODEL]
    assert_complete(hub, root)


@pytest.mark.parametrize(
    "faults, reason", [([500, 429], None), ([500] * 3, "network"), ([401], "refused"), ([404], "absent")]
)
def test_failures_of_the_listing(hub, root, faults, reason):
    hub.api_faults = faults
    if reason is None:
        download.download("Lance_3B", root, endpoint=hub.url)
        return
    with pytest.raises(DownloadError, match="By hand") as caught:
        download.download("Lance_3B", root, endpoint=hub.url)
    assert caught.value.reason == reason and not there(root)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_network_is_a_sentence(root, endpoint):
    with pytest.raises(DownloadError, match="cannot be reached.*hf-mirror.com.*By hand: get") as caught:
        download.download("Lance_3B", root, endpoint=endpoint)
    assert caught.value.reason == "network"


# -- pins ----------------------------------------------------------------------------------------------------


def test_the_commit_is_kept_until_another_is_asked_for(hub, root):
    download.download("Lance_3B", root, endpoint=hub.url)
    hub.commit, old = "d" * 40, hub.commit
    hub.files[MODEL] = b"new" + hub.files[MODEL]
    assert download.download("Lance_3B", root, endpoint=hub.url)["commit"] == old
    result = download.download("Lance_3B", root, endpoint=hub.url, revision="main")
    assert result["commit"] == hub.commit and result["fetched"] == [MODEL]
    assert_complete(hub, root)


def test_the_pinned_hashes_bind_a_mirror(hub, root, monkeypatch):
    monkeypatch.delenv("LANCE_REVISION")
    hub.commit = download.REVISION
    with pytest.raises(DownloadError, match="not the released one") as caught:
        download.download("Lance_3B", root, endpoint=hub.url)
    assert caught.value.reason == "mismatch" and not there(root)
    monkeypatch.setattr(released, "SHA256", {p: digest(p, hub.files[p]) for p in released.SHA256})
    assert download.download("Lance_3B", root, endpoint=hub.url)["commit"] == download.REVISION
    assert hub.api_requests == [download.REVISION] * 2


def test_what_cannot_be_is_refused(hub, root):
    with pytest.raises(DownloadError, match="There is no released checkpoint 'Lance_9B'"):
        download.download("Lance_9B", root, endpoint=hub.url)
    with pytest.raises(DownloadError, match="HTTP 404.*--revision main"):
        download.download("Lance_3B", root, endpoint=hub.url, revision="gone")
    del hub.files["Qwen2.5-VL-ViT/vit.safetensors"]
    with pytest.raises(DownloadError, match="has no Qwen2.5-VL-ViT/vit.safetensors at revision main"):
        download.download("Lance_3B", root, endpoint=hub.url)


# -- what is on the disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["one bit", "shorter", "silently"])
def test_a_damaged_file_is_named_and_fetched_again(hub, root, how, caplog):
    download.download("Lance_3B", root, endpoint=hub.url)
    victim = root / MODEL
    if how == "shorter":
        victim.write_bytes(victim.read_bytes()[:-1])
        assert download.missing(root) == ["Lance_3B", "Lance_3B_Video"]
    else:
        stat = victim.stat()
        damage(victim)
        if how == "silently":  # as a bad disk does
            os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert not download.download("Lance_3B", root, endpoint=hub.url)["fetched"]
    result = download.download("Lance_3B", root, endpoint=hub.url, verify=how == "silently")
    assert result["damaged"] == result["fetched"] == [MODEL] and str(victim) in caplog.text
    assert MODEL in download.report(result)
    kept = victim.with_name("model.safetensors.damaged")
    assert kept.exists() == (how != "silently"), "a file that was changed since is someone's, and kept"
    kept.unlink(missing_ok=True)
    assert_complete(hub, root)


def test_files_put_there_by_hand_are_hashed_once_and_taken(hub, root):
    for path in needed(hub):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(hub.files[path])
    result = download.download("Lance_3B", root, endpoint=hub.url)
    assert not result["fetched"] and not hub.requests and set(result["reused"]) == needed(hub)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"repo": 1}', '{"repo": "x", "listing": {"a": 1}}', "[" * 100_000]
)
def test_a_damaged_record_only_costs_a_check(hub, root, text):
    download.download("Lance_3B", root, endpoint=hub.url)
    (root / download.RECORD).write_text(text)
    assert download.missing(root) == ["Lance_3B_Video"]
    assert not download.download("Lance_3B", root, endpoint=hub.url)["fetched"]


def test_a_full_disk_is_said_before_anything_is_fetched(hub, root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(job.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**5))
    monkeypatch.setattr(job, "MARGIN", 10**9)
    with pytest.raises(
        DownloadError, match=r"needs 0\.0 GB and 1\.0 GB to spare but has 0\.0 GB free: free 1\.0 GB"
    ) as caught:
        download.download("Lance_3B", root, endpoint=hub.url)
    assert caught.value.reason == "disk" and not hub.requests


def test_a_disk_that_fills_up_is_said_and_the_part_stays(hub, root, monkeypatch):
    write = http.PartFile.write

    def full(self, piece):
        if self.size > 100_000:
            raise OSError(28, "No space left on device")
        write(self, piece)

    monkeypatch.setattr(http.PartFile, "write", full)
    with pytest.raises(DownloadError, match="is full"):
        download.download("Lance_3B", root, endpoint=hub.url)
    monkeypatch.setattr(http.PartFile, "write", write)
    hub.requests.clear()
    download.download("Lance_3B", root, endpoint=hub.url)
    assert [(p, s > 100_000) for p, s, _ in hub.requests] == [(MODEL, True)]


def test_a_folder_that_cannot_be_made(hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be read or written"):
        download.download("Lance_3B", tmp_path / "file" / "lance", endpoint=hub.url)


# -- the hub's cache and offline -----------------------------------------------------------------------------


def test_what_the_hubs_cache_has_is_linked(hub, root, tmp_path):
    hub.cache(tmp_path / "hf_home" / "hub", [MODEL, VAE])
    result = download.download("Lance_3B", root, endpoint=hub.url)
    assert MODEL in result["fetched"] and not {MODEL, VAE} & {p for p, _, _ in hub.requests}
    assert (root / MODEL).stat().st_nlink == 2 and not (root / MODEL).is_symlink()
    assert_complete(hub, root)


def test_what_the_hubs_cache_has_on_another_disk_is_copied(hub, root, tmp_path, monkeypatch):
    hub.cache(tmp_path / "hf_home" / "hub", [MODEL])
    monkeypatch.setattr(
        http.os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link"))
    )
    download.download("Lance_3B", root, endpoint=hub.url)
    assert MODEL not in {p for p, _, _ in hub.requests} and (root / MODEL).stat().st_nlink == 1
    assert_complete(hub, root)


def test_a_damaged_cache_is_neither_believed_nor_written_to(hub, root, tmp_path):
    hub.cache(tmp_path / "hf_home" / "hub", [MODEL])
    blob = next((tmp_path / "hf_home").rglob(digest(MODEL, hub.files[MODEL])))
    damage(blob)
    before = blob.read_bytes()
    download.download("Lance_3B", root, endpoint=hub.url)
    assert_complete(hub, root)
    assert blob.read_bytes() == before


def test_offline_takes_the_cache_or_says_what_to_do(hub, root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set.*By hand") as caught:
        download.download("Lance_3B", root, endpoint=hub.url)
    assert caught.value.reason == "offline"
    hub.cache(tmp_path / "hf_home" / "hub", sorted(needed(hub)))
    download.download("Lance_3B", root, endpoint=hub.url)
    assert_complete(hub, root)
    (root / MODEL).unlink()
    for blob in (tmp_path / "hf_home").rglob("blobs"):
        (blob / digest(MODEL, hub.files[MODEL])).unlink()
    with pytest.raises(DownloadError, match=f"{MODEL} is neither here nor in"):
        download.download("Lance_3B", root, endpoint=hub.url)
    assert not hub.requests and not hub.api_requests


def test_without_huggingface_hub_it_says_how_to_install_it(hub, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match="pip install huggingface_hub") as caught:
        download.download("Lance_3B", root, endpoint=hub.url)
    assert caught.value.reason == "install"


# -- interruption, kills, company ----------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["check", "progress"])
def test_an_interrupt_takes_effect_at_once_though_the_server_stalls(hub, root, monkeypatch, through):
    monkeypatch.setattr(http, "STALL", 60.0)
    hub.faults = {MODEL: [("always", "stall")]}
    asked = threading.Event()
    looks = []

    class Interrupted(BaseException):
        pass

    def look(*_):
        looks.append(time.monotonic())
        if asked.is_set():
            raise Interrupted

    threading.Timer(1.2, asked.set).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        download.download("Lance_3B", root, endpoint=hub.url, **{through: look})
    assert time.monotonic() - began < 2.2
    assert max(b - a for a, b in itertools.pairwise(looks)) < 0.9, "at least once a second"
    hub.faults = {}
    hub.requests.clear()
    download.download("Lance_3B", root, endpoint=hub.url)
    [(path, start, _)] = hub.requests
    assert path == MODEL and -watch.CHUNK < start - len(hub.files[MODEL]) // 2 <= 0
    assert_complete(hub, root)


def assert_only_whole_files(hub: Hub, root: Path) -> None:
    """What Checkpoint would open is right or absent."""
    assert all(hub.files[path] == data for path, data in there(root).items())


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_killed_at_ten_random_moments_the_next_try_succeeds(root):
    rng = random.Random(9)
    with Hub(files_of(GOLDEN), rate=1.2e6) as hub:  # about 3 s in all
        for _ in range(10):
            process = child(hub, root)
            time.sleep(rng.uniform(0.0, 0.5))
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            assert_only_whole_files(hub, root)
        hub.rate = None
        assert MODEL in download.download("Lance_3B", root, endpoint=hub.url)["fetched"]
        assert_complete(hub, root)
        assert sum(start > 0 for _, start, _ in hub.requests) >= 3, (
            "what a killed try had fetched was not fetched again"
        )
    opened = checkpoint.Checkpoint(root / "Lance_3B")
    assert all(opened.parts[part].tensors for part in checkpoint.PARTS)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
@pytest.mark.parametrize(
    "where, count",
    [("write", 3), ("before replace", 1), ("before replace", 8), ("after replace", 2), ("after replace", 17)],
)
def test_killed_at_a_chosen_moment_the_next_try_succeeds(hub, root, where, count):
    process = child(hub, root, where, count)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert_only_whole_files(hub, root)
    download.download("Lance_3B", root, endpoint=hub.url)
    assert_complete(hub, root)
    assert not list(root.rglob("*.damaged"))


def test_two_processes_at_once_fetch_everything_once(hub, root):
    hub.rate = 1e6
    both = [child(hub, root), child(hub, root)]
    for process in both:
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
    assert_complete(hub, root)
    assert sorted(p for p, _, _ in hub.requests) == sorted(needed(hub))


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command(hub, root, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    parser = argparse.ArgumentParser()
    download.add_arguments(parser)
    listed = download.run(parser.parse_args(["--to", str(root)]))
    assert listed["complete"] == [] and not root.exists() and not hub.api_requests, (
        "nothing is downloaded without being chosen"
    )
    assert (
        download.report(listed)
        == f"{root}:\n  Lance_3B (download, 17 GB)\n  Lance_3B_Video (download, 18 GB)"
    )
    told = []
    result = download.run(
        parser.parse_args(["Lance_3B", "--to", str(root), "--revision", "main"]), lambda *a: told.append(a)
    )
    assert told and "is complete and checked" in download.report(result) and MODEL in download.report(result)
    listed = download.run(parser.parse_args(["--to", str(root)]))
    assert listed["complete"] == ["Lance_3B"] and list(listed["missing"]) == ["Lance_3B_Video"]
    assert parser.parse_args([]).to == "models/lance"
