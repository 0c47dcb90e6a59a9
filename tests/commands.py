"""Commands without the seconds of loading the library: in this process, or forked from one that has it."""
import ctypes
import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pkgutil import resolve_name

from sources import commands

from biomass_kit.command import ask

FORKS = multiprocessing.get_context("forkserver")
# and so all that is heavy
LOADED = ["biomass_kit.evidence.search", "biomass_kit.inference.predict", "biomass_kit.training.run"]
FORKS.set_forkserver_preload(LOADED)
STARTED = []  # every process, so that none outlives the tests


def entry(name):
    "The function behind `biomass_<name>`: takes words, ends by SystemExit where it fails."
    return resolve_name(commands()[f"biomass_{name}"])


def command(name, *words):
    "A command called with words in this process; its exit code and what it printed, warnings among it."
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        answer = ask(entry(name), *words)
    return subprocess.CompletedProcess((name, *words), *answer)


class Started:
    """A process of its own that runs a function of a test's module, or of the library.

    It has a number, takes signals and ends with a code as any other, but begins with the library loaded.
    """

    def __init__(self, function, *arguments, log, **environment):
        self.log = log
        self.process = FORKS.Process(target=_run, args=(function, arguments, str(log), environment))
        self.process.start()
        STARTED.append(self)
        self.pid = self.process.pid

    def runs(self): return self.process.is_alive()

    def send(self, signal): os.kill(self.pid, signal)

    def kill(self):
        self.process.kill()
        self.process.join()

    def wait(self, seconds=300):
        "Its exit code."
        self.process.join(seconds)
        assert not self.runs(), f"still busy after {seconds} s: {self.said()}"
        return self.process.exitcode

    def wait_for(self, condition, seconds=120):
        "Until something is so while the process runs."
        until = time.monotonic() + seconds
        while not condition() and self.runs() and time.monotonic() < until: time.sleep(0.01)
        assert condition(), f"never; the process {'is still busy' if self.runs() else 'ended'}: {self.said()}"

    def said(self):
        "What it printed, on either stream."
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def _run(function, arguments, log, environment):
    "In the new process: print into a file, and be called with those arguments."
    with open(log, "wb") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)
    os.environ.update(environment)
    gc.freeze()  # as in conftest.py
    code = 0
    try: function(*arguments)
    except SystemExit as e: code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    ctypes.pythonapi.Py_Exit(code)  # Python's own way out, threads and all; multiprocessing has a shorter one


def run_command(name, *words):
    "For `Started`: a command as a person starts it, Ctrl-C and way out included."
    sys.argv = [f"biomass_{name}", *map(str, words)]
    entry(name)()


def share(processes, function, *arguments, log):
    """Start a function in several processes that know of each other as those of torchrun do.

    Ends with what all of them printed; each has to end well.
    """
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    world = {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    started = []
    for rank in range(processes):
        mine = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        file = log.with_name(f"{log.name}-{rank}")
        started.append(Started(function, *arguments, log=file, **world, **mine))
    codes = [p.wait() for p in started]
    said = "".join(p.said() for p in started)
    assert codes == [0] * processes, said[-3000:]
    return said


def end_all():
    "No process of a failed test goes on by itself."
    for p in STARTED:
        if p.runs(): p.kill()
