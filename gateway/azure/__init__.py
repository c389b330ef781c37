"""Azure OpenAI: its operations, URLs, resources and peculiarities.

The operation table, the URL of an operation at a resource, the model in a request and the deployment that replaces it,
batch files, idempotent requests, errors inside streams, and redaction of the resource's key. No sockets: those are in
`transport/`.
"""
