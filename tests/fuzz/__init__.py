"""Mutated requests and responses, against a running gateway and against another parser: `make fuzz`."""
