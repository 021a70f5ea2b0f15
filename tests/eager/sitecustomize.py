"""Makes every asyncio event loop start its tasks eagerly: ``tox run -e eager`` has it on its path.

Python imports it in each process of the tests, also in those that a test starts. uvloop's loops are
left as they are.
"""

import asyncio
from typing import Any

_plain = asyncio.BaseEventLoop.__init__


def _eager(self: asyncio.BaseEventLoop, *args: Any, **kwargs: Any) -> None:
    _plain(self, *args, **kwargs)
    self.set_task_factory(asyncio.eager_task_factory)


asyncio.BaseEventLoop.__init__ = _eager
