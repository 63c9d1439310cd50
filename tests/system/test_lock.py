"""One writer a folder: the second is refused, a kill lets go, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from processes import ENVIRONMENT, exit_line

from sepo.errors import InputError
from sepo.system.lock import contents, lock

HOLD = """
import sys, time
from sepo.system.lock import lock
with lock(sys.argv[1], *sys.argv[2:]):
    print("held", flush=True)
    time.sleep(30)
"""
TAKE = """
import sys
from sepo.errors import exit_with_one_line
from sepo.system.lock import lock
def main():
    with lock(sys.argv[1]):
        pass
exit_with_one_line(main)
"""


def hold(*arguments):
    """Another process that holds a folder."""
    process = start_python(HOLD, *arguments)
    assert process.stdout.readline() == "held\n"
    return process


def start_python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_process_is_refused_and_a_kill_lets_go(tmp_path):
    folder = tmp_path / "a" / "b"
    other = hold(folder)
    try:
        line = exit_line("-c", TAKE, folder)
        assert line.startswith(
            f"sepo: error: {folder} is being written to by process {other.pid} on "
        )
        with lock(folder, "another name"):
            pass
        assert contents(folder) == []
    finally:
        end(other)
    assert [p.name for p in folder.iterdir()] == [".sepo.lock"]  # no kill takes it away
    with lock(folder):
        pass
    assert list(folder.iterdir()) == []


def test_what_was_made_and_stayed_empty_goes_again(tmp_path):
    with lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError), lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
        raise RuntimeError
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_holder_may_take_it_again_and_keeps_it_to_the_end(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "out")
    with lock(tmp_path / "out"):
        with lock(link):
            pass
        line = exit_line("-c", TAKE, tmp_path / "out")
        assert f"process {os.getpid()} on" in line
    with lock(tmp_path / "out"):
        pass


def test_another_thread_is_another_holder(tmp_path):
    refused = []

    def take():
        try:
            with lock(tmp_path):
                pass
        except InputError as error:
            refused.append(str(error))

    with lock(tmp_path):
        thread = threading.Thread(target=take)
        thread.start(), thread.join()
    assert len(refused) == 1 and f"process {os.getpid()}" in refused[0]


FORK = """
import os, sys, time
from sepo.system.lock import lock
with lock(sys.argv[1]):
    if not os.fork():  # the child speaks, when it has let go
        print(os.getpid(), flush=True)
    time.sleep(30)
"""


def test_what_a_killed_process_has_forked_does_not_hold_on(tmp_path):
    """A worker outlives it, with all that was open."""
    process = start_python(FORK, tmp_path)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(InputError, match=f"by process {process.pid} on"), lock(tmp_path):
            pass
        process.kill(), process.wait()
        os.kill(child, 0)  # it is there
        with lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        end(process)


def below_a_file(path):
    (path / "file").touch()
    return path / "file" / "out", f"{path / 'file'}, a file"


def a_file(path):
    (path / "file").touch()
    return path / "file", "a file"


def read_only(path):
    if os.geteuid():
        path.chmod(0o500)
        return path / "out", "Permission denied"
    return "/proc/out", "No such file or directory"  # root may write to any other


def too_long(path):
    return path / ("x" * 300), "File name too long"


def of_the_kernel(path):
    return "/proc", "one in which no file can be made"


@pytest.mark.parametrize("make", [below_a_file, a_file, read_only, too_long, of_the_kernel])
def test_a_folder_that_can_not_be_written_to(tmp_path, make):
    folder, found = make(tmp_path)
    with pytest.raises(InputError, match=f"{folder}: expected a folder to write to, got {found}"):
        with lock(folder):
            raise AssertionError("held")
