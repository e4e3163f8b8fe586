"""The command line in this process."""

from exporter import cli


def run(*words: object) -> int:
    """Exit code of `moee WORDS`, whether it is returned or raised."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as exit:
        return exit.code
