#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["tornado>=6.2"]
# ///
r"""pocketcoder-proxy: run an agent's commands in a tmux window of its sandbox.

    shell ──▶ GET /exec/ws ┐
              POST /exec ──┴▶ Endpoint ─▶ PocketCoderDriver ─▶ Tmux (tmux -C) ─▶ pane's shell
                                 ▲               │  ▲                                │
                                 │               │  └── status   "start" "exit"  ◀───┤ . RUN.go
                              answer ◀─ Record ◀─┼───── RUN.out  its output      ◀───┘
                                                 └────▶ the pane's tty: a person watches

Sections, top to bottom; each uses only what stands above it:
  Settings          limits, timeouts, defaults, variables of the environment
  Shell Bridge      `pocketcoder shell`: arguments in; streams, signals, exit code through; `check`
  Errors            one hierarchy, and what each error answers
  Log               lines on stderr; of refused requests only some a second
  Fields            what each value from outside may be, and what it means
  Wire types        what callers send and get
  Processes         what /proc tells, and which shell there is
  Places            directories that others share: whom they belong to, whether they take files
  Tmux              every tmux command there is, and the control connection
  Records           what runs have printed, as far as it is kept
  Streams           pipes, output, input, what a person sees
  Run files         the go script, the FIFOs, their directory, what a killed server left
  Terminals         panes, prompts, who may type
  Run list          the newest runs: what was asked, how it ended, what it printed
  Runs              one run from files to prompt
  Driver            PocketCoderDriver; runs of servers that have gone
  Screens           what terminals show, for people who watch them from elsewhere
  Audit log         one line before a command starts, one before its end is answered
  Readiness         whether a command could run now
  MCP messages      JSON-RPC, both eras: messages in, decisions out
  Sessions          clients of MCP servers, what waits for them, when they end
  Child lines       what a relayed server's process writes, cut into lines
  In flight         what one relayed server has been asked, and who gets its answers
  MCP children      a relayed server's process: its life, what it says and hears
  Era translation   what a message of one era is in the other
  Server starts     how a relayed server's children start, and which era it speaks
  Legacy clients    sessions at a relayed server of either era
  Modern clients    modern clients of a legacy server, and its questions to them
  Relay             stdio MCP servers of the sandbox: which client gets which child
  Built-in server   the MCP server of the tools
  Metrics           counts and sizes of this server, as Prometheus reads them
  State             what handlers share, and what is recorded of commands and calls
  Tools             the tools of MCP
  HTTP gate         who may call: pure functions
  Interface         what each route takes and gives, as OpenAPI describes it
  Page              what a browser shows: terminals and runs
  Endpoints         handlers, what Tornado calls, ROUTES
  Install           what `install` writes
  Attach            a person's own view of a terminal
  MCP configuration which stdio servers are relayed
  Listening         a port, or a unix socket
  Command line      options, mistakes, help
  Application       start and stop

Routes:     GET /, GET /health, GET /ready, GET /metrics, GET /openapi.json, POST /exec,
            GET /exec/ws; GET /runs, GET DELETE /runs/RUN_ID, GET /runs/RUN_ID/output,
            POST /runs/RUN_ID/signal; GET /terminals, GET /terminals/AGENTS (names with commas
            between), POST /terminals/AGENT/keys; GET /servers; of MCP POST GET DELETE /mcp,
            GET /mcp/ws, GET /sse, POST /messages, the same under /servers/NAME
MCP:        initialize, ping, logging/setLevel (legacy); server/discover (modern); tools/list,
            tools/call, notifications/cancelled; to the client notifications/progress, …/message;
            the relay knows those of ASKING, MAY_ASK, REMOVED, CHANGED, and passes on all others
Read from the environment: POCKETCODER_HOST POCKETCODER_RUNS POCKETCODER_TOKEN
            POCKETCODER_WORKSPACE TMUX_SESSION TMUX_SOCKET; by the shell OPENCODE_AGENT
            OPENCODE_SESSION_ID POCKETCODER_FORWARD_ENV POCKETCODER_TOKEN POCKETCODER_USAGE_ID
            PROXY_URL PWD
Set for a command: PWD POCKETCODER_RUN_ID POCKETCODER_AGENT POCKETCODER_SESSION_ID
            POCKETCODER_USAGE_ID, and QUIET_PROGRAMS
tmux:       new-session -A      the one long-lived control connection
            new-window split-window respawn-pane   make a terminal, as new-session does
            set-option          keep a window's name; no synchronized panes; room for four
            select-layout       make room for one more pane
            list-panes          what there is
            display-message     a pane's cursor and history: they tell whether somebody typed
            if-shell send-keys  type the line, but only if nobody did; C-c; copy-mode -q
            kill-pane           close one of more than four, once nothing runs there
            has-session         `session_exists`
            capture-pane        `read_terminal`, pictures, in a process of its own
            attach-session refresh-client   learn that a watched pane has printed something
            new-session -t select-window kill-session   a person's view, by `attach`
            pocketcoder-ready   `/ready`: no command of tmux, but it answers
Files of a run, SOCKET.d/DRIVER/RUN.*; there RUN is a number, which later runs use again:
            go (sourced by the pane's shell)  cmd (a long command)
            in (stdin: a file, or for a channel a FIFO)
            pid (whoever makes it has claimed the run; lines: the process, the exit code)
            FIFOs: done (from us)  out, err; one `status` for all runs
Files of records, in --runs-dir:
            SERVER.lock (of a server)  SERVER.RUN.OFFSET (output of a run that ends with its server)
            RUN.OFFSET, RUN.json (of a run that outlives its server)
Locks:      SOCKET.d/DRIVER and SERVER.lock while their server lives; a pane's tty during a run
            (flock, freed with the process)

Not done on purpose:
  no reading of the screen    to learn of a run: it wraps, scrolls and lies; FIFOs do not
  no sourcing of the command  2 ms faster, but the pane's aliases would apply
  no user or file isolation   the container is the sandbox, we are its hands

Verbs:
  start     ask something to run; it runs when it reports so
  end       ask something to stop, with a ladder of signals if need be
  settle    wait until what is already on its way has arrived
  finish    an output or input hands on no more; a run is over
  complete  a run has ended, and nothing that it started can write any more
  release   a run gives its pane back, and then its files
  void      make sure that a line which was typed never starts
  hold      lock a pane for one command; `let go` frees it
  unattend  a run's caller has its answer, or has gone; the run goes on
  hand over leave a run that outlives its server to the next one
  adopt     take over what a server has left: go on with such runs, drain the others
  keep      have a process hold a FIFO open in case the server dies: then that process empties the
            FIFO, or holds its content for the next server
  retire    the output of a run may be dropped when there is no room
  forget    drop a run and its output
  take      a callback gets a piece of output; a command gets a pane

To add a route: a coroutine `…_handler`, an Operation, an `Endpoint`, a row in ROUTES, a line here.
To add a field of a request or a tool: a row in FIELDS; checks and schemas come from it.
To add a tool: a function NAME_tool under @tool; its docstring is what models read.
"""

from __future__ import annotations

import os
import sys

# ==========================================================================
# Settings
# ==========================================================================
# S1  Limits, times and defaults that one may want to change: seconds, where nothing else is said.
VERSION = "0.2.0"
KIB = 1024
MIB = 1024 * KIB
NO_LIMIT = sys.maxsize

DEFAULT_PORT = 3001
DEFAULT_SOCKET = "/tmp/tmux/pocketcoder"
DEFAULT_SESSION = "pocketcoder"
# Programs must not wait for a person who may not be there, to page or to answer.
QUIET_PROGRAMS = {
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    "MANPAGER": "cat",
    "GIT_TERMINAL_PROMPT": "0",
    "DEBIAN_FRONTEND": "noninteractive",
}

# --- What a request may ask for: bytes, where nothing else is said.
MAX_BODY = 16 * MIB
# So much of a larger body is read, so that its caller sees the 413.
MAX_UNREAD_BODY = 4 * MAX_BODY
# 64 KiB of headers take 10 ms to parse, before the gate.
MAX_HEADERS = 16 * KIB
MAX_COMMAND = 8 * MIB
# MAX_ARG_STRLEN, execve(2): one argument with its NUL.
MAX_ARGUMENT = 128 * KIB
# The value of a variable: with its name it is an argument of env(1).
MAX_VARIABLE = 123 * KIB
# All of `env`: execve(2) takes a quarter of the stack for everything.
MAX_ENVIRONMENT = 512 * KIB
# PATH_MAX, limits.h; also the name of a variable.
MAX_PATH = 4 * KIB
# `usage_id` and `session_id`.
MAX_ID = 4 * KIB
MAX_OUTPUT = 64 * MIB
DEFAULT_OUTPUT = MIB
# The MCP tool sends its output twice, and some SDKs take messages of 1 MiB at most.
TOOL_OUTPUT = 384 * KIB
MAX_TIMEOUT = 86400  # seconds
# Seconds that a tool waits for the end of a command: many clients give up after 60.
TOOL_WAIT = 45
DEFAULT_TIMEOUT = 300  # seconds
# Unknown fields that an answer names, 80 characters of each.
MAX_IGNORED = 20
# Lines of a terminal that are read at once.
MAX_LINES = 2000
# Typed at once: the buffer of a terminal's line.
MAX_KEYS = 4 * KIB

# --- Terminals.
MAX_PANES = 4  # of one agent, with commands that somebody waits for
MAX_ALL_PANES = 16  # of one agent, with those whose callers have gone on
# After a command, until one of more than MAX_PANES panes is closed; so often that is tried.
CLOSE_PAUSE = 0.5
CLOSE_TRIES = 20
MAX_QUEUE = 1000  # commands of one agent that wait for a pane
# Lines in a row that a shell did not run, before it is left alone.
MAX_MISSED = 2
# Attempts to start a command, each in another pane or after another failure.
START_TRIES = 8
# Attempts to look at a window's panes, each pause twice as long as the one before.
LOOK_TRIES = 5
RETRY_PAUSE = 0.05
TMUX_TIMEOUT = 5.0  # a reply of tmux
START_TIMEOUT = 1.0  # from the typed line to the report that it started
# The same for a new shell, which may be reading its start-up files.
NEW_SHELL_TIMEOUT = 15.0
# So long the files of a run stay that a shell may still be about to read.
FILES_LINGER = 15.0
KEEPER_TIMEOUT = 5.0  # the start of a process that keeps a FIFO open
# From the end of a command to the prompt of its shell.
PROMPT_TIMEOUT = 0.5
RETURN_TIMEOUT = 2.0  # from the report of the exit to that of the return
# Until a shell has taken a key; nobody types a line in that time.
CLEAR_PAUSE = 0.05
LOOK_PAUSE = 0.001  # between looks at a shell that is about to show its prompt
QUEUE_CHECK = 0.5  # between looks whether a person's program has ended
# Between looks whether the shell of a run lives: tmux may not tell.
WATCH_PAUSE = 0.5
SHOW_PAUSE = 0.2  # from keys to the screen that shows what they did
QUESTION_TIMEOUT = 0.5  # to look at the screen of a command whose time is over

# --- People who watch terminals.
MAX_WATCHERS = 100  # streams of screens
MAX_WATCHED = 16  # terminals in one stream
# From the first sign that a terminal has changed to its picture: what belongs together comes at
# once.  With the pause behind each picture that makes ten a second at most.
SCREEN_SETTLE = 0.02
SCREEN_PAUSE = 0.08
SCREENS_AT_ONCE = 2  # processes of tmux that take pictures
# Between looks, although tmux told of no change: at a terminal, and for one that is not there.
SCREEN_CHECK = 10.0
ABSENT_CHECK = 1.0
# So long the connection waits for the next who watches: a page is often opened anew at once, and
# tmux 3.3a crashes if one client in control mode leaves just as another arrives.
WATCH_LINGER = 1.0

# --- Streams of a command.
CHUNK = MIB  # bytes read at once; also the wanted size of a pipe
# After a command, while something that it started can still write: so much quiet before its first
# byte and after each later one, and so long in all.
FIRST_QUIET_TIME = 0.2
QUIET_TIME = 0.1
LATE_OUTPUT_TIMEOUT = 1.0
# Between reads of what a background process writes later: 100 MB/s.
DRAIN_PAUSE = 0.01
# Between looks whether stdin, at its end, is opened once more: the first pause, and the longest.
OPEN_PAUSE = 0.01
MAX_OPEN_PAUSE = 0.25
# Bytes that a run shows to a person: about what tmux keeps, at a few ms of its time.
MAX_VIEW = 64 * KIB
MAX_VIEW_COMMAND = 4 * KIB  # characters of the command
# A full terminal is written to again after a pause, so often: the prompt waits for it.
VIEW_PAUSE = 0.01
VIEW_TRIES = 20
ADOPT_TIMEOUT = 2.0  # for another server that takes over runs at the same time
ADOPT_PAUSE = 0.2  # for the exit code of a run whose server was killed
# Descriptors that no further run takes: those that run need some to be watched and ended.
DESCRIPTORS_KEPT = 10

# --- What runs have printed.
MAX_RUNS = 1000  # that are remembered
DEFAULT_KEEP = 256  # MiB, of all kept output
MAX_KEEP = 1024 * 1024  # MiB
KEPT_END = 8 * MIB  # bytes that are kept of each end, where there is room
PIECE_SIZE = MIB  # bytes of a file
SMALL_OUTPUT = 4 * KIB  # bytes that stay in memory
TEXT_PIECE = 64 * KIB  # bytes that are decoded at once: 0.1 ms
MAX_SAVED = 64 * KIB  # bytes of what is saved of a run
MAX_LISTED_COMMAND = 4 * KIB  # bytes of a command that are remembered
COMPLAINT_PAUSE = 60.0  # between lines in the log that output cannot be kept
DEFAULT_LISTED = 100  # runs in an answer
END_PATIENCE = 5.0  # for a command to end after end_run
# Lines to RUN.done, one for each process that may wait there until the output of a lasting run is
# read: go, the shell behind it, and what keeps `out` open.
HOLDERS = 3
TOOL_LISTED = 50  # runs that a tool lists

# --- The audit log.
AUDIT_TIMEOUT = 10.0  # an answer waits for a line that cannot be written
AUDIT_PAUSE = 0.05  # between attempts to write it

# --- The log.
LOG_LEVELS = ("debug", "info", "warning", "error")
REFUSALS_LOGGED = 10  # refused requests that a second's lines name; of the others their number
MAX_LOGGED = 300  # characters of a value in such a line

# --- Readiness.
READY_TIMEOUT = 2.0  # for tmux to answer
# A result is shared by all requests that come so soon after it.
READY_KEPT = 0.5
# Bytes written to try a file system, to a file without a name.
SAMPLE_SIZE = 4 * KIB

# --- Metrics: bounds of histograms.
WAIT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
RUN_BOUNDS = (*WAIT_BOUNDS, 900, 3600)

# --- HTTP.
MAX_WAITING = 1000  # connections without a request at work
ACCEPTED_AT_ONCE = 16  # connections in one turn of the loop
ACCEPT_PAUSE = 0.5  # before the next attempt, when no descriptor is left
BODY_TIMEOUT = 60.0  # for a body to arrive
IDLE_TIMEOUT = 300.0  # of a kept connection
KEEP_ALIVE = 15.0  # between comments on a silent stream
# For a reader to take the rest of an ended command's output.
SLOW_READER_TIMEOUT = 60.0
AS_LONG_AS_TCP = 0.0  # in its place: no limit but TCP's own
# Characters of output that are written at once; more is written in pieces, between which other
# callers are answered.
MAX_WRITTEN = MIB
GONE_CHECK = 0.5  # between looks whether the caller of a channel has left
BACKLOG = 128  # connections that wait to be accepted at a unix socket
LOCK_TRIES = 40  # to be the only server that starts at a unix socket, each after LOCK_PAUSE
LOCK_PAUSE = 0.05
TCP_LISTEN = "0A"  # include/net/tcp_states.h, as /proc/net/tcp has it
# Mcp-Param-* come to these, as asked for.
CORS_HEADERS = (
    "Authorization, Content-Type, Accept, MCP-Protocol-Version, Mcp-Session-Id, Mcp-Method,"
    " Mcp-Name, Last-Event-ID"
)
# After SIGTERM running commands may still end, and then the answers of those that were ended leave.
STOP_GRACE = 5.0
SETTLE_GRACE = 0.5

# --- The shell.
CONNECT_TIMEOUT = 10.0
CHECK_TIMEOUT = 4.5  # of `check`, in all: health checks of containers give 5 s
MAX_SOCKET_PATH = 107  # bytes of the path of a unix socket, unix(7)
# After a signal: callers kill their shell after 0.2 s.
SIGNAL_PATIENCE = 0.15
BRIDGE_CHUNK = 256 * KIB  # bytes read at once

# --- MCP: sessions and tools.
MAX_SESSIONS = 4096
MAX_CALLS = 100  # of one session at once
MAX_INBOX = 100  # messages that wait for a client
# A session that its client named outlives its stream.
SESSION_KEPT = 60.0
# One of Streamable HTTP outlives its last message; of a relayed server CHILD_IDLE holds.
SESSION_IDLE = 3600.0
# Between notifications of progress: the longest time, and the shortest.
PROGRESS_EVERY = 1.0
PROGRESS_PAUSE = 0.1
MAX_LINE = KIB  # bytes of a line of output in such a notification

# --- MCP: relayed servers.
# Characters of the name of one; also of names that the audit log shows.
MAX_NAME = 128
# Of one legacy server for modern clients, one for each client.
MAX_CHILDREN = 16
CHILD_START = 60.0  # for the first answer
# Of silence, before it is asked for its era in another way too.
PROBE_TIMEOUT = 5.0
# For an answer, or the next progress; and whatever progress comes.
CHILD_TIMEOUT = 300.0
CHILD_CEILING = 3600.0
# A process that nobody uses is ended, unless --mcp-idle says otherwise.
CHILD_IDLE = 600.0
# The longest wait before one that never answered is started again.
CHILD_BACKOFF = 30.0
# A request waits for that, for room, or for the last process to end.
CHILD_PATIENCE = 5.0
CHILD_QUEUE = 32 * MIB  # bytes that wait for it to read
CHILD_READ = 256 * KIB  # bytes read at once
MAX_ANSWER = 32 * MIB  # bytes of a line
MAX_LOG_LINE = 64 * KIB  # bytes of a line of its stderr
# Bytes kept of each end of a line that is too long: its id is there.
MAX_ENDS = 4 * KIB
CHILD_SETTLE = 1.0  # for a legacy one to deal with what it was sent
ABANDON_PAUSE = 0.2  # to find an abandoned session, when a second process cannot start
LAST_WORDS = 0.05  # for its last lines, when it has closed its output
LAST_ANSWERS = 1.0  # for the answers of a process that has died to leave
CROWD_PAUSE = 0.05  # for a slow reader, when others use it too
MAX_QUESTIONS = 100  # of one process, that wait for a call of its client
QUESTION_PAUSE = 0.02  # for more questions of a legacy server
PARK_TIMEOUT = 300.0  # for a client to answer
MAX_ROUNDS = 10  # of questions in one call
HEADERS_KEPT = 30.0  # what its tools say of headers
# Before the second start of one that never answers; doubled each time, up to CHILD_BACKOFF.
CHILD_FIRST_PAUSE = 0.1
CHILD_WATCH = 0.5  # between looks whether its process has ended
CHILD_LOOK = 0.05  # between looks whether its group has ended, once that process has
MAX_LOG_SHOWN = KIB  # characters that are logged of a line of its stderr
# Lines of its stderr that say in an error how it ended.
CHILD_LAST_LINES = 5
OUTBOX_PAUSE = 0.01  # between looks whether a slow client has read what waits for it
# Milliseconds for which a modern client may keep what the built-in server lists.
CACHE_MS = 60_000


def default_agent_name() -> str:
    """The agent whose terminal is used when the caller names none."""
    return "poco"


# ==========================================================================
# Shell Bridge
# ==========================================================================
# `bash ARGUMENTS`, in the sandbox.  Python starts anew for each command, so this section imports
# `sys`, `os` and three C modules only.
# It runs on Python 3.8 and later.  What `install` writes is the file down to the line.
# `check` is here too, since a container asks every few seconds.
#
# B1  No command runs here.  If the proxy fails, the exit status is 125.
# B2  It always exits, and never dies of a signal: some callers hang on that.
# B3  stdout and stderr are the command's.  If something goes wrong here, one line goes to stderr.
SHELL_NAMES = ("sh", "bash", "dash", "ash", "zsh", "ksh")
SUBCOMMANDS = ("server", "shell", "attach", "check", "install")
SIGNALS = {1: "HUP", 2: "INT", 3: "QUIT", 10: "USR1", 12: "USR2", 15: "TERM"}

# Options of bash with which it reads commands from stdin, where it gets no others.
SHORT_OPTIONS = "-+abefhiklmnoprstuvxBCDEHPTO"
LONG_OPTIONS = (
    "debugger",
    "init-file",
    "login",
    "noediting",
    "noprofile",
    "norc",
    "posix",
    "rcfile",
    "restricted",
    "verbose",
)
# The long ones that take a word; of the short ones these are `o` and `O`.
TAKE_A_WORD = ("init-file", "rcfile")

# What bash reads otherwise than as the name of a command, where it is the first word.
KEYWORDS: tuple[str, ...] = ("if", "then", "elif", "else", "fi", "case", "esac", "for", "select")
KEYWORDS += ("while", "until", "do", "done", "in", "function", "time", "coproc")

# Characters that need no quotes in a word for bash.
PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+@%:,./"

BLOCKED = "[Firewall Blocked] Interactive or raw shell invocation is restricted for security. "
BLOCKED += "Always execute commands via 'bash -c \"command\"'."
UNIX = "unix:"  # what stands before the path of a unix socket in PROXY_URL
URL_FORMS = "expected http://HOST:PORT, without a user, a password or a path, or unix:/PATH"
TOKEN_FORM = "expected letters, digits and marks of ASCII, without blanks and ends of lines"
CHANNELS = "v5.channel.k8s.io"  # the framing of `kubectl exec`

# RFC 6455, 1.3: one pair will do.
WS_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
WS_ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

# Of JSON; the last ones stand for bytes that are not UTF-8, as Python reads them.
ESCAPES = {number: f"\\u{number:04x}" for number in (*range(32), 34, 92, *range(0xDC80, 0xDD00))}


class Failed(Exception):
    """Ends the shell, with a line on stderr, where there is a text, and an exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text, status)
        self.text = text
        self.status = status


def shell_arguments(argv: list[str]) -> list[str] | None:
    """What in `argv` is for the shell, as arguments of bash; None: the shell is not called."""
    name = os.path.basename(argv[0])
    words = argv[1:]
    if name in SHELL_NAMES or name.endswith("-shell"):
        return words

    if not words:
        # A person gets the help; otherwise a script may come.
        return None if os.isatty(0) else []

    first = words[0]
    if first == "shell":
        return subcommand_arguments(words[1:])
    if first in SUBCOMMANDS or asks_about_us(words):
        return None
    if first[:1] in ("-", "+"):
        return words
    if os.path.exists(first) and not os.path.isdir(first):
        return words

    return None


def subcommand_arguments(words: list[str]) -> list[str] | None:
    """The same for what stands behind `shell`, where plain words are one command."""
    if not words:
        return []
    if asks_about_us(words):
        return None

    first = words[0]
    if first == "--command":
        return ["-c", "--", *words[1:]]
    if first.startswith("--command="):
        return ["-c", "--", first[len("--command=") :], *words[1:]]
    if first == "--" and len(words) > 1:
        return ["-c", "--", plain_command(words[1:])]
    if first[:1] in ("-", "+"):
        return words

    return ["-c", "--", plain_command(words)]


def asks_about_us(words: list[str]) -> bool:
    """Whether `--help` or `--version` stands where ours is meant, and not that of bash."""
    return words[0] in ("--help", "--version") or words == ["-h"]


def plain_command(words: list[str]) -> str:
    """The command that is these words, with quotes where they need some."""
    parts: list[str] = []
    for word in words:
        is_plain = word != "" and word.strip(PLAIN) == ""
        is_keyword = not parts and word in KEYWORDS
        parts.append(word if is_plain and not is_keyword else quote(word))
    return " ".join(parts)


def quote(word: str) -> str:
    """A word for bash, in quotes."""
    return "'" + word.replace("'", "'\\''") + "'"


def split_options(words: list[str]) -> tuple[str, list[str], list[str]]:
    """Split arguments of bash into its options, with the words that they take, and the operands.

    The first value has the letters of the short options, and a `?` for each long one that
    ends bash, or is none.
    """
    letters = ""
    at = 0

    while at < len(words):
        word = words[at]
        if word in ("-", "--"):
            return letters, words[:at], words[at + 1 :]
        if word[:1] not in ("-", "+"):
            break

        at += 1

        # Long ones come first, and one dash will do for them.
        name = word[2:] if word[:2] == "--" else word[1:]
        if name in LONG_OPTIONS and letters == "":
            if name in TAKE_A_WORD:
                at += 1
        elif word[:2] == "--":
            letters += "?"
        else:
            letters += word[1:]
            at += word.count("o") + word.count("O")

    return letters, words[:at], words[at:]


def arguments_of(words: list[str]) -> list[str]:
    """The arguments with which the sandbox's bash does what `bash WORDS` does here.

    Raises Failed, where that would be an interactive shell, or a script that cannot be read.
    """
    letters, options, operands = split_options(words)
    # With an option of another kind bash reads no commands, or it complains.
    reads_commands = all(letter in SHORT_OPTIONS for letter in letters)
    if "c" in letters or not reads_commands:
        return words

    if operands and "s" not in letters:
        # The script file is here, not there.
        return [*options, "-c", "--", read_script(operands[0]), *operands]

    if not has_stdin():
        raise Failed(BLOCKED, 1)

    return words


def read_script(path: str) -> str:
    """The text of a script file.  Raises Failed, with the exit status of bash."""
    try:
        with open(path, "rb") as file:
            script = os.fsdecode(file.read())
    except FileNotFoundError as wrong:
        raise Failed(f"{path}: {wrong.strerror}", 127) from None
    except OSError as wrong:
        raise Failed(f"{path}: {wrong.strerror}", 126) from None

    if "\0" in script:
        raise Failed(f"{path}: cannot execute binary file", 126)

    return script


def has_stdin() -> bool:
    """Whether descriptor 0 is something to read, and no terminal and not /dev/null.

    A closed one is /dev/null here, see `open_standard_streams`.
    """
    if os.isatty(0):
        return False
    # By its number: containers have a /dev/null of their own.  What is no device has 0.
    device = os.fstat(0).st_rdev
    return device == 0 or device != os.stat(os.devnull).st_rdev


def current_directory() -> str:
    """The directory, by the name that the caller has for it.  Raises Failed."""
    named = os.path.normpath(os.environ.get("PWD", ""))
    try:
        if named[:1] == "/" and os.path.samefile(named, "."):
            return named
    except OSError:  # the name leads nowhere
        pass

    try:
        return os.getcwd()
    except OSError as wrong:
        raise Failed(f"the current directory {named!a}: {wrong.strerror}", 125) from None


def forwarded_environment() -> dict[str, str]:
    """The variables that POCKETCODER_FORWARD_ENV names; never the token."""
    wanted = [name.strip() for name in os.environ.get("POCKETCODER_FORWARD_ENV", "").split(",")]
    prefixes = tuple(name[:-1] for name in wanted if name[-1:] == "*")
    return {
        name: value
        for name, value in os.environ.items()
        if (name in wanted or name.startswith(prefixes)) and name != "POCKETCODER_TOKEN"
    }


def request_of(argv: list[str]) -> bytes:
    """The first message of the channel, see ExecRequest.  Raises Failed."""
    variables = os.environ
    fields = {
        "argv": argv,
        "cwd": current_directory(),
        "agent_name": variables.get("OPENCODE_AGENT") or default_agent_name(),
        "timeout": MAX_TIMEOUT,
        "env": forwarded_environment(),
        # As two streams they would lose the order of what is written.
        "combined": os.path.sameopenfile(1, 2),
    }
    if not has_stdin():
        fields["stdin"] = ""

    if variables.get("OPENCODE_SESSION_ID"):
        fields["session_id"] = variables["OPENCODE_SESSION_ID"]

    if variables.get("POCKETCODER_USAGE_ID"):
        fields["usage_id"] = variables["POCKETCODER_USAGE_ID"]

    return json_text(fields).encode()


def json_text(value: object) -> str:
    """JSON of texts as the system has them, lists and tables of them, numbers and truth values."""
    if isinstance(value, str):
        # From any locale to UTF-8.
        text = os.fsencode(value).decode(errors="surrogateescape")
        return '"' + text.translate(ESCAPES) + '"'
    if isinstance(value, list):
        return "[" + ",".join(map(json_text, value)) + "]"
    if isinstance(value, dict):
        pairs = (f"{json_text(name)}:{json_text(each)}" for name, each in value.items())
        return "{" + ",".join(pairs) + "}"

    return str(value).lower()


def proxy_url() -> str:
    return os.environ.get("PROXY_URL") or f"http://localhost:{DEFAULT_PORT}"


def parse_url(url: str) -> tuple[str, int]:
    """Host and port of PROXY_URL.  Raises Failed, with nothing in it that may be a password."""
    if "@" in url:
        raise Failed(f"PROXY_URL: got one with a user or a password, {URL_FORMS}", 125)

    scheme, mark, address = url.rstrip("/").partition("://")
    if mark and scheme.lower() == "https":
        tunnel = "the shell speaks no TLS: reach the server by a tunnel or a private network"
        raise Failed(f"PROXY_URL: got one with https, {URL_FORMS}; {tunnel}", 125)

    place = address
    for end in "/?#":
        place = place.partition(end)[0]

    if place != address:
        raise Failed(f"PROXY_URL: got one with a path behind {in_quotes(place)}, {URL_FORMS}", 125)

    host, colon, port = place.rpartition(":")
    if not colon or place.endswith("]"):
        host = place
        port = "80"

    is_port = port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
    if scheme != "http" or not host or not is_port:
        raise Failed(f"PROXY_URL: got {in_quotes(url)}, {URL_FORMS}", 125)

    return host, int(port)


def parse_path(url: str) -> str:
    """The path of the unix socket that PROXY_URL names.  Raises Failed."""
    path = url[len(UNIX) :]
    size = len(os.fsencode(path))
    if path[:1] != "/" or "\0" in path:
        raise Failed(f"PROXY_URL: got {in_quotes(url)}, expected unix:/PATH, from the root", 125)
    if size > MAX_SOCKET_PATH:
        limit = f"expected at most {MAX_SOCKET_PATH}"
        raise Failed(f"PROXY_URL: got a path of {size} bytes for a unix socket, {limit}", 125)

    return path


def in_quotes(text: str) -> str:
    """The start of what was got, for a message in one line."""
    shown = "".join(each if each.isprintable() else "?" for each in json_text(text[:80]))
    return shown + ("..." if len(text) > 80 else "")


def one_line(text: str) -> str:
    """What a server says, so that a terminal only shows it."""
    words = " ".join(text.split())
    return "".join(each if each.isprintable() else "?" for each in words)


def connect_to(url: str) -> tuple[Any, str]:
    """A connection to the proxy, and what to send as `Host`.

    Raises Failed; OSError, UnicodeError, see `unreachable`.
    """
    import _socket

    if not url.isprintable():
        raise Failed(f"PROXY_URL: got {in_quotes(url)}, {URL_FORMS}", 125)

    if url.startswith(UNIX):
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        sock.connect(parse_path(url))
        return sock, "localhost"

    host, port = parse_url(url)
    failure = 0

    for family, kind, protocol, _, place in _socket.getaddrinfo(
        host.strip("[]").encode(), port, 0, _socket.SOCK_STREAM
    ):
        sock = _socket.socket(family, kind, protocol)
        failure = sock.connect_ex(place)
        if not failure:
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
            return sock, f"{host}:{port}"

    raise OSError(failure, os.strerror(failure))


def check_token(token: str) -> None:
    """Raise Failed for what no header can hold."""
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise Failed(f"POCKETCODER_TOKEN: {TOKEN_FORM}", 125)


def unreachable(url: str, wrong: Exception) -> str:
    """Why there is no connection, in a sentence."""
    why = getattr(wrong, "strerror", None) or "no such host"
    hint = "; is it running?" if not isinstance(wrong, PermissionError) else ""
    return f"cannot reach the proxy at {url}: {why}{hint}"


def read_head(sock: Any) -> tuple[bytes, bytes]:
    """The head of an answer, and what has come behind it.  Raises OSError."""
    answer = b""

    while b"\r\n\r\n" not in answer and len(answer) < BRIDGE_CHUNK:
        more = sock.recv(BRIDGE_CHUNK)
        if not more:
            break

        answer += more

    head, _, rest = answer.partition(b"\r\n\r\n")
    return head, rest


def read_fields(sock: Any, head: bytes, body: bytes) -> dict[str, Any]:
    """The fields of an answer in JSON; none if it is something else.  Raises OSError.

    body  what has come of it
    """
    import json

    lines = head.lower().split(b"\r\n")
    sizes = [line[15:].strip() for line in lines if line[:15] == b"content-length:"]
    size = int(sizes[0]) if sizes and sizes[0].isdigit() and len(sizes[0]) < 6 else 0

    while len(body) < size:
        more = sock.recv(BRIDGE_CHUNK)
        if not more:
            break

        body += more

    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    return fields if isinstance(fields, dict) else {}


def refused(url: str, head: bytes, fields: dict[str, Any]) -> str:
    """What an answer says that is not the one expected, in a sentence."""
    status = one_line(head[:80].partition(b"\r")[0].decode("latin-1"))
    error = fields.get("error")
    if isinstance(error, str):
        return f"{url} refused: {status.partition(' ')[2]}: {one_line(error)}"
    return f"{url} refused: got {in_quotes(status)}; is that the proxy? see PROXY_URL"


class Bridge:
    """One connection to `GET /exec/ws`, for stdin, stdout, stderr and signals of this process.

    Its methods raise Failed.
    """

    def __init__(self, url: str) -> None:
        import _thread

        self.url = url
        self.sock: Any = None  # once the channel is open
        self.unread = b""
        self.sending = _thread.allocate_lock()
        # How to end, once a signal has come.
        self.status = 0
        # Nothing is left to interrupt.
        self.over = False

    def on_signal(self, number: int, _: object) -> None:
        """Pass it on, and end soon, whatever the command does."""
        import _signal  # type: ignore[import-not-found]

        if self.over:
            self.status = self.status or 128 + number
            return

        is_alarm = number == _signal.SIGALRM
        if is_alarm and self.sock is None and not self.status:
            raise Failed(f"{self.url}: no answer within {CONNECT_TIMEOUT:g} s", 125)

        is_first = not self.status
        if is_first:
            self.status = 128 + number

        if not is_first or self.sock is None or is_alarm:
            raise Failed("", self.status)

        _signal.setitimer(_signal.ITIMER_REAL, SIGNAL_PATIENCE)
        self.send(1, b'{"signal":"%s","end":true}' % SIGNALS[number].encode(), wait=False)

    def send(self, opcode: int, data: bytes, wait: bool = True) -> None:
        """Send a frame.  Its mask is zero: masks are for browsers, and cost a step a byte."""
        size = len(data)
        length = bytes([128 | size]) if size < 126 else b"\xff" + size.to_bytes(8, "big")
        if self.sending.acquire(wait):
            try:
                self.sock.sendall(b"".join((bytes([128 | opcode]), length, bytes(4), data)))
            except OSError:  # the proxy has left; what it said before comes first
                pass
            finally:
                self.sending.release()

    def feed(self) -> None:
        """Send all of stdin.  In a thread of its own, which nobody waits for."""
        try:
            data = os.read(0, BRIDGE_CHUNK)
            while data:
                self.send(2, b"\0" + data)
                data = os.read(0, BRIDGE_CHUNK)
        except OSError:  # a directory, or only to be written to
            pass
        self.send(2, b"\xff\0")

    def connect(self) -> None:
        """Open the channel.  Raises OSError, UnicodeError too."""
        import _socket

        sock, host = connect_to(self.url)
        lines = [
            "GET /exec/ws HTTP/1.1",
            f"Host: {host}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {WS_KEY}",
            f"Sec-WebSocket-Protocol: {CHANNELS}",
        ]
        token = os.environ.get("POCKETCODER_TOKEN")
        if token:
            check_token(token)
            lines.append(f"Authorization: Bearer {token}")

        sock.sendall("\r\n".join([*lines, "", ""]).encode())

        head, self.unread = read_head(sock)
        if head[:13] != b"HTTP/1.1 101 " or WS_ACCEPT not in head:
            raise Failed(refused(self.url, head, read_fields(sock, head, self.unread)), 125)

        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)

        # Close with RST, so that a proxy that has stopped reading stdin notices our end.
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock = sock

    def read(self, size: int, all_of_it: bool = True) -> bytes:
        """So many bytes from the proxy, or what there is of them."""
        enough = size if all_of_it else 1
        while len(self.unread) < enough:
            try:
                more = self.sock.recv(BRIDGE_CHUNK)
            except OSError:
                more = b""

            if not more:
                raise Failed(f"{self.url} closed the connection before the end of the command", 125)

            self.unread = self.unread + more if self.unread else more

        data = self.unread[:size]
        self.unread = self.unread[size:]
        return data

    def run(self, request: bytes, feeds: bool) -> int:
        """Carry everything both ways; `feeds`: stdin too.  The exit status."""
        import _signal
        import _thread

        _signal.setitimer(_signal.ITIMER_REAL, CONNECT_TIMEOUT)

        try:
            self.connect()
        except (OSError, UnicodeError) as wrong:
            raise Failed(unreachable(self.url, wrong), 125) from None

        _signal.setitimer(_signal.ITIMER_REAL, 0)

        self.send(1, request)
        if feeds:
            _thread.start_new_thread(self.feed, ())

        while True:
            channel, left = self.read_header()
            if channel == 3:
                return self.end(self.read(left))

            while left:
                piece = self.read(left, all_of_it=False)
                left -= len(piece)
                self.write(channel, piece)

    def read_header(self) -> tuple[int, int]:
        """The channel of the next message, and how many bytes follow for it."""
        kind, size = self.read(2)
        if size == 126:
            size = int.from_bytes(self.read(2), "big")
        elif size == 127:
            size = int.from_bytes(self.read(8), "big")

        channel = self.read(1)[0]
        left = size - 1

        is_output = channel in (1, 2)
        is_end = channel == 3 and left <= MIB
        if kind != 0x82 or left < 0 or not (is_output or is_end):
            raise Failed(f"{self.url} closed the channel, or does not speak {CHANNELS}", 125)

        return channel, left

    def write(self, fd: int, data: bytes) -> None:
        """Write all of it to stdout or stderr."""
        while data:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:  # another process that has it open has made it so
                os.set_blocking(fd, True)
            except BrokenPipeError:
                raise Failed("", 141) from None
            except OSError as wrong:
                raise Failed(f"cannot write: {wrong.strerror}", 125) from None

    def end(self, final: bytes) -> int:
        """The exit status that the last message tells, see ExecResponse."""
        code = final.partition(b'"exit_code":')[2].partition(b",")[0].strip()
        if code.isdigit() and len(code) < 4 and b'"error"' not in final:
            return int(code) & 255

        import json

        try:
            answer = json.loads(final)
            text = one_line(answer["error"])
            status = answer["exit_code"] & 255 if "ended" in answer else 125
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            said = ascii(final[:80].decode("latin-1"))
            raise Failed(f"{self.url} ended with {said}", 125) from None

        raise Failed(text, status)


def say(fd: int, text: str) -> bool:
    """Write one of our own lines; return whether that worked."""
    try:
        os.write(fd, f"pocketcoder: {text}\n".encode(errors="replace"))
    except OSError:  # nobody listens
        return False
    return True


def open_standard_streams() -> None:
    """Make a closed one /dev/null, so that no socket gets to be stdout."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd < 3:
        fd = os.open(os.devnull, os.O_RDWR)

    os.close(fd)


def run_shell(words: list[str]) -> int:
    """Do as `bash WORDS`, in the sandbox; see `run`."""
    import _signal

    open_standard_streams()
    bridge = Bridge(proxy_url())
    before = {}
    for number in (_signal.SIGALRM, *SIGNALS):
        if number == _signal.SIGALRM or _signal.getsignal(number) != _signal.SIG_IGN:
            before[number] = _signal.signal(number, bridge.on_signal)

    try:
        if sys.version_info < (3, 8):  # noqa: UP036
            raise Failed(f"the shell needs Python 3.8 or later, this is {python_version()}", 125)

        status = bridge.run(request_of(arguments_of(words)), has_stdin())
        bridge.over = True
    except Failed as failure:
        bridge.over = True
        status = failure.status
        if failure.text and not say(2, failure.text):
            status = status or 125

    _signal.setitimer(_signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        _signal.signal(number, handler)

    return bridge.status or status


def ask_whether_ready(url: str) -> None:
    """Return if the server is ready for commands.  Raises Failed, with the reason."""
    try:
        sock, host = connect_to(url)
        lines = ["GET /ready HTTP/1.1", f"Host: {host}", "Connection: close", "", ""]
        sock.sendall("\r\n".join(lines).encode())
        head, body = read_head(sock)
        fields = read_fields(sock, head, body)
    except (OSError, UnicodeError) as wrong:
        raise Failed(unreachable(url, wrong), 1) from None

    if head[:13] == b"HTTP/1.1 200 " and fields.get("ready") is True:
        return

    error = fields.get("error")
    if fields.get("ready") is False and isinstance(error, str):
        raise Failed(f"{url} is not ready: {one_line(error)}", 1)
    raise Failed(refused(url, head, fields), 1)


def run_check() -> int:
    """Print whether the server at PROXY_URL is ready; 0 if it is, otherwise 1."""
    import _signal

    url = proxy_url()

    def give_up(*_: object) -> None:
        raise Failed(f"{url}: no answer within {CHECK_TIMEOUT:g} s", 1)

    open_standard_streams()
    wrong = ""
    _signal.signal(_signal.SIGALRM, give_up)
    _signal.setitimer(_signal.ITIMER_REAL, CHECK_TIMEOUT)
    try:
        ask_whether_ready(url)
    except Failed as failure:
        wrong = failure.text

    _signal.setitimer(_signal.ITIMER_REAL, 0)
    if wrong:
        say(2, wrong)
        return 1

    say(1, f"{url} is ready")
    return 0


def python_version() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def run(command: str | None, args: list[str]) -> int:
    """Run `command` with `args` as its $0, $1 ...; None: what `pocketcoder shell ARGS` would run.

    The exit status: the command's; 125 if the proxy failed, 141 if the reader of stdout has left,
    128+n after signal n.
    """
    if command is not None:
        return run_shell(["-c", "--", command, *args])
    return run_shell(subcommand_arguments(args) or [])


def is_our_process() -> bool:
    """Whether this process is this file, or the script that pip makes for it, by whatever link.

    The script imports this module first: so its shell needs not wait for what the server needs.
    """
    if __name__ == "__main__":
        return True
    script = getattr(sys.modules["__main__"], "__file__", None)
    return script is not None and os.path.basename(os.path.realpath(script)) == "pocketcoder"


if is_our_process():
    _words = shell_arguments(sys.argv)
    if _words is not None:
        # All is written, and there is nothing to tear down.
        os._exit(run_shell(_words))
    if sys.argv[1:] == ["check"]:
        os._exit(run_check())


# ------------------------------- the line ---------------------------------
if sys.version_info < (3, 10):
    if __name__ == "__main__" and sys.argv[1:] == ["shell", "--version"]:
        print(f"pocketcoder-proxy {VERSION}")
        sys.exit()
    _needs = f"needs Python 3.10 or later, and its shell 3.8; this is {python_version()}"
    if __name__ == "__main__":
        sys.exit(f"pocketcoder: {_needs}")
    raise ImportError(f"pocketcoder_proxy {_needs}")


def start_afresh() -> None:
    """Become a program that only loads the compiled code of this file, if that is possible.

    Compiling leaves 20 MB behind that are never given back, and a server lives long.
    """
    import marshal

    # What such a program has to know, and what the code of the module needs to run again.
    state = marshal.dumps((sys._getframe(1).f_code, __file__, sys.path, sys.argv))
    fd = os.memfd_create("pocketcoder_proxy", 0)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(state)

        program = (
            "import marshal, os, sys; code, __file__, sys.path, sys.argv ="
            f" marshal.loads(os.pread({fd}, {len(state)}, 0)); os.close({fd}); exec(code)"
        )
        # For people the arguments stand there once more.
        os.execv(sys.executable, [sys.executable, "-c", program, *sys.argv])
    except OSError:
        os.close(fd)


# With options of Python's own, or under another program, such as a debugger, it goes on as it is.
if __name__ == "__main__" and sys.argv[1:2] == ["server"] and sys.orig_argv[1:] == sys.argv:
    start_afresh()

import argparse
import asyncio
import base64
import codecs
import contextlib
import datetime
import enum
import errno
import fcntl
import hmac
import ipaddress
import json
import logging
import marshal
import math
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import termios
import time
from bisect import bisect_left
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import product
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeGuard, TypeVar
from urllib.parse import quote as percent_encoded
from urllib.parse import quote_plus, urlsplit

try:
    import tornado.httpserver
    import tornado.iostream
    import tornado.netutil
    import tornado.web
    import tornado.websocket
except ModuleNotFoundError:
    # The shell and the driver do without it; for a server `why_not` says what is missing.
    tornado = SimpleNamespace(  # type: ignore[assignment]
        web=SimpleNamespace(RequestHandler=object),
        httpserver=SimpleNamespace(HTTPServer=object),
        iostream=SimpleNamespace(IOStream=object),
        websocket=SimpleNamespace(WebSocketHandler=type("WebSocketHandler", (), {})),
    )

__all__ = [
    "AppState",
    "Cli",
    "CommandResult",
    "Commands",
    "ExecRequest",
    "ExecResponse",
    "McpQuery",
]
__all__ += [
    "PocketCoderDriver",
    "SessionMap",
    "default_agent_name",
    "exec_handler",
    "health_handler",
    "main",
]
__all__ += ["sse_handler"]
log = logging.getLogger("pocketcoder")
T = TypeVar("T")


def ignore(*_: object) -> None:
    """A callback that does nothing."""


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, `seconds` at most; whether it is set."""
    # Before Python 3.12 wait_for() may swallow a cancellation.
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()
    return event.is_set()


SIGNAL_NUMBERS = {
    name: signal.Signals[f"SIG{name}"]
    for name in ("INT", "TERM", "HUP", "QUIT", "KILL", "USR1", "USR2")
}


# ==========================================================================
# Errors
# ==========================================================================
# E1  A command that fails is a result; a request that cannot be served is an error.
# E2  Each class carries its HTTP status, JSON-RPC code and exit code.
class ProxyError(Exception):
    """An error that is answered, not a result.  Raised directly for faults of the proxy."""

    http_status = 500
    # Of JSON-RPC.
    rpc_code = -32603
    # As `timeout` of coreutils has it: the command could not be run.
    exit_code = 125

    def __init__(
        self,
        text: str,
        data: object = None,
        request_id: str | int | None = None,
        in_response: bool = False,
    ) -> None:
        super().__init__(text)

        # For a JSON-RPC error: its `data`, and the request that it answers.
        self.data = data
        self.request_id = request_id
        # What is wrong is a response, which is never answered.
        self.in_response = in_response


class BadMessage(ProxyError):
    """What was sent has the wrong shape, type or size."""

    http_status = 400
    rpc_code = -32602
    exit_code = 2


class NotJson(BadMessage):
    """What was sent is not JSON."""

    rpc_code = -32700


class NotAMessage(BadMessage):
    """It is JSON, but no message that fits here."""

    rpc_code = -32600


class HeaderMismatch(BadMessage):
    """Headers contradict the body, MCP 2026-07-28."""

    rpc_code = -32020


class UnsupportedVersion(BadMessage):
    """This revision of MCP is not served."""

    rpc_code = -32022


class UnknownMethod(BadMessage):
    """This server has no such method."""

    http_status = 404
    rpc_code = -32601


class RelayError(ProxyError):
    """An MCP server behind us cannot answer."""

    # The answer is a JSON-RPC error; after a 5xx some clients give up.
    http_status = 200


class UnknownSession(ProxyError):
    """The session has ended, or another credential opened it."""

    http_status = 404
    rpc_code = -32600


class Forbidden(ProxyError):
    """`Origin` or `Host` is not one of ours."""

    http_status = 403
    rpc_code = -32600


class Refused(ProxyError):
    """The request is refused before it runs anything."""

    http_status = 400
    rpc_code = -32600


class Unauthorized(Refused):
    """The token is missing or wrong."""

    http_status = 401


class NoSuchPath(Refused):
    """There is no such path, MCP server or terminal."""

    http_status = 404


class MethodNotAllowed(Refused):
    """The path has no such method."""

    http_status = 405


class NotAcceptable(Refused):
    """The caller takes no media type that we send."""

    http_status = 406


class TooLarge(Refused):
    """The body is larger than MAX_BODY."""

    http_status = 413


class UnsupportedMedia(Refused):
    """The body is not `application/json`."""

    http_status = 415


class NoSuchRun(ProxyError):
    """There is no such run, or it is forgotten."""

    http_status = 404
    rpc_code = -32602


class NoTerminal(ProxyError):
    """The sandbox cannot run it now, and nothing was run.

    Tmux refuses, no shell answers, or the queue is full.
    """

    http_status = 503


class TooMany(ProxyError):
    """As many as there may be are there already."""

    http_status = 503


class NoAudit(ProxyError):
    """The audit log cannot be written, and nothing is run unseen."""

    http_status = 503


# ==========================================================================
# Log
# ==========================================================================
# Lines on stderr.
#
# L1  An event is one line, whatever it shows; lines of a traceback follow it, and are indented.
# L2  Writing a line never blocks.
# L3  None of our own lines holds a token, a command, a value of a body, or a living session's id.
#     What relayed servers write on stderr is logged as it is.
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")


def timestamp(seconds: float) -> str:
    """A time as RFC 3339 has it, in UTC, with milliseconds."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def printable(text: str) -> str:
    """The same with control characters as Python writes them, so that they do nothing."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def key_values(**fields: object) -> str:
    """`key=value` for each field that is not None; a value is in quotes where it needs some."""
    words = list[str]()

    for key, value in fields.items():
        text = str(value)
        if len(text) > MAX_LOGGED:
            text = text[:MAX_LOGGED] + "…"

        is_plain = re.fullmatch(r"[^\s\"\\=]+", text) and text.isprintable()
        if value is not None:
            words.append(f"{key}={text if is_plain else json.dumps(text, ensure_ascii=False)}")

    return " ".join(words)


def reason_of(error: ProxyError) -> str:
    """Why a request was refused, for the log."""
    if isinstance(error, UnknownSession):
        return "no such session"
    if isinstance(error, BadMessage):
        return re.sub(r"\bgot .*, expected", "expected", str(error), flags=re.DOTALL)
    return str(error)


class LineFormatter(logging.Formatter):
    """Time, level and message in one line; a traceback below it."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return timestamp(record.created)

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {printable(line)}" for line in lines)


class Stderr(logging.Handler):
    """Logs to stderr without ever blocking: lines are dropped if its reader does not read."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            # Arguments that do not fit are no reason for their caller to fail.
            self.handleError(record)
            return

        data = f"{line}\n".encode(errors="backslashreplace")

        # It is closed, or its disk is full.
        with contextlib.suppress(OSError):
            for at in range(0, len(data), select.PIPE_BUF):
                # A pipe that is ready takes that much.
                if select.select([], [2], [], 0)[1]:
                    os.write(2, data[at : at + select.PIPE_BUF])


def log_to_stderr(level: str) -> None:
    """Log from this level up, see LOG_LEVELS."""
    handler = Stderr()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    number = logging.getLevelName(level.upper())
    # What others say at `debug` may hold anything.
    logging.basicConfig(handlers=[handler], level=max(number, logging.INFO))
    log.setLevel(number)
    # It shows headers that it refuses, and so tokens.
    logging.getLogger("tornado.general").setLevel(max(number, logging.WARNING))


class Refusals:
    """Logs refused requests: REFUSALS_LOGGED in a second, and how many more there were."""

    def __init__(self) -> None:
        # Ends a second that started with a refusal; None: there was none lately.
        self.timer: asyncio.TimerHandle | None = None
        self.logged = 0
        self.left_out = 0

    def add(self, **fields: object) -> None:
        if self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(1, self.end_second)

        if self.logged < REFUSALS_LOGGED:
            self.logged += 1
            log.warning("refused %s", key_values(**fields))
        else:
            self.left_out += 1

    def end_second(self) -> None:
        """Log the number of those that have no line; the next refusal starts another second."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

        if self.left_out:
            log.warning("refused more=%d", self.left_out)

        self.logged = 0
        self.left_out = 0


# ==========================================================================
# Fields
# ==========================================================================
# What comes from outside, each value described once: checks, the schemas of tools and the OpenAPI
# document are made of this.
#
# V1  A complaint names the field, what was got and what was expected.
# V2  What is accepted fits the schema; the reverse holds but for NUL, halves of characters, 1.0 as
#     an integer, and what a description says in words.
Message = dict[str, Any]
RUN_ID = re.compile(r"[0-9a-f]{16}")
SESSION_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
AGENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
KEY = re.compile(
    r"(?:[CMS]-)*(?:[!-~]|Enter|Escape|B?Tab|Space|BSpace|Up|Down|Left|Right|Home|End|Insert|Delete"
    r"|IC|DC|[PN]Page|Page(?:Up|Down)|Pg(?:Up|Dn)|F(?:[1-9]|1[0-2]))"
)
# The ways in which a command may come.
DOORS = ("exec", "stream", "shell", "mcp", "page")


# How a command that was started may end.
ENDED = ("exit", "timeout", "cancelled", "lost")


class RunState(enum.Enum):
    """How far a run is, for its callers.  How far its command is: see Phase."""

    WAITING = "waiting"  # for a pane, or for its start there
    RUNNING = "running"
    ENDED = "ended"


def complain(name: str, got: object, expected: str) -> BadMessage:
    """A BadMessage that shows the start of what was got."""
    shown = json.dumps(got[:80] if isinstance(got, str) else got)
    if len(shown) > 90:
        shown = shown[:80] + "..."
    return BadMessage(f"`{name}`: got {shown}, expected {expected}")


def wrong_option(option: str, got: str, expected: str) -> BadMessage:
    """A fault of the command line or of a variable, as a person typed it."""
    shown = in_quotes(got) if got else "nothing (is a variable empty?)"
    return BadMessage(f"{option}: got {shown}, expected {expected}")


def ignored_names(got: Message, known: Set[str]) -> tuple[str, ...]:
    """Names of fields that a caller sent and that mean nothing here, to be shown to it."""
    unknown = [name[:80].encode(errors="replace").decode() for name in got if name not in known]
    return tuple(unknown[:MAX_IGNORED])


def check_text(
    name: str, got: object, expected: str, limit: int, nul: bool = False, raw: bool = False
) -> str:
    """Return `got`, a string that a process can take; raise BadMessage.

    raw  bytes that are not UTF-8 may be in it, as U+DC80 to U+DCFF, as Python has them
    """
    if not isinstance(got, str):
        raise complain(name, got, expected)
    if "\0" in got and not nul:
        raise complain(name, got, f"{expected} without NUL")

    try:
        size = len(got.encode(errors="surrogateescape" if raw else "strict"))
    except UnicodeEncodeError:
        raise complain(name, got, f"{expected} in UTF-8, without lone surrogates") from None

    if size > limit:
        raise complain(name, got, f"{expected} of at most {limit} bytes (it has {size})")

    return got


@dataclass(frozen=True)
class Field:
    """What a value from outside may be, and what it means.

    This class is for values that are true or false; each type of JSON has a subclass.
    """

    # The name of the type in JSON Schema.
    kind: ClassVar[str] = "boolean"

    name: str
    # For people and models.
    about: str
    # What holds where it is not given, if a value says that.
    default: Any = None
    # Whether null may stand for the default.
    nullable: bool = False
    # One that is right.
    example: Any = None

    def check(self, got: Any) -> Any:
        """Return `got`, a value of JSON.  Raises BadMessage."""
        return None if got is None and self.nullable else self.check_value(got)

    def check_value(self, got: Any) -> Any:
        """The same for a value that is not null."""
        if not isinstance(got, bool):
            raise complain(self.name, got, "true or false")
        return got

    def read(self, text: str) -> Any:
        """The value of a text in a query or a header.  Raises BadMessage."""
        return self.check_value({"true": True, "false": False}.get(text, text))

    def schema(self) -> Message:
        """Its JSON Schema."""
        shown: Message = {"type": [self.kind, "null"] if self.nullable else self.kind}
        shown.update(self.bounds())
        if self.default is not None:
            shown["default"] = self.default
        if self.example is not None:
            shown["examples"] = [self.example]
        return {**shown, "description": self.about}

    def bounds(self) -> Message:
        """What the schema says of this type only."""
        return {}


@dataclass(frozen=True)
class Text(Field):
    """A string that a process can take."""

    kind: ClassVar[str] = "string"

    expected: str = "a string"
    # Bytes of UTF-8; None: those of the body are limited.
    limit: int | None = None
    may_be_empty: bool = True
    # All of it; then the other rules here do not matter.
    pattern: re.Pattern[str] | None = None
    # One of these; likewise.
    choices: tuple[str, ...] = ()
    # See `check_text`.
    nul: bool = False
    raw: bool = False

    def check_value(self, got: Any) -> str:
        if self.choices:
            if not isinstance(got, str) or got not in self.choices:
                raise complain(self.name, got, f"one of {', '.join(self.choices)}")
            return got

        if self.pattern is not None:
            if not isinstance(got, str) or not self.pattern.fullmatch(got):
                raise complain(self.name, got, self.expected)
            return got

        limit = NO_LIMIT if self.limit is None else self.limit
        text = check_text(self.name, got, self.expected, limit, self.nul, self.raw)
        if not text and not self.may_be_empty:
            raise complain(self.name, got, f"{self.expected}, not an empty string")

        return text

    def read(self, text: str) -> str:
        return self.check_value(text)

    def bounds(self) -> Message:
        if self.choices:
            # Null is not one of them.
            return {"enum": [*self.choices, *([None] if self.nullable else [])]}
        if self.pattern is not None:
            return {"pattern": f"^({self.pattern.pattern})$"}

        shown: Message = {} if self.may_be_empty else {"minLength": 1}
        if self.limit is not None:
            # No character has less than a byte.
            shown["maxLength"] = self.limit
        return shown


@dataclass(frozen=True)
class Seconds(Field):
    """A number up to MAX_TIMEOUT."""

    kind: ClassVar[str] = "number"

    may_be_zero: bool = True

    def check_value(self, got: Any) -> float:
        # NaN is not within any bounds.
        is_within = type(got) in (int, float) and 0 <= got <= MAX_TIMEOUT
        if not is_within or (got == 0 and not self.may_be_zero):
            sign = "<=" if self.may_be_zero else "<"
            raise complain(self.name, got, f"seconds, 0 {sign} {self.name} <= {MAX_TIMEOUT}")
        seconds: float = got
        return seconds

    def read(self, text: str) -> float:
        is_decimal = re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text)
        return self.check_value(float(text) if is_decimal else text)

    def bounds(self) -> Message:
        least = "minimum" if self.may_be_zero else "exclusiveMinimum"
        return {least: 0, "maximum": MAX_TIMEOUT}


@dataclass(frozen=True)
class Whole(Field):
    """An integer."""

    kind: ClassVar[str] = "integer"

    least: int = 0
    # None: where it is used, that is known.
    most: int | None = None
    unit: str = ""

    def check_value(self, got: Any) -> int:
        most = math.inf if self.most is None else self.most
        if type(got) is not int or not self.least <= got <= most:
            end = "or more" if self.most is None else f"to {self.most}"
            unit = f" ({self.unit})" if self.unit else ""
            raise complain(self.name, got, f"an integer, {self.least} {end}{unit}")
        return int(got)

    def read(self, text: str) -> int:
        return self.check_value(int(text) if re.fullmatch(r"[0-9]{1,15}", text) else text)

    def bounds(self) -> Message:
        shown: Message = {"minimum": self.least}
        if self.most is not None:
            shown["maximum"] = self.most
        return shown


@dataclass(frozen=True)
class Texts(Field):
    """An array of strings, which becomes a tuple."""

    kind: ClassVar[str] = "array"

    # Of each string.
    item: Text | None = None
    expected: str = "an array of strings"
    most: int | None = None

    def check_value(self, got: Any) -> tuple[str, ...]:
        most = math.inf if self.most is None else self.most
        if not isinstance(got, (list, tuple)) or len(got) > most:
            raise complain(self.name, got, self.expected)

        assert self.item is not None
        for word in got:
            self.item.check(word)

        return tuple(got)

    def bounds(self) -> Message:
        assert self.item is not None
        shown: Message = {"items": {"type": "string", **self.item.bounds()}}
        if self.most is not None:
            shown["maxItems"] = self.most
        return shown


@dataclass(frozen=True)
class Variables(Field):
    """An object of strings: variables that a process can take."""

    kind: ClassVar[str] = "object"

    def check_value(self, got: Any) -> Mapping[str, str]:
        if not isinstance(got, dict):
            raise complain(self.name, got, "an object of strings")

        size = 0

        for name, value in got.items():
            check_text(self.name, name, "names of variables", MAX_PATH)
            if not name or "=" in name:
                raise complain(self.name, name, "names of variables, not empty, without `=`")

            check_text(f"{self.name}.{name[:40]}", value, "a string", MAX_VARIABLE, raw=True)
            size += len(name.encode()) + len(value.encode(errors="surrogateescape"))

        if size > MAX_ENVIRONMENT:
            raise complain(self.name, f"{size} bytes", f"at most {MAX_ENVIRONMENT}")

        return got

    def bounds(self) -> Message:
        return {
            "propertyNames": {"pattern": "^[^=]+$", "maxLength": MAX_PATH},
            "additionalProperties": {"type": "string", "maxLength": MAX_VARIABLE},
        }


ARGUMENT = Text(
    "argv",
    "An argument of bash.",
    expected="an array of strings, the arguments of bash",
    limit=MAX_COMMAND,
    raw=True,
)
KEY_NAME = Text(
    "keys",
    "The name of a key.",
    expected="tmux names of keys such as Enter, C-c, Up; words to type go in `text`",
    pattern=KEY,
)
# By name.  Where one means the same elsewhere but for its default, it is a `replace` of this one.
FIELDS: dict[str, Field] = {
    each.name: each
    for each in (
        # A command.
        Text(
            "cmd",
            "A bash command; pipes, loops and newlines are fine.",
            example="echo hi",
            expected="a bash command",
            limit=MAX_COMMAND,
            may_be_empty=False,
        ),
        Texts(
            "argv",
            'In place of `cmd`: arguments of bash, as ["-lc", "make"].',
            example=["-c", "echo $0", "hi"],
            item=ARGUMENT,
            expected=ARGUMENT.expected,
        ),
        Text(
            "cwd",
            "A directory in the workspace; by default the workspace itself.",
            default="",
            example=".",
            expected="a directory in the workspace",
            limit=MAX_PATH,
            raw=True,
        ),
        Text(
            "agent_name",
            "Whose terminal.",
            default=default_agent_name(),
            example="alice",
            expected=f"a name like {AGENT_NAME.pattern}",
            pattern=AGENT_NAME,
        ),
        Seconds(
            "timeout",
            "Seconds until the command is ended.",
            default=DEFAULT_TIMEOUT,
            example=60,
            may_be_zero=False,
        ),
        Text(
            "stdin",
            "Fed to the command; by default it reads nothing.",
            nullable=True,
            example="text",
            expected="a string or null",
            nul=True,
        ),
        Variables(
            "env",
            f"Variables of the command; {MAX_ENVIRONMENT} bytes in all.",
            default={},
            example={"GREETING": "hello"},
        ),
        Whole(
            "max_output",
            "Bytes kept of the output: the first and the last half.",
            default=DEFAULT_OUTPUT,
            example=1000,
            least=1,
            most=MAX_OUTPUT,
            unit="bytes",
        ),
        Seconds(
            "wait",
            "Seconds until the answer, also if the command still runs then.",
            nullable=True,
            example=10,
        ),
        Text(
            "usage_id",
            "For your records.",
            nullable=True,
            example="usage-1",
            expected="a string or null",
            limit=MAX_ID,
        ),
        Text(
            "session_id",
            "The session that the command belongs to; an open MCP session of this id hears of it.",
            nullable=True,
            example="session-1",
            expected="a string or null",
            limit=MAX_ID,
        ),
        Field(
            "combined",
            "On a channel: stdout and stderr as one stream, in the order written.",
            default=False,
        ),
        # Runs.
        Text(
            "run_id",
            "Of the command, as an answer of exec or list_runs names it.",
            example="0123456789abcdef",
            expected="the `run_id` of a command: 16 of 0-9 a-f",
            pattern=RUN_ID,
        ),
        Whole(
            "offset",
            "Bytes of output that you have already: `next_offset` of the last answer.",
            default=0,
        ),
        Text(
            "signal",
            "For its process group.",
            default="TERM",
            choices=tuple(SIGNAL_NUMBERS),
        ),
        Field("running", "Only those that run now.", default=False),
        Text("state", "Only those.", choices=tuple(state.value for state in RunState)),
        Whole("limit", "At most so many.", default=DEFAULT_LISTED, most=MAX_RUNS),
        Text(
            "before",
            "A `run_id`: only older ones.",
            expected="the `run_id` of a command: 16 of 0-9 a-f",
            pattern=RUN_ID,
        ),
        # Terminals.
        Whole("lines", "At most.", default=100, least=1, most=MAX_LINES),
        Text(
            "text",
            "Typed as it is; no Enter is added.",
            default="",
            example="yes",
            limit=MAX_KEYS,
        ),
        Texts(
            "keys",
            "Pressed after the text; tmux names such as Enter, C-c, Up, Escape, Tab, BSpace, F1.",
            default=[],
            example=["Enter"],
            item=KEY_NAME,
            expected=f"an array of names of keys, {MAX_KEYS} at most",
            most=MAX_KEYS,
        ),
    )
}


def fields_of(names: str, **defaults: Any) -> dict[str, Field]:
    """The fields of these names, some with other defaults, which are not null."""
    found = {name: FIELDS[name] for name in names.split()}
    for name, default in defaults.items():
        found[name] = replace(found[name], default=default, nullable=False)
    return found


def schemas(fields: Mapping[str, Field]) -> Message:
    """The JSON Schema of each field."""
    return {name: each.schema() for name, each in fields.items()}


def without_examples(properties: Message) -> Message:
    """The same schemas in fewer words, for models."""
    return {
        name: {word: value for word, value in schema.items() if word != "examples"}
        for name, schema in properties.items()
    }


def object_schema(properties: Message, required: Sequence[str] = ()) -> Message:
    """The JSON Schema of an object."""
    return {"type": "object", "properties": properties, "required": [*required]}


def checked(got: Message, fields: Mapping[str, Field], required: Sequence[str] = ()) -> Message:
    """A value for each field: what was got, else the default.  Raises BadMessage."""
    found: Message = {}
    for name, each in fields.items():
        if name in got or name in required:
            found[name] = each.check(got.get(name))
        else:
            found[name] = each.default

    return found


# ==========================================================================
# Wire types
# ==========================================================================
# W1  A request that exists is valid: it is checked when it is made.
EXEC_FIELDS = fields_of(
    "cmd argv cwd agent_name timeout stdin env max_output wait usage_id session_id combined"
)
LIST_FIELDS = fields_of("agent_name session_id usage_id state limit before", agent_name=None)
KEYS_FIELDS: dict[str, Field] = {
    **fields_of("text keys run_id"),
    "show": Field("show", "Whether to answer with what the terminal shows then.", default=True),
}
SIGNAL_FIELDS = {"signal": replace(FIELDS["signal"], default=None)}
OUTPUT_FIELDS: dict[str, Field] = {
    "offset": Whole("offset", "Bytes to leave out.", default=0),
    "limit": Whole("limit", "Bytes at most; by default all."),
}
# Of a session over SSE.
SESSION_NAME = Text(
    "session_id",
    "The session's name; by default the server mints one.",
    example="my-session",
    expected="1 to 128 of A-Z a-z 0-9 _ . -",
    pattern=SESSION_ID,
)


def whole(text: str) -> float:
    """An integer of JSON; inf if it has too many digits for int()."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def read_object(body: bytes) -> Message:
    """The JSON object in a body.  Raises BadMessage."""
    try:
        got = json.loads(body.decode(), parse_constant=float, parse_int=whole)
    except (ValueError, RecursionError) as wrong:
        raise BadMessage(f"body: expected a JSON object in UTF-8, got: {wrong}") from None
    if not isinstance(got, dict):
        raise complain("body", got, "a JSON object")
    return got


def command_text(argv: Sequence[str]) -> str:
    """What `bash ARGV` runs, for people: the text of `-c`, else the line as it would be typed."""
    letters, _, operands = split_options([*argv])
    if "c" in letters and operands:
        return operands[0]
    return shlex.join(["bash", *argv])


def inside(workspace: str, cwd: str) -> str:
    """A directory that leads into `workspace`, by the name that it has in `cwd`, absolute.

    workspace  a real path
    Raises BadMessage.
    """
    if not cwd:
        named = workspace
    else:
        # `..` goes back by the name, as `cd` of a shell does.
        named = os.path.normpath(os.path.join(workspace, cwd))

    real = os.path.realpath(named)
    if os.path.commonpath([workspace, real]) != workspace:
        raise complain("cwd", cwd, f"a directory inside the workspace {workspace}")
    if not os.path.isdir(real):
        raise complain("cwd", cwd, f"a directory (there is none at {real})")

    return named


@dataclass(frozen=True)
class McpQuery:
    """Query parameters for established sessions.  Raises BadMessage."""

    session_id: str | None = None

    def __post_init__(self) -> None:
        if self.session_id is not None:
            SESSION_NAME.check(self.session_id)


@dataclass(frozen=True)
class ExecRequest:
    """A command to run; the fields of `POST /exec`.  Raises BadMessage."""

    cmd: str
    # Absolute.  A caller's lies in the workspace; "": wherever the terminal is.
    cwd: str = ""
    usage_id: str | None = None
    session_id: str | None = None
    agent_name: str = field(default_factory=default_agent_name)
    # Seconds from the start of the command.
    timeout: float = EXEC_FIELDS["timeout"].default
    stdin: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    # Bytes.
    max_output: int = EXEC_FIELDS["max_output"].default
    # Seconds until its caller is answered, while it goes on; None: it is waited for.
    wait: float | None = None
    # Arguments of bash, which are run in place of `cmd`; then `cmd` only shows them to people.
    argv: tuple[str, ...] | None = None
    # stdout and stderr are one stream, in the order written; a channel has two otherwise.
    combined: bool = False
    # Names of fields that the caller sent and that mean nothing here.
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.argv is None:
            EXEC_FIELDS["cmd"].check(self.cmd)
        elif self.cmd != command_text(EXEC_FIELDS["argv"].check(self.argv)):
            raise complain("cmd", self.cmd, "no `cmd` beside `argv`")

        for name, each in EXEC_FIELDS.items():
            if name not in ("cmd", "argv"):
                each.check(getattr(self, name))

    @classmethod
    def from_wire(cls, body: bytes, workspace: str) -> ExecRequest:
        """Read a JSON body: unknown fields are ignored, `cwd` is made absolute."""
        return cls.from_fields(read_object(body), workspace)

    @classmethod
    def from_fields(cls, got: Message, workspace: str) -> ExecRequest:
        """The same from fields that a caller sent."""
        if "argv" in got:
            if "cmd" in got:
                raise complain("cmd", got["cmd"], "no `cmd` beside `argv`")

            got["argv"] = EXEC_FIELDS["argv"].check(got["argv"])
            got["cmd"] = command_text(got["argv"])
        elif "cmd" not in got:
            raise BadMessage("`cmd`: got nothing, expected a bash command, or `argv`")

        got["cwd"] = inside(workspace, EXEC_FIELDS["cwd"].check(got.get("cwd", "")))
        given = {name: got[name] for name in EXEC_FIELDS if name in got}
        if given.get("wait") is not None:
            # Nobody need wait for it: it may take its time.
            given.setdefault("timeout", MAX_TIMEOUT)
        return cls(**given, ignored=ignored_names(got, EXEC_FIELDS.keys()))


@dataclass(frozen=True)
class CommandResult:
    """How a run ended.  `exit_code` is the shell's; see ENDINGS for the others."""

    # stdout and stderr combined.
    output: str
    exit_code: int
    # A key of ENDINGS.
    ended: str = "exit"
    error: str | None = None
    truncated: bool = False
    output_bytes: int = 0
    duration_ms: int = 0
    # How long it waited for a pane.
    waited_ms: int = 0
    # The last line of the terminal when its time was over, if that is no output: it may ask there.
    terminal: str | None = None
    run_id: str = ""


@dataclass(frozen=True)
class RunQuery:
    """Which runs a caller wants to see; None: whatever it is.  Raises BadMessage."""

    agent_name: str | None = None
    session_id: str | None = None
    usage_id: str | None = None
    # A value of RunState.
    state: str | None = None
    limit: int = LIST_FIELDS["limit"].default
    # A run_id: only older ones.
    before: str | None = None

    def __post_init__(self) -> None:
        for name, each in LIST_FIELDS.items():
            if getattr(self, name) is not None:
                each.check(getattr(self, name))


def check_offset(name: str, got: int, printed: int) -> int:
    """Return `got`, an offset in the output of a run; raise BadMessage."""
    if got > printed:
        raise complain(name, got, f"an integer, 0 to {printed} (bytes of output so far)")
    return got


def shape(kind: str, about: str, **more: Any) -> Message:
    """The JSON Schema of a value that we send."""
    return {"type": kind, **more, "description": about}


def or_null(schema: Message) -> Message:
    """The same, or null."""
    more = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, **more, "type": [schema["type"], "null"]}


# What is said of a command, in an answer of whatever route or tool.
SHAPES: dict[str, Message] = {
    "stdout": shape(
        "string",
        "stdout and stderr in the order written; bytes that are not UTF-8 are U+FFFD. Of more than"
        " `max_output` bytes the first and the last half, and a line between them.",
    ),
    "running": shape("boolean", "The command goes on: this is what is known so far."),
    "exit_code": shape(
        "integer",
        "What the shell reported: 128+n after signal n. 124: timeout. 125: the proxy could not run"
        " it. 137: its terminal died.",
        minimum=0,
        maximum=255,
    ),
    "error": shape("string", "What the proxy did or could not do, in one sentence."),
    "ended": shape(
        "string",
        "`exit`: by itself, a signal included. `lost`: its terminal died.",
        enum=[*ENDED],
    ),
    "truncated": shape("boolean", "Whether bytes of the output are missing here."),
    "output_bytes": shape("integer", "Bytes that the command has written.", minimum=0),
    "duration_ms": shape("integer", "From its start to its end.", minimum=0),
    "waited_ms": shape("integer", "How long it waited for a terminal.", minimum=0),
    "terminal": shape(
        "string", "The last line of its terminal, if that is no output: it may ask something there."
    ),
    "run_id": shape("string", "Names the run.", pattern=f"^{RUN_ID.pattern}$"),
    "ignored": shape(
        "array", "Fields of the request that mean nothing here.", items={"type": "string"}
    ),
}
# And where it was not just asked for.
RUN_SHAPES: dict[str, Message] = {
    "run_id": SHAPES["run_id"],
    "door": shape("string", "The way in which it came.", enum=[*DOORS]),
    "agent_name": shape("string", "Whose terminal."),
    "session_id": or_null(shape("string", "As in the request.")),
    "usage_id": or_null(shape("string", "As in the request.")),
    "cmd": shape("string", f"The command, {MAX_LISTED_COMMAND} bytes of it."),
    "cwd": shape("string", "Its directory."),
    "state": shape(
        "string", "`waiting`: for a terminal.", enum=[state.value for state in RunState]
    ),
    "started": or_null(shape("string", "When, as RFC 3339 has it.", format="date-time")),
}


@dataclass(frozen=True)
class ExecResponse:
    """The answer of `POST /exec`; what does not apply is None."""

    stdout: str | None = None
    # True: it goes on, and this is what is known so far.
    running: bool | None = None
    exit_code: int | None = None
    error: str | None = None
    ended: str | None = None
    truncated: bool | None = None
    output_bytes: int | None = None
    duration_ms: int | None = None
    waited_ms: int | None = None
    terminal: str | None = None
    run_id: str | None = None
    ignored: list[str] | None = None

    @classmethod
    def of(cls, ignored: Sequence[str], result: CommandResult, stdout: str | None) -> ExecResponse:
        """The answer to a request of which some fields were `ignored`.

        stdout  None: its output was streamed
        """
        return cls(
            stdout=stdout,
            exit_code=result.exit_code,
            error=result.error,
            ended=result.ended,
            truncated=result.truncated,
            output_bytes=result.output_bytes,
            duration_ms=result.duration_ms,
            waited_ms=result.waited_ms,
            terminal=result.terminal,
            run_id=result.run_id,
            ignored=[*ignored] or None,
        )

    def facts(self) -> Message:
        """What applies."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to_wire(self) -> str:
        return json.dumps(self.facts(), ensure_ascii=False, separators=(",", ":"))


# ==========================================================================
# Processes
# ==========================================================================
# What /proc tells, and which shell there is.
#
# P1  A process that cannot be looked at for lack of descriptors or memory counts as alive.
# P2  Nothing here blocks: `processes_of` gives way to the loop every 16 processes.

# The proxy is short of something; that says nothing about the process that it looked for.
SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def find_shell() -> str:
    """The path of bash, else of sh, that is not this very file under a shell's name.

    Raises NoTerminal.
    """
    folders = [*os.environ.get("PATH", "").split(":"), "/bin", "/usr/bin", "/usr/local/bin"]
    for name in ("bash", "sh"):
        for folder in filter(None, folders):
            path = f"{folder}/{name}"
            if os.access(path, os.X_OK) and not os.path.samefile(path, __file__):
                return path

    raise NoTerminal("no bash and no sh in PATH: install one")


def read_proc(pid: int, name: str, size: int = 4 * KIB) -> bytes:
    """A file of /proc/PID, in one read: it may change in between.  Raises OSError."""
    with open(f"/proc/{pid}/{name}", "rb", 0) as file:
        return file.read(size)


class Process(NamedTuple):
    """What /proc/PID/stat says of a process, see proc(5)."""

    name: str
    # It waits for something to happen: neither running nor stopped.
    sleeps: bool
    parent: int
    group: int
    # The process group that its terminal listens to; -1 without a terminal.
    foreground: int
    # In ticks since the machine started.
    started_at: int


def process(pid: int) -> Process | None:
    """What it is doing; None if it has ended.  Raises OSError if we cannot look now."""
    try:
        head, _, tail = read_proc(pid, "stat").decode("latin-1").rpartition(")")
    except OSError as wrong:
        if wrong.errno in SHORTAGE:
            raise

        return None

    state, parent, group, _, _, foreground, *rest = tail.split()
    if state in "ZX":
        return None

    return Process(
        name=head.partition("(")[2],
        sleeps=state == "S",
        parent=int(parent),
        group=int(group),
        foreground=int(foreground),
        started_at=int(rest[13]),
    )


def ticks() -> int:
    """Now, as Process.started_at counts."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def unread_bytes(fd: int) -> int:
    """How much a FIFO or a terminal holds that nobody has read.  Raises OSError."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def has_ended(pid: int) -> bool:
    """Whether the process has ended; False if we cannot look."""
    try:
        return process(pid) is None
    except OSError:
        return False


class RunTraits(NamedTuple):
    """How processes of a run can be known."""

    run_id: str
    # The process group of its command, if that is known.
    group: int | None
    # The path of its files, but for the suffixes.
    path: str
    # In ticks: no process of it is older.
    born: int

    def fit(self, pid: int, found: Process) -> bool:
        """Whether it is in the run's group, carries its name, or writes its output.

        Raises OSError if it has ended, or is another user's.
        """
        if found.group == self.group:
            return True

        mark = f"POCKETCODER_RUN_ID={self.run_id}".encode()
        if mark in read_proc(pid, "environ", 4 * MIB).split(b"\0"):
            return True

        links = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (1, 2))
        return any(link.startswith(f"{self.path}.") for link in links)


def listeners_on(port: int) -> list[int]:
    """Processes that listen on this TCP port, as far as we may look."""
    wanted = set[str]()
    for table in ("tcp", "tcp6"):
        # There may be no IPv6.
        with contextlib.suppress(OSError), open(f"/proc/net/{table}") as file:
            for row in file.readlines()[1:]:
                # proc(5): the address here, the state, the inode.
                _, here, _, state, *_, inode = row.split()[:10]
                if state == TCP_LISTEN and int(here.rpartition(":")[2], 16) == port:
                    wanted.add(f"socket:[{inode}]")

    found = list[int]()
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        # It has ended, or is another user's.
        with contextlib.suppress(OSError):
            folder = f"/proc/{pid}/fd"
            if any(os.readlink(f"{folder}/{fd}") in wanted for fd in os.listdir(folder)):
                found.append(pid)

    return found


async def processes_of(run: RunTraits) -> set[int]:
    """The processes that fit, and all that descend from them.  Raises OSError.

    In pieces: a thread would wait for its turn at each file of /proc while the loop is busy.
    """
    found = set[int]()
    parents = dict[int, int]()
    pids = map(int, filter(str.isdecimal, os.listdir("/proc")))

    for count, pid in enumerate(pids):
        if count % 16 == 0:
            await asyncio.sleep(0)

        try:
            seen = process(pid)
            if seen is None or seen.started_at < run.born:
                continue
            parents[pid] = seen.parent
            if run.fit(pid, seen):
                found.add(pid)
        except OSError as wrong:
            # Otherwise it has ended, or belongs to another user.
            if wrong.errno in SHORTAGE:
                raise

    while True:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        if not children:
            return found - {os.getpid()}

        found |= children


# ==========================================================================
# Places
# ==========================================================================
# Directories that others share: who could put something there, and whether we can.
def is_open(folder: os.stat_result) -> bool:
    """Whether any user may move other users' files there."""
    return folder.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH


def close_to_others(folder: str) -> None:
    """Set the sticky bit on a directory of our own that any user may write to.

    Sandbox images make it like that.
    """
    place = os.stat(folder)
    if is_open(place) and place.st_uid == os.geteuid():
        os.chmod(folder, stat.S_IMODE(place.st_mode) | stat.S_ISVTX)
        log.warning("%s: any user could replace what is in it: it has the sticky bit now", folder)


def check_place(path: str) -> None:
    """Refuse a tmux socket that another user can have put at `path`: he would get every command.

    The socket, its directory and a link to that must belong to us or root, and nobody else may move
    files there.  For root, whose terminals may be a worker's, anybody may own the directory.
    Raises NoTerminal.
    """
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        close_to_others(folder)
        check_owners(path)
    except OSError as missing:
        raise NoTerminal(f"no directory for the socket {path}: {missing}") from None


def check_owners(path: str, setting: str = "TMUX_SOCKET") -> None:
    """The same for a directory that is there.  Raises NoTerminal, OSError.

    setting  what chooses the path
    """
    folder = os.path.dirname(path)
    user = os.geteuid()
    place = os.stat(folder)
    # Whoever owns a symlink there can redirect it.
    found = {f"{folder} itself": os.lstat(folder), folder: place}
    is_public = place.st_mode & stat.S_IWOTH
    if (user or is_public) and os.path.lexists(path):
        found[path] = os.lstat(path)

    owners = {0, user}
    if user == 0:
        owners.add(place.st_uid)

    for name, it in found.items():
        if it.st_uid not in owners or (it is place and is_open(place)):
            raise NoTerminal(
                f"{name}: got user {it.st_uid} and mode {stat.filemode(it.st_mode)}, expected user"
                f" {user} or root, and that no other may write there: set {setting} to a path in"
                " a safe directory"
            )


def open_above(path: str) -> list[str]:
    """Directories above the socket's own in which any user could replace the next one.

    Volumes may be like that.
    """
    found = list[str]()
    folder = os.path.dirname(os.path.realpath(os.path.dirname(path)))

    while folder != "/":
        if is_open(os.stat(folder)):
            found.append(folder)

        folder = os.path.dirname(folder)

    return found


def nearest_folder(path: str) -> str:
    """The lowest directory above `path` that is there, or `path` itself."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def try_folder(folder: str) -> None:
    """Raise OSError if no file can be written in this directory.

    The file has no name, where the file system knows such files, so nobody sees it.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as sample:
        if sample.write(bytes(SAMPLE_SIZE)) != SAMPLE_SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def try_file(fd: int) -> None:
    """Raise OSError if nothing can be written to this open file, as far as it shows unwritten.

    A quota does not show.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        try_pipe(fd)
        return

    problem = 0
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and found.st_size + SAMPLE_SIZE > limit:
        problem = errno.EFBIG

    space = os.fstatvfs(fd)
    free = space.f_bavail if os.geteuid() else space.f_bfree
    # A file system without a size has no blocks.
    if space.f_blocks and free * space.f_frsize < SAMPLE_SIZE:
        problem = errno.ENOSPC
    if space.f_flag & os.ST_RDONLY:
        problem = errno.EROFS

    if problem:
        raise OSError(problem, os.strerror(problem))


def try_pipe(fd: int) -> None:
    """The same for a pipe, a terminal or a socket."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    events = poll.poll(0)
    if not events:
        raise OSError(errno.EAGAIN, "its reader does not read")
    if events[0][1] & (select.POLLERR | select.POLLHUP):
        raise OSError(errno.EPIPE, "it has no reader")


def check_descriptor(fd: int) -> None:
    """Raise OSError if too few descriptors are left for a run, `fd` being the newest."""
    if fd > resource.getrlimit(resource.RLIMIT_NOFILE)[0] - DESCRIPTORS_KEPT:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


# ==========================================================================
# Tmux
# ==========================================================================
# Every tmux command there is.
#
# T1  Commands go down one control connection; replies come back in their order.
# T2  Panes and windows are addressed by id; names are for finding.
# T3  What a pane shows is read by a process of its own: on the control connection, what a command
#     prints could pass for a reply of tmux.
PANE_FORMAT = (
    "#{pane_id} #{window_id} #{pane_pid} #{pane_in_mode} #{pane_width} #{pane_height}"
    " #{pane_tty} #{window_name}"
)
# A placeholder in `send`: it is not written, but takes the second of the two replies that tmux
# gives to the `if-shell` before it.
SECOND_REPLY: list[str] = []
# Changes when somebody types, or anything is shown; not when a person only looks.
PANE_STATE = "#{cursor_x} #{cursor_y} #{history_size} #{pane_in_mode} #{pane_synchronized}"
# No copy mode, and no synchronized panes.
NO_MODE = "#{==:#{pane_in_mode}#{pane_synchronized},00}"
# Tmux answers that there is no such command, and keeps no record of it, as it does of commands: a
# person reads them with `show-messages`.
NO_COMMAND = "pocketcoder-ready"
# Of a pane, before what it shows; one behind a zoomed pane too.
PICTURE_FORMAT = (
    "#{pane_id} #{pane_left} #{pane_top} #{pane_width} #{pane_height} #{cursor_x} #{cursor_y}"
    " #{cursor_flag} #{pane_active}"
)


def is_in_no_mode(state: str) -> bool:
    """Whether NO_MODE is true of a PANE_STATE."""
    return state.endswith(" 0 0")


class Pane(NamedTuple):
    """A pane, as tmux described it when asked."""

    pane_id: str
    window_id: str
    # The process that was started in it: its shell.
    pid: int
    in_mode: bool
    # In characters.
    width: int
    height: int
    # The path of its terminal.
    tty: str
    window_name: str

    @classmethod
    def parse(cls, line: str) -> Pane:
        """From a line of PANE_FORMAT.  Raises ValueError."""
        pane_id, window_id, pid, in_mode, width, height, tty, name = line.split(" ", 7)
        return cls(
            pane_id=pane_id,
            window_id=window_id,
            pid=int(pid),
            in_mode=in_mode != "0",
            width=int(width),
            height=int(height),
            tty=tty,
            window_name=name,
        )


def tmux_environment() -> dict[str, str]:
    """Our environment, as tmux gets it."""
    hidden = ("POCKETCODER_TOKEN", "POCKETCODER_RUN_ID", "TMUX", "TMUX_PANE")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    # Tmux takes default-shell from SHELL, which may be this very file.
    variables["SHELL"] = find_shell()
    return variables


def tmux_version() -> str:
    """What `tmux -V` prints; "": there is none."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["tmux", "-V"], capture_output=True, text=True, timeout=TMUX_TIMEOUT)
        return done.stdout.strip()
    return ""


def attach_command(socket_path: str, session: str) -> str:
    """What a person types to watch, whether or not there is a session yet."""
    return shlex.join(["tmux", "-S", socket_path, "new-session", "-A", "-s", session])


def has_session(socket_path: str, session: str) -> bool:
    """Whether tmux has a session of exactly this name.  Raises OSError, TimeoutExpired."""
    command = ["tmux", "-S", socket_path, "has-session", "-t", f"={session}"]
    return subprocess.run(command, capture_output=True, timeout=TMUX_TIMEOUT).returncode == 0


async def ask_socket(socket_path: str) -> None:
    """Raise NoTerminal if tmux is missing, or one at the socket does not answer soon.

    Makes nothing: whether there is a tmux does not matter.
    """
    words = ["tmux", "-S", socket_path, NO_COMMAND]
    null = subprocess.DEVNULL
    try:
        asking = await asyncio.create_subprocess_exec(*words, stdin=null, stdout=null, stderr=null)
    except FileNotFoundError:
        raise NoTerminal("tmux is not in PATH: install tmux 3.2 or later") from None
    except (OSError, RuntimeError) as refused:
        # RuntimeError: no thread.
        raise NoTerminal(f"tmux cannot be run: {refused}") from None

    ended = asyncio.ensure_future(asking.wait())
    try:
        await asyncio.wait({ended}, timeout=READY_TIMEOUT)
    finally:
        if not ended.done():
            asking.kill()

    if not ended.done():
        raise NoTerminal(f"tmux does not answer within {READY_TIMEOUT:g} s")


async def capture_pane(
    socket_path: str, pane_id: str, lines: int = 0, timeout: float = TMUX_TIMEOUT
) -> str:
    """What a pane shows, behind `lines` of what has scrolled away.  Raises NoTerminal.

    Wrapped lines are joined; blanks at the end of lines and of the text are cut.
    """
    target = ["-S", f"-{lines}", "-t", pane_id]
    text = await tmux_output(socket_path, ["capture-pane", "-p", "-J", *target], timeout)
    return "\n".join(line.rstrip() for line in text.rstrip().split("\n"))


async def tmux_output(socket_path: str, words: list[str], timeout: float = TMUX_TIMEOUT) -> str:
    """What tmux prints for a command, in a process of its own.  Raises NoTerminal."""
    # -u: whatever the locale, that is UTF-8.
    command = ["tmux", "-u", "-S", socket_path, *words]

    try:
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, timeout=timeout
        )
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as wrong:
        # RuntimeError: no thread.
        raise NoTerminal(f"tmux: {wrong}") from None

    if done.returncode:
        raise NoTerminal(f"tmux: {done.stderr.decode(errors='replace').strip()}")

    return done.stdout.decode(errors="replace")


class Picture(NamedTuple):
    """What a pane shows, as tmux described it when asked."""

    pane_id: str
    # Its place in the window and its size, in characters.
    left: int
    top: int
    width: int
    height: int
    cursor_x: int
    cursor_y: int
    has_cursor: bool
    is_active: bool
    # With escape sequences for colours.
    rows: list[str]


async def capture_pictures(socket_path: str, pane_ids: Sequence[str]) -> list[Picture]:
    """What these panes of one window show, by one process.  Raises NoTerminal."""
    words = list[str]()
    for pane_id in pane_ids:
        target = ["-t", pane_id]
        words += ["display-message", "-p", *target, PICTURE_FORMAT, ";"]
        words += ["capture-pane", "-e", "-N", "-p", *target, ";"]

    text = await tmux_output(socket_path, words[:-1])
    return read_pictures(text)


def read_pictures(text: str) -> list[Picture]:
    """What `capture_pictures` got; nothing that a pane shows can pass for anything else.

    Raises NoTerminal.
    """
    lines = text.split("\n")
    found = []
    at = 0

    while at < len(lines) - 1:
        pane_id, *fields = lines[at].split(" ")
        try:
            left, top, width, height, x, y, flag, active = map(int, fields)
        except ValueError:
            # A pane that has just gone is described by nothing.
            raise NoTerminal(f"tmux described no pane: {lines[at][:80]!a}") from None

        at += 1
        found.append(
            Picture(
                pane_id=pane_id,
                left=left,
                top=top,
                width=width,
                height=height,
                cursor_x=x,
                cursor_y=y,
                has_cursor=flag == 1,
                is_active=active == 1,
                rows=lines[at : at + height],
            )
        )
        at += height

    return found


TmuxT = TypeVar("TmuxT", bound="Tmux")


class Tmux(asyncio.SubprocessProtocol):
    """A control connection (`tmux -C`) to our session.  Raises NoTerminal.

    on_notice  called after tmux told of changes, and at the end
    """

    process: Any

    def __init__(self, session: str, on_notice: Callable[[], object]) -> None:
        self.session = session
        self.on_notice = on_notice
        self.loop = asyncio.get_running_loop()
        self.attached: asyncio.Future[list[str]] = self.loop.create_future()
        self.replies: deque[asyncio.Future[list[str]]] = deque()
        # A line that has not ended.
        self.unread = b""
        # The reply that is being read: its lines, and what stood behind `%begin`.
        self.lines = list[str]()
        self.block = ""
        # Of no use any more.
        self.closed = False
        # Its process is gone.
        self.ended = asyncio.Event()
        # How many came.  If it grew, older replies may no longer be true.
        self.notice_count = 0
        # Panes that were made with the session, if that was missing.
        self.made = list[Pane]()
        # The reply to the newest question of `check`.
        self.checked: asyncio.Future[list[str]] = self.attached

    @classmethod
    async def connect(
        cls,
        path: str,
        session: str,
        window: list[str],
        on_notice: Callable[[], object] = ignore,
    ) -> Tmux:
        """Attach to `session` at the socket `path`; make it with this `window` if it is missing."""
        check_place(path)
        self = await cls._start(path, session, window, on_notice)

        try:
            self.made = [Pane.parse(line) for line in await self.reply(self.attached)]

            # In a directory like /tmp somebody may just have made it.
            check_place(path)
        except BaseException as refused:
            self.close()
            if isinstance(refused, NoTerminal) and not self.made:
                # Tmux does not tell why.
                refused.args = (f"{refused}; is there a place, and space, for its socket {path}?",)

            raise

        self.send(["set-option", "-t", f"={session}:", "default-size", "200x50"])
        for pane in self.made:
            self.keep_name(pane)

        return self

    @classmethod
    async def _start(
        cls, path: str, session: str, window: list[str], on_notice: Callable[[], object]
    ) -> Tmux:
        words = [
            *("new-session", "-A", "-s", session, "-x", "200", "-y", "50"),
            *("-P", "-F", PANE_FORMAT, "-f", "no-output"),
            *window,
        ]
        return await cls._spawn(path, words, lambda: cls(session, on_notice))

    @staticmethod
    async def _spawn(path: str, words: list[str], make: Callable[[], TmuxT]) -> TmuxT:
        """Start a process of tmux for one that `make` makes."""
        # A `;` at the end of a word would end the command.
        words = [re.sub(r";\Z", r"\;", word) for word in words]
        # -u: whatever the locale, replies are UTF-8.
        command = ["tmux", "-u", "-S", path, "-C", *words]

        try:
            _, connection = await asyncio.get_running_loop().subprocess_exec(
                make, *command, env=tmux_environment()
            )
        except FileNotFoundError as missing:
            raise NoTerminal(f"cannot run tmux ({missing}): install tmux 3.2 or later") from None
        except (OSError, RuntimeError) as refused:
            # RuntimeError: no thread.
            raise NoTerminal(f"cannot run tmux at {path}: {refused}") from None

        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.process = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self.unread = (self.unread + data).split(b"\n")
        before = self.notice_count
        for line in lines:
            self._take_line(fd, line.decode(errors="replace"))
        if self.notice_count > before:
            self.on_notice()

    def _take_line(self, fd: int, line: str) -> None:
        word, _, rest = line.partition(" ")
        if self.block and word in ("%end", "%error") and rest == self.block:
            # Its last field: 1 if it answers a command that we sent, 0 if it answers our start.
            is_reply = rest.endswith(" 1") and bool(self.replies)
            future = self.replies.popleft() if is_reply else self.attached
            self._answer(future, word == "%error", self.lines)
            self.block = ""
        elif self.block:
            self.lines.append(line)
        elif word == "%begin":
            self.block = rest
            self.lines = []
        elif fd == 2 or word == "%exit":
            self._answer(self.attached, True, [line])
        else:
            self.notice_count += 1

    @staticmethod
    def _answer(future: asyncio.Future[list[str]], failed: bool, lines: list[str]) -> None:
        if future.done():
            return
        if not failed:
            future.set_result(lines)
            return

        said = " ".join(lines).replace(
            "failed: No space", "failed, no terminal is left (kernel.pty.max): No space"
        )
        future.set_exception(NoTerminal(f"tmux: {said}"))

        # Not every reply is waited for, and asyncio would complain.
        future.exception()

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
        """Write commands at once, so that nothing comes in between; the last one's reply."""
        futures = [self.loop.create_future() for _ in commands]
        self.replies.extend(futures)
        if self.closed:
            self._answer(futures[-1], True, ["the connection has ended"])
            return futures[-1]

        lines = list[str]()
        for words in filter(None, commands):
            line = " ".join(map(quote, words))
            lines.append(line.replace("\n", "'\"\\n\"'") + "\n")

        self.process.get_pipe_transport(0).write("".join(lines).encode())
        return futures[-1]

    async def reply(self, future: asyncio.Future[list[str]]) -> list[str]:
        """Wait for a reply, TMUX_TIMEOUT seconds at most; after that the connection is closed."""
        why = f"no answer within {TMUX_TIMEOUT:g} s"
        timer = self.loop.call_later(TMUX_TIMEOUT, self.close, why)
        try:
            return await future
        finally:
            timer.cancel()

    async def ask(self, *words: str) -> list[str]:
        """Run one command; the lines of its reply."""
        return await self.reply(self.send(list(words)))

    async def check(self) -> None:
        """Raise NoTerminal if tmux does not answer soon.

        The connection stays, unlike after `ask`; there is one question at a time.
        """
        if self.checked.done():
            self.checked = self.send([NO_COMMAND])

        # Any answer will do.
        await asyncio.wait({self.checked}, timeout=READY_TIMEOUT)
        if not self.checked.done():
            raise NoTerminal(f"tmux does not answer within {READY_TIMEOUT:g} s")

    async def panes(self) -> list[Pane]:
        """All panes of the session.  Raises ValueError if one is just going."""
        session = f"={self.session}:"
        lines = await self.ask("list-panes", "-s", "-t", session, "-F", PANE_FORMAT)
        return [Pane.parse(line) for line in lines]

    async def new_window(self, name: str, shell: list[str]) -> Pane:
        """Make a window; only a person changes its name later.  Raises ValueError."""
        place = ["-t", f"={self.session}:", "-n", name]
        pane = await self._make("new-window", *place, shell=shell)
        self.keep_name(pane)
        return pane

    async def split(self, pane: Pane, shell: list[str]) -> Pane:
        """Make one more pane beside this one.  Raises ValueError."""
        return await self._make("split-window", "-Z", "-t", pane.pane_id, shell=shell)

    async def _make(self, *words: str, shell: list[str]) -> Pane:
        return Pane.parse(*await self.ask(*words, "-d", "-P", "-F", PANE_FORMAT, *shell))

    def tile(self, pane: Pane) -> None:
        """Make room for one more pane in its window."""
        self.send(["select-layout", "-t", pane.window_id, "tiled"])

    async def respawn(self, pane: Pane, shell: list[str]) -> Pane:
        """Start a shell in a pane whose process has ended.  Raises ValueError."""
        target = ["-t", pane.pane_id]
        await self.ask("respawn-pane", "-k", *target, *shell)
        return Pane.parse(*await self.ask("display-message", "-p", *target, PANE_FORMAT))

    async def state(self, pane: Pane) -> str:
        """The pane's PANE_STATE."""
        state = " ".join(await self.ask("display-message", "-p", "-t", pane.pane_id, PANE_STATE))
        if not state[:1].isdigit():
            raise NoTerminal(f"pane {pane.pane_id} is gone")
        return state

    async def leave_modes(self, pane: Pane) -> str:
        """Leave copy mode, and type into no other pane with this one; the state then."""
        alone = ["set-option", "-w", "-t", pane.window_id, "synchronize-panes", "off"]
        self.send(alone, ["copy-mode", "-q", "-t", pane.pane_id])
        return await self.state(pane)

    def send_keys(self, pane: Pane, state: str | None, *keys: str) -> asyncio.Future[list[str]]:
        """Press keys if the pane is in this PANE_STATE still; None: whatever its state is.

        In a mode none is pressed.  The reply is empty if they were pressed, else "no".
        """
        words = " ".join(map(quote, ["send-keys", "-t", pane.pane_id, *keys]))
        is_same = (
            f"#{{&&:{NO_MODE},#{{==:{PANE_STATE},{state}}}}}" if state is not None else NO_MODE
        )
        target = ["-t", pane.pane_id]
        return self.send(
            ["if-shell", "-F", *target, is_same, words, "display-message -p no"], SECOND_REPLY
        )

    def close_pane(self, pane: Pane, state: str) -> None:
        """Close a pane that is in this state still."""
        is_same = f"#{{&&:{NO_MODE},#{{==:{PANE_STATE},{state}}}}}"
        target = ["-t", pane.pane_id]
        close = f"kill-pane -t {pane.pane_id}"
        self.send(
            ["if-shell", "-F", *target, is_same, close, "display-message -p no"], SECOND_REPLY
        )

    async def type(self, pane: Pane, text: str, keys: list[str]) -> None:
        """Type `text` as it is, then press `keys`, whatever runs there."""
        target = ["-t", pane.pane_id]
        commands = [["copy-mode", "-q", *target]]
        if text:
            codes = [f"{byte:02x}" for byte in text.encode()]
            commands.append(["send-keys", *target, "-H", *codes])
        if keys:
            commands.append(["send-keys", *target, "--", *keys])
        await self.reply(self.send(*commands))

    def keep_name(self, pane: Pane) -> None:
        """Keep programs from renaming its window."""
        rename = ["set-option", "-w", "-t", pane.window_id]
        self.send([*rename, "automatic-rename", "off"], [*rename, "allow-rename", "off"])


class OutputWatch(Tmux):
    """One more control connection, which reports that a pane of the session has printed something.

    After its first piece the pane's output is paused, until `resume`: so a flood costs little.  Its
    reader never keeps the pane waiting.
    on_output  called with the id of the pane
    """

    def __init__(
        self, session: str, on_output: Callable[[str], object], on_notice: Callable[[], object]
    ) -> None:
        super().__init__(session, on_notice)
        self.on_output = on_output
        # Panes whose output is not reported.
        self.paused: set[str] = set()

    @classmethod
    async def open(
        cls,
        path: str,
        session: str,
        on_output: Callable[[str], object],
        on_notice: Callable[[], object],
    ) -> OutputWatch:
        """Attach to a session that is there.  Raises NoTerminal."""
        words = ["attach-session", "-t", f"={session}"]
        self = await cls._spawn(path, words, lambda: cls(session, on_output, on_notice))

        try:
            await self.reply(self.attached)
        except BaseException:
            self.close()
            raise

        return self

    def _take_line(self, fd: int, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "%output":
            pane_id = rest.partition(" ")[0]
            if pane_id not in self.paused:
                self.paused.add(pane_id)
                self.send(["refresh-client", "-A", f"{pane_id}:pause"])
                self.on_output(pane_id)
        elif word not in ("%pause", "%continue"):
            super()._take_line(fd, line)

    async def resume(self, pane_ids: list[str]) -> None:
        """Report these panes again: whatever they print after this has returned."""
        paused = [pane_id for pane_id in pane_ids if pane_id in self.paused]
        self.paused.difference_update(paused)
        if paused:
            commands = [["refresh-client", "-A", f"{pane_id}:continue"] for pane_id in paused]
            await self.reply(self.send(*commands))


# ==========================================================================
# Records
# ==========================================================================
# What runs have printed, as far as it is kept.
#
# K1  The offset of a byte never changes.  What is no longer kept is a gap.
# K2  A full disk costs old output, then the middle of new output; never a command.
# K3  What a lasting record has read from a FIFO is in its files, even if the server is killed; if
#     they take it.


# What follows `SERVER.` in the names of files that end with their server: RUN.OFFSET, RUN.new.
SERVERS_FILE = re.compile(r"[0-9a-f]{16}\.(\d+|new)")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# A link in its place does not lead us anywhere.
NEW_TEXT = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW


class Piece:
    """A stretch of a record, in memory or in a file."""

    __slots__ = ("data", "path", "size", "start")

    def __init__(self, start: int, path: str | None) -> None:
        # The offset of its first byte.
        self.start = start
        self.size = 0
        # None: its bytes are in `data`.
        self.path = path
        self.data = bytearray()

    @property
    def end(self) -> int:
        """The offset behind its last byte."""
        return self.start + self.size

    def read(self, offset: int, limit: int) -> bytes:
        """Bytes from `offset` on.  Raises OSError if somebody has removed its file."""
        at = offset - self.start
        limit = min(limit, self.end - offset)
        if self.path is None:
            return bytes(self.data[at : at + limit])
        with open(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return os.pread(file.fileno(), limit, at)

    def is_there(self) -> bool:
        """Whether nobody has removed its file."""
        return self.path is None or os.path.exists(self.path)

    def add_to_memory(self, chunk: bytes) -> None:
        self.data += chunk
        self.size += len(chunk)

    def keep_end(self, limit: int) -> None:
        """Drop all but the last `limit` bytes of what is in memory."""
        surplus = max(0, self.size - limit)
        del self.data[:surplus]
        self.start += surplus
        self.size -= surplus


class Record:
    """What one run has printed, by offset: its first and last bytes, and what fits in between.

    A small record is in memory, a larger one in files `PATH.OFFSET` of at most PIECE_SIZE bytes.
    path         of its files, without the offset
    answer_size  bytes that the answer to its caller shows: the first half, and the last
    is_lasting   it outlives the server: all is in files, from the first byte on
    """

    __slots__ = (
        "end_size",
        "fd",
        "half_size",
        "is_complete",
        "is_forgotten",
        "is_lasting",
        "path",
        "pieces",
        "shelf",
        "total",
        "waiting",
    )

    def __init__(self, shelf: Shelf, path: str, answer_size: int, is_lasting: bool) -> None:
        self.shelf = shelf
        self.path = path
        self.is_lasting = is_lasting
        # Bytes of each end that the answer needs; and those that are kept where there is room.
        self.half_size = answer_size - answer_size // 2
        self.end_size = max(KEPT_END, self.half_size)
        # Bytes printed so far.
        self.total = 0
        # By offset; the last one grows.
        self.pieces: list[Piece] = []
        # The file of the last piece; None: it is in memory, or there is none.
        self.fd: int | None = None
        # Nothing more will come.
        self.is_complete = False
        # Nothing is kept any more; what comes is only counted.
        self.is_forgotten = False
        # Readers that wait for more.
        self.waiting: list[asyncio.Future[None]] = []

    def take_over(self, pieces: list[Piece]) -> None:
        """Go on with the files of a server that has gone."""
        self.pieces = pieces
        self.shelf.used += self.size()
        if not pieces:
            return

        self.total = pieces[-1].end
        # Otherwise what comes goes to a new file.
        with contextlib.suppress(OSError):
            self.fd = os.open(pieces[-1].path or "", os.O_RDWR | os.O_NOFOLLOW)

    def has_printed(self, total: int) -> None:
        """That many bytes at least, also if they are no longer kept."""
        self.total = max(self.total, total)

    # --- Writing.

    def add(self, chunk: bytes) -> None:
        """Keep what was printed."""
        if self.is_forgotten:
            pass
        elif not self.is_lasting and self.total + len(chunk) <= SMALL_OUTPUT:
            if not self.pieces:
                self.pieces.append(Piece(self.total, None))
            self.pieces[-1].add_to_memory(chunk)
            self.shelf.used += len(chunk)
        else:
            self._write(chunk)

        self.total += len(chunk)
        self.stir()

    def fill(self, fifo: int) -> int:
        """Move what a FIFO holds into the file; how many bytes, 0 at its end.

        The kernel moves them: no byte is only in our memory, where it would die with us.
        Raises BlockingIOError.
        """
        if unread_bytes(fifo) and not self.is_forgotten and self._has_room(self.total):
            assert self.fd is not None
            piece = self.pieces[-1]
            # Otherwise the file system cannot do that, or is full.
            with contextlib.suppress(OSError):
                room = PIECE_SIZE - piece.size
                count = splice(fifo, self.fd, room, piece.size)
                piece.size += count
                self.shelf.used += count
                self.total += count
                self.stir()
                return count

        chunk = os.read(fifo, CHUNK)
        self.add(chunk)
        return len(chunk)

    def _write(self, chunk: bytes) -> None:
        """Write to the last file, and to new ones; to memory where that fails."""
        start = self.total
        if self.pieces and self.fd is None and self.pieces[-1].path is None:
            # It grows out of memory, or writing failed before: try a file again.
            self._move_to_file()

        left = memoryview(chunk)
        while left:
            if not self._has_room(start + len(chunk) - len(left)):
                break

            assert self.fd is not None
            piece = self.pieces[-1]
            try:
                count = os.pwrite(self.fd, left[: PIECE_SIZE - piece.size], piece.size)
            except OSError as full:
                if full.errno in DISK_FULL and self.shelf.free_space():
                    continue
                self.shelf.complain(full)
                self._close_file()
                break

            piece.size += count
            self.shelf.used += count
            left = left[count:]

        if left:
            self._remember(start + len(chunk) - len(left), bytes(left))

    def _has_room(self, start: int) -> bool:
        """Have a file to write to; a new one has what comes from the offset `start` on."""
        if self.fd is not None and self.pieces[-1].size < PIECE_SIZE:
            self._restore()
            if os.fstat(self.fd).st_nlink:
                return True

        self._close_file()
        path = f"{self.path}.{start}"
        self.fd = self._recycle(path)
        while self.fd is None:
            try:
                self.shelf.make_room(PIECE_SIZE)
                self.fd = self.shelf.create(path)
            except OSError as full:
                if full.errno in DISK_FULL and self.shelf.free_space():
                    continue
                self.shelf.complain(full)
                return False

        self.pieces.append(Piece(start, path))
        return True

    def _recycle(self, path: str) -> int | None:
        """Drop what is neither in the first nor in the last `end_size` bytes; reuse its file.

        To overwrite a file costs a tenth of making one.  That of a lasting record must be as long
        as what it holds.
        """
        fd = None
        for piece in [*self.pieces]:
            if piece.start < self.end_size or piece.end > self.total - self.end_size:
                continue
            # Somebody has removed it.
            with contextlib.suppress(OSError):
                if fd is None and piece.path is not None and not self.is_lasting:
                    os.rename(piece.path, path)
                    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            self._drop(piece)

        return fd

    def _move_to_file(self) -> None:
        """Write the last piece, which is in memory, to a file."""
        old = self.pieces[-1]
        try:
            fd = self.shelf.create(f"{self.path}.{old.start}")
        except OSError as refused:
            self.shelf.complain(refused)
            return

        piece = Piece(old.start, f"{self.path}.{old.start}")
        try:
            while piece.size < old.size:
                piece.size += os.pwrite(fd, old.data[piece.size :], piece.size)
        except OSError as full:
            self.shelf.complain(full)
            os.close(fd)
            remove_file(f"{self.path}.{old.start}")
            return

        self.fd = fd
        self.pieces[-1] = piece

    def _remember(self, start: int, rest: bytes) -> None:
        """Keep in memory what cannot be written, as far as the answer needs it."""
        before = self.size()
        if not self.pieces:
            self.pieces.append(Piece(start, None))

        last = self.pieces[-1]
        if last.start == 0 and last.path is None:
            first_half = rest[: max(0, self.half_size - last.size)]
            last.add_to_memory(first_half)
            rest = rest[len(first_half) :]
            start += len(first_half)

        if rest:
            if last.start == 0 or last.path is not None:
                last = Piece(start, None)
                self.pieces.append(last)
            last.add_to_memory(rest)
            last.keep_end(self.half_size)

        self.shelf.used += self.size() - before

    def _restore(self) -> None:
        """Make the last file again if somebody has removed it: while it is open, it can be read."""
        if self.fd is None or os.fstat(self.fd).st_nlink:
            return

        piece = self.pieces[-1]
        assert piece.path is not None
        try:
            fd = self.shelf.create(piece.path)
        except OSError as refused:
            self.shelf.complain(refused)
            return

        at = 0
        try:
            while at < piece.size:
                at += os.sendfile(fd, self.fd, at, piece.size - at)
        except OSError as full:
            self.shelf.complain(full)
            os.close(fd)
            remove_file(piece.path)
            return

        self._close_file()
        self.fd = fd

    def _close_file(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def hand_over(self) -> None:
        """Open no file: the server stops, and what lasts is for the next one."""
        self._close_file()

    def finish(self) -> None:
        """Nothing more comes."""
        self.is_complete = True
        self.stir()

    def close_file(self) -> None:
        """Its caller is answered: until then nobody can remove the end of its output."""
        if self.is_complete:
            self._restore()
            self._close_file()

    # --- Dropping.

    def spare(self) -> list[Piece]:
        """The pieces that its answer does not need, by offset."""
        half = self.half_size
        return [
            piece
            for piece in self.pieces[:-1]
            if piece.start >= half and piece.end <= self.total - half
        ]

    def give_up_one(self) -> bool:
        """Drop a piece from the middle; False: the answer needs all of them."""
        spare = self.spare()
        if not spare:
            return False
        self._drop(spare[len(spare) // 2])
        return True

    def give_up_middle(self) -> bool:
        """Drop the piece in the middle; False: there are but two ends."""
        if len(self.pieces) < 3:
            return False
        self._drop(self.pieces[len(self.pieces) // 2])
        return True

    def _drop(self, piece: Piece) -> None:
        self.pieces.remove(piece)
        self.shelf.used -= piece.size
        if piece.path is not None:
            remove_file(piece.path)

    def drop(self) -> None:
        """Keep nothing of it."""
        self._close_file()
        for piece in [*self.pieces]:
            self._drop(piece)

    def forget(self) -> None:
        """Keep nothing of it, also of what is still to come."""
        self.is_forgotten = True
        self.drop()
        self.stir()

    def size(self) -> int:
        """Bytes that are kept."""
        return sum(piece.size for piece in self.pieces)

    # --- Reading.

    def read(self, offset: int, limit: int) -> tuple[int, bytes]:
        """Up to `limit` bytes from `offset` on, and the offset of the first: gaps are skipped.

        No bytes: there are none behind that yet.
        """
        self._restore()
        for piece in self.pieces:
            if piece.end <= offset:
                continue
            start = max(offset, piece.start)
            # Its file is gone: a gap.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return start, piece.read(start, limit)

        return self.total, b""

    async def change(self) -> None:
        """Wait until something was added, or `stir` is called."""
        waiter = asyncio.get_running_loop().create_future()
        self.waiting.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self.waiting:
                self.waiting.remove(waiter)

    async def changed_within(self, seconds: float) -> None:
        """The same, `seconds` at most."""
        change = asyncio.ensure_future(self.change())
        try:
            await asyncio.wait({change}, timeout=seconds)
        finally:
            change.cancel()

    def boundary(self, end: int) -> int:
        """The end of the last whole character before `end`."""
        start, chunk = self.read(max(0, end - 4), 4)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(chunk[: max(0, end - start)])
        return end - len(decoder.getstate()[0])

    def stir(self) -> None:
        """Let its readers look again."""
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_result(None)
        self.waiting.clear()

    def text(self, limit: int, end: int, start: int = 0) -> Iterator[str]:
        """The bytes from `start` to `end` as text, in pieces of some 64 KiB.

        If they are more than `limit`, only the first and the last half.  A line stands for what is
        left out, or is no longer kept, and says how much that is.  Never half a character.
        """
        wanted = [(start, end)]
        if end - start > limit:
            half = limit // 2
            wanted = [(start, start + half), (end - (limit - half), end)]

        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Behind what was read last.
        behind = start
        newline = "\n"
        for first, last in wanted:
            at = first
            while at < last:
                found, chunk = self.read(at, min(last - at, TEXT_PIECE))
                chunk = chunk[: max(0, last - found)]
                if not chunk:
                    break

                at = found + len(chunk)
                if found != behind:
                    # The start of a character, and the rest of another one.
                    cut = len(decoder.getstate()[0])
                    decoder.reset()
                    chunk = re.sub(rb"\A[\x80-\xbf]{1,3}", b"", chunk)
                    yield f"{newline}{left_out(at - len(chunk) - behind + cut)}"

                behind = at
                text = decoder.decode(chunk)
                newline = "" if text.endswith("\n") else "\n"
                yield text

        if behind < end:
            yield f"{newline}{left_out(end - behind + len(decoder.getstate()[0]))}"
        else:
            yield decoder.decode(b"", True)

    def is_whole(self, limit: int, end: int, start: int = 0) -> bool:
        """Whether `text` leaves out nothing."""
        at = start
        for piece in self.pieces:
            if piece.start <= at and piece.is_there():
                at = max(at, piece.end)
        return end - start <= limit and at >= end


def left_out(count: int) -> str:
    """The line that stands for so many bytes."""
    return f"[pocketcoder: {count} bytes left out]\n"


def splice(fifo: int, fd: int, limit: int, offset: int) -> int:
    """Move bytes from a FIFO to a file, splice(2).  Raises OSError."""
    return os.splice(fifo, fd, limit, offset_dst=offset)


def remove_file(path: str) -> None:
    """Remove a file, if it is still there and can be."""
    with contextlib.suppress(OSError):
        os.unlink(path)


class Shelf:
    """The directory with the files of records, and the room that all of them have together.

    folder  made when it is needed, of mode 0700
    limit   bytes, of what is in memory too
    socket  the path of the socket that its runs belong to: those of others are left alone
    Files: SERVER.lock, locked while its server lives; SERVER.RUN.OFFSET of runs that end with it;
    RUN.OFFSET and RUN.json of lasting ones, SERVER.RUN.new while that is written.
    """

    def __init__(self, folder: str, limit: int, socket: str) -> None:
        self.folder = folder
        self.limit = limit
        self.socket = socket
        # Bytes that all records keep.
        self.used = 0
        # Of runs that have ended, the oldest first: these go when there is no room.
        self.ended: dict[Record, None] = {}
        # Those that still grow.
        self.growing: dict[Record, None] = {}
        # The name of this server among those that share the directory.
        self.server_id = secrets.token_hex(8)
        # None: the directory is not open yet.
        self.lock: int | None = None
        self.complained_at = -math.inf

    def record(self, run_id: str, answer_size: int, is_lasting: bool) -> Record:
        """A record for a run that starts."""
        name = run_id if is_lasting else f"{self.server_id}.{run_id}"
        record = Record(self, f"{self.folder}/{name}", answer_size, is_lasting)
        self.growing[record] = None
        return record

    def retire(self, record: Record) -> None:
        """Its run has ended, and its caller is answered."""
        record.close_file()
        self.ended[record] = None
        self.make_room(0)

    def stopped_growing(self, record: Record) -> None:
        self.growing.pop(record, None)

    def forget(self, record: Record) -> None:
        self.ended.pop(record, None)
        self.growing.pop(record, None)
        record.forget()

    # --- Room.

    def make_room(self, size: int) -> None:
        """Drop old output, then the middle of new output, until there is room.

        What the answers of running commands need stays in any case.
        """
        while self.used + size > self.limit and self.free_space():
            pass

    def free_space(self) -> bool:
        """Drop the oldest output, or a piece of new output; False: all that is left is needed."""
        while self.ended:
            oldest = next(iter(self.ended))
            # Of the newest one as much as has room is kept.
            if len(self.ended) == 1 and oldest.give_up_middle():
                return True

            del self.ended[oldest]
            had_size = oldest.size()
            oldest.drop()
            if had_size:
                return True

        largest = max(self.growing, key=lambda record: len(record.spare()), default=None)
        return largest is not None and largest.give_up_one()

    def complain(self, refused: OSError) -> None:
        """Log, once in a while, that output cannot be written."""
        now = time.monotonic()
        if now > self.complained_at + COMPLAINT_PAUSE:
            self.complained_at = now
            log.warning("runs dir=%s: output is not kept: %s", self.folder, refused)

    # --- The directory.

    def open(self) -> None:
        """Make the directory, and our lock in it.  Raises OSError."""
        if self.lock is not None:
            if os.fstat(self.lock).st_nlink:
                return
            # Somebody has wiped it.
            self._unlock()

        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        found = self._found_folder()
        if found.st_mode & 0o077:
            os.chmod(self.folder, 0o700)

        lock = os.open(
            f"{self.folder}/{self.server_id}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(lock, os.fsencode(self.socket), 0)
        except OSError:
            os.close(lock)
            raise

        self.lock = lock

    def _found_folder(self) -> os.stat_result:
        """The directory.  Raises OSError if it belongs to another user, or is no directory."""
        found = os.lstat(self.folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "expected a directory of our own", self.folder)
        return found

    def check(self) -> None:
        """Raise OSError if nothing could be written now.  Makes nothing."""
        if os.path.lexists(self.folder):
            self._found_folder()
        try_folder(nearest_folder(self.folder))

    def create(self, path: str) -> int:
        """A new file.  Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        if self.lock is None:
            self.open()
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            # Somebody has wiped the directory.
            self.open()
            return os.open(path, flags, 0o600)

    def save(self, run_id: str, facts: Message) -> None:
        """Write what is known of a lasting run.  Raises OSError."""
        self.open()
        text = json.dumps({**facts, "server": self.server_id})
        new = f"{self.folder}/{self.server_id}.{run_id}.new"
        with open(os.open(new, NEW_TEXT, 0o600), "w") as file:
            file.write(text)
        os.rename(new, f"{self.folder}/{run_id}.json")

    def remove(self, run_id: str) -> None:
        """Forget what `save` wrote."""
        remove_file(f"{self.folder}/{run_id}.json")

    def take_over(self) -> list[tuple[Message, Record]]:
        """Make ours, and return, what servers that have gone have left of lasting runs.

        Raises OSError.
        """
        if not os.path.isdir(self.folder):
            return []

        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._wait_for_others(folder)
            self.open()
            names = os.listdir(self.folder)
            left_alone = self._sweep(names)
            pieces = self._pieces(names)
            found = list[tuple[Message, Record]]()
            for name in names:
                run_id, _, suffix = name.partition(".")
                facts = self._load(name) if suffix == "json" else None
                if facts and facts["socket"] == self.socket and facts["server"] not in left_alone:
                    record = self._record_of(run_id, facts, pieces.get(run_id, []))
                    found.append((facts, record))
                    with contextlib.suppress(OSError):
                        self.save(run_id, facts)

            return found
        finally:
            os.close(folder)

    @staticmethod
    def _wait_for_others(folder: int) -> None:
        """Lock the directory: another server may be starting as well.  Raises BlockingIOError."""
        deadline = time.monotonic() + ADOPT_TIMEOUT
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_PAUSE)

    def _sweep(self, names: list[str]) -> set[str]:
        """Remove what ended with its server.

        Return the servers whose files are left alone: they live, or have another socket.
        """
        left_alone = {self.server_id}
        with contextlib.ExitStack() as opened:
            for name in names:
                server_id, _, suffix = name.partition(".")
                if suffix != "lock" or server_id == self.server_id:
                    continue
                left_alone.add(server_id)
                # It has just gone, or is another user's.
                with contextlib.suppress(OSError):
                    lock = os.open(f"{self.folder}/{name}", os.O_RDWR | os.O_NOFOLLOW)
                    opened.callback(os.close, lock)
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.pread(lock, MAX_PATH, 0) == os.fsencode(self.socket):
                        left_alone.remove(server_id)
                        remove_file(f"{self.folder}/{name}")

            for name in names:
                server_id, _, rest = name.partition(".")
                if SERVERS_FILE.fullmatch(rest) and server_id not in left_alone:
                    remove_file(f"{self.folder}/{name}")

        return left_alone

    def _pieces(self, names: list[str]) -> dict[str, list[Piece]]:
        """The files of lasting records, by run."""
        found = dict[str, list[Piece]]()
        for name in names:
            run_id, _, offset = name.partition(".")
            if not offset.isdecimal():
                continue
            path = f"{self.folder}/{name}"
            piece = Piece(int(offset), path)
            with contextlib.suppress(OSError):
                piece.size = os.lstat(path).st_size
            found.setdefault(run_id, []).append(piece)

        return found

    def _load(self, name: str) -> Message | None:
        """What was saved of a run; None, and a line in the log, if that is damaged."""
        path = f"{self.folder}/{name}"
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
                facts = json.loads(file.read(MAX_SAVED))
            if not isinstance(facts, dict):
                raise ValueError("expected an object")
            for key in ("server", "socket", "run_id"):
                if not isinstance(facts.get(key), str):
                    raise ValueError(f"expected a text as {key}")
            if f"{facts['run_id']}.json" != name:
                raise ValueError(f"expected the run of its name, got {facts['run_id']!r}")
        except (OSError, ValueError, RecursionError) as damage:
            log.warning("runs skipped=%s: %s", path, damage)
            return None

        return facts

    def _record_of(self, run_id: str, facts: Message, pieces: list[Piece]) -> Record:
        """The record whose files another server has written."""
        answer_size = facts.get("max_output")
        if type(answer_size) is not int or not 1 <= answer_size <= MAX_OUTPUT:
            answer_size = DEFAULT_OUTPUT
        record = self.record(run_id, answer_size, True)
        pieces.sort(key=lambda piece: piece.start)
        record.take_over(pieces)
        return record

    def close(self) -> None:
        """Give up the lock: what lasts is for the next server."""
        for record in [*self.growing]:
            record.hand_over()
        self._unlock()

    def _unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


# ==========================================================================
# Streams
# ==========================================================================
# What goes in and out of a command.
#
# J1  Output is read as it comes; a slow reader slows its own command only.
# J2  What a person sees is best effort: it delays the next command by 0.2 s at most.

# Takes what a stream brings; what it returns is awaited before more is read.
Take = Callable[[bytes], "Awaitable[None] | None"]
# By the name of the stream: `out` for both, or `out` and `err`.
Takes = Mapping[str, Take]
# Both outputs in one stream, for the record and nobody else.
RECORD_ONLY: Takes = {"out": ignore}
USUAL_PIPE = 64 * KIB  # bytes that a pipe holds unless it is widened, pipe(7)
# Ends at a line from descriptor 0.  If that pipe ends instead, we have gone: then it discards what
# comes from descriptor 1, which is the FIFO.  In the background, so that its parent ends at once:
# we need not wait for it.
KEEPER = "exec 3<&0 4<&1 >/dev/null; (read -r _ <&3 || exec cat <&4) &"
# The same for a run that outlives us: it holds what is in the FIFO, until the next server, which
# has read it, writes a line to the FIFO at descriptor 2.
HOLDER = "exec 3<&0; (read -r _ <&3 || read -r _ <&2) &"


class Pipe:
    """Our end of a FIFO, or a terminal.

    on_close  called once, after it was closed
    """

    def __init__(self, path: str, flags: int, on_close: Callable[[], object] = ignore) -> None:
        self.loop = asyncio.get_running_loop()
        self.path = path
        self.on_close = on_close
        # -1: it is closed.
        self.fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)

        if not stat.S_ISFIFO(os.fstat(self.fd).st_mode) and not os.isatty(self.fd):
            self.close()
            raise OSError(
                f"{path}: expected a FIFO or a terminal: somebody has put something else there"
            )

    def widen(self) -> None:
        """Let it hold more, as far as the system allows."""
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, CHUNK)

    def close(self) -> None:
        if self.fd < 0:
            return

        self.loop.remove_reader(self.fd)
        self.loop.remove_writer(self.fd)
        os.close(self.fd)
        self.fd = -1

        # Break the cycle: the callback refers to our owner.
        on_close = self.on_close
        self.on_close = ignore
        on_close()


class Output(Pipe):
    """What a run writes: recorded; and handed to `take` until the run is over.

    record  None: it is discarded
    An awaitable that `take` returns stops the reading until it is done: back-pressure.
    When the run is over, what still comes is only recorded, and read slowly.
    At the end of the file, when nothing of the run can write any more, it closes itself.
    """

    # Our end of the pipe that the keeper waits at, see `keep`.
    lifeline = -1
    # A keeper may read this FIFO for a moment after its end: no later run may use it.
    has_keeper = False

    def __init__(
        self,
        path: str,
        record: Record | None,
        take: Take | None,
        on_close: Callable[[], object] = ignore,
    ) -> None:
        super().__init__(path, os.O_RDONLY, on_close)
        self.record = record
        self.take = take
        # Until it is done, `take` works at the newest chunks.
        self.taking: asyncio.Future[None] | None = None
        self._resume()

    def _resume(self) -> None:
        if self.fd >= 0:
            self.loop.add_reader(self.fd, self.read)

    def is_paused(self) -> bool:
        """Whether its reader is slower than the command."""
        return self.taking is not None and not self.taking.done()

    def hand_over(self) -> None:
        """Close without calling `on_close`: its files stay, and its keeper takes over."""
        self.on_close = ignore
        self._drop_lifeline()
        self.close()

    def check_descriptors_left(self) -> None:
        """Raise OSError if too few are: this is the newest."""
        check_descriptor(self.fd)

    def read(self) -> None:
        try:
            chunk = self._read_chunk()
        except BlockingIOError:
            return

        if not chunk:
            self.close()
            return
        if self.take is None:
            # A background process may keep writing: read that slowly.
            self._pause()
            return

        if len(chunk) == USUAL_PIPE:
            self.widen()

        wait = self.take(chunk)
        if wait is not None:
            self.loop.remove_reader(self.fd)
            self.taking = asyncio.ensure_future(self._wait(self.taking, wait))

    def _read_chunk(self) -> bytes:
        """Read and record what there is; nothing at the end.  Raises BlockingIOError."""
        record = self.record
        if record is not None and record.is_lasting:
            start = record.total
            count = record.fill(self.fd)
            _, chunk = record.read(start, count)
            if count and not chunk:
                # None of it could be kept.  Zeros stand for it: this is not the end.
                return bytes(count)

            return chunk

        chunk = os.read(self.fd, CHUNK)
        if record is not None and chunk:
            record.add(chunk)
        return chunk

    def _pause(self) -> None:
        self.loop.remove_reader(self.fd)
        self.loop.call_later(DRAIN_PAUSE, self._resume)

    async def _wait(self, *steps: Awaitable[None] | None) -> None:
        try:
            # OSError: the reader has left.
            with contextlib.suppress(OSError):
                for each in filter(None, steps):
                    await each
        finally:
            self._resume()

    def read_rest(self) -> None:
        """Take what is in the pipe; close at its end.  A pipe holds no more than CHUNK bytes."""
        if self.fd >= 0:
            self.read()
        # If that was all, this finds the end.
        if self.fd >= 0:
            self.read()

    def finish(self) -> None:
        """The run is over: what others still write is only recorded."""
        if self.take is None:
            return
        self.take = None
        if self.fd >= 0:
            self._resume()
            self.keep()

    def keep(self) -> None:
        """Have a process hold the FIFO open when ours has gone, so that no writer gets SIGPIPE.

        It waits for the end of a pipe that only we hold.  When we are killed, it discards what
        comes until no writer is left; for a lasting run, it leaves that to the next server.
        """
        if self.fd < 0 or self.has_keeper:
            return

        self.has_keeper = True
        try:
            with contextlib.ExitStack() as opened:
                self._start_keeper(opened)
        except (OSError, ProxyError, subprocess.TimeoutExpired) as failure:
            log.warning(
                "%s: nothing would read it if this process were killed: %s", self.path, failure
            )

    def _start_keeper(self, opened: contextlib.ExitStack) -> None:
        """Start it.  Raises OSError, ProxyError, subprocess.TimeoutExpired.

        opened  closes our copies of what it gets
        """
        # O_NONBLOCK: the last writer may just have gone.
        fifo = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        opened.callback(os.close, fifo)
        os.set_blocking(fifo, True)

        theirs, self.lifeline = os.pipe()
        opened.callback(os.close, theirs)

        script = KEEPER
        messages = subprocess.DEVNULL
        if self.record is not None and self.record.is_lasting:
            script = HOLDER
            done = f"{self.path.rpartition('.')[0]}.done"
            messages = os.open(done, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
            opened.callback(os.close, messages)
            os.set_blocking(messages, True)

        subprocess.run(
            [find_shell(), "-c", script],
            stdin=theirs,
            stdout=fifo,
            stderr=messages,
            cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,
            timeout=KEEPER_TIMEOUT,
        )

    def close(self) -> None:
        super().close()
        if self.lifeline >= 0:
            # OSError: its keeper has gone.
            with contextlib.suppress(OSError):
                os.write(self.lifeline, b"\n")
            self._drop_lifeline()

    def _drop_lifeline(self) -> None:
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1


class Input(Pipe):
    """What a run reads: its stdin, as it comes."""

    # Lets in whoever opens it by name after its end.
    opening: asyncio.TimerHandle | None = None

    def __init__(self, path: str) -> None:
        os.mkfifo(path, 0o600)
        self.room = asyncio.Event()
        # Not O_WRONLY: go need not wait for a writer.
        super().__init__(path, os.O_RDWR, self.room.set)

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

    def finish(self) -> None:
        """No more comes: let the command meet the end, until `close`."""
        super().close()
        self._let_in(OPEN_PAUSE)

    def _let_in(self, pause: float) -> None:
        """Be a writer for a moment.

        A FIFO that is opened by name (`/dev/stdin`) waits for one, and an anonymous pipe does not.
        """
        # OSError: no process has it open.
        with contextlib.suppress(OSError):
            os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW))
        longer = min(2 * pause, MAX_OPEN_PAUSE)
        self.opening = self.loop.call_later(pause, self._let_in, longer)

    def close(self) -> None:
        super().close()
        if self.opening is not None:
            self.opening.cancel()


# Colours and movements pass; what else a terminal does on request is not for a command.
UNSAFE = re.compile(rb"[\0-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\x1b(?!\[[0-9;:]*[A-HJKSTfm])")


def shown_command(command: str) -> str:
    """A command as a person sees it: cut, and without escape sequences."""
    shown = command[:MAX_VIEW_COMMAND]
    if len(command) > MAX_VIEW_COMMAND:
        shown += "…"
    safe = UNSAFE.sub(b"", shown.encode(errors="replace"))
    return safe.replace(b"\x1b", b"").decode()


def replacing(line: str, command: str, column: int, width: int, extra_rows: int) -> str:
    """What replaces a typed line by the command, behind the prompt that ends at `column`.

    extra_rows  above that prompt, to be replaced too
    """
    rows = 1 + (column + len(line)) // max(1, width) + extra_rows
    # Up to the line's start, right to its column, clear to the end.
    return f"\x1b[{rows}A\x1b[{column + 1}G\x1b[J{shown_command(command)}\n"


class View(Pipe):
    """A run's output copied to the pane's tty for a person, as far as that takes it.

    The command stands there already, see `replacing`: go writes it, before anything that the
    command writes to its terminal by itself.
    """

    def __init__(self, pane: Pane, command: str) -> None:
        super().__init__(pane.tty, os.O_WRONLY)
        self.command = shown_command(command)
        # Bytes of output so far; the end of what was shown of it.
        self.seen = 0
        self.tail = b""
        self.unwritten = bytearray()

    def write(self) -> None:
        """Show what there is, as far as the terminal takes it."""
        # It is full, or gone.
        with contextlib.suppress(OSError):
            del self.unwritten[: os.write(self.fd, self.unwritten)]

    def add(self, chunk: bytes) -> None:
        shown = UNSAFE.sub(b"", chunk[: max(0, MAX_VIEW - self.seen)])
        self.seen += len(chunk)
        if shown:
            self.tail = (self.tail + shown[-MAX_LINE:])[-2 * MAX_LINE :]
            self.unwritten += shown
            self.write()

    def has_shown(self, line: str) -> bool:
        """Whether a line of the terminal is the command, or part of its output."""
        seen = self._without_layout(line)
        if seen in self._without_layout(self.tail.decode(errors="replace")):
            return True

        command = self._without_layout(self.command.rpartition("\n")[2])
        return not self.tail and seen.endswith(command)

    @staticmethod
    def _without_layout(shown: str) -> str:
        """Without blanks and colours, which a terminal shows in its own way."""
        return re.sub(r"\x1b\[[0-9;:]*[A-Za-z]|\s+", "", shown)

    async def end(self, exit_code: int) -> None:
        """Mark the end, and wait a moment until all is on the terminal."""
        text = ""
        if self.tail and not self.tail.endswith(b"\n"):
            text += "\n"
        if self.seen > MAX_VIEW:
            text += f"[pocketcoder: {self.seen - MAX_VIEW} more bytes not shown here]\n"
        if exit_code != 0:
            text += f"[exit {exit_code}]\n"

        self.unwritten += text.encode()
        for _ in range(VIEW_TRIES):
            self.write()
            if not self.unwritten:
                break

            await asyncio.sleep(VIEW_PAUSE)

        self.close()


# ==========================================================================
# Run files
# ==========================================================================
# The script that a pane's shell sources, the FIFOs through which it speaks, and their directory.
#
# F1  A line that was given up never starts: RUN.pid is made once, by go or by us.
# F2  Go waits a few seconds at most for a server that has gone.  A shell in the background holds
#     the output of a lasting run until a server has read it.
# F3  What a run that ended still has open is used by no later run.
#
# A run has its own.
OWN_FILES = ("in", "cmd")
# They stay for the next run with that number.
FIFOS = ("done", "out", "err")
ALL_FILES = (*OWN_FILES, *FIFOS, "pid", "go")
# Of the directory of a driver.
FOLDER_NAME = re.compile(r"[0-9a-f]{4}")
# No O_TRUNC, which would cost a write to the disk: see GO.  No link or FIFO in its place may stop
# us.
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
# A report of go; others may write anything there.
REPORT = re.compile(rb"([0-9a-f]{16}) (start|exit|back) ([0-9]{1,9})\n")
# Variables that are set for a command, whatever its caller says.
OURS = tuple(f"POCKETCODER_{name}" for name in ("RUN_ID", "AGENT", "SESSION_ID", "USAGE_ID"))
QUIET = " ".join(f"{name}={value}" for name, value in QUIET_PROGRAMS.items())
# Of these options, and `c`, bash never complains.
SURE_OPTIONS = "abcefhiklmnptuvxBCEHPT"
# A command that is too long for an argument.
READ_COMMAND = 'eval "exec 8<&-; $(cat <&8 || echo exit 125)"'
# By stream: the command's descriptor, and the one that go holds around it.  Of its others 9 is
# `status`, and 8 is `done`; in the subshell 8 is `cmd`, if there is one, or closed.
DESCRIPTORS = {"out": (1, 7), "err": (2, 6)}
# Keeps our lines out of the history of a shell that we start.  By the unusual order go knows that
# it is ours, and does not hand it on to commands.
HISTORY = "ignorespace:ignoredups"
# Sourced by the pane's shell, which is done with it before the next run overwrites this file.  The
# end of an older, longer script may still stand behind this one: `return` comes before that.  Line
# by line:
#
#   status, pid     leave if the FIFO for reports was wiped, or if this run has started before:
#                   RUN.pid stays until the next run with that number is prepared, so that a line
#                   that a person recalls from the history does nothing
#   trap            a command that dies of C-c would take go along
#   unset, HIST…    what is not for commands; functions that would replace what is used below
#   _pc, set -C     claim the run: only one shell can make RUN.pid
#   inputs, header  open stdin; show the command to a person, before it can write to its terminal
#   outputs, are_fifos  open them, write-only; where a FIFO was wiped, that makes a file: leave then
#   start           report the pid, which is the process group as well
#   cd, export, exec   become the command
#   end             END_WITH_SERVER or END_FOR_NEXT; `}}` there closes the `{{` behind `trap`
#   read            let the server show the end first; a shell that knows no `-t` does not wait.  A
#                   lasting run waits once more before that: until its output is recorded
#   back            report the return: the prompt comes
#
# `_pc` is the pid of the command, and its exit code once it has ended.  What `read` puts there
# means nothing.
#
# Backslashes keep aliases out.  Outside the subshell a person's functions stay in force: no exec
# and no echo there.  `&&` keeps `set -e` out.
# Descriptors 6 and 7 keep a reader and a writer of the outputs open around the command, and only
# there: so opening never waits for a server that has gone, a command whose server is killed gets no
# SIGPIPE, and at the exit report the server sees the end of the output if no writer is left.  Of a
# lasting run they stay open longer: see END_FOR_NEXT.
GO = r"""{{ \[ -p {status} ] || \return 0
\[ -e {run}.pid ] && \return 0
\trap : INT
{{ (
\unset -f cd chpwd echo exec exit export printf read set 2>/dev/null
\unset chpwd_functions POCKETCODER_TOKEN TMUX TMUX_PANE TERM_PROGRAM TERM_PROGRAM_VERSION
[ "${{HISTCONTROL-}}" != {history} ] || \unset HISTCONTROL
_pc=${{BASHPID-}}; [ "$_pc" ] || \read -r _pc _pd </proc/self/stat
\set +xv -C; \echo "$_pc" >{run}.pid || \exit
\set +C; \exec {inputs} || \exit
\printf %s {header}
\exec {outputs} 3>&- 4>&- 5>&- 6>&- 7>&-; {are_fifos} || \exit
\echo "{token} start $_pc" >&9
\cd -- {cwd} || \exit; \unset OLDPWD
\export {quiet} {pwd} POCKETCODER_RUN_ID={run_id} POCKETCODER_AGENT={agent}
\export POCKETCODER_SESSION_ID={session} POCKETCODER_USAGE_ID={usage}
\exec {command} 9>&-
) && _pc=0 || _pc=$?
{end}
\[ -d /proc/{server} ] && \read -r -t {patience} _pc <&8 2>/dev/null || :
\printf '%s\n' "{token} back 0" >&9
\trap - INT; \unset _pc; \return 0; }} 8<>{run}.done 9<>{status} || \return 0
"""


# If the server has gone, `cat` reads what background processes write later.  In any case the exit
# code is then noted, for a server that starts later, and reported.
END_WITH_SERVER = r"""\[ -d /proc/{server} ] || ({drains})
}} {held}
\printf '%s\n' "${{_pc:-1}}" >>{run}.pid
\printf '%s\n' "{token} exit ${{_pc:-1}}" >&9"""
# Of a run that outlives its server: the outputs stay open until the server has read and recorded
# what is in them.  If it has gone, or is slow, a shell in the background waits for the next one,
# unless the files were wiped: no server would find them.
END_FOR_NEXT = r"""\printf '%s\n' "${{_pc:-1}}" >>{run}.pid
\printf '%s\n' "{token} exit ${{_pc:-1}}" >&9
\[ -d /proc/{server} ] && \read -r -t {patience} _pc <&8 2>/dev/null ||
\[ ! -p {run}.done ] || (\read -r _pc <&8 &)
}} {held}"""


def remove_files(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether they are gone: a file system may have become read-only."""
    gone = True
    for suffix in suffixes:
        try:
            os.unlink(f"{path}.{suffix}")
        except FileNotFoundError:
            pass
        except OSError:
            gone = False

    return gone


def remove_folder(folder: str) -> None:
    """Remove a directory and its files.  What else somebody made in it stays, with it."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                os.unlink(f"{folder}/{name}")
        os.rmdir(folder)


class RunFiles:
    """The files of one run: `path` with suffixes, see "Files of a run" at the top.

    on_report  called with what go reports: `start`, `exit` or `back`, and a number
    on_closed  called when the last output has closed itself: no writer is left
    """

    def __init__(
        self,
        folder: LockedFolder,
        path: str,
        token: str,
        on_report: Callable[[str, int], object],
        on_closed: Callable[[], object],
    ) -> None:
        self.folder = folder
        self.path = path
        # Marks its reports.
        self.token = token
        self.on_report = on_report
        self.on_closed = on_closed
        self.outputs: list[Output] = []
        self.feed: Input | None = None
        # No run needs them any more.
        self.released = False
        # Then the next one can have the names.
        self.reusable = False

    def open(self, record: Record, takes: Takes, fed: bool) -> None:
        """Open our ends, before the line is typed: a FIFO that nobody has open keeps no data.

        Raises OSError.
        """
        for name, take in takes.items():
            path = f"{self.path}.{name}"
            self.outputs.append(Output(path, record, take, self._on_output_closed))
        self.outputs[-1].check_descriptors_left()
        if fed:
            self.feed = Input(f"{self.path}.in")

    def write(self, texts: Mapping[str, str]) -> None:
        """Write `go` and what it reads.  From then on it can start, once.  Raises OSError."""
        for suffix, text in texts.items():
            with open(os.open(f"{self.path}.{suffix}", NEW_FILE, 0o600), "wb") as file:
                file.write(text.encode(errors="surrogateescape"))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}.pid")

    def line(self) -> str:
        """What is typed: the blank keeps it out of most histories, the backslash from aliases."""
        return f" \\. {shlex.quote(self.path)}.go"

    def void(self) -> bool:
        """Make sure that it never starts; False: it already has, or we cannot know."""
        try:
            os.close(os.open(f"{self.path}.pid", os.O_CREAT | os.O_EXCL, 0o600))
        except (FileNotFoundError, NotADirectoryError):
            # Wiped: go cannot make it either.
            return True
        except OSError:
            # Go has made it, or we have no descriptor.
            return False

        return True

    def let_return(self, waiters: int = 1) -> None:
        """Go, or a shell in the background, need not wait for us any more."""
        with contextlib.suppress(OSError):
            done = Pipe(f"{self.path}.done", os.O_WRONLY)
            with contextlib.closing(done):
                os.write(done.fd, b"\n" * waiters)

    def streams(self) -> list[str]:
        """The names of its outputs."""
        return [output.path.rpartition(".")[2] for output in self.outputs]

    def is_open(self) -> bool:
        """Whether somebody may still write."""
        return any(output.fd >= 0 for output in self.outputs)

    def is_paused(self) -> bool:
        """Whether a reader is slower than the command."""
        return any(output.is_paused() for output in self.outputs)

    def read_rest(self) -> bool:
        """Take what is there; whether that was the end of it."""
        for output in self.outputs:
            output.read_rest()
        return not self.is_open()

    def keep(self) -> None:
        """Something still writes: let it go on if we are killed."""
        for output in self.outputs:
            output.keep()

    def finish(self) -> None:
        """The run is over: what others still write is only recorded."""
        for output in self.outputs:
            output.finish()

    def release(self, has_run: bool, was_typed: bool, reusable: bool) -> None:
        """No run needs them any more; they go when no writer is left.

        reusable  go has read them to its end, and nothing of the run is being ended
        """
        self.released = True
        self.reusable = reusable
        if self.feed:
            self.feed.close()

        if not was_typed:
            # Go cannot have seen these files, and we cannot trust what is there now.
            remove_files(self.path, ALL_FILES)
            self.reusable = False

        for output in self.outputs:
            # Before its start no process has opened it to write.
            if has_run:
                output.finish()
            else:
                output.close()

        self._give_back()

    def _on_output_closed(self) -> None:
        if self.is_open():
            return
        # `_give_back` lets go of it.
        on_closed = self.on_closed
        self._give_back()
        on_closed()

    def _give_back(self) -> None:
        if self.released and not self.is_open():
            self.on_closed = ignore
            self.folder.give_back(self)

    def abandon(self) -> None:
        """Leave what is still written to: the next driver here reads it."""
        for output in self.outputs:
            output.hand_over()


def check_own(folder: str) -> None:
    """Refuse a directory that another user may write to.  Raises NoTerminal, OSError."""
    found = os.lstat(folder)
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_ours or found.st_mode & 0o022:
        raise NoTerminal(
            f"{folder}: expected a directory that only we may write to; remove what is there"
        )


class LockedFolder:
    """The directory of a driver's runs: `SOCKET.d/DRIVER`, while we hold its lock.

    `status` is a FIFO for the reports of all runs, lines of token, word, number.  A run has the
    files `SOCKET.d/DRIVER/RUN.*`.
    """

    def __init__(self, base: str, path: str, lock: int, pane_user: int) -> None:
        """Raises OSError: `status` is not there, or no FIFO."""
        self.base = base
        self.path = path
        self.lock = lock
        # The user who owns the panes.
        self.pane_user = pane_user
        self.status_path = f"{path}/status"
        self.status = Pipe(self.status_path, os.O_RDWR)
        self.status.loop.add_reader(self.status.fd, self.on_status)
        # A report that has not ended.
        self.unread = b""
        # Those of runs that somebody may still write to, by token.
        self.runs: dict[str, RunFiles] = {}
        # What works here in the background.
        self.tasks = list[asyncio.Task[None]]()

    def on_status(self) -> None:
        """Take the reports that there are."""
        # OSError: there are none, since it is closed, or somebody else has read it.
        with contextlib.suppress(OSError):
            self.unread += os.read(self.status.fd, 64 * KIB)
        for token, word, number in REPORT.findall(self.unread):
            files = self.runs.get(token.decode())
            if files is not None:
                files.on_report(word.decode(), int(number))
        self.unread = self.unread[self.unread.rfind(b"\n") + 1 :][-KIB:]

    def is_there(self) -> bool:
        """Whether a line that is typed for it would run."""
        raise NotImplementedError

    def give_back(self, files: RunFiles) -> None:
        """No process has them open any more."""
        raise NotImplementedError

    def may_signal(self, pid: int) -> bool:
        """Whether a process belongs to the user who owns the panes.

        Root must not signal another user's process on behalf of that user.
        """
        try:
            return (
                self.pane_user == os.geteuid() or os.stat(f"/proc/{pid}").st_uid == self.pane_user
            )
        except OSError:
            # It has just ended.
            return False

    def close(self) -> None:
        """Leave what is still written to."""
        if self.status.fd < 0:
            return
        self.status.close()
        if not self.runs:
            remove_folder(self.path)
        for files in self.runs.values():
            files.abandon()
        os.close(self.lock)


class RunFolder(LockedFolder):
    """Where we put the files of our runs.  Raises NoTerminal, OSError.

    Names are short, since they are typed, and used again by later runs: making files costs more
    than all the rest.
    """

    def __init__(self, base: str) -> None:
        check_place(base)
        with contextlib.suppress(FileExistsError):
            os.mkdir(base, 0o700)
        check_own(base)
        left = [f"{base}/{name}" for name in os.listdir(base) if FOLDER_NAME.fullmatch(name)]
        # A random name: a line that was typed for a wiped folder must not find a new one.
        path = f"{base}/{secrets.token_hex(2)}"

        # There may be no space or no descriptor for all of it.
        with contextlib.ExitStack() as undo:
            os.mkdir(path, 0o700)
            undo.callback(remove_folder, path)
            lock = os.open(path, os.O_RDONLY)
            undo.callback(os.close, lock)

            # A driver that starts now may be adopting it.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.mkfifo(f"{path}/status", 0o600)
            super().__init__(base, path, lock, pane_user=os.geteuid())
            undo.pop_all()

        self.made_status = os.fstat(self.status.fd)
        # How many names were made, and which of them are free again.
        self.count = 0
        self.free = list[str]()
        self.tasks = [asyncio.ensure_future(drain_folder(folder)) for folder in left]

    def is_there(self) -> bool:
        """False if somebody wiped or replaced it: no line of it runs any more."""
        try:
            return os.path.samestat(os.stat(self.status_path), self.made_status)
        except OSError:
            return False

    def close_if_wiped(self) -> None:
        """After its last run a directory that was wiped is of no use."""
        if not self.runs and not self.is_there():
            self.close()

    def open(
        self, on_report: Callable[[str, int], object], on_closed: Callable[[], object]
    ) -> RunFiles:
        """Files for a run.  Raises OSError."""
        if not self.free:
            self.free.append(self._make_fifos())
        files = RunFiles(self, self.free.pop(), secrets.token_hex(8), on_report, on_closed)
        self.runs[files.token] = files
        return files

    def _make_fifos(self) -> str:
        self.count += 1
        path = f"{self.path}/{self.count:x}"
        try:
            for name in FIFOS:
                os.mkfifo(f"{path}.{name}", 0o600)
        except OSError:
            remove_files(path, FIFOS)
            raise

        return path

    def give_back(self, files: RunFiles) -> None:
        """No process has them open any more."""
        if self.runs.pop(files.token, None) is None:
            return

        # A keeper may read on for a moment.
        is_kept = any(output.has_keeper for output in files.outputs)
        if is_kept or not files.reusable:
            # Its line may have been read already, or go may be just noting the exit code.
            self.status.loop.call_later(FILES_LINGER, remove_files, files.path, ALL_FILES)
        elif remove_files(files.path, OWN_FILES):
            self.free.append(files.path)

        self.close_if_wiped()

    @contextlib.contextmanager
    def made_by(self, pane_user: int) -> Iterator[None]:
        """Make files as the user who owns the panes.

        Where a worker can move files, root could be led anywhere.
        """
        our_user = os.geteuid()
        if pane_user != self.pane_user:
            log.warning(
                "the terminals belong to user %d: that user can read every command", pane_user
            )
            os.chmod(self.base, 0o711)
            for name in (*os.listdir(self.path), "."):
                os.chown(f"{self.path}/{name}", pane_user, -1, follow_symlinks=False)

            self.pane_user = pane_user

        try:
            if pane_user != our_user:
                os.seteuid(pane_user)

            yield
        finally:
            if pane_user != our_user:
                os.seteuid(our_user)


class FoundFolder(LockedFolder):
    """The directory of a driver that has gone, with runs that outlive it."""

    def __init__(self, path: str, base: str) -> None:
        """Raises OSError: its driver lives, or it is not our directory."""
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            super().__init__(base, path, lock, pane_user=os.fstat(lock).st_uid)
        except OSError:
            os.close(lock)
            raise

        # Nothing but its runs that outlive it is written there.
        self.is_drained = False
        void_all(path, os.listdir(path))

    @classmethod
    def at(cls, path: str, base: str) -> FoundFolder | None:
        """The directory at `path`, if it is one of those below `base` and has lost its driver."""
        if os.path.dirname(path) != base or not FOLDER_NAME.fullmatch(os.path.basename(path)):
            return None
        try:
            return cls(path, base)
        except OSError as gone:
            log.warning("runs in %s cannot be taken over: %s", path, gone)
            return None

    def has_files(self, path: str, token: str) -> bool:
        """Whether the files at `path` are those of the run with this token, not of a later one."""
        try:
            with open(os.open(f"{path}.go", os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                return f"{token} exit ".encode() in file.read()
        except OSError:
            return False

    def noted(self, path: str) -> tuple[int | None, int | None, float]:
        """What go has noted in RUN.pid: the process, the exit code, and when it did so last.

        None: it has not, so it never started, or has not ended.
        """
        try:
            with open(os.open(f"{path}.pid", os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                words = file.read(KIB).split()
                noted_at = os.fstat(file.fileno()).st_mtime
        except OSError:
            return None, None, time.time()

        numbers = [int(word) for word in words if word.isdigit()]
        pid = numbers[0] if numbers else None
        exit_code = numbers[1] & 255 if len(numbers) > 1 else None
        return pid, exit_code, noted_at

    def files_of(
        self,
        path: str,
        token: str,
        on_report: Callable[[str, int], object],
        on_closed: Callable[[], object],
    ) -> RunFiles:
        """The files of one of its runs."""
        files = RunFiles(self, path, token, on_report, on_closed)
        self.runs[token] = files
        return files

    def let_go(self, files: RunFiles | None) -> None:
        """A run cannot be resumed: its outputs are drained with the others."""
        if files is not None:
            files.abandon()
            self.runs.pop(files.token, None)

    def drop(self, path: str) -> None:
        """A run that never started needs no files."""
        remove_files(path, ALL_FILES)

    def add(self, work: asyncio.Task[None]) -> None:
        """Keep a reference to a task that works here."""
        self.tasks.append(work)

    def start(self) -> None:
        """Read what other runs there still write; remove it once nothing is left."""
        self.tasks.append(asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        ours = tuple(f"{files.path}." for files in self.runs.values())
        names = [
            name for name in os.listdir(self.path) if not f"{self.path}/{name}".startswith(ours)
        ]
        await read_all(self.path, names)
        self.is_drained = True
        self._remove_if_done()

    def give_back(self, files: RunFiles) -> None:
        """No process has them open any more."""
        if self.runs.pop(files.token, None) is not None:
            self._remove_if_done()

    def is_there(self) -> bool:
        """Nothing is typed for it, and its runs are watched to their ends."""
        return True

    def _remove_if_done(self) -> None:
        if self.is_drained and not self.runs and self.status.fd >= 0:
            # Go may just be noting the exit code there.
            self.status.loop.call_later(ADOPT_PAUSE, self.close)


async def drain_folder(folder: str) -> None:
    """Read to its end, and remove, what a killed driver left; its commands run to their end."""
    # OSError: its driver lives, or it is not our directory.
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            names = os.listdir(folder)
            void_all(folder, names)
            await read_all(folder, names)

            # Go may just be noting the exit code there.
            await asyncio.sleep(ADOPT_PAUSE)

            # A command may have put a million files there.
            await asyncio.to_thread(remove_folder, folder)
        finally:
            os.close(lock)


def void_all(folder: str, names: list[str]) -> None:
    """Keep lines that were typed from starting now: they would go unseen."""
    for name in names:
        path, _, suffix = name.rpartition(".")
        if suffix == "go":
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{folder}/{path}.pid", os.O_CREAT | os.O_EXCL))


def let_holders_go(folder: str, names: list[str]) -> None:
    """End the shells in the background that hold outputs for a server which records them."""
    for name in names:
        if name.endswith(".done"):
            # None waits there.
            with contextlib.suppress(OSError):
                done = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    os.write(done, b"\n" * HOLDERS)
                finally:
                    os.close(done)


async def read_all(folder: str, names: list[str]) -> None:
    """Discard what its runs write, until no writer is left."""
    closed = asyncio.Event()
    outputs = list[Output]()
    let_holders_go(folder, names)

    for name in names:
        if name.endswith((".out", ".err")):
            # It is something else by now.
            with contextlib.suppress(OSError):
                outputs.append(Output(f"{folder}/{name}", None, None, closed.set))

    for output in outputs:
        # Perhaps no process has it open; epoll(7) does not report that.
        output.read()

    while any(output.fd >= 0 for output in outputs):
        closed.clear()
        await closed.wait()


def bash_command(request: ExecRequest, shell: str) -> tuple[list[str], str | None]:
    """The words that run a command; and its text, where that is too long to be one of them.

    The words read the text from descriptor 8 then.
    """
    name = os.path.basename(shell)
    arguments = ["-c", "--", request.cmd] if request.argv is None else [*request.argv]
    letters, _, operands = split_options(arguments)
    has_text = "c" in letters and bool(operands)
    long_text = None
    if has_text:
        at = len(arguments) - len(operands)

        # In characters of up to four bytes.
        if len(arguments[at]) > MAX_ARGUMENT // 4:
            long_text = arguments[at]
            arguments[at] = READ_COMMAND

        if len(operands) == 1:
            arguments.append(name)

    # Bash shows its own name where it has no other, and where it complains of an option.
    shows_own_name = not has_text or any(letter not in SURE_OPTIONS for letter in letters)
    if shows_own_name and name == "bash":
        return [shell, "-c", 'exec -a "$0" "$@"', name, shell, *arguments], long_text

    return [shell, *arguments], long_text


def go_script(
    request: ExecRequest, files: RunFiles, run_id: str, shell: str, header: str, is_lasting: bool
) -> dict[str, str]:
    """The texts of a run's files, by suffix.

    `go`; `in`, its stdin; `cmd`, where that is too long for an argument.
    header      what go writes to the terminal first
    is_lasting  the run outlives its server
    """
    texts = dict[str, str]()

    # Where there is nothing to read, stdin is /dev/null itself: programs look at what it is.
    if request.stdin:
        texts["in"] = request.stdin

    command, long_text = bash_command(request, shell)
    if long_text is not None:
        texts["cmd"] = long_text

    env = [f"{name}={value}" for name, value in request.env.items() if name not in OURS]
    if env:
        # `env` takes names that are none for a shell.
        command = ["env", "--", *env, *command]

    path = shlex.quote(files.path)
    inputs = f"<{path}.in" if files.feed or "in" in texts else "</dev/null"
    inputs += f" 8<{path}.cmd" if "cmd" in texts else " 8>&-"

    streams = files.streams()
    outputs = [f"{DESCRIPTORS[name][0]}>{path}.{name}" for name in streams]
    if "err" not in streams:
        outputs.append("2>&1")

    closed = "6>&- 7>&- 8>&- 9>&-"
    # `read` knows whole seconds only in some shells.
    patience = math.ceil(LATE_OUTPUT_TIMEOUT + RETURN_TIMEOUT)
    end = (END_FOR_NEXT if is_lasting else END_WITH_SERVER).format(
        run=path,
        token=files.token,
        server=os.getpid(),
        patience=patience,
        held=" ".join(f"{DESCRIPTORS[name][1]}<>{path}.{name}" for name in streams),
        drains=" ".join(rf"\cat <{path}.{name} >/dev/null {closed} &" for name in streams),
    )

    texts["go"] = GO.format(
        run=path,
        run_id=run_id,
        token=files.token,
        status=shlex.quote(files.folder.status_path),
        server=os.getpid(),
        end=end,
        header=shlex.quote(header),
        inputs=inputs,
        outputs=" ".join(outputs),
        # A FIFO that was wiped is no FIFO now: opening it made a file.
        are_fifos=" && ".join(f"[ -p {path}.{name} ]" for name in streams),
        patience=patience,
        history=HISTORY,
        quiet=QUIET,
        cwd=shlex.quote(request.cwd or "."),
        # The command's bash takes the name of its directory from there, whatever `cd` makes of it.
        pwd=f"PWD={shlex.quote(request.cwd)}" if request.cwd else "",
        agent=shlex.quote(request.agent_name),
        session=shlex.quote(request.session_id or ""),
        usage=shlex.quote(request.usage_id or ""),
        command=shlex.join(command),
    )
    return texts


# ==========================================================================
# Terminals
# ==========================================================================
# Panes, what stands at their prompts, and who may type there.
#
# L1  A run types only in a pane that it holds, and only at a prompt.  `send_keys` types anywhere.
# L2  Nothing that a person has typed is run by us.
# L3  Listing and reading make no session and no window.

# Clears a line, which C-y brings back; on an empty one C-u alone would ring the bell.
CLEAR = ("C-e", "Space", "C-u")
# By name of the program: whether it edits its line, and so shows when it waits for a command.
SHELLS = {"bash": True, "zsh": True, "sh": False, "dash": False, "ash": False, "busybox": False}
# The window of an agent, by either of its names.
WINDOW_NAME = re.compile(rf"({AGENT_NAME.pattern})[:-]terminal")


class Look(enum.Enum):
    """Whether a shell waits for a command."""

    READY = enum.auto()  # as far as it can be told
    SOON = enum.auto()  # it is about to
    BUSY = enum.auto()  # a program runs there


class Prompt(enum.Enum):
    """What is known of the line at a shell's prompt.

    | state    | keys that are pressed first                  | what is typed then            |
    |----------|----------------------------------------------|-------------------------------|
    | STARTING | C-c, once the prompt is there; CLEAR where   | CLEAR and our line            |
    |          | the shell does not show that                 |                               |
    | SETTLING | none, for PROMPT_TIMEOUT; then as STALE      | CLEAR and our line            |
    | KNOWN    | none                                         | our line, if in `empty_state` |
    | STALE    | none, if the pane is in `empty_state`;       | our line, if in `empty_state`;|
    |          | CLEAR, if the cursor is right of its column; | CLEAR and our line, where the |
    |          | otherwise C-c                                | column is not the known one   |
    """

    STARTING = enum.auto()  # a new shell: anything may have been typed while it read its files
    SETTLING = enum.auto()  # a run has just ended: a line may have been typed during it
    KNOWN = enum.auto()  # it is empty, while the pane is in the state `empty_state`
    STALE = enum.auto()  # anybody may have typed


class PaneShell:
    """The shell in a pane: whether it waits for a command, and what stands at its prompt."""

    def __init__(self, pane: Pane, new: bool = False) -> None:
        self.pane = pane
        # We have made its pane.
        self.is_ours = new
        # It has run one of our lines: it has read its start-up files, and is not a script.
        self.ran = False
        # It has shown its prompt, in a way that can be told.
        self.shown = False
        # Lines in a row that it did not run.
        self.missed = 0
        self.prompt = Prompt.STARTING if new else Prompt.STALE
        # PANE_STATE where its prompt was last known to be empty; "": it never was.
        self.empty_state = ""
        # Lines above the prompt that the next command replaces.
        self.extra_rows = 0
        # Learns that state after a run; until when it may take.
        self.learning: asyncio.Task[None] | None = None
        self.settled_by = 0.0
        # Its terminal, opened and locked; -1: it is not.
        self.lock = -1
        # The driver closes: do not wait for it.
        self.stopped = False

    def stop(self) -> None:
        """Wait for nothing: the driver closes."""
        self.stopped = True
        if self.learning:
            self.learning.cancel()

    async def hold(self) -> bool:
        """Lock the pane's tty if its shell waits for a command and no other driver holds it.

        Until `let_go`, or the end of our process.
        """
        if self.lock >= 0:
            return True
        if not await self.at_prompt():
            return False

        # OSError: another driver holds it, or the pane has just ended.
        with contextlib.suppress(OSError):
            self.hold_as_it_is()

        return self.lock >= 0

    def hold_as_it_is(self) -> None:
        """Lock the tty of a pane where one of our commands runs already.  Raises OSError."""
        if self.lock >= 0:
            return
        self.lock = os.open(self.pane.tty, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.let_go()
            raise

    def let_go(self) -> None:
        os.close(self.lock)
        self.lock = -1

    def ran_line(self) -> None:
        """It has run our line."""
        self.ran = True
        self.missed = 0
        self.extra_rows = 0

    def did_not_answer(self) -> None:
        """A line was typed, into what we do not know."""
        self.empty_state = ""
        self.missed += 1

    def forgive(self) -> None:
        """Try it once more."""
        self.missed = 0

    def moved(self, pane: Pane) -> None:
        """Its pane is described anew: another size, or a mode."""
        self.pane = pane

    def column(self) -> int:
        """Where its prompt ends, as far as it is known."""
        return int(self.empty_state.split()[0]) if self.empty_state else 0

    def look(self) -> Look:
        """Whether it waits for a command now.  Raises NoTerminal."""
        try:
            shell = process(self.pane.pid)
            if shell and shell.name == "tmux: server":
                # Forked, and about to become the shell.
                return Look.SOON
            if not shell or shell.foreground != shell.group or shell.name not in SHELLS:
                return Look.BUSY
            if not self.ran and not self._reads_tty():
                return Look.BUSY

            edits_line = SHELLS[shell.name]
            look = self._look_at_tty() if edits_line else Look.READY

            # Bash takes single keys before it can take C-c: then the next line would lose its
            # first character.
            if look is Look.READY and not self.ran and not self._sleeps():
                return Look.SOON

            return look
        except (OSError, termios.error) as wrong:
            # With no descriptors to look, BUSY would let commands wait for nothing.
            if wrong.args[0] in SHORTAGE:
                raise NoTerminal(f"cannot look at pane {self.pane.pane_id}: {wrong}") from None

        return Look.BUSY

    def _look_at_tty(self) -> Look:
        """READY if its terminal gives single keys, and it has read all of them."""
        tty = os.open(self.pane.tty, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            by_line = termios.tcgetattr(tty)[3] & termios.ICANON
            return Look.SOON if by_line or unread_bytes(tty) else Look.READY
        finally:
            os.close(tty)

    def _sleeps(self) -> bool:
        """It does nothing now, as at its prompt."""
        shell = process(self.pane.pid)
        return shell is not None and shell.sleeps

    def _reads_tty(self) -> bool:
        """It was not started with a script or with -c."""
        words = read_proc(self.pane.pid, "cmdline").decode("latin-1").split("\0")[1:-1]
        letters = "".join(word for word in words if re.match(r"[-+]\w", word))
        if "c" in letters:
            return False
        return "i" in letters or all(word[:1] in "-+" or word in SHELLS for word in words)

    async def at_prompt(self) -> bool:
        """Whether it waits for a command, or will in a moment."""
        deadline = time.monotonic() + (PROMPT_TIMEOUT if self.ran else NEW_SHELL_TIMEOUT)
        while True:
            look = self.look()
            if look is Look.READY:
                self.shown = True

            if look is not Look.SOON or self.stopped:
                return look is Look.READY

            # A shell that never shows whether it is ready is taken to be ready.
            if not self.shown and (self.ran or time.monotonic() >= deadline):
                return True
            if time.monotonic() >= deadline:
                return False

            # A shell does not announce its prompt.
            await asyncio.sleep(LOOK_PAUSE)

    async def clear(self, tmux: Tmux) -> str | None:
        """Have nothing stand at the prompt.

        Return the PANE_STATE in which it is empty, so that the line is typed only in that; or None
        if nobody knows: then CLEAR is to be typed, and the line right behind it.
        """
        prompt = self.prompt
        # After this a line is typed.
        self.prompt = Prompt.STALE
        self.extra_rows = 0
        if prompt is Prompt.KNOWN:
            return self.empty_state
        if prompt is Prompt.SETTLING and self.empty_state and time.monotonic() < self.settled_by:
            return None

        now = await tmux.state(self.pane)
        if not is_in_no_mode(now):
            now = await tmux.leave_modes(self.pane)

        if now == self.empty_state:
            return now

        if self.look() is not Look.BUSY:
            if self._is_behind_prompt(now) or (prompt is Prompt.STARTING and not self._edits()):
                tmux.send_keys(self.pane, None, *CLEAR)
            else:
                await tmux.reply(tmux.send_keys(self.pane, now, "C-c"))
                # A new shell shows the first command where `^C` stands now.
                if prompt is Prompt.STARTING:
                    self.extra_rows = 1

            await asyncio.sleep(CLEAR_PAUSE)
            await self.at_prompt()
            now = await tmux.state(self.pane)

        # The line is clear, so the prompt ends here.  But if that is not the known column, somebody
        # may be typing just now: then CLEAR is typed once more, with the line.
        is_empty = self._is_empty(now)
        self.empty_state = now
        return now if is_empty else None

    def _edits(self) -> bool:
        """Whether it waits at a prompt, and edits its line: C-c ends nothing but that line."""
        shell = process(self.pane.pid)
        return shell is not None and SHELLS.get(shell.name, False) and self.look() is Look.READY

    def _is_empty(self, now: str) -> bool:
        """Whether the cursor is in the column where the known prompt ends, and in no mode."""
        return now.split()[0] == self.empty_state.partition(" ")[0] and is_in_no_mode(now)

    async def state_if_empty(self, tmux: Tmux) -> str | None:
        """PANE_STATE, if its shell waits for a command and nothing is typed there."""
        if not self.empty_state or self.look() is not Look.READY:
            return None
        now = await tmux.state(self.pane)
        return now if self._is_empty(now) else None

    def _is_behind_prompt(self, now: str) -> bool:
        """Whether the cursor is right of where the known prompt ends, in the same line.

        There CLEAR clears the line.  Anywhere else it may be a continuation prompt: C-c ends that.
        """
        if not self.empty_state:
            return False
        column, *place = now.split()
        last_column, *last_place = self.empty_state.split()
        return place == last_place and int(column) > int(last_column)

    def back(self, tmux: Tmux) -> None:
        """A run has ended: learn the state of the prompt.  Anything typed later changes it."""
        self.prompt = Prompt.SETTLING
        self.settled_by = time.monotonic() + PROMPT_TIMEOUT
        self.learning = asyncio.ensure_future(self._learn(tmux))

    async def _learn(self, tmux: Tmux) -> None:
        with contextlib.suppress(NoTerminal):
            await asyncio.sleep(CLEAR_PAUSE)
            if not self._is_learning() or not await self.at_prompt():
                return

            now = await tmux.state(self.pane)
            if not self._is_learning():
                return

            # In another column something was typed during the run.
            self.prompt = Prompt.STALE
            if self._is_empty(now):
                self.empty_state = now
                self.prompt = Prompt.KNOWN

    def _is_learning(self) -> bool:
        """Whether no command has taken this shell since `back`."""
        return self.prompt is Prompt.SETTLING and self.learning is asyncio.current_task()


def foreground_of(pane: Pane) -> Process | None:
    """The process that the pane's terminal listens to."""
    shell = process(pane.pid)
    return process(shell.foreground) if shell and shell.foreground > 0 else None


def is_idle(pane: Pane) -> bool:
    """Whether its shell is in the foreground: no program runs there."""
    shell = process(pane.pid)
    return shell is not None and shell.foreground == shell.group and shell.name in SHELLS


def runs_program(pane: Pane) -> bool:
    """Whether a program has the keys there: no shell, and none that starts or has just died."""
    shell = process(pane.pid)
    return shell is not None and shell.name != "tmux: server" and not is_idle(pane)


def runs_command_of_ours(pane: Pane) -> bool:
    """Whether the program there is a command that a server has started."""
    front = foreground_of(pane)
    try:
        variables = read_proc(front.group, "environ", 4 * MIB) if front else b""
    except OSError:
        # It has ended, or is another user's.
        return False
    return any(each.startswith(b"POCKETCODER_RUN_ID=") for each in variables.split(b"\0"))


def age_rank(pane: Pane) -> int:
    """Larger, the later the program in its foreground was started."""
    front = foreground_of(pane)
    return front.started_at if front else 0


def title_of(pane: Pane) -> str:
    """For people: the pane, and what runs in it."""
    front = foreground_of(pane)
    return f"pane {pane.pane_id}: {front.name if front else 'ended'}"


class Sandbox:
    """Our tmux session at the socket: the connection to it, and the directory for runs.

    directory  where new terminals start; None: where tmux does
    on_notice  called when something may have died
    """

    def __init__(
        self,
        socket_path: str,
        session_name: str,
        directory: str | None,
        on_notice: Callable[[], object],
    ) -> None:
        self.socket_path = socket_path
        self.session_name = session_name
        self.on_notice = on_notice
        self.shell = find_shell()
        # What tmux runs in a new pane.  Not one word: default-shell, maybe us, would run that.
        self.new_shell = [
            *(["-c", directory.replace("#", "##")] if directory else []),
            *("-e", f"SHELL={self.shell}", "-e", f"HISTCONTROL={HISTORY}"),
            *("--", self.shell, "-i"),
        ]
        self.stopping = False
        self.tmux: Tmux | None = None
        self.folder: RunFolder | None = None
        self.connecting = asyncio.Lock()
        # Tmux did not answer: until when it is not asked again, and what is said meanwhile.
        # Otherwise each caller would wait in its turn.
        self.silent_until = 0.0
        self.silence = ""

    def open_folder(self) -> RunFolder:
        """The directory for runs, a new one if somebody wiped it.  Raises NoTerminal, OSError."""
        if self.folder is not None:
            if self.folder.is_there():
                return self.folder
            self.folder.close_if_wiped()

        self.folder = RunFolder(f"{self.socket_path}.d")
        return self.folder

    async def connect(self, window_name: str) -> Tmux:
        """The connection to tmux.  If there is no session yet, this is its first window.

        Raises NoTerminal.
        """
        async with self.connecting:
            if self.tmux is not None and not self.tmux.closed:
                return self.tmux

            try:
                self.open_folder()
            except OSError as refused:
                # Tmux, which needs the same place, would not tell why.
                raise NoTerminal(f"cannot prepare runs: {refused}") from None

            asked_at = time.monotonic()
            if asked_at < self.silent_until:
                raise NoTerminal(self.silence)

            window = ["-n", window_name, *self.new_shell]

            try:
                self.tmux = await Tmux.connect(
                    self.socket_path, self.session_name, window, self.on_notice
                )
            except NoTerminal as refused:
                now = time.monotonic()
                if now >= asked_at + TMUX_TIMEOUT:
                    self.silent_until = now + TMUX_TIMEOUT
                    self.silence = str(refused)

                raise

            return self.tmux

    def check_files(self) -> None:
        """Raise NoTerminal or OSError if no run could have its files now.  Makes nothing."""
        base = f"{self.socket_path}.d"
        wanted = base if self.folder is None else self.folder.path
        if os.path.lexists(os.path.dirname(base)):
            check_owners(base)
            check_owners(self.socket_path)
        if os.path.lexists(base):
            check_own(base)

        try_folder(nearest_folder(wanted))

    async def check_tmux(self) -> None:
        """Raise NoTerminal if tmux is missing or does not answer soon.  Makes nothing."""
        if time.monotonic() < self.silent_until:
            raise NoTerminal(f"tmux has not answered within {TMUX_TIMEOUT:g} s")

        if self.tmux is None or self.tmux.closed:
            await ask_socket(self.socket_path)
        else:
            await self.tmux.check()

    def has_session(self, name: str) -> bool:
        """Whether tmux has a session of exactly this name.  Raises NoTerminal."""
        check_place(self.socket_path)
        try:
            return has_session(self.socket_path, name)
        except (OSError, subprocess.TimeoutExpired) as wrong:
            raise NoTerminal(f"tmux: {wrong}") from None

    async def windows(self) -> dict[str, list[Pane]]:
        """The panes of each agent's window, by agent; makes nothing.  Raises NoTerminal."""
        if self.tmux is None or self.tmux.closed:
            try:
                exists = await asyncio.to_thread(self.has_session, self.session_name)
            except RuntimeError as no_thread:
                raise NoTerminal(f"tmux: {no_thread}") from None

            if not exists:
                return {}

        tmux = await self.connect(f"{default_agent_name()}:terminal")

        found: dict[str, list[Pane]] = {}

        for pane in await tmux.panes():
            named = WINDOW_NAME.fullmatch(pane.window_name)
            if named is None:
                continue

            panes = found.setdefault(named[1], [])

            # The first window of an agent is the one.
            if not panes or panes[0].window_id == pane.window_id:
                panes.append(pane)

        return found

    async def close(self) -> None:
        """End the connection, not the session."""
        if self.tmux is not None:
            self.tmux.close()
            await self.tmux.ended.wait()
        if self.folder is not None:
            self.folder.close()


class Terminal:
    """An agent's window, `name`: its panes, which of them are in use, and who waits."""

    def __init__(self, sandbox: Sandbox, name: str) -> None:
        self.sandbox = sandbox
        self.name = name
        # Whoever made the window may have called it by either name.
        self.names = (name, name.replace(":", "-"))
        # One for each pane.
        self.shells: list[PaneShell] = []
        # The connection by which they were looked at, and its `notice_count` just before.
        self.looked_at: tuple[Tmux, int] | None = None
        # Panes in use, by id; and those of them whose command has ended: the prompt comes soon.
        self.used: set[str] = set()
        self.returning: set[str] = set()
        # Those of them with commands for which nobody waits.
        self.unattended: set[str] = set()
        self.waiting = 0
        # First come, first served.
        self.lock = asyncio.Lock()
        self.freed = asyncio.Event()
        # Closes panes that are too many.
        self.closing: asyncio.Task[None] | None = None

    async def take(self) -> tuple[PaneShell, Tmux]:
        """A shell at its prompt, until `let_go`, and the connection; waits in the queue for one.

        Raises NoTerminal.
        """
        if len(self.used) - len(self.unattended) + self.waiting >= MAX_PANES + MAX_QUEUE:
            raise NoTerminal(
                f"{MAX_QUEUE} commands wait for this terminal already: try again later"
            )

        self.waiting += 1
        try:
            async with self.lock:
                return await self._wait_for_shell()
        finally:
            self.waiting -= 1

    async def _wait_for_shell(self) -> tuple[PaneShell, Tmux]:
        while not self.sandbox.stopping:
            self.freed.clear()
            tmux = await self._ensure_panes()
            shell = await self._choose(tmux)
            if shell and self.sandbox.stopping:
                shell.let_go()
                break
            if shell:
                self.used.add(shell.pane.pane_id)
                return shell, tmux

            # Tmux does not tell when a person's program ends, so look now and then.
            timer = tmux.loop.call_later(QUEUE_CHECK, self.freed.set)
            await self.freed.wait()
            timer.cancel()

        raise NoTerminal("the proxy is stopping")

    def will_return(self, shell: PaneShell) -> None:
        """Its command has ended, and the prompt comes soon."""
        self.returning.add(shell.pane.pane_id)

    def unattend(self, shell: PaneShell) -> None:
        """Nobody waits for its command: another command may have one pane more."""
        if shell.pane.pane_id in self.used:
            self.unattended.add(shell.pane.pane_id)
            self.freed.set()

    async def find(self, pane_id: str, pid: int) -> tuple[PaneShell, Tmux] | None:
        """The pane in which a command of another server runs; it is held from now on.

        Raises NoTerminal, OSError.
        """
        async with self.lock:
            tmux = await self._ensure_panes()
            for shell in self.shells:
                if shell.pane.pane_id == pane_id and shell.pane.pid == pid:
                    shell.hold_as_it_is()
                    self.used.add(pane_id)
                    self.unattended.add(pane_id)
                    return shell, tmux
        return None

    def let_go(self, shell: PaneShell) -> None:
        """Others may use it."""
        self.used.remove(shell.pane.pane_id)
        self.returning.discard(shell.pane.pane_id)
        self.unattended.discard(shell.pane.pane_id)
        shell.let_go()
        self.freed.set()
        if len(self.shells) > MAX_PANES and self.closing is None:
            self.closing = asyncio.ensure_future(self._close_idle())

    async def _close_idle(self) -> None:
        """Close panes that we made beyond MAX_PANES, once nothing runs or is typed there."""
        try:
            for _ in range(CLOSE_TRIES):
                await asyncio.sleep(CLOSE_PAUSE)
                if len(self.shells) <= MAX_PANES or self.sandbox.stopping:
                    break
                async with self.lock:
                    await self._close_one(await self._ensure_panes())
        except NoTerminal as gone:
            log.debug("panes of %s: %s", self.name, gone)
        finally:
            self.closing = None

    async def _close_one(self, tmux: Tmux) -> None:
        for shell in reversed(self.shells):
            if shell.pane.pane_id in self.used or not shell.is_ours:
                continue
            state = await shell.state_if_empty(tmux)
            if state and len(self.shells) > MAX_PANES:
                tmux.close_pane(shell.pane, state)
                self.look_again()
                return

    def look_again(self) -> None:
        """Look at its panes again before the next command."""
        self.looked_at = None

    async def open(self) -> None:
        """Make the window if it is missing, and know its prompt before anybody types."""
        async with self.lock:
            tmux = await self._ensure_panes()
            shell = self.shells[0]
            if shell.prompt is Prompt.STARTING and await shell.at_prompt():
                await shell.clear(tmux)

    async def make(self) -> None:
        """Make the window if it is missing."""
        async with self.lock:
            await self._ensure_panes()

    def stop(self) -> None:
        """Wait for nothing any more."""
        self.freed.set()
        for shell in self.shells:
            shell.stop()
        if self.closing is not None:
            self.closing.cancel()

    async def _ensure_panes(self) -> Tmux:
        """Know the panes; make the window, with all around it, if it is missing.  Needs the lock.

        Raises NoTerminal.
        """
        tmux = self.sandbox.tmux
        has_news = tmux is None or self.looked_at != (tmux, tmux.notice_count)
        if tmux and not tmux.closed and not has_news:
            return tmux

        for attempt in range(LOOK_TRIES):
            is_last = attempt == LOOK_TRIES - 1
            try:
                return await self._ensure_panes_once()
            except (NoTerminal, ValueError) as failure:
                # ValueError: what tmux describes is just going.
                if is_last:
                    raise NoTerminal(str(failure)) from None

            # The session may be gone, and we be attached to another.  Not at the first try: others
            # wait for replies.
            if attempt > 0 and self.sandbox.tmux:
                self.sandbox.tmux.close()

            # A tmux that is just ending fails once.  Two that are started at the same moment end
            # each other, so that their drivers must not try again in step.
            await asyncio.sleep(RETRY_PAUSE * 2**attempt * random.uniform(1, 2))

        raise AssertionError("the last try returns or raises")

    async def _ensure_panes_once(self) -> Tmux:
        tmux = await self.sandbox.connect(self.name)
        notice_count = tmux.notice_count
        panes = self._own(await tmux.panes())
        new = [pane.pid for pane in tmux.made]
        if not panes:
            panes = [await tmux.new_window(self.name, self.sandbox.new_shell)]
            new.append(panes[0].pid)

        for at, pane in enumerate(panes):
            # remain-on-exit, or tmux does not know yet.
            if has_ended(pane.pid):
                panes[at] = await tmux.respawn(pane, self.sandbox.new_shell)
                new.append(panes[at].pid)

        known = {shell.pane.pid: shell for shell in self.shells}
        self.shells = []

        for pane in panes:
            shell = known.get(pane.pid) or PaneShell(pane, pane.pid in new)
            shell.moved(pane)
            self.shells.append(shell)

        self.looked_at = (tmux, notice_count)
        return tmux

    def _own(self, panes: list[Pane]) -> list[Pane]:
        """Those of the window that is ours: the first by our name for it, else by the other."""
        for name in self.names:
            found = [pane for pane in panes if pane.window_name == name]
            if found:
                return [pane for pane in found if pane.window_id == found[0].window_id]
        return []

    async def _choose(self, tmux: Tmux) -> PaneShell | None:
        """A shell at its prompt; else a new one; else one in copy mode; else None."""
        free = [shell for shell in self.shells if shell.pane.pane_id not in self.used]
        sound = [shell for shell in free if shell.missed < MAX_MISSED]
        for shell in sound:
            if not shell.pane.in_mode and await shell.hold():
                return shell

        if any(has_ended(shell.pane.pid) for shell in free):
            # Look again, at once.
            self.look_again()
            self.freed.set()
            return None

        if self._may_split() and await self._split(tmux):
            return self.shells[-1] if await self.shells[-1].hold() else None

        # Otherwise a command would wait while a person reads.
        for shell in sound:
            if shell.pane.in_mode and await shell.hold():
                return shell

        if free == self.shells and not sound:
            for shell in free:
                shell.forgive()

            raise NoTerminal(self.no_answer())

        return None

    def no_answer(self) -> str:
        return f"no shell in the window {self.name} answers: the terminal shows why"

    def _may_split(self) -> bool:
        """Whether there may be one more pane.

        Commands for which nobody waits, and programs of a person, do not count to MAX_PANES; shells
        that do not answer do.
        """
        silent = [shell for shell in self.shells if shell.missed >= MAX_MISSED]
        attended = len(self.used) - len(self.unattended) + len(silent)
        return not self.returning and attended < MAX_PANES and len(self.shells) < MAX_ALL_PANES

    async def _split(self, tmux: Tmux) -> bool:
        """Make one more pane."""
        beside = self.shells[-1].pane
        for _ in range(2):
            with contextlib.suppress(NoTerminal):
                pane = await tmux.split(beside, self.sandbox.new_shell)
                self.shells.append(PaneShell(pane, True))
                return True

            # There was no room: make some.
            tmux.tile(beside)

        return False


# ==========================================================================
# Run list
# ==========================================================================
# The newest runs, whatever their door: what was asked, how it ended, what it printed.
#
# Q1  A run is in the list from its request on, until newer ones push it out or it is forgotten.
# Q2  What is known of a lasting run is on disk before its command can start, if there is space.


@dataclass(frozen=True)
class Location:
    """Where a run is: for a server that starts later."""

    # Of its files, without the suffix.
    path: str
    # Marks its reports.
    token: str
    pane_id: str
    # The shell in the pane.
    pane_pid: int

    def __post_init__(self) -> None:
        """Raises BadMessage."""
        for name in ("path", "token", "pane_id"):
            check_text(f"location.{name}", getattr(self, name), "a text", MAX_PATH)
        if type(self.pane_pid) is not int or self.pane_pid < 1:
            raise complain("location.pane_pid", self.pane_pid, "a process")


class Run:
    """What callers see of one command: what was asked, how far it is, what it has printed.

    is_lasting  it outlives its caller and the server
    """

    __slots__ = (
        "agent_name",
        "asked_time",
        "cmd",
        "cwd",
        "door",
        "failure",
        "ignored",
        "is_answered",
        "is_lasting",
        "is_left",
        "location",
        "max_output",
        "needs_no_wait",
        "record",
        "result",
        "run_id",
        "session_id",
        "started_time",
        "state",
        "timeout",
        "usage_id",
        "waited",
    )

    def __init__(self, run_id: str, request: ExecRequest, door: str, record: Record) -> None:
        self.run_id = run_id
        self.door = door
        self.agent_name = request.agent_name
        self.session_id = request.session_id
        self.usage_id = request.usage_id
        self.cmd = cut_to_bytes(request.cmd, MAX_LISTED_COMMAND)
        self.cwd = request.cwd
        self.timeout = request.timeout
        self.max_output = request.max_output
        self.ignored = request.ignored
        self.is_lasting = request.wait is not None
        self.record = record
        self.state = RunState.WAITING
        # Seconds of time.time(); None: not yet.
        self.asked_time = time.time()
        self.started_time: float | None = None
        # None: it has not ended.
        self.result: CommandResult | None = None
        # Seconds for a pane; None: it has none yet.
        self.waited: float | None = None
        # Why it could not be run.
        self.failure: ProxyError | None = None
        # It has ended, or failed, or the server stops: nobody need wait for it any more.
        self.needs_no_wait = asyncio.Event()
        # None: it has none yet.
        self.location: Location | None = None
        # Its caller has the answer, or has gone.
        self.is_answered = False
        # Nobody need follow it: the server stops.
        self.is_left = False

    def start(self) -> None:
        """It runs."""
        self.state = RunState.RUNNING
        self.started_time = time.time()

    def end(self, result: CommandResult) -> None:
        """It has ended, or will never start."""
        assert self.state is not RunState.ENDED
        self.state = RunState.ENDED
        self.result = result
        self.needs_no_wait.set()
        # Whoever follows the output learns of the end.
        self.record.stir()

    def fail(self, failure: ProxyError) -> None:
        """It could not be run: tell its caller why.  It stays WAITING, and goes out of the list."""
        self.failure = failure
        self.needs_no_wait.set()
        self.record.stir()

    def answer_given(self) -> None:
        """Its caller has the answer, or has gone."""
        self.is_answered = True

    def let_callers_go(self) -> None:
        """The server stops: answer with what is known."""
        self.is_left = True
        self.needs_no_wait.set()
        self.record.stir()

    def got_pane(self, waited: float) -> None:
        """It has a pane, after so many seconds."""
        self.waited = waited

    def put_at(self, location: Location) -> None:
        """It has its files and a pane."""
        self.location = location

    def text(self, limit: int | None = None) -> Iterator[str]:
        """What it has printed by its end, or so far, see `Record.text`."""
        return self.record.text(limit or self.max_output, self.printed())

    def printed(self) -> int:
        """Bytes by its end, or so far."""
        return self.result.output_bytes if self.result else self.record.total

    def waited_ms(self) -> int:
        """Milliseconds that it waited for a pane, by now."""
        if self.waited is not None:
            return round(self.waited * 1000)
        until = time.time() if self.started_time is None else self.started_time
        return max(0, round((until - self.asked_time) * 1000))

    def duration(self) -> float:
        """Seconds, so far."""
        return 0.0 if self.started_time is None else max(0.0, time.time() - self.started_time)

    def answer(self, stdout: str | None) -> ExecResponse:
        """The answer to its caller, by now; `stdout` is None where that is not wanted."""
        if self.result is not None:
            return ExecResponse.of(self.ignored, self.result, stdout)

        return ExecResponse(
            stdout=stdout,
            # Also while it waits for a pane.
            running=True,
            truncated=not self.record.is_whole(self.max_output, self.record.total),
            output_bytes=self.record.total,
            duration_ms=round(self.duration() * 1000),
            waited_ms=self.waited_ms(),
            run_id=self.run_id,
            ignored=[*self.ignored] or None,
        )

    def facts(self) -> Message:
        """As the list shows it."""
        shown: Message = {
            "run_id": self.run_id,
            "door": self.door,
            "agent_name": self.agent_name,
            "session_id": self.session_id,
            "usage_id": self.usage_id,
            "cmd": self.cmd,
            "cwd": self.cwd,
            "state": self.state.value,
            "started": rfc3339(self.started_time) if self.started_time else None,
        }
        return {**shown, **self.answer(None).facts()}

    def saved(self) -> Message:
        """What a server that starts later needs to know."""
        return {
            "run_id": self.run_id,
            "socket": self.record.shelf.socket,
            "door": self.door,
            "agent_name": self.agent_name,
            "session_id": self.session_id,
            "usage_id": self.usage_id,
            "cmd": self.cmd,
            "cwd": self.cwd,
            "timeout": self.timeout,
            "max_output": self.max_output,
            "asked_time": self.asked_time,
            "started_time": self.started_time,
            "waited": self.waited,
            "result": vars(self.result) if self.result else None,
            "is_complete": self.record.is_complete,
            "location": vars(self.location) if self.location else None,
        }

    def request(self) -> ExecRequest:
        """What was asked, as far as that is remembered."""
        return ExecRequest(
            # `bash -c ""` has no text.
            cmd=self.cmd or " ",
            cwd=self.cwd,
            agent_name=self.agent_name,
            session_id=self.session_id,
            usage_id=self.usage_id,
            timeout=self.timeout,
            max_output=self.max_output,
            # Not None: it is lasting.
            wait=0 if self.is_lasting else None,
        )

    @classmethod
    def load(cls, saved: Message, record: Record) -> Run:
        """From what another server has saved.

        Raises BadMessage, LookupError, TypeError, ValueError, ArithmeticError.
        """
        request = ExecRequest(
            cmd=check_text("cmd", saved["cmd"], "a command", MAX_COMMAND) or " ",
            cwd=saved["cwd"],
            agent_name=saved["agent_name"],
            session_id=saved["session_id"],
            usage_id=saved["usage_id"],
            timeout=saved["timeout"],
            max_output=saved["max_output"],
            wait=0,
        )
        if saved["door"] not in DOORS:
            raise complain("door", saved["door"], f"one of {', '.join(DOORS)}")

        run = cls(saved["run_id"], request, saved["door"], record)
        run._restore(saved)
        return run

    def _restore(self, saved: Message) -> None:
        """Be as far as it was when it was saved."""
        self.asked_time = float(saved["asked_time"])
        if saved["location"] is not None:
            self.location = Location(**saved["location"])
        self.is_answered = True
        if saved["waited"] is not None:
            self.waited = float(saved["waited"])
        if saved["started_time"] is not None:
            self.state = RunState.RUNNING
            self.started_time = float(saved["started_time"])
        if saved["result"] is not None:
            self.end(CommandResult(**saved["result"]))


def cut_to_bytes(text: str, limit: int) -> str:
    """The start of a text that has at most `limit` bytes in UTF-8."""
    if len(text) <= limit // 4:
        return text
    return text.encode(errors="replace")[:limit].decode(errors="ignore")


def rfc3339(seconds: float) -> str:
    """A time of time.time(): UTC, with milliseconds."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class RunList:
    """The newest MAX_RUNS runs, and those that are not over, the oldest first."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.runs: dict[str, Run] = {}

    def open(self, request: ExecRequest, door: str) -> Run:
        """Put a run into the list."""
        run_id = secrets.token_hex(8)
        record = self.shelf.record(run_id, request.max_output, request.wait is not None)
        run = Run(run_id, request, door, record)
        self.runs[run_id] = run
        if len(self.runs) > MAX_RUNS:
            self._forget_oldest()
        return run

    def find(self, run_id: str) -> Run:
        """Raises NoSuchRun."""
        run = self.runs.get(run_id)
        if run is None:
            got = json.dumps(run_id[:80])
            raise NoSuchRun(f"`run_id`: got {got}, which was never started, or is forgotten")
        return run

    def newest(self, query: RunQuery) -> list[Run]:
        """Those that match, the newest first.  Raises NoSuchRun for an unknown `before`."""
        runs = [*self.runs.values()]
        if query.before is not None:
            runs = runs[: runs.index(self.find(query.before))]

        found = list[Run]()
        for run in reversed(runs):
            if len(found) == query.limit:
                break
            if self._matches(run, query):
                found.append(run)

        return found

    @staticmethod
    def _matches(run: Run, query: RunQuery) -> bool:
        """Whether the run fits the query."""
        wanted = {
            "agent_name": query.agent_name,
            "session_id": query.session_id,
            "usage_id": query.usage_id,
        }
        if query.state is not None and run.state.value != query.state:
            return False
        return all(value in (None, getattr(run, name)) for name, value in wanted.items())

    def answered(self, run: Run) -> None:
        """Its caller has the answer, or has gone: its output may be dropped if there is no room."""
        run.answer_given()
        self._retire_if_done(run)

    def _retire_if_done(self, run: Run) -> None:
        """Its output may be dropped once it has ended and its caller has the answer."""
        is_done = run.is_answered and run.state is RunState.ENDED
        if is_done and run.run_id in self.runs:
            self.shelf.retire(run.record)

    def end(self, run: Run, result: CommandResult) -> None:
        """It has ended, or will never start."""
        run.end(result)
        if run.is_lasting:
            self.save(run)
        self._retire_if_done(run)

    def complete(self, run: Run) -> None:
        """Nothing of it can write any more."""
        was_complete = run.record.is_complete
        run.record.finish()
        self.shelf.stopped_growing(run.record)
        if run.state is RunState.ENDED:
            if run.is_lasting and not was_complete:
                self.save(run)
            self._retire_if_done(run)

    def located(self, run: Run, location: Location) -> None:
        """It has files and a pane, and is about to start."""
        run.put_at(location)
        if run.is_lasting:
            self.save(run)

    def started(self, run: Run) -> None:
        """It runs."""
        run.start()
        if run.is_lasting:
            self.save(run)

    def unfinished(self) -> list[Run]:
        """Those that go on, or of which something may still write."""
        return [run for run in self.runs.values() if not run.record.is_complete]

    def close(self) -> None:
        """The server stops: what lasts is for the next one."""
        self.shelf.close()

    def save(self, run: Run) -> None:
        """Write what is known of a lasting run to the disk, as far as that is possible."""
        if run.run_id not in self.runs:
            return
        try:
            self.shelf.save(run.run_id, run.saved())
        except OSError as refused:
            self.shelf.complain(refused)

    def forget(self, run: Run) -> None:
        """Drop it with its output."""
        self.runs.pop(run.run_id, None)
        self.shelf.forget(run.record)
        if run.is_lasting:
            self.shelf.remove(run.run_id)

    def _forget_oldest(self) -> None:
        for run in self.runs.values():
            if run.state is RunState.ENDED and run.is_answered:
                self.forget(run)
                return

    def take_over(self) -> list[Run]:
        """List the lasting runs of servers that have gone, and return those not complete yet."""
        try:
            saved = self.shelf.take_over()
        except OSError as refused:
            self.shelf.complain(refused)
            return []

        runs = list[Run]()
        for facts, record in saved:
            try:
                runs.append(Run.load(facts, record))
            except (ProxyError, LookupError, TypeError, ValueError, ArithmeticError) as damage:
                log.warning("runs skipped=%s: %s", facts["run_id"], damage)
                self.shelf.forget(record)
                continue

        runs.sort(key=lambda run: run.asked_time)
        complete = {facts["run_id"] for facts, _ in saved if facts.get("is_complete") is True}
        for run in runs:
            if run.run_id in complete and run.result is not None:
                self._close(run, run.result)

        self.runs = {run.run_id: run for run in runs} | self.runs
        for _ in range(len(self.runs) - MAX_RUNS):
            self._forget_oldest()

        return [run for run in runs if not run.record.is_complete]

    def _close(self, run: Run, result: CommandResult) -> None:
        """It was complete when it was saved."""
        run.record.has_printed(result.output_bytes)
        run.record.finish()
        self.shelf.stopped_growing(run.record)
        self.shelf.retire(run.record)


# ==========================================================================
# Runs
# ==========================================================================
# One command from its files to the prompt after it.
#
# D1  A run ends exactly once (by itself, timed out, cancelled, lost), or it never starts, or it is
#     left to the next server.
# D2  The exit code of a command that ended by itself is what its shell reported.
# D3  Whatever happens, the pane is given back.
#
# To add a way to end a run: a row in ENDINGS and a test named after it.
#
LOST = "lost: {why}; the next command starts a new terminal"
# Exit code and error; None: as reported.
ENDINGS: dict[str, tuple[int | None, str | None]] = {
    "exit": (None, None),
    "timeout": (
        124,
        "ended after {timeout:g} s: ask for a longer `timeout`, or start it in the background",
    ),
    "cancelled": (None, "cancelled before its end{why}"),
    "lost": (137, LOST),
}
# Signals, and seconds until the next one.
KILL_AT_ONCE = ((signal.SIGKILL, 0.2), (signal.SIGKILL, 0.8))
TERM_THEN_KILL = ((signal.SIGTERM, 2.0), *KILL_AT_ONCE)
# Exit codes of a job that only stopped.
STOPPED = range(128 + signal.SIGSTOP, 128 + signal.SIGTTOU + 1)


class Watch:
    """Follows a run: `start` before it starts, `end` when it has ended, or never started."""

    # The way in which the command came: exec, stream, shell, mcp.
    door = "exec"

    async def start(self, run_id: str) -> None:
        """If this raises, the command does not start."""

    def end(self, result: CommandResult) -> None:
        """`result` is without the output."""


UNWATCHED = Watch()


class Phase(enum.IntEnum):
    """How far a job is.  Only `Job._enter` changes it.

    Before RUNNING its run is in RunState.WAITING, and from OVER on in RunState.ENDED.  A job that
    is RELEASED without OVER leaves its run as it was.
    """

    HELD = 0  # it has a pane; its files are being made
    SENT = 1  # tmux was asked to type the line that runs it
    RUNNING = 2  # go has reported its start
    SETTLING = 3  # its end is reported, and something that it started may still write
    OVER = 4  # exit code, duration and all output are known
    RELEASED = 5  # the pane is free


class Job:
    """A run at work in a pane, from its files to the prompt after it.

    run         what callers see of it, with the record of its output
    takes       who else gets the output: {"out"} for both streams, or {"out", "err"}
    fed         its stdin comes through `feed`
    runs        the list of runs, which keeps track of it
    watch       follows it
    on_release  called when the pane is free

    | event              | HELD     | SENT              | RUNNING  | SETTLING | OVER     |
    |--------------------|----------|-------------------|----------|----------|----------|
    | tmux did not type  |          | RELEASED          |          |          |          |
    | report start       |          | RUNNING           |          |          |          |
    | report exit        |          | it cannot begin   | SETTLING |          |          |
    | all read, or quiet |          |                   |          | OVER     |          |
    | report back        |          | RELEASED          | lost     | later    | RELEASED |
    | cancelled          | RELEASED | void, or ladder   | ladder   | OVER     |          |
    | its time is over   |          |                   | ladder   |          |          |
    | its shell died     | RELEASED | void, or lost     | lost     |          |          |
    | no report in time  |          | void, or lost     |          |          | RELEASED |
    | server stops       |          | RELEASED          | RELEASED | RELEASED |          |

    void: it never starts, RELEASED.  lost: OVER, then RELEASED.  ladder: see `climb`.
    it cannot begin: go comes back at once.  later: it is noted, and RELEASED follows once the job
    is OVER and its end is shown.
    server stops: only of a lasting run, which goes on; others are cancelled.
    """

    # From start() on.
    files: RunFiles | None = None
    # Shows the end and lets the prompt come, from OVER on.
    showing_end: asyncio.Task[None] | None = None
    # Ends it: see `climb`.
    ending: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    view: View | None = None

    def __init__(
        self,
        terminal: Terminal,
        shell: PaneShell,
        tmux: Tmux,
        request: ExecRequest,
        run: Run,
        takes: Takes,
        fed: bool,
        asked_at: float,
        runs: RunList,
        watch: Watch,
        on_release: Callable[[Job], object],
    ) -> None:
        self.terminal = terminal
        self.sandbox = terminal.sandbox
        # Its pane, and the connection to type there.
        self.shell = shell
        self.tmux = tmux
        self.request = request
        self.run = run
        self.run_id = run.run_id
        self.record = run.record
        self.takes = takes
        self.fed = fed
        self.runs = runs
        self.watch = watch
        self.on_release = on_release
        self.loop = asyncio.get_running_loop()

        self.phase = Phase.HELD
        # True: it runs, or was lost before it could tell.  False: its pane was given back unused.
        self.started: asyncio.Future[bool] = self.loop.create_future()
        self.over = asyncio.Event()
        # From OVER on.
        self.how_it_ended: CommandResult | None = None
        # Go needs its files no more: it has reported `back`, or its line was not typed.
        self.go_is_done = False
        # Whatever is left of it at its end is ended too.
        self.leaves_nothing = False

        # A key of ENDINGS; "exit": nobody has ended it.
        self.ended = "exit"
        # Why, for people.
        self.why = ""
        # Why go cannot begin, for people; "": it can, or has not been tried.
        self.cannot_begin = ""
        self.exit_code = 0
        # The process group of its command, while that runs; None: unknown, or not to be signalled.
        self.group: int | None = None
        # In ticks: no process of it is older.
        self.born = ticks() - 1

        # Seconds of time.monotonic(); inf: not yet.
        self.typed_at = math.inf
        self.started_at = math.inf
        # Then we stop waiting for what still writes.
        self.settled_by = math.inf
        # Seconds: for a pane, and from its start to its end.
        self.waited = time.monotonic() - asked_at
        self.duration = 0.0
        # The last line of the terminal when its time was over, if that is no output.
        self.terminal_line: str | None = None

    def _enter(self, phase: Phase) -> None:
        """Be in this phase from now on."""
        assert phase > self.phase, f"{self.phase.name} to {phase.name}"
        log.debug("run=%s phase=%s was=%s", self.run_id, phase.name, self.phase.name)
        self.phase = phase

    async def start(self) -> bool:
        """Type the line that runs it; whether it runs.  Raises NoTerminal, OSError."""
        # Its terminal may die while its start is recorded, or while the prompt is cleared.
        if self.phase is Phase.RELEASED:
            return False

        empty_state = await self.shell.clear(self.tmux)
        if self.phase is Phase.HELD:
            line = self._prepare(self.sandbox.open_folder())
            self._note_location()
            self._type(line, empty_state)

        return await self.started

    def _prepare(self, folder: RunFolder) -> str:
        """Make the files; the line that runs them."""
        with folder.made_by(os.stat(self.shell.pane.tty).st_uid):
            files = folder.open(self._on_report, self._on_all_read)
            self.files = files
            takes = {name: partial(self._take, take) for name, take in self.takes.items()}
            files.open(self.record, takes, self.fed)
            pane = self.shell.pane
            header = replacing(
                files.line(),
                self.request.cmd,
                column=self.shell.column(),
                width=pane.width,
                extra_rows=self.shell.extra_rows,
            )
            texts = go_script(
                self.request,
                files,
                self.run_id,
                self.sandbox.shell,
                header,
                is_lasting=self.record.is_lasting,
            )
            files.write(texts)

        return files.line()

    def _note_location(self) -> None:
        """Let a server that starts later find it."""
        assert self.files is not None
        location = Location(
            path=self.files.path,
            token=self.files.token,
            pane_id=self.shell.pane.pane_id,
            pane_pid=self.shell.pane.pid,
        )
        self.runs.located(self.run, location)

    def resume(self, folder: FoundFolder, pid: int, passed: float) -> None:
        """Go on with a run that another server has started, `passed` seconds ago.

        Raises OSError.
        """
        location = self.run.location
        assert location is not None
        self.files = folder.files_of(
            location.path, location.token, self._on_report, self._on_all_read
        )
        takes = {name: partial(self._take, take) for name, take in self.takes.items()}
        self.files.open(self.record, takes, fed=False)
        self._enter(Phase.SENT)
        # OSError: no descriptor is left, and a person sees nothing of it.
        with contextlib.suppress(OSError):
            self.view = View(self.shell.pane, self.request.cmd)

        seen = process(pid)
        self.born = seen.started_at - 1 if seen else 0
        self._on_start(pid)
        self.started_at -= passed

        # It may have ended since we looked.
        _, exit_code, _ = folder.noted(location.path)
        if exit_code is not None:
            self._on_report("exit", exit_code)

    @property
    def feed(self) -> Input | None:
        """Its stdin, if that comes from the caller."""
        return self.files.feed if self.files else None

    def _type(self, line: str, empty_state: str | None) -> None:
        """Have tmux type `line`, unless somebody has typed since; see `PaneShell.clear`."""
        pane = self.shell.pane
        self._enter(Phase.SENT)
        self.typed_at = time.monotonic()
        # None: something may stand at the prompt.
        clearing = CLEAR if empty_state is None else ()
        reply = self.tmux.send_keys(pane, empty_state, *clearing, line, "Enter")
        reply.add_done_callback(self._on_typed)

        # OSError: no descriptor is left, and a person sees nothing of it.
        with contextlib.suppress(OSError):
            self.view = View(pane, self.request.cmd)

        self._later(START_TIMEOUT, self.tick)

    def _on_typed(self, reply: asyncio.Future[list[str]]) -> None:
        if reply.exception():
            self.void()
            return

        was_refused = bool(reply.result())
        if was_refused:
            self.go_is_done = True
            self.release()

    def void(self) -> bool:
        """Before RUNNING: make sure that it never starts; False: it already has."""
        if self.phase is Phase.SENT and self.files and not self.files.void():
            return False
        self.release()
        return True

    def _take(self, take: Take, chunk: bytes) -> Awaitable[None] | None:
        if self.phase is Phase.SETTLING:
            self._wait_for_quiet(QUIET_TIME)
        if self.view:
            self.view.add(chunk)
        return take(chunk)

    def _on_report(self, word: str, number: int) -> None:
        """Take what go reports: `start` with its pid, `exit` with the code, `back`."""
        if word == "start" and self.phase is Phase.SENT:
            self._on_start(number)
        elif word == "exit" and self.phase is Phase.RUNNING:
            self._settle(number & 255)
        elif word == "exit" and self.phase is Phase.SENT and self.files:
            # It reports `back` next, and is released by that.
            self.cannot_begin = (
                "its shell cannot make the file of the process, or the process: see the terminal"
            )
            self.files.let_return()
        elif word == "back" and self.phase < Phase.RELEASED:
            self._on_back()

    def _on_start(self, pid: int) -> None:
        self._enter(Phase.RUNNING)
        self.started_at = time.monotonic()
        if self.files and self.files.folder.may_signal(pid):
            self.group = pid

        self.shell.ran_line()
        self._later(min(WATCH_PAUSE, self.request.timeout), self.tick)

        # It may have been cancelled before we knew whom to signal.
        if self.ending is not None:
            signal_group(self, signal.SIGTERM)

        if self.run.started_time is None:
            self.runs.started(self.run)
        if not self.started.done():
            self.started.set_result(True)

    def _on_back(self) -> None:
        """Go has returned: the prompt comes."""
        self.go_is_done = True
        if self.phase is Phase.RUNNING:
            # Another process has read the report from `status`.
            self.end("lost", "its shell did not report the end")
        # While it settles, what still writes is read first.
        if self.phase is not Phase.SETTLING:
            self.release()
            self.shell.back(self.tmux)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call that then.  A run has one timer: this replaces it."""
        self._stop_timer()
        self.timer = self.loop.call_later(seconds, call)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def tick(self) -> None:
        """Look now and then whether its shell lives, and whether its time is over."""
        # If our process was stopped for a while, its timers fire before its FIFOs are read.  A
        # report that waits by then was in time: so read it first.
        if self.phase >= Phase.SENT and self.files:
            self.files.folder.on_status()

        pause = WATCH_PAUSE
        if self.phase is Phase.RUNNING:
            pause = self._watch()
        elif self.phase < Phase.RUNNING:
            self._watch_start()

        if self.phase <= Phase.RUNNING:
            self._later(pause, self.tick)

    def _watch_start(self) -> None:
        """Give up a line that no shell runs."""
        is_wiped = self.files is not None and not self.files.folder.is_there()
        patience = START_TIMEOUT if self.shell.ran or is_wiped else NEW_SHELL_TIMEOUT
        age = time.monotonic() - self.typed_at
        if age < patience and not has_ended(self.shell.pane.pid):
            return

        may_have_started = not self.void()
        if may_have_started and age > patience + START_TIMEOUT:
            self.end("lost", "it never reported its start")

    def _watch(self) -> float:
        """End a command whose shell died, or whose time is over; seconds until the next look."""
        pane = self.shell.pane
        left = self.started_at + self.request.timeout - time.monotonic()
        if has_ended(pane.pid):
            died = f"{pane.window_name}, pane {pane.pane_id}, died"
            self.end("lost", "tmux has ended" if self.tmux.closed else died)
        elif left <= 0:
            self.end("timeout")
        elif self.view:
            self.view.write()

        # Once its time is over, only its shell is watched.
        return min(WATCH_PAUSE, left) if left > 0 else WATCH_PAUSE

    def end(self, ended: str, why: str = "") -> None:
        """End it; the first reason counts.

        A run that has not started is released at once, and never becomes `over`.
        """
        if self.phase is Phase.SETTLING:
            # It has ended by itself: the answer waits no longer for what still writes.
            self._finish()

        if self.phase >= Phase.OVER:
            return
        if self.phase < Phase.RUNNING:
            never_starts = self.void()
            if never_starts:
                return

        is_first = self.ended == "exit"
        if is_first:
            self.ended = ended
            self.why = why

        if ended == "lost":
            # Its terminal died: answer with what there is.
            self._note_end(128 + signal.SIGKILL)
            self._finish()
            self.ending = asyncio.ensure_future(climb(self, KILL_AT_ONCE))
            self.release()
        elif is_first:
            self.ending = asyncio.ensure_future(climb(self, TERM_THEN_KILL))

    def leave_nothing(self) -> None:
        """End whatever is left at its end: its caller is a shell that has gone."""
        self.leaves_nothing = True

    def _note_end(self, exit_code: int) -> None:
        self.exit_code = exit_code
        if self.started_at != math.inf:
            self.duration = time.monotonic() - self.started_at

    def _settle(self, exit_code: int) -> None:
        """The command has ended: it is over when no writer is left, or after some quiet."""
        self._note_end(exit_code)
        self._enter(Phase.SETTLING)
        self.settled_by = time.monotonic() + LATE_OUTPUT_TIMEOUT
        assert self.files is not None
        is_read = self.files.read_rest()
        if self.record.is_lasting:
            # Go waits twice.  This ends the first wait: the output is recorded.  `_show_end` ends
            # the other.
            self.files.let_return()
        if is_read:
            # If the outputs were closed before this report, it was called too early, to no effect.
            # If `read_rest` has just closed them, it was called then, and twice does no harm.
            self._on_all_read()
        else:
            self.files.keep()
            self._wait_for_quiet(FIRST_QUIET_TIME)

    def _on_all_read(self) -> None:
        """No writer is left."""
        if self.phase is Phase.SETTLING:
            # Before `_finish`, which saves the run: so the record is saved as complete.
            self.record.finish()
            self._finish()
        if self.over.is_set():
            self.runs.complete(self.run)
        # If it is not over, its exit report is still to come, see `_settle`; or this job never
        # started, and the driver may try its run again with another one.

    def _wait_for_quiet(self, seconds: float) -> None:
        left = self.settled_by - time.monotonic()
        self._later(min(seconds, left), self._on_quiet)

    def _on_quiet(self) -> None:
        # A slow reader is no quiet of the command's.
        is_paused = self.files is not None and self.files.is_paused()
        if is_paused and time.monotonic() < self.settled_by:
            self._wait_for_quiet(QUIET_TIME)
        else:
            self._finish()

    def _finish(self) -> None:
        """All that the answer needs is known."""
        if self.phase >= Phase.OVER:
            return

        self._enter(Phase.OVER)
        self._stop_timer()
        if self.files:
            self.files.finish()

        self.terminal.will_return(self.shell)
        self.how_it_ended = self.outcome()
        self.watch.end(self.how_it_ended)
        self.runs.end(self.run, self.how_it_ended)
        self.over.set()

        # A task: whoever waits for the answer comes first.
        self.showing_end = asyncio.ensure_future(self._show_end())

        if self.ending is None:
            # A command that only stopped would never be continued.
            if self.exit_code in STOPPED and self.group and not has_ended(self.group):
                self.ending = asyncio.ensure_future(climb(self, KILL_AT_ONCE))
            elif self.leaves_nothing:
                self.ending = asyncio.ensure_future(climb(self, TERM_THEN_KILL))

    def outcome(self) -> CommandResult:
        """How it ended, without its output."""
        code, error = ENDINGS[self.ended]
        return CommandResult(
            output="",
            exit_code=self.exit_code if code is None else code,
            ended=self.ended,
            error=error and error.format(timeout=self.request.timeout, why=self.why),
            truncated=not self.record.is_whole(self.request.max_output, self.record.total),
            output_bytes=self.record.total,
            duration_ms=round(self.duration * 1000),
            waited_ms=round(self.waited * 1000),
            terminal=self.terminal_line,
            run_id=self.run_id,
        )

    async def look_for_question(self) -> None:
        """Note the last line of its terminal, unless that is the command or its output."""
        # The pane may be gone, or tmux be slow: the answer does not depend on it.
        with contextlib.suppress(NoTerminal):
            text = await capture_pane(
                self.sandbox.socket_path, self.shell.pane.pane_id, timeout=QUESTION_TIMEOUT
            )
            line = text.rpartition("\n")[2]
            if self.view and not self.view.has_shown(line):
                self.terminal_line = line[:MAX_LINE]

    async def _show_end(self) -> None:
        """Show the end, and let the prompt come."""
        self._later(RETURN_TIMEOUT, self.release)

        # Whoever got the answer often waits for this very CPU: 5 % of a small command's time.
        os.sched_yield()
        end = self.how_it_ended or self.outcome()
        log.info(
            "exec end agent=%s run=%s ended=%s exit=%d ms=%d",
            self.request.agent_name,
            self.run_id,
            end.ended,
            end.exit_code,
            end.duration_ms,
        )
        if self.view:
            await self.view.end(self.exit_code)

        # By now it may have been released, and another run have its files.
        if self.files and self.phase is Phase.OVER:
            self.files.let_return()

        # Go did not wait for us: it came back while output was read, or its `read` knows no -t.
        if self.go_is_done and self.phase is Phase.OVER:
            self.release()
            self.shell.back(self.tmux)

    def release(self) -> None:
        """Give the pane back; the files go when no writer is left."""
        if self.phase is Phase.RELEASED:
            return

        was_over = self.phase is Phase.OVER
        was_typed = self.phase > Phase.HELD
        self._enter(Phase.RELEASED)
        self._stop_timer()

        # The view of a run that is over ends by itself.
        if self.view and not was_over:
            self.view.close()

        if self.files:
            self.files.release(
                has_run=self.started_at != math.inf,
                was_typed=was_typed,
                # `climb` finds its processes by the names of its files: no other run may have them.
                reusable=self.go_is_done and self.ending is None,
            )

        # Let go of the callers that took output, or wait for the end.
        self.takes = {}
        self.watch = UNWATCHED
        if not self.started.done():
            # True if it was lost before it reported its start: it may have run, so nobody may try
            # it again.
            self.started.set_result(was_over)

        self.terminal.let_go(self.shell)
        self.on_release(self)

    async def result(self, patience: float | None = None) -> CommandResult:
        """How it ended; its output is in its record, and with whoever took it.

        Cancelling this cancels the command.
        patience  seconds, at most, until its callers have taken the rest of its output
        """
        try:
            await self.over.wait()
            outputs = self.files.outputs if self.files else []
            for output in outputs:
                if output.taking is not None:
                    await asyncio.wait_for(output.taking, patience)
        finally:
            # If it is not over, its caller has left.
            self.end("cancelled")

        return self.how_it_ended or self.outcome()

    def unattend(self) -> None:
        """Nobody waits for its end any more."""
        self.terminal.unattend(self.shell)

    def abandon(self) -> None:
        """Leave it to run for the next server."""
        if self.phase is Phase.RELEASED:
            return

        # Whether a line that is just typed has started, the next server will learn.
        if not self.started.done():
            self.started.set_result(True)

        self._enter(Phase.RELEASED)
        self._stop_timer()
        if self.view:
            self.view.close()
        self.terminal.let_go(self.shell)
        self.on_release(self)

    async def close(self) -> None:
        """It has ended, or is given up: leave nothing open."""
        self.release()
        if self.showing_end is not None:
            await asyncio.wait({self.showing_end})
        if self.view:
            self.view.close()

    def traits(self) -> RunTraits:
        """How its processes can be known."""
        path = self.files.path if self.files else ""
        return RunTraits(run_id=self.run_id, group=self.group, path=path, born=self.born)


async def over_within(job: Job, seconds: float) -> bool:
    """Wait for its end, `seconds` at most."""
    return await is_set_within(job.over, seconds)


def signal_group(job: Job, number: int) -> None:
    """Signal the command's process group.

    Without job control the command has no group of its own.
    """
    if job.group is None or job.phase is not Phase.RUNNING:
        return
    with contextlib.suppress(OSError):
        if os.getpgid(job.group) == job.group:
            os.killpg(job.group, number)


async def kill(job: Job, number: int) -> int:
    """Signal all its processes, wherever they are; how many there were."""
    signal_group(job, number)
    try:
        found = await processes_of(job.traits())
    except OSError:
        # No descriptor to look with: there may be some.
        return 1

    for pid in found:
        with contextlib.suppress(OSError):
            # Those in the group have got it: a second signal makes some programs exit at once.
            if os.getpgid(pid) != job.group or job.over.is_set():
                os.kill(pid, number)

    return len(found)


async def climb(job: Job, ladder: tuple[tuple[int, float], ...]) -> None:
    """End a run, and what escaped from it."""
    if job.ended == "timeout":
        await job.look_for_question()

    for number, patience in ladder:
        next_step = time.monotonic() + patience
        await kill(job, number)
        await over_within(job, patience)
        if not await kill(job, 0):
            break

        # What escaped has the rest of this step's time.
        await asyncio.sleep(next_step - time.monotonic())

    if not await over_within(job, RETURN_TIMEOUT):
        job.end("lost", "its shell does not report the end")


# ==========================================================================
# Driver
# ==========================================================================
# What embedders and handlers use: it starts runs, ends them, and goes on with those of servers that
# have gone.


def unstarted_result(run: Run, failure: BaseException) -> CommandResult:
    """How a run ended whose command was never run."""
    return CommandResult(
        output="",
        exit_code=ProxyError.exit_code,
        ended="cancelled",
        error=f"never started: {str(failure) or 'cancelled'}",
        run_id=run.run_id,
    )


def lost_result(run: Run, why: str) -> CommandResult:
    """How a run ended of which nothing more can be known."""
    return CommandResult(
        output="",
        exit_code=128 + signal.SIGKILL,
        ended="lost",
        error=LOST.format(why=why),
        truncated=not run.record.is_whole(run.max_output, run.record.total),
        output_bytes=run.record.total,
        duration_ms=round(run.duration() * 1000),
        waited_ms=run.waited_ms(),
        run_id=run.run_id,
    )


async def end_left_over(run_id: str, path: str) -> None:
    """End the processes of a run that nobody follows any more.

    path  of its files
    """
    traits = RunTraits(run_id=run_id, group=None, path=path, born=0)
    for number, patience in TERM_THEN_KILL:
        # No descriptor to look with: there may be some.
        with contextlib.suppress(OSError):
            found = await processes_of(traits)
            if not found:
                return
            for pid in found:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)

        await asyncio.sleep(patience)


class Collector:
    """Reads what a run has left that ended while no server was there, and notes its end."""

    def __init__(
        self,
        run: Run,
        location: Location,
        folder: FoundFolder,
        runs: RunList,
        watch: Watch,
        exit_code: int | None,
        ended_at: float,
    ) -> None:
        self.run = run
        self.runs = runs
        self.watch = watch
        self.folder = folder
        # None: its pane has died.
        self.exit_code = exit_code
        # Seconds of time.time().
        self.ended_at = ended_at
        self.files = folder.files_of(location.path, location.token, ignore, self._on_closed)
        self.closed = asyncio.Event()

    def start(self) -> None:
        """Do it apart from this task.  Raises OSError."""
        self.files.open(self.run.record, RECORD_ONLY, fed=False)
        self.folder.add(asyncio.ensure_future(self._run()))

    def _on_closed(self) -> None:
        self.closed.set()
        if self.run.result is not None:
            self.runs.complete(self.run)

    async def _run(self) -> None:
        self.files.read_rest()
        # Its shell, and those in the background that held the output for us.
        self.files.let_return(waiters=HOLDERS)
        if self.run.result is None:
            await is_set_within(self.closed, LATE_OUTPUT_TIMEOUT)
            result = self._result()
            self.watch.end(result)
            self.runs.end(self.run, result)
            if self.exit_code is None:
                await end_left_over(self.run.run_id, self.files.path)

        self.files.release(has_run=True, was_typed=True, reusable=False)
        if self.closed.is_set():
            self.runs.complete(self.run)

    def _result(self) -> CommandResult:
        run = self.run
        if self.exit_code is None:
            return lost_result(run, "its terminal died while no server was there")

        started_at = self.ended_at if run.started_time is None else run.started_time
        return CommandResult(
            output="",
            exit_code=self.exit_code,
            truncated=not run.record.is_whole(run.max_output, run.record.total),
            output_bytes=run.record.total,
            duration_ms=max(0, round((self.ended_at - started_at) * 1000)),
            waited_ms=run.waited_ms(),
            run_id=run.run_id,
        )


class PocketCoderDriver:
    """Runs commands in the tmux session `session_name` at the socket `socket_path`.

    Needs no running tmux: the first command makes what is missing.
    directory  where new terminals start; None: where tmux does
    runs_dir   for what its runs print; None: in the directory SOCKET.d
    keep       bytes of output that are kept, all runs together
    """

    # Closes it with the event loop.
    closer: asyncio.Task[None] | None = None

    def __init__(
        self,
        socket_path: str,
        session_name: str,
        directory: str | None = None,
        runs_dir: str | None = None,
        keep: int = DEFAULT_KEEP * MIB,
    ) -> None:
        if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f:.#=;$\\]{1,64}", session_name):
            expected = "a name of a tmux session without `:`, `.`, `#`, `=`, `;`, `$`, `\\`"
            raise complain("session_name", session_name, expected)
        check_text("socket_path", os.path.abspath(socket_path), "a path", MAX_SOCKET_PATH)
        self.socket_path = os.path.abspath(socket_path)
        self.session_name = session_name
        self.directory = directory
        folder = os.path.abspath(runs_dir or f"{self.socket_path}.d/runs")
        self.runs = RunList(Shelf(folder, keep, self.socket_path))
        # Called with the name of an agent when a command has given back one of its panes.
        self.release_listeners: list[Callable[[str], object]] = []
        self._reset()

    def _reset(self) -> None:
        self.sandbox = Sandbox(self.socket_path, self.session_name, self.directory, self._on_notice)
        # By agent.
        self.terminals: dict[str, Terminal] = {}
        # Those that hold a pane, by run_id; the newest is the last.
        self.running: dict[str, Job] = {}
        # Tasks that start runs which outlive their callers, by run_id, until these run.
        self.launched: dict[str, asyncio.Task[None]] = {}
        # Of servers that have gone, by path.
        self.found_folders: dict[str, FoundFolder] = {}
        # Tasks that end what is left of lost runs.
        self.ending = set[asyncio.Task[None]]()

    def session_exists(self, session: str) -> bool:
        """Whether tmux has a session of exactly this name.  Raises NoTerminal."""
        return self.sandbox.has_session(session)

    def terminal(self, agent_name: str) -> Terminal:
        """This agent's, which need not exist yet."""
        self._arrange_close()
        if agent_name not in self.terminals:
            self.terminals[agent_name] = Terminal(self.sandbox, f"{agent_name}:terminal")
        return self.terminals[agent_name]

    def _arrange_close(self) -> None:
        """Close when the event loop does: with the next one it starts anew."""
        if self.closer is None:
            self.closer = asyncio.ensure_future(self._wait_and_close())

    async def _wait_and_close(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await self.close()
            self.closer = None
            self._reset()

    async def exec(self, cmd: str, cwd: str | None, agent_name: str) -> CommandResult:
        """Run `cmd` in the agent's terminal and wait for its end.

        cwd  absolute; None: wherever the terminal is now
        See ExecRequest for the limits.  Raises BadMessage, NoTerminal.
        """
        return await self.run(ExecRequest(cmd, cwd or "", agent_name=agent_name))

    async def run(self, request: ExecRequest) -> CommandResult:
        """The same for a request.  Cancelling this cancels the command."""
        run = self.runs.open(request, UNWATCHED.door)
        try:
            job = await self.start(request, RECORD_ONLY, run=run)
            result = await job.result()
            return replace(result, output="".join(run.text()))
        finally:
            self.runs.answered(run)

    async def start(
        self,
        request: ExecRequest,
        takes: Takes,
        fed: bool = False,
        watch: Watch = UNWATCHED,
        run: Run | None = None,
    ) -> Job:
        """Start a command; return when it runs.

        takes  {"out"} for both streams, or {"out", "err"}
        fed    its stdin is what the job's `feed` gets
        run    of the list `runs`; None: a new one, whose output nobody needs from there
        Raises NoTerminal, and what `watch` raises: then it is not in the list any more, unless it
        outlives its caller.
        """
        if run is None:
            run = self.runs.open(request, watch.door)
            self.runs.answered(run)

        try:
            return await self._start(run, request, takes, fed, watch)
        except BaseException as failure:
            self._settle_failed_start(run, failure)
            raise

    async def _start(
        self, run: Run, request: ExecRequest, takes: Takes, fed: bool, watch: Watch
    ) -> Job:
        terminal = self.terminal(request.agent_name)
        asked_at = time.monotonic()
        is_told = False
        job = None
        why = ""

        try:
            for attempt in range(START_TRIES):
                shell, tmux = await terminal.take()
                run.got_pane(time.monotonic() - asked_at)
                job = Job(
                    terminal=terminal,
                    shell=shell,
                    tmux=tmux,
                    request=request,
                    run=run,
                    takes=takes,
                    fed=fed,
                    asked_at=asked_at,
                    runs=self.runs,
                    watch=watch,
                    on_release=self._on_release,
                )
                self.running[run.run_id] = job
                if run.is_lasting and run.is_answered:
                    job.unattend()

                try:
                    if not is_told:
                        await watch.start(run.run_id)
                        is_told = True

                    why = await self._try(job)
                except BaseException:
                    # Whatever it is, the pane is given back.
                    job.end("cancelled")
                    raise

                if not why:
                    return job

                # The first time its files may just have been wiped; after the second, give up.
                if job.cannot_begin and attempt > 0:
                    break

            raise NoTerminal(why)
        except BaseException as failure:
            reports_its_end = job is not None and (job.over.is_set() or job.ending is not None)
            if is_told and not reports_its_end:
                watch.end(unstarted_result(run, failure))

            raise

    def _settle_failed_start(self, run: Run, failure: BaseException) -> None:
        """Its request failed, or was cancelled.

        If it has ended, or is being ended, it has started after all.  If it never started, it goes
        out of the list; but one that its caller knows of stays there, as ended.
        """
        job = self.running.get(run.run_id)
        if run.state is RunState.ENDED or (job is not None and job.ending is not None):
            return

        if run.is_answered and run.is_lasting:
            self.runs.end(run, unstarted_result(run, failure))
            self.runs.complete(run)
        else:
            self.runs.forget(run)

    def launch(self, request: ExecRequest, watch: Watch) -> Run:
        """Start a command that goes on without its caller; see `Run.needs_no_wait`, `Run.failure`.

        The caller calls `unattend` when it has its answer, or goes.
        """
        run = self.runs.open(request, watch.door)
        task = asyncio.ensure_future(self._start_launched(run, request, watch))
        self.launched[run.run_id] = task
        task.add_done_callback(lambda _: self.launched.pop(run.run_id, None))
        return run

    async def _start_launched(self, run: Run, request: ExecRequest, watch: Watch) -> None:
        """Start a run; why it could not be started is noted for its caller."""
        try:
            await self.start(request, RECORD_ONLY, watch=watch, run=run)
        except ProxyError as failure:
            self._could_not_start(run, failure)
        except asyncio.CancelledError:
            self._could_not_start(run, NoTerminal("ended before its start"))
            raise
        except Exception as fault:
            log.exception("run=%s could not be started", run.run_id)
            self._could_not_start(run, ProxyError(f"a fault of the proxy: {fault}"))

    def _could_not_start(self, run: Run, failure: ProxyError) -> None:
        job = self.running.get(run.run_id)
        # With a result or a job it has started after all: then its end is what counts.
        if run.result is None and job is None:
            run.fail(failure)

    def save_waiting(self, run: Run) -> None:
        """Save a run that still waits: its caller will come back, perhaps to the next server."""
        if run.state is RunState.WAITING and run.failure is None:
            self.runs.save(run)

    def unattend(self, run: Run) -> None:
        """The caller of a run that goes on has its answer, or has gone."""
        self.runs.answered(run)
        job = self.running.get(run.run_id)
        if job is not None:
            job.unattend()

    def end_run(self, run: Run, why: str = "") -> None:
        """End a run, with TERM and then KILL, whether it has started or not.  Raises BadMessage.

        why  for its caller
        """
        job = self.running.get(run.run_id)
        starting = self.launched.get(run.run_id)
        if job is not None and job.phase >= Phase.RUNNING:
            job.end("cancelled", f": {why}" if why else "")
        elif starting is not None:
            starting.cancel()
        elif job is None and run.state is RunState.WAITING:
            raise complain("run_id", run.run_id, "not one that waits: its caller can leave")

    def signal_run(self, run: Run, number: int) -> None:
        """Send a signal to the process group of a command that runs.  Raises BadMessage."""
        job = self.running.get(run.run_id)
        if job is None or job.phase is not Phase.RUNNING:
            raise complain("run_id", run.run_id, "a command that runs now")
        signal_group(job, number)

    async def _try(self, job: Job) -> str:
        """Start it in its pane; why that failed; "": it runs, or has ended."""
        try:
            if await job.start():
                return ""
        except (NoTerminal, OSError) as failure:
            # No space, no descriptors; or the terminal has just died.
            job.terminal.look_again()
            why = f"cannot prepare a run in {self.socket_path}.d: {failure}"
            # Most likely this only gives the pane back; it is lost if its line may have started.
            job.end("lost", why)
            if job.over.is_set():
                return ""

            await asyncio.sleep(RETRY_PAUSE)
            return why

        if not job.go_is_done:
            job.shell.did_not_answer()

        if job.cannot_begin and job.files:
            return f"cannot begin a run in {job.files.path}: {job.cannot_begin}"

        return job.terminal.no_answer()

    def _on_release(self, job: Job) -> None:
        """It holds no pane any more."""
        del self.running[job.run_id]
        for listener in self.release_listeners:
            listener(job.request.agent_name)

    def listen(self, on_release: Callable[[str], object]) -> None:
        """Have the names of agents reported that have got back a pane from a command."""
        self.release_listeners.append(on_release)

    # --- Runs of servers that have gone.

    async def adopt(self, watch_of: Callable[[Run], Watch] = lambda run: UNWATCHED) -> None:
        """Go on with the lasting runs of servers of this socket that have gone.

        watch_of  who follows a run from now on
        """
        found = self.runs.take_over()
        if not found:
            return

        self._arrange_close()
        # All are locked before the first of them is used: to connect to tmux makes a directory for
        # new runs, and that drains all that nobody has locked.
        for path in {os.path.dirname(run.location.path): None for run in found if run.location}:
            folder = FoundFolder.at(path, f"{self.socket_path}.d")
            if folder is not None:
                self.found_folders[path] = folder

        for run in found:
            watch = watch_of(run)
            try:
                await self._adopt_one(run, watch)
            except (NoTerminal, OSError, RuntimeError, ValueError) as failure:
                log.warning("run=%s cannot be taken over: %s", run.run_id, failure)
                self._lose(run, watch, f"it cannot be taken over ({failure})")

        for folder in self.found_folders.values():
            folder.start()

    async def _adopt_one(self, run: Run, watch: Watch) -> None:
        """Go on with one run.  Raises NoTerminal, OSError, RuntimeError, ValueError."""
        location = run.location
        if location is None:
            self._end_unstarted(run, watch)
            return

        folder = self.found_folders.get(os.path.dirname(location.path))
        if folder is None:
            self._lose(run, watch, "its files are gone")
            return
        if not folder.has_files(location.path, location.token):
            self._lose(run, watch, "its files belong to a later run")
            return

        pid, exit_code, ended_at = folder.noted(location.path)
        if pid is None:
            folder.drop(location.path)
            self._end_unstarted(run, watch)
            return

        log.info("run=%s taken over state=%s", run.run_id, run.state.value)
        if run.result is None and exit_code is None:
            pane = await self._pane_of(run, location)
            if pane is not None:
                self._resume(run, folder, watch, pid, *pane)
                return

        collector = Collector(
            run, location, folder, self.runs, watch, exit_code=exit_code, ended_at=ended_at
        )
        collector.start()

    def _end_unstarted(self, run: Run, watch: Watch) -> None:
        """Its server has gone before it could start."""
        if run.result is None:
            result = unstarted_result(run, NoTerminal("its server ended before it could start"))
            watch.end(result)
            self.runs.end(run, result)
        self.runs.complete(run)

    async def _pane_of(
        self, run: Run, location: Location
    ) -> tuple[Terminal, PaneShell, Tmux] | None:
        """Where a run goes on; None: its pane has died.  Raises NoTerminal, OSError."""
        if has_ended(location.pane_pid):
            return None
        if not await asyncio.to_thread(self.sandbox.has_session, self.session_name):
            return None
        terminal = self.terminal(run.agent_name)
        found = await terminal.find(location.pane_id, location.pane_pid)
        return None if found is None else (terminal, *found)

    def _resume(
        self,
        run: Run,
        folder: FoundFolder,
        watch: Watch,
        pid: int,
        terminal: Terminal,
        shell: PaneShell,
        tmux: Tmux,
    ) -> None:
        """Follow a run that goes on to its end.  Raises OSError."""
        job = Job(
            terminal=terminal,
            shell=shell,
            tmux=tmux,
            request=run.request(),
            run=run,
            takes=RECORD_ONLY,
            fed=False,
            asked_at=time.monotonic() - run.waited_ms() / 1000,
            runs=self.runs,
            watch=watch,
            on_release=self._on_release,
        )
        self.running[run.run_id] = job
        try:
            # Of its time, some is over.
            job.resume(folder, pid, run.duration())
        except BaseException:
            job.abandon()
            folder.let_go(job.files)
            raise

    def _lose(self, run: Run, watch: Watch, why: str) -> None:
        """Nothing more can be known of it; what is left of it is ended."""
        if run.result is None:
            result = lost_result(run, why)
            watch.end(result)
            self.runs.end(run, result)
            path = run.location.path if run.location else ""
            self.ending.add(asyncio.ensure_future(end_left_over(run.run_id, path)))
        self.runs.complete(run)

    async def windows(self) -> dict[str, list[Pane]]:
        """The panes of each agent's window, by agent; makes nothing.  Raises NoTerminal."""
        self.terminal(default_agent_name())
        return await self.sandbox.windows()

    async def window(self, agent_name: str) -> list[Pane]:
        """The panes of this agent's window.  Raises NoTerminal."""
        windows = await self.windows()
        if agent_name not in windows:
            raise NoTerminal(
                f"`agent_name`: got {agent_name}, which has no terminal yet: run a command there"
                " first"
            )
        return windows[agent_name]

    def jobs_of(self, agent_name: str) -> dict[str, Job]:
        """The commands that run in this agent's window, by pane; the newest is the last."""
        return {
            job.shell.pane.pane_id: job
            for job in self.running.values()
            if job.request.agent_name == agent_name
        }

    async def list_terminals(self) -> list[Message]:
        """Each agent's terminal, and its newest command or what else runs there.

        Raises NoTerminal.
        """
        found = []
        for agent_name, panes in sorted((await self.windows()).items()):
            jobs = self.jobs_of(agent_name)
            newest = next(reversed(jobs), "")
            pane = next((pane for pane in panes if pane.pane_id == newest), panes[0])
            front = foreground_of(pane)
            found.append(
                {
                    "agent_name": agent_name,
                    "busy": bool(jobs) or any(not is_idle(pane) for pane in panes),
                    "command": front.name if front else "",
                    "columns": pane.width,
                    "lines": pane.height,
                }
            )

        return found

    async def read_terminal(self, agent_name: str, lines: int) -> str:
        """The last `lines` of each pane that has something in it, wrapped ones joined.

        Raises NoTerminal.
        """
        panes = await self.window(agent_name)
        texts = dict[Pane, str]()

        for pane in panes:
            text = await capture_pane(self.socket_path, pane.pane_id, lines)

            # A prompt alone is nothing to read.
            if "\n" in text or not is_idle(pane):
                texts[pane] = "\n".join(text.split("\n")[-lines:])

        if not texts:
            return await capture_pane(self.socket_path, panes[0].pane_id)
        if len(texts) == 1:
            return next(iter(texts.values()))

        return "\n".join(f"[{title_of(pane)}]\n{text}" for pane, text in texts.items())

    async def send_keys(
        self, agent_name: str, text: str, keys: list[str], run_id: str | None = None
    ) -> str:
        """Type `text`, then press `keys`, see KEY; what the terminal shows a moment later.

        run_id  into the pane of this command; None: into the program that somebody started in the
                terminal, else into the newest command, else at the prompt
        Raises NoTerminal, BadMessage.
        """
        pane = await self.type_keys(agent_name, text, keys, run_id)
        await asyncio.sleep(SHOW_PAUSE)

        try:
            return await capture_pane(self.socket_path, pane.pane_id)
        except NoTerminal:
            return f"[pane {pane.pane_id} has ended]"

    async def type_keys(
        self, agent_name: str, text: str, keys: list[str], run_id: str | None = None
    ) -> Pane:
        """Type `text`, then press `keys`, as `send_keys`; the pane that took them."""
        terminal = self.terminal(agent_name)

        # Otherwise it might wait behind commands that wait for keys.
        if run_id is None and not (terminal.waiting and terminal.shells):
            await terminal.open()

        pane = self._target(await self.window(agent_name), self.jobs_of(agent_name), run_id)
        tmux = await self.sandbox.connect(terminal.name)
        await tmux.type(pane, text, keys)
        return pane

    @staticmethod
    def _target(panes: list[Pane], jobs: dict[str, Job], run_id: str | None) -> Pane:
        """Where keys go, see `send_keys`.  Raises BadMessage."""
        if run_id is not None:
            for pane in panes:
                job = jobs.get(pane.pane_id)
                if job is not None and job.run_id == run_id:
                    return pane

            raise complain("run_id", run_id, "a command that runs in this agent's terminal now")

        programs = [pane for pane in panes if pane.pane_id not in jobs and runs_program(pane)]
        # A server that was killed may have left some.
        commands = [pane for pane in programs if runs_command_of_ours(pane)]
        of_people = [pane for pane in programs if pane not in commands]
        newest = next(reversed(jobs), None)
        if of_people:
            # The one that was started last.
            return max(of_people, key=age_rank)
        if newest is not None:
            return next((pane for pane in panes if pane.pane_id == newest), panes[0])

        return max(commands, key=age_rank, default=panes[0])

    def _on_notice(self) -> None:
        """Something may have died."""
        for terminal in self.terminals.values():
            terminal.freed.set()
        for job in self.jobs():
            job.tick()

    async def close(self, grace: float = 0.0) -> None:
        """Take no more commands, give the running ones `grace` seconds, cancel the rest."""
        self.sandbox.stopping = True
        for terminal in self.terminals.values():
            terminal.stop()

        # A run that outlives us is left to the next server, and its caller learns that.  One that
        # is being ended is not left: only we know why.
        left = set[str]()
        for job in self.jobs():
            is_underway = job.phase >= Phase.SENT and not job.over.is_set()
            if job.record.is_lasting and is_underway and job.ending is None:
                job.abandon()
                self.runs.save(job.run)
                left.add(job.run.run_id)
        for run in self.runs.unfinished():
            run.let_callers_go()

        await asyncio.gather(*(over_within(job, grace) for job in self.jobs()))
        for run_id, starting in [*self.launched.items()]:
            if run_id not in left:
                starting.cancel()

        jobs = self.jobs()
        for job in jobs:
            job.end("cancelled")

        endings = [job.ending for job in jobs if job.ending is not None]
        await asyncio.gather(*endings, return_exceptions=True)
        for job in jobs:
            await job.close()

        for task in self.ending:
            task.cancel()
        for folder in self.found_folders.values():
            folder.close()
        await self.sandbox.close()
        self.runs.close()
        self._reset()
        self.sandbox.stopping = True

    @property
    def stopping(self) -> bool:
        """Whether it takes no more commands."""
        return self.sandbox.stopping

    def running_now(self) -> int:
        """How many commands run."""
        return len([job for job in self.jobs() if Phase.SENT <= job.phase < Phase.OVER])

    def waiting_now(self) -> int:
        """How many commands wait for a pane."""
        return sum(terminal.waiting for terminal in self.terminals.values())

    def terminals_now(self) -> int:
        """How many agents' terminals were used."""
        return len([terminal for terminal in self.terminals.values() if terminal.shells])

    def check_files(self) -> None:
        """Raise NoTerminal or OSError if no run could have its files now.  Makes nothing."""
        self.sandbox.check_files()

    def check_runs(self) -> None:
        """Raise OSError if no output of a run could be kept now.  Makes nothing."""
        self.runs.shelf.check()

    async def check_tmux(self) -> None:
        """Raise NoTerminal if tmux is missing or does not answer soon.  Makes nothing."""
        await self.sandbox.check_tmux()

    def jobs(self) -> list[Job]:
        """All that hold a pane."""
        return [*self.running.values()]


# ==========================================================================
# Screens
# ==========================================================================
# What terminals show, for people who watch them from elsewhere.
#
# X1  Soon after the last watcher has left, nothing runs for it.  One picture serves all who watch a
#     terminal.
# X2  A picture is taken only after something changed, and ten times a second at most.
# X3  A slow reader misses pictures; of each terminal only the newest waits for it.
# X4  Of the escape sequences in a picture only those for colours are left.

# One for colours and the like; the two that switch to line drawing and back; any other sequence,
# and control characters.
SEQUENCE = re.compile(
    r"(?P<colour>\x1b\[[0-9;:]{0,80}m)"
    r"|(?P<shift>[\x0e\x0f])"
    r"|\x1b\[[0-?]*[ -/]*[@-~]?"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]?"
    r"|[\0-\x1f\x7f-\x9f]"
)
# What stands for what in the character set for line drawing, terminfo(5), acsc.
LINE_DRAWING = str.maketrans("`afgijklmnopqrstuvwxyz{|}~+,-.0", "◆▒°±␋┘┐┌└┼⎺⎻─⎼⎽├┤┴┬│≤≥π≠£·→←↑↓█")


def plain_text(rows: list[str]) -> str:
    """Rows of a picture as one text, with no escape sequences but those for colours.

    What a colour is set to goes on into the next row.
    """
    draws_lines = False
    shown = []

    for row in rows:
        parts = []
        at = 0
        for found in SEQUENCE.finditer(row):
            piece = row[at : found.start()]
            parts.append(piece.translate(LINE_DRAWING) if draws_lines else piece)
            parts.append(found["colour"] or "")
            at = found.end()
            if found["shift"]:
                draws_lines = found["shift"] == "\x0e"

        piece = row[at:]
        parts.append(piece.translate(LINE_DRAWING) if draws_lines else piece)
        shown.append("".join(parts))

    return "\n".join(shown).rstrip("\n")


def screen_of(agent_name: str, panes: list[Message], pictures: list[Picture]) -> Message:
    """What all who watch an agent's terminal get.

    panes  what else is known of the pane of each picture
    """
    shown = []
    cursor: Message | None = None

    for pane, picture in zip(panes, pictures):
        shown.append(
            {
                "pane_id": picture.pane_id,
                "left": picture.left,
                "top": picture.top,
                "columns": picture.width,
                "lines": picture.height,
                "cursor_column": picture.cursor_x,
                "cursor_line": picture.cursor_y,
                **pane,
                "text": plain_text(picture.rows),
            }
        )
        if picture.is_active and picture.has_cursor:
            cursor = {
                "pane_id": picture.pane_id,
                "column": picture.cursor_x,
                "line": picture.cursor_y,
            }

    return {
        "agent_name": agent_name,
        "columns": max((each.left + each.width for each in pictures), default=0),
        "lines": max((each.top + each.height for each in pictures), default=0),
        "cursor": cursor,
        "panes": shown,
    }


class ScreenReader:
    """One who watches terminals: of each the newest picture that has not been read yet."""

    def __init__(self) -> None:
        # Events of a stream, by agent.
        self.unread: dict[str, str] = {}
        self.came = asyncio.Event()
        # No more will come.
        self.ended = False

    def show(self, agent_name: str, event: str) -> None:
        """A new picture takes the place of one that has not been read."""
        self.unread[agent_name] = event
        self.came.set()

    def end(self) -> None:
        self.ended = True
        self.came.set()

    async def next(self, seconds: float) -> list[str]:
        """The pictures that are new, after `seconds` none."""
        await is_set_within(self.came, seconds)
        self.came.clear()
        events = [*self.unread.values()]
        self.unread.clear()
        return events


class Screen:
    """What one agent's terminal shows, while somebody watches it."""

    def __init__(self, screens: Screens, agent_name: str) -> None:
        self.screens = screens
        self.agent_name = agent_name
        self.readers: set[ScreenReader] = set()
        # The ids of its panes when they were looked at.
        self.pane_ids: set[str] = set()
        # The newest picture, as an event of a stream; "": there is none yet.
        self.event = ""
        self.changed = asyncio.Event()
        self.changed.set()
        self.following = asyncio.ensure_future(self._follow())

    def add(self, reader: ScreenReader) -> None:
        self.readers.add(reader)
        if self.event:
            reader.show(self.agent_name, self.event)

    async def _follow(self) -> None:
        while True:
            await is_set_within(self.changed, SCREEN_CHECK if self.pane_ids else ABSENT_CHECK)
            await asyncio.sleep(SCREEN_SETTLE)
            self.changed.clear()

            screen = await self._look()
            event = f"event: screen\ndata: {json.dumps(screen, ensure_ascii=False)}\n\n"
            if event != self.event:
                self.event = event
                for reader in self.readers:
                    reader.show(self.agent_name, event)

            await asyncio.sleep(SCREEN_PAUSE)

    async def _look(self) -> Message:
        """The screen now; one without panes where there is no terminal."""
        try:
            panes = (await self.screens.driver.windows()).get(self.agent_name, [])
            self.pane_ids = {pane.pane_id for pane in panes}
            if not panes:
                return screen_of(self.agent_name, [], [])

            # Before the picture: what comes later is reported.
            await self.screens.listen_to(self.pane_ids)
            pictures = await self.screens.pictures(panes)
        except (NoTerminal, ValueError) as failure:
            # It is just ending, or changing: ValueError is a pane that tmux cannot describe.
            log.debug("no picture agent_name=%s: %s", self.agent_name, failure)
            self.pane_ids = set()
            return screen_of(self.agent_name, [], [])

        by_id = {pane.pane_id: pane for pane in panes}
        known = [self._known(by_id[picture.pane_id]) for picture in pictures]
        return screen_of(self.agent_name, known, pictures)

    def _known(self, pane: Pane) -> Message:
        """What runs in a pane."""
        job = self.screens.driver.jobs_of(self.agent_name).get(pane.pane_id)
        front = foreground_of(pane)
        return {
            "command": front.name if front else "",
            "run_id": job.run_id if job else None,
        }

    def stop(self) -> None:
        self.following.cancel()


class Screens:
    """The terminals that somebody watches, and the connection that reports their changes."""

    def __init__(self, driver: PocketCoderDriver) -> None:
        self.driver = driver
        self.readers: set[ScreenReader] = set()
        # By agent.
        self.screens: dict[str, Screen] = {}
        self.output: OutputWatch | None = None
        self.opening = asyncio.Lock()
        self.taking = asyncio.Semaphore(SCREENS_AT_ONCE)
        # The last thing that a terminal prints comes a moment before that.
        driver.listen(self._on_release)

    @contextlib.asynccontextmanager
    async def watch(self, agent_names: Sequence[str]) -> AsyncIterator[ScreenReader]:
        """Watch the terminals of these agents.  Raises TooMany, NoSuchPath, NoTerminal."""
        if len(self.readers) >= MAX_WATCHERS:
            raise TooMany(f"{MAX_WATCHERS} watch terminals already: close another page")

        reader = ScreenReader()
        # It counts while we look, since others come meanwhile.
        self.readers.add(reader)

        try:
            windows = await self.driver.windows()
            for agent_name in agent_names:
                if agent_name not in windows:
                    raise NoSuchPath(
                        f"agent {agent_name} has no terminal yet: see GET /terminals, or run a"
                        " command there"
                    )

            for agent_name in agent_names:
                if agent_name not in self.screens:
                    self.screens[agent_name] = Screen(self, agent_name)

                self.screens[agent_name].add(reader)

            yield reader
        finally:
            self._remove(reader)

    def _remove(self, reader: ScreenReader) -> None:
        self.readers.discard(reader)
        for agent_name, screen in [*self.screens.items()]:
            screen.readers.discard(reader)
            if not screen.readers:
                screen.stop()
                del self.screens[agent_name]

        if reader.ended:
            # The server stops.
            self._close_unused()
        else:
            asyncio.get_running_loop().call_later(WATCH_LINGER, self._close_unused)

    def _close_unused(self) -> None:
        """Close the connection if nobody watches any more."""
        if not self.screens and self.output is not None:
            self.output.close()
            self.output = None

    async def listen_to(self, pane_ids: set[str]) -> None:
        """From now on have it reported when these panes print something.  Raises NoTerminal."""
        async with self.opening:
            if self.output is None or self.output.closed:
                self.output = await OutputWatch.open(
                    self.driver.socket_path,
                    self.driver.session_name,
                    self._on_output,
                    self._on_notice,
                )

            output = self.output

        await output.resume([*pane_ids])

    async def pictures(self, panes: list[Pane]) -> list[Picture]:
        """What these panes of one window show.  Raises NoTerminal."""
        async with self.taking:
            return await capture_pictures(self.driver.socket_path, [pane.pane_id for pane in panes])

    def _on_release(self, agent_name: str) -> None:
        screen = self.screens.get(agent_name)
        if screen is not None:
            screen.changed.set()

    def _on_output(self, pane_id: str) -> None:
        for screen in self.screens.values():
            if pane_id in screen.pane_ids:
                screen.changed.set()

    def _on_notice(self) -> None:
        """Windows or panes came or went, or the connection has ended."""
        for screen in self.screens.values():
            screen.changed.set()

    def close(self) -> None:
        """Nobody can watch any more."""
        for reader in self.readers:
            reader.end()


# ==========================================================================
# Audit log
# ==========================================================================
# U1  One line is written before a command starts, and one before its end is answered.
# U2  While a line cannot be written, no command starts.
class AuditLog:
    """JSON lines in the file `path`: one before a command starts, one before its end is answered.

    path  "": none is kept
    What cannot be written waits, and no command starts until it is written: so little waits.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        # -1: it is not open.
        self.fd = -1
        # Seconds that an answer waits for its line.
        self.patience = AUDIT_TIMEOUT
        # Whole lines, and how much of the first one is in the file.
        self.unwritten = b""
        self.sent = 0

    async def start(self, fields: Message) -> None:
        """Write the line of a start.  Raises NoAudit."""
        if not self.path:
            return

        self.flush()
        line = self._line("start", fields)
        self.unwritten += line
        try:
            self.flush()
        except NoAudit:
            # Nothing is run; but a line that was begun is completed.
            if self.unwritten == line and not self.sent:
                self.unwritten = b""

            raise

        await self.written()

    def end(self, fields: Message) -> None:
        """Write the line of an end; see `written`."""
        if self.path:
            self.unwritten += self._line("end", fields)
            self._flush_or_log()

    def hurry(self, seconds: float) -> None:
        """Let answers wait so long, at most, from now on: the server stops."""
        self.patience = seconds

    def _flush_or_log(self) -> None:
        """Write what waits.  A failure is logged; the next line brings another try."""
        try:
            self.flush()
        except NoAudit as wrong:
            log.error("%s", wrong)

    async def written(self) -> None:
        """Wait until all is written: a full pipe may be read, a full disk may get space again.

        Raises NoAudit.
        """
        deadline = time.monotonic() + self.patience
        failure = self._refuse("its reader does not read")

        while self.unwritten:
            await asyncio.sleep(AUDIT_PAUSE)
            try:
                self.flush()
            except NoAudit as wrong:
                failure = wrong

            if self.unwritten and time.monotonic() > deadline:
                raise failure

    def _line(self, event: str, fields: Message) -> bytes:
        fields = {"time": timestamp(time.time()), "event": event, **fields}
        return json.dumps(fields).encode() + b"\n"

    def _refuse(self, why: str) -> NoAudit:
        return NoAudit(
            f"cannot write the audit log {self.path}: {why}; no command runs until this is fixed"
        )

    def flush(self) -> None:
        """Write what waits, as far as a pipe takes it.  Raises NoAudit."""
        try:
            # Somebody has removed it.
            if self.fd >= 0 and not os.fstat(self.fd).st_nlink:
                self._close()

            if self.fd < 0:
                self._open()

            while self.unwritten:
                self.sent += os.write(self.fd, self.unwritten[self.sent :])
                done = self.unwritten.rfind(b"\n", 0, self.sent) + 1
                self.unwritten = self.unwritten[done:]
                self.sent -= done
        except BlockingIOError:
            # A pipe, and full.
            pass
        except OSError as wrong:
            raise self._refuse(wrong.strerror or str(wrong)) from None

    def check(self) -> None:
        """Raise OSError if a line could not be written now, see `try_file`.  Changes nothing."""
        if not self.path:
            return

        if self.fd >= 0 and os.fstat(self.fd).st_nlink:
            try_file(self.fd)
        elif not os.path.lexists(self.path):
            try_folder(os.path.dirname(os.path.abspath(self.path)))
        elif not stat.S_ISFIFO(os.lstat(self.path).st_mode):
            # The reader of a FIFO would notice.
            os.close(os.open(self.path, self._flags()))

    def _flags(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK

        # No link, which somebody else may have put there; but /dev/stderr is one.
        if not self.path.startswith("/dev/"):
            flags |= os.O_NOFOLLOW

        return flags

    def _open(self) -> None:
        self.fd = os.open(self.path, self._flags() | os.O_CREAT, 0o600)

        try:
            self._complete_line()
        except OSError:
            # Another user's.
            self._close()
            raise

    def _complete_line(self) -> None:
        """Write whole lines from now on: another writer may have been killed in one of its own."""
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            return
        self.sent = 0
        os.fchmod(self.fd, 0o600)

        with open(f"/proc/self/fd/{self.fd}", "rb") as file:
            file.seek(max(0, found.st_size - 1))
            if file.read(1) not in (b"", b"\n"):
                os.write(self.fd, b"\n")

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def reopen(self) -> None:
        """Open the file anew, after a rotation."""
        with contextlib.suppress(NoAudit):
            self.flush()
        self._close()
        self._flush_or_log()


# ==========================================================================
# Readiness
# ==========================================================================
# Whether a command could run now.
#
# R1  A check changes nothing, and a person sees nothing of it.
# R2  There is one check at a time; its result serves whoever asks meanwhile or soon after.
# R3  A check ends, whatever tmux does.
# R4  Everybody may ask, so what is answered names no path; the log does.
class Readiness:
    """What keeps commands from running now.

    workspace  a real path
    """

    def __init__(self, workspace: str, driver: PocketCoderDriver, audit: AuditLog) -> None:
        self.workspace = workspace
        self.driver = driver
        self.audit = audit
        # What the last check found, and when it ended.
        self.problems: list[str] = []
        self.checked_at = -math.inf
        self.checking: asyncio.Task[None] | None = None

    async def problem(self) -> str:
        """What is wrong, in a sentence; "": nothing that can be seen."""
        if self.checking is None and time.monotonic() - self.checked_at > READY_KEPT:
            self.checking = asyncio.ensure_future(self._check())

        checking = self.checking
        if checking is not None:
            # A caller that leaves does not end it: others may wait for it too.
            await asyncio.wait({checking})
            checking.result()

        if self.driver.stopping:
            return "the server is stopping"

        return "; ".join(self.problems)

    async def _check(self) -> None:
        try:
            problems, details = await self._look()
        finally:
            self.checked_at = time.monotonic()
            self.checking = None

        if problems and problems != self.problems:
            log.warning("unready %s", key_values(reason="; ".join(details)))
        if self.problems and not problems:
            log.info("ready")

        self.problems = problems

    async def _look(self) -> tuple[list[str], list[str]]:
        """The problems that there are, for everybody and for the log."""
        problems = list[str]()
        details = list[str]()
        checks: dict[str, Callable[[], None]] = {
            "descriptors": check_descriptors,
            "the workspace": partial(check_workspace, self.workspace),
            "the audit log": self.audit.check,
            "the directory of the socket": self.driver.check_files,
            "the directory for runs": self.driver.check_runs,
        }

        for name, check in checks.items():
            try:
                check()
            except OSError as wrong:
                problems.append(f"{name}: {wrong.strerror or 'see the log'}")
                details.append(f"{name}: {wrong}")
            except NoTerminal as wrong:
                problems.append(f"{name}: expected one that only this user may write to")
                details.append(f"{name}: {wrong}")

        try:
            await self.driver.check_tmux()
        except NoTerminal as wrong:
            problems.append(str(wrong))
            details.append(str(wrong))

        return problems, details


def check_descriptors() -> None:
    """Raise OSError if too few descriptors are left for a run."""
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    check_descriptor(fd)


def check_workspace(path: str) -> None:
    """Raise OSError if commands cannot start in it."""
    # Only in a directory that we may enter.
    os.stat(f"{path}/.")


# ==========================================================================
# MCP messages
# ==========================================================================
# JSON-RPC in, decisions out: no await, no clock, no tmux, no Tornado.
#
# M1  The era is a property of each message, read from its body; headers only cross-check it.
# M2  A response has the id of its request, its type kept.
# M3  A legacy result has no modern field; a modern one has them all.
#
# To add a revision: a row in LEGACY or MODERN, rows in SINCE, its cases in `step`.

# The revisions with a handshake, the oldest first.
LEGACY = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
# The one without.
MODERN = "2026-07-28"

# Members of `_meta`.
NAMESPACE = "io.modelcontextprotocol/"
CLAIM = f"{NAMESPACE}protocolVersion"
CAPABILITIES = f"{NAMESPACE}clientCapabilities"
LOG_LEVEL = f"{NAMESPACE}logLevel"
SERVER_INFO = f"{NAMESPACE}serverInfo"
CLIENT_INFO = f"{NAMESPACE}clientInfo"
SUBSCRIPTION = f"{NAMESPACE}subscriptionId"

# The parameter that the header `Mcp-Name` repeats, by method.
ROUTED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}

# The methods with modern results that say how long they stay valid.
CACHED = {
    "server/discover",
    "tools/list",
    "prompts/list",
    "resources/list",
    "resources/templates/list",
    "resources/read",
}

# Characters that are no UTF-8, or that some clients of SSE take for ends of lines.
NOT_RAW = re.compile("[\ud800-\udfff\x85\u2028\u2029]")

LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")

# The revision that introduced a field.
SINCE = {
    "annotations": LEGACY[1],
    "title": LEGACY[2],
    "outputSchema": LEGACY[2],
    "structuredContent": LEGACY[2],
}


class Era(enum.Enum):
    """Which kind of MCP a message belongs to, or a server speaks."""

    # A session starts with a handshake; the revision is one of LEGACY.
    LEGACY = "legacy"
    # Every request carries its own envelope in `_meta`; the revision is MODERN.
    MODERN = "modern"


@dataclass(frozen=True)
class Facts:
    """What a server reports of itself."""

    name: str
    version: str
    instructions: str
    tools: tuple[Message, ...]


@dataclass(frozen=True)
class Send:
    """Send this to the client."""

    message: Message


@dataclass(frozen=True)
class CallTool:
    """Run a tool, then answer request `id` with its result."""

    id: str | int
    name: str
    arguments: Message
    # Of progress notifications; None: the client wants none.
    token: str | int | None


@dataclass(frozen=True)
class SetLevel:
    """Set the `level` of the session."""

    level: str


Decision = Send | CallTool | SetLevel


# Reading


def as_object(value: object) -> Message:
    """Return `value` if it is an object, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def in_json(value: object, limit: int) -> str:
    """Show what was got, as JSON and cut to `limit` characters, in a message for a person."""
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def without(fields: Message, *names: str) -> Message:
    return {name: value for name, value in fields.items() if name not in names}


def is_id(value: object) -> TypeGuard[str | int]:
    return type(value) in (str, int)


def parse_json(raw: bytes | str) -> tuple[object, list[str]]:
    """Parse JSON; also return the numbers in it that JSON does not have.

    Those are NaN and Infinity, which some writers use, and numbers that would become
    infinite.  Raises NotJson.
    """
    odd: list[str] = []

    def number(text: str, kind: Callable[[str], float] = float) -> float:
        value = kind(text)
        if value in (math.inf, -math.inf):
            odd.append(text)
        return value

    try:
        text = raw if isinstance(raw, str) else raw.decode()
        value = json.loads(
            text,
            parse_float=number,
            parse_int=partial(number, kind=whole),
            parse_constant=odd.append,
        )
    except (ValueError, RecursionError) as wrong:
        raise NotJson(f"message: expected JSON in UTF-8, got: {wrong}") from None

    return value, odd


def read_message(raw: bytes | str) -> Message:
    """Read one JSON-RPC message.

    Raises NotJson or NotAMessage, which report whether the message was a response.
    """
    got, odd = parse_json(raw)
    if not isinstance(got, dict):
        kind = type(got).__name__
        raise NotAMessage(f"message: got {kind}, expected an object: batches are not served")

    known_id = got["id"] if is_id(got.get("id")) else None
    in_response = "method" not in got and ("result" in got or "error" in got)
    if odd:
        fault = f"message: got {odd[0][:40]}, expected numbers valid in JSON"
        raise NotJson(fault, request_id=known_id, in_response=in_response)

    wrong_shape = fault_of_shape(got)
    if wrong_shape is not None:
        raise NotAMessage(wrong_shape, request_id=known_id, in_response=in_response)
    return got


def fault_of_shape(got: Message) -> str | None:
    """Say what keeps an object from being a JSON-RPC message, if anything does."""
    if got.get("jsonrpc") != "2.0":
        return "`jsonrpc`: expected the string 2.0"
    if "id" in got and not is_id(got["id"]):
        return "`id`: expected a string or an integer"

    if "method" not in got:
        has_one_outcome = ("result" in got) != ("error" in got)
        if "id" not in got or not has_one_outcome:
            return "`method`: got nothing, expected one, or an `id` with either `result` or `error`"
    elif not isinstance(got["method"], str):
        return "`method`: expected a string"

    if not isinstance(got.get("params", {}), dict):
        return "`params`: expected an object"
    return None


def is_request(message: Message) -> bool:
    return "method" in message and "id" in message


# Era


def has_claim(message: Message) -> bool:
    """Whether the body names a revision, as every modern request does."""
    meta = message.get("params", {}).get("_meta")
    return isinstance(meta, dict) and CLAIM in meta


def era_of(message: Message, header: str | None = None) -> Era:
    """Find the era of a message.

    header  MCP-Protocol-Version; None: there is none, or the transport has no headers
    """
    header_is_modern = header is not None and header not in LEGACY
    return Era.MODERN if has_claim(message) or header_is_modern else Era.LEGACY


def check_era(message: Message, header: str | None = None) -> None:
    """Raise BadMessage if a message contradicts its era, see `era_of`."""
    era = era_of(message, header)
    shown = in_json(header, 40)

    if "method" not in message:
        if era is Era.MODERN:
            raise NotAMessage(f"got a response, expected none in revision {shown}")
        return

    if "id" not in message:
        if header not in (None, MODERN, *LEGACY):
            expected = f"one of {', '.join(LEGACY)}"
            raise NotAMessage(f"`MCP-Protocol-Version`: got {shown}, expected {expected}")
        return

    meant_modern = era is Era.MODERN or message["method"] == "server/discover"
    if meant_modern and not has_claim(message):
        raise BadMessage(f"`params._meta`: got no `{CLAIM}`, expected it and `{CAPABILITIES}`")


def agreed_version(asked: object) -> str:
    """Choose the revision for a legacy client that asks for this one."""
    return asked if isinstance(asked, str) and asked in LEGACY else LEGACY[-1]


# Checks


def check_level(name: str, level: object) -> str:
    """Return a level of logging, found in field `name`.  Raises BadMessage."""
    if not isinstance(level, str) or level not in LEVELS:
        raise complain(name, level, f"one of {', '.join(LEVELS)}")
    return level


def check_envelope(message: Message, headers: Callable[[str], list[str]] | None) -> None:
    """Check the `_meta` of a modern request, and the headers that repeat parts of the body.

    headers  all values of a header; None: the transport has no headers
    Raises BadMessage.
    """
    meta = message["params"]["_meta"]
    version = meta[CLAIM]
    if not isinstance(version, str) or not isinstance(meta.get(CAPABILITIES), dict):
        expected = f"a string as `{CLAIM}` and an object as `{CAPABILITIES}`"
        raise BadMessage(f"`params._meta`: expected {expected}")

    if headers is not None:
        for name, value in repeated_fields(message).items():
            check_header(name, headers(name), [value])

    if version != MODERN:
        data = {"supported": [MODERN], "requested": version}
        shown = in_json(version, 40)
        raise UnsupportedVersion(f"`{CLAIM}`: got {shown}, expected {MODERN}", data=data)

    if meta.get(LOG_LEVEL) is not None:
        check_level(f"params._meta.{LOG_LEVEL}", meta[LOG_LEVEL])


def repeated_fields(message: Message) -> dict[str, str]:
    """List what headers repeat of every modern request, by header."""
    params = message["params"]
    method = message["method"]
    fields = {"MCP-Protocol-Version": params["_meta"][CLAIM], "Mcp-Method": method}

    key = "taskId" if method.startswith("tasks/") else ROUTED.get(method)
    if key is not None and isinstance(params.get(key), str):
        fields["Mcp-Name"] = params[key]
    return fields


def check_parameters(
    message: Message, headers: Callable[[str], list[str]], repeated: Mapping[str, str]
) -> None:
    """Check the `Mcp-Param-*` headers, which repeat arguments of a tool.

    repeated  the last part of the header's name, by argument
    Raises HeaderMismatch.
    """
    arguments = message["params"].get("arguments") or {}
    if not isinstance(arguments, dict):
        return

    for argument, header in repeated.items():
        name = f"Mcp-Param-{header}"
        value = arguments.get(argument)
        got = headers(name)
        is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_numeric and is_number(name, got, value):
            continue

        expected = []
        if value is not None:
            expected = [value if isinstance(value, str) else json.dumps(value)]

        check_header(name, got, expected)


def check_header(name: str, texts: list[str], expected: list[str]) -> None:
    """Raise HeaderMismatch unless this header repeats the body."""
    got = [header_value(name, text) for text in texts]
    if got != expected:
        raise HeaderMismatch(
            f"`{name}`: got {in_json(got, 80)}, expected {in_json(expected, 80)} as in the body"
        )


def is_number(name: str, texts: list[str], value: object) -> bool:
    """Whether a header is this number, also as 42.0 for 42.  Raises HeaderMismatch."""
    try:
        return [float(header_value(name, text)) for text in texts] == [value]
    except ValueError:
        return False


def header_value(name: str, text: str) -> str:
    """Return a header's text, which may be wrapped as `=?base64?...?=`.  Raises HeaderMismatch."""
    text = text.strip()
    if not (text.startswith("=?base64?") and text.endswith("?=")):
        return text
    try:
        return base64.b64decode(text[9:-2], validate=True).decode()
    except ValueError:
        shown = in_json(text, 80)
        raise HeaderMismatch(f"`{name}`: got {shown}, expected base64 of UTF-8") from None


# Writing


def response(id_: str | int, result: Message) -> Message:
    return {"jsonrpc": "2.0", "id": id_, "result": result}


def refusal(id_: str | int | None, failure: ProxyError) -> Message:
    """The response that reports a failure."""
    error: Message = {"code": failure.rpc_code, "message": str(failure)}
    if failure.data is not None:
        error["data"] = failure.data
    return {"jsonrpc": "2.0", "id": id_, "error": error}


def new_request(method: str, params: Message) -> Message:
    """A request to a relayed server, which gets its id when it is sent."""
    return {"jsonrpc": "2.0", "id": 0, "method": method, "params": params}


def notification(method: str, params: Message) -> Message:
    return {"jsonrpc": "2.0", "method": method, "params": params}


def success(id_: str | int, fields: Message, method: str, version: str, facts: Facts) -> Message:
    """The response of the server with these facts to request `id_`, in revision `version`."""
    result = fields
    if version == MODERN:
        cached = {}
        if method in CACHED:
            cached = {"ttlMs": CACHE_MS, "cacheScope": "private"}

        server = {"name": facts.name, "version": facts.version}
        result = {
            "resultType": "complete",
            **fields,
            **cached,
            "_meta": {SERVER_INFO: server},
        }

    return response(id_, only_known(result, version))


def only_known(fields: Message, version: str) -> Message:
    """Drop the fields that revision `version` does not have."""
    return {name: value for name, value in fields.items() if SINCE.get(name, "") <= version}


def status_of(answer: Message) -> int:
    """The HTTP status of a modern response."""
    if "error" not in answer:
        return 200
    # After a 5xx some clients give up.
    return {-32601: 404, -32603: 200}.get(answer["error"].get("code"), 400)


# Decisions of the built-in server


def step(message: Message, version: str, facts: Facts) -> list[Decision]:
    """Decide what one request asks for.  Raises BadMessage, UnknownMethod."""
    id_ = message["id"]
    method = message["method"]
    params = message.get("params", {})
    answer = partial(success, id_, method=method, version=version, facts=facts)

    if method == "tools/list":
        if params.get("cursor") is not None:
            raise complain("params.cursor", params["cursor"], "none: there is one page")
        tools = [only_known(each, version) for each in facts.tools]
        return [Send(message=answer({"tools": tools}))]

    if method == "tools/call":
        return [call_tool(id_, params, facts)]

    if version == MODERN:
        if method == "server/discover":
            return [Send(message=answer(discovery_result(facts)))]
    elif method == "initialize":
        return [Send(message=response(id_, hello_result(params, facts)))]
    elif method == "ping":
        return [Send(message=answer({}))]
    elif method == "logging/setLevel":
        level = check_level("params.level", params.get("level"))
        return [SetLevel(level=level), Send(message=answer({}))]

    shown = in_json(method, 80)
    raise UnknownMethod(
        f"`method`: got {shown}, which revision {version} of this server does not have"
    )


def discovery_result(facts: Facts) -> Message:
    return {
        "supportedVersions": [MODERN],
        "capabilities": {"tools": {}},
        "instructions": facts.instructions,
    }


def hello_result(params: Message, facts: Facts) -> Message:
    """The result of `initialize`.  Raises BadMessage."""
    asked = params.get("protocolVersion")
    if not isinstance(asked, str):
        raise complain("params.protocolVersion", asked, "a revision of MCP")

    version = agreed_version(asked)
    server = {"name": facts.name, "title": facts.name, "version": facts.version}
    return {
        "protocolVersion": version,
        "capabilities": {"tools": {}, "logging": {}},
        "serverInfo": only_known(server, version),
        "instructions": facts.instructions,
    }


def call_tool(id_: str | int, params: Message, facts: Facts) -> CallTool:
    """Check a `tools/call`.  Raises BadMessage."""
    name = params.get("name")
    names = [each["name"] for each in facts.tools]
    if name not in names:
        raise complain("params.name", name, f"one of {', '.join(names)}")

    arguments = params.get("arguments", {})
    if not isinstance(arguments, dict):
        raise complain("params.arguments", arguments, "an object")

    token = as_object(params.get("_meta")).get("progressToken")
    if token is not None and not is_id(token):
        raise complain("params._meta.progressToken", token, "a string or an integer")
    return CallTool(id=id_, name=str(name), arguments=arguments, token=token)


# ==========================================================================
# Sessions
# ==========================================================================
# Clients of MCP servers: what waits for them, their calls, when they end.
#
# N1  Every queue has a bound; a session with a client that does not keep up ends with an error.
# N2  A call belongs to its session and ends with it, not with the stream that it came by.
# N3  A request is answered once, a cancelled one never.


class Outbox:
    """Messages for one client, in order.  It has one reader at a time: a new one takes over.

    on_full   called when MAX_INBOX messages wait and one more comes
    is_heard  False: its client may never listen, so only the newest notifications are kept
    """

    def __init__(self, on_full: Callable[[], object], is_heard: bool = True) -> None:
        self.on_full = on_full
        self.is_heard = is_heard
        self.waiting = deque[Message]()
        # Set when a message comes, or a reader has to end.
        self.news = asyncio.Event()
        # Identifies the newest reader.
        self.reader = object()
        # How many readers there are, with those that have to end.
        self.readers = 0
        # Whether it takes no more messages.
        self.is_closed = False

    @classmethod
    def nowhere(cls) -> Outbox:
        """An outbox that discards everything."""
        outbox = cls(ignore)
        outbox.close()
        return outbox

    def send(self, message: Message) -> None:
        """Add a message, unless it is closed; progress is skipped while its reader is slow."""
        is_progress = message.get("method") == "notifications/progress"
        if self.is_closed or (is_progress and self.is_crowded()):
            return

        if not self.is_heard and len(self.waiting) >= MAX_INBOX:
            self._drop_oldest_notification()

        if len(self.waiting) < MAX_INBOX:
            self.waiting.append(message)
            self.news.set()
        else:
            self.on_full()

    def _drop_oldest_notification(self) -> None:
        for message in self.waiting:
            if "id" not in message:
                self.waiting.remove(message)
                return

    def set_heard(self, is_heard: bool) -> None:
        """Its client listens from now on, or may never listen again."""
        self.is_heard = is_heard

    def is_crowded(self) -> bool:
        """Whether its reader is slow, or away."""
        return len(self.waiting) >= MAX_INBOX // 2

    async def room(self, seconds: float) -> None:
        """Wait until it is not crowded, for so many seconds at most."""
        for _ in range(round(seconds / OUTBOX_PAUSE)):
            await asyncio.sleep(0)
            if self.is_closed or not self.is_crowded():
                break
            await asyncio.sleep(OUTBOX_PAUSE)

    def close(self) -> None:
        """Let its reader end, once it has everything that waits."""
        self.is_closed = True
        self.news.set()

    def leave(self) -> None:
        """Its reader has gone for good, so nothing waits for it."""
        self.close()
        self.waiting.clear()

    async def messages(self) -> AsyncGenerator[Message | None, None]:
        """Yield each message as it comes, and None after every KEEP_ALIVE seconds without any.

        A message that was not delivered stays, for the next reader.
        """
        mine = object()
        self.reader = mine
        self.readers += 1
        # Let the reader before this one end.
        self.news.set()

        try:
            while self.reader is mine and (self.waiting or not self.is_closed):
                if self.waiting:
                    yield self.waiting[0]
                    if self.reader is mine:
                        self.waiting.popleft()
                    continue

                self.news.clear()
                has_news = await is_set_within(self.news, KEEP_ALIVE)
                if not has_news and self.reader is mine:
                    yield None
        finally:
            self.readers -= 1


class McpServer:
    """An MCP server as sessions know it: the built-in one, or one behind the relay.

    name          in its path, `/servers/NAME`; "" is the built-in one
    session_idle  seconds after which an unused session over HTTP ends
    """

    name = ""
    session_idle: float = SESSION_IDLE

    async def respond(
        self, session: Session, message: Message, era: Era, outbox: Outbox
    ) -> Message:
        """Return the response to a request.

        outbox  takes what comes before the response, on the same stream
        Messages that belong to no request go to the outbox of the session.
        Cancelling this cancels the request.  Raises ProxyError.
        """
        raise NotImplementedError

    def notify(self, session: Session, message: Message) -> None:
        """Take a notification of the client, or its answer to a question.  Raises RelayError."""

    def leave(self, session: Session) -> None:
        """The session has ended: drop what was kept for it.  May be called again."""


class CallWatch:
    """Learns of a request before the server does, and how it ended."""

    async def start(self) -> None:
        """Raise NoAudit to keep the request from the server."""

    def end(self, answer: Message | None) -> None:
        """The server has answered; None: the request was cancelled."""

    async def audited(self) -> None:
        """Wait until the end is in the audit log.  Raises NoAudit: the answer is withheld."""


NOT_WATCHED = CallWatch()


class SessionHost:
    """Keeps the sessions, and says what of their calls is recorded; AppState is one."""

    def __init__(self) -> None:
        self.sessions = SessionMap()

    def watch_call(self, session: Session, message: Message) -> CallWatch:
        """Return what learns of this request; it is called for each one."""
        return NOT_WATCHED


class Lifetime(enum.Enum):
    """How long a session lasts, by what it belongs to; see the table at Session."""

    # A modern request, which stands for itself.
    ONCE = "once"
    # Of a WebSocket, or of `GET /sse` without a name.
    STREAM = "stream"
    # Of `GET /sse` with a name, by which its client may return to it.
    NAMED = "named"
    # Streamable HTTP.
    HTTP = "http"

    @property
    def has_response_per_call(self) -> bool:
        """Whether each call is answered in an HTTP response of its own.

        Then its client perhaps never opens a stream of the session.
        """
        return self in (Lifetime.ONCE, Lifetime.HTTP)


class Session:
    """A client of a server: its calls, and what waits for it.

    transport   http, sse, ws or once
    credential  that opened it
    address     of the machine that opened it

    When it ends, by its lifetime.  Of NAMED and HTTP a countdown runs, for `kept_seconds`:

    | event                     | ONCE | STREAM | NAMED            | HTTP             |
    |---------------------------|------|--------|------------------|------------------|
    | its client sends anything |      |        | starts anew      | starts anew      |
    | its call ends             | ends |        | starts anew      | starts anew      |
    | its last stream ends      |      | ends   | starts anew      | starts anew      |
    | the countdown is over     |      |        | ends, unless     | ends, unless     |
    |                           |      |        | a stream is open | a stream is open |
    |                           |      |        |                  | or a call runs   |
    | DELETE                    |      |        |                  | ends             |

    Whatever its lifetime is, it ends at once when its client does not keep up, or when a crowd of
    sessions needs its place.  When its child has ended, nobody finds it any more, and it ends once
    its calls are answered.
    """

    def __init__(
        self,
        host: SessionHost,
        server: McpServer,
        transport: str,
        lifetime: Lifetime,
        session_id: str | None = None,
        credential: str = "",
        address: str = "",
    ) -> None:
        self.host = host
        self.server = server
        self.transport = transport
        self.lifetime = lifetime
        self.session_id = session_id or secrets.token_hex(16)
        self.credential = credential
        self.address = address

        # For what belongs to no call, or to a call on a transport with one stream.
        self.outbox = Outbox(self.overflow, is_heard=not lifetime.has_response_per_call)
        # How many streams of it are open.
        self.streams = 0
        # Its requests that are not answered yet, by the client's ids.
        self.calls: dict[str | int, asyncio.Task[None]] = {}
        # Its last stream, message or answer, in seconds of time.monotonic().
        self.used = time.monotonic()
        # Calls `end_or_look_later` when the countdown is over.
        self.expiry: asyncio.TimerHandle | None = None
        # Ends it when its last answers have left: its child has ended.
        self.losing: asyncio.Task[None] | None = None

        # Of its last request.
        self.era = Era.LEGACY
        # Returns all values of a header of its request; None: headers are not checked.
        self.headers: Callable[[str], list[str]] | None = None
        # The params of its client's `initialize`.
        self.hello_params: Message = {}
        # The revision that `initialize` was answered with; None: it has not succeeded.
        self.version: str | None = None
        # From this level up its client wants log messages.
        self.level = "info"

    @property
    def kept_seconds(self) -> float:
        """For so long it outlives its last use."""
        if self.lifetime is Lifetime.HTTP:
            return self.server.session_idle
        return SESSION_KEPT if self.lifetime is Lifetime.NAMED else 0.0

    # What its client says

    def came_with(self, headers: Callable[[str], list[str]]) -> None:
        """Its request has these headers, which a server may have to check."""
        self.headers = headers

    def logs_at(self, level: str) -> None:
        """Its client wants log messages from this level up."""
        self.level = level

    def receive(self, message: Message, era: Era, outbox: Outbox) -> None:
        """Do what a message asks for.  Raises BadMessage, RelayError.

        outbox  gets the answer, and is closed after that, unless it is the session's own
        """
        self.used = time.monotonic()
        if is_request(message):
            self.era = era
            self._start_call(message, outbox)
        elif message.get("method") == "notifications/cancelled":
            self._cancel_call(message.get("params", {}).get("requestId"))
        else:
            self.server.notify(self, message)

    def receive_by_stream(self, message: Message) -> None:
        """The same where answers, and errors too, leave by the stream of the session."""
        try:
            check_era(message)
            era = era_of(message)
            if era is Era.MODERN and is_request(message):
                check_envelope(message, None)
            self.receive(message, era, self.outbox)
        except ProxyError as wrong:
            if is_request(message):
                self.outbox.send(refusal(message["id"], wrong))

    # Its calls

    def _start_call(self, message: Message, outbox: Outbox) -> None:
        """Bring a request to the server.  Raises NotAMessage."""
        id_ = message["id"]
        if id_ in self.calls or len(self.calls) >= MAX_CALLS:
            shown = in_json(id_, 40)
            raise NotAMessage(
                f"`id`: got {shown}, expected one that is not in use, of {MAX_CALLS} at most"
            )

        if message["method"] == "initialize":
            self.hello_params = message.get("params", {})

        call = asyncio.ensure_future(self._call(message, self.era, outbox))
        self.calls[id_] = call
        # A callback, because a task that is cancelled before its first step reaches no `finally`.
        call.add_done_callback(partial(self._on_call_done, id_, outbox))

    def _on_call_done(self, id_: str | int, outbox: Outbox, _: asyncio.Task[None]) -> None:
        """A call has ended: answered, failed or cancelled."""
        del self.calls[id_]
        self.used = time.monotonic()
        if outbox is not self.outbox:
            outbox.close()

    def _cancel_call(self, id_: object) -> None:
        call = self.calls.get(id_) if is_id(id_) else None
        if call is not None:
            call.cancel()

    async def _call(self, message: Message, era: Era, outbox: Outbox) -> None:
        """Answer a request."""
        watch = self.host.watch_call(self, message)
        try:
            answer = await self._watched_answer(watch, message, era, outbox)
        except NoAudit as wrong:
            answer = refusal(message["id"], ProxyError(f"not answered: {wrong}"))
        outbox.send(answer)

    async def _watched_answer(
        self, watch: CallWatch, message: Message, era: Era, outbox: Outbox
    ) -> Message:
        """Return the answer, with the request's start and end recorded.  Raises NoAudit."""
        answer: Message | None = None
        await watch.start()
        try:
            answer = await self._answer_to(message, era, outbox)
        finally:
            watch.end(answer)
        await watch.audited()
        return answer

    async def _answer_to(self, message: Message, era: Era, outbox: Outbox) -> Message:
        """Return the server's answer; turn every failure into a JSON-RPC error."""
        try:
            answer = await self.server.respond(self, message, era, outbox)
        except ProxyError as wrong:
            return refusal(message["id"], wrong)
        except Exception as wrong:
            log.exception("request failed method=%s", message["method"])
            return refusal(message["id"], ProxyError(f"{type(wrong).__name__}, see the log"))

        if message["method"] == "initialize" and "result" in answer:
            self.version = answer["result"].get("protocolVersion", LEGACY[-1])

        return answer

    # Its stream and its end

    @contextlib.asynccontextmanager
    async def stream(self) -> AsyncIterator[AsyncIterator[Message | None]]:
        """Give what comes for its client, as long as this stream is the newest."""
        self.streams += 1
        self.outbox.set_heard(True)
        try:
            async with contextlib.aclosing(self.outbox.messages()) as messages:
                yield messages
        finally:
            self.streams -= 1
            self.used = time.monotonic()
            self.outbox.set_heard(self.streams > 0 or not self.lifetime.has_response_per_call)
            self.end_or_look_later()

    def end_or_look_later(self) -> None:
        """End the session if it was unused for too long; otherwise look again later."""
        self._stop_timer()
        if self.streams or self.outbox.is_closed:
            return

        is_in_use = bool(self.calls) and self.lifetime.has_response_per_call
        pause = seconds_to_next_look(self.used, self.kept_seconds, is_in_use)
        if pause > 0:
            self.expiry = asyncio.get_running_loop().call_later(pause, self.end_or_look_later)
        else:
            self.end()

    def _stop_timer(self) -> None:
        if self.expiry:
            self.expiry.cancel()
            self.expiry = None

    def overflow(self) -> None:
        """Its client does not keep up."""
        log.error(
            "session end id=%s why=%d messages wait for its client", self.session_id, MAX_INBOX
        )
        self.end()

    def lose(self) -> None:
        """Its child has ended: forget it now, and end it when its calls are answered."""
        self.host.sessions.forget(self)
        self.losing = asyncio.ensure_future(self._end_when_answered())

    async def _end_when_answered(self) -> None:
        if self.calls:
            await asyncio.wait([*self.calls.values()], timeout=LAST_ANSWERS)
        self.end()

    def end(self) -> None:
        """Cancel its calls, end its streams, forget it."""
        log.debug("session end id=%s lifetime=%s", self.session_id, self.lifetime.value)
        for call in self.calls.values():
            call.cancel()
        self._stop_timer()
        self.outbox.close()
        self.server.leave(self)
        self.host.sessions.forget(self)


def seconds_to_next_look(used: float, idle: float, is_in_use: bool) -> float:
    """Return the seconds until one has to look again whether something is idle for too long.

    used       its last use, in seconds of time.monotonic()
    idle       seconds for which it may be idle
    is_in_use  whether it is in use just now
    0: it is idle for too long already.
    """
    left = used + idle - time.monotonic()
    if left > 0:
        return left
    if is_in_use:
        # It cannot be idle for too long before that.
        return idle
    return 0.0


class SessionMap(dict[str, Session]):
    """The sessions that are open, by their id."""

    def open(self, session: Session) -> Session:
        """Add a session.  Raises NoTerminal when there are too many."""
        if len(self) >= MAX_SESSIONS:
            self._make_room()
        self[session.session_id] = session
        return session

    def _make_room(self) -> None:
        """End the unused session that was used longest ago."""
        unused = [other for other in self.values() if not other.streams and not other.calls]
        if not unused:
            raise NoTerminal(f"{MAX_SESSIONS} sessions are open already: close some")
        min(unused, key=lambda other: other.used).end()

    def forget(self, session: Session) -> None:
        """Remove a session, if it is here."""
        if self.get(session.session_id) is session:
            del self[session.session_id]

    async def settle(self, seconds: float) -> None:
        """Wait until all calls are answered, for so many seconds at most."""
        calls = [call for session in self.values() for call in session.calls.values()]
        if calls:
            await asyncio.wait(calls, timeout=seconds)

    def find(self, server: str, transport: str, session_id: str | None, credential: str) -> Session:
        """Return the session of this server and transport that this credential opened.

        Raises UnknownSession.
        """
        session = self.get(session_id or "")
        if session is None or not self._is_of(session, server, transport, credential):
            shown = in_json(session_id, 140)
            raise UnknownSession(
                f"no session {shown} here: it has ended, or never started; start a new one"
            )

        return session

    @staticmethod
    def _is_of(session: Session, server: str, transport: str, credential: str) -> bool:
        if session.server.name != server or session.transport != transport:
            return False
        return hmac.compare_digest(session.credential.encode(), credential.encode())

    def report(self, session_id: str | None, **data: object) -> None:
        """Send news of a command to the session that the command names, if it is open."""
        session = self.get(session_id or "")
        if session is None or session.era is Era.MODERN:
            return
        if session.outbox.is_heard and session.outbox.is_crowded():
            return
        if session.level in ("debug", "info"):
            params = {"level": "info", "logger": "exec", "data": data}
            session.outbox.send(notification("notifications/message", params))


# ==========================================================================
# Child lines
# ==========================================================================
# What a relayed server's process writes, cut into lines.
#
# Y1  A line of any length takes bounded memory; both ends are kept, for its id stands there.

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The start of an object's next member, up to its value.
MEMBER = re.compile(r'[\s,]*("(?:[^"\\]|\\.)*")\s*:\s*')
# The last members of a response, where its result comes first.
LAST_MEMBERS = re.compile(r'((?:,\s*"(?:id|jsonrpc)"\s*:\s*(?:\d+|"2\.0")\s*)+)\}\s*$')


class TooLong(NamedTuple):
    """A line beyond the limit, of which both ends were kept."""

    head: bytes
    tail: bytes
    size: int


class Lines:
    """Cuts what a process writes into lines, however it arrives.

    limit  bytes of a line; of a longer one MAX_ENDS bytes of each end are kept
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # The line that is not complete yet: all of it, or its last bytes if it is too long.
        self.begun = bytearray()
        self.size = 0
        # Its first bytes, if it is too long.
        self.head: bytes | None = None

    def feed(self, data: bytes) -> Iterator[bytes | TooLong]:
        """Yield the lines that `data` completes."""
        start = 0
        end = data.find(b"\n")
        while end >= 0:
            self._add(data[start:end])
            yield self.rest()

            start = end + 1
            end = data.find(b"\n", start)
        self._add(data[start:])

    def _add(self, piece: bytes) -> None:
        self.size += len(piece)
        self.begun += piece
        if self.size > self.limit:
            if self.head is None:
                self.head = bytes(self.begun[:MAX_ENDS])
            del self.begun[:-MAX_ENDS]

    def rest(self) -> bytes | TooLong:
        """Return the line as far as it came, and start the next one."""
        line: bytes | TooLong = bytes(self.begun)
        if self.head is not None:
            line = TooLong(head=self.head, tail=bytes(self.begun), size=self.size)

        self.begun.clear()
        self.size = 0
        self.head = None
        return line


def id_of_long(line: TooLong) -> object:
    """Find the `id` of a response that is too long, before its result or after it."""
    text = line.head.removeprefix(BYTE_ORDER_MARK).decode(errors="replace")
    decoder = json.JSONDecoder()
    member = MEMBER.match(text, text.find("{") + 1)

    while member:
        try:
            value, position = decoder.raw_decode(text, member.end())
        except (ValueError, RecursionError):
            break

        if member[1] == '"id"':
            return value

        member = MEMBER.match(text, position)

    last = LAST_MEMBERS.search(line.tail.decode(errors="replace"))
    number = re.search(r'"id"\s*:\s*(\d+)', last[1]) if last else None
    return int(number[1]) if number else None


# ==========================================================================
# In flight
# ==========================================================================
# What one relayed server has been asked, and who gets its answers.
#
# IF1  A request ends by its answer, when its time is over, or when its client cancels it.
# IF2  While a client has questions of the server to answer, no request expires; for PARK_TIMEOUT
#      seconds at most.


class Exchange:
    """A request on its way through a child.

    outbox  gets what belongs to the request before its answer
    """

    def __init__(self, message: Message, outbox: Outbox) -> None:
        self.answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        # Fires when the child's time to answer is over; progress puts it off.  None: no time runs,
        # as while a client has questions of the child to answer.
        self.expiry: asyncio.TimerHandle | None = None
        # Seconds of time.monotonic(): then its time is over, whatever progress the child reports.
        self.deadline = time.monotonic() + CHILD_CEILING
        self.take_up(message, outbox)

    def take_up(self, message: Message, outbox: Outbox) -> None:
        """From now on it serves this message of its client: the first one, or a retry of it."""
        self.message = message
        self.outbox = outbox
        self.meta = as_object(message.get("params", {}).get("_meta"))

    @property
    def method(self) -> str:
        return str(self.message["method"])

    @property
    def wants_logs(self) -> bool:
        return LOG_LEVEL in self.meta and self.method != "subscriptions/listen"

    def start_timer(self, seconds: float, on_expiry: Callable[[], object]) -> None:
        """Call `on_expiry` after so many seconds, unless the timer is stopped."""
        self.stop_timer()
        self.expiry = asyncio.get_running_loop().call_later(seconds, on_expiry)

    def stop_timer(self) -> None:
        if self.expiry:
            self.expiry.cancel()
            self.expiry = None


class InFlight:
    """The requests in flight to one child, by the ids that we gave them, which are a count.

    on_expiry  called with an exchange and the seconds for which the child did not answer it
    """

    def __init__(self, on_expiry: Callable[[Exchange, float], object]) -> None:
        self.on_expiry = on_expiry
        self.exchanges = dict[int, Exchange]()
        # The newest id that was given.
        self.count = 0
        # Calls whose client has questions to answer; as long as there are any, nothing expires.
        self.pauses = 0

    def get(self, number: object) -> Exchange | None:
        # True and False would be found as 1 and 0.
        return self.exchanges.get(number) if type(number) is int else None

    def add(self, exchange: Exchange, number: int) -> None:
        self.exchanges[number] = exchange
        self.extend(exchange)

    def next_number(self) -> int:
        self.count += 1
        return self.count

    def extend(self, exchange: Exchange) -> None:
        """Give the child CHILD_TIMEOUT seconds from now, unless no time runs."""
        exchange.stop_timer()
        if self.pauses or exchange.method == "subscriptions/listen":
            return

        left = exchange.deadline - time.monotonic()
        seconds = max(0.0, min(CHILD_TIMEOUT, left))
        exchange.start_timer(seconds, partial(self.on_expiry, exchange, seconds))

    def pause(self) -> None:
        """The child waits for the answer of a client, which takes a person's time."""
        self.pauses += 1
        for exchange in self.exchanges.values():
            exchange.stop_timer()

    def resume(self) -> None:
        """A client has answered, or will not; undoes one `pause`."""
        self.pauses -= 1
        for exchange in self.exchanges.values():
            self.extend(exchange)

    def finish(self, number: object, answer: Message) -> None:
        """Hand the answer to whoever waits for it; an unknown number is ignored."""
        exchange = self.exchanges.pop(number, None) if type(number) is int else None
        if exchange is None:
            return
        exchange.stop_timer()
        if not exchange.answer.done():
            exchange.answer.set_result(answer)

    def numbers_of(self, exchange: Exchange) -> list[int]:
        """Return its ids; none if it was never sent, or has ended."""
        return [number for number, other in self.exchanges.items() if other is exchange]

    def wanting_logs(self) -> list[Outbox]:
        """Where log lines are wanted, the newest request last.  A line names no request."""
        return [each.outbox for each in self.exchanges.values() if each.wants_logs]


# ==========================================================================
# MCP children
# ==========================================================================
# A relayed server's process: its life, what it says and hears.
#
# C1  What is in flight when a child ends is answered at once, with the reason.
# C2  A child ends as a group: see CHILD_LADDER.
# C3  What it writes is bounded and timed; a fault in one line costs no other call.

# The first request to a child, whose answer shows its era; these cannot be cancelled.
FIRST_REQUESTS = ("initialize", "server/discover")

# Signals to the group of a child that ends, and seconds until the next one.
# First its stdin is closed; 0 is no signal.
CHILD_LADDER = ((0, 2.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0))

# Takes a message that belongs to no request in flight; returns the outbox that got it, if any.
OnMessage = Callable[["Child", Message], "Outbox | None"]


@dataclass(frozen=True)
class ServerConfig:
    """A stdio server of `--mcp-server` or `--mcp-config`."""

    name: str
    words: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    # Why it is not served; "": it is.
    left_out: str = ""


class ChildLog:
    """Logs what a child writes to its stderr, and keeps the last lines of it."""

    def __init__(self, name: str, stream: asyncio.StreamReader) -> None:
        self.name = name
        self.stream = stream
        self.tail = deque[str](maxlen=CHILD_LAST_LINES)
        self.reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        lines = Lines(MAX_LOG_LINE)
        with contextlib.suppress(OSError):
            data = await self.stream.read(CHILD_READ)
            while data:
                for line in lines.feed(data):
                    self._log(line)
                # It may write without end: let others have their turn.
                await asyncio.sleep(0)
                data = await self.stream.read(CHILD_READ)
        self._log(lines.rest())

    def _log(self, line: bytes | TooLong) -> None:
        raw = line.head if isinstance(line, TooLong) else line
        text = raw.decode(errors="replace").rstrip()[:MAX_LOG_SHOWN]
        if text:
            self.tail.append(text)
            log.info("server %s: %s", self.name, text)


class ChildState(enum.IntEnum):
    """How far a child is.  Only `Child._enter` changes it."""

    STARTING = 0  # it has answered nothing yet
    SERVING = 1  # it has answered a request
    ENDING = 2  # it gets no more requests; its group is being ended
    ENDED = 3  # no process of its group is left


class Child:
    """A stdio server that runs.  Raises RelayError.

    on_message  gets what belongs to no request in flight
    on_lost     called when it has closed its stdout and what was in flight is answered
    on_gone     called when it is ENDED

    | event                          | STARTING  | SERVING   | ENDING    | ENDED |
    |--------------------------------|-----------|-----------|-----------|-------|
    | it answers a request           | SERVING   |           |           |       |
    | `end`, its process ends,       | ENDING    | ENDING    |           |       |
    | or it has closed its stdin     |           |           |           |       |
    | its stdout is read to the end  | ENDING,   | ENDING,   | `on_lost` |       |
    |                                | `on_lost` | `on_lost` |           |       |
    | after that: its group is gone, |           |           | ENDED,    |       |
    | or CHILD_LADDER is at its end  |           |           | `on_gone` |       |
    """

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, on_message: OnMessage
    ) -> None:
        assert process.stderr
        self.name = name
        self.process = process
        self.on_message = on_message
        self.on_lost: list[Callable[[Child], object]] = []
        self.on_gone: list[Callable[[Child], object]] = []

        self.state = ChildState.STARTING
        # Whether it has ever answered a request, even while it was ending.
        self.has_answered = False
        # Whether its end is no fault, as after `end` or `expect_end`.
        self.is_end_expected = False
        # How it ended, for people; "": its stdout is open.
        self.reason = ""
        # Set when it can answer nothing more.
        self.lost = asyncio.Event()

        # What it speaks; None: that is not known yet.
        self.era: Era | None = None
        # The answer to `initialize` or `server/discover` that shows its era, once it has come.
        self.hello_answer: Message = {}
        # The level that it was asked to log at; None: it may choose.
        self.level: str | None = None
        # Held while HeaderRules asks which arguments of its tools headers must repeat.
        self.listing = asyncio.Lock()

        # Its start, in seconds of time.monotonic().
        self.began = time.monotonic()
        # The last message to it or from it, likewise.
        self.used = self.began
        self.in_flight = InFlight(self._expire)

        # Climbs CHILD_LADDER; None: it is not ENDING yet.
        self.ender: asyncio.Task[None] | None = None
        self.stderr = ChildLog(name, process.stderr)
        # Reads its stdout to the end.
        self.reading = asyncio.ensure_future(self._read())
        # Notices when its process ends.
        self.watching = asyncio.ensure_future(self._watch())

    @classmethod
    async def start(cls, config: ServerConfig, on_message: OnMessage) -> Child:
        """Start the process.  Raises RelayError."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *config.words,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                limit=CHILD_READ,
                env={**os.environ, **config.env},
                cwd=config.cwd,
                start_new_session=True,
            )
        # RuntimeError: no thread could be started.
        except (OSError, ValueError, RuntimeError) as wrong:
            why = getattr(wrong, "strerror", None) or str(wrong)
            raise RelayError(f"server {config.name} cannot start: {why}") from None

        return cls(config.name, process, on_message)

    # Its life

    def _enter(self, state: ChildState) -> None:
        """Be in this state from now on."""
        assert state > self.state, f"{self.state.name} to {state.name}"
        log.debug("server=%s state=%s was=%s", self.name, state.name, self.state.name)
        self.state = state

    @property
    def is_usable(self) -> bool:
        return self.state in (ChildState.STARTING, ChildState.SERVING)

    @property
    def is_shared(self) -> bool:
        """Whether it serves all clients, as a modern server does."""
        return self.era is Era.MODERN

    @property
    def epitaph(self) -> str:
        """How it ended, in a sentence; "": its stdout is open."""
        return f"server {self.name} {self.reason}" if self.reason else ""

    def expect_end(self) -> None:
        """Its end is no fault, until `shows_era`."""
        self.is_end_expected = True

    def shows_era(self, era: Era, hello_answer: Message) -> None:
        """It speaks this, as its answer shows; from now on its end is a fault."""
        self.is_end_expected = False
        self.era = era
        self.hello_answer = hello_answer

    def report_to(self, on_message: OnMessage) -> None:
        """What belongs to no request goes there from now on."""
        self.on_message = on_message

    def logs_at(self, level: str) -> None:
        """It was asked to log at this level."""
        self.level = level

    def end(self) -> None:
        """Let it end, and with it its group."""
        self.is_end_expected = True
        self._start_ending()

    def _start_ending(self) -> None:
        if self.is_usable:
            self._enter(ChildState.ENDING)
            self.ender = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        """Climb CHILD_LADDER until no process of its group is left."""
        assert self.process.stdin
        self.process.stdin.close()
        ended = asyncio.ensure_future(self.process.wait())

        for number, patience in CHILD_LADDER:
            deadline = time.monotonic() + patience
            # PermissionError: what is left of its group belongs to another user.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

            await asyncio.wait(
                {ended, self.watching}, timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
            # Others of its group may take longer than the process that we have started.
            while has_processes(self.process.pid) and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(CHILD_LOOK)

            if not has_processes(self.process.pid):
                break

        ended.cancel()

        # A process that left the group may still hold the other end.
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.feed_eof()

        await self.lost.wait()

        self._enter(ChildState.ENDED)
        for call in self.on_gone:
            call(self)

    async def _watch(self) -> None:
        """Notice its end, also when a process that it started still holds its stdout."""
        # Process.wait() may wait for the pipes too.
        while self.process.returncode is None:  # noqa: ASYNC110
            await asyncio.sleep(CHILD_WATCH)
        self._start_ending()

    async def _lose(self) -> None:
        """Fail the requests in flight: without its stdout it is of no use."""
        self._start_ending()
        # Its exit status and its last words may be on their way.
        ended = asyncio.ensure_future(self.process.wait())
        await asyncio.wait({ended, self.stderr.reading}, timeout=LAST_WORDS)
        ended.cancel()

        status = self.process.returncode
        reason = "closed its output" if status is None else f"ended with {status}"
        if self.stderr.tail:
            reason += f"; it said: {' / '.join(self.stderr.tail)}"
        self.reason = reason

        failure = RelayError(f"{self.epitaph}, before it answered")
        for number in [*self.in_flight.exchanges]:
            self.in_flight.finish(number, refusal(None, failure))

        self.lost.set()
        for call in self.on_lost:
            call(self)

    # What it writes

    async def _read(self) -> None:
        assert self.process.stdout
        lines = Lines(MAX_ANSWER)
        with contextlib.suppress(OSError):
            data = await self.process.stdout.read(CHILD_READ)
            while data:
                for line in lines.feed(data):
                    await self._read_line(line)
                data = await self.process.stdout.read(CHILD_READ)
        await self._read_line(lines.rest())
        await self._lose()

    async def _read_line(self, line: bytes | TooLong) -> None:
        """Take a line, and wait for the client that it goes to if that one is slow."""
        if isinstance(line, TooLong):
            self._refuse_long(line)
            return

        outbox = self._take_line(line)
        if outbox and outbox.is_heard and self.is_usable:
            # A slow reader slows the child down, but only a little if others use it too.
            is_alone = len(self.in_flight.exchanges) <= 1
            await outbox.room(SLOW_READER_TIMEOUT if is_alone else CROWD_PAUSE)

        # It may write without end: let others have their turn.
        await asyncio.sleep(0)

    def _take_line(self, line: bytes) -> Outbox | None:
        """Pass on what a line says; return the outbox that got it, if any."""
        try:
            # U+FFFD in place of what is not UTF-8: a call must not hang for a wrong byte.
            text = line.removeprefix(BYTE_ORDER_MARK).decode(errors="replace")
            if not text or text.isspace():
                return None
            return self._take(read_message(text))
        except ProxyError as wrong:
            log.warning("server %s: skipped %s: %s", self.name, ascii(line[:80]), wrong)
            failure = RelayError(f"server {self.name} answered badly: {wrong}")
            self.in_flight.finish(wrong.request_id, refusal(None, failure))
        # Whatever it wrote, others wait for what it writes next.
        except Exception:
            log.exception("server %s: skipped %s", self.name, ascii(line[:80]))

        return None

    def _refuse_long(self, line: TooLong) -> None:
        log.error("server %s: skipped a line of %d bytes", self.name, line.size)
        failure = RelayError(
            f"server {self.name} answered with {line.size} bytes, expected at most {MAX_ANSWER}"
        )
        self.in_flight.finish(id_of_long(line), refusal(None, failure))

    def _take(self, message: Message) -> Outbox | None:
        """Bring a message from the child to the client that it belongs to."""
        self.used = time.monotonic()
        if "method" not in message:
            self._take_answer(message)
            return None

        params = message.get("params", {})
        token = None
        if message["method"] == "notifications/progress":
            token = params.get("progressToken")

        if token is not None:
            return self._take_progress(message, token)

        subscription = as_object(params.get("_meta")).get(SUBSCRIPTION)
        if subscription is not None:
            return self._take_notice(message, subscription)
        return self.on_message(self, message)

    def _take_answer(self, message: Message) -> None:
        if self.state is ChildState.STARTING:
            self._enter(ChildState.SERVING)
        self.has_answered = True
        self.in_flight.finish(message["id"], sound_answer(self.name, message))

    def _take_progress(self, message: Message, token: object) -> Outbox | None:
        """Pass on progress, which gives the child more time."""
        exchange = self.in_flight.get(token)
        if exchange is None or "progressToken" not in exchange.meta:
            return None
        self.in_flight.extend(exchange)
        params = {**message["params"], "progressToken": exchange.meta["progressToken"]}
        exchange.outbox.send({**message, "params": params})
        return exchange.outbox

    def _take_notice(self, message: Message, subscription: object) -> Outbox | None:
        """Pass on what a `subscriptions/listen` is to hear of."""
        exchange = self.in_flight.get(subscription)
        if exchange is None:
            return None
        params = message["params"]
        meta = {**params["_meta"], SUBSCRIPTION: exchange.message["id"]}
        exchange.outbox.send({**message, "params": {**params, "_meta": meta}})
        return exchange.outbox

    # What it is sent

    def write(self, message: Message) -> None:
        """Write a message to its stdin.  Raises RelayError when it does not read."""
        stdin = self.process.stdin
        assert stdin
        if self.epitaph:
            raise RelayError(self.epitaph)
        if stdin.is_closing():
            self._start_ending()

        if not self.is_usable:
            # The message is dropped.  `send` registers a request all the same, and `_lose` answers
            # it with an error.
            return
        if stdin.transport.get_write_buffer_size() > CHILD_QUEUE:
            raise RelayError(f"server {self.name} does not read what it is sent")

        stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def send(self, exchange: Exchange, message: Message) -> None:
        """Send a request under an id of our own, which is its progress token too."""
        number = self.in_flight.next_number()
        self.used = time.monotonic()
        if "progressToken" in exchange.meta:
            params = message["params"]
            meta = {**params["_meta"], "progressToken": number}
            message = {**message, "params": {**params, "_meta": meta}}
        self.write({**message, "id": number})
        self.in_flight.add(exchange, number)

    async def ask(self, message: Message, outbox: Outbox) -> Message:
        """Return the response to a client's request, with the client's id.

        Cancelling this cancels the request in the child.
        """
        exchange = Exchange(message, outbox)
        self.send(exchange, message)
        return await self.answer(exchange)

    async def answer(self, exchange: Exchange) -> Message:
        """The same for a request that was sent."""
        try:
            answer = await asyncio.shield(exchange.answer)
        except asyncio.CancelledError:
            # Nobody waits for this answer any more.
            self.give_up(exchange, {})
            raise

        result = answer.get("result")
        id_ = exchange.message["id"]
        if isinstance(result, dict) and SUBSCRIPTION in as_object(result.get("_meta")):
            meta = {**result["_meta"], SUBSCRIPTION: id_}
            answer = {**answer, "result": {**result, "_meta": meta}}

        return {**answer, "id": id_}

    def give_up(self, exchange: Exchange, answer: Message) -> None:
        """Cancel a request in the child; whoever still waits gets this answer."""
        for number in self.in_flight.numbers_of(exchange):
            if exchange.method not in FIRST_REQUESTS:
                with contextlib.suppress(RelayError):
                    self.write(notification("notifications/cancelled", {"requestId": number}))
            self.in_flight.finish(number, answer)

    def _expire(self, exchange: Exchange, seconds: float) -> None:
        failure = RelayError(f"server {self.name} did not answer within {seconds:g} s")
        self.give_up(exchange, refusal(None, failure))

    def can(self) -> Message:
        """Return its capabilities."""
        return as_object(as_object(self.hello_answer.get("result")).get("capabilities"))


def has_processes(group: int) -> bool:
    """Whether any process of this group lives that we may end."""
    try:
        os.killpg(group, 0)
        # Some may only wait to be reaped by their parents.
        found = [process(int(pid)) for pid in os.listdir("/proc") if pid.isdecimal()]
    except (ProcessLookupError, PermissionError):
        return False
    except OSError:
        # No descriptor to look with: there may be some.
        return True
    return any(each is not None and each.group == group for each in found)


def sound_answer(name: str, answer: Message) -> Message:
    """Return a response of server `name` in the shape that everything here expects."""
    result = answer.get("result")
    failure = answer.get("error")
    if "result" in answer and isinstance(result, dict):
        is_sound = isinstance(result.get("_meta", {}), dict)
        return answer if is_sound else {**answer, "result": without(result, "_meta")}

    if isinstance(failure, dict):
        has_code = type(failure.get("code")) is int
        if has_code and isinstance(failure.get("message"), str):
            return answer

    shown = in_json(result or failure, 80)
    return refusal(None, RelayError(f"server {name} answered with {shown}"))


# Waiting for one


def outcome_of(answer: asyncio.Future[Message]) -> Message:
    """The response, if there is one."""
    failed = not answer.done() or answer.cancelled() or answer.exception() is not None
    return {} if failed else answer.result()


def child_of(starting: asyncio.Future[Child] | None) -> Child | None:
    """The child, if it has started."""
    if starting is None or not starting.done() or starting.cancelled():
        return None
    return None if starting.exception() is not None else starting.result()


def is_starting(starting: asyncio.Future[Child] | None) -> bool:
    return starting is not None and not starting.done()


def retrieve(work: asyncio.Future[Any]) -> None:
    """Take a failure, so that asyncio does not report it as an oversight."""
    if not work.cancelled():
        work.exception()


def end_own_child(starting: asyncio.Future[Child]) -> None:
    """End the child that has started, unless it is for all clients; a done callback."""
    child = child_of(starting)
    if child is not None and not child.is_shared:
        child.end()


def abandon(starting: asyncio.Future[Child]) -> None:
    """End the child of a client that has left, or keep it from starting."""
    # It also runs if the child has started already, and if wait_for() swallows this cancel, as it
    # may before Python 3.12.
    starting.add_done_callback(end_own_child)
    starting.cancel()


async def first_result(answers: set[asyncio.Future[Message]], seconds: float) -> None:
    """Wait until one of these is a result or all have come, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    waiting = set(answers)
    while waiting and not any("result" in outcome_of(answer) for answer in answers):
        left = deadline - time.monotonic()
        done, waiting = await asyncio.wait(
            waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            return


async def settle(child: Child) -> None:
    """Let a child deal with what it was sent, and ask its questions about that."""
    with contextlib.suppress(asyncio.TimeoutError):
        ping = child.ask(new_request("ping", {}), Outbox.nowhere())
        await asyncio.wait_for(ping, CHILD_SETTLE)
    await asyncio.sleep(QUESTION_PAUSE)


# ==========================================================================
# Era translation
# ==========================================================================
# What a message of one era is in the other.  Nothing here sends, waits or keeps anything.
#
# X1  Params, results and the data of errors pass untouched; the envelope and error codes change.

# The capability by which a client lets a server ask this.
ASKING = {
    "elicitation/create": "elicitation",
    "sampling/createMessage": "sampling",
    "roots/list": "roots",
}
# Requests during which a server may ask.
MAY_ASK = ("tools/call", "prompts/get", "resources/read")
# Legacy requests that the modern era does not have.
REMOVED = ("initialize", "ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe")
# What has changed, by notification.
CHANGED = {f"notifications/{what}/list_changed": what for what in ("tools", "prompts", "resources")}

OURSELVES = {"name": "pocketcoder", "version": VERSION}


def discovery() -> Message:
    """The question that shows a server's era."""
    return new_request("server/discover", {"_meta": envelope({}, OURSELVES)})


def handshake(can: Message, client: Message) -> Message:
    """`initialize` on behalf of a client that does not send it.

    can     the client's capabilities
    client  its name and version
    """
    params = {"protocolVersion": LEGACY[-1], "capabilities": can, "clientInfo": client}
    return new_request("initialize", params)


def speaks_modern(answer: Message) -> bool:
    """Whether this answer to `server/discover` is a modern server's."""
    result = as_object(answer.get("result"))
    # A server that refuses our revision lists those that it has.
    data = as_object(as_object(answer.get("error")).get("data"))
    listed = result.get("supportedVersions") or data.get("supported")
    return isinstance(listed, list) and MODERN in listed


def marked_arguments(shown: Message) -> dict[str, str]:
    """List the arguments of a tool that headers repeat, with the last part of their headers."""
    properties = as_object(as_object(shown.get("inputSchema")).get("properties"))
    marked = {name: as_object(shape).get("x-mcp-header") for name, shape in properties.items()}
    return {name: str(header) for name, header in marked.items() if header}


def change_flag(what: object) -> str:
    """How `subscriptions/listen` names changes of this list."""
    return f"{what}ListChanged"


def list_flags(can: Message) -> list[str]:
    """List the changes that a server with these capabilities reports."""
    return [
        change_flag(what)
        for what in CHANGED.values()
        if as_object(can.get(what)).get("listChanged")
    ]


def listens_for(can: Message, asked: Message) -> Message:
    """Reduce what `subscriptions/listen` asks for to what a legacy server can do.

    can  the server's capabilities
    """
    wanted: Message = {flag: True for flag in list_flags(can) if asked.get(flag) is True}
    uris = asked.get("resourceSubscriptions")
    can_subscribe = as_object(can.get("resources")).get("subscribe")
    if can_subscribe and isinstance(uris, list) and uris:
        wanted["resourceSubscriptions"] = uris
    return wanted


def envelope(can: Message, client: Message) -> Message:
    """`_meta` of a modern request."""
    return {CLAIM: MODERN, CAPABILITIES: can, CLIENT_INFO: client}


def with_envelope(message: Message, hello_params: Message, level: str, extra: Message) -> Message:
    """A legacy request, as a modern server wants it.

    hello_params  those of the client's `initialize`
    extra         more params
    """
    params = message.get("params", {})
    client = hello_params.get("clientInfo") or OURSELVES
    meta = {
        **as_object(params.get("_meta")),
        LOG_LEVEL: level,
        **envelope(as_object(hello_params.get("capabilities")), client),
    }
    return {**message, "params": {**params, **extra, "_meta": meta}}


def without_envelope(message: Message) -> Message:
    """A modern request, as a legacy server wants it."""
    params = without(message["params"], "requestState", "inputResponses", "_meta")
    meta = {
        name: value
        for name, value in message["params"]["_meta"].items()
        if not name.startswith(NAMESPACE)
    }
    return {**message, "params": {**params, "_meta": meta} if meta else params}


def with_subscription(message: Message, id_: str | int) -> Message:
    """A notification for the `subscriptions/listen` with this id."""
    params = message.get("params", {})
    meta = {**as_object(params.get("_meta")), SUBSCRIPTION: id_}
    return {**message, "params": {**params, "_meta": meta}}


def discovered(child: Child, message: Message) -> Message:
    """The answer to `server/discover` that says what a legacy child said in its handshake."""
    handshake_result = as_object(child.hello_answer.get("result"))
    # The tasks of the legacy revisions are others than those of the modern one.
    found = {"capabilities": without(child.can(), "tasks"), "supportedVersions": [MODERN]}
    if "instructions" in handshake_result:
        found["instructions"] = handshake_result["instructions"]
    return to_modern(response(message["id"], found), "server/discover", child)


def hello_result_of(child: Child, asked: object) -> Message:
    """The result of `initialize` that says what a modern child answered to `server/discover`.

    asked  the revision that the client asks for
    """
    found = child.hello_answer.get("result") or {}
    unnamed = {"name": child.name, "version": "0"}
    result = {
        "protocolVersion": agreed_version(asked),
        "serverInfo": as_object(found.get("_meta")).get(SERVER_INFO, unnamed),
        "capabilities": {**child.can(), "logging": {}},
    }
    if "instructions" in found:
        result["instructions"] = found["instructions"]

    return result


def to_modern(answer: Message, method: str, child: Child) -> Message:
    """A legacy server's response, for a modern client."""
    if "error" in answer:
        code = answer["error"].get("code")
        return with_code(answer, -32602 if code == -32002 else code)

    unnamed = {"name": child.name, "version": "0"}
    server = as_object(child.hello_answer.get("result")).get("serverInfo") or unnamed
    cached = {"ttlMs": 0, "cacheScope": "private"} if method in CACHED else {}
    result = {
        "resultType": "complete",
        **answer["result"],
        **cached,
        "_meta": {**as_object(answer["result"].get("_meta")), SERVER_INFO: server},
    }
    return {**answer, "result": result}


def to_legacy(answer: Message, method: str) -> Message:
    """A modern server's response, for a legacy client."""
    if "error" in answer:
        names_resource = "uri" in as_object(answer["error"].get("data"))
        is_missing = method == "resources/read" and names_resource
        return with_code(answer, -32002 if is_missing else answer["error"].get("code"))

    result = without(answer["result"], "resultType", "ttlMs", "cacheScope", "_meta")
    meta = without(answer["result"].get("_meta") or {}, SERVER_INFO)
    return {**answer, "result": {**result, "_meta": meta} if meta else result}


def with_code(answer: Message, code: object) -> Message:
    """An error with another code."""
    return {**answer, "error": {**answer["error"], "code": code}}


# ==========================================================================
# Server starts
# ==========================================================================
# One relayed server: how its children start, which era it speaks, what its tools want in headers.
#
# V1  The first answer of a child decides the era, never its silence alone.
# V2  A modern server has one child for all clients, a legacy one a child for each.
# V3  A server that never answers is started again ever more slowly.


class BackOff:
    """The faults of one server's children, and the wait before another one is started."""

    def __init__(self, name: str) -> None:
        self.name = name
        # The last fault, until a child answers; "": there is none.
        self.failure = ""
        # Children that were started after a fault.
        self.restarts = 0
        # Faults in a row before any answer.
        self.failures = 0
        # The last one of these, in seconds of time.monotonic().
        self.failed_at = 0.0
        # The earliest next start, likewise.
        self.not_before = 0.0

    async def wait(self) -> None:
        """Wait until a child may be started.  Raises RelayError if that takes too long."""
        deadline = time.monotonic() + CHILD_PATIENCE
        left = self.not_before - time.monotonic()
        while left > 0:
            if self.not_before > deadline:
                raise RelayError(
                    f"server {self.name} {self.failure}; it is started again in {left:.0f} s"
                )
            await asyncio.sleep(left)
            left = self.not_before - time.monotonic()

    def starts(self) -> None:
        """A child is being started."""
        if self.failure:
            self.restarts += 1

    def never_answered(self, began: float, failure: str) -> None:
        """A child that was started at `began` failed before any answer."""
        self.faulted(failure)
        # One that was started before the last fault says nothing new.
        if began >= self.failed_at:
            self.failures += 1
            self.failed_at = time.monotonic()
            self.not_before = self.failed_at + min(
                CHILD_BACKOFF, CHILD_FIRST_PAUSE * 2**self.failures
            )

    def faulted(self, failure: str) -> None:
        self.failure = failure
        log.warning("server %s %s", self.name, failure)

    def recovered(self) -> None:
        """A child has answered."""
        self.failure = ""
        self.failures = 0


class HeaderRules:
    """Which headers repeat arguments of a server's tools, as its list of tools says."""

    def __init__(self) -> None:
        # The last part of the header's name, by tool and argument.
        self.by_tool: dict[str, dict[str, str]] = {}
        # Seconds of time.monotonic(): then the tools are listed again.
        self.valid_until = 0.0

    async def check(self, session: Session, child: Child, message: Message) -> None:
        """Raise HeaderMismatch unless a client's headers repeat its arguments."""
        if session.headers is None or message["method"] != "tools/call":
            return
        async with child.listing:
            if time.monotonic() > self.valid_until:
                self.by_tool = await self._list(child, message["params"]["_meta"])
                self.valid_until = time.monotonic() + HEADERS_KEPT
        self.check_known(session, message)

    def check_known(self, session: Session, message: Message) -> None:
        """The same for a retry, by the rules known already: no list of tools is asked for."""
        if session.headers is not None and message["method"] == "tools/call":
            repeated = self.by_tool.get(str(message["params"].get("name")), {})
            check_parameters(message, session.headers, repeated)

    async def _list(self, child: Child, meta: Message) -> dict[str, dict[str, str]]:
        """Ask the child for its tools, with the `_meta` of a request in hand."""
        params: Message = {}
        if child.is_shared:
            known = (CLAIM, CAPABILITIES, CLIENT_INFO)
            params["_meta"] = {name: value for name, value in meta.items() if name in known}

        by_tool = dict[str, dict[str, str]]()
        for _ in range(MAX_ROUNDS):
            answer = await child.ask(new_request("tools/list", params), Outbox.nowhere())
            found = as_object(answer.get("result"))
            tools = found.get("tools")

            for shown in map(as_object, tools if isinstance(tools, list) else []):
                by_tool[str(shown.get("name"))] = marked_arguments(shown)

            if "nextCursor" not in found:
                break

            params = {**params, "cursor": found["nextCursor"]}

        return by_tool


class Launcher:
    """Starts the children of one server, and finds out its era.  Raises RelayError.

    idle       seconds after which a child that nobody uses is ended
    make_room  called when a child cannot start while others run; whether it ended one of them
    on_shared  called when the server turns out to be a modern one
    """

    def __init__(
        self,
        config: ServerConfig,
        idle: float,
        make_room: Callable[[], Awaitable[bool]],
        on_shared: Callable[[], object],
    ) -> None:
        self.config = config
        self.name = config.name
        self.idle = idle
        self.make_room = make_room
        self.on_shared = on_shared
        self.is_stopping = False
        # What the server speaks, as far as that is known.
        self.era: Era | None = None
        # Held while the era is found out, and while the child for all clients starts.
        self.probing = asyncio.Lock()
        # All that have not ended.
        self.children: set[Child] = set()
        # The one of a modern server.
        self.shared: Child | None = None
        self.back_off = BackOff(config.name)
        self.header_rules = HeaderRules()

    def running(self) -> list[Child]:
        return [child for child in self.children if child.is_usable]

    async def open(self, greeting: Message, on_message: OnMessage, outbox: Outbox) -> Child:
        """Return a child for a client; of a modern server, the one for all.

        greeting    `initialize`, of the client or on its behalf
        on_message  gets what belongs to no request
        outbox      gets what comes before the answer to `greeting`
        """
        try:
            return await self._open(greeting, on_message, outbox)
        except RelayError:
            # Perhaps the server allows only one instance.
            if self.is_stopping:
                raise

            has_room = await self.make_room()
            if not has_room:
                raise
            return await self._open(greeting, on_message, outbox)

    async def _open(self, greeting: Message, on_message: OnMessage, outbox: Outbox) -> Child:
        async with self.probing:
            if self.era is None:
                return await self._probe(greeting, on_message, outbox)

        if self.era is Era.MODERN:
            return await self.for_all()
        return await self._start_and_greet(greeting, on_message, outbox)

    async def for_all(self) -> Child:
        """Return the child of a modern server, started if need be."""
        if self.shared and self.shared.is_usable:
            return self.shared

        async with self.probing:
            if self.shared and self.shared.is_usable:
                return self.shared

            child = await self._launch(self._from_modern)
            answer = await self._first_answer(child, discovery(), Outbox.nowhere())
            if not speaks_modern(answer):
                child.end()
                self.era = None
                raise RelayError(f"server {self.name} speaks revision {MODERN} no longer")

            return self._share(child, answer)

    def _share(self, child: Child, answer: Message) -> Child:
        """It has answered `server/discover` as a modern server does: it is for all clients."""
        child.shows_era(Era.MODERN, answer)
        child.report_to(self._from_modern)
        self.back_off.recovered()
        self.era = Era.MODERN
        self.shared = child
        self.on_shared()
        self.end_when_idle(child, lambda: bool(child.in_flight.exchanges), child.end)
        return child

    # The first child

    async def _probe(self, greeting: Message, on_message: OnMessage, outbox: Outbox) -> Child:
        """Start the first child, and keep it whatever its era is.

        First it is asked `server/discover`.  If the answer is not that of a modern server, or does
        not come within PROBE_TIMEOUT seconds, it is greeted with `initialize`, as a legacy one.
        """
        child = await self._launch(on_message)
        # It may end at a request that it does not know; that is no fault.
        child.expect_end()
        discovering = asyncio.ensure_future(child.ask(discovery(), Outbox.nowhere()))
        greeting_it: asyncio.Future[Message] | None = None

        try:
            await asyncio.wait({discovering}, timeout=PROBE_TIMEOUT)

            if not discovering.done():
                # It is slow, or passes over what it does not know.
                greeting_it = asyncio.ensure_future(child.ask(greeting, outbox))
                await first_result({discovering, greeting_it}, CHILD_START - PROBE_TIMEOUT)
                if speaks_modern(outcome_of(discovering)):
                    # It may be about to accept the greeting too.
                    await asyncio.wait({greeting_it}, timeout=PROBE_TIMEOUT)

            elif child.is_usable and not speaks_modern(outcome_of(discovering)):
                greeting_it = asyncio.ensure_future(child.ask(greeting, outbox))
                await asyncio.wait({greeting_it}, timeout=CHILD_START)

            # A server of both eras that has accepted `initialize` is a legacy one from then on.
            if greeting_it is not None and "result" in outcome_of(greeting_it):
                return self._greeted(child, outcome_of(greeting_it))
            if speaks_modern(outcome_of(discovering)):
                return self._share(child, outcome_of(discovering))
            return await self._start_over(child, greeting, on_message, outbox)
        except BaseException:
            child.end()
            raise
        finally:
            discovering.cancel()
            if greeting_it is not None:
                greeting_it.cancel()

    async def _start_over(
        self, child: Child, greeting: Message, on_message: OnMessage, outbox: Outbox
    ) -> Child:
        """Replace a child that ended at the probe, or refused it, by one that is only greeted."""
        is_silent = child.is_usable and not child.has_answered
        child.end()
        if is_silent:
            raise self._gave_no_answer(child, greeting)
        return await self._start_and_greet(greeting, on_message, outbox)

    # Any child

    async def _start_and_greet(
        self, greeting: Message, on_message: OnMessage, outbox: Outbox
    ) -> Child:
        child = await self._launch(on_message)
        return self._greeted(child, await self._first_answer(child, greeting, outbox))

    def _greeted(self, child: Child, answer: Message) -> Child:
        """Record the child's answer to the handshake; return the child."""
        child.shows_era(Era.LEGACY, answer)
        self.back_off.recovered()
        # If it refuses, perhaps we got its era wrong.
        self.era = Era.LEGACY if "result" in answer else None
        return child

    async def _first_answer(self, child: Child, first_request: Message, outbox: Outbox) -> Message:
        """Ask a new child; if it does not answer, end it and raise RelayError."""
        try:
            answer = await asyncio.wait_for(child.ask(first_request, outbox), CHILD_START)
        except asyncio.TimeoutError:
            child.end()
            raise self._gave_no_answer(child, first_request) from None
        except BaseException:
            child.end()
            raise

        if not child.has_answered:
            # `answer` is our own refusal: the child has ended, or has sent no valid message.
            child.end()
            reason = child.epitaph or answer["error"]["message"]
            raise RelayError(f"{reason}, before it answered")

        return answer

    def _gave_no_answer(self, child: Child, first_request: Message) -> RelayError:
        failure = f"did not answer `{first_request['method']}` in {CHILD_START:g} s"
        self.back_off.never_answered(child.began, failure)
        return RelayError(f"server {self.name} {failure}")

    async def _launch(self, on_message: OnMessage) -> Child:
        """Start a process, once the back-off is over and the one before it has ended."""
        await self.back_off.wait()
        # A server may allow only one process at a time; if some run already, it allows several.
        if not self.running():
            enders = self._enders()
            if enders:
                await asyncio.wait(enders, timeout=CHILD_PATIENCE)

        if self.is_stopping:
            raise RelayError(f"server {self.name}: the proxy is stopping")

        began = time.monotonic()
        self.back_off.starts()
        try:
            child = await Child.start(self.config, on_message)
        except RelayError as wrong:
            reason = str(wrong).removeprefix(f"server {self.name} ")
            self.back_off.never_answered(began, reason)
            raise

        child.on_lost.append(self._on_lost)
        child.on_gone.append(self.children.discard)
        self.children.add(child)
        if self.is_stopping:
            child.end()

        return child

    def _enders(self) -> set[asyncio.Task[None]]:
        return {child.ender for child in self.children if child.ender}

    def _on_lost(self, child: Child) -> None:
        if self.shared is child:
            self.shared = None
        if child.is_end_expected:
            return
        if child.has_answered:
            self.back_off.faulted(child.reason)
        else:
            self.back_off.never_answered(child.began, child.reason)

    def end_when_idle(
        self, child: Child, is_in_use: Callable[[], bool], end: Callable[[], object]
    ) -> None:
        """Call `end` when the child has been unused for `idle` seconds."""
        if not child.is_usable:
            return
        pause = seconds_to_next_look(child.used, self.idle, is_in_use())
        if pause > 0:
            asyncio.get_running_loop().call_later(pause, self.end_when_idle, child, is_in_use, end)
        else:
            end()

    def _from_modern(self, child: Child, message: Message) -> Outbox | None:
        """Take what belongs to no request: log lines.  A modern server must not ask anything."""
        if "id" in message:
            failure = UnknownMethod("`method`: this client takes no requests")
            child.write(refusal(message["id"], failure))
            return None

        # A log line does not name its request: deliver it only if that is certain.
        wanting = child.in_flight.wanting_logs()
        if message["method"] != "notifications/message" or len(wanting) != 1:
            return None

        wanting[0].send(message)
        return wanting[0]

    async def close(self) -> None:
        """End all children."""
        self.is_stopping = True
        for child in [*self.children]:
            child.end()
        await asyncio.gather(*self._enders(), return_exceptions=True)


# ==========================================================================
# Legacy clients
# ==========================================================================
# A session at a relayed server: with a child of its own, or translated for a modern server.
#
# LC1  A child's own messages go to the session that owns it, and to no other.
# LC2  What a modern server does not have is answered here.


class Listener(Outbox):
    """Passes on what a modern server reports of changes, in the shape that legacy clients know."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(ignore)
        self.outbox = outbox

    def send(self, message: Message) -> None:
        if message["method"] != "notifications/subscriptions/acknowledged":
            params = message.get("params", {})
            meta = without(params["_meta"], SUBSCRIPTION)
            self.outbox.send({**message, "params": {**params, "_meta": meta}})


class Translator:
    """Serves a session by the shared child of a modern server.  Raises RelayError, BadMessage."""

    def __init__(self, name: str, session: Session) -> None:
        # Of the server.
        self.name = name
        self.session = session
        # Resources that the client subscribed to.
        self.uris = set[str]()
        # The server's questions that the client has not answered yet, by our ids.
        self.asked: dict[str | int, asyncio.Future[Message]] = {}
        # Hears of changes on the client's behalf.
        self.listening: asyncio.Task[None] | None = None
        # The child that was asked for them last.
        self.listens_to: Child | None = None

    async def respond(self, child: Child, message: Message, outbox: Outbox) -> Message:
        """Return the response to a client's request; `outbox` takes what comes before it."""
        result = self._answer_here(child, message)
        if result is not None:
            return response(message["id"], result)
        if self.listens_to and self.listens_to is not child:
            # The server was started again.
            self._listen(child)
        return await self._ask(child, message, outbox)

    def _answer_here(self, child: Child, message: Message) -> Message | None:
        """Answer what a modern server does not have; None: it has that."""
        method = message["method"]
        params = message.get("params", {})
        if method == "ping":
            return {}
        if method == "initialize":
            self._listen(child)
            return hello_result_of(child, params.get("protocolVersion"))

        if method == "logging/setLevel":
            self.session.logs_at(check_level("params.level", params.get("level")))
            return {}

        if method == "resources/subscribe":
            self.uris.add(str(params.get("uri")))
            self._listen(child)
            return {}

        if method == "resources/unsubscribe":
            self.uris.discard(str(params.get("uri")))
            self._listen(child)
            return {}

        return None

    async def _ask(self, child: Child, message: Message, outbox: Outbox) -> Message:
        """Ask the server, again and again as long as it has questions to the client."""
        extra: Message = {}
        for _ in range(MAX_ROUNDS):
            answer = await child.ask(self._with_envelope(message, extra), outbox)
            result = answer.get("result") or {}
            if result.get("resultType") != "input_required":
                return to_legacy(answer, message["method"])

            questions = result.get("inputRequests") or {}
            extra = {"inputResponses": await self._ask_client(questions, outbox)}
            if "requestState" in result:
                extra["requestState"] = result["requestState"]

        raise RelayError(f"server {self.name} asked {MAX_ROUNDS} times, and has no answer yet")

    def _with_envelope(self, message: Message, extra: Message) -> Message:
        return with_envelope(message, self.session.hello_params, self.session.level, extra)

    async def _ask_client(self, questions: Message, outbox: Outbox) -> Message:
        """Put a server's questions to the client, and return its answers."""
        ids = {key: f"pocketcoder-{secrets.token_hex(8)}" for key in questions}
        loop = asyncio.get_running_loop()
        waiting: dict[str | int, asyncio.Future[Message]] = {
            id_: loop.create_future() for id_ in ids.values()
        }
        self.asked |= waiting

        try:
            for key, question in questions.items():
                outbox.send({"jsonrpc": "2.0", **as_object(question), "id": ids[key]})

            answers = await asyncio.wait_for(asyncio.gather(*waiting.values()), PARK_TIMEOUT)
        except asyncio.TimeoutError:
            raise RelayError(f"the client did not answer within {PARK_TIMEOUT:g} s") from None
        finally:
            for id_ in waiting:
                del self.asked[id_]

        for answer in answers:
            if "error" in answer:
                shown = json.dumps(answer["error"])
                raise RelayError(f"the client could not answer: {shown}")

        return {key: answer["result"] for key, answer in zip(ids, answers, strict=True)}

    def take_answer(self, message: Message) -> bool:
        """Take a response of the client; whether it answers a question of the server."""
        question = self.asked.get(message["id"])
        if question is None:
            return False
        if not question.done():
            question.set_result(message)
        return True

    def _listen(self, child: Child) -> None:
        """Hear of changes on the client's behalf, instead of what it heard of before."""
        self.leave()
        self.listens_to = child
        wanted: Message = dict.fromkeys(list_flags(child.can()), True)
        if self.uris:
            wanted["resourceSubscriptions"] = sorted(self.uris)
        if wanted:
            self.listening = asyncio.ensure_future(self._hear(child, wanted))

    async def _hear(self, child: Child, wanted: Message) -> None:
        message = new_request("subscriptions/listen", {"notifications": wanted})
        listener = Listener(self.session.outbox)
        # The child has ended: the next request finds another one.
        with contextlib.suppress(RelayError):
            await child.ask(self._with_envelope(message, {}), listener)

    def leave(self) -> None:
        if self.listening:
            self.listening.cancel()
            self.listening = None


class LegacyClient:
    """What the relay keeps for a session.  Raises RelayError, BadMessage."""

    def __init__(self, launcher: Launcher, session: Session) -> None:
        self.launcher = launcher
        self.session = session
        # Its own child of a legacy server, started or starting; None: it has none.
        self.starting: asyncio.Future[Child] | None = None
        # Its child, as soon as that has asked something, even while it starts.
        self.asking: Child | None = None
        # What its child waits to hear from it, by the id of the question: until when.
        self.questions: dict[str | int, asyncio.TimerHandle] = {}
        self.translator = Translator(launcher.name, session)

    @property
    def child(self) -> Child | None:
        """Its own child, once it has started."""
        return child_of(self.starting)

    async def respond(self, message: Message, outbox: Outbox) -> Message:
        """Return the response to a request; `outbox` takes what comes before it."""
        if self.launcher.era is Era.MODERN:
            return await self.translator.respond(await self.launcher.for_all(), message, outbox)

        method = message["method"]
        has_child = is_starting(self.starting) or self.child is not None
        if method == "initialize" or not has_child:
            self._drop_child()
            self.starting = asyncio.ensure_future(self._start(message, outbox))
        assert self.starting is not None

        child = await asyncio.shield(self.starting)
        if child.is_shared:
            self.starting = None
            return await self.translator.respond(child, message, outbox)

        if method == "initialize":
            return {**child.hello_answer, "id": message["id"]}
        return await child.ask(message, outbox)

    async def _start(self, message: Message, outbox: Outbox) -> Child:
        """Start its own child of a legacy server, for this message."""
        is_handshake = message["method"] == "initialize"
        # The client may have sent its handshake when it had no child of its own, or never.  Then we
        # send the child a handshake ourselves.
        greeting = message if is_handshake else handshake({}, OURSELVES)

        child = await self.launcher.open(greeting, self._take, outbox)
        if child.is_shared:
            return child

        if not is_handshake:
            child.write(notification("notifications/initialized", {}))

        child.on_lost.append(self._on_lost)
        if child.epitaph:
            # It has ended already.
            self._on_lost(child)

        return child

    def _on_lost(self, child: Child) -> None:
        if not child.is_end_expected:
            self.session.lose()

    def _take(self, child: Child, message: Message) -> Outbox | None:
        """Bring what belongs to no request to the client."""
        is_question = "id" in message
        if is_question and message["method"] == "ping" and not self.session.outbox.readers:
            # There is no stream that it could go by.
            child.write(response(message["id"], {}))
            return None

        if is_question:
            self.asking = child
            self._wait_for_answer(child, message["id"])
        elif message["method"] == "notifications/cancelled":
            cancelled = as_object(message.get("params")).get("requestId")
            if isinstance(cancelled, (str, int)):
                self._stop_waiting(child, cancelled)

        outbox = self._stream_for(child, message)
        outbox.send(message)
        return outbox

    def _wait_for_answer(self, child: Child, id_: str | int) -> None:
        """The child's own time stands still while the client has this question to answer."""
        if id_ not in self.questions:
            child.in_flight.pause()
            loop = asyncio.get_running_loop()
            self.questions[id_] = loop.call_later(PARK_TIMEOUT, self._stop_waiting, child, id_)

    def _stop_waiting(self, child: Child, id_: str | int) -> None:
        """The question is answered, or withdrawn, or old."""
        timer = self.questions.pop(id_, None)
        if timer is not None:
            timer.cancel()
            child.in_flight.resume()

    def _stream_for(self, child: Child, message: Message) -> Outbox:
        """Choose the stream of a call if the message surely belongs there, or the session's own."""
        own = self.session.outbox
        in_flight = child.in_flight.exchanges.values()
        calls = [exchange for exchange in in_flight if not exchange.outbox.is_closed]
        if not calls:
            return own

        newest = calls[-1]
        is_question = "id" in message
        if newest.method in FIRST_REQUESTS and not is_question:
            # Some clients take the answer to `initialize` as JSON only.
            return own
        if not own.is_heard:
            # Nobody hears the session's own stream.
            return newest.outbox

        is_change = not is_question and message["method"] != "notifications/message"
        return newest.outbox if len(calls) == 1 and not is_change else own

    def notify(self, message: Message) -> None:
        """Pass on a notification of the client, or its answer to a question."""
        is_answer = "method" not in message
        if is_answer and self.translator.take_answer(message):
            return

        asked_by = self.child or self.asking
        if is_answer and asked_by is not None:
            self._stop_waiting(asked_by, message["id"])

        if self.child is not None:
            self.child.write(message)
        elif self.asking and is_answer:
            # It has asked before it is ready.
            self.asking.write(message)

    def leave(self) -> None:
        """Its session has ended."""
        self._drop_child()

    def _drop_child(self) -> None:
        """End its own child, and stop listening to the shared one."""
        self.translator.leave()
        for timer in self.questions.values():
            timer.cancel()
        self.questions.clear()

        if self.starting:
            abandon(self.starting)
            self.starting = None


# ==========================================================================
# Modern clients
# ==========================================================================
# Modern clients of a server that is not known to be modern: each has a child of its own, and brings
# answers to its questions.
#
# G1  A client that the child asks gets the questions as its answer, and returns with a retry.
# G2  A question waits for a call that may be asked, and is answered once or refused.


class Question(NamedTuple):
    """What a legacy child asks a modern client.

    is_outside  it was asked outside of any call, as when the child starts
    """

    child: Child
    message: Message
    is_outside: bool = False

    @property
    def name(self) -> str:
        return question_name(self.message["id"])

    def answer(self, result: Message) -> None:
        """Give the child the client's answer.  Raises RelayError."""
        self.child.write(response(self.message["id"], result))

    def refuse(self, failure: ProxyError) -> None:
        """Give the child an error instead of an answer."""
        with contextlib.suppress(RelayError):
            self.child.write(refusal(self.message["id"], failure))


def question_name(id_: str | int) -> str:
    """How a question of the child with this id is named to the client."""
    return f"question-{json.dumps(id_)}"


class Call:
    """A modern client's request to a legacy server, from its first message through its retries."""

    def __init__(self, session: Session, message: Message, outbox: Outbox) -> None:
        self.session = session
        self.exchange = Exchange(message, outbox)
        # What the client has to answer before it gets its own answer, by name.
        self.questions: dict[str, Question] = {}
        # Set while there are such questions.
        self.asked = asyncio.Event()
        # Set while there are none.
        self.all_answered = asyncio.Event()
        self.all_answered.set()
        # Its client got the questions, and is to return with answers.
        self.is_parked = False
        # The task that gets the answer, and starts the child before that if need be.  Until `start`
        # there is a placeholder.
        self.work: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def start(self, work: Coroutine[Any, Any, Message]) -> None:
        """Let this work get the answer."""
        self.work = asyncio.ensure_future(work)
        # Its caller may have left, and so not take a failure.
        self.work.add_done_callback(retrieve)

    @property
    def id(self) -> str | int:
        """Of its newest message."""
        id_: str | int = self.exchange.message["id"]
        return id_

    @property
    def may_ask(self) -> bool:
        """Whether the child may ask because of it."""
        return self.exchange.method in MAY_ASK

    @property
    def may_be_asked(self) -> bool:
        return self.may_ask and not self.is_parked

    def park(self) -> None:
        """Its client was sent away."""
        self.is_parked = True

    def unpark(self) -> None:
        """Its client has returned, or never will."""
        self.is_parked = False

    def put(self, question: Question) -> None:
        self.questions[question.name] = question
        self.asked.set()
        self.all_answered.clear()

    def remove(self, name: str) -> Question | None:
        """Return a question that its client has to answer no longer."""
        question = self.questions.pop(name, None)
        if not self.questions:
            self.asked.clear()
            self.all_answered.set()
        return question

    def remove_all(self) -> list[Question]:
        questions = [*self.questions.values()]
        for question in questions:
            self.remove(question.name)
        return questions

    async def until_asked(self) -> bool:
        """Wait for the answer or for questions; whether there are questions first."""
        while not self.work.done():
            asked = asyncio.ensure_future(self.asked.wait())
            either: set[asyncio.Future[Any]] = {self.work, asked}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                asked.cancel()

            if not self.work.done():
                # The child may ask more at once.
                await asyncio.sleep(QUESTION_PAUSE)

            if self.questions and not self.work.done():
                return True

        return False


class Parked(NamedTuple):
    """A call that waits for its client to return."""

    call: Call
    child: Child
    expiry: asyncio.TimerHandle


class ModernClient:
    """A modern client of a legacy server, and its child.  Raises RelayError, BadMessage.

    It is made while the server's era is not known yet, too.  If the server turns out to be a modern
    one, the calls that came until then go to the child for all clients.

    All its calls go to its child at once.  What the child asks goes to the newest call in flight
    that may be asked, or waits for the next one.

    on_idle    called when nothing is in flight
    on_unused  called when it has neither a call nor a child
    """

    def __init__(
        self,
        launcher: Launcher,
        meta: Message,
        on_idle: Callable[[], object],
        on_unused: Callable[[ModernClient], object],
    ) -> None:
        self.launcher = launcher
        self.on_idle = on_idle
        self.on_unused = on_unused
        # Its name and version.
        self.info = as_object(meta.get(CLIENT_INFO))
        if not all(isinstance(self.info.get(name), str) for name in OURSELVES):
            # A legacy server may refuse a client that has no name.
            self.info = OURSELVES

        declared = meta[CAPABILITIES]
        # Its capabilities, of those by which a server may ask it something.
        self.can = {name: declared[name] for name in ASKING.values() if name in declared}
        # Its child, started or starting; None: it has none.
        self.starting: asyncio.Future[Child] | None = None
        # In flight or parked, the newest last.
        self.calls: list[Call] = []
        # The one that the child is started for: it is asked first.
        self.starter: Call | None = None
        # Questions of its child that could not be put to any call yet.
        self.questions: deque[Question] = deque()
        # Calls that wait for the client to return, by its `requestState`.
        self.parked: dict[str, Parked] = {}
        # What each `subscriptions/listen` wants to hear of.
        self.listeners: dict[Call, Message] = {}
        # Its last request or answer, in seconds of time.monotonic().
        self.used = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight; its person may be about to answer."""
        return all(call.is_parked for call in self.calls)

    # Its calls

    async def respond(self, session: Session, message: Message, outbox: Outbox) -> Message:
        """Return the child's answer, or its questions if there are some first."""
        self.used = time.monotonic()
        state = message["params"].get("requestState")
        if isinstance(state, str):
            self.launcher.header_rules.check_known(session, message)
            call = self._return(state, message, outbox)
        else:
            call = Call(session, message, outbox)
            self.calls.append(call)
            call.start(self._perform(call))

        self._hand_out()

        has_questions = False
        try:
            has_questions = await call.until_asked()
            if has_questions:
                return self._park(call)

            answer = await call.work
            return {**answer, "id": call.id}
        finally:
            if not has_questions:
                self._forget(call)

    async def _perform(self, call: Call) -> Message:
        """Bring a call to the child, and return the child's answer."""
        child = await self._running(call)
        exchange = call.exchange
        method = exchange.method
        rules = self.launcher.header_rules

        if child.is_shared:
            # The server has turned out to be a modern one.
            await rules.check(call.session, child, exchange.message)
            child.send(exchange, exchange.message)
            return await child.answer(exchange)

        if method in REMOVED or method.startswith("tasks/"):
            raise UnknownMethod(f"`method`: got {method}, which revision {MODERN} does not have")
        if method == "server/discover":
            return discovered(child, exchange.message)
        if method == "subscriptions/listen":
            return await self._listen(child, call)

        if call.questions:
            # Asked before this call: the child may need the answer in order to serve it.
            await call.all_answered.wait()
            await settle(child)

        await rules.check(call.session, child, exchange.message)
        await self._set_level(child, exchange)
        child.send(exchange, without_envelope(exchange.message))
        return to_modern(await child.answer(exchange), method, child)

    async def _set_level(self, child: Child, exchange: Exchange) -> None:
        """Let the child log at the level that a request asks for."""
        level = exchange.meta.get(LOG_LEVEL)
        if isinstance(level, str) and level != child.level and "logging" in child.can():
            child.logs_at(level)
            await child.ask(new_request("logging/setLevel", {"level": level}), exchange.outbox)

    async def _listen(self, child: Child, call: Call) -> Message:
        """Serve `subscriptions/listen`, until the client leaves or the child does."""
        outbox = call.exchange.outbox
        asked = call.exchange.message["params"].get("notifications")
        if not isinstance(asked, dict):
            raise complain("params.notifications", asked, "an object")

        wanted = listens_for(child.can(), asked)
        meta = {SUBSCRIPTION: call.id}
        acknowledged = {"_meta": meta, "notifications": wanted}
        outbox.send(notification("notifications/subscriptions/acknowledged", acknowledged))

        self.listeners[call] = wanted
        try:
            for uri in wanted.get("resourceSubscriptions", []):
                await child.ask(new_request("resources/subscribe", {"uri": uri}), outbox)

            await child.lost.wait()
        finally:
            del self.listeners[call]

        return response(call.id, {"resultType": "complete", "_meta": meta})

    def _forget(self, call: Call) -> None:
        """Drop a call that is over, or whose client has left.

        Its open questions go to another call of this client, or are refused.
        """
        if call in self.calls:
            self.calls.remove(call)

        others_may_ask = any(each.may_ask for each in self.calls)
        for question in call.remove_all():
            # What a cancelled call made the child ask is of no use to later calls.
            if question.is_outside or others_may_ask or call.work.done():
                self.questions.append(question)
            else:
                question.refuse(RelayError("the client did not answer"))

        call.work.cancel()
        self._hand_out()
        self.used = time.monotonic()
        self._report_if_idle()
        self._report_if_unused()

    def _report_if_idle(self) -> None:
        if self.is_idle:
            self.on_idle()

    def _report_if_unused(self) -> None:
        if not self.calls and self.starting is None:
            self.on_unused(self)

    # Its child

    async def _running(self, call: Call) -> Child:
        """Return its child; started for this call, if there is none."""
        if not self._has_child():
            self.starter = call
            self.starting = asyncio.ensure_future(self._start())
            self.starting.add_done_callback(self._started)
        assert self.starting is not None
        return await asyncio.shield(self.starting)

    def _has_child(self) -> bool:
        """Whether it has a child that can be used, or one that is starting."""
        child = child_of(self.starting)
        return is_starting(self.starting) or (child is not None and child.is_usable)

    async def _start(self) -> Child:
        """Start its child, and let that ask its questions."""
        greeting = handshake(self.can, self.info)
        child = await self.launcher.open(greeting, self._take, Outbox.nowhere())
        if child.is_shared:
            return child
        if "result" not in child.hello_answer:
            child.end()
            reason = child.hello_answer["error"]["message"]
            raise RelayError(f"server {self.launcher.name} refused `initialize`: {reason}")

        child.on_lost.append(self._on_lost)
        child.write(notification("notifications/initialized", {}))
        if self.can:
            # It may ask at once, and serve nothing before it has an answer.
            await settle(child)

        self.launcher.end_when_idle(child, lambda: bool(self.calls), self.end)
        return child

    def _started(self, starting: asyncio.Future[Child]) -> None:
        self.starter = None
        if self.starting is starting and not self._has_child():
            self.starting = None
            self._report_if_unused()

    def _on_lost(self, child: Child) -> None:
        """Its child has ended: the next call starts a new one, which asks anew."""
        if child_of(self.starting) is child:
            self.starting = None
        self.questions = deque(each for each in self.questions if each.child is not child)
        for call in self.calls:
            for question in [*call.questions.values()]:
                if question.child is child:
                    call.remove(question.name)
        self._report_if_unused()

    def end(self) -> None:
        """End its child.  When the client returns, it is a new one."""
        for state in [*self.parked]:
            self._expire(state)
        if self.starting:
            abandon(self.starting)
            self.starting = None
        self._report_if_unused()

    # What its child says

    def _take(self, child: Child, message: Message) -> Outbox | None:
        """Take what belongs to no request of the client."""
        method = message["method"]
        if "id" in message:
            self._take_question(child, message)
            return None

        if method == "notifications/cancelled":
            self._withdraw(child, as_object(message.get("params")).get("requestId"))
            return None

        if method == "notifications/message":
            wanting = child.in_flight.wanting_logs()
            if not wanting:
                return None

            wanting[-1].send(message)
            return wanting[-1]

        self._announce(message)
        return None

    def _take_question(self, child: Child, message: Message) -> None:
        """Keep a question for the client, or refuse it if the client cannot be asked."""
        method = message["method"]
        in_flight = child.in_flight.exchanges.values()
        is_outside = not any(exchange.method in MAY_ASK for exchange in in_flight)
        question = Question(child=child, message=message, is_outside=is_outside)

        if method == "ping":
            child.write(response(message["id"], {}))
        elif ASKING.get(method) not in self.can or len(self.questions) >= MAX_QUESTIONS:
            shown = in_json(method, 80)
            failure = UnknownMethod(f"`method`: the client cannot be asked {shown}")
            child.write(refusal(message["id"], failure))
        else:
            self.questions.append(question)
            self._hand_out()

    def _hand_out(self) -> None:
        """Give the questions that wait to the call that brings them to the client."""
        calls = [call for call in self.calls if call.may_be_asked]
        if not calls:
            return
        call = self.starter if self.starter in calls else calls[-1]
        while self.questions and len(call.questions) < MAX_ROUNDS:
            call.put(self.questions.popleft())

    def _withdraw(self, child: Child, id_: object) -> None:
        """The child does not want an answer to this question any more."""
        if not is_id(id_):
            return
        name = question_name(id_)
        self.questions = deque(
            each for each in self.questions if each.child is not child or each.name != name
        )
        for call in self.calls:
            call.remove(name)

    def _announce(self, message: Message) -> None:
        """Report a change to the streams that listen for it."""
        flag = change_flag(CHANGED.get(message["method"]))
        uri = message.get("params", {}).get("uri")
        for call, wanted in self.listeners.items():
            if wanted.get(flag) or uri in wanted.get("resourceSubscriptions", []):
                call.exchange.outbox.send(with_subscription(message, call.id))

    # Its person

    def _park(self, call: Call) -> Message:
        """Ask the client, which returns with the answers in a request of its own."""
        state = secrets.token_urlsafe(24)
        child = next(iter(call.questions.values())).child
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(PARK_TIMEOUT, self._expire, state)
        self.parked[state] = Parked(call=call, child=child, expiry=expiry)
        call.park()
        child.in_flight.pause()
        self._report_if_idle()

        requests = {
            name: without(question.message, "jsonrpc", "id")
            for name, question in call.questions.items()
        }
        result = {"resultType": "input_required", "inputRequests": requests, "requestState": state}
        return response(call.id, result)

    def _return(self, state: str, message: Message, outbox: Outbox) -> Call:
        """Continue a parked call: the child gets the answers that its client brings."""
        parked = self.parked.get(state)
        if parked is None or bound_to(message) != bound_to(parked.call.exchange.message):
            raise unknown_state()

        call = parked.call
        self._unpark(state)
        call.exchange.take_up(message, outbox)

        given = as_object(message["params"].get("inputResponses"))
        try:
            for name, question in [*call.questions.items()]:
                if isinstance(given.get(name), dict):
                    call.remove(name)
                    question.answer(given[name])
        except RelayError:
            self._forget(call)
            raise

        return call

    def _unpark(self, state: str) -> None:
        parked = self.parked.pop(state)
        parked.expiry.cancel()
        parked.child.in_flight.resume()
        parked.call.unpark()

    def _expire(self, state: str) -> None:
        """Its client does not return: the child gets no answer from it."""
        call = self.parked[state].call
        self._unpark(state)
        for question in call.remove_all():
            question.refuse(RelayError("the client did not answer"))
        self._forget(call)


def unknown_state() -> BadMessage:
    return BadMessage("`requestState`: got one that is unknown here, or has expired: start anew")


def bound_to(message: Message) -> tuple[object, ...]:
    """What a retry must have in common with the request before it."""
    params = without(message["params"], "_meta", "requestState", "inputResponses")
    return message["method"], params


# ==========================================================================
# Relay
# ==========================================================================
# Stdio MCP servers of the sandbox, for clients of either era, whatever they speak themselves.
#
# R1  Messages pass as they came but for ids, progress tokens, subscriptions and the era's envelope.
# R2  What a client does not use any more is ended: its child, and its place here.


class RelayState(enum.Enum):
    """What `GET /servers` says of one."""

    IDLE = "idle"  # nobody uses it
    RUNNING = "running"  # it has a process
    FAILED = "failed"  # its last process did not start, or has ended with an error


class Relay(McpServer):
    """One relayed server: brings each request to the right child.  Raises RelayError, BadMessage.

    idle  seconds after which a child that nobody uses is ended

    | client | legacy server, or era not known yet | modern server                   |
    |--------|-------------------------------------|---------------------------------|
    | legacy | LegacyClient, with its own child    | LegacyClient, by its Translator |
    | modern | ModernClient, with its own child    | the child for all, as it is     |

    If a server whose era was not known turns out to be modern, all these clients go on with the
    child for all.
    """

    def __init__(self, config: ServerConfig, idle: float = CHILD_IDLE) -> None:
        self.name = config.name
        self.session_idle = idle
        self.launcher = Launcher(config, idle, self._end_an_abandoned_session, self._on_shared)
        # Legacy clients, by session, from their first request on.
        self.legacy_clients: dict[Session, LegacyClient] = {}
        # Modern clients of a server that is not known to be modern, by `key_of`.
        self.modern_clients: dict[str, ModernClient] = {}
        # One of them may need its child no longer.
        self.room = asyncio.Event()

    def state(self) -> RelayState:
        if self.launcher.running():
            return RelayState.RUNNING
        if self.launcher.back_off.failure:
            return RelayState.FAILED
        return RelayState.IDLE

    def shown(self) -> Message:
        """Return its row in `GET /servers`."""
        running = self.launcher.running()
        failure = self.launcher.back_off.failure
        era = self.launcher.era
        shown = {
            "name": self.name,
            "state": self.state().value,
            "era": era.value if era else None,
            "pid": min((child.process.pid for child in running), default=None),
            "restarts": self.launcher.back_off.restarts,
        }
        return {**shown, "error": failure} if failure else shown

    async def respond(
        self, session: Session, message: Message, era: Era, outbox: Outbox
    ) -> Message:
        if era is Era.LEGACY:
            client = self.legacy_clients.get(session)
            if client is None:
                client = LegacyClient(self.launcher, session)
                self.legacy_clients[session] = client

            return await client.respond(message, outbox)

        if self.launcher.era is Era.MODERN:
            child = await self.launcher.for_all()
            await self.launcher.header_rules.check(session, child, message)
            return await child.ask(message, outbox)

        modern_client = await self._modern_client(session, message)
        return await modern_client.respond(session, message, outbox)

    def notify(self, session: Session, message: Message) -> None:
        client = self.legacy_clients.get(session)
        if client is not None:
            client.notify(message)

    def leave(self, session: Session) -> None:
        client = self.legacy_clients.pop(session, None)
        if client is not None:
            client.leave()

    async def _end_an_abandoned_session(self) -> bool:
        """Make room for a client if its server allows only one instance; whether that was done.

        A client may have left without ending its session: it was killed, for instance, and is
        started again.  So end the only session, if it has neither a call nor a stream.
        """
        if not any(client.child for client in self.legacy_clients.values()):
            return False

        # Its stream may be about to end.
        await asyncio.sleep(ABANDON_PAUSE)

        running = self.launcher.running()
        if len(running) != 1 or running[0].in_flight.exchanges:
            return False

        for session, client in self.legacy_clients.items():
            if client.child is running[0] and not session.outbox.is_heard:
                log.warning("server %s: ends an unused session for another client", self.name)
                session.lose()
                running[0].end()
                return True

        return False

    # Modern clients of a server that is not known to be modern

    async def _modern_client(self, session: Session, message: Message) -> ModernClient:
        """Return the client that sends this; a new one waits for room."""
        key = key_of(session, message)
        is_retry = isinstance(message["params"].get("requestState"), str)
        if key not in self.modern_clients and is_retry:
            raise unknown_state()

        deadline = time.monotonic() + CHILD_PATIENCE
        while key not in self.modern_clients and len(self.modern_clients) >= MAX_CHILDREN:
            if not self._end_an_idle_client():
                await self._wait_for_room(deadline)

        if key not in self.modern_clients:
            self.modern_clients[key] = ModernClient(
                self.launcher,
                message["params"]["_meta"],
                on_idle=self.room.set,
                on_unused=partial(self._forget_client, key),
            )

        return self.modern_clients[key]

    def _end_an_idle_client(self) -> bool:
        """End the one that was used longest ago; whether there was one.

        One that waits for the answer of a person is ended only if there is no other.
        """
        idle = [client for client in self.modern_clients.values() if client.is_idle]
        if not idle:
            return False
        without_calls = [client for client in idle if not client.calls]
        min(without_calls or idle, key=lambda client: client.used).end()
        return True

    async def _wait_for_room(self, deadline: float) -> None:
        self.room.clear()
        if not await is_set_within(self.room, deadline - time.monotonic()):
            raise RelayError(
                f"server {self.name}: {len(self.modern_clients)} clients use it, "
                f"expected fewer than {MAX_CHILDREN}: try later"
            )

    def _forget_client(self, key: str, client: ModernClient) -> None:
        if self.modern_clients.get(key) is client:
            del self.modern_clients[key]
            self.room.set()

    def _on_shared(self) -> None:
        """The server is a modern one: its modern clients need no child of their own."""
        self.modern_clients.clear()
        self.room.set()

    async def close(self) -> None:
        """End all children."""
        await self.launcher.close()


def key_of(session: Session, message: Message) -> str:
    """Identify a modern client: requests with one key come from one client."""
    meta = message["params"]["_meta"]
    identity = [session.credential, session.address, meta.get(CLIENT_INFO), meta[CAPABILITIES]]
    return json.dumps(identity, sort_keys=True)


# ==========================================================================
# Built-in server
# ==========================================================================
# The MCP server whose tools are commands and terminals; the tools themselves stand below.
#
# I1  What a tool cannot do is a result that a model reads, not an error.

# Reports progress: seconds since the start, and the newest line of output.
Report = Callable[[float, str], None]
# What a tool does; it gets the AppState, its arguments, and a Report if its client wants progress.
ToolWork = Callable[[Any, Message, "Report | None"], Awaitable[Message]]

INSTRUCTIONS = (
    "Terminals of a sandbox. `exec` runs a bash command and answers with its output and exit code; "
    "the other tools are for programs that talk to a person."
)

HINTS = ("readOnly", "destructive", "idempotent", "openWorld")


@dataclass(frozen=True)
class Tool:
    """What clients see of a tool, and what it does."""

    shown: Message
    takes: Mapping[str, Field]
    needs: Sequence[str]
    run: ToolWork


# By name, in the order in which clients see them.
TOOLS: dict[str, Tool] = {}


def tool(
    title: str,
    hints: str,
    takes: Mapping[str, Field],
    needs: Sequence[str] = (),
    gives: Message | None = None,
    may_give: Message | None = None,
) -> Callable[[ToolWork], ToolWork]:
    """Register NAME_tool; its docstring is the description that a model reads.

    hints     those of HINTS that are true
    takes     the arguments; NAME_tool gets a checked value for each
    needs     those that must be given
    gives     the JSON schema of each field of a structured result
    may_give  the same of fields that may be missing
    """

    def register(run: ToolWork) -> ToolWork:
        name = run.__name__.removesuffix("_tool")
        flags = {f"{hint}Hint": hint in hints.split() for hint in HINTS}
        shown: Message = {
            "name": name,
            "title": title,
            "description": " ".join((run.__doc__ or "").split()),
            "annotations": {"title": title, **flags},
            "inputSchema": object_schema(without_examples(schemas(takes)), needs),
        }
        if gives:
            fields = {**gives, **(may_give or {})}
            shown["outputSchema"] = object_schema(fields, list(gives))

        TOOLS[name] = Tool(shown=shown, takes=takes, needs=needs, run=run)
        return run

    return register


def content(text: str, structured: Message | None = None, failed: bool = False) -> Message:
    """A tool's result, for a model and for a program."""
    fields: Message = {"content": [{"type": "text", "text": text}], "isError": failed}
    return fields if structured is None else {**fields, "structuredContent": structured}


def built_in_facts() -> Facts:
    """What the built-in server reports of itself, once the tools are registered."""
    return Facts(
        name="pocketcoder",
        version=VERSION,
        instructions=INSTRUCTIONS,
        tools=tuple(each.shown for each in TOOLS.values()),
    )


class BuiltInServer(McpServer):
    """The server of the tools in TOOLS.

    state  what they work with, an AppState
    """

    def __init__(self, state: Any) -> None:
        self.state = state
        self.facts = built_in_facts()

    async def respond(
        self, session: Session, message: Message, era: Era, outbox: Outbox
    ) -> Message:
        version = MODERN if era is Era.MODERN else session.version or LEGACY[-1]
        answer: Message = {}
        for decision in step(message, version, self.facts):
            if isinstance(decision, Send):
                answer = decision.message
            elif isinstance(decision, SetLevel):
                session.logs_at(decision.level)
            else:
                fields = await self._call(decision, outbox)
                answer = success(decision.id, fields, "tools/call", version, self.facts)

        return answer

    async def _call(self, call: CallTool, outbox: Outbox) -> Message:
        """Run a tool, and send its progress to `outbox` if the client wants any."""

        def report(seconds: float, line: str) -> None:
            params: Message = {"progressToken": call.token, "progress": round(seconds, 3)}
            if line:
                params["message"] = line

            outbox.send(notification("notifications/progress", params))

        tool = TOOLS[call.name]
        wants_progress = call.token is not None
        try:
            arguments = checked(call.arguments, tool.takes, tool.needs)
            result = await tool.run(self.state, arguments, report if wants_progress else None)
        except ProxyError as wrong:
            result = content(str(wrong), failed=True)

        # So that a model notices its slip.
        ignored = ignored_names(call.arguments, tool.takes.keys())
        if ignored:
            remark = f"[arguments that mean nothing here: {', '.join(ignored)}]"
            result["content"].append({"type": "text", "text": remark})

        return result


# ==========================================================================
# Metrics
# ==========================================================================
# Counts and sizes of this server in Prometheus' text format, version 0.0.4.
#
# N1  The values of a label are known beforehand and few: never names of agents, paths, commands.
# N2  Counters start at 0 with the server, and nothing keeps them.
SINCE_START = "since the server started"
# Those of a relayed server's clients are sessions too.
TRANSPORTS = ("http", "sse", "ws")


class Gauge:
    """A value that goes up and down, for each combination of the values of its labels.

    labels  all values that each label can have; a combination starts at 0
    """

    kind = "gauge"

    def __init__(self, name: str, about: str, **labels: Sequence[str]) -> None:
        self.name = name
        self.about = about
        self.labels = labels
        self.values: dict[tuple[str, ...], float] = dict.fromkeys(product(*labels.values()), 0)

    def set(self, value: float, *labels: str) -> None:
        self.values[labels] = value

    def lines(self) -> Iterator[str]:
        """Its lines, those that describe it first."""
        yield f"# HELP {self.name} {self.about}."
        yield f"# TYPE {self.name} {self.kind}"
        for values, value in self.values.items():
            labels = dict(zip(self.labels, values))
            yield sample_line(self.name, labels, value)


class Counter(Gauge):
    """A count that only grows; its name ends with `_total`."""

    kind = "counter"

    def add(self, amount: float, *labels: str) -> None:
        self.values[labels] += amount


class Histogram:
    """How many observations there were up to each bound, and their sum."""

    def __init__(self, name: str, about: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.about = about
        self.bounds = bounds
        # Of each bound those that are not in the one before; the last are above all bounds.
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.about}."
        yield f"# TYPE {self.name} histogram"
        total = 0
        for bound, count in zip((*self.bounds, math.inf), self.counts):
            total += count
            yield sample_line(f"{self.name}_bucket", {"le": number_text(bound)}, total)

        yield sample_line(f"{self.name}_sum", {}, self.sum)
        yield sample_line(f"{self.name}_count", {}, total)


def number_text(value: float) -> str:
    """A number as Prometheus reads it."""
    return "+Inf" if value == math.inf else f"{value:.15g}"


def sample_line(name: str, labels: Mapping[str, str], value: float) -> str:
    """One line.  The values of our labels need no escapes."""
    shown = ",".join(f'{label}="{text}"' for label, text in labels.items())
    return f"{name}{{{shown}}} {number_text(value)}" if shown else f"{name} {number_text(value)}"


def reasons() -> list[str]:
    """The label of each error for which a request may be refused."""
    found = [ProxyError]
    for kind in found:
        found.extend(kind.__subclasses__())
    return [reason_label(kind) for kind in found]


def reason_label(kind: type[ProxyError]) -> str:
    """The name of a class of errors in lower case: `no_terminal`."""
    return re.sub(r"\B([A-Z])", r"_\1", kind.__name__).lower()


class Metrics:
    """All metrics of a server: what is counted as it happens, and what is measured when asked."""

    def __init__(self) -> None:
        self.commands = Counter(
            "pocketcoder_commands_total",
            f"Commands that have ended {SINCE_START}, by the way in which they came and how they"
            " ended",
            door=DOORS,
            ended=[*ENDINGS],
        )
        self.output = Counter(
            "pocketcoder_command_output_bytes_total",
            f"Bytes that ended commands have written {SINCE_START}",
        )
        self.waited = Histogram(
            "pocketcoder_command_wait_seconds",
            f"Time for which ended commands had waited for a pane, {SINCE_START}",
            WAIT_BOUNDS,
        )
        self.ran = Histogram(
            "pocketcoder_command_run_seconds",
            f"Time from the start of commands to their end, {SINCE_START}",
            RUN_BOUNDS,
        )
        self.refused = Counter(
            "pocketcoder_requests_refused_total",
            f"Requests refused {SINCE_START}, by the class of the error",
            reason=reasons(),
        )
        self.running = Gauge("pocketcoder_commands_running", "Commands that run")
        self.waiting = Gauge("pocketcoder_commands_waiting", "Commands that wait for a pane")
        self.terminals = Gauge(
            "pocketcoder_terminals", f"Agents whose terminal was used {SINCE_START}"
        )
        self.sessions = Gauge(
            "pocketcoder_mcp_sessions", "Open MCP sessions, by transport", transport=TRANSPORTS
        )
        self.servers = Gauge(
            "pocketcoder_mcp_servers",
            "Relayed MCP servers, by state",
            state=[state.value for state in RelayState],
        )
        self.ready = Gauge("pocketcoder_ready", "Whether a command could run now: 1, otherwise 0")
        self.version = Gauge(
            "pocketcoder_build_info", "The version of the server; always 1", version=[VERSION]
        )
        self.version.set(1, VERSION)

        # Named as in other programs.
        self.cpu = Counter("process_cpu_seconds_total", "CPU time that the server has used")
        self.resident = Gauge("process_resident_memory_bytes", "Resident memory of the server")
        self.virtual = Gauge("process_virtual_memory_bytes", "Virtual memory of the server")
        self.open = Gauge("process_open_fds", "Open file descriptors of the server")
        self.most = Gauge("process_max_fds", "File descriptors that the server may open")
        self.started = Gauge(
            "process_start_time_seconds", "When the server started, in seconds since 1970"
        )

    def command_ended(self, door: str, result: CommandResult) -> None:
        self.commands.add(1, door, result.ended)
        self.output.add(result.output_bytes)
        self.waited.observe(result.waited_ms / 1000)
        self.ran.observe(result.duration_ms / 1000)

    def request_refused(self, error: ProxyError) -> None:
        self.refused.add(1, reason_label(type(error)))

    def measure_process(self) -> None:
        """What the system says of this process."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        pages = read_proc(os.getpid(), "statm").split()
        page = resource.getpagesize()
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        found = process(os.getpid())
        self.cpu.set(used.ru_utime + used.ru_stime)
        self.virtual.set(int(pages[0]) * page)
        self.resident.set(int(pages[1]) * page)
        # Without the one that lists them.
        self.open.set(len(os.listdir("/proc/self/fd")) - 1)
        self.most.set(math.inf if most == resource.RLIM_INFINITY else most)
        if found is not None:
            age = (ticks() - found.started_at) / os.sysconf("SC_CLK_TCK")
            self.started.set(round(time.time() - age, 2))

    def text(self) -> str:
        """All of them, in the order in which they are made above."""
        lines = [line for metric in vars(self).values() for line in metric.lines()]
        return "\n".join(lines) + "\n"


# ==========================================================================
# State
# ==========================================================================
# What handlers share, built once in `serve`; what is recorded of commands and calls.
#
# A1  Every command comes to the driver through `executed` or `launched`, whatever the door; keys
#     through `type_keys`.
# A2  What is typed or run is in the audit log before it happens.
@dataclass
class AppState(SessionHost):
    """What the handlers share."""

    # Of MCP, by id.
    sessions: SessionMap
    driver: PocketCoderDriver
    # A real path.
    workspace: str = "/"
    audit: AuditLog = field(default_factory=AuditLog)
    refusals: Refusals = field(default_factory=Refusals)
    metrics: Metrics = field(default_factory=Metrics)
    # Handlers at work; `perform` and `start` add and remove them.
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    # Of MCP, by name; "" is the built-in one.
    servers: dict[str, McpServer] = field(default_factory=dict)
    readiness: Readiness = field(init=False)

    def __post_init__(self) -> None:
        self.readiness = Readiness(self.workspace, self.driver, self.audit)
        self.servers[""] = BuiltInServer(self)
        self.screens = Screens(self.driver)
        # Tests may pass a plain dict.
        if not isinstance(self.sessions, SessionMap):
            self.sessions = SessionMap(self.sessions)

    async def measured(self) -> str:
        """The metrics, as they are now."""
        metrics = self.metrics
        metrics.running.set(self.driver.running_now())
        metrics.waiting.set(self.driver.waiting_now())
        metrics.terminals.set(self.driver.terminals_now())

        opened = [session.transport for session in self.sessions.values()]
        for transport in TRANSPORTS:
            metrics.sessions.set(opened.count(transport), transport)

        relays = [server for server in self.servers.values() if isinstance(server, Relay)]
        states = [relay.state() for relay in relays]
        for state in RelayState:
            metrics.servers.set(states.count(state), state.value)

        problem = await self.readiness.problem()
        metrics.ready.set(0 if problem else 1)
        metrics.measure_process()
        return metrics.text()

    def watch_call(self, session: Session, message: Message) -> CallWatch:
        if self.audit.path and isinstance(session.server, Relay):
            return RelayedCall(self.audit, session, message)
        return NOT_WATCHED


class RelayedCall(CallWatch):
    """A request to a relayed server, as the audit log has it: never its arguments or its result."""

    def __init__(self, audit: AuditLog, session: Session, message: Message) -> None:
        self.audit = audit
        self.started = time.monotonic()
        params = message.get("params", {})
        meta = as_object(params.get("_meta"))
        client = as_object(meta.get(CLIENT_INFO) or session.hello_params.get("clientInfo"))
        self.fields = {
            "call_id": secrets.token_hex(8),
            "server": session.server.name,
            "method": shown_name(message["method"]),
            "tool": shown_name(params.get("name")) if message["method"] == "tools/call" else None,
            "client": {name: shown_name(client.get(name)) for name in ("name", "version")},
            "address": session.address,
        }

    async def start(self) -> None:
        """Write that it starts; without that it is not made.  Raises NoAudit."""
        await self.audit.start(self.fields)

    def end(self, answer: Message | None) -> None:
        """Write how it ended; None: it was cancelled."""
        error: str | None = None
        if answer is None:
            error = "cancelled"
        elif "error" in answer:
            # The words of an error may repeat arguments.
            error = f"error {answer['error'].get('code')}"
        elif answer["result"].get("isError") is True:
            error = "the tool failed"
        duration = round((time.monotonic() - self.started) * 1000)
        self.audit.end({**self.fields, "duration_ms": duration, "error": error})

    async def audited(self) -> None:
        await self.audit.written()


def shown_name(value: object) -> str | None:
    """A name from outside, cut to what a line of the log has room for."""
    return value[:MAX_NAME] if isinstance(value, str) else None


class Notes(Watch):
    """Reports a run to the audit log, and to the session that the request names."""

    def __init__(self, state: AppState, request: ExecRequest, door: str) -> None:
        self.state = state
        self.request = request
        # One of DOORS.
        self.door = door

    @classmethod
    def of_run(cls, state: AppState, run: Run) -> Notes:
        """Of a run that another server has started."""
        request = ExecRequest(
            cmd=run.cmd,
            cwd=run.cwd,
            agent_name=run.agent_name,
            session_id=run.session_id,
            usage_id=run.usage_id,
        )
        return cls(state, request, run.door)

    def _fields(self, run_id: str) -> Message:
        fields: Message = {
            "run_id": run_id,
            "door": self.door,
            "usage_id": self.request.usage_id,
            "session_id": self.request.session_id,
            "agent_name": self.request.agent_name,
            "cwd": self.request.cwd,
            "cmd": self.request.cmd,
        }
        if self.request.argv is not None:
            fields["argv"] = self.request.argv
        return fields

    def _report(self, event: str, run_id: str, facts: Message) -> None:
        request = self.request
        ids = {"run_id": run_id, "agent_name": request.agent_name, "event": event}
        self.state.sessions.report(request.session_id, **ids, **facts)

    async def start(self, run_id: str) -> None:
        await self.state.audit.start(self._fields(run_id))
        self._report(
            "start", run_id, {"cmd": self.request.cmd[:MAX_VIEW_COMMAND], "cwd": self.request.cwd}
        )

    def end(self, result: CommandResult) -> None:
        facts = {
            "exit_code": result.exit_code,
            "ended": result.ended,
            "error": result.error,
            "waited_ms": result.waited_ms,
            "duration_ms": result.duration_ms,
            "output_bytes": result.output_bytes,
        }
        self.state.metrics.command_ended(self.door, result)
        self.state.audit.end(self._fields(result.run_id) | facts)
        reported = ("exit_code", "ended", "duration_ms")
        self._report("end", result.run_id, {name: facts[name] for name in reported})


@contextlib.asynccontextmanager
async def executed(
    state: AppState,
    request: ExecRequest,
    door: str,
    takes: Takes,
    started: Callable[[Job], Awaitable[None]] | None = None,
    patience: float | None = None,
    fed: bool = False,
) -> AsyncIterator[Run]:
    """Run a command to its end; yield its run, whose output is kept while this is open.

    See `PocketCoderDriver.start` and `Job.result`.
    door  the way in which the command came, for the audit log
    Cancelling this cancels it.
    """
    run = state.driver.runs.open(request, door)
    try:
        watch = Notes(state, request, door)
        job = await state.driver.start(request, takes, fed, watch, run)
        try:
            if started:
                await started(job)
            await job.result(patience)
        finally:
            # If it has not ended yet, its caller has left; also during `started`.
            job.end("cancelled")
        await check_audited(state, run)
        yield run
    finally:
        state.driver.runs.answered(run)


@contextlib.asynccontextmanager
async def launched(
    state: AppState, request: ExecRequest, door: str, wait: float
) -> AsyncIterator[Run]:
    """Run a command that goes on after `wait` seconds, or when its caller leaves.

    Yields its run, ended or not, whose output is kept while this is open.
    """
    run = state.driver.launch(request, Notes(state, request, door))
    try:
        await is_set_within(run.needs_no_wait, wait)
        if run.result is not None:
            await check_audited(state, run)
        elif run.failure is not None:
            raise run.failure
        state.driver.save_waiting(run)
        yield run
    finally:
        state.driver.unattend(run)


async def check_audited(state: AppState, run: Run) -> None:
    """Wait until the end of a run is in the audit log.  Raises ProxyError if that fails."""
    try:
        await state.audit.written()
    except NoAudit as wrong:
        code = run.result.exit_code if run.result else None
        raise ProxyError(
            f"the command ended with {code}, its answer is withheld: {wrong}"
        ) from None


async def type_keys(state: AppState, door: str, arguments: Message, shows: bool = True) -> str:
    """Type into an agent's terminal, as the checked `agent_name`, `text`, `keys` and `run_id` say.

    door   the way in which they came, for the audit log
    shows  whether to wait for what the terminal shows a moment later, and to return it
    Raises BadMessage, NoTerminal, NoAudit.
    """
    agent_name = arguments["agent_name"]
    text = arguments["text"]
    keys = [*arguments["keys"]]
    run_id = arguments["run_id"]
    if not text and not keys:
        raise BadMessage("`text`, `keys`: got neither, expected one of them")

    record: Message = {
        "run_id": secrets.token_hex(8),
        "door": door,
        "usage_id": None,
        "session_id": None,
        "agent_name": agent_name,
        "cwd": None,
        "cmd": None,
        "text": text,
        "keys": keys,
        "into_run_id": run_id,
    }
    started_at = time.monotonic()
    error: str | None = "cancelled"
    await state.audit.start(record)

    try:
        if shows:
            screen = await state.driver.send_keys(agent_name, text, keys, run_id)
        else:
            screen = ""
            await state.driver.type_keys(agent_name, text, keys, run_id)

        error = None
    except ProxyError as wrong:
        error = str(wrong)
        raise
    finally:
        state.audit.end({**record, **keys_outcome(error, time.monotonic() - started_at)})

    await state.audit.written()
    return screen


def keys_outcome(error: str | None, seconds: float) -> Message:
    """How typing ended, in the words of the audit log for commands."""
    return {
        "exit_code": ProxyError.exit_code if error else 0,
        "ended": "cancelled" if error else "exit",
        "error": error,
        "waited_ms": 0,
        "duration_ms": round(seconds * 1000),
        "output_bytes": 0,
    }


# ==========================================================================
# Tools
# ==========================================================================
# The tools of the built-in MCP server.
#
# O1  Every tool checks its arguments before it does anything.

# The JSON schemas of results.
RESULT = {
    "output": SHAPES["stdout"],
    "exit_code": or_null(SHAPES["exit_code"]),
    "running": SHAPES["running"],
    "run_id": SHAPES["run_id"],
    "next_offset": shape("integer", "The `offset` for wait_run to go on from.", minimum=0),
    "ended": or_null(SHAPES["ended"]),
    "truncated": SHAPES["truncated"],
    "output_bytes": SHAPES["output_bytes"],
}
# What its terminal showed last, when its time was over: a program may be asking there.
AT_A_TIMEOUT = {"terminal": SHAPES["terminal"]}
END_RESULT = {
    name: RESULT[name] for name in ("run_id", "running", "exit_code", "ended", "output_bytes")
}
LISTED_RUN = {name: RUN_SHAPES[name] for name in ("run_id", "agent_name", "cmd", "state")}
LISTED_RUNS = {"runs": {"type": "array", "items": object_schema(LISTED_RUN, list(LISTED_RUN))}}
TERMINAL = {
    "agent_name": shape("string", "Whose terminal."),
    "busy": shape("boolean", "Whether something runs there."),
    "command": shape("string", "What is in its foreground."),
    "columns": shape("integer", "Its width.", minimum=0),
    "lines": shape("integer", "Its height.", minimum=0),
}
LISTED = {"terminals": {"type": "array", "items": object_schema(TERMINAL, list(TERMINAL))}}

EXEC_ARGUMENTS = fields_of(
    "cmd cwd agent_name timeout stdin max_output wait",
    timeout=MAX_TIMEOUT,
    max_output=TOOL_OUTPUT,
    wait=TOOL_WAIT,
)
WAIT_ARGUMENTS = fields_of("run_id wait offset max_output", wait=TOOL_WAIT, max_output=TOOL_OUTPUT)


class Progress:
    """Reports the newest line of a run's output, at most every PROGRESS_PAUSE seconds."""

    def __init__(self, report: Report, run: Run) -> None:
        self.report = report
        self.record = run.record
        self.started_at = time.monotonic()
        self.reporting = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while True:
            await self.record.changed_within(PROGRESS_EVERY - PROGRESS_PAUSE)
            self.report(time.monotonic() - self.started_at, self._newest_line())
            await asyncio.sleep(PROGRESS_PAUSE)

    def _newest_line(self) -> str:
        """The last line that is not blank, or an empty one."""
        _, newest = self.record.read(max(0, self.record.total - MAX_LINE), MAX_LINE)
        lines = newest.decode(errors="replace").split("\n")
        shown = [line.strip() for line in lines if line.strip()]
        return shown[-1] if shown else ""

    def stop(self) -> None:
        self.reporting.cancel()


@tool("Run a command", "destructive openWorld", EXEC_ARGUMENTS, ["cmd"], RESULT, AT_A_TIMEOUT)
async def exec_tool(state: AppState, arguments: Message, report: Report | None) -> Message:
    """Run a bash command in the sandbox. Answers with stdout and stderr as one text, in the order
    written, and with the exit code. A command that takes longer than `wait` seconds goes on: the
    answer then says how to get the rest with wait_run. Every command starts in a fresh shell: `cd`
    and variables do not last. A person may be watching, and can answer what a command asks on its
    terminal; programs that ask are better driven with send_keys and read_terminal."""
    wait = arguments["wait"]
    request = ExecRequest.from_fields(arguments, state.workspace)
    run = state.driver.launch(request, Notes(state, request, "mcp"))
    try:
        return await answer_of_run(state, run, wait, request.max_output, report)
    except asyncio.CancelledError:
        state.driver.end_run(run)
        raise
    finally:
        state.driver.unattend(run)


async def answer_of_run(
    state: AppState,
    run: Run,
    wait: float,
    limit: int,
    report: Report | None,
    offset: int | None = None,
) -> Message:
    """Wait for the end of a run, `wait` seconds at most; what it has printed.

    limit   bytes of output
    offset  None: the first and the last half of all output; otherwise the next bytes from there,
            without a wait if there are as many as that already
    """
    if offset is None or run.printed() - offset < limit:
        await wait_with_progress(run, wait, report)

    if run.result is not None:
        await check_audited(state, run)
    elif run.failure is not None:
        raise run.failure
    state.driver.save_waiting(run)

    # What is known now: more may come while the text is put together.
    answer = run.answer(None)
    start = offset or 0
    end = run.printed()
    has_more = offset is not None and offset + limit < end
    if has_more:
        end = start + limit
    if has_more or answer.running:
        # At least one byte, so that whoever asks again gets on.
        end = max(run.record.boundary(end), min(start + 1, end))

    is_whole = run.record.is_whole(limit, end, start)
    output = await gathered(run.record.text(limit, end, start))
    facts = {
        "output": output,
        "exit_code": answer.exit_code,
        "running": answer.running is True,
        "run_id": run.run_id,
        "next_offset": end,
        "ended": answer.ended,
        "truncated": not is_whole,
        "output_bytes": answer.output_bytes,
    }
    if answer.terminal is not None:
        facts["terminal"] = answer.terminal

    remarks = []
    if offset is None and not is_whole:
        middle = run.record.boundary(limit // 2)
        remarks.append(f"[What was left out: {next_call(run, middle)}.]")
    if has_more:
        remarks.append(f"[There is more output: {next_call(run, end)}.]")
    elif answer.running:
        remarks.append(
            f"[still running: run {run.run_id}. {next_call(run, end)} to wait for the rest,"
            " end_run to end it.]"
        )

    failed = answer.ended not in (None, "exit")
    return content(text_of(output, answer, remarks), facts, failed=failed)


async def gathered(pieces: Iterator[str]) -> str:
    """One text of many pieces; while a long one is put together, other callers are served."""
    text = list[str]()
    for number, piece in enumerate(pieces):
        text.append(piece)
        if number % 16 == 15:
            await asyncio.sleep(0)
    return "".join(text)


def next_call(run: Run, offset: int) -> str:
    """For a model: what to call for the output from `offset` on."""
    return f'Call wait_run with run_id "{run.run_id}" and offset {offset}'


async def wait_with_progress(run: Run, wait: float, report: Report | None) -> None:
    """Wait for the end of a run, `wait` seconds at most."""
    progress = Progress(report, run) if report else None
    try:
        await is_set_within(run.needs_no_wait, wait)
    finally:
        if progress:
            progress.stop()


def text_of(text: str, answer: ExecResponse, remarks: list[str]) -> str:
    """A command's output for a model, and below it what it has to know of its end."""
    below = [*remarks]
    if answer.exit_code:
        below.append(f"[exit code {answer.exit_code}]")

    if answer.error:
        below.append(f"[{answer.error}]")

    if answer.terminal is not None:
        below.append(f"[its terminal shows: {answer.terminal}]")

    if below and text and not text.endswith("\n"):
        text += "\n"

    return text + "\n".join(below)


@tool("Wait for a command", "readOnly idempotent", WAIT_ARGUMENTS, ["run_id"], RESULT, AT_A_TIMEOUT)
async def wait_run_tool(state: AppState, arguments: Message, report: Report | None) -> Message:
    """Wait for the end of a command that exec has left running, and get what it has printed since:
    the next `max_output` bytes. Give the `run_id` and the `offset` that the last answer named. It
    can be called again and again, also for a command that has ended."""
    run = state.driver.runs.find(arguments["run_id"])
    offset = check_offset("offset", arguments["offset"], run.printed())
    limit = arguments["max_output"]
    return await answer_of_run(state, run, arguments["wait"], limit, report, offset)


@tool("End a command", "destructive", fields_of("run_id signal"), ["run_id"], END_RESULT)
async def end_run_tool(state: AppState, arguments: Message, report: Report | None) -> Message:
    """End a command that runs: with the signal TERM, and KILL 2 seconds later, if no other signal
    is named. Answers with how it ended."""
    run = state.driver.runs.find(arguments["run_id"])
    name = arguments["signal"]
    if run.result is None and name == "TERM":
        state.driver.end_run(run, "end_run was called")
    elif run.result is None:
        state.driver.signal_run(run, SIGNAL_NUMBERS[name])

    await is_set_within(run.needs_no_wait, END_PATIENCE)
    if run.result is None and run.failure is not None:
        raise run.failure

    answer = run.answer(None)
    facts = {
        "run_id": run.run_id,
        "running": run.result is None,
        "exit_code": answer.exit_code,
        "ended": answer.ended,
        "output_bytes": answer.output_bytes,
    }
    remarks = [f"[still running: run {run.run_id}]"] if answer.running else []
    return content(text_of("", answer, remarks) or "[exit code 0]", facts)


@tool(
    "List the commands",
    "readOnly idempotent",
    fields_of("agent_name running", agent_name=None),
    gives=LISTED_RUNS,
)
async def list_runs_tool(state: AppState, arguments: Message, report: Report | None) -> Message:
    """List the newest 50 commands, with what they were, whether they run, and how they ended. Their
    output is what wait_run answers with."""
    state_wanted = "running" if arguments["running"] else None
    query = RunQuery(agent_name=arguments["agent_name"], state=state_wanted, limit=TOOL_LISTED)
    found = {"runs": [run.facts() for run in state.driver.runs.newest(query)]}
    return content(json.dumps(found), found)


@tool("Read the terminal", "readOnly idempotent", fields_of("agent_name lines"))
async def read_terminal_tool(state: AppState, arguments: Message, report: Report | None) -> Message:
    """Read the last lines of an agent's terminal, as a person would see them there: prompts,
    commands, output, and what programs draw. Use it to see where an interactive program is, after
    send_keys."""
    return content(await state.driver.read_terminal(arguments["agent_name"], arguments["lines"]))


@tool("Type into the terminal", "destructive openWorld", fields_of("agent_name text keys run_id"))
async def send_keys_tool(state: AppState, arguments: Message, report: Report | None) -> Message:
    """Type text and press keys in an agent's terminal, as a person would: to answer a program that
    waits for input, or to end one (`keys` of `C-c`). They go to the program that was started there
    with keys, else to the newest command, or with `run_id` to that command. Returns what the
    terminal shows a moment later. To run a command, use exec instead."""
    return content(await type_keys(state, "mcp", arguments))


@tool("List the terminals", "readOnly idempotent", {}, gives=LISTED)
async def list_terminals_tool(
    state: AppState, arguments: Message, report: Report | None
) -> Message:
    """List the agents that have a terminal: whether it is busy, the command in its foreground, and
    its size."""
    found = {"terminals": await state.driver.list_terminals()}
    return content(json.dumps(found), found)


# ==========================================================================
# HTTP gate
# ==========================================================================
# Who may call: pure functions over headers and settings.
#
# Z1  Every request passes `admit` before its body is read.
# Z2  No refusal says whether a token was nearly right.
@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether `host`, maybe with a port, is a name or address of this machine for itself."""
    with contextlib.suppress(ValueError):
        is_bare_ipv6 = host.count(":") > 1 and "[" not in host
        name = host if is_bare_ipv6 else urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    return False


def is_same_place(origin: str, host: str) -> bool:
    """Whether an `Origin` and a `Host` are of one host and port; a scheme has a port of its own."""
    scheme, _, place = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    if port is None or not place:
        return False

    return place.removesuffix(port) == host.lower().removesuffix(port)


@dataclass(frozen=True)
class Gate:
    """What decides who may call."""

    # "": every caller on this machine may.
    token: str = ""
    # Those of browser pages that may call.
    origins: frozenset[str] = frozenset()
    # At a unix socket, which no page and no name of a host leads to.
    any_host: bool = False

    def admit(
        self,
        headers: Mapping[str, str],
        needs_token: bool = True,
        query_token: str | None = None,
        may_be_linked: bool = False,
    ) -> str:
        """The credential that the caller showed.  Raises Forbidden, Unauthorized.

        query_token    of the address, for clients that cannot set headers
        may_be_linked  whether a link of another site may lead a person here
        """
        # HTTP/1.0 has no `Host`.
        host = headers.get("Host", "127.0.0.1")
        self._check_host(host)
        self._check_origin(headers, host, may_be_linked)

        scheme, _, credential = headers.get("Authorization", "").partition(" ")
        if query_token is not None and not scheme:
            scheme = "bearer"
            credential = query_token

        credential = credential.strip()
        is_right = hmac.compare_digest(credential.encode("utf-8", "replace"), self.token.encode())
        if self.token and needs_token and not (is_right and scheme.lower() == "bearer"):
            given = "is wrong" if credential else "is missing"
            raise Unauthorized(
                f"the token {given}: expected `Authorization: Bearer TOKEN` as the server has it;"
                " the shell takes it from POCKETCODER_TOKEN"
            )

        return credential

    def _check_host(self, host: str) -> None:
        """Without a token, a name that was bound to us anew (DNS rebinding) would open the door."""
        if not self.token and not self.any_host and not is_loopback(host):
            raise Forbidden(
                f"`Host`: got {in_quotes(host)}, expected localhost or a loopback address: another"
                " name needs a token, POCKETCODER_TOKEN for the server and for the shell"
            )

    def _check_origin(self, headers: Mapping[str, str], host: str, may_be_linked: bool) -> None:
        """A page of another site may not call."""
        origin = headers.get("Origin")
        is_ours = origin is None or origin in self.origins or self._is_own(origin, host)
        if origin is not None and not is_ours:
            raise Forbidden(
                f"`Origin`: got {in_quotes(origin)}, expected none, or one of --allow-origin"
            )

        # Browsers send no `Origin` for an <img>, for instance.
        site = headers.get("Sec-Fetch-Site", "none")
        is_linked = may_be_linked and headers.get("Sec-Fetch-Mode") == "navigate"
        if origin is None and site not in ("none", "same-origin") and not is_linked:
            raise Forbidden(
                f"`Sec-Fetch-Site`: got {in_quotes(site)}, expected a request with an `Origin`"
            )

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether an `Origin` is our own page, by whatever name of ours.

        The token keeps out a name that was bound to us anew.  A proxy before us may speak TLS.
        """
        if is_loopback(host) and origin == f"http://{host}":
            return True

        return self.token != "" and is_same_place(origin, host)

    def cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What lets the page of an allowed origin read the answer."""
        origin = headers.get("Origin")
        if origin is None or origin not in self.origins:
            return {}

        allowed = [CORS_HEADERS]
        for name in headers.get("Access-Control-Request-Headers", "").split(","):
            if re.fullmatch(r"mcp-param-[\w-]+", name.strip(), re.IGNORECASE):
                allowed.append(name.strip())

        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Headers": ", ".join(allowed),
            "Access-Control-Expose-Headers": "Mcp-Session-Id",
            "Vary": "Origin",
        }


def accepts(accept: str, kind: str, in_general: bool) -> bool:
    """Whether an `Accept` header takes this media type.

    in_general  whether a wildcard, or no header at all, means it too
    """
    if not accept:
        return in_general

    taken = {kind}
    if in_general:
        taken |= {f"{kind.partition('/')[0]}/*", "*/*"}

    for part in accept.lower().split(","):
        media, *parameters = (word.strip() for word in part.split(";"))
        is_refused = any(re.fullmatch(r"q=0(\.0*)?", word) for word in parameters)
        if media in taken and not is_refused:
            return True

    return False


def media_type(content_type: str) -> str:
    """Without its parameters."""
    return content_type.partition(";")[0].strip().lower()


# ==========================================================================
# Interface
# ==========================================================================
# What each route takes and gives, as OpenAPI 3.1 describes it.
#
# X1  Each method of a route has an Operation; its `query` is what reads the query.
TEXT = {"type": "string"}
SERVER_NAME = Text(
    "name", "Of a relayed server, see `GET /servers`.", example="everything", limit=MAX_NAME
)
# In paths.
PATH_FIELDS = {
    "name": SERVER_NAME,
    "run_id": FIELDS["run_id"],
    "agent": replace(FIELDS["agent_name"], name="agent", default=None),
    "agents": Text(
        "agents",
        f"Whose terminals: names with commas between them, {MAX_WATCHED} at most.",
        example="alice,bob",
        expected=f"names like {AGENT_NAME.pattern} with commas between, at most {MAX_WATCHED}",
        pattern=re.compile(f"{AGENT_NAME.pattern}(,{AGENT_NAME.pattern}){{0,{MAX_WATCHED - 1}}}"),
    ),
}
# What no table of fields says of requests that are refused.
REFUSED = {
    400: "A value is missing or wrong: `error` names it.",
    401: "The token is missing or wrong.",
    403: "`Host` or `Origin` is not one of ours.",
    404: "There is none of this name.",
    405: "There is no such method here, or not without `Mcp-Session-Id`.",
    413: f"The body has more than {MAX_BODY} bytes.",
    415: "The body is not `application/json`.",
    503: "Nothing was run: tmux or the audit log refuses, or too many wait.",
}
ERROR = object_schema(
    {
        "error": SHAPES["error"],
        "exit_code": shape("integer", "2 for a 400, otherwise 125.", enum=[2, 125]),
    },
    ["error", "exit_code"],
)
RPC_ERROR = object_schema(
    {
        "jsonrpc": {"const": "2.0"},
        "id": {"type": ["string", "integer", "null"]},
        "error": object_schema(
            {"code": {"type": "integer"}, "message": TEXT, "data": {}}, ["code", "message"]
        ),
    },
    ["jsonrpc", "id", "error"],
)


@dataclass(frozen=True)
class Answer:
    """An answer of a route."""

    about: str
    # The JSON Schema of each media type; none: it has no body.
    content: Mapping[str, Message] = field(default_factory=dict)
    # By name.
    headers: Mapping[str, Message] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """What a method of a route takes and gives."""

    summary: str
    answers: Mapping[int, Answer]
    # In words, what no schema says.
    about: str = ""
    query: Mapping[str, Field] = field(default_factory=dict)
    headers: Mapping[str, Field] = field(default_factory=dict)
    # The JSON Schema of the body; None: it takes none.
    body: Message | None = None
    # Statuses with which it refuses a request, besides those that all have.
    refuses: tuple[int, ...] = ()


# By method, in lower case.
Operations = Mapping[str, Operation]


@dataclass(frozen=True)
class Described:
    """A method of a route."""

    path: str
    method: str
    operation: Operation
    # Whether it needs no token, and whether the address may have it.
    is_open: bool
    token_in_query: bool
    # Whether its errors are those of JSON-RPC.
    of_mcp: bool


def json_answer(about: str, schema: Message) -> Answer:
    return Answer(about, {"application/json": schema})


def path_template(pattern: str) -> str:
    """`/runs/{run_id}` for a pattern of ROUTES."""
    return re.sub(r"\(\?P<(\w+)>[^)]*\)", r"{\1}", pattern)


def openapi(described: Sequence[Described], has_token: bool) -> Message:
    """The OpenAPI document of these routes."""
    paths: dict[str, Message] = {}
    for each in described:
        paths.setdefault(each.path, {})[each.method] = shown_operation(each, has_token)

    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pocketcoder-proxy",
            "version": VERSION,
            "description": "Commands in terminals of a sandbox. Fields of a request that mean"
            " nothing are ignored. Paths of runs, terminals, servers and MCP may end with a slash."
            " With `Origin`, every path answers OPTIONS as CORS asks.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR, "RpcError": RPC_ERROR},
            "responses": refused_answers(),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "query": {"type": "apiKey", "in": "query", "name": "token"},
            },
        },
    }


def refused_answers() -> Message:
    """The answers of REFUSED, each for routes with JSON and for those with JSON-RPC."""
    found: Message = {}
    for prefix, name in (("", "Error"), ("rpc", "RpcError")):
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        for status, about in REFUSED.items():
            found[f"{prefix}{status}"] = {"description": about, "content": content}

    return found


def shown_operation(described: Described, has_token: bool) -> Message:
    """As it stands below its path."""
    operation = described.operation
    names = re.findall(r"{(\w+)}", described.path)
    places = {
        "path": {name: PATH_FIELDS[name] for name in names},
        "query": operation.query,
        "header": operation.headers,
    }
    parameters = [
        shown_parameter(place, each) for place, found in places.items() for each in found.values()
    ]
    shown: Message = {
        "operationId": "_".join(re.findall(r"\w+", f"{described.method} {described.path}")),
        "summary": operation.summary,
    }
    if operation.about:
        shown["description"] = operation.about
    if parameters:
        shown["parameters"] = parameters
    if operation.body is not None:
        content = {"application/json": {"schema": operation.body}}
        shown["requestBody"] = {"required": True, "content": content}

    shown["responses"] = {
        str(status): shown_answer(answer) for status, answer in operation.answers.items()
    }
    prefix = "rpc" if described.of_mcp else ""
    for status in refusals_of(described):
        reference = {"$ref": f"#/components/responses/{prefix}{status}"}
        shown["responses"].setdefault(str(status), reference)

    if has_token and not described.is_open:
        in_query: list[Message] = [{"query": []}] if described.token_in_query else []
        shown["security"] = [{"token": []}, *in_query]

    return shown


def refusals_of(described: Described) -> list[int]:
    """The statuses of REFUSED that a method may answer with."""
    operation = described.operation
    found = {403, *operation.refuses}
    if not described.is_open:
        found.add(401)
    if operation.query or operation.headers:
        found.add(400)
    if operation.body is not None:
        found |= {400, 413, 415}
    if "{" in described.path:
        found.add(404)
    return sorted(found)


def shown_parameter(place: str, each: Field) -> Message:
    """A value in the path, the query or a header, where nothing can be null."""
    schema = replace(each, nullable=False).schema()
    about = schema.pop("description")
    return {
        "name": each.name,
        "in": place,
        "required": place == "path",
        "description": about,
        "schema": schema,
    }


def shown_answer(answer: Answer) -> Message:
    shown: Message = {"description": answer.about}
    if answer.headers:
        shown["headers"] = {
            name: {"description": schema["description"], "schema": schema}
            for name, schema in answer.headers.items()
        }
    if answer.content:
        shown["content"] = {kind: {"schema": schema} for kind, schema in answer.content.items()}
    return shown


EVENTS = "text/event-stream"
RUN = object_schema({**RUN_SHAPES, **SHAPES}, [*RUN_SHAPES])
# Of a command that was started, and has ended or not.
STARTED = ("output_bytes", "run_id", "truncated", "waited_ms")
ENDED_COMMAND = object_schema(SHAPES, ["stdout", "exit_code", "ended", "duration_ms", *STARTED])
RUNNING_COMMAND = object_schema(SHAPES, ["stdout", "running", "run_id"])

HEALTH = Operation(
    "Whether the server lives",
    {200: Answer("It does.", {"text/plain": {"const": "ok"}})},
    about="It answers while commands run.",
)
READINESS = Operation(
    "Whether a command could run now",
    {
        200: json_answer(
            "It could.",
            object_schema({"ready": {"const": True}, "version": TEXT}, ["ready", "version"]),
        ),
        503: json_answer(
            "It could not: `error` is the reason.",
            object_schema(
                {"ready": {"const": False}, "version": TEXT, **ERROR["properties"]},
                ["ready", "version", "error", "exit_code"],
            ),
        ),
    },
    about=f"Changes nothing. Answers of the last {READY_KEPT:g} s are given again.",
)
METRICS = Operation(
    "Metrics for Prometheus",
    {200: Answer("Its text format.", {"text/plain; version=0.0.4; charset=utf-8": TEXT})},
)
OPENAPI = Operation(
    "This document", {200: json_answer("OpenAPI 3.1.", {"type": "object", "required": ["openapi"]})}
)
EXEC = Operation(
    "Run a command",
    {
        200: Answer(
            "The command was started, and has ended: how, is in the body.",
            {"application/json": ENDED_COMMAND, EVENTS: TEXT},
        ),
        202: json_answer("`wait` is over, and the command goes on.", RUNNING_COMMAND),
        500: json_answer("The command ran, but its end cannot be recorded.", ERROR),
    },
    about="With `Accept: text/event-stream` the answer is a stream: events `output` with"
    ' `{"stdout": "..."}` as the command writes, comments while it is silent, and at its end `exit`'
    " with the object of a 200 without `stdout`. With `wait` it may end with `running` and the"
    " object of a 202 without `stdout`. A caller that leaves cancels its command, but not with"
    f" `wait`, whose command may take {MAX_TIMEOUT} s where `timeout` is not given.",
    body={
        **object_schema(schemas(EXEC_FIELDS)),
        # Without its `required`, which may not be empty everywhere.
        "oneOf": [{"required": ["cmd"]}, {"required": ["argv"]}],
    },
    refuses=(503,),
)
CHANNEL = Operation(
    "Run a command with stdin, stdout and stderr apart",
    {101: Answer("The WebSocket is open.")},
    about=f"A WebSocket with the framing of `kubectl exec`, subprotocol `{CHANNELS}`. The first"
    " message is the body of `POST /exec` as text. Then binary messages, whose first byte is the"
    " channel: 0 stdin (sent), 1 stdout, 2 stderr, 3 the object of a 200 of `POST /exec` without"
    " `stdout`; 255, 0 ends stdin. Text messages"
    f' `{{"signal": "INT"}}` ({", ".join(SIGNAL_NUMBERS)}) go to the whole process group. Closing'
    " the socket cancels the command.",
    refuses=(400,),
)
LIST_RUNS = Operation(
    "List the newest runs",
    {
        200: json_answer(
            "The newest first.", object_schema({"runs": {"type": "array", "items": RUN}}, ["runs"])
        )
    },
    query=LIST_FIELDS,
)
ONE_RUN = json_answer("The run.", RUN)
GET_RUN = Operation(
    "What is known of a run",
    {200: ONE_RUN},
    about="With `wait` the answer comes when it has ended, or after so many seconds.",
    query=fields_of("wait", wait=0),
)
DELETE_RUN = Operation(
    "End or forget a run",
    {200: json_answer("It ran, and has been ended.", RUN), 204: Answer("It is forgotten.")},
)
SIGNAL_RUN = Operation(
    "Send a signal to a run",
    {200: ONE_RUN},
    body=object_schema(schemas(SIGNAL_FIELDS), ["signal"]),
)
RUN_OUTPUT = Operation(
    "What a run has printed",
    {
        200: Answer(
            "The bytes, up to the next gap.",
            {"application/octet-stream": {}, EVENTS: TEXT},
            headers={
                "Output-Offset": shape("integer", "Of the first byte: a gap is skipped."),
                "Output-Bytes": shape("integer", "Bytes written so far."),
                "Output-Ended": shape("string", "Whether that is all.", enum=["true", "false"]),
            },
        )
    },
    about="With `Accept: text/event-stream` it follows: events `output` as `POST /exec` streams"
    " them, each with the offset behind it as `id`, then `exit`; `Last-Event-ID` goes on from"
    " there.",
    query=OUTPUT_FIELDS,
    headers={"Last-Event-ID": Whole("Last-Event-ID", "Of a stream: the offset to go on from.")},
)
SHOW_PAGE = Operation(
    "The page for people: terminals and runs",
    {200: Answer("It holds no data.", {"text/html; charset=utf-8": TEXT})},
)
LIST_TERMINALS = Operation(
    "List the terminals",
    {200: json_answer("By name of the agent.", object_schema(LISTED, [*LISTED]))},
    refuses=(503,),
)
WATCH_TERMINALS = Operation(
    "Watch terminals",
    {200: Answer("A stream of pictures.", {EVENTS: TEXT})},
    about="Events `screen`, ten a second at most and only when something has changed, with"
    " `agent_name`, `columns`, `lines`, `cursor` (null, or its `pane_id`, `column` and `line`) and"
    " `panes`. Each pane has `pane_id`, `left`, `top`, `columns`, `lines`, `cursor_column`,"
    " `cursor_line`, `command`, `run_id` and `text`, where the only escape sequences are those for"
    " colours (SGR). A reader that is slow misses pictures. A terminal that is closed has no panes."
    f" {MAX_WATCHERS} streams at most.",
    refuses=(400, 503),
)
TYPE_KEYS = Operation(
    "Type into a terminal",
    {
        200: json_answer(
            "They are typed.",
            object_schema(
                {
                    "screen": shape("string", "What the terminal shows a moment later."),
                    "ignored": SHAPES["ignored"],
                }
            ),
        )
    },
    about="As the tool `send_keys`.",
    body=object_schema(schemas(KEYS_FIELDS)),
    refuses=(503,),
)
LIST_SERVERS = Operation(
    "List the relayed MCP servers",
    {
        200: json_answer(
            "Never their environment.",
            {
                "type": "array",
                "items": object_schema(
                    {
                        "name": TEXT,
                        "state": shape(
                            "string", "How it is.", enum=[state.value for state in RelayState]
                        ),
                        "era": or_null(
                            shape("string", "What it speaks.", enum=[era.value for era in Era])
                        ),
                        "pid": or_null(shape("integer", "Of its oldest process.")),
                        "restarts": shape("integer", "How often it was started anew.", minimum=0),
                        "error": shape("string", "Why its last process has ended."),
                    },
                    ["name", "state", "era", "pid", "restarts"],
                ),
            },
        )
    },
)
RPC_MESSAGE = {
    "type": "object",
    "description": "A message of JSON-RPC 2.0, as MCP has it.",
    "properties": {"jsonrpc": {"const": "2.0"}},
    "required": ["jsonrpc"],
    "examples": [
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "initialize",
            "params": {
                "protocolVersion": LEGACY[-1],
                "capabilities": {},
                "clientInfo": {"name": "example", "version": "1"},
            },
        }
    ],
}
MCP_POST = Operation(
    "Send a message of MCP, over Streamable HTTP",
    {
        200: Answer("The answer.", {"application/json": {"type": "object"}, EVENTS: TEXT}),
        202: Answer("It was no request."),
        406: json_answer("`Accept` lacks a media type.", RPC_ERROR),
    },
    about="The answer is a stream of messages where something comes before it. A session of a"
    " revision before 2026-07-28 has the header `Mcp-Session-Id`.",
    body=RPC_MESSAGE,
    refuses=(404, 503),
)
MCP_STREAM = Operation(
    "Hear what an MCP server says, over Streamable HTTP",
    {200: Answer("A stream of messages.", {EVENTS: TEXT})},
    about="It needs the header `Mcp-Session-Id`; without it the method is not allowed.",
    refuses=(404, 405),
)
MCP_END = Operation(
    "End a session of MCP",
    {204: Answer("It has ended.")},
    about="It needs the header `Mcp-Session-Id`; without it the method is not allowed.",
    refuses=(404, 405),
)
MCP_SOCKET = Operation(
    "MCP over a WebSocket",
    {101: Answer("The WebSocket is open.")},
    about="With the subprotocol `mcp`. Each text message is a message of JSON-RPC; the session"
    " lasts as long as the socket.",
    refuses=(400,),
)
MCP_SSE = Operation(
    "Hear what an MCP server says, over HTTP+SSE",
    {
        200: Answer(
            "A stream: `endpoint` with the address to post to, then messages.", {EVENTS: TEXT}
        )
    },
    about="A session that the client names outlives its stream by"
    f" {SESSION_KEPT:g} s: a second stream of that name gets what was missed.",
    query={"session_id": SESSION_NAME, "sessionId": replace(SESSION_NAME, name="sessionId")},
    refuses=(404, 503),
)
MCP_MESSAGES = Operation(
    "Send a message of MCP, over HTTP+SSE",
    {202: Answer("Taken: the answer comes on the stream.", {"text/html": {"const": "Accepted"}})},
    query={"session_id": SESSION_NAME, "sessionId": replace(SESSION_NAME, name="sessionId")},
    body=RPC_MESSAGE,
    refuses=(404,),
)


# ==========================================================================
# Page
# ==========================================================================
# What `GET /` answers: one file, with nothing loaded from elsewhere.
#
# G1  The page holds no data, and takes none but from the routes below, with the token.
# G2  Text from terminals and commands goes in as text nodes only; the policy forbids all else.
NONCE = "@nonce@"
# `trusted-types 'none'`: no text can become markup or script, even by mistake.
PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>pocketcoder</title>
<meta name="viewport"
 content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16
 16'%3E%3Crect width='16' height='16' rx='4' fill='%23357a5b'/%3E%3Cpath d='M4 5l3 3-3 3M8.5
 11.5H12' fill='none' stroke='white' stroke-width='1.6'/%3E%3C/svg%3E">
<style nonce="@nonce@">
:root {
  color-scheme: light dark;
  --page: #f4f5f6; --panel: #fff; --raised: #eceef1; --line: #dcdfe4; --edge: #c3c8d0;
  --text: #1d2127; --muted: #5f6772; --accent: #1f5fbf; --chosen: #e3edfb;
  --good: #19794a; --bad: #bf2d35; --busy: #9a6200; --bad-back: #fcebec; --away: #fff4d6;
  --back: #fff; --fore: #24292f; --cursor: #1f5fbf;
  --c0: #24292f; --c1: #c0262d; --c2: #1a7f37; --c3: #946000;
  --c4: #1a5fc4; --c5: #8a3fb8; --c6: #10707f; --c7: #6a727c;
  --c8: #57606a; --c9: #d93a40; --c10: #2a9147; --c11: #a97300;
  --c12: #3273dc; --c13: #a156cf; --c14: #1b8596; --c15: #8a929c;
  --mono: ui-monospace, "SF Mono", SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171b; --panel: #1b1e23; --raised: #24282f; --line: #2c3138; --edge: #454c57;
    --text: #d9dce1; --muted: #929aa6; --accent: #7cb0ff; --chosen: #22324a;
    --good: #62c088; --bad: #f47c7c; --busy: #e2b04a; --bad-back: #3a2125; --away: #3a3016;
    --back: #0f1114; --fore: #d3d7dd; --cursor: #7cb0ff;
    --c0: #4a515c; --c1: #f07178; --c2: #7fc98b; --c3: #e2b86b;
    --c4: #79aef5; --c5: #c79bf0; --c6: #6cc7cf; --c7: #c5cad2;
    --c8: #7d8590; --c9: #ff8f93; --c10: #9bdca4; --c11: #f2cf8b;
    --c12: #9dc5ff; --c13: #dab8f8; --c14: #93dde3; --c15: #f0f2f5;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; height: 100vh; height: 100dvh; overflow: hidden; display: flex;
  flex-direction: column; background: var(--page); color: var(--text);
  font: 14px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
h1, h2, p, ol, pre { margin: 0; padding: 0; font: inherit; }
ol { list-style: none; }
button, input, textarea { font: inherit; color: inherit; }
button {
  min-height: 30px; min-width: 30px; padding: 3px 10px; border: 1px solid var(--line);
  border-radius: 6px; background: var(--panel); cursor: pointer; white-space: nowrap;
}
button:hover { background: var(--raised); }
button:disabled { opacity: .5; cursor: default; }
button.quiet { border-color: transparent; background: none; color: var(--muted); }
button.quiet:hover { background: var(--raised); color: var(--text); }
button[aria-pressed="true"] { background: var(--chosen); color: var(--accent); }
button.danger { color: var(--bad); border-color: currentColor; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--panel); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
.unseen {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap;
}
.muted { color: var(--muted); }
.mark { width: 1.2em; flex: none; text-align: center; color: var(--muted); }
.mark.busy { color: var(--busy); }
.mark.good { color: var(--good); }
.mark.bad, .bad-text { color: var(--bad); }

/* The bar on top: what goes on, and whose terminal is shown. */
.bar {
  display: flex; align-items: center; gap: 4px 14px; padding: 6px 12px; flex: none;
  min-height: 43px; background: var(--panel); border-bottom: 1px solid var(--line);
}
.bar h1 { font-weight: 600; letter-spacing: -.01em; }
#running { min-width: 6.2em; color: var(--muted); white-space: nowrap; }
#running.busy { color: var(--busy); font-weight: 600; }
.tabs {
  display: flex; gap: 2px; flex: 1; min-width: 0; overflow-x: auto; scrollbar-width: thin;
}
.tabs button {
  border-color: transparent; background: none; display: flex; gap: 6px; align-items: center;
  padding: 3px 10px; color: var(--muted); flex: none;
}
.tabs button:hover { background: var(--raised); }
.tabs button[aria-selected="true"] {
  background: var(--chosen); color: var(--text); font-weight: 600;
}
.dot { width: 8px; height: 8px; border-radius: 50%; border: 1.5px solid var(--edge); flex: none; }
.dot.busy { background: var(--busy); border-color: var(--busy); }
.dot.used { border-color: var(--busy); }
#drawer { display: none; }
/* Over what it is about, so that nothing moves. */
#banner {
  position: fixed; top: 50px; left: 50%; transform: translateX(-50%); z-index: 1;
  max-width: calc(100% - 32px); padding: 8px 16px; background: var(--away); border-radius: 8px;
  border: 1px solid var(--edge); box-shadow: 0 4px 16px rgb(0 0 0 / .2); overflow-wrap: anywhere;
}

/* Below it: terminals, and beside them the runs. */
main {
  flex: 1; min-height: 0; display: grid; gap: 8px; padding: 8px;
  grid-template-columns: minmax(0, 1fr) clamp(330px, 33vw, 540px);
  grid-template-rows: minmax(0, 1fr);
}
main.wide { grid-template-columns: minmax(0, 1fr); }
main.wide #left { display: none; }
#left { display: flex; flex-direction: column; gap: 8px; min-height: 0; min-width: 0; }
#terminals {
  flex: 1; min-height: 0; display: flex; flex-wrap: wrap; gap: 8px; overflow: auto;
}
/* Side by side where there is room; what they show has no say in their size. */
#terminals > .card { flex: 1 1 430px; contain: size; contain-intrinsic-size: 200px; }
.card {
  display: flex; flex-direction: column; min-width: 0; min-height: 0; overflow: hidden;
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
}
.head {
  display: flex; align-items: center; gap: 8px; padding: 3px 4px 3px 12px; min-height: 38px;
  border-bottom: 1px solid var(--line); flex: none;
}
.head h2 {
  font-weight: 600; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; min-width: 2em;
}
.head .grow { flex: 1; min-width: 0; }
.cut { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.empty { margin: auto; padding: 24px; max-width: 34em; text-align: center; color: var(--muted); }
#terminals > .empty { flex: 0 1 34em; }
.empty code { font: 12px/1.5 var(--mono); overflow-wrap: anywhere; color: var(--text); }

/* A terminal: its panes, one below the other. */
.panes {
  flex: 1; min-height: 0; display: flex; flex-direction: column; background: var(--back);
  color: var(--fore);
}
.pane { flex: 0 1 auto; min-height: 64px; display: flex; flex-direction: column; }
.pane.main { flex: 1 1 0; }
.pane + .pane { border-top: 1px solid var(--edge); }
.pane > p {
  font-size: 12px; padding: 2px 12px; color: var(--muted); background: var(--panel);
  border-bottom: 1px solid var(--line); flex: none;
}
.view {
  flex: 1; min-height: 0; overflow: auto; padding: 6px 10px; scrollbar-width: thin;
  --size: 13px; --row: 16px; font: var(--size)/var(--row) var(--mono);
}
.grid { position: relative; width: max-content; min-width: 100%; }
.row { height: var(--row); white-space: pre; unicode-bidi: isolate; direction: ltr; }
.cursor {
  position: absolute; width: 1ch; height: var(--row); pointer-events: none;
  border: 1px solid var(--cursor); border-radius: 1px; opacity: .8;
}
.typing .cursor { background: var(--cursor); opacity: .55; }
.typing .panes { outline: 2px solid var(--accent); outline-offset: -2px; }
.stale .panes, .stale #out { opacity: .55; }

/* What escape sequences may change. */
.b { font-weight: 700; } .d { opacity: .65; } .i { font-style: italic; }
.u { text-decoration: underline; } .s { text-decoration: line-through; }
.u.s { text-decoration: underline line-through; } .h { opacity: .3; }
.w { display: inline-block; width: 2ch; height: var(--row); overflow: hidden; vertical-align: top; }
.f0 { color: var(--c0); } .g0 { background: var(--c0); }
.f1 { color: var(--c1); } .g1 { background: var(--c1); }
.f2 { color: var(--c2); } .g2 { background: var(--c2); }
.f3 { color: var(--c3); } .g3 { background: var(--c3); }
.f4 { color: var(--c4); } .g4 { background: var(--c4); }
.f5 { color: var(--c5); } .g5 { background: var(--c5); }
.f6 { color: var(--c6); } .g6 { background: var(--c6); }
.f7 { color: var(--c7); } .g7 { background: var(--c7); }
.f8 { color: var(--c8); } .g8 { background: var(--c8); }
.f9 { color: var(--c9); } .g9 { background: var(--c9); }
.f10 { color: var(--c10); } .g10 { background: var(--c10); }
.f11 { color: var(--c11); } .g11 { background: var(--c11); }
.f12 { color: var(--c12); } .g12 { background: var(--c12); }
.f13 { color: var(--c13); } .g13 { background: var(--c13); }
.f14 { color: var(--c14); } .g14 { background: var(--c14); }
.f15 { color: var(--c15); } .g15 { background: var(--c15); }
.ff { color: var(--fore); } .gf { background: var(--fore); }
.fb { color: var(--back); } .gb { background: var(--back); }
/* On a back of its own, black and white are what they are, on light pages and dark ones. */
.on.f0 { color: #14161a; } .on.f8 { color: #3f464f; } .on.f7 { color: #e4e7eb; }
.on.f15 { color: #fff; }

/* Typing. */
#typing { display: flex; align-items: center; gap: 4px; flex: none; }
#typing button { min-width: 36px; flex: none; }
#keys { display: flex; align-items: center; gap: 8px; }
#keys::before {
  content: ""; width: 26px; height: 14px; border-radius: 7px; background: var(--edge);
  background-image: radial-gradient(circle at 7px 7px, var(--panel) 5px, transparent 5.5px);
}
#keys[aria-checked="true"]::before {
  background-color: var(--accent);
  background-image: radial-gradient(circle at 19px 7px, var(--panel) 5px, transparent 5.5px);
}
#row { display: contents; }
#hint { padding: 0 6px; font-size: 12px; min-width: 0; color: var(--muted); }
#hint.error { color: var(--bad); }
#typed {
  position: fixed; left: 0; bottom: 0; width: 1px; height: 1px; padding: 0; border: 0; opacity: 0;
  resize: none; font-size: 16px;
}

/* Runs, and the output of one. */
#side { display: flex; flex-direction: column; gap: 8px; min-height: 0; min-width: 0; }
#list { flex: 1 1 0; }
#list.short { flex: 0 1 38%; }
#shown { flex: 1 1 62%; }
main.wide #list { display: none; }
#runs { flex: 1; min-height: 0; overflow-y: auto; scrollbar-width: thin; }
#runs button {
  display: flex; gap: 6px; width: 100%; padding: 5px 12px 5px 8px; border: 0; border-radius: 0;
  background: none; text-align: left; align-items: baseline;
}
#runs li + li { border-top: 1px solid var(--line); }
#runs button:hover { background: var(--raised); }
#runs button[aria-current="true"] { background: var(--chosen); }
#runs .what { flex: 1; min-width: 0; }
#runs .what > span { display: block; }
#runs .command { font: 12.5px/1.45 var(--mono); }
#runs .facts { font-size: 12px; color: var(--muted); }
#runs .time { flex: none; color: var(--muted); }
#older { margin: 6px auto; display: block; }
#command {
  font: 12.5px/1.45 var(--mono); padding: 6px 12px 2px; white-space: pre-wrap; max-height: 6.2em;
  overflow: auto; overflow-wrap: anywhere; flex: none;
}
#facts { padding: 0 12px 6px; font-size: 12px; color: var(--muted); flex: none; }
#facts, .facts { overflow-wrap: anywhere; }
#out {
  flex: 1; min-height: 0; overflow: auto; padding: 6px 12px; background: var(--back);
  color: var(--fore); border-top: 1px solid var(--line); scrollbar-width: thin;
  --row: 17px; font: 12.5px/var(--row) var(--mono);
}
#out .block { content-visibility: auto; contain-intrinsic-size: auto 1700px; }
#out .line {
  min-height: var(--row); white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  direction: ltr;
}
#earlier { margin-bottom: 6px; font: 13px/1.4 system-ui, sans-serif; }

/* Token and questions. */
#login { margin: auto; width: min(100% - 32px, 380px); padding: 24px; gap: 12px; }
#login h2 { font-weight: 600; font-size: 16px; }
#login input {
  width: 100%; min-height: 36px; padding: 4px 10px; font-size: 16px; border-radius: 6px;
  border: 1px solid var(--edge); background: var(--back);
}
dialog {
  width: min(100% - 32px, 460px); padding: 18px; color: var(--text); background: var(--panel);
  border: 1px solid var(--edge); border-radius: 10px;
}
dialog::backdrop { background: rgb(0 0 0 / .45); }
dialog h2 { font-weight: 600; margin-bottom: 8px; }
dialog p { overflow-wrap: anywhere; }
dialog .cited {
  font: 12.5px/1.45 var(--mono); white-space: pre-wrap; max-height: 9em; overflow: auto;
  padding: 8px; margin: 8px 0; background: var(--page); border-radius: 6px;
}
dialog textarea {
  width: 100%; height: 9em; padding: 8px; font: 13px/1.4 var(--mono); border-radius: 6px;
  border: 1px solid var(--edge); background: var(--back); resize: vertical;
}
.choices { display: flex; gap: 8px; justify-content: flex-end; margin-top: 12px; }

/* A phone: one thing at a time. */
@media (max-width: 760px) {
  .bar { flex-wrap: wrap; padding: 4px 8px; }
  .bar h1 { flex: 1; }
  .tabs { order: 1; flex-basis: 100%; }
  #drawer { display: block; }
  main, main.wide { grid-template-columns: minmax(0, 1fr); padding: 6px; }
  #side { display: none; }
  body.drawn #side { display: flex; }
  body.drawn #left { display: none; }
  #list.short { display: none; }
  #shown { flex: 1; }
  #wide { display: none; }
  #terminals > .card { flex-basis: 100%; contain-intrinsic-size: 160px; }
  .view { --size: 12px; --row: 15px; padding: 6px 8px; }
  #typing { flex-wrap: wrap; }
  #hint:not(.error) { display: none; }
  #typing button { min-height: 36px; min-width: 36px; padding: 3px 8px; }
}
</style>
</head>
<body>
<noscript><p class="empty">This page needs JavaScript.</p></noscript>
<header class="bar">
  <h1>pocketcoder</h1>
  <p id="running" role="status"></p>
  <div class="tabs" id="tabs" role="tablist" aria-label="Agents"></div>
  <button id="drawer" aria-expanded="false" aria-controls="side">Runs</button>
</header>
<p id="banner" role="alert" hidden></p>
<p id="told" class="unseen" role="status"></p>
<form id="login" class="card" hidden>
  <h2>This server wants a token</h2>
  <p class="muted" id="why">It is in POCKETCODER_TOKEN where the server runs.
    It is kept for this tab only.</p>
  <label for="token">Token</label>
  <input id="token" type="password" autocomplete="current-password" spellcheck="false" required
   aria-describedby="why">
  <button class="main">Enter</button>
</form>
<main id="main" hidden>
  <div id="left">
    <section id="terminals" role="tabpanel" aria-label="Terminals"></section>
    <div id="typing" role="toolbar" aria-label="Typing" hidden>
      <button id="keys" role="switch" aria-checked="false">Keys</button>
      <span id="row" hidden>
        <button data-key="Escape" aria-label="Escape">Esc</button>
        <button data-key="Tab">Tab</button>
        <button data-key="C-c" aria-label="Control C">^C</button>
        <button data-key="Left" aria-label="Left">←</button>
        <button data-key="Up" aria-label="Up">↑</button>
        <button data-key="Down" aria-label="Down">↓</button>
        <button data-key="Right" aria-label="Right">→</button>
        <button data-key="Enter" aria-label="Enter">⏎</button>
        <button id="paste">Paste…</button>
      </span>
      <span id="hint" class="cut" role="status"></span>
    </div>
  </div>
  <aside id="side" aria-label="Runs">
    <section id="list" class="card" aria-labelledby="runs-head">
      <div class="head">
        <h2 id="runs-head">Runs</h2>
        <span id="count" class="muted cut grow"></span>
      </div>
      <ol id="runs" aria-labelledby="runs-head"></ol>
    </section>
    <section id="shown" class="card" aria-labelledby="shown-head" hidden>
      <div class="head">
        <span class="mark" id="mark" aria-hidden="true"></span>
        <h2 class="cut grow"><span id="shown-head" class="unseen">Output</span>
          <span id="state"></span></h2>
        <button id="end" class="danger">End…</button>
        <button id="wide" class="quiet" aria-pressed="false">Wide</button>
        <button id="close" class="quiet" aria-label="Close the output">✕</button>
      </div>
      <p id="command"></p>
      <p id="facts"></p>
      <div id="out" tabindex="0" role="region" aria-label="Output of the run"></div>
    </section>
  </aside>
</main>
<textarea id="typed" aria-label="Keys for the terminal" autocapitalize="off" autocomplete="off"
 autocorrect="off" spellcheck="false" tabindex="-1"></textarea>
<dialog id="ask" aria-labelledby="ask-head">
  <h2 id="ask-head"></h2>
  <p id="ask-why"></p>
  <p class="cited" id="ask-cited"></p>
  <textarea id="ask-text" aria-label="Text to paste" spellcheck="false"></textarea>
  <div class="choices">
    <button id="ask-no">Cancel</button>
    <button id="ask-yes"></button>
  </div>
</dialog>
<script nonce="@nonce@">
"use strict";

// ---- Limits, in milliseconds where nothing else is said.
const POLL = 2000;
const HIDDEN_POLL = 5000;
const SOONEST_POLL = 400;
const LONGEST_WAIT = 8000;
// The server says something every 15 seconds.
const SILENCE = 40000;
const WATCHED = 16; // terminals at once
const LISTED = 100; // runs in one answer
const OUTPUT_SHOWN = 512 * 1024; // bytes of a run's output, before more is asked for
const OUTPUT_LINES = 20000;
const BLOCK_LINES = 100;
const LONGEST_LINE = 4000; // characters
const BREATH = 64 * 1024; // characters of output between two frames
const TYPED_AT_ONCE = 1000; // characters, 4 bytes each at most
const PRESSED_AT_ONCE = 100; // keys

const byId = (id) => document.getElementById(id);
const pause = (time) => new Promise((done) => setTimeout(done, time));

function untilSeen() {
  if (!document.hidden) return null;
  return new Promise((done) => {
    document.addEventListener("visibilitychange", done, {once: true});
  });
}

// ---- Text.  It is only ever put into text nodes.
const UNSEEN = new RegExp("[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f"
  + "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]", "g");

// Shows control characters, and those that would reorder the text around them.
function visible(text) {
  return text.replace(UNSEEN, (each) =>
    each < " " ? String.fromCharCode(0x2400 + each.charCodeAt(0)) : "\ufffd");
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function duration(time) {
  const seconds = Math.max(0, time) / 1000;
  if (seconds < 0.1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function bytes(count) {
  if (count < 1024) return `${count} bytes`;
  const unit = count < 1024 * 1024 ? "KiB" : "MiB";
  const size = unit === "KiB" ? count / 1024 : count / 1024 / 1024;
  return `${size < 10 ? size.toFixed(1) : Math.round(size)} ${unit}`;
}

function clock(date) {
  const twoDigits = {hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false};
  const time = date.toLocaleTimeString([], twoDigits);
  if (date.toDateString() === new Date().toDateString()) return time;
  return `${date.toLocaleDateString([], {month: "short", day: "numeric"})} ${time}`;
}

// ---- Colours.  A style is made once for all that looks the same.
const styles = new Map();

function styleOf(fields) {
  const key = JSON.stringify(fields);
  if (!styles.has(key)) {
    // What a command prints must not fill the memory.
    if (styles.size > 5000) styles.clear();
    styles.set(key, Object.freeze({...fields, key}));
  }
  return styles.get(key);
}

const PLAIN = styleOf({flags: "", fore: null, back: null});
const FLAGS = {1: "b", 2: "d", 3: "i", 4: "u", 7: "v", 8: "h", 9: "s", 21: "u"};
const UNSET = {22: "bd", 23: "i", 24: "u", 27: "v", 28: "h", 29: "s"};

function paletteColour(index) {
  if (index < 16) return index;
  if (index < 232) {
    const level = (step) => (step === 0 ? 0 : 55 + 40 * step);
    const cube = index - 16;
    return [level(Math.floor(cube / 36)), level(Math.floor(cube / 6) % 6), level(cube % 6)];
  }
  const grey = 8 + 10 * (index - 232);
  return [grey, grey, grey];
}

// The colour behind a 38 or 48, and how many numbers it takes.
function longColour(numbers) {
  const inRange = (each) => Number.isInteger(each) && each >= 0 && each < 256;
  if (numbers[0] === 5 && inRange(numbers[1])) return [paletteColour(numbers[1]), 2];
  const parts = numbers.slice(1, 4);
  if (numbers[0] === 2 && parts.length === 3 && parts.every(inRange)) return [parts, 4];
  return [undefined, numbers[0] === 2 ? 4 : 2];
}

// The style after the numbers of an SGR sequence.
function restyled(style, words) {
  let {flags, fore, back} = style;
  const numbers = [];
  for (const word of (words || "0").split(";")) {
    // With colons: 38:2::R:G:B, 38:5:N, 4:3.
    const parts = word.split(":");
    if (parts.length === 1) numbers.push(Number(word || 0));
    else if (parts[0] === "4") numbers.push(parts[1] === "0" ? 24 : 4);
    else if (parts.length > 5) numbers.push(Number(parts[0]), 2, ...parts.slice(3, 6).map(Number));
    else numbers.push(...parts.map(Number));
  }
  for (let at = 0; at < numbers.length; at++) {
    const number = numbers[at];
    if (number === 0) ({flags, fore, back} = PLAIN);
    else if (FLAGS[number]) flags = flags.includes(FLAGS[number]) ? flags : flags + FLAGS[number];
    else if (UNSET[number]) {
      flags = [...flags].filter((flag) => !UNSET[number].includes(flag)).join("");
    } else if (number >= 30 && number <= 37) fore = number - 30;
    else if (number >= 90 && number <= 97) fore = number - 82;
    else if (number >= 40 && number <= 47) back = number - 40;
    else if (number >= 100 && number <= 107) back = number - 92;
    else if (number === 39) fore = null;
    else if (number === 49) back = null;
    else if (number === 38 || number === 48 || number === 58) {
      const [colour, taken] = longColour(numbers.slice(at + 1));
      if (colour !== undefined && number === 38) fore = colour;
      if (colour !== undefined && number === 48) back = colour;
      at += taken;
    }
  }
  return styleOf({flags: [...flags].sort().join(""), fore, back});
}

const rgb = (parts) => `rgb(${parts.map(Math.round).join(" ")})`;

// A text colour that can be read on the page's own back, light or dark.
function readable(parts) {
  const [red, green, blue] = parts;
  const light = (0.3 * red + 0.59 * green + 0.11 * blue) / 255;
  const darker = light > 0.5 ? parts.map((each) => each * (0.5 / light) * 0.9) : parts;
  const lift = light < 0.35 ? 0.35 - light : 0;
  const lighter = parts.map((each) => each + (255 - each) * lift * 1.3);
  return `light-dark(${rgb(darker)}, ${rgb(lighter)})`;
}

const WIDE = new RegExp("([\\u1100-\\u115f\\u2e80-\\u303e\\u3041-\\ua4cf\\uac00-\\ud7a3"
  + "\\uf900-\\ufaff\\ufe30-\\ufe6f\\uff00-\\uff60\\uffe0-\\uffe6]"
  + "|\\p{Emoji_Presentation}\\ufe0f?)", "u");

// The text in this style; with `cells`, wide characters take two columns, as in a terminal.
function styledNode(text, style, cells) {
  let node = document.createTextNode(text);
  if (cells && WIDE.test(text)) {
    node = document.createElement("span");
    text.split(WIDE).forEach((part, at) => {
      if (part) node.append(at % 2 ? element("span", "w", part) : part);
    });
  }
  if (style === PLAIN) return node;

  const span = document.createElement("span");
  let {fore, back} = style;
  const isInverse = style.flags.includes("v");
  if (isInverse) [fore, back] = [back ?? "b", fore ?? "f"];
  const names = [...style.flags].filter((flag) => flag !== "v");
  if (Array.isArray(fore)) span.style.color = back === null ? readable(fore) : rgb(fore);
  else if (fore !== null) names.push(`f${fore}`);
  if (Array.isArray(back)) span.style.backgroundColor = rgb(back);
  else if (back !== null) names.push(`g${back}`, "on");
  // A back of its own is as it is on light and dark pages; so must be what stands on it.
  if (Array.isArray(back) && fore === null) {
    const light = 0.3 * back[0] + 0.59 * back[1] + 0.11 * back[2] > 140;
    span.style.color = light ? "#111" : "#eee";
  }
  if (names.length) span.className = names.join(" ");
  span.append(node);
  return span;
}

// A colour; a movement in the line; what else begins with Escape; a tab, return or backspace.
const SEQUENCE = new RegExp("\\x1b\\[([0-9;:]{0,80})([mKGCD])|\\x1b\\[[0-?]*[ -/]*[@-~]?"
  + "|\\x1b[\\]PX^_][^\\x07\\x1b]*(?:\\x07|\\x1b\\\\)?|\\x1b[ -/]*[0-~]?|[\\r\\b]", "g");

// Puts a line that has nothing but colours in it into `row`; the style at its end.
function showScreenRow(row, text, style) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(SEQUENCE)) {
    if (found.index > at) nodes.push(styledNode(visible(text.slice(at, found.index)), style, true));
    if (found[2] === "m") style = restyled(style, found[1]);
    at = found.index + found[0].length;
  }
  if (at < text.length) nodes.push(styledNode(visible(text.slice(at)), style, true));
  row.replaceChildren(...nodes);
  return style;
}

// The same for a line of output, where the cursor may go back: progress bars do that.
function showLine(row, text, style) {
  if (!/[\x1b\r\b]/.test(text)) {
    row.replaceChildren(...(text ? [styledNode(visible(text), style, false)] : []));
    return style;
  }

  const cells = [];
  let column = 0;
  let at = 0;
  const put = (piece) => {
    for (const character of piece) cells[column++] = [character, style];
  };
  for (const found of text.matchAll(SEQUENCE)) {
    put(text.slice(at, found.index));
    at = found.index + found[0].length;
    const count = Math.min(parseInt(found[1], 10) || 0, LONGEST_LINE);
    if (found[2] === "m") style = restyled(style, found[1]);
    else if (found[2] === "K" && count === 0) cells.length = Math.min(cells.length, column);
    else if (found[2] === "K" && count === 2) cells.length = 0;
    else if (found[2] === "K") cells.fill([" ", PLAIN], 0, Math.min(column + 1, cells.length));
    else if (found[2] === "G") column = Math.max(count, 1) - 1;
    else if (found[2] === "C") column = Math.min(column + Math.max(count, 1), LONGEST_LINE);
    else if (found[2] === "D") column = Math.max(column - Math.max(count, 1), 0);
    else if (found[0] === "\r") column = 0;
    else if (found[0] === "\b") column = Math.max(column - 1, 0);
  }
  put(text.slice(at));

  const nodes = [];
  let piece = "";
  let shown = PLAIN;
  for (const cell of Array.from(cells, (each) => each ?? [" ", PLAIN])) {
    if (cell[1] !== shown && piece) {
      nodes.push(styledNode(visible(piece), shown, false));
      piece = "";
    }
    shown = cell[1];
    piece += cell[0];
  }
  if (piece) nodes.push(styledNode(visible(piece), shown, false));
  row.replaceChildren(...nodes);
  return style;
}

// ---- The server.
class Refusal extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

let token = "";
// The server's clock less ours.
let skew = 0;

async function ask(path, options = {}) {
  const headers = {...options.headers};
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, {...options, headers, cache: "no-store", redirect: "error"});
  const date = Date.parse(answer.headers.get("Date"));
  if (date) skew = date - Date.now();
  if (answer.ok) return answer;
  let text = `${answer.status} ${answer.statusText}`;
  try {
    text = (await answer.json()).error || text;
  } catch {
    // It is no JSON: something between us and the server has answered.
  }
  throw new Refusal(answer.status, text);
}

const askJson = async (path, options) => (await ask(path, options)).json();

function post(path, body) {
  const headers = {"Content-Type": "application/json"};
  return askJson(path, {method: "POST", headers, body: JSON.stringify(body)});
}

// Reads a stream of events to its end.  EventSource would put the token into the address.
async function readEvents(path, headers, abort, take) {
  const options = {headers: {...headers, Accept: "text/event-stream"}, signal: abort.signal};
  let timer = setTimeout(() => abort.abort(), SILENCE);
  try {
    const answer = await ask(path, options);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let unread = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => abort.abort(), SILENCE);
      unread += value;
      const texts = unread.split("\n\n");
      unread = texts.pop();
      for (const text of texts) {
        const event = {};
        for (const line of text.split("\n")) {
          const at = line.indexOf(": ");
          if (at > 0) event[line.slice(0, at)] = line.slice(at + 2);
        }
        if (event.data !== undefined) await take(event.event, JSON.parse(event.data), event.id);
      }
    }
  } finally {
    clearTimeout(timer);
    abort.abort();
  }
}

// ---- What is known.
const ALL = ""; // no agent has this name
const state = {
  // As the server lists them; null: nothing has come yet.
  agents: null,
  chosen: sessionStorage.getItem("agent") ?? ALL,
  // By id.
  runs: new Map(),
  // Of the list that is shown, the newest first.
  listed: [],
  hasOlder: false,
  // Those that run now, of all agents.
  running: [],
  // The id of the run whose output is shown.
  run: null,
  isAway: false,
};
const terminals = new Map(); // by agent

const isOver = (run) => run.state === "ended";
const isWell = (run) => run.exit_code === 0 && run.ended === "exit";

function markOf(run) {
  if (run.state === "waiting") return ["◌", "", "waiting"];
  if (!isOver(run)) return ["●", "busy", "running"];
  return isWell(run) ? ["✓", "good", "ended well"] : ["✗", "bad", "failed"];
}

function endOf(run) {
  if (run.state === "waiting") return "waits for a pane";
  if (!isOver(run) || isWell(run)) return "";
  const how = {timeout: "timed out", cancelled: "cancelled", lost: "lost"}[run.ended];
  return how || `exit ${run.exit_code}`;
}

function timeOf(run) {
  if (isOver(run)) return duration(run.duration_ms ?? 0);
  return run.started ? duration(Date.now() + skew - Date.parse(run.started)) : "";
}

const firstLine = (text) => visible(String(text ?? "").trim().split("\n", 1)[0].slice(0, 300));

// ---- Terminals.
const CHARACTER = (() => {
  const ruler = element("span", "", "0".repeat(100));
  ruler.style.cssText = "position:absolute;visibility:hidden;font:100px var(--mono)";
  document.body.append(ruler);
  const width = ruler.getBoundingClientRect().width / 10000;
  ruler.remove();
  return width || 0.6; // of the size of the font
})();

class PaneView {
  constructor(card) {
    this.card = card;
    this.box = element("div", "pane");
    this.title = element("p", "cut");
    this.view = element("div", "view");
    this.view.tabIndex = 0;
    this.view.setAttribute("role", "region");
    this.grid = element("div", "grid");
    this.cursor = element("div", "cursor");
    this.cursor.hidden = true;
    this.grid.append(this.cursor);
    this.view.append(this.grid);
    this.box.append(this.title, this.view);
    this.rows = [];
    this.runId = null;
    this.columns = 80;
    // Whether the view goes where the cursor goes, and where it was put last.
    this.follows = true;
    this.placed = 0;
    this.view.addEventListener("scroll", () => this.onScroll());
    this.view.addEventListener("click", () => card.onClick(this));
  }

  onScroll() {
    if (Math.abs(this.view.scrollTop - this.placed) < 3) return;
    const {scrollHeight, scrollTop, clientHeight} = this.view;
    this.follows = scrollHeight - scrollTop - clientHeight < 8;
  }

  show(pane, cursor) {
    this.runId = pane.run_id;
    this.command = pane.command;
    this.columns = pane.columns;
    const texts = pane.text.split("\n");
    const height = Math.max(texts.length, pane.cursor_line + 1);
    let style = PLAIN;

    for (let at = 0; at < height; at++) {
      const text = texts[at] ?? "";
      if (!this.rows[at]) {
        const node = element("div", "row");
        this.rows[at] = {node, text: null, before: null, after: PLAIN};
        this.grid.append(node);
      }
      const row = this.rows[at];
      if (row.text !== text || row.before !== style) {
        row.text = text;
        row.before = style;
        row.after = showScreenRow(row.node, text, style);
      }
      style = row.after;
    }
    for (const row of this.rows.splice(height)) row.node.remove();

    this.cursor.hidden = !cursor;
    if (cursor) {
      this.cursor.style.left = `${cursor.column}ch`;
      this.cursor.style.top = `calc(${cursor.line} * var(--row))`;
    }
    this.line = pane.cursor_line;
    this.place();
  }

  // Shows the end, or what is around a cursor above it.
  place() {
    if (!this.follows) return;
    const {scrollHeight, clientHeight} = this.view;
    const rowHeight = this.rows.length ? this.rows[0].node.offsetHeight : 16;
    const end = Math.max(0, scrollHeight - clientHeight);
    const above = Math.max(0, this.line * rowHeight - clientHeight / 3);
    this.placed = Math.min(end, this.line * rowHeight < end ? above : end);
    if (Math.abs(this.view.scrollTop - this.placed) > 1) this.view.scrollTop = this.placed;
    this.placed = this.view.scrollTop;
  }

  fit(isFitted) {
    const room = this.view.clientWidth - 22;
    const size = Math.max(3, Math.min(13, room / (this.columns * CHARACTER)));
    const name = isFitted && room > 0 ? `${size.toFixed(2)}px` : "";
    if (this.view.style.getPropertyValue("--size") === name) return;
    this.view.style.setProperty("--size", name);
    this.view.style.setProperty("--row", name && `${Math.round(size * 1.25)}px`);
    this.place();
  }
}

class TerminalCard {
  constructor(agentName) {
    this.agentName = agentName;
    this.card = element("article", "card");
    const head = element("div", "head");
    this.dot = element("span", "dot");
    this.dot.setAttribute("aria-hidden", "true");
    this.name = element("h2", "", agentName);
    this.what = element("span", "muted cut grow");
    this.time = element("span", "muted");
    this.fitter = element("button", "quiet", "Fit");
    this.fitter.title = "Show all columns";
    this.fitter.setAttribute("aria-label", `Fit the columns of ${agentName}`);
    this.fitter.setAttribute("aria-pressed", "false");
    this.fitter.addEventListener("click", () => this.toggleFit());
    head.append(this.dot, this.name, this.what, this.time, this.fitter);
    this.panes = element("div", "panes");
    this.waiting = element("p", "empty", "…");
    this.panes.append(this.waiting);
    this.card.append(head, this.panes);
    this.views = new Map(); // by pane id
    this.isFitted = false;
    this.target = null; // the pane that was clicked last
    this.runs = null; // what runs in its panes, as text
    this.resized = new ResizeObserver(() => this.layOut());
    this.resized.observe(this.panes);
    setAttribute(this.card, "aria-label", `Terminal of ${agentName}`);
  }

  onClick(view) {
    this.target = view;
    if (String(getSelection())) return;
    if (typing.isOn) typing.focus();
  }

  toggleFit() {
    this.isFitted = !this.isFitted;
    this.fitter.setAttribute("aria-pressed", String(this.isFitted));
    this.layOut();
  }

  layOut() {
    for (const view of this.views.values()) {
      view.fit(this.isFitted);
      view.place();
    }
  }

  show(screen) {
    const ids = new Set(screen.panes.map((pane) => pane.pane_id));
    for (const [id, view] of this.views) {
      if (!ids.has(id)) {
        view.box.remove();
        this.views.delete(id);
      }
    }
    this.waiting.hidden = ids.size > 0;
    setText(this.waiting, "This terminal is closed. The next command opens a new one.");

    // Where nothing runs, a pane is as small as what it shows, unless all are like that.
    const active = screen.panes.filter((pane) => pane.run_id || !isShell(pane.command));
    const large = new Set((active.length ? active : screen.panes.slice(0, 1)).map(
      (pane) => pane.pane_id));
    for (const pane of screen.panes) {
      let view = this.views.get(pane.pane_id);
      if (!view) {
        view = new PaneView(this);
        this.views.set(pane.pane_id, view);
        this.panes.append(view.box);
      }
      view.box.classList.toggle("main", large.has(pane.pane_id));
      view.title.hidden = screen.panes.length < 2;
      const cursor = screen.cursor?.pane_id === pane.pane_id ? screen.cursor : null;
      view.show(pane, cursor);
      const name = screen.panes.length < 2 ? this.agentName : `${this.agentName}, ${pane.pane_id}`;
      setAttribute(view.view, "aria-label", `Screen of ${name}`);
    }
    // Another run: the lists are no longer right.
    const runs = screen.panes.map((pane) => pane.run_id).join();
    if (runs !== this.runs) pollSoon();
    this.runs = runs;
    this.layOut();
    this.tick();
  }

  // The newest command of ours, or a person's program, in the pane's or the card's title.
  tick() {
    let shown = ["idle", ""];
    for (const view of this.views.values()) {
      const run = state.runs.get(view.runId);
      let text = isShell(view.command) ? "idle" : view.command;
      let time = "";
      if (view.runId) {
        text = run ? firstLine(run.cmd) : view.command;
        time = run ? timeOf(run) : "";
      }
      setText(view.title, [text, time].filter(Boolean).join(" · "));
      if (text !== "idle") shown = [text, time];
    }
    setText(this.what, shown[0]);
    setText(this.time, shown[1]);
    showDot(this.dot, this.agentName);
  }

  remove() {
    this.resized.disconnect();
    this.card.remove();
  }
}

const isShell = (command) => /^(ba|da|z|k|a)?sh$/.test(command) || command === "";

function showDot(dot, agentName) {
  const isRunning = state.running.some((run) => run.agent_name === agentName);
  const listed = (state.agents ?? []).find((each) => each.agent_name === agentName);
  dot.className = isRunning ? "dot busy" : listed?.busy ? "dot used" : "dot";
}

function watchedNames() {
  const names = (state.agents ?? []).map((each) => each.agent_name);
  if (state.chosen === ALL) return names.slice(0, WATCHED);
  return names.filter((each) => each === state.chosen);
}

let watching = {names: "", abort: null};
// Why terminals cannot be watched now, although the server answers.
let refused = "";

// Keeps one stream open for the terminals that are shown, while the page can be seen.
function watch() {
  const names = document.hidden || state.isAway || !isOpen ? "" : watchedNames().join(",");
  if (names === watching.names) return;
  watching.abort?.abort();
  const abort = names ? new AbortController() : null;
  watching = {names, abort};
  if (!abort) return;

  const path = `/terminals/${names}`;
  readEvents(path, {}, abort, (kind, screen) => {
    if (kind === "screen") terminals.get(screen.agent_name)?.show(screen);
    if (refused) banner(refused = "");
  })
    .catch((failure) => {
      if (failure.status === 503) banner(refused = `The server says: ${failure.message}`);
      else if (failure.status !== 404) failed(failure, abort);
    })
    .finally(async () => {
      await pause(refused ? LONGEST_WAIT / 2 : 1000);
      if (watching.abort === abort) watching = {names: "", abort: null};
      watch();
    });
}

function showTerminals() {
  const box = byId("terminals");
  const names = watchedNames();
  for (const [name, card] of terminals) {
    if (!names.includes(name)) {
      card.remove();
      terminals.delete(name);
    }
  }
  for (const [at, name] of names.entries()) {
    if (!terminals.has(name)) terminals.set(name, new TerminalCard(name));
    const {card} = terminals.get(name);
    if (box.children[at] !== card) box.insertBefore(card, box.children[at] ?? null);
  }
  let empty = box.querySelector(":scope > .empty");
  const left = (state.agents ?? []).length - names.length;
  let text = "";
  if (names.length === 0) {
    text = state.chosen === ALL
      ? "No terminals yet. An agent's terminal opens with its first command."
      : `The terminal of ${state.chosen} is closed. Its next command opens a new one.`;
  } else if (state.chosen === ALL && left > 0) {
    text = `${left} more: choose one above.`;
  }
  if (!text) empty?.remove();
  else {
    if (!empty) empty = element("p", "empty");
    setText(empty, text);
    box.append(empty);
  }
  typing.update();
}

// ---- Agents, as tabs.
function showTabs() {
  const box = byId("tabs");
  const names = (state.agents ?? []).map((each) => each.agent_name);
  // One that has gone stays until another is chosen.
  if (state.chosen !== ALL && !names.includes(state.chosen)) names.push(state.chosen);
  const wanted = names.length === 1 && state.chosen === ALL ? [] : [ALL, ...names];
  const tabs = new Map([...box.children].map((tab) => [tab.dataset.agent, tab]));
  for (const [name, tab] of tabs) if (!wanted.includes(name)) tab.remove();
  wanted.forEach((name, at) => {
    let tab = tabs.get(name);
    if (!tab) {
      tab = element("button");
      tab.dataset.agent = name;
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", "terminals");
      tab.addEventListener("click", () => choose(name));
      const dot = element("span", "dot");
      dot.setAttribute("aria-hidden", "true");
      if (name !== ALL) tab.append(dot);
      tab.append(element("span", "", name === ALL ? "All" : name));
    }
    const isChosen = name === state.chosen;
    setAttribute(tab, "aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
    if (name !== ALL) {
      showDot(tab.firstChild, name);
      const isRunning = tab.firstChild.className === "dot busy";
      setAttribute(tab, "aria-label", isRunning ? `${name}, running` : name);
    }
    if (box.children[at] !== tab) box.insertBefore(tab, box.children[at] ?? null);
  });
}

function choose(name) {
  if (state.chosen === name) return;
  state.chosen = name;
  sessionStorage.setItem("agent", name);
  state.listed = [];
  state.hasOlder = false;
  typing.turn(false);
  showAll();
  watch();
  pollSoon(0);
}

byId("tabs").addEventListener("keydown", (event) => {
  const tabs = [...byId("tabs").children];
  const at = tabs.indexOf(document.activeElement);
  const next = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tabs.length - 1}[event.key];
  if (next === undefined || at < 0) return;
  event.preventDefault();
  const tab = tabs[(next + tabs.length) % tabs.length];
  choose(tab.dataset.agent);
  tab.focus();
});

// ---- Runs.
const rows = new Map(); // by id: the parts of a row that change

function rowOf(run) {
  if (rows.has(run.run_id)) return rows.get(run.run_id);
  const item = element("li");
  const button = element("button");
  const mark = element("span", "mark");
  mark.setAttribute("aria-hidden", "true");
  const kind = element("span", "unseen");
  const what = element("span", "what");
  const command = element("span", "command cut", firstLine(run.cmd));
  const facts = element("span", "facts cut");
  const time = element("span", "time");
  what.append(command, facts);
  button.append(mark, kind, what, time);
  button.addEventListener("click", () => output.open(run.run_id));
  item.append(button);
  const row = {item, button, mark, kind, facts, time};
  rows.set(run.run_id, row);
  return row;
}

function showRunRow(run) {
  const row = rowOf(run);
  const [sign, kind, words] = markOf(run);
  setText(row.mark, sign);
  if (row.mark.className !== `mark ${kind}`) row.mark.className = `mark ${kind}`;
  setText(row.kind, `${words}: `);
  const started = run.started ? clock(new Date(run.started)) : "";
  const agent = state.chosen === ALL ? run.agent_name : "";
  setText(row.facts, [started, agent, endOf(run)].filter(Boolean).join(" · "));
  row.facts.classList.toggle("bad-text", isOver(run) && !isWell(run));
  setText(row.time, timeOf(run));
  setAttribute(row.button, "aria-current", String(run.run_id === state.run));
  return row.item;
}

function showRuns() {
  const box = byId("runs");
  const items = state.listed.map((id) => showRunRow(state.runs.get(id)));
  const known = new Set(items);
  for (const child of [...box.children]) if (!known.has(child)) child.remove();
  items.forEach((item, at) => {
    if (box.children[at] !== item) box.insertBefore(item, box.children[at] ?? null);
  });
  for (const id of rows.keys()) if (!state.runs.has(id)) rows.delete(id);

  const failures = state.listed.filter((id) => {
    const run = state.runs.get(id);
    return isOver(run) && !isWell(run);
  }).length;
  const whose = state.chosen === ALL ? "" : ` of ${state.chosen}`;
  const more = state.hasOlder ? "+" : "";
  setText(byId("count"), items.length
    ? `${items.length}${more}${whose}${failures ? ` · ${failures} failed` : ""}`
    : "");

  if (state.hasOlder) {
    const item = element("li");
    const older = element("button", "", "Older…");
    older.id = "older";
    older.addEventListener("click", loadOlder);
    item.append(older);
    box.append(item);
  } else if (items.length === 0) {
    box.append(element("li", "empty", state.agents === null ? "…" : `No runs${whose} yet.`));
  }
}

const runsPath = (more) => {
  const query = new URLSearchParams({limit: LISTED, ...more});
  if (state.chosen !== ALL) query.set("agent_name", state.chosen);
  return `/runs?${query}`;
};

async function loadOlder() {
  const chosen = state.chosen;
  const last = state.listed.at(-1);
  try {
    const {runs} = await askJson(runsPath({before: last}));
    if (chosen !== state.chosen) return;
    learn(runs);
    state.listed.push(...runs.map((run) => run.run_id).filter((id) => !state.listed.includes(id)));
    state.hasOlder = runs.length === LISTED;
    showRuns();
  } catch (failure) {
    failed(failure);
  }
}

// Takes over what the server says of runs; tells a screen reader of those that have ended.
function learn(runs) {
  const ended = [];
  for (const run of runs) {
    const before = state.runs.get(run.run_id);
    if (before && !isOver(before) && isOver(run)) ended.push(run);
    state.runs.set(run.run_id, run);
  }
  if (ended.length === 1) {
    const [run] = ended;
    const how = isWell(run) ? "ended well" : `failed: ${endOf(run)}`;
    setText(byId("told"), `${run.agent_name}: ${firstLine(run.cmd)} ${how}`);
  } else if (ended.length > 1) {
    setText(byId("told"), `${ended.length} runs have ended`);
  }
}

// Puts the newest runs before those that are listed already.
function list(newest) {
  const ids = newest.map((run) => run.run_id);
  const isWhole = newest.length < LISTED;
  const overlap = state.listed.indexOf(ids.at(-1));
  if (isWhole) {
    state.listed = ids;
    state.hasOlder = false;
  } else if (overlap < 0 || state.listed.length <= LISTED) {
    state.listed = ids;
    state.hasOlder = true;
  } else {
    state.listed = [...ids, ...state.listed.slice(overlap + 1)];
  }
  const kept = new Set([...state.listed, ...state.running.map((run) => run.run_id), state.run]);
  for (const id of state.runs.keys()) if (!kept.has(id)) state.runs.delete(id);
}

// ---- The output of a run.
const output = {
  abort: null,
  // Grows with each run that is opened: what was begun for another one is over.
  turn: 0,
  // Of the bytes that are shown.
  start: 0,
  end: 0,
  style: PLAIN,
  unfinished: "",

  open(id, start) {
    this.abort?.abort();
    const isSame = state.run === id;
    state.run = id;
    const run = state.runs.get(id);
    this.start = start ?? Math.max(0, (run?.output_bytes ?? 0) - OUTPUT_SHOWN);
    this.end = this.start;
    this.style = PLAIN;
    this.unfinished = "";
    this.tail = null;
    this.block = null;
    this.lines = 0;
    this.isCut = this.start > 0;
    this.isComplete = false;
    this.isLost = false;
    this.follows = start === undefined;
    byId("out").replaceChildren();
    byId("shown").hidden = false;
    byId("list").classList.add("short");
    if (!isSame) setText(byId("command"), visible(String(run?.cmd ?? "")));
    document.body.classList.add("drawn");
    showDrawer();
    this.show();
    showRuns();
    this.follow(id);
  },

  close() {
    this.abort?.abort();
    this.abort = null;
    this.turn++;
    const id = state.run;
    state.run = null;
    byId("shown").hidden = true;
    byId("list").classList.remove("short");
    this.widen(false);
    showRuns();
    rows.get(id)?.button.focus();
  },

  widen(isWide) {
    byId("main").classList.toggle("wide", isWide);
    setAttribute(byId("wide"), "aria-pressed", String(isWide));
    this.place();
  },

  async follow(id) {
    const turn = ++this.turn;
    for (let wait = 500; !this.isComplete; wait = Math.min(wait * 2, LONGEST_WAIT)) {
      await untilSeen();
      if (turn !== this.turn) return;
      const abort = new AbortController();
      this.abort = abort;
      let taken = 0;
      try {
        const headers = this.end ? {"Last-Event-ID": String(this.end)} : {};
        await readEvents(`/runs/${id}/output`, headers, abort, async (kind, data, eventId) => {
          if (turn !== this.turn) return;
          if (kind === "output") {
            this.add(data.stdout, Number(eventId));
            wait = 500;
            taken += data.stdout.length;
            if (taken > BREATH) {
              taken = 0;
              await Promise.race([new Promise(requestAnimationFrame), pause(100)]);
            }
          } else if (kind === "exit") {
            this.isComplete = true;
            pollSoon();
          }
        });
      } catch (failure) {
        if (turn !== this.turn) return;
        if (failure.status === 404) {
          this.isComplete = true;
          this.isLost = true;
        } else failed(failure, abort);
      }
      if (turn !== this.turn) return;
      this.show();
      if (!this.isComplete) await pause(wait);
    }
  },

  add(text, end) {
    const size = new TextEncoder().encode(text).length;
    if (end - size > this.end && this.end > this.start) {
      this.finish();
      this.put(`… ${bytes(end - size - this.end)} are left out …`, true);
      this.style = PLAIN;
    } else if (this.end === this.start && end - size > this.start) {
      this.start = end - size;
      this.isCut = this.start > 0;
    }
    this.end = end;

    const pieces = (this.unfinished + text).split("\n");
    this.unfinished = pieces.pop();
    for (const piece of pieces) {
      this.put(piece.endsWith("\r") ? piece.slice(0, -1) : piece, true);
    }
    // A line without an end must not grow for ever.
    while (this.unfinished.length > LONGEST_LINE) {
      this.put(this.unfinished.slice(0, LONGEST_LINE), true);
      this.unfinished = this.unfinished.slice(LONGEST_LINE);
    }
    if (this.unfinished) this.put(this.unfinished, false);
    this.show();
    this.place();
  },

  // Shows the end, where nobody has scrolled away from it.
  place() {
    if (!this.follows) return;
    const box = byId("out");
    box.scrollTop = box.scrollHeight;
    this.placed = box.scrollTop;
  },

  finish() {
    if (this.unfinished) this.put(this.unfinished, true);
    this.unfinished = "";
  },

  put(text, isWhole) {
    for (let at = 0; at === 0 || at < text.length; at += LONGEST_LINE) {
      this.putLine(text.slice(at, at + LONGEST_LINE), isWhole);
    }
  },

  putLine(text, isWhole) {
    const box = byId("out");
    if (!this.tail) {
      if (!this.block || this.block.childElementCount >= BLOCK_LINES) {
        this.block = element("div", "block");
        box.append(this.block);
      }
      this.tail = element("div", "line");
      this.block.append(this.tail);
      this.lines++;
    }
    const style = showLine(this.tail, text, this.style);
    if (!isWhole) return;
    this.style = style;
    this.tail = null;
    while (this.lines > OUTPUT_LINES) {
      const first = box.querySelector(".block");
      this.lines -= first.childElementCount;
      first.remove();
      this.isCut = true;
    }
  },

  // All around the text itself.
  show() {
    const run = state.runs.get(state.run);
    if (!state.run) return;
    const box = byId("out");
    if (run) {
      const [sign, kind, words] = markOf(run);
      setText(byId("mark"), sign);
      byId("mark").className = `mark ${kind}`;
      setText(byId("state"), [endOf(run) || words, timeOf(run)].filter(Boolean).join(" · "));
      const started = run.started ? clock(new Date(run.started)) : "";
      const size = run.output_bytes ?? this.end;
      setText(byId("facts"), [run.agent_name, started, visible(run.cwd ?? ""),
        size ? bytes(size) : "no output", run.door, visible(run.error ?? "")]
        .filter(Boolean).join(" · "));
      byId("end").hidden = isOver(run);
    }

    let earlier = byId("earlier");
    if (this.isCut && !earlier) {
      earlier = element("button", "", "Earlier output…");
      earlier.id = "earlier";
      earlier.addEventListener("click", () => {
        this.open(state.run, Math.max(0, this.start - 2 * OUTPUT_SHOWN));
      });
      box.prepend(earlier);
    } else if (!this.isCut) earlier?.remove();

    let empty = box.querySelector(".empty");
    if (this.lines > 0) empty?.remove();
    else {
      if (!empty) {
        empty = element("p", "empty");
        box.append(empty);
      }
      let text = "No output yet.";
      if (this.isLost) text = "This output is no longer kept.";
      else if (this.isComplete) text = "No output.";
      setText(empty, text);
    }
  },
};

byId("out").addEventListener("scroll", () => {
  const {scrollHeight, scrollTop, clientHeight} = byId("out");
  if (Math.abs(scrollTop - output.placed) < 3) return;
  output.follows = scrollHeight - scrollTop - clientHeight < 8;
});
byId("close").addEventListener("click", () => output.close());
byId("wide").addEventListener("click", () => {
  output.widen(byId("wide").getAttribute("aria-pressed") !== "true");
});
byId("end").addEventListener("click", async () => {
  const run = state.runs.get(state.run);
  if (!run) return;
  const question = {
    head: "End this run?",
    why: `${run.agent_name} has been running it for ${timeOf(run)}. It gets TERM, then KILL.`,
    cited: visible(String(run.cmd).slice(0, 2000)),
    yes: "End it",
  };
  if ((await confirmed(question)) === null) return;
  byId("end").disabled = true;
  try {
    await ask(`/runs/${run.run_id}`, {method: "DELETE"});
  } catch (failure) {
    failed(failure);
  }
  byId("end").disabled = false;
  pollSoon(0);
});

// ---- Questions.  The text of the answer; null: no.
function confirmed({head, why = "", cited = "", text, yes}) {
  const dialog = byId("ask");
  setText(byId("ask-head"), head);
  for (const [id, content] of [["ask-why", why], ["ask-cited", cited]]) {
    setText(byId(id), content);
    byId(id).hidden = !content;
  }
  const field = byId("ask-text");
  field.hidden = text === undefined;
  field.value = text ?? "";
  setText(byId("ask-yes"), yes);
  byId("ask-yes").className = text === undefined ? "danger" : "main";
  dialog.showModal();
  (text === undefined ? byId("ask-no") : field).focus();
  return new Promise((answer) => {
    const finish = (content) => {
      dialog.close();
      answer(content);
    };
    byId("ask-yes").onclick = () => finish(field.value);
    byId("ask-no").onclick = () => finish(null);
    // By Escape.  This event may come late, when the next question is open already.
    dialog.onclose = () => {
      if (!dialog.open) answer(null);
    };
  });
}

// ---- Typing.
const NAMED = {
  Enter: "Enter", Escape: "Escape", Tab: "Tab", Backspace: "BSpace", Delete: "DC", Insert: "IC",
  ArrowUp: "Up", ArrowDown: "Down", ArrowLeft: "Left", ArrowRight: "Right", Home: "Home",
  End: "End", PageUp: "PPage", PageDown: "NPage",
};
// So that a phone's keyboard has something to delete.
const FILLING = "\u200b";

// The name that tmux has for a key; null: it is text, or for the browser.
function keyName(event) {
  if (event.isComposing || event.metaKey || event.key === "Unidentified") return null;
  const control = event.ctrlKey ? "C-" : "";
  const alt = event.altKey ? "M-" : "";
  let name = NAMED[event.key];
  if (/^F([1-9]|1[0-2])$/.test(event.key)) name = event.key;
  if (name === "Tab" && event.shiftKey) return "BTab";
  if (name) {
    const isPlain = ["Enter", "Escape", "Tab", "BSpace"].includes(name);
    return control + alt + (event.shiftKey && !isPlain ? "S-" : "") + name;
  }
  if (!/^[ -~]$/.test(event.key) || event.getModifierState("AltGraph")) return null;
  if (!control && !alt) return null;
  // The browser's own: to copy and to paste.
  if (control && event.shiftKey) return null;
  if (control && event.key === "v") return null;
  if (control && event.key === "c" && String(getSelection())) return null;
  return control + alt + (event.key === " " ? "Space" : event.key);
}

const typing = {
  isOn: false,
  isSending: false,
  queue: [],

  card() {
    return terminals.size === 1 ? [...terminals.values()][0] : null;
  },

  update() {
    const card = this.card();
    byId("typing").hidden = !card;
    if (!card && this.isOn) this.turn(false);
  },

  turn(isOn) {
    if (this.isOn === isOn) return;
    this.isOn = isOn;
    this.queue = [];
    setAttribute(byId("keys"), "aria-checked", String(isOn));
    byId("row").hidden = !isOn;
    this.tell(isOn ? "Click the terminal to type; Ctrl+Alt+Enter leaves." : "", false);
    if (isOn) this.focus();
  },

  tell(text, isError) {
    setText(byId("hint"), text);
    byId("hint").classList.toggle("error", isError);
  },

  focus() {
    byId("typed").value = FILLING;
    byId("typed").focus({preventScroll: true});
  },

  text(text) {
    const characters = [...text];
    for (let at = 0; at < characters.length; at += TYPED_AT_ONCE) {
      this.queue.push({text: characters.slice(at, at + TYPED_AT_ONCE).join(""), keys: []});
    }
    this.send();
  },

  key(name) {
    this.queue.push({text: "", keys: [name]});
    this.send();
  },

  // What has come together meanwhile leaves together: texts, then keys.
  next() {
    const first = this.queue.shift();
    while (this.queue.length) {
      const {text, keys} = this.queue[0];
      const isLong = first.text.length + text.length > TYPED_AT_ONCE;
      if ((text && (first.keys.length || isLong)) || first.keys.length >= PRESSED_AT_ONCE) break;
      first.text += text;
      first.keys.push(...keys);
      this.queue.shift();
    }
    return first;
  },

  async send() {
    if (this.isSending) return;
    this.isSending = true;
    try {
      while (this.queue.length && this.isOn) {
        const card = this.card();
        const body = {...this.next(), show: false};
        const target = card.target;
        if (target && card.views.size > 1 && target.runId) body.run_id = target.runId;
        await post(`/terminals/${card.agentName}/keys`, body);
      }
    } catch (failure) {
      this.queue = [];
      this.tell(`Not typed: ${failure.message}`, true);
    } finally {
      this.isSending = false;
    }
  },

  async paste(text) {
    const isLong = /[\n\r]/.test(text.trimEnd()) || text.length > 500;
    let sent = text;
    if (isLong || !text) {
      const why = "Each line break is an Enter.";
      sent = await confirmed({head: "Paste into the terminal", why, text, yes: "Paste"});
      this.focus();
    }
    if (sent) this.text(sent.replace(/\r?\n/g, "\r").replaceAll(FILLING, ""));
  },
};

byId("keys").addEventListener("click", () => typing.turn(!typing.isOn));
byId("paste").addEventListener("click", () => typing.paste(""));
for (const button of document.querySelectorAll("#row [data-key]")) {
  // The keyboard of a phone stays as it is.
  button.addEventListener("pointerdown", (event) => event.preventDefault());
  button.addEventListener("click", () => typing.key(button.dataset.key));
}
byId("typed").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.ctrlKey && event.altKey) {
    event.preventDefault();
    byId("keys").focus();
    return;
  }
  const name = keyName(event);
  if (name === null) return;
  event.preventDefault();
  typing.key(name);
});
function takeTyped(event) {
  if (event.isComposing) return;
  const field = byId("typed");
  const text = field.value.replaceAll(FILLING, "");
  const isErased = field.value === "" && String(event.inputType).startsWith("delete");
  field.value = FILLING;
  if (isErased) typing.key("BSpace");
  else if (text) typing.text(text.replace(/\n/g, "\r"));
}
byId("typed").addEventListener("input", takeTyped);
byId("typed").addEventListener("compositionend", takeTyped);
byId("typed").addEventListener("paste", (event) => {
  event.preventDefault();
  typing.paste(event.clipboardData.getData("text/plain"));
});
for (const kind of ["focus", "blur"]) {
  byId("typed").addEventListener(kind, () => {
    typing.card()?.card.classList.toggle("typing", kind === "focus" && typing.isOn);
  });
}

// ---- All together.
// Whether the server lets us in.
let isOpen = false;
let timer = null;
let isPolling = false;
let polledAt = 0;
let isWanted = false;
let wait = 500;

function showRunning() {
  const count = state.running.length;
  const text = count ? `● ${count} running` : "idle";
  setText(byId("running"), isOpen && !state.isAway ? text : "");
  byId("running").classList.toggle("busy", count > 0);
  const title = count ? `(${count}) pocketcoder` : "pocketcoder";
  if (document.title !== title) document.title = title;
  showDrawer();
}

function showDrawer() {
  const isDrawn = document.body.classList.contains("drawn");
  setAttribute(byId("drawer"), "aria-expanded", String(isDrawn));
  const count = state.running.length;
  setText(byId("drawer"), isDrawn ? "Terminals" : `Runs${count ? ` · ${count}` : ""}`);
}

byId("drawer").addEventListener("click", () => {
  document.body.classList.toggle("drawn");
  showDrawer();
  for (const card of terminals.values()) card.layOut();
});

function showAll() {
  showRunning();
  showTabs();
  showTerminals();
  showRuns();
  output.show();
}

function banner(text) {
  byId("banner").hidden = !text;
  setText(byId("banner"), text);
  document.body.classList.toggle("stale", Boolean(text));
}

// What a failure means for the whole page.
function failed(failure, abort) {
  const isRefusal = failure instanceof Refusal;
  if (failure.name === "AbortError" || (abort?.signal.aborted && !isRefusal)) return;
  if (failure.status === 401) {
    logIn();
  } else if (isRefusal) {
    banner(`The server says: ${failure.message}`);
  } else {
    state.isAway = true;
    banner("The server is away. Trying again…");
    showRunning();
    watch();
  }
}

function logIn() {
  const isWrong = token !== "";
  isOpen = false;
  sessionStorage.removeItem("token");
  token = "";
  state.running = [];
  output.close();
  watch();
  banner("");
  state.isAway = false;
  if (byId("login").hidden || isWrong) {
    setText(byId("why"), isWrong
      ? "This token is wrong, or no longer right."
      : "It is in POCKETCODER_TOKEN where the server runs. It is kept for this tab only.");
    byId("why").className = isWrong ? "bad-text" : "muted";
    setAttribute(byId("token"), "aria-invalid", String(isWrong));
    byId("login").hidden = false;
    byId("main").hidden = true;
    byId("tabs").hidden = true;
    byId("drawer").hidden = true;
    byId("token").focus();
    byId("token").select();
  }
  showRunning();
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value.trim();
  sessionStorage.setItem("token", token);
  pollSoon(0);
});

function enter() {
  if (isOpen) return;
  isOpen = true;
  byId("token").value = "";
  byId("login").hidden = true;
  byId("main").hidden = false;
  byId("tabs").hidden = false;
  byId("drawer").hidden = false;
}

async function poll() {
  isPolling = true;
  isWanted = false;
  polledAt = Date.now();
  const {chosen} = state;
  try {
    const asked = [askJson(`/runs?state=running&limit=${LISTED}`)];
    if (!document.hidden) asked.push(askJson("/terminals"), askJson(runsPath({})));
    const [running, found, listed] = await Promise.all(asked);
    state.running = running.runs;
    learn(running.runs);
    if (found) {
      state.agents = found.terminals;
      learn(listed.runs);
      if (chosen === state.chosen) list(listed.runs);
      await learnOthers();
    }
    enter();
    state.isAway = false;
    wait = 500;
    banner(refused);
    showAll();
    watch();
  } catch (failure) {
    failed(failure);
    wait = Math.min(wait * 2, LONGEST_WAIT);
  }
  isPolling = false;
  plan();
}

// Runs that are shown and on no list.
async function learnOthers() {
  const run = state.runs.get(state.run);
  const isListed = state.listed.includes(state.run) || state.running.includes(run);
  if (!run || isListed || isOver(run)) return;
  try {
    learn([await askJson(`/runs/${state.run}`)]);
  } catch (failure) {
    if (failure.status !== 404) throw failure;
  }
}

function plan() {
  clearTimeout(timer);
  // Without a token there is nothing to ask for.
  if (!isOpen && !byId("login").hidden) return;
  let time = document.hidden ? HIDDEN_POLL : POLL;
  if (state.isAway) time = wait;
  else if (isWanted) time = SOONEST_POLL;
  timer = setTimeout(poll, time);
}

// Something has changed: ask before it is time.
function pollSoon(time = SOONEST_POLL) {
  if (isPolling || state.isAway && time) {
    isWanted = true;
    return;
  }
  if (isWanted && time) return;
  isWanted = true;
  clearTimeout(timer);
  timer = setTimeout(poll, Math.max(time, time && SOONEST_POLL - (Date.now() - polledAt)));
}

document.addEventListener("visibilitychange", () => {
  watch();
  // A browser has few connections for all its tabs.
  if (document.hidden) output.abort?.abort();
  if (!document.hidden) pollSoon(0);
});

setInterval(() => {
  if (document.hidden || state.isAway) return;
  for (const card of terminals.values()) card.tick();
  for (const id of state.listed) {
    const run = state.runs.get(id);
    if (run && !isOver(run)) showRunRow(run);
  }
  output.show();
}, 1000);

// The token goes from the address into the tab at once.
function takeToken() {
  const found = /(?:^#|&)token=([^&]*)/.exec(location.hash);
  if (!found) return;
  history.replaceState(null, "", location.pathname + location.search);
  try {
    sessionStorage.setItem("token", decodeURIComponent(found[1]));
  } catch {
    sessionStorage.setItem("token", found[1]);
  }
}

takeToken();
token = sessionStorage.getItem("token") ?? "";
window.addEventListener("hashchange", () => {
  takeToken();
  token = sessionStorage.getItem("token") ?? "";
  pollSoon(0);
});
poll();
</script>
</body>
</html>
"""


# ==========================================================================
# Endpoints
# ==========================================================================
# H1  Handlers of commands and of SSE know nothing of Tornado.
# H2  When a caller leaves, its command is cancelled, unless it was given `wait` or belongs to a
#     session.
# H3  A stream keeps its status: an error after its first byte is its last event.


async def health_handler() -> str:
    """Answers while commands run."""
    return "ok"


async def ready_handler(state: AppState) -> Message:
    """Whether a command could run now; if not, why."""
    problem = await state.readiness.problem()
    if problem:
        error = {"error": problem, "exit_code": ProxyError.exit_code}
        return {"ready": False, **error, "version": VERSION}

    return {"ready": True, "version": VERSION}


async def metrics_handler(state: AppState) -> str:
    """For Prometheus."""
    return await state.measured()


@contextlib.asynccontextmanager
async def answering(state: AppState, request: ExecRequest) -> AsyncIterator[Run]:
    """Run a command to its end, or for `wait` seconds.

    Cancelling this cancels it, unless the request has a `wait`.
    """
    if request.wait is None:
        async with executed(state, request, "exec", RECORD_ONLY) as run:
            yield run
    else:
        async with launched(state, request, "exec", request.wait) as run:
            yield run


async def exec_handler(state: AppState, request: ExecRequest) -> ExecResponse:
    """Run a command to its end, or for `wait` seconds.

    For programs that embed us: `ExecEndpoint.answer` does the same, in pieces.  Cancelling this
    cancels the command, unless the request has a `wait`.
    """
    async with answering(state, request) as run:
        return run.answer("".join(run.text()))


async def stream_handler(
    state: AppState, request: ExecRequest, send: Callable[[str], Awaitable[None]]
) -> ExecResponse:
    """Run a command to its end, and send its output as events; a slow `send` slows the command.

    Cancelling this cancels the command.  Raises TimeoutError if `send` takes longer than
    SLOW_READER_TIMEOUT for the rest of an ended command.
    """
    # Never half a character.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    announced = asyncio.Event()

    async def output(chunk: bytes, final: bool = False) -> None:
        text = decoder.decode(chunk, final)
        await announced.wait()
        if text:
            await send(output_event(text))

    async def started(_: Job) -> None:
        try:
            await send(": started\n\n")
        finally:
            announced.set()

    async with executed(
        state,
        request,
        "stream",
        {"out": output},
        started=started,
        patience=SLOW_READER_TIMEOUT,
    ) as run:
        await output(b"", final=True)
        return run.answer(None)


async def launched_stream_handler(
    state: AppState, request: ExecRequest, send: Callable[[str], Awaitable[None]]
) -> ExecResponse:
    """The same for `wait` seconds: then the command goes on without its caller.

    A slow `send` slows nothing: what is no longer kept is left out.
    """
    assert request.wait is not None
    deadline = time.monotonic() + request.wait
    run = state.driver.launch(request, Notes(state, request, "stream"))
    sending = asyncio.ensure_future(
        send_output(run, 0, send, run.needs_no_wait.is_set, is_numbered=True)
    )
    try:
        await send(": started\n\n")
        await is_set_within(run.needs_no_wait, deadline - time.monotonic())
        if run.result is not None:
            await asyncio.wait_for(sending, SLOW_READER_TIMEOUT)
            await check_audited(state, run)
        elif run.failure is not None:
            raise run.failure
        state.driver.save_waiting(run)
        return run.answer(None)
    finally:
        sending.cancel()
        state.driver.unattend(run)


def output_event(text: str, offset: int | None = None) -> str:
    """A piece of output as Server-Sent Events have it; `offset` is that behind it."""
    id_line = "" if offset is None else f"id: {offset}\n"
    return f"event: output\n{id_line}data: {ExecResponse(stdout=text).to_wire()}\n\n"


async def send_output(
    run: Run,
    offset: int,
    send: Callable[[str], Awaitable[None]],
    until: Callable[[], bool],
    is_numbered: bool = False,
) -> int:
    """Send what a run prints from `offset` on, as it comes; the offset behind the last byte.

    until        whether to stop where nothing more is there
    is_numbered  each event has the offset behind it, never inside a character
    What is no longer kept is left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    at = offset
    while True:
        start, chunk = run.record.read(at, TEXT_PIECE)
        if chunk:
            if start != at:
                decoder.reset()
            at = start + len(chunk)
            text = decoder.decode(chunk)
            if text:
                behind = at - len(decoder.getstate()[0])
                await send(output_event(text, behind if is_numbered else None))
        elif until():
            break
        else:
            await run.record.change()

    rest = decoder.decode(b"", True)
    if rest:
        await send(output_event(rest, at if is_numbered else None))
    return at


async def follow_handler(run: Run, offset: int, send: Callable[[str], Awaitable[None]]) -> None:
    """Send what a run prints as numbered events, and how it ended, then what still comes.

    Background processes may print after the end.  If the run is forgotten, the end is missing.
    """

    def is_gone() -> bool:
        return run.is_left or run.record.is_forgotten

    def has_ended() -> bool:
        return run.result is not None or run.failure is not None or is_gone()

    def is_complete() -> bool:
        return run.record.is_complete or is_gone()

    at = await send_output(run, offset, send, has_ended, is_numbered=True)
    if not is_gone():
        await send(f"event: exit\ndata: {run.answer(None).to_wire()}\n\n")
        await send_output(run, at, send, is_complete, is_numbered=True)


async def channel_handler(
    state: AppState,
    message: str | bytes,
    send: Callable[[int, bytes], Awaitable[None]],
    started: Callable[[Job], Awaitable[None]],
) -> str:
    """Run the command that the first message of a channel asks for; the final JSON.

    Cancelling this cancels the command.  Raises ProxyError.
    """
    body = message.encode() if isinstance(message, str) else message
    request = ExecRequest.from_wire(body, state.workspace)
    takes: dict[str, Take] = {"out": partial(send, 1)}
    if not request.combined:
        takes["err"] = partial(send, 2)

    if request.wait is not None:
        raise complain("wait", request.wait, "none over a channel: its caller waits for the end")

    is_fed = request.stdin is None
    async with executed(state, request, "shell", takes, started=started, fed=is_fed) as run:
        return run.answer(None).to_wire()


async def channel_input(job: Job, message: str | bytes) -> None:
    """Take a later message of a channel; return when there is room for more.  Raises BadMessage."""
    if isinstance(message, str):
        try:
            got = json.loads(message)

            # A shell that ends leaves no caller for the rest.
            if got.get("end") is True:
                job.leave_nothing()

            signal_group(job, SIGNAL_NUMBERS[got["signal"]])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            expected = f"one of {', '.join(SIGNAL_NUMBERS)}, in an object"
            raise complain("signal", message, expected) from None
    elif message == b"\xff\0":
        if job.feed is not None:
            job.feed.finish()
    elif message[:1] == b"\0":
        if job.feed is not None:
            await job.feed.write(message[1:])
    else:
        raise complain("channel", [*message[:2]], "0 for stdin, or 255 and 0 for its end")


async def screens_handler(
    state: AppState, agent_names: Sequence[str], send: Callable[[str], Awaitable[None]]
) -> None:
    """Send what these terminals show, until the server stops.  Cancelling this ends it.

    Raises TooMany, NoSuchPath, NoTerminal.
    """
    async with state.screens.watch(agent_names) as reader:
        while not reader.ended:
            events = await reader.next(KEEP_ALIVE)
            for event in events or [": keep-alive\n\n"]:
                await send(event)


async def keys_handler(state: AppState, agent_name: str, body: bytes) -> Message:
    """Type into a terminal; what it shows then, unless `show` is false."""
    got = read_object(body)
    arguments = {"agent_name": agent_name, **checked(got, KEYS_FIELDS)}
    shows = arguments["show"]
    screen = await type_keys(state, "page", arguments, shows)
    answer: Message = {"screen": screen} if shows else {}
    ignored = ignored_names(got, KEYS_FIELDS.keys())
    if ignored:
        answer["ignored"] = ignored

    return answer


async def sse_handler(
    state: AppState,
    query: McpQuery,
    credential: str = "",
    suffix: str = "",
    name: str = "",
    address: str = "",
) -> AsyncGenerator[str, None]:
    """Yield a session's events until its client leaves, or comes back by another stream.

    credential  that the session belongs to
    suffix      of the path to post to
    name        of the server; "" is the built-in one
    address     of the client's machine
    Raises UnknownSession.
    """
    if query.session_id in state.sessions:
        session = state.sessions.find(name, "sse", query.session_id, credential)
    else:
        lifetime = Lifetime.NAMED if query.session_id else Lifetime.STREAM
        server = state.servers[name]
        session = Session(
            state, server, "sse", lifetime, query.session_id, credential=credential, address=address
        )
        state.sessions.open(session)

    async with session.stream() as messages:
        path = f"/servers/{percent_encoded(name, safe='')}/messages" if name else "/messages"
        yield f"event: endpoint\ndata: {path}?session_id={session.session_id}{suffix}\n\n"
        async for message in messages:
            yield await sse_event(message)


def to_json(message: Message | str) -> str:
    """Short where that is safe."""
    text = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
    return text if NOT_RAW.search(text) is None else json.dumps(message)


class LongStrings:
    """Takes the long strings out of a message, so that they can be written in pieces."""

    def __init__(self) -> None:
        # Stands for one of them, with its number.
        self.mark = secrets.token_hex(8)
        self.taken = list[str]()

    def shorten(self, value: Any) -> Any:
        """The same value, with marks in the place of long strings."""
        if isinstance(value, dict):
            return {name: self.shorten(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.shorten(each) for each in value]
        if isinstance(value, str) and len(value) > MAX_WRITTEN:
            self.taken.append(value)
            return self.mark

        return value


async def to_json_in_turns(message: Message) -> str:
    """The same as `to_json`; while a long string is written, other callers are served."""
    strings = LongStrings()
    around = to_json(strings.shorten(message)).split(strings.mark)
    written = [around[0]]
    for string, behind in zip(strings.taken, around[1:], strict=True):
        for at in range(0, len(string), TEXT_PIECE):
            written.append(to_json(string[at : at + TEXT_PIECE])[1:-1])
            await asyncio.sleep(0)
        written.append(behind)

    return "".join(written)


async def sse_event(message: Message | None) -> str:
    """As Server-Sent Events have it; None: a comment, which keeps the connection."""
    if message is None:
        return ":\n\n"
    return f"event: message\ndata: {await to_json_in_turns(message)}\n\n"


def unforeseen(status: int, text: str) -> ProxyError:
    """An error for what Tornado has refused, or for a fault of the proxy."""
    if status == 400:
        return NotAMessage(text)
    return Refused(text) if status < 500 else ProxyError(text)


class Endpoint(tornado.web.RequestHandler):
    """A path: the gate, the body, errors as JSON.  Children add methods."""

    # So that the gate comes before the body, and 413 is ours.
    _stream_request_body = True
    # Whether it needs no token.
    open_to_all = False
    # Whether the address may have the token, for clients that cannot set headers.
    token_in_query = False
    # Whether its errors are those of JSON-RPC.
    of_mcp = False
    # Whether its path may end with a slash.
    slash_too = False
    # By method, in lower case.
    operations: ClassVar[Operations] = {}
    # Whether a link of another site may lead here.
    may_be_linked = False
    # The work that a caller waits for.
    task: asyncio.Task[Any] | None = None

    def initialize(self, state: AppState) -> None:
        self.state = state
        self.gate: Gate = self.settings["gate"]
        # The credential that the caller showed.
        self.credential = ""
        # Of an MCP server, from the path.
        self.name = ""
        # Set once the gate lets the request in; a refused one has no body, and its connection ends.
        self.admitted = False
        self.body = bytearray()
        self.received = 0
        # The connection below HTTP.
        self.stream: Any = getattr(self.request.connection, "stream", None)

    def set_default_headers(self) -> None:
        self.set_header("Server", f"pocketcoder-proxy/{VERSION}")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        # Tornado calls this before `initialize`.
        gate: Gate = self.settings["gate"]
        for name, value in gate.cors(self.request.headers).items():
            self.set_header(name, value)

    @property
    def address(self) -> str:
        """Of the caller's machine; of a caller at a unix socket `unix`."""
        if isinstance(self.stream, LocalStream):
            return "unix"
        return self.request.remote_ip or ""

    def prepare(self) -> None:
        self.check()
        self.admitted = True

    def check(self) -> None:
        """Refuse what is not for this path, before the body is read.  Raises ProxyError."""
        headers = self.request.headers
        method = self.request.method
        is_preflight = method == "OPTIONS" and "Origin" in headers
        needs_token = not (self.open_to_all or is_preflight)
        query_token = self.get_query_argument("token", "") if self.token_in_query else None
        self.credential = self.gate.admit(headers, needs_token, query_token, self.may_be_linked)

        # Tornado refuses what is no number.
        length = headers.get("Content-Length", "")
        if length.isdecimal() and (len(length) > 20 or int(length) > MAX_UNREAD_BODY):
            raise TooLarge(f"body: expected at most {MAX_BODY} bytes")

        # A preflight has no token, and learns nothing.
        self.name = (self.path_kwargs or {}).get("name", "")
        # Paths without a name belong to the built-in server, which is called "".
        if self.name not in self.state.servers and not is_preflight:
            raise NoSuchPath(f"no server {in_quotes(self.name)}: see GET /servers")
        if method not in self._allowed() or (method == "OPTIONS" and not is_preflight):
            expected = " or ".join(self.methods())
            raise MethodNotAllowed(f"method: got {method}, expected {expected}")

        kind = media_type(headers.get("Content-Type", ""))
        if method == "POST" and kind != "application/json":
            raise UnsupportedMedia(
                f"`Content-Type`: got {in_quotes(kind)}, expected application/json"
            )

    def accepts(self, kind: str, in_general: bool) -> bool:
        """Whether the caller takes this media type, see `accepts`."""
        return accepts(self.request.headers.get("Accept", ""), kind, in_general)

    def data_received(self, chunk: bytes) -> None:
        self.received += len(chunk)
        # No other method has a use for it.
        if self.received <= MAX_BODY and self.request.method == "POST":
            self.body += chunk
        elif self.received > MAX_UNREAD_BODY:
            self.stream.close()

    def whole_body(self) -> bytes:
        """Raises TooLarge."""
        if self.received > MAX_BODY:
            raise TooLarge(f"body: got {self.received} bytes, expected at most {MAX_BODY}")
        return bytes(self.body)

    def given(self) -> Message:
        """The values of the query, else their defaults.  Raises BadMessage."""
        found: Message = {}
        for name, each in self.operations[(self.request.method or "").lower()].query.items():
            text = self.get_query_argument(name, None, strip=False)
            found[name] = each.default if text is None else each.read(text)

        return found

    def query(self) -> McpQuery:
        given = self.given()
        return McpQuery(given["session_id"] or given["sessionId"])

    @classmethod
    def methods(cls) -> list[str]:
        """Those that it serves, and not only for CORS."""
        missing = tornado.web.RequestHandler._unimplemented_method
        names = [name for name in cls.SUPPORTED_METHODS if name != "OPTIONS"]
        return [name for name in names if getattr(cls, name.lower()) is not missing]

    def options(self, **path: str) -> None:
        self.set_header("Access-Control-Allow-Methods", ", ".join(self._allowed()))
        self.set_status(204)

    def _allowed(self) -> list[str]:
        missing = tornado.web.RequestHandler._unimplemented_method
        names = self.SUPPORTED_METHODS
        return [name for name in names if getattr(type(self), name.lower()) is not missing]

    async def perform(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`; cancel it when the caller leaves."""
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.settings["server"].request_begins(self.request.server_connection)
        self.state.calls.add(task)

        try:
            await work
        except asyncio.CancelledError:
            # None: the caller has left, see `on_connection_close`.
            if self.task is not None:
                raise
        except tornado.iostream.StreamClosedError:
            # The caller has left in the middle of our writing.
            pass
        finally:
            self.task = None
            self.state.calls.discard(task)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do it apart from this request, while the server runs."""
        task = asyncio.ensure_future(work)
        self.state.calls.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self.state.calls.discard(task)
        failure = None if task.cancelled() else task.exception()
        if failure:
            log.error("failed path=%s", self.request.path, exc_info=failure)

    def on_connection_close(self) -> None:
        # Ends the wait for a body.
        super().on_connection_close()
        # The handler may stay until the next collection.
        self.body = bytearray()
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def finish_json(self, answer: Message, status: int = 200) -> None:
        self.finish_text(to_json(answer), status)

    def finish_text(self, json_text: str, status: int) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(json_text)

    async def finish_in_turns(self, json_text: str, status: int) -> None:
        """The same; while a long text leaves, other callers are served."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        for at in range(0, len(json_text) - MAX_WRITTEN, MAX_WRITTEN):
            self.write(json_text[at : at + MAX_WRITTEN])
            await self.flush()

        rest = len(json_text) % MAX_WRITTEN or MAX_WRITTEN
        self.finish(json_text[-rest:])

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        if isinstance(error, ProxyError):
            status_code = error.http_status
        else:
            text = getattr(error, "log_message", None) or f"{status_code} {self._reason}"
            error = unforeseen(status_code, text.replace("%%", "%"))

        if status_code < 500 or isinstance(error, (NoTerminal, NoAudit)):
            self.note_refusal(error, status_code)

        if not self.admitted:
            self.set_header("Connection", "close")

        if status_code == 401:
            self.set_header("WWW-Authenticate", "Bearer")

        if status_code == 405:
            self.set_header("Allow", ", ".join(self._allowed()))

        if self.of_mcp:
            # Its clients show nothing else.
            self.finish_json(refusal(error.request_id, error), status_code)
        else:
            answer = {"error": str(error), "exit_code": error.exit_code}
            self.finish_json(answer, status_code)

    def note_refusal(self, error: ProxyError, status: int) -> None:
        """Log and count that this request, or what it asked for in its channel, was refused."""
        self.state.metrics.request_refused(error)
        self.state.refusals.add(
            status=status,
            method=self.request.method,
            path=self.request.path,
            address=self.address,
            reason=reason_of(error),
        )

    def log_exception(self, *exc_info: Any) -> None:
        if not isinstance(exc_info[1], (ProxyError, tornado.web.HTTPError)):
            log.error("request failed path=%s", self.request.path, exc_info=exc_info)


class EventsEndpoint(Endpoint):
    """An answer that may be a stream of events."""

    # Seconds that a reader may take for what is in TCP's buffers.
    patience = SLOW_READER_TIMEOUT

    def initialize(self, state: AppState) -> None:
        super().initialize(state)
        # Tornado knows one flush at a time.
        self.sending = asyncio.Lock()

    async def send_event(self, text: str) -> None:
        """Write to the stream, which starts with the first event.  Raises StreamClosedError."""
        if not self._headers_written:
            self._start_stream()
        async with self.sending:
            # It has left while we waited for our turn.
            if self._finished:
                raise tornado.iostream.StreamClosedError
            self.write(text)
            await self.flush()

    async def kept_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """Await what sends events; on a silent stream a comment goes out now and then."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=KEEP_ALIVE))[0]:
                if self._headers_written and not self.sending.locked():
                    await self.send_event(": keep-alive\n\n")

            return await task
        finally:
            task.cancel()

    def _start_stream(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-cache, no-store, no-transform")
        self.set_header("X-Accel-Buffering", "no")
        if self.stream.closed():
            raise tornado.iostream.StreamClosedError
        self.stream.set_nodelay(True)
        # A reader that has died without a word is noticed.
        set_patience(self.stream, self.patience)


class LocalStream(tornado.iostream.IOStream):
    """A connection at a unix socket.

    It ends if its reader takes nothing for a while, as `set_user_timeout` has it for TCP.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        # Seconds; 0: as long as it takes.
        self.patience = SLOW_READER_TIMEOUT
        # When its reader took something, and when to look again.
        self.taken_at = time.monotonic()
        self.timer: asyncio.TimerHandle | None = None

    def be_patient(self, seconds: float) -> None:
        self.patience = seconds

    def write(self, data: bytes | memoryview) -> asyncio.Future[None]:
        written = super().write(data)
        if self.patience and self.timer is None and self.writing():
            self.taken_at = time.monotonic()
            self._look_later(self.patience)

        return written

    def write_to_fd(self, data: memoryview) -> int:
        taken = super().write_to_fd(data)
        if taken:
            self.taken_at = time.monotonic()
        return taken

    def _look_later(self, seconds: float) -> None:
        self.timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self.timer = None
        if self.closed() or not self.writing() or not self.patience:
            return

        left = self.taken_at + self.patience - time.monotonic()
        if left > 0:
            self._look_later(left)
        else:
            self.close()


def set_patience(stream: tornado.iostream.IOStream, seconds: float) -> None:
    """Give up a reader that takes nothing so long; 0: as long as it takes."""
    if isinstance(stream, LocalStream):
        stream.be_patient(seconds)
    else:
        set_user_timeout(stream.socket, seconds)


def set_user_timeout(sock: socket.socket, seconds: float) -> None:
    """Give up a peer that acknowledges nothing so long, tcp(7); 0: as long as TCP does."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))


class HttpServer(tornado.httpserver.HTTPServer):
    """Closes connections that have waited longest without a request, before there are too many."""

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **kwargs)
        # Connections without a request at work, the oldest first.
        self.waiting: dict[Any, None] = {}

    def listen_on(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self.accept, listener)

    def accept(self, listener: socket.socket) -> None:
        """Take new connections.

        Tornado's own, when there are no descriptors left, tries for ever and logs each time.
        """
        # The other descriptors are for runs.
        most = min(MAX_WAITING, os.sysconf("SC_OPEN_MAX") // 2)
        try:
            # They are counted in the next turn of the loop.
            for _ in range(ACCEPTED_AT_ONCE):
                connection, address = listener.accept()
                is_local = connection.family == socket.AF_UNIX
                kind = LocalStream if is_local else tornado.iostream.IOStream
                self.handle_stream(kind(connection), address)
                if len(self.waiting) >= most:
                    oldest = next(iter(self.waiting))
                    del self.waiting[oldest]
                    oldest.stream.close()
        except (BlockingIOError, ConnectionAbortedError):
            pass
        except OSError as full:
            log.error("accept failed: %s", full)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(ACCEPT_PAUSE, self.listen_on, listener)

    def start_request(self, server_conn: Any, request_conn: Any) -> Any:
        """Called when a connection may bring its first request, or its next."""
        self.waiting.pop(server_conn, None)
        self.waiting[server_conn] = None
        return super().start_request(server_conn, request_conn)

    def request_begins(self, server_conn: Any) -> None:
        """This connection has a request at work."""
        self.waiting.pop(server_conn, None)

    def on_close(self, server_conn: Any) -> None:
        self.waiting.pop(server_conn, None)
        super().on_close(server_conn)


class HealthEndpoint(Endpoint):
    operations: ClassVar[Operations] = {"get": HEALTH, "head": HEALTH}
    open_to_all = True

    async def get(self) -> None:
        self.set_header("Content-Type", "text/plain")
        self.finish(await health_handler())

    head = get


class ReadyEndpoint(Endpoint):
    operations: ClassVar[Operations] = {"get": READINESS, "head": READINESS}
    open_to_all = True

    async def get(self) -> None:
        await self.perform(self.answer())

    async def answer(self) -> None:
        found = await ready_handler(self.state)
        self.finish_json(found, 200 if found["ready"] else NoTerminal.http_status)

    head = get


class MetricsEndpoint(Endpoint):
    operations: ClassVar[Operations] = {"get": METRICS}

    async def get(self) -> None:
        await self.perform(self.answer())

    async def answer(self) -> None:
        text = await metrics_handler(self.state)
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.finish(text)


class ExecEndpoint(EventsEndpoint):
    operations: ClassVar[Operations] = {"post": EXEC}
    # A slow reader slows the command.
    patience = AS_LONG_AS_TCP

    async def post(self) -> None:
        request = ExecRequest.from_wire(self.whole_body(), self.state.workspace)
        if self.accepts("text/event-stream", in_general=False):
            await self.perform(self.answer_stream(request))
        else:
            await self.perform(self.answer(request))

    async def answer(self, request: ExecRequest) -> None:
        async with answering(self.state, request) as run:
            if run.result is None:
                self.set_status(202)
            self.set_header("Content-Type", "application/json")
            if min(run.printed(), request.max_output) <= MAX_WRITTEN:
                self.finish(run.answer("".join(run.text())).to_wire())
            else:
                await self.finish_in_pieces(run)

    async def finish_in_pieces(self, run: Run) -> None:
        """Write a large answer, so that other callers are answered meanwhile."""
        rest = run.answer(None).to_wire()
        self.write('{"stdout":"')
        for text in run.text():
            self.write(json.dumps(text, ensure_ascii=False)[1:-1])
            await self.flush()
            await asyncio.sleep(0)
        self.finish(f'",{rest[1:]}')

    async def answer_stream(self, request: ExecRequest) -> None:
        handler = stream_handler if request.wait is None else launched_stream_handler
        try:
            response = await self.kept_alive(handler(self.state, request, self.send_event))
        except ProxyError as failure:
            if not self._headers_written:
                raise

            response = ExecResponse(error=str(failure), exit_code=failure.exit_code)
        except asyncio.TimeoutError:
            log.warning("stream ended: its reader did not read for %g s", SLOW_READER_TIMEOUT)
            self.stream.close()
            return

        event = "running" if response.running else "exit"
        await self.send_event(f"event: {event}\ndata: {response.to_wire()}\n\n")


class RunsEndpoint(Endpoint):
    """`GET /runs`: the newest runs."""

    operations: ClassVar[Operations] = {"get": LIST_RUNS}
    slash_too = True

    async def get(self) -> None:
        runs = self.state.driver.runs.newest(RunQuery(**self.given()))
        self.finish_json({"runs": [run.facts() for run in runs]})


class RunEndpoint(Endpoint):
    """`/runs/ID`: one run."""

    operations: ClassVar[Operations] = {"get": GET_RUN, "delete": DELETE_RUN}
    slash_too = True

    def run(self) -> Run:
        """Raises NoSuchRun."""
        return self.state.driver.runs.find(self.path_kwargs["run_id"])

    async def get(self, run_id: str) -> None:
        await self.perform(self.answer(self.run(), self.given()["wait"]))

    async def answer(self, run: Run, wait: float) -> None:
        await is_set_within(run.needs_no_wait, wait)
        if run.result is not None:
            await check_audited(self.state, run)
        self.finish_json(run.facts())

    async def delete(self, run_id: str) -> None:
        run = self.run()
        if run.result is not None:
            self.state.driver.runs.forget(run)
            self.set_status(204)
        else:
            self.state.driver.end_run(run, "DELETE /runs")
            await self.perform(self.answer(run, END_PATIENCE))


class RunSignalEndpoint(Endpoint):
    """`POST /runs/ID/signal`: a signal to the process group of its command."""

    operations: ClassVar[Operations] = {"post": SIGNAL_RUN}

    async def post(self, run_id: str) -> None:
        run = self.state.driver.runs.find(run_id)
        got = checked(read_object(self.whole_body()), SIGNAL_FIELDS, ["signal"])
        self.state.driver.signal_run(run, SIGNAL_NUMBERS[got["signal"]])
        self.finish_json(run.facts())


class RunOutputEndpoint(EventsEndpoint):
    """`GET /runs/ID/output`: what it has printed, or a stream of what it prints."""

    operations: ClassVar[Operations] = {"get": RUN_OUTPUT}
    slash_too = True

    async def get(self, run_id: str) -> None:
        run = self.state.driver.runs.find(run_id)
        if self.accepts("text/event-stream", in_general=False):
            await self.perform(self.follow(run, self.followed_from(run)))
            return

        given = self.given()
        offset = check_offset("offset", given["offset"], run.record.total)
        limit = NO_LIMIT if given["limit"] is None else given["limit"]
        await self.perform(self.answer(run, offset, limit))

    def followed_from(self, run: Run) -> int:
        """Where a stream starts: behind what the caller has.  Raises BadMessage."""
        name = "Last-Event-ID"
        last = self.request.headers.get(name)
        if last is None:
            return check_offset("offset", self.given()["offset"], run.record.total)
        return check_offset(name, RUN_OUTPUT.headers[name].read(last), run.record.total)

    async def answer(self, run: Run, offset: int, limit: int) -> None:
        """Send one stretch of bytes: up to a gap, or to the end by now."""
        record = run.record
        end = record.total
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Output-Bytes", str(end))
        self.set_header("Output-Ended", "true" if record.is_complete else "false")
        start, _ = record.read(offset, 1)
        self.set_header("Output-Offset", str(start))
        end = min(end, start + limit)
        at = start
        while at < end:
            found, chunk = record.read(at, min(end - at, TEXT_PIECE))
            if found != at or not chunk:
                break
            at += len(chunk)
            self.write(chunk)
            await self.flush()
        self.finish()

    async def follow(self, run: Run, offset: int) -> None:
        await self.send_event(": following\n\n")
        await self.kept_alive(follow_handler(run, offset, self.send_event))


class SocketEndpoint(tornado.websocket.WebSocketHandler, Endpoint):
    """A WebSocket, behind the same gate."""

    subprotocol = ""

    def check_origin(self, origin: str) -> bool:
        """The gate has checked it."""
        return True

    def on_connection_close(self) -> None:
        super().on_connection_close()
        # Tornado's own leaves that out: a request that waits for its body would wait on.
        Endpoint.on_connection_close(self)

    def select_subprotocol(self, offered: list[str]) -> str | None:
        return self.subprotocol if self.subprotocol in offered else None

    async def get(self, **path: str) -> None:
        # For these Tornado's own refusal is no JSON.
        names = ("Upgrade", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version")
        values = [self.request.headers.get(name, "").lower() for name in names]
        upgrade, connection, key, version = values
        is_upgrade = upgrade == "websocket" and "upgrade" in connection
        if not is_upgrade or not key or version != "13":
            raise NotAMessage(f"expected a WebSocket of version 13, with {', '.join(names)}")
        await super().get(**path)


class ChannelEndpoint(SocketEndpoint):
    """`GET /exec/ws`: a command with stdin, stdout, stderr and signals apart."""

    operations: ClassVar[Operations] = {"get": CHANNEL}
    subprotocol = CHANNELS
    work: asyncio.Task[None] | None = None

    def open(self) -> None:
        # None: it never started.
        self.job: asyncio.Future[Job | None] = asyncio.get_running_loop().create_future()
        self.set_nodelay(True)
        # It may have left already.
        if not self.stream.closed():
            self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # The reader may be a pager, where a person rests.
            set_patience(self.stream, 0)
        self.too_slow = asyncio.get_running_loop().call_later(BODY_TIMEOUT, self.close)

    async def on_message(self, message: str | bytes) -> None:
        """The first is the request.

        Tornado reads on after this has returned: so a full pipe slows its caller.
        """
        if self.work is None:
            self.too_slow.cancel()
            self.work = self.start(self.answer(message))
            return

        job = await self.unless_gone(self.job)
        if job is None:
            return

        try:
            await self.unless_gone(asyncio.ensure_future(channel_input(job, message)))
        except BadMessage as wrong:
            await self.end(json.dumps({"error": str(wrong), "exit_code": wrong.exit_code}))

    async def answer(self, message: str | bytes) -> None:
        async def started(job: Job) -> None:
            self.job.set_result(job)

        try:
            await self.end(await channel_handler(self.state, message, self.send, started))
        except ProxyError as failure:
            # One that failed later has a line of its own, at the command's end.
            if not self.job.done():
                self.note_refusal(failure, failure.http_status)

            await self.end(json.dumps({"error": str(failure), "exit_code": failure.exit_code}))
        finally:
            # Whatever went wrong, the caller does not wait for us.
            self.close()
            if not self.job.done():
                self.job.set_result(None)

    async def end(self, final: str) -> None:
        """Send the final object, and close."""
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
        """Wait for it; None: the caller has left.

        Nothing reads the socket meanwhile, so look at it now and then.
        """
        while not (await asyncio.wait({work}, timeout=GONE_CHECK))[0]:
            if self.stream.closed() or has_left(self.stream.socket):
                self.stream.close()
                return None

        return work.result()

    def on_close(self) -> None:
        if self.work is not None:
            self.work.cancel()


def has_left(sock: socket.socket) -> bool:
    """Whether the peer has closed its side."""
    look = select.poll()
    look.register(sock, select.POLLRDHUP)
    return bool(look.poll(0))


class McpEndpoint(EventsEndpoint):
    """`/mcp`: Streamable HTTP.  A modern request stands for itself, a legacy one has a session."""

    operations: ClassVar[Operations] = {
        "post": MCP_POST,
        "get": MCP_STREAM,
        "delete": MCP_END,
    }
    of_mcp = True
    slash_too = True

    def check(self) -> None:
        super().check()
        needs_session = self.request.method in ("GET", "DELETE")
        if needs_session and "Mcp-Session-Id" not in self.request.headers:
            raise MethodNotAllowed("405 Method Not Allowed")

    async def post(self, name: str = "") -> None:
        for kind in ("application/json", "text/event-stream"):
            if not self.accepts(kind, in_general=True):
                raise NotAcceptable("`Accept`: expected application/json and text/event-stream")
        await self.perform(self.answer(self.whole_body()))

    async def answer(self, body: bytes) -> None:
        message: Message = {}
        try:
            message = read_message(body)
            version = self.request.headers.get("MCP-Protocol-Version")
            check_era(message, version)
            era = era_of(message, version)
            is_modern = era is Era.MODERN
            if is_modern and not is_request(message):
                # There is nothing to do: to cancel, a modern client closes its request's stream.
                self.set_status(202)
                return

            session = self.session_for(message, is_modern)
            outbox = Outbox(session.overflow)
            session.receive(message, era, outbox)
        except ProxyError as wrong:
            if wrong.http_status >= 400:
                self.note_refusal(wrong, wrong.http_status)

            answer = refusal(message.get("id", wrong.request_id), wrong)
            self.finish_json(answer, wrong.http_status)
            return

        if not is_request(message):
            self.set_status(202)
            return

        try:
            await self.deliver(outbox, is_modern)
        finally:
            outbox.leave()

            # A modern request ends with its connection; a legacy call goes on in its session.  But
            # without a version a session is of no use: `initialize` failed, or its client has left.
            handshake_failed = message["method"] == "initialize" and session.version is None
            if is_modern or handshake_failed:
                session.end()

    def session_for(self, message: Message, is_modern: bool) -> Session:
        """Return the session of this message; a modern request and `initialize` get a new one.

        Raises ProxyError.
        """
        if is_modern:
            check_envelope(message, self.request.headers.get_list)
            session = self.new_session("once", Lifetime.ONCE)
            session.came_with(self.request.headers.get_list)
            return session

        if message.get("method") == "initialize" and is_request(message):
            session = self.new_session("http", Lifetime.HTTP)
            self.state.sessions.open(session)
            session.end_or_look_later()
            self.set_header("Mcp-Session-Id", session.session_id)
            return session

        return self.session()

    def new_session(self, transport: str, lifetime: Lifetime) -> Session:
        return Session(
            self.state,
            self.state.servers[self.name],
            transport,
            lifetime,
            credential=self.credential,
            address=self.address,
        )

    async def deliver(self, outbox: Outbox, is_modern: bool) -> None:
        """Send the answer as JSON; as a stream, if anything comes before it."""
        async with contextlib.aclosing(outbox.messages()) as messages:
            async for message in messages:
                if message is not None and self.is_whole_response(message):
                    await self.send_as_json(message, is_modern)
                    return

                await self.send_event(await sse_event(message))

        if not self._headers_written:
            # The client cancelled: there is no answer to send, so end an empty stream.
            self.set_header("Content-Type", "text/event-stream")

    def is_whole_response(self, message: Message) -> bool:
        """Whether this is the answer, and nothing was sent before it."""
        return "method" not in message and not self._headers_written

    async def send_as_json(self, answer: Message, is_modern: bool) -> None:
        if "error" in answer:
            # After a failed `initialize` there is no session to name.
            self.clear_header("Mcp-Session-Id")

        status = status_of(answer) if is_modern else 200
        await self.finish_in_turns(await to_json_in_turns(answer), status)

    def session(self) -> Session:
        """Return the open session that the request names.  Raises NotAMessage, UnknownSession."""
        session_id = self.request.headers.get("Mcp-Session-Id")
        if not session_id:
            raise NotAMessage(
                "`Mcp-Session-Id`: got none, expected the one that `initialize` was answered with"
            )
        return self.state.sessions.find(self.name, "http", session_id, self.credential)

    async def get(self, name: str = "") -> None:
        await self.perform(self.listen(self.session()))

    async def listen(self, session: Session) -> None:
        async with session.stream() as messages:
            await self.send_event(await sse_event(None))
            async for message in messages:
                await self.send_event(await sse_event(message))

    async def delete(self, name: str = "") -> None:
        self.session().end()
        self.set_status(204)


class SseEndpoint(EventsEndpoint):
    """`GET /sse`: what the server says; the client posts to `/messages`."""

    operations: ClassVar[Operations] = {"get": MCP_SSE}
    of_mcp = True
    slash_too = True
    token_in_query = True

    async def get(self, name: str = "") -> None:
        suffix = ""
        # A client that cannot set headers on the stream cannot set them on its POSTs.
        if self.credential and "Authorization" not in self.request.headers:
            suffix = f"&token={quote_plus(self.credential)}"
        events = sse_handler(self.state, self.query(), self.credential, suffix, name, self.address)
        async with contextlib.aclosing(events):
            await self.perform(self.pass_on(events))

    async def pass_on(self, events: AsyncIterator[str]) -> None:
        async for text in events:
            await self.send_event(text)


class MessagesEndpoint(Endpoint):
    operations: ClassVar[Operations] = {"post": MCP_MESSAGES}
    of_mcp = True
    slash_too = True
    token_in_query = True

    async def post(self, name: str = "") -> None:
        body = self.whole_body()
        session = self.state.sessions.find(name, "sse", self.query().session_id, self.credential)
        message = read_message(body)
        self.set_status(202)
        self.finish("Accepted")
        session.receive_by_stream(message)


class McpSocket(SocketEndpoint):
    """`GET /mcp/ws`: a session that lasts as long as the socket."""

    operations: ClassVar[Operations] = {"get": MCP_SOCKET}
    of_mcp = True
    slash_too = True
    token_in_query = True
    subprotocol = "mcp"
    ping_interval = KEEP_ALIVE
    ping_timeout = KEEP_ALIVE
    session: Session | None = None

    def open(self, name: str = "") -> None:
        try:
            server = self.state.servers[name]
            session = Session(
                self.state,
                server,
                "ws",
                Lifetime.STREAM,
                credential=self.credential,
                address=self.address,
            )
            self.session = self.state.sessions.open(session)
        except NoTerminal as full:
            self.note_refusal(full, full.http_status)
            self.close(1013, str(full)[:100])
        else:
            self.start(self.listen(self.session))

    async def listen(self, session: Session) -> None:
        async with session.stream() as messages:
            with contextlib.suppress(tornado.websocket.WebSocketClosedError):
                async for message in messages:
                    if message is not None:
                        await self.write_message(await to_json_in_turns(message))
        self.close()

    async def on_message(self, message: str | bytes) -> None:
        if self.session is None:
            return
        try:
            self.session.receive_by_stream(read_message(message))
        except ProxyError as wrong:
            # Two must not answer errors with errors.
            if not wrong.in_response:
                self.session.outbox.send(refusal(wrong.request_id, wrong))
        # Tornado reads on without a pause.
        await self.session.outbox.room(SLOW_READER_TIMEOUT)

    def on_close(self) -> None:
        if self.session is not None:
            self.session.end()


class ServersEndpoint(Endpoint):
    operations: ClassVar[Operations] = {"get": LIST_SERVERS}
    slash_too = True

    async def get(self) -> None:
        relays = [server for server in self.state.servers.values() if isinstance(server, Relay)]
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps([relay.shown() for relay in relays]))


class OpenapiEndpoint(Endpoint):
    operations: ClassVar[Operations] = {"get": OPENAPI}

    async def get(self) -> None:
        self.finish_json(openapi(described_routes(), self.gate.token != ""))


class TerminalsEndpoint(Endpoint):
    operations: ClassVar[Operations] = {"get": LIST_TERMINALS}
    slash_too = True

    async def get(self) -> None:
        self.finish_json({"terminals": await self.state.driver.list_terminals()})


class ScreensEndpoint(EventsEndpoint):
    """What terminals show, as it changes; `agents` is a name, or several with commas between."""

    operations: ClassVar[Operations] = {"get": WATCH_TERMINALS}

    async def get(self, agents: str) -> None:
        # A name twice is one.
        names = [*dict.fromkeys(PATH_FIELDS["agents"].check(agents).split(","))]
        await self.perform(screens_handler(self.state, names, self.send_event))


class KeysEndpoint(Endpoint):
    operations: ClassVar[Operations] = {"post": TYPE_KEYS}

    async def post(self, agent: str) -> None:
        name = PATH_FIELDS["agent"].check(agent)
        await self.perform(self.answer(name, self.whole_body()))

    async def answer(self, agent_name: str, body: bytes) -> None:
        self.finish_json(await keys_handler(self.state, agent_name, body))


class PageEndpoint(Endpoint):
    """The page, which holds no data."""

    operations: ClassVar[Operations] = {"get": SHOW_PAGE, "head": SHOW_PAGE}
    open_to_all = True
    may_be_linked = True

    async def get(self) -> None:
        nonce = secrets.token_urlsafe(16)
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Content-Security-Policy", PAGE_POLICY.format(nonce=nonce))
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cross-Origin-Opener-Policy", "same-origin")
        self.set_header("Cross-Origin-Resource-Policy", "same-origin")
        self.finish(PAGE.replace(NONCE, nonce))

    head = get


class UnknownEndpoint(Endpoint):
    """Every other path."""

    def _allowed(self) -> list[str]:
        return list(self.SUPPORTED_METHODS)

    def check(self) -> None:
        super().check()
        raise NoSuchPath(f"no such path: {self.request.path[:80]}")


# The built-in MCP server, and those behind the relay.
SERVERS = ("", r"/servers/(?P<name>[^/]+)")
ROUTES: list[tuple[str, type[Endpoint]]] = [
    (r"/health", HealthEndpoint),
    (r"/ready", ReadyEndpoint),
    (r"/metrics", MetricsEndpoint),
    (r"/openapi.json", OpenapiEndpoint),
    (r"/exec", ExecEndpoint),
    (r"/exec/ws", ChannelEndpoint),
    (r"/runs", RunsEndpoint),
    (r"/runs/(?P<run_id>[^/]+)", RunEndpoint),
    (r"/runs/(?P<run_id>[^/]+)/signal", RunSignalEndpoint),
    (r"/runs/(?P<run_id>[^/]+)/output", RunOutputEndpoint),
    (r"/servers", ServersEndpoint),
    (r"/", PageEndpoint),
    (r"/terminals", TerminalsEndpoint),
    (r"/terminals/(?P<agents>[^/]+)", ScreensEndpoint),
    (r"/terminals/(?P<agent>[^/]+)/keys", KeysEndpoint),
    *((f"{server}/mcp", McpEndpoint) for server in SERVERS),
    *((f"{server}/mcp/ws", McpSocket) for server in SERVERS),
    *((f"{server}/sse", SseEndpoint) for server in SERVERS),
    *((f"{server}/messages", MessagesEndpoint) for server in SERVERS),
]


def described_routes() -> list[Described]:
    """All methods of ROUTES."""
    return [
        Described(
            path=path_template(pattern),
            method=method.lower(),
            operation=endpoint.operations[method.lower()],
            is_open=endpoint.open_to_all,
            token_in_query=endpoint.token_in_query,
            of_mcp=endpoint.of_mcp,
        )
        for pattern, endpoint in ROUTES
        for method in endpoint.methods()
        if method.lower() in endpoint.operations
    ]


# ==========================================================================
# Install
# ==========================================================================
# What `install` writes, and the line by which it knows its own files.
INSTALLED = "pocketcoder-shell"
INSTALLED_MARK = "# Written by `pocketcoder_proxy.py install`, which may replace it.\n"
FIRST_LINE = 127  # bytes of a first line that every Linux reads
# To compile the text takes half of the time in which the shell starts.
INSTALLED_FORM = f"""{{first}}
# SPDX-License-Identifier: MIT
{INSTALLED_MARK}\
# The shell of pocketcoder-proxy: its text, and below it the same as one Python compiles it.
import marshal
import sys

if sys.version_info < (3, 8):
    needs = "pocketcoder: the shell needs Python 3.8 or later, this is %d.%d\\n"
    sys.stderr.write(needs % sys.version_info[:2])
    sys.exit(125)
TEXT = r'''
{{text}}'''
CODE = {{code!r}}
exec(marshal.loads(CODE) if sys.version == {{python!r}} else TEXT)
sys.exit("pocketcoder: only the shell is here: `{INSTALLED} -c CMD`, `pocketcoder shell`")
"""


def installed_text() -> str:
    """The shell alone: this file down to the line, for this interpreter.

    Raises ProxyError, OSError.
    """
    # It needs neither `site` nor what PYTHON… variables say.
    first = f"#!{sys.executable} -IS"
    if not sys.executable or len(os.fsencode(first)) >= FIRST_LINE:
        raise ProxyError(f"a first line cannot hold this interpreter: {first}")
    if " " in sys.executable:
        raise ProxyError(f"a first line cannot hold a path with a blank: {sys.executable}")

    with open(__file__, encoding="utf-8") as file:
        head = file.read().partition("\n# ------------------------------- the line")[0]

    # The settings of the script above that are for a server stay behind.
    text = head[head.index('r"""') :].rstrip() + "\n"
    # Without docstrings, which cost time at each start.
    code = marshal.dumps(compile(text, INSTALLED, "exec", dont_inherit=True, optimize=2))
    return INSTALLED_FORM.format(first=first, text=text, code=code, python=sys.version)


def check_directory(option: str, path: str) -> None:
    """Raise BadMessage unless the option names a directory."""
    if not path:
        raise wrong_option(option, path, "a directory")

    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise BadMessage(f"{option}: no such directory: {path}") from None
    except OSError as wrong:
        raise BadMessage(f"{option}: {path}: {wrong.strerror}") from None

    if not stat.S_ISDIR(found.st_mode):
        raise BadMessage(f"{option}: {path} is not a directory")


def is_installed(path: str) -> bool:
    """Whether a file is one that `install` wrote, or a link to one."""
    try:
        with open(path, "rb") as file:
            return INSTALLED_MARK.encode() in file.read(KIB)
    except OSError:  # a directory, a link to nowhere, or not ours to read
        return False


def install(folder: str, names: list[str]) -> str:
    """Write the shell into `folder`, with links of these names to it; what was done, in a sentence.

    All names are checked before anything is written.  Raises ProxyError, OSError.
    """
    links = [name for name in names if name != INSTALLED]
    for name in links:
        is_ours = name in (*SHELL_NAMES, "pocketcoder") or name.endswith("-shell")
        if not is_ours or "/" in name:
            expected = f"one of {', '.join(SHELL_NAMES)}, pocketcoder, or …-shell"
            raise wrong_option("NAME", name, expected)

    check_directory("DIR", folder)

    for name in (INSTALLED, *links):
        path = os.path.join(folder, name)
        if os.path.lexists(path) and not is_installed(path):
            raise ProxyError(
                f"{path} is not a file that `install` wrote: remove it, then try again"
            )

    # Each is made under another name and put in its place at once: others may be starting it.
    target = os.path.join(folder, INSTALLED)
    made, new = tempfile.mkstemp(prefix=f".{INSTALLED}-", dir=folder)

    try:
        with open(made, "w", encoding="utf-8") as file:
            file.write(installed_text())
            os.fchmod(made, 0o755)

        os.replace(new, target)
        for name in links:
            os.symlink(INSTALLED, new)
            os.replace(new, os.path.join(folder, name))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)

        raise

    beside = f", and beside it {', '.join(links)}" if links else ""
    return f"wrote {target}{beside}"


# ==========================================================================
# Attach
# ==========================================================================
# A person's own view of an agent's terminal.
#
# I1  The view is a session of its own, which ends when its person leaves.
# I2  It has no say in the size of the agent's terminal.
# I3  It takes no other terminal with it: tmux 3.3a crashes if a session that has
#     `destroy-unattached` ends while a client leaves, or if a client leaves just as one in control
#     mode arrives.

# Runs the view, which is $3 and the words after it, then ends its session $2 at the socket $1.  It
# does so even if somebody has killed us.
VIEW_SCRIPT = """
trap '' HUP INT TERM
socket=$1 name=$2
shift 2
"$@"
status=$?
tmux -S "$socket" kill-session -t "=$name" 2>/dev/null
exit $status
"""


def check_attachable(driver: PocketCoderDriver) -> None:
    """That a person is here, and not in the very tmux that they ask for.  Raises ProxyError."""
    if not (os.isatty(0) and os.isatty(1)):
        raise ProxyError(
            "attach: stdin and stdout must be a terminal, as with `docker exec -it`; to read one"
            " from a program: GET /terminals"
        )

    around = os.environ.get("TMUX", "").partition(",")[0]
    if around and os.path.realpath(around) == os.path.realpath(driver.socket_path):
        raise ProxyError("attach: you are inside of this tmux already: C-b w lists its windows")


async def attach(driver: PocketCoderDriver, agent_name: str, only_watches: bool) -> int:
    """Show an agent's terminal until the person leaves; the exit status.  Raises ProxyError."""
    check_attachable(driver)
    # When the terminal goes, so does the view, and we have to clean up.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    try:
        await driver.terminal(agent_name).make()
        window_id = (await driver.window(agent_name))[0].window_id
        words = view_command(driver, window_id, only_watches)

        # The driver stays connected meanwhile: tmux heeds a client's wish to have no say in the
        # size only while there is another client.
        view = await asyncio.create_subprocess_exec(*words, env=tmux_environment())
        return await view.wait()
    finally:
        await driver.close()


def view_command(driver: PocketCoderDriver, window_id: str, only_watches: bool) -> list[str]:
    """What shows a person one window in a session of its own."""
    name = f"{driver.session_name}-view-{secrets.token_hex(4)}"
    return [
        *("sh", "-c", VIEW_SCRIPT, "view", driver.socket_path, name),
        *("tmux", "-S", driver.socket_path, "new-session", "-t", f"={driver.session_name}"),
        *("-s", name, "-f", "ignore-size,read-only" if only_watches else "ignore-size"),
        *(";", "select-window", "-t", f"={name}:{window_id}"),
    ]


# ==========================================================================
# MCP configuration
# ==========================================================================
# Which stdio servers are relayed: `--mcp-server`, and files of clients.
#
# Y5  One bad entry is an error when the server starts.
# Y6  No message shows the value of an entry, which may be a secret.

# A string of JSON, or a comment as clients allow it; a string, or a comma that ends a list.
TEXT_OR_COMMENT = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
TEXT_OR_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[\]}])', re.DOTALL)
# `${NAME}`, `${NAME:-default}`, and VS Code's `${env:NAME}`.
VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def read_servers(words: list[str], path: str | None) -> tuple[ServerConfig, ...]:
    """What `--mcp-server` and `--mcp-config` name.  Raises BadMessage, which shows no values."""
    configs: dict[str, ServerConfig] = {}
    if path is not None:
        for name, entry in read_entries(path).items():
            configs[name] = read_entry(name, entry)

    for word in words:
        name, _, line = word.partition("=")
        check_server_name(name)
        try:
            command = shlex.split(line)
        except ValueError as wrong:
            raise wrong_option("--mcp-server", f"{name}=…", f"NAME=COMMAND ({wrong})") from None

        if not command:
            raise wrong_option("--mcp-server", word, "NAME=COMMAND")

        configs[name] = ServerConfig(name=name, words=tuple(command))

    for config in configs.values():
        if not config.left_out:
            check_command(config)

    return tuple(configs.values())


def read_entries(path: str) -> Message:
    """The entries of a file of clients, by name: JSON, maybe with comments.  Raises BadMessage."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = json.loads(plain_json(file.read()))
    except OSError as wrong:
        if not path:
            raise wrong_option("--mcp-config", path, "a file") from None
        raise BadMessage(f"--mcp-config: {path}: {wrong.strerror}") from None
    except (ValueError, RecursionError) as wrong:
        raise BadMessage(f"--mcp-config: {path} is not JSON: {wrong}") from None

    fields = as_object(found)

    # `servers` is what VS Code calls them.
    for key in ("mcpServers", "servers"):
        if isinstance(fields.get(key), dict):
            return as_object(fields[key])

    expected = '{"mcpServers": {NAME: {"command": TEXT}}}'
    raise BadMessage(f"--mcp-config: {path} has no servers, expected {expected}")


def plain_json(text: str) -> str:
    """The same without comments, and without commas that end a list; places stay as they are."""

    def blank(found: re.Match[str]) -> str:
        if found[0][0] == '"':
            return found[0]
        return re.sub(r"[^\n]", " ", found[0])

    return TEXT_OR_COMMA.sub(blank, TEXT_OR_COMMENT.sub(blank, text))


def read_entry(name: str, entry: object) -> ServerConfig:
    """One server of such a file.  Raises BadMessage, which names the entry and the key."""
    check_server_name(name)
    if not isinstance(entry, dict):
        raise bad_entry(name, "", entry, "an object")

    disabled = entry.get("disabled", False)
    if not isinstance(disabled, bool):
        raise bad_entry(name, "disabled", disabled, "true or false")
    if disabled:
        return ServerConfig(name=name, words=(), left_out="it is disabled")

    is_remote = any(key in entry for key in ("url", "httpUrl", "serverUrl"))
    if "command" not in entry and is_remote:
        return ServerConfig(name=name, words=(), left_out="it is a remote server, and has a `url`")

    arguments = entry.get("args")
    if arguments is None:
        arguments = []

    if not isinstance(arguments, list):
        raise bad_entry(name, "args", arguments, "a list of strings")

    env = entry.get("env")
    if env is None:
        env = {}

    if not isinstance(env, dict):
        raise bad_entry(name, "env", env, "an object of strings")

    cwd = entry.get("cwd")

    command = filled_in(name, "command", entry.get("command"))
    if not command:
        raise bad_entry(name, "command", command, "a program")

    return ServerConfig(
        name=name,
        words=(
            command,
            *(filled_in(name, f"args[{at}]", each) for at, each in enumerate(arguments)),
        ),
        env={key: filled_in(name, f"env.{key}", each) for key, each in env.items()},
        cwd=None if cwd is None else filled_in(name, "cwd", cwd),
    )


def filled_in(name: str, key: str, value: object) -> str:
    """A value of an entry as text, with variables of our environment.  Raises BadMessage."""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str):
        raise bad_entry(name, key, value, "a string")
    if "${input:" in value:
        raise bad_entry(name, key, value, "no `${input:…}`: there is nobody to ask")

    def fill(found: re.Match[str]) -> str:
        # As a shell has it: the default also stands for an empty variable.
        filled = os.environ.get(found[1], "") or found[2]
        if filled is None and found[1] not in os.environ:
            expected = f"the variable {found[1]} to be set, or `${{{found[1]}:-default}}`"
            raise bad_entry(name, key, value, expected)
        return filled or ""

    filled = VARIABLE.sub(fill, value)
    if "\0" in filled:
        raise bad_entry(name, key, value, "a string without NUL")

    return filled


def check_server_name(name: str) -> None:
    """Raises BadMessage for a name that no path can have."""
    sound = name.isprintable() and 0 < len(name) <= MAX_NAME and name not in (".", "..")
    if not sound:
        expected = f"1 to {MAX_NAME} characters that can be shown"
        raise wrong_option("the name of an MCP server", name, expected)


def bad_entry(name: str, key: str, got: object, expected: str) -> BadMessage:
    """A fault of an entry.  Its value is not shown: it may be a secret."""
    kinds = {
        type(None): "nothing",
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
    }
    where = f", key `{key}`" if key else ""
    kind = kinds.get(type(got), "a number")
    return BadMessage(f"MCP server `{name}`{where}: got {kind}, expected {expected}")


def check_command(config: ServerConfig) -> None:
    """Raises BadMessage if there is no such program, or directory."""
    if config.cwd is not None and not os.path.isdir(config.cwd):
        raise bad_entry(config.name, "cwd", config.cwd, "a directory that exists")
    program = config.words[0]
    found = os.path.join(config.cwd or "", program)
    if "/" not in program:
        path = config.env.get("PATH", os.environ.get("PATH", os.defpath))
        found = shutil.which(program, path=path) or ""
    if not (os.path.isfile(found) and os.access(found, os.X_OK)):
        raise BadMessage(
            f"MCP server `{config.name}`, key `command`: no such program, or it cannot be run"
        )


# ==========================================================================
# Listening
# ==========================================================================
# Where callers connect: a port, or the file of a unix socket.
#
# V1  A socket at which somebody listens is never replaced; one that a killed server left is.
# V2  The file is never open to others, not for a moment; its own server removes it.
class Listening:
    """Where the server takes connections."""

    def __init__(self, sockets: list[socket.socket], path: str = "") -> None:
        self.sockets = sockets
        # Of a unix socket; otherwise "".
        self.path = path
        self.made = os.lstat(path) if path else None

    @property
    def address(self) -> str:
        """What PROXY_URL takes."""
        if self.path:
            return f"{UNIX}{self.path}"
        host, port = self.sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def close(self) -> None:
        """Take no more connections, and remove the file, if it is still the one that was made."""
        if self.made is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(self.path), self.made):
                    os.unlink(self.path)

        for each in self.sockets:
            each.close()


def listen_at_port(host: str, port: int) -> Listening:
    """Listen there.  Raises ProxyError, with what to do."""
    try:
        sockets = tornado.netutil.bind_sockets(port, host)
        # Connections inherit this limit.
        for each in sockets:
            set_user_timeout(each, SLOW_READER_TIMEOUT)

        return Listening(sockets)
    except UnicodeError:
        why = "no name of a host"
    except OSError as wrong:
        why = str(wrong.strerror)
        if wrong.errno == errno.EADDRINUSE:
            raise port_taken(host, port) from None
        if wrong.errno == errno.EADDRNOTAVAIL:
            why = "this machine has no such address"
        elif wrong.errno == errno.EACCES:
            why = f"only root may listen on port {port}: take another with -p"

    raise ProxyError(f"cannot listen on {host}:{port}: {why}")


def port_taken(host: str, port: int) -> ProxyError:
    """An error that says what is known of whoever has the port."""
    holders = list[str]()
    for pid in listeners_on(port):
        with contextlib.suppress(OSError):
            program, found, _ = read_proc(pid, "cmdline").partition(b"\0server\0")
            is_ours = bool(found) and b"pocketcoder" in program
            name = read_proc(pid, "comm").decode(errors="replace").strip()
            what = "another pocketcoder server" if is_ours else name
            holders.append(f"{what} (process {pid})")

    who = ", ".join(holders) or "another program"
    other = port + 1 if port < 65535 else DEFAULT_PORT
    return ProxyError(
        f"port {port} on {host} is taken by {who}: stop that, or take another with `-p {other}`,"
        f" and PROXY_URL=http://localhost:{other} for the shell"
    )


async def listen_at_path(path: str) -> Listening:
    """Listen at a unix socket of mode 0600.  Raises ProxyError, with what to do."""
    folder = os.path.dirname(path)
    try:
        close_to_others(folder)
        check_owners(path, "--unix")
        async with locked(folder):
            remove_stale(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.setblocking(False)
            # The file gets this mode when it is made, see unix(7).
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(path)
            listener.listen(BACKLOG)
            return Listening([listener], path)
    except OSError as wrong:
        raise ProxyError(f"cannot listen at {path}: {wrong.strerror}") from None


@contextlib.asynccontextmanager
async def locked(folder: str) -> AsyncIterator[None]:
    """Be the only server that starts at a socket there.  Raises ProxyError, OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(LOCK_PAUSE)
        else:
            raise ProxyError(f"another program holds a lock on {folder}: try again later")

        yield
    finally:
        os.close(fd)


def remove_stale(path: str) -> None:
    """Make room for a socket.  Raises ProxyError if something else is there, OSError."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ProxyError(f"--unix: {path} is there, and no socket: give another path")

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        outcome = probe.connect_ex(path)

    if outcome in (0, errno.EAGAIN):
        raise ProxyError(
            f"--unix: another server listens at {path}: stop that, or give another path"
        )
    if outcome != errno.ECONNREFUSED:
        raise OSError(outcome, os.strerror(outcome))

    os.unlink(path)


# ==========================================================================
# Command line
# ==========================================================================
# Words in, options out; every mistake is a sentence.  The shell's words are read above the line.
#
# C1  A message names the option or variable, what was got and what was expected.
# C2  `--help` of each level has the variables that matter there, and examples.
VARIABLES = {
    "PROXY_URL": f"the server: http://HOST:PORT or unix:/PATH; default http://localhost:{DEFAULT_PORT}",
    "POCKETCODER_TOKEN": "shared secret: the server demands it, the shell sends it",
    "POCKETCODER_HOST": "see `server --host`",
    "POCKETCODER_RUNS": "see `server --runs-dir`",
    "POCKETCODER_WORKSPACE": "see `server --workspace`",
    "TMUX_SOCKET": f"tmux socket of the terminals; default {DEFAULT_SOCKET}",
    "TMUX_SESSION": f"tmux session of the terminals; default {DEFAULT_SESSION}",
    "OPENCODE_AGENT": f"whose terminal; default {default_agent_name()}",
    "OPENCODE_SESSION_ID": "session that the command belongs to, for records",
    "POCKETCODER_USAGE_ID": "id for records",
    "POCKETCODER_FORWARD_ENV": "variables to pass into the sandbox, as LANG,LC_*; default none",
}


class Level(NamedTuple):
    """What the help says of a subcommand."""

    summary: str
    # Of VARIABLES.
    variables: tuple[str, ...]
    # Command lines, and what they do.
    examples: dict[str, str]
    # None: what argparse makes of the options.
    usage: str | None = None
    # By exit status, where a caller has to know more than 0 and failure.
    statuses: dict[str, str] | None = None


SERVER_HELP = Level(
    summary="start the proxy server",
    variables=(
        "POCKETCODER_TOKEN",
        "POCKETCODER_HOST",
        "POCKETCODER_RUNS",
        "POCKETCODER_WORKSPACE",
        "TMUX_SOCKET",
        "TMUX_SESSION",
    ),
    examples={
        "pocketcoder server --workspace .": "commands run in this directory or below",
        "POCKETCODER_TOKEN=… pocketcoder server --host 0.0.0.0": "for other machines too",
        "pocketcoder server --unix /tmp/pocketcoder.socket": "for this user, without a port",
    },
)
SHELL_HELP = Level(
    summary="run a command in the sandbox, as bash would",
    variables=(
        "PROXY_URL",
        "POCKETCODER_TOKEN",
        "OPENCODE_AGENT",
        "OPENCODE_SESSION_ID",
        "POCKETCODER_USAGE_ID",
        "POCKETCODER_FORWARD_ENV",
    ),
    examples={
        "pocketcoder shell -c 'echo hi; exit 3'": "its output and exit status become ours",
        "pocketcoder shell ls -la": "plain words are one command",
        "PROXY_URL=http://sandbox:3001 pocketcoder shell make": "of another container",
    },
    usage="pocketcoder shell {-c CMD [ARG0 ARG...], --command CMD, WORD..., -s [ARG...],"
    " FILE [ARG...]}",
    statuses={
        "0-255": "that of the command; 128+n after signal n",
        "1": "there is no command, and stdin is a terminal, /dev/null or closed",
        "2": "wrong usage, as bash has it",
        "124": f"the command took more than {MAX_TIMEOUT} s",
        "125": "the server cannot be reached, refuses or fails; nothing was run here",
        "137": "the terminal died",
        "141": "nobody reads the output any more",
    },
)
ATTACH_HELP = Level(
    summary="watch an agent's terminal and type there, in the sandbox; C-b d leaves",
    variables=("TMUX_SOCKET", "TMUX_SESSION"),
    examples={
        "pocketcoder attach": f"the terminal of {default_agent_name()}, in a view of your own",
        "pocketcoder attach -r alice": "that of another agent, only to watch",
    },
)
CHECK_HELP = Level(
    summary="exit with 0 if the server is ready for commands, otherwise with 1 and the reason",
    variables=("PROXY_URL",),
    examples={
        "pocketcoder check": f"ask the server at http://localhost:{DEFAULT_PORT}",
        "until pocketcoder check; do sleep 1; done": "wait until it is ready",
        "PROXY_URL=unix:/tmp/pocketcoder.socket pocketcoder check": "by its unix socket",
    },
)
INSTALL_HELP = Level(
    summary="write the shell alone, which starts fastest, into a directory",
    variables=(),
    examples={
        "pocketcoder install /usr/local/bin": f"writes /usr/local/bin/{INSTALLED}",
        "pocketcoder install bin sh bash": "and links to it of these names",
    },
)
HELP = {
    "server": SERVER_HELP,
    "shell": SHELL_HELP,
    "attach": ATTACH_HELP,
    "check": CHECK_HELP,
    "install": INSTALL_HELP,
}


@dataclass(frozen=True)
class Commands:
    """What the command line asks for: a subcommand, and its options."""

    name: str
    # Of the shell; of `attach` an agent; of `install` a directory and names.
    arguments: tuple[str, ...] = ()
    # Of `attach`: without typing.
    only_watches: bool = False
    port: str = str(DEFAULT_PORT)
    host: str = "127.0.0.1"
    # Of a unix socket in place of the port; "": there is none.
    unix_path: str = ""
    workspace: str = "/"
    origins: tuple[str, ...] = ()
    servers: tuple[ServerConfig, ...] = ()
    audit_log: str = ""
    # None: beside the socket.
    runs_dir: str | None = None
    # MiB.
    keep: int = DEFAULT_KEEP
    # Seconds.
    mcp_idle: float = CHILD_IDLE
    # One of LOG_LEVELS.
    log_level: str = "info"


@dataclass(frozen=True)
class Cli:
    """The command line."""

    command: Commands

    @classmethod
    def parse(cls, argv: list[str]) -> Cli:
        """Exits with 2 and a message when the words are wrong."""
        words = shell_arguments(argv)
        if words is not None:
            return cls(Commands(name="shell", arguments=tuple(words)))

        if len(argv) == 1:
            # A person, see `shell_arguments`.
            main_parser().exit_with_help()

        name = argv[1]
        if name not in HELP:
            # `--help` and `--version` end here.
            main_parser().parse_known_args(argv[1:2])
            main_parser().error(no_subcommand(argv[1:]))

        parser = Parser.of(name)
        if name == "install":
            add_install_arguments(parser)
            if len(argv) == 2:
                parser.exit_with_help()
        elif name == "attach":
            add_attach_arguments(parser)
        elif name == "server":
            add_server_options(parser)

        got = parser.parse_all(argv[2:])
        if name == "install":
            return cls(Commands(name=name, arguments=(got.folder, *got.names)))
        if name not in ("attach", "server"):
            return cls(Commands(name=name))

        try:
            return cls(attach_options(got) if name == "attach" else server_options(got))
        except BadMessage as wrong:
            parser.error(str(wrong))


class Parser(argparse.ArgumentParser):
    """One level of the command line; a mistake ends it with 2, and says what is wrong."""

    def __init__(self, prog: str, help_of: Level, description: str) -> None:
        super().__init__(
            prog=prog,
            usage=help_of.usage,
            description=description,
            epilog=help_below(help_of),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            # What is short for one option today may be short for two tomorrow.
            allow_abbrev=False,
        )
        version = f"pocketcoder-proxy {VERSION}"
        self.add_argument("--version", action="version", version=version)

    @classmethod
    def of(cls, name: str) -> Parser:
        """That of a subcommand, without its options."""
        summary = HELP[name].summary
        return cls(f"pocketcoder {name}", HELP[name], f"{summary[0].upper()}{summary[1:]}.")

    def parse_all(self, words: list[str]) -> argparse.Namespace:
        """Exits where a word means nothing."""
        got, rest = self.parse_known_args(words)
        unknown = [word for word in rest if word != "--"]
        if unknown:
            self.error(self.unknown_word(unknown[0]))
        return got

    def unknown_word(self, word: str) -> str:
        if word[:1] != "-":
            return f"got {in_quotes(word)}, expected only options"
        option = word.partition("=")[0]
        known = [name for action in self._actions for name in action.option_strings]
        return f"no such option: {option}{suggestion(option, known)}"

    def error(self, message: str) -> NoReturn:
        missing = re.fullmatch(r"argument (?:\S+/)?(\S+): expected one argument", message)
        if missing:
            message = f"{missing[1]}: got nothing, expected a value"

        self.exit(2, f"pocketcoder: {printable(message)}\nSee `{self.prog} --help`.\n")

    def exit_with_help(self) -> NoReturn:
        self.print_help(sys.stderr)
        self.exit(2)


def main_parser() -> Parser:
    """That of the command line above its subcommands."""
    width = max(map(len, HELP))
    listed = "\n".join(f"  {name:{width}}  {each.summary}" for name, each in HELP.items())
    examples = {
        "pocketcoder server --workspace .": SERVER_HELP.examples[
            "pocketcoder server --workspace ."
        ],
        "pocketcoder shell -c 'echo hi; exit 3'": "a command of an agent",
        "pocketcoder server --help": "all about one subcommand",
    }
    description = __doc__.split("\n")[0]
    return Parser(
        prog="pocketcoder",
        description=f"{description}\n\nsubcommands:\n{listed}\n\nCalled as a shell (sh, bash,"
        " ...-shell), or with an option of one (-c, -lc), or with a\nscript file, it is"
        " `pocketcoder shell`.",
        help_of=Level(
            summary="",
            variables=tuple(VARIABLES),
            examples=examples,
            usage=f"pocketcoder {{{','.join(HELP)}}} ...",
        ),
    )


def help_below(level: Level) -> str:
    """What stands below the options: variables, exit statuses and examples."""
    lines = list[str]()
    if level.variables:
        width = max(map(len, level.variables))
        lines.append("variables:")
        lines += (f"  {name:{width}}  {VARIABLES[name]}" for name in level.variables)
        lines.append("")

    if level.statuses:
        lines.append("exit status:")
        lines += (f"  {status:5}  {meaning}" for status, meaning in level.statuses.items())
        lines.append("")

    lines.append("examples:")
    for command, meaning in level.examples.items():
        lines.append(f"  {command}")
        lines.append(f"      {meaning}")

    return "\n".join(lines)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, where one of `known` is near."""
    import difflib

    near = difflib.get_close_matches(word.lower(), [*known], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def no_subcommand(words: list[str]) -> str:
    """What to do about a first word that is no subcommand."""
    guess = suggestion(words[0], HELP)
    if not guess:
        guess = f"; to run it in the sandbox: pocketcoder shell {plain_command(words)}"
    return f"no such subcommand: {words[0] or quote('')}{guess}"


def add_attach_arguments(parser: Parser) -> None:
    parser.add_argument(
        "-r", "--read-only", action="store_true", help="only watch: what you type does nothing"
    )
    parser.add_argument(
        "agent",
        metavar="AGENT",
        nargs="?",
        default=default_agent_name(),
        help="default %(default)s",
    )


def add_install_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="where to write it")
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help=f"links to it: {', '.join(SHELL_NAMES)}, pocketcoder, or a name that ends in -shell",
    )


def add_server_options(server: Parser) -> None:
    server.add_argument(
        "-p",
        "--port",
        help=f"default {DEFAULT_PORT}; 0: any free port",
    )
    server.add_argument(
        "--host",
        metavar="ADDR",
        help="default $POCKETCODER_HOST, else 127.0.0.1; beyond loopback only with a token",
    )
    server.add_argument(
        "--unix",
        metavar="PATH",
        help="listen on a unix socket of mode 0600 instead of a port; no token is needed there",
    )
    server.add_argument(
        "--workspace",
        metavar="DIR",
        help="root of all `cwd`; default $POCKETCODER_WORKSPACE, else /workspace where it exists,"
        " else the current directory",
    )
    server.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a browser origin that may call (repeatable); none by default",
    )
    server.add_argument(
        "--audit-log",
        metavar="FILE",
        help="append a JSON line for the start and the end of each command and relayed request",
    )
    server.add_argument(
        "--runs-dir",
        default=os.environ.get("POCKETCODER_RUNS") or None,
        metavar="DIR",
        help="where the output of runs is kept; default $POCKETCODER_RUNS, else SOCKET.d/runs",
    )
    server.add_argument(
        "--keep-mib",
        default=str(DEFAULT_KEEP),
        metavar="N",
        help="for all kept output together, default %(default)s; 0 keeps none",
    )
    server.add_argument(
        "--mcp-server",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="relay a stdio MCP server (repeatable)",
    )
    server.add_argument(
        "--mcp-config",
        metavar="FILE",
        help="the same from a file with `mcpServers`, as clients have it; ${VAR} is filled in,"
        " disabled and remote servers are left out",
    )
    server.add_argument(
        "--mcp-idle",
        default=f"{CHILD_IDLE:g}",
        metavar="SECONDS",
        help="end a relayed server's process that nobody has used so long, default %(default)s",
    )
    server.add_argument(
        "--log-level",
        default="info",
        metavar="LEVEL",
        help=f"of what is logged on stderr: {', '.join(LOG_LEVELS)}; default %(default)s",
    )


def attach_options(got: argparse.Namespace) -> Commands:
    """The options of `attach`, checked.  Raises BadMessage."""
    if not AGENT_NAME.fullmatch(got.agent):
        raise wrong_option("AGENT", got.agent, f"a name like {AGENT_NAME.pattern}")

    return Commands(
        name="attach",
        arguments=(got.agent,),
        only_watches=got.read_only,
        workspace=workspace_of(None),
    )


def server_options(got: argparse.Namespace) -> Commands:
    """The options of `server`, checked.  Raises BadMessage."""
    # An unset variable maybe.
    if got.audit_log == "":
        raise wrong_option("--audit-log", got.audit_log, "a file")

    if got.runs_dir == "":
        raise wrong_option("--runs-dir", got.runs_dir, "a directory")

    if not (re.fullmatch(r"[0-9]{1,7}", got.keep_mib) and int(got.keep_mib) <= MAX_KEEP):
        expected = f"a number of MiB from 0 to {MAX_KEEP}"
        raise wrong_option("--keep-mib", got.keep_mib, expected)

    for origin in got.allow_origin:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", origin):
            raise wrong_option("--allow-origin", origin, "one like http://name:port")

    if not (re.fullmatch(r"[0-9]+(\.[0-9]+)?", got.mcp_idle) and float(got.mcp_idle) > 0):
        raise wrong_option("--mcp-idle", got.mcp_idle, "a number of seconds above 0")
    if got.log_level not in LOG_LEVELS:
        near = suggestion(got.log_level, LOG_LEVELS)
        raise wrong_option("--log-level", got.log_level, f"one of {', '.join(LOG_LEVELS)}{near}")

    return Commands(
        name="server",
        port=port_of(got),
        host=host_of(got),
        unix_path=unix_path_of(got),
        workspace=workspace_of(got.workspace),
        origins=tuple(got.allow_origin),
        servers=read_servers(got.mcp_server, got.mcp_config),
        audit_log=got.audit_log or "",
        runs_dir=got.runs_dir,
        keep=int(got.keep_mib),
        mcp_idle=float(got.mcp_idle),
        log_level=got.log_level,
    )


def port_of(got: argparse.Namespace) -> str:
    """Raises BadMessage."""
    if got.port is None:
        return str(DEFAULT_PORT)
    if not re.fullmatch(r"[0-9]{1,5}", got.port) or int(got.port) > 65535:
        raise wrong_option("--port", got.port, "a number from 0 to 65535")
    return str(got.port)


def host_of(got: argparse.Namespace) -> str:
    """Raises BadMessage."""
    if got.host is None:
        return os.environ.get("POCKETCODER_HOST") or "127.0.0.1"
    if not got.host:
        raise wrong_option("--host", got.host, "a name or address of this machine")
    return str(got.host)


def unix_path_of(got: argparse.Namespace) -> str:
    """An absolute path; "": a port.  Raises BadMessage."""
    if got.unix is None:
        return ""
    if got.port is not None or got.host is not None:
        raise BadMessage(
            "--unix: got a port or host too, expected one of --unix and --port, --host"
        )

    path: str = os.path.abspath(got.unix)
    size = len(os.fsencode(path))
    if not got.unix or not path.isprintable():
        raise wrong_option("--unix", got.unix, "a path that can be shown")
    if size > MAX_SOCKET_PATH:
        raise wrong_option("--unix", path, f"at most {MAX_SOCKET_PATH} bytes (it has {size})")

    check_directory("--unix", os.path.dirname(path))
    return path


def workspace_of(path: str | None) -> str:
    """A real path; of None that of the environment, or the default.  Raises BadMessage."""
    option = "--workspace"
    if path is None and os.environ.get("POCKETCODER_WORKSPACE"):
        option = "POCKETCODER_WORKSPACE"
        path = os.environ[option]
    elif path is None:
        path = "/workspace" if os.path.isdir("/workspace") else "."

    check_directory(option, path)
    real: str = os.path.realpath(path)
    if real.encode(errors="ignore") != os.fsencode(real):
        raise wrong_option(option, path, "a directory whose path is UTF-8")

    return real


# ==========================================================================
# Application
# ==========================================================================
# The server from its start to its end.
async def serve(options: Commands, token: str) -> None:
    """Listen until SIGTERM or SIGINT.  Raises ProxyError, OSError when it cannot."""
    loop = asyncio.get_running_loop()
    state = make_state(options)
    if options.audit_log:
        # The file must be there.
        state.audit.flush()
        loop.add_signal_handler(signal.SIGHUP, state.audit.reopen)

    gate = Gate(token=token, origins=frozenset(options.origins), any_host=options.unix_path != "")
    server = make_server(state, gate)

    # The signal.
    stop: asyncio.Future[signal.Signals] = loop.create_future()

    def end(number: signal.Signals) -> None:
        if not stop.done():
            stop.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)

    if options.unix_path:
        listening = await listen_at_path(options.unix_path)
    else:
        listening = listen_at_port(options.host, int(options.port))

    try:
        # Callers wait until the runs that they may ask for are known.
        await state.driver.adopt(partial(Notes.of_run, state))
        for each in listening.sockets:
            server.listen_on(each)

        say_where(listening.address, state)
        log.info("stopping %s", key_values(signal=(await stop).name))
    finally:
        for each in listening.sockets:
            loop.remove_reader(each)

        listening.close()

    await shut_down(state)
    await server.close_all_connections()
    log.info("stopped")


def make_driver(options: Commands) -> PocketCoderDriver:
    """The driver of the session that the environment names.  Raises BadMessage."""
    try:
        return PocketCoderDriver(
            os.environ.get("TMUX_SOCKET") or DEFAULT_SOCKET,
            os.environ.get("TMUX_SESSION") or DEFAULT_SESSION,
            options.workspace,
            runs_dir=options.runs_dir,
            keep=options.keep * MIB,
        )
    except BadMessage as wrong:
        text = str(wrong).replace("`session_name`", "TMUX_SESSION")
        raise BadMessage(text.replace("`socket_path`", "TMUX_SOCKET")) from None


def make_state(options: Commands) -> AppState:
    """What the handlers share.  Raises NoTerminal, BadMessage."""
    driver = make_driver(options)
    check_place(driver.socket_path)

    for folder in open_above(driver.socket_path):
        log.warning(
            "%s: any user could replace what is in it, the directory of TMUX_SOCKET too", folder
        )

    state = AppState(
        sessions=SessionMap(),
        driver=driver,
        workspace=options.workspace,
        audit=AuditLog(options.audit_log),
    )

    for config in options.servers:
        if config.left_out:
            log.info("server %s is not served: %s", config.name, config.left_out)
        else:
            state.servers[config.name] = Relay(config, options.mcp_idle)

    return state


def make_server(state: AppState, gate: Gate) -> HttpServer:
    """An HTTP server for all routes, which listens nowhere yet."""
    shared: dict[str, Any] = {"state": state}
    routes = []
    for path, endpoint in ROUTES:
        pattern = f"{path}/?" if endpoint.slash_too else path
        routes.append((pattern, endpoint, shared))

    application = tornado.web.Application(
        routes,
        default_handler_class=UnknownEndpoint,
        default_handler_args=shared,
        log_function=ignore,
        gate=gate,
        websocket_max_message_size=MAX_BODY,
    )
    server = HttpServer(
        application,
        # `Endpoint` answers 413 itself.
        max_body_size=1 << 40,
        max_header_size=MAX_HEADERS,
        idle_connection_timeout=IDLE_TIMEOUT,
        body_timeout=BODY_TIMEOUT,
    )
    application.settings["server"] = server
    return server


def say_where(address: str, state: AppState) -> None:
    """Print the address for programs, and how a person watches; log the same."""
    driver = state.driver
    watch = attach_command(driver.socket_path, driver.session_name)
    start = key_values(
        version=VERSION,
        address=address,
        workspace=state.workspace,
        socket=driver.socket_path,
    )
    log.info("start %s", start)

    # A reader may have left, or its disk be full.
    with contextlib.suppress(OSError):
        print(f"pocketcoder: listening on {address}", flush=True)
    with contextlib.suppress(OSError):
        print(f"pocketcoder: watch with: {watch}", file=sys.stderr, flush=True)
    if address.startswith("http:"):
        # "Every address of this machine" is none that a browser can ask.
        page = re.sub(r"//(0\.0\.0\.0|\[::\]):", "//localhost:", address)
        with contextlib.suppress(OSError):
            print(f"pocketcoder: or in a browser: {page}/", file=sys.stderr, flush=True)


async def shut_down(state: AppState) -> None:
    """Take no more commands; give those that run STOP_GRACE seconds, and answer their callers."""
    # Callers that wait for the log are answered before the end.
    state.audit.hurry(STOP_GRACE / 2)
    state.screens.close()
    await asyncio.gather(state.driver.close(STOP_GRACE), state.sessions.settle(STOP_GRACE))

    # The answers of commands that had to be ended leave now.
    await state.sessions.settle(SETTLE_GRACE)
    for session in [*state.sessions.values()]:
        session.end()

    relays = [server for server in state.servers.values() if isinstance(server, Relay)]
    await asyncio.gather(*(relay.close() for relay in relays))

    state.refusals.end_second()

    # The last handlers have their results, and send them now.
    if state.calls:
        await asyncio.wait(state.calls, timeout=STOP_GRACE)


def why_not(options: Commands, token: str) -> str | None:
    """What is wrong with this machine or these settings, in a sentence."""
    if isinstance(tornado, SimpleNamespace):
        return "needs the Python package tornado: `pip install tornado`"
    if not options.unix_path and not token and not is_loopback(options.host):
        return (
            f"the address {options.host} is reached from elsewhere: set POCKETCODER_TOKEN to a"
            " secret, here and for the shell, or listen on 127.0.0.1 (--host, POCKETCODER_HOST)"
        )
    if not re.fullmatch(r"[!-~]*", token):
        return f"POCKETCODER_TOKEN: {TOKEN_FORM}"
    if process(os.getpid()) is None:
        return "needs /proc, which is missing or not readable: it shows what runs in a terminal"

    return what_tmux_lacks()


def what_tmux_lacks() -> str | None:
    """What is wrong with the tmux of this machine, in a sentence."""
    version = tmux_version()
    number = re.search(r"(\d+)\.(\d+)", version)
    is_old = number is not None and (int(number[1]), int(number[2])) < (3, 2)
    if not version or is_old:
        return (
            f"needs tmux 3.2 or later, got {version or 'none'}: install it, for instance"
            " `apt-get install tmux`"
        )

    return None


def wipe(name: str) -> None:
    """Overwrite a variable in /proc/PID/environ, which commands can read.

    That file shows what we were started with.
    """
    try:
        # Fields 50 and 51, proc(5).
        fields = read_proc(os.getpid(), "stat").rpartition(b")")[2].split()
        place = int(fields[47])
        end = int(fields[48])

        with open("/proc/self/mem", "r+b", 0) as memory:
            memory.seek(place)
            for variable in memory.read(end - place).split(b"\0"):
                if variable.startswith(f"{name}=".encode()):
                    memory.seek(place)
                    memory.write(bytes(len(variable)))

                place += len(variable) + 1
    except (OSError, ValueError) as refused:
        log.warning("%s stays in /proc/%d/environ: %s", name, os.getpid(), refused)


def watch_children() -> None:
    """Before Python 3.12 each child needs a thread otherwise, which may be the one too many."""
    # pidfd_open(2) needs Linux 5.3.
    with contextlib.suppress(OSError, AttributeError):
        os.close(os.pidfd_open(os.getpid()))
        if sys.version_info < (3, 12):
            asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


def run_server(options: Commands) -> str | None:
    """Serve until a signal comes; otherwise what is wrong, in a sentence."""
    token = os.environ.pop("POCKETCODER_TOKEN", "")
    log_to_stderr(options.log_level)
    if token:
        wipe("POCKETCODER_TOKEN")

    watch_children()
    wrong = why_not(options, token)
    if wrong:
        return wrong

    try:
        asyncio.run(serve(options, token))
    except ProxyError as failure:
        return printable(str(failure))
    except OSError as failure:
        return f"cannot serve: {failure.strerror or failure}"

    return None


def run_attach(options: Commands) -> int:
    """Show an agent's terminal to the person who calls; the exit status."""
    wrong = what_tmux_lacks()
    if wrong is None:
        try:
            return asyncio.run(
                attach(make_driver(options), options.arguments[0], options.only_watches)
            )
        except (ProxyError, OSError) as failure:
            wrong = str(failure)
        except KeyboardInterrupt:
            return 130

    print(f"pocketcoder: {printable(wrong)}", file=sys.stderr)
    return 1


def run_install(folder: str, names: Sequence[str]) -> str | None:
    """Write the shell; otherwise what is wrong, in a sentence."""
    try:
        print(f"pocketcoder: {install(folder, [*names])}")
    except ProxyError as failure:
        return str(failure)
    except OSError as failure:
        return f"{failure.filename}: {failure.strerror}"

    return None


def main() -> int:
    """The command line; its exit status."""
    options = Cli.parse(sys.argv).command
    if options.name == "shell":
        return run_shell([*options.arguments])

    if options.name == "attach":
        return run_attach(options)

    if options.name == "install":
        wrong = run_install(options.arguments[0], options.arguments[1:])
    else:
        wrong = run_server(options)

    if wrong:
        print(f"pocketcoder: {wrong}", file=sys.stderr)
        return 1

    return 0


if __name__ == "__main__":
    sys.exit(main())
