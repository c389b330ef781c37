"""Views for operators: the admin listener, and `gateway doctor` with its diagnosis.

Read-only by design: nothing here changes the configuration or the traffic.
"""
