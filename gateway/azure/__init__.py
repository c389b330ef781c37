"""What Azure OpenAI is: its operations, URLs, resources and peculiarities.

The operation table, the URL of an operation at a resource, where a request names its model, batch files, which requests
are idempotent, errors inside streams, and redaction of the resource's key. No sockets: those are in `transport/`.
"""
