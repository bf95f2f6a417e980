"""``hvhost version``."""

from hvhost.cli.machines import Json


def version(json: Json = False) -> None:
    """Print the version of hvhost.

    \b
    Examples:
      hvhost version
      hvhost version --json | jq -r .version
    """
    from hvhost.version import own_version, say_version

    if json:
        from hvhost.cli import output

        output.print_json({"version": own_version()})
    else:
        say_version()
