"""The exception for errors that a user can fix; the command line prints it without a traceback."""


class UserError(Exception):
    """An error that the user can fix; its one sentence names the problem, the file and the remedy.

    The command line prints the sentence without a traceback and exits with code 2.
    """
