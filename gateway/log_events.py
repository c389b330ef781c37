"""The names of log events with their meaning for an operator, and the keys of events."""

from __future__ import annotations

__all__ = ("EVENTS", "KEYS")

EVENTS: dict[str, str] = {
    "connection_failed": "A bug ended a client's connection; report it with `error` and `frames`.",
    "counters": "At the stop: totals of the counters of stages, such as repairs.",
    "deferred_callback_failed": "A stage failed at the end of an exchange; fix the stage.",
    "deployment_recovered": "A deployment whose circuit was open responds again; nothing to do.",
    "deployment_unavailable": (
        "A deployment of a pool gets no requests for `seconds`, because of a 429 or failures; if it repeats, "
        "raise the quota or check the deployment."
    ),
    "draining": "The gateway waits for running exchanges, at most `grace` seconds.",
    "entra_token_fetch_failed": (
        "No Entra token for Azure could be fetched; the current one is used for `kept_for` more seconds, and "
        "the gateway retries. Check the identity and the reason."
    ),
    "event_loop_blocked": "Code without `await` blocked all requests for over `limit` seconds; fix the code at `at`.",
    "exchange": (
        "One exchange is over: caller, operation, target, outcome, duration and tokens (stage access_log). "
        "Nothing to do."
    ),
    "exchanges_cancelled": (
        "The grace period ended with exchanges still running; their clients got an error `shutting_down` (a "
        "WebSocket: close code 1001). Raise `timeouts.grace` if it happens often."
    ),
    "file_descriptor_limit_unchanged": "The system did not allow the process to raise its descriptor limit.",
    "file_descriptors_exhausted": (
        "No file descriptor is left; requests get 503 `overloaded`. Logged at most every 10 s. Raise the "
        "limit, or lower `limits.connections`."
    ),
    "file_descriptors_low": (
        "The process has too few file descriptors for `limits.connections`; `enough_for` clients fit. Raise "
        "the limit, or lower `limits.connections`."
    ),
    "file_watch_failed": (
        "The configuration's files cannot be checked for changes (no descriptor or thread left); they are "
        "checked again."
    ),
    "filter_failed": (
        "A filter raised an exception on a whole response (500 for the client) or on a WebSocket message "
        "(closed with 1011). Fix the stage."
    ),
    "first_byte_deadline_exceeded": "`timeouts.first_byte` passed while `stage` was running; the client got a 504.",
    "go_proxy_configuration": (
        "The configuration file is azure-openai-proxy's; convert it as `advice` says, and check `differences`."
    ),
    "health_sharing_failed": (
        "The Redis of `store` is unavailable, so each gateway uses only what it sees itself; check Redis."
    ),
    "health_sharing_restored": "Health of deployments is shared through Redis again; nothing to do.",
    "issuer_keys_fetch_failed": (
        "The signing keys of a token issuer could not be fetched; the cached ones are used for `kept_for` "
        "more seconds. Check the issuer's URL and the network."
    ),
    "issuer_without_usable_keys": (
        "The issuer publishes no key with which tokens can be verified; its tokens are rejected. Check the issuer."
    ),
    "limit_store_available": "The Redis of `store:` responds again, after this many seconds. Nothing to do.",
    "limit_store_key_conflict": (
        "A key of the counters holds another kind of value. Give the gateways a `prefix` of their own in `store:`."
    ),
    "limit_store_settlements_lost": (
        "The gateway stopped before it could settle these charges; they count until their period ends. Nothing to do."
    ),
    "limit_store_unavailable": (
        "The Redis of `store:` does not respond; `on_error` of `rate_limit` decides about requests meanwhile. "
        "Check Redis; the gateway retries once per second."
    ),
    "limit_table_full": (
        "The table of the workers' counters is full, and some limits start from zero. Limit fewer distinct "
        "names (`per: model`, `per: client`), or use `store:`."
    ),
    "listening": "The gateway listens on `address`; nothing to do.",
    "pool_failed": (
        "No deployment of the pool could serve a request, and its client got an error; `attempts` has each "
        "attempt, `stopped` why there were no more, `resting` the unavailable deployments."
    ),
    "probe_failed": "A bug in an active probe (`health: probe`); report it.",
    "rate_limiting_unavailable": (
        "At the start of a stage the store of counters is unavailable; `consequence` says how requests are "
        "handled. Check `store:`."
    ),
    "reload_crashed": "A bug, or no thread is left; requests and later reloads go on. Report it.",
    "reload_failed": "The current configuration stays; correct each of `mistakes`.",
    "reload_loop_ended": (
        "A bug ended the reload loop; requests go on, and only a restart applies changes. Report it."
    ),
    "reload_socket_available": "`gateway reload` can reach this gateway again; nothing to do.",
    "reload_socket_unavailable": (
        "`gateway reload` cannot reach this gateway; send SIGHUP, and end the process that `reason` names."
    ),
    "reload_unchanged": "A reload was asked for and the files have not changed; nothing to do.",
    "reloaded": "The new configuration serves; `changes` lists the differences.",
    "request_rejected": (
        "A request was rejected before its team's pipeline ran: invalid head, unknown path, body or "
        "connection limit. Look at `error` and `reason`; bytes of the request are never logged."
    ),
    "restart_ignored": "SIGUSR2 has no effect on a single process; a rolling restart needs `--workers 2` or more.",
    "restart_needed": "A reload changed a setting that needs a restart of the gateway.",
    "rolling_restart": "A rolling restart begins; nothing to do.",
    "rolling_restart_failed": (
        "The new workers could not serve and the old ones stay; correct `reason` and send SIGUSR2 again."
    ),
    "stage_failed": "A stage raised an exception and the client got a 500; fix the stage.",
    "stage_stop_failed": "A stage failed or took too long to stop; its resources may not be released.",
    "stopped": "The gateway has stopped.",
    "stopping": "The gateway got SIGTERM or SIGINT and begins to drain; a second signal stops it immediately.",
    "stream_failed": (
        "A filter or a stage's stream raised an exception while a response was streaming; the client got an "
        "`error` event. Fix the stage."
    ),
    "systemd_notify_failed": "A notification to systemd (NOTIFY_SOCKET) failed.",
    "worker_died": (
        "A worker ended unexpectedly; another starts after `restart_in` seconds. Look at `exit` and at the "
        "lines before it."
    ),
    "worker_ready": "A worker serves; nothing to do.",
    "worker_reload_late": (
        "A worker does not confirm a prepared reload in time; it does when it can. If it stays, look for code "
        "that blocks it."
    ),
    "workers_differ": (
        "Workers have read different files because one was replaced after a change; all are reloaded, nothing to do."
    ),
    "workers_ready": "All workers serve; nothing to do.",
}
"""The name of each log event, and its meaning for an operator."""

