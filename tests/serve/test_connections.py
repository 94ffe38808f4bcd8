"""What a connection writes in one turn of the loop goes out at once."""

from __future__ import annotations

import asyncio

from mpg.serve.connections import Corked


class Transport:
    def __init__(self):
        self.calls = []

    def write(self, data):
        self.calls.append(data)

    def is_closing(self):
        return None in self.calls

    def close(self):
        self.calls.append(None)


def calls_of(write):
    """What reaches a transport of what a coroutine writes."""
    transport, loop = Transport(), asyncio.new_event_loop()
    loop.run_until_complete(write(Corked(transport, loop), transport))
    loop.close()
    return transport.calls


def test_what_is_written_in_one_turn_is_sent_at_once_and_before_the_end():
    async def write(corked, transport):
        corked.write(b"a")
        corked.write(b"b")
        await asyncio.sleep(0)
        corked.write(b"c")
        await asyncio.sleep(0)
        corked.write(b"d")
        corked.write(b"e")
        corked.close()
        await asyncio.sleep(0)

    assert calls_of(write) == [b"ab", b"c", b"de", None]


def test_nothing_is_sent_to_a_client_that_has_gone_in_the_same_turn():
    async def write(corked, transport):
        corked.write(b"a")
        transport.close()
        await asyncio.sleep(0)

    assert calls_of(write) == [None]
