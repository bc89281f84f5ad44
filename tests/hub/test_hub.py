"""Models by name, against a hub on this machine that speaks the real protocol and fails to order."""

import hashlib
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import engine
from engine.errors import DownloadError
from engine.hub.cache import Repo, cache_dir, find, local_models
from engine.hub.names import HubName
from engine.hub.resolve import pull, resolve
from tests.support.command_line import run
from tests.support.servers.fake_hub import fake_hub

# Versions of huggingface_hub before 1.0 leave their sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NAME = "owner/model-GGUF"
FILE = "model-Q4_K_M.gguf"
DATA = bytes(range(256)) * 4096  # 1 MiB
OTHER = b"other" * 1000


def files(**more):
    return {FILE: DATA, "model-Q8_0.gguf": OTHER, "README.md": b"# model", **more}


def name(text=f"hf:{NAME}"):
    return HubName.parse(text)


def blobs():
    folder = cache_dir() / f"models--{NAME.replace('/', '--')}" / "blobs"
    return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.exists() else {}


def digest(data):
    return hashlib.sha256(data).hexdigest()


class TestDownload:
    def test_the_cache_is_the_one_of_hugging_face(self, hub):
        """Files have the names, links and refs that huggingface_hub itself finds."""
        import huggingface_hub

        commit = hub.repo(files=files(**{"sub/model-IQ2_M.gguf": b"deep"})).refs["main"]
        calls = []
        path = resolve(name(), lambda *call: calls.append(call))
        assert path.read_bytes() == DATA
        deep = resolve(name(f"hf:{NAME}:iq2_m"))
        for found, file in ((path, FILE), (deep, "sub/model-IQ2_M.gguf")):
            theirs = huggingface_hub.hf_hub_download(NAME, file, cache_dir=cache_dir(), local_files_only=True)
            assert str(found) == theirs
        info = huggingface_hub.scan_cache_dir(cache_dir())
        assert info.warnings == [] or not info.warnings
        (repo,) = info.repos
        assert (repo.repo_id, repo.nb_files) == (NAME, 2)
        assert {revision.commit_hash: set(revision.refs) for revision in repo.revisions} == {commit: {"main"}}
        assert calls[0] == (f"downloading {FILE}", 0, len(DATA))
        assert calls[-1] == (f"checked {FILE}", len(DATA), len(DATA))

    def test_what_is_here_is_opened_without_the_hub(self, hub):
        hub.repo(files=files())
        path = resolve(name())
        seen = len(hub.requests)
        assert resolve(name()) == resolve(name(f"hf:{NAME}:q4_K_m")) == path
        assert len(hub.requests) == seen

    def test_the_only_model_of_a_repository_is_fetched_once_and_opened_without_the_hub(self, hub, caplog):
        hub.repo(files={"tiny-F16.gguf": DATA})
        path = resolve(name())
        assert resolve(name()) == path
        assert hub.contents_asked() == [("tiny-F16.gguf", 0)]
        hub.answers["GET"] = (429,)
        assert resolve(name()) == path
        assert "limits requests (429)" in caplog.text

    def test_parts_of_a_split_model(self, hub):
        parts = {f"Q6_K/m-Q6_K-0000{i}-of-00003.gguf": bytes([i]) * 1000 * i for i in (1, 2, 3)}
        hub.repo(files=files(**parts))
        calls = []
        path = resolve(name(f"hf:{NAME}:Q6_K"), lambda *call: calls.append(call))
        assert path.name == "m-Q6_K-00001-of-00003.gguf"
        assert [path.with_name(Path(part).name).read_bytes() for part in parts] == list(parts.values())
        assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)  # over all parts together
        assert calls[-1][1:] == (6000, 6000)

    def test_a_revision(self, hub):
        repo = hub.repo(files=files())
        first = repo.refs["main"]
        second = repo.commit(files(**{FILE: OTHER}), ref="v2")
        assert resolve(name(f"hf:{NAME}@v2")).read_bytes() == OTHER
        assert resolve(name(f"hf:{NAME}@{first}")).read_bytes() == DATA
        assert resolve(name(f"hf:{NAME}@{second}")).read_bytes() == OTHER
        assert Repo.of(NAME).commit("v2") == second

    def test_pull_takes_the_new_version_and_resolve_what_is_here(self, hub):
        repo = hub.repo(files=files())
        resolve(name())
        repo.commit(files(**{FILE: OTHER, "new": b""}))
        assert resolve(name()).read_bytes() == DATA
        assert pull(name()).read_bytes() == OTHER
        assert resolve(name()).read_bytes() == OTHER

    def test_content_that_is_here_under_another_commit_is_linked(self, hub):
        repo = hub.repo(files=files())
        resolve(name())
        repo.commit(files(new=b""))
        pull(name())
        assert hub.contents_asked() == [(FILE, 0)]
        assert len(blobs()) == 1

    def test_the_token_goes_to_the_hub_and_not_to_the_host_of_the_contents(self, hub, monkeypatch):
        hub.repo(files=files(), token="hf_secret")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        resolve(name())
        sent = {(request.server, request.headers.get("authorization")) for request in hub.requests}
        assert sent == {("hub", "Bearer hf_secret"), ("cdn", None)}

    def test_two_at_once_fetch_once(self, hub):
        hub.repo(files=files())
        hub.stall_after[FILE] = 1000
        said = []
        threads = [
            threading.Thread(target=resolve, args=(name(), lambda text, *_: said.append(text))) for _ in range(2)
        ]
        threads[0].start()
        assert hub.stalled.wait(30)
        threads[1].start()
        while not any("waiting for another process" in text for text in list(said)):
            threads[1].join(0.01)
        hub.go_on.set()
        for thread in threads:
            thread.join(30)
        assert hub.contents_asked() == [(FILE, 0)]
        assert find(name()).path.read_bytes() == DATA