KEYS: dict[str, str] = {
    "address": "the address on which the gateway listens",
    "admin": "the address of the admin listener",
    "advice": "what to do",
    "at": "file and line of the code that blocks",
    "attempts": "each attempt: deployment, outcome and duration",
    "callback": "the name of the deferred function",
    "changes": "the differences between the configurations; secrets as `***`",
    "charges": "the number of charges",
    "client_id": "the client id of an Entra identity",
    "connections": "the limit of connections",
    "consequence": "what happens to requests meanwhile",
    "deployment": "a deployment, as RESOURCE/DEPLOYMENT",
    "descriptors": "the number of file descriptors that the process may have",
    "differences": "settings that the gateway handles differently from azure-openai-proxy",
    "enough_for": "the number of clients for which there are descriptors",
    "error": "a code, or the name of an exception",
    "exchanges": "the number of running exchanges",
    "exit": "the status or signal of an ended process",
    "file": "the path of a file",
    "frames": "the innermost frames of a traceback: file, line and function",
    "grace": "the grace period, in seconds",
    "identity": "the kind of an Entra identity",
    "inside": "the library function that was called",
    "issuer": "the URL of a token issuer",
    "kept": "the ids of the cached keys",
    "kept_for": "for how many seconds the cached value is still used",
    "limit": "the limit that was reached",
    "message": "the text of an exception",
    "mistakes": "each mistake, as file:line:column and text",
    "pid": "the id of a process",
    "pids": "the ids of processes",
    "pool": "the name of a pool",
    "prefix": "the prefix of keys in Redis",
    "reason": "why, in words",
    "request_id": "the id of the request, as in `x-request-id`",
    "restart_in": "seconds until the next start",
    "resting": "the deployments that get no requests now",
    "rows": "the number of rows of the table",
    "seconds": "a duration, in seconds",
    "stage": "the id of a stage",
    "state": "the state in a notification",
    "status": "the HTTP status of the response",
    "stopped": "why there were no more attempts",
    "store": "the URL of a Redis, without its password",
    "team": "the name of a team",
    "teams": "the number of teams",
    "tenant": "the tenant of an Entra identity",
    "words": "the message of Azure or of the gateway",
}
"""The keys of log events but `exchange` and `counters`, whose keys `docs/operating.md` lists."""
