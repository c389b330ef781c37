"""Pools of deployments: which one a request goes to, and what happens if it fails.

Selection, the retry policy and retries with their budget, a circuit breaker for each deployment, active probes, and
health that several gateways share. A single request to one deployment is `upstream.py`.
"""