class TestBrokenConnections:
    def test_a_broken_connection_is_taken_up_where_it_broke(self, hub):
        hub.repo(files=files())
        hub.break_after[FILE] = [300_000, 100]
        assert resolve(name()).read_bytes() == DATA
        begins = [begin for _, begin in hub.contents_asked()]
        assert begins[0] == 0
        assert len(begins) == 3
        assert begins == sorted(begins)

    def test_what_came_before_a_failure_is_kept(self, hub, monkeypatch):
        """Also where the hub's library gives up, and in the next process."""
        monkeypatch.setattr("engine.hub.client.PIECE", 4096)
        hub.repo(files=files())
        hub.break_after[FILE] = [500_000] + [0] * 99
        with pytest.raises(DownloadError, match="cannot be reached"):
            resolve(name())
        (kept,) = blobs().items()
        assert kept[0] == f"{digest(DATA)}.incomplete"
        assert 400_000 < kept[1] <= 500_000
        hub.break_after.clear()
        hub.requests.clear()
        assert resolve(name()).read_bytes() == DATA
        assert hub.contents_asked() == [(FILE, kept[1])]
        assert list(blobs()) == [digest(DATA)]

    def partial(self, content):
        blob = Repo.of(NAME).blob(digest(DATA))
        blob.parent.mkdir(parents=True)
        blob.with_name(f"{blob.name}.incomplete").write_bytes(content)

    def test_a_server_that_cannot_resume(self, hub):
        hub.repo(files=files())
        hub.ignores_range.add(FILE)
        self.partial(DATA[:5000])
        assert resolve(name()).read_bytes() == DATA

    @pytest.mark.parametrize("content", [b"x" * 5000, b"x" * len(DATA), DATA + b"x", DATA], ids=len)
    def test_a_partial_file_of_any_content(self, hub, content):
        hub.repo(files=files())
        self.partial(content)
        assert resolve(name()).read_bytes() == DATA
        assert list(blobs()) == [digest(DATA)]

    @pytest.mark.parametrize(
        ("content", "message"),
        [(DATA[:-1] + b"x", "checksum"), (DATA[:-9], "length"), (DATA + b"x", "more than the 1048576 bytes|length")],
        ids=["same length", "shorter", "longer"],
    )
    def test_a_wrong_content_never_gets_a_name(self, hub, content, message):
        hub.repo(files=files())
        hub.contents[FILE] = content
        with pytest.raises(DownloadError, match=message):
            resolve(name())
        assert digest(DATA) not in blobs()
        assert find(name()) is None
        hub.contents.clear()
        assert resolve(name()).read_bytes() == DATA

    @pytest.mark.parametrize("change", [{"size": 5}, {"sha256": "0" * 64}], ids=["size", "sha256"])
    def test_a_hub_that_contradicts_itself(self, hub, change):
        hub.repo(files=files())
        hub.listed[FILE] = change
        with pytest.raises(DownloadError, match="contradicts itself"):
            resolve(name())
        assert hub.contents_asked() == []

    def test_pull_mends_a_damaged_file(self, hub):
        hub.repo(files=files())
        path = resolve(name())
        path.resolve().write_bytes(DATA[:-1] + b"?")
        assert pull(name()).read_bytes() == DATA

    def test_what_the_hub_tells_never_leads_out_of_the_cache(self, hub, tmp_path):
        repo = hub.repo(files={FILE: DATA})
        hub.listed[FILE] = {"rfilename": f"../../../../{FILE}"}
        with pytest.raises(DownloadError, match="no GGUF model"):
            resolve(name())
        hub.listed.clear()
        repo.refs["main"] = "../../x"
        repo.commits["../../x"] = {FILE: DATA}
        with pytest.raises(DownloadError, match=r"not answer like a Hugging Face hub \(commit '../../x'\)"):
            resolve(name())
        assert list(tmp_path.rglob(FILE)) == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ("hf:owner/nothing", ["answered 401", "no such model", "HF_TOKEN"]),
            (f"hf:{NAME}@v9", ["no revision 'v9'"]),
            (f"hf:{NAME}:Q3_K", ["no Q3_K", "Q8_0 (5.0 kB), Q4_K_M (1.0 MB)"]),
            ("hf:owner/private", ["private and no token is set", "HF_TOKEN"]),
            ("hf:owner/gated", ["accepted its terms", "/owner/gated", "HF_TOKEN"]),
            ("hf:owner/safetensors", ["no GGUF model", "2 files (.gguf, .safetensors)", "-GGUF"]),
            ("hf:owner/empty", ["no GGUF model", "no file"]),
        ],
    )
    def test_what_is_not_there(self, hub, asked, words):
        hub.repo(files=files())
        hub.repo("owner/private", files(), token="t")
        hub.repo("owner/gated", files(), token="t", gated=True)
        hub.repo("owner/safetensors", {"a.safetensors": b"1", "mmproj-F16.gguf": b"2"})
        hub.repo("owner/empty", {})
        with pytest.raises(DownloadError) as caught:
            resolve(HubName.parse(asked))
        message = str(caught.value)
        assert message.startswith(f"{asked}: ")
        assert [word for word in words if word not in message] == []

    @pytest.mark.parametrize(
        ("pattern", "answer", "words"),
        [
            ("hub GET", (429, {"Retry-After": 7}), ["limits requests (429)", "7 s", "HF_TOKEN"]),
            ("hub GET", (500,), ["answered 500"]),
            ("hub GET", (200, {"Content-Type": "text/html"}, b"<html>log in</html>"), ["answer like", "HF_ENDPOINT"]),
            ("hub HEAD", (503,), ["answered 503"]),
            ("hub HEAD", (200, {"Content-Length": 3}), ["neither ETag nor size", "HF_ENDPOINT"]),
            ("cdn GET", (403,), ["answered 403"]),
            ("cdn GET", (500,), ["answered 500"]),
        ],
    )  # fmt: skip
    def test_a_hub_that_fails(self, hub, pattern, answer, words):
        hub.repo(files=files())
        hub.answers[pattern] = answer
        with pytest.raises(DownloadError) as caught:
            resolve(name())
        assert [word for word in words if word not in str(caught.value)] == []
        hub.answers.clear()
        assert resolve(name()).read_bytes() == DATA

    def test_no_network_and_nothing_here(self, hub, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(DownloadError, match="cannot be reached"):
            resolve(name())

    def test_offline(self, hub, monkeypatch):
        hub.repo(files=files())
        path = resolve(name())
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        seen = len(hub.requests)
        assert resolve(name()) == path
        with pytest.raises(DownloadError, match=f"HF_HUB_OFFLINE .* the cache has hf:{NAME}:Q4_K_M"):
            resolve(name(f"hf:{NAME}:Q8_0"))
        assert len(hub.requests) == seen

    @pytest.mark.parametrize("trouble", ["429", "offline", "no network"])
    def test_an_older_commit_is_taken_where_the_hub_cannot_be_asked(self, hub, monkeypatch, caplog, trouble):
        repo = hub.repo(files=files())
        older = resolve(name())
        repo.commit({"model-Q8_0.gguf": OTHER, FILE: OTHER})
        resolve(name(f"hf:{NAME}:Q8_0"))  # main is now at a commit of which the first file is not here
        if trouble == "429":
            hub.answers["GET"] = (429,)
        elif trouble == "offline":
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        else:
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        assert resolve(name()) == older
        assert "which is here" in caplog.text
        with pytest.raises(DownloadError):  # a revision that was asked for by name is that one or nothing
            resolve(name(f"hf:{NAME}@v7"))


def test_settings_of_huggingface_hub_are_as_before(hub):
    import logging

    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled

    theirs = logging.getLogger("huggingface_hub")

    def state():
        return theirs.handlers, theirs.propagate, constants.DOWNLOAD_CHUNK_SIZE, are_progress_bars_disabled()

    before = state()
    hub.repo(files=files())
    hub.stall_after[FILE] = 100
    threads = [threading.Thread(target=resolve, args=(name(f"hf:{NAME}:{quant}"),)) for quant in ("Q4_K_M", "Q8_0")]
    threads[0].start()
    assert hub.stalled.wait(30)
    threads[1].start()
    threads[1].join()  # the second one ends before the first
    assert state() != before
    hub.go_on.set()
    threads[0].join()
    assert state() == before


class TestDisk:
    def test_too_little_room_is_told_before_anything_comes(self, hub, monkeypatch):
        hub.repo(files=files())
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(DownloadError, match=r"1.0 MB are to be fetched .* 1.0 kB free.*gguf-engine rm"):
            resolve(name())
        assert hub.contents_asked() == []

    def test_a_disk_that_fills_up(self, hub):
        """The limit of a file's size fails as a full disk does; what was written is continued without it."""
        hub.repo(files=files())
        program = "import sys; from engine.cli import main; sys.argv[1:] = ['pull', 'hf:owner/model-GGUF']; main()"
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY)),
        )
        assert done.returncode == 2
        assert "is full (File too large)" in done.stderr.splitlines()[-1]
        assert find(name()) is None
        assert resolve(name()).read_bytes() == DATA

    def test_a_cache_that_cannot_be_written(self, hub, tmp_path, monkeypatch):
        hub.repo(files=files())
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
        with pytest.raises(DownloadError, match=r"cannot be written.*HF_HOME"):
            resolve(name())


