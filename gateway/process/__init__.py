"""Processes: the supervisor and its workers, reloads, and the service manager.

Workers and what they tell their supervisor, generations of a configuration, file watching, the control socket of
`gateway reload`, systemd notification, and the choice of event loop. What a process serves is `server.py`.
"""
