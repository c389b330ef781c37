"""Authentication: who sends a request, and the credential that Azure gets.

API keys and their digests, tokens of clients (OpenID Connect) and the keys that sign them, Entra tokens for Azure and
their background refresh, and the addresses of clients behind proxies. The team of a caller is found in `teams.py`.
"""
