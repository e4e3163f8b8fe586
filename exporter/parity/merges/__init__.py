"""Parity of models that merge tokens: whose matchings the reference follows, and whether they are right."""
