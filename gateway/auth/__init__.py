"""Who sends a request, and with which credential Azure is asked.

API keys and their digests, tokens of clients (OpenID Connect) and the keys that sign them, Entra tokens for Azure and
their background refresh, and the address of a client behind proxies. Which team a caller belongs to is `teams.py`.
"""
