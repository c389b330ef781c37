"""Mutants of requests and of Azure's answers, against a running gateway and against another parser: `make fuzz`."""
