"""Programs that fork attempts at a piece of work and disturb them, with kills or a full disk: what
the tests of faults share.

A driver process imports torch and transformers once and forks each attempt. A program begins with
FORKING and ends by printing JSON; where the work is one command with an output of its own, RESUMING
does the rest: whatever the fault, the output is absent or whole, and --resume ends with the bytes
of an undisturbed run.
"""

import json
import os
import subprocess
import sys
import tempfile

# `kill_at` dies before the call of a number among those that change the file system, and lists
# them; `fill_after` lets the disk be full after so many bytes, and counts them; `attempt_of` runs
# work in a child, and `said` is what that wrote to stderr; `tree` is a file's hash, or those of a
# directory's files. The program's own part sets `place`, a directory for notes.
FORKING = """
import builtins, errno, hashlib, io, json, os, random, re, shutil, signal, sys, time
from pathlib import Path
import torch

torch.set_num_threads(1)  # the parent starts no threads that a child would miss
CALLS = "rename replace unlink rmdir mkdir fsync open ftruncate link symlink".split()


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


def fill_after(room):
    # As Linux does it: of a write that doesn't fit as a whole, what fits is written without an
    # error; the next one fails.
    written = [0]
    def taken(nbytes, whole=False):
        left = nbytes if room is None else room - written[0]
        if nbytes and left < (nbytes if whole else 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written[0] += min(nbytes, left)
        return min(nbytes, left)
    class Limited(io.FileIO):
        def write(self, content):
            content = memoryview(content).cast("B")
            return super().write(content[: taken(len(content))])
    opened, pwrite, fallocate = open, os.pwrite, os.posix_fallocate
    def limited(path, mode="r", buffering=-1, **more):
        if buffering == 0 and "+" in mode:
            return Limited(path, mode)
        return opened(path, mode, buffering, **more)
    builtins.open = limited
    def limited_pwrite(file, content, position):
        return pwrite(file, content[: taken(len(content))], position)
    def limited_fallocate(file, start, nbytes):
        return fallocate(file, start, taken(nbytes, whole=True))
    os.pwrite, os.posix_fallocate = limited_pwrite, limited_fallocate
    return written


def attempt_of(work, number=0, room=None):
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        os.dup2(os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        started = time.monotonic()
        calls, written = kill_at(number), fill_after(room)
        try:
            work()
        except SystemExit as ending:
            code = ending.code or 0
        if not code:
            (place / "calls").write_text(str(len(calls)))
            (place / "bytes").write_text(str(written[0]))
            (place / "seconds").write_text(str(time.monotonic() - started))
    except BaseException as error:
        code = getattr(error, "exit_code", 99)  # a refusal's own
        os.write(2, (str(error) if code != 99 else f"{type(error).__name__}: {error}").encode())
    os._exit(code)


def said():
    return (place / "said").read_text()


def ended(child):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1, -9), said()
    return code


def tree(path):
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }
"""

# The program's own part has set `place` and `work(out, **options)`, which takes resume=True.
RESUMING = """
def attempt(out, number=0, room=None, **options):
    return attempt_of(lambda: work(out, **options), number, room)


whole = place / "whole"
assert ended(attempt(whole)) == 0, said()
expected, duration = tree(whole), float((place / "seconds").read_text())
count, nbytes = int((place / "calls").read_text()), int((place / "bytes").read_text())
out = place / "out"
report = {"faults": 0, "wrong": [], "files": len(expected), "calls": count, "bytes": nbytes}


def check(note):
    if out.exists() and tree(out) != expected:
        report["wrong"].append(f"{note}: the output differs")


def finish(note):
    # The same command again until it is done.
    code = ended(attempt(out, resume=True))
    if code or tree(out) != expected:
        report["wrong"].append(f"{note}: --resume ends with {code} {said() if code else ''}")
    expected_rest = (out, place / "out.tmp")  # the latter of a file that a kill left
    rest = sorted(path.name for path in place.glob("out*") if path not in expected_rest)
    if rest:
        report["wrong"].append(f"{note}: {rest} are left")
    for path in place.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
"""

# Needs KILLS; `options()` may choose some for each.
RANDOM_KILLS = """
random.seed(3)
for number in range(3 * KILLS):
    if report["faults"] >= KILLS:
        break
    chosen = options() if "options" in globals() else {}
    for again in range(random.choice([1, 1, 2, 3])):
        child = attempt(out, resume=again > 0, **chosen)
        time.sleep(duration * random.random())
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        report["faults"] += code == -9
        check(f"attempt {number}")
        if code == 0:
            # Spread over the time that a run takes, learnt anew from each that was not hit: the
            # first may have been slow for reasons of its own.
            if not again:
                duration = min(duration, float((place / "seconds").read_text()))
            break
    finish(f"attempt {number}")
print(json.dumps(report))
"""

# Needs `numbers`: before which calls.
KILLS_AT_CALLS = """
for number in numbers:
    assert ended(attempt(out, number)) == -9, number
    report["faults"] += 1
    check(f"call {number}")
    finish(f"call {number}")
print(json.dumps(report))
"""

# Needs `rooms`: after which numbers of bytes; the run after each second of them finds half as much,
# which may be enough.
FULL_DISKS = """
for number, room in enumerate(rooms):
    note = f"room for {room} of {nbytes} bytes"
    codes = [ended(attempt(out, room=room))]
    lines = [said().splitlines()]
    check(note)
    if number % 2:
        codes.append(ended(attempt(out, room=room // 2, resume=True)))
        lines += [said().splitlines()] if codes[1] else []
        check(note)
    report["faults"] += codes.count(1)
    refusal = re.compile("Error: .*No space left on device.*; ")
    if codes[0] != 1 or any(len(each) != 1 or not refusal.match(each[0]) for each in lines):
        report["wrong"].append(f"{note}: {codes}, {lines}")
    finish(note)
print(json.dumps(report))
"""


def drive(tmp_path, program: str, *arguments: object, timeout: float = 400) -> dict:
    """Run a program that ends by printing a JSON object. It is given the arguments, and behind them
    a place: in memory where there is such a one, because what is tested is the order of calls, and
    a disk would take a second for the flushes of each run.
    """
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    ) as place:
        command = [sys.executable, "-c", program, *map(str, arguments), place]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
