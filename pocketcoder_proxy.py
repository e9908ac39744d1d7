#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["tornado>=6.2"]
# ///
"""pocketcoder-proxy: run an agent's commands in a tmux window of its sandbox.

    POST /exec ──▶ Endpoint ──▶ PocketCoderDriver ──▶ Tmux (tmux -C) ──▶ pane's shell
                      ▲                │  ▲                                   │
                      │                │  └── status  RUN "start" "exit" ◀────┤ . RUN/go
                   answer ◀── Output ◀─┼───── RUN.out     its output     ◀────┘
                                       └────▶ the pane's tty: a person watches

Sections, top to bottom; each uses only what stands above it:
  Settings          limits, timeouts, defaults, variables of the environment
  Errors            one hierarchy, and what each error answers
  Wire types        what callers send and get
  Tmux              the control connection: commands, replies, notices
  Execution Driver  terminals, runs, output, exit codes, cancel, timeouts
  State and tools   what handlers share
  Transports        HTTP: the gate, handlers, endpoints, ROUTES
  Application       command line, start and stop

Routes:     GET /health, POST /exec
Read from the environment: POCKETCODER_HOST POCKETCODER_TOKEN POCKETCODER_WORKSPACE
            TMUX_SESSION TMUX_SOCKET
Set for a command: POCKETCODER_RUN_ID POCKETCODER_AGENT POCKETCODER_SESSION_ID
            POCKETCODER_USAGE_ID, and QUIET_PROGRAMS
tmux:       attach-session      the one long-lived control connection
            new-session new-window split-window respawn-pane   make a terminal
            set-option          keep a window's name; no synchronized panes; room for four
            select-layout       make room for one more pane
            list-panes          what there is
            display-message     a pane's cursor and history: they tell whether somebody typed
            if-shell send-keys  type the line, but only if nobody did; C-c; copy-mode -q
            has-session         `session_exists`
Files of a run, SOCKET.d/DRIVER/RUN.*:
            go (sourced by the pane's shell)  in (stdin)  cmd (a long command)
            pid (claims the run; then the exit code)
            FIFOs: done (from us)  out, err (output)  and one `status` (to us) for all runs

Not done on purpose:
  no reading of the screen    it wraps, scrolls and lies; FIFOs do not
  no sourcing of the command  2 ms faster, but the pane's aliases would apply
  no user or file isolation   the container is the sandbox, we are its hands

To add a route: a coroutine `…_handler`, an `Endpoint`, a row in ROUTES, a line here.
"""

from __future__ import annotations

import os
import sys

# ==========================================================================
# Settings                                                        budget 90
# ==========================================================================
# S1  Every limit, time and default is here, with its unit.  Times in seconds.
VERSION = "0.1.0"
KIB, MIB = 1024, 1024 * 1024

DEFAULT_PORT = 3001
DEFAULT_SOCKET = "/tmp/tmux/pocketcoder"
DEFAULT_SESSION = "pocketcoder"
QUIET_PROGRAMS = {  # nobody may be there to page or to answer
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    "MANPAGER": "cat",
    "GIT_TERMINAL_PROMPT": "0",
    "DEBIAN_FRONTEND": "noninteractive",
}

MAX_BODY = 16 * MIB  # bytes of a request
MAX_COMMAND = 8 * MIB  # bytes of `cmd`
MAX_ARGUMENT = 128 * KIB  # MAX_ARG_STRLEN, execve(2): one argument with its NUL
MAX_ENVIRONMENT = 512 * KIB  # of `env`; execve(2) takes a quarter of the stack for all
MAX_OUTPUT, DEFAULT_OUTPUT = 64 * MIB, MIB  # `max_output`, bytes
MAX_TIMEOUT, DEFAULT_TIMEOUT = 86400, 300  # `timeout`
MAX_PANES, MAX_QUEUE = 4, 64  # of one agent
MAX_VIEW = 64 * KIB  # bytes a run shows to a person: about what tmux keeps, at a few ms of its time
MAX_VIEW_COMMAND = 4 * KIB  # characters of the command shown
CHUNK = MIB  # bytes read at once; also the size wanted of a pipe

TMUX_TIMEOUT = 5.0  # a reply of tmux
START_TIMEOUT = 1.0  # from the typed line to the start report
NEW_SHELL_TIMEOUT = 15.0  # the same while a new shell may read its start-up files
PROMPT_TIMEOUT = 0.5  # a shell that has just ended a command shows its prompt
QUEUE_CHECK = 0.5  # look again whether a person's program has ended
WATCH_PAUSE = 0.5  # look again whether the shell of a run lives: tmux may not tell
QUEUE_TIMEOUT = 3600.0  # longest wait for a pane
RETURN_TIMEOUT = 2.0  # from the exit report to the prompt
CLEAR_PAUSE = 0.05  # for a shell to take a key; shorter than anybody types a line
DRAIN_PAUSE = 0.01  # between reads of what outlives its run: 100 MB/s
VIEW_DELAY = 0.005  # a command that ends sooner is shown at its end
VIEW_TIMEOUT = 0.2  # the copy on the terminal may delay the prompt by that
STOP_GRACE = 5.0  # SIGTERM: running commands may still end
KEEP_ALIVE = 15.0  # between comments on a silent stream
BODY_TIMEOUT = 60.0  # for a body to arrive
IDLE_TIMEOUT = 300.0  # of a kept connection
SLOW_READER_TIMEOUT = 60.0  # a reader gets that for the rest of an ended command


def default_agent_name() -> str:
    """The agent whose terminal is used when the caller names none."""
    return "poco"


# ------------------------------- the line ---------------------------------
import argparse
import asyncio
import codecs
import contextlib
import fcntl
import gc
import hmac
import ipaddress
import json
import logging
import re
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import termios
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import tornado.httpserver
import tornado.netutil
import tornado.web

__all__ = ["AppState", "Cli", "CommandResult", "Commands", "ExecRequest", "ExecResponse", "McpQuery"]
__all__ += ["PocketCoderDriver", "default_agent_name", "exec_handler", "health_handler", "main"]
log = logging.getLogger("pocketcoder")


# ==========================================================================
# Errors                                                          budget 50
# ==========================================================================
# E1  A command that fails is a result; a proxy that cannot do its job is an error.
# E2  Each class carries its answers; nothing else maps errors to numbers.
#     What is HTTP's alone (401, 404, 405, 413, 415) is Tornado's HTTPError.
class ProxyError(Exception):
    """Ours, and unexpected."""

    http_status = 500
    exit_code = 125  # as `timeout` of coreutils: the command could not be run


class ProtocolError(ProxyError):
    """The caller has to change something."""

    http_status = 400


class BadMessage(ProtocolError):
    """The shape, type or size of what was sent."""

    exit_code = 2


class Forbidden(ProtocolError):
    """`Origin` or `Host` is not one of ours."""

    http_status = 403


class SandboxError(ProxyError):
    """The sandbox cannot run it now; nothing was run."""

    http_status = 503


class NoTerminal(SandboxError):
    """tmux is missing or refuses, or the shell in its pane does not answer."""


class Busy(SandboxError):
    """The queue is full, or the proxy is stopping."""


# ==========================================================================
# Wire types                                                     budget 135
# ==========================================================================
# W1  What comes from outside is checked here, once; nobody checks it again.
# W2  A complaint names the field, what was got and what was expected.
Message = dict[str, Any]
AGENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def complain(name: str, got: object, expected: str) -> BadMessage:
    """A BadMessage that shows the start of what was got."""
    shown = ascii(got[:80] if isinstance(got, str) else got)
    shown = shown if len(shown) <= 90 else shown[:80] + "..."
    return BadMessage(f"`{name}`: got {shown}, expected {expected}")


def check_text(name: str, got: object, expected: str, limit: int, nul: bool = False) -> str:
    """Return `got`, a string that a process can take; raise BadMessage."""
    if not isinstance(got, str):
        raise complain(name, got, expected)
    if "\0" in got and not nul:
        raise complain(name, got, f"{expected} without NUL")
    try:
        size = len(got.encode())
    except UnicodeEncodeError:
        raise complain(name, got, f"{expected} in Unicode, without lone surrogates") from None
    if size > limit:
        raise complain(name, got, f"{expected} of at most {limit} bytes (it has {size})")
    return got


def inside(workspace: str, cwd: str) -> str:
    """The real path of a directory in `workspace`, itself a real path.  Raises BadMessage."""
    path = os.path.realpath(os.path.join(workspace, cwd)) if cwd else workspace
    if cwd and os.path.commonpath([workspace, path]) != workspace:
        raise complain("cwd", cwd, f"a directory inside the workspace {workspace}")
    if not os.path.isdir(path):
        raise complain("cwd", cwd, f"a directory (there is none at {path})")
    return path


@dataclass(frozen=True)
class McpQuery:
    """Query parameters for established sessions."""

    session_id: str | None = None


