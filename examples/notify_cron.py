"""A cron job that tells a group of the Falcon app's clients something.

    PACHINKO_BACKPLANE=nats://localhost:4222 python examples/notify_cron.py room:lobby "Backup done"

The exit status is 0 when the engine has taken the message, 1 with a line on stderr when it has not,
and 2 for a wrong command line. Cron mails that line; a systemd timer's unit counts as failed.
"""

import argparse
import asyncio
import sys

from pachinko import PachinkoError, hub


async def notify(group: str, text: str) -> None:
    async with hub.open():  # the engine is that of PACHINKO_BACKPLANE
        await hub.send(group, "notice", {"text": text})


def main() -> None:
    parser = argparse.ArgumentParser(description="Tell a group of clients something.")
    parser.add_argument("group", help='such as "room:lobby"')
    parser.add_argument("text")
    given = parser.parse_args()
    try:
        asyncio.run(notify(given.group, given.text))
    except PachinkoError as exc:
        sys.exit(f"notify_cron: nobody was told: {exc}")


if __name__ == "__main__":
    main()
