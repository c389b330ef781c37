"""Processes: the supervisor and its workers, reloads, and the service manager.

Workers, their restarts and the messages between them and the supervisor; generations of a configuration, file watching,
the control socket of `gateway reload`, systemd notification, and the choice of event loop. What a process serves is in
`server.py`.
"""