@dataclass(frozen=True)
class ExecRequest:
    """A command to run; the fields of `POST /exec`.  Raises BadMessage."""

    cmd: str
    cwd: str = ""  # a caller's: in the workspace; the driver's own: absolute, "" stays
    usage_id: str | None = None
    session_id: str | None = None
    agent_name: str = field(default_factory=default_agent_name)
    timeout: float = DEFAULT_TIMEOUT  # seconds from the start of the command
    stdin: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    max_output: int = DEFAULT_OUTPUT  # bytes

    def __post_init__(self) -> None:
        if not check_text("cmd", self.cmd, "a bash command", MAX_COMMAND):
            raise complain("cmd", self.cmd, "a bash command, not an empty string")
        check_text("cwd", self.cwd, "a directory in the workspace", 4 * KIB)
        for name, limit in (("usage_id", 4 * KIB), ("session_id", 4 * KIB), ("stdin", MAX_BODY)):
            if (value := getattr(self, name)) is not None:
                check_text(name, value, "a string or null", limit, nul=name == "stdin")
        if not (isinstance(self.agent_name, str) and AGENT_NAME.fullmatch(self.agent_name)):
            raise complain("agent_name", self.agent_name, f"a name like {AGENT_NAME.pattern}")
        if type(self.timeout) not in (int, float) or not 0 < self.timeout <= MAX_TIMEOUT:
            raise complain("timeout", self.timeout, f"seconds, 0 < timeout <= {MAX_TIMEOUT}")
        if type(self.max_output) is not int or not 1 <= self.max_output <= MAX_OUTPUT:
            raise complain("max_output", self.max_output, f"an integer, 1 to {MAX_OUTPUT} (bytes)")
        if not isinstance(self.env, dict):
            raise complain("env", self.env, "an object of strings")
        for key, value in self.env.items():
            if not key or "=" in check_text("env", key, "names of variables", 4 * KIB):
                raise complain("env", key, "names of variables, not empty, without `=`")
            check_text(f"env.{key[:40]}", value, "a string", MAX_ARGUMENT - 5 * KIB)
        if (size := sum(len(f"{key}{value}".encode()) for key, value in self.env.items())) > MAX_ENVIRONMENT:
            raise complain("env", f"{size} bytes", f"at most {MAX_ENVIRONMENT}")

    @classmethod
    def from_wire(cls, body: bytes, workspace: str) -> ExecRequest:
        """Read a JSON body: unknown fields are ignored, `cwd` is made absolute."""
        try:
            got = json.loads(body.decode(), parse_constant=float)
        except (ValueError, RecursionError) as wrong:
            raise BadMessage(f"body: expected a JSON object in UTF-8, got: {wrong}") from None
        if not isinstance(got, dict):
            raise complain("body", got, "a JSON object")
        if "cmd" not in got:
            raise BadMessage("`cmd`: got nothing, expected a bash command")
        got["cwd"] = inside(workspace, check_text("cwd", got.get("cwd", ""), "a directory", 4 * KIB))
        return cls(**{name: got[name] for name in cls.__dataclass_fields__ if name in got})


@dataclass(frozen=True)
class CommandResult:
    """How a run ended.  `exit_code` is the shell's; see ENDINGS for the others."""

    output: str  # stdout and stderr combined
    exit_code: int
    ended: str = "exit"  # a key of ENDINGS
    error: str | None = None
    truncated: bool = False
    output_bytes: int = 0
    duration_ms: int = 0
    run_id: str = ""


@dataclass(frozen=True)
class ExecResponse:
    """The answer of `POST /exec`; what does not apply is None."""

    stdout: str | None = None
    exit_code: int | None = None
    error: str | None = None
    ended: str | None = None
    truncated: bool | None = None
    output_bytes: int | None = None
    duration_ms: int | None = None
    run_id: str | None = None

    @classmethod
    def of(cls, result: CommandResult, stdout: str | None) -> ExecResponse:
        return cls(stdout, *(getattr(result, name) for name in cls.__dataclass_fields__ if name != "stdout"))

    def to_wire(self) -> Message:
        return {name: value for name, value in vars(self).items() if value is not None}


# ==========================================================================
# Tmux                                                           budget 180
# ==========================================================================
# The only section that talks to tmux.
#
# T1  Commands go down one control connection; replies come back in their order.
# T2  Panes and windows are addressed by id; names are for finding.
# T3  Nothing here reads a screen.
PANE_FORMAT = (
    "#{pane_id} #{window_id} #{pane_pid} #{pane_dead} #{pane_in_mode} #{pane_width} #{pane_tty} #{window_name}"
)
# Changes when somebody types, or anything is shown; not a person's last look at it.
PANE_STATE = "#{cursor_x} #{cursor_y} #{history_size} #{pane_in_mode} #{pane_synchronized}"


class Pane(NamedTuple):
    """A pane, as tmux described it when asked."""

    pane_id: str
    window_id: str
    pid: int
    dead: int
    in_mode: int
    width: int
    tty: str
    window_name: str

    @classmethod
    def parse(cls, line: str) -> Pane:
        pane, window, *numbers, tty, name = line.split(" ", 7)
        pid, dead, mode, width = (int(number or 0) for number in numbers)
        return cls(pane, window, pid, dead, mode, width, tty, name)


def quote(word: str) -> str:
    """One word of a tmux command line; as a shell's, but never a variable or a format."""
    return "'" + word.replace("'", "'\\''") + "'"


def find_shell() -> str:
    """The path of bash, else of sh, that is not this very file under a shell's name."""
    folders = [*os.environ.get("PATH", "").split(":"), "/bin", "/usr/bin", "/usr/local/bin"]
    for shell in (f"{folder}/{name}" for name in ("bash", "sh") for folder in folders if folder):
        if os.access(shell, os.X_OK) and not os.path.samefile(shell, __file__):
            return shell
    raise NoTerminal("no bash and no sh in PATH: install one")


class Tmux(asyncio.SubprocessProtocol):
    """A control connection (`tmux -C`) to our session.  Raises NoTerminal."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.loop = asyncio.get_running_loop()
        self.attached: asyncio.Future[list[str]] = self.loop.create_future()
        self.replies: deque[asyncio.Future[list[str]]] = deque()
        self.unread = b""
        self.block = ""  # what stood behind `%begin`, and will behind `%end`
        self.lines: list[str] = []
        self.closed, self.ended = False, asyncio.Event()  # of no use any more; its process is gone
        self.notices = 0  # how many there were: what was asked before may be old
        self.on_notice: Callable[[], None] = lambda: None  # after some, and at the end

    @classmethod
    async def connect(cls, path: str, session: str, create: list[str] | None) -> Tmux:
        """Attach to `session` at the socket `path`; `create`: words that make it if missing."""
        hidden = ("POCKETCODER_TOKEN", "POCKETCODER_RUN_ID", "TMUX", "TMUX_PANE")
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        words = ["attach-session", "-t", f"={session}"]
        if create is not None:
            words = ["new-session", "-A", "-s", session, "-x", "200", "-y", "50"]
        command = ["tmux", "-S", path, "-C", *words, "-f", "no-output,ignore-size", *(create or [])]
        try:  # default-shell is taken from SHELL, which may be this very file
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            _, self = await asyncio.get_running_loop().subprocess_exec(
                lambda: cls(session), *command, env=variables | {"SHELL": find_shell()}
            )
        except OSError as missing:
            raise NoTerminal(f"cannot run tmux ({missing}): install tmux 3.2 or later") from None
        try:
            await self.reply(self.attached)
        except BaseException:
            self.close()
            raise
        self.send(["set-option", "-t", f"={session}:", "default-size", "200x50"])
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.process: Any = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self.unread = (self.unread + data).split(b"\n")
        before = self.notices
        for line in (raw.decode(errors="replace") for raw in lines):
            word, _, rest = line.partition(" ")
            if self.block and word in ("%end", "%error") and rest == self.block:
                # The flags, last: 1 for the commands of this client, 0 for its own start.
                ours = rest.endswith(" 1") and self.replies
                future = self.replies.popleft() if ours else self.attached
                if word == "%error":
                    self._fail(future, " ".join(self.lines))
                elif not future.done():
                    future.set_result(self.lines)
                self.block = ""
            elif self.block:
                self.lines.append(line)
            elif word == "%begin":
                self.block, self.lines = rest, []
            elif fd == 2 or word == "%exit":
                self._fail(self.attached, line)
            else:
                self.notices += 1
        if self.notices > before:
            self.on_notice()

    def _fail(self, future: asyncio.Future[list[str]], why: str) -> None:
        if not future.done():
            future.set_exception(NoTerminal(f"tmux: {why}"))
            future.exception()  # not every reply is waited for

    def process_exited(self) -> None:
        self.close()
        self.on_notice()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def close(self, why: str = "the connection has ended") -> None:
        """End the connection, not the session."""
        self.closed = True
        self.process.close()
        for future in (self.attached, *self.replies):
            self._fail(future, why)

    def send(self, *commands: list[str]) -> asyncio.Future[list[str]]:
        """Write commands at once, so that nothing comes in between; the last one's reply.

        An empty command stands for the reply of what an `if-shell` before it runs.
        """
        futures = [self.loop.create_future() for _ in commands]
        self.replies.extend(futures)
        if self.closed:
            self._fail(futures[-1], "the connection has ended")
        lines = (" ".join(map(quote, words)) + "\n" for words in commands if words)
        self.process.get_pipe_transport(0).write("".join(lines).encode())
        return futures[-1]

    async def reply(self, future: asyncio.Future[list[str]]) -> list[str]:
        """Wait for a reply, TMUX_TIMEOUT seconds at most."""
        timer = self.loop.call_later(TMUX_TIMEOUT, self.close, f"no answer within {TMUX_TIMEOUT:g} s")
        try:
            return await future
        finally:
            timer.cancel()

    async def ask(self, *words: str) -> list[str]:
        """Run one command; the lines of its reply."""
        return await self.reply(self.send(list(words)))

    async def panes(self, window_id: str = "") -> list[Pane]:
        """All panes of a window, or of the session."""
        where = ["-t", window_id] if window_id else ["-s", "-t", f"={self.session}:"]
        return [Pane.parse(x) for x in await self.ask("list-panes", *where, "-F", PANE_FORMAT)]

    def send_keys(self, pane: Pane, state: str, *keys: str) -> asyncio.Future[list[str]]:
        """Press keys if the pane is in this state still; "": if only no mode would take them.

        The reply is empty if they were pressed.
        """
        words = " ".join(map(quote, ["send-keys", "-t", pane.pane_id, *keys]))
        same = f"#{{==:{PANE_STATE},{state}}}" if state else "#{==:#{pane_in_mode}#{pane_synchronized},00}"
        return self.send(["if-shell", "-F", "-t", pane.pane_id, same, words, "display-message -p no"], [])

    async def state(self, pane: Pane) -> str:
        """The pane's PANE_STATE."""
        return (await self.ask("display-message", "-p", "-t", pane.pane_id, PANE_STATE))[0]


