"""The `fedfora` command: one thin file per subcommand."""
