"""The subcommands of `hmoe`: what each takes, and a thin call into the package. Imports of weight are in the calls."""
