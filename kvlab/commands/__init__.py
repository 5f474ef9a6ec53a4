"""The subcommands of `kvlab`, one file per chapter."""