# ==========================================================================
# Execution Driver                                              budget 1000
# ==========================================================================
# Runs commands in the window `<agent>:terminal`, one at a time per pane.
#
# D1  A run ends exactly once: by itself, timed out, cancelled or lost.
# D2  The exit code is what the shell reported, never guessed from output.
# D3  Only the run that holds a pane may type into it, and only at a prompt.
# D4  A line that was given up never starts: RUN.pid is made once, by go or by us.
#
# To add a way to end a run: a row in ENDINGS and a test named after it.
ENDINGS: dict[str, tuple[int | None, str | None]] = {  # exit code and error; None: as reported
    "exit": (None, None),
    "timeout": (124, "ended after {timeout:g} s: ask for a longer `timeout`, or start it in the background"),
    "cancelled": (None, "cancelled before its end"),
    "lost": (137, "lost: {why}; the next command starts a new terminal"),
}
ENDING_LADDER = ((signal.SIGTERM, 2.0), (signal.SIGKILL, 0.2), (signal.SIGKILL, 0.8))  # seconds to the next step
STOPPED = range(128 + signal.SIGSTOP, 128 + signal.SIGTTOU + 1)  # exit codes of a job that only stopped
SHELLS = {"bash": True, "zsh": True, "sh": False, "dash": False, "ash": False, "busybox": False}  # edits its line?
Take = Callable[[bytes], "Awaitable[None] | None"]

# Sourced by the pane's shell.  Backslashes are against aliases.  INT is trapped, since a
# command that dies of C-c would take go along.  `read` has a limit, or does not know one
# and fails: go waits for nobody who may be gone.  The last line is read before the next
# run may write this file anew.
GO = r"""\exec 8<>{run}.done 9<>{status}
\trap : INT
(
_pc=${{BASHPID-}}; [ "$_pc" ] || \read -r _pc _pd </proc/self/stat
set -C; \echo "$_pc" >{run}.pid || \exit
set +C; \echo "{run_id} start $_pc" >&9
\exec <{stdin} {outputs} 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-
\unset -f cd chpwd 2>/dev/null; \unset chpwd_functions POCKETCODER_TOKEN
\cd -- {cwd} || \exit
\export {variables}
\exec {command}
)
_pc=$?
\echo "$_pc" >>{run}.pid
\echo "{run_id} exit $_pc" >&9
\read -r -t 1 _pc <&8 2>/dev/null
{{ \echo "{run_id} back 0" >&9; \exec 8>&- 9>&-; \trap - INT; \unset _pc; \return 0; }}
"""


def go_script(request: ExecRequest, run: str, run_id: str, shell: str, outputs: Iterable[str]) -> dict[str, str]:
    """The files of a run: `go`; `in`, its stdin; `cmd`, where it is too long for an argument."""
    files, path = {}, shlex.quote(run)
    if request.stdin is not None:
        files["in"] = request.stdin
    command = [shell, "-c", request.cmd, os.path.basename(shell)]
    if len(request.cmd) > MAX_ARGUMENT // 4:  # characters of up to four bytes
        files["cmd"], command[2] = request.cmd, f'eval "$(cat {path}.cmd)"'
    if request.env:  # by env(1), which takes names that are none for a shell
        command = ["env", "--", *(f"{name}={value}" for name, value in request.env.items()), *command]
    variables = QUIET_PROGRAMS | {
        "POCKETCODER_RUN_ID": run_id,
        "POCKETCODER_AGENT": request.agent_name,
        "POCKETCODER_SESSION_ID": request.session_id or "",
        "POCKETCODER_USAGE_ID": request.usage_id or "",
    }
    targets = [f"{fd}<>{path}.{name}" for fd, name in enumerate(outputs, 1)]
    return files | {
        "go": GO.format(
            run=path,
            run_id=run_id,
            status=shlex.quote(f"{os.path.dirname(run)}/status"),
            cwd=shlex.quote(request.cwd or "."),
            variables=" ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
            command=shlex.join(command),
            stdin=f"{path}.in" if "in" in files else "/dev/null",
            outputs=" ".join(targets if len(targets) == 2 else [*targets, "2>&1"]),
        )
    }


def read_proc(pid: int, name: str, size: int = 4 * KIB) -> bytes:
    """A file of /proc, in one read: it may change in between.  Raises OSError."""
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
    try:
        return os.read(fd, size)
    finally:
        os.close(fd)


class Process(NamedTuple):
    """Of /proc/PID/stat, see proc(5)."""

    name: str
    state: str
    parent: int
    group: int
    foreground: int  # the process group that its terminal listens to

    @classmethod
    def read(cls, pid: int) -> Process:
        """Raises OSError when there is no such process."""
        head, _, tail = read_proc(pid, "stat").decode("latin-1").rpartition(")")
        state, parent, group, _, _, foreground, *_ = tail.split()
        if state in "ZX":
            raise ProcessLookupError(pid)
        return cls(head.partition("(")[2], state, int(parent), int(group), int(foreground))

    @classmethod
    def ended(cls, pid: int) -> bool:
        try:
            return not cls.read(pid)
        except OSError:
            return True


def processes_of(run_id: str, run: str, leader: int) -> set[int]:
    """The run's processes: its group, what carries its name or its output, and what descends from these."""
    mark, found, parents = f"POCKETCODER_RUN_ID={run_id}".encode(), set[int](), dict[int, int]()
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            process = Process.read(pid)
            parents[pid] = process.parent
            ours = process.group == leader or mark in read_proc(pid, "environ", 4 * MIB).split(b"\0")
            if ours or any(os.readlink(f"/proc/{pid}/fd/{fd}").startswith(f"{run}.") for fd in (1, 2)):
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


