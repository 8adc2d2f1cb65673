"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user asked for: names the thing and the mend, in one line.

    The command line prints it without a traceback and exits with status 2.
    """
