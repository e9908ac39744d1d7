#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["tornado>=6.2"]
# ///
"""pocketcoder-proxy: run an agent's commands in a tmux window of its sandbox.

    shell ──▶ GET /exec/ws ┐
              POST /exec ──┴▶ Endpoint ─▶ PocketCoderDriver ─▶ Tmux (tmux -C) ─▶ pane's shell
                                 ▲               │  ▲                                │
                                 │               │  └── status   "start" "exit"  ◀───┤ . RUN.go
                              answer ◀─ Output ◀─┼───── RUN.out  its output      ◀───┘
                                                 └────▶ the pane's tty: a person watches

Sections, top to bottom; each uses only what stands above it:
  Settings          limits, timeouts, defaults, variables of the environment
  Shell Bridge      `pocketcoder shell`: arguments in; streams, signals, exit code through
  Errors            one hierarchy, and what each error answers
  Wire types        what callers send and get
  Tmux              the control connection: commands, replies, notices
  Execution Driver  terminals, runs, output, exit codes, cancel, timeouts
  State and tools   what handlers share
  Transports        HTTP: the gate, handlers, endpoints, ROUTES
  Application       command line, start and stop

Routes:     GET /health, POST /exec, GET /exec/ws
Read from the environment: POCKETCODER_HOST POCKETCODER_TOKEN POCKETCODER_WORKSPACE
            TMUX_SESSION TMUX_SOCKET; by the shell OPENCODE_AGENT OPENCODE_SESSION_ID
            POCKETCODER_FORWARD_ENV POCKETCODER_TOKEN POCKETCODER_USAGE_ID PROXY_URL
Set for a command: POCKETCODER_RUN_ID POCKETCODER_AGENT POCKETCODER_SESSION_ID
            POCKETCODER_USAGE_ID, and QUIET_PROGRAMS
tmux:       new-session -A      the one long-lived control connection
            new-window split-window respawn-pane   make a terminal, as new-session does
            set-option          keep a window's name; no synchronized panes; room for four
            select-layout       make room for one more pane
            list-panes          what there is
            display-message     a pane's cursor and history: they tell whether somebody typed
            if-shell send-keys  type the line, but only if nobody did; C-c; copy-mode -q
            has-session         `session_exists`
Files of a run, SOCKET.d/DRIVER/RUN.*:
            go (sourced by the pane's shell)  in (stdin)  cmd (a long command)
            pid (claims the run; then the exit code)
            FIFOs: done (from us)  out, err  in (of a channel); one `status` for all runs

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
# Settings                                                       budget 55
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
RETURN_TIMEOUT = 2.0  # from the exit report to the prompt
CLEAR_PAUSE = 0.05  # for a shell to take a key; shorter than anybody types a line
DRAIN_PAUSE = 0.01  # between reads of what outlives its run: 100 MB/s
VIEW_DELAY = 0.005  # a command that ends sooner is shown at its end
VIEW_PAUSE, VIEW_TRIES = 0.01, 20  # a full terminal is written to again, and may delay the prompt by that
STOP_GRACE = 5.0  # SIGTERM: running commands may still end
KEEP_ALIVE = 15.0  # between comments on a silent stream
BODY_TIMEOUT = 60.0  # for a body to arrive
IDLE_TIMEOUT = 300.0  # of a kept connection
SLOW_READER_TIMEOUT = 60.0  # a reader gets that for the rest of an ended command
CONNECT_TIMEOUT = 10.0  # of the shell
SIGNAL_PATIENCE = 0.15  # of the shell after a signal: its callers kill it after 0.2
BRIDGE_CHUNK = 256 * KIB  # bytes that the shell reads at once


def default_agent_name() -> str:
    """The agent whose terminal is used when the caller names none."""
    return "poco"


# ==========================================================================
# Shell Bridge                                                  budget 343
# ==========================================================================
# `bash ARGUMENTS`, in the sandbox.  Each command pays for it anew: `sys`, `os`, three C modules.
#
# B1  Nothing is ever run here: what the proxy cannot run fails, with 125.
# B2  It ends with an exit code, never by a signal: some callers hang on that.
# B3  stdout and stderr are the command's; ours is one line there, when the proxy fails.
SHELL_NAMES = ("sh", "bash", "dash", "ash", "zsh", "ksh")
SIGNALS = {1: "HUP", 2: "INT", 3: "QUIT", 10: "USR1", 12: "USR2", 15: "TERM"}
OPTIONS = "-+abefhiklmnoprstuvxBCDEHPTO"  # of bash, with which it would read commands from stdin
LONG_OPTIONS = ("--init-file", "--login", "--noediting", "--noprofile", "--norc", "--posix", "--rcfile", "--verbose")
BLOCKED = "[Firewall Blocked] Interactive or raw shell invocation is restricted for security. "
BLOCKED += "Always execute commands via 'bash -c \"command\"'."
CHANNELS = "v5.channel.k8s.io"  # the framing of `kubectl exec`
WS_KEY, WS_ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, 1.3: one pair will do
ESCAPES = {number: f"\\u{number:04x}" for number in (*range(32), 34, 92)}  # of JSON


class Failed(Exception):
    """What to say on stderr, and the exit status."""


def quote(word: str) -> str:
    """A word for bash, whatever is in it: bytes that are not UTF-8 by their number."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return "$'" + "".join(f"\\{byte:03o}" for byte in os.fsencode(word)) + "'"
    return "'" + word.replace("'", "'\\''") + "'"


def shell_arguments(argv: list[str]) -> list[str] | None:
    """What in `argv` is for the shell, as arguments of bash; None: it is not called."""
    name, words = os.path.basename(argv[0]), argv[1:]
    if name in SHELL_NAMES or name.endswith("-shell") or not words:
        return words
    called = words[0] == "shell"
    words = words[called:]
    if words[:1] in (["--version"], ["--help"], ["-h"]):
        return None
    if not called:
        return words if words[0][:1] in ("-", "+") else None
    option, equals, value = "".join(words[:1]).partition("=")
    if option == "--command":
        return ["-c", "--", *[value][: len(equals)], *words[1:]]
    if words and (option == "--" or words[0][:1] not in ("-", "+")):  # plain words are one command
        return ["-c", " ".join(map(quote, words[option == "--" :]))]
    return words


def command_of(words: list[str]) -> tuple[str, bytes]:
    """The text for the sandbox's bash that does what `bash WORDS` does here, and what was read of stdin."""
    literal, text = words[:2] == ["-c", "--"], words[-1] if "".join(words[-1:]).strip() else ":"
    try:
        streams = " 2>&1" * os.path.sameopenfile(1, 2)  # else their order would be lost
    except OSError:  # closed
        streams = ""
    if words[:1] == ["-c"] and len(words) == 2 + literal and (literal or text[0] not in "-+") and not streams:
        return (text if quote(text)[0] == "'" else f"eval {quote(text)}"), b""
    options, long, rest, letters, first = list[str](), list[str](), list(words), "", b""
    while rest and rest[0] not in ("-", "--") and rest[0][:1] in ("-", "+"):
        options.append(word := rest.pop(0))
        if word[:2] == "--":
            long, takes = [*long, word], int(word in ("--rcfile", "--init-file"))
        else:
            letters, takes = letters + word, word.count("o") + word.count("O")
        options, rest = options + rest[:takes], rest[takes:]
    rest = rest[rest[:1] in (["-"], ["--"]) :]
    if "c" not in letters and "s" not in letters and rest:  # a script file, which is here, not there
        try:
            with open(rest[0], "rb") as file:
                script = os.fsdecode(file.read())
        except OSError as wrong:
            raise Failed(f"{rest[0]}: {wrong.strerror}", 126 + (wrong.errno == 2)) from None
        if "\0" in script:
            raise Failed(f"{rest[0]}: cannot execute binary file", 126)
        if len(script) > 30_000:  # maybe more than an argument can be
            setting = [word for word in options if word[:2] != "--" and word[1:] not in ("l", "i")]
            arguments = " ".join(map(quote, [*setting, "--", *rest[1:]]))
            return f"BASH_ARGV0={quote(rest[0])}; set {arguments}; {f'exec{streams}; ' * bool(streams)}{script}", b""
        options, rest = [*options, "-c"], [script, *rest]
    elif "c" not in letters and {*letters} <= {*OPTIONS} and all(word in LONG_OPTIONS for word in long):
        try:
            first = b"" if os.isatty(0) else os.read(0, BRIDGE_CHUNK)
        except OSError:  # closed
            first = b""
        if not first:
            raise Failed(BLOCKED, 1)
    return 'exec ${BASH:+-a "$0"} "${BASH:-sh}" ' + " ".join(map(quote, [*options, "--", *rest])) + streams, first


def json_text(table: dict[str, str]) -> str:
    pairs = (f'"{name.translate(ESCAPES)}":"{value.translate(ESCAPES)}"' for name, value in table.items())
    return "{" + ",".join(pairs) + "}"


