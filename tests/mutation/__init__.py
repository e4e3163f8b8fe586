"""Mutation testing: small faults in the source, one at a time, each of which a test must notice. Run by `make mutate`."""
