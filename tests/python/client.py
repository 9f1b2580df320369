#!/usr/bin/env python3
"""A Bellwire device client in Python, written from docs/write-a-client.md alone.

It prints one JSON object a line: a line is what this client hands to its app, so a notification is written and flushed
before its verdict goes to disk, and the verdict is on disk before the server hears of it.

    python3 tests/python/client.py --server localhost:4433 --ca bellwire-data/dev-ca.pem \\
        --credentials anna.json --state-dir /tmp/anna --count 1

Exit codes: 0 the wanted number of notifications arrived, or SIGINT or SIGTERM; 1 nothing could be tried; 3 the server said
never to come back.

Needs Python 3.11 and the package websockets (tests/requirements.txt).
"""

import argparse
import asyncio
import base64
import binascii
import collections
import fcntl
import json
import os
import pathlib
import random
import secrets
import signal
import ssl
import struct
import sys
import time

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidURI

WINDOW_IDS = 1_256
SEEN_MAX = 128
BATCH_MAX = 256
FRAME_MAX_BYTES = 397_312
CONNECT_TIMEOUT_S = 10
WELCOME_TIMEOUT_S = 20
PONG_TIMEOUT_S = 15
FAREWELL_S = 3
KEEP_ALIVE_S = 240
BACKOFF_FIRST_S = 1
BACKOFF_MAX_S = 300
LATER_S = 2
AWAY_S = 60
STABLE_S = 60

ACKNOWLEDGED, DECLINED = "acknowledged", "declined"

# Close codes that say more than "later": the name, and when to come back.
CLOSES = {
    4000: ("bye", "now"),
    4001: ("replaced", "replaced"),
    4002: ("revoked", "never"),
    4003: ("drain", "now"),
    4004: ("upgrade", "now"),
    4011: ("unauthorized", "never"),
    4013: ("duplicate_device", "later"),
    4017: ("silence", "now"),
    4018: ("unsupported_version", "never"),
}


def tell(event, **members):
    """Hands one line to the app."""
    print(json.dumps({"event": event, **members}, separators=(",", ":")), flush=True)


def new_id():
    return base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


class Window:
    """The last ids with their verdicts, in memory and on disk.

    The file is a row of records: length (4 bytes), CRC-32 of length and body (4 bytes), body. A body is a JSON array
    [id, verdict, reason]. The records of one batch are written and synced together.
    """

    HEAD = struct.Struct("<II")
    BODY_MAX_BYTES = 4_096

    def __init__(self, directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = directory / "window"
        self.lock = open(directory / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"{directory} is in use by another client")
        self.verdicts = collections.OrderedDict()
        # Ids whose verdict the server may not have; without proof, all of them.
        self.unproven = collections.OrderedDict()
        self.records = 0
        self.file = None
        self._load()

    def _load(self):
        data = self.path.read_bytes() if self.path.exists() else b""
        good, broken, at = 0, False, 0
        while at < len(data):
            end = self._record_at(data, at)
            if end is not None:
                at = good = end
                continue
            following = next((i for i in range(at + 1, len(data)) if self._record_at(data, i, peek=True)), None)
            if following is None:
                break
            broken, at = True, following
        if broken:
            aside = self.path.with_name(f"window.corrupt-{time.time_ns()}")
            self.path.rename(aside)
            tell("trouble", what=f"the window of ids was damaged and is kept as {aside}")
            self._rewrite()
            return
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.file, good)
        os.lseek(self.file, good, os.SEEK_SET)
        os.fsync(self.file)
        self._sync_directory()

    def _record_at(self, data, at, peek=False):
        head = data[at : at + self.HEAD.size]
        if len(head) < self.HEAD.size:
            return None
        length, checksum = self.HEAD.unpack(head)
        body = data[at + self.HEAD.size : at + self.HEAD.size + length]
        if length == 0 or length > self.BODY_MAX_BYTES or len(body) < length:
            return None
        if binascii.crc32(body, binascii.crc32(head[:4])) != checksum:
            return None
        if not peek:
            self._keep(*json.loads(body))
            self.records += 1
        return at + self.HEAD.size + length

    def _keep(self, id, verdict, reason):
        self.verdicts[id] = (verdict, reason)
        self.unproven[id] = verdict
        while len(self.verdicts) > WINDOW_IDS:
            self.verdicts.popitem(last=False)
        while len(self.unproven) > SEEN_MAX:
            self.unproven.popitem(last=False)

    def _encode(self, id, verdict, reason):
        body = json.dumps([id, verdict, reason]).encode()
        length = struct.pack("<I", len(body))
        return length + struct.pack("<I", binascii.crc32(body, binascii.crc32(length))) + body

    def _rewrite(self):
        fresh = self.path.with_name("window.new")
        file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(file, b"".join(self._encode(id, *given) for id, given in self.verdicts.items()))
        os.fsync(file)
        os.rename(fresh, self.path)
        self._sync_directory()
        if self.file is not None:
            os.close(self.file)
        self.file, self.records = file, len(self.verdicts)

    def _sync_directory(self):
        directory = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def save(self, given):
        """Remembers (id, verdict, reason) for each and returns once they are on disk."""
        for one in given:
            self._keep(*one)
        self.records += len(given)
        if self.records > 4 * WINDOW_IDS:
            self._rewrite()
            return
        data = b"".join(self._encode(*one) for one in given)
        if os.write(self.file, data) != len(data):
            raise OSError("the disk took only a part of it")
        os.fdatasync(self.file)

    def seen(self):
        return [{"id": id, "verdict": verdict} for id, verdict in self.unproven.items()]

    def proven(self, ids):
        for id in ids:
            self.unproven.pop(id, None)