def request_of(command: str) -> bytes:
    """The first message, see ExecRequest.  Raises Failed."""
    get = os.environ.get
    wanted = [name.strip() for name in get("POCKETCODER_FORWARD_ENV", "").split(",")]
    prefixes = tuple(name[:-1] for name in wanted if name[-1:] == "*")
    env = {n: v for n, v in os.environ.items() if (n in wanted or n.startswith(prefixes)) and n != "POCKETCODER_TOKEN"}
    try:
        fields = {"cmd": command, "cwd": os.getcwd(), "agent_name": get("OPENCODE_AGENT") or default_agent_name()}
        ids = {"session_id": get("OPENCODE_SESSION_ID"), "usage_id": get("POCKETCODER_USAGE_ID")}
        fields |= {name: value for name, value in ids.items() if value}
        return f'{json_text(fields)[:-1]},"timeout":{MAX_TIMEOUT},"env":{json_text(env)}}}'.encode()
    except OSError as wrong:
        raise Failed(f"the current directory {get('PWD', '')!r}: {wrong.strerror}", 125) from None
    except UnicodeEncodeError as wrong:
        raise Failed(f"expected UTF-8, got {wrong.object[max(0, wrong.start - 60) : wrong.end]!a}", 125) from None


class Bridge:
    """One connection to `GET /exec/ws`, for stdin, stdout, stderr and signals of this process.  Raises Failed."""

    def __init__(self, url: str) -> None:
        import _thread

        self.url, self.unread, self.sending = url, b"", _thread.allocate_lock()
        self.sock: Any = None  # once the channel is open
        self.status = 0  # how to end, once a signal has come

    def on_signal(self, number: int, _: object) -> None:
        """Pass it on, and end soon, whatever the command does."""
        import _signal  # type: ignore[import-not-found]

        if number == _signal.SIGALRM and self.sock is None and not self.status:
            raise Failed(f"{self.url}: no answer within {CONNECT_TIMEOUT:g} s", 125)
        again, self.status = self.status, self.status or 128 + number
        if again or self.sock is None or number == _signal.SIGALRM:
            raise Failed("", self.status)
        _signal.setitimer(_signal.ITIMER_REAL, SIGNAL_PATIENCE)
        self.send(1, b'{"signal":"%s","end":true}' % SIGNALS[number].encode(), wait=False)

    def send(self, opcode: int, data: bytes, wait: bool = True) -> None:
        """A frame.  Its mask is zero: masks are for browsers, and cost a step a byte."""
        size = len(data)
        length = bytes([128 | size]) if size < 126 else b"\xff" + size.to_bytes(8, "big")
        if self.sending.acquire(wait):
            try:
                self.sock.sendall(b"".join((bytes([128 | opcode]), length, bytes(4), data)))
            except OSError:  # the proxy has left; what it said before comes first
                pass
            finally:
                self.sending.release()

    def feed(self, data: bytes) -> None:
        """Send `data` and all of stdin.  In a thread of its own, which nobody waits for."""
        try:
            ours = os.tcgetpgrp(0) == os.getpgrp()  # else reading would stop us
        except OSError:  # no terminal
            ours = True
        try:
            while ours and (data or (data := os.read(0, BRIDGE_CHUNK))):
                self.send(2, b"\0" + data)
                data = b""
        except OSError:  # there is none
            pass
        self.send(2, b"\xff\0")

    def connect(self) -> None:
        """Open the channel.  Raises OSError too."""
        import _socket

        scheme, _, address = self.url.rstrip("/").partition("://")
        host, _, port = (address if ":" in address else f"{address}:80").rpartition(":")
        if scheme != "http" or not host or not port.isdecimal():
            raise Failed(f"PROXY_URL: got {self.url!r}, expected http://HOST:PORT", 125)
        token, head, failure = os.environ.get("POCKETCODER_TOKEN"), b"", 0
        lines = ["GET /exec/ws HTTP/1.1", f"Host: {address}", "Connection: Upgrade", "Upgrade: websocket"]
        lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {WS_KEY}", f"Sec-WebSocket-Protocol: {CHANNELS}"]
        lines += [f"Authorization: Bearer {token}"] if token else []
        for family, kind, protocol, _, place in _socket.getaddrinfo(host.strip("[]").encode(), int(port), 0, 1):
            sock = _socket.socket(family, kind, protocol)
            if not (failure := sock.connect_ex(place)):
                break
        else:
            raise OSError(failure, os.strerror(failure))
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        while b"\r\n\r\n" not in head and len(head) < BRIDGE_CHUNK and (more := sock.recv(BRIDGE_CHUNK)):
            head += more
        head, _, self.unread = head.partition(b"\r\n\r\n")
        if head[:13] != b"HTTP/1.1 101 " or WS_ACCEPT not in head:
            said = ascii(head[:80].partition(b"\r")[0].decode("latin-1"))
            raise Failed(f"{self.url} refused: {said}; see PROXY_URL, POCKETCODER_TOKEN", 125)
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # who reads no stdin hears our end
        self.sock = sock

    def read(self, size: int, all_of_it: bool = True) -> bytes:
        """So many bytes from the proxy, or what there is of them."""
        while len(self.unread) < (size if all_of_it else 1):
            try:
                more = self.sock.recv(BRIDGE_CHUNK)
            except OSError:
                more = b""
            if not more:
                raise Failed(f"{self.url} closed the connection before the end of the command", 125)
            self.unread = self.unread + more if self.unread else more
        data, self.unread = self.unread[:size], self.unread[size:]
        return data

    def run(self, request: bytes, first: bytes) -> int:
        """Carry everything both ways; the exit status.  `first`: read from stdin already."""
        import _signal
        import _thread

        _signal.setitimer(_signal.ITIMER_REAL, CONNECT_TIMEOUT)
        try:
            self.connect()
        except (OSError, UnicodeError, OverflowError) as wrong:
            raise Failed(f"cannot reach the proxy at {self.url}: {wrong}; is it running?", 125) from None
        _signal.setitimer(_signal.ITIMER_REAL, 0)
        self.send(1, request)
        _thread.start_new_thread(self.feed, (first,))
        while True:
            kind, size = self.read(2)
            if size in (126, 127):
                size = int.from_bytes(self.read(2 if size == 126 else 8), "big")
            channel, left = self.read(1)[0], size - 1
            if kind != 0x82 or channel not in (1, 2, 3) or left < 0 or (channel == 3 and left > MIB):
                raise Failed(f"{self.url} closed the channel, or does not speak {CHANNELS}", 125)
            if channel == 3:
                return self.end(self.read(left))
            while left:
                piece = self.read(left, False)
                left -= len(piece)
                self.write(channel, piece)

    def write(self, fd: int, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:  # whoever shares it has made it so
                os.set_blocking(fd, True)
            except OSError as wrong:
                gone = wrong.errno == 32  # EPIPE
                raise Failed("" if gone else f"cannot write: {wrong.strerror}", 141 if gone else 125) from None

    def end(self, final: bytes) -> int:
        """The exit status that the last message tells, see ExecResponse."""
        code = final.partition(b'"exit_code":')[2].partition(b",")[0].strip()
        if code.isdigit() and b'"error"' not in final:
            return int(code)
        import json

        try:
            answer = json.loads(final)
            text, status = answer["error"], answer["exit_code"] if "ended" in answer else 125
        except (ValueError, TypeError, KeyError):
            text, status = f"{self.url} ended with {final[:80]!r}", 125
        raise Failed(text, status)


def run_shell(words: list[str]) -> int:
    """Do as `bash WORDS`, in the sandbox; see `run`."""
    import _signal

    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:  # so that no socket gets to be stdout
        pass
    os.close(fd)
    bridge = Bridge(os.environ.get("PROXY_URL") or f"http://localhost:{DEFAULT_PORT}")
    heeded = [number for number in (*SIGNALS, _signal.SIGALRM) if _signal.getsignal(number) != _signal.SIG_IGN]
    before = [(number, _signal.signal(number, bridge.on_signal)) for number in heeded]
    try:
        text, first = command_of(words)
        status = bridge.run(request_of(text), first)
    except Failed as failure:
        text, status = failure.args
        try:
            os.write(2, f"pocketcoder: {text}\n".encode(errors="replace") if text else b"")
        except OSError:  # nobody listens
            status = status or 125
    _signal.setitimer(_signal.ITIMER_REAL, 0)
    for number, handler in before:
        _signal.signal(number, handler)
    return bridge.status or status


def run(command: str | None, args: list[str]) -> int:
    """Run `command` with `args` as its $0, $1 ..., or without one what `pocketcoder shell ARGS` would.

    The exit status: the command's; 125 if the proxy failed, 141 if nobody reads, 128+n after signal n.
    """
    return run_shell(
        ["-c", "--", command, *args] if command is not None else shell_arguments(["", "shell", *args]) or []
    )


if __name__ == "__main__" and (_words := shell_arguments(sys.argv)) is not None:
    os._exit(run_shell(_words))  # all is written, and there is nothing to tear down


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
import socket
import stat
import subprocess
import termios
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

try:
    import tornado.httpserver
    import tornado.netutil
    import tornado.web
    import tornado.websocket
except ModuleNotFoundError:  # the shell and the driver do without; `why_not` tells who wants a server
    tornado = SimpleNamespace(  # type: ignore[assignment]
        web=SimpleNamespace(RequestHandler=object),
        websocket=SimpleNamespace(WebSocketHandler=type("WebSocketHandler", (), {})),
    )

__all__ = ["AppState", "Cli", "CommandResult", "Commands", "ExecRequest", "ExecResponse", "McpQuery"]
__all__ += ["PocketCoderDriver", "default_agent_name", "exec_handler", "health_handler", "main"]
log = logging.getLogger("pocketcoder")
T = TypeVar("T")
SIGNAL_NUMBERS = {name: signal.Signals[f"SIG{name}"] for name in ("INT", "TERM", "HUP", "QUIT", "KILL", "USR1", "USR2")}


# ==========================================================================
# Errors                                                         budget 30
# ==========================================================================
# E1  A command that fails is a result; a proxy that cannot do its job is an error.
# E2  Each class carries its answers; nothing else maps errors to numbers.
#     What is HTTP's alone (401, 404, 405, 413, 415) is Tornado's HTTPError.
class ProxyError(Exception):
    """Ours, and unexpected."""

    http_status, exit_code = 500, 125  # as `timeout` of coreutils: the command could not be run


class BadMessage(ProxyError):
    """The shape, type or size of what was sent."""

    http_status, exit_code = 400, 2


class Forbidden(ProxyError):
    """`Origin` or `Host` is not one of ours."""

    http_status = 403


class NoTerminal(ProxyError):
    """The sandbox cannot run it now, nothing was run: tmux refuses, no shell answers, the queue is full."""

    http_status = 503


# ==========================================================================
# Wire types                                                    budget 134
# ==========================================================================
# W1  What comes from outside is checked here, once; nobody checks it again.
# W2  A complaint names the field, what was got and what was expected.
Message = dict[str, Any]
AGENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def complain(name: str, got: object, expected: str) -> BadMessage:
    """A BadMessage that shows the start of what was got."""
    shown = ascii(got[:80] if isinstance(got, str) else got)
    return BadMessage(f"`{name}`: got {shown if len(shown) <= 90 else shown[:80] + '...'}, expected {expected}")


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

    def to_wire(self) -> str:
        shown = {name: value for name, value in vars(self).items() if value is not None}
        return json.dumps(shown, ensure_ascii=False, separators=(",", ":"))


# ==========================================================================
# Tmux                                                          budget 180
# ==========================================================================
# The only section that talks to tmux.
#
# T1  Commands go down one control connection; replies come back in their order.
# T2  Panes and windows are addressed by id; names are for finding.
# T3  Nothing here reads a screen.
PANE_FORMAT = "#{pane_id} #{window_id} #{pane_pid} #{pane_in_mode} #{pane_width} #{pane_tty} #{window_name}"
# Changes when somebody types, or anything is shown; not a person's last look at it.
PANE_STATE = "#{cursor_x} #{cursor_y} #{history_size} #{pane_in_mode} #{pane_synchronized}"
NO_MODE = "#{==:#{pane_in_mode}#{pane_synchronized},00}"


class Pane(NamedTuple):
    """A pane, as tmux described it when asked."""

    pane_id: str
    window_id: str
    pid: int
    in_mode: bool
    width: int
    tty: str
    window_name: str

    @classmethod
    def parse(cls, line: str) -> Pane:
        pane, window, pid, mode, width, tty, name = line.split(" ", 6)
        return cls(pane, window, int(pid), mode != "0", int(width), tty, name)


def find_shell() -> str:
    """The path of bash, else of sh, that is not this very file under a shell's name."""
    folders = [*os.environ.get("PATH", "").split(":"), "/bin", "/usr/bin", "/usr/local/bin"]
    for shell in (f"{folder}/{name}" for name in ("bash", "sh") for folder in folders if folder):
        if os.access(shell, os.X_OK) and not os.path.samefile(shell, __file__):
            return shell
    raise NoTerminal("no bash and no sh in PATH: install one")


class Tmux(asyncio.SubprocessProtocol):
    """A control connection (`tmux -C`) to our session.  Raises NoTerminal.

    on_notice  called after tmux told of changes, and at the end
    """

    def __init__(self, session: str, on_notice: Callable[[], object]) -> None:
        self.session, self.on_notice = session, on_notice
        self.loop = asyncio.get_running_loop()
        self.attached: asyncio.Future[list[str]] = self.loop.create_future()
        self.replies: deque[asyncio.Future[list[str]]] = deque()
        self.unread, self.lines = b"", list[str]()
        self.block = ""  # what stood behind `%begin`, and will behind `%end`
        self.closed, self.ended = False, asyncio.Event()  # of no use any more; its process is gone
        self.notices = 0  # how many there were: what was asked before may be old
        self.made = list[Pane]()  # with the session, if that was missing

    @classmethod
    async def connect(
        cls, path: str, session: str, window: list[str] | None, on_notice: Callable[[], object] = int
    ) -> Tmux:
        """Attach to `session` at the socket `path`; make it if it is missing, with this first `window`."""
        hidden = ("POCKETCODER_TOKEN", "POCKETCODER_RUN_ID", "TMUX", "TMUX_PANE")
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        words = ["tmux", "-S", path, "-C", "new-session", "-A", "-s", session, "-x", "200", "-y", "50"]
        words += ["-P", "-F", PANE_FORMAT, "-f", "no-output,ignore-size", *(window or [])]
        try:  # default-shell is taken from SHELL, which may be this very file
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            _, self = await asyncio.get_running_loop().subprocess_exec(
                lambda: cls(session, on_notice), *words, env=variables | {"SHELL": find_shell()}
            )
        except OSError as missing:
            raise NoTerminal(f"cannot run tmux ({missing}): install tmux 3.2 or later") from None
        try:
            self.made = [Pane.parse(line) for line in await self.reply(self.attached)]
        except BaseException:
            self.close()
            raise
        self.send(["set-option", "-t", f"={session}:", "default-size", "200x50"])
        for pane in self.made:
            self.keep_name(pane)
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
                self._answer(self.replies.popleft() if ours else self.attached, word == "%error", self.lines)
                self.block = ""
            elif self.block:
                self.lines.append(line)
            elif word == "%begin":
                self.block, self.lines = rest, []
            elif fd == 2 or word == "%exit":
                self._answer(self.attached, True, [line])
            else:
                self.notices += 1
        if self.notices > before:
            self.on_notice()

    @staticmethod
    def _answer(future: asyncio.Future[list[str]], failed: bool, lines: list[str]) -> None:
        if failed and not future.done():
            future.set_exception(NoTerminal(f"tmux: {' '.join(lines)}"))
            future.exception()  # not every reply is waited for
        elif not future.done():
            future.set_result(lines)

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
            self._answer(future, True, [why])

    def send(self, *commands: list[str]) -> asyncio.Future[list[str]]:
        """Write commands at once, so that nothing comes in between; the last one's reply.

        An empty command stands for the reply of what an `if-shell` before it runs.
        """
        futures = [self.loop.create_future() for _ in commands]
        self.replies.extend(futures)
        if self.closed:
            self._answer(futures[-1], True, ["the connection has ended"])
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

    async def panes(self) -> list[Pane]:
        """All panes of the session."""
        return [Pane.parse(x) for x in await self.ask("list-panes", "-s", "-t", f"={self.session}:", "-F", PANE_FORMAT)]

    async def state(self, pane: Pane) -> str:
        """The pane's PANE_STATE."""
        state = " ".join(await self.ask("display-message", "-p", "-t", pane.pane_id, PANE_STATE))
        if not state[:1].isdigit():
            raise NoTerminal(f"pane {pane.pane_id} is gone")
        return state

    def send_keys(self, pane: Pane, state: str, *keys: str) -> asyncio.Future[list[str]]:
        """Press keys if the pane is in this state still; "": if only no mode would take them.

        The reply is empty if they were pressed.
        """
        words = " ".join(map(quote, ["send-keys", "-t", pane.pane_id, *keys]))
        same = f"#{{==:{PANE_STATE},{state}}}" if state else NO_MODE
        return self.send(["if-shell", "-F", "-t", pane.pane_id, same, words, "display-message -p no"], [])

    def keep_name(self, pane: Pane) -> None:
        """Let nobody but a person rename its window."""
        rename = ["set-option", "-w", "-t", pane.window_id]
        self.send([*rename, "automatic-rename", "off"], [*rename, "allow-rename", "off"])


# ==========================================================================
# Execution Driver                                              budget 933
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
QUIET = " ".join(f"{name}={value}" for name, value in QUIET_PROGRAMS.items())
Take = Callable[[bytes], "Awaitable[None] | None"]

# Sourced by the pane's shell.  Backslashes are against aliases, `&&` is against `set -e`.  INT is
# trapped, since a command that dies of C-c would take go along.  `read` has a limit, or does not
# know one and fails: go waits for nobody who may be gone.  The last line is read before the next
# run may write this file anew; what an older run wrote behind it is never read.
GO = r"""\exec 8<>{run}.done 9<>{status}
\trap : INT
(
\unset -f cd chpwd echo exec exit export read set 2>/dev/null; \unset chpwd_functions POCKETCODER_TOKEN
_pc=${{BASHPID-}}; [ "$_pc" ] || \read -r _pc _pd </proc/self/stat
\set +xv -C; \echo "$_pc" >{run}.pid || \exit
\set +C; \exec <{stdin} || \exit
\echo "{run_id} start $_pc" >&9
\exec {outputs} 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-
\cd -- {cwd} || \exit
\export {quiet} POCKETCODER_RUN_ID={run_id} POCKETCODER_AGENT={agent}
\export POCKETCODER_SESSION_ID={session} POCKETCODER_USAGE_ID={usage}
\exec {command}
) && _pc=0 || _pc=$?
\echo "$_pc" >>{run}.pid
\echo "{run_id} exit $_pc" >&9
\read -r -t 1 _pc <&8 2>/dev/null || :
{{ \echo "{run_id} back 0" >&9; \exec 8>&- 9>&-; \trap - INT; \unset _pc; \return 0; }}
"""


def go_script(job: Job, shell: str) -> dict[str, str]:
    """The files of a run: `go`; `in`, its stdin; `cmd`, where it is too long for an argument."""
    request, run = job.request, shlex.quote(job.run)
    files = {} if request.stdin is None else {"in": request.stdin}
    command = [shell, "-c", request.cmd, os.path.basename(shell)]
    if len(request.cmd) > MAX_ARGUMENT // 4:  # characters of up to four bytes
        files["cmd"], command[2] = request.cmd, f'eval "$(cat {run}.cmd)"'
    if request.env:  # by env(1), which takes names that are none for a shell
        command = ["env", "--", *(f"{name}={value}" for name, value in request.env.items()), *command]
    texts = {"status": job.files.status_path, "cwd": request.cwd or ".", "agent": request.agent_name}
    texts |= {"session": request.session_id or "", "usage": request.usage_id or ""}
    outputs = f"1<>{run}.out " + (f"2<>{run}.err" if "err" in job.takes else "2>&1")
    stdin = f"{run}.in" if job.feed or "in" in files else "/dev/null"
    parts = {"run": run, "run_id": job.run_id, "stdin": stdin, "outputs": outputs, "quiet": QUIET}
    parts |= {name: shlex.quote(text) for name, text in texts.items()}
    return files | {"go": GO.format(command=shlex.join(command), **parts)}


def read_proc(pid: int, name: str, size: int = 4 * KIB) -> bytes:
    """A file of /proc, in one read: it may change in between.  Raises OSError."""
    with open(f"/proc/{pid}/{name}", "rb", 0) as file:
        return file.read(size)


class Process(NamedTuple):
    """Of /proc/PID/stat, see proc(5)."""

    name: str
    parent: int
    group: int
    foreground: int  # the process group that its terminal listens to


def process(pid: int) -> Process | None:
    """None: there is none, or it has ended."""
    with contextlib.suppress(OSError):
        head, _, tail = read_proc(pid, "stat").decode("latin-1").rpartition(")")
        state, parent, group, _, _, foreground, *_ = tail.split(None, 6)
        if state not in "ZX":
            return Process(head.partition("(")[2], int(parent), int(group), int(foreground))
    return None


def processes_of(job: Job) -> set[int]:
    """The run's processes: its group, what carries its name or its output, and what descends from these."""
    mark, found, parents = f"POCKETCODER_RUN_ID={job.run_id}".encode(), set[int](), dict[int, int]()
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if (it := process(pid)) is None:
                continue
            parents[pid] = it.parent
            ours = it.group == (job.pid or -1) or mark in read_proc(pid, "environ", 4 * MIB).split(b"\0")
            if ours or any(os.readlink(f"/proc/{pid}/fd/{fd}").startswith(f"{job.run}.") for fd in (1, 2)):
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


class PaneShell:
    """The shell in a pane: whether it waits for a command, and whether somebody has typed there."""

    def __init__(self, pane: Pane, new: bool = False) -> None:
        self.pane = pane
        self.ran = False  # a line of ours: it is through with its start-up files, and no script
        self.shown = False  # its prompt, in a way that can be told
        self.missed = 0  # lines in a row that it did not run
        # Nobody has typed: until then, for a new shell and just after a run; while the pane is in that state.
        self.quiet, self.state = NEW_SHELL_TIMEOUT * new and time.monotonic() + NEW_SHELL_TIMEOUT, ""
        self.last = ""  # its state at the prompt, when that was last known
        self.noting: asyncio.Task[None] | None = None

    def look(self) -> str:
        """Whether it waits for a command: "ready" (as far as it tells), "soon", "busy"."""
        with contextlib.suppress(OSError, termios.error):
            shell = process(self.pane.pid)
            if shell and shell.name == "tmux: server":  # forked, and about to become the shell
                return "soon"
            if shell and shell.foreground == shell.group and shell.name in SHELLS and (self.ran or self._reads_tty()):
                if not SHELLS[shell.name]:
                    return "ready"
                tty = os.open(self.pane.tty, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
                try:
                    return "soon" if termios.tcgetattr(tty)[3] & termios.ICANON else "ready"
                finally:
                    os.close(tty)
        return "busy"

    def _reads_tty(self) -> bool:
        """It was not started with a script or with -c."""
        words = read_proc(self.pane.pid, "cmdline").decode("latin-1").split("\0")[1:-1]
        letters = "".join(word for word in words if re.match(r"[-+]\w", word))
        return "c" not in letters and ("i" in letters or all(w[:1] in "-+" or w in SHELLS for w in words))

    async def at_prompt(self) -> bool:
        """Whether it waits for a command, or will in a moment."""
        deadline = time.monotonic() + (PROMPT_TIMEOUT if self.ran else NEW_SHELL_TIMEOUT)
        while (state := self.look()) == "soon" and time.monotonic() < deadline:
            if self.ran and not self.shown:  # it never tells
                return True
            await asyncio.sleep(0.001)  # a shell announces its prompt to nobody
        self.shown |= state == "ready"
        return state == "ready" or (state == "soon" and not self.shown)

    async def clear(self, tmux: Tmux) -> str:
        """Make sure that nothing is typed at the prompt: its state then, now in `last`; "" if nobody can type yet."""
        quiet, state = time.monotonic() < self.quiet, self.state
        self.quiet, self.state = 0.0, ""
        if state or (self.last and quiet):  # in the moment after a run nobody has typed a line
            return state
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
        return now

    def back(self, tmux: Tmux) -> None:
        """A run has ended: learn in what state the prompt is then.  Who types, changes that."""
        self.quiet = time.monotonic() + PROMPT_TIMEOUT  # or until it is known
        self.noting = asyncio.ensure_future(self._note(tmux, self.quiet))

    async def _note(self, tmux: Tmux, quiet: float) -> None:
        with contextlib.suppress(NoTerminal):
            await asyncio.sleep(CLEAR_PAUSE)
            ready = self.quiet == quiet and await self.at_prompt()
            now = await tmux.state(self.pane) if ready else ""
            if self.quiet == quiet:  # else it is used again
                self.quiet = 0.0
                if now.split(" ")[0] == self.last.split(" ")[0]:  # else something was typed meanwhile
                    self.state = self.last = now


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


class Pipe:
    """Our end of a FIFO, or a terminal."""

    def __init__(self, path: str, flags: int, on_close: Callable[[], object] = int) -> None:
        self.loop, self.on_close = asyncio.get_running_loop(), on_close
        self.fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)

    def widen(self) -> None:
        """Let it hold more, as far as the system allows."""
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.fd, 1031, CHUNK)  # F_SETPIPE_SZ

    def close(self) -> None:
        if self.fd >= 0:
            self.loop.remove_reader(self.fd)
            self.loop.remove_writer(self.fd)
            os.close(self.fd)
            self.fd, on_close, self.on_close = -1, self.on_close, int  # it may hold who holds us
            on_close()


