"""The one exception a user is meant to see; every room raises it and the command line prints it."""


class UserError(Exception):
    """Something the user can mend: one sentence that names the thing, the file and the remedy.

    The command line prints the sentence without a traceback and exits with code 2.
    """
