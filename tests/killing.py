"""Programs that fork attempts at a piece of work and kill them: what the tests of SIGKILL share. A program begins with KILLING and ends by printing JSON."""

# `kill_at` dies before the call of a number among those that change the file system, and lists them; `attempt_of` runs work in a child;
# `tree` is a directory's files and hashes. The program's own part sets `place`, a directory for notes.
KILLING = """
import hashlib, json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch

torch.set_num_threads(1)  # the parent starts no threads that a child would miss
CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "open", "ftruncate", "link", "symlink")


def kill_at(number):
    calls = []
    def guarded(name, function):
        def call(*arguments, **keywords):
            if name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                calls.append(name)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return call
    for name in CALLS:
        setattr(os, name, guarded(name, getattr(os, name)))
    return calls


def attempt_of(work, number=0):
    child = os.fork()
    if child:
        return child
    try:
        started = time.monotonic()
        calls = kill_at(number)
        work()
        (place / "calls").write_text(str(len(calls)))
        (place / "seconds").write_text(str(time.monotonic() - started))
        os._exit(0)
    except BaseException as error:
        code = getattr(error, "exit_code", 99)  # a refusal's own
        (place / "error").write_text(str(error) if code != 99 else f"{type(error).__name__}: {error}")
        os._exit(code)


def ended(child):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1, -9), (place / "error").read_text()
    return code


def tree(path):
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.rglob("*")) if file.is_file()}
"""
