"""The version of the project; `moee.__version__` is the same."""

VERSION = "0.1.0"
