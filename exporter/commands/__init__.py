"""One module a command: `add_parser` declares its flags, `run` calls one function, shows the result, returns the exit code."""
