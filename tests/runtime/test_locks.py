import fcntl
import os
import socket

import pytest
from holding import held

from nepa_plugin.runtime.locks import FolderInUseError, lock_folder


def test_another_process_is_kept_out_until_the_holder_ends(tmp_path):
    folder = tmp_path / "new" / "out"
    with held(folder) as pid:
        with pytest.raises(FolderInUseError) as error:
            lock_folder(folder, "--out")
        holder = f"process {pid} on {socket.gethostname()}"
        assert str(error.value) == f"{folder} is in use by {holder}. Wait for it, stop it, or choose another --out."
    lock = lock_folder(folder, "--out")  # it was killed: the lock went with it
    assert (folder / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    lock.close()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.warns(UserWarning, match="without locks: let no other run write to it"):
        assert lock_folder(tmp_path, "--out") is None


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderInUseError, match=r"--out: .*file/out cannot be written to: Not a directory"):
        lock_folder(tmp_path / "file" / "out", "--out")