class Ended(Exception):
    """A session is over: why, and when to come back ("now", "later", "away", "replaced", "never", or a range in ms)."""

    def __init__(self, why, when, endpoint=None):
        super().__init__(why)
        self.why, self.when, self.endpoint = why, when, endpoint


class Client:
    def __init__(self, arguments, credentials):
        self.arguments = arguments
        self.device, self.secret = credentials["device"], credentials["secret"]
        self.window = Window(pathlib.Path(arguments.state_dir))
        self.instance = new_id()
        self.attempt = 0
        self.handed_over = 0
        self.leaving = asyncio.Event()
        self.tls = ssl.create_default_context(cafile=arguments.ca)

    async def run(self):
        failures, server = 0, self.arguments.server
        while not self.leaving.is_set():
            stood_since = None
            try:
                async with self.connected(server) as link:
                    session = Session(self, link)
                    try:
                        await session.run()
                    finally:
                        stood_since = session.welcomed_at
                return 0
            except Ended as ended:
                end = ended
            except ConnectionClosed as closed:
                end = closed_by(closed)
            except (OSError, TimeoutError, InvalidHandshake, InvalidMessage) as error:
                end = Ended(f"cannot connect: {error}", "now")
                server = self.arguments.server
            if self.enough():
                return 0
            server = end.endpoint or server
            if stood_since is not None and time.monotonic() - stood_since >= STABLE_S:
                failures = 0
            if end.when == "never":
                tell("disconnected", why=end.why, retry_in_ms=None)
                return 3
            if isinstance(end.when, list):
                failures, wait = 0, random.uniform(*end.when) / 1_000
            else:
                ceiling = min(BACKOFF_FIRST_S * 2 ** min(failures, 32), BACKOFF_MAX_S)
                floor = {"now": 0, "later": LATER_S, "away": AWAY_S, "replaced": AWAY_S}[end.when]
                failures, wait = failures + 1, floor + random.uniform(0, ceiling)
            tell("disconnected", why=end.why, retry_in_ms=round(wait * 1_000))
            try:
                await asyncio.wait_for(self.leaving.wait(), wait)
            except TimeoutError:
                pass
        return 0

    def connected(self, server):
        url = server if server.startswith("wss://") else f"wss://{server.removeprefix('bellwire://')}/v1/link"
        return connect(
            url,
            ssl=self.tls,
            subprotocols=["bellwire.1.json"],
            compression=None,
            max_size=FRAME_MAX_BYTES,
            open_timeout=CONNECT_TIMEOUT_S,
            close_timeout=FAREWELL_S,
            # The link has a keep-alive of its own; the library's would tell the server nothing.
            ping_interval=None,
            proxy=None,
        )

    def enough(self):
        return self.arguments.count is not None and self.handed_over >= self.arguments.count