class Shell:
    """The shell in a pane: whether it waits for a command, and whether somebody has typed there."""

    def __init__(self, pane: Pane, new: bool) -> None:
        self.pane, self.loop = pane, asyncio.get_running_loop()
        self.owner = os.stat(pane.tty).st_uid
        self.ran = False  # a line of ours: it is through with its start-up files, and no script
        self.shown = False  # its prompt, in a way that can be told
        self.missed = 0  # lines in a row that it did not run
        # Nobody has typed: until then, for a new shell and just after a run; while the pane is in that state.
        self.quiet, self.state = NEW_SHELL_TIMEOUT * new and time.monotonic() + NEW_SHELL_TIMEOUT, ""
        self.last = ""  # its state at the prompt, when that was last known
        self.timer: asyncio.TimerHandle | None = None

    def look(self) -> str:
        """Whether it waits for a command: "ready", "perhaps" (it does not say), "soon", "busy"."""
        try:
            shell = Process.read(self.pane.pid)
            if shell.name == "tmux: server":  # forked, and about to become the shell
                return "soon"
            if shell.foreground != shell.group or shell.name not in SHELLS or not (self.ran or self._interactive()):
                return "busy"
            if not SHELLS[shell.name]:
                return "perhaps"
            tty = os.open(self.pane.tty, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                return "soon" if termios.tcgetattr(tty)[3] & termios.ICANON else "ready"
            finally:
                os.close(tty)
        except (OSError, termios.error):
            return "busy"

    def _interactive(self) -> bool:
        """It was not started with a script or with -c."""
        words = read_proc(self.pane.pid, "cmdline").decode("latin-1").split("\0")[1:-1]
        words = [word for word in words if word not in SHELLS]
        script = any(word[:1] not in "-+" for word in words) and "-i" not in words
        return not script and not any("c" in word for word in words if word[:2] != "--")

    async def at_prompt(self) -> bool:
        """Whether it waits for a command, or will in a moment."""
        deadline = time.monotonic() + (PROMPT_TIMEOUT if self.ran else NEW_SHELL_TIMEOUT)
        while (state := self.look()) == "soon" and time.monotonic() < deadline:
            if self.ran and not self.shown:
                break
            await asyncio.sleep(0.001)  # a shell announces its prompt to nobody
        self.shown |= state == "ready"
        return state in ("ready", "perhaps") or (state == "soon" and not self.shown)

    async def clear(self, tmux: Tmux) -> tuple[str, int]:
        """Make sure that nothing is typed at the prompt: the pane's state then, and the column of its cursor."""
        quiet, state = time.monotonic() < self.quiet, self.state
        self.quiet, self.state = 0.0, ""
        if state or (self.last and quiet):  # in the moment after a run nobody has typed a line
            return state, int(self.last.split()[0])
        if quiet:
            await asyncio.sleep(CLEAR_PAUSE)  # a new shell draws its prompt
        now = await tmux.state(self.pane)
        if now != self.last and not quiet:
            switch = ["set-option", "-w", "-t", self.pane.window_id, "synchronize-panes", "off"]
            tmux.send(switch, ["copy-mode", "-q", "-t", self.pane.pane_id])
            now = await tmux.state(self.pane)
            # Behind a prompt that we know, C-u clears the line and C-y brings it back; a blank before,
            # since on an empty line it rings the bell.  Elsewhere it may be a continuation line.
            (column, *place), (before, *known) = now.split(), self.last.split() or [""]
            same = place == known and int(column) > int(before)
            if now != self.last and self.look() != "busy":
                tmux.send_keys(self.pane, now, *(["C-e", "Space", "C-u"] if same else ["C-c"]))
                await asyncio.sleep(CLEAR_PAUSE)
                await self.at_prompt()
                now = await tmux.state(self.pane)
        self.last = now  # if nobody uses it now, it is known later
        return now, int(now.split()[0])

    def back(self, tmux: Tmux, column: int) -> None:
        """A run has ended: note in what state the prompt is then.  Who types, changes that."""
        self.quiet, self.state = time.monotonic() + 2 * CLEAR_PAUSE, ""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(CLEAR_PAUSE, self._ask, tmux, column)

    def _ask(self, tmux: Tmux, column: int) -> None:
        def note(reply: asyncio.Future[list[str]]) -> None:
            unused = self.quiet and not (reply.cancelled() or reply.exception())
            if unused and self.look() in ("ready", "perhaps") and reply.result()[0].split()[0] == str(column):
                self.quiet, self.state = 0.0, reply.result()[0]  # in another column, something was typed meanwhile
                self.last = self.state

        if self.quiet and not tmux.closed:
            tmux.send(["display-message", "-p", "-t", self.pane.pane_id, PANE_STATE]).add_done_callback(note)


class Capture:
    """Keeps the first and the last half of `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.first, self.last = limit // 2, limit - limit // 2
        self.head, self.tail = bytearray(), bytearray()

    def add(self, chunk: bytes) -> None:
        space = self.first - len(self.head)
        self.head += chunk[:space]
        self.tail += chunk[max(space, len(chunk) - self.last) :]
        if len(self.tail) > 2 * self.last:
            del self.tail[: -self.last]

    def text(self, total: int) -> str:
        """What was kept of `total` bytes; a line tells of the gap, which halves no character."""
        head, tail = bytes(self.head), bytes(self.tail[-self.last :])
        if total <= self.first + self.last:
            return (head + tail).decode(errors="replace")
        begin = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
        tail = re.sub(rb"\A[\x80-\xbf]{1,3}", b"", tail)
        missing = total - len(tail) - len(begin.encode() if "\ufffd" not in begin else head)
        newline = "" if begin.endswith("\n") else "\n"
        return f"{begin}{newline}[pocketcoder: {missing} bytes left out]\n{tail.decode(errors='replace')}"


class View:
    """A run's output copied to the pane's tty for a person: best effort, nobody waits for it."""

    # Colours and movements pass; what else a terminal does on request is not for a command.
    UNSAFE = re.compile(rb"[\0-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\x1b(?!\[[0-9;:]*[A-HJKSTfm])")

    def __init__(self, pane: Pane, command: str, line: str, column: int) -> None:
        """The typed `line` is to be replaced by `command`, behind the prompt that ends at `column`."""
        self.loop = asyncio.get_running_loop()
        self.space, self.hidden, self.newline, self.begun = MAX_VIEW, 0, True, False
        rows = 1 + (column + len(line)) // max(1, pane.width)
        shown = command[:MAX_VIEW_COMMAND] + "…" * (len(command) > MAX_VIEW_COMMAND)
        safe = self.UNSAFE.sub(b"", shown.encode()).replace(b"\x1b", b"")
        self.unwritten = bytearray(b"\x1b[%dA\x1b[%dG\x1b[J%s\n" % (rows, column + 1, safe))
        self.done: Callable[[], None] | None = None
        self.fd = os.open(pane.tty, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)

    def begin(self) -> None:
        """Show what there is, and from now on what comes."""
        self.begun = True
        self._write()

    def add(self, chunk: bytes) -> None:
        shown, self.space = self.UNSAFE.sub(b"", chunk[: self.space]), self.space - len(chunk)
        if self.space < 0:
            self.hidden, self.space = self.hidden - self.space, 0
        if shown:
            self.newline = shown.endswith(b"\n")
            self.unwritten += shown
            if self.begun:
                self._write()

    def end(self, exit_code: int, done: Callable[[], None]) -> None:
        """Mark the end; call `done` when all is on the terminal, or after VIEW_TIMEOUT."""
        hidden = f"[pocketcoder: {self.hidden} more bytes not shown here]\n" if self.hidden else ""
        mark = f"[exit {exit_code}]\n" if exit_code else ""
        self.unwritten += f"{'' if self.newline else chr(10)}{hidden}{mark}".encode()
        self.done = done
        self.loop.call_later(VIEW_TIMEOUT, self.close)
        self._write()

    def _write(self) -> None:
        try:
            del self.unwritten[: os.write(self.fd, self.unwritten)]
        except BlockingIOError:
            pass
        except OSError:  # the terminal is gone
            return self.close()
        if self.unwritten:
            self.loop.add_writer(self.fd, self._write)
        elif self.done:
            self.close()
        else:
            self.loop.remove_writer(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            self.loop.remove_writer(self.fd)
            os.close(self.fd)
        self.fd, done, self.done = -1, self.done, None
        if done:
            done()


class Output:
    """A FIFO that a run writes to: handed to `take` while the run lasts, then drained.

    An awaitable that `take` returns stops the reading until it is done: back-pressure.
    """

    def __init__(self, path: str, take: Take | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.take, self.total = take, 0
        self.taken: asyncio.Future[None] | None = None
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        self._resume()

    def _resume(self) -> None:
        if self.fd >= 0:
            self.loop.add_reader(self.fd, self._read)

    def _read(self, size: int = CHUNK) -> None:
        try:
            chunk = os.read(self.fd, size)
        except BlockingIOError:
            return
        if not chunk:
            return self.close()
        if self.take is None:  # what outlives its run may write on, at no cost to others
            self.loop.remove_reader(self.fd)
            self.loop.call_later(DRAIN_PAUSE, self._resume)
            return
        self.total += len(chunk)
        if len(chunk) == 64 * KIB:  # a pipe of the usual size, full
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.fd, 1031, CHUNK)  # F_SETPIPE_SZ
        if (wait := self.take(chunk)) is not None:
            self.loop.remove_reader(self.fd)
            self.taken = asyncio.ensure_future(self._wait(self.taken, wait))

    async def _wait(self, before: Awaitable[None] | None, this: Awaitable[None]) -> None:
        with contextlib.suppress(OSError):  # the reader has left
            if before is not None:
                await before
            await this
        self._resume()

    def finish(self) -> None:
        """The command has ended: take what it left in the pipe, drain what others write."""
        if self.fd >= 0 and self.take:
            left = int.from_bytes(fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)), sys.byteorder)
            if left:
                self._read(left)
        self.take = None
        if self.fd >= 0:
            self._resume()
            self._read()  # or find that nobody else writes

    def close(self) -> None:
        if self.fd >= 0:
            self.loop.remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1
            self.closed.set_result(None)


class RunFiles:
    """A directory for runs beside the socket, `SOCKET.d/N`.  Each driver has its own, locked: it lives.

    `status` is a FIFO for the reports of all runs, lines of run, word, number.  A run has the
    files `SOCKET.d/N/RUN.*`.  Names are short, since they are typed, and used again by later
    runs: making files costs more than all the rest.  Raises NoTerminal, OSError.
    """

    KEPT = ("done", "out", "err", "go")

    def __init__(self, base: str) -> None:
        self.base, self.folder, self.lock = base, "", -1
        self.count, self.free = 0, list[str]()  # names there were; those to use again
        self.used: dict[str, Callable[[str, int], None]] = {}  # run_id: who gets its reports
        self.unread, self.wiped = b"", False
        os.makedirs(os.path.dirname(base), 0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(base, 0o700)
        found = os.lstat(base)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise NoTerminal(f"{base}: expected a directory of our own; remove what is there")
        self.adoptions = [asyncio.ensure_future(self._adopt(f"{base}/{name}")) for name in os.listdir(base)]
        for number in range(KIB):  # drivers may start together
            with contextlib.suppress(FileExistsError, BlockingIOError):
                os.mkdir(folder := f"{base}/{number:x}", 0o700)
                self.lock = os.open(folder, os.O_RDONLY)
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.folder = folder
                break
        else:
            raise NoTerminal(f"{base}: full of what cannot be removed")
        os.mkfifo(f"{folder}/status", 0o600)
        self.status = os.open(f"{folder}/status", os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        asyncio.get_running_loop().add_reader(self.status, self._on_status)

    def _on_status(self) -> None:
        *lines, unread = (self.unread + os.read(self.status, 64 * KIB)).split(b"\n")
        self.unread = unread[-KIB:]
        for run_id, word, number in (line.decode("latin-1").split(" ") for line in lines if line.count(b" ") == 2):
            if run_id in self.used and number.isdecimal():
                self.used[run_id](word, int(number[:9]))

    def there(self) -> bool:
        """False if someone wiped it; then it closes after its last run."""
        self.wiped = not os.path.exists(f"{self.folder}/status")
        if self.wiped and not self.used:
            self.close()
        return not self.wiped

    def take(self, run_id: str, on_report: Callable[[str, int], None]) -> str:
        """A run's path, but for the suffixes."""
        self.used[run_id] = on_report
        self.count += not self.free
        return self.free.pop() if self.free else f"{self.folder}/{self.count:x}"

    def give_back(self, run_id: str, run: str, returned: bool, names: tuple[str, ...]) -> None:
        """`names`: the run's own files; all go if its line may be read again one day."""
        for name in names if returned else (*names, *self.KEPT):
            with contextlib.suppress(OSError):
                os.unlink(f"{run}.{name}")
        self.free += [run] if returned and run_id in self.used else []
        self.used.pop(run_id, None)
        if self.wiped and not self.used:
            self.close()

    def hand_over(self, run: str, names: tuple[str, ...], owner: int) -> None:
        """Let another user, whose the panes are, get at a run's files."""
        os.chmod(self.base, 0o711)
        paths = (self.folder, f"{self.folder}/status", *(f"{run}.{name}" for name in (*self.KEPT, *names)))
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.chown(path, owner, -1, follow_symlinks=False)

    async def _adopt(self, folder: str) -> None:
        """Drain and remove what a killed proxy left; its commands run to their end."""
        with contextlib.suppress(OSError):  # its proxy lives, or it is no directory of ours
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                names = os.listdir(folder)
                for run in (name[:-3] for name in names if name.endswith(".go")):
                    with contextlib.suppress(FileExistsError):  # typed and not started: nobody would know of it
                        os.close(os.open(f"{folder}/{run}.pid", os.O_CREAT | os.O_EXCL))
                outputs = [Output(f"{folder}/{name}", None) for name in names if name.endswith((".out", ".err"))]
                for output in outputs:
                    output.finish()
                await asyncio.gather(*(output.closed for output in outputs))
                for _ in range(3):  # go may just be noting the exit code there
                    shutil.rmtree(folder, ignore_errors=True)
                    await asyncio.sleep(RETURN_TIMEOUT / 10)
            finally:
                os.close(lock)

    def close(self) -> None:
        """Leave what is still written to: the next driver here drains it."""
        if self.lock >= 0:
            if not self.used:
                shutil.rmtree(self.folder, ignore_errors=True)
            asyncio.get_running_loop().remove_reader(self.status)
            os.close(self.status)
            os.close(self.lock)
            self.lock, self.wiped = -1, False


class Job:
    """One run of a command, from its files to the prompt after it.

    takes       who gets the output: one for both streams, or two
    on_release  called when the pane is free again
    """

    def __init__(
        self, request: ExecRequest, takes: Mapping[str, Take], shell: Shell, on_release: Callable[[Job], None]
    ) -> None:
        self.request, self.takes, self.shell, self.on_release = request, takes, shell, on_release
        self.loop = asyncio.get_running_loop()
        self.run_id, self.run = secrets.token_hex(8), ""  # the path of its files, but for their suffixes
        self.started: asyncio.Future[bool] = self.loop.create_future()  # False: it never will
        self.over = asyncio.Event()  # exit_code, duration and all output are known
        self.released = False  # the pane is free again
        self.ended, self.why, self.exit_code = "exit", "", 0
        self.pid = 0  # of the command's bash, and its process group
        self.begun = self.duration = 0.0
        self.view: View | None = None
        self.outputs: list[Output] = []
        self.returned = False  # go has done with the files
        self.own: tuple[str, ...] = ("pid",)  # files that no later run can use
        self.timers: list[asyncio.TimerHandle] = []
        self.ending: asyncio.Task[None] | None = None

    def prepare(self, files: RunFiles, shell: str) -> str:
        """Make the files; return the line that runs them.  Raises OSError."""
        self.files, self.run = files, files.take(self.run_id, self._on_report)
        for name in ("done", *self.takes):
            if not os.path.exists(f"{self.run}.{name}"):
                os.mkfifo(f"{self.run}.{name}", 0o600)
        for name, text in go_script(self.request, self.run, self.run_id, shell, self.takes).items():
            with open(os.open(f"{self.run}.{name}", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(text.encode())  # not truncated, which goes to the disk: `go` returns at its end
            self.own = self.own if name == "go" and len(text) < 16 * KIB else (*self.own, name)
        if self.shell.owner != os.geteuid():  # we are root, the panes are a worker's
            files.hand_over(self.run, self.own, self.shell.owner)
        return f" . {shlex.quote(self.run)}.go"

    def type(self, tmux: Tmux, line: str, state: str, column: int) -> None:
        """Type the line, unless somebody else has typed since the pane was in `state`.  Raises OSError."""
        self.tmux, self.column = tmux, column
        for name, take in self.takes.items():  # first, since a FIFO forgets what nobody has open
            self.outputs.append(Output(f"{self.run}.{name}", partial(self._take, take)))
        tmux.send_keys(self.shell.pane, state, line, "Enter").add_done_callback(self._on_typed)
        self.view = View(self.shell.pane, self.request.cmd, line, column)

    def _on_typed(self, reply: asyncio.Future[list[str]]) -> None:
        if reply.cancelled() or reply.exception():
            self.void()
        elif reply.result():  # it was not typed
            self.returned = True
            self._never()

    def _never(self) -> None:
        if not self.started.done():
            self.started.set_result(False)
        self.release()

    def _take(self, take: Take, chunk: bytes) -> Awaitable[None] | None:
        if self.view:
            self.view.add(chunk)
        return take(chunk)

    def void(self) -> bool:
        """Make sure that it never starts; False: it already has."""
        if self.released:
            return True
        try:
            if self.run:
                os.close(os.open(f"{self.run}.pid", os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        except OSError:  # wiped: go cannot make it either
            pass
        self.own = self.own[1:]  # the claim stays: go may have been read already
        self._never()
        return True

    def _on_report(self, word: str, number: int) -> None:
        if word == "start" and not self.pid:
            self.pid, self.begun, self.shell.ran = number, time.monotonic(), True
            self.later(self.request.timeout, self.end, "timeout")
            if self.view:
                self.later(VIEW_DELAY, self.view.begin)
            self.later(WATCH_PAUSE, self.watch)
            if not self.started.done():
                self.started.set_result(True)
        elif word == "exit" and self.pid:
            self._finish(number & 255)
        elif word == "back" and not self.released:
            self.returned = True
            self.release()
            self.shell.back(self.tmux, self.column)

    def later(self, seconds: float, call: Callable[..., None], *arguments: str) -> None:
        """Call it then, unless the job is released before."""
        if not self.released:
            self.timers.append(self.loop.call_later(seconds, call, *arguments))

    def watch(self, again: bool = True) -> None:
        """Look whether its shell still lives: now, and now and then."""
        if self.pid and not self.over.is_set():
            pane = self.shell.pane
            if Process.ended(pane.pid):
                self.lost("tmux has ended" if self.tmux.closed else f"{pane.window_name}, pane {pane.pane_id}, died")
            elif again:
                del self.timers[2:]
                self.later(WATCH_PAUSE, self.watch)

    def _finish(self, exit_code: int) -> None:
        if self.over.is_set():
            return
        self.exit_code, self.duration = exit_code, time.monotonic() - self.begun
        for output in self.outputs:
            output.finish()
        if exit_code in STOPPED and not Process.ended(self.pid) and self.ending is None:  # nobody will continue it
            self.ending = asyncio.ensure_future(climb(self, ENDING_LADDER[1:]))
        self.over.set()
        self.later(RETURN_TIMEOUT, self.release)
        self.loop.call_soon(self._show_end)  # who waits for the answer comes first

    def _show_end(self) -> None:
        os.sched_yield()  # who got the answer often waits for this very CPU
        facts = (self.request.agent_name, self.run_id, self.ended, self.exit_code, round(self.duration * 1000))
        log.info("exec end agent=%s run=%s ended=%s exit=%d ms=%d", *facts)
        if self.view:
            self.view.end(self.exit_code, self._let_return)

    def _let_return(self) -> None:
        with contextlib.suppress(OSError):
            done = os.open(f"{self.run}.done", os.O_WRONLY | os.O_NONBLOCK)
            os.write(done, b"\n")
            os.close(done)

    def end(self, ended: str) -> None:
        """Begin to end it; `over` tells when that is done.  The first reason counts."""
        if self.ended == "exit" and not self.over.is_set():
            self.ended = ended
            self.ending = asyncio.ensure_future(climb(self, ENDING_LADDER))

    def lost(self, why: str) -> None:
        """Its terminal died: answer with what there is, leave nothing running."""
        if not self.over.is_set() and (self.pid or not self.void()):
            if self.ended == "exit":
                self.ended, self.why = "lost", why
            if not self.started.done():
                self.started.set_result(True)
            self._finish(128 + signal.SIGKILL)
            self.ending = asyncio.ensure_future(climb(self, ENDING_LADDER[1:]))
        self.release()

    async def over_within(self, seconds: float) -> bool:
        """Wait for its end, `seconds` at most."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)
        return self.over.is_set()

    def signal_group(self, number: int) -> None:
        """Signal the command's process group.  In a shell without job control it has none."""
        with contextlib.suppress(OSError):
            if self.pid and not self.over.is_set() and Process.read(self.pid).group == self.pid:
                os.killpg(self.pid, number)

    def release(self) -> None:
        """Give the pane back; the files go when nobody writes any more."""
        if self.released:
            return
        self.released = True
        for timer in self.timers:
            timer.cancel()
        if self.view and not self.over.is_set():  # else it closes itself
            self.view.close()
        for output in self.outputs:
            if not self.pid:
                output.close()  # nobody has opened it to write
            output.finish()
            output.closed.add_done_callback(self._tidy)
        if not self.outputs:
            self._tidy()
        self.on_release(self)

    def _tidy(self, _: object = None) -> None:
        if self.run and all(output.closed.done() for output in self.outputs):
            self.files.give_back(self.run_id, self.run, self.returned, self.own)

    async def result(self, capture: Capture | None = None) -> CommandResult:
        """How it ended; its output is in `capture` or with who took it.  Cancelling this cancels the command."""
        try:
            await self.over.wait()
            for output in self.outputs:
                if output.taken is not None:
                    await asyncio.wait_for(output.taken, SLOW_READER_TIMEOUT)
        except asyncio.CancelledError:
            self.end("cancelled")
            raise
        exit_code, error = ENDINGS[self.ended]
        code = self.exit_code if exit_code is None else exit_code
        total, ms = sum(output.total for output in self.outputs), round(self.duration * 1000)
        error = error and error.format(timeout=self.request.timeout, why=self.why)
        text, cut = (capture.text(total), total > self.request.max_output) if capture else ("", False)
        return CommandResult(text, code, self.ended, error, cut, total, ms, self.run_id)


async def kill(job: Job, number: int) -> int:
    """Signal all its processes, wherever they are; how many there were."""
    job.signal_group(number)
    found = await asyncio.to_thread(processes_of, job.run_id, job.run, job.pid or -1)
    for pid in found:
        with contextlib.suppress(OSError):
            if os.getpgid(pid) != job.pid or job.over.is_set():  # some take a second signal amiss
                os.kill(pid, number)
    return len(found)


async def climb(job: Job, ladder: tuple[tuple[int, float], ...]) -> None:
    """End a run, and what escaped from it."""
    for number, patience in ladder:
        next_step = time.monotonic() + patience
        await kill(job, number)
        await job.over_within(patience)
        if not await kill(job, 0):
            break
        await asyncio.sleep(next_step - time.monotonic())  # the same for what escaped
    if not await job.over_within(RETURN_TIMEOUT):
        job.lost("its shell does not report the end")


class Terminal:
    """An agent's window, `name`: its panes, the runs in them, and who waits.

    driver  whose tmux and settings it uses
    """

    def __init__(self, driver: PocketCoderDriver, name: str) -> None:
        self.driver, self.name, self.window_id = driver, name, "@"
        self.shells: list[Shell] = []  # one a pane
        self.looked_at: tuple[Tmux | None, int] = (None, 0)  # the connection, and its notices by then
        self.jobs: dict[str, Job] = {}  # by pane_id
        self.waiting = 0
        self.lock, self.freed = asyncio.Lock(), asyncio.Event()  # first come, first served

    async def take(self) -> tuple[Tmux, Shell]:
        """Wait in the queue for a pane where nobody runs anything.  Raises Busy, NoTerminal."""
        if len(self.jobs) + self.waiting >= MAX_PANES + MAX_QUEUE:
            raise Busy(f"{MAX_QUEUE} commands wait for this terminal already: try again later")
        self.waiting += 1
        deadline = time.monotonic() + QUEUE_TIMEOUT
        try:
            async with self.lock:
                while time.monotonic() < deadline and not self.driver.stopping:
                    self.freed.clear()
                    tmux = await self._look()
                    if (shell := await self._choose(tmux)) and not self.driver.stopping:
                        return tmux, shell
                    # tmux does not tell when a person's program ends, so look now and then.
                    timer = tmux.loop.call_later(QUEUE_CHECK, self.freed.set)
                    await self.freed.wait()
                    timer.cancel()
        finally:
            self.waiting -= 1
        raise Busy("the proxy is stopping" if self.driver.stopping else "no pane of the terminal got free")

    def release(self, job: Job) -> None:
        """The job's pane is free again."""
        self.jobs.pop(job.shell.pane.pane_id, None)
        self.freed.set()

    async def open(self) -> None:
        """Make the window if it is missing, and know its prompt before anybody types."""
        self.driver.open_files()
        async with self.lock:
            tmux = await self._look()
            if self.shells[0].quiet and await self.shells[0].at_prompt():
                await self.shells[0].clear(tmux)

    async def _look(self) -> Tmux:
        """Know the panes; make the window, with all around it, if it is missing.  Needs the lock."""
        for last_try in (False, True):
            tmux = await self.driver.connect(["-n", self.name, *self.driver.new_shell])
            now = (tmux, tmux.notices)
            if self.shells and self.looked_at == now:
                return tmux
            try:
                panes: list[Pane] = []
                with contextlib.suppress(NoTerminal):  # there is no such window, or no longer
                    panes = await tmux.panes(self.window_id)
                if not panes or panes[0].window_name != self.name:
                    panes = await self._find_window(tmux)
                for pane in panes:
                    if pane.dead or Process.ended(pane.pid):  # remain-on-exit, or tmux does not know yet
                        await tmux.ask("respawn-pane", "-k", "-t", pane.pane_id, *self.driver.new_shell)
                        panes = await tmux.panes(self.window_id)
                        self.driver.new |= {now.pid for now in panes if now.pane_id == pane.pane_id}
                known = {shell.pane.pid: shell for shell in self.shells}
                self.shells = [known.get(pane.pid) or Shell(pane, pane.pid in self.driver.new) for pane in panes]
                self.driver.new -= {pane.pid for pane in panes}
                for pane, shell in zip(panes, self.shells, strict=True):
                    shell.pane = pane
                self.looked_at = now
                return tmux
            except NoTerminal:
                tmux.close()  # the session may be gone, and we be attached to another
                if last_try:
                    raise
        raise AssertionError

    async def _find_window(self, tmux: Tmux) -> list[Pane]:
        found = [pane for pane in await tmux.panes() if pane.window_name == self.name]
        if not found:
            words = ["new-window", "-d", "-t", f"={tmux.session}:", "-n", self.name, "-P", "-F", PANE_FORMAT]
            found = [Pane.parse(line) for line in await tmux.ask(*words, *self.driver.new_shell)]
            self.driver.new.add(found[0].pid)
        self.window_id = found[0].window_id
        rename = ["set-option", "-w", "-t", self.window_id]  # by nobody but a person
        tmux.send([*rename, "automatic-rename", "off"], [*rename, "allow-rename", "off"])
        return [pane for pane in found if pane.window_id == self.window_id]

    async def _choose(self, tmux: Tmux) -> Shell | None:
        """A shell at its prompt; else a new one; else one in copy mode; else None."""
        free = [shell for shell in self.shells if shell.pane.pane_id not in self.jobs]
        sound = [shell for shell in free if shell.missed < 2]
        for shell in sound:
            if not shell.pane.in_mode and await shell.at_prompt():
                return shell
        if any(Process.ended(shell.pane.pid) for shell in free):  # look again, at once
            self.looked_at = (None, 0)
            self.freed.set()
            return None
        returning = any(job.over.is_set() for job in self.jobs.values())
        if len(self.shells) < MAX_PANES and not returning and (made := await self._split(tmux)):
            return made if await made.at_prompt() else None
        for shell in sound:  # rather than let a command wait for a person who reads
            if shell.pane.in_mode and await shell.at_prompt():
                return shell
        if free == self.shells and not sound:
            for shell in free:
                shell.missed = 0
            raise NoTerminal(f"no shell in the window {self.name} answers")
        return None

    async def _split(self, tmux: Tmux) -> Shell | None:
        words = ["split-window", "-d", "-Z", "-t", self.shells[-1].pane.pane_id, "-P", "-F", PANE_FORMAT]
        for _ in range(2):
            self.looked_at = (None, 0)
            with contextlib.suppress(NoTerminal):
                self.shells.append(Shell(Pane.parse((await tmux.ask(*words, *self.driver.new_shell))[0]), True))
                return self.shells[-1]
            tmux.send(["select-layout", "-t", self.window_id, "tiled"])  # no space: make some
        return None


class PocketCoderDriver:
    """Runs commands in the tmux session `session_name` at the socket `socket_path`.

    Needs no running tmux: the first command makes what is missing.
    directory  where new terminals start; None: where tmux does
    """

    def __init__(self, socket_path: str, session_name: str, directory: str | None = None) -> None:
        if not re.fullmatch(r"[^\x00-\x1f:.#=]{1,64}", session_name):
            raise complain("session_name", session_name, "a tmux name without `:`, `.`, `#`, `=`")
        self.socket_path, self.session_name = os.path.abspath(socket_path), session_name
        self.shell = find_shell()
        # What tmux runs in a new pane.  Not one word: default-shell, maybe us, would run that.
        self.new_shell = ["-c", directory.replace("#", "##")] if directory else []
        self.new_shell += ["-e", f"SHELL={self.shell}", "-e", "HISTCONTROL=ignoreboth", "--", self.shell, "-i"]
        self.stopping = False
        self._reset()

    def _reset(self) -> None:
        self.tmux: Tmux | None = None
        self.connecting = asyncio.Lock()
        self.terminals: dict[str, Terminal] = {}
        self.files: RunFiles | None = None
        self.new: set[int] = set()  # shells that we made, until a Terminal sees them

    def session_exists(self, session: str) -> bool:
        """Whether tmux has a session of exactly this name."""
        command = ["tmux", "-S", self.socket_path, "has-session", "-t", f"={session}"]
        return subprocess.run(command, capture_output=True, timeout=TMUX_TIMEOUT).returncode == 0

    def terminal(self, agent_name: str) -> Terminal:
        """The agent's."""
        return self.terminals.setdefault(agent_name, Terminal(self, f"{agent_name}:terminal"))

    async def exec(self, cmd: str, cwd: str | None, agent_name: str) -> CommandResult:
        """Run `cmd` in the agent's terminal and wait for its end.

        cwd  absolute; None: wherever the terminal is now
        See ExecRequest for the limits.  Raises BadMessage, NoTerminal, Busy.
        """
        return await self.run(ExecRequest(cmd, cwd or "", agent_name=agent_name))

    async def run(self, request: ExecRequest) -> CommandResult:
        """The same for a request.  Cancelling this cancels the command."""
        capture = Capture(request.max_output)
        return await (await self.start(request, {"out": capture.add})).result(capture)

    async def start(self, request: ExecRequest, takes: Mapping[str, Take]) -> Job:
        """Start a command; return when it runs.  `takes`: {"out"} for both streams, or {"out", "err"}."""
        terminal = self.terminal(request.agent_name)
        why = f"no shell in the window {terminal.name} answers"
        for _ in range(2 * MAX_PANES):
            tmux, shell = await terminal.take()
            job = Job(request, takes, shell, terminal.release)
            terminal.jobs[shell.pane.pane_id] = job
            try:
                line = job.prepare(self.open_files(), self.shell)
                job.type(tmux, line, *await shell.clear(tmux))
                if await self._starts(job):
                    return job
            except asyncio.CancelledError:
                if not job.void():
                    job.end("cancelled")
                raise
            except (NoTerminal, OSError) as failure:  # no space, no descriptors; or the terminal has just died
                terminal.looked_at, why = (None, 0), f"cannot prepare a run: {failure}"
                if not job.void():
                    job.lost(why)
                    return job
                if isinstance(failure, OSError) or tmux.closed or Process.ended(shell.pane.pid):
                    await asyncio.sleep(CLEAR_PAUSE)
                    continue
                raise NoTerminal(why) from None
            if not job.returned:  # it was typed, into what we do not know
                shell.last = ""
                shell.missed += 1
        raise NoTerminal(why)

    def open_files(self) -> RunFiles:
        """The directory for runs, a new one if someone wiped it.  Raises NoTerminal, OSError."""
        if self.files is None or not self.files.there():
            self.files = RunFiles(f"{self.socket_path}.d")
        return self.files

    async def _starts(self, job: Job) -> bool:
        deadline = time.monotonic() + (START_TIMEOUT if job.shell.ran else NEW_SHELL_TIMEOUT)

        def look() -> None:
            late = time.monotonic() - deadline
            if not job.started.done():
                if (late >= 0 or Process.ended(job.shell.pane.pid)) and not job.void() and late > START_TIMEOUT:
                    job.lost("it never reported its start")
                job.later(START_TIMEOUT / 2, look)

        job.later(START_TIMEOUT, look)
        if started := await job.started:
            job.shell.missed = 0
        return started

    async def connect(self, create: list[str] | None) -> Tmux:
        """The connection to tmux; `create`: see Tmux.connect."""
        async with self.connecting:
            for attempt in range(1 if create is None else 4):
                if self.tmux is not None and not self.tmux.closed and self.tmux.loop is asyncio.get_running_loop():
                    break
                try:
                    words = create if attempt else None  # None: only if it is there
                    self.tmux = await Tmux.connect(self.socket_path, self.session_name, words)
                    self.tmux.on_notice = self._on_notice
                    if words:
                        self.new |= {pane.pid for pane in await self.tmux.panes()}
                except NoTerminal:
                    if create is None or attempt == 3:
                        raise
                    await asyncio.sleep(CLEAR_PAUSE * (attempt > 0))  # a tmux that is just ending fails once
            assert self.tmux is not None
            return self.tmux

    def _on_notice(self) -> None:
        """Something may have died."""
        for terminal in self.terminals.values():
            terminal.freed.set()
        for job in self.jobs():
            job.watch(again=False)

    async def close(self, grace: float = 0.0) -> None:
        """Take no more commands, give the running ones `grace` seconds, cancel the rest."""
        self.stopping = True
        for terminal in self.terminals.values():
            terminal.freed.set()
        await asyncio.gather(*(job.over_within(grace) for job in self.jobs()))
        for job in (jobs := self.jobs()):
            job.end("cancelled")
        await asyncio.gather(*(job.ending for job in jobs if job.ending is not None))
        for job in jobs:
            job.release()
        if self.tmux is not None:
            self.tmux.close()
            await self.tmux.ended.wait()
        if self.files is not None:
            self.files.close()
        self._reset()

    def jobs(self) -> list[Job]:
        """All that hold a pane."""
        return [job for terminal in self.terminals.values() for job in terminal.jobs.values()]


# ==========================================================================
# State and tools                                                 budget 20
# ==========================================================================
# What handlers share.  Built once in `serve`, handed down; no globals.
SessionMap = dict[str, "asyncio.Queue[Message]"]


@dataclass
class AppState:
    """`sessions`: who listens, by session id; `driver`: runs commands; `workspace`: a real path."""

    sessions: SessionMap
    driver: PocketCoderDriver
    workspace: str = "/"
    calls: set[asyncio.Task[Any]] = field(default_factory=set)  # handlers at work; each adds and removes itself


# ==========================================================================
# Transports                                                     budget 240
# ==========================================================================
# H1  Every request passes `Endpoint.prepare`, the gate, before its handler.
# H2  Handlers are coroutines over plain values; only Endpoint knows Tornado.
# H3  Whoever waits for a caller that left is cancelled.
async def health_handler() -> str:
    """Answers while commands run."""
    return "ok"


async def exec_handler(state: AppState, request: ExecRequest) -> ExecResponse:
    """Run a command to its end.  Cancelling this cancels the command."""
    result = await state.driver.run(request)
    return ExecResponse.of(result, result.output)


async def exec_stream_handler(
    state: AppState, request: ExecRequest, send: Callable[[str, Message], Awaitable[None]]
) -> None:
    """The same with the output sent as it comes: `send(event, data)`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    async def output(chunk: bytes, final: bool = False) -> None:
        if text := decoder.decode(chunk, final):  # never half a character
            await send("output", {"stdout": text})

    job = await state.driver.start(request, {"out": output})
    try:
        await send("", {})
        result = await job.result()
        await output(b"", final=True)
        await send("exit", ExecResponse.of(result, None).to_wire())
    finally:
        job.end("cancelled")  # if it has not ended yet, nobody is left to read it


@dataclass(frozen=True)
class Gate:
    """Who may call: the token, and the browser origins that were allowed."""

    token: str = ""
    origins: frozenset[str] = frozenset()

    def check(self, host: str, origin: str | None, authorization: str, open_to_all: bool) -> None:
        """Raises Forbidden, or HTTPError 401."""
        local = is_loopback(host)
        if not self.token and not local:  # else a name could be bound to us anew
            raise Forbidden(f"`Host`: got {host[:80]!r}, expected localhost or a loopback address")
        own = f"http://{host}" if local else None
        if origin is not None and origin != own and origin not in self.origins:
            raise Forbidden(f"`Origin`: got {origin[:80]!r}, expected none, or one of --allow-origin")
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.token.encode())
        if self.token and not open_to_all and not (right and scheme.lower() == "bearer"):
            raise tornado.web.HTTPError(401, "expected `Authorization: Bearer TOKEN`")


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether `host`, maybe with a port, is a name or address of this machine for itself."""
    with contextlib.suppress(ValueError):
        name = host if host.count(":") > 1 and "[" not in host else urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    return False


class Endpoint(tornado.web.RequestHandler):
    """The gate, the body, errors as JSON; children add handlers."""

    _stream_request_body = True  # so that the gate comes before the body, and 413 is ours
    open_to_all = False  # needs no token
    task: asyncio.Task[Any] | None = None
    slow: asyncio.TimerHandle | None = None  # closes the connection of a body that does not come

    def initialize(self, state: AppState, gate: Gate) -> None:
        self.state, self.gate = state, gate
        self.body, self.received = bytearray(), 0

    def set_default_headers(self) -> None:
        self.set_header("Server", f"pocketcoder-proxy/{VERSION}")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        if (origin := self.request.headers.get("Origin")) in self.settings["origins"]:
            self.set_header("Access-Control-Allow-Origin", str(origin))
            self.set_header("Access-Control-Allow-Headers", "Authorization, Content-Type, Accept")
            self.set_header("Vary", "Origin")

    def compute_etag(self) -> None:
        """Answers are not cached."""

    @property
    def stream(self) -> Any:
        """The connection below HTTP."""
        return getattr(self.request.connection, "stream", None)

    def prepare(self) -> None:
        headers, origin = self.request.headers, self.request.headers.get("Origin")
        authorization = headers.get("Authorization", "")
        preflight = self.request.method == "OPTIONS"
        self.gate.check(self.request.host, origin, authorization, self.open_to_all or preflight)
        if int(headers.get("Content-Length") or 0) > 4 * MAX_BODY:
            raise tornado.web.HTTPError(413, f"body: expected at most {MAX_BODY} bytes")
        if self.request.method not in self._allowed() or (preflight and origin is None):
            raise tornado.web.HTTPError(405)
        if self.request.method == "POST":
            self.slow = asyncio.get_running_loop().call_later(BODY_TIMEOUT, self.stream.close)
            kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise tornado.web.HTTPError(415, f"`Content-Type`: got {kind!r}, expected application/json")

    def data_received(self, chunk: bytes) -> None:
        self.received += len(chunk)
        if self.received <= MAX_BODY:
            self.body += chunk
        elif self.received > 4 * MAX_BODY:  # read so far that the caller may see the 413
            self.stream.close()

    def options(self) -> None:
        self.set_header("Access-Control-Allow-Methods", ", ".join(self._allowed()))
        self.set_status(204)

    def _allowed(self) -> list[str]:
        missing = tornado.web.RequestHandler._unimplemented_method
        return [name for name in self.SUPPORTED_METHODS if getattr(type(self), name.lower()) is not missing]

    async def perform(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`; cancel it when the caller leaves."""
        task = self.task = asyncio.current_task()
        assert task is not None
        self.state.calls.add(task)
        try:
            await work
        except asyncio.CancelledError:
            if self.task is not None:
                raise
        finally:
            self.task = None
            self.state.calls.discard(task)

    def on_finish(self) -> None:
        if self.slow is not None:
            self.slow.cancel()

    def on_connection_close(self) -> None:
        self.on_finish()
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        text = (getattr(error, "log_message", None) or f"{status_code} {self._reason}").replace("%%", "%")
        exit_code = ProxyError.exit_code
        if isinstance(error, ProxyError):
            text, exit_code = str(error), error.exit_code
            self.set_status(error.http_status)
        if status_code == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if status_code == 405:
            self.set_header("Allow", ", ".join(self._allowed()))
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"error": text, "exit_code": exit_code}))

    def log_exception(self, *exc_info: Any) -> None:
        if not isinstance(exc_info[1], (ProxyError, tornado.web.HTTPError)):
            log.error("request failed path=%s", self.request.path, exc_info=exc_info)


class HealthEndpoint(Endpoint):
    open_to_all = True

    async def get(self) -> None:
        self.set_header("Content-Type", "text/plain")
        self.finish(await health_handler())

    head = get


class ExecEndpoint(Endpoint):
    sending = False

    async def post(self) -> None:
        if self.slow is not None:
            self.slow.cancel()
        if self.received > MAX_BODY:
            raise tornado.web.HTTPError(413, f"body: got {self.received} bytes, expected at most {MAX_BODY}")
        request = ExecRequest.from_wire(bytes(self.body), self.state.workspace)
        accept = self.request.headers.get("Accept", "").lower().replace(" ", "")
        streamed = re.search(r"(^|,)text/event-stream(?!;q=0(\.0*)?(,|$))", accept)
        await self.perform(self.answer_stream(request) if streamed else self.answer(request))

    async def answer(self, request: ExecRequest) -> None:
        response = await exec_handler(self.state, request)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(response.to_wire(), ensure_ascii=False, separators=(",", ":")))

    async def answer_stream(self, request: ExecRequest) -> None:
        work = asyncio.ensure_future(exec_stream_handler(self.state, request, self.send_event))
        try:
            while not (await asyncio.wait({work}, timeout=KEEP_ALIVE))[0]:
                if self._headers_written and not self.sending:  # Tornado knows one flush at a time
                    self.write(": keep-alive\n\n")
                    self.flush()
            await work
        except asyncio.TimeoutError:
            log.warning("stream ended: its reader did not read for %g s", SLOW_READER_TIMEOUT)
            self.stream.close()
        finally:
            work.cancel()

    async def send_event(self, event: str, data: Message) -> None:
        if not self._headers_written:
            self.set_header("Content-Type", "text/event-stream")
            self.set_header("X-Accel-Buffering", "no")
            self.stream.set_nodelay(True)
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        self.sending = True
        self.write(f"event: {event}\ndata: {text}\n\n" if event else ": started\n\n")
        await self.flush()
        self.sending = False


class UnknownEndpoint(Endpoint):
    def _allowed(self) -> list[str]:
        return list(self.SUPPORTED_METHODS)

    def prepare(self) -> None:
        super().prepare()
        raise tornado.web.HTTPError(404, f"no such path: {self.request.path[:80]}")


ROUTES: list[tuple[str, type[Endpoint]]] = [
    (r"/health", HealthEndpoint),
    (r"/exec", ExecEndpoint),
]


# ==========================================================================
# Application                                                    budget 120
# ==========================================================================
@dataclass(frozen=True)
class Commands:
    """What the command line asks for."""


@dataclass(frozen=True)
class Server(Commands):
    """Start the proxy server."""

    port: str
    host: str
    workspace: str
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cli:
    """The command line."""

    command: Commands

    @classmethod
    def parse(cls, arguments: list[str]) -> Cli:
        """Exits with 2 and a message when the words are wrong."""
        parser = argparse.ArgumentParser(prog="pocketcoder", description=__doc__.split("\n")[0])
        parser.add_argument("--version", action="version", version=f"pocketcoder-proxy {VERSION}")
        commands = parser.add_subparsers(required=True, metavar="server")
        server = commands.add_parser("server", help="start the proxy server")
        workspace = "/workspace" if os.path.isdir("/workspace") else os.getcwd()
        environ = os.environ.get
        add = server.add_argument
        add("--version", action="version", version=f"pocketcoder-proxy {VERSION}")
        add("-p", "--port", default=str(DEFAULT_PORT), help="default %(default)s; 0: any free port")
        add("--host", default=environ("POCKETCODER_HOST") or "127.0.0.1", metavar="ADDR")
        add("--workspace", default=environ("POCKETCODER_WORKSPACE") or workspace, metavar="DIR")
        add("--allow-origin", action="append", default=[], metavar="ORIGIN")
        got = parser.parse_args(arguments)
        if not (got.port.isdecimal() and int(got.port) < 65536):
            server.error(f"--port: got {got.port!r}, expected a number from 0 to 65535")
        if not os.path.isdir(got.workspace):
            server.error(f"--workspace: got {got.workspace!r}, expected a directory")
        return cls(Server(got.port, got.host, os.path.realpath(got.workspace), tuple(got.allow_origin)))


async def serve(options: Server, token: str) -> None:
    """Listen until SIGTERM or SIGINT.  Raises OSError when it cannot."""
    socket_path = os.environ.get("TMUX_SOCKET") or DEFAULT_SOCKET
    session = os.environ.get("TMUX_SESSION") or DEFAULT_SESSION
    driver = PocketCoderDriver(socket_path, session, options.workspace)
    state = AppState({}, driver, options.workspace)
    shared: dict[str, Any] = {"state": state, "gate": Gate(token, frozenset(options.origins))}
    application = tornado.web.Application(
        [(path, endpoint, shared) for path, endpoint in ROUTES],
        default_handler_class=UnknownEndpoint,
        default_handler_args=shared,
        log_function=lambda handler: None,
        origins=shared["gate"].origins,
    )
    limits = {"max_body_size": 1 << 40, "idle_connection_timeout": IDLE_TIMEOUT}  # Endpoint answers 413
    server = tornado.httpserver.HTTPServer(application, **limits)
    sockets = tornado.netutil.bind_sockets(int(options.port), options.host)
    server.add_sockets(sockets)
    host, port = sockets[0].getsockname()[:2]
    print(f"pocketcoder: listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    attach = shlex.join(["tmux", "-S", driver.socket_path, "attach", "-t", session])
    print(f"pocketcoder: watch with: {attach}", file=sys.stderr, flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await driver.terminal(default_agent_name()).open()
    except (SandboxError, OSError) as refused:
        log.warning("no terminal yet: %s", refused)
    gc.freeze()  # what is here now stays; and a request makes no rubbish that has to go at once
    gc.set_threshold(10_000)
    await stop.wait()
    server.stop()
    await driver.close(STOP_GRACE)
    if state.calls:  # they have their results, and send them now
        await asyncio.wait(state.calls, timeout=STOP_GRACE)
    await server.close_all_connections()


def why_not(options: Server, token: str) -> str | None:
    """What is wrong with this machine or these settings, in a sentence."""
    if not token and not is_loopback(options.host):
        return f"--host {options.host} is reached from elsewhere: set POCKETCODER_TOKEN, or listen on 127.0.0.1"
    if not re.fullmatch(r"[!-~]*", token):
        return "POCKETCODER_TOKEN: expected visible ASCII characters without blanks"
    version = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        version = subprocess.run(["tmux", "-V"], capture_output=True, text=True, timeout=TMUX_TIMEOUT).stdout.strip()
    number = re.search(r"(\d+)\.(\d+)", version)
    if not version or (number and (int(number[1]), int(number[2])) < (3, 2)):
        return f"needs tmux 3.2 or later, got {version or 'none'}: install it, for instance `apt-get install tmux`"
    return None


def main() -> int:
    """The command line; its exit status."""
    options = Cli.parse(sys.argv[1:]).command
    assert isinstance(options, Server)
    token = os.environ.pop("POCKETCODER_TOKEN", "")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if not (wrong := why_not(options, token)):
            asyncio.run(serve(options, token))
    except (ProxyError, OSError) as failure:
        wrong = f"cannot serve on {options.host}:{options.port}: {failure}"
    if wrong:
        print(f"pocketcoder: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
