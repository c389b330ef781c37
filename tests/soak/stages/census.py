"""`census`: answers `GET /v1/census` with tasks and threads, which only the process itself can count."""

import asyncio
import gc
import threading
from collections import Counter

from gateway import Next, Request, Response, Stage


class Census(Stage):
    """Answer one path with the number of tasks, by coroutine, and of threads."""

    async def __call__(self, request: Request, call_next: Next) -> Response:
        if request.path != "/census":
            return await call_next(request)
        gc.collect()
        tasks = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
        return Response.json({"tasks": tasks.total(), "by_coroutine": dict(tasks), "threads": threading.active_count()})
