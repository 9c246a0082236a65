"""The run folder: whole files or none, finished artifacts kept, damaged ones made again, one run at a time."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from icon2_rt import atomic
from icon2_rt.atomic import PARTIAL, remove_partial, write_atomic
from icon2_rt.pipeline.files import from_jsonl, sha256, to_json, to_jsonl
from icon2_rt.pipeline.folder import RunFolder


def test_a_failed_write_leaves_the_old_content_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a: No space left on device") as caught:
        write_atomic(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_size_limit_hit_for_real(tmp_path: Path) -> None:
    """The system itself refuses in the middle of the write, as a full disk does."""
    script = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, {str(Path(atomic.__file__).parent)!r})
import atomic
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    atomic.write_atomic(Path({str(tmp_path / "big")!r}), b"x" * 100_000)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """As another user where this is root, whom permissions do not stop."""
    tmp_path.chmod(0o555)
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(atomic.__file__).parent)!r})
import atomic
from pathlib import Path
if os.getuid() == 0:
    os.setuid(65534)
try:
    atomic.write_atomic(Path({str(tmp_path / "a")!r}), b"x")
except OSError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tmp_path.chmod(0o755)
    assert done.stdout.startswith("PermissionError")
    assert "cannot write" in done.stdout


def test_partial_files_are_swept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / f"data/.shard{PARTIAL}").write_bytes(b"half")
    (tmp_path / "data/shard").write_bytes(b"whole")
    remove_partial(tmp_path)
    assert os.listdir(tmp_path / "data") == ["shard"]


def test_a_run_begins_by_sweeping_what_a_killed_one_left_half_written(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.write("one", {"data/1": b"abc"})
        folder.write_manifest({"identity": {}})
    left = [tmp_path / "run" / name for name in (f"data/.2{PARTIAL}", f"steps/.two{PARTIAL}", f".report{PARTIAL}")]
    for path in left:
        path.write_bytes(b"half")
    with RunFolder(tmp_path / "run") as folder:
        assert not any(path.exists() for path in left)
        assert folder.finished("one") is not None


def test_json_lines() -> None:
    records = [{"a": "ü\u2028\n", "b": 1}, {"a": None}]
    assert list(from_jsonl(to_jsonl(records), "x")) == records
    for bad, message in ((b'{"a": 1}\n[1]\n', "line 2"), (b"{\n", "line 1"), (b"\xff", "UTF-8")):
        with pytest.raises(ValueError, match=message):
            list(from_jsonl(bad, "x"))
    with pytest.raises(ValueError):
        to_json({"a": float("nan")})


def test_an_artifact_counts_only_if_whole_and_of_the_same_inputs(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        assert folder.finished("one") is None
        one = folder.write("one", {"a/1": b"abc", "a/2": b""}, facts={"n": 3})
        two = folder.write("two", {"b": b"x"}, inputs=[one])
        assert folder.finished("one") == one
        assert folder.finished("two", [one]) == two
        assert folder.finished("two") is None  # made from something else
        other = folder.write("one", {"a/1": b"abc", "a/2": b""}, facts={"n": 4})
        assert folder.finished("two", [other]) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "a").write_bytes(b"ab"),  # truncated
        lambda run: (run / "a").write_bytes(b"abd"),  # one bit elsewhere
        lambda run: (run / "a").unlink(),
        lambda run: (run / "steps/one.json").write_bytes(b'{"files": {'),
        lambda run: (run / "steps/one.json").write_bytes(b"[]"),
        lambda run: (run / "steps/one.json").write_bytes(b'{"files": 3, "inputs": {}, "facts": {}}'),
        lambda run: (run / "steps/one.json").unlink(),
    ],
)  # fmt: skip
def test_a_damaged_artifact_is_made_again(tmp_path: Path, damage) -> None:
    with RunFolder(tmp_path) as folder:
        written = folder.write("one", {"a": b"abc"})
        damage(tmp_path)
        assert folder.finished("one") is None
        assert folder.write("one", {"a": b"abc"}) == written
        assert folder.finished("one") == written


def test_a_crash_at_any_write_loses_nothing_and_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that reaches the disk is made the last one, in turn; afterwards an artifact is old, new or absent."""

    class Killed(BaseException):
        pass

    real = {name: getattr(os, name) for name in ("replace", "fsync", "unlink")}
    survived = 0
    for crash in range(100):
        run = tmp_path / str(crash)
        with RunFolder(run) as folder:
            folder.write_manifest({"identity": {}})
            folder.write("one", {"a": b"old", "b": b"same"})
            calls = 0

            def dies(name: str, *arguments: object, crash: int = crash) -> object:
                nonlocal calls
                calls += 1
                if calls > crash:
                    raise Killed
                return real[name](*arguments)

            for name in real:
                monkeypatch.setattr(os, name, lambda *a, name=name: dies(name, *a))
            try:
                new = folder.write("one", {"a": b"new", "b": b"same"})
            except Killed:
                new = None
            monkeypatch.undo()
        with RunFolder(run) as folder:
            found = folder.finished("one")
            assert (run / "a").read_bytes() in (b"old", b"new")
            if found is not None:
                assert found.files == {name: sha256((run / name).read_bytes()) for name in ("a", "b")}
            again = folder.write("one", {"a": b"new", "b": b"same"})
            assert folder.finished("one") == again
            assert (run / "a").read_bytes() == b"new"
        if new is not None:
            survived += 1
            break
    assert survived
    assert crash >= 4  # several places were tried


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(ValueError, match=f"another run .process {os.getpid()}. is at work"):
        RunFolder(tmp_path)
    RunFolder(tmp_path).close()


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(file)
    with pytest.raises(ValueError, match="holds other things"):
        RunFolder(tmp_path)
    with RunFolder(tmp_path / "run") as folder:
        for text in ("{", "[]", '{"a": 1}'):
            (tmp_path / "run/manifest.json").write_text(text)
            with pytest.raises(ValueError, match=r"manifest\.json"):
                folder.manifest()
        folder.write_manifest({"identity": {}})
        assert folder.manifest() == {"identity": {}}


def test_strangers_in_the_data_are_seen(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write("one", {"data/1": b"", "data/2": b""})
        assert folder.strangers("data", ["data/1", "data/2"]) == []
        assert folder.strangers("data", ["data/1"]) == ["2"]


def test_the_log_is_the_only_file_with_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.log("started", n=1)
        folder.log("finished")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "finished"]
