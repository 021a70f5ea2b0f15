"""A cron job that sends a notice to a group of the Falcon app's clients.

    python3 -m pip install ".[nats]"
    PACHINKO_BACKPLANE=nats://localhost:4222 python3 examples/notify_cron.py room:lobby "Saved"

The exit status is 0 when the broker has taken the message, and 2 for a wrong command line. It is 1,
with a line on stderr, when the broker has not taken the message. Cron mails that line; the unit of
a systemd timer counts as failed.
"""

import argparse
import sys

from pachinko import PachinkoError, SyncHub


def main() -> None:
    parser = argparse.ArgumentParser(description="Send a notice to a group of clients.")
    parser.add_argument("group", help='such as "room:lobby"')
    parser.add_argument("text")
    given = parser.parse_args()
    try:
        with SyncHub() as hub:  # the broker that PACHINKO_BACKPLANE names
            hub.send(given.group, "notice", {"text": given.text})
    except PachinkoError as exc:
        sys.exit(f"notify_cron: nobody was told: {exc}")


if __name__ == "__main__":
    main()
