"""The version of the project; `moee.__version__` is the same."""

VERSION = "0.2.0"
