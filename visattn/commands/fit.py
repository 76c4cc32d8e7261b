"""Train a model."""


def run_cli(args: list[str] | None = None) -> None:
    """Run Lightning's command line; imported when called, since it takes seconds."""
    from visattn.tasks.command_line import run_cli as run

    run(args)