def test_an_interrupt_is_clean_and_the_next_run_continues(hub):
    data = os.urandom(1 << 20) * 4
    hub.repo(files={FILE: data})
    hub.stall_after[FILE] = 5 << 19
    command = [sys.executable, "-m", "engine", "pull", f"hf:{NAME}:q4_k_m"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(60)
    partial = Repo.of(NAME).blob(f"{digest(data)}.incomplete")
    while not partial.exists() or partial.stat().st_size < 2 << 20:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert "`gguf-engine pull hf:owner/model-GGUF:q4_k_m` continues" in err
    kept = partial.stat().st_size
    hub.go_on.set()
    hub.requests.clear()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert hub.contents_asked() == [(FILE, kept)]
    assert Path(done.stdout.strip()).read_bytes() == data


class TestCommands:
    @pytest.fixture
    def model(self, hub):
        from engine.api.llm import BUNDLED_MODEL

        hub.repo("me/tales-GGUF", {"tales-Q4_K_M.gguf": BUNDLED_MODEL.read_bytes(), "x-Q8_0.gguf": b"GGUF"})
        return "hf:me/tales-GGUF"

    def test_a_model_by_name_everywhere(self, model, tmp_path):
        text = run("generate", "-m", model, "Once upon a time", "--temp", 0, "-n", 5, "--device", "cpu")
        assert text.stdout == run("generate", "Once upon a time", "--temp", 0, "-n", 5, "--device", "cpu").stdout
        assert "downloading tales-Q4_K_M.gguf: 0 B of 10.2 MB (0 %)" in text.stderr
        again = run("generate", "-m", f"{model}:q4_k_m", "Once", "-n", 5, "--device", "cpu")
        assert "downloading" not in again.stderr
        assert "GGUF version 3" in run("inspect", model).stdout
        (tmp_path / "text").write_text("Once upon a time there was a king. " * 40)
        assert "perplexity" in run("perplexity", "-m", model, tmp_path / "text", "-c", 64, "--chunks", 1).stdout
        assert "no chat template" in run("chat", "-m", model, status=2).stderr

    def test_served(self, model):
        from urllib.request import urlopen

        from tests.support.servers.chat_page import serving_at

        with serving_at("-m", model) as address, urlopen(f"{address}/v1/models", timeout=30) as answer:
            (entry,) = json.load(answer)["data"]
        assert entry["id"] == model.removeprefix("hf:")
        assert entry["status"]["value"] == "loaded"

    def test_a_server_is_stopped_while_it_fetches(self, hub):
        hub.repo(files=files())
        hub.stall_after[FILE] = 300_000
        command = [sys.executable, "-m", "engine", "serve", "--port", "0", "-m", f"hf:{NAME}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert hub.stalled.wait(60)
        process.terminate()
        assert process.communicate(timeout=60) == (b"", None)
        assert process.returncode == 0
        hub.go_on.set()
        assert resolve(name()).read_bytes() == DATA

    def test_in_python(self, model):
        lines = []
        with engine.LLM(model, device="cpu", status=lines.append) as llm:
            assert llm.config.model == find(HubName.parse(model)).path
        assert "downloading tales-Q4_K_M.gguf: 10.2 MB of 10.2 MB (100 %)" in lines
        assert engine.load_tokenizer(model).encode("a")

    def test_list_and_rm(self, model):
        assert run("list").stdout == ""
        path = Path(run("pull", model.removeprefix("hf:")).stdout.strip())
        bad = Path(run("pull", f"{model}:q8_0").stdout.strip())
        lines = run("list", "--device", "cpu").stdout.splitlines()
        assert lines[0].split() == ["name", "size", "type", "architecture", "fits", "this", "machine"]
        rows = {line.split()[0]: line for line in lines[1:]}
        assert list(rows) == [f"{model}:Q8_0", f"{model}:Q4_K_M"]
        assert "10.2 MB  Q4_K_M  llama" in rows[f"{model}:Q4_K_M"]
        assert "yes: " in rows[f"{model}:Q4_K_M"]
        assert f"no: {bad}" in rows[f"{model}:Q8_0"]  # why it cannot be opened
        assert "found 2 models" in run("rm", model, status=2).stderr
        assert "give --yes" in run("rm", f"{model}:q8_0", status=2).stderr
        assert "freed 4 B" in run("rm", f"{model}:q8_0", "--yes").stderr
        assert path.exists()
        assert not bad.exists()
        run("rm", model, "-y")
        assert local_models() == []
        assert list(cache_dir().glob("models--*")) == []
        assert "found 0 models" in run("rm", model, "-y", status=2).stderr

    @pytest.mark.parametrize(("answer", "status"), [(b"n\n", 1), (b"y\n", 0)])
    def test_rm_asks(self, model, answer, status):
        run("pull", model)
        terminal, stdin = pty.openpty()
        os.write(terminal, answer)
        command = [sys.executable, "-m", "engine", "rm", model]
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=60)
        for end in (terminal, stdin):
            os.close(end)
        assert (done.returncode, done.stdout) == (status, "")
        assert f"{model}:Q4_K_M  10.2 MB\ndelete?" in done.stderr
        assert len(local_models()) == status

    def test_a_model_too_large_for_the_machine(self, model, monkeypatch):
        run("pull", model)
        monkeypatch.setattr("engine.runner.room.host_memory", lambda: 1_000_000)
        assert "no: takes " in run("list", "--device", "cpu").stdout

    def test_rm_keeps_what_another_commit_uses(self, hub):
        repo = hub.repo(files=files())
        first = resolve(name())
        repo.commit(files(new=b""))
        second = pull(name())
        assert first != second
        names = [str(one.name) for one in local_models()]
        assert (
            sorted(names) == sorted([f"hf:{NAME}:Q4_K_M", f"hf:{NAME}:Q4_K_M@{repo.refs['main']}"]) or len(names) == 2
        )
        assert "freed 0 B" in run("rm", f"hf:{NAME}", "-y").stderr
        assert not second.exists()
        assert first.read_bytes() == DATA
        assert "freed 1.0 MB" in run("rm", f"hf:{NAME}", "--all", "-y").stderr

    def test_rm_of_what_was_not_finished(self, hub):
        hub.repo(files=files())
        partial = Repo.of(NAME).blob("0" * 64 + ".incomplete")
        partial.parent.mkdir(parents=True)
        partial.write_bytes(b"x" * 2000)
        assert "2.0 kB of unfinished downloads of owner/model-GGUF" in run("list").stderr
        assert "freed 2.0 kB" in run("rm", f"hf:{NAME}", "--yes").stderr
        assert not partial.exists()


def test_the_cache_folder_is_that_of_huggingface_hub(tmp_path):
    program = (
        "from huggingface_hub import constants; from engine.hub.cache import cache_dir; import pathlib;"
        "assert str(cache_dir()) == constants.HF_HUB_CACHE, (cache_dir(), constants.HF_HUB_CACHE)"
    )
    for variables in (
        {},
        {"HF_HOME": "~/x"},
        {"HF_HUB_CACHE": "/y", "HF_HOME": "z"},
        {"HUGGINGFACE_HUB_CACHE": "/w"},
        {"XDG_CACHE_HOME": "/v"},
    ):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", program], env=environment | variables, check=True, timeout=60)


def test_a_model_that_is_here_needs_no_huggingface_hub(hub):
    hub.repo(files=files())
    resolve(name())
    program = (
        "import sys, engine; engine.LLM; assert 'engine.hub' not in sys.modules;"
        "from engine.api.names import resolve_model; print(resolve_model('hf:owner/model-GGUF'));"
        "assert 'huggingface_hub' not in sys.modules and 'rich' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()).read_bytes() == DATA


def test_the_fake_hub_answers_huggingface_hub_itself(tmp_path):
    """What the tests above run against is a hub to its own library, too."""
    import huggingface_hub

    with fake_hub() as fake:
        fake.repo(files=files())
        path = huggingface_hub.hf_hub_download(NAME, FILE, cache_dir=tmp_path, endpoint=fake.address)
        assert Path(path).read_bytes() == DATA
