"""Pools of deployments: which deployment a request goes to, and what happens if it fails.

`Selector` (selection) balances requests by weight, load and headroom. `Retrier` (retries, attempts) sends a request
again, as the retry policy and the retry budget allow. Each deployment has a circuit breaker with a failure window and a
slow start; `Health` has all of them, active probes test open circuits, and shared health passes changes to other
gateways. A single request to one deployment is in `upstream.py`.
"""