class Output(Pipe):
    """What a run writes: handed to `take` while the run lasts, then drained.

    An awaitable that `take` returns stops the reading until it is done: back-pressure.
    """

    def __init__(self, path: str, take: Take | None, on_close: Callable[[], object] = int) -> None:
        super().__init__(path, os.O_RDONLY, on_close)
        self.take, self.total = take, 0
        self.taken: asyncio.Future[None] | None = None
        self._resume()

    def _resume(self) -> None:
        if self.fd >= 0:
            self.loop.add_reader(self.fd, self.read)

    def read(self) -> None:
        try:
            chunk = os.read(self.fd, CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            self.close()
        elif self.take is None:  # what outlives its run may write on, at no cost to others
            self.loop.remove_reader(self.fd)
            self.loop.call_later(DRAIN_PAUSE, self._resume)
        else:
            self.total += len(chunk)
            if len(chunk) == 64 * KIB:  # a pipe of the usual size, full
                self.widen()
            if (wait := self.take(chunk)) is not None:
                self.loop.remove_reader(self.fd)
                self.taken = asyncio.ensure_future(self._wait(self.taken, wait))

    async def _wait(self, *steps: Awaitable[None] | None) -> None:
        with contextlib.suppress(OSError):  # the reader has left
            for step in filter(None, steps):
                await step
        self._resume()

    def finish(self) -> None:
        """The command has ended: take what it left in the pipe, drain what others write."""
        if self.fd >= 0 and self.take:
            self.read()
        self.take = None
        self._resume()


class Input(Pipe):
    """What a run reads: its stdin, as it comes."""

    def __init__(self, path: str) -> None:
        os.mkfifo(path, 0o600)
        self.room = asyncio.Event()
        super().__init__(path, os.O_RDWR, self.room.set)  # not O_WRONLY: go need not wait for a writer

    async def write(self, data: bytes) -> None:
        """Wait until all is in the pipe, or it is closed."""
        left = memoryview(data)
        while left and self.fd >= 0:
            try:
                left = left[os.write(self.fd, left) :]
            except BlockingIOError:
                self.widen()
                self.room.clear()
                self.loop.add_writer(self.fd, self._wake)
                await self.room.wait()

    def _wake(self) -> None:
        self.loop.remove_writer(self.fd)
        self.room.set()


class View(Pipe):
    """A run's output copied to the pane's tty for a person: best effort, nobody waits for it."""

    # Colours and movements pass; what else a terminal does on request is not for a command.
    UNSAFE = re.compile(rb"[\0-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\x1b(?!\[[0-9;:]*[A-HJKSTfm])")

    def __init__(self, pane: Pane, command: str, line: str, column: int) -> None:
        """The typed `line` is to be replaced by `command`, behind the prompt that ends at `column`."""
        super().__init__(pane.tty, os.O_WRONLY)
        self.seen, self.begun, self.last = 0, False, b"\n"
        rows = 1 + (column + len(line)) // max(1, pane.width)
        shown = command[:MAX_VIEW_COMMAND] + "…" * (len(command) > MAX_VIEW_COMMAND)
        safe = self.UNSAFE.sub(b"", shown.encode()).replace(b"\x1b", b"")
        self.unwritten = bytearray(b"\x1b[%dA\x1b[%dG\x1b[J%s\n" % (rows, column + 1, safe))

    def write(self) -> None:
        """Show what there is, and from now on what comes, as far as the terminal takes it."""
        self.begun = True
        with contextlib.suppress(OSError):  # it is full, or gone
            del self.unwritten[: os.write(self.fd, self.unwritten)]

    def add(self, chunk: bytes) -> None:
        shown = self.UNSAFE.sub(b"", chunk[: max(0, MAX_VIEW - self.seen)])
        self.seen, self.last = self.seen + len(chunk), shown[-1:] or self.last
        self.unwritten += shown
        if self.begun and shown:
            self.write()

    async def end(self, exit_code: int) -> None:
        """Mark the end, and wait a moment until all is on the terminal."""
        text = "\n" * (self.last != b"\n")
        if self.seen > MAX_VIEW:
            text += f"[pocketcoder: {self.seen - MAX_VIEW} more bytes not shown here]\n"
        self.unwritten += (text + f"[exit {exit_code}]\n" * (exit_code != 0)).encode()
        for _ in range(VIEW_TRIES):
            self.write()
            if not self.unwritten:
                break
            await asyncio.sleep(VIEW_PAUSE)
        self.close()


class RunFiles:
    """A directory for runs beside the socket, `SOCKET.d/N`.  Each driver has its own, locked: it lives.

    `status` is a FIFO for the reports of all runs, lines of run_id, word, number.  A run has the
    files `SOCKET.d/N/RUN.*`.  Names are short, since they are typed, and used again by later
    runs: making files costs more than all the rest.  Raises NoTerminal, OSError.
    """

    OWN, FIFOS = ("pid", "in", "cmd"), ("done", "out", "err")  # made by each run; for the next of that name

    def __init__(self, base: str) -> None:
        self.base, self.unread = base, b""
        self.count, self.free = 0, list[str]()  # names there were; those to use again
        self.jobs: dict[str, Job] = {}  # by run_id, those that have files
        os.makedirs(os.path.dirname(base), 0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(base, 0o700)
        found = os.lstat(base)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise NoTerminal(f"{base}: expected a directory of our own; remove what is there")
        self.adoptions = [asyncio.ensure_future(self._adopt(f"{base}/{name}")) for name in os.listdir(base)]
        self.folder = f"{base}/{secrets.token_hex(2)}"  # a line typed for one that was wiped finds no other
        os.mkdir(self.folder, 0o700)
        self.lock = os.open(self.folder, os.O_RDONLY)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a driver that starts now may be adopting it
        self.status_path = f"{self.folder}/status"
        os.mkfifo(self.status_path, 0o600)
        self.status = Pipe(self.status_path, os.O_RDWR)
        self.status.loop.add_reader(self.status.fd, self._on_status)

    def _on_status(self) -> None:
        *lines, unread = (self.unread + os.read(self.status.fd, 64 * KIB)).split(b"\n")
        self.unread = unread[-KIB:]
        for run_id, word, number in (line.decode("latin-1").split(" ") for line in lines if line.count(b" ") == 2):
            if run_id in self.jobs and number.isdecimal():
                self.jobs[run_id].on_report(word, int(number[:9]))

    def there(self) -> bool:
        """False if someone wiped it; then it closes after its last run."""
        there = os.path.exists(self.status_path)
        if not there and not self.jobs:
            self.close()
        return there

    def take(self, job: Job) -> str:
        """A path for its files, but for the suffixes."""
        if not self.free:
            self.count += 1
            self.free.append(f"{self.folder}/{self.count:x}")
            for name in self.FIFOS:
                os.mkfifo(f"{self.free[-1]}.{name}", 0o600)
        self.jobs[job.run_id] = job
        return self.free.pop()

    def give_back(self, job: Job) -> None:
        """`job` and all that it left have closed them."""
        del self.jobs[job.run_id]
        if job.returned and job.ending is None:  # else `processes_of` would find the next run too
            self._remove(job.run, self.OWN)
            self.free.append(job.run)
        else:  # its line may have been read already, or `go` may be just noting the exit code
            self.status.loop.call_later(NEW_SHELL_TIMEOUT, self._remove, job.run, (*self.OWN, *self.FIFOS, "go"))
        self.there()

    def _remove(self, run: str, names: tuple[str, ...]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(f"{run}.{name}")

    def hand_over(self, owner: int) -> None:
        """Let another user, whose the panes are, get at the files."""
        os.chmod(self.base, 0o711)
        for name in (".", *os.listdir(self.folder)):
            with contextlib.suppress(FileNotFoundError):
                os.chown(f"{self.folder}/{name}", owner, -1, follow_symlinks=False)

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
                pipes, closed = [name for name in names if name.endswith((".out", ".err"))], asyncio.Event()
                outputs = [Output(f"{folder}/{name}", None, closed.set) for name in pipes]
                for output in outputs:
                    output.read()  # nobody may have it open, of which epoll(7) does not tell
                while any(output.fd >= 0 for output in outputs):
                    closed.clear()
                    await closed.wait()
                await asyncio.sleep(RETURN_TIMEOUT / 10)  # go may just be noting the exit code there
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)

    def close(self) -> None:
        """Leave what is still written to: the next driver here drains it."""
        if self.status.fd >= 0:
            self.status.close()
            if not self.jobs:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self.lock)


class Job:
    """One run of a command, from its files to the prompt after it.

    takes  who gets the output: one for both streams, or two
    fed    whether its stdin comes through `feed`
    """

    shell: PaneShell  # whose pane it has, and the connection to type there: see Terminal.take
    tmux: Tmux
    files: RunFiles

    def __init__(self, terminal: Terminal, request: ExecRequest, takes: Mapping[str, Take], fed: bool) -> None:
        self.terminal, self.request, self.takes, self.fed = terminal, request, takes, fed
        self.loop = asyncio.get_running_loop()
        self.run_id, self.run = secrets.token_hex(8), ""  # the path of its files, but for their suffixes
        self.started: asyncio.Future[bool] = self.loop.create_future()  # False: it never will
        self.over = asyncio.Event()  # exit_code, duration and all output are known
        self.released = False  # the pane is free again
        self.returned = False  # go has done with the files
        self.leaves_nothing = False  # what is left of it at its end is ended too
        self.ended, self.why, self.exit_code = "exit", "", 0
        self.pid = 0  # of the command's bash, and its process group
        self.begun, self.duration = float("inf"), 0.0  # when it was typed, then when it started
        self.view: View | None = None
        self.feed: Input | None = None
        self.outputs: list[Output] = []
        self.timer: asyncio.TimerHandle | None = None
        self.ending: asyncio.Task[None] | None = None

    async def start(self) -> bool:
        """Type the line that runs it; whether it runs.  Raises NoTerminal, OSError."""
        line, pane = self._prepare(), self.shell.pane
        state = await self.shell.clear(self.tmux)
        if not self.released:
            # tmux types it unless somebody else has typed since the pane was in `state`.
            self.tmux.send_keys(pane, state, line, "Enter").add_done_callback(self._on_typed)
            self.view = View(pane, self.request.cmd, line, int(self.shell.last.split()[0]))
            self.begun = time.monotonic()
            self._later(START_TIMEOUT, self.tick)
        return await self.started

    def _prepare(self) -> str:
        """Make the files; the line that runs them."""
        self.files = self.terminal.driver.open_files()
        self.run = self.files.take(self)
        for name, take in self.takes.items():  # open before it is typed, since a FIFO forgets what nobody has open
            self.outputs.append(Output(f"{self.run}.{name}", partial(self._take, take), self._tidy))
        if self.fed:
            self.feed = Input(f"{self.run}.in")
        for name, text in go_script(self, self.terminal.driver.shell).items():
            with open(os.open(f"{self.run}.{name}", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(text.encode())  # not truncated, which goes to the disk: see GO
        if (owner := os.stat(self.shell.pane.tty).st_uid) != os.geteuid():  # we are root, the panes are a worker's
            self.files.hand_over(owner)
        return f" . {shlex.quote(self.run)}.go"

    def _take(self, take: Take, chunk: bytes) -> Awaitable[None] | None:
        if self.view:
            self.view.add(chunk)
        return take(chunk)

    def _on_typed(self, reply: asyncio.Future[list[str]]) -> None:
        if reply.exception():
            self.void()
        elif reply.result():  # it was not typed
            self.returned = True
            self.release()

    def void(self) -> bool:
        """Make sure that it never starts; False: it already has."""
        try:
            if self.run and not self.released:
                os.close(os.open(f"{self.run}.pid", os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        except OSError:  # wiped: go cannot make it either
            pass
        self.release()
        return True

    def on_report(self, word: str, number: int) -> None:
        if word == "start" and not self.pid and not self.released:
            self.pid, self.begun = number, time.monotonic()
            self.shell.ran, self.shell.missed = True, 0
            self._later(VIEW_DELAY, self.tick)
            if not self.started.done():  # it may have been cancelled
                self.started.set_result(True)
        elif word == "exit" and self.pid:
            self._finish(number & 255)
        elif word == "back" and not self.released:
            self.returned = True
            self.release()
            self.shell.back(self.tmux)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call that then, and nothing else before."""
        if self.timer is not None:
            self.timer.cancel()
        if not self.released:
            self.timer = self.loop.call_later(seconds, call)

    def tick(self) -> None:
        """Look now and then whether its shell lives, and its time is over."""
        if self.released or self.over.is_set():
            return
        pane, age, pause = self.shell.pane, time.monotonic() - self.begun, WATCH_PAUSE
        dead = process(pane.pid) is None
        if not self.pid:
            late = age - (START_TIMEOUT if self.shell.ran else NEW_SHELL_TIMEOUT)
            if (dead or late >= 0) and not self.void() and late > START_TIMEOUT:
                self.end("lost", "it never reported its start")
        elif dead:
            self.end("lost", "tmux has ended" if self.tmux.closed else f"{pane.window_name}, pane {pane.pane_id}, died")
        elif age >= self.request.timeout:
            self.end("timeout")
        elif self.view:
            self.view.write()
            pause = min(pause, self.request.timeout - age)
        self._later(pause, self.tick)

    def end(self, ended: str, why: str = "") -> None:
        """End it, `over` tells when that is done.  The first reason counts."""
        if self.over.is_set() or (not self.pid and self.void()):
            return
        first, lost = self.ended == "exit", ended == "lost"
        if first:
            self.ended, self.why = ended, why
        if lost:  # its terminal died: answer with what there is
            self._finish(128 + signal.SIGKILL)
        if first or lost:
            self.ending = asyncio.ensure_future(climb(self, ENDING_LADDER[lost:]))
        if lost:
            self.release()

    def _finish(self, exit_code: int) -> None:
        if self.over.is_set():
            return
        self.exit_code, self.duration = exit_code, time.monotonic() - self.begun if self.pid else 0.0
        for output in self.outputs:
            output.finish()
        self.over.set()
        self.leaving = asyncio.ensure_future(self._leave())  # who waits for the answer comes first
        stopped = exit_code in STOPPED and process(self.pid)  # nobody will continue it
        if (stopped or self.leaves_nothing) and self.ending is None:
            self.ending = asyncio.ensure_future(climb(self, ENDING_LADDER[bool(stopped) :]))

    async def _leave(self) -> None:
        """Show the end, and let the prompt come."""
        self._later(RETURN_TIMEOUT, self.release)
        os.sched_yield()  # who got the answer often waits for this very CPU
        facts = (self.request.agent_name, self.run_id, self.ended, self.exit_code, round(self.duration * 1000))
        log.info("exec end agent=%s run=%s ended=%s exit=%d ms=%d", *facts)
        if self.view:
            await self.view.end(self.exit_code)
        with contextlib.suppress(OSError):
            done = os.open(f"{self.run}.done", os.O_WRONLY | os.O_NONBLOCK)
            os.write(done, b"\n")
            os.close(done)

    async def over_within(self, seconds: float) -> bool:
        """Wait for its end, `seconds` at most."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)
        return self.over.is_set()

    def signal_group(self, number: int) -> None:
        """Signal the command's process group.  In a shell without job control it has none."""
        with contextlib.suppress(OSError):
            if self.pid and not self.over.is_set() and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)

    def release(self) -> None:
        """Give the pane back; the files go when nobody writes any more."""
        if self.released:
            return
        if self.feed:
            self.feed.close()
        if self.view and not self.over.is_set():  # else it ends in a moment
            self.view.close()
        for output in self.outputs:
            output.finish() if self.pid else output.close()  # before its start nobody has opened it to write
        self.released, self.takes = True, {}  # who took the output is not kept
        if self.timer is not None:
            self.timer.cancel()
        self._tidy()
        if not self.started.done():
            self.started.set_result(self.over.is_set())
        del self.terminal.jobs[self.shell.pane.pane_id]
        self.terminal.freed.set()

    def _tidy(self) -> None:
        """Give the names of the files back, once nobody has them open."""
        if self.run and self.released and all(output.fd < 0 for output in self.outputs):
            self.files.give_back(self)

    async def result(self, capture: Capture | None = None, patience: float | None = None) -> CommandResult:
        """How it ended; its output is in `capture` or with who took it.  Cancelling this cancels the command.

        patience  seconds, at most, until what is left of it is taken
        """
        try:
            await self.over.wait()
            for output in self.outputs:
                if output.taken is not None:
                    await asyncio.wait_for(output.taken, patience)
        finally:
            self.end("cancelled")  # if it is not over: nobody waits for it any more
        exit_code, error = ENDINGS[self.ended]
        code = self.exit_code if exit_code is None else exit_code
        total, ms = sum(output.total for output in self.outputs), round(self.duration * 1000)
        error = error and error.format(timeout=self.request.timeout, why=self.why)
        text, cut = (capture.text(total), total > self.request.max_output) if capture else ("", False)
        return CommandResult(text, code, self.ended, error, cut, total, ms, self.run_id)


async def kill(job: Job, number: int) -> int:
    """Signal all its processes, wherever they are; how many there were."""
    job.signal_group(number)
    found = await asyncio.to_thread(processes_of, job)
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
        job.end("lost", "its shell does not report the end")


class Terminal:
    """An agent's window, `name`: its panes, the runs in them, and who waits."""

    def __init__(self, driver: PocketCoderDriver, name: str) -> None:
        self.driver, self.name = driver, name  # whose tmux and settings it uses
        self.shells: list[PaneShell] = []  # one a pane
        self.looked_at: tuple[Tmux | None, int] = (None, 0)  # the connection, and its notices by then
        self.jobs: dict[str, Job] = {}  # by pane_id
        self.waiting = 0
        self.lock, self.freed = asyncio.Lock(), asyncio.Event()  # first come, first served

    async def take(self, job: Job) -> None:
        """Give it a pane where nobody runs anything; wait in the queue for one.  Raises NoTerminal."""
        if len(self.jobs) + self.waiting >= MAX_PANES + MAX_QUEUE:
            raise NoTerminal(f"{MAX_QUEUE} commands wait for this terminal already: try again later")
        self.waiting += 1
        try:
            async with self.lock:
                while not self.driver.stopping:
                    self.freed.clear()
                    tmux = await self._look()
                    if (shell := await self._choose(tmux)) and not self.driver.stopping:
                        job.shell, job.tmux = shell, tmux
                        self.jobs[shell.pane.pane_id] = job
                        return
                    # tmux does not tell when a person's program ends, so look now and then.
                    timer = tmux.loop.call_later(QUEUE_CHECK, self.freed.set)
                    await self.freed.wait()
                    timer.cancel()
        finally:
            self.waiting -= 1
        raise NoTerminal("the proxy is stopping")

    async def open(self) -> None:
        """Make the window if it is missing, and know its prompt before anybody types."""
        self.driver.open_files()
        async with self.lock:
            tmux = await self._look()
            if self.shells[0].quiet and await self.shells[0].at_prompt():
                await self.shells[0].clear(tmux)

    async def _look(self, tries: int = 3) -> Tmux:
        """Know the panes; make the window, with all around it, if it is missing.  Needs the lock."""
        tmux, new_shell = self.driver.tmux, self.driver.new_shell
        if tmux and not tmux.closed and self.looked_at == (tmux, tmux.notices):
            return tmux
        try:
            tmux = await self.driver.connect(self)
            notices, found = tmux.notices, [pane for pane in await tmux.panes() if pane.window_name == self.name]
            panes = [pane for pane in found if pane.window_id == found[0].window_id]
            if not panes:
                panes = [await self._make(tmux, "new-window", "-t", f"={tmux.session}:", "-n", self.name)]
                tmux.keep_name(panes[0])
            for at, pane in enumerate(panes):
                if process(pane.pid) is None:  # remain-on-exit, or tmux does not know yet
                    await tmux.ask("respawn-pane", "-k", "-t", pane.pane_id, *new_shell)
                    panes[at] = Pane.parse(*await tmux.ask("display-message", "-p", "-t", pane.pane_id, PANE_FORMAT))
                    self.shells.append(PaneShell(panes[at], True))
        except (NoTerminal, ValueError):  # ValueError: what it describes is gone
            if self.driver.tmux:  # the session may be gone, and we be attached to another
                self.driver.tmux.close()
            if not tries:
                raise
            await asyncio.sleep(CLEAR_PAUSE)  # a tmux that is just ending fails once
            return await self._look(tries - 1)
        known = {shell.pane.pid: shell for shell in self.shells}
        self.shells = [known.get(pane.pid) or PaneShell(pane) for pane in panes]
        for pane, shell in zip(panes, self.shells, strict=True):
            shell.pane = pane
        self.looked_at = (tmux, notices)
        return tmux

    async def _make(self, tmux: Tmux, *words: str) -> Pane:
        """A pane with a new shell in it."""
        made = Pane.parse(*await tmux.ask(*words, "-d", "-P", "-F", PANE_FORMAT, *self.driver.new_shell))
        self.shells.append(PaneShell(made, True))
        return made

    async def _choose(self, tmux: Tmux) -> PaneShell | None:
        """A shell at its prompt; else a new one; else one in copy mode; else None."""
        free = [shell for shell in self.shells if shell.pane.pane_id not in self.jobs]
        sound = [shell for shell in free if shell.missed < 2]
        for shell in sound:
            if not shell.pane.in_mode and await shell.at_prompt():
                return shell
        if any(process(shell.pane.pid) is None for shell in free):  # look again, at once
            self.looked_at = (None, 0)
            self.freed.set()
            return None
        returning = any(job.over.is_set() for job in self.jobs.values())
        if len(self.shells) < MAX_PANES and not returning and await self._split(tmux):
            return self.shells[-1] if await self.shells[-1].at_prompt() else None
        for shell in sound:  # rather than let a command wait for a person who reads
            if shell.pane.in_mode and await shell.at_prompt():
                return shell
        if free == self.shells and not sound:
            for shell in free:
                shell.missed = 0
            raise NoTerminal(f"no shell in the window {self.name} answers")
        return None

    async def _split(self, tmux: Tmux) -> bool:
        """Make one more pane."""
        pane = self.shells[-1].pane
        for _ in range(2):
            with contextlib.suppress(NoTerminal):
                await self._make(tmux, "split-window", "-Z", "-t", pane.pane_id)
                return True
            tmux.send(["select-layout", "-t", pane.window_id, "tiled"])  # no space: make some
        return False


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

    def session_exists(self, session: str) -> bool:
        """Whether tmux has a session of exactly this name."""
        command = ["tmux", "-S", self.socket_path, "has-session", "-t", f"={session}"]
        return subprocess.run(command, capture_output=True, timeout=TMUX_TIMEOUT).returncode == 0

    def terminal(self, agent_name: str) -> Terminal:
        if agent_name not in self.terminals:
            self.terminals[agent_name] = Terminal(self, f"{agent_name}:terminal")
        return self.terminals[agent_name]

    async def exec(self, cmd: str, cwd: str | None, agent_name: str) -> CommandResult:
        """Run `cmd` in the agent's terminal and wait for its end.

        cwd  absolute; None: wherever the terminal is now
        See ExecRequest for the limits.  Raises BadMessage, NoTerminal.
        """
        return await self.run(ExecRequest(cmd, cwd or "", agent_name=agent_name))

    async def run(self, request: ExecRequest) -> CommandResult:
        """The same for a request.  Cancelling this cancels the command."""
        capture = Capture(request.max_output)
        return await (await self.start(request, {"out": capture.add})).result(capture)

    async def start(self, request: ExecRequest, takes: Mapping[str, Take], fed: bool = False) -> Job:
        """Start a command; return when it runs.

        takes  {"out"} for both streams, or {"out", "err"}
        fed    its stdin is what the job's `feed` gets
        """
        terminal = self.terminal(request.agent_name)
        why = f"no shell in the window {terminal.name} answers"
        for _ in range(2 * MAX_PANES):
            job = Job(terminal, request, takes, fed)
            await terminal.take(job)
            try:
                if await job.start():
                    return job
                if not job.returned:  # it was typed, into what we do not know
                    job.shell.last = ""
                    job.shell.missed += 1
            except asyncio.CancelledError:
                job.end("cancelled")
                raise
            except (NoTerminal, OSError) as failure:  # no space, no descriptors; or the terminal has just died
                terminal.looked_at, why = (None, 0), f"cannot prepare a run: {failure}"
                job.end("lost", why)
                if job.over.is_set():
                    return job
                await asyncio.sleep(CLEAR_PAUSE)
        raise NoTerminal(why)

    def open_files(self) -> RunFiles:
        """The directory for runs, a new one if someone wiped it.  Raises NoTerminal, OSError."""
        if self.files is None or not self.files.there():
            self.files = RunFiles(f"{self.socket_path}.d")
        return self.files

    async def connect(self, terminal: Terminal) -> Tmux:
        """The connection to tmux.  If there is no session yet, the window of `terminal` is its first."""
        async with self.connecting:
            if self.tmux is None or self.tmux.closed:
                window = ["-n", terminal.name, *self.new_shell]
                self.tmux = await Tmux.connect(self.socket_path, self.session_name, window, self._on_notice)
                terminal.shells += [PaneShell(pane, True) for pane in self.tmux.made]
            return self.tmux

    def _on_notice(self) -> None:
        """Something may have died."""
        for terminal in self.terminals.values():
            terminal.freed.set()
        for job in self.jobs():
            job.tick()

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
# State and tools                                                budget 18
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
# Transports                                                    budget 320
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
    state: AppState,
    request: ExecRequest,
    takes: Mapping[str, Take],
    started: Callable[[Job], Awaitable[None]],
    fed: bool = False,
    patience: float | None = None,
) -> ExecResponse:
    """The same with the output handed on as it comes; see `PocketCoderDriver.start` and `Job.result`."""
    job = await state.driver.start(request, takes, fed)
    try:
        await started(job)
        return ExecResponse.of(await job.result(None, patience), None)
    finally:
        job.end("cancelled")  # if it has not ended yet, nobody is left to read it


async def channel_handler(job: Job, message: str | bytes) -> None:
    """Take what a caller sends to its command; return when there is room for more.  Raises BadMessage."""
    if isinstance(message, str):
        try:
            got = json.loads(message)
            job.leaves_nothing |= got.get("end") is True  # a shell that ends: nobody is left to care for the rest
            job.signal_group(SIGNAL_NUMBERS[got["signal"]])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise complain("signal", message, f"one of {', '.join(SIGNAL_NUMBERS)}, in an object") from None
    elif message[:1] != b"\0" and message != b"\xff\0":
        raise complain("channel", message[:2], "0 for stdin, or 255 and 0 for its end")
    elif job.feed is not None:
        await job.feed.write(message[1:]) if message[0] == 0 else job.feed.close()


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

    def initialize(self, state: AppState, gate: Gate) -> None:
        self.state, self.gate = state, gate
        self.body, self.received = bytearray(), 0
        self.peer: Any = getattr(self.request.connection, "stream", None)  # below HTTP

    def set_default_headers(self) -> None:
        self.set_header("Server", f"pocketcoder-proxy/{VERSION}")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        if (origin := self.request.headers.get("Origin")) in self.settings["origins"]:
            self.set_header("Access-Control-Allow-Origin", str(origin))
            self.set_header("Access-Control-Allow-Headers", "Authorization, Content-Type, Accept")
            self.set_header("Vary", "Origin")

    def prepare(self) -> None:
        headers, origin = self.request.headers, self.request.headers.get("Origin")
        preflight = self.request.method == "OPTIONS"
        self.gate.check(self.request.host, origin, headers.get("Authorization", ""), self.open_to_all or preflight)
        if int(headers.get("Content-Length") or 0) > 4 * MAX_BODY:
            raise tornado.web.HTTPError(413, f"body: expected at most {MAX_BODY} bytes")
        if self.request.method not in self._allowed() or (preflight and origin is None):
            raise tornado.web.HTTPError(405)
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if self.request.method == "POST" and kind != "application/json":
            raise tornado.web.HTTPError(415, f"`Content-Type`: got {kind!r}, expected application/json")

    def data_received(self, chunk: bytes) -> None:
        self.received += len(chunk)
        if self.received <= MAX_BODY:
            self.body += chunk
        elif self.received > 4 * MAX_BODY:  # read so far that the caller may see the 413
            self.peer.close()

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

    def on_connection_close(self) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        text = (getattr(error, "log_message", None) or f"{status_code} {self._reason}").replace("%%", "%")
        answer = {"error": text, "exit_code": ProxyError.exit_code}
        if isinstance(error, ProxyError):
            answer = {"error": str(error), "exit_code": error.exit_code}
            self.set_status(error.http_status)
        if status_code == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if status_code == 405:
            self.set_header("Allow", ", ".join(self._allowed()))
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(answer))

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
    async def post(self) -> None:
        if self.received > MAX_BODY:
            raise tornado.web.HTTPError(413, f"body: got {self.received} bytes, expected at most {MAX_BODY}")
        request = ExecRequest.from_wire(bytes(self.body), self.state.workspace)
        accept = self.request.headers.get("Accept", "").lower().replace(" ", "")
        streamed = re.search(r"(^|,)text/event-stream(?!;q=0(\.0*)?(,|$))", accept)
        await self.perform(self.answer_stream(request) if streamed else self.answer(request))

    async def answer(self, request: ExecRequest) -> None:
        response = await exec_handler(self.state, request)
        self.set_header("Content-Type", "application/json")
        self.finish(response.to_wire())

    async def answer_stream(self, request: ExecRequest) -> None:
        decoder, self.sending = codecs.getincrementaldecoder("utf-8")("replace"), asyncio.Lock()

        async def output(chunk: bytes, final: bool = False) -> None:
            if text := decoder.decode(chunk, final):  # never half a character
                await self.send(f"event: output\ndata: {ExecResponse(text).to_wire()}\n\n")

        async def started(_: Job) -> None:
            await self.send(": started\n\n")

        patience = SLOW_READER_TIMEOUT
        work = asyncio.ensure_future(
            exec_stream_handler(self.state, request, {"out": output}, started, patience=patience)
        )
        try:
            while not (await asyncio.wait({work}, timeout=KEEP_ALIVE))[0]:
                if self._headers_written and not self.sending.locked():
                    await self.send(": keep-alive\n\n")
            response = await work
            await output(b"", final=True)
            await self.send(f"event: exit\ndata: {response.to_wire()}\n\n")
        except asyncio.TimeoutError:
            log.warning("stream ended: its reader did not read for %g s", SLOW_READER_TIMEOUT)
            self.peer.close()
        finally:
            work.cancel()

    async def send(self, text: str) -> None:
        if not self._headers_written:
            self.set_header("Content-Type", "text/event-stream")
            self.set_header("X-Accel-Buffering", "no")
            self.peer.set_nodelay(True)
        async with self.sending:  # Tornado knows one flush at a time
            self.write(text)
            await self.flush()


class ChannelEndpoint(tornado.websocket.WebSocketHandler, Endpoint):
    """`GET /exec/ws`: a command with stdin, stdout, stderr and signals apart."""

    _stream_request_body = False
    work: asyncio.Task[None] | None = None

    def check_origin(self, origin: str) -> bool:
        return True  # the gate has

    def select_subprotocol(self, offered: list[str]) -> str | None:
        return CHANNELS if CHANNELS in offered else None

    async def get(self) -> None:
        if self.request.headers.get("Upgrade", "").lower() != "websocket":
            raise tornado.web.HTTPError(400, "expected a WebSocket")
        self.job: asyncio.Future[Job | None] = asyncio.get_running_loop().create_future()
        await super().get()

    def open(self) -> None:
        self.set_nodelay(True)
        self.peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.slow = asyncio.get_running_loop().call_later(BODY_TIMEOUT, self.close)

    async def on_message(self, message: str | bytes) -> None:
        """The first is the request.  Tornado reads the next one after this, which slows a caller."""
        if self.work is None:
            self.slow.cancel()
            self.work = asyncio.ensure_future(self.perform(self.answer(message)))
        elif job := await self.unless_gone(self.job):
            try:
                await self.unless_gone(asyncio.ensure_future(channel_handler(job, message)))
            except BadMessage as wrong:
                await self.end(json.dumps({"error": str(wrong), "exit_code": wrong.exit_code}))

    async def answer(self, message: str | bytes) -> None:
        async def started(job: Job) -> None:
            self.job.set_result(job)

        takes = {"out": partial(self.send, 1), "err": partial(self.send, 2)}
        try:
            body = message.encode() if isinstance(message, str) else message
            request = ExecRequest.from_wire(body, self.state.workspace)
            response = await exec_stream_handler(self.state, request, takes, started, request.stdin is None)
            await self.end(response.to_wire())
        except ProxyError as failure:
            await self.end(json.dumps({"error": str(failure), "exit_code": failure.exit_code}))

    async def end(self, final: str) -> None:
        """Tell the end, and close."""
        with contextlib.suppress(OSError):
            await self.send(3, final.encode())
        self.close()

    async def send(self, channel: int, data: bytes) -> None:
        """Raises OSError when the caller has left."""
        try:
            await self.write_message(bytes([channel]) + data, binary=True)
        except tornado.websocket.WebSocketClosedError:
            raise BrokenPipeError from None

    async def unless_gone(self, work: asyncio.Future[T]) -> T | None:
        """Wait for it.  Nobody reads the socket meanwhile, so look whether the caller has left."""
        while not (await asyncio.wait({work}, timeout=QUEUE_CHECK))[0]:
            if self.peer.closed() or self.peer.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 1:
                self.peer.close()
                return None
        return work.result()

    def on_close(self) -> None:
        Endpoint.on_connection_close(self)
        if not self.job.done():
            self.job.set_result(None)


class UnknownEndpoint(Endpoint):
    def _allowed(self) -> list[str]:
        return list(self.SUPPORTED_METHODS)

    def prepare(self) -> None:
        super().prepare()
        raise tornado.web.HTTPError(404, f"no such path: {self.request.path[:80]}")


ROUTES: list[tuple[str, type[Endpoint]]] = [
    (r"/health", HealthEndpoint),
    (r"/exec", ExecEndpoint),
    (r"/exec/ws", ChannelEndpoint),
]


# ==========================================================================
# Application                                                   budget 124
# ==========================================================================
@dataclass(frozen=True)
class Commands:
    """What the command line asks for: `server` or `shell`, and its options."""

    name: str
    arguments: tuple[str, ...] = ()  # of the shell
    port: str = str(DEFAULT_PORT)
    host: str = "127.0.0.1"
    workspace: str = "/"
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cli:
    """The command line."""

    command: Commands

    @classmethod
    def parse(cls, argv: list[str]) -> Cli:
        """Exits with 2 and a message when the words are wrong."""
        if (words := shell_arguments(argv)) is not None:
            return cls(Commands("shell", tuple(words)))
        parser = argparse.ArgumentParser(prog="pocketcoder", description=__doc__.split("\n")[0])
        commands = parser.add_subparsers(required=True, metavar="{server,shell}")
        server = commands.add_parser("server", help="start the proxy server")
        shell = commands.add_parser("shell", help="run a command in the sandbox: shell -c CMD [ARG...]")
        for level in (parser, server, shell):
            level.add_argument("--version", action="version", version=f"pocketcoder-proxy {VERSION}")
        workspace = "/workspace" if os.path.isdir("/workspace") else os.getcwd()
        environ, add = os.environ.get, server.add_argument
        add("-p", "--port", default=str(DEFAULT_PORT), help="default %(default)s; 0: any free port")
        add("--host", default=environ("POCKETCODER_HOST") or "127.0.0.1", metavar="ADDR")
        add("--workspace", default=environ("POCKETCODER_WORKSPACE") or workspace, metavar="DIR")
        add("--allow-origin", action="append", default=[], metavar="ORIGIN")
        got = parser.parse_args(argv[1:])
        if not (got.port.isdecimal() and int(got.port) < 65536):
            server.error(f"--port: got {got.port!r}, expected a number from 0 to 65535")
        if not os.path.isdir(got.workspace):
            server.error(f"--workspace: got {got.workspace!r}, expected a directory")
        return cls(Commands("server", (), got.port, got.host, os.path.realpath(got.workspace), tuple(got.allow_origin)))


async def serve(options: Commands, token: str) -> None:
    """Listen until SIGTERM or SIGINT.  Raises OSError when it cannot."""
    socket_path = os.environ.get("TMUX_SOCKET") or DEFAULT_SOCKET
    session = os.environ.get("TMUX_SESSION") or DEFAULT_SESSION
    driver = PocketCoderDriver(socket_path, session, options.workspace)
    state, gate = AppState({}, driver, options.workspace), Gate(token, frozenset(options.origins))
    shared: dict[str, Any] = {"state": state, "gate": gate}
    application = tornado.web.Application(
        [(path, endpoint, shared) for path, endpoint in ROUTES],
        default_handler_class=UnknownEndpoint,
        default_handler_args=shared,
        log_function=lambda handler: None,
        origins=gate.origins,
        websocket_max_message_size=MAX_BODY,
    )
    limits = {"max_body_size": 1 << 40, "idle_connection_timeout": IDLE_TIMEOUT, "body_timeout": BODY_TIMEOUT}
    server = tornado.httpserver.HTTPServer(application, **limits)  # Endpoint answers 413
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
    except (NoTerminal, OSError) as refused:
        log.warning("no terminal yet: %s", refused)
    gc.freeze()  # what is here now stays; and a request makes no rubbish that has to go at once
    gc.set_threshold(10_000)
    await stop.wait()
    server.stop()
    await driver.close(STOP_GRACE)
    if state.calls:  # they have their results, and send them now
        await asyncio.wait(state.calls, timeout=STOP_GRACE)
    await server.close_all_connections()


def why_not(options: Commands, token: str) -> str | None:
    """What is wrong with this machine or these settings, in a sentence."""
    if isinstance(tornado, SimpleNamespace):
        return "needs the Python package tornado: `pip install tornado`"
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
    options = Cli.parse(sys.argv).command
    if options.name == "shell":
        return run_shell([*options.arguments])
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
