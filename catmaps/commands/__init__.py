"""One module a command: a dataclass of its arguments with `run`, and `read`, which parses it."""
