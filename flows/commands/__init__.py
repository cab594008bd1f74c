"""The commands of `enginery`. Their modules import typer alone; what a command needs it imports when it runs."""