class Session:
    """One connection. Reading, answering and keeping alive happen in one loop, so nothing needs a lock."""

    def __init__(self, client, link):
        self.client, self.window, self.link = client, client.window, link
        self.welcomed_at = None
        self.server_now_ms = None
        self.last_seq = 0
        self.interval_s = None
        # Ids that were told the server before the ping that waits for its pong.
        self.told, self.told_before_ping = [], None
        self.goaway = None
        self.reading = None

    async def run(self):
        self.client.attempt += 1
        seen = self.window.seen()
        hello = {
            "type": "hello",
            "device": self.client.device,
            "secret": self.client.secret,
            "instance": self.client.instance,
            "attempt": self.client.attempt,
            "window": self.client.arguments.window,
            "agent": "bellwire-python-test/1",
        }
        if seen:
            hello["seen"] = seen
        await self.say(hello)
        await self.greet(seen)
        leaving = asyncio.ensure_future(self.client.leaving.wait())
        try:
            sent_at, pinged_at = time.monotonic(), None
            while True:
                deadline = sent_at + self.interval_s if pinged_at is None else pinged_at + PONG_TIMEOUT_S
                timeout = max(0, deadline - time.monotonic())
                reading = self.read()
                done, _ = await asyncio.wait({reading, leaving}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if leaving in done:
                    return await self.leave()
                if reading in done:
                    pinged_at = None
                    if await self.handle(await self.at_hand()):
                        sent_at = time.monotonic()
                    if self.client.enough():
                        return await self.leave()
                    if self.goaway is not None:
                        return await self.drain()
                elif pinged_at is None:
                    await self.say({"type": "ping"})
                    self.told_before_ping, self.told = self.told, []
                    sent_at = pinged_at = time.monotonic()
                else:
                    raise Ended("the server answers no more", "now")
        finally:
            leaving.cancel()
            if self.reading is not None:
                self.reading.cancel()

    def read(self):
        """The one reading of this connection; it goes on until it was taken."""
        if self.reading is None:
            self.reading = asyncio.ensure_future(self.link.recv())
        return self.reading

    async def take(self):
        message = await self.read()
        self.reading = None
        return message

    async def at_hand(self):
        """What has arrived already, so that it can share one sync."""
        messages = [await self.take()]
        while len(messages) < BATCH_MAX:
            reading = self.read()
            await asyncio.sleep(0)
            if not reading.done() or reading.exception() is not None:
                break
            messages.append(await self.take())
        return messages

    async def say(self, frame):
        await self.link.send(json.dumps(frame, separators=(",", ":")))

    async def greet(self, seen):
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                while self.welcomed_at is None:
                    frame = parse(await self.take())
                    match frame["type"]:
                        case "welcome":
                            self.welcomed_at = time.monotonic()
                            self.server_now_ms = frame["now_ms"]
                            least, most = frame["keep_alive_s"]
                            self.interval_s = min(max(KEEP_ALIVE_S, least), most)
                            self.granted = frame["window"]
                            self.window.proven([one["id"] for one in seen])
                            tell("connected", session=frame["session"], pending=frame["pending"], window=frame["window"])
                        case "error":
                            raise self.refused(frame)
                        case "goaway":
                            raise self.sent_away(frame)
                        case "notify":
                            raise Ended("a notification before the welcome", "later")
        except TimeoutError:
            raise Ended("no welcome came", "now") from None

    async def handle(self, messages):
        """Works through frames that came together. True if something was said."""
        given, up_to, said = [], None, False
        for message in messages:
            frame = parse(message)
            match frame["type"]:
                case "notify":
                    if frame["seq"] != self.last_seq + 1:
                        raise Ended("seq does not rise by one", "later")
                    self.last_seq = frame["seq"]
                    if self.client.enough():
                        continue
                    verdict, reason, new = self.decide(frame)
                    given.append((frame["id"], verdict, reason, new))
                    if verdict == ACKNOWLEDGED:
                        up_to = frame["seq"]
                case "withdraw":
                    tell("withdrawn", ids=frame["ids"])
                case "pong":
                    self.window.proven(self.told_before_ping or [])
                    self.told_before_ping = None
                case "error":
                    raise self.refused(frame)
                case "goaway":
                    if frame["reason"] not in ("drain", "upgrade"):
                        raise self.sent_away(frame)
                    self.goaway = frame
        # Callback, then disk, then acknowledgement.
        fresh = [(id, verdict, reason) for id, verdict, reason, new in given if new]
        if fresh:
            self.window.save(fresh)
        for id, verdict, reason, _ in given:
            self.told.append(id)
            if verdict == DECLINED:
                await self.say({"type": "decline", "id": id, "reason": reason})
                said = True
        if up_to is not None:
            await self.say({"type": "ack", "up_to": up_to})
            said = True
        return said

    def decide(self, notify):
        """The verdict on a notification: (verdict, reason, whether it still has to be saved)."""
        id = notify["id"]
        if id in self.window.verdicts:
            tell("repeated", id=id)
            return *self.window.verdicts[id], False
        now_ms = self.server_now_ms + (time.monotonic() - self.welcomed_at) * 1_000
        if now_ms >= notify["expires_ms"]:
            tell("expired", id=id)
            return DECLINED, "expired", False
        members = {name: value for name, value in notify.items() if name not in ("type", "seq")}
        tell("notification", **members)
        self.client.handed_over += 1
        return ACKNOWLEDGED, None, True

    async def leave(self):
        await self.say({"type": "bye"})
        closed = await self.until_closed()
        if closed is not None and closed.rcvd is not None and closed.rcvd.code == 4000:
            self.window.proven(self.told)
        tell("stopped")

    async def drain(self):
        # Every notification was answered when it came, so nothing is left to say but this.
        await self.say({"type": "bye"})
        await self.until_closed()
        raise self.sent_away(self.goaway)

    async def until_closed(self):
        try:
            async with asyncio.timeout(FAREWELL_S):
                while True:
                    await self.take()
        except ConnectionClosed as closed:
            return closed
        except TimeoutError:
            return None

    def refused(self, error):
        when = "away" if error["code"] == "duplicate_device" else error["retry"]
        return Ended(f"{error['code']}: {error['message']}", when)

    def sent_away(self, goaway):
        least, most = goaway["reconnect_ms"]
        match goaway["reason"]:
            case "revoked":
                when = "never"
            case "replaced":
                tell("replaced")
                least = max(least, AWAY_S * 1_000)
                when = [least, max(least, most)]
            case _:
                when = [least, most]
        return Ended(f"sent away: {goaway['reason']}", when, goaway.get("endpoint"))


def parse(message):
    """One frame. What is no frame ends the session; what we do not know is skipped by not being looked at."""
    try:
        if not isinstance(message, str):
            raise ValueError("a binary message")
        frame = json.loads(message)
        if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
            raise ValueError("no object with a type")
        return frame
    except ValueError as error:
        raise Ended(f"the server sent no frame: {error}", "later") from None


def closed_by(closed):
    """What a close says when no error or goaway came before it."""
    code = closed.rcvd.code if closed.rcvd is not None else None
    if code is None or not 4000 <= code < 5000:
        return Ended(f"connection lost: {closed}", "now")
    name, when = CLOSES.get(code, (str(code), "later"))
    if name == "replaced":
        tell("replaced")
    if name == "duplicate_device":
        when = "away"
    return Ended(f"closed by the server: {name}", when)


async def main():
    parser = argparse.ArgumentParser(description="A Bellwire device client in Python.")
    parser.add_argument("--server", required=True, help="host:port, or wss://host:port/v1/link")
    parser.add_argument("--ca", required=True, help="PEM file with the authority of the server's certificate")
    parser.add_argument("--credentials", required=True, help='JSON file with "device" and "secret"')
    parser.add_argument("--state-dir", required=True, help="directory of this device alone")
    parser.add_argument("--count", type=int, help="leave after this many notifications")
    parser.add_argument("--window", type=int, default=32, help="how many may be in flight")
    arguments = parser.parse_args()
    try:
        credentials = json.loads(pathlib.Path(arguments.credentials).read_text())
        client = Client(arguments, credentials)
    except (OSError, ValueError, KeyError, ssl.SSLError) as error:
        print(f"client.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, client.leaving.set)
    try:
        return await client.run()
    except InvalidURI as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
